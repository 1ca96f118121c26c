"""What a file has to look like, and the one line that says where it does not."""

import math
import re

import pytest
import torch

from kit.cli import UserError
from kit.schema import DIGEST, check_schema

HALF = torch.full((2,), 0.5)


@pytest.mark.parametrize("schema, fine, wrong", [
    (int, [0, -3, 10**30], [True, 1.0, "1", None, [1], math.nan]),
    (float, [0, 1.5, -2], [True, math.nan, math.inf, -math.inf, "1", None, 10**400]),
    (str, ["", "a"], [1, None, ["a"]]), (bool, [True, False], [0, 1, "true", None]),
    (DIGEST, ["0" * 64, "af" * 32], ["0" * 63, "0" * 65, "G" * 64, "0" * 64 + "\n", 0, None]),
    (None, [None], [0, "", [], False]), ("a", ["a"], ["b", None]),
    (("a", None, [int]), ["a", None, [], [1]], ["b", [1.5], 1]),
    ([int], [[], [1], (1, 2)], [1, "1", [1, 1.5], {}, None]),
    ([int, str], [[1, "a"], (1, "a")], [[1], [1, "a", 2], ["a", 1], []]),
    ({"a": int}, [{"a": 1}, {"a": 1, "b": None}], [{}, {"a": "1"}, {"b": 1}, [], None]),
    ({str: int}, [{}, {"a": 1}], [{1: 1}, {"a": 1.5}, [], None]),
    ({int: int}, [{}, {"0": 1}, {"17": 1}, {3: 1}], [{"01": 1}, {"-1": 1}, {"a": 1}, {"": 1},
                                                     {"1" * 10: 1}, {"1.0": 1}, {"1": "a"}]),
    (torch.Tensor, [HALF, HALF.double(), torch.ones(0), torch.ones(2, dtype=torch.long)],
     [HALF * torch.nan, HALF / 0, [0.5], HALF.to_sparse(), HALF.to("meta"), None, 0.5,
      torch._neg_view(HALF)])])
def test_schemas(compared, schema, fine, wrong):
    for value in fine:
        check_schema(value, schema, "file")
    for value in wrong:
        with pytest.raises(UserError, match="^file: what it holds|^file: .* is not ") as error:
            check_schema(value, schema, "file")
        assert "\n" not in re.sub("'.*'", "", str(error.value))
    compared(len(fine) + len(wrong), "values")


@pytest.mark.parametrize("value, says", [
    ({"songs": {"2": [1.0, math.nan]}}, "songs.2.1 is not a finite number"),
    ({"songs": {"x": [1.0, 2.0]}}, "songs.'x' is not a whole number, as a name has to be"),
    ({"songs": {"2": [1.0]}}, "songs.2 is not a list of 2"), ({}, "songs is not there"),
    ([], "what it holds is not names with values"),
    ({"songs": {}, "kind": {"a": 1}}, "kind.a is not a text")])
def test_the_place_is_named(compared, value, says):
    """Of alternatives the one that was meant."""
    schema = {"songs": {int: [float, float]}, "kind": (None, {"a": str})}
    if "kind" not in value and says.startswith("songs.") and isinstance(value, dict):
        value = {**value, "kind": None}
    with pytest.raises(UserError) as error:
        check_schema(value, schema, "f.json is none")
    assert str(error.value) == f"f.json is none: {says}"
    compared(1, "place")
