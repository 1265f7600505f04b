"""attend_window, section 3.3.3: o_t = softmax(scale * q_t . k_i) v_i over t - w < i <= t.

The kernels are in `_dense`; they need no workspace.
"""

from __future__ import annotations

from torch import Tensor

from nsattn.kernels import _dense
from nsattn.plan import Plan


def attend_window(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, workspace: int
) -> tuple[Tensor, Tensor]:
    """Section 3.3.3. See `nsattn.attend_window`."""
    return _dense.forward(q, k, v, plan, _dense.window_keys(plan), scale=scale)


def attend_window_bwd(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, plan: Plan, *,
    scale: float, workspace: int, delta: Tensor | None = None, dq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_window` with respect to q, k, v.

    Args:
        delta: the `row_delta` of o and do, where it is known; dlse then does not count.
        dq: gradient of q so far, to which this one is added in place, and which is returned.
    """
    return _dense.backward(do, dlse, q, k, v, o, lse, plan, _dense.window_keys(plan), scale=scale, delta=delta, dq=dq)
