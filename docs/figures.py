"""Draw the pictures of the site into docs/pictures: `python docs/figures.py`.

The schemes are drawn by hand, the times come from benchmarks/results/h200/attention.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

ROOT = Path(__file__).parent.parent
OUT = Path(__file__).parent / "pictures"
BLUE, ORANGE, GREEN, PALE, GREY, INK = "#1f5fa8", "#d1662a", "#3a8f4d", "#c9dbef", "#e4e4e4", "#222222"
HEADS = "32/8"
# The later of two counts: a short call takes as long as the host needs, its CUDA graph does not.
WHOLE = (("nsa_attention", "auto"), ("nsa_attention", "auto graph"), ("dense causal", "cudnn"))

# Blocks that eight neighbouring tokens select, three each: the first, the latest and a free one.
SELECTED = ((0, 1, 5), (0, 2, 5), (0, 2, 5), (0, 2, 5), (0, 3, 5), (0, 2, 5), (0, 2, 5), (0, 4, 5))


def main() -> None:
    plt.rcParams.update({"font.size": 9, "font.family": "DejaVu Sans"})
    OUT.mkdir(exist_ok=True)
    save(draw_branches(), "branches.png")
    save(draw_orders(), "orders.png")
    save(draw_times(), "times.png", plotted())


def save(figure: Any, name: str, description: str = "") -> None:
    metadata = {"Date": None, "Description": description} if description else {"Date": None}
    figure.savefig(OUT / name, metadata=metadata, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def cell(ax: Any, x: float, y: float, w: float, h: float, colour: str, edge: str = "white", **kwargs: Any) -> None:
    ax.add_patch(Rectangle((x, y), w, h, facecolor=colour, edgecolor=edge, **kwargs))


def bare(ax: Any, xlim: tuple[float, float], ylim: tuple[float, float]) -> None:
    ax.set(xlim=xlim, ylim=ylim, aspect="equal")
    ax.axis("off")


def draw_branches() -> Any:
    """What one query token reads: three rows over the same axis of tokens."""
    figure, ax = plt.subplots(figsize=(9, 3.1))
    bare(ax, (-17, 66), (-6.5, 21))
    query, block, window = 60, 8, 12  # 64 tokens, blocks of 8
    rows = (
        (16, "compressed", "every block, as one\nlearned summary", GREEN),
        (8, "selected", "the best blocks,\ntoken by token", BLUE),
        (0, "window", "the latest tokens", ORANGE),
    )
    for y, name, text, colour in rows:
        ax.text(-16.5, y + 2.9, name, color=colour, weight="bold", va="center")
        ax.text(-16.5, y + 0.4, text, fontsize=7.5, va="center", color=INK)
        for t in range(64):
            seen = t <= query
            if name == "compressed":
                break
            chosen = t // block in (0, 3, 6, 7) if name == "selected" else query - window < t
            cell(ax, t, y, 1, 3, colour if chosen and seen else GREY if seen else "white", lw=0.5)
    for i in range(7):  # whole blocks only
        cell(ax, i * block + 0.15, 16, block - 0.3, 3, GREEN)
    for b, label in ((0, "forced: first"), (3, "best score"), (6.1, "forced: two latest")):
        ax.text(b * block + 4, 11.7, label, ha="center", fontsize=7.5, color=BLUE)
    ax.plot([query + 0.5] * 2, [-2.2, 20.5], color=INK, lw=1)
    ax.text(query + 0.5, -3.4, "query", ha="center", va="center")
    ax.annotate("", (58, -3.4), (0, -3.4), arrowprops={"arrowstyle": "->", "color": INK})
    ax.text(24, -5.4, "position of the keys", ha="center", va="center")
    return figure


def draw_orders() -> Any:
    """Three loop orders over one selection: which cells one program computes, and how full its tile is."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 5.4))
    group = 4
    panels = (
        ("query-major (NSA)", "one program: one token", lambda t, b: t == 3, group, 16,
         f"rows in the tile: {group} of 16\n(1 token x {group} query heads)"),
        ("KV-major (FSA)", "one program: one block", lambda t, b: b == 2, 5 * group, 5 * group,
         f"rows in the tile: all\n(5 tokens x {group} query heads)"),
        ("tile-union (part of kvmajor_sm90)", "one program: four tokens", lambda t, b: t < 4, 4 * group, 4 * group,
         f"rows in the tile: all\n(4 tokens x {group} heads), some masked"),
    )  # fmt: skip
    for ax, (title, who, mine, full, tile, text) in zip(axes, panels, strict=True):
        bare(ax, (-1.8, 6.3), (-4.2, 10.4))
        ax.text(3, 10.1, title, ha="center", weight="bold", color=INK)
        ax.text(3, 9.4, who, ha="center", fontsize=8, color=INK)
        union = {b for t, blocks in enumerate(SELECTED) for b in blocks if mine(t, b)}
        for t, blocks in enumerate(SELECTED):
            for b in range(6):
                chosen, inside = b in blocks, mine(t, b) and b in union
                colour = (BLUE if inside else PALE) if chosen else GREY
                cell(ax, b, 8 - t, 0.94, -0.94, colour, lw=0)
                if inside and not chosen and title.startswith("tile"):
                    cell(ax, b, 8 - t, 0.94, -0.94, "none", BLUE, hatch="////", lw=0)
        x, y, w, h = outline(mine)
        cell(ax, x - 0.06, y - 0.04, w + 0.06, h + 0.08, "none", ORANGE, lw=2.2)
        ax.text(-0.3, 4, "query tokens", rotation=90, ha="right", va="center", fontsize=8)
        ax.text(3, -0.45, "blocks of keys", ha="center", va="center", fontsize=8)
        for i in range(tile):
            cell(ax, 0.4 + i * 5.2 / tile, -2.4, 5.2 / tile * 0.92, 1.2, BLUE if i < full else GREY, lw=0)
        ax.text(3, -3.6, text, ha="center", va="center", fontsize=8)
    figure.tight_layout(w_pad=0.5)
    return figure


def outline(mine: Any) -> tuple[float, float, float, float]:
    """Box around the cells of one program: x, y, width, height."""
    cells = [(t, b) for t in range(8) for b in range(6) if mine(t, b)]
    first, last = min(t for t, _ in cells), max(t for t, _ in cells)
    left, right = min(b for _, b in cells), max(b for _, b in cells)
    return left, 8 - last - 0.94, right - left + 1, last - first + 0.94


def draw_times() -> Any:
    """Time of a forward and of a backward pass against the length, beside dense attention."""
    kinds = (
        ("dense causal", "dense causal attention (cuDNN)", PALE), ("nsa_attention", "NSA, all three branches", BLUE),
    )  # fmt: skip
    times = measured()
    lengths = sorted({T for op, _, T in times if op == "dense causal"})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for ax, direction in zip(axes, ("forward", "backward"), strict=True):
        for offset, (op, label, colour) in enumerate(kinds):
            for i, T in enumerate(lengths):
                ms = times[op, direction, T]
                bar = ax.bar(i + 0.38 * offset, ms, 0.36, color=colour, label=label if i == 0 else None)
                ax.bar_label(bar, fmt="%.2g" if ms < 10 else "%.0f", fontsize=8)
        ax.set_yscale("log")
        ax.set_title(f"{direction}, milliseconds (log scale) by tokens", fontsize=9)
        ax.set_xticks([i + 0.19 for i in range(len(lengths))], [f"{T // 1024}K" for T in lengths])
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="upper left", fontsize=8)
    figure.tight_layout()
    return figure


def measured() -> dict[tuple[str, str, int], float]:
    """Milliseconds by (operation, direction, T) for the heads that the picture shows."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "h200" / "attention.json").read_text())["rows"]
    found = [row for row in rows if f"{row['Hq']}/{row['Hkv']}" == HEADS and (row["op"], row["impl"]) in WHOLE]
    found.sort(key=lambda row: WHOLE.index((row["op"], row["impl"])))
    return {(row["op"], row["direction"], row["T"]): row["ms"] for row in found}


def plotted() -> str:
    """The numbers of times.png, which it carries, so that a test can see whether it is up to date."""
    return "; ".join(f"{op} {direction} {T} {ms:.2f}" for (op, direction, T), ms in sorted(measured().items()))


if __name__ == "__main__":
    main()
