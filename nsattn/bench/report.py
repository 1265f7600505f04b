"""`nsattn report`: one self-contained HTML page from the results files of `nsattn bench`.

The page reads `attention.json`, `selected.json`, `decode.json`, `models.json` and `models_compiled.json` of a folder. A
section whose file is missing says so; nothing is filled in. Pictures are SVG inside the page: no script, no font, and
nothing is fetched.
"""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from nsattn.bench import paper
from nsattn.bench.model import ModelRow, decoding, overheads
from nsattn.bench.model import read as read_models
from nsattn.bench.paper import DIRECTIONS, HEADS, lengths
from nsattn.bench.plots import PLAIN, legend_below, speedup_figure, stack, ticks
from nsattn.bench.timing import GRAPH, Row, read_rows, without_host

COLOURS = ("#3a8f4d", "#8a4fa3", "#c9a227", "#1f5fa8", "#d1662a", "#7a6a55", "#c23b52", "#4aa3a3", "#444444")
FILES = ("attention", "selected", "decode", "models", "models_compiled")

Table = tuple[Sequence[str], Iterable[Sequence[str]]]


def write(results: Path, out: Path) -> Path:
    """Write the page.

    Raises:
        ValueError: no results file in the folder, or a damaged one.
    """
    found = {name: results / f"{name}.json" for name in FILES if (results / f"{name}.json").exists()}
    if not found:
        raise ValueError(f"{results} holds none of {', '.join(f'{n}.json' for n in FILES)}. Run nsattn bench first.")
    rows = {name: read_rows(path) for name, path in found.items() if not name.startswith("models")}
    models = {name: read_models(path) for name, path in found.items() if name.startswith("models")}
    attention, selected = rows.get("attention", []), rows.get("selected", [])
    sections = [
        ("Where it was measured", _environments(found, {**rows, **models})),
        ("Time against the length", _against_length(attention)),
        ("Where the time goes", _stack(attention)),
        ("Selected attention against the group", _against_group(selected or attention)),
        ("Speed-up of selected attention", _speedups(selected)),
        ("How far from the floor", _roofline(attention)),
        ("Memory beyond inputs and outputs", _memory(attention)),
        ("A decoding step", _decoding(rows.get("decode", []))),
        ("Models", _models(models, "models")),
        ("Models, norms and MLPs compiled", _models(models, "models_compiled")),
        ("Models, a decoding step", _steps(models.get("models", []))),
        ("What a module adds to its kernels", _overheads(models.get("models", []))),
        ("What the Flash Sparse Attention paper claims", _table(paper.claims(paper.read(results)), wrap=True)),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_page(sections), encoding="utf-8")
    return out


def _environments(found: dict[str, Path], rows: Mapping[str, Sequence[Row | ModelRow]]) -> str:
    """The machine of each file, and the commits of its rows."""
    names = ("gpu", "torch", "triton", "cuda", "python")
    lines = []
    for name, path in found.items():
        seen = json.loads(path.read_text()).get("environment", {})
        commits = ", ".join(sorted({row.commit for row in rows[name]}))
        lines.append([f"{name}.json", *(str(seen.get(key, "")) for key in names), commits])
    return _table((("file", *names, "commits of its rows"), lines))


def _against_length(rows: list[Row]) -> str:
    """Whole NSA and dense attention for every pair of head counts."""
    heads = sorted({(r.Hq, r.Hkv) for r in rows if r.op == "nsa_attention"})
    if not heads:
        return _missing("attention")

    kinds = (
        ("nsa_attention", False, "o-", "NSA"),
        ("nsa_attention", True, ".--", "NSA, as a CUDA graph"),
        ("dense causal", False, "s:", "dense, cuDNN"),
    )

    def draw(axes: Any, direction: str) -> None:
        for colour, (Hq, Hkv) in zip(COLOURS * 2, heads, strict=False):
            for op, graph, style, _ in kinds:
                mine = sorted((r for r in rows if (r.Hq, r.Hkv, r.op, r.impl.endswith(GRAPH), r.direction)
                               == (Hq, Hkv, op, graph, direction)), key=lambda r: r.T)
                _line(axes, [(r.T, r.ms, r.ok) for r in mine], style, colour)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=direction)
        ticks(axes, {r.T for r in rows if r.op == "nsa_attention"})
        axes.yaxis.set_major_formatter(PLAIN)
        for colour, (Hq, Hkv) in zip(COLOURS * 2, heads, strict=False):  # entries of the legend, not data
            axes.plot([], [], color=colour, lw=5, label=f"{Hq}/{Hkv} heads")
        for *_, style, label in kinds:
            axes.plot([], [], style, color="#222222", markersize=4, label=label)

    return _figure(draw)


def _against_group(rows: list[Row]) -> str:
    """Selected attention of everyone at 64K tokens and four KV heads."""
    here = [r for r in rows if r.op in ("attend_selected", "dense causal") and r.T == 65536 and r.Hkv == 4
            and (r.B, r.N) == (64, 16) and r.set in ("", "target")]
    if not here:
        return _missing("selected")
    here = without_host(here)
    who = sorted({(r.who, r.impl) for r in here})

    def draw(axes: Any, direction: str) -> None:
        for colour, (name, impl) in zip(COLOURS * 3, who, strict=False):
            mine = sorted((r for r in here if (r.who, r.impl, r.direction) == (name, impl, direction)),
                          key=lambda r: r.Hq)
            style = "o-" if name == "nsattn" else "s:"
            _line(axes, [(r.Hq // r.Hkv, r.ms, r.ok) for r in mine], style, colour, f"{name} {impl}")
        axes.set(xscale="log", yscale="log", xlabel="query heads per KV head", ylabel="ms", title=direction)
        ticks(axes, {r.Hq // r.Hkv for r in here})
        axes.yaxis.set_major_formatter(PLAIN)

    note = "65536 tokens, four KV heads of 128, 16 blocks of 64 per token. A CUDA graph of what can be captured."
    return _note(note) + _figure(draw)


def _stack(rows: list[Row]) -> str:
    """Time of each operation, one above the other, and dense attention beside it."""
    if not lengths(rows):
        return _missing("attention")
    note = ("The operations one by one: their sum is not the time of the whole. Ours are CUDA graphs where there is "
            "one, theirs are calls. Hatched: the result failed its check.")  # fmt: skip
    return _note(note) + _figure(lambda axes, direction: stack(axes, rows, direction))


def _speedups(rows: list[Row]) -> str:
    """Of `auto` over each other project, in the same run, over all shapes."""
    rows = without_host(rows)
    best: dict[tuple[str, str], list[float]] = {}
    key = ("T", "Hq", "Hkv", "D", "Dv", "B", "N", "selection", "direction", "dtype", "sequences", "set")
    ours = {tuple(getattr(r, k) for k in key): r.ms for r in rows if (r.who, r.impl) == ("nsattn", "auto") and r.ok}
    for r in rows:
        mine = ours.get(tuple(getattr(r, k) for k in key))
        if r.who != "nsattn" and mine and r.ok and r.op == "attend_selected":
            best.setdefault((r.who, r.direction), []).append(r.ms / mine)
    lines = [
        [who, direction, str(len(x)), *(f"{v:.1f}x" for v in (min(x), _mean(x), max(x)))]
        for (who, direction), x in sorted(best.items())
    ]
    head = ("beside", "direction", "shapes", "least", "mean", "most")
    note = ("How many times as fast `auto` is, over the shapes at which both were timed and gave right results. Up to "
            "65536 tokens ours are CUDA graphs, and theirs but for official FSA and nsa_ref, which cannot be captured."
            )  # fmt: skip
    return _note(note) + _table((head, lines)) if lines else _missing("selected")


def _roofline(rows: list[Row]) -> str:
    T, table = paper.roofline(rows)
    note = f"{HEADS[0]}/{HEADS[1]} heads, {T} tokens."
    return _note(note) + _table(table) if table[1] else _missing("attention")


def _memory(rows: list[Row]) -> str:
    found: dict[tuple[int, str], dict[str, float]] = {}
    for r in rows:
        if (r.Hq, r.Hkv) == HEADS and r.op in ("nsa_attention", "attend_selected", "dense causal"):
            found.setdefault((r.T, f"{r.who} {r.op} {r.impl}"), {})[r.direction] = r.peak_gib
    lines = [
        [str(T), what, *(f"{peaks[way]:.2f}" if way in peaks else "" for way in DIRECTIONS)]
        for (T, what), peaks in sorted(found.items(), key=lambda item: item[0][0])
    ]
    head = ("tokens", "what", *(f"{way}, GiB" for way in DIRECTIONS))
    note = f"{HEADS[0]}/{HEADS[1]} heads. In the backward, what the forward kept for it counts."
    return _note(note) + _table((head, lines)) if lines else _missing("attention")


def _decoding(rows: list[Row]) -> str:
    lines = [
        [f"{r.sequences} x {r.T // r.sequences}", f"{r.Hq}/{r.Hkv}", f"{r.who} {r.impl}", f"{r.ms:.4f}",
         f"{r.floor_ms:.4f}", "yes" if r.ok else "NO"]
        for r in rows
    ]  # fmt: skip
    head = ("sequences x context", "heads", "what", "ms", "floor, ms", "right")
    return _table((head, lines)) if lines else _missing("decode")


def _models(models: Mapping[str, list[ModelRow]], name: str) -> str:
    rows = models.get(name, [])
    table = paper.model_table(rows)
    if not table[1]:
        return _missing(name)
    figures = [speedup_figure([r for r in rows if (r.B, r.N) == pair]) for pair in sorted({(r.B, r.N) for r in rows})]
    return "".join(_svg(figure) for figure in figures if figure is not None) + _table(table)


def _steps(rows: list[ModelRow]) -> str:
    """A decoding step of all layers, eight sequences."""
    lines = [
        [model, str(T), f"({B}, {N})", f"{dense:.3f}", f"{ours:.3f}", f"{dense / ours:.2f}x"]
        for model, T, (B, N), dense, ours in decoding(rows)
    ]
    head = ("model", "context", "(B, N)", "dense, ms", "NSA, ms", "over dense")
    return _table((head, lines)) if lines else _missing("models")


def _overheads(rows: list[ModelRow]) -> str:
    """One attention module without projections and norms, forward and backward, beside the kernels that it calls."""
    lines = [
        [model, str(T), f"({B}, {N})", f"{ms:.2f}", f"{kernels:.2f}", f"{share:.1%}"]
        for model, T, (B, N), ms, kernels, share in overheads(rows)
    ]
    head = ("model", "tokens", "(B, N)", "module, ms", "kernels, ms", "added")
    return _table((head, lines)) if lines else _missing("models")


def _mean(x: Sequence[float]) -> float:
    return sum(x) / len(x)


def _missing(name: str) -> str:
    return f"<p>Not measured: there is no {name}.json with such rows.</p>"


def _note(text: str) -> str:
    return f"<p>{_inline(text)}</p>\n"


def _inline(text: str) -> str:
    """Text with `code` in backticks."""
    return re.sub(r"`(.*?)`", r"<code>\1</code>", html.escape(text))


def _line(axes: Any, points: list[tuple[float, float, bool]], style: str, colour: str, label: str = "") -> None:
    """A line; results that failed their check are hollow points."""
    if points:
        x, y, ok = zip(*points, strict=True)
        axes.plot(x, y, style, color=colour, label=label or None, markersize=4)
        for wrong in (i for i, good in enumerate(ok) if not good):
            axes.plot(x[wrong], y[wrong], style[0], color="white", markeredgecolor=colour, markersize=6)


def _figure(draw: Callable[[Any, str], None]) -> str:
    """Forward and backward side by side, as SVG."""
    with plt.rc_context({"font.size": 9}):
        figure, both = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
        for axes, direction in zip(both, DIRECTIONS, strict=True):
            draw(axes, direction)
            axes.grid(alpha=0.25)
        legend_below(figure)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    """A figure inside the page; it is closed."""
    text = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nsattn"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = text.getvalue()
    return f'<div class="wide">{svg[svg.index("<svg"):]}</div>'


def _table(table: Table, wrap: bool = False) -> str:
    """A table in a box that scrolls. Cells are one line each, with `wrap` several."""
    head, lines = table
    rows = [f"<tr>{''.join(f'<th>{_inline(cell)}</th>' for cell in head)}</tr>"]
    rows += [f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in line)}</tr>" for line in lines]
    start = '<table class="wrap">' if wrap else "<table>"
    return f'<div class="wide">{start}{"".join(rows)}</table></div>'


def _page(sections: list[tuple[str, str]]) -> str:
    names = {title: title.lower().replace(" ", "-") for title, _ in sections}
    links = "\n".join(f'<a href="#{name}">{html.escape(title)}</a>' for title, name in names.items())
    body = "\n".join(
        f'<section id="{names[title]}">\n<h2>{html.escape(title)}</h2>\n{content}\n</section>'
        for title, content in sections
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>nsattn: what was measured</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 70rem; padding: 0 1rem; }}
h1, h2 {{ line-height: 1.2; }}
nav {{ display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }}
.wide {{ overflow-x: auto; }}
.wide > svg {{ background: white; min-width: 54rem; width: 100%; height: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ border: 1px solid #8886; padding: .2rem .6rem; text-align: left; white-space: nowrap; }}
.wrap {{ min-width: 60rem; }}
.wrap th, .wrap td {{ white-space: normal; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #16181d; color: #e4e4e4; }} }}
</style></head><body>
<h1>nsattn: what was measured</h1>
<p>Medians of device times on a cold L2 cache. Compare inside one file: machines differ. The floor counts useful FLOPs
and unique bytes at the rates measured on the chip.</p>
<nav>
{links}
</nav>
{body}
</body></html>
"""
