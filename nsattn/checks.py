"""Every error a caller of the public functions can meet. Reads shapes, dtypes and devices; never allocates or waits.

`check_selection` is the exception that proves the rule: it reads device data and is only run when called by name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsattn.config import NSAConfig
from nsattn.config import check_config as check_config  # for those who check other arguments too
from nsattn.plan import Plan, check_starts, num_compressed
from nsattn.plan import check_count as check_count

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
METHODS = {"mean": 0, "linear": 2, "mlp": 5, "gated": 2}  # number of parameter tensors


def check_tensor(name: str, x: object, dims: tuple[int, ...], what: str) -> None:
    """`x` is a tensor with one of `dims` dimensions; `what` names them in the message."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}. Pass {what}.")
    if x.dim() not in dims:
        raise ValueError(f"{name} must be {what}, got shape {tuple(x.shape)}. Reshape it.")


def check_float(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, got {x.dtype}. Convert it with .to().")


def check_same(**tensors: Tensor | None) -> None:
    """All tensors share the dtype and device of the first."""
    given = {name: x for name, x in tensors.items() if x is not None}
    (first, head), *rest = given.items()
    for name, x in rest:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor like {first}, got {type(x).__name__}. Pass a tensor.")
        if x.dtype != head.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first}, got {x.dtype} and {head.dtype}. Convert one of them."
            )
        if x.device != head.device:
            raise ValueError(
                f"{name} must be on the device of {first}, got {x.device} and {head.device}. Move one of them."
            )


def check_beside(name: str, x: object, other: Tensor, shape: tuple[int, ...], what: str) -> None:
    """A float tensor of this shape on the device of another one."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}. Pass {what}.")
    check_float(name, x)
    check_shape(name, x, shape, what)
    if x.device != other.device:
        raise ValueError(f"{name} must be on the device of the data, got {x.device} and {other.device}. Move it.")


def check_queries(q: Tensor) -> None:
    check_tensor("q", q, (3, 4), "[T, Hq, D] (packed) or [Bsz, S, Hq, D]")
    check_float("q", q)


def check_pair(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str]) -> None:
    """Keys and values fit the queries and each other."""
    for name, x in zip(names, (k, v), strict=True):
        check_tensor(name, x, (q.dim(),), "[T, Hkv, D] like q" if q.dim() == 3 else "[Bsz, S, Hkv, D] like q")
    check_same(q=q, **{names[0]: k, names[1]: v})
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same rows and heads, got {tuple(k.shape)} and {tuple(v.shape)}. "
            "Only their last dimension may differ."
        )
    check_keys(q, k, names[0])


def check_keys(q: Tensor, k: Tensor, name: str) -> None:
    """Keys fit the queries: same batch, and see `check_heads`."""
    check_tensor(name, k, (q.dim(),), "[T, Hkv, D] like q" if q.dim() == 3 else "[Bsz, S, Hkv, D] like q")
    if q.dim() == 4 and k.shape[0] != q.shape[0]:
        raise ValueError(f"{name} must have the batch size of q, got {k.shape[0]} and {q.shape[0]}. Match them.")
    check_heads(q, k, name)


def check_heads(q: Tensor, k: Tensor, name: str) -> None:
    """Keys have the head dim of the queries, and the query heads are a multiple of the KV heads."""
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{name} must have the head dim of q, got {k.shape[-1]} and {q.shape[-1]}. Match them.")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"query heads must be a multiple of KV heads, got {q.shape[-2]} and {k.shape[-2]} in {name}. "
            "Query head h reads KV head h // (Hq // Hkv)."
        )


def check_cu_seqlens(name: str, cu: Tensor, like: Tensor) -> None:
    check_starts(name, cu)
    if cu.device != like.device:
        raise ValueError(f"{name} must be on the device of the data, got {cu.device} and {like.device}. Move it.")


def check_lengths(
    x: Tensor, cu: Tensor | None, plan: Plan | None, max_seqlen: int | None, *, keys: bool = False
) -> None:
    """Packed input says where its sequences are, and maybe (`keys`) those of its keys; batched input must not."""
    name, bound = ("cu_seqlens_k", "max_seqlen_k") if keys else ("cu_seqlens", "max_seqlen")
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan must come from nsattn.make_plan, got {type(plan).__name__}.")
    if plan is not None and (cu is not None or max_seqlen is not None):
        raise ValueError(f"plan already holds the lengths: got plan and {name} or {bound}. Pass one of the two.")
    if plan is not None and plan.cu_q.device != x.device:
        raise ValueError(
            f"plan must be on the device of the data, got {plan.cu_q.device} and {x.device}. Make one there."
        )
    if x.dim() == 4 and plan is not None and plan.num_seqs != x.shape[0]:
        raise ValueError(
            f"plan must have a sequence for each row of the batch, got {plan.num_seqs} for {x.shape[0]} rows. Make one "
            "of this batch, or flatten the batch."
        )
    if x.dim() == 4 and cu is not None:
        raise ValueError(
            f"{name} describes packed [T, H, D] input, got 4 dimensions. Flatten the batch or drop {name}."
        )
    if x.dim() == 4 and x.shape[0] == 0:
        raise ValueError(f"a batch must have at least one sequence, got shape {tuple(x.shape)}. Skip the call.")
    if x.dim() == 3 and cu is None and plan is None and not keys:
        raise ValueError("packed [T, H, D] input needs cu_seqlens (or plan). One sequence: cu_seqlens=[0, T], int32.")
    if keys and max_seqlen is not None and cu is None:
        raise ValueError("max_seqlen_k must come with cu_seqlens_k, got it alone. Pass both, or leave it out.")
    if max_seqlen is not None and (not isinstance(max_seqlen, int) or max_seqlen < 0):
        raise ValueError(f"{bound} must be an int >= 0, got {max_seqlen!r}. It is an upper bound on the lengths.")


def check_head_dim(v: Tensor, other: Tensor, name: str) -> None:
    """All values have one head dim, that of the output."""
    if other.shape[-1] != v.shape[-1]:
        raise ValueError(f"{name} must have the head dim of v, got {other.shape[-1]} and {v.shape[-1]}. Match them.")


def check_plan_config(plan: Plan, config: NSAConfig) -> None:
    if plan.config != config:
        raise ValueError(f"plan must be made for the config of the call, got {plan.config} and {config}. Make another.")


def check_rows(name: str, x: Tensor, rows: int, axis: str) -> None:
    if x.shape[0] != rows:
        raise ValueError(
            f"{name} must have {rows} rows ({axis} of the plan), got {x.shape[0]}. Use the plan of this batch."
        )


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], what: str) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must be {what} = {shape}, got {tuple(x.shape)}.")


def check_block_idx(block_idx: Tensor, q: Tensor, num_kv_heads: int) -> None:
    check_tensor("block_idx", block_idx, (q.dim(),), "int32 [..., Hkv, N] with the leading sizes of q")
    if block_idx.dtype != torch.int32:
        raise TypeError(f"block_idx must be int32, got {block_idx.dtype}. Use block_idx.to(torch.int32).")
    want = (*q.shape[:-2], num_kv_heads)
    if tuple(block_idx.shape[:-1]) != want:
        raise ValueError(
            f"block_idx must be {want} + (N,), got {tuple(block_idx.shape)}. One list per token and KV head."
        )
    if not 1 <= block_idx.shape[-1] <= 64:
        raise ValueError(
            f"block_idx must hold 1 to 64 blocks per token, got {block_idx.shape[-1]}. Select fewer blocks."
        )
    if block_idx.device != q.device:
        raise ValueError(f"block_idx must be on the device of q, got {block_idx.device} and {q.device}. Move it.")


def check_cache(
    q: Tensor, caches: dict[str, Tensor], cache_seqlens: Tensor, block_table: Tensor | None, config: NSAConfig
) -> None:
    """Cached keys and values fit the queries, each other and the block table.

    `caches`: k, v, k_cmp, v_cmp and, where they exist, k_win, v_win by name.
    """
    for name, x in caches.items():
        check_tensor(name, x, (4,), "[Bsz, rows, Hkv, D], or [pages, rows of a page, Hkv, D] with a block_table")
    _check_index("cache_seqlens", cache_seqlens, 1, "int32 [Bsz]", q)
    if block_table is not None:
        _check_index("block_table", block_table, 2, "int32 [Bsz, pages of a sequence]", q)
    k, k_cmp, Dv = caches["k"], caches["k_cmp"], caches["v"].shape[3]
    check_heads(q, k, "k")
    for name, x in caches.items():
        compressed = name.endswith("_cmp")
        if block_table is None:
            first, rows, what = q.shape[0], (k_cmp if compressed else k).shape[1], "[Bsz, rows, Hkv, D or Dv]"
        else:
            first, rows = k.shape[0], config.slc_block // (config.cmp_stride if compressed else 1)
            what = f"[pages, {'slc_block / cmp_stride' if compressed else 'slc_block'}, Hkv, D or Dv]"
        check_shape(name, x, (first, rows, k.shape[2], Dv if name.startswith("v") else q.shape[3]), what)
    need = num_compressed(k.shape[1], config)
    if block_table is None and k_cmp.shape[1] < need:
        raise ValueError(
            f"k_cmp must have room for the {need} compressed rows of {k.shape[1]} cached tokens, got "
            f"{k_cmp.shape[1]}. Make it longer."
        )


def _check_index(name: str, x: Tensor, dims: int, what: str, q: Tensor) -> None:
    check_tensor(name, x, (dims,), what)
    if x.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {x.dtype}. Use .to(torch.int32).")
    if x.shape[0] != q.shape[0]:
        raise ValueError(f"{name} must have the {q.shape[0]} rows of the batch, got {x.shape[0]}. Match them.")
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, got {x.device} and {q.device}. Move it.")
    if x.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got stride {x.stride()}. Copy it.")


def check_no_grad(name: str, *tensors: Tensor | None) -> None:
    """Nothing here would need a gradient that the operation does not have."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise NotImplementedError(
            f"{name} has no gradient, got tensors that require one. Wrap the call in torch.no_grad(), or train with "
            "nsa_attention."
        )


def check_whole_sequences() -> None:
    """Not inside torch's `context_parallel`, which cuts sequences and mends dense attention only."""
    if torch.compiler.is_compiling():
        return
    patched = getattr(torch.nn.functional.scaled_dot_product_attention, "__module__", None) or ""
    if patched.startswith("torch.distributed"):
        raise NotImplementedError(
            "NSA needs whole sequences, got a call inside torch's context_parallel, whose ranks hold a part each and "
            "would attend to that part alone. Shard heads or data instead."
        )


def check_compression(x: Tensor, method: str, params: tuple[Tensor, ...], config: NSAConfig) -> None:
    """Method and parameter shapes of `compress`."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    if len(params) != METHODS[method]:
        raise ValueError(
            f"method {method!r} takes {METHODS[method]} parameter tensors, got {len(params)}. See nsattn.compress."
        )
    for i, p in enumerate(params):
        if not isinstance(p, Tensor):
            raise TypeError(f"parameter {i} of method {method!r} must be a torch.Tensor, got {type(p).__name__}.")
    heads, dim, l = x.shape[-2], x.shape[-1], config.cmp_block
    shapes: list[tuple[str, tuple[int, ...]]] = []
    if method == "linear":
        out = params[0].shape[-1]
        shapes = [("weight", (heads, l, dim, out)), ("bias", (heads, out))]
    elif method == "mlp":
        hidden, out = params[1].shape[-1], params[3].shape[-1]
        shapes = [
            ("pe", (heads, l, dim)),
            ("w1", (heads, l, dim, hidden)),
            ("b1", (heads, hidden)),
            ("w2", (heads, hidden, out)),
            ("b2", (heads, out)),
        ]
    elif method == "gated":
        shapes = [("weight", (heads, dim)), ("pe", (heads, l))]
    for (name, shape), p in zip(shapes, params, strict=True):
        check_shape(f"{method} parameter {name}", p, shape, "[Hkv, ...]")
        if p.device != x.device:
            raise ValueError(
                f"{method} parameter {name} must be on the device of x, got {p.device} and {x.device}. Move it."
            )


def check_scale(softmax_scale: float) -> None:
    """Kernels scale the largest score instead of every score, so the order must stay."""
    if not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"softmax_scale must be a number, got {softmax_scale!r}. The default is 1 / sqrt(D).")
    if not 0 < softmax_scale < float("inf"):
        raise ValueError(f"softmax_scale must be positive and finite, got {softmax_scale}. The default is 1 / sqrt(D).")


def check_workspace(workspace: int) -> None:
    if not isinstance(workspace, int) or workspace < 1 << 20:
        raise ValueError(
            f"workspace must be an int of at least 1 MiB (1048576 bytes), got {workspace!r}. Default: 1 GiB."
        )


def check_selection(block_idx: Tensor, plan: Plan) -> None:
    """Name the first entry of a selection that kernels would ignore. Waits for the device: a tool for debugging.

    Args:
        block_idx: int32 `[total_q, Hkv, N]`, or `[Bsz, S, Hkv, N]`.
        plan: the plan of the batch.

    Raises:
        TypeError: no int32 tensor, no plan.
        ValueError: other rows than the plan's; an entry other than -1 is no block of its sequence, lies in the future
            or occurs twice in a row; with its row, KV head, slot and value.
    """
    from nsattn.plan import positions, rows_of

    check_tensor("block_idx", block_idx, (3, 4), "int32 [T, Hkv, N] or [Bsz, S, Hkv, N]")
    if block_idx.dtype != torch.int32:
        raise TypeError(f"block_idx must be int32, got {block_idx.dtype}. Use block_idx.to(torch.int32).")
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must come from nsattn.make_plan, got {type(plan).__name__}.")
    block_idx = block_idx if block_idx.dim() == 3 else block_idx.flatten(0, 1)
    check_rows("block_idx", block_idx, plan.total_q, "queries")
    seq, _ = rows_of(plan.cu_q, plan.total_q)
    real = seq < plan.num_seqs
    t = torch.where(real, positions(plan), -1)[:, None, None]
    block = block_idx.long()
    current = torch.div(t, plan.config.slc_block, rounding_mode="floor")
    outside = (block < -1) | (block > current)
    order = block.sort(dim=-1, stable=True)
    again = torch.zeros_like(outside)
    twice = (order.values[..., 1:] == order.values[..., :-1]) & (order.values[..., 1:] >= 0)
    again[..., 1:] = twice
    again = torch.zeros_like(outside).scatter(-1, order.indices, again)
    bad = (outside | again).nonzero()
    if len(bad):
        row, head, slot = bad[0].tolist()
        reason = (
            "occurs twice" if bool(again[row, head, slot]) else f"is outside 0..{int(current[row, 0, 0])} and not -1"
        )
        raise ValueError(
            f"block_idx[{row}, {head}, {slot}] = {int(block[row, head, slot])} {reason}. Kernels ignore such entries; "
            "unused slots hold -1."
        )
