"""DEAM as it is found: splits, annotations with their quirks, folder layouts, audio, resampling."""

import csv
import os
import re

import kagglehub
import numpy as np
import pytest
import soundfile

import extract
from common import DEAMHandler
from kit import deam
from kit.cli import UserError
from kit.deam import STATIC, read_annotations, read_splits, songs_of

HEADER = ",".join(deam.COLUMNS) + "\n"
NOISE = np.random.default_rng(0).normal(0, 0.1, 5 * 44100)


def test_splits_are_the_frozen_ones(splits, compared):
    assert {name: len(splits[name]) for name in ("train", "val", "test")} == {
        "train": 1395, "val": 174, "test": 175}
    everything = songs_of(splits)
    assert len(set(everything)) == 1744 and (min(everything), max(everything)) == (2, 2000)
    assert deam.splits_digest(splits) == (
        "c127846430ead7c2249ece577899cf276362b559daa45eaf37d0b810082fa957")
    compared(len(everything), "song ids, in order")


@pytest.mark.parametrize("content, says", [
    ('{"train": [1], "val": [2]}', "test is not there"),
    ('{"train": [1], "val": [2], "test": [1]}', "twice"),
    ('{"train": ["1"], "val": [2], "test": [3]}', "train.0 is not"),
    ('{"train": [true], "val": [2], "test": [3]}', "train.0 is not"),
    ('{"train": [-1], "val": [2], "test": [3]}', "invalid ids"),
    ('{"train": [], "val": [2], "test": [3]}', "no training songs"),
    ('{"train": {"1": 1}, "val": [2], "test": [3]}', "train is not a list"),
    ("[1]", "not a file of splits"), ("{", "not valid JSON"), ("[" * 10**5, "not valid JSON")])
def test_splits_that_are_none(tmp_path, content, says):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(UserError, match=says):
        read_splits(tmp_path / "s.json")


def test_annotations_with_every_quirk(tmp_path, compared):
    """A byte order mark, CRLF, stray spaces, another column order, extra columns, an empty line."""
    path = tmp_path / STATIC
    path.write_bytes("\ufeffsong_id, note, arousal_mean,valence_mean , valence_std, arousal_std\r\n"
                     "2,x,3,3.1,0.94,0.63\r\n\r\n 3 ,y, 3.3,3.5 ,1.75,1.62\r\n".encode())
    assert read_annotations(path) == {2: (3.1, 0.94, 3, 0.63), 3: (3.5, 1.75, 3.3, 1.62)}
    compared(8, "label values")


@pytest.mark.parametrize("rows, says", [
    ("song_id,valence_mean,valence_std,arousal_mean\n2,1,1,1\n", "one column arousal_std"),
    *((f"{HEADER}2,1,1,1,1\n{row}\n", "line 3: not two labels from 1 to 9") for row in (
        "3,1,1,nan,1", "3,inf,1,1,1", "3,0.5,1,1,1", "3,1,1,9.5,1", "3,1,-1,1,1", "3,1,1,n/a,1")),
    *((f"{HEADER}2,1,1,1,1\n{row}\n", "line 3: not a song id and 4 other cells") for row in (
        "3,1,1", "-3,1,1,1,1", "3.0,1,1,1,1", "³,1,1,1,1", ",1,1,1,1")),
    (f"{HEADER}2,1,1,1,1\n2,1,1,1,1\n", "song 2 appears twice"),
    (HEADER, "no songs"), ("", "needs one column song_id"), (b"\xff\xfe\x00", "not text")])
def test_annotations_that_are_none(tmp_path, fails, rows, says):
    (tmp_path / STATIC).write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    assert says in fails(extract, "--deam", tmp_path, "--features", tmp_path / "out")
    assert not (tmp_path / "out").exists()


TABLE = HEADER + "2,3.1,0.94,3,0.63\n3,3.5,1.75,3.3,1.62\n"
SEMICOLONS = TABLE.replace(",", ";")
COMMAS = SEMICOLONS.replace(".", ",")  # decimal ones


@pytest.mark.parametrize("content", [
    TABLE.encode("utf-16"), TABLE.encode("utf-16-be").join([b"\xfe\xff", b""]),
    TABLE.encode("utf-8-sig"), TABLE.replace("\n", ",,,\n"),
    ",,,,\n\n" + TABLE + ",,,,\n", TABLE.replace("\n", "\r"), TABLE.strip(),
    TABLE.replace(",", " , "), TABLE.replace("\n", ",a note\n")])
def test_tables_that_a_spreadsheet_saved(tmp_path, compared, content):
    (tmp_path / STATIC).write_bytes(content.encode() if isinstance(content, str) else content)
    assert read_annotations(tmp_path / STATIC) == {2: (3.1, 0.94, 3, 0.63),
                                                   3: (3.5, 1.75, 3.3, 1.62)}
    compared(8, "label values")


@pytest.mark.parametrize("content, says", [
    (SEMICOLONS, "has semicolons in it"), (COMMAS, "has semicolons in it"),
    (COMMAS.replace(";", "\t"), "has tabs in it"), ("sep=;\n" + SEMICOLONS, "has semicolons"),
    (re.sub(r"[^,\n]+", r'"\g<0>"', TABLE), "has quotation marks in it"),
    (TABLE.replace("3.5", '3,"3.5'), "has quotation marks in it"),
    *((TABLE.replace(",", mark), f"its header is 'song_id{re.escape(mark)}") for mark in "|: "),
    ("sep=,\n" + TABLE, "needs one column song_id.*its header is 'sep=,'"),
    *((TABLE.replace("3.1", cell), r"line 2: .*labels from 1 to 9.*\(") for cell in (
        "1.Mai", "05-Jan", "2024-05-01", "04.05", "3_1", "٣.1", "−3.1", "31%", "#N/A", "",
        "3'100", "3\u00a0100")),
    *((TABLE.replace("1.75", cell), "line 3: .*standard deviations") for cell in ("1750", "1e400")),
    (TABLE.replace(".", ","), "line 2: not a song id and 4 other cells"),
    (TABLE.replace("3.5", "3,5"), "line 3: not a song id and 4 other cells"),
    # decimal commas, and columns enough for what they make of a row
    (HEADER.strip() + ",,,,\n2,3,5,1,2,4,5,1,2,,,,\n", "line 2: not a song id and 8 other cells"),
    (TABLE.replace("song_id,", "song_id,valence_mean,"), "needs one column valence_mean"),
    *((content, "not text .* save it as UTF-8") for content in (
        TABLE.encode("utf-16-le"), TABLE.encode("utf-32"), TABLE.replace("3.1", "3\0.1").encode())),
    (b"PK\3\4" + bytes(100), "save it as CSV"),
    (("Grüße," + TABLE).encode("latin-1"), "save it as UTF-8"),
    ("<!DOCTYPE html>\n<html>", "its header is '<!DOCTYPE html>'")])
def test_tables_that_would_be_read_wrongly(tmp_path, content, says):
    """Separators, dates, decimal commas, marks for thousands: each is named, in one line."""
    (tmp_path / STATIC).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=says) as error:
        read_annotations(tmp_path / STATIC)
    assert "\n" not in str(error.value)


DYNAMIC = "song_id,sample_15000ms,sample_15500ms\n2,0.1,0.2\n3,-0.5,0.034\n"


@pytest.mark.parametrize("content, says", [
    (DYNAMIC.replace("0.034", "34"), "line 3: not numbers from -1 to 1"),
    (DYNAMIC.replace("\n2,", "\n1.000,"), "line 2: not a song id"),
    (DYNAMIC.replace("0.1", "1.Mai"), "line 2: not"), (DYNAMIC + "2,0.3,0.4\n", "line 4: song 2 "),
    (DYNAMIC.replace(".", ","), "line 2: not a song id and 2 other cells"),
    (DYNAMIC[8:], "needs one column song_id"), (DYNAMIC.replace(",", "|"), "song_id|"),
    (DYNAMIC.replace(",", ";"), "has semicolons in it")])
def test_dynamic_tables_that_would_be_read_wrongly(tmp_path, content, says):
    (tmp_path / "valence.csv").write_text(content)
    with pytest.raises(UserError, match=says):
        deam.dynamic_means(tmp_path / "valence.csv")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_splits_with_a_byte_order_mark(tmp_path, compared, encoding):
    (tmp_path / "s.json").write_text('{"train": [1], "val": [2], "test": [3]}', encoding=encoding)
    assert songs_of(read_splits(tmp_path / "s.json")) == [1, 2, 3]
    compared(3, "songs")


def test_of_two_tables_that_differ_none_is_taken(tmp_path, compared):
    """Both are named; copies with the same labels are fine."""
    for folder in ("AAA_old", "annotations/song_level", "__MACOSX/annotations"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "annotations/song_level" / STATIC).write_text(TABLE)
    (tmp_path / "__MACOSX/annotations" / f"._{STATIC}").write_bytes(b"a resource fork")
    copy = tmp_path / "AAA_old" / STATIC
    copy.write_text(TABLE.replace(",", ", "))
    assert DEAMHandler(tmp_path).annotations[2] == (3.1, 0.94, 3, 0.63)
    copy.write_text(TABLE.replace("3.1", "3.2"))
    with pytest.raises(UserError) as error:
        DEAMHandler(tmp_path)
    assert all(f"{folder}/{STATIC}" in str(error.value) for folder in ("old", "song_level"))
    copy.unlink()
    for folder in ("b/dynamic", "a/dynamic (per second annotations)"):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("valence", "arousal", "._valence"):
            (tmp_path / folder / f"{name}.csv").write_text(DYNAMIC)
    found = DEAMHandler(tmp_path).dynamic
    assert {path.parent.parent.name for path in found.values()} == {"a"} and len(found) == 2
    (tmp_path / "b/dynamic/arousal.csv").write_text(DYNAMIC.replace("0.1", "0.15"))
    with pytest.raises(UserError, match=r"differ: .*/a/dynamic .*arousal.csv and .*/b/dynamic/"):
        DEAMHandler(tmp_path)
    compared(2, "refusals")


@pytest.mark.parametrize("audio, labels", [
    ("DEAM_audio/MEMD_audio", "DEAM_Annotations/annotations/annotations averaged per song"),
    ("DEAM_audio/MEMD_audio", "DEAM_Annotations/annotations/annotations_averaged_per_song"),
    ("MEMD_audio", "annotations/annotations averaged per song/song_level"), (".", ".")])
def test_folder_layouts(tmp_path, compared, audio, labels):
    for folder in (audio, labels):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / labels / STATIC).write_bytes(
        HEADER.replace(",", ", ").encode() + b"2,3.1,0.94,3,0.63\r\n")
    (tmp_path / labels / "static_annotations_averaged_songs_2000_2058.csv").write_text(
        "song_id, valence_mean\r\n2001,3\r\n")
    (tmp_path / audio / "._2.mp3").write_bytes(b"a resource fork")
    soundfile.write(tmp_path / audio / "2.wav", np.zeros((1600, 2)), 16000)
    deam = DEAMHandler(tmp_path)
    assert list(deam.annotations) == [2] and deam.audio == {2: tmp_path / audio / "2.wav"}
    assert deam.get_waveform(2)[0].shape == (1600,)
    soundfile.write(tmp_path / "2.flac", np.zeros(1600), 16000)
    with pytest.raises(UserError, match="two files for song 2"):
        DEAMHandler(tmp_path)
    compared(1, "songs found")


def test_links_that_go_round_or_out_end_soon(demo, tmp_path, monkeypatch, compared):
    """DEAM behind a link is found; a link back to its parent is entered once; one to the whole
    system ends with a line."""
    (tmp_path / "DEAM").mkdir()
    (tmp_path / "DEAM/linked").symlink_to(demo / "DEAM")
    for name in ("round", "again"):
        (tmp_path / "DEAM" / name).symlink_to(tmp_path / "DEAM")
    assert len(DEAMHandler(tmp_path / "DEAM").audio) == 60
    (tmp_path / "DEAM/out").symlink_to("/")
    looked = []

    def endless(*_, **__):  # a system with more files than any machine of a test
        for n in range(10**9):
            looked.append(1000)
            yield f"/{n}", [], ["x"] * 1000

    monkeypatch.setattr(os, "walk", endless)
    with pytest.raises(UserError, match="more than 100000 files below .* give a smaller folder"):
        DEAMHandler(tmp_path / "DEAM")
    assert sum(looked) < 110_000
    compared(60, "songs behind links")


def test_no_deam(tmp_path, fails, monkeypatch):
    assert "no folder" in fails(extract, "--deam", tmp_path / "nowhere")
    assert "no DEAM in" in fails(extract, "--deam", tmp_path, "--features", tmp_path / "f")

    def offline(handle):
        assert handle.endswith("/versions/1")  # a bare handle asks for the latest
        raise ConnectionError("Max retries exceeded\nand more")

    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kagglehub, "dataset_download", offline)
    message = fails(extract, "--features", tmp_path / "f")
    assert "cannot download DEAM" in message and "--deam" in message
    assert not (tmp_path / "f").exists()


def test_the_demo_is_like_deam(demo, splits, compared):
    handler, own = DEAMHandler(demo / "DEAM"), read_splits(demo / "splits.json")
    songs = [splits[name][:n] for name, n in (("train", 40), ("val", 10), ("test", 10))]
    assert [own[name] for name in ("train", "val", "test")] == songs
    assert "synthetic" in own["source"]
    songs = sum(songs, [])
    assert sorted(handler.annotations) == sorted(handler.audio) == sorted(songs)
    info = soundfile.info(handler.audio[songs[0]])
    assert (info.samplerate, info.channels, info.subtype) == (44100, 2, "PCM_16")
    raw = next(demo.rglob(STATIC)).read_bytes()
    assert raw.startswith(", ".join(deam.COLUMNS).encode() + b"\r\n") and raw.count(b"\r\n") == 61
    for name, column in (("valence", 0), ("arousal", 2)):
        header, *rows = csv.reader(handler.dynamic[name].open())
        assert header[1].startswith("sample_") and len(rows) == 60
        moving = {int(song): np.mean([float(cell) for cell in cells if cell])
                  for song, *cells in rows}
        still = [handler.annotations[song][column] for song in songs]
        assert np.corrcoef([moving[song] for song in songs], still)[0, 1] > 0.95
        spread = [handler.annotations[song][column + 1] for song in songs]
        assert np.mean(spread) == pytest.approx(1.5, abs=0.1)
    compared(len(songs), "songs")
