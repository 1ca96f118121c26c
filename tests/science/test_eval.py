"""eval.py: the report, the table of runs, differences, and what is refused. Numbers themselves:
kit/test_metrics.py; verdicts: commands/test_verify.py."""

import csv
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import FLOAT32, call, few, made_features

import common
import eval as eval_script
from kit import evaluations, features as features_kit, metrics, records, report
from kit.deam import DIMENSIONS, Labels, read_splits
from kit.files import load_tensors, read_json, read_tensors, write_json, write_tensors
import train
import verify

FROZEN = ["--finetune", "frozen", "--batch-size", "20", "--epochs", "1", *FLOAT32]


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
    monkeypatch.setattr("kit.figures.draw_report", lambda *_: None)


def read_predictions(out):
    """(song ids, true, predicted [N, 2]) of predictions.csv."""
    rows = list(csv.DictReader(open(out / "predictions.csv")))
    true, pred = (np.array([[float(row[f"{name}_{kind}"]) for name in DIMENSIONS] for row in rows])
                  for kind in ("true", "pred"))
    return [row["song_id"] for row in rows], true, pred


FIGURES = {f"{name}.{kind}" for name in ("true_vs_predicted", "confusion")
           for kind in ("png", "pdf")}


def test_evaluation_on_cached_features(command, monkeypatch, capsys, compared):
    """No backbone, no audio: neither may be touched. predictions.csv, metrics.json and the printout
    agree."""
    for name in ("Backbone", "read_waveform"):
        monkeypatch.setattr(common, name, None)
    run, _, features, *_ = command
    assert call(eval_script, *command) == 0
    output, out = capsys.readouterr().out, run / "eval-test"
    assert {path.name for path in out.iterdir()} == {"metrics.json", "predictions.csv", *FIGURES}
    heads = {"png": b"\x89PNG", "pdf": b"%PDF"}
    assert all((out / name).read_bytes().startswith(heads[name[-3:]]) for name in FIGURES)
    found = read_json(out / "metrics.json", "", records.METRICS)
    songs, true, pred = read_predictions(out)
    assert found["predictions"] == dict(zip(songs, pred.tolist()))
    numbers = found["numbers"]
    assert numbers["metrics"]["valence"]["mse"] == pytest.approx(np.mean((pred - true)[:, 0] ** 2))
    assert f"R² {report.with_interval(numbers, 'arousal', 'r2')} " in output
    assert "songs: a few made songs" in output
    assert found["source"] == "a few made songs" and found["songs"] == 10
    assert set(numbers["baselines"]) == {"training mean", "ridge"}
    assert numbers["noise_ceiling"]["metrics"]["valence"]["r2"] > 0.8
    assert not {"published", "unseen_artists"} & set(numbers)  # not the published splits
    r2 = {name: values["arousal"]["r2"] for name, values in numbers["baselines"].items()}
    assert r2["ridge"] > 0.4 > 0.1 > r2["training mean"]
    known = read_splits(run / "splits.json")
    labels = metrics.true_values(common.DEAMFeatHandler(features).annotations,
                                 known["train"] + known["val"])
    error = abs(pred - true)[:, 1].mean() / labels[:, 1].std()
    assert numbers["z_scored"]["arousal"]["mae"] == pytest.approx(error)
    compared(len(songs) + len(FIGURES), "predictions and figures")


def test_every_split_can_be_evaluated(command, undrawn, compared):
    for split, count in (("train", 40), ("val", 10)):
        assert call(eval_script, *command, "--split", split) == 0
        assert read_json(command[0] / f"eval-{split}/metrics.json", "")["songs"] == count
    compared(2, "splits")


def test_other_labels_are_written_beside(command, undrawn, capsys, compared):
    """Evaluating with other labels than the run's leaves its own evaluation as it is."""
    run = command[0]
    call(eval_script, *command)
    kept = (run / "eval-test/metrics.json").read_bytes()
    capsys.readouterr()
    assert call(eval_script, *command, "--labels", "corrected") == 0
    title = capsys.readouterr().out.split("\n\n")[0]
    assert "corrected labels (trained on shipped ones)" in " ".join(title.split())
    assert (run / "eval-test/metrics.json").read_bytes() == kept
    own, other = (read_json(run / name / "metrics.json", "")
                  for name in ("eval-test", "eval-test-corrected"))
    assert (other["labels"], other["trained_on_labels"]) == ("corrected", "shipped")
    assert own["labels"] == "shipped" and own["predictions"] == other["predictions"]
    assert own["numbers"]["confusion"] != other["numbers"]["confusion"]
    compared(2, "reports")


# ------------------------------------------------------------------------------------------ screen


def shown(content, splits, annotations, swapped=(), labels="shipped"):
    """An Evaluation that needs no features, to be printed."""
    class Data:
        manifest = {"swapped_labels": [*swapped]}

        def notes(self):
            yield f"songs: {content['source']}"

    Data.splits, Data.annotations, Data.labels = splits, annotations, labels
    return evaluations.Evaluation(None, {"lambda_corr": 0.05, "lambda_var": 0.05}, Data(), {
        "run": "last1", "finetune": "last1", "split": "test", "labels": labels, "model": "0" * 64,
        "trained_on_labels": labels, "precision": "exact", "songs": len(content["predictions"]),
        "features": "0" * 64, **content})


def evaluation_of(true, pred, ridge_pred, swapped=()):
    """What a report says of predictions of songs 1, 2, …, a fifth of them trained on."""
    songs = range(1, len(true) + 1)
    annotations = {song: Labels(valence, 1.0, arousal, 1.0)
                   for song, (valence, arousal) in zip(songs, true.tolist())}
    cut = len(true) // 5
    splits = {"source": "made", "train": [*songs[:cut]], "val": [], "test": [*songs[cut:]]}
    preds = [dict(zip(map(str, splits["test"]), values[cut:].tolist()))
             for values in (pred, ridge_pred)]
    numbers = metrics.measure_split(annotations, splits, "test", *preds)
    return shown({"predictions": preds[0], "numbers": numbers, "source": "made songs " * 20},
                 splits, annotations, swapped)


def random_labels(count=200):
    generator = np.random.default_rng(0)
    true = generator.normal(5, 1.3, (count, 2)).clip(1, 9).round(1)
    return true, 0.6 * true + 2 + generator.normal(0, 0.7, (count, 2))


def printed(evaluation, capsys):
    """What is printed of an evaluation, no line of it wider than a terminal."""
    capsys.readouterr()
    report.print_evaluation(evaluation)
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80, output
    return output


@pytest.mark.parametrize("far", [0, 3, 30, 3000])
def test_the_report_fits_80_columns_and_begins_with_what_is_looked_for(far, capsys, compared):
    """However bad the predictions are: R², r and CCC with intervals, right below the title."""
    true, pred = random_labels()
    output = printed(evaluation_of(true, far - pred if far else pred, -pred, [[1, 100]]), capsys)
    title, first, *_ = output.split("\n\n")
    number = r"[+<−]*\d+(\.\d+)?"
    cell = rf"{number} \[{number}, {number}\]"
    for name, line in zip(DIMENSIONS, first.splitlines()):
        assert re.fullmatch(rf"{name} R² {cell} +r {cell} +CCC {cell}", line), line
    assert "-" not in re.sub("[a-z]-[a-z]", "", output)  # one minus sign everywhere
    compared(len(output.splitlines()), "lines")


@pytest.mark.parametrize("copy, said", [(1.0, True), (0.0, False)])
def test_a_collapse_is_called_one_by_one_rule(capsys, compared, copy, said):
    """Of the network and of ridge alike."""
    true, _ = random_labels()
    one = np.stack([true[:, 0], true[:, 0] * 0.5 + 2], 1)
    pred = one if copy else true * 0.5 + 2
    output = printed(evaluation_of(true, pred, one), capsys)
    network, ridge = (re.search(rf"^  {name} .*$", output, re.M)[0]
                      for name in ("network", "ridge"))
    assert ("a collapse" in network) == said and "a collapse" in ridge
    compared(2, "lines")


def test_nearly_equal_labels_are_no_collapse(capsys, compared):
    """Predictions that correlate because the labels do."""
    true, _ = random_labels()
    true = np.stack([true[:, 0], true[:, 0] + (true[:, 1] - 5) / 20], 1)
    assert "a collapse" not in printed(evaluation_of(true, true * 0.9, true), capsys)
    compared(1, "report")


def test_what_may_be_less_than_a_collapse_is_none(compared):
    """The whole interval lies beyond 0.9, on one side, and above what is true of the labels."""
    for predicted, excess, expected in (([0.91, 0.95], [0.1, 0.2], True),
                                        ([-0.95, -0.91], [0.1, 0.2], True),
                                        ([0.85, 0.95], [0.1, 0.2], False),
                                        ([-0.95, 0.95], [0.1, 0.2], False),
                                        ([0.91, 0.95], [-0.01, 0.2], False)):
        intervals = {"correlation": {"predicted": predicted, "excess": excess}}
        assert report.collapsed(intervals) == expected
    compared(5, "intervals")


def test_exchanged_labels_are_named_as_a_cause(capsys, compared):
    """Only for a run that was trained on them."""
    true, pred = random_labels()
    true[:, 1] = 3 + true[:, 1] / 4
    labels = np.where(np.arange(200)[:, None] < 60, true[:, ::-1], true)
    evaluation = evaluation_of(labels, pred, pred, [[1, 60]])
    words, best = " ".join(printed(evaluation, capsys).split()), 0.7 * true + 0.3 * true[:, ::-1]
    assert "exchanged for 60 of 200 songs" in words
    assert f"would correlate at {np.corrcoef(best.T)[0, 1]:.3f}" in words
    corrected = evaluation._replace(content={**evaluation.content,
                                             "trained_on_labels": "corrected"})
    assert "exchanged" not in printed(corrected, capsys)
    compared(2, "reports")


def test_the_verdict_on_ridge(capsys, compared):
    true, pred = random_labels()
    mixed = np.stack([true[:, 0], np.full(len(true), 3.0)], 1)  # better in valence alone
    alike = 0.6 * true + 2 + np.random.default_rng(1).normal(0, 0.7, pred.shape)
    for ridge_pred, says in ((alike, "ties in valence and ties in arousal"),
                             (mixed, "loses in valence and wins in arousal")):
        output = printed(evaluation_of(true, pred, ridge_pred), capsys)
        assert f"\nAgainst ridge regression the network {says}." in output
    compared(2, "verdicts")


# ------------------------------------------------------------------------------------------ table


def table_of(small, names, capsys):
    """(rows of numbers by name, all lines) of the table that eval prints of some runs."""
    features, runs = small
    assert call(eval_script, *[run for run in runs if run.name in names], "--features", features,
                "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    start = max(n for n, line in enumerate(lines) if line.startswith("run "))
    return {line[:20].strip(): line[20:].replace("−", "-").split() for line in lines[start:]}, lines


def test_mean_and_deviation_over_seeds_alone(small, undrawn, capsys, compared):
    rows, lines = table_of(small, ("seed0", "seed1"), capsys)
    numbers = np.array([rows["seed0"], rows["seed1"]], float)
    assert rows["run"] == ["R²", "r", "CCC", "R²", "r", "CCC", "pred.", "right"]
    mean, std = (np.array(rows[name], float) for name in ("mean", "standard deviation"))
    np.testing.assert_allclose(mean, numbers.mean(0), atol=0.011)
    np.testing.assert_allclose(std, numbers.std(0, ddof=1), atol=0.011)
    found = read_json(small[1][0] / "eval-test/metrics.json", "")["numbers"]["metrics"]
    assert float(rows["seed0"][5]) == round(found["arousal"]["ccc"], 2)
    assert max(len(line) for line in lines if not line.startswith(("written", "next"))) <= 80
    compared(numbers.size, "numbers")


def test_no_mean_over_runs_that_differ_otherwise(small, undrawn, capsys, compared):
    rows, _ = table_of(small, ("seed0", "lr"), capsys)
    assert {"seed0", "lr"} <= set(rows) and "mean" not in rows
    compared(2, "runs")


def test_runs_of_one_name_have_a_row_each(small, undrawn, tmp_path, capsys, compared):
    features, (run, *_) = small
    copies = [shutil.copytree(run, tmp_path / f"{n}/last1") for n in range(2)]
    call(eval_script, *copies, "--features", features, "--device", "cpu")
    rows = re.findall(r"^\S*([01]/last1) +[\d−]", capsys.readouterr().out, re.M)
    assert rows == ["0/last1", "1/last1"]
    compared(2, "rows")


def test_files_are_read_once_for_several_runs(small, undrawn, monkeypatch, compared):
    """Train and val once, for ridge; of the test split once more a run: its layers differ."""
    features, runs = small
    read = []
    monkeypatch.setattr(eval_script, "POOLED", {})
    monkeypatch.setattr(features_kit, "load_tensors",
                        lambda path, what: read.append(path.stem) or load_tensors(path, what))
    call(eval_script, *runs, "--features", features, "--device", "cpu")
    splits = read_splits(features / "splits.json")
    assert sorted(each for each in read if int(each) not in splits["test"]) == sorted(
        map(str, splits["train"] + splits["val"]))
    compared(len(read), "reads")


# ------------------------------------------------------------------------------------- differences


def difference(capsys, *command):
    """(what is compared, numbers by dimension, what is said of the intervals)."""
    capsys.readouterr()
    assert call(eval_script, *command, "--device", "cpu") == 0
    text = capsys.readouterr().out.split("\n\n")[-1].split("\nnext: ")[0]
    start = text.index("valence R²")
    rows = [re.findall(r"[+−][\d.]+", line) for line in text[start:].splitlines()[:2]]
    assert all(len(line) <= 80 for line in text.splitlines())
    return (" ".join(text[:start].split()),
            np.array([[float(cell.replace("−", "-")) for cell in row] for row in rows]),
            " ".join(" ".join(text[start:].splitlines()[2:]).split()))


def test_the_difference_to_other_seeds(small, undrawn, capsys, fails, compared):
    features, (first, second, other) = small
    base = "--features", features
    title, numbers, note = difference(capsys, first, "--against", first, *base)
    assert title == "seed0 less seed0, n = 10, shipped labels" and not numbers.any()
    assert numbers.shape == (2, 9) and "the trained models are fixed" in note
    title, _, note = difference(capsys, first, second, "--against", other, *base)
    assert title.startswith("seed0 and 1 more less lr,") and "artists and the models" in note
    assert "differ in lr" in fails(eval_script, first, "--against", second, other, *base,
                                   "--device", "cpu")
    compared(18, "numbers")


def test_the_difference_between_labels_names_the_truth(small, undrawn, tmp_path, capsys, fails,
                                                       compared):
    """Runs that were trained on different labels are compared where --labels says on which."""
    features, (first, *_) = small
    corrected, base = tmp_path / "corrected", ("--features", features)
    call(train, *base, "--run", corrected, *FROZEN, "--labels", "corrected")
    assert "say with --labels which" in fails(eval_script, first, "--against", corrected, *base,
                                              "--device", "cpu")
    numbers = {}
    for labels in ("shipped", "corrected"):
        title, numbers[labels], _ = difference(capsys, first, "--against", corrected, *base,
                                               "--labels", labels)
        assert title.endswith(f"{labels} labels (trained on shipped and corrected ones)")
    assert (numbers["shipped"] != numbers["corrected"]).any()
    call(eval_script, corrected, *base, "--device", "cpu")
    r2 = [read_json(folder / "metrics.json", "")["numbers"]["metrics"]["valence"]["r2"]
          for folder in (first / "eval-test-corrected", corrected / "eval-test")]
    assert numbers["corrected"][0, 0] == pytest.approx(r2[0] - r2[1], abs=0.0051)
    compared(2, "truths")


# --------------------------------------------------------------------------------------- refusals


class Bomb:
    def __reduce__(self):
        return (open, ("bomb-went-off", "w"))


def test_checkpoints_that_are_none(command, tmp_path, fails, monkeypatch, compared):
    monkeypatch.chdir(tmp_path)
    file = command[0] / "model.pt"
    good, none = read_tensors(file, "", records.MODEL), "is not a trained model"
    for content, says in ((Bomb(), none), ({**good, "extra": Bomb()}, none), ([1], "no digest"),
                          (good, "no digest"), ({**good, "digest": "0" * 64}, "is damaged")):
        torch.save(content, file)
        assert says in fails(eval_script, *command)
    assert not (tmp_path / "bomb-went-off").exists()
    for change, says in (({"state": {"a": torch.zeros(1)}}, "not of one run"),
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
    assert call(verify, "--features", small[0]) == 0 and call(verify, "--features", features) == 1
    torch.save(states, file)
    manifest = read_json(features / "manifest.json", "")
    manifest["settings"]["precision"] = "exact"  # a manifest made so is a valid one
    write_json(features / "manifest.json",
               {**manifest, "digest": features_kit.manifest_digest(manifest)})
    assert "was trained on features" in fails(eval_script, run, "--features", features)
    compared(4, "features")
