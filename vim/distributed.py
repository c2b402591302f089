"""Several processes as one: started by torchrun, one per GPU (NCCL) or any number on CPUs (gloo)."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vim.config import ConfigError


@dataclass(frozen=True)
class World:
    """The processes of this run, as this one sees them; one process by itself needs no start."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """`values` added up over all processes, in float64; every process must call it."""
        if self.size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every process, by rank; every process must call it."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def parallel(self, model: nn.Module) -> nn.Module:
        """`model`, its gradients averaged over the processes. Its weights become those of process 0."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)


@contextmanager
def join(device: str, dist_url: str, world_size: int | None) -> Iterator[World]:
    """Meet the other processes, if torchrun (or the same environment variables) started any; part in the end.

    device: "cuda" becomes the GPU of LOCAL_RANK.
    world_size: how many processes the caller expects; None for as many as there are.

    Raises ConfigError if that does not fit what was started.
    """
    try:
        rank, size, local_rank = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK in the environment must be numbers: {error}") from error
    if world_size not in (None, size):
        raise ConfigError(
            f"--world_size {world_size}, but {size} {'was' if size == 1 else 'were'} started: "
            f"torchrun --nproc_per_node {world_size} vim/main.py …"
        )
    place = torch.device(device)
    if size == 1:
        yield World(place)
        return
    if place.type == "cuda":
        if place.index is not None:
            raise ConfigError(f"--device {device} with {size} processes: use --device cuda, each takes its own GPU")
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; "
                "start fewer with torchrun --nproc_per_node, or use --device cpu"
            )
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    backend = "nccl" if place.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend, init_method=dist_url, rank=rank, world_size=size,
            device_id=place if place.type == "cuda" else None,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"process {rank} of {size} cannot meet the others at {dist_url}: {error}") from error
    try:
        yield World(place, rank, size)
    finally:
        dist.destroy_process_group()
