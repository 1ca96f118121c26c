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
    p.add_argument("songs", type=path, nargs="+", metavar="SONG", help="audio files or folders")
    p.add_argument("--csv", type=path, metavar="FILE", help="write a table with one row a song")
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


COLUMNS = "song valence arousal valence_std arousal_std windows quadrant mood".split()


def find_songs(paths):
    """The files named, and what looks like audio in the folders named. Raises UserError."""
    files = []
    for song in paths:
        files += sorted(filter(looks_like_audio, files_below(song))) if song.is_dir() else [song]
    if not files:
        raise UserError(f"no audio files in {', '.join(map(str, paths))}")
    return files


def check_outputs(args, files):
    """Raise UserError, before any work, for a table or a figure that cannot be written so."""
    if args.figure and len(files) > 1:
        raise UserError(f"--figure draws one song, and these are {len(files)}")
    for option, file, endings in (("--csv", args.csv, (".csv",)),
                                  ("--figure", args.figure, (".png", ".pdf"))):
        if file and file.suffix.lower() not in endings:
            raise UserError(f"{option} {file}: its name must end in {' or '.join(endings)}")
        if file and file.resolve().is_relative_to(args.run.resolve()):
            raise UserError(f"{option} {file} is in the run's folder: choose another place")


class Predictor:
    """Waveforms → valence and arousal, as the run's features and model make them."""

    def __init__(self, args):
        content = read_model(args.run / "model.pt")
        self.model = load_model(content, args.run / "model.pt")
        settings, source = content["settings"], content["backbone"]
        backbone = Backbone(args.weights or weights_name(source))
        expected = [settings[key] for key in ("weights", "sample_rate", "normalize_epsilon")]
        weights = backbone.digest if settings["weights"] else None  # a notebook's are not known
        if expected != [weights, backbone.sample_rate, backbone.epsilon]:
            raise UserError(f"{args.run} was trained on features of {source['name']} "
                            f"({str(settings['weights'])[:16]}…), and this backbone "
                            f"({backbone.digest[:16]}…) differs in weights, sample rate or "
                            "normalisation: name the right one with --weights")
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
            z_scored = self.model(self.model.run_frozen(features[None])).cpu()[0]
        return (z_scored * self.std + self.mean).numpy()


def predict_song(file, predictor, args):
    """(middles of its windows in seconds, predictions [windows, 2], seconds a window, a remark or
    None). Raises BadClip."""
    if not file.is_file():
        raise BadClip("not a regular file" if file.exists() else "no such file")
    rate = predictor.backbone.sample_rate
    starts, predictions, levels, lengths = zip(*(
        (start, predictor(waveform), mix_level(pcm), len(waveform))
        for start, waveform, pcm in read_windows(file, rate, args.window, args.hop)))
    seconds = lengths[0] / rate
    return np.array(starts) + seconds / 2, np.array(predictions), seconds, remark_on(levels)


def summary(predictions):
    """Of predictions [windows, 2]: their mean [valence, arousal], their standard deviation, and the
    number of the mean's quadrant."""
    # of the correctly rounded sum: the same on any machine
    mean = [statistics.fmean(values) for values in predictions.T]
    std = [statistics.pstdev(values.tolist()) for values in predictions.T]
    return mean, std, int(quadrant(np.array(mean), 5))


def run(args):
    files = find_songs(args.songs)
    check_outputs(args, files)
    predictor, rows = Predictor(args), []
    print(f"{'valence':>8}{'arousal':>9}   {'quadrant':24}{'std over windows':>20}   song")
    bar = Progress(files, desc="predict", unit="song", disable=len(files) < 2)
    for file in bar:
        name = str(file).encode(errors="replace").decode()  # which need not be text
        try:
            times, predictions, seconds, remark = predict_song(file, predictor, args)
        except (BadClip, OSError) as error:
            bar.say(f"failed: {name}: {error}")
            continue
        mean, std, number = summary(predictions)
        deviation = f"±{std[0]:.2f} ±{std[1]:.2f} of {len(predictions)}"
        bar.say(f"{mean[0]:8.3f}{mean[1]:9.3f}   {f'{QUADRANTS[number]} {MOODS[number]}':24}"
                f"{deviation if len(predictions) > 1 else 'one window':>20}   {name}"
                + (f" ({remark})" if remark else ""))
        rows.append([name, *(f"{value:.6f}" for value in mean + std), len(predictions),
                     QUADRANTS[number], MOODS[number]])
        if args.csv:  # after each song: a long list of songs may be interrupted
            write_csv(args.csv, COLUMNS, rows)
        if args.figure:
            figures.draw_song(times, predictions, std, args.figure.parent, args.figure.stem,
                              f"{name.rpartition('/')[2]}\nmodel {args.run.name} · windows of "
                              f"{seconds:.0f} s")
            bar.say(f"written: {args.figure.with_suffix('.png')} and .pdf")
    if rows and not args.csv and not args.figure:
        print("next: --figure song.png draws one song over time, --csv songs.csv writes a table")
    return 0 if len(rows) == len(files) else 1


if __name__ == "__main__":
    execute(run, ARGS)
