"""Activation checkpointing that keeps what is small or slow to compute: `checkpoint_contexts`."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from nsattn import branches  # noqa: F401  registers the ops

SELECTION = ("select_blocks",)
ATTENTION = (*SELECTION, "compress", "attend_compressed", "attend_selected", "attend_window", "attend_gated")


def checkpoint_contexts(save: str = "selection") -> Any:
    """Contexts for `torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=checkpoint_contexts)`.

    Everything inside the checkpoint is computed again in the backward, but for

    - `selection`: the selected blocks, 4 * Hkv * N bytes a token. They have no gradient, and finding them again takes
      as long as finding them.
    - `attention`: also the outputs and log-sum-exps of the branches, their sum, and the compressed rows, about
      8 * Hq * Dv bytes a token in 16 bit. The attention is then not computed again at all.

    Gradients are the same bits. For transformers:
    `model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": nsattn.checkpoint_contexts})`.

    Args:
        save: `selection` or `attention`; bind it with `functools.partial`.

    Raises:
        ValueError: another word.

    The reference is plain torch, and nothing of it is kept; only kernels are single operations.
    """
    if save not in ("selection", "attention"):
        raise ValueError(f"save must be 'selection' or 'attention', got {save!r}.")
    names = SELECTION if save == "selection" else ATTENTION
    return create_selective_checkpoint_contexts([getattr(torch.ops.nsattn, name).default for name in names])
