"""Evaluate runs on cached features: numbers with their uncertainty, figures, a verdict.

  python eval.py runs/last1                                # no backbone, no audio, no network
  python eval.py runs/seed0 runs/seed1 runs/seed2          # and a table, mean ± standard deviation
  python eval.py runs/last1 --verify metrics.json          # does it give the published numbers?
  python eval.py runs/last1-fold* --against runs/frozen-fold*     # all songs, and the difference

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
                   help="runs to compare with, song by song: the difference and its interval")
    p.add_argument("--verify", type=path, metavar="FILE",
                   help="compare with this metrics.json")
    p.share("--device")
    return p


if __name__ == "__main__":
    ARGS = start(parser(), "rerun the same command")  # before torch is imported

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader

from common import DEAMFeatHandler, collate, load_model
from kit import figures
from kit.cli import Progress, UserError
from kit.deam import (DIMENSIONS, QUADRANTS, splits_digest)
from kit.files import (prefetch, json_digest, write_file, write_json)
from kit.machine import Arithmetic, FrozenOutputs, environment
from kit.metrics import (PUBLISHED, artist_groups, label_digest, measure, measure_split, paired_difference,
                         predicted_values, ridge, stated, true_values)
from kit.records import flat_config, predictions_table, read_metrics, read_run
from kit.verdict import Verdict, compare_numbers, compare_predictions


# --------------------------------------------------------------------------------------- evaluation


POOLED = {}  # by FeatDataset.key: for several runs a file is read once


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
    pred = (predict(x[split]) * std).round(6) + 0.0
    return dict(zip(map(str, data.ids[split]), pred.tolist())), penalty


class Evaluation(NamedTuple):
    """A run on one split, or folds pooled: where its report goes, the run's settings, the features,
    and what its metrics.json is to hold."""
    out: Path
    config: dict
    data: DEAMFeatHandler
    found: dict


def predictions(model, data, split, scale, arithmetic):
    """{song id: [valence, arousal]} on the 1–9 scale, to six decimals, of a model in this
    arithmetic. scale: what has the `mean` and `std` of the labels that it was trained on."""
    clips = DataLoader(FrozenOutputs(data.datasets[split], model, arithmetic), 1,
                       collate_fn=collate)
    bar = Progress(clips, desc=f"eval {split}", unit="song")
    values = (model.predict(bar, arithmetic) * scale.std + scale.mean).numpy()
    if not np.isfinite(values).all():
        raise UserError("a prediction is NaN or infinite")
    return dict(zip(map(str, data.ids[split]), (values.round(6) + 0.0).tolist()))


def evaluate(args, folder, arithmetic, opened):
    """The Evaluation of a run. opened: features by labels and splits, for the runs that follow."""
    content, splits = read_run(folder)
    model = load_model(content, folder / "model.pt")
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
    ids = data.ids[split]
    if not ids:
        raise UserError(f"{data.summary}: no {split} song to evaluate on")
    pred = predictions(model.to(arithmetic.device, arithmetic.dtype), data, split,
                       SimpleNamespace(**content), arithmetic)
    ridge_pred, penalty = ridge_predictions(data, split)
    found = {"run": folder.name, "finetune": config["finetune"], "precision": config["precision"],
             "source": splits["source"], "split": split, "labels": labels,
             "trained_on_labels": config["labels"], "songs": len(ids), "features": data.digest,
             "splits": splits_digest(splits),
             "label_values": label_digest(data.annotations, splits),
             "swapped_labels": data.manifest["swapped_labels"],
             "initial_model": content["initial_model"], "model": content["digest"],
             "numbers": measure_split(data.annotations, splits, split, pred, ridge_pred),
             "ridge_penalty": penalty, "predictions": pred, "ridge_predictions": ridge_pred}
    apart = "" if labels == config["labels"] else f"-{labels}"
    return Evaluation(folder / f"eval-{split}{apart}", config, data, found)


# ------------------------------------------------------------------------------------------- report


def write_report(evaluation, device):
    """metrics.json, predictions.csv and the figures."""
    out, _, data, found = evaluation
    content = {**found, "environment": environment(device)}
    write_json(out / "metrics.json", {**content, "digest": json_digest(content)})
    write_file(out / "predictions.csv", predictions_table(found["predictions"], data.annotations))
    caption = figures.caption_of(found["finetune"], found["labels"],
                                 f"{found['split']}, n = {found['songs']}", found["source"])
    songs = list(map(int, found["predictions"]))
    true, pred = true_values(data.annotations, songs), predicted_values(found["predictions"], songs)
    figures.draw_or_say(figures.draw_report, true, pred, found["numbers"], out, caption)


def print_row(label, cells, first=18, width=8):
    """A line of a table: numbers with four decimals, counts and words as they are."""
    print(f"{label:{first}}" + "".join(
        f"{cell:z{width}.4f}" if isinstance(cell, float) else f"{cell:>{width}}"
        for cell in cells))


def print_evaluation(evaluation):
    """What was evaluated, what a reader should know about it, and the numbers."""
    out, _, data, found = evaluation
    runs = found.get("runs", {found["run"]: found})
    title = out.parent if len(runs) == 1 else f"{len(runs)} runs"
    print(f"{title}: {found['finetune']}, {found['split']} split, {found['songs']} songs, "
          f"{found['labels']} labels, trained in {found['precision']}")
    for note in data.notes():
        print(note)
    if found["labels"] != found["trained_on_labels"]:
        print(f"for comparison: the run was trained on {found['trained_on_labels']} labels")
    print(f"features {found['features']}")
    for name, each in runs.items():
        print(f"model    {each['model']}  {name}")
    print_numbers(found["numbers"], found["songs"])


def print_numbers(numbers, songs):
    metrics, intervals = numbers["metrics"], numbers["intervals"]
    heads = "MSE", "RMSE", "MAE", "z MSE", "z RMSE", "z MAE", "R²", "r", "CCC"
    print()
    print_row("", heads)
    for name in (*DIMENSIONS, "average"):
        edges = intervals[name].values()
        rows = {name: metrics[name].values(), "  95% from": [low for low, _ in edges],
                "  to": [high for _, high in edges],
                **{f"  {other}": each[name].values()
                   for other, each in numbers["baselines"].items()}}
        for label, values in rows.items():
            print_row(label, values)
        print_row("  ceiling", [*[""] * 6, numbers["ceiling_r2"][name]])
        if new := numbers.get("new_artists"):
            print(f"  {new['songs']} songs by artists not in train or val: "
                  f"R² {stated(new, name, 'r2')}  r {stated(new, name, 'pearson')}  "
                  f"CCC {stated(new, name, 'ccc')}")
    q = metrics["quadrant"]
    print(f"\nquadrants right: {stated(numbers, 'quadrant', 'accuracy', '.1%')} of {songs}; macro "
          f"F1 {q['macro_f1']:.4f}  (threshold 5; rows true, columns predicted)")
    print_row("", [*QUADRANTS, "F1"], 8)
    for name, counts in zip(QUADRANTS, numbers["confusion"]):
        print_row(name, [*counts, q["f1"][name]], 8)
    print_correlation(numbers)
    if p := numbers.get("published_protocol"):
        print(f"published protocol (first 160 test songs): z-scored MSE {p['z_mse']:.4f} "
              f"(published {PUBLISHED['mse']}), quadrants right {p['quadrants_right']} (published "
              f"{PUBLISHED['quadrants']})")


def print_correlation(numbers):
    metrics, linear = numbers["metrics"], numbers["baselines"]["ridge"]
    key = "valence_arousal_correlation"
    r = metrics[key]
    collapsed = abs(r["predicted"]) >= 0.9 and abs(r["predicted"]) - abs(r["true"]) >= 0.2
    print("\ncorrelation of valence with arousal: predicted "
          f"{stated(numbers, key, 'predicted', '.4f')}, true {r['true']:.4f}, ridge's "
          f"{linear[key]['predicted']:.4f}"
          + (": a collapse, the two heads predict one thing" if collapsed else ""))
    better = [f"{name} (R² {linear[name]['r2']:.2f}, the network {metrics[name]['r2']:.2f})"
              for name in DIMENSIONS if linear[name]["r2"] > metrics[name]["r2"]]
    if better:
        print(f"ridge on the same features does better than the network for {', '.join(better)}")


TABLE = [*((name, key) for name in DIMENSIONS for key in ("z_mse", "r2", "pearson", "ccc")),
         ("quadrant", "accuracy"), ("valence_arousal_correlation", "predicted")]
HEADS = [f"{name[:3]} {key}" for name, key in TABLE[:-2]] + ["quadrants", "pred. r"]


def print_runs(evaluated):
    """One row a run; mean ± standard deviation (of the sample) over runs that differ in the seed
    alone; ridge and the ceiling of the first."""
    def cells(numbers):
        return [numbers[name][key] for name, key in TABLE]

    rows = [cells(each.found["numbers"]["metrics"]) for each in evaluated]
    print()
    print_row("run", HEADS, 20, 17)
    for each, values in zip(evaluated, rows):
        print_row(each.found["run"][:19], values, 20, 17)
    if differing := differing_settings(evaluated, "seed"):
        print(f"the runs differ in {differing}: no mean over them")
    else:
        pairs = zip(np.mean(rows, 0), np.std(rows, 0, ddof=1))
        print_row("mean ± std", [f"{mean:.4f} ± {std:.4f}" for mean, std in pairs], 20, 17)
    numbers = evaluated[0].found["numbers"]
    print_row("ridge", cells(numbers["baselines"]["ridge"]), 20, 17)
    tops = [numbers["ceiling_r2"][name] if key == "r2" else "" for name, key in TABLE]
    print_row("ceiling", tops, 20, 17)


# ------------------------------------------------------------------------------------------ verdict


def verify_run(expected, file, evaluation):
    """An evaluation just made against an earlier metrics.json; the exit code."""
    verdict, found, data = Verdict(file), evaluation.found, evaluation.data
    verdict.begin(f"features, model, predictions and numbers of {file}, {found['precision']}")
    verdict.compare_all(("finetune", "precision", "source", "split", "labels", "trained_on_labels",
                         "songs", "features", "splits", "label_values", "swapped_labels",
                         "initial_model"), expected, found)
    exact = expected["precision"] == "exact"
    verdict.compare("model", expected["model"], found["model"], any_close=not exact)
    compare_numbers(verdict, expected, data.annotations, data.splits)
    compare_predictions(verdict, expected, found)
    verdict.end()
    return verdict.finish()


# ------------------------------------------------------------------------------- folds, comparisons


def disjoint(evaluated):
    """Whether several runs were evaluated on songs that no two share: folds."""
    songs = [song for each in evaluated for song in each.found["predictions"]]
    return len(evaluated) > 1 and len(set(songs)) == len(songs)


def differing_settings(evaluated, *apart):
    """"finetune, lr": in which settings, apart from some, evaluated runs differ; empty where in
    none."""
    first = evaluated[0].config
    return ", ".join(key for key in first if key not in apart
                     and any(each.config[key] != first[key] for each in evaluated))


def pool_folds(evaluated):
    """The Evaluation of folds as one; intervals by resampling artists. Raises UserError for runs
    that differ in more than their songs and seed."""
    if differing := differing_settings(evaluated, "seed", "splits", "songs"):
        raise UserError(f"these runs have no song in common, and differ in {differing}: give the "
                        "folds of one configuration, or one run at a time")
    first, names = evaluated[0], {each.found["run"] for each in evaluated}
    if len(names) < len(evaluated):
        raise UserError("two of these folds have one name: rename a folder, so that the report can "
                        "name its models")
    merged = {kind: {song: values for each in evaluated
                     for song, values in each.found[kind].items()}
              for kind in ("predictions", "ridge_predictions")}
    ids = list(map(int, merged["predictions"]))
    name = first.found["run"].rstrip("0123456789").removesuffix("-fold") + "-pooled"
    own = "model", "initial_model", "splits", "label_values", "ridge_penalty"  # of each fold
    found = {key: value for key, value in first.found.items() if key not in own}
    found |= {**merged, "run": name, "songs": len(ids), "split": f"pooled {found['split']}",
              "numbers": measure(first.data.annotations, ids, known=ids,  # z-scored by all of them
                                 pred=merged["predictions"],
                                 ridge_pred=merged["ridge_predictions"],
                                 groups=artist_groups(ids)),
              "runs": {each.found["run"]: {key: each.found[key] for key in own}
                       for each in evaluated}}
    out = first.out.parent.parent / name / first.out.name.replace("eval-", "eval-pooled-", 1)
    return first._replace(out=out, found=found)


def print_difference(first, second, annotations):
    """What two reports on the same songs differ by."""
    if set(first["predictions"]) != set(second["predictions"]):
        raise UserError(f"{first['run']} and {second['run']} predict different songs: nothing to "
                        "compare song by song")
    if first["labels"] != second["labels"]:
        raise UserError(f"{first['run']} and {second['run']} were trained on different labels: say "
                        "with --labels which to compare with")
    numbers = paired_difference(annotations, first["predictions"], second["predictions"])
    print(f"\n{first['run']} less {second['run']}, the same {first['songs']} songs, 95% over "
          "artists")
    for name, metrics in numbers["metrics"].items():
        print(f"  {name:10}" + "   ".join(f"{key} {stated(numbers, name, key, '+.4f')}"
                                          for key in metrics))


# ---------------------------------------------------------------------------------------------- run


def run(args):
    if args.verify and (len(args.runs) > 1 or args.against):
        raise UserError("--verify is about one run: name only one")
    expected = read_metrics(args.verify) if args.verify else None  # before anything is written

    arithmetic, opened = Arithmetic("exact", args.device), {}
    evaluated = [evaluate(args, folder, arithmetic, opened) for folder in args.runs]
    small = [each for each in evaluated if each.found["songs"] < 2]
    if small and not disjoint(evaluated):
        raise UserError(f"{small[0].data.summary}: too few {args.split} songs to evaluate on")

    # what is verified is never written over
    write = not expected or not args.verify.resolve().is_relative_to(args.runs[0].resolve())
    if write:
        for each in evaluated:
            write_report(each, arithmetic.device)
    if disjoint(evaluated):
        evaluated = [pool_folds(evaluated)]
        write_report(evaluated[0], arithmetic.device)
    for each in evaluated:
        print_evaluation(each)
        print(f"written: {each.out}/metrics.json, predictions.csv and four figures" if write else
              "nothing written: what is verified is in this run's folder")
    if len(evaluated) > 1:
        print_runs(evaluated)

    if args.against:
        others = [evaluate(args, folder, arithmetic, opened) for folder in args.against]
        others = [pool_folds(others)] if disjoint(others) else others
        if len(evaluated) > 1 or len(others) > 1:
            raise UserError("--against compares one run with one other, or folds with folds")
        print_difference(evaluated[0].found, others[0].found, evaluated[0].data.annotations)
    return verify_run(expected, args.verify, evaluated[0]) if expected else 0


if __name__ == "__main__":
    execute(run, ARGS)
