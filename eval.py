"""Evaluate a run on cached features: numbers, figures, and a verdict on whether an earlier result is reproduced.

  python eval.py runs/last1                            # no network, no backbone, no GPU needed
  python eval.py runs/last1 --split val
  python eval.py runs/last1 --verify metrics.json      # REPRODUCED (exit 0), CLOSE (3) or NOT REPRODUCED (1)
"""

import csv
import io
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from torch.utils.data import DataLoader

from common import (DEAMFeatHandler, EmotionModel, FrozenOutputs, Parser, Progress, UserError, arithmetic, collate, environment,
                    json_digest, pick_device, read_json, read_tensors, run_script, set_determinism, state_digest,
                    write_file, write_json)

DIMENSIONS = ("valence", "arousal")
QUADRANTS = ("HV/HA", "LV/HA", "LV/LA", "HV/LA")  # high or low valence / arousal, from 5 on
PUBLISHED = {"test_songs": "6d451f0f9be00953438aba123b3d71423c7f45a0cc1f13a078e2217a1ead6e03", "mse": 0.4945, "quadrants": 107, "correlation": 0.97}
TOLERANCE = 0.01  # on the 1–9 scale: --verify calls larger differences of a prediction NOT REPRODUCED
COLOURS = {"valence": "#0072b2", "arousal": "#d55e00"}  # Okabe & Ito: distinct for the colour-blind and in grey


def parser():
    p = Parser(__doc__, threads=os.cpu_count() or 1)
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder that train.py wrote")
    p.add_argument("--features", type=Path, default=Path("DEAM_feats"), metavar="FOLDER", help="what extract.py wrote")
    p.add_argument("--split", choices=["train", "val", "test"], default="test", help="which songs")
    p.add_argument("--precision", choices=["float32", "float64", "tf32", "bfloat16"], default="float64", help="arithmetic")
    p.add_argument("--verify", type=Path, metavar="FILE", help="metrics.json of an earlier evaluation to compare with")
    p.add_argument("--allow-missing", action="store_true", help="evaluate on the songs whose features are there")
    return p


def load_run(folder, data):
    """(model, checkpoint) of a run that was trained on these features and splits. Raises UserError."""
    checkpoint = read_tensors(folder / "model.pt", "a trained model")
    try:
        config = checkpoint["config"]
        wanted = (config["features_digest"], config["splits_digest"])
        model = EmotionModel(checkpoint["bundle"], checkpoint["layer"], config["finetune"])
        model.load_state_dict(checkpoint["state"])
        model.mean, model.std = checkpoint["mean"], checkpoint["std"]
    except (TypeError, KeyError, RuntimeError, AttributeError):
        raise UserError(f"{folder / 'model.pt'} is not a model that train.py wrote") from None
    here = (checkpoint["bundle"], checkpoint["layer"]), (data.settings["bundle"], data.settings["layer"])
    if here[0] != here[1]:
        raise UserError(f"{folder} was trained on {here[0][0]} layer {here[0][1]}, {data.root} holds {here[1][0]} layer {here[1][1]}: "
                        "name its own features with --features")
    if wanted[0] != data.digest:
        raise UserError(f"{folder} was trained on features {str(wanted[0])[:16]}…, {data.root} holds {str(data.digest)[:16]}…: "
                        "name its own with --features, or extract them again with its settings")
    if wanted[1] != data.splits_digest:
        raise UserError(f"{folder} was trained on other splits: name them with --splits")
    return model, checkpoint


# ------------------------------------------------------------------------------------------------ metrics


def correlation(a, b):
    """Pearson's r; 0 where one of them is constant."""
    spread = a.std() * b.std()
    return float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread > 0 else 0.0


def regression(true, pred, scale):
    """Metrics of one dimension, float64[N] on the 1–9 scale; z-scored ones divide by `scale` (train+val σ).
    Concordance: Lin 1989, Biometrics 45. R² is against the mean of these songs."""
    error, variance = pred - true, true.var()
    mse = float((error**2).mean())
    concordance = 2 * ((true - true.mean()) * (pred - pred.mean())).mean() / (variance + pred.var() + (true.mean() - pred.mean()) ** 2)
    return {"mse": mse, "rmse": mse**0.5, "mae": float(abs(error).mean()),
            "z_mse": mse / scale**2, "z_rmse": mse**0.5 / scale, "z_mae": float(abs(error).mean() / scale),
            "r2": 1 - mse / float(variance) if variance > 0 else 0.0, "pearson": correlation(true, pred), "ccc": float(concordance)}


def quadrant(values, threshold=5.0):
    """Index into QUADRANTS for values[N, 2]."""
    high_valence, high_arousal = (values >= threshold).T
    return np.where(high_arousal, np.where(high_valence, 0, 1), np.where(high_valence, 3, 2))


def confusion_metrics(true, pred):
    """4×4 counts (rows true, columns predicted), accuracy, and F1 of each quadrant and averaged."""
    counts = np.zeros((4, 4), int)
    np.add.at(counts, (quadrant(true), quadrant(pred)), 1)
    hits, either = counts.diagonal(), counts.sum(0) + counts.sum(1)
    f1 = 2 * hits / np.maximum(either, 1)
    return {"quadrants": list(QUADRANTS), "confusion": counts.tolist(), "accuracy": float(hits.sum() / counts.sum()),
            "f1": dict(zip(QUADRANTS, f1.tolist())), "macro_f1": float(f1.mean())}


def all_metrics(true, pred, std, published):
    """Everything eval reports of true and pred, float64[N, 2] on the 1–9 scale; std float64[2] of train+val."""
    metrics = {name: regression(true[:, n], pred[:, n], std[n]) for n, name in enumerate(DIMENSIONS)}
    metrics["average"] = {key: (metrics["valence"][key] + metrics["arousal"][key]) / 2 for key in metrics["valence"]}
    metrics["quadrant"] = confusion_metrics(true, pred)
    metrics["valence_arousal_correlation"] = {"true": correlation(*true.T), "predicted": correlation(*pred.T)}
    if published:  # the published loader dropped the last partial batch
        error = (pred[:160] - true[:160]) / std
        metrics["published_protocol"] = {"z_mse": float((error**2).mean()), "quadrants_right": int((quadrant(true[:160]) == quadrant(pred[:160])).sum())}
    return metrics


def print_metrics(metrics):
    print(f"\n{'':10}{'MSE':>8}{'RMSE':>8}{'MAE':>8}{'z MSE':>8}{'z RMSE':>8}{'z MAE':>8}{'R²':>8}{'r':>8}{'CCC':>8}")
    for name in (*DIMENSIONS, "average"):
        print(f"{name:10}" + "".join(f"{value:8.4f}" for value in metrics[name].values()))
    q = metrics["quadrant"]
    print(f"\nquadrants right: {q['accuracy']:.1%} of {sum(map(sum, q['confusion']))}; macro F1 {q['macro_f1']:.4f}  (threshold 5; rows true, columns predicted)")
    print(" " * 8 + "".join(f"{name:>8}" for name in QUADRANTS) + f"{'F1':>8}")
    for name, row in zip(QUADRANTS, q["confusion"]):
        print(f"{name:8}" + "".join(f"{count:8d}" for count in row) + f"{q['f1'][name]:8.4f}")
    r = metrics["valence_arousal_correlation"]
    print(f"\ncorrelation of valence with arousal: predicted {r['predicted']:.4f}, true {r['true']:.4f}")
    if p := metrics.get("published_protocol"):
        print(f"published protocol (first 160 test songs): z-scored MSE {p['z_mse']:.4f} (published {PUBLISHED['mse']}), "
              f"quadrants right {p['quadrants_right']} (published {PUBLISHED['quadrants']})")


# ------------------------------------------------------------------------------------------------ figures


def save(figure, path):
    image = io.BytesIO()
    figure.savefig(image, dpi=150)
    plt.close(figure)
    write_file(path, image.getvalue())


def draw(folder, caption, true, pred, metrics):
    """Write the four figures of the published report."""
    ticks = range(1, 10)
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 5.4), constrained_layout=True)
    for n, (axis, name) in enumerate(zip(axes, DIMENSIONS)):
        axis.plot([1, 9], [1, 9], "k--", linewidth=1, label="y = x")
        axis.scatter(true[:, n], pred[:, n], s=18, alpha=0.6, color=COLOURS[name], marker="os"[n])
        axis.set(title=f"{name}: R² {metrics[name]['r2']:.3f}, r {metrics[name]['pearson']:.3f}, CCC {metrics[name]['ccc']:.3f}",
                 xlabel=f"true {name} (1–9)", ylabel=f"predicted {name} (1–9)", xlim=(1, 9), ylim=(1, 9), xticks=ticks, yticks=ticks, aspect="equal")
        axis.legend(loc="upper left")
        axis.grid(alpha=0.3)
    figure.suptitle(caption, fontsize=9)
    save(figure, folder / "true_vs_predicted.png")

    figure, axis = plt.subplots(figsize=(6.5, 6.8), constrained_layout=True)
    axis.axhline(5, color="k", linewidth=1)
    axis.axvline(5, color="k", linewidth=1)
    axis.scatter(*true.T, s=24, facecolors="none", edgecolors="#555555", label=f"true, r {metrics['valence_arousal_correlation']['true']:.2f}")
    axis.scatter(*pred.T, s=22, alpha=0.7, marker="^", color="#cc79a7", label=f"predicted, r {metrics['valence_arousal_correlation']['predicted']:.2f}")
    for name, x, y in zip(QUADRANTS, (8.9, 1.1, 1.1, 8.9), (8.8, 8.8, 1.1, 1.1)):
        axis.text(x, y, name, ha="right" if x > 5 else "left", fontsize=10, weight="bold", alpha=0.6)
    axis.set(xlabel="valence (1–9)", ylabel="arousal (1–9)", xlim=(1, 9), ylim=(1, 9), xticks=ticks, yticks=ticks, aspect="equal")
    axis.legend(loc="upper center", ncols=2)
    axis.grid(alpha=0.3)
    figure.suptitle(caption, fontsize=9)
    save(figure, folder / "plane.png")

    counts = np.array(metrics["quadrant"]["confusion"])
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axis = plt.subplots(figsize=(6, 5.6), constrained_layout=True)
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in range(4):
        for column in range(4):
            axis.text(column, row, f"{counts[row, column]}\n{shares[row, column]:.0%}", ha="center", va="center",
                      color="white" if shares[row, column] > 0.5 else "black")
    axis.set(title=f"quadrants right: {metrics['quadrant']['accuracy']:.1%}", xlabel="predicted quadrant", ylabel="true quadrant",
             xticks=range(4), yticks=range(4), xticklabels=QUADRANTS, yticklabels=QUADRANTS)
    figure.colorbar(image, label="share of the row", shrink=0.8)
    figure.suptitle(caption, fontsize=9)
    save(figure, folder / "confusion.png")

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True, constrained_layout=True)
    for n, (axis, name) in enumerate(zip(axes, DIMENSIONS)):
        axis.hist(true[:, n], bins=np.arange(1, 9.1, 0.5), histtype="step", color="k", linewidth=1.5, label="true")
        axis.hist(pred[:, n], bins=np.arange(1, 9.1, 0.5), alpha=0.6, color=COLOURS[name], label="predicted")
        axis.set(title=name, xlabel=f"{name} (1–9)", ylabel="songs" if n == 0 else None, xlim=(1, 9), xticks=ticks)
        axis.legend()
    figure.suptitle(caption, fontsize=9)
    save(figure, folder / "histograms.png")


# ----------------------------------------------------------------------------------------------- verdict


def flat(metrics, prefix=""):
    """{"valence.mse": 1.2, …}: the numbers, and arrays of numbers, of nested dicts under dotted names."""
    numbers = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            numbers |= flat(value, f"{prefix}{key}.")
        elif key != "quadrants":
            numbers[f"{prefix}{key}"] = np.array(value, float)
    return numbers


def verify(expected_file, found):
    """Compare `found` (a metrics.json's content) with an earlier one, line by line; returns the exit code.
    Raises UserError for a file that is no metrics.json, or of other songs."""
    expected = read_json(expected_file, "an earlier metrics.json")
    try:
        songs, numbers = expected["predictions"], flat(expected["metrics"])
        if expected["splits"] != found["splits"] or expected["split"] != found["split"] or list(songs) != list(found["predictions"]):
            raise UserError(f"{expected_file} is about other songs ({expected['split']}, {len(songs)} songs of splits {expected['splits'][:16]}…): "
                            "verify with the same --split, --splits and songs")
        difference = float(np.abs(np.array(list(songs.values())) - np.array(list(found["predictions"].values()))).max())
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{expected_file} is not a metrics.json that eval.py wrote") from None

    def line(name, delta, then, now):
        verdict = "identical" if delta == 0 else f"close (max |Δ| = {delta:.1e})" if delta < TOLERANCE else "DIFFERENT"
        print(f"{name:38} {verdict:28} expected {then}, found {now}")

    print(f"\ncompared with {expected_file}:")
    for key in ("features", "splits", "initial_model", "model"):
        line(key.replace("_", " "), 0 if expected.get(key) == found[key] else np.inf, str(expected.get(key))[:16], str(found[key])[:16])
    line(f"predictions of {len(songs)} songs", difference, json_digest(songs)[:16], json_digest(found["predictions"])[:16])
    now = flat(found["metrics"])
    for name, value in numbers.items():
        delta = abs(value - now[name]).max() if name in now and now[name].shape == value.shape else np.inf
        line(name, 0 if delta < 5e-7 else delta, *(f"{v.item():.6g}" if v.ndim == 0 else v.astype(int).tolist() for v in (value, now.get(name, np.array(np.nan)))))
    if difference == 0:
        print("REPRODUCED: every prediction is the same to six decimals")
        return 0
    if difference < TOLERANCE:
        print(f"CLOSE: predictions differ by at most {difference:.1e}, below {TOLERANCE} on the 1–9 scale")
        return 3
    print(f"NOT REPRODUCED: a prediction differs by {difference:.2g}, the limit is {TOLERANCE} on the 1–9 scale")
    return 1


def evaluate(args, folder, data, device):
    """One run: print, write and return what metrics.json holds."""
    dtype, autocast = arithmetic(args.precision, device)
    model, checkpoint = load_run(folder, data)
    digest = state_digest(checkpoint["state"])
    model.to(device, dtype)
    ids = data.ids[args.split]
    loader = Progress(DataLoader(FrozenOutputs(data.datasets[args.split], model, autocast), 1, collate_fn=collate), desc=f"eval {folder.name}", unit="song")
    pred = (model.predict(loader, autocast) * model.std + model.mean).numpy().round(6)
    true, std = data.datasets[args.split].labels.numpy(), model.std.numpy()
    published = data.corpus == "DEAM" and json_digest(ids) == PUBLISHED["test_songs"]
    metrics = all_metrics(true, pred, std, published)
    print(f"{folder}: {checkpoint['config']['finetune']} on {data.corpus}, {args.split} split, {len(ids)} songs, {args.precision} on {device}")
    print(f"features {data.digest}\nmodel    {digest}")
    print_metrics(metrics)
    if data.corpus == "demo":
        print("These songs and labels are synthetic: the numbers say nothing about DEAM.")
    found = {"run": folder.name, "corpus": data.corpus, "split": args.split, "precision": args.precision, "songs": len(ids),
             "features": data.digest, "splits": data.splits_digest, "initial_model": checkpoint["initial_model"], "model": digest,
             "metrics": metrics, "predictions": {str(song): row for song, row in zip(ids, pred.tolist())}, "environment": environment(device)}
    out = folder / f"eval-{args.split}"
    write_json(out / "metrics.json", found)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["song_id", "valence_true", "arousal_true", "valence_pred", "arousal_pred"])
    writer.writerows([song, *t, *(f"{value:.6f}" for value in p)] for song, t, p in zip(ids, true.tolist(), pred.tolist()))
    write_file(out / "predictions.csv", table.getvalue())
    draw(out, f"{folder.name} · {data.corpus} {args.split} · n = {len(ids)}", true, pred, metrics)
    print(f"written: {out}/metrics.json, predictions.csv, true_vs_predicted.png, plane.png, confusion.png, histograms.png")
    return found


def run(args):
    device = pick_device(args.device)
    set_determinism(args.threads, args.precision)
    if args.verify and len(args.runs) > 1:
        raise UserError("--verify compares one run: name only one")
    data = DEAMFeatHandler(args.features, args.splits, allow_missing=args.allow_missing)
    if not data.manifest:
        print(f"{args.features} has no manifest: nothing vouches for these features.")
    if len(data.ids[args.split]) < 2:
        raise UserError(f"{data.summary}: too few {args.split} songs to evaluate on")
    if not data.complete:
        print(f"working on {data.summary}")
    data.check(args.split)
    for folder in args.runs:
        found = evaluate(args, folder, data, device)
    return verify(args.verify, found) if args.verify else 0


def main():
    run_script(run, parser(), "the same command starts the evaluation again")


if __name__ == "__main__":
    main()
