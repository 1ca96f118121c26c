"""What eval.py prints, within 80 columns: what a reader looks for first, details below."""

import textwrap

import numpy as np

from kit.deam import DIMENSIONS, songs_of
from kit.metrics import perfect_correlation, true_values, wilson
from kit.published import TEST_SONGS, beside_evaluation

WIDTH = 80


def say(text, indent=""):
    """Print a text, its lines broken between words."""
    print(textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False,
                        break_on_hyphens=False))


def rounded(value, digits=".2f"):
    """A number as reports show it: "−0.52"; two or more digits before the point need none after."""
    if abs(value) >= 1000:
        return "<−999" if value < 0 else ">999"
    digits = digits.replace(".2f", ".0f") if abs(value) >= 10 else digits
    return f"{value:{digits.replace('.', 'z.')}}".replace("-", "−")  # z: no minus zero


def with_interval(numbers, name, key, digits=".2f"):
    """"0.52 [0.41, 0.60]": a metric with its interval."""
    low, high = (rounded(each, digits) for each in numbers["intervals"][name][key])
    return f"{rounded(numbers['metrics'][name][key], digits)} [{low}, {high}]"


def main_metrics(numbers, name, digits=".2f"):
    """One line: R², r and CCC of a dimension with their intervals."""
    cells = [f"{label} {with_interval(numbers, name, key, digits):20}"
             for label, key in (("R²", "r2"), ("r", "pearson"), ("CCC", "ccc"))]
    return " ".join([f"{name:7}", *cells]).rstrip()


def ridge_of(numbers):
    """Ridge regression's metrics and intervals."""
    return {"metrics": numbers["baselines"]["ridge"], "intervals": numbers["ridge_intervals"]}


def print_evaluation(evaluation):
    """What was evaluated, the numbers, and what a reader should know about them."""
    content, numbers = evaluation.content, evaluation.content["numbers"]
    runs = content.get("runs", {content["run"]: content})
    title = content["run"] if len(runs) == 1 else f"{len(runs)} runs"
    labels = f"{content['labels']} labels"
    if content["labels"] != content["trained_on_labels"]:
        labels += f" (trained on {content['trained_on_labels']} ones)"
    say(f"{title}: {content['finetune']}, {content['split']} split, n = {content['songs']}, "
        f"{labels}, {content['precision']}")
    print()
    for name in DIMENSIONS:
        print(main_metrics(numbers, name))
    print(f"V − A   R² {with_interval(numbers, 'difference', 'r2')}")
    say(f"95% intervals resample {'artists' if len(runs) > 1 else 'songs'}; the trained models are "
        "fixed: other seeds and training songs vary them as much again.")
    print_details(numbers)
    print_quadrants(numbers)
    print_correlation(evaluation)
    if "published" in numbers:
        print_published(evaluation)
    print()
    for note in evaluation.data.notes():
        say(note, "  ")
    print(f"features {content['features']}")
    for name, each in runs.items():
        print(f"model    {each['model']}" if len(runs) == 1 else
              f"model    {each['model'][:16]}  {name}")


def print_row(title, *cells):
    """A line of a table with two columns."""
    print(f"{title:28}" + "".join(f"{cell:26}" for cell in cells).rstrip())


def listed(values, digits):
    """"0.761, 0.873": a number or several; "–" where there is none."""
    return "–" if values is None else ", ".join(rounded(each, digits)
                                                for each in np.atleast_1d(values))


def print_details(numbers):
    """A table of both dimensions: what R² is to be compared with, and the errors."""
    def r2(each, digits=".2f"):
        return [with_interval(each, name, "r2", digits) for name in DIMENSIONS]

    def errors(values, *keys):
        return [listed([values[name][key] for key in keys], ".3f") for name in DIMENSIONS]

    mean = numbers["baselines"]["training mean"]
    print()
    print_row("", *DIMENSIONS)
    print_row("R², noise ceiling", *r2(numbers["noise_ceiling"]))
    print_row("R², ridge regression", *r2(ridge_of(numbers)))
    print_row("R², network less ridge", *r2(numbers["less_ridge"], "+.2f"))
    print_row("R², mean training label", *(rounded(mean[name]["r2"]) for name in DIMENSIONS))
    for year, values in numbers.get("r2_by_year", {}).items():
        print_row(f"R², songs of {year}", *(rounded(values[name]) for name in DIMENSIONS))
    if "r2_over_folds" in numbers:
        deviation = numbers["r2_over_folds"]
        print_row("R², sd over folds", *(rounded(deviation[name]) for name in DIMENSIONS))
    if "unseen_artists" in numbers:
        print_row("R², unseen artists", *r2(numbers["unseen_artists"]))
    print_row("MSE, RMSE, MAE", *errors(numbers["metrics"], "mse", "rmse", "mae"))
    if "z_scored" in numbers:
        print_row("z-scored MSE, MAE", *errors(numbers["z_scored"], "mse", "mae"))
    if "unseen_artists" in numbers:
        say(f"Unseen artists: {numbers['unseen_artists']['songs']} songs, too few to compare "
            "models by.")
    verdicts = [f"{ridge_verdict(numbers['less_ridge'], name)} in {name}" for name in DIMENSIONS]
    say(f"Against ridge regression the network {' and '.join(verdicts)}.")


def ridge_verdict(less_ridge, name):
    """Whether the network beats ridge regression, or loses: only with the whole interval."""
    low, high = less_ridge["intervals"][name]["r2"]
    return "wins" if low > 0 else "loses" if high < 0 else "ties"


def print_quadrants(numbers):
    share = numbers["quadrants"]
    free = share["noise_free_accuracy"]
    print()
    say(f"Quadrants right: {with_interval(numbers, 'quadrant', 'accuracy', '.0%')}, macro F1 "
        f"{numbers['metrics']['quadrant']['macro_f1']:.2f}. The most frequent quadrant alone gives "
        f"{share['largest_share']:.0%}"
        + (f"; the true values would give {free:.0%}, since labels are noisy (Gaussian model)"
           if free else "") + f". {share['on_a_border']:.1%} of the songs lie on a border.")


# ------------------------------------------------------------------------ correlation and collapse


def collapsed(intervals):
    """Whether predicted valence and arousal are nearly one number, beyond what is true of the
    labels: both must hold over the whole interval."""
    low, high = intervals["correlation"]["predicted"]
    return min(abs(low), abs(high)) >= 0.9 and low * high > 0 and (
        intervals["correlation"]["excess"][0] > 0)


def print_correlation(evaluation):
    """The correlation of valence with arousal, and whether it is a collapse, for the network and
    ridge alike; how much of it comes from the labels themselves."""
    numbers, data = evaluation.content["numbers"], evaluation.data
    print("\nCorrelation of valence with arousal\n"
          f"  labels   {rounded(numbers['metrics']['correlation']['true'])}")
    for name, each in (("network", numbers), ("ridge", ridge_of(numbers))):
        print(f"  {name:8} {with_interval(each, 'correlation', 'predicted')}"
              + (", a collapse: nearly one number" if collapsed(each["intervals"]) else ""))
    swapped = data.manifest["swapped_labels"]
    if not swapped or evaluation.content["trained_on_labels"] != "shipped":
        return
    songs = songs_of(data.splits)
    exchanged = np.array([any(low <= song <= high for low, high in swapped) for song in songs])
    values = true_values(data.annotations, songs)
    if data.labels == "shipped":  # back to their places
        values = np.where(exchanged[:, None], values[:, ::-1], values)
    say(f"In the shipped labels valence and arousal are exchanged for {exchanged.sum()} of "
        f"{len(songs)} songs. Nothing tells a model which, so that even a perfect one's "
        f"predictions would correlate at {perfect_correlation(values, exchanged.mean()):.3f}.")


# ---------------------------------------------------------------------------------- published runs

ROWS = {"MSE of valence, arousal": "test_mse", "z-scored MSE of each": "test_z_mse_each",
        "z-scored MSE": "test_z_mse", "correlation, labels": "true_correlation",
        "correlation, predicted": "predicted_correlation"}


def right_of_first(run):
    """"107, 67% [59%, 74%]": the quadrants right of the first test songs, with Wilson's interval.
    run: of published.json, or what is to be compared with one."""
    right = run["quadrants_right"]
    low, high = wilson(right, TEST_SONGS)
    return f"{right}, {right / TEST_SONGS:.0%} [{low:.0%}, {high:.0%}]"


def print_published(evaluation):
    """Beside each number that was published of the first test songs, the same of this run."""
    content = evaluation.content
    published = beside_evaluation(content, evaluation.config)
    print()
    if not published:
        say("The published numbers are about the shipped labels: --labels shipped compares.")
        return

    own = content["numbers"]["published"]["this_run"]
    print_row(f"first {TEST_SONGS} test songs", "published", "this run")
    for title, key in ROWS.items():
        print_row(title, *(listed(run.get(key), ".4f") for run in (published, own)))
    print_row("quadrants right", right_of_first(published), right_of_first(own))
    for song, values in published["predictions"].items():
        print_row(f"song {song}: valence, arousal", listed(values, ".2f"),
                  listed(content["predictions"][song], ".2f"))
    seconds = published["seconds_an_epoch"]
    say(f"Published: {published['notebook']}, {published['options']}; {published['gpu']}"
        + (f", {seconds} s an epoch" if seconds else ""))


# ------------------------------------------------------------------------------------ several runs


def print_runs(evaluations, same_settings):
    """One row a run; the mean and standard deviation (of the sample) over runs that differ in the
    seed alone."""
    names = [each.content["run"] for each in evaluations]
    if len(set(names)) < len(names):
        names = [str(each.folder.parent)[-19:] for each in evaluations]
    columns = [(name, key) for name in DIMENSIONS for key in ("r2", "pearson", "ccc")]
    columns += [("correlation", "predicted"), ("quadrant", "accuracy")]
    table = np.array([[each.content["numbers"]["metrics"][name][key] for name, key in columns]
                      for each in evaluations])
    rows = [*zip(names, table)]
    if same_settings:
        rows += [("mean", table.mean(0)), ("standard deviation", table.std(0, ddof=1))]
    print(f"\n{'':20}{'valence':>21}{'arousal':>21}{'r(V,A)':>7}{'quadr.':>7}\n{'run':20}"
          + f"{'R²':>7}{'r':>7}{'CCC':>7}" * 2 + f"{'pred.':>7}{'right':>7}")
    for name, row in rows:
        print(f"{name[:19]:20}" + "".join(f"{rounded(value):>7}" for value in row))


def print_difference(first, second, numbers):
    """What two sides' models differ by. first, second: contents of metrics.json, one a model;
    numbers: their `paired_difference`."""
    def side(contents):
        return contents[0]["run"] + (f" and {len(contents) - 1} more" if contents[1:] else "")

    trained = [contents[0]["trained_on_labels"] for contents in (first, second)]
    print()
    say(f"{side(first)} less {side(second)}, n = {first[0]['songs']}, "
        f"{first[0]['labels']} labels"
        + (f" (trained on {trained[0]} and {trained[1]} ones)" if len(set(trained)) > 1 else ""))
    for name in DIMENSIONS:
        print(main_metrics(numbers, name, "+.2f"))
    say("95% intervals resample artists" + (
        " and the models of a side that has several." if max(len(first), len(second)) > 1 else
        "; the trained models are fixed. An interval without 0 is necessary for a claim, and not "
        "sufficient: give several seeds a side."))
