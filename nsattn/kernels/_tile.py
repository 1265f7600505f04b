"""Steps that kernels share: bounds of a sequence, a search, one product, one softmax, one gradient of scores.

Names in kernels: `i_` program and loop indices, `o_` offset vectors, `m_` masks, `p_` pointers, `b_` values on chip;
upper case for compile-time sizes. `BD`, `BDV` are the head dims rounded up to powers of two. Row offsets are int64
before they meet a stride. Inside kernels the log-sum-exp is base 2 (`lse2`); what is stored is the natural one.
"""

import torch
import triton
import triton.language as tl

UNLIMITED = 1 << 30  # a window longer than any sequence
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def bounds(cu, i_s):
    """First row (int64) and length (int32) of sequence i_s."""
    start = tl.load(cu + i_s)
    return start.to(tl.int64), tl.load(cu + i_s + 1) - start


@triton.jit
def last_at_most(P, size, x):
    """Index of the last entry of the ascending array P[:size] that is <= x, element by element; 0 if none is."""
    low = tl.zeros_like(x)
    high = low + size - 1
    while tl.max(high - low, 0) > 0:
        middle = (low + high + 1) // 2
        left = tl.load(P + middle) <= x
        low = tl.where(left, middle, low)
        high = tl.where(left, high, tl.maximum(middle - 1, low))
    return low


@triton.jit
def load_rows(p, o_row, o_col, stride_row, m_row, COLS: tl.constexpr):
    """Tile [rows, cols] gathered at int64 row offsets `o_row`; 0 where `m_row` is false or the column is >= COLS."""
    return tl.load(p + o_row[:, None] * stride_row + o_col[None, :],
                   mask=m_row[:, None] & (o_col[None, :] < COLS), other=0.0)


@triton.jit
def store_rows(p, b, o_row, o_col, stride_row, m_row, COLS: tl.constexpr):
    """Store a tile [rows, cols] at int64 row offsets, cast to the type of the target."""
    tl.store(p + o_row[:, None] * stride_row + o_col[None, :], b.to(p.dtype.element_ty),
             mask=m_row[:, None] & (o_col[None, :] < COLS))


@triton.jit
def dot(a, b):
    """a @ b, accumulated in float32 (float64 for float64 operands). float32 operands are not rounded to tf32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def softmax_step(m, l, acc, s2, b_v):
    """One online softmax step over base-2 scores `s2` [rows, keys] (-inf where invisible) and values [keys, BDV].

    m, l: running maximum and sum [rows]; acc: running sum of p @ v. A row without visible keys keeps m = -inf, l = 0.
    """
    m_new = tl.maximum(m, tl.max(s2, 1))
    m_ref = tl.where(m_new == -float("inf"), 0.0, m_new)
    shrink = tl.exp2(m - m_ref)
    p = tl.exp2(s2 - m_ref[:, None])
    acc = acc * shrink[:, None] + dot(p.to(b_v.dtype), b_v)
    return m_new, l * shrink + tl.sum(p, 1), acc


@triton.jit
def softmax_finish(m, l, acc):
    """Output [rows, BDV] and natural lse [rows]; a row without visible keys gives 0 and -inf."""
    some = l > 0
    o = acc / tl.where(some, l, 1.0)[:, None]
    lse = tl.where(some, (m + tl.log2(tl.where(some, l, 1.0))) * LN2, -float("inf"))
    return o, lse


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's function of that name takes 4 microseconds, this one 0.1."""
    return -(-a // b)


def next_power_of_2(n: int, low: int = 16) -> int:
    """Smallest power of two >= n and >= low: a head dim as a tile size."""
    return max(low, 1 << (n - 1).bit_length())


def lse_dtype(x: torch.Tensor) -> torch.dtype:
    """Type of softmax statistics and accumulators: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory to plan a program's tiles with: 227 KiB on sm_90, 163 on sm_80, 64 on gfx942.

    From sm_100 on, where there are 227 KiB too, Triton keeps copies of operands beside the tiles: plan with 160.
    """
    if device.type != "cuda":
        return 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    exists = properties.shared_memory_per_block_optin
    return min(exists, 160 * 1024) if torch.version.cuda and properties.major >= 10 else exists


@triton.jit
def _delta_kernel(O, DO, DLSE, DELTA, num_rows, DVAL: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr):
    """delta of BR rows (token, head): what ds = p * (dp - delta) subtracts, rowsum(o * do) - dlse."""
    ACC: tl.constexpr = DELTA.dtype.element_ty
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r = o_r < num_rows
    o_v = tl.arange(0, BDV)
    # [BR, BDV]
    b_o = load_rows(O, o_r, o_v, DVAL, m_r, DVAL).to(ACC)
    b_do = load_rows(DO, o_r, o_v, DVAL, m_r, DVAL).to(ACC)
    delta = tl.sum(b_o * b_do, 1)
    if DLSE is not None:
        delta -= tl.load(DLSE + o_r, mask=m_r, other=0.0).to(ACC)
    tl.store(DELTA + o_r, delta, mask=m_r)


def row_delta(o: torch.Tensor, do: torch.Tensor, dlse: torch.Tensor | None) -> torch.Tensor:
    """rowsum(o * do) - dlse, `[T, Hq]` in the type of the statistics. All inputs contiguous."""
    (T, Hq, Dv) = o.shape
    delta = torch.empty(T, Hq, dtype=lse_dtype(o), device=o.device)
    if T * Hq:
        BDV = next_power_of_2(Dv)
        BR = 4096 // BDV  # 32 values of each input per thread
        _delta_kernel[(cdiv(T * Hq, BR),)](
            o, do, dlse, delta, T * Hq, DVAL=Dv, BDV=BDV, BR=BR, num_warps=4
        )
    return delta


def delta_bytes(q: torch.Tensor) -> int:
    """Memory of `row_delta`."""
    return q.shape[0] * q.shape[1] * lse_dtype(q).itemsize
