#!/usr/bin/env bash
# The daily part of parity, and what else depends on names of the libraries, with other versions of them:
#
#   tests/versions.sh transformers==5.22.2
#   tests/versions.sh transformers==5.23.0 trl==1.16.0 accelerate==1.15.0 -- -k mixtral
#
# What is not named stays as it is installed: the packages of this environment lie behind those of a new one, which is
# made in .cache/versions and kept. Words after -- go to pytest. Exit code: pytest's.
set -euo pipefail
cd "$(dirname "$0")/.."

# 1. Which versions, and what pytest is told.
wanted=()
while [[ $# -gt 0 && $1 != -- ]]; do
  wanted+=("$1")
  shift
done
[[ ${1:-} == -- ]] && shift
if [[ ${#wanted[@]} -eq 0 ]]; then
  echo "usage: tests/versions.sh PACKAGE==VERSION ... [-- PYTEST WORDS]" >&2
  exit 2
fi

# 2. An environment of them, in front of this one.
python=${PYTHON:-.venv/bin/python}
[[ -x $python ]] || python=$(command -v python3)
environment=.cache/versions/$(IFS=-; echo "${wanted[*]}")
if [[ ! -e $environment/made ]]; then
  "$python" -m venv --clear "$environment"
  behind=$("$python" -c 'import sys; print("\n".join(p for p in sys.path if p.endswith("site-packages")))')
  own=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "$behind" > "$own/behind.pth"
  "$environment/bin/python" -m pip install --quiet "${wanted[@]}"
  touch "$environment/made"
fi
"$environment/bin/python" -c '
from importlib.metadata import version
print(", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers", "trl", "accelerate")))'

# 3. The tests.
export HF_HUB_OFFLINE=1
exec "$environment/bin/python" -m pytest -q \
  tests/training/test_parity.py tests/families tests/engine/test_seams.py tests/engine/test_recorders.py \
  tests/engine/test_same_function.py tests/checkpoint/test_origin.py "$@"
