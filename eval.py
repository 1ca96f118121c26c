"""Evaluate runs on cached features: numbers with their uncertainty, figures, a verdict.

  python eval.py runs/last1                                # no backbone, no audio, no network
  python eval.py runs/seed0 runs/seed1 runs/seed2          # and a table, mean ± standard deviation
  python eval.py runs/last1 --verify metrics.json          # does it give the published numbers?
  python eval.py --verify metrics.json --deam PATH         # do they follow from the predictions?
  python eval.py runs/last1-fold* --against runs/frozen-fold*     # all songs, and the difference

A verdict is REPRODUCED (exit code 0), CLOSE (3) or NOT REPRODUCED (1).
"""

from cli import Parser, execute, path, start


def parser():
    p = Parser(__doc__)
    p.add_argument("runs", type=path, nargs="*", metavar="RUN", help="folder that train.py wrote")
    p.share("--features", help="the folder that extract.py wrote")
    p.add_argument("--split", choices=["train", "val", "test"], default="test", help="which songs")
    p.share("--labels", default=None, help="compare with these labels (default: those that the run "
            "was trained on)")
    p.add_argument("--against", type=path, nargs="+", metavar="RUN",
                   help="runs to compare with, song by song: the difference and its interval")
    p.add_argument("--verify", type=path, metavar="FILE",
                   help="compare with this metrics.json; without a run, check it against DEAM's "
                        "labels")
    p.share("--deam", help="with --verify and no run: a folder with DEAM's annotations in it")
    p.share("--device")
    return p


if __name__ == "__main__":
    ARGS = start(parser(), "rerun the same command")  # before torch is imported

import functools

import numpy as np
import torch
from torch.utils.data import DataLoader

import figures
from cli import Progress, UserError
from common import (DIMENSIONS, HERE, PARAMS, QUADRANTS, SETTINGS, Arithmetic, DEAMFeatHandler,
                    DEAMHandler, EmotionModel, FrozenOutputs, collate, corrected, environment,
                    read_manifest, read_splits, songs_of, splits_digest)
from files import (DIGEST, Verdict, ahead, check_form, differences, json_digest, read_json,
                   read_tensors, read_text, state_digest, table_text, write_file, write_json)
from metrics import (PUBLISHED, artist_groups, measure, measure_split, paired_difference, ridge)
from train import CONFIG

SIX_DECIMALS, ABSENT = 5e-7, ("absent",)  # a tuple: nothing that JSON can hold
TOLERANCE = 0.01  # on the 1–9 scale: predictions of float32 that differ less are close
MODEL = {"config": CONFIG, "settings": {"layer": int}, "params": PARAMS, "layer": int,
         "mean": torch.Tensor, "std": torch.Tensor, "state": {str: torch.Tensor},
         "initial_model": DIGEST, "splits_source": str, "source": {"name": str}}
METRICS = {"finetune": str, "precision": ("exact", "float32", "bfloat16"), "source": str,
           "split": ("train", "val", "test"),
           "labels": ("shipped", "corrected"), "trained_on_labels": ("shipped", "corrected"),
           "songs": int, "features": (None, DIGEST), "splits": DIGEST, "label_values": DIGEST,
           "swapped_labels": (None, [[int, int]]), "initial_model": DIGEST, "model": DIGEST,
           "numbers": dict, "ridge_penalty": (None, float), "predictions": {int: [float, float]},
           "ridge_predictions": (None, {int: [float, float]}), "digest": DIGEST}


def read_model(file):
    """(EmotionModel in eval mode, what else model.pt holds). Raises UserError for anything else."""
    content = read_tensors(file, "a trained model", MODEL)
    try:
        model = EmotionModel(content["params"], content["layer"], content["config"]["finetune"])
        model.load_state_dict(content["state"], assign=True)
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError):
        raise UserError(f"{file} is not a model that train.py wrote") from None
    if any(each.shape != (2,) or each.dtype != torch.float64 or not (0 < each).all()
           or not (each < 9).all() for each in (content["mean"], content["std"])):
        raise UserError(f"{file} is not a model that train.py wrote: mean and std of two labels")
    if content["settings"].keys() != {"layer"}:  # not of features without manifest
        check_form(content["settings"], SETTINGS, f"{file} is not a model that train.py wrote")
    if not content["settings"]["layer"] == content["layer"] >= 0:
        raise UserError(f"{file} is not a model that train.py wrote: two layers in it")
    return model.eval(), content


def read_run(folder):
    """(model, what else model.pt holds, the run's splits). Raises UserError where the run's files
    are not of one run."""
    if not (folder / "model.pt").exists() and (folder / "last.pt").exists():
        raise UserError(f"{folder} is not finished: train.py with --resume resumes it")
    model, content = read_model(folder / "model.pt")
    splits = read_splits(folder / "splits.json")
    record = read_json(folder / "config.json", "a run's configuration",
                       {"config": CONFIG, "digests": {"model": DIGEST, "initial_model": DIGEST},
                        "label_mean": [float, float], "label_std": [float, float]})
    if splits["source"] != content["splits_source"]:
        raise UserError(f"{folder}: splits.json names another source than model.pt")
    content["digest"] = state_digest(content["state"])
    there = {"model": content["digest"], "initial_model": content["initial_model"],
             "label_mean": content["mean"].tolist(), "label_std": content["std"].tolist()}
    recorded = {**record, **record["digests"]}
    differing = "; ".join(filter(None, (differences(record["config"], content["config"]),
                                        differences({key: recorded[key] for key in there}, there))))
    if differing:
        raise UserError(f"{folder}: config.json and model.pt are not of one run ({differing})")
    if content["config"]["splits"] != splits_digest(splits):
        raise UserError(f"{folder}: splits.json is not the one that the run was trained on")
    return model, content, splits


# --------------------------------------------------------------------------------------- evaluation


POOLED = {}  # by FeatDataset.key: for several runs a file is read once


def pooled_features(dataset, index):
    """float64[D]: the mean over time of a song's features."""
    key = dataset.key(index)
    if key not in POOLED:
        POOLED[key] = dataset[index][0].double().mean(0).numpy()
    return POOLED[key]


def ridge_predictions(data, split):
    """({song id: [valence, arousal]} by ridge on mean-pooled features, its penalty)."""
    if not data.ids["train"] or not data.ids["val"]:
        return None, None
    labels = {name: data.datasets[name].labels.numpy() for name in data.ids}
    x, std = {}, data.std.numpy()
    for name in dict.fromkeys(["train", "val", split]):
        dataset = data.datasets[name]
        pooled = ahead(functools.partial(pooled_features, dataset), range(len(dataset)))
        x[name] = np.stack([*Progress(pooled, total=len(dataset), desc=f"ridge {name}", unit="song",
                                      leave=False)])
    predict, penalty = ridge(x["train"], labels["train"] / std, x["val"], labels["val"] / std)
    pred = (predict(x[split]) * std).round(6) + 0.0
    return dict(zip(map(str, data.ids[split]), pred.tolist())), penalty


def evaluate(args, folder, arithmetic, open_features):
    """One run: what its metrics.json is to hold, and the annotations behind it."""
    model, content, splits = read_run(folder)
    config = content["config"]
    labels = args.labels or config["labels"]
    data = open_features(labels, splits)
    if config["features"] != data.digest:
        raise UserError(f"{folder} was trained on features {str(config['features'])[:16]}…, "
                        f"{data.root} holds {str(data.digest)[:16]}…: name its own with "
                        "--features, or extract them again with its settings")
    ids = data.ids[args.split]
    if not ids:
        raise UserError(f"{data.summary}: no {args.split} song to evaluate on")
    model.to(arithmetic.device, arithmetic.dtype)
    clips = DataLoader(FrozenOutputs(data.datasets[args.split], model, arithmetic), 1,
                       collate_fn=collate)
    progress = Progress(clips, desc=f"eval {folder.name}", unit="song")
    pred = model.predict(progress, arithmetic) * content["std"] + content["mean"]
    pred = pred.numpy().round(6) + 0.0
    if not np.isfinite(pred).all():
        raise UserError(f"{folder}: a prediction is NaN or infinite")
    pred, (other, penalty) = dict(zip(map(str, ids), pred.tolist())), data.ridge(args.split)
    found = {"run": folder.name, "finetune": config["finetune"], "precision": config["precision"],
             "source": splits["source"], "split": args.split, "labels": labels,
             "trained_on_labels": config["labels"], "songs": len(ids), "features": data.digest,
             "splits": splits_digest(splits),
             "label_values": label_digest(data.annotations, splits),
             "swapped_labels": data.manifest["swapped_labels"],
             "initial_model": content["initial_model"], "model": content["digest"],
             "numbers": measure_split(data.annotations, splits, args.split, pred, other),
             "ridge_penalty": penalty, "predictions": pred, "ridge_predictions": other}
    return found, config, data


def label_digest(annotations, splits):
    """sha256 over the labels of the splits' songs and their standard deviations."""
    return json_digest({str(song): annotations[song] for song in songs_of(splits)})


def caption_of(found):
    kind = "original" if found["labels"] == "shipped" else "corrected"
    return (f"{found['finetune']} · {kind} labels · {found['split']}, n = {found['songs']}\n"
            f"{found['source']}")


def predictions_table(found, annotations):
    """The text of predictions.csv."""
    return table_text(
        ["song_id", "valence_true", "arousal_true", "valence_pred", "arousal_pred"],
        [[song, *annotations[int(song)][::2], *(f"{value:.6f}" for value in pred)]
         for song, pred in found["predictions"].items()])


def write_report(found, folder, annotations, here):
    """metrics.json, predictions.csv and the figures; in a folder of their own where the labels are
    not those that the run was trained on."""
    other = "" if found["labels"] == found["trained_on_labels"] else f"-{found['labels']}"
    out = folder / f"eval-{found['split'].replace(' ', '-')}{other}"
    content = {**found, "environment": here}
    write_json(out / "metrics.json", {**content, "digest": json_digest(content)})
    ids, numbers = list(found["predictions"]), found["numbers"]
    true = np.array([annotations[int(song)][::2] for song in ids])
    pred = np.array(list(found["predictions"].values()))
    write_file(out / "predictions.csv", predictions_table(found, annotations))
    figures.draw_report(true, pred, numbers["metrics"], numbers["intervals"], numbers["confusion"],
                        out, caption_of(found))
    return out


def print_report(found):
    numbers = found["numbers"]
    metrics, intervals, counts = (numbers[key] for key in ("metrics", "intervals", "confusion"))
    heads = "MSE", "RMSE", "MAE", "z MSE", "z RMSE", "z MAE", "R²", "r", "CCC"
    print(f"\n{'':18}" + "".join(f"{head:>8}" for head in heads))
    for name in (*DIMENSIONS, "average"):
        rows = {name: metrics[name].values(),
                "  95% from": [interval[0] for interval in intervals[name].values()],
                "  to": [interval[1] for interval in intervals[name].values()],
                **{f"  {other}": values[name].values()
                   for other, values in numbers["baselines"].items()}}
        for label, row in rows.items():
            print(f"{label:18}" + "".join(f"{round(value, 4) + 0.0:8.4f}" for value in row))
        print(f"{'  ceiling':66}{numbers['ceiling_r2'][name]:8.4f}")
        if new := numbers.get("new_artists"):
            shown = "  ".join(f"{label} {new['metrics'][name][key]:.2f} "
                              f"[{new['intervals'][name][key][0]:.2f}, "
                              f"{new['intervals'][name][key][1]:.2f}]"
                              for label, key in (("R²", "r2"), ("r", "pearson"), ("CCC", "ccc")))
            print(f"  {new['songs']} songs by artists not in train or val: {shown}")
    q, edges = metrics["quadrant"], intervals["quadrant"]["accuracy"]
    print(f"\nquadrants right: {q['accuracy']:.1%} [{edges[0]:.1%}, {edges[1]:.1%}] of "
          f"{found['songs']}; macro F1 {q['macro_f1']:.4f}  (threshold 5; rows true, columns "
          "predicted)\n" + " " * 8 + "".join(f"{name:>8}" for name in QUADRANTS) + f"{'F1':>8}")
    for name, row in zip(QUADRANTS, counts):
        print(f"{name:8}" + "".join(f"{count:8d}" for count in row) + f"{q['f1'][name]:8.4f}")
    print_correlation(metrics, intervals, numbers["baselines"])
    if p := numbers.get("published_protocol"):
        print(f"published protocol (first 160 test songs): z-scored MSE {p['z_mse']:.4f} "
              f"(published {PUBLISHED['mse']}), quadrants right {p['quadrants_right']} (published "
              f"{PUBLISHED['quadrants']})")


def print_correlation(metrics, intervals, baselines):
    key = "valence_arousal_correlation"
    r, edges = metrics[key], intervals[key]["predicted"]
    collapsed = abs(r["predicted"]) >= 0.9 and abs(r["predicted"]) - abs(r["true"]) >= 0.2
    linear = baselines.get("ridge")
    print(f"\ncorrelation of valence with arousal: predicted {r['predicted']:.4f} "
          f"[{edges[0]:.4f}, {edges[1]:.4f}], true {r['true']:.4f}"
          + (f", ridge's {linear[key]['predicted']:.4f}" if linear else "")
          + (": a collapse, the two heads predict one thing" if collapsed else ""))
    better = [f"{name} (R² {linear[name]['r2']:.2f}, the network {metrics[name]['r2']:.2f})"
              for name in DIMENSIONS if linear and linear[name]["r2"] > metrics[name]["r2"]]
    if better:
        print(f"ridge on the same features does better than the network for {', '.join(better)}")


TABLE = [(name, key) for name in DIMENSIONS for key in ("z_mse", "r2", "pearson", "ccc")]


def table_row(metrics):
    return [metrics[name][key] for name, key in TABLE] + [
        metrics["quadrant"]["accuracy"], metrics["valence_arousal_correlation"]["predicted"]]


def differing_settings(evaluated, *apart):
    """"finetune, lr": in which settings, apart from some, evaluated runs differ; empty where in
    none."""
    settings = [config for _, config, _ in evaluated]
    return ", ".join(key for key in settings[0] if key not in apart
                     and any(each[key] != settings[0][key] for each in settings))


def print_runs(evaluated):
    """One row a run; mean ± standard deviation (of the sample) over runs that differ in the seed
    alone; ridge and the ceiling of the first."""
    found = [each for each, _, _ in evaluated]
    heads = [f"{name[:3]} {key}" for name, key in TABLE] + ["quadrants", "pred. r"]
    print(f"\n{'run':20}" + "".join(f"{head:>17}" for head in heads))
    rows = np.array([table_row(each["numbers"]["metrics"]) for each in found])
    for each, row in zip(found, rows):
        print(f"{each['run'][:19]:20}" + "".join(f"{value:17.4f}" for value in row))
    if differing := differing_settings(evaluated, "seed"):
        print(f"the runs differ in {differing}: no mean over them")
    else:
        pairs = zip(rows.mean(0), rows.std(0, ddof=1))
        print(f"{'mean ± std':20}" + "".join(f"{f'{mean:.4f} ± {std:.4f}':>17}"
                                             for mean, std in pairs))
    numbers = found[0]["numbers"]
    if "ridge" in numbers["baselines"]:
        print(f"{'ridge':20}" + "".join(f"{value:17.4f}"
                                        for value in table_row(numbers["baselines"]["ridge"])))
    tops = [numbers["ceiling_r2"][name] if key == "r2" else None for name, key in TABLE]
    print(f"{'ceiling':20}" + "".join(f"{value:17.4f}" if value else " " * 17 for value in tops))


# ------------------------------------------------------------------------------------------ verdict


def read_metrics(file):
    """An earlier metrics.json. Raises UserError where it is none or was edited."""
    content = read_json(file, "a metrics.json", {str: object})
    if "runs" in content:
        raise UserError(f"{file} is pooled over folds: verify the metrics.json of each fold")
    check_form(content, METRICS, f"{file} is not a metrics.json")
    digest = content.pop("digest")
    if digest != json_digest(content):
        raise UserError(f"{file} does not match its own digest: it was edited or damaged")
    if unknown := content.keys() - METRICS.keys() - {"run", "environment"}:
        raise UserError(f"{file} is not a metrics.json: {', '.join(sorted(unknown))} is nothing "
                        "that eval.py writes")
    songs = [content["predictions"], content["ridge_predictions"] or content["predictions"]]
    if any(abs(value) > 1e6 for each in songs for values in each.values() for value in values):
        raise UserError(f"{file} is not a metrics.json: a prediction far from any scale")
    if (content["ridge_penalty"] is None) != (content["ridge_predictions"] is None):
        raise UserError(f"{file} is not a metrics.json: a ridge penalty and predictions belong "
                        "together")
    if set(songs[0]) != set(songs[1]) or content["songs"] != len(songs[0]):
        raise UserError(f"{file} is not a metrics.json: two predictions for each of its songs")
    return content


def flat(value, name=""):
    """{"metrics.valence.mse": 1.2, "intervals.valence.mse[0]": 1.1, …} of nested dicts and lists;
    what is empty stays as it is."""
    if not isinstance(value, (dict, list)) or not value:
        return {name: value}
    pairs = ([(f"{name}.{key}".lstrip("."), inner) for key, inner in value.items()]
             if isinstance(value, dict) else
             [(f"{name}[{place}]", inner) for place, inner in enumerate(value)])
    return {key: leaf for place, inner in pairs for key, leaf in flat(inner, place).items()}


def compare_numbers(verdict, expected, annotations, splits):
    """Every number of an earlier metrics.json against what follows from its own predictions."""
    ids = [str(song) for song in splits[expected["split"]]]
    verdict.compare("songs", list(expected["predictions"]), ids)
    verdict.compare("splits", expected["splits"], splits_digest(splits))
    verdict.compare("labels", expected["label_values"], label_digest(annotations, splits))
    if set(ids) != set(expected["predictions"]):
        return
    follows = flat(measure_split(annotations, splits, expected["split"], expected["predictions"],
                                 expected["ridge_predictions"]))
    numbers = flat(expected["numbers"])
    for name in {**numbers, **follows}:
        verdict.compare(name, numbers.get(name, ABSENT), follows.get(name, ABSENT),
                        same=SIX_DECIMALS)


def verify_run(expected, file, found, data):
    """An evaluation just made against an earlier metrics.json; the exit code."""
    verdict = Verdict(file)
    verdict.compare_all(("finetune", "precision", "source", "split", "labels", "trained_on_labels",
                         "songs", "features", "splits", "label_values", "swapped_labels",
                         "initial_model"), expected, found)
    exact = expected["precision"] == "exact"
    verdict.compare("model", expected["model"], found["model"], like=not exact)
    compare_numbers(verdict, expected, data.annotations, data.splits)
    for kind, same, limit in (("predictions", 0, 0 if exact else TOLERANCE),
                              ("ridge_predictions", 2e-6, 0)):
        then, now = flat(expected[kind] or {}), flat(found[kind] or {})
        for name in {**then, **now}:
            verdict.compare(f"{kind.replace('_', ' ')} {name}", then.get(name), now.get(name),
                            limit, same)
    verdict.compare("ridge penalty", expected["ridge_penalty"], found["ridge_penalty"],
                    same=1e-9 * (found["ridge_penalty"] or 0))
    return verdict.finish(f"features, model, predictions and numbers of {file}, "
                          f"{found['precision']}")


def verify_file(expected, file, deam):
    """Do the numbers of a metrics.json follow from its predictions and DEAM's labels? Beside a
    run's other files, are its digests theirs? The exit code."""
    annotations = DEAMHandler(deam).annotations
    if expected["labels"] == "corrected":
        annotations = corrected(annotations, expected["swapped_labels"] or [])
    beside = file.resolve().parent.parent
    own = beside / "splits.json"
    splits = read_splits(own if own.exists() else HERE / "splits.json")
    if unknown := [song for song in songs_of(splits) if song not in annotations]:
        raise UserError(f"{deam} has no labels of {len(unknown)} songs of the splits: give the "
                        "DEAM that the file is about")
    verdict = Verdict(file)
    compare_numbers(verdict, expected, annotations, splits)
    if own.exists():
        verdict.compare("source", expected["source"], splits["source"])
    table = file.with_name("predictions.csv")
    if table.exists() and set(expected["predictions"]) <= set(map(str, annotations)):
        verdict.compare("predictions.csv", read_text(table, "a table").splitlines(),
                        predictions_table(expected, annotations).splitlines())
    if (beside / "manifest.json").exists():
        manifest = read_manifest(beside / "manifest.json")
        verdict.compare("manifest.json", expected["features"], manifest["digest"])
        verdict.compare("swapped labels", expected["swapped_labels"], manifest["swapped_labels"])
    if (beside / "config.json").exists():
        _, content, _ = read_run(beside)
        config = content["config"]
        there = {"model": content["digest"], "initial_model": content["initial_model"],
                 "source": splits["source"], "trained_on_labels": config["labels"],
                 **{key: config[key] for key in ("features", "finetune", "precision")}}
        verdict.compare_all(there, expected, there)
    return verdict.finish(f"the numbers of {file} follow from its predictions and DEAM's labels")


# ------------------------------------------------------------------------------- folds, comparisons


def disjoint(evaluated):
    """Whether several runs were evaluated on songs that no two share: folds."""
    songs = [song for found, _, _ in evaluated for song in found["predictions"]]
    return len(evaluated) > 1 and len(set(songs)) == len(songs)


def pool(evaluated):
    """One report over runs with disjoint songs; intervals by resampling artists. Raises UserError
    for runs that differ in more than their songs and seed."""
    found, _, data = evaluated[0]
    if differing := differing_settings(evaluated, "seed", "splits", "songs"):
        raise UserError(f"these runs have no song in common, and differ in {differing}: give the "
                        "folds of one configuration, or one run at a time")
    merged = {key: {song: values for each, _, _ in evaluated for song, values in
                    (each[key] or {}).items()} for key in ("predictions", "ridge_predictions")}
    ids, annotations = list(map(int, merged["predictions"])), data.annotations
    name = found["run"].rstrip("0123456789").removesuffix("-fold")
    own = "model", "initial_model", "splits", "label_values", "ridge_penalty"  # one run's each
    digests = {each["run"]: {key: each[key] for key in own} for each, _, _ in evaluated}
    found = {key: value for key, value in found.items() if key not in own}
    return {**found, **merged, "run": f"{name}-pooled", "songs": len(ids), "runs": digests,
            "split": f"pooled {found['split']}",
            "numbers": measure(annotations, ids, ids, merged["predictions"],
                               merged["ridge_predictions"], groups=artist_groups(ids))}


def print_difference(first, second, annotations):
    """Metrics of one set of predictions less those of another on the same songs, with intervals of
    the difference, by resampling artists: what a claim of improvement needs."""
    if set(first["predictions"]) != set(second["predictions"]):
        raise UserError(f"{first['run']} and {second['run']} predict different songs: nothing to "
                        "compare song by song")
    if first["labels"] != second["labels"]:
        raise UserError(f"{first['run']} and {second['run']} were trained on different labels: say "
                        "with --labels which to compare with")
    ids = list(map(int, first["predictions"]))
    true = np.array([annotations[song][::2] for song in ids])
    a, b = (np.array([each["predictions"][str(song)] for song in ids]) for each in (first, second))

    found, intervals = paired_difference(true, a, b, artist_groups(ids))
    print(f"\n{first['run']} less {second['run']}, the same {len(ids)} songs, 95% over artists")
    for name, values in found.items():
        print(f"  {name:10}" + "   ".join(
            f"{key} {value:+.4f} [{intervals[name][key][0]:+.4f}, {intervals[name][key][1]:+.4f}]"
            for key, value in values.items()))


# ---------------------------------------------------------------------------------------------- run


def feature_folders(args):
    """open(labels, splits) → DEAMFeatHandler, the same one for all runs that ask for the same."""
    opened = {}

    def open_features(labels, splits):
        key = labels, splits_digest(splits)
        if key not in opened:
            data = opened[key] = DEAMFeatHandler(args.features, splits, labels=labels)
            data.ridge = functools.cache(functools.partial(ridge_predictions, data))
        return opened[key]

    return open_features


def tell(found, data, folder, out):
    print(f"{folder}: {found['finetune']}, {found['split']} split, {found['songs']} songs, "
          f"{found['labels']} labels, trained in {found['precision']}")
    for note in data.notes():
        print(note)
    if found["labels"] != found["trained_on_labels"]:
        print(f"for comparison: the run was trained on {found['trained_on_labels']} labels")
    models = {found["run"]: found} if "model" in found else found["runs"]
    print(f"features {found['features']}\n" + "".join(
        f"model    {each['model']}  {name}\n" for name, each in models.items()), end="")
    print_report(found)
    print(f"written: {out}/metrics.json, predictions.csv and four figures" if out else
          "nothing written: what is verified is in this run's folder")


def run(args):
    if args.verify and (len(args.runs) > 1 or args.against):
        raise UserError("--verify is about one run: name only one")
    if not args.runs and not (args.verify and args.deam):
        raise UserError("name a run, or give --verify FILE and --deam PATH")
    expected = read_metrics(args.verify) if args.verify else None  # before anything is written
    if not args.runs:
        return verify_file(expected, args.verify, args.deam)
    arithmetic, open_features = Arithmetic("exact", args.device), feature_folders(args)
    here = environment(arithmetic.device)
    evaluated = [evaluate(args, folder, arithmetic, open_features) for folder in args.runs]
    folds = disjoint(evaluated)
    for found, _, data in evaluated:
        if found["songs"] < 2 and not folds:
            raise UserError(f"{data.summary}: too few {args.split} songs to evaluate on")
    for folder, (found, _, data) in zip(args.runs, evaluated):
        out = None
        if not (expected and args.verify.resolve().is_relative_to(folder.resolve())):
            out = write_report(found, folder, data.annotations, here)  # never over what is verified
        if not folds:
            tell(found, data, folder, out)
    pooled = pool(evaluated) if folds else None
    if pooled:
        out = write_report(pooled, args.runs[0].parent / pooled["run"], evaluated[0][2].annotations,
                           here)
        tell(pooled, evaluated[0][2], f"{len(args.runs)} runs", out)
    elif len(evaluated) > 1:
        print_runs(evaluated)
    if args.against:
        others = [evaluate(args, folder, arithmetic, open_features) for folder in args.against]
        if any(len(each) > 1 and not disjoint(each) for each in (evaluated, others)):
            raise UserError("--against compares one run with one other, or folds with folds")
        second = pool(others) if disjoint(others) else others[0][0]
        print_difference(pooled or evaluated[0][0], second, evaluated[0][2].annotations)
    if expected:
        return verify_run(expected, args.verify, *evaluated[0][::2])
    return 0


if __name__ == "__main__":
    execute(run, ARGS)
