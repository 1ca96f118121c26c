"""The numbers, the verdict, and what eval refuses."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, QUICK, call

import common
import eval as eval_script
import extract
import train
from common import json_digest, read_json, read_tensors


def random_labels(count=200):
    generator = np.random.default_rng(0)
    true = generator.normal(5, 1.3, (count, 2)).clip(1, 9).round(1)
    return true, (0.6 * true + 2 + generator.normal(0, 0.7, (count, 2)))


def test_metrics_against_textbook_formulas(compared):
    true, pred = random_labels()
    std = np.array([1.2, 1.4])
    metrics = eval_script.all_metrics(true, pred, std, False)
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
    q = eval_script.confusion_metrics(true, pred)
    assert q["confusion"] == [[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]] and q["accuracy"] == 0.5
    assert q["f1"] == pytest.approx({"HV/HA": 2 / 5, "LV/HA": 2 / 3, "LV/LA": 1.0, "HV/LA": 0.0})
    compared(len(true), "songs")


def test_constant_predictions_have_numbers():
    true, _ = random_labels(20)
    metrics = eval_script.all_metrics(true, np.full_like(true, 5.0), np.ones(2), False)
    assert metrics["valence"]["pearson"] == metrics["valence"]["ccc"] == 0
    assert all(np.isfinite(value).all() for value in eval_script.flat(metrics).values())


def test_published_statistics_hold_on_their_test_list(splits, compared):
    """The published protocol is shown for DEAM's own test list only: its digest is that of the frozen one."""
    assert json_digest(splits["test"]) == eval_script.PUBLISHED["test_songs"]
    true, pred = random_labels(175)
    metrics = eval_script.all_metrics(true, pred, np.array([1.2, 1.3]), True)["published_protocol"]
    assert metrics["z_mse"] == pytest.approx(np.mean(((pred - true)[:160] / [1.2, 1.3]) ** 2))
    compared(160, "songs")


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
    names = {"metrics.json", "predictions.csv", "true_vs_predicted.png", "plane.png", "confusion.png", "histograms.png"}
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
    compared(len(rows) + len(names), "predictions and files")


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
    assert "about other songs" in fails(eval_script, *base, "--verify", run / "eval-val/metrics.json")
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
    command = ["--deam", demo / "DEAM_demo", "--bundle", "DEMO", "--device", "cpu", "--precision", "float64"]
    call(extract, *command, "--features", tmp_path / "eleven", "--layer", 11, "--limit", 60)
    assert "trained on DEMO layer 10" in fails(eval_script, run, "--features", tmp_path / "eleven")
    call(extract, *command, "--features", tmp_path / "wider", "--limit", 60)
    assert "trained on features" in fails(eval_script, run, "--features", tmp_path / "wider")
    feats = shutil.copytree(demo / "DEAM_feats", tmp_path / "f")
    song = read_json(run / "config.json", "")["songs"] and next(iter(common.DEAMFeatHandler(feats, ROOT / "splits.json").ids["test"]))
    features = read_tensors(feats / "songs" / f"{song}.pt", "")
    features[0, 0] += 1
    torch.save(features, feats / "songs" / f"{song}.pt")
    assert f"{song}.pt is damaged" in fails(eval_script, run, "--features", feats)
    assert call(extract, "--check", demo / "DEAM_feats") == 0 and call(extract, "--check", feats) == 1
    (tmp_path / "other.json").write_text(json.dumps({name: ids[::-1] for name, ids in common.read_splits(ROOT / "splits.json").items()}))
    assert "other splits" in fails(eval_script, run, "--features", demo / "DEAM_feats", "--splits", tmp_path / "other.json")
    compared(5, "refusals")
