"""Activation checkpointing: the same gradients, and what is kept is not computed again."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import nsattn
from nsattn import dispatch

GPU = torch.cuda.is_available()
OPERATIONS = ("compress", "attend_compressed", "select_blocks", "attend_selected", "attend_window", "combine")


@pytest.mark.parametrize("save", ["nothing", "selection", "attention"])
def test_gradients_are_the_same_and_kept_results_are_not_made_again(save, monkeypatch):
    device, dtype, dim, T = ("cuda", torch.bfloat16, 64, 300) if GPU else ("cpu", torch.float32, 16, 40)
    config = nsattn.NSAConfig() if GPU else nsattn.NSAConfig(8, 4, 16, 2, 12, 1, 1)
    torch.manual_seed(0)
    layer = nsattn.NSAttention(64, 2, 1, dim, config=config, device=device, dtype=dtype, impl="qmajor")
    x = torch.randn(1, T, 64, device=device, dtype=dtype, requires_grad=True)
    calls = {operation: 0 for operation in OPERATIONS}
    for operation in OPERATIONS:
        module = dispatch.load(operation, "qmajor" if operation == "attend_selected" else "triton")

        function = getattr(module, operation)

        def counted(*args, _function=function, _name=operation, **kwargs):
            calls[_name] += 1
            return _function(*args, **kwargs)

        monkeypatch.setattr(module, operation, counted)

    def gradients(run):
        y = run(layer, x)
        return torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])

    want = gradients(lambda layer, x: layer(x))
    once = dict(calls)
    calls.update(dict.fromkeys(calls, 0))
    options = {}
    if save != "nothing":
        options["context_fn"] = functools.partial(nsattn.checkpoint_contexts, save)
    got = gradients(lambda layer, x: checkpoint(layer, x, use_reentrant=False, **options))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    kept = {"nothing": (), "selection": ("select_blocks",), "attention": OPERATIONS}[save]
    assert calls == {name: count * (1 if name in kept else 2) for name, count in once.items()}


def test_refusal():
    with pytest.raises(ValueError, match="save must be 'selection' or 'attention', got 'all'"):
        nsattn.checkpoint_contexts("all")
