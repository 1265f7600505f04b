"""Token by token or in chunks, with a cache, a layer gives what it gives for the whole text."""

from __future__ import annotations

import pytest
import torch

import nsattn
from nsattn.cache import CacheLengths, LayerCache
from nsattn.testing import assert_close

SIZES = [(8, 4, 16), (32, 16, 64), (12, 4, 32), (16, 16, 16)]  # l, d, B


def layer_of(sizes: tuple[int, int, int], dtype: torch.dtype = torch.float64, **kwargs) -> nsattn.NSAttention:
    l, d, B = sizes
    config = nsattn.NSAConfig(l, d, B, num_selected=3, window=20, local_blocks=1)
    layer = nsattn.NSAttention(48, 6, 2, kwargs.pop("head_dim", 8), config=config, dtype=dtype, **kwargs)
    torch.nn.init.normal_(layer.gate_proj.weight)
    return layer


def run(layer, x, chunks, mask=None, max_length=None, lengths=None, cache=None):
    """Outputs and selections of passes over `chunks` columns each."""
    lengths = CacheLengths(layer.config, max_length) if lengths is None else lengths
    cache = LayerCache() if cache is None else cache
    outs, picks, at = [], [], 0
    for num in chunks:
        part = slice(at, at + num)
        step = lengths.advance((len(x), num), x.device, None if mask is None else mask[:, part])
        out, picked = layer(x[:, part], cache=cache, step=step, return_selection=True)
        outs.append(out)
        picks.append(picked.unflatten(0, (len(x), num)))
        at += num
    return torch.cat(outs, dim=1), torch.cat(picks, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("separate_kv", [False, True])
def test_decoding_equals_one_pass(sizes, separate_kv):
    """200 single tokens over every boundary of compressed and selected blocks, after prefill in one go or in chunks."""
    layer = layer_of(sizes, compression="mlp", separate_kv=separate_kv)
    x = torch.randn(2, 275, 48, dtype=torch.float64)
    want, picked = layer(x, return_selection=True)
    for chunks, max_length in (([275], None), ([75, *[1] * 200], 275), ([7, 1, 33, 129, 5, 100], None)):
        out, selected = run(layer, x, chunks, max_length=max_length)
        torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
        assert torch.equal(selected.flatten(0, 1), picked)


@torch.no_grad()
@pytest.mark.parametrize("where", ["left", "right", "holes"])
def test_rows_have_lengths_of_their_own(where):
    """What a mask takes out is not there, in whatever chunks it comes; its outputs are zero."""
    layer, lengths = layer_of((8, 4, 16)), (60, 41, 0, 7)
    x, mask = torch.randn(4, 60, 48, dtype=torch.float64), torch.zeros(4, 60, dtype=torch.long)
    for row, n in enumerate(lengths):
        columns = {"left": range(60 - n, 60), "right": range(n), "holes": torch.randperm(60)[:n].tolist()}[where]
        mask[row, list(columns)] = 1
    # more tokens after the prompt, for each row at its own position
    x, mask = torch.cat([x, torch.randn(4, 30, 48).double()], 1), torch.nn.functional.pad(mask, (0, 30), value=1)
    for chunks in ([90], [60, *[1] * 30], [13, 20, 27, 11, 19]):
        out, picked = run(layer, x, chunks, mask)
        for row in range(4):
            real = mask[row] == 1
            want, selected = layer(x[row : row + 1, real], return_selection=True)
            torch.testing.assert_close(out[row, real], want[0], rtol=1e-12, atol=1e-12)
            assert torch.equal(picked[row, real], selected)
            assert not out[row, ~real].any()


@torch.no_grad()
def test_rows_can_be_chosen_and_forgotten():
    layer, lengths, cache = layer_of((8, 4, 16)), CacheLengths(nsattn.NSAConfig(8, 4, 16, 3, 20, 1, 1)), LayerCache()
    x, rows = torch.randn(3, 40, 48, dtype=torch.float64), torch.tensor([2, 0, 0, 1])
    for _ in range(2):
        run(layer, x, [33], lengths=lengths, cache=cache)
        lengths.select(rows)
        cache.select(rows)
        out, _ = run(layer, x[rows, 33:], [1] * 7, lengths=lengths, cache=cache)
        torch.testing.assert_close(out, layer(x)[rows, 33:], rtol=1e-12, atol=1e-12)
        lengths.reset()
        cache.reset()
        x, rows = torch.randn(4, 40, 48, dtype=torch.float64), torch.tensor([3, 0, 2, 1])


@pytest.mark.parametrize("max_length", [None, 300])
def test_inference_mode_can_end_or_begin_between_passes(max_length):
    """Before and after rows were chosen, and where buffers grow."""
    layer, x, rows = layer_of((8, 4, 16)), torch.randn(2, 290, 48, dtype=torch.float64), torch.tensor([1, 0])
    lengths, cache, outs, at = CacheLengths(layer.config, max_length), LayerCache(), [], 0
    for i, num in enumerate((20, 1, 5, 1, 260, 1, 2)):
        with torch.inference_mode(i % 2 == 0), torch.no_grad():
            out, _ = run(layer, x[:, at : at + num], [num], lengths=lengths, cache=cache)
            outs.append(out)
            at += num
            if i % 3 == 2:
                lengths.select(rows)
                cache.select(rows)
                x, outs = x[rows], [y[rows] for y in outs]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(outs, dim=1), layer(x), rtol=1e-12, atol=1e-12)
    lengths.reset()


@torch.no_grad()
def test_growing_keeps_what_is_there():
    layer = layer_of((32, 16, 64), torch.float32)
    x, cache, lengths = torch.randn(1, 560, 48), LayerCache(), CacheLengths(layer.config)
    out, _ = run(layer, x, [250, 1, 1, 1, 1, 1, 1, 254, 1, 1, 48], lengths=lengths, cache=cache)
    want = layer(x)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    rows = {name: buffer.shape[1] for name, buffer in cache.buffers.items()}
    assert rows["k"] == rows["v"] == lengths.size == 768 and rows["k_cmp"] == (767 - 32) // 16 + 2


@torch.no_grad()
def test_old_blocks_are_not_made_again(monkeypatch):
    """A block is made in the pass that brings its last token; a decoding step makes the one that may end with it."""
    layer, made = layer_of((8, 4, 16)), []
    compress = nsattn.api.compress

    def spy(x, *, plan, **kwargs):
        made.append((int(plan.cu_cmp[-1]), plan.total_cmp, len(x)))
        return compress(x, plan=plan, **kwargs)

    monkeypatch.setattr(nsattn.api, "compress", spy)
    run(layer, torch.randn(1, 60, 48, dtype=torch.float64), [21, *[1] * 39])
    keys = made[::2]
    assert keys[0][0] == 4 and keys[1:] == [(1, 1, 8)] * 39


@torch.no_grad()
def test_decoding_does_not_look_at_data(monkeypatch):
    """Metadata of a step comes without reading a tensor, so shapes do not depend on lengths and nothing waits."""
    layer, x = layer_of((8, 4, 16)), torch.randn(2, 40, 48, dtype=torch.float64)
    lengths, mask = CacheLengths(layer.config), torch.ones(2, 40)
    lengths.advance((2, 39), x.device, mask[:, :39])

    # Only on a CPU, where nothing waits, does a plan look at its lengths.
    monkeypatch.setattr(nsattn.plan, "_max_length", lambda name, cu, total, longest: min(total, longest))

    def refuse(*args):
        raise AssertionError("a tensor was read")

    for name in ("item", "tolist", "__bool__", "__int__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    lengths.advance((2, 1), x.device, mask[:, 39:])


@torch.no_grad()
def test_kernels_read_the_cache():
    """The same with the kernels, interpreted where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, head_dim = (torch.bfloat16, 64) if device == "cuda" else (torch.float32, 16)
    layer = layer_of((8, 4, 16), dtype, head_dim=head_dim, device=device)
    x = torch.randn(2, 26, 48, device=device, dtype=dtype)
    mask = torch.ones(2, 26, device=device)
    mask[1, :9] = 0
    layer.impl = "reference"
    low, _ = run(layer, x, [26], mask)
    layer.double()
    want, _ = run(layer, x.double(), [26], mask)
    layer.to(dtype)
    layer.impl = "triton"
    out, _ = run(layer, x, [22, 1, 1, 2], mask)
    assert_close(out, want, low)


def test_cache_refusals():
    layer, x = layer_of((8, 4, 16)), torch.randn(2, 20, 48, dtype=torch.float64)
    lengths, cache = CacheLengths(layer.config, max_length=30), LayerCache()
    with pytest.raises(NotImplementedError, match="a cache holds no gradients"):
        lengths.advance((2, 20), x.device)
    with pytest.raises(TypeError, match="config must be an NSAConfig"):
        CacheLengths((8, 4, 16))
    with pytest.raises(ValueError, match="max_length must be"):
        CacheLengths(layer.config, 0)
    with torch.no_grad():
        with pytest.raises(ValueError, match="mask must be"):
            lengths.advance((3, 20), x.device, torch.ones(2, 19))
        step = lengths.advance((2, 20), x.device)
        layer(x, cache=cache, step=step)
        with pytest.raises(ValueError, match="step must start after the 20 columns"):
            layer(x, cache=cache, step=step)
        with pytest.raises(ValueError, match="at most max_length = 30 columns, got 20 and 11 more"):
            lengths.advance((2, 11), x.device)
        with pytest.raises(ValueError, match="the batch must have 2 rows"):
            lengths.advance((3, 1), x.device)
        cu = torch.tensor([0, 20], dtype=torch.int32)
        for kwargs in ({"cache": cache}, {"step": step}, {"cache": cache, "step": step, "cu_seqlens": cu}):
            with pytest.raises(ValueError, match="a cache must come with the step"):
                layer(x, **kwargs)
        with pytest.raises(ValueError, match="of the step = .2, 20, 48., got .5, 8, 48."):
            layer(x.reshape(5, 8, 48), cache=LayerCache(), step=step)
        other = CacheLengths(nsattn.NSAConfig(8, 4, 16, 2, 1, 1, 1)).advance((2, 20), x.device)
        with pytest.raises(ValueError, match="plan must be made for the config of the call"):
            layer(x, cache=LayerCache(), step=other)
