"""Block lists: the selection turned around.

The selection names, for each token, the blocks it chose. The KV-major schedule needs the inverse: for each block the
ascending list of tokens that chose it. A *pair* is one (token, slot) entry; a *row* is one query head of a pair, so
row r of a list is pair r // G, head r % G, and any group size G fills a tile. Lists are cut into *items*, one program
each.

Everything is built on the device, without a sort, in a few passes over *membership masks*: for each (block, tile of 64
query tokens) a 64-bit word that tells which tokens of the tile chose the block.

1. mask: each pair sets its bit. An integer `or`, so the order does not matter.
2. popular, where asked for: blocks that many neighbouring tokens chose leave the lists for a table of their own.
3. count: running totals of the words' bit counts along the tiles give each word its place in its list.
4. place: a pair's place is that of its word plus the number of lower bits in it.
5. items: cut the lists, and without token ranges order the items by their size, the longest first, by running sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsattn.kernels._chunks import Chunk
from nsattn.kernels._tile import bounds, cdiv, last_at_most, next_power_of_2
from nsattn.plan import TILE, Plan

TILE_ROWS = tl.constexpr(TILE)
# By how many pairs they have, items are sorted into these: whole ones first, then by eighths of a whole one. Programs
# that take long start first, or the last of them would run alone.
SIZES = 9


class Popular(NamedTuple):
    """What makes a block popular with `tokens` neighbouring query tokens, counted from the start of a tile: that at
    least `fewest` of them chose it. Like `Cut`, it looks at nothing but the sequence."""

    tokens: int  # up to TILE
    fewest: int

    @property
    def parts(self) -> int:
        """Into how many such groups of tokens a tile is cut. The last one may be shorter."""
        return cdiv(TILE, self.tokens)

    def most(self, N: int) -> int:
        """Most blocks that are popular with the same tokens."""
        return N * self.tokens // self.fewest


class PopularBlocks(NamedTuple):
    """Blocks that left the lists. A row is a part of a tile of the plan: `tokens` neighbours, or what is left of it."""

    counts: Tensor  # int32 [rows, heads] how many there are
    blocks: Tensor  # int32 [rows, heads, most] in the sequence, ascending
    members: Tensor  # int64 [rows, heads, most] bit i is set if the i-th of the tokens chose the block
    tokens: int
    tile0: int  # the tile of the first row


class BlockLists(NamedTuple):
    """Inverse of a selection, for the rows and KV heads of a `Chunk`."""

    # int32 [pairs] query row of each pair, list by list, ascending in each. None: a pair is its row.
    tokens: Tensor | None
    inverse: Tensor | None  # int32 [rows, heads, N] place of each pair in `tokens`, -1 where the entry is in no list
    items: Tensor  # int32 [items, 6] KV head, sequence, block in the sequence, first pair, number of pairs, slice or -1
    # int32 [lists, 2] first and end slice of each list that is cut into several items, else two equal numbers; counted
    # from slices[0, 0]
    slices: Tensor
    num_slices: int  # upper bound
    by_block: bool  # lists are ordered by (block, KV head), else by (KV head, token range, block)
    popular: PopularBlocks | None = None


class Cut(NamedTuple):
    """Where lists are cut into items. It looks at nothing but a sequence itself, so that sums of items, which are
    rounded in their order, do not depend on the batch."""

    pairs: int  # most pairs of an item
    # The same in a sequence of at most `short` queries. Its lists are few, and the longest item is the last to end.
    short_pairs: int
    short: int = 16384

    def pieces(self, plan: Plan, rows: int, heads: int, N: int, each: int = 1) -> int:
        """Upper bound of the sum over lists of each * pairs / most pairs of an item, rounded down."""
        pairs, short = rows * heads * N, min(rows, plan.num_seqs * self.short) * heads * N
        return each * (short * self.pairs + (pairs - short) * self.short_pairs) // (self.pairs * self.short_pairs)

    def slices(self, plan: Plan, rows: int, heads: int, N: int) -> int:
        """Upper bound of the items of lists that are cut. One of p > 1 items has more than (p - 1) times the most pairs
        of an item, so p is at most twice its pairs over those."""
        longest = _columns(plan, rows, None)[0] * TILE
        return 0 if longest <= min(self.pairs, self.short_pairs) else self.pieces(plan, rows, heads, N, each=2)


def lists_bytes(
    plan: Plan, rows: int, heads: int, N: int, cut: Cut, span: int | None = None, popular: Popular | None = None
) -> tuple[int, int]:
    """Memory of the lists of so many query rows and KV heads, and what `invert` takes besides to make them."""
    columns, ranges = _columns(plan, rows, span)
    lists, pairs = heads * ranges * plan.total_blk, rows * heads * N
    words = heads * plan.total_blk * columns
    # int32: token and place of each pair, items, running sums; place and (int64) mask of each word, counts
    sums = (2 + (1 if span else SIZES)) * lists + 3
    lists_of = 2 * pairs + 6 * (lists + cut.pieces(plan, rows, heads, N)) + sums
    if popular:
        tiles = min(plan.q_tiles.shape[0], rows // TILE + plan.num_seqs + 1)
        lists_of += tiles * popular.parts * heads * (3 * popular.most(N) + 1)
    return 4 * lists_of, 4 * (3 * words + sums)


def _columns(plan: Plan, rows: int, span: int | None) -> tuple[int, int]:
    """Most tiles of one sequence that meet a chunk of so many rows, and into how many token ranges they are cut."""
    columns = max(1, min(-(-plan.max_q // TILE), rows // TILE + 2))
    return columns, -(-columns // _span_columns(columns, span))


def _span_columns(columns: int, span: int | None) -> int:
    return max(1, span // TILE) if span else columns


@triton.jit
def bit_counts(x):
    """Number of bits set in each of the uint64 words x."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((x * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit
def _query_tile(Q_TILES, CU_Q, CU_K, i_tile, row0):
    """Sequence (-1: no tile), first row, its position, rows and column among the sequence's tiles in the chunk."""
    i_s = tl.load(Q_TILES + 2 * i_tile)
    first = tl.load(Q_TILES + 2 * i_tile + 1)
    start_q, len_q = bounds(CU_Q, tl.maximum(i_s, 0))
    _, len_k = bounds(CU_K, tl.maximum(i_s, 0))
    column = first // TILE_ROWS - (tl.maximum(row0 - start_q, 0) // TILE_ROWS).to(tl.int32)
    return i_s, start_q + first, first + len_k - len_q, len_q - first, column


@triton.jit
def _load_blocks(IDX, row, m_t, position, o_n, num_kv_heads, i_h, N: tl.constexpr, B: tl.constexpr):
    """Selected blocks [tokens, BN] of some query rows; -1 for entries that are unused, future or out of range."""
    p = IDX + (row * num_kv_heads + i_h)[:, None] * N + o_n[None, :]
    block = tl.load(p, mask=m_t[:, None] & (o_n < N)[None, :], other=-1)
    # Dividing the position keeps the test free of overflow for hostile block numbers.
    visible = (block >= 0) & (position[:, None] >= 0) & (block <= position[:, None] // B)
    return tl.where(visible, block, -1)


@triton.jit
def _word(i_h, column, blk, num_blk, columns):
    """Index of the word of a tile and a block of the batch. Those of a tile are neighbours: its tokens share cache
    lines, and a tile is read as a whole."""
    return (i_h.to(tl.int64) * columns + column) * num_blk + blk


@triton.jit(do_not_specialize=["tile0", "row0", "row1", "head0", "num_kv_heads", "num_blk", "columns"])
def _mask_kernel(
    IDX, MASKS, Q_TILES, CU_Q, CU_K, CU_BLK, tile0, row0, row1, head0, num_kv_heads, num_blk, columns,
    N: tl.constexpr, BN: tl.constexpr, B: tl.constexpr, BT: tl.constexpr, WHOLE: tl.constexpr,
):
    """Pass 1: set the bits of BT tokens of a tile, one KV head. WHOLE: of tokens outside the chunk's rows too."""
    SUBS: tl.constexpr = TILE_ROWS // BT
    i_tile, i_sub, i_h = tile0 + tl.program_id(0) // SUBS, tl.program_id(0) % SUBS, tl.program_id(1)
    i_s, row, position, rows, column = _query_tile(Q_TILES, CU_Q, CU_K, i_tile, row0)
    # A sequence longer than the plan's bound has more columns than the table: what lies beyond is dropped.
    if (i_s < 0) | (row >= row1) | (row + TILE_ROWS <= row0) | (column >= columns):
        return
    o_t = i_sub * BT + tl.arange(0, BT)
    o_n = tl.arange(0, BN)
    m_t = o_t < rows
    if not WHOLE:
        m_t &= (row + o_t >= row0) & (row + o_t < row1)
    block = _load_blocks(IDX, row + o_t, m_t, position + o_t, o_n, num_kv_heads, head0 + i_h, N, B)
    bit = tl.full([BT, BN], 1, tl.uint64) << o_t.to(tl.uint64)[:, None]
    word = _word(i_h, column, tl.load(CU_BLK + i_s) + block, num_blk, columns)
    tl.atomic_or(MASKS + word, bit.to(tl.int64, bitcast=True), mask=block >= 0, sem="relaxed")


@triton.jit
def _low_bits(n):
    """A word with its n lowest bits set, 0 <= n <= 64."""
    half = tl.full([], 1, tl.uint64) << (n // 2).to(tl.uint64)  # in two steps, since no shift by 64 is defined
    return (half << (n - n // 2).to(tl.uint64)) - 1


@triton.jit(do_not_specialize=["tile0", "row0", "row1", "num_blk", "columns", "heads"])
def _popular_kernel(
    MASKS, COUNTS, BLOCKS, MEMBERS, Q_TILES, CU_Q, CU_K, CU_BLK, tile0, row0, row1, num_blk, columns, heads,
    B: tl.constexpr, TOKENS: tl.constexpr, FEWEST: tl.constexpr, MOST: tl.constexpr,
    PARTS: tl.constexpr, BP: tl.constexpr, BB: tl.constexpr,
):
    """Pass 2, for a tile and one KV head: move the popular blocks of each of its PARTS from the masks to the table, and
    drop the bits of tokens outside the chunk."""
    i_tile, i_h = tl.program_id(0), tl.program_id(1)
    i_s, row, position, rows, column = _query_tile(Q_TILES, CU_Q, CU_K, tile0 + i_tile, row0)
    o_p, o_b = tl.arange(0, BP), tl.arange(0, BB)
    table = (i_tile.to(tl.int64) * PARTS + o_p) * heads + i_h
    count = tl.zeros([BP], tl.int32)
    if (i_s >= 0) & (row < row1) & (row + TILE_ROWS > row0) & (column < columns):
        # Tokens of the chunk: those before row1 that do not come before row0.
        before, until = _low_bits(tl.maximum(row0 - row, 0)), _low_bits(tl.minimum(row1 - row, 64))
        shift = tl.minimum(o_p * TOKENS, TILE_ROWS - 1).to(tl.uint64)[:, None]
        bits = _low_bits(tl.where(o_p < PARTS, TOKENS, 0))[:, None]
        last = position + tl.minimum(rows, TILE_ROWS) - 1
        end = tl.where(last >= 0, last // B + 1, 0)  # queries before the first key see nothing; -1 // B is 0
        p_tile = MASKS + _word(i_h, column, tl.load(CU_BLK + i_s), num_blk, columns)
        for b0 in range(0, end, BB):
            block = b0 + o_b
            p_word = p_tile + block
            word = tl.load(p_word, mask=block < end, other=0).to(tl.uint64, bitcast=True)
            # [BP, BB]
            members = (word[None, :] >> shift) & bits
            popular = bit_counts(members) >= FEWEST
            place = count[:, None] + tl.cumsum(popular.to(tl.int32), 1) - 1
            p = table[:, None] * MOST + place
            tl.store(BLOCKS + p, tl.broadcast_to(block[None, :], [BP, BB]), mask=popular)
            tl.store(MEMBERS + p, members.to(tl.int64, bitcast=True), mask=popular)
            count += tl.sum(popular.to(tl.int32), 1)
            taken = tl.sum(tl.where(popular, members << shift, 0).to(tl.int64, bitcast=True), 0)
            left = word & until
            left ^= left & (before | taken.to(tl.uint64, bitcast=True))
            tl.store(p_word, left.to(tl.int64, bitcast=True), mask=left != word)
    tl.store(COUNTS + table, count, mask=o_p < PARTS)


@triton.jit
def _list_of(i_h, i_range, blk, heads, ranges, num_blk, BY_BLOCK: tl.constexpr):
    """Number of a list. Where a range is all tokens, those of all heads for one block are neighbours."""
    if BY_BLOCK:
        return blk * heads + i_h
    else:
        return (i_h * ranges + i_range) * num_blk + blk


@triton.jit
def most_pairs(CU_Q, i_s, pairs, short_pairs, short):
    """Most pairs of an item in the sequences i_s, see `Cut`."""
    return tl.where(tl.load(CU_Q + i_s + 1) - tl.load(CU_Q + i_s) <= short, short_pairs, pairs)


@triton.jit(do_not_specialize=[
    "row0", "num_blk", "columns", "span", "heads", "ranges", "num_lists", "num_seqs", "pairs", "short_pairs", "short",
])
def _count_kernel(
    MASKS, PLACES, COUNTS, CU_Q, CU_K, CU_BLK, row0, num_blk, columns, span, heads, ranges, num_lists, num_seqs,
    pairs, short_pairs, short, B: tl.constexpr, BY_BLOCK: tl.constexpr, SIZES: tl.constexpr,
    BL: tl.constexpr, BC: tl.constexpr,
):
    """Pass 3, for BL blocks and one token range of one KV head: place of each word in its list, length of the lists,
    and into how many items of each of SIZES sizes they are cut; where that is more than one, also how many: slices."""
    i_range, i_h = tl.program_id(1), tl.program_id(2)
    blk = tl.program_id(0) * BL + tl.arange(0, BL)
    m_blk = blk < num_blk
    seq = tl.minimum(last_at_most(CU_BLK, num_seqs + 1, blk), num_seqs - 1)
    # From the first column with a token that sees one of the blocks to the last of their sequences: the words around
    # them are zero, and nobody asks for their places.
    start_q, start_k = tl.load(CU_Q + seq), tl.load(CU_K + seq)
    len_q, len_k = tl.load(CU_Q + seq + 1) - start_q, tl.load(CU_K + seq + 1) - start_k
    token = tl.maximum((blk - tl.load(CU_BLK + seq)) * B - (len_k - len_q), 0)
    skipped = (tl.maximum(row0 - start_q, 0) // TILE_ROWS).to(tl.int32)
    first = tl.maximum(tl.min(tl.where(m_blk, token // TILE_ROWS - skipped, columns), 0), i_range * span)
    end = tl.max(tl.where(m_blk, (len_q + TILE_ROWS - 1) // TILE_ROWS - skipped, 0), 0)
    end = tl.minimum(tl.minimum(end, columns), (i_range + 1) * span)
    total = tl.zeros([BL], tl.int32)
    for c0 in range(first, end, BC):
        o_c = c0 + tl.arange(0, BC)
        m = m_blk[:, None] & (o_c < end)[None, :]
        word = _word(i_h, o_c[None, :], blk[:, None], num_blk, columns)
        # [BL, BC]
        members = tl.load(MASKS + word, mask=m, other=0).to(tl.uint64, bitcast=True)
        count = bit_counts(members)
        tl.store(PLACES + word, total[:, None] + tl.cumsum(count, 1) - count, mask=m)
        total += tl.sum(count, 1)
    i_list = _list_of(i_h, i_range, blk, heads, ranges, num_blk, BY_BLOCK)
    most = most_pairs(CU_Q, seq, pairs, short_pairs, short)
    whole, rest = total // most, total % most
    pieces = whole + (rest > 0).to(tl.int32)
    p = COUNTS + 1 + i_list
    p_items = p + num_lists + 1
    p_slices = p_items + SIZES * num_lists + 1
    tl.store(p, total, mask=m_blk)
    if SIZES == 1:
        tl.store(p_items, pieces, mask=m_blk)
    else:
        tl.store(p_items, whole, mask=m_blk)
        size = tl.where(rest > 0, SIZES - 1 - rest * (SIZES - 1) // most, 0)
        for i in tl.static_range(1, SIZES):
            tl.store(p_items + i * num_lists, (size == i).to(tl.int32), mask=m_blk)
    tl.store(p_slices, tl.where(pieces > 1, pieces, 0), mask=m_blk)
    if (tl.program_id(0) == 0) & (i_range == 0) & (i_h == 0):
        tl.store(COUNTS, 0)
        tl.store(COUNTS + num_lists + 1, 0)
        tl.store(COUNTS + num_lists + 1 + SIZES * num_lists + 1, 0)


@triton.jit(do_not_specialize=[
    "tile0", "row0", "row1", "head0", "heads", "num_kv_heads", "num_blk", "columns", "span", "ranges",
])
def _place_kernel(
    IDX, MASKS, PLACES, STARTS, TOKENS, INVERSE, Q_TILES, CU_Q, CU_K, CU_BLK,
    tile0, row0, row1, head0, heads, num_kv_heads, num_blk, columns, span, ranges,
    N: tl.constexpr, BN: tl.constexpr, B: tl.constexpr, BY_BLOCK: tl.constexpr, BT: tl.constexpr,
    POPULAR: tl.constexpr,
):
    """Pass 4, for BT tokens of a tile, one KV head: the place of each pair, and the token at that place."""
    SUBS: tl.constexpr = TILE_ROWS // BT
    i_tile, i_sub, i_h = tile0 + tl.program_id(0) // SUBS, tl.program_id(0) % SUBS, tl.program_id(1)
    i_s, row, position, rows, column = _query_tile(Q_TILES, CU_Q, CU_K, i_tile, row0)
    # A sequence longer than the plan's bound has more columns than the table: what lies beyond is dropped.
    if (i_s < 0) | (row >= row1) | (row + TILE_ROWS <= row0) | (column >= columns):
        return
    o_t = i_sub * BT + tl.arange(0, BT)
    o_n = tl.arange(0, BN)
    row += o_t
    m_t = (o_t < rows) & (row >= row0) & (row < row1)
    block = _load_blocks(IDX, row, m_t, position + o_t, o_n, num_kv_heads, head0 + i_h, N, B)
    p_idx = IDX + (row * num_kv_heads + head0 + i_h) * N
    m_pair = m_t[:, None] & (o_n + 1 < N)[None, :]
    entry = tl.load(p_idx[:, None] + o_n[None, :], mask=m_pair, other=-1)
    after = tl.load(p_idx[:, None] + o_n[None, :] + 1, mask=m_pair, other=-1)
    if tl.max(tl.max(((after >= 0) & ((entry < 0) | (after <= entry))).to(tl.int32), 1), 0) > 0:
        # Not ascending up to the unused slots, as `select_blocks` makes it: an entry that repeats an earlier one is
        # ignored.
        for i in range(N - 1):
            earlier = tl.load(p_idx + i, mask=m_t, other=-1)
            block = tl.where((o_n[None, :] > i) & (block == earlier[:, None]), -1, block)
    used = block >= 0
    blk = tl.load(CU_BLK + i_s) + block
    word = _word(i_h, column, blk, num_blk, columns)
    # [BT, BN]
    members = tl.load(MASKS + word, mask=used, other=0).to(tl.uint64, bitcast=True)
    bit = tl.full([BT], 1, tl.uint64) << o_t.to(tl.uint64)
    if POPULAR:
        used &= (members & bit[:, None]) != 0  # else the block has left the lists
    lower = bit - 1
    i_list = _list_of(i_h, column // span, blk, heads, ranges, num_blk, BY_BLOCK)
    place = tl.load(STARTS + i_list, mask=used, other=0) + tl.load(PLACES + word, mask=used, other=0)
    place += bit_counts(members & lower[:, None])
    tl.store(TOKENS + place, tl.broadcast_to(row.to(tl.int32)[:, None], [BT, BN]), mask=used)
    tl.store(INVERSE + (((row - row0) * heads + i_h) * N)[:, None] + o_n[None, :], place, mask=used)


@triton.jit(do_not_specialize=[
    "num_lists", "num_items", "num_blk", "heads", "ranges", "num_seqs", "pairs", "short_pairs", "short",
])
def _items_kernel(
    STARTS, CU_Q, CU_BLK, ITEMS, num_lists, num_items, num_blk, heads, ranges, num_seqs, pairs, short_pairs, short,
    BY_BLOCK: tl.constexpr, SIZES: tl.constexpr, BI: tl.constexpr,
):
    """Pass 5: the six numbers of BI items, see `BlockLists.items`; unused items get no pairs."""
    FIRST = STARTS + num_lists + 1  # the running sums of items and of slices begin where those before them end
    SLICES = FIRST + SIZES * num_lists + 1
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    m = i < num_items
    # The last list of a size whose first item is at most i; those with none share that number with the next and come
    # before it.
    item0 = tl.load(FIRST)
    entry = tl.minimum(last_at_most(FIRST, SIZES * num_lists + 1, item0 + i), SIZES * num_lists - 1)
    size, i_list = entry // tl.maximum(num_lists, 1), entry % tl.maximum(num_lists, 1)
    offset = item0 + i - tl.load(FIRST + entry)
    exists = offset < tl.load(FIRST + entry + 1) - tl.load(FIRST + entry)
    if BY_BLOCK:
        block, head = i_list // heads, i_list % heads
    else:
        block, head = i_list % num_blk, i_list // (num_blk * ranges)
    seq = tl.minimum(last_at_most(CU_BLK, num_seqs + 1, block), num_seqs - 1)
    most = most_pairs(CU_Q, seq, pairs, short_pairs, short)
    start = tl.load(STARTS + i_list)
    total = tl.load(STARTS + i_list + 1) - start
    piece = tl.where(size == 0, offset, total // most)  # the rest of a list is its last piece
    first = start + piece * most
    count = tl.minimum(total - piece * most, most)
    slot = tl.where(total > most, tl.load(SLICES + i_list) - tl.load(SLICES) + piece, -1)
    p = ITEMS + i * 6
    tl.store(p, head, mask=m)
    tl.store(p + 1, seq, mask=m)
    tl.store(p + 2, block - tl.load(CU_BLK + seq), mask=m)
    tl.store(p + 3, first, mask=m)
    tl.store(p + 4, tl.where(exists, tl.maximum(count, 0), 0), mask=m)
    tl.store(p + 5, slot, mask=m)


def invert(
    block_idx: Tensor, plan: Plan, chunk: Chunk, *, cut: Cut, span: int | None = None, popular: Popular | None = None
) -> BlockLists:
    """Invert a selection. Entries that are negative, repeat, lie in the future or outside the sequence are dropped.

    Args:
        block_idx: int32 `[total_q, Hkv, N]`.
        chunk: rows and KV heads to take.
        cut: the longest piece of a list that one program gets.
        span: cut every list by ranges of so many tokens of its sequence, and walk all blocks of a range before the
            next, KV head by KV head: the queries of a range then stay in the L2 cache. Default: no ranges, and the
            longest items first.
        popular: which blocks leave the lists for a table of their own. Default: none.
    """
    N, B, device = block_idx.shape[-1], plan.config.slc_block, block_idx.device
    row0, row1, head0, heads, num_blk = chunk.row0, chunk.row1, chunk.head0, chunk.heads, plan.total_blk
    columns, ranges = _columns(plan, chunk.rows, span)
    span_columns = _span_columns(columns, span)
    num_lists = heads * ranges * num_blk
    tile0 = row0 // TILE
    num_tiles = min(plan.q_tiles.shape[0], (row1 - 1) // TILE + plan.num_seqs + 1) - tile0
    tables = (plan.q_tiles, plan.cu_q, plan.cu_k, plan.cu_blk)
    sizes = {"N": N, "BN": next_power_of_2(N, 1), "B": B}
    by_block = span is None

    masks = torch.zeros(heads, columns, num_blk, dtype=torch.int64, device=device)
    BT = 16
    _mask_kernel[(num_tiles * (TILE // BT), heads)](
        block_idx, masks, *tables, tile0, row0, row1, head0, block_idx.shape[1], num_blk, columns,
        **sizes, BT=BT, WHOLE=popular is not None, num_warps=2,
    )  # fmt: skip
    table = None
    if popular is not None:
        parts, most = popular.parts, popular.most(N)
        BP = next_power_of_2(parts, 1)
        table = PopularBlocks(
            torch.empty(num_tiles * parts, heads, dtype=torch.int32, device=device),
            torch.empty(num_tiles * parts, heads, most, dtype=torch.int32, device=device),
            torch.empty(num_tiles * parts, heads, most, dtype=torch.int64, device=device),
            popular.tokens, tile0,
        )  # fmt: skip
        _popular_kernel[(num_tiles, heads)](
            masks, *table[:3], *tables, tile0, row0, row1, num_blk, columns, heads,
            B=B, TOKENS=popular.tokens, FEWEST=popular.fewest, MOST=most, PARTS=parts, BP=BP, BB=max(128, 256 // BP),
            num_warps=2,
        )  # fmt: skip
    places = torch.empty_like(masks, dtype=torch.int32)
    item_sizes = SIZES if by_block else 1
    counts = torch.empty((2 + item_sizes) * num_lists + 3, dtype=torch.int32, device=device)
    BL, BC = 4, 128
    _count_kernel[(cdiv(num_blk, BL), ranges, heads)](
        masks, places, counts, plan.cu_q, plan.cu_k, plan.cu_blk, row0, num_blk, columns, span_columns, heads, ranges,
        num_lists, plan.num_seqs, *cut, B=B, BY_BLOCK=by_block, SIZES=item_sizes, BL=BL, BC=BC, num_warps=2,
    )  # fmt: skip
    starts = counts.cumsum(0, dtype=torch.int32)  # three running sums, each begun where the one before ends
    num_pairs = chunk.rows * heads * N
    tokens = torch.empty(num_pairs, dtype=torch.int32, device=device)
    inverse = torch.full((chunk.rows, heads, N), -1, dtype=torch.int32, device=device)
    _place_kernel[(num_tiles * (TILE // BT), heads)](
        block_idx, masks, places, starts, tokens, inverse, *tables, tile0, row0, row1, head0, heads,
        block_idx.shape[1], num_blk, columns, span_columns, ranges, **sizes, BY_BLOCK=by_block, BT=BT,
        POPULAR=popular is not None, num_warps=2,
    )  # fmt: skip
    num_items = num_lists + cut.pieces(plan, chunk.rows, heads, N)
    items = torch.empty(num_items, 6, dtype=torch.int32, device=device)
    BI = 128
    _items_kernel[(cdiv(num_items, BI),)](
        starts, plan.cu_q, plan.cu_blk, items, num_lists, num_items, num_blk, heads, ranges, plan.num_seqs, *cut,
        BY_BLOCK=by_block, SIZES=item_sizes, BI=BI,
    )  # fmt: skip
    slices = starts[-num_lists - 1 :].unfold(0, 2, 1)
    return BlockLists(tokens, inverse, items, slices, cut.slices(plan, chunk.rows, heads, N), by_block, table)


@triton.jit
def load_item(ITEMS, i):
    """KV head, sequence, block, first pair (int64), number of pairs and slice of an item."""
    p = ITEMS + 6 * i
    return (tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3).to(tl.int64), tl.load(p + 4), tl.load(p + 5))
