"""Evaluate runs on cached features: numbers with their uncertainty, figures, a verdict.

  python eval.py runs/last1                                # no backbone, no audio, no network
  python eval.py runs/seed0 runs/seed1 runs/seed2          # and a table, mean ± standard deviation
  python eval.py runs/last1 --verify metrics.json          # does it give the published numbers?
  python eval.py runs/last1-fold* --against runs/frozen-fold*     # all songs, and the difference
  python eval.py runs/shipped --against runs/corrected --labels corrected    # on one truth

A verdict is REPRODUCED (exit code 0), CLOSE (3) or NOT REPRODUCED (1).
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P, -I leave it out

from kit.cli import Parser, execute, path, start


def parser():
    p = Parser(__doc__)
    p.add_argument("runs", type=path, nargs="+", metavar="RUN", help="folder that train.py wrote")
    p.share("--features", help="the folder that extract.py wrote")
    p.add_argument("--split", choices=["train", "val", "test"], default="test", help="which songs")
    p.share("--labels", default=None, help="compare with these labels (default: those that the run "
            "was trained on)")
    p.add_argument("--against", type=path, nargs="+", metavar="RUN",
                   help="runs to compare with, song by song: the difference and its interval; "
                        "several seeds on both sides, or folds")
    p.add_argument("--verify", type=path, metavar="FILE",
                   help="compare with this metrics.json")
    p.share("--device")
    return p


if __name__ == "__main__":
    ARGS = start(parser(), "rerun the same command")  # before torch is imported

import functools
from types import SimpleNamespace

import numpy as np
from torch.utils.data import DataLoader

from common import DEAMFeatHandler, collate, load_model
from kit import report
from kit.cli import Progress, UserError
from kit.deam import splits_digest
from kit.evaluations import (Evaluation, are_folds, check_comparable, differing_settings,
                             folds_by_name, pooled_name, report_name, write_report)
from kit.files import prefetch
from kit.machine import Arithmetic, FrozenOutputs
from kit.metrics import (artist_groups, label_digest, measure_folds, measure_split,
                         paired_difference, predicted_values, resampled_metrics, ridge, true_values)
from kit.records import flat_config, read_metrics, read_run
from kit.verdict import Verdict, closeness, compare_numbers, compare_predictions


# ------------------------------------------------------------------------------------- predictions


def predictions(model, data, split, scale, arithmetic):
    """{song id: [valence, arousal]} on the 1–9 scale, to six decimals, of a model in this
    arithmetic. scale: what has the `mean` and `std` of the labels that it was trained on."""
    # each clip's values are the same in any batch; in a batch the next files are read meanwhile
    clips = DataLoader(FrozenOutputs(data.datasets[split], model, arithmetic), 8,
                       collate_fn=collate)
    bar = Progress(clips, desc=f"eval {split}", unit="batch")
    values = model.predict(bar, arithmetic, arithmetic.clips_together)
    values = (values * scale.std + scale.mean).numpy()
    if not np.isfinite(values).all():
        raise UserError("a prediction is NaN or infinite")
    return by_song(data.ids[split], values)


def by_song(songs, values):
    """{song id: [valence, arousal]} of values[N, 2], to six decimals, no minus zero."""
    return dict(zip(map(str, songs), (values.round(6) + 0.0).tolist()))


# ------------------------------------------------------------------------------------------- ridge

POOLED = {}  # mean features by the reader's key: for several runs a file is read once


def pooled_features(dataset, index):
    """float64[D]: the mean over time of a song's features."""
    key = dataset.reader.key(dataset.ids[index])
    if key not in POOLED:
        POOLED[key] = dataset[index][0].double().mean(0).numpy()
    return POOLED[key]


@functools.cache  # several runs may share one DEAMFeatHandler
def ridge_predictions(data, split):
    """({song id: [valence, arousal]} by ridge on mean-pooled features, its penalty)."""
    x, y, std = {}, {}, data.std.numpy()
    for name in dict.fromkeys(["train", "val", split]):
        dataset = data.datasets[name]
        pooled = prefetch(functools.partial(pooled_features, dataset), range(len(dataset)))
        bar = Progress(pooled, total=len(dataset), desc=f"ridge {name}", unit="song", leave=False)
        x[name], y[name] = np.stack([*bar]), dataset.labels.numpy() / std
    predict, penalty = ridge(x["train"], y["train"], x["val"], y["val"])
    return by_song(data.ids[split], predict(x[split]) * std), penalty


# -------------------------------------------------------------------------------------- evaluation


def evaluate(args, folder, arithmetic, opened):
    """The Evaluation of a run. opened: features by labels and splits, for the runs that follow."""
    content, splits = read_run(folder)
    config, split = flat_config(content["config"]), args.split
    labels = args.labels or config["labels"]
    key = labels, splits_digest(splits)
    if key not in opened:
        opened[key] = DEAMFeatHandler(args.features, splits, labels=labels)
    data = opened[key]
    if config["features"] != data.digest:
        raise UserError(f"{folder} was trained on features {str(config['features'])[:16]}…, "
                        f"{data.root} holds {str(data.digest)[:16]}…: name its own with "
                        "--features, or extract them again with its settings")
    if len(data.ids[split]) < 2:
        raise UserError(f"{data.summary}: too few {split} songs to evaluate on")
    model = load_model(content, folder / "model.pt").to(arithmetic.device, arithmetic.dtype)
    pred = predictions(model, data, split, SimpleNamespace(**content), arithmetic)
    ridge_pred, penalty = ridge_predictions(data, split)
    metrics = {
        "run": folder.resolve().name, "finetune": config["finetune"],
        "precision": config["precision"], "source": splits["source"], "split": split,
        "labels": labels, "trained_on_labels": config["labels"], "songs": len(pred),
        "features": data.digest, "splits": splits_digest(splits),
        "label_values": label_digest(data.annotations, splits),
        "swapped_labels": data.manifest["swapped_labels"],
        "initial_model": content["initial_model"], "model": content["digest"],
        "numbers": measure_split(data.annotations, splits, split, pred, ridge_pred),
        "ridge_penalty": penalty, "predictions": pred, "ridge_predictions": ridge_pred}
    return Evaluation(folder / report_name(split, labels, config["labels"]), config, data, metrics)


def pool_folds(evaluations):
    """The Evaluation of folds as one: every song predicted by the model that was not trained on it,
    intervals by resampling artists. Raises UserError for folds of different configurations."""
    first, runs = evaluations[0], folds_by_name(evaluations)
    pred, ridge_pred = ({song: values for each in runs.values() for song, values in
                         each[kind].items()} for kind in ("predictions", "ridge_predictions"))
    folds = [list(map(int, each["predictions"])) for each in runs.values()]
    mean_labels = [each.data.datasets["train"].labels.numpy().mean(0) for each in evaluations]
    own = "model", "initial_model", "splits", "label_values", "ridge_penalty"  # of each fold
    content = {key: value for key, value in first.content.items() if key not in own}
    content |= {"run": pooled_name(list(runs)), "songs": len(pred),
                "split": f"pooled {content['split']}", "predictions": pred,
                "ridge_predictions": ridge_pred,
                "numbers": measure_folds(first.data.annotations, folds, pred, ridge_pred,
                                         mean_labels),
                "runs": {name: {key: each[key] for key in own} for name, each in runs.items()}}
    folder = first.folder.parent.parent / content["run"]
    return first._replace(folder=folder / first.folder.name.replace("eval-", "eval-pooled-", 1),
                          content=content)


# -------------------------------------------------------------------------------------- comparison


def compare(evaluations, others):
    """Print what the models of two sides differ by, song by song, artists resampled. Raises
    UserError where they are not about the same songs and labels."""
    check_comparable(evaluations, others)
    first, second = ([each.content for each in side] for side in (evaluations, others))
    ids = list(map(int, first[0]["predictions"]))
    true, artists = true_values(evaluations[0].data.annotations, ids), artist_groups(ids)
    report.print_difference(first, second, paired_difference(*(
        [resampled_metrics(true, predicted_values(each["predictions"], ids), artists)
         for each in side] for side in (first, second))))


def verify(expected, file, evaluation):
    """An evaluation just made against an earlier metrics.json; the exit code."""
    verdict, content, data = Verdict(file), evaluation.content, evaluation.data
    verdict.begin(f"features, model, predictions and numbers, {content['precision']}")
    verdict.compare_all(("finetune", "precision", "source", "split", "labels", "trained_on_labels",
                         "songs", "features", "splits", "label_values", "swapped_labels",
                         "initial_model"), expected, content)
    verdict.compare("model", expected["model"], content["model"],
                    close=closeness(expected["precision"]))
    compare_numbers(verdict, expected, data.annotations, data.splits)
    compare_predictions(verdict, expected, content)
    verdict.end()
    return verdict.finish()


# --------------------------------------------------------------------------------------------- run


def run(args):
    if args.verify and (len(args.runs) > 1 or args.against):
        raise UserError("--verify is about one run: name only one")
    expected = read_metrics(args.verify) if args.verify else None  # before anything is written
    arithmetic, opened = Arithmetic("exact", args.device), {}
    evaluations = [evaluate(args, folder, arithmetic, opened) for folder in args.runs]
    folds = are_folds(evaluations)
    # what is verified is never written over
    write = not expected or not args.verify.resolve().is_relative_to(args.runs[0].resolve())
    for each in evaluations if write else ():
        write_report(each, arithmetic.device, draw=not folds)
    if folds:
        evaluations = [pool_folds(evaluations)]
        write_report(evaluations[0], arithmetic.device)
    for each in evaluations:
        report.print_evaluation(each)
        print(f"written: {each.folder}/metrics.json, predictions.csv and figures" if write else
              "nothing written: what is verified is in this run's folder",
              end="\n\n" if each is not evaluations[-1] else "\n")
    if len(evaluations) > 1:
        report.print_runs(evaluations, not differing_settings(evaluations, "seed"))
    if args.against:
        others = [evaluate(args, folder, arithmetic, opened) for folder in args.against]
        compare(evaluations, [pool_folds(others)] if are_folds(others) else others)
    if expected:
        return verify(expected, args.verify, evaluations[0])
    print(f"next: python verify.py {args.runs[0]} --features {args.features} --pack "
          f"{args.runs[0].resolve().name}.tar, for others to check")
    return 0


if __name__ == "__main__":
    execute(run, ARGS)
