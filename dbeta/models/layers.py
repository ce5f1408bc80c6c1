"""The transformer layers that the ECG encoder, the fusion and the reconstruction decoder are made of."""

import torch.nn.functional as F
from torch import Tensor, nn

from dbeta.models.attention import Rows, attend, compute_dtype, take_rows


class LayerNorm(nn.LayerNorm):
    """Layer normalisation whose result has the dtype of matrix products, of which it is the input.

    Under autocast its arithmetic is float32, and PyTorch's result would be: twice the bytes between layers.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(compute_dtype(x))


class Attention(nn.Module):
    """Multi-head self- or cross-attention with biases; q, k and v in one packed weight, rows in this order.

    ``backend`` is set for the whole network by ``DBeta``.
    """

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout, self.backend = heads, dropout, "sdpa"
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(
        self, x: Tensor, keys: Tensor | None = None, *, rows: Rows | None = None, key_rows: Rows | None = None
    ) -> Tensor:
        """Queries from ``x`` [..., D] in layout ``rows``; keys and values from ``keys``, or from ``x`` itself."""
        width = x.shape[-1]
        if keys is None:
            q, k, v = self._heads(self.qkv(x), 3)
            key_rows = rows
        else:
            (wq, wkv), (bq, bkv) = self.qkv.weight.split((width, 2 * width)), self.qkv.bias.split((width, 2 * width))
            (q,) = self._heads(F.linear(x, wq, bq), 1)
            k, v = self._heads(F.linear(keys, wkv, bkv), 2)
        dropout = self.dropout if self.training else 0.0
        out = attend(q, k, v, rows=rows, key_rows=key_rows, dropout=dropout, backend=self.backend)
        return self.output(out.flatten(-2))

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return x.unflatten(-1, (parts, self.heads, -1)).unbind(-3)


class PostNormLayer(nn.Module):
    """x <- LN(x + drop(self-attention)); with ``cross``: x <- LN(x + drop(cross-attention)); x <- LN(x + drop(FFN)).

    The layer of the ECG encoder (eps 1e-5, MODEL section 4) and of the fusion (eps 1e-12, section 6); erf-GELU.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        ffn: int,
        *,
        eps: float,
        dropout: float,
        attention_dropout: float,
        cross: bool = False,
    ):
        super().__init__()
        self.dropout = dropout
        self.attention = Attention(width, heads, attention_dropout)
        self.attention_norm = LayerNorm(width, eps)
        self.cross_attention = Attention(width, heads, attention_dropout) if cross else None
        self.cross_norm = LayerNorm(width, eps) if cross else None
        self.ffn_in = nn.Linear(width, ffn)
        self.ffn_out = nn.Linear(ffn, width)
        self.ffn_norm = LayerNorm(width, eps)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        rows: Rows | None = None,
        context_rows: Rows | None = None,
        source: Tensor | None = None,
        source_rows: Rows | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            x: the rows to compute, [..., D] in layout ``rows``.
            context: what cross-attention reads, in layout ``context_rows``.
            source: what self-attention reads where ``x`` is only a part of it; None: ``x``.
        """
        x = self.attention_norm(x + self._drop(self.attention(x, source, rows=rows, key_rows=source_rows)))
        if self.cross_attention is not None:
            x = self.cross_norm(x + self._drop(self.cross_attention(x, context, rows=rows, key_rows=context_rows)))
        return self.ffn_norm(x + self._drop(self.ffn_out(F.gelu(self.ffn_in(x)))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class PreNormBlock(nn.Module):
    """z <- z + Attn(LN z); z <- z + W2 QuickGELU(W1 LN z), eps 1e-5, no dropout (MODEL section 7)."""

    def __init__(self, width: int, heads: int, ffn: int):
        super().__init__()
        self.attention_norm = LayerNorm(width)
        self.attention = Attention(width, heads, 0.0)
        self.ffn_norm = LayerNorm(width)
        self.ffn_in = nn.Linear(width, ffn)
        self.ffn_out = nn.Linear(ffn, width)

    def forward(self, z: Tensor, picked: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; with ``picked`` int64 [B, P] only those tokens, [B, P, D]."""
        normed = self.attention_norm(z)
        if picked is None:
            z = z + self.attention(normed)
        else:
            z = take_tokens(z, picked) + self.attention(take_tokens(normed, picked), normed)
        hidden = self.ffn_in(self.ffn_norm(z))
        return z + self.ffn_out(hidden * (1.702 * hidden).sigmoid())


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, p]] with no index twice: [B, T, D], int64 [B, P] -> [B, P, D]."""
    batch, tokens, _ = x.shape
    cells = index + tokens * index.new_ones(batch).cumsum(0).sub(1)[:, None]
    return take_rows(x.flatten(0, 1), cells.flatten()).unflatten(0, index.shape)
