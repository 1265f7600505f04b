"""attend_selected, KV-block-major (see _kvmajor.py), for any GPU: the partial kernel; the gradient is _gradient.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nsattn.kernels import _kvmajor
from nsattn.kernels._gradient import Pair, plain_gradient
from nsattn.kernels._kvmajor import Schedule
from nsattn.kernels._lists import BlockLists, load_item
from nsattn.kernels._tile import LOG2E, bounds, dot, load_rows, next_power_of_2
from nsattn.plan import Plan


def forward_tile(D: int, Dv: int, B: int, element_size: int) -> tuple[int, int, int]:
    """Rows of a tile, warps, stages. Small independent programs hide the latency of the gathers: 64 rows, 4 warps."""
    wide = max(next_power_of_2(D), next_power_of_2(Dv)) > 128
    if element_size > 2:
        return 32, 4, 1
    return 64, 8 if wide and B >= 64 else 4, 1


@triton.jit
def _partial_kernel(
    Q, K, V, TOKENS, ITEMS, CU_Q, CU_K, OP, LSEP, sq_t, sq_h, sk_t, sk_h, sv_t, sv_h, scale,
    D: tl.constexpr, DVAL: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, G: tl.constexpr, B: tl.constexpr,
    BM: tl.constexpr,
):
    """Partial outputs of the rows of one item: softmax over the visible keys of one block (Eq 11, 12)."""
    ACC: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    i_h, i_s, block, first, count, _ = load_item(ITEMS, tl.program_id(0))
    if count == 0:
        return
    start_q, len_q = bounds(CU_Q, i_s)
    start_k, len_k = bounds(CU_K, i_s)
    o_k = block * B + tl.arange(0, B)
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BDV)
    kv_head = i_h.to(tl.int64)
    b_k = load_rows(K + kv_head * sk_h, start_k + o_k, o_d, sk_t, o_k < len_k, D)
    b_v = load_rows(V + kv_head * sv_h, start_k + o_k, o_v, sv_t, o_k < len_k, DVAL)
    for r0 in range(0, count * G, BM):
        # The tail repeats the last row: it writes the same values again, which costs less than masks.
        row = tl.minimum(r0 + tl.arange(0, BM), count * G - 1)
        token = tl.load(TOKENS + first + row // G)
        head = i_h * G + row % G
        # [BM, BD]
        b_q = load_rows(Q, token.to(tl.int64) * sq_t + head * sq_h, o_d, 1, row >= 0, D)
        position = token - start_q.to(tl.int32) + len_k - len_q
        s2 = dot(b_q, tl.trans(b_k)) * (scale * LOG2E)
        s2 = tl.where(o_k[None, :] <= position[:, None], s2, -float("inf"))
        m = tl.max(s2, 1)  # finite: a listed row sees the first key of the block
        p = tl.exp2(s2 - m[:, None])
        l = tl.sum(p, 1)
        o = dot(p.to(b_v.dtype), b_v).to(ACC) / l[:, None]
        out = first * G + row
        tl.store(OP + (out * DVAL)[:, None] + o_v[None, :], o.to(OP.dtype.element_ty), mask=(o_v < DVAL)[None, :])
        tl.store(LSEP + out, m + tl.log2(l))


def partial(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, plan: Plan, scale: float, partials: Tensor, partial_lse: Tensor
) -> None:
    """Write the normalised partial output and base-2 lse of every row of the lists, in list order.

    Args:
        q, k, v: all rows, and the heads of the lists.
        partials: `[pairs * G, Dv]` like q, contiguous.
        partial_lse: `[pairs * G]`, float32 (float64 for float64 inputs).
    """
    D, Dv, B = q.shape[-1], v.shape[-1], plan.config.slc_block
    BM, warps, stages = forward_tile(D, Dv, B, q.element_size())
    _partial_kernel[(lists.items.shape[0],)](
        q, k, v, lists.tokens, lists.items, plan.cu_q, plan.cu_k, partials, partial_lse,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], scale,
        D=D, DVAL=Dv, BD=next_power_of_2(D), BDV=next_power_of_2(Dv), G=q.shape[1] // k.shape[1], B=B, BM=BM,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


SCHEDULE = Schedule(partial, rows_per_item=1024, rows_per_range=32768)


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, block_idx: Tensor, plan: Plan, *, scale: float, workspace: int
) -> tuple[Tensor, Tensor]:
    """Eq 11, 12, KV-block-major. See `nsattn.attend_selected`."""
    return _kvmajor.forward(q, k, v, block_idx, plan, scale=scale, workspace=workspace, schedule=SCHEDULE)


def attend_selected_bwd(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, block_idx: Tensor,
    plan: Plan, *, scale: float, workspace: int, delta: Tensor | None = None, dq: Tensor | None = None,
    dkv: Pair | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_selected` with respect to q, k, v.

    Args:
        delta: the `row_delta` of o and do, where it is known; dlse then does not count.
        dq, dkv: gradients of q, and of k and v, so far, contiguous: these are added in place, and they are returned.
    """
    kernel = plain_gradient(q, v, plan.config.slc_block)
    return _kvmajor.backward(
        do, dlse, q, k, v, o, lse, block_idx, plan, scale=scale, workspace=workspace, kernel=kernel,
        delta=delta, dq=dq, dkv=dkv,
    )  # fmt: skip


def scratch_bytes(q: Tensor, k: Tensor, v: Tensor, N: int, plan: Plan, *, workspace: int, backward: bool) -> int:
    """Peak scratch of `attend_selected` or `attend_selected_bwd`, in bytes; the data of the tensors is not read."""
    kernel = plain_gradient(q, v, plan.config.slc_block)
    return _kvmajor.scratch_bytes(
        q, k, v, N, plan, workspace=workspace, backward=backward, schedule=SCHEDULE, kernel=kernel
    )
