"""The report encoder: the encoder stack of T5, or any encoder of transformers (paper Table 7).

Ours computes what Hugging Face's T5 does, with its parameter names, so that its weights load as they are; it differs in
taking packed text (no work on padding) and in computing its norm in the dtype that it is given (float64 stays float64).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbeta.config import ModelConfig
from dbeta.models.attention import Rows, attend, compute_dtype

ACTIVATIONS = {
    "relu": F.relu,
    "silu": F.silu,
    # Hugging Face's reading of "gated-gelu" is the tanh approximation, of a plain "gelu" the exact one
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
}


class RmsNorm(nn.Module):
    """x (mean(x^2) + eps)^-1/2 w: no mean subtracted, no bias."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (scaled.to(x.dtype) * self.weight).to(compute_dtype(x))


class SelfAttention(nn.Module):
    """Scores are not scaled; the learned relative bias of block 0 is shared by all blocks."""

    def __init__(self, config: ModelConfig, relative: bool):
        super().__init__()
        inner = config.text_heads * config.text_head_width
        self.heads, self.dropout, self.backend = config.text_heads, config.attention_dropout, "sdpa"
        self.buckets, self.distance = config.text_buckets, config.text_max_distance
        self.q = nn.Linear(config.text_width, inner, bias=False)
        self.k = nn.Linear(config.text_width, inner, bias=False)
        self.v = nn.Linear(config.text_width, inner, bias=False)
        self.o = nn.Linear(inner, config.text_width, bias=False)
        if relative:
            self.relative_attention_bias = nn.Embedding(self.buckets, self.heads)

    def relative_bias(self, tokens: int) -> Tensor:
        """[1, H, T, T], from the bucket of key index - query index (MODEL section 5)."""
        place = torch.arange(tokens, device=self.q.weight.device)
        return self.relative_attention_bias(self._bucket(place - place[:, None])).permute(2, 0, 1)[None]

    def _bucket(self, offset: Tensor) -> Tensor:
        half = self.buckets // 2
        exact = half // 2
        far = offset.abs().clamp(min=1).float() / exact
        far = exact + (far.log() / math.log(self.distance / exact) * (half - exact)).long()
        return (offset > 0) * half + torch.where(offset.abs() < exact, offset.abs(), far.clamp(max=half - 1))

    def forward(self, x: Tensor, bias: Tensor, rows: Rows) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)) for linear in (self.q, self.k, self.v))
        dropout = self.dropout if self.training else 0.0
        out = attend(q, k, v, rows=rows, key_rows=rows, bias=bias, scale=1.0, dropout=dropout, backend=self.backend)
        return self.o(out.flatten(-2))


class FeedForward(nn.Module):
    """Gated: wo(act(wi_0 z) * wi_1 z); plain: wo(act(wi z))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        kind = config.text_activation
        self.gated, self.dropout = kind.startswith("gated-"), config.dropout
        name = kind.removeprefix("gated-")
        self.activation = F.gelu if kind == "gelu" else ACTIVATIONS[name]
        for part in ("wi_0", "wi_1") if self.gated else ("wi",):
            setattr(self, part, nn.Linear(config.text_width, config.text_ffn, bias=False))
        self.wo = nn.Linear(config.text_ffn, config.text_width, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        hidden = self.activation(self.wi_0(z)) * self.wi_1(z) if self.gated else self.activation(self.wi(z))
        return self.wo(F.dropout(hidden, self.dropout, self.training))


class Block(nn.Module):
    """x <- x + Attn(RMS x); x <- x + FFN(RMS x), under Hugging Face's names ``layer.0`` and ``layer.1``."""

    def __init__(self, config: ModelConfig, relative: bool):
        super().__init__()
        self.dropout = config.dropout
        attention = nn.ModuleDict(
            {"SelfAttention": SelfAttention(config, relative), "layer_norm": RmsNorm(config.text_width)}
        )
        ffn = nn.ModuleDict({"DenseReluDense": FeedForward(config), "layer_norm": RmsNorm(config.text_width)})
        self.layer = nn.ModuleList((attention, ffn))

    def forward(self, x: Tensor, bias: Tensor, rows: Rows) -> Tensor:
        attention, ffn = self.layer
        mixed = attention["SelfAttention"](attention["layer_norm"](x), bias, rows)
        x = x + F.dropout(mixed, self.dropout, self.training)
        return x + F.dropout(ffn["DenseReluDense"](ffn["layer_norm"](x)), self.dropout, self.training)


class T5Encoder(nn.Module):
    """Token ids -> states, in the layout of the text."""

    packs = True  # computes packed text

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.dropout = config, config.dropout
        self.embed_tokens = nn.Embedding(config.text_vocab, config.text_width)
        self.block = nn.ModuleList(Block(config, relative=i == 0) for i in range(config.text_layers))
        self.final_layer_norm = RmsNorm(config.text_width)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The random initialisation of Hugging Face's T5, for training without pre-trained weights."""
        config = self.config
        inner = config.text_heads * config.text_head_width
        std = {"q": (config.text_width * config.text_head_width) ** -0.5, "o": inner**-0.5, "wo": config.text_ffn**-0.5}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std.get(name.rpartition(".")[2], config.text_width**-0.5))
        nn.init.normal_(self.embed_tokens.weight)
        nn.init.normal_(
            self.block[0].layer[0]["SelfAttention"].relative_attention_bias.weight, std=config.text_width**-0.5
        )

    def forward(self, ids: Tensor, rows: Rows) -> Tensor:
        """int64 [B, T] -> [B, T, D], or packed [N, D] as ``rows`` says; keys outside ``rows.mask`` are not attended."""
        x = self.embed_tokens(rows.pack(ids))
        x = F.dropout(x, self.dropout, self.training)
        bias = self.block[0].layer[0]["SelfAttention"].relative_bias(ids.shape[1])
        bias = bias.masked_fill(~rows.mask[:, None, None, :], -math.inf).to(compute_dtype(x))
        for block in self.block:
            x = block(x, bias, rows)
        return F.dropout(self.final_layer_norm(x), self.dropout, self.training)


class TransformersEncoder(nn.Module):
    """Any encoder of transformers (bert, deberta, medcpt, ...), for the ablation of paper Table 7."""

    packs = False

    def __init__(self, config: ModelConfig):
        super().__init__()
        from transformers import AutoConfig, AutoModel

        try:
            described = AutoConfig.from_pretrained(config.text_encoder)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model.text_encoder = {config.text_encoder!r} is neither flan-t5 nor an encoder that transformers can "
                f"find: {str(error).splitlines()[0]}"
            ) from None
        if described.hidden_size != config.text_width:
            raise ValueError(
                f"model.text_encoder = {config.text_encoder!r} has width {described.hidden_size}: "
                f"use --set model.text_width={described.hidden_size}"
            )
        self.model = AutoModel.from_config(described)

    def forward(self, ids: Tensor, rows: Rows) -> Tensor:
        """int64 [B, T] -> [B, T, D]."""
        return self.model(input_ids=ids, attention_mask=rows.mask.long()).last_hidden_state


def make_text_encoder(config: ModelConfig) -> nn.Module:
    """The encoder that ``model.text_encoder`` names, with random weights."""
    return T5Encoder(config) if config.text_encoder == "flan-t5" else TransformersEncoder(config)
