"""`nsattn inspect`: which blocks a model selects on a text, and how much weight each branch gets, as PNG and HTML."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsattn.config import NSAConfig
from nsattn.train.checkpoint import load_checkpoint, restore, write_atomically
from nsattn.train.data import load_corpus
from nsattn.train.loop import CHECKPOINT, check_memory, choose_device, precision
from nsattn.train.model import ByteLM
from nsattn.train.pictures import draw_gates, draw_selection
from nsattn.train.presets import RunConfig
from nsattn.train.selection import load_selection

BRANCHES = ("compressed", "selected", "window")


@dataclass(frozen=True)
class View:
    """What is shown."""

    source: str  # the model or recording, and the text
    config: NSAConfig
    selections: Tensor  # int32 [layers, T, Hkv, N]
    gates: Tensor | None  # float32 [layers, T, Hq, 3], of compressed, selected, window; None for a recording


def inspect(source: Path, out: Path, *, text: Path | None, length: int, device: str, impl: str) -> list[Path]:
    """Draw what `source` selects.

    Args:
        source: a run folder of `nsattn train`, or a file of `nsattn record-selection`.
        out: folder to write to; made if it is missing, older files of the same names are replaced.
        text: what the model reads. Default: the start of the held-out part of its corpus.
        length: bytes to read at most; for a recording, the length to show, where 0 means its first.
        device, impl: as for training.

    Returns:
        The files written.

    Raises:
        ValueError: nothing to read, full attention, too little text, more than fits on a CPU.
    """
    view = look(source, text=text, length=length, device=device, impl=impl)
    out.mkdir(parents=True, exist_ok=True)
    pictures = [out / "selection.png"]
    draw_selection(view.selections, view.config, pictures[0])
    if view.gates is not None:
        pictures.append(out / "gates.png")
        draw_gates(view.gates, pictures[1])
    page = out / "index.html"
    write_atomically(page, lambda path: path.write_text(render(view, pictures), encoding="utf-8"))
    return [*pictures, page]


def look(source: Path, *, text: Path | None, length: int, device: str, impl: str) -> View:
    """What `inspect` shows."""
    if not source.is_dir():
        if text is not None:
            raise ValueError(f"{source} is a recording, which has its own text; got --text {text}. Leave it out.")
        by_length, info = load_selection(source)
        length = length or info["lengths"][0]
        if length not in by_length:
            raise ValueError(f"{source} has lengths {', '.join(map(str, by_length))}, got {length}. Choose one.")
        config = NSAConfig(**info["run"]["model"]["nsa"])
        return View(f"{source.name}, {length} bytes of {info['text']['name']}", config, by_length[length], None)
    saved = load_checkpoint(source / CHECKPOINT)
    run = RunConfig.from_dict(saved.info["run"])
    if run.model.attention != "nsa":
        raise ValueError(f"{source} was trained with full attention, which selects no blocks. Give one with nsa.")
    length = length or run.seq_len
    if text is None:
        corpus = load_corpus(run.data)
        name, data = f"the held-out part of {corpus.name}", corpus.held_out[:length]
    else:
        name, data = text.name, torch.tensor(list(text.read_bytes()[:length]), dtype=torch.uint8)
    if len(data) < 2:
        raise ValueError(f"{name} must hold at least 2 bytes, got {len(data)}. Give a longer text.")
    place = choose_device(device)
    check_memory(run.model, place, 1, len(data), backward=False)
    model = ByteLM(run.model, impl=impl).to(place)
    restore(saved, source / CHECKPOINT, model)
    selections, gates = run_model(model, data[None].to(place), place)
    what = f"{source.name} after {saved.info['step']} steps, {len(data)} bytes of {name}"
    return View(what, run.model.nsa, selections, gates)


@torch.no_grad()
def run_model(model: ByteLM, tokens: Tensor, place: torch.device) -> tuple[Tensor, Tensor]:
    """Selections int32 `[layers, T, Hkv, N]` and gates float32 `[layers, T, Hq, 3]` for tokens `[1, T]`, on the CPU."""
    gates: list[Tensor] = []

    def keep(module: Any, args: Any, y: Tensor) -> None:
        gates.append(y.float().sigmoid().cpu())

    projections = [module for name, module in model.named_modules() if name.endswith("gate_proj")]
    hooks = [module.register_forward_hook(keep) for module in projections]
    try:
        with precision(place):
            selections = model.selections(tokens).cpu()
    finally:
        for hook in hooks:
            hook.remove()
    return selections, torch.stack(gates).unflatten(-1, (-1, 3))


def shared_with_neighbour(selections: Tensor) -> Tensor:
    """Share of the tokens' blocks that the token before selected too, `[layers, Hkv]`.

    Args:
        selections: int `[layers, T, Hkv, N]`, unused slots -1.
    """
    here, before = selections[:, 1:], selections[:, :-1]
    both = ((here[..., :, None] == before[..., None, :]) & (here[..., :, None] >= 0)).sum((-1, -2, 1))
    return both / (here >= 0).sum((-1, 1)).clamp_min(1)


def render(view: View, pictures: list[Path]) -> str:
    """The page: pictures inside, and a table of numbers for every layer and KV head."""
    shared = shared_with_neighbour(view.selections)
    mass = None if view.gates is None else view.gates.mean((1, 2))  # [layers, 3]
    head = ["layer", "KV head", "blocks shared with the token before"]
    head += [] if mass is None else [f"mean gate, {branch}" for branch in BRANCHES]
    rows: list[list[Any]] = []
    for layer, heads in enumerate(shared.tolist()):
        for i, value in enumerate(heads):
            gates = [] if mass is None else [f"{g:.3f}" for g in mass[layer].tolist()]
            rows.append([layer, i, f"{value:.1%}", *gates])
    table = "\n".join(
        f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in row)}</tr>"
        for tag, row in (("th", head), *(("td", row) for row in rows))
    )
    images = "\n".join(
        f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in pictures
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>nsattn inspect</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 70rem; padding: 0 1rem; }}
img {{ max-width: 100%; background: white; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ border: 1px solid #8888; padding: .2rem .6rem; text-align: right; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #16181d; color: #e4e4e4; }} }}
</style></head><body>
<h1>Which blocks are selected</h1>
<p>{html.escape(view.source)}. Blocks of {view.config.slc_block} bytes, {view.config.num_selected} for each token.</p>
{images}
<div><table>
{table}
</table></div>
</body></html>
"""
