"""What the results of `nsattn bench selected`, and those of peers in `nsattn bench attention`, are judged by."""

from __future__ import annotations

import torch
from torch import Tensor

from nsattn.bench.peers import Call, Problem
from nsattn.kernels import reference
from nsattn.plan import make_plan
from nsattn.testing import compare

CHECKED_ROWS = 64
CHECKED_SCORES = 1 << 28  # most (row, head, key) scores of the reference at a time: 2 GiB in float64


class Truth:
    """The reference on the last query rows alone (as cached keys with a few queries), with its gradients."""

    def __init__(self, problem: Problem, op: str) -> None:
        plan, case = problem.plan, problem.case
        self.leaves = problem.q, problem.k, problem.v
        size = CHECKED_SCORES // (case.length * min(case.sequences, CHECKED_ROWS) * case.num_heads)
        self.rows = min(plan.total_q, CHECKED_ROWS, max(size, 8))
        self.selection = problem.selection[-self.rows :]
        self.plan = make_plan(
            (plan.cu_q - (plan.total_q - self.rows)).clamp_min(0),
            self.rows,
            config=plan.config,
            max_seqlen=self.rows,
            cu_seqlens_k=plan.cu_k,
            total_k=plan.total_k,
            max_seqlen_k=plan.max_k,
        )
        self.dy = torch.randn_like(problem.q[-self.rows :, :, :1]).expand(-1, -1, case.v_head_dim).contiguous()
        golden, low = self._compute(op, torch.float64), self._compute(op, problem.q.dtype)
        self.read = (golden[3] != 0).flatten(1).any(dim=1)  # keys that these rows read; others have no gradient
        self.golden, self.low = ((o, dq, dk[self.read], dv[self.read]) for o, dq, dk, dv in (golden, low))

    def _compute(self, op: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """(o, dq, dk, dv), computed in `dtype`: head by head, because a million keys of eight take 8 GiB in float64."""
        function = getattr(reference, "attend_window" if op == "dense causal" else op)  # a window of everything
        q, k, v = (x.detach() for x in self.leaves)
        G, scale, heads = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5, []
        for h in range(k.shape[1]):
            group = slice(h * G, (h + 1) * G)
            parts = q[-self.rows :, group], k[:, h : h + 1], v[:, h : h + 1]
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in parts]
            extra = (self.selection[:, h : h + 1],) if op == "attend_selected" else ()
            o = function(*leaves, *extra, self.plan, scale=scale)[0]
            heads.append((o.detach(), *torch.autograd.grad(o, leaves, self.dy[:, group].to(dtype))))
        return tuple(torch.cat(parts, dim=1) for parts in zip(*heads, strict=True))

    def check(self, call: Call) -> tuple[bool, bool]:
        """Whether (output, gradients) agree by the error rule of `nsattn.testing`."""
        y = call(*self.leaves)
        dy = torch.zeros_like(y)
        dy[-self.rows :] = self.dy
        dq, dk, dv = torch.autograd.grad(y, self.leaves, dy)
        mine = y.detach()[-self.rows :], dq[-self.rows :], dk[self.read], dv[self.read]
        ok = [compare(x, golden, low).ok for x, golden, low in zip(mine, self.golden, self.low, strict=True)]
        elsewhere = any(bool((x[~self.read] != 0).any()) for x in (dk, dv))
        return ok[0], all(ok[1:]) and not elsewhere
