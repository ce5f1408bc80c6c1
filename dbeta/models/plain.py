"""Plain forms of the operators of dbeta_kernels, until those exist."""

import torch
import torch.nn.functional as F


def conv_stem(ecg, weights, norm_weight, norm_bias, *, eps=1e-5, backend="auto"):
    x = F.conv1d(ecg, weights[0], stride=2)
    x = F.gelu(F.group_norm(x, len(norm_weight), norm_weight, norm_bias, eps))
    for weight in weights[1:]:
        x = F.gelu(F.conv1d(x, weight, stride=2))
    return x.transpose(1, 2)


def positional_conv(x, weight, bias, keep=None, *, groups, backend="auto"):
    out = F.conv1d(x.transpose(1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=groups)[..., : x.shape[1]]
    out = out.transpose(1, 2)
    return out if keep is None else out.gather(1, keep[..., None].expand(-1, -1, out.shape[-1]))


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


def mem_loss(
    prediction, signal, patches, mean=None, rstd=None, *, gain=None, baseline=None, rows_weight=None, patch=16,
    backend="auto",
):  # fmt: skip
    target = signal.to(prediction.dtype)
    if gain is not None:
        invalid = signal == torch.iinfo(signal.dtype).min
        target = ((target - baseline[..., None]) / gain[..., None]).masked_fill(invalid, 0)
    if mean is not None:
        target = (target - mean[..., None]) * rstd[..., None]
    target = target[..., : target.shape[-1] // patch * patch].unflatten(-1, (-1, patch)).transpose(1, 2).flatten(2)
    target = target.gather(1, patches[..., None].expand(-1, -1, target.shape[-1]))
    error = (prediction - target).square().mean((1, 2))
    weight = torch.ones_like(error) if rows_weight is None else rows_weight
    return (error * weight).sum() / weight.sum().clamp(min=1e-9)
