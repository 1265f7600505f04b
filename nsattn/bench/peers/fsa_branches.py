"""The other branches of the official Flash Sparse Attention, by themselves, for `nsattn bench attention --peers DIR`.

`fsa` and `nsa_ref` of that repository differ in the selected branch alone; what is here serves both and is named fsa.
Its modules take the window from the flash-attn package. Here that is the FlashAttention-2 which torch brings, with a
window of w - 1 keys before the query, so that w keys are seen as in NSA; as published it would be w + 1.

Its selection reads the compressed attention's own sums and is no function that can be called by itself. What can be
timed is both together, forward; the selection is the difference. As published it scores with the first query head of a
group instead of all of them, so its result is right for groups of one only.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

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


def compressed_and_selection(plan: Plan) -> Call:
    """The same with the selection after it: a function (q, k_cmp, v_cmp) -> block_idx `[T, Hkv, N]`."""
    attend, config = import_module(MODULE).compressed_attention, plan.config
    sizes = (
        config.cmp_block, config.cmp_stride, config.slc_block, config.num_selected, plan.cu_q, plan.cu_cmp, plan.max_q,
        plan.max_cmp,
    )  # fmt: skip
    forced = {"init_blocks": config.init_blocks, "local_blocks": config.local_blocks}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # False is what their modules pass: one KV head after the other.
        chosen = attend(q, k, v, *sizes, q.shape[-1] ** -0.5, **forced, parallel_topk_compute=False)[1]
        return chosen.transpose(0, 1)

    return call


def window(plan: Plan) -> Call:
    """Attention to the last w tokens: a function (q, k, v) -> o."""
    attend, left = torch.ops.aten._flash_attention_forward, plan.config.window - 1
    sizes = plan.cu_q, plan.cu_k, plan.max_q, plan.max_k, 0.0, True, False
    return lambda q, k, v: attend(
        q, k, v, *sizes, scale=q.shape[-1] ** -0.5, window_size_left=left, window_size_right=0
    )[0]
