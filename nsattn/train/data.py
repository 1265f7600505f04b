"""Real text as bytes: the corpus, its held-out part, batches by step, and n-gram baselines."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SEGMENT = 65536  # bytes of a segment of the split
HELD_OUT_EVERY = 20  # every 20th segment is held out

# Parts of the standard library that some systems package separately or newer Pythons dropped.
NOT_EVERYWHERE = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip",
     "lib2to3", "distutils", "__pycache__"}
)


@dataclass(frozen=True)
class Corpus:
    """A text as bytes, cut into a training and a held-out part.

    The text is cut into segments of 64 KiB, of a 20th of it where it is shorter than 20 of those; every 20th segment
    (number 19, 39, ...) is held out. Each part is the concatenation of its segments.
    """

    name: str
    train: Tensor  # uint8 [bytes]
    held_out: Tensor  # uint8 [bytes]
    digest: str  # SHA-256 of the whole text

    def batch(self, step: int, *, batch_size: int, seq_len: int, seed: int) -> Tensor:
        """Windows of the training part for a step, uint8 `[batch_size, seq_len + 1]`.

        A function of its arguments alone, so a resumed run sees what an uninterrupted one would have seen.
        """
        starts = np.random.default_rng((seed, step)).integers(0, len(self.train) - seq_len, size=batch_size)
        return self.train[torch.from_numpy(starts)[:, None] + torch.arange(seq_len + 1)]

    def held_out_windows(self, count: int, seq_len: int) -> Tensor:
        """At most `count` windows spread evenly over the held-out part, uint8 `[windows, seq_len + 1]`.

        Windows overlap in one byte, the last of one being the first of the next, which is only read and not predicted;
        so no byte is measured twice.
        """
        fitting = (len(self.held_out) - 1) // seq_len
        count = min(count, fitting)
        starts = torch.arange(count) * fitting // count * seq_len
        return self.held_out[starts[:, None] + torch.arange(seq_len + 1)]


def load_corpus(data: str = "", *, seq_len: int = 2) -> Corpus:
    """Read a corpus and split it.

    Args:
        data: a file, or a folder: all its files in order of their paths, without hidden ones and without binary ones
            (a zero byte in the first 8 KiB). Empty: all .py files of the running Python's standard library, without
            the parts that not every installation has.
        seq_len: bytes of context that each part must hold at least, plus one to predict.

    Raises:
        ValueError: the path is missing or unreadable, there is no text, or less than needed.
    """
    name, text = _read(data)
    if not text:
        raise ValueError(f"{name} holds no text. Give a file or folder with text (--data).")
    whole = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    segment = max(1, min(SEGMENT, len(whole) // HELD_OUT_EVERY))
    parts: tuple[list[Tensor], list[Tensor]] = ([whole[:0]], [whole[:0]])
    for i, part in enumerate(whole.split(segment)):
        parts[i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1].append(part)
    corpus = Corpus(name, torch.cat(parts[0]), torch.cat(parts[1]), hashlib.sha256(text).hexdigest())
    short = min(len(corpus.train), len(corpus.held_out))
    if short < seq_len + 1:
        raise ValueError(
            f"{name} is too short: {len(whole)} bytes, of which {len(corpus.held_out)} are held out, but a sequence "
            f"needs {seq_len + 1} in each part. Give at least {HELD_OUT_EVERY * (seq_len + 1)} bytes (--data) or "
            "shorter sequences (--seq-len)."
        )
    return corpus


def _read(data: str) -> tuple[str, bytes]:
    if not data:
        root = Path(sysconfig.get_path("stdlib"))
        files = [p for p in root.rglob("*.py") if not NOT_EVERYWHERE & set(p.relative_to(root).parts)]
        name = "Python's standard library"
    else:
        root, name = Path(data), f"--data {data}"
        if root.is_dir():
            files = [p for p in root.rglob("*") if not _hidden(p.relative_to(root)) and p.is_file()]
        elif root.is_file():
            files = [root]
        else:
            raise ValueError(f"{name}: no such file or folder. Give a path to text.")
    try:
        texts = [p.read_bytes() for p in sorted(files, key=lambda p: p.relative_to(root).as_posix())]
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error}. Change its permissions or give another path.") from error
    if len(texts) > 1:
        texts = [text for text in texts if b"\0" not in text[:8192]]
    return name, b"".join(texts)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def ngram_bits_per_byte(train: Tensor, windows: Tensor) -> dict[str, float]:
    """Bits per byte that counting bytes gets: what a model must beat to have learned more than local statistics.

    By the probabilities of `ngram_probabilities`, under the same names.
    """
    return {name: -p.log2().mean().item() for name, p in ngram_probabilities(train, windows).items()}


def ngram_probabilities(train: Tensor, windows: Tensor) -> dict[str, Tensor]:
    """Probability of every predicted byte by the byte, pair and triple counts of the training text.

    Interpolated (Dirichlet) smoothing, each order backed by the one below, with alpha = 1 for pairs and triples:

        p1(c)     = (n(c) + 1) / (n + 256)
        p2(c|b)   = (n(bc) + alpha p1(c)) / (n(b.) + alpha)
        p3(c|ab)  = (n(abc) + alpha p2(c|b)) / (n(ab.) + alpha)

    Args:
        train: uint8 `[bytes]`, counted.
        windows: uint8 `[windows, S + 1]`, S >= 2; all bytes but the first of each are predicted, from bytes of the
            window. The second byte of a window has one byte of context, so the trigram falls back to the bigram there.

    Returns:
        float64 `[windows, S]` under "unigram", "bigram", "trigram".
    """
    alpha = 1.0
    w, context = windows, train[:-1]  # a string at the very end is no context: nothing follows it
    p1 = (_count(train, w[:, 1:, None]) + 1) / (len(train) + 256)
    p2 = (_count(train, w.unfold(1, 2, 1)) + alpha * p1) / (_count(context, w[:, :-1, None]) + alpha)
    triples, pairs = _count(train, w.unfold(1, 3, 1)), _count(context, w[:, :-1].unfold(1, 2, 1))
    p3 = torch.cat([p2[:, :1], (triples + alpha * p2[:, 1:]) / (pairs + alpha)], dim=1)
    return {"unigram": p1, "bigram": p2, "trigram": p3}


def _count(text: Tensor, strings: Tensor) -> Tensor:
    """How often each byte string of `strings` `[..., n]`, n <= 3, occurs in `text`: float64 `[...]`."""
    order = strings.shape[-1]
    table = torch.bincount(_code(text.unfold(0, order, 1)), minlength=256**order)
    return table[_code(strings)].double()


def _code(strings: Tensor) -> Tensor:
    """Byte strings `[..., n]` as the numbers that they spell in base 256."""
    code = strings[..., 0].int()
    for i in range(1, strings.shape[-1]):
        code = code * 256 + strings[..., i]
    return code


def bits(loss: float) -> float:
    """Cross-entropy in nats per byte as bits per byte."""
    return loss / math.log(2)
