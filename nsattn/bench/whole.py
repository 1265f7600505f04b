"""`nsattn bench all`: every result of one machine in a folder, in as many sittings as it takes, and their pictures."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from nsattn.bench import attention, decode, model, selected
from nsattn.bench.base import ROOT
from nsattn.bench.session import Session
from nsattn.bench.timing import Echo

SHOWN = ROOT / "benchmarks" / "results" / "h200"  # the results that README and site show


def run(out: Path, *, peers: Path, session: Session, echo: Echo) -> None:
    """Run all benches, then draw what their files hold; what is not done is named in `session.left`."""
    steps: dict[str, Callable[[], object]] = {
        "selected": lambda: selected.run(out=f"{out}/selected.json", folder=peers, session=session, echo=echo),
        "attention": lambda: attention.run(out=f"{out}/attention.json", peers=peers, session=session, echo=echo),
        "decode": lambda: decode.run(out=f"{out}/decode.json", session=session, echo=echo),
        "model": lambda: model.run(out=f"{out}/models.json", peers=peers, session=session, echo=echo),
        "model, compiled": lambda: model.run(
            out=f"{out}/models_compiled.json", compiled=True, session=session, echo=echo
        ),
        "pictures": lambda: _draw(out, echo),
        "report": lambda: _report(out, echo),
    }
    if out.resolve() == SHOWN:
        steps["README and site"] = lambda: _show(out, echo)
    for name, step in steps.items():
        try:
            step()
        except Exception as error:  # noqa: BLE001  whatever a step raises is said at the end; the others go on
            session.left.append(f"{name}: {type(error).__name__}: {error}")


def _draw(out: Path, echo: Echo) -> None:
    from nsattn.bench.plots import draw, draw_models

    for name, function in (("models.json", draw_models), ("selected.json", draw)):
        if name == "selected.json" or (out / name).exists():  # the models need transformers
            for picture in function(out / name):
                echo(f"wrote {picture}")


def _report(out: Path, echo: Echo) -> None:
    from nsattn.bench.report import write

    echo(f"wrote {write(out, out / 'report.html')}")


def _show(out: Path, echo: Echo) -> None:
    """The README's table, the site's picture of times and its page on the paper, as the tests want them."""
    from nsattn.bench.paper import write

    readme, table = ROOT / "README.md", attention.summary(out / "attention.json")
    text = readme.read_text(encoding="utf-8")
    start, end = "<!-- times -->\n", "\n<!-- end -->"
    readme.write_text(re.sub(f"(?<={start}).*?(?={end})", lambda _: table, text, flags=re.S), encoding="utf-8")
    subprocess.run([sys.executable, str(ROOT / "docs" / "figures.py")], check=True)
    write(out, ROOT / "docs" / "paper.md")
    echo(f"wrote {readme}, {ROOT / 'docs' / 'paper.md'} and {ROOT / 'docs' / 'pictures'}")
