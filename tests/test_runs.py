"""dK and dV of the dense branches over lists of runs, against the reference: the plain gradient kernel, interpreted."""

from __future__ import annotations

import pytest
import torch

from nsattn import NSAConfig
from nsattn.kernels import _runs_sm90, reference
from nsattn.kernels._chunks import Chunk
from nsattn.kernels._gradient import KeyBlocks, plain_gradient
from nsattn.kernels._lists import Cut
from nsattn.kernels._tile import row_delta
from nsattn.plan import cumulative
from nsattn.testing import assert_close, make_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = NSAConfig(8, 4, 16, 4, 20)
BATCHES = [((7, 0, 1, 65), None), ((5, 20), (40, 20)), ((30, 8), (11, 0)), ((0, 0), None)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for the interpreter; test_kernels runs the kernels on a GPU")
@pytest.mark.parametrize(("lengths", "lengths_k"), BATCHES)
@pytest.mark.parametrize(
    ("branch", "workspace", "B", "rows_per_item"),
    [
        ("compressed", 1 << 30, 32, 32), ("compressed", 1 << 14, 16, 16384), ("compressed", 1 << 14, 16, 8),
        ("window", 1 << 14, 32, 16384), ("window", 1 << 30, 16, 16),
    ],
)
def test_gradients(branch, lengths, lengths_k, workspace, B, rows_per_item):
    x = make_inputs(lengths, lengths_k=lengths_k, num_kv_heads=2, group=48 // B, head_dim=16, config=CONFIG, slack=2)
    plan, compressed = x.plan, branch == "compressed"
    k, v = (x.k_cmp, x.v_cmp) if compressed else (x.k_win, x.v_win)
    operation = reference.attend_compressed if compressed else reference.attend_window

    def run(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x.q, k, v)]
        o, lse = operation(*leaves, plan, scale=x.scale)
        generator = torch.Generator().manual_seed(0)
        do, dlse = (torch.randn(y.shape, generator=generator).to(dtype) for y in (o, lse))
        dlse = torch.where(lse.isfinite(), dlse, 0)
        loss = (o * do).sum() + (torch.where(lse.isfinite(), lse, 0) * dlse).sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        return o, lse, do, dlse, [torch.zeros_like(a) if g is None else g for a, g in zip(leaves, grads, strict=True)]

    golden = run(torch.float64)[-1]
    o, lse, do, dlse, low = run(torch.float32)
    cu, rule = (plan.cu_cmp, {"stride": 4, "span": 8}) if compressed else (plan.cu_k, {"window": 20})
    blocks = (cu.diff() + B - 1) // B
    keys = KeyBlocks(cu, cumulative(blocks), int(blocks.sum()) + 2, B, **rule)  # the number is an upper bound
    delta = row_delta(o.detach(), do, dlse)

    def cut(G):
        return Cut(-(-rows_per_item // G), -(-rows_per_item // (2 * G)), short=25)

    got = _runs_sm90.key_gradients(
        do, x.q, k, v, lse.detach(), delta, plan, keys, scale=x.scale, workspace=workspace,
        kernel=plain_gradient(x.q, v, B)._replace(cut=cut),
    )
    for name, *tensors in zip(("dk", "dv"), got, golden[1:], low[1:], strict=True):
        assert_close(*tensors, name)


@pytest.mark.parametrize("bound", [16, 64, 200])
def test_a_bound_that_is_too_low_leaves_rows_out(bound):
    """`max_seqlen` below a sequence of 700 tokens: slices lie in the scratch that there is room for."""
    plan = make_inputs((700, 30), num_kv_heads=2, config=CONFIG, device=DEVICE).plan._replace(max_q=bound)
    keys = KeyBlocks(plan.cu_cmp, cumulative((plan.cu_cmp.diff() + 15) // 16), 12, 16, stride=4, span=8)
    lists = _runs_sm90.runs(plan, keys, Chunk(0, plan.total_q, 0, 2, 0, 1), cut=Cut(32, 32))
    slots, used = lists.items[:, 5], lists.slices[lists.slices[:, 1] > lists.slices[:, 0]]
    assert slots.max() < lists.num_slices or slots.max() == -1
    assert (used <= lists.num_slices).all() and (len(used) > 0) == (slots.max() >= 0) == (lists.num_slices > 0)
    assert lists.items[:, 4].max() == 32
