"""One command run by several processes, as `torchrun` and `accelerate launch` start them."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch

from .console import process_rank

LONGEST_WAIT = timedelta(days=14)  # for the slowest process; a launcher ends all when one fails
Item = TypeVar("Item")


class Team:
    """The processes of a launch, or this one alone. A context: within it they can wait for one another.

    width: processes that work on the same together. rank, count: this group's number, and how many groups there are.
    Processes that a program has joined already stay joined. Where RANK and WORLD_SIZE are set by hand, without
    MASTER_ADDR, nobody waits for anybody: `is_connected` is False.
    Raises ValueError for a number of processes that is no multiple of width.
    """

    def __init__(self, width: int = 1):
        process, processes = process_rank()
        self.is_connected = processes > 1 and "MASTER_ADDR" in os.environ
        if processes % width or (width > 1 and not self.is_connected):
            raise ValueError(
                f"Number of processes: got {processes}, expected a multiple of {width}. Start it with torchrun "
                f"--standalone --nproc_per_node {width}."
            )
        self.width, self.leads, self.place = width, process == 0, process % width
        self.rank, self.count = process // width, processes // width
        self._members, self._joins = None, self.is_connected and not torch.distributed.is_initialized()

    def __enter__(self) -> "Team":
        if self._joins:
            torch.distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
        if self.width > 1:
            groups = [range(start, start + self.width) for start in range(0, self.count * self.width, self.width)]
            self._members = torch.distributed.new_subgroups_by_enumeration([list(each) for each in groups])[0]
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.wait()  # the first process holds what the others find one another by
        if self._joins:
            torch.distributed.destroy_process_group()

    def wait(self) -> None:
        """Until all processes are here. Raises RuntimeError when one of them has ended."""
        if not self.is_connected:
            return
        try:
            torch.distributed.all_reduce(torch.zeros(1))
        except RuntimeError as error:  # the library's own words tell of sockets
            raise RuntimeError(
                "Another process has ended: got no answer from it, expected it to do its share. Its own line says why."
            ) from error

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """What the first process says, in all of them."""
        said = torch.tensor(flags, dtype=torch.uint8)
        if self.is_connected:
            torch.distributed.broadcast(said, 0)
        return said.bool().tolist()

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This group's items of all: every count-th, from its rank on."""
        return items[self.rank :: self.count]

    def gather(self, part: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of this group's processes, each of one shape, in the order of their places.

        They go through the CPU: a prediction is small beside what it takes to compute it.
        """
        own = part.to("cpu").contiguous()
        parts = [torch.empty_like(own) for _ in range(self.width)]
        torch.distributed.all_gather(parts, own, group=self._members)
        return [each.to(part.device) for each in parts]
