"""Frames of MPEG audio (MP3), counted, and the tags around them. libsndfile estimates an MP3's
length from its first frame where no header tells, stops there, and believes a header that tells
less than there is."""

import functools
import os
import re
import struct
from typing import NamedTuple

BLOCK = 1 << 16
CHAIN = 6  # frames in a row that random bytes do not make
# sync, MPEG version and layer II or III; bitrate and sample rate: a frame that is not free-format
HEADER = re.compile(rb"(?s)\xff[\xe2-\xe5\xf2-\xf5\xfa-\xfd]["
                    + b"".join(b"\\x%x0-\\x%xb" % (rate, rate) for rate in range(1, 15)) + b"].")
HEADER_OR_TAG = re.compile(HEADER.pattern + rb"|ID3[\x02-\x04]\x00|APETAGEX")
BITRATES = {  # kbit/s by (MPEG-1, layer): ISO 11172-3, 2.4.2.3; ISO 13818-3, 2.4.2.3
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)}


class Frame(NamedTuple):
    kind: tuple  # (version, layer, sample rate, mono): what does not change within a recording
    size: int  # bytes
    samples: int
    xing: int  # where Xing or Info stands in a frame that has one


@functools.lru_cache(4096)
def parse_header(header):
    """The Frame of 4 bytes; None where they are no header."""
    if not HEADER.fullmatch(header):
        return None
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
    rate = (44100, 48000, 32000)[header[2] >> 2 & 3] >> {3: 0, 2: 1, 0: 2}[version]
    mpeg_1, mono = version == 3, header[3] >> 6 == 3
    samples = 576 if layer == 3 and not mpeg_1 else 1152
    bitrate = 1000 * BITRATES[mpeg_1, layer][header[2] >> 4]
    size = samples // 8 * bitrate // rate + (header[2] >> 1 & 1)
    xing = 4 + (17, 9, 32, 17)[2 * mpeg_1 + mono]
    return Frame((version, layer, rate, mono), size, samples, xing)


def length_header(data, frame):
    """(where its count of frames lies, the count) of a frame that describes those behind it, as
    Xing, Info or VBRI; (0, 0) of one that does not count; None of any other."""
    if frame.kind[1] == 3 and data[frame.xing:frame.xing + 4] in (b"Xing", b"Info"):
        place = frame.xing + 8 if data[frame.xing + 7] & 1 else 0
    elif frame.kind[1] == 3 and data[36:40] == b"VBRI":
        place = 50
    else:
        return None
    return place, int.from_bytes(data[place:place + 4], "big") if place else 0


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


class Recording:
    """Frames of one kind, counted; the first may be a header that counts them too."""

    def __init__(self, frame, header):
        self.kind, self.frame_samples = frame.kind, frame.samples
        self.place, self.expected = header or (0, 0)  # where the header's count lies; the count
        self.count = -1 if header else 0
        self.parts, self.junk = [], 0  # (begin, end) in the file; bytes that are no frames

    def add(self, position, size):
        self.count += 1
        begin = self.parts.pop()[0] if self.parts and self.parts[-1][1] == position else position
        self.parts.append((begin, position + size))

    def seconds(self, count):
        """How long so many of its frames are."""
        return count * self.frame_samples / self.kind[2]


def recordings_in(file, begin, end):
    """The Recordings in a file, one after another: a new one begins at each frame of another kind
    and at each Xing, Info or VBRI header. Whatever lies between frames is left out."""
    recordings, position = [], begin
    while position < end:
        data = read_at(file, position, 64)
        frame = parse_header(data[:4])
        header = frame and length_header(data, frame)
        known = frame and recordings and frame.kind == recordings[-1].kind and not header
        if known and position + frame.size > end:
            break  # the last frame is cut: at most 0.1 s
        if known or starts_frames(file, position, end):
            if not known:
                recordings.append(Recording(frame, header))
            recordings[-1].add(position, frame.size)
            position += frame.size
        elif (following := skip_tags(file, position, end)) > position:
            position = following
        else:
            following = next_frames(file, position, end)
            if recordings:
                recordings[-1].junk += following - position
            position = following
    return [each for each in recordings if each.count or each.expected]


def next_frames(file, position, end):
    """Where the next frames or the next tag behind a position begin; the end where none do."""
    for found in find_all(file, HEADER_OR_TAG, position + 1, end, 8):
        if tag_size(read_at(file, found, 16)) or starts_frames(file, found, end):
            return found
    return end


def untagged(file):
    """(begin, end) of a file without ID3v2 tags in front and ID3v1 and APE tags behind."""
    end = file.seek(0, os.SEEK_END)
    begin = skip_tags(file, 0, end)
    while end > begin:
        tail, size = read_at(file, max(begin, end - 128), min(128, end - begin)), 0
        if len(tail) == 128 and tail.startswith(b"TAG"):
            size = 128
        elif tail[-32:-24] == b"APETAGEX":
            size, _, flags = struct.unpack("<3I", tail[-20:-8])
            size += 32 * (flags >> 31)
        if not 0 < size <= end - begin:
            break
        end -= size
    return begin, end


def skip_tags(file, position, end):
    """Where something else than a tag begins, from a position on."""
    while 0 < (size := tag_size(read_at(file, position, 16))) <= end - position:
        position += size
    return position


def tag_size(head):
    """Bytes of the ID3v2, ID3v1 or APE tag that begins like this; 0 where none does."""
    if head.startswith(b"ID3") and len(head) >= 10 and max(head[6:10]) < 128:
        size = functools.reduce(lambda total, byte: total << 7 | byte, head[6:10])
        return size + (20 if head[5] & 16 else 10)
    if head.startswith(b"APETAGEX") and len(head) >= 16:
        return 32 + struct.unpack("<I", head[12:16])[0]
    return 128 if head.startswith(b"TAG") else 0


def read_at(file, position, count):
    file.seek(position)
    return file.read(count)


def find_all(file, pattern, begin, end, longest):
    """Positions at which a pattern of at most `longest` bytes matches, block by block."""
    for start in range(begin, end, BLOCK):
        data = read_at(file, start, min(BLOCK + longest - 1, end - start))
        for match in pattern.finditer(data):
            if match.start() < BLOCK:
                yield start + match.start()
