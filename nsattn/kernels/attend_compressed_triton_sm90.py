"""attend_compressed, Eq 8, for Hopper: D = Dv = 128, bf16 or fp16.

The forward is that of `_dense_sm90`. The backward of `_dense` takes two passes, seven products for each pair of a
query and a key; that of `_onepass_sm90` takes five, with the gradient kernel of the selected branch. On an H200, one
sequence: 0.53 ms instead of 1.52 at 8K tokens and 32/8 heads, 18.7 instead of 20.8 at 64K, and 37.3 instead of 59.0 at
64/4 (docs/log.md, 2026-11-23).
"""

from __future__ import annotations

from torch import Tensor

from nsattn.kernels import _dense, _dense_sm90, _onepass_sm90
from nsattn.kernels._gradient import Gradient
from nsattn.kernels._gradient_sm90 import aligned, gradient
from nsattn.plan import Plan

BLOCK = 128  # keys that a program holds: half the dQ partials of 64
GRADIENT = Gradient(gradient, parts=1, fewest_pairs=1, rows_per_item=2048)


def attend_compressed(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, plan: Plan, *, scale: float, workspace: int
) -> tuple[Tensor, Tensor]:
    """Eq 8. See `nsattn.attend_compressed`."""
    return _dense_sm90.forward(q, k_cmp, v_cmp, plan, _dense.compressed_keys(plan), scale=scale)


def attend_compressed_bwd(
    do: Tensor, dlse: Tensor | None, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, o: Tensor, lse: Tensor,
    plan: Plan, *, scale: float, workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_compressed` with respect to q, k_cmp, v_cmp."""
    do, q, k_cmp, v_cmp = map(aligned, (do, q, k_cmp, v_cmp))
    config = plan.config
    keys = _onepass_sm90.key_blocks(plan.cu_cmp, plan.total_cmp, BLOCK, stride=config.cmp_stride, span=config.cmp_block)
    return _onepass_sm90.backward(
        do, dlse, q, k_cmp, v_cmp, o, lse, plan, keys, scale=scale, workspace=workspace, kernel=GRADIENT,
        longest=plan.max_cmp,
    )  # fmt: skip
