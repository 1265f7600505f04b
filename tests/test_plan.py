"""The tables of a plan: the kernels against the definition in torch, and the definition against a count by hand."""

from __future__ import annotations

import pytest
import torch

from nsattn import NSAConfig, make_plan
from nsattn.kernels import _plan
from nsattn.plan import STARTS, TILE, Plan, cumulative, make_cached_plan, make_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = NSAConfig(cmp_block=8, cmp_stride=4, slc_block=16, num_selected=4, window=20)


def lengths(n: int, longest: int) -> torch.Tensor:
    """Random lengths, a third of them zero, the last ones too."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randint(-longest // 2, longest + 1, (n,), generator=generator).clamp_min(0)
    x[-2:] = 0 if n > 2 else longest
    return x.int().to(DEVICE)


@pytest.mark.parametrize(("n", "longest"), [(1, 300), (1, 0), (2, 1), (5, 200), (16, 70), (17, 9), (1030, 3)])
@pytest.mark.parametrize("keys", ["same", "others", "cached", "too many"])
def test_kernels_write_the_same_tables(n, longest, keys):
    cu_q = cumulative(lengths(n, longest))
    cu_k = cu_q if keys in ("same", "too many") else cumulative(lengths(n, longest).flip(0) + 7)
    cu_cmp = None if keys != "cached" else cumulative((cu_k.diff() // 4).clamp_min(0))
    more = {} if keys in ("same", "too many") else {"cu_seqlens_k": cu_k, "total_k": int(cu_k[-1]) + 9}
    if cu_cmp is not None:
        more |= {"cu_cmp": cu_cmp, "total_cmp": int(cu_cmp[-1]) + 3}
    plan = make_plan(cu_q, int(cu_q[-1]) + 5, config=CONFIG, **more)
    arguments = (cu_q, cu_k, cu_cmp)
    total_cmp = plan.total_cmp // 2 if keys == "too many" else plan.total_cmp  # as from a bound that is too low
    sizes = {"total_cmp": total_cmp, **plan.sizes()}
    want = make_tables(*arguments, config=CONFIG, **sizes)
    got = _plan.tables(*arguments, config=CONFIG, **sizes)
    width = plan.sizes()["width"]
    for i in range(STARTS):  # what pads the tables of starts means nothing
        assert torch.equal(got[i * width :][: n + 1], want[i * width :][: n + 1]), i
    assert torch.equal(got[STARTS * width :], want[STARTS * width :])
    assert plan._replace(tables=got).cu_cmp[-1] <= total_cmp  # nothing is written past the last compressed row


@pytest.mark.parametrize(("starts", "bound", "message"), [
    ([], None, "cu_seqlens must have at least 2 entries, got 0"),
    ([0, 60], None, "cu_seqlens must ascend from 0 to at most the 48 rows"),
    ([5, 48], None, "cu_seqlens must ascend from 0"),
    ([0, 30, 20, 48], None, "cu_seqlens must ascend from 0"),
    ([0, 30, 48], 20, "max_seqlen must be at least the longest length, got 20 and 30 in cu_seqlens"),
])  # fmt: skip
def test_lengths_that_can_be_seen_are_checked(starts, bound, message):
    with pytest.raises(ValueError, match=message):
        make_plan(torch.tensor(starts, dtype=torch.int32), 48, config=CONFIG, max_seqlen=bound)
    message = message.replace("cu_seqlens", "cu_seqlens_k").replace("max_seqlen ", "max_seqlen_k ")
    with pytest.raises(ValueError, match=message):
        make_plan(torch.tensor([0, *[40] * max(1, len(starts) - 1)], dtype=torch.int32), 48, config=CONFIG,
                  cu_seqlens_k=torch.tensor(starts, dtype=torch.int32), total_k=48, max_seqlen_k=bound)  # fmt: skip


def test_tables_by_hand():
    plan = make_plan(torch.tensor([0, 70, 70, 200], dtype=torch.int32), 210, config=CONFIG)
    assert plan.cu_q.tolist() == plan.cu_k.tolist() == [0, 70, 70, 200]
    assert plan.cu_cmp.tolist() == [0, 16, 16, 16 + 31]
    assert plan.cu_blk.tolist() == [0, 5, 5, 14]
    assert plan._starts(7).tolist() == [0, 2, 2, 5] and plan._starts(6).tolist() == [0, 1, 1, 2]  # tiles of keys
    assert plan.cu_k_pairs.tolist() == [0, 1, 1, 3] and plan.cu_cmp_pairs.tolist() == [0, 1, 1, 2]
    tiles = [[0, 0], [0, TILE], [2, 0], [2, TILE], [2, 2 * TILE]]
    assert [t for t in plan.q_tiles.tolist() if t[0] >= 0] == [t for t in plan.k_tiles.tolist() if t[0] >= 0] == tiles
    assert [t for t in plan.q_pairs.tolist() if t[0] >= 0] == [[0, 0], [2, 0], [2, 2 * TILE]]
    assert [t for t in plan.cmp_tiles.tolist() if t[0] >= 0] == [[0, 0], [2, 0]]
    units = plan.units.T.tolist()
    assert units[0] == [0, 0, 0, 16] and units[17] == [68, 17, 0, 16] and units[19] == [70, 16, 16, 47]
    assert [unit for unit in units if unit[3]][-1] == [198, 48, 16, 47]


def test_a_plan_survives_the_boundary_of_a_custom_op():
    plan = make_plan(torch.tensor([0, 70, 200], dtype=torch.int32), 210, config=CONFIG)
    again = Plan.unpack(*plan.pack())
    assert again[1:] == plan[1:] and torch.equal(again.tables, plan.tables)
    assert NSAConfig(*CONFIG.sizes()) == CONFIG


def test_cached_plan_skips_what_the_cache_does_not_use():
    new, old = torch.tensor([1, 3], dtype=torch.int32), torch.tensor([40, 9], dtype=torch.int32)
    plan = make_cached_plan(new, old, total=6, max_new=3, size=64, cmp_size=15, config=CONFIG)
    assert plan.cu_q.tolist() == [0, 1, 1, 4, 4]
    assert plan.cu_k.tolist() == [0, 40, 64, 73, 128]
    assert plan.cu_cmp.tolist() == [0, 9, 15, 16, 30]
