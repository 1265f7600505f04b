"""Block selections of a trained model on real text, recorded as realistic input for benchmarks."""

from __future__ import annotations

import json
import lzma
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nsattn.train.checkpoint import load_checkpoint, restore, write_atomically
from nsattn.train.data import load_corpus
from nsattn.train.loop import CHECKPOINT, check_memory, choose_device, precision
from nsattn.train.model import ByteLM
from nsattn.train.presets import RunConfig

KEY = "nsattn"  # where the JSON lies in the file's metadata


@torch.no_grad()
def record(
    folder: Path, lengths: Sequence[int], out: Path, *, device: str = "auto", impl: str = "auto"
) -> dict[str, Any]:
    """Run a trained model over held-out text of given lengths and save the blocks that each layer selected.

    The text of each length is the start of the held-out part. A model trained at 8K and run at 32K sees positions
    that its RoPE never met in training, so it predicts badly there; the selections are still those of a real model on
    real text, with the sharing between neighbouring tokens that random ones lack.

    The file is safetensors: `block_idx.<length>`, int16 `[layers, length, Hkv, N]`, unused slots -1, and JSON metadata
    with block sizes, model, text and lengths. Read it with `load_selection`.

    Args:
        folder: a run folder of `nsattn train`.
        lengths: bytes of text.
        out: file to write; must not exist. With a name that ends in .xz it is compressed, to about a fifth.
        device, impl: as for training.

    Returns:
        The metadata.

    Raises:
        ValueError: no usable checkpoint, full attention, too little text, more than fits on a CPU, or the file exists.
    """
    place = choose_device(device)
    saved = load_checkpoint(folder / CHECKPOINT)
    run = RunConfig.from_dict(saved.info["run"])
    if run.model.attention != "nsa":
        raise ValueError(f"{folder} was trained with full attention, which selects no blocks. Give one with nsa.")
    if not lengths or min(lengths) < 2:
        raise ValueError(f"lengths must be at least 2 bytes each, got {list(lengths)}. Give for example 8192,32768.")
    if max(lengths) > run.model.nsa.slc_block * 32767:
        raise ValueError(f"block indices are stored as int16, got length {max(lengths)}. Use shorter texts.")
    if out.exists():
        raise ValueError(f"{out} already exists. Give another file with --out, or remove it.")
    corpus = load_corpus(run.data)
    if saved.info["text_sha256"] != corpus.digest:
        raise ValueError(f"{corpus.name} is not the text that {folder} was trained on. Bring it back.")
    if max(lengths) > len(corpus.held_out):
        raise ValueError(f"the held-out text has {len(corpus.held_out)} bytes, got length {max(lengths)}. Lower it.")
    check_memory(run.model, place, 1, max(lengths), backward=False)
    model = ByteLM(run.model, impl=impl).to(place)
    restore(saved, folder / CHECKPOINT, model)
    tensors = {}
    for length in lengths:
        text = corpus.held_out[None, :length].to(place)
        with precision(place):
            tensors[f"block_idx.{length}"] = model.selections(text).to("cpu", torch.int16)
    info = {
        "lengths": list(lengths),
        "axes": ["layer", "position", "KV head", "slot"],
        "trained_at": run.seq_len,
        "step": saved.info["step"],
        "run": run.to_dict(),
        "text": {"name": corpus.name, "part": "start of the held-out part", "sha256": corpus.digest},
    }
    out.parent.mkdir(parents=True, exist_ok=True)

    def write(path: Path) -> None:
        save_file(tensors, path, metadata={KEY: json.dumps(info)})
        if out.suffix == ".xz":
            path.write_bytes(lzma.compress(path.read_bytes()))

    write_atomically(out, write)
    return info


def load_selection(path: Path | str) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """Read a file of `record`.

    Returns:
        `{length: int32 [layers, length, Hkv, N]}`, as `nsattn.attend_selected` takes it per layer, and the metadata
        (block sizes under `["run"]["model"]["nsa"]`).

    Raises:
        ValueError: the file is missing, damaged or of another kind.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(path)
            if plain.suffix == ".xz":
                plain = Path(folder) / "selection.safetensors"
                plain.write_bytes(lzma.decompress(Path(path).read_bytes()))
            with safe_open(plain, framework="pt") as file:
                info = json.loads((file.metadata() or {})[KEY])
                return {n: file.get_tensor(f"block_idx.{n}").int() for n in info["lengths"]}, info
    except (SafetensorError, lzma.LZMAError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file of nsattn record-selection ({error}). Record it again.") from error
