"""AdamW over every parameter and the tri-stage schedule (paper 4.1, MODEL section 13)."""

import math
from collections.abc import Iterable

import torch

from dbeta.config import OptimConfig


def learning_rate(update: int, steps: int, config: OptimConfig) -> float:
    """The tri-stage rate of the next update after ``update`` completed ones, out of ``steps``.

    Linear from ``initial_scale * lr`` to ``lr`` over the first ``warmup`` share, constant over ``hold``, then
    exponential down to ``final_scale * lr`` over ``decay``, and constant after that.
    """
    warmup, hold, decay = (int(steps * share) for share in (config.warmup, config.hold, config.decay))
    if update < warmup:
        initial = config.initial_scale
        return config.lr * (initial + (1 - initial) * update / warmup)
    if update < warmup + hold:
        return config.lr
    if update <= warmup + hold + decay and decay > 0:
        return config.lr * math.exp(math.log(config.final_scale) * (update - warmup - hold) / decay)
    return config.lr * config.final_scale


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW with decoupled decay on all parameters, biases and norms included.

    The rate is a tensor, so that changing it neither recompiles nor recaptures the step, and the step itself can be
    skipped on the device through ``optimizer.found_inf`` (see ``trainer.update``).
    """
    parameters = list(parameters)
    device = parameters[0].device
    return torch.optim.AdamW(
        parameters,
        lr=torch.tensor(config.lr, device=device) if device.type == "cuda" else config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
        capturable=device.type == "cuda",
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group, in place where it is a tensor (no host synchronisation)."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
