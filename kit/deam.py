"""DEAM: annotations, splits, artists, labels, download."""

import contextlib
import errno
import fcntl
import functools
import os
import re
import statistics
from pathlib import Path
from typing import NamedTuple

import torch

from exact import Exact
from kit.cli import UserError
from kit.containers import ENDINGS
from kit.files import json_digest, read_json
from kit.tables import plain_number, read_spreadsheet

HERE = Path(__file__).resolve().parent.parent
DIMENSIONS = ("valence", "arousal")
QUADRANTS = ("HV/HA", "LV/HA", "LV/LA", "HV/LA")  # high or low valence, high or low arousal
MOODS = ("excited, happy", "tense, angry", "sad, tired", "calm, content")  # after Russell 1980
# version 1: a bare handle asks for the latest
KAGGLE = "imsparsh/deam-mediaeval-dataset-emotional-analysis-in-music/versions/1"
STATIC = "static_annotations_averaged_songs_1_2000.csv"
COLUMNS = ["song_id", "valence_mean", "valence_std", "arousal_mean", "arousal_std"]
SPLITS = {"train": [int], "val": [int], "test": [int]}


class Labels(NamedTuple):
    """A song's labels on DEAM's 1–9 scale: means over annotators, and their standard deviations
    (ddof 0)."""
    valence: float
    valence_std: float
    arousal: float
    arousal_std: float


def read_annotations(path):
    """Static annotations, {song id: Labels}. Other columns, stray spaces and what spreadsheets
    write (see read_spreadsheet) are fine; missing columns, gaps, NaN, labels outside 1–9 and double
    ids raise UserError."""
    header, rows = read_spreadsheet(path, "a table of labels", COLUMNS)
    places, songs = [header.index(name) for name in COLUMNS], {}
    fresh = "take the file from a fresh copy of DEAM"
    for line, row in rows:
        song, *cells = [row[place] for place in places]
        try:
            values = tuple(map(plain_number, cells))
            valid = (re.fullmatch("[0-9]{1,9}", song) and all(1 <= values[n] <= 9 for n in (0, 2))
                     and all(0 <= values[n] <= 8 for n in (1, 3)))
        except ValueError:
            valid = False
        if not valid:
            raise UserError(f"{path}, line {line}: not a song id, two labels from 1 to 9 and their "
                            f"standard deviations ({', '.join([song, *cells])}); {fresh}")
        if int(song) in songs:
            raise UserError(f"{path}, line {line}: song {song} appears twice; {fresh}")
        songs[int(song)] = Labels(*values)
    if not songs:
        raise UserError(f"{path}: no songs in it")
    return songs


def dynamic_means(path):
    """{song id: mean over time} of a dynamic annotations file, its values from -1 to 1; empty cells
    and NaN are skipped. Raises UserError for any other cell and for double ids."""
    header, rows = read_spreadsheet(path, "a table of labels", ["song_id"])
    place, means, songs = header.index("song_id"), {}, set()
    fresh = "take the file from a fresh copy of DEAM"
    for line, cells in rows:
        song = cells.pop(place)
        try:
            values = [plain_number(cell) for cell in cells if cell and cell.lower() != "nan"]
            valid = re.fullmatch(r"[0-9]{1,9}(\.0)?", song) and all(
                abs(value) <= 1 for value in values)
        except ValueError:
            valid = False
        if not valid:
            raise UserError(f"{path}, line {line}: not a song id and numbers from -1 to 1; {fresh}")
        number = int(float(song))
        if number in songs:
            raise UserError(f"{path}, line {line}: song {number} appears twice; {fresh}")
        songs.add(number)
        if values:
            means[number] = statistics.fmean(values)
    return means


def only_content(paths, read):
    """What read(path) gives for each of the paths. Raises UserError, naming two of them, unless
    it is the same for all."""
    first, *others = sorted(paths)
    content = read(first)
    for path in others:
        if read(path) != content:
            raise UserError(f"two tables of labels that differ: {first} and {path}; keep one")
    return content


def static_annotations(files, root):
    """read_annotations of DEAM's table among the files below `root`; copies of it with the same
    labels may lie beside it. Raises UserError where there is none, or two that differ."""
    tables = [path for path in files if path.name.replace(" ", "_") == STATIC]
    if not tables:
        raise UserError(f"no DEAM in {root}: {STATIC} is nowhere in it; unpack DEAM_Annotations "
                        "there")
    return only_content(tables, read_annotations)


def dynamic_annotations(files):
    """{"valence": path, "arousal": path} of the annotations over time, where they are among the
    files. Raises UserError where two files of one name differ."""
    found = {}
    for name in DIMENSIONS:
        tables = [path for path in files if path.name == f"{name}.csv"
                  and "dynamic" in path.parent.name]
        if len(tables) > 1:
            only_content(tables, dynamic_means)
        if tables:
            found[name] = min(tables)
    return found


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


def own_splits(folder):
    """The splits of a features folder or a run: its own, or the kit's. extract.py copies those it
    used into the features folder, train.py into the run."""
    own = Path(folder) / "splits.json"
    return read_splits(own if own.exists() else HERE / "splits.json")


def fold_splits(fold, own):
    """Splits of folds.json, no artist in two of them: test is fold `fold` of ten, val the next one,
    train the others; of the songs of `own`, the splits of a features folder. Raises UserError."""
    content = read_json(HERE / "folds.json", "a file of folds", {"source": str, "folds": [[int]]})
    folds, songs, source = content["folds"], set(songs_of(own)), content["source"]
    if not songs >= set(sum(folds, [])):
        folds = [[song for song in each if song in songs] for each in folds]
        source = f"{own['source']}; {source}"
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
    try:
        import kagglehub  # here, because only this needs it and it is slow to load

        archive = Path(kagglehub.cache.get_cached_archive_path(
            kagglehub.handle.parse_dataset_handle(KAGGLE)))
    except Exception as error:  # not installed, or no home folder
        raise UserError(f"cannot use kagglehub ({error}): install it, or pass a folder with DEAM "
                        "in it with --deam") from None
    try:
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
    from requests import RequestException  # kagglehub's, which has been loaded

    reason = " ".join(str(error).split())[:150] or type(error).__name__
    code = getattr(error, "errno", None)
    if code in (errno.ENOSPC, errno.EDQUOT):
        return (f"no space left for DEAM in {archive.parent}: free some and rerun, which resumes, "
                "or set KAGGLEHUB_CACHE to a folder on another disk")
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (f"cannot write DEAM to {archive.parent} ({error.strerror}): set KAGGLEHUB_CACHE to "
                "a folder that you may write to")
    if type(error).__name__ == "DataCorruptionError" or (
            not isinstance(error, RequestException) and archive.exists()):
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
    def exchanged(labels):
        return Labels(labels.arousal, labels.arousal_std, labels.valence, labels.valence_std)

    return {song: exchanged(labels) if any(low <= song <= high for low, high in swapped)
            else labels for song, labels in annotations.items()}


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
