"""Fine-tune the top layers and two regression heads on extracted features: DEAM_feats/ → runs/NAME/.

  python train.py --finetune last1                   # the published configuration
  python train.py --finetune frozen --run runs/frozen
  python train.py --finetune last1 --resume          # go on after an interruption
"""

import copy
import io
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from common import (DEAMFeatHandler, EmotionModel, FrozenOutputs, Parser, Progress, UserError, arithmetic,
                    backbone_of, differences, emotion_loss, environment, number, pick_device, quadrant_weights,
                    read_tensors, run_script, set_determinism, state_digest, tensor_digest, where_to_keep, write_csv,
                    write_file, write_json, write_tensors)

HISTORY = ["epoch", "lr", "train_loss", "train_mse", "train_mae", "val_loss", "val_mse", "val_mae"]


def parser():
    p = Parser(__doc__, threads=8)
    p.add_argument("--features", type=Path, default=Path("DEAM_feats"), metavar="FOLDER", help="what extract.py wrote")
    p.add_argument("--run", type=Path, metavar="FOLDER",
                   help="where the run goes (default: runs/ and the name of --finetune)")
    p.add_argument("--finetune", default="last1", metavar="frozen|last1|last2|…|lastN|all",
                   help="what trains: the heads alone; the top n layers with the norm and the heads; all layers above "
                        "the features'")
    p.add_argument("--weights", type=Path, metavar="FILE",
                   help="the backbone's weights, if extract.py was given a file (default: the bundle's download)")
    p.add_argument("--epochs", type=number(int, 1), default=20, metavar="N", help="passes over the training songs")
    p.add_argument("--lr", type=number(float, 0, above=True), default=3e-5, metavar="RATE",
                   help="lowest learning rate; the rate of --schedule constant")
    p.add_argument("--max-lr", type=number(float, 0, above=True), default=1e-3, metavar="RATE",
                   help="highest learning rate of the other schedules")
    p.add_argument("--schedule", choices=["triangular2", "triangular", "cosine", "constant"], default="triangular2",
                   help="learning rate over steps: cyclic, its height halved each cycle or not; or one fall from "
                        "--max-lr to --lr; or --lr")
    p.add_argument("--step-size-up", type=number(int, 1), default=100, metavar="N",
                   help="steps from the lowest rate to the highest")
    p.add_argument("--batch-size", type=number(int, 2), default=32, metavar="N",
                   help="songs a step; the last partial batch is dropped")
    p.add_argument("--micro-batch", type=number(int, 1), metavar="N",
                   help="songs whose activations are held at a time; the gradient stays the batch's (default: 1 on a "
                        "CPU, 32 on a GPU)")
    p.add_argument("--attention-dropout", type=number(float, 0), metavar="P",
                   help="dropout of attention weights in the layers that train (default: the bundle's, 0.1 for "
                        "WAV2VEC2_BASE); 0 is much faster on a CPU")
    p.add_argument("--weight-decay", type=number(float, 0), default=1e-4, metavar="X", help="AdamW's")
    p.add_argument("--lambda-corr", type=number(float, 0), default=0.05, metavar="X",
                   help="weight of the correlation penalty")
    p.add_argument("--lambda-var", type=number(float, 0), default=0.05, metavar="X",
                   help="weight of the variance penalty")
    p.add_argument("--corr-target", choices=["true", "zero"], default="true",
                   help="what the predictions' correlation is pulled to")
    p.add_argument("--weight-loss", action="store_true",
                   help="MSE weighted by inverse quadrant frequency, without the variance penalty")
    p.add_argument("--grad-clip", type=number(float, 0, above=True), default=1.0, metavar="X",
                   help="largest norm of the gradient")
    p.add_argument("--seed", type=number(int, 0), default=0, metavar="N", help="of heads, shuffling and dropout")
    p.add_argument("--select", choices=["last", "best"], default="last",
                   help="the result: the last epoch or the one of lowest val loss")
    p.add_argument("--labels", choices=["shipped", "corrected"], default="shipped",
                   help="corrected exchanges valence and arousal where the audit of extract.py says that DEAM has "
                        "them exchanged")
    p.add_argument("--precision", choices=["float32", "float64", "tf32", "bfloat16"], default="float32",
                   help="arithmetic; tf32 and bfloat16 are for a GPU")
    p.add_argument("--allow-missing", action="store_true", help="train on the songs whose features are there")
    p.add_argument("--resume", action="store_true", help="go on with the run in --run, or start it if there is none")
    return p


def learning_rate(step, steps, lr, max_lr, schedule, step_size_up):
    """The rate of optimiser step `step` (from 0) of `steps`. The cyclic ones are torch's CyclicLR (Smith 2017,
    arXiv 1506.01186), as a function of the step, so that nothing has to be saved to go on."""
    if schedule == "constant":
        return lr
    if schedule == "cosine":
        return lr + (max_lr - lr) * 0.5 * (1 + math.cos(math.pi * step / max(steps - 1, 1)))
    cycle = step // (2 * step_size_up)
    height = 1 - abs(step / step_size_up - 2 * cycle - 1)
    return lr + (max_lr - lr) * height / (2**cycle if schedule == "triangular2" else 1)


def configuration(args, device, data):
    """All that decides the result, as plain values; a run may go on only where it is the same."""
    left_out = ("features", "run", "weights", "splits", "resume", "device", "allow_missing")
    return {**{name: value for name, value in vars(args).items() if name not in left_out}, "device": device.type,
            "features_digest": data.digest, "splits_digest": data.splits_digest, "corpus": data.corpus,
            "songs": {name: len(ids) for name, ids in data.ids.items()}}


def draw_history(history, path, caption):
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    epochs = [row["epoch"] for row in history]
    for axis, name, title in zip(axes, ("loss", "mse", "mae"), ("loss", "MSE (z-scored)", "MAE (z-scored)")):
        for split, style in (("train", "-"), ("val", "--")):
            axis.plot(epochs, [row[f"{split}_{name}"] for row in history], style, marker=".", label=split)
        axis.set(title=title, xlabel="epoch", ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
        axis.grid(alpha=0.3)
    figure.suptitle(caption, fontsize=10)
    image = io.BytesIO()
    figure.savefig(image, dpi=150)
    plt.close(figure)
    write_file(path, image.getvalue())


def run(args):
    device = pick_device(args.device)
    set_determinism(args.threads, args.precision)
    dtype, autocast = arithmetic(args.precision, device)
    if (args.attention_dropout or 0) >= 1:
        raise UserError(f"--attention-dropout {args.attention_dropout} must be below 1")
    if args.max_lr < args.lr:
        raise UserError(f"--max-lr {args.max_lr} is below --lr {args.lr}")
    args.run = args.run or Path("runs") / args.finetune
    args.micro_batch = args.micro_batch or (32 if device.type == "cuda" else 1)
    data = DEAMFeatHandler(args.features, args.splits, args.batch_size, args.seed + 1, args.allow_missing, args.labels)
    for note in data.notes():
        print(note)
    if len(data.ids["train"]) < args.batch_size or not data.ids["val"]:
        raise UserError(f"{data.summary}: that is no full batch of {args.batch_size} to train on, or nothing to "
                        "validate on; lower --batch-size")
    config, last = configuration(args, device, data), None
    if (args.run / "last.pt").exists():
        if not args.resume:
            raise UserError(f"{args.run} holds a run already: add --resume to go on with it, choose another --run, or "
                            "delete it")
        last = read_tensors(args.run / "last.pt", "a training state")
        if not isinstance(last, dict) or "config" not in last:
            raise UserError(f"{args.run / 'last.pt'} is not a training state: delete {args.run} and train again")
        if differing := differences(last["config"], config):
            raise UserError(f"{args.run} was started otherwise ({differing}): resume with its own settings, or choose "
                            "another --run")

    model = EmotionModel(data.settings["bundle"], data.settings["layer"], args.finetune, args.attention_dropout)
    weights_file = (data.manifest or {}).get("weights_file")
    backbone = backbone_of(data.settings, args.weights, args.features, (weights_file or {}).get("name"))
    model.start_from(backbone, args.seed)
    model.to(device, dtype)
    digests = {"initial_model": state_digest(model.state_dict())}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.lr, weight_decay=args.weight_decay)
    print(f"{args.run}: {args.finetune} on {data.summary}; {sum(p.numel() for p in trainable):,} trainable of "
          f"{sum(p.numel() for p in model.parameters()):,} parameters; {args.precision} on {device}, {args.threads} "
          "threads")
    print(f"features {str(data.digest)[:16]}; initial model {digests['initial_model'][:16]}", flush=True)

    torch.manual_seed(args.seed + 2)  # dropout
    history, best = [], (math.inf, None)
    if last:
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        data.shuffle.set_state(last["shuffle"])
        torch.set_rng_state(last["rng"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(last["cuda_rng"], device)
        history, best = last["history"], last["best"]
        print(f"going on after epoch {len(history)} of {args.epochs}")
    record = {**config, "weights_file": weights_file, "label_mean": data.mean.tolist(),
              "label_std": data.std.tolist(), "digests": digests, "environment": environment(device)}
    write_json(args.run / "config.json", record)

    def z_scored(labels):
        values = ((labels - data.mean) / data.std).to(dtype)
        return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values

    weights = quadrant_weights((data.datasets["train"].labels - data.mean) / data.std) if args.weight_loss else None

    def loss_of(pred, true):
        return emotion_loss(pred.to(dtype), true, args.lambda_corr, args.lambda_var, args.corr_target, weights)

    def save_history(history):
        write_csv(args.run / "history.csv", HISTORY, [row.values() for row in history])

    def save(state):
        """In the background: what --resume goes on from, and the history up to there."""
        write_tensors(args.run / "last.pt", state)
        save_history(state["history"])

    frames = max((entry["frames"] for entry in data.manifest["songs"].values()), default=0) if data.manifest else 2250
    keep = where_to_keep(len(data.ids["train"] + data.ids["val"]), frames, model,
                         getattr(torch, data.settings.get("store", "float32")), device)
    train, val = (data.loader(name, FrozenOutputs(data.datasets[name], model, autocast, keep))
                  for name in ("train", "val"))
    val_true, steps, val_pred = z_scored(data.datasets["val"].labels), len(train) * args.epochs, None
    saver, saving = ThreadPoolExecutor(1), None
    with saver, Progress(total=steps, initial=len(train) * len(history), desc="train", unit="step") as bar:
        for epoch in range(len(history) + 1, args.epochs + 1):
            model.train()
            sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, MSE, MAE
            for clips, labels in train:
                rate = learning_rate(bar.n, steps, args.lr, args.max_lr, args.schedule, args.step_size_up)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                true = z_scored(labels)
                with autocast():
                    pred = model(clips, args.micro_batch)
                loss = loss_of(pred, true)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trainable, args.grad_clip)
                optimizer.step()
                difference = pred.detach().double() - true
                sums += torch.stack([loss.detach().double(), difference.square().mean(), difference.abs().mean()])
                bar.update()
                # asked once an epoch of a GPU, which then computes while the files of the next batch are read
                if (device.type == "cpu" or bar.n % len(train) == 0) and not sums.isfinite().all():
                    raise UserError(f"the loss is not finite in epoch {epoch}: lower --max-lr, or try --precision "
                                    "float32")
            val_pred = model.predict(val, autocast, args.micro_batch)
            difference = val_pred - val_true.double().cpu()
            val_loss = loss_of(val_pred.to(device), val_true).item()
            val_mse, val_mae = difference.square().mean().item(), difference.abs().mean().item()
            means = (sums / len(train)).tolist()
            history.append(dict(zip(HISTORY, [epoch, rate, *means, val_loss, val_mse, val_mae])))
            bar.say("epoch {epoch:3d}  lr {lr:.2e}  "
                    "train loss {train_loss:.4f} MSE {train_mse:.4f} MAE {train_mae:.4f}  "
                    "val loss {val_loss:.4f} MSE {val_mse:.4f} MAE {val_mae:.4f}".format(**history[-1]))
            if args.select == "best" and val_loss < best[0]:
                best = (val_loss, {name: value.cpu().clone() for name, value in model.state_dict().items()})
            if saving:
                saving.result()
            saving = saver.submit(save, copy.deepcopy({
                "config": config, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "history": history, "best": best,
                "shuffle": data.shuffle.get_state(), "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}))
        if saving:
            saving.result()

    save_history(history)
    caption = f"{args.run.name} · {args.finetune} on {data.corpus}, {data.labels} labels · {data.summary}"
    draw_history(history, args.run / "history.png", caption)
    if best[1]:
        model.load_state_dict(best[1])
    if best[1] or val_pred is None:
        val_pred = model.predict(val, autocast, args.micro_batch)
    six_decimals = (val_pred * 1e6).round() / 1e6 + 0.0  # without minus zeros
    digests |= {"model": state_digest(model.state_dict()), "val_predictions": tensor_digest(six_decimals)}
    write_tensors(args.run / "model.pt", {
        "config": config, "settings": data.settings, "mean": data.mean, "std": data.std,
        "initial_model": digests["initial_model"],
        "state": {name: value.cpu() for name, value in model.state_dict().items()}})
    write_json(args.run / "config.json", record)  # now with the digests of the result
    for name, value in digests.items():
        print(f"{name.replace('_', ' ')}: {value}")
    return 0


def main():
    run_script(run, parser(), "the same command with --resume goes on after the last finished epoch")


if __name__ == "__main__":
    main()
