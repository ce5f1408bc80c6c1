"""Using a model: features, zero-shot scores and reconstructions, without dropout or gradient, in bounded memory."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from dbeta.config import RuntimeConfig
from dbeta.data.formats import STANDARD

LENGTHS = ("exact", "crop", "mean")
TEXTS_AT_ONCE = 64


class Inference:
    """What a user calls; the network is ``dbeta.DBeta``, which this is a part of."""

    def encode_ecg(
        self,
        ecg: Any,
        *,
        leads: Sequence[str] = STANDARD,
        lengths: Literal["exact", "crop", "mean"] = "exact",
        batch: int = 64,
    ) -> Tensor:
        """Features for zero-shot use and linear probing: the tanh-pooled, projected CLS (paper 3.2).

        They do not depend on ``batch`` or on which records come together. On a GPU bf16 is used as
        ``runtime.precision`` says. The model was trained on 10 s; what it makes of padded ones nobody has validated.

        Args:
            ecg: float [B, C, 5000] of mV at 500 Hz, numpy or torch, on any device; or a sequence of [C, L].
            leads: names of the C rows, in any order; the canonical twelve that are not named are 0 mV, as the random
                lead masking of training made them.
            lengths: "exact" refuses anything but 10 s; "crop" pads a shorter record with zeros at its end and takes the
                first 10 s of a longer one; "mean" pads alike and averages the features of as few windows of 10 s as
                cover a longer record, evenly spread (they overlap).
            batch: windows that are computed at once.

        Returns:
            [B, D] on the model's device, in its dtype, within (-1, 1), not normalised.

        Raises:
            ValueError: another shape, dtype, unknown or repeated lead names, NaN or infinity.
        """
        if lengths not in LENGTHS:
            raise ValueError(f"lengths {lengths!r}; accepted: {', '.join(LENGTHS)}")
        records, places = self._records(ecg, lengths), lead_places(leads)
        weight = self.ecg_encoder.cls
        features = weight.new_zeros(len(records), self.config.width, dtype=weight.dtype, requires_grad=False)
        with self.inference():
            for rows, share, windows in self._windows(records, places, lengths, batch):
                found = self.ecg_features(windows.to(weight.device))
                features.index_add_(0, rows.to(weight.device), found.to(weight.dtype) * share.to(weight)[:, None])
        return features

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Features [B, D] of reports or prompts: the tanh-pooled first word piece before the fusion.

        A text's features do not depend on its neighbours, on their order or on padding. Texts are cleaned as the
        reports of the training corpus were (``report_cleaning``) and cut at 254 tokens.

        Raises:
            ValueError: the model has no tokenizer, or an empty list is given.
        """
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"encode_text takes a list of at least one text, given {texts!r}")
        device, dtype = self.ecg_encoder.cls.device, self.ecg_encoder.cls.dtype
        group = TEXTS_AT_ONCE if self.config.text_mask else 1  # where padding is attended, each text is encoded alone
        features = []
        with self.inference():
            for at in range(0, len(texts), group):
                ids, mask = self._tokens(texts[at : at + group])
                features.append(self.text_features(ids.to(device), mask.to(device)).to(dtype))
        return torch.cat(features)

    def zero_shot(self, ecg: Any, prompts: Mapping[str, str | Sequence[str]], **how: Any) -> Tensor:
        """Scores of described classes: raw dot products of ECG and prompt features (paper 4.1.2).

        They rank records within a class; they are no probabilities, and classes are not exclusive.

        Args:
            ecg: as for ``encode_ecg``.
            prompts: name of each class -> its description; of several the mean of their features counts.
            how: of ``encode_ecg``.

        Returns:
            [B, classes] in the order of ``prompts``.

        Raises:
            ValueError: as ``encode_ecg`` and ``encode_text``.
        """
        return self.encode_ecg(ecg, **how) @ self.encode_prompts(prompts).T

    def encode_prompts(self, prompts: Mapping[str, str | Sequence[str]]) -> Tensor:
        """Features [classes, D] of described classes; see ``zero_shot``."""
        return torch.stack([self.encode_text([p] if isinstance(p, str) else p).mean(0) for p in prompts.values()])

    def reconstruct(
        self,
        ecg: Any,
        texts: Sequence[str] | None = None,
        *,
        hidden_leads: Sequence[str] = (),
        seed: int = 0,
        normalised: bool = True,
        batch: int = 64,
    ) -> tuple[Tensor, Tensor]:
        """Hide patches as pre-training does and let the MEM head fill them in.

        The head predicts shape, not size: where the loss normalised its target (``loss.mem_normalise``, the default),
        each lead's mean and deviation are taken from the ECG given, hidden leads included.

        Args:
            ecg: float [B, 12, 5000] in mV at 500 Hz, canonical leads.
            texts: a report for each; None: an empty one.
            hidden_leads: leads that the model does not see at all.
            seed: of the choice of patches; record i's does not depend on ``batch``.
            normalised: whether the model was trained with ``loss.mem_normalise``.
            batch: records at once.

        Returns:
            (float [B, 12, 5000] with the hidden patches as predicted, bool [B, tokens] True at hidden patches of
            ``config.patch`` samples). With ``hidden_leads`` these leads of the visible patches are the original's.

        Raises:
            ValueError: as ``encode_ecg`` and ``encode_text``, or another number of texts.
        """
        records, places = self._records(ecg, "exact"), lead_places(STANDARD)
        texts = [""] * len(records) if texts is None else list(texts)
        if len(texts) != len(records):
            raise ValueError(f"{len(texts)} texts for {len(records)} ECGs; give one for each, or none")
        seen = torch.ones(self.config.leads, dtype=torch.bool)
        seen[lead_places(hidden_leads)] = False
        noise = torch.rand(len(records), self.config.ecg_tokens, generator=torch.Generator().manual_seed(seed))
        weight, rebuilt, hidden = self.ecg_encoder.cls, [], []
        with self.inference():
            for rows, _, whole in self._windows(records, places, "exact", batch):
                ids, mask = self._tokens([texts[i] for i in rows.tolist()])
                whole = whole.to(weight)
                shown = whole * seen.to(weight.device)[:, None]
                out = self(shown, ids.to(weight.device), mask.to(weight.device), noise=noise[rows].to(weight.device))
                cut = whole[..., : self.config.ecg_tokens * self.config.patch]
                mean, rstd = (cut.mean(-1), (cut.var(-1) + 1e-6).rsqrt()) if normalised else (None, None)
                rebuilt.append(place_patches(whole, out.mem_prediction, out.mem_patches, mean, rstd))
                chosen = torch.zeros(len(rows), self.config.ecg_tokens, dtype=torch.bool, device=weight.device)
                hidden.append(chosen.scatter_(1, out.mem_patches, True))
        return torch.cat(rebuilt), torch.cat(hidden)

    # --- saving and loading ------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors``, ``config.json``, the tokenizer and a model card made of ``about``.

        Raises:
            OSError: the folder cannot be written.
        """
        from dbeta.models import pretrained

        pretrained.save(self, Path(folder))

    def push_to_hub(self, repo: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the model folder to the Hugging Face hub, by default as a private repository; returns its address.

        The weights' licence is that of the data they were trained on: look at the model card first.

        Raises:
            ValueError: the hub refuses: no login, no right, no network.
        """
        from dbeta.models import pretrained

        return pretrained.push(self, repo, private=private, token=token)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, runtime: RuntimeConfig | None = None, *, tokenizer: str = "", device: str = "cpu"
    ) -> Self:
        """Load a model, strictly and in eval mode.

        Args:
            source: a run folder (its best model), a model folder, or a Hugging Face hub id.
            runtime: engines and precision.
            tokenizer: a folder or hub id, where the model has none of its own.
            device: "cpu", "cuda", or "auto": a GPU where there is one.

        Raises:
            ValueError: nothing there, a newer format, a file that is no checkpoint, or a tensor that is missing,
                unexpected or of another shape.
        """
        from dbeta.models import pretrained
        from dbeta.runtime import resolve_device

        return pretrained.load(source, runtime, tokenizer=tokenizer).to(resolve_device(device))

    # --- how ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Eval mode, no gradient, bf16 where ``runtime.precision`` says so; the mode is restored."""
        from dbeta.runtime import autocast

        training, weight = self.training, self.ecg_encoder.cls
        self.eval()
        try:
            with torch.no_grad():
                if weight.dtype == torch.float32:
                    with autocast(self.runtime, weight.device):
                        yield
                else:
                    yield
        finally:
            self.train(training)

    def _records(self, ecg: Any, lengths: str) -> Sequence[Any]:
        """The records of an array or a sequence, their number of dimensions checked."""
        expected = (
            f"float [B, {self.config.leads}, {self.config.samples}] in mV at 500 Hz, leads I II III aVR aVL aVF V1-V6"
        )
        if hasattr(ecg, "ndim") and ecg.ndim != 3:
            alone = "; one record is ecg[None]" if ecg.ndim == 2 else ""
            raise ValueError(f"ecg is {ecg.dtype} {list(ecg.shape)}; give {expected}{alone}")
        if not hasattr(ecg, "ndim") and not (isinstance(ecg, Sequence) and not isinstance(ecg, str) and len(ecg)):
            raise ValueError(f"ecg is a {type(ecg).__name__}; give {expected}, or a list of [C, L]")
        return ecg

    def _windows(
        self, records: Sequence[Any], places: list[int], lengths: str, batch: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(record of each window int64 [b], its share of the record's features [b], float [b, 12, samples])."""
        if batch < 1:
            raise ValueError(f"batch {batch}; accepted: 1 or more")
        rows: list[int] = []
        shares: list[float] = []
        windows: list[Tensor] = []
        for row, record in enumerate(records):
            record = self._checked(record, len(places), lengths)
            starts = window_starts(record.shape[1], self.config.samples) if lengths == "mean" else [0]
            for start in starts:
                part = record[:, start : start + self.config.samples]
                window = part.new_zeros(self.config.leads, self.config.samples)
                window[places, : part.shape[1]] = part
                rows.append(row), shares.append(1 / len(starts)), windows.append(window)
                if len(windows) == batch:
                    yield torch.tensor(rows), torch.tensor(shares), torch.stack(windows)
                    rows, shares, windows = [], [], []
        if windows:
            yield torch.tensor(rows), torch.tensor(shares), torch.stack(windows)

    def _checked(self, record: Any, leads: int, lengths: str) -> Tensor:
        record = torch.as_tensor(record)
        wanted = self.config.samples
        if record.ndim != 2 or len(record) != leads or not record.shape[1] or not record.is_floating_point():
            raise ValueError(
                f"ecg is {record.dtype} [..., {', '.join(map(str, record.shape))}] with {leads} leads named; give "
                f"float [B, {leads}, {wanted}] in mV at 500 Hz, leads I II III aVR aVL aVF V1-V6 or leads=[...]"
            )
        if lengths == "exact" and record.shape[1] != wanted:
            raise ValueError(
                f"ecg has {record.shape[1]} samples; give float [B, {leads}, {wanted}] in mV at 500 Hz, or say "
                'lengths="crop" or lengths="mean" for records at 500 Hz of another length'
            )
        if not record.isfinite().all():
            raise ValueError("ecg holds NaN or infinity; set invalid samples to 0 mV, as dbeta.read_ecg does")
        return record.detach().to(self.ecg_encoder.cls.dtype)

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Padded ids int64 and mask bool [B, T] of cleaned texts; a text of which nothing is left is the end token."""
        if self.tokenizer is None:
            from dbeta.data.tokenizer import TRAINED

            raise ValueError(f"this model has no tokenizer; {TRAINED}")
        from dbeta.data.reports import normalise

        ids = self.tokenizer.encode_batch([normalise(text, self.report_cleaning) for text in texts])
        ids = [torch.tensor(row or [self.tokenizer.eos]) for row in ids]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad)
        return padded, torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]


def lead_places(leads: Sequence[str]) -> list[int]:
    """Where leads of these names stand among the canonical twelve.

    Raises:
        ValueError: an unknown or repeated name.
    """
    upper = [name.upper() for name in STANDARD]
    given = [str(name).strip().upper() for name in leads]
    unknown = [str(name) for name, lead in zip(leads, given) if lead not in upper]
    if isinstance(leads, str) or unknown or len(set(given)) < len(given):
        raise ValueError(f"leads {leads!r}; accepted: different names of {' '.join(STANDARD)}")
    return [upper.index(lead) for lead in given]


def window_starts(samples: int, window: int) -> list[int]:
    """First samples of as few windows as cover a record, evenly spread; [0] for one that a window holds."""
    count = -(-samples // window)
    return [round(i * (samples - window) / (count - 1)) for i in range(count)] if count > 1 else [0]


def place_patches(
    ecg: Tensor, prediction: Tensor, patches: Tensor, mean: Tensor | None = None, rstd: Tensor | None = None
) -> Tensor:
    """The ECG with predicted patches in their places.

    Args:
        ecg: float [B, C, L] in mV.
        prediction: float [B, P, C * patch], lead-major.
        patches: int64 [B, P], which patches.
        mean, rstd: float [B, C], what the prediction was normalised with; None: nothing.

    Returns:
        Float [B, C, L] in mV, a copy.
    """
    patch = prediction.shape[-1] // ecg.shape[1]
    predicted = prediction.to(ecg.dtype).unflatten(-1, (ecg.shape[1], patch))  # [B, P, C, patch]
    if mean is not None:
        predicted = predicted / rstd[:, None, :, None] + mean[:, None, :, None]
    result = ecg.clone()
    cut = (
        result[..., : ecg.shape[-1] // patch * patch].unflatten(-1, (-1, patch)).transpose(1, 2)
    )  # a view [B,T,C,patch]
    cut.scatter_(1, patches[..., None, None].expand_as(predicted), predicted)
    return result
