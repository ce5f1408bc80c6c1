"""Figures: an ECG on its paper (Fig. 4), frequent reports (Fig. 5), ROC curves by class, t-SNE of features (Fig. 3)."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dbeta.data.records import LEADS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dbeta.data.corpus import Corpus
    from dbeta.evaluation.metrics import AucTable
    from dbeta.evaluation.results import Result

PAPER, FINE, BOLD, INK = "#fff6f4", "#f8d3ce", "#ec9f97", "#1a1a1a"
BLUE, RED = "#1f4e79", "#c0392b"
GRID = (("I", "aVR", "V1", "V4"), ("II", "aVL", "V2", "V5"), ("III", "aVF", "V3", "V6"))  # the usual 3 x 4 print
SPEED, SCALE = 25.0, 10.0  # mm per second, mm per mV
ROW, LEFT, EDGE = 25.0, 12.5, 5.0  # mm: height of a row, room for the calibration pulse, margin


def draw_ecg(
    signal_mv: np.ndarray, *, rate_hz: float = 500.0, title: str = "", rhythm: str = "II", ax: "Axes | None" = None
) -> "Figure":
    """Print a 12-lead ECG as a cardiograph does: pink paper, 25 mm/s, 10 mm/mV, 3 x 4 leads and a rhythm strip.

    The columns follow each other in time (2.5 s each for 10 s); a calibration pulse of 1 mV and 0.2 s opens each row.
    Without ``ax`` the figure is at true scale: 1 mm on paper is 1 mm.

    Args:
        signal_mv: float [12, L] in mV, canonical lead order; NaN leaves a gap; at most the first 10 s are drawn.
        rhythm: the lead of the long strip.

    Returns:
        The figure, for ``savefig``.

    Raises:
        ValueError: not 12 leads, or an unknown rhythm lead.
    """
    from matplotlib.figure import Figure

    signal_mv = np.asarray(signal_mv, np.float64)
    if signal_mv.ndim != 2 or len(signal_mv) != 12 or rhythm not in LEADS:
        raise ValueError(f"draw_ecg wants [12, L] and a rhythm lead of {LEADS}, given {signal_mv.shape}, {rhythm!r}")
    signal_mv = signal_mv[:, : round(10 * rate_hz)]
    samples = signal_mv.shape[1]
    width = LEFT + SPEED * samples / rate_hz + EDGE
    width, height = EDGE * np.ceil(width / EDGE), ROW * 4 + 2 * EDGE
    if ax is None:
        figure = Figure(figsize=(width / 25.4, height / 25.4))
        ax = figure.add_axes((0, 0, 1, 1))
    _paper(ax, width, height)
    for row, names in enumerate((*GRID, (rhythm,))):
        middle = height - EDGE - ROW * (row + 0.5)
        _calibration(ax, middle)
        for column, name in enumerate(names):
            first, last = (samples * c // len(names) for c in (column, column + 1))
            x = LEFT + SPEED * np.arange(first, last) / rate_hz
            ax.plot(x, middle + SCALE * signal_mv[LEADS.index(name), first:last], color=INK, linewidth=0.7)
            ax.text(x[0] + 1, middle + 9, name, fontsize=8, fontweight="bold", color=INK)
            if column:
                ax.plot([x[0]] * 2, [middle - 2.5, middle + 2.5], color=INK, linewidth=0.9)
    ax.text(EDGE / 2, 1.5, f"25 mm/s   10 mm/mV   {rate_hz:g} Hz", fontsize=6, color=INK)
    if title:
        ax.text(width - EDGE / 2, height - 3.5, title, fontsize=8, color=INK, ha="right")
    return ax.figure


def draw_pair(corpus: "Corpus", record: int) -> "Figure":
    """A record with its report above it (Fig. 4). The report may be credentialed text: draw it only where asked to."""
    from dbeta.evaluation.signals import record_mv

    text = corpus.reports[int(corpus.column("report", np.array([record]))[0])]
    text = text or "no report; labels: " + ", ".join(map(str, corpus.column("labels", np.array([record]))[0]))
    return draw_ecg(record_mv(corpus, record), title=text if len(text) <= 150 else text[:149] + "…")


def save_pairs(corpora: "dict[str, Corpus]", folder: Path, count: int) -> None:
    """``pair-SOURCE-RECORD.png`` of some records of each corpus, and ``reports-SOURCE.png`` (Figs. 4 and 5)."""
    folder.mkdir(parents=True, exist_ok=True)
    for source, corpus in corpora.items():
        for record in np.unique(np.linspace(0, len(corpus) - 1, count).astype(int)):
            draw_pair(corpus, int(record)).savefig(folder / f"pair-{source}-{record}.png", dpi=150)
        if any(corpus.reports):
            draw_reports(corpus).savefig(folder / f"reports-{source}.png", dpi=130)


def draw_reports(corpus: "Corpus", most: int = 30) -> "Figure":
    """The most frequent reports of a corpus and how many records each has (Fig. 5)."""
    from matplotlib.figure import Figure

    counts = np.bincount(corpus.column("report"), minlength=len(corpus.reports))
    top = np.argsort(-counts, kind="stable")[:most]
    names = [text if len(text) <= 90 else text[:89] + "…" for text in (corpus.reports[i] or "(empty)" for i in top)]
    figure = Figure(figsize=(10, 1 + 0.24 * len(top)), layout="constrained")
    axis = figure.subplots()
    axis.barh(range(len(top)), counts[top], color=BLUE)
    axis.set_yticks(range(len(top)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("records", fontsize=8)
    return figure


def warn(figure: "Figure", note: str) -> "Figure":
    """The figure with ``note`` in red below it, such as that it is meaningless as a measurement."""
    if note:
        figure.supxlabel(note, fontsize=7, color=RED)
    return figure


def _paper(ax: "Axes", width: float, height: float) -> None:
    """Small boxes of 1 mm (0.04 s, 0.1 mV), large ones of 5 mm (0.2 s, 0.5 mV)."""
    from matplotlib.collections import LineCollection

    for step, colour, line in ((1, FINE, 0.35), (5, BOLD, 0.6)):
        rules = [((x, 0), (x, height)) for x in np.arange(0, width + 1, step)]
        rules += [((0, y), (width, y)) for y in np.arange(0, height + 1, step)]
        ax.add_collection(LineCollection(rules, colors=colour, linewidths=line, zorder=0))
    ax.set(xlim=(0, width), ylim=(0, height), xticks=[], yticks=[], facecolor=PAPER, aspect="equal")
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.figure.patch.set_facecolor(PAPER)


def _calibration(ax: "Axes", middle: float) -> None:
    x = np.array([2.5, 3.75, 3.75, 8.75, 8.75, 10.0])
    ax.plot(x, middle + np.array([0, 0, SCALE, SCALE, 0, 0]), color=INK, linewidth=0.7)


def draw_roc(scores: np.ndarray, targets: np.ndarray, table: "AucTable", *, title: str = "") -> "Figure":
    """ROC curve of each measured class, best AUC first.

    Args:
        scores: float [N, C].
        targets: bool [N, C], columns in the order of ``table.positives``.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = list(table.positives)
    ranked = sorted(table.per_class, key=table.per_class.get, reverse=True)
    figure = Figure(figsize=(6.5 + 2.4 * (1 + len(ranked) // 24), 6.2), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=":")
    for place, name in enumerate(ranked):
        column = names.index(name)
        order = np.argsort(-scores[:, column], kind="stable")
        hit, ends = targets[order, column], np.flatnonzero(np.diff(scores[order, column], append=-np.inf))
        rise, run = (np.r_[0, np.cumsum(part)[ends] / part.sum()] for part in (hit, ~hit))
        label = f"{name}  {table.per_class[name]:.3f}  ({table.positives[name]})"
        axis.plot(run, rise, linewidth=1.2, color=colormaps["turbo"](place / max(len(ranked), 1)), label=label)
    axis.set(xlabel="1 - specificity", ylabel="sensitivity", aspect="equal", xlim=(0, 1), ylim=(0, 1))
    measured = f"over {len(ranked)} of {len(names)} classes"
    axis.set_title(
        f"{title}: macro AUC {table.macro:.3f} [{table.interval[0]:.3f}, {table.interval[1]:.3f}] {measured}",
        fontsize=9,
    )
    if ranked:
        figure.legend(loc="outside right upper", fontsize=7, ncols=1 + len(ranked) // 24, frameon=False,
                      title="class  AUC  (positives)", title_fontsize=7)  # fmt: skip
    return figure


def draw_results(results: "Sequence[Result]") -> "Figure":
    """Our figures with their intervals beside the paper's; what was not run is left out."""
    from matplotlib.figure import Figure

    shown = [r for r in results if r.value is not None and (r.fraction is None or r.seed is None)]
    figure = Figure(figsize=(8, 1.2 + 0.26 * max(len(shown), 1)), layout="constrained")
    axis = figure.subplots()
    for row, result in enumerate(shown):
        if result.low is not None:
            axis.plot([100 * result.low, 100 * result.high], [row, row], color=BLUE, linewidth=1.4)
        axis.plot(100 * result.value, row, "o", color=BLUE, markersize=4.5, label="ours, 95 %" if not row else None)
        if result.paper is not None:
            axis.plot(100 * result.paper[1], row, "D", color="none", markeredgecolor=RED, markersize=5)
    axis.plot([], [], "D", color="none", markeredgecolor=RED, markersize=5, label="paper")
    axis.set_yticks(range(len(shown)), map(_row_name, shown), fontsize=7)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("per cent (macro AUC, CinC 2021 score or top-1 accuracy)", fontsize=8)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    notes = {note for r in shown for note in r.note.split("; ") if "meaningless" in note or "untrained" in note}
    return warn(figure, "; ".join(sorted(notes)))


def _row_name(result: "Result") -> str:
    """What tells a row of ``draw_results`` from the others."""
    share = f"{100 * result.fraction:g} %" if result.fraction else ""
    prompts = Path(result.prompts).name if result.prompts not in ("", "descriptions") else ""
    metric = result.metric if result.task == "finetune" else ""
    return "  ".join(filter(None, (result.task, result.title, result.leads, share, prompts, metric)))


def draw_tsne(
    features: np.ndarray,
    targets: np.ndarray,
    names: "Sequence[str]",
    *,
    least: int = 50,
    seed: int = 0,
    title: str = "",
) -> "Figure":
    """t-SNE of test features by category (Fig. 3): records of exactly one category, categories of ``least`` or more.

    Args:
        features: float [N, D].
        targets: bool [N, C].

    Raises:
        ValueError: no category is left.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    single = targets.sum(1) == 1
    kept = [column for column in range(targets.shape[1]) if (targets[:, column] & single).sum() >= least]
    rows = np.flatnonzero(single & targets[:, kept].any(1))
    if len(kept) < 1 or len(rows) < 4:
        raise ValueError(f"t-SNE: no category has {least} records of its own; use a lower limit")
    perplexity = min(30.0, (len(rows) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features[rows])
    figure = Figure(figsize=(8, 6), layout="constrained")
    axis = figure.subplots()
    for place, column in enumerate(kept):
        mine = points[targets[rows, column]]
        colour = colormaps["tab20"](place % 20)
        axis.scatter(*mine.T, s=7, color=colour, label=f"{names[column]} ({len(mine)})", linewidths=0)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, markerscale=2)
    return figure
