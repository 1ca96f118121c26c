"""What a file that is read has to look like: its schema, and the first place that breaks it."""

import re
import sys

import torch

from kit.cli import UserError

DIGEST, WHOLE = re.compile("[0-9a-f]{64}"), re.compile("0|[1-9][0-9]{0,8}")
KINDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false",
         dict: "names with values", DIGEST: "a sha256",
         torch.Tensor: "a tensor without NaN or infinity"}


def check_schema(value, schema, complaint):
    """Raise UserError, beginning with `complaint` and naming the place, where a value read from a
    file breaks its schema.

    A schema is a type (float: any finite number; torch.Tensor: finite too), a text or None itself,
    a regular expression, [schema of each], [schema, schema, …] of exactly so many, {name: schema}
    with at least these names, {type: schema} with names of a type (str, or int for digits), or a
    tuple of alternatives. {"songs": {int: [float, float]}, "labels": (None, str)} is a dict with
    two numbers for each song id, and labels that may be missing."""
    for place, expected in schema_errors(value, schema, ()):
        where = ".".join(map(str, place)) or "what it holds"
        raise UserError(f"{complaint}: {where} is not {expected}")


def schema_errors(value, schema, place):
    """Yield (place, what was expected there) wherever a value breaks a schema."""
    if isinstance(schema, tuple):
        errors = [next(schema_errors(value, each, place), None) for each in schema]
        if None not in errors:
            yield max(errors, key=lambda error: len(error[0]))  # the alternative that was meant
    elif isinstance(schema, list):
        if not isinstance(value, (list, tuple)):
            yield place, "a list"
        elif len(schema) > 1 and len(value) != len(schema):
            yield place, f"a list of {len(schema)}"
        else:
            for n, each in enumerate(value):
                yield from schema_errors(each, schema[n % len(schema)], (*place, n))
    elif isinstance(schema, dict):
        yield from dict_errors(value, schema, place)
    elif not fits(value, schema):
        yield place, KINDS.get(schema, repr(schema))


def dict_errors(value, schema, place):
    if not isinstance(value, dict):
        yield place, KINDS[dict]
    elif schema.keys() == {str} or schema.keys() == {int}:
        (kind, inner), = schema.items()
        for key, each in value.items():
            if not (isinstance(key, str) if kind is str else WHOLE.fullmatch(str(key))):
                yield (*place, repr(key)), f"{KINDS[kind]}, as a name has to be"
            yield from schema_errors(each, inner, (*place, key))
    else:
        for key, inner in schema.items():
            if key in value:
                yield from schema_errors(value[key], inner, (*place, key))
            else:
                yield (*place, key), "there"


def fits(value, schema):
    """Whether a value is of a schema that has no others in it."""
    if isinstance(schema, re.Pattern):
        return isinstance(value, str) and schema.fullmatch(value)
    if schema is torch.Tensor:
        return is_plain(value)
    if isinstance(value, bool) and schema in (int, float):
        return False  # though Python has it as a whole number
    if schema is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, schema) if isinstance(schema, type) else value == schema


def is_plain(value):
    """Whether it is a dense tensor of finite numbers on the CPU."""
    return (isinstance(value, torch.Tensor) and value.layout == torch.strided
            and value.device.type == "cpu" and not value.is_neg() and not value.is_quantized
            and (not value.is_floating_point() or bool(value.isfinite().all())))
