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


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def train(out: Path, *overrides: str, launcher: tuple[str, ...] = ()) -> dict[int, float]:
    """Loss by step of `examples/train_hf/train.py`, and that of the held-out part under -1."""
    command = [sys.executable, *launcher, str(TRAIN / "train.py"), str(TRAIN / "tiny.yaml")]
    command += [f"training.output_dir={out}", *overrides]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # two processes would want two GPUs
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


SIX_STEPS = ("training.lr_scheduler_type=constant", "training.save_steps=3", "training.max_steps=6")
HALF = "training.per_device_train_batch_size=4"


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict[int, float]:
    """Losses of one process."""
    return train(tmp_path_factory.mktemp("one"), *SIX_STEPS)


def test_two_processes_equal_one(tmp_path, one):
    """Data parallel over gloo: every parameter has a gradient on every rank, losses are those of one process."""
    two = train(tmp_path / "two", *SIX_STEPS, HALF, launcher=TORCHRUN)
    assert one.keys() == two.keys()
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, rel=2e-3), step


# accelerate shards on accelerators only, and replicates on CPUs whatever the file says. This lets it shard.
FSDP_ON_CPU = """
import runpy, sys, torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
torch.distributed.init_process_group("gloo")
PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_fsdp2_by_its_file_goes_on_and_equals_one_process(tmp_path, one):
    """`accelerate launch --config_file fsdp2.yaml` on two processes: sharded, stopped, resumed, the losses of one."""
    (tmp_path / "shard.py").write_text(FSDP_ON_CPU)
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(TRAIN / "fsdp2.yaml"), "--num_processes", "2",
                "--main_process_port", "0", "--mixed_precision", "no", str(tmp_path / "shard.py"))  # fmt: skip
    part = train(tmp_path / "two", *SIX_STEPS, HALF, "training.max_steps=3", launcher=launcher)
    assert (tmp_path / "two" / "checkpoint-3" / "pytorch_model_fsdp.bin").exists()  # it did shard
    two = train(tmp_path / "two", *SIX_STEPS, HALF, launcher=launcher)
    assert {step: loss for step, loss in part.items() if step > 0}.items() <= two.items()  # it did not start again
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
