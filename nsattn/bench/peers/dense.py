"""Dense causal attention, torch SDPA: cuDNN on a GPU (about FlashAttention-3 speed), plain matrix products on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsattn.bench.cases import Case
from nsattn.bench.peers import Call, Problem

WHO = "torch"
CAPTURES = True
OP = "dense causal"


def load(folder: Path) -> str:
    return "cudnn" if torch.cuda.is_available() else "math"


def refuses(case: Case) -> str:
    if case.sequences > 1:
        return "one sequence at a time"
    if case.selection != "random" or case.block > 64:
        return "attends to everything; timed beside random selections of 64-token blocks"
    return ""


def prepare(problem: Problem) -> Call:
    backend = SDPBackend.CUDNN_ATTENTION if problem.q.is_cuda else SDPBackend.MATH

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return o[0].transpose(0, 1)

    return call
