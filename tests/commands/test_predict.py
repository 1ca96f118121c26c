"""predict.py: one's own music."""

import csv
import os
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import soundfile
from conftest import ROOT, call

import eval as eval_script
import predict
from common import DEAMHandler
from kit import figures
from kit.audio import read_windows
from kit.files import read_json
from safetensors.torch import load_file, save_file

NOISE = np.random.default_rng(0).normal(0, 0.1, (100 * 8000, 2))


@pytest.fixture
def predicted(demo, trained, tmp_path):
    """predicted(*arguments) → (exit code, rows of the table of songs)."""

    def run(*arguments):
        code = call(predict, trained, *arguments, "--csv", tmp_path / "songs.csv", "--weights",
                    demo / "backbone", "--device", "cpu")
        return code, list(csv.DictReader(open(tmp_path / "songs.csv")))

    return run


def test_a_song_of_the_corpus_gets_what_eval_gave_it(demo, features, trained, predicted, tmp_path,
                                                     monkeypatch, compared):
    """From the audio file to six decimals what its stored features give."""
    monkeypatch.setattr("kit.figures.draw_report", lambda *_: None)
    run = shutil.copytree(trained, tmp_path / "run")
    assert call(eval_script, run, "--features", features, "--device", "cpu") == 0
    stored = dict([*read_json(run / "eval-test/metrics.json", "")["predictions"].items()][:4])
    audio = DEAMHandler(demo / "DEAM").audio
    code, rows = predicted(*(audio[int(song)] for song in stored))
    assert code == 0 and len(rows) == len(stored)
    for (song, values), row in zip(stored.items(), rows):
        n = int(predict.quadrant(np.array(values), 5))
        assert row["song"].endswith(f"{song}.wav") and row["windows"] == "1"
        assert [float(row["valence"]), float(row["arousal"])] == pytest.approx(values, abs=1e-6)
        assert (row["quadrant"], row["mood"]) == (predict.QUADRANTS[n], predict.MOODS[n])
    compared(2 * len(rows), "predictions")


def test_any_file_and_bad_ones_beside_them(demo, trained, tmp_path, compared):
    """A folder as people have them: what can be read is predicted, the rest named with its reason,
    whatever its name; the table has the good ones."""
    music = tmp_path / "music"
    music.mkdir()
    for rate in (8000, 22050, 44101, 96000):
        soundfile.write(music / f"mono {rate}.wav", NOISE[:2 * rate, 0], rate)
    for name in ("stereo.flac", "stereo.mp3", "short.ogg"):
        soundfile.write(music / name, NOISE[:48000], 48000)
    shutil.copy(music / "stereo.flac", os.fsencode(music) + b"/caf\xe9.flac")
    soundfile.write(music / "old.aifc", NOISE[:48000], 48000, format="AIFF")
    shutil.copy(music / "stereo.mp3", music / "an MP3 without ending")
    soundfile.write(music / "cancels.wav", NOISE[:48000, :1] * [1, -1], 48000)
    good = len(os.listdir(music))
    soundfile.write(music / "tiny.wav", NOISE[:100], 16000)
    bad = {"tiny.wav": "too short", "noise.mp3": "not readable as audio",
           "._x.mp3": "a companion of macOS", "page.mp3": "an HTML page, which is not",
           "x.m4b": "MPEG-4 audio (m4a), which is not readable here: find or convert it",
           "empty.wav": "empty file", "pipe.wav": "not a regular file",
           "dangling.wav": "no such file", "nowhere.wav": "no such file"}
    for name, data in (("noise.mp3", np.random.default_rng(1).bytes(5000)),
                       ("._x.mp3", b"\x00\x05\x16\x07" * 100), ("notes.txt", b"not audio" * 100),
                       ("page.mp3", b"<!doctype html>"), ("x.m4b", b"\0\0\0\x20ftypM4B ")):
        (music / name).write_bytes(data)
    (music / "empty.wav").touch()
    os.mkfifo(music / "pipe.wav")
    (music / "dangling.wav").symlink_to(music / "nothing")
    if os.geteuid():
        shutil.copy(music / "stereo.flac", music / "locked.flac")
        (music / "locked.flac").chmod(0)
        bad["locked.flac"] = "not readable"
    command = [trained, music, tmp_path / "nowhere.wav", "--csv", tmp_path / "songs.csv",
               "--weights", demo / "backbone", "--device", "cpu"]
    done = subprocess.run([sys.executable, ROOT / "predict.py", *command], capture_output=True,
                          text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=120)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert sum(line.startswith("failed: ") for line in lines) == len(bad)
    assert [("cancels.wav" in line) for line in lines if "its channels cancel" in line] == [True]
    for name, reason in bad.items():
        assert any(line.startswith("failed: ") and f"/{name}: " in line and reason in line
                   for line in lines), name
    rows = list(csv.DictReader(open(tmp_path / "songs.csv", encoding="utf-8")))
    assert len(rows) == good and sum("caf?.flac" in row["song"] for row in rows) == 1
    assert all(1 < float(row["valence"]) < 9 for row in rows) and "notes.txt" not in done.stdout
    compared(len(rows) + len(bad), "files")


@pytest.mark.parametrize("seconds, window, hop, count", [
    (45.05, 45, 15, 1), (67.5, 45, 15, 1), (68, 45, 15, 3), (200, 45, 15, 12), (100.001, 45, 45, 3),
    (12.3457, 2, 0.7, 16)])
def test_windows_cover_every_sample(tmp_path, compared, seconds, window, hop, count):
    """Windows of one length, `hop` apart, the last one aligned with the end; what is not much
    longer than a window stays whole, as in training."""
    ramp = (np.arange(round(seconds * 4000)) / (seconds * 4000)).astype(np.float32)
    soundfile.write(tmp_path / "long.wav", ramp, 4000, subtype="FLOAT")
    covered, starts, lengths = np.zeros(len(ramp), bool), [], set()
    for begin, waveform, pcm in read_windows(tmp_path / "long.wav", 16000, window, hop):
        first = round(begin * 4000)
        np.testing.assert_array_equal(pcm[:, 0], ramp[first:first + len(pcm)])
        assert len(waveform) == 4 * len(pcm)
        covered[first:first + len(pcm)] = True
        starts.append(first)
        lengths.add(len(pcm))
    assert covered.all() and len(starts) == count and len(lengths) == 1
    assert lengths == ({window * 4000} if count > 1 else {len(ramp)})
    assert set(np.diff(starts)[:-1]) <= {round(hop * 4000)}
    compared(len(ramp), "samples")


def test_long_files_are_streamed(tmp_path, compared):
    """Half an hour, 58 MB of PCM, takes ten times the memory of a window of 1.3 MB."""
    soundfile.write(tmp_path / "long.flac", np.zeros(1800 * 8000, np.float32), 8000)
    tracemalloc.start()
    windows = sum(1 for _ in read_windows(tmp_path / "long.flac", 16000, 10, 30))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert windows == 61 and peak < 10 * 10 * 16000 * 8
    compared(windows, "windows")


def test_table_and_figure_of_a_long_song(predicted, tmp_path, monkeypatch, compared):
    """A tenth of the default windows, and of a song for them."""
    defaults = predict.parser().parse_args(["run", "song"])
    assert (defaults.window, defaults.hop) == (45, 15)
    song = tmp_path / os.fsdecode(b"caf\xe9 \xc3\xa9 $x$.flac")
    with open(song, "wb") as file:
        soundfile.write(file, NOISE[:80_000], 8000, format="FLAC")
    drawn = []
    draw = figures.draw_song
    monkeypatch.setattr(figures, "draw_song", lambda *args: (drawn.append(args), draw(*args)))
    code, [row] = predicted(song, "--window", 4.5, "--hop", 1.5, "--figure",
                            tmp_path / "figures/song.png")
    assert code == 0 and row["windows"] == "5"
    [(centres, windows, *_)] = drawn
    assert (centres - 2.25).tolist() == [0, 1.5, 3, 4.5, 5.5]
    for name, values in zip(("valence", "arousal"), windows.T):
        assert float(row[name]) == pytest.approx(np.mean(values), abs=2e-6)
        assert float(row[f"{name}_std"]) == pytest.approx(np.std(values), abs=2e-6) != 0
    assert (tmp_path / "figures/song.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "figures/song.pdf").read_bytes().startswith(b"%PDF")
    compared(len(windows), "windows")


def test_rows_are_on_disk_as_they_are_done(demo, predicted, tmp_path, monkeypatch, compared):
    songs, lines = list(DEAMHandler(demo / "DEAM").audio.values())[:3], []

    def predict_song(*_):
        table = tmp_path / "songs.csv"
        lines.append(table.read_text().count("\n") if table.exists() else 0)
        return np.zeros(1), np.full((1, 2), 5.0), 6, None

    monkeypatch.setattr(predict, "predict_song", predict_song)
    assert predicted(*songs)[0] == 0 and lines == [0, 2, 3]
    compared(3, "songs")


@pytest.mark.parametrize("option, says", [
    (["--csv", "song.wav"], "must end in .csv"),
    (["--figure", "f.jpg"], "must end in .png or .pdf"), (["--csv", "run/a.csv"], "run's folder"),
    (["a.wav", "b.wav", "--figure", "f.png"], "--figure draws one song, and these are 3"),
    (["--window", "nan"], "--window"), (["--hop", "0"], "--hop"), (["--csv", ""], "empty path")])
def test_it_says_so_before_the_work(tmp_path, fails, monkeypatch, compared, option, says):
    monkeypatch.setattr(predict, "Predictor", lambda _: pytest.fail("work has begun"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    assert says in fails(predict, "run", "song.wav", *option)
    compared(1, "command lines")


def test_what_cannot_predict(demo, trained, tmp_path, fails, compared):
    (tmp_path / "notes.txt").touch()
    assert "no audio files" in fails(predict, trained, tmp_path)
    soundfile.write(tmp_path / "a.wav", NOISE[:16000], 16000)
    assert "cannot read a trained model" in fails(predict, tmp_path, tmp_path)
    other = shutil.copytree(demo / "backbone", tmp_path / "other")
    state = load_file(other / "model.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, other / "model.safetensors")
    differs = "differs in weights, sample rate or normalisation: name the right one with --weights"
    assert differs in fails(predict, trained, tmp_path, "--weights", other)
    other = shutil.copytree(demo / "backbone", tmp_path / "z-scored")
    processor = other / "preprocessor_config.json"
    processor.write_text(processor.read_text().replace("false", "true"))
    assert differs in fails(predict, trained, tmp_path, "--weights", other)
    message = fails(predict, trained, tmp_path)  # a folder's name is no place
    assert "no backbone backbone: there is no such file or folder; --weights" in message
    (tmp_path / "old.csv").write_text("an older table")
    fails(predict, trained, tmp_path, "--csv", tmp_path / "old.csv")
    assert (tmp_path / "old.csv").read_text() == "an older table"
    damaged = bytearray((trained / "model.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "model.pt").write_bytes(damaged)
    assert "damaged" in fails(predict, tmp_path, tmp_path, "--weights", demo / "backbone")
    compared(6, "refusals")
