"""The pass key example at tiny size on a CPU: windows are as described, keys are counted, a stopped run goes on."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "passkey"
sys.path.insert(0, str(FOLDER))
passkey = importlib.import_module("passkey")

STAGES = "[{steps: 3, lengths: [256], keys: 2}, {steps: 3, lengths: [128, 256], keys: 1}]"
SHORT = ("data.tokens=256", f"data.stages={STAGES}", "evaluation.lengths=[128]", "evaluation.depths=3",
         "evaluation.samples=2", "training.logging_steps=1", "training.save_steps=2")  # fmt: skip


def config(*overrides: str, name: str = "tiny.yaml") -> dict:
    return passkey.read_config(str(FOLDER / name), list(overrides))


def text_of(ids: torch.Tensor) -> str:
    return bytes(ids.tolist()).decode(errors="replace")


@pytest.fixture(scope="module")
def corpus():
    return passkey.load_corpus(seq_len=16384)


def test_a_window_is_text_with_statements_and_ends_with_their_questions():
    text = b"".join(b"%04d" % i for i in range(250))
    ids, kinds = passkey.window(text, 400, [("", "12345"), ("maple", "00077")], [0.5, 0.25], [1, 0])
    whole = text_of(ids)
    first, second = "\nThe pass key of maple is 00077. Remember it.\n", "\nThe pass key is 12345. Remember it.\n"
    asked = ("\nWhat is the pass key of maple? The pass key of maple is 00077."
             "\nWhat is the pass key? The pass key is 12345.")  # fmt: skip
    room = 400 - len(first + second + asked)
    quarter, half = round(room / 4), round(room / 2)
    plain = text.decode()[:room]
    assert whole == plain[:quarter] + first + plain[quarter:half] + second + plain[half:] + asked
    assert text_of(ids[kinds == passkey.STATED]) == "0007712345" == text_of(ids[kinds == passkey.ASKED])
    assert kinds.shape == ids.shape == (400,)
    with pytest.raises(ValueError, match="2 keys do not fit into 150 bytes"):
        passkey.window(text, 150, [("", "12345"), ("oak", "23456")], [0, 1], [0, 1])


@pytest.mark.parametrize("name", ["tiny.yaml", "small.yaml"])
def test_steps_hold_the_same_bytes_and_repeat_from_the_seed(corpus, name):
    """In every stage: all bytes of a step, keys of training only, the answer to every question in the window."""
    settings = config(name=name)
    stages, before = settings["data"]["stages"], 0
    for stage in stages:
        ids, kinds = passkey.batch(settings, corpus, before)
        again = passkey.batch(settings, corpus, before)
        assert torch.equal(ids, again[0]) and torch.equal(kinds, again[1])
        assert ids.numel() == settings["data"]["tokens"] and ids.shape[1] in stage["lengths"]
        for row, kind in zip(ids, kinds, strict=True):
            stated, asked = (text_of(row[kind == which]) for which in (passkey.STATED, passkey.ASKED))
            keys = [{digits[i : i + 5] for i in range(0, len(digits), 5)} for digits in (stated, asked)]
            assert keys[0] == keys[1] and len(stated) == len(asked) == 5 * stage["keys"]
            assert keys[0] <= set(passkey.TRAINING_KEYS.tolist())
            assert text_of(row).count("\nWhat is the pass key? The pass key is ") == 1
            assert text_of(row).endswith(".")
        before += stage["steps"]
        lengths = {passkey.batch(settings, corpus, step)[0].shape[1] for step in range(before - 20, before)}
        assert lengths == set(stage["lengths"])
    with pytest.raises(ValueError, match="after the last stage"):
        passkey.batch(settings, corpus, before)
    others = [passkey.batch(settings, corpus, 1)[0], passkey.batch(config("training.seed=1", name=name), corpus, 0)[0]]
    first = passkey.batch(settings, corpus, 0)[0]
    assert not any(torch.equal(first, other) for other in others)
    assert max(max(stage["lengths"]) for stage in stages) == settings["model"]["max_position_embeddings"]


def test_the_test_asks_for_new_keys_in_held_out_text(corpus):
    assert not set(passkey.TEST_KEYS.tolist()) & set(passkey.TRAINING_KEYS.tolist())
    held_out = text_of(corpus.held_out)
    for depth in (0.0, 0.5, 1.0):
        ids, kinds = passkey.test_windows(corpus, 2048, depth, 3, 42)
        assert ids.shape == (3, 2048)
        for row, kind in zip(ids, kinds, strict=True):
            key = text_of(row[kind == passkey.ASKED])
            statement = f"\nThe pass key is {key}. Remember it.\n"
            before, _, after = text_of(row).partition(statement)
            text, _, rest = after.rpartition("\nWhat is the pass key?")
            assert key in passkey.TEST_KEYS and rest == f" The pass key is {key}."
            assert before + text in held_out and len(before) == round(depth * len(before + text))


class Copies(torch.nn.Module):
    """Knows the last `right` of the keys of a batch, or all digits but one of them, and nothing else."""

    def __init__(self, right: int) -> None:
        super().__init__()
        self.right, self.weight = right, torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, use_cache: bool):
        logits = torch.nn.functional.one_hot(input_ids.roll(-1, 1), 256).float() * 20
        logits[: len(input_ids) - self.right, -3] = 0  # the last digit, which the full stop follows
        logits[:, :-50] = 0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("right, share", [(0, 0.0), (3, 0.75), (4, 1.0)])
def test_a_key_counts_when_all_digits_are_right(corpus, right, share):
    cells = passkey.evaluate(Copies(right), config("data.tokens=2048"), corpus)
    shares = {cell["length"]: cell for cell in cells}
    assert len(cells) == 10 and [cell["depth"] for cell in cells[:5]] == [0, 0.25, 0.5, 0.75, 1]
    assert shares[512]["keys"] == share and shares[512]["digits"] == pytest.approx(0.8 + 0.2 * share)
    assert 7.2 < shares[512]["text"] < 7.4  # eight bits a byte, none for the last 49 of 511


def test_a_stopped_command_goes_on_and_ends_like_one_without_a_stop(tmp_path, capsys):
    def run(name: str, *overrides: str) -> dict:
        command = [str(FOLDER / "tiny.yaml"), f"training.output_dir={tmp_path / name}", *SHORT, *overrides]
        return passkey.main(command)

    whole = run("whole")
    clock = iter(range(1000))  # every look at the clock is a second later
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passkey, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
        with pytest.raises(SystemExit) as stopped:
            run("parts", "minutes=0.1")
    assert stopped.value.code == passkey.UNFINISHED
    assert "start the command again" in capsys.readouterr().err
    parts = run("parts")
    assert [line["step"] for line in whole["log"]] == [1, 2, 3, 4, 5, 6]
    for key in whole.keys() - {"seconds"}:
        assert parts[key] == whole[key], key
    assert [line["length"] for line in whole["log"]][:3] == [256] * 3
    assert {line["length"] for line in whole["log"]} == {128, 256}
    assert run("whole") == whole  # a finished run is only measured again
    with pytest.raises(ValueError, match="holds a run with other settings"):
        run("whole", "data.answer_weight=5")

    folder = tmp_path / "whole" / "nsa"
    assert json.loads((folder / "passkey.json").read_text()) == whole
    table = (folder / "passkey.md").read_text()
    assert "**0.0%** of all keys retrieved, 2 for each length and depth" in table and "| 50% | 0% |" in table
    assert (folder / "passkey.png").stat().st_size > 10000


def test_full_attention_beside_it(tmp_path):
    stages = "data.stages=[{steps: 12, lengths: [256], keys: 2}]"
    result = passkey.main(
        [str(FOLDER / "tiny.yaml"), f"training.output_dir={tmp_path}", *SHORT, stages, "attention=full"]
    )
    assert result["log"][-1]["text"] < 0.9 * result["log"][0]["text"] and result["parameters"] < 400_000
    assert (tmp_path / "full" / "passkey.png").exists()
