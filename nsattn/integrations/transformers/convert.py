"""`convert_to_nsa` and `convert_to_dense`: switch a loaded model, in place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, NamedTuple

from transformers.modeling_utils import PreTrainedModel  # pyright: ignore[reportMissingImports]
from transformers.models.llama import LlamaConfig, LlamaForCausalLM, LlamaModel  # pyright: ignore[reportMissingImports]
from transformers.models.llama.modeling_llama import LlamaAttention  # pyright: ignore[reportMissingImports]
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM, Qwen2Model  # pyright: ignore[reportMissingImports]
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention  # pyright: ignore[reportMissingImports]
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM, Qwen3Model  # pyright: ignore[reportMissingImports]
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention  # pyright: ignore[reportMissingImports]

from nsattn import checks
from nsattn.config import NSAConfig
from nsattn.integrations.transformers import config as configs
from nsattn.integrations.transformers import modeling


class Family(NamedTuple):
    """The stock classes of a model family and ours."""

    config: Any
    attention: Any
    model: Any
    lm: Any
    sparse_config: Any
    sparse_model: Any
    sparse_lm: Any


FAMILIES = (
    Family(LlamaConfig, LlamaAttention, LlamaModel, LlamaForCausalLM,
           configs.NSALlamaConfig, modeling.NSALlamaModel, modeling.NSALlamaForCausalLM),
    Family(Qwen2Config, Qwen2Attention, Qwen2Model, Qwen2ForCausalLM,
           configs.NSAQwen2Config, modeling.NSAQwen2Model, modeling.NSAQwen2ForCausalLM),
    Family(Qwen3Config, Qwen3Attention, Qwen3Model, Qwen3ForCausalLM,
           configs.NSAQwen3Config, modeling.NSAQwen3Model, modeling.NSAQwen3ForCausalLM),
)


def convert_to_nsa(
    model: Any,
    config: NSAConfig | None = None,
    layers: Iterable[int] | None = None,
    *,
    compression: str = "linear",
    gate_bias: float = 4.0,
) -> Any:
    """Turn a loaded dense model into its NSA class, in place: the weights stay the same tensors.

    Args:
        model: a `LlamaForCausalLM`, `Qwen2ForCausalLM` or `Qwen3ForCausalLM`, or the base model of one. After
            the conversion of a base model inside another model `c`, say a classifier, set `c.config = c.model.config`,
            and load what `c` saves by `type(c).from_pretrained(folder, config=AutoConfig.from_pretrained(folder))`.
            Without both, the loaded model is dense: neither class knows of the other.
        config: block sizes. Default: the paper's.
        layers: which layers get NSA, at least one. Default: all.
        compression: phi, see `nsattn.nn.Compressor`. Parameters that it adds to a layer, and to one of Llama-3-8B:
            `linear`: 2 * Hkv * D * (l * D + 1), 8.4M.
            `mlp`: 2 * Hkv * D * (l * (D + 1) + D + 2), 8.7M.
            `gated`: 2 * Hkv * (D + l), 2560.
            `mean`: none.
        gate_bias: the gates start at sigmoid(-bias, bias, -bias) for cmp, slc, win.

    Returns:
        The same object, now of the NSA class with an NSA config; saving it writes the new model type. New weights are
        on the device and in the dtype of the layer's norm. Optimizers must be made after the conversion.

    Raises:
        TypeError: a model of another class.
        ValueError, NotImplementedError: a dense config that NSA cannot take over, see `NSAFields`; a model that
            accelerate has dispatched, or whose forward was compiled: do that after the conversion.
    """
    family = find_family(model, ("model", "lm"))
    config = NSAConfig() if config is None else config
    checks.check_config(config)
    fields = {f"nsa_{name}": value for name, value in asdict(config).items()}
    if isinstance(layers, int):
        raise TypeError(f"layers must be several numbers, got {layers!r}. One layer is [{layers}].")
    layers = None if layers is None else list(layers)
    fields |= {"nsa_compression": compression, "nsa_gate_bias": gate_bias, "nsa_layers": layers}
    sparse = family.sparse_config.from_dict({**model.config.to_dict(), **fields})
    base = model if type(model) is family.model else model.model
    check_forwards(model, base)
    switch_config(model, family.config, sparse)
    if base is not model:
        switch_class(model, family.sparse_lm)
    switch_class(base, family.sparse_model)
    base.install()
    return model


def convert_to_dense(model: Any) -> Any:
    """Inverse of `convert_to_nsa`: drop gates and compression, in place; the weights they share stay.

    Args:
        model: an NSA model of this module.

    Returns:
        The same object, of the stock class with a stock config. What training put into the dropped weights is lost.

    Raises:
        TypeError: a model of another class.
    """
    family = find_family(model, ("sparse_model", "sparse_lm"))
    added = ("model_type", "use_cache")
    values = {k: v for k, v in model.config.to_dict().items() if k not in added and not k.startswith("nsa_")}
    base = model if type(model) is family.sparse_model else model.model
    check_forwards(model, base)
    for i in model.config.sparse_layers:
        base.layers[i].self_attn.remove_branches()
        base.layers[i].self_attn.__class__ = family.attention
    switch_config(model, family.sparse_config, family.config.from_dict(values))
    if base is not model:
        switch_class(model, family.lm)
    switch_class(base, family.model)
    return model


def check_forwards(model: Any, base: Any) -> None:
    """Nobody has put a forward into a module whose class changes: it would still be that of the old class."""
    modules = {"": model, "model": base, **{f"layers.{i}.self_attn": x.self_attn for i, x in enumerate(base.layers)}}
    if replaced := [name or "the model" for name, module in modules.items() if "forward" in vars(module)]:
        raise NotImplementedError(
            f"modules must have the forward of their class, got another one in {', '.join(replaced)} (hooks of "
            "accelerate's device_map, or torch.compile of a forward). Convert first, then dispatch or compile."
        )


def find_family(model: Any, roles: tuple[str, ...]) -> Family:
    known = {getattr(family, role): family for family in FAMILIES for role in roles}
    if type(model) not in known:
        names = ", ".join(cls.__name__ for cls in known)
        raise TypeError(f"model must be one of {names}, got {type(model).__name__}. Unwrap it, or load it as one.")
    return known[type(model)]


def switch_config(model: Any, old: Any, new: Any) -> None:
    """Every module that holds the model's config holds the new one."""
    new._attn_implementation = model.config._attn_implementation
    for module in model.modules():
        if isinstance(getattr(module, "config", None), old):
            module.config = new


def switch_class(model: Any, cls: Any) -> None:
    # transformers notes which outputs a class can record when its first model is made: make an empty one
    PreTrainedModel.__init__(cls.__new__(cls), model.config)
    model.__class__ = cls
