#!/bin/sh
# Everything that the oracle checks: the goldens can be made again, the trainer trains what the
# runtime computes, and HF transformers agrees with us.
# usage: run.sh BUILD_DIR     (BUILD_DIR/ternion is the built command)
set -eu
build=$(realpath "${1:?usage: run.sh BUILD_DIR}")
here=$(cd "$(dirname "$0")" && pwd)
venv=$here/../../build/oracle-venv

[ -x "$build/ternion" ] || { echo "no ternion command in $build" >&2; exit 1; }

if [ ! -x "$venv/bin/python" ]; then python3 -m venv "$venv"; fi
"$venv/bin/pip" install --quiet --requirement "$here/requirements.txt"

fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
export PYTHONDONTWRITEBYTECODE=1
"$venv/bin/python" "$here/make_golden.py" --out "$fresh"
"$venv/bin/python" "$here/make_tokenizers.py" --out "$fresh"
"$venv/bin/python" "$here/compare_golden.py" "$fresh" "$here/golden"
"$venv/bin/python" "$here/check_trainer.py"
"$venv/bin/python" "$here/check_hf.py" --ternion "$build/ternion"
