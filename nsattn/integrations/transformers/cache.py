"""`NSACache`: what an NSA model keeps between forward passes, as a `Cache` of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (  # pyright: ignore[reportMissingImports]
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    StaticLayer,
)

from nsattn.cache import CacheLengths, LayerCache, Step


class NSACacheLayer(LayerCache, CacheLayerMixin):
    """Cache of one NSA layer: `nsattn.cache.LayerCache`, filled by the attention module."""

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, max_length: int | None = None) -> None:
        CacheLayerMixin.__init__(self)
        LayerCache.__init__(self)
        self.max_length = max_length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("an NSA cache layer takes its sizes from the first forward pass. Run one.")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(
            "an NSA cache layer cannot be filled with keys and values alone, got a call of update(). Use it with the "
            "NSA model whose config it was made from."
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length if self.max_length is None else self.max_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1 if self.max_length is None else self.max_length

    def offload(self) -> None:
        raise NotImplementedError("an NSA cache cannot be offloaded. Use cache_implementation None or 'static'.")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.tails:
            rows = torch.arange(len(self.tails[0]), device=self.tails[0].device)
            self.select(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError(
                f"an NSA cache cannot go back, got crop({tokens_to_remove}): what unfinished compressed blocks need "
                "is kept for the last block only. Start again with an empty cache."
            )


class NSACache(Cache):
    """Cache of an NSA model: raw and compressed keys and values and the tail of the next blocks, in its NSA layers.

    `generate` makes one, and a forward pass with `use_cache=True` returns one as `past_key_values`. Pass it to the next
    forward pass with the new tokens, or to `generate` with the whole text.

    Args:
        config: of the model.
        max_length: columns to reserve at once, padding counted (`cache_implementation="static"`). Default: it grows.

    Rows of a batch have lengths of their own: tokens that the attention mask of their pass takes out are not kept, and
    a token's position is the number of tokens kept before it. Layers with dense attention have the stock cache layers.

    Memory: see `nsattn.cache`, for every NSA layer; a decoding step makes only the blocks that end with its token, and
    never waits for the device.

    Raises:
        TypeError: a config without NSA.
        NotImplementedError: `crop` (assisted decoding), offloading, gradients.
    """

    def __init__(self, config: Any, max_length: int | None = None) -> None:
        if not hasattr(config, "block_sizes"):
            raise TypeError(
                f"config must be that of an NSA model, got {type(config).__name__}. Use NSACache(model.config) after "
                "convert_to_nsa."
            )
        self.lengths = CacheLengths(config.block_sizes, max_length)
        sparse = set(config.sparse_layers)
        dense = DynamicLayer if max_length is None else lambda: StaticLayer(max_cache_len=max_length)
        num_layers = config.num_hidden_layers
        layers: list[Any] = [NSACacheLayer(max_length) if i in sparse else dense() for i in range(num_layers)]
        self.has_dense_layers = len(sparse) < len(layers)
        self.was_masked = False
        super().__init__(layers=layers)

    def advance(self, shape: Sequence[int], device: torch.device, mask: Tensor | None) -> Step:
        """Count the columns of a pass in. `mask` covers all so far, `[Bsz, old + new]`; None keeps all new ones.

        Raises:
            ValueError: see `CacheLengths.advance`; no mask where dense layers need the one of earlier passes.
        """
        self.was_masked |= mask is not None
        if mask is None and self.was_masked and self.has_dense_layers:
            raise ValueError(
                "attention_mask must be given again after a pass with one, got None: layers with dense attention do "
                "not keep it. Pass it for all columns so far."
            )
        return self.lengths.advance(shape, device, None if mask is None else mask[:, self.lengths.columns :])

    def replayed(self, num: int) -> None:
        """Count the tokens of `num` replays of a captured decoding step, see `CacheLengths.replayed`.

        Raises:
            ValueError: more than there was room for.
            NotImplementedError: a model with dense layers.
        """
        if self.has_dense_layers:
            raise NotImplementedError(
                "a captured step must have NSA in every layer, got a model with dense layers: their cache counts in "
                "Python. Convert all layers, or decode without a graph."
            )
        self.lengths.replayed(num)
        for layer in self.layers:
            layer.replayed(num)  # pyright: ignore[reportAttributeAccessIssue]

    def reset(self) -> None:
        super().reset()
        self.lengths.reset()
        self.was_masked = False

    def crop(self, tokens_to_remove: int) -> None:
        for layer in self.layers:  # they refuse before a dense layer has changed
            if isinstance(layer, NSACacheLayer):
                layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]
        self.lengths.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        tokens = self.lengths.tokens
        if tokens is not None:
            self.lengths.select(torch.arange(len(tokens), device=tokens.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.lengths.select(indices)
