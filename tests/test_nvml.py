"""Whose memory: NVML, and telling this process from the others by what it lists."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from torchfast._bytes import MIB
from torchfast._nvml import Nvml, Unknown, _pids_are_ours, shares


class TestWhoHoldsWhat:
    """Telling this process's memory from the others' by NVML's list of processes."""

    def test_our_pid_counts_where_it_is_the_hosts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where this process sees the PIDs that NVML lists, its own entry is its own."""
        monkeypatch.setattr("torchfast._nvml._pids_are_ours", lambda _: True)
        monkeypatch.setattr("os.getpid", lambda: 7)
        assert shares({7: 100, 8: 900, 9: 50}, 1060, 60) == (100, 950, "")

    def test_alone_on_the_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A single process on the list is this one, by whatever PID: we hold memory there."""
        monkeypatch.setattr("torchfast._nvml._pids_are_ours", lambda _: False)
        assert shares({4711: 100}, 100 + 9 * MIB, 60) == (100, 0, "")

    def test_somebody_who_is_not_listed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where more is used than is listed, by more than a driver takes, the others are unknown."""
        monkeypatch.setattr("torchfast._nvml._pids_are_ours", lambda _: False)
        why = "NVML does not list all that use this GPU"
        assert shares({4711: 100}, 100 + 300 * MIB, 60) == (100, None, why)

    @pytest.mark.parametrize(
        ("listed", "why"),
        [
            ({}, "NVML lists no process on this GPU"),
            ({1: 100, 2: 100}, "NVML names processes by PIDs of the host, which this container does not see"),
            ({1: None}, "the driver does not tell NVML what each process holds"),
            ({1: 50}, "NVML's process list does not show this process"),
        ],
    )
    def test_unknown_rather_than_guessed(
        self, listed: dict[int, int | None], why: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where it cannot be told which process is ours, the reason is given and no number."""
        monkeypatch.setattr("torchfast._nvml._pids_are_ours", lambda _: False)
        with pytest.raises(Unknown) as unknown:
            shares(listed, 500, 60)
        assert str(unknown.value) == why


@pytest.mark.parametrize(
    ("namespace", "listed", "ours"),
    [
        ("pid:[4026531836]", [7, 1], True),
        ("pid:[4026531836]", [1], False),
        ("pid:[4026531836]", [7, 999_999_999], False),
        ("pid:[4026532259]", [7, 1], False),
        (None, [7, 1], False),
    ],
)
def test_whether_the_pids_are_ours(
    namespace: str | None, listed: list[int], *, ours: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """PIDs are ours in the host's namespace only, if ours is listed, and if all that are listed are here."""
    for pid in (1, 7):
        (tmp_path / str(pid)).mkdir()
    (tmp_path / "self" / "ns").mkdir(parents=True)
    if namespace is not None:
        (tmp_path / "self" / "ns" / "pid").symlink_to(namespace)
    monkeypatch.setattr("torchfast._nvml._PROC", tmp_path)
    monkeypatch.setattr("os.getpid", lambda: 7)
    assert _pids_are_ours(dict.fromkeys(listed)) is ours


class NVMLError(Exception):
    """What every NVML error is."""


class NVMLError_NotFound(NVMLError):  # noqa: N801, N818 - NVML's own name
    """What a UUID that nobody has is answered with."""


class FakeNvml(ModuleType):
    """The module `pynvml` of a machine with one GPU, or one slice of a GPU, and two processes on it."""

    NVMLError = NVMLError
    NVMLError_NotFound = NVMLError_NotFound

    def __init__(self, uuid: str) -> None:
        super().__init__("pynvml")
        self.uuid, self.has_permission = uuid, True

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's own name
        """Begin."""

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802 - NVML's own name
        """Find the GPU."""
        if uuid != self.uuid:
            raise NVMLError_NotFound("Not Found")
        return f"handle of {uuid}"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:  # noqa: N802
        """List those that compute."""
        if not self.has_permission:
            raise NVMLError("Insufficient Permissions")
        assert handle == f"handle of {self.uuid}"
        return [SimpleNamespace(pid=7, usedGpuMemory=100), SimpleNamespace(pid=8, usedGpuMemory=None)]

    def nvmlDeviceGetGraphicsRunningProcesses(self, _: str) -> list[SimpleNamespace]:  # noqa: N802
        """List those that draw; one that does both is listed twice."""
        return [SimpleNamespace(pid=7, usedGpuMemory=100), SimpleNamespace(pid=9, usedGpuMemory=50)]


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Return a GPU of the imagination that has a UUID."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="0123-abcd"))
    return torch.device("cuda", 0)


class TestNvml:
    """Reading NVML, as its Python module behaves."""

    @pytest.mark.parametrize("kind", ["GPU", "MIG"])
    def test_a_gpu_is_found_by_its_uuid(
        self, kind: str, one_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A whole GPU and a slice of one are both found by UUID; no process is counted twice."""
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(f"{kind}-0123-abcd"))
        assert Nvml(one_gpu).used_by_process() == {7: 100, 8: None, 9: 50}

    def test_nvml_that_knows_no_such_gpu(
        self, one_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A GPU that NVML does not have is unknown, in NVML's words."""
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml("GPU-other"))
        with pytest.raises(Unknown, match="NVML answers 'Not Found'"):
            Nvml(one_gpu)

    def test_nvml_that_refuses(self, one_gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where NVML refuses to list processes, as under MIG, that is the reason given."""
        fake = FakeNvml("GPU-0123-abcd")
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        nvml = Nvml(one_gpu)
        fake.has_permission = False
        with pytest.raises(Unknown, match="NVML answers 'Insufficient Permissions'"):
            nvml.used_by_process()

    def test_nvml_that_is_not_installed(self, one_gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without the package the reason says what to install."""
        monkeypatch.setitem(sys.modules, "pynvml", None)
        with pytest.raises(Unknown) as unknown:
            Nvml(one_gpu)
        assert str(unknown.value) == "nvidia-ml-py is not installed (pip install nvidia-ml-py)"

    def test_nvml_is_not_for_amd(self, one_gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        """On ROCm nobody is asked."""
        monkeypatch.setattr(torch.version, "hip", "7.0")
        with pytest.raises(Unknown, match="NVML is for NVIDIA GPUs"):
            Nvml(one_gpu)
