"""The numbers, the verdict, and what eval refuses."""

import copy
import csv
import functools
import shutil

import numpy as np
import pytest
from conftest import ROOT, call

import common
import eval as eval_script
import train
from conftest import QUICK
from files import json_digest, read_json, write_json


def random_labels(count=200):
    generator = np.random.default_rng(0)
    true = generator.normal(5, 1.3, (count, 2)).clip(1, 9).round(1)
    return true, (0.6 * true + 2 + generator.normal(0, 0.7, (count, 2)))


def test_metrics_against_textbook_formulas(compared):
    true, pred = random_labels()
    std = np.array([1.2, 1.4])
    metrics = eval_script.all_metrics(true, pred, std)
    count = 0
    for n, name in enumerate(("valence", "arousal")):
        t, p = true[:, n], pred[:, n]
        covariance = np.cov(t, p, ddof=0)
        expected = {"mse": np.mean(np.square(t - p)), "rmse": np.sqrt(np.mean(np.square(t - p))), "mae": np.mean(np.abs(t - p)),
                    "z_mse": np.mean(np.square((t - p) / std[n])), "z_rmse": np.sqrt(np.mean(np.square((t - p) / std[n]))), "z_mae": np.mean(np.abs(t - p) / std[n]),
                    "r2": 1 - np.sum((t - p) ** 2) / np.sum((t - t.mean()) ** 2), "pearson": np.corrcoef(t, p)[0, 1],
                    "ccc": 2 * covariance[0, 1] / (covariance[0, 0] + covariance[1, 1] + (t.mean() - p.mean()) ** 2)}
        assert metrics[name] == pytest.approx(expected, rel=1e-10)
        count += len(expected)
    assert metrics["average"]["r2"] == pytest.approx((metrics["valence"]["r2"] + metrics["arousal"]["r2"]) / 2)
    assert metrics["valence_arousal_correlation"] == pytest.approx({"true": np.corrcoef(true.T)[0, 1], "predicted": np.corrcoef(pred.T)[0, 1]})
    compared(count, "metrics")


def test_quadrants_and_f1_counted_by_hand(compared):
    true = np.array([[6, 6], [6, 6], [4, 6], [4, 4], [6, 4], [5, 5]], float)  # 5 counts as high
    pred = np.array([[6, 6], [4, 6], [4, 6], [4, 4], [6, 6], [5, 4.999]], float)
    assert eval_script.confusion(true, pred).tolist() == [[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]
    q = eval_script.all_metrics(true, pred, np.ones(2))["quadrant"]
    assert q["accuracy"] == 0.5
    assert {name: float(value) for name, value in q["f1"].items()} == pytest.approx({"HV/HA": 2 / 5, "LV/HA": 2 / 3, "LV/LA": 1.0, "HV/LA": 0.0})
    compared(len(true), "songs")


def test_constant_predictions_have_numbers():
    true, _ = random_labels(20)
    metrics = eval_script.all_metrics(true, np.full_like(true, 5.0), np.ones(2))
    assert metrics["valence"]["pearson"] == metrics["valence"]["ccc"] == 0
    assert all(np.isfinite(value).all() for value in eval_script.flat(metrics).values())


def test_bootstrap_against_a_normal_approximation(compared):
    """For a mean over many songs the percentile interval is mean ± 1.96 standard errors; for r it is Fisher's."""
    true, pred = random_labels(2000)
    metric = functools.partial(eval_script.all_metrics, std=np.ones(2))
    intervals = eval_script.bootstrap(metric, true, pred)
    for n, name in enumerate(("valence", "arousal")):
        errors = (pred - true)[:, n]
        for key, values in (("mse", errors**2), ("mae", abs(errors))):
            half = 1.96 * values.std() / len(values) ** 0.5
            assert intervals[name][key] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.1 * half)
        z, half = np.arctanh(np.corrcoef(true[:, n], pred[:, n])[0, 1]), 1.96 / (len(true) - 3) ** 0.5
        assert np.arctanh(intervals[name]["pearson"]) == pytest.approx([z - half, z + half], abs=0.15 * half)
    hits = (eval_script.quadrant(true, 5) == eval_script.quadrant(pred, 5)).mean()
    half = 1.96 * (hits * (1 - hits) / len(true)) ** 0.5
    assert intervals["quadrant"]["accuracy"] == pytest.approx([hits - half, hits + half], abs=0.1 * half)
    assert intervals == eval_script.bootstrap(metric, true, pred)  # a fixed seed
    compared(7, "intervals")


def test_ceiling_of_a_constructed_case(compared):
    """Labels that are a truth plus the mean of ten noisy opinions: predicting the truth reaches the ceiling."""
    generator = np.random.default_rng(0)
    truth = generator.normal(5, [1.0, 1.5], (20000, 2))
    opinions = truth[:, None] + generator.normal(0, 1.5, (20000, 10, 2))
    labels, spread = opinions.mean(1), opinions.std(1, ddof=1)
    reached = 1 - ((labels - truth) ** 2).mean(0) / labels.var(0)
    np.testing.assert_allclose([eval_script.ceiling(labels, spread)[name] for name in eval_script.DIMENSIONS],
                               reached, atol=0.01)
    compared(2, "dimensions")


def test_ridge_against_a_direct_solve(compared):
    generator = np.random.default_rng(0)
    x, x_val = generator.normal(3, 2, (60, 20)), generator.normal(3, 2, (30, 20))
    weights = generator.normal(0, 0.2, (20, 2))
    y, y_val = (rows @ weights + generator.normal(0, 1, (len(rows), 2)) for rows in (x, x_val))
    predict, penalty = eval_script.ridge(x, y, x_val, y_val)

    def direct(penalty):
        z, z_val = ((rows - x.mean(0)) / x.std(0) for rows in (x, x_val))
        return z_val @ np.linalg.solve(z.T @ z + penalty * np.eye(20), z.T @ (y - y.mean(0))) + y.mean(0)

    np.testing.assert_allclose(predict(x_val), direct(penalty), atol=1e-10)
    grid = 10.0 ** np.arange(-2, 7.5, 0.5)
    errors = [((direct(other) - y_val) ** 2).mean() for other in grid]
    assert penalty == grid[int(np.argmin(errors))] and 0 < np.argmin(errors) < len(grid) - 1
    compared(len(grid), "penalties")


def test_the_published_protocol_is_for_deams_own_splits(splits, compared):
    assert common.splits_digest(splits) == eval_script.PUBLISHED["splits"]
    annotations = {song: (1 + song % 8, 1.0, 1 + song % 7, 1.0) for song in common.songs_of(splits)}
    pred = {str(song): [5 + song % 3, 5 - song % 2] for song in splits["test"]}
    numbers = eval_script.measure_split(annotations, splits, "test", pred, None)
    assert numbers["new_artists"]["songs"] == 56
    assert 0 <= numbers["published_protocol"]["quadrants_right"] <= 160
    compared(len(splits["test"]), "songs")


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_evaluation_on_cached_features(features, run, monkeypatch, capsys, compared):
    """No backbone, no audio. predictions.csv, metrics.json and the printout agree."""
    monkeypatch.setattr(common, "Backbone", None)
    monkeypatch.setattr(common, "read_waveform", None)
    base = [run, "--features", features, "--device", "cpu"]
    assert call(eval_script, *base) == 0
    output, out = capsys.readouterr().out, run / "eval-test"
    names = {"metrics.json", "predictions.csv", *(f"{name}.{kind}" for kind in ("png", "pdf") for name
             in ("true_vs_predicted", "plane", "confusion", "histograms"))}
    assert {path.name for path in out.iterdir()} == names
    found, rows = read_json(out / "metrics.json", ""), [*csv.DictReader(open(
        out / "predictions.csv"))]
    pred, true = (np.array([[float(row[f"{name}_{kind}"]) for name in eval_script.DIMENSIONS]
                            for row in rows]) for kind in ("pred", "true"))
    assert found["predictions"] == {row["song_id"]: p for row, p in zip(rows, pred.tolist())}
    metrics = found["numbers"]["metrics"]
    assert metrics["valence"]["mse"] == pytest.approx(np.mean((pred - true)[:, 0] ** 2))
    assert f"{metrics['arousal']['ccc']:8.4f}" in output and "say nothing about DEAM" in output
    for split, songs in (("train", 40), ("val", 10)):
        assert call(eval_script, *base, "--split", split) == 0
        assert read_json(run / f"eval-{split}/metrics.json", "")["songs"] == songs
    assert call(eval_script, *base, "--labels", "corrected") == 0  # beside, not over
    assert read_json(run / "eval-test-corrected/metrics.json", "")["labels"] == "corrected"
    assert read_json(out / "metrics.json", "") == found
    compared(len(rows), "songs")


def test_a_table_of_runs(features, trained, tmp_path, capsys, compared):
    for name, options in (("b", ["--seed", 1]), ("c", ["--lr", 1e-4])):
        assert call(train, "--features", features, "--run", tmp_path / name, *QUICK, *options) == 0
    a, base = shutil.copytree(trained, tmp_path / "a"), ["--features", features, "--device", "cpu"]
    capsys.readouterr()
    assert call(eval_script, a, tmp_path / "b", *base) == 0
    output = capsys.readouterr().out
    assert "mean ± std" in output and "\nridge  " in output and "\nceiling  " in output
    assert call(eval_script, a, tmp_path / "c", *base, "--against", tmp_path / "b") == 0
    output = capsys.readouterr().out
    assert "the runs differ in lr" in output and "mean ± std" not in output
    assert "a less b, the same 10 songs" in output
    compared(3, "runs")


def test_folds_pool_songs_that_no_model_heard(features, tmp_path, capsys, compared):
    runs = [tmp_path / f"frozen-fold{fold}" for fold in (0, 1)]
    for fold, run in enumerate(runs):
        assert call(train, "--features", features, "--run", run, *QUICK, "--finetune", "frozen",
                    "--fold", fold, "--epochs", 1) == 0
    capsys.readouterr()
    assert call(eval_script, *runs, "--features", features, "--device", "cpu") == 0
    found = read_json(tmp_path / "frozen-pooled/eval-pooled-folds/metrics.json", "")
    tests = [read_json(run / "splits.json", "")["test"] for run in runs]
    assert sorted(map(int, found["predictions"])) == sorted(sum(tests, []))
    compared(found["songs"], "songs of two folds")


def test_ten_folds_by_artist(splits, compared):
    import folds

    content, artists = read_json(ROOT / "folds.json", ""), common.read_artists()
    songs = sum(content["folds"], [])
    assert sorted(songs) == sorted(common.songs_of(splits)) and len(songs) == 1744
    by_fold = [{artists[song] for song in fold} for fold in content["folds"]]
    assert sum(map(len, by_fold)) == len(set().union(*by_fold)) == 878
    assert {len(fold) for fold in content["folds"]} == {174, 175}
    assert folds.draw(artists, content["seed"]) == content["folds"]
    compared(len(songs), "songs")


# ------------------------------------------------------------------------------------------- verdicts


@pytest.fixture(scope="module")
def record(clone, tmp_path_factory):
    """The unpacked record of the demo's run, made as README says."""
    import subprocess
    import sys

    folder, _ = clone
    command = [sys.executable, folder / "tests/record.py", folder / "demo/run"]
    digests = []
    for name in ("one", "two"):
        place = tmp_path_factory.mktemp(name)
        digests.append(subprocess.run(command, cwd=place, check=True, capture_output=True,
                                      text=True).stdout.splitlines()[1])
    assert digests[0] == digests[1]  # the same tar
    subprocess.run(["tar", "xf", "run.tar"], cwd=place, check=True)
    return place / "run"


def test_a_record_is_checked_at_every_depth(clone, record, compared):
    demo, file = clone[0] / "demo", record / "eval-test/metrics.json"
    assert call(eval_script, "--verify", file, "--deam", demo / "DEAM") == 0
    import extract

    assert call(extract, "--verify", record / "manifest.json", "--deam", demo / "DEAM", "--weights",
                demo / "backbone", "--sample", 2, "--device", "cpu") == 0
    assert call(train, "--verify", record, "--steps", 1, "--features", demo / "DEAM_feats",
                "--device", "cpu") == 0
    assert call(eval_script, demo / "run", "--features", demo / "DEAM_feats", "--verify", file,
                "--device", "cpu") == 0
    compared(4, "verdicts")


def leaves(value, path=()):
    if isinstance(value, (dict, list)) and value:
        for key in (value if isinstance(value, dict) else range(len(value))):
            yield from leaves(value[key], (*path, key))
    else:
        yield path


@pytest.mark.parametrize("rehashed", [False, True])
def test_no_edited_number_is_reproduced(clone, record, tmp_path, compared, rehashed):
    """Every kind of field of metrics.json changed, its own digest left or made anew. Free text (the
    run's name, the environment) decides nothing; a penalty is checked where there are features."""
    from cli import UserError

    run = shutil.copytree(record, tmp_path / "run")
    file, demo = run / "eval-test/metrics.json", clone[0] / "demo"
    whole, count = read_json(file, ""), 0
    places = [path for path in leaves(whole) if path[0] not in ("run", "environment", "digest",
                                                                "ridge_penalty", "swapped_labels")]
    chosen = [path for n, path in enumerate(places) if n % (45 if rehashed else 150) == 0]
    for path in chosen:
        for change in (lambda value: value + 0.001 if isinstance(value, float) else "other",
                       lambda value: {}):
            content = copy.deepcopy(whole)
            inner = content
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = change(inner[path[-1]])
            if rehashed:
                content.pop("digest")
                content["digest"] = json_digest(content)
            write_json(file, content)
            try:
                code = call(eval_script, "--verify", file, "--deam", demo / "DEAM")
            except UserError:
                code = 2
            assert code in (1, 2), path
            count += 1
    compared(count, "edits")
