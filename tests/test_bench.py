"""`nsattn bench selected`: cases, floors, check, peers, results file and pictures. The commands are in test_cli.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import nsattn
from nsattn.bench import base, peers, repeat, selected, selected_summary, timing, warm
from nsattn.bench.cases import (
    ALONE,
    BASE,
    PAPER,
    SELECTIONS,
    SETS,
    SMALL,
    Case,
    choose,
    kvmajor_floor_ms,
    selected_keys,
    target_ms,
)
from nsattn.bench.peers import fsa
from nsattn.bench.session import Session
from nsattn.bench.timing import Row, floor_ms, interleave, merge, percentiles, read_rows, save
from nsattn.bench.truth import Truth
from nsattn.bench.warm import fill, kinds
from nsattn.cli import app
from nsattn.environment import commit
from nsattn.plan import make_plan

DIRECTIONS = ("forward", "backward")
ISSUE_FIELDS = "who op impl T Hq Hkv D Dv B N selection direction ms p20 p80 floor_ms peak_gib ok commit".split()
SHAPE = {"T": 65536, "Hkv": 4, "D": 128, "Dv": 128, "B": 64, "N": 16, "selection": "random", "commit": "abc"}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    """What a bench does without a GPU, also where there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for processes that a test starts


def row(who="nsattn", impl="auto", group=1, direction="forward", ms=1.0, ok=True, **more):
    times = {"ms": ms, "p20": 0.9 * ms, "p80": 1.1 * ms, "floor_ms": 0.1, "peak_gib": 0.5, "ok": ok}
    values = {"op": "attend_selected", "set": "target", **SHAPE, **more}
    return Row(who=who, impl=impl, Hq=group * values["Hkv"], direction=direction, **times, **values)


def test_rows_have_the_fields_that_were_agreed_first():
    assert [field.name for field in fields(Row)][: len(ISSUE_FIELDS)] == ISSUE_FIELDS


def test_sets_cover_what_the_targets_speak_of():
    assert {(c.group, c.block, c.num_selected) for c in SETS["target"]} == {
        (g, *b) for g in (1, 2, 3, 4, 5, 7, 8, 16) for b in ((64, 16), (128, 8))
    }
    assert {c.length for c in SETS["lengths"]} == {4096, 8192, 16384, 32768, 131072}
    assert {(c.head_dim, c.v_head_dim) for c in SETS["shapes"]} == {(128, 128), (64, 64), (192, 128), (256, 256)}
    assert {c.selection for cases in SETS.values() for c in cases} == set(SELECTIONS)
    assert all(c.tokens == 65536 for c in SETS["packed"])
    for cases in SETS.values():
        assert len(set(cases)) == len(cases)
        for case in cases:
            assert not case.peers or case.selection in ("random", "recorded")


def test_choose():
    everything = [(name, case) for name, cases in SETS.items() for case in cases]
    assert [(name, case) for name, case in everything if name != "paper"] == [x for x in choose("") if x[0] != "paper"]
    assert choose("packed, million") == [(n, c) for n in ("packed", "million") for c in SETS[n]]
    with pytest.raises(ValueError, match="sets are target"):
        choose("packed,unpacked")


def test_the_papers_figure_is_whole_and_nothing_of_it_is_timed_twice():
    """By itself all 40 shapes; beside the other sets each shape once, and always with peers."""
    assert {(c.length, c.group, c.block, c.num_selected, c.num_kv_heads) for _, c in choose("paper")} == {
        (1024 * T, g, *b, 4) for T in (8, 16, 32, 64) for g in (1, 2, 4, 5, 8) for b in ((64, 16), (128, 8))
    }
    beside = choose("target,lengths,paper")
    for case in PAPER:
        assert [name for name, other in beside if replace(other, slack=None) == case] != [], case
        assert sum(other.shape == case.shape and other.selection == case.selection for _, other in beside) == 1, case
    assert 0 < sum(name == "paper" for name, _ in beside) < len(PAPER) == len(choose("paper")) == 40


def test_targets_and_floors():
    for g in (1, 4, 16):
        case = replace(BASE, group=g, slack=1.0)
        assert target_ms(case, "forward") == pytest.approx(0.15 + 0.60 * g)
        assert target_ms(case, "backward") == pytest.approx(0.2 + 1.10 * g)
        assert kvmajor_floor_ms(case, "forward") == pytest.approx(0.505 * g, rel=1e-2)
    assert target_ms(replace(BASE, length=8192, slack=1.15), "forward") == pytest.approx(2.55 / 8 * 1.15)
    assert target_ms(replace(BASE, head_dim=64, v_head_dim=64, slack=1.0), "forward") == pytest.approx(2.55 / 2)
    assert target_ms(ALONE, "forward") is None and target_ms(replace(SMALL, slack=1.0), "forward") is None
    assert floor_ms(780e12, 0) == pytest.approx(1e3) and floor_ms(0, 4.25e12) == pytest.approx(1e3)


@pytest.mark.parametrize("name", [name for name in SELECTIONS if name != "recorded"])
def test_selected_keys_counts_what_the_reference_attends_to(name):
    """The reference's softmax over equal scores gives each visible key 1 / number, so sums of 1 / p count them."""
    config = nsattn.NSAConfig(slc_block=16, num_selected=4)
    plan = make_plan(torch.tensor([0, 70, 75], dtype=torch.int32), 75, config=config, max_seqlen=70)
    chosen = SELECTIONS[name](plan, 2)
    assert chosen.shape == (75, 2, 4) and chosen.dtype == torch.int32
    q, k = torch.zeros(75, 2, 4), torch.zeros(75, 2, 4)
    lse = nsattn.attend_selected(q, k, k, chosen, plan=plan, impl="reference", return_lse=True)[1]
    assert selected_keys(chosen, plan) == round(float(lse.double().exp().sum()))


def test_recorded_selections_spread_over_the_heads():
    plan = make_plan(torch.tensor([0, 8192], dtype=torch.int32), 8192, config=nsattn.NSAConfig(), max_seqlen=8192)
    heads = SELECTIONS["recorded"](plan, 4)
    assert heads.shape == (8192, 4, 16) and len({tuple(h.flatten().tolist()) for h in heads[-100:].unbind(1)}) == 4
    short = make_plan(torch.tensor([0, 64], dtype=torch.int32), 64, config=nsattn.NSAConfig(), max_seqlen=64)
    with pytest.raises(ValueError, match="recorded lengths are 8192, 32768, got 64"):
        SELECTIONS["recorded"](short, 4)


def right(q, k, v, problem):
    return nsattn.attend_selected(q, k, v, problem.selection, plan=problem.plan, impl="reference")


@pytest.mark.parametrize("case", [SMALL, replace(SMALL, length=64, sequences=3, v_head_dim=16)], ids=str)
def test_the_check_finds_wrong_outputs_and_wrong_gradients(case):
    problem = selected.make_problem(case, "cpu")
    truth = Truth(problem, "attend_selected")
    assert truth.check(lambda *x: right(*x, problem)) == (True, True)
    assert truth.check(lambda *x: right(*x, problem) * 1.001) == (False, False)
    assert truth.check(lambda q, k, v: right(q, k * 1.001 - 0.001 * k.detach(), v, problem)) == (True, False)
    assert truth.check(lambda q, k, v: right(q, k, v, problem) + float("nan")) == (False, True)
    leak = torch.zeros_like(problem.v, requires_grad=True)
    leak.data[~truth.read] = 1e-3  # a gradient where no checked row reads

    class Leaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            return v.clone()

        @staticmethod
        def backward(ctx, dv):
            return dv + leak

    if not truth.read.all():
        assert truth.check(lambda q, k, v: right(q, k, Leaks.apply(v), problem)) == (True, False)


def test_the_check_of_dense_attention_knows_dense_attention():
    problem = selected.make_problem(SMALL, "cpu")
    dense = peers.peer("dense").prepare(problem)
    assert Truth(problem, "dense causal").check(dense) == (True, True)
    assert Truth(problem, "attend_selected").check(dense) == (False, False)


def test_peers_that_are_not_here_are_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)  # not installed
    loaded, missing = selected._load(tmp_path, "cuda")
    assert {peer.WHO for peer in loaded} == {"torch"}
    assert [note["who"] for note in missing] == ["fsa", "nsa_ref", "sfnsa", "fla"]
    assert all("git clone https://" in note["reason"] or "pip install" in note["reason"] for note in missing)
    source = tmp_path / fsa.FOLDER / "fsa" / "ops"
    source.mkdir(parents=True)
    (source / "FSA_topk_sparse_attention.py").write_text(f"x = 1\n{fsa.STRAY_COMMA}\n")
    with pytest.raises(peers.Missing, match="remove the last comma"):
        fsa.load(tmp_path)


def test_peers_refuse_what_they_cannot_run():
    for name, case in (
        ("fsa", replace(BASE, head_dim=192)),
        ("nsa_ref", replace(BASE, head_dim=192)),
        ("fla", replace(BASE, group=8)),
        ("fla", replace(BASE, group=24)),
        ("dense", replace(BASE, sequences=2)),
        ("dense", replace(BASE, selection="recorded")),
    ):
        assert peers.peer(name).refuses(case), name
    for name in ("fsa", "nsa_ref", "sfnsa", "fla", "dense"):
        assert not peers.peer(name).refuses(replace(BASE, group=16)), name


class Fake(SimpleNamespace):
    """A peer; a key of a dict, as modules are."""

    CAPTURES = False
    __hash__ = object.__hash__


def test_a_wrong_peer_is_timed_and_marked_and_a_crashing_one_is_listed(tmp_path, monkeypatch):
    def crash(problem):
        raise RuntimeError("out of order")

    good = lambda problem: lambda *x: right(*x, problem)  # noqa: E731
    wrong = lambda problem: lambda *x: 2 * right(*x, problem)  # noqa: E731
    made = [("good", good, ""), ("wrong", wrong, ""), ("crashes", crash, ""), ("refuses", good, "too small")]
    loaded = {Fake(WHO=w, prepare=p, refuses=lambda case, reason=r: reason): "variant" for w, p, r in made}
    monkeypatch.setattr(selected, "_load", lambda folder, device: (loaded, []))
    monkeypatch.setattr(selected, "TINY", (SMALL, replace(SMALL, length=64, peers=False)))
    out, said = tmp_path / "deep" / "selected.json", []
    rows = selected.run(out=str(out), echo=said.append)
    assert {(r.who, r.ok) for r in rows} == {("nsattn", True), ("good", True), ("wrong", False)}
    assert {(r.impl, r.direction) for r in rows if r.who == "nsattn"} == {
        (impl, direction) for impl in ("reference", "auto") for direction in ("forward", "backward")
    }
    content = json.loads(out.read_text())
    assert [(n["who"], n["reason"]) for n in content["not_run"]] == [
        ("refuses", "too small"),
        ("crashes", "RuntimeError: out of order"),
    ]
    assert all(r["set"] == "tiny" and r["impl"] != "" and r["ms"] > 0 for r in content["rows"])
    assert any("No GPU" in line for line in said) and any("out of order" in line for line in said)
    assert not any(r.who == "good" and r.T == 64 for r in rows)  # a case without peers


def test_a_split_run_gives_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(selected, "TINY", (SMALL, replace(SMALL, group=1), replace(SMALL, length=64)))
    out = str(tmp_path / "selected.json")
    for i in range(2):
        selected.run(out=out, shard=(i, 2), echo=lambda line: None)
    split = read_rows(out)
    assert len(split) == 3 * 3 * 2 and len({(r.who, r.impl, r.T, r.Hq, r.direction) for r in split}) == len(split)
    selected.run(out=out, shard=(0, 2), echo=lambda line: None)
    assert len(read_rows(out)) == len(split)  # the same shapes again replace their rows
    notes = json.loads((tmp_path / "selected.json").read_text())["not_run"]
    assert len({tuple(n.values()) for n in notes}) == len(notes)


def test_each_case_can_be_run_alone():
    for name, case in choose(""):
        only, members, shard, part, *_ = selected._alone(name, case, Path("peers"))
        assert (only, shard) == ("--only", "--shard")
        i, n = map(int, part.split("/"))
        assert choose(members)[i::n] == [(name, case)]


def test_compilers_run_first_once_for_each_kind_of_shape(monkeypatch):
    chosen = kinds(choose(""))
    assert len(chosen) < len(choose("")) / 3
    dims = {(c.group, c.num_kv_heads, c.block, c.num_selected, c.head_dim, c.dtype) for _, c in choose("")}
    assert {(c.group, c.num_kv_heads, c.block, c.num_selected, c.head_dim, c.dtype) for _, c in chosen} == dims
    assert all(c.peers for _, c in chosen if c.group == 16 and c.num_selected == 16)  # which has cases without, too

    said, ran = [], []
    monkeypatch.setattr(warm, "run_bench", lambda *options, **more: ran.append(base.run_bench(*options, **more)))
    tiny = [("tiny", case) for case in selected.TINY]
    options = lambda named: selected._alone(*named, Path("nowhere"))  # noqa: E731
    fill(tiny[:1], options, seconds=60, echo=said.append)
    fill(tiny, options, seconds=60, echo=said.append)
    assert len(said) == 1 and said[0].startswith("compiled for 2 kinds of shapes, ")
    assert [done.returncode for done in ran] == [0, 0]
    assert all("reference          forward ok, backward ok" in done.stdout for done in ran)
    ran.clear()
    fill(tiny, options, seconds=0, echo=said.append)  # stopped at once, and that is no error
    assert not ran


def test_check_only_times_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(selected, "TINY", (SMALL,))
    said = []
    assert selected.run(out=str(tmp_path / "x.json"), check_only=True, echo=said.append) == []
    assert not (tmp_path / "x.json").exists() and any("forward ok, backward ok" in line for line in said)


def test_rows_are_merged_by_what_they_measure(tmp_path):
    out = str(tmp_path / "rows.json")
    save([row(ms=1.0), row(group=2, ms=2.0)], out)
    merged = merge([row(ms=3.0), row(direction="backward", ms=4.0)], out)
    assert [(r.Hq, r.direction, r.ms) for r in merged] == [
        (8, "forward", 2.0),
        (4, "forward", 3.0),
        (4, "backward", 4.0),
    ]
    (tmp_path / "bad.json").write_text('{"rows": [{"who": "x"}]}')
    for name in ("bad.json", "none.json"):
        with pytest.raises(ValueError, match="is not a results file"):
            read_rows(tmp_path / name)


def test_a_file_holds_the_times_of_one_machine(tmp_path):
    pytest.importorskip("transformers")
    from nsattn.bench import attention, decode, model

    out = tmp_path / "times.json"
    out.write_text(json.dumps({"environment": {"gpu": "another"}, "rows": []}))
    for run in (attention.run, decode.run, model.run, selected.run):
        with pytest.raises(ValueError, match=r"out must hold times of this machine .* \(gpu: another\)"):
            run(out=str(out), echo=lambda line: None)


def test_percentiles_and_turns():
    assert percentiles([1.0]) == (1.0, 1.0, 1.0)
    assert percentiles([float(x) for x in range(11)]) == (5.0, 2.0, 8.0)
    turns = []
    times = interleave([lambda: turns.append("a"), lambda: turns.append("b")], "cpu", rounds=2)
    assert "".join(turns) == "aaabbbaaabbb" and all(low <= ms <= high for ms, low, high in times)


def results(tmp_path):
    """A file as a whole run would write it, with numbers from thin air."""
    rows = []
    for direction in ("forward", "backward"):
        for B, N in ((64, 16), (128, 8)):
            for g in (1, 4, 16):
                shape = {"direction": direction, "group": g, "B": B, "N": N}
                rows += [row(ms=0.1 + 0.6 * g, **shape), row(impl="kvmajor", ms=g, **shape)]
                rows += [row("fsa", "x", ms=5.0 * g, **shape), row("sfnsa", "x", ms=14.0, ok=g != 4, **shape)]
        for T in (4096, 16384):
            shape = {"direction": direction, "group": 4, "T": T, "set": "lengths"}
            rows += [row(ms=T / 2e4, **shape), row(impl="auto graph", ms=T / 4e4, **shape)]
            rows.append(row("torch", "cudnn", op="dense causal", ms=(T / 2e4) ** 2, **shape))
    path = tmp_path / "selected.json"
    save(rows, str(path))
    return path


def test_pictures(tmp_path):
    from nsattn.bench.plots import draw

    names = ["selected_groups_64x16.png", "selected_groups_128x8.png", "selected_lengths.png"]
    written = draw(results(tmp_path))
    assert [path.name for path in written] == names and all(path.stat().st_size > 10_000 for path in written)
    save([row(set="skews")], str(tmp_path / "few.json"))
    with pytest.raises(ValueError, match="no rows of the sets"):
        draw(tmp_path / "few.json")


def test_summary(tmp_path):
    lines = selected_summary(results(tmp_path)).splitlines()
    assert lines[0] == "| (B, N) | G | target | nsattn `auto` | fsa | nsa_ref | sfnsa | fla | torch |"
    assert lines[3] == "| (64, 16) | 4 | 2.55 / 4.60 | 2.50 / 2.50 | 20.00 / 20.00 |  | 14.00 / 14.00 (wrong) |  |  |"
    assert len(lines) == 2 + 6 and {line.count("|") for line in lines} == {10}


def test_other_head_dims(tmp_path):
    """CUDA graphs of our schedules at head dims other than 128."""
    wide = {"D": 192, "impl": "auto graph"}
    rows = [row(), row(**wide, ms=3.0), row(**wide, ms=9.0, direction="backward", ok=False), row(D=192, ms=1.0)]
    save(rows, str(tmp_path / "selected.json"))
    lines = selected.head_dims(tmp_path / "selected.json").splitlines()
    assert lines[2:] == ["| 192 / 128 | 4/4 | 65536 | (64, 16) | 3.00 / 9.00 (wrong) |  |  |"]


def test_cases_print_their_shape():
    assert str(Case(sequences=2, length=128, v_head_dim=64)) == "T=2x128 16/4 D=128/64 (B,N)=(64,16) bfloat16 random"


def test_decode_runs_without_a_gpu(tmp_path):
    """The reference at a tiny size, marked as such, checked, and merged into what is there."""
    from nsattn.bench import decode

    said, out = [], str(tmp_path / "decode.json")
    rows = decode.run(out=out, rounds=1, echo=said.append)
    assert "No GPU" in said[0] and {(r.who, r.impl) for r in rows} == {
        ("nsattn", "reference"), ("nsattn", "reference paged"), ("torch", "dense math")
    }
    assert all(r.ok and r.op == "decode" and r.ms > 0 for r in rows)
    assert read_rows(out) == rows
    decode.run(out=out, rounds=1, echo=said.append)
    assert len(read_rows(out)) == len(rows)


def theirs(q, k, v, l, d, B, N, cu, cu_cmp, longest, longest_cmp, scale, init, local, parallel_topk_compute):
    """FSA's compressed attention and selection, by what ours give, in its form."""
    plan = make_plan(cu, len(q), config=nsattn.NSAConfig(l, d, B, N, 512, init, local), max_seqlen=longest)
    assert torch.equal(plan.cu_cmp, cu_cmp) and longest_cmp == len(k) and not parallel_topk_compute
    o, lse = nsattn.attend_compressed(q, k, v, plan=plan, softmax_scale=scale, return_lse=True)
    return o, nsattn.select_blocks(q, k, lse, plan=plan, softmax_scale=scale).transpose(0, 1)


@pytest.mark.parametrize("fault", ["", "values", "gradients", "blocks", "crash"])
def test_branches_of_a_peer_are_checked_each_by_itself(tmp_path, monkeypatch, fault):
    """Through the real adapter: what is wrong is timed and marked, what raises is listed, the rest is right."""
    from nsattn.bench import attention
    from nsattn.bench.peers import fsa_branches

    def compressed(q, k, v, *sizes):
        k = k * 1.001 - 0.001 * k.detach() if fault == "gradients" else k
        o = theirs(q, k, v, *sizes[:2], 64, 16, *sizes[2:], 1, 2, False)[0]
        return (2 if fault == "values" else 1) * o, None

    def both(*arguments, init_blocks, local_blocks, **options):
        o, blocks = theirs(*arguments, init_blocks, local_blocks, **options)
        return o, (1 if fault == "blocks" else 0) + blocks

    def window(plan):
        assert fault != "crash", "no window today"
        return lambda q, k, v: nsattn.attend_window(q, k, v, plan=plan)

    module = SimpleNamespace(CompressedAttention=SimpleNamespace(apply=compressed), compressed_attention=both)
    monkeypatch.setitem(sys.modules, fsa_branches.MODULE, module)
    monkeypatch.setattr(fsa_branches, "window", window)
    selection = Fake(WHO="fsa", prepare=lambda problem: lambda *x: right(*x, problem))
    monkeypatch.setattr(attention, "_load", lambda folder, device: ([fsa_branches, selection], []))
    out, said = str(tmp_path / "attention.json"), []
    rows = attention.run(out=out, peers=tmp_path, echo=said.append)
    mine = {(r.op, r.direction): r.ok for r in rows if r.who == "fsa"}
    branches = ("attend_compressed", "attend_selected", "attend_window")
    want = {(op, direction): True for op in branches for direction in DIRECTIONS}
    want[fsa_branches.BOTH, "forward"] = fault != "blocks"
    want["attend_compressed", "forward"] = fault != "values"
    want["attend_compressed", "backward"] = fault not in ("values", "gradients")
    if fault == "crash":
        del want["attend_window", "forward"], want["attend_window", "backward"]
    assert mine == want and all(r.ok for r in rows if r.who != "fsa"), said[-4:]
    notes = json.loads(Path(out).read_text())["not_run"]
    assert [(n["who"], n["impl"]) for n in notes] == [("fsa", "attend_window")] * (fault == "crash")
    attention.run(out=out, echo=said.append)  # without peers: theirs and what is said of them stay
    assert json.loads(Path(out).read_text())["not_run"] == notes
    assert {(r.op, r.direction) for r in read_rows(out) if r.who == "fsa"} == set(want)


@pytest.mark.parametrize("fault", ["", "wrong", "crash"])
def test_models_with_the_attention_of_a_peer(monkeypatch, fault):
    """Through the real adapter, training and prefill: it is what runs, it is checked, and what raises is left out."""
    pytest.importorskip("transformers")
    from nsattn.bench import model
    from nsattn.bench.peers import fsa_branches

    called = []

    def both(*arguments, init_blocks, local_blocks, **options):
        return theirs(*arguments, init_blocks, local_blocks, **options)

    def selected(q, k, v, index, block, cu, cu_k, longest, longest_k, scale):
        assert fault != "crash", "out of order"
        assert len(q) == len(k) == longest == longest_k == 96 and torch.equal(cu, cu_k) and block == 16
        called.append(q.requires_grad)
        config = nsattn.NSAConfig(8, 4, block, index.shape[-1], 20)
        plan = make_plan(cu, len(q), config=config, max_seqlen=longest)
        o = nsattn.attend_selected(q, k, v, index.transpose(0, 1).contiguous(), plan=plan, softmax_scale=scale)
        return 2 * o if fault == "wrong" else o

    monkeypatch.setitem(sys.modules, fsa_branches.MODULE, SimpleNamespace(compressed_attention=both))
    window = lambda plan: lambda q, k, v: nsattn.attend_window(q, k, v, plan=plan)  # noqa: E731
    monkeypatch.setattr(fsa_branches, "window", window)
    monkeypatch.setattr(fsa, "selected", lambda: selected)
    monkeypatch.setattr(model, "_load", lambda folder, device, echo: ["fsa"])
    said = []
    rows = model.run(peers=Path("here"), echo=said.append)
    mine = [r for r in rows if r.attention == "fsa"]
    assert all(r.ok for r in rows if r.attention != "fsa") and nsattn.api.nsa_attention is nsattn.nsa_attention
    if fault == "crash":
        assert not mine and any("fsa not run: AssertionError: out of order" in line for line in said)
        return
    assert {r.phase for r in mine} == {"train", "prefill"} and {r.who for r in mine} == {"fsa"}
    assert {r.ok for r in mine} == {fault == ""} and set(called) == {True, False}
    assert len(model.ratios(rows, "fsa", "auto", "prefill")) == (fault == "")


def test_branches_of_a_peer_that_is_not_here_are_named(tmp_path):
    from nsattn.bench import attention

    loaded, missing = attention._load(tmp_path, "cuda")
    assert not loaded and [note["who"] for note in missing] == ["fsa", "fsa", "nsa_ref"]
    assert all("git clone https://" in note["reason"] for note in missing)
    assert {note["reason"] for note in attention._load(tmp_path, "cpu")[1]} == {"needs a GPU"}


def test_the_papers_figure_has_its_branches():
    """Each of its lengths and head counts is timed in full or by its branches, none twice."""
    from nsattn.bench.attention import PAPER_SHAPES, SHAPES

    assert {(c.length, c.num_heads, c.num_kv_heads) for c in PAPER} <= {*SHAPES, *PAPER_SHAPES}
    assert len({*SHAPES, *PAPER_SHAPES}) == len(SHAPES) + len(PAPER_SHAPES)


def test_another_commit_is_timed_beside_this_one(tmp_path, monkeypatch):
    """A commit of a repository and a folder with a checkout, both with a bench of their own; nothing of it is lost."""
    package = tmp_path / "repository" / "nsattn"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        f"rows = {[asdict(row(ms=3.0)), asdict(row('torch')), asdict(row(group=2))]}\n"
        "if sys.argv[2] != 'selected': sys.exit('│ no such bench │\\n╰───╯')\n"
        "Path(sys.argv[sys.argv.index('--out') + 1]).write_text(json.dumps({'rows': rows, 'argv': sys.argv}))\n"
    )
    git = ["git", "-C", str(package.parent), "-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(base, "ROOT", package.parent)
    said, out = [], str(tmp_path / "rows.json")
    for revision in ("HEAD", str(package.parent)):
        with base.checkout(revision) as other:
            assert other is not None and (other.folder / "nsattn" / "__main__.py").is_file()
            assert other.rows("attention", echo=said.append) == [] and "not run: no such bench" in said.pop()
            theirs = other.rows("selected", "--rounds", "1", echo=said.append)
        assert {(r.who, r.commit) for r in theirs} == {(f"nsattn@{other.commit}", other.commit)} and len(theirs) == 2
        rows = [row(ms=1.5), row(direction="backward"), *theirs]
        base.compare(rows, other, echo=said.append)
        assert said[0].startswith(f"ms of this commit, ms of {other.who}") and len(said) == 1 + 3
        assert said[1].endswith("1.5000 ok       3.0000 ok      2.00x") and sum("not timed" in s for s in said) == 2
        said.clear()
        save(merge(rows, out), out)
        assert read_rows(out) == rows[:2] and merge([], out) == rows  # the tables of a commit are its own
    with base.checkout("") as nothing:
        base.compare(rows, nothing, echo=said.append)
    assert nothing is None and not said
    for wrong in ("nothing", "--all"):
        with pytest.raises(ValueError, match="base must be a commit of"), base.checkout(wrong):
            pass


def test_a_session_skips_what_this_commit_timed_and_stops_when_time_is_up():
    def fields(group):
        return {"Hq": 4 * group, "Hkv": 4}

    rows = [row(group=1, commit=commit()), row(group=2), row(group=3, who="fsa", commit=commit())]
    groups = (1, 2, 3)
    session = Session()
    assert list(session.each("x", groups, rows, fields)) == [2, 3] and not session.left
    assert list(Session(again=True).each("x", groups, rows, fields)) == [1, 2, 3]
    stopped = Session(limit=60)
    for group in stopped.each("x", groups, rows, fields):
        assert group == 2
        stopped.end = 0
    assert list(stopped.each("y", groups, [], fields)) == []
    assert stopped.left == ["x: 1 of 3 cases, the next is Hq=12 Hkv=4", "y: 3 of 3 cases, the next is Hq=4 Hkv=4"]


@pytest.mark.parametrize(
    ("ms", "rounds", "calls", "samples"), [(1.0, 1, 28, 20), (1.0, 2, 56, 40), (50.0, 1, 4, 3), (50.0, 2, 6, 4)]
)
def test_long_calls_are_not_made_for_nothing(monkeypatch, ms, rounds, calls, samples):
    """Of a short call 3 tell how long it takes, 5 warm up, 20 count, in each round; of a long one all count but the
    first, three in all at the least."""
    seen = []
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):
            return end.at - self.at

    def call():
        clock[0] += ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: torch.zeros(1))
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(timing, "percentiles", lambda times: seen.extend(times))
    interleave([call], "cuda", rounds)
    assert seen == [pytest.approx(ms)] * samples
    assert clock[0] == pytest.approx(calls * ms)


def test_the_bar_shows_on_a_terminal_only():
    pty = pytest.importorskip("pty")
    code = """
from nsattn.bench.session import Session
from nsattn.cli import _say
for case in Session().each("bench", range(3), [], lambda case: {}):
    _say(f"case {case}")
"""
    command = [sys.executable, "-c", code]
    piped = subprocess.run(command, cwd=base.ROOT, capture_output=True, text=True, check=True)
    assert piped.stdout.split("\n") == ["case 0", "case 1", "case 2", ""]
    terminal, end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(command, cwd=base.ROOT, env=environment, stdin=end, stdout=end, stderr=end) as process:
        assert process.wait(60) == 0
    shown = os.read(terminal, 1 << 16).decode()
    os.close(end)
    os.close(terminal)
    assert all(text in shown for text in ("case 0", "bench", "1/3", "3/3", "-:--:--", "0:00:00"))
    assert "\x1b[2Kcase 1" in shown  # where the bar was, which is drawn again below it


def test_everything_in_as_many_sittings_as_it_takes(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from nsattn.bench import whole

    monkeypatch.setattr(selected, "TINY", selected.TINY[:2])
    said, parts = [], ["selected", "attention", "decode", "model", "compiled"]

    def sit(**options):
        session = Session(**options)
        whole.run(tmp_path / "cpu", peers=tmp_path, session=session, echo=said.append)
        return [line.split(":")[0] for line in session.left]

    assert sit(limit=0) == [*parts, "pictures", "report"]  # nothing to draw yet
    assert sit() == []
    files = {path.name: path.read_bytes() for path in (tmp_path / "cpu").glob("*.json")}
    assert set(files) == {"selected.json", "attention.json", "decode.json", "models.json", "models_compiled.json"}
    made = {path.name for path in (tmp_path / "cpu").iterdir()}
    assert {"report.html", "selected_groups_16x3.png", "models_16x4.png"} <= made
    assert sit() == [] and files == {name: (tmp_path / "cpu" / name).read_bytes() for name in files}  # all there
    assert sit(limit=0, again=True) == parts
    some = Session(limit=0, again=True)
    whole.run(tmp_path / "cpu", peers=tmp_path, session=some, echo=said.append, only="compiled, decode")
    assert [line.split(":")[0] for line in some.left] == ["compiled", "decode"]
    bad = CliRunner().invoke(app, ["bench", "all", "--out", str(tmp_path), "--only", "decode,models"])
    assert bad.exit_code == 2 and "parts are selected" in bad.output
    monkeypatch.setattr(whole.attention, "run", lambda **options: 1 / 0)
    assert sit() == ["attention"]  # the others go on


@pytest.mark.skipif(torch.cuda.is_available(), reason="real cases take hours, and the processes here see no GPU")
def test_processes_on_several_gpus_share_the_cases(tmp_path, monkeypatch, capfd):
    from nsattn.bench import whole

    monkeypatch.setattr(whole, "gpus", lambda: ["", ""])  # two processes, and neither sees a GPU
    said, session = [], Session(again=True)
    whole.run(tmp_path, peers=tmp_path, session=session, echo=said.append)
    output = capfd.readouterr().out
    assert session.left == []
    for case in selected.TINY:
        assert output.count(f"[tiny] {case}: ") == 1  # by one of them
    assert not any("[tiny]" in line for line in said)  # and not once more
    assert {(r.T, r.Hq) for r in read_rows(tmp_path / "selected.json")} == {
        (case.tokens, case.num_heads) for case in selected.TINY
    }
    assert len(read_rows(tmp_path / "attention.json")) > 0 and (tmp_path / "report.html").exists()
    assert not list(tmp_path.glob("*.new"))

    session = Session(again=True)
    whole.run(tmp_path, peers=tmp_path, session=session, echo=said.append, only="decode")
    assert session.left == [] and "[tiny]" not in capfd.readouterr().out

    session = Session(again=True, limit=0.05)  # each begins one case at most; rows of before count for nothing
    whole.run(tmp_path, peers=tmp_path, session=session, echo=said.append)
    output = capfd.readouterr().out
    parts = ["selected", "attention", "decode", "model", "compiled"]
    assert [line.split(":")[0] for line in session.left] == ["GPU ", "GPU ", *parts]
    left = len(selected.TINY) - sum(f"[tiny] {case}: " in output for case in selected.TINY)
    assert session.left[2].startswith(f"selected: {left} of {len(selected.TINY)} cases, ")


def test_a_case_is_taken_once(tmp_path):
    one, other = (Session(again=True, shared=tmp_path).each("x", (1, 2, 3), [], lambda n: {"n": n}) for _ in range(2))
    assert [next(one), next(other), next(one)] == [1, 2, 3] and not [*one, *other]
    assert list(Session(again=True, shared=tmp_path).each("y", (1,), [], lambda n: {"n": n})) == [1]  # another bench


def test_the_readme_and_the_site_show_the_results(tmp_path, monkeypatch):
    from nsattn.bench import whole

    results = whole.SHOWN / "attention.json"
    monkeypatch.setattr(whole, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "figures.py").write_text("open(__file__ + '.ran', 'w')")
    readme = Path(base.ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(readme.replace("| 64/4 |", "| old |"))
    whole._show(results.parent, lambda line: None)
    assert (tmp_path / "README.md").read_text() == readme and (tmp_path / "docs" / "figures.py.ran").exists()


def test_models_run_without_a_gpu(tmp_path):
    pytest.importorskip("transformers")
    from nsattn.bench import model

    said, out = [], str(tmp_path / "models.json")
    rows = model.run(out=out, echo=said.append)
    assert "No GPU" in said[0]
    both = {(p, a) for p in model.PHASES for a in model.ATTENTION}
    alone = {("overhead", "auto"), ("decode", "dense"), ("decode", "auto")}
    assert {(r.phase, r.attention) for r in rows} == both | alone
    assert model.run(out=out, echo=said.append) == rows == model.read(out)  # nothing is timed twice
    speedups = list(model.speedups(rows))
    assert [key[3] for key in speedups] == sorted(model.PHASES) and all(s[4] > 0 for s in speedups)
    (*key, ms, kernel_ms, share), = model.overheads(rows)
    assert key == ["tiny", 96, (16, 4)] and min(ms, kernel_ms) > 0 and share == pytest.approx(ms / kernel_ms - 1)
    with pytest.raises(ValueError, match="models are Llama-3-8B.*got GPT-5"):
        model.run(models="GPT-5", echo=said.append)
    assert all(r.ok for r in rows) and len(model.ratios(rows, "qmajor", "auto", "train")) == 1
    compiled = model.run(compiled=True, echo=said.append)
    assert {(r.phase, r.attention) for r in compiled} == both and all(r.compiled for r in compiled)
    with pytest.raises(ValueError, match="models.json holds models that are not compiled. Name another file"):
        model.run(compiled=True, out=out, echo=said.append)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a results file of nsattn bench model"):
        model.read(tmp_path / "bad.json")


@pytest.mark.parametrize("kind", ["dense", "auto"])
def test_a_decoding_step_of_a_model_is_its_pass_over_the_whole_text(kind, monkeypatch):
    """Dense: what a stock cache with the same keys and values gives. NSA: what one pass over all tokens gives."""
    pytest.importorskip("transformers")
    from transformers import DynamicCache

    from nsattn.bench import model, model_decode

    monkeypatch.setattr(model_decode, "PIECE", 40)
    (shape,), (config,) = model.TINY.values(), model.TINY_SIZES.values()
    length, like = 96, torch.zeros(1, shape["hidden_size"])
    made = model._model(shape, 2, "over cache" if kind == "dense" else kind, config, "cpu", torch.float32)
    seen = []
    made.register_forward_pre_hook(lambda module, args, given: seen.append(given["inputs_embeds"]), with_kwargs=True)
    call, _ = model_decode.step(made, kind, length, like)
    stock = model._model(shape, 2, kind, config, "cpu", torch.float32)
    stock.load_state_dict(made.state_dict())
    y = call()
    if kind == "dense":
        cache = DynamicCache(config=stock.config)
        for i, layer in enumerate(made.layers):
            cache.update(*(x[:, :, :-1].clone() for x in layer.self_attn.bench_cache), i)
        want = stock(inputs_embeds=seen[-1], past_key_values=cache).last_hidden_state
    else:
        assert [x.shape[1] for x in seen] == [40, 40, 16, 1, 1, 1]
        want = stock(inputs_embeds=torch.cat(seen, 1), use_cache=False).last_hidden_state[:, -1:]
    torch.testing.assert_close(y, want)


def test_pictures_of_models(tmp_path):
    """One for each (B, N) that has something to compare."""
    from nsattn.bench import model, plots

    def row(kind, phase, T, B, ms):
        N = 1024 // B
        return model.ModelRow("x", "Llama-3-8B", 2, T, B, N, phase, kind, ms, 1.0, 1.0, "abc")

    rows = [row(kind, phase, T, 64, ms) for phase in model.PHASES for T in (8192, 65536)
            for kind, ms in (("dense", 9.0), ("qmajor", 6.0), ("auto", 3.0))]
    rows.append(row("auto", "train", 8192, 128, 1.0))  # nothing beside it
    model.save(rows, str(tmp_path / "models.json"))
    assert plots.draw_models(tmp_path / "models.json") == [tmp_path / "models_64x16.png"]
    figure = plots.speedup_figure(rows[:-1])
    assert figure is not None
    above, below = figure.axes
    assert [list(line.get_ydata()) for line in above.lines[:3]] == [[3.0, 3.0]] * 3
    assert [list(line.get_ydata()) for line in below.lines[:3]] == [[2.0, 2.0]] * 3
    model.save(rows[-1:], str(tmp_path / "models.json"))
    with pytest.raises(ValueError, match="no case with both dense attention and NSA"):
        plots.draw_models(tmp_path / "models.json")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_overhead_compares_the_same_work(family):
    """The module and its kernels alone give the same output and reach the same weights, for every family."""
    pytest.importorskip("transformers")
    from nsattn.bench import model

    (sizes, config), = model.TINY_SIZES.items()
    made = model._model({**model.TINY["tiny"], "family": family}, 1, "auto", config, "cpu", torch.float32)
    module, kernels, leaves = model._parts(made, 96)
    grads = []
    for call in (module, kernels):
        y = call()
        torch.testing.assert_close(y.flatten(), kernels().flatten())
        y.square().sum().backward()
        grads.append([p.grad.clone() for p in made.layers[0].self_attn.compress_k.parameters()])
        assert sum(x.grad is not None for x in leaves) >= 8
        for x in leaves:
            x.grad = None
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    assert model._overhead(("tiny", 96, *sizes), model.TINY["tiny"], config, "cpu").phase == model.OVERHEAD


def test_whether_two_runs_agree(tmp_path):
    """A drift of all times is none of the ratios'; a contender that alone moved is named, with exit status 1."""

    def runs(slower, contender):
        rows = [row(ms=slower), row("torch", "cudnn", ms=contender * slower, op="dense causal", selection="all"),
                row(impl="qmajor", ms=3 * slower), row("fsa", "x", ms=7, ok=False), row(impl="kvmajor", ms=9)]
        return [*rows, row(impl="auto graph", ms=slower / 2), row("fla", "x graph", ms=4 * slower)]  # fmt: skip

    old, same, moved = (tmp_path / name for name in ("old.json", "same.json", "moved.json"))
    save(runs(1.0, 5.0), str(old))
    save(runs(1.2, 5.1), str(same))
    save(runs(1.2, 6.0), str(moved))
    found = repeat.ratios([asdict(r) for r in runs(1.0, 5.0)])
    assert {whose: value for (whose, _), value in found.items()} == {"torch cudnn": 10.0, "qmajor": 6.0, "fla": 8.0}
    calls = [asdict(r) for r in runs(1.0, 5.0) if not r.impl.endswith("graph")]
    assert repeat.ratios(calls) == {}  # short calls take as long as the host needs
    long = [{**r, "T": 1 << 18} for r in calls]
    assert sorted(repeat.ratios(long).values()) == [3.0, 5.0]
    assert len(repeat.compare(old, same)) == 1  # equal numbers are rows of one run
    good, bad = (CliRunner().invoke(app, ["bench", "repeat", str(old), str(new)]) for new in (same, moved))
    assert good.exit_code == 0 and "1 of 1 ratios agree within 5%" in good.output
    assert "  1 of 1 to torch cudnn agree within 5%" in good.output
    assert bad.exit_code == 1 and "+20.0%   10.00 ->  12.00  torch dense causal cudnn" in bad.output
    with pytest.raises(ValueError, match="no ratio"):
        repeat.compare(old, old)


def test_what_is_compared_between_two_runs():
    """Dense attention with the whole of ours; of models long calls, and decoding steps of any length."""
    from nsattn.bench import model

    rows = [row(impl="kvmajor_sm90 graph", ms=0.5), row(op="nsa_attention", impl="auto graph", ms=2.0, selection="own"),
            row(ms=1.0, selection="recorded"),
            row("torch", "cudnn", ms=8.0, op="dense causal", selection="own")]  # fmt: skip
    assert list(repeat.ratios([asdict(r) for r in rows]).values()) == [4.0]

    def step(kind, T, phase, ms):
        return asdict(model.ModelRow("x", "Llama-3-8B", 2, T, 64, 16, phase, kind, ms, 1.0, 1.0, "abc"))

    steps = [step(kind, T, phase, ms) for T in (8192, 32768) for phase in ("train", "decode")
             for kind, ms in (("auto", 1.0), ("dense", 3.0))]  # fmt: skip
    assert [name.split()[1:5:3] for _, name in repeat.ratios(steps)] == [
        ["8192", "decode"], ["32768", "train"], ["32768", "decode"]
    ]  # fmt: skip
