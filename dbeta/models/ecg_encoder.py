"""The ECG encoder: conv stem, positional convolution, post-norm transformer (MODEL sections 2-4)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbeta.config import ModelConfig
from dbeta.models.attention import compute_dtype
from dbeta.models.layers import LayerNorm, PostNormLayer, take_tokens
from dbeta_kernels.conv_stem import conv_stem
from dbeta_kernels.positional_conv import positional_conv


class ConvStem(nn.Module):
    """Convolutions of kernel 2 and stride 2 without bias, erf-GELU after each; the first has a norm per channel."""

    def __init__(self, leads: int, width: int, layers: int):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(leads if i == 0 else width, width, 2, 2, bias=False) for i in range(layers)
        )
        self.norm = nn.GroupNorm(width, width)
        self.backend = "auto"

    def forward(self, ecg: Tensor) -> Tensor:
        """[B, C, L] mV -> [B, T, W], T = L // 2^layers."""
        dtype = compute_dtype(ecg)
        weights = tuple(conv.weight.to(dtype) for conv in self.convs)
        return conv_stem(
            ecg.to(dtype), weights, self.norm.weight, self.norm.bias, eps=self.norm.eps, backend=self.backend
        )


class PositionalConv(nn.Module):
    """Grouped convolution over time with weight normalisation over each kernel position; its erf-GELU is added to x."""

    def __init__(self, width: int, kernel: int, groups: int):
        super().__init__()
        self.groups, self.backend = groups, "auto"
        self.direction = nn.Parameter(torch.empty(width, width // groups, kernel))
        self.gain = nn.Parameter(torch.empty(kernel))
        self.bias = nn.Parameter(torch.empty(width))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """MODEL section 9."""
        width, _, kernel = self.direction.shape
        nn.init.normal_(self.direction, std=math.sqrt(4 / (kernel * width)))
        self.gain.copy_(self.direction.norm(dim=(0, 1)))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D], or [B, K, D] at ``keep`` int64 [B, K]."""
        dtype = compute_dtype(x)
        weight = self.direction * (self.gain / self.direction.norm(dim=(0, 1)))
        out = positional_conv(
            x.to(dtype), weight.to(dtype), self.bias.to(dtype), keep, groups=self.groups, backend=self.backend
        )
        return (x if keep is None else take_tokens(x, keep)) + F.gelu(out)


class EcgEncoder(nn.Module):
    """ECG -> states of [CLS; tokens]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.width
        self.dropout = config.dropout
        self.stem = ConvStem(config.leads, config.stem_width, config.stem_layers)
        self.stem_norm = LayerNorm(config.stem_width)
        same = config.stem_width == width
        self.input_projection = nn.Identity() if same else nn.Linear(config.stem_width, width)
        self.positional = PositionalConv(width, config.pos_kernel, config.pos_groups)
        self.cls = nn.Parameter(torch.empty(width))
        self.norm = LayerNorm(width)
        self.layers = nn.ModuleList(
            PostNormLayer(
                width, config.ecg_heads, config.ecg_ffn, eps=1e-5,
                dropout=config.dropout, attention_dropout=config.attention_dropout,
            )
            for _ in range(config.ecg_layers)
        )  # fmt: skip

    def embed(self, ecg: Tensor, keep: Tensor | None = None, *, gathered: bool = True) -> Tensor:
        """[B, C, L] mV -> tokens [B, T, D], or [B, K, D] at ``keep``.

        ``gathered`` computes the positional convolution at the kept tokens only, else everywhere first.
        """
        x = self.input_projection(self.stem_norm(self.stem(ecg)))
        x = F.dropout(x, self.dropout, self.training)
        if keep is None or gathered:
            return self.positional(x, keep)
        return take_tokens(self.positional(x), keep)

    def forward(self, ecg: Tensor, keep: Tensor | None = None, *, gathered: bool = True) -> Tensor:
        """[B, C, L] mV -> [B, 1 + T, D], CLS first; [B, 1 + K, D] with ``keep``."""
        tokens = self.embed(ecg, keep, gathered=gathered)  # below .shape, not len(): an exported batch stays dynamic
        x = torch.cat((self.cls.to(tokens.dtype).expand(tokens.shape[0], 1, -1), tokens), 1)
        x = F.dropout(self.norm(x), self.dropout, self.training)
        for layer in self.layers:
            x = layer(x)
        return x
