"""torchrun, three ranks: the last is killed while the first waits, in C, for one that sleeps."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

dist.init_process_group("gloo", timeout=timedelta(minutes=5))
rank = dist.get_rank()
norm = nn.BatchNorm1d(3)
norm(torch.randn(4, 3))
first_two = dist.new_group([0, 1])
dist.barrier()
time.sleep(0.5)  # nobody is left in the barrier
if rank == int(sys.argv[1]):
    os.kill(os.getpid(), signal.SIGKILL)
elif rank == 0:
    dist.all_reduce(torch.ones(1), group=first_two)  # where it waits
else:
    time.sleep(300)  # where it sleeps
