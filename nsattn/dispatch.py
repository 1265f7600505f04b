"""Which implementation serves an operation: `TABLE` is data, and everything that talks about support reads it.

`resolve` chooses, `why` explains, the README table, the error texts and the parameters of the tests print from the
same cells. An implementation that is asked for by name is used or refused, never replaced.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])

HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
SLC_BLOCKS = (16, 32, 64, 128)
MAX_GROUP = 64
MAX_SELECTED = 64
MAX_BLOCKS = 16384  # selection blocks of one sequence that block selection holds in registers
GENERATION_TRITON = (3, 6)  # what kernels for one generation of GPUs are written for; older Gluon lacks parts of it


@dataclass(frozen=True)
class Shape:
    """What the choice depends on. `None`: the operation does not have this size."""

    device: str
    dtype: torch.dtype
    head_dim: int | None = None
    v_head_dim: int | None = None
    group: int | None = None
    max_blocks: int | None = None
    slc_block: int | None = None
    capability: tuple[int, int] | None = None  # of an NVIDIA GPU, see `capability`
    rows: int | None = None  # query tokens x KV heads
    num_selected: int | None = None
    backward: bool = True  # a backward follows
    overlap: int | None = None  # l / d
    keys_per_block: int | None = None  # B / d


@dataclass(frozen=True)
class Cost:
    """Predicted time of one direction of attend_selected, from constants that were measured on an H200.

        ms = fixed + tokens * Hkv * N * (D + Dv) / 256 * 1e-6 * (pair + G row + B / 64 (block + G block_row))

    fixed: host and launches, in ms. The others are nanoseconds at D = Dv = 128: for each (token, slot) pair, for each
    of its G rows (a partial result written and read), for each 64 keys of a pair (K and V read) and of a row
    (arithmetic). Where D or Dv is above 128, `wide` times as many. docs/log.md, 2026-11-23 and 28, and
    benchmarks/results/h200 hold the times they were fitted to.
    """

    fixed: float
    pair: float
    row: float
    block: float
    block_row: float
    wide: float = 1.0

    def milliseconds(self, shape: Shape) -> float:
        """For sizes that are not known: 65536 tokens, 4 KV heads, N=16, B=64, D=128, a group of 1."""
        G, B, N = shape.group or 1, shape.slc_block or 64, shape.num_selected or 16
        D = shape.head_dim or 128
        Dv = shape.v_head_dim or D
        pairs = (4 * 65536 if shape.rows is None else shape.rows) * N
        each = self.pair + G * self.row + B / 64 * (self.block + G * self.block_row)
        return self.fixed + pairs * (D + Dv) / 256 * 1e-6 * each * (self.wide if max(D, Dv) > 128 else 1)


@dataclass(frozen=True)
class Cell:
    """One implementation of one operation: its module, what it needs and when it is the automatic choice."""

    module: str
    summary: str
    is_kernel: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    head_dims: tuple[int, ...] = HEAD_DIMS
    max_blocks: int | None = None
    slc_blocks: tuple[int, ...] = SLC_BLOCKS
    max_overlap: int | None = None  # l / d
    max_keys_per_block: int | None = None  # B / d
    generation: int | None = None  # major compute capability of the only GPUs it runs on; None: any GPU
    costs: tuple[Cost, Cost] | None = None  # forward, backward; where an operation has several kernels


_REFERENCE = Cell("reference", "plain torch, the definition: any size, slow", is_kernel=False)

TABLE: dict[str, dict[str, Cell]] = {
    "compress": {
        "triton": Cell("compress_triton", "strided products, no unfolded copy"),
        "reference": _REFERENCE,
    },
    "attend_compressed": {
        "triton_sm90": Cell(
            "attend_compressed_triton_sm90",
            "`triton` with kernels for Hopper GPUs",
            head_dims=(128,),
            generation=9,
        ),
        "triton": Cell("attend_compressed_triton", "online softmax over the visible compressed keys"),
        "reference": _REFERENCE,
    },
    "select_blocks": {
        "triton_sm90": Cell(
            "select_blocks_triton_sm90",
            "`triton` with a score kernel for Hopper GPUs",
            head_dims=(128,),
            max_blocks=MAX_BLOCKS,
            max_overlap=2,  # a key counts for at most one block more than its own
            max_keys_per_block=32,  # a quarter of a tile: a thread owns whole blocks
            generation=9,
        ),
        "triton": Cell("select_blocks_triton", "scores recomputed in tiles, exact top-k", max_blocks=MAX_BLOCKS),
        "reference": _REFERENCE,
    },
    "attend_selected": {
        "kvmajor_sm90": Cell(
            "attend_selected_kvmajor_sm90",
            "`kvmajor` with kernels for Hopper GPUs, blocks of 64 or 128 keys",
            head_dims=(64, 128, 192, 256),
            slc_blocks=(64, 128),
            generation=9,
            costs=(Cost(0.1, 0.06, 0.129, 0, 0.05, wide=0.85), Cost(0.15, 0.1, 0.05, 0, 0.2125, wide=1.25)),
        ),
        "kvmajor": Cell(
            "attend_selected_kvmajor",
            "outer loop over KV blocks, inner loop over the tokens that chose them (Flash Sparse Attention)",
            costs=(Cost(0.1, 0.06, 0.119, 0, 0.098, wide=1.65), Cost(0.15, 0.14, 0.07, 0, 0.31, wide=2.5)),
        ),
        "qmajor": Cell(
            "attend_selected_qmajor",
            "one program per token and KV head (the order of the NSA paper)",
            costs=(Cost(0.03, 0, 0, 3.99, 0.011, wide=1.4), Cost(0.1, 0, 0, 4.05, 0.246, wide=1.8)),
        ),
        "reference": _REFERENCE,
    },
    "attend_window": {
        "triton_sm90": Cell(
            "attend_window_triton_sm90",
            "`triton` with kernels for Hopper GPUs",
            head_dims=(128,),
            generation=9,
        ),
        "triton": Cell("attend_window_triton", "online softmax over the last w keys"),
        "reference": _REFERENCE,
    },
    "combine": {
        "triton": Cell("combine_triton", "one elementwise pass"),
        "reference": _REFERENCE,
    },
    "nsa_decode": {
        "triton": Cell("nsa_decode_triton", "four launches over a cache, plain or paged", max_blocks=MAX_BLOCKS),
        "reference": _REFERENCE,
    },
}


SCHEDULES = tuple(name for name, cell in TABLE["attend_selected"].items() if cell.is_kernel)
BRANCH_IMPLS = ("auto", "reference", "triton", *SCHEDULES)


def constant(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, but that imports the compiler, which takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def capability(device: str, index: int | None) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU, such as (9, 0) for an H200; None for everything else."""
    if device != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(index)


@constant
def triton_version() -> tuple[int, ...] | None:
    """Of the Triton that is installed, such as (3, 6); None if there is none."""
    try:
        import triton
    except ImportError:
        return None
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def interpreting() -> bool:
    """Triton runs its kernels on the CPU (`TRITON_INTERPRET=1`, for tests: slow)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unmet(cell: Cell, shape: Shape) -> tuple[list[str], list[str]]:
    """Needs of a cell that a shape fails: (what this machine or dtype lacks, what is out of range), as sentences."""
    if not cell.is_kernel:
        return [], []
    on_cpu = shape.device == "cpu" and interpreting()
    machine, limits = [], []
    if shape.device != "cuda" and not on_cpu:
        machine.append(f"needs a GPU, got tensors on {shape.device!r} (or TRITON_INTERPRET=1, for tests)")
    if not on_cpu and shape.dtype not in cell.dtypes:
        machine.append(f"needs {' or '.join(str(d) for d in cell.dtypes)}, got {shape.dtype}")
    if cell.generation is not None and (on_cpu or shape.capability is None or shape.capability[0] != cell.generation):
        got = ".".join(map(str, shape.capability)) if shape.capability else "none"
        machine.append(f"needs a GPU of compute capability {cell.generation}.x, got {got}")
    installed = None if cell.generation is None else triton_version()
    if installed is not None and installed < GENERATION_TRITON:
        needed, got = (".".join(map(str, version)) for version in (GENERATION_TRITON, installed))
        machine.append(f"needs Triton {needed} or later, got {got}")
    dims = (16, *cell.head_dims) if on_cpu else cell.head_dims  # 16 keeps interpreted tests small
    for name, value in (("head dim D", shape.head_dim), ("value head dim Dv", shape.v_head_dim)):
        if value is not None and value not in dims:
            limits.append(f"{name} must be one of {', '.join(map(str, dims))}, got {value}")
    if shape.group is not None and shape.group > MAX_GROUP:
        limits.append(f"query heads per KV head must be at most {MAX_GROUP}, got {shape.group}")
    if shape.slc_block is not None and shape.slc_block not in cell.slc_blocks:
        limits.append(f"selection block B must be one of {', '.join(map(str, cell.slc_blocks))}, got {shape.slc_block}")
    for name, most, value in (("l / d", cell.max_overlap, shape.overlap),
                              ("B / d", cell.max_keys_per_block, shape.keys_per_block)):  # fmt: skip
        if most is not None and value is not None and value > most:
            limits.append(f"{name} must be at most {most}, got {value}")
    if cell.max_blocks is not None and shape.max_blocks is not None and shape.max_blocks > cell.max_blocks:
        limits.append(
            f"selection blocks per sequence must be at most {cell.max_blocks}, got {shape.max_blocks} "
            "(pass max_seqlen where sequences are shorter than the batch)"
        )
    return machine, limits


def resolve(operation: str, impl: str, shape: Shape) -> str:
    """Name of the implementation that serves `operation` for `shape`.

    `auto` takes the kernel whose needs hold and whose predicted time is least, see `Cost`. Tensors on a CPU get the
    reference; so do float32 and float64 on a GPU, with a warning. `triton` means the kernels for any GPU. The names of
    a schedule of attend_selected leave the other operations their best kernel.

    Raises:
        ValueError: an unknown name, or a size outside the range of the kernels.
        NotImplementedError: a kernel was asked for by name that this machine or dtype cannot run.
    """
    cells = TABLE[operation]
    if impl not in BRANCH_IMPLS and impl not in cells:
        raise ValueError(f"impl must be one of {', '.join(BRANCH_IMPLS)}, got {impl!r}. Use impl='auto'.")
    if impl in cells:
        _refuse(operation, impl, *unmet(cells[impl], shape))
        _refuse_forward_mode(operation, impl)
        return impl
    portable = impl == "triton"
    kernels = [n for n, cell in cells.items() if cell.is_kernel and not (portable and cell.generation)]
    able = [n for n in kernels if not any(unmet(cells[n], shape))]
    # Where nothing fits, the error names the needs of a kernel for any GPU.
    able = able or [n for n in kernels if cells[n].generation is None][:1]
    times = [sum(predict(cells[n], shape)) for n in able]
    name = able[times.index(min(times))]  # torch.compile traces this, and knows no min with a key
    machine, limits = unmet(cells[name], shape)
    if impl == "auto" and (machine or shape.device == "cpu"):
        if shape.device == "cuda" and not torch.compiler.is_compiling():
            warnings.warn(
                f"{operation} in {shape.dtype} on a GPU runs the plain torch reference, whose memory grows with the "
                "square of the length. Use bfloat16 or float16 (or autocast), or impl='reference' to mean it.",
                stacklevel=2,
            )
        return "reference"
    _refuse(operation, name, machine, limits)
    _refuse_forward_mode(operation, name)
    return name


def why(operation: str, impl: str, shape: Shape) -> list[tuple[str, str]]:
    """(implementation, verdict) of every cell of an operation for a shape, the chosen one marked."""
    try:
        chosen = resolve(operation, impl, shape)
    except (ValueError, NotImplementedError):
        chosen = ""
    rows = []
    for name, cell in TABLE[operation].items():
        machine, limits = unmet(cell, shape)
        verdict = "chosen" if name == chosen else "; ".join(machine + limits) or "would work"
        if cell.costs and not machine + limits:
            forward, *backward = predict(cell, shape)
            verdict += f"; predicted {forward:.2f} ms forward" + "".join(f", {ms:.2f} backward" for ms in backward)
            verdict += ", on an H200"
        rows.append((name, verdict))
    return rows


def load(operation: str, impl: str) -> ModuleType:
    """Import the module of a cell; kernels are imported on first use only."""
    return importlib.import_module(f"nsattn.kernels.{TABLE[operation][impl].module}")


def support_table() -> str:
    """The README's support table, in markdown."""
    lines = ["| operation | `impl` | how | head dims D, Dv | query heads per KV head | dtypes |"]
    lines.append("|---|---|---|---|---|---|")
    for operation, cells in TABLE.items():
        for name, cell in cells.items():
            dims, group, dtypes = "any", "any", "any float"
            if cell.is_kernel:
                dims = ", ".join(map(str, cell.head_dims))
                group = f"1 to {MAX_GROUP}"
                dtypes = ", ".join(str(d).removeprefix("torch.") for d in cell.dtypes)
            if operation == "combine":
                dims = "any"
            lines.append(f"| `{operation}` | `{name}` | {cell.summary} | {dims} | {group} | {dtypes} |")
    return "\n".join(lines)


def predict(cell: Cell, shape: Shape) -> list[float]:
    """Predicted milliseconds of the forward and, if one follows, of the backward; nothing for a cell without costs."""
    return [cost.milliseconds(shape) for cost in (cell.costs or ())[: 1 + shape.backward]]


def _refuse(operation: str, impl: str, machine: list[str], limits: list[str]) -> None:
    advice = "Use impl='reference', which takes any size and dtype on any device."
    if limits:
        raise ValueError(f"{operation} ({impl}): {'; '.join(limits)}. {advice}")
    if machine:
        raise NotImplementedError(f"{operation} ({impl}): {'; '.join(machine)}. {advice}")


def _refuse_forward_mode(operation: str, impl: str) -> None:
    """A custom op drops the tangents of forward-mode derivatives: they would be zero, and nothing would say so."""
    if not torch.compiler.is_compiling() and getattr(forward_ad, "_current_level", -1) >= 0 and impl != "reference":
        raise NotImplementedError(
            f"{operation} ({impl}): kernels have no forward-mode derivatives (jvp), got a call inside one. Use "
            "impl='reference', or the backward."
        )
