"""The fusion: two stacks of layers, each reading the other's previous states (MODEL section 6)."""

from dataclasses import dataclass

from torch import Tensor, nn

from dbeta.config import ModelConfig
from dbeta.models.attention import Rows
from dbeta.models.layers import PostNormLayer


@dataclass(kw_only=True, slots=True)
class Fused:
    """States after the fusion."""

    text: Tensor  # in the layout of the text, or [S, D] at the selected cells
    ecg: Tensor  # [B, 1 + T, D], or [B, 1, D] (CLS) where no more was asked for
    tap_text: Tensor  # both at the tap of the reconstruction head
    tap_ecg: Tensor


class Fusion(nn.Module):
    """Simultaneous update of both sides: text' = Ltext(text | ecg), ecg' = Lecg(ecg | text)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.tap = config.mem_tap
        self.modality = nn.Embedding(2, config.width)  # row 0 text, row 1 ECG
        for side in ("text_layers", "ecg_layers"):
            layers = (
                PostNormLayer(
                    config.width, config.fusion_heads, config.fusion_ffn, eps=1e-12, cross=True,
                    dropout=config.dropout, attention_dropout=config.attention_dropout,
                )
                for _ in range(config.fusion_layers)
            )  # fmt: skip
            setattr(self, side, nn.ModuleList(layers))

    def forward(
        self, text: Tensor, ecg: Tensor, rows: Rows, *, cells: Tensor | None = None, cls_only: bool = False
    ) -> Fused:
        """All layers; the last one only where its output is read.

        Args:
            text: [B, T, D] or packed, as ``rows`` says.
            ecg: [B, 1 + T, D].
            cells: int64 [S], the cells of the text grid whose final states are wanted; None: all.
            cls_only: of the ECG only the final state of CLS is wanted.
        """
        as_text, as_ecg = self.modality.weight.to(text.dtype)
        text, ecg = text + as_text, ecg + as_ecg
        tap = (text, ecg)
        last = len(self.text_layers) - 1
        for i, (text_layer, ecg_layer) in enumerate(zip(self.text_layers, self.ecg_layers)):
            if i == self.tap:
                tap = (text, ecg)
            if i < last or cells is None:
                new_text = text_layer(text, ecg, rows=rows)
            else:
                picked = rows.take(text, cells)
                new_text = text_layer(picked, ecg, rows=rows.select(cells), source=text, source_rows=rows)
            if i < last or not cls_only:
                ecg = ecg_layer(ecg, text, context_rows=rows)
            else:
                ecg = ecg_layer(ecg[:, :1], text, context_rows=rows, source=ecg)
            text = new_text
        if self.tap == -1:
            tap = (text, ecg)
        return Fused(text=text, ecg=ecg, tap_text=tap[0], tap_ecg=tap[1])
