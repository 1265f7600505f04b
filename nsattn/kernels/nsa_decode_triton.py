"""nsa_decode: all of Native Sparse Attention for a few new tokens over a cache, Eq 5 and 8 to 12, in four launches.

A new token reads every compressed key, N blocks and a window, so what counts is that many programs read at once and
that few launches follow each other:

1. *compressed*, one program per (token, KV head, part of CMP_PART compressed rows): partial output and lse, as in
   split-KV decoding; scores are kept for the next step.
2. *select*, one program per (token, KV head): the lse of the compressed branch, importance of every block (Eq 9), the
   N best (Eq 10).
3. *keys*, one program per (token, KV head, selected block or part of WIN_PART keys of the window): as in 1.
4. *merge*, one program per (token, query head): merges the parts of each branch and adds the branches up by the gates.

Rows of a tile are the G query heads of a KV head. Cached rows lie side by side in `[Bsz, C, ...]`, or in pages of B
tokens that a block table names; compressed rows share the table, B / d of them a page. Lengths are read on the device,
and the grid follows from the size of the cache, so a step can be captured in a CUDA graph. Parts have a fixed size:
results do not depend on the batch or on the room in the cache.

Limits: 16384 selection blocks of room per sequence. The cache must hold the new tokens already.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsattn.config import NSAConfig
from nsattn.kernels._select import keep_best
from nsattn.kernels._tile import LOG2E, cdiv, dot, load_rows, lse_dtype, next_power_of_2, softmax_finish, softmax_step
from nsattn.plan import num_compressed

CMP_PART = 256  # compressed rows: at 64K tokens 16 parts, 1024 programs for 8 sequences of 8 KV heads
WIN_PART = 128  # keys of the window: as long a walk as a large block
MERGED = 32  # partial results that a merge loads at once: 16 KiB at Dv = 128


def key_tile(D: int, Dv: int, element_size: int) -> tuple[int, int, int]:
    """Keys of a step, warps, stages: K and V of a step take at most 32 KiB, so that several programs fit on chip."""
    widest = max(next_power_of_2(D), next_power_of_2(Dv))
    if element_size > 2:
        return 32, 4, 1
    return (64 if widest <= 128 else 32), 4, 2


@triton.jit
def _position(LENS, i_row, capacity, S: tl.constexpr):
    """Sequence (int64) and position of new token i_row, of S per sequence. A wrong length cannot leave the cache."""
    i_b = i_row // S
    return i_b.to(tl.int64), tl.minimum(tl.load(LENS + i_b), capacity) - S + i_row % S


@triton.jit
def _offsets(p_table, i_b, o_r, m_r, num_pages, s_page, s_row, PAGE: tl.constexpr):
    """Where cached rows o_r of a sequence lie, in elements (int64). Pages outside the pool become its first or last."""
    if p_table is None:
        return i_b * s_page + o_r.to(tl.int64) * s_row
    else:
        page = tl.load(p_table + o_r // PAGE, mask=m_r, other=0)
        page = tl.minimum(tl.maximum(page, 0), num_pages - 1)
        return page.to(tl.int64) * s_page + (o_r % PAGE).to(tl.int64) * s_row


@triton.jit
def _attend_part(
    p_q, sq_h, p_k, p_v, p_table, i_b, first, last, num_pages, sk_page, sk_row, sv_page, sv_row, scale,
    p_score, score_row, p_o, p_lse, part_row,
    D: tl.constexpr, DVAL: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, G: tl.constexpr, BG: tl.constexpr,
    PAGE: tl.constexpr, BK: tl.constexpr,
):
    """Partial output and lse of G heads over cached rows first .. last - 1; none: lse -inf, and no output."""
    ACC: tl.constexpr = p_o.dtype.element_ty
    o_g, o_d, o_v = tl.arange(0, BG), tl.arange(0, BD), tl.arange(0, BDV)
    m_g = o_g < G
    if first >= last:
        tl.store(p_lse + o_g * part_row, -float("inf"), mask=m_g)
    else:
        b_q = load_rows(p_q, o_g, o_d, sq_h, m_g, D)  # [BG, BD]
        m = tl.full([BG], -float("inf"), ACC)
        l = tl.zeros([BG], ACC)
        acc = tl.zeros([BG, BDV], ACC)
        for i in range(first, last, BK):
            o_r = i + tl.arange(0, BK)
            m_r = o_r < last
            # [BK, BD], [BK, BDV]
            b_k = load_rows(p_k, _offsets(p_table, i_b, o_r, m_r, num_pages, sk_page, sk_row, PAGE), o_d, 1, m_r, D)
            b_v = load_rows(p_v, _offsets(p_table, i_b, o_r, m_r, num_pages, sv_page, sv_row, PAGE), o_v, 1, m_r, DVAL)
            s2 = dot(b_q, tl.trans(b_k)) * (scale * LOG2E)
            if p_score is not None:
                tl.store(p_score + o_g[:, None] * score_row + o_r[None, :], s2, mask=m_g[:, None] & m_r[None, :])
            m, l, acc = softmax_step(m, l, acc, tl.where(m_r[None, :], s2, -float("inf")), b_v)
        b_o, lse = softmax_finish(m, l, acc)
        tl.store(p_lse + o_g * part_row, lse, mask=m_g)
        o_o = o_g.to(tl.int64) * part_row * DVAL
        tl.store(p_o + o_o[:, None] + o_v[None, :], b_o, mask=m_g[:, None] & (o_v[None, :] < DVAL))


@triton.jit
def _decode_compressed_kernel(
    Q, K, V, LENS, TABLE, SCORE, O_PART, LSE_PART, sq_t, sq_h, sk_p, sk_t, sk_h, sv_p, sv_t, sv_h, st_b,
    first_row, capacity, num_pages, num_kv_heads, num_parts, cmp_parts, score_row, scale,
    D: tl.constexpr, DVAL: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, G: tl.constexpr, BG: tl.constexpr,
    S: tl.constexpr, B: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr,
):
    """PART compressed rows of a (token, KV head): partial output and lse, and their scores (Eq 8)."""
    i_part, i_row = tl.program_id(0) % cmp_parts, tl.program_id(0) // cmp_parts
    i_h = tl.program_id(1).to(tl.int64)
    i_b, t = _position(LENS, first_row + i_row, capacity, S)
    head = (i_row.to(tl.int64) * num_kv_heads + i_h) * G  # of the first row of scratch
    p_table = None
    if TABLE is not None:
        p_table = TABLE + i_b * st_b
    first = i_part * PART
    last = tl.minimum(first + PART, (t - L + 1 + STRIDE) // STRIDE)  # rows that end at or before t
    _attend_part(
        Q + (first_row + i_row).to(tl.int64) * sq_t + i_h * G * sq_h, sq_h, K + i_h * sk_h, V + i_h * sv_h, p_table,
        i_b, first, last, num_pages, sk_p, sk_t, sv_p, sv_t, scale, SCORE + head * score_row, score_row,
        O_PART + (head * num_parts + i_part) * DVAL, LSE_PART + head * num_parts + i_part, num_parts,
        D, DVAL, BD, BDV, G, BG, B // STRIDE, BK,
    )


@triton.jit
def _merged_lse2(p_lse, num, BP: tl.constexpr):
    """log2 of the sum of 2^lse2 over `num` natural log-sum-exps side by side; -inf for none."""
    m = tl.full([BP], -float("inf"), p_lse.dtype.element_ty)
    l = tl.zeros([BP], p_lse.dtype.element_ty)
    for i in range(0, num, BP):
        o_p = i + tl.arange(0, BP)
        lse2 = tl.load(p_lse + o_p, mask=o_p < num, other=-float("inf")) * LOG2E
        m_new = tl.maximum(m, lse2)
        m_ref = tl.where(m_new == -float("inf"), 0.0, m_new)
        l = l * tl.exp2(m - m_ref) + tl.exp2(lse2 - m_ref)
        m = m_new
    top = tl.max(m, 0)
    some = top > -float("inf")
    ref = tl.where(some, top, 0.0)
    total = tl.sum(l * tl.exp2(m - ref), 0)
    return tl.where(some, tl.log2(tl.where(some, total, 1.0)) + ref, -float("inf"))


@triton.jit
def _decode_select_kernel(
    SCORE, LSE_PART, LENS, IDX, first_row, capacity, num_kv_heads, num_parts, cmp_parts, score_row,
    G: tl.constexpr, S: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr, B: tl.constexpr, N: tl.constexpr,
    BN: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):
    """The N best blocks of a (token, KV head), ascending, -1 for unused slots: importance of Eq 9, choice of Eq 10."""
    P: tl.constexpr = B // STRIDE
    R: tl.constexpr = L // STRIDE
    i_row = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    _, t = _position(LENS, first_row + i_row, capacity, S)
    head = (i_row.to(tl.int64) * num_kv_heads + i_h) * G
    count = (t - L + 1 + STRIDE) // STRIDE
    visible = tl.where(t >= 0, t // B + 1, 0)
    o_j = tl.arange(0, BC)
    forced = (o_j < visible) & ((o_j < INIT) | (o_j >= visible - LOCAL))
    competes = (o_j < visible) & ~forced
    score = tl.zeros([BC], SCORE.dtype.element_ty)
    if visible > N:  # otherwise all are chosen
        for g in range(G):
            lse2 = _merged_lse2(LSE_PART + (head + g) * num_parts, cmp_parts, BP)
            lse2 = tl.where(lse2 > -float("inf"), lse2, float("inf"))  # a head that saw nothing adds 0
            p_score = SCORE + (head + g) * score_row
            for o in range(1 - R, P):
                weight = tl.minimum(o + R, P) - tl.maximum(o, 0)
                o_i = o_j * P + o
                s2 = tl.load(p_score + o_i, mask=competes & (o_i >= 0) & (o_i < count), other=-float("inf"))
                score += tl.exp2(s2 - lse2) * weight
    free = N - tl.minimum(tl.minimum(INIT, visible) + tl.minimum(LOCAL, visible), visible)
    keep = keep_best(score.to(tl.float32), competes, free, BN) | forced
    slot = tl.cumsum(keep.to(tl.int32), 0) - 1
    p_idx = IDX + ((first_row + i_row).to(tl.int64) * num_kv_heads + i_h) * N
    tl.store(p_idx + slot, o_j, mask=keep)
    o_n = tl.arange(0, BN)
    tl.store(p_idx + o_n, -1, mask=(o_n < N) & (o_n >= tl.sum(keep.to(tl.int32), 0)))


@triton.jit
def _decode_keys_kernel(
    Q, K, V, K_WIN, V_WIN, LENS, TABLE, IDX, O_PART, LSE_PART, sq_t, sq_h, sk_p, sk_t, sk_h, sv_p, sv_t, sv_h,
    skw_p, skw_t, skw_h, svw_p, svw_t, svw_h, st_b,
    first_row, capacity, num_pages, num_kv_heads, num_parts, cmp_parts, scale,
    D: tl.constexpr, DVAL: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, G: tl.constexpr, BG: tl.constexpr,
    S: tl.constexpr, B: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr,
):
    """One selected block (Eq 11, 12) or PART keys of the window of a (token, KV head): partial output and lse."""
    i_part, i_row = tl.program_id(0) % (num_parts - cmp_parts), tl.program_id(0) // (num_parts - cmp_parts)
    i_h = tl.program_id(1).to(tl.int64)
    i_b, t = _position(LENS, first_row + i_row, capacity, S)
    head = (i_row.to(tl.int64) * num_kv_heads + i_h) * G
    p_table = None
    if TABLE is not None:
        p_table = TABLE + i_b * st_b
    if i_part < N:
        block = tl.load(IDX + ((first_row + i_row).to(tl.int64) * num_kv_heads + i_h) * N + i_part)
        first = block * B
        last = tl.where(block < 0, first, tl.minimum(first + B, t + 1))
        p_k, p_v = K + i_h * sk_h, V + i_h * sv_h
    else:
        first = tl.maximum(t - WINDOW + 1, 0) + (i_part - N) * PART
        last = tl.minimum(first + PART, t + 1)
        p_k, p_v = K_WIN + i_h * skw_h, V_WIN + i_h * svw_h
        sk_p, sk_t, sv_p, sv_t = skw_p, skw_t, svw_p, svw_t
    i_part += cmp_parts
    _attend_part(
        Q + (first_row + i_row).to(tl.int64) * sq_t + i_h * G * sq_h, sq_h, p_k, p_v, p_table,
        i_b, first, last, num_pages, sk_p, sk_t, sv_p, sv_t, scale, None, 0,
        O_PART + (head * num_parts + i_part) * DVAL, LSE_PART + head * num_parts + i_part, num_parts,
        D, DVAL, BD, BDV, G, BG, B, BK,
    )


@triton.jit
def _merge_parts(p_o, p_lse, p_out, num, gate, o_v, DVAL: tl.constexpr, BP: tl.constexpr):
    """gate * merged output [BDV] of `num` parts side by side; their natural lse goes to p_out."""
    lse2 = _merged_lse2(p_lse, num, BP)
    ref = tl.where(lse2 > -float("inf"), lse2, 0.0)
    acc = tl.zeros([o_v.shape[0]], p_o.dtype.element_ty)
    for i in range(0, num, BP):
        o_p = i + tl.arange(0, BP)
        part2 = tl.load(p_lse + o_p, mask=o_p < num, other=-float("inf")) * LOG2E
        # What has no weight was not written. [BP, BDV]
        b_o = load_rows(p_o, o_p.to(tl.int64), o_v, DVAL, part2 > -float("inf"), DVAL)
        acc += tl.sum(b_o * tl.exp2(part2 - ref)[:, None], 0)
    tl.store(p_out, lse2 / LOG2E)
    return acc * gate


@triton.jit
def _decode_merge_kernel(
    O_PART, LSE_PART, GATES, O, LSE_CMP, LSE_SLC, LSE_WIN, sg_t, sg_h, first_row, num_heads, num_parts, cmp_parts,
    N: tl.constexpr, DVAL: tl.constexpr, BDV: tl.constexpr, BP: tl.constexpr,
):
    """Output of one (token, query head): its parts merged by branch, the branches added up by gates (Eq 5)."""
    i_head = tl.program_id(0).to(tl.int64)  # of the rows of scratch
    out = tl.cast(first_row, tl.int64) * num_heads + i_head
    o_v = tl.arange(0, BDV)
    p_o, p_lse = O_PART + i_head * num_parts * DVAL, LSE_PART + i_head * num_parts
    p_g = GATES + (out // num_heads) * sg_t + (out % num_heads) * sg_h
    ACC: tl.constexpr = O_PART.dtype.element_ty
    g_cmp, g_slc, g_win = tl.load(p_g).to(ACC), tl.load(p_g + 1).to(ACC), tl.load(p_g + 2).to(ACC)
    b_o = _merge_parts(p_o, p_lse, LSE_CMP + out, cmp_parts, g_cmp, o_v, DVAL, BP)
    p_o, p_lse = p_o + cmp_parts * DVAL, p_lse + cmp_parts
    b_o += _merge_parts(p_o, p_lse, LSE_SLC + out, N, g_slc, o_v, DVAL, BP)
    p_o, p_lse = p_o + N * DVAL, p_lse + N
    b_o += _merge_parts(p_o, p_lse, LSE_WIN + out, num_parts - cmp_parts - N, g_win, o_v, DVAL, BP)
    tl.store(O + out * DVAL + o_v, b_o.to(O.dtype.element_ty), mask=o_v < DVAL)


def nsa_decode(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, k_win: Tensor, v_win: Tensor,
    cache_seqlens: Tensor, block_table: Tensor | None, config: NSAConfig, *, scale: float, workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Eq 5 and 8 to 12 over a cache. See `nsattn.nsa_decode`."""
    (Bsz, S, Hq, D), Hkv, Dv = q.shape, k.shape[2], v.shape[3]
    rows, N, B = Bsz * S, config.num_selected, config.slc_block
    kind = lse_dtype(q)
    o = torch.empty(Bsz, S, Hq, Dv, dtype=q.dtype, device=q.device)
    lse_cmp, lse_slc, lse_win = (torch.empty(Bsz, S, Hq, dtype=kind, device=q.device) for _ in range(3))
    block_idx = torch.empty(Bsz, S, Hkv, N, dtype=torch.int32, device=q.device)
    if rows == 0:
        return o, lse_cmp, lse_slc, lse_win, block_idx
    capacity = k.shape[1] if block_table is None else block_table.shape[1] * B
    cmp_parts = max(1, cdiv(num_compressed(capacity, config), CMP_PART))
    num_parts = cmp_parts + N + cdiv(min(config.window, max(capacity, 1)), WIN_PART)
    score_row = cmp_parts * CMP_PART
    chunk = max(1, workspace // (Hq * (num_parts * (Dv + 1) + score_row) * kind.itemsize))
    chunk = min(rows, chunk)
    score = torch.empty(chunk, Hq, score_row, dtype=kind, device=q.device)
    o_part = torch.empty(chunk, Hq, num_parts, Dv, dtype=kind, device=q.device)
    lse_part = torch.empty(chunk, Hq, num_parts, dtype=kind, device=q.device)

    BK, warps, stages = key_tile(D, Dv, q.element_size())
    q, gates = q.flatten(0, 1), gates.flatten(0, 1)
    shape = {"D": D, "DVAL": Dv, "BD": next_power_of_2(D), "BDV": next_power_of_2(Dv), "G": Hq // Hkv,
             "BG": next_power_of_2(Hq // Hkv)}
    blocks = {"S": S, "B": B}
    compression = {"L": config.cmp_block, "STRIDE": config.cmp_stride}
    BC = next_power_of_2(cdiv(capacity, B), 64)
    table_row = 0 if block_table is None else block_table.stride(0)
    for first in range(0, rows, chunk):
        num = min(chunk, rows - first)
        _decode_compressed_kernel[(num * cmp_parts, Hkv)](
            q, k_cmp, v_cmp, cache_seqlens, block_table, score, o_part, lse_part,
            *q.stride()[:2], *k_cmp.stride()[:3], *v_cmp.stride()[:3], table_row, first, capacity, k.shape[0], Hkv,
            num_parts, cmp_parts, score_row, scale, **shape, **blocks, **compression, BK=BK, PART=CMP_PART,
            num_warps=warps, num_stages=stages,
        )
        _decode_select_kernel[(num, Hkv)](
            score, lse_part, cache_seqlens, block_idx, first, capacity, Hkv, num_parts, cmp_parts, score_row,
            G=Hq // Hkv, **blocks, **compression, N=N, BN=next_power_of_2(N), INIT=config.init_blocks,
            LOCAL=config.local_blocks, BC=BC, BP=MERGED, num_warps=min(16, max(1, BC // 256)),
        )
        _decode_keys_kernel[(num * (num_parts - cmp_parts), Hkv)](
            q, k, v, k_win, v_win, cache_seqlens, block_table, block_idx, o_part, lse_part,
            *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *k_win.stride()[:3], *v_win.stride()[:3], table_row,
            first, capacity, k.shape[0], Hkv, num_parts, cmp_parts, scale, **shape, **blocks, N=N,
            WINDOW=config.window, BK=min(B, BK), PART=WIN_PART, num_warps=warps, num_stages=stages,
        )
        _decode_merge_kernel[(num * Hq,)](
            o_part, lse_part, gates, o, lse_cmp, lse_slc, lse_win, *gates.stride()[:2], first, Hq, num_parts,
            cmp_parts, N=N, DVAL=Dv, BDV=next_power_of_2(Dv), BP=MERGED, num_warps=4,
        )
    return o, lse_cmp, lse_slc, lse_win, block_idx
