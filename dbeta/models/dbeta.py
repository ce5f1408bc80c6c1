"""D-BETA: ECG encoder, report encoder, fusion and heads (MODEL sections 1-7)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dbeta.config import ModelConfig, RuntimeConfig
from dbeta.models.attention import Rows, resolve_backend
from dbeta.models.ecg_encoder import ConvStem, EcgEncoder, PositionalConv
from dbeta.models.fusion import Fusion
from dbeta.models.heads import POSITIONS, MemHead, MlmHead, Pooler
from dbeta.models.inference import Inference
from dbeta.models.layers import Attention
from dbeta.models.text_encoder import SelfAttention, T5Encoder, make_text_encoder


@dataclass(kw_only=True, slots=True)
class Outputs:
    """What one forward pass gives. B records, M slots of masked words, P masked patches, T text tokens, D width."""

    ecg_features: Tensor  # [B, D], tanh-pooled CLS before the fusion
    text_features: Tensor  # [B, D], tanh-pooled first word piece before the fusion
    etm_logits: Tensor  # [B, 1 | 2]
    mlm_hidden: Tensor | None = None  # [M, D], input of the vocabulary projection; [B*T, D] in the dense computation
    mem_prediction: Tensor | None = None  # [B, P, leads * patch], at
    mem_patches: Tensor | None = None  # int64 [B, P], the masked patches, ascending
    fused: Tensor | None = None  # [B, 2D], pooled text and ECG, the input of the matching head
    text_states: Tensor | None = None  # [B, T, D], final states; this and what follows only in the dense computation
    ecg_states: Tensor | None = None  # [B, 1 + K, D]
    tap_text: Tensor | None = None  # the same two at the tap of the reconstruction head
    tap_ecg: Tensor | None = None


class DBeta(Inference, nn.Module):
    """The network.

    Args:
        config: sizes and switches of the network.
        runtime: engines; None: the defaults. ``runtime.removals`` leaves out what no output reads (KERNELS section 1).
        tokenizer: what ``encode_text`` uses; saved with the model.
        report_cleaning: how ``encode_text`` normalises, as the reports of the training corpus were.
        about: where the model comes from, for its card; see ``dbeta.models.card``.

    Raises:
        ValueError: sizes that do not fit each other, or an attention back-end that this machine does not have.
    """

    def __init__(
        self,
        config: ModelConfig,
        runtime: RuntimeConfig | None = None,
        *,
        tokenizer: Any = None,
        report_cleaning: str = "paper",
        about: dict[str, Any] | None = None,
    ):
        super().__init__()
        check_config(config)
        self.config, self.runtime = config, runtime or RuntimeConfig()
        self.tokenizer, self.report_cleaning, self.about = tokenizer, report_cleaning, dict(about or {})
        width = config.width
        self.ecg_encoder = EcgEncoder(config)
        self.text_encoder = make_text_encoder(config)
        self.ecg_projection = nn.Linear(width, width)
        self.text_projection = nn.Linear(config.text_width, width)
        self.ecg_pooler = Pooler(width)
        self.text_pooler = Pooler(width)
        self.fusion = Fusion(config)
        self.fused_ecg_pooler = Pooler(width)
        self.fused_text_pooler = Pooler(width)
        self.mlm_head = MlmHead(width, config.text_vocab)
        self.mem_head = MemHead(config)
        self.etm_head = nn.Linear(2 * width, config.etm_logits)
        self._choose_engines()
        self.reset_parameters()

    def _choose_engines(self) -> None:
        attention = resolve_backend(self.runtime.attention, self.runtime.device)
        for module in self.modules():
            if isinstance(module, Attention | SelfAttention):
                module.backend = attention
            elif isinstance(module, ConvStem | PositionalConv):
                module.backend = self.runtime.kernels

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """MODEL section 9: normal with deviation 0.02 and zero biases, except where it says otherwise.

        0.02 belongs to width 768; a narrower network takes 0.02 sqrt(768 / width), so that signals keep their size.
        """
        std = 0.02 * (768 / self.config.width) ** 0.5
        text = set(self.text_encoder.modules())
        for module in self.modules():
            if module not in text and isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for conv in self.ecg_encoder.stem.convs:
            nn.init.kaiming_normal_(conv.weight)
        if isinstance(self.ecg_encoder.input_projection, nn.Linear):
            self.ecg_encoder.input_projection.reset_parameters()
        self.ecg_encoder.positional.reset_parameters()
        nn.init.uniform_(self.ecg_encoder.cls)
        nn.init.normal_(self.mem_head.mask_token, std=std)
        for block in self.mem_head.blocks:
            nn.init.xavier_uniform_(block.attention.qkv.weight)
        if isinstance(self.text_encoder, T5Encoder):
            self.text_encoder.reset_parameters()

    # --- the forward pass of pre-training ----------------------------------------------------------------------------

    def forward(
        self,
        ecg: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        *,
        noise: Tensor | None = None,
        mlm_positions: Tensor | None = None,
        text_tokens: int | None = None,
        reconstruct: bool = True,
    ) -> Outputs:
        """Both encoders, the fusion and the heads.

        With ``runtime.removals`` nothing is computed that no output reads, and what is read is the same. Dropout masks
        are drawn for what is computed: with dropout 0 a run with and one without agree to rounding, with dropout they
        are two draws of the same distribution.

        Args:
            ecg: float [B, C, L] mV, leads possibly masked.
            text_ids: int64 [B, T].
            text_mask: bool [B, T], True at tokens; every text has one.
            noise: float [B, tokens]; the quarter with the smallest values stays visible. None: nothing is masked and
                nothing reconstructed.
            mlm_positions: int64 [M], cells b*T+t whose MLM hidden states are wanted; None: no MLM under removals.
            text_tokens: a host number, at least that of tokens in ``text_mask``: under removals text is packed into
                that many rows. None: the grid is kept.
            reconstruct: predict the masked patches.
        """
        removals = self.runtime.removals
        keep = restore = masked = None
        if noise is not None:
            visible = int(self.config.ecg_tokens * (1 - self.config.mask_ratio))
            shuffled = noise.argsort(dim=1, stable=True)
            keep, masked = shuffled[:, :visible], shuffled[:, visible:].sort(1).values
            restore = shuffled.argsort(1)

        ecg_states = self.ecg_projection(self.ecg_encoder(ecg, keep, gathered=removals))
        rows = Rows(text_mask)
        if removals and text_tokens is not None and text_tokens < text_mask.numel():
            rows = Rows.packed(text_mask, text_tokens)
        text_states = self.text_projection(self._text_states(text_ids, rows))
        first = torch.arange(len(text_ids), device=text_ids.device) * text_ids.shape[1]
        ecg_features = self.ecg_pooler(ecg_states[:, 0])
        text_features = self.text_pooler(rows.take(text_states, first))

        cells = None
        if removals:  # token 0 of every row, then the masked words
            cells = first if mlm_positions is None else torch.cat((first, mlm_positions))
        cls_only = removals and (noise is None or self.config.mem_tap != -1)
        fused = self.fusion(text_states, ecg_states, rows, cells=cells, cls_only=cls_only)

        text_rows = fused.text if removals else fused.text.flatten(0, 1)
        first_text = text_rows[: len(first)] if removals else fused.text[:, 0]
        pooled = torch.cat((self.fused_text_pooler(first_text), self.fused_ecg_pooler(fused.ecg[:, 0])), -1)
        outputs = Outputs(
            ecg_features=ecg_features, text_features=text_features, etm_logits=self.etm_head(pooled), fused=pooled
        )
        if not removals:
            outputs.mlm_hidden = self.mlm_head(text_rows)
            outputs.text_states, outputs.ecg_states = fused.text, fused.ecg
            outputs.tap_text, outputs.tap_ecg = fused.tap_text, fused.tap_ecg
        elif mlm_positions is not None:
            outputs.mlm_hidden = self.mlm_head(text_rows[len(first) :])
        if noise is not None:
            outputs.mem_patches = masked
        if noise is not None and reconstruct:
            outputs.mem_prediction = self.mem_head(fused.tap_ecg, restore, masked, pruned=removals)
        return outputs

    def _text_states(self, ids: Tensor, rows: Rows) -> Tensor:
        """Text encoder states in the layout ``rows``; without ``text_mask`` padding is attended, so none is spared."""
        if self.config.text_mask and self.text_encoder.packs:
            return self.text_encoder(ids, rows)
        mask = rows.mask if self.config.text_mask else torch.ones_like(rows.mask)
        return rows.pack(self.text_encoder(ids, Rows(mask)))

    # --- features; what users call is in inference.py ----------------------------------------------------------------

    def ecg_features(self, ecg: Tensor) -> Tensor:
        """Tanh-pooled CLS of the unmasked ECG, float [B, C, L] mV -> [B, D], in the current mode."""
        return self.ecg_pooler(self.ecg_projection(self.ecg_encoder(ecg)[:, 0]))

    def text_features(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Tanh-pooled first word piece, int64 and bool [B, T] -> [B, D], in the current mode."""
        states = self._text_states(text_ids, Rows(text_mask))
        return self.text_pooler(self.text_projection(states[:, 0]))


def check_config(config: ModelConfig) -> None:
    """Raise a ValueError for sizes that cannot work together."""
    pairs = (("width", "ecg_heads"), ("width", "fusion_heads"), ("mem_width", "mem_heads"), ("width", "pos_groups"))
    for size, parts in pairs:
        if getattr(config, parts) < 1 or getattr(config, size) % getattr(config, parts):
            raise ValueError(
                f"model.{size} = {getattr(config, size)} is not a multiple of model.{parts} = {getattr(config, parts)}"
            )
    if config.mem_width % 2:
        raise ValueError(f"model.mem_width = {config.mem_width}; accepted: even numbers, half sines and half cosines")
    if config.ecg_tokens >= POSITIONS:
        raise ValueError(
            f"model.samples = {config.samples} are {config.ecg_tokens} tokens after model.stem_layers = "
            f"{config.stem_layers}; accepted: at most {POSITIONS - 1} tokens, use more layers"
        )
    if not -1 <= config.mem_tap < config.fusion_layers:
        raise ValueError(
            f"model.mem_tap = {config.mem_tap}; accepted: 0 to {config.fusion_layers - 1} (the input of that fusion "
            "layer), or -1 for the final output"
        )
    if not 0 < config.mask_ratio < 1:
        raise ValueError(f"model.mask_ratio = {config.mask_ratio}; accepted: between 0 and 1")
