"""The decoding step of `nsattn bench model`: one new token for each of some sequences, through a model's layers.

NSA reads an `NSACache` of fixed size that a prefill in pieces filled, and each step adds a token to it. Dense attention
reads keys and values of fixed length in place: of a stock cache a step would copy all of them, or mask a longer one,
and masks keep SDPA from its fast kernels. Both are CUDA graphs where there is a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nsattn.bench.timing import MOST_CALLS, as_graph, peak_beyond

SEQUENCES = 8
PIECE = 8192  # tokens of a sequence that are prefilled at a time
STEPS = 8 * MOST_CALLS  # room for the tokens of all steps: timing warms up twice, measures twice, and makes a few more


def step(model: Any, kind: str, length: int, like: Tensor) -> tuple[Callable[[], Tensor], float]:
    """(a function that makes one step of `SEQUENCES` sequences of `length` tokens, GiB that it needs meanwhile).

    The function returns the last hidden states.

    Args:
        model: the layers. With `kind` "dense" their attention function is `over_cache`.
        kind: "dense", "none" (no cache is read), or else NSA.
        like: hidden states, whose width, dtype and device are taken.
    """
    x = torch.randn(SEQUENCES, 1, like.shape[-1], device=like.device, dtype=like.dtype) * 0.02
    given: dict[str, Any] = {"use_cache": False, "position_ids": torch.full((1, 1), length - 1, device=like.device)}
    if kind == "dense":
        _fill_dense(model, length, like)
    elif kind != "none":
        given = {"use_cache": True, "past_key_values": _filled(model, length, like)}

    def call() -> Tensor:
        with torch.no_grad():
            return model(inputs_embeds=x, **given).last_hidden_state

    call()
    peak = peak_beyond(call, x.device.type)[1]
    return (as_graph(call) if x.is_cuda else call), peak


def _filled(model: Any, length: int, like: Tensor) -> Any:
    """An `NSACache` of `length` tokens for each sequence, and room for the steps."""
    from nsattn.integrations.transformers import NSACache

    cache = NSACache(model.config, max_length=length + STEPS)
    with torch.no_grad():
        for begin in range(0, length, PIECE):
            size = SEQUENCES, min(PIECE, length - begin), like.shape[-1]
            piece = torch.randn(size, device=like.device, dtype=like.dtype) * 0.02
            model(inputs_embeds=piece, past_key_values=cache, use_cache=True)
    return cache


def _fill_dense(model: Any, length: int, like: Tensor) -> None:
    """Give each layer random keys and values of `length` tokens."""
    for layer in model.layers:
        heads, dim = model.config.num_key_value_heads, layer.self_attn.head_dim
        size = SEQUENCES, heads, length, dim
        layer.self_attn.bench_cache = tuple(torch.randn(size, device=like.device, dtype=like.dtype) for _ in range(2))


def over_cache(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """An attention function for the step: the new keys and values take the last place of the layer's cache."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for kept, new in zip(module.bench_cache, (key, value), strict=True):
        kept[:, :, -1:] = new
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]) if query.is_cuda else contextlib.nullcontext():
        o = F.scaled_dot_product_attention(query, *module.bench_cache, scale=scaling, enable_gqa=True)
    return o.transpose(1, 2), None
