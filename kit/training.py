"""What supports a training run: its options, where frozen outputs are kept, what is said of it."""

import torch

from kit import figures
from kit.cli import UserError
from kit.machine import FrozenOutputs, room_for_activations, where_to_keep
from kit.published import published_history
from kit.records import HISTORY

# options that say where and how, and decide no result
PLACES = ("features", "run", "resume", "device", "allow_missing")


def chosen_options(args, device):
    """{name: value} of the options that decide a run's result; None for a rate or a weight that the
    schedule or the loss does without, and for what decides no bit in exact arithmetic.
    device: in float32 its type decides bits. Raises UserError for options that contradict each
    other."""
    options = {name: value for name, value in vars(args).items() if name not in PLACES}
    if args.schedule == "constant":
        if args.max_lr is not None:
            raise UserError("--schedule constant has one rate, --lr: leave out --max-lr")
    elif args.max_lr is None:
        options["max_lr"] = 1e-3
    if args.weight_loss:
        if args.lambda_var is not None:
            raise UserError("--weight-loss is without the variance penalty: leave out --lambda-var")
    elif args.lambda_var is None:
        options["lambda_var"] = 0.05
    if args.schedule != "constant" and options["max_lr"] < args.lr:
        raise UserError(f"--max-lr {options['max_lr']} is below --lr {args.lr}")
    if args.precision == "exact":  # any number of threads gives the same bits on any device
        options["threads"] = None
    else:
        options["device"] = device
    return options


def frozen_outputs(data, model, arithmetic, options):
    """{"train": …, "val": …}: the FrozenOutputs of a DEAMFeatHandler's songs, kept where there is
    room. Also settles whether the model recomputes activations, for want of room."""
    frames = max((entry["frames"] for entry in (data.manifest["songs"] or {}).values()),
                 default=2250)
    model.recompute = not room_for_activations(options.batch_size, frames, model, arithmetic.device)
    keep = where_to_keep(len(data.ids["train"] + data.ids["val"]), frames, model,
                         getattr(torch, data.settings["store"]), arithmetic.device)
    # with dropout in them, the frozen stages give another output in each step
    places = {"train": None if options.frozen_dropout else keep, "val": keep}
    return {split: FrozenOutputs(data.datasets[split], model, arithmetic, place)
            for split, place in places.items()}


def announce(folder, training):
    """Say what is about to be trained."""
    trainable, total = (sum(each.numel() for each in parameters) for parameters in
                        (training.trainable, training.model.parameters()))
    options, data = training.options, training.data
    print(f"{folder}: {options.finetune} on {data.summary}; {trainable:,} trainable of {total:,} "
          f"parameters; {options.precision} on {training.device}\n"
          f"features {str(data.digest)[:16]}; initial model {training.initial[:16]}", flush=True)


def draw_curves(folder, training):
    """Draw history.png: the losses, the epoch that is the result, the mean of the labels as a
    level to compare with, and the published curves where there are some."""
    data, options, history = training.data, training.options, training.history
    lowest = min(history, key=lambda row: row[5])
    result = lowest if options.select == "best" else history[-1]
    true = data.z_scored(data.datasets["val"].labels)  # and 0 is the mean of the labels
    level = {"mse": true.square().mean().item(), "mae": true.abs().mean().item()}
    songs = f"{len(data.ids['train'])} train, {len(data.ids['val'])} val songs"
    caption = figures.caption_of(options.finetune, options.labels, songs, data.splits["source"])
    figures.draw_or_say(figures.draw_history, [dict(zip(HISTORY, row)) for row in history],
                        result[0], lowest[0], level, folder, caption,
                        published_history(training.config))
