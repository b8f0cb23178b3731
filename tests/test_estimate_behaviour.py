"""What CUDA does differently, rule by rule, against PyTorch's sources and what was measured."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from torchfast._estimate import paper, shapes
from torchfast._estimate.cuda_behaviour import attention, autocast
from torchfast._estimate.cuda_behaviour.reductions import scratch_bytes
from torchfast._estimate.gpus import resolve_gpu

H200 = resolve_gpu("H200")


def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return a tensor of which only the shape counts."""
    return torch.empty(shape, dtype=dtype, device="meta")


def call(query: torch.Tensor, **options: Any) -> attention.Call:
    """Return an attention call on a query, with keys and values like it unless given."""
    defaults = {"mask": None, "dropout": 0.0, "is_causal": False, "enable_gqa": False}
    tensors = {"key": query, "value": query}
    return attention.Call(query, **(tensors | defaults | options))


# --- attention -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "dtype", "head_size", "backend"),
    [
        ("H200", torch.bfloat16, 64, "cudnn"),
        ("H200", torch.float32, 64, "efficient"),
        ("H200", torch.bfloat16, 256, "cudnn"),
        ("B200", torch.bfloat16, 256, "flash"),
        ("H200", torch.bfloat16, 36, "flash"),
        ("H200", torch.float32, 30, "math"),
        ("A100-80", torch.bfloat16, 64, "flash"),
        ("A100-80", torch.float16, 512, "efficient"),
        ("RTX 4090", torch.float16, 64, "flash"),
        ("T4", torch.float16, 64, "efficient"),
        ("T4", torch.bfloat16, 64, "math"),
        ("V100-32", torch.float16, 64, "efficient"),
    ],
)
def test_the_backend_follows_gpu_type_and_head_size(
    gpu: str, dtype: torch.dtype, head_size: int, backend: str
) -> None:
    """The first of PyTorch's order that can run the call on this GPU is taken."""
    query = on_meta(2, 8, 128, head_size, dtype=dtype)
    assert attention.choose(call(query), resolve_gpu(gpu)) == backend


def test_a_mask_rules_out_flash() -> None:
    """With a mask an A100 takes the memory-efficient kernel; one with strided rows leaves only math."""
    query, mask = on_meta(2, 8, 128, 64), on_meta(2, 8, 128, 128)
    a100 = resolve_gpu("A100-80")
    assert attention.choose(call(query, mask=mask), a100) == "efficient"
    query = query.float()
    assert attention.choose(call(query, mask=mask.transpose(2, 3)), a100) == "math"


def test_grouped_heads_in_fp32_fall_to_math() -> None:
    """In torch 2.11 the memory-efficient kernel knows no grouped heads; cuDNN and flash do."""
    query, key = on_meta(2, 16, 128, 64), on_meta(2, 4, 128, 64)
    grouped = {"key": key, "value": key, "enable_gqa": True}
    assert attention.choose(call(query, **grouped), H200) == "cudnn"
    full = {name: t.float() if isinstance(t, torch.Tensor) else t for name, t in grouped.items()}
    assert attention.choose(call(query.float(), **full), H200) == "math"


def test_a_backend_that_the_user_switched_off_is_not_taken() -> None:
    """`torch.nn.attention.sdpa_kernel` is followed."""
    query = on_meta(2, 8, 128, 64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
        assert attention.choose(call(query), H200) == "efficient"
    assert attention.choose(call(query), H200) == "cudnn"


# --- reductions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dims", "scratch"),
    [
        # Transient bytes of `sum` and `linalg_vector_norm` as measured on an H200 with torch 2.11.
        ((12288, 768), (0,), 75_497_984),
        ((12288, 3072), (0,), 138_412_544),
        ((2048, 768), (0,), 12_583_424),
        ((75264, 384), (0,), 138_412_544),
        ((30522, 768), (0,), 138_412_544),
        ((48, 768), (0,), 0),
        ((30522, 768), (1,), 0),
    ],
)
def test_scratch_of_reductions_as_measured(
    shape: tuple[int, ...], dims: tuple[int, ...], scratch: int
) -> None:
    """Partial results and semaphores take what they took on the GPU."""
    found = scratch_bytes(on_meta(*shape, dtype=torch.float32), dims, 4, H200)
    assert sum(-(-size // 512) * 512 for size in found) == scratch


def test_smaller_gpus_split_reductions_less() -> None:
    """The number of blocks follows the multiprocessors of the GPU."""
    tensor = on_meta(12288, 3072, dtype=torch.float32)
    small = dataclasses.replace(H200, n_multiprocessors=28)
    assert sum(scratch_bytes(tensor, (0,), 4, small)) < sum(scratch_bytes(tensor, (0,), 4, H200))


# --- private calls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch._C, "_disabled_torch_function_impl"),
        (torch._C, "_DisableTorchDispatch"),
        (torch._C, "_PreserveDispatchKeyGuard"),
        (torch._C, "_ExcludeDispatchKeyGuard"),
        (torch._C, "_set_meta_in_tls_dispatch_include"),
        (torch._C, "_current_autograd_node"),
        (torch._C, "_storage_Use_Count"),
        (torch._C, "_group_tensors_by_device_and_dtype"),
        (torch._C._autograd, "_get_sequence_nr"),
        (torch.Tensor, "_make_subclass"),
        (torch.Tensor, "_use_count"),
        (torch.autograd, "_engine_run_backward"),
        (torch.cuda.amp.common, "amp_definitely_not_available"),
        (torch.library.Library, "_destroy"),
    ],
)
def test_private_calls_are_still_there(owner: Any, name: str) -> None:
    """Each private call of PyTorch that tracing rests on exists: when one is gone, this says which."""
    assert hasattr(owner, name)


def test_the_borrowed_backend_is_free() -> None:
    """Nothing in this PyTorch has kernels at the keys of the backend that paper tensors borrow."""
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm", paper.BACKEND)
    assert not hasattr(torch, paper.BACKEND.lower())


def test_a_paper_tensor_has_the_keys_it_should() -> None:
    """Kernels at the borrowed backend's autograd and autocast keys will be reached."""
    keys = torch._C._dispatch_keys(paper.wrap(torch.empty(2, device="meta")))
    wanted = (paper.BACKEND, f"Autograd{paper.BACKEND}", f"Autocast{paper.BACKEND}", "Python")
    assert all(keys.has(getattr(torch._C.DispatchKey, name)) for name in wanted)


def test_autocast_lists_name_real_operators() -> None:
    """At most a handful of the listed operators are unknown to this version of PyTorch."""
    names = [*autocast.LOWER, *autocast.FP32, *autocast.FP32_DTYPE, *autocast.PROMOTE]
    assert sum(1 for name in names if autocast._overload(name) is None) <= 2


def test_autocast_casts_as_cuda_does() -> None:
    """On paper the output types under autocast are those of PyTorch's table for CUDA."""
    from torchfast._estimate.estimate import estimate_vram

    seen: dict[str, torch.dtype] = {}

    class Types(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            seen.update(linear=y.dtype, relu=y.relu().dtype, softmax=y.softmax(-1).dtype, sum=y.sum().dtype)
            seen.update(
                matmul=(x @ x.T).dtype, exp=y.exp().dtype, add=(x + y).dtype, cat=torch.cat([x, y]).dtype
            )
            with torch.autocast("cuda", enabled=False):
                seen.update(off=super().forward(x).dtype)
            return y

    estimate_vram(Types(8, 8), torch.randn(4, 8), autocast=torch.float16, gpu="H200", n_steps=1)
    half, full = torch.float16, torch.float32
    assert seen == {
        "linear": half,
        "relu": half,
        "softmax": full,
        "sum": full,
        "matmul": half,
        "exp": full,
        "add": full,
        "cat": full,
        "off": full,
    }


# --- remembered shapes -----------------------------------------------------------------------------------


def test_operators_in_place_are_remembered_and_views_are_not() -> None:
    """What works in place gives back its first argument; what changes a shape in place is asked each time."""
    aten = torch.ops.aten
    in_place = (aten.add_.Tensor, aten.copy_.default, aten.zero_.default, aten.index_put_.default)
    not_so = (aten.resize_.default, aten.squeeze_.default, aten.set_.source_Tensor, aten.add.out)
    assert all(map(shapes._works_in_place, in_place))
    assert not any(map(shapes._works_in_place, not_so))


def test_an_operator_in_place_gives_back_its_own_tensor_each_time() -> None:
    """The second call of an operator with the same shapes changes its own tensor, not the first call's."""
    cache = shapes.ShapeCache()
    first, second = (on_meta(4, 8) for _ in range(2))
    add = torch.ops.aten.add_.Tensor
    key = cache.key(add, (first, 1.0), {})
    assert cache.recall(key, (first, 1.0)) is None
    cache.remember(key, (first, 1.0), first)
    assert cache.recall(cache.key(add, (second, 1.0), {}), (second, 1.0)) is second
