"""Check a published record: is what it says true, on this machine, as far as the inputs allow?

  python verify.py last1.tar --deam PATH                  # seconds: do its numbers follow?
  python verify.py last1.tar --deam PATH --sample 5       # minutes: PCM and features of five songs
  python verify.py last1.tar --features DEAM_feats        # minutes: the first steps of training
  python verify.py last1.tar --features DEAM_feats --steps all    # hours: everything
  python verify.py --features DEAM_feats                  # are its files those of its manifest?
  python verify.py runs/last1 --deam PATH --pack last1.tar        # check a run, then pack it

RECORD is a run's folder, or the .tar that --pack made of one. Parts that the inputs do not allow
are named, with the option that would. The verdict over the others is REPRODUCED (exit code 0),
CLOSE (3) or NOT REPRODUCED (1).
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P, -I leave it out

from kit.cli import Parser, execute, number, path, start


def steps(text):
    return text if text == "all" else number(int, 1)(text)


def parser():
    p = Parser(__doc__)
    p.add_argument("record", type=path, nargs="?", metavar="RECORD",
                   help="folder that train.py wrote, evaluated, or a .tar of it")
    p.share("--deam", help="a folder with DEAM in it: its annotations allow to check the numbers, "
            "its audio PCM and features")
    p.add_argument("--weights", metavar="NAME|FOLDER|FILE",
                   help="the backbone (default: the one that the record names)")
    p.share("--features", default=None, help="a folder of features: allows to repeat training; "
            "without RECORD it is checked itself")
    p.add_argument("--sample", type=number(int, 1), default=5, metavar="N",
                   help="how many songs' PCM and features to compute, drawn at random")
    p.add_argument("--songs", type=number(int, 1), nargs="+", metavar="ID",
                   help="these songs instead of a sample")
    p.add_argument("--steps", type=steps, default=2, metavar="N|all",
                   help="how many steps of training to repeat, on to the next that has a digest")
    p.add_argument("--pack", type=path, metavar="FILE",
                   help="write what is to be published as a .tar, if the checks find it true")
    p.share("--device")
    return p


if __name__ == "__main__":
    ARGS = start(parser(), "nothing was written")  # before torch is imported

import random
from types import SimpleNamespace

import torch
from torch.utils.data import DataLoader

import eval as evaluation
import train
from common import Backbone, DEAMFeatHandler, DEAMHandler, load_model
from kit.audio import BadClip
from kit.cli import Progress, UserError
from kit.deam import (SPLITS, corrected, fold_splits, read_annotations, read_splits, songs_of,
                      splits_digest)
from kit.features import (ENTRY, SETTINGS, describe_features, find_damage, labels_table,
                          read_manifest)
from kit.files import (differences, plain_json, read_tensors, read_text, sha256, shortened,
                       state_digest, tensor_digest)
from kit.machine import Arithmetic
from kit.network import TOP_LAYERS
from kit.records import (DIGESTS, HISTORY, describe_run, digest_steps, files_to_pack, flat_config,
                         open_record, pack, predictions_table, read_config, read_digests,
                         read_history, read_metrics, read_run)
from kit.swapped import swapped_ranges
from kit.training import chosen_options
from kit.verdict import Verdict, compare_numbers, compare_predictions
from kit.weights import weights_name


class Record:
    """A run as published: its files, read, and each found to be of the schema that it has."""

    def __init__(self, folder):
        self.folder, self.content = folder, read_config(folder)
        self.model, self.splits = read_run(folder)
        self.manifest = read_manifest(folder / "manifest.json")
        self.history, self.digests = read_history(folder), read_digests(folder)
        self.metrics = {file.parent: read_metrics(file)
                        for file in sorted(folder.glob("eval-*/metrics.json"))}
        self.config = flat_config(self.content["config"])
        self.options = self.read_options(folder / "config.json")
        self.exact = self.options.precision == "exact"

    def read_options(self, file):
        """The options of the run as train.py's parser gives them. Raises UserError where they are
        not what train.py writes."""
        options = self.content["config"]["options"]
        read = train.parser().read(options, file)
        if differing := differences(options, chosen_options(read, read.device)):
            raise UserError(f"{file} holds options that train.py does not write ({differing})")
        return read


# -------------------------------------------------------- 1: the record's files are of one run


def check_files(verdict, record):
    """Whether the files fit together: digests, settings, the tables' lines, rates and losses."""
    verdict.begin("files of one run")
    manifest, options = record.manifest, record.options
    verdict.compare("manifest.json", record.config["features"], manifest["digest"])
    verdict.compare("settings of the features", record.content["features_settings"],
                    manifest["settings"])
    verdict.compare("backbone", record.model["backbone"], manifest["source"])
    verdict.compare("settings of model.pt", record.model["settings"], manifest["settings"])
    verdict.compare("architecture of model.pt", plain_json(record.model["params"]),
                    manifest["params"])
    verdict.compare("names in the manifest", [sorted(SETTINGS), *[sorted(ENTRY)] * len(
        manifest["songs"])], [sorted(manifest["settings"]), *map(sorted,
                                                                 manifest["songs"].values())])
    length = record.config["songs"]["train"] // options.batch_size  # steps an epoch
    lines = digest_steps(length, options.epochs)
    verdict.compare("lines of digests.csv", [row[:2] for row in record.digests],
                    list(map(list, lines)))
    verdict.compare("lines of history.csv", [row[0] for row in record.history],
                    list(range(1, options.epochs + 1)))
    ends = record.digests[len(lines) - options.epochs:]
    for (epoch, rate, loss, *_), (_, step, digested, _) in zip(record.history, ends):
        verdict.compare(f"epoch {epoch}: lr", rate,
                        train.learning_rate(step - 1, length * options.epochs, options))
        verdict.compare(f"epoch {epoch}: loss in both files", loss, digested)
    losses = [row[5] for row in record.history]
    chosen = losses.index(min(losses)) if options.select == "best" else options.epochs - 1
    verdict.compare("model in digests.csv", [record.model["digest"]],
                    [row[3] for row in ends[chosen:chosen + 1]])
    if options.fold is not None:
        verdict.compare_all(SPLITS, fold_splits(options.fold, record.splits), record.splits)
    for folder, metrics in record.metrics.items():
        check_evaluation(verdict, record, folder, metrics)
    verdict.end()


def check_evaluation(verdict, record, folder, metrics):
    """Whether a metrics.json is about this run."""
    config, manifest = record.config, record.manifest
    expected = {"model": record.model["digest"], "initial_model": record.model["initial_model"],
                "source": record.splits["source"], "trained_on_labels": config["labels"],
                "features": manifest["digest"], "swapped_labels": manifest["swapped_labels"],
                "finetune": config["finetune"], "precision": config["precision"],
                "splits": splits_digest(record.splits)}
    suffix = "" if metrics["labels"] == config["labels"] else f"-{metrics['labels']}"
    verdict.compare(f"{folder.name}: split and labels", folder.name,
                    f"eval-{metrics['split']}{suffix}")
    for key, value in expected.items():
        verdict.compare(f"{folder.name}: {key.replace('_', ' ')}", value, metrics[key])


# ---------------------------------------- 2: numbers follow from the predictions and DEAM's labels


def check_numbers(verdict, record, annotations):
    """Every published number from the published predictions and these annotations."""
    manifest = record.manifest
    verdict.begin("numbers, from predictions and labels")
    verdict.compare("annotations", manifest["annotations"],
                    sha256(labels_table(annotations).encode()))
    unlabelled = [song for song in songs_of(record.splits) if song not in annotations]
    verdict.compare("songs without a label", [], unlabelled)
    for folder, metrics in record.metrics.items():
        labels = annotations
        if metrics["labels"] == "corrected":
            labels = corrected(annotations, metrics["swapped_labels"] or [])
        if not unlabelled:
            compare_numbers(verdict, metrics, labels, record.splits)
        if set(metrics["predictions"]) <= set(map(str, labels)):
            verdict.compare(f"{folder.name}: predictions.csv",
                            predictions_table(metrics["predictions"], labels).splitlines(),
                            read_text(folder / "predictions.csv", "a table").splitlines())
    verdict.end()


# ------------------------------------------------------------- 3: PCM and features of some songs


def choose_songs(args, record, deam):
    """The ids of --songs, or --sample of those whose audio is there. Raises UserError."""
    songs = list(map(int, record.manifest["songs"]))
    if unknown := [song for song in args.songs or [] if song not in songs]:
        raise UserError(f"the record has no song {shortened(unknown)}")
    if missing := [song for song in args.songs or [] if song not in deam.audio]:
        raise UserError(f"no audio of songs {shortened(missing)} in {args.deam}")
    if args.songs:
        return args.songs
    with_audio = [song for song in songs if song in deam.audio]
    seed = random.SystemRandom().randrange(10**6)
    ids = sorted(random.Random(seed).sample(with_audio, min(args.sample, len(with_audio))))
    print(f"  {len(ids)} of the {len(with_audio)} songs whose audio is here; for the same ones "
          f"again: --songs {' '.join(map(str, ids))}")
    return ids


def check_features(verdict, record, args, deam, backbone):
    """The settings of extraction, and PCM and features of some songs."""
    ids, settings, songs = (choose_songs(args, record, deam), record.manifest["settings"],
                            record.manifest["songs"])
    verdict.begin(f"PCM and features of {len(ids)} of {len(songs)} songs")
    actual = describe_features(deam, backbone, *(settings[key] for key in (
        "layer", "precision", "store")))
    verdict.compare_all(SETTINGS, settings, actual["settings"])
    verdict.compare_all(("params", "annotations", "top_layers"), record.manifest, actual)
    if len(deam.dynamic) == 2:
        verdict.compare("swapped labels", record.manifest["swapped_labels"], swapped_ranges(deam))
    backbone.to(Arithmetic(settings["precision"], args.device), settings["layer"])
    for song in Progress(ids, desc="features", unit="song"):
        entry = compute_entry(deam, backbone, song, getattr(torch, settings["store"]))
        for key in ENTRY:
            verdict.compare(f"song {song}: {key}", songs[str(song)][key], entry[key])
    verdict.end()


def compute_entry(deam, backbone, song, dtype):
    """What a manifest says of a song, computed here."""
    try:
        waveform, pcm = deam.get_waveform(song, backbone.sample_rate)
    except BadClip as error:
        return {"pcm": str(error), "features": "none", "frames": 0}
    features = backbone.hidden_states(waveform[None])[0].to(dtype)
    return {"pcm": pcm, "features": tensor_digest(features), "frames": len(features)}


# ------------------------------------------------------------------------------------ 4: training


def prepare_training(verdict, record, args):
    """The record's Training, made anew from a features folder, perhaps of some songs only; compared
    on the way: how the features were made, the configuration, the initial model."""
    verdict.begin("features, configuration and initial model")
    options = record.options
    options.features, options.device, options.allow_missing = args.features, args.device, None
    arithmetic = Arithmetic(options.precision, args.device, options.threads)
    data = train.open_data(options, record.splits)
    verdict.compare_all(("settings", "params", "annotations", "top_layers", "swapped_labels"),
                        record.manifest, data.manifest)
    songs = data.manifest["songs"] or {}
    verdict.compare("PCM and features in both manifests",
                    {song: record.manifest["songs"].get(song) for song in songs}, songs)
    data.reader.songs = {**record.manifest["songs"], **songs}  # files of others must be those
    config = {**train.configuration(options, data, arithmetic), "features":
              record.config["features"]}
    training, expected = train.Training(config, data, arithmetic), record.content
    actual = describe_run(training)
    verdict.compare_all(record.config, record.config, flat_config(config))
    verdict.compare_all(("features_settings", "source", "label_mean", "label_std"), expected,
                        actual)
    verdict.compare("initial model", expected["digests"]["initial_model"], training.initial)
    verdict.end()
    return training


def songs_of_steps(training, steps):
    """The ids, ascending, whose features the first `steps` steps of training need."""
    data, generator, batches = training.data, torch.Generator(), []
    generator.set_state(data.shuffle.get_state())
    loader = DataLoader(data.ids["train"], training.options.batch_size, shuffle=True,
                        drop_last=True, generator=generator)
    while len(batches) < steps:
        batches += [batch.tolist() for batch in loader]
    validated = data.ids["val"] if steps >= len(loader) else []
    return sorted({*sum(batches[:steps], []), *validated})


def check_training(verdict, record, args):
    """Repeat the first steps, or all, and compare losses and digests; after the last one also the
    model and all predictions."""
    training = prepare_training(verdict, record, args)
    ends = [step for _, step in digest_steps(training.epoch_steps, training.options.epochs)]
    wanted = training.steps if args.steps == "all" else min(args.steps, training.steps)
    wanted = min(step for step in ends if step >= wanted)  # on to the next digest
    part = f"{wanted} of {training.steps} steps of training"
    songs = songs_of_steps(training, wanted)
    if wanted == training.steps:  # then all predictions are compared too
        songs = sorted({*songs, *evaluated_songs(record)})
    if missing := missing_songs(training.data, songs):
        verdict.skip(part, lacking(args, missing))
        return
    verdict.begin(part)
    with Progress(total=wanted, desc="train", unit="step") as bar:
        for _ in training.train_until(wanted, bar):
            pass
    for names, expected, actual in ((DIGESTS, record.digests, training.digests),
                                    (HISTORY, record.history, training.history)):
        for then, now in zip(expected, actual):
            place = f"step {now[1]}" if names is DIGESTS else f"epoch {now[0]}"
            for name, *values in zip(names, then, now):
                verdict.compare(f"{place}: {name}", *values)
    if training.step == training.steps:
        check_result(verdict, record, training, args)
    verdict.end()


def check_result(verdict, record, training, args):
    """The model that all steps gave, and what it predicts of every split that was evaluated."""
    expected, actual = record.content["digests"], training.result()
    for name in ("model", "val_predictions"):
        verdict.compare(name.replace("_", " "), expected.get(name), actual[name],
                        any_close=not record.exact)
    compare_evaluations(verdict, record, training.model, training.data, args)


# ------------------------------------------------------------------- 5: predictions of the model


def evaluated_songs(record):
    return {song for metrics in record.metrics.values() for song in record.splits[metrics["split"]]}


def missing_songs(data, songs):
    return [song for song in songs if not data.reader.path(song).exists()]


def lacking(args, missing):
    songs = f" with --songs {' '.join(map(str, missing))}" if len(missing) < 300 else ""
    return (f"{args.features} lacks features of {len(missing)} songs: run its extract.py command"
            + songs)


def check_predictions(verdict, record, args):
    """What the published model predicts of every split that was evaluated."""
    part = "predictions of the published model"
    data = DEAMFeatHandler(args.features, record.splits, allow_missing=None)
    songs = {*evaluated_songs(record), *data.ids["train"], *data.ids["val"]}  # ridge's as well
    if missing := missing_songs(data, sorted(songs)):
        verdict.skip(part, lacking(args, missing))
        return
    verdict.begin(part)
    model = load_model(record.model, record.folder / "model.pt")
    compare_evaluations(verdict, record, model, SimpleNamespace(**record.model), args)
    verdict.end()


def compare_evaluations(verdict, record, model, scale, args):
    """Compare a model's predictions, and ridge's, with the published ones. scale: what has the
    `mean` and `std` of the labels that it was trained on."""
    arithmetic = Arithmetic("exact", args.device)
    model = model.to(arithmetic.device, arithmetic.dtype)
    for metrics in record.metrics.values():
        data = DEAMFeatHandler(args.features, record.splits, labels=metrics["labels"])
        pred = evaluation.predictions(model, data, metrics["split"], scale, arithmetic)
        ridge_pred, penalty = evaluation.ridge_predictions(data, metrics["split"])
        compare_predictions(verdict, metrics, {
            "predictions": pred, "ridge_predictions": ridge_pred, "ridge_penalty": penalty})


# -------------------------------------------------------------------------------- features folder


def check_folder(root):
    """Whether a features folder's files are what its manifest says; the exit code."""
    manifest, verdict = read_manifest(root / "manifest.json"), Verdict(root)
    verdict.begin(f"features of {len(manifest['songs'])} songs")
    damage = find_damage(root, manifest["songs"], manifest["settings"]["store"])
    for song, reason in damage.items():
        verdict.compare(reason or f"song {song}", "whole", "damaged" if reason else "whole")
    verdict.end()
    verdict.begin("annotations and top layers")
    table = read_text(root / "annotations.csv", "a table of labels")
    verdict.compare("annotations.csv", manifest["annotations"], sha256(table.encode()))
    top = read_tensors(root / "top_layers.pt", "the backbone's top layers", TOP_LAYERS)
    verdict.compare("top_layers.pt", manifest["top_layers"], state_digest(top["state"]))
    read_splits(root / "splits.json")
    verdict.end()
    return verdict.finish()


# -------------------------------------------------------------------------------------------- run


def find_backbone(args, record):
    """The backbone, or the reason why it is not to be had."""
    name = args.weights or weights_name(record.manifest["source"])
    try:
        return Backbone(name), None
    except UserError as error:
        if args.weights:
            raise
        return None, f"{error}: name the backbone with --weights"


def find_annotations(args, deam):
    """DEAM's labels: of its folder, or of a features folder."""
    if deam:
        return deam.annotations
    table = args.features and args.features / "annotations.csv"
    return read_annotations(table) if table and table.exists() else None


def run(args):
    if not args.record and not args.features:
        raise UserError("name a RECORD, or --features FOLDER")
    if not args.record:
        return check_folder(args.features)
    deam = DEAMHandler(args.deam) if args.deam else None
    with open_record(args.record) as folder:
        if args.pack:
            files_to_pack(folder)  # before any work
        record, verdict = Record(folder), Verdict(args.record)
        check_files(verdict, record)
        annotations = find_annotations(args, deam)
        if annotations is None or not record.metrics:
            verdict.skip("numbers", "give DEAM's annotations with --deam PATH" if record.metrics
                         else f"run eval.py {args.record} first")
        else:
            check_numbers(verdict, record, annotations)
        if not deam or not any(int(song) in deam.audio for song in record.manifest["songs"]):
            verdict.skip("PCM and features", "give DEAM with its audio with --deam PATH")
        else:
            backbone, reason = find_backbone(args, record)
            (check_features(verdict, record, args, deam, backbone) if backbone else
             verdict.skip("PCM and features", reason))
        if args.features:
            check_training(verdict, record, args)
            if record.metrics and args.steps != "all":
                check_predictions(verdict, record, args)
        else:
            verdict.skip("training", "give a folder of its features with --features FOLDER")
        code = verdict.finish()
        if args.pack and code != 1:
            pack(folder, args.pack)
            print(f"next: publish {args.pack}; others check it with python verify.py {args.pack}")
    return code


if __name__ == "__main__":
    execute(run, ARGS)
