"""SIGTERM and SIGUSR1 end a run between two steps, on all ranks after the same one, with a checkpoint."""

import contextlib
import ctypes
import signal
import threading
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist

from dbeta.distributed import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1  # of prctl(2)


class StopRequest:
    """A context in which a signal is a request; repeating it changes nothing (launchers do), only SIGKILL is quicker.

    The run ends after the step under way (one that has just begun: after its first), a validation if one is due, and
    one checkpoint; with several ranks one step later, since they agree by a message that travels while a step is
    computed.
    """

    def __init__(self, ranks: Ranks):
        self.ranks, self.received = ranks, False
        self._before: dict[signal.Signals, object] = {}
        self._asked: tuple[torch.Tensor, dist.Work] | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python has no say over signals
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
            if self.ranks.world > 1:
                _end_with_parent()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, _: int, __: FrameType | None) -> None:
        self.received = True

    def agreed(self) -> bool:
        """Whether to stop now; called by every rank once after each step. Waits for no device."""
        if self.ranks.world == 1:
            return self.received
        asked, self._asked = self._asked, self._ask()
        if asked is None:
            return False
        asked[1].wait()
        return bool(asked[0])

    def _ask(self) -> tuple[torch.Tensor, dist.Work]:
        flag = torch.tensor(int(self.received))
        return flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)


def _end_with_parent() -> None:
    """Have Linux send us SIGTERM when torchrun dies, as it does of SIGUSR1, which it does not pass on."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
