"""Training the whole ECG encoder on a labelled task: the loop that fine-tuning and identification share."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dbeta import checkpoint
from dbeta.runtime import track
from dbeta.shards import snapshot


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Table 10; Adam throughout."""

    lr: float
    epochs: int = 100
    batch: int = 256
    seed: int = 42


class TokenMean(nn.Module):
    """The pre-trained ECG encoder and projection, averaged over the tokens (without CLS)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.encoder = copy.deepcopy(model.ecg_encoder)
        self.projection = copy.deepcopy(model.ecg_projection)

    def forward(self, ecg: Tensor) -> Tensor:
        """float [B, 12, L] mV -> [B, D]."""
        return self.projection(self.encoder(ecg))[:, 1:].mean(1)


def fit(
    network: nn.Module,
    loss_of: Callable[[np.ndarray], Tensor],
    validate: Callable[[], float],
    *,
    rows: int,
    config: FitConfig,
    folder: Path,
    what: str,
) -> dict[str, float]:
    """Train ``network`` and leave it with the weights of its best validation epoch.

    One checkpoint per epoch in ``folder``, from which a killed run goes on; removed at the end.

    Args:
        loss_of: the loss of some training rows, int64 [B].
        validate: the score after an epoch, higher is better; called in eval mode without gradients.
        rows: number of training rows.

    Returns:
        ``epoch`` (1-based) and validation ``score`` of the weights that were kept.

    Raises:
        ArithmeticError: the loss is not finite.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=config.lr)
    first, best, kept = 0, {"epoch": 0, "score": float("-inf")}, folder / "best.safetensors"
    restored = checkpoint.latest(folder) if folder.is_dir() else None
    if restored is not None and kept.is_file():
        state = checkpoint.load(restored, network, optimizer, holds={"step": int, "best": dict})
        first, best = state["step"], state["best"]
    folder.mkdir(parents=True, exist_ok=True)
    for epoch in track(range(first + 1, config.epochs + 1), what):
        torch.manual_seed(config.seed * 1_000_003 + epoch)  # dropout depends on seed and epoch alone
        order = np.random.default_rng((config.seed, epoch)).permutation(rows)
        network.train()
        for low in range(0, rows, config.batch):
            loss = loss_of(order[low : low + config.batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if not torch.isfinite(loss):
            raise ArithmeticError(f"{what}: the loss is {loss.item()} in epoch {epoch}; use a lower learning rate")
        network.eval()
        with torch.no_grad():
            score = validate()
        if score > best["score"]:
            best = {"epoch": epoch, "score": score}
            partial = kept.with_suffix(".partial")
            save_file({name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}, partial)
            partial.replace(kept)
        checkpoint.write(folder, epoch, snapshot(network, optimizer), {"best": best}, keep=1)
    network.load_state_dict(load_file(kept))
    with torch.no_grad():
        finite = torch.isfinite(loss_of(np.arange(min(rows, config.batch)))).item()
    if not finite:
        raise ArithmeticError(f"{what}: the weights of epoch {best['epoch']} overflow; use a lower learning rate")
    shutil.rmtree(folder)
    return best
