"""What the system reproduced published: published.json, read off its notebooks' printed output."""

import functools

from kit.deam import HERE, splits_digest
from kit.files import read_json

# the splits that it published, of whose test songs its loader dropped the last partial batch
SPLITS_DIGEST = "c127846430ead7c2249ece577899cf276362b559daa45eaf37d0b810082fa957"
TEST_SONGS = 160
SCHEMA = {"labels": dict, "runs": {"penalties": dict, "no_penalties": dict}}


@functools.cache
def read_published():
    return read_json(HERE / "published.json", "a file of published results", SCHEMA)


def are_published(splits):
    return splits_digest(splits) == SPLITS_DIGEST


def run_like(options):
    """The published run to compare one with these options with."""
    no_penalties = options["lambda_corr"] == options["lambda_var"] == 0
    return read_published()["runs"]["no_penalties" if no_penalties else "penalties"]


def published_results():
    """{run: what is published of its test songs}: its facts without the curves."""
    curves = "columns", "epochs"
    return {name: {fact: value for fact, value in run.items() if fact not in curves}
            for name, run in read_published()["runs"].items()}


def published_history(config):
    """[{"epoch": 1, "train_loss": …}, …] of the published run to compare a run of this
    configuration with; None unless it is about the same songs and labels."""
    if config["splits"] != SPLITS_DIGEST or config["options"]["labels"] != "shipped":
        return None
    run = run_like(config["options"])
    return [dict(zip(run["columns"], row)) for row in run["epochs"]]


def beside_evaluation(content, config):
    """The published run to show beside an evaluation's `content`; None unless it is about the same
    songs and labels."""
    if "published" not in content["numbers"] or content["labels"] != "shipped":
        return None
    labels = read_published()["labels"]
    return {**run_like(config), "true_correlation": labels["true_correlation_first_160_test"]}
