"""Layers for which a batch in parts is not the same as the batch whole."""

from collections.abc import Iterable

from torch import nn

# Losses and layers that compare the samples of a batch with one another, by the names under which they go.
_CONTRASTIVE = ("contrastive", "infonce", "ntxent", "supcon", "cliploss", "barlowtwins", "vicreg")
_WHOLE_BATCH = (*_CONTRASTIVE, "batchnorm", "batchrenorm", "minibatchstd", "minibatchdiscrimination")
_RANDOM = ("dropout", "droppath", "drop_path", "stochasticdepth", "dropblock")


def whole_batch_layers(modules: Iterable[nn.Module], /) -> list[str]:
    """Return the names of layers in training whose output for a sample depends on the rest of the batch."""
    return [name for name, module in _training(modules) if _sees_whole_batch(module)]


def random_layers(modules: Iterable[nn.Module], /) -> list[str]:
    """Return the names of layers in training that draw random numbers, so that parts draw others."""
    return [name for name, module in _training(modules) if _draws(module)]


def changing_layers(modules: Iterable[nn.Module], /) -> list[str]:
    """Return the names of layers in training whose weight changes with every pass, so with each part."""
    names = (name for name, module in _training(modules) if _has_spectral_norm(module))
    return [f"{name} under spectral norm" for name in names]


def named(names: list[str], /) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _training(modules: Iterable[nn.Module]) -> list[tuple[str, nn.Module]]:
    found = []
    for root in modules:
        for path, module in root.named_modules():
            always = _has_no_statistics(module)
            if module.training or always:
                kind = type(module).__name__ + (" without running statistics" if always else "")
                found.append((f"{path} ({kind})" if path else kind, module))
    return found


def _has_no_statistics(module: nn.Module) -> bool:
    """Say whether it takes the statistics of the batch even in evaluation."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None


def _sees_whole_batch(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    name = type(module).__name__.lower()
    return any(word in name for word in _WHOLE_BATCH) and "frozen" not in name


def _has_spectral_norm(module: nn.Module) -> bool:
    kinds = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
    for parametrizations in getattr(module, "parametrizations", {}).values():
        kinds += [type(parametrization).__name__ for parametrization in parametrizations]
    return any(kind in ("SpectralNorm", "_SpectralNorm") for kind in kinds)


def _draws(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        return module.dropout > 0
    if isinstance(module, (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)):
        return True
    if any(word in type(module).__name__.lower() for word in _RANDOM):
        rate = getattr(module, "p", getattr(module, "drop_prob", 1))
        return bool(rate)
    return False
