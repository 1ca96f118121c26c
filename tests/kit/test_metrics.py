"""Metrics, intervals, baselines and the noise ceiling, against values of scikit-learn and scipy and
against simulations."""

import math

import numpy as np
import pytest
import torch

from kit import metrics, report
from kit.deam import DIMENSIONS, Labels, quadrant

TRUE = np.array([[5.0, 6.2], [3.1, 4.4], [6.6, 7.0], [4.9, 5.0], [2.8, 3.3], [7.1, 5.9],
                 [5.5, 3.9], [4.2, 6.1], [6.0, 6.4], [3.7, 2.9], [5.2, 5.3], [4.4, 4.8]])
PRED = np.array([[5.3, 5.8], [3.9, 4.1], [6.1, 6.2], [5.1, 5.2], [3.3, 4.0], [6.0, 6.1],
                 [4.8, 4.2], [4.6, 5.5], [5.7, 6.0], [4.1, 3.5], [4.9, 5.6], [4.0, 5.4]])
# of scikit-learn 1.9.1 and scipy 1.17.1
KNOWN = {"valence": {"mse": 0.3025, "rmse": 0.55, "mae": 0.4916666666666665,
                     "r2": 0.8111587982832619, "pearson": 0.9437291716717181},
         "arousal": {"mse": 0.24, "rmse": 0.4898979485566357, "mae": 0.45,
                     "r2": 0.8426229508196721, "pearson": 0.9444912771136816},
         "difference": {"r2": 0.3985680190930787},
         "correlation": {"true": 0.6931270893960616, "predicted": 0.7983022684184833},
         "quadrant": {"accuracy": 2 / 3, "macro_f1": 0.4875}}
RIDGE = [[6.01277026, 6.38485964], [3.71215972, 3.33653349], [5.26872021, 5.21195142],
         [4.1969287, 4.69781506]]  # of the last four songs


def random_songs(count=200, noise=0.7, seed=0):
    """(true, predicted [count, 2]), labels with one decimal as DEAM's."""
    generator = np.random.default_rng(seed)
    true = generator.normal(5, 1.3, (count, 2)).clip(1, 9).round(1)
    return true, 0.6 * true + 2 + generator.normal(0, noise, (count, 2))


# ----------------------------------------------------------------------------------------- metrics


def test_metrics_against_those_of_other_libraries(compared):
    found, count = metrics.plain_metrics(TRUE, PRED), 0
    for name, values in KNOWN.items():
        for key, value in values.items():
            assert found[name][key] == pytest.approx(value, rel=1e-12), (name, key)
            count += 1
    for n, name in enumerate(DIMENSIONS):  # Lin's definition
        t, p = TRUE[:, n], PRED[:, n]
        ccc = 2 * np.cov(t, p, ddof=0)[0, 1] / (t.var() + p.var() + (t.mean() - p.mean()) ** 2)
        assert found[name]["ccc"] == pytest.approx(ccc, rel=1e-12)
    assert metrics.confusion(TRUE, PRED).tolist() == [
        [4, 1, 0, 0], [1, 1, 0, 0], [0, 1, 3, 0], [0, 0, 1, 0]]
    compared(count + 2 + 16, "values")


def test_metrics_against_other_libraries_themselves(compared):
    sklearn, stats = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    true, pred = random_songs()
    found, quadrants = metrics.plain_metrics(true, pred), (quadrant(true, 5), quadrant(pred, 5))
    expected = {"quadrant": {"accuracy": sklearn.accuracy_score(*quadrants),
                             "macro_f1": sklearn.f1_score(*quadrants, average="macro")}}
    for t, p, name in zip(true.T, pred.T, DIMENSIONS):
        expected[name] = {"mse": sklearn.mean_squared_error(t, p), "r2": sklearn.r2_score(t, p),
                          "mae": sklearn.mean_absolute_error(t, p),
                          "pearson": stats.pearsonr(t, p)[0]}
    for name, values in expected.items():
        assert {key: float(found[name][key]) for key in values} == pytest.approx(values, rel=1e-10)
    compared(10, "values")


def test_large_means_cost_no_digits(compared):
    """Means over songs of squares would lose R² of labels far from 0; centred ones do not."""
    true, pred = random_songs(50)
    near, far = metrics.plain_metrics(true, pred), metrics.plain_metrics(true + 1e5, pred + 1e5)
    for name in DIMENSIONS:
        assert {key: float(value) for key, value in far[name].items()} == pytest.approx(
            {key: float(value) for key, value in near[name].items()}, rel=1e-8)
    compared(12, "values")


@pytest.mark.parametrize("label", [3.1, 5.0, 0.1 + 0.2])
def test_equal_values_have_no_correlation_and_no_r2(label, compared):
    """0, not a ratio of two rounding errors: of equal labels, and of a constant prediction."""
    _, pred = random_songs(7)
    equal = np.full((7, 2), label)
    for true, predicted in ((equal, pred), (equal, equal), (equal, equal + 0.3)):
        found = metrics.plain_metrics(true, predicted)
        assert all(found[name][key] == 0 for name in DIMENSIONS for key in ("r2", "pearson"))
        assert found["correlation"]["true"] == 0 and found["difference"]["r2"] == 0
    assert found["correlation"]["predicted"] == 0 and found["valence"]["ccc"] == 0
    for true in (random_songs(count)[0] for count in range(31, 175, 3)):
        mean = np.broadcast_to(true[:-1].mean(0), true.shape)
        found = metrics.plain_metrics(true, mean)
        assert found["correlation"]["predicted"] == 0
        assert found["arousal"]["pearson"] == 0 and abs(found["arousal"]["ccc"]) < 1e-12
        assert abs(found["valence"]["r2"]) < 0.01
    compared(3 + 48, "cases")


def test_a_quadrant_without_songs_has_no_f1(compared):
    """Counted by hand; the mean is over the three others."""
    true = np.array([[6, 6], [6, 6], [4, 6], [4, 4], [5, 5]], float)  # 5 counts as high
    pred = np.array([[6, 6], [4, 6], [4, 6], [4, 4], [5, 5]], float)
    found = metrics.plain_metrics(true, pred)["quadrant"]
    assert found["accuracy"] == pytest.approx(0.8)
    assert found["macro_f1"] == pytest.approx((4 / 5 + 2 / 3 + 1) / 3)
    compared(2, "values")


# --------------------------------------------------------------------------------------- intervals


def intervals_of(true, pred, groups):
    return metrics.with_intervals(metrics.resampled_metrics(true, pred, groups))["intervals"]


def test_intervals_against_a_plain_bootstrap(compared):
    """One resample after the other, of whole artists, with another generator."""
    true, pred = random_songs(90)
    artists = np.random.default_rng(1).integers(0, 40, 90)
    songs = [np.flatnonzero(artists == artist) for artist in np.unique(artists)]
    generator, draws = np.random.default_rng(2), []
    for _ in range(3000):
        drawn = np.concatenate([songs[n] for n in generator.integers(0, len(songs), len(songs))])
        t, p = true[drawn], pred[drawn]
        error = p - t
        draws.append([*(error**2).mean(0), *abs(error).mean(0),
                      *(1 - (error**2).sum(0) / ((t - t.mean(0)) ** 2).sum(0)),
                      *(np.corrcoef(t[:, n], p[:, n])[0, 1] for n in (0, 1)),
                      np.corrcoef(p.T)[0, 1], (quadrant(t, 5) == quadrant(p, 5)).mean()])
    expected = np.quantile(draws, [0.025, 0.975], axis=0).T
    found = intervals_of(true, pred, artists)
    found = [*(found[name][key] for key in ("mse", "mae", "r2", "pearson") for name in DIMENSIONS),
             found["correlation"]["predicted"], found["quadrant"]["accuracy"]]
    width = expected[:, 1] - expected[:, 0]
    assert (abs(found - expected) < 0.08 * width[:, None]).all()
    compared(expected.size, "bounds")


def test_resamples_draw_whole_groups_and_the_same_each_time(compared):
    true, pred = random_songs(30)
    groups = np.repeat(np.arange(10), 3)
    first, second = (metrics.resampled_means(np.vstack([*terms, np.arange(30) == 3,
                                                        np.arange(30) == 4]), groups)
                     for terms in (metrics.song_terms(true, pred), pred.T))
    song, its_group = first[-2:]
    assert song[0] == 1 / 30 and len(song) == 1 + 10_000 and len(np.unique(song)) > 3
    assert (song == its_group).all()
    np.testing.assert_array_equal(song, second[-1])
    assert song[1:].mean() == pytest.approx(1 / 30, rel=0.05)
    compared(10_000, "resamples")


def test_copies_are_not_new_songs(compared):
    """Every song four times: resampled as songs the interval is half as wide as it should be;
    resampled in groups it is that of the songs without their copies."""
    true, pred = random_songs(150)
    copies, width = (np.repeat(true, 4, 0), np.repeat(pred, 4, 0)), {}
    for name, data, groups in (("once", (true, pred), np.arange(150)),
                               ("copies", copies, np.arange(600)),
                               ("groups", copies, np.repeat(np.arange(150), 4))):
        low, high = intervals_of(*data, groups)["valence"]["mse"]
        width[name] = high - low
    assert width["groups"] == pytest.approx(width["once"], rel=0.01)
    assert width["copies"] == pytest.approx(width["once"] / 2, rel=0.1)
    compared(3, "intervals")


def test_wilsons_interval(compared):
    """Of the published 107 of 160, as scipy gives it; within 0 and 1 where a normal one is not."""
    assert metrics.wilson(107, 160) == pytest.approx([0.5926163390608729, 0.7369705700687442],
                                                     abs=1e-7)
    assert metrics.wilson(0, 10)[0] == pytest.approx(0) and metrics.wilson(10, 10)[1] <= 1
    compared(3, "intervals")


# ----------------------------------------------------------------------------- paired differences


def difference(true, preds, others, key="r2"):
    numbers = metrics.paired_difference(*([
        metrics.resampled_metrics(true, pred, np.arange(len(true))) for pred in side]
        for side in (preds, others)))
    return numbers["metrics"]["valence"][key], numbers["intervals"]["valence"][key]


def test_a_predictor_less_itself_is_nothing(compared):
    true, pred = random_songs()
    for preds in ([pred], [pred, pred]):
        value, interval = difference(true, preds, [pred])
        assert value == 0 and interval == [0, 0]
    compared(2, "differences")


def test_a_better_predictor_is_found_to_be_better(compared):
    """The difference of the two R²; both share the songs, so its interval is far narrower."""
    true, pred = random_songs(300)
    worse = pred + np.random.default_rng(1).normal(0, 0.4, pred.shape)
    value, (low, high) = difference(true, [pred], [worse])
    alone = [metrics.plain_metrics(true, each)["valence"]["r2"] for each in (pred, worse)]
    assert value == pytest.approx(alone[0] - alone[1]) and 0 < low < value < high
    back, interval = difference(true, [worse], [pred])
    assert back == pytest.approx(-value) and interval == pytest.approx([-high, -low])
    left, right = intervals_of(true, pred, np.arange(300))["valence"]["r2"]
    assert high - low < 0.8 * (right - left)
    compared(2, "differences")


def test_several_seeds_a_side_are_resampled_too(compared):
    """Of two models that differ by a gap, a quarter of the resamples have twice the one, a quarter
    twice the other; scaled by √2, since the variance of two draws from two is half of that of
    other models."""
    true, pred = random_songs(1000)
    noisy = pred + np.random.default_rng(1).normal(0, 0.6, pred.shape)
    gap, _ = difference(true, [pred], [noisy])
    value, (low, high) = difference(true, [pred, noisy], [noisy])
    assert value == pytest.approx(gap / 2)
    assert low == pytest.approx(gap / 2 * (1 - 2**0.5), abs=0.05 * gap + 0.01)
    assert high == pytest.approx(gap / 2 * (1 + 2**0.5), rel=0.25)
    _, (low, high) = difference(true, [pred] * 2, [noisy] * 2)  # alike: songs alone
    assert high - low < gap / 2
    compared(3, "intervals")


# ------------------------------------------------------------------- what the labels allow to reach


def normal_below(x):
    return 0.5 + 0.5 * torch.erf(torch.as_tensor(x) / math.sqrt(2)).numpy()


def rate(opinion, deviation, generator):
    """Ten integer ratings 1–9 of each song by annotators who scatter around an opinion[N], and what
    infinitely many would give on average."""
    ratings = generator.normal(opinion[:, None], deviation, (len(opinion), 10)).round().clip(1, 9)
    below = normal_below((np.arange(1.5, 9) - opinion[:, None]) / deviation)  # at most 1, 2, …
    return ratings, 9 - below.sum(1)


def test_noise_ceiling_against_ten_simulated_annotators(compared):
    """Predicting what infinitely many annotators would say reaches the ceiling; with σ² over ten
    instead of nine it would be higher."""
    generator, songs = np.random.default_rng(0), 20_000
    both = [rate(generator.normal(5, scale, songs), 1.6, generator) for scale in (1.0, 1.4)]
    labels, deviation = (np.stack([take(ratings) for ratings, _ in both], 1) for take in (
        lambda ratings: ratings.mean(1), lambda ratings: ratings.std(1, ddof=0)))
    best = np.stack([expected for _, expected in both], 1)
    ceiling = metrics.noise_ceiling(metrics.noise_terms(labels, deviation).mean(1))
    for n, name in enumerate(DIMENSIONS):
        reached = metrics.plain_metrics(labels, best)[name]["r2"]
        assert ceiling[name]["r2"] == pytest.approx(reached, abs=0.004)
        over_ten = 1 - (deviation[:, n] ** 2).mean() / 10 / labels[:, n].var()
        assert over_ten > reached + 0.008
    compared(2 * songs, "labels")


def deam_like(songs=200_000):
    """(true values, labels, the annotators' deviations) with the moments of DEAM's labels."""
    generator = np.random.default_rng(0)
    noise, scale, mean = np.array([0.26, 0.27]), np.array([1.106, 1.335]), np.array([5.0, 4.72])
    covariance = 0.614 * scale.prod() * np.array([[0, 1], [1, 0]]) + np.diag(scale**2 - noise)
    true = generator.multivariate_normal(mean, covariance, songs)
    return (true, true + generator.normal(0, noise**0.5, (songs, 2)),
            np.broadcast_to((9 * noise) ** 0.5, (songs, 2)))


def test_accuracy_of_the_true_values_against_a_simulation(compared):
    true, labels, deviation = deam_like()
    found = metrics.noise_free_accuracy(labels, deviation)
    reached = (quadrant(true, 5) == quadrant(labels, 5)).mean()
    assert found == pytest.approx(reached, abs=0.003) and found == pytest.approx(0.75, abs=0.01)
    assert metrics.noise_free_accuracy(labels, 0 * deviation) is None
    compared(len(true), "songs")


def test_a_perfect_predictor_of_exchanged_labels_against_a_simulation(compared):
    """Its best prediction is the regression of the labels, exchanged by chance, on the truth."""
    true, _, _ = deam_like()
    exchanged = np.random.default_rng(1).random(len(true)) < 744 / 1744
    labels = np.where(exchanged[:, None], true[:, ::-1], true)
    inputs = np.column_stack([true, np.ones(len(true))])
    best = inputs @ np.linalg.lstsq(inputs, labels, rcond=None)[0]
    found = metrics.perfect_correlation(true, exchanged.mean())
    assert found == pytest.approx(np.corrcoef(best.T)[0, 1], abs=0.002)
    assert found == pytest.approx(0.99, abs=0.005)
    assert metrics.perfect_correlation(true, 0) == pytest.approx(np.corrcoef(true.T)[0, 1])
    compared(len(true), "songs")


# --------------------------------------------------------------------------------------- baselines


def test_ridge_against_scikit_learn(compared):
    """Its Ridge on its StandardScaler's output, the penalty of the lowest MSE on the last songs."""
    x = np.column_stack([TRUE[:, 0] * 0.5 + PRED[:, 1], PRED[:, 0], TRUE[:, 1] ** 2 / 10])
    predict, penalty = metrics.ridge(x[:8], TRUE[:8], x[8:], TRUE[8:])
    assert penalty == pytest.approx(10**-0.5)
    np.testing.assert_allclose(predict(x[8:]), RIDGE, atol=1e-8)
    compared(8, "predictions")


# ----------------------------------------------------------------------------------------- reports


def annotated(true, start=1):
    """{song id: Labels} of true[N, 2] for songs from `start` on."""
    return {song: Labels(valence, 1.5, arousal, 1.2)
            for song, (valence, arousal) in enumerate(true.tolist(), start)}


def as_predictions(values, ids):
    return dict(zip(map(str, ids), values.tolist()))


def test_quadrants_of_a_report_in_context(compared):
    annotations, ids = annotated(TRUE), range(1, 13)
    numbers = metrics.measure(annotations, ids, as_predictions(PRED, ids),
                              as_predictions(TRUE, ids), [5, 5], np.arange(12))
    assert numbers["quadrants"]["largest_share"] == pytest.approx(5 / 12)
    assert numbers["quadrants"]["on_a_border"] == pytest.approx(2 / 12)
    less = numbers["less_ridge"]["metrics"]["valence"]["r2"]
    assert less == pytest.approx(KNOWN["valence"]["r2"] - 1)  # ridge is perfect
    assert numbers["baselines"]["training mean"]["correlation"]["predicted"] == 0
    compared(4, "numbers")


def test_folds_together(compared):
    """A fold's baseline is the mean of its own training labels; the standard deviation of R² over
    folds, and R² by year, are of the songs they name."""
    true, pred = random_songs(90)
    true[60:] += 1  # the third fold's songs are from 2014
    annotations = {**annotated(true[:60]), **annotated(true[60:], 1001)}
    ids = [list(range(1, 31)), list(range(31, 61)), list(range(1001, 1031))]
    means = [np.array([4.0, 6.0]), np.array([5.0, 5.0]), np.array([6.0, 4.0])]
    parts = [slice(0, 30), slice(30, 60), slice(60, 90)]
    preds = as_predictions(pred, sum(ids, []))
    numbers = metrics.measure_folds(annotations, ids, preds, preds, means)
    constant = np.repeat(means, 30, 0)
    for n, name in enumerate(DIMENSIONS):
        t = true[:, n]
        expected = 1 - ((t - constant[:, n]) ** 2).mean() / t.var()
        assert numbers["baselines"]["training mean"][name]["r2"] == pytest.approx(expected)
        r2 = [metrics.plain_metrics(true[part], pred[part])[name]["r2"] for part in parts]
        assert numbers["r2_over_folds"][name] == pytest.approx(np.std(r2, ddof=1))
        assert numbers["r2_by_year"]["2014"][name] == pytest.approx(r2[2])
        assert numbers["r2_by_year"]["2013"][name] == pytest.approx(
            metrics.plain_metrics(true[:60], pred[:60])[name]["r2"])
    assert "z_scored" not in numbers  # each fold has another scale
    compared(8, "numbers")


@pytest.mark.parametrize("value, digits, text", [
    (-0.123, ".2f", "−0.12"), (-0.001, ".2f", "0.00"), (0.05, "+.2f", "+0.05"),
    (-12.34, ".2f", "−12"), (-1234.5, ".2f", "<−999"), (1e6, ".3f", ">999"),
    (0.596, ".0%", "60%")])
def test_numbers_as_reports_show_them(value, digits, text, compared):
    assert report.rounded(value, digits) == text
    compared(1, "number")
