"""FlexAttention on paper: what the compiled kernel takes, saves and gives back.

Its operator is one of higher order, which no meta kernel stands for. It runs as in a program that compiles
it, without ever having the scores: the output, one fp32 number a row for the backward pass, and in that pass
one more (torch/_inductor/kernel/flex, torch 2.11).
"""

import sys
from typing import Any

import torch

HOME = "torch.nn.attention.flex_attention"


class _Flex(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = query.shape[:3]
        output = query.new_empty((*rows, value.shape[-1]))
        of_rows = query.new_empty(rows, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, of_rows)
        ctx.mark_non_differentiable(of_rows)
        return output, of_rows

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        del gradients
        *inputs, _, of_rows = ctx.saved_tensors
        delta = torch.empty_like(of_rows)
        found = tuple(torch.empty_like(tensor) for tensor in inputs)
        del delta
        return found


def _on_paper(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, ...]:
    output, of_rows = _Flex.apply(query, key, value)
    return output, of_rows, of_rows


def flex_attention() -> list[tuple[Any, str, Any]]:
    """Return stand-ins for the operator, and for the warning that it was not compiled."""
    module = sys.modules.get(HOME)
    if module is None:
        return []
    return [(module, "flex_attention_hop", _on_paper), (module, "_warn_once", lambda **_: None)]
