"""Measure what oom_guard costs while nothing fails: entering a block, and a training step under a retry.

    PYTHONPATH=. python benchmarks/oom_guard_overhead.py [seconds for each comparison, by default 8]

Needs a GPU. Two steps of a ResNet-50 are measured: one that waits for the host, whose time counts in full
there, and one that waits for the GPU, as its forward and backward pass are CUDA graphs. How fast the host is
by now is measured beside: an empty context manager, back to back and in the same loop.
"""

import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import record
import torch
import torch.nn.functional as F

from torchfast import inject_oom, oom_guard

PROTOCOL = (
    "ResNet-50, bfloat16 autocast, channels_last, SGD with momentum: batch 16, eager, which waits for the "
    "host; batch 32 as CUDA graphs, which waits for the GPU. Entering: medians of 50 runs of 1,000 blocks "
    "back to back, in a function of ten variables, and of 100 blocks around an eager step each. Steps: bare "
    "and guarded by turns in random order, the GPU drained after each eager step and after 10 steps of "
    "graphs; the ratio is the median over pairs, with the interval of 95 % by bootstrap. On the host: the "
    "time inside the retry's own calls and hooks."
)
_now_ns = time.perf_counter_ns


class Training:
    """A ResNet-50 in training, and the ways to take a step of it."""

    def __init__(self, n_samples: int = 16, *, as_graphs: bool = False) -> None:
        import timm

        torch.manual_seed(0)
        self.model: torch.nn.Module = (
            timm.create_model("resnet50").cuda().to(memory_format=torch.channels_last)
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        images = torch.randn(n_samples, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
        self.batch = (images, torch.arange(n_samples, device="cuda"))
        self._cache = not as_graphs  # of autocast, whose casts must be part of the graphs
        # Drained after each step, the GPU would wait for what the host does before the next.
        self.n_steps = 10 if as_graphs else 1
        self.name = f"batch {n_samples}, {'CUDA graphs' if as_graphs else 'eager'}"
        if as_graphs:
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                torch.cuda.make_graphed_callables(self.model, (images,))

    def step(self, parts: Iterable[Any]) -> None:
        """Take one step with these parts of the batch."""
        for (part, labels), weight in parts:
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=self._cache):
                loss = F.cross_entropy(self.model(part), labels)
            (loss * weight).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def bare(self) -> None:
        """Step without any guard."""
        self.step([(self.batch, 1.0)])

    def guarded(self) -> None:
        """Step in a block."""
        with oom_guard():
            self.bare()

    def in_steps(self) -> None:
        """Step in the guard's steps, which measure its peak."""
        for _ in oom_guard().steps([self.batch]):
            self.bare()

    def retried(self, *, copy: bool) -> Callable[[], None]:
        """Return a step under a retry."""
        retry = oom_guard().retry(model=self.model, optimizer=self.optimizer, copy=copy)

        def run() -> None:
            for attempt in retry.attempts(self.batch):
                with attempt:
                    self.step(attempt)

        return run

    def copy_bytes(self) -> int:
        """Return what a copy of parameters and optimizer state takes."""
        moments = [t for state in self.optimizer.state.values() for t in state.values() if t is not None]
        return sum(t.nbytes for t in [*self.model.parameters(), *moments])


def check(training: Training) -> None:
    """Stop unless a retried step gives the gradient of the bare one, whole and after a failure."""
    torch.backends.cudnn.deterministic = True
    found = []
    for n_failures in (0, 1):
        torch.manual_seed(0)
        retry = oom_guard().retry(model=training.model)
        training.model.zero_grad()
        state = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
        for attempt in retry.attempts(training.batch):
            with attempt, inject_oom(at=300, times=n_failures if attempt.number == 1 else 0):
                for (images, labels), weight in attempt:
                    (F.cross_entropy(training.model(images), labels) * weight).backward()
        found.append([p.grad.clone() for p in training.model.parameters() if p.grad is not None])
        training.model.load_state_dict(state)
    training.model.zero_grad()
    torch.backends.cudnn.deterministic = False
    if not all(map(torch.equal, *found)):
        raise SystemExit("wrong: a step that was tried again gave another gradient")


# --- entering a block -------------------------------------------------------------------------------------


def entering() -> list[dict[str, Any]]:
    """Time blocks by themselves, back to back."""
    ways: dict[str, Callable[[int], int]] = {
        "nullcontext()": _enter_nothing,
        "oom_guard(), an empty block": _enter_empty,
        "oom_guard(), a block that binds four names": _enter_binding,
    }
    rows: list[dict[str, Any]] = []
    for way, run in ways.items():
        samples_us = [run(1000) / 1e6 for _ in range(50)]
        rows.append({"part": "entering", "way": way, **_spread(samples_us, "us"), "samples_us": samples_us})
    return rows


def _enter_nothing(n_times: int) -> int:
    nothing = nullcontext()
    start_ns = _now_ns()
    for _ in range(n_times):
        with nothing:
            pass
    return _now_ns() - start_ns


def _enter_empty(n_times: int) -> int:
    a, b, c, d, e, f = (torch.zeros(1) for _ in range(6))
    start_ns = _now_ns()
    for _ in range(n_times):
        with oom_guard():
            pass
    return _now_ns() - start_ns + 0 * len((a, b, c, d, e, f))


def _enter_binding(n_times: int) -> int:
    a, b, c, d, e, f = (torch.zeros(1) for _ in range(6))
    loss = outputs = hidden = a
    start_ns = _now_ns()
    for index in range(n_times):
        with oom_guard():
            loss, outputs, hidden, n_seen = b, c, d, index
    return _now_ns() - start_ns + 0 * len((loss, outputs, hidden, n_seen, e, f))


def in_place(training: Training) -> list[dict[str, Any]]:
    """Time entering and leaving around each step of a training, where everything else has used the caches."""
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "nullcontext()": nullcontext,
        "oom_guard()": oom_guard,
    }
    samples_us: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(100):
        for way, make in ways.items():
            began_ns = _now_ns()
            with make():
                entered_ns = _now_ns()
                training.bare()
                leaves_ns = _now_ns()
            samples_us[way].append((entered_ns - began_ns + _now_ns() - leaves_ns) / 1e3)
    return [
        {"part": "in place", "way": way, **_spread(samples, "us"), "samples_us": samples}
        for way, samples in samples_us.items()
    ]


# --- steps ------------------------------------------------------------------------------------------------


def steps(training: Training, budget_s: float) -> list[dict[str, Any]]:
    """Compare steps with bare ones, by turns."""
    ways: dict[str, Callable[[], None]] = {
        "bare, again": training.bare,
        "with oom_guard()": training.guarded,
        "guard.steps": training.in_steps,
        "retry": training.retried(copy=False),
        "retry, copy=True": training.retried(copy=True),
    }
    for run in ways.values():
        for _ in range(5):
            run()
    return [{"step": training.name, **_compared(way, training, run, budget_s)} for way, run in ways.items()]


def _compared(way: str, training: Training, run: Callable[[], None], budget_s: float) -> dict[str, Any]:
    chance = random.Random(0)  # noqa: S311 -- the order of turns
    samples_ms: dict[bool, list[float]] = {True: [], False: []}
    gc.collect()
    until_s = time.perf_counter() + budget_s
    while time.perf_counter() < until_s:
        for is_bare in chance.sample([True, False], 2):
            samples_ms[is_bare] += record.times_ms(
                training.bare if is_bare else run, n_samples=1, n_steps=training.n_steps, n_warmup=0
            )
    ratios = [ours / theirs for theirs, ours in zip(samples_ms[True], samples_ms[False], strict=True)]
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(1000))
    row = {
        "part": "steps",
        "way": way,
        "n_pairs": len(ratios),
        "bare_ms": record.median(samples_ms[True]),
        "median_ms": record.median(samples_ms[False]),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_low": round(medians[25], 4),
        "ratio_high": round(medians[975], 4),
        "bare_samples_ms": samples_ms[True],
        "samples_ms": samples_ms[False],
    }
    print(
        f"{way:20} {row['median_ms']:8.3f} ms  x {row['ratio']} ({row['ratio_low']} to {row['ratio_high']})"
    )
    return row


def on_the_host(training: Training, *, copy: bool) -> dict[str, Any]:
    """Time the retry's own calls, and the hooks that it has the optimizer call, within a training."""
    retry = oom_guard().retry(model=training.model, optimizer=training.optimizer, copy=copy)
    spent_ns: list[int] = []
    transaction = retry._transaction
    for owner, hook in [(transaction, "_begin_step"), *((probe, "after") for probe in transaction._probes)]:
        setattr(owner, hook, _timed(getattr(owner, hook), spent_ns))
    following = _timed(lambda attempts: next(attempts, None), spent_ns)
    samples_us = []
    for _ in range(60):
        spent_ns.clear()
        attempts = retry.attempts(training.batch)
        attempt = following(attempts)
        _timed(attempt.__enter__, spent_ns)()
        training.step(attempt)
        _timed(attempt.__exit__, spent_ns)(None, None, None)
        if following(attempts) is not None:
            raise SystemExit("wrong: a step that did not fail was tried again")
        samples_us.append(sum(spent_ns) / 1e3)
    way = "retry, copy=True" if copy else "retry"
    return {"part": "host", "way": way, **_spread(samples_us, "us"), "samples_us": samples_us}


def _timed(function: Callable[..., Any], spent_ns: list[int]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        began_ns = _now_ns()
        try:
            return function(*args)
        finally:
            spent_ns.append(_now_ns() - began_ns)

    return run


def _spread(samples: list[float], unit: str) -> dict[str, float]:
    low, _, high = statistics.quantiles(samples, n=4)
    return {
        f"median_{unit}": record.median(samples),
        f"low_{unit}": round(low, 3),
        f"high_{unit}": round(high, 3),
    }


def main() -> None:
    """Check, measure and write the result file."""
    if not torch.cuda.is_available():
        sys.exit("benchmarks/oom_guard_overhead.py times steps on a GPU, and this machine has none.")
    budget_s = float(sys.argv[1]) if len(sys.argv) > 1 else 8.0
    training = Training()
    check(training)
    rows = entering()
    for _ in range(5):
        training.guarded()
    rows += in_place(training)
    rows += [on_the_host(training, copy=copy) for copy in (False, True)]
    for row in rows:
        print(f"{row['part']:9} {row['way']:42} {row['median_us']:8.2f} µs", flush=True)
    rows += steps(training, budget_s)
    rows += steps(Training(32, as_graphs=True), budget_s)
    rows.append({"part": "copy", "way": "retry, copy=True", "copy_bytes": training.copy_bytes()})
    print(record.write("oom_guard_overhead", PROTOCOL, rows))


if __name__ == "__main__":
    main()
