"""Validation during training: losses, ETM accuracy, retrieval, and zero-shot AUC where the corpus has labels."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dbeta import compilation
from dbeta.config import Config
from dbeta.data.batch import Batch, BatchMaker
from dbeta.data.corpus import Corpus
from dbeta.data.loader import RawBatch, make_loader
from dbeta.evaluation.metrics import retrieval
from dbeta.evaluation.zero_shot import auc_table
from dbeta.losses import pretraining_losses
from dbeta.models.dbeta import DBeta
from dbeta.runtime import announce, autocast
from dbeta_kernels.lead_mask import lead_mask

LOSSES = ("total", "mlm", "mem", "etm", "ets")
COUNTERS = ("etm_correct", "mlm_correct", "mlm_count")


def prompts_for(corpus: Corpus) -> dict[str, tuple[str, ...]]:
    """Zero-shot prompts by label, for corpora whose labels are classes as they stand; held-out paraphrases."""
    if corpus.source == "synthetic":
        from dbeta.data.synthetic import PROMPTS

        return PROMPTS
    return {}


class Validator:
    """Measures the model on the first ``train.eval_records`` validation records, always with the same draws.

    Losses are those of training, lead masking and negatives included; features see all leads and no mask.
    """

    def __init__(
        self,
        model: DBeta,
        corpus: Corpus,
        host_maker: BatchMaker,
        maker: BatchMaker,
        config: Config,
        device: torch.device,
    ):
        self.model, self.corpus, self.config, self.device = model, corpus, config, device
        ids = corpus.split_ids("validation")[: config.train.eval_records]
        if len(ids) == 0:
            announce("the corpus has no validation records: the training split is used for validation")
            ids = corpus.split_ids("train")[: config.train.eval_records]
        self.ids = ids
        self.host_maker, self.maker = host_maker, maker
        prompts = prompts_for(corpus)
        held = [set(labels) for labels in corpus.column("labels", ids)]
        self.names = [name for name in prompts if any(name in labels for labels in held)]
        self.prompts = [prompts[name] for name in self.names]
        self.targets = np.array([[name in labels for name in self.names] for labels in held], bool)
        self.per_class: dict[str, float] = {}

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """All validation metrics by name; ``score`` (higher is better) chooses the best checkpoint."""
        self.model.eval()
        totals, counts = dict.fromkeys(LOSSES, 0.0), dict.fromkeys(COUNTERS, 0.0)
        ecg, text, reports = [], [], []
        runtime = self.config.runtime
        with compilation.uncompiled(runtime), autocast(runtime, self.device):
            for index, raw in enumerate(self._raw()):
                batch = self._batch(raw, index)
                losses = pretraining_losses(self.model, batch, self.config.loss)
                for name in LOSSES:
                    totals[name] += getattr(losses, name).item() * len(raw.records)
                for name in COUNTERS:
                    counts[name] += getattr(losses, name).item()
                ecg.append(self.model.ecg_features(self.whole_ecg(raw)).float())
                ids, mask = self.maker.tokens.gather(batch.reports, int(self.maker.tokens.lengths[batch.reports].max()))
                text.append(self.model.text_features(ids, mask).float())
                reports.append(batch.reports)
        metrics = {name: value / len(self.ids) for name, value in totals.items()}
        metrics["etm_accuracy"] = counts["etm_correct"] / len(self.ids)
        metrics["mlm_accuracy"] = counts["mlm_correct"] / max(counts["mlm_count"], 1.0)
        features = torch.cat(ecg).cpu()
        metrics |= retrieval(features, torch.cat(text).cpu(), torch.cat(reports).cpu())
        metrics["score"] = -metrics["total"]
        if self.names:
            # A class is the mean of its paraphrases (prompt ensembling).
            prompts = torch.stack([self.model.encode_text(texts).mean(0) for texts in self.prompts]).cpu()
            table = auc_table(features, prompts, self.targets, self.names, bootstrap=0)
            metrics["zero_shot_auc"] = metrics["score"] = table.macro
            self.per_class = table.per_class
        self.model.train()
        return metrics

    def whole_ecg(self, raw: RawBatch) -> Tensor:
        """The batch in mV with every lead kept: float32 [B,12,L]."""
        signal = raw.adc if raw.signal is None else raw.signal
        rows = torch.arange(len(raw.records), device=self.device)
        return lead_mask(
            signal, raw.gain, raw.baseline, seed=0, step=0, rows=rows, keep_probability=1.0, statistics=False
        )[0]

    def first_batch(self) -> tuple[RawBatch, Batch]:
        """The first validation batch, as the report's reconstruction shows it."""
        raw = next(iter(self._raw()))
        return raw, self._batch(raw, 0)

    def _raw(self) -> Iterator[RawBatch]:
        batch = min(self.config.train.batch, len(self.ids))
        loader = make_loader(
            self.corpus, ids=self.ids, batch=batch, shuffle=False, repeat=False, engine="reference", workers=1
        )
        try:
            for raw in loader:
                yield raw.to(self.device)
        finally:
            loader.close()

    def _batch(self, raw: RawBatch, index: int) -> Batch:
        # Steps of validation count down from 2^32, so that they never repeat a draw of training.
        step = 2**32 - 1 - index
        rows = torch.arange(len(raw.records))
        shape = self.host_maker.shape(raw.records.cpu(), step, rows, bucketed=self.device.type == "cuda")
        return self.maker.make(raw, step, rows.to(self.device), shape)
