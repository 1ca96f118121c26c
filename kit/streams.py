"""Parts of a file as files of their own, for libsndfile; and the tags around them."""

import contextlib
import ctypes
import functools
import io
import os
import platform
import re
import struct
import threading

BLOCK = 1 << 16


class BadClip(Exception):
    """One audio file that cannot be used; the others can."""


class Stream(io.RawIOBase):
    """Parts of an open file, one after another: bytes, or (begin, end) in the file.

    samples: how many it should give; None where libsndfile knows. endless: it claims to be longer
    than any file, for libsndfile stops where it estimates an MP3's end. `error` is the one that
    ended a reading: an exception does not pass through libsndfile."""

    def __init__(self, file, parts, samples=None, endless=False):
        self.file, self.parts, self.samples, self.error = file, [], samples, None
        self.position = size = 0
        for part in parts:
            self.parts.append((size, part))
            size += len(part) if isinstance(part, bytes) else part[1] - part[0]
        self.size, self.endless, self.current = 1 << 50 if endless else size, endless, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.position

    def seek(self, offset, whence=0):
        position = offset + (0, self.position, self.size)[whence]
        if 0 <= position < 1 << 60:  # damaged headers ask for others; no exception may be raised
            self.position, self.current = position, 0
        return self.position

    def readinto(self, buffer):
        view, wanted = memoryview(buffer), len(buffer)
        if self.endless and self.position >= self.size - 128:  # libmpg123 looks for a tag there
            wanted = min(wanted, self.size - self.position)
            view[:wanted] = bytes(wanted)
            self.position += wanted
            return wanted
        filled = 0
        while filled < wanted and (data := self.part(wanted - filled)):
            view[filled:filled + len(data)] = data
            filled += len(data)
            self.position += len(data)
        return filled

    def part(self, count):
        """Up to `count` bytes at the position, of one part; none at the end."""
        for self.current in range(self.current, len(self.parts)):
            start, part = self.parts[self.current]
            offset = self.position - start
            if isinstance(part, bytes):
                data = part[offset:offset + count]
            else:
                data = self.from_file(part[0] + offset, min(count, part[1] - part[0] - offset))
            if data:
                return data
        return b""

    def from_file(self, position, count):
        try:
            return read_at(self.file, position, count) if count > 0 else b""
        except OSError as error:
            self.error = error
            return b""


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


def add_part(parts, start, stop):
    """Append a part to a list of them, or to the last one where they touch."""
    if parts and parts[-1][1] == start:
        parts[-1] = parts[-1][0], stop
    else:
        parts.append((start, stop))


def truncated(said, length):
    return BadClip(f"truncated: its header says {said:.1f} s, and {length:.1f} s are there")


def untagged(file):
    """(begin, end) of a file without ID3v2 in front and ID3v1, Lyrics3 and APE behind."""
    begin, end = 0, file.seek(0, os.SEEK_END)
    while 0 < (size := tag_size(read_at(file, begin, 16))) <= end - begin:
        begin += size
    while end > begin:
        tail = read_at(file, max(begin, end - 128), min(128, end - begin))
        lyrics = re.search(rb"(\d{6})LYRICS200$", tail)
        if len(tail) == 128 and tail.startswith(b"TAG"):
            size = 128
        elif lyrics:
            size = int(lyrics[1]) + 15
        elif tail[-32:-24] == b"APETAGEX":
            size, _, flags = struct.unpack("<3I", tail[-20:-8])
            size += 32 * (flags >> 31)
        else:
            break
        if not 0 < size <= end - begin:
            break
        end -= size
    return begin, end


def tag_size(head):
    """Bytes of the ID3v2, ID3v1 or APE tag that begins like this; 0 where none does."""
    if head.startswith(b"ID3") and len(head) >= 10 and max(head[6:10]) < 128:
        size = functools.reduce(lambda total, byte: total << 7 | byte, head[6:10])
        return size + (20 if head[5] & 16 else 10)
    if head.startswith(b"APETAGEX") and len(head) >= 16:
        return 32 + struct.unpack("<I", head[12:16])[0]
    return 128 if head.startswith(b"TAG") else 0


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
