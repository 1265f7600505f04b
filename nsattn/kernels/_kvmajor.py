"""The KV-block-major schedule (Flash Sparse Attention, arXiv 2508.18224) of Eq 11, 12: all but its large kernels.

Outer loop over KV blocks, inner loop over the query rows that chose the block, so tiles are full for any group size.

Forward: a *partial* kernel, one program per item of a block's list, keeps K and V of the block on chip, gathers query
rows and writes, in list order, the normalised partial output (input type) and its base-2 lse (float32) of every row.
*merge*, one warp per few rows, weighs the N partials of a row by exp2(lse_i - lse) and adds them in float32. There is
no statistics pass: partials carry their own lse, as in split-KV decoding. A schedule may take the blocks that many
neighbouring tokens chose out of the lists, and read them query-major: one more partial for all of them together.

Backward: `_gradient.selected_dkv` accumulates dK and dV of a block on chip and writes dQ partials in list order; *sum*
adds the partials of a row. No float atomics: everything repeats bit for bit.

Work is cut by KV heads, then by token rows, so that partials fit the workspace.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsattn.kernels._chunks import Chunk, Size, chunks
from nsattn.kernels._gradient import Gradient, Pair, backward_bytes, selected_dkv
from nsattn.kernels._lists import BlockLists, Cut, Popular, invert, lists_bytes
from nsattn.kernels._tile import cdiv, load_rows, lse_dtype, next_power_of_2, row_delta, softmax_finish, store_rows
from nsattn.plan import Plan


class Dense(NamedTuple):
    """A query-major kernel for popular blocks, and when it pays."""

    attend: Callable[..., None]
    tokens: Callable[[int], int]  # of a program, given the group; 0 where it does not pay
    worth: float  # a block costs a program as much as so many rows of partials, both written and read

    def popular(self, G: int) -> Popular | None:
        tokens = self.tokens(G)
        return Popular(tokens, min(tokens, math.ceil(self.worth / G))) if tokens else None


class Schedule(NamedTuple):
    """A partial kernel and the lists that suit it. Rows are (token, head) pairs."""

    partial: Callable[..., None]
    rows_per_item: int  # long enough to pay for loading K and V, short enough to balance
    rows_per_range: int  # the queries of a token range stay in the L2 cache while all blocks pass by
    dense: Dense | None = None

    def options(self, G: int, part: int) -> tuple[Cut, int, Popular | None]:
        """`cut`, `span` and `popular` of the lists for a part of a group of G. What is popular decides how results are
        rounded, so it does not depend on how a batch is cut."""
        pairs = -(-self.rows_per_item // part)
        return Cut(pairs, pairs), max(1, self.rows_per_range // part), self.dense and self.dense.popular(G)


@triton.jit(do_not_specialize=["row0", "num_rows", "heads", "num_heads"])
def _merge_kernel(
    OP, LSEP, INVERSE, O, LSE, row0, num_rows, heads, num_heads,
    DVAL: tl.constexpr, BDV: tl.constexpr, G: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, UNROLL: tl.constexpr,
    BR: tl.constexpr, MORE: tl.constexpr,
):
    """Output and lse of BR rows (token, head): their N partials weighed by exp2(lse_i - lse) (Eq 11, 12).
    MORE: O and LSE hold one more partial of each row, and its base-2 lse."""
    ACC: tl.constexpr = LSEP.dtype.element_ty
    i_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_row = i_row < num_rows
    token, head = i_row // (heads * G), i_row % (heads * G)
    p_inv = INVERSE + (token * heads + head // G) * N
    o_n, o_v = tl.arange(0, BN), tl.arange(0, BDV)
    # [BR, BN]
    places = tl.load(p_inv[:, None] + o_n[None, :], mask=m_row[:, None] & (o_n < N)[None, :], other=-1)
    lse2 = tl.load(LSEP + (places.to(tl.int64) * G + (head % G)[:, None]), mask=places >= 0, other=-float("inf"))
    m = tl.max(lse2, 1)
    out = (row0 + token) * num_heads + head  # O and LSE begin at the first of the heads and have rows of num_heads
    if MORE:
        more = tl.load(LSE + out, mask=m_row, other=-float("inf"))
        # Whatever is there, where there is none: the gathers below do not wait for `more` then.
        b_more = load_rows(O, out, o_v, DVAL, m_row, DVAL)
        m = tl.maximum(m, more)
    m_ref = tl.where(m == -float("inf"), 0.0, m)
    l = tl.sum(tl.exp2(lse2 - m_ref[:, None]), 1)
    acc = tl.zeros([BR, BDV], ACC)
    if MORE:
        w = tl.exp2(more - m_ref)
        l += w
        acc += w[:, None] * tl.where((more > -float("inf"))[:, None], b_more, 0.0)
    for i in range(0, N, UNROLL):
        for j in tl.static_range(UNROLL):  # places and lse come from the L1 cache here: cheaper than shuffles
            place = tl.load(p_inv + i + j, mask=m_row & (i + j < N), other=-1).to(tl.int64)
            partial = place * G + head % G
            w = tl.exp2(tl.load(LSEP + partial, mask=place >= 0, other=-float("inf")) - m_ref)
            acc += w[:, None] * load_rows(OP, partial, o_v, DVAL, place >= 0, DVAL)
    b_o, lse = softmax_finish(m, l, acc)
    store_rows(O, b_o, out, o_v, DVAL, m_row, DVAL)
    tl.store(LSE + out, lse, mask=m_row)


def merge_rows(width: int) -> int:
    """Rows of one warp: 8 columns a thread, so that a gather of 16-bit partials moves 16 bytes a thread."""
    return max(1, 256 // width)


def merge(
    partials: Tensor, partial_lse: Tensor, inverse: Tensor, o: Tensor, lse: Tensor, chunk: Chunk, *, more: bool
) -> None:
    """Output and lse of the rows of a chunk from their partials; o and lse hold the chunk's heads.

    more: and, before, one more partial of each row, with its lse in base 2.
    """
    N, Dv = inverse.shape[-1], o.shape[-1]
    BDV = next_power_of_2(Dv)
    num_rows, BR = chunk.rows * chunk.heads * chunk.group, merge_rows(BDV)
    _merge_kernel[(cdiv(num_rows, BR),)](
        partials, partial_lse, inverse, o, lse, chunk.row0, num_rows, chunk.heads, lse.stride(0),
        DVAL=Dv, BDV=BDV, G=chunk.group, N=N, BN=next_power_of_2(N, 1), UNROLL=min(N, 16), BR=BR, MORE=more,
        num_warps=1,
    )  # fmt: skip


def forward_size(q: Tensor, v: Tensor, N: int, plan: Plan, schedule: Schedule) -> Size:
    """Scratch of a chunk in the forward: lists, partial outputs and their lse."""
    row, G = v.shape[-1] * q.element_size() + lse_dtype(q).itemsize, q.shape[1] // v.shape[1]

    def size(rows: int, heads: int, group: int) -> int:
        lists, making = lists_bytes(plan, rows, heads, N, *schedule.options(G, group))
        return lists + max(making, rows * heads * N * group * row)

    return size


def scratch_bytes(
    q: Tensor, k: Tensor, v: Tensor, N: int, plan: Plan, *, workspace: int, backward: bool, schedule: Schedule,
    kernel: Gradient,
) -> int:
    """Peak scratch of `attend_selected` or `attend_selected_bwd`, in bytes; the data of the tensors is not read."""
    if backward:
        return backward_bytes(q, k, v, N, plan, kernel, workspace=workspace, with_dq=True)
    Hkv = k.shape[1]
    size = forward_size(q, v, N, plan, schedule)
    pieces = chunks(plan, Hkv, q.shape[1] // Hkv, size, workspace)
    return max((size(c.rows, c.heads, c.group) for c in pieces), default=0)


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_idx: Tensor, plan: Plan, *, scale: float, workspace: int, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """o and lse of the selected branch: partials of a chunk of the batch, then their merge, chunk by chunk."""
    (T, Hq, _), (Hkv, Dv), N = q.shape, v.shape[1:], block_idx.shape[-1]
    G, kind = Hq // Hkv, lse_dtype(q)
    o = torch.empty(T, Hq, Dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(T, Hq, dtype=kind, device=q.device)
    if schedule.dense and schedule.dense.popular(G):
        lse.fill_(-float("inf"))  # rows without popular blocks, those of no sequence too, bring nothing to merge
    for chunk in chunks(plan, Hkv, G, forward_size(q, v, N, plan, schedule), workspace):
        if chunk.part0 == 0:  # the query heads of a group share the lists
            lists = None
            cut, span, popular = schedule.options(G, chunk.group)
            lists = invert(block_idx, plan, chunk, cut=cut, span=span, popular=popular)
            if schedule.dense and popular:  # takes no scratch, so all heads of a group at once
                whole = chunk._replace(part1=G)
                schedule.dense.attend(
                    whole.of_queries(q, G), whole.of_keys(k), whole.of_keys(v), lists.popular, plan, whole, scale,
                    whole.of_queries(o, G), whole.of_queries(lse, G),
                )  # fmt: skip
        rows = chunk.rows * chunk.heads * N * chunk.group
        partials = torch.empty(rows, Dv, dtype=q.dtype, device=q.device)
        partial_lse = torch.empty(rows, dtype=kind, device=q.device)
        q_part, o_part, lse_part = (chunk.of_queries(x, G) for x in (q, o, lse))
        schedule.partial(q_part, chunk.of_keys(k), chunk.of_keys(v), lists, plan, scale, partials, partial_lse)
        merge(partials, partial_lse, lists.inverse, o_part, lse_part, chunk, more=lists.popular is not None)
        del partials, partial_lse  # before the next chunk allocates its own
    return o, lse


@triton.jit(do_not_specialize=["row0", "num_rows", "heads", "num_heads"])
def _sum_dq_kernel(
    DQP, INVERSE, DQ, row0, num_rows, heads, num_heads,
    D: tl.constexpr, BD: tl.constexpr, G: tl.constexpr, N: tl.constexpr, SUBS: tl.constexpr, UNROLL: tl.constexpr,
    BR: tl.constexpr, ADD: tl.constexpr,
):
    """dQ of BR rows (token, head): the sum of their partials, slot by slot, in float32. ADD: and what DQ holds."""
    ACC: tl.constexpr = tl.float64 if DQP.dtype.element_ty == tl.float64 else tl.float32
    i_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_row = i_row < num_rows
    token, head = i_row // (heads * G), i_row % (heads * G)
    o_d = tl.arange(0, BD)
    p_dq = DQ + (((row0 + token) * num_heads + head) * D)[:, None] + o_d[None, :]
    m_dq = m_row[:, None] & (o_d < D)[None, :]
    acc = tl.zeros([BR, BD], ACC)
    if ADD:
        acc += tl.load(p_dq, mask=m_dq, other=0.0).to(ACC)
    p_inv = INVERSE + (token * heads + head // G) * N
    for i in range(0, N, UNROLL):
        for j in tl.static_range(UNROLL):
            place = tl.load(p_inv + i + j, mask=m_row & (i + j < N), other=-1).to(tl.int64)
            m = (place >= 0)[:, None] & (o_d < D)[None, :]
            for i_sub in range(SUBS):
                p = DQP + (((place * G + head % G) * SUBS + i_sub) * D)[:, None] + o_d[None, :]
                acc += tl.load(p, mask=m, other=0.0).to(ACC)
    tl.store(p_dq, acc.to(DQ.dtype.element_ty), mask=m_dq)


def backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, block_idx: Tensor,
    plan: Plan, *, scale: float, workspace: int, kernel: Gradient, delta: Tensor | None, dq: Tensor | None,
    dkv: Pair | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of the selected branch. See `attend_selected_kvmajor.attend_selected_bwd`."""
    (T, Hq, D), N = q.shape, block_idx.shape[-1]
    G = Hq // k.shape[1]
    add = dq is not None
    dq = torch.empty(T, Hq, D, dtype=q.dtype, device=q.device) if dq is None else dq
    BD = next_power_of_2(D)
    BR = max(1, 1024 // BD)  # 1024 accumulators, and N gathers of a row in flight

    def sum_dq(chunk: Chunk, lists: BlockLists, partials: Tensor) -> None:
        num_rows = chunk.rows * chunk.heads * chunk.group
        _sum_dq_kernel[(cdiv(num_rows, BR),)](
            partials, lists.inverse, chunk.of_queries(dq, G), chunk.row0, num_rows, chunk.heads, Hq,
            D=D, BD=BD, G=chunk.group, N=N, SUBS=kernel.parts, UNROLL=min(N, 16) if kernel.parts == 1 else 1, BR=BR,
            ADD=add, num_warps=2,
        )  # fmt: skip

    delta = row_delta(o, do, dlse) if delta is None else delta
    dk, dv = selected_dkv(
        do, q, k, v, lse, delta, block_idx, plan, scale=scale, workspace=workspace, kernel=kernel, take_dq=sum_dq,
        into=dkv,
    )
    return dq, dk, dv
