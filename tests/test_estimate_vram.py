"""estimate_vram as a user calls it: what it says of a step, and that it leaves no trace."""

import functools
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchfast import GPUTeacher, VRAMEstimate, estimate_vram

ADAMW = torch.optim.AdamW


def mlp(width: int = 64, depth: int = 3) -> nn.Sequential:
    """Return a small perceptron."""
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


class Convolutional(nn.Module):
    """A network with the usual parts: convolution, batch norm with buffers, dropout, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(8, 10)
        self.n_calls = 0
        self.last: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits, and remember things on the side as models do."""
        self.n_calls += 1
        self.last = x
        return self.head(self.body(x).mean((2, 3)))  # type: ignore[no-any-return]  # a module's call is Any


class WithLoss(nn.Module):
    """A model in the style of transformers: keyword arguments in, a mapping with a loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 16)
        self.head = nn.Linear(16, 100)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return loss and logits."""
        logits = self.head(self.embed(tokens))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def estimate(model: nn.Module, batch: Any, **options: Any) -> VRAMEstimate:
    """Estimate for the GPU that all constants of this file are for."""
    return estimate_vram(model, batch, gpu="H200", **options)


# --- what is counted -------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(batch=st.integers(1, 300), width=st.integers(1, 90), hidden=st.integers(1, 90))
def test_every_byte_of_a_perceptron(batch: int, width: int, hidden: int) -> None:
    """The peak of a step whose tensors one can count by hand is that count."""
    model = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1))
    weights = 4 * sum(p.numel() for p in model.parameters())
    found = estimate(model, torch.randn(batch, width), optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    assert found.breakdown["weights"] == weights
    assert found.breakdown["batch"] == 4 * batch * width
    assert sum(found.breakdown.values()) == found.peak_process_bytes
    # cuBLAS keeps 32 MiB for each of the two threads, cuBLASLt 1 MiB for the one that adds biases.
    assert found.breakdown["workspaces"] >= 65 * 2**20


@pytest.mark.parametrize(
    ("optimizer", "n_copies"),
    [
        (functools.partial(torch.optim.SGD, lr=0.1), 0),
        (functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), 1),
        (ADAMW, 3),
        (functools.partial(ADAMW, foreach=False), 2.66),  # and two temporaries of one layer
        (functools.partial(ADAMW, fused=True), 2),
    ],
    ids=["sgd", "momentum", "adamw", "adamw for-loop", "adamw fused"],
)
def test_what_an_optimizer_takes(optimizer: Callable[..., Any], n_copies: float) -> None:
    """State, and for foreach implementations a temporary copy of all parameters, as CUDA chooses them."""
    model = mlp(width=512)
    n_bytes = 4 * sum(p.numel() for p in model.parameters())
    found = estimate(model, torch.randn(2, 512), optimizer=optimizer)
    assert found.breakdown.get("optimizer state", 0) / n_bytes == pytest.approx(n_copies, abs=0.1)


def test_a_training_step_as_measured_on_an_h200() -> None:
    """An MLP's three steps peak to the byte where they did on an H200 (torch 2.11)."""
    with torch.device("meta"):
        body = [layer for _ in range(8) for layer in (nn.Sequential(nn.Linear(4096, 4096), nn.GELU()),)]
        model = nn.Sequential(*body, nn.Linear(4096, 1000))
        batch = torch.randn(64, 4096), torch.randint(0, 1000, (64,))
    found = estimate(model, batch, loss=F.cross_entropy, optimizer=functools.partial(ADAMW, lr=1e-4))
    assert found.peak_requested_bytes == 2_836_156_452


def test_a_model_on_meta_is_the_same_as_one_on_the_cpu() -> None:
    """Values play no part: with and without memory behind it a model gets the same estimate."""
    real = estimate(Convolutional(), torch.randn(4, 3, 9, 9), optimizer=ADAMW)
    with torch.device("meta"):
        paper = estimate(Convolutional(), torch.randn(4, 3, 9, 9), optimizer=ADAMW)
    assert str(real) == str(paper)


def test_dropout_keeps_a_byte_an_element() -> None:
    """CUDA's fused dropout saves a mask of bytes, where other backends keep one of floats."""
    without = estimate(nn.Sequential(nn.Linear(64, 64), nn.Identity()), torch.randn(4096, 64))
    with_it = estimate(nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)), torch.randn(4096, 64))
    forward = [next(p for p in e.phases if p.name == "step 1 forward") for e in (without, with_it)]
    assert forward[1].end_allocated_bytes - forward[0].end_allocated_bytes == 4096 * 64


def test_autocast_halves_activations_and_casts_weights_once() -> None:
    """Under autocast activations take two bytes, and each weight is cast once for a whole forward pass."""
    shared = nn.Linear(256, 256, bias=False)
    model = nn.Sequential(shared, shared, shared)
    full, half = (
        estimate(model, torch.randn(8192, 256), autocast=dtype).peak_allocated_bytes
        for dtype in (None, torch.bfloat16)
    )
    assert half < full
    trace = estimate(model, torch.randn(8192, 256), autocast=torch.bfloat16, n_steps=1)._trace
    casts = [event for event in trace.events if trace.notes[event.note].operator == "aten._to_copy"]
    assert sum(1 for event in casts if event.size_bytes == 256 * 256 * 2) == 1


def test_checkpointing_saves_activations() -> None:
    """Recomputation in the backward pass is run as it is, under the same autocast."""

    class Checkpointed(nn.Module):
        def __init__(self, *, save: bool) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(mlp(width=64, depth=4)[:-1] for _ in range(4))
            self.save = save

        def forward(self, x: torch.Tensor) -> Any:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False) if self.save else block(x)
            return x

    peaks = [
        estimate(Checkpointed(save=save), torch.randn(8192, 64), autocast=torch.bfloat16).peak_allocated_bytes
        for save in (False, True)
    ]
    assert peaks[1] < peaks[0]


def test_clipping_and_a_gradient_scaler() -> None:
    """A step in half precision with a scaler and clipping runs, with one kernel for all norms."""
    found = estimate(mlp(), torch.randn(8, 64), optimizer=ADAMW, autocast=torch.float16, clip_grad_norm=1.0)
    operators = {note.operator for note in found._trace.notes}
    assert "aten._foreach_norm" in operators


def test_a_teacher_has_its_own_line() -> None:
    """The teacher's weights are counted apart, and no graph is kept for it."""
    teacher = mlp(width=128)
    student = nn.Linear(128, 10)
    found = estimate(student, torch.randn(4, 128), teacher=teacher, optimizer=ADAMW)
    assert found.breakdown["teacher"] >= 4 * sum(p.numel() for p in teacher.parameters())
    line = found.summary()
    assert "teacher Sequential" in line
    assert "batch 4" in line


def test_a_loss_that_takes_the_teachers_output() -> None:
    """A loss with three parameters gets output, target and the teacher's output."""
    seen: list[int] = []

    def distill(output: torch.Tensor, target: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        seen.append(taught.shape[1])
        return F.cross_entropy(output, target) + F.mse_loss(output, taught)

    batch = torch.randn(4, 16), torch.randint(0, 10, (4,))
    estimate(nn.Linear(16, 10), batch, loss=distill, teacher=nn.Linear(16, 10))
    assert seen == [10, 10, 10]


def test_a_gpu_teacher_counts_as_its_module() -> None:
    """A teacher that is no module itself is on paper by the module that it holds, and is held weakly."""
    import gc
    import weakref

    model, batch = mlp(), torch.randn(4, 64)
    teacher = GPUTeacher(mlp(64, 5), "cpu", dtype=torch.bfloat16)
    module, watched = teacher.module, weakref.ref(teacher)
    found = estimate(model, batch, teacher=teacher)
    assert found.breakdown["teacher"] == sum(2 * p.numel() for p in module.parameters())
    assert all(type(p) is nn.Parameter for p in module.parameters())
    del teacher
    gc.collect()
    assert watched() is None


def test_model_and_teacher_may_share_modules() -> None:
    """What both hold is on paper once, and comes out of it."""
    body = nn.Linear(64, 64)
    model, teacher = nn.Sequential(body, nn.Linear(64, 10)), nn.Sequential(body, nn.Linear(64, 2))
    found = estimate(model, torch.randn(4, 64), teacher=teacher)
    assert found.breakdown["weights"] == 4 * sum(p.numel() for p in model.parameters())
    assert found.breakdown["teacher"] == 4 * sum(p.numel() for p in teacher[1].parameters())
    assert type(body.weight) is nn.Parameter


def test_tied_weights_count_once() -> None:
    """A weight used in two places is one block of memory."""
    model = WithLoss()
    model.head.weight = model.embed.weight
    tokens = torch.randint(0, 100, (2, 5))
    found = estimate(model, {"tokens": tokens, "labels": tokens})
    assert found.breakdown["weights"] == 4 * (100 * 16 + 100)


# --- how it is called ------------------------------------------------------------------------------------


def test_mappings_tuples_and_tensors() -> None:
    """A mapping is passed as keywords, a tuple as arguments, a tensor alone: the same step each time."""
    tokens = torch.randint(0, 100, (2, 5))
    labels = tokens.clone()
    by_name = estimate(WithLoss(), {"tokens": tokens, "labels": labels})
    by_place = estimate(WithLoss(), (tokens, labels))
    assert str(by_name) == str(by_place)
    assert estimate(nn.Linear(4, 4), torch.randn(2, 4)).peak_allocated_bytes > 0


def test_values_name_modules_as_they_do_off_paper() -> None:
    """A model that looks a part up by a value of the batch finds it: values are written as numbers."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({f"part_{i}": nn.Linear(4, 4) for i in range(3)})

        def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
            for i in chosen:
                x = self.parts[f"part_{i}"](x)
            return x

    found = estimate_vram(Parts(), (torch.zeros(2, 4), torch.tensor([2, 0])))
    assert {moment.module for moment in found.timeline} >= {"parts.part_2", "parts.part_0"}


def test_inference_keeps_no_graph() -> None:
    """training=False runs a forward pass without gradients, in eval mode, and says so."""
    model = mlp(width=256, depth=6)
    batch = torch.randn(4096, 256)
    inference = estimate(model, batch, training=False)
    assert inference.peak_allocated_bytes < estimate(model, batch).peak_allocated_bytes
    assert "gradients" not in inference.breakdown
    assert inference.summary().startswith("VRAM estimate: Sequential, batch 4096, inference, fp32: ")
    assert inference.assumptions[0] == "the model was in train mode and is estimated in eval mode"
    assert model.training


def test_a_whole_step_of_the_users_own() -> None:
    """step= runs any callable with model and optimizer on paper; two backward passes are two phases."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(batch: torch.Tensor) -> None:
        for half in batch.to("cuda", non_blocking=True).chunk(2):
            model(half).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    found = estimate(model, torch.randn(8, 64), optimizer=optimizer, step=step, n_steps=1)
    names = [phase.name for phase in found.phases]
    assert names.count("step 1 backward") == 2
    assert str(estimate(model, torch.randn(8, 64), step=step).subject) == (
        "Sequential, batch 8, a step of its own, fp32"
    )
    assert "step 1 optimizer" in names


def test_an_optimizer_that_has_run_brings_its_state() -> None:
    """State that an optimizer already has is memory before the first step."""
    model = mlp()
    optimizer = ADAMW(model.parameters())
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    found = estimate(model, torch.randn(2, 64), optimizer=optimizer)
    weights = 4 * sum(p.numel() for p in model.parameters())
    state = next(phase for phase in found.phases if phase.name == "optimizer state")
    assert state.end_allocated_bytes >= 3 * weights


# --- it leaves no trace ----------------------------------------------------------------------------------


def test_model_and_optimizer_come_out_as_they_went_in() -> None:
    """Parameters, gradients, buffers, attributes, modes and state are the very same objects."""
    model = Convolutional()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3, 9, 9)).sum().backward()
    optimizer.step()
    model.eval()
    before = [{name: id(value) for name, value in vars(module).items()} for module in model.modules()]
    tensors = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    gradients = [id(p.grad) for p in model.parameters()]
    groups, state = optimizer.param_groups, optimizer.state
    contents = {id(p): dict(values) for p, values in state.items()}
    estimate(model, torch.randn(2, 3, 9, 9), optimizer=optimizer)
    assert [{name: id(v) for name, v in vars(m).items()} for m in model.modules()] == before
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == tensors[name][0]
        assert torch.equal(tensor, tensors[name][1])
    assert [id(p.grad) for p in model.parameters()] == gradients
    assert optimizer.param_groups is groups
    assert optimizer.state is state
    assert {id(p): dict(values) for p, values in state.items()} == contents
    assert not model.training


def test_random_state_and_flags_come_out_as_they_went_in() -> None:
    """Generators, autocast, gradient mode, and every stand-in for CUDA are as before, also after an error."""

    def state() -> list[Any]:
        return [
            torch.random.get_rng_state().tolist(),
            random.getstate(),
            repr(np.random.get_state()),  # noqa: NPY002 - models draw from the old generator too
            torch.get_default_dtype(),
            torch.is_autocast_enabled("cuda"),
            torch.is_autocast_enabled("hpu"),
            torch.is_grad_enabled(),
            torch.cuda.is_available,
            torch.cuda._lazy_init,
            torch.set_autocast_enabled,
            torch.clear_autocast_cache,
            torch._C._group_tensors_by_device_and_dtype,
            torch.autograd._engine_run_backward,  # type: ignore[attr-defined]  # not in the stubs
            torch._C._dispatch_has_kernel_for_dispatch_key("aten::dropout", "AutogradHPU"),
            torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm", "AutocastHPU"),
        ]

    model, batch, wrong = Convolutional(), torch.randn(2, 3, 9, 9), torch.randn(2, 4, 9, 9)
    before = state()
    estimate(model, batch, optimizer=ADAMW, autocast=torch.bfloat16)
    assert state() == before
    with pytest.raises(ValueError, match="could not run"):
        estimate(model, wrong, autocast=torch.bfloat16)
    assert state() == before

    def careless(inputs: torch.Tensor) -> None:
        model(inputs).sum().backward()
        _ = random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002, S311 - old generators are meant
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_autocast_enabled("cuda", True)

    estimate(model, batch, step=careless, n_steps=1)
    assert state() == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_training_step_records_gradients_wherever_it_is_asked_for(mode: Callable[[], Any]) -> None:
    """Asked for without gradients, as from a validation loop, the estimate is that of the training step."""
    model, batch = mlp(), torch.randn(4, 64)
    expected = estimate(model, batch, optimizer=ADAMW).peak_allocated_bytes
    with mode():
        assert estimate(model, batch, optimizer=ADAMW).peak_allocated_bytes == expected


def test_real_tensors_are_untouched_while_a_step_is_on_paper() -> None:
    """A step that also computes on the CPU gets real numbers there, dropout and batch norm included."""
    real = torch.randn(4, 8)
    results: list[torch.Tensor] = []

    class Mixed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            results.append(F.dropout(real, 0.5) + F.batch_norm(real, None, None, training=True))
            return super().forward(x)

    estimate(Mixed(4, 4), torch.randn(2, 4), n_steps=1)
    assert results[0].device.type == "cpu"
    assert results[0].isfinite().all()


def test_an_estimate_keeps_neither_model_nor_batch() -> None:
    """A notebook keeps its outputs: an estimate holds what it was made of weakly."""
    import gc
    import weakref

    model, batch = mlp(), torch.randn(4, 64)
    found = estimate(model, batch, optimizer=ADAMW)
    watched = weakref.ref(model), weakref.ref(batch)
    del model, batch
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
    assert found.peak_process_bytes > 0


def test_estimates_of_several_threads_take_turns() -> None:
    """Estimates that are asked for at the same time come out as they do one after another."""
    model, batch = nn.Linear(64, 64), torch.randn(8, 64)
    expected = estimate_vram(model, batch).peak_allocated_bytes
    with ThreadPoolExecutor(4) as pool:
        peaks = list(pool.map(lambda _: estimate_vram(model, batch).peak_allocated_bytes, range(8)))
    assert peaks == [expected] * 8


def test_an_estimate_within_an_estimate_is_refused() -> None:
    """Asked for within a step that is itself on paper, an estimate says where it belongs instead."""
    model, batch = nn.Linear(4, 4), torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"Call it outside of step="):
        estimate_vram(model, batch, step=lambda images: estimate_vram(model, images))
    assert estimate_vram(model, batch).peak_allocated_bytes > 0
