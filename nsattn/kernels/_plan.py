"""The tables of a `Plan` on a GPU, by two launches. `plan.make_tables` defines them, which takes forty.

`starts` runs over the sequences once and adds up their lengths, tiles and blocks. `entries` then finds, for every tile
and every unit, the sequence that it belongs to, by bisection.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsattn.config import NSAConfig
from nsattn.kernels._tile import cdiv, last_at_most
from nsattn.plan import STARTS, TILE

NUM_STARTS = tl.constexpr(STARTS)


@triton.jit
def _add_up(TABLES, i_table, o_s, m, amount, total, width):
    """Write where the sequences after `o_s` begin in a packed axis of which each takes `amount`; the new total."""
    tl.store(TABLES + i_table * width + 1 + o_s, total + tl.cumsum(amount, 0), mask=m)
    return total + tl.sum(amount, 0)


@triton.jit(do_not_specialize=["num_seqs", "total_cmp", "width"])
def _starts_kernel(
    CU_Q, CU_K, CU_CMP, TABLES, num_seqs, total_cmp, width,
    TILE: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr, B: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """All tables of starts, by one program: BS sequences a step."""
    o_s = tl.arange(0, BS)
    start_cmp = 0 if CU_CMP is None else tl.load(CU_CMP)
    first = tl.where(o_s == 0, tl.load(CU_Q), tl.where(o_s == 1, tl.load(CU_K), tl.where(o_s == 2, start_cmp, 0)))
    tl.store(TABLES + o_s * width, first, mask=o_s < NUM_STARTS)
    blk, q_pairs, q_tiles, cmp_tiles, k_tiles, cmp_pairs, k_pairs, cmp = 0, 0, 0, 0, 0, 0, 0, start_cmp
    for s0 in range(0, num_seqs, BS):
        m = s0 + o_s < num_seqs
        end_q = tl.load(CU_Q + s0 + o_s + 1, mask=m, other=0)
        end_k = tl.load(CU_K + s0 + o_s + 1, mask=m, other=0)
        len_q = tl.where(m, end_q - tl.load(CU_Q + s0 + o_s, mask=m, other=0), 0)
        len_k = tl.where(m, end_k - tl.load(CU_K + s0 + o_s, mask=m, other=0), 0)
        if CU_CMP is None:
            len_cmp = tl.where(len_k >= L, (len_k - L) // STRIDE + 1, 0)
            end_cmp = cmp + tl.cumsum(len_cmp, 0)
            len_cmp = tl.minimum(end_cmp, total_cmp) - tl.minimum(end_cmp - len_cmp, total_cmp)
        else:
            end_cmp = tl.load(CU_CMP + s0 + o_s + 1, mask=m, other=0)
            len_cmp = tl.where(m, end_cmp - tl.load(CU_CMP + s0 + o_s, mask=m, other=0), 0)
        tl.store(TABLES + 1 + s0 + o_s, end_q, mask=m)
        tl.store(TABLES + width + 1 + s0 + o_s, end_k, mask=m)
        cmp = _add_up(TABLES, 2, s0 + o_s, m, len_cmp, cmp, width)
        blk = _add_up(TABLES, 3, s0 + o_s, m, (len_k + B - 1) // B, blk, width)
        q_pairs = _add_up(TABLES, 4, s0 + o_s, m, (len_q + 2 * TILE - 1) // (2 * TILE), q_pairs, width)
        q_tiles = _add_up(TABLES, 5, s0 + o_s, m, (len_q + TILE - 1) // TILE, q_tiles, width)
        cmp_tiles = _add_up(TABLES, 6, s0 + o_s, m, (len_cmp + TILE - 1) // TILE, cmp_tiles, width)
        k_tiles = _add_up(TABLES, 7, s0 + o_s, m, (len_k + TILE - 1) // TILE, k_tiles, width)
        cmp_pairs = _add_up(TABLES, 8, s0 + o_s, m, (len_cmp + 2 * TILE - 1) // (2 * TILE), cmp_pairs, width)
        k_pairs = _add_up(TABLES, 9, s0 + o_s, m, (len_k + 2 * TILE - 1) // (2 * TILE), k_pairs, width)


@triton.jit(do_not_specialize=["num_seqs", "width", "size", "num_units"])
def _entries_kernel(
    TABLES, num_seqs, width, size, num_units, TILE: tl.constexpr, STRIDE: tl.constexpr, BE: tl.constexpr
):
    """BE entries of one of the four tile tables, or BE units."""
    i_table = tl.program_id(1)
    o_e = tl.program_id(0) * BE + tl.arange(0, BE)
    if i_table < 4:
        STARTS = TABLES + (4 + i_table) * width
        seq = last_at_most(STARTS, num_seqs + 1, o_e)
        first = (o_e - tl.load(STARTS + seq)) * tl.where(i_table == 0, 2 * TILE, TILE)
        p = TABLES + NUM_STARTS * width + 2 * (i_table * size + o_e)
        tl.store(p, tl.where(seq < num_seqs, seq, -1), mask=o_e < size)
        tl.store(p + 1, first, mask=o_e < size)
    else:
        # The first unit of sequence s is cu_k[s] // d + s.
        low = tl.zeros_like(o_e)
        high = low + num_seqs - 1
        while tl.max(high - low, 0) > 0:
            middle = (low + high + 1) // 2
            left = tl.load(TABLES + width + middle) // STRIDE + middle <= o_e
            low = tl.where(left, middle, low)
            high = tl.where(left, high, tl.maximum(middle - 1, low))
        start = tl.load(TABLES + width + low)
        unit = o_e - (start // STRIDE + low)
        begin = tl.load(TABLES + 2 * width + low)
        used = (unit >= 0) & (unit * STRIDE < tl.load(TABLES + width + low + 1) - start)
        p = TABLES + NUM_STARTS * width + 8 * size + o_e
        m = o_e < num_units
        tl.store(p, tl.where(used, start + unit * STRIDE, 0), mask=m)
        tl.store(p + num_units, tl.where(used, begin + unit, 0), mask=m)
        tl.store(p + 2 * num_units, tl.where(used, begin, 0), mask=m)
        tl.store(p + 3 * num_units, tl.where(used, tl.load(TABLES + 2 * width + low + 1), 0), mask=m)


def tables(
    cu_q: Tensor, cu_k: Tensor, cu_cmp: Tensor | None, *, total_cmp: int, width: int, size: int, num_units: int,
    config: NSAConfig,
) -> Tensor:
    """`plan.make_tables` on a GPU."""
    cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
    n, d = len(cu_q) - 1, config.cmp_stride
    out = torch.empty(STARTS * width + 8 * size + 4 * num_units, dtype=torch.int32, device=cu_q.device)
    BS = 1024 if n > 16 else 16
    _starts_kernel[(1,)](
        cu_q, cu_k, cu_cmp, out, n, total_cmp, width, TILE=TILE, L=config.cmp_block, STRIDE=d, B=config.slc_block,
        BS=BS, num_warps=4 if n > 16 else 1,
    )  # fmt: skip
    BE = 256
    _entries_kernel[(cdiv(max(size, num_units), BE), 5)](
        out, n, width, size, num_units, TILE=TILE, STRIDE=d, BE=BE, num_warps=4
    )
    return out
