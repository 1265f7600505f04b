"""`nsattn bench attention`: times of every operation, forward and backward, beside dense attention in the same run.

With a folder of peers also the operations of the official Flash Sparse Attention that can be called by themselves, each
checked first, forward and gradients. At the shapes of the paper's figure (`PAPER` of `cases.py`) that are not timed in
full, the branches that its figure adds to the selected one are timed; the selected one is in `nsattn bench selected`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import nsattn
from nsattn import dispatch
from nsattn.bench.base import Base
from nsattn.bench.cases import PAPER, Case
from nsattn.bench.peers import Call, Missing, Problem, fsa, fsa_branches, nsa_ref
from nsattn.bench.session import Session
from nsattn.bench.timing import (
    GRAPH,
    GRAPH_TOKENS,
    OURS,
    Echo,
    Row,
    captured,
    floor_ms,
    interleave,
    locked,
    merge,
    merge_notes,
    note,
    older_notes,
    older_rows,
    peak_beyond,
    read_rows,
    save,
)
from nsattn.bench.truth import Truth
from nsattn.environment import commit
from nsattn.kernels import reference
from nsattn.plan import Plan, make_plan
from nsattn.testing import compare, compare_selections, make_compression, random_selection

CHECKED_ROWS = 64
LENGTHS = (8192, 32768, 65536)
HEADS = ((4, 4), (16, 4), (32, 8), (40, 8), (64, 4))  # query heads, KV heads
SHAPES = (
    *((T, *pair) for pair in HEADS for T in LENGTHS),
    *((T, 32, 8) for T in (4096, 16384, 131072, 262144)),
    (16384, 64, 4), (65536, 28, 4),
)
DENSE_TOKENS = 131072  # beyond, dense attention would take most of the time
PEER_TOKENS = 131072
SHARED = ("attend_compressed", "select_blocks", "attend_window")  # what every schedule of the selected branch shares
PAPER_SHAPES = tuple(sorted({(case.length, case.num_heads, case.num_kv_heads) for case in PAPER} - set(SHAPES)))


@dataclass(frozen=True)
class Work:
    """Something to time: a function of leaf tensors, its useful FLOPs, and how to check its result."""

    who: str
    op: str
    impl: str
    call: Callable[..., Any]  # returns one tensor
    leaves: tuple[Tensor, ...]
    flops: float
    check: Callable[[Tensor], bool]  # judges a result against the reference
    backward: bool = True
    gradients: Callable[[], bool] | None = None  # judges the gradients; ours are the business of `nsattn verify`


def run(
    lengths: Sequence[int] = (),
    heads: Sequence[tuple[int, int]] = (),
    *,
    out: str,
    echo: Echo,
    head_dim: int = 128,
    peers: Path | None = None,
    base: Base | None = None,
    session: Session | None = None,
) -> list[Row]:
    """Time everything for one sequence of each length and each pair of head counts, and write JSON to `out`.

    Args:
        lengths, heads: default: `SHAPES` in full, and the branches of `SHARED` at `PAPER_SHAPES`.
        out: results file; rows that it holds are kept unless timed again. An empty text writes none.
        peers: where checkouts of peers lie; None times none.
        base: another commit, which times each shape too.
        session: which shapes to skip and when to stop; default: all of them are timed.

    Returns:
        The new rows.
    """
    device = "cuda"
    shapes = [(T, *pair) for pair in heads or HEADS for T in lengths or LENGTHS]
    if not lengths and not heads:
        shapes = [*SHAPES, *PAPER_SHAPES]
    if not torch.cuda.is_available():
        echo("No GPU: timing the reference at one tiny size. These numbers say nothing about the kernels.")
        shapes, head_dim, device = [(256, 4, 2)], 32, "cpu"
    loaded, not_run = _load(peers, device) if peers else ([], [])
    for missed in not_run:
        echo(f"{missed['who']} {missed['impl']} is not here: {missed['reason']}")
    rows: list[Row] = []
    done: list[str] = []
    cases = [(*shape, head_dim) for shape in shapes]
    for case in (session or Session(again=True)).each("attention", cases, older_rows(out), _fields):
        few = case[:3] in PAPER_SHAPES and not lengths and not heads
        works, notes = _works(*case, device, loaded, only=(*SHARED, fsa_branches.BOTH) if few else ())
        for work in works:
            try:
                new = _time(work, *case, device)
            except Exception as error:
                if work.who not in (fsa.WHO, nsa_ref.WHO):
                    raise
                notes.append(note(work.who, work.op, _name(case), _reason(error, device)))
                continue
            rows += new
            for row in new:
                echo(
                    f"{row.Hq:3}/{row.Hkv} T={row.T:6} {row.op:18} {row.impl:12} {row.direction:8} "
                    f"{row.ms:9.3f} ms  floor {row.floor_ms:8.3f}  {row.peak_gib:5.2f} GiB  "
                    f"{'ok' if row.ok else 'WRONG'}"
                )
        for missed in notes:
            echo(f"  {missed['who']} {missed['impl']} not run: {missed['reason']}")
        not_run += notes
        done.append(_name(case))
        if base:
            rows += base.rows("attention", "--lengths", f"{case[0]}", "--heads", f"{case[1]}/{case[2]}", echo=echo)
        if out:
            with locked(out):
                save(merge(rows, out), out, not_run=merge_notes(not_run, done, out) if peers else older_notes(out))
    return rows


def _name(case: tuple[int, int, int, int]) -> str:
    return f"T={case[0]} {case[1]}/{case[2]} D={case[3]}"


def _reason(error: Exception, device: str) -> str:
    """What a peer raised, in short. Raises if the device is lost."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return f"{type(error).__name__}: {str(error)[:300]}"


def _load(folder: Path, device: str) -> tuple[list[Any], list[dict[str, str]]]:
    """Adapters of peers that are on this machine, and why the others are not."""
    loaded, missing = [], []
    for adapter, what in ((fsa_branches, "compressed, selection, window"), (fsa, "selected"), (nsa_ref, "selected")):
        try:
            if device == "cpu":
                raise Missing("needs a GPU")
            adapter.load(folder)
            loaded.append(adapter)
        except Missing as error:
            missing.append(note(getattr(adapter, "WHO", fsa.WHO), what, "", str(error)))
    return loaded, missing


def _fields(case: tuple[int, int, int, int]) -> dict[str, int]:
    return dict(zip(("T", "Hq", "Hkv", "D"), case, strict=True))


def _works(
    T: int, Hq: int, Hkv: int, D: int, device: str, loaded: Sequence[Any] = (), only: Sequence[str] = ()
) -> tuple[list[Work], list[dict[str, str]]]:
    """All contenders of one shape, and why peers are none. Inputs are random, the selection too, with forced blocks.

    Args:
        loaded: adapters of peers.
        only: operations; default: all.
    """
    config = nsattn.NSAConfig()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_()

    cu = torch.tensor([0, T], dtype=torch.int32, device=device)
    plan = make_plan(cu, T, config=config, max_seqlen=T)
    q, k, v = normal(T, Hq, D), normal(T, Hkv, D), normal(T, Hkv, D)
    o = [normal(T, Hq, D) for _ in range(3)]
    gates = torch.rand(T, Hq, 3, generator=generator, device=device, dtype=dtype).requires_grad_()
    linear = tuple(
        p.requires_grad_() for p in make_compression("linear", Hkv, D, D, config, dtype=dtype, device=device)
    )
    with torch.no_grad():
        k_cmp, v_cmp = (nsattn.compress(x, plan=plan) for x in (k, v))
        lse_cmp = nsattn.attend_compressed(q, k_cmp, v_cmp, plan=plan, return_lse=True)[1]
    k_cmp.requires_grad_()
    v_cmp.requires_grad_()
    selection = random_selection(plan, Hkv)

    visible = T * T / 2  # (query, key) pairs of causal attention
    pairs = 4 * Hq * D  # FLOPs of a (query, key) pair forward, all heads
    tokens = T * min(T / 2, config.num_selected * config.slc_block)  # (query, key) pairs of the selected branch
    recent = T * min(T / 2, config.window)
    tail = Tail(q, k, v, k_cmp, v_cmp, plan)
    few = min(T, 4 * config.cmp_block)  # the first tokens are compressed alike, whatever follows
    first = make_plan(torch.tensor([0, few], dtype=torch.int32, device=device), few, config=config, max_seqlen=few)

    def compressed(y: Tensor) -> bool:
        exact, low = (
            reference.compress(k[:few].to(t), tuple(p.to(t) for p in linear), first, method="linear")
            for t in (torch.float64, dtype)
        )
        return compare(y[: first.max_cmp], exact[: first.max_cmp], low[: first.max_cmp]).ok

    def combined(y: Tensor) -> bool:
        rows = slice(-CHECKED_ROWS, None)
        exact, low = (reference.combine(*(x[rows].to(t) for x in (*o, gates))) for t in (torch.float64, dtype))
        return compare(y[rows], exact, low).ok

    def whole_checked(y: Tensor) -> bool:
        result = nsattn.nsa_attention(q, k, v, gates=gates, plan=plan, return_lse=True)
        chosen = result.block_idx if isinstance(result, nsattn.NSAOutput) else selection
        return tail.agrees(y, lambda t: tail.whole(t, chosen, gates))

    shape = dispatch.Shape(
        device, dtype, D, D, Hq // Hkv, plan.max_blk, config.slc_block, dispatch.capability(device, None),
        overlap=config.overlap, keys_per_block=config.keys_per_block,
    )  # fmt: skip
    auto = {op: dispatch.resolve(op, "auto", shape) for op in dispatch.TABLE if op != "attend_selected"}
    works = [
        Work("nsattn", "compress", auto["compress"],
             lambda x, w, b: nsattn.compress(x, method="linear", params=(w, b), plan=plan), (k, *linear),
             2 * T / config.cmp_stride * config.cmp_block * D * D * Hkv, compressed),
        Work("nsattn", "attend_compressed", auto["attend_compressed"],
             lambda q, k, v: nsattn.attend_compressed(q, k, v, plan=plan), (q, k_cmp, v_cmp),
             pairs * visible / config.cmp_stride,
             lambda y: tail.agrees(y, lambda t: tail.branch("attend_compressed", t))),
        Work("nsattn", "select_blocks", auto["select_blocks"],
             lambda q, k: nsattn.select_blocks(q, k, lse_cmp, plan=plan), (q, k_cmp),
             pairs / 2 * visible / config.cmp_stride, lambda y: tail.selects(y, lse_cmp), backward=False),
    ]  # fmt: skip
    for impl, cell in dispatch.TABLE["attend_selected"].items():
        if cell.is_kernel != (device == "cuda"):
            continue
        works.append(
            Work("nsattn", "attend_selected", impl,
                 lambda q, k, v, impl=impl: nsattn.attend_selected(q, k, v, selection, plan=plan, impl=impl),
                 (q, k, v), pairs * tokens,
                 lambda y: tail.agrees(y, lambda t: tail.branch("attend_selected", t, selection)))
        )  # fmt: skip
    works += [
        Work("nsattn", "attend_window", auto["attend_window"],
             lambda q, k, v: nsattn.attend_window(q, k, v, plan=plan), (q, k, v), pairs * recent,
             lambda y: tail.agrees(y, lambda t: tail.branch("attend_window", t))),
        Work("nsattn", "combine", auto["combine"], nsattn.combine, (*o, gates), 6 * T * Hq * D, combined),
        Work("nsattn", "nsa_attention", "auto" if device == "cuda" else "reference",
             lambda q, k, v, g: nsattn.nsa_attention(q, k, v, gates=g, plan=plan), (q, k, v, gates),
             pairs * (1.5 * visible / config.cmp_stride + tokens + recent), whole_checked),
    ]  # fmt: skip
    if T <= DENSE_TOKENS:
        works.append(_dense(q, k, v, pairs * visible))
    case = Case(Hq // Hkv, Hkv, T, head_dim=D, v_head_dim=D, block=config.slc_block, num_selected=config.num_selected)
    flops = {"attend_compressed": pairs * visible / config.cmp_stride, "attend_selected": pairs * tokens,
             "attend_window": pairs * recent}  # fmt: skip
    problems = {op: Problem(case, q, k, v, selection, plan) for op in ("attend_selected", "attend_window")}
    problems["attend_compressed"] = Problem(case, q, k_cmp, v_cmp, selection, plan)
    works, notes = [work for work in works if not only or work.op in only], []
    for who, op, make in (x for adapter in loaded for x in _theirs(adapter, problems["attend_selected"])):
        if only and op not in only:
            continue
        if T > PEER_TOKENS:  # what it would raise ends the process, and no other row would be timed
            reason = "at 262144 tokens a kernel of official FSA reads outside its memory"
            notes.append(note(who, op, _name((T, Hq, Hkv, D)), f"not tried beyond {PEER_TOKENS} tokens: {reason}"))
            continue
        try:
            call = make()
            if op == fsa_branches.BOTH:
                works.append(Work(who, op, "as published", call, (q, k_cmp, v_cmp), 1.5 * flops["attend_compressed"],
                                  lambda y: tail.selects(y, lse_cmp), backward=False))  # fmt: skip
                continue
            ok = Truth(problems[op], op).check(call)
            problem = problems[op]
            works.append(Work(who, op, "as published", call, (problem.q, problem.k, problem.v), flops[op],
                              lambda y, ok=ok: ok[0], gradients=lambda ok=ok: ok[1]))  # fmt: skip
        except Exception as error:  # noqa: BLE001  whatever a peer raises is its result; the others go on
            notes.append(note(who, op, _name((T, Hq, Hkv, D)), _reason(error, device)))
    return works, notes


def _theirs(adapter: Any, problem: Problem) -> list[tuple[str, str, Callable[[], Call]]]:
    """(project, operation, what makes its call) of a peer's adapter."""
    if adapter is not fsa_branches:
        return [(adapter.WHO, "attend_selected", lambda: adapter.prepare(problem))]
    plan = problem.plan
    return [
        (fsa.WHO, "attend_compressed", lambda: fsa_branches.compressed(plan)),
        (fsa.WHO, fsa_branches.BOTH, lambda: fsa_branches.selection(plan)),
        (fsa.WHO, "attend_window", lambda: fsa_branches.window(plan)),
    ]


def _dense(q: Tensor, k: Tensor, v: Tensor, flops: float) -> Work:
    """torch SDPA, causal: cuDNN on a GPU (about FlashAttention-3 speed), whatever torch has on a CPU."""
    q, k, v = (x.detach().transpose(0, 1).contiguous()[None].requires_grad_() for x in (q, k, v))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backends = [SDPBackend.CUDNN_ATTENTION] if q.is_cuda else [SDPBackend.MATH]
        with sdpa_kernel(backends):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def last_row(y: Tensor) -> bool:
        """The last query sees every key, so it needs no mask."""
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        exact, low = (
            F.scaled_dot_product_attention(q[:, :, -1:].to(t), keys.to(t), values.to(t))
            for t in (torch.float64, q.dtype)
        )
        return compare(y[:, :, -1:], exact, low).ok

    return Work("torch", "dense causal", "cudnn" if q.is_cuda else "math", call, (q, k, v), flops, last_row)


class Tail:
    """The reference on the last query rows alone: as cached keys with a few queries, at a cost linear in T."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, plan: Plan) -> None:
        self.rows = min(CHECKED_ROWS, plan.total_q)
        self.q, self.k, self.v, self.k_cmp, self.v_cmp = q[-self.rows :], k, v, k_cmp, v_cmp
        self.scale = q.shape[-1] ** -0.5
        self.plan = make_plan(
            torch.tensor([0, self.rows], dtype=torch.int32, device=q.device),
            self.rows,
            config=plan.config,
            max_seqlen=self.rows,
            cu_seqlens_k=plan.cu_k,
            total_k=plan.total_k,
            max_seqlen_k=plan.max_k,
        )

    def branch(self, operation: str, dtype: torch.dtype, selection: Tensor | None = None) -> Tensor:
        """Output of one branch, computed in `dtype`."""
        keys = (self.k_cmp, self.v_cmp) if operation == "attend_compressed" else (self.k, self.v)
        extra = () if selection is None else (selection[-self.rows :],)
        tensors = [x.to(dtype) for x in (self.q, *keys)]
        return getattr(reference, operation)(*tensors, *extra, self.plan, scale=self.scale)[0]

    def whole(self, dtype: torch.dtype, selection: Tensor, gates: Tensor) -> Tensor:
        """Output of the three branches for a given selection."""
        branches = (self.branch("attend_compressed", dtype), self.branch("attend_selected", dtype, selection),
                    self.branch("attend_window", dtype))  # fmt: skip
        return reference.combine(*branches, gates[-self.rows :].to(dtype))

    def agrees(self, y: Tensor, function: Callable[[torch.dtype], Tensor]) -> bool:
        return compare(y[-self.rows :], function(torch.float64), function(y.dtype)).ok

    def selects(self, block_idx: Tensor, lse: Tensor) -> bool:
        """The selection of the last rows is the reference's, or differs by blocks that score alike."""
        arguments = (self.q.double(), self.k_cmp.double(), lse[-self.rows :].double(), self.plan)
        score = reference.unpad(reference.block_scores(*arguments, scale=self.scale).transpose(1, 2), self.plan)
        want = reference.select_blocks(*arguments, scale=self.scale)
        return compare_selections(block_idx[-self.rows :], want, score).ok


def _time(work: Work, T: int, Hq: int, Hkv: int, D: int, device: str) -> list[Row]:
    """Forward and backward of one contender. A shape that a contender cannot run is an error, not a gap."""
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    y = work.call(*work.leaves)
    kept = torch.cuda.memory_allocated() - before - y.numel() * y.element_size() if device == "cuda" else 0
    with torch.no_grad():
        ok = work.check(y)
    right = {"forward": ok, "backward": ok and (work.gradients is None or work.gradients())}
    config = nsattn.NSAConfig()
    moved = sum(x.numel() * x.element_size() for x in (*work.leaves, y))
    selection = "random" if work.op in ("attend_selected",) else "own"
    rows = []
    factor = 2.5 if "attend" in work.op or work.op in ("nsa_attention", "dense causal") else 2
    floors = {"forward": (work.flops, moved), "backward": (factor * work.flops, 2 * moved)}
    calls: list[tuple[str, str, Callable[[], object]]] = [
        (work.impl, "forward", lambda: work.call(*work.leaves)),
    ]
    dy = torch.randn_like(y) if work.backward else None
    if work.backward:
        calls.append(
            (work.impl, "backward", lambda: torch.autograd.grad(y, work.leaves, dy, retain_graph=True)),
        )
    if device == "cuda" and work.who == OURS and T <= GRAPH_TOKENS:
        replays = captured(work.call, work.leaves, dy)
        calls += [(f"{work.impl}{GRAPH}", call[1], replay) for call, replay in zip(calls, replays, strict=True)]
    peaks: dict[str, float] = {}
    for impl, direction, call in calls:
        flops, size = floors[direction]
        with torch.set_grad_enabled(direction == "backward"):
            call()
            if direction not in peaks:  # a graph allocates nothing when it runs: its row says what its call takes
                peaks[direction] = peak_beyond(call, device)[1] + (kept / 2**30 if direction == "backward" else 0)
            [(ms, p20, p80)] = interleave([call], device, rounds=1)
        rows.append(
            Row(
                who=work.who,
                op=work.op,
                impl=impl,
                T=T,
                Hq=Hq,
                Hkv=Hkv,
                D=D,
                Dv=D,
                B=config.slc_block,
                N=config.num_selected,
                selection=selection,
                direction=direction,
                ms=ms,
                p20=p20,
                p80=p80,
                floor_ms=floor_ms(flops, size),
                peak_gib=peaks[direction],
                ok=right[direction],
                commit=commit(),
                dtype=str(work.leaves[0].dtype).removeprefix("torch."),
            )
        )
    return rows


def summary(path: str | Path) -> str:
    """The README's table of times, in markdown, from a results file: whole attention and the selected branch, in ms."""
    ours = [r for r in read_rows(path) if r.who in (OURS, "torch")]
    times = {(r.Hq, r.Hkv, r.T, r.op, r.impl, r.direction): r.ms for r in ours}
    columns = (
        ("nsa_attention", "auto"),
        ("nsa_attention", "auto graph"),
        ("dense causal", "cudnn"),
        ("attend_selected", "kvmajor_sm90 graph", "kvmajor_sm90", "kvmajor"),  # the first that was timed
        ("attend_selected", "qmajor graph", "qmajor"),
    )
    heads = ("whole NSA", "as a CUDA graph", "dense (cuDNN)", "selected, KV-major", "selected, query-major")
    lines = [f"| heads | T | {' | '.join(heads)} |", "|---|--:|--:|--:|--:|--:|--:|"]
    for Hq, Hkv, T in sorted({key[:3] for key in times if key[3] == "nsa_attention"}):
        cells = (
            " / ".join(
                next(
                    (f"{times[key]:.2f}" for impl in impls if (key := (Hq, Hkv, T, op, impl, direction)) in times), "-"
                )
                for direction in ("forward", "backward")
            )
            for op, *impls in columns
        )
        lines.append(f"| {Hq}/{Hkv} | {T} | {' | '.join(cells)} |")
    return "\n".join(lines)
