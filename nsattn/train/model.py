"""`ByteLM`, a small decoder-only language model over bytes, with NSA or full attention."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsattn.config import NSAConfig
from nsattn.nn import NSAttention
from nsattn.plan import make_plan, uniform_cu_seqlens
from nsattn.rotary import rotary_tables, rotate

VOCABULARY = 256  # every byte is a token
ATTENTIONS = ("nsa", "full")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a `ByteLM`.

    Args:
        attention: `nsa` or `full`. Both have the same projections and RoPE; NSA adds compression and gates.
        dim, layers: width and depth.
        num_heads, num_kv_heads, head_dim: query heads, KV heads, size of a head.
        hidden: width of the SwiGLU layer.
        nsa: block sizes of NSA.
        compression: how NSA compresses blocks: `mlp`, `linear`, `gated` or `mean`.
        separate_kv: own keys and values for each branch of NSA.
        rope_theta: base of the rotary embedding.
    """

    attention: str = "nsa"
    dim: int = 128
    layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    hidden: int = 352
    nsa: NSAConfig = field(default_factory=NSAConfig)
    compression: str = "mlp"
    separate_kv: bool = False
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {self.attention!r}.")


class FullAttention(nn.Module):
    """Causal softmax attention over all earlier tokens: what NSA is compared to. Projections as in `NSAttention`."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, *, rope_theta: float) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = head_dim, rope_theta
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x `[Bsz, S, dim]`, same shape out."""
        batch, length = x.shape[:2]
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        t = torch.arange(length, device=x.device).repeat(batch)
        tables = rotary_tables(t, self.head_dim, self.rope_theta, q.dtype)
        q, k = (rotate(y.flatten(0, 1), *tables).view_as(y) for y in (q, k))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(o.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated feed-forward layer: down(silu(gate x) * up x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer: attention and feed-forward, each after an RMSNorm and added to its input."""

    def __init__(self, config: ModelConfig, *, impl: str) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.mlp = SwiGLU(config.dim, config.hidden)
        sizes = (config.dim, config.num_heads, config.num_kv_heads, config.head_dim)
        if config.attention == "full":
            self.attention = FullAttention(*sizes, rope_theta=config.rope_theta)
        else:
            self.attention = NSAttention(
                *sizes, config=config.nsa, compression=config.compression, separate_kv=config.separate_kv,
                rope_theta=config.rope_theta, impl=impl,
            )

    def forward(self, x: Tensor, **attention: object) -> tuple[Tensor, Tensor | None]:
        """Returns the output and, where `return_selection` is asked for, the selected blocks."""
        y, selection = self.attention(self.attention_norm(x), **attention), None
        if isinstance(y, tuple):
            y, selection = y
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), selection


class ByteLM(nn.Module):
    """Decoder-only language model over bytes: embedding, `layers` blocks, norm, projection to 256 logits.

    Args:
        config: sizes.
        impl: which implementation of NSA runs, see `nsattn.nsa_attention`.
    """

    def __init__(self, config: ModelConfig, *, impl: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.dim)
        self.blocks = nn.ModuleList(Block(config, impl=impl) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, VOCABULARY, bias=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        # The byte itself must outweigh what the first layers add to it: with 0.02 the first 100 steps of `tiny` end at
        # 3.97 bits per byte, with 1.0 at 3.79, with 0.3 at 3.66.
        self.embedding.weight.normal_(std=0.3)
        self.head.weight.normal_(std=0.02)
        for name, weight in self.named_parameters():
            # What a layer adds to the residual stream starts small, so that depth does not change its scale.
            if name.endswith(("o_proj.weight", "down.weight")):
                weight.mul_(1 / math.sqrt(2 * self.config.layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens, integers `[Bsz, S]` -> logits `[Bsz, S, 256]`."""
        return self._run(tokens, return_selection=False)[0]

    def selections(self, tokens: Tensor) -> Tensor:
        """Blocks that every layer selected for tokens `[Bsz, S]`: int32 `[layers, Bsz * S, Hkv, N]`."""
        if self.config.attention == "full":
            raise ValueError("this model has full attention, which selects no blocks. Use one with attention nsa.")
        return torch.stack(self._run(tokens, return_selection=True)[1])

    def _run(self, tokens: Tensor, *, return_selection: bool) -> tuple[Tensor, list[Tensor]]:
        attention: dict[str, object] = {}
        if self.config.attention == "nsa":  # one plan serves all layers
            batch, length = tokens.shape
            cu_seqlens = uniform_cu_seqlens(batch, length, tokens.device)
            plan = make_plan(cu_seqlens, tokens.numel(), config=self.config.nsa, max_seqlen=length)
            attention = {"plan": plan, "return_selection": return_selection}
        x, selections = self.embedding(tokens.long()), []
        for block in self.blocks:
            x, selection = block(x, **attention)
            selections.append(selection)
        return self.head(self.norm(x)), selections
