"""`nsattn bench model`: training, prefill and decoding of real model shapes, with dense attention and with NSA.

The layers are those of Hugging Face models with random weights, in bfloat16; embeddings and the output matrix are left
out, since their cost does not depend on the attention. As many layers as fit, two unless more are asked for: `layers`
says how many, times are for all of them. A training step is forward and backward, `train+opt` adds the optimizer
(fused AdamW); prefill fills a cache. With a folder of peers the same models are timed, but for the optimizer, with the
branches of the official FSA, and with those of its `nsa_ref`, in the place of ours; compression and gates stay ours.
`ok` says whether that attention, for the blocks it selected, gives what the reference does; theirs select by the first
query head of a group (`fsa_branches`). `attention_ms` is what a step takes beyond one whose attention returns the
values: scores, softmax, and for NSA compression, selection and gates.

Hugging Face layers run norms and activations as many small kernels, whatever the attention is. `compiled` has those and
the MLP compiled by `torch.compile`, in all models alike, as one trains: what is left around the attention is the
arithmetic of projections and MLP.

The phase `overhead` is about one attention module, forward and backward, without its projections and norms: `ms` is all
of it, `attention_ms` its kernels alone on the same tensors: compression and `nsattn.nsa_attention` (and the rotation of
the few compressed keys). Between the two lie rotation, the sigmoid of the gates, and whatever copies. What the model
does once for all its layers, the plan and the tables of the rotation, is in neither.

The phase `decode` is a step of one new token for each of eight sequences of T tokens, a CUDA graph of all layers, with
dense attention and with NSA, each over a cache in place (`model_decode`).
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import nsattn
import nsattn.api
from nsattn.bench import model_decode
from nsattn.bench.attention import Tail
from nsattn.bench.peers import Missing, fsa, fsa_branches, nsa_ref
from nsattn.bench.session import Session, named
from nsattn.bench.timing import Echo, interleave, locked, one_machine, peak_beyond, save
from nsattn.environment import commit
from nsattn.plan import Plan, make_plan
from nsattn.rotary import rotate

# Public config.json files: meta-llama/Llama-3.1-8B, Qwen/Qwen3-14B, Qwen/Qwen2.5-32B on huggingface.co.
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {
        "family": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 500000.0,
    },
    "Qwen3-14B": {
        "family": "qwen3", "hidden_size": 5120, "intermediate_size": 17408, "num_attention_heads": 40,
        "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1000000.0,
    },
    "Qwen2.5-32B": {
        "family": "qwen2", "hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40,
        "num_key_value_heads": 8, "rope_theta": 1000000.0,
    },
}  # fmt: skip
TINY = {"tiny": {"family": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "head_dim": 16}}  # fmt: skip
SIZES = {(64, 16): nsattn.NSAConfig(), (128, 8): nsattn.NSAConfig(slc_block=128, num_selected=8)}
TINY_SIZES = {(16, 4): nsattn.NSAConfig(8, 4, 16, 4, 20)}
ATTENTION = ("dense", "qmajor", "auto")
PEERS = {"fsa": fsa, "nsa_ref": nsa_ref}  # attention -> adapter
PHASES = ("train", "train+opt", "prefill")
OVERHEAD = "overhead"
DECODE = "decode"


@dataclass
class ModelRow:
    """One time, in ms for all `layers`."""

    who: str
    model: str
    layers: int
    T: int
    B: int
    N: int
    phase: str
    attention: str
    ms: float
    attention_ms: float
    peak_gib: float
    commit: str
    ok: bool = True
    compiled: bool = False


KEY = ("who", "model", "T", "B", "N", "phase", "attention")


def run(
    *, models: str = "", lengths: tuple[int, ...] = (8192, 16384, 32768, 65536), out: str = "", layers: int = 2,
    peers: Path | None = None, compiled: bool = False, echo: Echo, session: Session | None = None,
) -> list[ModelRow]:
    """Time every model, length and pair (B, N); rows that `out` already holds are kept unless timed again.

    Args:
        models: comma-separated names of `MODELS`, default all.
        layers: at most so many; fewer where they do not fit.
        peers: where checkouts of peers lie; None times none.
        compiled: norms and MLP by `torch.compile`. A file holds either such rows or others.
        session: which of them to skip and when to stop; default: those that `out` holds at this commit are skipped.

    Returns:
        The rows of the file.

    Raises:
        ValueError: an unknown model; a file whose models are compiled and these are not, or the other way round.
    """
    wanted = named("models", models, list(MODELS))
    device, shapes, sizes = "cuda", {name: MODELS[name] for name in wanted}, SIZES
    if not torch.cuda.is_available():
        echo("No GPU: timing the reference at one tiny size. These numbers say nothing about the kernels.")
        device, shapes, sizes, lengths = "cpu", TINY, TINY_SIZES, (96,)
    loaded = _load(peers, device, echo) if peers else []
    rows = _older(out)
    if any(r.compiled != compiled for r in rows):
        raise ValueError(f"{out} holds models that are {'not ' if compiled else ''}compiled. Name another file.")
    cases = [(name, T, *pair) for name in shapes for T in lengths for pair in sizes]
    for case in (session or Session()).each("compiled" if compiled else "model", cases, rows, _fields):
        name, T, B, N = case
        for num in range(layers, 0, -1):
            try:
                new = _bench(case, shapes[name], sizes[B, N], num, device, loaded, compiled, echo)
                if not compiled:  # it has no norm and no MLP
                    new.append(_overhead(case, shapes[name], sizes[B, N], device))
                break
            except torch.cuda.OutOfMemoryError:
                gc.collect()
                torch.cuda.empty_cache()
        else:
            echo(f"{name} T={T}: not one layer fits")
            continue
        if not compiled:  # a step is bound by its weights
            try:
                new += _decode(case, shapes[name], sizes[B, N], num, device)
            except Exception as error:  # noqa: BLE001  what was timed before is kept
                echo(f"  decode not run: {type(error).__name__}: {str(error)[:300]}")
                gc.collect()
                if device == "cuda":
                    torch.cuda.synchronize()  # raises if the device is lost
                    torch.cuda.empty_cache()
        for r in new:
            echo(f"{r.model:12} T={r.T:6} (B,N)=({r.B},{r.N}) {r.layers} layers {r.phase:9} {r.attention:7} "
                 f"{r.ms:9.3f} ms, attention {r.attention_ms:9.3f}, {r.peak_gib:6.2f} GiB{'' if r.ok else ' WRONG'}")
        with locked(out) if out else contextlib.nullcontext():
            rows = [r for r in (_older(out) if out else rows) if (r.model, r.T, r.B, r.N) != case] + new
            if out:
                save(rows, out)
    return rows


def _older(out: str) -> list[ModelRow]:
    return one_machine(out, read(out)) if out and Path(out).exists() else []


def _fields(case: tuple[str, int, int, int]) -> dict[str, Any]:
    return dict(zip(("model", "T", "B", "N"), case, strict=True))


def _load(folder: Path, device: str, echo: Echo) -> list[str]:
    """The kinds of attention of peers that are on this machine; why others are not is said."""
    found = []
    for kind, adapter in PEERS.items():
        try:
            if device == "cpu":
                raise Missing("needs a GPU")
            fsa_branches.load(folder)
            adapter.load(folder)
            found.append(kind)
        except Missing as error:
            echo(f"{kind} is not here: {error}")
    return found


def _bench(
    case: tuple[str, int, int, int], shape: dict[str, Any], config: nsattn.NSAConfig, layers: int, device: str,
    loaded: Sequence[str], compiled: bool, echo: Echo,
) -> list[ModelRow]:  # fmt: skip
    rows, calls, keys = [], [], []
    right: dict[str, bool] = dict.fromkeys(ATTENTION, True)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if compiled:
        torch.compiler.reset()  # else earlier lengths and models count against the limit of recompilations
    x = torch.randn(1, case[1], shape["hidden_size"], device=device, dtype=dtype) * 0.02
    dy = torch.randn_like(x)
    for kind in (*ATTENTION, *loaded, "none"):
        mine: list[tuple[Callable[[], Tensor], float]] = []
        try:
            if kind in PEERS:
                right[kind] = _right(kind, case[1], shape, config, device, dtype)
            model = _model(shape, layers, kind, config, device, dtype)
            if compiled:
                _compile(model, device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device == "cuda")
            phases = [phase for phase in PHASES if kind not in PEERS or phase != "train+opt"]  # adds to all alike
            for phase in phases:
                call = _step(model, optimizer, x, dy, phase, kind)
                call()
                mine.append((call, 0.0 if kind == "none" else peak_beyond(call, device)[1]))
            model.zero_grad(set_to_none=True)
        except Exception as error:
            if kind not in PEERS:
                raise
            echo(f"  {kind} not run: {type(error).__name__}: {str(error)[:300]}")
            if device == "cuda":
                torch.cuda.synchronize()  # raises if the device is lost
                torch.cuda.empty_cache()
            continue
        calls += [call for call, _ in mine]
        keys += [(phase, kind, peak) for phase, (_, peak) in zip(phases, mine, strict=True)]
    times = dict(zip([key[:2] for key in keys], interleave(calls, device), strict=True))
    for phase, kind, peak in keys:
        if kind == "none":
            continue
        ms = times[phase, kind][0]
        who = "torch" if kind == "dense" else kind if kind in PEERS else "nsattn"
        rows.append(ModelRow(
            who=who, layers=layers, **_fields(case), phase=phase, attention=kind, ms=ms,
            attention_ms=ms - times[phase, "none"][0], peak_gib=peak, commit=commit(), ok=right[kind],
            compiled=compiled,
        ))  # fmt: skip
    return rows


def _theirs(kind: str) -> Callable[..., Any]:
    """Stands for `nsattn.api.nsa_attention` of one sequence: branches by a peer."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, gates: Tensor, k_cmp: Tensor, v_cmp: Tensor, plan: Plan,
               return_lse: bool = False, **options: Any) -> Any:  # fmt: skip
        cu = torch.arange(2, dtype=torch.int32, device=q.device) * len(q)
        plan = make_plan(cu, len(q), config=plan.config, max_seqlen=len(q))  # a cache has rows beyond the sequence
        keys = k[: len(q)], v[: len(q)], k_cmp[: plan.max_cmp], v_cmp[: plan.max_cmp]
        o, block_idx = fsa_branches.whole(PEERS[kind].selected(), plan)(q, *keys, gates)
        return nsattn.NSAOutput(o, o, o, o, block_idx) if return_lse else o  # nobody reads the sums

    return attend


def _right(
    kind: str, T: int, shape: dict[str, Any], config: nsattn.NSAConfig, device: str, dtype: torch.dtype
) -> bool:
    """Whether a peer's attention, for the blocks it selects, gives the reference's result on random inputs."""
    generator = torch.Generator(device).manual_seed(0)
    Hq, Hkv = shape["num_attention_heads"], shape["num_key_value_heads"]
    D = shape.get("head_dim", shape["hidden_size"] // Hq)
    q, k, v, gates = (
        torch.randn(T, heads, dim, generator=generator, device=device, dtype=dtype)
        for heads, dim in ((Hq, D), (Hkv, D), (Hkv, D), (Hq, 3))
    )
    cu = torch.arange(2, dtype=torch.int32, device=device) * T
    plan = make_plan(cu, T, config=config, max_seqlen=T)
    with torch.no_grad():
        k_cmp, v_cmp = (nsattn.compress(x, plan=plan)[: plan.max_cmp] for x in (k, v))
        out = _theirs(kind)(q, k, v, gates=gates, k_cmp=k_cmp, v_cmp=v_cmp, plan=plan, return_lse=True)
        tail = Tail(q, k, v, k_cmp, v_cmp, plan)
        return tail.agrees(out.o, lambda dtype: tail.whole(dtype, out.block_idx, gates))


def _overhead(
    case: tuple[str, int, int, int], shape: dict[str, Any], config: nsattn.NSAConfig, device: str
) -> ModelRow:
    """The row of phase `overhead`."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = _model(shape, 1, "auto", config, device, dtype)
    module, kernels, leaves = _parts(model, case[1])
    dy = torch.randn_like(kernels())

    def step(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            y = forward()
            y.backward(dy.view_as(y))
            for x in leaves:
                x.grad = None
            return y.detach()

        return call

    calls = [step(module), step(kernels)]
    results = [call() for call in calls]
    torch.testing.assert_close(results[0].flatten(), results[1].flatten())  # else they are not the same work
    peak = peak_beyond(calls[0], device)[1]
    ms, kernel_ms = (times[0] for times in interleave(calls, device))
    return ModelRow(
        who="nsattn", layers=1, **_fields(case), phase=OVERHEAD, attention="auto", ms=ms, attention_ms=kernel_ms,
        peak_gib=peak, commit=commit(),
    )  # fmt: skip


def _decode(
    case: tuple[str, int, int, int], shape: dict[str, Any], config: nsattn.NSAConfig, layers: int, device: str
) -> list[ModelRow]:
    """Rows of phase `decode`."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    like = torch.empty(1, shape["hidden_size"], device=device, dtype=dtype)
    steps = {}
    for kind in ("dense", "auto", "none"):
        model = _model(shape, layers, "over cache" if kind == "dense" else kind, config, device, dtype)
        steps[kind] = model_decode.step(model, kind, case[1], like)
    times = dict(zip(steps, interleave([call for call, _ in steps.values()], device), strict=True))
    return [
        ModelRow(
            who="torch" if kind == "dense" else "nsattn", layers=layers, **_fields(case), phase=DECODE, attention=kind,
            ms=times[kind][0], attention_ms=times[kind][0] - times["none"][0], peak_gib=steps[kind][1], commit=commit(),
        )
        for kind in ("dense", "auto")
    ]  # fmt: skip


def _parts(model: Any, T: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor], list[Tensor]]:
    """(attention module of layer 0 without projections and norms, its kernels alone, leaves that get gradients).

    Projections return leaves that stand for their results, so that no product is timed; the kernels get what the module
    gives them, as leaves too.
    """
    attention, like = model.layers[0].self_attn, model.norm.weight
    seen: dict[str, Any] = {}
    hook = attention.register_forward_pre_hook(lambda module, args, given: seen.update(given), with_kwargs=True)
    with torch.no_grad():
        model(inputs_embeds=torch.randn(1, T, len(like), device=like.device, dtype=like.dtype) * 0.02, use_cache=False)
    hook.remove()
    attention.o_proj = torch.nn.Identity()
    for name in ("q_norm", "k_norm"):
        if hasattr(attention, name):
            setattr(attention, name, torch.nn.Identity())
    leaves = [*attention.compress_k.parameters(), *attention.compress_v.parameters()]

    def leaf(x: Tensor) -> Tensor:
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    def project(name: str) -> Tensor:
        """Put a leaf in the place of a projection; returns a tensor like its result, in heads."""
        features = getattr(attention, name).out_features
        given = leaf(torch.randn(T, features, device=like.device, dtype=like.dtype))
        setattr(attention, name, _Given(given))
        return given.detach().unflatten(-1, (-1, 3 if name == "gate_proj" else attention.head_dim))

    batch, impl = seen["nsa"], attention.config.nsa_impl
    tables = [x[0][:, None] for x in seen["position_embeddings"]]
    source_k, v = leaf(project("k_proj")), leaf(project("v_proj"))
    q, k = (leaf(rotate(x, *tables, impl=impl)) for x in (project("q_proj"), source_k.detach()))
    gates = leaf(project("gate_proj").sigmoid())

    def kernels() -> Tensor:
        k_cmp = attention.compress_k(source_k, batch.plan, impl=impl)
        k_cmp = rotate(k_cmp, batch.cos_cmp, batch.sin_cmp, impl=impl)
        v_cmp = attention.compress_v(v, batch.plan, impl=impl)
        o = nsattn.nsa_attention(q, k, v, gates=gates, k_cmp=k_cmp, v_cmp=v_cmp, plan=batch.plan, impl=impl)
        assert isinstance(o, Tensor), "no log-sum-exps asked for"
        return o

    return lambda: attention(**seen)[0], kernels, leaves


class _Given(torch.nn.Module):
    """In the place of a projection: returns what it is given."""

    def __init__(self, result: Tensor) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Any) -> Tensor:
        return self.result


def _model(
    shape: dict[str, Any], layers: int, kind: str, config: nsattn.NSAConfig, device: str, dtype: torch.dtype
) -> Any:
    """The layers of a model, with random weights."""
    import transformers  # pyright: ignore[reportMissingImports]

    from nsattn.integrations.transformers import convert_to_nsa

    function = {"none": _values, "over cache": model_decode.over_cache}.get(kind)
    name = "sdpa" if function is None else f"nsattn_bench_{function.__name__}"
    if function is not None:
        transformers.AttentionInterface.register(name, function)
        transformers.AttentionMaskInterface.register(name, lambda **kwargs: None)
    options = {key: value for key, value in shape.items() if key not in ("family", "rope_theta")}
    family = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[shape["family"]]
    model_config = getattr(transformers, f"{family}Config")(
        **options, vocab_size=64, num_hidden_layers=layers, max_position_embeddings=1 << 17,
        attn_implementation=name,
        rope_parameters={"rope_type": "default", "rope_theta": shape.get("rope_theta", 10000.0)},
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(transformers, f"{family}Model")(model_config).to(dtype)
    if kind in ("qmajor", "auto", *PEERS):
        model = convert_to_nsa(model, config)
        model.config.nsa_impl = ("qmajor" if kind == "qmajor" else "auto") if device == "cuda" else "reference"
    return model


def _compile(model: Any, device: str) -> None:
    """Compile what is neither attention nor a projection of it."""
    backend = "inductor" if device == "cuda" else "aot_eager"
    for layer in model.layers:
        for module in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            module.compile(backend=backend, dynamic=False)
    model.norm.compile(backend=backend, dynamic=False)


def _values(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """An attention function that returns the values of each head's group: what a layer costs without attention."""
    values = value[:, :, -query.shape[2] :].repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return (values + 0 * query).transpose(1, 2), None  # the product keeps the gradient of q in the backward


def _step(model: Any, optimizer: Any, x: Tensor, dy: Tensor, phase: str, kind: str) -> Callable[[], Tensor]:
    def backends() -> contextlib.AbstractContextManager[Any]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if kind in PEERS:
            return mock.patch.object(nsattn.api, "nsa_attention", _theirs(kind))
        return sdpa_kernel([SDPBackend.CUDNN_ATTENTION]) if x.is_cuda and kind == "dense" else contextlib.nullcontext()

    def prefill() -> Tensor:
        with torch.no_grad(), backends():
            return model(inputs_embeds=x, use_cache=True).last_hidden_state

    def train() -> Tensor:
        with torch.enable_grad(), backends():
            y = model(inputs_embeds=x, use_cache=False).last_hidden_state
            y.backward(dy)
            if phase == "train+opt":
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return y.detach()

    return prefill if phase == "prefill" else train


def read(path: str | Path) -> list[ModelRow]:
    """Rows of a results file.

    Raises:
        ValueError: the file is missing, damaged or of another kind.
    """
    try:
        return [ModelRow(**row) for row in json.loads(Path(path).read_text())["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a results file of nsattn bench model ({error}). Make it again.") from error


def ratios(rows: list[ModelRow], slow: str, fast: str, phase: str) -> list[float]:
    """How many times as fast one kind of attention is as another, for every model and size that has both, right."""
    times: dict[str, dict[tuple[str, int, int, int], float]] = {slow: {}, fast: {}}
    for r in rows:
        if r.ok and r.phase == phase and r.attention in times:
            times[r.attention][r.model, r.T, r.B, r.N] = r.ms / r.layers
    return [ms / times[fast][key] for key, ms in sorted(times[slow].items()) if key in times[fast]]


def speedups(rows: list[ModelRow]) -> Iterator[tuple[str, int, tuple[int, int], str, float, float]]:
    """(model, T, (B, N), phase, speed-up over dense, speed-up over the vanilla schedule) of NSA with `auto`."""
    times = {(r.model, r.T, (r.B, r.N), r.phase, r.attention): r.ms / r.layers for r in rows}
    for key in sorted({key[:4] for key in times}):
        dense, vanilla, ours = (times.get((*key, kind)) for kind in ATTENTION)
        if dense and vanilla and ours:
            yield *key, dense / ours, vanilla / ours


def decoding(rows: list[ModelRow]) -> Iterator[tuple[str, int, tuple[int, int], float, float]]:
    """(model, T, (B, N), ms with dense attention, ms with NSA) of a decoding step of all layers."""
    times = {(r.model, r.T, (r.B, r.N), r.attention): r.ms for r in rows if r.phase == DECODE}
    for key in sorted({key[:3] for key in times}):
        dense, ours = (times.get((*key, kind)) for kind in ("dense", "auto"))
        if dense and ours:
            yield *key, dense, ours


def overheads(rows: list[ModelRow]) -> Iterator[tuple[str, int, tuple[int, int], float, float, float]]:
    """(model, T, (B, N), ms of the module without projections, ms of its kernels, what it adds to them as a share)."""
    for r in sorted((r for r in rows if r.phase == OVERHEAD), key=lambda r: (r.model, r.T, r.B, r.N)):
        yield r.model, r.T, (r.B, r.N), r.ms, r.attention_ms, r.ms / r.attention_ms - 1


def summary(path: str | Path) -> str:
    """A Markdown table of a results file: speed-ups over dense and over the vanilla schedule, and `overheads`."""
    if not Path(path).exists():
        return f"Not measured yet: there is no {Path(path).name}."
    rows = read(path)
    ratios = {key[:4]: f"{key[4]:.2f} / {key[5]:.2f}" for key in speedups(rows)}
    added = {key[:3]: f"{key[5]:.1%}" for key in overheads(rows)}
    columns = ("model", "T", "(B, N)", *PHASES, "module adds")
    lines = [f"| {' | '.join(columns)} |", "|---|--:|---|" + "--:|" * (len(columns) - 3)]
    for case in sorted({key[:3] for key in ratios} | set(added)):
        model, T, pair = case
        cells = [*(ratios.get((*case, phase), "") for phase in PHASES), added.get(case, "")]
        lines.append(f"| {model} | {T} | {pair} | {' | '.join(cells)} |")
    return "\n".join(lines)
