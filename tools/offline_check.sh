#!/usr/bin/env bash
# Builds and runs a stage of benchmarks.gpu as on a rented GPU: without a network, from a fresh copy of the files, in an
# environment that has only torch, triton, numpy, pybind11, cmake, ninja and pytest. `--dry` stands in for the GPU.
# Usage: tools/offline_check.sh [ENVIRONMENT [STAGE ...]]. An environment that does not exist is created with pip.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
environment=${1:-build/offline/environment}
shift || true
stages=("${@:-correct}")
python=${PYTHON:-python3}

if [ ! -x "$environment/bin/python" ]; then
  "$python" -m venv "$environment"
  "$environment/bin/pip" install --quiet -c constraints.txt torch triton numpy pybind11 'cmake>=3.24' ninja pytest
fi
environment=$(cd "$environment" && pwd)

# The files of the working tree that git knows, without anything that was built.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z --cached --others --exclude-standard |
  tar --create --null --files-from=- --ignore-failed-read | tar --extract --directory="$copy"
cd "$copy"

# A new network namespace has only a loopback interface, which is down: nothing can be reached.
namespace=(unshare -n)
[ "$(id -u)" -eq 0 ] || namespace=(unshare -rn)
"${namespace[@]}" env -i PATH=/usr/local/bin:/usr/bin:/bin HOME="$copy" "$environment/bin/python" - <<'PYTHON'
import socket
try:
    socket.create_connection(("192.0.2.1", 80), timeout=2)
except OSError as error:
    print(f"no network: {error}")
else:
    raise SystemExit("the network must not be reachable")
PYTHON
"${namespace[@]}" env -i PATH=/usr/local/bin:/usr/bin:/bin HOME="$copy" \
  "$environment/bin/python" -m benchmarks.gpu --stage "${stages[@]}" --dry --out "$copy/gpu-report"
echo "offline: $(git -C "$root" rev-parse --short HEAD), stages ${stages[*]}: built and passed"
