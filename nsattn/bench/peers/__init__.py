"""Other projects that are timed beside ours: one small file each, nothing of theirs is copied.

A file here states

    WHO       its name in results files
    CAPTURES  whether its calls can be captured in a CUDA graph (they never wait for the device)
    OP        what it computes, "attend_selected" unless stated
    load(folder) -> impl
              imports the project, from `folder` where it is a checkout, and names the variant that was found;
              raises `Missing` with what to do if it is not there
    refuses(case) -> reason
              why it cannot run a shape of its kind, or an empty text
    prepare(problem) -> call
              brings the selection into its form, which is not timed, and returns a function (q, k, v) -> o of packed
              `[T, H, D]` tensors with an autograd backward

and its name is in `NAMES`. What it computes is judged by the rule of `nsattn.testing`, like our own.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor

from nsattn.bench.cases import Case
from nsattn.plan import Plan

NAMES = ("fsa", "nsa_ref", "sfnsa", "fla", "dense")  # modules of this package

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


class Missing(Exception):
    """A peer is not on this machine; the text says how to get it."""


@dataclass
class Problem:
    """What is to be computed: packed inputs, and the selection as `nsattn.attend_selected` takes it."""

    case: Case
    q: Tensor  # [T, Hq, D]
    k: Tensor  # [T, Hkv, D]
    v: Tensor  # [T, Hkv, Dv]
    selection: Tensor  # int32 [T, Hkv, N]
    plan: Plan


class Peer(Protocol):
    """The form of a module of this package."""

    WHO: str
    CAPTURES: bool

    def load(self, folder: Path) -> str: ...
    def refuses(self, case: Case) -> str: ...
    def prepare(self, problem: Problem) -> Call: ...


def peer(name: str) -> Peer:
    """The adapter of that name."""
    return cast(Peer, importlib.import_module(f"nsattn.bench.peers.{name}"))


def import_from(checkout: Path, module: str, url: str) -> None:
    """Put a checkout on Python's path and import one of its modules.

    Raises:
        Missing: no such folder, or what it needs is not installed.
    """
    if not checkout.is_dir():
        raise Missing(f"no checkout: git clone {url} {checkout}")
    if str(checkout) not in sys.path:
        sys.path.append(str(checkout))
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"{checkout} cannot be imported: {error}") from error
