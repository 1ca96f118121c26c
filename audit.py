"""Are DEAM's labels swapped? And whose songs are in which split? Annotations only: no audio.

  python audit.py                     # DEAM from Kaggle
  python audit.py PATH                # a folder with DEAM's annotations in it
  python audit.py PATH --splits FILE  # other splits than the kit's

Compares the static labels with the means of the annotations over time, by range of ids. DEAM was
collected a year at a time, and an exchange of columns happens to a whole batch. Then counts the
test songs whose artist is also in train or val: a model can have learned the artist's sound.
"""

from cli import Parser, execute, path, start

RANGES = ((1, 1000), (1001, 2000))  # the songs of 2013 and 2014


def parser():
    p = Parser(__doc__)
    p.add_argument("deam", nargs="?", default="kaggle", metavar="kaggle|PATH",
                   help="kaggle downloads DEAM; PATH is a folder with its annotations in it")
    p.add_argument("--splits", type=path, metavar="FILE",
                   help="whose artists to count: JSON with the ids of train, val and test "
                        "(default: the kit's)")
    return p


if __name__ == "__main__":
    ARGS = start(parser(), "rerun the same command")

import math
import re
import statistics
import unicodedata

import numpy as np

from cli import UserError
from common import HERE, DEAMHandler, read_artists, read_splits, songs_of
from files import read_table, shortened
from metrics import correlation


def dynamic_means(path):
    """{song id: mean over time} of a dynamic annotations file; empty cells and NaN are skipped.
    Raises UserError for any other cell that is not a finite number."""
    means = {}
    for line, row in enumerate(read_table(path, "a table of labels"), 1):
        song, *cells = [cell.strip() for cell in row] or [""]
        if line == 1 or not any([song, *cells]):
            continue
        try:
            values = [value for value in map(float, filter(None, cells)) if not math.isnan(value)]
            if not re.fullmatch(r"[0-9]{1,9}(\.0*)?", song) or not all(
                    abs(value) <= 1000 for value in values):
                raise ValueError
        except ValueError:
            raise UserError(f"{path}, line {line}: not a song id and finite numbers; take the file "
                            "from a fresh copy of DEAM") from None
        if values:
            means[int(float(song))] = statistics.fmean(values)
    return means


def audit_labels(deam):
    """Compare a DEAMHandler's static labels with the song means of its dynamic ones. One dict a
    range: low, high, songs, r (2×2: static valence, arousal × dynamic valence, arousal), evidence:
    mean correlation crosswise minus straight, its 99.9% bootstrap interval over songs, and
    swapped: True, False, or None where the interval holds 0. Raises UserError where there is
    nothing to compare with."""
    if len(deam.dynamic) < 2:
        raise UserError(f"no dynamic annotations in {deam.root} to compare with: unpack the whole "
                        "of DEAM_Annotations there")
    valence, arousal = (dynamic_means(deam.dynamic[name]) for name in ("valence", "arousal"))
    rows, generator = [], np.random.default_rng(0)
    for low, high in RANGES:
        values = np.array([[*labels[::2], valence[song], arousal[song]]
                           for song, labels in deam.annotations.items()
                           if low <= song <= high and song in valence and song in arousal])
        if len(values) < 10:
            continue
        drawn = generator.integers(0, len(values), (4000, len(values)))
        resampled = np.concatenate([evidence(correlations(values[some]))
                                    for some in np.array_split(drawn, 20)])
        interval = np.quantile(resampled, [0.0005, 0.9995])
        swapped = True if interval[0] > 0 else False if interval[1] < 0 else None
        r = correlations(values)
        rows.append({"low": low, "high": high, "songs": len(values), "r": r,
                     "evidence": float(evidence(r)), "interval": interval.tolist(),
                     "swapped": swapped})
    return rows


def correlations(values):
    """values[..., N, 4] (static valence, arousal, dynamic valence, arousal) → r[..., 2, 2]."""
    columns = np.swapaxes(values, -1, -2)
    return correlation(columns[..., :2, None, :], columns[..., None, 2:, :])


def evidence(r):
    """How much better the labels fit crosswise than straight, from r[..., 2, 2]."""
    return (r[..., 0, 1] + r[..., 1, 0] - r[..., 0, 0] - r[..., 1, 1]) / 2


def print_audit(rows):
    print("static labels against the song means of the dynamic ones: Pearson's r")
    print(f"{'ids':>12}{'songs':>7}{'val–val':>9}{'val–aro':>9}{'aro–aro':>9}{'aro–val':>9}"
          "   crosswise minus straight, 99.9% interval")
    for row in rows:
        (vv, va), (av, aa) = row["r"]
        low, high = row["interval"]
        print(f"{row['low']:>6}–{row['high']:<5}{row['songs']:>7}{vv:9.3f}{va:9.3f}{aa:9.3f}"
              f"{av:9.3f}   {row['evidence']:+.3f} [{low:+.3f}, {high:+.3f}]")
    said = {True: "valence and arousal are swapped", False: "the labels are right",
            None: "the data do not tell"}
    print("; ".join(f"ids {row['low']}–{row['high']}: {said[row['swapped']]}" for row in rows)
          + ".")


# ------------------------------------------------------------------------------------------ artists


def plain(name):
    """An artist's name without what varies: case, accents, punctuation, "the", featured guests."""
    name = unicodedata.normalize("NFKD", name).casefold().replace("&", " and ")
    name = re.sub(r"[\W_]+", " ", re.sub(r"[\u0300-\u036f'’]", "", name)).strip()
    return re.split(r" (?:feat|ft|featuring) ", name.removeprefix("the "))[0]


def artists_of(paths):
    """{song id: plain artist name} from DEAM's tables of songs. Headers are song_id and Artist in
    one, Id or id and Artist or artist in others, amid tabs and spaces; rows differ in length.
    Raises UserError for a table without them."""
    cells = {}
    for table in paths:
        try:
            header, *rows = read_table(table, "a table of songs", errors="replace")
            header = [re.sub(r"[\W_]", "", cell).lower() for cell in header]
            song = header.index("songid" if "songid" in header else "id")
            artist = header.index("artist")
            cells |= {int(row[song]): row[artist] for row in rows if any(map(str.strip, row))}
        except (ValueError, IndexError):
            raise UserError(f"{table} is not a table of songs, their ids and artists; take it from "
                            "a fresh copy of DEAM") from None
    names, whole = {}, {plain(cell) for cell in cells.values()}
    for number, cell in cells.items():
        # "Kevin MacLeod-Night on the Docks" holds a title; "M-PeX" and "Cooper-Moore" do not.
        start = re.split(r"(?<=\S)-", cell)[0].strip().removeprefix("The ")
        known = " " in start or plain(start) in whole
        names[number] = plain(start if known else cell) or cell.strip()
    return names


def otherwise_grouped(a, b):
    """Songs, ascending, that {song id: artist} `a` and `b` group otherwise; none if they agree."""
    songs, pairs = sorted(a.keys() & b.keys()), {}
    for song in songs:
        pairs.setdefault(("a", a[song]), []).append(b[song])
        pairs.setdefault(("b", b[song]), []).append(a[song])
    mostly = {artist: statistics.mode(others) for artist, others in pairs.items()}
    return [song for song in songs
            if mostly["a", a[song]] != b[song] or mostly["b", b[song]] != a[song]]


def overlap(splits, artists):
    """{"train": n, "val": n, "either": n}: test songs whose artist has a song there too."""
    heard = {name: {artists[song] for song in splits[name]} for name in ("train", "val")}
    heard["either"] = heard["train"] | heard["val"]
    return {name: sum(artists[song] in there for song in splits["test"])
            for name, there in heard.items()}


def print_artists(splits, tables):
    """The overlap of splits, where their artists are known; whether DEAM's own tables agree with
    artists.json, where they are there."""
    artists = read_artists()
    if splits["test"] and artists.keys() >= set(songs_of(splits)):
        shared = overlap(splits, artists)
        print(f"{splits['source'].rstrip('.')}: of {len(splits['test'])} test songs "
              f"{shared['train']} are by an artist who is also in train, {shared['val']} in val, "
              f"{shared['either']} in either")
    if tables:
        names = artists_of(tables)
        songs, other = names.keys() & artists.keys(), otherwise_grouped(names, artists)
        there = ", ".join(table.name for table in tables)
        print(f"artists.json against {there}: {len(songs)} songs, "
              + (f"{len(other)} grouped otherwise: {shortened(other)}" if other else "they agree"))


def run(args):
    splits = read_splits(args.splits or HERE / "splits.json")
    deam = DEAMHandler(args.deam)
    rows = audit_labels(deam)
    if not rows:
        raise UserError(f"too few songs with dynamic annotations in {args.deam} to compare")
    print_audit(rows)
    print_artists(splits, deam.metadata)
    return 0


if __name__ == "__main__":
    execute(run, ARGS)
