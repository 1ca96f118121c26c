"""Fine-tune the top layers and two regression heads on features: DEAM_feats/ → runs/NAME/.

  python train.py --finetune last1                      # the published configuration
  python train.py --finetune frozen --labels corrected --run runs/frozen-corrected
  python train.py --finetune frozen --fold 3            # tested on artists it never heard
  python train.py --finetune last1 --resume             # after an interruption
  python train.py --verify runs/last1 --steps 2         # do the first steps give the same digests?

To try another head or loss, change `Head` or `emotion_loss` at the end of common.py; a parameter
new to the loss is also an option in `parser` and a line in CONFIG.
"""

from argparse import ArgumentTypeError
from pathlib import Path

from kit.cli import Parser, execute, number, path, start

ADVICE = "rerun the same command with --resume to resume after the last finished epoch"


def parser():
    p = Parser(__doc__)
    p.share("--features", help="the folder that extract.py wrote")
    p.add_argument("--run", type=path, metavar="FOLDER",
                   help="where the run goes (default: runs/ and the name of --finetune, or that "
                        "and -foldK)")
    p.add_argument("--finetune", default="last1", metavar="frozen|last1|last2|…|lastN|all",
                   help="what trains: the heads alone; the top n layers with the norm and the "
                        "heads; all layers above the features'")
    p.add_argument("--epochs", type=number(int, 1, 10**6), default=20, metavar="N",
                   help="passes over the training songs")
    p.add_argument("--lr", type=number(float, 0, 10, above=True), default=3e-5, metavar="RATE",
                   help="lowest learning rate; the rate of --schedule constant")
    p.add_argument("--max-lr", type=number(float, 0, 10, above=True), metavar="RATE",
                   help="highest learning rate of the other schedules (default: 0.001)")
    p.add_argument("--schedule", choices=["triangular2", "cosine", "constant"],
                   default="triangular2", help="learning rate over steps: cyclic, its height "
                   "halved each cycle; or one fall from --max-lr to --lr; or --lr")
    p.add_argument("--step-size-up", type=number(int, 1, 10**9), default=100, metavar="N",
                   help="steps of triangular2 from the lowest rate to the highest")
    p.add_argument("--batch-size", type=number(int, 2, 10**6), default=32, metavar="N",
                   help="songs a step; the last partial batch is dropped")
    p.add_argument("--micro-batch", type=number(int, 1, 10**6), default=4, metavar="N",
                   help="songs whose activations are computed together; part of the result's bits")
    p.add_argument("--attention-dropout", type=number(float, 0, 0.99), metavar="P",
                   help="dropout of attention weights in the layers that train (default: the "
                        "backbone's, 0.1 for WAV2VEC2_BASE)")
    p.add_argument("--weight-decay", type=number(float, 0, 10), default=1e-4, metavar="X",
                   help="AdamW's")
    p.add_argument("--lambda-corr", type=number(float, 0, 1e6), default=0.05, metavar="X",
                   help="weight of the correlation penalty")
    p.add_argument("--lambda-var", type=number(float, 0, 1e6), metavar="X",
                   help="weight of the variance penalty (default: 0.05; with --weight-loss none)")
    p.add_argument("--corr-target", choices=["true", "zero"], default="true",
                   help="what the predictions' correlation is pulled to")
    p.add_argument("--weight-loss", action="store_true",
                   help="MSE weighted by inverse quadrant frequency, without variance penalty")
    p.add_argument("--grad-clip", type=number(float, 0, 1e9, above=True), default=1.0, metavar="X",
                   help="largest norm of the gradient")
    p.add_argument("--fold", type=number(int, 0, 9), metavar="K",
                   help="splits of folds.json, every artist in one fold of ten: test is fold K, "
                        "val the next one (default: the features folder's splits)")
    p.add_argument("--seed", type=number(int, 0, 2**32 - 3), default=0, metavar="N",
                   help="of heads, shuffling and dropout")
    p.add_argument("--select", choices=["last", "best"], default="last",
                   help="the result: the last epoch, or the one of lowest val loss")
    p.share("--labels", "--precision", "--allow-missing")
    p.add_argument("--threads", type=number(int, 1, 1024), metavar="N",
                   help="CPU threads (default: all cores; but in float32, bfloat16, where they "
                        "decide bits, 8)")
    p.add_argument("--resume", action="store_true",
                   help="resume the run in --run, or start it if there is none")
    p.add_argument("--verify", type=path, metavar="RUN",
                   help="only repeat that run, with its own settings, and compare the digests")
    p.add_argument("--steps", type=number(int, 1), metavar="N",
                   help="with --verify: only the first N steps")
    p.share("--device")
    return p


if __name__ == "__main__":
    ARGS = start(parser(), ADVICE)  # before torch is imported

import math
import os
import re

import torch
from torch.utils.data import DataLoader

from common import (DEAMFeatHandler, EmotionModel, FrozenOutputs, emotion_loss, quadrant_weights,
                    room_for_activations, where_to_keep)
from kit import figures
from kit.audio import sin_pi
from kit.cli import Progress, UserError
from kit.deam import SPLITS, fold_splits, own_splits, read_splits, splits_digest
from kit.files import (lock, read_json, read_table, read_tensors, state_digest, tensor_digest,
                       write_csv, write_json, write_tensors)
from kit.machine import Arithmetic, environment
from kit.records import RUN_SETTINGS, read_manifest
from kit.schema import DIGEST
from kit.verdict import Verdict, differences

HISTORY = ["epoch", "lr", "train_loss", "train_mse", "train_mae", "val_loss", "val_mse", "val_mae"]
DIGESTS = ["epoch", "step", "loss", "state"]
CONFIG = {  # what decides the result: a run is resumed with the same one only
    "finetune": str, "epochs": int, "lr": float, "max_lr": (None, float),
    "schedule": ("triangular2", "cosine", "constant"), "step_size_up": int, "batch_size": int,
    "micro_batch": int, "attention_dropout": (None, float), "weight_decay": float,
    "lambda_corr": float, "lambda_var": (None, float), "corr_target": ("true", "zero"),
    "weight_loss": bool, "grad_clip": float, "seed": int, "select": ("last", "best"),
    "labels": ("shipped", "corrected"), "precision": ("exact", "float32", "bfloat16"),
    "threads": (None, int), "device": (None, str), "features": (None, DIGEST), "splits": DIGEST,
    "songs": {"train": int, "val": int, "test": int}}
CHECKPOINT = {
    "config": CONFIG, "model": {str: torch.Tensor},
    "optimizer": {int: {"step": torch.Tensor, "exp_avg": torch.Tensor, "exp_avg_sq": torch.Tensor}},
    "history": [[float] * 8], "digests": [[int, int, float, DIGEST]], "shuffle": torch.Tensor,
    "rng": torch.Tensor, "best": (None, {"loss": float, "model": {str: torch.Tensor}})}


def configuration(args, data, arithmetic):
    """The CONFIG of a command line; options without effect are None. Raises UserError for options
    that contradict each other."""
    exact = args.precision == "exact"
    if args.schedule == "constant" and args.max_lr is not None:
        raise UserError("--schedule constant has one rate, --lr: leave out --max-lr")
    if args.weight_loss and args.lambda_var is not None:
        raise UserError("--weight-loss is without the variance penalty: leave out --lambda-var")
    if args.finetune == "frozen" and args.attention_dropout is not None:
        raise UserError("--finetune frozen trains no attention: leave out --attention-dropout")
    max_lr = None if args.schedule == "constant" else args.max_lr or 1e-3
    if max_lr is not None and max_lr < args.lr:
        raise UserError(f"--max-lr {max_lr} is below --lr {args.lr}")
    own = {"max_lr": max_lr, "lambda_var": None if args.weight_loss else
           0.05 if args.lambda_var is None else args.lambda_var,
           "threads": None if exact else args.threads,
           "device": None if exact else arithmetic.device.type,
           "features": data.digest, "splits": splits_digest(data.ids),
           "songs": {name: len(data.ids[name]) for name in SPLITS}}
    return {name: own[name] if name in own else getattr(args, name) for name in CONFIG}


def learning_rate(step, steps, config):
    """The rate of optimiser step `step` (from 0) of `steps`. The cyclic one is torch's CyclicLR
    (Smith 2017, arXiv 1506.01186), as a function of the step, so that nothing has to be saved."""
    lr, max_lr = config["lr"], config["max_lr"]
    if config["schedule"] == "constant":
        return lr
    if config["schedule"] == "cosine":
        cosine = float(sin_pi(0.5 - step / max(steps - 1, 1)))  # the same on any machine
        return lr + (max_lr - lr) * 0.5 * (1 + cosine)
    cycle = step // (2 * config["step_size_up"])  # triangular2
    height = 1 - abs(step / config["step_size_up"] - 2 * cycle - 1)
    return lr + math.ldexp((max_lr - lr) * height, -cycle)


def digest_steps(length, epochs):
    """[(epoch, step), …] after which digests.csv has a line, with `length` steps an epoch: steps 1,
    2, 4, … of the first, and the end of each."""
    early = [(1, 2**n) for n in range(length.bit_length())]
    return early + [(epoch, epoch * length) for epoch in range(1, epochs + 1)]


class Training:
    """Model, optimiser and loaders of a configuration; its steps, and what they gave so far: the
    lines of history.csv and digests.csv, the predictions on val, the best epoch's model.

    config["seed"] draws the heads' weights, seed + 1 shuffles (in open_data), seed + 2 draws
    dropout."""

    def __init__(self, config, data, arithmetic):
        self.config, self.data, self.arithmetic = config, data, arithmetic
        self.device = arithmetic.device
        self.step, self.history, self.digests = 0, [], []
        self.pred, self.best = None, None
        self.rate, self.sums = None, None  # of the last step, of this epoch's steps
        top = data.top_layers
        self.model = EmotionModel(top["params"], top["layer"], config["finetune"],
                                  config["attention_dropout"])
        self.model.start_from(top, config["seed"])
        self.model.to(self.device, arithmetic.dtype)
        self.trainable = [each for each in self.model.parameters() if each.requires_grad]
        # hashed once, since they never change
        self.frozen_digests = {name: tensor_digest(each) for name, each in
                               self.model.named_parameters() if not each.requires_grad}
        self.initial = self.digest()
        # exact arithmetic has rules for one tensor at a time
        self.foreach = False if config["precision"] == "exact" else None
        self.optimizer = torch.optim.AdamW(self.trainable, lr=config["lr"], foreach=self.foreach,
                                           weight_decay=config["weight_decay"])
        self.load_data()
        self.steps = len(self.train) * config["epochs"]
        with arithmetic():
            labels = self.z_scored(data.datasets["train"].labels)
            self.weights = quadrant_weights(labels) if config["weight_loss"] else None
        torch.manual_seed(config["seed"] + 2)  # dropout

    def load_data(self):
        """Loaders of what the frozen layers give, kept where there is room."""
        data, device = self.data, self.device
        frames = max((entry["frames"] for entry in (data.manifest["songs"] or {}).values()),
                     default=2250)
        keep = where_to_keep(len(data.ids["train"] + data.ids["val"]), frames, self.model,
                             getattr(torch, data.settings["store"]), device)
        self.train, self.val = (
            data.loader(name, FrozenOutputs(data.datasets[name], self.model, self.arithmetic, keep))
            for name in ("train", "val"))
        self.model.recompute = not room_for_activations(self.config["batch_size"], frames,
                                                        self.model, device)

    def z_scored(self, labels):
        values = ((labels - self.data.mean) / self.data.std).to(self.arithmetic.dtype)
        return values.to(self.device)

    def loss(self, pred, true):
        config = self.config
        return emotion_loss(pred.to(self.arithmetic.dtype), true, config["lambda_corr"],
                            config["lambda_var"], config["corr_target"], self.weights)

    def train_until(self, steps, bar):
        """Train up to step number `steps`, yielding each epoch's line of history.csv once it is
        validated. Raises UserError if training diverged."""
        early = [step for _, step in digest_steps(len(self.train), 0)]
        for epoch in range(len(self.history) + 1, self.config["epochs"] + 1):
            for loss in self.one_epoch():
                bar.update()
                if epoch == 1 and self.step in early:
                    self.digests.append([epoch, self.step, loss.item(), self.digest()])
                if self.step == steps and steps % len(self.train):  # within an epoch
                    return
            means = [value / len(self.train) for value in self.sums.tolist()]
            validation, self.pred = self.validate()
            if not all(map(math.isfinite, [*means, *validation])):
                raise UserError("the loss is not finite: lower --max-lr, or --lr with --schedule "
                                "constant")
            self.history.append([epoch, self.rate, *means, *validation])
            self.digests.append([epoch, self.step, means[0], self.digest()])
            if self.config["select"] == "best" and (
                    not self.best or validation[0] < self.best["loss"]):
                self.best = {"loss": validation[0], "model": {
                    name: value.cpu().clone() for name, value in self.trained().items()}}
            yield self.history[-1]
            if self.step == steps:
                return

    def one_epoch(self):
        """Train on all batches once, yielding the loss after each step."""
        self.model.train()
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, MSE, MAE
        for states, labels in self.train:  # of FrozenOutputs: what the frozen layers gave
            self.rate = learning_rate(self.step, self.steps, self.config)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate
            with self.arithmetic():
                true = self.z_scored(labels)
                pred = self.model(states, self.config["micro_batch"])
            with self.outside_autocast():
                loss = self.loss(pred, true)
                self.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.trainable, self.config["grad_clip"],
                                               foreach=self.foreach)
                self.optimizer.step()
                off = pred.detach().double() - true
                self.sums += torch.stack([loss.detach().double(), off.square().mean(),
                                          off.abs().mean()])
            self.step += 1
            yield loss.detach()

    def outside_autocast(self):
        """Loss and optimiser compute in float32 where the model computes in bfloat16."""
        bfloat16 = self.config["precision"] == "bfloat16"
        return torch.autocast(self.device.type, enabled=False) if bfloat16 else self.arithmetic()

    @torch.no_grad()
    def validate(self):
        """(loss, MSE, MAE) on val, and the predictions float64[N, 2], z-scored."""
        pred = self.model.predict(self.val, self.arithmetic, self.config["micro_batch"])
        with self.outside_autocast():
            true = self.z_scored(self.data.datasets["val"].labels)
            off = pred.to(self.device) - true
            numbers = [self.loss(pred.to(self.device), true), off.square().mean(), off.abs().mean()]
        return [number.item() for number in numbers], pred

    def result(self):
        """The digests of the model that is the result of all epochs and of its predictions on val;
        the model becomes that one."""
        if self.best:
            self.load(self.best["model"])
        if self.best or self.pred is None:  # another model than the last, or nothing left to train
            _, self.pred = self.validate()
        six_decimals = (self.pred * 1e6).round() / 1e6 + 0.0  # without minus zeros
        return {"model": self.digest(), "val_predictions": tensor_digest(six_decimals)}

    def digest(self):
        return state_digest(self.model.state_dict(), self.frozen_digests)

    def trained(self):
        """The part of the model's state that training changes."""
        return {name: value for name, value in self.model.state_dict().items()
                if name not in self.frozen_digests}

    def load(self, trained):
        """Take over what `trained` gave. Raises KeyError where it is that of another model."""
        if like(trained) != like(self.trained()):
            raise KeyError("other names, types or shapes")
        self.model.load_state_dict(trained, strict=False)

    def checkpoint(self):
        """What a resumed run goes on from: what last.pt holds."""
        state = {"config": self.config, "model": self.trained(),
                 "optimizer": self.optimizer.state_dict()["state"],
                 "shuffle": self.data.shuffle.get_state(), "rng": torch.get_rng_state(),
                 "history": self.history, "digests": self.digests, "best": self.best}
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return state

    def restore(self, state, file):
        """Go on from a checkpoint, read from `file`. Raises UserError if it is of another model."""
        try:
            self.history, self.digests, self.best = (state[key] for key in (
                "history", "digests", "best"))
            if self.best:
                self.load(self.best["model"])  # only to see that it fits
            self.load(state["model"])
            moments, parameters = state["optimizer"], dict(enumerate(self.trainable))
            if any(like(parameters) != like({n: each[name] for n, each in moments.items()})
                   for name in ("exp_avg", "exp_avg_sq")):
                raise KeyError("moments of other parameters")
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
            self.data.shuffle.set_state(state["shuffle"])
            torch.set_rng_state(state["rng"])
            if "cuda_rng" in state and self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError, IndexError):
            raise UserError(f"{file} is not a training state of this run: delete {file.parent} and "
                            "train again") from None
        self.step = len(self.history) * len(self.train)


def like(state):
    """{name: (dtype, shape)} of a dict of tensors."""
    return {name: (value.dtype, value.shape) for name, value in state.items()}


def to_resume(args, config):
    """The training state in --run to resume from, or None. Raises UserError where the folder holds
    another run, or a finished one that would be lost."""
    last, done = args.run / "last.pt", args.run / "model.pt"
    if not last.exists():
        if done.exists():
            raise UserError(f"{args.run} holds a finished run (without {last.name}, to resume "
                            "from): choose another --run, or delete it")
        return None
    if not args.resume:
        raise UserError(f"{args.run} holds a run already: add --resume to resume it, choose "
                        "another --run, or delete it")
    state = read_tensors(last, "a training state", CHECKPOINT)
    finished = len(state["history"])
    then = dict(state["config"])
    if config["epochs"] >= finished and config["schedule"] != "cosine":
        then["epochs"] = config["epochs"]  # cosine's rates depend on the end
    if differing := differences(then, config):
        raise UserError(f"{args.run} was started otherwise ({differing}): resume with its own "
                        "settings, or choose another --run")
    if not finished:
        raise UserError(f"{last} is not a training state: it has no history; delete {args.run} and "
                        "train again")
    return state


def open_data(args, splits=None):
    """The features and the splits to train on, the folder's own or those of --fold. Raises
    UserError where they are too few."""
    if args.fold is not None and not splits:
        splits = fold_splits(args.fold, own_splits(args.features))
    data = DEAMFeatHandler(args.features, splits, args.batch_size, args.seed + 1,
                           args.allow_missing, args.labels)
    if len(data.ids["train"]) < args.batch_size:
        raise UserError(f"{data.summary}: no full batch of {args.batch_size} to train on; lower "
                        "--batch-size")
    if not data.ids["val"]:
        raise UserError(f"{data.summary}: no song to validate on")
    return data


def save(training, folder):
    write_csv(folder / "history.csv", HISTORY, training.history)
    write_csv(folder / "digests.csv", DIGESTS, training.digests)
    write_tensors(folder / "last.pt", training.checkpoint())


def record_of(training):
    """What config.json says of a run; `digests` gets those of the result when there is one."""
    data = training.data
    return {"config": training.config, "features_settings": data.settings,
            "source": data.splits["source"], "label_mean": data.mean.tolist(),
            "label_std": data.std.tolist(), "digests": {"initial_model": training.initial},
            "environment": environment(training.device)}


def announce(args, training):
    """Say what is about to be trained, and where that would take hours."""
    model, data = training.model, training.data
    print(f"{args.run}: {args.finetune} on {data.summary}; "
          f"{sum(each.numel() for each in training.trainable):,} trainable of "
          f"{sum(each.numel() for each in model.parameters()):,} parameters; {args.precision} on "
          f"{training.device}\nfeatures {str(data.digest)[:16]}; "
          f"initial model {training.initial[:16]}", flush=True)


def run(args):
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("training is for one process: run train.py without torchrun")
    if args.verify:
        return verify(args)
    if args.steps:
        raise UserError("--steps is for --verify RUN: to train less choose --epochs")
    fold = "" if args.fold is None else f"-fold{args.fold}"
    args.run = args.run or Path("runs") / f"{args.finetune}{fold}"
    if args.precision != "exact":
        args.threads = args.threads or 8
    arithmetic = Arithmetic(args.precision, args.device, args.threads)
    data = open_data(args)
    config = configuration(args, data, arithmetic)
    for note in data.notes():
        print(note)
    held = lock(args.run, "train", "the run")  # until this function returns
    state = to_resume(args, config)
    training = Training(config, data, arithmetic)
    record = record_of(training)
    if state:
        training.restore(state, args.run / "last.pt")
        print(f"resumed after epoch {len(training.history)} of {args.epochs}")
    announce(args, training)
    write_json(args.run / "config.json", record)
    write_json(args.run / "splits.json", {"source": data.splits["source"], **data.ids})
    if data.digest:
        write_json(args.run / "manifest.json", data.manifest)

    bar = Progress(total=training.steps, initial=training.step, desc="train", unit="step")
    with bar:
        for row in training.train_until(training.steps, bar):
            bar.say("epoch {:3d}  lr {:.2e}  train loss {:.4f} MSE {:.4f} MAE {:.4f}  val loss "
                    "{:.4f} MSE {:.4f} MAE {:.4f}".format(*row))
            save(training, args.run)
    finish(args, record, training)
    return 0


def finish(args, record, training):
    """Write the result of a run and say what it is."""
    data, history, digests = training.data, training.history, training.result()
    lowest = min(history, key=lambda row: row[5])
    selected = lowest if args.select == "best" else history[-1]
    songs = f"{len(data.ids['train'])} train, {len(data.ids['val'])} val songs"
    caption = figures.caption_of(args.finetune, args.labels, songs, data.splits["source"])
    figures.draw_history([dict(zip(HISTORY, row)) for row in history], selected[0], lowest[0],
                         predict_the_mean(data), args.run, caption)
    state = {name: value.cpu() for name, value in training.model.state_dict().items()}
    write_tensors(args.run / "model.pt", {
        "config": training.config, "settings": data.settings, "params": training.model.params,
        "backbone": data.manifest["source"], "source": data.splits["source"], "mean": data.mean,
        "std": data.std, "initial_model": training.initial, "state": state})
    record["digests"] |= digests
    write_json(args.run / "config.json", record)
    if args.select == "last" and lowest[0] <= 0.7 * len(history):
        print(f"the lowest val loss, {lowest[5]:.4f}, was that of epoch {lowest[0]}; the result is "
              f"epoch {len(history)}'s, {history[-1][5]:.4f} (--select best takes the lowest)")
    for name, value in record["digests"].items():
        print(f"{name.replace('_', ' ')}: {value}")


def predict_the_mean(data):
    """{"mse", "mae"} on val if every prediction were the labels' mean."""
    true = (data.datasets["val"].labels - data.mean) / data.std
    return {"mse": true.square().mean().item(), "mae": true.abs().mean().item()}


# ------------------------------------------------------------------------------------------- verify

RECORD = {"config": CONFIG, "digests": {"initial_model": DIGEST}, "source": str,
          "features_settings": RUN_SETTINGS, "label_mean": [float, float],
          "label_std": [float, float]}


def whole(cell):
    if not re.fullmatch("[0-9]{1,9}", cell):
        raise ValueError
    return int(cell)


def sha256_text(cell):
    if not DIGEST.fullmatch(cell):
        raise ValueError
    return cell


def read_rows(path, names, kinds):
    """The rows of a CSV file with these columns, each cell read by its kind. Raises UserError."""
    header, *rows = read_table(path, "a file of a run") or [[]]
    try:
        rows = [[kind(cell) for kind, cell in zip(kinds, row, strict=True)] for row in rows]
    except ValueError:
        rows = []
    if header != names or not rows:
        raise UserError(f"{path} is not a file that train.py wrote")
    return rows


def read_digests(folder):
    """[[epoch, step, loss, state digest], …] of a run. Raises UserError."""
    return read_rows(folder / "digests.csv", DIGESTS, (whole, whole, float, sha256_text))


def take_settings(args, config, folder):
    """Set the options to a run's own settings. Raises UserError where one is not what the command
    line takes."""
    for action in parser()._actions:  # its types check the ranges
        name = action.dest
        if name not in config or name in ("features", "device"):
            continue
        try:
            if config[name] is not None and action.type:
                action.type(str(config[name]))
        except (ValueError, ArgumentTypeError) as error:
            raise UserError(f"{folder / 'config.json'} is not a run's configuration: {name} "
                            f"{error}") from None
        setattr(args, name, config[name] if name != "threads" else config[name] or args.threads)


def verify(args):
    """Repeat a run, or its first steps, with its own settings and write nothing; a verdict's code.

    Compared are its settings, features, labels and initial model; the losses and digests of the
    steps repeated, on to the next that has a digest; at the end the model and the predictions on
    val. Lines of later steps are only compared with each other."""
    folder = args.verify
    recorded = read_json(folder / "config.json", "a run's configuration", RECORD)
    rows = read_digests(folder)
    history = read_rows(folder / "history.csv", HISTORY, (whole, *[float] * 7))
    splits = read_splits(folder / "splits.json")
    take_settings(args, recorded["config"], folder)
    args.allow_missing = None  # need_songs says which are missing
    arithmetic = Arithmetic(args.precision, args.device, args.threads)
    data = open_data(args, splits)
    config = configuration(args, data, arithmetic)
    verdict = Verdict(folder)
    if recorded["config"]["features"]:
        config["features"] = compare_features(verdict, data, folder)
    training = Training(config, data, arithmetic)
    record = record_of(training)
    ends = [step for _, step in digest_steps(len(training.train), config["epochs"])]
    steps = min(args.steps or training.steps, training.steps)
    steps = min(step for step in ends if step >= steps)  # on to the next digest
    need_songs(training, steps)
    verdict.compare_all({**recorded["config"], **config}, recorded["config"], config)
    verdict.compare_all(("features_settings", "source", "label_mean", "label_std"), recorded,
                        record)
    verdict.compare_all(record["digests"], recorded["digests"], record["digests"])
    compare_tables(verdict, training, recorded, rows, history)
    bar = Progress(total=steps, desc="verify", unit="step")
    with bar:
        for _ in training.train_until(steps, bar):
            pass
    for then, now in zip(rows, training.digests):
        for name, *values in zip(DIGESTS, then, now):
            verdict.compare(f"epoch {now[0]}, step {now[1]}: {name}", *values)
    for then, now in zip(history, training.history):
        for name, *values in zip(HISTORY, then, now):
            verdict.compare(f"epoch {now[0]}: {name}", *values)
    if training.step == training.steps:
        result = training.result()
        verdict.compare_all(result, recorded["digests"], result)
    return verdict.finish(f"{training.step} of {training.steps} steps of {folder}, "
                          f"{args.precision}")


def compare_tables(verdict, training, record, rows, history):
    """What history.csv and digests.csv must say whatever was computed: their lines, the rates, the
    same losses, and the result's digest at its epoch."""
    epochs = training.config["epochs"]
    lines = digest_steps(len(training.train), epochs)
    verdict.compare("lines of digests.csv", [(row[0], row[1]) for row in rows], lines)
    verdict.compare("lines of history.csv", [row[0] for row in history],
                    list(range(1, epochs + 1)))
    ends, rows = lines[-epochs:], rows[len(lines) - epochs:]
    for (epoch, step), (_, rate, loss, *_), end in zip(ends, history, rows):
        verdict.compare(f"epoch {epoch}: lr", rate,
                        learning_rate(step - 1, training.steps, training.config))
        verdict.compare(f"epoch {epoch}: loss in both files", loss, end[2])
    last = training.config["select"] == "last"
    chosen = epochs - 1 if last else min(range(len(history)), key=lambda n: history[n][5])
    verdict.compare("model in digests.csv", [record["digests"].get("model")],
                    [row[3] for row in rows[chosen:chosen + 1]])


def compare_features(verdict, data, folder):
    """Compare the run's manifest with the features here, perhaps only those of some songs → its
    digest. From here on the files of other songs have to be what the run's manifest says."""
    manifest = read_manifest(folder / "manifest.json")
    verdict.compare_all(("settings", "annotations", "top_layers", "swapped_labels"), manifest,
                        data.manifest)
    here = data.manifest["songs"] or {}
    verdict.compare("songs' PCM and features", here, {
        song: manifest["songs"].get(song) for song in here})
    for dataset in data.datasets.values():
        dataset.songs = {**manifest["songs"], **here}
    return manifest["digest"]


def need_songs(training, steps):
    """Raise UserError if features of the first `steps` batches' songs are not there, naming the
    command that makes them."""
    data, generator, batches = training.data, torch.Generator(), []
    generator.set_state(data.shuffle.get_state())
    loader = DataLoader(data.ids["train"], training.config["batch_size"], shuffle=True,
                        drop_last=True, generator=generator)
    while len(batches) < steps:
        batches += [batch.tolist() for batch in loader]
    needed = sum(batches[:steps], []) + (data.ids["val"] if steps >= len(loader) else [])
    missing = [song for song in sorted(set(needed))
               if not (data.root / "songs" / f"{song}.pt").exists()]
    if missing:
        raise UserError(f"{len(missing)} of the songs of these steps have no features in "
                        f"{data.root}: run its extract.py command with --songs "
                        f"{' '.join(map(str, missing))}")


if __name__ == "__main__":
    execute(run, ARGS)
