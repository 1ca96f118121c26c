"""Training: what trains, the schedule, what a run leaves behind, and what it refuses."""

import copy
import csv
import io
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torchaudio
from conftest import FLOAT32, QUICK, ROOT, call, few, made_features

import common
import train
from common import DEAMFeatHandler, EmotionModel
from kit import deam, figures, files, machine, network, records
from kit.cli import UserError
from kit.features import manifest_digest
from kit.files import load_tensors, read_json, state_digest, write_json, write_tensors
from kit.training import chosen_options
from kit.weights import Weights

BASE = {**torchaudio.pipelines.WAV2VEC2_BASE._params, "aux_num_out": None}


def new_training(features, *options):
    """A Training of train.py, on the CPU."""
    args = train.parser().parse_args(["--features", str(features), "--device", "cpu",
                                      *map(str, options)])
    arithmetic = machine.Arithmetic(args.precision, args.device, args.threads)
    data = train.open_data(args)
    return train.Training(train.configuration(args, data, arithmetic), data, arithmetic)


@pytest.mark.parametrize("finetune, layers", [("frozen", []), ("last1", [1]), ("lastN", [0, 1])])
def test_each_mode_trains_what_it_names_and_nothing_else(made, tmp_path, no_histories, compared,
                                                         finetune, layers):
    run = tmp_path / "run"
    assert call(train, "--features", made, "--run", run, "--finetune", finetune, *QUICK) == 0
    top = DEAMFeatHandler(made).top_layers
    start = EmotionModel(top["params"], 10, finetune)
    end = load_tensors(run / "model.pt", "")["state"]
    network.start_from(start, top)
    parts = ["valence.", "arousal.", *(["norm."] if layers else []),
             *(f"layers.{n}." for n in layers)]
    for name, before in start.state_dict().items():
        # the attention's key bias gets no gradient: softmax does not see it
        assert name.startswith(tuple(parts)) != torch.equal(before, end[name]) or (
            name.endswith("k_proj.bias")), name
    compared(len(end), "tensors")


def test_exact_training_is_the_same_kept_or_recomputed_on_any_threads(features, compared):
    """A step in exact arithmetic, dropout on: on one thread with frozen outputs kept and
    activations too; on two with neither."""
    results, before = [], torch.get_num_threads()
    for threads, keep, recompute in ((1, torch.device("cpu"), False), (2, None, True)):
        torch.set_num_threads(threads)
        training = new_training(features, "--batch-size", 4, "--micro-batch", 2)
        training.model.recompute = recompute
        training.train_loader.dataset.keep = keep
        numbers, _ = training.train_step(*next(iter(training.train_loader)))
        results.append((numbers.tolist(), training.digest()))
    torch.set_num_threads(before)
    assert results[0] == results[1]
    compared(2, "ways to compute a step")


def test_dropout_follows_the_seed(made, compared):
    """The same model on the same clip, in training: one prediction for each seed."""
    predictions, state = {}, None
    for seed in (0, 0, 5):
        training = new_training(made, *QUICK, "--seed", seed)
        state = state or training.model.state_dict()
        training.model.load_state_dict(state)
        clip = training.model.train().run_frozen(training.data.datasets["train"][0][0][None])[0]
        predictions.setdefault(seed, []).append(training.model([clip]))
    first, again, other = *predictions[0], *predictions[5]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(training.model.eval()([clip]), training.model([clip]))
    compared(3, "seeds")


@pytest.mark.parametrize("options, target", [
    (["--lambda-var", 0.2], "true"), (["--lambda-var", 0.2, "--corr-target", "zero"], "zero"),
    (["--weight-loss"], "true")])
def test_two_epochs_by_hand(splits, tmp_path, compared, options, target):
    """Each step: its learning rate, the loss, clipped gradients, AdamW; each epoch: the means over
    its steps, and val as one batch without dropout. Written a second time, in torch's float32."""
    features = made_features(tmp_path / "f", few(splits))
    training = new_training(features, *QUICK, "--finetune", "frozen", "--batch-size", 8, "--seed",
                            3, "--weight-decay", 0.5, "--grad-clip", 0.3, "--lambda-corr", 0.4,
                            "--step-size-up", 3, "--max-lr", 0.01, *options)
    state, model = torch.get_rng_state(), copy.deepcopy(training.model)
    data, step, expected = DEAMFeatHandler(features, batch_size=8, seed=3), 0, []
    heads = [*model.valence.parameters(), *model.arousal.parameters()]
    optimizer = torch.optim.AdamW(heads, weight_decay=0.5)
    weights = common.quadrant_weights(data.z_scored(data.datasets["train"].labels))
    weights = weights if "--weight-loss" in options else None

    def numbers(clips, labels):
        pred = model([model.run_frozen(clip[None])[0] for clip in clips])
        true = ((labels - data.mean) / data.std).float()
        loss = common.emotion_loss(pred, true, 0.4, 0.2, target, weights)
        return loss, (pred - true).square().mean(), (pred - true).abs().mean()

    for epoch in (1, 2):
        sums = torch.zeros(3)
        model.train()
        for clips, labels in data.loader("train", data.datasets["train"]):
            rate = train.learning_rate(step, 10, training.options)
            loss, mse, mae = numbers(clips, labels)
            for parameter, gradient in zip(heads, torch.autograd.grad(loss, heads)):
                parameter.grad = gradient
            norm = torch.cat([each.grad.flatten() for each in heads]).norm()
            assert norm > 0.3  # so that it is clipped
            for each in heads:
                each.grad *= 0.3 / norm
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            sums += torch.stack([loss, mse, mae]).detach() / 5
            step += 1
        model.eval()
        with torch.no_grad():
            clips, labels = zip(*data.loader("val", data.datasets["val"]))
            val = numbers(sum(clips, []), torch.cat(labels))
        expected.append([epoch, rate, *sums.tolist(), *map(float, val)])
    torch.set_rng_state(state)
    history = list(training.train_until(training.steps, SimpleNamespace(update=lambda: None)))
    for row, other in zip(history, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    for name, value in model.state_dict().items():
        difference = value - training.model.state_dict()[name]  # Adam's of tiny gradients is large
        assert difference.norm() < 1e-3 * value.norm() + 1e-12, name
    assert [row[:2] for row in training.digests] == [[1, 1], [1, 2], [1, 4], [1, 5], [2, 10]]
    assert [row[2] for row in training.digests[3:]] == [row[2] for row in history]
    compared(16 + len(heads), "numbers and tensors")


def test_the_schedules(compared):
    options = SimpleNamespace(lr=3e-5, max_lr=1e-3, schedule="triangular2", step_size_up=100)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=3e-5)
    reference = torch.optim.lr_scheduler.CyclicLR(optimizer, 3e-5, 1e-3, step_size_up=100,
                                                  mode="triangular2", cycle_momentum=False)
    for step in range(860):
        rate = optimizer.param_groups[0]["lr"]
        assert train.learning_rate(step, 860, options) == pytest.approx(rate, rel=1e-9)
        optimizer.step()
        reference.step()
    options.schedule = "cosine"
    cosine = [train.learning_rate(step, 50, options) for step in range(50)]
    for step, rate in enumerate(cosine):  # half a period, from the highest to the lowest
        assert rate == pytest.approx(3e-5 + 9.7e-4 * (1 + math.cos(math.pi * step / 49)) / 2)
    assert train.learning_rate(0, 1, options) == 1e-3
    options.schedule = "constant"
    assert train.learning_rate(7, 50, options) == 3e-5
    options.schedule, options.step_size_up = "triangular2", 1
    assert train.learning_rate(5001, 9999, options) == 3e-5  # 2^2500 is none
    compared(913, "rates")


# ------------------------------------------------------------------------- runs, interruption


def test_what_a_run_leaves(trained, compared):
    names = {"config.json", "splits.json", "manifest.json", "digests.csv", "history.csv",
             "history.png", "history.pdf", "model.pt", "last.pt"}
    assert {path.name for path in trained.iterdir() if path.name[0] != "."} == names
    rows = list(csv.DictReader(open(trained / "history.csv")))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    digests = records.read_digests(trained)
    assert [row[:2] for row in digests] == [[1, 1], [1, 2], [1, 2], [2, 4]]
    found = read_json(trained / "config.json", "")["digests"]["model"]
    state = load_tensors(trained / "model.pt", "")["state"]
    assert found == state_digest(state) == digests[-1][3]
    compared(len(names), "files")


def python(script, *arguments, **settings):
    return subprocess.Popen([sys.executable, ROOT / script, *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings)


def wait_for(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.01)


@pytest.mark.parametrize("number, finetune, more", [
    (signal.SIGINT, "last1", ["--frozen-dropout"]),
    (signal.SIGKILL, "frozen", ["--precision", "exact"])])
def test_a_stopped_run_resumes_to_the_undisturbed_one(made, tmp_path, no_histories, fails, compared,
                                                      number, finetune, more):
    """A run goes on in a process of its own. Another one in its folder is refused with a line that
    names the first; that is stopped in the middle, in one line, and resumed with two epochs more
    than it has: the same as one that was never stopped."""
    base = ["--features", made, "--finetune", finetune, *QUICK, "--select", "best", *more]
    stopped = [*base, "--run", tmp_path / "stopped", "--resume"]
    with python("train.py", *stopped, "--epochs", 10**6) as process:
        wait_for((tmp_path / "stopped/last.pt").exists, process)
        assert f"being written by process {process.pid} on " in fails(train, *stopped)
        process.send_signal(number)
        output, _ = process.communicate()
    assert "Traceback" not in output and process.returncode == {signal.SIGINT: 130}.get(number, -9)
    if number == signal.SIGINT:
        assert output.strip().splitlines()[-1].startswith("interrupted: rerun the same command")
    assert not (tmp_path / "stopped/model.pt").exists()
    epochs = len(load_tensors(tmp_path / "stopped/last.pt", "")["history"]) + 2
    call(train, *stopped, "--epochs", epochs)
    call(train, *base, "--run", tmp_path / "whole", "--epochs", epochs)
    results = [(read_json(tmp_path / name / "config.json", "")["digests"],
                *[(tmp_path / name / f"{file}.csv").read_text() for file in ("history", "digests")])
               for name in ("stopped", "whole")]
    assert results[0] == results[1]
    compared(epochs, "epochs of two runs")


def test_a_run_is_not_overwritten_or_mixed(features, trained, tmp_path, fails, compared):
    shutil.copytree(trained, tmp_path / "r")
    base = ["--features", features, "--run", tmp_path / "r", *QUICK]
    assert "--resume" in fails(train, *base)
    assert "lr 3e-05 there, 0.0001 now" in fails(train, *base, "--resume", "--lr", "1e-4")
    (tmp_path / "r/last.pt").unlink()
    assert "holds a finished run" in fails(train, *base, "--resume")
    compared(3, "refusals")


def test_a_notebooks_folder_without_manifest_trains(tmp_path, capsys, fails, monkeypatch, compared):
    """annotations.csv and songs/<id>.pt of layer 10 of its backbone, nothing else."""
    (tmp_path / "f/songs").mkdir(parents=True)
    splits = deam.read_splits(ROOT / "splits.json")
    ids = splits["train"][:4] + splits["val"][:2] + splits["test"][:2]
    (tmp_path / "f/annotations.csv").write_text(",".join(deam.COLUMNS) + "\n" + "".join(
        f"{song},{3 + song % 5},1,{4 + song % 3},1\n" for song in deam.songs_of(splits)))
    for song in ids:
        torch.save(torch.randn(9, 768), tmp_path / "f/songs" / f"{song}.pt")
    asked, weights = [], {
        name: torch.full(value.shape, 0.01) for name, value in network.network(BASE).state_dict(
            ).items()}
    monkeypatch.setattr(network, "find_weights", lambda name: asked.append(name) or (
        Weights(BASE, weights, 16000, 1e-7, {"name": name}, "a base network")))
    command = ["--features", tmp_path / "f", "--run", tmp_path / "r", "--allow-missing",
               "--batch-size", 2, "--epochs", 1, *FLOAT32]
    assert call(train, *command) == 0
    output = capsys.readouterr().out
    assert set(asked) == {"ALM/wav2vec2-base-audioset"}
    assert read_json(tmp_path / "r/config.json", "")["config"]["options"]["threads"] == 8
    assert "cannot be verified" in output and "8,008,450 trainable of 15,096,322" in output
    assert "4 of 1395 train, 2 of 174 val, 2 of 175 test" in output
    torch.save(torch.full((9, 768), torch.nan), tmp_path / "f/songs" / f"{ids[0]}.pt")
    assert "NaN or infinity" in fails(train, *command, "--run", tmp_path / "r2")
    compared(len(ids), "songs without a manifest")


def test_features_that_do_not_belong(features, tmp_path, fails, compared):
    run = ["--run", tmp_path / "r", *QUICK]
    assert "run extract.py" in fails(train, "--features", tmp_path / "none", *run)
    copy = shutil.copytree(features, tmp_path / "f")
    song = copy / "songs" / f"{DEAMFeatHandler(copy).ids['train'][0]}.pt"
    whole = song.read_bytes()
    for damage in (b"", whole[:-200]):
        song.write_bytes(damage)
        assert "is not a feature file" in fails(train, "--features", copy, *run)
    torch.save(torch.load(io.BytesIO(whole), weights_only=True) * 1.001, song)
    assert f"{song} is damaged" in fails(train, "--features", copy, *run)
    torch.save(torch.zeros(5), song)
    assert "not a tensor [T, 64]" in fails(train, "--features", copy, *run)
    torch.save(torch.zeros(5, 64, dtype=torch.bfloat16), song)
    assert "not a tensor [T, 64]" in fails(train, "--features", copy, *run)
    song.unlink()
    assert "1 of 60 songs have no features" in fails(train, "--features", copy, *run)
    song.write_bytes(whole)
    table = copy / "annotations.csv"
    table.write_text(table.read_text().replace(",1.", ",2.", 1))
    assert "is not the file of the manifest" in fails(train, "--features", copy, *run)
    compared(8, "refusals")


def test_layers_above_that_do_not_fit(features, tmp_path, fails, compared):
    """Also where whoever edits them computes all digests anew."""
    copy = shutil.copytree(features, tmp_path / "f")
    top = DEAMFeatHandler(copy).top_layers
    name, state = next(iter(top["state"])), top["state"]
    edits = ({"state": {key: value for key, value in state.items() if key != name}},
             {"state": {**state, "more": state[name]}}, {"state": {**state, name: state[name][:1]}},
             {"layer": 9}, {"layer": -3}, {"params": {**top["params"], "encoder_embed_dim": 128}})
    for edit in edits:
        write_tensors(copy / "top_layers.pt", {**top, **edit})
        manifest = read_json(copy / "manifest.json", "")
        manifest["top_layers"] = state_digest(edit.get("state", state))
        write_json(copy / "manifest.json", {
            **manifest, "digest": manifest_digest(manifest)})
        fails(train, "--features", copy, "--run", tmp_path / "r", *QUICK)
    compared(len(edits), "edits")


@pytest.mark.parametrize("options, says", [
    (["--schedule", "constant", "--max-lr", "0.1"], "leave out --max-lr"),
    (["--weight-loss", "--lambda-var", "1"], "leave out --lambda-var"),
    (["--max-lr", "1e-6"], "is below --lr"), (["--finetune", "last99"], "has 12 layers"),
    (["--finetune", "last5"], "extract with --layer 7"), (["--batch-size", "41"], "--batch-size")])
def test_options_that_contradict_each_other(features, tmp_path, fails, options, says):
    assert says in fails(train, "--features", features, "--run", tmp_path / "r", *QUICK, *options)


RANGES = {  # of each option that decides a result: values that a user may give
    "--finetune": ["frozen", "last1", "last2", "all", "lastN"], "--epochs": [1, 20, 10**6],
    "--lr": [1e-5, 3e-5, 0.1, 1 / 3], "--max-lr": [0.5, 1, 10], "--step-size-up": [1, 10**9],
    "--schedule": ["triangular2", "cosine", "constant"], "--batch-size": [2, 32],
    "--micro-batch": [1, 4], "--frozen-dropout": [None],
    "--weight-decay": [0, 1e-4], "--lambda-corr": [0, 0.05, 1e6], "--lambda-var": [0, 0.05, 2.5],
    "--corr-target": ["true", "zero"], "--weight-loss": [None], "--grad-clip": [1e-3, 1e9],
    "--fold": [0, 9], "--seed": [0, 2**32 - 3], "--select": ["last", "best"],
    "--labels": ["shipped", "corrected"], "--precision": ["exact", "float32"], "--threads": [1, 8]}


def test_the_defaults_are_the_published_configuration(compared):
    """As DEAM's published system was trained: see README."""
    data = SimpleNamespace(digest="0" * 64, ids={"train": [2], "val": [3], "test": [4]})
    config = train.configuration(train.parser().parse_args([]), data,
                                 SimpleNamespace(device=torch.device("cpu")))
    assert config["options"] == {
        "finetune": "last1", "epochs": 20, "lr": 3e-5, "max_lr": 1e-3, "schedule": "triangular2",
        "step_size_up": 100, "batch_size": 32, "micro_batch": 4,
        "frozen_dropout": False, "weight_decay": 1e-4, "lambda_corr": 0.05, "lambda_var": 0.05,
        "corr_target": "true", "weight_loss": False, "grad_clip": 1.0, "fold": None, "seed": 0,
        "select": "last", "labels": "shipped", "precision": "exact", "threads": None}
    assert config["songs"] == {"train": 1, "val": 1, "test": 1}
    for device, precision, songs in (("cuda", "exact", 4), ("cuda", "float32", 16),
                                     ("cpu", "float32", 4)):
        args = train.parser().parse_args(["--precision", precision, "--batch-size", "16"])
        assert chosen_options(args, device)["micro_batch"] == songs
    compared(len(config["options"]) + 3, "options")


def test_splits_without_val_are_refused(splits, tmp_path, fails, compared):
    features = made_features(tmp_path / "f", {**few(splits), "val": []})
    assert "no song to validate on" in fails(train, "--features", features, *QUICK)
    compared(1, "refusals")


def test_options_are_read_back_as_they_were_written(compared):
    """Options → config.json → options → config.json is the identity; through JSON, for some
    hundred sets of options. Those that contradict each other are refused."""
    draw, count = random.Random(0), 0
    data = SimpleNamespace(digest="0" * 64, ids={"train": [2], "val": [3], "test": [4]})
    arithmetic = SimpleNamespace(device=torch.device("cpu"))
    parser = train.parser()
    for _ in range(400):
        chosen = draw.sample(sorted(RANGES), draw.randrange(len(RANGES)))
        words = [word for name in chosen for word in (name, draw.choice(RANGES[name]))]
        args = parser.parse_args([str(word) for word in words if word is not None])
        try:
            config = train.configuration(args, data, arithmetic)
        except UserError as error:
            assert "leave out" in str(error) or "below --lr" in str(error)
            continue
        read = train.parser().read(json.loads(json.dumps(config["options"])), "config.json")
        assert train.configuration(read, data, arithmetic) == config
        for name, value in config["options"].items():
            assert getattr(read, name) == value and type(getattr(read, name)) is type(value)
        count += 1
    assert {name[2:].replace("-", "_") for name in RANGES} == config["options"].keys() - {"device"}
    compared(count, "sets of options")


def test_edited_options_are_one_error(trained, compared):
    """Of another type or out of range, or no option: one line that begins with the file."""
    options, count = read_json(trained / "config.json", "")["config"]["options"], 0
    for name in options.keys() - {"finetune"}:  # any text, which layers_to_train reads
        for other in ("text", "", -1.5, [], {}, {"a": 1}, "--help", "nan", "inf", 1e300):
            with pytest.raises(UserError, match="^config.json holds options") as error:
                train.parser().read({**options, name: other}, "config.json")
            assert "\n" not in str(error.value), name
            count += 1
    for name in ("strange", "help", "-", ""):
        with pytest.raises(UserError, match="^config.json holds options"):
            train.parser().read({**options, name: 1}, "config.json")
    compared(count + 4, "edits")


def test_the_best_epoch_is_the_one_of_lowest_val_loss(splits, tmp_path, monkeypatch, no_histories,
                                                      compared):
    """Losses on val made up so that the second of four epochs is the best: its model is the
    result, and its predictions. Without --select best it is the last."""
    features, validate = made_features(tmp_path / "f", few(splits)), train.Training.validate
    drawn = []
    monkeypatch.setattr(figures, "draw_history", lambda *args: drawn.append(args[1:3]))
    for select, epoch in (("best", 2), ("last", 4)):
        losses, predictions = iter([0.5, 0.2, 0.4, 0.2, 9]), []

        def made_up(training):
            (_, *others), pred = validate(training)
            predictions.append(pred)
            return [next(losses), *others], pred

        monkeypatch.setattr(train.Training, "validate", made_up)
        run = tmp_path / select
        assert call(train, "--features", features, "--run", run, *QUICK, "--finetune", "frozen",
                    "--epochs", 4, "--select", select) == 0
        ends = [row[3] for row in records.read_digests(run)[-4:]]
        assert len(set(ends)) == 4
        digests = read_json(run / "config.json", "")["digests"]
        assert digests["model"] == ends[epoch - 1] == records.read_model(run / "model.pt")["digest"]
        assert torch.equal(predictions[-1], predictions[epoch - 1])
        six_decimals = (predictions[-1] * 1e6).round() / 1e6
        assert digests["val_predictions"] == files.tensor_digest(six_decimals)
        assert drawn.pop() == (epoch, 2)  # the result, and the lowest
    compared(2, "runs")


def test_a_diverged_run_is_one_error(splits, tmp_path, fails, compared):
    """NaN never becomes a result."""
    features = made_features(tmp_path / "f", few(splits))
    message = fails(train, "--features", features, "--run", tmp_path / "r", *QUICK, "--finetune",
                    "frozen", "--lambda-var", "1e6", "--schedule", "constant", "--lr", "10",
                    "--epochs", "60", "--grad-clip", "1e9")
    assert "the loss is not finite" in message
    assert not (tmp_path / "r/model.pt").exists()
    compared(1, "refusals")


@pytest.mark.parametrize("options", [["--seed", str(2**32)], ["--lr", "1e300"],
                                     ["--threads", "2e9"], ["--epochs", "0"], ["--run", ""],
                                     ["--max-lr", "nan"]])
def test_options_out_of_range(options, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parser().parse_args(options)
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")


# -------------------------------------------------------------------------------- damage


def edits(value, path=()):
    """(where, a copy of nested dicts with one key removed, retyped or NaN), for every key; of a
    state's tensors for the first two."""
    tensors = all(isinstance(inner, torch.Tensor) for inner in value.values())
    for key, inner in list(value.items())[:2 if tensors else None]:
        for change in ("text", -1.5, {}, float("nan"), "removed"):
            changed = {**value, key: change}
            if change == "removed":
                del changed[key]
            if isinstance(inner, torch.Tensor) or change != inner:
                yield (*path, key), changed
        if isinstance(inner, dict):
            for where, changed in edits(inner, (*path, key)):
                yield where, {**value, key: changed}


@pytest.mark.parametrize("file", ["model.pt", "last.pt", "config.json", "splits.json"])
def test_every_edited_file_of_a_run_is_one_error(features, trained, tmp_path, file, compared):
    """Each key removed or retyped, the digest made anew: one error, or nothing changed at all."""
    run = shutil.copytree(trained, tmp_path / "run")
    whole = load_tensors(run / file, "") if file.endswith(".pt") else read_json(run / file, "")
    expected, count = read_json(trained / "config.json", "")["digests"]["model"], 0
    whole.pop("digest", None)
    for where, changed in edits(whole):
        if file == "last.pt" and "optimizer" in where and len(where) > 1:
            continue
        try:
            (write_tensors if file.endswith(".pt") else write_json)(run / file, changed)
        except ValueError:  # JSON holds no NaN
            continue
        count += 1
        try:
            if file == "last.pt":
                assert records.read_checkpoint(run, whole["config"], True) is not None
            else:
                content, _ = records.read_run(run)
                assert content["digest"] == expected
        except UserError:
            pass
    compared(count, f"edits of {file}")


SCHEMAS = {"model.pt": "MODEL", "last.pt": "CHECKPOINT"}


@pytest.mark.parametrize("file", SCHEMAS)
def test_flipped_bits_are_noticed(trained, tmp_path, file, compared):
    whole, noticed = bytearray((trained / file).read_bytes()), 0
    schema, path = getattr(records, SCHEMAS[file]), tmp_path / file
    original = files.read_tensors(trained / file, "", schema)
    for place in range(0, len(whole), len(whole) // 60):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        try:
            same = files.read_tensors(path, "", schema)  # in what the zip does not need
            assert str(same) == str(original)
        except UserError:
            noticed += 1
    assert noticed > 40
    compared(61, f"flipped bits, {noticed} of them noticed")


def test_torchrun_is_refused(features, fails, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in fails(train, "--features", features)
