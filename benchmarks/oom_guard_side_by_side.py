"""Train on a device that runs out of memory, under oom_guard and under what others offer.

PYTHONPATH=. python benchmarks/oom_guard_side_by_side.py

Eight batches of 64 in two cases. "too large": a batch of 64 never fits, one of 16 does. "once": every batch
fits, but in the middle of the third step something asks for too much, once. Each library runs each case with
the fault and without, and is compared with itself. On a GPU the memory really runs out; elsewhere that is
pretended. Peers that are not installed are left out: pip install accelerate lightning mosaicml.
"""

import functools
import gc
import importlib.metadata
import itertools
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import record
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchfast import oom_guard

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
N_BATCH, N_BATCHES, N_TAKEN = 64, 8, 16
LIMIT_BYTES = 400 * 2**20
N_TOKENS, WIDTH = (512, 512) if HAS_GPU else (4, 16)
Batch = tuple[torch.Tensor, torch.Tensor]


class Case(NamedTuple):
    """What goes wrong, and whether it does."""

    name: str
    has_fault: bool

    @property
    def is_once(self) -> bool:
        """Whether memory is short only once."""
        return self.name == "once"


class Log:
    """What is seen of a training from inside its model: it outlives models that are built anew."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.n_samples = 0
        self.has_failed = False
        self.begin()
        self.entry_bytes: list[int] = []
        self.failed_at: int | None = None

    def begin(self) -> None:
        """Count the steps of a training from its start."""
        self.n_steps = self.n_whole = 0
        self.is_training = True

    def enter(self, n_samples: int) -> None:
        """Note what is allocated when a batch, or a part of one, comes in."""
        self.n_samples += n_samples
        self.n_whole += n_samples == N_BATCH
        self.entry_bytes.append(torch.cuda.memory_allocated() if HAS_GPU else 0)

    def run_out(self, n_samples: int) -> None:
        """Fail if it is time to."""
        if not self.case.has_fault:
            return
        if self.case.is_once:
            if not self.is_training or self.n_whole != 3 or n_samples != N_BATCH or self.has_failed:
                return
            self._note()
            if HAS_GPU:
                torch.empty(4 * LIMIT_BYTES, dtype=torch.uint8, device=DEVICE)
        elif HAS_GPU or n_samples <= N_TAKEN:
            return
        self._note()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def _note(self) -> None:
        self.has_failed = True
        self.failed_at = len(self.entry_bytes) - 1

    def held_bytes(self) -> int | None:
        """Return how much more was allocated when it was tried again than when it failed."""
        if not HAS_GPU or self.failed_at is None or self.failed_at + 1 >= len(self.entry_bytes):
            return None
        return self.entry_bytes[self.failed_at + 1] - self.entry_bytes[self.failed_at]


class Net(nn.Module):
    """A classifier of sequences: with dropout and batch norm where the batch is never cut, else without."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.log = log
        widths = itertools.pairwise([32, *[WIDTH] * 4])
        norm: Callable[[int], nn.Module] = _BatchNorm if log.case.is_once else nn.LayerNorm
        layers = [[nn.Linear(n_in, n_out), norm(n_out), nn.GELU()] for n_in, n_out in widths]
        self.dropout = nn.Dropout(0.1 if log.case.is_once else 0.0)
        self.body = nn.Sequential(*[layer for block in layers for layer in block])
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        """Classify sequences of shape (N, T, 32)."""
        if not self.training:
            return self._answer(samples)
        self.log.enter(len(samples))
        try:
            return self._answer(samples)
        except torch.OutOfMemoryError:
            self.log._note()
            raise

    def _answer(self, samples: torch.Tensor) -> torch.Tensor:
        hidden = self.dropout(self.body(samples))
        if self.training:
            self.log.run_out(len(samples))
        answer: torch.Tensor = self.head(hidden.mean(1))
        return answer


class _BatchNorm(nn.BatchNorm1d):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.flatten(0, 1)).view_as(hidden)


class Run(NamedTuple):
    """What a library made of it."""

    net: Net
    batch_size: int
    micro_batch_size: int | None


def samples_and_labels() -> TensorDataset:
    """Return the data, on the host."""
    generator = torch.Generator().manual_seed(1)
    n_samples = N_BATCH * N_BATCHES
    samples = torch.randn(n_samples, 1, 32, generator=generator).repeat(1, N_TOKENS, 1)
    return TensorDataset(samples, torch.randint(10, (n_samples,), generator=generator))


def loader_of(batch_size: int) -> DataLoader[Any]:
    """Return the data in batches, in order."""
    return DataLoader(samples_and_labels(), batch_size=batch_size)


def optimizer_of(net: Net) -> torch.optim.Optimizer:
    """Return the optimizer, whose steps are counted."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)

    def count(*_: object) -> None:
        net.log.n_steps += 1

    optimizer.register_step_post_hook(count)
    return optimizer


# --- the libraries ----------------------------------------------------------------------------------------


def under_torchfast(log: Log) -> Run:
    """Try a step again under `guard.retry`."""
    net = Net(log).to(DEVICE)
    optimizer = optimizer_of(net)
    retry = oom_guard().retry(model=net, optimizer=optimizer)
    for samples, labels in loader_of(N_BATCH):
        for attempt in retry.attempts((samples.to(DEVICE), labels.to(DEVICE))):
            with attempt:
                for (part, targets), weight in attempt:
                    (F.cross_entropy(net(part), targets) * weight).backward()
                optimizer.step()
                optimizer.zero_grad()
    return Run(net, N_BATCH, retry.micro_batch_size)


def under_accelerate(log: Log) -> Run:
    """Begin the training anew with smaller batches under `find_executable_batch_size`."""
    from accelerate.utils import find_executable_batch_size

    @find_executable_batch_size(starting_batch_size=N_BATCH)
    def train(batch_size: int) -> Run:
        log.begin()
        net = Net(log).to(DEVICE)
        optimizer = optimizer_of(net)
        for samples, labels in loader_of(batch_size):
            F.cross_entropy(net(samples.to(DEVICE)), labels.to(DEVICE)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return Run(net, batch_size, None)

    run: Run = train()
    return run


def under_lightning(log: Log) -> Run:
    """Look for a size before the training with `BatchSizeFinder`."""
    import lightning
    from lightning.pytorch.callbacks import BatchSizeFinder, Callback

    class Begin(Callback):  # the finder leaves other callbacks out of its trials
        def on_train_start(self, *_: object) -> None:
            log.begin()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.batch_size = Net(log), N_BATCH

        def train_dataloader(self) -> DataLoader[Any]:
            return loader_of(self.batch_size)

        def training_step(self, batch: Batch, _: int) -> torch.Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.net)

    module = Module()
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="gpu" if HAS_GPU else "cpu",
            devices=1,
            max_epochs=1,
            callbacks=[BatchSizeFinder(max_val=N_BATCH), Begin()],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        log.is_training = False
        trainer.fit(module)
    return Run(module.net.to(DEVICE), module.batch_size, None)


def under_composer(log: Log) -> Run:
    """Halve the micro-batches with `device_train_microbatch_size="auto"`."""
    import composer

    if not HAS_GPU:
        raise ImportError("its automatic micro-batches need a GPU")

    class Model(composer.ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(log)

        def forward(self, batch: Batch) -> torch.Tensor:
            answer: torch.Tensor = self.net(batch[0])
            return answer

        def loss(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
            return F.cross_entropy(outputs, batch[1])

    model = Model()
    trainer = composer.Trainer(
        model=model,
        train_dataloader=loader_of(N_BATCH),
        optimizers=optimizer_of(model.net),
        max_duration="1ep",
        device="gpu",
        precision="fp32",
        device_train_microbatch_size="auto",
        progress_bar=False,
        seed=0,
    )
    trainer.fit()
    size = int(trainer.state.device_train_microbatch_size)
    return Run(model.net, N_BATCH, None if size == N_BATCH else size)


WAYS: dict[str, tuple[str | None, Callable[[Log], Run]]] = {
    "accelerate `find_executable_batch_size`": ("accelerate", under_accelerate),
    "Lightning `BatchSizeFinder`": ("lightning", under_lightning),
    'Composer `"auto"` micro-batches': ("mosaicml", under_composer),
    "`oom_guard().retry`": (None, under_torchfast),
}


# --- what is compared -------------------------------------------------------------------------------------


def ending(name: str, case: Case) -> dict[str, Any]:
    """Run a training, and return what it ended with."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if HAS_GPU:
        total_bytes = torch.cuda.get_device_properties(DEVICE).total_memory
        roomy = case.is_once or not case.has_fault
        torch.cuda.set_per_process_memory_fraction((4 if roomy else 1) * LIMIT_BYTES / total_bytes, DEVICE)
        torch.backends.cuda.matmul.allow_tf32 = False
    package, train = WAYS[name]
    log = Log(case)
    try:
        version = None if package is None else importlib.metadata.version(package)
        run = train(log)
    except ImportError as error:
        return {"left_out": f"{type(error).__name__}: {error}"}
    except Exception as error:  # noqa: BLE001 -- that the training ends is what is measured
        return {"version": version, "error": f"{type(error).__name__}: {str(error)[:120]}"}
    source = torch.cuda.get_rng_state() if HAS_GPU else torch.get_rng_state()
    gc.collect()
    loss = _loss(run.net)
    statistics = [b.float().cpu() for name, b in run.net.named_buffers() if name.endswith("running_mean")]
    counts = [int(b) for name, b in run.net.named_buffers() if name.endswith("num_batches_tracked")]
    return {
        "version": version,
        "batch_size": run.batch_size,
        "micro_batch_size": run.micro_batch_size,
        "n_steps": log.n_steps,
        "n_samples": log.n_samples,
        "held_bytes": log.held_bytes(),
        "has_failed": log.has_failed,
        "loss": loss,
        "n_batches_in_statistics": counts[0] if counts else None,
        "statistics": [s.tolist() for s in statistics],
        "random_state": source.tolist(),
    }


@torch.no_grad()
def _loss(net: Net) -> float:
    net.eval()
    losses = [
        F.cross_entropy(net(samples.to(DEVICE)), labels.to(DEVICE)).item()
        for samples, labels in loader_of(N_TAKEN)
    ]
    return sum(losses) / len(losses)


def compared(name: str, case: str, faulty: dict[str, Any], bare: dict[str, Any]) -> dict[str, Any]:
    """Return what the fault has changed."""
    row = {"way": name, "case": case, **faulty, "without_fault": bare}
    if "loss" in faulty and "loss" in bare:
        pairs = zip(faulty.pop("statistics"), bare.pop("statistics"), strict=True)
        differences = [torch.tensor(one).sub(torch.tensor(other)).abs().max() for one, other in pairs]
        row["statistics_differ_by"] = max(map(float, differences), default=None)
        if case == "once":  # there is no dropout in the other
            row["same_random_state"] = faulty["random_state"] == bare["random_state"]
        row["loss_differs_by"] = abs(faulty["loss"] - bare["loss"])
    for bulky in ("statistics", "random_state"):
        row.pop(bulky, None)
        bare.pop(bulky, None)
    return row


def rows() -> list[dict[str, Any]]:
    """Run each library in a process of its own, and compare it with itself."""
    found = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(4 if HAS_GPU else 2, mp_context=spawn, max_tasks_per_child=1) as pool:
        wanted = [(name, case) for case in ("too large", "once") for name in WAYS]
        endings = {
            (name, case, fault): pool.submit(ending, name, Case(case, has_fault=fault))
            for name, case in wanted
            for fault in (True, False)
        }
        result = functools.partial(_result, endings)
        for name, case in wanted:
            row = compared(name, case, result(name, case, True), result(name, case, False))
            print(row, flush=True)
            found.append(row)
    return [row for row in found if "left_out" not in row]


def _result(endings: dict[Any, Any], *key: Any) -> dict[str, Any]:
    result: dict[str, Any] = endings[key].result()
    return result


def main() -> None:
    """Write the result file."""
    how = (
        f"the allocator's limit is {LIMIT_BYTES // 2**20} MiB, or one request is beyond it"
        if HAS_GPU
        else "pretended: no GPU"
    )
    protocol = (
        f"{N_BATCHES} batches of {N_BATCH}, AdamW, float32. Too large: a batch of {N_BATCH} never fits; "
        f"layer norm. Once: the third step fails once; batch norm and dropout ({how}). Each is compared "
        "with its own run without the fault."
    )
    print(record.write("oom_guard_side_by_side", protocol, rows()))


if __name__ == "__main__":
    main()
