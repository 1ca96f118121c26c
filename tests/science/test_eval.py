"""The numbers, the report, the table of runs, and what eval refuses. Verdicts: test_record.py."""

import csv
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import FLOAT32, call, few, made_features

import common
import eval as eval_script
import extract
from kit import deam, metrics, records
from kit.files import load_tensors, read_json, read_tensors, write_json, write_tensors
import train

DIMENSIONS = ("valence", "arousal")
FROZEN = ["--finetune", "frozen", "--batch-size", "20", "--epochs", "1", *FLOAT32]


def random_labels(count=200):
    generator = np.random.default_rng(0)
    true = generator.normal(5, 1.3, (count, 2)).clip(1, 9).round(1)
    return true, 0.6 * true + 2 + generator.normal(0, 0.7, (count, 2))


# ---------------------------------------------------------------------------------------- numbers


def test_metrics_against_textbook_formulas(compared):
    true, pred = random_labels()
    std, count = np.array([1.2, 1.4]), 0
    found = metrics.all_metrics(true, pred, std)
    for n, name in enumerate(DIMENSIONS):
        t, p = true[:, n], pred[:, n]
        off, cov = p - t, np.cov(t, p, ddof=0)
        expected = {
            "mse": np.mean(off**2), "rmse": np.mean(off**2) ** 0.5, "mae": np.mean(abs(off)),
            "z_mse": np.mean((off / std[n]) ** 2), "z_rmse": np.mean((off / std[n]) ** 2) ** 0.5,
            "z_mae": np.mean(abs(off / std[n])), "pearson": np.corrcoef(t, p)[0, 1],
            "r2": 1 - np.sum(off**2) / np.sum((t - t.mean()) ** 2),
            "ccc": 2 * cov[0, 1] / (cov[0, 0] + cov[1, 1] + (t.mean() - p.mean()) ** 2)}
        assert found[name] == pytest.approx(expected, rel=1e-10)
        count += len(expected)
    mean_r2 = (found["valence"]["r2"] + found["arousal"]["r2"]) / 2
    assert found["average"]["r2"] == pytest.approx(mean_r2)
    assert found["valence_arousal_correlation"] == pytest.approx(
        {"true": np.corrcoef(true.T)[0, 1], "predicted": np.corrcoef(pred.T)[0, 1]})
    compared(count + 3, "metrics")


def test_quadrants_and_f1_counted_by_hand(compared):
    true = np.array([[6, 6], [6, 6], [4, 6], [4, 4], [6, 4], [5, 5]], float)  # 5 counts as high
    pred = np.array([[6, 6], [4, 6], [4, 6], [4, 4], [6, 6], [5, 4.999]], float)
    assert metrics.confusion(true, pred).tolist() == [
        [1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]
    q = metrics.all_metrics(true, pred, np.ones(2))["quadrant"]
    assert q["accuracy"] == 0.5 and q["macro_f1"] == pytest.approx((2 / 5 + 2 / 3 + 1) / 4)
    assert {name: float(value) for name, value in q["f1"].items()} == pytest.approx(
        {"HV/HA": 2 / 5, "LV/HA": 2 / 3, "LV/LA": 1.0, "HV/LA": 0.0})
    compared(len(true), "songs")


def metric(true, pred):
    return metrics.all_metrics(true, pred, np.ones(2))


def test_constant_predictions_have_numbers(compared):
    true, _ = random_labels(20)
    found = metric(true, np.full_like(true, 5.0))
    assert found["valence"]["pearson"] == found["valence"]["ccc"] == 0
    numbers = eval_script.flat(found)
    assert all(np.isfinite(value).all() for value in numbers.values())
    compared(len(numbers), "numbers")


def test_bootstrap_against_a_normal_approximation(compared):
    """For a mean over many songs the interval is mean ± 1.96 standard errors; for r Fisher's."""
    true, pred = random_labels(1000)
    intervals = metrics.bootstrap(metric, true, pred)
    for n, name in enumerate(DIMENSIONS):
        errors = (pred - true)[:, n]
        for key, values in (("mse", errors**2), ("mae", abs(errors))):
            mean, half = values.mean(), 1.96 * values.std() / len(values) ** 0.5
            assert intervals[name][key] == pytest.approx([mean - half, mean + half], abs=0.1 * half)
        z = np.arctanh(np.corrcoef(true[:, n], pred[:, n])[0, 1])
        half = 1.96 / (len(true) - 3) ** 0.5
        found = np.arctanh(intervals[name]["pearson"])
        assert found == pytest.approx([z - half, z + half], abs=0.15 * half)
    hits = (deam.quadrant(true, 5) == deam.quadrant(pred, 5)).mean()
    half = 1.96 * (hits * (1 - hits) / len(true)) ** 0.5
    assert intervals["quadrant"]["accuracy"] == pytest.approx([hits - half, hits + half],
                                                              abs=0.1 * half)
    compared(7, "intervals")


def test_the_bootstrap_repeats_itself_and_takes_seconds(compared):
    """10,000 resamples of 175 songs, vectorised: a loop over them would take a minute."""
    true, pred = random_labels(175)
    start = time.monotonic()
    intervals = metrics.bootstrap(metric, true, pred)
    assert time.monotonic() - start < 10
    assert intervals == metrics.bootstrap(metric, true, pred)
    compared(10_000, "resamples")


def test_resampling_groups_sees_that_copies_are_not_new_songs(compared):
    """Every song four times over: resampled as songs the interval is half as wide as it should be;
    resampled in groups it is that of the songs without their copies."""
    true, pred = random_labels(150)
    copies = np.repeat(true, 4, 0), np.repeat(pred, 4, 0)
    width = {}
    for name, data, groups in (("once", (true, pred), None), ("copies", copies, None),
                               ("groups", copies, np.repeat(np.arange(150), 4))):
        low, high = metrics.bootstrap(metric, *data, groups=groups)["valence"]["mse"]
        width[name] = high - low
    assert width["groups"] == pytest.approx(width["once"], rel=0.1)
    assert width["copies"] == pytest.approx(width["once"] / 2, rel=0.1)
    compared(3, "intervals")


def test_ceiling_of_a_constructed_case(compared):
    """Labels that are a truth and the mean of ten noisy opinions: the truth reaches the ceiling."""
    generator = np.random.default_rng(0)
    truth = generator.normal(5, [1.0, 1.5], (20000, 2))
    opinions = truth[:, None] + generator.normal(0, 1.5, (20000, 10, 2))
    labels, spread = opinions.mean(1), opinions.std(1, ddof=1)
    reached = 1 - ((labels - truth) ** 2).mean(0) / labels.var(0)
    top = metrics.ceiling(labels, spread)
    np.testing.assert_allclose([top[name] for name in DIMENSIONS], reached, atol=0.01)
    assert top["average"] == pytest.approx((top["valence"] + top["arousal"]) / 2)
    compared(3, "ceilings")


def test_ridge_against_a_direct_solve(compared):
    generator = np.random.default_rng(0)
    x, x_val = generator.normal(3, 2, (60, 20)), generator.normal(3, 2, (30, 20))
    weights = generator.normal(0, 0.2, (20, 2))
    y, y_val = (rows @ weights + generator.normal(0, 1, (len(rows), 2)) for rows in (x, x_val))
    predict, penalty = metrics.ridge(x, y, x_val, y_val)

    def direct(penalty):
        z, z_val = ((rows - x.mean(0)) / x.std(0) for rows in (x, x_val))
        solved = np.linalg.solve(z.T @ z + penalty * np.eye(20), z.T @ (y - y.mean(0)))
        return z_val @ solved + y.mean(0)

    np.testing.assert_allclose(predict(x_val), direct(penalty), atol=1e-10)
    grid = 10.0 ** np.arange(-2, 7.5, 0.5)
    best = int(np.argmin([((direct(other) - y_val) ** 2).mean() for other in grid]))
    assert penalty == grid[best] and 0 < best < len(grid) - 1
    compared(len(grid), "penalties")


# ------------------------------------------------------------------------------------- evaluation


@pytest.fixture(scope="module")
def small(splits, no_histories, tmp_path_factory):
    """(features of 60 made songs, [three runs: seeds 0 and 1, and another learning rate])."""
    folder = tmp_path_factory.mktemp("small")
    features, runs = made_features(folder / "DEAM_feats", few(splits)), []
    for name, more in (("seed0", []), ("seed1", ["--seed", "1"]), ("lr", ["--lr", "4e-5"])):
        runs.append(folder / name)
        assert call(train, "--features", features, "--run", runs[-1], *FROZEN, *more) == 0
    return features, runs


@pytest.fixture
def command(small, tmp_path):
    """The command line that evaluates a copy of the first of the small runs."""
    run = shutil.copytree(small[1][0], tmp_path / "run")
    return run, "--features", small[0], "--device", "cpu"


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take most of an evaluation's time."""
    monkeypatch.setattr(eval_script.figures, "draw_report", lambda *_: None)


def read_predictions(out):
    """(song ids, true, predicted [N, 2]) of predictions.csv."""
    rows = list(csv.DictReader(open(out / "predictions.csv")))
    true, pred = (np.array([[float(row[f"{name}_{kind}"]) for name in DIMENSIONS] for row in rows])
                  for kind in ("true", "pred"))
    return [row["song_id"] for row in rows], true, pred


FIGURES = {f"{name}.{kind}" for name in ("true_vs_predicted", "plane", "confusion", "histograms")
           for kind in ("png", "pdf")}


def test_evaluation_on_cached_features(features, trained, tmp_path, monkeypatch, capsys, compared):
    """No backbone, no audio: neither may be touched. predictions.csv, metrics.json and the printout
    agree; every split can be evaluated."""
    for name in ("Backbone", "read_waveform"):
        monkeypatch.setattr(common, name, None)
    run = shutil.copytree(trained, tmp_path / "run")
    command = run, "--features", features, "--device", "cpu"
    assert call(eval_script, *command) == 0
    output, out = capsys.readouterr().out, run / "eval-test"
    assert {path.name for path in out.iterdir()} == {"metrics.json", "predictions.csv", *FIGURES}
    heads = {"png": b"\x89PNG", "pdf": b"%PDF"}
    assert all((out / name).read_bytes().startswith(heads[name[-3:]]) for name in FIGURES)
    found = read_json(out / "metrics.json", "", eval_script.METRICS)
    songs, true, pred = read_predictions(out)
    assert found["predictions"] == dict(zip(songs, pred.tolist()))
    numbers = found["numbers"]
    assert numbers["metrics"]["valence"]["mse"] == pytest.approx(np.mean((pred - true)[:, 0] ** 2))
    assert f"{numbers['metrics']['arousal']['ccc']:8.4f}" in output
    assert "say nothing about DEAM" in output and "say nothing about DEAM" in found["source"]
    assert set(numbers["baselines"]) == {"training mean", "ridge"} and found["songs"] == 10
    assert numbers["ceiling_r2"]["valence"] > 0.8
    assert not {"published_protocol", "new_artists"} & set(numbers)  # not the published splits
    r2 = {name: values["arousal"]["r2"] for name, values in numbers["baselines"].items()}
    assert r2["ridge"] > 0.4 > 0.1 > r2["training mean"]
    monkeypatch.setattr(eval_script.figures, "draw_report", lambda *_: None)
    for split, count in (("train", 40), ("val", 10)):
        assert call(eval_script, *command, "--split", split) == 0
        assert read_json(run / f"eval-{split}/metrics.json", "")["songs"] == count
    compared(len(songs) + len(FIGURES), "predictions and figures")


def test_other_labels_are_written_beside(command, undrawn, capsys, compared):
    """Evaluating with other labels than the run's leaves its own evaluation as it is."""
    run = command[0]
    call(eval_script, *command)
    kept = (run / "eval-test/metrics.json").read_bytes()
    capsys.readouterr()
    assert call(eval_script, *command, "--labels", "corrected") == 0
    assert "for comparison: the run was trained on shipped labels" in capsys.readouterr().out
    assert (run / "eval-test/metrics.json").read_bytes() == kept
    own, other = (read_json(run / name / "metrics.json", "")
                  for name in ("eval-test", "eval-test-corrected"))
    assert (other["labels"], other["trained_on_labels"]) == ("corrected", "shipped")
    assert own["labels"] == "shipped" and own["predictions"] == other["predictions"]
    assert own["numbers"]["confusion"] != other["numbers"]["confusion"]
    compared(2, "reports")


def test_published_protocol_and_new_artists(splits, undrawn, tmp_path, capsys, compared):
    """On DEAM's own splits, and no others: the first 160 test songs as published, and a row of the
    songs by artists that are not in train or val."""
    features = made_features(tmp_path / "DEAM_feats", splits)
    run = tmp_path / "run"
    call(train, "--features", features, "--run", run, *FROZEN, "--labels", "corrected",
         "--batch-size", "300")
    capsys.readouterr()
    assert call(eval_script, run, "--features", features, "--device", "cpu") == 0
    output = capsys.readouterr().out
    found = read_json(run / "eval-test/metrics.json", "")
    artists, (songs, true, pred) = deam.read_artists(), read_predictions(run / "eval-test")
    known = splits["train"] + splits["val"]
    labels = deam.corrected(deam.read_annotations(features / "annotations.csv"), [[1, 1000]])
    std = np.array([labels[song][::2] for song in known]).std(0)
    protocol = found["numbers"]["published_protocol"]
    assert protocol["z_mse"] == pytest.approx(np.mean(((pred - true) / std)[:160] ** 2))
    assert protocol["quadrants_right"] == ((pred >= 5) == (true >= 5)).all(1)[:160].sum()
    assert f"z-scored MSE {protocol['z_mse']:.4f} (published 0.4945)" in output
    heard = {artists[song] for song in known}
    new = np.array([artists[int(song)] not in heard for song in songs])
    row = found["numbers"]["new_artists"]
    assert row["songs"] == new.sum() == 56
    assert row["metrics"]["arousal"]["pearson"] == pytest.approx(
        np.corrcoef(true[new, 1], pred[new, 1])[0, 1])
    low, high = row["intervals"]["valence"]["r2"]
    assert low < row["metrics"]["valence"]["r2"] < high
    assert output.count("  56 songs by artists not in train or val: R² ") == 3
    compared(len(songs), "test songs")


# ------------------------------------------------------------------------------------------ table


def table_of(small, names, capsys):
    """(rows of numbers by name, all lines) of the table that eval prints of some runs."""
    features, runs = small
    assert call(eval_script, *[run for run in runs if run.name in names], "--features", features,
                "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    start = max(n for n, line in enumerate(lines) if line.startswith("run "))
    return {line[:20].strip(): line[20:].split() for line in lines[start:]}, lines


def test_mean_and_deviation_over_seeds_alone(small, undrawn, capsys, compared):
    rows, _ = table_of(small, ("seed0", "seed1"), capsys)
    numbers = np.array([rows["seed0"], rows["seed1"]], float)
    assert rows["run"][-2:] == ["pred.", "r"] and numbers.shape == (2, 10)
    mean, std = (np.array(rows["mean ± std"][n::3], float) for n in (0, 2))
    np.testing.assert_allclose(mean, numbers.mean(0), atol=2e-4)
    np.testing.assert_allclose(std, numbers.std(0, ddof=1), atol=2e-4)
    assert len(rows["ridge"]) == 10 and len(rows["ceiling"]) == 2  # of R² alone
    found = read_json(small[1][0] / "eval-test/metrics.json", "")["numbers"]
    assert rows["ridge"][-1] == \
        f"{found['baselines']['ridge']['valence_arousal_correlation']['predicted']:.4f}"
    assert rows["ceiling"][0] == f"{found['ceiling_r2']['valence']:.4f}"
    compared(numbers.size + 22, "numbers")


def test_no_mean_over_runs_that_differ_otherwise(small, undrawn, capsys, compared):
    rows, lines = table_of(small, ("seed0", "lr"), capsys)
    assert "the runs differ in lr: no mean over them" in lines and "mean ± std" not in rows
    assert {"seed0", "lr", "ridge", "ceiling"} <= set(rows)
    compared(2, "runs")


def test_files_are_read_once_for_several_runs(small, undrawn, monkeypatch, compared):
    """Train and val once, for ridge; of the test split once more a run: its layers differ."""
    features, runs = small
    read = []
    monkeypatch.setattr(common, "COMPARED", set())
    monkeypatch.setattr(eval_script, "POOLED", {})
    monkeypatch.setattr(common, "load_tensors",
                        lambda path, what: read.append(path.stem) or load_tensors(path, what))
    call(eval_script, *runs, "--features", features, "--device", "cpu")
    splits = deam.read_splits(features / "splits.json")
    assert sorted(each for each in read if int(each) not in splits["test"]) == sorted(
        map(str, splits["train"] + splits["val"]))
    compared(len(read), "reads")


def numbers_of(true, pred, ridge_pred):
    """What a report says of predictions of songs 1, 2, …"""
    labels = np.insert(true, [1, 2], 1, axis=1)
    annotations = dict(enumerate(labels.tolist(), 1))
    preds = [dict(zip(map(str, annotations), values.tolist())) for values in (pred, ridge_pred)]
    return metrics.measure(annotations, list(annotations), list(annotations), *preds)


@pytest.mark.parametrize("copy, said", [(1.0, True), (0.0, False)])
def test_a_collapse_is_called_one(capsys, compared, copy, said):
    true, _ = random_labels(50)
    pred = np.stack([true[:, 0], copy * true[:, 0] + (1 - copy) * true[:, 1]], 1) * 0.5 + 2
    eval_script.print_numbers(numbers_of(true, pred, pred), 50)
    assert ("a collapse" in capsys.readouterr().out) == said
    compared(1, "line")


def test_where_ridge_does_better_a_line_says_so(capsys, compared):
    true, pred = random_labels(50)
    better = np.stack([true[:, 0], np.full(50, 3.0)], 1)  # in valence alone
    eval_script.print_numbers(numbers_of(true, pred, better), 50)
    output = capsys.readouterr().out
    assert "ridge on the same features does better than the network for valence (R² 1.00" in output
    assert "arousal (R²" not in output and ", ridge's 0.0000" in output  # its predicted correlation
    compared(2, "dimensions")


# --------------------------------------------------------------------------------------- refusals


class Bomb:
    def __reduce__(self):
        return (open, ("bomb-went-off", "w"))


def test_checkpoints_that_are_none(command, tmp_path, fails, monkeypatch, compared):
    monkeypatch.chdir(tmp_path)
    file = command[0] / "model.pt"
    good, none = read_tensors(file, "", eval_script.MODEL), "is not a trained model"
    for content, says in ((Bomb(), none), ({**good, "extra": Bomb()}, none), ([1], "no digest"),
                          (good, "no digest"), ({**good, "digest": "0" * 64}, "is damaged")):
        torch.save(content, file)
        assert says in fails(eval_script, *command)
    assert not (tmp_path / "bomb-went-off").exists()
    for change, says in (({"state": {"a": torch.zeros(1)}}, "not a model that train.py"),
                         ({"mean": torch.zeros(3)}, "not a model that train.py"),
                         ({"params": {}}, none)):
        write_tensors(file, {**good, **change})  # of the right digest
        assert says in fails(eval_script, *command)
    write_tensors(file, {"state": {}})
    assert none in fails(eval_script, *command)
    file.write_text("no")
    assert none in fails(eval_script, *command)
    file.unlink()
    assert "is not finished: train.py with --resume" in fails(eval_script, *command)
    (command[0] / "last.pt").unlink()
    assert "cannot read a trained model" in fails(eval_script, *command)
    compared(12, "refusals")


def test_files_that_are_not_of_one_run(small, command, fails, compared):
    run = command[0]
    for name, says in (("config.json", "lr 4e-05 there, 3e-05 now"), ("model.pt", "of one run")):
        kept = (run / name).read_bytes()
        shutil.copy(small[1][2] / name, run)
        assert says in fails(eval_script, *command)
        (run / name).write_bytes(kept)
    splits = read_json(run / "splits.json", "")
    for change, says in (({"test": splits["test"][::-1]}, "not the one that the run was trained"),
                         ({"source": "DEAM"}, "names another source")):
        write_json(run / "splits.json", {**splits, **change})
        assert says in fails(eval_script, *command)
    compared(4, "refusals")


def test_features_that_are_not_the_runs(small, tmp_path, fails, compared):
    run = small[1][0]
    features = shutil.copytree(small[0], tmp_path / "f")
    song = read_json(features / "splits.json", "")["test"][0]
    file = features / "songs" / f"{song}.pt"
    states = load_tensors(file, "")
    torch.save(states + 1, file)
    assert f"{song}.pt is damaged" in fails(eval_script, run, "--features", features)
    assert call(extract, "--check", small[0]) == 0 and call(extract, "--check", features) == 1
    torch.save(states, file)
    manifest = read_json(features / "manifest.json", "")
    manifest["settings"]["precision"] = "exact"  # a manifest made so is a valid one
    write_json(features / "manifest.json",
               {**manifest, "digest": records.manifest_digest(manifest)})
    assert "was trained on features" in fails(eval_script, run, "--features", features)
    compared(4, "features")
