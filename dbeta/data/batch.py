"""A training batch, made on the device from record ids: negatives, tokens, MLM masking, random lead masking.

Every draw is a function of (seed, step, global row) (``dbeta_kernels.philox``), so a resumed run repeats it, it does
not depend on the number of ranks, and the host can make the same draw without waiting for the device:
``BatchMaker.shape`` tells the padded text length and the number of MLM slots before the device has seen the batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dbeta.config import DataConfig, LossConfig
from dbeta.data.loader import RawBatch
from dbeta.data.reports import TokenTable
from dbeta_kernels import philox
from dbeta_kernels.lead_mask import lead_mask

TEXT_BUCKETS = (32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 256)  # multiples of 8, as attention kernels want them


@dataclass(kw_only=True, slots=True)
class Batch:
    """What one step reads. B rows of this rank, T text tokens, M slots for masked tokens."""

    records: Tensor  # int64 [B]
    ecg: Tensor  # float [B,12,L] mV, after random lead masking
    signal: Tensor  # int16 or float [B,12,L], the MEM target before normalisation
    gain: Tensor | None  # float32 [B,12], present with an integer signal
    baseline: Tensor | None
    mean: Tensor | None  # float32 [B,12], MEM normalisation; None without it
    rstd: Tensor | None
    reports: Tensor  # int64 [B], the record's own report
    text_reports: Tensor  # int64 [B], the report shown
    aligned: Tensor  # bool [B], whether the two agree
    text_ids: Tensor  # int64 [B,T], MLM-corrupted
    text_mask: Tensor  # bool [B,T]
    mlm_positions: Tensor  # int64 [M], flat b*T+t, ascending; 0 in unused slots
    mlm_labels: Tensor  # int64 [M], -100 in unused slots
    noise: Tensor  # float32 [B,312], orders the ECG tokens: the first quarter is visible
    text_tokens: int | None = None  # rows that packed text takes: at least the number of tokens; None: not packed


@dataclass(frozen=True, kw_only=True, slots=True)
class TextShape:
    """The static sizes of a batch's text, known on the host before the device has seen the batch."""

    length: int  # T, of the padded grid
    slots: int  # M, for masked tokens
    tokens: int | None = None  # rows of the packed text


@dataclass(frozen=True, kw_only=True, slots=True)
class TextVocabulary:
    """The ids MLM needs from a tokenizer."""

    size: int
    mask: int
    special: tuple[int, ...]


class BatchMaker:
    """Device-resident tables and the draws made from them.

    Args:
        report_of: int64 [records], each record's report.
        tokens: token table of the reports.
        negatives: int64 [reports, k], each report's far reports (N3S, paper 3.4); None draws any other report.
        seed: of every draw.
        batch: global batch size, over all ranks.
    """

    def __init__(
        self,
        report_of: Tensor,
        tokens: TokenTable,
        negatives: Tensor | None,
        vocabulary: TextVocabulary,
        data: DataConfig,
        loss: LossConfig,
        *,
        seed: int,
        batch: int,
        ecg_tokens: int,
        kernels: str = "auto",
    ):
        self.report_of, self.tokens, self.negatives = report_of, tokens, negatives
        self.vocabulary, self.data, self.loss = vocabulary, data, loss
        self.seed, self.batch, self.ecg_tokens, self.kernels = seed, batch, ecg_tokens, kernels
        self.special = torch.tensor(vocabulary.special, device=report_of.device)

    def to(self, device: torch.device) -> "BatchMaker":
        """A copy whose tables lie on ``device``; it makes the same draws."""
        negatives = None if self.negatives is None else self.negatives.to(device)
        return BatchMaker(
            self.report_of.to(device), self.tokens.to(device), negatives, self.vocabulary, self.data, self.loss,
            seed=self.seed, batch=self.batch, ecg_tokens=self.ecg_tokens, kernels=self.kernels,
        )  # fmt: skip

    def texts(self, records: Tensor, step: int | Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The report shown to each row, and whether it is its own: (int64 [B], bool [B]).

        Exactly ``negative_fraction`` of the *global* batch is shown a far report, drawn uniformly from its table row.
        """
        reports = self.report_of[records]
        order = philox.uniform(self.seed, philox.NEGATIVE_ROWS, step, rows.new_zeros(()), self.batch).argsort(
            stable=True
        )
        place = torch.empty_like(order).scatter_(0, order, torch.arange(self.batch, device=order.device))
        negative = place[rows] < round(self.batch * self.data.negative_fraction)
        word = philox.words(self.seed, philox.NEGATIVE_PICK, step, rows, 1)[:, 0]
        if self.negatives is None:
            count = len(self.tokens) - 1
            other = (reports + 1 + word % max(count, 1)) % len(self.tokens)
        else:
            other = self.negatives[reports, word % self.negatives.shape[1]].long()
        return torch.where(negative, other, reports), ~negative | (other == reports)

    def selected(self, text_ids: Tensor, text_mask: Tensor, step: int | Tensor, rows: Tensor) -> Tensor:
        """Which tokens MLM hides: bool [B,T], each non-special real token with ``mlm_probability`` (paper 4.1)."""
        drawn = philox.uniform(self.seed, philox.MLM_SELECT, step, rows, text_ids.shape[1])
        special = (text_ids[..., None] == self.special).any(-1)  # isin sorts for T5's 103 ids, and a GPU is waited for
        return (drawn < self.loss.mlm_probability) & text_mask & ~special

    def shape(self, records: Tensor, step: int, rows: Tensor, *, bucketed: bool) -> TextShape:
        """The shape of a batch's text, on the host: longest text, hidden tokens, all tokens.

        ``bucketed`` rounds up, so that few shapes occur (each may be a graph of its own, see ``compilation``): the
        slots follow from the tokens, with six standard deviations to spare, unless a draw needs still more.
        """
        shown, _ = self.texts(records, step, rows)
        lengths = self.tokens.lengths[shown]
        longest, tokens = int(lengths.max()), int(lengths.sum())
        ids, mask = self.tokens.gather(shown, longest)
        slots = max(int(self.selected(ids, mask, step, rows).sum()), 1)
        if not bucketed:
            return TextShape(length=longest, slots=slots, tokens=tokens)
        length = next((t for t in TEXT_BUCKETS if t >= longest), longest)
        tokens = _round_up(tokens, 8 * len(records))
        chance = self.loss.mlm_probability
        usual = tokens * chance + 6 * (tokens * chance * (1 - chance)) ** 0.5
        return TextShape(length=length, slots=_round_up(max(slots, usual), len(records)), tokens=tokens)

    def make(self, raw: RawBatch, step: int | Tensor, rows: Tensor, shape: TextShape) -> Batch:
        """The batch of ``raw`` (already on this maker's device) at ``step`` for the given global rows."""
        shown, aligned = self.texts(raw.records, step, rows)
        ids, mask = self.tokens.gather(shown, shape.length)
        hidden = self.selected(ids, mask, step, rows)
        # Selected tokens first, in order: a stable sort gathers them into a fixed number of slots without a host read.
        positions = (~hidden).flatten().int().argsort(stable=True)[: shape.slots]
        used = hidden.flatten()[positions]
        labels = torch.where(used, ids.flatten()[positions], -100)
        signal = raw.adc if raw.signal is None else raw.signal
        ecg, mean, rstd = lead_mask(
            signal, raw.gain, raw.baseline, seed=self.seed, step=step, rows=rows,
            keep_probability=self.data.lead_keep_probability, backend=self.kernels,
        )  # fmt: skip
        gain, baseline = raw.gain, raw.baseline
        if self.loss.mem_target == "input":  # a dropped lead is zero, and so is its target
            signal, gain, baseline, mean = ecg, None, None, mean * (ecg != 0).any(-1)
        if not self.loss.mem_normalise:
            mean = rstd = None
        return Batch(
            records=raw.records, ecg=ecg, signal=signal, gain=gain, baseline=baseline, mean=mean, rstd=rstd,
            reports=self.report_of[raw.records], text_reports=shown, aligned=aligned,
            text_ids=self._corrupt(ids, hidden, step, rows), text_mask=mask,
            mlm_positions=torch.where(used, positions, 0), mlm_labels=labels,
            noise=philox.uniform(self.seed, philox.ECG_MASK, step, rows, self.ecg_tokens),
            text_tokens=shape.tokens,
        )  # fmt: skip

    def _corrupt(self, ids: Tensor, hidden: Tensor, step: int | Tensor, rows: Tensor) -> Tensor:
        """80 % of the hidden tokens become the mask token, 10 % a random one, 10 % stay (paper 4.1)."""
        words = philox.words(self.seed, philox.MLM_REPLACE, step, rows, 2 * ids.shape[1]).unflatten(-1, (-1, 2))
        chance = words[..., 0] * 2.0**-32
        replaced = torch.where(chance < self.loss.mlm_mask, self.vocabulary.mask, words[..., 1] % self.vocabulary.size)
        return torch.where(hidden & (chance < self.loss.mlm_mask + self.loss.mlm_random), replaced, ids)


def _round_up(count: float, unit: int) -> int:
    return math.ceil(count / unit) * unit
