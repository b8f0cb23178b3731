"""Convolutions, recurrent networks, losses and looks at values on paper, as measured on an H200."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchfast import VRAMEstimate, estimate_vram
from torchfast._estimate.cuda_behaviour import convolution, convolution_workspaces
from torchfast._estimate.cuda_behaviour.convolution_workspaces import Shape, workspace_bytes

FORWARD, DATA, WEIGHT = 0, 1, 2


def estimate(model: nn.Module, batch: Any, **options: Any) -> VRAMEstimate:
    """Estimate one step on the GPU that was measured."""
    return estimate_vram(model, batch, gpu="H200", n_steps=1, **options)


def sizes_of(found: VRAMEstimate, operator: str) -> list[int]:
    """Return the bytes of every block that an operator took."""
    notes = found._trace.notes
    return [e.size_bytes for e in found._trace.events if e.size_bytes and notes[e.note].operator == operator]


# --- convolutions ----------------------------------------------------------------------------------------


def square(batch: int, n_in: int, n_out: int, size: int, kernel: int = 3, **changed: Any) -> Shape:
    """Describe a convolution that keeps the size of its image, in fp32 and contiguous by default."""
    plain: dict[str, Any] = {"dtype": torch.float32, "channels_last": False, "groups": 1}
    return Shape(
        batch=batch,
        n_in=n_in,
        n_out=n_out,
        kernel=(kernel, kernel),
        stride=(1, 1),
        dilation=(1, 1),
        size_in=(size, size),
        size_out=(size, size),
        **(plain | changed),
    )


def test_a_measured_convolution_gets_what_was_measured() -> None:
    """Every row of the table comes back as it is."""
    for shape, taken in list(convolution_workspaces.table())[::97]:
        assert tuple(workspace_bytes(shape, direction) for direction in (FORWARD, DATA, WEIGHT)) == taken, (
            shape
        )


def test_no_convolution_is_in_the_table_twice() -> None:
    """Each row is another convolution, so that what was measured is one figure."""
    shapes = [shape for shape, _ in convolution_workspaces.table()]
    assert len(set(shapes)) == len(shapes)


@pytest.mark.parametrize(("dtype", "taken"), [(torch.bfloat16, 34_996_543), (torch.float16, 46_007_023)])
def test_the_types_of_half_precision_are_told_apart(dtype: torch.dtype, taken: int) -> None:
    """A quarter of the convolutions take other bytes in bf16 than in fp16, as this one does."""
    assert workspace_bytes(square(128, 512, 1024, 7, dtype=dtype), WEIGHT) == taken


@pytest.mark.parametrize("batch", [7, 23, 77])
def test_convolutions_that_nobody_measured_copy_their_operands(batch: int) -> None:
    """At a batch size that is not in the table a convolution takes input, output and weight again."""
    shape = square(batch, 256, 256, 32)
    operands = sum(shape.operand_bytes(shape.vector))
    assert workspace_bytes(shape, DATA) == pytest.approx(operands, rel=0.01)


def test_depthwise_convolutions_take_nothing() -> None:
    """Contiguous depthwise convolutions run PyTorch's own kernels, which take no workspace."""
    found = estimate(nn.Conv2d(96, 96, 3, padding=1, groups=96, bias=False), torch.randn(40, 96, 28, 28))
    image, weight = 40 * 96 * 28 * 28 * 4, 96 * 9 * 4
    assert sizes_of(found, "aten.convolution") == [image]
    assert sizes_of(found, "aten.convolution_backward") == [image, weight]  # the gradient made dense


def test_transposed_depthwise_convolutions_are_cudnns() -> None:
    """PyTorch's own kernels run no transposed ones: what the table says of them is taken."""
    model = nn.ConvTranspose2d(16, 16, 3, stride=2, padding=1, output_padding=1, groups=16, bias=False)
    found = estimate(model, torch.randn(6, 16, 28, 28))
    assert sizes_of(found, "aten.convolution_backward")[-2:] == [16 * 9 * 4, 1_777_258]


@pytest.mark.parametrize(
    ("changed", "is_own"),
    [
        ({"dtype": torch.bfloat16}, True),
        ({"dtype": torch.float16}, False),
        ({"dtype": torch.float16, "channels_last": True}, False),
        ({"channels_last": True}, False),
        ({"groups": 48}, False),
        ({"dtype": torch.float16, "kernel": (7, 7)}, True),
        ({"dtype": torch.float16, "kernel": (3, 5)}, True),
        ({"dtype": torch.float16, "dilation": (2, 2)}, True),
        ({"dtype": torch.float16, "size_in": (6, 6), "size_out": (6, 6)}, True),
        ({"dtype": torch.float16, "stride": (2, 2), "size_out": (14, 14)}, True),
        ({"dtype": torch.float16, "stride": (2, 2), "size_out": (14, 14), "batch": 1}, False),
        ({"dtype": torch.float16, "kernel": (1, 9), "size_in": (1, 99), "size_out": (1, 99)}, False),
    ],
)
def test_which_depthwise_convolutions_are_pytorchs_own(changed: dict[str, Any], is_own: bool) -> None:  # noqa: FBT001
    """The conditions are those of Convolution.cpp: all of 1,498 that they give to PyTorch took nothing."""
    assert convolution.runs_own_kernels(replace(square(40, 96, 96, 28, groups=96), **changed)) == is_own


def test_channels_are_padded_to_whole_vectors() -> None:
    """Three channels of an image in half precision are copied as eight."""
    n_in, _, _ = square(2, 3, 64, 10, dtype=torch.bfloat16).operand_bytes(8)
    assert n_in == 2 * 8 * 100 * 2


def test_channels_of_each_group_are_padded_for_themselves() -> None:
    """Eight groups of six channels are copied as eight groups of eight."""
    n_in, n_out, weight = square(2, 48, 48, 10, dtype=torch.bfloat16, groups=8).operand_bytes(8)
    assert n_in == n_out == 2 * 64 * 100 * 2
    assert weight == 8 * 8 * 8 * 9 * 2


def test_groups_are_padded_to_equal_powers_of_two() -> None:
    """Groups of 48 channels are copied as groups of 64, also at a batch size that nobody measured."""
    shape = square(72, 384, 384, 28, groups=8)
    assert shape.square == 64
    assert workspace_bytes(shape, DATA) == pytest.approx(sum(shape.operand_bytes(64)), rel=0.01)


def test_one_dimension_is_looked_up_as_two() -> None:
    """Sequences run as images one row high, and take what those take."""
    found = sizes_of(estimate(nn.Conv1d(80, 512, 3, padding=1), torch.randn(8, 80, 3000)), "aten.convolution")
    flat = nn.Conv2d(80, 512, (1, 3), padding=(0, 1))
    assert found == sizes_of(estimate(flat, torch.randn(8, 80, 1, 3000)), "aten.convolution")


def test_operands_in_another_layout_are_copied_first() -> None:
    """A channels_last weight makes cuDNN run channels_last: a contiguous image is copied for the call."""
    model = nn.Conv2d(8, 8, 3, bias=False)
    model.weight.data = model.weight.data.to(memory_format=torch.channels_last)
    image = torch.randn(4, 8, 32, 32)
    copy = 4 * 8 * 32 * 32 * 4
    mixed = sizes_of(estimate(model, image, training=False), "aten.convolution")
    same = sizes_of(
        estimate(model, image.to(memory_format=torch.channels_last), training=False), "aten.convolution"
    )
    assert mixed.count(copy) == same.count(copy) + 1


def test_strides_alone_say_channels_last() -> None:
    """A 1 x 1 weight moved to channels_last makes cuDNN run so, although it lies as if contiguous."""
    model = nn.Conv2d(8, 8, 1, bias=False)
    image = torch.randn(4, 8, 32, 32)
    copy = 4 * 8 * 32 * 32 * 4
    before = sizes_of(estimate(model, image, training=False), "aten.convolution").count(copy)
    model.weight.data = model.weight.data.to(memory_format=torch.channels_last)
    assert model.weight.is_contiguous()
    assert sizes_of(estimate(model, image, training=False), "aten.convolution").count(copy) == before + 1


# --- recurrent networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "batch", "reserve"),
    [
        # What the forward pass left beside output and states on an H200 (torch 2.11), less 256 bytes.
        (nn.LSTM, {"input_size": 512, "hidden_size": 512, "num_layers": 2}, (50, 64, 512), 72_089_600),
        (nn.GRU, {"input_size": 1024, "hidden_size": 1024}, (50, 4, 1024), 4_915_200),
        (nn.LSTM, {"input_size": 64, "hidden_size": 64, "bidirectional": True}, (16, 16, 64), 655_360),
    ],
)
def test_the_reserve_of_recurrent_networks(
    kind: type[nn.RNNBase], options: dict[str, Any], batch: tuple[int, ...], reserve: int
) -> None:
    """Kernels of cuDNN keep so many bytes for the backward pass: a formula that measured networks follow."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(**options)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(x)[0]  # type: ignore[no-any-return]  # a module's call is Any

    found = estimate(First(), torch.randn(batch))
    assert reserve in sizes_of(found, "aten._cudnn_rnn")


def test_packed_sequences_run() -> None:
    """A packed batch of sequences takes memory for its real steps only."""

    class Packed(nn.LSTM):
        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
            return super().forward(packed)[0].data

    short, full = (
        estimate(Packed(32, 32), (torch.randn(64, 8, 32), torch.full((8,), length))).peak_requested_bytes
        for length in (16, 64)
    )
    assert short < full


# --- losses and values -----------------------------------------------------------------------------------


def test_a_mean_squared_error_keeps_the_size_of_its_elements() -> None:
    """The reduced loss lies in a storage of the size of its elements, as it does on CUDA."""
    batch = torch.randn(64, 100), torch.randn(64, 100)
    found = estimate(nn.Linear(100, 100), batch, loss=F.mse_loss)
    assert sizes_of(found, "aten.mse_loss")[0] == 64 * 100 * 4


def test_ctc_has_shapes() -> None:
    """CTC runs on paper, though PyTorch has no meta kernel for it, and keeps alpha for its backward pass."""
    n_steps, batch, longest = 50, 4, 10

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        lengths = torch.full((batch,), n_steps), torch.full((batch,), longest)
        return F.ctc_loss(output.log_softmax(-1), target, *lengths)

    inputs = torch.randn(n_steps, batch, 16), torch.randint(1, 20, (batch, longest))
    found = estimate(nn.Linear(16, 20), inputs, loss=loss)
    assert batch * n_steps * (2 * longest + 1) * 4 in sizes_of(found, "aten._ctc_loss")


class Chooses(nn.Linear):
    """A layer that lets a mask decide how many rows it works on."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Work on the rows that the mask chooses, and drop the mask where it chooses all."""
        return super().forward(x if bool(mask.all()) else x[mask])


def test_masks_of_the_batch_decide_as_they_would() -> None:
    """The values of a boolean mask are known: a quarter of the rows takes a quarter of the memory."""
    x = torch.randn(4096, 64)
    everything = torch.ones(4096, dtype=torch.bool)
    quarter = torch.arange(4096) % 4 == 0
    all_rows, some_rows = (estimate(Chooses(64, 64), (x, mask)) for mask in (everything, quarter))
    assert 4096 * 64 * 4 in sizes_of(all_rows, "aten.addmm")
    assert 1024 * 64 * 4 in sizes_of(some_rows, "aten.addmm")
    assert not any("were taken to" in said for e in (all_rows, some_rows) for said in e.assumptions)


@pytest.mark.parametrize(
    "choose",
    [
        lambda scores: scores.topk(1, dim=-1).indices[:, 0],
        lambda scores: scores.argmax(dim=-1),
        lambda scores: torch.max(scores, dim=-1).indices,
        lambda scores: scores.max(dim=-1, keepdim=True).indices.squeeze(1),
    ],
)
def test_choices_of_experts_are_spread_evenly_and_said_so(choose: Callable[[Any], torch.Tensor]) -> None:
    """Routing depends on activations: each expert is taken to be chosen equally often."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(24, 4)
            self.experts = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            chosen = choose(self.gate(x))
            parts = [expert(x[chosen == i]) for i, expert in enumerate(self.experts)]
            return torch.cat(parts)

    found = estimate(Experts(), torch.randn(400, 24))
    assert sizes_of(found, "aten.addmm").count(100 * 24 * 4) == 4
    said = "choices that depend on activations (top-k, arg max, sorting) were taken to be spread evenly"
    assert said in found.assumptions


def test_the_largest_of_all_is_no_choice() -> None:
    """The maximum of integers that depend on activations is a number, which nothing is assumed of."""

    class Longest(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y + (y > 0).long().max()

    found = estimate(Longest(8, 8), torch.randn(4, 8))
    assert not any("were taken to" in said for said in found.assumptions)


def test_numbers_read_back_are_assumed_and_said_so() -> None:
    """A loss that is read back for a log does not stop the step."""

    class Logs(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            assert y.sum().item() == 0
            assert y[0].tolist() == [0.0, 0.0]
            return y

    found = estimate(Logs(2, 2), torch.randn(4, 2))
    assert any("reads back" in line for line in found.assumptions)


def test_an_operator_without_shapes_is_run_on_zeros() -> None:
    """A custom operator that has only a CPU kernel is estimated by running it, and named."""
    library = torch.library.Library("torchfast_test", "DEF")
    library.define("halve(Tensor x) -> Tensor")
    library.impl("halve", lambda x: x[::2].clone(), "CPU")
    library.impl("halve", lambda x: x[::2].clone(), "AutogradHPU")
    try:

        class Custom(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                with torch.no_grad():
                    x = torch.ops.torchfast_test.halve.default(x)
                return super().forward(x)

        found = estimate(Custom(8, 8), torch.randn(64, 8))
        assert 32 * 8 * 4 in sizes_of(found, "aten.addmm")
    finally:
        library._destroy()


def test_embeddings_and_indexing_take_room_to_sort() -> None:
    """The backward pass of an embedding sorts its indices, and sums segments in fp32."""
    tokens = torch.randint(0, 50, (64, 100))
    found = estimate(nn.Embedding(50, 32), tokens, optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    n_parts = 6400 // 10 + 50
    assert n_parts * 32 * 4 in sizes_of(found, "aten.embedding_dense_backward")


@pytest.mark.parametrize(
    ("dtype", "shape", "forward_bytes", "backward_bytes"),
    [
        (torch.float32, (64, 16, 224, 224), 25_892_352, 17_128_448),
        (torch.float32, (48, 128, 128, 128), 12_682_752, 8_390_144),
        (torch.float32, (48, 256, 56, 56), 4_855_808, 3_212_800),
        (torch.float32, (24, 64, 112, 112), 2_428_416, 1_607_168),
        (torch.float16, (64, 16, 224, 224), 10_357_760, 17_128_448),
    ],
)
def test_batch_norm_in_channels_last_sums_over_tiles(
    dtype: torch.dtype, shape: tuple[int, ...], forward_bytes: int, backward_bytes: int
) -> None:
    """It takes what an H200 took, to the rounding of the allocator; contiguous, nothing."""
    found, plain = (
        estimate(
            nn.BatchNorm2d(shape[1]),
            torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format),
        )
        for memory_format in (torch.channels_last, torch.contiguous_format)
    )
    for name, size_bytes in (("", forward_bytes), ("_backward", backward_bytes)):
        operator = f"aten.cudnn_batch_norm{name}"
        rounded = [-(-size // 512) * 512 for size in sizes_of(found, operator)]
        assert size_bytes in rounded
        assert len(rounded) == len(sizes_of(plain, operator)) + 1
