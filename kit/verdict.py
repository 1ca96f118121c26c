"""What every check of a record says: what is identical, close or different, and the verdict."""

import math
from collections import Counter

from kit.deam import splits_digest
from kit.metrics import label_digest, measure_split

TOLERANCE = 0.01  # predictions of float32 on the 1–9 scale, and losses, that differ less are close
LINES = 50
SIX_DECIMALS, ABSENT = 5e-7, ("absent",)  # a tuple: nothing that JSON can hold


class Verdict:
    """Counts what is identical, close and different, part by part, and prints a line for each part
    and for the first LINES things that are close and that are different; `finish` returns the exit
    code."""

    def __init__(self, what):
        self.total, self.checked, self.skipped = Counter(), [], []
        print(f"\nchecking {what}")

    def begin(self, part):
        self.part, self.counts = part, Counter()

    def compare(self, name, expected, actual, close=0.0, identical=0.0):
        """Compare two values. Numbers that differ by at most `identical` are identical, by less
        than `close` close. With a `close`, so are two digests: they do not say how far apart."""
        types = {type(expected), type(actual)}
        try:
            distance = abs(expected - actual) if types <= {int, float} else math.nan
        except OverflowError:  # a whole number that no float holds
            distance = math.inf
        if len(types) == 1 and expected == actual or distance <= identical:
            self.counts["identical"] += 1
            return
        kind = "close" if types == {str} and close or distance < close else "different"
        self.counts[kind] += 1
        if self.counts[kind] > LINES:
            return
        place, expected, actual = first_difference(name, expected, actual)
        shown = [f"{value:.9g}" if isinstance(value, float) else str(value)[:24]
                 for value in (expected, actual)]
        print(f"    {place}: {kind.upper() if kind == 'different' else kind}, expected "
              f"{shown[0]}, actual {shown[1]}")

    def compare_all(self, names, expected, actual, of="", **tolerance):
        """Compare what two dicts, `of` something, have under these names."""
        for name in names:
            self.compare(of + name.replace("_", " "), expected.get(name, ABSENT),
                         actual.get(name, ABSENT), **tolerance)

    def compare_leaves(self, expected, actual, **tolerance):
        """Compare two nested dicts number by number."""
        then, now = flat(expected), flat(actual)
        self.compare_all({**then, **now}, then, now, **tolerance)

    def end(self):
        """Print what a part came to."""
        counts = ", ".join(f"{kind} {self.counts[kind]}" for kind in
                           ("identical", "close", "different") if self.counts[kind])
        print(f"  {self.part}: {counts or 'nothing to compare'}")
        self.checked.append(self.part)
        self.total += self.counts

    def skip(self, part, reason):
        """A part that these inputs do not allow, and what would."""
        print(f"  {part}: not checked, {reason}")
        self.skipped.append(part)

    def finish(self):
        """Print the verdict over what was checked → 0 REPRODUCED, 3 CLOSE, 1 NOT REPRODUCED."""
        scope = "; ".join(self.checked) or "nothing was checked"
        scope += f"; not checked: {'; '.join(self.skipped)}" if self.skipped else ""
        if self.total["different"] or not self.total["identical"]:
            print(f"NOT REPRODUCED: {scope}")
            return 1
        print(f"{'CLOSE' if self.total['close'] else 'REPRODUCED'}: {scope}")
        return 3 if self.total["close"] else 0


def flat(value, name=""):
    """{"metrics.valence.mse": 1.2, "intervals.valence.mse[0]": 1.1, …} of nested dicts and lists;
    what is empty stays as it is."""
    if not isinstance(value, (dict, list)) or not value:
        return {name: value}
    pairs = ([(f"{name}.{key}".lstrip("."), inner) for key, inner in value.items()]
             if isinstance(value, dict) else
             [(f"{name}[{place}]", inner) for place, inner in enumerate(value)])
    return {key: leaf for place, inner in pairs for key, leaf in flat(inner, place).items()}


def first_difference(name, expected, actual):
    """(place, the value there in each) of the first leaf in which two values differ, however deep
    in dicts and lists."""
    then, now = flat(expected, name), flat(actual, name)
    for place in {**then, **now}:
        pair = then.get(place, ABSENT), now.get(place, ABSENT)
        if pair[0] != pair[1]:
            return place, *pair
    return name, expected, actual  # of two types


def compare_numbers(verdict, metrics, annotations, splits):
    """Every number of a metrics.json against what follows from its own predictions and the labels
    {song id: labels} that it is about."""
    split, pred = metrics["split"], metrics["predictions"]
    ids = [str(song) for song in splits[split]]
    verdict.compare("songs", list(pred), ids)
    verdict.compare("splits", metrics["splits"], splits_digest(splits))
    verdict.compare("labels", metrics["label_values"], label_digest(annotations, splits))
    if set(ids) == set(pred):
        follows = measure_split(annotations, splits, split, pred, metrics["ridge_predictions"])
        verdict.compare_leaves(metrics["numbers"], follows, identical=SIX_DECIMALS)


def closeness(precision):
    """How far apart results of two machines may be in this precision and still be close."""
    return 0.0 if precision == "exact" else TOLERANCE


def compare_predictions(verdict, expected, actual):
    """The predictions of two metrics.json, and ridge's with its penalty."""
    for kind, tolerance in (("predictions", {"close": closeness(expected["precision"])}),
                            ("ridge_predictions", {"identical": 2e-6})):
        verdict.compare_leaves({kind: expected[kind]}, {kind: actual[kind]}, **tolerance)
    verdict.compare("ridge penalty", expected["ridge_penalty"], actual["ridge_penalty"],
                    identical=1e-9 * actual["ridge_penalty"])
