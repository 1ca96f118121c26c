"""Runs on disk: what train.py and eval.py write, its readers, and the .tar that is published.

    runs/NAME/  config.json  splits.json  manifest.json  history.csv  digests.csv  model.pt
                last.pt  what --resume goes on from      eval-test/metrics.json

A description is what config.json says of a run; a record is what is published of one.
"""

import contextlib
import csv
import io
import tarfile
import tempfile
from pathlib import Path

import torch

from kit.cli import UserError
from kit.deam import read_splits, splits_digest
from kit.features import SETTINGS
from kit.files import (differences, json_digest, read_json, read_tensors, read_text, sha256,
                       shortened, state_digest, table_text, write_csv, write_file, write_json,
                       write_tensors)
from kit.machine import environment
from kit.network import PARAMS
from kit.schema import DIGEST, check_schema

HISTORY = ["epoch", "lr", "train_loss", "train_mse", "train_mae", "val_loss", "val_mse", "val_mae"]
DIGESTS = ["epoch", "step", "loss", "state"]
RUN_SETTINGS = {**SETTINGS, "weights": (None, DIGEST)}  # None: of features without manifest
LABELS = ("shipped", "corrected")
# What decides a run's result: the options of train.py, which its parser reads again, and what they
# are applied to.
CONFIG = {"options": {"finetune": str, "labels": LABELS, "precision": ("exact", "float32"),
                      "epochs": int, "select": ("last", "best")},
          "features": (None, DIGEST), "splits": DIGEST,
          "songs": {"train": int, "val": int, "test": int}}
DESCRIPTION = {"config": CONFIG, "digests": {str: DIGEST}, "source": str,
               "features_settings": RUN_SETTINGS, "label_mean": [float, float],
               "label_std": [float, float]}
MODEL = {"config": CONFIG, "settings": RUN_SETTINGS, "params": PARAMS,
         "mean": torch.Tensor, "std": torch.Tensor, "state": {str: torch.Tensor},
         "initial_model": DIGEST, "source": str, "backbone": {"name": str}}
CHECKPOINT = {
    "config": CONFIG, "model": {str: torch.Tensor},
    "optimizer": {int: {"step": torch.Tensor, "exp_avg": torch.Tensor, "exp_avg_sq": torch.Tensor}},
    "history": [[float] * 8], "digests": [[int, int, float, DIGEST]], "shuffle": torch.Tensor,
    "rng": torch.Tensor, "best": (None, {"loss": float, "model": {str: torch.Tensor}})}
METRICS = {"finetune": str, "precision": ("exact", "float32"), "source": str,
           "split": ("train", "val", "test"), "labels": LABELS, "trained_on_labels": LABELS,
           "songs": int, "features": (None, DIGEST), "splits": DIGEST, "label_values": DIGEST,
           "swapped_labels": (None, [[int, int]]), "initial_model": DIGEST, "model": DIGEST,
           "numbers": dict, "ridge_penalty": float, "predictions": {int: [float, float]},
           "ridge_predictions": {int: [float, float]}, "digest": DIGEST}


def flat_config(config):
    """A run's configuration as one dict, for comparing name by name."""
    return {**config["options"], **{key: config[key] for key in ("features", "splits", "songs")}}


# ----------------------------------------------------------------------------------------- reading


def read_config(folder):
    """What config.json says of a run. Raises UserError."""
    return read_json(folder / "config.json", "a run's configuration", DESCRIPTION)


def read_run(folder):
    """(what model.pt holds with its digest, the run's splits). Raises UserError where the run is
    not finished, or its files are not of one run."""
    description = read_config(folder)
    finished = "model" in description["digests"] and (folder / "model.pt").exists()
    if not finished and (folder / "last.pt").exists():
        raise UserError(f"{folder} is not finished: train.py with --resume resumes it")
    model, splits = read_model(folder / "model.pt"), read_splits(folder / "splits.json")
    if splits["source"] != model["source"]:
        raise UserError(f"{folder}: splits.json names another source than model.pt")
    results = {"model": model["digest"], "initial_model": model["initial_model"],
               "label_mean": model["mean"].tolist(), "label_std": model["std"].tolist()}
    described = {**description, **description["digests"]}
    if differing := differences({**flat_config(description["config"]),
                                 **{key: described.get(key) for key in results}},
                                {**flat_config(model["config"]), **results}):
        raise UserError(f"{folder}: config.json and model.pt are not of one run ({differing})")
    if model["config"]["splits"] != splits_digest(splits):
        raise UserError(f"{folder}: splits.json is not the one that the run was trained on")
    return model, splits


def read_model(file):
    """What a model.pt holds, and `digest` of its state. Raises UserError for anything else."""
    model = read_tensors(file, "a trained model", MODEL)
    if any(each.shape != (2,) or each.dtype != torch.float64 or not ((0 < each) & (each < 9)).all()
           for each in (model["mean"], model["std"])):
        raise UserError(f"{file} is not a model that train.py wrote: mean and std of two labels")
    return {**model, "digest": state_digest(model["state"])}


def digest_steps(length, epochs):
    """[(epoch, step), …] after which digests.csv has a line, with `length` steps an epoch: steps 1,
    2, 4, … of the first, and the end of each."""
    early = [(1, 2**n) for n in range(length.bit_length())]
    return early + [(epoch, epoch * length) for epoch in range(1, epochs + 1)]


def read_rows(path, names, kinds):
    """The rows of a table with these columns, each cell of its kind. Raises UserError for a file
    that train.py would not write of them."""
    text = read_text(path, "a table of a run")
    try:
        # a forged cell may have any number of digits
        rows = [[kind(cell[:100]) for kind, cell in zip(kinds, row, strict=True)]
                for row in csv.reader(text.splitlines()[1:])]
    except (ValueError, csv.Error):
        rows = []
    if not rows or table_text(names, rows) != text:
        raise UserError(f"{path} is not a file that train.py wrote")
    return rows


def read_history(folder):
    """[[epoch, lr, …], …] of a run's history.csv. Raises UserError."""
    return read_rows(folder / "history.csv", HISTORY, (int, *[float] * 7))


def read_digests(folder):
    """[[epoch, step, loss, state digest], …] of a run's digests.csv. Raises UserError."""
    return read_rows(folder / "digests.csv", DIGESTS, (int, int, float, str))


# ----------------------------------------------------------------------------------------- writing


def describe_run(training):
    """The description of a run; its `digests` get those of the result when there is one."""
    data = training.data
    return {"config": training.config, "features_settings": data.settings,
            "source": data.splits["source"], "label_mean": data.mean.tolist(),
            "label_std": data.std.tolist(), "digests": {"initial_model": training.initial},
            "environment": environment(training.device)}


def write_start(folder, training, description):
    """What is known of a run before its first step."""
    data = training.data
    write_json(folder / "config.json", description)
    write_json(folder / "splits.json", {"source": data.splits["source"], **data.ids})
    if data.digest:
        write_json(folder / "manifest.json", data.manifest)


def write_progress(folder, training):
    """The tables so far, and what --resume goes on from."""
    write_csv(folder / "history.csv", HISTORY, training.history)
    write_csv(folder / "digests.csv", DIGESTS, training.digests)
    write_tensors(folder / "last.pt", checkpoint(training))


def write_result(folder, training, description):
    """model.pt, with all that predicting needs, and the last config.json."""
    data = training.data
    state = {name: value.cpu() for name, value in training.model.state_dict().items()}
    write_tensors(folder / "model.pt", {
        "config": training.config, "settings": data.settings, "params": training.model.params,
        "backbone": data.manifest["source"], "source": data.splits["source"], "mean": data.mean,
        "std": data.std, "initial_model": training.initial, "state": state})
    write_json(folder / "config.json", description)


# ------------------------------------------------------------------------------------- checkpoints


def read_checkpoint(folder, config, resume):
    """The training state in a run's folder to resume from, or None. Raises UserError where the
    folder holds another run, or a finished one that would be lost."""
    last, done = folder / "last.pt", folder / "model.pt"
    if not last.exists():
        if done.exists():
            raise UserError(f"{folder} holds a finished run (without {last.name}, to resume "
                            "from): choose another --run, or delete it")
        return None
    if not resume:
        raise UserError(f"{folder} holds a run already: add --resume to resume it, choose "
                        "another --run, or delete it")
    state = read_tensors(last, "a training state", CHECKPOINT)
    then, options = flat_config(state["config"]), config["options"]
    if options["epochs"] >= len(state["history"]) and options["schedule"] != "cosine":
        then["epochs"] = options["epochs"]  # cosine's rates depend on the end
    if differing := differences(then, flat_config(config)):
        raise UserError(f"{folder} was started otherwise ({differing}): resume with its own "
                        "options, or choose another --run")
    return state


def shapes(state):
    """{name: (dtype, shape)} of a dict of tensors."""
    return {name: (value.dtype, value.shape) for name, value in state.items()}


def trained_state(model):
    """The part of a model's state that training changes."""
    frozen = {name for name, each in model.named_parameters() if not each.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def load_trained(model, state):
    """Take over what `trained_state` gave. Raises KeyError where it is that of another model."""
    if shapes(state) != shapes(trained_state(model)):
        raise KeyError("other names, types or shapes")
    model.load_state_dict(state, strict=False)


def restore(training, state, file):
    """Set a Training of train.py to a checkpoint, read from `file`. Raises UserError if it is of
    another model."""
    try:
        load_trained(training.model, state["model"])
    except KeyError:
        raise UserError(f"{file} is of another model, perhaps of another common.py: delete "
                        f"{file.parent} and train again") from None
    training.optimizer.load_state_dict({**training.optimizer.state_dict(),
                                        "state": state["optimizer"]})
    training.data.shuffle.set_state(state["shuffle"])
    torch.set_rng_state(state["rng"])
    if "cuda_rng" in state and training.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"], training.device)
    training.history, training.digests, training.best = (
        state[key] for key in ("history", "digests", "best"))
    training.step = len(training.history) * training.epoch_steps


def checkpoint(training):
    """What a resumed run goes on from: what last.pt holds."""
    state = {"config": training.config, "model": trained_state(training.model),
             "optimizer": training.optimizer.state_dict()["state"],
             "shuffle": training.data.shuffle.get_state(), "rng": torch.get_rng_state(),
             "history": training.history, "digests": training.digests, "best": training.best}
    if training.device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(training.device)
    return state


# ------------------------------------------------------------------------------------- evaluations


def read_metrics(file):
    """An earlier metrics.json of one run. Raises UserError if it is none or was edited."""
    metrics = read_json(file, "a metrics.json", {str: object})
    if "runs" in metrics:
        raise UserError(f"{file} is pooled over folds: verify the metrics.json of each fold")
    check_schema(metrics, METRICS, f"{file} is not a metrics.json")
    if unknown := metrics.keys() - METRICS.keys() - {"run", "environment"}:
        raise UserError(f"{file} is not a metrics.json: eval.py writes no {shortened([*unknown])}")
    if metrics.pop("digest") != json_digest(metrics):
        raise UserError(f"{file} does not match its own digest: it was edited or damaged")
    pred, ridge_pred = metrics["predictions"], metrics["ridge_predictions"]
    if not pred or metrics["songs"] != len(pred) or ridge_pred.keys() != pred.keys():
        raise UserError(f"{file} is not a metrics.json: two predictions for each of its songs")
    if any(abs(value) > 1e6 for pair in [*pred.values(), *ridge_pred.values()] for value in pair):
        raise UserError(f"{file} is not a metrics.json: a prediction far from any scale")
    return metrics


def predictions_table(predictions, annotations):
    """The text of predictions.csv."""
    return table_text(
        ["song_id", "valence_true", "arousal_true", "valence_pred", "arousal_pred"],
        [[song, annotations[int(song)].valence, annotations[int(song)].arousal,
          *(f"{value:.6f}" for value in pred)] for song, pred in predictions.items()])


# ----------------------------------------------------------------------------------------- records

PACKED = ("manifest.json splits.json config.json history.csv digests.csv model.pt "
          "history.png history.pdf").split()
EVALUATED = ["metrics.json", "predictions.csv"]
FIGURES = ["true_vs_predicted.png", "true_vs_predicted.pdf", "confusion.png", "confusion.pdf"]


@contextlib.contextmanager
def open_record(path):
    """The folder of a record, a run's own or a .tar unpacked for the while. Raises UserError."""
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory() as place:
        try:
            with tarfile.open(path, "r:") as tar:
                for entry in tar:
                    name = Path(place, *Path(entry.name).parts[1:])
                    # only what --pack writes: nothing that points elsewhere is unpacked
                    if entry.isfile() and ".." not in entry.name and name.name in (
                            PACKED + EVALUATED + FIGURES):
                        name.parent.mkdir(parents=True, exist_ok=True)
                        name.write_bytes(tar.extractfile(entry).read())
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise UserError(f"{path} is neither a run's folder nor a .tar of one ({error})"
                            ) from None
        yield Path(place)


def files_to_pack(folder):
    """The names of a run's files that are published: all that checks need, and the figures, of
    which folds that were evaluated together have none; no audio, no features. Raises UserError
    where one is missing."""
    evaluations = sorted(each.parent.name for each in folder.glob("eval-*/metrics.json"))
    if not evaluations:
        raise UserError(f"{folder} is not evaluated: run eval.py on it first")
    names = PACKED + [f"{each}/{name}" for each in evaluations for name in EVALUATED]
    for each in evaluations:
        figures = [f"{each}/{name}" for name in FIGURES]
        names += figures if any((folder / name).exists() for name in figures) else []
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder} is not complete: {shortened(missing)} missing")
    return sorted(names)


def pack(folder, file):
    """Write a run's files as a .tar. The same files give the same tar. Raises UserError."""
    names, buffer = files_to_pack(folder), io.BytesIO()
    title = file.name.removesuffix(".tar").encode()[:99].decode(errors="ignore")
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            data, entry = (folder / name).read_bytes(), tarfile.TarInfo(f"{title}/{name}")
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
    write_file(file, data := buffer.getvalue())
    print(f"written: {file}, {len(names)} files, {len(data) / 1e6:.1f} MB\nsha256 {sha256(data)}")
