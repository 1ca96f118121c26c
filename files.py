"""What is read and written: digests, whole files, the form of what is read, locks, verdicts.

A digest is sha256 over dtype, shape and bytes of tensors, never over a file format. A file is there
whole or not at all. What is read is of the form described beside its reader, or one line says where
it is not.
"""

import contextlib
import csv
import errno
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import re
import socket
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from cli import UserError

# ------------------------------------------------------------------------------------------ threads


@functools.cache
def thread_pool(threads):
    """`threads` threads for the whole process, each with one CPU thread inside torch."""
    torch.get_num_threads()  # settle this thread's own number: else the pool's would become it, one
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


def ahead(function, items, threads=8):
    """Yield function(item) for each of items, in their order, computed a few items ahead by
    `threads` threads. The function must not use ahead itself."""
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


# -------------------------------------------------------------------------------- files and digests


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


def state_digest(state, known=()):
    """sha256 over the sorted names and the digests of a state dict's tensors, buffers included.
    known: {name: digest} of tensors that need not be read again."""
    names = [name for name in state if name not in known]
    digests = dict(zip(names, ahead(tensor_digest, [state[name] for name in names])), **dict(known))
    return sha256("".join(f"{name} {digests[name]}\n" for name in sorted(state)).encode())


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


def write_file(path, data):
    """Write bytes or text so that the file is there whole or not at all, whatever happens
    meanwhile. Raises UserError where the disk is full or the folder may not be written."""
    path, data = Path(path), data.encode() if isinstance(data, str) else data
    # torchrun's processes may write one manifest at once: each beside it, in a file of its own
    beside = path.with_name(f".{path.name}.{os.environ.get('RANK', 0)}.part")
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


def read_text(path, what, errors="strict"):
    try:
        return Path(path).read_text(encoding="utf-8-sig", errors=errors)
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not {what}: not text") from None


def read_table(path, what, errors="strict"):
    """The rows of a CSV file, each a list of strings. Raises UserError."""
    try:
        return list(csv.reader(io.StringIO(read_text(path, what, errors).replace("\0", ""))))
    except csv.Error as error:
        raise UserError(f"{path} is not {what}: {error}") from None


def read_json(path, what, form=None):
    """A JSON file of the given form (of `check_form`). Raises UserError."""
    text = read_text(path, what)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not {what}: not valid JSON ({error})") from None
    if form is not None:
        check_form(value, form, f"{path} is not {what}")
    return value


def is_plain(value):
    """Whether it is a dense tensor of finite numbers on the CPU."""
    return (isinstance(value, torch.Tensor) and value.layout == torch.strided
            and value.device.type == "cpu" and not value.is_neg() and not value.is_quantized
            and (not value.is_floating_point() or bool(value.isfinite().all())))


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


def read_tensors(path, what, form):
    """A dict that `write_tensors` wrote: of the given form, and what its digest says."""
    value = load_tensors(path, what)
    if not isinstance(value, dict) or not isinstance(value.get("digest"), str):
        raise UserError(f"{path} is not {what}: it has no digest of what it holds")
    digest = value.pop("digest")
    check_form(value, form, f"{path} is not {what}")
    if content_digest(value) != digest:
        raise UserError(f"{path} is damaged: it does not hold what its digest says; restore it, or "
                        "make it again")
    return value


DIGEST, WHOLE = re.compile("[0-9a-f]{64}"), re.compile("0|[1-9][0-9]{0,8}")
KINDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false",
         dict: "names with values", DIGEST: "a sha256",
         torch.Tensor: "a tensor without NaN or infinity"}


def check_form(value, form, complaint):
    """Raise UserError, beginning with `complaint` and naming the place, where a value read from a
    file is not of a form: a type (float: any finite number; torch.Tensor: finite too), a string or
    None itself, a regular expression, [form of each], [form, form, …] of exactly so many, {name:
    form} with at least these names, {type: form} with names of a type (str, or int for digits), or
    a tuple of alternatives. {"songs": {int: [float, float]}, "labels": (None, str)}: a dict with
    two numbers for each song id, and labels that may be missing."""
    for place, expected in misfits(value, form, ()):
        where = ".".join(map(str, place)) or "what it holds"
        raise UserError(f"{complaint}: {where} is not {expected}")


def misfits(value, form, place):
    """Yield (place, what was expected there) wherever a value is not of a form."""
    if isinstance(form, tuple):
        found = [next(misfits(value, each, place), None) for each in form]
        if None not in found:
            yield max(found, key=lambda each: len(each[0]))  # the alternative that was meant
    elif isinstance(form, list):
        if not isinstance(value, (list, tuple)):
            yield place, "a list"
        elif len(form) > 1 and len(value) != len(form):
            yield place, f"a list of {len(form)}"
        else:
            for n, each in enumerate(value):
                yield from misfits(each, form[n % len(form)], (*place, n))
    elif isinstance(form, dict):
        if not isinstance(value, dict):
            yield place, KINDS[dict]
        elif form.keys() == {str} or form.keys() == {int}:
            (kind, inner), = form.items()
            for key, each in value.items():
                if not (isinstance(key, str) if kind is str else WHOLE.fullmatch(str(key))):
                    yield (*place, repr(key)), f"{KINDS[kind]}, as a name has to be"
                yield from misfits(each, inner, (*place, key))
        else:
            for key, inner in form.items():
                if key in value:
                    yield from misfits(value[key], inner, (*place, key))
                else:
                    yield (*place, key), "there"
    elif not fits(value, form):
        yield place, KINDS.get(form, repr(form))


def fits(value, form):
    """Whether a value is of a form that has no forms in it."""
    if isinstance(form, re.Pattern):
        return isinstance(value, str) and form.fullmatch(value)
    if form is torch.Tensor:
        return is_plain(value)
    if isinstance(value, bool) and form in (int, float):
        return False  # though Python has it as a whole number
    if form is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, form) if isinstance(form, type) else value == form


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


# ----------------------------------------------------------------------------------------- verdicts


class Verdict:
    """What every --verify says: a line for each thing that is not identical, a count of those that
    are, then REPRODUCED, CLOSE or NOT REPRODUCED; `finish` returns the exit code 0, 3 or 1."""

    def __init__(self, what):
        self.identical, self.close, self.different = 0, 0, 0
        print(f"\nverifying {what}:")

    def compare(self, name, expected, found, limit=0.0, same=0.0, like=False):
        """Compare two values. Numbers that differ by at most `same` are identical, by less than
        `limit` close; with `like` anything that differs is close."""
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool)
                      for value in (expected, found))
        try:
            apart = abs(expected - found) if numbers else math.nan
        except OverflowError:  # a whole number that no float holds
            apart = math.inf
        if type(expected) is type(found) and expected == found or apart <= same:
            self.identical += 1
            return
        near = like or apart < limit
        self.close, self.different = self.close + near, self.different + (not near)
        place, expected, found = first_difference(expected, found)
        shown = [f"{value:.9g}" if isinstance(value, float) else str(value)[:24]
                 for value in (expected, found)]
        word = "close" if near else "DIFFERENT"
        print(f"  {name + place:42} {word}: expected {shown[0]}, found {shown[1]}")

    def compare_all(self, names, expected, found):
        """Compare what two dicts have under these names."""
        for name in names:
            self.compare(name.replace("_", " "), expected.get(name), found.get(name))

    def finish(self, what):
        print(f"  {self.identical} identical, {self.close} close, {self.different} different")
        if self.different or not self.identical:
            print(f"NOT REPRODUCED: {what}")
            return 1
        print(f"{'CLOSE' if self.close else 'REPRODUCED'}: {what}")
        return 3 if self.close else 0


def first_difference(expected, found):
    """The first place at which two lists or two dicts differ, however deep: ("[3]", its value in
    each, "nothing" if it has none); ("", expected, found) of anything else."""
    for kind, keys in ((list, lambda value: range(len(value))), (dict, dict.keys)):
        if isinstance(expected, kind) and isinstance(found, kind):
            for key in dict.fromkeys([*keys(expected), *keys(found)]):
                then, now = (value[key] if key in keys(value) else "nothing"
                             for value in (expected, found))
                if then != now:
                    place, *values = first_difference(then, now)
                    return f"[{key}]{place}", *values
    return "", expected, found


def differences(then, now):
    """"key a there, b now; …" for two dicts of settings; empty if they are the same."""
    return "; ".join(f"{key} {then.get(key)} there, {now.get(key)} now"
                     for key in {**then, **now} if then.get(key) != now.get(key))


def shortened(ids):
    return ", ".join(map(str, ids[:5])) + (", …" if len(ids) > 5 else "")
