"""Check a published record: is what it says true, on this machine, as far as the inputs allow?

  python verify.py last1.tar --deam ANNOTATIONS           # seconds: do its numbers follow?
  python verify.py last1.tar --deam PATH                  # with audio, minutes: five songs as well
  python verify.py last1.tar --features DEAM_feats        # minutes: the first steps of training
  python verify.py last1.tar --features DEAM_feats --steps all    # a day on a CPU: everything
  python verify.py --features DEAM_feats                  # are its files those of its manifest?
  python verify.py runs/last1 --deam PATH --pack last1.tar        # check a run, then pack it

Each part compares, cheapest first:
  1 files of one run: options, splits, digests, tables, rates and metrics, with each other
  2 numbers: every metric and interval, with those recomputed from the predictions and the labels
  3 PCM and features: of a sample of songs, and how all were made, with the manifest
  4 training: the features, options and initial model, then each loss and digest, of the first
    steps or of all
  5 predictions: of the published model for every evaluated split, and those of ridge regression

RECORD is a run's folder, or the .tar that --pack made of one. A part that cannot be checked is
listed, with the option that would allow it. The verdict over the others is REPRODUCED (exit code
0), CLOSE (3) or NOT REPRODUCED (1).
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
from kit.deam import SPLITS, corrected, fold_splits, read_annotations, read_splits, songs_of
from kit.evaluations import report_name
from kit.features import describe_features, find_damage, labels_table, read_manifest
from kit.files import (differences, plain_json, read_tensors, read_text, sha256, shortened,
                       state_digest, tensor_digest)
from kit.machine import Arithmetic, environment, one_machine
from kit.network import TOP_LAYERS
from kit.records import (DIGESTS, HISTORY, digest_steps, files_to_pack, flat_config, open_record,
                         pack, predictions_table, read_config, read_digests, read_history,
                         read_metrics, read_run)
from kit.swapped import swapped_ranges
from kit.training import chosen_options
from kit.verdict import Verdict, closeness, compare_numbers, compare_predictions
from kit.weights import weights_name


class Record:
    """A run as published: its files, each found to be of its schema. description: config.json;
    model: model.pt; options, config: of both; metrics: {an evaluation's folder: its metrics.json}.
    """

    def __init__(self, folder):
        self.folder, self.description = folder, read_config(folder)
        self.model, self.splits = read_run(folder)
        self.manifest = read_manifest(folder / "manifest.json")
        self.history, self.digests = read_history(folder), read_digests(folder)
        self.metrics = {file.parent: read_metrics(file)
                        for file in sorted(folder.glob("eval-*/metrics.json"))}
        self.config = flat_config(self.model["config"])
        options, file = self.model["config"]["options"], folder / "config.json"
        self.options = train.parser().read(options, file)
        written = chosen_options(self.options, self.options.device)
        if differing := differences(options, written):
            raise UserError(f"{file} holds options that train.py does not write ({differing})")


# ------------------------------------------------------------ 1: the record's files are of one run


def check_files(verdict, record):
    """What several files say: digests, settings, sources, steps, learning rates and losses."""
    verdict.begin("files of one run")
    manifest, model, config = record.manifest, record.model, record.config
    verdict.compare("manifest.json", config["features"], manifest["digest"])
    verdict.compare("settings of the features", record.description["features_settings"],
                    manifest["settings"])
    verdict.compare("settings of model.pt", model["settings"], manifest["settings"])
    verdict.compare("architecture of model.pt", plain_json(model["params"]), manifest["params"])
    verdict.compare("backbone", model["backbone"], manifest["source"])
    verdict.compare("source", record.description["source"], record.splits["source"])
    if record.options.fold is not None:
        verdict.compare_all(SPLITS, fold_splits(record.options.fold, record.splits), record.splits)
    check_tables(verdict, record)
    for folder, metrics in record.metrics.items():
        facts = {**config, **model, "model": model["digest"], "trained_on_labels": config["labels"],
                 "swapped_labels": manifest["swapped_labels"]}
        verdict.compare_all(("finetune", "precision", "features", "splits", "source",
                             "trained_on_labels", "swapped_labels", "initial_model", "model"),
                            facts, metrics, f"{folder.name}: ")
        verdict.compare(f"{folder.name}: split and labels", folder.name, report_name(
            metrics["split"], metrics["labels"], config["labels"]))
    verdict.end()


def check_tables(verdict, record):
    """history.csv and digests.csv: their lines, the learning rate and the loss of each epoch, and
    that the last epoch's model, or the best one's, is that of model.pt."""
    options = record.options
    length = record.config["songs"]["train"] // options.batch_size  # steps an epoch
    lines = digest_steps(length, options.epochs)
    verdict.compare("lines of digests.csv", [row[:2] for row in record.digests],
                    list(map(list, lines)))
    verdict.compare("lines of history.csv", [row[0] for row in record.history],
                    list(range(1, options.epochs + 1)))
    ends = record.digests[-options.epochs:]
    for (epoch, rate, loss, *_), (_, step, digested, _) in zip(record.history, ends):
        verdict.compare(f"epoch {epoch}: lr", rate,
                        train.learning_rate(step - 1, length * options.epochs, options))
        verdict.compare(f"epoch {epoch}: loss in both files", loss, digested)
    losses = [row[5] for row in record.history]  # on val
    chosen = losses.index(min(losses)) if options.select == "best" else options.epochs - 1
    verdict.compare("model in digests.csv", [record.model["digest"]],
                    [row[3] for row in ends[chosen:chosen + 1]])


# ---------------------------------------- 2: numbers follow from the predictions and DEAM's labels


def check_numbers(verdict, record, args, deam):
    """Every published number from the published predictions and the labels, DEAM's or those of the
    features folder."""
    if not record.metrics:
        return verdict.skip("numbers", f"run eval.py {args.record} first")
    if not deam and not args.features:
        return verdict.skip("numbers", "give DEAM's annotations with --deam PATH")
    annotations = (deam.annotations if deam else
                   read_annotations(args.features / "annotations.csv"))
    verdict.begin("numbers, from predictions and labels")
    verdict.compare("annotations", record.manifest["annotations"],
                    sha256(labels_table(annotations).encode()))
    songs = {*songs_of(record.splits), *(int(song) for metrics in record.metrics.values()
                                         for song in metrics["predictions"])}
    unlabelled = sorted(songs - annotations.keys())
    verdict.compare("songs without a label", [], unlabelled)
    for folder, metrics in record.metrics.items() if not unlabelled else ():
        labels = annotations
        if metrics["labels"] == "corrected":
            labels = corrected(annotations, metrics["swapped_labels"] or [])
        compare_numbers(verdict, metrics, labels, record.splits)
        verdict.compare(f"{folder.name}: predictions.csv",
                        predictions_table(metrics["predictions"], labels).splitlines(),
                        read_text(folder / "predictions.csv", "a table").splitlines())
    verdict.end()


# ------------------------------------------------------------- 3: PCM and features of some songs


def check_features(verdict, record, args, deam):
    """How features are made, and PCM, features and frames of a sample of songs."""
    part, manifest, settings = "PCM and features", record.manifest, record.manifest["settings"]
    songs = [song for song in manifest["songs"] if deam and int(song) in deam.audio]
    if not songs:
        return verdict.skip(part, "give DEAM with its audio with --deam PATH")
    try:
        backbone = Backbone(args.weights or weights_name(manifest["source"]))
    except UserError as error:
        if args.weights:
            raise
        reason = str(error).partition(":")[0]
        return verdict.skip(part, f"{reason}: name the backbone with --weights")
    sample = choose_songs(args, songs)
    verdict.begin(f"{part} of {len(sample)} of {len(manifest['songs'])} songs")
    actual = describe_features(deam, backbone, settings["layer"], settings["precision"],
                               settings["store"])
    if len(deam.dynamic) == 2:
        actual["swapped_labels"] = swapped_ranges(deam)
    verdict.compare_all(actual, manifest, actual)
    backbone.to(Arithmetic(settings["precision"], args.device), settings["layer"])
    compare_songs(verdict, record, {song: compute_entry(deam, backbone, song, settings["store"])
                                    for song in Progress(sample, desc="features", unit="song")},
                  environment(backbone.arithmetic.device))
    verdict.end()


def choose_songs(args, songs):
    """Those of --songs, or as many as --sample says of `songs`, the record's whose audio is there.
    Raises UserError."""
    if args.songs:
        if lacking := sorted(set(args.songs) - set(map(int, songs))):
            raise UserError(f"no songs {shortened(lacking)} in the record, or no audio of them in "
                            f"{args.deam}")
        return list(map(str, args.songs))
    sample = random.SystemRandom().sample(songs, min(args.sample, len(songs)))
    print(f"  {len(sample)} of {len(songs)} songs, drawn at random; for the same ones again: "
          f"--songs {' '.join(sample)}")
    return sample


def compute_entry(deam, backbone, song, store):
    """What a manifest says of a song, computed on this machine."""
    try:
        waveform, pcm = deam.get_waveform(int(song), backbone.sample_rate)
    except BadClip as error:
        return {"pcm": str(error), "features": None, "frames": 0}
    features = backbone.hidden_states(waveform[None])[0].to(getattr(torch, store))
    return {"pcm": pcm, "features": tensor_digest(features), "frames": len(features)}


def compare_songs(verdict, record, entries, machine):
    """Compare the manifest's entries with {song: entry}, made on the machine of an environment. In
    float32 another machine gives other features: they are close, as far as digests can tell."""
    manifest, close = record.manifest, 0.0
    if not one_machine(manifest.get("environment"), machine):
        close = closeness(manifest["settings"]["precision"])
    for song, entry in entries.items():
        expected = manifest["songs"].get(song, {})
        for key in {**expected, **entry}:
            verdict.compare(f"song {song}: {key}", expected.get(key), entry.get(key),
                            close if key == "features" else 0.0)


# ------------------------------------------------------------------------------------ 4: training


def check_training(verdict, record, args):
    """Repeat the first steps, or all, and compare every loss and digest; after the last one the
    model too. Returns that model, where it is not the record's, else None."""
    training = prepare_training(verdict, record, args)
    ends = [step for _, step in digest_steps(training.epoch_steps, training.options.epochs)]
    steps = training.steps if args.steps == "all" else min(args.steps, training.steps)
    steps = min(step for step in ends if step >= steps)  # on to the next digest
    part = f"{steps} of {training.steps} steps of training"
    if lacking := training.data.reader.lacking(songs_of_steps(training, steps)):
        return verdict.skip(part, lacking)
    verdict.begin(part)
    with Progress(total=steps, desc="train", unit="step") as bar:
        for _ in training.train_until(steps, bar):
            pass
    close = closeness_on_machine(record, training.data, training.device)
    for unit, names, rows in (
            ("step", DIGESTS, zip(record.digests, training.digests)),
            ("epoch", HISTORY, zip(record.history, training.history))):
        for row in rows:
            expected, actual = (dict(zip(names, cells)) for cells in row)
            verdict.compare_all(names, expected, actual, f"{unit} {actual[unit]}: ", close=close)
    repeated = None
    if steps == training.steps:
        expected, actual = record.description["digests"], training.result()
        verdict.compare_all(actual, expected, actual, close=close)
        repeated = training.model if expected["model"] != actual["model"] else None
    verdict.end()
    return repeated


def prepare_training(verdict, record, args):
    """The record's Training, made anew from a features folder, perhaps of some songs only. Compares
    how the features were made, each song's, the configuration and the initial model."""
    verdict.begin("features, configuration and initial model")
    options, manifest = record.options, record.manifest
    options.features, options.device, options.allow_missing = args.features, args.device, None
    arithmetic = Arithmetic(options.precision, args.device, options.threads)
    data = train.open_data(options, record.splits)
    songs = data.manifest["songs"] or {}
    verdict.compare_all(("settings", "params", "annotations", "top_layers", "swapped_labels"),
                        manifest, data.manifest)
    compare_songs(verdict, record, songs, data.manifest.get("environment"))
    data.reader.songs = {**manifest["songs"], **songs}  # files of other songs must be the record's
    config = {**train.configuration(options, data, arithmetic), "features": manifest["digest"]}
    actual = flat_config(config)
    verdict.compare_all([name for name in record.config if name != "device"], record.config,
                        actual)
    verdict.compare("device", record.config.get("device"), actual.get("device"),
                    close=closeness_on_machine(record, data, arithmetic.device))
    for name in ("mean", "std"):
        verdict.compare(f"labels' {name}", record.model[name].tolist(),
                        getattr(data, name).tolist())
    training = train.Training(config, data, arithmetic)
    verdict.compare("initial model", record.model["initial_model"], training.initial)
    verdict.end()
    return training


def closeness_on_machine(record, data, device):
    """How far losses and ridge's predictions may be from the record's and still be close: only in
    float32, on another machine or with features that another one made."""
    machine, songs = environment(device), data.manifest["songs"] or {}
    same = one_machine(record.description.get("environment"), machine) and all(
        record.manifest["songs"].get(song) == entry for song, entry in songs.items())
    return 0.0 if same else closeness(record.options.precision)


def songs_of_steps(training, steps):
    """The ids whose features the first `steps` steps of training need."""
    data, generator, batches = training.data, torch.Generator(), []
    generator.set_state(data.shuffle.get_state())
    loader = DataLoader(data.ids["train"], training.options.batch_size, shuffle=True,
                        drop_last=True, generator=generator)
    while len(batches) < steps:
        batches += [batch.tolist() for batch in loader]
    validated = data.ids["val"] if steps >= len(loader) else []
    return sum(batches[:steps], validated)


# --------------------------------------------------------------------------------- 5: predictions


def check_predictions(verdict, record, args, repeated):
    """What the published model predicts of every split that was evaluated, and the other one that
    all steps of training gave, if they did; and ridge regression."""
    part, scale = "predictions of the published model", SimpleNamespace(**record.model)
    data = DEAMFeatHandler(args.features, record.splits, allow_missing=None)
    if lacking := data.reader.lacking(songs_of(record.splits)):
        return verdict.skip(part, lacking)
    verdict.begin(part + " and of the repeated one" if repeated else part)
    arithmetic = Arithmetic("exact", args.device)
    published = load_model(record.model, record.folder / "model.pt")
    close = closeness_on_machine(record, data, arithmetic.device)
    for folder, metrics in record.metrics.items():
        try:
            data = DEAMFeatHandler(args.features, record.splits, labels=metrics["labels"])
            ridge_pred, penalty = evaluation.ridge_predictions(data, metrics["split"])
            for model in filter(None, (published, repeated)):
                model = model.to(arithmetic.device, arithmetic.dtype)
                pred = evaluation.predictions(model, data, metrics["split"], scale, arithmetic)
                compare_predictions(verdict, metrics, {
                    "predictions": pred, "ridge_predictions": ridge_pred,
                    "ridge_penalty": penalty}, ridge_close=close)
        except UserError as error:  # of features that are not the record's
            verdict.compare(folder.name, "predictions", str(error))
    verdict.end()


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


def run(args):
    if not args.record:
        if not args.features:
            raise UserError("name a RECORD, or --features FOLDER")
        if args.deam or args.weights or args.songs or args.pack:
            raise UserError("without RECORD a folder of features is checked, by --features alone")
        return check_folder(args.features)
    deam = DEAMHandler(args.deam) if args.deam else None
    with open_record(args.record) as folder:
        if args.pack:
            files_to_pack(folder)  # before any work
        record, verdict = Record(folder), Verdict(args.record)
        check_files(verdict, record)
        check_numbers(verdict, record, args, deam)
        check_features(verdict, record, args, deam)
        if args.features:
            repeated = check_training(verdict, record, args)
            if record.metrics:
                check_predictions(verdict, record, args, repeated)
        else:
            verdict.skip("training", "give a folder of its features with --features FOLDER")
        code = verdict.finish()
        if args.pack and code != 1:
            pack(folder, args.pack)
            print(f"next: publish {args.pack}; others check it with python verify.py {args.pack}")
    return code


if __name__ == "__main__":
    execute(run, ARGS)
