"""Fine-tune the top layers and two regression heads on features: DEAM_feats/ → runs/NAME/.

  python train.py --finetune last1                      # the published configuration
  python train.py --finetune frozen --labels corrected --run runs/frozen-corrected
  python train.py --finetune frozen --fold 3            # tested on artists it never heard
  python train.py --finetune last1 --resume             # after an interruption
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -P, -I leave it out

from kit.cli import Parser, execute, number, path, start


def parser():
    """The options of a run: the defaults are the published configuration."""
    p = Parser(__doc__)
    # what trains, and on what
    p.add_argument("--finetune", default="last1", metavar="frozen|last1|last2|…|lastN|all",
                   help="what trains: the heads, and a pooling that has parameters; also the "
                        "norm and the top n layers; or (lastN, all) every layer above the "
                        "features'")
    p.share("--features", help="the folder that extract.py wrote")
    p.share("--labels", "--allow-missing")
    p.add_argument("--fold", type=number(int, 0, 9), metavar="K",
                   help="splits of folds.json, every artist in one fold of ten: test is fold K, "
                        "val the next one (default: the features folder's splits)")
    # how long, and the learning rate
    p.add_argument("--epochs", type=number(int, 1, 10**6), default=20, metavar="N",
                   help="passes over the training songs")
    p.add_argument("--batch-size", type=number(int, 2, 10**6), default=32, metavar="N",
                   help="songs a step; the last partial batch is dropped")
    p.add_argument("--schedule", choices=["triangular2", "cosine", "constant"],
                   default="triangular2", help="learning rate over steps: cyclic, its height "
                   "halved each cycle; or one fall from --max-lr to --lr; or --lr")
    p.add_argument("--lr", type=number(float, 0, 10, above=True), default=3e-5, metavar="RATE",
                   help="lowest learning rate; the rate of --schedule constant")
    p.add_argument("--max-lr", type=number(float, 0, 10, above=True), metavar="RATE",
                   help="highest learning rate of the other schedules (default: 0.001)")
    p.add_argument("--step-size-up", type=number(int, 1, 10**9), default=100, metavar="N",
                   help="steps of triangular2 from the lowest rate to the highest")
    # optimiser and regularisation
    p.add_argument("--weight-decay", type=number(float, 0, 10), default=1e-4, metavar="X",
                   help="AdamW's")
    p.add_argument("--grad-clip", type=number(float, 0, 1e9, above=True), default=1.0, metavar="X",
                   help="largest norm of the gradient")
    p.add_argument("--frozen-dropout", action="store_true",
                   help="dropout also in the layers that do not train, as the published system has "
                        "it; their outputs are then computed anew in every step")
    p.add_argument("--seed", type=number(int, 0, 2**32 - 3), default=0, metavar="N",
                   help="of heads, shuffling and dropout")
    p.add_argument("--select", choices=["last", "best"], default="last",
                   help="the result: the last epoch, or the one of lowest val loss")
    # the loss: emotion_loss in common.py, which Training.loss calls
    p.add_argument("--lambda-corr", type=number(float, 0, 1e6), default=0.05, metavar="X",
                   help="weight of the correlation penalty")
    p.add_argument("--corr-target", choices=["true", "zero"], default="true",
                   help="what the predictions' correlation is pulled to")
    p.add_argument("--lambda-var", type=number(float, 0, 1e6), metavar="X",
                   help="weight of the variance penalty (default: 0.05; with --weight-loss none)")
    p.add_argument("--weight-loss", action="store_true",
                   help="MSE weighted by inverse quadrant frequency, without variance penalty")
    # where, and in which arithmetic
    p.add_argument("--run", type=path, metavar="FOLDER",
                   help="where the run goes (default: runs/ and the name of --finetune, or that "
                        "and -foldK)")
    p.add_argument("--resume", action="store_true",
                   help="resume the run in --run, or start it if there is none")
    p.share("--precision", "--device")
    p.add_argument("--micro-batch", type=number(int, 1, 10**6), metavar="N",
                   help="songs whose activations are computed together; part of the result's bits "
                        "(default: 4; in float32 on a GPU the whole batch)")
    p.add_argument("--threads", type=number(int, 1, 1024), metavar="N",
                   help="CPU threads (default: all cores; but in float32, where they decide "
                        "bits, 8)")
    return p


if __name__ == "__main__":
    ARGS = start(parser(), "rerun the same command with --resume to resume after the last finished "
                 "epoch")  # before torch is imported

import math
from types import SimpleNamespace

import torch

from common import DEAMFeatHandler, EmotionModel, emotion_loss, quadrant_weights, seeds
from kit.audio import sin_pi
from kit.cli import Progress, UserError, torchrun
from kit.deam import SPLITS, fold_splits, splits_digest, splits_for
from kit.files import lock, state_digest, tensor_digest
from kit.machine import Arithmetic, flat_parameter, frozen_outputs
from kit.network import start_from
from kit.records import (describe_run, digest_steps, load_trained, read_checkpoint, restore,
                         trained_state, write_progress, write_result, write_start)
from kit.training import announce, chosen_options, draw_curves


def configuration(args, data, arithmetic):
    """What decides a run's result: the options, and what they are applied to."""
    return {"options": chosen_options(args, arithmetic.device.type), "features": data.digest,
            "splits": splits_digest(data.ids),
            "songs": {split: len(data.ids[split]) for split in SPLITS}}


def open_data(args, splits=None):
    """The features and the splits to train on, the folder's own or those of --fold. Raises
    UserError where they are too few."""
    if args.fold is not None and not splits:
        splits = fold_splits(args.fold, splits_for(args.features))
    data = DEAMFeatHandler(args.features, splits, args.batch_size, args.seed, args.allow_missing,
                           args.labels)
    if len(data.ids["train"]) < args.batch_size:
        raise UserError(f"{data.summary}: no full batch of {args.batch_size} to train on; lower "
                        "--batch-size")
    if not data.ids["val"]:
        raise UserError(f"{data.summary}: no song to validate on")
    return data


def learning_rate(step, steps, options):
    """The rate of optimiser step `step` (from 0) of `steps`. The cyclic one is torch's CyclicLR
    (Smith 2017, arXiv 1506.01186), as a function of the step, so that nothing has to be saved."""
    if options.schedule == "constant":
        return options.lr
    if options.schedule == "cosine":
        cosine = float(sin_pi(0.5 - step / max(steps - 1, 1)))  # the same on any machine
        return options.lr + (options.max_lr - options.lr) * 0.5 * (1 + cosine)
    cycle = step // (2 * options.step_size_up)  # triangular2: half as high each cycle
    height = 1 - abs(step / options.step_size_up - 2 * cycle - 1)
    return options.lr + math.ldexp((options.max_lr - options.lr) * height, -cycle)


class Training:
    """Model, optimiser and loaders of a configuration; its steps, and what they gave so far:
    `history` and `digests`, the lines of the two tables, and the best epoch's model."""

    def __init__(self, config, data, arithmetic):
        self.config, self.options = config, SimpleNamespace(**config["options"])
        self.data, self.arithmetic, self.device = data, arithmetic, arithmetic.device
        top = data.top_layers
        self.model = EmotionModel(top["params"], top["layer"], self.options.finetune,
                                  self.options.seed, self.options.frozen_dropout)
        start_from(self.model, top)
        self.model.to(self.device, arithmetic.dtype)
        self.trainable = [each for each in self.model.parameters() if each.requires_grad]
        # hashed once, since they never change
        self.frozen_digests = {name: tensor_digest(each) for name, each in
                               self.model.named_parameters() if not each.requires_grad}
        self.initial = self.digest()
        self.flat = flat_parameter(self.trainable)  # all that trains, as AdamW and clipping see it
        self.optimizer = torch.optim.AdamW([self.flat], lr=self.options.lr, foreach=False,
                                           weight_decay=self.options.weight_decay)
        outputs = frozen_outputs(data, self.model, arithmetic, self.options)
        self.train_loader = data.loader("train", outputs["train"])
        self.val_loader = data.loader("val", outputs["val"])
        self.epoch_steps = len(self.train_loader)
        self.steps = self.epoch_steps * self.options.epochs
        with arithmetic():
            labels = self.targets(data.datasets["train"].labels)
            self.weights = quadrant_weights(labels) if self.options.weight_loss else None
        self.step, self.history, self.digests = 0, [], []
        self.best = None  # {"loss": on val, "model": what trained}
        torch.manual_seed(seeds(self.options.seed)["dropout"])

    def targets(self, labels):
        return self.data.z_scored(labels).to(self.arithmetic.dtype).to(self.device)

    def loss(self, pred, true):
        return emotion_loss(pred, true, self.options.lambda_corr, self.options.lambda_var,
                            self.options.corr_target, self.weights)

    def train_until(self, steps, bar):
        """Train up to step number `steps`, yielding each epoch's line of history.csv once it is
        validated. Raises UserError if training diverged."""
        early = [step for _, step in digest_steps(self.epoch_steps, 0)]
        for epoch in range(len(self.history) + 1, self.options.epochs + 1):
            self.model.train()
            sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, MSE, MAE
            for states, labels in self.train_loader:
                numbers, rate = self.train_step(states, labels)
                sums += numbers
                bar.update()
                if epoch == 1 and self.step in early:
                    self.digests.append([epoch, self.step, numbers[0].item(), self.digest()])
                if self.step == steps and steps % self.epoch_steps:  # within an epoch
                    return
            means = [value / self.epoch_steps for value in sums.tolist()]
            validation, _ = self.validate()
            if not all(map(math.isfinite, [*means, *validation])):
                raise UserError("the loss is not finite: lower --max-lr, or --lr with --schedule "
                                "constant")
            self.history.append([epoch, rate, *means, *validation])
            self.digests.append([epoch, self.step, means[0], self.digest()])
            self.remember_best(validation[0])
            yield self.history[-1]
            if self.step == steps:
                return

    def train_step(self, states, labels):
        """One optimiser step on a batch, its frozen stages' outputs and labels[B, 2] → (loss, MSE
        and MAE, float64[3] on the device; the learning rate)."""
        rate = learning_rate(self.step, self.steps, self.options)
        self.optimizer.param_groups[0]["lr"] = rate
        with self.arithmetic():
            true = self.targets(labels)
            pred = self.model(states, self.options.micro_batch)
            loss = self.loss(pred, true)
            self.model.zero_grad()
            loss.backward()
            # a parameter that the loss does not reach has no gradient
            self.flat.grad = torch.cat([(torch.zeros_like(each) if each.grad is None else
                                         each.grad).flatten() for each in self.trainable])
            torch.nn.utils.clip_grad_norm_(self.flat, self.options.grad_clip, foreach=False)
            self.optimizer.step()
            error = pred.detach().double() - true
            numbers = torch.stack([loss.detach().double(), error.square().mean(),
                                   error.abs().mean()])
        self.step += 1
        return numbers, rate

    @torch.no_grad()
    def validate(self):
        """(loss, MSE, MAE) over all val songs at once, where those of train are means over batches;
        and the predictions float64[N, 2], z-scored."""
        pred = self.model.predict(self.val_loader, self.arithmetic, self.options.micro_batch)
        with self.arithmetic():
            true = self.targets(self.data.datasets["val"].labels)
            error = pred.to(self.device) - true
            loss = self.loss(pred.to(self.device, self.arithmetic.dtype), true)
            numbers = [loss, error.square().mean(), error.abs().mean()]
        return [number.item() for number in numbers], pred

    def remember_best(self, loss):
        """Keep what trained, for --select best, where its loss on val is the lowest so far."""
        if self.options.select == "best" and (not self.best or loss < self.best["loss"]):
            self.best = {"loss": loss, "model": {
                name: value.cpu().clone() for name, value in trained_state(self.model).items()}}

    def result(self):
        """The digests of the model that is the result of all epochs and of its predictions on val;
        the model becomes that one."""
        if self.best:
            load_trained(self.model, self.best["model"])
        _, pred = self.validate()
        six_decimals = (pred * 1e6).round() / 1e6 + 0.0  # without minus zeros
        return {"model": self.digest(), "val_predictions": tensor_digest(six_decimals)}

    def digest(self):
        return state_digest(self.model.state_dict(), self.frozen_digests)


def run(args):
    if torchrun().count > 1:
        raise UserError("training is for one process: run train.py without torchrun")
    fold = "" if args.fold is None else f"-fold{args.fold}"
    args.run = args.run or Path("runs") / f"{args.finetune}{fold}"
    if args.precision != "exact":
        args.threads = args.threads or 8
    arithmetic = Arithmetic(args.precision, args.device, args.threads)
    data = open_data(args)
    config = configuration(args, data, arithmetic)
    locked = lock(args.run, "train", "the run")  # as long as this variable lives
    state = read_checkpoint(args.run, config, args.resume)
    training = Training(config, data, arithmetic)
    description = describe_run(training)
    if state:
        restore(training, state, args.run / "last.pt")
        print(f"resumed after epoch {len(training.history)} of {args.epochs}")
    announce(args.run, training)
    write_start(args.run, training, description)

    with Progress(total=training.steps, initial=training.step, desc="train", unit="step") as bar:
        for row in training.train_until(training.steps, bar):
            bar.say("epoch {:3d}  lr {:.2e}  train loss {:.4f} MSE {:.4f} MAE {:.4f}  val loss "
                    "{:.4f} MSE {:.4f} MAE {:.4f}".format(*row))
            write_progress(args.run, training)
    description["digests"] |= training.result()
    write_result(args.run, training, description)
    draw_curves(args.run, training)
    for name, value in description["digests"].items():
        print(f"{name.replace('_', ' ')}: {value}")
    print(f"next: python eval.py {args.run} --features {args.features}")
    del locked
    return 0


if __name__ == "__main__":
    execute(run, ARGS)
