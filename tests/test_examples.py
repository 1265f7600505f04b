"""The examples run on a CPU at tiny sizes, as a user would start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "examples" / "train_hf"


def train(out: Path, *overrides: str, processes: int = 1) -> dict[int, float]:
    """Loss by step of `examples/train_hf/train.py`, and that of the held-out part under -1."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(TRAIN / "train.py"), str(TRAIN / "tiny.yaml")]
    command += [f"training.output_dir={out}", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return losses | {-1: next(line["eval_loss"] for line in reversed(lines) if "eval_loss" in line)}


def test_training_lowers_the_loss_and_goes_on_where_it_stopped(tmp_path):
    whole = train(tmp_path / "whole")
    assert whole[30] < 0.75 * whole[1] and 2 < whole[-1] < 4
    assert (tmp_path / "whole" / "loss.png").stat().st_size > 5000
    part = train(tmp_path / "part", "training.lr_scheduler_type=constant", "training.max_steps=20")
    more = train(tmp_path / "part", "training.lr_scheduler_type=constant", "training.max_steps=30")
    straight = train(tmp_path / "straight", "training.lr_scheduler_type=constant", "training.max_steps=30")
    assert {step: loss for step, loss in part.items() if step > 0}.items() <= more.items()
    assert more == straight  # the same losses, digit for digit, as without a stop


def test_two_processes_equal_one(tmp_path):
    """Data parallel over gloo: every parameter has a gradient on every rank, losses are those of one process."""
    options = ("training.max_steps=6", "training.save_steps=1000")
    one = train(tmp_path / "one", *options)
    two = train(tmp_path / "two", *options, "training.per_device_train_batch_size=4", processes=2)
    assert one.keys() == two.keys()
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, rel=2e-3), step


def test_full_attention_beside_it(tmp_path):
    losses = train(tmp_path / "full", "attention=full", "training.max_steps=15", "training.save_steps=1000")
    assert losses[15] < losses[1]


def test_unknown_settings_are_named(tmp_path):
    command = [sys.executable, str(TRAIN / "train.py"), str(TRAIN / "tiny.yaml"), "model.heads=3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode and "model.heads is not in" in done.stderr
