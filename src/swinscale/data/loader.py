"""Batches by (epoch, position): a loader without state, so that a run resumes by counting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from swinscale.data.dataset import collate
from swinscale.errors import UsageError
from swinscale.seeding import derive_seed


class EpochLoader:
    """Serves a data set in batches, in an order that depends on (seed, epoch) alone.

    A batch is divided among processes, and each process's share into micro-batches: contiguous parts whose sizes differ by
    at most one. So the images of a batch are the same whatever the number of processes, and any number will do.

    Args:
        dataset: items are asked for as ``dataset[epoch, index]``.
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

        One epoch at a time: with loader processes, asking for another one ends the one before.

        Raises:
            UsageError: if not one image of the data set can be read.
        """
        self._order.batches = ([(epoch, i) for i in batch] for batch in self._indices(epoch, start_batch) if batch)
        if self._loader is None:
            self._loader = DataLoader(
                self.dataset,
                batch_sampler=self._order,
                num_workers=self.num_workers,
                collate_fn=collate,
                persistent_workers=self.num_workers > 0,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # else every epoch would draw from the global random state
            )
        started, read, unreadable = time.perf_counter(), 0, dict[str, str]()
        iterator = iter(self._loader)
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self.wait_seconds += time.perf_counter() - started
            read += len(batch["index"])
            unreadable |= batch["skipped"] if not read else {}
            if not read and len(unreadable) == len(self.dataset):
                name, reason = next(iter(unreadable.items()))
                raise UsageError(f"None of the {len(unreadable)} images can be read; the first: {name} ({reason}).")
            yield batch
            started = time.perf_counter()


class _Order:
    """The batch sampler of the loader: whatever ``batches`` put there last."""

    def __init__(self) -> None:
        self.batches: Iterator[list[tuple[int, int]]] = iter(())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.batches
