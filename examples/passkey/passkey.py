"""Does a model with NSA find one sentence in a long text? Train it on text with pass keys in it, then ask for them.

    python examples/passkey/passkey.py examples/passkey/small.yaml          # one GPU, at most 6 minutes at a time
    python examples/passkey/passkey.py examples/passkey/tiny.yaml           # a CPU, one minute, shows the files only
    python examples/passkey/passkey.py examples/passkey/small.yaml attention=full    # the same with full attention

A window of training is real text in which sentences like `The pass key of maple is 48213.` stand at random places, and
which ends with a question for each. The loss is that of every byte, with more weight on the digits of the answers. The
test is the classic one: held-out text, one key that training never had, at a given depth; all digits must be right.
After `minutes` it stops with exit status 75: start it again. The folder `output_dir/attention` gets `passkey.json`,
`passkey.md`, `passkey.png` and a checkpoint.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))
from quality import UNFINISHED, read_config, start

from nsattn.train.checkpoint import load_checkpoint, restore, save_checkpoint
from nsattn.train.data import Corpus, bits, load_corpus

STATEMENT = "\nThe pass key{of} is {key}. Remember it.\n"
QUESTION = "\nWhat is the pass key{of}? The pass key{of} is {key}."
DIGITS = 5
KEYS = np.array([f"{key:0{DIGITS}d}" for key in np.random.default_rng(0).permutation(10**DIGITS)])
TRAINING_KEYS, TEST_KEYS = np.split(KEYS, [10**DIGITS * 9 // 10])
NAMES = (
    "amber anchor apple basin beacon birch candle canyon cedar cherry clover copper coral cotton ember falcon fern "
    "forest garden ginger glacier granite harbor hazel island ivory jasmine juniper lagoon lantern lemon linden maple "
    "marble meadow mirror nickel oak olive orchid pebble pepper quartz raven river saddle silver spruce thistle tulip "
    "velvet violet walnut willow winter zephyr"
).split()
TEXT, STATED, ASKED = 0, 1, 2  # what a byte is: text or words; a digit of a statement; a digit of an answer


def window(
    text: bytes, length: int, keys: Sequence[tuple[str, str]], depths: Sequence[float], order: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """A window and the kind of each of its bytes, uint8 `[length]` both.

    Args:
        text: at least `length` bytes, of which the first are taken.
        length: bytes of the window, statements and questions counted.
        keys: name ("" for none) and digits of every key.
        depths: where their statements stand, from 0, the start of the text, to 1, its end.
        order: that of the questions.
    """
    words = [name and f" of {name}" for name, _ in keys]
    statements = [_sentence(STATEMENT, of, key, STATED) for of, (_, key) in zip(words, keys, strict=True)]
    questions = [_sentence(QUESTION, words[i], keys[i][1], ASKED) for i in order]
    room = length - sum(len(ids) for ids, _ in statements + questions)
    if room < 0:
        raise ValueError(f"{len(keys)} keys do not fit into {length} bytes. Give fewer keys or longer windows.")
    data = np.frombuffer(text, np.uint8)[:room]
    parts, end = [], 0
    for i in np.argsort(depths, kind="stable"):
        begin, end = end, round(depths[i] * room)
        parts += [(data[begin:end], np.full(end - begin, TEXT, np.uint8)), statements[i]]
    parts += [(data[end:], np.full(room - end, TEXT, np.uint8)), *questions]
    ids, kinds = (np.concatenate(column) for column in zip(*parts, strict=True))
    return ids, kinds


def _sentence(form: str, of: str, key: str, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of a statement or a question and their kinds; that of its digits is `kind`."""
    sentence = form.format(of=of, key=key)
    kinds = np.full(len(sentence), TEXT, np.uint8)
    kinds[sentence.index(key) :][: len(key)] = kind
    return np.frombuffer(sentence.encode(), np.uint8), kinds


def batch(config: dict[str, Any], corpus: Corpus, step: int) -> tuple[Tensor, Tensor]:
    """Windows of a step and the kind of each byte, `[windows, length]`: a function of the step and the seed alone.

    The first key of every window has no name and is what the test asks for; the others have one and are beside it.
    """
    data, seed = config["data"], config["training"]["seed"]
    stage = stage_of(data["stages"], step)
    rng = np.random.default_rng((seed, step))
    length = int(rng.choice(stage["lengths"]))
    texts = corpus.batch(step, batch_size=data["tokens"] // length, seq_len=length - 1, seed=seed)
    windows = []
    for text in texts:
        names = ["", *rng.choice(NAMES, stage["keys"] - 1, replace=False)]
        keys = list(zip(names, rng.choice(TRAINING_KEYS, len(names)).tolist(), strict=True))
        windows.append(window(text.numpy().tobytes(), length, keys, rng.random(len(keys)), rng.permutation(len(keys))))
    return _stack(windows)


def stage_of(stages: list[dict[str, Any]], step: int) -> dict[str, Any]:
    for stage in stages:
        if step < stage["steps"]:
            return stage
        step -= stage["steps"]
    raise ValueError("a step after the last stage")


def _stack(windows: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    ids, kinds = (torch.from_numpy(np.stack(column)) for column in zip(*windows, strict=True))
    return ids.long(), kinds


def byte_losses(model: torch.nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Loss in nats of every byte but the first, and whether it was the likeliest one, `[windows, length - 1]`."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none"), logits.argmax(-1) == ids[:, 1:]


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def train(config: dict[str, Any], corpus: Corpus, folder: Path, deadline: float) -> tuple[Any, dict[str, Any]]:
    """Train from the start or the last checkpoint until the last step or the deadline, and save a checkpoint.

    Returns the model and what belongs to the run: its settings, finished steps, seconds and log.
    """
    training, data = config["training"], config["data"]
    device = torch.device("cuda" if torch.cuda.is_available() and not training.get("use_cpu") else "cpu")
    run = {"attention": config["attention"], "impl": config["impl"]}
    model = start(config, run, training["seed"]).to(device).train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": training["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        lr=training["learning_rate"], betas=(0.9, 0.95),
    )  # fmt: skip
    settings = {**run, "model": config["model"], "data": data, "training": training, "text": corpus.digest}
    settings = json.loads(json.dumps(settings))
    path = folder / "checkpoint.safetensors"
    state: dict[str, Any] = {"settings": settings, "step": 0, "seconds": 0.0, "log": []}
    if path.exists():
        saved = load_checkpoint(path)
        if saved.info["run"]["settings"] != settings:
            raise ValueError(f"{folder} holds a run with other settings. Remove it, or set training.output_dir.")
        restore(saved, path, model, optimizer)
        state = saved.info["run"]
    folder.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        state["seconds"] = before + time.perf_counter() - began
        save_checkpoint(path, model, optimizer, step=state["step"], run=state, digest=corpus.digest)

    steps = sum(stage["steps"] for stage in data["stages"])
    weights = torch.tensor([1.0, 0.0, data["answer_weight"]], device=device)  # by kind; who could know a stated digit?
    began, before, done = time.perf_counter(), state["seconds"], state["step"]
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("train", total=steps, completed=state["step"])
        while state["step"] < steps and time.perf_counter() < deadline:
            step = state["step"]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, training["learning_rate"], training["warmup_steps"])
            ids, kinds = (x.to(device) for x in batch(config, corpus, step))
            losses, right = byte_losses(model, ids)
            loss = (losses * weights[kinds[:, 1:].long()]).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            state["step"] = step + 1
            progress.update(task, advance=1)
            if step % training["logging_steps"] == 0 or step + 1 == steps:
                line = {"step": step + 1, "length": ids.shape[1], **measures(losses.detach(), right, kinds[:, 1:])}
                if not math.isfinite(line["text"]):
                    raise FloatingPointError(f"step {step + 1}: the loss is {line['text']}. Lower the learning rate.")
                state["log"].append(line)
                sys.stderr.write(
                    f"step {line['step']:5} length {line['length']:5}: {line['text']:.3f} bits per byte, digits "
                    f"{line['digits']:.1%}, keys {line['keys']:.1%}, {before + time.perf_counter() - began:.0f} s\n"
                )
            if (step + 1) % training["save_steps"] == 0:
                save()
    if state["step"] > done:
        save()
    return model, state


def measures(losses: Tensor, right: Tensor, kinds: Tensor) -> dict[str, float]:
    """Bits per byte of the text, and the share of digits and of keys in the answers that are right."""
    answers = right[kinds == ASKED].float().view(-1, DIGITS)
    return {
        "text": bits(losses[kinds == TEXT].mean().item()), "digits": answers.mean().item(),
        "keys": answers.all(1).float().mean().item(),
    }  # fmt: skip


def test_windows(corpus: Corpus, length: int, depth: float, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Held-out text with one key that training never had, at one depth."""
    rng = np.random.default_rng((seed, length, round(1000 * depth)))
    begins = rng.integers(0, len(corpus.held_out) - length + 1, samples)
    windows = []
    for begin, key in zip(begins, rng.choice(TEST_KEYS, samples).tolist(), strict=True):
        text = corpus.held_out[begin : begin + length].numpy().tobytes()
        windows.append(window(text, length, [("", key)], [depth], [0]))
    return _stack(windows)


@torch.no_grad()
def evaluate(model: Any, config: dict[str, Any], corpus: Corpus) -> list[dict[str, Any]]:
    """For every length and depth how many keys came out right, all digits, greedily.

    One pass over the whole window is the same as generation: generated digits are right if and only if every digit is
    the likeliest one after the right digits before it.
    """
    model.eval()
    device, asked, cells = next(model.parameters()).device, config["evaluation"], []
    for length in asked["lengths"]:
        for depth in np.linspace(0, 1, asked["depths"]):
            ids, kinds = test_windows(corpus, length, depth, asked["samples"], config["training"]["seed"])
            size = max(1, config["data"]["tokens"] // length)
            outcomes = [byte_losses(model, part.to(device)) for part in ids.split(size)]
            losses, right = (torch.cat(column).cpu() for column in zip(*outcomes, strict=True))
            cells.append({"length": length, "depth": float(depth), **measures(losses, right, kinds[:, 1:])})
    return cells


def summarize(result: dict[str, Any], folder: Path) -> str:
    """Write passkey.json, passkey.md and passkey.png; return the table."""
    cells = result["cells"]
    lengths, depths = (sorted({cell[name] for cell in cells}) for name in ("length", "depth"))
    grid = np.array([[cell["keys"] for cell in cells if cell["depth"] == depth] for depth in depths])
    lines = [
        f"{result['attention']} attention, {result['parameters']:,} parameters, {result['steps']} steps of "
        f"{result['tokens_per_step']:,} bytes in {result['seconds']:.0f} s on {result['device']}: "
        f"**{grid.mean():.1%}** of all keys retrieved, {result['samples']} for each length and depth.\n",
        "| depth | " + " | ".join(f"{length:,} bytes" for length in lengths) + " |", "|--:" * (len(lengths) + 1) + "|",
        *(f"| {depth:.0%} | " + " | ".join(f"{x:.0%}" for x in row) + " |"
          for depth, row in zip(depths, grid, strict=True)),
        "| all | " + " | ".join(f"{x:.1%}" for x in grid.mean(0)) + " |",
    ]  # fmt: skip
    table = "\n".join(lines) + "\n"
    (folder / "passkey.json").write_text(json.dumps(result) + "\n")
    (folder / "passkey.md").write_text(table)
    draw(result, lengths, depths, grid, folder / "passkey.png")
    return table


def draw(result: dict[str, Any], lengths: list[int], depths: list[float], grid: np.ndarray, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", width_ratios=(3, 2))
    left.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(grid):
        left.text(column, row, f"{share:.0%}", ha="center", va="center")
    left.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    left.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    left.set(
        xlabel="length of the text, bytes", ylabel="depth of the pass key",
        title=f"{result['attention']} attention: {grid.mean():.1%} of all keys retrieved",
    )  # fmt: skip
    million = result["tokens_per_step"] / 1e6
    lines = np.array([[line["step"] * million, line["digits"], line["text"]] for line in result["log"]])
    right.plot(lines[:, 0], lines[:, 1], "C0", label="digits right")
    right.axhline(0.1, color="C0", linewidth=1, linestyle=":", label="guessing")
    right.set(xlabel="bytes of text, millions", ylim=(0, 1.02), title="Training: answers, bits per byte of text")
    other = right.twinx()
    other.plot(lines[:, 0], lines[:, 2], "C1", linewidth=0.8)
    other.set_ylabel("bits per byte", color="C1")
    right.legend(fontsize=8, loc="center right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> dict[str, Any]:
    config = read_config(argv[0], argv[1:])
    deadline = time.perf_counter() + 60 * config["minutes"]
    folder = Path(config["training"]["output_dir"]) / config["attention"]
    longest = max(max(config["evaluation"]["lengths"]), *(max(stage["lengths"]) for stage in config["data"]["stages"]))
    corpus = load_corpus(config["data"]["path"] or "", seq_len=longest)
    model, state = train(config, corpus, folder, deadline)
    steps = sum(stage["steps"] for stage in config["data"]["stages"])
    if state["step"] < steps:
        sys.stderr.write(f"{config['minutes']} minutes are over at step {state['step']}: start the command again\n")
        sys.exit(UNFINISHED)
    device = next(model.parameters()).device
    result = {
        "attention": config["attention"], "parameters": sum(p.numel() for p in model.parameters()), "steps": steps,
        "tokens_per_step": config["data"]["tokens"], "seconds": state["seconds"],
        "samples": config["evaluation"]["samples"], "cells": evaluate(model, config, corpus), "log": state["log"],
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }  # fmt: skip
    sys.stdout.write(summarize(result, folder))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
