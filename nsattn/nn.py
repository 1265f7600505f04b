"""`NSAttention`, a drop-in causal self-attention layer, and the learned compression it uses, `Compressor`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nsattn import api, checks
from nsattn.cache import LayerCache, Step
from nsattn.config import NSAConfig
from nsattn.decode import nsa_decode
from nsattn.plan import Plan, compressed_positions, make_plan, positions, uniform_cu_seqlens
from nsattn.rotary import rotary_tables, rotate


class Compressor(nn.Module):
    """Eq 7 with learned parameters: phi of `nsattn.compress` of the l rows x_j of a block, one set per KV head.

    Args:
        method: phi, with these parameters for each KV head:
            `mean`: mean_j x_j, without parameters.
            `linear`: sum_j x_j @ weight_j + bias. weight `[l, D, D]`, bias `[D]`.
            `mlp`: silu(sum_j (x_j + pe_j) @ w1_j + b1) @ w2 + b2. pe `[l, D]`, w1 `[l, D, F]`, b1 `[F]`, w2 `[F, D]`,
                b2 `[D]`.
            `gated`: sum_j softmax_j(x_j . weight + pe_j) * x_j. weight `[D]`, pe `[l]`.
        num_kv_heads, head_dim: Hkv and D of what is compressed.
        config: block sizes.
        hidden: F. Default: head_dim.

    Shapes: `forward(x, plan)` takes packed `[total_k, Hkv, D]` and returns `[total_cmp, Hkv, D]`.

    Raises:
        ValueError: an unknown method. `forward` raises what `nsattn.compress` does.

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
            here = getattr(weight, "to_local", lambda: weight)()  # FSDP2 gives a part of the heads, which are all alike
            here.diagonal(dim1=-2, dim2=-1).fill_(1 / weight.shape[1])
        elif self.method == "mlp":
            l, dim, hidden = params["w1"].shape[1:]
            params["pe"].normal_(std=0.02)
            params["w1"].normal_(std=1 / math.sqrt(l * dim))
            params["w2"].normal_(std=1 / math.sqrt(hidden))

    def forward(self, x: Tensor, plan: Plan, *, impl: str = "auto") -> Tensor:
        """x packed `[total_k, Hkv, D]` -> `[total_cmp, Hkv, D]`."""
        # not get_parameter: FSDP1, DataParallel and functional_call put plain tensors in the place of parameters
        params = tuple(getattr(self, name) for name in self.names)
        return api.compress(x, method=self.method, params=params, plan=plan, impl=impl)


class GateProjection(nn.Linear):
    """Gates before the sigmoid. All zero at first, also where `reset_parameters` fills a model made on `meta`."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for p in self.parameters():
            p.zero_()


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
    and returns the same shape. With a `cache` and the `step` of this pass (see `nsattn.cache`), x `[Bsz, S, dim]` are
    new tokens, which attend to those kept before too; where the step's mask takes a token out, the output is zero.

    Raises:
        ValueError: sizes that do not fit, or that the kernels do not support; a cache without a step or with lengths.
        NotImplementedError: a call inside torch's `context_parallel`.

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
        if config is not None:
            checks.check_config(config)
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}. Change one of them."
            )
        if head_dim is None and dim % num_heads:
            raise ValueError(
                f"dim must be a multiple of num_heads, got {dim} and {num_heads}. Or pass head_dim."
            )
        self.config = NSAConfig() if config is None else config
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.v_head_dim = self.head_dim if v_head_dim is None else v_head_dim
        if self.head_dim < 2 or self.head_dim % 2 or self.v_head_dim < 1:
            raise ValueError(
                f"head_dim must be even for rotary embedding, got {self.head_dim}, and v_head_dim positive, got "
                f"{self.v_head_dim}. Change them."
            )
        if not 0 < rope_theta < float("inf"):
            raise ValueError(f"rope_theta must be positive and finite, got {rope_theta}. Llama's is 10000.")
        self.branches = 3 if separate_kv else 1
        self.rope_theta, self.impl = rope_theta, impl
        factory = {"device": device, "dtype": dtype}
        kv_heads = self.branches * num_kv_heads
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias, **factory)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=qkv_bias, **factory)
        self.v_proj = nn.Linear(dim, kv_heads * self.v_head_dim, bias=qkv_bias, **factory)
        self.o_proj = nn.Linear(num_heads * self.v_head_dim, dim, bias=False, **factory)
        self.gate_proj = GateProjection(dim, num_heads * 3, **factory)
        self.compress_k = Compressor(compression, num_kv_heads, self.head_dim, self.config, **factory)
        self.compress_v = Compressor(compression, num_kv_heads, self.v_head_dim, self.config, **factory)

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        plan: Plan | None = None,
        cache: LayerCache | None = None,
        step: Step | None = None,
        return_selection: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention output like x; with `return_selection` also the selected blocks, int32 `[T, Hkv, N]`."""
        checks.check_whole_sequences()
        if cache is None and step is None:
            plan = new = self._plan(x, cu_seqlens, max_seqlen, plan)
            t, t_cmp = positions(plan), compressed_positions(plan)
        elif cache is None or step is None or x.dim() != 3 or (cu_seqlens, max_seqlen, plan) != (None, None, None):
            raise ValueError(
                "a cache must come with the step of this pass, x [Bsz, S, dim] and no other lengths, got "
                f"{type(cache).__name__}, {type(step).__name__} and x {tuple(x.shape)}. Use CacheLengths.advance."
            )
        else:
            checks.check_plan_config(step.new, self.config)
            checks.check_shape("x", x, (*step.positions.shape, x.shape[-1]), "[Bsz, S, dim] of the step")
            new, t, t_cmp = step.new, step.positions.flatten(), step.cmp_positions
        rows = x.flatten(0, -2)
        q = self.q_proj(rows).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(rows).unflatten(-1, (self.branches, self.num_kv_heads, self.head_dim)).unbind(1)
        v = self.v_proj(rows).unflatten(-1, (self.branches, self.num_kv_heads, self.v_head_dim)).unbind(1)
        gates = self.gate_proj(rows).sigmoid().unflatten(-1, (self.num_heads, 3))

        sources = (k[0], v[0])
        if cache is not None and step is not None:
            sources = cache.extend(step, *sources)
        tables, tables_cmp = (rotary_tables(p, self.head_dim, self.rope_theta, q.dtype) for p in (t, t_cmp))
        k_cmp = rotate(self.compress_k(sources[0], new, impl=self.impl), *tables_cmp, impl=self.impl)
        v_cmp = self.compress_v(sources[1], new, impl=self.impl)
        q, *k = (rotate(y, *tables, impl=self.impl) for y in (q, *k[-2:]))  # of three, the first is only compressed
        kept = {"k": k[0], "v": v[-2:][0], "k_cmp": k_cmp, "v_cmp": v_cmp}
        if self.branches == 3:
            kept |= {"k_win": k[1], "v_win": v[2]}
        if cache is not None and step is not None:
            o, block_idx = attend_cached(q, gates, cache.append(step, **kept), step, impl=self.impl)
        else:
            # Only without log-sum-exps are the branches one operation, whose backward is faster.
            out = api.nsa_attention(q, **kept, gates=gates, plan=plan, return_lse=return_selection, impl=self.impl)
            o, block_idx = (out.o, out.block_idx) if isinstance(out, api.NSAOutput) else (out, None)
        y = self.o_proj(o.flatten(1)).view_as(x)
        if not return_selection:
            return y
        assert block_idx is not None, "asked for above"
        return y, block_idx

    def _plan(self, x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, plan: Plan | None) -> Plan:
        checks.check_tensor("x", x, (2, 3), "[T, dim] (packed) or [Bsz, S, dim]")
        checks.check_lengths(x.unsqueeze(-1), cu_seqlens, plan, max_seqlen)  # as [T, dim, 1]: same rules as for q
        if plan is not None:
            checks.check_plan_config(plan, self.config)
            checks.check_rows("x", x.flatten(0, -2), plan.total_q, "queries")
            checks.check_rows("x", x.flatten(0, -2), plan.total_k, "keys")
            return plan
        if x.dim() == 3:
            cu_seqlens, max_seqlen = uniform_cu_seqlens(x.shape[0], x.shape[1], x.device), x.shape[1]
        assert cu_seqlens is not None, "check_lengths asks packed input for it"
        checks.check_cu_seqlens("cu_seqlens", cu_seqlens, x)
        return make_plan(cu_seqlens, x.flatten(0, -2).shape[0], config=self.config, max_seqlen=max_seqlen)


def attend_cached(
    q: Tensor, gates: Tensor, caches: dict[str, Tensor], step: Step, *, softmax_scale: float | None = None, impl: str
) -> tuple[Tensor, Tensor]:
    """What new tokens see of everything a cache holds.

    Args:
        q, gates: `[Bsz * S, Hq, D]` and `[Bsz * S, Hq, 3]`, tokens that the step's mask takes out included.
        caches: k, v, k_cmp, v_cmp and maybe k_win, v_win, from `LayerCache.append`.
        step: of this pass.

    Returns:
        o, `[Bsz * S, Hq, Dv]`, and the selected blocks, int32 `[Bsz * S, Hkv, N]`; zero and -1 for tokens taken out.
    """
    options = {"softmax_scale": softmax_scale, "return_lse": True, "impl": impl}
    if step.plan is None:
        q, gates = q[:, None], gates[:, None]
        config = step.new.config
        out = nsa_decode(q, **caches, gates=gates, cache_seqlens=step.lengths, config=config, **options)
        assert isinstance(out, api.NSAOutput)
        o, block_idx = out.o[:, 0], out.block_idx[:, 0]
        if step.kept is not None:
            taken_out = ~step.kept[:, :, None]
            o, block_idx = o.masked_fill(taken_out, 0), block_idx.masked_fill(taken_out, -1)
        return o, block_idx
    packed = {name: x.flatten(0, 1) for name, x in caches.items()}
    out = api.nsa_attention(step.pack(q), **packed, gates=step.pack(gates), plan=step.plan, **options)
    assert isinstance(out, api.NSAOutput)
    return step.unpack(out.o), step.unpack(out.block_idx)
