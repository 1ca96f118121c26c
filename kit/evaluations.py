"""Evaluations of runs: what is written of one, which are folds, which may be compared."""

from pathlib import Path
from typing import NamedTuple

from kit import figures
from kit.cli import UserError
from kit.files import json_digest, write_file, write_json
from kit.machine import environment
from kit.published import beside_evaluation
from kit.records import predictions_table


class Evaluation(NamedTuple):
    """A run on one split, or folds pooled."""
    folder: Path  # of its report
    config: dict  # of the run
    data: object  # a DEAMFeatHandler
    content: dict  # of metrics.json


def report_name(split, labels, trained_on):
    """The folder of a run's report: "eval-test", and the labels behind it where the run was trained
    on others."""
    return f"eval-{split}" + ("" if labels == trained_on else f"-{labels}")


def write_report(evaluation, device, draw=True):
    """metrics.json, predictions.csv and the figures."""
    folder, config, data, content = evaluation
    content = {**content, "environment": environment(device)}
    write_json(folder / "metrics.json", {**content, "digest": json_digest(content)})
    write_file(folder / "predictions.csv", predictions_table(content["predictions"],
                                                             data.annotations))
    if draw:
        figures.draw_or_say(figures.draw_report, content, data.annotations, folder,
                            beside_evaluation(content, config))


def differing_settings(evaluations, *ignored):
    """"finetune, lr": in which settings evaluated runs differ; empty where in none."""
    first = evaluations[0].config
    names = dict.fromkeys(key for each in evaluations for key in each.config)
    return ", ".join(key for key in names if key not in ignored and any(
        each.config.get(key) != first.get(key) for each in evaluations))


def are_folds(evaluations):
    """Whether several runs were evaluated on songs that no two share."""
    songs = [song for each in evaluations for song in each.content["predictions"]]
    return len(evaluations) > 1 and len(set(songs)) == len(songs)


def folds_by_name(evaluations):
    """{run: content} of folds. Raises UserError for runs that differ in more than their songs and
    seed, and for two of one name."""
    if differing := differing_settings(evaluations, "seed", "splits", "songs", "fold"):
        raise UserError(f"these runs have no song in common, and differ in {differing}: give the "
                        "folds of one configuration, or one run at a time")
    runs = {each.content["run"]: each.content for each in evaluations}
    if len(runs) < len(evaluations):
        raise UserError("two of these folds have one name: rename a folder, so that the report can "
                        "name its models")
    return runs


def pooled_name(names):
    """"last1-pooled" of ten folds, which are all of folds.json, "last1-pooled-of-0-1" of two."""
    base = names[0].rstrip("0123456789").removesuffix("-fold")
    numbers = "-".join(sorted(name.removeprefix(f"{base}-fold") for name in names))
    return f"{base}-pooled" + ("" if len(names) == 10 else f"-of-{numbers}")


def check_comparable(evaluations, others):
    """Raise UserError unless two sides are about the same songs and labels, and each side has runs
    that differ in the seed alone."""
    first = evaluations[0].content
    for each in (each.content for each in evaluations + others):
        if set(each["predictions"]) != set(first["predictions"]):
            raise UserError(f"{first['run']} and {each['run']} predict different songs: nothing "
                            "to compare song by song")
        if each["labels"] != first["labels"]:
            raise UserError(f"{first['run']} and {each['run']} were trained on different "
                            "labels: say with --labels which to compare with")
    for side in (evaluations, others):
        if differing := differing_settings(side, "seed"):
            raise UserError(f"the runs of one side differ in {differing}: give seeds of one "
                            "configuration")
