"""Compile before timing: contenders compile anew for every group, and one after the other that takes most of a run.

For every kind of shape one process checks its shortest case and is gone again, many at a time. What they compiled is in
Triton's cache then.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from nsattn.bench.base import ROOT, gpus, run_bench
from nsattn.bench.cases import Case
from nsattn.bench.timing import Echo

WORKER_BYTES = 10 << 30  # GPU memory of a process: official FSA at 64K tokens and groups of 16

Named = tuple[str, Case]  # a set of `cases.py` and a case of it


def kinds(cases: Sequence[Named]) -> list[Named]:
    """The shortest case of each kind of shape, one with peers if there is any. Kernels differ in what a kind is."""
    found: dict[Case, Named] = {}
    for name, case in sorted(cases, key=lambda named: (not named[1].peers, named[1].tokens)):
        kind = replace(case, length=1, sequences=1, selection="", slack=None, peers=True)
        found.setdefault(kind, (name, case))
    return list(found.values())


def fill(cases: Sequence[Named], options: Callable[[Named], Sequence[str]], *, seconds: float, echo: Echo) -> None:
    """Run `nsattn bench selected --check` with the options that name a case, for one case of each kind.

    What fails fails again, and is reported, when it is timed.

    Args:
        seconds: after so many, compilers that are still at work are stopped.
    """
    chosen, start = kinds(cases), time.monotonic()
    if len(chosen) < 2 or seconds <= 0:
        return  # nothing to do side by side, or no time
    workers, devices = os.cpu_count() or 1, gpus()
    if devices:
        workers = min(workers, len(devices) * max(1, torch.cuda.mem_get_info()[0] // WORKER_BYTES))

    def check(i: int) -> None:
        left = None if math.isinf(seconds) else max(0.0, start + seconds - time.monotonic())
        gpu = devices[i % len(devices)] if devices else None
        with contextlib.suppress(subprocess.TimeoutExpired):
            run_bench(ROOT, "selected", "--check", *options(chosen[i]), timeout=left, gpu=gpu)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(check, range(len(chosen))))
    echo(f"compiled for {len(chosen)} kinds of shapes, {workers} at a time: {time.monotonic() - start:.0f} s")
