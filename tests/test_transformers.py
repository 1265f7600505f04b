"""Hugging Face models with NSA: tiny ones on the CPU, through the reference."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import nsattn
from nsattn.integrations import transformers as hf

ROOT = Path(__file__).parents[1]
SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "initializer_range": 0.2,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, hf.NSALlamaConfig, hf.NSALlamaForCausalLM, hf.NSALlamaModel),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, hf.NSAQwen2Config, hf.NSAQwen2ForCausalLM, hf.NSAQwen2Model),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, hf.NSAQwen3Config, hf.NSAQwen3ForCausalLM, hf.NSAQwen3Model),
}
SHORT = nsattn.NSAConfig(cmp_block=8, cmp_stride=4, slc_block=16, num_selected=4, window=64)  # dense up to 64 tokens
LONG = nsattn.NSAConfig(cmp_block=8, cmp_stride=4, slc_block=16, num_selected=2, window=12, local_blocks=1)


def dense(family: str, **kwargs):
    sizes = {**SIZES, **kwargs}
    if family == "qwen2":
        sizes.pop("head_dim")
        sizes["hidden_size"] = 96  # its head dim is hidden_size / heads
    sizes.setdefault("tie_word_embeddings", family == "qwen3")
    return FAMILIES[family][1](FAMILIES[family][0](**sizes)).eval()


def sparse(family: str = "llama", config: nsattn.NSAConfig = LONG, gate_bias: float = 0.5, **kwargs):
    """A converted model whose three branches all matter."""
    return hf.convert_to_nsa(dense(family), config, gate_bias=gate_bias, **kwargs)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], shape)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal up to float32 rounding in another order."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@torch.no_grad()
def test_selected_branch_alone_is_dense(family):
    model, ids = dense(family), tokens(2, 61)
    want = model(ids).logits
    shut = hf.convert_to_nsa(model, SHORT, gate_bias=40.0)  # sigmoid(-40) = 4e-18
    close(shut(ids).logits, want)


@torch.no_grad()
def test_conversion_starts_close_to_dense(family):
    model, ids = dense(family), tokens(2, 61)
    want = model(ids, labels=ids)
    got = hf.convert_to_nsa(model, SHORT)(ids, labels=ids)
    gates = model.model.layers[0].self_attn.gate_proj(torch.randn(5, model.config.hidden_size)).sigmoid()
    torch.testing.assert_close(gates[:, :3], torch.tensor([0.018, 0.982, 0.018]).expand(5, 3), rtol=0, atol=1e-4)
    assert 0 < relative(got.logits, want.logits) < 0.05
    assert abs(got.loss - want.loss) < 0.05 * want.loss


@torch.no_grad()
def test_long_context_follows_nsa_attention(family):
    """One attention module against the public functions, rotated by the stock function."""
    model = sparse(family, compression="gated")
    attention, x = model.model.layers[1].self_attn, torch.randn(1, 90, model.config.hidden_size)
    cos, sin = model.model.rotary_emb(x, torch.arange(90)[None])
    plan = nsattn.make_plan(torch.tensor([0, 90], dtype=torch.int32), 90, config=LONG)
    apply = sys.modules[FAMILIES[family][1].__module__].apply_rotary_pos_emb

    q, k, v = (p(x)[0].unflatten(-1, (-1, 16)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    if family == "qwen3":
        q, k = attention.q_norm(q), attention.k_norm(k)
    q_rot, k_rot = (y.transpose(0, 1) for y in apply(q.transpose(0, 1), k.transpose(0, 1), cos[0], sin[0], 0))
    k_cmp, first = attention.compress_k(k, plan), torch.arange(0, 90 - 7, 4)
    assert len(k_cmp) == len(first)
    k_cmp = apply(k_cmp.transpose(0, 1), k_cmp.transpose(0, 1), cos[0, first], sin[0, first], 0)[0].transpose(0, 1)
    gates = attention.gate_proj(x[0]).sigmoid().unflatten(-1, (6, 3))
    o = nsattn.nsa_attention(
        q_rot, k_rot, v, gates=gates, k_cmp=k_cmp, v_cmp=attention.compress_v(v, plan), plan=plan
    )
    batch = hf.modeling.Batch(plan, cos[0, first, None], sin[0, first, None])
    close(attention(x, (cos, sin), nsa=batch)[0][0], attention.o_proj(o.flatten(1)))


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_padding_is_honoured(family, layers):
    model, lengths = sparse(family, layers=layers), (50, 33, 5)
    rows = [tokens(1, n) for n in lengths]
    alone = [model(row, output_hidden_states=True) for row in rows]
    for left in (True, False):
        ids, mask = torch.zeros(3, 50, dtype=torch.long), torch.zeros(3, 50, dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(50 - lengths[i], 50) if left else slice(0, lengths[i])
            ids[i, where], mask[i, where] = row[0], 1
        counted = (mask.cumsum(1) - 1).clamp_min(0)  # as generate() makes them
        for extra in ({}, {"position_ids": counted}):
            got = model(ids, attention_mask=mask, output_hidden_states=True, **extra)
            assert got.logits.isfinite().all()
            for i, one in enumerate(alone):
                close(got.logits[i][mask[i] == 1], one.logits[0])
                for a, b in zip(got.hidden_states, one.hidden_states, strict=True):
                    close(a[i][mask[i] == 1], b[0])


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, [1]])
def test_packed_rows_equal_sequences_alone(family, layers):
    model = sparse(family, layers=layers)
    rows = [tokens(n) for n in (45, 1, 7, 30)]
    want = torch.cat([model(row[None]).logits[0] for row in rows])
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": row.tolist()} for row in rows])
    batch.pop("labels")
    close(model(**batch).logits[0], want)
    close(model(batch["input_ids"], position_ids=batch["position_ids"]).logits[0], want)
    close(model(batch["input_ids"], cu_seq_lens_q=batch["cu_seq_lens_q"]).logits[0], want)
    two = model(batch["input_ids"].repeat(2, 1), position_ids=batch["position_ids"])
    close(two.logits, want.expand(2, -1, -1))
    # lengths decide, not positions that run on; positions decide where a mask only takes out padding
    plain = torch.arange(len(want))[None]
    close(model(batch["input_ids"], position_ids=plain, cu_seq_lens_q=batch["cu_seq_lens_q"]).logits[0], want)
    padded = {name: torch.nn.functional.pad(batch[name], (0, 3)) for name in ("input_ids", "position_ids")}
    mask = torch.nn.functional.pad(torch.ones_like(batch["input_ids"]), (0, 3))
    close(model(**padded, attention_mask=mask).logits[0, :-3], want)


def test_a_mask_of_ones_and_positions_change_nothing():
    model, ids = sparse(), tokens(2, 40)
    want = model(ids).logits
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, want)
    assert torch.equal(model(ids, position_ids=torch.arange(40)[None]).logits, want)
    close(model(ids, position_ids=torch.arange(40)[None] + 100).logits, want)  # rotation is relative
    close(model(inputs_embeds=model.model.embed_tokens(ids)).logits, want)
    assert torch.equal(model(ids, return_dict=False)[0], want)
    close(model(ids, logits_to_keep=3).logits, want[:, -3:])


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, [1]])
def test_positions_that_jump_ahead_do_not_split(layers):
    """As in training for longer texts (PoSE): the same with a mask, with padding in another row, and with neither."""
    model, ids = sparse(layers=layers), tokens(2, 40)
    pos = torch.arange(40)[None] + 100 * (torch.arange(40) >= 20)
    mask = torch.ones_like(ids)
    want = model(ids, position_ids=pos, attention_mask=mask).logits
    assert torch.equal(model(ids, position_ids=pos).logits, want)
    assert not torch.allclose(model(ids[:, 20:]).logits, want[:, 20:], atol=0.1)
    mask[1, 35:] = 0
    close(model(ids, position_ids=pos.expand(2, -1), attention_mask=mask).logits[0], want[0])
    close(model(ids[1:], position_ids=pos, attention_mask=mask[1:]).logits[0, :35], want[1, :35])
    close(model(ids[1:], position_ids=pos, cu_seq_lens_q=torch.tensor([0, 40])).logits[0], want[1])


def test_rows_past_the_last_sequence_do_not_disturb():
    model, ids = sparse(layers=[1, 2]), tokens(1, 50)
    got = model(ids, cu_seq_lens_q=torch.tensor([0, 31], dtype=torch.int32), max_length_q=31).logits
    close(got[:, :31], model(ids[:, :31]).logits)
    assert got.isfinite().all()


def test_mask_with_holes_and_empty_rows():
    """What a mask leaves out is not there: holes inside a sequence, whole rows."""
    model, ids = sparse(), tokens(3, 40)
    mask = torch.ones_like(ids)
    mask[0, 10:13] = 0
    mask[1] = 0
    got = model(ids, attention_mask=mask).logits
    close(got[0][mask[0] == 1], model(ids[:1, mask[0] == 1], position_ids=torch.arange(37)[None]).logits[0])
    close(got[2], model(ids[2:]).logits[0])
    assert not got[1].any()


def test_autocast():
    model, ids = sparse("qwen3").train(), tokens(2, 40)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
    out.loss.backward()
    assert relative(out.logits.float(), model(ids).logits) < 0.05
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_one_plan_per_forward(monkeypatch):
    model, made = sparse(), []
    monkeypatch.setattr(hf.modeling, "make_plan", lambda *a, **k: made.append(1) or nsattn.make_plan(*a, **k))
    model(tokens(2, 40))
    assert made == [1]


@pytest.mark.parametrize("compression", ["mean", "linear", "mlp", "gated"])
def test_training_reaches_every_weight(compression):
    model = sparse("qwen3", compression=compression).train()
    for length in (40, 5):  # 5 tokens have no compressed block; gradients exist all the same, for DDP and FSDP
        model.zero_grad(set_to_none=True)
        ids = tokens(2, length)
        model(ids, labels=ids).loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name
            mean_keeps = compression == "gated" and "compress" in name  # a sum over a softmax may vanish
            assert length == 5 or mean_keeps or p.grad.any(), name


def test_gradient_checkpointing_changes_nothing():
    model, ids = sparse(layers=[0, 2]).train(), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    grads = []
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    for options in (None, {}, {"use_reentrant": False, "context_fn": nsattn.checkpoint_contexts}):
        if options is not None:
            enable(options)
        model.zero_grad(set_to_none=True)
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    for a, b, c in zip(*grads, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_lora_recipe(tmp_path):
    """PEFT: adapters on the projections, and the new modules trained whole."""
    peft = pytest.importorskip("peft")
    model, ids = sparse("qwen3"), tokens(2, 40)
    state = copy.deepcopy(model.state_dict())
    recipe = peft.LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        modules_to_save=["gate_proj", "compress_k", "compress_v"], task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, recipe)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora" in name or "modules_to_save" in name for name in trained)
    assert {"gate_proj", "compress_k", "compress_v"} <= {part for name in trained for part in name.split(".")}
    with torch.no_grad():
        want = adapted.eval()(ids).logits
        adapted.save_pretrained(tmp_path)
        fresh = sparse("qwen3")
        fresh.load_state_dict(state)
        assert relative(fresh(ids).logits, want) > 0.01
        close(peft.PeftModel.from_pretrained(fresh, tmp_path).eval()(ids).logits, want)


def test_a_few_steps_lower_the_loss():
    model, ids = sparse("qwen2").train(), tokens(2, 48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@torch.no_grad()
def test_round_trip_is_bit_equal(family, tmp_path):
    model, ids = sparse(family, layers=[0, 2]), tokens(1, 50)
    torch.nn.init.normal_(model.model.layers[0].self_attn.gate_proj.weight)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == f"nsa_{family}" and saved["architectures"] == [type(model).__name__]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is FAMILIES[family][3] and again.config.nsa_layers == [0, 2]
    assert again.config.block_sizes == LONG and again.config.use_cache is False
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b), name
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert type(AutoConfig.from_pretrained(tmp_path)) is FAMILIES[family][2]
    assert type(AutoModel.from_pretrained(tmp_path)) is FAMILIES[family][4]


@torch.no_grad()
@pytest.mark.parametrize("compression", ["linear", "gated"])
def test_dense_checkpoint_loads(family, compression, tmp_path):
    ids = tokens(1, 50)
    dense(family).to(torch.bfloat16).save_pretrained(tmp_path)
    fields = {"nsa_cmp_block": 8, "nsa_cmp_stride": 4, "nsa_slc_block": 16, "nsa_num_selected": 4, "nsa_window": 64}
    loaded, report = FAMILIES[family][3].from_pretrained(
        tmp_path, nsa_compression=compression, output_loading_info=True, **fields
    )
    assert {key.split(".")[-2] for key in report["missing_keys"]} == {"gate_proj", "compress_k", "compress_v"}
    assert not report["unexpected_keys"]
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16} and loaded.config.use_cache is False
    converted = hf.convert_to_nsa(AutoModelForCausalLM.from_pretrained(tmp_path), SHORT, compression=compression)
    for (name, a), (other, b) in zip(
        sorted(loaded.state_dict().items()), sorted(converted.state_dict().items()), strict=True
    ):
        assert name == other and torch.equal(a, b), name
    assert torch.equal(loaded(ids).logits, converted(ids).logits)


@torch.no_grad()
def test_trained_weights_of_a_compressor_survive_a_missing_one(tmp_path):
    model = sparse(compression="mlp", layers=[1])
    compressor = model.model.layers[1].self_attn.compress_k
    for p in compressor.parameters():
        p.fill_(3)
    state = {name: x for name, x in model.state_dict().items() if "compress_k.w1" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    again = hf.NSALlamaForCausalLM.from_pretrained(tmp_path).model.layers[1].self_attn.compress_k
    assert {name for name, p in again.named_parameters() if not (p == 3).all()} == {"w1"}
    assert 0.8 < again.w1.std() * (8 * 16) ** 0.5 < 1.2


@torch.no_grad()
def test_from_scratch_starts_like_a_conversion(family):
    config_class, lm_class = FAMILIES[family][2:4]
    model = lm_class(config_class.from_dict(dense(family).config.to_dict()))
    attention = model.model.layers[0].self_attn
    assert not attention.gate_proj.weight.any()
    assert attention.gate_proj.bias.view(6, 3).unique(dim=0).tolist() == [[-4.0, 4.0, -4.0]]
    torch.testing.assert_close(attention.compress_k.weight[0, 0], torch.eye(16) / 32)
    assert model(tokens(1, 40)).logits.isfinite().all()
    assert set(model.state_dict()) == set(hf.convert_to_nsa(dense(family)).state_dict())


@torch.no_grad()
def test_conversion_in_place_and_back(family, tmp_path):
    model, ids = dense(family), tokens(1, 50)
    before, logits = dict(model.named_parameters()), model(ids).logits
    config = copy.deepcopy(model.config)
    assert hf.convert_to_nsa(model, LONG) is model and type(model) is FAMILIES[family][3]
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items()) and len(after) > len(before)
    assert len(model(ids, output_hidden_states=True).hidden_states) == 4
    with pytest.raises(TypeError, match="model must be one of LlamaModel.*got NSA"):
        hf.convert_to_nsa(model)

    assert hf.convert_to_dense(model) is model and type(model) is FAMILIES[family][1]
    assert dict(model.named_parameters()).keys() == before.keys()
    assert torch.equal(model(ids).logits, logits) and model.config.to_dict() == config.to_dict()
    model.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is FAMILIES[family][1]
    with pytest.raises(TypeError, match="model must be one of NSALlamaModel.*got "):
        hf.convert_to_dense(model)


@torch.no_grad()
def test_base_models_convert():
    model, ids = dense("llama").model, tokens(1, 40)
    want = model(ids).last_hidden_state
    assert type(hf.convert_to_nsa(model, SHORT, gate_bias=40.0)) is hf.NSALlamaModel
    close(model(ids).last_hidden_state, want)
    assert torch.equal(hf.convert_to_dense(model)(ids).last_hidden_state, want)


@torch.no_grad()
def test_base_model_of_a_classifier(tmp_path):
    model, ids = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3)).eval(), tokens(2, 40)
    hf.convert_to_nsa(model.model, LONG)
    model.config = model.model.config
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, config=AutoConfig.from_pretrained(tmp_path))
    assert type(again.model) is hf.NSALlamaModel and torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("layers", [range(2), (1, 0), {0, 1}])
def test_layers_are_any_iterable(layers):
    assert sorted(sparse(layers=layers).config.nsa_layers) == [0, 1]


def test_hidden_states_in_a_fresh_process():
    """transformers records outputs per class, noted when a first model of it is made; a conversion makes none."""
    code = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from nsattn.integrations.transformers import convert_to_nsa
config = LlamaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
model = convert_to_nsa(LlamaForCausalLM(config))
assert len(model(torch.ones(1, 9, dtype=torch.long), output_hidden_states=True).hidden_states) == 3
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_fsdp2_gives_the_same_gradients(tmp_path):
    """Layers sharded over two processes, with a sequence too short for a compressed block: every parameter is used."""
    script = tmp_path / "shard.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


SHARDED = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, "tests")
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from test_transformers import sparse
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
torch.manual_seed(0)
ids = torch.randint(3, 97, (2, 40))
model = sparse("qwen3", compression="mlp").train()
for length in (40, 5):  # 5 tokens have no compressed block
    loss = model(ids[:, :length], labels=ids[:, :length]).loss
    loss.backward()
want = {name: p.grad.clone() for name, p in model.named_parameters()}
model.zero_grad()
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
for length in (40, 5):
    got = model(ids[:, :length], labels=ids[:, :length]).loss
    got.backward()
torch.testing.assert_close(got, loss)
for name, p in model.named_parameters():
    torch.testing.assert_close(p.grad.full_tensor(), want[name], rtol=1e-4, atol=1e-5)
dist.barrier()
dist.destroy_process_group()
sys.stderr.flush()
os._exit(0)  # gloo's threads now and then abort a process that leaves Python the usual way
"""


def test_refusals_of_shards_of_sequences():
    """Around our layers, context parallelism would let every rank attend to its own part, in silence."""
    model, ids = sparse(), tokens(1, 20)
    hooked = model.model.layers[1].self_attn.register_forward_pre_hook(  # as accelerate does it with cp_size > 1
        lambda module, args, kwargs: (args, {**kwargs, "attention_mask": None, "is_causal": True}), with_kwargs=True
    )
    with pytest.raises(NotImplementedError, match="accelerate's context parallelism"):
        model(ids)
    hooked.remove()
    code = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, "tests")
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from test_transformers import sparse, tokens
import nsattn
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
model, layer = sparse(), nsattn.NSAttention(32, 2, 2)
ids, x = tokens(1, 16), torch.randn(1, 16, 32)
for call in (lambda: model(ids), lambda: layer(x)):
    call()
    with context_parallel(init_device_mesh("cpu", (1,)), buffers=[x], buffer_seq_dims=[1]):
        try:
            call()
        except NotImplementedError as error:
            assert "context_parallel" in str(error)
        else:
            raise SystemExit("no refusal")
dist.barrier()
dist.destroy_process_group()
sys.stderr.flush()
os._exit(0)  # gloo's threads now and then abort a process that leaves Python the usual way
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_refusals():
    model, ids = sparse(), tokens(1, 20)
    for call, kwargs, message in (
        (model, {"output_attentions": True}, "output_attentions must be False"),
        (model, {"attention_mask": torch.ones(1, 1, 20, 20)}, "attention_mask must be 2-D"),
        (model, {"attention_mask": {"full_attention": None}}, "attention_mask must be 2-D"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            call(ids, **kwargs)
    cu = torch.tensor([0, 20], dtype=torch.int32)
    for kwargs, message in (
        ({"attention_mask": torch.ones(1, 25)}, "like the tokens"),
        ({"position_ids": torch.arange(20).expand(3, 1, 20)}, "position_ids must be"),
        ({"position_ids": torch.arange(20).expand(3, 20)}, "position_ids must be"),
        ({"cu_seq_lens_q": cu, "attention_mask": torch.ones(1, 20)}, "one packed row"),
        ({"inputs_embeds": torch.zeros(1, 20, 48)}, "exactly one of input_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, **kwargs)
    with pytest.raises(ValueError, match="one packed row"):
        model(tokens(2, 20), cu_seq_lens_q=cu)
    for kwargs in ({"cu_seq_lens_q": [0, 20]}, {"position_ids": [list(range(20))]}):
        with pytest.raises(TypeError, match="must be a tensor, got list. Pass torch.tensor"):
            model(ids, **kwargs)


def test_config_refusals():
    for family, kwargs, error, message in (
        ("llama", {"nsa_cmp_block": 24}, ValueError, "cmp_block must be a multiple"),
        ("llama", {"nsa_compression": "conv"}, ValueError, "nsa_compression must be one of"),
        ("llama", {"num_key_value_heads": 4}, ValueError, "must be a multiple of num_key_value_heads"),
        ("llama", {"nsa_layers": [0, 3]}, ValueError, "nsa_layers must be"),
        ("llama", {"nsa_layers": [1, 1]}, ValueError, "nsa_layers must be"),
        ("llama", {"nsa_layers": []}, ValueError, "nsa_layers must be one or more"),
        ("llama", {"nsa_gate_bias": float("nan")}, ValueError, "nsa_gate_bias must be finite, got nan"),
        ("llama", {"attention_dropout": 0.1}, NotImplementedError, "attention_dropout must be 0"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, NotImplementedError, "sliding_attention"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}, NotImplementedError, "sliding_attention"),
    ):
        with pytest.raises(error, match=message):
            FAMILIES[family][2](**{**SIZES, **kwargs})
    for field, value in (("nsa_window", "64"), ("nsa_layers", "all"), ("nsa_gate_bias", "4"), ("nsa_impl", 3)):
        with pytest.raises(Exception, match=f"for field '{field}'"):  # huggingface_hub's own type
            hf.NSALlamaConfig(**{field: value})
    model = dense("qwen2", use_sliding_window=True, max_window_layers=1, sliding_window=8)
    with pytest.raises(NotImplementedError, match="sliding_attention"):
        hf.convert_to_nsa(model)
    assert type(model) is Qwen2ForCausalLM  # a refused model is left as it was
    with pytest.raises(TypeError, match="config must be an NSAConfig"):
        hf.convert_to_nsa(dense("llama"), {"window": 4})
    with pytest.raises(TypeError, match="layers must be several numbers, got 1"):
        hf.convert_to_nsa(dense("llama"), LONG, 1)


@torch.no_grad()
def test_a_model_is_converted_before_it_is_dispatched():
    """accelerate's hooks keep the forward of the class that they met: after a conversion it would run on."""
    accelerate = pytest.importorskip("accelerate")
    places = {name: "cpu" for name in ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")}
    places |= {f"model.layers.{i}": "cpu" for i in range(SIZES["num_hidden_layers"])}
    ids, model = tokens(2, 50), sparse()
    want = model(ids).logits
    model = accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)
    assert torch.equal(model(ids).logits, want)
    with pytest.raises(NotImplementedError, match="modules must have the forward of their class.*self_attn"):
        hf.convert_to_dense(model)
    other = accelerate.dispatch_model(dense("llama"), places, main_device="cpu", force_hooks=True)
    with pytest.raises(NotImplementedError, match="Convert first, then dispatch"):
        hf.convert_to_nsa(other)
    assert type(other) is LlamaForCausalLM


def test_model_types_are_not_taken_for_another_implementation():
    """transformers looks for one word in names of attention implementations, and would load another kernel."""
    for names in FAMILIES.values():
        assert not any("flash" in thing.__name__.lower() for thing in names) and "flash" not in names[2].model_type
