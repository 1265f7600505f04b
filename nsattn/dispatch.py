"""Which implementation serves an operation: `TABLE` is data, and everything that talks about support reads it.

`resolve` chooses, `why` explains, the README table, the error texts and the parameters of the tests print from the
same cells. An implementation that is asked for by name is used or refused, never replaced.
"""

from __future__ import annotations

import importlib
import os
import warnings
from dataclasses import dataclass, field
from types import ModuleType

import torch

HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
SLC_BLOCKS = (16, 32, 64, 128)
MAX_GROUP = 64
MAX_SELECTED = 64
MAX_BLOCKS = 16384  # selection blocks of one sequence that block selection holds in registers



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


@dataclass(frozen=True)
class Cell:
    """One implementation of one operation: its module, what it needs and when it is the automatic choice."""

    module: str
    summary: str
    is_kernel: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    head_dims: tuple[int, ...] = HEAD_DIMS
    max_group: int = MAX_GROUP
    max_blocks: int | None = None
    slc_blocks: tuple[int, ...] = SLC_BLOCKS
    generation: int | None = None  # major compute capability of the only GPUs it runs on; None: any GPU
    auto_groups: tuple[int, int] = field(default=(1, MAX_GROUP))  # groups for which `auto` takes it, inclusive


_REFERENCE = Cell("reference", "plain torch, the definition; memory quadratic in the length", is_kernel=False)

TABLE: dict[str, dict[str, Cell]] = {
    "compress": {
        "triton": Cell("compress_triton", "strided products, no unfolded copy"),
        "reference": _REFERENCE,
    },
    "attend_compressed": {
        "triton": Cell("attend_compressed_triton", "online softmax over the visible compressed keys"),
        "reference": _REFERENCE,
    },
    "select_blocks": {
        "triton": Cell("select_blocks_triton", "scores recomputed in tiles, exact top-k", max_blocks=MAX_BLOCKS),
        "reference": _REFERENCE,
    },
    "attend_selected": {
        "kvmajor_sm90": Cell(
            "attend_selected_kvmajor_sm90",
            "`kvmajor` with kernels for Hopper GPUs, blocks of 64 or 128 keys",
            head_dims=(128,),
            slc_blocks=(64, 128),
            generation=9,
            auto_groups=(1, 16),
        ),
        "kvmajor": Cell(
            "attend_selected_kvmajor",
            "outer loop over KV blocks, inner loop over the tokens that chose them (Flash Sparse Attention)",
            auto_groups=(1, 16),
        ),
        "qmajor": Cell(
            "attend_selected_qmajor",
            "one program per token and KV head (the order of the NSA paper)",
            auto_groups=(17, MAX_GROUP),
        ),
        "reference": _REFERENCE,
    },
    "attend_window": {
        "triton": Cell("attend_window_triton", "online softmax over the last w keys"),
        "reference": _REFERENCE,
    },
    "combine": {
        "triton": Cell("combine_triton", "one elementwise pass"),
        "reference": _REFERENCE,
    },
}


SCHEDULES = tuple(name for name, cell in TABLE["attend_selected"].items() if cell.is_kernel)
BRANCH_IMPLS = ("auto", "reference", "triton", *SCHEDULES)


@torch.compiler.assume_constant_result
def capability(device: str, index: int | None) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU, such as (9, 0) for an H200; None for everything else."""
    if device != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(index)


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
    dims = (16, *cell.head_dims) if on_cpu else cell.head_dims  # 16 keeps interpreted tests small
    for name, value in (("head dim D", shape.head_dim), ("value head dim Dv", shape.v_head_dim)):
        if value is not None and value not in dims:
            limits.append(f"{name} must be one of {', '.join(map(str, dims))}, got {value}")
    if shape.group is not None and shape.group > cell.max_group:
        limits.append(f"query heads per KV head must be at most {cell.max_group}, got {shape.group}")
    if shape.slc_block is not None and shape.slc_block not in cell.slc_blocks:
        limits.append(f"selection block B must be one of {', '.join(map(str, cell.slc_blocks))}, got {shape.slc_block}")
    if cell.max_blocks is not None and shape.max_blocks is not None and shape.max_blocks > cell.max_blocks:
        limits.append(
            f"selection blocks per sequence must be at most {cell.max_blocks}, got {shape.max_blocks} "
            "(pass max_seqlen where sequences are shorter than the batch)"
        )
    return machine, limits


def resolve(operation: str, impl: str, shape: Shape) -> str:
    """Name of the implementation that serves `operation` for `shape`.

    `auto` takes the first cell in table order whose needs hold and whose `auto_groups` contain the group. Tensors on a
    CPU get the reference; so do float32 and float64 on a GPU, with a warning. `triton` means any kernel of the
    operation.

    Raises:
        ValueError: an unknown name, or a size outside the range of the kernels.
        NotImplementedError: a kernel was asked for by name that this machine or dtype cannot run.
    """
    cells = TABLE[operation]
    if impl not in BRANCH_IMPLS and impl not in cells:
        raise ValueError(f"impl must be one of {', '.join(BRANCH_IMPLS)}, got {impl!r}. Use impl='auto'.")
    if impl in SCHEDULES and impl not in cells:
        impl = "triton"  # these name the order of attend_selected; the other operations have one kernel
    if impl in cells:
        _refuse(operation, impl, *unmet(cells[impl], shape))
        return impl
    kernels = [name for name, cell in cells.items() if cell.is_kernel]
    preferred = [n for n in kernels if _prefers(cells[n], shape)] or kernels
    # Where nothing fits, the error names the needs of a kernel for any GPU.
    anywhere = [n for n in preferred if cells[n].generation is None]
    name = next((n for n in preferred if not any(unmet(cells[n], shape))), anywhere[0])
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
        verdict = "; ".join(machine + limits) or (
            "would work"
            if _prefers(cell, shape) or not cell.is_kernel
            else f"would work, chosen automatically for groups {cell.auto_groups[0]} to {cell.auto_groups[1]}"
        )
        rows.append((name, "chosen" if name == chosen else verdict))
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
                group = f"1 to {cell.max_group}"
                dtypes = ", ".join(str(d).removeprefix("torch.") for d in cell.dtypes)
            if operation == "combine":
                dims = "any"
            lines.append(f"| `{operation}` | `{name}` | {cell.summary} | {dims} | {group} | {dtypes} |")
    return "\n".join(lines)


def _prefers(cell: Cell, shape: Shape) -> bool:
    return shape.group is None or cell.auto_groups[0] <= shape.group <= cell.auto_groups[1]


def _refuse(operation: str, impl: str, machine: list[str], limits: list[str]) -> None:
    advice = "Use impl='reference', which takes any size and dtype on any device."
    if limits:
        raise ValueError(f"{operation} ({impl}): {'; '.join(limits)}. {advice}")
    if machine:
        raise NotImplementedError(f"{operation} ({impl}): {'; '.join(machine)}. {advice}")
