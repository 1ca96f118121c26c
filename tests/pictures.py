"""A picture of an evaluation for docs/, three panels side by side.

  python tests/pictures.py METRICS DEAM OUT.png

METRICS: a metrics.json of eval.py, of a run or of pooled folds; DEAM: its folder, for the labels.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib
from matplotlib.figure import Figure

from kit.deam import DIMENSIONS, STATIC, corrected, read_annotations
from kit.figures import STYLE, matrix, scatter
from kit.metrics import confusion, predicted_values, true_values
from kit.report import rounded


@matplotlib.rc_context({**STYLE, "font.size": 9, "axes.titlesize": 9.5, "xtick.labelsize": 8,
                        "ytick.labelsize": 8})
def draw(content, annotations, file):
    """1600 pixels wide, to be shown half as wide."""
    songs = list(map(int, content["predictions"]))
    true, pred = true_values(annotations, songs), predicted_values(content["predictions"], songs)
    figure = Figure((8, 2.85))
    axes, metrics = figure.subplots(1, 3), content["numbers"]["metrics"]
    for n, (axis, name) in enumerate(zip(axes, DIMENSIONS)):
        scatter(axis, true[:, n], pred[:, n], name)
        axis.set(xlabel=f"true {name}", ylabel=f"predicted {name}")
        axis.set_title(f"{name}: R² {rounded(metrics[name]['r2'])}, "
                       f"r {rounded(metrics[name]['pearson'])}")
    matrix(axes[2], confusion(true, pred))
    axes[2].set(xlabel="predicted quadrant", ylabel="true quadrant")
    axes[2].set_title(f"quadrants: {metrics['quadrant']['accuracy']:.0%} of {len(songs)} right")
    figure.savefig(file, dpi=200, metadata={"Software": None})


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("metrics", type=Path)
    p.add_argument("deam", type=Path)
    p.add_argument("out", type=Path)
    args = p.parse_args()
    content = json.loads(args.metrics.read_text())
    annotations = read_annotations(next(args.deam.rglob(STATIC)))
    if content["labels"] == "corrected":
        annotations = corrected(annotations, content["swapped_labels"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(content, annotations, args.out)


if __name__ == "__main__":
    main()
