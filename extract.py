"""Extract wav2vec 2.0 hidden states of every DEAM song, once: audio → DEAM_feats/.

  python extract.py                                     # DEAM from Kaggle, WAV2VEC2_BASE, layer 10
  python extract.py --deam PATH --weights ALM/wav2vec2-base-audioset
  python extract.py --precision float32                 # faster; the same bits on fewer machines
  torchrun --nproc-per-node 4 extract.py                # four GPUs share the songs and one folder
  python extract.py --check DEAM_feats                  # are the files those of the manifest?
  python extract.py --verify manifest.json --deam PATH  # does this machine get the same features?

Rerun the same command to resume after an interruption: verified songs are skipped.
"""

from kit.cli import Parser, execute, number, path, start

ADVICE = "rerun the same command to resume"


def parser():
    p = Parser(__doc__)
    p.share("--deam", default="kaggle", metavar="kaggle|PATH",
            help="kaggle downloads DEAM; PATH is a folder with DEAM in it, in any layout")
    p.share("--features", help="the folder that the features go to")
    p.add_argument("--weights", metavar="NAME|FOLDER|FILE",
                   help="the backbone: a torchaudio bundle, a Hugging Face repository "
                        "owner/name[@revision] or a folder laid out like one, or a file of weights "
                        "of the base architecture (default: WAV2VEC2_BASE; with --verify the "
                        "manifest's)")
    p.add_argument("--splits", type=path, metavar="FILE",
                   help="JSON with the song ids of train, val and test (default: the features "
                        "folder's, or the kit's)")
    p.add_argument("--layer", type=number(int, 0), default=10, metavar="N",
                   help="encoder layer whose states are kept; 0 is the encoder's input")
    p.share("--precision")
    p.add_argument("--store", choices=["float32", "float16"], default="float32",
                   help="type of the stored states")
    p.add_argument("--batch-size", type=number(int, 1, 1024), metavar="N",
                   help="clips of equal length computed together; decides no bit (default: 1 on a "
                        "CPU, 8 on a GPU)")
    p.add_argument("--songs", type=number(int, 1), nargs="+", metavar="ID",
                   help="only these songs (default: all of the splits)")
    p.share("--allow-missing")
    p.add_argument("--check", type=path, metavar="FOLDER",
                   help="only compare the feature files in FOLDER with its manifest")
    p.add_argument("--verify", type=path, metavar="MANIFEST",
                   help="only extract a few of its songs and compare the digests")
    p.add_argument("--sample", type=number(int, 1), default=5, metavar="N",
                   help="with --verify: how many songs, drawn at random")
    p.share("--device")
    return p


if __name__ == "__main__":
    ARGS = start(parser(), ADVICE)  # before torch is imported

import functools
import os
import random
import time

import torch

from common import TOP_LAYERS, Backbone, DEAMHandler
from kit.audio import BadClip
from kit.cli import Progress, UserError
from kit.deam import COLUMNS, own_splits, read_splits, songs_of
from kit.files import (ahead, file_digest, json_text, lock, read_json, read_tensors, sha256,
                       shortened, state_digest, table_text, tensor_digest, write_file, write_json,
                       write_tensors)
from kit.machine import Arithmetic, environment
from kit.records import ENTRY, SETTINGS, manifest_digest, read_features, read_manifest
from kit.schema import DIGEST
from kit.swapped import audit_labels
from kit.verdict import Verdict, differences
from kit.weights import weights_name

RANK = int(os.environ.get("RANK", 0))  # torchrun's number of this process, and how many there are
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
CORES = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
DECODERS = min(CORES, 16)  # threads that decode ahead
RECORD = (ENTRY, {"failed": str, "audio": (None, DIGEST)})


def choose_songs(args, deam, splits):
    """The ids to extract, ascending. Raises UserError for songs without label or audio."""
    ids = sorted(set(args.songs or songs_of(splits)))
    if unlabelled := [song for song in ids if song not in deam.annotations]:
        raise UserError(f"{len(unlabelled)} of {len(ids)} songs have no label in these "
                        f"annotations: {shortened(unlabelled)}")
    missing = [song for song in ids if song not in deam.audio]
    if missing and not args.allow_missing or len(missing) == len(ids):
        raise UserError(f"{len(missing)} of {len(ids)} songs have no audio: {shortened(missing)}; "
                        "complete DEAM's folder, or add --allow-missing to work on the songs that "
                        "are there")
    return [song for song in ids if song in deam.audio]


def labels_table(annotations):
    """The text of annotations.csv: the same bytes for the same labels, whatever DEAM's own file."""
    return table_text(COLUMNS, [[song, *values] for song, values in annotations.items()])


def manifest_of(deam, backbone, layer, precision, store):
    """How features are made: a manifest but for its songs and which labels are swapped."""
    settings = {"weights": backbone.digest, "layer": layer, "precision": precision, "store": store,
                "sample_rate": backbone.sample_rate, "normalize_epsilon": backbone.epsilon}
    return {"settings": settings, "annotations": sha256(labels_table(deam.annotations).encode()),
            "top_layers": state_digest(backbone.top_layers(layer)["state"])}


def swapped_ranges(deam):
    """[[lowest, highest id], …] whose valence and arousal the audit finds swapped; None where there
    is nothing to compare with."""
    try:
        rows = audit_labels(deam)
        if all(row["swapped"] is None for row in rows):
            raise UserError("the data do not tell whether they are swapped")
    except UserError as error:
        print(f"the labels cannot be audited ({error}); --labels corrected will not be possible")
        return None
    for row in rows:
        if row["swapped"] is None:
            print(f"ids {row['low']}–{row['high']}: the data do not tell whether their labels are "
                  "swapped; --labels corrected will leave them as they are")
    return [[row["low"], row["high"]] for row in rows if row["swapped"]]


class FeatureFolder:
    """DEAM_feats/ while it is filled: every song with a record of its own beside it, so that a kill
    costs at most the songs in flight and several processes can fill one folder; the manifest is
    all records together."""

    def __init__(self, root, ids, deam, splits, top_layers, manifest):
        """manifest: without songs."""
        self.root, self.ids, self.deam, self.manifest = root, ids, deam, manifest
        self.settings, path = manifest["settings"], root / "manifest.json"
        while RANK and not path.exists():  # the first process decides whether this folder will do
            time.sleep(0.2)
        if path.exists():
            self.join(read_manifest(path))
        self.lock = lock(root, f"extract-{RANK}", "the features folder")
        if RANK == 0:
            self.write("annotations.csv", labels_table(deam.annotations))
            self.write("splits.json", json_text(splits))
            if not path.exists() or not (root / "top_layers.pt").exists():
                write_tensors(root / "top_layers.pt", top_layers)
            self.write_manifest()

    def join(self, there):
        """Go on with the folder's manifest. Raises UserError where it was made otherwise."""
        then, now = ({**manifest["settings"], **{key: manifest[key] for key in (
            "annotations", "swapped_labels")}} for manifest in (there, self.manifest))
        if differing := differences(then, now):
            raise UserError(f"{self.root} holds features made otherwise ({differing}): choose "
                            "another --features")
        self.manifest |= {key: there[key] for key in ("songs", "digest")}

    def write(self, name, text):
        """Write a file, unless it is there as it should be: the folder may be for reading only."""
        path = self.root / name
        if not path.exists() or path.read_bytes() != text.encode():
            write_file(path, text)

    def record(self, song):
        """What is known of a song: its entry; {"failed": reason, …} for its file as it is now; or
        {}."""
        path = self.root / "songs" / f"{song}.json"
        try:
            record = read_json(path, "a song's record", RECORD)
        except UserError:  # none, or damaged
            return self.manifest["songs"].get(str(song), {})
        repaired = "failed" in record and record["audio"] != audio_digest(self.deam.audio[song])
        return {} if repaired else record

    def missing(self, ids):
        """Those of the ids whose features are not there, or not as their records say."""
        records = {song: self.record(song) for song in ids}
        known = {song: record for song, record in records.items() if "features" in record}
        damages = find_damage(self.root, known, self.settings["store"])
        return [song for song in ids if song not in known or damages[song]]

    def decode(self, song):
        """(song, waveform, digest of its PCM); None for a song that fails."""
        try:
            return song, *self.deam.get_waveform(song, self.settings["sample_rate"])
        except BadClip as error:
            return self.fail(song, f"{self.deam.audio[song]}: {error}")

    def write_song(self, clip):
        """clip: (song, digest of its PCM, features[T, D])."""
        song, pcm, features = clip
        features = features.to(getattr(torch, self.settings["store"])).cpu().clone()
        if not features.isfinite().all():
            return self.fail(song, f"NaN or infinity in its features, as {features.dtype}")
        write_tensors(self.root / "songs" / f"{song}.pt", features)
        write_json(self.root / "songs" / f"{song}.json", {
            "pcm": pcm, "features": tensor_digest(features), "frames": len(features)})

    def fail(self, song, reason):
        write_json(self.root / "songs" / f"{song}.json", {
            "failed": reason, "audio": audio_digest(self.deam.audio[song])})

    def write_manifest(self):
        """The manifest of all songs that have features; again, should one have come meanwhile."""
        while True:
            records = self.manifest["songs"] | {str(song): self.record(song) for song in self.ids}
            songs = {song: records[song] for song in sorted(records, key=int)
                     if "features" in records[song]}
            if songs == self.manifest["songs"] and (self.root / "manifest.json").exists():
                return
            self.manifest["songs"] = songs
            self.manifest["digest"] = manifest_digest(self.manifest)
            write_json(self.root / "manifest.json", self.manifest)

    def finish(self):
        """Complete the manifest → the reasons of the songs that failed. The first process waits
        until the others have dealt with their songs."""
        while not RANK and not all(map(self.record, self.ids)):
            time.sleep(0.5)
        self.write_manifest()
        records = map(self.record, self.ids)
        return [record["failed"] for record in records if "failed" in record]


@functools.cache
def audio_digest(path):
    """sha256 of a file that failed, None without one: a record of failure counts for that file."""
    try:
        return file_digest(path)
    except OSError:
        return None


def equal_lengths(clips, size):
    """Group clips (song, waveform, digest of its PCM) by length, up to `size` together, in memory
    at most four times that; None is left out."""
    waiting = {}
    for clip in filter(None, clips):
        length = len(clip[1])
        same = waiting.setdefault(length, [])
        same.append(clip)
        if len(same) == size:
            yield waiting.pop(length)
        elif sum(map(len, waiting.values())) > 4 * size:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()


def computed(clips, backbone, size):
    """Yield (song, digest of its PCM, features[T, D]) for clips (song, waveform, digest)."""
    for batch in equal_lengths(clips, size):
        songs, waveforms, pcms = zip(*batch)
        yield from zip(songs, pcms, backbone.hidden_states(torch.stack(waveforms)))


def find_damage(root, entries, store):
    """{song: what is wrong with its feature file, None where nothing is}, given {song: entry}."""

    def damage(song):
        path, entry = root / "songs" / f"{song}.pt", entries[song]
        try:
            features = read_features(path, entry["features"])
        except UserError as error:
            return str(error)
        fine = features.dtype == getattr(torch, store) and len(features) == entry["frames"]
        return None if fine else f"{path}: not the type or the frames that the manifest says"

    bar = Progress(ahead(damage, entries), total=len(entries), desc="check", unit="song",
                   disable=not entries)
    return dict(zip(entries, list(bar)))


def damage_beside(root, manifest):
    """What is wrong with the files that stand beside a manifest: a line each."""
    table = root / "annotations.csv"
    if not table.is_file() or sha256(table.read_bytes()) != manifest["annotations"]:
        yield f"damaged or missing: {table}"
    try:
        top_layers = read_tensors(root / "top_layers.pt", "the backbone's top layers", TOP_LAYERS)
        if state_digest(top_layers["state"]) != manifest["top_layers"]:
            yield f"{root / 'top_layers.pt'} is not the one of the manifest"
        read_splits(root / "splits.json")
    except UserError as error:
        yield str(error)
    if not manifest["songs"]:
        yield f"{root} has no songs"


def check(root):
    """Print what in a features folder is not as its manifest says; 0 where all is, else 1."""
    manifest = read_manifest(root / "manifest.json")
    songs = manifest["songs"]
    found = find_damage(root, songs, manifest["settings"]["store"])
    bad = [line for line in found.values() if line]
    beside = list(damage_beside(root, manifest))
    print("".join(f"{line}\n" for line in bad + beside) + f"{root}: {len(songs) - len(bad)} of "
          f"{len(songs)} songs are as the manifest says; root digest {manifest['digest']}")
    return 1 if bad or beside else 0


def songs_to_verify(args, manifest, deam):
    """The ids of --songs, or --sample of those whose audio is there. Raises UserError."""
    ids = args.songs or list(map(int, manifest["songs"]))
    unknown = [song for song in ids if str(song) not in manifest["songs"]]
    if unknown or not ids:
        raise UserError(f"{args.verify} has no song {shortened(unknown) or 'at all'}")
    there = [song for song in ids if song in deam.audio]
    if not there or args.songs and len(there) < len(ids):
        missing = [song for song in ids if song not in there]
        raise UserError(f"no audio of songs {shortened(missing)} in {args.deam}: give DEAM's with "
                        "--deam")
    if args.songs:
        return ids
    seed = random.SystemRandom().randrange(10**6)
    ids = sorted(random.Random(seed).sample(there, min(args.sample, len(there))))
    print(f"{len(ids)} of the {len(there)} songs whose audio is here, drawn with seed {seed}; for "
          f"the same ones again: --songs {' '.join(map(str, ids))}")
    return ids


def verify(args):
    """Extract a few of a manifest's songs and compare their digests; the exit code of a verdict."""
    manifest, deam = read_manifest(args.verify), DEAMHandler(args.deam)
    settings, songs = manifest["settings"], manifest["songs"]
    ids = songs_to_verify(args, manifest, deam)
    arithmetic = Arithmetic(settings["precision"], args.device)
    backbone = Backbone(args.weights or weights_name(manifest["source"]))
    here = manifest_of(deam, backbone, settings["layer"], settings["precision"], settings["store"])
    verdict = Verdict(args.verify)
    verdict.compare_all(("weights", "sample_rate", "normalize_epsilon"), settings, here["settings"])
    verdict.compare("names", [sorted(SETTINGS), *[sorted(ENTRY)] * len(songs)],
                    [sorted(settings), *map(sorted, songs.values())])
    verdict.compare("songs without a label", [],
                    [song for song in songs if int(song) not in deam.annotations])
    verdict.compare_all(("annotations", "top_layers"), manifest, here)
    if len(deam.dynamic) == 2:
        verdict.compare("swapped labels", manifest["swapped_labels"], swapped_ranges(deam))
    backbone.to(arithmetic, settings["layer"])
    dtype = getattr(torch, settings["store"])
    for song in Progress(ids, desc="verify", unit="song"):
        try:
            waveform, pcm = deam.get_waveform(song, backbone.sample_rate)
            features = backbone.hidden_states(waveform[None])[0].to(dtype)
            found = {"pcm": pcm, "features": tensor_digest(features), "frames": len(features)}
        except BadClip as error:
            found = {"pcm": str(error), "features": "none", "frames": 0}
        for key in ENTRY:
            verdict.compare(f"song {song}: {key}", songs[str(song)][key], found[key])
    return verdict.finish(f"PCM and features of {len(ids)} of {len(songs)} songs, "
                          f"{settings['precision']}")


def extract(args):
    """Fill a features folder; 1 where songs failed, else 0."""
    arithmetic = Arithmetic(args.precision, args.device)
    on_gpu = arithmetic.device.type == "cuda"
    if on_gpu:  # torch's other threads would only spin, on the cores that decode
        torch.set_num_threads(1)
    deam = DEAMHandler(args.deam)
    splits = read_splits(args.splits) if args.splits else own_splits(args.features)
    ids, swapped = choose_songs(args, deam, splits), swapped_ranges(deam)
    backbone = Backbone(args.weights or "WAV2VEC2_BASE")
    manifest = {**manifest_of(deam, backbone, args.layer, args.precision, args.store),
                "swapped_labels": swapped, "songs": {}, "source": backbone.source,
                "environment": environment(arithmetic.device)}
    folder = FeatureFolder(args.features, ids, deam, splits, backbone.top_layers(args.layer),
                           manifest)
    todo = folder.missing(ids[RANK::PROCESSES])
    print(f"{len(ids)} songs, {len(todo)} to do; {backbone.source['name']} layer {args.layer} of "
          f"{backbone.params['encoder_num_layers']}; weights {backbone.digest[:16]}; "
          f"{args.precision} on {arithmetic.device.type}"
          + (f"; process {RANK + 1} of {PROCESSES}" if PROCESSES > 1 else ""), flush=True)
    backbone.to(arithmetic, args.layer)
    decoded = Progress(ahead(folder.decode, todo, DECODERS), total=len(todo), desc="extract",
                       unit="song", disable=RANK > 0 or not todo)
    features = computed(decoded, backbone, args.batch_size or (8 if on_gpu else 1))
    for _ in ahead(folder.write_song, features):
        pass
    failed = folder.finish()
    if RANK:
        return 0
    songs = folder.manifest["songs"].values()
    print(f"{args.features}: {len(songs)} songs, {sum(entry['frames'] for entry in songs)} frames; "
          f"root digest {folder.manifest['digest']}\n{splits['source']}")
    for reason in failed:
        print(f"failed: {reason}")
    return 1 if failed else 0


def run(args):
    if (args.check or args.verify) and PROCESSES > 1:
        raise UserError("--check and --verify are for one process: run them without torchrun")
    if args.check:
        return check(args.check)
    return verify(args) if args.verify else extract(args)


if __name__ == "__main__":
    execute(run, ARGS)
