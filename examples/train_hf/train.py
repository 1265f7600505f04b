"""Train a Llama-like model with NSA or full attention on real text, with the Hugging Face Trainer.

    python examples/train_hf/train.py examples/train_hf/small.yaml
    accelerate launch --config_file examples/train_hf/fsdp2.yaml examples/train_hf/train.py examples/train_hf/small.yaml
    python examples/train_hf/train.py small.yaml attention=full training.output_dir=runs/full     # overrides

Everything is in the YAML file: `model` (fields of NSALlamaConfig), `attention` (nsa or full), `data`, and `training`
(fields of TrainingArguments). A run that was stopped goes on from its last checkpoint. Text is bytes, so nothing is
downloaded; documents of different lengths are packed into one row by DataCollatorWithFlattening, without padding.
Metrics go to `metrics.jsonl`, curves to `loss.png` in the output folder.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import get_last_checkpoint

from nsattn.integrations.transformers import NSALlamaConfig, NSALlamaForCausalLM
from nsattn.train.data import load_corpus


def read_config(path: str, overrides: list[str]) -> dict[str, Any]:
    """The YAML file, with `section.key=value` overrides, whose values are YAML too."""
    config = yaml.safe_load(Path(path).read_text())
    for override in overrides:
        name, _, value = override.partition("=")
        section, _, key = name.rpartition(".")
        target = config[section] if section else config
        if key not in target and section != "training":
            raise ValueError(f"{name} is not in {path}. Known: {', '.join(target)}.")
        target[key] = yaml.safe_load(value)
    return config


class Documents(torch.utils.data.Dataset):
    """Pieces of a text of random lengths, the same for every run with the same seed."""

    def __init__(self, text: torch.Tensor, shortest: int, longest: int, seed: int) -> None:
        lengths = np.random.default_rng(seed).integers(shortest, longest + 1, size=2 * len(text) // shortest)
        ends = np.cumsum(lengths)
        ends = ends[ends <= len(text)]
        self.text, self.pieces = text, list(zip(np.concatenate([[0], ends[:-1]]), ends, strict=True))

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        start, end = self.pieces[i]
        ids = self.text[start:end].tolist()
        return {"input_ids": ids, "labels": ids}


def make_model(config: dict[str, Any]) -> torch.nn.Module:
    sizes = dict(config["model"])
    if config["attention"] == "full":
        dense = {name: value for name, value in sizes.items() if not name.startswith("nsa_")}
        # With FlashAttention installed, "flash_attention_2" takes packed rows; SDPA masks them.
        return LlamaForCausalLM(LlamaConfig(**dense, attn_implementation="sdpa"))
    if config["attention"] != "nsa":
        raise ValueError(f"attention must be nsa or full, got {config['attention']!r}.")
    return NSALlamaForCausalLM(NSALlamaConfig(**sizes))


def draw(folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(line["step"], line[key] / math.log(2)) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if key == "eval_loss" else None)
    axes.set(xlabel="step", ylabel="bits per byte", title=folder.name)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    plt.close(figure)


def main(argv: list[str]) -> dict[str, float]:
    config = read_config(argv[0], argv[1:])
    data = config["data"]
    corpus = load_corpus(data["path"] or "", seq_len=data["longest"])
    pick = {"shortest": data["shortest"], "longest": data["longest"], "seed": config["training"].get("seed", 42)}
    held_out = Documents(corpus.held_out, **pick)
    held_out.pieces = held_out.pieces[: data["held_out"]]
    args = TrainingArguments(**config["training"])
    transformers.set_seed(args.seed)
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=config["attention"] == "nsa")
    if data["shortest"] == data["longest"]:  # nothing to pack: a batch [documents, length]
        collate = default_data_collator
    trainer = Trainer(
        model=make_model(config), args=args, train_dataset=Documents(corpus.train, **pick), eval_dataset=held_out,
        data_collator=collate,
    )  # fmt: skip
    folder = Path(args.output_dir)
    last = get_last_checkpoint(folder) if folder.exists() else None
    trainer.train(resume_from_checkpoint=last)
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        lines = [json.dumps(line) for line in trainer.state.log_history]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        draw(folder)
        bits = metrics["eval_loss"] / math.log(2)
        sys.stdout.write(f"held out: {bits:.4f} bits per byte after {trainer.state.global_step} steps; {folder}\n")
    return metrics


if __name__ == "__main__":
    main(sys.argv[1:])
    # A process that exits with its group alive may abort. And the group may not end before the trainer is gone: its
    # reducer, as the last owner, would hold the GIL and wait for the group's threads, one of which may want the GIL.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
