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
        """Compare two values, nested ones leaf by leaf. Numbers that differ by at most `identical`
        are identical, by less than `close` close. With a `close` so are two texts: digests do
        not say how far apart they are."""
        expected, actual = flat(expected, name), flat(actual, name)
        for place in {**expected, **actual}:
            pair = expected.get(place, ABSENT), actual.get(place, ABSENT)
            kind = kind_of(*pair, close, identical)
            self.counts[kind] += 1
            if kind != "identical" and self.counts[kind] <= LINES:
                shown = ["nothing" if value is ABSENT else f"{value:.9g}"
                         if isinstance(value, float) else str(value)[:24] for value in pair]
                print(f"    {place}: {kind.upper() if kind == 'different' else kind}, expected "
                      f"{shown[0]}, actual {shown[1]}")

    def compare_all(self, names, expected, actual, of="", **tolerance):
        """Compare what two dicts, `of` something, have under these names."""
        for name in names:
            self.compare(of + name.replace("_", " "), expected.get(name, ABSENT),
                         actual.get(name, ABSENT), **tolerance)

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
    if isinstance(value, list):
        pairs = [(f"{name}[{place}]", inner) for place, inner in enumerate(value)]
    else:  # a key that looks like a place is quoted: none may stand in for another
        pairs = [(f"{name}.{repr(key) if set('.[') & set(key) else key}".lstrip("."), inner)
                 for key, inner in value.items()]
    return {key: leaf for place, inner in pairs for key, leaf in flat(inner, place).items()}


def kind_of(expected, actual, close, identical):
    """Whether two leaves are identical, close or different."""
    types = {type(expected), type(actual)}
    try:
        distance = abs(expected - actual) if types <= {int, float} else math.nan
    except OverflowError:  # a whole number that no float holds
        distance = math.inf
    if len(types) == 1 and expected == actual or distance <= identical:
        return "identical"
    return "close" if types == {str} and close or distance < close else "different"


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
        verdict.compare("", metrics["numbers"], follows, identical=SIX_DECIMALS)


def closeness(precision):
    """How far apart results of two machines may be in this precision and still be close."""
    return 0.0 if precision == "exact" else TOLERANCE


def compare_predictions(verdict, expected, actual, ridge_close=0.0):
    """The predictions of two metrics.json, and ridge's with its penalty; ridge's may be close only
    where the features are of another machine."""
    verdict.compare("predictions", expected["predictions"], actual["predictions"],
                    close=closeness(expected["precision"]))
    verdict.compare("ridge predictions", expected["ridge_predictions"],
                    actual["ridge_predictions"], identical=2e-6, close=ridge_close)
    verdict.compare("ridge penalty", expected["ridge_penalty"], actual["ridge_penalty"],
                    identical=1e-9 * actual["ridge_penalty"])
