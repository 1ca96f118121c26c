"""Extract wav2vec 2.0 hidden states of every DEAM song, once: audio → DEAM_feats/.

  python extract.py                                     # DEAM from Kaggle, WAV2VEC2_BASE, layer 10
  python extract.py --deam PATH --weights ALM/wav2vec2-base-audioset
  python extract.py --precision float32                 # the same bits on fewer machines
  torchrun --nproc-per-node 4 extract.py                # four GPUs share the songs and one folder

Rerun the same command to resume after an interruption: songs that are there are skipped.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P, -I leave it out

from kit.cli import Parser, execute, number, path, start


def parser():
    p = Parser(__doc__)
    p.share("--deam", default="kaggle", metavar="kaggle|PATH",
            help="kaggle downloads DEAM; PATH is a folder with DEAM in it, in any layout")
    p.share("--features", help="the folder that the features go to")
    p.add_argument("--weights", default="WAV2VEC2_BASE", metavar="NAME|FOLDER|FILE",
                   help="the backbone: a torchaudio bundle, a Hugging Face repository "
                        "owner/name[@revision] or a folder laid out like one, or a file of weights "
                        "of the base architecture")
    p.add_argument("--splits", type=path, metavar="FILE",
                   help="JSON with the song ids of train, val and test (default: the features "
                        "folder's, or the kit's)")
    p.add_argument("--layer", type=number(int, 0), default=10, metavar="N",
                   help="encoder layer whose states are kept; 0 is the encoder's input")
    p.share("--precision")
    p.add_argument("--store", choices=["float32", "float16"], default="float32",
                   help="type of the stored states")
    p.add_argument("--batch-size", type=number(int, 1, 1024), metavar="N",
                   help="clips of equal length computed together; decides no bit in exact "
                        "arithmetic (default: 8 there on a GPU, else 1)")
    p.add_argument("--songs", type=number(int, 1), nargs="+", metavar="ID",
                   help="only these songs (default: all of the splits)")
    p.share("--allow-missing", "--device")
    return p


if __name__ == "__main__":
    ARGS = start(parser(), "rerun the same command to resume")  # before torch is imported

import functools

import torch

from common import Backbone, DEAMHandler
from kit.audio import BadClip, read_clip
from kit.cli import Progress, UserError, torchrun
from kit.deam import read_splits, songs_of, splits_for
from kit.features import FeatureFolder, describe_features
from kit.files import prefetch, shortened
from kit.machine import Arithmetic, cores, environment, on_host
from kit.swapped import swapped_ranges


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


def decode(deam, backbone, folder, song):
    """(song, waveform, digest of its PCM, a remark or None), decoded, mixed to mono and resampled
    by kit/audio.py; None for a song that fails, which the folder notes."""
    try:
        return song, *read_clip(deam.audio[song], backbone.sample_rate)
    except BadClip as error:
        return folder.fail(song, f"{deam.audio[song]}: {error}")


def batches(clips, size):
    """Yield lists of `size` clips (of `decode`) of equal length. Fewer at the end, and where more
    than 32 clips, or `size`, would wait for others of their length: then the longest list."""
    waiting = {}
    for clip in filter(None, clips):
        samples = len(clip[1])
        waiting.setdefault(samples, []).append(clip)
        if len(waiting[samples]) == size:
            yield waiting.pop(samples)
        elif sum(map(len, waiting.values())) > max(32, size):
            yield waiting.pop(max(waiting, key=lambda samples: len(waiting[samples])))
    yield from waiting.values()


def compute(clips, backbone, size, store):
    """Yield (song, digest of its PCM, features[T, D] on the CPU, remark) for clips (of `decode`),
    computed in `batches`; features of type `store`, of which a GPU has less to copy."""
    computed = ((batch, hidden_states(batch, backbone).to(store)) for batch in batches(clips, size))
    for batch, states in on_host(computed):
        for (song, _, pcm, remark), features in zip(batch, states):
            yield song, pcm, features, remark


def hidden_states(batch, backbone):
    _, waveforms, _, _ = zip(*batch)
    return backbone.hidden_states(torch.stack(waveforms))


def run(args):
    rank, processes, *_ = torchrun()
    arithmetic = Arithmetic(args.precision, args.device)
    if arithmetic.device.type == "cuda":
        torch.set_num_threads(1)  # others would only spin, on the cores that decode
    deam = DEAMHandler(args.deam)
    splits = read_splits(args.splits) if args.splits else splits_for(args.features)
    ids = choose_songs(args, deam, splits)
    backbone = Backbone(args.weights)
    manifest = {**describe_features(deam, backbone, args.layer, args.precision, args.store),
                "swapped_labels": swapped_ranges(deam), "songs": {}, "source": backbone.source,
                "environment": environment(arithmetic.device)}
    folder = FeatureFolder(args.features, ids, manifest, rank)
    folder.begin(deam.annotations, splits, backbone.top_layers(args.layer))
    todo = folder.missing(ids[rank::processes])
    print(f"{len(ids)} songs, {len(todo)} to do; {backbone.source['name']} layer {args.layer} of "
          f"{backbone.params['encoder_num_layers']}; weights {backbone.digest[:16]}; "
          f"{args.precision} on {arithmetic.device.type}"
          + (f"; process {rank + 1} of {processes}" if processes > 1 else ""), flush=True)

    backbone.to(arithmetic, args.layer)
    clips = prefetch(functools.partial(decode, deam, backbone, folder), todo, min(cores(), 16))
    clips = Progress(clips, total=len(todo), desc="extract", unit="song",
                     disable=rank > 0 or not todo)
    features = compute(clips, backbone, args.batch_size or arithmetic.clips_together,
                       getattr(torch, args.store))
    # these threads wait most of the time, for the disk
    for _ in prefetch(lambda song: folder.write_song(*song), features, threads=12):
        pass
    complete = folder.finish()
    if not rank:
        print(splits["source"])
        print(f"next: python train.py --features {args.features} --finetune last1")
    return 0 if complete else 1


if __name__ == "__main__":
    execute(run, ARGS)
