"""Differentiable operators of torch from Python functions, for a third of the host time of `torch.library.custom_op`.

That is meant for this, but its autograd fills in default arguments by walking the schema: 93 microseconds a call for 13
arguments, where this takes 26 (torch 2.13, docs/log.md, 2026-11-28). Operators without a derivative have no such cost,
and stay with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("nsattn", "FRAGMENT")


class Operator:
    """`torch.ops.nsattn.<name>`, which runs `kernel` on any device. Made by `operator`, used like a custom op.

    It is called with all arguments of its schema, by position; none is a list of tensors, and no output is an input.
    """

    def __init__(self, name: str, kernel: Callable[..., Any]) -> None:
        self.name = name
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
        _LIBRARY.define(name + torch.library.infer_schema(kernel, mutates_args=()), tags=tags)
        _LIBRARY.impl(name, _opaque(kernel), "CompositeExplicitAutograd")
        self.default = getattr(torch.ops.nsattn, name).default

    def __call__(self, *arguments: Any) -> Any:
        return self.default(*arguments)

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """Outputs for inputs without data, see `torch.library.register_fake`."""
        torch.library.register_fake(f"nsattn::{self.name}", fake, lib=_LIBRARY)

    def register_autograd(self, gradient: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """`gradient(ctx, *grads)` and `setup_context(ctx, inputs, output)`, see `torch.library.register_autograd`."""
        operator = self.default

        class Step(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                with torch._C._AutoDispatchBelowAutograd():
                    output = operator(*inputs)
                setup_context(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return gradient(ctx, *grads)

        def run(*inputs: Any) -> Any:
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
                return Step.apply(*inputs)
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*inputs)

        _LIBRARY.impl(self.name, run, "Autograd")


def _opaque(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.disable`, but nothing imports the compiler, which takes a second, where nobody compiles."""
    disabled: Callable[..., Any] | None = None

    def run(*arguments: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return kernel(*arguments)
            disabled = torch.compiler.disable(kernel)
        return disabled(*arguments)

    return run


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make the decorated function the kernel of an operator."""
    return lambda kernel: Operator(name, kernel)
