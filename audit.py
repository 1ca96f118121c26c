"""Are DEAM's labels swapped? And whose songs are in which split? Annotations only: no audio.

  python audit.py                     # DEAM from Kaggle
  python audit.py PATH                # a folder with DEAM's annotations in it
  python audit.py PATH --splits FILE  # other splits than the kit's

Compares the static labels with the means of the annotations over time, by range of ids. DEAM was
collected a year at a time, and an exchange of columns happens to a whole batch. Correlation cannot
tell which of the two files is exchanged; docs/results.md says what speaks for the static one. Then
counts the test songs whose artist is also in train or val: a model can have learned the artist's
sound.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P, -I leave it out

from kit.cli import Parser, execute, path, start


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

from common import DEAMHandler
from kit.cli import UserError
from kit.deam import HERE, read_artists, read_splits, songs_of
from kit.swapped import audit_labels


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


def overlap(splits, artists):
    """{"train": n, "val": n, "either": n}: test songs whose artist has a song in that split."""
    known = {name: {artists[song] for song in splits[name]} for name in ("train", "val")}
    known["either"] = known["train"] | known["val"]
    return {name: sum(artists[song] in known[name] for song in splits["test"]) for name in known}


def print_artists(splits):
    """How many test songs are by an artist in train or val, where all artists are known."""
    artists = read_artists()
    if splits["test"] and artists.keys() >= set(songs_of(splits)):
        shared = overlap(splits, artists)
        print(f"{splits['source'].rstrip('.')}: of {len(splits['test'])} test songs "
              f"{shared['train']} are by an artist who is also in train, {shared['val']} in val, "
              f"{shared['either']} in either")


def run(args):
    splits = read_splits(args.splits or HERE / "splits.json")
    deam = DEAMHandler(args.deam)
    rows = audit_labels(deam)
    if not rows:
        raise UserError(f"too few songs with dynamic annotations in {args.deam} to compare")
    print_audit(rows)
    print_artists(splits)
    print("next: python train.py --labels corrected trains on labels that are exchanged back")
    return 0


if __name__ == "__main__":
    execute(run, ARGS)
