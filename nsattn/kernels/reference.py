"""Every operation of Native Sparse Attention in plain torch, in the paper's order: THE definition.

Any float type, CPU or GPU, differentiable by autograd, no Triton. Written to be read: packed rows are padded to
`[n, S, H, D]`, each branch is one visibility mask, and one masked softmax serves all three. Memory is therefore
quadratic in the longest sequence; the kernels beside this file compute the same functions without that.

Letters: n sequences, S rows of the longest one, h KV heads, g query heads of a KV head, q queries, k keys,
c compressed blocks, b selection blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsattn.config import NSAConfig
from nsattn.plan import Plan, make_cached_plan, rows_of


def compress(x: Tensor, params: tuple[Tensor, ...], plan: Plan, *, method: str) -> Tensor:
    """Eq 7: one compressed row for each block of l tokens, a block every d tokens. See `nsattn.compress`."""
    l, d = plan.config.cmp_block, plan.config.cmp_stride
    seq, index = rows_of(plan.cu_cmp, plan.total_cmp)
    real = seq < plan.num_seqs
    start = torch.where(real, plan.cu_k[seq.clamp_max(plan.num_seqs - 1)] + index * d, 0)
    blocks = x[start[:, None] + torch.arange(l, device=x.device)]  # [c, l, Hkv, D]
    params = tuple(p.to(x.dtype) for p in params)
    if method == "mean":
        y = blocks.mean(dim=1)
    elif method == "linear":
        weight, bias = params
        y = torch.einsum("clhi,hlio->cho", blocks, weight) + bias
    elif method == "mlp":
        pe, w1, b1, w2, b2 = params
        hidden = torch.einsum("clhi,hlif->chf", blocks + pe.transpose(0, 1), w1) + b1
        y = torch.einsum("chf,hfo->cho", F.silu(hidden), w2) + b2
    else:
        weight, pe = params
        logits = torch.einsum("clhi,hi->clh", blocks, weight) + pe.transpose(0, 1)
        y = torch.einsum("clh,clhi->chi", logits.softmax(dim=1), blocks)
    return torch.where(real[:, None, None], y, 0)


def attend_compressed(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, plan: Plan, *, scale: float, workspace: int = 0
) -> tuple[Tensor, Tensor]:
    """Eq 8: softmax attention to the compressed blocks that end at or before the query."""
    visible = _compressed_visible(plan)[:, None]
    return _attend(q, k_cmp, v_cmp, visible, plan, (plan.cu_cmp, plan.max_cmp), scale)


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse_cmp: Tensor, plan: Plan, *, scale: float, workspace: int = 0
) -> Tensor:
    """Eq 9, 10: the N most important selection blocks of every query token and KV head, ascending, -1 unused."""
    config = plan.config
    score = block_scores(q, k_cmp, lse_cmp, plan, scale=scale)  # [n, h, q, b]
    t = _query_positions(plan)[:, None, :, None]
    block = torch.arange(score.shape[-1], device=q.device)
    current = torch.div(t, config.slc_block, rounding_mode="floor")
    visible = block <= current
    forced = visible & ((block < config.init_blocks) | (block > current - config.local_blocks))
    score = score.masked_fill(forced, float("inf")).masked_fill(~visible, -1.0)
    score = F.pad(score, (0, max(0, config.num_selected - score.shape[-1])), value=-1.0)
    best, index = score.sort(dim=-1, descending=True, stable=True)  # stable: ties go to the lower index
    unused = torch.iinfo(torch.int32).max
    index = index.int().masked_fill(best < 0, unused)[..., : config.num_selected].sort(dim=-1).values
    index = index.masked_fill(index == unused, -1)
    return unpad(index.transpose(1, 2), plan, fill=-1)


def block_scores(q: Tensor, k_cmp: Tensor, lse_cmp: Tensor, plan: Plan, *, scale: float) -> Tensor:
    """Eq 9, 10: importance of every selection block, padded `[n, Hkv, S, blocks]`, before anything is forced."""
    l, d, B = plan.config.cmp_block, plan.config.cmp_stride, plan.config.slc_block
    visible = _compressed_visible(plan)[:, None, None]
    s = _scores(q, k_cmp, plan, (plan.cu_cmp, plan.max_cmp), scale)
    lse = _pad(lse_cmp, plan.cu_q, plan.max_q).unflatten(2, (k_cmp.shape[1], -1)).permute(0, 2, 3, 1)
    p = (s.masked_fill(~visible, -float("inf")) - lse[..., None].masked_fill(lse[..., None] == -float("inf"), 0)).exp()
    p = p.sum(dim=2)  # over the heads of a group, Eq 10: [n, h, q, c]
    units = max(plan.max_blk, 1) * (B // d)  # strides of d tokens
    p = F.pad(p, (l // d - 1, units - p.shape[-1]))
    touching = p.unfold(-1, l // d, 1).sum(dim=-1)  # compressed blocks that cover each stride
    return touching.unflatten(-1, (-1, B // d)).sum(dim=-1)


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, block_idx: Tensor, plan: Plan, *, scale: float, workspace: int = 0
) -> tuple[Tensor, Tensor]:
    """Eq 11, 12: softmax attention to all tokens at or before the query in the set of selected blocks."""
    B, blocks = plan.config.slc_block, max(plan.max_blk, 1)
    index = _pad(block_idx, plan.cu_q, plan.max_q).long().transpose(1, 2)  # [n, h, q, N]
    index = torch.where((index < 0) | (index >= blocks), blocks, index)  # one block more for unused slots
    # Keys, not blocks, are marked: what inductor makes of chosen[..., key // B] for a CPU reads beyond the last block.
    key = (index[..., None] * B + torch.arange(B, device=q.device)).flatten(-2)  # [n, h, q, N * B]
    chosen = torch.zeros(*index.shape[:3], (blocks + 1) * B, dtype=torch.bool, device=q.device).scatter(-1, key, True)
    key = torch.arange(max(plan.max_k, 1), device=q.device)
    visible = chosen[..., : len(key)] & (key <= _query_positions(plan)[:, None, :, None])
    return _attend(q, k, v, visible, plan, (plan.cu_k, plan.max_k), scale)


def attend_window(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, workspace: int = 0
) -> tuple[Tensor, Tensor]:
    """Section 3.3.3: softmax attention to the last w tokens, the query's own one counted."""
    t = _query_positions(plan)[:, None, :, None]
    key = torch.arange(max(plan.max_k, 1), device=q.device)
    visible = (key <= t) & (key > t - plan.config.window)
    return _attend(q, k, v, visible, plan, (plan.cu_k, plan.max_k), scale)


def combine(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    """Eq 5: sum over the branches of gate * output."""
    branches = torch.stack([o_cmp, o_slc, o_win], dim=-1).to(_statistics_dtype(o_cmp))
    return torch.einsum("thdb,thb->thd", branches, gates.to(branches.dtype)).to(o_cmp.dtype)


def nsa_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, plan: Plan, *, scale: float
) -> Tensor:
    """Eq 5 to 12 in one place, with one pair of keys and values for the selected and the window branch."""
    o_cmp, lse_cmp = attend_compressed(q, k_cmp, v_cmp, plan, scale=scale)
    block_idx = select_blocks(q.detach(), k_cmp.detach(), lse_cmp.detach(), plan, scale=scale)
    o_slc, _ = attend_selected(q, k, v, block_idx, plan, scale=scale)
    o_win, _ = attend_window(q, k, v, plan, scale=scale)
    return combine(o_cmp, o_slc, o_win, gates)


def nsa_decode(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, k_win: Tensor, v_win: Tensor,
    cache_seqlens: Tensor, block_table: Tensor | None, config: NSAConfig, *, scale: float, workspace: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Eq 5 and 8 to 12 for new tokens at the end of a cache. See `nsattn.nsa_decode`."""
    shape = q.shape[:2]
    plan, q, k, v, k_cmp, v_cmp, gates, k_win, v_win = pack_cache(
        q, k, v, k_cmp, v_cmp, gates, k_win, v_win, cache_seqlens, block_table, config
    )
    o_cmp, lse_cmp = attend_compressed(q, k_cmp, v_cmp, plan, scale=scale)
    block_idx = select_blocks(q, k_cmp, lse_cmp, plan, scale=scale)
    o_slc, lse_slc = attend_selected(q, k, v, block_idx, plan, scale=scale)
    o_win, lse_win = attend_window(q, k_win, v_win, plan, scale=scale)
    o = combine(o_cmp, o_slc, o_win, gates)
    o, lse_cmp, lse_slc, lse_win, block_idx = (
        x.unflatten(0, shape) for x in (o, lse_cmp, lse_slc, lse_win, block_idx)
    )
    return o, lse_cmp, lse_slc, lse_win, block_idx


def pack_cache(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, k_win: Tensor, v_win: Tensor,
    cache_seqlens: Tensor, block_table: Tensor | None, config: NSAConfig,
) -> tuple[Plan, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The plan of new tokens over a cache, and their tensors as its packed rows: pages gathered, batch flattened."""
    batch, num = q.shape[:2]
    k, v, k_cmp, v_cmp, k_win, v_win = (_gather_pages(x, block_table) for x in (k, v, k_cmp, v_cmp, k_win, v_win))
    size, cmp_size = k.shape[1], k_cmp.shape[1]
    plan = make_cached_plan(
        torch.full_like(cache_seqlens, num), cache_seqlens.clamp(0, size), total=batch * num, max_new=num, size=size,
        cmp_size=cmp_size, config=config,
    )
    q, k, v, k_cmp, v_cmp, gates, k_win, v_win = (
        x.flatten(0, 1) for x in (q, k, v, k_cmp, v_cmp, gates, k_win, v_win)
    )
    return plan, q, k, v, k_cmp, v_cmp, gates, k_win, v_win


def _gather_pages(x: Tensor, block_table: Tensor | None) -> Tensor:
    """Cached rows `[Bsz, C, ...]`: as they are, or gathered from pages `[pages, rows, ...]`."""
    return x if block_table is None else x[block_table.long().clamp(0, x.shape[0] - 1)].flatten(1, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, plan: Plan, keys: tuple[Tensor, int], scale: float
) -> tuple[Tensor, Tensor]:
    """Masked softmax attention. `visible` `[n, Hkv or 1, q, k]`. Rows that see nothing give 0 and lse -inf."""
    s = _scores(q, k, plan, keys, scale)
    v = _pad(v, *keys)
    visible = (visible & _existing(keys[0], s.shape[-1])[:, None, None])[:, :, None]
    some = visible.any(dim=-1)
    s = s.masked_fill(~visible, -float("inf")).masked_fill(~some[..., None], 0.0)
    lse = s.logsumexp(dim=-1)
    p = (s - lse[..., None]).exp().masked_fill(~some[..., None], 0.0)
    o = torch.einsum("nhgqk,nkhd->nqhgd", p.to(v.dtype), v).flatten(2, 3)
    lse = lse.masked_fill(~some, -float("inf")).permute(0, 3, 1, 2).flatten(2, 3)
    return unpad(o, plan), unpad(lse, plan, fill=-float("inf"))


def _scores(q: Tensor, k: Tensor, plan: Plan, keys: tuple[Tensor, int], scale: float) -> Tensor:
    """Scaled scores `[n, h, g, q, k]` in the type of the softmax statistics. `keys`: (cu, longest) of the key rows."""
    q = _pad(q, plan.cu_q, plan.max_q).unflatten(2, (k.shape[1], -1))
    k = _pad(k, *keys)
    return torch.einsum("nqhgd,nkhd->nhgqk", q, k).to(_statistics_dtype(q)) * scale


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _query_positions(plan: Plan) -> Tensor:
    """Position of query i of each sequence, `[n, q]`: with cached keys the last query sits at the last key."""
    offset = (plan.cu_k[1:] - plan.cu_k[:-1]) - (plan.cu_q[1:] - plan.cu_q[:-1])
    return torch.arange(max(plan.max_q, 1), device=offset.device) + offset[:, None]


def _compressed_visible(plan: Plan) -> Tensor:
    """`[n, q, c]`: compressed block i ends at or before the query."""
    end = torch.arange(max(plan.max_cmp, 1), device=plan.cu_q.device) * plan.config.cmp_stride
    visible = end + plan.config.cmp_block - 1 <= _query_positions(plan)[..., None]
    return visible & _existing(plan.cu_cmp, visible.shape[-1])[:, None]


def _existing(cu: Tensor, longest: int) -> Tensor:
    """`[n, rows]`: the row exists in its sequence."""
    return torch.arange(longest, device=cu.device) < (cu[1:] - cu[:-1])[:, None]


def _pad(x: Tensor, cu: Tensor, longest: int) -> Tensor:
    """Packed rows `[T, ...]` to `[n, S, ...]`, zeros where a sequence is shorter than S."""
    longest = max(longest, 1)
    row = torch.where(_existing(cu, longest), cu[:-1, None] + torch.arange(longest, device=x.device), x.shape[0])
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, 1))[row]  # one more row, of zeros, for what does not exist


def unpad(y: Tensor, plan: Plan, fill: float = 0.0) -> Tensor:
    """`[n, S, ...]` back to packed query rows; slack rows get `fill`."""
    seq, index = rows_of(plan.cu_q, plan.total_q)
    real = (seq < plan.num_seqs).view(-1, *[1] * (y.dim() - 2))
    return torch.where(real, y[seq.clamp_max(plan.num_seqs - 1), index.clamp_max(y.shape[1] - 1)], fill)
