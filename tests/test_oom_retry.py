"""Trying again: whole, then in parts with the whole batch's gradient."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import oom_faults
from torchfast import OutOfMemoryError, inject_oom, oom_guard

pytestmark = pytest.mark.usefixtures("quick_collections")
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB."


def steps_of(
    model: nn.Module,
    batch: Any,
    loss: Callable[[nn.Module, Any], torch.Tensor],
    *,
    above: int | None,
    **options: Any,
) -> list[torch.Tensor]:
    """Return the gradients of one step that fails for parts of more than `above` samples."""
    retry = oom_guard().retry(model=model, **options)
    model.zero_grad()
    with inject_oom(at=3, above=above, times=0 if above is None else None):
        for attempt in retry.attempts(batch):
            with attempt:
                for part, weight in attempt:
                    (loss(model, part) * weight).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def mean_loss(model: nn.Module, part: Any) -> torch.Tensor:
    """Return the cross entropy of the part's samples."""
    samples, labels = part
    return F.cross_entropy(model(samples), labels)


# --- parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transformer", "rnn", "first_step"])
@pytest.mark.parametrize("above", [4, 3, 1])
def test_parts_have_the_gradient_of_the_whole(name: str, above: int) -> None:
    """Without randomness and whole-batch layers, the gradients of parts add up to the full batch's."""
    training = oom_faults.begin(name)
    for module in training.model.modules():
        if isinstance(module, (nn.Dropout, nn.MultiheadAttention)):
            module.train(mode=False)
    whole = steps_of(training.model, training.batches[0], mean_loss, above=None)
    parts = steps_of(training.model, training.batches[0], mean_loss, above=above)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)


def test_parts_are_weighted_by_tokens() -> None:
    """A mean over the valid tokens stays one, however unevenly they fall into the parts."""
    model = nn.Linear(4, 7)
    tokens, labels = torch.randn(9, 5, 4), torch.randint(7, (9, 5))
    labels[torch.rand(9, 5) < 0.6] = -100
    labels[:, 0] = 1  # no sample is empty

    def token_loss(model: nn.Module, part: Any) -> torch.Tensor:
        inputs, targets = part
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-100)

    whole = steps_of(model, (tokens, labels), token_loss, above=None)
    parts = steps_of(
        model, (tokens, labels), token_loss, above=2, tokens=lambda part: (part[1] != -100).sum()
    )
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)


def test_a_part_without_tokens_takes_no_part() -> None:
    """Its mean would be 0 / 0, and a weight of 0 makes no number of its gradients."""
    samples = torch.randn(4, 4)
    mask = torch.tensor([[1.0], [1.0], [0.0], [0.0]])

    def loss(model: nn.Module, part: Any) -> torch.Tensor:
        x, valid = part
        mean: torch.Tensor = (model(x) * valid).sum() / valid.sum()
        return mean

    model = nn.Linear(4, 1)
    whole, parts = (
        steps_of(model, (samples, mask), loss, above=above, tokens=lambda part: part[1].sum())
        for above in (None, 2)
    )
    assert all(map(torch.equal, whole, parts))


def test_each_attempt_is_given_the_batch_as_it_was() -> None:
    """Whatever the last one took out of its containers, as labels are; the first has the user's own."""
    batch: dict[str, Any] = {"x": torch.randn(8, 4), "more": [torch.ones(8)], "labels": torch.zeros(8).long()}
    model, given = nn.Linear(4, 3), list[dict[str, Any]]()
    retry = oom_guard().retry(model=model)

    @retry
    def step(attempt: Any) -> None:
        for part, weight in attempt:
            given.append(part)
            labels, _ = part.pop("labels"), part["more"].pop()
            (F.cross_entropy(model(part["x"]), labels) * weight).backward()

    with inject_oom(above=4, times=None):
        step(batch)
    assert [part["x"].shape[0] for part in given] == [8, 8, 4, 4]
    assert given[0] is batch
    assert given[1] is not batch


def test_batch_along_another_dimension() -> None:
    """A batch of shape (time, batch, features) is split along dimension 1 when told so."""
    seen = []
    retry = oom_guard(batch_dim=1).retry(model=nn.Linear(1, 1), split="safe")
    with inject_oom(above=2, times=None):
        for attempt in retry.attempts(torch.zeros(7, 4, 3)):
            with attempt:
                for part, _ in attempt:
                    seen.append((part * 1).shape)
    assert seen == [(7, 2, 3), (7, 2, 3)]


def test_whole_batch_is_the_users_own_object() -> None:
    """While nothing fails, the step sees the batch itself, with weight 1."""
    batch = {"x": torch.zeros(3)}
    for attempt in oom_guard().retry(model=nn.Linear(1, 1)).attempts(batch):
        with attempt:
            parts = list(attempt)
    assert parts[0].batch is batch
    assert [part.weight for part in parts] == [1.0]


# --- what parts would change -------------------------------------------------------------------------------


def test_whole_batch_layers_are_not_split_unasked() -> None:
    """With batch norm in training the guard names the layer and gives up; told so, it goes on and warns."""
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16))
    batch = (torch.randn(8, 12), torch.randint(16, (8,)))
    with pytest.raises(OutOfMemoryError, match=r"1 \(BatchNorm1d\) sees the whole batch"):
        steps_of(model, batch, mean_loss, above=4)
    with pytest.warns(UserWarning, match=r"1 \(BatchNorm1d\) sees 4 samples at a time"):
        steps_of(model, batch, mean_loss, above=4, split="always")
    model.eval()
    steps_of(model, batch, mean_loss, above=4)


def test_random_layers_are_named_once() -> None:
    """Dropout in parts draws other numbers: said once, not at every step."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(12, 3))
    batch = (torch.randn(8, 12), torch.randint(3, (8,)))
    retry = oom_guard().retry(model=model)

    @retry
    def step(attempt: Any) -> None:
        for part, weight in attempt:
            (mean_loss(model, part) * weight).backward()

    with (
        pytest.warns(UserWarning, match=r"0 \(Dropout\) draws other random numbers") as warned,
        inject_oom(at=3, above=4, times=None),
    ):
        _ = [step(batch) for _ in range(3)]
    assert len(warned) == 1


def test_splitting_can_be_switched_off() -> None:
    """With split="never" only the same size is tried again."""
    model = nn.Linear(12, 3)
    batch = (torch.randn(8, 12), torch.randint(3, (8,)))
    with pytest.raises(OutOfMemoryError, match="was switched off"):
        steps_of(model, batch, mean_loss, above=4, split="never")


# --- attempts ----------------------------------------------------------------------------------------------


def test_one_sample_that_does_not_fit_is_an_error() -> None:
    """Where even one sample fails, the attempts end with the explained error and the step undone."""
    model = nn.Linear(4, 2)
    model.bias.grad = torch.ones(2)
    batch = (torch.randn(3, 4), torch.randint(2, (3,)))
    retry = oom_guard().retry(model=model)
    n_attempts = 0

    def step() -> None:
        nonlocal n_attempts
        for attempt in retry.attempts(batch):
            n_attempts += 1
            with attempt, inject_oom(phase="backward", at=2):
                for part, weight in attempt:
                    (mean_loss(model, part) * weight).backward()

    with pytest.raises(OutOfMemoryError, match="Even one sample at a time does not fit"):
        step()
    assert n_attempts == 4  # 3, 3, 2, 1
    assert model.weight.grad is None
    assert torch.equal(model.bias.grad, torch.ones(2))


def test_quiet_guard_ends_the_step_quietly() -> None:
    """With reraise=False a step that cannot be saved ends the loop and leaves a report."""
    guard = oom_guard(reraise=False)
    retry = guard.retry(model=nn.Linear(1, 1))
    n_attempts = 0
    for attempt in retry.attempts(torch.zeros(1)):
        n_attempts += 1
        with attempt:
            raise torch.OutOfMemoryError(CUDA)
    assert n_attempts == 2
    assert guard.report is not None
    assert "Even one sample" in guard.report.message


@pytest.mark.parametrize("at", [2, 5])
def test_a_quiet_guard_does_not_go_on_from_half_a_step(at: int) -> None:
    """Where the optimizer's step has begun and nothing was copied, there is no way back: that is an error."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters())
    retry = oom_guard(reraise=False).retry(model=model, optimizer=optimizer)

    @retry
    def step(attempt: Any) -> None:
        for part, weight in attempt:
            (model(part).mean() * weight).backward()
        optimizer.step()

    with inject_oom(at=at, phase="optimizer"), pytest.raises(OutOfMemoryError, match="optimizer"):
        step(torch.ones(8, 4))


def test_a_quiet_block_ends_with_a_step_that_cannot_be_tried_again() -> None:
    """It is the block that is quiet: the steps behind would begin with what the failed one left."""
    model, batches, n_begun = nn.Linear(4, 1), [torch.ones(1, 4)] * 3, 0
    with oom_guard(reraise=False) as guard, inject_oom(times=None):
        retry = guard.retry(model=model)
        for batch in guard.steps(batches):
            n_begun += 1
            for attempt in retry.attempts(batch):
                with attempt:
                    for part, weight in attempt:
                        (model(part).mean() * weight).backward()
    assert n_begun == 1
    assert guard.report is not None


def test_copies_of_a_retry_are_no_work_on_what_was_handed_out() -> None:
    """`inject_oom(above=)` fails the work on a batch, not what the retry does before it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval())
    guard, sizes = oom_guard(), list[int]()
    retry = guard.retry(model=model)
    with guard, inject_oom(above=16, times=None):
        for batch in guard.steps([torch.ones(64, 4)]):
            for attempt in retry.attempts(batch):
                with attempt:
                    for part, weight in attempt:
                        (model(part).mean() * weight).backward()
                        sizes.append(len(part))
    assert sizes == [16] * 4


def test_errors_that_no_retry_helps_are_raised_at_once() -> None:
    """A request for an impossible size is not repeated."""
    retry = oom_guard().retry(model=nn.Linear(1, 1))
    n_attempts = 0

    def step() -> None:
        nonlocal n_attempts
        for attempt in retry.attempts(torch.zeros(8)):
            n_attempts += 1
            with attempt:
                message = "CUDA out of memory. Tried to allocate more than 1EB memory."
                raise torch.OutOfMemoryError(message)

    with pytest.raises(OutOfMemoryError, match="cannot help here"):
        step()
    assert n_attempts == 1


def test_no_room_for_the_copy_is_an_error() -> None:
    """Where the copy of the state does not fit, the attempt does not begin, and the error says so."""
    attempts = oom_guard().retry(model=nn.Linear(4, 4), copy=True).attempts(torch.zeros(8))
    with inject_oom(operator="clone"), pytest.raises(OutOfMemoryError, match="Try batch_size=4"):
        next(attempts)


def test_no_room_for_the_copy_ends_a_quiet_step() -> None:
    """A quiet guard offers no attempt where the state does not fit twice, and says why in its report."""
    guard = oom_guard(reraise=False)
    retry = guard.retry(model=nn.Linear(4, 4), copy=True)
    step = retry(lambda attempt: attempt.number)
    with inject_oom(operator="clone"):
        assert step(torch.zeros(8)) is None
    assert guard.report is not None
    assert guard.report.suggested_batch_size == 4
    assert step(torch.zeros(8)) == 1


def test_other_errors_pass_through_an_attempt() -> None:
    """An exception of another kind is the same object, after one attempt."""
    retry = oom_guard().retry(model=nn.Linear(1, 1))
    error = KeyError("labels")

    def step() -> None:
        for attempt in retry.attempts(torch.zeros(8)):
            with attempt:
                raise error

    with pytest.raises(KeyError) as caught:
        step()
    assert caught.value is error


def test_leaving_the_loop_counts_as_success() -> None:
    """`break` and `return` inside an attempt end it well."""
    retry = oom_guard().retry(model=nn.Linear(1, 1))

    def step() -> str:
        for attempt in retry.attempts(torch.zeros(8)):
            with attempt:
                return "done"
        return "never"

    assert step() == "done"
    assert step() == "done"


def test_attempt_that_is_not_entered_is_an_error() -> None:
    """Forgetting `with attempt:` is told, instead of looping for ever."""
    retry = oom_guard().retry(model=nn.Linear(1, 1))
    with pytest.raises(RuntimeError, match="was not entered"):
        for _ in retry.attempts(torch.zeros(8)):
            pass


def test_decorated_step() -> None:
    """A decorated step takes the batch, is tried again, and returns what its last attempt returned."""
    model = nn.Linear(12, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = (torch.randn(8, 12), torch.randint(3, (8,)))

    @oom_guard().retry(model=model, optimizer=optimizer)
    def train_step(attempt: Any) -> int:
        """Take a step."""
        for part, weight in attempt:
            (mean_loss(model, part) * weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        return int(attempt.size)

    with inject_oom(at=2, above=4, times=None):
        assert train_step(batch) == 4
    assert (train_step.__name__, train_step.__doc__) == ("train_step", "Take a step.")


def test_failed_attempt_holds_nothing() -> None:
    """When the next attempt begins, what the failed one bound in the running function is gone."""
    alive: list[weakref.ref[torch.Tensor]] = []
    gc.disable()
    try:
        for attempt in oom_guard().retry(model=nn.Linear(1, 1)).attempts(torch.zeros(8)):
            assert all(reference() is None for reference in alive)
            with attempt:
                for part, _ in attempt:
                    hidden = part * 2
                    alive.append(weakref.ref(hidden))
                    if attempt.number == 1:
                        raise torch.OutOfMemoryError(CUDA)
    finally:
        gc.enable()
    assert len(alive) == 2


def test_batch_is_let_go_after_the_step() -> None:
    """An attempt that succeeded does not keep its batch alive, though its variable does not die."""
    batch = torch.zeros(8)
    reference = weakref.ref(batch)
    for attempt in oom_guard().retry(model=nn.Linear(1, 1)).attempts(batch):
        with attempt:
            pass
    del batch
    assert reference() is None
    assert attempt.outcome == 0
