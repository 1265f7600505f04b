"""The `nsattn` command: info, why, verify, bench, train, record-selection."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from nsattn import dispatch
from nsattn.checks import FLOATS
from nsattn.environment import environment
from nsattn.train.cli import record_selection, train

app = typer.Typer(
    help="Native Sparse Attention (arXiv 2502.11089), run the Flash Sparse Attention way (arXiv 2508.18224).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command("record-selection")(record_selection)

EQUATIONS = (  # tag in the paper, what it computes, public function
    ("Eq 7", "compress blocks of keys and values", "compress"),
    ("Eq 8", "attend to the compressed blocks", "attend_compressed"),
    ("Eq 9, 10", "score and select blocks", "select_blocks"),
    ("Eq 11, 12", "attend to the selected blocks", "attend_selected"),
    ("Section 3.3.3", "sliding window", "attend_window"),
    ("Eq 5", "gate and sum the branches", "combine"),
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
    impl: Annotated[str, typer.Option(help="what you would pass as impl=")] = "auto",
) -> None:
    """Which implementation a shape gets, and why not the others."""
    num_heads, num_kv_heads = _head_counts(heads)
    kind = getattr(torch, dtype, None)
    if kind not in FLOATS:
        raise typer.BadParameter(f"dtype must be bfloat16, float16, float32 or float64, got {dtype!r}")
    shape = dispatch.Shape(
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=kind,
        head_dim=head_dim,
        v_head_dim=v_head_dim or head_dim,
        group=num_heads // num_kv_heads,
        max_blocks=-(-length // slc_block),
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


@app.command()
def bench(
    lengths: Annotated[str, typer.Option(help="sequence lengths, comma separated")] = "8192,32768,65536",
    heads: Annotated[str, typer.Option(help="Hq/Hkv pairs, comma separated")] = "4/4,16/4,32/8,40/8,64/4",
    out: Annotated[str, typer.Option(help="JSON file for the results")] = "",
) -> None:
    """Time every operation, forward and backward, beside dense attention."""
    from nsattn.bench import run

    run(_lengths(lengths), [_head_counts(pair) for pair in heads.split(",")], out=out, echo=typer.echo)


def _head_counts(text: str) -> tuple[int, int]:
    """(Hq, Hkv) of a text like 32/8."""
    try:
        num_heads, num_kv_heads = (int(x) for x in text.split("/"))
        if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
            raise ValueError
    except ValueError:
        raise typer.BadParameter(f"heads must be Hq/Hkv with Hq a multiple of Hkv, got {text!r}") from None
    return num_heads, num_kv_heads


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(x) for x in text.split(",")]
        if min(lengths) < 1:
            raise ValueError
    except ValueError:
        raise typer.BadParameter(f"lengths must be positive numbers like 8192,65536, got {text!r}") from None
    return lengths


def main() -> None:
    app()
