"""Attention modules and models for every family: one implementation, put over the stock classes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.generation.configuration_utils import GenerationMode  # pyright: ignore[reportMissingImports]
from transformers.initialization import copy_, zeros_  # pyright: ignore[reportMissingImports]
from transformers.masking_utils import create_causal_mask  # pyright: ignore[reportMissingImports]
from transformers.modeling_utils import PreTrainedModel  # pyright: ignore[reportMissingImports]
from transformers.models.llama import LlamaForCausalLM, LlamaModel  # pyright: ignore[reportMissingImports]
from transformers.models.llama.modeling_llama import LlamaAttention  # pyright: ignore[reportMissingImports]
from transformers.models.qwen2 import Qwen2ForCausalLM, Qwen2Model  # pyright: ignore[reportMissingImports]
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention  # pyright: ignore[reportMissingImports]
from transformers.models.qwen3 import Qwen3ForCausalLM, Qwen3Model  # pyright: ignore[reportMissingImports]
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention  # pyright: ignore[reportMissingImports]
from transformers.utils.generic import can_return_tuple  # pyright: ignore[reportMissingImports]

from nsattn import api, checks
from nsattn.cache import Step
from nsattn.integrations.transformers.cache import NSACache, NSACacheLayer
from nsattn.integrations.transformers.config import NSALlamaConfig, NSAQwen2Config, NSAQwen3Config
from nsattn.nn import Compressor, attend_cached
from nsattn.plan import Plan, make_plan, positions, rows_of, uniform_cu_seqlens
from nsattn.rotary import rotate


class Batch(NamedTuple):
    """Lengths and positions of a forward pass, made once by the model and passed to every layer."""

    plan: Plan | None  # of the attention; with a cache it is in the step
    cos_cmp: Tensor  # [compressed rows of this pass, 1, D], rotation at the first token of every compressed block
    sin_cmp: Tensor
    step: Step | None = None  # with a cache


class GateProjection(nn.Linear):
    """Gates before the sigmoid, head-major: row `head * 3 + branch`. Starts as (-bias, bias, -bias) for every input."""

    def __init__(self, dim: int, num_heads: int, start: float, **factory: Any) -> None:
        self.start = (-start, start, -start)
        super().__init__(dim, num_heads * 3, **factory)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        # transformers' functions pass over what a checkpoint has filled
        zeros_(self.weight)
        copy_(self.bias, self.bias.new_tensor(self.start).repeat(self.out_features // 3))


class SparseAttention(nn.Module):
    """Forward of an attention module: the stock projections and norms, then compression, gates and `nsa_attention`."""

    def add_branches(self: Any, like: Tensor) -> None:
        """Add what dense attention lacks, on the device and in the dtype of `like`."""
        config, factory = self.config, {"device": like.device, "dtype": like.dtype}
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.gate_proj = GateProjection(config.hidden_size, heads, config.nsa_gate_bias, **factory)
        for name in ("compress_k", "compress_v"):
            compressor = Compressor(config.nsa_compression, kv_heads, self.head_dim, config.block_sizes, **factory)
            setattr(self, name, compressor)
        self.train(self.training)

    def remove_branches(self) -> None:
        del self.gate_proj, self.compress_k, self.compress_v

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        *,
        nsa: Batch,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """`[Bsz, S, dim]` -> the same; `attention_mask` is for dense layers and not read, `nsa` holds the lengths."""
        if attention_mask is None and kwargs.get("is_causal"):  # what accelerate's hooks make of every mask
            raise NotImplementedError(
                "NSA needs whole sequences, got a call that accelerate's context parallelism has prepared. Use "
                "ParallelismConfig(cp_size=1); shard data or heads instead."
            )
        impl, step = self.config.nsa_impl, nsa.step
        rows = hidden_states.flatten(0, 1)
        q, k, v = (proj(rows).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        gates = self.gate_proj(rows).sigmoid().unflatten(-1, (-1, 3))
        cos, sin = (x.expand(len(hidden_states), -1, -1).flatten(0, 1)[:, None] for x in position_embeddings)

        new, k_new, v_new, cache = nsa.plan, k, v, None
        if step is not None:
            cache = past_key_values.layers[self.layer_idx]
            new, (k_new, v_new) = step.new, cache.extend(step, k, v)
        assert new is not None, "without a cache there is a plan"
        # Not the stock `apply_rotary_pos_emb`, which libraries replace by kernels that write into their input:
        # compression needs the keys before rotation.
        k_cmp = rotate(self.compress_k(k_new, new, impl=impl), nsa.cos_cmp, nsa.sin_cmp, impl=impl)
        v_cmp = self.compress_v(v_new, new, impl=impl)
        q, k = rotate(q, cos, sin, impl=impl), rotate(k, cos, sin, impl=impl)
        options = {"softmax_scale": self.scaling, "impl": impl}
        if step is None or cache is None:
            o = api.nsa_attention(q, k, v, gates=gates, k_cmp=k_cmp, v_cmp=v_cmp, plan=nsa.plan, **options)
            assert isinstance(o, Tensor), "no log-sum-exps asked for"
        else:
            caches = cache.append(step, k=k, v=v, k_cmp=k_cmp, v_cmp=v_cmp)
            o, _ = attend_cached(q, gates, caches, step, **options)
        return self.o_proj(o.flatten(1)).view(hidden_states.shape), None


class NSAPreTrained:
    """How new weights start, for `from_pretrained` of a checkpoint that lacks them."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, GateProjection):
            module.reset_parameters()
        elif isinstance(module, Compressor):
            params = list(module.parameters())
            loaded = [(p, p.clone()) for p in params if getattr(p, "_is_hf_initialized", False)]
            if len(loaded) < len(params):
                module.reset_parameters()
                for p, value in loaded:
                    p.copy_(value)
        else:
            super()._init_weights(module)  # pyright: ignore[reportAttributeAccessIssue]


class NSABaseModel(NSAPreTrained):
    """Forward of a model: lengths and padding are dealt with once, then the stock forward runs."""

    attention_class: type[SparseAttention]

    def __init__(self: Any, config: Any) -> None:
        super().__init__(config)  # pyright: ignore[reportCallIssue]
        self.install()

    def install(self: Any) -> None:
        """Turn the dense attention modules of `config.sparse_layers` into NSA ones; their weights stay."""
        self.config.check_nsa()
        for i in self.config.sparse_layers:
            layer = self.layers[i]
            layer.self_attn.__class__ = self.attention_class
            layer.self_attn.add_branches(layer.input_layernorm.weight)

    @can_return_tuple
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Arguments of the stock model. Packed rows: `cu_seq_lens_q`, `max_length_q` or `position_ids`, see above.

        Raises:
            ValueError: a mask or lengths of the wrong form.
            TypeError: `past_key_values` of another class than `NSACache`; positions or lengths that are no tensors.
            NotImplementedError: `output_attentions=True`, a 4-D mask, packed rows or gradients with a cache.
        """
        checks.check_whole_sequences()
        cu, longest = kwargs.pop("cu_seq_lens_q", None), kwargs.pop("max_length_q", None)
        for name in ("cu_seq_lens_k", "max_length_k"):  # the same as for queries
            kwargs.pop(name, None)
        wants_attentions = kwargs.get("output_attentions")
        if self.config.output_attentions if wants_attentions is None else wants_attentions:
            raise NotImplementedError(
                "output_attentions must be False: NSA never forms the attention weights. "
                "nsattn.nsa_attention(..., return_lse=True) returns the selected blocks."
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given. Pass one of them.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None, "one of the two is given"
        shape = inputs_embeds.shape
        if past_key_values is not None or (self.config.use_cache if use_cache is None else use_cache):
            cache = NSACache(self.config) if past_key_values is None else past_key_values
            check_cache(self, cache, cu)
            check_lengths(shape, attention_mask, position_ids, cu, cache.get_seq_length())
            return self.continue_from(cache, inputs_embeds, attention_mask, position_ids, **kwargs)
        check_lengths(shape, attention_mask, position_ids, cu)

        keep = None
        if cu is not None:
            cu = cu.to(inputs_embeds.device, torch.int32).contiguous()
        elif attention_mask is None and position_ids is None:
            cu, longest = uniform_cu_seqlens(shape[0], shape[1], inputs_embeds.device), shape[1]
        else:
            keep, cu = find_sequences(attention_mask, position_ids, shape, inputs_embeds.device)
            longest = shape[1]
        if keep is not None:
            inputs_embeds = inputs_embeds.flatten(0, 1)[keep][None]
            position_ids = None if position_ids is None else position_ids.expand(shape[:2]).flatten()[keep][None]
        size = inputs_embeds.shape[:2]
        plan = make_plan(cu, size.numel(), config=self.config.block_sizes, max_seqlen=longest)
        index = positions(plan).view(size)
        mask = self.dense_mask(inputs_embeds, None, None, index)
        if position_ids is not None:
            index = position_ids
            if mask is None:  # the stock forward would take a jump of the positions for another sequence
                mask = inputs_embeds.new_ones(size, dtype=torch.bool)

        out = super().forward(  # pyright: ignore[reportAttributeAccessIssue]
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=index,
            use_cache=False,
            nsa=Batch(plan, *self.rotation(inputs_embeds, index, index.expand(size).flatten()[first_rows(plan)])),
            return_dict=True,
            **({"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": plan.max_q, "max_length_k": plan.max_q}
               if size[0] == 1 else {}),
            **kwargs,
        )
        if keep is not None:
            out.last_hidden_state = pad(out.last_hidden_state, keep, shape)
            if out.hidden_states is not None:
                out.hidden_states = tuple(pad(x, keep, shape) for x in out.hidden_states)
        return out

    def continue_from(
        self: Any,
        cache: NSACache,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """Forward pass of new tokens `[Bsz, S, dim]` after what the cache holds; arguments as `forward` has them.

        Padding stays in the batch (taking it out would wait for the device), is not kept, and comes out as zeros. One
        new token per row waits for nothing, and its `position_ids` are not read; those of more are compared, which
        waits.
        """
        mask = self.dense_mask(inputs_embeds, attention_mask, cache, position_ids)
        if position_ids is not None and inputs_embeds.shape[1] > 1:  # before anything is counted in
            new = None if attention_mask is None else attention_mask[:, cache.lengths.columns :]
            if not bool(cache.lengths.follows(position_ids.to(inputs_embeds.device), len(inputs_embeds), new).all()):
                raise ValueError(
                    "position_ids must count the tokens that the mask keeps in a row, those in the cache too, got "
                    "other positions. Leave them out; with a cache, rows cannot hold packed sequences."
                )
        step = cache.advance(inputs_embeds.shape[:2], inputs_embeds.device, attention_mask)
        out = super().forward(  # pyright: ignore[reportAttributeAccessIssue]
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=step.positions,
            past_key_values=cache,
            use_cache=True,
            nsa=Batch(None, *self.rotation(inputs_embeds, step.positions, step.cmp_positions), step=step),
            return_dict=True,
            **kwargs,
        )
        if step.kept is not None:
            padding = ~step.kept[..., None]
            out.last_hidden_state = out.last_hidden_state.masked_fill(padding, 0)
            if out.hidden_states is not None:
                out.hidden_states = tuple(x.masked_fill(padding, 0) for x in out.hidden_states)
        return out

    def rotation(self: Any, like: Tensor, index: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin `[len(first), 1, D]` at positions `first`. Some rotations change with the longest position that
        they see, so they see those of the tokens, `index`, too."""
        cos, sin = self.rotary_emb(like, torch.cat([index.flatten(), first])[None])
        return cos[0, index.numel() :, None], sin[0, index.numel() :, None]

    def dense_mask(
        self: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, cache: Any, index: Tensor | None
    ) -> Tensor | None:
        """The mask of the dense layers. Where there are none, a 4-D tensor that stops the stock forward from making it,
        which would take O(T^2) memory for packed rows; nothing reads it."""
        if len(self.config.sparse_layers) == self.config.num_hidden_layers:
            return inputs_embeds.new_zeros(1, 1, 1, 1)
        return create_causal_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, past_key_values=cache,
            position_ids=index,
        )


class NSACausalLM(NSAPreTrained):
    """A language model over an NSA base model."""

    model_class: type[NSABaseModel]

    def __init__(self: Any, config: Any) -> None:
        PreTrainedModel.__init__(self, config)  # the family's own would make the dense model first
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def generate(self, *args: Any, use_cache: bool | None = None, **kwargs: Any) -> Any:
        """`generate` of transformers. It keeps a cache unless `use_cache` or a `generation_config` is given that says
        no; `use_cache` of the model's config is for forward passes."""
        if use_cache is None:
            use_cache = getattr(kwargs.get("generation_config"), "use_cache", None) is not False
        return super().generate(*args, use_cache=use_cache, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """What `generate_batch` of transformers starts with."""
        raise NotImplementedError(
            "continuous batching must keep its own pages of keys, which have no place for compressed ones, got a call "
            "of it. Use generate() with a padded batch."
        )

    def _prepare_cache_for_generation(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *sizes: int
    ) -> None:
        """What `generate` of transformers calls to make its cache. `sizes`: rows, and columns to reserve."""
        kind = generation_config.cache_implementation
        if generation_config.is_assistant or generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise NotImplementedError(
                "assisted decoding must take tokens back out of the cache, and an NSA cache cannot. Leave "
                "assistant_model and prompt_lookup_num_tokens out."
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            if kind not in (None, "dynamic", "static"):
                raise NotImplementedError(
                    f"cache_implementation must be None, 'dynamic' or 'static', got {kind!r}: compressed keys are "
                    "neither quantised nor offloaded. Leave it out."
                )
            longest = max(sizes[-1], getattr(generation_config, "max_cache_len", None) or 0)
            model_kwargs["past_key_values"] = NSACache(self.config, longest if kind == "static" else None)
        else:
            super()._prepare_cache_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
                generation_config, model_kwargs, generation_mode, *sizes
            )


def check_cache(model: Any, cache: Any, cu: Tensor | None) -> None:
    """A forward pass can go on from `cache`."""
    if not isinstance(cache, NSACache):
        raise TypeError(
            f"past_key_values must be an NSACache, got {type(cache).__name__}. Make one with NSACache(model.config), "
            "or pass use_cache=True."
        )
    layers = [i for i, layer in enumerate(cache.layers) if isinstance(layer, NSACacheLayer)]
    if cache.lengths.config != model.config.block_sizes or layers != sorted(model.config.sparse_layers):
        raise ValueError(
            f"past_key_values must be made for this model's config, got {cache.lengths.config} and NSA in layers "
            f"{layers}, and the model has {model.config.block_sizes} and {sorted(model.config.sparse_layers)}. Make it "
            "with NSACache(model.config)."
        )
    if cu is not None:
        raise NotImplementedError(
            "cu_seq_lens_q must be None with a cache: it keeps one sequence for each row of the batch. Pad the "
            "sequences, with an attention_mask."
        )
    if model.training and any(layer.gradient_checkpointing for layer in model.layers):
        raise NotImplementedError(
            "use_cache must be False while training with gradient checkpointing, which would pass the cache over."
        )


def check_lengths(
    shape: torch.Size, attention_mask: Tensor | None, position_ids: Tensor | None, cu: Tensor | None, cached: int = 0
) -> None:
    """Mask, positions and packed lengths have a form that says where sequences are. The mask covers cached columns."""
    columns = (shape[0], cached + shape[1])
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2):
        got = getattr(attention_mask, "shape", type(attention_mask).__name__)
        raise NotImplementedError(
            f"attention_mask must be 2-D (1 for tokens, 0 for padding), got {got}. NSA is causal inside a sequence; "
            "for packed sequences pass cu_seq_lens_q or position_ids."
        )
    if attention_mask is not None and tuple(attention_mask.shape) != columns:
        raise ValueError(
            f"attention_mask must be {columns} like the tokens, cached ones included, got "
            f"{tuple(attention_mask.shape)}. Cut or extend it."
        )
    for name, x in (("position_ids", position_ids), ("cu_seq_lens_q", cu)):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}. Pass torch.tensor({name}).")
    if position_ids is not None and (
        position_ids.dim() != 2 or position_ids.shape[1] != shape[1] or position_ids.shape[0] not in (1, shape[0])
    ):
        raise ValueError(f"position_ids must be [1 or Bsz, S], got {tuple(position_ids.shape)} for {tuple(shape[:2])}.")
    if cu is not None and (attention_mask is not None or shape[0] != 1):
        raise ValueError(
            f"cu_seq_lens_q must come with one packed row and no attention_mask, got {shape[0]} rows. Drop one of them."
        )


def find_sequences(
    attention_mask: Tensor | None, position_ids: Tensor | None, shape: torch.Size, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """Rows of the flattened batch to keep as one packed row, and where its sequences start. Waits for the device.

    A sequence starts with a row of the batch, and where positions do not grow. They may jump ahead: a mask has holes,
    and training for longer texts leaves positions out. `keep` is None for a batch of whole rows.
    """
    num, length = shape[:2]
    row = torch.arange(num * length, device=device)
    pos = row % length if position_ids is None else position_ids.to(device).expand(num, length).flatten()
    keep = row if attention_mask is None else attention_mask.to(device).flatten().nonzero().squeeze(1)
    row, pos = row[keep] // length, pos[keep]
    goes_on = (row.diff() == 0) & (pos.diff() > 0)
    start = torch.cat([goes_on.new_ones(len(row[:1])), ~goes_on]).nonzero().squeeze(1)
    cu = torch.cat([start, start.new_full((1,), len(keep))]).int()
    return (None if len(keep) == num * length and len(start) == num else keep), cu


def first_rows(plan: Plan) -> Tensor:
    """Row of the first token of every compressed block; slack rows point at some row."""
    seq, index = rows_of(plan.cu_cmp, plan.total_cmp)
    return (plan.cu_k[seq] + index * plan.config.cmp_stride).clamp_max(plan.total_k - 1)


def pad(x: Tensor, keep: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of taking the rows `keep` of a batch; zeros elsewhere."""
    return x.new_zeros(shape[:2].numel(), x.shape[-1]).index_copy(0, keep, x[0]).view(*shape[:2], -1)


class NSALlamaAttention(SparseAttention, LlamaAttention):
    pass


class NSALlamaModel(NSABaseModel, LlamaModel):
    config_class = NSALlamaConfig
    attention_class = NSALlamaAttention


class NSALlamaForCausalLM(NSACausalLM, LlamaForCausalLM):
    config_class = NSALlamaConfig
    model_class = NSALlamaModel


class NSAQwen2Attention(SparseAttention, Qwen2Attention):
    pass


class NSAQwen2Model(NSABaseModel, Qwen2Model):
    config_class = NSAQwen2Config
    attention_class = NSAQwen2Attention


class NSAQwen2ForCausalLM(NSACausalLM, Qwen2ForCausalLM):
    config_class = NSAQwen2Config
    model_class = NSAQwen2Model


class NSAQwen3Attention(SparseAttention, Qwen3Attention):
    pass


class NSAQwen3Model(NSABaseModel, Qwen3Model):
    config_class = NSAQwen3Config
    attention_class = NSAQwen3Attention


class NSAQwen3ForCausalLM(NSACausalLM, Qwen3ForCausalLM):
    config_class = NSAQwen3Config
    model_class = NSAQwen3Model
