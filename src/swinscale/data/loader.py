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

    With W processes and b images per process, the j-th batches of all processes together hold the images of the j-th
    batch of one process with W·b images.

    Args:
        dataset: items are asked for as ``dataset[epoch, index]``.
        batch_size: images per batch of this process.
        drop_last: leave out the images that do not fill a batch on every process (training). Without it every image is
            served exactly once over all processes (evaluation).
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
        num_workers: int = 0,
        drop_last: bool = True,
    ):
        self.dataset, self.batch_size, self.seed, self.shuffle = dataset, batch_size, seed, shuffle
        self.rank, self.world_size, self.num_workers, self.drop_last = rank, world_size, num_workers, drop_last
        self.wait_seconds = 0.0
        """Time that ``batches`` has kept its caller waiting."""
        self._order = _Order()
        self._loader: DataLoader[Any] | None = None

    def __len__(self) -> int:
        """Batches per epoch and process."""
        together = self.batch_size * self.world_size
        return len(self.dataset) // together if self.drop_last else -(-len(self.dataset) // together)

    def indices(self, epoch: int) -> list[list[int]]:
        """The batches of this process in ``epoch``, as data set indices."""
        return list(self._indices(epoch, 0))

    def _indices(self, epoch: int, start_batch: int) -> Iterator[list[int]]:
        count, size, together = len(self.dataset), self.batch_size, self.batch_size * self.world_size
        random = np.random.default_rng(derive_seed(self.seed, "order", epoch))
        order = random.permutation(count) if self.shuffle else np.arange(count)
        starts = range(start_batch * together + self.rank * size, len(self) * together, together)
        # Not a method with yield: that would refer to this loader, which refers to it; and a cycle that holds a DataLoader is
        # freed in an order in which its processes miss the word to stop, 5 seconds each.
        return (order[start : start + size].tolist() for start in starts)

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of ``epoch`` from ``start_batch`` on. A process without images in a last batch gets none.

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
