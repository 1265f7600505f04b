"""`--base`: another commit of ours, timed beside this one in the same session, case by case.

Machines are shared and drift, so numbers of two sessions do not compare. The other commit lies in a folder of its own,
and right after each case of ours its own `nsattn bench` runs in a new process, with the options that name this case.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import nsattn
from nsattn.bench.timing import KEY, OURS, Echo, Row, read_rows

ROOT = Path(nsattn.__file__).parent.parent


def gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(count)] if named is None else named.split(",")[:count]


def bench(folder: Path, *options: str, gpu: str | None = None) -> dict[str, Any]:
    """Arguments of subprocess.run or Popen for `nsattn bench <options>` of the checkout in `folder`.

    Args:
        gpu: one of `gpus`, the only one that the process sees; default: all.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    return {"args": [sys.executable, "-m", "nsattn", "bench", *options], "env": environment, "text": True}


def run_bench(folder: Path, *options: str, gpu: str | None = None, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run it to its end and keep what it prints; `how` as for subprocess.run."""
    return subprocess.run(**bench(folder, *options, gpu=gpu), capture_output=True, **how)


@dataclass(frozen=True)
class Base:
    """Another commit of ours: its name and the folder that holds it."""

    commit: str
    folder: Path

    @property
    def who(self) -> str:
        return f"{OURS}@{self.commit}"

    def rows(self, bench: str, *options: str, echo: Echo) -> list[Row]:
        """Its own rows of `nsattn bench <bench> <options>`; none, and the reason said, if it fails."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # it needs the memory
        with TemporaryDirectory() as made:
            out = Path(made) / "rows.json"
            done = run_bench(self.folder, bench, *options, "--out", str(out), cwd=self.folder)
            if done.returncode or not out.exists():
                lines = re.findall(r".*\w.*", done.stderr or done.stdout) or ["it wrote nothing"]
                echo(f"  {self.who} {' '.join((bench, *options))} not run: {lines[-1].strip(' │')}")
                return []
            return [replace(r, who=self.who, commit=self.commit) for r in read_rows(out) if r.who == OURS]


@contextmanager
def checkout(revision: str) -> Iterator[Base | None]:
    """Another commit, in a temporary folder unless `revision` is a folder that holds one; None for an empty text.

    Raises:
        ValueError: neither a commit of this checkout nor such a folder.
    """
    folder = Path(revision)
    if not revision:
        yield None
    elif (folder / "nsattn" / "__main__.py").is_file():
        described = _git(folder, "describe", "--always", "--dirty") if (folder / ".git").exists() else ""
        yield Base(described or folder.resolve().name, folder.resolve())
    else:
        commit = _git(ROOT, "rev-parse", "--verify", "--quiet", "--short", f"{revision}^{{commit}}")
        if not commit:
            raise ValueError(
                f"base must be a commit of {ROOT} or a folder with a checkout of nsattn, got {revision!r}. "
                "Where there is no .git, copy the other commit into a folder and name it."
            )
        with TemporaryDirectory(prefix="nsattn-base-") as made:
            archive = Path(made) / "base.zip"
            _git(ROOT, "archive", "--format=zip", f"--output={archive}", commit)
            shutil.unpack_archive(archive, made)
            yield Base(commit, Path(made))


def _git(folder: Path, *arguments: str) -> str:
    """What git prints; an empty text where it fails or is not there."""
    try:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def compare(rows: Sequence[Row], base: Base | None, *, echo: Echo) -> None:
    """Say for each thing that either commit timed: ours, base, and their ratio, above 1 where ours is faster."""
    if base is None:
        return
    pairs: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows:
        if row.who in (OURS, base.who):
            pairs.setdefault(tuple(getattr(row, name) for name in KEY if name != "who"), {})[row.who] = row
    echo(f"ms of this commit, ms of {base.who}, and how many times as fast this commit is:")
    for pair in pairs.values():
        row = next(iter(pair.values()))
        tokens = f"{row.sequences}x{row.T // row.sequences}" if row.sequences > 1 else f"{row.T}"
        shape = f"T={tokens} {row.Hq}/{row.Hkv} D={row.D}/{row.Dv} (B,N)=({row.B},{row.N}) {row.dtype}"
        ours, theirs = (_cell(pair.get(who)) for who in (OURS, base.who))
        ratio = f"{pair[base.who].ms / pair[OURS].ms:6.2f}x" if len(pair) == 2 else ""
        what = f"{row.set} {shape} {row.selection} {row.op} {row.impl} {row.direction}"
        echo(f"{what.strip():110} {ours} {theirs} {ratio}")


def _cell(row: Row | None) -> str:
    return f"{'not timed':>15}" if row is None else f"{row.ms:9.4f} {'ok' if row.ok else 'WRONG':5}"
