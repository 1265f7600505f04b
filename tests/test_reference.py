"""The definition: `kernels/reference.py` against the loops of `oracle.py`, gradcheck, identities between equations."""

from dataclasses import replace

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import nsattn
from nsattn import NSAConfig
from nsattn.kernels import reference
from nsattn.plan import rows_of
from nsattn.testing import hostile_selection, make_compression, make_inputs, random_selection

METHODS = ("mean", "linear", "mlp", "gated")
SMALL = NSAConfig(cmp_block=8, cmp_stride=4, slc_block=16, num_selected=3, window=5)
CONFIGS = {
    "overlap": SMALL,
    "no overlap, nothing forced": NSAConfig(4, 4, 16, 1, 1, init_blocks=0, local_blocks=0),
    "long blocks, two first": NSAConfig(16, 2, 16, 4, 64, init_blocks=2, local_blocks=1),
    "l > B, fine stride": NSAConfig(32, 4, 16, 2, 17, init_blocks=0, local_blocks=1),
    "paper": NSAConfig(),
}
# (query lengths, key lengths): packed with empty sequences and single tokens; one sequence a token longer than a block;
# fewer queries than keys (cached keys); more queries than keys and keys without queries.
LENGTHS = {
    "packed": ([0, 7, 0, 1, 40], None),
    "one": ([65], None),
    "cached": ([5, 1, 0, 9], [23, 17, 6, 33]),
    "too many queries": ([12, 3, 20], [7, 0, 20]),
}
SHAPES = ((2, 1, 4, 4), (2, 2, 4, 6), (1, 3, 5, 2))  # Hkv, G, D, Dv


def _inputs(config, lengths, shape=SHAPES[1], slack=3):
    heads, group, dim, v_dim = shape
    lengths_q, lengths_k = LENGTHS[lengths]
    x = make_inputs(lengths_q, lengths_k=lengths_k, num_kv_heads=heads, group=group, head_dim=dim, v_head_dim=v_dim,
                    config=config, dtype=torch.float64, slack=slack)
    return x, lengths_q, lengths_k or lengths_q


def _agree(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
every_lengths = pytest.mark.parametrize("lengths", LENGTHS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


# Against the oracle.


@every_config
@every_lengths
@pytest.mark.parametrize("method", METHODS)
def test_compress(config, lengths, method):
    x, _, lengths_k = _inputs(config, lengths)
    params = make_compression(method, 2, 4, 3, config, hidden=5, dtype=torch.float64)
    want = oracle.compress(x.k, params, lengths_k, x.plan.total_cmp, config, method)
    _agree(reference.compress(x.k, params, x.plan, method=method), want)


@every_config
@every_lengths
def test_branches(config, lengths):
    x, lengths_q, lengths_k = _inputs(config, lengths)
    sizes = (lengths_q, lengths_k, config, x.scale)
    o_cmp, lse_cmp = reference.attend_compressed(x.q, x.k_cmp, x.v_cmp, x.plan, scale=x.scale)
    _agree((o_cmp, lse_cmp), oracle.attend_compressed(x.q, x.k_cmp, x.v_cmp, *sizes))
    block_idx = reference.select_blocks(x.q, x.k_cmp, lse_cmp, x.plan, scale=x.scale)
    assert torch.equal(block_idx, oracle.select_blocks(x.q, x.k_cmp, *sizes))
    got = reference.attend_selected(x.q, x.k, x.v, block_idx, x.plan, scale=x.scale)
    _agree(got, oracle.attend_selected(x.q, x.k, x.v, block_idx, *sizes))
    got = reference.attend_window(x.q, x.k_win, x.v_win, x.plan, scale=x.scale)
    _agree(got, oracle.attend_window(x.q, x.k_win, x.v_win, *sizes))


@every_shape
def test_groups_and_value_dims(shape):
    x, lengths_q, lengths_k = _inputs(SMALL, "packed", shape)
    sizes = (lengths_q, lengths_k, SMALL, x.scale)
    o_cmp, lse_cmp = oracle.attend_compressed(x.q, x.k_cmp, x.v_cmp, *sizes)
    block_idx = oracle.select_blocks(x.q, x.k_cmp, *sizes)
    o_slc, lse_slc = oracle.attend_selected(x.q, x.k, x.v, block_idx, *sizes)
    o_win, lse_win = oracle.attend_window(x.q, x.k_win, x.v_win, *sizes)
    o = oracle.combine(o_cmp, o_slc, o_win, x.gates)
    got = nsattn.nsa_attention(x.q, x.k, x.v, gates=x.gates, k_cmp=x.k_cmp, v_cmp=x.v_cmp, k_win=x.k_win,
                               v_win=x.v_win, plan=x.plan, return_lse=True, impl="reference")
    _agree(tuple(got[:4]), (o, lse_cmp, lse_slc, lse_win))
    assert torch.equal(got.block_idx, block_idx)


@every_config
@every_lengths
def test_block_scores(config, lengths):
    x, lengths_q, lengths_k = _inputs(config, lengths, slack=0)
    _, lse_cmp = reference.attend_compressed(x.q, x.k_cmp, x.v_cmp, x.plan, scale=x.scale)
    scores = reference.block_scores(x.q, x.k_cmp, lse_cmp, x.plan, scale=x.scale)  # [n, h, q, b]
    seq, index = rows_of(x.plan.cu_q, x.plan.total_q)
    importance = oracle.block_importance(x.q, x.k_cmp, lengths_q, lengths_k, config, x.scale)
    for row, heads in enumerate(importance):
        for h_kv, want in enumerate(heads):
            got = scores[seq[row], h_kv, index[row], : len(want)]
            _agree(got, torch.tensor(want, dtype=torch.float64))


@every_lengths
def test_hostile_selection_is_a_set_of_what_exists(lengths):
    x, lengths_q, lengths_k = _inputs(replace(SMALL, num_selected=6), lengths)
    block_idx = hostile_selection(x.plan, 2)
    got = reference.attend_selected(x.q, x.k, x.v, block_idx, x.plan, scale=x.scale)
    _agree(got, oracle.attend_selected(x.q, x.k, x.v, block_idx, lengths_q, lengths_k, x.plan.config, x.scale))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_dtypes(dtype):
    x, _, _ = _inputs(SMALL, "packed")
    x = x.to(dtype)
    got = nsattn.nsa_attention(x.q, x.k, x.v, gates=x.gates, plan=x.plan, impl="reference", return_lse=True)
    assert got.o.dtype == dtype
    assert {got.lse_cmp.dtype, got.lse_slc.dtype, got.lse_win.dtype} == {torch.float32}


# Gradients.


def _gradcheck(function, *tensors):
    """gradcheck of every output along random directions; entries that are -inf by definition are left out."""

    def finite(*args):
        outputs = function(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(torch.where(o.isfinite(), o, 0.0) for o in outputs)

    assert gradcheck(finite, [x.detach().clone().requires_grad_() for x in tensors], fast_mode=True)


def _tiny(lengths_q=(3, 0, 18), lengths_k=None):
    return make_inputs(lengths_q, lengths_k=lengths_k, num_kv_heads=1, group=2, head_dim=3, v_head_dim=2, slack=1,
                       config=NSAConfig(4, 2, 16, 1, 4, init_blocks=0, local_blocks=1), dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck_compress(method):
    x = _tiny()
    params = make_compression(method, 1, 3, 2, x.plan.config, hidden=3, dtype=torch.float64)
    _gradcheck(lambda k, *p: reference.compress(k, p, x.plan, method=method), x.k, *params)


@pytest.mark.parametrize("lengths", (((3, 0, 18), None), ((2, 5), (19, 3))), ids=("packed", "cached"))
def test_gradcheck_attention(lengths):
    x = _tiny(*lengths)
    block_idx = random_selection(x.plan, 1)
    _gradcheck(lambda *a: reference.attend_compressed(*a, x.plan, scale=x.scale), x.q, x.k_cmp, x.v_cmp)
    _gradcheck(lambda *a: reference.attend_selected(*a, block_idx, x.plan, scale=x.scale), x.q, x.k, x.v)
    _gradcheck(lambda *a: reference.attend_window(*a, x.plan, scale=x.scale), x.q, x.k_win, x.v_win)


def test_gradcheck_combine():
    o_cmp, o_slc, o_win = torch.randn(3, 4, 2, 3, dtype=torch.float64)
    _gradcheck(reference.combine, o_cmp, o_slc, o_win, torch.rand(4, 2, 3, dtype=torch.float64))


# Identities between equations.


def _dense(x, k, v):
    """Causal attention of one sequence by torch itself."""
    q, k, v = (y.transpose(0, 1) for y in (x.q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)


def test_all_blocks_selected_is_dense_attention():
    x, _, _ = _inputs(NSAConfig(num_selected=2, init_blocks=0), "one", slack=0)
    _, lse_cmp = reference.attend_compressed(x.q, x.k_cmp, x.v_cmp, x.plan, scale=x.scale)
    block_idx = reference.select_blocks(x.q, x.k_cmp, lse_cmp, x.plan, scale=x.scale)
    o, _ = reference.attend_selected(x.q, x.k, x.v, block_idx, x.plan, scale=x.scale)
    _agree(o, _dense(x, x.k, x.v))


@pytest.mark.parametrize("window", (65, 66, 1000))
def test_a_window_over_everything_is_dense_attention(window):
    x, _, _ = _inputs(replace(SMALL, window=window), "one", slack=0)
    o, _ = reference.attend_window(x.q, x.k_win, x.v_win, x.plan, scale=x.scale)
    _agree(o, _dense(x, x.k_win, x.v_win))


def test_a_window_of_one_returns_the_values():
    x, _, _ = _inputs(replace(SMALL, window=1), "one", slack=0)
    o, lse = reference.attend_window(x.q, x.k_win, x.v_win, x.plan, scale=x.scale)
    _agree(o, x.v_win.repeat_interleave(2, dim=1))
    _agree(lse, (x.q * x.k_win.repeat_interleave(2, dim=1)).sum(-1) * x.scale)


@pytest.mark.parametrize("branch", range(3))
def test_one_hot_gates_give_the_branch(branch):
    x, _, _ = _inputs(SMALL, "packed")
    gates = torch.zeros_like(x.gates)
    gates[..., branch] = 1
    o_cmp, lse_cmp = reference.attend_compressed(x.q, x.k_cmp, x.v_cmp, x.plan, scale=x.scale)
    block_idx = reference.select_blocks(x.q, x.k_cmp, lse_cmp, x.plan, scale=x.scale)
    o_slc, _ = reference.attend_selected(x.q, x.k, x.v, block_idx, x.plan, scale=x.scale)
    o_win, _ = reference.attend_window(x.q, x.k, x.v, x.plan, scale=x.scale)
    got = nsattn.nsa_attention(x.q, x.k, x.v, gates=gates, k_cmp=x.k_cmp, v_cmp=x.v_cmp, plan=x.plan, impl="reference")
    assert torch.equal(got, (o_cmp, o_slc, o_win)[branch])


def test_compressions_that_are_means():
    x, _, _ = _inputs(SMALL, "packed")
    mean = reference.compress(x.k, (), x.plan, method="mean")
    l = SMALL.cmp_block
    weight = (torch.eye(4, dtype=torch.float64) / l).expand(2, l, 4, 4)
    _agree(reference.compress(x.k, (weight, x.k.new_zeros(2, 4)), x.plan, method="linear"), mean)
    _agree(reference.compress(x.k, (x.k.new_zeros(2, 4), x.k.new_zeros(2, l)), x.plan, method="gated"), mean)


def test_ties_go_to_the_lower_index():
    """With scores of exactly 1 everywhere, blocks behind the first tie; those not forced are taken from the left."""
    x, _, _ = _inputs(replace(SMALL, num_selected=4), "one", slack=0)
    block_idx = reference.select_blocks(x.q * 0, x.k_cmp, x.q.new_zeros(65, 4), x.plan, scale=1.0)
    assert block_idx[64].tolist() == [[0, 1, 3, 4]] * 2


def test_eq9_weights():
    """l=32 d=16 B=64: compressed blocks at offsets -1..3 of a block's first stride count 1, 2, 2, 2, 1 times."""
    config = NSAConfig()
    x = make_inputs([256], num_kv_heads=1, group=1, head_dim=1, config=config, dtype=torch.float64)
    for hit in range(x.plan.total_cmp):
        k_cmp = torch.full_like(x.k_cmp, -1e4)  # exp(-1e4) is exactly 0
        k_cmp[hit] = 0
        scores = reference.block_scores(torch.ones_like(x.q), k_cmp, x.q.new_zeros(256, 1), x.plan, scale=1.0)
        weights = {-1: 1.0, 0: 2.0, 1: 2.0, 2: 2.0, 3: 1.0}
        assert scores[0, 0, 255].tolist() == [weights.get(hit - 4 * j, 0.0) for j in range(4)]


@every_config
@every_lengths
def test_selections_are_well_formed(config, lengths):
    """Ascending, -1 last, nothing from the future, forced blocks present, everything when there are at most N."""
    x, lengths_q, lengths_k = _inputs(config, lengths)
    _, lse_cmp = reference.attend_compressed(x.q, x.k_cmp, x.v_cmp, x.plan, scale=x.scale)
    chosen = reference.select_blocks(x.q, x.k_cmp, lse_cmp, x.plan, scale=x.scale)
    for block_idx in (chosen, random_selection(x.plan, 2)):
        nsattn.check_selection(block_idx, x.plan)
        positions = [t for n, s in zip(lengths_q, lengths_k, strict=True) for t in range(s - n, s)]
        for row in range(x.plan.total_q):
            t = positions[row] if row < len(positions) else -1
            visible = t // config.slc_block + 1 if t >= 0 else 0
            forced = {*range(min(config.init_blocks, visible)), *range(max(0, visible - config.local_blocks), visible)}
            for slots in block_idx[row].tolist():
                picked = [j for j in slots if j >= 0]
                assert slots == sorted(picked) + [-1] * (config.num_selected - len(picked))
                assert len(picked) == min(visible, config.num_selected)
                assert forced <= set(picked)
