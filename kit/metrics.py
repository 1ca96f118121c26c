"""Every number that the kit reports: metrics and their intervals, baselines, the noise ceiling.

`measure` computes them from DEAM's annotations and predictions alone, so that a published file's
numbers can be computed again from its own predictions. All metrics are functions of means over
songs of a few terms (`song_terms`), so that 10,000 resamples are one product of matrices.
"""

import functools
import math

import numpy as np
import torch

from kit.deam import DIMENSIONS, label_statistics, labels_of, quadrant, read_artists, songs_of
from kit.files import json_digest
from kit.published import TEST_SONGS, are_published, published_results

# A variance below this is rounding alone: labels have one decimal, predictions six.
EQUAL = 1e-13
YEARS = {"2013": (1, 1000), "2014": (1001, 2000)}  # ids of the songs annotated in each

# ----------------------------------------------------------------------------------------- metrics


def song_terms(true, pred):
    """float64[30, N], of true and pred [N, 2] on the 1–9 scale: the terms of which `all_metrics`
    takes the means. Values are centred, so that differences of large means lose no digits."""
    # copies: numpy sums a row of its own as it does a vector, to the last digit
    t, p, error = (values.T.copy() for values in (true - true.mean(0), pred - true.mean(0),
                                                  pred - true))
    is_true, is_pred = (np.eye(4)[:, quadrant(each, 5)] for each in (true, pred))
    right = is_true * is_pred
    return np.vstack([t, p, t**2, p**2, t * p, error**2, abs(error),  # of valence and arousal
                      is_true, is_pred, right,  # of the four quadrants
                      t[0] * t[1], p[0] * p[1], error[0] * error[1], right.sum(0)])


def ratio(a, b, none=0.0):
    """a / b; `none` where b is 0 but for rounding."""
    return np.divide(a, b, out=np.full_like(b, none), where=b > EQUAL)


def variance(mean, mean_square):
    """The population variance; exactly 0 where all values are equal."""
    value = mean_square - mean**2
    return np.where(value > EQUAL, value, 0.0)


def correlation(covariance, *variances):
    """Pearson's r; 0 where one of the two is constant."""
    return ratio(covariance, np.sqrt(variances[0] * variances[1]))


def r_squared(square, variance):
    """1 - MSE / variance of the labels: against the mean of these songs; 0 for equal labels."""
    return np.where(variance > 0, 1 - ratio(square, variance), 0.0)


def all_metrics(mean):
    """Everything that eval reports, from means [30, …] of `song_terms`. `ccc`: concordance (Lin
    1989, Biometrics 45); `difference` is valence minus arousal, `correlation` of valence with
    arousal; `excess` how much stronger the predicted one is than the true one."""
    each, quadrants, (true_product, pred_product, error_product, right) = np.split(mean, [14, 26])
    true, pred, true_square, pred_square, product, square, absolute = each.reshape(
        7, 2, *mean.shape[1:])
    is_true, is_pred, both = quadrants.reshape(3, 4, *mean.shape[1:])
    var_true, var_pred = variance(true, true_square), variance(pred, pred_square)
    covariance = product - true * pred
    each = {"mse": square, "rmse": np.sqrt(square), "mae": absolute,
            "r2": r_squared(square, var_true),
            "pearson": correlation(covariance, var_true, var_pred),
            "ccc": ratio(2 * covariance, var_true + var_pred + (true - pred) ** 2)}
    cov_true, cov_pred = true_product - true[0] * true[1], pred_product - pred[0] * pred[1]
    r_true, r_pred = correlation(cov_true, *var_true), correlation(cov_pred, *var_pred)
    # a quadrant that is neither true nor predicted has no F1
    f1 = ratio(2 * both, is_true + is_pred, math.nan)
    return {
        **{name: {key: values[n] for key, values in each.items()}
           for n, name in enumerate(DIMENSIONS)},
        "difference": {"r2": r_squared(square.sum(0) - 2 * error_product,
                                       variance(0, var_true.sum(0) - 2 * cov_true))},
        "correlation": {"true": r_true, "predicted": r_pred, "excess": abs(r_pred) - abs(r_true)},
        "quadrant": {"accuracy": right, "macro_f1": np.nanmean(f1, 0)}}


def plain_metrics(true, pred):
    """`all_metrics` of true and pred [N, 2]."""
    return all_metrics(song_terms(true, pred).mean(1))


def confusion(true, pred):
    """4×4 counts: rows true, columns predicted quadrant."""
    counts = np.zeros((4, 4), int)
    np.add.at(counts, (quadrant(true, 5), quadrant(pred, 5)), 1)
    return counts


# --------------------------------------------------------------------------------------- intervals


@functools.lru_cache(4)  # a report resamples the same groups for several sets of terms
def resampled_weights(groups, resamples=10_000):
    """int16[resamples, groups]: how often each group is drawn, with a fixed seed."""
    generator, counts = np.random.default_rng(0), np.empty((resamples, groups), np.int16)
    for row in counts:
        row[:] = np.bincount(generator.integers(0, groups, groups), minlength=groups)
    return counts


def resampled_means(terms, groups):
    """float64[K, 1 + 10,000] of terms[K, N]: the means over all songs, then those over each
    resample. Whole groups of songs, groups[N], are drawn with replacement; two calls with the same
    groups draw the same songs."""
    names, index = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(names), len(terms) + 1))
    np.add.at(sums, index, np.vstack([terms, np.ones(len(groups))]).T)
    totals = resampled_weights(len(names)) @ sums
    return np.column_stack([terms.mean(1), (totals[:, :-1] / totals[:, -1:]).T])


def resampled_metrics(true, pred, groups):
    """`all_metrics` of true and pred [N, 2], each float64[1 + 10,000]."""
    return all_metrics(resampled_means(song_terms(true, pred), groups))


def mapped(function, *trees):
    """Apply a function to the leaves of nested dicts of one shape."""
    if not isinstance(trees[0], dict):
        return function(*trees)
    return {key: mapped(function, *(tree[key] for tree in trees)) for key in trees[0]}


def with_intervals(resampled):
    """{"metrics": values, "intervals": their 95% percentile intervals (Efron & Tibshirani 1993),
    [low, high]} of nested dicts of float64[1 + resamples]."""
    return {"metrics": mapped(lambda values: float(values[0]), resampled),
            "intervals": mapped(lambda values: np.nanquantile(values[1:], [0.025, 0.975]).tolist(),
                                resampled)}


def wilson(right, count):
    """The 95% interval of a share, right of count (Wilson 1927), [low, high]."""
    z, share = 1.959964, right / count
    middle, half = share + z**2 / (2 * count), z * math.sqrt(
        share * (1 - share) / count + z**2 / (4 * count**2))
    return [(middle - half) / (1 + z**2 / count), (middle + half) / (1 + z**2 / count)]


def artist_groups(ids):
    """The artist of each song, as a number; a song whose artist is not known is its own."""
    artists = read_artists()
    return np.array([artists.get(song, -song) for song in ids])


def paired_difference(models, others):
    """R², r, CCC and MSE of models less those of others on the same songs, with intervals. models,
    others: lists of `resampled_metrics`; with several to a side their metrics are averaged, and
    every resample draws models as well as groups of songs."""
    generator = np.random.default_rng(1)
    first, second = ({name: {key: average_of_drawn([each[name][key] for each in side], generator)
                             for key in ("r2", "pearson", "ccc", "mse")} for name in DIMENSIONS}
                     for side in (models, others))
    return with_intervals(mapped(np.subtract, first, second))


def average_of_drawn(values, generator):
    """The average over models of a metric, values[models, 1 + resamples]; for each resample that of
    as many models drawn with replacement. Drawing from n models gives (n − 1)/n of the variance
    that other models would, so what a draw deviates by is scaled up."""
    values = np.array(values)
    average, count = values.mean(0), len(values)
    if count > 1:
        resamples = values[:, 1:]
        drawn = np.take_along_axis(resamples, generator.integers(0, count, resamples.shape), 0)
        average[1:] += (drawn.mean(0) - average[1:]) * math.sqrt(count / (count - 1))
    return average


# ------------------------------------------------------------------- what the labels allow to reach


def noise_terms(true, deviation):
    """float64[6, N]: terms of `noise_ceiling`. deviation[N, 2]: the annotators' for each song.
    DEAM gives it with ddof 0 over ten annotators, so the variance of their mean is σ²/9."""
    noise, centred = (deviation**2 / 9).T.copy(), (true - true.mean(0)).T.copy()
    return np.vstack([noise, centred, centred**2])


def noise_ceiling(mean):
    """The expected R² of predicting what infinitely many such annotators would say, the labels'
    reliability, from means [6, …] of `noise_terms`: ICC(1, 10) of Shrout & Fleiss 1979, but for the
    degree of freedom of the songs' mean. A sample can exceed it; its square root bounds r."""
    noise, centred, square = mean.reshape(3, 2, *mean.shape[1:])
    r2 = r_squared(noise, variance(centred, square))
    return {name: {"r2": r2[n]} for n, name in enumerate(DIMENSIONS)}


def noise_free_accuracy(true, deviation):
    """The share of quadrants that a predictor without any error of its own would get right, since
    the labels have one: true values Gaussian with the labels' mean and their covariance less the
    noise, labels Gaussian around them. Integrated over ±5 standard deviations. None where the
    labels hold no noise, or nothing else."""
    noise, mean = (deviation**2).mean(0) / 9, true.mean(0)
    covariance = np.cov(true.T, ddof=0) - np.diag(noise)
    if noise.min() <= 0 or np.linalg.eigvalsh(covariance).min() <= 0:
        return None
    z = np.linspace(-5, 5, 201)
    density = np.exp(-0.5 * z**2)
    density /= density.sum()
    grid = np.stack(np.meshgrid(z, z, indexing="ij"), -1) @ np.linalg.cholesky(covariance).T + mean
    same_side = 0.5 + 0.5 * torch.erf(torch.from_numpy(
        abs(grid - 5) / np.sqrt(2 * noise))).numpy()
    return float(density @ same_side.prod(-1) @ density)


def perfect_correlation(true, share):
    """How valence and arousal of the best predictor correlate where `share` of the pairs of labels
    were exchanged and nothing tells which. true[N, 2]: the labels as they should be."""
    return float(np.corrcoef(((1 - share) * true + share * true[:, ::-1]).T)[0, 1])


# --------------------------------------------------------------------------------------- baselines


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


# ----------------------------------------------------------------------------------------- measure


def true_values(annotations, songs):
    """float64[N, 2]: valence and arousal of the songs, on the 1–9 scale."""
    return labels_of(annotations, songs).numpy()


def predicted_values(pred, songs):
    """float64[N, 2] of predictions {song id: [valence, arousal]}."""
    return np.array([pred[str(song)] for song in songs])


def label_digest(annotations, splits):
    """sha256 over the labels of the splits' songs and their standard deviations."""
    return json_digest({str(song): annotations[song] for song in songs_of(splits)})


def measure(annotations, ids, pred, ridge_pred, mean_label, groups):
    """Every number of a report that DEAM's annotations and predictions {song id: [valence,
    arousal]} of the songs `ids` give. mean_label[2] or [N, 2]: of the songs trained on; groups[N]:
    what is resampled, songs or artists."""
    true, pred, ridge_pred = (true_values(annotations, ids), predicted_values(pred, ids),
                              predicted_values(ridge_pred, ids))
    deviation = np.array([[annotations[song].valence_std, annotations[song].arousal_std]
                          for song in ids])
    network, linear = (resampled_metrics(true, each, groups) for each in (pred, ridge_pred))
    ridge_numbers, constant = with_intervals(linear), np.broadcast_to(mean_label, true.shape)
    ceiling = noise_ceiling(resampled_means(noise_terms(true, deviation), groups))
    return {
        **with_intervals(network), "confusion": confusion(true, pred).tolist(),
        "baselines": {"ridge": ridge_numbers["metrics"],
                      "training mean": mapped(float, plain_metrics(true, constant))},
        "ridge_intervals": ridge_numbers["intervals"],
        "less_ridge": paired_difference([network], [linear]),
        "noise_ceiling": with_intervals(ceiling),
        "quadrants": {
            "largest_share": float(np.bincount(quadrant(true, 5)).max() / len(true)),
            "noise_free_accuracy": noise_free_accuracy(true, deviation),
            "on_a_border": float((true == 5).any(1).mean())}}


def measure_split(annotations, splits, split, pred, ridge_pred):
    """`measure` for a split, songs resampled; z-scored errors; for the published test split also
    what the notebooks print, and the songs of artists that the model never heard."""
    ids, known = splits[split], splits["train"] + splits["val"]
    mean_label = true_values(annotations, splits["train"]).mean(0)
    numbers = measure(annotations, ids, pred, ridge_pred, mean_label, np.array(ids))
    std = label_statistics(annotations, known)[1].tolist()
    numbers["z_scored"] = {name: {"mse": numbers["metrics"][name]["mse"] / scale**2,
                                  "mae": numbers["metrics"][name]["mae"] / scale}
                           for name, scale in zip(DIMENSIONS, std)}
    if split == "test" and are_published(splits):
        first, artists = ids[:TEST_SONGS], read_artists()
        heard = {artists[song] for song in known}
        unseen = [song for song in ids if artists[song] not in heard]
        numbers["published"] = {**published_results(), "this_run": as_published(
            true_values(annotations, first), predicted_values(pred, first), std)}
        numbers["unseen_artists"] = {"songs": len(unseen), **with_intervals(resampled_metrics(
            true_values(annotations, unseen), predicted_values(pred, unseen), np.array(unseen)))}
    return numbers


def as_published(true, pred, std):
    """What the notebooks print of predictions, as a run in published.json has it."""
    metrics, counts = mapped(float, plain_metrics(true, pred)), confusion(true, pred)
    mse = [metrics[name]["mse"] for name in DIMENSIONS]
    z_mse = [value / scale**2 for value, scale in zip(mse, std)]
    return {"test_mse": mse, "test_z_mse_each": z_mse, "test_z_mse": sum(z_mse) / 2,
            "quadrants_right": int(counts.trace()), "confusion": counts.tolist(),
            "predicted_correlation": metrics["correlation"]["predicted"],
            "true_correlation": metrics["correlation"]["true"]}


def measure_folds(annotations, folds, pred, ridge_pred, mean_labels):
    """`measure` for folds together, artists resampled, with the standard deviation of R² over the
    folds and R² by year. folds: lists of song ids; mean_labels[folds, 2]: of the songs that each
    was trained on."""
    ids, counts = sum(folds, []), list(map(len, folds))
    numbers = measure(annotations, ids, pred, ridge_pred, np.repeat(mean_labels, counts, 0),
                      artist_groups(ids))
    years = {year: [song for song in ids if low <= song <= high]
             for year, (low, high) in YEARS.items()}
    r2 = [r2_of(annotations, songs, pred) for songs in folds]
    numbers["r2_over_folds"] = mapped(lambda *values: float(np.std(values, ddof=1)), *r2)
    numbers["r2_by_year"] = {year: r2_of(annotations, songs, pred)
                             for year, songs in years.items() if len(songs) > 1}
    return numbers


def r2_of(annotations, songs, pred):
    """{dimension: R²} of the predictions of some songs."""
    metrics = plain_metrics(true_values(annotations, songs), predicted_values(pred, songs))
    return {name: float(metrics[name]["r2"]) for name in DIMENSIONS}
