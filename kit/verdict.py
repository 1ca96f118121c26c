"""What every check of a record says: what is identical, close or different, and the verdict."""

import math

from kit.deam import splits_digest
from kit.metrics import label_digest, measure_split

TOLERANCE = 0.01  # on the 1–9 scale: predictions of float32 that differ less are close
SIX_DECIMALS, ABSENT = 5e-7, ("absent",)  # a tuple: nothing that JSON can hold


class Verdict:
    """Counts what is identical, close and different, part by part, and prints a line for each part
    and for each thing that is not identical; `finish` returns the exit code."""

    def __init__(self, what):
        self.total = {"identical": 0, "close": 0, "different": 0}
        self.part, self.checked, self.skipped = None, [], []
        print(f"\nchecking {what}")

    def begin(self, part):
        self.part, self.counts = part, {"identical": 0, "close": 0, "different": 0}

    def compare(self, name, expected, actual, close=0.0, identical=0.0, any_close=False):
        """Compare two values. Numbers that differ by at most `identical` are identical, by less
        than `close` close; with `any_close` whatever differs, of one type, is close."""
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool)
                      for value in (expected, actual))
        try:
            distance = abs(expected - actual) if numbers else math.nan
        except OverflowError:  # a whole number that no float holds
            distance = math.inf
        one_type = type(expected) is type(actual)
        if one_type and expected == actual or distance <= identical:
            self.counts["identical"] += 1
            return
        kind = "close" if any_close and one_type or distance < close else "different"
        self.counts[kind] += 1
        place, expected, actual = first_difference(expected, actual)
        shown = [f"{value:.9g}" if isinstance(value, float) else str(value)[:24]
                 for value in (expected, actual)]
        print(f"    {name + place}: {kind.upper() if kind == 'different' else kind}, expected "
              f"{shown[0]}, actual {shown[1]}")

    def compare_all(self, names, expected, actual):
        """Compare what two dicts have under these names."""
        for name in names:
            self.compare(name.replace("_", " "), expected.get(name), actual.get(name))

    def compare_leaves(self, expected, actual, **tolerance):
        """Compare two nested dicts number by number."""
        then, now = flat(expected), flat(actual)
        for name in {**then, **now}:
            self.compare(name, then.get(name, ABSENT), now.get(name, ABSENT), **tolerance)

    def end(self):
        """Print what a part came to."""
        counts = ", ".join(f"{kind} {count}" for kind, count in self.counts.items() if count)
        print(f"  {self.part}: {counts or 'nothing to compare'}")
        self.checked.append(self.part)
        for kind, count in self.counts.items():
            self.total[kind] += count

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


def first_difference(expected, actual):
    """The first place at which two lists or two dicts differ, however deep: ("[3]", its value in
    each, "nothing" if it has none); ("", expected, actual) of anything else."""
    for kind, keys in ((list, lambda value: range(len(value))), (dict, dict.keys)):
        if isinstance(expected, kind) and isinstance(actual, kind):
            for key in dict.fromkeys([*keys(expected), *keys(actual)]):
                then, now = (value[key] if key in keys(value) else "nothing"
                             for value in (expected, actual))
                if then != now:
                    place, *values = first_difference(then, now)
                    return f"[{key}]{place}", *values
    return "", expected, actual


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


def compare_predictions(verdict, expected, actual):
    """The predictions of two metrics.json, and ridge's with its penalty."""
    close = 0.0 if expected["precision"] == "exact" else TOLERANCE
    for kind, tolerance in (("predictions", {"close": close}),
                            ("ridge_predictions", {"identical": 2e-6})):
        verdict.compare_leaves({kind: expected[kind]}, {kind: actual[kind]}, **tolerance)
    verdict.compare("ridge penalty", expected["ridge_penalty"], actual["ridge_penalty"],
                    identical=1e-9 * actual["ridge_penalty"])
