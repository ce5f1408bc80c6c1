"""The five tasks of the evaluation, each from data sets to results."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np

from dbeta.evaluation.cinc import ChallengeWeights
from dbeta.evaluation.datasets import Dataset
from dbeta.evaluation.experts import expert_tables
from dbeta.evaluation.finetune import DX, finetune
from dbeta.evaluation.fitting import FitConfig
from dbeta.evaluation.identify import ID, identify, identities
from dbeta.evaluation.linear_probe import ProbeConfig, measure, train_probes
from dbeta.evaluation.metrics import AucTable, macro_auc, percentile_interval
from dbeta.evaluation.prompts import load_prompts
from dbeta.evaluation.results import Result, as_json, class_details, from_table
from dbeta.evaluation.shift import PAIRS, shift_table
from dbeta.evaluation.signals import LEAD_SETS, SegmentStore, corpus_checksum

if TYPE_CHECKING:
    from dbeta.data.corpus import Corpus
    from dbeta.evaluation.evaluate import Evaluation, Options

SIX = ("ptbxl-super", "ptbxl-sub", "ptbxl-form", "ptbxl-rhythm", "cpsc2018", "csn")  # the average of Table 3
PAPER_FINETUNE = ("cinc2021", "synthetic")  # what `all` fine-tunes: Table 1's set and the built-in one
SEGMENT_S = 5.0  # of identification


def zero_shot(run: "Evaluation", found: list[Result], *, thorough: bool) -> list[Result]:
    """Tables 3 and 5 (and 12, 13): every label set by its prompts alone."""
    results = []
    for corpus, dataset in run.datasets():
        for leads in run.options.leads or ("12",):
            prompts = load_prompts(dataset.labels, run.options.prompts)
            key = run.key(corpus, dataset) | {"leads": leads, "prompts": prompts}

            def work(scratch, corpus=corpus, dataset=dataset, leads=leads):
                scores = _zero_shot_scores(run, corpus, dataset, leads)
                rows = dataset.splits["test"]
                table = macro_auc(
                    scores, rows.targets, dataset.labels.labels, groups=rows.groups, bootstrap=run.options.bootstrap
                )
                if run.options.figures:
                    _draw(run, corpus, dataset, leads, scores, table)
                fields = run.fields("zero-shot", dataset, leads=leads, prompts=run.options.prompts)
                return [from_table(table, **fields)], class_details(table)

            results += run.run(f"zero-shot-{dataset.labels.key}-{leads}", key, work)
    if run.options.annotations is not None:
        results += _experts(run)
    return results + _average(results)


def linear_probe(run: "Evaluation", found: list[Result], *, thorough: bool) -> list[Result]:
    """Table 2: a linear layer on frozen features at several shares of the training records, several seeds."""
    results, options = [], run.options
    config = ProbeConfig(epochs=options.epochs) if options.epochs else ProbeConfig()
    for corpus, dataset in run.datasets(trainable=True):
        for leads in options.leads or ("12",):
            key = run.key(corpus, dataset) | {"leads": leads, "config": asdict(config), "seeds": options.seeds}
            for fraction in options.fractions:

                def work(scratch, corpus=corpus, dataset=dataset, leads=leads, fraction=fraction):
                    parts = {
                        split: run.features.features(
                            corpus, rows.records, leads=leads, window_s=dataset.labels.window_s
                        )
                        for split, rows in dataset.splits.items()
                    }
                    rows = dataset.splits
                    probes = train_probes(
                        (parts["train"], rows["train"].targets),
                        (parts["validation"], rows["validation"].targets),
                        fraction=fraction, seeds=options.seeds, config=config, device=run.device,
                    )  # fmt: skip
                    names = dataset.labels.labels
                    tables = measure(
                        probes, parts["test"], rows["test"].targets, names,
                        groups=rows["test"].groups, bootstrap=options.bootstrap,
                    )  # fmt: skip
                    fields = run.fields("linear-probe", dataset, leads=leads, fraction=fraction)
                    single = [from_table(t, **fields, seed=p.seed) for p, t in zip(probes, tables)]
                    low, high = percentile_interval(np.concatenate([table.replicas for table in tables]))
                    interval = {"low": as_json(low), "high": as_json(high)}
                    mean = replace(single[0], seed=None, value=_mean(r.value for r in single), **interval)
                    details = {
                        str(probe.seed): {
                            "epoch": probe.epoch,
                            "validation_auc": probe.validation_auc,
                            "records": probe.records,
                            "classes_without_a_training_positive": [names[index] for index in probe.unseen],
                            "classes": class_details(table),
                        }
                        for probe, table in zip(probes, tables)
                    }
                    return [mean, *single], details

                name = f"linear-probe-{dataset.labels.key}-{leads}-{100 * fraction:g}"
                results += run.run(name, key | {"fraction": fraction}, work)
    return results


def fine_tune(run: "Evaluation", found: list[Result], *, thorough: bool) -> list[Result]:
    """Table 1, Dx.: the whole ECG encoder, for each lead set."""
    results, options = [], run.options
    config = _fit_config(DX, options)
    for corpus, dataset in run.datasets(trainable=True):
        labels = dataset.labels
        if not thorough and labels.key not in PAPER_FINETUNE and not options.sets:
            continue
        weights, sinus = None, -1
        if labels.key == "cinc2021":
            if options.scoring is None:
                raise ValueError("fine-tuning on cinc2021 needs --scoring DIR with the challenge's weights.csv")
            weights = ChallengeWeights.read(options.scoring).ordered_as(labels)
            sinus = labels.labels.index("NSR")
        for leads in options.leads or tuple(LEAD_SETS):
            key = run.key(corpus, dataset) | {"leads": leads, "config": asdict(config), "weights": str(weights)}

            def work(scratch, corpus=corpus, dataset=dataset, leads=leads, weights=weights, sinus=sinus):
                name = dataset.labels.key
                stores = {
                    split: SegmentStore.build(
                        corpus, rows.records, dataset.labels.window_s, run.out / "segments" / f"{name}-{split}.i16"
                    )
                    for split, rows in dataset.splits.items()
                }
                done = finetune(
                    run.model, dataset, stores, scratch, leads=leads, weights=weights, sinus=sinus, config=config,
                    bootstrap=options.bootstrap,
                )  # fmt: skip
                fields = run.fields("finetune", dataset, leads=leads) | {"records": done.segments["test"]}
                rows = [from_table(done.auc, **fields)]
                if done.score is not None:
                    low, high = done.interval
                    scored = replace(
                        rows[0], metric="CinC 2021 score", value=done.score, low=low, high=high, left_out=""
                    )
                    rows.insert(0, scored)
                return rows, {"epoch": done.epoch, "segments": done.segments, "classes": class_details(done.auc)}

            results += run.run(f"finetune-{labels.key}-{leads}", key, work)
    return results


def identification(run: "Evaluation", found: list[Result], *, thorough: bool) -> list[Result]:
    """Table 1, Id.: whose ECG is it, for each lead set."""
    results, options, problems = [], run.options, []
    config = _fit_config(ID, options)
    for source, corpus in run.corpora.items():
        try:
            people = identities(corpus, options.patients, seed=options.seeds[0])
        except ValueError as error:
            problems.append(str(error))
            continue
        pairs = {"train": people.train, "validation": people.validation, "test": people.test}
        for leads in options.leads or tuple(LEAD_SETS):
            key = {"corpus": corpus_checksum(corpus), "people": repr(pairs), "leads": leads, "config": asdict(config)}

            def work(scratch, corpus=corpus, source=source, people=people, leads=leads):
                named = {*people.train, *(r for pair in (*people.validation, *people.test) for r in pair)}
                records = np.array(sorted(named), np.int64)
                store = SegmentStore.build(corpus, records, SEGMENT_S, run.out / "segments" / f"identify-{source}.i16")
                done = identify(
                    run.model, people, store, scratch, leads=leads, config=config, bootstrap=options.bootstrap
                )
                few = f"{done.patients} patients, chance {done.chance:.4f}"
                note = "; ".join(part for part in (run.warning, few) if part)
                low, high = done.interval
                return [
                    Result(
                        task="identify", dataset=source, title="Physionet2021-Id." if source == "cinc2021" else source,
                        metric="top-1 accuracy", leads=leads, value=done.accuracy, low=low, high=high,
                        records=done.patients, classes=done.patients, split=people.origin, note=note,
                    )
                ], {"epoch": done.epoch}  # fmt: skip

            results += run.run(f"identify-{source}-{leads}", key, work)
    if problems and not results:
        raise ValueError("; ".join(problems))
    return results


def shift(run: "Evaluation", found: list[Result], *, thorough: bool) -> list[Result]:
    """Tables 4 and 11: zero-shot on the target's classes that match the source's."""
    results = []
    for corpus, dataset in run.datasets():
        labels, prompts = dataset.labels, None
        for source, target in PAIRS:
            if target != labels.key:
                continue
            prompts = prompts or load_prompts(labels, run.options.prompts)
            key = run.key(corpus, dataset) | {"source": source, "prompts": prompts}

            def work(scratch, corpus=corpus, dataset=dataset, source=source, target=target):
                scores, rows = _zero_shot_scores(run, corpus, dataset, "12"), dataset.splits["test"]
                table = shift_table(
                    scores, rows.targets, dataset.labels.labels, source, target,
                    groups=rows.groups, bootstrap=run.options.bootstrap,
                )  # fmt: skip
                fields = run.fields("shift", dataset, prompts=run.options.prompts)
                fields |= {"dataset": f"{source}>{target}", "title": f"{source} > {target}"}
                return [from_table(table, **fields)], class_details(table)

            results += run.run(f"shift-{source}-{target}", key, work)
    if not results:
        raise ValueError("shift needs a corpus of ptb-xl, cpsc2018 or csn")
    return results


RUN = {
    "zero-shot": zero_shot,
    "linear-probe": linear_probe,
    "finetune": fine_tune,
    "identify": identification,
    "shift": shift,
}


def _fit_config(paper: FitConfig, options: "Options") -> FitConfig:
    return replace(paper, seed=options.seeds[0], epochs=options.epochs or paper.epochs, lr=options.lr or paper.lr)


def _zero_shot_scores(run: "Evaluation", corpus: "Corpus", dataset: Dataset, leads: str) -> np.ndarray:
    """Raw dot products of test features and prompt features, float32 [N, C]."""
    prompts = load_prompts(dataset.labels, run.options.prompts)
    ecg = run.features.features(corpus, dataset.splits["test"].records, leads=leads, window_s=dataset.labels.window_s)
    encode = lambda text: run.model.encode_text([text])[0].float().cpu().numpy()  # noqa: E731, each text alone
    return ecg @ np.stack([np.mean([encode(text) for text in texts], 0) for texts in prompts.values()]).T


def _experts(run: "Evaluation") -> list[Result]:
    tables = expert_tables(run.options.annotations, bootstrap=run.options.bootstrap)
    return [
        from_table(table, task="experts", dataset=name, title=f"CODE-test, {name}", leads="12", records=827)
        for name, table in tables.items()
    ]


def _average(results: list[Result]) -> list[Result]:
    """Table 3's last column, once all six sets are there."""
    six = {r.dataset: r for r in results if r.task == "zero-shot" and r.dataset in SIX and r.leads == "12"}
    if len(six) < len(SIX):
        return []
    mean = _mean(result.value for result in six.values())
    return [
        replace(six["csn"], dataset="average", title="Average of six", value=mean, low=None, high=None, left_out="")
    ]


def _draw(
    run: "Evaluation", corpus: "Corpus", dataset: Dataset, leads: str, scores: np.ndarray, table: AucTable
) -> None:
    """ROC curves by class, and t-SNE where there are categories of 50 records (Fig. 3)."""
    from dbeta.evaluation.figures import draw_roc, draw_tsne

    folder, labels, rows = run.out / "figures", dataset.labels, dataset.splits["test"]
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{labels.key}-{leads}.png"
    draw_roc(scores, rows.targets, table, title=f"zero-shot, {labels.title}").savefig(folder / f"roc-{name}", dpi=130)
    single = rows.targets[rows.targets.sum(1) == 1].sum(0)
    if (single >= 50).sum() > 1:
        features = run.features.features(corpus, rows.records, leads=leads, window_s=labels.window_s)
        figure = draw_tsne(features, rows.targets, labels.labels, title=f"t-SNE of test features, {labels.title}")
        figure.savefig(folder / f"tsne-{name}", dpi=130)


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else float(np.mean(known))
