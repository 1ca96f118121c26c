"""Where the sound lies in an audio file. libsndfile stops where a header says that a file ends, and
at the end of the first of several; it is given Streams instead, whose ends are known."""

import re
import struct

import soundfile

from kit.mpeg import mpeg_streams, starts_frames
from kit.streams import BadClip, Stream, add_part, find_all, no_stderr, read_at, tag_size, untagged

# Sizes written by programs that cannot seek back: until the end of the file. Some are rounded down
# to whole frames, some leave room for a header.
ENDLESS = [*(range(size - 64, size + 1) for size in (
    0x7F000008, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0x80000024, 0xFFFFF000, 0xFFFFFFFF)),
    range(2**63 - 64, 2**64)]
ENDINGS = {*(f".{name.lower()}" for name in soundfile.available_formats() if name != "RAW"), *(
    ".aif .aifc .snd .wave .bwf .mp1 .mp2 .mpa .mpga .oga .opus .m4a .m4b .m4p .m4r .mp4 .aac .wma"
    " .webm .mka .ape .wv .mpc .mpp .ac3 .dts .dsf .dff .tta .tak .amr .ra .spx .shn").split()}
FOREIGN_AUDIO = {  # not readable here, by the first bytes
    b"....ftypM4": "MPEG-4 audio (m4a)", rb"\xff[\xf0\xf1\xf8\xf9]|ADIF": "AAC audio",
    rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "Windows Media (wma)", b"wvpk": "WavPack audio",
    rb"MAC .[\x0c-\x10]": "Monkey's Audio (ape)", rb"MPCK|MP\+": "Musepack audio",
    b"TTA[12]": "TTA audio", rb"\x0b\x77": "AC-3 audio", rb"\x7f\xfe\x80\x01": "DTS audio",
    rb"DSD \x1c|FRM8": "DSD audio", b"#!AMR": "AMR audio", rb"\.RMF|\.ra\xfd": "RealAudio"}
FOREIGN = {
    **FOREIGN_AUDIO, b"....(ftyp|moov|mdat|wide)": "MPEG-4 or QuickTime",
    rb"(?i:(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body))": "an HTML page",
    rb"\s*<\?xml": "XML", rb"\s*\{\s*\"": "JSON", rb"\x1a\x45\xdf\xa3": "Matroska or WebM",
    b"MThd": "a MIDI file", b"FLV": "a Flash film", b"RIFF....AVI ": "an AVI film",
    rb"PK\x03\x04": "a zip archive", rb"\x1f\x8b": "a gzip archive", b"Rar!": "a rar archive",
    rb"7z\xbc\xaf": "a 7z archive", b"%PDF": "a PDF file", rb"\x89PNG": "a PNG picture",
    rb"\xff\xd8\xff": "a JPEG picture", rb"\x00\x05\x16[\x00\x07]": "a companion of macOS (._)",
    b"version https://git-lfs": "a Git LFS pointer (git lfs pull fetches the file)"}
CONTAINERS = re.compile(rb"(?s)(?:RIFF|RIFX|RF64|BW64)....WAVE|FORM....AIF[FC]|caff|\.snd")


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
            return bool(CONTAINERS.match(head) or head[:4] in (b"fLaC", b"OggS")
                        or named(head, FOREIGN_AUDIO) or starts_frames(file, begin, end))
    except OSError:
        return False


def named(head, kinds):
    """What a file with these first bytes is, of FOREIGN; None for none of these."""
    return next((name for pattern, name in kinds.items()
                 if re.match(pattern, head, re.DOTALL)), None)


def streams_of(file):
    """The Streams of an open binary file, to be decoded one after another. Raises BadClip for a
    file that is empty, cut, or begins like something that is not readable here."""
    begin, end = untagged(file)
    head = read_at(file, begin, 512)
    if not head:
        raise BadClip("holds tags and nothing else" if end else "empty file")
    if name := named(head, FOREIGN):
        raise BadClip(f"{name}, which is not readable here: find or convert it to WAV, FLAC or MP3")
    if CONTAINERS.match(head):
        return container_streams(file, head, begin, end)
    if head.startswith(b"fLaC"):
        return flac_streams(file, begin, end)
    if head.startswith(b"OggS"):
        return ogg_streams(file, begin, end)
    whole = [(begin, end)]
    if not starts_frames(file, begin, end) and format_of(Stream(file, whole)) not in (None, "MP3"):
        return [Stream(file, whole)]
    return mpeg_streams(file, begin, end) or [Stream(file, whole)]


def format_of(stream):
    """The format that libsndfile finds a stream to be in; None for none."""
    try:
        with no_stderr(), soundfile.SoundFile(stream) as sound:
            return sound.format
    except (soundfile.LibsndfileError, TypeError, ValueError):
        return None


def ogg_streams(file, begin, end):
    """One Stream for each link of a chain; libsndfile reads the first alone. Raises BadClip for a
    link without its last page."""
    links, flags, complete, position = [], 0, True, begin  # flags of a page: 2 first, 4 last
    while position < end:
        head = read_at(file, position, 27 + 255)
        if head[:5] != b"OggS\0" or len(head) < 27:
            position = next(find_all(file, re.compile(b"OggS\0"), position + 1, end, 5), end)
            continue
        if head[5] & 2 and not flags & 2:
            complete = complete and (not links or bool(flags & 4))
            links.append([])
        size, flags = 27 + head[26] + sum(head[27:27 + head[26]]), head[5]
        inner = read_at(file, position, size).find(b"OggS\0", 27)
        if inner > 0 or position + size > end:  # the page is cut
            complete = False
        elif links:
            add_part(links[-1], position, position + size)
        position += inner if inner > 0 else size
    if not complete or not flags & 4:
        raise BadClip(f"truncated: a last page is missing, {end - begin} bytes are there")
    return [Stream(file, parts) for parts in links] or [Stream(file, [(begin, end)])]


def flac_streams(file, begin, end):
    """A Stream for each FLAC file in the file; each is told that its length is unknown, for
    libsndfile reads no further than it is told."""
    starts = [*find_all(file, re.compile(rb"fLaC[\x00\x80]\x00\x00\x22"), begin, end, 8)]
    streams = []
    for start, stop in zip(starts, [*starts[1:], end]):
        info = bytearray(read_at(file, start, 26))
        samples = int.from_bytes(info[21:26], "big") & (1 << 36) - 1
        info[21:26] = info[21] & 0xF0, 0, 0, 0, 0
        streams.append(Stream(file, [bytes(info), (start + 26, stop)], samples or None))
    return streams or [Stream(file, [(begin, end)])]


def container_streams(file, head, begin, end):
    """The Streams of WAV, AIFF, AU or CAF files in a row. Where the size of the sound is one of
    ENDLESS, or something else than chunks follows (a size is cut to 32 bits, a recording was
    interrupted), all until the end is sound. Raises BadClip where there is less than it says."""
    chunk = sound_chunk(file, head, begin, end)
    if not chunk:
        return [Stream(file, [(begin, end)])]
    place, form, said, start, mpeg = chunk
    left, following = end - start, end
    if any(said in sizes for sizes in ENDLESS):
        said = left
    elif left - said > 1024 or said == 0:
        form_of_chunks = form[0] + "4s" + ("q" if head.startswith(b"caff") else "I")
        following = head[:1] != b"." and after_chunks(file, form_of_chunks, start + said, end)
        said, following = (said, following) if following else (left, end)
    if said > left:
        raise BadClip(f"truncated: its header says {said} bytes of sound, and {left} are there")
    if said >= (1 << 31 if head.startswith(b".snd") else 256**struct.calcsize(form)):
        raise BadClip(f"holds {said / 1e9:.1f} GB of sound, more than its format can tell: convert "
                      "it to FLAC")
    size = struct.pack(form, said)
    parts = [(begin, place), size, (place + len(size), following)]
    streams = mpeg_streams(file, start, start + said) if mpeg else [Stream(file, parts)]
    if following < end:
        streams += container_streams(file, read_at(file, following, 512), following, end)
    return streams


def sound_chunk(file, head, begin, end):
    """(where the size of the sound lies, its format for struct, the size, where the sound begins,
    whether it is MPEG audio in a WAV); None where there is none."""
    if head.startswith(b".snd"):
        offset, size = struct.unpack(">II", head[4:12])
        return begin + 8, ">I", size, begin + offset, False
    large, order = None, "<" if head[:4] in (b"RIFF", b"RF64", b"BW64") else ">"
    form = order + ("Q" if head.startswith(b"caff") else "I")
    position, mpeg = begin + (8 if head.startswith(b"caff") else 12), False
    while position + (length := 4 + struct.calcsize(form)) <= end:
        content, start = read_at(file, position, 32), position + length
        name, size = struct.unpack(order + "4s" + form[1], content[:length])
        if name in (b"data", b"SSND"):
            if large and size == 0xFFFFFFFF:
                return *large, start, mpeg
            return position + 4, form, size, start, mpeg
        if name == b"ds64" and len(content) >= 24:
            large = start + 8, "<Q", struct.unpack("<Q", content[16:24])[0]
        mpeg = mpeg or name == b"fmt " and content[8:10] in (b"\x50\0", b"\x55\0")
        position = start + size + (size & 1 if form[1] == "I" else 0)
    return None


def after_chunks(file, form, position, end):
    """Where the chunks end that begin at a position, or a byte behind it, or behind a tag: at the
    end or at another file. None where something else follows. Raises BadClip for more sound."""
    for start in (position, position + 1):
        start += tag_size(read_at(file, start, 16))
        while start + struct.calcsize(form) <= end:
            name, size = struct.unpack(form, read_at(file, start, struct.calcsize(form)))
            if CONTAINERS.match(read_at(file, start, 12)):
                return start
            if name in (b"data", b"SSND") and 0 < size <= end - start:
                raise BadClip("its sound is in more than one chunk: convert it to WAV or FLAC")
            if not re.fullmatch(rb"[ -~]{4}", name) or size < 0:
                break
            start += struct.calcsize(form) + size + (size & 1)
        if end - 8 <= start <= end + 1:
            return end
    return None
