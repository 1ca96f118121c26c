"""DEAM: annotations, splits, artists, labels, download."""

import contextlib
import errno
import fcntl
import functools
import math
import os
import re
import statistics
from pathlib import Path
from typing import NamedTuple

import torch

from exact import Exact
from kit.cli import UserError
from kit.containers import ENDINGS
from kit.files import json_digest, read_json, read_text

HERE = Path(__file__).resolve().parent.parent
DIMENSIONS = ("valence", "arousal")
QUADRANTS = ("HV/HA", "LV/HA", "LV/LA", "HV/LA")  # high or low valence, high or low arousal
MOODS = ("excited, happy", "tense, angry", "sad, tired", "calm, content")  # after Russell 1980
# version 1: a bare handle asks for the latest
KAGGLE = "imsparsh/deam-mediaeval-dataset-emotional-analysis-in-music/versions/1"
STATIC = "static_annotations_averaged_songs_1_2000.csv"
COLUMNS = ["song_id", "valence_mean", "valence_std", "arousal_mean", "arousal_std"]
FRESH_COPY = "take the file from a fresh copy of DEAM"
SPLITS = {"train": [int], "val": [int], "test": [int]}


class Labels(NamedTuple):
    """A song's labels on DEAM's 1–9 scale: means over annotators, and their standard deviations
    (ddof 0)."""
    valence: float
    valence_std: float
    arousal: float
    arousal_std: float


def song_rows(path, columns=("song_id",)):
    """Yield (line number, song id, {other column: cell}) of a table of DEAM that has at least these
    columns. Spaces around cells, other columns and empty lines are fine. Raises UserError for
    whatever else a spreadsheet makes of such a table: decimal commas, dates and lost columns could
    give wrong numbers."""
    text = read_text(path, "a table of labels")
    for mark, name in ((";", "semicolons"), ("\t", "tabs"), ('"', "quotation marks")):
        if mark in text:
            raise UserError(f"{path} has {name} in it, where DEAM's table has commas alone; it "
                            f"begins with {text[:40]!r}; {FRESH_COPY}")
    table = [(line, [cell.strip() for cell in row.split(",")])
             for line, row in enumerate(text.split("\n"), 1) if row.strip(", ")]
    (_, header), *rows = table or [(1, [])]
    names = dict.fromkeys([*columns, *header])
    if wrong := [name for name in names if name and header.count(name) != 1]:
        raise UserError(f"{path} needs one column {', '.join(wrong)}, separated by commas; its "
                        f"header is {','.join(header)[:80]!r}; {FRESH_COPY}")
    songs = set()
    for line, cells in rows:
        row = dict(zip(header, cells))
        if len(cells) != len(header) or not re.fullmatch("[0-9]{1,9}", row["song_id"]):
            raise UserError(f"{path}, line {line}: not a song id and {len(header) - 1} other cells "
                            f"({','.join(cells)[:60]}); {FRESH_COPY}")
        song = int(row.pop("song_id"))
        if song in songs:
            raise UserError(f"{path}, line {line}: song {song} appears twice; {FRESH_COPY}")
        songs.add(song)
        yield line, song, row
    if not songs:
        raise UserError(f"{path}: no songs in it; {FRESH_COPY}")


def plain_number(cell):
    """A cell's number. NaN for everything else: what float() takes beside digits and a decimal
    point (1_5, inf, other scripts' digits), and leading zeros, which dates have."""
    number = r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?"
    return float(cell) if re.fullmatch(number, cell) else math.nan


def read_annotations(path):
    """Static annotations, {song id: Labels}. Raises UserError for a table that song_rows does not
    take, and for gaps, NaN, and labels outside 1–9."""
    songs = {}
    for line, song, row in song_rows(path, COLUMNS):
        cells = [row[name] for name in COLUMNS[1:]]
        labels = Labels(*map(plain_number, cells))
        if not (1 <= labels.valence <= 9 and 0 <= labels.valence_std <= 8
                and 1 <= labels.arousal <= 9 and 0 <= labels.arousal_std <= 8):
            raise UserError(f"{path}, line {line}: not two labels from 1 to 9 with their standard "
                            f"deviations ({', '.join(cells)}); {FRESH_COPY}")
        songs[song] = labels
    return songs


def dynamic_means(path):
    """{song id: mean over time} of a dynamic annotations file, its values from -1 to 1; empty cells
    and NaN are skipped. Raises UserError for other cells and tables that song_rows does not
    take."""
    means = {}
    for line, song, row in song_rows(path):
        values = [plain_number(cell) for cell in row.values() if cell and cell.lower() != "nan"]
        if not all(abs(value) <= 1 for value in values):
            raise UserError(f"{path}, line {line}: not numbers from -1 to 1; {FRESH_COPY}")
        if values:
            means[song] = statistics.fmean(values)
    return means


def one_table(paths, read):
    """The first of the paths by name. Raises UserError, naming two of them, unless read(path) gives
    the same for all."""
    first, *others = sorted(paths)
    for path in others:
        if read(path) != read(first):
            raise UserError(f"two tables of labels that differ: {first} and {path}; keep one")
    return first


def static_annotations(files, root):
    """read_annotations of DEAM's table among the files below `root`; copies of it with the same
    labels may lie beside it. Raises UserError where there is none, or two that differ."""
    tables = [path for path in files if path.name.replace(" ", "_") == STATIC]
    if not tables:
        raise UserError(f"no DEAM in {root}: {STATIC} is nowhere in it; unpack DEAM_Annotations "
                        "there")
    return read_annotations(one_table(tables, read_annotations))


def dynamic_annotations(files):
    """{"valence": path, "arousal": path} of the annotations over time, where they are among the
    files. Raises UserError where two files of one name differ."""
    found = {name: [path for path in files if path.name == f"{name}.csv"
                    and "dynamic" in path.parent.name] for name in DIMENSIONS}
    return {name: one_table(paths, dynamic_means) for name, paths in found.items() if paths}


def read_splits(path):
    """{"source": where they come from, "train": [ids], "val": [ids], "test": [ids]}, disjoint,
    their order kept. Raises UserError."""
    splits = read_json(path, "a file of splits", SPLITS)
    splits = {"source": str(splits.get("source", Path(path).name)),
              **{name: splits[name] for name in SPLITS}}
    everything = songs_of(splits)
    if len(set(everything)) != len(everything):
        raise UserError(f"{path}: a song appears twice in it; splits must be disjoint")
    if not splits["train"] or not all(0 < song < 10**9 for song in everything):
        raise UserError(f"{path}: no training songs, or invalid ids")
    return splits


def splits_for(folder):
    """The splits of a features folder or a run, or the kit's where it has none. extract.py copies
    those it used into the features folder, train.py into the run."""
    own = Path(folder) / "splits.json"
    return read_splits(own if own.exists() else HERE / "splits.json")


def fold_splits(fold, splits):
    """Splits of folds.json, no artist in two of them: test is fold `fold` of ten, val the next one,
    train the others; of the songs of these splits. Raises UserError."""
    content = read_json(HERE / "folds.json", "a file of folds", {"source": str, "folds": [[int]]})
    folds, songs, source = content["folds"], set(songs_of(splits)), content["source"]
    if not songs >= set(sum(folds, [])):
        folds = [[song for song in each if song in songs] for each in folds]
        source = f"{splits['source']}; {source}"
    val = (fold + 1) % len(folds)
    if not folds[fold] or not folds[val]:
        raise UserError(f"--fold {fold}: none of these songs is in fold {fold} or in fold {val}")
    train = [song for n, each in enumerate(folds) if n not in (fold, val) for song in each]
    return {"source": source, "train": train, "val": folds[val], "test": folds[fold]}


@functools.cache
def read_artists():
    """{song id: number of its artist}, facts about DEAM."""
    content = read_json(HERE / "artists.json", "a file of artists", {"artist": {int: int}})
    return {int(song): artist for song, artist in content["artist"].items()}


def songs_of(splits):
    return splits["train"] + splits["val"] + splits["test"]


def splits_digest(splits):
    return json_digest({name: splits[name] for name in SPLITS})


def download_deam():
    """The folder with DEAM's version 1, downloaded from Kaggle unless kagglehub has it already. An
    interrupted download is resumed. Raises UserError."""
    archive = None
    try:
        import kagglehub  # here, because only this needs it and it is slow to load

        archive = Path(kagglehub.cache.get_cached_archive_path(
            kagglehub.handle.parse_dataset_handle(KAGGLE)))
        with one_at_a_time(archive.parent):
            folder = Path(kagglehub.dataset_download(KAGGLE))
    except Exception as error:  # requests', kagglehub's own and the system's, in many versions
        raise UserError(explain_download(error, archive)) from None
    if not any(folder.iterdir()):
        raise UserError(f"DEAM is no longer in kagglehub's folder {folder}: delete {folder.name} "
                        "there and rerun to download it again")
    return folder


@contextlib.contextmanager
def one_at_a_time(folder):
    """Let no other process in meanwhile: two downloads to one file would destroy each other. A
    folder that may only be read is no reason to wait: nothing is downloaded there."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / ".lock", "ab"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def explain_download(error, archive):
    """One line on why a download failed and what to do. What is complete but not DEAM's archive is
    removed: kagglehub would go on with it."""
    reason = " ".join(str(error).split())[:150] or type(error).__name__
    if archive is None:  # kagglehub is not installed, or there is no home folder
        return f"cannot use kagglehub ({reason}): install it, or pass a folder of DEAM with --deam"
    from requests import RequestException  # kagglehub's, which has been loaded

    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM,
                                         errno.EROFS):
        return (f"cannot write DEAM to {archive.parent} ({error.strerror}): make room there and "
                "rerun, which resumes, or set KAGGLEHUB_CACHE to a folder on another disk that you "
                "may write to")
    if type(error).__name__ == "DataCorruptionError" or (
            archive.exists() and not isinstance(error, RequestException)):
        archive.unlink(missing_ok=True)
        return (f"what came from Kaggle is not DEAM's archive, or damaged ({reason}); it has been "
                "removed: rerun to download it again")
    return (f"cannot download DEAM from Kaggle ({reason}): check the network and rerun, which "
            f"resumes, or fetch kaggle.com/datasets/{KAGGLE.split('/versions')[0]} elsewhere, "
            "unpack it and pass the folder with --deam")


def files_below(root, most=100_000):
    """All files below a folder, links followed, each folder entered once."""
    files, entered = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:  # a link that leads back
            folders.clear()
            continue
        entered.add(real)
        files += [Path(folder) / name for name in names]
        if len(files) + len(entered) > most:
            raise UserError(f"more than {most} files below {root}: give a smaller folder; DEAM's "
                            "own has some 4000")
    return files


def corrected(annotations, swapped):
    """Annotations with valence and arousal exchanged for the [[lowest id, highest id], …]."""
    return {song: Labels(labels.arousal, labels.arousal_std, labels.valence, labels.valence_std)
            if any(low <= song <= high for low, high in swapped) else labels
            for song, labels in annotations.items()}


def labels_of(annotations, songs):
    """float64[N, 2]: valence and arousal of the songs, on the 1–9 scale."""
    labels = [[annotations[song].valence, annotations[song].arousal] for song in songs]
    return torch.tensor(labels, dtype=torch.float64).reshape(-1, 2)


def label_statistics(annotations, songs):
    """(mean, population σ) of valence and arousal, float64[2] each, over the songs."""
    labels = labels_of(annotations, songs)
    with Exact():
        mean, std = labels.mean(0), labels.std(0, correction=0)
    if not (std > 0).all():
        raise UserError("the labels of train and val are all the same: nothing can be learned")
    return mean, std


def quadrant(values, threshold=0.0):
    """Quadrant of values[..., 2] (numpy or torch): 0 HV/HA, 1 LV/HA, 2 LV/LA, 3 HV/LA, high from
    `threshold` on. z-scored labels are split at 0, those on the 1–9 scale at 5."""
    high_valence, high_arousal = values[..., 0] >= threshold, values[..., 1] >= threshold
    return 1 * (~high_valence & high_arousal) + 2 * (~high_valence & ~high_arousal) + 3 * (
        high_valence & ~high_arousal)


def find_deam(root):
    """(the folder, all files below it) of --deam. Raises UserError."""
    root = Path(download_deam() if str(root) == "kaggle" else root)
    if not root.is_dir():
        raise UserError(f"no folder {root}: give DEAM's with --deam PATH, or kaggle to download it")
    return root, files_below(root)


def audio_files(files):
    """{song id: path} of the audio among the files, named <song id>.mp3 (.wav, …). Raises UserError
    where a song has two."""
    audio = {}
    for path in sorted(files):
        if path.suffix.lower() in ENDINGS and re.fullmatch("[0-9]{1,9}", path.stem):
            song = int(path.stem)
            if song in audio:
                raise UserError(f"two files for song {song}: {audio[song]} and {path}; keep one")
            audio[song] = path
    return audio
