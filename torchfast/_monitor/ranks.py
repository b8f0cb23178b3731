"""The peaks of all ranks of a distributed run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import distributed as dist

from torchfast._monitor.sample import RankPeak, VRAMPeak

_NAMES = tuple(field.name for field in dataclasses.fields(VRAMPeak) if field.name.endswith("_bytes"))


def across_ranks(peak: VRAMPeak, group: Any) -> dict[str, RankPeak]:
    """Gather every rank's peak through the CPU, and return the highest of each kind with its rank."""
    own = {name: getattr(peak, name) for name in _NAMES}
    ranks, gathered = [0], [own]
    if dist.is_available() and dist.is_initialized():
        _check_cpu(group)
        ranks = dist.get_process_group_ranks(group)
        gathered = [own] * len(ranks)
        dist.all_gather_object(gathered, own, group=group)
    return {
        name: _highest({r: record[name] for r, record in zip(ranks, gathered, strict=True)})
        for name in _NAMES
    }


def _highest(values: Mapping[int, int | None]) -> RankPeak:
    known = [(n_bytes, -rank) for rank, n_bytes in values.items() if n_bytes is not None]
    if not known:
        return RankPeak(None, None)
    n_bytes, rank = max(known)  # of equal ones the first rank
    return RankPeak(n_bytes, -rank)


def _check_cpu(group: Any) -> None:
    backends = str(dist.get_backend_config(group))
    if "cpu:" not in backends:
        raise ValueError(
            f"across_ranks was asked to gather through a group whose backends are {backends!r}, none of them "
            "for the CPU: gathering on the GPU would take the memory that is being measured. "
            'Give group=torch.distributed.new_group(backend="gloo").'
        )
