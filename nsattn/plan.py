"""Integer metadata of a batch, made once and passed to every operation: `Plan` and `make_plan`.

Everything inside works on packed sequences, `[T, H, D]` with cumulative lengths. A plan turns the lengths into what
kernels read: where each sequence starts in every packed axis, and which tile of 64 rows belongs to which sequence.
Sizes of these tables are bounds that follow from the totals alone, so building a plan never waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec as _find_spec
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from nsattn.config import NSAConfig, check_config

find_spec = functools.cache(_find_spec)
TILE = 64  # rows of a tile table entry; kernels use this tile or one that divides it
STARTS = 10  # tables of starts in a plan


class Plan(NamedTuple):
    """Integer metadata of a packed batch. Immutable; valid for every layer that sees the same lengths.

    Tables are int32 on the device of the batch, all in one tensor: `cu_` ones hold where each sequence begins and where
    the last one ends, `[num_seqs + 1]`; tile tables hold (sequence, first row in the sequence) of each tile of TILE
    rows, `[*, 2]`, with sequence -1 where there is none. Rows past the end of the last sequence ("slack") belong to no
    sequence: operations write zeros there.

    A query i of a sequence sits at position `len_k - len_q + i`, keys at positions 0 .. len_k - 1.
    """

    tables: Tensor  # see `make_tables`; each begins at a multiple of 16 bytes, for which kernels are compiled
    num_seqs: int
    total_q: int  # query rows, slack included
    total_k: int  # key rows, slack included
    total_cmp: int  # compressed rows, slack included
    total_blk: int  # selection blocks over all sequences, an upper bound
    max_q: int  # longest query sequence, an upper bound
    max_k: int  # longest key sequence, an upper bound
    config: NSAConfig

    def pack(self) -> tuple[Tensor, list[int]]:
        """The plan as the plain arguments of a custom op: its tables, and its sizes with the config's."""
        return self.tables, [*self[1:8], *self.config.sizes()]

    @staticmethod
    def unpack(tables: Tensor, sizes: Sequence[int]) -> Plan:
        """Inverse of `pack`."""
        return Plan._make([tables, *sizes[:7], _config(*(int(size) for size in sizes[7:]))])

    @property
    def cu_q(self) -> Tensor:
        """First query row of each sequence."""
        return self._starts(0)

    @property
    def cu_k(self) -> Tensor:
        """First key row of each sequence."""
        return self._starts(1)

    @property
    def cu_cmp(self) -> Tensor:
        """First compressed row of each sequence."""
        return self._starts(2)

    @property
    def cu_blk(self) -> Tensor:
        """First selection block of each sequence."""
        return self._starts(3)

    @property
    def cu_cmp_pairs(self) -> Tensor:
        """First pair of tiles of compressed rows of each sequence."""
        return self._starts(8)

    @property
    def cu_k_pairs(self) -> Tensor:
        """First pair of tiles of key rows of each sequence."""
        return self._starts(9)

    @property
    def q_pairs(self) -> Tensor:
        """Tile table of the queries, for pairs of tiles."""
        return self._tiles(0, self.total_q // (2 * TILE))

    @property
    def q_tiles(self) -> Tensor:
        """Tile table of the queries."""
        return self._tiles(1, self.total_q // TILE)

    @property
    def cmp_tiles(self) -> Tensor:
        """Tile table of the compressed rows."""
        return self._tiles(2, self.total_cmp // TILE)

    @property
    def k_tiles(self) -> Tensor:
        """Tile table of the keys."""
        return self._tiles(3, self.total_k // TILE)

    @property
    def units(self) -> Tensor:
        """int32 `[4, *]`: of each unit the first token, its compressed row, first and end compressed row of its
        sequence; all 0 where there is none.

        A unit is d tokens that start at a multiple of d inside a sequence. Unit u begins compressed row u of its
        sequence, if that row exists, and its tokens lie in the rows u - n, n < l/d.
        """
        return self.tables[-4 * self.sizes()["num_units"] :].view(4, -1)

    def sizes(self) -> dict[str, int]:
        """Entries of a table of starts, of a tile table and of a row of `units`, all of them multiples of 16 bytes."""
        n, rows = self.num_seqs, max(self.total_q, self.total_k, self.total_cmp)
        return {
            "width": _aligned(n + 1),
            "size": _aligned(rows // TILE + n),
            "num_units": _aligned(self.total_k // self.config.cmp_stride + n),
        }

    def _starts(self, i: int) -> Tensor:
        start = i * _aligned(self.num_seqs + 1)
        return self.tables[start : start + self.num_seqs + 1]

    def _tiles(self, i: int, full: int) -> Tensor:
        """Every sequence adds at most one tile to those that the total fills."""
        sizes = self.sizes()
        start = STARTS * sizes["width"] + 2 * i * sizes["size"]
        return self.tables[start : start + 2 * (full + self.num_seqs)].view(-1, 2)

    @property
    def max_cmp(self) -> int:
        """Most compressed rows of one sequence."""
        return num_compressed(self.max_k, self.config)

    @property
    def max_blk(self) -> int:
        """Most selection blocks of one sequence."""
        return -(-self.max_k // self.config.slc_block)


def _aligned(entries: int) -> int:
    return -(-entries // 4) * 4


@functools.lru_cache
def _config(*sizes: int) -> NSAConfig:
    return NSAConfig(*sizes)


def num_compressed(length: int, config: NSAConfig) -> int:
    """Compressed blocks of a sequence: i exists if i*d + l <= length (Eq 7)."""
    return max(0, (length - config.cmp_block) // config.cmp_stride + 1)


def check_count(name: str, number: object, least: int = 0) -> None:
    if not isinstance(number, (int, torch.SymInt)) or number < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {number!r}. It is a number of rows or heads.")


def check_starts(name: str, cu: object) -> None:
    """Where packed sequences start and the last one ends."""
    if not isinstance(cu, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(cu).__name__}. Pass int32 [num_sequences + 1].")
    if cu.dim() != 1:
        raise ValueError(f"{name} must be int32 [num_sequences + 1], got shape {tuple(cu.shape)}. Reshape it.")
    if cu.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {cu.dtype}. Use cu_seqlens.to(torch.int32).")
    if cu.shape[0] < 2:
        raise ValueError(f"{name} must have at least 2 entries, got {cu.shape[0]}. One sequence is [0, length].")
    if not cu.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got stride {cu.stride()}. Use .contiguous().")


def make_plan(
    cu_seqlens: Tensor, total: int, *, config: NSAConfig, max_seqlen: int | None = None,
    cu_seqlens_k: Tensor | None = None, total_k: int | None = None, max_seqlen_k: int | None = None,
    cu_cmp: Tensor | None = None, total_cmp: int | None = None,
) -> Plan:
    """Build the `Plan` of a packed batch. Never waits for a GPU, so it can be traced and captured in a CUDA graph.

    Args:
        cu_seqlens: int32 `[n + 1]`, ascending from 0; sequence s owns query rows `cu_seqlens[s] : cu_seqlens[s + 1]`.
        total: rows of the packed query tensor, at least `cu_seqlens[-1]`.
        config: block sizes.
        max_seqlen: an upper bound on the lengths. It sizes scratch memory and `total_cmp`. Default: the longest length
            for lengths on the CPU, `total` for lengths on a GPU (looking them up there would wait for the device).
        cu_seqlens_k, total_k, max_seqlen_k: the same for keys where they differ from the queries (cached keys).
        cu_cmp, total_cmp: the same for compressed rows, if they do not lie one after the other.

    Returns:
        A `Plan` on the device of `cu_seqlens`.

    Raises:
        TypeError: lengths that are no int32 tensor, a config of another class.
        ValueError: sizes that are no row counts; lengths on the CPU that do not ascend from 0 to at most the rows, or a
            bound below one of them. On a GPU nobody looks: such lengths give wrong results there.
    """
    check_config(config)
    check_starts("cu_seqlens", cu_seqlens)
    if cu_seqlens_k is not None:
        check_starts("cu_seqlens_k", cu_seqlens_k)
        if cu_seqlens_k.shape != cu_seqlens.shape:
            want, got = tuple(cu_seqlens.shape), tuple(cu_seqlens_k.shape)
            raise ValueError(f"cu_seqlens_k must be as long as cu_seqlens = {want}, got {got}.")
    check_count("total", total)
    check_count("total_k", total if total_k is None else total_k)
    cu_q = cu_seqlens
    same = cu_seqlens_k is None
    cu_k = cu_q if same else cu_seqlens_k
    rows_k = total if same or total_k is None else total_k
    max_q = _max_length("cu_seqlens", cu_q, total, max_seqlen)
    max_k = max_q if same else _max_length("cu_seqlens_k", cu_k, rows_k, max_seqlen_k)

    n = cu_q.shape[0] - 1
    if cu_cmp is None or total_cmp is None:  # one sequence of everything has the most compressed rows
        cu_cmp, total_cmp = None, min(rows_k // config.cmp_stride, n * num_compressed(max_k, config))
    plan = Plan(
        tables=cu_q,
        num_seqs=n,
        total_q=total,
        total_k=rows_k,
        total_cmp=total_cmp,
        total_blk=rows_k // config.slc_block + n,  # each sequence rounds its last one up
        max_q=max_q,
        max_k=max_k,
        config=config,
    )
    sizes = {"total_cmp": total_cmp, **plan.sizes()}
    return plan._replace(tables=_tables_of(cu_q)(cu_q, cu_k, cu_cmp, config=config, **sizes))


def _tables_of(cu: Tensor) -> Callable[..., Tensor]:
    """What makes the tables for lengths on the device of `cu`: kernels on a GPU, unless a compiler or a fake traces."""
    if cu.is_cuda and type(cu) is Tensor and not torch.compiler.is_compiling() and find_spec("triton"):
        from nsattn.kernels import _plan

        return _plan.tables
    return make_tables


def make_tables(
    cu_q: Tensor, cu_k: Tensor, cu_cmp: Tensor | None, *, total_cmp: int, width: int, size: int, num_units: int,
    config: NSAConfig,
) -> Tensor:
    """The tables of a plan in plain torch: the definition.

    Args:
        cu_q, cu_k, cu_cmp: where sequences begin, `[n + 1]`; compressed rows lie one after the other if that is None.
        total_cmp: compressed rows that there are. Where a bound was too low those after them are left out, since
            nothing may be written there.
        width, size, num_units: see `Plan.sizes`.
    """
    n, d = cu_q.shape[0] - 1, config.cmp_stride
    len_q, len_k = cu_q[1:] - cu_q[:-1], cu_k[1:] - cu_k[:-1]
    if cu_cmp is None:
        cu_cmp = cumulative(((len_k - config.cmp_block) // d + 1).clamp_min(0)).clamp_max(total_cmp)
    len_cmp = cu_cmp[1:] - cu_cmp[:-1]
    cu_blk = cumulative((len_k + config.slc_block - 1) // config.slc_block)

    lengths = torch.stack([len_q, len_q, len_cmp, len_k])
    rows = lengths.new_full((4, 1), TILE)
    rows[0] = 2 * TILE
    cu_tiles = cumulative((lengths + rows - 1) // rows)
    cu_pairs = cumulative((torch.stack([len_cmp, len_k]) + 2 * TILE - 1) // (2 * TILE))
    tile = torch.arange(size, device=cu_q.device, dtype=torch.int32).repeat(4, 1)
    seq = torch.searchsorted(cu_tiles, tile, right=True) - 1  # of all of it: inductor cannot search a slice
    tiles = torch.stack([torch.where(seq < n, seq, -1).int(), (tile - cu_tiles.gather(1, seq)) * rows], dim=2)

    first_unit = cu_k // d + torch.arange(n + 1, device=cu_q.device, dtype=torch.int32)
    unit = torch.arange(num_units, device=cu_q.device, dtype=torch.int32)
    seq = (torch.searchsorted(first_unit, unit, right=True) - 1).clamp(0, n - 1)
    unit = unit - first_unit[seq]
    used = (unit >= 0) & (unit * d < len_k[seq])
    begin = cu_cmp[seq]
    units = torch.where(used, torch.stack([cu_k[seq] + unit * d, begin + unit, begin, cu_cmp[seq + 1]]), 0)

    starts = torch.stack([cu_q, cu_k, cu_cmp, cu_blk, *cu_tiles.unbind(), *cu_pairs.unbind()])
    starts = torch.nn.functional.pad(starts, (0, width - (n + 1)))
    return torch.cat([starts.flatten(), tiles.flatten(), units.flatten()])


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
    len_cmp = ((lengths - config.cmp_block) // config.cmp_stride + 1).clamp_min(0)
    return make_plan(
        cumulative(in_turns(new, none)), total, config=config, max_seqlen=max_new,
        cu_seqlens_k=_starts(row * size, lengths, batch * size), total_k=batch * size, max_seqlen_k=size,
        cu_cmp=_starts(row * cmp_size, len_cmp, batch * cmp_size), total_cmp=batch * cmp_size,
    )  # fmt: skip


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


def _max_length(name: str, cu: Tensor, total: int, max_seqlen: int | None) -> int:
    """The longest length where it can be seen, else the bound on it. Raises as `make_plan`."""
    if cu.device.type != "cpu" or type(cu) is not Tensor or torch.compiler.is_compiling():
        return total if max_seqlen is None else min(max_seqlen, total)
    starts = cu.tolist()
    lengths = [end - start for start, end in pairwise(starts)]
    if not starts or starts[0] != 0 or min(lengths, default=0) < 0 or starts[-1] > total:
        raise ValueError(
            f"{name} must ascend from 0 to at most the {total} rows of the data, got {starts[:4]} .. "
            f"{starts[-1:]}. It holds where each sequence begins, and where the last one ends."
        )
    longest = max(lengths, default=0)
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(
            f"{name.replace('cu_seqlens', 'max_seqlen')} must be at least the longest length, got {max_seqlen} and "
            f"{longest} in {name}. Raise it, or leave it out."
        )
    return longest if max_seqlen is None else min(max_seqlen, total)


def cumulative(lengths: Tensor) -> Tensor:
    """Running sums `[..., n + 1]` of lengths `[..., n]` that start at 0: where each begins, and the total."""
    return torch.nn.functional.pad(lengths.cumsum(-1, dtype=torch.int32), (1, 0))
