"""Hypothesis strategies for what users hand to the library."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

Pair = namedtuple("Pair", ["first", "second"])  # noqa: PYI024  the untyped form is what old code yields


@dataclass(frozen=True)
class Sample:
    """A frozen dataclass with a field that its constructor does not take."""

    image: Any
    name: str = "sample"
    extra: Any = field(default=None, init=False)


@dataclass(slots=True)
class Slotted:
    """A dataclass without a `__dict__`."""

    image: Any
    label: Any


class Encoding(UserDict[str, Any]):
    """What tokenizers return: a mapping with attributes of its own and a `.to`."""

    def __init__(self, data: Mapping[str, Any], n_sequences: int = 1) -> None:
        super().__init__(data)
        self.n_sequences = n_sequences

    def to(self, device: torch.device) -> "Encoding":
        """Move in place, as `BatchEncoding` does."""
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


def tensors() -> st.SearchStrategy[torch.Tensor]:
    """Small tensors of several types and ranks, empty ones among them."""
    shapes = st.lists(st.integers(0, 3), max_size=4)
    types = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
    return st.builds(lambda shape, dtype: torch.ones(shape).to(dtype), shapes, types)


def batches() -> st.SearchStrategy[Any]:
    """Nested batches: every container that the walk knows around tensors, numbers, text and None."""
    leaves = tensors() | st.none() | st.integers() | st.text(max_size=3)
    keys = st.sampled_from(["image", "label", "mask", "meta"])

    def containers(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        mappings = st.dictionaries(keys, parts, max_size=3)
        return st.one_of(
            st.lists(parts, max_size=3),
            st.lists(parts, max_size=3).map(tuple),
            st.builds(Pair, parts, parts),
            st.builds(Sample, parts),
            st.builds(Slotted, parts, parts),
            mappings,
            mappings.map(OrderedDict),
            mappings.map(lambda data: defaultdict(list, data)),
            mappings.map(Encoding),
        )

    return st.recursive(leaves, containers, max_leaves=8)
