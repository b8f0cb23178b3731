"""Six training steps, and what becomes of them when memory runs out at one of their operators."""

import os
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from torchfast import inject_oom, oom_guard

DEPTH = int(os.environ.get("TORCHFAST_FAULT_DEPTH", "1"))
N_STEPS = 3
N_SAMPLES = 8


class Training(NamedTuple):
    """A model in training: everything that a step can change."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: list[tuple[torch.Tensor, torch.Tensor]]
    scaler: torch.amp.GradScaler | None = None
    generator: torch.Generator | None = None
    n_accumulated: int = 1
    is_noisy: bool = False


class LastOutput(nn.Module):
    """A recurrent net that answers with its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 8, num_layers=1 + DEPTH, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, sequences: torch.Tensor) -> torch.Tensor:
        """Classify sequences of shape (N, T, 6)."""
        outputs, _ = self.rnn(sequences)
        logits: torch.Tensor = self.head(outputs[:, -1])
        return logits


def stack(*make: Callable[[], nn.Module]) -> list[nn.Module]:
    """Return these layers, repeated as deep as the models are to be."""
    return [layer() for _ in range(DEPTH) for layer in make]


def batches_of(*shape: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return one random batch of samples of this shape for each step."""
    return [(torch.randn(N_SAMPLES, *shape), torch.randint(3, (N_SAMPLES,))) for _ in range(N_STEPS)]


def cnn() -> Training:
    """Batch norm and dropout; momentum."""
    blocks = stack(
        lambda: nn.LazyConv2d(4, 3, padding=1), lambda: nn.BatchNorm2d(4), nn.ReLU, lambda: nn.Dropout(0.3)
    )
    model = nn.Sequential(*blocks, nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(2, 1, 8, 8))
    return Training(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), batches_of(1, 8, 8))


def transformer() -> Training:
    """Attention, layer norm and dropout; a foreach optimizer."""
    layers = stack(lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(40, 3))
    return Training(model, torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True), batches_of(5, 8))


def rnn() -> Training:
    """A recurrent net; Adam in a for-loop."""
    model = LastOutput()
    return Training(model, torch.optim.Adam(model.parameters(), lr=0.01, foreach=False), batches_of(5, 6))


def amp() -> Training:
    """Mixed precision with a gradient scaler whose scale changes at every step."""
    hidden = stack(lambda: nn.Linear(12, 12), nn.GELU)
    model = nn.Sequential(*hidden, nn.Linear(12, 3))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Training(model, optimizer, batches_of(12), scaler=scaler)


def first_step() -> Training:
    """The first step of AdamW, which makes its state; two groups, one with amsgrad."""
    hidden = nn.Sequential(*stack(lambda: nn.Linear(12, 12), nn.Tanh))
    model = nn.Sequential(hidden, nn.Linear(12, 3))
    groups: list[dict[str, Any]] = [
        {"params": hidden.parameters()},
        {"params": model[1].parameters(), "amsgrad": True, "weight_decay": 0.0},
    ]
    return Training(model, torch.optim.AdamW(groups, lr=0.01, foreach=True), batches_of(12))


def accumulation() -> Training:
    """Gradients of two batches added up before a step, with noise from a generator of the user's own."""
    blocks = stack(lambda: nn.Linear(12, 12), lambda: nn.BatchNorm1d(12), nn.ReLU)
    model = nn.Sequential(*blocks, nn.Linear(12, 3))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01, foreach=True)
    generator = torch.Generator().manual_seed(5)
    return Training(model, optimizer, batches_of(12), generator=generator, n_accumulated=2, is_noisy=True)


TRAININGS: dict[str, Callable[[], Training]] = {
    make.__name__: make for make in (cnn, transformer, rnn, amp, first_step, accumulation)
}
# Without dropout, those whose steps can be worked on in parts and come out the same.
SPLITTABLE = ("transformer", "rnn", "first_step")
FAILING_STEP = dict.fromkeys(TRAININGS, 1) | {"first_step": 0}


def begin(name: str) -> Training:
    """Return a training as it always begins."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 -- the global state is what the guard must restore
    return TRAININGS[name]()


def without_dropout(training: Training) -> Training:
    """Return the training with all dropout taken out."""
    for module in training.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return training


def loss_of(training: Training, part: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the mean loss of some samples."""
    samples, labels = part
    if training.is_noisy:
        noise = torch.rand(samples.shape, generator=training.generator) * random.random() * np.random.rand()  # noqa: NPY002, S311 -- as above
        samples = samples + 0.1 * noise
    with torch.autocast("cpu", torch.bfloat16, enabled=training.scaler is not None):
        return F.cross_entropy(training.model(samples), labels)


def take_step(training: Training, parts: Iterator[Any], index: int) -> float:
    """Do what a step does with the parts of its batch, and return the loss."""
    total = 0.0
    for part, weight in parts:
        loss = loss_of(training, part) * weight
        (loss if training.scaler is None else training.scaler.scale(loss)).backward()
        total += loss.item()
    if (index + 1) % training.n_accumulated:
        return total
    if training.scaler is None:
        training.optimizer.step()
    else:
        training.scaler.step(training.optimizer)
        training.scaler.update()
    training.optimizer.zero_grad()
    return total


def run_bare(name: str) -> list[Any]:
    """Run the training as it would be without torchfast, and return its state at the end."""
    training = begin(name)
    losses = [take_step(training, iter([(batch, 1.0)]), i) for i, batch in enumerate(training.batches)]
    return state_of(training, losses)


def run_guarded(name: str, injection: inject_oom, *, copy: bool = True, step: int | None = None) -> list[Any]:
    """Run the training under a retry, with a fault in one of its steps, and return its state at the end."""
    failing_step = FAILING_STEP[name] if step is None else step
    training = begin(name)
    generators = () if training.generator is None else (training.generator,)
    retry = oom_guard().retry(
        model=training.model,
        optimizer=training.optimizer,
        scaler=training.scaler,
        generators=generators,
        copy=copy,
    )
    losses = []
    for index, batch in enumerate(training.batches):
        for attempt in retry.attempts(batch):
            with attempt:
                if index == failing_step:
                    with injection:
                        loss = take_step(training, iter(attempt), index)
                else:
                    loss = take_step(training, iter(attempt), index)
        losses.append(loss)
    return state_of(training, losses)


def state_of(training: Training, losses: list[float]) -> list[Any]:
    """Return everything that could differ: weights, buffers, gradients, moments, scaler, random state."""
    optimizer = training.optimizer.state_dict()
    moments = [value for state in optimizer["state"].values() for value in state.values()]
    gradients = [p.grad for p in training.model.parameters()]
    sources = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]  # type: ignore[index]  # noqa: NPY002 -- as above
    if training.generator is not None:
        sources.append(training.generator.get_state())
    scaler = [] if training.scaler is None else list(training.scaler.state_dict().values())
    return [
        *losses,
        *training.model.state_dict().values(),
        *gradients,
        *moments,
        [list(state) for state in optimizer["state"].values()],
        *sources,
        *scaler,
    ]


def run_split(name: str, injection: inject_oom) -> list[torch.Tensor]:
    """Run a training without dropout under a retry, in float64, and return its losses and weights."""
    torch.set_default_dtype(torch.float64)
    try:
        training = without_dropout(begin(name))
        retry = oom_guard().retry(model=training.model, optimizer=training.optimizer)
        losses = []
        for index, batch in enumerate(training.batches):
            for attempt in retry.attempts(batch):
                with attempt, injection:
                    loss = take_step(training, iter(attempt), index)
            losses.append(loss)
        return [torch.tensor(losses), *training.model.state_dict().values()]
    finally:
        torch.set_default_dtype(torch.float32)


def differences(state: list[Any], other: list[Any]) -> int:
    """Return how many parts of two states are not bit for bit the same."""
    return abs(len(state) - len(other)) + sum(
        not _same(one, two) for one, two in zip(state, other, strict=False)
    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    return bool(one == other)


def n_operators(name: str, *, step: int | None = None, **conditions: Any) -> int:
    """Return how many operators the step that is to fail consists of."""
    counting = inject_oom(times=0, **conditions)
    run_guarded(name, counting, step=step)
    return counting.n_operators
