"""flash-linear-attention, query-major: pip install fla-core==0.6.0 (tunes itself at its first call).

Timed is the selected branch alone; its public `parallel_nsa` also pools keys and values, which this branch never reads.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from nsattn.bench.cases import Case
from nsattn.bench.peers import Call, Missing, Problem

WHO = "fla"
CAPTURES = True


def load(folder: Path) -> str:
    try:
        import_module("fla.ops.nsa.parallel")
        return version("fla-core")
    except ImportError as error:  # of which PackageNotFoundError is one
        raise Missing(f"{error}: pip install fla-core==0.6.0") from error


def refuses(case: Case) -> str:
    if case.group < 16 or case.group & (case.group - 1):
        return "takes groups that are powers of two from 16 on"
    if case.sequences > 1:
        return "waits for the device to look up packed lengths; timed with one sequence"
    return ""


def prepare(problem: Problem) -> Call:
    attend = import_module("fla.ops.nsa.parallel").ParallelNSAFunction.apply
    case, index = problem.case, problem.selection[None]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = (x[None] for x in (q, k, v))
        return attend(*batch, index, case.num_selected, case.block, q.shape[-1] ** -0.5, None)[0]

    return call
