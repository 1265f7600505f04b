"""The boundary to torch: opcheck of every op, fullgraph compilation, CUDA graphs, checkpoint policies."""

from __future__ import annotations

import pytest
import torch

import nsattn
from nsattn import NSAConfig, branches, dispatch
from nsattn.testing import make_compression, make_inputs, random_selection

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
TINY = NSAConfig(cmp_block=8, cmp_stride=4, slc_block=16, num_selected=3, window=9)
DIM = 64 if GPU else 16


def inputs(*lengths):
    return make_inputs(lengths, num_kv_heads=2, group=2, head_dim=DIM, config=TINY, dtype=DTYPE, device=DEVICE)


def leaf(x):
    return x.clone().requires_grad_()


def op_calls():
    """(id, op, arguments) of every custom op, on inputs that need gradients."""
    x = inputs(21, 5)
    plan, scale = x.plan.pack(), x.scale
    lse = branches.attend_compressed(x.q, x.k_cmp, x.v_cmp, x.plan, scale=scale, workspace=1 << 30, impl="reference")[1]
    selection = random_selection(x.plan, 2)
    params = [leaf(p) for p in make_compression("linear", 2, DIM, DIM, TINY, dtype=DTYPE, device=DEVICE)]
    q, k, v = leaf(x.q), leaf(x.k), leaf(x.v)
    calls = [
        ("compress", branches._compress, (k, *params, None, None, None, *plan, "linear", "triton")),
        (
            "attend_compressed",
            branches._attend_compressed,
            (q, leaf(x.k_cmp), leaf(x.v_cmp), None, *plan, scale, 1 << 30, "triton"),
        ),
        ("select_blocks", branches._select_blocks, (x.q, x.k_cmp, lse, *plan, scale, 1 << 30, "triton")),
        ("attend_window", branches._attend_window, (q, k, v, None, *plan, scale, 0, "triton")),
        ("combine", branches._combine, (q, leaf(x.q), leaf(x.q), leaf(x.gates), "triton")),
    ]
    calls += [
        (impl, branches._attend_selected, (q, k, v, selection, *plan, scale, 1 << 30, impl))
        for impl in ("kvmajor", "qmajor")
    ]
    return calls


@pytest.mark.parametrize(
    "index",
    range(7),
    ids=["compress", "attend_compressed", "select_blocks", "attend_window", "combine", "kvmajor", "qmajor"],
)
def test_opcheck(index):
    _, op, arguments = op_calls()[index]
    torch.library.opcheck(getattr(op, "default", op), arguments, atol=1e-2 if GPU else 1e-5, rtol=1e-2 if GPU else 1e-5)


def test_constants_are_marked_as_torch_marks_them():
    assert vars(dispatch.constant(lambda: 1)) == vars(torch.compiler.assume_constant_result(lambda: 1))
    assert vars(dispatch.capability) == vars(dispatch.triton_version) == vars(dispatch.constant(lambda: 1))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_fullgraph(impl):
    """A layer compiles without a graph break, forward and backward, for several lengths, and matches eager."""
    torch._dynamo.reset()
    layer = nsattn.NSAttention(4 * DIM, 4, 2, config=TINY, compression="linear", impl=impl, device=DEVICE, dtype=DTYPE)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    for length in (20, 12):
        x = torch.randn(1, length, 4 * DIM, device=DEVICE, dtype=DTYPE)
        results = []
        for run in (layer, compiled):
            layer.zero_grad()
            y = run(x)
            y.float().square().sum().backward()
            results.append((y.detach(), layer.k_proj.weight.grad.clone()))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2 if GPU else 1e-4, atol=2e-2 if GPU else 1e-4)


@pytest.mark.skipif(GPU, reason="what inductor makes for a CPU")
@pytest.mark.parametrize("length", [40, 100])
def test_inductor_trains_at_odd_lengths(length):
    """The default backend, at lengths that no vector of a CPU divides: a reference that indexed blocks by key raised
    an error or gave wrong results there, not in every run."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = NSAConfig(8, 4, 16, 2, 10, 1, 1)
    shapes = [(2, length, *heads) for heads in ((4, 16), (2, 16), (2, 16), (4, 3))]
    run = torch.compile(lambda q, k, v, g: nsattn.nsa_attention(q, k, v, gates=g, config=config), fullgraph=True)
    for _ in range(4):
        leaves = [torch.randn(shape).requires_grad_() for shape in shapes]
        y = run(*leaves)
        got = torch.autograd.grad(y.sum(), leaves)
        want = nsattn.nsa_attention(*leaves[:3], gates=leaves[3], config=config)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
        for a, b in zip(got, torch.autograd.grad(want.sum(), leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_two_configs_in_one_function():
    """The second makes a compiler's symbols of the numbers that differ."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(q, k, v, block_idx, cu, config):
        return nsattn.attend_selected(q, k, v, block_idx, cu_seqlens=cu, config=config)

    x = inputs(32)
    block_idx = torch.zeros(32, 2, 2, dtype=torch.int32, device=DEVICE)
    for block, window in ((16, 20), (32, 40)):
        arguments = x.q, x.k, x.v, block_idx, x.plan.cu_q
        config = NSAConfig(8, 4, block, 4, window)
        want = nsattn.attend_selected(*arguments[:4], cu_seqlens=x.plan.cu_q, config=config)
        torch.testing.assert_close(run(*arguments, config), want)


def test_fullgraph_is_the_first_call():
    """Without an eager call before, from packed lengths, on the function itself.

    The schedule is named: left open, traced code takes the one for long sequences, an eager call the one for these.
    """
    torch._dynamo.reset()
    x = inputs(20, 3)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(q, k, v, gates, cu):
        return nsattn.nsa_attention(q, k, v, gates=gates, cu_seqlens=cu, config=TINY, impl="kvmajor")

    got = run(x.q, x.k, x.v, x.gates, x.plan.cu_q)
    want = nsattn.nsa_attention(x.q, x.k, x.v, gates=x.gates, cu_seqlens=x.plan.cu_q, config=TINY, impl="kvmajor")
    torch.testing.assert_close(got, want)


def test_checkpoint_policy_can_save_the_selection():
    """Selective checkpointing sees select_blocks as an op: it is not run again in backward."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    runs = []

    def policy(ctx, op, *args, **kwargs):
        if op == torch.ops.nsattn.select_blocks.default:
            runs.append(ctx.is_recompute)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    x = inputs(24)
    q = leaf(x.q)

    def run(q):
        return nsattn.nsa_attention(q, x.k, x.v, gates=x.gates, plan=x.plan, impl="triton")

    plain = torch.autograd.grad(run(q).float().sum(), q)[0]
    y = checkpoint(run, q, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
    assert torch.equal(torch.autograd.grad(y.float().sum(), q)[0], plain)
    assert False in runs


@pytest.mark.gpu
def test_cuda_graph_replays_with_new_data_and_lengths():
    """Forward and backward captured once, replayed with other contents and other cu_seqlens."""
    x = make_inputs((300, 212), num_kv_heads=2, group=4, head_dim=128, dtype=torch.bfloat16, device="cuda")
    cu = x.plan.cu_q.clone()
    q, k, v, gates = (leaf(t) for t in (x.q, x.k, x.v, x.gates))

    def step():
        o = nsattn.nsa_attention(q, k, v, gates=gates, cu_seqlens=cu, max_seqlen=512)
        return (o, *torch.autograd.grad(o, (q, k, v, gates), q.detach()))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed, middle in ((1, 300), (2, 17), (3, 512)):
        new = make_inputs((512,), num_kv_heads=2, group=4, head_dim=128, dtype=torch.bfloat16, device="cuda", seed=seed)
        with torch.no_grad():
            for t, source in ((q, new.q), (k, new.k), (v, new.v), (gates, new.gates)):
                t.copy_(source)
        cu.copy_(torch.tensor([0, middle, 512], device="cuda"))
        graph.replay()
        got = [t.clone() for t in captured]
        assert all(torch.equal(a, b) for a, b in zip(got, step(), strict=True)), middle


@pytest.mark.gpu
def test_no_host_sync():
    """Not one call waits for the device, with max_seqlen and without."""
    x = make_inputs((300, 212), num_kv_heads=2, group=4, head_dim=128, dtype=torch.bfloat16, device="cuda")
    q, k, v = leaf(x.q), leaf(x.k), leaf(x.v)

    def step(**options):
        o = nsattn.nsa_attention(q, k, v, gates=x.gates, cu_seqlens=x.plan.cu_q, **options)
        torch.autograd.grad(o, (q, k, v), q.detach())

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(max_seqlen=512)
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_side_streams_and_threads():
    """Two streams and four threads at once give the bits of one."""
    from concurrent.futures import ThreadPoolExecutor

    x = make_inputs((900, 124), num_kv_heads=2, group=4, head_dim=128, dtype=torch.bfloat16, device="cuda")
    want = nsattn.nsa_attention(x.q, x.k, x.v, gates=x.gates, plan=x.plan)
    torch.cuda.synchronize()

    def work(_):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [nsattn.nsa_attention(x.q, x.k, x.v, gates=x.gates, plan=x.plan) for _ in range(10)]
        stream.synchronize()
        return all(torch.equal(r, want) for r in results)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
