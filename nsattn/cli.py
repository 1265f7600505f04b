"""The `nsattn` command: info, why, verify, bench, train, record-selection, inspect, report."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer

from nsattn import dispatch
from nsattn.checks import FLOATS
from nsattn.environment import environment
from nsattn.train.cli import inspect, record_selection, train

app = typer.Typer(
    help="Native Sparse Attention (arXiv 2502.11089), run the Flash Sparse Attention way (arXiv 2508.18224).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Times, beside what a user would run instead.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.command()(train)
app.command("record-selection")(record_selection)
app.command()(inspect)

EQUATIONS = (  # tag in the paper, what it computes, public function
    ("Eq 7", "compress blocks of keys and values", "compress"),
    ("Eq 8", "attend to the compressed blocks", "attend_compressed"),
    ("Eq 9, 10", "score and select blocks", "select_blocks"),
    ("Eq 11, 12", "attend to the selected blocks", "attend_selected"),
    ("Section 3.3.3", "sliding window", "attend_window"),
    ("Eq 5", "gate and sum the branches", "combine"),
    ("Eq 5, 8 to 12", "the same for new tokens over a cache", "nsa_decode"),
)


@app.command()
def info() -> None:
    """Versions, GPU, which function computes which equation, and which implementations exist."""
    for name, value in environment().items():
        typer.echo(f"{name:10} {value}")
    typer.echo("\nequation -> function -> kernels")
    for tag, meaning, operation in EQUATIONS:
        modules = ", ".join(f"kernels/{cell.module}.py" for cell in dispatch.TABLE[operation].values())
        typer.echo(f"{tag:14} {meaning:36} nsattn.{operation:18} {modules}")
    typer.echo("\n" + dispatch.support_table())


@app.command()
def why(
    heads: Annotated[str, typer.Option(help="query heads / KV heads, as 32/8")] = "32/8",
    head_dim: Annotated[int, typer.Option(help="head dim D of queries and keys")] = 128,
    v_head_dim: Annotated[int | None, typer.Option(help="head dim Dv of values; default: D")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32 or float64")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cuda or cpu; default: cuda if there is one")] = "",
    length: Annotated[int, typer.Option(help="longest sequence")] = 65536,
    slc_block: Annotated[int, typer.Option(help="selection block B")] = 64,
    num_selected: Annotated[int, typer.Option(help="selected blocks per token N")] = 16,
    training: Annotated[bool, typer.Option(help="forward and backward, or forward alone")] = True,
    impl: Annotated[str, typer.Option(help="what you would pass as impl=")] = "auto",
    capability: Annotated[str, typer.Option(help="compute capability, as 9.0; default: of this machine's GPU")] = "",
) -> None:
    """Which implementation a shape gets, and why not the others."""
    num_heads, num_kv_heads = _head_counts(heads)
    kind = getattr(torch, dtype, None)
    if slc_block < 1 or num_selected < 1 or length < 1:
        raise typer.BadParameter(f"sizes must be at least 1, got {slc_block}, {num_selected} and {length}")
    if kind not in FLOATS:
        raise typer.BadParameter(f"dtype must be bfloat16, float16, float32 or float64, got {dtype!r}")
    shape = dispatch.Shape(
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=kind,
        head_dim=head_dim,
        v_head_dim=v_head_dim or head_dim,
        group=num_heads // num_kv_heads,
        max_blocks=-(-length // slc_block),
        slc_block=slc_block,
        rows=length * num_kv_heads,
        num_selected=num_selected,
        backward=training,
        capability=_capability(capability) if capability else dispatch.capability("cuda", None),
    )
    for operation in dispatch.TABLE:
        try:
            verdict = dispatch.resolve(operation, impl, shape)
        except (ValueError, NotImplementedError) as error:
            verdict = f"refused: {error}"
        typer.echo(f"{operation}: {verdict}")
        for name, reason in dispatch.why(operation, impl, shape):
            typer.echo(f"    {name:10} {reason}")


@app.command()
def verify(
    quick: Annotated[bool, typer.Option(help="one shape per kernel instead of all cells")] = False,
) -> None:
    """Check every kernel this machine can run against the reference. Exits with 1 if one fails."""
    from nsattn.verify import run

    raise typer.Exit(0 if run(quick=quick, echo=typer.echo) else 1)


@contextmanager
def _bad_parameters() -> Iterator[None]:
    """ValueErrors about what was asked for, said as those of a command line."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
@_bad_parameters()
def report(
    results: Annotated[Path, typer.Option(help="folder with the JSON files of nsattn bench")] = Path(
        "benchmarks/results/h200"
    ),
    out: Annotated[Path, typer.Option(help="HTML file to write")] = Path("runs/report.html"),
) -> None:
    """Write one self-contained page with all that was measured."""
    from nsattn.bench.report import write

    typer.echo(f"wrote {write(results, out)}")


def _say(line: str) -> None:
    """Print a line above the progress bar, if there is one: it redirects sys.stdout, which typer.echo goes around."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _json_file(out: str) -> str:
    """A file to write results to; what is none is refused before anything is timed."""
    if out and Path(out).is_dir():
        raise typer.BadParameter(f"got the folder {out}, needs a file in it, such as {Path(out) / 'results.json'}")
    return out


OutOption = Annotated[
    str,
    typer.Option(help="JSON file for the results; rows it already has stay unless redone", callback=_json_file),
]
BaseOption = Annotated[
    str, typer.Option(help="a git revision or a folder with a checkout: times that commit of ours too, case by case")
]


@bench.command("attention")
@_bad_parameters()
def bench_attention(
    lengths: Annotated[str, typer.Option(help="sequence lengths, comma separated; default: 8192,32768,65536")] = "",
    heads: Annotated[
        str, typer.Option(help="Hq/Hkv pairs, comma separated; default: 4/4,16/4,32/8,40/8,64/4")
    ] = "",
    out: OutOption = "",
    peers: Annotated[
        Path | None, typer.Option(help="folder with the checkouts of other projects, which are timed too")
    ] = None,
    base: BaseOption = "",
) -> None:
    """Time all operations, forward and backward, beside dense attention. No sizes: more, see benchmarks/README.md."""
    from nsattn.bench.attention import run
    from nsattn.bench.base import checkout, compare

    sizes = _lengths(lengths) if lengths else ()
    counts = [_head_counts(pair) for pair in heads.split(",")] if heads else ()
    with checkout(base) as other:
        rows = run(sizes, counts, out=out, peers=peers, echo=_say, base=other)
        compare(rows, other, echo=_say)


@bench.command("selected")
@_bad_parameters()
def bench_selected(
    only: Annotated[
        str, typer.Option(help="sets of shapes of nsattn/bench/cases.py, comma separated; default: all")
    ] = "",
    out: OutOption = "",
    peers: Annotated[Path, typer.Option(help="folder with the checkouts of other projects")] = Path("peers"),
    rounds: Annotated[int, typer.Option(min=1, help="how often the contenders of a shape take turns")] = 2,
    shard: Annotated[str, typer.Option(help="i/n: every n-th shape from the i-th on, counted from 0")] = "0/1",
    check: Annotated[bool, typer.Option("--check", help="check every contender, time none")] = False,
    base: BaseOption = "",
) -> None:
    """Time selected attention, forward and backward, beside other projects' kernels."""
    from nsattn.bench import run_selected
    from nsattn.bench.base import checkout, compare

    with checkout(base) as other:
        rows = run_selected(
            only=only, out=out, folder=peers, rounds=rounds, shard=_shard(shard), check_only=check, base=other,
            echo=_say,
        )  # fmt: skip
        compare(rows, other, echo=_say)


@bench.command("decode")
@_bad_parameters()
def bench_decode(
    out: OutOption = "",
    rounds: Annotated[int, typer.Option(min=1, help="how often the contenders of a shape take turns")] = 2,
    base: BaseOption = "",
) -> None:
    """Time the attention of a decoding step beside dense attention over the same cache."""
    from nsattn.bench.base import checkout, compare
    from nsattn.bench.decode import run

    with checkout(base) as other:
        compare(run(out=out, rounds=rounds, echo=_say, base=other), other, echo=_say)


@bench.command("model")
@_bad_parameters()
def bench_model(
    models: Annotated[str, typer.Option(help="Llama-3-8B, Qwen3-14B, Qwen2.5-32B, comma separated; default: all")] = "",
    lengths: Annotated[str, typer.Option(help="sequence lengths, comma separated")] = "8192,16384,32768,65536",
    layers: Annotated[int, typer.Option(min=1, help="layers of a model; fewer where they do not fit")] = 2,
    out: Annotated[
        str,
        typer.Option(
            help="JSON file for the results; what it has of this commit is not timed again", callback=_json_file
        ),
    ] = "",
    peers: Annotated[
        Path | None, typer.Option(help="folder with the checkouts of other projects, which are timed too")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="norms and MLPs by torch.compile, in all models")] = False,
) -> None:
    """Time training, prefill and decoding of model shapes with dense attention and with NSA. Needs the extra hf."""
    from nsattn.bench.model import run

    sizes = {"lengths": tuple(_lengths(lengths)), "layers": layers}
    run(models=models, **sizes, out=out, peers=peers, compiled=compiled, echo=_say)


@bench.command("all")
@_bad_parameters()
def bench_all(
    out: Annotated[Path, typer.Option(help="folder for results, pictures and report.html")],
    peers: Annotated[Path, typer.Option(help="folder with the checkouts of other projects")] = Path("peers"),
    only: Annotated[
        str, typer.Option(help="selected, attention, decode, model, compiled, comma separated; default: all")
    ] = "",
    limit: Annotated[float | None, typer.Option(min=0, help="begin no case after so many seconds")] = None,
    again: Annotated[bool, typer.Option("--again", help="also time what has rows of this commit")] = False,
    shared: Annotated[Path | None, typer.Option(hidden=True, help="see nsattn/bench/session.py")] = None,
) -> None:
    """Run selected, attention, decode and model on all GPUs, then draw. Goes on where it stopped; exits with 1 if more
    is left."""
    from nsattn.bench.session import Session
    from nsattn.bench.whole import benches, run

    session = Session(again=again, limit=limit, shared=shared)
    (benches if shared else run)(out, peers=peers, session=session, echo=_say, only=only)
    for line in session.left:
        typer.echo(f"left: {line}")
    raise typer.Exit(1 if session.left else 0)


@bench.command("plot")
@_bad_parameters()
def bench_plot(results: Annotated[Path, typer.Argument(help="JSON file of nsattn bench selected or model")]) -> None:
    """Draw as PNG beside the results: times against the group and the length, or speed-ups of models (models.json)."""
    from nsattn.bench.plots import draw, draw_models

    for picture in (draw_models if results.stem.startswith("models") else draw)(results):
        typer.echo(str(picture))


@bench.command("paper")
@_bad_parameters()
def bench_paper(
    results: Annotated[Path, typer.Option(help="folder with the JSON files of nsattn bench")] = Path(
        "benchmarks/results/h200"
    ),
    out: Annotated[Path, typer.Option(help="Markdown file to write; its pictures go beside it")] = Path(
        "docs/paper.md"
    ),
) -> None:
    """Write the page on what the Flash Sparse Attention paper claims, beside what was measured."""
    from nsattn.bench.paper import write

    for path in write(results, out):
        typer.echo(f"wrote {path}")


@bench.command("repeat")
@_bad_parameters()
def bench_repeat(
    old: Annotated[Path, typer.Argument(help="JSON file of nsattn bench")],
    new: Annotated[Path, typer.Argument(help="JSON file of the same bench, run again")],
    within: Annotated[float, typer.Option(min=0, help="by how much a ratio may change")] = 0.05,
) -> None:
    """Do two runs agree? Compare the ratios of contenders to ours; exits with 1 if one changed by more."""
    from nsattn.bench.repeat import compare, report

    found = compare(old, new)
    typer.echo(report(found, within))
    raise typer.Exit(any(abs(r.change) > within for r in found))


def _head_counts(text: str) -> tuple[int, int]:
    """(Hq, Hkv) of a text like 32/8."""
    try:
        num_heads, num_kv_heads = (int(x) for x in text.split("/"))
        if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
            raise ValueError
    except ValueError:
        raise typer.BadParameter(f"heads must be Hq/Hkv with Hq a multiple of Hkv, got {text!r}") from None
    return num_heads, num_kv_heads


def _capability(text: str) -> tuple[int, int]:
    try:
        major, minor = (int(x) for x in text.split("."))
    except ValueError:
        raise typer.BadParameter(f"capability must be like 9.0, got {text!r}") from None
    return major, minor


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(x) for x in text.split(",")]
        if min(lengths) < 1:
            raise ValueError
    except ValueError:
        raise typer.BadParameter(f"lengths must be positive numbers like 8192,65536, got {text!r}") from None
    return lengths


def _shard(text: str) -> tuple[int, int]:
    """(i, n) of a text like 0/3."""
    try:
        index, count = (int(x) for x in text.split("/"))
        if not 0 <= index < count:
            raise ValueError
    except ValueError:
        raise typer.BadParameter(f"shard must be i/n with i from 0 to n-1, got {text!r}") from None
    return index, count


def main() -> None:
    app()
