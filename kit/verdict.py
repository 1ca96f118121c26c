"""What every check of a record says: what is identical, close or different, and the verdict."""

import math


class Verdict:
    """What every --verify says: a line for each thing that is not identical, a count of those that
    are, then REPRODUCED, CLOSE or NOT REPRODUCED; `finish` returns the exit code 0, 3 or 1."""

    def __init__(self, what):
        self.identical, self.close, self.different = 0, 0, 0
        print(f"\nverifying {what}:")

    def compare(self, name, expected, found, limit=0.0, same=0.0, like=False):
        """Compare two values. Numbers that differ by at most `same` are identical, by less than
        `limit` close; with `like` anything that differs is close."""
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool)
                      for value in (expected, found))
        try:
            apart = abs(expected - found) if numbers else math.nan
        except OverflowError:  # a whole number that no float holds
            apart = math.inf
        if type(expected) is type(found) and expected == found or apart <= same:
            self.identical += 1
            return
        near = like or apart < limit
        self.close, self.different = self.close + near, self.different + (not near)
        place, expected, found = first_difference(expected, found)
        shown = [f"{value:.9g}" if isinstance(value, float) else str(value)[:24]
                 for value in (expected, found)]
        word = "close" if near else "DIFFERENT"
        print(f"  {name + place:42} {word}: expected {shown[0]}, found {shown[1]}")

    def compare_all(self, names, expected, found):
        """Compare what two dicts have under these names."""
        for name in names:
            self.compare(name.replace("_", " "), expected.get(name), found.get(name))

    def finish(self, what):
        print(f"  {self.identical} identical, {self.close} close, {self.different} different")
        if self.different or not self.identical:
            print(f"NOT REPRODUCED: {what}")
            return 1
        print(f"{'CLOSE' if self.close else 'REPRODUCED'}: {what}")
        return 3 if self.close else 0


def first_difference(expected, found):
    """The first place at which two lists or two dicts differ, however deep: ("[3]", its value in
    each, "nothing" if it has none); ("", expected, found) of anything else."""
    for kind, keys in ((list, lambda value: range(len(value))), (dict, dict.keys)):
        if isinstance(expected, kind) and isinstance(found, kind):
            for key in dict.fromkeys([*keys(expected), *keys(found)]):
                then, now = (value[key] if key in keys(value) else "nothing"
                             for value in (expected, found))
                if then != now:
                    place, *values = first_difference(then, now)
                    return f"[{key}]{place}", *values
    return "", expected, found


def differences(then, now):
    """"key a there, b now; …" for two dicts of settings; empty if they are the same."""
    return "; ".join(f"{key} {then.get(key)} there, {now.get(key)} now"
                     for key in {**then, **now} if then.get(key) != now.get(key))
