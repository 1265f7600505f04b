"""Keys and values kept between forward passes: `CacheLengths` for a batch, `LayerCache` for each of its layers.

    lengths, caches = CacheLengths(config), [LayerCache() for _ in layers]
    for x in prompt, token, token:                              # [Bsz, 1 or more, dim], without gradients
        step = lengths.advance(x.shape[:2], x.device)           # once per forward pass
        for layer, cache in zip(layers, caches):
            x = layer(x, cache=cache, step=step)

Each row of a batch has a length of its own: a mask takes tokens out, on either side or inside, as if they were not
there. A row's tokens lie at the start of its part of a buffer, which is what `nsa_decode` reads for a pass of one
column; for a pass of more, `nsa_attention` reads the buffers as packed keys (`make_cached_plan`).

A compressed block is made in the pass that brings its last token. Until then compression needs its tokens before
rotation, so the last l - 1 of them are kept too. A pass of one column compresses the last l tokens of every row, and
keeps the result where a block ends there: that costs less than finding out.

Memory of a layer, in elements: `Bsz * C * Hkv * (D + Dv)` for keys and values (twice that where the window branch has
its own), `Bsz * C / d * Hkv * (D + Dv)` for compressed ones, `Bsz * (l - 1) * Hkv * (D + Dv)` for the tail. C is
`max_length + 1` with a `max_length`, else the columns so far plus at most a quarter and 256. A pass of S columns needs
`Bsz * (l + S) * Hkv * (D + Dv)` more for a moment, beside what `nsattn.nsa_attention` needs. Nothing here waits for the
device or recomputes an old block.

A pass of one column can be captured in a CUDA graph: with a `max_length` and a first such pass before, all tensors stay
where they are, and replays count tokens on the device. Tell `replayed` how many there were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nsattn import checks
from nsattn.config import NSAConfig
from nsattn.plan import (
    Plan,
    cumulative,
    in_turns,
    make_cached_plan,
    make_plan,
    num_compressed,
    rows_of,
    uniform_cu_seqlens,
)

GROW = 256  # rows; a buffer without a maximum grows by at least that, or by a quarter, so that copies stay rare


class Step(NamedTuple):
    """Integer metadata of one forward pass over S new columns, for every layer. From `CacheLengths.advance`.

    Index tensors are int64 on the device of the batch. Where a token is taken out by the mask, its target is the last
    row of a buffer's part, which no sequence ever reaches.
    """

    plan: Plan | None  # queries of this pass against everything cached; None for one column, which needs none
    lengths: Tensor  # int32 [Bsz], tokens of each row after this pass
    new: Plan  # tail and new tokens, for the compression of the blocks that end in this pass
    order: Tensor | None  # [Bsz * S] new tokens, the kept ones first; None: all are kept
    kept: Tensor | None  # bool [Bsz, S]; None: all
    positions: Tensor  # [Bsz, S] position of each new token in its row, 0 where taken out
    cmp_positions: Tensor  # [new.total_cmp] position of the first token of each new compressed row, 0 for slack rows
    rows: Tensor  # [Bsz * S] where new tokens go in the buffers of keys and values
    cmp_rows: Tensor  # [new.total_cmp] where new compressed rows go
    new_rows: Tensor  # [Bsz * S] where new tokens go behind the tail
    tail_rows: Tensor  # [Bsz, l - 1] what of tail and new tokens is the next tail
    start: int  # columns before this pass
    end: int  # and after it; the same while a CUDA graph is captured, which computes nothing yet
    size: int  # rows of a sequence's part in the buffers of keys and values
    cmp_size: int  # and in those of compressed ones

    def pack(self, x: Tensor) -> Tensor:
        """Rows `[Bsz * S, ...]` as the queries of `plan`."""
        return x if self.order is None else x[self.order]

    def unpack(self, y: Tensor) -> Tensor:
        """Inverse of `pack`."""
        return y if self.order is None else torch.empty_like(y).index_copy_(0, self.order, y)


class CacheLengths:
    """Lengths of the sequences in a cache: what all layers share.

    Args:
        config: block sizes.
        max_length: columns to reserve at once; buffers then stay where they are, as CUDA graphs need. Default: buffers
            grow.

    Attributes:
        columns: tokens per row so far, those that a mask took out counted.
        tokens: int32 `[Bsz]`, tokens kept per row; None before the first pass.
    """

    def __init__(self, config: NSAConfig, max_length: int | None = None) -> None:
        checks.check_config(config)
        if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
            raise ValueError(f"max_length must be None or an int >= 1, got {max_length!r}. None lets the cache grow.")
        self.config, self.max_length = config, max_length
        self.columns = 0
        self.size = 0 if max_length is None else max_length + 1
        self.tokens: Tensor | None = None
        self.block: Plan | None = None  # one block of l tokens for each row

    def advance(self, shape: Sequence[int], device: torch.device, mask: Tensor | None = None) -> Step:
        """Count new columns in, and say where they go.

        Args:
            shape: `(Bsz, S)` of the new columns.
            device: of the batch.
            mask: `[Bsz, S]`, nonzero for tokens to keep. Default: all.

        Returns:
            A `Step` for every layer. Its shapes depend on `shape` and on the size of the cache alone.

        Raises:
            ValueError: a batch of another size than before, a mask of the wrong shape, more columns than `max_length`.
            NotImplementedError: gradients are enabled; a cache holds none.
        """
        batch, num = shape
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "a cache holds no gradients, got a call with gradients enabled. Wrap it in torch.no_grad(), or train "
                "without a cache."
            )
        self._check_batch(batch)
        if mask is not None and tuple(mask.shape) != tuple(shape):
            raise ValueError(f"mask must be [Bsz, S] = {tuple(shape)}, got {tuple(mask.shape)}.")
        if self.max_length is not None and self.columns + num > self.max_length:
            raise ValueError(
                f"the cache must hold at most max_length = {self.max_length} columns, got {self.columns} and {num} "
                "more. Make it longer, or leave max_length out."
            )
        if self.tokens is None:
            self.tokens = kept_zeros(batch, dtype=torch.int32, device=device)
        start, needed = self.columns, self.columns + num
        if needed >= self.size:
            self.size = -(-max(needed + 1, self.size * 5 // 4) // GROW) * GROW
        if not capturing(device):
            self.columns = needed
        kept = None if mask is None else mask.to(device).bool()
        added = torch.full_like(self.tokens, num) if kept is None else kept.sum(1, dtype=torch.int32)
        old = self.tokens.clone()
        self.tokens.add_(added)  # in place: a CUDA graph that replays this goes on counting
        return (self._single if num == 1 else self._several)(old, added, kept, num, start)

    def _check_batch(self, batch: int) -> None:
        if self.tokens is not None and len(self.tokens) != batch:
            raise ValueError(
                f"the batch must have {len(self.tokens)} rows as in the cache, got {batch}. Use a cache for each batch."
            )

    def follows(self, positions: Tensor, batch: int, mask: Tensor | None = None) -> Tensor:
        """Whether `positions`, `[1 or Bsz, S]`, are those that `advance` would give to new tokens, `[Bsz, S]`; where
        `mask` takes a token out any are.

        Raises:
            ValueError: as `advance`, of the batch.
        """
        self._check_batch(batch)
        old = 0 if self.tokens is None else self.tokens.long()[:, None]
        place = torch.arange(positions.shape[1], device=positions.device)
        if mask is None:
            return positions == old + place
        kept = mask.to(positions.device).bool()
        return ~kept | (positions == old + kept.cumsum(1) - 1)

    def replayed(self, num: int) -> None:
        """Count the columns of `num` replays of a CUDA graph that holds a pass of one column.

        Replays write keys and count `tokens` by themselves, but run no Python. Layers have to be told too.

        Raises:
            ValueError: no `max_length`, or fewer columns left than replays; the last of them have overwritten a row.
        """
        if self.max_length is None or self.columns + num > self.max_length:
            raise ValueError(
                f"replays must stay within max_length = {self.max_length}, got {num} after {self.columns} columns. "
                "Reserve more columns."
            )
        self.columns += num

    def _single(self, old: Tensor, added: Tensor, kept: Tensor | None, num: int, start: int) -> Step:
        """One new column: tail and new token are one block of l tokens in every row, kept where a block ends."""
        config, batch, size = self.config, len(old), self.size
        l, d = config.cmp_block, config.cmp_stride
        cmp_size, total = num_compressed(size - 1, config) + 1, old + added
        if self.block is None or self.block.num_seqs != batch:
            cu = uniform_cu_seqlens(batch, l, old.device)
            self.block = make_plan(cu, batch * l, config=config, max_seqlen=l)
        ends = (added > 0) & (total >= l) & ((total - l) % d == 0)
        index = (total - l) // d
        row = torch.arange(batch, device=old.device)
        slot = old.long().clamp_max(size - 1)  # a replayed CUDA graph may count beyond the end
        if kept is not None:
            slot = torch.where(kept[:, 0], slot, size - 1)
        return Step(
            plan=None,
            lengths=total,
            new=self.block,
            order=None,
            kept=kept,
            positions=old.long()[:, None] if kept is None else (old * kept[:, 0])[:, None].long(),
            cmp_positions=torch.where(ends, index * d, 0).long(),
            rows=row * size + slot,
            cmp_rows=row * cmp_size + torch.where(ends, index, cmp_size - 1),
            new_rows=row * l + l - 1,
            tail_rows=(row * l + added)[:, None] + torch.arange(l - 1, device=old.device),
            start=start,
            end=self.columns,
            size=size,
            cmp_size=cmp_size,
        )

    def _several(self, old: Tensor, added: Tensor, kept: Tensor | None, num: int, start: int) -> Step:
        config, batch, size = self.config, len(old), self.size
        l, d = config.cmp_block, config.cmp_stride
        cmp_size, new_size = num_compressed(size - 1, config) + 1, l + num
        total, none = old + added, torch.zeros_like(old)
        cmp_old, cmp_total = (((n - l) // d + 1).clamp_min(0) for n in (old, total))
        row = torch.arange(batch, device=old.device, dtype=torch.int32)

        plan = make_cached_plan(
            added, total, total=batch * num, max_new=num, size=size, cmp_size=cmp_size, config=config
        )

        # Tail and new tokens lie side by side; sequences and unused rows take turns here too. A row's part starts with
        # unused rows, since a tail ends at l - 1, and blocks start at the first token that no compressed row has had
        # as its first.
        first = row * new_size
        ends = in_turns(first + l - 1 - (old - cmp_old * d), first + l - 1 + added)
        new = make_plan(
            torch.nn.functional.pad(ends, (1, 0)), batch * new_size, config=config, max_seqlen=new_size,
            cu_cmp=cumulative(in_turns(none, cmp_total - cmp_old)),
            total_cmp=batch * num_compressed(new_size - 1, config),
        )  # fmt: skip
        seq, index = rows_of(new.cu_cmp, new.total_cmp)
        real, seq = seq < new.num_seqs, (seq // 2).clamp_max(batch - 1)
        index = index + cmp_old[seq]

        where = torch.arange(num, device=old.device).expand(batch, num) if kept is None else kept.cumsum(1) - 1
        row = row.long()[:, None]
        slot = torch.where(kept, old[:, None] + where, size - 1) if kept is not None else old[:, None] + where
        behind = torch.where(kept, where + l - 1, new_size - 1) if kept is not None else where + l - 1
        return Step(
            plan=plan,
            lengths=total,
            new=new,
            order=None if kept is None else (~kept).flatten().int().argsort(stable=True),
            kept=kept,
            positions=slot if kept is None else slot.masked_fill(~kept, 0),
            cmp_positions=torch.where(real, index * d, 0),
            rows=(row * size + slot).flatten(),
            cmp_rows=torch.where(real, seq * cmp_size + index, cmp_size - 1),
            new_rows=(row * new_size + behind).flatten(),
            tail_rows=row * new_size + added[:, None] + torch.arange(l - 1, device=old.device),
            start=start,
            end=self.columns,
            size=size,
            cmp_size=cmp_size,
        )

    @torch.inference_mode(False)
    def select(self, rows: Tensor) -> None:
        """Rows of the batch to go on with, int64: another order, some of them, or some more than once."""
        if self.tokens is not None:
            self.tokens = self.tokens.index_select(0, rows.to(self.tokens.device))

    def reset(self) -> None:
        """Forget all tokens; the size of the batch stays."""
        self.columns = 0
        if self.tokens is not None:
            self.tokens.zero_()


class LayerCache:
    """Keys and values of one layer, see the module. Rows past a sequence's end hold old or zero values, never garbage.

    Attributes:
        columns: tokens per row so far, those that a mask took out counted.
    """

    def __init__(self) -> None:
        self.columns = 0
        self.buffers: dict[str, Tensor] = {}  # [Bsz, rows, Hkv, D or Dv]
        self.tails: list[Tensor] = []  # [Bsz, l - 1, Hkv, D or Dv], the last tokens at the end

    def extend(self, step: Step, *sources: Tensor) -> tuple[Tensor, ...]:
        """Tail and new tokens, for `step.new`; the new tail is kept.

        Args:
            step: of this pass.
            sources: what is compressed, keys before rotation and values, each `[Bsz * S, Hkv, ...]`.

        Returns:
            Of each, rows `[step.new.total_k, Hkv, ...]`.

        Raises:
            ValueError: a step of another pass than the next one of this layer.
        """
        if step.start != self.columns:
            raise ValueError(
                f"step must start after the {self.columns} columns of this layer's cache, got {step.start}. Make one "
                "step per forward pass, and give it to every layer once."
            )
        batch, depth = step.tail_rows.shape
        if not self.tails:
            self.tails = [kept_zeros(batch, depth, *x.shape[1:], dtype=x.dtype, device=x.device) for x in sources]
        extended = []
        for tail, x in zip(self.tails, sources, strict=True):
            rows = tail.new_zeros(step.new.total_k, *tail.shape[2:])
            rows.unflatten(0, (batch, -1))[:, :depth] = tail
            rows.index_copy_(0, step.new_rows, x.to(tail.dtype))
            tail.copy_(rows[step.tail_rows])
            extended.append(rows)
        return tuple(extended)

    def append(self, step: Step, **rows: Tensor) -> dict[str, Tensor]:
        """Keep what a pass made.

        Args:
            step: of this pass.
            rows: by name. Names that end in `_cmp` are compressed rows of `step.new`, `[step.new.total_cmp, Hkv, ...]`;
                others belong to tokens, `[Bsz * S, Hkv, ...]`. Keys are rotated. The same names in every pass.

        Returns:
            For each name everything kept so far, `[Bsz, rows, Hkv, ...]`.
        """
        self.columns = step.end
        for name, x in rows.items():
            index, size = (step.cmp_rows, step.cmp_size) if name.endswith("_cmp") else (step.rows, step.size)
            buffer = old = self.buffers.get(name)
            if buffer is None or buffer.shape[1] != size:
                like = x if old is None else old
                buffer = kept_zeros(len(step.tail_rows), size, *x.shape[1:], dtype=like.dtype, device=like.device)
                if old is not None:
                    shared = min(size, old.shape[1])
                    buffer[:, :shared] = old[:, :shared]
                self.buffers[name] = buffer
            buffer.flatten(0, 1).index_copy_(0, index, x.to(buffer.dtype))
        return {name: self.buffers[name] for name in rows}

    def replayed(self, num: int) -> None:
        """As `CacheLengths.replayed`, for this layer."""
        self.columns += num

    @torch.inference_mode(False)
    def select(self, rows: Tensor) -> None:
        """As `CacheLengths.select`, for this layer."""
        for name, x in self.buffers.items():
            self.buffers[name] = x.index_select(0, rows.to(x.device))
        self.tails = [x.index_select(0, rows.to(x.device)) for x in self.tails]

    def reset(self) -> None:
        """As `CacheLengths.reset`, for this layer. The memory stays, its contents are not read again."""
        self.columns = 0


@torch.inference_mode(False)
def kept_zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that later passes write into, which `torch.inference_mode()` would forbid outside it."""
    return torch.zeros(shape, dtype=dtype, device=device)


def capturing(device: torch.device) -> bool:
    """Work on the device is being recorded into a CUDA graph, not done."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
