"""The processes of one evaluation, started by torchrun or accelerate; alone under plain python."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from dyvte.errors import ConfigError, DyvteError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among all. ``group`` is None where it is alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    group: Any = None

    @property
    def first(self) -> bool:
        """True on the one process that writes results and shows progress."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part: every ``world_size``-th item, so that parts take equally long."""
        return items[self.rank :: self.world_size]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            torch.distributed.barrier(self.group)

    def first_alone(self, work: Callable[[], Result]) -> Result | None:
        """Run ``work`` on the first process while the others wait; its result there, None elsewhere.

        Raises
        ------
        DyvteError
            What ``work`` raised, on every process: none waits for one that has left.
        """
        found, error = None, None
        if self.first:
            try:
                found = work()
            except DyvteError as raised:
                if self.world_size == 1:
                    raise
                error = raised
        if self.world_size > 1:
            box: list[Any] = [None if error is None else (type(error), str(error))]
            torch.distributed.broadcast_object_list(box, src=0, group=self.group)
            if box[0] is not None:
                kind, text = box[0]
                raise kind(text)
        return found


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the processes of the launcher; nothing to join, and nothing left behind, without one.

    Raises
    ------
    ConfigError
        The launcher's variables are incomplete.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks()
        return
    try:
        rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"WORLD_SIZE is {world_size}, but RANK is not set: start several processes with torchrun "
            "or accelerate"
        ) from error
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    started_here = not torch.distributed.is_initialized()
    # Only words are exchanged, so gloo will do on any device. A process may wait for hours until another has
    # finished its part.
    timeout = timedelta(days=2)
    if started_here:
        torch.distributed.init_process_group("gloo", timeout=timeout)
    try:
        group = torch.distributed.new_group(backend="gloo", timeout=timeout)
        yield Ranks(rank, world_size, local_rank, group)
    finally:
        if started_here:
            torch.distributed.destroy_process_group()
