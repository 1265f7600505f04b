"""Native Sparse Attention written a second time, as loops over sequences, tokens, heads and keys.

Slow and obvious on purpose: this file shares no code with the package and knows no plan, so that an error in the
reference cannot hide in it. Everything is float64. Lengths are plain lists of ints; packed rows of sequence s start at
the sum of the lengths before it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def num_compressed(length: int, config) -> int:
    """Blocks i = 0, 1, ... with i*d + l <= length."""
    count = 0
    while count * config.cmp_stride + config.cmp_block <= length:
        count += 1
    return count


def compress(x: Tensor, params: tuple[Tensor, ...], lengths: list[int], rows: int, config, method: str) -> Tensor:
    """Eq 7: one row per compressed block and KV head; rows after the last are zero."""
    out_dim = {"mean": x.shape[-1], "gated": x.shape[-1]}.get(method) or params[-1].shape[-1]
    y = torch.zeros(rows, x.shape[1], out_dim, dtype=torch.float64)
    start, row = 0, 0
    for length in lengths:
        for i in range(num_compressed(length, config)):
            for h in range(x.shape[1]):
                block = [x[start + i * config.cmp_stride + j, h] for j in range(config.cmp_block)]
                y[row, h] = _phi(block, [p[h] for p in params], method)
            row += 1
        start += length
    return y


def _phi(block: list[Tensor], params: list[Tensor], method: str) -> Tensor:
    """One compressed row from its l tokens and the parameters of one KV head."""
    if method == "mean":
        return sum(block) / len(block)
    if method == "linear":
        weight, bias = params
        return bias + sum(x @ weight[j] for j, x in enumerate(block))
    if method == "mlp":
        pe, w1, b1, w2, b2 = params
        hidden = b1 + sum((x + pe[j]) @ w1[j] for j, x in enumerate(block))
        return torch.stack([a / (1 + torch.exp(-a)) for a in hidden]) @ w2 + b2
    weight, pe = params
    logits = [float(x @ weight + pe[j]) for j, x in enumerate(block)]
    top = max(logits)
    parts = [math.exp(logit - top) for logit in logits]
    return sum(part / sum(parts) * x for part, x in zip(parts, block, strict=True))


def attend_compressed(q, k_cmp, v_cmp, lengths_q, lengths_k, config, scale):
    """Eq 8: token t sees block i if the last token of the block, i*d + l - 1, is not after t."""

    def visible(s: int, t: int, h_kv: int, row: int) -> list[int]:
        blocks = range(num_compressed(lengths_k[s], config))
        return [i for i in blocks if i * config.cmp_stride + config.cmp_block - 1 <= t]

    lengths_cmp = [num_compressed(length, config) for length in lengths_k]
    return _attend(q, k_cmp, v_cmp, lengths_q, lengths_k, lengths_cmp, visible, scale)


def attend_selected(q, k, v, block_idx, lengths_q, lengths_k, config, scale):
    """Eq 11, 12: token t sees the tokens of its blocks up to itself; a list of blocks is a set, junk is ignored."""

    def visible(s: int, t: int, h_kv: int, row: int) -> list[int]:
        blocks = {int(j) for j in block_idx[row, h_kv]}
        return [key for key in range(lengths_k[s]) if key <= t and key // config.slc_block in blocks]

    return _attend(q, k, v, lengths_q, lengths_k, lengths_k, visible, scale)


def attend_window(q, k, v, lengths_q, lengths_k, config, scale):
    """Section 3.3.3: token t sees t - w + 1 ... t."""

    def visible(s: int, t: int, h_kv: int, row: int) -> list[int]:
        return [key for key in range(lengths_k[s]) if t - config.window < key <= t]

    return _attend(q, k, v, lengths_q, lengths_k, lengths_k, visible, scale)


def _attend(q, k, v, lengths_q, lengths_k, lengths_kv, visible, scale):
    """Softmax attention of every query row to the keys that `visible` lists."""
    group = q.shape[1] // k.shape[1]
    o = torch.zeros(*q.shape[:2], v.shape[-1], dtype=torch.float64)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    start_q = start_kv = 0
    for s, (len_q, len_k, len_kv) in enumerate(zip(lengths_q, lengths_k, lengths_kv, strict=True)):
        for i in range(len_q):
            row, t = start_q + i, len_k - len_q + i
            for h in range(q.shape[1]):
                keys = [start_kv + key for key in visible(s, t, h // group, row)]
                if not keys:
                    continue
                scores = [scale * float(q[row, h] @ k[key, h // group]) for key in keys]
                top = max(scores)
                total = sum(math.exp(score - top) for score in scores)
                lse[row, h] = top + math.log(total)
                for score, key in zip(scores, keys, strict=True):
                    o[row, h] += math.exp(score - top) / total * v[key, h // group]
        start_q += len_q
        start_kv += len_kv
    return o, lse


def block_importance(q, k_cmp, lengths_q, lengths_k, config, scale) -> list[list[list[float]]]:
    """Eq 9 and 10: importance of every visible block, for each query row and KV head."""
    group = q.shape[1] // k_cmp.shape[1]
    importance: list[list[list[float]]] = [[[] for _ in range(k_cmp.shape[1])] for _ in range(q.shape[0])]
    start_q = start_cmp = 0
    for len_q, len_k in zip(lengths_q, lengths_k, strict=True):
        count = num_compressed(len_k, config)
        for i in range(len_q):
            t = len_k - len_q + i
            seen = [c for c in range(count) if c * config.cmp_stride + config.cmp_block - 1 <= t]
            blocks = [j for j in range(len_k) if j * config.slc_block <= t]
            for h_kv in range(k_cmp.shape[1]):
                totals = [0.0 for _ in blocks]
                for h in range(h_kv * group, (h_kv + 1) * group):
                    scores = [scale * float(q[start_q + i, h] @ k_cmp[start_cmp + c, h_kv]) for c in seen]
                    top = max(scores, default=0.0)
                    parts = [math.exp(score - top) for score in scores]
                    p_cmp = {c: part / sum(parts) for c, part in zip(seen, parts, strict=True)}
                    for j in blocks:
                        for m in range(config.slc_block // config.cmp_stride):
                            for n in range(config.cmp_block // config.cmp_stride):
                                totals[j] += p_cmp.get(j * config.slc_block // config.cmp_stride + m - n, 0.0)
                importance[start_q + i][h_kv] = totals
        start_q += len_q
        start_cmp += count
    return importance


def select_blocks(q, k_cmp, lengths_q, lengths_k, config, scale) -> Tensor:
    """The N most important blocks with the forced ones, ascending, -1 behind them."""
    importance = block_importance(q, k_cmp, lengths_q, lengths_k, config, scale)
    chosen = torch.full((q.shape[0], k_cmp.shape[1], config.num_selected), -1, dtype=torch.int32)
    for row, heads in enumerate(importance):
        for h_kv, totals in enumerate(heads):
            blocks = list(range(len(totals)))
            first_local = len(blocks) - config.local_blocks
            forced = [j for j in blocks if j < config.init_blocks or j >= first_local]
            rest = sorted((j for j in blocks if j not in forced), key=lambda j: (-totals[j], j))
            picked = sorted([*forced, *rest[: config.num_selected - len(forced)]])
            for slot, j in enumerate(picked):
                chosen[row, h_kv, slot] = j
    return chosen


def combine(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    """Eq 5."""
    o = torch.zeros_like(o_cmp, dtype=torch.float64)
    for row in range(o.shape[0]):
        for h in range(o.shape[1]):
            for branch, part in enumerate((o_cmp, o_slc, o_win)):
                o[row, h] += gates[row, h, branch] * part[row, h]
    return o
