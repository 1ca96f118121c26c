"""Extraction: what may not change a bit, what is resumed, stopped, shared and repaired."""

import builtins
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, call, extraction

import extract
import verify
from common import Backbone, DEAMHandler
from kit.deam import read_splits, songs_of
from kit.features import describe_features, read_manifest
from kit.files import read_json, tensor_digest

FLOAT32 = ["--precision", "float32"]


def songs_in(folder):
    return read_manifest(folder / "manifest.json")["songs"]


@pytest.fixture
def corpus(demo, tmp_path):
    """A copy of the demo's DEAM."""
    return shutil.copytree(demo / "DEAM", tmp_path / "DEAM")


def test_layers_and_frames(features, ids, compared):
    """Every stored tensor is [T, D], about 50 frames a second, and nothing besides."""
    entries = songs_in(features)
    assert [int(song) for song in entries] == ids
    for song, entry in entries.items():
        stored = torch.load(features / "songs" / f"{song}.pt", weights_only=True)
        assert stored.shape == (entry["frames"], 64) == (299, 64) and stored.dtype == torch.float32
        assert stored.untyped_storage().nbytes() == stored.numel() * 4
        assert tensor_digest(stored) == entry["features"]
    compared(len(entries), "feature files")


@pytest.mark.parametrize("settings", [FLOAT32, ["--store", "float16"]])
def test_threads_and_batches_change_no_bit(demo, ids, tmp_path, compared, settings):
    manifests, threads = [], torch.get_num_threads()
    for count, batch in ((1, 1), (3, 4)):
        torch.set_num_threads(count)
        folder = tmp_path / str(count)
        assert call(extract, *extraction(demo, folder, *settings, "--batch-size", batch, "--songs",
                                         *ids[:4])) == 0
        manifests.append(read_manifest(folder / "manifest.json"))
    torch.set_num_threads(threads)
    assert manifests[0]["digest"] == manifests[1]["digest"] and len(manifests[0]["songs"]) == 4
    compared(4, "songs, two ways")


def test_clips_of_equal_length_are_computed_together(compared):
    """Each clip once, up to `size` together, no more than 32 waiting for others; what failed is
    left out."""
    many = [*range(1, 33), 33, 1]
    for lengths, sizes in (([5] * 7, [2, 2, 2, 1]), ([1, 2, 2, 2, 1], [2, 2, 1]),
                           (many, [1] * 34), ([], [])):
        clips, groups = [], []
        for song, length in enumerate(lengths):
            clips += [(song, torch.zeros(length), "pcm", None), None]
        backbone = SimpleNamespace(hidden_states=lambda states: (groups.append(len(states)),
                                                                 states)[1])
        found = {song: len(states) for song, _, states, _ in
                 extract.compute(clips, backbone, 2, torch.float32)}
        assert [found[song] for song in range(len(lengths))] == lengths and groups == sizes
    compared(46, "clips")


@pytest.mark.parametrize("settings, says", [
    (["--layer", 11, "--store", "float16"], "layer 10 there, 11 now; store float32 there, float16"),
    (["--precision", "exact"], "precision float32 there, exact now")])
def test_settings_are_not_mixed_in_one_folder(demo, features, fails, compared, settings, says):
    before = (features / "manifest.json").read_bytes()
    assert says in fails(extract, *extraction(demo, features, *FLOAT32, *settings))
    assert (features / "manifest.json").read_bytes() == before
    compared(1, "refusals")


def test_damaged_top_layers_are_written_again(demo, own, compared):
    file = own / "top_layers.pt"
    whole = file.read_bytes()
    for damaged in (whole[:-100], b""):
        file.write_bytes(damaged)
        assert call(extract, *extraction(demo, own, *FLOAT32)) == 0
        assert file.read_bytes() == whole
    compared(2, "damages")


def test_stopped_and_resumed(demo, features, ids, tmp_path, fails, compared):
    """SIGTERM and SIGKILL, each as soon as some songs more are there, lose none of those and change
    no bit. A second extraction into the folder meanwhile ends with a line that names the first."""
    folder, there, ids = tmp_path / "f", 0, ids[:36]
    command = extraction(demo, folder, *FLOAT32, "--songs", *ids)
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        with subprocess.Popen([sys.executable, ROOT / "extract.py", *map(str, command)],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            while len(list(folder.glob("songs/*.json"))) < there + 4 and process.poll() is None:
                time.sleep(0.02)
            if number == signal.SIGTERM:
                process.send_signal(signal.SIGSTOP)
                assert f"is being written by process {process.pid} on " in fails(extract, *command)
                process.send_signal(signal.SIGCONT)
            process.send_signal(number)
            output, errors = process.communicate()
        assert process.returncode == code and "Traceback" not in errors, errors
        assert f"{len(ids)} songs, {len(ids) - there} to do" in output
        if code > 0:
            assert errors.splitlines()[-1] == "interrupted: rerun the same command to resume"
        there = len(list(folder.glob("songs/*.json")))
        assert 4 <= there < len(ids)
    written = {path: path.stat().st_mtime_ns for path in folder.glob("songs/*.json")}
    first, second, third = sorted(written)[:3]
    first.with_suffix(".pt").write_bytes(b"damaged")
    second.write_text("{")
    third.with_name(".999.pt.part").write_bytes(b"half a file")
    assert call(extract, *command) == 0
    redone = {path for path, then in written.items() if path.stat().st_mtime_ns != then}
    assert redone == {first, second}  # the others stayed as they were
    assert songs_in(folder) == {song: entry for song, entry in songs_in(features).items()
                                if int(song) in ids}
    assert call(verify, "--features", folder) == 0
    compared(len(ids), "songs, resumed twice")


def test_a_bad_song_does_not_cost_the_others(demo, features, ids, corpus, tmp_path, capsys,
                                             compared):
    audio = DEAMHandler(corpus).audio
    whole = audio[ids[1]].read_bytes()
    audio[ids[1]].write_bytes(b"")
    audio[ids[2]].write_bytes(whole[:5000])
    command = extraction(demo, tmp_path / "f", *FLOAT32, "--deam", corpus, "--songs", *ids[:5])
    assert call(extract, *command) == 1
    output = capsys.readouterr().out
    for song, reason in ((ids[1], "empty file"), (ids[2], "truncated")):
        assert f"failed: {audio[song]}: {reason}" in output
    expected = {song: entry for song, entry in songs_in(features).items() if int(song) in ids[:5]}
    for song in ids[1:3]:
        expected.pop(str(song))
    assert songs_in(tmp_path / "f") == expected
    assert call(verify, "--features", tmp_path / "f") == 0
    for song in ids[1:3]:  # put right, they alone are extracted
        shutil.copy(demo / "DEAM" / audio[song].relative_to(corpus), audio[song])
    capsys.readouterr()
    assert call(extract, *command) == 0 and "5 songs, 2 to do" in capsys.readouterr().out
    compared(len(expected), "songs done beside two bad ones")


def test_nan_in_features_is_a_failed_song(demo, features, ids, tmp_path, monkeypatch, capsys,
                                          compared):
    """A backbone that gives NaN: the song is named, not stored, and tried again."""
    command = extraction(demo, tmp_path / "f", *FLOAT32, "--songs", *ids[:3])
    with monkeypatch.context() as patch:
        computed = iter(range(3))
        patch.setattr(Backbone, "hidden_states", lambda self, waveforms, states=(
            Backbone.hidden_states): states(self, waveforms).fill_(
                torch.nan if next(computed) == 1 else 1))
        assert call(extract, *command) == 1
    assert f"failed: song {ids[1]}: NaN or infinity" in capsys.readouterr().out
    assert list(songs_in(tmp_path / "f")) == [str(ids[0]), str(ids[2])]
    assert not (tmp_path / f"f/songs/{ids[1]}.pt").exists()
    assert call(extract, *command) == 0 and "3 songs, 1 to do" in capsys.readouterr().out
    assert songs_in(tmp_path / "f")[str(ids[1])] == songs_in(features)[str(ids[1])]
    compared(3, "songs")


def test_missing_audio_and_labels_stop_before_any_work(demo, ids, corpus, tmp_path, fails,
                                                       compared):
    for path in list(DEAMHandler(corpus).audio.values())[2:]:
        path.unlink()
    command = extraction(demo, tmp_path / "f", *FLOAT32, "--deam", corpus)
    assert "58 of 60 songs have no audio" in fails(extract, *command)
    assert "1 of 2 songs have no label" in fails(extract, *command, "--songs", ids[0], 3)
    assert "1 of 1 songs have no audio" in fails(extract, *command, "--allow-missing", "--songs",
                                                 next(song for song in ids if song not in
                                                      DEAMHandler(corpus).audio))
    assert not (tmp_path / "f").exists()
    assert call(extract, *command, "--allow-missing") == 0 and len(songs_in(tmp_path / "f")) == 2
    compared(2, "songs extracted with --allow-missing")


def test_several_processes_share_the_songs(demo, features, ids, corpus, tmp_path, monkeypatch,
                                           capsys, compared):
    """As torchrun starts them on several GPUs, here on the CPU: the first in a process of its own,
    the second in this one. One manifest with the digests of one process; the songs that failed
    anywhere are named once."""
    DEAMHandler(corpus).audio[ids[1]].write_bytes(b"")  # the second process's
    command = extraction(demo, tmp_path / "f", *FLOAT32, "--deam", corpus, "--songs", *ids[:8])
    with subprocess.Popen([sys.executable, ROOT / "extract.py", *map(str, command)], text=True,
                          stdout=subprocess.PIPE,
                          env={**os.environ, "RANK": "0", "WORLD_SIZE": "2"}) as first:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert call(extract, *command) == 0
        output = first.stdout.read()
    manifest = read_manifest(tmp_path / "f/manifest.json")
    assert first.returncode == 1 and "8 songs, 4 to do" in output and len(manifest["songs"]) == 7
    assert manifest["songs"].items() <= songs_in(features).items()
    output += capsys.readouterr().out
    assert output.count("failed:") == 1 == output.count(manifest["digest"])
    assert f"{ids[1]}.wav: empty file" in output
    # repaired: the old failure is not taken for a new one
    shutil.copy(DEAMHandler(demo / "DEAM").audio[ids[1]], DEAMHandler(corpus).audio[ids[1]])
    assert not any("failed" in path.read_text() for path in tmp_path.glob("f/songs/*.json"))
    for rank, todo in (("1", 1), ("0", 0)):
        monkeypatch.setenv("RANK", rank)
        assert call(extract, *command) == 0
        assert f"8 songs, {todo} to do" in capsys.readouterr().out
    assert songs_in(tmp_path / "f").items() <= songs_in(features).items()
    assert len(songs_in(tmp_path / "f")) == 8
    compared(8, "songs")


def test_a_damaged_file_is_extracted_again(demo, own, features, ids, capsys, compared):
    """Of any kind, as the messages advise."""
    paths = [own / "songs" / f"{song}.pt" for song in ids[:6]]
    value = torch.load(paths[0], weights_only=True)
    for path, other in zip(paths, (value.bfloat16(), value + 1, value * torch.nan, [value])):
        torch.save(other, path)
    paths[4].unlink()
    paths[5].write_bytes(b"")
    assert call(extract, *extraction(demo, own, *FLOAT32)) == 0
    assert "60 songs, 6 to do" in capsys.readouterr().out
    assert songs_in(own) == songs_in(features) and call(verify, "--features", own) == 0
    compared(len(paths), "damaged files")


def test_a_complete_folder_may_be_for_reading_only(demo, own, ids, monkeypatch, capsys, fails,
                                                   compared):
    """By root neither: what opens a file in it for writing is refused."""
    opened, command = builtins.open, extraction(demo, own, *FLOAT32)

    def refuse(path, mode="r", *rest, **more):
        if str(path).startswith(str(own)) and set(mode) & set("wax+"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, mode, *rest, **more)

    monkeypatch.setattr(builtins, "open", refuse)
    before = {path: path.stat().st_mtime_ns for path in own.rglob("*")}
    assert call(extract, *command) == 0 and "60 songs, 0 to do" in capsys.readouterr().out
    assert call(verify, "--features", own) == 0
    assert before == {path: path.stat().st_mtime_ns for path in own.rglob("*")}
    (own / "songs" / f"{ids[0]}.pt").unlink()
    message = fails(extract, *command)
    assert "cannot write" in message and "choose a folder that you may write to" in message
    compared(len(ids), "songs")


def test_channels_that_cancel_are_noted(demo, tmp_path, capsys, compared):
    """In the song's record and at the end of the run."""
    root = tmp_path / "D"
    shutil.copytree(demo / "DEAM/DEAM_Annotations", root / "DEAM_Annotations")
    song = min(songs_of(read_splits(demo / "splits.json")))
    left = np.random.default_rng(0).uniform(-0.5, 0.5, 16000)
    soundfile.write(root / f"{song}.wav", np.stack([left, -left], 1), 16000)
    folder = tmp_path / "f"
    assert call(extract, "--deam", root, "--weights", demo / "backbone", "--splits",
                demo / "splits.json", "--features", folder, "--device", "cpu", "--songs", song,
                *FLOAT32) == 0
    note = read_json(folder / f"songs/{song}.json", "")["note"]
    assert "cancel" in note and f"note: song {song}: {note}" in capsys.readouterr().out
    compared(1, "song")


def test_a_manifest_says_what_its_backbone_is(demo, compared):
    """Sample rate and z-scoring of the waveform too: the demo's backbone has none of it."""
    backbone, deam = Backbone(demo / "backbone"), DEAMHandler(demo / "DEAM")
    backbone.epsilon, backbone.sample_rate = 1e-7, 8000
    settings = describe_features(deam, backbone, 10, "exact", "float16")["settings"]
    assert settings == {"weights": backbone.digest, "layer": 10, "precision": "exact",
                        "store": "float16", "sample_rate": 8000, "normalize_epsilon": 1e-7}
    compared(len(settings), "settings")
