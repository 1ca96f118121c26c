"""The audit of DEAM's labels: on swapped, clean, noisy and corrected ones; and what --labels does with it."""

import shutil

import numpy as np
import pytest
from conftest import QUICK, ROOT, call

import common
import eval as eval_script
import extract
import train
from common import DEAMFeatHandler, read_annotations, read_json


def labels(seed, swapped, noise):
    """(annotations, dynamic means) of 300 songs each below and above id 1000; static labels of `swapped` ids exchanged."""
    generator = np.random.default_rng(seed)
    ids = [*range(2, 302), *range(1001, 1301)]
    truth = generator.multivariate_normal([5, 5], [[1.4, 0.8], [0.8, 1.7]], len(ids))
    static = truth + generator.normal(0, noise, truth.shape)
    annotations = {song: [f"{v:.2f}", "1", f"{a:.2f}", "1"] if not swapped(song) else [f"{a:.2f}", "1", f"{v:.2f}", "1"] for song, (v, a) in zip(ids, static)}
    return annotations, {name: dict(zip(ids, (truth[:, n] - 5) / 4)) for n, name in enumerate(("valence", "arousal"))}


@pytest.mark.parametrize("noise", [0.3, 1.5])
@pytest.mark.parametrize("swapped, verdicts", [(lambda song: song <= 1000, [True, False]), (lambda song: False, [False, False]),
                                               (lambda song: song > 1000, [False, True]), (lambda song: True, [True, True])])
def test_audit_decides_from_the_data(compared, swapped, verdicts, noise):
    for seed in range(5):
        rows = extract.audit_labels(*labels(seed, swapped, noise))
        assert [row["swapped"] for row in rows] == verdicts
    compared(5 * len(verdicts), "ranges")


def test_audit_does_not_guess(compared):
    """Half of the songs swapped, or nothing but noise: it says that it cannot tell."""
    for seed in range(5):
        assert [row["swapped"] for row in extract.audit_labels(*labels(seed, lambda song: song % 2, 0.3))] == [None, None]
        assert None in [row["swapped"] for row in extract.audit_labels(*labels(seed, lambda song: False, 1000))]
    compared(10, "corpora")


def test_the_demo_audits_clean(demo, capsys, fails, tmp_path, compared):
    assert call(extract, "--deam", demo / "DEAM_demo", "--audit-labels") == 0
    assert "ids 1–1000: the labels are right; ids 1001–2000: the labels are right." in capsys.readouterr().out
    assert read_json(demo / "DEAM_feats/manifest.json", "")["swapped_labels"] == []
    (tmp_path / common.STATIC).write_text("song_id,valence_mean,valence_std,arousal_mean,arousal_std\n2,1,1,1,1\n")
    assert "no dynamic annotations" in fails(extract, "--deam", tmp_path, "--audit-labels")
    compared(60, "songs")


@pytest.fixture(scope="module")
def swapped_demo(demo, tmp_path_factory):
    """The demo with its static labels exchanged for ids up to 1000, as in DEAM; and features of it."""
    folder = tmp_path_factory.mktemp("swapped")
    shutil.copytree(demo / "DEAM_demo", folder / "DEAM")
    table = next((folder / "DEAM").rglob(common.STATIC))
    rows = [row.split(",") for row in table.read_text().splitlines()]
    rows[1:] = [[i, a, b, v, s] if int(i) <= 1000 else [i, v, s, a, b] for i, v, s, a, b in rows[1:]]
    table.write_text("\n".join(",".join(row) for row in rows) + "\n")
    assert call(extract, "--deam", folder / "DEAM", "--bundle", "DEMO", "--features", folder / "f", "--precision", "float64", "--store", "float16", "--device", "cpu") == 0
    return folder


def test_corrected_labels_exchange_what_the_audit_says(demo, swapped_demo, tmp_path, capsys, compared):
    assert read_json(swapped_demo / "f/manifest.json", "")["swapped_labels"] == [[1, 1000]]
    clean = read_annotations(demo / "DEAM_feats/annotations.csv")
    assert read_annotations(swapped_demo / "f/annotations.csv") != clean  # shipped, as it was
    assert DEAMFeatHandler(swapped_demo / "f", ROOT / "splits.json", labels="corrected").annotations == clean
    for choice in ("shipped", "corrected"):
        capsys.readouterr()
        assert call(train, "--features", swapped_demo / "f", "--run", tmp_path / choice, "--labels", choice, *QUICK) == 0
        assert call(eval_script, tmp_path / choice, "--features", swapped_demo / "f", "--device", "cpu") == 0
        output = capsys.readouterr().out
        assert output.count("see extract.py --audit-labels") == (2 if choice == "shipped" else 0) and f"{choice} labels" in output
    assert call(eval_script, tmp_path / "corrected", "--features", swapped_demo / "f", "--labels", "shipped", "--device", "cpu") == 0
    assert "for comparison: the run was trained on corrected labels" in capsys.readouterr().out
    found = read_json(tmp_path / "corrected/eval-test/metrics.json", "")
    assert (found["labels"], found["trained_on_labels"]) == ("shipped", "corrected")
    compared(len(clean), "songs")


def test_without_dynamic_annotations_nothing_is_corrected(demo, tmp_path, fails):
    shutil.copytree(demo / "DEAM_demo", tmp_path / "DEAM", ignore=shutil.ignore_patterns("dynamic*"))
    assert call(extract, "--deam", tmp_path / "DEAM", "--bundle", "DEMO", "--features", tmp_path / "f", "--limit", 1, "--device", "cpu") == 0
    assert "does not say which labels are exchanged" in fails(train, "--features", tmp_path / "f", "--labels", "corrected")
