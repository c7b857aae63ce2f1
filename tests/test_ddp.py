"""More than one process: DistributedDataParallel around the layer gives the gradients of one process with all items."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from crfnet import DenseCRF

PROCESSES = 2


def model() -> nn.Module:
    torch.manual_seed(0)
    return DenseCRF(3, theta_alpha=6.0, theta_beta=40.0, learn=("weights", "compatibility", "bandwidths"))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = (255 * torch.rand(2 * PROCESSES, 3, 6, 7, generator=generator)).round()
    return torch.randn(2 * PROCESSES, 3, 6, 7, generator=generator), image


def loss(crf: nn.Module, logits: Tensor, image: Tensor) -> Tensor:
    return crf(logits, image).softmax(1).square().mean()


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(os.path.join(folder, "store"), PROCESSES)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    crf = DistributedDataParallel(model())
    logits, image = (tensor[2 * rank : 2 * rank + 2] for tensor in batch())
    loss(crf, logits, image).backward()
    if rank == 0:
        torch.save([parameter.grad for parameter in crf.module.parameters()], os.path.join(folder, "gradients.pt"))
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="this build of torch has no torch.distributed")
def test_two_processes_train_like_one():
    crf = model()
    loss(crf, *batch()).backward()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, args=(folder,), nprocs=PROCESSES)
        gradients = torch.load(Path(folder) / "gradients.pt", weights_only=True)
    for got, parameter in zip(gradients, crf.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-5 * float(parameter.grad.abs().max()))
