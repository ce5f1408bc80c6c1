"""Figures: an ECG on its paper (Fig. 4), ROC curves by class, t-SNE of features (Fig. 3)."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER, FINE, BOLD, INK = "#fff6f4", "#f8d3ce", "#ec9f97", "#1a1a1a"
GRID = (("I", "aVR", "V1", "V4"), ("II", "aVL", "V2", "V5"), ("III", "aVF", "V3", "V6"))  # the usual 3 x 4 print
LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
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
