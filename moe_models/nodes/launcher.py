"""The ``deepspeed`` launcher, in this process, which hands a signal on to the ranks and stays until they have ended.

    python -m moe_models.nodes.launcher --num_gpus 8 recipes/finetune.py ARGS...

``./run.sh`` starts it. DeepSpeed's own command dies of SIGTERM and SIGUSR1 on one machine and tells nobody. The ranks
notice that (``moe_models/engine/signals.py``), but what waits for the launcher (a container, systemd, a batch system)
believes that all is over and kills them while they save. Here SIGTERM and SIGUSR1 reach the ranks as SIGUSR1, past
``launch.py``, which would kill them 30 seconds after a SIGTERM. The exit code is then 143.

Over pdsh the ranks are other machines' processes. pdsh is asked to signal the first rank of each; the ranks agree.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType, ModuleType
from typing import Any

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_TOLD = 128 + signal.SIGTERM


class _HandOn:
    """The handler of both signals."""

    def __init__(self) -> None:
        self.told = False
        for number in SIGNALS:
            signal.signal(number, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.told = True
        children = psutil.Process().children()
        if not children:  # nothing was started yet
            os._exit(EXIT_TOLD)
        for child in children:
            try:
                _signal_ranks_below(child)
            except psutil.NoSuchProcess:
                continue


def _signal_ranks_below(child: psutil.Process) -> None:
    words = child.cmdline()
    if os.path.basename(words[0]) == "pdsh" or "pdsh" in [os.path.basename(word) for word in words[:2]]:
        _signal_over_pdsh(child, words)
        return
    ranks = child.children()
    for rank in ranks:
        rank.send_signal(signal.SIGUSR1)
    if not ranks:  # launch.py has not come that far
        child.terminate()


def _signal_over_pdsh(child: psutil.Process, words: list[str]) -> None:
    """SIGUSR1 to the first rank of each machine, found by its command line."""
    start = next(place for place, word in enumerate(words) if os.path.basename(word) == "pdsh")
    hosts = words.index("-w") + 2
    recipe = next(word for word in words[hosts:] if word.endswith(".py"))
    pattern = f"{recipe} --local_rank=[0] "  # the brackets keep the shell that reads this line from being found
    command = [*words[start:hosts], "pkill", "-USR1", "-f", f"'{pattern}'"]
    subprocess.Popen(command, env=child.environ(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class _WithoutSigterm:
    """The module ``signal`` for DeepSpeed's runner, which may not take SIGTERM away from us."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def signal(self, number: int, handler: Any) -> Any:
        """Set a handler, unless it is that of SIGTERM."""
        if number == signal.SIGTERM:
            return None
        return self._module.signal(number, handler)


class _Remembering:
    """The module ``subprocess`` for DeepSpeed's runner; remembers the process that it started last."""

    def __init__(self) -> None:
        self.last: subprocess.Popen[Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)

    def Popen(self, *args: Any, **options: Any) -> subprocess.Popen[Any]:  # noqa: N802 (its name there)
        """As in ``subprocess``."""
        self.last = subprocess.Popen(*args, **options)
        return self.last

    def code(self) -> int:
        """Of that process, as a shell reports it: 137 for one that was killed."""
        code = self.last.returncode if self.last is not None else 0
        if code is None:
            return 0
        return 128 - code if code < 0 else code


def main(words: list[str]) -> int:
    """Start DeepSpeed's runner with these words; returns its exit code, or 143 if a signal was handed on."""
    hand_on = _HandOn()
    from deepspeed.launcher import runner

    # upstream: deepspeed 0.19.8: with a hostfile the runner's handler kills all ranks 30 seconds after SIGTERM (over
    # pdsh), or fails itself (--no_ssh: it kills by a command that it has not made). Remove when: the launcher hands
    # SIGTERM on and waits for its children.
    runner.signal = _WithoutSigterm(signal)
    # upstream: deepspeed 0.19.8: the runner ends with 0 when its child was killed by a signal. Remove when: it ends
    # with another code then.
    started = _Remembering()
    runner.subprocess = started
    code = 0
    try:
        runner.main(words)
        code = started.code()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    return EXIT_TOLD if hand_on.told else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
