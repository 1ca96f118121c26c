"""The command line that all scripts share: options, errors in one line, signals, progress.

Imports no torch: a script reads its arguments before it imports anything slow, so that --help and a
mistyped option are answered at once and Ctrl-C is one line from the start.
"""

import argparse
import builtins
import errno
import math
import os
import platform
import signal
import sys
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

# Libraries read these when they are loaded, so they have to stand before torch is imported. Without
# them float32 follows the CPU it runs on (AVX2 here, AVX-512 there) and the number of threads.
# Exact arithmetic has the same bits either way, and is faster without them.
PINS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
if platform.machine() in ("x86_64", "AMD64"):
    PINS |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
             "MKL_CBWR": "AVX2,STRICT"}


class UserError(Exception):
    """Something the user can put right: one line that says what is wrong and what to do."""


# ------------------------------------------------------------------------------------------ options


def number(kind, low, high=math.inf, above=False):
    """An argparse type: an int or float from `low` (or above it) up to `high`, never infinite."""

    def parse(text):
        value = kind(text)
        if not (value > low if above else value >= low) or not value <= high or value == math.inf:
            edge = f"above {low}" if above else f"at least {low}"
            upper = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} must be {edge}{upper}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def path(text):
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty path")
    return Path(text)


SHARED = {
    "--device": dict(choices=["auto", "cpu", "cuda"], default="auto", help="where to compute"),
    "--features": dict(type=path, default=Path("DEAM_feats"), metavar="FOLDER",
                       help="the folder of features"),
    "--deam": dict(type=path, metavar="PATH", help="a folder with DEAM in it, in any layout"),
    "--precision": dict(choices=["exact", "float32"], default="exact",
                        help="arithmetic: exact gives the same bits on any machine, float32 on one "
                             "make of CPU or one GPU model"),
    "--labels": dict(choices=["shipped", "corrected"], default="shipped",
                     help="corrected exchanges valence and arousal where the audit says that DEAM "
                          "has them swapped"),
    "--allow-missing": dict(action="store_true", help="work on the songs that are there"),
}


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        without = action.default is None or action.default is False
        return action.help if without else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, a default in every help line, and the options of SHARED."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False)
        self.file = None  # that options are read from, instead of the command line

    def read(self, options, file):
        """The namespace of options {name: value} that a file holds, checked as those of a command
        line are. Raises UserError, beginning with the file."""
        self.file = file
        unknown = options.keys() - vars(self.parse_args([])).keys()
        if unknown:
            self.error(f"no option {', '.join(sorted(unknown))}")
        words = []
        for name, value in options.items():
            if value is not None and value is not False:
                words.append(f"--{name.replace('_', '-')}" + (f"={value}" if value is not True
                                                              else ""))
        return self.parse_args(words)

    def share(self, *names, **changes):
        for name in names:
            self.add_argument(name, **{**SHARED[name], **changes})

    def error(self, message):
        if self.file:
            raise UserError(f"{self.file} holds options that are none: {message}")
        self.exit(2, f"error: {message} ({self.prog} --help lists the options)\n")


# -------------------------------------------------------------------------------- start and finish


def start(parser, advice):
    """Parse the command line and make ready for importing torch: pins, streams, signals.
    advice: what is printed after Ctrl-C."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: the next file opened would take its place
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not a notebook's
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 gets "?" for "±"
    args = parser.parse_args()

    def stop(number, _):
        # at once: threads may be in the middle of a song, and no file is ever half-written
        os.write(2, f"\ninterrupted: {advice}\n".encode(errors="replace"))
        os._exit(128 + number)

    if not hasattr(builtins, "__IPYTHON__"):  # whose process is the user's, and stays
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
    if getattr(args, "precision", None) != "exact":
        # also for scripts without that option: a run says itself how it was computed, in a file
        # that is not read yet
        os.environ.update(PINS)
    # no bits, but time: large tensors on large pages of memory; threads that wait soon sleep, since
    # spinning they would hold the cores that others compute on
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    return args


class Process(NamedTuple):
    """A process's number and how many there are; the same among those of its machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1


def torchrun():
    """The Process that this one is, as torchrun says: it sets RANK and WORLD_SIZE. One of them
    alone is left over from something else and means nothing, nor does an empty one. Raises
    UserError for what cannot be such numbers."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {name: os.environ.get(name, "").strip() for name in names}
    if not given["RANK"] or not given["WORLD_SIZE"]:
        return Process()
    try:
        process = Process(*(int(given[name] or value) for name, value in zip(names, Process())))
        if (0 <= process.rank < process.count and 0 <= process.local_rank
                and 0 < process.local_count <= process.count):
            return process
    except ValueError:  # no number
        pass
    variables = " ".join(f"{name}={value}" for name, value in given.items() if value)
    raise UserError(f"{variables} in the environment is not what torchrun sets: unset these, or "
                    "start the processes with torchrun")


def execute(run, args):
    """Exit with the code of run(args); an expected failure is one line and exit code 2."""
    try:
        code = run(args)
        sys.stdout.flush()
    except UserError as error:
        code = fail(error)
    except BrokenPipeError:  # `… | head` has read enough
        os._exit(141)
    except OSError as error:  # a file's errors are caught where it is read or written
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        code = fail(f"cannot print: {error.strerror}; what was written to disk is complete")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        code = fail("too little free GPU memory: free some, lower extract.py's --batch-size or "
                    "train.py's --micro-batch, or use --device cpu")
    try:
        sys.stdout.flush()
    except OSError:
        os._exit(code or 2)
    sys.exit(code)


def fail(message):
    print("error: " + " ".join(str(message).split("\n")), file=sys.stderr)
    return 2


# ----------------------------------------------------------------------------------------- progress


class Progress(tqdm):
    """tqdm's bar on a terminal; elsewhere a plain line every half minute."""

    def __init__(self, *args, **settings):
        if not sys.stderr.isatty():
            settings.update(mininterval=30, miniters=1, delay=30, leave=False)
        super().__init__(*args, **settings)

    @staticmethod
    def status_printer(file):
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda line: line.strip() and print(line.strip(), file=file, flush=True)

    def say(self, line):
        """Print a line to stdout, above the bar where there is one."""
        self.write(line) if sys.stderr.isatty() else print(line, flush=True)
