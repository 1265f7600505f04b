"""Pictures of a run: loss curves of one or several runs, and which blocks every query position selected."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.patches import Patch
from torch import Tensor

from nsattn.config import NSAConfig
from nsattn.train.data import bits

DPI = 120
COLOURS = ("#1f5fa8", "#d1662a", "#3a8f4d", "#8a4fa3", "#7a6a55", "#c23b52")
ROWS = 512  # most rows of a selection map; more positions share a row
FREE = LinearSegmentedColormap.from_list("free", ["#ffffff", "#1f5fa8"])


@dataclass(frozen=True)
class Curve:
    """The loss of a run: training loss at every step, held-out loss at some, both in bits per byte."""

    name: str
    bytes_seen: np.ndarray
    train: np.ndarray
    held_out_bytes: np.ndarray
    held_out: np.ndarray
    baselines: dict[str, float]


def read_curve(folder: Path) -> Curve:
    """Read `metrics.jsonl` and `config.json` of a run folder. Raises ValueError if they are missing or damaged."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps = [line for line in lines if "loss" in line]
        evals = [line for line in lines if "held_out_bits_per_byte" in line]
        return Curve(
            f"{folder.name} ({config['run']['model']['attention']})",
            np.array([line["bytes"] for line in steps]),
            np.array([bits(line["loss"]) for line in steps]),
            np.array([line["bytes"] for line in evals]),
            np.array([line["held_out_bits_per_byte"] for line in evals]),
            config["baselines"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is not a training run's folder ({error}). Give one of nsattn train.") from error


def draw_loss(folders: Sequence[Path], path: Path) -> None:
    """Training loss (moving average) and held-out loss of several runs over bytes seen, with the n-gram baselines."""
    curves = [read_curve(folder) for folder in folders]
    figure, axes = plt.subplots(figsize=(9, 5.5), dpi=DPI, layout="constrained")
    largest = max((curve.bytes_seen[-1] for curve in curves if len(curve.bytes_seen)), default=1)
    unit, name = (1e6, "MB") if largest >= 1e6 else (1e3, "kB")
    for curve, colour in zip(curves, COLOURS * len(curves), strict=False):
        width = max(1, len(curve.train) // 50)
        axes.plot(curve.bytes_seen / unit, curve.train, color=colour, linewidth=0.6, alpha=0.25)
        axes.plot(
            curve.bytes_seen / unit, _moving_average(curve.train, width), color=colour, linewidth=1.6,
            label=f"{curve.name}, training, mean of {width} steps" if width > 1 else f"{curve.name}, training",
        )
        last = f" (last: {curve.held_out[-1]:.3f})" if len(curve.held_out) else ""
        axes.plot(
            curve.held_out_bytes / unit, curve.held_out, "o--", color=colour, markersize=5, linewidth=1,
            markeredgecolor="white", label=f"{curve.name}, held out{last}",
        )
    for (order, value), style in zip(list(curves[0].baselines.items())[1:], (":", "-."), strict=False):
        axes.axhline(value, color="#666666", linewidth=1, linestyle=style, label=f"{order} baseline ({value:.3f})")
    low = min([*curves[0].baselines.values(), *(x for curve in curves for x in (*curve.train, *curve.held_out))])
    axes.set_ylim(max(0.0, 0.9 * low), max([5.0, *curves[0].baselines.values()]))
    axes.set_xlim(left=0)
    axes.set_xlabel(f"training bytes seen [{name}]")
    axes.set_ylabel("loss [bits per byte]")
    axes.set_title("Loss of a byte-level language model")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, framealpha=0.9)
    figure.savefig(path)
    plt.close(figure)


def draw_selection(selections: Tensor, config: NSAConfig, path: Path) -> None:
    """Which blocks each query position selected, for the first, middle and last layer and up to four KV heads.

    Args:
        selections: int `[layers, T, Hkv, N]` of one sequence.
        config: block sizes.
        path: PNG to write.
    """
    layers, length, heads = selections.shape[:3]
    shown = sorted({0, layers // 2, layers - 1})
    heads = min(heads, 4)
    size = (1.5 + 3.6 * heads, 1.3 + 3.2 * len(shown))
    figure, grid = plt.subplots(
        len(shown), heads, figsize=size, dpi=DPI, layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    blocks = -(-length // config.slc_block)
    image: Any = None
    for row, layer in enumerate(shown):
        for head in range(heads):
            axes = grid[row][head]
            colours = selection_map(selections[layer, :, head].numpy(), config)
            image = axes.imshow(
                colours, aspect="auto", interpolation="nearest", extent=(-0.5, blocks - 0.5, length - 0.5, -0.5)
            )
            axes.set_title(f"layer {layer}, KV head {head}", fontsize=10)
            if head == 0:
                axes.set_ylabel("query position [bytes]")
            if row == len(shown) - 1:
                axes.set_xlabel(f"key block [{config.slc_block} bytes each]")
    figure.suptitle(
        f"Blocks selected per query: {config.num_selected}, of which {config.init_blocks} first and "
        f"{config.local_blocks} local are forced", fontsize=11,
    )
    if image is not None:
        scale = plt.cm.ScalarMappable(cmap=FREE)
        bar = figure.colorbar(scale, ax=grid, shrink=0.6)
        bar.set_label("share of queries that chose the block freely")
    figure.legend(
        handles=[Patch(color="#f2b880", label="forced"), Patch(color="#dddddd", label="not visible (in the future)")],
        loc="outside lower center", ncols=2, fontsize=9,
    )
    figure.savefig(path)
    plt.close(figure)


def selection_map(block_idx: np.ndarray, config: NSAConfig) -> np.ndarray:
    """Colours `[rows, blocks, 3]` of one layer and KV head from `block_idx` `[T, N]`; at most `ROWS` rows."""
    length, blocks = len(block_idx), -(-len(block_idx) // config.slc_block)
    chosen = np.zeros((length, blocks + 1), dtype=np.float32)
    np.put_along_axis(chosen, np.where(block_idx < 0, blocks, block_idx), 1.0, axis=1)
    chosen = chosen[:, :blocks]
    block, current = np.arange(blocks), np.arange(length)[:, None] // config.slc_block
    visible = block <= current
    forced = visible & ((block < config.init_blocks) | (block > current - config.local_blocks))
    # Rows are groups of positions inside one block where there are too many, so all of a row see the same blocks.
    per_row = 1
    while length / per_row > ROWS and per_row < config.slc_block:
        per_row *= 2
    starts = np.arange(0, length, per_row)
    share = np.add.reduceat(chosen, starts, axis=0) / np.diff(starts, append=length)[:, None]
    colours = FREE(share)[..., :3]
    colours[forced[starts]] = to_rgb("#f2b880")
    colours[~visible[starts]] = to_rgb("#dddddd")
    return colours


def draw_gates(gates: Tensor, path: Path) -> None:
    """Mean gate of each branch: by layer, and along the text.

    Args:
        gates: float `[layers, T, Hq, 3]`, of the compressed, selected and window branch.
        path: PNG to write.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), dpi=DPI, layout="constrained")
    by_layer, by_position = gates.mean((1, 2)).numpy(), gates.mean((0, 2)).numpy()
    width = max(1, len(by_position) // 100)
    for branch, name in enumerate(("compressed", "selected", "window")):
        colour = COLOURS[(2, 0, 1)[branch]]
        left.plot(range(len(by_layer)), by_layer[:, branch], "o-", color=colour, label=name)
        right.plot(_moving_average(by_position[:, branch], width), color=colour, label=name)
    left.set(xlabel="layer", ylabel="mean gate", ylim=(0, 1), xticks=range(len(by_layer)))
    right.set(xlabel="position [bytes]", ylim=(0, 1), title=f"mean of {width} positions" if width > 1 else "")
    left.legend()
    figure.suptitle("Weight of each branch: its gate, between 0 and 1")
    figure.savefig(path)
    plt.close(figure)


def _moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the last `width` values at each place, of fewer at the start."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    return (total[end] - total[start]) / (end - start)
