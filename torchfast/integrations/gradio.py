"""A `VRAMMonitor` as a gauge in a Gradio app."""

from collections.abc import Callable, Mapping
from typing import Any

from torchfast._monitor.html import gauge
from torchfast._monitor.monitor import VRAMMonitor

try:
    import gradio
except ImportError as error:
    raise ImportError(
        "torchfast.integrations.gradio builds on Gradio, which is not installed. "
        "Install it: pip install gradio"
    ) from error


def vram_gauge(
    source: VRAMMonitor | Callable[[], Mapping[str, Any] | None], /, *, every_s: float = 1.0, **options: Any
) -> gradio.HTML:
    """Return a component that shows who holds the memory, renewed every `every_s` seconds.

    Call it inside `gradio.Blocks()`. It is one small HTML text a tick, without scripts, and reads the memory
    once a tick for each open page; nothing is forked. It looks right in Gradio's light and dark mode.

    Example:
        >>> import gradio  # doctest: +SKIP
        >>> from torchfast import VRAMMonitor
        >>> from torchfast.integrations.gradio import vram_gauge  # doctest: +SKIP
        >>> vram = VRAMMonitor()
        >>> with gradio.Blocks() as app:  # doctest: +SKIP
        ...     vram_gauge(vram)

    Args:
        source: a monitor in this process; or a function that returns the latest `vram.status()`, where the
            training runs in another process, and None while there is none.
        every_s: seconds between two renewals.
        options: what `gradio.HTML` takes beside the value, such as `label`.
    """
    read = source.status if isinstance(source, VRAMMonitor) else source

    def render() -> str:
        status = read()
        return "no training is running" if status is None else gauge(status)

    return gradio.HTML(value=render, every=gradio.Timer(every_s), **options)
