"""Processes that have joined a gloo group, for tests of several ranks."""

import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dbeta.distributed import Ranks


class Team:
    """Processes that have joined a group and run what they are given; starting them is what takes time."""

    def __init__(self, world: int, folder):
        context = mp.get_context("spawn")
        self.lines, self.processes = [], []
        for rank in range(world):
            mine, theirs = context.Pipe()
            arguments = (rank, world, f"file://{folder / 'meet'}", theirs)
            self.processes.append(context.Process(target=_member, args=arguments, daemon=True))
            self.processes[-1].start()
            self.lines.append(mine)

    def __call__(self, function, *arguments) -> list:
        """What ``function(ranks, *arguments)`` returns on each."""
        for line in self.lines:
            line.send((function, arguments))
        results = [line.recv() for line in self.lines]
        failed = [result for result in results if isinstance(result, str)]
        assert not failed, failed[0]
        return results

    def end(self) -> None:
        for line in self.lines:
            line.send(None)
        for process in self.processes:
            process.join(30)


def _member(rank: int, world: int, address: str, line) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=100))
    while job := line.recv():
        function, arguments = job
        try:
            line.send(function(Ranks(rank, world), *arguments))
        except Exception:
            line.send(traceback.format_exc())
    dist.destroy_process_group()
