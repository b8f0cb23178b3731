"""Six composable primitives for PyTorch training loops: fast on a GPU, and they do not die of memory."""

from torchfast._channels_last import to_channels_last

__all__ = [
    "to_channels_last",
]


def __getattr__(name: str) -> str:
    """Look the version up when it is asked for: reading metadata costs more than the rest of the import."""
    if name != "__version__":
        raise AttributeError(f"module 'torchfast' has no attribute {name!r}")
    import importlib.metadata

    return importlib.metadata.version("torchfast")
