"""How moe-recipes says no: every problem at once, one line each, exit code 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NoReturn

EXIT_WRONG_INPUT = 2
"""Exit code of every recipe for input that cannot work (the same code argparse uses)."""


class UserError(ValueError):
    """Input that cannot work.

    Each entry of ``problems`` is one line that names the key or path, its value, what is allowed and the mend.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def exit_with(error: UserError, *, rank: int = 0) -> NoReturn:
    """Print the problems to stderr (on ``rank`` 0 only, so that N ranks say it once) and exit with code 2."""
    if rank == 0:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.stderr.flush()
    sys.exit(EXIT_WRONG_INPUT)
