"""Evaluate runs on cached features: numbers with their uncertainty, figures, a verdict; or predict one's own music.

  python eval.py runs/last1                            # no network, no backbone, no GPU needed
  python eval.py runs/seed0 runs/seed1 runs/seed2      # and a table of the runs, mean ± standard deviation
  python eval.py runs/last1 --verify metrics.json      # REPRODUCED (exit 0), CLOSE (3) or NOT REPRODUCED (1)
  python eval.py runs/last1 --audio song.mp3 folder    # valence and arousal of any audio file
"""

import functools
import io
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import soundfile
import torch
from torch.utils.data import DataLoader

from common import (BadClip, DEAMFeatHandler, EmotionModel, FrozenOutputs, Parser, Progress, UserError, ahead,
                    arithmetic, backbone_of, collate, environment, json_digest, pick_device, read_json, read_tensors,
                    read_windows, run_script, set_determinism, state_digest, write_csv, write_file, write_json)

DIMENSIONS = ("valence", "arousal")
QUADRANTS = ("HV/HA", "LV/HA", "LV/LA", "HV/LA")  # high or low valence / arousal, from 5 on
MOODS = ("excited, happy", "tense, angry", "sad, tired", "calm, content")  # after Russell 1980
PUBLISHED = {"mse": 0.4945, "quadrants": 107,  # on the first 160 of the test songs whose ids have this digest
             "test_songs": "6d451f0f9be00953438aba123b3d71423c7f45a0cc1f13a078e2217a1ead6e03"}
TOLERANCE = 0.01  # on the 1–9 scale: --verify calls larger differences of a prediction NOT REPRODUCED
ANNOTATORS = 10  # a DEAM song, at least; the label is their mean
WINDOW = 45  # seconds of --audio: the length of a DEAM song
COLOURS = {"valence": "#0072b2", "arousal": "#d55e00"}  # Okabe & Ito: distinct for the colour-blind and in grey


def parser():
    p = Parser(__doc__, threads=os.cpu_count() or 1)
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder that train.py wrote")
    p.add_argument("--features", type=Path, default=Path("DEAM_feats"), metavar="FOLDER", help="what extract.py wrote")
    p.add_argument("--split", choices=["train", "val", "test"], default="test", help="which songs")
    p.add_argument("--labels", choices=["shipped", "corrected"],
                   help="compare with these labels (default: those that the run was trained on)")
    p.add_argument("--precision", choices=["float32", "float64", "tf32", "bfloat16"], default="float64",
                   help="arithmetic of the model")
    p.add_argument("--verify", type=Path, metavar="FILE", help="metrics.json of an earlier evaluation to compare with")
    p.add_argument("--pdf", action="store_true", help="write the figures as PDF too")
    p.add_argument("--allow-missing", action="store_true", help="evaluate on the songs whose features are there")
    p.add_argument("--audio", type=Path, nargs="+", metavar="FILE",
                   help="predict these audio files, or all in these folders, instead")
    p.add_argument("--weights", type=Path, metavar="FILE",
                   help="with --audio: the backbone's weights, if extract.py was given a file")
    p.add_argument("--csv", type=Path, metavar="FILE", help="with --audio: write the table there")
    return p


def load_run(folder):
    """(model, checkpoint) of a run. Raises UserError for anything else."""
    checkpoint = read_tensors(folder / "model.pt", "a trained model")
    try:
        settings = checkpoint["settings"]
        model = EmotionModel(settings["bundle"], settings["layer"], checkpoint["config"]["finetune"])
        model.load_state_dict(checkpoint["state"])
        model.mean, model.std = checkpoint["mean"], checkpoint["std"]
        return model, checkpoint
    except (TypeError, KeyError, RuntimeError, AttributeError):
        raise UserError(f"{folder / 'model.pt'} is not a model that train.py wrote") from None


def load_data(args, folder, checkpoint, open_features):
    """The features that the run was trained on, the split's files checked. Raises UserError where they are others.
    open_features(labels): their DEAMFeatHandler, the same one for all runs of a call."""
    config = checkpoint["config"]
    data = open_features(args.labels or config["labels"])
    runs, here = ((settings["bundle"], settings["layer"]) for settings in (checkpoint["settings"], data.settings))
    if runs != here:
        raise UserError(f"{folder} was trained on {runs[0]} layer {runs[1]}, {data.root} holds {here[0]} layer "
                        f"{here[1]}: name its own features with --features")
    if config["features_digest"] != data.digest:
        raise UserError(f"{folder} was trained on features {str(config['features_digest'])[:16]}…, {data.root} holds "
                        f"{str(data.digest)[:16]}…: name its own with --features, or extract them again with its "
                        "settings")
    if config["splits_digest"] != data.splits_digest:
        raise UserError(f"{folder} was trained on other splits: name them with --splits")
    if len(data.ids[args.split]) < 2:
        raise UserError(f"{data.summary}: too few {args.split} songs to evaluate on")
    data.check(args.split)
    return data


# ------------------------------------------------------------------------------------------------ metrics
# All of them work on [..., N] or [..., N, 2] arrays over the songs, so that 10,000 resamples take one call.


def divide(a, b):
    """a / b, and 0 where b is 0: a correlation with a constant, R² of equal labels."""
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=np.asarray(b) > 0)


def correlation(a, b):
    """Pearson's r over the last axis; 0 where one is constant."""
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    return divide((a * b).mean(-1), np.sqrt((a * a).mean(-1) * (b * b).mean(-1)))


def regression(true, pred, scale):
    """Metrics of one dimension, [..., N] on the 1–9 scale; z-scored ones divide by `scale`, train+val's σ.
    R² is against the mean of these songs; concordance (ccc): Lin 1989, Biometrics 45."""
    mse, mae, variance = ((pred - true) ** 2).mean(-1), abs(pred - true).mean(-1), true.var(-1)
    covariance = (true * pred).mean(-1) - true.mean(-1) * pred.mean(-1)
    return {"mse": mse, "rmse": np.sqrt(mse), "mae": mae,
            "z_mse": mse / scale**2, "z_rmse": np.sqrt(mse) / scale, "z_mae": mae / scale,
            "r2": np.where(variance > 0, 1 - divide(mse, variance), 0.0), "pearson": correlation(true, pred),
            "ccc": divide(2 * covariance, variance + pred.var(-1) + (true.mean(-1) - pred.mean(-1)) ** 2)}


def quadrant(values, threshold=5.0):
    """Index into QUADRANTS for values[..., 2]."""
    high_valence, high_arousal = np.moveaxis(values >= threshold, -1, 0)
    return np.where(high_arousal, np.where(high_valence, 0, 1), np.where(high_valence, 3, 2))


def all_metrics(true, pred, std):
    """Everything that eval reports of true and pred [..., N, 2] on the 1–9 scale; std[2] of train+val."""
    metrics = {name: regression(true[..., n], pred[..., n], std[n]) for n, name in enumerate(DIMENSIONS)}
    metrics["average"] = {key: (metrics["valence"][key] + metrics["arousal"][key]) / 2 for key in metrics["valence"]}
    t, p = quadrant(true), quadrant(pred)
    f1 = {name: divide(2 * ((t == n) & (p == n)).sum(-1), (t == n).sum(-1) + (p == n).sum(-1))
          for n, name in enumerate(QUADRANTS)}
    metrics["quadrant"] = {"accuracy": (t == p).mean(-1), "f1": f1, "macro_f1": sum(f1.values()) / 4}
    metrics["valence_arousal_correlation"] = {"true": correlation(true[..., 0], true[..., 1]),
                                              "predicted": correlation(pred[..., 0], pred[..., 1])}
    return metrics


def confusion(true, pred):
    """4×4 counts: rows true, columns predicted quadrant."""
    counts = np.zeros((4, 4), int)
    np.add.at(counts, (quadrant(true), quadrant(pred)), 1)
    return counts


def mapped(function, *trees):
    """Apply a function to the leaves of nested dicts of one shape."""
    if not isinstance(trees[0], dict):
        return function(*trees)
    return {key: mapped(function, *(tree[key] for tree in trees)) for key in trees[0]}


def bootstrap(true, pred, std, resamples=10_000):
    """95 % percentile intervals over songs (Efron & Tibshirani 1993), [low, high] for every metric; fixed seed."""
    generator, chunks = np.random.default_rng(0), []
    for start in range(0, resamples, 1000):
        songs = generator.integers(0, len(true), (min(1000, resamples - start), len(true)))
        chunks.append(all_metrics(true[songs], pred[songs], std))
    return mapped(lambda *parts: np.quantile(np.concatenate(parts), [0.025, 0.975]).tolist(), *chunks)


def ceiling(true, spread):
    """The R² of a perfect model, [2]: what is left of the labels' variance without the noise of a mean over ANNOTATORS,
    whose standard deviation a song is spread[N, 2]."""
    return 1 - (spread**2).mean(0) / ANNOTATORS / true.var(0)


def ridge(x, y, x_val, y_val, penalties=10.0 ** np.arange(-2, 7.5, 0.5)):
    """Ridge regression in closed form. x[N, D] is standardised; the penalty with the lowest MSE on val is chosen.
    Returns (function from x to y, penalty)."""
    centre, scale = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1)
    u, s, vt = np.linalg.svd((x - centre) / scale, full_matrices=False)

    def predictor(penalty):
        weights = vt.T @ ((s / (s**2 + penalty))[:, None] * (u.T @ (y - y.mean(0))))
        return lambda x: (x - centre) / scale @ weights + y.mean(0)

    best = min(penalties, key=lambda penalty: ((predictor(penalty)(x_val) - y_val) ** 2).mean())
    return predictor(best), float(best)


@functools.cache
def baselines(data, split, std):
    """Predictions [N, 2] that need no network: the mean of the training labels, and ridge on mean-pooled features.
    Returns (predictions by name, ridge's penalty). std: a tuple, train+val's σ of both dimensions."""
    splits = dict.fromkeys(["train", "val", split])
    if not data.ids["train"] or not data.ids["val"]:
        return {}, None
    labels = {name: data.datasets[name].labels.numpy() for name in splits}
    for name in splits:
        dataset = data.datasets[name]
        pooled = ahead(lambda index: dataset[index][0].double().mean(0).numpy(), range(len(dataset)))
        splits[name] = np.stack([*Progress(pooled, total=len(dataset), desc=f"baselines {name}", unit="song")])
    predict, penalty = ridge(splits["train"], labels["train"] / std, splits["val"], labels["val"] / std)
    mean = np.broadcast_to(labels["train"].mean(0), labels[split].shape)
    return {"training mean": mean, "ridge": predict(splits[split]) * std}, penalty


def print_report(metrics, intervals, counts, top, others):
    heads = "MSE", "RMSE", "MAE", "z MSE", "z RMSE", "z MAE", "R²", "r", "CCC"
    print(f"\n{'':18}" + "".join(f"{head:>8}" for head in heads))
    for name in (*DIMENSIONS, "average"):
        rows = {name: metrics[name].values(), "  95 % from": [interval[0] for interval in intervals[name].values()],
                "  to": [interval[1] for interval in intervals[name].values()],
                **{f"  {other}": others[other][name].values() for other in others}}
        for label, row in rows.items():
            print(f"{label:18}" + "".join(f"{round(value, 4) + 0.0:8.4f}" for value in row))
        print(f"{'  perfect model':66}{top[name]:8.4f}")
    q, edges = metrics["quadrant"], intervals["quadrant"]["accuracy"]
    print(f"\nquadrants right: {q['accuracy']:.1%} [{edges[0]:.1%}, {edges[1]:.1%}] of {counts.sum()}; macro F1 "
          f"{q['macro_f1']:.4f}  (threshold 5; rows true, columns predicted)")
    print(" " * 8 + "".join(f"{name:>8}" for name in QUADRANTS) + f"{'F1':>8}")
    for name, row in zip(QUADRANTS, counts):
        print(f"{name:8}" + "".join(f"{count:8d}" for count in row) + f"{q['f1'][name]:8.4f}")
    r, edges = metrics["valence_arousal_correlation"], intervals["valence_arousal_correlation"]["predicted"]
    collapsed = abs(r["predicted"]) >= 0.9 and abs(r["predicted"]) - abs(r["true"]) >= 0.2
    print(f"\ncorrelation of valence with arousal: predicted {r['predicted']:.4f} [{edges[0]:.4f}, {edges[1]:.4f}], "
          f"true {r['true']:.4f}"
          + (": a collapse, the two heads predict one thing" if collapsed else ""))
    if p := metrics.get("published_protocol"):
        print(f"published protocol (first 160 test songs): z-scored MSE {p['z_mse']:.4f} (published "
              f"{PUBLISHED['mse']}), "
              f"quadrants right {p['quadrants_right']} (published {PUBLISHED['quadrants']})")


# ------------------------------------------------------------------------------------------------ figures


def draw(folder, caption, true, pred, metrics, intervals, counts, pdf):
    """Write the four figures of the published report; captions say run, split, labels and n."""
    kinds = ["png", "pdf"] if pdf else ["png"]
    scale = {"xlim": (1, 9), "ylim": (1, 9), "xticks": range(1, 10), "yticks": range(1, 10), "aspect": "equal"}

    def save(figure, name, note=" · [95 % bootstrap intervals]"):
        figure.suptitle(caption + note, fontsize=9)
        for kind in kinds:
            image = io.BytesIO()
            figure.savefig(image, format=kind, dpi=150, metadata={"CreationDate": None} if kind == "pdf" else None)
            write_file(folder / f"{name}.{kind}", image.getvalue())
        plt.close(figure)

    def between(edges):
        return f"[{edges[0]:.2f}, {edges[1]:.2f}]"

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 5.5), layout="constrained")
    for n, (axis, name) in enumerate(zip(axes, DIMENSIONS)):
        m, edges = metrics[name], intervals[name]
        axis.plot([1, 9], [1, 9], "k--", linewidth=1, label="y = x")
        axis.scatter(true[:, n], pred[:, n], s=18, alpha=0.6, color=COLOURS[name], marker="os"[n], label="songs")
        axis.set(xlabel=f"true {name} (1–9)", ylabel=f"predicted {name} (1–9)", **scale)
        axis.set_title(f"R² {m['r2']:.2f} {between(edges['r2'])}   r {m['pearson']:.2f} {between(edges['pearson'])}\n"
                       f"CCC {m['ccc']:.2f} {between(edges['ccc'])}", fontsize=9)
        axis.legend(loc="upper left")
        axis.grid(alpha=0.3)
    save(figure, "true_vs_predicted")

    r, edges = metrics["valence_arousal_correlation"], intervals["valence_arousal_correlation"]
    figure, axis = plt.subplots(figsize=(6.5, 7), layout="constrained")
    axis.axhline(5, color="k", linewidth=1)
    axis.axvline(5, color="k", linewidth=1)
    axis.scatter(*true.T, s=24, facecolors="none", edgecolors="#555555",
                 label=f"true, r {r['true']:.2f} {between(edges['true'])}")
    axis.scatter(*pred.T, s=22, alpha=0.7, marker="^", color="#cc79a7",
                 label=f"predicted, r {r['predicted']:.2f} {between(edges['predicted'])}")
    for name, mood, x, y in zip(QUADRANTS, MOODS, (8.9, 1.1, 1.1, 8.9), (8.65, 8.65, 1.15, 1.15)):
        axis.text(x, y, f"{name}: {mood}", ha="right" if x > 5 else "left", fontsize=9, weight="bold", color="#555555")
    axis.set(xlabel="valence (1–9)", ylabel="arousal (1–9)", **scale)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8)
    axis.grid(alpha=0.3)
    save(figure, "plane")

    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axis = plt.subplots(figsize=(6, 5.6), layout="constrained")
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in range(4):
        for column in range(4):
            axis.text(column, row, f"{counts[row, column]}\n{shares[row, column]:.0%}", ha="center", va="center",
                      color="white" if shares[row, column] > 0.5 else "black")
    axis.set_xticks(np.arange(0.5, 3), minor=True)
    axis.set_yticks(np.arange(0.5, 3), minor=True)
    axis.grid(which="minor", color="white", linewidth=2)
    axis.tick_params(which="minor", length=0)
    edges = intervals["quadrant"]["accuracy"]
    axis.set(xlabel="predicted quadrant", xticks=range(4), xticklabels=QUADRANTS,
             ylabel="true quadrant", yticks=range(4), yticklabels=QUADRANTS)
    axis.set_title(f"quadrants right: {metrics['quadrant']['accuracy']:.1%} [{edges[0]:.1%}, {edges[1]:.1%}]")
    figure.colorbar(image, label="share of the row", shrink=0.8)
    save(figure, "confusion")

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True, layout="constrained")
    for n, (axis, name) in enumerate(zip(axes, DIMENSIONS)):
        axis.hist(pred[:, n], bins=np.arange(1, 9.1, 0.5), alpha=0.6, color=COLOURS[name], label="predicted")
        axis.hist(true[:, n], bins=np.arange(1, 9.1, 0.5), histtype="step", color="k", linewidth=1.5, label="true")
        axis.set(xlabel=f"{name} (1–9)", ylabel="songs" if n == 0 else None, xlim=(1, 9), xticks=range(1, 10))
        axis.legend()
    save(figure, "histograms", note="")


# ----------------------------------------------------------------------------------------------- verdict


def flat(metrics, prefix=""):
    """{"valence.mse": array(1.2), …}: the numbers, and lists of numbers, of nested dicts under dotted names."""
    numbers = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            numbers |= flat(value, f"{prefix}{key}.")
        else:
            numbers[f"{prefix}{key}"] = np.array(value, float)
    return numbers


def verify(expected_file, found):
    """Compare `found` (a metrics.json's content) with an earlier one, line by line; returns the exit code.
    Raises UserError for a file that is no metrics.json, or of other songs."""
    expected = read_json(expected_file, "an earlier metrics.json")
    try:
        songs, numbers = expected["predictions"], flat(expected["metrics"])
        other = [key for key in ("splits", "split", "labels") if expected[key] != found[key]]
        if other or list(songs) != list(found["predictions"]):
            raise UserError(f"{expected_file} is about other songs or labels ({expected['split']}, {len(songs)} songs "
                            f"of splits {expected['splits'][:16]}…, {expected['labels']} labels): "
                            "verify with the same --split, --splits and --labels")
        difference = float(np.abs(np.array(list(songs.values())) - np.array(list(found["predictions"].values()))).max())
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{expected_file} is not a metrics.json that eval.py wrote") from None

    def line(name, delta, then, now):
        verdict = "identical" if delta == 0 else f"close (max |Δ| = {delta:.1e})" if delta < TOLERANCE else "DIFFERENT"
        print(f"{name:38} {verdict:28} expected {then}, found {now}")

    print(f"\ncompared with {expected_file}:")
    for key in ("features", "splits", "initial_model", "model"):
        then, now = str(expected.get(key)), str(found[key])
        line(key.replace("_", " "), 0 if then == now else np.inf, then[:16], now[:16])
    then, now = json_digest(songs), json_digest(found["predictions"])
    line(f"predictions of {len(songs)} songs", difference, then[:16], now[:16])
    now = flat(found["metrics"])
    for name, value in numbers.items():
        delta = abs(value - now[name]).max() if name in now and now[name].shape == value.shape else np.inf
        both = value, now.get(name, np.array(np.nan))
        shown = [f"{v:.6g}" if v.ndim == 0 else v.astype(int).tolist() for v in both]
        line(name, 0 if delta < 5e-7 else delta, *shown)
    if difference == 0:
        print("REPRODUCED: every prediction is the same to six decimals")
        return 0
    if difference < TOLERANCE:
        print(f"CLOSE: predictions differ by at most {difference:.1e}, below {TOLERANCE} on the 1–9 scale")
        return 3
    print(f"NOT REPRODUCED: a prediction differs by {difference:.2g}, the limit is {TOLERANCE} on the 1–9 scale")
    return 1


# -------------------------------------------------------------------------------------------------- runs


def evaluate(args, folder, device, open_features):
    """One run: print, write and return what metrics.json holds."""
    dtype, autocast = arithmetic(args.precision, device)
    model, checkpoint = load_run(folder)
    data = load_data(args, folder, checkpoint, open_features)
    model.to(device, dtype)
    ids, dataset = data.ids[args.split], data.datasets[args.split]
    clips = DataLoader(FrozenOutputs(dataset, model, autocast), 1, collate_fn=collate)
    pred = model.predict(Progress(clips, desc=f"eval {folder.name}", unit="song"), autocast)
    pred = (pred * model.std + model.mean).numpy().round(6)
    true, std = dataset.labels.numpy(), model.std.numpy()
    metrics, intervals = mapped(float, all_metrics(true, pred, std)), bootstrap(true, pred, std)
    counts = confusion(true, pred)
    metrics["quadrant"]["confusion"] = counts.tolist()
    if data.corpus == "DEAM" and json_digest(ids) == PUBLISHED["test_songs"]:
        # the published loader dropped the last partial batch
        metrics["published_protocol"] = {"z_mse": float((((pred - true) / std)[:160] ** 2).mean()),
                                         "quadrants_right": int((quadrant(true) == quadrant(pred))[:160].sum())}
    spread = np.array([[float(data.annotations[song][n]) for n in (1, 3)] for song in ids])
    top = dict(zip(DIMENSIONS, ceiling(true, spread).tolist()))
    top["average"] = sum(top.values()) / 2
    others, penalty = baselines(data, args.split, tuple(std))
    others = {name: mapped(float, all_metrics(true, other, std)) for name, other in others.items()}
    found = {"run": folder.name, "corpus": data.corpus, "split": args.split,
             "labels": data.labels, "trained_on_labels": checkpoint["config"]["labels"],
             "precision": args.precision, "songs": len(ids), "features": data.digest, "splits": data.splits_digest,
             "initial_model": checkpoint["initial_model"], "model": state_digest(checkpoint["state"]),
             "metrics": metrics, "intervals": intervals, "ceiling_r2": top,
             "baselines": others, "ridge_penalty": penalty,
             "predictions": dict(zip(map(str, ids), pred.tolist())), "environment": environment(device)}
    print(f"{folder}: {checkpoint['config']['finetune']} on {data.corpus}, {args.split} split, {len(ids)} songs, "
          f"{data.labels} labels, {args.precision} on {device}")
    for note in data.notes():
        print(note)
    if data.labels != checkpoint["config"]["labels"]:
        print(f"for comparison: the run was trained on {checkpoint['config']['labels']} labels")
    print(f"features {data.digest}\nmodel    {found['model']}")
    print_report(metrics, intervals, counts, top, others)
    if data.corpus == "demo":
        print("These songs and labels are synthetic: the numbers say nothing about DEAM.")
    out = folder / f"eval-{args.split}"
    write_json(out / "metrics.json", found)
    table = [[song, *t, *(f"{value:.6f}" for value in p)] for song, t, p in zip(ids, true.tolist(), pred.tolist())]
    header = ["song_id", "valence_true", "arousal_true", "valence_pred", "arousal_pred"]
    write_csv(out / "predictions.csv", header, table)
    draw(out, f"{folder.name} · {data.corpus} {args.split} · {data.labels} labels · n = {len(ids)}",
         true, pred, metrics, intervals, counts, args.pdf)
    print(f"written: {out}/metrics.json, predictions.csv and four figures")
    return found


def print_runs(all_found):
    """One row a run, then mean ± standard deviation (of the sample) over the runs."""
    keys = [(name, key) for name in DIMENSIONS for key in ("z_mse", "r2", "pearson", "ccc")]
    rows = np.array([[m[name][key] for name, key in keys] + [m["quadrant"]["accuracy"]]
                     for m in (found["metrics"] for found in all_found)])
    print(f"\n{'run':20}" + "".join(f"{name[:3] + ' ' + key:>17}" for name, key in keys) + f"{'quadrants':>17}")
    for found, row in zip(all_found, rows):
        print(f"{found['run']:20}" + "".join(f"{value:17.4f}" for value in row))
    pairs = zip(rows.mean(0), rows.std(0, ddof=1))
    print(f"{'mean ± std':20}" + "".join(f"{f'{mean:.4f} ± {std:.4f}':>17}" for mean, std in pairs))


# ------------------------------------------------------------------------------------- one's own music


def predict_audio(args, folder, device):
    """Print valence and arousal of audio files, the backbone set as for the run's features. Returns the exit code."""
    model, checkpoint = load_run(folder)
    settings, (dtype, autocast) = checkpoint["settings"], arithmetic(args.precision, device)
    set_determinism(args.threads, settings.get("precision", "float32"))
    feature_dtype, feature_autocast = arithmetic(settings.get("precision", "float32"), device)
    backbone = backbone_of(settings, args.weights, folder)
    stored = getattr(torch, settings.get("store", "float32"))
    backbone.model.to(device, feature_dtype)
    model.to(device, dtype).eval()
    known = {f".{name.lower()}" for name in soundfile.available_formats()} | {".aif", ".oga", ".opus"}
    files = []
    for path in args.audio:
        files += sorted(f for f in path.rglob("*") if f.suffix.lower() in known) if path.is_dir() else [path]
    if not files:
        raise UserError("no audio files in the folders given with --audio")
    rows, failed = [], 0
    print(f"{'valence':>8}{'arousal':>9}   {'quadrant':24}{'spread over windows':>20}   song")
    for file in files:
        windows = []
        try:
            for waveform, _ in read_windows(file, backbone.sample_rate, feature_dtype, WINDOW):
                with feature_autocast():
                    features = backbone.hidden_states(waveform[None], settings["layer"])[0].to(stored)
                with torch.no_grad(), autocast():
                    windows.append(model([model.frozen(features)]).double().cpu()[0] * model.std + model.mean)
        except BadClip as error:
            print(f"failed: {file}: {error}", flush=True)
            failed += 1
            continue
        windows = torch.stack(windows).numpy()
        (valence, arousal), (valence_spread, arousal_spread) = windows.mean(0), windows.std(0)
        n = int(quadrant(windows.mean(0)))
        over = f"±{valence_spread:.2f} ±{arousal_spread:.2f} of {len(windows)}" if len(windows) > 1 else "one window"
        print(f"{valence:8.3f}{arousal:9.3f}   {QUADRANTS[n] + ' ' + MOODS[n]:24}{over:>20}   {file}", flush=True)
        values = [f"{value:.6f}" for value in (valence, arousal, valence_spread, arousal_spread)]
        rows.append([file, *values, len(windows), QUADRANTS[n], MOODS[n]])
    if args.csv:
        header = ["song", "valence", "arousal", "valence_spread", "arousal_spread", "windows", "quadrant", "mood"]
        write_csv(args.csv, header, rows)
    return 1 if failed else 0


def run(args):
    device = pick_device(args.device)
    set_determinism(args.threads, args.precision)
    if (args.verify or args.audio) and len(args.runs) > 1:
        raise UserError("--verify and --audio are about one run: name only one")
    if (args.weights or args.csv) and not args.audio:
        raise UserError("--weights and --csv go with --audio")
    if args.audio:
        return predict_audio(args, args.runs[0], device)
    open_features = functools.cache(lambda labels: DEAMFeatHandler(args.features, args.splits, labels=labels,
                                                                   allow_missing=args.allow_missing))
    all_found = [evaluate(args, folder, device, open_features) for folder in args.runs]
    if len(all_found) > 1:
        print_runs(all_found)
    return verify(args.verify, all_found[0]) if args.verify else 0


def main():
    run_script(run, parser(), "the same command starts the evaluation again")


if __name__ == "__main__":
    main()
