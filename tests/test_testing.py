"""The error rule itself: it passes rounding and fails everything else."""

import pytest
import torch

from nsattn.testing import assert_close, compare, compare_selections, make_inputs, random_selection
from nsattn.verify import Case, _runner

LOW = (torch.bfloat16, torch.float16, torch.float32)


def _golden():
    return torch.randn(64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", LOW)
def test_rounding_passes(dtype):
    golden = _golden()
    low = golden.to(dtype)
    assert compare(low, golden, low).ok


@pytest.mark.parametrize("dtype", LOW)
def test_one_wrong_element_fails(dtype):
    golden = _golden()
    low, wrong = golden.to(dtype), golden.to(dtype)
    wrong[3, 5] += 0.1
    assert not compare(wrong, golden, low).ok
    with pytest.raises(AssertionError, match=r"o \(64, 32\)"):
        assert_close(wrong, golden, low, "o")


@pytest.mark.parametrize("dtype", LOW)
def test_a_small_error_everywhere_fails(dtype):
    """Within twice the largest error of a bad low-precision run, but the RMS limit holds."""
    golden = _golden()
    low = golden.to(dtype)
    low[0, 0] += 1.0
    assert not compare((golden * 1.02).to(dtype), golden, low).ok


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_nan_and_infinity_fail(value):
    golden = _golden()
    low, wrong = golden.float(), golden.float()
    wrong[1, 1] = value
    assert not compare(wrong, golden, low).ok
    assert not compare(low, wrong.double(), low).ok
    assert not compare(low, golden, wrong).ok


def test_lse_of_rows_that_see_nothing():
    golden = _golden()
    golden[:2] = float("-inf")
    assert compare(golden.float(), golden, golden.float()).ok
    wrong = golden.float()
    wrong[0, 0] = -1e30
    assert not compare(wrong, golden, golden.float()).ok


def test_shapes():
    golden = _golden()
    assert not compare(golden[:1].float(), golden, golden.float()).ok
    assert compare(golden[:0].float(), golden[:0], golden[:0].float()).ok


def test_zero_but_for_rounding():
    golden = torch.full((8,), 1e-17, dtype=torch.float64)
    zero = torch.zeros(8)
    assert compare(zero + 1e-9, golden, zero).ok
    assert not compare(zero + 1e-3, golden, zero).ok


def test_few_rows_are_judged_by_the_low_run():
    """One row whose sum cancels: as far off as the low run is fine, three times as far is not; many rows are."""
    few = torch.zeros(40, 8, dtype=torch.float64)
    few[:2] = 1.0
    many = torch.ones(40, 8, dtype=torch.float64)
    off = {step: torch.where(few > 0, 1.0 + step, 0.0).bfloat16() for step in (0.008, 0.016, 0.03)}
    assert compare(off[0.016], few, off[0.008], dtype=torch.bfloat16).ok
    assert not compare(off[0.03], few, off[0.008], dtype=torch.bfloat16).ok
    assert not compare((many + 0.016).bfloat16(), many, (many + 0.008).bfloat16()).ok


def test_compare_selections():
    want = torch.tensor([[[0, 2, 5]], [[0, 1, -1]]], dtype=torch.int32)
    scores = torch.tensor([1.0, 0.5, 0.5, 0.498, 0.3, 0.9]).expand(2, 1, 6)
    assert compare_selections(want, want, scores).ok

    def with_first_row(*row):
        got = want.clone()
        got[0, 0] = torch.tensor(row)
        return got

    near, far = with_first_row(0, 3, 5), with_first_row(0, 4, 5)
    assert compare_selections(near, want, scores).ok
    assert compare_selections(near, want, scores).different == 1
    assert not compare_selections(near, want).ok
    assert not compare_selections(far, want, scores).ok
    for bad in ((0, 5, 2), (0, 5, -1), (0, 5, 5), (0, 5, 6), (-2, 2, 5), (0, -1, 5)):
        assert not compare_selections(with_first_row(*bad), want, scores).ok, bad


def test_random_selection_is_seeded_and_random():
    plan = make_inputs([3000]).plan
    first, again, other = (random_selection(plan, 2, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first[2999].unique()) > 16


def test_gradients_may_have_the_error_of_the_output():
    """A backward that reads its rounded output passes for two keys, whose gradients nothing averages out. One that is
    off by twice as much more, without an output to show for it, mostly does not."""
    case = Case("two tokens", lengths=(2,), num_kv_heads=1, group=1, head_dim=64)
    failed = dict.fromkeys(("autograd's low run", "with the error", "twice as much more"), 0)
    for seed in range(40):
        x = make_inputs(case.lengths, num_kv_heads=1, group=1, head_dim=64, dtype=torch.bfloat16, seed=seed)
        run = _runner("attend_selected", x, case)
        golden = run(x.to(torch.float64), "reference", None)
        error = golden["o"].bfloat16() - golden["o"]
        plain, low = run(x, "reference", None), run(x, "reference", error)
        for name, times, judge in (("autograd's low run", 1, plain), ("with the error", 1, low),
                                   ("twice as much more", 3, low)):  # fmt: skip
            got = run(x.to(torch.float64), "reference", times * error)
            verdicts = [compare(got[n].to(judge[n].dtype), golden[n], judge[n], dtype=torch.bfloat16) for n in golden]
            failed[name] += not all(verdict.ok for verdict in verdicts)
    assert failed["autograd's low run"] > 4
    assert failed["with the error"] == 0
    assert failed["twice as much more"] > 10
