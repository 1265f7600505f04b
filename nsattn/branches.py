"""The only boundary to autograd and torch.compile: one operator of torch per operation, forward and backward.

A plan crosses the boundary as its tables and sizes, so that compiled graphs see plain arguments. Fakes give the real
shapes, dtypes and contiguous strides. The reference needs no op: it is called directly and autograd sees through it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsattn import dispatch
from nsattn.config import NSAConfig
from nsattn.kernels import reference
from nsattn.operators import operator
from nsattn.plan import Plan


def compress(x: Tensor, params: tuple[Tensor, ...], plan: Plan, *, method: str, impl: str) -> Tensor:
    """Eq 7. See `nsattn.compress`."""
    if impl == "reference":
        return reference.compress(x, params, plan, method=method)
    a, b, c, d, e = (*(p.contiguous() for p in params), None, None, None, None, None)[:5]
    return _compress(_rows(x), a, b, c, d, e, *plan.pack(), method, impl)


def attend_compressed(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, plan: Plan, *, scale: float, workspace: int, impl: str
) -> tuple[Tensor, Tensor]:
    """Eq 8. See `nsattn.attend_compressed`."""
    if impl == "reference":
        return reference.attend_compressed(q, k_cmp, v_cmp, plan, scale=scale)
    return _attend_compressed(_rows(q), _rows(k_cmp), _rows(v_cmp), None, *plan.pack(), scale, workspace, impl)


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse_cmp: Tensor, plan: Plan, *, scale: float, workspace: int, impl: str
) -> Tensor:
    """Eq 9, 10, without gradient. An op of its own, so that a checkpoint policy can save its result."""
    q, k_cmp, lse_cmp = q.detach(), k_cmp.detach(), lse_cmp.detach()
    if impl == "reference":
        return reference.select_blocks(q, k_cmp, lse_cmp, plan, scale=scale)
    return _select_blocks(_rows(q), _rows(k_cmp), lse_cmp.contiguous(), *plan.pack(), scale, workspace, impl)


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, block_idx: Tensor, plan: Plan, *, scale: float, workspace: int, impl: str
) -> tuple[Tensor, Tensor]:
    """Eq 11, 12. See `nsattn.attend_selected`."""
    if impl == "reference":
        return reference.attend_selected(q, k, v, block_idx, plan, scale=scale)
    block_idx = block_idx.contiguous()
    return _attend_selected(_rows(q), _rows(k), _rows(v), block_idx, *plan.pack(), scale, workspace, impl)


def attend_window(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, workspace: int, impl: str
) -> tuple[Tensor, Tensor]:
    """Section 3.3.3. See `nsattn.attend_window`."""
    if impl == "reference":
        return reference.attend_window(q, k, v, plan, scale=scale)
    return _attend_window(_rows(q), _rows(k), _rows(v), None, *plan.pack(), scale, workspace, impl)


def combine(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor, *, impl: str) -> Tensor:
    """Eq 5. See `nsattn.combine`."""
    if impl == "reference":
        return reference.combine(o_cmp, o_slc, o_win, gates)
    return _combine(o_cmp.contiguous(), o_slc.contiguous(), o_win.contiguous(), gates.contiguous(), impl)


class Impls(NamedTuple):
    """Names of the kernels of `attend_gated`."""

    attend_compressed: str  # of its backward
    attend_selected: str
    attend_window: str
    combine: str


def attend_gated(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_win: Tensor | None, v_win: Tensor | None,
    o_cmp: Tensor, lse_cmp: Tensor, gates: Tensor, block_idx: Tensor, plan: Plan, *, scale: float, workspace: int,
    impls: Impls,
) -> Tensor:
    """The selected branch, the window, and the gated sum of all three, Eq 5; with the gradients of all three.

    It gives what `attend_selected`, `attend_window` and `combine` give, by the same kernels. As one operation its
    backward reads no output twice, adds the branches' gradients up where they arise, and is one step of autograd.

    Args:
        k_win, v_win: None where the window shares k and v.
        o_cmp, lse_cmp: of `attend_compressed`, without gradient: k_cmp and v_cmp get theirs here.
        impls: kernels, not the reference.
    """
    k_win, v_win = (None if x is None else _rows(x) for x in (k_win, v_win))
    o, *_ = _attend_gated(
        _rows(q), _rows(k), _rows(v), _rows(k_cmp), _rows(v_cmp), k_win, v_win, o_cmp.detach(), lse_cmp.detach(),
        gates.contiguous(), block_idx.contiguous(), *plan.pack(), scale, workspace, *impls,
    )
    return o


def nsa_decode(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, k_win: Tensor, v_win: Tensor,
    cache_seqlens: Tensor, block_table: Tensor | None, config: NSAConfig, *, scale: float, workspace: int, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Eq 5 and 8 to 12 over a cache, without gradient. See `nsattn.nsa_decode`."""
    if impl == "reference":
        return reference.nsa_decode(
            q, k, v, k_cmp, v_cmp, gates, k_win, v_win, cache_seqlens, block_table, config, scale=scale
        )
    q, k, v, k_cmp, v_cmp, gates, k_win, v_win = map(_rows, (q, k, v, k_cmp, v_cmp, gates, k_win, v_win))
    return _nsa_decode(
        q, k, v, k_cmp, v_cmp, gates, k_win, v_win, cache_seqlens, block_table, list(config.sizes()), scale,
        workspace, impl,
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding by the kernel. See `nsattn.rotary.rotate`."""
    return _rotate(_rows(x), _rows(cos), _rows(sin), False)


def _rows(x: Tensor) -> Tensor:
    """Kernels take any strides of rows and heads, but head vectors must be contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch on the device of the tensors, not on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _new(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# compress. Its parameters are five optional tensors, since autograd handles lists of tensors in Python, which takes
# longer than a launch.


def _given(*params: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(p for p in params if p is not None)


@operator("compress")
def _compress(
    x: Tensor, a: Tensor | None, b: Tensor | None, c: Tensor | None, d: Tensor | None, e: Tensor | None,
    tables: Tensor, sizes: Sequence[int], method: str, impl: str,
) -> Tensor:
    function = dispatch.load("compress", impl).compress
    with _on(x):
        return function(x, _given(a, b, c, d, e), Plan.unpack(tables, sizes), method=method)


@_compress.register_fake
def _(x, a, b, c, d, e, tables, sizes, method, impl):
    last = {"linear": a, "mlp": d}.get(method, x)
    return _new(x, Plan.unpack(tables, sizes).total_cmp, x.shape[1], last.shape[-1])


@torch.library.custom_op("nsattn::compress_bwd", mutates_args=())
def _compress_bwd(
    dy: Tensor, x: Tensor, params: Sequence[Tensor], tables: Tensor, sizes: Sequence[int], method: str, impl: str
) -> list[Tensor]:
    function = dispatch.load("compress", impl).compress_bwd
    with _on(x):
        return list(function(dy, x, tuple(params), Plan.unpack(tables, sizes), method=method))


@_compress_bwd.register_fake
def _(dy, x, params, tables, sizes, method, impl):
    return [_new(x, *x.shape), *(_new(p, *p.shape) for p in params)]


def _compress_setup(ctx, inputs, output):
    x, *params, tables, sizes, method, impl = inputs
    ctx.save_for_backward(x, tables, *_given(*params))
    ctx.options = (sizes, method, impl)


def _compress_backward(ctx, dy):
    x, tables, *params = ctx.saved_tensors
    dx, *dparams = _compress_bwd(dy.contiguous(), x, params, tables, *ctx.options)
    return dx, *dparams, *[None] * (9 - len(dparams))


_compress.register_autograd(_compress_backward, setup_context=_compress_setup)


# The three attention branches share one schema; only one has block_idx.


def _define_attention(operation: str):
    @operator(operation)
    def forward(
        q: Tensor, k: Tensor, v: Tensor, block_idx: Tensor | None, tables: Tensor, sizes: Sequence[int], scale: float,
        workspace: int, impl: str,
    ) -> tuple[Tensor, Tensor]:
        extra = () if block_idx is None else (block_idx,)
        function = getattr(dispatch.load(operation, impl), operation)
        with _on(q):
            return function(q, k, v, *extra, Plan.unpack(tables, sizes), scale=scale, workspace=workspace)

    @forward.register_fake
    def _(q, k, v, block_idx, tables, sizes, scale, workspace, impl):
        rows = q.shape[:2]
        return _new(q, *rows, v.shape[-1]), _new(q, *rows, dtype=_statistics_dtype(q))

    @torch.library.custom_op(f"nsattn::{operation}_bwd", mutates_args=())
    def backward(
        do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
        block_idx: Tensor | None, tables: Tensor, sizes: Sequence[int], scale: float, workspace: int, impl: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        extra = () if block_idx is None else (block_idx,)
        function = getattr(dispatch.load(operation, impl), f"{operation}_bwd")
        plan = Plan.unpack(tables, sizes)
        with _on(q):
            return function(do, dlse, q, k, v, o, lse, *extra, plan, scale=scale, workspace=workspace)

    @backward.register_fake
    def _(do, dlse, q, k, v, o, lse, block_idx, tables, sizes, scale, workspace, impl):
        return _new(q, *q.shape), _new(k, *k.shape), _new(v, *v.shape)

    def setup(ctx, inputs, output):
        q, k, v, block_idx, tables, sizes, scale, workspace, impl = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, *output, block_idx, tables)
        ctx.options = (sizes, scale, workspace, impl)

    def gradient(ctx, do, dlse):
        q, k, v, o, lse, block_idx, tables = ctx.saved_tensors
        sizes, scale, workspace, impl = ctx.options
        if do is None and dlse is None:
            return None, None, None, None, None, None, None, None, None
        do = torch.zeros_like(o) if do is None else do.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        dq, dk, dv = backward(do, dlse, q, k, v, o, lse, block_idx, tables, sizes, scale, workspace, impl)
        return dq, dk, dv, None, None, None, None, None, None

    forward.register_autograd(gradient, setup_context=setup)
    return forward


_attend_compressed = _define_attention("attend_compressed")
_attend_selected = _define_attention("attend_selected")
_attend_window = _define_attention("attend_window")


# select_blocks


@torch.library.custom_op("nsattn::select_blocks", mutates_args=())
def _select_blocks(
    q: Tensor, k_cmp: Tensor, lse_cmp: Tensor, tables: Tensor, sizes: Sequence[int], scale: float, workspace: int,
    impl: str,
) -> Tensor:
    plan = Plan.unpack(tables, sizes)
    with _on(q):
        return dispatch.load("select_blocks", impl).select_blocks(
            q, k_cmp, lse_cmp, plan, scale=scale, workspace=workspace
        )


@_select_blocks.register_fake
def _(q, k_cmp, lse_cmp, tables, sizes, scale, workspace, impl):
    config = Plan.unpack(tables, sizes).config
    return _new(q, q.shape[0], k_cmp.shape[1], config.num_selected, dtype=torch.int32)


# nsa_decode


@torch.library.custom_op("nsattn::nsa_decode", mutates_args=())
def _nsa_decode(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, k_win: Tensor, v_win: Tensor,
    cache_seqlens: Tensor, block_table: Tensor | None, config: Sequence[int], scale: float, workspace: int, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with _on(q):
        return dispatch.load("nsa_decode", impl).nsa_decode(
            q, k, v, k_cmp, v_cmp, gates, k_win, v_win, cache_seqlens, block_table, NSAConfig(*config), scale=scale,
            workspace=workspace,
        )


@_nsa_decode.register_fake
def _(q, k, v, k_cmp, v_cmp, gates, k_win, v_win, cache_seqlens, block_table, config, scale, workspace, impl):
    rows = q.shape[:3]
    lse = [_new(q, *rows, dtype=_statistics_dtype(q)) for _ in range(3)]
    num_selected = NSAConfig(*config).num_selected
    return _new(q, *rows, v.shape[-1]), *lse, _new(q, *q.shape[:2], k.shape[2], num_selected, dtype=torch.int32)


# combine


@operator("combine")
def _combine(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor, impl: str) -> Tensor:
    with _on(o_cmp):
        return dispatch.load("combine", impl).combine(o_cmp, o_slc, o_win, gates)


@_combine.register_fake
def _(o_cmp, o_slc, o_win, gates, impl):
    return _new(o_cmp, *o_cmp.shape)


@torch.library.custom_op("nsattn::combine_bwd", mutates_args=())
def _combine_bwd(
    do: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with _on(do):
        return dispatch.load("combine", impl).combine_bwd(do, o_cmp, o_slc, o_win, gates)


@_combine_bwd.register_fake
def _(do, o_cmp, o_slc, o_win, gates, impl):
    return tuple(_new(x, *x.shape) for x in (o_cmp, o_slc, o_win, gates))


def _combine_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.impl = inputs[4]


def _combine_backward(ctx, do):
    return *_combine_bwd(do.contiguous(), *ctx.saved_tensors, ctx.impl), None


_combine.register_autograd(_combine_backward, setup_context=_combine_setup)


# attend_gated


@operator("attend_gated")
def _attend_gated(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_win: Tensor | None, v_win: Tensor | None,
    o_cmp: Tensor, lse_cmp: Tensor, gates: Tensor, block_idx: Tensor, tables: Tensor, sizes: Sequence[int],
    scale: float, workspace: int, impl_cmp: str, impl_slc: str, impl_win: str, impl_combine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    plan, options = Plan.unpack(tables, sizes), {"scale": scale, "workspace": workspace}
    window = (k, v) if k_win is None else (k_win, v_win)
    with _on(q):
        o_slc, lse_slc = dispatch.load("attend_selected", impl_slc).attend_selected(
            q, k, v, block_idx, plan, **options
        )
        o_win, lse_win = dispatch.load("attend_window", impl_win).attend_window(q, *window, plan, **options)
        o = dispatch.load("combine", impl_combine).combine(o_cmp, o_slc, o_win, gates)
    return o, o_slc, lse_slc, o_win, lse_win


@_attend_gated.register_fake
def _(q, k, v, k_cmp, v_cmp, k_win, v_win, o_cmp, lse_cmp, *rest):
    return tuple(_new(x, *x.shape) for x in (o_cmp, o_cmp, lse_cmp, o_cmp, lse_cmp))


@torch.library.custom_op("nsattn::attend_gated_bwd", mutates_args=())
def _attend_gated_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_win: Tensor | None,
    v_win: Tensor | None, o_cmp: Tensor, lse_cmp: Tensor, gates: Tensor, block_idx: Tensor, o_slc: Tensor,
    lse_slc: Tensor, o_win: Tensor, lse_win: Tensor, tables: Tensor, sizes: Sequence[int], scale: float,
    workspace: int, impl_cmp: str, impl_slc: str, impl_win: str, impl_combine: str,
) -> list[Tensor]:
    """dq, dk, dv, dk_cmp, dv_cmp, dgates and, where the window has its own pair, dk_win, dv_win."""
    plan, options = Plan.unpack(tables, sizes), {"scale": scale, "workspace": workspace}
    compressed, selected, window = (
        getattr(dispatch.load(name, impl), f"{name}_bwd")
        for name, impl in (
            ("attend_compressed", impl_cmp), ("attend_selected", impl_slc), ("attend_window", impl_win)
        )
    )
    with _on(q):
        deltas = _new(lse_cmp, 3, *lse_cmp.shape)
        *dos, dgates = dispatch.load("combine", impl_combine).combine_bwd(do, o_cmp, o_slc, o_win, gates, deltas)
        do_win, do_slc, do_cmp = dos.pop(), dos.pop(), dos.pop()  # each goes when its branch is done
        dq, dk_cmp, dv_cmp = compressed(
            do_cmp, None, q, k_cmp, v_cmp, o_cmp, lse_cmp, plan, **options, delta=deltas[0]
        )
        del do_cmp
        pair = (k, v) if k_win is None else (k_win, v_win)
        dq, *dkv_win = window(do_win, None, q, *pair, o_win, lse_win, plan, **options, delta=deltas[2], dq=dq)
        del do_win
        dkv = tuple(dkv_win) if k_win is None else None
        dq, dk, dv = selected(
            do_slc, None, q, k, v, o_slc, lse_slc, block_idx, plan, **options, delta=deltas[1], dq=dq, dkv=dkv
        )
    return [dq, dk, dv, dk_cmp, dv_cmp, dgates, *([] if k_win is None else dkv_win)]


@_attend_gated_bwd.register_fake
def _(do, q, k, v, k_cmp, v_cmp, k_win, v_win, o_cmp, lse_cmp, gates, *rest):
    own = () if k_win is None else (k_win, v_win)
    return [_new(x, *x.shape) for x in (q, k, v, k_cmp, v_cmp, gates, *own)]


def _attend_gated_setup(ctx, inputs, output):
    *tensors, sizes, scale, workspace, impl_cmp, impl_slc, impl_win, impl_combine = inputs
    *tensors, tables = tensors
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:], tables)
    ctx.mark_non_differentiable(*output[1:])
    ctx.options = (sizes, scale, workspace, impl_cmp, impl_slc, impl_win, impl_combine)


def _attend_gated_backward(ctx, do, *_):
    if do is None:
        return (None,) * 19
    grads = _attend_gated_bwd(do.contiguous(), *ctx.saved_tensors, *ctx.options)
    dq, dk, dv, dk_cmp, dv_cmp, dgates, *own = grads
    dk_win, dv_win = own or (None, None)
    return dq, dk, dv, dk_cmp, dv_cmp, dk_win, dv_win, None, None, dgates, *(None,) * 9


_attend_gated.register_autograd(_attend_gated_backward, setup_context=_attend_gated_setup)


# rotate


@operator("rotate")
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    from nsattn.kernels import rotate_triton

    with _on(x):
        return rotate_triton.rotate(x, cos, sin, backward=backward)


@_rotate.register_fake
def _(x, cos, sin, backward):
    return _new(x, *x.shape)


def _rotate_setup(ctx, inputs, output):
    _, cos, sin, backward = inputs
    ctx.save_for_backward(cos, sin)
    ctx.transposed = not backward


def _rotate_backward(ctx, dy):
    return _rotate(_rows(dy), *ctx.saved_tensors, ctx.transposed), None, None, None


_rotate.register_autograd(_rotate_backward, setup_context=_rotate_setup)
