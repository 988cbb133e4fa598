"""Train a small transformer with tensor parallelism inside fully_shard, on the CPU.

    torchrun --nproc-per-node 4 examples/sharded.py

Every rank makes the same calls and gets the same summary of the whole model. Rank 0 prints it.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import paramstats


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Transformer(nn.Module):
    def __init__(self, words: int = 100, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, words)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.blocks(self.embedding(tokens)))
        return logits.clone()  # fully_shard warns about views


def main() -> None:
    if "RANK" not in os.environ or int(os.environ["WORLD_SIZE"]) % 2:
        sys.exit(
            "expected an even number of ranks: torchrun --nproc-per-node 4 examples/sharded.py"
        )
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same model on every rank
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    model = Transformer()
    for block in model.blocks:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        fully_shard(parallelize_module(block, mesh["tp"], plan), mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    torch.manual_seed(1 + mesh["dp"].get_local_rank())  # different data on each data-parallel rank
    for step in range(5):
        tokens = torch.randint(100, (8, 16))
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        summary = paramstats.summarize(model)
        if dist.get_rank() == 0:
            print(f"step {step}: gradient norm {summary.total.grad.norm:.4f}")
        optimizer.step()
    if dist.get_rank() == 0:
        print(summary)
        print("replicas that differ:", dict(summary.diverged) or "none")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
