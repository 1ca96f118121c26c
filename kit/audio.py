"""Audio files: decoding, averaging of channels, resampling."""

import functools
import math
import os
import re
from pathlib import Path

import numpy as np
import soundfile
import torch

from kit.files import tensor_digest

SHORTEST = 400  # samples at the backbone's rate: what one frame of the base architecture sees
RATES = 4000, 384_000  # Hz: the lowest and highest sample rate accepted


class BadClip(Exception):
    """One audio file that cannot be used; the others can."""


def read_waveform(path, sample_rate):
    """A whole file as (float64 waveform[samples], digest of its decoded PCM). Raises BadClip."""
    [(_, waveform, pcm)] = read_windows(path, sample_rate)
    return waveform, tensor_digest(pcm)


def read_windows(path, sample_rate, window=None, hop=None):
    """Decode a file, average its channels, resample. Yields (start in seconds, float64
    waveform[samples], float32 PCM [samples, channels]): the whole file; or, where it is longer than
    one and a half `window` seconds, windows of that length every `hop` seconds, the last one
    aligned with the end. Reads no further than the window at hand, and what is there, whatever
    length the header claims.
    Raises BadClip for a file that is empty, truncated (as far as its header tells), not audio, not
    finite, of an unusual sample rate, or shorter than one frame of the encoder."""
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:  # its name need not be valid text
            rate, announced, notes, first = file.samplerate, file.frames, file.extra_info, 0
            file.seekable = lambda: False  # else soundfile seeks after each read, and fails at ends
            if not RATES[0] <= rate <= RATES[1]:
                raise BadClip(f"its sample rate is {rate} Hz: convert it to 44100 Hz")
            longest = int(1.5 * window * rate) if window else math.inf
            # held: decoded frames from frame `first` on; held[:size] is the window to yield
            held = read_frames(file, longest + 1)
            size = len(held) if len(held) <= longest else round(window * rate)
            while size * sample_rate >= SHORTEST * rate:
                if not np.isfinite(held[:size]).all():
                    raise BadClip("holds NaN or infinity")
                yield first / rate, to_waveform(held[:size], rate, sample_rate), held[:size]
                if not window:
                    break  # that was the whole file
                step = max(1, round(hop * rate))
                held = np.concatenate([held, read_frames(file, step + size - len(held))])
                if len(held) == size:
                    break
                step = min(step, len(held) - size)
                held, first = held[step:], first + step
            length = first + len(held)
            check_length(announced, notes, length, rate, sample_rate)
    except (soundfile.LibsndfileError, OSError, TypeError, ValueError, UnicodeError) as error:
        empty = Path(path).is_file() and Path(path).stat().st_size == 0
        raise BadClip("empty file" if empty else f"not readable as audio ({error})") from None


def read_frames(file, count):
    """Up to `count` frames of an open file, fewer at its end: float32[frames, channels]. Block by
    block, because a header may claim any length."""
    blocks = [np.zeros((0, file.channels), np.float32)]
    while count > 0:
        blocks.append(file.read(min(count, 1 << 20), dtype="float32", always_2d=True))
        count = count - len(blocks[-1]) if len(blocks[-1]) else 0
    return np.concatenate(blocks)


def check_length(announced, notes, length, rate, sample_rate):
    """Raise BadClip where fewer frames were read than a file's header or libsndfile's notes say, or
    too few. A stream's header says none, or as many as there can be."""
    sizes = re.findall(r"(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)", notes)
    if (length < announced - rate // 10 and announced < 2**62 or "ended unexpectedly" in notes
            or any(int(there) < int(said) < 0xFFFFFF00 for said, there in sizes)):
        raise BadClip("truncated: shorter than its own header says")
    if length * sample_rate < SHORTEST * rate:
        raise BadClip(f"too short: {length} samples at {rate} Hz, one frame needs "
                      f"{math.ceil(SHORTEST * rate / sample_rate)}")


def to_waveform(pcm, rate, sample_rate):
    """PCM float32[samples, channels] → float64 waveform[samples] at sample_rate, mono."""
    mono = functools.reduce(np.add, pcm.astype(np.float64).T) / pcm.shape[1]
    return torch.from_numpy(resample(mono, rate, sample_rate))


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
