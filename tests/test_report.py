"""`nsattn report`: the page shows what the results files hold, and says what is missing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nsattn import cli
from nsattn.bench import model, report
from nsattn.bench.timing import Row, read_rows, save

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "h200"
ROW = Row("nsattn", "attend_selected", "auto", 65536, 16, 4, 128, 128, 64, 16, "random", "forward", 2.0, 1.9, 2.1, 0.5,
          1.0, True, "abc", set="target")


def page(folder: Path, out: Path | None = None) -> str:
    return report.write(folder, (out or folder / "out") / "page.html").read_text()


def section(text: str, title: str) -> str:
    return text.split(f"<h2>{title}</h2>")[1].split("<h2>")[0]


def test_page_of_committed_results(tmp_path):
    """Every number of the roofline table is one of attention.json; nothing is fetched."""
    result = CliRunner().invoke(cli.app, ["report", "--results", str(RESULTS), "--out", str(tmp_path / "page.html")])
    assert result.exit_code == 0
    text = (tmp_path / "page.html").read_text()
    fetched = re.findall(r"(?:src|href)=\"(?!#)([^\"]+)|url\((?!#)([^)]+)|<script", text)
    assert not fetched and text.count("<svg") >= 3
    rows = [r for r in read_rows(RESULTS / "attention.json") if (r.Hq, r.Hkv, r.T) == (32, 8, 65536)]
    table = section(text, "How far from the floor")
    assert len(rows) == table.count("<tr>") - 1
    for r in rows:
        operation = r.op if r.who in ("nsattn", "torch") else f"{r.op}, {r.who}"
        assert f"<td>{operation}</td><td>{r.impl}</td><td>{r.direction}</td><td>{r.ms:.2f}</td>" in table
    if not (RESULTS / "models.json").exists():
        assert "there is no models.json" in section(text, "Models")


def test_page_fits_a_phone(tmp_path):
    """What is wide stands in a box that scrolls; links of the page have targets; no two lines share a colour."""
    text = page(RESULTS, tmp_path)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert ".wide { overflow-x: auto; }" in text
    for tag in ("<table", "<svg"):
        assert text.count(tag) == text.count(f'<div class="wide">{tag}') > 0
    style = text.split("<style>")[1].split("</style>")[0]
    for rule in re.findall(r"^.*[^-]width: *[\d.]+(?:px|rem).*$", style, re.M):
        assert rule.startswith((".wide > svg", ".wrap")) or "max-width" in rule, rule
    assert set(re.findall(r'href="#([^"]+)"', text)) - set(re.findall(r'id="([^"]+)"', text)) == set()
    legend = section(text, "Selected attention against the group").split('id="legend_1"')[1].split("<defs>")[0]
    names = re.findall(r"<text[^>]*>([^<]+)</text>", legend)
    lines = re.findall(r'style="fill: none;[^"]*?stroke: (#\w+)', legend)
    assert len(set(lines)) == len(names) > 3


def test_speedups_and_claims(tmp_path):
    """Ratios of rows of one shape; a wrong result counts for nobody."""
    rows = [ROW]
    for who, ms in (("nsa_ref", 8.0), ("fsa", 5.0)):
        rows.append(replace(ROW, who=who, impl="x", ms=ms))
    more = replace(ROW, Hq=32)
    wrong = replace(more, who="fsa", impl="x", ms=1.0, ok=False)
    rows += [more, replace(more, who="nsa_ref", impl="x", ms=12.0), wrong]
    save(rows, str(tmp_path / "selected.json"))
    text = page(tmp_path)
    table = section(text, "Speed-up of selected attention")
    assert "<td>nsa_ref</td><td>forward</td><td>2</td><td>4.0x</td><td>5.0x</td><td>6.0x</td>" in table
    assert "<td>fsa</td><td>forward</td><td>1</td><td>2.5x</td>" in table
    claims = section(text, "What the Flash Sparse Attention paper claims")
    assert "<td>up to 1.6x, 1.6x on average, 1 of 40 shapes</td>" in claims
    assert "<td>up to 6.0x, 5.0x on average, 2 of 40 shapes</td>" in claims
    assert "there is no attention.json" in section(text, "Where the time goes")


def test_models(tmp_path):
    sizes = {"layers": 2, "T": 65536, "B": 64, "N": 16, "attention_ms": 1.0, "peak_gib": 1.0, "commit": "abc"}
    rows = [model.ModelRow("x", "Llama-3-8B", phase="train", attention=kind, ms=ms, **sizes)
            for kind, ms in (("dense", 90.0), ("qmajor", 60.0), ("auto", 50.0))]
    rows.append(replace(rows[-1], phase="overhead", ms=21.0, attention_ms=20.0, layers=1))
    model.save(rows, str(tmp_path / "models.json"))
    text = page(tmp_path)
    assert "<td>train</td><td>1.80x</td><td>1.20x</td>" in section(text, "Models") and "<svg" in section(text, "Models")
    assert "<td>21.00</td><td>20.00</td><td>5.0%</td>" in section(text, "What a module adds to its kernels")
    line = "| Llama-3-8B | 65536 | (64, 16) | 1.80 / 1.20 |  |  | 5.0% |"
    assert model.summary(tmp_path / "models.json").splitlines()[2:] == [line]
    assert model.summary(tmp_path / "none.json") == "Not measured yet: there is no none.json."
    assert "there is no models_compiled.json" in section(text, "Models, norms and MLPs compiled")
    faster = [replace(r, ms=r.ms / 2, compiled=True) for r in rows[:2]]
    model.save([*faster, rows[2]], str(tmp_path / "models_compiled.json"))
    assert "<td>train</td><td>0.90x</td><td>0.60x</td>" in section(page(tmp_path), "Models, norms and MLPs compiled")
    assert "up to 1.20x" in section(text, "What the Flash Sparse Attention paper claims")


def test_nothing_to_show(tmp_path):
    with pytest.raises(ValueError, match="holds none of attention.json, selected.json"):
        report.write(tmp_path, tmp_path / "page.html")
