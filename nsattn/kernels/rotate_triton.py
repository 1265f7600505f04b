"""rotate: rotary position embedding in one pass. Reads and writes each row once, at the speed of memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsattn.kernels._tile import cdiv, load_rows, next_power_of_2, store_rows

TOKENS = 16  # of one program: with a half of 64 columns, a thread reads 16 bytes at once
HEADS = 4  # of one program: few, so that one decoding step does not wait for one program


@triton.jit
def _rotate_kernel(
    X, COS, SIN, Y, num_tokens, num_heads, stride_xt, stride_xh, stride_yt, stride_cos, stride_sin,
    HALF: tl.constexpr, BHALF: tl.constexpr, BT: tl.constexpr, HEADS: tl.constexpr, BACKWARD: tl.constexpr,
):
    """BT tokens, HEADS heads: y = x * cos + (-x2, x1) * sin for the halves x1, x2; with BACKWARD its transpose."""
    ACC: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < num_tokens
    o_d = tl.arange(0, BHALF)
    b_cos1 = load_rows(COS, o_t, o_d, stride_cos, m_t, HALF).to(ACC)
    b_cos2 = load_rows(COS + HALF, o_t, o_d, stride_cos, m_t, HALF).to(ACC)
    b_sin1 = load_rows(SIN, o_t, o_d, stride_sin, m_t, HALF).to(ACC)
    b_sin2 = load_rows(SIN + HALF, o_t, o_d, stride_sin, m_t, HALF).to(ACC)
    if BACKWARD:  # the transpose of [[cos1, -sin1], [sin2, cos2]]
        b_sin1, b_sin2 = -b_sin2, -b_sin1
    for i in tl.static_range(HEADS):
        i_h = tl.program_id(1).to(tl.int64) * HEADS + i
        m_r = m_t & (i_h < num_heads)
        p_x = X + i_h * stride_xh
        p_y = Y + i_h * (2 * HALF)
        b_x1 = load_rows(p_x, o_t, o_d, stride_xt, m_r, HALF).to(ACC)
        b_x2 = load_rows(p_x + HALF, o_t, o_d, stride_xt, m_r, HALF).to(ACC)
        store_rows(p_y, b_x1 * b_cos1 - b_x2 * b_sin1, o_t, o_d, stride_yt, m_r, HALF)
        store_rows(p_y + HALF, b_x2 * b_cos2 + b_x1 * b_sin2, o_t, o_d, stride_yt, m_r, HALF)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool = False) -> Tensor:
    """See `nsattn.rotary.rotate`; with `backward` its transpose, which is its gradient."""
    T, H, D = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        grid = (cdiv(T, TOKENS), cdiv(H, HEADS))
        sizes = {"HALF": D // 2, "BHALF": next_power_of_2(D // 2), "BT": TOKENS, "HEADS": HEADS}
        _rotate_kernel[grid](
            x, cos, sin, y, T, H, x.stride(0), x.stride(1), y.stride(0), cos.stride(0), sin.stride(0), **sizes,
            BACKWARD=backward, num_warps=4,
        )  # fmt: skip
    return y
