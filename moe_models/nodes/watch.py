"""While a run on several machines lasts, its nodes hear each other; one that is gone ends the others, with its name.

A collective whose peer has vanished without a word (power, network) waits for the timeout of its process group, which
has to be long: half an hour (``--ddp_timeout``), because ranks wait in collectives while one of them reads data. So the
first process of each node counts up a number in the store of ``moe_models/nodes/meeting.py`` every two seconds, and
looks at the numbers of the others. Threads do it, so that it goes on while the main thread waits in a collective.

- A node that was not heard for 90 seconds, or a store that does not answer: one line that names it, exit code 1.
- A node that ends with an error leaves its words in the store, and the others end with them.
- A collective that fails because its peer was killed says little. The exception hook looks who has fallen silent.
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

from moe_models.errors import EXIT_WRONG_INPUT, UserError, exit_with, tell
from moe_models.nodes.meeting import Meeting

SECONDS_BETWEEN_BEATS = 2.0
SECONDS_OF_SILENCE = 90.0
"""After which a node is taken for dead. Long, because a node that loads a large file may not come to beat."""
DONE = "done"


class Watch:
    """The heartbeat of this node, and its ear for the others. Starts at once."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting, self._store, self.name = meeting, meeting.store, meeting.name
        self._over = False
        self._pid = os.getpid()
        self._heard: dict[int, tuple[str, float]] = {}  # node -> (its last number, when that was new)
        self._ticks = 0  # seconds since the store last answered; a suspended process does not count them
        self._hook, sys.excepthook = sys.excepthook, self._on_exception
        if meeting.speaks:
            threading.Thread(target=self._beat, daemon=True).start()
            threading.Thread(target=self._judge_store, daemon=True).start()

    # --- the two threads

    def _beat(self) -> None:
        number = 0
        while not self._over:
            number += 1
            try:
                self._store.set(f"beat/{self._meeting.index}", str(number))
                beats = self._beats()
                words = self._last_words()
            except RuntimeError:
                self._ticks = max(self._ticks, int(SECONDS_OF_SILENCE) - 5)  # the connection broke: a last moment
                return
            self._ticks, now = 0, time.monotonic()
            for node, beat in enumerate(beats):
                if self._heard.get(node, ("", 0.0))[0] != beat:
                    self._heard[node] = (beat, now)
            silent = [
                node
                for node, (beat, since) in self._heard.items()
                if beat != DONE and now - since > SECONDS_OF_SILENCE and node != self._meeting.index
            ]
            if words is not None:
                self._end(words["lines"], words["code"])
            elif silent:
                self._end([self._silence(silent, f"for {SECONDS_OF_SILENCE:.0f} s")])
            time.sleep(SECONDS_BETWEEN_BEATS)

    def _judge_store(self) -> None:
        while not self._over:
            time.sleep(1.0)
            self._ticks += 1
            if self._ticks > SECONDS_OF_SILENCE:
                self._end([self._silence([0], f"for {SECONDS_OF_SILENCE:.0f} s")])

    def _end(self, lines: list[str], code: int = 1) -> None:
        if self._over:  # this node is ending by itself
            return
        print(file=sys.stderr)  # ends the progress bar's line
        tell(lines)
        os._exit(code)  # the main thread may be in a collective that never ends

    # --- what the store knows

    def _beats(self) -> list[str]:
        nodes = range(self._meeting.count)
        return [value.decode() for value in self._store.multi_get([f"beat/{node}" for node in nodes])]

    def _last_words(self) -> Any:
        return json.loads(self._store.get("last words")) if self._store.check(["last words"]) else None

    def _silence(self, nodes: list[int], how: str) -> str:
        names = ", ".join(self._meeting.names[node] for node in nodes)
        return (
            f"{names}: not heard {how}; its processes were killed, or the machine or the network failed. Go on from "
            "the last checkpoint with --resume_from_checkpoint true"
        )

    def _why(self) -> list[str]:
        """Who is to blame for an exception on this rank: a node that said so, or that has fallen silent, or nobody."""
        found: list[str] = []

        def look() -> None:
            before = self._beats()
            for _ in range(4):
                time.sleep(SECONDS_BETWEEN_BEATS)
                words = self._last_words()
                if words is not None:
                    found.extend(words["lines"])
                    return
            after = self._beats()
            gone = [node for node, beat in enumerate(after) if beat == before[node] != DONE]
            found.extend([self._silence(gone, "any more")] if gone else [])

        answered = self._try(look, 8 * SECONDS_BETWEEN_BEATS)
        return found if answered else [self._silence([0], "any more")]

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
        sys.stderr = sys.__stderr__  # torch's own hook calls this one, and would keep what is said in here to itself
        self._hook(kind, error, trace)
        if os.getpid() != self._pid:  # a worker process of the data loader
            return
        reason = (str(error).strip().splitlines() or [""])[0]
        lines = self._why() if issubclass(kind, Exception) else []
        lines = lines or [f"{self._meeting.name}: {kind.__name__}: {reason}"]
        if self._meeting.speaks:
            tell(lines)
        self.say(lines, 1)
        os._exit(1)  # not through the teardown: it waits for process groups that lost a member

    def say(self, lines: list[str], code: int) -> None:
        """Leave last words for the other nodes, and them the time to hear."""
        self._over = self._meeting.speaks
        words = json.dumps({"lines": lines, "code": code})
        self._try(lambda: self._store.compare_set("last words", "", words), 2 * SECONDS_BETWEEN_BEATS)
        time.sleep(2 * SECONDS_BETWEEN_BEATS)

    def leave(self) -> None:
        """The run is complete. Whoever holds the store stays until the others have left, too."""
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
    """Hear the other nodes from now on."""
    global _watch
    _watch = Watch(meeting)


def end_with(error: UserError, code: int = EXIT_WRONG_INPUT) -> NoReturn:
    """:func:`~moe_models.errors.exit_with` for ranks on any number of machines: each says it once, and all end."""
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
    if _watch is not None:
        tell(error.problems, rank=local)
        _watch.say([f"{_watch.name}: {line}" for line in error.problems], code)
        error = UserError([])
    exit_with(error, rank=local, code=code)


def leave() -> None:
    """The run is complete."""
    if _watch is not None:
        _watch.leave()
