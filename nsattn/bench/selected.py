"""`nsattn bench selected`: selected attention alone, forward and backward, beside what other projects take.

For every case of `cases.py` each contender is checked, then all are timed in turn: our implementations by the names of
`dispatch.TABLE`, `auto`, and the peers of `peers/`. Inverting the selection, merging and all scratch are part of a
time; bringing the selection into a peer's own form is not. Backward is the autograd backward alone.

The check compares the output of the last rows with the reference, and the gradients of a loss that reads these rows
alone. What fails it is timed and marked; what is missing, refuses a shape or raises is listed under `not_run`.

Up to 65536 tokens the launches of a slow host may rule a time, so contenders that never wait for the device are timed
once more as CUDA graphs (`impl` ends with "graph").
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nsattn
from nsattn import dispatch
from nsattn.bench import peers
from nsattn.bench.base import Base
from nsattn.bench.cases import SELECTIONS, SETS, TINY, Case, choose, selected_keys, target_ms
from nsattn.bench.peers import Call, Problem
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
    older_rows,
    peak_beyond,
    read_rows,
    save,
)
from nsattn.bench.truth import Truth
from nsattn.bench.warm import Named, fill
from nsattn.environment import commit
from nsattn.plan import make_plan

Loaded = dict[peers.Peer, str]  # peers that are here, and the variant found


def run(
    *,
    only: str = "",
    out: str = "",
    folder: Path = Path("peers"),
    rounds: int = 2,
    shard: tuple[int, int] = (0, 1),
    check_only: bool = False,
    base: Base | None = None,
    session: Session | None = None,
    echo: Echo,
) -> list[Row]:
    """Check and time cases and write them as JSON. Rows that `out` already holds are kept unless timed again.

    Args:
        only: comma-separated names of sets, default all.
        out: results file; an empty text writes none.
        folder: where checkouts of peers lie.
        rounds: how often the contenders of a case are measured in turn.
        shard: (i, n) takes every n-th case from the i-th on, to split a run.
        check_only: check every contender and time none. It also fills Triton's cache, in as many processes as shards.
        base: another commit, which times each case too.
        session: which cases to skip and when to stop; default: all of them are timed.

    Returns:
        The new rows.
    """
    cases = choose(only)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        echo("No GPU: timing the reference at tiny sizes. These numbers say nothing about the kernels.")
        cases = [("tiny", case) for case in TINY]
    loaded, not_run = _load(folder, device)
    for missed in not_run:
        echo(f"{missed['who']} is not here: {missed['reason']}")
    rows: list[Row] = []
    done: list[Case] = []
    mine = cases[shard[0] :: shard[1]]
    session, older = session or Session(again=True), older_rows(out)
    if not check_only and not session.shared:
        compile_ahead(mine, out=out, folder=folder, session=session, echo=echo)
    for name, case in session.each("selected", mine, older, _fields):
        start = time.perf_counter()
        new, notes = _bench(name, case, loaded, device, rounds=0 if check_only else rounds, echo=echo)
        rows += new
        if base and not check_only:
            alone = _alone(name, case, Path(os.devnull))
            rows += base.rows("selected", *alone, "--rounds", f"{rounds}", echo=echo)
        not_run += notes
        done.append(case)
        for missed in notes:
            echo(f"  {missed['who']} {missed['impl']} not run: {missed['reason']}")
        echo(f"[{name}] {case}: {time.perf_counter() - start:.1f} s")
        if out and not check_only:
            with locked(out):
                save(merge(rows, out), out, not_run=merge_notes(not_run, done, out))
    return rows


def compile_ahead(cases: Sequence[Named], *, out: str, folder: Path, session: Session, echo: Echo) -> None:
    """Fill Triton's cache, side by side, for the cases that `run` would time now."""
    if torch.cuda.is_available():
        todo = session.todo(cases, older_rows(out), _fields)
        fill(todo, lambda named: _alone(*named, folder), seconds=session.end - time.monotonic(), echo=echo)


def _fields(named: Named) -> dict[str, Any]:
    name, case = named
    return {"set": name, "selection": case.selection, **case.shape}


def _alone(name: str, case: Case, folder: Path) -> tuple[str, ...]:
    """Options of `nsattn bench selected` that name one case and the folder of its peers."""
    members = SETS.get(name, TINY)
    only = ("--only", name) if name in SETS else ()
    return *only, "--shard", f"{members.index(case)}/{len(members)}", "--peers", f"{folder}"


def _load(folder: Path, device: str) -> tuple[Loaded, list[dict[str, str]]]:
    """Peers that are on this machine, and why the others are not."""
    loaded: Loaded = {}
    missing = []
    for name in peers.NAMES:
        peer = peers.peer(name)
        try:
            if device == "cpu" and name != "dense":
                raise peers.Missing("needs a GPU")
            loaded[peer] = peer.load(folder)
        except peers.Missing as error:
            missing.append(note(peer.WHO, "", "", str(error)))
    return loaded, missing


@dataclass(frozen=True)
class Contender:
    """Something that computes a problem."""

    who: str
    impl: str
    op: str
    make: Callable[[], Call]  # brings the selection into its form
    captures: bool


@dataclass(frozen=True)
class Job:
    """One thing to time, and what its row says beside the time."""

    contender: Contender
    impl: str
    direction: str
    call: Callable[[], object]
    peak_gib: float
    ok: bool


def make_problem(case: Case, device: str) -> Problem:
    """Seeded normal inputs, the plan and the selection of a case.

    Raises:
        ValueError: the case's selection was never recorded at this length.
    """
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, dim: int) -> Tensor:
        return torch.randn(case.tokens, heads, dim, generator=generator, device=device, dtype=dtype).requires_grad_()

    # The window plays no part but for dense attention, whose reference is a window of the whole sequence.
    config = nsattn.NSAConfig(slc_block=case.block, num_selected=case.num_selected, window=case.length)
    cu = torch.arange(case.sequences + 1, dtype=torch.int32, device=device) * case.length
    plan = make_plan(cu, case.tokens, config=config, max_seqlen=case.length)
    selection = SELECTIONS[case.selection](plan, case.num_kv_heads)
    q = normal(case.num_heads, case.head_dim)
    k, v = normal(case.num_kv_heads, case.head_dim), normal(case.num_kv_heads, case.v_head_dim)
    return Problem(case, q, k, v, selection, plan)


def _contenders(problem: Problem, loaded: Loaded) -> tuple[list[Contender], list[dict[str, str]]]:
    """Who can compute a problem, and why the others cannot."""
    case, plan = problem.case, problem.plan
    found, notes = [], []
    device = problem.q.device.type
    shape = dispatch.Shape(
        device, problem.q.dtype, case.head_dim, case.v_head_dim, case.group, plan.max_blk, case.block,
        dispatch.capability(device, None), case.tokens * case.num_kv_heads, case.num_selected,
    )  # fmt: skip
    for impl, cell in (*dispatch.TABLE["attend_selected"].items(), ("auto", None)):
        if cell is not None and cell.is_kernel != (device == "cuda"):
            continue
        reasons = [] if cell is None else sum(dispatch.unmet(cell, shape), [])
        if reasons:
            notes.append(note(OURS, impl, case, "; ".join(reasons)))
            continue

        def ours(q: Tensor, k: Tensor, v: Tensor, impl: str = impl) -> Tensor:
            o = nsattn.attend_selected(q, k, v, problem.selection, plan=plan, impl=impl)
            assert isinstance(o, Tensor)
            return o

        found.append(Contender(OURS, impl, "attend_selected", lambda ours=ours: ours, captures=True))
    for peer, variant in loaded.items() if case.peers else ():
        if reason := peer.refuses(case):
            notes.append(note(peer.WHO, variant, case, reason))
            continue
        op = getattr(peer, "OP", "attend_selected")
        found.append(Contender(peer.WHO, variant, op, lambda peer=peer: peer.prepare(problem), peer.CAPTURES))
    return found, notes


def _bench(
    name: str, case: Case, loaded: Loaded, device: str, *, rounds: int, echo: Echo
) -> tuple[list[Row], list[dict[str, str]]]:
    """Rows of one case, and what was not run."""
    try:
        problem = make_problem(case, device)
    except (ValueError, ImportError) as error:
        return [], [note(OURS, "", case, f"no such selection here: {error}")]
    contenders, notes = _contenders(problem, loaded)
    truths = {op: Truth(problem, op) for op in sorted({c.op for c in contenders})}
    dy = torch.randn_like(problem.q[..., :1]).expand(-1, -1, case.v_head_dim).contiguous()
    jobs: list[Job] = []
    for contender in contenders:
        try:
            call = contender.make()
            ok = truths[contender.op].check(call)
            if not rounds:
                echo(f"  {contender.who:8} {contender.impl:18} forward {_word(ok[0])}, backward {_word(ok[1])}")
                continue
            jobs += _jobs(contender, call, problem, dy, ok)
            if device == "cuda" and contender.captures and case.tokens <= GRAPH_TOKENS:
                replays = captured(call, (problem.q, problem.k, problem.v), dy)
                jobs += [
                    replace(job, impl=f"{job.impl}{GRAPH}", call=r) for job, r in zip(jobs[-2:], replays, strict=True)
                ]
        except Exception as error:  # noqa: BLE001  whatever a contender raises is its result; the others go on
            notes.append(note(contender.who, contender.impl, case, f"{type(error).__name__}: {str(error)[:300]}"))
            if device == "cuda":
                torch.cuda.synchronize()  # raises if the device is lost
    pairs = {
        "attend_selected": selected_keys(problem.selection, problem.plan) * case.group,
        "dense causal": case.tokens * (case.length + 1) // 2 * case.num_heads,
    }
    rows = []
    for job, (ms, p20, p80) in zip(jobs, interleave([job.call for job in jobs], device, rounds), strict=True):
        op = job.contender.op
        rows.append(
            Row(
                who=job.contender.who,
                op=op,
                impl=job.impl,
                selection=case.selection if op == "attend_selected" else "all",
                direction=job.direction,
                ms=ms,
                p20=p20,
                p80=p80,
                floor_ms=_floor(problem, op, pairs[op], job.direction),
                peak_gib=job.peak_gib,
                ok=job.ok,
                commit=commit(),
                set=name,
                **case.shape,
            )
        )
        target = target_ms(case, job.direction) if op == "attend_selected" else None
        echo(
            f"  {job.contender.who:8} {job.impl:18} {job.direction:8} {ms:9.3f} ms ({p20:.3f} to {p80:.3f})  "
            f"floor {rows[-1].floor_ms:7.3f}  {'' if target is None else f'target {target:7.3f}':14}  "
            f"{job.peak_gib:6.2f} GiB  {_word(job.ok)}"
        )
    del problem, contenders, truths, jobs, dy
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return rows, notes


def _word(ok: bool) -> str:
    return "ok" if ok else "WRONG"


def _floor(problem: Problem, op: str, pairs: int, direction: str) -> float:
    """Useful FLOPs or unique bytes, the longer: backward has 5 products instead of 2 and moves q, k, v, o twice."""
    case = problem.case
    inputs = sum(x.numel() for x in (problem.q, problem.k, problem.v)) + problem.q.shape[:-1].numel() * case.v_head_dim
    moved = inputs * problem.q.element_size() * (1 if direction == "forward" else 2)
    if op == "attend_selected":
        moved += problem.selection.numel() * problem.selection.element_size()
    return floor_ms(2 * (case.head_dim + case.v_head_dim) * pairs * (1 if direction == "forward" else 2.5), moved)


def _jobs(contender: Contender, call: Call, problem: Problem, dy: Tensor, ok: tuple[bool, bool]) -> list[Job]:
    """Forward and backward of a contender."""
    leaves = (problem.q, problem.k, problem.v)
    device = problem.q.device.type

    def forward() -> Tensor:
        with torch.no_grad():
            return call(*leaves)

    peak = peak_beyond(forward, device)[1]
    base = torch.cuda.memory_allocated() if device == "cuda" else 0
    y = call(*leaves)
    base += y.numel() * y.element_size()  # y is an input of the backward; what else the forward keeps is scratch

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, dy, retain_graph=True)

    return [
        Job(contender, contender.impl, "forward", forward, peak, ok[0]),
        Job(contender, contender.impl, "backward", backward, peak_beyond(backward, device, base)[1], ok[1]),
    ]


def summary(path: str | Path) -> str:
    """The target table in markdown, from a results file: milliseconds forward / backward at T=65536, 4 KV heads."""
    rows = [row for row in read_rows(path) if row.set == "target"]
    columns = [(OURS, "auto"), *((peers.peer(name).WHO, "") for name in peers.NAMES)]
    heads = (f"{who} `{impl}`" if impl else who for who, impl in columns)
    lines = [f"| (B, N) | G | target | {' | '.join(heads)} |", "|---|--:" + "|--:" * (len(columns) + 1) + "|"]
    for B, N, group in sorted({(row.B, row.N, row.Hq // row.Hkv) for row in rows}):
        here = [row for row in rows if (row.B, row.N, row.Hq // row.Hkv) == (B, N, group)]
        case = Case(group=group, block=B, num_selected=N, slack=1.0)
        cells = [pair(target_ms(case, "forward"), target_ms(case, "backward"), True)]
        for who, impl in columns:
            mine = {r.direction: r for r in here if r.who == who and impl in ("", r.impl)}
            forward, backward = (mine[d].ms if d in mine else None for d in ("forward", "backward"))
            cells.append(pair(forward, backward, all(r.ok for r in mine.values())))
        lines.append(f"| ({B}, {N}) | {group} | {' | '.join(cells)} |")
    return "\n".join(lines)


def head_dims(path: str | Path) -> str:
    """Other head dims than 128, in markdown, from a results file: ms of our schedules as CUDA graphs."""
    rows = [r for r in read_rows(path) if r.who == OURS and (r.D, r.Dv) != (128, 128)]
    times = {(r.D, r.Dv, r.Hq, r.Hkv, r.T, r.B, r.N, r.impl, r.direction): r for r in rows}
    impls = ("auto", "kvmajor", "qmajor")
    heads = " | ".join(f"`{impl}`" for impl in impls)
    lines = [f"| D / Dv | heads | T | (B, N) | {heads} |", "|--:|--:|--:|---|" + "--:|" * len(impls)]
    for D, Dv, Hq, Hkv, T, B, N in sorted({key[:7] for key in times}):
        cells = []
        for impl in impls:
            key = (D, Dv, Hq, Hkv, T, B, N, f"{impl}{GRAPH}")
            forward, backward = (times.get((*key, direction)) for direction in ("forward", "backward"))
            ok = all(row is None or row.ok for row in (forward, backward))
            cells.append(pair(forward and forward.ms, backward and backward.ms, ok))
        lines.append(f"| {D} / {Dv} | {Hq}/{Hkv} | {T} | ({B}, {N}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def pair(forward: float | None, backward: float | None, ok: bool) -> str:
    """Two times as text, marked where the result is wrong."""
    if forward is None and backward is None:
        return ""
    text = " / ".join("" if x is None else f"{x:.2f}" for x in (forward, backward)).removesuffix(" / ")
    return text + ("" if ok else " (wrong)")
