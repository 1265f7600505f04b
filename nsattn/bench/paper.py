"""docs/paper.md: what the Flash Sparse Attention paper claims, and what the results files say of it.

Everything on the page is read from `selected.json`, `attention.json` and `models.json` of one folder. What no row says
is "not measured yet"; a row that failed its check counts for nobody. `nsattn report` shows the same claims.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsattn.bench.attention import PAPER_SHAPES, SHAPES
from nsattn.bench.cases import PAPER, Case
from nsattn.bench.model import ModelRow, ratios, speedups
from nsattn.bench.model import read as read_models
from nsattn.bench.peers.fsa_branches import BOTH
from nsattn.bench.selected import pair
from nsattn.bench.timing import GRAPH, OURS, Row, older_notes, read_rows

DIRECTIONS = ("forward", "backward")
OPERATIONS = ("compress", "attend_compressed", "select_blocks", "attend_selected", "attend_window", "combine")
HEADS = (32, 8)  # of the parts that show one shape: those of Llama-3-8B
MISSING = "not measured yet"
NAMES = {  # contender of the figure -> what it is called
    "auto": "nsattn", "qmajor": "nsattn `qmajor`", "fsa": "official FSA", "nsa_ref": "nsa_ref", "torch": "dense, cuDNN",
}  # fmt: skip
PROJECTS = (OURS, "fsa", "nsa_ref")  # whose branches are shown one above the other
COLUMNS = (  # over whom the speed-up is, and whose it is
    ("nsa_ref", "fsa"), ("nsa_ref", "auto"), ("qmajor", "auto"), ("fsa", "auto"),
)  # fmt: skip
COMMANDS = {
    "selected": "nsattn bench selected --only paper --peers peers --out benchmarks/results/h200/selected.json",
    "attention": "nsattn bench attention --peers peers --out benchmarks/results/h200/attention.json",
    "models": "nsattn bench model --peers peers --out benchmarks/results/h200/models.json",
}

Table = tuple[Sequence[str], list[list[str]]]


@dataclass
class Results:
    """What a folder holds."""

    selected: list[Row] = field(default_factory=list)
    attention: list[Row] = field(default_factory=list)
    models: list[ModelRow] = field(default_factory=list)
    environments: dict[str, dict[str, str]] = field(default_factory=dict)
    not_run: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Time:
    """One time of the figure: a row, or the sum of some."""

    ms: float
    ok: bool
    commits: frozenset[str]


Times = dict[tuple[Case, str, str], Time]  # by (case, contender, direction)


def read(folder: Path) -> Results:
    """What the results files of a folder say; those that are missing say nothing.

    Raises:
        ValueError: a damaged file.
    """
    results = Results()
    for name in COMMANDS:
        path = folder / f"{name}.json"
        if path.exists():
            setattr(results, name, read_models(path) if name == "models" else read_rows(path))
            results.environments[name] = json.loads(path.read_text()).get("environment", {})
            results.not_run += older_notes(str(path)) if name != "models" else []
    return results


def selected_times(rows: Sequence[Row]) -> Times:
    """Times of the selected branch at the shapes of the figure, and of dense attention.

    Where several sets timed a shape, that with the most contenders is taken whole, so that ratios are of one session.
    """
    times: Times = {}
    for case in PAPER:
        sets: dict[str, Times] = {}
        for row in rows:
            known = {**case.shape, "selection": "random", "op": "attend_selected"}.items() <= vars(row).items()
            who = row.impl if row.who == OURS else row.who
            if known and who in NAMES and not row.impl.endswith(GRAPH):
                time = Time(row.ms, row.ok, frozenset({row.commit}))
                sets.setdefault(row.set, {})[case, who, row.direction] = time
        if sets:
            times |= max(sets.items(), key=lambda item: (len(item[1]), item[0] == "paper"))[1]
        for row in rows:  # dense attention does not depend on blocks
            size = {key: value for key, value in case.shape.items() if key not in ("B", "N")}
            if row.op == "dense causal" and not row.impl.endswith(GRAPH) and size.items() <= vars(row).items():
                times.setdefault((case, "torch", row.direction), Time(row.ms, row.ok, frozenset({row.commit})))
    return times


def kernel_times(results: Results) -> Times:
    """What the paper's figure shows: compressed, selected and window attention added up, or dense attention."""
    times: Times = {}
    for (case, who, direction), time in selected_times(results.selected).items():
        project = OURS if who in ("auto", "qmajor") else "fsa"  # nsa_ref's other branches are FSA's
        others = [] if who == "torch" else [
            _best(results.attention, op, case.length, (case.num_heads, case.num_kv_heads), project, direction, False)
            for op in ("attend_compressed", "attend_window")
        ]  # fmt: skip
        if None not in others:
            rows = [row for row in others if row]
            times[case, who, direction] = Time(
                time.ms + sum(row.ms for row in rows), time.ok and all(row.ok for row in rows),
                time.commits | {row.commit for row in rows},
            )  # fmt: skip
    return times


def shown_times(results: Results) -> tuple[Times, bool]:
    """(times, whether they are sums) of what is shown: the sums once all times of the selected branch have them."""
    sums, alone = kernel_times(results), selected_times(results.selected)
    whole = bool(sums) and sums.keys() == alone.keys()
    return (sums if whole else alone), whole


def _best(
    rows: Sequence[Row], op: str, T: int, heads: tuple[int, int], who: str, direction: str, graphs: bool = True
) -> Row | None:
    """The row of an operation; of several schedules, calls and `graphs`, the fastest that is right."""
    mine = [r for r in rows if (r.op, r.T, (r.Hq, r.Hkv), r.who, r.direction) == (op, T, heads, who, direction)
            and (graphs or not r.impl.endswith(GRAPH))]  # fmt: skip
    return min(mine, key=lambda r: (not r.ok, r.ms), default=None)


def parts(rows: Sequence[Row], T: int, project: str, direction: str) -> dict[str, tuple[float, bool]]:
    """(ms, right) of each operation of a project at `HEADS`; what it was not timed in is left out."""
    found: dict[str, tuple[float, bool]] = {}
    for op in OPERATIONS:
        owner = "fsa" if project == "nsa_ref" and op != "attend_selected" else project
        row = _best(rows, op, T, HEADS, owner, direction)
        if row:
            found[op] = row.ms, row.ok
        elif op == "select_blocks" and "attend_compressed" in found:
            both = _best(rows, BOTH, T, HEADS, owner, direction)  # the selection is what it takes longer
            if both:
                found[op] = max(0.0, both.ms - found["attend_compressed"][0]), both.ok
    return found


def lengths(rows: Sequence[Row]) -> list[int]:
    """Lengths at which every operation of ours was timed with `HEADS`."""
    return sorted({r.T for r in rows if (r.who, r.op, r.Hq, r.Hkv) == (OURS, "nsa_attention", *HEADS)})


def roofline(rows: Sequence[Row]) -> tuple[int, Table]:
    """(tokens, table) of floor and time of everything that was timed at `HEADS`: at 64K tokens, or the longest."""
    mine = [r for r in rows if (r.Hq, r.Hkv) == HEADS]
    T = max((r.T for r in mine), key=lambda T: (T == 65536, T), default=0)
    lines = [
        [r.op if r.who in (OURS, "torch") else f"{r.op}, {r.who}", r.impl, r.direction, f"{r.ms:.2f}",
         f"{r.floor_ms:.2f}", f"{r.floor_ms / r.ms:.0%}{_mark(r.ok)}"]
        for r in mine if r.T == T
    ]  # fmt: skip
    return T, (("operation", "impl", "direction", "ms", "floor, ms", "share"), lines)


def model_table(rows: list[ModelRow]) -> Table:
    """Speed-ups of whole models with NSA of ours."""
    lines = [
        [model, str(T), f"({B}, {N})", phase, f"{dense:.2f}x", f"{vanilla:.2f}x"]
        for model, T, (B, N), phase, dense, vanilla in speedups(rows)
    ]
    return ("model", "tokens", "(B, N)", "phase", "over dense", "over the vanilla schedule"), lines


def claims(results: Results) -> Table:
    """Each claim, and what was measured of it: mean and largest of the ratios over shapes, and whose rows they are."""
    gpus = {name: facts.get("gpu", "unknown").split(",")[0] for name, facts in results.environments.items()}
    lines = []
    for what, times, files in (
        ("three branches", kernel_times(results), ("selected", "attention")),
        ("selected branch alone", selected_times(results.selected), ("selected",)),
    ):
        for direction in DIRECTIONS:
            cells, used = [], set()
            for slow, fast in COLUMNS:
                pairs = [(times.get((c, slow, direction)), times.get((c, fast, direction))) for c in PAPER]
                good = [(a, b) for a, b in pairs if a and b and a.ok and b.ok]
                used |= {commit for both in good for time in both for commit in time.commits}
                cells.append(_ratios([a.ms / b.ms for a, b in good], f"of {len(PAPER)} shapes", 1))
            where = _where(used, {gpus[name] for name in files if name in gpus})
            lines.append([f"kernels, {what}, {direction}", "up to 3.5x, 1.6x on average", *cells, where])
    for phase, name, paper in (
        ("train", "training", "up to 1.25x, 1.09x on average"), ("prefill", "prefill", "up to 1.36x, 1.11x on average"),
    ):  # fmt: skip
        cells = [_ratios(ratios(results.models, *pair, phase), "models and lengths", 2) for pair in COLUMNS]
        used = {r.commit for r in results.models if r.phase == phase} if set(cells) != {MISSING} else set()
        lines.append([f"{name}, end to end", paper, *cells, _where(used, {gpus[f] for f in ("models",) if f in gpus})])
    heads = [f"{NAMES[fast]} over {NAMES[slow]}" for slow, fast in COLUMNS]
    return ("claim (arXiv 2508.18224)", "the paper, FSA over vanilla NSA", *heads, "commit, GPU"), lines


def _ratios(found: Sequence[float], of: str, digits: int) -> str:
    if not found:
        return MISSING
    mean = sum(found) / len(found)
    return f"up to {max(found):.{digits}f}x, {mean:.{digits}f}x on average, {len(found)} {of}"


def _where(commits: Iterable[str], gpus: Iterable[str]) -> str:
    commits = sorted(commits)
    return f"{', '.join(commits)}; {', '.join(sorted(gpus)) or 'unknown'}" if commits else ""


def _mark(ok: bool) -> str:
    return "" if ok else " (wrong)"


def markdown(table: Table) -> str:
    head, lines = table
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


PAGE = """<!-- Written by `nsattn bench paper` from benchmarks/results/h200: change these, not this page. -->

# The paper's claims

What the Flash Sparse Attention paper ([arXiv 2508.18224](https://arxiv.org/abs/2508.18224)) claims over vanilla NSA,
what its code does here, and what nsattn does. Vanilla NSA is `nsa_ref` of their repository, or `qmajor`, our kernels in
that order. Ratios above 1 mean faster; each is of two times of one shape. Results that failed their check count for
nobody. [How it was measured](../benchmarks/README.md).

{claims}

The paper's figure adds compressed, selected and window attention up, and leaves out compression, selection and gates;
so do the rows of three branches. Selected attention of all is timed in turn in one run; the other branches, which FSA
and nsa_ref share, in another run on the same kind of machine. Whole models with their code have their branches, window
included, and our compression and gates. Their selection as published reads one query head of a group: less work than
NSA asks for, and other blocks.

{sources}

## What is missing

{missing}

## Kernels

{what}, milliseconds forward / backward, four KV heads of 128, one causal sequence of T tokens, G query heads per KV
head. Dense attention does not depend on (B, N).

{figures}{kernels}

## Where the time goes

{heads} heads, (B, N) = (64, 16), milliseconds forward / backward. Ours are CUDA graphs where there is one, theirs
calls; of several schedules the fastest. The parts are timed one by one, so their sum is not the time of the whole. The
selection of the others is what their compressed attention takes longer with it. Their compression and gates are not
timed.

{stack}{parts}

## How far from the floor

{heads} heads, {tokens} tokens. The floor is useful FLOPs or unique bytes, whichever takes longer at the rates measured
on the chip; the share is floor over time.

{roofline}

## Models

NSA with `auto`, one training step or one prefill, beside dense attention and the vanilla schedule.

{models}
"""


def page(results: Results) -> str:
    """The page in Markdown."""
    (times, summed), shown = shown_times(results), pictures(results)
    T, floors = roofline(results.attention)
    models = model_table(results.models)

    def picture(text: str, name: str) -> str:
        return f"![{text}](pictures/{name})\n\n" if name in shown else ""

    return PAGE.format(
        claims=markdown(claims(results)),
        sources=_sources(results),
        missing=_missing(results),
        what="The sum of the three branches, as in the paper's figure" if summed else "The selected branch alone",
        figures="".join(picture(f"Times of the kernels, {way}", f"paper_{way}.png") for way in DIRECTIONS),
        kernels="\n\n".join(_kernels(times, size) for size in ((64, 16), (128, 8))),
        heads="/".join(map(str, HEADS)),
        stack=picture("Time of each part against the length", "paper_parts.png"),
        parts=_parts_table(results.attention),
        tokens=T or "65536",
        roofline=markdown(floors) if floors[1] else _not_yet("attention"),
        models=markdown(models) if models[1] else _not_yet("models"),
    )


def _not_yet(name: str) -> str:
    return f"Not measured yet. On a GPU: `{COMMANDS[name]}`."


def _sources(results: Results) -> str:
    """The files, and which commits and GPU their rows are of."""
    lines = []
    for name in COMMANDS:
        facts = results.environments.get(name)
        rows: Sequence[Row | ModelRow] = getattr(results, name)
        commits = ", ".join(sorted({row.commit for row in rows}))
        gpu = facts.get("gpu", "unknown").split(",")[0] if facts else ""
        text = f"rows of {commits or 'no commit'}; {gpu}" if facts else MISSING
        lines.append(f"- {name}.json: {text}")
    return "\n".join(lines)


def _missing(results: Results) -> str:
    """Which rows the page would need, and what the files say was not run."""
    lines, commands = [], {}

    def lacks(text: str, name: str) -> None:
        lines.append(f"- {text}")
        commands[name] = COMMANDS[name]

    selected = selected_times(results.selected)
    for who, name in NAMES.items():
        both = sum(all((case, who, way) in selected for way in DIRECTIONS) for case in PAPER)
        if both < len(PAPER):
            lacks(f"selected attention, {name}: {both} of {len(PAPER)} shapes are there", "selected")
    shapes = sorted({(case.length, (case.num_heads, case.num_kv_heads)) for case in PAPER})
    for project, name in ((OURS, "nsattn"), ("fsa", "official FSA")):
        ops = [(op, way) for op in ("attend_compressed", "attend_window") for way in DIRECTIONS]
        here = sum(
            all(_best(results.attention, op, *shape, project, way) for op, way in ops) for shape in shapes
        )
        if here < len(shapes):
            text = f"compressed and window attention, {name}: {here} of {len(shapes)} lengths and head counts are there"
            lacks(text, "attention")
    absent = [f"{T >> 10}K" for T in (8192, 32768, 65536, 131072) if T not in lengths(results.attention)]
    if absent:
        lacks(f"every operation with {HEADS[0]}/{HEADS[1]} heads at {', '.join(absent)}", "attention")
    if not model_table(results.models)[1]:
        lacks("models", "models")
    for who in ("fsa", "nsa_ref"):
        if who not in {r.attention for r in results.models}:
            lacks(f"models with the attention of {NAMES[who]}", "models")
    cases = {"", *map(str, PAPER), *(f"T={T} {Hq}/{Hkv} D=128" for T, Hq, Hkv in (*SHAPES, *PAPER_SHAPES))}
    reasons: dict[str, int] = {}
    for note in results.not_run:
        if note["case"] in cases and note["who"] in ("fsa", "nsa_ref"):
            text = f"{note['who']}, {note['impl'] or 'all of it'}, did not run: {' '.join(note['reason'].split())}"
            reasons[text] = reasons.get(text, 0) + 1
    lines += [f"- {text} ({count} times)" for text, count in reasons.items()]
    if commands:
        lines += ["", "On a GPU, what is not there yet:", "", "```sh", *commands.values(), "```"]
    return "\n".join(lines)


def _kernels(times: Times, size: tuple[int, int]) -> str:
    """A table of the figure for one pair (B, N)."""
    cases = [case for case in PAPER if (case.block, case.num_selected) == size]
    if not any(case in cases for case, *_ in times):
        return f"(B, N) = {size}: {MISSING}."
    lines = []
    for case in cases:
        cells = []
        for who in NAMES:
            forward, backward = (times.get((case, who, direction)) for direction in DIRECTIONS)
            ok = all(time.ok for time in (forward, backward) if time)
            cells.append(pair(forward and forward.ms, backward and backward.ms, ok))
        lines.append([str(case.length), str(case.group), *cells])
    return f"(B, N) = {size}:\n\n" + markdown((("T", "G", *NAMES.values()), lines))


def _parts_table(rows: Sequence[Row]) -> str:
    lines = []
    for T in lengths(rows):
        for project in PROJECTS:
            ways = [parts(rows, T, project, direction) for direction in DIRECTIONS]
            if project == OURS or any(op == "attend_selected" for way in ways for op in way):
                cells = []
                for op in OPERATIONS:
                    forward, backward = (way.get(op, (None, True)) for way in ways)
                    cells.append(pair(forward[0], backward[0], forward[1] and backward[1]))
                lines.append([str(T), {OURS: "nsattn", **NAMES}[project], *cells])
    return markdown((("T", "whose", *OPERATIONS), lines)) if lines else _not_yet("attention")


def pictures(results: Results) -> dict[str, str]:
    """Pictures for which there are rows: name -> the numbers it is drawn from, which the file carries."""
    found: dict[str, str] = {}
    times = shown_times(results)[0]
    for direction in DIRECTIONS:
        mine = [f"{case} {who} {time.ms:.3f} {time.ok}" for (case, who, way), time in times.items() if way == direction]
        if mine:
            found[f"paper_{direction}.png"] = "; ".join(sorted(mine))
    here = [
        f"{T} {project} {direction} {op} {ms:.3f} {ok}"
        for T in lengths(results.attention) for project in PROJECTS for direction in DIRECTIONS
        for op, (ms, ok) in parts(results.attention, T, project, direction).items()
    ]  # fmt: skip
    return found | ({"paper_parts.png": "; ".join(here)} if here else {})


def write(folder: Path, out: Path) -> list[Path]:
    """Write the page, and its pictures into the folder `pictures` beside it. Returns what was written.

    Raises:
        ValueError: a damaged results file, or none at all.
    """
    from nsattn.bench import plots

    results = read(folder)
    if not results.environments:
        raise ValueError(f"{folder} holds none of {', '.join(f'{n}.json' for n in COMMANDS)}. Run nsattn bench first.")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(results), encoding="utf-8")
    written = [out]
    times = shown_times(results)[0]
    for name, numbers in pictures(results).items():
        picture: Any = out.parent / "pictures" / name
        picture.parent.mkdir(exist_ok=True)
        if name == "paper_parts.png":
            plots.draw_parts(picture, results.attention, numbers)
        else:
            plots.draw_figure(picture, times, name.removeprefix("paper_").removesuffix(".png"), numbers)
        written.append(picture)
    return written
