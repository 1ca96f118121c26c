"""Make artists.json from DEAM's tables of songs, or compare it with them.

  python tests/artists.py metadata_2013.csv metadata_2014.csv metadata_2015.csv
"""

import csv
import re
import statistics
import sys
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kit.cli import UserError
from kit.deam import read_artists
from kit.files import shortened


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
            header, *rows = csv.reader(Path(table).read_text(errors="replace").splitlines())
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


if __name__ == "__main__":
    names, artists = artists_of(sys.argv[1:]), read_artists()
    songs, other = names.keys() & artists.keys(), otherwise_grouped(names, artists)
    print(f"artists.json: {len(songs)} songs, "
          + (f"{len(other)} grouped otherwise: {shortened(other)}" if other else "they agree"))
