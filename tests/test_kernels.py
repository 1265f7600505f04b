"""The real kernels against the reference: in Triton's interpreter without a GPU, on the GPU where there is one.

Cases and checks are those of `nsattn.verify`; every kernel cell of `dispatch.TABLE` meets every case.
"""

from __future__ import annotations

import weakref

import pytest
import torch

from nsattn import NSAConfig, branches, dispatch
from nsattn.kernels import reference
from nsattn.plan import make_plan
from nsattn.testing import assert_close, compare_selections, make_inputs, random_selection
from nsattn.verify import cells, check

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SHAPE = dispatch.Shape(DEVICE, torch.bfloat16, slc_block=64, capability=dispatch.capability(DEVICE, None))
ATTENTION = [(op, impl) for op, cells_of in dispatch.TABLE.items() for impl, cell in cells_of.items()
             if cell.is_kernel and op.startswith("attend") and not any(dispatch.unmet(cell, SHAPE))]

CELLS = list(cells(DEVICE, every_dtype=GPU))


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: f"{c.operation}-{c.impl}-{c.dtype}-{c.case.name}")
def test_cell(cell):
    results = check(cell.operation, cell.impl, cell.case, cell.dtype, cell.device)
    wrong = [f"{name}: {verdict}" for name, verdict in results if not verdict.ok]
    assert results and not wrong, "\n".join(wrong)


@pytest.mark.skipif(GPU, reason="float64 kernels run in the interpreter only")
@pytest.mark.parametrize(("operation", "impl"), ATTENTION)
def test_gradcheck(operation, impl):
    """The kernels themselves in float64: analytic gradients against finite differences, of o and of lse."""
    config = NSAConfig(cmp_block=8, cmp_stride=4, slc_block=16, num_selected=2, window=5, init_blocks=1, local_blocks=1)
    x = make_inputs((3, 0, 18), num_kv_heads=1, group=2, head_dim=16, config=config, dtype=torch.float64)
    keys = (x.k_cmp, x.v_cmp) if operation == "attend_compressed" else (x.k, x.v)
    extra = (random_selection(x.plan, 1),) if operation == "attend_selected" else ()
    options = {"scale": 0.25, "impl": impl, "workspace": 1 << 20}

    def function(q, k, v):
        o, lse = getattr(branches, operation)(q, k, v, *extra, x.plan, **options)
        return o, torch.where(lse.isfinite(), lse, 0)

    leaves = tuple(t.clone().requires_grad_() for t in (x.q, *keys))
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize(("operation", "impl"), ATTENTION)
def test_repeats_bit_for_bit_and_ignores_the_batch(operation, impl):
    """The same bits in every run, and for a sequence alone, first or last in a batch: forward and gradients."""
    dtype, dim, lengths = (torch.bfloat16, 128, (1000, 333)) if GPU else (torch.float32, 16, (24, 11))
    config = NSAConfig() if GPU else NSAConfig(8, 4, 16, 3, 7)
    x = make_inputs(lengths, num_kv_heads=2, group=3, head_dim=dim, config=config, dtype=dtype, device=DEVICE)
    a, b = lengths
    selection = random_selection(x.plan, 2)

    def run(order):
        rows = {0: slice(0, a), 1: slice(a, a + b)}
        lens = [lengths[i] for i in order]
        cu = torch.tensor([0, *lens], device=DEVICE).cumsum(0).int()
        plan = make_plan(cu, sum(lens), config=config)
        c = int(x.plan.cu_cmp[1])
        cmp_rows = {0: slice(0, c), 1: slice(c, int(x.plan.cu_cmp[2]))}
        key_rows = cmp_rows if operation == "attend_compressed" else rows
        keys = (x.k_cmp, x.v_cmp) if operation == "attend_compressed" else (x.k, x.v)

        def pick(t, where, total=None):
            t = torch.cat([t[where[i]] for i in order])
            pad = 0 if total is None else total - t.shape[0]
            return torch.cat([t, t.new_zeros(pad, *t.shape[1:])])

        total = plan.total_cmp if operation == "attend_compressed" else None
        leaves = [pick(x.q, rows).requires_grad_()] + [pick(t, key_rows, total).requires_grad_() for t in keys]
        extra = (pick(selection, rows),) if operation == "attend_selected" else ()
        options = {"scale": x.scale, "impl": impl, "workspace": 1 << 30}
        o, lse = getattr(branches, operation)(*leaves, *extra, plan, **options)
        do = pick(x.q * 0.5, rows)
        grads = torch.autograd.grad(o, leaves, do)
        starts = {order[0]: 0, order[-1]: lens[0] if len(order) > 1 else 0}
        offset = starts[1]
        key_offset = int(plan.cu_cmp[order.index(1)]) if operation == "attend_compressed" else offset
        key_count = cmp_rows[1].stop - cmp_rows[1].start if operation == "attend_compressed" else b
        return (o[offset : offset + b], lse[offset : offset + b], grads[0][offset : offset + b],
                *(g[key_offset : key_offset + key_count] for g in grads[1:]))

    first = run((0, 1))
    for _ in range(10 if GPU else 1):
        assert all(torch.equal(p, q) for p, q in zip(first, run((0, 1)), strict=True))
    for order in ((1, 0), (1,)):
        assert all(torch.equal(p, q) for p, q in zip(first, run(order), strict=True)), order


@pytest.mark.parametrize("impl", ["kvmajor", "qmajor"])
def test_strided_inputs(impl):
    """Views of a fused qkv, a transposed layout and expanded keys give what contiguous copies give."""
    config = NSAConfig() if GPU else NSAConfig(8, 4, 16, 3, 7)
    dtype, dim, T = (torch.bfloat16, 64, 500) if GPU else (torch.float32, 16, 24)
    x = make_inputs((T,), num_kv_heads=2, group=2, head_dim=dim, config=config, dtype=dtype, device=DEVICE)
    selection = random_selection(x.plan, 2)
    fused = torch.cat([x.q, x.k, x.v], dim=1)
    q, k, v = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    turned = x.q.transpose(0, 1).contiguous().transpose(0, 1)
    one = x.k[:, :1].expand(-1, 2, -1)
    for a, b in (((q, k, v), (x.q, x.k, x.v)), ((turned, one, v), (x.q, one.contiguous(), x.v))):
        results = []
        for tensors in (a, b):
            leaves = [t.detach().requires_grad_() for t in tensors]
            o, _ = branches.attend_selected(
                *leaves, selection, x.plan, scale=x.scale, workspace=1 << 30, impl=impl
            )
            w, _ = branches.attend_window(*leaves, x.plan, scale=x.scale, workspace=1 << 30, impl="triton")
            results.append((o, w, *torch.autograd.grad(o.sum() + w.sum(), leaves)))
        assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize("generation", ["", *(["_sm90"] if ("attend_window", "triton_sm90") in ATTENTION else [])])
def test_padding_does_not_leak(generation):
    """NaN in rows that belong to no sequence reaches neither outputs nor gradients, and those rows get zeros."""
    config = NSAConfig() if GPU else NSAConfig(8, 4, 16, 3, 7)
    dtype, dim = (torch.bfloat16, 128 if generation else 64) if GPU else (torch.float32, 16)
    options = {"workspace": 1 << 30, "impl": f"triton{generation}"}
    x = make_inputs((37, 21), num_kv_heads=1, group=2, head_dim=dim, config=config, dtype=dtype, device=DEVICE, slack=9)
    real, real_cmp = 58, int(x.plan.cu_cmp[-1])
    q, k, v, k_cmp, v_cmp = (t.clone() for t in (x.q, x.k, x.v, x.k_cmp, x.v_cmp))
    for t, end in ((q, real), (k, real), (v, real), (k_cmp, real_cmp), (v_cmp, real_cmp)):
        t[end:] = float("nan")
        t.requires_grad_()
    o_cmp, lse = branches.attend_compressed(q, k_cmp, v_cmp, x.plan, scale=x.scale, **options)
    idx = branches.select_blocks(q, k_cmp, lse, x.plan, scale=x.scale, **options)
    assert (idx[real:] == -1).all()
    outputs = [o_cmp, branches.attend_window(q, k, v, x.plan, scale=x.scale, **options)[0]]
    outputs += [branches.attend_selected(q, k, v, idx, x.plan, scale=x.scale, workspace=1 << 30, impl=i)[0]
                for i in (f"kvmajor{generation}", "qmajor")]
    outputs += [branches.compress(k, (), x.plan, method="mean", impl="triton")]
    for y in outputs:
        end = real_cmp if y is outputs[-1] else real
        assert y[:end].isfinite().all() and (y[end:] == 0).all()
        leaves = (q, k, v, k_cmp, v_cmp)
        gradients = torch.autograd.grad(y[:end].sum(), leaves, allow_unused=True, retain_graph=True)
        for t, g in zip(leaves, gradients, strict=True):
            if g is not None:
                stop = real_cmp if t is k_cmp or t is v_cmp else real
                assert g[:stop].isfinite().all() and (g[stop:] == 0).all()


def test_selection_ties_go_to_the_lower_index():
    """All keys equal, so all scores equal: the free slots take the first blocks."""
    config = NSAConfig(num_selected=6) if GPU else NSAConfig(8, 4, 16, 5, 7)
    dim, T = (64, 1500) if GPU else (16, 140)
    dtype = torch.bfloat16 if GPU else torch.float32
    x = make_inputs((T,), num_kv_heads=1, group=3, head_dim=dim, config=config, dtype=dtype, device=DEVICE)
    q = x.q.round()  # products of whole numbers are exact: some CPUs add the last columns of a product in another order
    k_cmp = torch.ones_like(x.k_cmp)
    lse = branches.attend_compressed(q, k_cmp, x.v_cmp, x.plan, scale=x.scale, workspace=1 << 30, impl="triton")[1]
    got = branches.select_blocks(q, k_cmp, lse, x.plan, scale=x.scale, workspace=1 << 30, impl="triton")
    want = reference.select_blocks(q.double(), k_cmp.double(), lse.double(), x.plan, scale=x.scale)
    inner = got[-1, 0, 1:-2]  # between the first and the two local blocks: 1, 2, 3, ... but block 0's edge weighs less
    assert inner.tolist() == sorted(inner.tolist()) and inner.max() <= config.num_selected
    assert compare_selections(got, want).wrong <= 0


def test_scratch_limit_changes_no_selection():
    """Chunked selection is bit-equal to one pass."""
    config = NSAConfig(num_selected=6) if GPU else NSAConfig(8, 4, 16, 5, 7)
    dtype, dim, T = (torch.bfloat16, 64, 5000) if GPU else (torch.float32, 16, 100)
    x = make_inputs((T, 30), num_kv_heads=2, group=2, head_dim=dim, config=config, dtype=dtype, device=DEVICE)
    lse = branches.attend_compressed(x.q, x.k_cmp, x.v_cmp, x.plan, scale=x.scale, workspace=1 << 30, impl="triton")[1]
    one, many = (
        branches.select_blocks(x.q, x.k_cmp, lse, x.plan, scale=x.scale, workspace=w, impl="triton")
        for w in (1 << 30, 1 << 14)
    )
    assert torch.equal(one, many)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 4, 5, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_sequences(dtype, group):
    """At 32K tokens: outputs and dQ of the last rows, dK and dV of a loss on those rows, against float64."""
    T, rows, heads = 32768, 64, 2
    x = make_inputs((T,), num_kv_heads=heads, group=group, head_dim=128, dtype=dtype, device="cuda")
    few = torch.tensor([0, rows], dtype=torch.int32, device="cuda")
    last = make_plan(few, rows, config=x.plan.config, max_seqlen=rows, cu_seqlens_k=x.plan.cu_k, total_k=T,
                     max_seqlen_k=T)
    selection = random_selection(x.plan, heads)
    do = torch.zeros(T, heads * group, 128, dtype=dtype, device="cuda")
    do[-rows:] = torch.randn(rows, heads * group, 128, device="cuda")
    for operation, impl in ATTENTION:
        keys = (x.k_cmp, x.v_cmp) if operation == "attend_compressed" else (x.k, x.v)
        leaves = [t.clone().requires_grad_() for t in (x.q, *keys)]
        extra = (selection,) if operation == "attend_selected" else ()
        options = {"workspace": 1 << 30}
        o, lse = getattr(branches, operation)(*leaves, *extra, x.plan, scale=x.scale, impl=impl, **options)
        dq, dk, dv = torch.autograd.grad(o, leaves, do)
        results = []
        for kind in (torch.float64, dtype):
            tail = [x.q[-rows:].to(kind).requires_grad_()] + [t.to(kind).requires_grad_() for t in keys]
            tail_extra = (selection[-rows:],) if extra else ()
            y, y_lse = getattr(reference, operation)(*tail, *tail_extra, last, scale=x.scale)
            results.append((y, y_lse, *torch.autograd.grad(y, tail, do[-rows:].to(kind))))
        got = (o[-rows:], lse[-rows:], dq[-rows:], dk, dv)
        for name, a, b, c in zip(("o", "lse", "dq", "dk", "dv"), got, *results, strict=True):
            assert_close(a.detach(), b.detach(), c.detach(), f"{operation} {impl} {name}", dtype=dtype)


@pytest.mark.gpu
@pytest.mark.skipif(("attend_window", "triton_sm90") not in ATTENTION, reason="kernels for Hopper")
@pytest.mark.parametrize("group", [1, 3, 4, 5])
@pytest.mark.parametrize("operation", ["attend_compressed", "attend_window"])
def test_parts_in_turn_are_parts_side_by_side(operation, group, monkeypatch):
    """The dense kernels for Hopper with three programs for all parts, and with one for each: the same bits."""
    from nsattn.kernels import _dense_backward_sm90, _dense_sm90

    x = make_inputs((700, 0, 1, 322), lengths_k=(900, 0, 1, 322), num_kv_heads=2, group=group, head_dim=128,
                    dtype=torch.bfloat16, device="cuda", slack=70)  # fmt: skip
    module = dispatch.load(operation, "triton_sm90")
    k, v = (x.k_cmp, x.v_cmp) if operation == "attend_compressed" else (x.k_win, x.v_win)
    options = {"scale": x.scale, "workspace": 1 << 30}
    results = []
    for programs in (lambda parts, device: parts, lambda parts, device: min(parts, 3)):
        for using in (_dense_sm90, _dense_backward_sm90):
            monkeypatch.setattr(using, "programs", programs)
        o, lse = getattr(module, operation)(x.q, k, v, x.plan, **options)
        backward = [getattr(module, f"{operation}_bwd")(x.q, None, x.q, k, v, o, lse, x.plan, **options, dq=total)
                    for total in (None, x.q.clone())]  # fmt: skip
        results.append((o, lse, *backward[0], *backward[1]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


WIDE = [("attend_selected", "kvmajor_sm90", *dims) for dims in ((192, 128), (256, 256), (64, 64))
        if ("attend_selected", "kvmajor_sm90") in ATTENTION]


@pytest.mark.gpu
@pytest.mark.parametrize(("operation", "impl", "dim", "v_dim"), [*((*each, 128, 128) for each in ATTENTION), *WIDE])
def test_250_repeats(operation, impl, dim, v_dim):
    """A batch of sequences, forward and backward 250 times: not one bit differs."""
    x = make_inputs((257,) * 12, num_kv_heads=2, group=4, head_dim=dim, v_head_dim=v_dim, dtype=torch.bfloat16,
                    device="cuda")  # fmt: skip
    keys = (x.k_cmp, x.v_cmp) if operation == "attend_compressed" else (x.k, x.v)
    leaves = [t.requires_grad_() for t in (x.q, *keys)]
    extra = (random_selection(x.plan, 2),) if operation == "attend_selected" else ()
    options = {"workspace": 1 << 30}
    do = x.q.detach()[..., :v_dim].contiguous()

    def run():
        o, lse = getattr(branches, operation)(*leaves, *extra, x.plan, scale=x.scale, impl=impl, **options)
        return (o, lse, *torch.autograd.grad(o, leaves, do))

    first = run()
    for i in range(250):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), f"run {i}"


def _skip_without_memory(gib):
    """Other workers of pytest-xdist use the same GPU."""
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free:.0f} are")


@pytest.mark.gpu
def test_partials_beyond_2_31_elements():
    """A workspace of 32 GiB keeps all partial outputs, 5.2e9 elements, in one buffer: same bits as in small pieces."""
    _skip_without_memory(36)
    x = make_inputs((40_000,), num_kv_heads=4, group=16, head_dim=128, dtype=torch.bfloat16, device="cuda")
    selection = random_selection(x.plan, 4)
    results = []
    for workspace in (1 << 35, 1 << 28):
        leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
        o, lse = branches.attend_selected(
            *leaves, selection, x.plan, scale=x.scale, workspace=workspace, impl="kvmajor"
        )
        results.append((o.detach(), lse.detach(), torch.autograd.grad(o, leaves, x.q)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
def test_more_than_2_31_elements():
    """300,000 tokens with 64 query heads: q has 2.46e9 elements, offsets need 64 bits in every kernel."""
    T, heads, group = 300_000, 2, 32
    x = make_inputs((T,), num_kv_heads=heads, group=group, head_dim=128, dtype=torch.bfloat16, device="cuda")
    few = torch.tensor([0, 16], dtype=torch.int32, device="cuda")
    last = make_plan(few, 16, config=x.plan.config, max_seqlen=16, cu_seqlens_k=x.plan.cu_k, total_k=T, max_seqlen_k=T)
    selection = random_selection(x.plan, heads)
    with torch.no_grad():
        for operation, impl in ATTENTION:
            keys = (x.k_cmp, x.v_cmp) if operation == "attend_compressed" else (x.k, x.v)
            extra = (selection,) if operation == "attend_selected" else ()
            tail_extra = (selection[-16:],) if extra else ()
            options = {"workspace": 1 << 30}
            got = getattr(branches, operation)(x.q, *keys, *extra, x.plan, scale=x.scale, impl=impl, **options)[0]
            golden, low = (
                getattr(reference, operation)(
                    x.q[-16:].to(t), *(y.to(t) for y in keys), *tail_extra, last, scale=x.scale
                )[0]
                for t in (torch.float64, torch.bfloat16)
            )
            assert_close(got[-16:], golden, low, f"{operation} {impl}")
            del got


class PeakBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """Largest number of bytes that were alive at once in storages made under this mode."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.skipif(GPU, reason="test_scratch_on_the_gpu measures the allocator")
def test_scratch_of_the_selected_branch_stays_within_the_workspace():
    """Chunks do not overlap in memory: with a small workspace the peak is that of one chunk, not of two."""
    config = NSAConfig(8, 4, 16, 8, 7)
    x = make_inputs((256,), num_kv_heads=2, group=4, head_dim=32, config=config, dtype=torch.float16, slack=0)
    selection = random_selection(x.plan, 2)
    workspace = 1 << 20
    o, lse = reference.attend_selected(x.q, x.k, x.v, selection, x.plan, scale=x.scale)
    kernels = dispatch.load("attend_selected", "kvmajor")
    options = {"scale": x.scale, "workspace": workspace}
    inputs = (x.q, x.k, x.v)
    for run, outputs in (
        (lambda: kernels.attend_selected(*inputs, selection, x.plan, **options), (o, lse)),
        (lambda: kernels.attend_selected_bwd(x.q, None, *inputs, o, lse, selection, x.plan, **options), (*inputs, lse)),
    ):
        with PeakBytes() as memory:
            run()
        scratch = memory.peak - sum(t.numel() * t.element_size() for t in outputs)
        # The rest of the sums of dK and dV of one head, and the tables of the lists, come on top.
        assert workspace // 4 < scratch <= workspace + (256 << 10), scratch


def test_sums_that_overflow_in_one_chunk_stay_infinite():
    """A float16 gradient of 1e5 is infinite, not NaN, in however many chunks it was summed up."""
    config = NSAConfig(8, 4, 16, 3, 7)
    x = make_inputs((130,), num_kv_heads=1, group=1, head_dim=32, config=config, dtype=torch.float16, device=DEVICE)
    selection = random_selection(x.plan, 1)
    o, lse = reference.attend_selected(x.q, x.k, x.v, selection, x.plan, scale=x.scale)
    do = torch.full_like(o, 2e4)
    kernels = dispatch.load("attend_selected", "kvmajor")
    dv = [
        kernels.attend_selected_bwd(
            do, None, x.q, x.k, x.v, o, lse, selection, x.plan, scale=x.scale, workspace=workspace
        )[2]
        for workspace in (1 << 30, 1 << 13)
    ]  # fmt: skip
    assert bool(dv[0].isinf().any()) and not bool(dv[1].isnan().any())
    assert torch.equal(*(y.isinf() for y in dv))


@pytest.mark.gpu
@pytest.mark.parametrize("workspace", [1 << 28, 1 << 30])
def test_scratch_on_the_gpu(workspace):
    """Peak memory beyond inputs and outputs: the workspace and 64 MiB, or what one pass needs if that is less."""
    x = make_inputs((32768,), num_kv_heads=4, group=4, head_dim=128, dtype=torch.bfloat16, device="cuda")
    selection = random_selection(x.plan, 4)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    options = {"scale": x.scale, "workspace": workspace, "impl": "kvmajor"}
    o, _ = branches.attend_selected(*leaves, selection, x.plan, **options)
    for run in (
        lambda: branches.attend_selected(*leaves, selection, x.plan, **options),
        lambda: torch.autograd.grad(o, leaves, x.q.detach(), retain_graph=True),
    ):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = run()
        outputs = sum(t.numel() * t.element_size() for t in results)
        assert torch.cuda.max_memory_allocated() - before - outputs <= workspace + (96 << 20)
