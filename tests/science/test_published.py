"""What was published: its facts follow from DEAM's labels and the model, and stand beside those of
a run on the published splits, nowhere else. DEAM=FOLDER names DEAM's annotations, if you have them.
"""

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from conftest import FLOAT32, ROOT, call, few, made_features

import eval as eval_script
import train
from common import EmotionModel, quadrant_weights
from kit import deam, figures, metrics, published, report
from kit.deam import QUADRANTS
from kit.files import read_json
from kit.records import read_config

FACTS = read_json(ROOT / "published.json", "")
FROZEN = ["--finetune", "frozen", "--epochs", "1", "--batch-size", "300", *FLOAT32]
NO_PENALTIES = ["--lambda-corr", "0", "--lambda-var", "0"]


# ---------------------------------------------------------------------------- without any training


def by_quadrant(values):
    return dict(zip(QUADRANTS, values))


def label_facts(annotations, splits):
    """All that published.json says of labels, computed from these."""
    mean, std = deam.label_statistics(annotations, splits["train"] + splits["val"])
    z_scored = (deam.labels_of(annotations, splits["train"]) - mean) / std
    first = metrics.true_values(annotations, splits["test"][:published.TEST_SONGS])
    return {"train_val_mean": mean.tolist(), "train_val_std": std.tolist(),
            "train_quadrants_above_mean": by_quadrant(torch.bincount(
                deam.quadrant(z_scored), minlength=4).tolist()),
            "true_correlation_first_160_test": np.corrcoef(first.T)[0, 1],
            "quadrant_weights": by_quadrant(quadrant_weights(z_scored).tolist())}


def test_labels_of_deam(splits, compared):
    if "DEAM" not in os.environ:
        pytest.skip("no folder of DEAM is named")
    annotations = deam.read_annotations(next(Path(os.environ["DEAM"]).rglob(deam.STATIC)))
    found = label_facts(annotations, splits)
    assert found.keys() == FACTS["labels"].keys()
    for name, expected in FACTS["labels"].items():
        assert found[name] == pytest.approx(expected, abs=5e-5), name
    first = metrics.true_values(annotations, splits["test"][:160])
    rows = np.bincount(deam.quadrant(first, 5), minlength=4)
    for run in FACTS["runs"].values():
        assert np.sum(run["confusion"], 1).tolist() == rows.tolist()
    compared(14 + 8, "facts")


def test_published_facts_fit_together(splits, compared):
    """Weights are those of the counts, which are all training songs; the counts right are those on
    the diagonal; songs shown are among the first 160, whose quadrants both runs agree on."""
    facts = FACTS["labels"]
    counts = by_quadrant([facts["train_quadrants_above_mean"][name] for name in QUADRANTS])
    assert sum(counts.values()) == len(splits["train"])
    corners = {"HV/HA": (1, 1), "LV/HA": (-1, 1), "LV/LA": (-1, -1), "HV/LA": (1, -1)}
    songs = [corners[name] for name, count in counts.items() for _ in range(count)]
    weights = quadrant_weights(torch.tensor(songs, dtype=torch.float64))
    assert by_quadrant(weights.tolist()) == pytest.approx(facts["quadrant_weights"], rel=1e-6)
    first = set(map(str, splits["test"][:published.TEST_SONGS]))
    for run in FACTS["runs"].values():
        assert np.sum(run["confusion"], 1).tolist() == [52, 21, 61, 26]
        assert np.trace(run["confusion"]) == run["quadrants_right"]
        assert run["predictions"].keys() <= first and len(run["epochs"]) == 20
        assert all(len(row) == len(run["columns"]) for row in run["epochs"])
    each = FACTS["runs"]["no_penalties"]["test_z_mse_each"]
    assert FACTS["runs"]["no_penalties"]["test_z_mse"] == pytest.approx(np.mean(each))
    compared(4 + 2 * 4 + 1, "facts")


def test_parameters_of_the_published_model(compared):
    model = EmotionModel(torchaudio.pipelines.WAV2VEC2_BASE._params, 10, "last1")
    sizes = [(each.numel(), each.requires_grad) for each in model.parameters()]
    assert FACTS["parameters"] == {"total": sum(size for size, _ in sizes),
                                   "trainable_last1": sum(size for size, trains in sizes if trains)}
    compared(2, "counts")


# ----------------------------------------------------------------------------------- beside a run


@pytest.fixture(scope="module")
def runs(splits, tmp_path_factory):
    """(features of made songs on the published splits, {published run: (folder of one like it, the
    curves drawn behind its own, what its evaluation prints, what is drawn beside its counts)})."""
    folder, found = tmp_path_factory.mktemp("published"), {}
    features = made_features(folder / "DEAM_feats", splits)
    for name, more in (("penalties", []), ("no_penalties", NO_PENALTIES)):
        with pytest.MonkeyPatch.context() as patch:
            drawn, printed = [], []
            for draw in ("draw_history", "draw_report"):
                patch.setattr(figures, draw, lambda *arguments: drawn.append(arguments[-1]))
            call(train, "--features", features, "--run", folder / name, *FROZEN, *more)
            patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(words)))
            call(eval_script, folder / name, "--features", features, "--device", "cpu")
        found[name] = folder / name, drawn[0], "\n".join(printed), drawn[1]
    return features, found


def test_every_fact_is_used_or_shown(runs, compared):
    """Of each run: its curves behind a history, its counts beside a confusion matrix, all else in
    the table. Labels and parameters: the tests above. The others say what the file is."""
    for name, (folder, history, output, beside) in runs[1].items():
        facts = FACTS["runs"][name]
        assert [list(row.values()) for row in history] == facts["epochs"]
        assert list(history[0]) == facts["columns"] and beside["confusion"] == facts["confusion"]
        in_table = {*report.ROWS.values(), "quadrants_right", "predictions"} & facts.keys()
        said = {"notebook", "options", "gpu", "seconds_an_epoch"}
        assert facts.keys() == in_table | said | {"columns", "epochs", "confusion"}
        kept = read_json(folder / "eval-test/metrics.json", "")["numbers"]["published"]
        assert in_table - kept["this_run"].keys() == {"predictions"}
        assert kept[name] == {key: facts[key] for key in facts.keys() - {"columns", "epochs"}}
    assert FACTS.keys() == {"labels", "parameters", "runs", "source", "protocol",
                            "confusion_order"}
    compared(2, "runs")


def test_the_table_has_a_row_for_each_number(runs, splits, compared):
    """Published and this run's, which is what predictions.csv gives over the first 160 songs."""
    count = 0
    for name, (folder, _, output, _) in runs[1].items():
        content, facts = read_json(folder / "eval-test/metrics.json", ""), FACTS["runs"][name]
        own = content["numbers"]["published"]["this_run"]
        rows = {line[:28].strip(): line[28:].split() for line in output.splitlines()}
        assert rows["first 160 test songs"] == ["published", "this", "run"]
        table = np.loadtxt(folder / "eval-test/predictions.csv", delimiter=",", skiprows=1)[:160]
        true, pred = table[:, 1:3], table[:, 3:]
        std = np.array(read_config(folder)["label_std"])
        mse, z_mse = (((pred - true) / scale) ** 2 for scale in (1, std))
        right = int((deam.quadrant(true, 5) == deam.quadrant(pred, 5)).sum())
        expected = {
            "MSE of valence, arousal": (facts.get("test_mse"), mse.mean(0)),
            "z-scored MSE of each": (facts.get("test_z_mse_each"), z_mse.mean(0)),
            "z-scored MSE": (facts["test_z_mse"], z_mse.mean()),
            "correlation, labels": (0.4961, np.corrcoef(true.T)[0, 1]),
            "correlation, predicted": (facts["predicted_correlation"], np.corrcoef(pred.T)[0, 1])}
        for title, (theirs, ours) in expected.items():
            shown = [float(each.strip(",").replace("−", "-").replace("–", "nan"))
                     for each in rows[title]]
            theirs = [math.nan] if theirs is None else np.ravel(theirs)
            both = [*theirs, *np.ravel(ours)]
            assert shown == pytest.approx(both, abs=5.1e-5, nan_ok=True), title
        assert own["quadrants_right"] == right == np.trace(own["confusion"])
        shares = [f"{share:.0%}" for share in (right / 160, *metrics.wilson(right, 160))]
        published_right = {"penalties": "107, 67% [59%, 74%]",
                           "no_penalties": "110, 69% [61%, 75%]"}
        assert " ".join(rows["quadrants right"]) == (
            f"{published_right[name]} {right}, " + "{} [{}, {}]".format(*shares))
        for song, values in facts["predictions"].items():
            both = "{:.2f}, {:.2f}".format(*values), "{:.2f}, {:.2f}".format(
                *content["predictions"][song])
            assert " ".join(rows[f"song {song}: valence, arousal"]) == " ".join(both)
        words = " ".join(output.split())
        for key in ("notebook", "options", "gpu"):
            assert facts[key] in words
        assert (f"{facts['seconds_an_epoch']} s an epoch" in words) == (name == "penalties")
        count += len(expected) + 6
    compared(count, "rows")


def test_unseen_artists_have_a_row(runs, splits, compared):
    folder, _, output, _ = runs[1]["penalties"]
    row = read_json(folder / "eval-test/metrics.json", "")["numbers"]["unseen_artists"]
    artists = deam.read_artists()
    heard = {artists[song] for song in splits["train"] + splits["val"]}
    table = np.loadtxt(folder / "eval-test/predictions.csv", delimiter=",", skiprows=1)
    new = np.array([artists[int(song)] not in heard for song in table[:, 0]])
    assert row["songs"] == new.sum() == 56
    assert row["metrics"]["arousal"]["pearson"] == pytest.approx(
        np.corrcoef(table[new, 2], table[new, 4])[0, 1])
    low, high = row["intervals"]["valence"]["r2"]
    assert low < row["metrics"]["valence"]["r2"] < high
    assert re.search(r"^R², unseen artists +[−\d]", output, re.M)
    assert "56 songs, too few to compare" in output
    compared(56, "songs")


def test_nothing_published_beside_other_labels_or_splits(runs, splits, monkeypatch, capsys,
                                                         compared):
    """Corrected labels are another truth; the demo's splits, and folds, are other songs."""
    features, (folder, *_) = runs[0], runs[1]["penalties"]
    drawn = []
    monkeypatch.setattr("kit.figures.draw_report", lambda *values: drawn.append(values))
    capsys.readouterr()
    assert call(eval_script, folder, "--features", features, "--device", "cpu", "--labels",
                "corrected") == 0
    output = capsys.readouterr().out
    assert "first 160" not in output and "--labels shipped compares" in output
    assert drawn[0][-1] is None
    config = read_config(folder)["config"]
    assert published.published_history(config)
    for change in ({"splits": "0" * 64}, {"options": {**config["options"], "labels": "corrected"}}):
        assert published.published_history({**config, **change}) is None
    for other in (few(splits), deam.fold_splits(0, splits), {**splits, "val": splits["val"][1:]}):
        assert not published.are_published(other)
    compared(6, "others")
