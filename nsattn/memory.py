"""How much memory the selected branch takes beyond its inputs and outputs: `estimate_memory`."""

from __future__ import annotations

import torch

from nsattn import checks, dispatch
from nsattn.api import DEFAULT_CONFIG, WORKSPACE
from nsattn.config import NSAConfig
from nsattn.plan import make_plan


def estimate_memory(
    total: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    v_head_dim: int | None = None,
    config: NSAConfig = DEFAULT_CONFIG,
    num_seqs: int = 1,
    max_seqlen: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    impl: str = "auto",
    workspace: int = WORKSPACE,
    backward: bool = False,
) -> int:
    """Peak bytes that `attend_selected` allocates beyond its inputs and outputs, on a GPU.

    At most `workspace` + 64 MiB. In the backward, two things come on top for long batches: rowsum(o * do), 4 bytes for
    each token and head, as far as it takes more than a quarter of the workspace (with 32 heads and the default, beyond
    2,097,152 tokens), and where one KV head does not fit, what rounding took off the sums of its dk and dv, as far as
    it takes more than half (with heads of 128 in 16 bit, beyond 1,048,576 tokens). Nothing is allocated and no GPU is
    needed.

    Args:
        total: tokens of the batch, over all sequences.
        num_heads, num_kv_heads: query and key heads.
        head_dim, v_head_dim: of queries and keys, and of values (default: the same).
        config: block sizes.
        num_seqs, max_seqlen: number of sequences in the batch, and the longest (default: `total`).
        dtype: of queries, keys and values.
        impl: as for `attend_selected`; `auto` asks for this machine's GPU.
        workspace: as for `attend_selected`.
        backward: of the gradients instead of the output.

    Returns:
        Bytes. The allocator rounds each of the roughly ten buffers up to 2 MiB.

    Raises:
        ValueError: sizes that no kernel takes, or an implementation without kernels: the reference's memory grows with
            the square of the length.
    """
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    checks.check_config(config)
    checks.check_workspace(workspace)
    checks.check_count("total", total)
    for what, number in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim),
                         ("v_head_dim", v_head_dim), ("num_seqs", num_seqs)):  # fmt: skip
        checks.check_count(what, number, 1)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}. Change one of them."
        )
    cu = torch.empty(num_seqs + 1, dtype=torch.int32, device="meta")
    plan = make_plan(cu, total, config=config, max_seqlen=max_seqlen)
    shape = dispatch.Shape(
        "cuda", dtype, head_dim, v_head_dim, num_heads // num_kv_heads, plan.max_blk, config.slc_block,
        dispatch.capability("cuda", None), total * num_kv_heads, config.num_selected,
    )  # fmt: skip
    name = dispatch.resolve("attend_selected", impl, shape)
    if not dispatch.TABLE["attend_selected"][name].is_kernel:
        raise ValueError(f"impl={name!r} takes memory that grows with the square of the length. Name a kernel.")
    q, k, v = (
        torch.empty(total, heads, dim, dtype=dtype, device="meta")
        for heads, dim in ((num_heads, head_dim), (num_kv_heads, head_dim), (num_kv_heads, v_head_dim))
    )
    module = dispatch.load("attend_selected", name)
    return module.scratch_bytes(q, k, v, config.num_selected, plan, workspace=workspace, backward=backward)
