"""The five numbers of Native Sparse Attention and the forced blocks: `NSAConfig`."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class NSAConfig:
    """Block sizes of Native Sparse Attention (arXiv 2502.11089, section 4.1 gives these defaults).

    Notation map, paper to here: l = `cmp_block`, d = `cmp_stride`, l' = B = `slc_block`, n = N = `num_selected`,
    w = `window`.

    Args:
        cmp_block: l, tokens that one compressed key covers. A multiple of `cmp_stride`.
        cmp_stride: d, tokens between the starts of neighbouring compressed keys.
        slc_block: B, tokens of a selection block: 16, 32, 64 or 128, and a multiple of `cmp_stride`.
        num_selected: N, selected blocks per query token and KV head, the forced ones counted. 1 to 64, and at
            least `init_blocks + local_blocks`.
        window: w, tokens of the sliding window, the query's own token counted. At least 1.
        init_blocks: blocks at the start of a sequence that every token selects.
        local_blocks: latest blocks, the current one counted, that every token selects.

    Raises:
        TypeError: a field is not an int.
        ValueError: a field is outside its range, with the field, the value and what to do.
    """

    cmp_block: int = 32
    cmp_stride: int = 16
    slc_block: int = 64
    num_selected: int = 16
    window: int = 512
    init_blocks: int = 1
    local_blocks: int = 2

    @property
    def overlap(self) -> int:
        """l / d: compressed blocks that cover a token, but for the first and last ones."""
        return self.cmp_block // self.cmp_stride

    @property
    def keys_per_block(self) -> int:
        """B / d: compressed blocks that begin in a selection block."""
        return self.slc_block // self.cmp_stride

    def sizes(self) -> tuple[int, ...]:
        """The fields in order: `NSAConfig(*config.sizes()) == config`."""
        return (
            self.cmp_block, self.cmp_stride, self.slc_block, self.num_selected, self.window, self.init_blocks,
            self.local_blocks,
        )  # fmt: skip

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}. Pass a whole number.")
            low = 0 if name in ("init_blocks", "local_blocks") else 1
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}. Raise it.")
        if self.cmp_block % self.cmp_stride:
            raise ValueError(
                f"cmp_block must be a multiple of cmp_stride, got {self.cmp_block} and {self.cmp_stride}. "
                "Equation 9 adds up whole strides; use for example cmp_block=32, cmp_stride=16."
            )
        if self.slc_block % self.cmp_stride:
            raise ValueError(
                f"slc_block must be a multiple of cmp_stride, got {self.slc_block} and {self.cmp_stride}. "
                "Equation 9 adds up whole strides; use for example slc_block=64, cmp_stride=16."
            )
        if self.slc_block not in (16, 32, 64, 128):
            raise ValueError(f"slc_block must be 16, 32, 64 or 128, got {self.slc_block}. The paper uses 64.")
        if self.num_selected > 64:
            raise ValueError(f"num_selected must be at most 64, got {self.num_selected}. The paper uses 16.")
        if self.init_blocks + self.local_blocks > self.num_selected:
            raise ValueError(
                f"init_blocks + local_blocks must be at most num_selected, got {self.init_blocks} + "
                f"{self.local_blocks} > {self.num_selected}. Force fewer blocks or select more."
            )


def check_config(config: object) -> None:
    if not isinstance(config, NSAConfig):
        raise TypeError(f"config must be an NSAConfig, got {type(config).__name__}. Pass nsattn.NSAConfig(...).")
