"""Extract wav2vec 2.0 hidden states of every DEAM song, once: audio → DEAM_feats/.

  python extract.py                                     # DEAM from Kaggle, WAV2VEC2_BASE, layer 10
  python extract.py --deam PATH --weights ALM/wav2vec2-base-audioset
  python extract.py --precision float32                 # faster; the same bits on fewer machines
  torchrun --nproc-per-node 4 extract.py                # four GPUs share the songs and one folder
  python extract.py --check DEAM_feats                  # are the files those of the manifest?
  python extract.py --verify manifest.json --deam PATH  # does this machine get the same features?

Rerun the same command to resume after an interruption: verified songs are skipped.
"""

from cli import Parser, execute, number, path, start

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
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch

from audit import audit_labels
from cli import Progress, UserError
from common import (COLUMNS, ENTRY, SETTINGS, TOP_LAYERS, Arithmetic, Backbone, BadClip,
                    DEAMHandler, environment, manifest_digest, operations, own_splits,
                    read_features, read_manifest, read_splits, say_if_slow, songs_of)
from files import (DIGEST, Verdict, ahead, differences, file_digest, json_text, lock, read_json,
                   read_tensors, sha256, shortened, state_digest, table_text, tensor_digest,
                   write_file, write_json, write_tensors)
from weights import weights_name

RANK = int(os.environ.get("RANK", 0))  # torchrun's number of this process, and how many there are
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
CORES = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
WORKERS = min(CORES, 16)  # threads that decode ahead, and as many that write
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


class FeatureFolder:
    """DEAM_feats/ while it is filled: every song with a record of its own beside it, so that a kill
    costs at most the songs in flight and several processes can fill one folder; the manifest is
    all records together."""

    def __init__(self, root, ids, audio, manifest, beside, top_layers):
        """manifest: without songs. beside: {name: text} of the files that stand beside it."""
        self.root, self.ids, self.audio, self.manifest = root, ids, audio, manifest
        self.writing, path = deque(), root / "manifest.json"
        while RANK and not path.exists():  # the first process decides whether this folder will do
            time.sleep(0.2)
        if path.exists():
            self.join(read_manifest(path))
        self.lock = lock(root, f"extract-{RANK}", "the features folder")
        if RANK == 0:
            for name, text in beside.items():
                self.write(name, text)
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
        None."""
        path = self.root / "songs" / f"{song}.json"
        try:
            entry = read_json(path, "a song's record", RECORD)
        except UserError:  # none, or damaged: what is not known is extracted again
            return self.manifest["songs"].get(str(song))
        repaired = "failed" in entry and entry["audio"] != audio_digest(self.audio[song])
        return None if repaired else entry

    def missing(self, ids):
        """Those of the ids whose features are not there, or not as their records say."""
        store = self.manifest["settings"]["store"]

        def intact(song):
            entry = self.record(song) or {}
            return "features" in entry and damage(self.root, song, entry, store) is None
        known = [song for song in ids if (self.root / "songs" / f"{song}.pt").exists()]
        checked = Progress(ahead(intact, known), total=len(known), desc="check", unit="song",
                           disable=not known)
        done = {song for fine, song in zip(checked, known) if fine}  # checked first: the bar ends
        return [song for song in ids if song not in done]

    def write_behind(self, batch, states):
        """Write [(song, waveform, digest of its PCM), …] and their states [B, T, D] in other
        threads; wait where they fall behind."""
        for (song, _, pcm), features in zip(batch, states):
            self.writing.append(WRITERS.submit(self.write_song, song, pcm, features))
        while len(self.writing) > 2 * max(WORKERS, len(batch)):
            self.writing.popleft().result()

    def write_song(self, song, pcm, features):
        features = features.to(getattr(torch, self.manifest["settings"]["store"])).cpu().clone()
        if not features.isfinite().all():
            return self.fail(song, f"its features overflow {features.dtype}")
        write_tensors(self.root / "songs" / f"{song}.pt", features)
        write_json(self.root / "songs" / f"{song}.json", {
            "pcm": pcm, "features": tensor_digest(features), "frames": len(features)})

    def fail(self, song, reason):
        write_json(self.root / "songs" / f"{song}.json", {
            "failed": reason, "audio": audio_digest(self.audio[song])})

    def write_manifest(self):
        """The manifest of all songs that have a record; again, should one have come meanwhile."""
        while True:
            known = {**self.manifest["songs"]}
            for song in self.ids:
                known[str(song)] = self.record(song)
            songs = {song: known[song] for song in sorted(known, key=int)
                     if known[song] and "failed" not in known[song]}
            if songs == self.manifest["songs"] and (self.root / "manifest.json").exists():
                return
            self.manifest["songs"] = songs
            self.manifest["digest"] = manifest_digest(self.manifest)
            write_json(self.root / "manifest.json", self.manifest)

    def finish(self):
        """Wait for all writing, complete the manifest → {song: reason} of the failed songs. The
        first process waits until the others have dealt with their songs."""
        while self.writing:
            self.writing.popleft().result()
        while not RANK and not all(map(self.record, self.ids)):
            time.sleep(0.5)
        self.write_manifest()
        records = {song: self.record(song) or {} for song in self.ids}
        return {song: entry["failed"] for song, entry in records.items() if "failed" in entry}


@functools.cache
def audio_digest(path):
    """sha256 of a file that failed: it is tried again when it is another one. None for no file."""
    try:
        return file_digest(path)
    except OSError:
        return None


WRITERS = ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,))


def equal_lengths(decoded, size, fail):
    """Group (song, waveform, digest of its PCM) by length, up to `size` together, in memory at most
    four times that. Bad clips, (song, None, reason), go to `fail`."""
    waiting = {}
    for song, waveform, note in decoded:
        if waveform is None:
            fail(song, note)
            continue
        same = waiting.setdefault(len(waveform), [])
        same.append((song, waveform, note))
        if len(same) == size:
            yield waiting.pop(len(waveform))
        elif sum(map(len, waiting.values())) > 4 * size:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()


def decoder(deam, sample_rate):
    def decode(song):
        try:
            return song, *deam.get_waveform(song, sample_rate)
        except BadClip as error:
            return song, None, f"{deam.audio[song]}: {error}"
    return decode


def damage(root, song, entry, store):
    """What is wrong with a song's feature file, given its entry; None where nothing is."""
    path = root / "songs" / f"{song}.pt"
    try:
        features = read_features(path, entry["features"])
    except UserError as error:
        return str(error)
    fine = features.dtype == getattr(torch, store) and len(features) == entry["frames"]
    return None if fine else f"{path}: not the type or the frames that the manifest says"


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
    songs, store = manifest["songs"], manifest["settings"]["store"]
    found = ahead(lambda song: damage(root, song, songs[song], store), songs)
    bad = [line for line in Progress(found, total=len(songs), desc="check", unit="song") if line]
    count, bad = len(songs) - len(bad), bad + list(damage_beside(root, manifest))
    print("".join(f"{line}\n" for line in bad) + f"{root}: {count} of {len(songs)} songs are as "
          f"the manifest says; root digest {manifest['digest']}")
    return 1 if bad else 0


def verify(args):
    """Extract a few of a manifest's songs and compare their digests; the exit code of a verdict."""
    manifest = read_manifest(args.verify)
    settings, source = manifest["settings"], manifest["source"]
    unknown = [song for song in args.songs or [] if str(song) not in manifest["songs"]]
    if unknown or not manifest["songs"]:
        raise UserError(f"{args.verify} has no songs {shortened(unknown)}")
    deam = DEAMHandler(args.deam)
    there = [song for song in map(int, manifest["songs"]) if song in deam.audio]
    if not args.songs and not there:
        raise UserError(f"no audio of the manifest's songs in {args.deam}: give DEAM's with --deam")
    ids, seed = args.songs, random.SystemRandom().randrange(10**6)
    if not ids:
        ids = sorted(random.Random(seed).sample(there, min(args.sample, len(there))))
        print(f"{len(ids)} of the {len(there)} songs whose audio is here, drawn with seed {seed}; "
              f"for the same ones again: --songs {' '.join(map(str, ids))}")
    if missing := [song for song in ids if song not in deam.audio]:
        raise UserError(f"no audio of {shortened(missing)} in {args.deam}")
    arithmetic = Arithmetic(settings["precision"], args.device)
    backbone = Backbone(args.weights or weights_name(source))
    verdict = Verdict(args.verify)
    verdict.compare("weights", settings["weights"], backbone.digest)
    verdict.compare("sample rate and z-score", [settings["sample_rate"],
                    settings["normalize_epsilon"]], [backbone.sample_rate, backbone.epsilon])
    verdict.compare("names", [sorted(SETTINGS), *[sorted(ENTRY)] * len(manifest["songs"])],
                    [sorted(settings), *map(sorted, manifest["songs"].values())])
    verdict.compare("songs without a label", [], [
        song for song in manifest["songs"] if int(song) not in deam.annotations])
    verdict.compare("annotations", manifest["annotations"],
                    sha256(labels_table(deam.annotations).encode()))
    verdict.compare("top layers", manifest["top_layers"],
                    state_digest(backbone.top_layers(settings["layer"])["state"]))
    if len(deam.dynamic) == 2:
        verdict.compare("swapped labels", manifest["swapped_labels"], swapped_ranges(deam))
    backbone.to(arithmetic, settings["layer"])
    decode = decoder(deam, backbone.sample_rate)
    for song in Progress(ids, desc="verify", unit="song"):
        expected, (_, waveform, pcm) = manifest["songs"][str(song)], decode(song)
        found = {"pcm": pcm, "features": "none", "frames": 0}
        if waveform is not None:
            features = backbone.hidden_states(waveform[None])[0]
            features = features.to(getattr(torch, settings["store"])).cpu()
            found |= {"features": tensor_digest(features), "frames": len(features)}
        for key in ENTRY:
            verdict.compare(f"song {song}: {key}", expected[key], found[key])
    return verdict.finish(f"PCM and features of {len(ids)} of {len(manifest['songs'])} songs, "
                          f"{settings['precision']}")


def run(args):
    if args.check:
        return check(args.check)
    if args.verify:
        return verify(args)
    arithmetic = Arithmetic(args.precision, args.device)
    on_gpu = arithmetic.device.type == "cuda"
    if on_gpu:  # torch's other threads would only spin, on the cores that decode
        torch.set_num_threads(1)
    deam = DEAMHandler(args.deam)
    splits = read_splits(args.splits) if args.splits else own_splits(args.features)
    ids = choose_songs(args, deam, splits)
    swapped = swapped_ranges(deam)
    backbone = Backbone(args.weights or "WAV2VEC2_BASE")
    table, top_layers = labels_table(deam.annotations), backbone.top_layers(args.layer)
    settings = {"weights": backbone.digest, "layer": args.layer, "precision": args.precision,
                "store": args.store, "sample_rate": backbone.sample_rate,
                "normalize_epsilon": backbone.epsilon}
    manifest = {"settings": settings, "annotations": sha256(table.encode()),
                "top_layers": state_digest(top_layers["state"]), "swapped_labels": swapped,
                "songs": {}, "source": backbone.source,
                "environment": environment(arithmetic.device)}
    folder = FeatureFolder(args.features, ids, deam.audio, manifest, {
        "annotations.csv": table, "splits.json": json_text(splits)}, top_layers)
    todo = folder.missing(ids[RANK::PROCESSES])
    print(f"{len(ids)} songs, {len(todo)} to do; {backbone.source['name']} layer {args.layer} of "
          f"{backbone.params['encoder_num_layers']}; weights {backbone.digest[:16]}; "
          f"{args.precision} on {arithmetic.device.type}"
          + (f"; process {RANK + 1} of {PROCESSES}" if PROCESSES > 1 else ""), flush=True)
    say_if_slow(arithmetic, len(todo) * operations(backbone.params, args.layer))
    backbone.to(arithmetic, args.layer)
    decoded = Progress(ahead(decoder(deam, backbone.sample_rate), todo, WORKERS), total=len(todo),
                       desc="extract", unit="song", disable=RANK > 0 or not todo)
    for batch in equal_lengths(decoded, args.batch_size or (8 if on_gpu else 1), folder.fail):
        waveforms = torch.stack([waveform for _, waveform, _ in batch])
        folder.write_behind(batch, backbone.hidden_states(waveforms))
    failed = folder.finish()
    if RANK:
        return 0
    songs = folder.manifest["songs"].values()
    print(f"{args.features}: {len(songs)} songs, {sum(entry['frames'] for entry in songs)} frames; "
          f"root digest {folder.manifest['digest']}\n{splits['source']}")
    for reason in failed.values():
        print(f"failed: {reason}")
    return 1 if failed else 0


def swapped_ranges(deam):
    """[[lowest, highest id], …] whose valence and arousal the audit finds swapped; None where there
    is nothing to compare with."""
    try:
        rows = audit_labels(deam)
    except UserError as error:
        print(f"the labels cannot be audited ({error}); --labels corrected will not be possible")
        return None
    if all(row["swapped"] is None for row in rows):
        print("the data do not tell whether labels are swapped; --labels corrected will not be "
              "possible")
        return None
    return [[row["low"], row["high"]] for row in rows if row["swapped"]]


if __name__ == "__main__":
    execute(run, ARGS)
