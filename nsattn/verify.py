"""`nsattn verify`: every kernel this machine can run, against the reference. The tests run the same checks.

A *case* is a batch: lengths, heads, block sizes. A *check* runs one operation of one implementation on a case, forward
and backward, and judges every output by the error rule of `nsattn.testing`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context

import torch
from torch import Tensor

from nsattn import branches, dispatch
from nsattn.api import gated_impls
from nsattn.config import NSAConfig
from nsattn.kernels import reference
from nsattn.testing import (
    CacheInputs,
    Comparison,
    Inputs,
    SelectionComparison,
    compare,
    compare_selections,
    hostile_selection,
    make_cache,
    make_compression,
    make_inputs,
    random_selection,
)

WORKSPACE = 1 << 30
WORKER_BYTES = 7 << 30  # GPU memory of a worker of `run`: the largest cell in float64


@dataclass(frozen=True)
class Case:
    """One batch to check an operation on."""

    name: str
    lengths: tuple[int, ...] = (700, 0, 1, 322)
    lengths_k: tuple[int, ...] | None = None
    num_kv_heads: int = 2
    group: int = 4
    head_dim: int = 128
    v_head_dim: int | None = None
    config: NSAConfig = field(default_factory=NSAConfig)
    slack: int = 3
    hostile: bool = False
    workspace: int = WORKSPACE
    own_window: bool = False  # keys and values of the window are not those of the selected branch
    axis: str = "lengths"  # what the case is about: operations that do not depend on it skip the case


AXES = {  # lengths: packing and skew; G, D: heads; B: selection blocks; cmp: compression blocks; w: the window
    "compress": {"lengths", "D", "cmp"},
    "attend_compressed": {"lengths", "G", "D", "cmp"},
    "select_blocks": {"lengths", "G", "D", "B", "cmp", "workspace"},
    "attend_selected": {"lengths", "G", "D", "B", "hostile", "workspace"},
    "attend_window": {"lengths", "G", "D", "w"},
    "combine": {"G", "D"},
    "nsa_attention": {"hostile", "workspace", "own"},  # the rest is that of its branches
    "nsa_decode": {"lengths", "G", "D", "B", "cmp", "w", "workspace"},
}
OPERATIONS = {
    **dispatch.TABLE,
    # Each schedule with the best other kernels, and what runs on any GPU.
    "nsa_attention": dispatch.TABLE["attend_selected"] | {"triton": dispatch.TABLE["attend_window"]["triton"]},
}


def gpu_cases() -> list[Case]:
    """A covering set: one size at a time around heads of 128 in groups of 4."""
    base = Case("base")
    few = NSAConfig(num_selected=4)
    cases = [base, Case("hostile", hostile=True, axis="hostile"), Case("own window", own_window=True, axis="own"),
             Case("chunked prefill", (100, 30), (640, 30)),
             Case("decode", (1, 1, 1), (1000, 63, 1)), Case("more queries than keys", (200, 64), (90, 64)),
             Case("no keys, then some", (64, 64, 200), (0, 64, 200)),
             Case("small workspace", lengths=(4000,), workspace=1 << 20, num_kv_heads=1, axis="workspace"),
             Case("groups cut", lengths=(4000,), workspace=48 << 20, num_kv_heads=1, group=5, axis="workspace"),
             Case("long lists", lengths=(6000,), config=few, num_kv_heads=1, group=2, axis="workspace")]
    cases += [replace(base, name=f"G={g}", group=g, axis="G") for g in (1, 2, 3, 5, 6, 7, 8, 16, 32, 64)]
    cases += [replace(base, name=f"D={d}", head_dim=d, axis="D") for d in (32, 64, 80, 96, 192, 256)]
    latent = replace(base, head_dim=192, v_head_dim=128)  # what latent attention (MLA) expands to
    cases += [replace(latent, name="D=192 Dv=128", axis="D"),
              replace(base, name="D=64 Dv=256", head_dim=64, v_head_dim=256, axis="D"),
              replace(base, name="D=256 Dv=64 G=1", head_dim=256, v_head_dim=64, group=1, axis="D"),
              replace(latent, name="hostile D=192 Dv=128", hostile=True, axis="hostile"),
              Case("hostile D=256", head_dim=256, hostile=True, axis="hostile"),
              Case("hostile D=64", head_dim=64, hostile=True, axis="hostile"),
              Case("groups cut D=256", lengths=(4000,), workspace=48 << 20, num_kv_heads=1, group=5, head_dim=256,
                   axis="workspace"),
              replace(latent, name="long lists D=192 Dv=128", lengths=(6000,), config=few, num_kv_heads=1, group=2,
                      axis="workspace")]
    cases += [replace(base, name=f"B={b}", config=NSAConfig(slc_block=b), axis="B") for b in (16, 32, 128)]
    forced = NSAConfig(num_selected=5, init_blocks=0, local_blocks=0)
    cases += [replace(base, name="B=128 D=256", head_dim=256, config=NSAConfig(slc_block=128), axis="B"),
              replace(latent, name="B=128 D=192 Dv=128", config=NSAConfig(slc_block=128), axis="B"),
              replace(base, name="B=128 D=64", head_dim=64, config=NSAConfig(slc_block=128), axis="B"),
              replace(base, name="N=64", config=NSAConfig(slc_block=16, num_selected=64), axis="B"),
              replace(base, name="N=1", config=NSAConfig(num_selected=1, init_blocks=0, local_blocks=1), axis="B"),
              replace(base, name="nothing forced", config=forced, axis="B"),
              replace(base, name="l=16 d=16", config=NSAConfig(cmp_block=16), axis="cmp"),
              replace(base, name="l=32 d=4", config=NSAConfig(cmp_stride=4), axis="cmp"),
              replace(base, name="w=1", config=NSAConfig(window=1), axis="w"),
              replace(base, name="w=5000", config=NSAConfig(window=5000), axis="w")]
    return cases


def interpreter_cases() -> list[Case]:
    """The edge cases at sizes that Triton's interpreter finishes in seconds."""
    tiny = NSAConfig(cmp_block=8, cmp_stride=4, slc_block=16, num_selected=4, window=20)
    base = Case("base", (7, 0, 1, 65), num_kv_heads=1, group=3, head_dim=16, config=tiny, slack=2)
    return [
        base,
        replace(base, name="nothing", lengths=(0, 0), slack=0),
        replace(base, name="own window", own_window=True, axis="own"),
        replace(base, name="shorter than a compressed block", lengths=(5, 3)),
        replace(base, name="one token each", lengths=(1,) * 20),
        replace(base, name="block - 1, block, block + 1", lengths=(15, 16, 17)),
        replace(base, name="stride and window edges", lengths=(3, 4, 5, 19, 20, 21)),
        replace(base, name="hostile", hostile=True, num_kv_heads=2, group=1, axis="hostile"),
        replace(base, name="chunked prefill", lengths=(5, 20), lengths_k=(40, 20)),
        replace(base, name="decode", lengths=(1, 1, 1), lengths_k=(50, 9, 1)),
        replace(base, name="more queries than keys", lengths=(30, 8), lengths_k=(11, 0)),
        replace(base, name="no keys, then some", lengths=(8, 20), lengths_k=(0, 20)),
        replace(base, name="small workspace", lengths=(130,), workspace=1 << 14, axis="workspace"),
        replace(base, name="groups cut", lengths=(130,), workspace=1 << 17, group=5, axis="workspace"),
        replace(base, name="G=5, two KV heads", lengths=(40, 33), num_kv_heads=2, group=5, axis="G"),
        replace(base, name="D=80 Dv=16", lengths=(33,), head_dim=80, v_head_dim=16, axis="D"),
        replace(base, name="l=16 d=4, nothing forced", lengths=(70,), axis="cmp",
                config=NSAConfig(16, 4, 16, 2, 500, 0, 0)),
        replace(base, name="B=128", lengths=(150,), axis="B",
                config=replace(tiny, slc_block=128, num_selected=1, local_blocks=0)),
        replace(base, name="B=32 l=16 d=16", lengths=(100,), config=NSAConfig(16, 16, 32, 3, 1, 0, 1), axis="cmp"),
        replace(base, name="w=500", lengths=(70,), config=replace(tiny, window=500), axis="w"),
        replace(base, name="N=1", config=replace(tiny, num_selected=1, init_blocks=0, local_blocks=1), axis="B"),
    ]


Result = tuple[str, Comparison | SelectionComparison]


def check(operation: str, impl: str, case: Case, dtype: torch.dtype, device: str) -> list[Result]:
    """Forward and gradients of one operation on one case: (output name, verdict) of each."""
    if operation == "nsa_decode":
        return _check_decode(impl, case, dtype, device)
    x = make_inputs(
        case.lengths, lengths_k=case.lengths_k, num_kv_heads=case.num_kv_heads, group=case.group,
        head_dim=case.head_dim, v_head_dim=case.v_head_dim, config=case.config, dtype=dtype, device=device,
        slack=case.slack, own_kv=case.own_window,
    )
    if operation == "compress":
        return [r for method in ("mean", "linear", "mlp", "gated") for r in _check_compress(x, method, impl, case)]
    if operation == "select_blocks":
        return _check_selection(x, impl, case)
    return _judge(x, _runner(operation, x, case), impl, dtype)


Run = Callable[[Inputs, str, Tensor | None], dict[str, Tensor]]


def _runner(operation: str, x: Inputs, case: Case) -> Run:
    """A function that runs an operation through autograd and returns its outputs and gradients by name.

    Its third argument is `error` of `_with_gradients`.
    """
    dtype = x.q.dtype
    selection = (hostile_selection if case.hostile else random_selection)(x.plan, case.num_kv_heads)
    options: dict[str, float] = {"scale": x.scale}

    def run(x: Inputs, impl: str, error: Tensor | None = None) -> dict[str, Tensor]:
        if operation == "combine":
            o_dim = x.v.shape[-1]
            leaves = {name: t.clone().requires_grad_() for name, t in
                      (("o_cmp", x.q[..., :o_dim]), ("o_slc", x.q[..., -o_dim:]), ("o_win", x.q[..., :o_dim] * 0.5))}
            leaves["gates"] = x.gates.clone().requires_grad_()
            o_cmp, o_slc, o_win, gates = leaves.values()
            outputs = {"o": branches.combine(o_cmp, o_slc, o_win, gates, impl=impl)}
        elif operation == "nsa_attention":
            names = ["q", "k", "v", "gates", "k_cmp", "v_cmp", *(["k_win", "v_win"] if case.own_window else [])]
            leaves = {name: getattr(x, name).clone().requires_grad_() for name in names}
            outputs = {"o": _attend_all(x._replace(**leaves), selection, case, impl)}
        else:
            keys = (x.k_cmp, x.v_cmp) if operation == "attend_compressed" else (x.k, x.v)
            leaves = {n: t.clone().requires_grad_() for n, t in zip("qkv", (x.q, *keys), strict=True)}
            options["workspace"] = case.workspace
            extra = (selection,) if operation == "attend_selected" else ()
            o, lse = getattr(branches, operation)(*leaves.values(), *extra, x.plan, impl=impl, **options)
            outputs = {"o": o, "lse": lse}
        return _with_gradients(outputs, leaves, dtype, error)

    return run


def _attend_all(x: Inputs, block_idx: Tensor, case: Case, impl: str) -> Tensor:
    """Eq 5 for a given selection: by the plain operations of the reference, or by `branches.attend_gated`."""
    options = {"scale": x.scale, "workspace": case.workspace}
    window = (x.k_win, x.v_win) if case.own_window else (None, None)
    if impl == "reference":
        o_cmp, _ = branches.attend_compressed(x.q, x.k_cmp, x.v_cmp, x.plan, impl=impl, **options)
        o_slc, _ = branches.attend_selected(x.q, x.k, x.v, block_idx, x.plan, impl=impl, **options)
        k, v = (x.k_win, x.v_win) if case.own_window else (x.k, x.v)
        o_win, _ = branches.attend_window(x.q, k, v, x.plan, impl=impl, **options)
        return branches.combine(o_cmp, o_slc, o_win, x.gates, impl=impl)
    impls = gated_impls(x.q, x.k, x.v, x.k_cmp, x.v_cmp, *window, x.plan, impl)
    assert impls is not None, "kernels were asked for by name"
    with torch.no_grad():
        o_cmp, lse_cmp = branches.attend_compressed(x.q, x.k_cmp, x.v_cmp, x.plan, impl=impls[0], **options)
    return branches.attend_gated(
        x.q, x.k, x.v, x.k_cmp, x.v_cmp, *window, o_cmp, lse_cmp, x.gates, block_idx, x.plan, impls=impls, **options
    )


def _check_compress(x: Inputs, method: str, impl: str, case: Case) -> list[Result]:
    heads, dim, dtype = *x.k.shape[1:], x.k.dtype
    params = make_compression(method, heads, dim, dim, case.config, dtype=x.k.dtype, device=str(x.k.device))

    def run(x: Inputs, impl: str, error: Tensor | None = None) -> dict[str, Tensor]:
        leaves = {"x": x.k.clone().requires_grad_()}
        leaves |= {f"param{i}": p.to(x.k.dtype).clone().requires_grad_() for i, p in enumerate(params)}
        y = branches.compress(leaves["x"], tuple(leaves.values())[1:], x.plan, method=method, impl=impl)
        return _with_gradients({"y": y}, leaves, dtype)

    return [(f"{method} {name}", verdict) for name, verdict in _judge(x, run, impl, x.k.dtype)]


def _check_selection(x: Inputs, impl: str, case: Case) -> list[Result]:
    golden = x.to(torch.float64)
    lse = reference.attend_compressed(golden.q, golden.k_cmp, golden.v_cmp, x.plan, scale=x.scale)[1]
    want = reference.select_blocks(golden.q, golden.k_cmp, lse, x.plan, scale=x.scale)
    score = reference.block_scores(golden.q, golden.k_cmp, lse, x.plan, scale=x.scale)
    score = reference.unpad(score.transpose(1, 2), x.plan)
    lse = lse if x.q.dtype == torch.float64 else lse.float()
    got = branches.select_blocks(
        x.q, x.k_cmp, lse, x.plan, scale=x.scale, workspace=case.workspace, impl=impl
    )
    return [("block_idx", compare_selections(got, want, score))]


def _check_decode(impl: str, case: Case, dtype: torch.dtype, device: str) -> list[Result]:
    """One new token over a plain cache, and three over pages. Outputs are judged for the blocks that were chosen."""
    results = []
    for num_new, paged in ((1, False), (3, True)):
        lengths = case.lengths_k or case.lengths
        x = make_cache(
            lengths, num_new, room=max(lengths) + 70, paged=paged, num_kv_heads=case.num_kv_heads, group=case.group,
            head_dim=case.head_dim, v_head_dim=case.v_head_dim, config=case.config, dtype=dtype, device=device,
        )
        scale = case.head_dim**-0.5
        *got, block_idx = branches.nsa_decode(*x, scale=scale, workspace=case.workspace, impl=impl)
        got, block_idx = [y.flatten(0, 1) for y in got], block_idx.flatten(0, 1)
        golden, want, score = _decode_branches(x.to(torch.float64), block_idx, scale)
        low, _, _ = _decode_branches(x, block_idx, scale)
        kind = "paged " if paged else ""
        results.append((f"{kind}block_idx", compare_selections(block_idx, want, score)))
        for name, *tensors in zip(("o", "lse_cmp", "lse_slc", "lse_win"), got, golden, low, strict=True):
            results.append((f"{kind}{name}", compare(*tensors, dtype=dtype)))
    return results


def _decode_branches(x: CacheInputs, block_idx: Tensor, scale: float) -> tuple[list[Tensor], Tensor, Tensor]:
    """Reference results for chosen blocks: (o and the three lse), the blocks it would choose, their importance."""
    plan, q, k, v, k_cmp, v_cmp, gates, k_win, v_win = reference.pack_cache(*x)
    o_cmp, lse_cmp = reference.attend_compressed(q, k_cmp, v_cmp, plan, scale=scale)
    o_slc, lse_slc = reference.attend_selected(q, k, v, block_idx, plan, scale=scale)
    o_win, lse_win = reference.attend_window(q, k_win, v_win, plan, scale=scale)
    want = reference.select_blocks(q, k_cmp, lse_cmp, plan, scale=scale)
    score = reference.block_scores(q, k_cmp, lse_cmp, plan, scale=scale)
    o = reference.combine(o_cmp, o_slc, o_win, gates)
    return [o, lse_cmp, lse_slc, lse_win], want, reference.unpad(score.transpose(1, 2), plan)


def _with_gradients(
    outputs: dict[str, Tensor], leaves: dict[str, Tensor], dtype: torch.dtype, error: Tensor | None = None
) -> dict[str, Tensor]:
    """Outputs and the gradients of a random linear function of them; -inf (an empty row's lse) carries none.

    The function's weights are values of the low precision `dtype` in every run, so that all runs get the same ones.

    Args:
        error: what an output o of attention is off by, for a run whose gradients shall show what that does to them. A
            backward that reads o, as the kernels' does, has delta = rowsum(o * do) off by rowsum(error * do), which
            autograd has not. An error of delta is minus one of the gradient of lse, so that is where it goes.
    """
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(y.shape, generator=generator).to(dtype).to(y) for name, y in outputs.items()}
    if error is not None and "lse" in outputs:
        weights["lse"] = weights["lse"] - (error * weights["o"].double()).sum(-1).to(weights["lse"])
    loss = torch.zeros((), dtype=torch.float64, device=outputs[next(iter(outputs))].device)
    for name, y in outputs.items():
        loss = loss + (torch.where(y.isfinite(), y, 0) * weights[name]).double().sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    results = {name: y.detach() for name, y in outputs.items()}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        results[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


def _judge(x: Inputs, run: Run, impl: str, dtype: torch.dtype) -> list[Result]:
    """Verdicts on all results of `impl`. The gradients' low run has the error of the output, which is judged itself."""
    golden, got = run(x.to(torch.float64), "reference", None), run(x, impl, None)
    error = got["o"].double() - golden["o"] if "o" in golden and got["o"].shape == golden["o"].shape else None
    low = run(x, "reference", error)
    return [(name, compare(got[name], golden[name], low[name], dtype=dtype)) for name in golden]


@dataclass(frozen=True)
class Cell:
    """One line of the report."""

    operation: str
    impl: str
    case: Case
    dtype: torch.dtype
    device: str


def cells(device: str, *, quick: bool = False, every_dtype: bool = False) -> Iterator[Cell]:
    """Every kernel of the dispatch table on every case it may meet.

    Args:
        quick: the first case only.
        every_dtype: all cases in both dtypes. By default the second, which takes the same path with other casts, is
            checked on a few.
    """
    cases = gpu_cases() if device == "cuda" else interpreter_cases()
    dtypes = (torch.bfloat16, torch.float16) if device == "cuda" else (torch.float32, torch.float16)
    for operation, impls in OPERATIONS.items():
        for impl, cell in impls.items():
            if not cell.is_kernel:
                continue
            for i, case in enumerate(cases[:1] if quick else cases):
                if i and case.axis not in AXES[operation]:
                    continue
                if cell.generation is not None and any(dispatch.unmet(cell, _shape(case, dtypes[0], device))):
                    continue  # a kernel for some GPUs and sizes only: beside it, another serves the case
                both = every_dtype or i == 0 or case.name in ("hostile", "D=256", "G=5")
                for dtype in dtypes if both else dtypes[:1]:
                    yield Cell(operation, impl, case, dtype, device)


def _shape(case: Case, dtype: torch.dtype, device: str) -> dispatch.Shape:
    return dispatch.Shape(
        device, dtype, case.head_dim, case.v_head_dim or case.head_dim, case.group,
        slc_block=case.config.slc_block, overlap=case.config.overlap, keys_per_block=case.config.keys_per_block,
        capability=dispatch.capability(device, None),
    )  # fmt: skip


def run(*, quick: bool, echo: Callable[[str], None]) -> bool:
    """Check all cells in worker processes (most of the time is compilation) and report; True if none failed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not dispatch.interpreting():
        echo("Nothing verified: no GPU here. TRITON_INTERPRET=1 nsattn verify runs the kernels on the CPU, slowly.")
        return False
    todo = list(cells(device, quick=quick))
    workers = min(16, os.cpu_count() or 1, len(todo))
    if device == "cuda":
        workers = min(workers, max(1, torch.cuda.mem_get_info()[0] // WORKER_BYTES))
    failed, start = 0, time.time()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for cell, (results, error) in zip(todo, pool.map(_verify, todo), strict=True):
            wrong = [f"{name} {verdict}" for name, verdict in results if not verdict.ok]
            if error:
                wrong.append(error)
            failed += bool(wrong)
            dtype = str(cell.dtype).removeprefix("torch.")
            line = f"{'FAIL' if wrong else 'PASS'}  {cell.operation:18} {cell.impl:8} {dtype:9} {cell.case.name}"
            echo("\n      ".join([line, *wrong]))
    echo(f"{len(todo) - failed} passed, {failed} failed, in {time.time() - start:.0f} s")
    return failed == 0


def _verify(cell: Cell) -> tuple[list[Result], str]:
    try:
        return check(cell.operation, cell.impl, cell.case, cell.dtype, cell.device), ""
    except Exception as error:  # noqa: BLE001, a kernel that crashes is a failed cell, not the end of the report
        return [], f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        if cell.device == "cuda":
            torch.cuda.empty_cache()  # other workers use the same GPU
