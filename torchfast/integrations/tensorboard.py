"""A `VRAMMonitor` in TensorBoard."""

from torchfast._bytes import GIB
from torchfast._monitor.monitor import VRAMMonitor

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise ImportError(
        "torchfast.integrations.tensorboard writes through torch.utils.tensorboard, which needs a package "
        "that is not installed. Install it: pip install tensorboard"
    ) from error


def write_vram(writer: SummaryWriter, vram: VRAMMonitor, /, step: int, *, tag: str = "vram") -> None:
    """Write the memory now, the peaks of the run and those of its phases as scalars, in GiB.

    Reads every source (up to 1 ms). What is not known is not written, rather than written as zero.

    Example:
        >>> import tempfile
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> from torchfast import VRAMMonitor
        >>> from torchfast.integrations.tensorboard import write_vram
        >>> with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        ...     with VRAMMonitor("cpu") as vram:
        ...         write_vram(writer, vram, step=1)

    Args:
        writer: the writer of your run.
        vram: the monitor of your run.
        step: the step that the numbers belong to.
        tag: the group of charts; the scalars are `vram/tensors_gib`, `vram_peak/allocated_gib`,
            `vram_phase/forward_gib` and the like.
    """
    status = vram.status()
    groups = {
        tag: {name: status[name] for name in status if name.endswith("_bytes")},
        f"{tag}_peak": {name: value for name, value in status["peak"].items() if name.endswith("_bytes")},
        f"{tag}_phase": {
            f"{n}_bytes": phase["peak_allocated_bytes"] for n, phase in status["phases"].items()
        },
    }
    for group, numbers in groups.items():
        for name, n_bytes in numbers.items():
            if n_bytes is not None:
                writer.add_scalar(f"{group}/{name.removesuffix('_bytes')}_gib", n_bytes / GIB, step)
