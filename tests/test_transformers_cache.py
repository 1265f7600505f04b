"""Generation of Hugging Face models with NSA: a cache changes nothing but the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

import pytest
import torch

pytest.importorskip("transformers")

from test_transformers import FAMILIES, LONG, SHORT, close, dense, sparse, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, GenerationConfig, LlamaConfig

import nsattn
from nsattn.integrations import transformers as hf

GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(8, 4, 16), (32, 16, 64), (12, 4, 32)])
@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_token_by_token_equals_one_pass(sizes, layers):
    """200 steps over every boundary of compressed and selected blocks, with and without dense layers between."""
    l, d, B = sizes
    config = nsattn.NSAConfig(l, d, B, num_selected=2, window=12, local_blocks=1)
    model, ids = sparse("qwen3", config, layers=layers, compression="mlp").double(), tokens(2, 260)
    want = model(ids).logits
    for prompt in ([60], [7, 1, 33, 19]):
        cache, logits, at = None, [], 0
        for num in (*prompt, *[1] * 200):
            out = model(ids[:, at : at + num], past_key_values=cache, use_cache=True)
            cache, at = out.past_key_values, at + num
            logits.append(out.logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), want, rtol=1e-10, atol=1e-10)
        assert isinstance(cache, hf.NSACache) and cache.get_seq_length() == 260


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, [1]])
def test_generate_equals_full_forwards(family, layers):
    """Greedy, for a batch that is padded on the left: what a loop over whole prefixes gives for each row alone."""
    model, prompt = sparse(family, layers=layers).double(), tokens(1, 20)
    wants = []
    for row in (prompt, prompt[:, :11]):
        for _ in range(30):
            row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], dim=1)
        wants.append(row[0])
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), prompt[:, :11]], dim=1)
    batch = torch.cat([prompt, padded])
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 7}):
        got = model.generate(batch, attention_mask=(batch != 0).long(), max_new_tokens=30, **GREEDY, **options)
        assert torch.equal(got[0], wants[0]) and torch.equal(got[1, 9:], wants[1]), options


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, [0]])
def test_beams_and_samples_are_the_same_with_a_cache(layers):
    model, prompt = sparse(layers=layers).double(), tokens(2, 20)
    mask = torch.ones_like(prompt)
    mask[1, :8] = 0
    for options in (
        {"num_beams": 4}, {"num_beams": 3, "do_sample": True}, {"do_sample": True}, {"num_return_sequences": 2,
                                                                                   "num_beams": 2},
    ):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            results.append(model.generate(
                prompt, attention_mask=mask, max_new_tokens=25, use_cache=use_cache, **{**GREEDY, **options}
            ))
        assert torch.equal(*results), options


def test_a_cache_goes_on_outside_inference_mode():
    model, ids = sparse(layers=[0, 2]), tokens(1, 25)
    with torch.no_grad():
        want = model(ids).logits[:, 20:]
    with torch.inference_mode():
        cache = model(ids[:, :20], use_cache=True).past_key_values
    with torch.no_grad():
        close(model(ids[:, 20:], past_key_values=cache).logits, want)


@torch.no_grad()
def test_a_conversation_goes_on_from_its_cache():
    model, first, second = sparse().double(), tokens(1, 20), tokens(1, 9)
    out = model.generate(first, max_new_tokens=12, return_dict_in_generate=True, **GREEDY)
    text = torch.cat([out.sequences, second], dim=1)
    want = model.generate(text, max_new_tokens=12, use_cache=False, **GREEDY)
    got = model.generate(text, past_key_values=out.past_key_values, max_new_tokens=12, **GREEDY)
    assert torch.equal(got, want)


@torch.no_grad()
def test_padding_anywhere_and_hidden_states():
    """Tokens that a mask takes out of a prompt are not there; their outputs are zero."""
    model, ids = sparse(layers=[0, 2]).double(), tokens(3, 40)
    mask = torch.ones_like(ids)
    mask[0, 10:13] = mask[1, 25:] = mask[2, :30] = 0
    for cuts in ([40], [17, 23], [5, 20, 1, 14]):
        cache, states, at = hf.NSACache(model.config), [], 0
        for num in cuts:
            out = model.model(
                ids[:, at : at + num], attention_mask=mask[:, : at + num], past_key_values=cache,
                output_hidden_states=True,
            )
            states.append(torch.stack(out.hidden_states))
            at += num
        states = torch.cat(states, dim=2)
        for i, row in enumerate(mask.bool()):
            alone = model.model(ids[i : i + 1, row], output_hidden_states=True).hidden_states
            close(states[:, i, row], torch.stack(alone)[:, 0])
            assert not states[-1, i, ~row].any()


@torch.no_grad()
def test_a_decoding_step_does_not_look_at_data(monkeypatch):
    """Nothing that would wait for a GPU: no tensor is read, with padding and a cache of reserved length."""
    model, ids = sparse(), tokens(2, 41)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    cache = hf.NSACache(model.config, max_length=50)
    model(ids[:, :40], attention_mask=mask[:, :40], past_key_values=cache)
    buffers = [x.data_ptr() for layer in cache.layers for x in layer.buffers.values()]

    # Only on a CPU, where nothing waits, does a plan look at its lengths.
    monkeypatch.setattr(nsattn.plan, "_max_length", lambda name, cu, total, longest: min(total, longest))

    def refuse(*args):
        raise AssertionError("a tensor was read")

    for name in ("item", "tolist", "__bool__", "__int__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    monkeypatch.setattr(nsattn.branches.reference, "nsa_decode", lambda q, k, v, *a, **k_: _nothing(q, v))
    out = model(ids[:, 40:], attention_mask=mask, past_key_values=cache, position_ids=mask.cumsum(1)[:, -1:] - 1)
    assert out.logits.shape == (2, 1, 97)
    assert buffers == [x.data_ptr() for layer in cache.layers for x in layer.buffers.values()]


def _nothing(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Outputs of `nsa_decode`: the reference, which pads, looks at lengths; the kernels do not."""
    rows = q.shape[:3]
    idx = torch.zeros(*q.shape[:2], v.shape[2], 2, dtype=torch.int32)
    return q.new_zeros(*rows, v.shape[3]), *(q.new_zeros(rows) for _ in range(3)), idx


@torch.no_grad()
def test_reset_and_lengths():
    model, ids = sparse(), tokens(2, 30)
    cache = hf.NSACache(model.config, max_length=30)
    want = model(ids[:, :25], past_key_values=cache).logits
    assert cache.get_seq_length() == 25
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(ids[:, :25], past_key_values=cache).logits, want)
    with pytest.raises(ValueError, match="at most max_length = 30 columns, got 25 and 6 more"):
        model(tokens(2, 6), past_key_values=cache)


@torch.no_grad()
def test_refusals():
    model, ids = sparse(), tokens(1, 20)
    assistant = sparse()
    config = model.config
    for call, kwargs, error, message in (
        (model, {"past_key_values": DynamicCache(config=config)}, TypeError, "past_key_values must be an NSACache"),
        (model.generate, {"cache_implementation": "quantized"}, NotImplementedError, "neither quantised nor offloaded"),
        (model.generate, {"cache_implementation": "offloaded"}, NotImplementedError, "neither quantised nor offloaded"),
        (model.generate, {"assistant_model": assistant}, NotImplementedError, "assisted decoding must take"),
        (model.generate, {"prompt_lookup_num_tokens": 3}, NotImplementedError, "assisted decoding must take"),
    ):
        with pytest.raises(error, match=message):
            call(ids, **kwargs)
    with pytest.raises(NotImplementedError, match="continuous batching must keep its own pages"):
        model.generate_batch([[5, 6, 7]], generation_config=GenerationConfig(max_new_tokens=2))
    cu = torch.tensor([0, 20], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q must be None with a cache"):
        model(ids, use_cache=True, cu_seq_lens_q=cu)
    with pytest.raises(ValueError, match="position_ids must count the tokens"):
        model(ids, use_cache=True, position_ids=torch.arange(20)[None] + 3)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="position_ids must count the tokens"):
        model(ids[:, :5], past_key_values=cache, position_ids=torch.arange(5)[None])
    with pytest.raises(ValueError, match="the batch must have 1 rows as in the cache, got 3"):
        model(tokens(3, 5), past_key_values=cache, position_ids=torch.arange(5).expand(3, 5))
    model(ids[:, :5], past_key_values=cache, position_ids=torch.arange(20, 25)[None])  # nothing had been counted in
    for other in (hf.NSACache(sparse(config=SHORT).config), hf.NSACache(sparse(config=LONG, layers=[2]).config)):
        with pytest.raises(ValueError, match="past_key_values must be made for this model's config"):
            model(ids, past_key_values=other)
    with pytest.raises(TypeError, match="config must be that of an NSA model, got LlamaConfig"):
        hf.NSACache(LlamaConfig())
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask must be \(1, 25\) like the tokens, cached ones included"):
        model(tokens(1, 5), past_key_values=cache, attention_mask=torch.ones(1, 5))
    with pytest.raises(NotImplementedError, match="an NSA cache cannot go back"):
        cache.crop(-3)
    with pytest.raises(NotImplementedError, match="cannot be offloaded"):
        cache.layers[0].offload()
    with pytest.raises(NotImplementedError, match="cannot be filled with keys and values alone"):
        cache.layers[0].update(torch.zeros(1), torch.zeros(1))
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="a cache holds no gradients"):
        model(ids, use_cache=True)
    mixed = sparse(config=LONG, layers=[2])
    cache = mixed(ids, use_cache=True, attention_mask=torch.ones_like(ids)).past_key_values
    with pytest.raises(ValueError, match="attention_mask must be given again"):
        mixed(ids[:, :1], past_key_values=cache)
    with pytest.raises(NotImplementedError, match="an NSA cache cannot go back"):
        cache.crop(-3)
    assert [layer.get_seq_length() for layer in cache.layers] == [20] * 3  # nothing has been cropped
    cache.crop(0)
    with pytest.raises(NotImplementedError, match="a captured step must have NSA in every layer"):
        cache.replayed(1)
    training = sparse().train()
    getattr(training, "activation_checkpointing_enable", training.gradient_checkpointing_enable)()
    with pytest.raises(NotImplementedError, match="use_cache must be False while training"):
        training(ids, use_cache=True)


class Recording(TorchDispatchMode):
    """What a CUDA graph keeps of a pass, without a GPU: operations on fixed tensors, and no Python between them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, kept in self.calls:
            for old, new in zip(*(tree_leaves(x) for x in (kept, func(*args, **kwargs))), strict=True):
                if old.data_ptr() != new.data_ptr():  # else a view, or in place
                    old.copy_(new)


reference_decode = nsattn.branches.reference.nsa_decode


@torch.library.custom_op("nsattn_test::nsa_decode", mutates_args=())
def decode_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cmp: torch.Tensor, v_cmp: torch.Tensor, gates: torch.Tensor,
    k_win: torch.Tensor, v_win: torch.Tensor, cache_seqlens: torch.Tensor, block_table: torch.Tensor | None,
    config: Sequence[int], scale: float,
) -> list[torch.Tensor]:
    caches = (q, k, v, k_cmp, v_cmp, gates, k_win, v_win, cache_seqlens, block_table)
    return [x.clone() for x in reference_decode(*caches, nsattn.NSAConfig(*config), scale=scale)]


def check_replays(model, prompts, mask, capture) -> None:
    """A captured decoding step, replayed, gives the logits of eager decoding, and both caches go on alike.

    `capture(step, state)` runs a step under capture and returns (its output, a function that replays it); `state` are
    the tensors of the cache.
    """
    later = torch.randint(3, 97, (2, 30), device=prompts.device)
    caches = [hf.NSACache(model.config, max_length=80) for _ in range(2)]
    for cache in caches:
        model(prompts, attention_mask=mask, past_key_values=cache)
    token = later[:, :1].clone()

    def step() -> torch.Tensor:
        return model(token, past_key_values=caches[0]).logits

    def eager(i: int, num: int = 1) -> torch.Tensor:
        return model(later[:, i : i + num], past_key_values=caches[1]).logits

    torch.testing.assert_close(step(), eager(0), rtol=0, atol=0)
    layers = caches[0].layers
    state = [caches[0].lengths.tokens, *(x for y in layers for x in (*y.buffers.values(), *y.tails))]
    logits, replay = capture(step, state)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()  # a capture computes nothing
    seen = []
    for i in range(1, 21):
        token.copy_(later[:, i : i + 1])
        replay()
        seen.append(logits.clone())
        close_enough(seen[-1], eager(i))
    assert (seen[0] - seen[-1]).abs().max() > 0.1
    caches[0].replayed(20)
    assert torch.equal(caches[0].lengths.tokens, caches[1].lengths.tokens)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()
    close_enough(model(later[:, 21:-1], past_key_values=caches[0]).logits, eager(21, 8))
    token.copy_(later[:, -1:])
    replay()  # the graph lives on
    caches[0].replayed(1)
    close_enough(logits, eager(29))
    with pytest.raises(ValueError, match="replays must stay within max_length = 80, got 30 after 51"):
        caches[0].replayed(30)


def close_enough(a: torch.Tensor, b: torch.Tensor) -> None:
    tolerance = 1e-4 if a.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_a_decoding_step_can_be_replayed(monkeypatch):
    """Over the boundaries of compressed and selected blocks, for a padded batch, by recorded operations alone."""
    # As one operation, as the kernels are: the reference looks at lengths.
    monkeypatch.setattr(nsattn.branches.reference, "nsa_decode", lambda *args, scale: decode_op(*args[:10], list(
        astuple(args[10])), scale))
    model, prompts = sparse("qwen3", compression="mlp"), tokens(2, 21)
    mask = torch.ones_like(prompts)
    mask[1, :9] = 0

    def capture(step, state):
        before, recording = [x.clone() for x in state], Recording()
        with monkeypatch.context() as patch, recording:
            patch.setattr(nsattn.cache, "capturing", lambda device: True)
            logits = step()
        names = {str(func) for func, *_ in recording.calls}
        assert "nsattn_test.nsa_decode.default" in names
        assert not {name for name in names if "_local_scalar_dense" in name or "nonzero" in name}
        for x, old in zip(state, before, strict=True):  # a real capture computes nothing
            x.copy_(old)
        return logits, recording.replay

    check_replays(model, prompts, mask, capture)


@pytest.mark.gpu
@torch.no_grad()
def test_a_decoding_step_as_a_cuda_graph():
    """The same by CUDA: two layers of Llama with heads of 128 in bfloat16."""
    sizes = {"hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 128}  # fmt: skip
    config = nsattn.NSAConfig(cmp_block=8, cmp_stride=4, slc_block=16, num_selected=4, window=12)
    model = hf.convert_to_nsa(dense("llama", **sizes), config, gate_bias=0.5).to("cuda", torch.bfloat16)
    prompts = tokens(2, 21).cuda()
    mask = torch.ones_like(prompts)
    mask[1, :9] = 0

    def capture(step, state):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()
        return logits, graph.replay

    check_replays(model, prompts, mask, capture)
