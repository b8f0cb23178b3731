"""A bounded history that forgets no extreme."""

import dataclasses
from typing import Any

from torchfast._monitor.sample import VRAMSample, highest, lowest


@dataclasses.dataclass(frozen=True, slots=True)
class VRAMSpan:
    """What happened in a stretch of time: each number's lowest and highest value among `n_samples` samples.

    `low` and `high` are no moments: the lowest `free_bytes` and the lowest `tensors_bytes` may be of
    different samples. Their `phase` is that of the sample with the most tensors.
    """

    start_s: float
    end_s: float
    n_samples: int
    low: VRAMSample
    high: VRAMSample

    @property
    def highest_used_bytes(self) -> int | None:
        """The most that all processes together used of the device."""
        if self.high.total_bytes is None or self.low.free_bytes is None:
            return None
        return self.high.total_bytes - self.low.free_bytes


class History:
    """Spans of time, each of one sample at first.

    When there are `max_spans`, neighbours are merged in pairs: the resolution halves, and every extreme
    stays. So the memory that a run needs does not grow with its length.
    """

    def __init__(self, max_spans: int) -> None:
        self._max_spans = max_spans
        self._n_per_span = 1
        self._spans: list[VRAMSpan] = []

    def add(self, sample: VRAMSample) -> None:
        """Append a sample; the last span takes it in until it holds as many as the others."""
        span = VRAMSpan(sample.time_s, sample.time_s, 1, sample, sample)
        if self._spans and self._spans[-1].n_samples < self._n_per_span:
            self._spans[-1] = _merge(self._spans[-1], span)
            return
        if len(self._spans) >= self._max_spans:
            even = self._spans if len(self._spans) % 2 == 0 else self._spans[:-1]
            merged = [_merge(*pair) for pair in zip(even[::2], even[1::2], strict=True)]
            self._spans = merged + self._spans[len(even) :]
            self._n_per_span *= 2
        self._spans.append(span)

    @property
    def spans(self) -> tuple[VRAMSpan, ...]:
        """The spans, oldest first."""
        return tuple(self._spans)


_NUMBERS = tuple(
    field.name
    for field in dataclasses.fields(VRAMSample)
    if field.name not in ("time_s", "device", "phase", "sources")
)


def _merge(one: VRAMSpan, two: VRAMSpan) -> VRAMSpan:
    fuller = max(one.high, two.high, key=lambda sample: sample.tensors_bytes or 0)
    low: dict[str, Any] = {
        name: lowest((getattr(one.low, name), getattr(two.low, name))) for name in _NUMBERS
    }
    high: dict[str, Any] = {
        name: highest((getattr(one.high, name), getattr(two.high, name))) for name in _NUMBERS
    }
    return VRAMSpan(
        one.start_s,
        two.end_s,
        one.n_samples + two.n_samples,
        dataclasses.replace(fuller, time_s=one.start_s, **low),
        dataclasses.replace(fuller, time_s=one.start_s, **high),
    )
