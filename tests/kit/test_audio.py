"""Audio files as people have them: read to the end of their sound, or refused in one line."""

import ctypes
import io
import os
import re
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from common import DEAMHandler
from kit.audio import (BadClip, mix_level, no_stderr, read_clip, read_waveform, read_windows,
                       resample, sin_pi)
from kit.containers import looks_like_audio
from kit.deam import STATIC

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


def test_bad_clips_are_named(refused, compared):
    """By their length, their values and their rate; cut ones of every format, and what is read of
    none."""
    sound = encoded("WAV", 1)
    cases = [(encoded("WAV", 399 / 16000, 16000), "too short: 399 samples"),
             (encoded("WAV", 1, subtype="FLOAT")[:-4] + b"\0\0\xc0\x7f", "holds NaN"),
             (encoded("WAV", 1, 3999), "its sample rate is 3999 Hz: convert it to 44100"),
             (encoded("WAV", 1, 384_001), "its sample rate is 384001 Hz: convert it to 44100"),
             (sound[:30], "damaged or truncated"), (b"fLaC\0\0", "damaged"),
             (b"OggS", "damaged or truncated"), (b"OggS\0", "damaged or truncated")]
    for kind, says in (("WAV", "truncated"), ("AIFF", "truncated"), ("OGG", "damaged or truncated"),
                       ("FLAC", "truncated: its header says 2.0 s, and 0.9 s"),
                       ("MP3", "truncated: its header says 2.0 s, and 1.0 s")):
        whole = encoded(kind)
        cases.append((whole[:len(whole) // 2], says))
    for data, says in cases:
        assert refused(data).startswith(says)
    compared(len(cases), "files")


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


def test_odd_rates_take_no_more_memory_than_others(compared):
    """A second each, at rates without a common factor with 16 kHz."""
    rates = (44101, 4001, 383_999)
    tracemalloc.start()
    for rate in rates:
        assert len(resample(np.zeros(rate), rate, 16000)) == 16000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500e6
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
JUNK = np.random.default_rng(2).bytes(4000)
AROUND = [(PICTURE, b""), (JUNK, b""), (bytes(30_000), b""), (b"", ID3V1), (b"", APE),
          (PICTURE, APE + ID3V1)]


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


def test_several_recordings_in_one_file_are_named(refused, compared):
    """MP3s with and without headers and with tags between them, or of different kinds; WAV, FLAC,
    Ogg Vorbis and Opus; a file and a part of one. With how much there is, and how much was read."""
    a, b = mp3(2), mp3(3, mode="CONSTANT")
    mp3s = [a + b, a + mp3(rate=48000), headerless(a) + b, headerless(a) + mp3(channels=1),
            PICTURE + a + ID3V1 + PICTURE + b + APE, a + a[:len(a) // 2]]
    others = [(encoded(kind, 2, 48000, **options), encoded(kind, 3, 48000, **options))
              for kind, options in (("WAV", {}), ("AIFF", {}), ("FLAC", {}), ("OGG", {}),
                                    ("OGG", {"subtype": "OPUS"}))]
    piped = bytearray(others[0][0])
    struct.pack_into("<I", piped, piped.index(b"data") + 4, 0xFFFFFFFF)
    wav, flac, ogg = (others[n][0] for n in (0, 2, 3))
    others += [(wav + b"LIST\4\0\0\0abcd", wav), (wav, wav[36:]), (bytes(piped), wav),
               (PICTURE + flac + ID3V1, PICTURE + flac), (ogg + JUNK, ogg), (ogg, ogg[:5000])]
    for data in mp3s:
        assert re.match(r"several recordings in one file, [345]\.. s in all, of which the first "
                        r"has 2\..: split it, or convert it to", refused(data))
    for first, second in others:
        line = refused(first + second)
        assert re.match(r"several recordings in one file, \d+ bytes in all, of which the first has "
                        r"\d+: split it, or convert it to", line)
    compared(len(mp3s + others), "files")


def test_cut_and_damaged_files_are_named(refused, compared):
    """By what their headers or their frames say; with the seconds that are there."""
    whole, bare, ogg, flac = mp3(4), headerless(mp3(4)), encoded("OGG", 4), encoded("FLAC", 4)
    third, wrong = len(bare) // 3, bytearray(ogg)
    wrong[-100] ^= 1
    cases = [(whole[:len(whole) // 2], "truncated: its header says 4."),
             (claiming(whole, 400), "truncated: its header says 10.4 s, and 4.0 s are there"),
             (bare[:third] + bytes(third) + bare[2 * third:], "damaged: 2."),
             (bare + bytes(len(bare)), "damaged: 4.0 s of it are readable"),
             (ogg[:ogg.rindex(b"OggS")], "damaged or truncated"), (wrong, "damaged or truncated"),
             (ogg[:len(ogg) // 2] + ogg, "damaged or truncated"),
             (flac[:len(flac) // 2], "truncated: its header says 4.0 s, and 2.0 s are there"),
             (flac[:-3000] + bytes(3000), "damaged after 3.9 s")]
    for data, says in cases:
        assert refused(data).startswith(says)
    compared(len(cases), "files")


SIZES = (0, 0x7FFFEFFC, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0x80000024, 0xFFFFF000, 0xFFFFFFDB,
         0xFFFFFFFF)


@pytest.mark.parametrize("kind, chunk, order", [
    ("WAV", b"data", "<"), ("AIFF", b"SSND", ">")])
def test_sizes_from_pipes_mean_until_the_end(length, refused, compared, kind, chunk, order):
    """And one that is smaller than the sound was cut to 32 bits, unless chunks follow; a larger one
    is that of a file that was cut."""
    data = bytearray(encoded(kind))
    place = data.index(chunk) + 4
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


def test_chunks_of_odd_sizes_are_followed(length, compared):
    """Before the sound, and behind sound of an odd size: with the zero that the format asks for, or
    without it, for some programs leave it out."""
    data = encoded("WAV", channels=1, subtype="PCM_U8")
    place, odd = data.index(b"data"), b"LIST\3\0\0\0abc"
    sound = b"data" + struct.pack("<I", 2 * RATE - 1) + data[place + 8:-1]
    note = b"LIST" + struct.pack("<I", 4000) + bytes(4000)
    cases = [data[:place] + odd + b"\0" + data[place:]]
    cases += [data[:place] + sound + zero + note for zero in (b"", b"\0")]
    for each in cases:
        assert length(each) == 2
    compared(len(cases), "files")


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
    cases = [flac + back for back in (ID3V1, APE, APE + ID3V1, JUNK, bytes(5000))]
    cases += [bytes(few), bytes(few) + APE, PICTURE + flac]
    for data in cases:
        assert length(data) == 2
    compared(len(cases), "files")


def test_what_is_no_audio_is_named(refused, compared):
    box = b"\0\0\0\x20ftypM4A \0\0\0\0"
    box, wav = b"\0\0\0\x20ftypM4A \0\0\0\0", bytearray(encoded("WAV"))
    wav[wav.index(b"fmt ") + 8] = 0x55
    named = {"AU": "Sun audio", "CAF": "Core Audio", "W64": "Wave64", "RF64": "a WAV of more than",
             "VOC": "not readable as audio"}
    cases = [(b"\n<!DOCTYPE html><html>", "an HTML page"), (b"<HTML>", "an HTML page"),
             (box + JUNK, "MPEG-4 audio"), (id3v2(b"title") + b"\xff\xf1" + JUNK, "AAC audio"),
             (b"\x1a\x45\xdf\xa3" + JUNK, "Matroska"), (b"PK\3\4" + JUNK, "a zip archive"),
             (b'{"error": "quota"}', "JSON"), (PICTURE, "holds tags"), (b"", "empty file"),
             (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
             *((encoded(kind, 1), says) for kind, says in named.items()), (wav, "MP3 inside a WAV"),
             (encoded("WAV", endian="BIG"), "a big-endian WAV"),
             (b"\xff\xfb\x00" + JUNK, "MP3 of free format"),
             (b"not audio " * 100, "not readable as audio"), (JUNK, "not readable as audio"),
             (b"\xff" * 100_000, "not readable as audio"),
             (b"\xff\xfb\x90\x00" * 9000, "not readable as audio (none of WAV")]
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


@pytest.mark.skipif(not no_stderr.null, reason="C's stderr can be replaced with glibc alone")
def test_the_decoder_is_silent_in_every_thread(tmp_path, compared, capfd):
    """libmpg123's own lines do not appear, other lines written meanwhile do, and C's stderr is
    itself again."""
    damaged = bytearray(mp3(4))
    for place in np.random.default_rng(3).integers(2000, len(damaged), 60):
        damaged[place] ^= 0xFF
    (tmp_path / "song.mp3").write_bytes(damaged)

    def decode(_):
        try:
            read_waveform(tmp_path / "song.mp3", 16000)
        except BadClip:
            pass
        os.write(2, b"python\n")

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(decode, range(15)))
    libc = ctypes.CDLL(None)
    libc.fputs(b"C\n", ctypes.c_void_p.in_dll(libc, "stderr"))
    assert capfd.readouterr().err == "python\n" * 15 + "C\n" and no_stderr.depth == 0
    soundfile.read(tmp_path / "song.mp3")
    assert "libmpg123" in capfd.readouterr().err
    compared(15, "readings")


def test_long_mp3s_are_streamed(tmp_path, compared):
    """Four minutes without a header, 42 MB of PCM, take the memory of some windows of 1.8 MB."""
    (tmp_path / "long.mp3").write_bytes(headerless(mp3(4, mode="CONSTANT")) * 60)
    tracemalloc.start()
    starts = [start for start, *_ in read_windows(tmp_path / "long.mp3", 16000, 10, 10)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 230 < starts[-1] < 235 and len(starts) == 25 and peak < 30e6
    compared(len(starts), "windows")
