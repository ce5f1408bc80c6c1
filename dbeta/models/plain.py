"""ETS in plain PyTorch, until dbeta_kernels.ets_loss is there."""

import torch
import torch.nn.functional as F


def ets_loss(
    ecg, text, aligned, *, scale=1.0, bias=0.0, ecg_reports=None, text_reports=None, same_report="negative",
    offset=0, diagonal=True, reduction="batch", backend="auto",
):  # fmt: skip
    z = scale * ecg @ text.T + bias
    y = -torch.ones_like(z)
    y.diagonal().copy_(2.0 * aligned - 1)
    loss = F.softplus(-y * z)
    if same_report != "negative":
        same = (ecg_reports[:, None] == text_reports) & ~torch.eye(len(ecg), dtype=torch.bool, device=ecg.device)
        loss = loss * ~same if same_report == "ignore" else torch.where(same, F.softplus(-z), loss)
    return loss.sum() / len(ecg) / (len(text) if reduction == "mean" else 1)
