"""Native Sparse Attention in Hugging Face Llama, Qwen2 and Qwen3: training, forward passes and generation.

    from nsattn.integrations.transformers import convert_to_nsa
    model = convert_to_nsa(AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B"))

The classes are the stock ones with other attention modules: same names for the weights they share, and `gate_proj`,
`compress_k`, `compress_v` beside them. Importing this module registers the model types `nsa_llama`, `nsa_qwen2` and
`nsa_qwen3` with the Auto classes, so checkpoints load with `AutoModelForCausalLM` after it. `from_pretrained` of an NSA
class also reads a dense checkpoint; transformers then warns about the other model type and lists the new weights.

Start: for S <= N*B tokens (1024 by default) a converted model is close to the dense one: every block is selected, so
the selected branch alone equals dense attention. Beyond, it must be trained. The gates start at (cmp, slc, win) =
(0.018, 0.982, 0.018), which is sigmoid(-4, 4, -4), for every token (the weight of `gate_proj` is zero), and `linear`
and `gated` compression start as the mean of a block. While also S <= window, the last two gates add up to one and the
output of an attention layer differs from the dense one by 0.018 of the compressed branch. `nsa_gate_bias` is that 4;
use 0 to train from scratch with gates of one half.

Input: a batch `[Bsz, S]` without a mask; a 2-D mask, padded on either side (padding is taken out once per forward, and
its outputs are what a zero hidden state gives); or packed sequences in one row, with `cu_seq_lens_q`, `max_length_q` as
`DataCollatorWithFlattening(return_flash_attn_kwargs=True)` makes them, or with `position_ids` that start again. With a
mask or `position_ids` the model waits for the GPU once per forward to learn the lengths, otherwise never.

Generation: `generate` keeps an `NSACache`; greedy search, sampling and beams work, with prompts padded on the left or
anywhere else, prefill in chunks and `cache_implementation="static"`. A decoding step computes its token alone and does
not wait for the GPU. A forward pass keeps a cache where `use_cache=True` or `past_key_values` asks for one, without
gradients. Positions with a cache must be those that it counts: other `position_ids` are refused, but those of a single
token are not read, for that would wait.

Limits: dropout on attention weights, sliding window layers, 4-D masks and `output_attentions` are refused, and with a
cache also packed rows, assisted decoding, offloading and quantisation.
"""

from transformers.models.auto import AutoConfig, AutoModel, AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

from nsattn.integrations.transformers.cache import NSACache
from nsattn.integrations.transformers.config import NSALlamaConfig, NSAQwen2Config, NSAQwen3Config
from nsattn.integrations.transformers.convert import FAMILIES, convert_to_dense, convert_to_nsa
from nsattn.integrations.transformers.modeling import (
    NSALlamaForCausalLM,
    NSALlamaModel,
    NSAQwen2ForCausalLM,
    NSAQwen2Model,
    NSAQwen3ForCausalLM,
    NSAQwen3Model,
)

for family in FAMILIES:
    AutoConfig.register(family.sparse_config.model_type, family.sparse_config, exist_ok=True)
    AutoModel.register(family.sparse_config, family.sparse_model, exist_ok=True)
    AutoModelForCausalLM.register(family.sparse_config, family.sparse_lm, exist_ok=True)

__all__ = [
    "NSACache",
    "NSALlamaConfig",
    "NSALlamaForCausalLM",
    "NSALlamaModel",
    "NSAQwen2Config",
    "NSAQwen2ForCausalLM",
    "NSAQwen2Model",
    "NSAQwen3Config",
    "NSAQwen3ForCausalLM",
    "NSAQwen3Model",
    "convert_to_dense",
    "convert_to_nsa",
]
