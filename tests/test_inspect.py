"""`nsattn inspect`: what its pictures and its page say is what the model did."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from test_train import MODEL, NSA, RunConfig, finished, text  # noqa: F401  fixtures
from typer.testing import CliRunner

from nsattn import cli
from nsattn.train.checkpoint import load_checkpoint, restore
from nsattn.train.inspect import inspect, look, shared_with_neighbour
from nsattn.train.loop import CHECKPOINT
from nsattn.train.model import ByteLM
from nsattn.train.selection import record


def test_numbers_are_the_models(finished, text, tmp_path):  # noqa: F811
    """Selections and gates of the page against the layers called one by one."""
    view = look(finished, text=text, length=100, device="cpu", impl="reference")
    model = ByteLM(MODEL, impl="reference")
    restore(load_checkpoint(finished / CHECKPOINT), finished / CHECKPOINT, model)
    x = model.embedding(torch.tensor(list(text.read_bytes()[:100]))[None])
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            gates = block.attention.gate_proj(block.attention_norm(x))[0].sigmoid().unflatten(-1, (-1, 3))
            torch.testing.assert_close(view.gates[layer], gates)
            x, selection = block(x, return_selection=True)
            assert torch.equal(view.selections[layer], selection)
    assert view.config == NSA and view.selections.shape == (2, 100, 1, 3)


def test_pictures_and_page(finished, text, tmp_path):  # noqa: F811
    files = inspect(finished, tmp_path / "out", text=text, length=0, device="cpu", impl="reference")
    assert [path.name for path in files] == ["selection.png", "gates.png", "index.html"]
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000 for path in files[:2])
    page = files[2].read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page  # nothing is fetched
    assert len(re.findall("<tr>", page)) == 1 + MODEL.layers * MODEL.num_kv_heads
    assert "64 bytes of text.py" in page


def test_recorded_selections(finished, tmp_path):  # noqa: F811
    recording = tmp_path / "selection.safetensors"
    record(finished, [64, 96], recording, device="cpu", impl="reference")
    view = look(recording, text=None, length=96, device="cpu", impl="auto")
    assert view.gates is None and view.selections.shape == (2, 96, 1, 3)
    result = CliRunner().invoke(cli.app, ["inspect", str(recording), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0 and "index.html" in result.output
    assert "64 bytes of" in (tmp_path / "out" / "index.html").read_text()
    with pytest.raises(ValueError, match="has lengths 64, 96, got 70"):
        look(recording, text=None, length=70, device="cpu", impl="auto")
    with pytest.raises(ValueError, match="is a recording, which has its own text"):
        look(recording, text=Path("a"), length=0, device="cpu", impl="auto")


def test_shared_blocks_are_counted():
    a = torch.tensor([[0, 1, 4], [0, 2, 4], [4, 2, 0], [0, -1, -1]]).view(1, 4, 1, 3)
    assert shared_with_neighbour(a).item() == pytest.approx((2 + 3 + 1) / 7)


def test_refusals(finished, text, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "short").write_bytes(b"a")
    with pytest.raises(ValueError, match="must hold at least 2 bytes, got 1"):
        look(finished, text=tmp_path / "short", length=0, device="cpu", impl="auto")
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4, "SC_PHYS_PAGES": 4 * 2 * 96**2}.get)  # four matrices of 96
    with pytest.raises(ValueError, match="NSA at 1 sequences of 97 bytes needs"):
        look(finished, text=text, length=97, device="cpu", impl="auto")
    result = CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "nothing")])
    assert result.exit_code == 2 and "error: " in result.output
