"""``dbeta doctor``: what is in a folder of records or a corpus, and what would be rejected or spoil an evaluation."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dbeta.data.corpus import BUILDING, Corpus
from dbeta.data.formats import Raw
from dbeta.data.records import LEADS, Record, canonical, limb_problem, read_raw
from dbeta.evaluation.audits import (
    Finding,
    Signal,
    audit_corpus,
    audit_splits,
    same_signals,
    signals_of,
)
from dbeta.runtime import track
from dbeta.use.find import find_records

LEAKS = ("patient in two splits", "record in two splits")
LOUD_MV, QUIET_MV = 20.0, 0.05  # peak deviation of an ECG: beyond, its units are probably not what the source says
EXAMPLES = 5


@dataclass(kw_only=True)
class Survey:
    """What was found. ``rejected`` and ``noticed`` hold reason -> "record: detail"; the counters count records."""

    path: str
    kind: str
    records: int = 0
    formats: Counter = field(default_factory=Counter)
    leads: Counter = field(default_factory=Counter)
    rates_hz: Counter = field(default_factory=Counter)
    seconds: Counter = field(default_factory=Counter)
    units_per_mv: Counter = field(default_factory=Counter)
    splits: Counter = field(default_factory=Counter)
    labels: Counter = field(default_factory=Counter)
    text: dict[str, float] = field(default_factory=dict)
    rejected: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    noticed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    findings: list[Finding] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Nothing would be rejected, no file is damaged, no patient stands in two splits."""
        return not self.rejected and not any(finding.kind in LEAKS for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it, reports' texts excluded."""
        counters = {name: dict(value) for name, value in vars(self).items() if isinstance(value, Counter)}
        return {
            "path": self.path, "kind": self.kind, "records": self.records, "sound": self.sound, **counters,
            "text": self.text, "rejected": dict(self.rejected), "noticed": dict(self.noticed),
            "findings": [vars(finding) for finding in self.findings],
        }  # fmt: skip


def examine(
    path: Path,
    *,
    checksums: bool = False,
    splits: Path | None = None,
    against: Sequence[Path] = (),
    limit: int | None = None,
) -> Survey:
    """Examine a folder of records (or one record, glob or table of paths), or a corpus.

    Args:
        checksums: verify every byte of a corpus.
        splits: a folder of published split files to audit.
        against: further corpora in which the signals of this one are searched.
        limit: look at this many records only.

    Raises:
        ValueError: nothing is there, or an option that a folder of records does not have.
    """
    corpus = (path / "corpus.json").is_file() or (path / BUILDING).is_dir()
    if (checksums or against) and not corpus:
        raise ValueError(f"{path} is no corpus; --checksums and --against are for one made by dbeta prepare")
    survey = _corpus(path, checksums, splits, against, limit) if corpus else _folder(path, limit)
    if splits is not None:
        survey.findings += audit_splits(splits)
    return survey


# --- a folder of records ---------------------------------------------------------------------------------------------


def _folder(path: Path, limit: int | None) -> Survey:
    survey, texts = Survey(path=str(path), kind="records"), []
    names = find_records([path])[:limit]
    survey.records = len(names)
    survey.findings += same_signals(_examined(survey, names, path, texts))
    survey.text = text_statistics(texts)
    return survey


def _examined(survey: Survey, names: Sequence[str], folder: Path, texts: list[str]) -> Iterator[Signal]:
    """Enter every record into the survey; hand on the signals of those that can be read."""
    for found in track(names, "records"):
        name = found.removeprefix(f"{folder}/")
        try:
            kind, raw = read_raw(Path(found))
            _enter_raw(survey, name, kind, raw, texts)
            record = canonical(raw, name=name, subject="")
        except ValueError as error:
            reason, _, detail = str(error).partition(": ")
            survey.rejected[reason].append(f"{name}: {detail}" if detail else name)
            continue
        except Exception as error:  # damaged files provoke whatever their libraries raise
            survey.rejected[f"unreadable: {type(error).__name__}"].append(f"{name}: {error}")
            continue
        _enter(survey, record)
        yield survey.path, name, record.adc, record.rate_hz


def _enter_raw(survey: Survey, name: str, kind: str, raw: Raw, texts: list[str]) -> None:
    """What only the source's own form shows: format, names and order of leads, header comments."""
    survey.formats[kind] += 1
    given = [lead.strip().upper() for lead in raw.names]
    standard = [lead.upper() for lead in LEADS]
    order = "canonical" if given == standard else " ".join(raw.names)
    survey.leads[order] += 1
    if (places := [standard.index(lead) for lead in given if lead in standard]) != sorted(places):
        survey.noticed["leads put in order by name"].append(f"{name}: {order}")
    for line in raw.comments:
        key, colon, value = line.partition(":")
        if colon and key.strip().lower() == "dx":
            survey.labels.update(code.strip() for code in value.split(",") if code.strip())
    texts.append(" ".join(raw.comments))


# --- a corpus --------------------------------------------------------------------------------------------------------


def _corpus(path: Path, checksums: bool, splits: Path | None, against: Sequence[Path], limit: int | None) -> Survey:
    survey = Survey(path=str(path), kind="corpus")
    try:
        corpus = Corpus.open(path)
    except ValueError as error:
        survey.rejected["damaged corpus"].append(str(error))
        return survey
    if checksums and (damaged := corpus.damage()):
        survey.rejected["checksum"] += [f"{name}: not what dbeta prepare wrote" for name in damaged]
    survey.records = len(corpus)
    survey.formats[f"corpus of {corpus.source}"] = len(corpus)
    for label in corpus.column("labels"):
        survey.labels.update(label or ())
    survey.splits.update(map(str, corpus.column("split")))
    survey.text = text_statistics(corpus.reports, _report_counts(corpus))
    survey.findings += audit_corpus(corpus, splits)
    others = [Corpus.open(other) for other in against]
    found = same_signals(chain(_stored(survey, corpus, limit), signals_of(others)))
    within = {str(other.path) for other in others} - {survey.path}  # what another corpus repeats is not asked
    survey.findings += [finding for finding in found if finding.where not in within]
    return survey


def _stored(survey: Survey, corpus: Corpus, limit: int | None) -> Iterator[Signal]:
    count = min(len(corpus), limit or len(corpus))
    columns = {name: corpus.column(name) for name in ("name", "rate_hz", "gain", "baseline")}
    for i in track(range(count), "records"):
        name, rate, gain, baseline = (columns[key][i] for key in ("name", "rate_hz", "gain", "baseline"))
        try:
            adc = corpus.read_adc(i)
        except ValueError as error:
            survey.rejected["damaged corpus"].append(str(error))
            continue
        invalid = adc == np.iinfo(adc.dtype).min
        present = ~invalid.all(1)
        record = Record(
            name=str(name), adc=adc, rate_hz=float(rate), gain=np.asarray(gain), baseline=np.asarray(baseline),
            subject="", present=present, flat=adc.max(1) == adc.min(1),
        )  # fmt: skip
        survey.leads["canonical" if present.all() else " ".join(np.array(LEADS)[present])] += 1
        if invalid[present].any():
            survey.noticed["invalid samples"].append(f"{name}: {int(invalid[present].sum()):,} (NaN) are 0 mV")
        if problem := limb_problem(record):
            survey.noticed["limb leads contradict each other"].append(f"{name}: {problem}")
        _enter(survey, record)
        yield survey.path, str(name), adc, float(rate)


def _report_counts(corpus: Corpus) -> np.ndarray:
    return np.bincount(corpus.column("report"), minlength=len(corpus.reports))


# --- both ------------------------------------------------------------------------------------------------------------


def _enter(survey: Survey, record: Record) -> None:
    """What a record in canonical form shows."""
    seconds = record.adc.shape[1] / record.rate_hz
    survey.rates_hz[f"{record.rate_hz:g}"] += 1
    survey.seconds[f"{seconds:.4g}"] += 1
    survey.units_per_mv.update({f"{gain:g}" for gain in record.gain[record.present]})
    missing = [lead for lead, there in zip(LEADS, record.present) if not there]
    flat = [lead for lead, there, still in zip(LEADS, record.present, record.flat) if there and still]
    for reason, leads in (("missing leads", missing), ("flat leads", flat)):
        if leads:
            survey.noticed[reason].append(f"{record.name}: {' '.join(leads)}")
    if seconds < 10:
        survey.noticed["shorter than 10 s"].append(f"{record.name}: {seconds:g} s")
    peak = _peak_mv(record)
    if not QUIET_MV <= peak <= LOUD_MV:
        survey.noticed["units"].append(f"{record.name}: it reaches {peak:.3g} mV; is that millivolts?")
    for reason, detail in record.notes:
        survey.noticed[reason].append(f"{record.name}: {detail}")


def _peak_mv(record: Record) -> float:
    """The largest deviation from a lead's median in the record's first 10 s, spikes of 0.1 % left out."""
    mv = record.to_mv()[record.present, : round(10 * record.rate_hz)]
    return float(np.quantile(np.abs(mv - np.median(mv, 1, keepdims=True)), 0.999, axis=1).max())


def text_statistics(texts: Sequence[str], counts: np.ndarray | None = None) -> dict[str, float]:
    """How many records have text, how many differ, and quantiles of their words; never the texts.

    Args:
        counts: records of each text; None: one.
    """
    counts = np.ones(len(texts), np.int64) if counts is None else counts
    words = np.repeat([len(text.split()) for text in texts], counts) if len(texts) else np.zeros(0)
    words = words[words > 0]
    if not len(words):
        return {"records with text": 0}
    told = {"records with text": len(words), "different texts": len({text for text in texts if text.split()})}
    return told | {f"words, {p} %": float(np.percentile(words, p)) for p in (5, 50, 95, 100)}


def show(survey: Survey, most: int = 12) -> Any:
    """The survey as tables for people."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    facts = Table(title=f"{survey.path}: {survey.records:,} records", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("what", "value", "records"):
        facts.add_column(column, justify="right" if column == "records" else "left", overflow="fold")
    for name, counter in vars(survey).items():
        if isinstance(counter, Counter):
            rows = counter.most_common(most)
            for place, (value, count) in enumerate(rows):
                facts.add_row("" if place else name.replace("_", " "), str(value), f"{count:,}")
            if len(counter) > most:
                facts.add_row("", f"and {len(counter) - most:,} more", "")
    for name, value in survey.text.items():
        facts.add_row("text", name, f"{value:,.0f}")
    parts: list[Any] = [facts]
    for title, reasons in (("would be rejected", survey.rejected), ("noticed", survey.noticed)):
        if reasons:
            table = Table("reason", "records", "for example", title=title, box=box.SIMPLE_HEAD, title_justify="left")
            for reason, names in reasons.items():
                table.add_row(reason, f"{len(names):,}", "\n".join(names[:EXAMPLES]))
            parts.append(table)
    if survey.findings:
        table = Table("finding", "where", "detail", title="audits", box=box.SIMPLE_HEAD, title_justify="left")
        for finding in survey.findings:
            table.add_row(finding.kind, finding.where, finding.detail)
        parts.append(table)
    parts.append("nothing would be rejected" if survey.sound else "something would be rejected or spoils an evaluation")
    return Group(*parts)
