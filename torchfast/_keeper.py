"""The parts of a batch without tensors, kept from whoever writes into them."""

import operator
import sys
from collections import OrderedDict, defaultdict
from typing import Any

from torchfast._tree import like


class Keeper:
    """Copies the plain data of one batch, to where nobody else writes over it; not any other object.

    Arrays that are files, of a class of their own, are left alone too: they may be the whole dataset.
    """

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Any, Any]] = {}
        """Each part that was asked for, held so that no other takes its address, and what became of it."""
        numpy = sys.modules.get("numpy")
        self._flat = (set, bytearray) if numpy is None else (set, bytearray, numpy.ndarray)

    def __call__(self, part: Any, /) -> Any:
        """Return the part, or a copy if it is plain: the same one wherever it occurs."""
        if id(part) not in self._copies:
            self._copies[id(part)] = part, self._copied(part)
        _, twin = self._copies[id(part)]
        return twin

    def _copied(self, part: Any) -> Any:
        kind = type(part)
        if kind in self._flat:
            return part.copy()
        if kind is list:
            return [*map(self, part)]
        if isinstance(part, tuple):
            items = [*map(self, part)]
            return part if all(map(operator.is_, items, part)) else like(part, items)
        if kind in (dict, OrderedDict, defaultdict):
            twin = part.copy()
            twin.update({key: self(value) for key, value in part.items()})
            return twin
        return part
