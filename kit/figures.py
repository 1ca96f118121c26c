"""Every picture the kit draws, as PNG and PDF, one column (8.5 cm) wide or two.

Captions say what was run, on which songs; colours are Okabe and Ito's, distinct for the
colour-blind and in grey.
"""

import io
import os
import sys
import textwrap

os.environ.pop("MPLBACKEND", None)  # a notebook's, perhaps not installed; none is used
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from kit.deam import DIMENSIONS, MOODS, QUADRANTS
from kit.files import write_file
from kit.metrics import predicted_values, true_values
from kit.published import TEST_SONGS
from kit.report import main_metrics, right_of_first, with_interval

COLOURS = {"valence": "#0072b2", "arousal": "#d55e00", "train": "#009e73", "val": "#cc79a7",
           "grey": "#666666"}
COLUMN = 8.5 / 2.54  # inches
# of labels, both ways; no aspect: with one, a long caption pushes words out of the page
SCALE = {"xlim": (1, 9), "ylim": (1, 9), "xticks": range(1, 10), "yticks": range(1, 10)}
DEFAULTS = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
# the same for everyone, whatever their matplotlibrc says; captions hold names of files: no formulas
STYLE = {**DEFAULTS, "text.parse_math": False,
         "font.size": 7, "axes.titlesize": 7, "axes.linewidth": 0.6, "legend.fontsize": 6,
         "legend.frameon": False, "lines.linewidth": 1, "grid.linewidth": 0.4, "grid.alpha": 0.4,
         "axes.grid": True, "axes.axisbelow": True, "figure.constrained_layout.use": True,
         "pdf.fonttype": 42}


def draw_or_say(draw, *arguments):
    """draw(*arguments), or one line that says why not: a picture only shows what is on disk."""
    try:
        draw(*arguments)
    except Exception as error:  # matplotlib's own, of fonts, of the disk
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"not drawn: {draw.__name__.removeprefix('draw_')} ({reason[:150]}); all numbers are "
              "on disk", file=sys.stderr)


def save(figure, folder, name, caption):
    """Write a figure as PNG and PDF, with its caption above it, broken into lines that fit; a
    source that would fill more than six lines ends with "…"."""
    letters = round(66 * figure.get_figwidth() / COLUMN)  # so many fit, even capitals
    lines = [textwrap.fill(line, letters, max_lines=6, placeholder=" …")
             for line in caption.split("\n")]
    figure.suptitle("\n".join(lines), fontsize=5.2, color=COLOURS["grey"])
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        image = io.BytesIO()
        figure.savefig(image, format=kind, dpi=300, metadata=metadata)
        write_file(folder / f"{name}.{kind}", image.getvalue())


@matplotlib.rc_context(STYLE)
def draw_history(history, selected, lowest, level, folder, caption, published=None):
    """history.png: loss, MSE and MAE over epochs; the selected epoch and that of the lowest val
    loss marked; `level` {"mse", "mae"}: where predicting the mean label stands on val; behind them
    the curves of a published run's history, if there is one."""
    figure = Figure((COLUMN, 4.6))
    axes = figure.subplots(3, 1, sharex=True)
    last = max(len(history), len(published or []))
    titles = {"loss": "loss", "mse": "MSE (z-scored)", "mae": "MAE (z-scored)"}
    epochs = ({selected: ("-", "selected"), lowest: ("-.", "lowest val loss")}
              if selected != lowest else {selected: ("-", "selected, lowest val loss")})
    for axis, (name, title) in zip(axes, titles.items()):
        plot_curves(axis, history, name, "", linewidth=1, zorder=3, marker=".", markersize=2)
        if name in level:
            axis.axhline(level[name], color="k", linewidth=0.6, linestyle=":",
                         label="val, predicting the mean")
        for epoch, (style, label) in epochs.items():
            axis.axvline(epoch, color=COLOURS["grey"], linewidth=0.8, linestyle=style, label=label)
        if published:
            plot_curves(axis, published, name, ", published", linewidth=0.5,
                        color=COLOURS["grey"])
        axis.set(ylabel=title, xlim=(0.5, last + 0.5), ylim=(0, 1.06 * axis.dataLim.y1))
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[-1].set_xlabel("epoch")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  columnspacing=1)
    save(figure, folder, "history", caption)


def plot_curves(axis, history, name, note, **style):
    """A loss or an error of train and val over epochs."""
    for split, linestyle in (("train", "-"), ("val", "--")):
        axis.plot([row["epoch"] for row in history], [row[f"{split}_{name}"] for row in history],
                  linestyle, label=split + note, **{"color": COLOURS[split], **style})


@matplotlib.rc_context(STYLE)
def draw_true_vs_predicted(true, pred, numbers, folder, caption):
    figure = Figure((2 * COLUMN, 3.9))
    axes = figure.subplots(1, 2)
    for n, (axis, dimension) in enumerate(zip(axes, DIMENSIONS)):
        scatter(axis, true[:, n], pred[:, n], dimension)
        axis.set_title(main_metrics(numbers, dimension), fontsize=5.5)
    save(figure, folder, "true_vs_predicted", caption)


def scatter(axis, true, pred, dimension):
    """Predicted over true values [N] of a dimension."""
    axis.plot([1, 9], [1, 9], "k--", linewidth=0.7)
    axis.annotate("y = x", (8.4, 8.4), textcoords="offset points", xytext=(-5, 1), ha="right")
    few = len(true) < 500
    axis.scatter(true, pred, s=9 if few else 4, alpha=0.6 if few else 0.4, linewidth=0,
                 color=COLOURS[dimension], marker={"valence": "o"}.get(dimension, "s"))
    axis.set(xlabel=f"true {dimension} (1–9)", ylabel=f"predicted {dimension} (1–9)", **SCALE)


@matplotlib.rc_context(STYLE)
def draw_confusion(numbers, folder, caption, published=None):
    """confusion.png: counts and shares of each true quadrant; beside them those of a published run,
    if there is one."""
    panels = [(numbers["confusion"], f"quadrants right of {np.sum(numbers['confusion'])}: "
               + with_interval(numbers, "quadrant", "accuracy", ".0%"))]
    if published:
        panels.append((published["confusion"], f"published, right of {TEST_SONGS}: "
                       + right_of_first(published)))
    figure = Figure((len(panels) * COLUMN, 3.7))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (counts, title) in zip(axes, panels):
        matrix(axis, counts)
        axis.set_title(title)
    save(figure, folder, "confusion", caption)


def matrix(axis, counts):
    """4×4 counts, rows true, columns predicted quadrants, and each one's share of its row."""
    counts = np.array(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.grid(False)
    for row in range(4):
        for column in range(4):
            axis.text(column, row, f"{counts[row, column]}\n{shares[row, column]:.0%}",
                      ha="center", va="center",
                      color="white" if shares[row, column] > 0.5 else "black")
    axis.set(xlabel="predicted quadrant (share of the row)",
             ylabel="true quadrant", xticks=range(4), xticklabels=QUADRANTS,
             yticks=range(4), yticklabels=QUADRANTS)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")


def caption_of(finetune, labels, songs, source):
    """What a picture shows: the model, its labels, which songs and where they come from."""
    return f"{finetune} · {labels} labels · {songs}\n{source}"


def draw_report(content, annotations, folder, published=None):
    """The figures of a report. content: of metrics.json; published: a run of published.json."""
    pred, numbers = content["predictions"], content["numbers"]
    songs = list(map(int, pred))
    caption = caption_of(content["finetune"], content["labels"], f"{content['split']}, "
                         f"n = {len(songs)} · [95% CI]", content["source"])
    draw_true_vs_predicted(true_values(annotations, songs), predicted_values(pred, songs), numbers,
                           folder, caption)
    draw_confusion(numbers, folder, caption, published)


@matplotlib.rc_context(STYLE)
def draw_song(times, values, deviation, folder, name, caption):
    """One song: valence and arousal over time, values[windows, 2] at `times` (seconds, the middle
    of each window), a band of ± their standard deviation[2] over windows; and the path through the
    plane."""
    figure = Figure((COLUMN, 6.2))
    over_time, plane = figure.subplots(2, 1, height_ratios=[1, 1.6])
    for n, (dimension, style) in enumerate(zip(DIMENSIONS, ("-o", "--s"))):
        mean = values[:, n].mean()
        over_time.axhspan(mean - deviation[n], mean + deviation[n], color=COLOURS[dimension],
                          alpha=0.15, linewidth=0)
        over_time.plot(times, values[:, n], style, markersize=3, color=COLOURS[dimension],
                       label=f"{dimension} {mean:.2f} ± {deviation[n]:.2f}")
    over_time.set(xlabel="time (s), middle of the window", ylabel="1–9 scale", ylim=(1, 9),
                  yticks=range(1, 10, 2))
    over_time.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, columnspacing=1)
    draw_path(plane, times, values)
    save(figure, folder, name, caption)


def draw_path(plane, times, values):
    """The way of a song through the plane: valence to the right, arousal up, time as colour."""
    plane.set(xlabel="valence (1–9)", ylabel="arousal (1–9)", **SCALE)
    plane.axhline(5, color="k", linewidth=0.6)
    plane.axvline(5, color="k", linewidth=0.6)
    for name, mood, x, y in zip(QUADRANTS, MOODS, (8.9, 1.1, 1.1, 8.9), (8.65, 8.65, 1.15, 1.15)):
        plane.text(x, y, f"{name}: {mood}", ha="right" if x > 5 else "left", fontsize=5.5,
                   weight="bold", color=COLOURS["grey"])
    plane.plot(*values.T, "-", color=COLOURS["grey"], linewidth=0.8)
    points = plane.scatter(*values.T, c=times, cmap="viridis", s=14, zorder=3)
    if len(values) > 1:
        plane.figure.colorbar(points, label="time (s)", location="bottom", aspect=40)
