"""How moe-recipes refuses: every problem at once, one line each, no traceback.

Two kinds of error end a recipe. Input that cannot work is a :class:`UserError`, exit code 2, and nothing was written.
A run that cannot go on is a :class:`RunError`, exit code 1, and nothing complete was lost. :func:`run` turns both into
lines on stderr; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from moe_models import ranks

EXIT_WRONG_INPUT = 2
"""Exit code of every recipe for input that cannot work (the same code argparse uses)."""
EXIT_STOPPED = 1
"""Exit code of every recipe that started and could not go on."""
SECONDS_FOR_RANK_0 = 10
"""How long the other ranks wait for rank 0 to report what is wrong; its exit ends the wait."""


class UserError(ValueError):
    """Input that cannot work.

    Each entry of ``problems`` is one line that names the key or path, its value, what is allowed and the fix.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class RunError(RuntimeError):
    """A run that cannot go on.

    Each entry of ``problems`` is one line that says why, what was kept and what to do.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class Problems:
    """Collects what several checks find, so that the user reads all of it at once.

    >>> problems = Problems()
    >>> with problems.note():
    ...     ds = load_ds_config(path)
    >>> problems.refuse()
    """

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self.lines: list[str] = list(lines)

    def add(self, *lines: str) -> None:
        """Note lines that a check returned."""
        self.lines.extend(lines)

    @contextmanager
    def note(self) -> Iterator[None]:
        """Note the lines of a UserError that is raised inside, and go on after the block."""
        try:
            yield
        except UserError as error:
            self.lines.extend(error.problems)

    def refuse(self) -> None:
        """Raise one UserError with everything noted so far; do nothing if there is nothing."""
        if self.lines:
            raise UserError(self.lines)


def one_line(error: BaseException) -> str:
    """The message of an exception in one line; its type where it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def some_of(names: Iterable[str], most: int = 4) -> str:
    """The first names, and how many more there are: ``a, b, c, d and 5 more``."""
    names = list(names)
    shown = ", ".join(names[:most])
    more = len(names) - most
    return f"{shown} and {more} more" if more > 0 else shown


def show(value: object) -> str:
    """One short line of JSON for a message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def unknown_key(where: str, key: str, value: object, allowed: Iterable[str]) -> str:
    """One line for a key that nobody reads: its value, the nearest allowed key, or all of them."""
    names = sorted(allowed)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if near:
        fix = f'did you mean "{near[0]}"?'
    else:
        fix = f"remove it; allowed: {', '.join(names) or 'nothing yet'}"
    return f"{where}{key} = {show(value)}: unknown key; {fix}"


def tell(problems: Iterable[str], *, rank: int = 0) -> bool:
    """Print the problems to stderr, on ``rank`` 0 only, so that N ranks report them once. Returns whether any exist."""
    problems = list(problems)
    if rank == 0:
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.stderr.flush()
    return bool(problems)


def warn(lines: Iterable[str], *, rank: int = 0) -> None:
    """Print warnings to stderr, on ``rank`` 0 only. The run goes on."""
    if rank == 0:
        for line in lines:
            print(f"warning: {line}", file=sys.stderr)
        sys.stderr.flush()


def exit_with(error: UserError, *, rank: int = 0, code: int = EXIT_WRONG_INPUT) -> NoReturn:
    """Report the problems and exit with ``code``.

    The launcher stops all ranks as soon as one has failed, so the others give rank 0 the time to report. A rank that is
    still there after that was alone with its problem (its disk failed, say), and reports it itself.
    """
    tell(error.problems, rank=rank)
    if rank != 0:
        time.sleep(SECONDS_FOR_RANK_0)
        tell(error.problems)
    sys.exit(code)


def end_here(error: UserError, code: int) -> NoReturn:
    """:func:`exit_with` for this process."""
    exit_with(error, rank=ranks.rank(), code=code)


Ending = Callable[[UserError, int], NoReturn]
"""How a process ends that cannot go on: :func:`end_here`, or ``nodes.watch.end_with`` on several machines."""


def run(main: Callable[[list[str]], int], end: Ending = end_here) -> NoReturn:
    """Call ``main`` with the words of the command line and exit with its code; every recipe starts here.

    A UserError ends the process with code 2, a RunError with code 1, both without a traceback.
    """
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        end(error, EXIT_WRONG_INPUT)
    except RunError as error:
        end(UserError(error.problems), EXIT_STOPPED)
    sys.exit(code)
