"""Gradients of keys and values by blocks of keys, and dQ partials: Eq 11, 12 in both schedules, Eq 8 and the window.

One pass over the block lists: a program holds K and V of a block on chip, gathers the query rows of an item and
accumulates dK and dV; on the way it can write the dQ partial of every row. A block whose list is cut into several items
gets its sum from float32 slices, added in their order: no atomics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsattn.kernels._chunks import Chunk, Size, chunks
from nsattn.kernels._lists import BlockLists, Cut, invert, lists_bytes, load_item
from nsattn.kernels._tile import (
    LOG2E,
    UNLIMITED,
    bounds,
    delta_bytes,
    dot,
    last_at_most,
    load_rows,
    lse_dtype,
    next_power_of_2,
    shared_memory,
)
from nsattn.plan import Plan


class KeyBlocks(NamedTuple):
    """The keys of a branch, cut into blocks, and who sees them.

    Key i of a sequence ends at e(i) = i * stride + span - 1; the query at t sees it iff t - window < e(i) <= t.
    """

    cu: Tensor  # [n + 1] first key row of each sequence
    cu_blk: Tensor  # [n + 1] first block of each sequence
    total_blk: int  # blocks over all sequences, an upper bound
    size: int  # keys of a block
    stride: int = 1
    span: int = 1
    window: int = UNLIMITED


def token_blocks(plan: Plan) -> KeyBlocks:
    """The selection blocks."""
    return KeyBlocks(plan.cu_k, plan.cu_blk, plan.total_blk, plan.config.slc_block)


def gradient_tile(q: Tensor, v: Tensor, B: int) -> tuple[int, int, int, int]:
    """Rows of a tile, keys of a sub-block, warps, stages of the gradient kernel: the first that fits the chip.

    dK^T and dV^T of a sub-block live in registers, (BD + BDV) * BK floats, beside dQ of a tile, BM * BD. At D = 128 a
    study on the H200 found 128 rows, 64 keys, 8 warps, 2 stages best without spills; wider heads take fewer of both.
    """
    BD, BDV = next_power_of_2(q.shape[-1]), next_power_of_2(v.shape[-1])
    size = q.element_size()
    if size > 2:
        tiles = [(32, 32, 4, 1), (16, 16, 4, 1)]
    elif max(BD, BDV) <= 64:
        tiles = [(64, 64, 4, 2), (64, 32, 4, 1)]
    elif max(BD, BDV) <= 128:
        tiles = [(128, 64, 8, 2), (128, 64, 8, 1), (64, 32, 8, 1)]
    else:
        tiles = [(64, 32, 8, 2), (64, 16, 8, 1), (32, 16, 8, 1)]
    tiles = [(BM, min(B, BK), warps, stages) for BM, BK, warps, stages in tiles]
    limit = shared_memory(q.device) - 2048

    def fits(BM: int, BK: int, warps: int, stages: int) -> bool:
        return size * ((BM * stages + BK) * (BD + BDV) + 2 * BM * BK) <= limit

    return next((tile for tile in tiles if fits(*tile)), tiles[-1])


@triton.jit
def store_sum(p, p_rest, x, m, ADD: tl.constexpr):
    """Store x, with ADD after adding what is there; with p_rest, also what rounding takes off, so that sums go on as
    if they had not been rounded. What was rounded to infinity stays there."""
    if ADD:
        x += tl.load(p, mask=m, other=0.0)
    if p_rest is not None:
        x += tl.load(p_rest, mask=m, other=0.0)
    y = x.to(p.dtype.element_ty)
    tl.store(p, y, mask=m)
    if p_rest is not None:
        rest = (x - y.to(x.dtype)).to(p_rest.dtype.element_ty)
        tl.store(p_rest, tl.where(tl.abs(rest) < float("inf"), rest, 0.0), mask=m)


@triton.jit(do_not_specialize=["num_heads"])
def _gradient_kernel(
    Q, K, V, DO, LSE, DELTA, TOKENS, ITEMS, CU_Q, CU_K, CU_KEYS, DQP, DK, DV, REST, SLICES,
    sq_t, sq_h, sk_t, sk_h, sv_t, sv_h, sdk_t, sdk_h, sdv_t, sdv_h, num_heads, scale,
    D: tl.constexpr, DVAL: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, G: tl.constexpr, B: tl.constexpr,
    STRIDE: tl.constexpr, SPAN: tl.constexpr, WINDOW: tl.constexpr,
    BK: tl.constexpr, BM: tl.constexpr, WITH_DQ: tl.constexpr, ADD: tl.constexpr,
):
    """dK, dV of BK keys of a block over one item of its list, and with WITH_DQ the dQ partial of every row (Eq 11, 12).

    Scores are kept as [rows, keys] and dK, dV as their transposes, so that no product takes a transposed accumulator.
    """
    ACC: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    SUBS: tl.constexpr = B // BK
    i_item, i_sub = tl.program_id(0) // SUBS, tl.program_id(0) % SUBS
    i_h, i_s, block, first, count, slot = load_item(ITEMS, i_item)
    if count == 0:
        return
    start_q, len_q = bounds(CU_Q, i_s)
    start_k, len_keys = bounds(CU_KEYS, i_s)
    _, len_k = bounds(CU_K, i_s)
    o_k = block * B + i_sub * BK + tl.arange(0, BK)
    m_k = o_k < len_keys
    end = o_k * STRIDE + SPAN - 1
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BDV)
    kv_head = i_h.to(tl.int64)
    b_k = load_rows(K + kv_head * sk_h, start_k + o_k, o_d, sk_t, m_k, D)
    b_v = load_rows(V + kv_head * sv_h, start_k + o_k, o_v, sv_t, m_k, DVAL)
    b_dk = tl.zeros([BD, BK], ACC)
    b_dv = tl.zeros([BDV, BK], ACC)
    for r0 in range(0, count * G, BM):
        row = r0 + tl.arange(0, BM)
        m_r = row < count * G
        row = tl.minimum(row, count * G - 1)  # the tail repeats the last row instead of masking every load
        if TOKENS is None:
            token = first.to(tl.int32) + row // G
        else:
            token = tl.load(TOKENS + first + row // G)
        head = i_h * G + row % G
        wide = token.to(tl.int64)
        # [BM, BD], [BM, BDV]
        b_q = load_rows(Q, wide * sq_t + head * sq_h, o_d, 1, row >= 0, D)
        b_do = load_rows(DO, (wide * num_heads + head) * DVAL, o_v, 1, row >= 0, DVAL)
        lse2 = tl.load(LSE + wide * num_heads + head) * LOG2E
        delta = tl.load(DELTA + wide * num_heads + head)
        position = token - start_q.to(tl.int32) + len_k - len_q
        s2 = dot(b_q, tl.trans(b_k)) * (scale * LOG2E)
        visible = (end[None, :] <= position[:, None]) & m_r[:, None]
        if WINDOW is not None:
            visible &= end[None, :] > position[:, None] - WINDOW
        p = tl.where(visible, tl.exp2(s2 - lse2[:, None]), 0.0)
        dp = dot(b_do, tl.trans(b_v))
        ds = (p * (dp - delta[:, None]) * scale).to(b_q.dtype)
        b_dv += dot(tl.trans(b_do), p.to(b_do.dtype))
        b_dk += dot(tl.trans(b_q), ds)
        if WITH_DQ:
            o_p = ((first * G + row) * SUBS + i_sub) * D
            dq = dot(ds, b_k)
            tl.store(DQP + o_p[:, None] + o_d[None, :], dq.to(DQP.dtype.element_ty),
                     mask=m_r[:, None] & (o_d < D)[None, :])
    m_dk = (o_d < D)[:, None] & m_k[None, :]
    m_dv = (o_v < DVAL)[:, None] & m_k[None, :]
    if slot >= 0:
        p_slice = SLICES + slot.to(tl.int64) * (B * (D + DVAL)) + (i_sub * BK + tl.arange(0, BK))[None, :] * (D + DVAL)
        tl.store(p_slice + o_d[:, None], b_dk, mask=m_dk)
        tl.store(p_slice + D + o_v[:, None], b_dv, mask=m_dv)
    else:
        p_dk = DK + kv_head * sdk_h + (start_k + o_k)[None, :] * sdk_t + o_d[:, None]
        p_dv = DV + kv_head * sdv_h + (start_k + o_k)[None, :] * sdv_t + o_v[:, None]
        p_dk_rest, p_dv_rest = None, None
        if REST is not None:
            p_dk_rest = REST + (start_k + o_k)[None, :] * (D + DVAL) + o_d[:, None]
            p_dv_rest = REST + (start_k + o_k)[None, :] * (D + DVAL) + D + o_v[:, None]
        store_sum(p_dk, p_dk_rest, b_dk, m_dk, ADD)
        store_sum(p_dv, p_dv_rest, b_dv, m_dv, ADD)


@triton.jit(do_not_specialize=["num_blk", "heads", "num_seqs"])
def _sum_slices_kernel(
    SLICES, BOUNDS, DK, DV, REST, CU_KEYS, CU_BLK, s_bounds, sdk_t, sdk_h, sdv_t, sdv_h, num_blk, heads, num_seqs,
    D: tl.constexpr, DVAL: tl.constexpr, BDD: tl.constexpr, B: tl.constexpr, BR: tl.constexpr, ADD: tl.constexpr,
    BY_BLOCK: tl.constexpr,
):
    """dK, dV of BR keys of a block whose list was cut: the sum of its slices, in order."""
    ACC: tl.constexpr = SLICES.dtype.element_ty
    i_list = tl.program_id(0)
    first = (tl.load(BOUNDS + i_list * s_bounds) - tl.load(BOUNDS)).to(tl.int64)
    last = (tl.load(BOUNDS + i_list * s_bounds + 1) - tl.load(BOUNDS)).to(tl.int64)
    if first == last:
        return
    if BY_BLOCK:
        blk, i_h = i_list // heads, i_list % heads
    else:
        blk, i_h = i_list % num_blk, i_list // num_blk
    i_s = tl.max(last_at_most(CU_BLK, num_seqs, tl.full([1], blk, tl.int32)), 0)
    start_k, len_k = bounds(CU_KEYS, i_s)
    o_r = tl.program_id(1) * BR + tl.arange(0, BR)
    o_k = (blk - tl.load(CU_BLK + i_s)) * B + o_r
    o_d = tl.arange(0, BDD)
    acc = tl.zeros([BR, BDD], ACC)
    for i in range(first, last):
        p = SLICES + i * (B * (D + DVAL)) + o_r[:, None] * (D + DVAL) + o_d[None, :]
        acc += tl.load(p, mask=(o_d < D + DVAL)[None, :] & (o_k < len_k)[:, None], other=0.0)
    head = i_h.to(tl.int64)
    m_k = (o_k < len_k)[:, None]
    p_dk = DK + head * sdk_h + (start_k + o_k)[:, None] * sdk_t + o_d[None, :]
    p_dv = DV + head * sdv_h + (start_k + o_k)[:, None] * sdv_t + (o_d - D)[None, :]
    m_dk, m_dv = m_k & (o_d < D)[None, :], m_k & ((o_d >= D) & (o_d < D + DVAL))[None, :]
    p_rest = None
    if REST is not None:
        p_rest = REST + (start_k + o_k)[:, None] * (D + DVAL) + o_d[None, :]
    store_sum(p_dk, p_rest, acc, m_dk, ADD)
    store_sum(p_dv, p_rest, acc, m_dv, ADD)


def gradient(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, lists: BlockLists, plan: Plan,
    keys: KeyBlocks, scale: float, dq_partials: Tensor | None, out_k: Tensor, out_v: Tensor, rest: Tensor | None,
    slices: Tensor, add: bool,
) -> None:
    """Walk the lists once: dK, dV of every block, or slices of them where a list is cut, and dQ partials in list order.

    Args:
        do, q, k, v, lse, delta: all rows, and the heads of the lists. Of do, lse and delta, views of the heads of
            contiguous tensors.
        dq_partials: `[pairs * G * parts, D]` like q, or None to leave them out; `parts` of `plain_gradient`. Only for
            lists with tokens.
        out_k, out_v: like k and v, views of heads of contiguous tensors.
        rest: `[total_k, D + Dv]` like k, or None: what rounding took off the sums of dK and dV of the one KV head, see
            `store_sum`.
        slices: `[lists.num_slices, B, D + Dv]`, float32 (float64 for float64 inputs).
        add: to what out_k and out_v hold.
    """
    D, Dv, B = q.shape[-1], v.shape[-1], keys.size
    BM, BK, warps, stages = gradient_tile(q, v, B)
    _gradient_kernel[(lists.items.shape[0] * (B // BK),)](
        q, k, v, do, lse, delta, lists.tokens, lists.items, plan.cu_q, plan.cu_k, keys.cu,
        q if dq_partials is None else dq_partials, out_k, out_v, rest, slices,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out_k.stride()[:2], *out_v.stride()[:2],
        lse.stride(0), scale,
        D=D, DVAL=Dv, BD=next_power_of_2(D), BDV=next_power_of_2(Dv), G=q.shape[1] // k.shape[1], B=B,
        STRIDE=keys.stride, SPAN=keys.span, WINDOW=None if keys.window >= UNLIMITED else keys.window, BK=BK, BM=BM,
        WITH_DQ=dq_partials is not None, ADD=add, num_warps=warps, num_stages=stages,
    )  # fmt: skip


Pair = tuple[Tensor, Tensor]
TakeDQ = Callable[[Chunk, BlockLists, Tensor], None]


class Gradient(NamedTuple):
    """A gradient kernel, and the items that suit it."""

    launch: Callable[..., None]
    parts: int  # dQ partials of a row: a block may be done in parts
    cut: Callable[[int], Cut]  # by the group size


def selected_cut(G: int, fewest: int = 1) -> Cut:
    """Long items mean few slices; beyond 4096 pairs or 16384 rows the popular blocks become the tail.

    Slices of 2560 pairs still fit `SLACK` beside a full workspace of partials at G = 4.
    """
    pairs = min(4096, max(fewest, -(-16384 // G)))
    return Cut(pairs, min(2560, pairs))


def plain_gradient(q: Tensor, v: Tensor, B: int) -> Gradient:
    """The kernel for any GPU."""
    return Gradient(gradient, parts=B // gradient_tile(q, v, B)[1], cut=selected_cut)


def selected_size(
    q: Tensor, k: Tensor, v: Tensor, N: int, plan: Plan, kernel: Gradient, *, workspace: int, with_dq: bool
) -> Size:
    """Scratch of the backward of the selected branch in a chunk: lists, slices of dK and dV, dQ partials, the rest of
    sums, and delta, which no chunk makes smaller: it counts for at most a quarter of the workspace."""
    D, B = q.shape[2], plan.config.slc_block

    def size(rows: int, heads: int, group: int) -> int:
        cut = kernel.cut(group)
        slices = cut.slices(plan, rows, heads, N) * slice_bytes(q, v, B)
        partials = rows * heads * N * group * kernel.parts * D * q.element_size() if with_dq else 0
        lists, making = lists_bytes(plan, rows, heads, N, cut)
        kept = key_rest(q, k, v, plan, rows, group, workspace) + min(delta_bytes(q), workspace // 4)
        return kept + lists + max(making, slices + partials)

    return size


def slice_bytes(q: Tensor, v: Tensor, B: int) -> int:
    """dK and dV of a block, not rounded."""
    return B * (q.shape[2] + v.shape[2]) * lse_dtype(q).itemsize


def key_rest(q: Tensor, k: Tensor, v: Tensor, plan: Plan, rows: int, group: int, workspace: int) -> int:
    """What the rest of the sums in which the chunks of a KV head meet counts for in a chunk: at most half of the
    workspace, else little would be left for long sequences."""
    whole = rows == plan.total_q and group == q.shape[1] // k.shape[1]
    return 0 if whole else min(rest_bytes(k, v), workspace // 2)


def rest_bytes(k: Tensor, v: Tensor) -> int:
    """The rest of dK and dV of one KV head."""
    return k.shape[0] * (k.shape[2] + v.shape[2]) * k.element_size()


def backward_bytes(
    q: Tensor, k: Tensor, v: Tensor, N: int, plan: Plan, kernel: Gradient, *, workspace: int, with_dq: bool
) -> int:
    """Peak scratch of the backward."""
    Hkv, G = k.shape[1], q.shape[1] // k.shape[1]
    size = selected_size(q, k, v, N, plan, kernel, workspace=workspace, with_dq=with_dq)
    pieces = list(chunks(plan, Hkv, G, size, workspace))
    largest = max((size(c.rows, c.heads, c.group) for c in pieces), default=0)
    uncounted = max(0, delta_bytes(q) - workspace // 4)
    if len(pieces) > Hkv:
        uncounted += max(0, rest_bytes(k, v) - workspace // 2)
    return largest + uncounted


def selected_dkv(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, block_idx: Tensor, plan: Plan, *,
    scale: float, workspace: int, kernel: Gradient, take_dq: TakeDQ | None = None, into: Pair | None = None,
) -> Pair:
    """dk and dv of the selected branch. See `walk_keys`."""

    def lists_of(chunk: Chunk) -> BlockLists:
        return invert(block_idx, plan, chunk, cut=kernel.cut(chunk.group))

    size = selected_size(q, k, v, block_idx.shape[-1], plan, kernel, workspace=workspace, with_dq=take_dq is not None)
    return walk_keys(
        do, q, k, v, lse, delta, lists_of, size, plan, token_blocks(plan), scale=scale, workspace=workspace,
        kernel=kernel, take_dq=take_dq, into=into,
    )  # fmt: skip


def walk_keys(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, lists_of: Callable[[Chunk], BlockLists],
    size: Size, plan: Plan, keys: KeyBlocks, *, scale: float, workspace: int, kernel: Gradient,
    take_dq: TakeDQ | None = None, into: Pair | None = None,
) -> Pair:
    """dk and dv, chunk by chunk.

    Args:
        lists_of: the block lists of a chunk.
        size: the scratch of a chunk, by which the batch is cut.
        take_dq: if given, called for each chunk with the dQ partials `[pairs * group * parts, D]` in list order, which
            the same pass over the lists then writes. They are valid until it returns.
        into: gradients of k and v so far, contiguous, to which these are added in place.
    """
    T, D, Dv, Hkv = q.shape[0], q.shape[-1], v.shape[-1], k.shape[1]
    G, B, kind = q.shape[1] // Hkv, keys.size, lse_dtype(q)
    dk, dv = into or (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    lists = rest = None
    for chunk in chunks(plan, Hkv, G, size, workspace):
        several = chunk.rows < T or chunk.group < G  # chunks of one KV head
        if several and chunk.row0 == chunk.part0 == 0:
            rest = torch.zeros(len(k), D + Dv, dtype=k.dtype, device=k.device) if rest is None else rest.zero_()
        if chunk.part0 == 0:  # the query heads of a group share the lists
            del lists
            lists = lists_of(chunk)
        dq_partials = None
        if take_dq and lists.tokens is not None:
            num_partials = len(lists.tokens) * chunk.group * kernel.parts
            dq_partials = torch.empty(num_partials, D, dtype=q.dtype, device=q.device)
        slices = torch.empty(lists.num_slices, B, D + Dv, dtype=kind, device=q.device)
        do_part, q_part, lse_part, delta_part = (chunk.of_queries(x, G) for x in (do, q, lse, delta))
        out_k, out_v = chunk.of_keys(dk), chunk.of_keys(dv)
        add = several or into is not None
        kernel.launch(
            do_part, q_part, chunk.of_keys(k), chunk.of_keys(v), lse_part, delta_part, lists, plan, keys, scale,
            dq_partials, out_k, out_v, rest, slices, add,
        )  # fmt: skip
        if lists.num_slices:
            BR = 16
            _sum_slices_kernel[(len(lists.slices), B // BR)](
                slices, lists.slices, out_k, out_v, rest, keys.cu, keys.cu_blk, lists.slices.stride(0),
                *out_k.stride()[:2], *out_v.stride()[:2], keys.total_blk, chunk.heads, plan.num_seqs,
                D=D, DVAL=Dv, BDD=next_power_of_2(D + Dv), B=B, BR=BR, ADD=add, BY_BLOCK=lists.by_block,
                num_warps=4,
            )  # fmt: skip
        if take_dq and dq_partials is not None:
            take_dq(chunk, lists, dq_partials)
        del dq_partials, slices  # before the next chunk allocates its own
    return dk, dv
