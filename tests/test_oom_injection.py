"""`inject_oom`: fails where it is told to, and counts."""

import pytest
import torch
from torch import nn

from torchfast import inject_oom, oom_guard


def test_injection_counts_and_fails_where_told() -> None:
    """The operator is chosen by number, name and phase; the failed operator has changed nothing."""
    tensor = torch.zeros(3)
    injection = inject_oom(1, operator="add_")

    def work() -> None:
        with injection:
            tensor.mul_(2)
            tensor.add_(1)
            tensor.add_(1)

    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate .* in place of aten.add_"):
        work()
    assert tensor.tolist() == [1, 1, 1]
    assert (injection.n_operators, injection.n_failures) == (2, 1)


def test_injection_by_rank() -> None:
    """On another rank than the one named nothing fails."""
    with inject_oom(rank=1) as injection:
        torch.zeros(2) + 1
    assert injection.n_failures == 0
    assert injection.n_operators > 0


def test_injection_asks_for_its_rank_when_it_is_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be made before the process group is."""
    injection = inject_oom(rank=1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with pytest.raises(torch.OutOfMemoryError), injection:
        torch.zeros(2)
    assert injection.n_failures == 1


def test_injection_that_cannot_fail_says_so() -> None:
    """By the number of samples it fails only where a guard hands them out: a plain loop tests nothing."""
    said = (
        "inject_oom(above=16) could not fail: it counts the samples that a guard's steps, attempts or "
        "chunked hand out, and none were handed out within its block. Loop over guard.steps(loader)."
    )
    with pytest.warns(UserWarning) as warned, inject_oom(above=16):  # noqa: PT030 -- the whole text is below
        torch.zeros(64) + 1
    assert [str(warning.message) for warning in warned] == [said]
    with inject_oom(above=64, operator="add"):
        for batch in oom_guard().steps([torch.zeros(64)]):
            batch * 2


def test_injection_finds_the_phases() -> None:
    """Operators of the forward pass, the backward pass and the optimizer's step are told apart."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counts = [inject_oom(times=0, phase=phase) for phase in ("forward", "backward", "optimizer")]
    everything = inject_oom(times=0)
    with counts[0], counts[1], counts[2], everything:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert all(count.n_operators > 0 for count in counts)
    assert sum(count.n_operators for count in counts) < everything.n_operators  # the input and the sum
