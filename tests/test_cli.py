"""The `nsattn` command: info, why, verify, bench. The training commands are in test_train.py."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import nsattn
from nsattn import dispatch
from nsattn.cli import app
from nsattn.verify import AXES, OPERATIONS, cells

GPU = torch.cuda.is_available()


def run(*arguments):
    return CliRunner().invoke(app, arguments)


def test_info_lists_versions_equations_and_support():
    result = run("info")
    assert result.exit_code == 0
    for text in (nsattn.__version__, torch.__version__, "Eq 11, 12", "kernels/attend_selected_kvmajor.py"):
        assert text in result.output
    assert dispatch.support_table() in result.output


def test_why_names_the_choice_and_the_reasons():
    result = run("why", "--heads", "40/8", "--device", "cuda", "--capability", "8.0")
    assert result.exit_code == 0
    assert "attend_selected: kvmajor\n" in result.output and "predicted 9.70 ms forward" in result.output
    hopper = run("why", "--heads", "40/8", "--device", "cuda", "--capability", "9.0", "--no-training")
    assert "attend_selected: kvmajor_sm90" in hopper.output and "backward" not in hopper.output
    assert run("why", "--capability", "nine").exit_code == 2
    refused = run("why", "--heads", "4/4", "--head-dim", "72", "--device", "cuda")
    assert "refused" in refused.output and "head dim D must be one of" in refused.output
    assert "attend_window: reference" in run("why", "--dtype", "float32", "--device", "cuda").output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("why", "--heads", "40"), "Hq/Hkv"),
        (("why", "--heads", "5/2"), "Hq/Hkv"),
        (("why", "--dtype", "int7"), "dtype must be"),
        (("bench", "attention", "--heads", "x/4"), "heads must be"),
        (("bench", "attention", "--lengths", "many"), "lengths must be"),
        (("bench", "selected", "--only", "everything"), "sets are target"),
        (("bench", "selected", "--shard", "2/2"), "shard must be"),
        (("bench", "decode", "--base", "nothing"), "base must be a commit of"),
        *((("bench", name, "--out", "."), "got the folder .,")
          for name in ("attention", "selected", "decode", "model")),
        (("bench", "plot", "nothing.json"), "is not a results file"),
        (("bench", "repeat", "nothing.json", "nothing.json"), "is not a results file"),
    ],
)
def test_bad_arguments_end_with_2(arguments, text):
    result = run(*arguments)
    assert result.exit_code == 2 and text in " ".join(result.output.split())


@pytest.mark.skipif(GPU, reason="there is a GPU here")
def test_verify_without_a_gpu_says_that_nothing_was_verified(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    result = run("verify")
    assert result.exit_code == 1 and "Nothing verified" in result.output


def test_verify_covers_every_kernel_and_every_axis(monkeypatch):
    monkeypatch.setattr(dispatch, "capability", lambda device, index: (9, 0) if device == "cuda" else None)
    for device in ("cpu", "cuda"):
        listed = list(cells(device))
        kernels = {(op, impl) for op, impls in OPERATIONS.items() for impl, cell in impls.items()
                   if cell.is_kernel and (device == "cuda" or cell.generation is None)}
        assert {(c.operation, c.impl) for c in listed} == kernels
        axes = {c.case.axis for c in listed}
        assert axes == set().union(*AXES.values())
        assert all(c.case.axis in AXES[c.operation] or c.case.name == "base" for c in listed)
    groups = {c.case.group for c in cells("cuda") if c.operation == "attend_selected"}
    assert groups >= {1, 2, 3, 4, 5, 7, 8, 16, 64}


@pytest.mark.skipif(GPU, reason="there is a GPU here")
def test_bench_without_a_gpu_times_the_reference_and_says_so(tmp_path):
    out = tmp_path / "times.json"
    result = run("bench", "attention", "--out", str(out))
    assert result.exit_code == 0 and "No GPU" in result.output
    content = json.loads(out.read_text())
    rows = content["rows"]
    assert content["environment"]["gpu"] == "none" and all(row["ok"] and row["ms"] > 0 for row in rows)
    assert {"nsa_attention", "dense causal", "attend_selected"} <= {row["op"] for row in rows}
    assert {row["impl"] for row in rows if row["who"] == "nsattn"} == {"reference"}


@pytest.mark.skipif(GPU, reason="there is a GPU here")
@pytest.mark.parametrize("bench", ["attention", "decode", "selected"])
def test_bench_beside_another_commit(bench, tmp_path, monkeypatch):
    """This checkout as the other commit: each of our times stands beside one of its."""
    from nsattn.bench import base, selected

    monkeypatch.setattr(selected, "TINY", selected.TINY[-1:])  # one process less for each of the others
    out = tmp_path / "times.json"
    result = run("bench", bench, "--out", str(out), "--base", str(base.ROOT))
    assert result.exit_code == 0, result.output
    ours = [row for row in json.loads(out.read_text())["rows"] if row["who"] == "nsattn"]
    assert ours and len([line for line in result.output.splitlines() if line.endswith("x")]) == len(ours)


def test_bench_all_says_what_is_left(tmp_path):
    result = run("bench", "all", "--out", str(tmp_path), "--limit", "0")
    assert result.exit_code == 1
    assert [line.split(":")[1] for line in result.output.splitlines() if line.startswith("left")] == [
        " selected", " attention", " decode", " model", " compiled", " pictures", " report"
    ]  # fmt: skip


@pytest.mark.skipif(GPU, reason="there is a GPU here")
def test_bench_selected_without_a_gpu_times_the_reference_and_says_so(tmp_path):
    out = tmp_path / "selected.json"
    result = run("bench", "selected", "--out", str(out), "--peers", str(tmp_path))
    assert result.exit_code == 0 and "No GPU" in result.output
    content = json.loads(out.read_text())
    assert all(row["ok"] and row["ms"] > 0 and row["set"] == "tiny" for row in content["rows"])
    assert {(row["who"], row["impl"]) for row in content["rows"]} == {
        ("nsattn", "reference"),
        ("nsattn", "auto"),
        ("torch", "math"),
    }
    assert {note["who"] for note in content["not_run"] if not note["case"]} == {"fsa", "nsa_ref", "sfnsa", "fla"}
    drawn = run("bench", "plot", str(out))
    assert drawn.exit_code == 0 and (tmp_path / "selected_groups_16x3.png").exists()
