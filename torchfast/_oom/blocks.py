"""Which names the block of a `with` statement may bind, read from the bytecode.

What a guard notes when it is entered, it notes for these names only: a handful, however many variables the
function has. Private to CPython and kept in this file: where a `with` statement enters, and that its block is
what the exception table protects with the statement's handler.
"""

import dis
from collections.abc import Iterator, Sequence
from types import CodeType

_MAX_BLOCKS = 1024
_known: dict[tuple[int, int], tuple[CodeType, tuple[str, ...] | None]] = {}


def names_bound(code: CodeType, at: int, /) -> tuple[str, ...] | None:
    """Return the names that the block entered at offset `at` may bind; None where that cannot be told.

    Those that inner functions may bind are among them. They are told once for each block.
    """
    # By its id, which is not used again while the code is kept: its hash would take all its constants.
    known = _known.get((id(code), at))
    if known is None:
        if len(_known) >= _MAX_BLOCKS:  # cells of a notebook
            _known.clear()
        known = _known[id(code), at] = code, _names_bound(code, at)
    return known[1]


def _names_bound(code: CodeType, at: int) -> tuple[str, ...] | None:
    instructions = list(dis.get_instructions(code))
    index = next((i for i, instruction in enumerate(instructions) if instruction.offset == at), None)
    if index is None or not _enters(instructions[: index + 1]):
        return None
    protected = _protected(code, instructions, instructions[index + 1].offset)
    if protected is None:
        return None
    start, end = protected
    inside = (i for i in instructions if start <= i.offset < end)
    bound = {name for instruction in inside for name in _names_of(instruction)}
    return tuple(dict.fromkeys([*code.co_cellvars, *code.co_freevars, *sorted(bound)]))


def _enters(instructions: Sequence[dis.Instruction]) -> bool:
    """Say whether the last of these instructions calls the `__enter__` of a `with` statement."""
    if instructions[-1].opname == "BEFORE_WITH":  # until Python 3.13
        return True
    return [i.opname for i in instructions[-2:]] == ["LOAD_SPECIAL", "CALL"]


def _protected(code: CodeType, instructions: Sequence[dis.Instruction], at: int) -> tuple[int, int] | None:
    """Return from where to where the handler of a `with` statement protects what begins at `at`."""
    entries = getattr(dis.Bytecode(code), "exception_entries", ())
    handler = next((entry.target for entry in entries if entry.start <= at < entry.end), None)
    opnames = [i.opname for i in instructions if handler is not None and i.offset >= handler]
    if "WITH_EXCEPT_START" not in opnames[:3]:
        return None
    # Nested blocks have handlers of their own, which lie within this one's reach.
    return at, max(entry.end for entry in entries if entry.target == handler)


def _names_of(instruction: dis.Instruction) -> Iterator[str]:
    if "STORE" not in instruction.opname:
        return
    argument = instruction.argval
    for name in argument if isinstance(argument, tuple) else (argument,):
        if isinstance(name, str):  # STORE_SUBSCR and STORE_SLICE bind no name
            yield name
