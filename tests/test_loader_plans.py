"""Batches that are built alike travel by one plan, and no others do."""

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence

from torchfast._loader.plans import Plans, alike_check

FOUR_BITS: torch.dtype = vars(torch)["uint4"]  # unknown to type checkers


def nested() -> torch.Tensor:
    """Return one that has no strides, and is of the type of ordinary ones."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


KINDS: dict[str, Callable[[], Any]] = {
    "tensor": lambda: torch.ones(4, 6),
    "transposed": lambda: torch.ones(6, 4).t(),
    "every other": lambda: torch.ones(4, 12)[:, ::2],
    "flat": lambda: torch.ones(24),
    "empty": lambda: torch.ones(0, 6),
    "half": lambda: torch.ones(4, 6, dtype=torch.float16),
    "complex": lambda: torch.ones(4, 6, dtype=torch.complex64),
    "of four bits": lambda: torch.empty(4, 6, dtype=FOUR_BITS),
    "conjugate": lambda: torch.ones(4, 6, dtype=torch.complex64).conj(),
    "negative": lambda: torch._neg_view(torch.ones(4, 6)),
    "without memory": lambda: torch._efficientzerotensor((4, 6)),
    "of such a one": lambda: torch._efficientzerotensor((8, 6))[4:],
    "parameter": lambda: torch.nn.Parameter(torch.ones(4, 6)),
    "in a graph": lambda: torch.ones(4, 6, requires_grad=True) * 1,
    "sparse": lambda: torch.ones(4, 6).to_sparse(),
    "nested": nested,
    "meta": lambda: torch.ones(4, 6, device="meta"),
    "sequence": lambda: pack_sequence([torch.ones(2)]),
    "for inference": torch.inference_mode()(lambda: torch.ones(4, 6)),
}


def layouts(leaves: list[Any]) -> list[Any]:
    """Return what a plan may depend on, in words of this test."""
    layouts = []
    for leaf in leaves:
        moves_itself = (
            type(leaf) is not torch.Tensor
            or leaf.layout is not torch.strided
            or leaf.dtype is FOUR_BITS
            or leaf.is_nested
            or leaf.requires_grad
            or leaf.is_conj()
            or leaf.is_neg()
            or leaf._is_zerotensor()
            or leaf.device.type != "cpu"
        )
        layouts.append(None if moves_itself else (leaf.dtype, tuple(leaf.shape), leaf.stride()))
    return layouts


@pytest.fixture(params=["guard of compiled code", "none"])
def guard(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have PyTorch's private guard, and do without."""
    if request.param == "none":
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")


@pytest.mark.usefixtures("guard")
@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_one_plan_for_those_that_are_alike(first: str, second: str) -> None:
    """After a batch of one kind, a batch of another has a plan of its own, unless it travels alike."""
    plans = Plans()
    ones, others = ([torch.ones(3), KINDS[kind]()] for kind in (first, second))
    found = [plans.plan(leaves) for leaves in (ones, ones, others, others, ones)]
    assert found[0] is found[1] is found[4]
    assert found[2] is found[3]
    if layouts(ones) != layouts(others):
        assert found[0] is not found[2]
    elif None not in layouts(ones):
        assert found[0] is found[2]


@given(st.lists(st.lists(st.sampled_from([*KINDS]), max_size=4), max_size=6))
def test_any_succession_of_batches(batches: list[list[str]]) -> None:
    """Whatever came before, a plan fits its batch: its leaves, its bytes, those that move by themselves."""
    plans = Plans()
    for kinds in batches:
        leaves = [KINDS[kind]() for kind in kinds]
        plan = plans.plan(leaves)
        plain = [leaf for leaf, layout in zip(leaves, layouts(leaves), strict=True) if layout is not None]
        assert plan.n_leaves == len(leaves)
        assert plan.n_late == len(leaves) - len(plain)
        assert plan.n_bytes == sum(leaf.numel() * leaf.element_size() for leaf in plain)


@pytest.mark.usefixtures("guard")
def test_a_tensor_changed_in_place_is_seen() -> None:
    """The same object may be another batch: resized, of another type, or in need of a gradient."""
    plans, leaf = Plans(), torch.ones(4)
    first = plans.plan([leaf])
    assert plans.plan([leaf]) is first
    leaf.resize_(8)
    assert plans.plan([leaf]).n_bytes == 32
    leaf.data = torch.ones(8, dtype=torch.float64)
    assert plans.plan([leaf]).n_bytes == 64
    leaf.requires_grad_()
    assert plans.plan([leaf]).n_late == 1


def test_plans_hold_no_batch() -> None:
    """A tensor is gone with its last user, though its plan is remembered."""
    plans, leaf = Plans(), torch.ones(4)
    gone = weakref.ref(leaf)
    plans.plan([leaf])
    plans.plan([leaf])
    del leaf
    assert gone() is None


def test_the_private_guard_is_still_there() -> None:
    """With it 64 tensors are compared in 8 us: without it they are read attribute by attribute, in 37."""
    check = alike_check([torch.ones(2), torch.ones(3)])
    assert check is not None, "gone: batches of many tensors take 30 us longer in `next`"
    assert check(torch.zeros(2), torch.zeros(3))
    assert not check(torch.zeros(2), torch.zeros(4))
