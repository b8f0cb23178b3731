"""The ways to feed a GPU that `device_loader.py` compares: functions from host batches to device batches.

A host batch is a list of tensors. Peers that want a `DataLoader` get one that hands out the same batches.
"""

import importlib
import importlib.util
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from torchfast import DeviceLoader

Batch = list[torch.Tensor]
Peer = Callable[[Sequence[Batch]], Iterable[Batch]]


def bare(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Copy each batch when it is needed, and wait for it."""
    for batch in batches:
        yield [leaf.to("cuda") for leaf in batch]


def non_blocking(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Copy each batch when it is needed, on the stream that needs it: what accelerate and Lightning do."""
    for batch in batches:
        yield [leaf.to("cuda", non_blocking=True) for leaf in batch]


def apex(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Copy one batch ahead on a side stream, with record_stream: apex's data_prefetcher."""
    side = torch.cuda.Stream()
    source = iter(batches)

    def preload() -> Batch | None:
        batch = next(source, None)
        if batch is None:
            return None
        with torch.cuda.stream(side):
            return [leaf.to("cuda", non_blocking=True) for leaf in batch]

    ahead = preload()
    while ahead is not None:
        torch.cuda.current_stream().wait_stream(side)
        batch = ahead
        for leaf in batch:
            leaf.record_stream(torch.cuda.current_stream())
        ahead = preload()
        yield batch


def unsafe(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Copy one batch ahead on a side stream, with no edge back: DeepLearningExamples, PyG, torchtnt."""
    side = torch.cuda.Stream()
    ahead: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            on_device = [leaf.to("cuda", non_blocking=True) for leaf in batch]
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream().wait_stream(side)
        ahead = on_device
        del on_device
    if ahead is not None:
        yield ahead


class Listed(Dataset[Batch]):
    """A list of batches as a dataset."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        """Return a batch."""
        return self.batches[index]


def timm(batches: Sequence[Batch]) -> Iterable[Batch]:
    """Use timm's own PrefetchLoader: images of three channels only; it normalises as well."""
    from timm.data.loader import PrefetchLoader

    label = torch.zeros(1)
    pairs = [[batch[0], label] for batch in batches]
    loader: Iterable[Batch] = PrefetchLoader(
        DataLoader(Listed(pairs), batch_size=None), device=torch.device("cuda")
    )
    return loader


def accelerate(batches: Sequence[Batch]) -> Iterable[Batch]:
    """Use accelerate's loader with non_blocking copies."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(non_blocking=True))
    prepared: Iterable[Batch] = accelerator.prepare(DataLoader(Listed(batches), batch_size=None))
    return prepared


def torchtnt(batches: Sequence[Batch]) -> Iterable[Batch]:
    """Use torchtnt's prefetcher, one batch ahead: it has no edge back, so its speed is not safe to have."""
    module = importlib.import_module("torchtnt.utils.data.data_prefetcher")
    prefetcher: Iterable[Batch] = module.CudaDataPrefetcher(batches, torch.device("cuda"), 1)
    return prefetcher


def spdl(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Copy two batches ahead in a background thread by SPDL's transfer, as its guide shows."""
    transfer = importlib.import_module("spdl.io").transfer_tensor_h2d
    source = iter(batches)
    with ThreadPoolExecutor(1) as executor:
        ahead = deque(executor.submit(transfer, batch) for batch in itertools.islice(source, 2))
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(executor.submit(transfer, more) for more in itertools.islice(source, 1))
            yield batch
            del batch


class Torchfast:
    """DeviceLoader, the same one for every pass, as a training run has it."""

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._loaders: dict[int, DeviceLoader[Batch]] = {}

    def __call__(self, batches: Sequence[Batch]) -> Iterable[Batch]:
        """Return the loader of these batches."""
        return self._loaders.setdefault(id(batches), DeviceLoader(batches, "cuda", **self._options))


PEERS: dict[str, Peer] = {
    "bare": bare,
    "pinned, non_blocking": non_blocking,
    "apex, record_stream": apex,
    "accelerate": accelerate,
    **({"torchtnt": torchtnt} if importlib.util.find_spec("torchtnt") else {}),
    **({"SPDL": spdl} if importlib.util.find_spec("spdl") else {}),
    "torchfast": Torchfast(),
}
