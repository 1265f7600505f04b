"""The official Flash Sparse Attention, KV-major: github.com/Relaxed-System-Lab/Flash-Sparse-Attention.

As published, `reduce_kernel` does not compile with Triton 3.3 and later: it takes a one-element tuple for a pointer,
`lse_ptrs = (lse_ptr + ..., )`. Remove that comma in the checkout; this file finds out and says so.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from nsattn.bench.cases import Case
from nsattn.bench.peers import Call, Missing, Problem, import_from

WHO = "fsa"
CAPTURES = False
URL = "https://github.com/Relaxed-System-Lab/Flash-Sparse-Attention"
FOLDER = "Flash-Sparse-Attention"
MODULE = "fsa.ops.FSA_topk_sparse_attention"
STRAY_COMMA = "lse_ptrs = (lse_ptr + pid_q_j * stride_lse_n,)"


def load(folder: Path) -> str:
    source = folder / FOLDER / "fsa" / "ops" / "FSA_topk_sparse_attention.py"
    if source.is_file() and STRAY_COMMA in source.read_text(encoding="utf-8"):
        raise Missing(f"does not compile as published: in {source}, remove the last comma of `{STRAY_COMMA}`")
    import_from(folder / FOLDER, MODULE, URL)
    return "one comma removed"


def refuses(case: Case) -> str:
    if case.head_dim != case.v_head_dim:
        return "takes one head dim for keys and values"
    return ""


def prepare(problem: Problem) -> Call:
    return varlen_call(selected(), problem)


def selected() -> Any:
    """Its function, with the arguments of `varlen_call`."""
    return import_module(MODULE).FSATopkSparseAttention.apply


def varlen_call(attend: Any, problem: Problem) -> Call:
    """A call of FSA or of its `nsa_ref`, which share their arguments; the selection is [Hkv, T, N], -1 on the right."""
    index, cu, longest = problem.selection.transpose(0, 1).contiguous(), problem.plan.cu_q, problem.plan.max_q
    return lambda q, k, v: attend(q, k, v, index, problem.case.block, cu, cu, longest, longest, q.shape[-1] ** -0.5)
