"""Every picture: what it shows, and that all its words are inside it, with the longest captions and
numbers that occur."""

import itertools
import sys

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg

from kit import figures, metrics, published
from kit.deam import Labels, read_splits
from kit.files import read_json
import demo
import pictures

NAMES = {"history", "true_vs_predicted", "confusion", "song"}


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """{name: figure} of all that is drawn meanwhile, without files."""
    found, save = {}, figures.save

    def keep(figure, folder, name, caption):
        save(figure, tmp_path, name, caption)
        found[name] = figure

    monkeypatch.setattr(figures, "save", keep)
    monkeypatch.setattr(figures.Figure, "savefig", lambda *_, **__: None)
    return found


def report_of(count, source="made songs", far=0.0):
    """(annotations, content of metrics.json) of made songs; far: how far off predictions are."""
    generator = np.random.default_rng(0)
    true = generator.normal(5, 1.3, (count, 2)).clip(1, 9).round(1)
    pred = 0.6 * true + 2 + generator.normal(0, 0.7, (count, 2)) + far
    songs = range(1, count + 1)
    annotations = {song: Labels(valence, 1.0, arousal, 1.0)
                   for song, (valence, arousal) in zip(songs, true.tolist())}
    preds = dict(zip(map(str, songs), pred.tolist()))
    numbers = metrics.measure(annotations, songs, preds, preds, [5, 5], np.arange(count))
    return annotations, {"finetune": "last12", "labels": "corrected", "split": "pooled train",
                         "source": source, "predictions": preds, "numbers": numbers}


def longest_sources():
    """Of ten folds, of ten folds of the demo, and without spaces."""
    folds = read_json(ROOT / "folds.json", "")["source"]
    return folds, f"{demo.SOURCE}; {folds}", "X" * 500


def history(epochs):
    return [{"epoch": n + 1, **{f"{split}_{name}": 1 / (n + 2) for split in ("train", "val")
                                for name in ("loss", "mse", "mae")}} for n in range(epochs)]


def assert_inside(figure, name):
    """All that is drawn is on the page, the caption above the panels and their titles, which do not
    touch; the data take most of the page."""
    figure.set_dpi(300)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(renderer), figure.get_size_inches()
    assert box.x0 > -0.01 and box.y0 > -0.01, (name, box)
    assert box.x1 < width + 0.01 and box.y1 < height + 0.01, (name, box)
    caption, panels = figure.texts[0].get_window_extent(), [
        axis.get_tightbbox(renderer) for axis in figure.axes]
    assert caption.y0 > max(panel.y1 for panel in panels) - 1, name
    assert not any(a.overlaps(b) for a, b in itertools.combinations(panels, 2)), name
    area = sum(axis.bbox.width * axis.bbox.height for axis in figure.axes)
    assert area > 0.4 * figure.bbox.width * figure.bbox.height, (name, area)
    return 1


def test_all_is_on_the_page(drawn, tmp_path, compared):
    own, count = published.read_published()["runs"]["penalties"], 0
    cases = (10, 0, None), (1744, 0, None), (175, 20, own)
    for source, (songs, far, beside) in zip(longest_sources(), cases):
        annotations, content = report_of(songs, source, far)
        figures.draw_report(content, annotations, tmp_path, beside)
        caption = figures.caption_of("last12", "corrected", "1395 train, 174 val songs", source)
        figures.draw_history(history(20), 20, 14, {"mse": 0.4, "mae": 0.3}, tmp_path, caption,
                             history(20))
        figures.draw_song(np.arange(4.0), np.linspace([3, 4], [6, 5], 4), [0.5, 0.4], tmp_path,
                          "song", "a_long_name" * 20 + ".mp3\nmodel last1 · windows of 45 s")
        assert set(drawn) == NAMES
        count += sum(assert_inside(figure, name) for name, figure in drawn.items())
    compared(count, "pictures")


def test_a_caption_is_whole_unless_it_would_fill_the_page(drawn, tmp_path, compared):
    folds, *_ = longest_sources()
    for caption, end in ((folds, folds[-12:]), ("a " * 500, "…")):
        figures.draw_song(np.arange(2.0), np.ones((2, 2)), [0.5, 0.4], tmp_path, "song", caption)
        text = drawn["song"].get_suptitle()
        assert text.endswith(end) and text.count("\n") <= 5
        assert caption.startswith(" ".join(text.rstrip("…").split()))
    compared(2, "captions")


def words(figure):
    return {text.get_text() for text in figure.legends[0].get_texts()}


def test_a_historys_legend_names_what_is_drawn(drawn, tmp_path, compared):
    figures.draw_history(history(3), 3, 3, {}, tmp_path, "")
    assert words(drawn["history"]) == {"train", "val", "selected, lowest val loss"}
    figures.draw_history(history(3), 3, 1, {"mse": 1, "mae": 1}, tmp_path, "", history(20))
    figure = drawn["history"]
    assert words(figure) == {"train", "val", "val, predicting the mean", "selected",
                             "lowest val loss", "train, published", "val, published"}
    for axis, name in zip(figure.axes, ("loss", "mse", "mae")):
        lines = {line.get_label(): line for line in axis.get_lines()}
        behind, own = lines["val, published"], lines["val"]
        np.testing.assert_array_equal(behind.get_xydata(), [
            (row["epoch"], row[f"val_{name}"]) for row in history(20)])
        assert behind.get_linewidth() < own.get_linewidth() and axis.get_xlim()[1] == 20.5
        assert behind.get_zorder() < own.get_zorder()
    compared(3, "panels")


def test_published_counts_stand_beside_the_runs(drawn, tmp_path, compared):
    numbers, own = report_of(175)[1]["numbers"], published.read_published()["runs"]["penalties"]
    figures.draw_confusion(numbers, tmp_path, "", own)
    left, right = drawn["confusion"].axes
    for axis, counts in ((left, numbers["confusion"]), (right, own["confusion"])):
        shown = [int(text.get_text().split("\n")[0]) for text in axis.texts]
        assert shown == np.array(counts).ravel().tolist()
    assert "right of 175: 57%" in left.get_title() and "67% [59%, 74%]" in right.get_title()
    figures.draw_confusion(numbers, tmp_path, "")
    assert len(drawn["confusion"].axes) == 1
    compared(32, "counts")


def test_the_picture_of_docs(tmp_path, monkeypatch, compared):
    """From a metrics.json and DEAM's labels, which are exchanged where the run's were."""
    splits = read_splits(ROOT / "splits.json")
    songs, generator = splits["test"][:40], np.random.default_rng(0)
    table = ["song_id,valence_mean,valence_std,arousal_mean,arousal_std"]
    table += [f"{song},{valence:.1f},1,{arousal:.1f},1" for song, (valence, arousal)
              in zip(songs, generator.uniform(2, 8, (40, 2)))]
    (tmp_path / pictures.STATIC).write_text("\n".join(table))
    content = report_of(40)[1]
    figures.write_file(tmp_path / "metrics.json", pictures.json.dumps({
        **content, "predictions": dict(zip(map(str, songs), content["predictions"].values())),
        "swapped_labels": [[1, 1000]]}))
    out = tmp_path / "docs/picture.png"
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "metrics.json"), str(tmp_path), str(out)])
    pictures.main()
    data = out.read_bytes()
    assert data.startswith(b"\x89PNG") and int.from_bytes(data[16:20], "big") == 1600
    assert len(data) < 300_000
    compared(1, "picture")
