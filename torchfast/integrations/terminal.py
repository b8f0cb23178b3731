"""A `VRAMMonitor` as a line in the terminal that renews itself."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from torchfast._monitor.monitor import VRAMMonitor
from torchfast.integrations._repeat import afterwards, repeating


@contextmanager
def live_line(vram: VRAMMonitor, /, *, every_s: float = 1.0, stream: TextIO | None = None) -> Iterator[None]:
    """Show the memory now and the peak in one line of the terminal while the block runs.

    Into a file or a pipe, where a line cannot be renewed, it writes only the last one. Beside a progress bar
    use `bar.set_postfix_str(vram.line())` instead: two lines cannot renew themselves in one place.

    Example:
        >>> import io
        >>> from torchfast import VRAMMonitor
        >>> from torchfast.integrations.terminal import live_line
        >>> log = io.StringIO()
        >>> with VRAMMonitor("cpu") as vram, live_line(vram, stream=log):
        ...     pass
        >>> print(log.getvalue().split()[0])
        host

    Args:
        vram: the monitor to show.
        every_s: seconds between two renewals.
        stream: where to write; None is standard error.
    """
    out = sys.stderr if stream is None else stream
    width = 0

    def show() -> None:
        nonlocal width
        text = vram.line()
        # Spaces cover what is left of a longer line before.
        out.write(f"\r{text:<{width}}")
        out.flush()
        width = len(text)

    if out.isatty():
        with afterwards(lambda: out.write("\n")), repeating(show, every_s):
            yield
    else:
        with afterwards(lambda: out.write(f"{vram.line()}\n")):
            yield
