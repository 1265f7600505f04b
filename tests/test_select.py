"""Block selection in detail: ranges of blocks, ties, chunks, and every way to cut a block into compressed keys."""

from __future__ import annotations

import pytest
import torch

from nsattn import NSAConfig, dispatch
from nsattn.kernels import _select_blocks as kernels
from nsattn.kernels import reference
from nsattn.testing import compare_selections, make_inputs

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
HEAD_DIM = 128 if GPU else 16
HOPPER = GPU and torch.cuda.get_device_capability()[0] == 9
IMPLS = [name for name, cell in dispatch.TABLE["select_blocks"].items()
         if cell.is_kernel and (HOPPER or not cell.generation)]


def skip_unless_able(impl: str, config: NSAConfig) -> None:
    """Some kernels are not for all sizes."""
    shape = dispatch.Shape(DEVICE, DTYPE, overlap=config.overlap, keys_per_block=config.keys_per_block)
    _, limits = dispatch.unmet(dispatch.TABLE["select_blocks"][impl], shape)
    if limits:
        pytest.skip("; ".join(limits))


def select(impl: str, x, lse, workspace: int = 1 << 30):
    module = dispatch.load("select_blocks", impl)
    return module.select_blocks(x.q, x.k_cmp, lse, x.plan, scale=x.scale, workspace=workspace)


def check(impl: str, x, exact: bool = False, workspace: int = 1 << 30) -> None:
    golden = x.to(torch.float64)
    lse = reference.attend_compressed(golden.q, golden.k_cmp, golden.v_cmp, x.plan, scale=x.scale)[1]
    want = reference.select_blocks(golden.q, golden.k_cmp, lse, x.plan, scale=x.scale)
    score = reference.unpad(reference.block_scores(golden.q, golden.k_cmp, lse, x.plan, scale=x.scale).transpose(1, 2),
                            x.plan)
    got = select(impl, x, lse.float(), workspace)
    verdict = compare_selections(got, want, None if exact else score)
    assert verdict.ok, verdict


@pytest.mark.parametrize("config", [
    NSAConfig(8, 4, 16, 3, 8, 1, 1), NSAConfig(8, 4, 32, 4, 8, 1, 2), NSAConfig(4, 4, 16, 5, 8, 0, 2),
    NSAConfig(16, 16, 16, 3, 8, 1, 1), NSAConfig(32, 16, 16, 4, 8, 1, 2), NSAConfig(8, 4, 128, 2, 8, 0, 1),
    NSAConfig(16, 4, 16, 3, 8, 1, 1), NSAConfig(64, 16, 16, 4, 8, 2, 1), NSAConfig(8, 8, 64, 6, 8, 3, 3),
], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_ratio_of_sizes(impl, config, monkeypatch):
    """l / d of 1, 2 and more, B / d from 1 to 32, with and without causal masks, several ranges of blocks."""
    skip_unless_able(impl, config)
    monkeypatch.setattr(kernels, "RANGE", 128 if GPU else 4 * kernels.group_size(config, 32))
    lengths = (3300, 0, 65, 700) if GPU else (150, 0, 35)
    x = make_inputs(lengths, num_kv_heads=2, group=3, head_dim=HEAD_DIM, config=config, dtype=DTYPE,
                    device=DEVICE, slack=3)
    check(impl, x, workspace=1 << 14 if config.init_blocks else 1 << 30)


@pytest.mark.parametrize("config", [NSAConfig(8, 4, 16, 5, 8, 1, 1), NSAConfig(16, 4, 16, 5, 8, 0, 2)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_the_lower_block(impl, config):
    """Equal keys make equal scores: the first blocks win, inside a group and between groups."""
    skip_unless_able(impl, config)
    x = make_inputs((200,), num_kv_heads=1, group=2, head_dim=HEAD_DIM, config=config, dtype=DTYPE,
                    device=DEVICE)
    x.k_cmp[:] = x.k_cmp[:1].clone()
    idx = select(impl, x, torch.zeros(200, 2, device=DEVICE))
    rows = idx[199, 0].tolist()
    # Block 0 lacks the key before it where blocks overlap; where it is not forced it scores less and comes last.
    local = config.local_blocks
    first = 0 if config.init_blocks else 1
    free = config.num_selected - local
    assert rows == [*range(first, first + free), *range(13 - local, 13)]


@pytest.mark.parametrize("impl", IMPLS)
def test_peaked_scores_and_infinite_ones(impl):
    config = NSAConfig(8, 4, 16, 4, 8, 1, 1)
    x = make_inputs((150,), num_kv_heads=1, group=2, head_dim=HEAD_DIM, config=config, dtype=DTYPE,
                    device=DEVICE)
    check(impl, x._replace(q=x.q * 6))
    lse = torch.full((150, 2), -300.0, device=DEVICE)  # a wrong lse: every probability overflows
    idx = select(impl, x, lse)
    assert idx[149, 0].tolist() == [0, 1, 2, 9]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_bound_that_is_too_low_writes_nothing_outside(impl, monkeypatch):
    """`max_seqlen` below a sequence: blocks without a place in the scratch do not compete, and nothing else changes."""
    config = NSAConfig() if GPU else NSAConfig(8, 4, 16, 4, 20)
    keys, bound = (9000, 300) if GPU else (400, 16)
    x = make_inputs((64,), lengths_k=(keys,), num_kv_heads=2, group=2, head_dim=HEAD_DIM, config=config, dtype=DTYPE,
                    device=DEVICE)  # fmt: skip
    lse = dispatch.load("attend_compressed", "triton").attend_compressed(
        x.q, x.k_cmp, x.v_cmp, x.plan, scale=x.scale, workspace=1 << 30
    )[1]
    rests, empty = [], torch.empty

    def guarded(*shape, **options):
        """As torch.empty; a matrix is the start of a longer tensor whose rest must not change."""
        if len(shape) != 2:
            return empty(*shape, **options)
        rows, columns = shape
        store = empty((rows + 99) * columns, **options).fill_(7.0)
        rests.append(store[rows * columns :])
        return store[: rows * columns].view(rows, columns)

    monkeypatch.setattr(torch, "empty", guarded)
    got = select(impl, x._replace(plan=x.plan._replace(max_k=bound)), lse)
    monkeypatch.undo()
    assert len(rests) == 2 and all((rest == 7.0).all() for rest in rests)  # scores and group maxima
    assert got.max() < x.plan.max_blk and (got.diff(dim=-1) > 0).all()
