"""Compile what ships, without a GPU: every launch of the real launchers, for four targets.

Run as a script it prints a table: `python -m tests.compile_only [--target sm_90] [--jobs 2] [--json FILE]`. It must run
without TRITON_INTERPRET, so the tests start it in a subprocess.

The launchers are called on small CPU tensors with `JITFunction.run` replaced: instead of running, a launch is bound to
its signature, constants and options, exactly as Triton's own launcher does it, and kept. Then the distinct ones are
compiled, and registers, spills and shared memory are read from the result.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

import nsattn.kernels
from nsattn import NSAConfig, dispatch
from nsattn.kernels import _plan, rotate_triton
from nsattn.kernels._chunks import Chunk
from nsattn.kernels._lists import Cut, Popular, invert
from nsattn.testing import Inputs, make_cache, make_compression, make_inputs, random_selection
from tests.products import disassemble, hazards, serialised

WORKSPACE = 1 << 30
KIB = 1024


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and the shared memory that `_tile.shared_memory` would plan with on it."""

    gpu: GPUTarget
    shared_memory: int

    @property
    def capability(self) -> tuple[int, int] | None:
        return divmod(int(self.gpu.arch), 10) if self.gpu.backend == "cuda" else None


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 160 * KIB),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * KIB),
}


@dataclass(frozen=True)
class Cell:
    """Sizes that choose a kernel configuration."""

    head_dim: int
    v_head_dim: int
    slc_block: int
    group: int
    dtype: torch.dtype = torch.bfloat16
    num_selected: int = 16
    everywhere: bool = False  # on every target; the other cells only on sm_90, where the tuning is done

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"D={self.head_dim},{self.v_head_dim} B={self.slc_block} G={self.group} N={self.num_selected} {dtype}"


# Every head dim class (a power of two, one that is padded, two that differ, the widest), every block size and small,
# odd and large groups, each at least once; pairs only where both move a tile.
CELLS = (
    Cell(128, 128, 64, 4, everywhere=True),
    Cell(64, 64, 64, 1, everywhere=True),
    Cell(256, 256, 128, 16, everywhere=True),
    Cell(192, 128, 64, 16),
    Cell(192, 192, 64, 2),
    Cell(256, 256, 64, 4),
    Cell(80, 80, 16, 5),
    Cell(128, 128, 128, 1),
    Cell(128, 128, 16, 64, num_selected=64),
    Cell(64, 64, 128, 5, num_selected=8),
    Cell(256, 256, 16, 4),
    Cell(32, 32, 32, 2),
    Cell(128, 128, 64, 4, dtype=torch.float16),
)


@dataclass
class Launch:
    """One distinct kernel configuration: what the compiler needs, and which cells launch it."""

    kernel: JITFunction
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    cells: list[str]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def describe(self) -> str:
        """The constants that tell configurations apart."""
        names = list(self.signature)
        sizes = {names[path[0]]: value for path, value in self.constexprs.items() if len(path) == 1}
        sizes = {name: value for name, value in sizes.items() if value is not None and not name.islower()}
        return " ".join([*(f"{name}={value}" for name, value in sizes.items()),
                         *(f"{name}={self.options[name]}" for name in ("num_warps", "num_stages"))])


@dataclass
class Result:
    """What the compiler says about a launch."""

    kernel: str
    config: str
    cells: list[str]
    error: str = ""
    registers: int = 0
    spilled: int = 0  # bytes of local memory per thread on NVIDIA, spilled vector registers on AMD
    shared: int = 0  # bytes
    hazards: tuple[str, ...] = ()  # see `tests.products`; of Gluon kernels for Hopper, the next too
    serialised: tuple[str, ...] = ()


def launches(target: Target, cells: tuple[Cell, ...]) -> list[Launch]:
    """Every distinct launch of the cells' operations."""
    found: dict[str, Launch] = {}
    backend = make_backend(target.gpu)
    label = ""

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kwargs["debug"] = False
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, rest = bind(*args, **kwargs)
        options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, rest)
        key = repr((kernel.fn.__name__, signature, constexprs, attrs, options.__dict__))
        launch = found.setdefault(key, Launch(kernel, signature, constexprs, attrs, options.__dict__, []))
        if label not in launch.cells:
            launch.cells.append(label)

    # Kernels do not run here, so what they would have written must at least be valid indices: zeros.
    replaced = [(JITFunction, "run", record), (torch, "empty", torch.zeros), (torch, "empty_like", torch.zeros_like)]
    for module in kernel_modules():
        if hasattr(module, "shared_memory"):
            replaced.append((module, "shared_memory", lambda device: target.shared_memory))
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        for cell in cells:
            label = str(cell)
            for call in _calls(cell, target.capability):
                call()
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)
    return list(found.values())


def _calls(cell: Cell, capability: tuple[int, int] | None) -> Iterator[Callable[[], Any]]:
    """Every kernel-level function of the dispatch table on inputs of a cell, forward and backward."""
    config = NSAConfig(slc_block=cell.slc_block, num_selected=cell.num_selected)
    x = make_inputs([2600, 0, 121], num_kv_heads=2, group=cell.group, head_dim=cell.head_dim,
                    v_head_dim=cell.v_head_dim, config=config, dtype=cell.dtype)
    for operation, implementations in dispatch.TABLE.items():
        for impl, entry in implementations.items():
            shape = dispatch.Shape("cuda", cell.dtype, cell.head_dim, cell.v_head_dim, cell.group,
                                   slc_block=cell.slc_block, capability=capability)
            if entry.is_kernel and not any(dispatch.unmet(entry, shape)):
                yield from _operation(operation, dispatch.load(operation, impl), cell, x)
    plan = x.plan
    chunk = Chunk(0, plan.total_q, 0, 2, 0, cell.group)
    # What only the schedule for Hopper asks for runs on any GPU.
    yield lambda: invert(random_selection(plan, 2), plan, chunk, cut=Cut(64, 64), span=1024, popular=Popular(22, 10))
    for cu_cmp in (None, plan.cu_cmp):
        yield lambda cu=cu_cmp: _plan.tables(plan.cu_q, plan.cu_k, cu, total_cmp=plan.total_cmp, config=config,
                                             **plan.sizes())
    tables = torch.zeros(2, x.plan.total_q, 1, cell.head_dim)  # float32, as the layer makes them
    for like in (tables, tables.to(cell.dtype)):
        for backward in (False, True):
            yield lambda like=like, backward=backward: rotate_triton.rotate(x.q, *like, backward=backward)


def _operation(operation: str, module: Any, cell: Cell, x: Inputs) -> Iterator[Callable[[], Any]]:
    plan, rows = x.plan, (x.plan.total_q, x.q.shape[1])
    function, backward = getattr(module, operation), getattr(module, f"{operation}_bwd", None)
    o = torch.zeros(*rows, cell.v_head_dim, dtype=cell.dtype)
    lse = torch.zeros(rows)
    block_idx = random_selection(plan, x.k.shape[1])
    scale = {"scale": x.scale}
    scratch = {**scale, "workspace": WORKSPACE}
    dlse = lse if cell.group == 1 else None  # with and without a gradient that arrives at lse
    total = {"delta": lse, "dq": torch.zeros(*rows, cell.head_dim, dtype=cell.dtype)}  # as in `attend_gated`
    tight = {**scale, "workspace": 1 << 20}  # chunks of one KV head
    if operation == "compress":
        for method in ("mean", "linear", "mlp", "gated"):
            params = make_compression(method, 2, cell.head_dim, cell.head_dim, plan.config, hidden=cell.head_dim,
                                      dtype=cell.dtype)
            y = torch.zeros(plan.total_cmp, 2, cell.head_dim, dtype=cell.dtype)
            yield lambda p=params, m=method: function(x.k, p, plan, method=m)
            yield lambda y=y, p=params, m=method: backward(y, x.k, p, plan, method=m)
    elif operation == "select_blocks":
        yield lambda: function(x.q, x.k_cmp, lse, plan, **scratch)
        if times := getattr(module, "MOST_HEADS", 0) // cell.group and 64 // cell.group:  # heads in turn
            many = x.q.repeat(1, times, 1), x.k_cmp, lse.repeat(1, times)
            yield lambda: function(*many, plan, **scratch)
        if dispatch.TABLE[operation]["triton"].module in module.__name__.split("."):
            finer = plan._replace(config=replace(plan.config, cmp_stride=8))  # another kernel; it does not run here
            yield lambda: function(x.q, x.k_cmp, lse, finer, **scratch)
    elif operation == "attend_selected":
        yield lambda: function(x.q, x.k, x.v, block_idx, plan, **scratch)
        dkv = torch.zeros_like(x.k), torch.zeros_like(x.v)
        yield lambda: backward(o, dlse, x.q, x.k, x.v, o, lse, block_idx, plan, **scratch)
        yield lambda: backward(o, None, x.q, x.k, x.v, o, lse, block_idx, plan, **scratch, **total, dkv=dkv)
        if cell.everywhere:
            yield lambda: backward(o, None, x.q, x.k, x.v, o, lse, block_idx, plan, **tight)
    elif operation == "nsa_decode":
        sizes = {"room": 1000, "num_kv_heads": 2, "group": cell.group, "head_dim": cell.head_dim}
        for num_new, paged in ((1, False), (3, True)):
            cache = make_cache([700, 3], num_new, paged=paged, v_head_dim=cell.v_head_dim, config=plan.config,
                               dtype=cell.dtype, **sizes)
            yield lambda cache=cache: function(*cache, **scratch)
    elif operation == "combine":
        yield lambda: function(o, o, o, x.gates)
        yield lambda: backward(o, o, o, o, x.gates)
        yield lambda: backward(o, o, o, o, x.gates, torch.zeros(3, *rows))
    else:
        k, v = (x.k_cmp, x.v_cmp) if operation == "attend_compressed" else (x.k_win, x.v_win)
        yield lambda: function(x.q, k, v, plan, **scratch)
        yield lambda: backward(o, dlse, x.q, k, v, o, lse, plan, **scratch)
        yield lambda: backward(o, None, x.q, k, v, o, lse, plan, **scratch, **total)
        if cell.everywhere:
            yield lambda: backward(o, None, x.q, k, v, o, lse, plan, **tight)


def kernel_modules() -> list[Any]:
    return [import_module(f"nsattn.kernels.{m.name}") for m in pkgutil.iter_modules(nsattn.kernels.__path__)]


def kernel_names(targets: set[str]) -> set[str]:
    """Every jit function of the package that is a program of its own: no other jit function calls it.

    Modules that end in the name of a target, as `_sm90`, are for that one alone.
    """
    others = tuple(f"_{name.replace('_', '')}" for name in TARGETS if name not in targets)
    functions = {f.fn.__name__: f.src for module in kernel_modules() if not module.__name__.endswith(others)
                 for f in vars(module).values() if isinstance(f, JITFunction)}
    programs = (name for name, source in functions.items() if "program_id" in source)
    called = [name for name in functions if any(f"({name}, (" in source for source in functions.values())]  # by warps
    return {name for name in programs if sum(f"{name}(" in source for source in functions.values()) == 1} - {*called}


def build(launch: Launch, target: Target) -> Result:
    """Compile one launch and read its resources."""
    result = Result(launch.name, launch.describe(), launch.cells)
    try:
        source_type = GluonASTSource if launch.kernel.is_gluon() else ASTSource
        source = source_type(launch.kernel, launch.signature, launch.constexprs, launch.attrs)
        compiled = triton.compile(source, target=target.gpu, options=launch.options)
    except Exception as e:  # noqa: BLE001  whatever the compiler raises is the result
        result.error = f"{type(e).__name__}: {str(e)[-300:]}"
        return result
    result.shared = compiled.metadata.shared
    if target.gpu.backend == "cuda":
        usage = _cuda_resources(compiled.asm["cubin"])
        result.registers, result.spilled = usage["REG"], max(usage["STACK"], usage["LOCAL"])
        if launch.kernel.is_gluon():  # plain Triton keeps operands alive by itself
            code = disassemble(compiled.asm["cubin"])
            result.hazards, result.serialised = tuple(hazards(code)), tuple(serialised(code))
    else:
        text = compiled.asm["amdgcn"]
        result.registers = _amd_count(text, "vgpr_count")
        result.spilled = _amd_count(text, "vgpr_spill_count")  # scalar registers spill to vector ones, not to memory
    return result


def _cuda_resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def _amd_count(text: str, name: str) -> int:
    return sum(int(value) for value in re.findall(rf"^\s*\.{name}:\s*(\d+)", text, re.MULTILINE))


def compile_all(target_name: str, cells: tuple[Cell, ...], jobs: int) -> list[Result]:
    """Compile the cells for a target. Kernels cannot be pickled, so workers are forked and get an index."""
    global _work
    target = TARGETS[target_name]
    _work = [(launch, target) for launch in launches(target, cells)]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        return sorted(pool.map(_build_one, range(len(_work))), key=lambda r: (r.kernel, r.config))


_work: list[tuple[Launch, Target]] = []


def _build_one(index: int) -> Result:
    return build(*_work[index])


def table(target_name: str, results: list[Result]) -> str:
    lines = [f"{target_name}: {len(results)} configurations", "",
             "| kernel | configuration | cells | registers | spilled | shared KiB | |", "|---|---|--:|--:|--:|--:|---|"]
    for r in results:
        lines.append(f"| `{r.kernel}` | {r.config} | {len(r.cells)} | {r.registers} | {r.spilled} | "
                     f"{r.shared / KIB:.0f} | {r.error} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--cells", choices=("tested", "all"), default="all",
                        help="tested: off sm_90 only the cells that the tests compile on every target")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results and the kernels nothing launched here")
    options = parser.parse_args()
    report = {}
    for name in options.target or TARGETS:
        cells = tuple(c for c in CELLS if options.cells == "all" or name == "sm_90" or c.everywhere)
        report[name] = compile_all(name, cells, options.jobs)
        sys.stdout.write(table(name, report[name]) + "\n\n")
    if options.json:
        launched = {r.kernel for results in report.values() for r in results}
        options.json.write_text(json.dumps({
            "results": {name: [asdict(r) for r in results] for name, results in report.items()},
            "never_launched": sorted(kernel_names(set(report)) - launched),
        }))


if __name__ == "__main__":
    main()
