"""The one walk over nested batches.

A batch is any nesting of dicts, lists, tuples, named tuples, dataclasses and other mappings around tensors.
`flatten` takes it apart into its tensors and a `Structure` that puts equal ones together again:

- a tensor that occurs twice is one leaf, so aliases stay aliases;
- an object that knows how to move itself (`PackedSequence`, a TensorDict, a user's own class with `.to`) is
  one leaf too: only it knows which of its parts belong on the device;
- a part without leaves is passed through as the very same object: strings, numbers, `torch.Size`, metadata.
"""

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch

T = TypeVar("T")


@runtime_checkable
class Movable(Protocol):
    """An object that moves itself, such as `PackedSequence`."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Return the object on another device or in another type."""


Leaf = torch.Tensor | Movable
Rebuild = Callable[[Sequence[Any]], Any]
Part = int | Rebuild
"""What rebuilds a part of a batch; for a leaf its index: a closure for each is slow to make and to call."""
Keep = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Structure:
    """What is left of a batch when its leaves are taken out."""

    n_leaves: int
    _rebuild: Rebuild

    def rebuild(self, leaves: Sequence[Any], /) -> Any:
        """Return a batch of the same structure around other leaves, in the order `flatten` gave them."""
        if len(leaves) != self.n_leaves:
            raise ValueError(f"this structure has {self.n_leaves} leaves, {len(leaves)} were given")
        return self._rebuild(leaves)


def flatten(tree: Any, /, *, keep: Keep | None = None) -> tuple[list[Leaf], Structure]:
    """Take a batch apart into its distinct leaves and the structure around them.

    Args:
        tree: the batch.
        keep: what becomes of each part without leaves, as a whole; by default it stays the same object.
    """
    is_row = type(tree) in (list, tuple) and set(map(type, tree)) == {torch.Tensor}
    if is_row and len(set(map(id, tree))) == len(tree):  # the plainest of batches, in a fifth of the time
        return list(tree), Structure(len(tree), type(tree))
    leaves: list[Leaf] = []
    part = _take_apart(tree, leaves, {}, [], keep)
    if part is None:
        return leaves, Structure(0, _constant(tree if keep is None else keep(tree)))
    return leaves, Structure(len(leaves), _rebuilding(part))


def map_tensors(fn: Callable[[torch.Tensor], torch.Tensor], tree: T, /) -> T:
    """Return the batch with `fn` applied once to each distinct tensor; other leaves stay as they are."""
    leaves, structure = flatten(tree)
    mapped = [fn(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return cast(T, structure.rebuild(mapped))


def tensors(tree: Any, /) -> list[torch.Tensor]:
    """Return the distinct tensors of a batch, in the order in which they are met."""
    return [leaf for leaf in flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def places(tree: Any, /) -> list[tuple[Any, ...]]:
    """Return the keys that lead to each leaf, in the order of `flatten`; to an alias, once for each place."""
    if isinstance(tree, torch.Tensor):
        return [()]
    if _holds_nothing(tree):
        return []
    children = _children(tree)
    if children is None:
        return [()] if _is_movable(tree) else []
    return [(key, *further) for key, child in children for further in places(child)]


# Each of the following returns what rebuilds its part from the leaves, or None for a part without leaves.
# `seen` maps id(leaf) to its index; `path` holds the containers we are inside of.


def _take_apart(
    part: Any, leaves: list[Leaf], seen: dict[int, int], path: list[int], keep: Keep | None
) -> Part | None:
    if isinstance(part, torch.Tensor):
        return _leaf(part, leaves, seen)
    if _holds_nothing(part):
        return None
    children = _children(part)
    if children is None:
        return _leaf(part, leaves, seen) if _is_movable(part) else None
    if id(part) in path:
        raise ValueError(
            f"a batch must be a tree, but this {type(part).__name__} contains itself. "
            "Walking it would never end: break the cycle."
        )
    path.append(id(part))
    changing: list[tuple[Any, Part]] = []
    for key, child in children:
        is_tensor = type(child) is torch.Tensor  # most children are, and a call for each is what costs
        taken = _leaf(child, leaves, seen) if is_tensor else _take_apart(child, leaves, seen, path, keep)
        if taken is not None:
            changing.append((key, taken))
    path.pop()
    if not changing:
        return None
    return _container(part, changing if keep is None else [*changing, *_kept(part, dict(changing), keep)])


def _kept(part: Any, changing: dict[Any, Part], keep: Keep) -> Iterator[tuple[Any, Part]]:
    """Return what becomes of the children without leaves, where it is not the same object."""
    for key, child in _children(part) or ():
        if key not in changing and (kept := keep(child)) is not child:
            yield key, _constant(kept)


def _leaf(part: Leaf, leaves: list[Leaf], seen: dict[int, int]) -> int:
    index = seen.setdefault(id(part), len(leaves))
    if index == len(leaves):
        leaves.append(part)
    return index


def _rebuilding(part: Part) -> Rebuild:
    return itemgetter(part) if isinstance(part, int) else part


def _rebuilt(part: Part, new: Sequence[Any]) -> Any:
    return new[part] if isinstance(part, int) else part(new)


def _holds_nothing(part: Any) -> bool:
    return part is None or isinstance(part, (str, bytes, int, float, complex, type, torch.nn.Module))


def _is_movable(part: Any) -> bool:
    # isinstance(part, Movable) says the same, and takes 15 µs for each part of each batch.
    try:
        return callable(getattr(part, "to", None))
    except Exception:  # noqa: BLE001 - what its own __getattr__ raises: then it has no .to
        return False


def _children(part: Any) -> Iterator[tuple[Any, Any]] | None:
    """Return the keys and values of a container, or None for what is not one."""
    if type(part) in (list, tuple):
        return iter(enumerate(part))
    if not isinstance(part, (dict, UserDict)) and _is_movable(part):
        return None
    if isinstance(part, Mapping):
        return iter(part.items())
    if isinstance(part, (list, tuple)):
        return iter(enumerate(part))
    if dataclasses.is_dataclass(part):
        names = [field.name for field in dataclasses.fields(part)]
        return iter([(name, getattr(part, name)) for name in names if hasattr(part, name)])
    return None


def _container(part: Any, changing: list[tuple[Any, Part]]) -> Rebuild:
    if isinstance(part, tuple):
        return _tuple(part, changing)
    if dataclasses.is_dataclass(part) and not isinstance(part, dict):
        rebuild = _with_fields
    elif hasattr(type(part), "__setitem__"):
        rebuild = _with_items
    else:
        rebuild = _made_anew
    return lambda new: rebuild(part, [(key, _rebuilt(child, new)) for key, child in changing])


def _with_fields(part: Any, changed: list[tuple[str, Any]]) -> Any:
    twin = _twin(part)
    for name, value in changed:
        object.__setattr__(twin, name, value)  # frozen dataclasses too
    return twin


def _with_items(part: Any, changed: list[tuple[Any, Any]]) -> Any:
    try:
        twin = _twin(part)
        for key, value in changed:
            twin[key] = value
    except (TypeError, NotImplementedError):  # an immutable one, which says so only to who tries
        return _made_anew(part, changed)
    return twin


def _made_anew(part: Any, changed: list[tuple[Any, Any]]) -> Any:
    whole: Any = dict(part) if isinstance(part, Mapping) else list(part)
    for key, value in changed:
        whole[key] = value
    kind: Callable[[Any], Any] = type(part)
    return kind(whole)


def _twin(part: Any) -> Any:
    """Return a shallow copy: it keeps what a constructor would not take back, as attributes and factories.

    But not what it has derived from its fields, nor the original as the place of its attributes.
    """
    if type(part) in (dict, list):
        return part.copy()
    twin = copy.copy(part)
    if getattr(part, "__dict__", None) is part:
        object.__setattr__(twin, "__dict__", twin)
    for name in _derived(part):
        twin.__dict__.pop(name, None)
    return twin


def _derived(part: Any) -> list[str]:
    """Return the attributes that were derived from the rest, and are to be derived anew."""
    attributes = getattr(part, "__dict__", None) or ()
    return [name for name in attributes if isinstance(getattr(type(part), name, None), cached_property)]


def _tuple(part: Any, changing: list[tuple[Any, Part]]) -> Rebuild:
    def rebuild_tuple(new: Sequence[Any]) -> Any:
        items = list(part)
        for index, child in changing:
            items[index] = _rebuilt(child, new)
        return tuple(items) if type(part) is tuple else like(part, items)

    return rebuild_tuple


def like(part: Any, items: list[Any], /) -> Any:
    """Return a tuple of the same kind, with the same attributes."""
    kind = type(part)
    try:
        made = part._make(items) if hasattr(part, "_make") else kind(items)
    except TypeError:  # its constructor takes them one by one, or something else
        made = tuple.__new__(kind, items)
    if getattr(part, "__dict__", None):
        made.__dict__.update(part.__dict__)
        for name in _derived(part):
            del made.__dict__[name]
    return made


def _constant(value: Any) -> Rebuild:
    return lambda _: value
