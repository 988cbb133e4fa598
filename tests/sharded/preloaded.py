"""What every process of a test needs, imported once in the server that they are forked from."""

import torch.distributed.fsdp
import torch.distributed.tensor
import torch.distributed.tensor.parallel

import paramstats  # noqa: F401

torch.set_num_threads(1)
