"""attend_compressed, Eq 8, for Hopper: D = Dv = 128, bf16 or fp16.

The forward is that of `_dense_sm90`, the backward that of `_dense_backward_sm90`. On an H200 they take 4.2
and 12.8 ms at 64K tokens and 32/8 heads (docs/log.md, 2026-11-27), those of `_dense` 5.3 and 20.2 (2026-11-23).
"""

from __future__ import annotations

from torch import Tensor

from nsattn.kernels import _dense, _dense_backward_sm90, _dense_sm90
from nsattn.plan import Plan


def attend_compressed(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, plan: Plan, *, scale: float, workspace: int
) -> tuple[Tensor, Tensor]:
    """Eq 8. See `nsattn.attend_compressed`."""
    return _dense_sm90.forward(q, k_cmp, v_cmp, plan, _dense.compressed_keys(plan), scale=scale)


def attend_compressed_bwd(
    do: Tensor, dlse: Tensor | None, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, o: Tensor, lse: Tensor,
    plan: Plan, *, scale: float, workspace: int, delta: Tensor | None = None, dq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_compressed`. See `attend_compressed_triton`."""
    return _dense_backward_sm90.backward(
        do, dlse, q, k_cmp, v_cmp, o, lse, plan, _dense.compressed_keys(plan), scale=scale, workspace=workspace,
        delta=delta, dq=dq,
    )  # fmt: skip
