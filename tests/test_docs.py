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
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in tmp_path.rglob("*.html"):
        text = page.read_text()
        assert ":::" not in text, page.name
        outside = set(re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?://[^\"]+)", text))
        assert not outside, f"{page.name} fetches {outside}"
    assert "Section 3.3.3" in (tmp_path / "reference.html").read_text()


def test_picture_of_times_shows_the_results():
    """docs/pictures/times.png carries the numbers that it was drawn from; `python docs/figures.py` draws it again."""
    image = pytest.importorskip("PIL.Image")
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import figures
    finally:
        sys.path.pop(0)
    assert image.open(ROOT / "docs" / "pictures" / "times.png").info["Description"] == figures.plotted()
