"""SFNSA, query-major with TMA loads, groups padded to 16: github.com/mdy666/Scalable-Flash-Native-Sparse-Attention.

Its settings are one global object, set here for each problem. It reads exactly min(N, visible blocks) entries of a row.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from nsattn.bench.cases import Case
from nsattn.bench.peers import Call, Problem, import_from

WHO = "sfnsa"
CAPTURES = True
URL = "https://github.com/mdy666/Scalable-Flash-Native-Sparse-Attention"
MODULE = "flash_nsa.ops.select_attn"
FOLDER = "Scalable-Flash-Native-Sparse-Attention"


def load(folder: Path) -> str:
    try:
        import_module("pkg_resources")
    except ImportError:  # gone from setuptools 82; SFNSA compares Triton's version with it
        stand_in: Any = ModuleType("pkg_resources")
        stand_in.parse_version = import_module("packaging.version").parse
        sys.modules["pkg_resources"] = stand_in
    import_from(folder / FOLDER, MODULE, URL)
    return "as published"


def refuses(case: Case) -> str:
    return ""


def prepare(problem: Problem) -> Call:
    ops = import_module(MODULE)
    case, plan = problem.case, problem.plan
    ops.NSAHelper.set_hyperparameters(block_size=case.block, top_n=case.num_selected)
    ops.NSAHelper.init_cu_seqlens(plan.cu_q)
    nothing = plan.max_blk * plan.num_seqs  # its backward would store to block -1; it skips blocks past the end
    index = torch.where(problem.selection < 0, nothing, problem.selection).transpose(0, 1).contiguous()
    return lambda q, k, v: ops.select_attn(q, k, v, index, q.shape[-1] ** -0.5)
