"""The parts of a transaction that need no fault to be shown: the probe of an optimizer's step, the copies."""

import weakref
from typing import Any, cast

import pytest
import torch
from torch import nn

from torchfast import inject_oom, oom_guard
from torchfast._bytes import GIB, MIB
from torchfast._memory import AllocatorStats, Room
from torchfast._oom import step_probe
from torchfast._oom.step_probe import StepProbe
from torchfast._oom.transaction import Subjects, Transaction, _Copies

BLANK = AllocatorStats(*[0] * len(AllocatorStats._fields))


def probe() -> StepProbe:
    """Return a probe of some optimizer."""
    return StepProbe(torch.optim.SGD(nn.Linear(2, 2).parameters()))


@pytest.mark.parametrize(
    ("untaken_bytes", "active_bytes", "fits"),
    [
        (3 * GIB, 10 * GIB, True),
        (GIB, 10 * GIB, False),
        (GIB, 8 * GIB, True),  # two of the ten that are held are free
    ],
)
def test_room_for_a_step(
    monkeypatch: pytest.MonkeyPatch, untaken_bytes: int, active_bytes: int, *, fits: bool
) -> None:
    """A step that needs 1 GiB has room where twice that is cached or may be taken."""
    stats = BLANK._replace(reserved_bytes=10 * GIB, active_bytes=active_bytes)
    monkeypatch.setattr(step_probe, "allocator_stats", lambda _: stats)
    monkeypatch.setattr(step_probe, "room_on", lambda _: Room(80 * GIB, 10 * GIB, untaken_bytes))
    assert probe()._has_room(torch.device("cuda", 0), GIB) is fits


def test_driver_is_not_asked_where_enough_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the backward pass has let go of is enough as a rule: then nobody waits for the driver."""
    stats = BLANK._replace(reserved_bytes=10 * GIB, active_bytes=7 * GIB)
    monkeypatch.setattr(step_probe, "allocator_stats", lambda _: stats)
    monkeypatch.setattr(step_probe, "room_on", lambda _: pytest.fail("asked"))
    assert probe()._has_room(torch.device("cuda", 0), GIB)


def test_copies_follow_tensors_that_change() -> None:
    """Copies are renewed in place, and made anew for other tensors and for ones that were resized."""
    copies, tensors = _Copies(), [torch.ones(2), torch.ones(3, dtype=torch.int64)]
    copies.take(tensors)
    tensors[0].fill_(5)
    copies.take(tensors)
    tensors[0].fill_(7)
    copies.put_back()
    assert tensors[0].tolist() == [5, 5]
    tensors[0].resize_(4).fill_(1)
    copies.take(tensors)
    tensors[0].zero_()
    copies.put_back()
    assert tensors[0].tolist() == [1] * 4


def test_scaler_comes_back_as_often_as_asked() -> None:
    """Restored states are not the noted ones themselves, which a second try would change."""
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    states = scaler._per_optimizer_states
    states[id(optimizer)]["found_inf_per_device"] = {}
    undo = Transaction(Subjects((), (optimizer,), scaler, ()), copy=False)
    undo.begin()
    before = states[id(optimizer)]["stage"]
    for _ in range(2):
        states[id(optimizer)]["stage"] = "changed"
        states[id(optimizer)]["found_inf_per_device"]["cpu"] = torch.ones(1)
        undo.roll_back()
        assert states[id(optimizer)] == {"stage": before, "found_inf_per_device": {}}


def test_gradients_are_let_go_after_the_step() -> None:
    """Gradients that a step began with are not kept beyond it, nor are their copies."""
    model = nn.Linear(2, 2)
    model.weight.grad = torch.ones(2, 2)
    gradient = weakref.ref(model.weight.grad)
    for attempt in oom_guard().retry(model=model).attempts(torch.zeros(8, 2)):
        with attempt:
            model.weight.grad = None
    assert gradient() is None


def test_replaced_buffers_come_back() -> None:
    """A buffer that the step has put another tensor in place of is the old one again, with its old values."""
    module = nn.BatchNorm1d(2)
    mean = module.running_mean
    undo = Transaction(Subjects((module,), (), None, ()), copy=False)
    undo.begin()
    assert mean is not None
    mean.add_(1)
    module.running_mean = torch.full((2,), 9.0)
    undo.roll_back()
    assert module.running_mean is mean
    assert mean.tolist() == [0, 0]


def test_buffers_that_come_and_go_come_back() -> None:
    """Such as one that the first step fills; one that is gone by the next step is none of its."""
    model = Statistics()
    retry = oom_guard().retry(model=model)
    found = list[Any]()
    with inject_oom(phase="backward"):
        for attempt in retry.attempts(torch.ones(4, 3)):
            with attempt:
                for part, weight in attempt:
                    found.append(model.mean)
                    (model(part).mean() * weight).backward()
    assert found == [None, None]
    model.other = None
    del model.gone
    for attempt in retry.attempts(torch.ones(4, 3)):
        with attempt:
            for part, weight in attempt:
                (model(part).mean() * weight).backward()


class Statistics(nn.Module):
    """A layer with a running mean, which its first forward pass makes, and buffers that may be taken away."""

    mean: torch.Tensor | None
    other: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("mean", None)
        self.register_buffer("other", torch.zeros(()))
        self.register_buffer("gone", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Subtract the mean."""
        mean = x.mean(0)
        self.mean = mean if self.mean is None else 0.9 * self.mean + 0.1 * mean
        return torch.as_tensor(self.layer(x - self.mean))


@pytest.mark.parametrize("rate", [0.5, torch.tensor(0.5)])
def test_settings_of_the_optimizer_come_back(rate: float | torch.Tensor) -> None:
    """A learning rate that the step has changed, be it a number or a tensor, is the old one again."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, foreach=False)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    undo = Transaction(Subjects((model,), (optimizer,), None, ()), copy=False)
    for _ in range(2):
        undo.begin()
        schedule.step()
        assert float(optimizer.param_groups[0]["lr"]) < 0.5
        undo.roll_back()
        assert float(optimizer.param_groups[0]["lr"]) == 0.5
        assert isinstance(optimizer.param_groups[0]["lr"], type(rate))


def test_gradients_keep_their_identity() -> None:
    """Gradients that were there before are the same tensors with the same values; new ones are gone."""
    model = nn.Linear(2, 2)
    model.weight.grad = gradient = torch.ones(2, 2)
    undo = Transaction(Subjects((model,), (), None, ()), copy=False)
    undo.begin()
    model(torch.full((1, 2), float(MIB))).sum().backward()
    undo.roll_back()
    assert model.weight.grad is gradient
    assert gradient.tolist() == [[1, 1], [1, 1]]
    assert model.bias.grad is None


def test_expanded_buffers_come_back() -> None:
    """A buffer whose rows are all the same memory, into which nothing can be copied whole, comes back."""
    module = nn.Module()
    column = torch.arange(3.0)
    module.register_buffer("places", column[:, None].expand(3, 4))
    undo = Transaction(Subjects((module,), (), None, ()), copy=False)
    for _ in range(2):
        undo.begin()
        column.add_(1)
        undo.roll_back()
    assert column.tolist() == [0, 1, 2]


def test_sparse_gradients_come_back() -> None:
    """Gradients of an embedding, while accumulating, have their values of before."""
    module = nn.Embedding(10, 3, sparse=True)
    module(torch.tensor([1, 2])).sum().backward()
    gradient = module.weight.grad
    assert gradient is not None
    before = gradient.to_dense().clone()
    undo = Transaction(Subjects((module,), (), None, ()), copy=False)
    undo.begin()
    module(torch.tensor([2, 3])).sum().backward()
    undo.roll_back()
    assert torch.equal(cast(torch.Tensor, module.weight.grad).to_dense(), before)


def test_gradients_of_the_batch_come_back() -> None:
    """A batch whose gradient is wanted, as for adversarial examples, does not get it twice."""
    samples = torch.randn(4, 2, requires_grad=True)
    model = nn.Linear(2, 1)
    for attempt in oom_guard().retry(model=model).attempts({"x": samples}):
        with attempt:
            for part, weight in attempt:
                (model(part["x"]).sum() * weight).backward()
                if attempt.number == 1:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
    assert torch.equal(cast(torch.Tensor, samples.grad), model.weight.detach().expand(4, 2))


def test_groups_that_the_step_added_are_gone() -> None:
    """A group of parameters that a failed step has given to the optimizer is not in it afterwards."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    undo = Transaction(Subjects((model,), (optimizer,), None, ()), copy=False)
    undo.begin()
    optimizer.add_param_group({"params": nn.Linear(2, 2).parameters()})
    undo.roll_back()
    assert len(optimizer.param_groups) == 1


def test_lists_in_the_state_come_back() -> None:
    """L-BFGS keeps its history in lists that it appends to: with a copy, they come back as often as asked."""
    model = nn.Linear(3, 1)
    samples, targets = torch.randn(8, 3), torch.randn(8, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3, history_size=2)

    def loss() -> float:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(samples), targets)
        loss.backward()
        return loss.item()

    optimizer.step(loss)
    undo = Transaction(Subjects((model,), (optimizer,), None, ()), copy=True)
    undo.begin()
    found = []
    for _ in range(3):
        optimizer.step(loss)
        found.append(model.weight.detach().clone())
        undo.roll_back()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("copy", [False, True])
def test_hooks_go_with_the_retry(*, copy: bool) -> None:
    """An optimizer has its hooks for as long as the retry lives, and does not keep it alive."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    retry = oom_guard().retry(model=model, optimizer=optimizer, copy=copy)
    alive = weakref.ref(retry._transaction)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    del retry
    assert alive() is None
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_what_an_optimizer_trains_outside_of_modules_comes_back() -> None:
    """A parameter of no module, such as a perturbation of the input, is put back like the others."""
    noise = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([noise], lr=0.1)
    undo = Transaction(Subjects((nn.Linear(3, 3),), (optimizer,), None, ()), copy=True)
    undo.begin()
    noise.sum().backward()
    optimizer.step()
    undo.roll_back()
    assert noise.tolist() == [0, 0, 0]
    assert noise.grad is None
    assert not optimizer.state
