"""What supports a training run: the options that decide it, and what is said and drawn of it."""

from kit import figures
from kit.cli import UserError
from kit.published import published_history
from kit.records import HISTORY

# options that say where and how, and decide no result
PLACES = ("features", "run", "resume", "device", "allow_missing")


def chosen_options(args, device):
    """{name: value} of the options that decide a run's result, with the defaults that depend on
    others; None for a rate or a weight that the schedule or the loss does without, and for threads,
    which decide no bit in exact arithmetic. device: in float32 its type decides bits. Raises
    UserError for options that contradict each other."""
    if args.schedule == "constant" and args.max_lr is not None:
        raise UserError("--schedule constant has one rate, --lr: leave out --max-lr")
    if args.weight_loss and args.lambda_var is not None:
        raise UserError("--weight-loss is without the variance penalty: leave out --lambda-var")
    options = {name: value for name, value in vars(args).items() if name not in PLACES}
    if args.schedule != "constant" and args.max_lr is None:
        options["max_lr"] = 1e-3
    if not args.weight_loss and args.lambda_var is None:
        options["lambda_var"] = 0.05
    if args.micro_batch is None:  # float32 has other bits on a GPU in any case
        whole = args.precision == "float32" and device == "cuda"
        options["micro_batch"] = args.batch_size if whole else 4
    if args.schedule != "constant" and options["max_lr"] < args.lr:
        raise UserError(f"--max-lr {options['max_lr']} is below --lr {args.lr}")
    if args.precision == "exact":  # any number of threads gives the same bits on any device
        options["threads"] = None
    else:
        options["device"] = device
    return options


def announce(folder, training):
    """Say what is about to be trained."""
    for note in training.data.notes():
        print(note)
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
