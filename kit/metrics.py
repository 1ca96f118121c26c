"""Every number that the kit reports: metrics with their intervals, baselines, the ceiling.

`measure` computes them all from DEAM's annotations and predictions alone, so that a published
file's numbers can be computed again from its own predictions. The metrics work on [..., N] or
[..., N, 2] arrays over the songs, so that 1000 resamples take one call.
"""

import functools

import numpy as np

from kit.deam import (DIMENSIONS, QUADRANTS, label_statistics, labels_of, quadrant, read_artists,
                      songs_of, splits_digest)
from kit.files import json_digest

PUBLISHED = {"mse": 0.4945, "quadrants": 107,  # on the first 160 test songs of these splits
             "splits": "c127846430ead7c2249ece577899cf276362b559daa45eaf37d0b810082fa957"}
ANNOTATORS = 10  # a DEAM song, at least; the label is their mean


def divide(a, b):
    """a / b, and 0 where b is 0: a correlation with a constant, R² of equal labels."""
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=np.asarray(b) > 0)


def correlation(a, b):
    """Pearson's r over the last axis; 0 where one is constant."""
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    return divide((a * b).mean(-1), np.sqrt((a * a).mean(-1) * (b * b).mean(-1)))


def regression(true, pred, scale):
    """Metrics of one dimension, [..., N] on the 1–9 scale; z-scored ones divide by `scale`, σ of
    train+val. R² is against the mean of these songs; concordance (ccc): Lin 1989, Biometrics 45."""
    mse, mae, variance = ((pred - true) ** 2).mean(-1), abs(pred - true).mean(-1), true.var(-1)
    covariance = (true * pred).mean(-1) - true.mean(-1) * pred.mean(-1)
    apart = (true.mean(-1) - pred.mean(-1)) ** 2
    return {"mse": mse, "rmse": np.sqrt(mse), "mae": mae,
            "z_mse": mse / scale**2, "z_rmse": np.sqrt(mse) / scale, "z_mae": mae / scale,
            "r2": np.where(variance > 0, 1 - divide(mse, variance), 0.0),
            "pearson": correlation(true, pred),
            "ccc": divide(2 * covariance, variance + pred.var(-1) + apart)}


def all_metrics(true, pred, std):
    """Everything that eval reports of true and pred [..., N, 2] on the 1–9 scale; std[2]."""
    metrics = {name: regression(true[..., n], pred[..., n], std[n])
               for n, name in enumerate(DIMENSIONS)}
    metrics["average"] = {key: (metrics["valence"][key] + metrics["arousal"][key]) / 2
                          for key in metrics["valence"]}
    t, p = quadrant(true, 5), quadrant(pred, 5)
    f1 = {name: divide(2 * ((t == n) & (p == n)).sum(-1), (t == n).sum(-1) + (p == n).sum(-1))
          for n, name in enumerate(QUADRANTS)}
    metrics["quadrant"] = {"accuracy": (t == p).mean(-1), "f1": f1,
                           "macro_f1": sum(f1.values()) / 4}
    metrics["valence_arousal_correlation"] = {
        "true": correlation(true[..., 0], true[..., 1]),
        "predicted": correlation(pred[..., 0], pred[..., 1])}
    return metrics


def confusion(true, pred):
    """4×4 counts: rows true, columns predicted quadrant."""
    counts = np.zeros((4, 4), int)
    np.add.at(counts, (quadrant(true, 5), quadrant(pred, 5)), 1)
    return counts


def mapped(function, *trees):
    """Apply a function to the leaves of nested dicts of one shape."""
    if not isinstance(trees[0], dict):
        return function(*trees)
    return {key: mapped(function, *(tree[key] for tree in trees)) for key in trees[0]}


def bootstrap(metric, true, *preds, resamples=10_000, groups=None):
    """95% percentile intervals (Efron & Tibshirani 1993) of metric(true, *preds), [low, high] for
    each of its values; fixed seed. Songs are resampled; with `groups` [N] whole groups of songs
    are, a fifth as often."""
    generator, count = np.random.default_rng(0), len(true)
    if groups is None:
        draws = (generator.integers(0, count, (1000, count)) for _ in range(0, resamples, 1000))
    else:
        members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
        drawn = (generator.integers(0, len(members), len(members)) for _ in range(resamples // 5))
        draws = (np.concatenate([members[group] for group in each])[None] for each in drawn)
    parts = [metric(true[songs], *(pred[songs] for pred in preds)) for songs in draws]
    edges = [0.025, 0.975]
    return mapped(lambda *values: np.quantile(np.concatenate(values), edges).tolist(), *parts)


def ceiling(true, spread):
    """The R² of a perfect model: what is left of the labels' variance without the noise of a mean
    over ANNOTATORS. spread[N, 2]: the annotators' standard deviation for each song."""
    variance = true.var(0)
    reached = np.where(variance > 0, 1 - divide((spread**2).mean(0) / ANNOTATORS, variance), 0.0)
    top = dict(zip(DIMENSIONS, reached.tolist()))
    return {**top, "average": sum(top.values()) / 2}


def ridge(x, y, x_val, y_val):
    """Ridge regression in closed form. x[N, D] is standardised; the penalty with the lowest MSE on
    val is chosen. Returns (function from x to y, penalty)."""
    centre, scale = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1)
    u, s, vt = np.linalg.svd((x - centre) / scale, full_matrices=False)

    def predictor(penalty):
        weights = vt.T @ ((s / (s**2 + penalty))[:, None] * (u.T @ (y - y.mean(0))))
        return lambda x: (x - centre) / scale @ weights + y.mean(0)

    penalties = 10.0 ** np.arange(-2, 7.5, 0.5)
    best = min(penalties, key=lambda penalty: ((predictor(penalty)(x_val) - y_val) ** 2).mean())
    return predictor(best), float(best)


def true_values(annotations, songs):
    return labels_of(annotations, songs).numpy()


def predicted_values(pred, songs):
    """float64[N, 2] of predictions {song id: [valence, arousal]}."""
    return np.array([pred[str(song)] for song in songs])


def measure(annotations, ids, known, pred, ridge_pred, train=None, groups=None):
    """Every number of a report, from DEAM's annotations and predictions {song id: [valence,
    arousal]} of the songs `ids`; z-scored by the labels of the `known` songs."""
    true, pred, baselines = true_values(annotations, ids), predicted_values(pred, ids), {}
    mean, std = (value.numpy() for value in label_statistics(annotations, known))
    metric = functools.partial(all_metrics, std=std)
    if train:
        mean_label = true_values(annotations, train).mean(0)
        baselines["training mean"] = np.broadcast_to(mean_label, true.shape)
    if ridge_pred:
        baselines["ridge"] = predicted_values(ridge_pred, ids)
    return {"label_mean": mean.tolist(), "label_std": std.tolist(),
            "metrics": mapped(float, metric(true, pred)),
            "intervals": bootstrap(metric, true, pred, groups=groups),
            "confusion": confusion(true, pred).tolist(),
            "ceiling_r2": ceiling(true, np.array([annotations[song][1::2] for song in ids])),
            "baselines": {name: mapped(float, metric(true, other))
                          for name, other in baselines.items()}}


def measure_split(annotations, splits, split, pred, ridge_pred):
    """`measure` for a split; for the published test split also the published protocol, and the
    songs of artists that the model never heard."""
    ids, known = splits[split], splits["train"] + splits["val"]
    numbers = measure(annotations, ids, known, pred, ridge_pred, splits["train"])
    if split == "test" and splits_digest(splits) == PUBLISHED["splits"]:
        first = ids[:160]  # full batches held 160
        true, found = true_values(annotations, first), predicted_values(pred, first)
        errors = (found - true) / numbers["label_std"]
        right = quadrant(true, 5) == quadrant(found, 5)
        numbers["published_protocol"] = {"z_mse": float((errors**2).mean()),
                                         "quadrants_right": int(right.sum())}
        artists = read_artists()
        heard = {artists[song] for song in known}
        new = [song for song in ids if artists[song] not in heard]
        row = measure(annotations, new, known, pred, None)
        numbers["new_artists"] = {"songs": len(new), "metrics": row["metrics"],
                                  "intervals": row["intervals"]}
    return numbers


def label_digest(annotations, splits):
    """sha256 over the labels of the splits' songs and their standard deviations."""
    return json_digest({str(song): annotations[song] for song in songs_of(splits)})


def artist_groups(ids):
    """The artist of each song, as a number; a song whose artist is not known is its own."""
    artists = read_artists()
    return np.array([artists.get(song, -song) for song in ids])


def paired_difference(annotations, pred, other):
    """Metrics of predictions {song id: [valence, arousal]} less those of `other` ones of the same
    songs, and their intervals by resampling artists: what a claim of improvement needs."""
    ids = list(map(int, pred))
    true, a, b = (true_values(annotations, ids), predicted_values(pred, ids),
                  predicted_values(other, ids))

    def difference(true, a, b):
        one, two = (all_metrics(true, each, np.ones(2)) for each in (a, b))
        return {name: {key: one[name][key] - two[name][key]
                       for key in ("mse", "r2", "pearson", "ccc")} for name in DIMENSIONS}

    return {"metrics": difference(true, a, b),
            "intervals": bootstrap(difference, true, a, b, groups=artist_groups(ids))}


def stated(numbers, name, key, form=".2f"):
    """"0.52 [0.41, 0.60]": a metric with its interval."""
    value, (low, high) = numbers["metrics"][name][key], numbers["intervals"][name][key]
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"
