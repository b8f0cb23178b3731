"""A `VRAMMonitor` in a notebook, renewed while a cell runs."""

from collections.abc import Iterator
from contextlib import contextmanager

from torchfast._monitor.monitor import VRAMMonitor
from torchfast.integrations._repeat import repeating

try:
    from IPython.display import display
except ImportError as error:
    raise ImportError(
        "torchfast.integrations.notebook shows a monitor through IPython, which is not installed. "
        "Install it: pip install ipython"
    ) from error


@contextmanager
def live_view(vram: VRAMMonitor, /, *, every_s: float = 1.0) -> Iterator[None]:
    """Show gauge, timeline and phases below the cell, renewed while the block runs.

    Without `live_view` a monitor that is a cell's last expression is shown once. The output is self-contained
    and holds no tensors: a saved notebook shows the last state.

    Example:
        >>> from torchfast import VRAMMonitor
        >>> from torchfast.integrations.notebook import live_view
        >>> with VRAMMonitor("cpu") as vram, live_view(vram):  # doctest: +SKIP
        ...     train()

    Args:
        vram: the monitor to show.
        every_s: seconds between two renewals.
    """
    handle = display(vram, display_id=True)
    if handle is None:  # outside of IPython nothing can be renewed; the display itself has printed a line
        yield
        return
    with repeating(lambda: handle.update(vram), every_s):
        yield
