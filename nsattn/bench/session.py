"""One sitting of `nsattn bench`: which cases are timed now, how far it is, and what is left for the next."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Protocol, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nsattn.bench.timing import OURS
from nsattn.environment import commit

T = TypeVar("T")


class Timed(Protocol):
    """A row of a results file."""

    who: str
    commit: str


def named(what: str, names: str, known: Sequence[str]) -> list[str]:
    """Those of `known` that comma-separated names ask for, in the order of the names; all for an empty text.

    Raises:
        ValueError: an unknown name; `what` says of what.
    """
    wanted = [name.strip() for name in names.split(",")] if names else list(known)
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"{what} are {', '.join(known)}, got {', '.join(unknown)}. Name some of them.")
    return wanted


class Session:
    """Goes through the cases of benches, alone or beside processes on other GPUs.

    Args:
        again: time every case; otherwise those that have no row of ours at this commit.
        limit: seconds after which no further case is begun; None is no limit.
        shared: a folder, empty at first, in which several processes put down which cases they took, so that each is
            timed by one of them.
    """

    def __init__(self, *, again: bool = False, limit: float | None = None, shared: Path | None = None) -> None:
        self.again = again
        self.shared = shared
        self.end = time.monotonic() + (math.inf if limit is None else limit)
        self.left: list[str] = []  # a line for each bench that was not finished

    def todo(
        self, cases: Sequence[T], rows: Sequence[Timed], fields: Callable[[T], Mapping[str, object]]
    ) -> list[T]:
        """The cases to time. `fields(case)` is what a row of the case holds, `rows` are those that there are."""
        done = [] if self.again else [vars(row) for row in rows if (row.who, row.commit) == (OURS, commit())]
        return [case for case in cases if not any(fields(case).items() <= row.items() for row in done)]

    def each(
        self, bench: str, cases: Sequence[T], rows: Sequence[Timed], fields: Callable[[T], Mapping[str, object]]
    ) -> Iterator[T]:
        """Those of `todo`, one by one while there is time."""
        todo = [case for case in self.todo(cases, rows, fields) if not self._taken(bench, fields(case))]
        with _bar(hidden=self.shared is not None) as bar:
            task = bar.add_task(bench, total=len(cases), completed=len(cases) - len(todo))
            for i, case in enumerate(todo):
                if time.monotonic() >= self.end:
                    text = " ".join(f"{name}={value}" for name, value in fields(case).items())
                    self.left.append(f"{bench}: {len(todo) - i} of {len(cases)} cases, the next is {text}")
                    return
                if self._take(bench, fields(case)):
                    yield case
                bar.update(task, advance=1, refresh=True)


    def _taken(self, bench: str, case: Mapping[str, object]) -> bool:
        return self.shared is not None and self._mark(self.shared, bench, case).exists()

    def _take(self, bench: str, case: Mapping[str, object]) -> bool:
        """Nobody has taken the case before, and nobody will after this."""
        try:
            if self.shared is not None:
                self._mark(self.shared, bench, case).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    @staticmethod
    def _mark(shared: Path, bench: str, case: Mapping[str, object]) -> Path:
        return shared / sha256(f"{bench} {case}".encode()).hexdigest()


def _bar(hidden: bool) -> Progress:
    """Cases done and the time left, on a terminal only. Drawn between cases: a thread that draws disturbs times."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    disable = hidden or not sys.stdout.isatty()
    return Progress(*columns, auto_refresh=False, speed_estimate_period=math.inf, transient=True, disable=disable)
