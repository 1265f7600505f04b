"""Training: the split, the baselines, resuming, checkpoints, pictures, recorded selections, and what bad input says."""

from __future__ import annotations

import io
import json
import math
import re
import signal
import sysconfig
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from nsattn import NSAConfig
from nsattn.cli import app
from nsattn.train import loop
from nsattn.train.checkpoint import load_checkpoint
from nsattn.train.data import SEGMENT, load_corpus, ngram_bits_per_byte, ngram_probabilities
from nsattn.train.loop import learning_rate, train_run
from nsattn.train.model import ByteLM, ModelConfig
from nsattn.train.pictures import DPI, draw_loss, draw_selection, read_curve, selection_map
from nsattn.train.presets import PRESETS, RunConfig
from nsattn.train.sample import generate
from nsattn.train.selection import load_selection, record

NSA = NSAConfig(cmp_block=8, cmp_stride=4, slc_block=16, num_selected=3, window=16, init_blocks=1, local_blocks=1)
MODEL = ModelConfig(dim=32, layers=2, num_heads=2, num_kv_heads=1, head_dim=16, hidden=64, nsa=NSA)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_bytes((Path(sysconfig.get_path("stdlib")) / "argparse.py").read_bytes())
    return path


@pytest.fixture
def run(text) -> RunConfig:
    return RunConfig(
        model=MODEL, data=str(text), steps=6, batch_size=2, seq_len=64, lr=1e-2, warmup=2, evals=2, eval_windows=4,
        checkpoint_every=2, sample_bytes=6,
    )


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory) -> Path:
    """The folder of a finished run with NSA."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run = RunConfig(model=MODEL, data=str(text), steps=2, batch_size=2, seq_len=64, evals=1, eval_windows=2,
                    sample_bytes=2)
    train_run(run, folder, device="cpu")
    return folder


def metrics(folder: Path) -> list[dict]:
    """Lines of the metrics without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Data and baselines


def test_split_is_complete_disjoint_and_repeatable(tmp_path):
    rng = np.random.default_rng(0)
    parts = [rng.integers(1, 256, SEGMENT, dtype=np.uint8).tobytes() for _ in range(41)]
    (tmp_path / "b.txt").write_bytes(b"".join(parts[20:]))
    (tmp_path / "a.txt").write_bytes(b"".join(parts[:20]))
    corpus = load_corpus(str(tmp_path))
    assert bytes(corpus.held_out.numpy()) == parts[19] + parts[39]
    assert bytes(corpus.train.numpy()) == b"".join(p for i, p in enumerate(parts) if i not in (19, 39))
    again = load_corpus(str(tmp_path))
    assert again.digest == corpus.digest
    assert torch.equal(again.held_out, corpus.held_out)


def test_folder_leaves_out_binary_and_hidden_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text " * 100)
    (tmp_path / "b.bin").write_bytes(b"\0" * 100)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "c.txt").write_bytes(b"hidden " * 100)
    corpus = load_corpus(str(tmp_path))
    assert len(corpus.train) + len(corpus.held_out) == 500


def test_default_corpus_is_the_standard_library():
    corpus = load_corpus(seq_len=8192)
    assert len(corpus.train) > 4_000_000
    assert len(corpus.held_out) == pytest.approx((len(corpus.train) + len(corpus.held_out)) / 20, rel=0.2)


def test_batches_depend_on_step_and_seed_alone(text):
    corpus = load_corpus(str(text))
    sizes = {"batch_size": 3, "seq_len": 10}
    first = corpus.batch(5, seed=0, **sizes)
    assert first.shape == (3, 11)
    assert torch.equal(first, corpus.batch(5, seed=0, **sizes))
    assert not torch.equal(first, corpus.batch(6, seed=0, **sizes))
    assert not torch.equal(first, corpus.batch(5, seed=1, **sizes))
    whole = bytes(corpus.train.numpy())
    assert all(bytes(row.numpy()) in whole for row in first)


def test_held_out_windows_measure_no_byte_twice(text):
    corpus = load_corpus(str(text))
    corpus = replace(corpus, held_out=torch.arange(250, dtype=torch.uint8))
    windows = corpus.held_out_windows(100, 20)
    assert windows.shape == (12, 21)  # all that fit
    predicted = windows[:, 1:].flatten().tolist()
    assert len(set(predicted)) == len(predicted)
    assert corpus.held_out_windows(3, 20)[:, 0].tolist() == [0, 80, 160]


def test_baselines_by_hand():
    train = torch.tensor(list(b"aab"), dtype=torch.uint8)
    window = torch.tensor([list(b"aab")], dtype=torch.uint8)
    p1 = {"a": 3 / 259, "b": 2 / 259}
    p2 = {"a": (1 + p1["a"]) / 3, "b": (1 + p1["b"]) / 3}  # after a: seen twice, followed by a once and by b once
    p3 = (1 + p2["b"]) / 2  # b after aa: seen once, followed by b
    found = ngram_bits_per_byte(train, window)
    assert found["unigram"] == pytest.approx(-(math.log2(p1["a"]) + math.log2(p1["b"])) / 2)
    assert found["bigram"] == pytest.approx(-(math.log2(p2["a"]) + math.log2(p2["b"])) / 2)
    assert found["trigram"] == pytest.approx(-(math.log2(p2["a"]) + math.log2(p3)) / 2)


@pytest.mark.parametrize("context", [b"ra", b"zb", b"zz"])
def test_baselines_are_distributions(context):
    """The probabilities of all 256 next bytes sum to one: no order gains from mass that it does not have."""
    train = torch.tensor(list(b"abracadabra" * 3), dtype=torch.uint8)
    prefix = torch.tensor([list(context)], dtype=torch.uint8).expand(256, -1)
    windows = torch.cat([prefix, torch.arange(256, dtype=torch.uint8)[:, None]], dim=1)
    for p in ngram_probabilities(train, windows).values():
        assert p[:, -1].sum().item() == pytest.approx(1)


# The model


@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_model_is_causal(attention):
    model = ByteLM(replace(MODEL, attention=attention))
    tokens = torch.randint(256, (2, 50))
    changed = tokens.clone()
    changed[:, 30:] = (changed[:, 30:] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :30], after[:, :30], atol=1e-5)
    assert not torch.allclose(before[:, 30:], after[:, 30:], atol=1e-2)


def test_full_attention_has_the_same_parts_as_nsa():
    shapes = [
        {name: p.shape for name, p in ByteLM(replace(MODEL, attention=attention)).named_parameters()}
        for attention in ("nsa", "full")
    ]
    extra = {name for name in shapes[0] if re.search("gate_proj|compress", name)}
    assert extra
    assert {name: s for name, s in shapes[0].items() if name not in extra} == shapes[1]


def test_selections_are_those_of_one_forward():
    model = ByteLM(MODEL)
    tokens = torch.randint(256, (2, 64))
    selected = model.selections(tokens)
    assert selected.shape == (2, 128, 1, 3)
    assert selected.dtype == torch.int32
    assert (selected[:, :16] == torch.tensor([0, -1, -1])).all()  # only the first block is visible yet
    assert (selected.amax(-1)[0, :64, 0] == torch.arange(64) // 16).all()  # the current block is forced
    with pytest.raises(ValueError, match="selects no blocks"):
        ByteLM(replace(MODEL, attention="full")).selections(tokens)


def test_generate_takes_the_likeliest_byte_of_a_sliding_context():
    model = ByteLM(replace(MODEL, attention="full"))
    prompt = torch.randint(256, (6,), dtype=torch.uint8)
    text = prompt.tolist()
    with torch.no_grad():
        for _ in range(5):
            text.append(int(model(torch.tensor([text[-8:]]))[0, -1].argmax()))
    assert generate(model, prompt, 5, context=8, temperature=0) == bytes(text[6:])
    assert generate(model, prompt, 5, context=8, seed=1) == generate(model, prompt, 5, context=8, seed=1)


# Training and resuming


def test_training_lowers_the_loss(run, tmp_path):
    outcome = train_run(replace(run, steps=20), tmp_path / "run", device="cpu")
    losses = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == 20
    assert losses[0] == pytest.approx(math.log(256), rel=0.1)
    assert sum(losses[-3:]) / 3 < losses[0] - 1
    assert outcome.finished
    assert outcome.held_out < losses[0] / math.log(2) - 1
    assert {path.name for path in outcome.files} == {"loss.png", "selection.png", "sample.txt"}
    assert all(path.exists() for path in outcome.files)


@pytest.mark.parametrize("attention", ["nsa", "full"])
@pytest.mark.parametrize("end", ["ctrl-c", "crash"])
def test_resume_is_exact(run, tmp_path, monkeypatch, attention, end):
    """A run that was stopped, or died after its checkpoint, ends bit for bit like one that was not."""
    run = run.with_attention(attention)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_run(run, whole, device="cpu")
    step = loop._Training.train_step

    def interrupted(self):
        line = step(self)
        if self.step == 3 and end == "ctrl-c":
            signal.raise_signal(signal.SIGINT)
        if self.step == 4 and end == "crash":  # the last checkpoint is that of step 2, metrics go to step 3
            raise ConnectionError("power cut")
        return line

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "train_step", interrupted)
        if end == "crash":
            with pytest.raises(ConnectionError):
                train_run(run, cut, device="cpu")
        else:
            outcome = train_run(run, cut, device="cpu")
            assert (outcome.step, outcome.finished) == (3, False)
    assert load_checkpoint(cut / "checkpoint.safetensors").info["step"] == (3 if end == "ctrl-c" else 2)
    torch.manual_seed(99)  # the random state must come from the checkpoint
    outcome = train_run(run, cut, device="cpu", resume=True)
    assert outcome.finished
    a, b = (load_checkpoint(folder / "checkpoint.safetensors") for folder in (whole, cut))
    assert a.info == b.info
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    assert metrics(whole) == metrics(cut)
    assert (whole / "sample.txt").read_bytes() == (cut / "sample.txt").read_bytes()


def test_second_interrupt_stops_at_once(run, tmp_path, monkeypatch):
    step = loop._Training.train_step

    def twice(self):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(loop._Training, "train_step", twice)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train_run(run, tmp_path / "run", device="cpu")
    assert signal.getsignal(signal.SIGINT) is before


def test_resuming_a_finished_run_measures_again(finished, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, content in files(finished).items():
        (folder / name).write_bytes(content)
    run = RunConfig.from_dict(load_checkpoint(folder / "checkpoint.safetensors").info["run"])
    outcome = train_run(run, folder, device="cpu", resume=True)
    assert outcome.finished
    assert outcome.held_out == metrics(finished)[-1]["held_out_bits_per_byte"]
    assert metrics(folder) == metrics(finished)


def test_loss_that_is_not_a_number_keeps_the_checkpoint(run, tmp_path, monkeypatch):
    loss = loop._Training._loss
    monkeypatch.setattr(loop._Training, "_loss", lambda self, w: loss(self, w) * (math.nan if self.step == 3 else 1))
    with pytest.raises(FloatingPointError, match="step 4: loss nan.*lower --lr"):
        train_run(replace(run, evals=1), tmp_path / "run", device="cpu")
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    assert saved.info["step"] == 2
    assert all(x.isfinite().all() for name, x in saved.tensors.items() if name.startswith("model."))


def test_learning_rate_warms_up_and_ends_at_its_share():
    run = RunConfig(steps=100, warmup=10, lr=1e-2, final_lr=0.1)
    rates = [learning_rate(step, run) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3)
    assert max(rates) == rates[9] == pytest.approx(1e-2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3)


def test_settings_survive_json():
    for run in PRESETS.values():
        assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run


# Checkpoints that cannot be used


def _flip(content: bytes) -> bytes:
    return content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]


@pytest.mark.parametrize(
    "damage, message",
    [
        (_flip, "checksum"),
        (lambda content: content[:-100], "not a usable checkpoint"),
        (lambda content: b"", "not a usable checkpoint"),
        (lambda content: b"garbage" * 100, "not a usable checkpoint"),
        (lambda content: content.replace(b"model.head.weight", b"model.tail.weight"), "checksum"),
        (lambda content: content.replace(rb'\"format\": 1', rb'\"format\": 9'), "format 9"),
    ],
)
def test_damaged_checkpoint_is_refused_and_left_alone(finished, tmp_path, damage, message):
    folder = tmp_path / "run"
    folder.mkdir()
    for name, content in files(finished).items():
        (folder / name).write_bytes(damage(content) if name == "checkpoint.safetensors" else content)
    before = files(folder)
    assert before != files(finished)
    with pytest.raises(ValueError, match=message):
        train_run(RunConfig(), folder, device="cpu", resume=True)
    assert files(folder) == before


def test_checkpoint_of_another_model_is_refused(finished, tmp_path, monkeypatch):
    before = files(finished)
    monkeypatch.setattr(loop, "_settings", lambda saved, path: RunConfig.from_dict(
        {**saved.info["run"], "model": {**saved.info["run"]["model"], "hidden": 96}}
    ))
    with pytest.raises(ValueError, match="does not fit this model: 6 parameters.*blocks.0.mlp.down.weight"):
        train_run(RunConfig(), finished, device="cpu", resume=True)
    assert files(finished) == before


def test_resume_with_another_text_is_refused(run, tmp_path):
    source = tmp_path / "text.txt"
    source.write_bytes(Path(run.data).read_bytes())
    run = replace(run, data=str(source), steps=1)
    train_run(run, tmp_path / "run", device="cpu")
    before = files(tmp_path / "run")
    source.write_bytes(source.read_bytes() + b"more")
    with pytest.raises(ValueError, match="not the text"):
        train_run(run, tmp_path / "run", device="cpu", resume=True)
    assert files(tmp_path / "run") == before


def test_failed_save_keeps_the_older_checkpoint(finished, tmp_path, monkeypatch):
    from nsattn.train import checkpoint

    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(b"older")

    def full_disk(tensors, target, metadata):
        Path(target).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    model = ByteLM(MODEL)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save_checkpoint(path, model, torch.optim.AdamW(model.parameters()), step=1, run={}, digest="")
    assert files(tmp_path) == {"checkpoint.safetensors": b"older"}


# The commands


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(x) for x in arguments])


def assert_refused(result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert re.search(message, result.output), result.output
    assert result.output.startswith("error: ")
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "{tmp}/missing"], "no such file or folder"),
        (["--data", "{tmp}/empty"], "holds no text"),
        (["--data", "{tmp}/short.txt"], r"too short: 100 bytes.*at least 5140 bytes.*--seq-len"),
        (["--seq-len", "1"], "seq_len must be at least 2, got 1"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--batch-size", "-3"], "batch_size must be at least 1, got -3"),
        (["--seed", "-1"], r"seed must be between 0 and 2\*\*64 - 1, got -1"),
        (["--lr", "7"], "lr must be between 0 and 1, got 7"),
        (["--preset", "huge"], "preset must be one of tiny, small, got 'huge'"),
        (["--attention", "linear"], "attention must be one of nsa, full, got 'linear'"),
        (["--device", "tpu"], "device must be auto, cpu or cuda, got 'tpu'"),
        (["--impl", "magic", "--data", "{tmp}/text.txt"], "impl must be one of .*'magic'"),
        (["--preset", "small", "--device", "cpu"], "GiB on a CPU"),
        (["--resume"], "no such checkpoint"),
        (["--compare", "{tmp}/empty"], "not a training run's folder"),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(tmp_path, text, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_bytes(b"x" * 100)
    (tmp_path / "text.txt").write_bytes(text.read_bytes())
    filled = [x.format(tmp=tmp_path) for x in arguments]
    device = [] if "--device" in filled else ["--device", "cpu"]
    assert_refused(invoke("train", "--out", tmp_path / "run", *device, *filled), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_said(tmp_path):
    assert_refused(invoke("train", "--out", tmp_path / "run", "--device", "cuda"), "torch finds no GPU")


def test_run_folder_is_never_overwritten(finished):
    before = files(finished)
    assert_refused(invoke("train", "--out", finished), "already exists and is not empty.*--resume.*--out")
    assert files(finished) == before


def test_resume_with_other_settings_is_refused(finished):
    before = files(finished)
    result = invoke("train", "--out", finished, "--resume", "--steps", "9", "--attention", "full")
    assert_refused(result, "steps is 2 there, 9 was asked for; attention is 'nsa' there, 'full' was asked for")
    assert files(finished) == before


def test_command_trains_stops_resumes_and_compares(text, finished, tmp_path, monkeypatch):
    """The whole of `nsattn train` on a small model: stopped by Ctrl-C, resumed, compared with another run."""
    monkeypatch.setattr("nsattn.train.presets.PRESETS", {"tiny": RunConfig(
        preset="tiny", model=MODEL, steps=3, batch_size=2, seq_len=64, evals=1, eval_windows=2, sample_bytes=2,
    )})
    evaluate = loop._Training.evaluate
    step = loop._Training.train_step

    def interrupted(self):
        signal.raise_signal(signal.SIGINT)
        return step(self)

    arguments = ["train", "--data", text, "--out", tmp_path / "run", "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "train_step", interrupted)
        result = invoke(*arguments)
    assert result.exit_code == 130
    assert "stopped after step 1; checkpoint saved" in result.output
    assert f"nsattn train --out {tmp_path / 'run'} --resume" in result.output
    assert loop._Training.evaluate is evaluate
    result = invoke(*arguments, "--resume", "--compare", finished)
    assert result.exit_code == 0, result.output
    assert "resumed after step 1" in result.output
    for word in ("held out", "bigram", "trigram", "loss.png", "selection.png", "sample.txt"):
        assert word in result.output


def test_terminal_gets_no_control_characters():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    loop._say(Console(file=stream), "a\x1b[2J\xe9\n\tb")
    stream.flush()
    assert stream.buffer.getvalue().decode() == "a?[2J?\n        b\n"


# Pictures


def test_loss_picture(finished, tmp_path):
    draw_loss([finished, finished], tmp_path / "loss.png")
    image = matplotlib.image.imread(tmp_path / "loss.png")
    assert image.shape == (5.5 * DPI, 9 * DPI, 4)
    assert len(np.unique(image.reshape(-1, 4), axis=0)) > 20  # curves, not an empty page
    curve = read_curve(finished)
    assert len(curve.train) == 2
    assert curve.bytes_seen.tolist() == [128, 256]


@pytest.mark.parametrize("layers, heads, rows", [(1, 1, 1), (9, 7, 3)])
def test_selection_picture(tmp_path, layers, heads, rows):
    index = torch.arange(3).expand(layers, 100, heads, 3)
    draw_selection(index, NSA, tmp_path / "map.png")
    image = matplotlib.image.imread(tmp_path / "map.png")
    expected = ((1.3 + 3.2 * rows) * DPI, (1.5 + 3.6 * min(heads, 4)) * DPI)
    assert image.shape[:2] == pytest.approx(expected, abs=1)
    assert len(np.unique(image.reshape(-1, 4), axis=0)) > 20


def test_selection_map_colours():
    length = 16 * 64
    index = np.full((length, 3), -1)
    index[:, 0] = 0
    index[:, 2] = np.arange(length) // 16
    index[17 * 16 : 17 * 16 + 16, 1] = 5  # every query of block 17 chose block 5
    index[18 * 16 : 18 * 16 + 16 : 2, 1] = 5  # and every second one of block 18
    image = selection_map(index, NSA)
    assert image.shape == (512, 64, 3)  # two positions share a row
    forced, future, free, half, white = image[100, 0], image[0, 1], image[17 * 8, 5], image[18 * 8, 5], image[19 * 8, 5]
    assert (white == 1).all()
    assert (image[18 * 8 : 19 * 8, 18] == forced).all()  # the local block
    assert len({tuple(colour) for colour in (forced, future, free, half, white)}) == 5


# Recorded selections


def test_recorded_selection_is_what_the_model_selects(finished, tmp_path):
    result = invoke("record-selection", finished, "--lengths", "48,130", "--out", tmp_path / "s.safetensors",
                    "--device", "cpu")
    assert result.exit_code == 0, result.output
    selections, info = load_selection(tmp_path / "s.safetensors")
    saved = load_checkpoint(finished / "checkpoint.safetensors")
    run = RunConfig.from_dict(saved.info["run"])
    model = ByteLM(run.model)
    model.load_state_dict({n.removeprefix("model."): x for n, x in saved.tensors.items() if n.startswith("model.")})
    held_out = load_corpus(run.data).held_out
    assert list(selections) == info["lengths"] == [48, 130]
    for length, index in selections.items():
        assert index.shape == (2, length, 1, 3)
        assert index.dtype == torch.int32
        with torch.no_grad():
            assert torch.equal(index, model.selections(held_out[None, :length]))
    assert NSAConfig(**info["run"]["model"]["nsa"]) == NSA


@pytest.mark.parametrize(
    "lengths, message",
    [("8,x", "whole numbers"), ("1", "at least 2"), ("99999999", "Use shorter|Lower"), ("100000", "has .* bytes")],
)
def test_record_selection_refuses_lengths(finished, tmp_path, lengths, message):
    out = tmp_path / "s.safetensors"
    assert_refused(invoke("record-selection", finished, "--lengths", lengths, "--out", out), message)
    assert not out.exists()


def test_record_selection_refuses_what_does_not_fit(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4, "SC_PHYS_PAGES": 4 * 2 * 96**2}.get)  # four matrices of 96
    out = tmp_path / "s.safetensors"
    record(finished, [96], out, device="cpu", impl="reference")
    out.unlink()
    with pytest.raises(ValueError, match="NSA at 1 sequences of 97 bytes.*or read fewer bytes"):
        record(finished, [64, 97], out, device="cpu", impl="reference")
    assert not out.exists()


def test_record_selection_refuses_what_it_cannot_use(finished, run, tmp_path):
    assert_refused(invoke("record-selection", tmp_path, "--out", tmp_path / "s"), "no such checkpoint")
    before = files(finished)
    assert_refused(invoke("record-selection", finished, "--out", finished / "config.json"), "already exists")
    assert files(finished) == before
    train_run(replace(run, steps=1).with_attention("full"), tmp_path / "full", device="cpu")
    with pytest.raises(ValueError, match="selects no blocks"):
        record(tmp_path / "full", [64], tmp_path / "s", device="cpu")
    (tmp_path / "s").write_bytes(b"garbage")
    for path in (tmp_path / "s", tmp_path / "missing", tmp_path / "full" / "checkpoint.safetensors"):
        with pytest.raises(ValueError, match="not a file of nsattn record-selection"):
            load_selection(path)
