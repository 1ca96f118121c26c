"""Audio files: decoding, averaging of channels, resampling."""

import contextlib
import functools
import io
import math
import os
import re

import numpy as np
import soundfile
import torch

from kit.containers import streams_of
from kit.files import tensor_digest
from kit.streams import BLOCK, BadClip, no_stderr, truncated

SHORTEST = 400  # samples at the backbone's rate: what one frame of the base architecture sees
RATES = 4000, 384_000  # Hz: the lowest and highest sample rate accepted
QUIET = -20  # dB: a mix that much quieter than its channels is remarked on


def read_waveform(path, sample_rate):
    """A whole file as (float64 waveform[samples], digest of its decoded PCM). Raises BadClip."""
    return read_clip(path, sample_rate)[:2]


def read_clip(path, sample_rate):
    """read_waveform's, and a remark on the song: None or one line."""
    [(_, waveform, pcm)] = read_windows(path, sample_rate)
    return waveform, tensor_digest(pcm), remark_on([mix_level(pcm)])


def read_windows(path, sample_rate, window=None, hop=None):
    """Decode a file, average its channels, resample. Yields (start in seconds, float64
    waveform[samples], float32 PCM [samples, channels]): the whole file; or, where it is longer than
    one and a half `window` seconds, windows of that length every `hop` seconds, the last one
    aligned with the end. Holds no more than the window at hand.
    Raises BadClip for a file that is empty, truncated, damaged, not audio, not finite, of an
    unusual or a changing sample rate, or shorter than one frame of the encoder."""
    try:
        with contextlib.closing(Decoder(path)) as decoder:
            rate, first = decoder.rate, 0
            longest = int(1.5 * window * rate) if window else math.inf
            # held: decoded frames from frame `first` on; held[:size] is the window to yield
            held = decoder.read(longest + 1)
            size = len(held) if len(held) <= longest else round(window * rate)
            while size * sample_rate >= SHORTEST * rate:
                if not np.isfinite(held[:size]).all():
                    raise BadClip("holds NaN or infinity")
                yield first / rate, to_waveform(held[:size], rate, sample_rate), held[:size]
                if not window:
                    break  # that was the whole file
                step = max(1, round(hop * rate))
                held = np.concatenate([held, decoder.read(step + size - len(held))])
                if len(held) == size:
                    break
                step = min(step, len(held) - size)
                held, first = held[step:], first + step
            length = first + len(held)
            if length * sample_rate < SHORTEST * rate:
                raise BadClip(f"too short: {length} samples at {rate} Hz, one frame needs "
                              f"{math.ceil(SHORTEST * rate / sample_rate)}")
    except soundfile.LibsndfileError as error:
        problem = error.error_string if error.code != 7 else "Format not recognised."  # "a pipe?"
        raise BadClip(f"not readable as audio ({problem})") from None
    except (OSError, TypeError, ValueError, UnicodeError) as error:
        raise BadClip(f"not readable as audio ({error})") from None


class Decoder:
    """A file's frames: those of its Streams, one after another, which have one `rate` and one
    number of channels. Raises BadClip where a stream has fewer than it should."""

    def __init__(self, path):
        self.file = open(os.fsencode(path), "rb", BLOCK)  # its name need not be valid text
        self.length, self.sound, self.streams = 0, None, iter(())
        try:
            self.streams = iter(streams_of(self.file))
            self.open_next()
        except BaseException:
            self.close()
            raise
        self.rate, self.channels = self.sound.samplerate, self.sound.channels

    def close(self):
        if self.sound:
            self.sound.close()
        self.file.close()

    def open_next(self):
        """Open the next stream; after the last one, none is open."""
        previous, self.sound = self.sound, None
        if previous:
            previous.close()
        self.stream, self.count = next(self.streams, None), 0
        if not self.stream:
            return
        with no_stderr():
            self.sound = sound = soundfile.SoundFile(io.BufferedReader(self.stream, BLOCK))
        sound.seekable = lambda: False  # else soundfile seeks after each read, and fails at ends
        self.expected = min(sound.frames, self.stream.samples or sound.frames)
        if not RATES[0] <= sound.samplerate <= RATES[1]:
            raise BadClip(f"its sample rate is {sound.samplerate} Hz: convert it to 44100 Hz")
        if sound.format == "MP3" and not self.stream.samples:
            raise BadClip("its MPEG frames cannot be counted (free format?): convert it to WAV")
        if previous and (self.rate, self.channels) != (sound.samplerate, sound.channels):
            raise BadClip(f"changes from {self.rate} Hz and {self.channels} channels to "
                          f"{sound.samplerate} Hz and {sound.channels} after "
                          f"{self.length / self.rate:.1f} s: convert each part to WAV")

    def read(self, count):
        """Up to `count` frames, fewer at the end: float32[frames, channels]. Block by block, for a
        header may claim any length."""
        blocks = [np.zeros((0, self.channels), np.float32)]
        while count > 0 and self.sound:
            blocks.append(self.read_block(min(count, 1 << 20)))
            count -= len(blocks[-1])
            self.count += len(blocks[-1])
            self.length += len(blocks[-1])
            if not len(blocks[-1]):
                self.check_length()
                self.open_next()
        return np.concatenate(blocks)

    def read_block(self, count):
        # FLAC fails at what is behind its end, a tag perhaps: all before that is read first
        known = self.stream.samples if self.sound.format == "FLAC" else None
        if known and self.count <= known:
            count = min(count, max(known - self.count, 1), 4096)
        try:
            with no_stderr():
                return self.sound.read(count, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError:
            if known and self.count == known:
                return np.zeros((0, self.channels), np.float32)
            if known and self.count < known:
                raise truncated(known / self.rate, self.count / self.rate) from None
            raise BadClip(f"damaged after {self.length / self.rate:.1f} s") from None

    def check_length(self):
        """Raise BadClip where the stream that ended was shorter than expected."""
        notes, rate = self.sound.extra_info, self.rate
        if self.stream.error:
            raise self.stream.error
        if self.count < self.expected - rate // 10 and self.expected < 2**62:
            raise truncated(self.expected / rate, self.count / rate)
        riff = re.search(r"riff *: (\d+) \(should be (\d+)", notes)  # W64
        if riff and int(riff[2]) < int(riff[1]):
            raise BadClip(f"truncated: its header says {riff[1]} bytes, and {riff[2]} are there")


def mix_level(pcm):
    """How loud the mean of PCM's channels is beside the channels themselves, in dB: 0 where they
    are equal, −3 where they are unrelated, −inf where they cancel."""
    if pcm.shape[1] == 1:
        return 0.0
    each = np.mean([np.square(channel, dtype=np.float64).mean() for channel in pcm.T])
    mix = np.square(mono(pcm)).mean()
    return 10 * math.log10(mix / each) if mix else -math.inf if each else 0.0


def remark_on(levels):
    """One line on a song's windows of these mix_levels; None where there is nothing to say."""
    quiet = [level for level in levels if level < QUIET]
    where = f" in {len(quiet)} of {len(levels)} windows" if len(levels) > 1 else ""
    return (f"its channels cancel in the mix{where}, which is {-min(quiet):.0f} dB quieter than "
            "they are") if quiet else None


def to_waveform(pcm, rate, sample_rate):
    """PCM float32[samples, channels] → float64 waveform[samples] at sample_rate, mono."""
    return torch.from_numpy(resample(mono(pcm), rate, sample_rate))


def mono(pcm):
    """The mean of PCM's channels: float64[samples]."""
    return functools.reduce(np.add, pcm.astype(np.float64).T) / pcm.shape[1]


def resample(waveform, rate, new_rate):
    """Band-limited resampling of float64[samples], both rates in Hz: a sinc in a Hann window over 6
    zero crossings, cut off at 0.99 of the lower Nyquist frequency (torchaudio's defaults; after
    J. O. Smith, Digital Audio Resampling). Element by element in a fixed order: the same bits on
    any machine. The kernel has one row for each phase that occurs, without the zeros around it, so
    that rates without a common factor take no more memory than others."""
    divisor = math.gcd(rate, new_rate)
    step, phases = rate // divisor, new_rate // divisor
    if step == phases:
        return waveform
    cutoff, crossings = 0.99 * min(step, phases), 6
    width = math.ceil(crossings * step / cutoff)
    phase, offset = np.arange(phases), np.arange(-width, width + 1)
    start = phase * step // phases  # the input sample at or before each phase
    ticks = (start[:, None] + offset) * phases - (phase * step)[:, None]
    t = np.clip(ticks / (step * phases) * cutoff, -crossings, crossings)
    hann = sin_pi(0.5 - np.abs(t) / (2 * crossings)) ** 2
    sinc = np.where(t == 0, 1.0, sin_pi(t) / np.where(t == 0, 1.0, t * math.pi))
    kernel = (sinc * hann * (cutoff / step)).T.copy()
    length = -(-len(waveform) * phases // step)
    periods = -(-length // phases)
    padded = np.pad(waveform, (width, max(0, (periods + 1) * step + width - len(waveform))))
    places = np.arange(periods)[:, None] * step + start
    resampled = np.zeros((periods, phases))
    for tap, weights in enumerate(kernel):
        resampled += padded[places + tap] * weights
    return resampled.reshape(-1)[:length]


def sin_pi(x):
    """sin(πx) from + − × ÷ alone: a library's own sine differs between machines in its last bit.
    Taylor's series within half a period, to 1e-15."""
    whole = np.rint(x)
    r = (x - whole) * math.pi
    term = total = r
    for n in range(1, 12):
        term = term * (r * r) / (-2 * n * (2 * n + 1))
        total = total + term
    return total * (1 - 2 * (np.abs(whole) % 2))
