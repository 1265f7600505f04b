"""Integer metadata of a batch, made once and passed to every operation: `Plan` and `make_plan`.

Everything inside works on packed sequences, `[T, H, D]` with cumulative lengths. A plan turns the lengths into what
kernels read: where each sequence starts in every packed axis, and which tile of 64 rows belongs to which sequence.
Sizes of these tables are bounds that follow from the totals alone, so building a plan never waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import NamedTuple

import torch
from torch import Tensor

from nsattn.config import NSAConfig

TILE = 64  # rows of a tile table entry; kernels use this tile or one that divides it


class Plan(NamedTuple):
    """Integer metadata of a packed batch. Immutable; valid for every layer that sees the same lengths.

    Tensors are int32 on the device of the batch. `n` is the number of sequences. Rows past the end of the last
    sequence ("slack") belong to no sequence: operations write zeros there.

    A query i of a sequence sits at position `len_k - len_q + i`, keys at positions 0 .. len_k - 1.
    """

    cu_q: Tensor  # [n + 1] first query row of each sequence
    cu_k: Tensor  # [n + 1] first key row
    cu_cmp: Tensor  # [n + 1] first compressed row
    cu_blk: Tensor  # [n + 1] first selection block
    q_tiles: Tensor  # [*, 2] (sequence, first row in the sequence) of each tile of TILE queries; sequence -1: no tile
    q_pairs: Tensor  # [*, 2] the same for pairs of tiles
    k_tiles: Tensor  # [*, 2] the same for keys
    cmp_tiles: Tensor  # [*, 2] the same for compressed rows
    total_q: int  # query rows, slack included
    total_k: int  # key rows, slack included
    total_cmp: int  # compressed rows, slack included
    total_blk: int  # selection blocks over all sequences, an upper bound
    max_q: int  # longest query sequence, an upper bound
    max_k: int  # longest key sequence, an upper bound
    config: NSAConfig

    def pack(self) -> tuple[list[Tensor], list[int]]:
        """The plan as the plain arguments of a custom op: its tensors, and its sizes with the config's."""
        return list(self[:8]), [*self[8:14], *astuple(self.config)]

    @staticmethod
    def unpack(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Plan:
        """Inverse of `pack`."""
        return Plan._make([*tensors, *sizes[:6], NSAConfig(*(int(size) for size in sizes[6:]))])

    @property
    def num_seqs(self) -> int:
        return self.cu_q.shape[0] - 1

    @property
    def max_cmp(self) -> int:
        """Most compressed rows of one sequence."""
        return num_compressed(self.max_k, self.config)

    @property
    def max_blk(self) -> int:
        """Most selection blocks of one sequence."""
        return -(-self.max_k // self.config.slc_block)


def num_compressed(length: int, config: NSAConfig) -> int:
    """Compressed blocks of a sequence: i exists if i*d + l <= length (Eq 7)."""
    return max(0, (length - config.cmp_block) // config.cmp_stride + 1)


def make_plan(
    cu_seqlens: Tensor,
    total: int,
    *,
    config: NSAConfig,
    max_seqlen: int | None = None,
    cu_seqlens_k: Tensor | None = None,
    total_k: int | None = None,
    max_seqlen_k: int | None = None,
) -> Plan:
    """Build the `Plan` of a packed batch. Never waits for a GPU, so it can be traced and captured in a CUDA graph.

    Args:
        cu_seqlens: int32 `[n + 1]`, ascending from 0; sequence s owns query rows `cu_seqlens[s] : cu_seqlens[s + 1]`.
        total: rows of the packed query tensor, at least `cu_seqlens[-1]`.
        config: block sizes.
        max_seqlen: an upper bound on the lengths. It only sizes scratch memory. Default: the longest length for
            lengths on the CPU, `total` for lengths on a GPU (looking them up there would wait for the device).
        cu_seqlens_k, total_k, max_seqlen_k: the same for keys where they differ from the queries (cached keys).

    Returns:
        A `Plan` on the device of `cu_seqlens`.
    """
    cu_q = cu_seqlens
    same = cu_seqlens_k is None
    cu_k = cu_q if same else cu_seqlens_k
    rows_k = total if same or total_k is None else total_k
    max_q = _max_length(cu_q, total, max_seqlen)
    max_k = max_q if same else _max_length(cu_k, rows_k, max_seqlen_k)

    n = cu_q.shape[0] - 1
    len_q, len_k = cu_q[1:] - cu_q[:-1], cu_k[1:] - cu_k[:-1]
    len_cmp = ((len_k - config.cmp_block) // config.cmp_stride + 1).clamp_min(0)
    len_blk = (len_k + config.slc_block - 1) // config.slc_block
    cu_cmp, cu_blk = cumulative(torch.stack([len_cmp, len_blk])).unbind()
    # Bounds from the totals: one sequence of everything has the most compressed rows; each sequence rounds its
    # last selection block up.
    total_cmp = min(rows_k // config.cmp_stride, n * num_compressed(max_k, config))
    total_blk = rows_k // config.slc_block + n
    lengths, totals = [len_q, len_q, len_cmp], [total, total, total_cmp]
    if not same:
        lengths, totals = [*lengths, len_k], [*totals, rows_k]
    q_pairs, q_tiles, cmp_tiles, *k_tiles = _tile_tables(torch.stack(lengths), totals)
    return Plan(
        cu_q=cu_q,
        cu_k=cu_k,
        cu_cmp=cu_cmp,
        cu_blk=cu_blk,
        q_tiles=q_tiles,
        q_pairs=q_pairs,
        k_tiles=q_tiles if same else k_tiles[0],
        cmp_tiles=cmp_tiles,
        total_q=total,
        total_k=rows_k,
        total_cmp=total_cmp,
        total_blk=total_blk,
        max_q=max_q,
        max_k=max_k,
        config=config,
    )


def make_cached_plan(
    new: Tensor, lengths: Tensor, *, total: int, max_new: int, size: int, cmp_size: int, config: NSAConfig
) -> Plan:
    """Build the `Plan` of new queries over a cache: sequence b keeps its keys at the start of rows `b * size` to
    `(b + 1) * size`, and its compressed ones at the start of `b * cmp_size` to `(b + 1) * cmp_size`.

    Each sequence is followed by one of the rows of the cache that it does not use, which has no queries: the plan holds
    twice as many sequences as the batch.

    Args:
        new: int32 `[Bsz]`, new queries of each sequence, packed.
        lengths: int32 `[Bsz]`, its keys, those of the new queries counted. At most `size`.
        total: rows of the packed query tensor.
        max_new: an upper bound on `new`.
        size, cmp_size: rows of the cache for one sequence, of keys and of compressed keys.
        config: block sizes.
    """
    batch, none = new.shape[0], torch.zeros_like(new)
    row = torch.arange(batch, device=new.device, dtype=torch.int32)
    plan = make_plan(
        cumulative(in_turns(new, none)), total, config=config, max_seqlen=max_new,
        cu_seqlens_k=_starts(row * size, lengths, batch * size), total_k=batch * size, max_seqlen_k=size,
    )  # fmt: skip
    len_cmp = ((lengths - config.cmp_block) // config.cmp_stride + 1).clamp_min(0)
    cu_cmp = _starts(row * cmp_size, len_cmp, batch * cmp_size)
    return plan._replace(cu_cmp=cu_cmp, total_cmp=batch * cmp_size)


def in_turns(a: Tensor, b: Tensor) -> Tensor:
    """`[n]` and `[n]` -> `[2n]`: a[0], b[0], a[1], b[1], ..."""
    return torch.stack([a, b], dim=1).flatten()


def _starts(first: Tensor, lengths: Tensor, total: int) -> Tensor:
    """`cu_seqlens` of sequences that start at `first`, each followed by one of the rows up to the next."""
    return torch.nn.functional.pad(in_turns(first, first + lengths), (0, 1), value=total)


def uniform_cu_seqlens(num_seqs: int, length: int, device: torch.device) -> Tensor:
    """`cu_seqlens` of a batch `[num_seqs, length, ...]` seen as packed rows."""
    return torch.arange(num_seqs + 1, dtype=torch.int32, device=device) * length


def rows_of(cu: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Sequence and index inside the sequence of every packed row: two int64 `[total]`; slack rows get sequence n."""
    row = torch.arange(total, device=cu.device)
    seq = torch.searchsorted(cu.long(), row, right=True) - 1  # of all of cu: inductor cannot search a slice
    start = torch.cat([cu.long(), cu.new_zeros(1, dtype=torch.int64)])[seq]
    return seq, row - start


def positions(plan: Plan) -> Tensor:
    """Position of every query row inside its sequence: int64 `[total_q]` (slack rows: meaningless)."""
    seq, index = rows_of(plan.cu_q, plan.total_q)
    offset = (plan.cu_k[1:] - plan.cu_k[:-1]) - (plan.cu_q[1:] - plan.cu_q[:-1])
    return index + torch.cat([offset, offset.new_zeros(1)]).long()[seq]


def compressed_positions(plan: Plan) -> Tensor:
    """Position of the first token of every compressed row: int64 `[total_cmp]`; where compressed keys are rotated."""
    return rows_of(plan.cu_cmp, plan.total_cmp)[1] * plan.config.cmp_stride


def _max_length(cu: Tensor, total: int, max_seqlen: int | None) -> int:
    if max_seqlen is not None:
        return min(max_seqlen, total)
    if cu.device.type == "cpu" and not torch.compiler.is_compiling():
        return int((cu[1:] - cu[:-1]).max()) if cu.shape[0] > 1 else 0
    return total


def cumulative(lengths: Tensor) -> Tensor:
    """Running sums `[..., n + 1]` of lengths `[..., n]` that start at 0: where each begins, and the total."""
    return torch.nn.functional.pad(lengths.cumsum(-1, dtype=torch.int32), (1, 0))


def _tile_tables(lengths: Tensor, totals: Sequence[int]) -> list[Tensor]:
    """For each row of lengths `[rows, n]`: (sequence, first row) of each tile, int32 `[*, 2]`.

    Tiles have TILE rows, those of the first table twice as many. The number of entries is a bound that follows from the
    total; unused ones hold sequence -1.
    """
    n = lengths.shape[1]
    sizes = [total // (TILE if i else 2 * TILE) + n for i, total in enumerate(totals)]
    rows = lengths.new_full((len(sizes), 1), TILE)
    rows[0] = 2 * TILE
    cu = cumulative((lengths + rows - 1) // rows)
    # At least two values: inductor (torch 2.11, on a GPU) cannot search for one.
    tile = torch.arange(max(2, *sizes), device=lengths.device, dtype=torch.int32).repeat(len(sizes), 1)
    seq = torch.searchsorted(cu, tile, right=True) - 1  # of all of cu: inductor cannot search a slice
    first = (tile - cu.gather(1, seq)) * rows
    tables = torch.stack([torch.where(seq < n, seq, -1).int(), first], dim=2)
    return [table[:size] for table, size in zip(tables, sizes, strict=True)]
