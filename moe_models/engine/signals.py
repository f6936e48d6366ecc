"""How a run stops when it is told to: SIGTERM or SIGUSR1 to any rank, or the end of the launcher that started it.

Batch systems send a signal some minutes before they kill. What a rank does with it depends on what it is doing:

- While a checkpoint can be written, which is during training, the ranks agree on a step, save it and end
  (``MoETrainer``, :class:`Vote`). Signals reach ranks at different times, and a save is a collective.
- At any other time (reading, exporting, all of a run with ``--save_strategy no``) nothing can be saved that is not on
  the disk already. The rank ends at once, from a thread: the main thread may be in a collective or in a long read.

The exit code is 143 in both cases. The ``deepspeed`` launcher dies of a signal and tells nobody, and ``kill -9`` tells
nobody either. So each rank also watches the launchers above it.

transformers' ``enable_jit_checkpoint`` does not serve here: each rank would stop at the step that its own signal met,
and it may save before the optimizer's step.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from types import FrameType, TracebackType
from typing import Any, NoReturn

import psutil

from moe_models import ranks
from moe_models.errors import RunError
from moe_models.nodes import watch

EXIT_TOLD = 128 + signal.SIGTERM
"""Exit code of a run that was told to stop: 143, what a shell reports for SIGTERM."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_FOR_RANK_0 = 2.0
"""How long another rank leaves it to rank 0 to report that the run ends."""
SECONDS_FOR_A_SIGNAL = 5.0
"""How long a rank that lost another one waits to be told why, before it reports that as an error."""
LOST_A_PEER = ("Connection closed by peer", "Connection reset by peer", "NCCL", "gloo")
"""In what torch raises from a collective when another rank is gone."""
LAUNCHERS = (
    "deepspeed.launcher.launch", "deepspeed.launcher.runner", "deepspeed/launcher/", "bin/deepspeed", "bin/torchrun",
    "torch.distributed.run", "torch.distributed.launch", "bin/accelerate", "accelerate.commands.launch",
    "moe_models.nodes.launcher", "recipes/quickstart.py",
)  # fmt: skip
"""What a launcher's command line has in it. A shell above it may end without ending the run (``nohup``)."""

OF_A_LAUNCHER = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")
"""Variables that deepspeed's ``launch.py`` and ``torchrun`` give to the ranks."""


class ToldToStopError(RunError):
    """The run was told to stop, and did. The message says what was saved."""


class _Then(Enum):
    """What a rank that is told to stop does."""

    END = "at once"
    SAVE = "at the end of the step, when the main thread has saved it"
    NOTHING = "it is ending already"


class _Ear:
    """The signals of this process and the life of its launchers; a thread that ends the process where nothing waits."""

    def __init__(self) -> None:
        self.reason = ""
        """Why this rank is to stop; empty while it is not."""
        self.then = _Then.END
        self._launchers = launchers_above(psutil.Process())
        self._siblings: list[psutil.Process] = []
        self._pid = os.getpid()

        # 1. Numbers of signals come through a pipe. C code writes them there, even if the main thread never returns to
        #    the interpreter.
        self._heard, speak = os.pipe()
        os.set_blocking(self._heard, False)
        os.set_blocking(speak, False)
        signal.set_wakeup_fd(speak, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, _left_to_the_thread)
        os.register_at_fork(after_in_child=_leave_it_to_the_parent)

        # 2. The kernel tells of a launcher's end through a descriptor. Where it has none, the thread looks by itself.
        self._ends = [end for end in map(_end_of, self._launchers) if end is not None]

        # 3. The thread that listens.
        threading.Thread(target=self._listen, daemon=True, name="signals").start()

    def know_siblings(self) -> None:
        """Note the other ranks of this machine, now that all of them run."""
        me = psutil.Process()
        if me.ppid() in [launcher.pid for launcher in self._launchers]:
            self._siblings = [rank for rank in ranks_below(self._launchers[0]) if rank.pid != me.pid]

    def _listen(self) -> None:
        while True:
            told, _, _ = select.select([self._heard, *self._ends], [], [], SECONDS_BETWEEN_LOOKS)
            self._ends = [end for end in self._ends if end not in told]  # it would be told again and again
            try:
                numbers = os.read(self._heard, 4096)
            except BlockingIOError:
                numbers = b""
            names = [signal.Signals(number).name for number in numbers if number in SIGNALS]
            gone = [launcher for launcher in self._launchers if not is_alive(launcher)]
            if not self.reason and names:
                self.reason = names[0]
            elif not self.reason and gone:
                self.reason = f"the launcher (process {gone[-1].pid}) is gone"
            elif not self.reason and launcher_was_lost(self._launchers):
                self.reason = "the launcher is gone"
            if self.reason:
                self._act(by_signal=bool(names))

    def _act(self, by_signal: bool) -> None:
        if self.then is _Then.END:
            self._end("nothing that is complete was lost", by_signal)
        # A rank that was killed never votes, and the others would wait for it in a collective.
        elif self.then is _Then.SAVE and not all(is_alive(sibling) for sibling in self._siblings):
            self._end("another rank was killed, so no checkpoint could be written", by_signal)

    def _end(self, what: str, by_signal: bool) -> NoReturn:
        """Say so once for all ranks, and end this process whatever its main thread is doing."""
        if ranks.rank() != 0:
            time.sleep(SECONDS_FOR_RANK_0)  # where rank 0 ends as well, the launcher ends this one meanwhile
        if ranks.rank() == 0 or (by_signal and self._rank_0_goes_on()):
            tell_stopped(f"{self.reason}: {what}")
        watch.last_words([f"{self.reason}: {what}"], EXIT_TOLD)
        sys.stdout.flush()
        os._exit(EXIT_TOLD)

    def _rank_0_goes_on(self) -> bool:
        """Whether rank 0 is a process of this machine that has heard nothing."""
        if not self._launchers:
            return False
        return any(rank.environ()["RANK"] == "0" and is_alive(rank) for rank in ranks_below(self._launchers[0]))


def _left_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Python's half of a signal handler. The thread has the number already, through the pipe."""


def _leave_it_to_the_parent() -> None:
    """In a forked child: its signals are not the rank's."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, _in_a_child)


def _in_a_child(number: int, frame: FrameType | None) -> None:
    """What a signal does to a forked child: nothing to a worker of a data loader, else what it does by default.

    Launchers send SIGTERM to all that is below them. A rank without its loader's workers could not finish its step. A
    worker whose rank has gone ends by itself.
    """
    data = sys.modules.get("torch.utils.data")
    if data is not None and data.get_worker_info() is not None:
        return
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _end_of(process: psutil.Process) -> int | None:
    """A descriptor that can be read when ``process`` has ended."""
    try:
        return os.pidfd_open(process.pid)
    except (AttributeError, OSError):  # no Linux, an old kernel, or it has just ended
        return None


def is_alive(process: psutil.Process) -> bool:
    """Whether this very process still runs; one that waits to be reaped does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def launchers_above(process: psutil.Process) -> list[psutil.Process]:
    """The parents of ``process``, from the nearest, as long as they are launchers."""
    found = []
    for parent in process.parents():
        try:
            if not _is_launcher(parent):
                break
        except psutil.Error:
            break
        found.append(parent)
    return found


def launcher_was_lost(launchers: list[psutil.Process]) -> bool:
    """Whether a launcher of this rank had ended before the rank could look for it; ``launchers`` are those it found."""
    try:
        # 1. Which process must have a launcher as its parent: launch.py the deepspeed command, and a rank that has the
        #    variables of launch.py or torchrun one of these.
        orphan = psutil.Process()
        if launchers:
            orphan = launchers[-1]
            if "deepspeed.launcher.launch" not in orphan.cmdline():
                return False
        elif not any(name in os.environ for name in OF_A_LAUNCHER):
            return False
        # 2. Has init taken it over? What init itself has started leads a process group, or is in that of init.
        parent = orphan.parent()
        if parent is None or not (parent.pid == 1 or parent.name() == "systemd"):
            return False
        return os.getpgid(orphan.pid) not in (orphan.pid, os.getpgid(parent.pid))
    except (psutil.Error, OSError):  # it is ending at this moment: the next look will tell
        return False


def _is_launcher(process: psutil.Process) -> bool:
    words = [word for word in process.cmdline() if " " not in word]  # "bash -c SCRIPT" is none
    return any(name in word for name in LAUNCHERS for word in words[:6])


def ranks_below(launcher: psutil.Process) -> list[psutil.Process]:
    """The ranks that ``launcher`` started on this machine and that still run."""
    found = []
    try:
        for child in launcher.children():
            if "RANK" in child.environ():
                found.append(child)
    except psutil.Error:  # a process ended while it was looked at
        pass
    return found


def tell_stopped(line: str) -> None:
    """Print why a run stopped that was told to."""
    print(f"\nstopped: {line}", file=sys.stderr, flush=True)


_ear: _Ear | None = None


def listen() -> None:
    """From now on a signal, or the end of the launcher, ends this process with code 143."""
    global _ear
    if _ear is None:
        _ear = _Ear()
        sys.excepthook = _quiet_if_told


def _quiet_if_told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In place of ``sys.excepthook``: a rank whose collective failed because another has ended, as told, ends so too.

    Its own signal may still be on the way: the launcher sends it when it sees that the other has ended.
    """
    if _ear is not None and any(words in str(error) for words in LOST_A_PEER):
        deadline = time.monotonic() + SECONDS_FOR_A_SIGNAL
        while not _ear.reason and time.monotonic() < deadline:
            time.sleep(0.1)
        if _ear.reason:
            time.sleep(SECONDS_FOR_A_SIGNAL)  # the thread ends this process
    sys.__excepthook__(kind, error, trace)


@contextmanager
def saved_at_the_end_of_a_step() -> Iterator[None]:
    """Inside, the main thread saves what it has when it is told to stop: see :class:`Vote`."""
    if _ear is None:
        yield
        return
    _ear.know_siblings()
    _ear.then = _Then.SAVE
    try:
        yield
        _ear.then = _Then.END
    except ToldToStopError:
        _ear.then = _Then.NOTHING
        raise
    except BaseException:
        _ear.then = _Then.END
        raise


def end_as_told(error: ToldToStopError) -> NoReturn:
    """End this process after a save that all ranks have completed."""
    assert _ear is not None
    _ear.then = _Then.NOTHING  # the launcher signals the others as soon as one has ended
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
    if ranks.rank() == 0:
        tell_stopped(f"{_ear.reason or 'another rank was told to stop'}: {error}")
    watch.leave()
    sys.stdout.flush()
    # Not through the interpreter's teardown: see skip_teardown in recipes/finetune.py.
    os._exit(EXIT_TOLD)


class Vote:
    """The ranks' agreement on the step at which they stop.

    A vote is cast after the last backward pass of a step and counted at the step's end. In between, the host waits for
    the gradient norm anyway, so counting does not make it wait for the GPU. A signal that comes after the vote counts
    in the next step.
    """

    def __init__(self, device: Any) -> None:
        import torch

        on_gpu = device.type == "cuda"
        self._votes = torch.zeros(1, dtype=torch.int32, device=device)
        self._result = torch.zeros(1, dtype=torch.int32, pin_memory=on_gpu)
        self._counted: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    def cast(self) -> None:
        """Every rank: say whether this one was told to stop. Does nothing in a process that does not listen."""
        if _ear is None or _ear.then is not _Then.SAVE:
            return
        import torch.distributed as dist

        self._votes.fill_(int(bool(_ear.reason)))
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._votes, op=dist.ReduceOp.MAX)
        self._result.copy_(self._votes, non_blocking=True)
        if self._counted is not None:
            self._counted.record()

    def stop(self) -> bool:
        """Whether any rank wanted to stop when the last vote was cast: equal on all ranks."""
        if self._counted is not None:
            self._counted.synchronize()
        return bool(self._result.item())
