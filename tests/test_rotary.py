"""Rotary embedding: the tables, the definition, and the kernel against it."""

from __future__ import annotations

import pytest
import torch

from nsattn import branches
from nsattn.rotary import rotary_tables, rotate

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def make(T: int, H: int, D: int, dtype: torch.dtype, table_dtype: torch.dtype):
    """x as a part of a wider tensor, as keys of separate branches are, and tables whose two halves differ."""
    x = torch.randn(T, H + 2, D, device=DEVICE, dtype=dtype)[:, 1:-1]
    angle = torch.randn(T, 1, D, device=DEVICE)
    return x.requires_grad_(), angle.cos().to(table_dtype), angle.sin().to(table_dtype)


@pytest.mark.parametrize(("T", "H", "D"), [(21, 5, 16), (3, 1, 80), (33, 4, 128), (0, 2, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_follows_the_definition(T, H, D, dtype):
    """Forward and gradient, with tables in float32: one rounding at the end, and nothing before."""
    x, cos, sin = make(T, H, D, dtype, torch.float32)
    dy = torch.randn(T, H, D, device=DEVICE, dtype=dtype)
    y = branches.rotate(x, cos, sin)
    want = rotate(x, cos, sin, impl="reference")
    assert y.dtype == want.dtype == dtype
    torch.testing.assert_close(y, want)
    got = torch.autograd.grad(y, x, dy)[0]
    exact = x.detach().double().requires_grad_()
    wanted = torch.autograd.grad(rotate(exact, cos, sin, impl="reference"), exact, dy.double())[0]
    torch.testing.assert_close(got, wanted.to(dtype))


def test_tables_of_few_bits():
    """As Hugging Face models make them: the kernel is closer to exact arithmetic than the definition, which rounds
    three times. In float16, because Triton's interpreter cuts bfloat16 off instead of rounding it."""
    x, cos, sin = make(40, 3, 64, torch.float16, torch.float16)
    exact = rotate(x.double(), cos, sin, impl="reference")
    kernel, definition = branches.rotate(x, cos, sin), rotate(x, cos, sin, impl="reference")
    assert (kernel - exact).norm() < (definition - exact).norm() < 0.01 * exact.norm()


def test_opcheck():
    x, cos, sin = make(20, 3, 32, torch.float32, torch.float32)
    torch.library.opcheck(branches._rotate.default, (x, cos, sin, False))


def test_rotation_is_relative():
    """Products of two rotated vectors depend on the distance of their positions; position 0 changes nothing."""
    q, k = torch.randn(2, 1, 1, 32, dtype=torch.float64).unbind()

    def at(x, position):
        return rotate(x, *rotary_tables(torch.tensor([position]), 32, 10000.0, x.dtype))

    torch.testing.assert_close(at(q, 0), q)
    torch.testing.assert_close((at(q, 19) * at(k, 7)).sum(), (at(q, 112) * at(k, 100)).sum())
    assert not torch.allclose((at(q, 19) * at(k, 7)).sum(), (q * k).sum())
