"""The pictures of `selected.json`, times against the group and the length, and of `models.json`, speed-ups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from nsattn.bench import model
from nsattn.bench.cases import Case, target_ms
from nsattn.bench.timing import Row, read_rows

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
    found = list(model.speedups(list(rows)))
    names = [name for name in (*model.MODELS, *model.TINY) if any(name == key[0] for key in found)]
    if not names:
        return None
    figure, axes = plt.subplots(
        2, len(names), figsize=(1.5 + 3.2 * len(names), 5.6), sharex=True, sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    steps = sorted({T for _, T, *_ in found})
    tops = [1.1 * max(1, *ratios) for ratios in zip(*(key[4:] for key in found), strict=True)]
    for column, name in zip(axes.T, names, strict=True):
        for axis, number, top in zip(column, (4, 5), tops, strict=True):
            for phase, (colour, marker) in PHASES.items():
                points = sorted((key[1], key[number]) for key in found if (key[0], key[3]) == (name, phase))
                if points:
                    axis.plot(*zip(*points, strict=True), color=colour, marker=marker, label=phase)
            axis.axhline(1, color="#555555", lw=1, ls=":")
            axis.set(xscale="log", ylim=(0, top))
            axis.set_xticks(steps, [f"{step >> 10}K" if step >= 1024 else str(step) for step in steps])
            axis.xaxis.set_minor_locator(NullLocator())
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
        steps = sorted({x_of(r) for r in rows})
        axis.set_xticks(steps, [f"{step >> 10}K" if step >= 1024 else str(step) for step in steps])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
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
    return row.impl == "auto" if row.who == "nsattn" else not row.impl.endswith(" graph")


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
