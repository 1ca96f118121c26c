"""Where the sound lies in an audio file. libsndfile stops where a header says that a file ends, and
at the end of the first of several recordings; it is given a Stream, whose end is known.

Read are WAV, AIFF, FLAC, Ogg (Vorbis or Opus) and MP3 with one recording in each file."""

import bisect
import re
import struct
import tempfile
import zlib

from kit.cli import UserError
from kit.mpeg import BLOCK, find_all, read_at, recordings_in, skip_tags, starts_frames, untagged

CONVERT = "convert it to WAV, FLAC or MP3"
# Sizes written by programs that cannot seek back: until the end of the file. Some are rounded down
# to whole frames, some leave room for a header.
ENDLESS = [range(size - 64, size + 1) for size in (
    0x7F000008, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0x80000024, 0xFFFFF000, 0xFFFFFFFF)]
ENDINGS = {*".wav .wave .bwf .aif .aiff .aifc .flac .ogg .oga .opus .mp3 .mp2 .mpa .mpga".split(),
           *(".aac .ac3 .amr .ape .au .caf .dff .dsf .dts .m4a .m4b .m4p .m4r .mka .mp1 .mp4 .mpc"
             " .ra .rf64 .shn .snd .spx .tta .voc .w64 .webm .wma .wv").split()}  # only reported
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # bits
READABLE = re.compile(rb"(?s)RIFF....WAVE|FORM....AIF[FC]|fLaC|OggS")
FOREIGN_AUDIO = {  # not readable here, by the first bytes
    b"....ftypM4": "MPEG-4 audio (m4a)", rb"\xff[\xf0\xf1\xf8\xf9]": "AAC audio",
    rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "Windows Media (wma)", b"wvpk": "WavPack audio",
    rb"MAC .[\x0c-\x10]": "Monkey's Audio (ape)", rb"DSD \x1c|FRM8": "DSD audio",
    b"caff": "Core Audio (caf)", rb"\.snd": "Sun audio (au, snd)", rb"riff\x2e\x91": "Wave64 (w64)",
    rb"\xff[\xe2-\xe5\xf2-\xf5\xfa-\xfd][\0-\x0b]": "MP3 of free format",
    b"RF64|BW64": "a WAV of more than 4 GB (RF64, BW64)", b"RIFX": "a big-endian WAV (RIFX)"}
FOREIGN = {
    **FOREIGN_AUDIO, b"....(ftyp|moov|mdat)": "MPEG-4 or QuickTime",
    rb"\x1a\x45\xdf\xa3": "Matroska or WebM", b"RIFF....AVI ": "an AVI film",
    rb"(?i:(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body))": "an HTML page",
    rb"\s*<\?xml": "XML", rb"\s*\{\s*\"": "JSON", b"MThd": "a MIDI file",
    rb"PK\x03\x04": "a zip archive", rb"\x00\x05\x16[\x00\x07]": "a companion of macOS (._)",
    b"version https://git-lfs": "a Git LFS pointer (git lfs pull fetches the file)"}


class BadClip(Exception):
    """One audio file that cannot be used; the others can."""


class Stream:
    """Parts of an open file, one after another, as a file for libsndfile: bytes, or (begin, end) in
    the file.

    samples: how many it should give; None where libsndfile knows. mpeg: whether it is an MP3;
    estimated: one whose length libsndfile estimates. `error` is the one that ended a reading: an
    exception does not pass through libsndfile."""

    def __init__(self, file, parts, samples=None, mpeg=False, estimated=False):
        self.file, self.samples, self.error = file, samples, None
        self.mpeg, self.estimated = mpeg, estimated
        self.starts, self.parts, self.position, self.size = [], [], 0, 0
        for part in parts:
            self.add(part, len(part) if isinstance(part, bytes) else part[1] - part[0])

    def add(self, part, size):
        self.starts.append(self.size)
        self.parts.append(part)
        self.size += size

    def lengthen(self):
        """Claim to be longer than any file, since libsndfile stops where it estimates an MP3's end.
        In the last bytes libmpg123 looks for a tag."""
        self.estimated, self.position, self.size = False, 0, 1 << 50
        self.add(bytes(128), 128)

    def copy(self):
        """A file of the system's with the same bytes, which libsndfile reads without Python."""
        try:
            copy = tempfile.TemporaryFile()
            while data := self.read(BLOCK):
                copy.write(data)
            copy.seek(0)
        except OSError as error:  # of the copy's own file: those of reading are kept in `error`
            raise UserError(f"cannot copy an MP3 to a temporary file ({error}): set TMPDIR to a "
                            "folder with room") from None
        return copy

    def tell(self):
        return self.position

    def seek(self, offset, whence=0):
        position = offset + (0, self.position, self.size)[whence]
        if 0 <= position < 1 << 60:  # damaged headers ask for others; no exception may be raised
            self.position = position

    def read(self, count):
        data = b""
        while len(data) < count and (piece := self.read_part(count - len(data))):
            data += piece
            self.position += len(piece)
        return data

    def read_part(self, count):
        """Up to `count` bytes at the position, of one part; none at the end."""
        index = bisect.bisect_right(self.starts, self.position) - 1
        part, offset = self.parts[index], self.position - self.starts[index]
        if isinstance(part, bytes):
            return part[offset:offset + count]
        begin, end = part
        try:
            return read_at(self.file, begin + offset, max(0, min(count, end - begin - offset)))
        except OSError as error:
            self.error = error
            return b""


def looks_like_audio(path):
    """Whether a file's name or first bytes are those of audio, readable here or not."""
    if path.suffix.lower() in ENDINGS:
        return True
    try:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            begin, end = untagged(file)
            head = read_at(file, begin, 512)
            return bool(READABLE.match(head) or named(head, FOREIGN_AUDIO)
                        or starts_frames(file, begin, end))
    except OSError:
        return False


def named(head, kinds):
    """What a file with these first bytes is, of `kinds`; None for none of these."""
    return next((name for pattern, name in kinds.items()
                 if re.match(pattern, head, re.DOTALL)), None)


def truncated(expected, seconds):
    return BadClip(f"truncated: its header says {expected:.1f} s, and {seconds:.1f} s are there")


def several(first, whole, unit):
    return BadClip(f"several recordings in one file, {whole} {unit} in all, of which the first has "
                   f"{first}: split it, or {CONVERT}")


def stream_of(file):
    """The Stream of an open binary file's one recording. Raises BadClip for a file that is empty,
    cut, holds several recordings, or is not one of the formats that are read."""
    begin, end = untagged(file)
    head = read_at(file, begin, 512)
    if not head:
        raise BadClip("holds tags and nothing else" if end else "empty file")
    if name := named(head, FOREIGN):
        raise BadClip(f"{name}, which is not readable here: find or {CONVERT}")
    if head.startswith(b"fLaC"):
        return flac_stream(file, begin, end)
    if head.startswith(b"OggS"):
        return ogg_stream(file, begin, end)
    if READABLE.match(head):
        return chunk_stream(file, head, begin, end)
    if recordings := recordings_in(file, begin, end):
        return mpeg_stream(file, recordings)
    raise BadClip(f"not readable as audio (none of WAV, AIFF, FLAC, Ogg, MP3): {CONVERT}")


def mpeg_stream(file, recordings):
    """The Stream of an MP3's frames alone. Raises BadClip where its header says more than follows,
    or where a second of the file or more is no frames."""
    song, *others = recordings
    count, seconds = song.count, song.seconds(song.count)
    if others:
        total = sum(each.seconds(each.count) for each in recordings)
        raise several(f"{seconds:.1f}", f"{total:.1f}", "s")
    if song.seconds(song.expected - count) > 0.1:
        raise truncated(song.seconds(song.expected), seconds)
    size = sum(stop - start for start, stop in song.parts)
    if song.expected != count and song.junk / size * seconds > 1:
        raise BadClip(f"damaged: {seconds:.1f} s of it are readable, and {song.junk} bytes among "
                      "them are no MP3 frames")
    parts = song.parts
    if song.place and song.expected < count:
        start, stop = parts[0]
        header = corrected(read_at(file, start, min(200, stop - start)), song.place, count)
        parts = [header, (start + len(header), stop), *parts[1:]]
    return Stream(file, parts, count * song.frame_samples, mpeg=True, estimated=not song.place)


def corrected(header, place, count):
    """The beginning of an MP3 with another count of frames, and no padding to cut off its end."""
    header = bytearray(header)
    struct.pack_into(">I", header, place, count)
    lame = place + 112  # behind the counts of frames and bytes, a table and the quality
    if header[place - 1] & 15 == 15 and len(header) >= lame + 24:
        header[lame + 22] &= 0xF0
        header[lame + 23] = 0
    return bytes(header)


def ogg_stream(file, begin, end):
    """The Stream of an Ogg file, whose pages must be intact: libsndfile skips those that are not,
    and reads the first of several recordings alone. Pages are those of RFC 3533."""
    position, last = begin, False
    while not last:
        head = read_at(file, position, 27 + 255).ljust(27, b"\0")
        page = read_at(file, position, 27 + head[26] + sum(head[27:27 + head[26]]))
        if not page.startswith(b"OggS\0") or page[22:26] != checksum(page):
            raise BadClip(f"damaged or truncated: after {position - begin} of its {end - begin} "
                          "bytes the next page is missing")
        if position == begin and not re.match(rb"\x01vorbis|OpusHead", page[27 + page[26]:]):
            raise BadClip(f"Ogg that is neither Vorbis nor Opus: {CONVERT}")
        position, last = position + len(page), page[5] & 4
    for another in find_all(file, re.compile(b"OggS\0"), position, end, 5):
        raise several(another - begin, end - begin, "bytes")
    return Stream(file, [(begin, position)])


def checksum(page):
    """That of an Ogg page: the remainder of zlib's, with the bits of each byte in reverse order."""
    zeroed = page[:22] + bytes(4) + page[26:]
    remainder = zlib.crc32(zeroed.translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return remainder.to_bytes(4, "big").translate(REVERSED)


def flac_stream(file, begin, end):
    """The Stream of a FLAC file. libsndfile, which reads no further than its header says, is told
    that the length is unknown."""
    starts = [*find_all(file, re.compile(rb"fLaC[\x00\x80]\x00\x00\x22"), begin, end, 8)]
    info = bytearray(read_at(file, begin, 26))
    if starts[:1] != [begin] or len(info) < 26:
        raise BadClip("damaged: a FLAC file without its first block")
    if len(starts) > 1:
        raise several(starts[1] - begin, end - begin, "bytes")
    samples = int.from_bytes(info[21:26], "big") & (1 << 36) - 1
    info[21:26] = info[21] & 0xF0, 0, 0, 0, 0
    return Stream(file, [bytes(info), (begin + 26, end)], samples or None)


def chunk_stream(file, head, begin, end):
    """The Stream of a WAV or AIFF file. Where the size of the sound is one of ENDLESS, or something
    else than chunks follows (a size is cut to 32 bits, a recording was interrupted), all until the
    end is sound. Raises BadClip where there is less than it says."""
    order = "<" if head.startswith(b"RIFF") else ">"
    following = chunks(file, order, begin + 12, end)
    for name, start, size in following:
        if name == b"fmt " and read_at(file, start, 2) in (b"\x50\0", b"\x55\0"):
            raise BadClip(f"MP3 inside a WAV, which is not readable here: {CONVERT}")
        if name in (b"data", b"SSND"):
            break
    else:
        raise BadClip("damaged or truncated: no sound in it")
    left = end - start
    until_end = any(size in sizes for sizes in ENDLESS)
    if not until_end and (size == 0 or left - size > 1024):
        until_end = not ends_in_chunks(file, following, begin, start + size, end)
    if until_end:
        size = left
    if size > left:
        raise BadClip(f"truncated: its header says {size} bytes of sound, and {left} are there")
    if size >= 1 << 32:
        raise BadClip(f"holds {size / 1e9:.1f} GB of sound, more than its format can tell: convert "
                      "it to FLAC")
    if until_end:
        for another in find_all(file, re.compile(b"(?s)RIFF....WAVEfmt "), start, end, 16):
            raise several(another - begin, end - begin, "bytes")
    return Stream(file, [(begin, start - 4), struct.pack(f"{order}I", size), (start, end)])


def chunks(file, order, position, end):
    """(name, where its content begins, its size) of the chunks from a position on, up to anything
    else."""
    while position + 8 <= end:
        name, size = struct.unpack(f"{order}4sI", read_at(file, position, 8))
        if not re.fullmatch(rb"[ -~]{4}", name):
            return
        yield name, position + 8, size
        position += 8 + size
        # an odd size is followed by a zero, but not in all files
        position += size & 1 and read_at(file, position, 1) == b"\0"


def ends_in_chunks(file, following, begin, position, end):
    """Whether a file's sound, which ends at a position, is followed by chunks or a tag until its
    end. Raises BadClip where the chunks hold more sound."""
    sound = position
    for name, start, size in following:
        if name in (b"RIFF", b"FORM") or name in (b"data", b"SSND") and 0 < size <= end - start:
            raise several(sound - begin, end - begin, "bytes")
        position = start + size
    return end - 8 <= skip_tags(file, position, end) <= end + 1
