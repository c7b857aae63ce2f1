"""Which images a training sees and when: a matter of (seed, batch) alone, so that a run goes on from any batch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from crfnet.data import Samples
from crfnet.processes import rank, world_size


class Order(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), without end until ``stop``: each epoch a new permutation, drawn from (seed, epoch).

    Epochs run on into each other, so that every batch is full. A process gets its part of each.
    """

    def __init__(self, count: int, batch_size: int, *, seed: int, start: int, stop: int) -> None:
        self.count, self.batch_size, self.seed, self.start, self.stop = count, batch_size, seed, start, stop

    def __len__(self) -> int:
        """Number of batches."""
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """The batches from ``start`` on."""
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        mine = range(rank(), self.batch_size, world_size())
        for batch in range(self.start, self.stop):
            chosen = []
            for place in (batch * self.batch_size + k for k in mine):
                if place // self.count != epoch:
                    epoch = place // self.count
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    order = torch.randperm(self.count, generator=generator)
                chosen.append((epoch, int(order[place % self.count])))
            yield chosen


def loader(
    samples: Samples, batch_size: int, *, seed: int, start: int, stop: int, workers: int = 0, pin: bool = False
) -> DataLoader[Any]:
    """Batches ``start`` to ``stop`` of this process: images, labels, inside.

    Args:
        samples: what they are drawn from.
        batch_size: images of a batch, of all processes together.
        seed: of their order.
        start: first batch, counted from 0.
        stop: the batch after the last.
        workers: processes that read images; batches do not depend on how many.
        pin: in pinned memory, for copies to a GPU.
    """
    order = Order(len(samples), batch_size, seed=seed, start=start, stop=stop)
    own = torch.Generator().manual_seed(seed)  # or the loader would draw from the generator of dropout
    return DataLoader(samples, batch_sampler=order, num_workers=workers, generator=own, pin_memory=pin)
