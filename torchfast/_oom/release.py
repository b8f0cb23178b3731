"""Giving memory back after a failure, in the order in which it can be given."""

import gc
import traceback
from pathlib import Path

import torch

from torchfast import _holders
from torchfast._oom import frames

_PACKAGES = tuple(str(Path(path).parent) for path in (torch.__file__, _holders.__file__) if path is not None)


def clean_up(error: BaseException, bound: frames.Bound | None, /, *, keep_frames: bool = False) -> None:
    """Let go of what the failed block held, then of what others can do without, then empty the caches."""
    if not keep_frames:
        frames.let_go(error, bound)
        frames.forget_last_error()
    _holders.release_all()
    gc.collect()  # before the caches: what a reference cycle holds is not in them yet
    empty_caches()


def empty_caches() -> None:
    """Give cached blocks back to the device, unless a CUDA graph is being captured."""
    try:
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return
        torch.accelerator.empty_cache()
    except RuntimeError:
        # A device without memory can fail to free as well. What is cached stays usable by PyTorch.
        return


def place_of(error: BaseException, /) -> str:
    """Return where the user's code failed: the innermost line outside torch and torchfast."""
    lines = traceback.extract_tb(error.__traceback__)
    own = [line for line in lines if not line.filename.startswith(_PACKAGES)] or list(lines)
    if not own:
        return ""
    return f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}: {own[-1].line}"
