"""benchmarks/sanitize.py, as far as a CPU goes: its cases run, its reading of the tool, its report and refusals."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from nsattn import dispatch

PATH = Path(__file__).parents[1] / "benchmarks" / "sanitize.py"
spec = importlib.util.spec_from_file_location("sanitize", PATH)
assert spec and spec.loader
sanitize = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sanitize)


def test_every_kernel_is_examined():
    kernels = {(op, impl) for op, cells in dispatch.TABLE.items() for impl, cell in cells.items() if cell.is_kernel}
    assert {case[:2] for case in sanitize.CASES} == kernels


def test_what_the_tool_says():
    assert sanitize.errors("memcheck", "========= ERROR SUMMARY: 0 errors\n") == 0
    assert sanitize.errors("memcheck", "========= ERROR SUMMARY: 12 errors\n") == 12
    assert sanitize.errors("racecheck", "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n") == 2
    assert sanitize.errors("racecheck", "Segmentation fault") is None


@pytest.mark.parametrize(("tool", "line", "good"), [
    ("memcheck", "ERROR SUMMARY: 0 errors", True), ("memcheck", "ERROR SUMMARY: 3 errors", False),
    ("racecheck", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", True),
    ("racecheck", "it crashed", False), ("racecheck", "sleep", False),
])  # fmt: skip
def test_outcomes(tool, line, good, tmp_path, monkeypatch):
    """A stand-in for the tool on the PATH: its count, no summary, and a case that takes too long."""
    fake = tmp_path / "compute-sanitizer"
    fake.write_text("#!/bin/sh\nexec sleep 5\n" if line == "sleep" else f"#!/bin/sh\necho '========= {line}'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    said, seconds, well = sanitize.under(tool, 0, limit=0.5)
    assert well == good and seconds < 5
    text = sanitize.report([(sanitize.CASES[0], {tool: (said, seconds, well)})], "1.0")
    assert str(sanitize.CASES[0]) in text and " ".join(said.split()) in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_says_what_it_needs(capsys):
    assert sanitize.main([]) == 2
    assert "compute-sanitizer" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("index", range(len(sanitize.CASES)))
def test_cases_run(index):
    case = sanitize.CASES[index]
    shape = dispatch.Shape("cuda", torch.bfloat16, capability=dispatch.capability("cuda", None))
    if not any(dispatch.unmet(dispatch.TABLE[case.operation][case.impl], shape)):
        sanitize.run(case)
