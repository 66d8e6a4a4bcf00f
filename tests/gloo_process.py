"""One of several processes that train the toy together: python gloo_process.py RANK WORLD PORT OUT MODE.

Writes to OUT the scales after three steps, each on its own share of a batch.
"""

import os
import sys

import torch
from test_slimming import network, penalty_on
from torch import distributed

STRENGTH, LR, STEPS = 0.05, 0.1, 3


def batch(step: int, rank: int, world: int) -> torch.Tensor:
    """Return the share of a process of the four images of a step."""
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    return images[rank::world]


def train(rank: int, world: int, mode: str) -> torch.nn.Module:
    """Train under DDP, or alone in a world of one; batch norms keep their statistics, which each process has apart."""
    model = network().eval()
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=LR, momentum=0.9)
    penalty = penalty_on(model, mode)
    penalty.strength = STRENGTH
    penalty.attach(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        wrapped(batch(step, rank, world)).square().mean().backward()
        optimizer.step()
    return model


if __name__ == "__main__":
    rank, world, port, out, mode = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    distributed.init_process_group("gloo", rank=rank, world_size=world)
    torch.save(train(rank, world, mode).state_dict(), out)
    distributed.destroy_process_group()
