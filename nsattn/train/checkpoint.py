"""Checkpoints: one safetensors file with model, optimiser and random state, written so that it is whole or absent."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = 1
KEY = "nsattn"  # where the JSON lies in the file's metadata


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: `info` holds format, step, the run's settings and the digest of its text.

    Tensors are named `model.<parameter>`, `optimizer.<state>.<parameter>`, `rng.cpu`, `rng.cuda`.
    """

    info: dict[str, Any]
    tensors: dict[str, Tensor]


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int, run: Mapping[str, Any], digest: str
) -> None:
    """Write a checkpoint. The file appears under its name only when complete; an older one stays until then."""
    tensors: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p
        for key, value in optimizer.state[p].items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    info = {"format": FORMAT, "step": step, "run": dict(run), "text_sha256": digest, "crc32": _crc32(tensors)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={KEY: json.dumps(info)}))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises ValueError where it is missing, damaged or not one of ours; never touches the file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint. Give the folder of a run that saved one, or drop --resume.")
    try:
        with safe_open(path, framework="pt") as file:
            info = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if info["format"] != FORMAT:
            raise ValueError(f"format {info['format']}, this version reads {FORMAT}")
        if info["crc32"] != _crc32(tensors):
            raise ValueError("its bytes do not match their checksum")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a usable checkpoint ({error}); it was left as it is. Restore it from a copy, or start "
            "again in another folder (--out)."
        ) from error
    return Checkpoint(info, tensors)


def restore(
    checkpoint: Checkpoint, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put a checkpoint into a model; with an optimiser, also into that and into torch's random state.

    Raises ValueError if it does not fit; `path` is for that message.
    """
    parameters = dict(model.named_parameters())
    saved = {name.removeprefix("model."): x for name, x in checkpoint.tensors.items() if name.startswith("model.")}
    wrong = sorted(
        parameters.keys() ^ saved.keys()
        | {name for name in parameters.keys() & saved.keys() if parameters[name].shape != saved[name].shape}
    )
    if wrong:
        raise ValueError(
            f"{path} does not fit this model: {len(wrong)} parameters are missing, extra or of another shape, the "
            f"first {wrong[0]}. Use the version of nsattn that wrote it; it was left as it is."
        )
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(saved[name])
    if optimizer is None:
        return
    state: dict[int, dict[str, Tensor]] = {}
    names = {p: name for name, p in parameters.items()}
    ordered = [names[p] for group in optimizer.param_groups for p in group["params"]]
    for index, name in enumerate(ordered):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = checkpoint.tensors.get(f"optimizer.{key}.{name}")
            if value is not None:  # none before the first step
                state.setdefault(index, {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(checkpoint.tensors["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in checkpoint.tensors:
        torch.cuda.set_rng_state(checkpoint.tensors["rng.cuda"])


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)`, then give the finished file its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _crc32(tensors: Mapping[str, Tensor]) -> int:
    crc = 0
    for name in sorted(tensors):
        data = tensors[name].reshape(-1).view(torch.uint8).numpy()
        crc = zlib.crc32(data.data, zlib.crc32(name.encode(), crc))
    return crc
