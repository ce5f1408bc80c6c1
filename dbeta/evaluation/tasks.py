"""The five tasks of the evaluation, each from data sets to results; every ``_unit`` is one piece of kept work."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dbeta.evaluation.cinc import ChallengeWeights
from dbeta.evaluation.datasets import Dataset, count_notes
from dbeta.evaluation.experts import expert_tables
from dbeta.evaluation.finetune import DX, finetune
from dbeta.evaluation.fitting import FitConfig
from dbeta.evaluation.identify import ID, Identities, identify, identities
from dbeta.evaluation.label_sets import SPLITS
from dbeta.evaluation.linear_probe import ProbeConfig, measure, train_probes
from dbeta.evaluation.metrics import AucTable, macro_auc, percentile_interval
from dbeta.evaluation.paper import IDENTIFICATION, SIX
from dbeta.evaluation.prompts import load_prompts
from dbeta.evaluation.results import AVERAGE, Result, as_json, expert_title, from_table
from dbeta.evaluation.shift import PAIRS, shift_table
from dbeta.evaluation.signals import LEAD_SETS, SegmentStore, corpus_checksum
from dbeta.runtime import announce

if TYPE_CHECKING:
    from dbeta.data.corpus import Corpus
    from dbeta.evaluation.evaluate import Evaluation, Options

PAPER_FINETUNE = ("cinc2021", "synthetic")  # what `all` fine-tunes: Table 1's set and the built-in one
SEGMENT_S = 5.0  # of identification
IDENTIFICATION_COUNTS = (147_444, 17_670, 2_127)  # Table 9: segments, segments, patients
Done = tuple[list[Result], dict[str, Any]]


# --- zero-shot: Tables 3 and 5 (and 12, 13) --------------------------------------------------------------------------


def zero_shot(run: "Evaluation", *, everything: bool) -> list[Result]:
    """Every label set by its prompts alone."""
    results: list[Result] = []
    experts = _experts(run.options)
    for corpus, dataset, prompts in _prompted(run):
        for leads in run.options.leads or ("12",):
            key = run.key(corpus, dataset) | {"leads": leads, "prompts": prompts, "figures": run.options.figures}
            unit = partial(_zero_shot_unit, run, corpus, dataset, leads, prompts)
            results += run.unit(f"zero-shot-{dataset.labels.key}-{leads}", key, unit)
    return results + experts + _average(results, run.warning)


def _prompted(run: "Evaluation") -> list[tuple["Corpus", Dataset, dict[str, tuple[str, ...]]]]:
    """The data sets with their prompts, all read before anything is scored."""
    return [(corpus, dataset, load_prompts(dataset.labels, run.options.prompts)) for corpus, dataset in run.datasets()]


def _experts(options: "Options") -> list[Result]:
    """The human readers and the network of Table 5, where their annotations are given."""
    tables = expert_tables(options.annotations, bootstrap=options.bootstrap) if options.annotations else {}
    return [
        from_table(table, task="experts", dataset=name, title=expert_title(name), records=827)
        for name, table in tables.items()
    ]


def _zero_shot_unit(
    run: "Evaluation", corpus: "Corpus", dataset: Dataset, leads: str, prompts: dict[str, tuple[str, ...]], _: Path
) -> Done:
    scores, rows = _zero_shot_scores(run, corpus, dataset, leads, prompts), dataset.splits["test"]
    names = dataset.labels.labels
    table = macro_auc(scores, rows.targets, names, groups=rows.groups, bootstrap=run.options.bootstrap)
    if run.options.figures:
        _draw(run, corpus, dataset, leads, scores, table)
    fields = run.fields("zero-shot", dataset, leads=leads, prompts=run.options.prompts)
    return [from_table(table, **fields)], {}


def _zero_shot_scores(
    run: "Evaluation", corpus: "Corpus", dataset: Dataset, leads: str, prompts: dict[str, tuple[str, ...]]
) -> np.ndarray:
    """Raw dot products of test features and prompt features, float32 [N, C]."""
    records, window_s = dataset.splits["test"].records, dataset.labels.window_s
    ecg = run.features.features(corpus, records, leads=leads, window_s=window_s)
    encode = lambda text: run.model.encode_text([text])[0].float().cpu().numpy()  # noqa: E731, each text alone
    return ecg @ np.stack([np.mean([encode(text) for text in texts], 0) for texts in prompts.values()]).T


def _average(results: list[Result], warning: str) -> list[Result]:
    """Table 3's last column, once all six sets are there."""
    six = {r.dataset: r for r in results if r.task == "zero-shot" and r.dataset in SIX and r.leads == "12"}
    if len(six) < len(SIX):
        return []
    mean = _mean(result.value for result in six.values())
    none = {"low": None, "high": None, "left_out": "", "classes": 0, "per_class": {}, "records": 0, "split": ""}
    return [replace(six["csn"], dataset="average", title=AVERAGE, value=mean, note=warning, **none)]


def _draw(
    run: "Evaluation", corpus: "Corpus", dataset: Dataset, leads: str, scores: np.ndarray, table: AucTable
) -> None:
    """ROC curves by class, and t-SNE where there are categories of 50 records (Fig. 3)."""
    from dbeta.evaluation.figures import draw_roc, draw_tsne, warn

    labels, rows = dataset.labels, dataset.splits["test"]
    drawn = {"roc": draw_roc(scores, rows.targets, table, title=f"zero-shot, {labels.title}")}
    single = rows.targets[rows.targets.sum(1) == 1].sum(0)
    if (single >= 50).sum() > 1:
        features = run.features.features(corpus, rows.records, leads=leads, window_s=labels.window_s)
        title = f"t-SNE of test features, {labels.title}"
        drawn["tsne"] = draw_tsne(features, rows.targets, labels.labels, title=title)
    folder = run.out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for kind, figure in drawn.items():
        warn(figure, run.warning).savefig(folder / f"{kind}-{labels.key}-{leads}.png", dpi=130)


# --- shift: Tables 4 and 11 ------------------------------------------------------------------------------------------


def shift(run: "Evaluation", *, everything: bool) -> list[Result]:
    """Zero-shot on the target's classes that match the source's."""
    results = []
    for corpus, dataset, prompts in _prompted(run):
        for source, target in PAIRS:
            if target == dataset.labels.key.removesuffix("-clean"):
                key = run.key(corpus, dataset) | {"source": source, "prompts": prompts}
                unit = partial(_shift_unit, run, corpus, dataset, (source, target), prompts)
                results += run.unit(f"shift-{source}-{dataset.labels.key}", key, unit)
    if not results:
        raise ValueError("shift needs a corpus of ptb-xl, cpsc2018 or csn")
    return results


def _shift_unit(
    run: "Evaluation",
    corpus: "Corpus",
    dataset: Dataset,
    pair: tuple[str, str],
    prompts: dict[str, tuple[str, ...]],
    _: Path,
) -> Done:
    scores, rows = _zero_shot_scores(run, corpus, dataset, "12", prompts), dataset.splits["test"]
    options = {"groups": rows.groups, "bootstrap": run.options.bootstrap}
    table = shift_table(scores, rows.targets, dataset.labels.labels, *pair, **options)
    fields = run.fields("shift", dataset, prompts=run.options.prompts)
    fields |= {key: f"{pair[0]}{sign}{dataset.labels.key}" for key, sign in (("dataset", ">"), ("title", " > "))}
    return [from_table(table, **fields)], {}


# --- linear probe: Table 2 -------------------------------------------------------------------------------------------


def linear_probe(run: "Evaluation", *, everything: bool) -> list[Result]:
    """A linear layer on frozen features at several shares of the training records, several seeds."""
    results, options = [], run.options
    config = ProbeConfig(epochs=options.epochs) if options.epochs else ProbeConfig()
    for corpus, dataset in run.datasets(trainable=True):
        for leads in options.leads or ("12",):
            for fraction in options.fractions:
                key = {"leads": leads, "config": asdict(config), "seeds": options.seeds, "fraction": fraction}
                unit = partial(_probe_unit, run, corpus, dataset, leads, fraction, config)
                name = f"linear-probe-{dataset.labels.key}-{leads}-{100 * fraction:g}"
                results += run.unit(name, run.key(corpus, dataset) | key, unit)
    return results


def _probe_unit(
    run: "Evaluation", corpus: "Corpus", dataset: Dataset, leads: str, fraction: float, config: ProbeConfig, _: Path
) -> Done:
    options, names = run.options, dataset.labels.labels
    features = {
        split: run.features.features(corpus, rows.records, leads=leads, window_s=dataset.labels.window_s)
        for split, rows in dataset.splits.items()
    }
    train, validation = ((features[split], dataset.splits[split].targets) for split in SPLITS[:2])
    probes = train_probes(
        train, validation, fraction=fraction, seeds=options.seeds, config=config, device=run.device
    )  # fmt: skip
    test = dataset.splits["test"]
    tables = measure(
        probes, features["test"], test.targets, names, groups=test.groups, bootstrap=options.bootstrap
    )  # fmt: skip
    fields = run.fields("linear-probe", dataset, leads=leads, fraction=fraction)
    single = [from_table(table, **fields, seed=probe.seed) for probe, table in zip(probes, tables)]
    # The interval of the mean over seeds: resamples of all of them, so it holds the spread over seeds too.
    low, high = percentile_interval(np.concatenate([table.replicas for table in tables]))
    mean = _mean(result.value for result in single)
    details = {
        str(probe.seed): {
            "epoch": probe.epoch,
            "validation_auc": probe.validation_auc,
            "records": probe.records,
            "classes_without_a_training_positive": [names[index] for index in probe.unseen],
        }
        for probe in probes
    }
    over = {"seed": None, "value": mean, "low": as_json(low), "high": as_json(high), "per_class": {}}
    return [replace(single[0], **over), *single], details


# --- fine-tuning and identification: Table 1 -------------------------------------------------------------------------


def fine_tune(run: "Evaluation", *, everything: bool) -> list[Result]:
    """Diagnosis with the whole ECG encoder, for each lead set."""
    results, options, config = [], run.options, _fit_config(DX, run.options)
    chosen = [
        (corpus, dataset)
        for corpus, dataset in run.datasets(trainable=True)
        if not everything or options.sets or dataset.labels.key in PAPER_FINETUNE
    ]
    scored = {dataset.labels.key: _weights(dataset, options) for _, dataset in chosen}  # before anything is trained
    for corpus, dataset in chosen:
        labels, weights = dataset.labels, scored[dataset.labels.key]
        for leads in options.leads or tuple(LEAD_SETS):
            key = run.key(corpus, dataset) | {"leads": leads, "config": asdict(config), "weights": str(weights)}
            unit = partial(_finetune_unit, run, corpus, dataset, leads, weights, config)
            results += run.unit(f"finetune-{labels.key}-{leads}", key, unit)
    return results


def _weights(dataset: Dataset, options: "Options") -> np.ndarray | None:
    """The challenge's weights where it is the challenge's set."""
    if dataset.labels.key != "cinc2021":
        return None
    if options.scoring is None:
        raise ValueError("fine-tuning on cinc2021 needs --scoring DIR with the challenge's weights.csv")
    return ChallengeWeights.read(options.scoring).ordered_as(dataset.labels)


def _finetune_unit(
    run: "Evaluation",
    corpus: "Corpus",
    dataset: Dataset,
    leads: str,
    weights: np.ndarray | None,
    config: FitConfig,
    scratch: Path,
) -> Done:
    folder, labels = run.out / "segments", dataset.labels
    stores = {
        split: SegmentStore.build(corpus, rows.records, labels.window_s, folder / f"{labels.key}-{split}.i16")
        for split, rows in dataset.splits.items()
    }
    for note in count_notes(labels, stores) if labels.segments else ():
        announce(f"{note} (segments of {labels.window_s:g} s)")
    sinus = labels.labels.index("NSR") if weights is not None else -1
    done = finetune(
        run.model, dataset, stores, scratch, leads=leads, weights=weights, sinus=sinus, config=config,
        bootstrap=run.options.bootstrap,
    )  # fmt: skip
    fields = run.fields("finetune", dataset, leads=leads) | {"records": done.segments["test"]}
    results = [from_table(done.auc, **fields)]
    if done.score is not None:
        low, high = done.interval
        scored = {"metric": "CinC 2021 score", "value": done.score, "low": low, "high": high, "left_out": ""}
        scored |= {"per_class": {}, "classes": len(labels.labels)}
        results.insert(0, replace(results[0], **scored))
    return results, {"epoch": done.epoch, "segments": done.segments}


def identification(run: "Evaluation", *, everything: bool) -> list[Result]:
    """Whose ECG is it, for each lead set."""
    results, problems, options, config = [], [], run.options, _fit_config(ID, run.options)
    for source, corpus in run.corpora.items():
        try:
            people = identities(corpus, options.patients, seed=options.seeds[0])
        except ValueError as error:
            problems.append(str(error))
            continue
        pairs = repr([people.train, people.validation, people.test])
        for leads in options.leads or tuple(LEAD_SETS):
            key = {"corpus": corpus_checksum(corpus), "people": pairs, "leads": leads, "config": asdict(config)}
            unit = partial(_identify_unit, run, corpus, people, leads, config)
            results += run.unit(f"identify-{source}-{leads}", key, unit)
    if problems and not results:
        raise ValueError("; ".join(problems))
    if problems:
        announce(f"not run: identify: {'; '.join(problems)}")
    return results


def _identify_unit(
    run: "Evaluation", corpus: "Corpus", people: Identities, leads: str, config: FitConfig, scratch: Path
) -> Done:
    named = {*people.train, *(record for pair in (*people.validation, *people.test) for record in pair)}
    path = run.out / "segments" / f"identify-{corpus.source}.i16"
    store = SegmentStore.build(corpus, np.array(sorted(named), np.int64), SEGMENT_S, path)
    done = identify(run.model, people, store, scratch, leads=leads, config=config, bootstrap=run.options.bootstrap)
    for note in identification_notes(people, store, done.patients) if corpus.source == "cinc2021" else ():
        announce(note)
    chance = f"{done.patients} patients, chance {100 * done.chance:.2f} %"
    result = Result(
        task="identify", dataset=corpus.source, leads=leads, metric="top-1 accuracy",
        title=IDENTIFICATION if corpus.source == "cinc2021" else corpus.source,
        value=done.accuracy, low=as_json(done.interval[0]), high=as_json(done.interval[1]),
        records=done.patients, classes=done.patients, split=people.origin,
        note="; ".join(note for note in (run.warning, chance) if note),
    )  # fmt: skip
    return [result], {"epoch": done.epoch}


def identification_notes(people: Identities, store: SegmentStore, patients: int) -> list[str]:
    """Where the segments to train and validate on, or the patients to test, are not as many as in Table 9."""
    cut = Counter(store.record.tolist())
    found = {"train": sum(cut[record] for record in people.train)}
    found["validation"] = sum(cut[record] for record in {r for pair in people.validation for r in pair})
    counted = zip((*found.items(), ("test", patients)), ("segments", "segments", "patients"), IDENTIFICATION_COUNTS)
    return [
        f"{IDENTIFICATION} {split}: {count:,} {what}, Table 9 has {wanted:,}"
        for (split, count), what, wanted in counted
        if count != wanted
    ]


def _fit_config(paper: FitConfig, options: "Options") -> FitConfig:
    return replace(paper, seed=options.seeds[0], epochs=options.epochs or paper.epochs, lr=options.lr or paper.lr)


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else float(np.mean(known))


RUN = {
    "zero-shot": zero_shot,
    "linear-probe": linear_probe,
    "finetune": fine_tune,
    "identify": identification,
    "shift": shift,
}
