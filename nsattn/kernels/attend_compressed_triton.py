"""attend_compressed, Eq 8: o_t = softmax(scale * q_t . k_i) v_i over blocks i with i * d + l - 1 <= t.

The kernels are in `_dense`; they need no workspace.
"""

from __future__ import annotations

from torch import Tensor

from nsattn.kernels import _dense
from nsattn.plan import Plan


def attend_compressed(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, plan: Plan, *, scale: float, workspace: int
) -> tuple[Tensor, Tensor]:
    """Eq 8. See `nsattn.attend_compressed`."""
    return _dense.forward(q, k_cmp, v_cmp, plan, _dense.compressed_keys(plan), scale=scale)


def attend_compressed_bwd(
    do: Tensor, dlse: Tensor | None, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, o: Tensor, lse: Tensor,
    plan: Plan, *, scale: float, workspace: int, delta: Tensor | None = None, dq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_compressed` with respect to q, k_cmp, v_cmp. See `attend_window_triton`."""
    keys = _dense.compressed_keys(plan)
    return _dense.backward(do, dlse, q, k_cmp, v_cmp, o, lse, plan, keys, scale=scale, delta=delta, dq=dq)
