"""Does NSA learn as well as full attention? Train one model several times from the same start, and compare.

    python examples/quality/quality.py examples/quality/small.yaml          # one GPU, about 8 minutes
    python examples/quality/quality.py examples/quality/tiny.yaml           # a CPU, one minute

Every run starts from the same weights (the NSA models are the dense one, converted), sees the same text in the same
order and takes the same steps; `runs` in the YAML file says how they differ. With `start` in it, the dense model is
trained that far first, else the runs start from random weights. A finished run is not trained again, and
an unfinished one goes on from its last checkpoint. After `minutes` it stops with exit status 75: start it again.
The output folder gets `quality.json`, `quality.md` and `quality.png`.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_utils import get_last_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "train_hf"))
from train import make_model, read_config

from nsattn.integrations.transformers import NSALlamaConfig, convert_to_nsa
from nsattn.train.data import Corpus, bits, load_corpus, ngram_bits_per_byte

UNFINISHED = 75
START = "start"  # the training before the runs, in the configuration and as a folder


class Windows(torch.utils.data.Dataset):
    """Windows of the training text at random places; window i is a function of seed and i."""

    def __init__(self, corpus: Corpus, length: int, count: int, seed: int) -> None:
        self.corpus, self.length, self.count, self.seed = corpus, length, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return item(self.corpus.batch(i, batch_size=1, seq_len=self.length - 1, seed=self.seed)[0])


def item(text: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": text.long(), "labels": text.long()}


class Clock(TrainerCallback):
    """Writes the seconds of training so far into every line of the log, and stops at the deadline with a checkpoint."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before = state.log_history[-1]["seconds"] if state.log_history else 0.0  # of a run that goes on
        self.began = time.perf_counter() - before

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.log_history[-1]["seconds"] = time.perf_counter() - self.began

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.perf_counter() > self.deadline and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


def start(config: dict[str, Any], run: dict[str, Any], seed: int) -> Any:
    """The model of a run before its first step: the dense one of this seed, converted if the run has NSA."""
    transformers.set_seed(seed)
    model = make_model({**config, "attention": "full"})
    if config.get(START) and run is not config[START]:
        trained = Path(config["training"]["output_dir"]) / START / "model"
        model = type(model).from_pretrained(trained, dtype=torch.float32)
    if run["attention"] == "nsa":
        fields = NSALlamaConfig(**config["model"])
        convert_to_nsa(
            model, fields.block_sizes, fields.nsa_layers, compression=fields.nsa_compression,
            gate_bias=fields.nsa_gate_bias,
        )  # fmt: skip
        model.config.nsa_impl = run.get("impl", "auto")
    return model


def train(name: str, config: dict[str, Any], corpus: Corpus, deadline: float) -> dict[str, Any] | None:
    """Train a run to its end and return its result, or None where time ran out. Finished ones are read from disk."""
    run = config[START] if name == START else config["runs"][name]
    folder = Path(config["training"]["output_dir"]) / name
    asked = {**{key: value for key, value in config.items() if key not in ("runs", "minutes")}, "run": run}
    written = folder / "config.json"
    if written.exists() and json.loads(written.read_text()) != json.loads(json.dumps(asked)):
        raise ValueError(f"{folder} holds a run with other settings. Remove it, or set training.output_dir.")
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    written.write_text(json.dumps(asked, indent=1) + "\n")

    own = {key: value for key, value in run.items() if key not in ("attention", "impl")}
    args = TrainingArguments(**{**config["training"], **own, "output_dir": str(folder)})
    length = config["data"]["length"]
    model = start(config, run, args.seed)
    windows = corpus.held_out_windows(config["data"]["held_out"], length - 1)
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    trainer = Trainer(
        model=model, args=args, data_collator=default_data_collator, callbacks=[Clock(deadline)],
        train_dataset=Windows(corpus, length, args.max_steps * per_step, args.seed),
        eval_dataset=[item(window) for window in windows],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
    history = trainer.state.log_history
    if trainer.state.global_step < args.max_steps:
        return None
    if name == START:
        trainer.save_model(str(folder / "model"))
    nats = by_position(trainer, windows)
    result = {
        "attention": run["attention"], "impl": run.get("impl", "auto" if run["attention"] == "nsa" else "sdpa"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": args.max_steps, "tokens": args.max_steps * per_step * length, "learning_rate": args.learning_rate,
        "seconds": history[-1]["seconds"], "tokens_per_second": per_step * length / seconds_per_step(history),
        "held_out_bits": bits(nats.mean().item()), "by_position": positions(nats),
        "curve": [[line["step"], bits(line["loss"])] for line in history if "loss" in line],
        "held_out_curve": [[line["step"], bits(line["eval_loss"])] for line in history if "eval_loss" in line],
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result) + "\n")
    return result


def seconds_per_step(history: list[dict[str, float]]) -> float:
    """Median over the stretches between two lines of the log with no measurement between: no compilation, no start."""
    pairs = [(a, b) for a, b in zip(history, history[1:], strict=False) if "loss" in b and b["step"] > a["step"]]
    return float(np.median([(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairs]))


@torch.no_grad()
def by_position(trainer: Trainer, windows: torch.Tensor) -> torch.Tensor:
    """Loss of every predicted byte of the held-out windows in nats, `[windows, length - 1]`."""
    model, losses = trainer.model.eval(), []
    for batch in windows.long().split(trainer.args.per_device_eval_batch_size):
        batch = batch.to(model.device)
        with trainer.accelerator.autocast():
            logits = model(batch).logits[:, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").cpu())
    return torch.cat(losses)


def positions(nats: torch.Tensor) -> list[list[float]]:
    """Bits per byte for positions of the window: first position, last position + 1, value; each twice as long."""
    length = nats.shape[1]
    edges = [0, *(length >> i for i in range(5, 0, -1)), length]
    return [[a, b, bits(nats[:, a:b].mean().item())] for a, b in zip(edges, edges[1:], strict=False) if b > a]


def summarize(
    results: dict[str, dict[str, Any]], before: dict[str, Any] | None, baselines: dict[str, float], folder: Path
) -> str:
    """Write quality.json, quality.md and quality.png; return the table. `before` is the training before the runs."""
    lines = ["| run | parameters | tokens | seconds | tokens / s | held out, bits per byte | over the first |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|")
    first = next(iter(results.values()))
    for name, r in results.items():
        extra = r["parameters"] / first["parameters"] - 1
        lines.append(
            f"| {name} | {r['parameters']:,} ({extra:+.2%}) | {r['tokens']:,} | {r['seconds']:.0f} | "
            f"{r['tokens_per_second']:,.0f} | {r['held_out_bits']:.4f} | "
            f"{r['held_out_bits'] / first['held_out_bits'] - 1:+.2%} |"
        )
    lines.append("")
    sparse = [(name, r) for name, r in results.items() if r["attention"] == "nsa"]
    for (a, one), (b, two) in itertools.combinations(sparse, 2):
        gap = np.abs(np.array(one["curve"])[:, 1] / np.array(two["curve"])[:, 1] - 1)
        lines.append(f"Training loss, {a} against {b}: {gap.mean():.2%} apart on average, {gap.max():.2%} at most.  ")
    if before:
        lines.append(f"Before the runs: {before['steps']} steps of full attention, "
                     f"{before['held_out_bits']:.4f} bits per byte held out.  ")  # fmt: skip
    lines.append(", ".join(f"{name} {value:.3f}" for name, value in baselines.items()) + " bits per byte.")
    table = "\n".join(lines) + "\n"
    (folder / "quality.json").write_text(json.dumps({"baselines": baselines, START: before, "runs": results}) + "\n")
    (folder / "quality.md").write_text(table)
    draw(results, baselines, folder / "quality.png")
    return table


def draw(results: dict[str, dict[str, Any]], baselines: dict[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", width_ratios=(3, 2))
    for (name, r), colour, style in zip(results.items(), ("C0", "C1", "C2", "C3", "C4"), "-----", strict=False):
        million = r["tokens"] / r["steps"] / 1e6
        label = f"{name}: {r['held_out_bits']:.3f}, {r['parameters'] / 1e6:.1f}M parameters, {r['seconds']:.0f} s"
        step, loss = np.array(r["curve"]).T
        left.plot(step * million, loss, style, color=colour, linewidth=0.8, alpha=0.7)
        step, loss = np.array(r["held_out_curve"]).T
        left.plot(step * million, loss, "o-", color=colour, markersize=4, label=label)
        last = [(b, value) for _, b, value in r["by_position"]]
        right.plot(*zip(*last, strict=True), "o-", color=colour, markersize=4, label=name)
    left.axhline(baselines["trigram"], color="grey", linewidth=1, linestyle=":", label="counting triples of bytes")
    best = min(r["held_out_bits"] for r in results.values())
    left.set_ylim(0.9 * best, max(1.05 * baselines["trigram"], 2 * best))
    left.set(xlabel="bytes of text, millions", ylabel="bits per byte", title="Training (thin) and held-out text (dots)")
    right.set_xscale("log", base=2)
    right.set(xlabel="position in the window, up to", title="Held-out text by position, bits per byte")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> dict[str, dict[str, Any]]:
    config = read_config(argv[0], argv[1:])
    deadline = time.perf_counter() + 60 * config["minutes"]
    length, folder = config["data"]["length"], Path(config["training"]["output_dir"])
    corpus = load_corpus(config["data"]["path"] or "", seq_len=length)
    if START in config["runs"]:
        raise ValueError(f"a run cannot be named {START!r}: that is the training before the runs. Rename it.")
    results = {}
    for name in ([START] if config.get(START) else []) + list(config["runs"]):
        result = train(name, config, corpus, deadline)
        if result is None:
            sys.stderr.write(f"{config['minutes']} minutes are over in run {name}: start the command again\n")
            sys.exit(UNFINISHED)
        results[name] = result
    before = results.pop(START, None)
    windows = corpus.held_out_windows(config["data"]["held_out"], length - 1)
    sys.stdout.write(summarize(results, before, ngram_bits_per_byte(corpus.train, windows), folder))
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
