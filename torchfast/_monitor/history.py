"""A bounded history that forgets no extreme."""

import dataclasses
import operator
from typing import Any

from torchfast._monitor.sample import VRAMSample


@dataclasses.dataclass(frozen=True, slots=True)
class VRAMSpan:
    """What happened in a stretch of time: each number's lowest and highest value among `n_samples` samples.

    `low` and `high` are no moments: the lowest `free_bytes` and the lowest `tensors_bytes` may be of
    different samples. Their `phase` is that of the sample with the most tensors.

    Example:
        >>> from torchfast import VRAMMonitor
        >>> with VRAMMonitor("cpu", interval_s=None) as vram:
        ...     _ = vram.sample()
        >>> sum(span.n_samples for span in vram.history) >= 2
        True
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


# The numbers of a sample, in the order of the tuples below.
_NUMBERS = tuple(
    field.name
    for field in dataclasses.fields(VRAMSample)
    if field.name not in ("time_s", "device", "phase", "sources")
)
_numbers_of = operator.attrgetter(*_NUMBERS)
_TENSORS = _NUMBERS.index("tensors_bytes")
Numbers = tuple[int | None, ...]


class _Span:
    """A span in the making: plain tuples, since two records a sample would cost more than the reading."""

    __slots__ = ("end_s", "fullest", "high", "low", "n_samples", "start_s")

    def __init__(self, sample: VRAMSample) -> None:
        self.start_s = self.end_s = sample.time_s
        self.n_samples = 1
        self.fullest = sample
        self.low: Numbers = _numbers_of(sample)
        self.high = self.low

    def take(self, other: "_Span") -> None:
        """Take in the span that follows."""
        if (other.high[_TENSORS] or 0) > (self.high[_TENSORS] or 0):
            self.fullest = other.fullest
        self.end_s = other.end_s
        self.n_samples += other.n_samples
        self.low = tuple(map(_lower, self.low, other.low))
        self.high = tuple(map(_higher, self.high, other.high))

    def finished(self) -> VRAMSpan:
        """Return it as a record."""
        low: dict[str, Any] = dict(zip(_NUMBERS, self.low, strict=True))
        high: dict[str, Any] = dict(zip(_NUMBERS, self.high, strict=True))
        return VRAMSpan(
            self.start_s,
            self.end_s,
            self.n_samples,
            dataclasses.replace(self.fullest, time_s=self.start_s, **low),
            dataclasses.replace(self.fullest, time_s=self.start_s, **high),
        )


class History:
    """Spans of time, each of one sample at first.

    When there are `max_spans`, neighbours are merged in pairs: the resolution halves, and every extreme
    stays. So the memory that a run needs does not grow with its length.
    """

    def __init__(self, max_spans: int) -> None:
        self._max_spans = max_spans
        self._n_per_span = 1
        self._spans: list[_Span] = []

    def add(self, sample: VRAMSample) -> None:
        """Append a sample; the last span takes it in until it holds as many as the others."""
        span = _Span(sample)
        if len(self._spans) == self._max_spans and not self._last_has_room():
            self._halve()
        if self._last_has_room():
            self._spans[-1].take(span)
        else:
            self._spans.append(span)

    @property
    def spans(self) -> tuple[VRAMSpan, ...]:
        """The spans, oldest first."""
        return tuple(span.finished() for span in self._spans)

    def _last_has_room(self) -> bool:
        return bool(self._spans) and self._spans[-1].n_samples < self._n_per_span

    def _halve(self) -> None:
        for first, second in zip(self._spans[::2], self._spans[1::2], strict=False):
            first.take(second)
        self._spans = self._spans[::2]
        self._n_per_span *= 2


def _lower(one: int | None, two: int | None) -> int | None:
    return two if one is None else one if two is None or one < two else two


def _higher(one: int | None, two: int | None) -> int | None:
    return two if one is None else one if two is None or one > two else two
