"""Whole steps of the user's own, against what one can count by hand."""

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchfast import VRAMEstimate, estimate_vram

WIDTH = 512
WEIGHTS = 4 * (WIDTH * WIDTH + WIDTH)
BATCH = torch.randn(16, WIDTH)


def layer() -> nn.Linear:
    """Return a layer of WEIGHTS bytes."""
    return nn.Linear(WIDTH, WIDTH)


def estimate(model: nn.Module, batch: Any = BATCH, **options: Any) -> VRAMEstimate:
    """Estimate for an H200."""
    return estimate_vram(model, batch, gpu="H200", **options)


def end_of(found: VRAMEstimate, phase: str) -> int:
    """Return what is allocated at the end of the last phase of that name."""
    return [p for p in found.phases if p.name.endswith(phase)][-1].end_allocated_bytes


LIBRARIES = 65 * 2**20  # what cuBLAS and cuBLASLt keep for the two threads of a training step


def test_a_gan_with_two_optimizers() -> None:
    """Both networks and the state of both optimizers count, though one of each was given."""
    generator, critic = layer(), layer()
    of_generator, of_critic = (
        torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9) for module in (generator, critic)
    )

    def step(real: torch.Tensor) -> None:
        of_critic.zero_grad()
        (critic(generator(real).detach()).sum() - critic(real).sum()).backward()
        of_critic.step()
        of_generator.zero_grad()
        critic(generator(real)).sum().backward()
        of_generator.step()

    found = estimate(generator, step=step, optimizer=of_generator)
    assert found.breakdown["weights"] == found.breakdown["gradients"] == 2 * WEIGHTS
    assert end_of(found, "optimizer") == 6 * WEIGHTS + BATCH.nbytes + LIBRARIES
    assert "taken to be on the GPU as well: critic (Linear), of_critic (SGD)" in found.assumptions
    for module in (generator, critic):
        assert all(type(p) is nn.Parameter and p.grad is None for p in module.parameters())
    assert not of_critic.state


def test_an_average_of_the_weights() -> None:
    """An EMA copy that only the step knows takes the weights once more, and stays what it was."""
    model = layer()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(model.parameters())
    before = copy.deepcopy(average.state_dict())

    def step(batch: torch.Tensor) -> None:
        model(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)

    found = estimate(model, step=step, optimizer=optimizer)
    counter, scalars = 512, 0  # a block for the average's counter; AdamW's own lie on the host
    assert end_of(found, "optimizer") == 4 * WEIGHTS + BATCH.nbytes + LIBRARIES + counter + scalars
    assert all(torch.equal(value, before[name]) for name, value in average.state_dict().items())


@pytest.mark.parametrize("n_parts", [1, 2, 4])
def test_accumulated_gradients(n_parts: int) -> None:
    """With micro-batches, activations are those of one of them and gradients are there once."""
    model = nn.Sequential(layer(), nn.ReLU(), layer())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.randn(8192, WIDTH)

    def step(batch: torch.Tensor) -> None:
        optimizer.zero_grad()
        for part in batch.chunk(n_parts):
            (model(part).sum() / n_parts).backward()
        optimizer.step()

    found = estimate(model, batch, step=step, optimizer=optimizer)
    assert found.breakdown["gradients"] == 2 * WEIGHTS
    forward = [p for p in found.phases if p.name == "step 1 forward"]
    assert len(forward) == n_parts
    # Linear, ReLU, Linear: the first output goes when ReLU has made its own.
    saved = forward[0].peak_allocated_bytes - found.phases[1].end_allocated_bytes
    libraries, scratch = 33 * 2**20, 2**13  # cuBLAS and cuBLASLt, of one thread; what a sum takes
    assert 0 <= saved - 2 * batch.nbytes // n_parts - libraries < scratch


def test_batches_that_are_fetched_ahead() -> None:
    """Batches that a step keeps on the GPU ahead of use add one batch each."""
    model = layer()
    queue: list[torch.Tensor] = []

    def step(batch: torch.Tensor, *, ahead: int) -> None:
        while len(queue) < ahead:
            queue.append(batch.clone())
        model(queue.pop(0)).sum().backward()
        model.zero_grad()

    batch = torch.randn(4096, WIDTH)
    none, two = (estimate(model, batch, step=functools.partial(step, ahead=ahead)) for ahead in (1, 3))
    assert two.peak_allocated_bytes - none.peak_allocated_bytes == 2 * batch.nbytes
    assert queue == []


def test_sharpness_aware_minimisation() -> None:
    """SAM's perturbation is one more copy of the weights while the second gradient is computed."""
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(batch: torch.Tensor, *, radius: float) -> None:
        if radius:
            model(batch).sum().backward()
            with torch.no_grad():
                moves = [p.grad * radius for p in model.parameters() if p.grad is not None]
                torch._foreach_add_(list(model.parameters()), moves)
            optimizer.zero_grad()
        model(batch).sum().backward()
        if radius:
            with torch.no_grad():
                torch._foreach_sub_(list(model.parameters()), moves)
        optimizer.step()
        optimizer.zero_grad()

    plain, sharp = (
        estimate(model, step=functools.partial(step, radius=radius), optimizer=optimizer)
        for radius in (0.0, 0.1)
    )
    assert sharp.peak_allocated_bytes - plain.peak_allocated_bytes == WEIGHTS


class Trainer:
    """A loop as people write them: everything it needs is its own."""

    def __init__(self) -> None:
        self.model, self.teacher, self.scaler = (
            layer(),
            layer().requires_grad_(False),
            torch.amp.GradScaler("cuda"),
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)
        self.losses: list[torch.Tensor] = []
        self.n_steps = 0

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return a loss that needs nothing of the trainer."""
        return F.mse_loss(output, target)

    def step(self, batch: torch.Tensor) -> None:
        """Distil, in half precision, and count."""
        with torch.no_grad():
            wanted = self.teacher(batch)
        with torch.autocast("cuda", torch.float16):
            loss = F.mse_loss(self.model(batch), wanted)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.losses.append(loss.detach())
        self.n_steps += 1


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler", "ignore:.*GradScaler is enabled, but CUDA")
def test_a_trainer_is_left_as_it_was() -> None:
    """What a method's object holds is on paper too: teacher, optimizer, scaler; counters go back."""
    trainer = Trainer()
    before = {name: id(value) for name, value in vars(trainer).items()}
    scaler, schedule = dict(vars(trainer.scaler)), dict(vars(trainer.schedule))
    found = estimate(trainer.model, step=trainer.step)
    assert found.breakdown["weights"] == 2 * WEIGHTS
    assert end_of(found, "step 3 optimizer") >= 4 * WEIGHTS
    assert "aten.full" in {note.operator for note in found._trace.notes}  # the scale and its growth
    assert {name: id(value) for name, value in vars(trainer).items()} == before
    assert (trainer.losses, trainer.n_steps, trainer.optimizer.param_groups[0]["lr"]) == ([], 0, 1e-3)
    assert vars(trainer.scaler) == scaler
    assert vars(trainer.schedule) == schedule


def test_containers_that_a_step_writes_into() -> None:
    """Lists and dicts get rid of tensors of the estimate, at any depth; what else was put in stays."""
    model, logs, counts = layer(), [{"loss": torch.zeros(1)}], [0]
    logs.append({"self": logs})  # type: ignore[dict-item]  # a cycle must not be walked for ever

    def step(batch: torch.Tensor) -> None:
        loss = model(batch).sum()
        loss.backward()
        logs.append({"loss": loss})
        counts.append(1)

    estimate(model, step=step, n_steps=2)
    assert len(logs) == 2
    assert counts == [0, 1, 1]


def test_a_loss_with_weights_of_its_own() -> None:
    """A perceptual loss is a network too, and its weights are on the GPU."""
    judge = layer().requires_grad_(False)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(judge(output), judge(target))

    found = estimate(layer(), (BATCH, BATCH), loss=loss)
    assert found.breakdown["weights"] == 2 * WEIGHTS
    assert "taken to be on the GPU as well: judge (Linear)" in found.assumptions


def reinforce(policy: nn.Module) -> Callable[[torch.Tensor], None]:
    """Return a step of policy gradients over eight moves of an episode."""

    def step(state: torch.Tensor) -> None:
        logs = []
        for _ in range(8):
            choice = torch.distributions.Categorical(logits=policy(state))
            action = choice.sample()
            logs.append(choice.log_prob(action))
            state = torch.tanh(state + action.unsqueeze(-1))
        torch.stack(logs).sum().backward()
        policy.zero_grad()

    return step


def test_an_episode_keeps_its_graph() -> None:
    """A loop over moves saves activations for each of them until the backward pass."""
    found = estimate(policy := layer(), step=reinforce(policy))
    forward = next(phase for phase in found.phases if phase.name == "step 1 forward")
    kept = forward.end_allocated_bytes - found.phases[1].end_allocated_bytes
    assert kept >= 8 * BATCH.nbytes


def by_closure(optimizer: torch.optim.LBFGS, model: nn.Module) -> Callable[[torch.Tensor], None]:
    """Return a step that an optimizer makes by running the model as often as it likes."""

    def step(batch: torch.Tensor) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = model(batch).pow(2).sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    return step


def test_lbfgs_by_its_closure() -> None:
    """LBFGS runs by a closure, and says what its history may take; without a step it is refused."""
    model = layer()
    optimizer = torch.optim.LBFGS(model.parameters(), history_size=3)
    found = estimate(model, step=by_closure(optimizer, model), optimizer=optimizer)
    assert found.unmodelled == (
        "LBFGS keeps steps as numbers tell it to: its history takes up to another 6.01 MiB",
    )


def test_an_estimate_keeps_no_step() -> None:
    """A step holds the model in its variables: the estimate holds the step weakly too."""
    model = layer()

    def step(batch: torch.Tensor) -> None:
        model(batch).sum().backward()

    found = estimate(model, step=step, n_steps=1)
    assert found.max_batch_size(limit_bytes=2**30).batch_size > 16
    watched = weakref.ref(step)
    del step
    gc.collect()
    assert watched() is None
    with pytest.raises(ValueError, match="The step of this estimate is gone"):
        found.fits("T4")


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler", "ignore:.*GradScaler is enabled, but CUDA")
def test_an_estimate_keeps_no_loss_that_has_a_network() -> None:
    """A trainer's method and a judge's closure are held weakly; a plain loss, given inline, is kept."""
    trainer, judge, model = Trainer(), layer(), layer()

    def judged_by(network: nn.Module) -> Callable[..., torch.Tensor]:
        return lambda output, target: F.mse_loss(network(output), target)

    batch, judged = (BATCH, BATCH), judged_by(judge)
    estimates = [estimate(model, batch, loss=loss, n_steps=1) for loss in (trainer.loss, judged)]
    watched = weakref.ref(trainer), weakref.ref(judge)
    del trainer, judge, judged
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
    for found in estimates:
        with pytest.raises(ValueError, match="The loss of this estimate is gone"):
            found.fits("T4")
    inline = estimate(model, batch, loss=nn.CrossEntropyLoss(weight=torch.ones(WIDTH)), n_steps=1)
    assert inline.fits("T4")


def test_samples_along_another_dimension() -> None:
    """With batch_dim the samples are those of that dimension, and other batch sizes grow along it."""
    model = nn.LSTM(8, 8)
    sequences = torch.randn(100, 4, 8)  # (time, samples, features)
    by_default, by_second = (estimate(model, sequences, batch_dim=dim, n_steps=1) for dim in (0, 1))
    assert (by_default.batch_size, by_second.batch_size) == (100, 4)
    assert by_second._retrace is not None
    doubled = by_second._retrace(batch_size=8)
    assert doubled is not None
    batch = [
        e.size_bytes for e in doubled.events if doubled.notes[e.note].category == "batch" and e.size_bytes
    ]
    assert batch == [2 * sequences.nbytes]
    with pytest.raises(ValueError, match="batch_dim=-1 was given to estimate_vram"):
        estimate(model, sequences, batch_dim=-1)
