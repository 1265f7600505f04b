"""The public functions: every error message, batched against packed, autocast, odd inputs."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch

import nsattn
from nsattn import NSAConfig, checks, dispatch
from nsattn.bench.timing import GRAPH_TOKENS, HOST_ROWS, read_rows, without_host
from nsattn.kernels._chunks import chunks
from nsattn.kernels._gradient import Gradient, selected_cut, selected_size
from nsattn.plan import make_plan
from nsattn.testing import hostile_selection, make_inputs, random_selection

TINY = NSAConfig(cmp_block=8, cmp_stride=4, slc_block=16, num_selected=4, window=20)


def batch(bsz=2, s=40, hq=4, hkv=2, d=16, dv=16, dtype=torch.float32):
    q, k, v = torch.randn(bsz, s, hq, d), torch.randn(bsz, s, hkv, d), torch.randn(bsz, s, hkv, dv)
    return q.to(dtype), k.to(dtype), v.to(dtype), torch.rand(bsz, s, hq, 3, dtype=dtype)


def packed(**sizes):
    q, k, v, g = (x[0] for x in batch(1, **sizes))
    return q, k, v, g, torch.tensor([0, 15, 40], dtype=torch.int32)


def attend(q=None, k=None, v=None, gates=None, **options):
    a, b, c, g = batch()
    return nsattn.nsa_attention(
        a if q is None else q,
        b if k is None else k,
        c if v is None else v,
        gates=g if gates is None else gates,
        **{"config": TINY, **options},
    )


def flat(**options):
    q, k, v, g, cu = packed()
    return nsattn.nsa_attention(q, k, v, gates=g, **{"config": TINY, "cu_seqlens": cu, **options})


def select(idx=None, **options):
    q, k, v, _ = batch()
    if idx is None:
        idx = torch.zeros(2, 40, 2, 4, dtype=torch.int32)
    return nsattn.attend_selected(q, k, v, idx, **{"config": TINY, **options})


def squeeze(x=None, **options):
    return nsattn.compress(batch()[1] if x is None else x, **{"config": TINY, **options})


def combine(**changes):
    o = torch.randn(2, 40, 4, 16)
    return nsattn.combine(**{"o_cmp": o, "o_slc": o, "o_win": o, "gates": torch.rand(2, 40, 4, 3), **changes})


def estimate(**changes):
    sizes = {"total": 1024, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "impl": "kvmajor"}
    return nsattn.estimate_memory(**{**sizes, **changes})


def plan_of(length, config):
    return make_plan(cu(0, length), length, config=config)


def cu(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


ERRORS = [
    (lambda: attend(q=[1.0]), TypeError, "q must be a torch.Tensor, got list"),
    (
        lambda: attend(q=torch.randn(4, 16)),
        ValueError,
        "q must be [T, Hq, D] (packed) or [Bsz, S, Hq, D], got shape (4, 16)",
    ),
    (lambda: attend(q=torch.ones(2, 40, 4, 16, dtype=torch.int32)), TypeError, "got torch.int32"),
    (lambda: attend(k=torch.randn(40, 2, 16)), ValueError, "k must be [Bsz, S, Hkv, D] like q"),
    (lambda: attend(k=batch(dtype=torch.float64)[1]), TypeError, "k must have the dtype of q"),
    (lambda: attend(k=batch()[1].to("meta")), ValueError, "k must be on the device of q"),
    (lambda: attend(v=torch.randn(2, 39, 2, 16)), ValueError, "k and v must have the same rows and heads"),
    (
        lambda: attend(k=torch.randn(1, 40, 2, 16), v=torch.randn(1, 40, 2, 16)),
        ValueError,
        "batch size of q, got 1 and 2",
    ),
    (lambda: attend(k=torch.randn(2, 40, 2, 32)), ValueError, "head dim of q, got 32 and 16"),
    (
        lambda: attend(k=torch.randn(2, 40, 3, 16), v=torch.randn(2, 40, 3, 16)),
        ValueError,
        "multiple of KV heads, got 4 and 3",
    ),
    (
        lambda: attend(k=torch.randn(2, 40, 0, 16), v=torch.randn(2, 40, 0, 16)),
        ValueError,
        "multiple of KV heads, got 4 and 0",
    ),
    (
        lambda: attend(gates=torch.rand(2, 40, 4, 2)),
        ValueError,
        "gates must be [..., Hq, 3] = (2, 40, 4, 3), got (2, 40, 4, 2)",
    ),
    (lambda: attend(gates=torch.rand(80, 4, 3)), ValueError, "[..., Hq, 3] = (2, 40, 4, 3), got (80, 4, 3)"),
    (lambda: attend(k_cmp=torch.randn(2, 9, 2, 16)), ValueError, "k_cmp and v_cmp must be given together"),
    (lambda: attend(k_win=torch.randn(2, 40, 2, 16)), ValueError, "k_win and v_win must be given together"),
    (
        lambda: attend(k_cmp=torch.randn(2, 8, 2, 16), v_cmp=torch.randn(2, 8, 2, 16)),
        ValueError,
        "k_cmp must have 18 rows",
    ),
    (lambda: attend(config=3), TypeError, "config must be an NSAConfig, got int"),
    (lambda: attend(cu_seqlens=cu(0, 80)), ValueError, "cu_seqlens describes packed [T, H, D] input"),
    (
        lambda: attend(impl="fast"),
        ValueError,
        "impl must be one of auto, reference, triton, kvmajor_sm90, kvmajor, qmajor, got 'fast'",
    ),
    (lambda: attend(softmax_scale=-1.0), ValueError, "softmax_scale must be positive and finite, got -1.0"),
    (lambda: attend(workspace=5), ValueError, "workspace must be an int of at least 1 MiB"),
    (lambda: attend(plan=7), TypeError, "plan must come from nsattn.make_plan, got int"),
    (lambda: flat(cu_seqlens=None), ValueError, "packed [T, H, D] input needs cu_seqlens"),
    (lambda: flat(cu_seqlens=cu(0, 40, dtype=torch.int64)), TypeError, "cu_seqlens must be int32, got torch.int64"),
    (lambda: flat(cu_seqlens=cu(0)), ValueError, "cu_seqlens must have at least 2 entries, got 1"),
    (lambda: flat(cu_seqlens=cu(0, 40)[None]), ValueError, "cu_seqlens must be int32 [num_sequences + 1]"),
    (lambda: flat(cu_seqlens=cu(0, 9, 40, 9)[::2]), ValueError, "cu_seqlens must be contiguous"),
    (lambda: flat(cu_seqlens=cu(0, 40).to("meta")), ValueError, "cu_seqlens must be on the device of the data"),
    (lambda: flat(cu_seqlens_k=cu(0, 40)), ValueError, "cu_seqlens_k must be as long as cu_seqlens = (3,), got (2,)"),
    (lambda: flat(max_seqlen=-1), ValueError, "max_seqlen must be an int >= 0, got -1"),
    (lambda: flat(plan=make_plan(cu(0, 40), 40, config=TINY)), ValueError, "plan already holds the lengths"),
    (
        lambda: flat(cu_seqlens=None, plan=make_plan(cu(0, 40).to("meta"), 40, config=TINY, max_seqlen=40)),
        ValueError,
        "plan must be on the device of the data",
    ),
    (
        lambda: flat(cu_seqlens=None, plan=make_plan(cu(0, 30), 30, config=TINY)),
        ValueError,
        "q must have 30 rows (queries of the plan), got 40",
    ),
    (lambda: select(torch.zeros(2, 40, 2, 4)), TypeError, "block_idx must be int32, got torch.float32"),
    (lambda: select(torch.zeros(2, 40, 1, 4, dtype=torch.int32)), ValueError, "block_idx must be (2, 40, 2) + (N,)"),
    (lambda: select(torch.zeros(2, 40, 2, 65, dtype=torch.int32)), ValueError, "1 to 64 blocks per token, got 65"),
    (lambda: select(torch.zeros(80, 2, 4, dtype=torch.int32)), ValueError, "block_idx must be int32 [..., Hkv, N]"),
    (
        lambda: select(torch.zeros(2, 40, 2, 4, dtype=torch.int32, device="meta")),
        ValueError,
        "block_idx must be on the device",
    ),
    (lambda: squeeze(torch.randn(3)), ValueError, "x must be [T, Hkv, D]"),
    (lambda: squeeze(method="max"), ValueError, "method must be one of mean, linear, mlp, gated, got 'max'"),
    (lambda: squeeze(method="linear"), ValueError, "method 'linear' takes 2 parameter tensors, got 0"),
    (
        lambda: squeeze(method="linear", params=(torch.zeros(2, 8, 16, 16), torch.zeros(2, 8))),
        ValueError,
        "linear parameter bias",
    ),
    (
        lambda: squeeze(method="gated", params=(torch.zeros(2, 16), torch.zeros(2, 8, device="meta"))),
        ValueError,
        "gated parameter pe must be on the device of x",
    ),
    (
        lambda: squeeze(
            method="mlp",
            params=(
                torch.zeros(2, 8, 16),
                torch.zeros(2, 8, 16, 5),
                torch.zeros(2, 5),
                torch.zeros(2, 5, 16),
                torch.zeros(2, 15),
            ),
        ),
        ValueError,
        "mlp parameter b2",
    ),
    (lambda: NSAConfig(cmp_block=True), TypeError, "cmp_block must be an int, got True"),
    (lambda: NSAConfig(window=0), ValueError, "window must be at least 1, got 0"),
    (lambda: NSAConfig(cmp_block=30), ValueError, "cmp_block must be a multiple of cmp_stride, got 30 and 16"),
    (lambda: NSAConfig(cmp_block=24, cmp_stride=24), ValueError, "slc_block must be a multiple of cmp_stride"),
    (lambda: NSAConfig(slc_block=48), ValueError, "slc_block must be 16, 32, 64 or 128, got 48"),
    (lambda: NSAConfig(num_selected=65), ValueError, "num_selected must be at most 64, got 65"),
    (
        lambda: NSAConfig(num_selected=2),
        ValueError,
        "init_blocks + local_blocks must be at most num_selected, got 1 + 2 > 2",
    ),
    (lambda: nsattn.NSAttention(64, 3, 2), ValueError, "num_heads must be a multiple of num_kv_heads, got 3 and 2"),
    (lambda: nsattn.NSAttention(15, 3, 1), ValueError, "head_dim must be even for rotary embedding, got 5"),
    (lambda: nsattn.NSAttention(64, 4, 2, compression="max"), ValueError, "compression must be one of"),
    (lambda: nsattn.NSAttention(64, 4, 2)(torch.randn(64)), ValueError, "x must be [T, dim] (packed) or [Bsz, S, dim]"),
    (lambda: nsattn.NSAttention(64, 0, 1), ValueError, "num_heads must be a multiple of num_kv_heads, got 0 and 1"),
    (
        lambda: nsattn.NSAttention(64, 4, 2, config=TINY)(torch.randn(9, 64), plan=plan_of(9, NSAConfig())),
        ValueError,
        "plan must be made for the config of the call",
    ),
    (lambda: flat(plan=plan_of(40, NSAConfig()), cu_seqlens=None), ValueError, "plan must be made for the config"),
    (
        lambda: flat(plan=plan_of(40, TINY), cu_seqlens=None, cu_seqlens_k=cu(0, 40)),
        ValueError,
        "plan already holds the lengths: got plan and cu_seqlens_k or max_seqlen_k",
    ),
    (lambda: attend(cu_seqlens_k=cu(0, 40, 80)), ValueError, "cu_seqlens_k describes packed [T, H, D] input"),
    (lambda: flat(max_seqlen=20), ValueError, "max_seqlen must be at least the longest length, got 20 and 25"),
    (lambda: flat(cu_seqlens=cu(0, 60)), ValueError, "cu_seqlens must ascend from 0 to at most the 40 rows"),
    (lambda: attend(*(x[:0] for x in batch())), ValueError, "a batch must have at least one sequence, got shape (0"),
    (
        lambda: attend(k_win=batch()[1], v_win=batch(dv=32)[2]),
        ValueError,
        "v_win must have the head dim of v, got 32 and 16",
    ),
    (
        lambda: attend(k_cmp=squeeze(), v_cmp=squeeze(batch(dv=32)[2])),
        ValueError,
        "v_cmp must have the head dim of v, got 32 and 16",
    ),
    (lambda: attend(gates=torch.ones(2, 40, 4, 3, dtype=torch.int32)), TypeError, "gates must be bfloat16, float16"),
    (lambda: attend(gates=torch.rand(2, 40, 4, 3).to("meta")), ValueError, "gates must be on the device of the data"),
    (lambda: attend(gates=[1, 2, 3]), TypeError, "gates must be a torch.Tensor, got list"),
    (lambda: attend(softmax_scale="x"), TypeError, "softmax_scale must be a number, got 'x'"),
    (
        lambda: attend(k_cmp=torch.randn(2, 9, 4, 16), v_cmp=torch.randn(2, 9, 4, 16)),
        ValueError,
        "k_cmp must be [..., Hkv, D] with the heads of k = (2, 9, 2, 16), got (2, 9, 4, 16)",
    ),
    (
        lambda: attend(plan=plan_of(80, TINY)),
        ValueError,
        "plan must have a sequence for each row of the batch, got 1 for 2 rows",
    ),
    (lambda: flat(max_seqlen_k=40), ValueError, "max_seqlen_k must come with cu_seqlens_k, got it alone"),
    (lambda: squeeze(method="gated", params=(1, 2)), TypeError, "parameter 0 of method 'gated' must be a torch.Tensor"),
    (lambda: combine(o_slc=None), TypeError, "o_slc must be a torch.Tensor, got NoneType"),
    (lambda: combine(gates=[1]), TypeError, "gates must be a torch.Tensor, got list"),
    (lambda: make_plan([0, 40], 40, config=TINY), TypeError, "cu_seqlens must be a torch.Tensor, got list"),
    (lambda: make_plan(cu(0.0, 40.0, dtype=None), 40, config=TINY), TypeError, "cu_seqlens must be int32"),
    (lambda: make_plan(cu(0, 40), 40, config=None), TypeError, "config must be an NSAConfig, got NoneType"),
    (lambda: make_plan(cu(0, 40), 40.0, config=TINY), ValueError, "total must be an int of at least 0, got 40.0"),
    (
        lambda: make_plan(cu(0, 40), 40, config=TINY, cu_seqlens_k=cu(0, 20, 40)),
        ValueError,
        "cu_seqlens_k must be as long as cu_seqlens = (2,), got (3,)",
    ),
    (lambda: estimate(num_heads=5), ValueError, "num_heads must be a multiple of num_kv_heads, got 5 and 2"),
    (lambda: estimate(num_kv_heads=0), ValueError, "num_kv_heads must be an int of at least 1, got 0"),
    (lambda: estimate(total=-5), ValueError, "total must be an int of at least 0, got -5"),
    (lambda: estimate(workspace=5), ValueError, "workspace must be an int of at least 1 MiB"),
    (lambda: estimate(config={}), TypeError, "config must be an NSAConfig, got dict"),
    (lambda: nsattn.NSAttention(64, 4, 2, config={}), TypeError, "config must be an NSAConfig, got dict"),
    (lambda: nsattn.NSAttention(100, 8, 2), ValueError, "dim must be a multiple of num_heads, got 100 and 8"),
    (lambda: nsattn.NSAttention(64, 4, 2, -16), ValueError, "head_dim must be even for rotary embedding, got -16"),
    (lambda: nsattn.NSAttention(64, 4, 2, rope_theta=0.0), ValueError, "rope_theta must be positive and finite, got 0"),
    (
        lambda: nsattn.NSAttention(64, 4, 2, config=TINY)(torch.randn(9, 64), plan=plan_of(8, TINY)),
        ValueError,
        "x must have 8 rows (queries of the plan), got 9",
    ),
    (lambda: nsattn.check_selection([1], plan_of(9, TINY)), TypeError, "block_idx must be a torch.Tensor, got list"),
    (lambda: nsattn.check_selection(torch.zeros(9, 2, 4), plan_of(9, TINY)), TypeError, "block_idx must be int32"),
    (
        lambda: nsattn.check_selection(torch.zeros(8, 2, 4, dtype=torch.int32), plan_of(9, TINY)),
        ValueError,
        "block_idx must have 9 rows (queries of the plan), got 8",
    ),
]


@pytest.mark.parametrize(("call", "kind", "text"), ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_got_and_what_to_do(call, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        call()


def shape(**changes):
    sizes = {
        "device": "cuda",
        "dtype": torch.bfloat16,
        "head_dim": 128,
        "v_head_dim": 128,
        "group": 4,
        "max_blocks": 1024,
    }
    return dispatch.Shape(**{**sizes, **changes})


@pytest.mark.parametrize(
    ("impl", "changes", "kind", "text"),
    [
        ("auto", {"head_dim": 72}, ValueError, "head dim D must be one of"),
        ("auto", {"v_head_dim": 512}, ValueError, "value head dim Dv must be one of"),
        ("kvmajor", {"group": 65}, ValueError, "query heads per KV head must be at most 64, got 65"),
        (
            "qmajor",
            {"dtype": torch.float32},
            NotImplementedError,
            "needs torch.bfloat16 or torch.float16, got torch.float32",
        ),
        ("triton", {"device": "xla"}, NotImplementedError, "needs a GPU, got tensors on 'xla'"),
        ("mojo", {}, ValueError, "impl must be one of"),
    ],
)
def test_dispatch_refuses_with_the_reason(impl, changes, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        dispatch.resolve("attend_selected", impl, shape(**changes))


def test_scores_on_hopper_have_limits():
    """A kernel asked for by name is refused where it cannot serve, and `auto` takes the other."""
    hopper = {"capability": (9, 0), "v_head_dim": None}
    for good in ({}, {"overlap": 2, "keys_per_block": 32}, {"group": 64}):
        assert dispatch.resolve("select_blocks", "auto", shape(**hopper, **good)) == "triton_sm90"
    for bad, text in (({"overlap": 8}, "l / d must be at most 2, got 8"),
                      ({"keys_per_block": 64}, "B / d must be at most 32, got 64")):  # fmt: skip
        assert dispatch.resolve("select_blocks", "auto", shape(**hopper, **bad)) == "triton"
        with pytest.raises(ValueError, match=re.escape(text)):
            dispatch.resolve("select_blocks", "triton_sm90", shape(**hopper, **bad))


def test_kernels_for_one_generation_need_a_triton_that_compiles_them(monkeypatch):
    hopper = shape(capability=(9, 0), slc_block=64)
    for version, chosen in (((3, 5), "kvmajor"), ((3, 6), "kvmajor_sm90"), ((3, 10), "kvmajor_sm90"),
                            (None, "kvmajor_sm90")):  # fmt: skip
        monkeypatch.setattr(dispatch, "triton_version", lambda version=version: version)
        assert dispatch.resolve("attend_selected", "auto", hopper) == chosen
    monkeypatch.setattr(dispatch, "triton_version", lambda: (3, 5))
    with pytest.raises(NotImplementedError, match="needs Triton 3.6 or later, got 3.5"):
        dispatch.resolve("attend_selected", "kvmajor_sm90", hopper)


def test_kernels_refuse_forward_mode_derivatives(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q, k, v, g, cu_seqlens = packed()

    def attend(q, impl):
        return nsattn.nsa_attention(q, k, v, gates=g, config=TINY, cu_seqlens=cu_seqlens, impl=impl)

    _, tangent = torch.func.jvp(lambda q: attend(q, "reference"), (q,), (torch.ones_like(q),))
    assert tangent.any()
    with pytest.raises(NotImplementedError, match=r"kernels have no forward-mode derivatives \(jvp\)"):
        torch.func.jvp(lambda q: attend(q, "triton"), (q,), (torch.ones_like(q),))


def test_dispatch_choices():
    assert dispatch.resolve("attend_selected", "auto", shape()) == "kvmajor"
    assert dispatch.resolve("attend_selected", "auto", shape(group=64)) == "qmajor"
    assert dispatch.resolve("attend_selected", "auto", shape(rows=8)) == "qmajor"  # a decoding step
    assert dispatch.resolve("attend_selected", "qmajor", shape()) == "qmajor"
    hopper = {"capability": (9, 0), "slc_block": 64}
    assert dispatch.resolve("attend_selected", "auto", shape(**hopper)) == "kvmajor_sm90"
    for dims in ((64, 64), (192, 128), (256, 256)):
        other = {"head_dim": dims[0], "v_head_dim": dims[1]}
        assert dispatch.resolve("attend_selected", "auto", shape(**hopper, **other)) == "kvmajor_sm90"
    for other in ({"head_dim": 96}, {"slc_block": 32}, {"capability": (8, 0)}, {"capability": None}):
        assert dispatch.resolve("attend_selected", "auto", shape(**{**hopper, **other})) == "kvmajor"
    with pytest.raises(NotImplementedError, match="needs a GPU of compute capability 9.x, got 8.0"):
        dispatch.resolve("attend_selected", "kvmajor_sm90", shape(capability=(8, 0)))
    with pytest.raises(ValueError, match="selection block B must be one of 64, 128, got 32"):
        dispatch.resolve("attend_selected", "kvmajor_sm90", shape(**{**hopper, "slc_block": 32}))

    assert dispatch.resolve("attend_window", "kvmajor", shape()) == "triton"
    for impl, kernel in (("auto", "triton_sm90"), ("kvmajor", "triton_sm90"), ("triton", "triton")):
        assert dispatch.resolve("attend_compressed", impl, shape(**hopper)) == kernel
    assert dispatch.resolve("attend_selected", "triton", shape(**hopper)) == "kvmajor"  # kernels for any GPU
    with pytest.warns(UserWarning, match="in torch.float32 on a GPU runs the plain torch reference"):
        assert dispatch.resolve("attend_window", "auto", shape(dtype=torch.float32)) == "reference"
    assert dispatch.resolve("attend_window", "auto", shape(device="cpu")) == "reference"
    with pytest.raises(ValueError, match="at most 16384, got 20000"):
        dispatch.resolve("select_blocks", "auto", shape(max_blocks=20000))
    chosen = {name: text for name, text in dispatch.why("attend_selected", "auto", shape())}
    assert chosen["kvmajor"].startswith("chosen; predicted 3.99") and "would work; predicted 16.9" in chosen["qmajor"]
    forward = dict(dispatch.why("attend_selected", "auto", shape(backward=False)))
    assert "backward" not in forward["kvmajor"] and "backward" in chosen["kvmajor"]


def test_auto_takes_the_faster_kernel_of_the_committed_times():
    """On an H200, with and without Hopper kernels, `auto` never takes one that is over 10 % slower than the best.

    Times of CUDA graphs, and where there is none of long calls: of short ones, launches by the host decide.
    """
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "h200" / "attention.json"
    times = {}
    for row in without_host(read_rows(path)):
        graph = row.T <= GRAPH_TOKENS
        if row.who == "nsattn" and row.op == "attend_selected" and (graph or row.T * row.Hq >= HOST_ROWS):
            times.setdefault((row.T, row.Hq, row.Hkv), {}).setdefault(row.impl, {})[row.direction] = row.ms
    assert len(times) >= 10
    for (T, Hq, Hkv), by_impl in times.items():
        for backward, hopper in itertools.product((False, True), {False, "kvmajor_sm90" in by_impl}):
            total = {impl: ms["forward"] + backward * ms["backward"] for impl, ms in by_impl.items()
                     if hopper or not impl.endswith("_sm90")}
            sizes = shape(group=Hq // Hkv, rows=T * Hkv, slc_block=64, num_selected=16, backward=backward,
                          capability=(9, 0) if hopper else (8, 0))
            chosen = dispatch.resolve("attend_selected", "auto", sizes)
            assert total[chosen] <= 1.1 * min(total.values()), (T, Hq, Hkv, backward, chosen, total)


# Milliseconds of `kvmajor_sm90` on an H200, T=65536, 4 KV heads: (B, N, G, forward, backward); docs/log.md, 2026-11-23.
HOPPER_TIMES = [
    (64, 16, 1, 1.00, 1.55), (64, 16, 2, 1.66, 2.74), (64, 16, 3, 2.54, 3.89), (64, 16, 4, 3.17, 4.82),
    (64, 16, 5, 4.09, 6.89), (64, 16, 7, 5.47, 9.51), (64, 16, 8, 6.14, 10.9), (64, 16, 16, 12.4, 21.0),
    (128, 8, 1, 0.62, 1.21), (128, 8, 4, 1.99, 4.19), (128, 8, 5, 2.76, 4.96), (128, 8, 16, 7.64, 15.9),
]  # fmt: skip


@pytest.mark.parametrize(("block", "selected", "group", "forward", "backward"), HOPPER_TIMES)
def test_predicted_times_of_the_hopper_kernels(block, selected, group, forward, backward):
    sizes = shape(group=group, slc_block=block, num_selected=selected, rows=4 * 65536, capability=(9, 0))
    predicted = dispatch.predict(dispatch.TABLE["attend_selected"]["kvmajor_sm90"], sizes)
    assert predicted == [pytest.approx(forward, rel=0.25), pytest.approx(backward, rel=0.25)]


# Milliseconds of wide heads, N=16, B=64: (D, Dv, T, KV heads, G, forward and backward of kvmajor_sm90 and of qmajor);
# docs/log.md, 2026-11-28.
WIDE_TIMES = [
    (192, 128, 65536, 4, 4, 3.44, 8.91, 33.6, 47.4), (256, 256, 65536, 4, 4, 6.36, 13.5, 39.5, 57.0),
    (192, 128, 16384, 1, 16, 0.78, 1.86, 1.82, 5.38), (192, 128, 16384, 1, 32, 1.53, 3.70, 2.83, 9.63),
    (192, 128, 16384, 1, 64, 2.94, 7.03, 2.74, 15.67), (256, 256, 16384, 1, 16, 1.47, 2.56, 2.46, 6.31),
    (256, 256, 16384, 1, 32, 2.88, 5.07, 3.54, 11.39), (256, 256, 16384, 1, 64, 5.57, 10.10, 3.38, 19.92),
]  # fmt: skip


@pytest.mark.parametrize("times", WIDE_TIMES)
def test_predicted_times_of_wide_heads(times):
    """Within a quarter of what the Hopper kernels take, so that `auto` takes the faster schedule."""
    D, Dv, T, heads, group, *measured = times
    sizes = shape(head_dim=D, v_head_dim=Dv, group=group, slc_block=64, num_selected=16, rows=T * heads,
                  capability=(9, 0))
    hopper = dispatch.predict(dispatch.TABLE["attend_selected"]["kvmajor_sm90"], sizes)
    assert hopper == [pytest.approx(ms, rel=0.25) for ms in measured[:2]]
    assert sum(measured[:2]) < sum(measured[2:])
    assert dispatch.resolve("attend_selected", "auto", sizes) == "kvmajor_sm90"


def test_estimate_memory_is_bounded_and_linear():
    small, large = (
        nsattn.estimate_memory(T, 16, 4, 128, impl="kvmajor") for T in (4096, 8192)
    )
    assert 1.9 < large / small < 2.1
    assert large >= 8192 * 16 * 16 * 128 * 2  # a bfloat16 partial for every token, head and selected block
    for T in (8192, 65536, 1 << 18, 1 << 20):
        for backward in (False, True):
            for impl in ("kvmajor", "kvmajor_sm90", "qmajor"):
                if impl == "kvmajor_sm90" and dispatch.capability("cuda", None) is None:
                    continue
                size = nsattn.estimate_memory(T, 32, 8, 128, impl=impl, backward=backward, workspace=1 << 30)
                assert size <= (1 << 30) + (64 << 20), (T, backward, impl)
    assert nsattn.estimate_memory(65536, 32, 8, 128, impl="qmajor") == 0
    with pytest.raises(ValueError, match="grows with the square of the length"):
        nsattn.estimate_memory(65536, 32, 8, 128, impl="reference")


@pytest.mark.parametrize("workspace", [64 << 20, 256 << 20])
def test_a_small_workspace_leaves_room_for_chunks_of_long_batches(workspace):
    """What no chunk makes smaller, delta and the rest of sums, must not use the workspace up: that would mean a
    million steps of a few rows."""
    T = 1 << 20
    q, k = (torch.empty(T, heads, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    plan = make_plan(torch.empty(2, dtype=torch.int32, device="meta"), T, config=NSAConfig())
    kernel = Gradient(lambda: None, parts=1, cut=selected_cut)
    size = selected_size(q, k, k, 16, plan, kernel, workspace=workspace, with_dq=True)
    pieces = list(chunks(plan, 8, 4, size, workspace))
    partials = T * 32 * 16 * 128 * 2
    assert len(pieces) <= 16 * partials // workspace
    assert sum(c.rows * c.heads * c.group for c in pieces) == T * 32


def test_kernels_by_name_need_a_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    q, k, v, g = batch(d=32, dv=32)
    with pytest.raises(NotImplementedError, match="needs a GPU, got tensors on 'cpu'"):
        nsattn.nsa_attention(q, k, v, gates=g, config=TINY, impl="kvmajor")


def test_batched_is_packed_is_one_by_one():
    q, k, v, g = batch(3, 33)
    o = nsattn.nsa_attention(q, k, v, gates=g, config=TINY, return_lse=True)
    assert o.o.shape == (3, 33, 4, 16) and o.lse_cmp.shape == (3, 33, 4) and o.block_idx.shape == (3, 33, 2, 4)
    lengths = torch.arange(4, dtype=torch.int32) * 33
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    p = nsattn.nsa_attention(*flat, gates=g.flatten(0, 1), config=TINY, cu_seqlens=lengths)
    assert torch.equal(p.view_as(o.o), o.o)
    for i in range(3):
        single = nsattn.nsa_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], gates=g[i : i + 1], config=TINY)
        torch.testing.assert_close(single[0], o.o[i])


def test_fewer_queries_than_keys_are_the_last_rows():
    q, k, v, g = batch(2, 60)
    whole = nsattn.nsa_attention(q, k, v, gates=g, config=TINY)
    last = nsattn.nsa_attention(q[:, -7:], k, v, gates=g[:, -7:], config=TINY)
    torch.testing.assert_close(last, whole[:, -7:])


def test_own_keys_for_each_branch():
    q, k, v, g = batch(1, 40)
    one_hot = torch.zeros_like(g)
    one_hot[..., 2] = 1
    k_win, v_win = torch.randn_like(k), torch.randn_like(v)
    o = nsattn.nsa_attention(q, k, v, gates=one_hot, k_win=k_win, v_win=v_win, config=TINY)
    torch.testing.assert_close(o, nsattn.attend_window(q, k_win, v_win, config=TINY))
    one_hot = one_hot.roll(-2, dims=-1)
    k_cmp, v_cmp = nsattn.compress(k_win, config=TINY), nsattn.compress(v_win, config=TINY)
    o = nsattn.nsa_attention(q, k, v, gates=one_hot, k_cmp=k_cmp, v_cmp=v_cmp, config=TINY)
    torch.testing.assert_close(o, nsattn.attend_compressed(q, k_cmp, v_cmp, config=TINY))


def test_given_selection_is_used():
    q, k, v, g = batch(1, 40)
    first = nsattn.nsa_attention(q, k, v, gates=g, config=TINY, return_lse=True)
    again = nsattn.nsa_attention(q, k, v, gates=g, config=TINY, block_idx=first.block_idx)
    assert torch.equal(first.o, again)
    other = torch.full_like(first.block_idx, -1)
    other[..., 0] = 0
    assert not torch.equal(first.o, nsattn.nsa_attention(q, k, v, gates=g, config=TINY, block_idx=other))


def test_autocast_casts_the_inputs():
    q, k, v, g = batch(1, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = nsattn.nsa_attention(q, k, v, gates=g, config=TINY)
        assert o.dtype == torch.bfloat16
        assert nsattn.NSAttention(32, 4, 2, config=TINY)(torch.randn(1, 40, 32)).dtype == torch.bfloat16


def test_check_selection_names_the_first_bad_entry():
    x = make_inputs((40, 30), num_kv_heads=2, config=TINY)
    good = random_selection(x.plan, 2)
    checks.check_selection(good, x.plan)
    twice, future = good.clone(), good.clone()
    twice[39, 1] = torch.tensor([0, 1, 1, 2])
    future[45, 0] = torch.tensor([0, 2, -1, -1])
    with pytest.raises(ValueError, match=re.escape("block_idx[39, 1, 2] = 1 occurs twice")):
        nsattn.check_selection(twice, x.plan)
    with pytest.raises(ValueError, match=re.escape("block_idx[45, 0, 1] = 2 is outside 0..0 and not -1")):
        nsattn.check_selection(future, x.plan)
    with pytest.raises(ValueError, match="block_idx"):
        nsattn.check_selection(hostile_selection(x.plan, 2), x.plan)


@pytest.mark.parametrize("compression", ["mean", "linear", "mlp", "gated"])
@pytest.mark.parametrize("separate_kv", [False, True])
def test_module_trains_every_parameter(compression, separate_kv):
    """Also where no compressed block exists: distributed training wants a gradient for every parameter."""
    layer = nsattn.NSAttention(32, 4, 2, config=TINY, compression=compression, separate_kv=separate_kv)
    for length in (40, 3):
        layer.zero_grad()
        layer(torch.randn(2, length, 32)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("compression", ["mean", "linear", "mlp", "gated"])
def test_module_can_be_made_on_meta_and_takes_tensors_for_parameters(compression):
    make = lambda: nsattn.NSAttention(32, 4, 2, config=TINY, compression=compression)  # noqa: E731
    with torch.device("meta"):
        layer = make()
    layer.to_empty(device="cpu")
    for p in layer.parameters():
        p.data.fill_(7.0)
    for module in layer.modules():  # as FSDP2 and torchtitan do
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not layer.gate_proj.weight.any() and not layer.gate_proj.bias.any()  # gates of one half
    if compression == "linear":  # the mean
        torch.testing.assert_close(layer.compress_k.weight.sum(1), torch.eye(8).expand(2, 8, 8))
    assert all((p != 7).any() for p in layer.parameters())

    x = torch.randn(2, 40, 32)
    tensors = {name: p.detach() for name, p in layer.named_parameters()}  # also FSDP1 and DataParallel put them there
    torch.testing.assert_close(torch.func.functional_call(layer, tensors, (x,)), layer(x))
    assert layer(x[:, :0]).shape == (2, 0, 32)


def test_module_packed_is_batched():
    layer = nsattn.NSAttention(32, 4, 2, config=TINY)
    x = torch.randn(2, 40, 32)
    y, idx = layer(x, return_selection=True)
    cu_seqlens = torch.tensor([0, 40, 80], dtype=torch.int32)
    torch.testing.assert_close(layer(x.flatten(0, 1), cu_seqlens=cu_seqlens), y.flatten(0, 1))
    assert idx.shape == (80, 2, 4) and idx.dtype == torch.int32


def test_checkpointing_changes_no_bit():
    from torch.utils.checkpoint import checkpoint

    layer = nsattn.NSAttention(32, 4, 2, config=TINY)
    x = torch.randn(2, 40, 32, requires_grad=True)
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append((y.detach(), *(p.grad.clone() for p in layer.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
