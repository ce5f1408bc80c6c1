"""A model's card: what it was trained on, how, and how well it does. Figures and names only, never a report's text.

``DBeta.about`` is what is known of a model beyond its network. It lies in ``config.json`` and goes with the model:

    source       what it is: "trained from scratch by dbeta", "imported from ..."
    data         {name, records, training records, reports}
    settings     {dotted key: value}
    results      {validation metric: value}, of the training corpus's validation split
    evaluation   rows of results.json of an evaluation
    licence      of the weights, an SPDX or hub name
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbeta.config import Config
    from dbeta.data.corpus import Corpus
    from dbeta.models.dbeta import DBeta

PAPER = "Pham et al., *Boosting Masked ECG-Text Auto-Encoders as Discriminative Learners*, ICML 2025"
IMPORTED = {"source": "imported from a checkpoint of the authors' release", "licence": "cc-by-nc-4.0"}
SETTINGS = {
    "data": ("report_cleaning", "max_tokens", "lead_keep_probability", "negative_fraction", "negatives"),
    "loss": None,  # all
    "optim": ("lr", "beta1", "beta2", "eps", "weight_decay", "warmup", "hold", "decay", "clip"),
    "train": ("steps", "batch", "seed"),
    "runtime": ("precision",),
}


def about_run(config: "Config", corpus: "Corpus", step: int, metrics: dict[str, float]) -> dict[str, Any]:
    """What a training run knows of the model it writes. No path of the machine and no text of a report."""
    settings = {"preset": config.preset.rsplit("/", 1)[-1], "step": step}
    for section, keys in SETTINGS.items():
        values = config.to_dict()[section]
        settings |= {f"{section}.{key}": values[key] for key in keys or values}
    return {
        "source": "trained by dbeta-pretrain",
        "data": {
            "name": corpus.source,
            "records": len(corpus),
            "training records": len(corpus.split_ids("train")),
            "unique reports": corpus.info["reports"],
        },
        "settings": settings,
        "results": {name: value for name, value in metrics.items() if isinstance(value, float)},
    }


def model_card(model: "DBeta") -> str:
    """The card as Markdown with the hub's front matter."""
    about, config = model.about, model.config
    count = sum(parameter.numel() for parameter in model.parameters())
    licence = about.get("licence", "other")
    lines = ["---", f"license: {licence}", "library_name: dbeta", "tags: [ecg, electrocardiogram, d-beta]", "---", ""]
    lines += ["# D-BETA ECG and report encoder", "", f"A model of dbeta: {about.get('source', 'origin not recorded')}."]
    lines += [f"Architecture: {PAPER}; {count:,} parameters.", "", "```python", "from dbeta import DBeta, read_ecg"]
    lines += ['model = DBeta.from_pretrained("THIS_FOLDER_OR_HUB_ID")']
    lines += [
        f'features = model.encode_ecg([read_ecg("RECORD.hea")], lengths="crop")  # [1, {config.width}]',
        "```",
        "",
    ]
    length = f"{config.samples / 500:g} s"
    lines += [f"Input: 12 leads (I II III aVR aVL aVF V1-V6) in mV at 500 Hz, {length}; leads that are missing are 0."]
    lines += ["Not a medical device: scores are not probabilities and were not validated for clinical use.", ""]
    lines += ["## Data", "", *_table(about.get("data"), "not recorded")]
    lines += ["## Settings", "", *_table(about.get("settings"), "not recorded")]
    lines += [
        "## Results on the validation split of the training data",
        "",
        *_table(about.get("results"), "none recorded"),
    ]
    lines += ["## Evaluation", "", *_evaluation(about.get("evaluation", []))]
    lines += ["## Licence", "", _licence(licence, about), ""]
    return "\n".join(lines)


def _licence(licence: str, about: dict[str, Any]) -> str:
    if licence != "other":
        return f"Weights: {licence}."
    data = about.get("data", {}).get("name", "the training data")
    return f"Weights: nobody has stated a licence. They derive from {data}, whose terms bind whoever shares them."


def _table(values: dict[str, Any] | None, otherwise: str) -> list[str]:
    if not values:
        return [f"{otherwise.capitalize()}.", ""]
    return ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in values.items()), ""]


def _evaluation(rows: list[dict[str, Any]]) -> list[str]:
    """Measured rows only: task, set, leads, share of the training records, figure with interval, prompts."""
    rows = [
        row for row in rows if row.get("value") is not None and (row.get("seed") is None or not row.get("fraction"))
    ]
    if not rows:
        return ["None recorded.", ""]
    lines = ["| task | data set | leads | train | metric | value | 95 % | records |", "|" + "---|" * 8]
    for row in rows:
        low, high = row.get("low"), row.get("high")
        interval = f"{low:.4f}-{high:.4f}" if low is not None and high is not None else ""
        share = f"{100 * row['fraction']:g} %" if row.get("fraction") else ""
        cells = (row["task"], row["title"], row["leads"], share, row["metric"], f"{row['value']:.4f}", interval)
        lines.append(f"| {' | '.join(map(str, cells))} | {row.get('records', '')} |")
    return [*lines, ""]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
