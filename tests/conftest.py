"""Test-wide rules: kernels run in Triton's interpreter where there is no GPU, memory is poisoned, seeds are fixed."""

import os
import sys
from collections.abc import Iterator

import torch

# Before anything imports triton: it reads the variable once. Code that needs the compiler runs in a subprocess
# without it (see compile_only.py).
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores; more threads only wait for each other
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else each has a process for every core

GARBAGE = 0x5A5A5A5A  # what uninitialised integers hold under test; as a block, a row or a count it is out of range


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _release() -> Iterator[None]:
    """A dozen workers share one GPU: none keeps the memory of a test that has ended."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the package allocates without filling it holds NaN or garbage, so that reading it shows.

    Other callers (torch itself, the interpreter, other libraries) keep the real functions.
    """
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate):
    def poisoned(*args, **kwargs):
        x = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] != "nsattn" or torch.compiler.is_compiling() or x.is_meta:
            return x
        if isinstance(x, torch._subclasses.FakeTensor) or x.numel() == 0:
            return x
        with torch.no_grad():
            if x.is_floating_point():
                return x.fill_(float("nan"))
            if x.dtype == torch.bool:
                return x.fill_(True)
            return x.fill_(min(GARBAGE, torch.iinfo(x.dtype).max))

    return poisoned
