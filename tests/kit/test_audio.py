"""Audio files as people have them: read to the end of their sound, or refused in one line."""

import io
import os
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import ROOT

from common import DEAMHandler
from kit.audio import mix_level, read_clip, read_waveform, read_windows, resample, sin_pi
from kit.containers import looks_like_audio
from kit.deam import STATIC
from kit.audio import BadClip, no_stderr

RATE = 44100
NOISE = np.random.default_rng(0).normal(0, 0.1, 5 * RATE)


@pytest.mark.parametrize("suffix, tolerance", [
    (".wav", 1e-3), (".flac", 1e-3), (".ogg", 0.02), (".mp3", 0.02)])
def test_a_tone_keeps_length_and_level(tmp_path, compared, suffix, tolerance):
    """Stereo at 44.1 kHz → 16 kHz mono of the same duration, frequency and level."""
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * 44100) / 44100)
    soundfile.write(tmp_path / f"tone{suffix}", np.stack([tone, 0.5 * tone], 1), 44100)
    waveform, digest = read_waveform(tmp_path / f"tone{suffix}", 16000)
    assert abs(len(waveform) - 32000) <= (0.08 * 16000 if suffix == ".mp3" else 0)
    middle = waveform[8000:24000]  # one second, so that a bin of its spectrum is one Hz
    assert middle.square().mean().sqrt().item() == pytest.approx(0.375 / 2**0.5, rel=tolerance)
    assert torch.fft.rfft(middle).abs().argmax().item() == 440
    assert read_waveform(tmp_path / f"tone{suffix}", 16000)[1] == digest
    compared(len(middle), "samples")


def test_bad_clips_are_named(tmp_path, compared):
    for name, values in (("whole.wav", np.zeros((44100, 2))), ("whole.mp3", NOISE),
                         ("whole.flac", NOISE[:44100])):
        soundfile.write(tmp_path / name, values, 44100)
    soundfile.write(tmp_path / "short.wav", np.zeros(399), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "slow.wav", np.zeros(16000), 3999)
    soundfile.write(tmp_path / "fast.wav", np.zeros(16000), 384_001)
    whole = (tmp_path / "whole.wav").read_bytes()
    content = {"empty.mp3": b"", "text.mp3": b"not audio " * 100}
    for kind in ("AIFF", "AU", "W64", "RF64", "CAF", "OGG", "WAV"):
        soundfile.write(tmp_path / "whole", np.zeros(44100), 44100, format=kind)
        read_waveform(tmp_path / "whole", 16000)
        half = (tmp_path / "whole").read_bytes()
        content[f"cut.{kind.lower()}"] = half[:len(half) // 2]
    content |= {"cut.flac": (tmp_path / "whole.flac").read_bytes()[:30000],
                "cut.mp3": (tmp_path / "whole.mp3").read_bytes()[:20000]}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    expected = {"short.wav": "too short", "nan.wav": "NaN", "empty.mp3": "empty file",
                "text.mp3": "not readable", "cut.mp3": "truncated",
                **{name: "truncated|malformed" for name in content if name.startswith("cut.")},
                "cut.flac": "not readable|truncated", "slow.wav": "3999 Hz: convert it to 44100",
                "fast.wav": "384001 Hz: convert it to 44100", "none.wav": "not readable"}
    for name, says in expected.items():
        with pytest.raises(BadClip, match=says):
            read_waveform(tmp_path / name, 16000)
    streamed = bytearray(whole)  # what a program writes that pipes a WAV and cannot know its length
    struct.pack_into("<I", streamed, streamed.index(b"data") + 4, 0xFFFFFFFF)
    (tmp_path / "streamed.wav").write_bytes(streamed)
    assert len(read_waveform(tmp_path / "streamed.wav", 16000)[0]) == 16000
    compared(len(expected) + 1, "files")


@pytest.mark.parametrize("claimed", [0, 2**36 - 1])
def test_a_flac_of_any_claimed_length(tmp_path, compared, claimed):
    """A stream says 0 frames, for unknown; a damaged header says anything: neither takes memory."""
    soundfile.write(tmp_path / "song.flac", NOISE, 44100)
    expected = read_waveform(tmp_path / "song.flac", 16000)[0]
    data = bytearray((tmp_path / "song.flac").read_bytes())
    data[21] = data[21] & 0xF0 | claimed >> 32  # 36 bits in the middle of STREAMINFO
    struct.pack_into(">I", data, 22, claimed & 0xFFFFFFFF)
    (tmp_path / "song.flac").write_bytes(data)
    if claimed:
        with pytest.raises(BadClip, match="truncated"):
            read_waveform(tmp_path / "song.flac", 16000)
        with pytest.raises(BadClip, match="truncated"):
            list(read_windows(tmp_path / "song.flac", 16000, 1, 0.1))
    else:
        assert torch.equal(read_waveform(tmp_path / "song.flac", 16000)[0], expected)
        assert len(list(read_windows(tmp_path / "song.flac", 16000, 1, 0.5))) > 1
    compared(2, "readings")


@pytest.mark.parametrize("rate, new", [
    (44100, 16000), (48000, 16000), (22050, 16000), (11025, 16000), (8000, 16000), (32000, 16000),
    (96000, 16000), (4000, 16000), (384_000, 16000), (44100, 48000)])
def test_resampling_is_torchaudios(compared, rate, new):
    waveform = np.random.default_rng(rate).normal(size=rate // 2 + 17)
    expected = torchaudio.functional.resample(torch.from_numpy(waveform), rate, new).numpy()
    found = resample(waveform, rate, new)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) < 1e-12 * np.linalg.norm(expected)
    compared(len(found), "samples")


def test_the_resamplers_sine_is_numpys(compared):
    x = np.linspace(-7, 7, 100_001)  # its kernel looks no further than 6
    assert np.abs(sin_pi(x) - np.sin(np.pi * x)).max() < 4e-15
    assert not sin_pi(np.arange(-9.0, 9)).any()
    compared(len(x), "sines")


def test_odd_rates_take_no_more_memory_than_others(tmp_path, compared):
    """A second each, at rates without a common factor with 16 kHz; by the process's own peak."""
    rates = (44101, 15999, 4001, 383_999, 384_000)
    for rate in rates:
        soundfile.write(tmp_path / f"{rate}.wav", np.zeros(rate), rate)
    script = ("import sys, resource; sys.path.insert(0, sys.argv[1])\n"
              "from kit.audio import read_waveform\n"
              "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
              "for path in sys.argv[2:]:\n"
              "    assert len(read_waveform(path, 16000)[0]) == 16000\n"
              "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    done = subprocess.run([sys.executable, "-c", script, ROOT, *(
        tmp_path / f"{rate}.wav" for rate in rates)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1e6  # kB
    compared(len(rates), "sample rates")


def encoded(kind, seconds=2, rate=RATE, channels=2, **options):
    """Noise as the bytes of a file."""
    noise = np.random.default_rng(7).normal(0, 0.1, (round(seconds * rate), channels))
    file = io.BytesIO()
    soundfile.write(file, noise, rate, format=kind, **options)
    return file.getvalue()


def mp3(seconds=2, rate=RATE, channels=2, mode="VARIABLE"):
    return encoded("MP3", seconds, rate, channels, bitrate_mode=mode, compression_level=0.5)


def frame_size(data):
    """Bytes of the MPEG-1 Layer III frame that data begins with, at 44100 Hz."""
    kbit = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)[data[2] >> 4]
    return 144_000 * kbit // RATE + (data[2] >> 1 & 1)


def headerless(data):
    """An MP3 without its first frame, which says how many there are."""
    assert data[36:40] in (b"Xing", b"Info")
    return data[frame_size(data):]


def claiming(data, count):
    """An MP3 that says it has so many frames."""
    return data[:44] + struct.pack(">I", count) + data[48:]


def id3v2(content):
    return b"ID3\3\0\0" + bytes(len(content) >> 7 * n & 127 for n in (3, 2, 1, 0)) + content


PICTURE = id3v2(b"APIC" + np.random.default_rng(1).bytes(60_000))
ID3V1 = b"TAG" + b"title".ljust(125, b"\0")
APE = b"x" * 20_000 + b"APETAGEX" + struct.pack("<4I", 2000, 20_032, 1, 0) + bytes(8)
LYRICS = b"LYRICSBEGIN" + b"a" * 89 + b"000100LYRICS200"
JUNK = np.random.default_rng(2).bytes(4000)
AROUND = [(PICTURE, b""), (JUNK, b""), (bytes(30_000), b""), (b"", ID3V1), (b"", APE),
          (PICTURE, APE + LYRICS + ID3V1)]


@pytest.fixture
def length(tmp_path):
    """length(data) → seconds read of a file with these bytes."""

    def read(data):
        (tmp_path / "song").write_bytes(data)
        return len(read_waveform(tmp_path / "song", 16000)[0]) / 16000

    return read


@pytest.fixture
def refused(tmp_path):
    """refused(data) → the line for a file with these bytes."""

    def read(data):
        (tmp_path / "song").write_bytes(bytes(data))
        with pytest.raises(BadClip) as problem:
            read_waveform(tmp_path / "song", 16000)
        line = str(problem.value)
        assert "\n" not in line and " object at " not in line
        return line

    return read


def test_mp3s_are_read_to_their_end(length, compared):
    """Whatever stands around their frames, and whatever a header says; without one, of a quiet
    beginning, or of any kind that libsndfile writes."""
    quiet = np.random.default_rng(7).normal(0, 0.1, (4 * RATE, 2))
    quiet[:2 * RATE] *= 1e-4
    file = io.BytesIO()
    soundfile.write(file, quiet, RATE, format="MP3", bitrate_mode="VARIABLE")
    whole, bare = mp3(), headerless(mp3())
    cases = [(headerless(file.getvalue()), 4), (headerless(mp3(mode="CONSTANT")), 2),
             *((claiming(whole, count), 2) for count in (0, 1, 40)),
             *((front + data + back, 2) for front, back in AROUND for data in (whole, bare)),
             *((encoded("MP3", 2, rate, channels), 2)
               for rate in (8000, 11025, 16000, 22050, 24000, 32000, 48000) for channels in (1, 2))]
    for data, seconds in cases:
        assert seconds - 0.001 < length(data) < seconds + 0.2
    compared(len(cases), "files")


def test_a_header_that_says_too_little_keeps_its_delay(tmp_path, compared):
    (tmp_path / "right.mp3").write_bytes(mp3())
    (tmp_path / "wrong.mp3").write_bytes(claiming(mp3(), 40))
    right, wrong = (next(read_windows(tmp_path / f"{name}.mp3", 16000))[2]
                    for name in ("right", "wrong"))
    assert len(right) == 2 * RATE and np.array_equal(wrong[:len(right)], right)
    compared(right.size, "samples")


def test_of_several_files_in_one_all_are_read(length, compared):
    """MP3s with and without headers and with tags between them, WAV, FLAC, Ogg Vorbis and Opus."""
    a, b = mp3(2), mp3(3, mode="CONSTANT")
    flac = [encoded("FLAC", seconds) for seconds in (2, 3)]
    ogg = [encoded("OGG", seconds) for seconds in (2, 3)]
    opus = [encoded("OGG", seconds, 48000, subtype="OPUS") for seconds in (2, 3)]
    wav = [encoded("WAV", seconds) for seconds in (2, 3)]
    cases = [a + b, headerless(a) + headerless(b), a + headerless(b), headerless(a) + b,
             PICTURE + a + ID3V1 + PICTURE + headerless(b) + APE, b"".join(flac),
             PICTURE + flac[0] + ID3V1 + PICTURE + flac[1] + ID3V1, b"".join(ogg),
             b"LIST\4\0\0\0abcd".join(wav), ogg[0] + JUNK + ogg[1] + ID3V1, b"".join(opus)]
    for data in cases:
        assert 4.999 < length(data) < 5.2
    compared(len(cases), "files")


def test_parts_that_do_not_fit_together_are_named(refused, compared):
    cases = [(mp3() + mp3(rate=48000), "44100 Hz and 2 channels to 48000 Hz and 2"),
             (headerless(mp3()) + mp3(channels=1), "to 44100 Hz and 1 after 2"),
             (encoded("OGG") + encoded("OGG", rate=22050), "to 22050 Hz"),
             (encoded("WAV") + encoded("WAV")[36:], "more than one chunk")]
    for data, says in cases:
        assert says in refused(data)
    compared(len(cases), "files")


def test_cut_and_damaged_files_are_named(refused, compared):
    """By what their headers or their frames say; with the seconds that are there."""
    whole, bare, ogg, flac = mp3(4), headerless(mp3(4)), encoded("OGG", 4), encoded("FLAC", 4)
    third = len(bare) // 3
    cases = [(whole[:len(whole) // 2], "truncated: its header says 4."),
             (claiming(whole, 400), "truncated: its header says 10.4 s, and 4.0 s are there"),
             (PICTURE + mp3(2) + whole[:len(whole) // 2] + ID3V1, "truncated"),
             (bare[:third] + bytes(third) + bare[2 * third:], "damaged"),
             (bare + bytes(len(bare)), "damaged"),
             (ogg[:len(ogg) // 2], "truncated"), (ogg[:ogg.rindex(b"OggS")], "truncated"),
             (ogg[:len(ogg) // 2] + ogg, "truncated"), (ogg + ogg[:len(ogg) // 2], "truncated"),
             (flac[:len(flac) // 2], "truncated: its header says 4.0 s, and 2.0 s are there"),
             (flac + flac[:len(flac) // 2], "truncated")]
    for data, says in cases:
        assert refused(data).startswith(says)
    compared(len(cases), "files")


SIZES = (0, 0x7FFFEFFC, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0x80000024, 0xFFFFF000, 0xFFFFFFDB,
         0xFFFFFFFF)


@pytest.mark.parametrize("kind, chunk, order", [
    ("WAV", b"data", "<"), ("AIFF", b"SSND", ">"), ("AU", b".snd", ">")])
def test_sizes_from_pipes_mean_until_the_end(length, refused, compared, kind, chunk, order):
    """And one that is smaller than the sound was cut to 32 bits, unless chunks follow; a larger one
    is that of a file that was cut."""
    data = bytearray(encoded(kind))
    place = data.index(chunk) + (8 if kind == "AU" else 4)
    [size] = struct.unpack_from(f"{order}I", data, place)
    if kind == "WAV":
        note = b"LIST\4\0\0\0abcd"
        assert length(bytes(data) + note) == length(bytes(data) + ID3V1) == 2
    for wrong in (*SIZES, 4008, size // 2):
        struct.pack_into(f"{order}I", data, place, wrong)
        assert length(bytes(data)) == 2
    for wrong in (size + 2, 2 * size, 10**9):
        struct.pack_into(f"{order}I", data, place, wrong)
        assert refused(data).startswith("truncated")
    compared(len(SIZES) + 5, "sizes")


def test_sound_beyond_4_gib_is_not_left_out(tmp_path, compared):
    """A sparse WAV file whose size has wrapped."""
    data, more = bytearray(encoded("WAV", 1)), 5 << 30
    struct.pack_into("<I", data, data.index(b"data") + 4, more % 2**32)
    with open(tmp_path / "large.wav", "wb") as file:
        file.write(data)
        file.truncate(data.index(b"data") + 8 + more)
    with pytest.raises(BadClip, match="holds 5.4 GB of sound, more than its format can tell"):
        next(read_windows(tmp_path / "large.wav", 16000, 10, 10))
    compared(1, "file")


def test_flac_is_read_to_its_end(length, compared):
    """With tags behind, and whatever number of samples its header says."""
    flac = encoded("FLAC")
    few = bytearray(flac)
    struct.pack_into(">I", few, 22, 1000)
    cases = [flac + back for back in (ID3V1, APE, LYRICS + ID3V1, JUNK, bytes(5000))]
    cases += [bytes(few), bytes(few) + APE, PICTURE + flac]
    for data in cases:
        assert length(data) == 2
    compared(len(cases), "files")


def test_what_is_no_audio_is_named(refused, compared):
    box = b"\0\0\0\x20ftypM4A \0\0\0\0"
    cases = [(b"\n<!DOCTYPE html><html>", "an HTML page"), (b"<HTML>", "an HTML page"),
             (box + JUNK, "MPEG-4 audio"), (id3v2(b"title") + b"\xff\xf1" + JUNK, "AAC audio"),
             (b"\x1a\x45\xdf\xa3" + JUNK, "Matroska"), (b"PK\3\4" + JUNK, "a zip archive"),
             (b'{"error": "quota"}', "JSON"), (PICTURE, "holds tags"), (b"", "empty file"),
             (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
             (b"not audio " * 100, "not readable as audio"), (JUNK, "not readable as audio"),
             (b"\xff" * 100_000, "not readable as audio"),
             (b"\xff\xfb\x90\x00" * 9000, "not readable as audio (Format")]
    for data, says in cases:
        assert refused(data).startswith(says)
    compared(len(cases), "files")


def test_audio_is_known_by_its_first_bytes_too(tmp_path, compared):
    cases = {"a.mp2": True, "a.mpga": True, "a.AIFC": True, "a.wave": True, "a.snd": True,
             "a.m4b": True, "a.wma": True, "a.txt": False, "a.jpg": False, "a.raw": False}
    for name, expected in cases.items():
        (tmp_path / name).write_bytes(JUNK)
        assert looks_like_audio(tmp_path / name) == expected
    for data in (mp3(), PICTURE + headerless(mp3()), encoded("OGG"), encoded("WAV"),
                 encoded("FLAC"), encoded("AIFF"), b"\0\0\0\x20ftypM4A "):
        (tmp_path / "noending").write_bytes(data)
        assert looks_like_audio(tmp_path / "noending")
    os.mkfifo(tmp_path / "pipe")
    assert not looks_like_audio(tmp_path / "pipe")  # and it does not wait for it
    compared(len(cases) + 8, "files")


def test_deam_may_have_any_of_these_endings(tmp_path, compared):
    columns = "song_id, valence_mean, valence_std, arousal_mean, arousal_std"
    (tmp_path / STATIC).write_text(columns + "\n2,3.1,0.94,3,0.63\n3,3.1,0.94,3,0.63\n")
    soundfile.write(tmp_path / "2.aifc", NOISE[:RATE], RATE, format="AIFF")
    (tmp_path / "3.MPGA").write_bytes(mp3())
    (tmp_path / "4.csv").touch()
    deam = DEAMHandler(tmp_path)
    assert sorted(deam.audio) == [2, 3] and len(deam.get_waveform(2)[0]) == 16000
    compared(len(deam.audio), "songs")


def test_channels_that_cancel_get_a_remark(tmp_path, compared):
    left = NOISE[:RATE]
    cases = [(left, None), (np.stack([left, left], 1), None), (np.zeros((RATE, 2)), None),
             (np.stack([left, NOISE[RATE:2 * RATE]], 1), None),
             (np.stack([left, -0.5 * left], 1), None),
             (np.stack([left, -left], 1), "inf dB"), (np.stack([left, -0.99 * left], 1), "46 dB")]
    for pcm, says in cases:
        soundfile.write(tmp_path / "song.wav", pcm, RATE, subtype="FLOAT")
        remark = read_clip(tmp_path / "song.wav", 16000)[2]
        assert says in remark and "its channels cancel in the mix" in remark if says else not remark
    assert mix_level(np.array(cases[3][0])) == pytest.approx(-3, abs=0.1)
    compared(len(cases), "mixes")


def test_the_decoder_is_silent_in_every_thread(tmp_path, compared):
    """libmpg123's own lines do not appear, other lines written meanwhile do, and C's stderr is
    itself again."""
    damaged = bytearray(mp3(4))
    for place in np.random.default_rng(3).integers(2000, len(damaged), 60):
        damaged[place] ^= 0xFF
    (tmp_path / "damaged.mp3").write_bytes(damaged)
    script = """if True:
        import ctypes, os, sys, threading
        sys.path.insert(0, sys.argv[1])
        import soundfile
        from kit.audio import BadClip, read_waveform
        def decode():
            for _ in range(5):
                try:
                    read_waveform(sys.argv[2], 16000)
                except BadClip:
                    pass
                sys.stderr.write("python\\n")
        if sys.argv[3] == "aloud":
            with open(sys.argv[2], "rb") as file:
                soundfile.read(file)
        threads = [threading.Thread(target=decode) for _ in range(3)]
        [each.start() for each in threads]
        [each.join() for each in threads]
        if sys.platform == "linux":
            libc = ctypes.CDLL(None)
            libc.fputs(b"C\\n", ctypes.c_void_p.in_dll(libc, "stderr"))
    """
    for how in ("silent", "aloud"):
        done = subprocess.run([sys.executable, "-c", script, ROOT, tmp_path / "damaged.mp3", how],
                              capture_output=True, text=True, check=True)
        lines = done.stderr.splitlines()
        assert lines.count("python") == 15 and ("C" in lines or not no_stderr.null)
        assert (how == "silent") == (len(lines) == 15 + ("C" in lines)) or not no_stderr.null
    assert no_stderr.depth == 0
    compared(30, "readings")


def test_long_mp3s_are_streamed(tmp_path, compared):
    """Four minutes without a header, 42 MB of PCM, take the memory of some windows of 1.8 MB."""
    (tmp_path / "long.mp3").write_bytes(headerless(mp3(4, mode="CONSTANT")) * 60)
    tracemalloc.start()
    starts = [start for start, *_ in read_windows(tmp_path / "long.mp3", 16000, 10, 10)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 230 < starts[-1] < 235 and len(starts) == 25 and peak < 30e6
    compared(len(starts), "windows")
