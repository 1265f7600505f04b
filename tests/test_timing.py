"""How times are taken: CUDA graphs of calls, and their rows. What benches do with them is in test_bench.py."""

from __future__ import annotations

import contextlib
import gc
import weakref
from dataclasses import replace

import pytest
import torch

from nsattn.bench.timing import Row, as_graph, captured, without_host

ROW = Row("nsattn", "attend_selected", "auto", 65536, 16, 4, 128, 128, 64, 16, "random", "forward", 2.0, 1.9, 2.1, 0.5,
          1.0, True, "abc", set="target")  # fmt: skip


def test_what_kernels_take_without_their_host():
    theirs = replace(ROW, who="fsa", ms=5.0)
    rows = [replace(ROW, ms=3.0), replace(ROW, impl="auto graph"), theirs]
    assert without_host(rows) == [ROW, theirs]


def test_a_graph_holds_what_it_reads(monkeypatch):
    """A CUDA graph has addresses only: what the captured call uses must live as long as its replay."""

    class Graph:
        def replay(self):
            pass

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: contextlib.nullcontext())
    weight = torch.ones(3)
    seen = weakref.ref(weight)
    replay = as_graph(lambda weight=weight: weight * 2)
    del weight
    gc.collect()
    assert seen() is not None and replay().tolist() == [2.0] * 3
    del replay
    gc.collect()
    assert seen() is None


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [True, False])
def test_graphs_give_what_their_calls_give(backward):
    x = torch.randn(1000, device="cuda", requires_grad=True)
    written = torch.zeros(1000, device="cuda")

    def call(x):
        y = x.square()
        written.copy_(y.detach())
        return y

    dy = torch.ones(1000, device="cuda") if backward else None
    replays = captured(call, (x,), dy)
    assert len(replays) == 1 + backward
    written.zero_()
    for replay in replays:
        replay()
    torch.testing.assert_close(written, x.detach().square())
    torch.testing.assert_close(as_graph(lambda: call(x))(), x.square())
