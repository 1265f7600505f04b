"""`nsattn bench all`: every result of one machine in a folder, in as many sittings as it takes, and their pictures.

Where there are several GPUs, a process on each takes cases until none is left. Times are of one GPU all the same.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from nsattn.bench import attention, decode, model, selected
from nsattn.bench.base import ROOT, bench, gpus
from nsattn.bench.cases import choose
from nsattn.bench.session import Session, named
from nsattn.bench.timing import Echo

SHOWN = ROOT / "benchmarks" / "results" / "h200"  # the results that README and site show
PARTS = ("selected", "attention", "decode", "model", "compiled")
COMPILED = (65536,)  # torch.compile takes most of the time of a shape


def run(out: Path, *, peers: Path, session: Session, echo: Echo, only: str = "") -> None:
    """Run the benches on all GPUs, then draw what their files hold; what is not done is named in `session.left`.

    Args:
        only: those of `PARTS` to run, comma separated; default: all.

    Raises:
        ValueError: an unknown one.
    """
    named("parts", only, PARTS)
    with TemporaryDirectory() as shared:
        if len(gpus()) > 1 and time.monotonic() < session.end:
            session.shared = Path(shared)
            _on_all(gpus(), out, peers, session, session.shared, echo, only)
        benches(out, peers=peers, session=session, echo=echo, only=only)
    steps = {"pictures": lambda: _draw(out, echo), "report": lambda: _report(out, echo)}
    if out.resolve() == SHOWN:
        steps["README and site"] = lambda: _show(out, echo)
    _take_steps(steps, session)


def benches(out: Path, *, peers: Path, session: Session, echo: Echo, only: str = "") -> None:
    """Run the benches, one after the other, in this process."""
    steps: dict[str, Callable[[], object]] = {
        "selected": lambda: selected.run(out=f"{out}/selected.json", folder=peers, session=session, echo=echo),
        "attention": lambda: attention.run(out=f"{out}/attention.json", peers=peers, session=session, echo=echo),
        "decode": lambda: decode.run(out=f"{out}/decode.json", session=session, echo=echo),
        "model": lambda: model.run(out=f"{out}/models.json", peers=peers, session=session, echo=echo),
        "compiled": lambda: model.run(
            lengths=COMPILED, out=f"{out}/models_compiled.json", compiled=True, session=session, echo=echo
        ),
    }
    _take_steps({name: steps[name] for name in named("parts", only, PARTS)}, session)


def _take_steps(steps: Mapping[str, Callable[[], object]], session: Session) -> None:
    for name, step in steps.items():
        try:
            step()
        except Exception as error:  # noqa: BLE001  whatever a step raises is said at the end; the others go on
            session.left.append(f"{name}: {type(error).__name__}: {error}")


def _on_all(
    devices: list[str], out: Path, peers: Path, session: Session, shared: Path, echo: Echo, only: str
) -> None:
    """The benches in a process on each GPU, until no case is left or the time is up."""
    if "selected" in named("parts", only, PARTS):
        selected.compile_ahead(choose(""), out=f"{out}/selected.json", folder=peers, session=session, echo=echo)
    options = ["all", "--out", f"{out}", "--peers", f"{peers}", "--shared", f"{shared}", *["--again"] * session.again]
    options += ["--only", only] if only else []
    if not math.isinf(session.end):
        options += ["--limit", f"{max(0.0, session.end - time.monotonic())}"]
    started = [subprocess.Popen(**bench(ROOT, *options, gpu=device)) for device in devices]
    try:
        for device, process in zip(devices, started, strict=True):
            if process.wait():
                session.left.append(f"GPU {device}: status {process.returncode}, what its process says is above")
    finally:
        for process in started:
            process.kill()


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
