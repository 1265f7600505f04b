"""select_blocks, Eq 9 and 10, on any GPU: the kernels of `_select_blocks`."""

from __future__ import annotations

from torch import Tensor

from nsattn.kernels import _select_blocks
from nsattn.plan import Plan


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse_cmp: Tensor, plan: Plan, *, scale: float, workspace: int
) -> Tensor:
    """Eq 9, 10. See `nsattn.select_blocks`."""
    return _select_blocks.select_blocks(q, k_cmp, lse_cmp, plan, scale=scale, workspace=workspace)
