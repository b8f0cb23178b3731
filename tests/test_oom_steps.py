"""Steps of unusual kinds under a retry: closures, checkpoints, compiled models, packed sequences."""

from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from torchfast import OutOfMemoryError, inject_oom, oom_guard

pytestmark = pytest.mark.usefixtures("quick_collections")
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB."


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    """Return copies of the parameters."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_optimizer_with_a_closure() -> None:
    """L-BFGS runs the forward and the backward pass inside its step: with a copy, a fault leaves no trace."""

    def train(injection: inject_oom) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3, history_size=2)
        retry = oom_guard().retry(model=model, optimizer=optimizer, copy=True)
        batch = (torch.randn(8, 4), torch.randn(8, 2))
        for step in range(2):
            for attempt in retry.attempts(batch):

                def closure(attempt: Any = attempt) -> float:
                    optimizer.zero_grad()
                    total = 0.0
                    for (samples, targets), weight in attempt:
                        loss = F.mse_loss(model(samples), targets) * weight
                        loss.backward()
                        total += loss.item()
                    return total

                with attempt, injection if step == 1 else nullcontext():
                    optimizer.step(closure)
        return weights_of(model)

    counting = inject_oom(times=0)
    expected = train(counting)
    for at in range(0, counting.n_operators, 11):
        injection = inject_oom(at)
        assert all(map(torch.equal, train(injection), expected)), at
        assert injection.n_failures == 1


def test_two_optimizers_and_an_average() -> None:
    """A generator, a discriminator and an average of weights, stepped in one attempt, come back together."""

    def train(injection: inject_oom) -> list[torch.Tensor]:
        torch.manual_seed(0)
        generator, critic = nn.Linear(4, 4), nn.Linear(4, 1)
        average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimizers = [torch.optim.Adam(model.parameters()) for model in (generator, critic)]
        models = [generator, critic, average]
        retry = oom_guard().retry(model=models, optimizer=optimizers, copy=True)
        for step in range(3):
            for attempt in retry.attempts(torch.randn(6, 4)):
                with attempt, injection if step == 2 else nullcontext():
                    for part, weight in attempt:
                        (critic(part).mean() * weight).backward()
                        optimizers[1].step()
                        (critic(generator(torch.randn(len(part), 4))).mean() * weight).backward()
                        optimizers[0].step()
                    average.update_parameters(generator)
                    _ = [optimizer.zero_grad() for optimizer in optimizers]
        return [tensor.clone() for model in models for tensor in model.state_dict().values()]

    counting = inject_oom(times=0)
    expected = train(counting)
    for at in range(0, counting.n_operators, 7):
        assert all(map(torch.equal, train(inject_oom(at)), expected)), at


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:  # noqa: FBT001 -- a parameter of the test
    """A fault at any operator, recomputed ones too, leaves no trace, dropout's mask included."""
    block, head = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), nn.Linear(4, 2)
    model = nn.ModuleList([block, head])

    def gradients(injection: inject_oom) -> list[torch.Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        for attempt in oom_guard().retry(model=model).attempts(torch.ones(6, 4, requires_grad=True)):
            with attempt, injection:
                for part, weight in attempt:
                    hidden = checkpoint(block, part, use_reentrant=use_reentrant)
                    (head(hidden).square().mean() * weight).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    counting = inject_oom(times=0)
    expected = gradients(counting)
    for at in range(counting.n_operators):
        assert all(map(torch.equal, gradients(inject_oom(at)), expected)), at


def test_packed_sequences() -> None:
    """Packed sequences are worked on in parts, with the gradient of all."""
    net, head = nn.LSTM(3, 4), nn.Linear(4, 2)
    model = nn.ModuleList([net, head])
    packed = pack_sequence([torch.randn(n, 3) for n in (3, 5, 2, 4, 1)], enforce_sorted=False)
    labels = torch.tensor([0, 1, 0, 1, 1])
    n_sequences = []

    def gradients(above: int | None) -> list[torch.Tensor]:
        model.zero_grad()
        with inject_oom(at=2, above=above, times=0 if above is None else None):
            for attempt in oom_guard().retry(model=model).attempts((packed, labels)):
                with attempt:
                    for (part, targets), weight in attempt:
                        assert isinstance(part, PackedSequence)
                        (F.cross_entropy(head(net(part)[1][0][-1]), targets) * weight).backward()
                        n_sequences.append(int(part.batch_sizes[0]))
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for one, other in zip(gradients(None), gradients(2), strict=True):
        torch.testing.assert_close(one, other)
    assert n_sequences == [5, 2, 2, 1]


def test_masks_and_one_long_sequence() -> None:
    """A mask for all samples goes whole to each part; a batch of one sequence cannot be split along it."""
    retry = oom_guard().retry(model=nn.Linear(1, 1))
    shapes = []
    with inject_oom(above=3, times=None):
        for attempt in retry.attempts({"ids": torch.zeros(6, 9), "mask": torch.ones(1, 9)}):
            with attempt:
                for part, _ in attempt:
                    shapes.append((part["ids"] * part["mask"]).shape)
    assert shapes == [(3, 9), (3, 9)]
    step = retry(lambda attempt: [part["ids"] + 1 for part, _ in attempt])
    sequence = {"ids": torch.zeros(1, 9), "mask": torch.ones(1, 9)}
    with pytest.raises(OutOfMemoryError, match="Even one sample"), inject_oom(times=None):
        step(sequence)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_models() -> None:
    """A compiled model is trained in parts as any other."""
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model = cast(nn.Module, torch.compile(plain, backend="eager"))
    batch = (torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))
    expected = torch.autograd.grad(F.cross_entropy(plain(batch[0]), batch[1]), list(plain.parameters()))
    retry = oom_guard().retry(model=model)
    for attempt in retry.attempts(batch):
        with attempt:
            for (samples, labels), weight in attempt:
                (F.cross_entropy(model(samples), labels) * weight).backward()
                if attempt.size > 4:
                    raise torch.OutOfMemoryError(CUDA)
    assert retry.micro_batch_size == 4
    for parameter, gradient in zip(plain.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_interrupt_while_cleaning_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt during the clean-up passes at once, nothing is watched any more, the next step works."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    retry = oom_guard().retry(model=model, optimizer=optimizer)

    def interrupt() -> None:
        raise KeyboardInterrupt

    @retry
    def step(attempt: Any) -> int:
        for part, weight in attempt:
            (model(part).mean() * weight).backward()
        optimizer.step()
        return int(attempt.number)

    batch = torch.ones(4, 2)
    with monkeypatch.context() as patch:
        patch.setattr("torchfast._oom.release.gc.collect", interrupt)
        with pytest.raises(KeyboardInterrupt), inject_oom():
            step(batch)
    assert not retry._transaction._is_watching
    assert step(batch) == 1


@pytest.mark.parametrize("batch", [torch.tensor(3.0), torch.zeros(0, 2), 5, None, "text", {}, []])
def test_batches_without_samples(batch: Any) -> None:
    """What has no samples to count is one part, and tried again whole."""
    step = oom_guard().retry(model=nn.Linear(1, 1))(lambda attempt: [part for part, _ in attempt])
    parts = step(batch)
    assert parts is not None
    assert len(parts) == 1
    assert parts[0] is batch
