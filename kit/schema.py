"""What a file that is read has to look like: its schema, and the errors that name the place."""

import re
import sys

import torch

from kit.cli import UserError

DIGEST, WHOLE = re.compile("[0-9a-f]{64}"), re.compile("0|[1-9][0-9]{0,8}")
KINDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false",
         dict: "names with values", DIGEST: "a sha256",
         torch.Tensor: "a tensor without NaN or infinity"}


def check_form(value, form, complaint):
    """Raise UserError, beginning with `complaint` and naming the place, where a value read from a
    file is not of a form: a type (float: any finite number; torch.Tensor: finite too), a string or
    None itself, a regular expression, [form of each], [form, form, …] of exactly so many, {name:
    form} with at least these names, {type: form} with names of a type (str, or int for digits), or
    a tuple of alternatives. {"songs": {int: [float, float]}, "labels": (None, str)}: a dict with
    two numbers for each song id, and labels that may be missing."""
    for place, expected in misfits(value, form, ()):
        where = ".".join(map(str, place)) or "what it holds"
        raise UserError(f"{complaint}: {where} is not {expected}")


def misfits(value, form, place):
    """Yield (place, what was expected there) wherever a value is not of a form."""
    if isinstance(form, tuple):
        found = [next(misfits(value, each, place), None) for each in form]
        if None not in found:
            yield max(found, key=lambda each: len(each[0]))  # the alternative that was meant
    elif isinstance(form, list):
        if not isinstance(value, (list, tuple)):
            yield place, "a list"
        elif len(form) > 1 and len(value) != len(form):
            yield place, f"a list of {len(form)}"
        else:
            for n, each in enumerate(value):
                yield from misfits(each, form[n % len(form)], (*place, n))
    elif isinstance(form, dict):
        if not isinstance(value, dict):
            yield place, KINDS[dict]
        elif form.keys() == {str} or form.keys() == {int}:
            (kind, inner), = form.items()
            for key, each in value.items():
                if not (isinstance(key, str) if kind is str else WHOLE.fullmatch(str(key))):
                    yield (*place, repr(key)), f"{KINDS[kind]}, as a name has to be"
                yield from misfits(each, inner, (*place, key))
        else:
            for key, inner in form.items():
                if key in value:
                    yield from misfits(value[key], inner, (*place, key))
                else:
                    yield (*place, key), "there"
    elif not fits(value, form):
        yield place, KINDS.get(form, repr(form))


def fits(value, form):
    """Whether a value is of a form that has no forms in it."""
    if isinstance(form, re.Pattern):
        return isinstance(value, str) and form.fullmatch(value)
    if form is torch.Tensor:
        return is_plain(value)
    if isinstance(value, bool) and form in (int, float):
        return False  # though Python has it as a whole number
    if form is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, form) if isinstance(form, type) else value == form


def is_plain(value):
    """Whether it is a dense tensor of finite numbers on the CPU."""
    return (isinstance(value, torch.Tensor) and value.layout == torch.strided
            and value.device.type == "cpu" and not value.is_neg() and not value.is_quantized
            and (not value.is_floating_point() or bool(value.isfinite().all())))
