"""Batches by (epoch, position): a loader without state, so that a run resumes by counting."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from swinscale.data.dataset import collate
from swinscale.errors import UsageError
from swinscale.seeding import derive_seed

RESTARTS_IN_A_ROW = 3


class EpochLoader:
    """Serves a data set in batches, in an order that depends on (seed, epoch) alone.

    A batch is divided among processes, and each process's share into micro-batches: contiguous parts whose sizes differ by
    at most one. So the images of a batch are the same whatever the number of processes, and any number will do.

    Args:
        dataset: items are asked for as ``dataset[epoch, index]``, and joined by its ``collate``, if it has one.
        batch_size: images per batch of all processes and micro-batches together.
        micro_batches: parts into which each process's share is divided; ``batches`` yields one after the other.
        drop_last: leave out the images that do not fill a batch (training). Without it every image is served exactly once
            over all processes (evaluation).
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        num_workers: int = 0,
        drop_last: bool = True,
    ):
        self.dataset, self.batch_size, self.seed, self.shuffle = dataset, batch_size, seed, shuffle
        self.rank, self.world_size, self.micro_batches = rank, world_size, micro_batches
        self.num_workers, self.drop_last = num_workers, drop_last
        self.wait_seconds = 0.0
        """Time that ``batches`` has kept its caller waiting."""
        self.restarts: list[str] = []
        """What was said each time that a loader process had died and all were started again."""
        self._order = _Order()
        self._loader: DataLoader[Any] | None = None

    def __len__(self) -> int:
        """Batches per epoch."""
        count = len(self.dataset)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def indices(self, epoch: int) -> list[list[int]]:
        """The micro-batches of this process in ``epoch``, as data set indices."""
        return list(self._indices(epoch, 0))

    def _indices(self, epoch: int, start_batch: int) -> Iterator[list[int]]:
        count, size, parts = len(self.dataset), self.batch_size, self.world_size * self.micro_batches
        random = np.random.default_rng(derive_seed(self.seed, "order", epoch))
        shuffled = getattr(self.dataset, "epoch_order", lambda r: r.permutation(count))
        order = shuffled(random) if self.shuffle else np.arange(count)
        batches = (order[start : start + size] for start in range(start_batch * size, len(self) * size, size))
        mine = range(self.rank, parts, self.world_size)
        # Not a method with yield: that would refer to this loader, which refers to it; and a cycle that holds a DataLoader is
        # freed in an order in which its processes miss the word to stop, 5 seconds each.
        return (b[len(b) * p // parts : len(b) * (p + 1) // parts].tolist() for b in batches for p in mine)

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[dict[str, Any]]:
        """The micro-batches of ``epoch`` from batch ``start_batch`` on; ones without images (in evaluation) are left out.

        One epoch at a time: with loader processes, asking for another one ends the one before. When the system kills a
        loader process, all are started again and go on with the batch that was due; what is served stays the same.

        Raises:
            UsageError: if not one image of the data set can be read, or the loader processes keep dying.
        """
        started, read, unreadable = time.perf_counter(), 0, dict[str, str]()
        served = deaths = 0
        iterator: Iterator[dict[str, Any]] | None = None
        while True:
            try:
                if iterator is None:
                    wanted = islice(filter(None, self._indices(epoch, start_batch)), served, None)
                    self._order.batches = ([(epoch, i) for i in batch] for batch in wanted)
                    iterator = self._start()
                batch = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
                if not self._lost_worker(error):
                    raise
                deaths += 1
                self.restarts.append(" ".join(str(error).split()) or "A DataLoader worker closed its connection")
                batch = None
            finally:
                self.wait_seconds += time.perf_counter() - started
            started = time.perf_counter()
            if batch is None:  # here the error is gone, whose traceback held the loader
                self._loader = iterator = None
                if deaths > RESTARTS_IN_A_ROW:
                    raise UsageError(
                        f"Loader processes were killed {deaths} times in a row ({self.restarts[-1]}). Usually memory has run out: "
                        f"set train.num_workers to less than {self.num_workers}, or allow more memory (in a container also "
                        f"/dev/shm)."
                    )
                continue
            served, deaths = served + 1, 0
            read += len(batch["index"])
            unreadable |= batch["skipped"] if not read else {}
            # In training, a place is empty only after every image was tried for it; all may be gone since the epoch began.
            if (not read and len(unreadable) == len(self.dataset)) or (self.drop_last and not len(batch["index"])):
                name, reason = next(iter([*unreadable.items(), *batch["skipped"]]))
                raise UsageError(f"None of the {len(self.dataset)} images can be read; the first: {name} ({reason}).")
            yield batch
            started = time.perf_counter()

    def _lost_worker(self, error: Exception) -> bool:
        """Whether ``error`` says that a loader process died; what it raised itself begins with "Caught"."""
        if isinstance(error, RuntimeError):
            return str(error).startswith(("DataLoader worker (pid", "Pin memory thread exited"))
        # It died just now, after it had announced a batch and before that was fetched.
        return self.num_workers > 0 and not str(error).startswith("Caught")

    def _start(self) -> Iterator[dict[str, Any]]:
        """An iterator over what ``_order`` holds now."""
        if self._loader is None:
            self._loader = DataLoader(
                self.dataset,
                batch_sampler=self._order,
                num_workers=self.num_workers,
                collate_fn=getattr(self.dataset, "collate", collate),
                persistent_workers=self.num_workers > 0,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # else every epoch would draw from the global random state
            )
        if self.num_workers == 0 or threading.current_thread() is not threading.main_thread():
            return iter(self._loader)
        # PyTorch's handler would raise the death of a loader process in the midst of whatever runs at that moment, such as an
        # optimiser step that is half done. Without it, asking for the next batch finds out, within 5 seconds.
        before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        try:
            return iter(self._loader)
        finally:
            if before is not None:
                signal.signal(signal.SIGCHLD, before)


class _Order:
    """The batch sampler of the loader: whatever ``batches`` put there last."""

    def __init__(self) -> None:
        self.batches: Iterator[list[tuple[int, int]]] = iter(())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.batches
