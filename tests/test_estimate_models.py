"""Models and steps as people write them: what they call, read back, hold and return runs on paper."""

import contextlib
import copy
import io
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchfast import VRAMEstimate, estimate_vram

X = torch.randn(4, 8)


class Model(nn.Module):
    """A layer, and a function that does the rest of the forward pass."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.seen: list[Any] = []
        self.cache: dict[str, Any] = {"inner": {}}
        self.last: deque[Any] = deque(maxlen=3)
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the function does."""
        return self._forward(self.layer, *args, **kwargs)


def estimate(model: nn.Module, batch: Any = X, **options: Any) -> VRAMEstimate:
    """Estimate two steps for an H200."""
    defaults: dict[str, Any] = {"gpu": "H200", "n_steps": 2}
    return estimate_vram(model, batch, **(defaults | options))


def of(forward: Callable[..., Any], batch: Any = X, **options: Any) -> VRAMEstimate:
    """Estimate a model of that forward pass."""
    return estimate(Model(forward), batch, **options)


# --- what takes no memory changes nothing ----------------------------------------------------------------


def calls_of_torch_cuda(layer: nn.Module, x: torch.Tensor) -> Any:
    """Call what programs call of torch.cuda beside tensors."""
    assert torch.cuda.is_available()
    assert (torch.cuda.device_count(), torch.cuda.current_device(), x.get_device()) == (1, 0, 0)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.memory_allocated() == torch.cuda.max_memory_reserved(0) == 0
    assert torch.cuda.mem_get_info()[1] == torch.cuda.mem_get_info(device=0)[0] > 2**36
    assert torch.cuda.memory_stats(device=0)["allocated_bytes.all.current"] == 0
    assert torch.cuda.get_device_properties(device="cuda").name == torch.cuda.get_device_name(device=0)
    assert torch.cuda.get_device_capability(device=0) >= (7, 0)
    torch.cuda.set_device(device=0)
    torch.cuda.manual_seed_all(0)
    torch.cuda.set_rng_state(torch.cuda.get_rng_state(device="cuda"))
    torch.cuda.nvtx.range_push("layer")
    with torch.cuda.nvtx.range("inner"), torch.cuda.device(0), torch.profiler.record_function("named"):
        y = layer(x)
    torch.cuda.nvtx.range_pop()
    return y


def streams(layer: nn.Module, x: torch.Tensor) -> Any:
    """Run on a side stream, with events."""
    side, begins, ends = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True), torch.cuda.Event()
    side.wait_stream(stream=torch.cuda.current_stream())
    begins.record(stream=side)
    begins.wait(stream=torch.cuda.current_stream())
    side.wait_event(event=begins)
    with torch.cuda.stream(side):
        y = layer(x)
    ends.record(side)
    torch.cuda.current_stream().wait_stream(side)
    y.record_stream(torch.cuda.current_stream())
    ends.synchronize()
    assert ends.query()
    assert begins.elapsed_time(ends) > 0
    return y


def moves(layer: nn.Module, x: torch.Tensor) -> Any:
    """Move to the device that everything is on, in every way that there is."""
    x = x.cuda().cuda(0, non_blocking=True).to("cuda:0", non_blocking=True).to(0).to(device="cuda")
    assert x.is_cuda
    assert str(x.device) == "cuda:0"
    assert x.type() == "torch.cuda.FloatTensor"
    return layer.to("cuda").cuda()(x.to(next(layer.parameters())).type(torch.cuda.FloatTensor))  # type: ignore[attr-defined]  # not in the stubs


def prints(layer: nn.Module, x: torch.Tensor) -> Any:
    """Print tensors and modules."""
    with contextlib.redirect_stdout(io.StringIO()):
        print(x, f"{x}", repr(layer), layer.weight)  # noqa: T201  what is tested
    return layer(x)


def compiles(layer: nn.Module, x: torch.Tensor) -> Any:
    """Compile within the forward pass."""
    return torch.compile(layer)(x)


@pytest.mark.parametrize(
    "forward", [calls_of_torch_cuda, streams, moves, prints, compiles], ids=lambda f: f.__name__
)
def test_what_takes_no_memory_changes_nothing(forward: Callable[..., Any]) -> None:
    """Around the same layer, these calls give the estimate of the layer alone."""
    expected = of(lambda layer, x: layer(x))
    found = of(forward)
    assert found.peak_requested_bytes == expected.peak_requested_bytes
    assert found.breakdown == expected.breakdown
    assert found.unmodelled == ()


def test_the_real_functions_are_back() -> None:
    """After the estimate the calls of torch.cuda are PyTorch's own again, and generators of the host work."""
    names = ("Stream", "Event", "current_stream", "stream", "device", "memory_allocated", "FloatTensor")
    before = [getattr(torch.cuda, name) for name in names], torch.Generator, torch.compile
    of(calls_of_torch_cuda)
    assert ([getattr(torch.cuda, name) for name in names], torch.Generator, torch.compile) == before


def test_bfloat16_runs_on_older_gpus_too() -> None:
    """PyTorch allows bfloat16 where it is emulated, as on a T4, and tells the two apart when asked."""
    model, told = nn.Linear(8, 8), []

    def step(batch: torch.Tensor) -> None:
        told.append(torch.cuda.is_bf16_supported(including_emulation=False))
        with torch.autocast("cuda", torch.bfloat16):
            model(batch).sum().backward()

    for gpu in ("T4", "RTX 3060"):
        estimate_vram(model, torch.randn(4, 8), step=step, gpu=gpu, n_steps=1)
    assert told == [False, True]


def test_generators_and_old_types_make_tensors_on_paper() -> None:
    """A GPU's generator, `torch.cuda.FloatTensor` and data from the host give tensors that are counted."""

    def forward(layer: nn.Module, x: torch.Tensor) -> Any:
        generator = torch.Generator("cuda").manual_seed(0)
        assert isinstance(generator, torch.Generator)
        noise = torch.randn(1024, 8, device="cuda", generator=generator)
        old = torch.cuda.FloatTensor(1024, 8).fill_(1.0)  # type: ignore[attr-defined]  # not in the stubs
        table = torch.tensor(np.ones((1024, 8)), device=x.device)
        return layer(x).sum() + (noise + old + table).sum()

    found = of(forward, n_steps=1)
    taken = [event.size_bytes for event in found._trace.events]
    assert taken.count(1024 * 8 * 4) >= 3
    assert 1024 * 8 * 8 in taken


def test_counters_on_the_gpu_count() -> None:
    """An optimizer that counts its steps on the GPU, and reads the number back, finds what it has counted."""
    seen: list[float] = []

    class Counts(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})
            self.counters = [torch.zeros((), device="cuda") for _ in range(2)]

        def step(self, closure: Any = None) -> None:  # type: ignore[override]  # without a loss
            del closure
            torch._foreach_add_(self.counters, 1.0)
            seen.append(self.counters[1].item())

    of(lambda layer, x: layer(x), optimizer=Counts)
    assert seen == [1.0, 2.0]


def test_the_default_device_decides_where_a_step_makes_tensors() -> None:
    """With a GPU as the default device, what is made without one is counted; with `meta` it is the host's."""

    def forward(layer: nn.Module, x: torch.Tensor) -> Any:
        table = torch.ones(1024, 8)
        return layer(x).sum() + (table.sum() if table.is_cuda else float(table.sum()))

    sizes: dict[str, list[int]] = {}
    for device in ("cpu", "meta", *(["cuda"] if torch.cuda.is_available() else [])):
        model = Model(forward)
        with torch.device(device):
            found = estimate(model, n_steps=1, optimizer=torch.optim.AdamW)
        sizes[device] = [event.size_bytes for event in found._trace.events]
    assert sizes.get("cuda", [1024 * 8 * 4]).count(1024 * 8 * 4) == 1
    assert 1024 * 8 * 4 not in sizes["cpu"]
    assert sizes["meta"] == sizes["cpu"]


def test_values_of_data_from_the_host_are_known() -> None:
    """A tensor made of numbers on the GPU decides shapes as it would there."""

    def forward(layer: nn.Module, x: torch.Tensor) -> Any:
        return layer(x).repeat_interleave(torch.tensor([1, 2, 3, 4], device=x.device), dim=0)

    events = of(forward, n_steps=1)._trace.events
    assert 10 * 8 * 4 in [event.size_bytes for event in events]


# --- questions about activations -------------------------------------------------------------------------


def refuses_bad_numbers(layer: nn.Module, x: torch.Tensor) -> Any:
    """End where numbers are not finite, as training loops do."""
    y = layer(x)
    if torch.isnan(y).any() or not torch.isfinite(y.sum()):
        raise RuntimeError("not a number")
    assert torch.isfinite(y).all()
    assert torch.allclose(y, y)
    assert torch.equal(y, y)
    return y


def samples(layer: nn.Module, x: torch.Tensor) -> Any:
    """Make distributions, which look at their parameters."""
    y = layer(x)
    choice = torch.distributions.Categorical(logits=y, validate_args=True)
    return choice.log_prob(choice.sample()).sum() + torch.distributions.Normal(y, 1.0).rsample().sum()


def waits(layer: nn.Module, x: torch.Tensor) -> Any:
    """Loop until a condition comes true, which on paper it never would."""
    y = layer(x)
    while bool((y.detach() < 3).all()):
        y = y + 0.0
    while y.detach().max().item() < 1:
        y = y + 0.0
    return y


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (refuses_bad_numbers, "checks that all of something holds"),
        (samples, "checks that all of something holds"),
        (lambda layer, x: layer(x) * x.sum().item(), "numbers that the step reads back"),
        (lambda layer, x: layer(x) * float(f"{x.mean():.3f}"), "numbers that the step reads back"),
        (lambda layer, x: layer(x)[: int(x.sum().abs()) + 1], "numbers that the step reads back"),
        (lambda layer, x: layer(x) * sum(x[0].tolist()), "what the step copies to the host"),
        (lambda layer, x: layer(x) * float(x.cpu().numpy().sum()), "what the step copies to the host"),
        (lambda layer, x: layer(x)[(layer(x) > 0).any(1)], "masks that depend on activations"),
        (waits, "a loop that waits for a number of the GPU's was taken to end after 10,000 rounds"),
    ],
)
def test_what_depends_on_activations_is_assumed(forward: Callable[..., Any], said: str) -> None:
    """A step that looks at activations runs to its end, and the estimate says what it assumed of them."""
    found = of(forward, n_steps=1)
    assert any(each.startswith(said) for each in found.assumptions), found.assumptions
    assert found.peak_phase


@pytest.mark.parametrize("is_masked", [False, True])
def test_flex_attention_keeps_rows_and_no_scores(*, is_masked: bool) -> None:
    """FlexAttention is taken to be compiled: it saves its output and a number a row, never the scores."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n_samples, n_heads, n_rows, width = 2, 4, 512, 16

    def causal(_b: Any, _h: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return query >= key

    def forward(layer: nn.Module, x: torch.Tensor) -> Any:
        del layer
        mask = None
        if is_masked:
            mask = create_block_mask(causal, None, None, n_rows, n_rows, device="cuda")
        return flex_attention(x * 1, x * 1, x * 1, block_mask=mask)

    model = Model(forward)
    x = torch.randn(n_samples, n_heads, n_rows, width, requires_grad=True)
    found = estimate(model, x, n_steps=1)
    forward_phase = next(phase for phase in found.phases if phase.name == "step 1 forward")
    saved = forward_phase.end_allocated_bytes - found.breakdown["weights"] - found.breakdown["batch"]
    expected = 4 * x.nbytes + n_samples * n_heads * n_rows * 4  # query, key, value and output; a number a row
    assert expected <= saved < expected + 2**16


# --- what models hold, take and return -------------------------------------------------------------------


def test_batches_that_move_themselves_are_counted() -> None:
    """A PackedSequence lies on the GPU in the estimate, and stays what it was for the user."""
    packed = nn.utils.rnn.pack_padded_sequence(
        torch.randn(64, 500, 8), torch.full((64,), 500), batch_first=True
    )
    data = packed.data
    found = estimate(nn.LSTM(8, 8), (packed,), n_steps=1)
    assert found.breakdown["batch"] >= data.numel() * 4
    assert packed.data is data
    assert type(packed.data) is torch.Tensor


def test_names_and_nothing_pass_through_a_batch() -> None:
    """What is no tensor in a batch reaches the model as it is."""
    seen: list[Any] = []

    def forward(layer: nn.Module, x: torch.Tensor, names: list[str], mask: None, n: int) -> Any:
        seen.append((names, mask, n))
        return layer(x)

    of(forward, {"x": X, "names": ["a", "b"], "mask": None, "n": 3}, n_steps=1)
    assert seen == [(["a", "b"], None, 3)]


def test_what_a_model_keeps_on_the_side_is_taken_back() -> None:
    """Lists, dicts within dicts and queues of a module come out as they went in: no paper tensor stays."""
    model = Model(lambda layer, x: layer(x))

    def forward(layer: nn.Module, x: torch.Tensor) -> Any:
        y = layer(x)
        model.seen.append(y)
        model.cache["inner"]["last"] = y
        model.cache["other"] = y
        model.last.append(y)
        return y

    model._forward = forward
    before = copy.deepcopy((model.seen, model.cache, model.last))
    seen, inner, last = model.seen, model.cache["inner"], model.last
    estimate(model)
    assert (model.seen, model.cache, model.last) == before
    assert model.seen is seen
    assert model.cache["inner"] is inner
    assert model.last is last


def test_what_is_kept_elsewhere_says_what_it_is() -> None:
    """A paper tensor that a list outside of the model kept fails with its reason when it is used."""
    kept: list[torch.Tensor] = []

    def forward(layer: nn.Module, x: torch.Tensor) -> Any:
        kept.append(layer(x))
        return kept[-1]

    of(forward, n_steps=1)
    with pytest.raises(RuntimeError, match="used after estimate_vram had returned"):
        kept[0].sum()


def test_saved_tensors_may_go_to_pinned_memory() -> None:
    """save_on_cpu with pinned memory runs without a GPU, and leaves the saved tensors to the host."""

    def forward(layer: nn.Module, x: torch.Tensor) -> Any:
        with torch.autograd.graph.save_on_cpu(pin_memory=True):
            return layer(layer(x).relu()).relu()

    x = torch.randn(4096, 8)
    on_host, on_gpu = of(forward, x), of(lambda layer, x: layer(layer(x).relu()).relu(), x)
    end = [
        next(p for p in e.phases if p.name == "step 1 forward").end_allocated_bytes for e in (on_host, on_gpu)
    ]
    assert end[0] < end[1]


def test_a_checkpointed_layer_in_a_thread_is_recorded() -> None:
    """Operators of threads that a step starts are part of its memory."""
    results: list[Any] = []

    def forward(layer: nn.Module, x: torch.Tensor) -> Any:
        thread = threading.Thread(target=lambda: results.append(checkpoint(layer, x, use_reentrant=False)))
        thread.start()
        thread.join()
        return results.pop()

    found = of(forward, torch.randn(4096, 8), n_steps=1)
    assert 4096 * 8 * 4 in [event.size_bytes for event in found._trace.events]


# --- what cannot be estimated ----------------------------------------------------------------------------


def nested() -> torch.Tensor:
    """Return a tensor of rows of different lengths."""
    return torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=torch.jagged)


def with_buffer(buffer: torch.Tensor) -> nn.Module:
    """Return a layer with that buffer."""
    model = nn.Linear(8, 8)
    model.register_buffer("extra", buffer)
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: (nn.Linear(8, 8), nested()), "the batch is a nested tensor"),
        (
            lambda: (with_buffer(torch.eye(8).to_sparse()), X),
            "'extra' of the model is a tensor of layout sparse_coo",
        ),
        (
            lambda: (nn.Linear(8, 8), torch.eye(8).to_sparse_csr()),
            "the batch is a tensor of layout sparse_csr",
        ),
        (lambda: (nn.Embedding(9, 8, sparse=True), torch.zeros(4).long()), "sparse gradients cannot be put"),
        (lambda: (nn.Linear(8, 8), torch.masked.masked_tensor(X, X > 0)), "the batch is a MaskedTensor"),
        (
            lambda: (nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(2)), X),
            "'1.weight' of the model has no shape",
        ),
        (
            lambda: (
                nn.Sequential(
                    nn.Linear(8, 8),
                    torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear}),
                ),
                X,
            ),
            "'1.0' of the model is quantised for the CPU",
        ),
        (
            lambda: (nn.Linear(8, 8), iter([X])),
            "takes one batch, but was given an object of type list_iterator",
        ),
    ],
)
def test_what_cannot_be_put_on_paper_is_refused(make: Callable[[], Any], reason: str) -> None:
    """What is no plain tensor is refused by name before anything is touched."""
    model, batch = make()
    before = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    with pytest.raises((ValueError, TypeError), match=reason):
        estimate(model, batch)
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_part_is_refused_by_name() -> None:
    """A TorchScript module anywhere in the model cannot be put on paper."""
    model = nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Linear(8, 8)))
    with pytest.raises(TypeError, match="'1' of the model is a TorchScript module"):
        estimate(model)


def test_a_teacher_is_held_to_the_same() -> None:
    """A teacher that cannot be put on paper is refused as one."""
    with pytest.raises(ValueError, match="'weight' of the teacher has no shape yet"):
        estimate(nn.Linear(8, 8), teacher=nn.LazyLinear(2))
