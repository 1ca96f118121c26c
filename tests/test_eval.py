"""The numbers, the verdict, and what eval refuses."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, call

import common
import eval as eval_script
import extract
from common import json_digest, read_json, read_tensors


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
    intervals = eval_script.bootstrap(true, pred, np.ones(2))
    for n, name in enumerate(("valence", "arousal")):
        errors = (pred - true)[:, n]
        for key, values in (("mse", errors**2), ("mae", abs(errors))):
            half = 1.96 * values.std() / len(values) ** 0.5
            assert intervals[name][key] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.1 * half)
        z, half = np.arctanh(np.corrcoef(true[:, n], pred[:, n])[0, 1]), 1.96 / (len(true) - 3) ** 0.5
        assert np.arctanh(intervals[name]["pearson"]) == pytest.approx([z - half, z + half], abs=0.15 * half)
    hits = (eval_script.quadrant(true) == eval_script.quadrant(pred)).mean()
    half = 1.96 * (hits * (1 - hits) / len(true)) ** 0.5
    assert intervals["quadrant"]["accuracy"] == pytest.approx([hits - half, hits + half], abs=0.1 * half)
    assert intervals == eval_script.bootstrap(true, pred, np.ones(2))  # a fixed seed
    compared(7, "intervals")


def test_the_bootstrap_of_a_test_split_takes_well_under_a_few_seconds(compared):
    """10,000 resamples of 175 songs, vectorised: a loop over them would take a minute."""
    import time

    true, pred = random_labels(175)
    start = time.monotonic()
    eval_script.bootstrap(true, pred, np.ones(2))
    assert time.monotonic() - start < 10
    compared(10_000, "resamples")


def test_ceiling_of_a_constructed_case(compared):
    """Labels that are a truth plus the mean of ten noisy opinions: predicting the truth reaches the ceiling."""
    generator = np.random.default_rng(0)
    truth = generator.normal(5, [1.0, 1.5], (20000, 2))
    opinions = truth[:, None] + generator.normal(0, 1.5, (20000, 10, 2))
    labels, spread = opinions.mean(1), opinions.std(1, ddof=1)
    reached = 1 - ((labels - truth) ** 2).mean(0) / labels.var(0)
    np.testing.assert_allclose(eval_script.ceiling(labels, spread), reached, atol=0.01)
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


def test_the_published_protocol_is_for_deams_own_test_list(splits, compared):
    assert json_digest(splits["test"]) == eval_script.PUBLISHED["test_songs"]
    compared(len(splits["test"]), "ids, in order")


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_evaluation_on_cached_features(demo, run, monkeypatch, capsys, compared):
    """No backbone, no audio: neither may be touched. predictions.csv, metrics.json and the printout agree."""
    monkeypatch.setattr(common, "Backbone", None)
    monkeypatch.setattr(common, "read_waveform", None)
    assert call(eval_script, run, "--features", demo / "DEAM_feats", "--device", "cpu") == 0
    output = capsys.readouterr().out
    out = run / "eval-test"
    figures = {"true_vs_predicted", "plane", "confusion", "histograms"}
    names = {"metrics.json", "predictions.csv", *(f"{name}.png" for name in figures)}
    assert {path.name for path in out.iterdir()} == names and all(path.stat().st_size > 200 for path in out.iterdir())
    found = read_json(out / "metrics.json", "")
    rows = list(csv.DictReader(open(out / "predictions.csv")))
    pred = np.array([[float(row["valence_pred"]), float(row["arousal_pred"])] for row in rows])
    true = np.array([[float(row["valence_true"]), float(row["arousal_true"])] for row in rows])
    assert found["predictions"] == {row["song_id"]: list(p) for row, p in zip(rows, pred.tolist())}
    assert found["metrics"]["valence"]["mse"] == pytest.approx(np.mean((pred - true)[:, 0] ** 2))
    assert f"{found['metrics']['arousal']['ccc']:8.4f}" in output and "say nothing about DEAM" in output
    assert "published_protocol" not in found["metrics"] and found["songs"] == 10
    for split, songs in (("train", 40), ("val", 10)):
        assert call(eval_script, run, "--features", demo / "DEAM_feats", "--split", split, "--device", "cpu") == 0
        assert read_json(run / f"eval-{split}/metrics.json", "")["songs"] == songs
    assert found["labels"] == "shipped" and set(found["intervals"]) >= {"valence", "arousal", "average", "quadrant"}
    assert found["ceiling_r2"]["valence"] > 0.8 and set(found["baselines"]) == {"training mean", "ridge"}
    assert found["baselines"]["ridge"]["arousal"]["r2"] > 0.4 > 0.1 > found["baselines"]["training mean"]["arousal"]["r2"]
    call(eval_script, run, "--features", demo / "DEAM_feats", "--pdf", "--device", "cpu")
    assert all((out / f"{name}.pdf").read_bytes().startswith(b"%PDF") for name in figures)
    compared(len(rows) + len(names), "predictions and files")


def test_a_table_of_several_runs(demo, run, capsys, compared):
    other = shutil.copytree(run, run.parent / "last1")
    assert call(eval_script, other, run, "--features", demo / "DEAM_feats", "--device", "cpu") == 0
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[0].split()[0] == "last1" and table[1].split()[0] == "run" and table[0].split()[1:] == table[1].split()[1:]
    assert table[2].startswith("mean ± std") and table[2].count("± 0.0000") == 9
    compared(9, "columns")


def test_a_collapse_is_called_one(capsys):
    true, _ = random_labels(50)
    for copy, said in ((1.0, True), (0.0, False)):
        pred = np.stack([true[:, 0], copy * true[:, 0] + (1 - copy) * true[:, 1]], 1) * 0.5 + 2
        metrics = eval_script.mapped(float, eval_script.all_metrics(true, pred, np.ones(2)))
        intervals = eval_script.bootstrap(true, pred, np.ones(2), 100)
        eval_script.print_report(metrics, intervals, eval_script.confusion(true, pred), {"valence": 1, "arousal": 1, "average": 1}, {})
        assert ("a collapse" in capsys.readouterr().out) == said


def test_verdicts(demo, run, tmp_path, capsys, compared):
    base = [run, "--features", demo / "DEAM_feats", "--device", "cpu"]
    call(eval_script, *base)
    earlier = read_json(run / "eval-test/metrics.json", "")
    song = next(iter(earlier["predictions"]))
    verdicts = {0.0: (0, "REPRODUCED"), 1e-6: (3, "CLOSE"), 0.0099: (3, "CLOSE"), 0.011: (1, "NOT REPRODUCED")}
    for change, (code, verdict) in verdicts.items():
        changed = json.loads(json.dumps(earlier))
        changed["predictions"][song][0] += change
        (tmp_path / "golden.json").write_text(json.dumps(changed))
        capsys.readouterr()
        assert call(eval_script, *base, "--verify", tmp_path / "golden.json", "--threads", 1) == code
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1].startswith(verdict)
        assert any(line.startswith("features ") and "identical" in line for line in lines)
        assert any(line.startswith("predictions of 10 songs") and ("identical" in line) == (change == 0) for line in lines)
    earlier["metrics"]["valence"]["mse"] += 1
    earlier["model"] = "0" * 64
    (tmp_path / "golden.json").write_text(json.dumps(earlier))
    call(eval_script, *base, "--verify", tmp_path / "golden.json")
    output = capsys.readouterr().out
    assert sum("DIFFERENT" in line for line in output.splitlines()) == 2
    compared(len(verdicts), "verdicts")


def test_golden_files_that_cannot_be_compared(demo, run, tmp_path, fails, compared):
    base = [run, "--features", demo / "DEAM_feats", "--device", "cpu"]
    call(eval_script, *base, "--split", "val")
    assert "about other songs or labels" in fails(eval_script, *base, "--verify", run / "eval-val/metrics.json")
    (tmp_path / "no.json").write_text("{}")
    (tmp_path / "list.json").write_text("[]")
    for name, says in (("no.json", "not a metrics.json"), ("list.json", "not a metrics.json"), ("none.json", "cannot read")):
        assert says in fails(eval_script, *base, "--verify", tmp_path / name)
    assert "only one" in fails(eval_script, run, *base, "--verify", run / "eval-val/metrics.json")
    compared(5, "refusals")


class Bomb:
    def __reduce__(self):
        return (open, ("bomb-went-off", "w"))


def test_checkpoints_that_are_none(demo, run, tmp_path, fails, monkeypatch, compared):
    monkeypatch.chdir(tmp_path)
    base = [run, "--features", demo / "DEAM_feats", "--device", "cpu"]
    good = read_tensors(run / "model.pt", "")
    for content, says in ((Bomb(), "not a trained model"), ({**good, "extra": Bomb()}, "not a trained model"), ({"state": {}}, "not a model that train.py wrote"),
                          ([1], "not a model that train.py wrote"), ({**good, "state": {"a": torch.zeros(1)}}, "not a model that train.py wrote")):
        torch.save(content, run / "model.pt")
        assert says in fails(eval_script, *base)
    assert not (tmp_path / "bomb-went-off").exists()
    (run / "model.pt").write_text("no")
    assert "not a trained model" in fails(eval_script, *base)
    (run / "model.pt").unlink()
    assert "cannot read a trained model" in fails(eval_script, *base)
    compared(7, "refusals")


def test_features_that_are_not_the_runs(demo, run, tmp_path, fails, compared):
    for name, settings in (("eleven", {"layer": 11}), ("other", {"precision": "float32"})):  # a manifest made so is a valid one
        folder = shutil.copytree(demo / "DEAM_feats", tmp_path / name)
        manifest = read_json(folder / "manifest.json", "")
        manifest["settings"] |= settings
        common.write_json(folder / "manifest.json", {**manifest, "digest": common.manifest_digest(manifest)})
    assert "trained on DEMO layer 10" in fails(eval_script, run, "--features", tmp_path / "eleven")
    assert "trained on features" in fails(eval_script, run, "--features", tmp_path / "other")
    feats = shutil.copytree(demo / "DEAM_feats", tmp_path / "f")
    song = common.DEAMFeatHandler(feats, ROOT / "splits.json").ids["test"][0]
    features = read_tensors(feats / "songs" / f"{song}.pt", "")
    features[0, 0] += 1
    torch.save(features, feats / "songs" / f"{song}.pt")
    assert f"{song}.pt is damaged" in fails(eval_script, run, "--features", feats)
    assert call(extract, "--check", demo / "DEAM_feats") == 0 and call(extract, "--check", feats) == 1
    (tmp_path / "other.json").write_text(json.dumps({name: ids[::-1] for name, ids in common.read_splits(ROOT / "splits.json").items()}))
    assert "other splits" in fails(eval_script, run, "--features", demo / "DEAM_feats", "--splits", tmp_path / "other.json")
    compared(5, "refusals")
