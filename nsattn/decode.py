"""`nsa_decode`: Native Sparse Attention for new tokens over cached keys and values, plain or in pages."""

from __future__ import annotations

from torch import Tensor

from nsattn import branches, checks, dispatch
from nsattn.api import DEFAULT_CONFIG, WORKSPACE, NSAOutput, autocast, scale_of
from nsattn.config import NSAConfig


def nsa_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    softmax_scale: float | None = None,
    config: NSAConfig = DEFAULT_CONFIG,
    return_lse: bool = False,
    impl: str = "auto",
    workspace: int = WORKSPACE,
) -> Tensor | NSAOutput:
    """Eq 5 and 8 to 12 for the last S tokens of each sequence in a cache: what `nsa_attention` gives, in four launches.

    Made for decoding: one or a few new tokens against a long cache. Of each sequence it reads every compressed key, N
    blocks and a window, and nothing else. It does not wait for the device and can be captured in a CUDA graph, since
    its launches follow from shapes alone. Larger S works; `nsa_attention` is faster then, as it shares what it reads.

    Args:
        q: rotated queries of the new tokens, `[Bsz, S, Hq, D]`. Query i of sequence b sits at position
            `cache_seqlens[b] - S + i`.
        k, v: the cache, the new tokens in it: `[Bsz, C, Hkv, D]` and `[Bsz, C, Hkv, Dv]`, C rows of room for each
            sequence, keys rotated; or pages `[pages, B, Hkv, D]` of one selection block each, with a `block_table`.
        k_cmp, v_cmp: compressed rows, `[Bsz, at least the compressed rows of C, Hkv, D]`, rows `0 .. (length - l) // d`
            filled; or pages `[pages, B / d, Hkv, D]` under the same table: compressed row i of a sequence is row
            `i % (B / d)` of its page `i // (B / d)`.
        gates: `[Bsz, S, Hq, 3]`, weights of cmp, slc, win.
        cache_seqlens: int32 `[Bsz]`, tokens of each sequence, the new ones counted. Beyond C they count as C.
        block_table: int32 `[Bsz, n]`, the pages of each sequence in order. Entries outside the pool count as its first
            or last page; entries past a sequence's end are not used.
        k_win, v_win: own keys and values of the window branch, in the layout of k and v. Default: k and v.
        softmax_scale: factor of the scores. Default `1 / sqrt(D)`.
        config: block sizes.
        return_lse: return an `NSAOutput` with log-sum-exps and selection instead of o alone.
        impl: `auto`, `triton` or `reference`, which gathers the cache and calls the six operations.
        workspace: bytes of scratch; new tokens take turns where they do not fit.

    Returns:
        o, `[Bsz, S, Hq, Dv]` in the dtype of q. A query before the first token of its sequence gives 0.

    Raises:
        TypeError, ValueError: arguments that do not fit, with what was got, what is needed and what to do.
        NotImplementedError: gradients are wanted; a kernel asked for by name that this machine cannot run.

    Numerics: as `nsattn.nsa_attention`; partial results of 256 keys are merged in float32 in a fixed order. Repeats bit
        for bit, whatever else is in the batch and however much room the cache has. Scratch for a new token and query
        head: `4 * C / d + 4 * (Dv + 1) * (C / d / 256 + w / 256 + N)` bytes.

    Source: arXiv 2502.11089 section 3; split-KV decoding as in Flash-Decoding.
    """
    if (k_win is None) != (v_win is None):
        raise ValueError("k_win and v_win must be given together, got one of them. Pass both or neither.")
    checks.check_no_grad("nsa_decode", q, k, v, k_cmp, v_cmp, gates, k_win, v_win)
    q, k, v, gates, k_cmp, v_cmp, k_win, v_win = autocast(q, k, v, gates, k_cmp, v_cmp, k_win, v_win)
    checks.check_config(config)
    checks.check_tensor("q", q, (4,), "[Bsz, S, Hq, D]")
    checks.check_float("q", q)
    caches = {"k": k, "v": v, "k_cmp": k_cmp, "v_cmp": v_cmp}
    if k_win is not None and v_win is not None:
        caches |= {"k_win": k_win, "v_win": v_win}
    checks.check_cache(q, caches, cache_seqlens, block_table, config)
    checks.check_same(q=q, **caches)
    checks.check_tensor("gates", gates, (4,), "[Bsz, S, Hq, 3]")
    checks.check_shape("gates", gates, (*q.shape[:-1], 3), "[Bsz, S, Hq, 3]")
    checks.check_workspace(workspace)
    k_win, v_win = (k, v) if k_win is None or v_win is None else (k_win, v_win)
    rows = k.shape[1] if block_table is None else block_table.shape[1] * config.slc_block
    shape = dispatch.Shape(
        q.device.type, q.dtype, q.shape[-1], v.shape[-1], q.shape[2] // k.shape[2], -(-rows // config.slc_block),
        config.slc_block,
    )  # fmt: skip
    out = branches.nsa_decode(
        q, k, v, k_cmp, v_cmp, gates, k_win, v_win, cache_seqlens, block_table, config,
        scale=scale_of(q, softmax_scale), workspace=workspace, impl=dispatch.resolve("nsa_decode", impl, shape),
    )
    return NSAOutput(*out) if return_lse else out[0]
