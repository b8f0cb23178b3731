"""Outputs of modules inside the teacher, by name."""

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import nn

from torchfast._teacher.closeness import versions
from torchfast._tree import map_tensors


class TeacherOutputs(NamedTuple):
    """What a teacher with `features=` returns.

    Example:
        >>> import torch
        >>> from torchfast import GPUTeacher
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> logits, features = GPUTeacher(net, "cpu", features=["0"])(torch.zeros(3, 4))
        >>> logits.shape, features["0"].shape
        (torch.Size([3, 2]), torch.Size([3, 8]))

    Attributes:
        outputs: the module's outputs; None with `outputs=False`.
        features: the outputs of the named modules inside it, by name.
    """

    outputs: Any
    features: dict[str, Any]


class _EnoughError(BaseException):
    """All that was asked for is there: the rest of the forward pass is for nobody."""


class Taps:
    """Catches what named modules return while the teacher runs, and stops it when nothing more is needed."""

    def __init__(self, module: nn.Module, names: Sequence[str], *, outputs: bool) -> None:
        self._names = tuple(dict.fromkeys(names))
        self._outputs = outputs
        self._found: dict[int, dict[str, Any]] = {}  # by thread: two may call the same teacher
        self._copied: set[str] = set()
        modules = dict(module.named_modules())
        for name in self._names:
            if name not in modules or not name:
                raise _no_such_module(name, module)
            modules[name].register_forward_hook(partial(self._catch, name))
        for layer in modules.values():
            if getattr(layer, "inplace", None) is True:
                layer.inplace = False  # it would overwrite the feature before it

    def run(self, forward: Callable[[], Any], /) -> TeacherOutputs:
        """Run the teacher's forward and return what was asked for.

        A feature that the forward changes in place after its module returned it is found out by its version
        counter; then the pass is run again, with a copy taken in time, from now on.
        """
        while True:
            self._found[get_ident()] = {}
            try:
                outputs = forward()
            except _EnoughError:
                outputs = None
            finally:  # out of memory, too: what was caught is in the way of the next attempt
                found = self._found.pop(get_ident())
            missing = [name for name in self._names if name not in found]
            if missing:
                raise RuntimeError(
                    f"the teacher's forward did not call {missing[0]!r}, which features= asks for, on these "
                    "inputs. Ask for a module that takes part in every forward."
                )
            changed = {name for name, (value, version) in found.items() if versions(value) != version}
            if not changed:
                return TeacherOutputs(outputs, {name: found[name][0] for name in self._names})
            self._copied |= changed

    def _catch(self, name: str, _module: nn.Module, _args: object, output: Any) -> None:
        found = self._found.get(get_ident())
        if found is None or name in found:
            return  # not called by the teacher, or called again: the first call counts
        value = map_tensors(torch.clone, output) if name in self._copied else output
        found[name] = value, versions(value)
        if not self._outputs and len(found) == len(self._names):
            raise _EnoughError


def _no_such_module(name: str, module: nn.Module) -> ValueError:
    names = [known for known, _ in module.named_modules() if known]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
    return ValueError(
        f"features={name!r} was asked for, but {type(module).__name__} has no module of that name. "
        f"It has, among others: {', '.join(close)}."
    )
