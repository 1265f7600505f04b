"""The quality experiment at tiny size on a CPU: the comparison is fair, resumes, and reports what it measured."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "quality"
sys.path.insert(0, str(FOLDER))
quality = importlib.import_module("quality")

SHORT = ("training.max_steps=6", "training.eval_steps=3", "training.save_steps=2", "training.logging_steps=1",
         "data.length=64", "data.held_out=4")  # fmt: skip


def run(out: Path, *overrides: str) -> dict[str, dict]:
    return quality.main([str(FOLDER / "tiny.yaml"), f"training.output_dir={out}", *SHORT, *overrides])


@pytest.mark.parametrize("name", ["tiny.yaml", "small.yaml"])
def test_runs_differ_in_attention_only(name):
    """Same weights at the start; what NSA adds is below 3 % and is gates and compression; same text."""
    config = quality.read_config(str(FOLDER / name), [])
    first, *others = (dict(quality.start(config, run, 3).named_parameters()) for run in config["runs"].values())
    for other in others:
        assert all(torch.equal(p, other[key]) for key, p in first.items())
        added = {key: p.numel() for key, p in other.items() if key not in first}
        assert {key.split(".")[4] for key in added} == {"gate_proj", "compress_k", "compress_v"}
        assert sum(added.values()) < 0.03 * sum(p.numel() for p in first.values())
    assert name == "tiny.yaml" or sum(p.numel() for p in first.values()) > 30e6
    assert not {"learning_rate", "max_steps", "seed"} & {key for run in config["runs"].values() for key in run}


def test_a_stopped_command_goes_on_and_ends_like_one_without_a_stop(tmp_path, capsys):
    whole = run(tmp_path / "whole")
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "parts", "minutes=0")
    assert stopped.value.code == quality.UNFINISHED
    assert "in run full: start the command again" in capsys.readouterr().err
    assert (tmp_path / "parts" / "full" / "checkpoint-1").is_dir()
    parts = run(tmp_path / "parts")
    for name, result in whole.items():
        for key in ("curve", "held_out_curve", "held_out_bits", "by_position", "tokens", "parameters"):
            assert parts[name][key] == result[key], (name, key)
        assert [step for step, _ in result["curve"]] == [1, 2, 3, 4, 5, 6]
        # the final measurement is that of the Trainer, byte by byte
        assert result["held_out_bits"] == pytest.approx(result["held_out_curve"][-1][1], rel=1e-5)
        assert result["tokens"] == 6 * 4 * 64
    assert whole["full"]["curve"] != whole["nsa"]["curve"]
    written = json.loads((tmp_path / "whole" / "quality.json").read_text())
    assert written["runs"] == json.loads(json.dumps(whole))
    assert "| nsa | 79,896 (+2.24%) | 1,536 |" in (tmp_path / "whole" / "quality.md").read_text()
    assert (tmp_path / "whole" / "quality.png").stat().st_size > 10000

    before = (tmp_path / "whole" / "nsa" / "result.json").stat().st_mtime_ns
    assert run(tmp_path / "whole") == whole  # finished runs are read
    assert (tmp_path / "whole" / "nsa" / "result.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds a run with other settings"):
        run(tmp_path / "whole", "data.held_out=5")


def test_runs_that_start_from_a_trained_model(tmp_path):
    """The dense model is trained once, all runs start from its weights, and the report says so."""
    before = "start={attention: full, max_steps: 3, seed: 41}"
    results = run(tmp_path, before, "training.max_steps=2", "training.eval_steps=1")
    assert list(results) == ["full", "nsa"] and results["full"]["steps"] == 2
    written = json.loads((tmp_path / "quality.json").read_text())
    assert written["start"]["steps"] == 3
    assert "Before the runs: 3 steps of full attention" in (tmp_path / "quality.md").read_text()
    config = quality.read_config(str(FOLDER / "tiny.yaml"), [f"training.output_dir={tmp_path}", before])
    first, second = (quality.start(config, config["runs"]["full"], seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    with pytest.raises(ValueError, match="cannot be named"):
        run(tmp_path, "runs={start: {attention: full}}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs kernels in the interpreter")
def test_both_schedules_learn_the_same(tmp_path):
    """`qmajor` and `kvmajor` from one start: the same curve up to float32 rounding."""
    runs = "{a: {attention: nsa, impl: qmajor}, b: {attention: nsa, impl: kvmajor}, c: {attention: nsa}}"
    small = ("num_hidden_layers=1", "num_attention_heads=2", "num_key_value_heads=1", "hidden_size=32")
    results = run(
        tmp_path, f"runs={runs}", *(f"model.{size}" for size in small), "model.nsa_num_selected=3", "data.held_out=1",
        "training.max_steps=1", "training.eval_steps=1", "training.warmup_steps=0",
        "training.per_device_train_batch_size=1",
    )  # fmt: skip
    assert [r["impl"] for r in results.values()] == ["qmajor", "kvmajor", "auto"]
    for other in ("b", "c"):
        for key in ("curve", "by_position"):
            want, got = torch.tensor(results["a"][key]), torch.tensor(results[other][key])
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
