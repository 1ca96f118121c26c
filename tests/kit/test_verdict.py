"""What is identical, close or different, and the verdict over it."""

import copy
import math

import pytest

from kit.verdict import ABSENT, Verdict, compare_predictions, flat


def counts(*arguments, **settings):
    """What one comparison counts as."""
    verdict = Verdict("a test")
    verdict.begin("part")
    verdict.compare("it", *arguments, **settings)
    return [kind for kind, count in verdict.counts.items() if count]


@pytest.mark.parametrize("expected, actual, settings, kind", [
    (1.0, 1.0, {}, "identical"), ("a", "a", {}, "identical"), (None, None, {}, "identical"),
    ([1, 2], [1, 2], {}, "identical"), (1.0, 1.0 + 1e-12, {}, "different"),
    ("a", "b", {}, "different"), (None, 0, {}, "different"), (True, 1, {}, "different"),
    (1, 1.0, {}, "identical"), ([1], (1,), {}, "different"), (math.nan, math.nan, {}, "different"),
    (math.nan, 1.0, {"close": 0.1}, "different"), (1, 10**400, {"close": 1}, "different"),
    (1.0, 1.01, {"close": 0.01}, "different"), (1.0, 1.0099, {"close": 0.01}, "close"),
    (1.0, 1.0 + 5e-7, {"identical": 6e-7}, "identical"),
    (1.0, 1.0 + 7e-7, {"identical": 6e-7}, "different"),
    ("a", "b", {"close": 0.01}, "close"), (None, "b", {"close": 0.01}, "different"),
    ("a", None, {"close": 0.01}, "different")])
def test_comparisons(compared, expected, actual, settings, kind):
    assert counts(expected, actual, **settings) == [kind]
    compared(1, "comparison")


@pytest.mark.parametrize("pairs, code, word", [
    ([], 1, "NOT REPRODUCED: empty"), ([(1, 1)], 0, "REPRODUCED: empty; full"),
    ([(1, 1), (1, 1.001)], 3, "CLOSE: empty; full"), ([(1, 1.001)], 1, "NOT REPRODUCED"),
    ([(1, 1), (1, 1.001), (1, 2)], 1, "NOT REPRODUCED"), ([(1, 2)] * 2, 1, "NOT REPRODUCED")])
def test_the_verdict(capsys, compared, pairs, code, word):
    """Nothing compared is not reproduced, nor is what has nothing identical in it; a part without
    anything to compare says so."""
    verdict = Verdict("a test")
    verdict.begin("empty")
    verdict.end()
    if pairs:
        verdict.begin("full")
        for pair in pairs:
            verdict.compare("it", *pair, close=0.01)
        verdict.end()
    verdict.skip("more", "give it with --more")
    assert verdict.finish() == code
    lines = capsys.readouterr().out.splitlines()
    assert "  empty: nothing to compare" in lines
    assert "  more: not checked, give it with --more" in lines
    assert lines[-1].startswith(word) and lines[-1].endswith("; not checked: more")
    assert len([line for line in lines if line.startswith("    it: ")]) == sum(
        one != two for one, two in pairs)
    compared(1, "verdict")


def test_a_verdict_over_nothing(capsys, compared):
    verdict = Verdict("a test")
    verdict.skip("all", "give it")
    assert verdict.finish() == 1
    assert capsys.readouterr().out.splitlines()[-1] == (
        "NOT REPRODUCED: nothing was checked; not checked: all")
    compared(1, "verdict")


def test_nested_values_are_compared_number_by_number(capsys, compared):
    """What one side lacks is different; lists and dicts that are empty count too."""
    value = {"a": {"b": [1.0, 2.0], "c": {}}, "d": [], "e": None}
    assert flat(value) == {"a.b[0]": 1.0, "a.b[1]": 2.0, "a.c": {}, "d": [], "e": None}
    edits = [{**value, "a.b[0]": 1.5}, {**value, "a.b": [1.0, 2.0]}]
    for edit in (lambda v: v.pop("d"), lambda v: v["a"].pop("b"), lambda v: v["a"]["b"].append(3),
                 lambda v: v["a"].update(c={"x": 1}), lambda v: v.update(e=0),
                 lambda v: v.update(d=[[]]), lambda v: v["a"]["b"].pop()):
        edits.append(copy.deepcopy(value))
        edit(edits[-1])
    for edited in edits:
        for pair in ((value, edited), (edited, value)):
            verdict = Verdict("a test")
            verdict.begin("part")
            verdict.compare("", *pair)
            assert verdict.counts["different"] > 0, edited
    verdict.begin("part")
    verdict.compare("", value, copy.deepcopy(value))
    assert verdict.counts == {"identical": 5}
    assert ABSENT not in ([], {}, "absent", None)
    verdict.compare("deep", {"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]})
    assert "    deep.a[1].b: DIFFERENT, expected 2, actual 3" in capsys.readouterr().out
    compared(2 * len(edits) + 2, "comparisons")


def test_a_part_of_many_differences_names_the_first(capsys, compared):
    """And counts all; what is close does not hide what is different."""
    verdict = Verdict("a test")
    verdict.begin("part")
    for n in range(80):
        verdict.compare(f"close {n}", 1.0, 1.001, close=0.01)
        verdict.compare(f"other {n}", 1, 2)
    verdict.end()
    output = capsys.readouterr().out
    assert "part: close 80, different 80" in output
    assert "close 49:" in output and "other 49:" in output and "50:" not in output
    compared(160, "comparisons")


def test_predictions_may_be_close_in_float32_alone(compared):
    """Ridge's are compared to what machines differ by."""
    made = {"predictions": {"2": [5.0, 6.0]}, "ridge_predictions": {"2": [5.0, 6.0]},
            "ridge_penalty": 100.0}
    for precision, kind in (("float32", "close"), ("exact", "different")):
        for key, change, expected in (("predictions", 1e-6, kind),
                                      ("predictions", 0.02, "different"),
                                      ("ridge_predictions", 1e-6, "identical"),
                                      ("ridge_predictions", 1e-5, "different")):
            other = copy.deepcopy(made)
            other[key]["2"][1] += change
            verdict = Verdict("a test")
            verdict.begin("part")
            compare_predictions(verdict, {**made, "precision": precision}, other)
            assert verdict.counts["identical"] == 5 - (expected != "identical")
            assert expected == "identical" or verdict.counts[expected] == 1
        verdict.begin("features of another machine")
        compare_predictions(verdict, {**made, "precision": precision}, {
            **made, "ridge_predictions": {"2": [5.0, 6.00001]}}, ridge_close=0.01)
        assert verdict.counts == {"identical": 4, "close": 1}
        verdict.begin("penalty")
        compare_predictions(verdict, {**made, "precision": precision},
                            {**made, "ridge_penalty": 100.001})
        assert verdict.counts == {"identical": 4, "different": 1}
    compared(12, "comparisons")
