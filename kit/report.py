"""What eval.py prints: what a reader looks for first, details below, within 80 columns."""

import numpy as np

from kit.deam import DIMENSIONS
from kit.metrics import perfect_correlation, true_values, with_interval

FIXED = ("95% intervals resample {}; the trained models are held fixed, and other\nseeds and "
         "training sets vary as much again")


def print_evaluation(evaluation):
    """What was evaluated, the numbers, and what a reader should know about them."""
    content, data = evaluation.content, evaluation.data
    runs = content.get("runs", {content["run"]: content})
    title = evaluation.folder.parent if len(runs) == 1 else f"{len(runs)} runs"
    print(f"\n{title}: {content['finetune']}, {content['split']} split, n = {content['songs']}, "
          f"{content['labels']} labels, {content['precision']}")
    if content["labels"] != content["trained_on_labels"]:
        print(f"measured on {content['labels']} labels; trained on "
              f"{content['trained_on_labels']} ones")
    print_numbers(content["numbers"], "artists" if len(runs) > 1 else "songs")
    print_collapse(evaluation)
    print()
    for note in data.notes():
        print(note)
    print(f"features {content['features']}")
    for name, each in runs.items():
        print(f"model    {each['model']}  {name}")


def print_numbers(numbers, resampled):
    metrics, less = numbers["metrics"], numbers["less_ridge"]
    print()
    for name in DIMENSIONS:
        print(f"{name:10} " + "  ".join(f"{label} {with_interval(numbers, name, key):18}" for
                                        label, key in (("R²", "r2"), ("r", "pearson"),
                                                       ("CCC", "ccc"))))
    print(f"{'V − A':10} R² {with_interval(numbers, 'difference', 'r2')}")
    print("\n  R² of       noise ceiling         ridge  mean label  network less ridge")
    for name in DIMENSIONS:
        linear, mean = (numbers["baselines"][each][name]["r2"]
                        for each in ("ridge", "training mean"))
        print(f"  {name:10}  {with_interval(numbers['noise_ceiling'], name, 'r2'):17}{linear:z10.2f}"
              f"{mean:z12.2f}  {with_interval(less, name, 'r2', '+.2f')}")
    print(ridge_verdict(less))
    print_errors(numbers)
    share = numbers["quadrants"]
    print(f"quadrants right {with_interval(numbers, 'quadrant', 'accuracy', '.0%')}, macro F1 "
          f"{metrics['quadrant']['macro_f1']:.2f}; the largest alone {share['largest_share']:.0%}"
          + (f",\nwithout any error but the labels' own {share['noise_free_accuracy']:.0%}"
             if share["noise_free_accuracy"] else "")
          + f"; {share['on_a_border']:.1%} of the songs are on a border")
    if "unseen_artists" in numbers:
        unseen = numbers["unseen_artists"]
        print(f"unseen artists: {unseen['songs']} songs, too few to compare models by: R² "
              + ", ".join(f"{name} {with_interval(unseen, name, 'r2')}" for name in DIMENSIONS))
    if "r2_by_year" in numbers:
        for year, r2 in numbers["r2_by_year"].items():
            print(f"R² on the songs of {year}: " + ", ".join(
                f"{name} {r2[name]:z.2f}" for name in DIMENSIONS))
        print("standard deviation of R² over folds: " + ", ".join(
            f"{name} {numbers['r2_over_folds'][name]:.2f}" for name in DIMENSIONS))
    print(FIXED.format(resampled))


def print_errors(numbers):
    """The errors on the 1–9 scale, and z-scored where one scale holds for all songs."""
    for name in DIMENSIONS:
        metrics, z_scored = numbers["metrics"][name], numbers.get("z_scored", {}).get(name)
        print(f"  {name:8} MSE {metrics['mse']:.3f}  RMSE {metrics['rmse']:.3f}  MAE "
              f"{metrics['mae']:.3f}" + (f"  z-scored MSE {z_scored['mse']:.3f}  MAE "
                                         f"{z_scored['mae']:.3f}" if z_scored else ""))


def ridge_verdict(less):
    """One line: whether the network beats ridge regression on the same features."""
    verdicts = []
    for name in DIMENSIONS:
        low, high = less["intervals"][name]["r2"]
        word = "beats ridge" if low > 0 else "loses to ridge" if high < 0 else "ties with ridge"
        verdicts.append(word)
    if len(set(verdicts)) == 1:
        return f"the network {verdicts[0]} on both"
    return "the network " + " and ".join(map(" on ".join, zip(verdicts, DIMENSIONS)))


def collapsed(metrics, intervals):
    """Whether predicted valence and arousal are nearly one number, beyond what is true of the
    labels: both must hold over the whole interval."""
    low, high = intervals["correlation"]["predicted"]
    return min(abs(low), abs(high)) >= 0.9 and low * high > 0 and (
        intervals["correlation"]["excess"][0] > 0)


def print_collapse(evaluation):
    """The correlation of valence with arousal, and whether it is a collapse, for the network and
    ridge alike."""
    numbers, data = evaluation.content["numbers"], evaluation.data
    ridge = {"metrics": numbers["baselines"]["ridge"], "intervals": numbers["ridge_intervals"]}
    print("correlation of valence with arousal: true "
          f"{numbers['metrics']['correlation']['true']:.2f}")
    for name, each in (("network", numbers), ("ridge", ridge)):
        print(f"  {name:8} {with_interval(each, 'correlation', 'predicted')}"
              + (": a collapse to nearly one number" if collapsed(**{
                  key: each[key] for key in ("metrics", "intervals")}) else ""))
    swapped = data.manifest["swapped_labels"]
    if swapped and evaluation.content["trained_on_labels"] == "shipped":
        songs = [song for ids in data.splits.values() if isinstance(ids, list) for song in ids]
        exchanged = [any(low <= song <= high for low, high in swapped) for song in songs]
        print(f"  the labels make it: {sum(exchanged)} of {len(songs)} pairs are exchanged, and "
              "where nothing tells which, a\n  perfect predictor's correlate at "
              f"{perfect_correlation(as_they_should_be(data, songs, exchanged), np.mean(exchanged)):.3f}")


def as_they_should_be(data, songs, exchanged):
    """The labels [N, 2] with valence and arousal in their places."""
    values = true_values(data.annotations, songs)
    if data.labels == "shipped":
        values = np.where(np.array(exchanged)[:, None], values[:, ::-1], values)
    return values


# ------------------------------------------------------------------------------------ several runs


def print_runs(evaluations, same_settings):
    """One row a run; the mean and standard deviation (of the sample) over runs that differ in the
    seed alone."""
    def cells(content):
        metrics = content["numbers"]["metrics"]
        return [*(metrics[name][key] for name in DIMENSIONS for key in ("r2", "pearson", "ccc")),
                metrics["quadrant"]["accuracy"], metrics["correlation"]["predicted"]]

    rows = {each.content["run"]: cells(each.content) for each in evaluations}
    table = np.array(list(rows.values()))
    if same_settings:
        rows |= {"mean": table.mean(0), "standard deviation": table.std(0, ddof=1)}
    print(f"\n{'':20}{'valence':>21}{'arousal':>21}{'quadr.':>8}{'r(V, A)':>9}\n{'run':20}"
          + f"{'R²':>7}{'r':>7}{'CCC':>7}" * 2 + f"{'right':>8}{'pred.':>9}")
    for name, row in rows.items():
        print(f"{name[:19]:20}" + "".join(f"{value:7.2f}" for value in row[:6])
              + f"{row[6]:8.2f}{row[7]:9.2f}")


def print_difference(first, second, values, intervals, resampled):
    """What two sides' models differ by. first, second: contents of metrics.json, one a model."""
    def side(contents):
        return contents[0]["run"] + (f" and {len(contents) - 1} more" if contents[1:] else "")

    trained = [contents[0]["trained_on_labels"] for contents in (first, second)]
    print(f"\n{side(first)} less {side(second)}, on the same {first[0]['songs']} songs and "
          f"{first[0]['labels']} labels"
          + (f" (trained on {trained[0]} and {trained[1]} ones)" if len(set(trained)) > 1 else ""))
    numbers = {"metrics": values, "intervals": intervals}
    for name in DIMENSIONS:
        print(f"{name:10} " + "  ".join(
            f"{label} {with_interval(numbers, name, key, '+.2f')}"
            for label, key in (("R²", "r2"), ("r", "pearson"), ("CCC", "ccc"))))
    models = max(len(first), len(second))
    print(f"95% intervals resample {resampled}" + (
        " and models" if models > 1 else "; the trained models are held fixed: a difference that "
        "excludes 0\nis necessary for a claim, and not sufficient (give several seeds a side)"))
