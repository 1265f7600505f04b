"""Random shapes and hostile selections through the real kernels, and offsets beyond 2^31 elements."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsattn import NSAConfig
from nsattn.verify import Case, check

GPU = torch.cuda.is_available()
ROOT = Path(__file__).parent.parent
OPERATIONS = [("compress", "triton"), ("attend_compressed", "triton"), ("select_blocks", "triton"),
              ("attend_selected", "kvmajor"), ("attend_selected", "qmajor"), ("attend_window", "triton")]


@st.composite
def configs(draw):
    stride = draw(st.sampled_from([4, 8, 16]))
    initial, local = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    return NSAConfig(
        cmp_block=stride * draw(st.integers(1, 3)),
        cmp_stride=stride,
        slc_block=draw(st.sampled_from([16, 32, 64])),
        num_selected=draw(st.integers(max(1, initial + local), 6)),
        window=draw(st.integers(1, 40)),
        init_blocks=initial,
        local_blocks=local,
    )


@st.composite
def cases(draw):
    longest = 700 if GPU else 24
    lengths = draw(st.lists(st.integers(0, longest), min_size=1, max_size=4))
    chunked = draw(st.booleans())
    lengths_k = [draw(st.integers(0, longest + 20)) for _ in lengths] if chunked else None
    dims = [32, 64, 80, 96, 128] if GPU else [16, 32]
    return Case(
        "fuzz",
        lengths=tuple(lengths),
        lengths_k=lengths_k and tuple(lengths_k),
        num_kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 9 if GPU else 3)),
        head_dim=draw(st.sampled_from(dims)),
        v_head_dim=draw(st.sampled_from(dims)),
        config=draw(configs()),
        slack=draw(st.integers(0, 3)),
        hostile=draw(st.booleans()),
        workspace=draw(st.sampled_from([1 << 14, 1 << 30])),
    )


@pytest.mark.timeout(1200 if GPU else 300)  # on a GPU every case compiles its kernels
@pytest.mark.parametrize(("operation", "impl"), OPERATIONS)
def test_random_cases(operation, impl):
    examples = 40 if GPU else 2 if impl == "qmajor" else 6  # qmajor interprets a program per token: slow

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))
    @given(cases())
    def run(case):
        dtype = torch.bfloat16 if GPU else torch.float32
        wrong = [f"{n}: {v}" for n, v in check(operation, impl, case, dtype, "cuda" if GPU else "cpu") if not v.ok]
        assert not wrong, f"{case}\n" + "\n".join(wrong)

    run()


FAR_ROWS = """
import torch, nsattn
from nsattn import NSAConfig, branches
from nsattn.plan import make_plan
from nsattn.testing import random_selection

# Rows 2^28 elements apart, in memory that is reserved but never touched: row 8 starts beyond 2^31.
def spread(x):
    store = torch.empty((x.shape[0] - 1) * 2**28 + x[0].numel(), dtype=x.dtype)
    far = store.as_strided(x.shape, (2**28, x.shape[2], 1))
    return far.copy_(x)

config = NSAConfig(cmp_block=4, cmp_stride=2, slc_block=16, num_selected=2, window=5, init_blocks=1, local_blocks=1)
T = 20
cu = torch.tensor([0, T], dtype=torch.int32)
plan = make_plan(cu, T, config=config)
q, k, v = (torch.randn(T, h, 16, dtype=torch.float16) for h in (2, 1, 1))
k_cmp, v_cmp = (torch.randn(plan.total_cmp + 0, 1, 16, dtype=torch.float16) for _ in range(2))
idx = random_selection(plan, 1)
operation, impl = {operation!r}, {impl!r}

def run(q, k, v):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    if operation == "compress":
        y = branches.compress(k, (), plan, method="mean", impl=impl)
        return [y, *torch.autograd.grad(y.float().sum(), [k])]
    extra = (idx,) if operation == "attend_selected" else ()
    options = {{"workspace": 1 << 30}}
    o, lse = getattr(branches, operation)(q, k, v, *extra, plan, scale=0.25, impl=impl, **options)
    return [o, lse, *torch.autograd.grad(o.float().sum(), [q, k, v])]

inputs = (q, k_cmp, v_cmp) if operation == "attend_compressed" else (q, k, v)
near, far = run(*inputs), run(*(spread(x) for x in inputs))
assert all(torch.equal(a, b) for a, b in zip(near, far))
print("equal")
"""


@pytest.mark.skipif(GPU, reason="needs memory that is reserved but not touched; test_kernels has the real sizes")
@pytest.mark.parametrize(("operation", "impl"), [c for c in OPERATIONS if c[0] != "select_blocks"])
def test_offsets_beyond_2_31(operation, impl):
    """In a process of its own: 32-bit arithmetic would read unmapped memory and end it."""
    code = FAR_ROWS.format(operation=operation, impl=impl)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-2000:]
