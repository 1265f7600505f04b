"""nsattn: Native Sparse Attention (arXiv 2502.11089), run the Flash Sparse Attention way (arXiv 2508.18224)."""

from nsattn.api import (
    NSAOutput,
    attend_compressed,
    attend_selected,
    attend_window,
    combine,
    compress,
    nsa_attention,
    select_blocks,
)
from nsattn.checkpoint import checkpoint_contexts
from nsattn.checks import check_selection
from nsattn.config import NSAConfig
from nsattn.decode import nsa_decode
from nsattn.memory import estimate_memory
from nsattn.nn import NSAttention
from nsattn.plan import Plan, make_plan

__version__ = "0.1.0"

__all__ = [
    "NSAConfig",
    "NSAOutput",
    "NSAttention",
    "Plan",
    "attend_compressed",
    "attend_selected",
    "attend_window",
    "check_selection",
    "checkpoint_contexts",
    "combine",
    "compress",
    "estimate_memory",
    "make_plan",
    "nsa_attention",
    "nsa_decode",
    "select_blocks",
]
