"""Bounded memory: a batch is cut into chunks whose scratch fits the workspace, and one launch works on one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from nsattn.plan import TILE, Plan

SLACK = 64 << 20  # what lists and tables may take beyond the workspace, which counts for the partials


class Chunk(NamedTuple):
    """Part of a batch that one launch works on, so that scratch stays below the workspace."""

    row0: int
    row1: int
    head0: int  # KV heads
    head1: int
    part0: int  # query heads of each group: all of them, or some of the group of a single KV head
    part1: int

    @property
    def rows(self) -> int:
        return self.row1 - self.row0

    @property
    def heads(self) -> int:
        return self.head1 - self.head0

    @property
    def group(self) -> int:
        return self.part1 - self.part0

    def of_queries(self, x: Tensor, G: int) -> Tensor:
        """The chunk's heads of `[T, Hq, ...]`, a view with all rows."""
        return x[:, self.head0 * G + self.part0 : (self.head1 - 1) * G + self.part1]

    def of_keys(self, x: Tensor) -> Tensor:
        """The chunk's heads of `[T, Hkv, ...]`, a view with all rows."""
        return x[:, self.head0 : self.head1]


Size = Callable[[int, int, int], int]  # scratch in bytes for so many query rows, KV heads and query heads per KV head


def chunks(plan: Plan, num_kv_heads: int, group: int, size: Size, workspace: int) -> Iterator[Chunk]:
    """Cut a batch so that the scratch of a chunk fits the workspace and `SLACK`.

    Cut by KV heads first, then by the query heads of a group, which both keep the lists whole; by token rows only if
    one query head does not fit.
    """
    total = plan.total_q
    if total == 0:
        return
    budget = workspace + SLACK if workspace >= SLACK else workspace
    heads = next((n for n in range(num_kv_heads, 0, -1) if size(total, n, group) <= budget), 0)
    part = group if heads else next((n for n in range(group, 0, -1) if size(total, 1, n) <= budget), 0)
    rows = total
    if part == 0:
        part, pieces = group, 2
        while rows > TILE and size(rows, 1, group) > budget:
            rows = -(-total // (pieces * TILE)) * TILE  # equal pieces of whole tiles
            pieces += 1
    part = -(-group // -(-group // part))  # as many pieces, but equal ones
    heads = -(-num_kv_heads // -(-num_kv_heads // max(1, heads)))
    for head0 in range(0, num_kv_heads, heads):
        for row0 in range(0, total, rows):
            for part0 in range(0, group, part):
                yield Chunk(
                    row0, min(row0 + rows, total), head0, min(head0 + heads, num_kv_heads),
                    part0, min(part0 + part, group),
                )  # fmt: skip
