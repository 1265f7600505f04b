"""Where the time of a forward and backward goes, kernel by kernel: python benchmarks/profile_step.py [T] [Hq] [Hkv]"""

from __future__ import annotations

import sys

import torch
from torch.profiler import ProfilerActivity, profile

import nsattn


def main() -> None:
    T, Hq, Hkv = (int(x) for x in (*sys.argv[1:], *("65536", "32", "8")[len(sys.argv) - 1 :]))
    q, k, v = (
        torch.randn(1, T, h, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (Hq, Hkv, Hkv)
    )
    gates = torch.rand(1, T, Hq, 3, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        o = nsattn.nsa_attention(q, k, v, gates=gates)
        torch.autograd.grad(o, (q, k, v, gates), o)

    step()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        step()
        torch.cuda.synchronize()
    table = prof.key_averages().table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=60)
    sys.stdout.write(table + "\n")


if __name__ == "__main__":
    main()
