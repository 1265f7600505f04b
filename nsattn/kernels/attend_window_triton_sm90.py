"""attend_window, section 3.3.3, for Hopper: D = Dv = 128, bf16 or fp16.

The forward is that of `_dense_sm90`, the backward that of `_dense_backward_sm90`. On an H200 they take
1.8 and 4.1 ms at 64K tokens and 32/8 heads (docs/log.md, 2026-11-27), those of `_dense` 2.0 and 6.1 (2026-11-23). Below
16K host launches count where nothing hides them; it stays, so that results do not depend on the batch.
"""

from __future__ import annotations

from torch import Tensor

from nsattn.kernels import _dense, _dense_backward_sm90, _dense_sm90
from nsattn.plan import Plan


def attend_window(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, workspace: int
) -> tuple[Tensor, Tensor]:
    """Section 3.3.3. See `nsattn.attend_window`."""
    return _dense_sm90.forward(q, k, v, plan, _dense.window_keys(plan), scale=scale)


def attend_window_bwd(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, plan: Plan, *,
    scale: float, workspace: int, delta: Tensor | None = None, dq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_window`. See `attend_window_triton`."""
    return _dense_backward_sm90.backward(
        do, dlse, q, k, v, o, lse, plan, _dense.window_keys(plan), scale=scale, workspace=workspace,
        delta=delta, dq=dq,
    )  # fmt: skip
