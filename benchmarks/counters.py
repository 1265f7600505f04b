"""What bounds each kernel: hardware counters of Nsight Compute for one forward and backward of `nsa_attention`.

    python benchmarks/counters.py --out benchmarks/results/h200/counters.md     # a GPU and ncu, minutes

Every shape runs in a process of its own under `ncu`, which repeats each kernel, on a cold L2, to read one group of
counters after the other. Clocks are left alone. Exit status 1 if a shape failed, 2 without a GPU or without ncu.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import nsattn
from nsattn.environment import environment

NOTE = (
    "Shares are of the chip's peak over the kernel's whole time, on a cold L2; `warps` are those of a scheduler. A "
    "kernel is bound by what is near 100, and by latency if nothing is."
)
MARK = "spin_kernel"  # torch's, launched between forward and backward
TIME, READ, WRITTEN = "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"
SHARES = {  # column: counters, of which the largest counts; names are patterns, since they differ between chips
    "tensor cores": r"sm__pipe_tensor\w*_cycles_active",
    "exponentials": r"sm__inst_executed_pipe_xu",
    "instructions": r"sm__inst_issued",
    "L1, shared": r"l1tex__throughput",
    "L2": r"lts__throughput",
    "memory": r"dram__throughput",
}
SHARE = ".avg.pct_of_peak_sustained_elapsed"
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active")
RATIO = ".ratio"
WARPS = "smsp__warps_active.avg.per_cycle_active"


class Shape(NamedTuple):
    """Tokens of one sequence, query heads, KV heads, head dim."""

    T: int
    Hq: int
    Hkv: int
    D: int = 128

    def __str__(self) -> str:
        return f"T={self.T}, {self.Hq}/{self.Hkv} heads of {self.D}"


SHAPES = (Shape(65536, 32, 8), Shape(8192, 32, 8), Shape(65536, 4, 4), Shape(65536, 64, 4), Shape(32768, 16, 4, 256))


def run(shape: Shape) -> None:
    """A forward and a backward for the profiler, after one that compiles the kernels."""
    T, Hq, Hkv, D = shape
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, T, h, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (Hq, Hkv, Hkv)
    )
    gates = torch.rand(1, T, Hq, 3, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for profiled in (False, True):
        if profiled:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        o = nsattn.nsa_attention(q, k, v, gates=gates)
        torch.cuda._sleep(1)
        torch.autograd.grad(o, (q, k, v, gates), o)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def available() -> set[str]:
    """Names of the counters that ncu knows for this chip, without suffix."""
    done = subprocess.run(["ncu", "--query-metrics"], capture_output=True, text=True, check=True)
    return set(re.findall(r"^(\w+__\w+)\s", done.stdout, flags=re.M))


def wanted(names: Iterable[str]) -> list[str]:
    """Counters to read, of those that there are."""
    shares = [name + SHARE for name in sorted(names) if any(re.fullmatch(p, name) for p in SHARES.values())]
    stalls = [name + RATIO for name in sorted(names) if STALL.fullmatch(name) and "_selected_" not in name]
    return [TIME, READ, WRITTEN, WARPS, *shares, *stalls]


def profile(index: int, counters: list[str], limit: float) -> str:
    """What ncu printed about a shape, as CSV in base units."""
    command = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "raw"]
    command += ["--print-units", "base", "--metrics", ",".join(counters)]
    command += [sys.executable, __file__, "--shape", str(index)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise RuntimeError(f"ncu failed: {(done.stdout + done.stderr).strip()[-400:]}")
    return done.stdout


def kernels(text: str) -> list[dict[str, str]]:
    """The launches in ncu's output: columns of the CSV, with `direction`."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise RuntimeError(f"ncu profiled no kernel: {text.strip()[-400:]}")
    rows = list(csv.DictReader(lines[start:]))[1:]  # the first has the units
    marks = [i for i, row in enumerate(rows) if MARK in row["Kernel Name"]]
    if len(marks) != 1:
        raise RuntimeError(f"expected one {MARK} between forward and backward, got {len(marks)}")
    for i, row in enumerate(rows):
        row["direction"] = "forward" if i < marks[0] else "backward"
    return [row for i, row in enumerate(rows) if i != marks[0]]


def number(row: dict[str, str], name: str) -> float:
    try:
        return float(row[name].replace(",", ""))
    except (KeyError, ValueError):  # a counter that this chip lacks
        return float("nan")


def table(rows: list[dict[str, str]], least: float) -> list[str]:
    """Markdown lines: kernels that take at least this share of their direction's time, longest first."""
    head = ["kernel", "ms", *SHARES, "GB read", "GB written", "warps", "waits, cycles per instruction"]
    lines = []
    for direction in ("forward", "backward"):
        mine = [row for row in rows if row["direction"] == direction]
        total = sum(number(row, TIME) for row in mine)
        shown = sorted((row for row in mine if number(row, TIME) >= least * total), key=lambda r: -number(r, TIME))
        what = f"{direction.capitalize()}, {len(mine)} kernels, {total / 1e6:.2f} ms; those of {least:.0%} and more:"
        lines += ["", what, ""]
        lines += ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 2) + "---|"]
        for row in shown:
            cells = [short(row["Kernel Name"]), f"{number(row, TIME) / 1e6:.3f}"]
            for pattern in SHARES.values():
                values = [number(row, name) for name in row if re.fullmatch(pattern + re.escape(SHARE), name)]
                cells.append(f"{max(values):.0f}" if values else "")
            cells += [f"{number(row, name) / 1e9:.2f}" for name in (READ, WRITTEN)]
            cells += [f"{number(row, WARPS):.1f}", stalls(row)]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def short(name: str) -> str:
    """A kernel's name without its template arguments."""
    return "`" + re.sub(r"[<(].*", "", name.removeprefix("void ")).split("::")[-1] + "`"


def stalls(row: dict[str, str], most: int = 3) -> str:
    """What a warp waits for most between two instructions."""
    found = []
    for name in row:
        match = STALL.fullmatch(name.removesuffix(RATIO))
        if match and number(row, name) >= 0.3:
            found.append((number(row, name), match[1].replace("_", " ")))
    return ", ".join(f"{what} {cycles:.1f}" for cycles, what in sorted(found, reverse=True)[:most])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--least", type=float, default=0.02, help="share of the time from which a kernel is shown")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a shape")
    parser.add_argument("--out", type=Path, help="markdown file to write")
    asked = parser.parse_args(argv)
    if asked.shape is not None:
        run(SHAPES[asked.shape])
        return 0
    if not torch.cuda.is_available() or shutil.which("ncu") is None:
        sys.stderr.write("needs an NVIDIA GPU and ncu, which comes with the CUDA toolkit, on the PATH\n")
        return 2
    counters, failed = wanted(available()), 0
    versions = [f"{name:10} {value}" for name, value in environment().items()]
    lines = ["# What bounds the kernels", "", "```text", *versions, "```", "", NOTE,
             "Made by `python benchmarks/counters.py`."]  # fmt: skip
    for i, shape in enumerate(SHAPES):
        lines += ["", f"## {shape}"]
        try:
            lines += table(kernels(profile(i, counters, asked.limit)), asked.least)
        except subprocess.TimeoutExpired:
            failed += 1
            lines += ["", f"Not measured: not finished in {asked.limit:.0f} s."]
        except RuntimeError as error:
            failed += 1
            lines += ["", f"Not measured: {error}"]
        if asked.out:
            asked.out.parent.mkdir(parents=True, exist_ok=True)
            asked.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
