"""Trains in several processes that share every gradient.

On an idle CPU, two processes with one thread each are as fast as one process with two threads. On a
busy one they are much faster: threads wait for each other in every operator, processes once per
step.
"""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn


def run(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(rank, *arguments)` in `count` processes, or in this one if `count` is 1."""
    if count == 1:
        function(0, *arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        spawn(_join, (count, meeting, function, arguments), nprocs=count)


def _join(
    rank: int, count: int, meeting: str, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    patience = datetime.timedelta(minutes=10)
    dist.init_process_group("gloo", meeting, patience, count, rank)
    function(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def is_first() -> bool:
    """Return whether this is the only process, or the one that reports for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


@torch.no_grad()
def share(parameters: Iterable[nn.Parameter], progress: float) -> float:
    """Replace gradients by their mean over all processes; return the mean `progress`.

    Progress depends on each process's clock, but all must stop at the same step.
    """
    if not dist.is_initialized():
        return progress
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor([progress])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()
    return float(flat[-1])
