"""benchmarks/counters.py, as far as a CPU goes: which counters it asks for, how it reads ncu, and its refusals."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[1] / "benchmarks" / "counters.py"
spec = importlib.util.spec_from_file_location("counters", PATH)
assert spec is not None and spec.loader is not None
counters = importlib.util.module_from_spec(spec)
sys.modules["counters"] = counters
spec.loader.exec_module(counters)

TENSOR = ("sm__pipe_tensor_op_hmma_cycles_active", "sm__pipe_tensor_cycles_active")
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active"
WAIT, CHOSEN = STALLED.format("long_scoreboard"), STALLED.format("selected")


def printed(launches):
    """What ncu prints: its own lines, the names, the units, a line for each launch (kernel, ns, shares, waits)."""
    names = ["ID", "Kernel Name", counters.TIME, *(name + counters.SHARE for name in TENSOR), WAIT + counters.RATIO]
    units = ["", "", "ns", "%", "%", "inst"]
    lines = ["==PROF== Connected", names, units, *([i, *row] for i, row in enumerate(launches))]
    return "\n".join(x if isinstance(x, str) else ",".join(f'"{cell}"' for cell in x) for x in lines)


def test_counters_that_are_asked_for():
    names = {*TENSOR, WAIT, CHOSEN, "lts__throughput", "lts__throughput_internal", "smsp__cycles"}
    asked = counters.wanted(names)
    assert {name + counters.SHARE for name in (*TENSOR, "lts__throughput")} <= set(asked)
    assert WAIT + counters.RATIO in asked and counters.TIME in asked
    assert not any("internal" in name or "selected" in name or "smsp__cycles" in name for name in asked)


def test_table():
    launches = [
        ("_partial_kernel", "2,000,000", 10, 20, 4.5), ("void at::spin_kernel(long)", 5, 0, 0, 0),
        ("void at::native::add<float>(int)", 1_500_000, 0, 0, 1), ("tiny", 1000, 0, 0, 0),
    ]  # fmt: skip
    text = "\n".join(counters.table(counters.kernels(printed(launches)), least=0.01))
    assert "| `_partial_kernel` | 2.000 | 20 |" in text and "long scoreboard 4.5" in text
    assert "Forward, 1 kernels, 2.00 ms" in text and "Backward, 2 kernels, 1.50 ms" in text
    assert "`add` | 1.500" in text and "tiny" not in text and "spin" not in text


@pytest.mark.parametrize("text", ["==ERROR== no permission", printed([("_partial_kernel", 1, 1, 1, 1)])])
def test_output_that_says_nothing(text):
    with pytest.raises(RuntimeError):
        counters.kernels(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_says_what_it_needs(capsys):
    assert counters.main([]) == 2
    assert "ncu" in capsys.readouterr().err
