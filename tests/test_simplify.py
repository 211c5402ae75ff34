"""Traced graphs made smaller: the same numbers, outputs of their own, and nothing touched that is not understood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dgm.simplify import simplified

A = torch.tensor([[0.5, -1.5, 2.0], [1.0, 3.0, -0.25]])
ROW = torch.tensor([1.0, -2.0, 0.5])


def padded(x: Tensor) -> Tensor:
    """A gradient through slices of one vector, with a gap, in any order."""
    parts = lambda v: (v[:, 2:].exp() * v[:, :1]).sum()  # noqa: E731
    return torch.func.grad(lambda v: parts(v) + v.square().sum())(x)


PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], int]] = {
    "constants": (lambda x: x * torch.ones(2, 3) / 1.0 + torch.zeros(2, 3).sum() - torch.full((2, 3), 0.5), (A,), 1),
    "ones on the left": (lambda x: torch.ones(3) * x + torch.zeros(3), (ROW,), 1),
    "minus one": (lambda x: -(x * -torch.ones(2, 3)), (A,), 1),
    "the same twice": (lambda x: x.exp() + x.exp() * x.exp(), (A,), 3),
    "views": (lambda x: x.view(3, 2).view(6).view(2, 3).expand(2, 3).t().t() + 1.0, (A,), 1),
    "sums of one": (lambda x: x.unsqueeze(-1).sum(-1).pow(1.0) * 3.0, (A,), 1),
    "broadcast ones stay": (lambda x: x * torch.ones(2, 3), (ROW,), 2),
    "zero times a value": (lambda x: torch.zeros(3) * x, (torch.tensor([1.0, torch.inf, torch.nan]),), 2),
    "a view of what was a copy": (lambda x: (x.t() * 1.0).contiguous().view(6) * 2.0, (A,), 4),
    "doubles": (lambda x: x * torch.full((3,), 0.1, dtype=torch.float64), (ROW.double(),), 1),
    "mixed types": (lambda x: x * torch.full((3,), 0.1, dtype=torch.float64), (ROW,), 2),
    "whole numbers": (lambda x: x.long() * 1 + torch.zeros(3, dtype=torch.long), (ROW,), 4),
    "own value of a point": (lambda x: x + (x == x).to(x.dtype).log(), (ROW,), 1),
    "slices": (padded, (A,), 12),
    "noise inside": (lambda x: x * 0.0 + torch.rand(3) - torch.rand(3), (ROW,), 5),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_same_numbers_from_fewer_operations(name: str) -> None:
    function, inputs, most = PROGRAMS[name]
    module = make_fx(function)(*inputs)
    torch.manual_seed(0)
    expected = module.forward(*inputs)
    before = len(module.graph.nodes)
    torch.manual_seed(0)
    found = simplified(module).forward(*inputs)
    assert torch.equal(torch.nan_to_num(found), torch.nan_to_num(expected)) and found.dtype == expected.dtype
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    assert len(calls) <= most and len(module.graph.nodes) <= before, module.graph


def test_slices_become_one_concatenation() -> None:
    module = simplified(make_fx(padded)(A))
    assert "slice_backward" not in module.code and "cat" in module.code


def test_slices_that_overlap_are_left() -> None:
    overlapping = torch.func.grad(lambda v: v[:, :2].exp().sum() + v[:, 1:].sin().sum())
    module = make_fx(overlapping)(A)
    expected = module.forward(A)
    assert torch.equal(simplified(module).forward(A), expected) and "slice_backward" in module.code


def test_outputs_are_tensors_of_their_own() -> None:
    """Gradients are scaled in place by clipping, and parameters are changed one after another."""
    gradients = torch.func.grad(lambda a, b, c: (a * b).sum() + c.sum() * torch.ones(()), argnums=(0, 1, 2))
    module = simplified(make_fx(gradients)(ROW, 2 * ROW, 3 * ROW))
    inputs = [ROW.clone(), 2 * ROW, 3 * ROW]
    found = module.forward(*inputs)
    for i, gradient in enumerate(found):
        gradient.mul_(10.0)  # no memory shared within it either
        inputs[i].add_(1.0)
    assert torch.equal(found[0], 20 * ROW) and torch.equal(found[1], 10 * ROW) and torch.equal(found[2], 10 + 0 * ROW)


def test_two_gradients_that_are_the_same_value() -> None:
    module = simplified(make_fx(lambda x: (x.exp(), x.exp(), x))(ROW))
    first, second, third = module.forward(x := ROW.clone())
    first.zero_()
    third.zero_()
    assert torch.equal(second, ROW.exp()) and torch.equal(x, ROW)


@pytest.mark.parametrize(
    "function",
    [lambda x: x.clone().mul_(2.0) * 1.0, lambda x: x.as_strided((2,), (2,)) * 1.0],
)
def test_graphs_that_change_or_look_at_memory_are_left_as_they_are(function: Callable[[Tensor], Tensor]) -> None:
    module = make_fx(function)(ROW)
    code = module.code
    assert simplified(module).code == code


def test_what_distributions_allocate_for_their_noise_is_not_allocated() -> None:
    def function(x: Tensor, eps: Tensor) -> Tensor:
        torch.empty(3).fill_(torch.nan)
        return x.exp() * 1.0 + torch.empty(3).copy_(eps)

    module = simplified(make_fx(function)(ROW, 2 * ROW))
    assert "empty" not in module.code and torch.equal(module.forward(ROW, 2 * ROW), ROW.exp() + 2 * ROW)


def test_a_copy_that_changes_the_type_is_left() -> None:
    module = simplified(make_fx(lambda x, eps: x * torch.empty(3).copy_(eps))(ROW, ROW.double()))
    assert "copy_" in module.code and torch.equal(module.forward(ROW, ROW.double()), ROW * ROW)
