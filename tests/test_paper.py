"""docs/paper.md is what the results files say, and its ratios are of rows that are right, of one shape and one set."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nsattn import cli
from nsattn.bench import model, paper
from nsattn.bench.attention import PAPER_SHAPES, SHAPES
from nsattn.bench.cases import PAPER
from nsattn.bench.peers.fsa_branches import BOTH
from nsattn.bench.timing import Row, save

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "h200"
ROW = Row("nsattn", "attend_selected", "auto", 65536, 4, 4, 128, 128, 64, 16, "random", "forward", 2.0, 1.9, 2.1, 0.5,
          1.0, True, "abc", set="paper")
CONTENDERS = {("nsattn", "auto"): 1.0, ("nsattn", "qmajor"): 6.0, ("fsa", "x"): 4.0, ("nsa_ref", "y"): 8.0}


def selected_rows(cases=PAPER, set="paper", **more):
    """Everyone's rows of these cases, in multiples of the group."""
    return [
        replace(ROW, who=who, impl=impl, ms=factor * case.group, direction=way, set=set,
                **{key: value for key, value in case.shape.items() if key != "sequences"}, **more)
        for case in cases for (who, impl), factor in CONTENDERS.items() for way in paper.DIRECTIONS
    ]  # fmt: skip


def branch_rows():
    """The other branches of us and of FSA at every shape of the figure, and everything at 32/8 heads, 64K tokens."""
    rows = []
    for T, Hq, Hkv in (*SHAPES, *PAPER_SHAPES):
        for who, impl in (("nsattn", "triton"), ("fsa", "as published")):
            for way in paper.DIRECTIONS:
                shape = {"who": who, "impl": impl, "T": T, "Hq": Hq, "Hkv": Hkv, "direction": way, "set": ""}
                rows += [replace(ROW, op="attend_compressed", ms=1.0, **shape),
                         replace(ROW, op="attend_window", ms=2.0, **shape)]  # fmt: skip
    return rows


def test_a_graph_of_ours_counts_beside_no_call_of_theirs():
    """In the figure; where the parts of ours are shown one by one it does."""
    row = replace(ROW, op="attend_window", impl="x", Hq=32, Hkv=8)
    rows = [row, replace(row, impl="x graph", ms=1.0)]
    assert paper._best(rows, "attend_window", 65536, (32, 8), "nsattn", "forward", graphs=False).ms == 2.0
    assert paper.parts(rows, 65536, "nsattn", "forward")["attend_window"] == (1.0, True)


def claim(results, text, column):
    head, lines = paper.claims(results)
    [line] = [line for line in lines if line[0] == text]
    return line[list(head).index(column)]


def test_the_page_is_up_to_date():
    """`nsattn bench paper` writes it and its pictures, which carry the numbers they were drawn from."""
    image = pytest.importorskip("PIL.Image")
    results = paper.read(RESULTS)
    text = (ROOT / "docs" / "paper.md").read_text()
    assert text == paper.page(results), "run nsattn bench paper"
    pictures = paper.pictures(results)
    assert set(re.findall(r"\(pictures/(.*?)\)", text)) == set(pictures)
    assert {path.name for path in (ROOT / "docs" / "pictures").glob("paper_*")} == set(pictures)
    for name, numbers in pictures.items():
        assert image.open(ROOT / "docs" / "pictures" / name).info["Description"] == numbers, "run nsattn bench paper"


def test_nothing_measured_is_said_and_nothing_is_invented():
    text = paper.page(paper.Results())
    assert all(cell in (paper.MISSING, "") for line in paper.claims(paper.Results())[1] for cell in line[2:])
    assert text.count("0 of 40 shapes are there") == 5 and "![" not in text and "selected.json: not measured" in text
    assert all(command in text for command in paper.COMMANDS.values())


def test_ratios_of_the_selected_branch():
    results = paper.Results(selected=selected_rows(), environments={"selected": {"gpu": "NVIDIA X, more"}})
    alone = "kernels, selected branch alone, forward"
    assert claim(results, alone, "official FSA over nsa_ref") == "up to 2.0x, 2.0x on average, 40 of 40 shapes"
    assert claim(results, alone, "nsattn over official FSA") == "up to 4.0x, 4.0x on average, 40 of 40 shapes"
    assert claim(results, alone, "nsattn over nsattn `qmajor`").startswith("up to 6.0x")
    assert claim(results, alone, "commit, GPU") == "abc; NVIDIA X"
    assert claim(results, "kernels, three branches, forward", "official FSA over nsa_ref") == paper.MISSING
    assert "| 8192 | 5 | 5.00 / 5.00 | 30.00 / 30.00 | 20.00 / 20.00 | 40.00 / 40.00 |  |" in paper.page(results)


def test_wrong_results_graphs_and_other_shapes_count_for_nobody():
    first, *rest = PAPER
    wrong = [replace(r, ms=0.001, ok=False) if r.who == "fsa" else r for r in selected_rows([first])]
    graph = [replace(r, ms=0.001, impl="auto graph") for r in selected_rows([first]) if r.impl == "auto"]
    others = [replace(r, ms=0.001, **change) for change in ({"T": 4096}, {"selection": "recorded"}, {"Dv": 64},
              {"sequences": 2}, {"dtype": "float16"}, {"Hq": 12}) for r in selected_rows([first])]  # fmt: skip
    results = paper.Results(selected=[*wrong, *graph, *others, *selected_rows(rest)])
    alone = "kernels, selected branch alone, backward"
    assert claim(results, alone, "official FSA over nsa_ref") == "up to 2.0x, 2.0x on average, 39 of 40 shapes"
    assert claim(results, alone, "nsattn over nsa_ref") == "up to 8.0x, 8.0x on average, 40 of 40 shapes"
    assert "(wrong)" in paper.page(results)


def test_a_shape_is_of_one_set():
    """The set with the most contenders, whole: ours of another run is not set against theirs."""
    older = [replace(r, ms=9 * r.ms, commit="old") for r in selected_rows(set="target") if r.who == "nsattn"]
    for rows in ([*older, *selected_rows()], [*selected_rows(), *older]):
        results = paper.Results(selected=rows)
        assert claim(results, "kernels, selected branch alone, forward", "nsattn over nsa_ref").startswith("up to 8.0x")
        assert claim(results, "kernels, selected branch alone, forward", "commit, GPU").startswith("abc;")


def test_the_figure_adds_the_branches_up():
    """G = 1: (8 + 3) / (4 + 3) for the official code; its nsa_ref has the branches of FSA."""
    results = paper.Results(selected=selected_rows(PAPER[:1]), attention=branch_rows())
    three = "kernels, three branches, forward"
    assert claim(results, three, "official FSA over nsa_ref") == "up to 1.6x, 1.6x on average, 1 of 40 shapes"
    assert claim(results, three, "nsattn over nsa_ref") == "up to 2.8x, 2.8x on average, 1 of 40 shapes"
    assert "| 8192 | 1 | 4.00 / 4.00 | 9.00 / 9.00 | 7.00 / 7.00 | 11.00 / 11.00 |  |" in paper.page(results)
    results.attention = [r for r in results.attention if r.who == "nsattn"]
    assert claim(results, three, "official FSA over nsa_ref") == paper.MISSING
    assert "The selected branch alone, milliseconds" in paper.page(results)  # not everyone has sums


def test_parts_of_a_peer():
    """Its selection is a difference, nsa_ref has FSA's other branches, and of ours the fastest right one counts."""
    shape = {"T": 65536, "Hq": 32, "Hkv": 8, "set": ""}
    rows = [
        *(replace(r, **shape) for r in selected_rows(PAPER[:1])),
        replace(ROW, impl="kvmajor", ms=0.1, ok=False, **shape),
        *(replace(ROW, who="fsa", op=op, ms=ms, **shape) for op, ms in (("attend_compressed", 1.0), (BOTH, 3.5))),
        replace(ROW, op="nsa_attention", **shape),
    ]
    assert paper.parts(rows, 65536, "fsa", "forward") == {
        "attend_compressed": (1.0, True), "select_blocks": (2.5, True), "attend_selected": (4.0, True)
    }
    assert paper.parts(rows, 65536, "nsa_ref", "forward")["attend_selected"] == (8.0, True)
    assert paper.parts(rows, 65536, "nsa_ref", "forward")["select_blocks"] == (2.5, True)
    assert paper.parts(rows, 65536, "nsattn", "forward") == {"attend_selected": (1.0, True)}
    assert "select_blocks" not in paper.parts(rows, 65536, "fsa", "backward")
    text = paper.page(paper.Results(attention=rows))
    assert "| 65536 | official FSA |  | 1.00 | 2.50 | 4.00 / 4.00 |" in text


def test_models_and_what_did_not_run():
    sizes = {"layers": 2, "T": 65536, "B": 64, "N": 16, "attention_ms": 1.0, "peak_gib": 1.0, "commit": "abc"}
    rows = [model.ModelRow("x", "Llama-3-8B", phase="prefill", attention=kind, ms=ms, **sizes)
            for kind, ms in (("dense", 90.0), ("qmajor", 60.0), ("auto", 50.0), ("nsa_ref", 100.0))]
    rows += [replace(rows[0], attention="fsa", ms=75.0, ok=False)]
    notes = [{"who": "fsa", "impl": "", "case": "", "reason": "no checkout"},
             {"who": "fsa", "impl": "x", "case": "T=1 other", "reason": "too odd"}]  # fmt: skip
    results = paper.Results(models=rows, not_run=notes)
    assert claim(results, "prefill, end to end", "nsattn over nsattn `qmajor`").startswith("up to 1.20x, 1.20x")
    assert claim(results, "prefill, end to end", "nsattn over nsa_ref").startswith("up to 2.00x")
    assert claim(results, "prefill, end to end", "official FSA over nsa_ref") == paper.MISSING  # it was wrong
    assert claim(results, "training, end to end", "nsattn over nsattn `qmajor`") == paper.MISSING
    text = paper.page(results)
    assert "fsa, all of it, did not run: no checkout (1 times)" in text and "too odd" not in text
    assert "| Llama-3-8B | 65536 | (64, 16) | prefill | 1.80x | 1.20x |" in text


def test_the_page_and_its_pictures_are_written(tmp_path):
    rows = [replace(r, ok=r.T > 8192) for r in selected_rows()]
    dense = [replace(r, who="torch", op="dense causal", impl="cudnn", selection="all")
             for r in selected_rows(PAPER[:20]) if r.impl == "auto"]  # fmt: skip
    save([*rows, *dense], str(tmp_path / "selected.json"))
    whole = [replace(ROW, op=op, T=T, Hq=32, Hkv=8, ok=op != "combine", set="")
             for op in (*paper.OPERATIONS, "nsa_attention") for T in (8192, 131072)]  # fmt: skip
    save([*whole, *branch_rows()], str(tmp_path / "attention.json"))
    out = tmp_path / "docs" / "paper.md"
    result = CliRunner().invoke(cli.app, ["bench", "paper", "--results", str(tmp_path), "--out", str(out)])
    assert result.exit_code == 0, result.output
    pictures = ["paper_backward.png", "paper_forward.png", "paper_parts.png"]
    assert sorted(path.name for path in (out.parent / "pictures").iterdir()) == pictures
    assert all((out.parent / "pictures" / name).stat().st_size > 10_000 for name in pictures)
    assert all(f"(pictures/{name})" in out.read_text() for name in pictures)
    with pytest.raises(ValueError, match="holds none of selected.json, attention.json, models.json"):
        paper.write(tmp_path / "none", out)
