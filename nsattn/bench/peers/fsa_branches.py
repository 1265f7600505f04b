"""The other branches of the official Flash Sparse Attention, by themselves, for `nsattn bench attention` and `model`.

`fsa` and `nsa_ref` of that repository differ in the selected branch alone; what is here serves both and is named fsa.
Its modules take the window from the flash-attn package. Here that is the FlashAttention-2 which torch brings, with a
window of w - 1 keys before the query, so that w keys are seen as in NSA; as published it would be w + 1.

Its selection reads the compressed attention's own sums and is no function that can be called by itself. What can be
timed is both together, forward; the selection is the difference. As published it scores with the first query head of a
group instead of all of them, so its result is right for groups of one only.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nsattn
from nsattn.bench.peers import Call, fsa, import_from
from nsattn.plan import Plan

MODULE = "nsa_ref.ops.compressed_attention"
BOTH = "attend_compressed+select_blocks"  # the operation that a row of both together names


def load(folder: Path) -> str:
    """Import it. Raises `Missing` as `fsa.load`."""
    import_from(folder / fsa.FOLDER, MODULE, fsa.URL)
    return "as published"


def compressed(plan: Plan) -> Call:
    """Attention to compressed keys: a function (q, k_cmp, v_cmp) -> o."""
    attend, config = import_module(MODULE).CompressedAttention.apply, plan.config
    sizes = config.cmp_block, config.cmp_stride, plan.cu_q, plan.cu_cmp, plan.max_q, plan.max_cmp
    return lambda q, k, v: attend(q, k, v, *sizes, q.shape[-1] ** -0.5)[0]


def compressed_and_selection(plan: Plan) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The same with the selection after it: a function (q, k_cmp, v_cmp) -> (o, block_idx `[T, Hkv, N]`)."""
    attend, config = import_module(MODULE).compressed_attention, plan.config
    sizes = (
        config.cmp_block, config.cmp_stride, config.slc_block, config.num_selected, plan.cu_q, plan.cu_cmp, plan.max_q,
        plan.max_cmp,
    )  # fmt: skip
    forced = {"init_blocks": config.init_blocks, "local_blocks": config.local_blocks}

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        # False is what their modules pass: one KV head after the other.
        o, chosen = attend(q, k, v, *sizes, q.shape[-1] ** -0.5, **forced, parallel_topk_compute=False)
        return o, chosen.transpose(0, 1)

    return call


def selection(plan: Plan) -> Call:
    """The same, which gives the selection alone: a function (q, k_cmp, v_cmp) -> block_idx `[T, Hkv, N]`."""
    both = compressed_and_selection(plan)
    return lambda q, k, v: both(q, k, v)[1]


def window(plan: Plan) -> Call:
    """Attention to the last w tokens: a function (q, k, v) -> o."""
    attend, left = torch.ops.aten._flash_attention_forward, plan.config.window - 1
    sizes = plan.cu_q, plan.cu_k, plan.max_q, plan.max_k, 0.0, True, False
    return lambda q, k, v: attend(
        q, k, v, *sizes, scale=q.shape[-1] ** -0.5, window_size_left=left, window_size_right=0
    )[0]


def whole(attend_selected: Any, plan: Plan) -> Callable[..., tuple[Tensor, Tensor]]:
    """NSA of their kernels, and our gates: a function (q, k, v, k_cmp, v_cmp, gates) -> (o, block_idx `[T, Hkv, N]`).

    Args:
        attend_selected: what `selected` of `fsa` or `nsa_ref` returns.
        plan: of sequences that are queries and keys alike.
    """
    first, last, block = compressed_and_selection(plan), window(plan), plan.config.slc_block
    lengths = plan.cu_q, plan.cu_q, plan.max_q, plan.max_q

    def call(q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        o_cmp, block_idx = first(q, k_cmp, v_cmp)
        index = block_idx.transpose(0, 1).contiguous()
        o_slc = attend_selected(q, k, v, index, block, *lengths, q.shape[-1] ** -0.5)
        return nsattn.combine(o_cmp, o_slc, last(q, k, v), gates), block_idx

    return call
