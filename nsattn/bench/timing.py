"""How times are taken, and the rows of a results file."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from nsattn.environment import environment

PEAK_FLOPS = 780e12  # bf16 matrix product on random data, measured on an H200
PEAK_BYTES = 4.25e12  # device copy, read and write counted, measured on an H200
PAUSE = 0.15  # seconds before each measurement
WARM_MS, MEASURE_MS = 5, 20  # as triton's do_bench(warmup=5, rep=20)
LEAST_CALLS = 3  # in all rounds together, so that a stall of the host is not the median
MOST_CALLS = 200  # in a round
GRAPH_TOKENS = 65536  # up to here the launches of a slow host may take longer than the kernels: CUDA graphs too
HOST_ROWS = 1 << 20  # (token, head) rows from which kernels take longer than a slow host needs to launch them
CACHE_BYTES = 256 << 20  # written before each call, so that it finds a cold L2
OURS = "nsattn"
GRAPH = " graph"  # how the `impl` of a CUDA graph ends

Echo = Callable[[str], None]  # takes a line of output
R = TypeVar("R")


@dataclass
class Row:
    """One time. `floor_ms`, `peak_gib` (memory beyond inputs and outputs) and `ok` (the check) belong to it."""

    who: str
    op: str
    impl: str
    T: int
    Hq: int
    Hkv: int
    D: int
    Dv: int
    B: int
    N: int
    selection: str
    direction: str
    ms: float
    p20: float
    p80: float
    floor_ms: float
    peak_gib: float
    ok: bool
    commit: str
    dtype: str = "bfloat16"
    sequences: int = 1  # T tokens in so many sequences of one length
    set: str = ""  # the set of `cases.py` that asked for it


# A row of a later run replaces the one that agrees in these.
KEY = (
    *("who", "op", "impl", "T", "Hq", "Hkv", "D", "Dv", "B", "N"),
    *("selection", "direction", "dtype", "sequences", "set"),
)


def without_host(rows: Sequence[Row]) -> list[Row]:
    """What kernels take: of a call and its CUDA graph the graph, with the `impl` of the call; where there is none, the
    call."""

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row.impl.removesuffix(GRAPH) if name == "impl" else getattr(row, name) for name in KEY)

    graphs = {key(row) for row in rows if row.impl.endswith(GRAPH)}
    kept = [row for row in rows if row.impl.endswith(GRAPH) or key(row) not in graphs]
    return [replace(row, impl=row.impl.removesuffix(GRAPH)) for row in kept]


def floor_ms(flops: float, moved: float) -> float:
    """Least time for so many FLOPs and bytes of memory traffic."""
    return max(flops / PEAK_FLOPS, moved / PEAK_BYTES) * 1e3


def interleave(calls: Sequence[Callable[[], object]], device: str, rounds: int = 2) -> list[tuple[float, float, float]]:
    """(median, 20th, 80th percentile) in ms of each call. Every round measures all of them in turn."""
    times: list[list[float]] = [[] for _ in calls]
    least = -(-LEAST_CALLS // max(rounds, 1))
    for _ in range(rounds):
        for call, seen in zip(calls, times, strict=True):
            seen += _sample(call, least) if device == "cuda" else _sample_cpu(call)
    return [percentiles(seen) for seen in times]


def percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return statistics.median(times), cuts[1], cuts[7]


def _sample(call: Callable[[], object], least: int) -> list[float]:
    """Times of some calls in ms, `least` and more, by device events, each on a cold L2, after a pause and a warm-up."""
    cache = torch.empty(CACHE_BYTES // 4, dtype=torch.int32, device="cuda")

    def timed() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        start.record()
        call()
        end.record()
        return start, end

    call()  # what compiles and allocates is no measure of how long a call takes
    torch.cuda.synchronize()
    time.sleep(PAUSE)
    tries = [timed() for _ in range(2)]
    torch.cuda.synchronize()
    estimate = max(min(start.elapsed_time(end) for start, end in tries), 1e-3)
    count = min(MOST_CALLS, max(least, round(MEASURE_MS / estimate)))
    if estimate > MEASURE_MS:  # too long for a warm-up or a late launch to matter: the tries are measurements too
        events = tries + [timed() for _ in range(count - len(tries))]
    else:
        for _ in range(min(MOST_CALLS, round(WARM_MS / estimate))):
            timed()
        events = [timed() for _ in range(count)]
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _sample_cpu(call: Callable[[], object]) -> list[float]:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def peak_beyond(call: Callable[[], Any], device: str, base: int | None = None) -> tuple[Any, float]:
    """(result, GiB) of a call: its peak beyond `base` bytes (default: what is allocated now) and its result."""
    if device != "cuda":
        return call(), 0.0
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated() if base is None else base
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    outputs = result if isinstance(result, tuple) else (result,)
    size = sum(x.numel() * x.element_size() for x in outputs)
    return result, max(0, torch.cuda.max_memory_allocated() - base - size) / 2**30


def as_graph(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same as a CUDA graph, without gradients."""
    with torch.no_grad():
        call()  # compiles what is not compiled yet
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()

    def replay() -> Tensor:
        assert call is not None  # holds what the graph reads
        graph.replay()
        return y

    return replay


def captured(call: Callable[..., Tensor], leaves: Sequence[Tensor], dy: Tensor | None) -> list[Callable[[], None]]:
    """Replays of the forward and, where a gradient dy arrives, of the backward of `call(*leaves)` as CUDA graphs.

    Autograd works on the stream where a leaf was first used and where the forward ran. A capture may meet no other
    stream, so all of it, with leaves of its own, is on one.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    leaves = [x.detach().requires_grad_() for x in leaves]
    with torch.cuda.stream(stream):
        y = call(*leaves)
        if dy is not None:
            torch.autograd.grad(y, leaves, dy, retain_graph=True)
    torch.cuda.synchronize()
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(forward, stream=stream):
        call(*leaves)
    if dy is None:
        return [forward.replay]
    with torch.cuda.graph(backward, stream=stream):
        torch.autograd.grad(y, leaves, dy, retain_graph=True)

    def replay_backward() -> None:
        assert y.grad_fn is not None and dy is not None  # hold what the captured backward reads
        backward.replay()

    return [forward.replay, replay_backward]


def save(rows: Iterable[Any], out: str, **more: object) -> None:
    """Write the rows and where they come from as JSON. Who stops halfway leaves the file as it was."""
    path = Path(out)
    content = {"environment": environment(), **more, "rows": [asdict(row) for row in rows]}
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    new.replace(path)


@contextmanager
def locked(out: str) -> Iterator[None]:
    """No other process that asks for the same reads or writes a file of this folder, which is made, meanwhile: the
    processes of `nsattn bench all` share files, and each adds rows of its own."""
    import fcntl

    folder = Path(out).parent
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def merge(rows: Sequence[Row], out: str) -> list[Row]:
    """The rows of file `out`, if it exists, without those that `rows` replaces, then `rows`."""
    new = {tuple(getattr(row, name) for name in KEY) for row in rows}
    return [row for row in older_rows(out) if tuple(getattr(row, name) for name in KEY) not in new] + list(rows)


def note(who: str, impl: str, case: object, reason: str) -> dict[str, str]:
    """Why something was not timed; an empty case stands for all of them."""
    return {"who": who, "impl": impl, "case": str(case), "reason": reason}


def merge_notes(notes: list[dict[str, str]], cases: Sequence[object], out: str) -> list[dict[str, str]]:
    """`notes` on these cases and on missing peers, and what `out` holds on other cases."""
    met = {"", *map(str, cases)}
    return [older for older in older_notes(out) if older["case"] not in met] + notes


def older_notes(out: str) -> list[dict[str, str]]:
    """What file `out`, if it exists, says was not timed."""
    return json.loads(Path(out).read_text()).get("not_run", []) if Path(out).is_file() else []


def older_rows(out: str) -> list[Row]:
    """All rows of file `out`, to which this machine adds its own; none if it does not exist yet.

    Raises:
        ValueError: as `read_rows`, or another kind of machine wrote it.
    """
    return one_machine(out, read_rows(out, bases=True)) if Path(out).is_file() else []


def one_machine(out: str, rows: list[R]) -> list[R]:
    """The rows of file `out`, which must come from a machine like this one: times of two do not compare.

    Raises:
        ValueError: they do not.
    """
    seen = json.loads(Path(out).read_text()).get("environment", {}), environment()
    there, here = (facts.get("gpu", "unknown").split(",")[0] for facts in seen)
    if there not in (here, "unknown"):
        raise ValueError(f"out must hold times of this machine (gpu: {here}), got {out} (gpu: {there}). Name another.")
    return rows


def read_rows(path: str | Path, *, bases: bool = False) -> list[Row]:
    """Rows of a results file, with `bases` also those of other commits of ours that `--base` timed beside this one.

    Raises:
        ValueError: the file is missing, damaged or of another kind.
    """
    known = {field.name for field in fields(Row)}
    try:
        rows = json.loads(Path(path).read_text())["rows"]
        read = [Row(**{name: value for name, value in row.items() if name in known}) for row in rows]
        return [row for row in read if bases or not row.who.startswith(f"{OURS}@")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a results file of nsattn bench ({error}). Make it again.") from error
