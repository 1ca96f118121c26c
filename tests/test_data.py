"""DEAM as it is found: splits, annotations with their quirks, folder layouts, audio files."""

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from conftest import call

import common
import extract
from common import BadClip, DEAMHandler, UserError, json_digest, read_annotations, read_splits, read_waveform

STATIC = common.STATIC


def test_splits_are_the_frozen_ones(splits, compared):
    assert {name: len(ids) for name, ids in splits.items()} == {"train": 1395, "val": 174, "test": 175}
    everything = sum(splits.values(), [])
    assert len(set(everything)) == len(everything) == 1744 and min(everything) == 2 and max(everything) == 2000
    assert json_digest(splits) == "c127846430ead7c2249ece577899cf276362b559daa45eaf37d0b810082fa957"
    compared(len(everything), "song ids, in order")


@pytest.mark.parametrize("content, says", [
    ('{"train": [1], "val": [2]}', "lists of song ids"), ('{"train": [1], "val": [2], "test": [1]}', "twice"),
    ('{"train": ["1"], "val": [2], "test": [3]}', "lists of song ids"), ("[1]", "lists of song ids"), ("{", "not valid JSON")])
def test_splits_that_are_none(tmp_path, content, says):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(UserError, match=says):
        read_splits(tmp_path / "s.json")


def test_annotations_with_every_quirk(tmp_path, compared):
    """A byte order mark, CRLF, stray spaces, another column order, extra columns, an empty line."""
    path = tmp_path / STATIC
    path.write_bytes("\ufeffsong_id, note, arousal_mean,valence_mean , valence_std, arousal_std\r\n"
                     "2,x,3,3.1,0.94,0.63\r\n\r\n 3 ,y, 3.3,3.5 ,1.75,1.62\r\n".encode())
    assert read_annotations(path) == {2: ["3.1", "0.94", "3", "0.63"], 3: ["3.5", "1.75", "3.3", "1.62"]}
    compared(8, "label values")


@pytest.mark.parametrize("rows, says", [
    ("song_id,valence_mean,valence_std,arousal_mean\n2,1,1,1\n", "no column arousal_std"),
    ("song_id,valence_mean,valence_std,arousal_mean,arousal_std\n2,1,1,nan,1\n", "line 2: not five finite"),
    ("song_id,valence_mean,valence_std,arousal_mean,arousal_std\n2,1,1,1,1\n3,1,1\n", "line 3: not five finite"),
    ("song_id,valence_mean,valence_std,arousal_mean,arousal_std\n2,1,1,1,1\n2,1,1,1,1\n", "song 2 stands there twice"),
    ("song_id,valence_mean,valence_std,arousal_mean,arousal_std\n", "no songs"), ("", "no column")])
def test_annotations_that_are_none(tmp_path, fails, rows, says):
    (tmp_path / STATIC).write_text(rows)
    assert says in fails(extract, "--deam", tmp_path, "--features", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("audio, labels", [
    ("DEAM_audio/MEMD_audio", "DEAM_Annotations/annotations/annotations averaged per song/song_level"),
    ("DEAM_audio/MEMD_audio", "DEAM_Annotations/annotations/annotations_averaged_per_song/song_level"),
    ("MEMD_audio", "annotations/annotations averaged per song/song_level")])
def test_folder_layouts(tmp_path, compared, audio, labels):
    (tmp_path / audio).mkdir(parents=True)
    (tmp_path / labels).mkdir(parents=True)
    (tmp_path / labels / STATIC).write_text("song_id, valence_mean, valence_std, arousal_mean, arousal_std\r\n2,3.1,0.94,3,0.63\r\n")
    (tmp_path / labels / "static_annotations_averaged_songs_2000_2058.csv").write_text("song_id, valence_mean\r\n2001,3\r\n")
    (tmp_path / audio / "._2.mp3").write_bytes(b"a resource fork")
    soundfile.write(tmp_path / audio / "2.wav", np.zeros((1600, 2)), 16000)
    deam = DEAMHandler(tmp_path)
    assert list(deam.annotations) == [2] and deam.audio == {2: tmp_path / audio / "2.wav"} and not deam.demo
    assert deam.get_waveform(2)[0].shape == (1600,)
    soundfile.write(tmp_path / "2.flac", np.zeros(1600), 16000)
    with pytest.raises(UserError, match="two files for song 2"):
        DEAMHandler(tmp_path)
    compared(1, "songs found")


def test_no_deam(tmp_path, fails, monkeypatch):
    assert "no folder" in fails(extract, "--deam", tmp_path / "nowhere")
    assert "no DEAM in" in fails(extract, "--deam", tmp_path, "--features", tmp_path / "f")
    import kagglehub

    def offline(handle):
        assert handle.endswith("/versions/1")
        raise ConnectionError("Max retries exceeded")

    monkeypatch.setattr(kagglehub, "dataset_download", offline)
    message = fails(extract, "--features", tmp_path / "f")
    assert "cannot download DEAM" in message and "--deam" in message and not (tmp_path / "f").exists()


def test_a_tone_keeps_length_and_level(tmp_path, compared):
    """Stereo 44.1 kHz, as MP3, WAV, FLAC and Ogg: 16 kHz mono of the same duration, frequency and level."""
    clock = np.arange(2 * 44100) / 44100
    tone = 0.5 * np.sin(2 * np.pi * 440 * clock)
    checked = 0
    for suffix, tolerance in ((".wav", 1e-3), (".flac", 1e-3), (".ogg", 0.02), (".mp3", 0.02)):
        path = tmp_path / f"tone{suffix}"
        soundfile.write(path, np.stack([tone, 0.5 * tone], 1), 44100)
        waveform, digest = read_waveform(path, 16000)
        middle = waveform[8000:24000].double()
        assert abs(len(waveform) - 32000) <= 0.08 * 16000 if suffix == ".mp3" else len(waveform) == 32000
        assert middle.square().mean().sqrt().item() == pytest.approx(0.375 / 2**0.5, rel=tolerance)
        assert torch.fft.rfft(middle).abs().argmax().item() == 440  # Hz: the window is one second
        assert read_waveform(path, 16000)[1] == digest
        checked += 1
    compared(checked, "formats")


def test_bad_clips_are_named(tmp_path, compared):
    soundfile.write(tmp_path / "whole.wav", np.zeros((44100, 2)), 44100)
    soundfile.write(tmp_path / "whole.mp3", np.random.default_rng(0).normal(0, 0.1, 5 * 44100), 44100)
    whole = (tmp_path / "whole.wav").read_bytes()
    soundfile.write(tmp_path / "short.wav", np.zeros(399), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    (tmp_path / "empty.mp3").write_bytes(b"")
    (tmp_path / "text.mp3").write_text("not audio " * 100)
    (tmp_path / "cut.wav").write_bytes(whole[:len(whole) // 2])
    soundfile.write(tmp_path / "whole.flac", np.random.default_rng(0).normal(0, 0.1, 44100), 44100)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "whole.flac").read_bytes()[:30000])
    (tmp_path / "cut.mp3").write_bytes((tmp_path / "whole.mp3").read_bytes()[:20000])
    expected = {"short.wav": "too short", "nan.wav": "NaN", "empty.mp3": "empty", "text.mp3": "not readable", "cut.wav": "truncated", "cut.mp3": "truncated",
                "cut.flac": "not readable"}
    for name, says in expected.items():
        with pytest.raises(BadClip, match=says):
            read_waveform(tmp_path / name, 16000)
    streamed = bytearray(whole)  # the length a program writes when it pipes a WAV and cannot know
    place = streamed.index(b"data") + 4
    streamed[place:place + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "streamed.wav").write_bytes(bytes(streamed))
    assert len(read_waveform(tmp_path / "streamed.wav", 16000)[0]) == 16000
    compared(len(expected) + 1, "files")


def test_demo_corpus_is_like_deam(demo, splits, compared):
    deam = DEAMHandler(demo / "DEAM_demo")
    wanted = splits["train"][:40] + splits["val"][:10] + splits["test"][:10]
    assert deam.demo and sorted(deam.annotations) == sorted(deam.audio) == sorted(wanted)
    info = soundfile.info(deam.audio[wanted[0]])
    assert (info.samplerate, info.channels, info.subtype) == (44100, 2, "PCM_16")
    averaged = demo / "DEAM_demo/DEAM_Annotations/annotations/annotations averaged per song"
    raw = (averaged / "song_level" / STATIC).read_bytes()
    assert raw.startswith(b"song_id, valence_mean, valence_std, arousal_mean, arousal_std\r\n") and raw.count(b"\r\n") == 61
    for name, column in (("valence", 0), ("arousal", 2)):
        rows = (averaged / "dynamic (per second annotations)" / f"{name}.csv").read_text().splitlines()
        assert rows[0].startswith("song_id,sample_") and len(rows) == 61
        moving = {int(row.split(",")[0]): np.mean([float(cell) for cell in row.split(",")[1:] if cell]) for row in rows[1:]}
        still = {song: float(values[column]) for song, values in deam.annotations.items()}
        assert np.corrcoef([moving[song] for song in wanted], [still[song] for song in wanted])[0, 1] > 0.95
        spread = [float(values[column + 1]) for values in deam.annotations.values()]
        assert np.mean(spread) == pytest.approx(1.5, abs=0.1)
    compared(len(wanted), "songs")


def test_one_bad_song_does_not_stop_the_others(demo, tmp_path, capsys, compared):
    shutil.copytree(demo / "DEAM_demo", tmp_path / "DEAM")
    audio = sorted((tmp_path / "DEAM/DEAM_audio/MEMD_audio").glob("*.wav"), key=lambda path: int(path.stem))
    audio[1].write_bytes(b"")
    out = tmp_path / "feats"
    assert call(extract, "--deam", tmp_path / "DEAM", "--bundle", "DEMO", "--features", out, "--limit", 4, "--device", "cpu") == 1
    assert f"failed: {audio[1]}: empty file" in capsys.readouterr().out
    done = sorted(json.loads((out / "manifest.json").read_text())["songs"], key=int)
    assert done == [path.stem for path in (audio[0], audio[2], audio[3])]
    compared(len(done), "songs done beside it")


def test_missing_audio_stops_before_any_work(demo, tmp_path, fails, compared):
    shutil.copytree(demo / "DEAM_demo", tmp_path / "DEAM")
    audio = sorted((tmp_path / "DEAM/DEAM_audio/MEMD_audio").glob("*.wav"), key=lambda path: int(path.stem))
    for path in audio[2:]:
        path.unlink()
    command = ["--deam", tmp_path / "DEAM", "--bundle", "DEMO", "--features", tmp_path / "feats", "--device", "cpu"]
    message = fails(extract, *command)
    assert "58 of 60 songs have no audio" in message and audio[2].stem in message and not (tmp_path / "feats").exists()
    assert call(extract, *command, "--allow-missing") == 0
    assert len(list((tmp_path / "feats/songs").glob("*.pt"))) == 2
    compared(2, "songs extracted with --allow-missing")
