"""A `VRAMMonitor` for Prometheus."""

from collections.abc import Iterator

from torchfast._monitor.monitor import VRAMMonitor

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        "torchfast.integrations.prometheus exports through prometheus_client, which is not installed. "
        "Install it: pip install prometheus-client"
    ) from error


class VRAMCollector(Collector):
    """What a monitor knows, read anew at each scrape.

    Register it, and serve it as you serve your other metrics. What is not known is left out.

    Example:
        >>> from prometheus_client import CollectorRegistry, generate_latest
        >>> from torchfast import VRAMMonitor
        >>> from torchfast.integrations.prometheus import VRAMCollector
        >>> registry = CollectorRegistry()  # prometheus_client.REGISTRY is the usual one
        >>> with VRAMMonitor("cpu") as vram:
        ...     registry.register(VRAMCollector(vram))
        ...     text = generate_latest(registry).decode()
        >>> "torchfast_memory_bytes" in text
        True
    """

    def __init__(self, vram: VRAMMonitor, /) -> None:
        self._vram = vram

    def describe(self) -> Iterator[Metric]:
        """Name the metrics without reading any."""
        for name, text, labels in _GAUGES:
            yield GaugeMetricFamily(name, text, labels=labels)
        for name, text in _COUNTERS.values():
            yield CounterMetricFamily(name, text, labels=["device"])

    def collect(self) -> Iterator[Metric]:
        """Read every source and yield the metrics."""
        status = self._vram.status()
        device = str(status["device"])
        now = {name: status[name] for name in status if name.endswith("_bytes")}
        peak = {name: value for name, value in status["peak"].items() if name.endswith("_bytes")}
        phases = {name: phase["peak_allocated_bytes"] for name, phase in status["phases"].items()}
        for (name, text, labels), numbers in zip(_GAUGES, (now, peak, phases), strict=True):
            gauge = GaugeMetricFamily(name, text, labels=labels)
            for part, n_bytes in numbers.items():
                if n_bytes is not None:
                    gauge.add_metric([device, part.removesuffix("_bytes")], n_bytes)
            yield gauge
        for key, (name, text) in _COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=["device"])
            if status[key] is not None:
                counter.add_metric([device], status[key])
            yield counter


_GAUGES = (
    ("torchfast_memory_bytes", "Memory now, by who holds it.", ["device", "kind"]),
    ("torchfast_memory_peak_bytes", "Highest memory of the run.", ["device", "kind"]),
    ("torchfast_phase_peak_bytes", "Highest allocated memory of a phase.", ["device", "phase"]),
)
_COUNTERS = {
    "n_alloc_retries": ("torchfast_alloc_retries", "Times the allocator emptied its cache to find memory."),
    "n_ooms": ("torchfast_ooms", "Times the allocator ran out of memory."),
}
