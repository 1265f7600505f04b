"""`nsattn bench repeat`: do two runs agree? Their ratios are compared, since machines are shared and times drift.

A ratio is the time of a contender, or of our kernels in the order of the NSA paper (`qmajor`), over that of ours for
the same shape and direction, both right. Contenders of the whole attention are compared with the whole of ours. A short
call takes as long as its host needs: where there is a CUDA graph, its time counts, and where there is none of ours,
only calls of `HOST_ROWS` rows (tokens times query heads) and more do. Models are such calls too, but for decoding
steps, which are graphs.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from nsattn.bench.model import DECODE, MODELS, TINY
from nsattn.bench.timing import GRAPH, HOST_ROWS, KEY, OURS, read_rows

SHAPE = tuple(name for name in KEY if name not in ("who", "op", "impl"))
MODEL = ("model", "layers", "T", "B", "N", "phase")
STANDS_FOR = {"dense causal": ("nsa_attention", "attend_selected")}  # what of ours does the same work

OURS_BY = ("auto", "triton", "triton_sm90", "kvmajor_sm90")  # `impl` of ours that others are compared with


class Ratio(NamedTuple):
    """A contender's time over ours, in two runs."""

    whose: str  # the contender's
    name: str
    old: float
    new: float

    @property
    def change(self) -> float:
        return self.new / self.old - 1


def ratios(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """All ratios of a results file: (whose time, what is compared), and that time over ours."""
    right = [row for row in rows if row.get("ok", True)]
    right.sort(key=_graph, reverse=True)
    graphs = {_name(row).replace(GRAPH, "") for row in right if _graph(row)}
    found = {}
    for row in right:
        if not _graph(row) and _name(row) in graphs:
            continue
        ours = min((x for x in right if _compared(row, x)), key=lambda x: _ops(row).index(x.get("op")), default=None)
        if ours and (_graph(ours) or ours.get("phase") == DECODE or ours["T"] * _heads(ours) >= HOST_ROWS):
            found[_whose(row), _name(row)] = row["ms"] / ours["ms"]
    return found


def _ops(row: Mapping[str, Any]) -> tuple[str | None, ...]:
    """Operations of ours that do the work of a contender's row, the first that was timed counts; models have none."""
    return STANDS_FOR.get(row.get("op", ""), (row.get("op"),))


def _heads(row: Mapping[str, Any]) -> int:
    return row["Hq"] if "Hq" in row else {**MODELS, **TINY}[row["model"]]["num_attention_heads"]


def _whose(row: Mapping[str, Any]) -> str:
    """The contender as a reader knows it: a project, dense attention, or our other schedule."""
    if "phase" in row:
        return row["attention"]
    if row["who"] == OURS:
        return "qmajor"
    return f"{row['who']} {row['impl'].replace(GRAPH, '')}" if row["who"] == "torch" else row["who"]


def _graph(row: Mapping[str, Any]) -> bool:
    return row.get("impl", "").endswith(GRAPH)


def _compared(row: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether `ours` is what the contender's `row` is measured against."""
    if "phase" in row:
        same = all(row[name] == ours[name] for name in MODEL)
        return same and ours["attention"] == "auto" and row["attention"] != "auto"
    if ours["who"] != OURS or not (row["who"] != OURS or row["impl"].startswith("qmajor")):
        return False
    ops = _ops(row)
    impl = ours["impl"].removesuffix(GRAPH)
    same = SHAPE
    if row["op"] not in ops:  # dense attention has no selection; ours then is the usual one
        same = [name for name in SHAPE if name != "selection"]
        if ours["selection"] not in ("own", "random"):
            return False
    return ours["op"] in ops and impl in OURS_BY and all(row[x] == ours[x] for x in same)


def _name(row: Mapping[str, Any]) -> str:
    names = ("model", "T", "B", "N", "phase", "attention") if "phase" in row else ("who", "op", "impl", *SHAPE)
    return " ".join(f"{row[name]}" for name in names if row[name] != "")


def compare(old: Path, new: Path) -> list[Ratio]:
    """Ratios that both files have, most changed first; not those that one file has from the other.

    Raises:
        ValueError: a file that is missing or holds no rows, or two files without a ratio in common.
    """
    before, after = (ratios(_rows(path)) for path in (old, new))
    common = [Ratio(*key, x, after[key]) for key, x in before.items() if after.get(key, x) != x]
    if not common:
        raise ValueError(f"{old} and {new} have no ratio of a contender to ours in common. Time the same shapes twice.")
    return sorted(common, key=lambda r: -abs(r.change))


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text())["rows"]
        return rows if "phase" in rows[0] else [asdict(row) for row in read_rows(path)]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not a results file of nsattn bench ({error}). Make it again.") from error


def report(found: list[Ratio], within: float, most: int = 20) -> str:
    """How many ratios moved by no more than `within`, in all and to each contender, and those that moved most."""

    def count(what: str, some: list[Ratio]) -> str:
        agree = sum(abs(r.change) <= within for r in some)
        middle = statistics.median(abs(r.change) for r in some)
        return f"{agree} of {len(some)} {what} agree within {within:.0%}; median change {middle:.1%}."

    lines = [count("ratios", found)]
    contenders = dict.fromkeys(r.whose for r in sorted(found))
    lines += [f"  {count(f'to {whose}', [r for r in found if r.whose == whose])}" for whose in contenders]
    lines += [f"{r.change:+7.1%}  {r.old:6.2f} -> {r.new:6.2f}  {r.name}" for r in found[:most]]
    return "\n".join(lines)
