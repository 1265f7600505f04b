"""The training loop: `train_run` starts or resumes a run, trains, measures, and leaves everything in the run's folder.

A run folder holds `config.json` (settings, text, baselines, environment), `metrics.jsonl` (one line per step and per
measurement), `checkpoint.safetensors`, and at the end `sample.txt`, `loss.png` and, with NSA, `selection.png`.
"""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from nsattn.train import checkpoint as checkpoints
from nsattn.train.data import Corpus, bits, load_corpus, ngram_bits_per_byte
from nsattn.train.model import ByteLM, ModelConfig
from nsattn.train.pictures import draw_loss, draw_selection, read_curve
from nsattn.train.presets import RunConfig
from nsattn.train.sample import generate

CHECKPOINT, CONFIG, METRICS = "checkpoint.safetensors", "config.json", "metrics.jsonl"
PROMPT = 128  # bytes of held-out text that the sample continues


@dataclass(frozen=True)
class Outcome:
    """What a run came to. `finished` is false where it was stopped; the measurements are bits per byte."""

    folder: Path
    step: int
    finished: bool
    held_out: float | None
    baselines: Mapping[str, float]
    files: Sequence[Path]


def train_run(
    run: RunConfig,
    out: Path,
    *,
    device: str = "auto",
    impl: str = "auto",
    resume: bool = False,
    asked: Mapping[str, Any] | None = None,
    compare: Sequence[Path] = (),
    console: Console | None = None,
) -> Outcome:
    """Train a `ByteLM` as `run` says, in the folder `out`.

    Args:
        run: settings. When resuming, those of the checkpoint count instead.
        out: the run's folder; must be empty or absent unless resuming.
        device: `auto`, `cpu` or `cuda`; on a GPU the model runs under bf16 autocast.
        impl: which implementation of NSA, see `nsattn.nsa_attention`.
        resume: go on from the checkpoint in `out`. On a CPU the result is bit for bit that of an uninterrupted run.
        asked: settings that must agree with the checkpoint's when resuming, by name in `RunConfig` or `attention`.
        compare: folders of other runs to draw into the loss picture.
        console: where to write.

    Returns:
        An `Outcome`. The first Ctrl-C (or SIGTERM) ends the current step, saves a checkpoint and returns.

    Raises:
        ValueError: settings, text, folder or checkpoint cannot be used. Raised before anything is written.
        NotImplementedError: the implementation asked for cannot run here. Raised before anything is written.
        FloatingPointError: the loss is no longer a number. The last checkpoint stays.
    """
    console = console or Console()
    place = choose_device(device)
    for folder in compare:
        read_curve(folder)
    saved = None
    if resume:
        saved = checkpoints.load_checkpoint(out / CHECKPOINT)
        run = _settings(saved, out / CHECKPOINT)
        _check_agreement(run, asked or {}, out)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{out} already exists and is not empty. Add --resume to go on with that run, give another folder with "
            "--out, or remove it."
        )
    check_memory(run.model, place, run.batch_size, run.seq_len)
    corpus = load_corpus(run.data, seq_len=run.seq_len)
    training = _Training(run, corpus, out, place, impl)
    if saved is not None:
        training.restore(saved)
    training.check_forward()
    training.announce(console)
    with _StopRequest() as stop:
        training.run_steps(stop, console)
    if not training.finished:
        return training.outcome([])
    return training.finish(compare, console)


class _Training:
    """A run in progress: model, optimiser, text and the files of its folder. `step` counts finished steps."""

    def __init__(self, run: RunConfig, corpus: Corpus, out: Path, device: torch.device, impl: str) -> None:
        self.run, self.corpus, self.out, self.device = run, corpus, out, device
        torch.manual_seed(run.seed)
        self.model = ByteLM(run.model, impl=impl).to(device)
        self.optimizer = _optimizer(self.model, run)
        self.windows = corpus.held_out_windows(run.eval_windows, run.seq_len)
        self.baselines = ngram_bits_per_byte(corpus.train, self.windows)
        self.step, self.held_out = 0, None
        every = [math.ceil(run.steps * (i + 1) / run.evals) for i in range(run.evals)]
        self.eval_steps = frozenset(every)

    @property
    def finished(self) -> bool:
        return self.step >= self.run.steps

    def restore(self, saved: checkpoints.Checkpoint) -> None:
        path = self.out / CHECKPOINT
        if saved.info["text_sha256"] != self.corpus.digest:
            raise ValueError(
                f"{self.corpus.name} is not the text that {path} was trained on (another SHA-256). Bring that text "
                "back or start a new run with --out."
            )
        checkpoints.restore(saved, path, self.model, self.optimizer)
        self.step = saved.info["step"]

    @torch.no_grad()
    def check_forward(self) -> None:
        """Run the model once: an implementation that cannot take it says so before anything is written."""
        self._loss(self.windows[:1])

    def announce(self, console: Console) -> None:
        """Write config.json, drop metrics of steps that will be made again, and say what is about to run."""
        self.out.mkdir(parents=True, exist_ok=True)
        _forget_later(self.out / METRICS, self.step)
        facts = {
            "run": self.run.to_dict(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "text": {"name": self.corpus.name, "sha256": self.corpus.digest, "train_bytes": len(self.corpus.train),
                     "held_out_bytes": len(self.corpus.held_out), "measured_bytes": self.windows[:, 1:].numel()},
            "baselines": self.baselines,
            "environment": {"torch": torch.__version__, "python": platform.python_version(),
                            "device": _device_name(self.device)},
        }
        text = json.dumps(facts, indent=2) + "\n"
        checkpoints.write_atomically(self.out / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
        run = self.run
        _say(console, f"{run.preset or 'run'}: {run.model.attention} attention, {facts['parameters']:,} parameters, "
             f"{run.batch_size} x {run.seq_len} bytes per step, {run.steps} steps, on {_device_name(self.device)}")
        _say(console, f"text: {self.corpus.name}, {len(self.corpus.train):,} bytes to train on, "
             f"{self.windows[:, 1:].numel():,} held-out bytes measured")
        if self.step:
            _say(console, f"resumed after step {self.step}")

    def run_steps(self, stop: _StopRequest, console: Console) -> None:
        """Train until the last step or a request to stop; a checkpoint exists afterwards."""
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[bits]:.3f} bits/byte"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
        )
        begun = self.step
        if not self.finished:
            bar = Progress(*columns, console=console)
            with bar as progress, open(self.out / METRICS, "a", encoding="utf-8") as metrics:
                task = progress.add_task(
                    "train", total=self.run.steps, completed=self.step, loss=math.nan, bits=math.nan, speed=math.nan
                )
                while not self.finished and not stop.requested:
                    line = self.train_step()
                    _append(metrics, line)
                    progress.update(
                        task, advance=1, loss=line["loss"], bits=bits(line["loss"]), speed=line["tokens_per_s"]
                    )
                    if self.step in self.eval_steps:
                        self.held_out = self.evaluate()
                        seen = {"step": self.step, "bytes": line["bytes"]}
                        _append(metrics, {**seen, "held_out_bits_per_byte": self.held_out})
                        _say(progress.console, f"step {self.step}: held out {self.held_out:.3f} bits per byte "
                             f"(bigram {self.baselines['bigram']:.3f}, trigram {self.baselines['trigram']:.3f}), "
                             f"training {bits(line['loss']):.3f}, {line['tokens_per_s']:,.0f} tokens/s")
                    if self.step % self.run.checkpoint_every == 0 and not self.finished:
                        self.save()
        if self.step > begun:
            self.save()

    def train_step(self) -> dict[str, Any]:
        """One optimiser step; returns its line for the metrics."""
        start = time.perf_counter()
        run = self.run
        rate = learning_rate(self.step, run)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.corpus.batch(self.step, batch_size=run.batch_size, seq_len=run.seq_len, seed=run.seed)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), run.clip_norm)
        value = loss.item()
        if not math.isfinite(value) or not math.isfinite(norm.item()):
            raise FloatingPointError(
                f"step {self.step + 1}: loss {value}, gradient norm {norm.item()}; training cannot go on. The last "
                f"checkpoint in {self.out} stays as it is. Start a new run with a lower --lr than {run.lr}."
            )
        self.optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - start
        seen = run.batch_size * run.seq_len
        return {"step": self.step, "bytes": self.step * seen, "loss": value, "lr": rate, "grad_norm": norm.item(),
                "tokens_per_s": seen / seconds}

    @torch.no_grad()
    def evaluate(self) -> float:
        """Bits per byte on the held-out windows."""
        losses = [self._loss(part) * len(part) for part in self.windows.split(self.run.batch_size)]
        return bits(torch.stack(losses).sum().item() / len(self.windows))

    def _loss(self, windows: Tensor) -> Tensor:
        windows = windows.to(self.device).long()
        with precision(self.device):
            logits = self.model(windows[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    def save(self) -> None:
        checkpoints.save_checkpoint(
            self.out / CHECKPOINT, self.model, self.optimizer, step=self.step, run=self.run.to_dict(),
            digest=self.corpus.digest,
        )

    def finish(self, compare: Sequence[Path], console: Console) -> Outcome:
        """Measure, write a sample and draw the pictures of a run that made all its steps."""
        if self.held_out is None:  # a finished run was resumed
            self.held_out = self.evaluate()
        files = [self.out / "loss.png"]
        draw_loss([self.out, *compare], files[0])
        if self.run.model.attention == "nsa":
            files.append(self.out / "selection.png")
            window = self.windows[:1, :-1].to(self.device)
            with torch.no_grad(), precision(self.device):
                selections = self.model.selections(window).cpu()
            draw_selection(selections, self.run.model.nsa, files[-1])
        prompt = self.windows[0, : min(PROMPT, self.run.seq_len // 2)]
        with precision(self.device):
            text = generate(self.model, prompt, self.run.sample_bytes, context=self.run.seq_len, seed=self.run.seed)
        files.append(self.out / "sample.txt")
        shown = bytes(prompt.tolist()).decode(errors="replace"), text.decode(errors="replace")
        files[-1].write_text(f"--- prompt (held-out text)\n{shown[0]}\n--- generated\n{shown[1]}\n", encoding="utf-8")
        _say(console, f"--- sample: continues held-out text\n{shown[0]}\n--- with\n{shown[1]}\n---")
        return self.outcome(files)

    def outcome(self, files: Sequence[Path]) -> Outcome:
        return Outcome(self.out, self.step, self.finished, self.held_out, self.baselines, files)


class _StopRequest:
    """Turns the first SIGINT or SIGTERM into `requested`, so that no step is cut in two; the second one interrupts."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def learning_rate(step: int, run: RunConfig) -> float:
    """Rate of step `step` (from 0): linear warm-up, then a cosine down to `final_lr` of the peak at the last step."""
    if step < run.warmup:
        return run.lr * (step + 1) / run.warmup
    progress = (step - run.warmup) / max(1, run.steps - 1 - run.warmup)
    return run.lr * (run.final_lr + (1 - run.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def choose_device(device: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises ValueError for a device that is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no GPU here. Use --device cpu or auto.")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def precision(device: torch.device) -> AbstractContextManager:
    """bf16 autocast on a GPU; float32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def check_memory(
    model: ModelConfig, device: torch.device, batch_size: int, seq_len: int, *, backward: bool = True
) -> None:
    """Refuse what the reference path cannot hold: on a CPU, NSA makes whole score matrices."""
    if device.type != "cpu" or model.attention != "nsa":
        return
    # Measured: about nine such matrices per layer live until the backward; without one, about four of one layer.
    matrices = 9 * model.layers if backward else 4
    needed = matrices * batch_size * model.num_heads * seq_len**2 * 4
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"NSA at {batch_size} sequences of {seq_len} bytes needs about {needed / 2**30:.0f} GiB on a CPU, where "
            f"the reference makes whole score matrices; this machine has {there / 2**30:.0f} GiB. Use a GPU, "
            + ("--preset tiny, or lower --seq-len or --batch-size." if backward else "or read fewer bytes.")
        )


def _optimizer(model: ByteLM, run: RunConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": run.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, 0.95), eps=1e-8)


def _settings(saved: checkpoints.Checkpoint, path: Path) -> RunConfig:
    try:
        return RunConfig.from_dict(saved.info["run"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its settings cannot be used ({error}). Use the nsattn that wrote it.") from error


def _check_agreement(run: RunConfig, asked: Mapping[str, Any], out: Path) -> None:
    """What the caller asked for by name must be what the run has."""
    has = {field.name: getattr(run, field.name) for field in fields(run)} | {"attention": run.model.attention}
    wrong = {name: value for name, value in asked.items() if has[name] != value}
    differing = [f"{name} is {has[name]!r} there, {value!r} was asked for" for name, value in wrong.items()]
    if differing:
        raise ValueError(
            f"{out} holds a run with other settings: {'; '.join(differing)}. Leave these options out to resume it, or "
            "start a new run with --out."
        )


def _forget_later(metrics: Path, step: int) -> None:
    """Drop lines of steps after the checkpoint, and a line cut off by a crash: they will be written again."""
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    checkpoints.write_atomically(metrics, lambda path: path.write_text("".join(kept), encoding="utf-8"))


def _append(metrics: Any, line: Mapping[str, Any]) -> None:
    metrics.write(json.dumps(line) + "\n")
    metrics.flush()


def _say(console: Console, text: str) -> None:
    """Print without control characters, which generated text may hold, and without what the terminal cannot show."""
    text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    text = text.encode(console.encoding, "replace").decode(console.encoding)
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"
