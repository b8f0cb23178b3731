"""What CUDA does differently from the meta kernels that are traced."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from torchfast._estimate.cuda_behaviour import (
    attention,
    autocast,
    autograd,
    blas,
    composites,
    conditions,
    convolution,
    indexing,
    layouts,
    losses,
    norms,
    optimizers,
    recurrent,
    reductions,
    sorting,
    values,
)
from torchfast._estimate.gpus import GPU
from torchfast._estimate.paper import BACKEND
from torchfast._estimate.recorder import Rule

# Rules by the operator's name without namespace and overload.
_RULES: dict[str, Rule] = {
    **layouts.RULES,
    "_cudnn_rnn": recurrent.forward,
    "_cudnn_rnn_backward": recurrent.backward,
    "_cudnn_init_dropout_state": recurrent.dropout_state,
    "_thnn_fused_lstm_cell": recurrent.lstm_cell,
    "_thnn_fused_lstm_cell_backward_impl": recurrent.lstm_cell_backward,
    "_thnn_fused_gru_cell": recurrent.gru_cell,
    "_thnn_fused_gru_cell_backward": recurrent.gru_cell_backward,
    **losses.RULES,
    "embedding_dense_backward": indexing.embedding_backward,
    "add": autograd.add,
    **dict.fromkeys(autograd.IN_PLACE, autograd.in_place),
    "convolution": convolution.convolution,
    "convolution_backward": convolution.convolution_backward,
    "native_dropout": norms.native_dropout,
    "_safe_softmax": norms.safe_softmax,
    "native_layer_norm_backward": norms.layer_norm_backward,
    "cudnn_batch_norm": norms.cudnn_batch_norm,
    "cudnn_batch_norm_backward": norms.cudnn_batch_norm_backward,
    "native_batch_norm": norms.native_batch_norm,
    "native_batch_norm_backward": norms.native_batch_norm_backward,
    "_fused_rms_norm": norms.rms_norm,
    "_fused_rms_norm_backward": norms.rms_norm_backward,
    "_local_scalar_dense": conditions.item,
    **dict.fromkeys(("equal", "allclose"), conditions.equal),
    **dict.fromkeys(("eq", "ne"), conditions.itself),
    "_to_copy": values.to_copy,
    "copy_": values.copy,
    "nonzero": values.nonzero,
    "masked_fill": values.masked_fill,
    "masked_fill_": values.masked_fill,
    "masked_select": values.masked_select,
    **dict.fromkeys(("isnan", "isinf"), conditions.not_finite),
    "repeat_interleave": values.repeat_interleave,
    "index": values.index,
    **dict.fromkeys(reductions.OPERATORS, reductions.reduction),
    **dict.fromkeys(("all", "_is_all_true"), conditions.every),
    "logsumexp": reductions.log_sum_exp,
    **dict.fromkeys(sorting.CHOICES, sorting.choice),  # of which some are reductions too
    "_scaled_dot_product_cudnn_attention": attention.cudnn,
    "_scaled_dot_product_cudnn_attention_backward": attention.cudnn_backward,
    "_scaled_dot_product_flash_attention_backward": attention.flash_backward,
    "_scaled_dot_product_efficient_attention": attention.efficient,
    "_scaled_dot_product_efficient_attention_backward": attention.efficient_backward,
    "_foreach_norm": optimizers.foreach_norm,
    "_amp_update_scale_": optimizers.amp_update_scale,
    **dict.fromkeys(optimizers.IN_PLACE, optimizers.nothing),
    **dict.fromkeys(blas.PRODUCTS, blas.matrix_product),
    "_grouped_mm": blas.grouped_product,
}
_COMPOSITES = {
    "dropout": composites.dropout,
    "batch_norm": composites.batch_norm,
    "linear": composites.linear,
    "rms_norm": composites.rms_norm,
    "one_hot": composites.one_hot,
    "softmax.int": composites.softmax,
    "log_softmax.int": composites.log_softmax,
    "lstm_cell": composites.lstm_cell,
    "gru_cell": composites.gru_cell,
    **recurrent.KERNELS,
}
# Operators that are taken apart where a backend has no kernel of its own: to have one is enough.
_WHOLE = ("silu_backward", "mish_backward", "_fused_rms_norm")


def rule_for(func: Any) -> Rule | None:
    """Return the rule for an operator, or None where its meta kernel says all."""
    namespace, _, name = func._schema.name.partition("::")
    if namespace != "aten":
        return None
    if name in _RULES:
        return _RULES[name]
    return optimizers.foreach if name.startswith("_foreach_") else None


@contextmanager
def cuda_kernels(gpu: GPU) -> Iterator[None]:
    """Put CUDA's own decompositions at the paper backend's keys, within this context."""
    library = torch.library.Library("aten", "IMPL")
    kernels = {**_COMPOSITES, "scaled_dot_product_attention": attention.attention_kernel(gpu)}
    try:
        for name, kernel in kernels.items():
            for key in (f"Autograd{BACKEND}", BACKEND):
                library.impl(name, kernel, key)
        for name in _WHOLE:
            library.impl(name, _never_run, BACKEND)
        with autocast.cuda_autocast():
            yield
    finally:
        library._destroy()


def _never_run(*_: Any) -> None:
    """Stand at the paper backend's key: the recorder answers before a call gets there."""
