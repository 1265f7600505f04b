"""`NSALlamaConfig`, `NSAQwen2Config`, `NSAQwen3Config`: the dense configs with typed `nsa_*` fields."""

# No `from __future__ import annotations`: @strict checks types that it reads from the annotations.

import math
from dataclasses import asdict, dataclass
from typing import Any

from huggingface_hub.dataclasses import strict  # pyright: ignore[reportMissingImports]
from transformers.models.llama import LlamaConfig  # pyright: ignore[reportMissingImports]
from transformers.models.qwen2 import Qwen2Config  # pyright: ignore[reportMissingImports]
from transformers.models.qwen3 import Qwen3Config  # pyright: ignore[reportMissingImports]

from nsattn import checks
from nsattn.config import NSAConfig


@dataclass(init=False, repr=False, eq=False)
class NSAFields:
    """What an NSA config adds to the dense one; `nsa_cmp_block` to `nsa_local_blocks` are those of `NSAConfig`.

    Args:
        nsa_compression: phi, `mean`, `linear`, `mlp` or `gated`.
        nsa_gate_bias: the gates start at sigmoid(-bias, bias, -bias) for cmp, slc, win.
        nsa_layers: layers with NSA; the others keep dense attention. Default: all.
        nsa_impl: which implementation, see `nsattn.nsa_attention`.

    Raises:
        TypeError, ValueError: values that do not fit.
        NotImplementedError: a dense config with attention dropout or with other layers than full attention.
    """

    nsa_cmp_block: int = 32
    nsa_cmp_stride: int = 16
    nsa_slc_block: int = 64
    nsa_num_selected: int = 16
    nsa_window: int = 512
    nsa_init_blocks: int = 1
    nsa_local_blocks: int = 2
    nsa_compression: str = "linear"
    nsa_gate_bias: float | int = 4.0
    nsa_layers: list[int] | None = None
    nsa_impl: str = "auto"
    use_cache: bool = False

    # The stock plan would shard heads and leave gates and compression whole.
    base_model_tp_plan = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        self.check_nsa()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if config_dict.get("model_type") != cls.model_type:  # pyright: ignore[reportAttributeAccessIssue]
            config_dict = {k: v for k, v in config_dict.items() if k not in ("model_type", "use_cache")}
        return super().from_dict(config_dict, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def block_sizes(self) -> NSAConfig:
        return NSAConfig(**{name: getattr(self, f"nsa_{name}") for name in asdict(NSAConfig())})

    @property
    def sparse_layers(self: Any) -> list[int]:
        return list(range(self.num_hidden_layers)) if self.nsa_layers is None else self.nsa_layers

    def check_nsa(self: Any) -> None:
        checks.check_config(self.block_sizes)
        if self.nsa_compression not in checks.METHODS:
            raise ValueError(
                f"nsa_compression must be one of {', '.join(checks.METHODS)}, got {self.nsa_compression!r}."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads, got {self.num_attention_heads} and "
                f"{self.num_key_value_heads}. Change one of them."
            )
        if not math.isfinite(self.nsa_gate_bias):
            raise ValueError(f"nsa_gate_bias must be finite, got {self.nsa_gate_bias}. 0 opens all gates by half.")
        layers = self.sparse_layers
        if not layers or len(set(layers)) != len(layers) or not set(layers) <= set(range(self.num_hidden_layers)):
            raise ValueError(
                f"nsa_layers must be one or more different layers from 0 to {self.num_hidden_layers - 1}, got "
                f"{layers}. None means all."
            )
        if self.attention_dropout:
            raise NotImplementedError(
                f"attention_dropout must be 0, got {self.attention_dropout}: NSA has no dropout on attention weights. "
                "Set attention_dropout=0.0 in the dense config."
            )
        others = set(getattr(self, "layer_types", None) or ()) - {"full_attention"}
        if others:
            raise NotImplementedError(
                f"layer_types must be full_attention only, got {', '.join(sorted(others))}. A model with such layers "
                "computes something else than NSA's dense start; use one with use_sliding_window=False."
            )


@strict
class NSALlamaConfig(NSAFields, LlamaConfig):
    model_type = "nsa_llama"


@strict
class NSAQwen2Config(NSAFields, Qwen2Config):
    model_type = "nsa_qwen2"


@strict
class NSAQwen3Config(NSAFields, Qwen3Config):
    model_type = "nsa_qwen3"
