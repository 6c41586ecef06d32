#!/usr/bin/env bash
# Installs what building and testing needs from Debian's packages, and those given as arguments; does
# nothing when all is there.
set -euo pipefail

packages=(
  g++ make cmake ninja-build pkg-config
  openmpi-bin libopenmpi-dev
  libabsl-dev nlohmann-json3-dev libcli11-dev libspdlog-dev
  libpcre2-dev libutf8proc-dev libisal-dev libxxhash-dev
  libgtest-dev iproute2
  "$@"
)

missing=()
for package in "${packages[@]}"; do
  status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
  [ "$status" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  echo "packages: all ${#packages[@]} are installed"
  exit 0
fi

echo "packages: installing ${missing[*]}"
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "error: run as root, or install sudo" >&2; exit 1; }
  as_root=(sudo)
fi
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
echo "packages: done"
