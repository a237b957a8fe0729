"""One process or many: ranks, devices, barriers, and DeepSpeed's start-up."""

from __future__ import annotations

import gc
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from dyvte.errors import ConfigError

_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """This process among all; ``device`` is where its backbone and gates live."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """True on the one process that writes and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def all_true(self, value: bool) -> bool:
        """True if ``value`` is True on every process; the same answer everywhere."""
        if self.world_size == 1:
            return value
        flag = torch.tensor([int(value)], device=self.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
        return bool(flag.item())

    def from_first(self, value: Any) -> Any:
        """The first process's ``value``, on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def mean(self, value: float) -> float:
        """Mean over processes; the same answer everywhere."""
        if self.world_size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return float(total.item()) / self.world_size


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that a launcher started, or stand alone under plain python.

    Launchers (torchrun, deepspeed) tell rank and address in the environment; alone, this sets them while the
    group is made, because DeepSpeed would look for MPI otherwise. A group of one stays for the life of the
    process: DeepSpeed keeps handles to it and could not start a second engine after it is gone.
    """
    deepspeed = import_deepspeed()
    on_gpu = torch.cuda.is_available()
    added = _stand_alone()
    try:
        if not torch.distributed.is_initialized():
            if on_gpu:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            # A rank may wait for hours until another has finished its share of the teacher pass.
            deepspeed.init_distributed(
                dist_backend="nccl" if on_gpu else "gloo", timeout=timedelta(days=2), verbose=False
            )
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        yield Processes(rank, world_size, device)
    finally:
        gc.collect()
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.destroy_process_group()
        for name in added:
            os.environ.pop(name, None)


def import_deepspeed() -> Any:
    """DeepSpeed, quiet and without its CPU shared-memory extension.

    That extension would be compiled at the first start (over a minute, a compiler needed, and a killed
    compilation leaves a lock on which the next start hangs); it only serves tensor-parallel inference.

    Raises
    ------
    ConfigError
        If DeepSpeed is not installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            f"training needs DeepSpeed, which cannot be imported ({error}): pip install 'dyvte[train]'"
        ) from error
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def _stand_alone() -> list[str]:
    """Set the launch variables where no launcher did; the names that were set."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
        return []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = dict(zip(_LAUNCH, ("0", "1", "0", "127.0.0.1", str(port)), strict=True))
    added = [name for name in _LAUNCH if name not in os.environ]
    for name in added:
        os.environ[name] = alone[name]
    return added
