"""How moe-recipes says no: every problem at once, one line each, exit code 2, no traceback."""

from __future__ import annotations

import difflib
import json
import sys
import time
from collections.abc import Iterable
from typing import NoReturn

EXIT_WRONG_INPUT = 2
"""Exit code of every recipe for input that cannot work (the same code argparse uses)."""
SECONDS_FOR_RANK_0 = 10
"""How long the other ranks wait for rank 0 to say what is wrong; it ends the wait by exiting."""


class UserError(ValueError):
    """Input that cannot work.

    Each entry of ``problems`` is one line that names the key or path, its value, what is allowed and the mend.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def tell(problems: Iterable[str], *, rank: int = 0) -> bool:
    """Print the problems to stderr, on ``rank`` 0 only, so that N ranks say it once. Returns whether there are any."""
    problems = list(problems)
    if rank == 0:
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.stderr.flush()
    return bool(problems)


def exit_with(error: UserError, *, rank: int = 0, code: int = EXIT_WRONG_INPUT) -> NoReturn:
    """Tell the problems and exit with ``code``.

    The launcher stops all ranks as soon as one has failed, so the others leave rank 0 the time to speak.
    """
    tell(error.problems, rank=rank)
    if rank != 0:
        time.sleep(SECONDS_FOR_RANK_0)
    sys.exit(code)


def show(value: object) -> str:
    """One short line of JSON for a message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def unknown_key(where: str, key: str, value: object, allowed: Iterable[str]) -> str:
    """One line for a key that nobody reads: its value, the nearest allowed key, or all of them."""
    names = sorted(allowed)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    mend = f'did you mean "{near[0]}"?' if near else f"remove it; allowed: {', '.join(names) or 'nothing yet'}"
    return f"{where}{key} = {show(value)}: unknown key; {mend}"
