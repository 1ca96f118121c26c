"""Predict your own music: audio files → valence and arousal, over time.

  python predict.py runs/last1 song.mp3
  python predict.py runs/last1 song.mp3 --figure song.png
  python predict.py runs/last1 song.mp3 folder --csv songs.csv

Reads WAV, AIFF, FLAC, Ogg (Vorbis or Opus) and MP3, one recording a file. Unreadable files are
reported and skipped (exit code 1).
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P, -I leave it out

from kit.cli import Parser, execute, number, path, start


def parser():
    p = Parser(__doc__)
    p.add_argument("run", type=path, metavar="RUN", help="folder that train.py wrote")
    p.add_argument("songs", type=path, nargs="+", metavar="SONG",
                   help="audio files, or folders of them")
    p.add_argument("--csv", type=path, metavar="FILE",
                   help="write a .csv table with one row a song")
    p.add_argument("--figure", type=path, metavar="FILE",
                   help="draw one song over time and through the plane (PNG, and PDF beside it)")
    p.add_argument("--window", type=number(float, 1, 600), default=45.0, metavar="SECONDS",
                   help="length of a window; a DEAM song has 45 s")
    p.add_argument("--hop", type=number(float, 0.1, 600), default=15.0, metavar="SECONDS",
                   help="from the start of one window to that of the next")
    p.add_argument("--weights", metavar="NAME|FOLDER|FILE",
                   help="the backbone (default: the one that made the run's features, by name)")
    p.share("--device")
    return p


if __name__ == "__main__":
    ARGS = start(parser(), "rows written so far are complete")  # before torch is imported

import statistics
from pathlib import Path

import numpy as np
import torch

from common import Backbone, load_model
from kit import figures
from kit.audio import BadClip, mix_level, read_windows, remark_on
from kit.cli import Progress, UserError
from kit.containers import looks_like_audio
from kit.deam import MOODS, QUADRANTS, files_below, quadrant
from kit.files import write_csv
from kit.machine import Arithmetic
from kit.records import read_model
from kit.weights import weights_name

SONGS = ["song", "valence", "arousal", "valence_std", "arousal_std", "windows", "quadrant",
         "mood"]


def printable(name):
    """A file's name for people: what is not text, or would move the cursor, as a question mark."""
    return "".join(each if each.isprintable() else "?" for each in str(name))


def find_songs(paths):
    """The files named, and all that look like audio in the folders named, by ending or first bytes.
    Raises UserError."""
    files = []
    for each in paths:
        files += [each] if not each.is_dir() else sorted(
            file for file in files_below(each) if looks_like_audio(file))
    if not files:
        raise UserError(f"no audio files in {', '.join(map(str, paths))}")
    return files


def check_outputs(args, files):
    """Raise UserError for a table or a figure that would replace something else, before any
    work."""
    if args.figure and len(files) > 1:
        raise UserError(f"--figure draws one song, and these are {len(files)}")
    for name, file, endings in (("--csv", args.csv, (".csv",)),
                                ("--figure", args.figure, (".png", ".pdf"))):
        if not file:
            continue
        real = Path(os.path.realpath(file))
        if real.suffix.lower() not in endings:
            raise UserError(f"{name} {file}: its name must end in {' or '.join(endings)}")
        existing = next(place for place in (real, *real.parents) if place.exists())
        if real.is_dir() or not os.access(existing, os.W_OK):
            raise UserError(f"{name} {file}: cannot be written there; choose another place")
        if str(real) in map(os.path.realpath, files):
            raise UserError(f"{name} {file} is a file to read: name another")
        if real.is_relative_to(os.path.realpath(args.run)):
            raise UserError(f"{name} {file} is in the run's folder: choose another place")


class Predictor:
    """Waveforms → valence and arousal, as the run's features and model make them."""

    def __init__(self, args):
        content = read_model(args.run / "model.pt")
        self.model = load_model(content, args.run / "model.pt")
        settings, source = content["settings"], content["backbone"]
        backbone = Backbone(args.weights or weights_name(source))
        here = {"weights": settings["weights"] and backbone.digest,
                "sample_rate": backbone.sample_rate, "normalize_epsilon": backbone.epsilon}
        if any(settings[key] != value for key, value in here.items()):
            raise UserError(f"the features of {args.run} were made by other weights, of "
                            f"{source['name']} ({str(settings['weights'])[:16]}…), than these "
                            f"({backbone.digest[:16]}…): name them with --weights")
        self.backbone = backbone.to(Arithmetic(settings["precision"], args.device),
                                    settings["layer"])
        self.stored = getattr(torch, settings["store"])
        self.exact = Arithmetic("exact", args.device)
        self.model.to(self.exact.device, self.exact.dtype)
        self.mean, self.std = content["mean"], content["std"]

    @torch.no_grad()
    def __call__(self, waveform):
        """waveform[samples] → numpy [valence, arousal] on the 1–9 scale."""
        features = self.backbone.hidden_states(waveform[None])[0].to(self.stored)
        with self.exact():
            z_scored = self.model([self.model.run_frozen(features)]).cpu()[0]
        return (z_scored * self.std + self.mean).numpy()


def predict_song(file, predictor, args):
    """(starts of its windows in seconds, predictions [windows, 2], seconds a window, a remark or
    None). Raises BadClip."""
    if not file.is_file():
        raise BadClip("no such file" if not os.path.lexists(file) else "not a regular file"
                      if os.path.exists(file) else "a broken link")
    starts, values, levels, seconds = [], [], [], 0
    windows = read_windows(file, predictor.backbone.sample_rate, args.window, args.hop)
    for begin, waveform, pcm in windows:
        starts.append(begin)
        values.append(predictor(waveform))
        levels.append(mix_level(pcm))
        seconds = len(waveform) / predictor.backbone.sample_rate
    return np.array(starts), np.array(values), seconds, remark_on(levels)


def summary(file, values):
    """A song's row of the table: mean and standard deviation over its windows, quadrant, mood."""
    # of the correctly rounded sum: the same on any machine
    centre = [statistics.fmean(column) for column in values.T]
    deviation = [statistics.pstdev(column.tolist()) for column in values.T]
    n = int(quadrant(np.array(centre), 5))
    return [str(file).encode(errors="replace").decode(), *centre, *deviation, len(values),
            QUADRANTS[n], MOODS[n]]


def run(args):
    files = find_songs(args.songs)
    check_outputs(args, files)
    predictor, rows, failed = Predictor(args), [], 0
    print(f"{'valence':>8}{'arousal':>9}   {'quadrant':24}{'std over windows':>20}   song")
    bar = Progress(files, desc="predict", unit="song", disable=len(files) < 2)
    for file in bar:
        try:
            starts, values, seconds, remark = predict_song(file, predictor, args)
        except (BadClip, OSError) as error:
            bar.say(f"failed: {printable(file)}: {printable(error)}")
            failed += 1
            continue
        row = summary(file, values)
        _, valence, arousal, *deviation, windows, name, mood = row
        over = "±{:.2f} ±{:.2f} of {}".format(*deviation, windows) if windows > 1 else "one window"
        bar.say(f"{valence:8.3f}{arousal:9.3f}   {f'{name} {mood}':24}{over:>20}   "
                f"{printable(file)}" + (f" ({remark})" if remark else ""))
        rows.append([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row])
        if args.csv:  # after each song: a long list of songs may be interrupted
            write_csv(args.csv, SONGS, rows)
        if args.figure:
            figures.draw_song(starts + seconds / 2, values, deviation, args.figure.parent,
                              args.figure.stem, f"{printable(file.name)}\nmodel "
                              f"{args.run.name} · windows of {seconds:.0f} s")
            bar.say(f"written: {args.figure.with_suffix('.png')} and .pdf")
    if not args.csv and not args.figure:
        print("next: --figure song.png draws one song over time, --csv songs.csv writes a table")
    return 1 if failed else 0


if __name__ == "__main__":
    execute(run, ARGS)
