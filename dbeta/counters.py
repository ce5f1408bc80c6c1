"""What a run counts between two log lines, on the device: losses, hits, and steps that were skipped."""

from typing import Any

import torch
from torch import Tensor

from dbeta.config import Config
from dbeta.distributed import ALONE, Ranks


class Counters:
    """Sums over the steps since the last log line, such that their mean over ranks is that of the global batch."""

    def __init__(self, config: Config, device: torch.device, ranks: Ranks = ALONE):
        self.config, self.device, self.ranks = config, device, ranks
        self.sums: dict[str, Tensor] = {}
        self.steps = 0  # in these sums
        self.judged: list[Tensor] = []  # of each step since the last look: 1 if it was skipped
        self.skipped = self.in_a_row = self.longest_row = 0

    def add(self, name: str, value: Tensor) -> None:
        """Add to a sum."""
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def end_step(self, bad: Tensor) -> None:
        """Count a step; ``bad`` is 1 if it was skipped."""
        self.judged.append(bad)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of a log window that is still open, of all ranks; JSON keeps float32 unchanged."""
        sums = {name: self.ranks.mean(value).item() for name, value in self.sums.items()}
        return {"sums": sums, "counted": self.steps, "skipped": [self.skipped, self.in_a_row]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``, on any number of ranks."""
        self.sums = {name: torch.tensor(value, device=self.device) for name, value in state["sums"].items()}
        self.steps = state["counted"]
        self.skipped, self.in_a_row = map(int, state["skipped"])

    def skipped_steps(self) -> list[int]:
        """Which steps since the last call were skipped, counted back from the last one: -1, -2, ...

        Here and in ``drain`` the host waits for the device.
        """
        flags = torch.stack(self.judged).int().tolist() if self.judged else []
        self.judged = []
        for flag in flags:
            self.skipped += flag
            self.in_a_row = (self.in_a_row + 1) * flag
            self.longest_row = max(self.longest_row, self.in_a_row)
        return [place - len(flags) for place, flag in enumerate(flags) if flag]

    def drain(self) -> dict[str, float]:
        """Means over the steps since the last call and over ranks, after ``skipped_steps``.

        Raises:
            ArithmeticError: ``optim.max_nonfinite`` steps in a row were skipped.
        """
        if self.longest_row >= self.config.optim.max_nonfinite:
            raise ArithmeticError(
                f"the loss or gradient was not finite for {self.longest_row} steps in a row (optim.max_nonfinite); the "
                "weights are those before them, nonfinite.jsonl names the records. Lower optim.lr, or set optim.clip=1"
            )
        values = self.ranks.mean(torch.stack([value.double() for value in self.sums.values()])).tolist()
        means = {name: value / self.steps for name, value in zip(self.sums, values)}
        means["etm_accuracy"] = means.pop("etm_correct") * self.config.train.accumulate / self.config.train.batch
        means["mlm_accuracy"] = means.pop("mlm_correct") / max(means.pop("mlm_count"), 1.0)
        if "replaced" in means:  # records, not a mean
            means["replaced"] *= self.steps * self.ranks.world
        self.sums, self.steps = {}, 0
        return means | {"skipped": float(self.skipped)}
