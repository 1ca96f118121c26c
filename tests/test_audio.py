"""eval.py RUN --audio: one's own music."""

import csv
import shutil

import numpy as np
import pytest
import soundfile
import torch
from conftest import call

import common
import eval as eval_script
from common import DEAMHandler, read_json, read_windows


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def predicted(run, tmp_path, *audio):
    code = call(eval_script, run, "--audio", *audio, "--csv", tmp_path / "table.csv", "--device", "cpu")
    return code, list(csv.DictReader(open(tmp_path / "table.csv")))


def test_a_song_of_the_corpus_gets_what_eval_gave_it(demo, run, tmp_path, compared):
    """From the audio file to six decimals what its cached canonical features give."""
    call(eval_script, run, "--features", demo / "DEAM_feats", "--device", "cpu")
    cached = read_json(run / "eval-test/metrics.json", "")["predictions"]
    audio = DEAMHandler(demo / "DEAM_demo").audio
    code, rows = predicted(run, tmp_path, *(audio[int(song)] for song in cached))
    assert code == 0
    for (song, values), row in zip(cached.items(), rows):
        assert row["song"].endswith(f"{song}.wav") and [float(row["valence"]), float(row["arousal"])] == values
        assert row["windows"] == "1" and row["quadrant"] == eval_script.QUADRANTS[int(eval_script.quadrant(np.array(values)))]
    compared(len(rows), "songs")


def test_any_file_and_a_bad_one_beside_it(run, tmp_path, capsys, compared):
    music = tmp_path / "music"
    music.mkdir()
    generator = np.random.default_rng(0)
    for rate in (8000, 22050, 44100, 96000):
        soundfile.write(music / f"mono {rate}.wav", generator.normal(0, 0.1, 3 * rate), rate)
    soundfile.write(music / "stereo.flac", generator.normal(0, 0.1, (2 * 48000, 2)), 48000)
    soundfile.write(music / "short.ogg", generator.normal(0, 0.1, 8000), 16000)
    soundfile.write(music / "stereo.mp3", generator.normal(0, 0.1, (2 * 44100, 2)), 44100)
    soundfile.write(music / "tiny.wav", generator.normal(0, 0.1, 300), 16000)
    (music / "not.mp3").write_text("not audio")
    (music / "notes.txt").write_text("not a song")
    code, rows = predicted(run, tmp_path, music, tmp_path / "nowhere.wav")
    output = capsys.readouterr().out
    assert code == 1 and len(rows) == 7
    for name, reason in (("tiny.wav", "too short"), ("not.mp3", "not readable"), ("nowhere.wav", "not readable")):
        assert any(line.startswith("failed: ") and name in line and reason in line for line in output.splitlines())
    assert all(1 < float(row["valence"]) < 9 for row in rows) and "notes.txt" not in output
    compared(len(rows) + 3, "files")


def test_long_files_come_in_windows(run, tmp_path, compared):
    """Equal windows of about 45 s that cover every sample once; a song a little over stays whole, as in training."""
    for seconds, windows in ((45.05, 1), (66, 1), (70, 2), (200, 4), (100.001, 2)):
        samples = int(seconds * 1000)
        ramp = np.arange(samples) / samples * 0.9
        soundfile.write(tmp_path / "long.wav", ramp, 1000, subtype="FLOAT")
        parts = [pcm for _, pcm in read_windows(tmp_path / "long.wav", 16000, seconds=45)]
        assert len(parts) == windows and max(map(len, parts)) - min(map(len, parts)) <= windows
        np.testing.assert_array_equal(np.concatenate(parts)[:, 0], ramp.astype(np.float32))
    soundfile.write(tmp_path / "long.flac", np.random.default_rng(0).normal(0, 0.1, 100 * 8000), 8000)
    code, rows = predicted(run, tmp_path, tmp_path / "long.flac")
    assert code == 0 and rows[0]["windows"] == "2" and float(rows[0]["valence_spread"]) > 0
    compared(5, "lengths")


def test_flags_that_belong_together(run, tmp_path, fails):
    assert "go with --audio" in fails(eval_script, run, "--csv", tmp_path / "t.csv")
    assert "only one" in fails(eval_script, run, run, "--audio", tmp_path)
    assert "no audio files" in fails(eval_script, run, "--audio", tmp_path / "run", "--device", "cpu")
    torch.save({name: value + 1 for name, value in common.demo_weights().items()}, tmp_path / "w.pt")
    assert "made by other weights" in fails(eval_script, run, "--audio", tmp_path, "--weights", tmp_path / "w.pt", "--device", "cpu")
