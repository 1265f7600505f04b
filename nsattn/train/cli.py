"""The commands `nsattn train` and `nsattn record-selection`.

Only typer is imported here; what training needs (`pip install nsattn[train]`) is imported when a command runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

P = ParamSpec("P")
EXTRA = ("matplotlib", "numpy", "rich", "safetensors")  # what nsattn[train] installs


def _errors_in_one_line(command: Callable[P, None]) -> Callable[P, None]:
    """User errors as one line and exit status 2, without a traceback."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except ModuleNotFoundError as error:
            if error.name not in EXTRA:
                raise
            typer.echo(f"error: {error}. Install what training needs: pip install 'nsattn[train]'", err=True)
            raise typer.Exit(2) from error
        except (ValueError, FloatingPointError, NotImplementedError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error
        except OSError as error:
            typer.echo(f"error: {error}. Check the path, its permissions and the space on its disk.", err=True)
            raise typer.Exit(2) from error

    return wrapped


@_errors_in_one_line
def train(
    preset: Annotated[str | None, typer.Option(help="tiny (2 CPU cores) or small (GPU); default: tiny")] = None,
    attention: Annotated[str | None, typer.Option(help="nsa or full, on the same model and data; default: nsa")] = None,
    data: Annotated[
        str | None, typer.Option(help="file or folder of text; default: the source files of Python's standard library")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the run; default: runs/<preset>-<attention>")] = None,
    steps: Annotated[int | None, typer.Option(help="optimiser steps")] = None,
    seq_len: Annotated[int | None, typer.Option(help="bytes per sequence")] = None,
    batch_size: Annotated[int | None, typer.Option(help="sequences per step")] = None,
    lr: Annotated[float | None, typer.Option(help="peak learning rate")] = None,
    seed: Annotated[int | None, typer.Option(help="of the weights and the order of the text")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    impl: Annotated[str, typer.Option(help="which implementation of NSA, as impl= in the library")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="go on from the checkpoint in the run's folder")] = False,
    compare: Annotated[
        list[Path] | None, typer.Option(help="folder of another run to draw into the loss picture; repeatable")
    ] = None,
) -> None:
    """Train a byte-level language model whose attention is NSA on real text, and show what it learned.

    Ctrl-C saves a checkpoint; --resume goes on from it exactly.
    """
    from dataclasses import replace

    from nsattn.train.loop import train_run
    from nsattn.train.presets import PRESETS

    name, kind = preset or "tiny", attention or "nsa"
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}.")
    given = {"data": data, "steps": steps, "seq_len": seq_len, "batch_size": batch_size, "lr": lr, "seed": seed}
    asked: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    run = replace(PRESETS[name].with_attention(kind), **asked)
    asked |= {key: value for key, value in {"preset": preset, "attention": attention}.items() if value is not None}
    folder = out or Path("runs") / f"{name}-{kind}"
    outcome = train_run(
        run, folder, device=device, impl=impl, resume=resume, asked=asked, compare=compare or (),
    )
    if not outcome.finished or outcome.held_out is None:
        typer.echo(f"stopped after step {outcome.step}; checkpoint saved")
        typer.echo(f"go on with: nsattn train --out {folder} --resume")
        raise typer.Exit(130)
    held_out, bigram, trigram = outcome.held_out, outcome.baselines["bigram"], outcome.baselines["trigram"]
    typer.echo(f"held out   {held_out:.3f} bits per byte after {outcome.step} steps")
    typer.echo(f"bigram     {bigram:.3f} ({held_out / bigram - 1:+.1%} from there to the model)")
    typer.echo(f"trigram    {trigram:.3f} ({held_out / trigram - 1:+.1%})")
    for path in outcome.files:
        typer.echo(f"wrote      {path}")


@_errors_in_one_line
def inspect(
    source: Annotated[Path, typer.Argument(help="folder of a run of nsattn train, or a recorded selection")],
    out: Annotated[Path, typer.Option(help="folder for the pictures and the page")] = Path("runs/inspect"),
    text: Annotated[Path | None, typer.Option(help="text to read; default: held-out text of the run")] = None,
    length: Annotated[int, typer.Option(min=0, help="bytes to read; 0: as in training, or the first recorded")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    impl: Annotated[str, typer.Option(help="which implementation of NSA, as impl= in the library")] = "auto",
) -> None:
    """Show which blocks a model selects on a text, and how much weight each branch gets."""
    from nsattn.train.inspect import inspect as run

    for path in run(source, out, text=text, length=length, device=device, impl=impl):
        typer.echo(f"wrote {path}")


@_errors_in_one_line
def record_selection(
    run_dir: Annotated[Path, typer.Argument(help="folder of a run of nsattn train")],
    out: Annotated[Path, typer.Option(help="safetensors file to write; .safetensors.xz compresses it")],
    lengths: Annotated[str, typer.Option(help="bytes of text, comma separated")] = "8192,32768",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    impl: Annotated[str, typer.Option(help="which implementation of NSA, as impl= in the library")] = "auto",
) -> None:
    """Save the blocks that a trained model selects on real text, as realistic input for benchmarks."""
    from nsattn.train.selection import record

    try:
        sizes = [int(length) for length in lengths.split(",")]
    except ValueError:
        raise ValueError(f"lengths must be whole numbers with commas between, got {lengths!r}.") from None
    info = record(run_dir, sizes, out, device=device, impl=impl)
    typer.echo(f"wrote {out}: {info['run']['model']['layers']} layers at {lengths} bytes, {out.stat().st_size:,} bytes")
