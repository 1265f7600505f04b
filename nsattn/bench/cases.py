"""The shapes of `nsattn bench selected`, as data. Add a `Case` to a set, or a set to `SETS`; nothing else is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nsattn
from nsattn.bench.session import named
from nsattn.bench.timing import PEAK_BYTES, PEAK_FLOPS
from nsattn.plan import Plan, positions
from nsattn.testing import hostile_selection, random_selection


@dataclass(frozen=True)
class Case:
    """One shape of selected attention. The defaults are the middle of the target table: T=65536, 16/4 heads."""

    group: int = 4  # query heads per KV head
    num_kv_heads: int = 4
    length: int = 65536  # of each sequence
    sequences: int = 1
    head_dim: int = 128
    v_head_dim: int = 128
    block: int = 64
    num_selected: int = 16
    dtype: str = "bfloat16"
    selection: str = "random"  # a name in SELECTIONS
    slack: float | None = None  # how far above the target model the time may lie; None: no target
    peers: bool = True  # whether other projects are timed beside ours

    @property
    def num_heads(self) -> int:
        return self.group * self.num_kv_heads

    @property
    def tokens(self) -> int:
        return self.length * self.sequences

    @property
    def shape(self) -> dict[str, Any]:
        """What a row says of it."""
        return {
            "T": self.tokens, "Hq": self.num_heads, "Hkv": self.num_kv_heads, "D": self.head_dim,
            "Dv": self.v_head_dim, "B": self.block, "N": self.num_selected, "dtype": self.dtype,
            "sequences": self.sequences,
        }  # fmt: skip

    def __str__(self) -> str:
        dims = f"{self.head_dim}" if self.head_dim == self.v_head_dim else f"{self.head_dim}/{self.v_head_dim}"
        packed = f"{self.sequences}x{self.length}" if self.sequences > 1 else f"{self.length}"
        return (
            f"T={packed} {self.num_heads}/{self.num_kv_heads} D={dims} (B,N)=({self.block},{self.num_selected}) "
            f"{self.dtype} {self.selection}"
        )


GROUPS = (1, 2, 3, 4, 5, 7, 8, 16)  # 28/4 and 64/4 heads are groups 7 and 16 of the target table
BASE = Case()
LONG_BLOCKS = replace(BASE, block=128, num_selected=8)
ALONE = replace(BASE, peers=False)  # peers do not say what these selections mean, some write out of bounds on them

# The kernel figure of the FSA paper (arXiv 2508.18224), with four KV heads; groups of five are those of 40/8 heads.
PAPER_GROUPS = (1, 2, 4, 5, 8)
PAPER_LENGTHS = (8192, 16384, 32768, 65536)
PAPER = tuple(
    replace(blocks, length=length, group=g)
    for blocks in (BASE, LONG_BLOCKS) for length in PAPER_LENGTHS for g in PAPER_GROUPS
)  # fmt: skip

SETS: dict[str, tuple[Case, ...]] = {
    # The table of targets. Peers compile anew for every group, half a minute each: for longer blocks not for all.
    "target": (
        *(replace(BASE, group=g, slack=1.0) for g in GROUPS),
        *(replace(LONG_BLOCKS, group=g, slack=1.0, peers=g in (*PAPER_GROUPS, 16)) for g in GROUPS),
    ),
    # The cost is linear: 15% more per token at 8K to 32K, 2x at 4K; 131072 counts among the other shapes.
    "lengths": tuple(
        replace(BASE, length=length, group=g, slack=slack, peers=g in (1, 4))
        for length, slack in ((4096, 2.0), (8192, 1.15), (16384, 1.15), (32768, 1.15), (131072, 1.5))
        for g in (1, 4, 16)
    ),
    # Other head dims, types and head counts, within 1.5x of the model.
    "shapes": tuple(
        replace(BASE, slack=1.5, **shape)
        for shape in (
            {"head_dim": 64, "v_head_dim": 64, "peers": False},
            {"head_dim": 192, "peers": False},
            {"head_dim": 256, "v_head_dim": 256, "peers": False},
            {"dtype": "float16", "peers": False},
            {"num_kv_heads": 8},
            {"num_kv_heads": 8, "group": 5},
        )
    ),
    # 32 sequences of 2K cost no more than the one of 64K in the target table.
    "packed": tuple(replace(BASE, length=2048, sequences=32, group=g, slack=1.0, peers=g == 4) for g in (1, 4, 16)),
    # Block lists of any skew, beside the even case of the same size.
    "skews": (
        *(replace(ALONE, selection=name) for name in ("random", "same blocks", "one block", "duplicates")),
        *(replace(ALONE, selection=name) for name in ("empty", "hostile")),
        *(replace(ALONE, length=4096, num_selected=64, selection=name) for name in ("random", "one token")),
    ),
    # Selections of a trained model on real text, each beside a random one of the same shape.
    "recorded": tuple(
        replace(BASE, length=length, group=g, selection=name)
        for length in (8192, 32768) for g in (4, 16) for name in ("recorded", "random")
    ),
    # The longest sequence: it runs, in bounded memory.
    "million": (replace(ALONE, length=1 << 20, num_kv_heads=8),),
    # All of the paper's figure; what the other sets time too is left out beside them, see `choose`.
    "paper": PAPER,
}  # fmt: skip
SMALL = Case(group=2, num_kv_heads=2, length=256, head_dim=32, v_head_dim=32, dtype="float32", num_selected=3, block=16)
TINY = (  # what a machine without a GPU runs, in the reference: it shows the form of the results, not speed
    *(replace(SMALL, group=g) for g in (1, 2)),
    replace(SMALL, length=128),
    replace(SMALL, length=64, sequences=2),
    replace(SMALL, selection="same blocks", peers=False),
)


# Targets: milliseconds for a group of G at T=65536 and 4 KV heads are a + b * G.
TARGETS = {
    (64, 16): {"forward": (0.15, 0.60), "backward": (0.20, 1.10)},
    (128, 8): {"forward": (0.15, 0.45), "backward": (0.20, 0.95)},
}


def target_ms(case: Case, direction: str) -> float | None:
    """The time this project aims at: `TARGETS` per token and KV head, scaled by the head dims' floor and slack."""
    if case.slack is None or (case.block, case.num_selected) not in TARGETS:
        return None
    a, b = TARGETS[case.block, case.num_selected][direction]
    dims = kvmajor_floor_ms(case, direction) / kvmajor_floor_ms(replace(case, head_dim=128, v_head_dim=128), direction)
    return (a + b * case.group) * case.tokens * case.num_kv_heads / (65536 * 4) * dims * case.slack


def kvmajor_floor_ms(case: Case, direction: str) -> float:
    """Least time of the KV-major order: its partial results written and read once, or its products, the longer.

    Forward, the partials are N outputs of Dv numbers per (token, head), backward N gradients of D numbers. They are far
    more than the unique bytes of `Row.floor_ms`, which no order can go below.
    """
    pairs = case.tokens * case.num_heads * case.num_selected  # (token, head, selected block)
    dim = case.v_head_dim if direction == "forward" else case.head_dim
    moved = 2 * pairs * dim * getattr(torch, case.dtype).itemsize
    flops = 2 * pairs * case.block * (case.head_dim + case.v_head_dim)
    return max(moved / PEAK_BYTES, flops * (1.0 if direction == "forward" else 2.5) / PEAK_FLOPS) * 1e3


# Selections: name -> function of (plan, KV heads) that gives int32 [T, Hkv, N].
RECORDED = Path(nsattn.__file__).parent.parent / "benchmarks" / "data" / "selection_small_8k_32k.safetensors.xz"


def recorded(plan: Plan, num_kv_heads: int) -> Tensor:
    """What layers and heads of a trained model selected on real text, spread over the KV heads asked for."""
    from nsattn.train.selection import load_selection

    by_length, _ = load_selection(RECORDED)
    if plan.total_q not in by_length or plan.num_seqs > 1:
        raise ValueError(f"recorded lengths are {', '.join(map(str, by_length))}, got {plan.total_q}")
    heads = by_length[plan.total_q].permute(1, 0, 2, 3).flatten(1, 2)  # [T, layers * Hkv, N]
    chosen = torch.arange(num_kv_heads) * heads.shape[1] // num_kv_heads
    return heads[:, chosen].to(plan.cu_q.device).contiguous()


def same_blocks(plan: Plan, num_kv_heads: int) -> Tensor:
    """Every token chooses the first N blocks: all work lies in N lists."""
    slot = torch.arange(plan.config.num_selected, device=plan.cu_q.device)
    current = positions(plan)[:, None, None] // plan.config.slc_block
    chosen = torch.where(slot <= current, slot, -1)
    return chosen.int().expand(-1, num_kv_heads, -1).contiguous()


def one_block(plan: Plan, num_kv_heads: int) -> Tensor:
    """Every token chooses the first block and no other."""
    chosen = empty(plan, num_kv_heads)
    chosen[..., 0] = 0
    return chosen


def one_token(plan: Plan, num_kv_heads: int) -> Tensor:
    """The last token chooses N blocks spread over the sequence (all of them if it has N); no other chooses any."""
    n = plan.config.num_selected
    chosen = empty(plan, num_kv_heads)
    chosen[-1] = (torch.arange(n, device=chosen.device) * plan.max_blk // n).int()
    return chosen


def empty(plan: Plan, num_kv_heads: int) -> Tensor:
    """No token chooses anything."""
    size = (plan.total_q, num_kv_heads, plan.config.num_selected)
    return torch.full(size, -1, dtype=torch.int32, device=plan.cu_q.device)


def duplicates(plan: Plan, num_kv_heads: int) -> Tensor:
    """A random selection that names each of its first N/2 blocks twice."""
    n = plan.config.num_selected
    return random_selection(plan, num_kv_heads)[..., : -(-n // 2)].repeat_interleave(2, dim=-1)[..., :n].contiguous()


SELECTIONS: dict[str, Callable[[Plan, int], Tensor]] = {
    "random": random_selection,  # the first and the two latest blocks forced
    "recorded": recorded,
    "same blocks": same_blocks,
    "one block": one_block,
    "one token": one_token,
    "empty": empty,
    "duplicates": duplicates,
    "hostile": hostile_selection,  # out of range, negative, future and repeated blocks, empty rows
}


def selected_keys(selection: Tensor, plan: Plan) -> int:
    """(query, key) pairs of a selection, summed over the KV heads: each block once, only what is at or before t."""
    t = positions(plan)[:, None, None]
    start = selection.sort(dim=-1).values.long() * plan.config.slc_block
    repeated = torch.zeros_like(start, dtype=torch.bool)
    repeated[..., 1:] = start[..., 1:] == start[..., :-1]
    keys = (t + 1 - start).clamp(0, plan.config.slc_block)
    return int(torch.where(repeated | (start < 0), 0, keys).sum())


def choose(names: str) -> list[tuple[str, Case]]:
    """(set, case) for comma-separated names of sets; all sets for an empty text.

    A case of `paper` that another of these sets times beside peers is left out: nothing is timed twice.

    Raises:
        ValueError: an unknown name.
    """
    wanted = named("sets", names, list(SETS))
    chosen = list(chain.from_iterable([(name, case) for case in SETS[name]] for name in wanted))
    others = {replace(case, slack=None) for name, case in chosen if name != "paper"}  # peers count: they must be there
    return [(name, case) for name, case in chosen if name != "paper" or case not in others]
