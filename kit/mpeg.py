"""MPEG audio (MP3) frames, counted. libsndfile estimates the length of an MP3 from its first frame
where no header tells, stops there, and believes a header that tells less than there is."""

import functools
import re
import struct
from typing import NamedTuple

from kit.streams import BLOCK, BadClip, Stream, add_part, find_all, read_at, tag_size, truncated

CHAIN = 6  # frames in a row that random bytes do not make
# sync, a version, a layer; a bitrate, a sample rate: an MPEG audio frame that is not free-format
HEADER = re.compile(rb"(?s)\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff]["
                    + b"".join(b"\\x%x0-\\x%xb" % (rate, rate) for rate in range(1, 15)) + b"].")
HEADER_OR_TAG = re.compile(HEADER.pattern + rb"|ID3[\x02-\x04]\x00|APETAGEX")
BITRATES = {  # kbit/s by (MPEG-1, layer): ISO 11172-3, 2.4.2.3; ISO 13818-3, 2.4.2.3
    (True, 1): range(0, 480, 32),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)}


class Frame(NamedTuple):
    kind: tuple  # (version, layer, sample rate, mono): what does not change within a stream
    size: int  # bytes
    samples: int
    tag: int  # where Xing or Info stands in a frame that has one


@functools.lru_cache(4096)
def parse_header(header):
    """The Frame of 4 bytes; None where they are no header."""
    if not HEADER.fullmatch(header):
        return None
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
    rate = (44100, 48000, 32000)[header[2] >> 2 & 3] >> {3: 0, 2: 1, 0: 2}[version]
    column = version == 3, layer if version == 3 else min(layer, 2)
    bitrate = 1000 * BITRATES[column][header[2] >> 4]
    samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
    slot, padding = 4 if layer == 1 else 1, header[2] >> 1 & 1
    size = (samples // 8 * bitrate // (rate * slot) + padding) * slot
    mono = header[3] >> 6 == 3
    tag = 4 + (17, 9, 32, 17)[2 * (version == 3) + mono]
    return Frame((version, layer, rate, mono), size, samples, tag)


def starts_frames(file, position, end):
    """The Frame at a position, where a chain of its kind follows or the end does; else None."""
    first = None
    for _ in range(CHAIN):
        frame = parse_header(read_at(file, position, 4))
        first = first or frame
        if not frame or frame.kind != first.kind:
            return None
        position += frame.size
        if position == end:
            break
    return first


def length_header(data, frame):
    """(where its count of frames lies, the count) of a frame that describes those behind it, as
    Xing, Info or VBRI; (0, 0) of one that does not count; None of any other."""
    if frame.kind[1] == 3 and data[frame.tag:frame.tag + 4] in (b"Xing", b"Info"):
        place = frame.tag + 8 if data[frame.tag + 7] & 1 else 0
    elif frame.kind[1] == 3 and data[36:40] == b"VBRI":
        place = 50
    else:
        return None
    return place, int.from_bytes(data[place:place + 4], "big") if place else 0


def mpeg_streams(file, begin, end):
    """One Stream for each run of frames of one kind, a new one at each Xing, Info or VBRI header.
    Whatever lies between frames is left out. Empty where there are no frames. Raises BadClip where
    a header says more than follows, or where a second of the file or more is no frames."""
    runs, position = [], begin
    while position < end:
        if runs:
            position = runs[-1].extend(file, position, end)
        frame = starts_frames(file, position, end)
        if frame and position + frame.size > end:
            break  # the last frame is cut: at most 0.1 s
        if frame:
            runs.append(Run(file, position, frame))
            position += frame.size
        elif position < end:
            tag = tag_size(read_at(file, position, 16))
            tag = tag if position + tag <= end else 0
            found = position + tag if tag else next(
                (each for each in find_all(file, HEADER_OR_TAG, position + 1, end, 8)
                 if tag_size(read_at(file, each, 16)) or starts_frames(file, each, end)), end)
            if runs and not tag:
                runs[-1].gaps.append(found - position)
            position = found
    return [run.stream(file) for run in runs if run.count or run.length[1]]


class Run:
    """Frames of one kind, counted; the first may be a header that counts them too."""

    def __init__(self, file, position, frame):
        self.length = length_header(read_at(file, position, 64), frame)
        self.kind, self.samples = frame.kind, frame.samples
        self.seconds = frame.samples / frame.kind[2]  # a frame's
        self.count, self.gaps = 0 if self.length else 1, [0]
        self.parts = [(position, position + frame.size)]

    def extend(self, file, position, end):
        """Add the frames of this kind that follow from a position on; where they end."""
        start, kind, data, base = position, self.kind, b"", position
        while position + 4 <= end:
            offset = position - base
            if offset + 64 > len(data):
                data, base, offset = read_at(file, position, BLOCK), position, 0
            frame = parse_header(data[offset:offset + 4])
            if (not frame or frame.kind != kind or position + frame.size > end
                    or length_header(data[offset:offset + 64], frame)):
                break
            position += frame.size
            self.count += 1
        add_part(self.parts, start, position)
        return position

    def stream(self, file):
        place, said = self.length or (0, 0)
        if (said - self.count) * self.seconds > 0.1:
            raise truncated(said * self.seconds, self.count * self.seconds)
        size = sum(stop - start for start, stop in self.parts)
        lost, largest = (gap / size * self.count * self.seconds
                         for gap in (sum(self.gaps), max(self.gaps)))
        if said != self.count and (largest > 1 or lost > 1 and sum(self.gaps) > size / 20):
            raise BadClip(f"damaged: {self.count * self.seconds:.1f} s of it are readable, and "
                          f"{sum(self.gaps)} bytes among them are no MP3 frames")
        parts = self.parts
        if place and said < self.count:
            start, stop = parts[0]
            parts = [corrected(read_at(file, start, 200), place, self.count),
                         (min(start + 200, stop), stop), *parts[1:]]
        return Stream(file, parts, self.count * self.samples, endless=True)


def corrected(header, place, count):
    """The beginning of a stream with another count of frames, and no padding to cut off its end."""
    header = bytearray(header)
    struct.pack_into(">I", header, place, count)
    flags = header[place - 1] if header[36:40] != b"VBRI" else 0
    lame = place + 4 + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
    if flags and len(header) >= lame + 24:
        header[lame + 22] &= 0xF0
        header[lame + 23] = 0
    return bytes(header)
