"""Recognising out-of-memory errors: every text of the catalogue, and what only looks like one."""

import builtins
import errno
import json
import operator
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed

from torchfast._bytes import GIB, KIB, MIB
from torchfast._memory import Room
from torchfast._oom_errors import classify, is_memory_short

TEXTS: dict[str, list[dict[str, Any]]] = json.loads((Path(__file__).parent / "oom_texts.json").read_text())


def make(case: dict[str, Any]) -> BaseException:
    """Return the error of a case, as the library that raises it would make it."""
    name: str = case["type"]
    if name.startswith("torch."):
        error_type = operator.attrgetter(name.removeprefix("torch."))(torch)
    else:
        error_type = getattr(builtins, name)
    error: BaseException = error_type(case["text"])
    return error


def text_of(name: str) -> str:
    """Return the text of the case with this name."""
    text: str = next(case["text"] for case in TEXTS["errors"] if case["case"] == name)
    return text


CUDA_NOW = text_of("CUDA allocator, 2.1 and later")


def test_catalogue_is_whole() -> None:
    """The catalogue has the 28 texts that the peers' detectors were measured with."""
    assert sum(case["in_catalogue"] for case in TEXTS["errors"]) == 28


@pytest.mark.parametrize("case", TEXTS["errors"], ids=lambda case: case["case"])
def test_recognised(case: dict[str, Any]) -> None:
    """Each known text is recognised on a full device, with its kind and whether a retry may help."""
    record = classify(make(case), memory_is_short=lambda: True)
    assert record is not None
    assert (record.kind, record.retryable) == (case["kind"], case["retryable"])


FOOTER = """
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be \
incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""
"""What PyTorch adds to each error of CUDA's."""


OF_CUDA = [case for case in TEXTS["errors"] + TEXTS["look_alikes"] if "CUDA error" in case["text"]]


@pytest.mark.parametrize("case", OF_CUDA, ids=lambda case: case["case"])
def test_what_pytorch_adds_to_a_text_changes_nothing(case: dict[str, Any]) -> None:
    """Its advice speaks of device-side assertions, whatever the error was."""
    found = [
        classify(make({**case, "text": text}), memory_is_short=lambda: True)
        for text in (case["text"], case["text"].rstrip("\n") + FOOTER)
    ]
    kinds = [record and (record.kind, record.retryable) for record in found]
    assert kinds[0] == kinds[1]


def test_an_error_code_counts_where_it_is_cudas() -> None:
    """In PyTorch's own type; an error of somebody else may number its own."""

    class NumberedError(RuntimeError):
        error_code = 2

    assert classify(NumberedError("the printer is on fire"), memory_is_short=lambda: True) is None
    error = torch.AcceleratorError("something about the driver")
    error.error_code = 2  # type: ignore[attr-defined]  # of which the stubs do not know
    record = classify(error, memory_is_short=lambda: True)
    assert record is not None
    assert record.kind == "device"


@pytest.mark.parametrize("case", TEXTS["look_alikes"], ids=lambda case: case["case"])
def test_look_alikes_are_not(case: dict[str, Any]) -> None:
    """What only speaks of memory, or breaks the device, is not an out-of-memory error."""
    assert classify(make(case), memory_is_short=lambda: False) is None


def test_errors_of_the_operating_system() -> None:
    """A fork that finds no memory is an out-of-memory error, a full disk is not."""
    assert classify(OSError(errno.ENOMEM, "Cannot allocate memory")) is not None
    assert classify(OSError(errno.ENOSPC, "No space left on device")) is None


def test_only_texts_with_two_meanings_ask_for_evidence() -> None:
    """Of the catalogue, only cuDNN's "not supported" and CUDA's bare error depend on the memory left."""
    changed = []
    for case in TEXTS["errors"]:
        record = classify(make(case), memory_is_short=lambda: False)
        if record is None or record.kind != case["kind"]:
            changed.append(case["case"])
    assert changed == ["cuDNN, not supported, on a full device"]


def test_numbers_of_todays_text() -> None:
    """Every number that the allocator prints is in the record, in bytes."""
    record = classify(torch.OutOfMemoryError(CUDA_NOW))
    assert record is not None
    assert record.device == torch.device("cuda", 1)
    assert record.requested_bytes == 2 * GIB
    assert record.free_bytes == int(1.2 * GIB)
    assert record.total_bytes == int(79.33 * GIB)
    assert record.allocated_bytes == 60 * GIB
    assert record.reserved_bytes == int(66.5 * GIB)
    assert record.private_pool_bytes == 3 * GIB
    assert record.allowed_bytes == 68 * GIB
    assert record.other_processes_bytes == 10 * GIB + 512 * MIB
    assert (record.confidence, record.text) == ("certain", CUDA_NOW)


def test_numbers_of_other_texts() -> None:
    """The texts of older versions and other backends give what they say."""
    then = classify(RuntimeError(text_of("CUDA allocator, before 2.1")))
    in_order = classify(torch.OutOfMemoryError(text_of("cudaMallocAsync")))
    host, mps = classify(RuntimeError(text_of("host, Linux"))), classify(RuntimeError(text_of("MPS")))
    assert then is not None
    assert (then.requested_bytes, then.reserved_bytes) == (130 * MIB, int(6.09 * GIB))
    assert in_order is not None
    assert (in_order.requested_bytes, in_order.allowed_bytes) == (320 * MIB, None)
    assert in_order.total_bytes == int(23.69 * GIB)
    assert host is not None
    assert (host.requested_bytes, host.device) == (4_000_000_000_000, torch.device("cpu"))
    assert mps is not None
    assert (mps.allocated_bytes, mps.allowed_bytes) == (int(5.05 * GIB), int(9.07 * GIB))


def test_own_process_in_a_container_is_not_another() -> None:
    """Where this process is listed under a foreign number, it does not count as another process."""
    record = classify(torch.OutOfMemoryError(text_of("CUDA allocator in a container")))
    assert record is not None
    assert record.other_processes_bytes == int(14.91 * GIB)
    assert (record.free_bytes, record.requested_bytes) == (0, 64 * KIB)


def caused() -> BaseException:
    """Return an error raised from an out-of-memory error."""
    error = ValueError("batch 7 failed")
    error.__cause__ = torch.OutOfMemoryError(CUDA_NOW)
    return error


def grouped() -> BaseException:
    """Return a group with an out-of-memory error deep inside."""
    return ExceptionGroup("two", [TypeError("no"), ExceptionGroup("one", [torch.OutOfMemoryError(CUDA_NOW)])])


def in_context() -> BaseException:
    """Return a `RuntimeError` raised while handling an out-of-memory error."""
    error = RuntimeError("cleaning up failed")
    error.__context__ = torch.OutOfMemoryError(CUDA_NOW)
    return error


@pytest.mark.parametrize(
    ("make", "confidence"), [(caused, "certain"), (grouped, "certain"), (in_context, "likely")]
)
def test_found_behind_other_errors(make: Callable[[], BaseException], confidence: str) -> None:
    """Causes, groups and, less surely, contexts are looked through."""
    record = classify(make())
    assert record is not None
    assert (record.kind, record.confidence) == ("device", confidence)


def test_bug_while_handling_is_no_oom() -> None:
    """A `KeyError` raised while handling an out-of-memory error is a bug of its own."""
    error = KeyError("missing")
    error.__context__ = torch.OutOfMemoryError(CUDA_NOW)
    assert classify(error) is None


def test_circular_chains_end() -> None:
    """A chain that bites its tail is walked once."""
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__context__, second.__context__ = second, first
    assert classify(first) is None


def test_error_code_of_the_runtime_counts() -> None:
    """CUDA's error 2 is recognised by its number, whatever the text."""
    error = torch.AcceleratorError("anything")
    setattr(error, "error_code", 2)  # noqa: B010 -- C++ sets it; the stubs do not know it
    record = classify(error)
    assert record is not None
    assert record.kind == "device"


def test_real_host_errors_of_this_pytorch() -> None:
    """The errors that this PyTorch and this NumPy raise for 2**60 bytes are recognised."""
    with pytest.raises(RuntimeError) as torch_error:
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(MemoryError) as numpy_error:
        np.empty(2**60, dtype=np.uint8)
    for error in (torch_error.value, numpy_error.value):
        record = classify(error)
        assert record is not None
        assert (record.kind, record.requested_bytes) == ("host", 2**60)


def test_no_evidence_without_a_device() -> None:
    """Asking for evidence on a machine whose CUDA was never used neither initialises it nor says yes."""
    script = (
        "import json, torch; from torchfast._oom_errors import is_memory_short; "
        "print(json.dumps([is_memory_short(), torch.cuda.is_initialized()]))"
    )
    answer = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert json.loads(answer.stdout) == [False, False]


@pytest.mark.parametrize(("untaken_bytes", "is_short"), [(GIB, True), (3 * GIB, False)])
def test_a_little_left_is_short(
    monkeypatch: pytest.MonkeyPatch, untaken_bytes: int, *, is_short: bool
) -> None:
    """Less than a twentieth of what this process may have is taken as evidence."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr("torchfast._memory.room_on", lambda _: Room(40 * GIB, 30 * GIB, untaken_bytes))
    assert is_memory_short(torch.device("cuda", 0)) is is_short
