"""Audio files: decoding, averaging of channels, resampling."""

import contextlib
import ctypes
import functools
import math
import os
import platform
import threading

import numpy as np
import soundfile
import torch

from kit.containers import BadClip, stream_of, truncated
from kit.files import tensor_digest
from kit.mpeg import BLOCK

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
    unusual sample rate, or shorter than one frame of the encoder."""
    name = os.fsencode(path)  # it need not be valid text
    try:
        with open(name, "rb", BLOCK) as file, contextlib.closing(Decoder(file)) as decoder:
            rate = decoder.rate
            for first, pcm in windows_of(decoder, window, hop):
                if len(pcm) * sample_rate < SHORTEST * rate:
                    raise BadClip(f"too short: {len(pcm)} samples at {rate} Hz, one frame needs "
                                  f"{math.ceil(SHORTEST * rate / sample_rate)}")
                if not np.isfinite(pcm).all():
                    raise BadClip("holds NaN or infinity")
                yield first / rate, to_waveform(pcm, rate, sample_rate), pcm
    except soundfile.LibsndfileError as error:
        raise BadClip(f"not readable as audio ({error.error_string})") from None
    except (OSError, ValueError) as error:
        raise BadClip(f"not readable as audio ({error})") from None


def windows_of(decoder, window, hop):
    """(first sample, PCM) of each window that read_windows describes."""
    longest = int(1.5 * window * decoder.rate) if window else math.inf
    pcm = decoder.read(longest + 1)
    if len(pcm) <= longest:
        yield 0, pcm
        return
    first, size, hop = 0, round(window * decoder.rate), max(1, round(hop * decoder.rate))
    while True:
        yield first, pcm[:size]
        pcm = np.concatenate([pcm, decoder.read(hop + size - len(pcm))])
        if len(pcm) == size:
            return
        step = min(hop, len(pcm) - size)
        first, pcm = first + step, pcm[step:]


class Decoder:
    """An open file's PCM, of one `rate` in Hz and one number of `channels`. Raises BadClip where
    there is less of it than there should be."""

    def __init__(self, file):
        self.stream, self.count = stream_of(file), 0
        # libsndfile reads an MP3 frame by frame: if it called Python for each, threads that decode
        # would wait for one another
        self.copy = self.stream.copy() if self.stream.mpeg else None
        self.open(self.copy.fileno() if self.copy else self.stream)
        self.rate, self.channels = self.sound.samplerate, self.sound.channels
        frames, samples = self.sound.frames, self.stream.samples or self.sound.frames
        self.expected = samples if self.stream.estimated else min(frames, samples)
        if not RATES[0] <= self.rate <= RATES[1]:
            raise BadClip(f"its sample rate is {self.rate} Hz: convert it to 44100 Hz")

    def open(self, source):
        with no_stderr():
            self.sound = soundfile.SoundFile(source, closefd=False)
        self.sound.seekable = lambda: False  # else soundfile seeks after each read, fails at ends

    def close(self):
        self.sound.close()
        if self.copy:
            self.copy.close()

    def read(self, count):
        """Up to `count` samples, fewer at the end: float32[samples, channels]. Block by block, for
        a header may claim any length; in short ones, for what precedes damage in one is lost."""
        blocks, longest = [np.zeros((0, self.channels), np.float32)], BLOCK if self.copy else 4096
        while count > 0 and len(block := self.read_block(min(count, longest))):
            blocks.append(block)
            count -= len(block)
            self.count += len(block)
            if self.stream.estimated and self.count == self.sound.frames:
                self.read_on()
        if count > 0:
            self.check_length()
        return np.concatenate(blocks)

    def read_block(self, count):
        left = (self.stream.samples or 0) - self.count
        if left > 0:  # what is behind the end of a FLAC file, a tag perhaps, is read last
            count = min(count, left)
        try:
            with no_stderr():
                return self.sound.read(count, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError:
            if self.count == self.stream.samples:
                return np.zeros((0, self.channels), np.float32)
            self.check_length()
            raise BadClip(f"damaged after {self.count / self.rate:.1f} s") from None

    def read_on(self):
        """Go on where libsndfile stops at the end of an MP3 that it estimated."""
        self.close()
        self.stream.lengthen()
        self.open(self.stream)
        for start in range(0, self.count, BLOCK):
            with no_stderr():
                self.sound.read(min(BLOCK, self.count - start), dtype="float32")

    def check_length(self):
        """Raise BadClip where the end has come too early; the error that hindered a reading."""
        if self.stream.error:
            raise self.stream.error
        unknown = self.expected >= 2**62
        if not unknown and self.count < self.expected - self.rate // 10:
            raise truncated(self.expected / self.rate, self.count / self.rate)


class NoStderr:
    """Keeps C libraries' own lines off the terminal while any thread decodes: libmpg123's cannot be
    turned off through libsndfile. Only C's `stderr` is replaced; Python's and file descriptor 2
    work as ever. Does nothing but with glibc."""

    def __init__(self):
        self.lock, self.depth = threading.Lock(), 0
        self.pointer = self.null = None
        if platform.libc_ver()[0] == "glibc":
            libc = ctypes.CDLL(None)
            libc.fopen.restype = ctypes.c_void_p
            self.pointer = ctypes.c_void_p.in_dll(libc, "stderr")
            self.null = libc.fopen(os.devnull.encode(), b"w")
            self.own = self.pointer.value

    @contextlib.contextmanager
    def __call__(self):
        with self.lock:
            self.depth += 1
            if self.null:
                self.pointer.value = self.null
        try:
            yield
        finally:
            with self.lock:
                self.depth -= 1
                if self.null and not self.depth:
                    self.pointer.value = self.own


no_stderr = NoStderr()


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
    any machine."""
    divisor = math.gcd(rate, new_rate)
    step, phases = rate // divisor, new_rate // divisor
    if step == phases:
        return waveform
    kernel, start, width = resampling_kernel(step, phases)
    length = -(-len(waveform) * phases // step)
    periods = -(-length // phases)
    padded = np.pad(waveform, (width, max(0, (periods + 1) * step + width - len(waveform))))
    places = np.arange(periods)[:, None] * step + start
    # a quarter of a minute at a time: between shorter parts threads wait for each other
    resampled, rows = np.zeros((periods, phases)), max(1, (1 << 18) // phases)
    for first in range(0, periods, rows):
        part, place = resampled[first:first + rows], places[first:first + rows]
        seen = np.empty(part.shape)
        for tap, weights in enumerate(kernel):
            # unlike indexing, lets other threads run meanwhile
            padded[tap:].take(place, out=seen, mode="clip")
            seen *= weights
            part += seen
    return resampled.reshape(-1)[:length]


@functools.lru_cache(2)
def resampling_kernel(step, phases):
    """(kernel float64[taps, phases], each phase's own sample, how many before and behind it the
    kernel sees) to resample `step` samples to `phases`. Only phases that occur, without the zeros
    around them: rates without a common factor take no more memory than others."""
    cutoff, crossings = 0.99 * min(step, phases), 6
    width = math.ceil(crossings * step / cutoff)
    phase, offset = np.arange(phases), np.arange(-width, width + 1)
    start = phase * step // phases  # the input sample at or before each phase
    ticks = (start[:, None] + offset) * phases - (phase * step)[:, None]
    t = np.clip(ticks / (step * phases) * cutoff, -crossings, crossings)
    hann = sin_pi(0.5 - np.abs(t) / (2 * crossings)) ** 2
    sinc = np.where(t == 0, 1.0, sin_pi(t) / np.where(t == 0, 1.0, t * math.pi))
    return (sinc * hann * (cutoff / step)).T.copy(), start, width


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
