"""`nsattn bench decode`: the attention of one decoding step, beside dense attention over the same cache.

A step is one new token for each of `batch` sequences of one length. Ours is `nsa_decode`, plain and paged, called and
as a CUDA graph; dense is torch SDPA with the backends that take one query. Every result is checked first: ours against
the reference, dense against dense attention in float64 for the first sequence.

`floor_ms` counts what a step must read once: compressed keys and values, N blocks and the window for NSA, all keys and
values for dense attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import nsattn
from nsattn import branches
from nsattn.bench.base import Base
from nsattn.bench.session import Session
from nsattn.bench.timing import (
    GRAPH,
    PEAK_BYTES,
    Echo,
    Row,
    as_graph,
    interleave,
    locked,
    merge,
    older_rows,
    peak_beyond,
    save,
)
from nsattn.environment import commit
from nsattn.plan import num_compressed
from nsattn.testing import CacheInputs, compare, make_cache


@dataclass(frozen=True)
class DecodeCase:
    """One step. The default is the target: 64K context, eight sequences, 32/8 heads."""

    num_heads: int = 32
    num_kv_heads: int = 8
    length: int = 65536
    batch: int = 8
    head_dim: int = 128

    @property
    def shape(self) -> dict[str, Any]:
        """What a row says of it."""
        return {
            "T": self.length * self.batch, "Hq": self.num_heads, "Hkv": self.num_kv_heads, "D": self.head_dim,
            "Dv": self.head_dim, "sequences": self.batch,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{self.batch} x {self.length}, {self.num_heads}/{self.num_kv_heads} heads"


CASES = (
    DecodeCase(),
    DecodeCase(batch=1),
    DecodeCase(length=8192, batch=32),
    DecodeCase(length=16384),
    DecodeCase(length=131072, batch=4),
    DecodeCase(num_heads=40),
    DecodeCase(num_heads=64, num_kv_heads=4),
    DecodeCase(num_heads=4, num_kv_heads=4),
)
TINY = (DecodeCase(4, 2, 130, 2, 16),)  # what a machine without a GPU runs, in the reference


def run(
    *, out: str = "", rounds: int = 2, echo: Echo, base: Base | None = None, session: Session | None = None
) -> list[Row]:
    """Check and time all cases, or those that `session` names, then all of `base`.

    Rows that `out` already holds are kept unless timed again.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        echo("No GPU: timing the reference at one tiny size. These numbers say nothing about the kernels.")
    rows: list[Row] = []
    cases = CASES if device == "cuda" else TINY
    for case in (session or Session(again=True)).each("decode", cases, older_rows(out), lambda case: case.shape):
        rows += _bench(case, device, rounds, echo)
        if out:
            with locked(out):
                save(merge(rows, out), out)
    if base:
        rows += base.rows("decode", "--rounds", f"{rounds}", echo=echo)
        if out:
            with locked(out):
                save(merge(rows, out), out)
    return rows


@dataclass(frozen=True)
class Contender:
    who: str
    impl: str
    call: Callable[[], Tensor]
    ok: bool
    bytes: float


def _bench(case: DecodeCase, device: str, rounds: int, echo: Echo) -> list[Row]:
    echo(f"{case}:")
    contenders = []
    for make in (_ours, _dense):
        for contender in make(case, device):
            contenders.append(contender)
            if device == "cuda":
                contenders.append(_captured(contender))
    config, rows = nsattn.NSAConfig(), []
    with torch.no_grad():
        calls = [c for c in contenders if not c.impl.endswith(GRAPH)]  # a graph allocates nothing when it runs
        peaks = {c.impl: peak_beyond(c.call, device)[1] for c in calls}
        times = interleave([c.call for c in contenders], device, rounds)
    for c, (ms, p20, p80) in zip(contenders, times, strict=True):
        row = Row(
            who=c.who, op="decode", impl=c.impl, **case.shape, B=config.slc_block, N=config.num_selected,
            selection="own", direction="forward", ms=ms, p20=p20, p80=p80, floor_ms=c.bytes / PEAK_BYTES * 1e3,
            peak_gib=peaks[c.impl.removesuffix(GRAPH)], ok=c.ok, commit=commit(),
            dtype="bfloat16" if device == "cuda" else "float32",
        )  # fmt: skip
        rows.append(row)
        echo(f"  {row.who:7} {row.impl:22} {ms:8.4f} ms ({p20:.4f} to {p80:.4f})  floor {row.floor_ms:.4f}  "
             f"{'ok' if row.ok else 'WRONG'}")
    return rows


def _ours(case: DecodeCase, device: str) -> Iterator[Contender]:
    config = nsattn.NSAConfig() if device == "cuda" else nsattn.NSAConfig(8, 4, 16, 4, 20)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    kernel = "triton" if device == "cuda" else "reference"
    tokens = 2 * num_compressed(case.length, config) + config.num_selected * config.slc_block + config.window
    moved = case.batch * case.num_kv_heads * 2 * case.head_dim * dtype.itemsize * tokens
    for paged in (False, True):
        x = make_cache(
            [case.length] * case.batch, 1, room=case.length, paged=paged, num_kv_heads=case.num_kv_heads,
            group=case.num_heads // case.num_kv_heads, head_dim=case.head_dim, config=config, dtype=dtype,
            device=device,
        )  # fmt: skip
        x = x._replace(k_win=x.k, v_win=x.v)

        def call(x: CacheInputs = x) -> Tensor:
            return branches.nsa_decode(*x, scale=case.head_dim**-0.5, workspace=1 << 30, impl=kernel)[0]

        yield Contender("nsattn", f"{kernel} paged" if paged else kernel, call, _agrees(x, call()), moved)


def _agrees(x: CacheInputs, o: Tensor) -> bool:
    """One sequence against the reference; blocks that score alike may differ, so the reference's choice must too."""
    one = x._replace(q=x.q[:1], gates=x.gates[:1], cache_seqlens=x.cache_seqlens[:1])
    if x.block_table is None:
        one = one._replace(**{name: getattr(x, name)[:1] for name in ("k", "v", "k_cmp", "v_cmp", "k_win", "v_win")})
    else:
        one = one._replace(block_table=x.block_table[:1])
    scale = x.q.shape[-1] ** -0.5
    exact, low = (
        branches.nsa_decode(*one.to(t), scale=scale, workspace=1 << 30, impl="reference")[0]
        for t in (torch.float64, x.q.dtype)
    )
    return compare(o[:1], exact, low).ok


def _dense(case: DecodeCase, device: str) -> Iterator[Contender]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    q = normal(case.batch, case.num_heads, 1, case.head_dim)
    k, v = (normal(case.batch, case.num_kv_heads, case.length, case.head_dim) for _ in range(2))
    exact, low = (
        F.scaled_dot_product_attention(q[:1].to(t), k[:1].to(t), v[:1].to(t), enable_gqa=True)
        for t in (torch.float64, dtype)
    )
    names = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION") if device == "cuda" else ("MATH",)
    for name in names:
        backend = getattr(SDPBackend, name)

        def call(backend: Any = backend) -> Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        try:
            ok = compare(call()[:1], exact, low).ok
        except RuntimeError:  # the backend does not take this shape
            continue
        moved = 2 * case.batch * case.num_kv_heads * case.length * case.head_dim * dtype.itemsize
        yield Contender("torch", f"dense {name.split('_')[0].lower()}", call, ok, moved)


def _captured(contender: Contender) -> Contender:
    """The same as a CUDA graph."""
    call = as_graph(contender.call)
    return Contender(contender.who, f"{contender.impl}{GRAPH}", call, contender.ok, contender.bytes)
