"""Processes and ranks: who this process is, what it may ask of the others, how they join and part.

One mechanism for tracing, training and evaluation: under torchrun, ``deepspeed`` or ``accelerate launch``,
and for a process that is alone. Work is shared by rank, and only words are exchanged here: flags, small
objects, errors. Gradients and sharded weights are DeepSpeed's business.

Why this is not :class:`accelerate.PartialState`: evaluation works without the extra ``train`` that accelerate
comes with; its state is global, kept on the class when the work is done, and making it sets environment
variables and the number of threads; its ``main_process_first`` is a pair of barriers, so an error on the
first process leaves the others waiting; and on GPUs its words travel by NCCL.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch

from dyvte.errors import ConfigError, DyvteError

Item = TypeVar("Item")
Result = TypeVar("Result")

PATIENCE = timedelta(days=2)
"""How long a process waits for another: it may be hours behind with its share of a teacher pass."""
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Launch(NamedTuple):
    """Which process of how many this is: over all machines, and on its own machine."""

    rank: int
    world_size: int
    local_rank: int


def launch() -> Launch:
    """What the launcher's variables say; alone without any.

    Raises
    ------
    ConfigError
        If they are incomplete, or no numbers.
    """
    found: dict[str, int] = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        text = os.environ.get(name)
        try:
            if text is not None:
                found[name] = int(text)
        except ValueError as error:
            raise ConfigError(
                f"the variable {name} is {text!r}: expected the number a launcher sets"
            ) from error
    world_size = found.get("WORLD_SIZE", 1)
    if world_size == 1:
        return Launch(0, 1, found.get("LOCAL_RANK", 0))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {world_size}, but {' and '.join(missing)} not set: start several processes with "
            "torchrun, deepspeed or accelerate launch"
        )
    return Launch(found["RANK"], world_size, found.get("LOCAL_RANK", found["RANK"]))


def own_device(local_rank: int = 0) -> torch.device:
    """Where a process keeps its backbone and gates: the GPU of its local rank, or the CPU where none is."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """This process among all; made without arguments it is alone.

    Parameters
    ----------
    rank
        0 .. ``world_size - 1``.
    world_size
        Number of processes.
    device
        Where this process keeps its backbone and gates.
    group
        The gloo group over which words are exchanged; None where the process is alone.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=own_device)
    group: Any = None

    @property
    def first(self) -> bool:
        """True on the one process that writes results and shows progress."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part: every ``world_size``-th item, so that parts take equally long."""
        return items[self.rank :: self.world_size]

    def together(self, parts: Sequence[Item]) -> list[Item]:
        """What all processes made of their shares (see `share`), in the order of the items, on every process;
        anything that can be pickled."""
        if self.world_size == 1:
            return list(parts)
        shares: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(shares, list(parts), group=self.group)
        joined: list[Any] = [None] * sum(map(len, shares))
        for rank, share in enumerate(shares):
            joined[rank :: self.world_size] = share
        return joined

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            torch.distributed.barrier(self.group)

    def all_true(self, value: bool) -> bool:
        """True if ``value`` is True on every process; the same answer everywhere."""
        if self.world_size == 1:
            return value
        flag = torch.tensor([int(value)])
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN, group=self.group)
        return bool(flag.item())

    def mean(self, value: float) -> float:
        """Mean over processes; the same answer everywhere."""
        if self.world_size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        torch.distributed.all_reduce(total, group=self.group)
        return float(total.item()) / self.world_size

    def from_first(self, value: Any) -> Any:
        """The first process's ``value`` (anything that can be pickled), on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def first_alone(self, work: Callable[[], Result]) -> Result | None:
        """Run ``work`` on the first process while the others wait; its result there, None elsewhere.

        Raises
        ------
        Exception
            What ``work`` raised, on every process: none waits for one that has left. The first raises it as
            it was; the others raise errors of dyvte and of the system as what they are, any other as a
            RuntimeError of the same text.
        """
        found, error = None, None
        if self.first:
            try:
                found = work()
            except Exception as raised:
                error = raised
        told = self.from_first(None if error is None else _in_words(error))
        if error is not None:
            raise error
        if told is not None:
            kind, arguments = told
            raise kind(*arguments)
        return found


def _in_words(error: Exception) -> tuple[type[Exception], tuple[Any, ...]]:
    """An error as another process can make it again."""
    if isinstance(error, DyvteError):
        return type(error), (str(error),)
    if isinstance(error, OSError) and error.errno is not None:
        return OSError, (error.errno, error.strerror, error.filename)
    return RuntimeError, (f"the first process stopped: {type(error).__name__}: {error}",)


@contextmanager
def join_processes(*, engine: bool = False) -> Iterator[Processes]:
    """Join the processes of the launcher, or stand alone under plain python; nothing stays behind.

    Parameters
    ----------
    engine
        True: DeepSpeed engines will run inside. Its communication is set up too (NCCL on GPUs, gloo on CPUs),
        also for a process that is alone: a group of one is made, with a launcher's variables set while it is
        made, because DeepSpeed would look for MPI otherwise. That group stays for the life of the process;
        DeepSpeed keeps handles to it and could not start a second engine after it is gone.

    Raises
    ------
    ConfigError
        If the launcher's variables are incomplete, or ``engine`` is asked for and DeepSpeed is not installed.
    """
    rank, world_size, local_rank = launch()
    if not engine and world_size == 1:
        yield Processes(device=own_device(local_rank))
        return
    deepspeed = import_deepspeed() if engine else None
    started_here = not torch.distributed.is_initialized()
    added = _launch_variables(rank, world_size, local_rank)
    group = None
    try:
        if torch.cuda.is_available() and started_here:
            torch.cuda.set_device(local_rank)
        if started_here and deepspeed is not None:
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            deepspeed.init_distributed(dist_backend=backend, timeout=PATIENCE, verbose=False)
        elif started_here:
            torch.distributed.init_process_group("gloo", timeout=PATIENCE)
        if world_size > 1:
            group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        yield Processes(rank, world_size, own_device(local_rank), group)
    finally:
        gc.collect()  # engines that are let go hold on to the groups
        if world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group(None if started_here else group)
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


def _launch_variables(rank: int, world_size: int, local_rank: int) -> list[str]:
    """Set the launcher's variables that are not set; their names."""
    missing = [name for name in _LAUNCHED if name not in os.environ]
    if not missing:
        return []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = (rank, world_size, local_rank, "127.0.0.1", port)
    for name, value in zip(_LAUNCHED, values, strict=True):
        if name in missing:
            os.environ[name] = str(value)
    return missing
