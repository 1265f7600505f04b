"""What README and site show runs on a CPU, the site builds, and its pictures are up to date."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if "```python" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page, tmp_path):
    """The Python blocks of a page, one after the other in one process, as a reader would type them."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_site_builds_without_warnings(tmp_path):
    """mkdocs in strict mode: broken links, missing pages and unknown directives are errors. Nothing is fetched."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in tmp_path.rglob("*.html"):
        text = page.read_text()
        assert ":::" not in text, page.name
        assert 'name="viewport"' in text, page.name
        outside = set(re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?://[^\"]+)", text))
        assert not outside, f"{page.name} fetches {outside}"
    assert "Section 3.3.3" in (tmp_path / "reference.html").read_text()
    start = (tmp_path / "index.html").read_text()
    for path in re.findall(r"^ +- .*: (\S+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.M):
        assert f'href="{path.replace("README", "index")}.html"' in start, f"{path} is not in the navigation"


def test_docstrings_become_markdown(monkeypatch):
    """Headings, lists and code of a docstring; a sentence with a colon is no heading."""
    pytest.importorskip("mkdocs")
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    import hooks

    class Thing:
        """A thing, for one: it does <= 2 things_at_once.

            x = thing(y)

            z = x[0] * x[1]

        Numerics: exact.

        Args:
            a, b: sizes,
                both.
        """

    assert [line.rstrip() for line in hooks.docstring(Thing).splitlines() if line.strip()] == [
        "A thing, for one: it does &lt;= 2 things\\_at\\_once.",
        "```python", "x = thing(y)", "z = x[0] * x[1]", "```",
        "**Numerics:** exact.",
        "**Args:**",
        "- `a`, `b`: sizes,",
        "    both.",
    ]  # fmt: skip


def test_three_clicks_from_the_readme():
    """Links of README, and of the pages that these lead to, reach what a reader looks for."""
    found = {ROOT / "README.md"}
    for _ in range(2):
        for page in [page for page in found if page.suffix == ".md"]:
            links = re.findall(r"\]\((?!http)([^)#\s]+)", page.read_text())
            found |= {(page.parent / link).resolve() for link in links}
    wanted = (
        "docs/index.md", "docs/limits.md", "docs/equations.md", "benchmarks/README.md", "docs/faq.md", "docs/model.md",
        "benchmarks/results/h200/attention.json", "nsattn/kernels/reference.py",
        "nsattn/kernels/attend_selected_kvmajor.py",
    )  # fmt: skip
    assert {ROOT / path for path in wanted} <= found


def test_picture_of_times_shows_the_results():
    """docs/pictures/times.png carries the numbers that it was drawn from; `python docs/figures.py` draws it again."""
    image = pytest.importorskip("PIL.Image")
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import figures
    finally:
        sys.path.pop(0)
    assert image.open(ROOT / "docs" / "pictures" / "times.png").info["Description"] == figures.plotted()
