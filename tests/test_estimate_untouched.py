"""Whatever happens within an estimate, model, optimizer, random state and flags come out as they went in."""

import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.test_estimate_steps import by_closure
from torchfast import estimate_vram


class FailedError(Exception):
    """What a step ends with."""


class FailsAfter(TorchFunctionMode):
    """Fails at the n-th call of a function on tensors, if there are that many."""

    def __init__(self, n_calls: int) -> None:
        super().__init__()
        self.n_left = n_calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, or fail."""
        self.n_left -= 1
        if self.n_left == 0:
            raise FailedError
        return func(*args, **(kwargs or {}))


def a_model() -> nn.Module:
    """Return a model of every kind of thing that a module holds."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())
    model.append(nn.utils.parametrizations.weight_norm(nn.Linear(4 * 36, 8)))
    model.append(nn.Linear(8, 8))
    model[-1].weight.requires_grad_(False)
    return model.eval()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Return all that must not change: which objects there are, and the numbers in them."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [v for values in optimizer.state.values() for v in values.values() if torch.is_tensor(v)]
    return (
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [(id(t), type(t), t._version, t.tolist(), t.requires_grad, id(t.grad)) for t in tensors],
        [[(k, id(v)) for k, v in vars(module).items()] for module in model.modules()],
        [
            [(key, repr(value)) for key, value in group.items() if key != "params"]
            + [id(parameter) for parameter in group["params"]]
            for group in optimizer.param_groups
        ],
        (id(optimizer.param_groups), id(optimizer.state), [id(key) for key in optimizer.state]),
    )


def state_of_the_process() -> Any:
    """Return the random state and the flags that training code sets."""
    cudnn = torch.backends.cudnn
    return (
        torch.random.get_rng_state().tolist(),
        random.getstate(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
        torch.is_anomaly_enabled(),
        torch.get_deterministic_debug_mode(),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.is_autocast_cache_enabled(),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
        torch.cuda.is_available,
        torch.cuda.Stream,
        torch.Generator,
        torch.compile,
        nn.parallel.DistributedDataParallel.forward,
        len(torch.overrides._get_current_function_mode_stack()),
    )


@settings(max_examples=30, deadline=None)
@given(n_calls=st.integers(0, 300), has_run=st.booleans(), half=st.booleans())
def test_a_step_that_fails_anywhere_leaves_no_trace(n_calls: int, *, has_run: bool, half: bool) -> None:
    """Cut off at any operation, or not at all, an estimate changes nothing that was there before it."""
    model, images, wanted = a_model(), torch.randn(2, 3, 8, 8), torch.randn(2, 8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    if has_run:
        model(images).sum().backward()
        optimizer.step()

    def step(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        with FailsAfter(n_calls):
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                loss = nn.functional.mse_loss(model(batch[0]), batch[1])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    before, process = state_of(model, optimizer), state_of_the_process()
    with contextlib.suppress(ValueError):
        estimate_vram(model, (images, wanted), step=step, optimizer=optimizer, gpu="T4", n_steps=2)
    assert state_of(model, optimizer) == before
    assert state_of_the_process() == process


@pytest.mark.parametrize("error", [None, FailedError, KeyboardInterrupt, SystemExit])
def test_flags_that_a_step_sets_are_taken_back(error: type[BaseException] | None) -> None:
    """What a step sets of PyTorch's flags is as before afterwards, however the step ends."""
    model, batch = nn.Linear(4, 4), torch.randn(2, 4)

    def step(batch: torch.Tensor) -> None:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(mode=True)
        torch.autograd.set_detect_anomaly(mode=True)
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_grad_enabled(False)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False
        torch.manual_seed(3)
        random.seed(3)
        model(batch)
        if error is not None:
            raise error

    before = state_of_the_process()
    with contextlib.suppress(ValueError, KeyboardInterrupt, SystemExit):
        estimate_vram(model, batch, step=step, gpu="T4", n_steps=1)
    assert state_of_the_process() == before


def test_the_first_estimate_of_a_process_is_like_any_other() -> None:
    """What PyTorch imports on the way keeps nothing of the first step alive."""
    program = (
        "import torch; from torchfast import estimate_vram; model = torch.nn.Linear(8, 8);"
        "print([estimate_vram(model, torch.zeros(4, 8), gpu='T4').peak_requested_bytes for _ in range(2)])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, second = json.loads(run.stdout)
    assert first == second


BACKENDS: Any = torch.backends  # whose types are not complete
PRECISIONS = (
    BACKENDS,
    BACKENDS.cuda.matmul,
    BACKENDS.cudnn.conv,
    BACKENDS.cudnn.rnn,
    BACKENDS.mkldnn.matmul,
)


@pytest.fixture(params=["none", "tf32", "ieee"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """Set each of the newer flags for TF32 but the one of all backends; put them and the older ones back."""
    before = [owner.fp32_precision for owner in PRECISIONS]
    older = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    for owner in PRECISIONS[1:]:
        owner.fp32_precision = request.param
    yield request.param
    torch.backends.cudnn.allow_tf32 = older[0]
    torch.set_float32_matmul_precision(older[1])
    for owner, value in zip(PRECISIONS, before, strict=True):
        owner.fp32_precision = value


def test_precisions_of_single_backends_are_taken_back(precision: str) -> None:
    """Where they forbid to read the older flags, too; an estimate by itself sets none of either."""

    def step(batch: torch.Tensor) -> None:
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = precision == "ieee"
        model(batch)

    model = nn.Linear(4, 4)
    before = [owner.fp32_precision for owner in PRECISIONS]
    for each in (None, step):
        estimate_vram(model, torch.randn(2, 4), step=each, gpu="T4", n_steps=1)
        assert [owner.fp32_precision for owner in PRECISIONS] == before


@pytest.mark.parametrize("fails", [False, True])
def test_real_tensors_that_a_step_gets_at_come_out_as_they_were(*, fails: bool) -> None:
    """Averages in a dict, weights in a list, gradients, and the optimizer inside of an optimizer."""

    class Lookahead(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__(inner.param_groups, {})
            self.inner, self.n = inner, 0
            self.param_groups, self.state = inner.param_groups, inner.state

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.inner.step(closure)
            self.n += 1

    model = nn.Linear(8, 8)
    batch = torch.randn(4, 8)
    optimizer = Lookahead(torch.optim.AdamW(model.parameters()))
    step_by_closure = by_closure(torch.optim.LBFGS(model.parameters()), model)
    weights, average = list(model.parameters()), {"weight": torch.ones(8, 8)}
    model(batch).sum().backward()
    before = [t.detach().clone() for w in weights for t in (w, w.grad) if t is not None]

    def step(data: torch.Tensor) -> None:
        step_by_closure(data)
        optimizer.step()
        nn.utils.clip_grad_norm_(weights, 0.1)
        average["weight"].mul_(0.5)
        if fails:
            raise KeyError("a mistake")

    with pytest.raises(ValueError, match="a mistake") if fails else contextlib.nullcontext():
        estimate_vram(model, batch, step=step, gpu="T4")
    after = [t for w in weights for t in (w, w.grad) if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert (optimizer.n, len(optimizer.inner.state), float(average["weight"].min())) == (0, 0, 1.0)


def test_a_step_may_take_things_out_of_its_batch() -> None:
    """Each step has the batch as it was given, and so has the caller in the end."""
    batch: dict[str, Any] = {"x": torch.randn(4, 8), "y": torch.zeros(4).long(), "meta": {"name": ["a"]}}
    model = nn.Linear(8, 3)

    def step(data: dict[str, Any]) -> None:
        data["meta"]["n"] = len(data["meta"]["name"])
        data["meta"]["name"].append("b")
        nn.functional.cross_entropy(model(data["x"]), data.pop("y")).backward()

    estimate_vram(model, batch, step=step, gpu="T4")
    assert list(batch) == ["x", "y", "meta"]
    assert batch["meta"] == {"name": ["a"]}


class Cache:
    """An object of the user's own in which a model keeps things."""

    def __init__(self) -> None:
        self.key: torch.Tensor | None = None
        self.n_calls = 0


class Caching(nn.Module):
    """A model with a cache, and a parameter that is tagged."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.cache = nn.Linear(8, 8), Cache()
        self.scale: Any = nn.Parameter(torch.ones(()))
        vars(self.scale)["factor"] = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keep the key, count, and read the tag."""
        self.cache.key = self.layer(x)
        self.cache.n_calls += 1
        scaled: torch.Tensor = self.cache.key * self.scale * self.scale.factor
        return scaled


class Trainer:
    """Keeps a history, in lists of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.losses, self.history = list[float](), {"loss": list[float]()}

    def __call__(self, batch: torch.Tensor) -> None:
        """Step once."""
        loss = self.model(batch).sum()
        loss.backward()
        self.losses.append(loss.item())
        self.history["loss"].append(loss.item())


def test_what_models_and_trainers_keep_is_taken_back() -> None:
    """Objects that a model holds, lists in a trainer's, and on paper parameters keep their tags."""
    model = Caching()
    trainer = Trainer(model)
    estimate_vram(model, torch.randn(4, 8), step=trainer, gpu="T4")
    assert (model.cache.key, model.cache.n_calls) == (None, 0)
    assert (trainer.losses, trainer.history) == ([], {"loss": []})


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
def test_optimizers_for_cuda_graphs_are_run(make: Any) -> None:
    """With `capturable=True` they count their steps on the device."""
    estimate = estimate_vram(
        nn.Linear(64, 64), torch.randn(4, 64), gpu="T4", optimizer=lambda p: make(p, capturable=True)
    )
    assert estimate.breakdown["optimizer state"] >= 2 * 64 * 65 * 4


def test_optimizers_that_step_in_the_backward_pass_are_named() -> None:
    """Hooks of parameters are not run on paper, which is said."""
    model = nn.Linear(8, 8)
    model.weight.register_post_accumulate_grad_hook(lambda _: None)
    estimate = estimate_vram(model, torch.randn(4, 8), gpu="T4")
    assert any(
        "post-accumulate-grad hooks of 1 parameters, such as 'weight'" in said for said in estimate.unmodelled
    )


def test_optimizers_of_one_name_are_told_apart() -> None:
    """As functions of two places know them: both are on paper, and come out as they went in."""
    model = nn.Linear(8, 8)

    def stepper(optimizer: torch.optim.Optimizer) -> Any:
        def run() -> None:
            optimizer.step()

        return run

    adams = [torch.optim.Adam(model.parameters()) for _ in range(2)]
    first, second = map(stepper, adams)

    def step(batch: torch.Tensor) -> None:
        model(batch).sum().backward()
        first()
        second()

    estimate = estimate_vram(model, torch.randn(4, 8), step=step, gpu="T4")
    assert [len(adam.state) for adam in adams] == [0, 0]
    assert estimate.breakdown["optimizer state"] >= 4 * 8 * 8 * 4
