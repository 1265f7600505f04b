"""`nsa_decode`: kernels against the reference are in test_kernels.py; here what else it promises."""

from __future__ import annotations

import pytest
import torch

import nsattn
from nsattn import NSAConfig, branches
from nsattn.testing import CacheInputs, make_cache

GPU = torch.cuda.is_available()
DEVICE, DTYPE, DIM = ("cuda", torch.bfloat16, 64) if GPU else ("cpu", torch.float32, 16)
CONFIG = NSAConfig() if GPU else NSAConfig(8, 4, 16, 3, 20, 1, 1)
LENGTHS = (3000, 513, 64, 1) if GPU else (150, 33, 16, 1)


def cache(lengths=LENGTHS, num_new=1, room=0, paged=False, dtype=DTYPE, **kwargs) -> CacheInputs:
    sizes = {"num_kv_heads": 2, "group": 3, "head_dim": DIM, "config": CONFIG, "dtype": dtype, "device": DEVICE}
    sizes |= kwargs
    return make_cache(lengths, num_new, room=room or max(lengths), paged=paged, **sizes)


def decode(x: CacheInputs, impl: str, **kwargs):
    return nsattn.nsa_decode(
        x.q, x.k, x.v, k_cmp=x.k_cmp, v_cmp=x.v_cmp, gates=x.gates, cache_seqlens=x.cache_seqlens,
        block_table=x.block_table, k_win=x.k_win, v_win=x.v_win, config=x.config, return_lse=True, impl=impl, **kwargs,
    )


@pytest.mark.parametrize("paged", [False, True])
def test_reference_is_nsa_attention(paged):
    """Each sequence alone, through the packed operation with cached keys."""
    x = cache(num_new=2, paged=paged, lengths=(*LENGTHS[:3], 2), dtype=torch.float64)
    got = decode(x, "reference")
    _, *rows = nsattn.kernels.reference.pack_cache(*x)
    q, k, v, k_cmp, v_cmp, gates, k_win, v_win = (t.unflatten(0, (len(LENGTHS), -1)) for t in rows)
    for b, length in enumerate(x.cache_seqlens.tolist()):
        count = nsattn.plan.num_compressed(length, CONFIG)
        cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32, device=DEVICE) for n in (2, length))
        plan = nsattn.make_plan(cu_q, 2, config=CONFIG, cu_seqlens_k=cu_k, total_k=length)
        filled = torch.nn.functional.pad(k_cmp[b, :count], (0, 0, 0, 0, 0, plan.total_cmp - count))
        filled_v = torch.nn.functional.pad(v_cmp[b, :count], (0, 0, 0, 0, 0, plan.total_cmp - count))
        want = nsattn.nsa_attention(
            q[b], k[b, :length], v[b, :length], gates=gates[b], k_cmp=filled, v_cmp=filled_v, k_win=k_win[b, :length],
            v_win=v_win[b, :length], plan=plan, return_lse=True, impl="reference",
        )
        for name, y in want._asdict().items():
            torch.testing.assert_close(getattr(got, name)[b], y, rtol=1e-12, atol=1e-12)


def test_results_depend_on_nothing_else():
    """The same bits again, in another batch, with more room, in pages, and where scratch makes tokens take turns."""
    x = cache(num_new=2)
    first = decode(x, "triton")
    again = decode(x, "triton")
    turns = decode(x, "triton", workspace=1 << 20)
    roomy = decode(cache(num_new=2, room=max(LENGTHS) * 3)._replace(q=x.q, gates=x.gates, **_filled(x, 3)), "triton")
    rows = torch.tensor([2, 0], device=DEVICE)
    fewer = decode(CacheInputs(*(t[rows] for t in x[:9]), None, x.config), "triton")
    paged = decode(_in_pages(x), "triton")
    for name, y in first._asdict().items():
        for other in (again, turns, roomy, paged):
            assert torch.equal(getattr(other, name), y), name
        assert torch.equal(getattr(fewer, name), y[rows]), name


def _filled(x: CacheInputs, times: int) -> dict[str, torch.Tensor]:
    """The caches of x with more room behind."""
    names = ("k", "v", "k_cmp", "v_cmp", "k_win", "v_win")
    return {n: torch.cat([getattr(x, n)] * times, dim=1) for n in names}


def _in_pages(x: CacheInputs) -> CacheInputs:
    """The caches of x as a pool of pages, the last sequence first."""
    batch, blocks = len(x.q), x.k.shape[1] // x.config.slc_block
    table = torch.arange(batch * blocks, dtype=torch.int32, device=DEVICE).view(batch, blocks).flip(0).contiguous()

    def pool(t: torch.Tensor) -> torch.Tensor:
        return t.flip(0).unflatten(1, (blocks, -1)).flatten(0, 1)

    names = ("k", "v", "k_cmp", "v_cmp", "k_win", "v_win")
    return x._replace(block_table=table, **{n: pool(getattr(x, n)) for n in names})


def test_lengths_and_pages_out_of_range_are_harmless():
    """Lengths beyond the room count as the room, pages outside the pool as its ends: no crash, no read outside."""
    x = cache(lengths=(LENGTHS[0] // 16 * 16,))
    want = decode(x, "triton")
    got = decode(x._replace(cache_seqlens=x.cache_seqlens + 10**9), "triton")
    assert torch.equal(got.o, decode(x._replace(cache_seqlens=x.cache_seqlens * 0 + x.k.shape[1]), "triton").o)
    assert decode(x._replace(cache_seqlens=x.cache_seqlens * 0 - 5), "triton").o.eq(0).all()
    y = cache(lengths=(LENGTHS[0] // 16 * 16,), paged=True)
    finite = y._replace(**{n: getattr(y, n).nan_to_num() for n in ("k", "v", "k_cmp", "v_cmp", "k_win", "v_win")})
    hostile = finite.block_table.clone()
    hostile[0, ::2] = torch.iinfo(torch.int32).max
    hostile[0, 1::4] = torch.iinfo(torch.int32).min
    clamped = hostile.clamp(0, len(y.k) - 1)
    a, b = (decode(finite._replace(block_table=t), "triton") for t in (hostile, clamped))
    assert torch.equal(a.o, b.o) and got.o.shape == want.o.shape


def test_op_and_compile():
    """The custom op passes torch's own checks, and a compiled call gives the same."""
    x = cache(lengths=LENGTHS[1:], paged=True)
    if GPU or nsattn.dispatch.interpreting():
        args = (*x[:10], [8, 4, 16, 3, 20, 1, 1] if not GPU else list(vars(CONFIG).values()), 0.25, 1 << 30, "triton")
        torch.library.opcheck(branches._nsa_decode, args, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(decode, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, "reference").o, decode(x, "reference").o)


@pytest.mark.gpu
def test_runs_in_a_cuda_graph():
    """A captured step follows lengths and contents of the cache, which change in place."""
    x, y = cache(lengths=(2000, 700)), cache(lengths=(2001, 650), seed=1)
    o = decode(x, "triton").o  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = decode(x, "triton").o
    for old, new in zip(x[:9], y[:9], strict=True):
        old.copy_(new)
    graph.replay()
    assert torch.equal(o, decode(y, "triton").o)


def test_refusals():
    x = cache()

    def call(**kwargs):
        given = x._asdict() | {"block_table": None} | kwargs
        q, k, v = (given.pop(n) for n in "qkv")
        return nsattn.nsa_decode(q, k, v, **given)

    call()
    cases = [
        (ValueError, "k_win and v_win must be given together", {"k_win": None}),
        (ValueError, r"q must be \[Bsz, S, Hq, D\]", {"q": x.q[0]}),
        (TypeError, "k_cmp must be a torch.Tensor", {"k_cmp": None}),
        (ValueError, "v must be .*rows, Hkv, D.*got shape", {"v": x.v[0]}),
        (ValueError, "v must be .* = ", {"v": x.v[:, :-1]}),
        (ValueError, "k_win must be .* = ", {"k_win": x.k_win[:, :-1]}),
        (ValueError, "query heads must be a multiple", {"q": x.q[:, :, :5], "gates": x.gates[:, :, :5]}),
        (ValueError, "k must have the head dim of q", {"q": x.q[..., :8]}),
        (ValueError, "k_cmp must have room for the", {"k_cmp": x.k_cmp[:, :3], "v_cmp": x.v_cmp[:, :3]}),
        (TypeError, "v must have the dtype of q", {"v": x.v.half() if not GPU else x.v.float()}),
        (TypeError, "cache_seqlens must be int32", {"cache_seqlens": x.cache_seqlens.long()}),
        (ValueError, "cache_seqlens must have the 4 rows", {"cache_seqlens": x.cache_seqlens[:2]}),
        (ValueError, "cache_seqlens must be on the device", {"cache_seqlens": x.cache_seqlens.to("meta")}),
        (ValueError, "cache_seqlens must be contiguous", {"cache_seqlens": x.cache_seqlens.repeat(2)[::2]}),
        (ValueError, r"block_table must be int32 \[Bsz, pages", {"block_table": x.cache_seqlens}),
        (ValueError, r"k must be \[pages, slc_block, Hkv", {"block_table": x.cache_seqlens[:, None]}),
        (ValueError, "gates must be", {"gates": x.gates[..., :2]}),
        (ValueError, "workspace must be", {"workspace": 5}),
        (TypeError, "config must be an NSAConfig", {"config": 64}),
        (NotImplementedError, "nsa_decode has no gradient", {"q": x.q.clone().requires_grad_()}),
    ]
    for error, match, kwargs in cases:
        with pytest.raises(error, match=match):
            call(**kwargs)
