"""The pictures of `selected.json`, times against the group and the length, of `models.json`, and of docs/paper.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from nsattn.bench import model
from nsattn.bench.cases import PAPER, PAPER_GROUPS, Case, target_ms
from nsattn.bench.paper import DIRECTIONS, HEADS, NAMES, OPERATIONS, PROJECTS, Times, lengths, parts
from nsattn.bench.timing import GRAPH, OURS, Row, read_rows

DPI = 120
LENGTH_GROUP = 4
STYLES = {  # who -> label, colour, marker
    "nsattn": ("nsattn (this library)", "#d1362a", "o"),
    "fsa": ("FSA, official", "#1f5fa8", "s"),
    "nsa_ref": ("NSA, nsa_ref", "#3a8f4d", "^"),
    "sfnsa": ("NSA, SFNSA", "#8a4fa3", "D"),
    "fla": ("NSA, fla", "#b07d12", "v"),
    "torch": ("dense, cuDNN", "#555555", "x"),
}
COLOURS = ("#3a8f4d", "#8a4fa3", "#c9a227", "#1f5fa8", "#d1662a", "#7a6a55")  # of `OPERATIONS`

PLAIN = FuncFormatter(lambda value, _: f"{value:g}")  # numbers of a logarithmic axis

PHASES = dict(zip(model.PHASES, (("#d1362a", "o"), ("#b07d12", "^"), ("#1f5fa8", "s")), strict=True))


def draw(path: str | Path) -> list[Path]:
    """Write the pictures of a results file beside it, those for which it has rows.

    Raises:
        ValueError: the file is no results file, or has no row for any picture.
    """
    rows, written = read_rows(path), []
    stem = Path(path).with_suffix("")
    table = [r for r in rows if r.set in ("target", "tiny") and r.selection in ("random", "all") and r.sequences == 1]
    for B, N in sorted({(r.B, r.N) for r in table}):
        longest = max(r.T for r in table)
        here = [r for r in table if (r.B, r.N, r.T) == (B, N, longest)]
        targets = [(g, Case(group=g, block=B, num_selected=N, slack=1.0)) for g in range(1, 17)]
        picture = Path(f"{stem}_groups_{B}x{N}.png")
        _picture(picture, here, f"T = {longest}", "query heads per KV head (G)", lambda r: r.Hq // r.Hkv, targets)
        written.append(picture)
    lengths = [r for r in rows if r.set in ("lengths", "target") and (r.B, r.N, r.Hq) == (64, 16, LENGTH_GROUP * r.Hkv)]
    if len({r.T for r in lengths}) > 1:
        targets = [(T, Case(group=LENGTH_GROUP, length=T, slack=1.0)) for T in sorted({r.T for r in lengths})]
        picture = Path(f"{stem}_lengths.png")
        _picture(picture, lengths, f"G = {LENGTH_GROUP}", "tokens (T)", lambda r: r.T, targets)
        written.append(picture)
    if not written:
        raise ValueError(f"{path} has no rows of the sets target or lengths. Run nsattn bench selected.")
    return written


def draw_models(path: str | Path) -> list[Path]:
    """Write the pictures of a `models.json` beside it: one for every (B, N).

    Raises:
        ValueError: the file is no results file of `nsattn bench model`, or has nothing to compare.
    """
    rows, written = model.read(path), []
    for B, N in sorted({(r.B, r.N) for r in rows}):
        figure = speedup_figure([r for r in rows if (r.B, r.N) == (B, N)])
        if figure is not None:
            written.append(Path(f"{Path(path).with_suffix('')}_{B}x{N}.png"))
            figure.savefig(written[-1], dpi=DPI)
            plt.close(figure)
    if not written:
        raise ValueError(f"{path} has no case with both dense attention and NSA. Run nsattn bench model.")
    return written


def speedup_figure(rows: Sequence[model.ModelRow]) -> Figure | None:
    """Speed-up over dense (above) and over the vanilla schedule (below) against the length, a column for each model.

    `rows` are of one (B, N). None where they hold nothing to compare.
    """
    found = [(key[0], key[1], key[3], key[4:]) for key in model.speedups(list(rows))]
    names = [name for name in (*model.MODELS, *model.TINY) if any(name == key[0] for key in found)]
    if not names:
        return None
    figure, axes = plt.subplots(
        2, len(names), figsize=(1.5 + 3.2 * len(names), 5.6), sharex=True, sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    steps = sorted({T for _, T, *_ in found})
    for column, name in zip(axes.T, names, strict=True):
        for side, axis in enumerate(column):
            for phase, (colour, marker) in PHASES.items():
                points = sorted((T, times[side]) for kind, T, of, times in found if (kind, of) == (name, phase))
                if points:
                    axis.plot(*zip(*points, strict=True), color=colour, marker=marker, label=phase)
            axis.axhline(1, color="#555555", lw=1, ls=":")
            axis.set(xscale="log", ylim=(0, 1.1 * max(1, *(times[side] for *_, times in found))))
            ticks(axis, steps)
            axis.grid(True, which="major", color="#dddddd", lw=0.8)
            axis.spines[["top", "right"]].set_visible(False)
        column[0].set_title(name, fontsize=11)
        column[1].set_xlabel("tokens (T)")
    axes[0, 0].set_ylabel("times faster than dense")
    axes[1, 0].set_ylabel("than the vanilla schedule")
    figure.suptitle(f"Layers with NSA, B = {rows[0].B}, N = {rows[0].N}", fontsize=12)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    return figure


def _picture(
    path: Path,
    rows: Sequence[Row],
    what: str,
    xlabel: str,
    x_of: Callable[[Row], int],
    targets: Sequence[tuple[int, Case]],
) -> None:
    """Forward and backward side by side."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, layout="constrained")
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        mine = [r for r in rows if r.direction == direction]
        for who, (label, colour, marker) in STYLES.items():
            _line(axis, [r for r in mine if r.who == who and _shown(r)], x_of, label, colour, marker)
        graph = [r for r in mine if r.impl == "auto graph"]
        _line(axis, graph, x_of, "nsattn, as a CUDA graph", STYLES["nsattn"][1], ".", dashed=True)
        if rows[0].set != "tiny":
            aims = [(x, target_ms(case, direction)) for x, case in targets]
            axis.plot(*zip(*aims, strict=True), color=STYLES["nsattn"][1], lw=1, ls=":", label="target", zorder=1)
        axis.set(title=direction, xlabel=xlabel, xscale="log", yscale="log")
        ticks(axis, {x_of(r) for r in rows})
        axis.yaxis.set_major_formatter(PLAIN)
        axis.grid(True, which="major", color="#dddddd", lw=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("milliseconds")
    shape = f"{rows[0].Hkv} KV heads, D = {rows[0].D}, B = {rows[0].B}, N = {rows[0].N}"
    figure.suptitle(f"Selected attention, {what}, {shape}", fontsize=12)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _shown(row: Row) -> bool:
    """Ours by the automatic choice; theirs as called, not as graphs."""
    return row.impl == "auto" if row.who == "nsattn" else not row.impl.endswith(GRAPH)


def _line(
    axis: Axes,
    rows: Sequence[Row],
    x_of: Callable[[Row], int],
    label: str,
    colour: str,
    marker: str,
    dashed: bool = False,
) -> None:
    """One line; results that failed the check are hollow points."""
    if not rows:
        return
    rows = sorted(rows, key=x_of)
    ours = label.startswith("nsattn")
    points = {"marker": marker, "ms": 6, "mec": colour, "color": colour, "zorder": 4 if ours else 3}
    line = {"lw": 2.4 if ours else 1.4, "ls": "--" if dashed else "-", "label": label}
    axis.plot([x_of(r) for r in rows], [r.ms for r in rows], **points, **line)
    wrong = [r for r in rows if not r.ok]
    axis.plot([x_of(r) for r in wrong], [r.ms for r in wrong], **points, ls="none", mfc="white", mew=1.6)


def stack(axes: Axes, rows: Sequence[Row], direction: str) -> None:
    """Time of each operation at `HEADS`, one above the other: ours, beside it who else was timed, and dense attention.

    Hatched is what failed its check. The names of the projects stand below their bars, the legend is the figure's.
    """
    seen: set[str] = set()
    steps, width = lengths(rows), 0.26
    for i, T in enumerate(steps):
        here = [(project, parts(rows, T, project, direction)) for project in PROJECTS]
        here = [(project, times) for project, times in here if project == OURS or "attend_selected" in times]
        for j, (project, times) in enumerate(here):
            x, base = i + (j - (len(here) - 1) / 2) * (width + 0.04), 0.0
            for colour, op in zip(COLOURS, OPERATIONS, strict=True):
                if op in times:
                    ms, ok = times[op]
                    label = None if op in seen else op
                    seen.add(op)
                    axes.bar(x, ms / T * 1e6, width, bottom=base, color=colour, label=label, hatch=None if ok else "//",
                             edgecolor="white", lw=0)  # fmt: skip
                    base += ms / T * 1e6
            axes.text(x, -0.015, project, transform=axes.get_xaxis_transform(), fontsize=6, rotation=90, ha="center",
                      va="top")  # fmt: skip
        dense = [r.ms for r in rows if (r.T, (r.Hq, r.Hkv), r.op, r.direction) == (T, HEADS, "dense causal", direction)]
        if dense:
            height = dense[0] / T * 1e6
            axes.plot([i - 0.45, i + 0.45], [height] * 2, color="#222222", label=None if "dense" in seen else "dense")
            seen.add("dense")
    axes.set_xticks(range(len(steps)), [f"{T // 1024}K" for T in steps])
    axes.tick_params(axis="x", which="major", length=0, pad=34)
    axes.set(xlabel="tokens", ylabel="ns per token", title=f"{direction}, {HEADS[0]}/{HEADS[1]} heads")


def ticks(axes: Axes, steps: Iterable[int]) -> None:
    """Ticks of a logarithmic axis at these numbers, 65536 as 64K, and at no others."""
    steps = sorted(set(steps))
    axes.set_xticks(steps, [f"{step >> 10}K" if step >= 1024 else str(step) for step in steps])
    axes.xaxis.set_minor_locator(NullLocator())


def legend_below(figure: Figure) -> None:
    """One legend for all axes of a figure, below them: it hides no data."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    ncols = len(handles) if len(handles) < 8 else -(-len(handles) // 2)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=ncols, frameon=False, fontsize=8)


def draw_parts(path: Path, rows: Sequence[Row], numbers: str) -> None:
    """Where the time goes, forward and backward side by side; the file carries the numbers it was drawn from."""
    figure, both = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for axes, direction in zip(both, DIRECTIONS, strict=True):
        stack(axes, rows, direction)
        axes.spines[["top", "right"]].set_visible(False)
    legend_below(figure)
    _save(figure, path, numbers)


def draw_figure(path: Path, times: Times, direction: str, numbers: str) -> None:
    """The paper's figure in one direction: a row for each (B, N), a column for each group, time against the length."""
    sizes = sorted({(case.block, case.num_selected) for case in PAPER})
    figure, grid = plt.subplots(len(sizes), len(PAPER_GROUPS), figsize=(12, 5.2), sharex=True, layout="constrained")
    handles: dict[str, Artist] = {}
    for (B, N), line in zip(sizes, grid, strict=True):
        for g, axes in zip(PAPER_GROUPS, line, strict=True):
            for who in NAMES:
                _, colour, marker = STYLES[OURS if who in ("auto", "qmajor") else who]
                mine = sorted((case.length, time.ms, time.ok) for (case, other, way), time in times.items()
                              if (other, way, case.group, case.block) == (who, direction, g, B))  # fmt: skip
                if mine:
                    x, ms, ok = zip(*mine, strict=True)
                    look = {"color": colour, "ls": "--" if who == "qmajor" else "-", "lw": 1.4}
                    handles[NAMES[who].replace("`", "")] = axes.plot(x, ms, **look)[0]
                    for right in (True, False):  # hollow points failed their check
                        points = [(a, b) for a, b, good in zip(x, ms, ok, strict=True) if good == right]
                        face = colour if right or marker == "x" else "white"
                        axes.plot(*zip(*points, strict=True) if points else ((), ()), ls="none", marker=marker, ms=5,
                                  mec=colour, mfc=face)  # fmt: skip
            axes.set(xscale="log", yscale="log", title=f"G = {g}, (B, N) = ({B}, {N})")
            axes.title.set_fontsize(8)
            ticks(axes, {case.length for case in PAPER})
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            for side in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                side(PLAIN)
            axes.tick_params(labelsize=8, which="both")
            axes.grid(True, which="major", color="#dddddd", lw=0.8)
        line[0].set_ylabel(f"{direction}, milliseconds")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
    _save(figure, path, numbers)


def _save(figure: Figure, path: Path, numbers: str) -> None:
    figure.savefig(path, dpi=DPI, metadata={"Date": None, "Description": numbers}, facecolor="white")
    plt.close(figure)
