#!/usr/bin/env bash
# files_test.sh scripts|hostfile|kubernetes|bundle BUILD: checks what cluster/ says to shells, mpirun, Kubernetes
# and machines without packages.
# Exit code 77: the tool that checks is missing.
set -euo pipefail
cd "$(dirname "$0")/../.."

scripts=(cluster/virtual/cluster cluster/openmpi.sh cluster/slurm/ternion.sbatch
  cluster/gpu/bundle cluster/gpu/run cluster/gpu/check cluster/gpu/measure scripts/install_deps.sh "$0")

check_scripts() {
  local script
  for script in "${scripts[@]}"; do bash -n "$script"; done
  # sbatch reads its settings before the first command only.
  [ "$(sed '/^[^#]/q' cluster/slurm/ternion.sbatch | grep -c '^#SBATCH --')" -ge 3 ]
  command -v shellcheck >/dev/null || { echo "shellcheck is missing: only checked with bash -n"; return; }
  shellcheck -x "${scripts[@]}"
}

# mpirun plans a job on these hosts: 4 ranks, on hosts that need not exist. Its exit code says nothing.
check_hostfile() {
  local map
  map=$(mpirun --allow-run-as-root --hostfile cluster/hostfile.example --do-not-launch --display-map \
    true 2>/dev/null)
  echo "$map"
  [ "$(grep -c 'Data for node: node' <<<"$map")" -eq 3 ]
  [ "$(grep -c 'Process rank: ' <<<"$map")" -eq 4 ]
}

check_kubernetes() {
  python3 -c 'import yaml' 2>/dev/null || { echo "skipped: python3-yaml is missing"; exit 77; }
  python3 tests/cluster/check_mpijob.py cluster/kubernetes/mpijob.yaml cluster/openmpi.sh
}

# What is bundled runs with nothing of this machine's but the kernel, and says what is missing.
check_bundle() {
  local out
  place=$(mktemp -d)
  trap 'rm -rf "$place"' EXIT
  cluster/gpu/bundle "$1" "$place/bundle"
  cd "$place"
  out=$(env -i PATH=/usr/bin:/bin bundle/run ternion run --model bundle/models/tiny --prompt "Candle, n. 1. A" \
    --max-tokens 4 --temperature 0)
  [[ $out == "Candle, n. 1. A"* ]]
  env -i PATH=/usr/bin:/bin bundle/run gpu_test >/dev/null
  ! env -i PATH=/usr/bin:/bin bundle/run nothing 2>error || exit 1
  grep -q '^usage: ' error
  command -v nvidia-smi >/dev/null && exit
  ! bundle/check 2>error || exit 1
  grep -q 'no GPU here' error
  ! bundle/measure out tiny 2>error || exit 1
  grep -q 'failed: kernels tiny' error
}

part=$1
shift
"check_$part" "$@"
