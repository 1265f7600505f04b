"""GPU: backward of the dense branches in one pass (`_onepass`) beside the two passes of `_dense`: agreement, then times.

    PYTHONPATH=. python3 benchmarks/try_onepass.py
"""

from __future__ import annotations

import time
import traceback

import torch
import triton

from nsattn import NSAConfig
from nsattn.kernels import _dense, _onepass, attend_compressed_triton, attend_window_triton
from nsattn.kernels._gradient import Gradient, KeyBlocks, plain_gradient
from nsattn.kernels._gradient_sm90 import gradient
from nsattn.plan import cumulative
from nsattn.testing import make_inputs

WORKSPACE = 1 << 30


def blocks(plan, branch: str, B: int) -> KeyBlocks:
    cu = plan.cu_cmp if branch == "compressed" else plan.cu_k
    cu_blk = cumulative((cu[1:] - cu[:-1] + B - 1) // B)
    total = (plan.total_cmp if branch == "compressed" else plan.total_k) // B + plan.num_seqs
    if branch == "compressed":
        return KeyBlocks(cu, cu_blk, total, B, stride=plan.config.cmp_stride, span=plan.config.cmp_block)
    return KeyBlocks(cu, cu_blk, total, B, window=plan.config.window)


def run(lengths, Hkv, G, branch):
    config = NSAConfig()
    x = make_inputs(lengths, num_kv_heads=Hkv, group=G, head_dim=128, config=config, dtype=torch.bfloat16, device="cuda",
                    own_kv=False)
    k, v = (x.k_cmp, x.v_cmp) if branch == "compressed" else (x.k, x.v)
    module = attend_compressed_triton if branch == "compressed" else attend_window_triton
    keys = module._keys(x.plan)
    o, lse = _dense.forward(x.q, k, v, x.plan, keys, scale=x.scale)
    do = torch.randn_like(o)
    longest = x.plan.max_cmp if branch == "compressed" else x.plan.max_k
    variants = {"two passes": lambda: _dense.backward(do, None, x.q, k, v, o, lse, x.plan, keys, scale=x.scale)}

    def onepass(B, kernel):
        kb = blocks(x.plan, branch, B)
        return lambda: _onepass.backward(do, None, x.q, k, v, o, lse, x.plan, kb, scale=x.scale, workspace=WORKSPACE,
                                         kernel=kernel, longest=longest)

    for B in (64, 128):
        for fewest in (1024, 2048, 4096):
            variants[f"sm90 B={B} items={fewest}"] = onepass(B, Gradient(gradient, parts=1, fewest_pairs=fewest))
        variants[f"plain B={B}"] = onepass(B, plain_gradient(x.q, v, B))
    want = variants["two passes"]()
    good, times = {}, {}
    for name, f in variants.items():
        try:
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            got = f()
            torch.cuda.synchronize()
            peak = (torch.cuda.max_memory_allocated() - base) / 2**30
            errors = [float((a.float() - b.float()).square().mean().sqrt() / b.float().square().mean().sqrt())
                      for a, b in zip(got, want, strict=True)]
            same = all(torch.equal(a, b) for a, b in zip(got, f(), strict=True))
            good[name] = f"rms {max(errors):.1e} {'same' if same else 'NOT SAME'} {peak:.2f} GiB"
        except Exception:  # noqa: BLE001
            good[name] = "ERROR " + traceback.format_exc(limit=1)[-200:].replace("\n", " ")
    for _ in range(2):
        for name, f in variants.items():
            if good[name].startswith("ERROR"):
                continue
            time.sleep(0.1)
            times.setdefault(name, []).append(triton.testing.do_bench(f, warmup=5, rep=60, return_mode="median"))
    for name in variants:
        print(f"{branch} T={sum(lengths)}/{len(lengths)} {Hkv * G}/{Hkv} {name:22} "
              f"{min(times.get(name, [float('nan')])):8.3f} ms  {good[name]}", flush=True)


if __name__ == "__main__":
    for branch in ("compressed", "window"):
        for lengths, Hkv, G in (((3000, 1, 0, 1500), 2, 3), ((8192,), 8, 4), ((65536,), 8, 4), ((65536,), 4, 16)):
            run(lengths, Hkv, G, branch)
