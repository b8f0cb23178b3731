"""Operators on paper take what they took on an H200 (torch 2.11): what is left, and what is given back."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchfast import VRAMEstimate, estimate_vram


def taken(found: VRAMEstimate, operator: str) -> tuple[int, int]:
    """Return what the first call of an operator left, and the peak above what it started or ended with."""
    notes, sizes = found._trace.notes, {}
    held = peak = 0
    inside = False
    for event in found._trace.events:
        if notes[event.note].operator != operator:
            if inside:
                break
            sizes[event.block] = event.size_bytes or 0
            continue
        inside = True
        sizes[event.block] = event.size_bytes or sizes[event.block]
        held += event.size_bytes or -sizes[event.block]
        peak = max(peak, held)
    assert inside, f"{operator} never ran"
    return held, peak - max(held, 0)


class Step(nn.Module):
    """A function of one tensor, made to depend on a weight."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the function's result, squared in a way that gives it a gradient of its own layout."""
        output = self.function(x * self.weight)
        return output * output.detach()


def run(function: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...], **options: Any) -> Any:
    """Estimate one step of a function."""
    batch = torch.empty(shape, device="meta", dtype=options.pop("dtype", torch.float32))
    model = Step(function).to(batch.dtype)
    return estimate_vram(model, batch, gpu="H200", n_steps=1, **options)


def mask(x: torch.Tensor) -> torch.Tensor:
    """Return a mask of x's shape that chooses every second element."""
    return (torch.arange(x.numel(), device=x.device) % 2 == 0).view(x.shape)


BCE_LOGITS = F.binary_cross_entropy_with_logits
ROWS, IMAGES = (4096, 512), (64, 3, 64, 64)
MEASURED = [
    # The function, the shape of its input, the operator, what it left and what it gave back: in bytes.
    (lambda x: BCE_LOGITS(x, x), IMAGES, "binary_cross_entropy_with_logits", 4, 6_291_844),
    (lambda x: F.binary_cross_entropy(x, x.detach()), IMAGES, "binary_cross_entropy", 3_145_728, 392),
    (lambda x: F.soft_margin_loss(x, x.detach()), IMAGES, "soft_margin_loss_backward", 3_145_728, 6_291_456),
    (F.logsigmoid, ROWS, "log_sigmoid_forward", 8_388_608, 0),
    (lambda x: F.rms_norm(x, (768,)), (16, 197, 768), "_fused_rms_norm", 9_695_552, 0),
    (lambda x: F.rms_norm(x, (768,)), (16, 197, 768), "_fused_rms_norm_backward", 9_682_944, 0),
    (lambda x: x.logsumexp(-1), ROWS, "logsumexp", 16_384, 8_404_992),
    (lambda x: x.sort(-1)[0], ROWS, "sort", 25_165_824, 0),
    (lambda x: x.sort(-1)[0], (64, 40_000), "sort", 30_720_000, 82_417_151),
    (lambda x: x.sort(-1)[0], (512, 5000), "sort", 30_720_000, 51_200_255),
    (lambda x: x.sort(-1)[0], (2_000_000,), "sort", 24_000_000, 40_390_655),
    (lambda x: x.topk(8)[0], ROWS, "topk", 393_216, 6_407_423),
    (lambda x: x.topk(64)[0], (64, 40_000), "topk", 49_152, 500_735),
    (lambda x: x.masked_scatter(mask(x), x), ROWS, "masked_scatter", 8_388_608, 16_815_871),
    (lambda x: x.masked_select(mask(x)), ROWS, "masked_select", 4_194_304, 16_777_216),
    (lambda x: x[torch.arange(8192, device=x.device) % 4096], ROWS, "index_put", 0, 399_871),
    (lambda x: F.unfold(x, 3, padding=1), (8, 32, 32, 32), "im2col", 9_437_184, 1_048_576),
    (lambda x: F.unfold(x, 3, padding=1), (8, 32, 32, 32), "col2im", 9_437_184, 0),
    (lambda x: torch.fft.irfft(torch.fft.rfft(x)), ROWS, "_fft_c2r", 8_388_608, 8_421_376),
    (lambda x: torch.fft.fft(x * (1 + 0j), dim=-2).real, (16, 128, 256), "_fft_c2c", 4_194_304, 4_194_304),
    (lambda x: F.one_hot(x.argmax(-1), 512).float() @ x.t(), (256, 512), "zeros", 1_048_576, 0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "shape", "operator", "left", "back"),
    MEASURED,
    ids=[f"{row[2]}-{'x'.join(map(str, row[1]))}" for row in MEASURED],
)
def test_operators_take_what_was_measured(
    function: Callable[[torch.Tensor], torch.Tensor],
    shape: tuple[int, ...],
    operator: str,
    left: int,
    back: int,
) -> None:
    """What an operator leaves is exact, and what it takes beside within 20 kB or a percent."""
    found = taken(run(function, shape), f"aten.{operator}")
    assert found == pytest.approx((left, back), abs=20_000, rel=0.01)


def test_an_embedding_copies_a_gradient_that_is_not_contiguous() -> None:
    """A gradient that lies time first, as that of a recurrent network does, is copied before it is summed."""

    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(1000, 512)

        def forward(self, tokens: torch.Tensor) -> Any:
            x = self.embed(tokens)
            return (x.transpose(0, 1).contiguous() * x.transpose(0, 1).contiguous()).transpose(0, 1)

    found = estimate_vram(Embedded(), torch.zeros(32, 256, dtype=torch.int64), gpu="H200", n_steps=1)
    notes, copy = found._trace.notes, 32 * 256 * 512 * 4
    inside = [e for e in found._trace.events if notes[e.note].operator == "aten.embedding_dense_backward"]
    assert copy in [e.size_bytes for e in inside]


def test_a_pool_copies_its_gradient_into_the_layout_of_its_input() -> None:
    """A gradient in channels_last is copied for an input that is not."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1, bias=False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

        def forward(self, x: torch.Tensor) -> Any:
            return self.conv(F.avg_pool2d(x, 3, 1, 1))

    image = torch.empty(4, 8, 64, 64, device="meta", requires_grad=True)
    found = estimate_vram(Pooled(), image, gpu="H200", n_steps=1)
    assert taken(found, "aten.avg_pool2d_backward")[1] == image.numel() * 4


ATTENTION = [
    # Heads of which size, of which type, with a bias or not: the operator, and what it gave back.
    (64, torch.bfloat16, True, (4, 8, 256), "efficient_attention_backward", 2_131_968),
    (512, torch.bfloat16, False, (4, 1, 256), "efficient_attention", 2_097_152),
    (512, torch.bfloat16, False, (4, 1, 256), "efficient_attention_backward", 6_296_576),
    (160, torch.bfloat16, False, (4, 4, 256), "cudnn_attention_backward", 2_638_080),
    (36, torch.bfloat16, False, (4, 8, 197), "flash_attention_backward", 3_138_560),
]


@pytest.mark.parametrize(("width", "dtype", "biased", "rows", "operator", "back"), ATTENTION)
def test_attention_takes_what_was_measured(  # noqa: PLR0913, PLR0917 - a row of the table
    width: int,
    dtype: torch.dtype,
    biased: bool,  # noqa: FBT001 - as above
    rows: tuple[int, ...],
    operator: str,
    back: int,
) -> None:
    """Each kernel of attention takes its own scratch: by head size, type and bias."""

    def attend(x: torch.Tensor) -> torch.Tensor:
        bias = x.new_zeros(1, rows[1], rows[2], rows[2]).requires_grad_() if biased else None
        return F.scaled_dot_product_attention(x * 1, x * 1, x * 1, attn_mask=bias).transpose(1, 2)

    found = run(attend, (*rows, width), dtype=dtype)
    assert taken(found, f"aten._scaled_dot_product_{operator}")[1] == pytest.approx(back, abs=4096)


def test_layer_norms_over_many_short_rows_sum_their_weights_in_blocks() -> None:
    """Of 301,056 rows of 96, each of both gradients is summed from 9,408 blocks of 32 rows."""
    model = nn.Sequential(nn.LayerNorm(96))
    found = estimate_vram(model, torch.empty(301_056, 96, device="meta"), gpu="H200", n_steps=1)
    notes = found._trace.notes
    inside = [e for e in found._trace.events if notes[e.note].operator == "aten.native_layer_norm_backward"]
    sizes = [e.size_bytes for e in inside]
    assert sizes.count(9408 * 96 * 4) == 2
    assert sizes.count(1_818_624) == 2


@pytest.mark.parametrize(
    ("shape", "staged_bytes", "counter_bytes"),
    [
        # What an H200 took (torch 2.11), to the rounding of the allocator.
        ((96, 512, 28, 28), 1_048_576, 64),
        ((96, 120, 28, 28), 245_760, 16),
        ((96, 80, 14, 14), 94_720, 12),
        ((64, 2048, 7, 7), 425_984, 256),
        ((16, 256, 1, 1), 0, 0),
    ],
)
def test_pytorchs_batch_norm_stages_sums_in_channels_last(
    shape: tuple[int, ...], staged_bytes: int, counter_bytes: int
) -> None:
    """Four partial sums a channel forward, two backward, before the gradient is there; contiguous, none."""

    def sizes(operator: str, memory_format: torch.memory_format) -> list[int]:
        batch = torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=memory_format)
        model = nn.Sequential(nn.BatchNorm2d(shape[1], dtype=torch.bfloat16), nn.ReLU())
        found = estimate_vram(model, batch.requires_grad_(), gpu="H200", n_steps=1)
        notes = found._trace.notes
        return [e.size_bytes for e in found._trace.events if notes[e.note].operator == operator]

    for operator, staged in (("native_batch_norm", 4), ("native_batch_norm_backward", 2)):
        last, plain = (sizes(f"aten.{operator}", f) for f in (torch.channels_last, torch.contiguous_format))
        expected = [staged_bytes * staged // 4, counter_bytes] if staged_bytes else []
        assert all(size in last for size in expected)
        if math.prod(shape[2:]) > 1:
            assert not any(size in plain for size in expected)


@pytest.mark.parametrize(("name", "operator"), [("softmax", "_softmax"), ("log_softmax", "_log_softmax")])
@pytest.mark.parametrize(("suffix", "n_scratch"), [("", 1), ("_backward_data", None)])
def test_a_softmax_copies_its_operands_once_its_output_is_there(
    name: str, operator: str, suffix: str, n_scratch: int | None
) -> None:
    """PyTorch makes a structured operator's output before its kernel runs, so it takes the first block."""
    found = run(lambda x: getattr(x.transpose(1, 2), name)(1).transpose(1, 2), (8, 64, 1000))
    notes = found._trace.notes
    inside = [e for e in found._trace.events if notes[e.note].operator == f"aten.{operator}{suffix}"]
    taken_there = [e.block for e in inside if e.size_bytes == 8 * 64 * 1000 * 4]
    given_back = [e.block for e in inside if e.size_bytes == 0]
    assert taken_there[0] not in given_back
    assert set(taken_there[1:]) <= set(given_back)
    assert n_scratch is None or len(taken_there) == 1 + n_scratch


@pytest.mark.parametrize(("dtype", "n_copies"), [(torch.float16, 0), (torch.bfloat16, 1)])
def test_a_softmax_of_float16_converts_within_its_kernel(dtype: torch.dtype, n_copies: int) -> None:
    """A softmax in fp32 of float16 takes no copy of its input, one of bfloat16 does."""
    found = run(lambda x: x.softmax(-1, dtype=torch.float32), (512, 512), dtype=dtype)
    notes = found._trace.notes
    forward = [e for e in found._trace.events if notes[e.note].phase.endswith("forward")]
    copies = [e.size_bytes for e in forward if notes[e.note].operator == "aten._to_copy"]
    assert copies.count(512 * 512 * 4) == n_copies
    assert taken(found, "aten._softmax")[0] == 512 * 512 * 4


def test_the_math_kernel_adds_its_mask_in_place() -> None:
    """Attention in fp32 over grouped heads runs the math kernel, which takes no memory to add a mask."""

    def attend(x: torch.Tensor) -> torch.Tensor:
        keys = x[:, :2] * 1
        return F.scaled_dot_product_attention(x * 1, keys, keys, is_causal=True, enable_gqa=True)

    found = run(attend, (2, 8, 64, 32))
    scores = 2 * 8 * 64 * 64 * 4
    notes = found._trace.notes
    added = [e.size_bytes for e in found._trace.events if notes[e.note].operator == "aten.add"]
    assert scores not in added
    assert taken(found, "aten._safe_softmax")[0] == scores


@pytest.mark.parametrize(
    ("cell", "operator", "kept"),
    [(nn.LSTMCell, "_thnn_fused_lstm_cell", 786_432), (nn.GRUCell, "_thnn_fused_gru_cell", 786_432)],
)
def test_cells_run_fused(cell: type[nn.Module], operator: str, kept: int) -> None:
    """A cell keeps its output, its state and its gates in one kernel."""

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell(256, 512)

        def forward(self, x: torch.Tensor) -> Any:
            out = self.cell(x)
            return out[0] if isinstance(out, tuple) else out

    found = estimate_vram(Cell(), torch.empty(64, 256, device="meta"), gpu="H200", n_steps=1)
    assert taken(found, f"aten.{operator}") == (kept, 0)


def test_repetitions_follow_known_counts() -> None:
    """Counts that are in the batch say how long what is repeated gets."""

    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 64)

        def forward(self, counts: torch.Tensor) -> Any:
            return self.embed(counts).repeat_interleave(counts, 0)

    counts = torch.arange(512) % 3
    found = estimate_vram(Repeated(), counts, gpu="H200", n_steps=1)
    assert taken(found, "aten.index_select")[0] == int(counts.sum()) * 64 * 4
