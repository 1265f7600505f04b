"""Vanilla NSA in Triton, query-major, groups padded to 16: folder `nsa_ref` of the official FSA repository."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from nsattn.bench.peers import Call, Problem, import_from
from nsattn.bench.peers.fsa import FOLDER, URL, refuses, varlen_call

__all__ = ["CAPTURES", "WHO", "load", "prepare", "refuses", "selected"]

WHO = "nsa_ref"
CAPTURES = False
MODULE = "nsa_ref.ops.topk_sparse_attention"


def load(folder: Path) -> str:
    import_from(folder / FOLDER, MODULE, URL)
    return "as published"


def prepare(problem: Problem) -> Call:
    return varlen_call(selected(), problem)


def selected() -> Any:
    """Its function, with the arguments of `varlen_call`."""
    return import_module(MODULE).TopkSparseAttention.apply
