"""What tests, `nsattn verify` and benchmarks share: inputs, selections, and the one rule for errors.

The rule (`compare`): against a golden result in float64 from the same low-precision inputs and the same block indices,
the largest error may be twice that of the reference run in the low precision, plus a rounding floor; and the relative
RMS error has a limit per dtype. There are no tolerances per test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nsattn.config import NSAConfig
from nsattn.plan import Plan, make_plan, positions, rows_of

RMS_LIMIT = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5, torch.float64: 1e-12}
FEW_ROWS = 16  # see `compare`
SCORE_BAND = 2.0**-7  # how far below the block it replaced a chosen block may score, relative
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
_CHUNK = 1 << 26  # elements of random numbers drawn at a time


class Inputs(NamedTuple):
    """Arguments of the operations for one packed batch. Each branch has its own keys and values."""

    q: Tensor  # [total_q, Hq, D]
    k: Tensor  # [total_k, Hkv, D]
    v: Tensor  # [total_k, Hkv, Dv]
    k_cmp: Tensor  # [total_cmp, Hkv, D]
    v_cmp: Tensor  # [total_cmp, Hkv, Dv]
    k_win: Tensor  # [total_k, Hkv, D]
    v_win: Tensor  # [total_k, Hkv, Dv]
    gates: Tensor  # [total_q, Hq, 3], between 0 and 1
    plan: Plan
    scale: float

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype, cut from autograd: low-precision inputs in float64 are the golden ones."""
        floats = {name: x for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**{name: x.detach().to(dtype) for name, x in floats.items()})


def make_inputs(
    lengths: Sequence[int],
    *,
    lengths_k: Sequence[int] | None = None,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 32,
    v_head_dim: int | None = None,
    config: NSAConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    slack: int = 0,
    own_kv: bool = True,
    seed: int = 0,
) -> Inputs:
    """Seeded normal inputs for sequences of the given lengths, and their plan.

    Args:
        lengths: query rows of each sequence.
        lengths_k: key rows of each sequence, where they differ.
        num_kv_heads, group, head_dim, v_head_dim: Hkv, G, D, Dv (default D).
        config: block sizes, default the paper's.
        slack: rows after the last sequence, in queries and keys.
        own_kv: the window has keys and values of its own; otherwise it shares those of the selected branch.
    """
    config = config or NSAConfig()
    generator = torch.Generator(device).manual_seed(seed)
    v_head_dim = v_head_dim or head_dim
    cu_q = _cumulative(lengths, device)
    cu_k = None if lengths_k is None else _cumulative(lengths_k, device)
    total_k = sum(lengths if lengths_k is None else lengths_k) + slack
    plan = make_plan(
        cu_q,
        sum(lengths) + slack,
        config=config,
        max_seqlen=max(lengths, default=0),
        cu_seqlens_k=cu_k,
        total_k=total_k,
        max_seqlen_k=max(lengths if lengths_k is None else lengths_k, default=0),
    )

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    heads = num_kv_heads * group
    q = normal(plan.total_q, heads, head_dim)
    k, v = normal(total_k, num_kv_heads, head_dim), normal(total_k, num_kv_heads, v_head_dim)
    k_cmp, v_cmp = normal(plan.total_cmp, num_kv_heads, head_dim), normal(plan.total_cmp, num_kv_heads, v_head_dim)
    k_win, v_win = k, v
    if own_kv:
        k_win, v_win = normal(total_k, num_kv_heads, head_dim), normal(total_k, num_kv_heads, v_head_dim)
    gates = normal(plan.total_q, heads, 3).sigmoid()
    return Inputs(q, k, v, k_cmp, v_cmp, k_win, v_win, gates, plan, head_dim**-0.5)


class CacheInputs(NamedTuple):
    """Arguments of `nsa_decode`: S new tokens of each sequence over a cache, plain or in pages."""

    q: Tensor  # [Bsz, S, Hq, D]
    k: Tensor  # [Bsz, C, Hkv, D] or [pages, B, Hkv, D]
    v: Tensor
    k_cmp: Tensor  # [Bsz, C / d, Hkv, D] or [pages, B / d, Hkv, D]
    v_cmp: Tensor
    gates: Tensor  # [Bsz, S, Hq, 3]
    k_win: Tensor
    v_win: Tensor
    cache_seqlens: Tensor
    block_table: Tensor | None
    config: NSAConfig

    def to(self, dtype: torch.dtype) -> CacheInputs:
        """The same values in another dtype."""
        return CacheInputs._make([*(x.to(dtype) for x in self[:8]), *self[8:]])


def make_cache(
    lengths: Sequence[int],
    num_new: int,
    *,
    room: int,
    paged: bool,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 32,
    v_head_dim: int | None = None,
    config: NSAConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> CacheInputs:
    """Seeded normal inputs of `nsa_decode`; rows past a sequence's end are NaN, for nothing may read them.

    Args:
        lengths: tokens of each sequence, the new ones counted.
        num_new: S, new tokens of each sequence.
        room: C, tokens that the cache can hold of each sequence; rounded up to whole selection blocks.
        paged: pages of B tokens, in random order in a pool that is larger than needed.
        num_kv_heads, group, head_dim, v_head_dim: Hkv, G, D, Dv (default D).
    """
    config = config or NSAConfig()
    generator = torch.Generator(device).manual_seed(seed)
    B, d, batch = config.slc_block, config.cmp_stride, len(lengths)
    blocks, v_head_dim = -(-room // B), v_head_dim or head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    table, pool = None, batch * blocks + 3
    if paged:
        table = torch.randperm(pool, generator=generator, device=device)[: batch * blocks].view(batch, blocks).int()

    def cache(rows: int, dim: int, filled: Tensor) -> Tensor:
        x = normal(batch, blocks * rows, num_kv_heads, dim)
        x[torch.arange(blocks * rows, device=device) >= filled[:, None]] = float("nan")
        if table is None:
            return x
        pages = x.new_full((pool, rows, num_kv_heads, dim), float("nan"))
        pages[table.flatten().long()] = x.view(-1, rows, num_kv_heads, dim)
        return pages

    heads, filled_cmp = num_kv_heads * group, ((cache_seqlens - config.cmp_block) // d + 1).clamp_min(0)
    k, v, k_win, v_win = (cache(B, dim, cache_seqlens) for dim in (head_dim, v_head_dim) * 2)
    k_cmp, v_cmp = (cache(B // d, dim, filled_cmp) for dim in (head_dim, v_head_dim))
    q, gates = normal(batch, num_new, heads, head_dim), normal(batch, num_new, heads, 3).sigmoid()
    return CacheInputs(q, k, v, k_cmp, v_cmp, gates, k_win, v_win, cache_seqlens, table, config)


def make_compression(
    method: str,
    num_kv_heads: int,
    head_dim: int,
    out_dim: int,
    config: NSAConfig,
    *,
    hidden: int = 32,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """Seeded parameters of a compression method, scaled so that compressed rows keep the size of their inputs."""
    generator = torch.Generator(device).manual_seed(seed)
    l = config.cmp_block

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device, dtype=torch.float32) * size).to(dtype)

    heads, fan_in = num_kv_heads, (l * head_dim) ** -0.5
    if method == "linear":
        return normal(heads, l, head_dim, out_dim, size=fan_in), normal(heads, out_dim)
    if method == "mlp":
        return (
            normal(heads, l, head_dim),
            normal(heads, l, head_dim, hidden, size=fan_in),
            normal(heads, hidden),
            normal(heads, hidden, out_dim, size=hidden**-0.5),
            normal(heads, out_dim),
        )
    if method == "gated":
        return normal(heads, head_dim, size=head_dim**-0.5), normal(heads, l)
    return ()


def random_selection(plan: Plan, num_kv_heads: int, seed: int = 0) -> Tensor:
    """A selection as `select_blocks` would return it, with random blocks beside the forced ones.

    Returns:
        int32 `[total_q, Hkv, N]` on the plan's device: ascending, unused slots -1.
    """
    n = plan.config.num_selected
    num_blocks = max(plan.max_blk, 1)
    generator = torch.Generator(plan.cu_q.device).manual_seed(seed)
    current = _current_block(plan)
    rows = max(1, _CHUNK // (num_kv_heads * num_blocks))
    chunks = [_draw(current[i : i + rows], num_kv_heads, num_blocks, plan.config, generator)
              for i in range(0, plan.total_q, rows)]
    return torch.cat(chunks) if chunks else current.new_empty(0, num_kv_heads, n, dtype=torch.int32)


def hostile_selection(plan: Plan, num_kv_heads: int, seed: int = 0) -> Tensor:
    """A selection no kernel may trust: out of range, negative, future and repeated blocks, any order, empty rows."""
    device = plan.cu_q.device
    generator = torch.Generator(device).manual_seed(seed)
    good = random_selection(plan, num_kv_heads, seed)
    future = (_current_block(plan) + 1).clamp_min(0)[:, None, None].expand_as(good).int()
    outside = torch.tensor([INT_MIN, -2, -1, plan.max_blk, plan.max_blk + 1, INT_MAX], dtype=torch.int32, device=device)

    def dice(high: int) -> Tensor:
        return torch.randint(high, good.shape, generator=generator, device=device)

    kind = dice(8)
    bad = torch.where(kind == 0, outside[dice(len(outside))], good)
    bad = torch.where(kind == 1, future, bad)
    bad = torch.where(kind == 2, good[..., :1], bad)
    order = torch.rand(good.shape, generator=generator, device=device).argsort(dim=-1)
    bad = bad.gather(-1, order)
    empty = dice(8)[..., :1] == 0
    return torch.where(empty, -1, bad).contiguous()


class Comparison(NamedTuple):
    """The numbers behind a verdict."""

    max_err: float  # largest error of the candidate
    limit: float  # the largest one allowed
    rms: float  # RMS of the error over the RMS of the golden values
    rms_limit: float
    ok: bool

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "wrong"
        errors = f"max error {self.max_err:.3g} of {self.limit:.3g}, RMS {self.rms:.3g} of {self.rms_limit:.3g}"
        return f"{verdict}: {errors}"


def compare(candidate: Tensor, golden: Tensor, low: Tensor, *, dtype: torch.dtype | None = None) -> Comparison:
    """Judge a result by the error rule.

    Args:
        candidate: what is judged.
        golden: the reference in float64 on the same low-precision inputs and block indices.
        low: the reference run in the low precision.
        dtype: the low precision, whose rounding is allowed. Default: that of `candidate`.

    Returns:
        A `Comparison`. NaN anywhere, another shape, or an infinity where golden has none (and the reverse) is wrong.
        Golden values that are zero but for rounding have no relative error; then the largest error decides alone. Fewer
        than `FEW_ROWS` rows with values other than zero are too few for a mean: one sum that cancels decides it. There
        twice the RMS error of `low` is allowed too.
    """
    dtype = dtype or candidate.dtype
    rms_limit = RMS_LIMIT[dtype]
    nothing = Comparison(float("nan"), 0.0, float("nan"), rms_limit, False)
    if candidate.shape != golden.shape or low.shape != golden.shape:
        return nothing
    if candidate.numel() == 0:
        return Comparison(0.0, 0.0, 0.0, rms_limit, True)
    golden = golden.double()
    finite = golden.isfinite()
    infinite = golden[~finite]
    if not (torch.equal(candidate.double()[~finite], infinite) and torch.equal(low.double()[~finite], infinite)):
        return nothing
    golden = torch.where(finite, golden, 0.0)
    error = torch.where(finite, candidate.double() - golden, 0.0)
    low_error = torch.where(finite, low.double() - golden, 0.0)
    rounded = golden.to(dtype)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    floor = max(2 * _largest(((rounded + 0.3) - 0.3) - rounded), torch.finfo(dtype).eps / 4)
    floor += 8 * torch.finfo(statistics).eps * _largest(golden)  # exponents of base 2 are rounded a few times more
    limit = 2 * _largest(low_error) + floor
    max_err = _largest(error)
    size = float(golden.square().mean().sqrt())
    rms, low_rms = (float(x.square().mean().sqrt()) / size if size > 1e-12 else 0.0 for x in (error, low_error))
    if int((golden.flatten(0, -2) if golden.dim() > 1 else golden[:, None]).any(-1).sum()) < FEW_ROWS:
        rms_limit = max(rms_limit, 2 * low_rms)
    return Comparison(max_err, limit, rms, rms_limit, max_err <= limit < float("inf") and rms <= rms_limit)


def assert_close(
    candidate: Tensor, golden: Tensor, low: Tensor, name: str = "result", *, dtype: torch.dtype | None = None
) -> None:
    """Raise AssertionError with the numbers where `compare` says wrong."""
    verdict = compare(candidate, golden, low, dtype=dtype)
    if not verdict.ok:
        raise AssertionError(f"{name} {tuple(candidate.shape)} {candidate.dtype}: {verdict}")


class SelectionComparison(NamedTuple):
    """How two selections differ, in (token, KV head) rows."""

    rows: int
    different: int  # rows whose sets differ
    wrong: int  # rows that differ by more than the score band allows, or are not ascending with -1 last
    ok: bool


def compare_selections(got: Tensor, want: Tensor, block_scores: Tensor | None = None) -> SelectionComparison:
    """Judge a selection: the sets are equal, or a differing block scores within 2^-7 of the one it replaced.

    Args:
        got, want: int32 `[T, Hkv, N]`; `got` must be ascending with unused slots -1 at the end.
        block_scores: block importance in the reference, `[T, Hkv, blocks]`. Without it the sets must be equal.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        return SelectionComparison(want.shape[:-1].numel(), 0, want.shape[:-1].numel(), False)
    neighbours = got[..., :-1], got[..., 1:]
    ascending = ((neighbours[1] == -1) | ((neighbours[0] >= 0) & (neighbours[0] < neighbours[1]))).all(-1)
    extra = (got >= 0) & ~(got[..., :, None] == want[..., None, :]).any(-1)
    missing = (want >= 0) & ~(want[..., :, None] == got[..., None, :]).any(-1)
    invalid = (got < -1).any(-1)
    different = (extra | missing).any(-1)
    if block_scores is None:
        fits = ~different
    else:
        new, old = _ranked(block_scores, got, extra), _ranked(block_scores, want, missing)
        none = float("-inf")
        near = (new - old).abs() <= SCORE_BAND * old.abs()
        fits = torch.where((new == none) | (old == none), new == old, near).all(-1)
    wrong = ~fits | ~ascending | invalid
    return SelectionComparison(wrong.numel(), int(different.sum()), int(wrong.sum()), not bool(wrong.any()))


def _ranked(block_scores: Tensor, block_idx: Tensor, chosen: Tensor) -> Tensor:
    """Scores of the chosen entries, descending, -inf in the other places and where a block does not exist."""
    exists = chosen & (block_idx >= 0) & (block_idx < block_scores.shape[-1])
    scores = block_scores.double().gather(-1, torch.where(exists, block_idx, 0).long())
    return torch.where(exists, scores, float("-inf")).sort(dim=-1, descending=True).values


def _largest(x: Tensor) -> float:
    """max |x|, NaN if there is one."""
    return float(x.detach().abs().amax())


def _cumulative(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)


def _current_block(plan: Plan) -> Tensor:
    """Index of the block that holds each query's own position, -1 for rows that see nothing: int64 `[total_q]`."""
    seq, _ = rows_of(plan.cu_q, plan.total_q)
    t = torch.where(seq < plan.num_seqs, positions(plan), -1)
    return torch.where(t >= 0, t // plan.config.slc_block, -1)


def _draw(current: Tensor, num_kv_heads: int, num_blocks: int, config: NSAConfig, generator: torch.Generator) -> Tensor:
    """Selections of some rows: forced blocks first, then the visible ones with the largest random numbers."""
    device = current.device
    rank = torch.rand(current.shape[0], num_kv_heads, num_blocks, generator=generator, device=device)
    block = torch.arange(num_blocks, device=device)
    current = current[:, None, None]
    forced = (block < config.init_blocks) | (block > current - config.local_blocks)
    rank = torch.where(forced, 2.0, rank).masked_fill_(block > current, -1.0)
    best = rank.topk(min(config.num_selected, num_blocks), dim=-1)
    last = torch.where(best.values < 0, num_blocks, best.indices).sort(dim=-1).values
    chosen = torch.where(last == num_blocks, -1, last)
    return torch.nn.functional.pad(chosen, (0, config.num_selected - chosen.shape[-1]), value=-1).int()
