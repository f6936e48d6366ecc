"""How several machines are started: HOSTFILE with run.sh (each machine by hand, or pdsh), and the SLURM script.

``pdsh``, ``ssh``, ``srun`` and ``scontrol`` are stand-ins of a few lines that do on this machine what those do on many.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.cluster import free_port
from tests.support.recipe import ENVIRONMENT, ROOT, command, save_model, text_rows, venv_for_run_sh, write_jsonl

PDSH = """#!/usr/bin/env bash
# pdsh -S -f N -w HOST,HOST WORDS...: one line for the shell of each host, where nothing of this environment is left
set -o pipefail
[ "$1 $2 $4" = "-S -f -w" ] || exit 99
hosts=${5//,/ } && shift 5
node=0
for host in $hosts; do
  line="$*"
  echo "$host: $line" >>"$LOG"
  env -i PATH="$PATH" HOME="$HOME" bash -c "${line//%n/$node}" 2>&1 | sed "s/^/$host: /" &
  pids+=($!) && node=$((node + 1))
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""
SRUN = """#!/usr/bin/env bash
# srun OPTIONS... bash -c SCRIPT...: as two tasks, which differ in SLURM_NODEID
while [ "$1" != bash ]; do echo "$1" >>"$LOG" && shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
trap 'kill -USR1 $first $second' USR1
code=0
for task in $first $second; do
  until wait $task; last=$?; ! kill -0 $task 2>/dev/null; do :; done
  [ $last = 0 ] || code=$last
done
exit $code
"""
SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames gpu[3-4]" ] && printf '127.0.0.2\\n127.0.0.3\\n' && exit
echo "scontrol $*" >>"$LOG"
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A copy of what is started, with the stand-ins in ``bin/``."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("ds_configs", "recipes", "run.sh", "pyproject.toml", "requirements.txt"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / name)
    venv_for_run_sh(folder)
    (folder / "bin").mkdir()
    for name, text in {"pdsh": PDSH, "ssh": "#!/bin/sh\n", "srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "hosts").write_text("# two machines\n127.0.0.2 slots=1\n\n127.0.0.3   slots=1 # the second\n")
    return folder


def environment(folder: Path, **more: str) -> dict[str, str]:
    own = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "LOG": f"{folder}/log", "HOME": str(folder)}
    return {**os.environ, **ENVIRONMENT, **own, "MASTER_PORT": str(free_port()), **more}


def run_sh(folder: Path, *words: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["./run.sh", *words], cwd=folder, env=environment(folder, **more), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def training(folder: Path) -> list[str]:
    save_model(folder / "tiny")
    write_jsonl(folder / "train.jsonl", text_rows(16))
    words = command(Path("tiny"), Path("train.jsonl"), Path("ds_configs/zero1_ep2.json"), Path("out"))
    return [*words, "--max_steps", "2", "--save_steps", "2", "--report_to", "none"]


def check_trained(folder: Path) -> None:
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["layout"].startswith("2 ranks: EP 2 x EDP 1")
    assert len(list((folder / "out" / "checkpoint-2").glob("rng_state_*.pth"))) == 2


def test_every_machine_by_hand(workplace: Path) -> None:
    """``HOSTFILE=hosts NODE_RANK=i ./run.sh finetune ...`` on each: they find each other and train as one."""
    words = training(workplace)
    port = str(free_port())
    nodes = [run_sh(workplace, "finetune", *words, HOSTFILE="hosts", NODE_RANK=i, MASTER_PORT=port) for i in "01"]
    said = [node.communicate(timeout=150)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    check_trained(workplace)


@pytest.mark.conformance
def test_pdsh(workplace: Path) -> None:
    """All machines from one; the others have only the environment that ``.deepspeed_env`` gives them."""
    words = training(workplace)
    (workplace / ".deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in ENVIRONMENT.items() if k != "RANK"))
    run = run_sh(workplace, "finetune", *words, HOSTFILE="hosts")
    said, _ = run.communicate(timeout=200)
    assert run.returncode == 0, said
    check_trained(workplace)
    lines = (workplace / "log").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == ["127.0.0.2", "127.0.0.3"]
    assert all(f"cd {workplace};" in line and "--master_addr=127.0.0.2" in line for line in lines)


@pytest.mark.parametrize(
    ("hosts", "more", "words", "said"),
    [
        (
            None,
            {"HOSTFILE": "nowhere"},
            [],
            "HOSTFILE=nowhere: no such file; one line for each machine: ADDRESS slots=",
        ),
        ("a slots=8\nb 8\n", {}, [], "HOSTFILE=hosts: b 8: must be ADDRESS slots=GPUS"),
        ("# none\n", {}, [], "HOSTFILE=hosts: names no machine"),
        (None, {"NODE_RANK": "2"}, [], "NODE_RANK=2: must be 0 to 1, the line of this machine in hosts"),
        (None, {"NODE_RANK": "one"}, [], "NODE_RANK=one: must be 0 to 1"),
        (None, {}, ["--dataset_name", "$(reboot)"], "$(reboot): the shells of the other machines may read it as some"),
        (None, {}, ["--dataset_name", "my data"], "my data: the shells of the other machines may read it as something"),
    ],
)
def test_refused(workplace: Path, hosts: str | None, more: dict[str, str], words: list[str], said: str) -> None:
    if hosts is not None:
        (workplace / "hosts").write_text(hosts)
    run = run_sh(workplace, "finetune", *words, **{"HOSTFILE": "hosts", **more})
    answer, _ = run.communicate(timeout=60)
    assert (run.returncode, answer.startswith(f"error: {said}"), answer.count("\n")) == (2, True, 1), answer


def test_without_pdsh(workplace: Path) -> None:
    (workplace / "bin" / "pdsh").unlink()
    tools = workplace / "tools"  # what run.sh needs, wherever this machine keeps it, and no pdsh of its own
    tools.mkdir()
    for name in ("bash", "env", "dirname", "cat", "cksum", "grep", "head", "tr"):
        (tools / name).symlink_to(shutil.which(name) or name)
    run = run_sh(workplace, "finetune", HOSTFILE="hosts", PATH=str(tools))
    answer, _ = run.communicate(timeout=60)
    assert run.returncode == 2
    assert answer == (
        "error: HOSTFILE=hosts needs pdsh, which is not installed; install it, or start this on every machine with "
        "NODE_RANK=0, 1, ...\n"
    )


def start_sbatch(folder: Path, *words: str, **more: str) -> subprocess.Popen[str]:
    """What SLURM does with the script on the first node of a job of two."""
    port = next(port for port in iter(free_port, None) if 20000 <= port < 40000)  # the script makes it of the job's id
    job = {"SLURM_JOB_ID": str(port - 20000), "SLURM_JOB_NODELIST": "gpu[3-4]", "SLURM_NNODES": "2"}
    job |= {"SLURM_SUBMIT_DIR": str(folder), "SLURM_GPUS_ON_NODE": "1", **more}
    spooled = folder / "bin" / "slurm_script"
    shutil.copy2(ROOT / "recipes" / "slurm.sbatch", spooled)
    return subprocess.Popen(
        ["bash", str(spooled), *words], cwd="/", env=environment(folder, **job), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def sbatch(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """:func:`start_sbatch`, to its end."""
    job = start_sbatch(folder, *words, **more)
    said, _ = job.communicate(timeout=200)
    return subprocess.CompletedProcess(job.args, job.returncode, said)


def test_slurm_starts_one_launcher_on_each_node(workplace: Path) -> None:
    """The exact words on each node, flags that a shell would read among them."""
    (workplace / ".venv/bin/python").write_text('#!/bin/sh\nprintf "%s\\0" "$@" >"$LOG.$SLURM_NODEID"\n')
    flags = ["--dataset_name", "my data; $(reboot) 'x'", "--run_name", '"a" *']
    done = sbatch(workplace, "pretrain", *flags)
    assert done.returncode == 0, done.stdout
    for node in (0, 1):
        words = (workplace / f"log.{node}").read_text().split("\0")[:-1]
        port = words[words.index("--master_port") + 1]
        assert words == [
            *("-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "1"),
            *("--master_addr", "127.0.0.2", "--master_port", port, f"{workplace}/recipes/pretrain.py", *flags),
        ]
    assert "--kill-on-bad-exit=1" in (workplace / "log").read_text()


def test_slurm_refuses_what_is_no_recipe_and_a_missing_environment(workplace: Path) -> None:
    done = sbatch(workplace, "train")
    assert (done.returncode, done.stdout.count("\n")) == (2, 1)
    assert done.stdout.startswith("error: sbatch recipes/slurm.sbatch train: must be finetune or pretrain")
    shutil.rmtree(workplace / ".venv")
    done = sbatch(workplace, "finetune")
    assert (done.returncode, done.stdout.count("\n")) == (2, 1)
    assert done.stdout.startswith(f"error: {workplace}/.venv/bin/python: not there; run ./run.sh check --help once")


@pytest.mark.conformance
def test_slurm_trains(workplace: Path) -> None:
    """With the launcher on both nodes, to the end."""
    done = sbatch(workplace, "finetune", *training(workplace))
    assert done.returncode == 0, done.stdout
    check_trained(workplace)


def say_until(process: subprocess.Popen[str], words: str) -> str:
    """What it printed up to the line with ``words``."""
    assert process.stdout is not None
    said = ""
    while words not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    return said


@pytest.mark.conformance
def test_slurm_saves_ahead_of_the_time_limit_and_goes_on(workplace: Path) -> None:
    """SIGUSR1 to the script: both nodes stop at one step, the job is queued again, and its next start goes on."""
    words = [*training(workplace), "--max_steps", "40", "--logging_steps", "1"]
    job = start_sbatch(workplace, "finetune", *words)
    say_until(job, "'loss'")
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=100)
    assert job.returncode != 0, said
    assert "is saved in" in said, said
    assert "scontrol requeue " in (workplace / "log").read_text()
    assert not (workplace / "out" / "summary.json").exists()

    done = sbatch(workplace, "finetune", *words, SLURM_RESTART_COUNT="1")
    assert done.returncode == 0, done.stdout
    assert json.loads((workplace / "out" / "summary.json").read_text())["steps"] == 40


@pytest.mark.conformance
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_told_to_stop_over_pdsh(workplace: Path, number: signal.Signals) -> None:
    """run.sh asks pdsh to signal a rank on each machine; the ranks save, and it answers 143."""
    (workplace / ".deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in ENVIRONMENT.items() if k != "RANK"))
    run = run_sh(
        workplace, "finetune", *training(workplace), "--max_steps", "400", "--logging_steps", "1", HOSTFILE="hosts"
    )
    say_until(run, "'loss'")
    run.send_signal(number)
    said, _ = run.communicate(timeout=100)
    assert run.returncode == 143, said
    assert "is saved in" in said, said
