"""Settings of a training run, and the ready-made ones: `RunConfig`, `PRESETS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

from nsattn.config import NSAConfig
from nsattn.train.model import ModelConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes. Stored in its checkpoint; a resumed run must have the same.

    Args:
        preset: name of the preset that the settings started from.
        model: sizes of the model.
        data: file or folder; empty for the standard library's source files.
        steps, batch_size, seq_len: optimiser steps, sequences per step, bytes per sequence.
        lr, warmup, final_lr: peak learning rate, steps of linear warm-up, share of the peak that the cosine ends at.
        weight_decay, clip_norm: AdamW weight decay of the matrices, largest norm of the gradient.
        seed: of the initial weights and of the choice of training windows.
        evals: how often the held-out text is measured, evenly over the run; the last time after the last step.
        eval_windows: windows of seq_len held-out bytes that are measured.
        checkpoint_every: steps between checkpoints.
        sample_bytes: length of the generated text.
    """

    preset: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: str = ""
    steps: int = 100
    batch_size: int = 8
    seq_len: int = 256
    lr: float = 1e-3
    warmup: int = 20
    final_lr: float = 0.1
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0
    evals: int = 5
    eval_windows: int = 64
    checkpoint_every: int = 100
    sample_bytes: int = 256

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch_size", 1), ("seq_len", 2), ("evals", 1), ("eval_windows", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}. Raise it.")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be between 0 and 2**64 - 1, got {self.seed}. Use 0 for example.")
        if not 0 < self.lr < 1:
            raise ValueError(f"lr must be between 0 and 1, got {self.lr}. A usual value is 1e-3.")

    def to_dict(self) -> dict[str, Any]:
        """As nested plain values, for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> RunConfig:
        """Inverse of `to_dict`. Raises TypeError for unknown fields."""
        model = dict(values["model"])
        return RunConfig(**{**values, "model": ModelConfig(**{**model, "nsa": NSAConfig(**model["nsa"])})})

    def with_attention(self, attention: str) -> RunConfig:
        """The same run with `nsa` or `full` attention."""
        return replace(self, model=replace(self.model, attention=attention))


PRESETS: Mapping[str, RunConfig] = MappingProxyType(
    {
        # Two CPU cores, reference path, under three minutes with everything.
        "tiny": RunConfig(
            preset="tiny",
            model=ModelConfig(
                dim=128, layers=2, num_heads=4, num_kv_heads=2, head_dim=32, hidden=352,
                nsa=NSAConfig(
                    cmp_block=8, cmp_stride=4, slc_block=16, num_selected=5, window=32, init_blocks=1, local_blocks=2
                ),
            ),
            steps=400, batch_size=4, seq_len=256, lr=4e-3, warmup=20, evals=5, eval_windows=64,
            checkpoint_every=100, sample_bytes=300,
        ),
        # One H200, kernels, about 30M parameters, the paper's block sizes.
        "small": RunConfig(
            preset="small",
            model=ModelConfig(dim=512, layers=8, num_heads=8, num_kv_heads=2, head_dim=64, hidden=1408),
            steps=800, batch_size=8, seq_len=8192, lr=1e-3, warmup=80, evals=8, eval_windows=48,
            checkpoint_every=200, sample_bytes=400,
        ),
    }
)
