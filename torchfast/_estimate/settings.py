"""The options of PyTorch's caching allocator that decide how much it reserves."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from torchfast._bytes import MIB

NO_LIMIT = 2**62


@dataclass(frozen=True, slots=True, repr=False)
class AllocatorSettings:
    """The options of `PYTORCH_CUDA_ALLOC_CONF` that decide how much is reserved.

    For `estimate_vram(allocator=...)`, which takes the text as well. A limit on the memory is none of them:
    that is `limit_bytes=` of `fits` and `max_batch_size`.

    Example:
        >>> from torchfast import AllocatorSettings
        >>> AllocatorSettings.parse("expandable_segments:True,max_split_size_mb:64")
        AllocatorSettings(expandable_segments=True, max_split_size_bytes=67108864)
    """

    expandable_segments: bool = False
    # Steps from one power of two to the next, for each of the 16 from 1 MiB to 32 GiB; 0 rounds to 512 B.
    roundup_power2_divisions: tuple[int, ...] = (0,) * 16
    max_split_size_bytes: int = NO_LIMIT
    max_non_split_rounding_bytes: int = 20 * MIB
    garbage_collection_threshold: float = 0.0  # acts only under a memory limit, as in PyTorch

    @classmethod
    def parse(cls, text: str, /) -> "AllocatorSettings":
        """Read a value of `PYTORCH_CUDA_ALLOC_CONF`; options that do not change sizes are passed over.

        Raises:
            ValueError: an option that PyTorch does not know, one without a value or with one that PyTorch
                refuses, or another backend than its own.
        """
        found = dict(_option(part) for part in _split_outside_brackets(text))
        try:
            settings = cls(
                expandable_segments=_SWITCH[found.get("expandable_segments", "False")],
                roundup_power2_divisions=_divisions(found.get("roundup_power2_divisions", "0")),
                max_split_size_bytes=int(found["max_split_size_mb"]) * MIB
                if "max_split_size_mb" in found
                else NO_LIMIT,
                max_non_split_rounding_bytes=int(found.get("max_non_split_rounding_mb", "20")) * MIB,
                garbage_collection_threshold=float(found.get("garbage_collection_threshold", "0")),
            )
        except (KeyError, ValueError) as error:
            raise _not_a_setting(text) from error
        if not (settings._is_accepted() and found.get("backend", "native") == "native"):
            raise _not_a_setting(text)
        return settings

    def _is_accepted(self) -> bool:
        """Whether PyTorch would take these values (c10/core/AllocatorConfig.cpp)."""
        return (
            self.max_split_size_bytes > 20 * MIB
            and 0 <= self.garbage_collection_threshold < 1
            and all(n >= 0 and n & (n - 1) == 0 for n in self.roundup_power2_divisions)
        )

    def __repr__(self) -> str:
        changed = (f.name for f in fields(self) if getattr(self, f.name) != f.default)
        return f"AllocatorSettings({', '.join(f'{name}={getattr(self, name)!r}' for name in changed)})"


# All that PyTorch knows; those that the dataclass has no field for change no sizes.
_NAMES = {
    *("backend", "expandable_segments", "roundup_power2_divisions", "max_split_size_mb"),
    *("max_non_split_rounding_mb", "garbage_collection_threshold", "per_process_memory_fraction"),
    *("release_lock_on_cudamalloc", "release_lock_on_hipmalloc", "throw_on_cudamalloc_oom"),
    *("pinned_use_cuda_host_register", "pinned_use_hip_host_register", "pinned_num_register_threads"),
    *("pinned_use_background_threads", "pinned_reserve_segment_size_mb"),
    *("graph_capture_record_stream_reuse",),
}
_SWITCH = {"True": True, "1": True, "False": False, "0": False}


def settings_of(given: object, /) -> AllocatorSettings:
    """Return settings given as such, or as text."""
    if isinstance(given, AllocatorSettings):
        return given
    if not isinstance(given, str):
        raise TypeError(
            f"allocator={given!r} was given to estimate_vram, which takes text as in "
            'PYTORCH_CUDA_ALLOC_CONF, such as "expandable_segments:True", '
            "or None for PyTorch's own settings."
        )
    return AllocatorSettings.parse(given)


def _split_outside_brackets(text: str) -> Iterable[str]:
    depth, part = 0, ""
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and not depth:
            yield part
            part = ""
        else:
            part += letter
    if part.strip():
        yield part


def _option(part: str) -> tuple[str, str]:
    name, colon, value = part.strip().partition(":")
    if not colon or name.strip() not in _NAMES:
        raise _not_a_setting(part)
    return name.strip(), value.strip()


def _not_a_setting(text: str) -> ValueError:
    return ValueError(
        f"The allocator's settings were given as {text!r}, which PyTorch's own allocator would not take. "
        'Write them as in PYTORCH_CUDA_ALLOC_CONF: "expandable_segments:True,max_split_size_mb:128".'
    )


def _divisions(value: str) -> tuple[int, ...]:
    """Read `4`, or `[256:1,512:2,>:4]`: divisions for sizes up to so many MiB."""
    if not value.startswith("["):
        return (int(value),) * 16
    result = [0] * 16
    last = -1
    for part in value.strip("[]").split(","):
        key, _, number = part.partition(":")
        index = 15 if key.strip() == ">" else min(max(int(key).bit_length() - 1, 0), 15)
        start = last + 1 if key.strip() == ">" or last < 0 else index
        for i in range(start, index + 1):
            result[i] = int(number)
        last = index
    return tuple(result)
