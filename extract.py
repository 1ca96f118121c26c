"""Extract wav2vec 2.0 hidden states of every DEAM song, once: audio → DEAM_feats/.

  python extract.py --deam demo                      # 60 synthetic songs: no network, no DEAM
  python extract.py                                  # DEAM from Kaggle, WAV2VEC2_BASE, layer 10
  python extract.py --deam PATH --weights pytorch_model.bin
  python extract.py --precision float64 --store float16    # the canonical setting: the same bits on any machine
  torchrun --nproc-per-node 4 extract.py             # four GPUs share the songs: one folder, the same features
  python extract.py --check DEAM_feats               # nothing but: are the files what the manifest says?
  python extract.py --deam PATH --audit-labels       # nothing but: are valence and arousal exchanged? (no audio needed)

Run the same command again to go on after an interruption: songs that the manifest vouches for are skipped.
"""

import json
import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from common import (COLUMNS, Backbone, BadClip, DEAMHandler, Parser, Progress, UserError, ahead, architecture,
                    arithmetic, differences, environment, make_demo, manifest_digest, number, pick_device,
                    read_manifest, read_splits, read_tensors, run_script, set_determinism, sha256, shortened,
                    tensor_digest, write_file, write_json, write_tensors)

CORES = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # torchrun: for each process


def parser():
    p = Parser(__doc__, threads=CORES)
    p.add_argument("--deam", default="kaggle", metavar="kaggle|demo|PATH",
                   help="kaggle downloads DEAM; demo makes 60 synthetic songs beside the features; PATH is a folder "
                        "with DEAM in it")
    p.add_argument("--features", type=Path, default=Path("DEAM_feats"), metavar="FOLDER", help="where the features go")
    p.add_argument("--bundle", metavar="NAME",
                   help="torchaudio wav2vec2 or HuBERT bundle (default: WAV2VEC2_BASE; DEMO for --deam demo)")
    p.add_argument("--weights", type=Path, metavar="FILE",
                   help="Hugging Face wav2vec2 pytorch_model.bin or torchaudio state dict, instead of the bundle's "
                        "download")
    p.add_argument("--normalize", choices=["auto", "on", "off"], default="auto",
                   help="z-score each waveform; auto: as the bundle does, on for Hugging Face weights")
    p.add_argument("--layer", type=number(int, 0), default=10, metavar="N",
                   help="encoder layer whose states are kept; 0 is the encoder's input")
    p.add_argument("--precision", choices=["float32", "float64", "tf32", "bfloat16"], default="float32",
                   help="arithmetic; tf32 and bfloat16 are for a GPU")
    p.add_argument("--store", choices=["float32", "float16"], default="float32", help="type of the stored states")
    p.add_argument("--batch-size", type=number(int, 1), metavar="N",
                   help="clips of equal length computed together (default: 1 on a CPU, 8 on a GPU)")
    p.add_argument("--workers", type=number(int, 1), default=min(CORES, 16), metavar="N",
                   help="threads that decode ahead, and as many that write")
    p.add_argument("--limit", type=number(int, 1), metavar="N",
                   help="only the N songs with the lowest ids (default: all)")
    p.add_argument("--songs", type=int, nargs="+", metavar="ID", help="only these songs (default: all of the splits)")
    p.add_argument("--allow-missing", action="store_true", help="work on the songs whose audio is there")
    p.add_argument("--audit-labels", action="store_true",
                   help="only compare the static labels with the dynamic annotations")
    p.add_argument("--check", type=Path, metavar="FOLDER",
                   help="only check the feature files in FOLDER against its manifest")
    return p


# DEAM was collected a year at a time; an exchange of columns happens to a whole batch.
AUDITED = ((1, 1000), (1001, 2000))


def dynamic_means(path):
    """{song id: mean over time} of a dynamic annotations file; empty cells and NaN are skipped."""
    means = {}
    for row in Path(path).read_text(encoding="utf-8-sig").splitlines()[1:]:
        song, *cells = row.rstrip(" ,").split(",")  # the columns are those of the longest song
        values = [value for value in map(float, filter(str.strip, cells)) if value == value]
        if values:
            means[int(float(song))] = sum(values) / len(values)
    return means


def audit_labels(annotations, dynamic):
    """Compare static labels with the song means of the dynamic ones, by range of ids.

    annotations: {song id: label strings}; dynamic: {"valence": {song id: mean}, "arousal": …}. One dict a range:
    low, high, songs, r (2×2: static valence, arousal × dynamic valence, arousal), evidence: mean correlation crosswise
    minus straight, its 99.9 % bootstrap interval over songs, and swapped: True, False or None where that holds 0.
    """
    rows, generator = [], np.random.default_rng(0)
    for low, high in AUDITED:
        ids = [song for song in annotations if low <= song <= high and all(song in means for means in dynamic.values())]
        if len(ids) < 10:
            continue
        values = np.array([[float(annotations[song][0]), float(annotations[song][2]),
                            dynamic["valence"][song], dynamic["arousal"][song]] for song in ids])
        values -= values.mean(0)
        products = (values[:, :, None] * values[:, None, :]).reshape(len(ids), 16)

        def correlations(counts):
            """How often each song was drawn [..., N] → r [..., 2, 2] over the songs drawn."""
            mean, square = counts @ values / len(ids), (counts @ products / len(ids)).reshape(*counts.shape[:-1], 4, 4)
            covariance = square - mean[..., :, None] * mean[..., None, :]
            deviation = np.sqrt(np.maximum(np.diagonal(covariance, axis1=-2, axis2=-1), 1e-24))
            return covariance[..., :2, 2:] / (deviation[..., :2, None] * deviation[..., None, 2:])

        def evidence(r):
            return (r[..., 0, 1] + r[..., 1, 0] - r[..., 0, 0] - r[..., 1, 1]) / 2

        drawn = generator.integers(0, len(ids), (4000, len(ids)))
        resampled = evidence(correlations(np.stack([np.bincount(songs, minlength=len(ids)) for songs in drawn])))
        interval, r = np.quantile(resampled, [0.0005, 0.9995]), correlations(np.ones(len(ids)))
        swapped = True if interval[0] > 0 else False if interval[1] < 0 else None
        rows.append({"low": low, "high": high, "songs": len(ids), "r": r, "evidence": float(evidence(r)),
                     "interval": interval.tolist(), "swapped": swapped})
    return rows


def print_audit(rows):
    print("static label against the song mean of the dynamic one: Pearson's r")
    print(f"{'ids':>12}{'songs':>7}{'val–val':>9}{'val–aro':>9}{'aro–aro':>9}{'aro–val':>9}   crosswise minus "
          "straight, 99.9 % interval")
    for row in rows:
        (vv, va), (av, aa) = row["r"]
        print(f"{row['low']:>6}–{row['high']:<5}{row['songs']:>7}{vv:9.3f}{va:9.3f}{aa:9.3f}{av:9.3f}   "
              f"{row['evidence']:+.3f} [{row['interval'][0]:+.3f}, {row['interval'][1]:+.3f}]")
    said = {True: "valence and arousal are exchanged", False: "the labels are right", None: "the data do not tell"}
    print("; ".join(f"ids {row['low']}–{row['high']}: {said[row['swapped']]}" for row in rows) + ".")


def choose_songs(args, deam, splits):
    """The ids to extract, ascending. Raises UserError for songs without label or audio."""
    ids = sorted(set(args.songs or sum(splits.values(), [])))
    if deam.demo and not args.songs:
        ids = [song for song in ids if song in deam.annotations]
    if unlabelled := [song for song in ids if song not in deam.annotations]:
        raise UserError(f"{len(unlabelled)} of {len(ids)} songs have no label in these annotations: "
                        f"{shortened(unlabelled)}")
    ids = ids[:args.limit]
    missing = [song for song in ids if song not in deam.audio]
    if missing and not args.allow_missing or len(missing) == len(ids):
        raise UserError(f"{len(missing)} of {len(ids)} songs have no audio: {shortened(missing)}; complete DEAM's "
                        "folder, or add --allow-missing to work on the songs that are there")
    return [song for song in ids if song in deam.audio]


def open_manifest(args, settings, **labels):
    """The manifest to fill: the one in the folder if it was made with the same settings, else a new one."""
    manifest = read_manifest(args.features)
    if manifest is None:
        return {**labels, "settings": settings, "songs": {}}
    now, then = {**labels, **settings}, {**{key: manifest[key] for key in labels}, **manifest["settings"]}
    if differing := differences(then, now):
        raise UserError(f"{args.features} holds features made otherwise ({differing}): choose another --features")
    return manifest


def vouched(root, manifest, ids):
    """The ids whose feature files are there and are what the manifest says."""
    known = [song for song in ids if str(song) in manifest["songs"]]

    def intact(song):
        try:
            features = read_tensors(root / "songs" / f"{song}.pt", "a feature file")
            return tensor_digest(features) == manifest["songs"][str(song)]["features"]
        except (UserError, AttributeError):
            return False

    results = Progress(ahead(intact, known), total=len(known), desc="check", unit="song", disable=not known)
    return {song for result, song in zip(results, known) if result}  # results first: so that the bar ends


def check(root):
    """Print what in a features folder is not what its manifest says; 0 where all is, else 1."""
    manifest = read_manifest(root)
    if manifest is None:
        raise UserError(f"no manifest in {root}: nothing to check its features against")
    ids = list(map(int, manifest["songs"]))
    bad = sorted(set(ids) - vouched(root, manifest, ids))
    table = root / "annotations.csv"
    labels = table.is_file() and sha256(table.read_bytes()) == manifest["annotations"]
    for path in [root / "songs" / f"{song}.pt" for song in bad] + ([] if labels else [table]):
        print(f"damaged or missing: {path}")
    print(f"{root}: {len(ids) - len(bad)} of {len(ids)} songs are what the manifest says; root digest "
          f"{manifest['digest']}")
    return 1 if bad or not labels else 0


def companions():
    """(rank, N, a key-value store) of the N processes that torchrun started; (0, 1, None) without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1, None
    store, rank, count = next(torch.distributed.rendezvous("env://", timeout=timedelta(days=30)))
    return rank, count, store


def run(args):
    if args.check:
        return check(args.check)
    rank, count, companion = companions() if not args.audit_labels else (0, 1, None)
    if rank:  # the first process downloads, checks and decides; the others then take their share of the songs
        companion.wait(["todo"])
    device = pick_device(args.device)
    # beside a GPU one thread: torch's others would only spin, on the cores that decode
    set_determinism(args.threads if device.type == "cpu" else 1, args.precision)
    dtype, autocast = arithmetic(args.precision, device)
    batch_size = args.batch_size or (8 if device.type == "cuda" else 1)
    splits, root = read_splits(args.splits), args.deam
    if args.deam == "demo":
        root = args.features.parent / "DEAM_demo"
        make_demo(root, splits)
    deam = DEAMHandler(root)
    dynamic = {name: dynamic_means(path) for name, path in deam.dynamic.items()}
    audit = audit_labels(deam.annotations, dynamic) if len(dynamic) == 2 else None
    if args.audit_labels:
        if not audit:
            raise UserError(f"no dynamic annotations in {root} to compare with: unpack the whole of DEAM_Annotations "
                            "there")
        print_audit(audit)
        return 0
    swapped = [[row["low"], row["high"]] for row in audit if row["swapped"]] if audit is not None else None
    bundle = args.bundle or ("DEMO" if args.deam == "demo" else "WAV2VEC2_BASE")
    layers = architecture(bundle)[0]["encoder_num_layers"]
    if args.layer > layers:
        raise UserError(f"--layer {args.layer}: {bundle} has {layers} layers")
    ids = choose_songs(args, deam, splits)
    backbone = Backbone(bundle, args.weights, args.normalize)
    settings = {"bundle": bundle, "weights_sha256": backbone.digest, "layer": args.layer, "precision": args.precision,
                "store": args.store, "sample_rate": backbone.sample_rate, "normalize_epsilon": backbone.epsilon}
    table = [COLUMNS, *([str(song), *values] for song, values in deam.annotations.items())]
    table = "".join(",".join(row) + "\n" for row in table)
    manifest = open_manifest(args, settings, corpus="demo" if deam.demo else "DEAM",
                             annotations=sha256(table.encode()), swapped_labels=swapped)
    here = environment(device)  # now: the thread that saves has a thread count of its own

    def save_manifest(songs):
        """Write the manifest of `songs` and of what the companions have done; in them: tell the first process."""
        if rank:
            return companion.set(f"songs {rank}", json.dumps(songs))
        for other in range(1, count):
            if companion.check([f"songs {other}"]):
                songs |= json.loads(companion.get(f"songs {other}"))
        manifest["songs"] = {str(song): songs[str(song)] for song in sorted(map(int, songs))}
        manifest.update(digest=manifest_digest(manifest), weights_file=backbone.file, environment=here)
        write_json(args.features / "manifest.json", manifest)

    if rank:
        todo, songs = json.loads(companion.get("todo")), {}
    else:
        print(f"{len(ids)} songs; {bundle} layer {args.layer} of {layers}; weights {backbone.digest[:16]}; "
              f"{args.precision} on {device.type}" + (f", {count} processes" if count > 1 else ""), flush=True)
        done = vouched(args.features, manifest, ids)
        todo = [song for song in ids if song not in done]
        songs = {song: entry for song, entry in manifest["songs"].items() if int(song) not in todo}
        write_file(args.features / "annotations.csv", table)
        save_manifest(dict(songs))
        if count > 1:
            companion.set("todo", json.dumps(todo))
    todo = todo[rank::count]
    backbone.model.to(device, dtype)
    failed, waiting, writing = [], {}, deque()
    writers, saving, saved = ThreadPoolExecutor(args.workers, initializer=torch.set_num_threads, initargs=(1,)), None, 0

    def decode(song):
        """(song, waveform, digest of its PCM), or (song, None, what is wrong)."""
        try:
            return song, *deam.get_waveform(song, backbone.sample_rate, dtype)
        except BadClip as error:
            return song, None, f"{deam.audio[song]}: {error}"

    def store(song, pcm, states, place, copied):
        """In the background: write one song's features; its entry in the manifest, None where they overflow."""
        if copied:
            copied.synchronize()
        features = states[place].clone()  # a view would be saved with the whole batch
        if not np.isfinite(features.numpy()).all():
            return None
        write_tensors(args.features / "songs" / f"{song}.pt", features)
        return {"pcm": pcm, "features": tensor_digest(features), "frames": len(features)}

    def settle(most):
        """Enter what is written into the manifest, until at most `most` songs are still being written."""
        while len(writing) > most or writing and writing[0][1].done():
            song, future = writing.popleft()
            if entry := future.result():
                songs[str(song)] = entry
            else:
                failed.append(f"{deam.audio[song]}: its features overflow {args.store}")
            bar.update()

    def compute(clips):
        """clips: [(song, waveform, digest of its PCM)] of equal length."""
        with autocast():
            states = backbone.hidden_states(torch.stack([waveform for _, waveform, _ in clips]), args.layer)
        states, copied = states.to(getattr(torch, args.store)).to("cpu", non_blocking=True), None
        if device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        for place, (song, _, pcm) in enumerate(clips):
            writing.append((song, writers.submit(store, song, pcm, states, place, copied)))
        settle(2 * max(args.workers, batch_size))

    with Progress(total=len(todo), desc="extract", unit="song", disable=rank > 0) as bar:
        try:
            for song, waveform, note in ahead(decode, todo, args.workers):
                if waveform is None:
                    failed.append(note)
                    continue
                same = waiting.setdefault(len(waveform), [])
                same.append((song, waveform, note))
                if len(same) == batch_size:
                    compute(waiting.pop(len(waveform)))
                elif sum(map(len, waiting.values())) > 4 * batch_size:  # many lengths: bound the memory
                    compute(waiting.pop(next(iter(waiting))))
                if time.monotonic() - saved > 1 and (saving is None or saving.done()):  # as much as a kill can cost
                    if saving:
                        saving.result()
                    saving, saved = writers.submit(save_manifest, dict(songs)), time.monotonic()
            for same in waiting.values():
                compute(same)
            settle(0)
        finally:
            writers.shutdown(cancel_futures=True)
            save_manifest(dict(songs))
    if rank:
        companion.set(f"failed {rank}", json.dumps(failed))
        return 0
    for other in range(1, count):
        failed += json.loads(companion.get(f"failed {other}"))  # waits until it is there
    if count > 1:
        save_manifest(dict(songs))
    frames = sum(entry["frames"] for entry in manifest["songs"].values())
    print(f"{args.features}: {len(manifest['songs'])} songs, {frames} frames; root digest {manifest['digest']}")
    if deam.demo:
        print("These songs and labels are synthetic: results on them say nothing about DEAM.")
    for reason in failed:
        print(f"failed: {reason}")
    return 1 if failed else 0


def main():
    run_script(run, parser(), "the same command goes on where it stopped")


if __name__ == "__main__":
    main()
