"""Ten folds without an artist in two of them: what is in folds.json, how train.py takes them, how
eval.py pools them; and what audit.py says of artists."""

import collections
import re
import shutil

import numpy as np
import pytest
from conftest import FLOAT32, ROOT, call, few, made_features

import audit
import artists as artists_script
import eval as eval_script
import folds as folds_script
from kit import deam, figures, machine, metrics, report
from kit.files import read_json
import train
import verify

DRAW = figures.draw_report
QUICK = ["--finetune", "frozen", "--batch-size", "8", "--epochs", "1", *FLOAT32]


@pytest.fixture(scope="module")
def folds():
    return read_json(ROOT / "folds.json", "", {"source": str, "seed": int, "folds": [[int]]})


def test_folds_keep_artists_apart(folds, splits, compared):
    """All 1744 songs once, no artist in two folds; sizes and shares of ids up to 1000 alike."""
    artists, lists = deam.read_artists(), folds["folds"]
    assert sorted(sum(lists, [])) == sorted(deam.songs_of(splits)) == sorted(artists)
    where = collections.defaultdict(set)
    for n, fold in enumerate(lists):
        for song in fold:
            where[artists[song]].add(n)
    assert len(where) == 878 and all(len(each) == 1 for each in where.values())
    assert len(lists) == 10 and {len(fold) for fold in lists} <= {174, 175}
    assert {sum(song <= 1000 for song in fold) for fold in lists} <= {74, 75}
    compared(len(artists), "songs")


def test_folds_are_drawn_again_from_their_seed(folds, compared):
    """Whatever the artists are called, and in whatever order they stand."""
    artists = deam.read_artists()
    renamed = {song: f"artist {artist * 7 % 1009}" for song, artist in reversed(artists.items())}
    for each in (artists, renamed):
        assert folds_script.draw(each, folds["seed"]) == folds["folds"]
    assert folds_script.draw(artists, folds["seed"] + 1) != folds["folds"]
    compared(2, "draws")


# ------------------------------------------------------------------------------------------ train


def test_splits_of_every_fold(folds, splits, compared):
    """Test is the fold, val the next one, train the others: over ten folds every song is once in
    test and once in val."""
    made = [deam.fold_splits(fold, splits) for fold in range(10)]
    for name in ("test", "val"):
        once = sorted(song for each in made for song in each[name])
        assert once == sorted(deam.songs_of(splits))
    for n, each in enumerate(made):
        assert (each["test"], each["val"]) == (folds["folds"][n], folds["folds"][(n + 1) % 10])
        assert set(deam.songs_of(each)) == set(deam.songs_of(splits))
        assert each["source"] == folds["source"]
    compared(10 * 1744, "songs")


@pytest.fixture(scope="module")
def pooled(splits, tmp_path_factory, no_histories):
    """(features of 60 made songs, the folder of ten runs on them, frozen-fold0 to -fold9)."""
    folder = tmp_path_factory.mktemp("folds")
    features = made_features(folder / "DEAM_feats", few(splits))
    for fold in range(10):
        assert call(train, "--features", features, "--run", folder / f"frozen-fold{fold}", "--fold",
                    fold, *QUICK) == 0
    return features, folder


def runs_of(folder, name="frozen"):
    return [folder / f"{name}-fold{fold}" for fold in range(10)]


def test_training_on_a_fold_of_other_songs(pooled, folds, tmp_path, monkeypatch, capsys, compared):
    """Folds of a folder with fewer songs hold those songs alone, and say where both come from; a
    verdict and a resumed run know the fold."""
    features, folder = pooled
    own, run = deam.read_splits(features / "splits.json"), folder / "frozen-fold3"
    found = deam.read_splits(run / "splits.json")
    assert found["source"] == f"{own['source']}; {folds['source']}"
    assert set(deam.songs_of(found)) == set(deam.songs_of(own)) and len(found["test"]) > 1
    assert set(found["test"]) <= set(folds["folds"][3])
    assert set(found["val"]) <= set(folds["folds"][4])
    config = read_json(run / "config.json", "")["config"]
    assert config["splits"] == deam.splits_digest(found)
    assert call(verify, run, "--features", features, "--device", "cpu") == 0
    monkeypatch.chdir(tmp_path)
    assert call(train, "--features", features, "--fold", "9", *QUICK) == 0
    assert (tmp_path / "runs/frozen-fold9/model.pt").exists()
    compared(60, "songs")


@pytest.mark.parametrize("fold, says", [("10", "at most 9"), ("-1", "at least 0"),
                                        ("x", "invalid whole number")])
def test_folds_that_there_are_not(fold, says, capsys, compared):
    with pytest.raises(SystemExit):
        train.parser().parse_args(["--fold", fold])
    assert says in capsys.readouterr().err
    compared(1, "refusal")


def test_a_run_is_not_resumed_on_another_fold(pooled, tmp_path, fails, compared):
    run = shutil.copytree(pooled[1] / "frozen-fold3", tmp_path / "run")
    assert "was started otherwise (fold 3 there, 4 now" in fails(
        train, "--features", pooled[0], "--run", run, "--fold", "4", "--resume", *QUICK)
    other = {"source": "songs of one artist", "train": [49], "val": [51], "test": [52]}
    features = made_features(tmp_path / "f", other)
    assert "none of these songs is in fold 3" in fails(train, "--features", features, "--fold", "3",
                                                       *QUICK)
    compared(2, "refusals")


# ------------------------------------------------------------------------------------------- eval


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take most of an evaluation's time."""
    monkeypatch.setattr("kit.figures.draw_report", lambda *_: None)


def evaluate(features, *runs):
    return call(eval_script, *runs, "--features", features, "--device", "cpu")


def test_disjoint_runs_are_pooled(pooled, undrawn, monkeypatch, capsys, compared):
    """Every song predicted by the model that never heard its artist, one report over all of them,
    with figures; each run's own evaluation beside, without."""
    features, folder = pooled
    monkeypatch.setattr(figures, "draw_report", DRAW)
    assert evaluate(features, *runs_of(folder)) == 0
    output, out = capsys.readouterr().out, folder / "frozen-pooled/eval-pooled-test"
    found = read_json(out / "metrics.json", "")
    songs = deam.songs_of(deam.read_splits(features / "splits.json"))
    assert sorted(map(int, found["predictions"])) == sorted(songs) and found["songs"] == 60
    singles = [read_json(run / "eval-test/metrics.json", "") for run in runs_of(folder)]
    for each in singles:
        for kind in ("predictions", "ridge_predictions"):
            assert each[kind].items() <= found[kind].items()
        assert found["runs"][each["run"]]["model"] == each["model"]
        assert f"{each['model'][:16]}  {each['run']}" in output
    assert "model" not in found  # there is no one model
    annotations = deam.read_annotations(features / "annotations.csv")
    true = metrics.true_values(annotations, map(int, found["predictions"]))
    pred, numbers = np.array(list(found["predictions"].values())), found["numbers"]
    assert numbers["metrics"]["valence"]["mse"] == pytest.approx(((pred - true)[:, 0] ** 2).mean())
    assert {"ridge", "training mean"} == set(numbers["baselines"])
    low, high = numbers["intervals"]["arousal"]["mse"]
    assert low < numbers["metrics"]["arousal"]["mse"] < high
    assert f"arousal R² {report.with_interval(numbers, 'arousal', 'r2')} " in output
    assert output.startswith("10 runs: frozen, pooled test split, n = 60, shipped labels")
    assert "R², sd over folds" in output and "R², songs of 2014" in output
    assert max(len(line) for line in output.splitlines()
               if not line.startswith(("written", "next"))) <= 80
    assert len(list(out.glob("*.png"))) == len(list(out.glob("*.pdf"))) == 2
    assert not list(folder.glob("frozen-fold*/eval-test/*.png"))
    compared(60, "songs")


def test_three_folds_do_not_overwrite_the_report_of_ten(pooled, undrawn, compared):
    features, folder = pooled
    evaluate(features, *runs_of(folder))
    file = folder / "frozen-pooled/eval-pooled-test/metrics.json"
    kept = file.read_bytes()
    assert evaluate(features, *runs_of(folder)[4:1:-1]) == 0
    assert file.read_bytes() == kept
    some = read_json(folder / "frozen-pooled-of-2-3-4/eval-pooled-test/metrics.json", "")
    assert some["songs"] < 60 and len(some["runs"]) == 3
    compared(2, "reports")


def test_intervals_of_pooled_runs_resample_artists(pooled, undrawn, monkeypatch, compared):
    """Where all songs are of one artist of two, the interval is that of two draws."""
    features, folder = pooled
    args = eval_script.parser().parse_args([
        *map(str, runs_of(folder)[:2]), "--features", str(features), "--device", "cpu"])
    arithmetic, opened = machine.Arithmetic("exact", "cpu"), {}
    evaluations = [eval_script.evaluate(args, run, arithmetic, opened) for run in args.runs]
    halves = {int(song): n for n, each in enumerate(evaluations)
              for song in each.content["predictions"]}
    monkeypatch.setattr(metrics, "read_artists", lambda: halves)
    numbers = eval_script.pool_folds(evaluations).content["numbers"]
    alone = [each.content["numbers"]["metrics"]["valence"]["mse"] for each in evaluations]
    assert numbers["intervals"]["valence"]["mse"] == pytest.approx(sorted(alone))
    compared(2, "artists")


def test_runs_that_cannot_be_pooled(pooled, splits, undrawn, tmp_path, fails, capsys, compared):
    """Folds of different configurations have no common report; two runs on one fold are a table, as
    are runs on folds with a common song."""
    features, folder = pooled
    other = tmp_path / "frozen-fold4"
    call(train, "--features", features, "--run", other, "--fold", 4, *QUICK, "--lr", "4e-5")
    base = "--features", features, "--device", "cpu"
    assert "differ in lr" in fails(eval_script, folder / "frozen-fold3", other, *base)
    renamed = shutil.copytree(folder / "frozen-fold3", tmp_path / "x/frozen-fold4")
    assert "have one name" in fails(eval_script, folder / "frozen-fold4", renamed, *base)
    capsys.readouterr()
    assert evaluate(features, folder / "frozen-fold4", other) == 0
    assert "\nmean " not in capsys.readouterr().out
    compared(2, "pairs")


def test_the_difference_of_two_sets_of_folds(pooled, undrawn, tmp_path, fails, capsys, compared):
    """--against: on the same songs, in the same order of runs or another; nothing to itself; the
    interval of the difference, not the difference of intervals."""
    features, folder = pooled
    base, runs = ("--features", features, "--device", "cpu"), runs_of(folder)
    for fold in range(3):
        call(train, "--features", features, "--run", tmp_path / f"other-fold{fold}", "--fold", fold,
             *QUICK, "--seed", "1")
    others = runs_of(tmp_path, "other")[:3]

    def difference(*command):
        capsys.readouterr()
        assert call(eval_script, *command, *base) == 0
        title, valence, *_ = capsys.readouterr().out.split("\n\n")[-1].splitlines()
        return title, [float(cell.replace("−", "-")) for cell in re.findall(r"[+−][\d.]+", valence)]

    _, same = difference(*runs[:3], "--against", *runs[2::-1])
    assert len(same) == 9 and not any(same)
    title, (less, low, high, *_) = difference(*runs[:3], "--against", *others)
    assert title.startswith("frozen-pooled-of-0-1-2 less other-pooled-of-0-1-2, n = ")
    evaluate(features, *others)
    first, second = (read_json(each / "eval-pooled-test/metrics.json", "")["numbers"] for each in (
        folder / "frozen-pooled-of-0-1-2", tmp_path / "other-pooled-of-0-1-2"))
    r2 = [each["metrics"]["valence"]["r2"] for each in (first, second)]
    assert less == pytest.approx(r2[0] - r2[1], abs=0.0051)
    edges = first["intervals"]["valence"]["r2"]
    assert low <= less <= high and high - low < edges[1] - edges[0]
    assert "different songs" in fails(eval_script, runs[0], "--against", runs[1], *base)
    compared(18, "differences")


# ------------------------------------------------------------------------------------------ audit


def test_the_overlap_of_the_published_splits(splits, capsys, compared):
    audit.print_artists(splits)
    assert ("of 175 test songs 113 are by an artist who is also in train, 43 in val, 119 in either"
            in capsys.readouterr().out)
    artists = deam.read_artists()
    known = {artists[song] for song in splits["train"] + splits["val"]}
    assert sum(artists[song] in known for song in splits["test"]) == 119
    audit.print_artists(deam.fold_splits(0, splits))
    assert "175 test songs 0 are by an artist who is also in train, 0 in val, 0 in either" in \
        capsys.readouterr().out
    audit.print_artists({**splits, "test": [999_999]})  # whose artist nobody knows
    assert capsys.readouterr().out == ""
    compared(175, "test songs")


TABLES = {  # as DEAM's own: three spellings of the header, tabs, spaces, rows of different lengths
    "metadata_2013.csv": "song_id,file_name,Artist,Song title\r\n"
                         '2,"\t2.mp3","The New Mystikal Troubadours\t","\tA title\t"\r\n'
                         '5,"\t5.mp3","Kevin MacLeod-Night on the Docks\t","\tA title\t"\r\n'
                         '13,"\t13.mp3","\tkevin macleod","\tA title\t"\r\n',
    "metadata_2014.csv": "Id\t, Artist , Album,Track,,,\n1001,Björk feat. Somebody,A,B,Rock,1,2,,\n"
                         "1002,M-PeX,A,B\n",
    "metadata_2015.csv": "\ufeffid,Filename,title,artist\n2001,2001.mp3,T,BJORK\n\n"}


def test_artists_of_deams_own_tables(tmp_path, compared):
    for name, text in TABLES.items():
        (tmp_path / name).write_bytes(text.encode())
    tables = [tmp_path / name for name in TABLES]
    assert artists_script.artists_of(tables) == {2: "new mystikal troubadours", 5: "kevin macleod",
                                        13: "kevin macleod", 1001: "bjork", 1002: "m pex",
                                        2001: "bjork"}
    compared(6, "songs")


def test_songs_that_are_grouped_otherwise(compared):
    """A song split off or moved, two artists merged: found, whatever the artists are called."""
    artists = deam.read_artists()
    renamed = {song: f"n{artist}" for song, artist in artists.items()}
    assert artists_script.otherwise_grouped(artists, renamed) == []
    for change in ({3: "nobody"}, {2: renamed[3]}):
        assert artists_script.otherwise_grouped(artists, {**renamed, **change}) == list(change)
    merged = {song: renamed[10] if name == renamed[12] else name for song, name in renamed.items()}
    found = artists_script.otherwise_grouped(artists, merged)
    assert found and {artists[song] for song in found} <= {artists[10], artists[12]}
    compared(4, "partitions")
