"""The teacher's plan: the fastest way that gives the same outputs, and eager where it does not apply."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchfast import GPUTeacher
from torchfast._teacher import plan as planning
from torchfast._teacher.closeness import differs
from torchfast._teacher.folding import fold, pairs_of


class NormAct(nn.BatchNorm2d):
    """A batch norm with its activation inside, as timm has them."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise, then activate."""
        result: torch.Tensor = self.act(self.drop(super().forward(x)))
        return result


class Block(nn.Module):
    """A residual block: two convolutions with batch norms."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm1 = norm(4)
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.norm2 = nn.BatchNorm2d(4, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the block to its input."""
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


def trained(module: nn.Module) -> nn.Module:
    """Give the batch norms something to have seen."""
    for _ in range(3):
        module(torch.randn(16, 4, 6, 6) * 2 + 1)
    return module


def clock(monkeypatch: pytest.MonkeyPatch, **times_ms: float) -> list[str]:
    """Have each way of running take a given time, in the order in which they are tried."""
    order = [times_ms[name] for name in ("eager", "plain", "fold", "compile") if name in times_ms]
    tried: list[str] = []

    def time_ms(run: Callable[[], Any], _device: torch.device) -> float:
        run()
        tried.append("")
        return order[len(tried) - 1]

    monkeypatch.setattr(planning, "time_ms", time_ms)
    return tried


def parts_of(teacher: GPUTeacher) -> tuple[str, ...]:
    """Return the parts of the plan that was made."""
    assert teacher.plan is not None
    return teacher.plan.parts


# --- folding ---------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.sampled_from([nn.BatchNorm2d, NormAct, nn.Identity]), st.booleans(), st.integers(0, 50))
def test_a_folded_module_computes_the_same(
    norm: Callable[[int], nn.Module],
    channels_last: bool,  # noqa: FBT001 -- drawn
    seed: int,
) -> None:
    """Folding changes outputs by float64's rounding only, keeps the layout, and can be undone."""
    torch.manual_seed(seed)
    module = trained(nn.Sequential(Block(norm), Block(norm))).double().eval().requires_grad_(False)
    if channels_last:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # fine
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    expected = module(x)
    before = [parameter.data_ptr() for parameter in module.parameters()]
    pairs = pairs_of(module, lambda: module(x), ())
    assert len(pairs) == (2 if norm is nn.Identity else 4)
    undo = fold(module, pairs)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in module.modules()) == 0
    torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)
    weight = module.get_parameter("0.conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last) is channels_last
    undo()
    assert [parameter.data_ptr() for parameter in module.parameters()] == before
    assert torch.equal(module(x), expected)


def test_what_cannot_be_folded_is_left() -> None:
    """A norm that is used twice, follows something else, or is asked for by name stays as it is."""
    twice = nn.BatchNorm2d(4)
    module = nn.Sequential(
        nn.Conv2d(4, 4, 1), twice, nn.Conv2d(4, 4, 1), twice, nn.ReLU(), nn.BatchNorm2d(4)
    ).eval()
    x = torch.randn(2, 4, 6, 6)
    assert pairs_of(module, lambda: module(x), ()) == []
    block = Block().eval()
    names = {pair.norm_name for pair in pairs_of(block, lambda: block(x), ("conv1", "norm2"))}
    assert names == set()


def test_folding_that_fails_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error at the second pair puts the first one back."""
    module = trained(Block()).eval().requires_grad_(False)
    x = torch.randn(2, 4, 6, 6)
    expected = module(x)
    pairs = pairs_of(module, lambda: module(x), ())
    monkeypatch.setitem(pairs[1].norm._buffers, "running_var", torch.ones(5))
    with pytest.raises(RuntimeError, match="size"):
        fold(module, pairs)
    monkeypatch.undo()
    assert torch.equal(module(x), expected)


# --- choosing --------------------------------------------------------------------------------------------


def test_the_plain_module_is_the_default() -> None:
    """Without plan= nothing is tried, and there is no plan."""
    teacher = GPUTeacher(trained(Block()), "cpu")
    teacher(torch.randn(2, 4, 6, 6))
    assert teacher.plan is None


@pytest.mark.parametrize(
    ("times_ms", "parts"),
    [({"eager": 2, "fold": 1}, ("fold",)), ({"eager": 1, "fold": 2}, ()), ({"eager": 1, "fold": 0.99}, ())],
    ids=["faster", "slower", "within noise"],
)
def test_a_part_is_kept_if_it_is_faster(
    times_ms: dict[str, float], parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What gains is kept, what does not is undone; outputs agree either way, for any batch size."""
    clock(monkeypatch, **times_ms)
    module = trained(Block())
    teacher = GPUTeacher(module, "cpu", plan=("fold",))
    x = torch.randn(4, 4, 6, 6)
    for batch in (x, x, x[:1]):
        torch.testing.assert_close(teacher(batch), module.eval()(batch), rtol=1e-4, atol=1e-5)
    assert parts_of(teacher) == parts
    assert teacher.plan is not None
    assert teacher.plan.times_ms == dict(zip(("eager", "fold"), times_ms.values(), strict=True))
    assert repr(teacher).endswith(f"{'fold' if parts else 'eager'})")


def test_the_plain_layout_is_taken_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where channels_last loses, weights and images are laid out plainly, and folding goes on top."""
    clock(monkeypatch, eager=3, plain=2, fold=1)
    module = trained(Block())
    teacher = GPUTeacher(module, "cpu", plan=["plain", "fold"])
    x = torch.randn(4, 4, 6, 6)
    for batch in (x, x, x[:1]):
        torch.testing.assert_close(teacher(batch), module.eval()(batch), rtol=1e-4, atol=1e-5)
        assert teacher(batch).is_contiguous()
    assert parts_of(teacher) == ("plain", "fold")
    assert teacher.module.get_parameter("conv1.weight").is_contiguous()


def test_without_channels_last_there_is_no_layout_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that is plain already does not try that, and one that loses by plain stays channels_last."""
    clock(monkeypatch, eager=1)
    teacher = GPUTeacher(trained(Block()), "cpu", plan=["plain"], channels_last=False)
    teacher(torch.randn(4, 4, 6, 6))
    assert teacher.plan == planning.TeacherPlan((), {"eager": 1})
    clock(monkeypatch, eager=1, plain=2)
    teacher = GPUTeacher(trained(Block()), "cpu", plan=["plain"])
    teacher(torch.randn(4, 4, 6, 6))
    weight = teacher.module.get_parameter("conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)


class ChangesItsInput(Block):
    """A block that normalises its input in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Halve the input for everybody."""
        x *= 0.5
        return super().forward(x)


def test_a_teacher_that_changes_its_inputs_is_run_once() -> None:
    """A plan would run it several times on the same batch: it stays eager, and the batch is changed once."""
    teacher = GPUTeacher(ChangesItsInput().eval(), "cpu", plan="auto", channels_last=False)
    x = torch.ones(2, 4, 6, 6)
    teacher(x)
    assert float(x.max()) == 0.5
    assert teacher.plan == planning.TeacherPlan((), {}, {"all": "the teacher changes its inputs in place"})


class ReadsItsConvolution(Block):
    """A block that reads a convolution's output beside its batch norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Use the first convolution's output twice."""
        raw = self.conv1(x)
        result: torch.Tensor = self.norm2(self.conv2(self.norm1(raw))) + raw
        return result


def test_a_convolution_that_others_read_is_not_folded() -> None:
    """Folding would change what the others read, so it leaves that pair, and takes the next."""
    module = trained(ReadsItsConvolution()).eval().requires_grad_(False)
    x = torch.randn(4, 4, 6, 6)
    assert [pair.norm_name for pair in pairs_of(module, lambda: module(x), ())] == ["norm2"]


def test_a_part_that_changes_the_outputs_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast: outputs that move by more than rounding are found out, and the module is as before."""

    def fold_wrongly(module: nn.Module, pairs: Any) -> Callable[[], None]:
        undo = fold(module, pairs)
        module.get_parameter("conv1.weight").mul_(1.1)
        return undo

    clock(monkeypatch, eager=2, fold=1)
    monkeypatch.setattr(planning, "fold", fold_wrongly)
    module = trained(Block())
    teacher = GPUTeacher(module, "cpu", plan=["fold"])
    x = torch.randn(4, 4, 6, 6)
    for _ in range(2):
        torch.testing.assert_close(teacher(x), module.eval()(x), rtol=1e-4, atol=1e-5)
    assert parts_of(teacher) == ()
    assert teacher.plan is not None
    assert "outputs moved by" in teacher.plan.rejected["fold"]
    assert "Rejected fold: outputs moved by" in str(teacher.plan)


def test_a_part_that_fails_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of a compiler is a reason not to use it, not an error of the user's."""
    clock(monkeypatch, eager=2)

    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("no compiler here\nand a long story")

    monkeypatch.setattr(torch, "compile", fail)
    teacher = GPUTeacher(nn.Linear(3, 2), "cpu", plan="auto")
    assert teacher(torch.zeros(1, 3)).shape == (1, 2)
    assert teacher.plan == planning.TeacherPlan(
        (), {"eager": 2}, {"compile": "RuntimeError: no compiler here"}
    )


def test_a_compiled_module_serves_the_shape_it_was_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch's shape runs compiled; other shapes, other options and other objects run eagerly."""
    clock(monkeypatch, eager=2, compile=1)
    compiled_calls: list[torch.Size] = []

    def compile_(module: nn.Module, **_options: object) -> Callable[..., Any]:
        def run(x: torch.Tensor, **kwargs: Any) -> Any:
            compiled_calls.append(x.shape)
            return module(x, **kwargs)

        return run

    class Net(nn.Linear):
        def forward(self, x: torch.Tensor, *, twice: bool = False) -> torch.Tensor:
            return super().forward(x) * (2 if twice else 1)

    monkeypatch.setattr(torch, "compile", compile_)
    module = Net(3, 2)
    teacher = GPUTeacher(module, "cpu", plan=["compile"])
    x = torch.randn(4, 3)
    teacher(x)
    assert parts_of(teacher) == ("compile",)
    n_calls = len(compiled_calls)
    torch.testing.assert_close(teacher(x), module(x))
    assert len(compiled_calls) == n_calls + 1
    torch.testing.assert_close(teacher(x[:2]), module(x[:2]))
    torch.testing.assert_close(teacher(x, twice=True), module(x, twice=True))
    assert len(compiled_calls) == n_calls + 1


def test_a_teacher_that_is_dropped_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing keeps a planned teacher alive: its memory is free without a garbage collection."""
    clock(monkeypatch, eager=2, fold=1)
    teacher = GPUTeacher(trained(Block()), "cpu", plan=["fold"], features=["norm1"])
    teacher(torch.randn(4, 4, 6, 6))
    assert parts_of(teacher) == ("fold",)
    weight = weakref.ref(teacher.module.get_parameter("conv2.weight"))
    gc.disable()
    try:
        del teacher
        assert weight() is None
    finally:
        gc.enable()


def test_features_leave_their_modules_unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution or norm that is asked for as a feature keeps its own output."""
    clock(monkeypatch, eager=2, fold=1)
    module = trained(Block())
    teacher = GPUTeacher(module, "cpu", plan=["fold"], features=["conv1"])
    x = torch.randn(4, 4, 6, 6)
    outputs, features = teacher(x)
    assert parts_of(teacher) == ("fold",)
    assert isinstance(module, Block)
    torch.testing.assert_close(features["conv1"], module.eval().conv1(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(teacher(x).outputs, outputs)


def test_inputs_that_cannot_be_compared_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects that move themselves, and arrays, are no inputs that a plan can recognise again."""

    class Lookup(nn.Linear):
        def forward(self, x: Any, names: Any = None) -> torch.Tensor:
            del names
            return super().forward(x if isinstance(x, torch.Tensor) else x.data)

    clock(monkeypatch, eager=2)
    teacher = GPUTeacher(Lookup(2, 2), "cpu", plan=["fold"])
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 2)])
    assert teacher(packed).shape == (3, 2)
    assert teacher.plan is None
    for _ in range(2):
        assert teacher(torch.zeros(1, 2), names=torch.zeros(3).numpy()).shape == (1, 2)
    assert parts_of(teacher) == ()


def test_all_ranks_take_rank_0_s_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a distributed run the parts are rank 0's, whatever this rank's clock said."""
    clock(monkeypatch, eager=1, fold=2)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda choice, src: choice.insert(src, ("fold",)))
    module = trained(Block())
    teacher = GPUTeacher(module, "cpu", plan=["fold"])
    x = torch.randn(4, 4, 6, 6)
    torch.testing.assert_close(teacher(x), module.eval()(x), rtol=1e-4, atol=1e-5)
    assert parts_of(teacher) == ("fold",)


def test_differences_beyond_rounding() -> None:
    """Outputs differ by shape, type, a large move or nan; rounding and integers do not count."""
    x = torch.tensor([1.0, 100.0])
    assert differs({"a": x}, {"a": x + 0.1}) is None
    assert differs(x, x + 2) == "outputs moved by 0.02 of the largest one"
    assert differs(x, x * float("nan")) is not None
    assert differs(x, x[:1]) == "(1,) torch.float32 instead of (2,) torch.float32"
    assert differs(torch.tensor([1]), torch.tensor([2])) is None
