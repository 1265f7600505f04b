"""Block lists against an inversion in plain Python: packed lengths, chunks, ranges, hostile entries."""

from __future__ import annotations

import os

import pytest
import torch

from nsattn import NSAConfig
from nsattn.kernels._chunks import SLACK, Chunk, chunks
from nsattn.kernels._lists import Cut, Popular, invert, lists_bytes
from nsattn.plan import TILE, make_plan
from nsattn.testing import hostile_selection, make_inputs, random_selection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or the interpreter"
)
CONFIG = NSAConfig(8, 4, 16, 4, 20)
CUT = Cut(7, 5, short=100)


def plan_of(lengths, lengths_k=None, heads=2):
    return make_inputs(
        lengths, lengths_k=lengths_k, num_kv_heads=heads, group=1, head_dim=16, config=CONFIG, slack=3, device=DEVICE,
        dtype=torch.float32,
    ).plan  # fmt: skip


def naive(block_idx, plan, chunk):
    """Query rows of each (KV head in the chunk, sequence, block), and the first slot of each (row, head, block)."""
    cu_q, cu_k = plan.cu_q.tolist(), plan.cu_k.tolist()
    lists, slots = {}, {}
    for s in range(plan.num_seqs):
        len_q, len_k = cu_q[s + 1] - cu_q[s], cu_k[s + 1] - cu_k[s]
        for i in range(len_q):
            row, position = cu_q[s] + i, len_k - len_q + i
            if not chunk.row0 <= row < chunk.row1:
                continue
            for h in range(chunk.head0, chunk.head1):
                for n, block in enumerate(block_idx[row, h].tolist()):
                    key = row, h - chunk.head0, block
                    if 0 <= block <= position // plan.config.slc_block and position >= 0 and key not in slots:
                        slots[key] = n
                        lists.setdefault((h - chunk.head0, s, block), []).append(row)
    return lists, slots


@pytest.mark.parametrize("lengths", [(150, 0, 1, 70), (300,), (1,) * 20, (0, 0), (64, 128)], ids=str)
@pytest.mark.parametrize("select", [random_selection, hostile_selection])
def test_invert(lengths, select):
    check(plan_of(lengths), select)


def test_invert_chunked_prefill():
    check(plan_of((5, 64, 65, 63), (100, 64, 70, 40)), random_selection)


def check(plan, select):
    block_idx = select(plan, 2)
    whole = Chunk(0, plan.total_q, 0, 2, 0, 1)
    part = Chunk(64, min(128, plan.total_q), 1, 2, 0, 1)
    for chunk in (whole, part) if plan.total_q > 64 else (whole,):
        lists, slots = naive(block_idx, plan, chunk)
        for span in (None, 64):
            got = invert(block_idx, plan, chunk, cut=CUT, span=span)
            found, slices, shares, lengths = {}, [], [], plan.cu_q.diff().tolist()
            for head, sequence, block, first, count, slot in got.items.tolist():
                most = 5 if lengths[sequence] <= 100 else 7
                assert 0 <= count <= most
                if count:
                    found.setdefault((head, sequence, block), []).extend(got.tokens[first : first + count].tolist())
                    slices += [slot] if slot >= 0 else []
                    shares.append(8 if count == most else count * 8 // most)
            if span is None:
                assert found == lists and got.by_block
                assert shares == sorted(shares, reverse=True)  # in eighths of a whole item: the longest start first
            else:
                assert {key: sorted(rows) for key, rows in found.items()} == lists
                if plan.num_seqs == 1:  # a range of tokens comes whole before the next
                    assert found == lists
            assert sorted(slices) == list(range(len(slices))) and len(slices) <= got.num_slices
            assert int((got.inverse >= 0).sum()) == len(slots)
            for (row, head, _), n in slots.items():
                assert got.tokens[got.inverse[row - chunk.row0, head, n]] == row


@pytest.mark.parametrize("popular", [Popular(64, 20), Popular(22, 3), Popular(13, 4), Popular(2, 1)], ids=str)
@pytest.mark.parametrize("select", [random_selection, hostile_selection])
@pytest.mark.parametrize("lengths", [(150, 0, 1, 70), (20,) * 5, ((5, 64, 65, 63), (100, 64, 70, 40)),
                                     ((64, 64, 70), (0, 64, 70))], ids=str)
def test_popular_blocks_leave_the_lists(lengths, select, popular):
    """What is popular is decided by whole tiles of a sequence, whatever the chunk; the rest is listed as ever."""
    plan = plan_of(*lengths) if isinstance(lengths[0], tuple) else plan_of(lengths)
    block_idx = select(plan, 2)
    cu_q, N = plan.cu_q.tolist(), block_idx.shape[-1]

    def first_of(token):
        """First of the neighbours of a token."""
        return token // TILE * TILE + token % TILE // popular.tokens * popular.tokens

    everything, _ = naive(block_idx, plan, Chunk(0, plan.total_q, 0, 2, 0, 1))
    for chunk in (Chunk(0, plan.total_q, 0, 2, 0, 1), Chunk(64, min(128, plan.total_q), 1, 2, 0, 1)):
        lists, slots = naive(block_idx, plan, chunk)
        want = {}  # (KV head, sequence, first token): {block: members}
        for (head, s, block), rows in everything.items():
            for row in rows:
                first = first_of(row - cu_q[s])
                if chunk.head0 <= head < chunk.head1:
                    bits = want.setdefault((head - chunk.head0, s, first), {})
                    bits[block] = bits.get(block, 0) | 1 << row - cu_q[s] - first
        chosen = {key: {b: m for b, m in bits.items() if m.bit_count() >= popular.fewest} for key, bits in want.items()}

        got = invert(block_idx, plan, chunk, cut=CUT, span=64, popular=popular)
        table, parts, found = got.popular, popular.parts, {}
        assert table.counts.shape[0] % parts == 0 and (parts - 1) * popular.tokens < TILE <= parts * popular.tokens
        assert table.blocks.shape[-1] == N * popular.tokens // popular.fewest
        for i, counts in enumerate(table.counts.tolist()):
            s, first = plan.q_tiles[table.tile0 + i // parts].tolist()
            for head, count in enumerate(counts):
                blocks = table.blocks[i, head, :count].tolist()
                assert blocks == sorted(blocks)
                members = [m % 2**64 for m in table.members[i, head, :count].tolist()]
                if count:
                    found[head, s, first + i % parts * popular.tokens] = dict(zip(blocks, members, strict=True))
        meets = {}
        for (head, s, first), bits in chosen.items():
            tile = cu_q[s] + first // TILE * TILE
            if bits and tile < chunk.row1 and tile + TILE > chunk.row0:
                meets[head, s, first] = bits
        assert found == meets

        def left(head, s, block, row, chosen=chosen):
            return block not in chosen.get((head, s, first_of(row - cu_q[s])), {})

        listed = {}
        for head, s, block, first, count, _ in got.items.tolist():
            if count:
                listed.setdefault((head, s, block), []).extend(got.tokens[first : first + count].tolist())
        rest = {(h, s, b): [r for r in rows if left(h, s, b, r)] for (h, s, b), rows in lists.items()}
        assert {key: sorted(rows) for key, rows in listed.items()} == {k: rows for k, rows in rest.items() if rows}
        for (row, head, block), n in slots.items():
            s = max(i for i in range(plan.num_seqs) if cu_q[i] <= row)
            place = got.inverse[row - chunk.row0, head, n]
            assert got.tokens[place] == row if left(head, s, block, row) else place == -1
        assert int((got.inverse >= 0).sum()) == sum(map(len, rest.values()))


def test_a_wrong_bound_on_the_lengths_writes_nothing_outside():
    """`max_seqlen` 64 for a sequence of 300: the tokens beyond the table are dropped, not written behind it."""
    cu = torch.tensor([0, 300], dtype=torch.int32, device=DEVICE)
    right = make_plan(cu, 300, config=CONFIG, max_seqlen=300)
    plan = right._replace(max_q=64, max_k=64)  # as it would be on a GPU, where nobody looks
    block_idx = random_selection(right, 1)
    lists = invert(block_idx, plan, Chunk(0, 300, 0, 1, 0, 1), cut=CUT)
    assert (lists.inverse[64:] == -1).all()
    assert torch.equal(lists.inverse[:64] >= 0, block_idx[:64] >= 0)


@pytest.mark.parametrize("group", [1, 4, 5])
def test_chunks_cover_everything_within_the_budget(group):
    plan = plan_of((5000, 0, 300), heads=8)

    def size(rows, heads, part):
        lists, making = lists_bytes(plan, rows, heads, 4, CUT)
        return lists + max(making, rows * heads * part * 500)

    cuts = set()
    for workspace in (1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 23, 1 << 24, 1 << 30):
        pieces = list(chunks(plan, 8, group, size, workspace))
        assert len(set(pieces)) == len(pieces)
        assert sum(c.rows * c.heads * c.group for c in pieces) == 8 * group * plan.total_q
        budget = workspace + SLACK if workspace >= SLACK else workspace
        assert all(size(c.rows, c.heads, c.group) <= max(budget, size(64, 1, group)) for c in pieces)
        cuts.add((pieces[0].rows < plan.total_q, pieces[0].group < group, pieces[0].heads < 8))
        # What keeps the lists whole comes first: heads, then parts of a group, then rows.
        assert not (pieces[0].rows < plan.total_q or pieces[0].group < group) or pieces[0].heads == 1
    assert {(True, False, True), (False, False, False)} <= cuts
    assert ((False, True, True) in cuts) == (group > 1)


@pytest.mark.parametrize("popular", [None, Popular(13, 5)], ids=str)
def test_lists_bytes_is_what_the_lists_take(popular):
    """Storage of what `invert` returns, and of all else that it makes, on a batch where all terms count."""
    plan = plan_of((3000, 500))
    block_idx = random_selection(plan, 2)
    made = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result._base is None and not function.is_view:
                made.append(result.untyped_storage())
            return result

    with Count():
        lists = invert(block_idx, plan, Chunk(0, plan.total_q, 0, 2, 0, 1), cut=CUT, popular=popular)
    given = {x.untyped_storage()._cdata for x in (block_idx, *plan) if isinstance(x, torch.Tensor)}
    taken = {storage._cdata: storage.nbytes() for storage in made if storage._cdata not in given}
    kept = {x.untyped_storage()._cdata for x in (*lists, *(lists.popular or ())) if isinstance(x, torch.Tensor)}
    want_kept, want_making = lists_bytes(plan, plan.total_q, 2, 4, CUT, popular=popular)
    assert sum(taken[i] for i in kept) == pytest.approx(want_kept, rel=0.1)
    assert sum(size for i, size in taken.items() if i not in kept) == pytest.approx(want_making, rel=0.1)


@pytest.mark.parametrize("lengths", [(300,), (64, 128), (30,) * 9, (200, 50)], ids=str)
def test_bounds_of_items_hold_where_they_are_tight(lengths):
    """All tokens choose the same blocks, so that every list is as long as it can be, and one pair more than an item."""
    plan = plan_of(lengths)
    block_idx = torch.full((plan.total_q, 2, 4), -1, dtype=torch.int32, device=DEVICE)
    for n in range(4):
        block_idx[:, :, n] = n
    for cut in (CUT, Cut(29, 29), Cut(63, 49, short=100), Cut(300, 300)):
        lists = invert(block_idx, plan, Chunk(0, plan.total_q, 0, 2, 0, 1), cut=cut)
        used = lists.items[lists.items[:, 4] > 0]
        assert int(used[:, 4].sum()) == int((lists.inverse >= 0).sum()) > 0
        assert int((used[:, 5] >= 0).sum()) <= lists.num_slices
