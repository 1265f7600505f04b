"""attend_selected, query-major: the schedule of the NSA paper (arXiv 2502.11089, section 3.4) for Eq 11, 12.

One program per (query token, KV head). Its rows are the G query heads of the group, padded to at least 16; it
walks the slots of `block_idx` and reads every selected block, so traffic does not depend on G and large
groups suit it best.

Forward: online softmax over the blocks; accumulators, maximum and sum are float32. Backward: dQ by the same
walk; dK and dV need the tokens of each block and come from `_gradient.selected_dkv`. No atomics: everything
repeats bit for bit.

`block_idx` means a set: unused, negative, future and repeated entries are ignored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsattn.kernels._gradient import Pair, backward_bytes, plain_gradient, selected_dkv
from nsattn.kernels._tile import (
    LOG2E,
    bounds,
    dot,
    load_rows,
    lse_dtype,
    next_power_of_2,
    row_delta,
    softmax_finish,
    softmax_step,
    store_rows,
)
from nsattn.plan import TILE, Plan


def key_tile(D: int, Dv: int, B: int, element_size: int) -> tuple[int, int, int]:
    """Keys of a step, warps, stages. K and V tiles of a step take at most 32 KiB, so that two stages and several
    programs fit on chip; sub-tiles of a block also keep the accumulators of 64 heads in registers."""
    widest = max(next_power_of_2(D), next_power_of_2(Dv))
    if element_size > 2:
        return min(B, 32), 4, 1
    return min(B, 64 if widest <= 128 else 32), 4, 2


@triton.jit
def _load_query(Q_TILES, CU_Q, CU_K, TILE: tl.constexpr):
    """Query of this program: packed row (int64; -1 where there is none), position, first key row of its sequence."""
    i_tile, i_row = tl.program_id(0) // TILE, tl.program_id(0) % TILE
    i_s = tl.load(Q_TILES + 2 * i_tile)
    i_q = tl.load(Q_TILES + 2 * i_tile + 1) + i_row
    start_q, len_q = bounds(CU_Q, tl.maximum(i_s, 0))
    start_k, len_k = bounds(CU_K, tl.maximum(i_s, 0))
    row = tl.where((i_s >= 0) & (i_q < len_q), start_q + i_q, -1)
    return row, i_q + len_k - len_q, start_k


@triton.jit
def _load_blocks(p_idx, t, N: tl.constexpr, BN: tl.constexpr, B: tl.constexpr):
    """Selected blocks of a query at position t, [BN]; -1 for entries that are unused, future or repeated."""
    o_n = tl.arange(0, BN)
    block = tl.load(p_idx + o_n, mask=o_n < N, other=-1)
    earlier = (block[None, :] == block[:, None]) & (o_n[None, :] < o_n[:, None])
    repeats = tl.max(earlier.to(tl.int32), 1) > 0
    # Dividing the position keeps the test free of overflow for hostile block numbers.
    return tl.where((t >= 0) & (block <= t // B) & ~repeats, block, -1)


@triton.jit
def _load_keys(p_k, p_v, blocks, i, t, sk_t, sv_t, o_d, o_v,
               D: tl.constexpr, DVAL: tl.constexpr, B: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Step i of the walk over the blocks: K [BK, BD], V [BK, BDV], and which of their rows the query sees."""
    block = tl.max(tl.where(tl.arange(0, BN) == i // (B // BK), blocks, -1), 0)
    o_k = block.to(tl.int64) * B + i % (B // BK) * BK + tl.arange(0, BK)
    m_k = (block >= 0) & (o_k <= t)
    return load_rows(p_k, o_k, o_d, sk_t, m_k, D), load_rows(p_v, o_k, o_v, sv_t, m_k, DVAL), m_k


@triton.jit
def _attend_selected_fwd_kernel(
    Q, K, V, IDX, O, LSE, Q_TILES, CU_Q, CU_K, sq_t, sq_h, sk_t, sk_h, sv_t, sv_h, num_kv_heads, scale,
    D: tl.constexpr, DVAL: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    G: tl.constexpr, BG: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    B: tl.constexpr, BK: tl.constexpr, TILE: tl.constexpr,
):
    """Output and lse of the G heads of one (query, KV head): softmax over its selected blocks (Eq 11, 12)."""
    ACC: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    i_h = tl.program_id(1).to(tl.int64)
    row, t, start_k = _load_query(Q_TILES, CU_Q, CU_K, TILE)
    if row < 0:
        return
    o_g, o_d, o_v = tl.arange(0, BG), tl.arange(0, BD), tl.arange(0, BDV)
    m_g, head = o_g < G, i_h * G + o_g
    # [BN], [BG, BD]
    blocks = _load_blocks(IDX + (row * num_kv_heads + i_h) * N, t, N, BN, B)
    b_q = load_rows(Q + row * sq_t, head, o_d, sq_h, m_g, D)
    m = tl.full([BG], -float("inf"), ACC)
    l = tl.zeros([BG], ACC)
    acc = tl.zeros([BG, BDV], ACC)
    p_k, p_v = K + start_k * sk_t + i_h * sk_h, V + start_k * sv_t + i_h * sv_h
    for i in range(N * (B // BK)):
        b_k, b_v, m_k = _load_keys(p_k, p_v, blocks, i, t, sk_t, sv_t, o_d, o_v, D, DVAL, B, BN, BK)
        s2 = dot(b_q, tl.trans(b_k)) * (scale * LOG2E)
        m, l, acc = softmax_step(m, l, acc, tl.where(m_k[None, :], s2, -float("inf")), b_v)
    b_o, lse = softmax_finish(m, l, acc)
    out = row * (num_kv_heads * G) + head
    store_rows(O, b_o, out, o_v, DVAL, m_g, DVAL)
    tl.store(LSE + out, lse, mask=m_g)


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, block_idx: Tensor, plan: Plan, *, scale: float, workspace: int
) -> tuple[Tensor, Tensor]:
    """Eq 11, 12, query-major; needs no scratch. See `nsattn.attend_selected`."""
    T, Hq, Dv = q.shape[0], q.shape[1], v.shape[-1]
    o = torch.zeros(T, Hq, Dv, dtype=q.dtype, device=q.device)
    lse = torch.full((T, Hq), -float("inf"), dtype=lse_dtype(q), device=q.device)
    if T:
        _launch(_attend_selected_fwd_kernel, q, k, v, (block_idx, o, lse), plan, scale)
    return o, lse


def scratch_bytes(
    q: Tensor, k: Tensor, v: Tensor, N: int, plan: Plan, *, workspace: int, backward: bool
) -> int:
    """Peak scratch of `attend_selected` or `attend_selected_bwd`, in bytes; the data of the tensors is not read."""
    if not backward:
        return 0
    kernel = plain_gradient(q, v, plan.config.slc_block)
    return backward_bytes(q, k, v, N, plan, kernel, workspace=workspace, with_dq=False)


@triton.jit
def _attend_selected_dq_kernel(
    Q, K, V, IDX, DO, LSE, DELTA, DQ, Q_TILES, CU_Q, CU_K, sq_t, sq_h, sk_t, sk_h, sv_t, sv_h,
    num_kv_heads, scale,
    D: tl.constexpr, DVAL: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    G: tl.constexpr, BG: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    B: tl.constexpr, BK: tl.constexpr, TILE: tl.constexpr,
):
    """dQ of the G heads of one (query, KV head): sum over its selected blocks of ds @ k (Eq 11, 12)."""
    ACC: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    i_h = tl.program_id(1).to(tl.int64)
    row, t, start_k = _load_query(Q_TILES, CU_Q, CU_K, TILE)
    if row < 0:
        return
    o_g, o_d, o_v = tl.arange(0, BG), tl.arange(0, BD), tl.arange(0, BDV)
    m_g, head = o_g < G, i_h * G + o_g
    out = row * (num_kv_heads * G) + head
    # [BN], [BG, BD], [BG, BDV]
    blocks = _load_blocks(IDX + (row * num_kv_heads + i_h) * N, t, N, BN, B)
    b_q = load_rows(Q + row * sq_t, head, o_d, sq_h, m_g, D)
    b_do = load_rows(DO, out, o_v, DVAL, m_g, DVAL)
    lse2 = tl.load(LSE + out, mask=m_g, other=0.0) * LOG2E
    delta = tl.load(DELTA + out, mask=m_g, other=0.0)
    b_dq = tl.zeros([BG, BD], ACC)
    p_k, p_v = K + start_k * sk_t + i_h * sk_h, V + start_k * sv_t + i_h * sv_h
    for i in range(N * (B // BK)):
        b_k, b_v, m_k = _load_keys(p_k, p_v, blocks, i, t, sk_t, sv_t, o_d, o_v, D, DVAL, B, BN, BK)
        s2 = dot(b_q, tl.trans(b_k)) * (scale * LOG2E)
        p = tl.where(m_k[None, :], tl.exp2(s2 - lse2[:, None]), 0.0)
        dp = dot(b_do, tl.trans(b_v))
        ds = p * (dp - delta[:, None])
        b_dq += dot(ds.to(b_k.dtype), b_k)
    store_rows(DQ, b_dq * scale, out, o_d, D, m_g, D)


def attend_selected_bwd(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    block_idx: Tensor, plan: Plan, *, scale: float, workspace: int, delta: Tensor | None = None,
    dq: Tensor | None = None, dkv: Pair | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_selected` with respect to q, k, v. See `attend_selected_kvmajor`."""
    total_dq = dq
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    delta = row_delta(o, do, dlse) if delta is None else delta
    if q.shape[0]:
        _launch(_attend_selected_dq_kernel, q, k, v, (block_idx, do, lse, delta, dq), plan, scale)
    kernel = plain_gradient(q, v, plan.config.slc_block)
    dk, dv = selected_dkv(
        do, q, k, v, lse, delta, block_idx, plan, scale=scale, workspace=workspace, kernel=kernel, into=dkv
    )
    return dq if total_dq is None else total_dq.add_(dq), dk, dv


def _launch(
    kernel, q: Tensor, k: Tensor, v: Tensor, rest: tuple[Tensor, ...], plan: Plan, scale: float
) -> None:
    """Start one program per (query, KV head). `rest`: block_idx and the kernel's other tensors, in its order."""
    (Hq, D), (Hkv, Dv), N = q.shape[1:], v.shape[1:], rest[0].shape[-1]
    G, B = Hq // Hkv, plan.config.slc_block
    BK, warps, stages = key_tile(D, Dv, B, q.element_size())
    kernel[(plan.q_tiles.shape[0] * TILE, Hkv)](
        q, k, v, *rest, plan.q_tiles, plan.cu_q, plan.cu_k,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), Hkv, scale,
        D=D, DVAL=Dv, BD=next_power_of_2(D), BDV=next_power_of_2(Dv), G=G, BG=next_power_of_2(G),
        N=N, BN=next_power_of_2(N), B=B, BK=BK, TILE=TILE, num_warps=warps, num_stages=stages,
    )
