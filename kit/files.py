"""What is read and written: digests, whole files, locks.

A file is there whole or not at all. What is read has the schema that its reader asks for, or one
line says where it has not.
"""

import codecs
import contextlib
import csv
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import socket
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from kit.cli import UserError, torchrun
from kit.schema import check_schema

# ------------------------------------------------------------------------------------------ threads


@functools.cache
def thread_pool(threads):
    """`threads` threads for the whole process, each with one CPU thread inside torch."""
    torch.get_num_threads()  # settle this thread's own number: else the pool's would become it, one
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


def prefetch(function, items, threads=min(max(os.cpu_count() or 8, 8), 16)):
    """Yield function(item) for each of items, in their order, computed a few items ahead by
    `threads` threads. The function must not use prefetch itself."""
    waiting = deque()
    try:
        for item in items:
            waiting.append(thread_pool(threads).submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


# ------------------------------------------------------------------------------------------ digests


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def file_digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_digest(tensor):
    """sha256 over dtype, shape and little-endian bytes, never over a file's format."""
    array = tensor.detach().cpu().numpy() if isinstance(tensor, torch.Tensor) else tensor
    array = np.ascontiguousarray(array)
    digest = hashlib.sha256(f"{array.dtype.name} {list(array.shape)}\n".encode())
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    digest.update(little.reshape(-1).data.cast("B"))  # the bytes, without a copy
    return digest.hexdigest()


def state_digest(state, known={}):
    """sha256 over the sorted names and the digests of a state dict's tensors, buffers included.
    known: {name: digest} of tensors that need not be read again."""
    names = [name for name in state if name not in known]
    digests = prefetch(tensor_digest, [state[name] for name in names])
    digests = {**known, **dict(zip(names, digests))}
    return sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode())


def json_digest(value):
    return sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def content_digest(value):
    """sha256 over nested dicts and lists of tensors and plain values."""
    def plain(value):
        if isinstance(value, torch.Tensor):
            return {"tensor": tensor_digest(value)}
        if isinstance(value, dict):
            return {f"{type(key).__name__} {key}": plain(each) for key, each in value.items()}
        return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value
    return json_digest(plain(value))


# ------------------------------------------------------------------------------------------ writing


def write_file(path, data):
    """Write bytes or text so that the file is there whole or not at all, whatever happens
    meanwhile. Raises UserError where the disk is full or the folder may not be written."""
    path, data = Path(path), data.encode() if isinstance(data, str) else data
    # torchrun's processes may write one manifest at once: each beside it, in a file of its own
    beside = path.with_name(f".{path.name}.{torchrun().rank}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left in {path.parent}: {path.name} needs "
                            f"{len(data) / 1e6:.1f} MB more; free some and rerun") from None
        advice = ("choose a folder that you may write to" if error.errno in
                  (errno.EACCES, errno.EPERM, errno.EROFS) else "something else is in its place")
        raise UserError(f"cannot write {path}: {error.strerror}; {advice}") from None


def json_text(value):
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def plain_json(value):
    """A value as it is read from a JSON file: tuples are lists."""
    return json.loads(json_text(value))


def write_json(path, value):
    write_file(path, json_text(value))


def table_text(header, rows):
    """The text of a CSV file."""
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([header, *rows])
    return table.getvalue()


def write_csv(path, header, rows):
    write_file(path, table_text(header, rows))


def write_tensors(path, value):
    """torch.save a tensor as it is; a dict together with the digest of what it holds."""
    if isinstance(value, dict):
        value = {**value, "digest": content_digest(value)}
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_file(path, buffer.getbuffer())


# ------------------------------------------------------------------------------------------ reading


def read_text(path, what):
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark; its lines end in \\n.
    Raises UserError."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}") from None
    if data.startswith(b"PK\3\4"):
        raise UserError(f"{path} is not {what}: a zip archive or a spreadsheet's own file; save it "
                        "as CSV")
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf_16 else "utf-8-sig")
        if "\0" in text:
            raise ValueError("zero bytes, of UTF-16 without its mark or of no text at all")
    except ValueError:
        raise UserError(f"{path} is not {what}: not text in UTF-8, or in UTF-16 with a byte order "
                        "mark; save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path, what, schema=None):
    """A JSON file of the given schema (of `check_schema`). Raises UserError."""
    text = read_text(path, what)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not {what}: not valid JSON ({error})") from None
    if schema is not None:
        check_schema(value, schema, f"{path} is not {what}")
    return value


def load_tensors(path, what):
    """torch.load that can only make tensors and plain values, never run code. Raises UserError."""
    try:
        open(path, "rb").close()  # apart: torch.load raises OSError for damaged files too
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # the unpickler raises nearly anything on a file that is not its own
        raise UserError(f"{path} is not {what}: damaged, or it holds more than tensors and plain "
                        "values") from None


def read_tensors(path, what, schema):
    """A dict that `write_tensors` wrote: of the given schema, and what its digest says."""
    value = load_tensors(path, what)
    if not isinstance(value, dict) or not isinstance(value.get("digest"), str):
        raise UserError(f"{path} is not {what}: it has no digest of what it holds")
    digest = value.pop("digest")
    check_schema(value, schema, f"{path} is not {what}")
    if content_digest(value) != digest:
        raise UserError(f"{path} is damaged: it does not hold what its digest says; restore it, or "
                        "make it again")
    return value


# -------------------------------------------------------------------------------------------- locks


def lock(folder, name, what):
    """Hold `folder` as long as what this returns is kept, at most until the process ends, however
    it ends. Raises UserError, naming the holder, where another has it. A folder that may only be
    read needs no lock."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder) / f".{name}.lock", "a+b", buffering=0)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(200).decode(errors="replace").strip() or "another process"
        raise UserError(f"{what} {folder} is being written by {holder}: wait for it, or stop "
                        "it") from None
    except OSError:  # a file system without locks
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    return file


def shortened(ids):
    return ", ".join(map(str, ids[:5])) + (", …" if len(ids) > 5 else "")


def differences(then, now):
    """"key a there, b now; …" for two dicts of settings; empty if they are the same."""
    return "; ".join(f"{key} {then.get(key)} there, {now.get(key)} now"
                     for key in {**then, **now} if then.get(key) != now.get(key))
