"""`NSAttention`, a drop-in causal self-attention layer, and the learned compression it uses, `Compressor`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nsattn import api, checks
from nsattn.config import NSAConfig
from nsattn.plan import Plan, compressed_positions, make_plan, positions, uniform_cu_seqlens


class Compressor(nn.Module):
    """Eq 7 with learned parameters: phi of `nsattn.compress`, one set per KV head.

    Args:
        method: `mean`, `linear`, `mlp` or `gated`, see `nsattn.compress`.
        num_kv_heads, head_dim: sizes of what is compressed.
        config: block sizes.
        hidden: width F of the MLP. Default: head_dim.

    `linear` and `gated` start as the mean of the block; `mlp` starts random with unit gain.
    """

    def __init__(
        self, method: str, num_kv_heads: int, head_dim: int, config: NSAConfig, *, hidden: int | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if method not in checks.METHODS:
            raise ValueError(f"compression must be one of {', '.join(checks.METHODS)}, got {method!r}.")
        self.method = method
        heads, l, dim, hidden = num_kv_heads, config.cmp_block, head_dim, hidden or head_dim
        shapes: dict[str, tuple[int, ...]] = {}
        if method == "linear":
            shapes = {"weight": (heads, l, dim, dim), "bias": (heads, dim)}
        elif method == "mlp":
            shapes = {"pe": (heads, l, dim), "w1": (heads, l, dim, hidden), "b1": (heads, hidden),
                      "w2": (heads, hidden, dim), "b2": (heads, dim)}
        elif method == "gated":
            shapes = {"weight": (heads, dim), "pe": (heads, l)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.names = tuple(shapes)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        params = dict(self.named_parameters())
        for p in params.values():
            p.zero_()
        if self.method == "linear":
            weight = params["weight"]
            l, dim = weight.shape[1:3]
            weight.add_(torch.eye(dim, device=weight.device, dtype=weight.dtype) / l)
        elif self.method == "mlp":
            l, dim, hidden = params["w1"].shape[1:]
            params["pe"].normal_(std=0.02)
            params["w1"].normal_(std=1 / math.sqrt(l * dim))
            params["w2"].normal_(std=1 / math.sqrt(hidden))

    def forward(self, x: Tensor, plan: Plan, *, impl: str = "auto") -> Tensor:
        """x packed `[total_k, Hkv, D]` -> `[total_cmp, Hkv, D]`."""
        params = tuple(self.get_parameter(name) for name in self.names)
        return api.compress(x, method=self.method, params=params, plan=plan, impl=impl)


class NSAttention(nn.Module):
    """Causal self-attention layer with Native Sparse Attention (Eq 5): projections, RoPE, compression, gates.

    Args:
        dim: model width.
        num_heads, num_kv_heads: query heads and KV heads; the first a multiple of the second.
        head_dim: D. Default `dim // num_heads`.
        v_head_dim: Dv. Default D.
        config: block sizes, `NSAConfig`.
        compression: `mlp` (the paper's), `linear`, `gated` or `mean`.
        separate_kv: project own keys and values for each branch, as the paper trains them, instead of one pair for all.
        rope_theta: base of the rotary embedding (first half against second half of a head, as in Llama).
        qkv_bias: biases on the projections of q, k, v (as in Qwen2).
        impl: which implementation, see `nsattn.nsa_attention`.

    The gates are sigmoids of a linear map of the input, `gate_proj`, head-major: row `head * 3 + branch`. They start
    at one half each. Keys are compressed before they are rotated; compressed keys are rotated at the position of their
    first token.

    Shapes: `forward(x)` takes `[Bsz, S, dim]`, or packed `[T, dim]` with `cu_seqlens` (int32 `[n + 1]`) or a `plan`,
    and returns the same shape.

    Raises:
        ValueError: sizes that do not fit, or that the kernels do not support.

    Numerics: see `nsattn.nsa_attention`; works under autocast, activation checkpointing and torch.compile.

    Source: arXiv 2502.11089 section 3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int | None = None,
        *,
        v_head_dim: int | None = None,
        config: NSAConfig | None = None,
        compression: str = "mlp",
        separate_kv: bool = False,
        rope_theta: float = 10000.0,
        qkv_bias: bool = False,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}. Change one of them."
            )
        self.config = config or NSAConfig()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = head_dim or dim // num_heads
        self.v_head_dim = v_head_dim or self.head_dim
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embedding, got {self.head_dim}.")
        self.branches = 3 if separate_kv else 1
        self.rope_theta, self.impl = rope_theta, impl
        factory = {"device": device, "dtype": dtype}
        kv_heads = self.branches * num_kv_heads
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias, **factory)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=qkv_bias, **factory)
        self.v_proj = nn.Linear(dim, kv_heads * self.v_head_dim, bias=qkv_bias, **factory)
        self.o_proj = nn.Linear(num_heads * self.v_head_dim, dim, bias=False, **factory)
        self.gate_proj = nn.Linear(dim, num_heads * 3, **factory)
        self.compress_k = Compressor(compression, num_kv_heads, self.head_dim, self.config, **factory)
        self.compress_v = Compressor(compression, num_kv_heads, self.v_head_dim, self.config, **factory)
        nn.init.zeros_(self.gate_proj.weight)
        nn.init.zeros_(self.gate_proj.bias)

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        plan: Plan | None = None,
        return_selection: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention output like x; with `return_selection` also the selected blocks, int32 `[T, Hkv, N]`."""
        plan = self._plan(x, cu_seqlens, max_seqlen, plan)
        rows = x.flatten(0, -2)
        q = self.q_proj(rows).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(rows).unflatten(-1, (self.branches, self.num_kv_heads, self.head_dim)).unbind(1)
        v = self.v_proj(rows).unflatten(-1, (self.branches, self.num_kv_heads, self.v_head_dim)).unbind(1)
        gates = self.gate_proj(rows).sigmoid().unflatten(-1, (self.num_heads, 3))

        t = positions(plan)
        k_cmp = apply_rope(self.compress_k(k[0], plan, impl=self.impl), compressed_positions(plan), self.rope_theta)
        v_cmp = self.compress_v(v[0], plan, impl=self.impl)
        q = apply_rope(q, t, self.rope_theta)
        k_slc, v_slc, k_win, v_win = apply_rope(k[0], t, self.rope_theta), v[0], None, None
        if self.branches == 3:
            k_slc, v_slc = apply_rope(k[1], t, self.rope_theta), v[1]
            k_win, v_win = apply_rope(k[2], t, self.rope_theta), v[2]
        out = api.nsa_attention(
            q, k_slc, v_slc, gates=gates, k_cmp=k_cmp, v_cmp=v_cmp, k_win=k_win, v_win=v_win, plan=plan,
            return_lse=True, impl=self.impl,
        )
        assert isinstance(out, api.NSAOutput)
        y = self.o_proj(out.o.flatten(1)).view(*x.shape[:-1], -1)
        return (y, out.block_idx) if return_selection else y

    def _plan(self, x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, plan: Plan | None) -> Plan:
        checks.check_tensor("x", x, (2, 3), "[T, dim] (packed) or [Bsz, S, dim]")
        checks.check_lengths(x.unsqueeze(-1), cu_seqlens, plan, max_seqlen)  # as [T, dim, 1]: same rules as for q
        if plan is not None:
            return plan
        if x.dim() == 3:
            cu_seqlens, max_seqlen = uniform_cu_seqlens(x.shape[0], x.shape[1], x.device), x.shape[1]
        assert cu_seqlens is not None, "check_lengths asks packed input for it"
        checks.check_cu_seqlens("cu_seqlens", cu_seqlens, x)
        return make_plan(cu_seqlens, x.flatten(0, -2).shape[0], config=self.config, max_seqlen=max_seqlen)


def apply_rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding of `x` `[T, H, D]` at `positions` `[T]`: pairs (i, i + D/2) turn by position * theta^(-2i/D).

    Angles and the rotation in float32 (float64 for float64 input); result in the dtype of x.
    """
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=kind) / half)
    angle = (positions.to(kind)[:, None] * frequency)[:, None]
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half].to(kind), x[..., half:].to(kind)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
