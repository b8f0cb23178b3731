"""The walk over nested batches."""

import dataclasses
from collections import UserDict, defaultdict
from collections.abc import Iterator, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any, Self, cast

import pytest
import torch
from hypothesis import given
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from tests.strategies import Encoding, Pair, Sample, batches
from torchfast._tree import flatten, map_tensors, places, tensors


def same(left: Any, right: Any) -> bool:
    """Whether two batches have the same types, contents and tensors, tensors by identity."""
    if isinstance(left, torch.Tensor):
        return left is right
    if type(left) is not type(right):
        return False
    if isinstance(left, (dict, UserDict)):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if hasattr(left, "__dataclass_fields__"):
        return all(same(getattr(left, name), getattr(right, name)) for name in left.__dataclass_fields__)
    return bool(left == right)


@given(batches())
def test_round_trip(batch: Any) -> None:
    """A batch put together from its own leaves is the same batch."""
    leaves, structure = flatten(batch)
    assert same(structure.rebuild(leaves), batch)


@given(batches())
def test_map_reaches_every_tensor_and_changes_no_container(batch: Any) -> None:
    """Mapping a clone gives equal tensors, none of them shared, and leaves the original as it was."""
    before = tensors(batch)
    mapped = map_tensors(torch.clone, batch)
    after = tensors(mapped)
    assert len(before) == len(after)
    assert all(new is not old and torch.equal(new, old) for new, old in zip(after, before, strict=True))
    assert all(new is old for new, old in zip(tensors(batch), before, strict=True))


@given(batches())
def test_mapping_composes(batch: Any) -> None:
    """Mapping twice equals mapping the composition once."""
    twice = map_tensors(torch.neg, map_tensors(torch.Tensor.float, batch))
    once = map_tensors(lambda tensor: tensor.float().neg(), batch)
    assert all(torch.equal(a, b) for a, b in zip(tensors(twice), tensors(once), strict=True))


@given(batches())
def test_places_lead_to_the_leaves(batch: Any) -> None:
    """Whoever follows the keys of each place meets the leaves, in the order of `flatten`."""

    def follow(part: Any, place: tuple[Any, ...]) -> Any:
        for key in place:
            part = getattr(part, key) if dataclasses.is_dataclass(part) else part[key]
        return part

    met = [follow(batch, place) for place in places(batch)]
    first_met = list({id(leaf): leaf for leaf in met}.values())
    leaves, _ = flatten(batch)
    assert len(first_met) == len(leaves)
    assert all(here is there for here, there in zip(first_met, leaves, strict=True))


def test_aliases_stay_aliases() -> None:
    """A tensor that occurs twice is mapped once and occurs twice in the result."""
    shared = torch.ones(2)
    batch: Any = {"input": shared, "target": [shared]}
    mapped = map_tensors(torch.clone, batch)
    assert mapped["input"] is mapped["target"][0]
    assert mapped["input"] is not shared


def test_parts_without_tensors_are_the_same_objects() -> None:
    """Metadata travels through as the very object that it was."""
    meta, size = {"names": ["a", "b"]}, torch.Size([1, 2])
    batch = map_tensors(torch.clone, {"image": torch.ones(1), "meta": meta, "size": size})
    assert batch["meta"] is meta
    assert batch["size"] is size


def test_containers_keep_what_a_constructor_would_lose() -> None:
    """Default factories, named fields, fields set after construction, and attributes survive."""
    sample = Sample(torch.ones(1))
    object.__setattr__(sample, "extra", torch.zeros(1))
    batch: Any = {
        "factory": defaultdict(list, image=[torch.ones(1)]),
        "pair": Pair(torch.ones(1), 2),
        "sample": sample,
        "encoding": Encoding({"ids": torch.ones(1)}, n_sequences=7),
        "proxy": MappingProxyType({"ids": torch.ones(1)}),
    }
    mapped = map_tensors(torch.neg, batch)
    assert mapped["factory"].default_factory is list
    assert mapped["pair"].first.item() == -1
    assert (mapped["sample"].name, mapped["sample"].extra.item()) == ("sample", 0)
    assert (mapped["encoding"].n_sequences, mapped["encoding"]["ids"].item()) == (7, -1)
    assert mapped["proxy"]["ids"].item() == -1
    assert batch["encoding"]["ids"].item() == 1


def test_a_dict_that_is_its_own_place_of_attributes_stays_so() -> None:
    """What is read as an attribute is what is read as an item."""

    class Attributes(dict[str, Any]):
        def __init__(self, **items: Any) -> None:
            super().__init__(**items)
            self.__dict__ = self

    class Setting(dict[str, Any]):
        """One in which to set an attribute is to set an item."""

        __setattr__ = dict.__setitem__

        def __init__(self, **items: Any) -> None:
            super().__init__(**items)
            object.__setattr__(self, "__dict__", self)

    for kind in (Attributes, Setting):
        batch: Any = kind(image=torch.ones(1), name="a")
        mapped = map_tensors(torch.neg, map_tensors(torch.neg, batch))
        assert mapped.image is mapped["image"]
        assert (mapped.image.item(), mapped.name, [*mapped]) == (1, "a", ["image", "name"])
        assert map_tensors(torch.neg, batch).image.item() == -batch.image.item() == -1


def test_what_was_derived_from_fields_is_derived_anew() -> None:
    """A cached property of a dataclass does not go on telling of the fields as they were."""

    @dataclasses.dataclass
    class Tokens:
        ids: torch.Tensor

        @cached_property
        def first(self) -> torch.Tensor:
            return self.ids[0]

    batch = Tokens(torch.ones(2))
    assert batch.first.item() == 1
    mapped = map_tensors(torch.neg, batch)
    assert (mapped.first.item(), batch.first.item()) == (-1, 1)


class Two(tuple[torch.Tensor, str]):  # noqa: SLOT001 - it has attributes
    """A tuple whose constructor takes its items one by one."""

    def __new__(cls, first: torch.Tensor, second: str) -> Self:
        """Make one of two items."""
        return super().__new__(cls, (first, second))


class NamedPair(Pair):
    """A named tuple with room for attributes."""

    @cached_property
    def negative(self) -> torch.Tensor:
        """Return what is derived from the first."""
        return -cast(torch.Tensor, self.first)


def test_tuples_of_a_kind_of_their_own_are_made_again() -> None:
    """Whatever their constructors take, and with their attributes."""
    two = Two(torch.ones(1), "a")
    two.extra = 7  # type: ignore[attr-defined]
    pair = NamedPair(torch.ones(1), 2)
    pair.extra = 8  # type: ignore[attr-defined]
    assert pair.negative.item() == -1
    found = torch.ones(1).max(dim=0)
    mapped: Any = map_tensors(torch.neg, [two, pair, found])
    assert [type(part) for part in mapped] == [Two, NamedPair, type(found)]
    assert [part[0].item() for part in mapped] == [-1, -1, -1]
    assert (mapped[0][1], mapped[0].extra, mapped[1].extra) == ("a", 7, 8)
    assert mapped[1].negative.item() == 1


def test_immutable_containers_are_made_anew() -> None:
    """A dict or a list that cannot be set is built from the items."""
    from torch.fx.immutable_collections import immutable_dict, immutable_list

    batch: Any = immutable_dict({"images": immutable_list([torch.ones(1), 2]), "name": "a"})
    mapped = map_tensors(torch.neg, batch)
    assert (type(mapped), type(mapped["images"])) == (immutable_dict, immutable_list)
    assert (mapped["images"][0].item(), mapped["images"][1], mapped["name"]) == (-1, 2, "a")


def test_an_object_whose_attributes_raise_what_they_like_passes_through() -> None:
    """Asking for .to must not fail for what has none."""

    class Odd:
        def __getattr__(self, name: str) -> Any:
            raise KeyError(name)

    odd = Odd()
    leaves, structure = flatten({"odd": odd, "image": torch.ones(1)})
    assert len(leaves) == 1
    assert structure.rebuild(leaves)["odd"] is odd


def test_parts_without_leaves_can_be_kept_otherwise() -> None:
    """Each is replaced, as a whole, by what `keep` makes of it; what holds a leaf is walked on."""
    names, meta, asked = ["a", "b"], {"names": ["c"], "n": 2}, list[Any]()
    batch: Any = {"image": torch.ones(1), "meta": meta, "pair": (names, torch.ones(1))}

    def keep(part: Any) -> Any:
        asked.append(part)
        return "kept" if part is names else part

    leaves, structure = flatten(batch, keep=keep)
    rebuilt = structure.rebuild(leaves)
    assert asked == [names, meta]
    assert rebuilt["pair"][0] == "kept"
    assert rebuilt["meta"] is meta
    assert rebuilt["image"] is batch["image"]
    alone, structure = flatten(names, keep=keep)
    assert (alone, structure.rebuild([])) == ([], "kept")


def test_what_moves_itself_is_one_leaf() -> None:
    """A PackedSequence is handed over whole: its lengths must stay on the CPU, and only it knows."""
    packed = pack_sequence([torch.ones(2), torch.ones(1)])
    leaves, structure = flatten([packed, torch.zeros(1)])
    assert leaves[0] is packed
    assert isinstance(structure.rebuild(leaves)[0], PackedSequence)


def test_other_mappings_are_walked() -> None:
    """Any mapping that can be built from a dict is a container."""

    class Frozen(Mapping[str, Any]):
        def __init__(self, data: Mapping[str, Any]) -> None:
            self._data = dict(data)

        def __getitem__(self, key: str) -> Any:
            return self._data[key]

        def __iter__(self) -> Iterator[str]:
            return iter(self._data)

        def __len__(self) -> int:
            return len(self._data)

    mapped = map_tensors(torch.neg, Frozen({"a": torch.ones(1), "b": "text"}))
    assert isinstance(mapped, Frozen)
    assert (mapped["a"].item(), mapped["b"]) == (-1, "text")


def test_a_batch_that_contains_itself_is_refused() -> None:
    """A cycle is an error, not an endless walk."""
    batch: list[Any] = [torch.ones(1)]
    batch.append(batch)
    with pytest.raises(ValueError, match="contains itself"):
        flatten(batch)


def test_a_wrong_number_of_leaves_is_refused() -> None:
    """A structure takes exactly as many leaves as it gave."""
    leaves, structure = flatten([torch.ones(1), torch.ones(1)])
    with pytest.raises(ValueError, match="has 2 leaves, 1 were given"):
        structure.rebuild(leaves[:1])
