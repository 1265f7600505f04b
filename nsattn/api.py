"""The public functions: Native Sparse Attention as a whole, and each of its six operations.

Layout: packed `[T, H, D]` with int32 `cu_seqlens` (as in flash-attn's varlen functions), or batched `[Bsz, S, H, D]`,
which is the same data seen as Bsz sequences of length S. Queries may be fewer than keys (cached keys): query i of a
sequence then sits at position `len_k - len_q + i`.

Common arguments:
    softmax_scale: factor of the scores. Default `1 / sqrt(D)`.
    config: block sizes, `NSAConfig`. Default: the paper's.
    cu_seqlens, max_seqlen: where packed sequences start, int32 `[n + 1]`, and an optional upper bound on their length,
        which sizes scratch memory. Nothing here waits for the GPU, with or without it; so a bound that is too low is
        found on a CPU only, and on a GPU gives wrong results.
    cu_seqlens_k, max_seqlen_k: the same for keys, where they are not as many as the queries.
    plan: all of that in one object (`make_plan`), to build it once for many layers instead of in every call.
    impl: `auto`, `reference`, `triton` (kernels for any GPU), or for the selected branch `kvmajor_sm90`, `kvmajor`,
        `qmajor` (the other operations keep their best). A single operation also takes its own names, such as
        `triton_sm90`. See `nsattn why`.
    workspace: bytes of scratch memory that one operation may use.

Common errors: TypeError and ValueError for arguments that do not fit, with what was got, what is needed and what to do;
ValueError for sizes outside the kernels' range; NotImplementedError for a kernel asked for by name that this machine
cannot run.

Common numerics: scores, softmax statistics and accumulators are float32 (float64 for float64 inputs), but the reference
multiplies in the type of its inputs, so that in 16 bit its scores are rounded to 16 bit. Probabilities are rounded to
the input type before they meet the values. `lse` is the natural logarithm. Results repeat bit for bit and do not depend
on what else is in the batch. Under autocast, inputs are cast to its dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsattn import branches, checks, dispatch
from nsattn.config import NSAConfig
from nsattn.plan import Plan, make_plan, uniform_cu_seqlens

DEFAULT_CONFIG = NSAConfig()
WORKSPACE = 1 << 30  # 1 GiB


class NSAOutput(NamedTuple):
    """What `nsa_attention` returns with `return_lse=True`."""

    o: Tensor  # like q, with the head dim of v
    lse_cmp: Tensor  # natural log-sum-exp of each branch, [T, Hq] or [Bsz, S, Hq]
    lse_slc: Tensor
    lse_win: Tensor
    block_idx: Tensor  # int32 [T, Hkv, N] or [Bsz, S, Hkv, N]


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gates: Tensor,
    k_cmp: Tensor | None = None,
    v_cmp: Tensor | None = None,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    block_idx: Tensor | None = None,
    softmax_scale: float | None = None,
    config: NSAConfig = DEFAULT_CONFIG,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    plan: Plan | None = None,
    return_lse: bool = False,
    impl: str = "auto",
    workspace: int = WORKSPACE,
) -> Tensor | NSAOutput:
    """Native Sparse Attention, Eq 5: o = sum over c in {cmp, slc, win} of g_c * Attn(q, K_c, V_c), causal.

    Compressed blocks are attended to (Eq 8), their probabilities pick blocks of tokens (Eq 9, 10), the picked blocks
    (Eq 11, 12) and a sliding window are attended to, and the gates add up the three results.

    Args:
        q: queries `[T, Hq, D]` or `[Bsz, S, Hq, D]`; bfloat16 or float16 for the kernels, any float for the reference.
        k: keys `[T, Hkv, D]` (or batched) of the selected branch, and of the window unless `k_win` is given. Query
            head h reads KV head `h // (Hq // Hkv)`. Rotate q and k before the call.
        v: values `[T, Hkv, Dv]` (or batched).
        gates: `[T, Hq, 3]` (or batched), the weights of cmp, slc, win in this order. The paper's are sigmoids.
        k_cmp, v_cmp: compressed keys and values, as `compress` returns them. Default: the mean of each block of k and v
            (no parameters; the paper learns the compression, see `NSAttention`).
        k_win, v_win: own keys and values of the window branch, which the paper trains apart. Default: k and v.
        block_idx: a selection to use instead of computing it, int32 `[T, Hkv, N]` (or batched). See `attend_selected`.
        return_lse: return an `NSAOutput` with the log-sum-exps and the selection instead of o alone.

    Returns:
        o, `[T, Hq, Dv]` (or batched) in the dtype of q. Rows past `cu_seqlens[-1]` are zero, where the
        gates of these rows are finite.

    Raises:
        TypeError, ValueError, NotImplementedError: see the module's docstring.

    Numerics: gradients reach q, k, v, the compressed pair, the window pair and the gates; the selection has none, the
        compressed branch trains the scores.

    Source: arXiv 2502.11089 section 3; schedule of the selected branch: arXiv 2508.18224.
    """
    if (k_cmp is None) != (v_cmp is None):
        raise ValueError("k_cmp and v_cmp must be given together, got one of them. Pass both or neither.")
    if (k_win is None) != (v_win is None):
        raise ValueError("k_win and v_win must be given together, got one of them. Pass both or neither.")
    q, k, v, gates, k_cmp, v_cmp, k_win, v_win = autocast(q, k, v, gates, k_cmp, v_cmp, k_win, v_win)
    checks.check_queries(q)
    checks.check_pair(q, k, v, ("k", "v"))
    checks.check_beside("gates", gates, q, (*q.shape[:-1], 3), "[..., Hq, 3]")
    plan = _plan(q, k, config, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, plan)
    if k_cmp is not None and v_cmp is not None:
        checks.check_pair(q, k_cmp, v_cmp, ("k_cmp", "v_cmp"))
        checks.check_head_dim(v, v_cmp, "v_cmp")
        checks.check_shape("k_cmp", k_cmp, (*k_cmp.shape[:-2], *k.shape[-2:]), "[..., Hkv, D] with the heads of k")
    if k_win is not None and v_win is not None:
        checks.check_pair(q, k_win, v_win, ("k_win", "v_win"))
        checks.check_head_dim(v, v_win, "v_win")
        checks.check_rows("k_win", _packed(k_win), plan.total_k, "keys")
    options = {"softmax_scale": softmax_scale, "plan": plan, "impl": impl}

    if k_cmp is None or v_cmp is None:
        k_cmp = compress(k, plan=plan, impl=impl)
        v_cmp = compress(v, plan=plan, impl=impl)
    impls = None if return_lse else gated_impls(q, k, v, k_cmp, v_cmp, k_win, v_win, plan, impl)
    detached = (x if impls is None else x.detach() for x in (q, k_cmp, v_cmp))
    o_cmp, lse_cmp = attend_compressed(*detached, return_lse=True, workspace=workspace, **options)
    if block_idx is None:
        block_idx = select_blocks(q, k_cmp, lse_cmp, workspace=workspace, **options)
    if impls is not None:
        checks.check_block_idx(block_idx, q, k.shape[-2])
        k_win, v_win = (None if x is None else _packed(x) for x in (k_win, v_win))
        o = branches.attend_gated(
            _packed(q), _packed(k), _packed(v), _packed(k_cmp), _packed(v_cmp), k_win, v_win, _packed(o_cmp),
            _packed(lse_cmp, 2), _packed(gates), _packed(block_idx), plan, scale=scale_of(q, softmax_scale),
            workspace=workspace, impls=impls,
        )  # fmt: skip
        return o if q.dim() == 3 else o.unflatten(0, tuple(q.shape[:2]))
    o_slc, lse_slc = attend_selected(q, k, v, block_idx, return_lse=True, workspace=workspace, **options)
    window = (k, v) if k_win is None or v_win is None else (k_win, v_win)
    o_win, lse_win = attend_window(q, *window, return_lse=True, workspace=workspace, **options)
    o = combine(o_cmp, o_slc, o_win, gates, impl=impl)
    return NSAOutput(o, lse_cmp, lse_slc, lse_win, block_idx) if return_lse else o


def compress(
    x: Tensor,
    *,
    method: str = "mean",
    params: tuple[Tensor, ...] = (),
    config: NSAConfig = DEFAULT_CONFIG,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    plan: Plan | None = None,
    impl: str = "auto",
) -> Tensor:
    """Eq 7: compressed row i = phi(x[i*d : i*d + l]), for every i with i*d + l <= length, per KV head.

    Args:
        x: keys before rotation, or values, `[T, Hkv, D]` or `[Bsz, S, Hkv, D]`.
        method, params: phi and its parameters, one set per KV head h, in any float dtype (products run in that of x):
            `mean`, (): the mean of the block.
            `linear`, (weight `[Hkv, l, D, Do]`, bias `[Hkv, Do]`): sum_j x_j @ weight_j + bias.
            `mlp`, (pe `[Hkv, l, D]`, w1 `[Hkv, l, D, F]`, b1 `[Hkv, F]`, w2 `[Hkv, F, Do]`, b2 `[Hkv, Do]`):
                silu(sum_j (x_j + pe_j) @ w1_j + b1) @ w2 + b2, the paper's MLP with intra-block position encoding.
            `gated`, (weight `[Hkv, D]`, pe `[Hkv, l]`): sum_j softmax_j(x_j . weight + pe_j) * x_j.

    Returns:
        `[plan.total_cmp, Hkv, Do]` packed, `T // d` rows or fewer where lengths or `max_seqlen` show that they suffice:
        those of sequence s start at `plan.cu_cmp[s]`, rows past the last are zero; or `[Bsz, blocks, Hkv, Do]` batched.
        Dtype of x. A sequence shorter than l has no rows. Give the same lengths, or the plan, to what reads them.

    Raises:
        TypeError, ValueError, NotImplementedError: see the module's docstring.

    Numerics: float32 accumulation; parameter gradients are summed in float32 in a fixed order.

    Source: arXiv 2502.11089 section 3.3.1.
    """
    (x,) = autocast(x)
    checks.check_tensor("x", x, (3, 4), "[T, Hkv, D] (packed) or [Bsz, S, Hkv, D]")
    checks.check_float("x", x)
    plan = _plan(x, x, config, cu_seqlens, max_seqlen, None, None, plan, keys_only=True)
    checks.check_compression(x, method, params, plan.config)
    rows = _packed(x)
    checks.check_rows("x", rows, plan.total_k, "keys")
    shape = dispatch.Shape(x.device.type, x.dtype, head_dim=x.shape[-1])
    y = branches.compress(rows, params, plan, method=method, impl=dispatch.resolve("compress", impl, shape))
    return y if x.dim() == 3 else y.unflatten(0, (x.shape[0], plan.max_cmp))


def attend_compressed(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    softmax_scale: float | None = None,
    config: NSAConfig = DEFAULT_CONFIG,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    plan: Plan | None = None,
    return_lse: bool = False,
    impl: str = "auto",
    workspace: int = WORKSPACE,
) -> Tensor | tuple[Tensor, Tensor]:
    """Eq 8: o = Softmax(scale * q K_cmp^T) V_cmp over the compressed blocks i with i*d + l - 1 <= t.

    Args:
        q: `[T, Hq, D]` or `[Bsz, S, Hq, D]`.
        k_cmp, v_cmp: `[T // d, Hkv, D]`, `[T // d, Hkv, Dv]` or `[Bsz, blocks, Hkv, ...]`, from `compress`. For fewer
            queries than keys pass `plan`.
        return_lse: return (o, lse).
        workspace: bytes that lists and partial gradients of keys may take in the backward (`triton_sm90`).
            Less means more launches. Where one KV head does not fit, the last bits of dk and dv depend on the total
            length.

    Returns:
        o like q with the head dim of v_cmp; lse float32 `[T, Hq]` (or batched), natural logarithm of the sum of
        exp(scale * q . k). A row that sees no block (t < l - 1) gives o = 0, lse = -inf.

    Raises:
        TypeError, ValueError, NotImplementedError: see the module's docstring.

    Numerics: float32 scores and accumulators; gradients reach q, k_cmp, v_cmp, through o and through lse.

    Source: arXiv 2502.11089 section 3.3.1; online softmax as in FlashAttention-2.
    """
    q, k_cmp, v_cmp = autocast(q, k_cmp, v_cmp)
    checks.check_queries(q)
    checks.check_pair(q, k_cmp, v_cmp, ("k_cmp", "v_cmp"))
    plan = _plan(q, None, config, cu_seqlens, max_seqlen, None, None, plan)
    checks.check_rows("k_cmp", _packed(k_cmp), plan.total_cmp, "compressed rows")
    impl = dispatch.resolve("attend_compressed", impl, _shape(q, k_cmp, v_cmp, plan))
    o, lse = branches.attend_compressed(
        _packed(q), _packed(k_cmp), _packed(v_cmp), plan, scale=scale_of(q, softmax_scale), workspace=workspace,
        impl=impl,
    )  # fmt: skip
    return _result(q, o, lse, return_lse)


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse_cmp: Tensor,
    *,
    softmax_scale: float | None = None,
    config: NSAConfig = DEFAULT_CONFIG,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    plan: Plan | None = None,
    impl: str = "auto",
    workspace: int = WORKSPACE,
) -> Tensor:
    """Eq 9, 10: the N blocks of B tokens with the largest importance, for every query token and KV head.

    importance[j] = sum over the heads of the group, sum_{m < B/d}, sum_{n < l/d} of p_cmp[j*B/d + m - n], with
    p_cmp = exp(scale * q . k_cmp - lse_cmp). Block j is visible iff j*B <= t. The first `init_blocks` and the
    `local_blocks` latest blocks are always chosen and count towards N; ties go to the lower index; with at most N
    visible blocks all are chosen.

    Args:
        q, k_cmp: as in `attend_compressed`.
        lse_cmp: its log-sum-exp, `[T, Hq]` (or batched), natural.

    Returns:
        int32 `[T, Hkv, N]` (or batched): block indices inside the sequence, ascending, unused slots -1. No gradient.

    Raises:
        TypeError, ValueError, NotImplementedError: see the module's docstring.

    Numerics: scores in float32; the choice is exact for them, deterministic, and never stores a [T, T/d] matrix.

    Source: arXiv 2502.11089 section 3.3.2 (the sign of m in its Eq 9 is a slip: it would leave block j).
    """
    q, k_cmp = autocast(q, k_cmp)
    checks.check_queries(q)
    checks.check_same(q=q, k_cmp=k_cmp)
    checks.check_keys(q, k_cmp, "k_cmp")
    checks.check_beside("lse_cmp", lse_cmp, q, tuple(q.shape[:-1]), "[..., Hq]")
    checks.check_workspace(workspace)
    plan = _plan(q, None, config, cu_seqlens, max_seqlen, None, None, plan)
    checks.check_rows("k_cmp", _packed(k_cmp), plan.total_cmp, "compressed rows")
    impl = dispatch.resolve("select_blocks", impl, _shape(q, k_cmp, None, plan))
    block_idx = branches.select_blocks(
        _packed(q), _packed(k_cmp), _packed(lse_cmp, 2), plan, scale=scale_of(q, softmax_scale), workspace=workspace,
        impl=impl,
    )
    return block_idx if q.dim() == 3 else block_idx.unflatten(0, tuple(q.shape[:2]))


def attend_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_idx: Tensor,
    *,
    softmax_scale: float | None = None,
    config: NSAConfig = DEFAULT_CONFIG,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    plan: Plan | None = None,
    return_lse: bool = False,
    impl: str = "auto",
    workspace: int = WORKSPACE,
) -> Tensor | tuple[Tensor, Tensor]:
    """Eq 11, 12: o = Softmax(scale * q K_slc^T) V_slc over the tokens at or before t in the selected blocks.

    Args:
        q: `[T, Hq, D]` or `[Bsz, S, Hq, D]`.
        k, v: `[T, Hkv, D]`, `[T, Hkv, Dv]` or batched.
        block_idx: int32 `[T, Hkv, N]` (or batched), N from 1 to 64, block indices inside the sequence. A row is a set:
            order does not matter, and entries that repeat, lie in the future or name no block of the sequence
            (-1 included) are ignored. `check_selection` names the first such entry.
        return_lse: return (o, lse).

    Returns:
        o like q with the head dim of v; lse float32 `[T, Hq]` (or batched), natural. A row without a block gives
        o = 0, lse = -inf.

    Raises:
        TypeError, ValueError, NotImplementedError: see the module's docstring.

    Numerics: float32 scores and accumulators; with `kvmajor` the N partial outputs of a row are rounded to the input
        type before they are merged in float32. No float atomics: gradients repeat bit for bit. Where the partials of
        one KV head do not fit the workspace, its dk and dv are added up in float32 over parts of its query heads, then
        over pieces of rows, and their last bits depend on the total length. Scratch: `estimate_memory`.

    Source: arXiv 2502.11089 section 3.3.2; `kvmajor` follows arXiv 2508.18224, `qmajor` the order of the former.
    """
    q, k, v = autocast(q, k, v)
    checks.check_queries(q)
    checks.check_pair(q, k, v, ("k", "v"))
    checks.check_block_idx(block_idx, q, k.shape[-2])
    checks.check_workspace(workspace)
    plan = _plan(q, k, config, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, plan)
    impl = dispatch.resolve("attend_selected", impl, _shape(q, k, v, plan))
    o, lse = branches.attend_selected(
        _packed(q), _packed(k), _packed(v), _packed(block_idx), plan, scale=scale_of(q, softmax_scale),
        workspace=workspace, impl=impl,
    )
    return _result(q, o, lse, return_lse)


def attend_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    config: NSAConfig = DEFAULT_CONFIG,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    plan: Plan | None = None,
    return_lse: bool = False,
    workspace: int = WORKSPACE,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Section 3.3.3: o = Softmax(scale * q K^T) V over the tokens in (t - w, t]: w tokens, the query's own included.

    The same window is `window_size=(w - 1, 0)` in flash-attn and torch's `varlen_attn`, `sliding_window=w` in
    transformers.

    Args:
        q: `[T, Hq, D]` or `[Bsz, S, Hq, D]`.
        k, v: `[T, Hkv, D]`, `[T, Hkv, Dv]` or batched.
        return_lse: return (o, lse).
        workspace: bytes of scratch in the backward (`triton_sm90`), as for `attend_compressed`.

    Returns:
        o like q with the head dim of v; lse float32 `[T, Hq]` (or batched), natural. Rows before the first key (more
        queries than keys) give o = 0, lse = -inf.

    Raises:
        TypeError, ValueError, NotImplementedError: see the module's docstring.

    Numerics: float32 scores and accumulators, deterministic.

    Source: arXiv 2502.11089 section 3.3.3; online softmax as in FlashAttention-2.
    """
    q, k, v = autocast(q, k, v)
    checks.check_queries(q)
    checks.check_pair(q, k, v, ("k", "v"))
    plan = _plan(q, k, config, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, plan)
    checks.check_workspace(workspace)
    impl = dispatch.resolve("attend_window", impl, _shape(q, k, v, plan))
    o, lse = branches.attend_window(
        _packed(q), _packed(k), _packed(v), plan, scale=scale_of(q, softmax_scale), workspace=workspace, impl=impl
    )
    return _result(q, o, lse, return_lse)


def combine(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor, *, impl: str = "auto") -> Tensor:
    """Eq 5: o = g_cmp * o_cmp + g_slc * o_slc + g_win * o_win.

    Args:
        o_cmp, o_slc, o_win: outputs of the branches, `[T, Hq, Dv]` or `[Bsz, S, Hq, Dv]`.
        gates: `[T, Hq, 3]` or batched, in this order; any values (the module applies the sigmoid).

    Returns:
        Like o_cmp.

    Raises:
        TypeError, ValueError, NotImplementedError: see the module's docstring.

    Numerics: products and sum in float32.

    Source: arXiv 2502.11089 Eq 5.
    """
    checks.check_tensor("o_cmp", o_cmp, (3, 4), "[T, Hq, Dv] or [Bsz, S, Hq, Dv]")
    checks.check_float("o_cmp", o_cmp)
    for name, o in (("o_slc", o_slc), ("o_win", o_win)):
        checks.check_beside(name, o, o_cmp, tuple(o_cmp.shape), "the shape of o_cmp")
    checks.check_same(o_cmp=o_cmp, o_slc=o_slc, o_win=o_win)
    checks.check_beside("gates", gates, o_cmp, (*o_cmp.shape[:-1], 3), "[..., Hq, 3]")
    impl = dispatch.resolve("combine", impl, dispatch.Shape(o_cmp.device.type, o_cmp.dtype))
    o = branches.combine(_packed(o_cmp), _packed(o_slc), _packed(o_win), _packed(gates), impl=impl)
    return o.view(o_cmp.shape)


def autocast(*tensors: Tensor | None) -> tuple:
    """Under autocast, float tensors in its dtype, as torch's own attention does."""
    device = next(x for x in tensors if isinstance(x, Tensor)).device.type if any(
        isinstance(x, Tensor) for x in tensors
    ) else "cpu"
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in tensors)


def _plan(
    q: Tensor,
    k: Tensor | None,
    config: NSAConfig,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int | None,
    plan: Plan | None,
    *,
    keys_only: bool = False,
) -> Plan:
    """The plan of a call: the given one, or one made from lengths. `k` None: as many keys as queries."""
    checks.check_lengths(q, cu_seqlens, plan, max_seqlen)
    checks.check_lengths(q, cu_seqlens_k, plan, max_seqlen_k, keys=True)
    checks.check_config(config)
    if plan is not None and config is not DEFAULT_CONFIG:
        checks.check_plan_config(plan, config)
    if plan is None:
        if q.dim() == 4:
            cu_seqlens, max_seqlen = uniform_cu_seqlens(q.shape[0], q.shape[1], q.device), q.shape[1]
            if k is not None and k.shape[1] != q.shape[1]:
                cu_seqlens_k, max_seqlen_k = uniform_cu_seqlens(k.shape[0], k.shape[1], k.device), k.shape[1]
        assert cu_seqlens is not None, "check_lengths asks packed input for it"
        checks.check_cu_seqlens("cu_seqlens", cu_seqlens, q)
        if cu_seqlens_k is not None:
            checks.check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q)
            checks.check_shape("cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens.shape), "as long as cu_seqlens")
        plan = make_plan(
            cu_seqlens,
            _packed(q).shape[0],
            config=config,
            max_seqlen=max_seqlen,
            cu_seqlens_k=cu_seqlens_k,
            total_k=None if k is None else _packed(k).shape[0],
            max_seqlen_k=max_seqlen_k,
        )
    if not keys_only:
        checks.check_rows("q", _packed(q), plan.total_q, "queries")
        if k is not None:
            checks.check_rows("k", _packed(k), plan.total_k, "keys")
    return plan


def _packed(x: Tensor, dims: int = 3) -> Tensor:
    """[Bsz, S, ...] seen as [T, ...]."""
    return x if x.dim() == dims else x.flatten(0, 1)


def _shape(q: Tensor, k: Tensor, v: Tensor | None, plan: Plan) -> dispatch.Shape:
    return dispatch.Shape(
        device=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        v_head_dim=None if v is None else v.shape[-1],
        group=q.shape[-2] // k.shape[-2],
        max_blocks=plan.max_blk,
        capability=dispatch.capability(q.device.type, q.device.index),
        # Traced code serves many lengths: it gets the choice for long ones.
        rows=None if torch.compiler.is_compiling() else plan.total_q * k.shape[-2],
        slc_block=int(plan.config.slc_block),  # symbols of a compiler become numbers: `dispatch` prints them
        num_selected=int(plan.config.num_selected),
        overlap=plan.config.overlap,
        keys_per_block=plan.config.keys_per_block,
        backward=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad),
    )


def gated_impls(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_win: Tensor | None, v_win: Tensor | None,
    plan: Plan, impl: str,
) -> branches.Impls | None:
    """The kernels of the operations that `branches.attend_gated` joins; None if one of them is the reference."""
    window = (k, v) if k_win is None or v_win is None else (k_win, v_win)
    shapes = {
        "attend_compressed": _shape(q, k_cmp, v_cmp, plan),
        "attend_selected": _shape(q, k, v, plan),
        "attend_window": _shape(q, *window, plan),
        "combine": dispatch.Shape(q.device.type, q.dtype),
    }
    names = []
    for operation, shape in shapes.items():
        names.append(dispatch.resolve(operation, impl, shape))
        if names[-1] == "reference":
            return None
    return branches.Impls(*names)


def scale_of(q: Tensor, softmax_scale: float | None) -> float:
    if softmax_scale is None:
        return q.shape[-1] ** -0.5
    checks.check_scale(softmax_scale)
    return float(softmax_scale)


def _result(q: Tensor, o: Tensor, lse: Tensor, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    if q.dim() == 4:
        o, lse = o.unflatten(0, tuple(q.shape[:2])), lse.unflatten(0, tuple(q.shape[:2]))
    return (o, lse) if return_lse else o
