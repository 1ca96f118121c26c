"""audit.py on swapped, clean, noisy and damaged labels; what --labels does with its findings."""

import csv
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import QUICK, call, extraction, few, made_features

import audit
import eval as eval_script
import extract
import train
from common import DEAMFeatHandler, DEAMHandler
from kit.deam import STATIC, Labels, dynamic_means, read_annotations, read_splits
from kit.files import read_json
from kit.swapped import audit_labels, swapped_ranges


def deam(folder, seed, swapped, noise):
    """What audit_labels looks at, of 300 songs each below and above id 1000; static labels of the
    `swapped` ids exchanged."""
    generator = np.random.default_rng(seed)
    ids = [*range(2, 302), *range(1001, 1301)]
    truth = generator.multivariate_normal([5, 5], [[1.4, 0.8], [0.8, 1.7]], len(ids))
    static = truth + generator.normal(0, noise, truth.shape)
    annotations = {song: Labels(a, 1, v, 1) if swapped(song) else Labels(v, 1, a, 1)
                   for song, (v, a) in zip(ids, static)}
    for name, values in zip(("valence", "arousal"), (truth.T - 5) / 10):
        rows = "".join(f"{song},{value},,\n" for song, value in zip(ids, values))
        (folder / f"{name}.csv").write_text("song_id,sample_15000ms,sample_15500ms,\n" + rows)
    return SimpleNamespace(root=folder, annotations=annotations, dynamic={
        name: folder / f"{name}.csv" for name in ("valence", "arousal")})


@pytest.mark.parametrize("swapped, noise, verdicts", [
    *((swapped, noise, verdicts) for noise in (0.3, 1.5) for swapped, verdicts in (
        (lambda song: song <= 1000, [True, False]), (lambda song: False, [False, False]),
        (lambda song: song > 1000, [False, True]), (lambda song: True, [True, True]))),
    (lambda song: song % 2, 0.3, [None, None])])
def test_audit_decides_from_the_data(tmp_path, compared, swapped, noise, verdicts):
    """And where half of the songs are swapped, it says that it cannot tell."""
    for seed in range(2):
        rows = audit_labels(deam(tmp_path, seed, swapped, noise))
        assert [row["swapped"] for row in rows] == verdicts
    compared(2 * len(verdicts), "ranges")


def test_audit_does_not_guess_from_noise(tmp_path, compared):
    """At 99.9% a verdict on nothing but noise is rare."""
    verdicts = [row["swapped"] for seed in range(5) for row in
                audit_labels(deam(tmp_path, seed, lambda _: False, 1000))]
    assert verdicts.count(None) >= len(verdicts) - 1
    compared(len(verdicts), "ranges")


def test_dynamic_annotations_as_they_are(tmp_path, compared):
    """Gaps, NaN, CRLF, stray spaces; the song's mean is that of its cells."""
    (tmp_path / "valence.csv").write_bytes(
        "\ufeffsong_id, a, b, c,\r\n2, 0.1,,0.2,\r\n\r\n3,NaN,-1,1,\r\n4,,nan,,\r\n".encode())
    assert dynamic_means(tmp_path / "valence.csv") == {2: pytest.approx(0.15), 3: 0}
    compared(3, "songs")


@pytest.mark.parametrize("cell", ["n/a", "inf", "1e999", "1.5", "0.1,0.1"])
def test_damaged_dynamic_annotations(demo, tmp_path, fails, capsys, compared, cell):
    """The audit names the line; an extraction goes on without the audit."""
    root = shutil.copytree(demo / "DEAM", tmp_path / "DEAM",
                           ignore=shutil.ignore_patterns("DEAM_audio"))
    file = next(root.rglob("valence.csv"))
    header, first, *rows = file.read_text().splitlines()
    song, _, *others = first.split(",")
    file.write_text("\n".join([header, ",".join([song, cell, *others]), *rows]))
    assert "valence.csv, line 2: not " in fails(audit, root)
    assert swapped_ranges(DEAMHandler(root)) is None
    assert "--labels corrected will not be possible" in capsys.readouterr().out
    compared(1, "damaged rows")


def test_what_the_audit_says(demo, features, tmp_path, capsys, compared):
    """Of the demo, and of the demo with its static labels exchanged for ids up to 1000, as in DEAM.
    A manifest has what it says, and the labels as they were."""
    shutil.copytree(demo / "DEAM", tmp_path / "DEAM")
    shutil.copytree(features / "songs", tmp_path / "f/songs")
    table = next((tmp_path / "DEAM").rglob(STATIC))
    header, *rows = csv.reader(table.open())
    rows = [[i, a, b, v, s] if int(i) <= 1000 else [i, v, s, a, b] for i, v, s, a, b in rows]
    table.write_text("\n".join(map(",".join, [header, *rows])) + "\n")
    command = ["--precision", "float32", "--deam", tmp_path / "DEAM"]
    assert call(extract, *extraction(demo, tmp_path / "f", *command)) == 0
    for folder, made, low, found in (
            (demo, features, "the labels are right", []),
            (tmp_path, tmp_path / "f", "valence and arousal are swapped", [[1, 1000]])):
        capsys.readouterr()
        assert call(audit, folder / "DEAM") == 0
        lines = capsys.readouterr().out.splitlines()
        assert f"ids 1–1000: {low}; ids 1001–2000: the labels are right." in lines
        assert read_json(made / "manifest.json", "")["swapped_labels"] == found
    clean, shipped = (read_annotations(made / "annotations.csv")
                      for made in (features, tmp_path / "f"))
    for song, (v, s, a, b) in clean.items():
        assert shipped[song] == ((a, b, v, s) if song <= 1000 else (v, s, a, b))
    compared(len(clean) + 2, "songs and folders")


def test_corrected_labels_exchange_what_the_audit_says(splits, tmp_path, capsys, monkeypatch,
                                                       no_histories, compared):
    """From a features folder to evaluations on both kinds of labels."""
    monkeypatch.setattr("kit.figures.draw_report", lambda *_: None)
    made = made_features(tmp_path / "f", few(splits))
    shipped = read_annotations(made / "annotations.csv")
    data = DEAMFeatHandler(made, labels="corrected")
    for song, (v, s, a, b) in shipped.items():
        assert data.annotations[song] == ((a, b, v, s) if song <= 1000 else (v, s, a, b))
    assert not any("swapped" in note for note in data.notes())
    assert any("for ids 1–1000 valence and arousal are swapped" in note for note in
               DEAMFeatHandler(made).notes())
    run = tmp_path / "run"
    assert call(train, "--features", made, "--run", run, "--labels", "corrected", "--finetune",
                "frozen", *QUICK) == 0
    assert call(eval_script, run, "--features", made, "--device", "cpu") == 0
    output = capsys.readouterr().out
    assert "corrected labels" in output and "are swapped" not in output
    first = (run / "eval-test/metrics.json").read_bytes()
    assert call(eval_script, run, "--features", made, "--labels", "shipped", "--device", "cpu") == 0
    output = capsys.readouterr().out
    assert "shipped labels (trained on corrected ones)" in output
    assert "for ids 1–1000 valence and arousal are swapped" in output
    assert (run / "eval-test/metrics.json").read_bytes() == first  # written beside
    found = read_json(run / "eval-test-shipped/metrics.json", "")
    assert (found["labels"], found["trained_on_labels"]) == ("shipped", "corrected")
    compared(len(shipped), "songs")


def test_without_dynamic_annotations_nothing_is_corrected(demo, tmp_path, fails, capsys):
    root = shutil.copytree(demo / "DEAM", tmp_path / "DEAM", ignore=shutil.ignore_patterns("dyn*"))
    assert "no dynamic annotations" in fails(audit, root)
    song = read_splits(demo / "splits.json")["train"][0]
    assert call(extract, *extraction(demo, tmp_path / "f", "--deam", root, "--precision", "float32",
                                     "--songs", song)) == 0
    assert "the labels cannot be audited" in capsys.readouterr().out
    assert "does not say which labels are swapped" in fails(
        train, "--features", tmp_path / "f", "--labels", "corrected", "--allow-missing")
    (root / "dynamic").mkdir()
    for name in ("valence", "arousal"):
        (root / f"dynamic/{name}.csv").write_text("song_id,sample_15000ms\n2,0.1\n")
    assert "too few songs" in fails(audit, root)
