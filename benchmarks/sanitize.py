"""Run every kernel under compute-sanitizer, memcheck and racecheck, and write what it found.

    python benchmarks/sanitize.py --jobs 8 --out benchmarks/results/h200/sanitizer.md

Each case is a small batch, forward and backward, in a process of its own: first without the tool, which compiles its
kernels, then once under each. A case that takes longer than `--limit` seconds is reported as such. Exit status 1 if the
tool found an error or a case did not finish, 2 without a GPU or without the tool (it comes with the CUDA toolkit).

The last two cases are controls: kernels that do nothing but hand two numbers to a second warpgroup, where each has a
barrier of its own, and every other program ends before, as ours do that have nothing to do. In the second, the first
warpgroup copied a tile to shared memory before, and waited for it. What racecheck says of these two is said of how
Triton hands work over, not of ours.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared

sys.path.insert(0, str(Path(__file__).parents[1]))

from nsattn import NSAConfig, branches, dispatch
from nsattn.environment import environment
from nsattn.kernels._dense_sm90 import COPY, SHARED, barrier
from nsattn.testing import make_cache, make_compression, make_inputs, random_selection

TOOLS = ("memcheck", "racecheck")
LENGTHS = (200, 0, 121)
WORKSPACE = 1 << 20  # so little that batches are cut


class Case(NamedTuple):
    """One implementation of one operation at one shape; heads of 128, which all Hopper kernels take."""

    operation: str
    impl: str
    group: int = 4
    slc_block: int = 64
    head_dim: int = 128
    v_head_dim: int = 128

    def __str__(self) -> str:
        dims = f" D={self.head_dim}, {self.v_head_dim}" if (self.head_dim, self.v_head_dim) != (128, 128) else ""
        return f"{self.operation} {self.impl} G={self.group} B={self.slc_block}{dims}"


CASES = (
    *(Case("attend_selected", "kvmajor_sm90", g, b) for g, b in itertools.product((1, 4, 5, 16), (64, 128))),
    *(Case("attend_selected", "kvmajor_sm90", g, b, *dims)
      for g, b, dims in ((1, 64, (64, 64)), (4, 64, (192, 128)), (5, 64, (256, 256)), (4, 128, (256, 256)))),
    *(Case("attend_selected", impl, g) for impl, g in itertools.product(("kvmajor", "qmajor"), (1, 5))),
    *(Case(operation, impl, g) for operation in ("attend_compressed", "attend_window")
      for impl, g in itertools.product(("triton_sm90", "triton"), (4, 5))),
    *(Case("select_blocks", impl, g) for impl, g in (("triton_sm90", 4), ("triton_sm90", 7), ("triton", 4))),
    *(Case(operation, "triton") for operation in ("compress", "combine", "nsa_decode")),
)  # fmt: skip
CONTROLS = (Case("control", "warp_specialize"), Case("control", "warp_specialize after a copy"))
ALL = (*CASES, *CONTROLS)


@gluon.jit
def _fill(OUT, first, value):
    """128 numbers from `first` on, by one warpgroup."""
    o = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    barrier()
    gl.store(OUT + first + o, o * 0 + value)


@gluon.jit
def _control_kernel(TILE, OUT, value, AFTER_COPY: gl.constexpr):
    if gl.program_id(0) % 2 == 1:
        return
    if AFTER_COPY:
        rows, columns = gl.arange(0, 64, gl.SliceLayout(1, COPY)), gl.arange(0, 128, gl.SliceLayout(0, COPY))
        tile = gl.allocate_shared_memory(TILE.dtype.element_ty, [64, 128], SHARED)
        async_copy.async_copy_global_to_shared(tile, TILE + (rows[:, None] * 128 + columns[None, :]))
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()
    gl.warp_specialize([(_fill, (OUT, 0, value)), (_fill, (OUT, 128, value))], [4], [64])


def run(case: Case) -> None:
    """The case itself, forward and backward."""
    if case in CONTROLS:
        out = torch.zeros(256, dtype=torch.int32, device="cuda")
        tile = torch.ones(64, 128, dtype=torch.bfloat16, device="cuda")
        _control_kernel[(2048,)](tile, out, 7, AFTER_COPY=case == CONTROLS[1], num_warps=4)
        if not bool((out == 7).all()):
            raise RuntimeError(f"the control kernel left {out.tolist()}")
        return
    N = 3
    config = NSAConfig(slc_block=case.slc_block, num_selected=N, window=70)
    sizes = {"num_kv_heads": 2, "group": case.group, "head_dim": case.head_dim, "v_head_dim": case.v_head_dim,
             "dtype": torch.bfloat16, "device": "cuda"}  # fmt: skip
    x = make_inputs(LENGTHS, config=config, slack=5, **sizes)
    options = {"scale": x.scale, "workspace": WORKSPACE, "impl": case.impl}

    def backward(y: torch.Tensor, *leaves: torch.Tensor) -> None:
        torch.autograd.grad(y.float().square().sum(), leaves)

    q, k, v, k_cmp, v_cmp, gates = (t.requires_grad_() for t in (x.q, x.k, x.v, x.k_cmp, x.v_cmp, x.gates))
    if case.operation == "compress":
        for method in ("mean", "gated", "linear"):
            params = make_compression(method, 2, 128, 128, config, hidden=128, dtype=torch.bfloat16)
            params = tuple(p.cuda().requires_grad_() for p in params)
            y = branches.compress(k, params, x.plan, method=method, impl=case.impl)
            backward(y, k, *params)
    elif case.operation == "combine":
        backward(branches.combine(q, q * 2, q * 3, gates, impl=case.impl), q, gates)
    elif case.operation == "nsa_decode":
        for paged in (False, True):
            cache = make_cache([700, 3], 1, paged=paged, room=1000, config=config, **sizes)
            branches.nsa_decode(*cache, **options)
    elif case.operation == "select_blocks":
        _, lse = branches.attend_compressed(q, k_cmp, v_cmp, x.plan, **{**options, "impl": "triton"})
        branches.select_blocks(q, k_cmp, lse.detach(), x.plan, **options)
    elif case.operation == "attend_selected":
        selection = random_selection(x.plan, 2)
        backward(branches.attend_selected(q, k, v, selection, x.plan, **options)[0], q, k, v)
    else:
        keys, values = (k_cmp, v_cmp) if case.operation == "attend_compressed" else (k, v)
        backward(getattr(branches, case.operation)(q, keys, values, x.plan, **options)[0], q, keys, values)
    torch.cuda.synchronize()


def errors(tool: str, output: str) -> int | None:
    """Errors or hazards that the tool counted, or None where it came to no summary."""
    found = re.search(r"ERROR SUMMARY: (\d+) error" if tool == "memcheck" else
                      r"RACECHECK SUMMARY: (\d+) hazards? displayed", output)  # fmt: skip
    return int(found.group(1)) if found else None


def under(tool: str | None, index: int, limit: float) -> tuple[str, float, bool]:
    """(what went wrong or was counted, seconds, whether all is well) of a case in a process of its own."""
    command = [sys.executable, __file__, "--case", str(index)]
    values = dict(os.environ)
    if tool:
        command = ["compute-sanitizer", "--tool", tool, "--print-limit", "20", *command]
        if tool == "memcheck":
            values["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # so that every tensor has bounds of its own
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=values)
    except subprocess.TimeoutExpired:
        return f"not finished in {limit:.0f} s", time.perf_counter() - start, False
    seconds = time.perf_counter() - start
    if tool is None:
        return "ran" if done.returncode == 0 else done.stderr.strip()[-300:], seconds, done.returncode == 0
    count = errors(tool, done.stdout + done.stderr)
    if count is None or (done.returncode and not count):
        return f"failed: {(done.stdout + done.stderr).strip()[-300:]}", seconds, False
    return str(count), seconds, count == 0


def report(rows: list[tuple[Case, dict[str, tuple[str, float, bool]]]], version: str) -> str:
    """The summary in markdown."""
    lines = ["# compute-sanitizer", "", "```text"]
    lines += [f"{name:10} {value}" for name, value in environment().items()]
    lines += [f"tool       {version}",
              f"batch      lengths {', '.join(map(str, LENGTHS))}, 2 KV heads of 128 or D, bfloat16, "
              f"workspace {WORKSPACE >> 20} MiB, forward and backward", "```", "",
              "Errors (memcheck) and hazards (racecheck) that the tool counted, and seconds.", ""]  # fmt: skip
    lines += ["| case | " + " | ".join(TOOLS) + " |", "|---|" + "--:|" * len(TOOLS)]
    for case, outcomes in rows:
        cells = [" ".join(outcomes[t][0].split()).replace("|", "/") + f" ({outcomes[t][1]:.0f} s)"
                 if t in outcomes else "" for t in TOOLS]  # fmt: skip
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=int, default=4, help="cases at a time")
    parser.add_argument("--limit", type=float, default=120, help="seconds for a case under a tool")
    parser.add_argument("--out", type=Path, help="markdown file to write")
    asked = parser.parse_args(argv)
    if asked.case is not None:
        run(ALL[asked.case])
        return 0
    if not torch.cuda.is_available() or shutil.which("compute-sanitizer") is None:
        sys.stderr.write("needs an NVIDIA GPU and compute-sanitizer, which comes with the CUDA toolkit, on the PATH\n")
        return 2
    version = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True).stdout.strip()
    here = dispatch.capability("cuda", None)

    def able(case: Case) -> bool:
        if case in CONTROLS:
            return here is not None and here[0] == 9
        shape = dispatch.Shape("cuda", torch.bfloat16, capability=here)
        return not any(dispatch.unmet(dispatch.TABLE[case.operation][case.impl], shape))

    def examine(index: int) -> dict[str, tuple[str, float, bool]]:
        first = under(None, index, asked.limit)
        if not first[2]:
            return {"memcheck": first}
        outcomes = {}
        for tool in TOOLS:
            outcomes[tool] = under(tool, index, asked.limit)
            sys.stderr.write(f"{ALL[index]} {tool}: {outcomes[tool][0].splitlines()[-1]}\n")
        return outcomes

    indices = [i for i, case in enumerate(ALL) if able(case)]
    with ThreadPoolExecutor(asked.jobs) as pool:
        rows = [(ALL[i], found) for i, found in zip(indices, pool.map(examine, indices), strict=True)]
    text = report(rows, version.splitlines()[-1] if version else "unknown")
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0 if all(set(found) == set(TOOLS) and all(o[2] for o in found.values()) for _, found in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
