"""The heads of the four objectives (MODEL sections 6 and 7)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbeta.config import ModelConfig
from dbeta.models.layers import LayerNorm, PreNormBlock, take_tokens

POSITIONS = 512  # the released table's length


class Pooler(nn.Module):
    """tanh(linear(first token))."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, first: Tensor) -> Tensor:
        return self.dense(first).tanh()


class MlmHead(nn.Module):
    """Masked language modelling: a dense layer, then the projection onto the vocabulary (not tied to the embedding)."""

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = LayerNorm(width, eps=1e-12)
        self.vocabulary = nn.Linear(width, vocabulary)

    def forward(self, states: Tensor) -> Tensor:
        """[..., D] -> [..., D], the input of ``self.vocabulary``."""
        return self.norm(F.gelu(self.dense(states)))


class MemHead(nn.Module):
    """Masked ECG modelling: a small pre-norm decoder over all tokens in time order; predicts the samples of a patch."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.mem_width
        self.embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.register_buffer("positions", sinusoids(POSITIONS, width))
        self.blocks = nn.ModuleList(
            PreNormBlock(width, config.mem_heads, config.mem_ffn) for _ in range(config.mem_layers)
        )
        self.norm = LayerNorm(width)
        self.output = nn.Linear(width, config.leads * config.patch)

    def forward(self, states: Tensor, restore: Tensor, patches: Tensor, *, pruned: bool = True) -> Tensor:
        """Predicted patches.

        Args:
            states: [B, 1 + K, D] of CLS and the visible tokens in shuffled order.
            restore: int64 [B, T], for each token its place in the shuffled order (the hidden ones follow the visible).
            patches: int64 [B, P], the tokens to predict.
            pruned: the last block and the output layer compute only these; else all, of which these are taken.

        Returns:
            [B, P, C * S], the value of a lead and sample at lead * S + sample.
        """
        x = self.embed(states)
        batch, visible, _ = x.shape
        hidden = self.mask_token.to(x.dtype).expand(batch, restore.shape[1] - visible + 1, -1)
        tokens = take_tokens(torch.cat((x[:, 1:], hidden), 1), restore)
        x = torch.cat((x[:, :1], tokens), 1)
        x = x + self.positions[: x.shape[1]].to(x.dtype)
        for block in self.blocks[:-1]:
            x = block(x)
        if pruned:
            return self.output(self.norm(self.blocks[-1](x, patches + 1)))
        return take_tokens(self.output(self.norm(self.blocks[-1](x)))[:, 1:], patches)


def sinusoids(length: int, width: int) -> Tensor:
    """Float32 [length, width]: sin in even columns, cos in odd ones, frequencies 10000^(-2j/width)."""
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = torch.arange(length)[:, None] * frequency
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)
