"""Heartbeats between the nodes of a run: when one disappears, the others stop and say which.

A collective whose peer has vanished without a word (power, network) waits for the timeout of its process group. That
has to be long, half an hour (``--ddp_timeout``), because ranks wait in collectives while one of them reads data. So the
first process of each node counts up a number in the store of ``moe_models/nodes/meeting.py`` every two seconds, and
reads the numbers of the others. Threads do it, because the main thread may be waiting in a collective.

How a run ends early, always with one line that names the node:

- A node whose number stands still for 90 seconds, or a store that does not answer as long: exit code 1.
- A node that fails leaves its last words in the store, and the others end with these words and its exit code.
- A collective that fails because its peer was killed explains little. The exception hook finds out which node has
  fallen silent, and reports that.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from moe_models.errors import EXIT_STOPPED, EXIT_WRONG_INPUT, UserError, exit_with, tell
from moe_models.nodes.meeting import Meeting

SECONDS_BETWEEN_BEATS = 2.0
SECONDS_OF_SILENCE = 90.0
"""After which a node counts as dead. Long, because loading a large file can keep a node from beating."""
SECONDS_OF_GRACE = 5
"""After a broken connection to the store: what is left of the silence, for this rank's own exception to come first."""
DONE = "done"
"""The beat of a node that has completed the run."""


class Watch:
    """The heartbeat of this node, and its ear for the others. Starts at once."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting
        self._store = meeting.store
        self.name = meeting.name
        self._over = False
        self._pid = os.getpid()
        # Node -> (its last number, when that number was new).
        self._heard: dict[int, tuple[str, float]] = {}
        # Seconds since the store last answered, counted one by one: a suspended process does not count them.
        self._ticks = 0
        # upstream: torch 2.13.0: an exception after a lost peer names no node, and the interpreter's exit then waits
        # for process groups that lost a member. Remove when: c10d names the peer and gives up on such groups by itself.
        self._hook = sys.excepthook
        sys.excepthook = self._on_exception
        if meeting.speaks:
            threading.Thread(target=self._beat, daemon=True).start()
            threading.Thread(target=self._judge_store, daemon=True).start()

    # --- the two threads

    def _beat(self) -> None:
        """Beat, listen, judge, until the run is over."""
        number = 0
        while not self._over:
            # 1. Beat, and read everything from the store. It may be gone.
            number += 1
            try:
                self._store.set(f"beat/{self._meeting.index}", str(number))
                beats = self._beats()
                words = self._last_words()
            except RuntimeError:  # the connection broke: leave the rest to _judge_store, soon
                self._ticks = max(self._ticks, int(SECONDS_OF_SILENCE) - SECONDS_OF_GRACE)
                return
            # 2. Note which numbers have changed.
            self._ticks = 0
            now = time.monotonic()
            for node, beat in enumerate(beats):
                last, _ = self._heard.get(node, ("", 0.0))
                if last != beat:
                    self._heard[node] = (beat, now)
            # 3. End with the words of a node that failed; else with the names of nodes that have fallen silent.
            silent = self._silent_nodes(now)
            if words is not None:
                self._end(words["lines"], words["code"])
            elif silent:
                self._end([self._silence(silent, f"for {SECONDS_OF_SILENCE:.0f} s")])
            time.sleep(SECONDS_BETWEEN_BEATS)

    def _judge_store(self) -> None:
        """End when the store has not answered for too long; a thread of its own, for the other one hangs then."""
        while not self._over:
            time.sleep(1.0)
            self._ticks += 1
            if self._ticks > SECONDS_OF_SILENCE:
                self._end([self._silence([0], f"for {SECONDS_OF_SILENCE:.0f} s")])

    def _end(self, lines: list[str], code: int = EXIT_STOPPED) -> None:
        if self._over:  # this node is ending by itself
            return
        print(file=sys.stderr)  # ends the progress bar's line
        tell(lines)
        # upstream: torch 2.13.0: the main thread may be in a collective that never ends, and no exception of this
        # thread reaches it. Remove when: a collective can be cancelled from another thread on gloo and NCCL.
        os._exit(code)

    # --- what the store knows

    def _beats(self) -> list[str]:
        keys = [f"beat/{node}" for node in range(self._meeting.count)]
        return [value.decode() for value in self._store.multi_get(keys)]

    def _last_words(self) -> Any:
        """What a node that failed has left, or None."""
        if not self._store.check(["last words"]):
            return None
        return json.loads(self._store.get("last words"))

    def _silent_nodes(self, now: float) -> list[int]:
        """The other nodes that are not done and have not been heard for too long."""
        silent = []
        for node, (beat, since) in self._heard.items():
            if node != self._meeting.index and beat != DONE and now - since > SECONDS_OF_SILENCE:
                silent.append(node)
        return silent

    def _silence(self, nodes: list[int], how: str) -> str:
        names = ", ".join(self._meeting.names[node] for node in nodes)
        return (
            f"{names}: not heard {how}; its processes were killed, or the machine or the network failed. Go on from "
            "the last checkpoint with --resume_from_checkpoint true"
        )

    def _why(self) -> list[str]:
        """Which other node explains an exception on this rank: one that failed, or one that fell silent.

        Empty if none does. Takes up to four beats.
        """
        found: list[str] = []

        def look() -> None:
            # 1. A node that failed says so within a few beats: wait for its last words.
            before = self._beats()
            for _ in range(4):
                time.sleep(SECONDS_BETWEEN_BEATS)
                words = self._last_words()
                if words is not None:
                    found.extend(words["lines"])
                    return
            # 2. Else a node was killed if its number has not changed in all that time.
            after = self._beats()
            gone = [node for node, beat in enumerate(after) if beat == before[node] != DONE]
            if gone:
                found.append(self._silence(gone, "any more"))

        if self._try(look, 8 * SECONDS_BETWEEN_BEATS):
            return found
        # 3. The store itself does not answer: node 0, which has it, is gone.
        return [self._silence([0], "any more")]

    @staticmethod
    def _try(action: Callable[[], Any], seconds: float) -> bool:
        """Whether the store answered ``action`` within ``seconds``; a machine that is gone does not even refuse."""
        answered: list[bool] = []

        def attempt() -> None:
            with suppress(RuntimeError):  # the connection broke
                action()
                answered.append(True)

        worker = threading.Thread(target=attempt, daemon=True)
        worker.start()
        worker.join(seconds)
        return bool(answered)

    # --- how this rank ends

    def _on_exception(self, kind: Any, error: Any, trace: Any) -> None:
        # 1. The traceback first, as ever.
        # upstream: torch 2.13.0: its own hook, which calls this one, captures sys.stderr and would keep what is printed
        # here to itself. Remove when: torch.distributed's excepthook no longer redirects stderr.
        sys.stderr = sys.__stderr__
        self._hook(kind, error, trace)
        if os.getpid() != self._pid:  # a worker process of the data loader
            return
        # 2. Then the reason: another node, or else this exception. An interrupt needs no search.
        lines: list[str] = []
        if issubclass(kind, Exception):
            lines = self._why()
        if not lines:
            message = str(error).strip().splitlines() or [""]
            lines = [f"{self._meeting.name}: {kind.__name__}: {message[0]}"]
        if self._meeting.speaks:
            tell(lines)
        # 3. The other nodes hear it before this process is gone.
        self.say(lines, EXIT_STOPPED)
        # upstream: torch 2.13.0: the interpreter's teardown waits for process groups that lost a member. Remove when:
        # destroy_process_group() returns without all its members.
        os._exit(EXIT_STOPPED)

    def say(self, lines: list[str], code: int) -> None:
        """Leave last words for the other nodes, and wait for two beats so that they hear them."""
        self._over = self._meeting.speaks
        words = json.dumps({"lines": lines, "code": code})
        self._try(lambda: self._store.compare_set("last words", "", words), 2 * SECONDS_BETWEEN_BEATS)
        time.sleep(2 * SECONDS_BETWEEN_BEATS)

    def leave(self) -> None:
        """The run is complete. Node 0, which has the store, stays until the others have left, too."""
        self._over = True
        sys.excepthook = self._hook
        if not self._meeting.speaks:
            return
        with suppress(RuntimeError):
            self._store.set(f"beat/{self._meeting.index}", DONE)
            deadline = time.monotonic() + SECONDS_OF_SILENCE
            while self._meeting.index == 0 and time.monotonic() < deadline and set(self._beats()) != {DONE}:
                time.sleep(0.05)


_watch: Watch | None = None


def start(meeting: Meeting) -> None:
    """Watch the other nodes from now on."""
    global _watch
    _watch = Watch(meeting)


def end_with(error: UserError, code: int = EXIT_WRONG_INPUT) -> NoReturn:
    """:func:`~moe_models.errors.exit_with` for ranks on any number of machines: each says it once, and all end.

    The ``end`` of :func:`moe_models.errors.run`.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
    if _watch is not None:
        tell(error.problems, rank=local_rank)
        _watch.say([f"{_watch.name}: {line}" for line in error.problems], code)
        error = UserError([])  # told already
    exit_with(error, rank=local_rank, code=code)


def last_words(lines: list[str], code: int) -> None:
    """Let the other nodes, if there are any, end with these lines and this code."""
    if _watch is not None:
        _watch.say([f"{_watch.name}: {line}" for line in lines], code)


def leave() -> None:
    """The run is complete."""
    if _watch is not None:
        _watch.leave()
