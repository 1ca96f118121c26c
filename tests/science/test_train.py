"""The model, the loss, the schedule, what a training run leaves behind, and what it refuses."""

import csv
import io
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torchaudio
from conftest import FLOAT32, QUICK, ROOT, call
from torch import nn

import common
import eval as eval_script
import train
from common import DEAMFeatHandler, EmotionModel, emotion_loss, quadrant_weights
from kit import deam, files, machine, records
from kit.cli import UserError
from kit.files import load_tensors, read_json, state_digest, write_json, write_tensors

BASE = {**torchaudio.pipelines.WAV2VEC2_BASE._params, "aux_num_out": None}


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures take most of a short run's time."""
    monkeypatch.setattr(train.figures, "draw_history", lambda *_: None)


def test_parameter_counts(compared):
    expected = {"last1": 8_008_450, "frozen": 919_042, "last2": 15_096_322, "all": 15_096_322}
    for finetune, trainable in expected.items():
        model = EmotionModel(BASE, 10, finetune)
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        assert sum(size for size, trains in sizes if trains) == trainable
        assert sum(size for size, _ in sizes) == 15_096_322
    compared(2 * len(expected), "counts")


@pytest.mark.parametrize("finetune, layers", [("frozen", []), ("last1", [1]), ("lastN", [0, 1])])
def test_each_mode_trains_what_it_names_and_nothing_else(features, tmp_path, undrawn, compared,
                                                         finetune, layers):
    run = tmp_path / "run"
    assert call(train, "--features", features, "--run", run, "--finetune", finetune, *QUICK) == 0
    top = DEAMFeatHandler(features).top_layers
    start = EmotionModel(top["params"], 10, finetune)
    end = load_tensors(run / "model.pt", "")["state"]
    start.start_from(top, 0)
    parts = ["valence.", "arousal.", *(["norm."] if layers else []),
             *(f"layers.{n}." for n in layers)]
    for name, before in start.state_dict().items():
        # the attention's key bias gets no gradient: softmax does not see it
        assert name.startswith(tuple(parts)) != torch.equal(before, end[name]) or (
            name.endswith("k_proj.bias")), name
    model = EmotionModel(top["params"], 8, "last1").train()
    assert [layer.training for layer in model.layers] == [False, False, False, True]
    compared(len(end), "tensors")


def test_another_head_trains_and_predicts(features, tmp_path, monkeypatch, undrawn, compared):
    """As README says: change `Head`, nothing else. Here it begins with a norm and is nested."""

    def head(dimension):
        return nn.Sequential(nn.LayerNorm(dimension), nn.Sequential(nn.Linear(dimension, 8),
                                                                    nn.GELU()), nn.Linear(8, 1))

    monkeypatch.setattr(common, "Head", head)
    run = tmp_path / "run"
    for finetune in ("frozen", "last1"):
        command = ["--features", features, "--finetune", finetune, *QUICK]
        assert call(train, *command, "--run", run / finetune) == 0
    assert call(eval_script, run / "last1", "--features", features) == 0
    monkeypatch.setattr(common, "Head", lambda _: nn.GRU(64, 1))
    with pytest.raises(NotImplementedError, match="say here how a GRU starts"):
        call(train, *command, "--run", run / "other")
    compared(3, "heads")


@pytest.mark.parametrize("recompute", [False, True])
def test_exact_training_is_the_same_kept_or_recomputed_on_any_threads(features, compared,
                                                                      recompute):
    """Two steps in exact arithmetic, dropout on; the frozen outputs kept or not."""
    digests = []
    for threads, keep in ((1, "cpu"), (2, None)):
        torch.set_num_threads(threads)
        arithmetic = machine.Arithmetic("exact", "cpu")
        args = train.parser().parse_args(["--features", str(features), "--batch-size", "4",
                                          "--micro-batch", "2"])
        data = train.open_data(args)
        training = train.Training(train.configuration(args, data, arithmetic), data, arithmetic)
        training.model.recompute = recompute
        training.train.dataset.keep = keep and torch.device(keep)
        steps = training.one_epoch()
        digests.append([(next(steps).item(), training.digest()) for _ in range(2)])
    torch.set_num_threads(2)
    assert digests[0] == digests[1]
    DIGESTS.append(digests[0])
    assert DIGESTS[0] == DIGESTS[-1]
    compared(4, "losses and states")


DIGESTS = []  # of the test above, over its parameters


# ------------------------------------------------------------------------------- loss and schedule


def numpy_loss(pred, true, corr_target, weights):
    """The formula, written a second time."""
    squared = ((pred - true) ** 2).mean(axis=1)
    target = np.corrcoef(true.T)[0, 1] if corr_target == "true" else 0.0
    corr = 0.05 * (np.corrcoef(pred.T)[0, 1] - target) ** 2
    if weights is not None:
        return float((weights * squared).mean() + corr)
    spread = sum((np.var(pred[:, d]) - 1) ** 2 for d in range(2))
    return float(squared.mean() + corr + 0.05 * spread)


@pytest.mark.parametrize("corr_target", ["true", "zero"])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradient(compared, corr_target, weighted):
    generator = np.random.default_rng(0)
    pred, true = generator.normal(size=(12, 2)), generator.normal(size=(12, 2)) + 0.2
    per_song = None
    if weighted:
        quadrants = [(v >= 0, a >= 0) for v, a in true]
        inverse = np.array([1 / quadrants.count(q) for q in quadrants])
        per_song = inverse / inverse.mean()
    x, y = torch.tensor(pred, requires_grad=True), torch.tensor(true)
    loss = emotion_loss(x, y, corr_target=corr_target,
                        weights=quadrant_weights(y) if weighted else None)
    loss.backward()
    rest = (true, corr_target, per_song)
    assert loss.item() == pytest.approx(numpy_loss(pred, *rest), rel=1e-12)
    for index in np.ndindex(pred.shape):
        step = np.zeros_like(pred)
        step[index] = 1e-6
        slope = (numpy_loss(pred + step, *rest) - numpy_loss(pred - step, *rest)) / 2e-6
        assert x.grad[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)
    compared(1 + pred.size, "values")


def test_constant_predictions_have_a_finite_gradient():
    x = torch.zeros(4, 2, requires_grad=True)
    emotion_loss(x, torch.randn(4, 2)).backward()
    assert x.grad.isfinite().all()


def test_the_schedules(compared):
    config = {"lr": 3e-5, "max_lr": 1e-3, "schedule": "triangular2", "step_size_up": 100}
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=3e-5)
    reference = torch.optim.lr_scheduler.CyclicLR(optimizer, 3e-5, 1e-3, step_size_up=100,
                                                  mode="triangular2", cycle_momentum=False)
    for step in range(860):
        rate = optimizer.param_groups[0]["lr"]
        assert train.learning_rate(step, 860, config) == pytest.approx(rate, rel=1e-9)
        optimizer.step()
        reference.step()
    cosine = [train.learning_rate(step, 50, {**config, "schedule": "cosine"}) for step in range(50)]
    assert cosine[0] == pytest.approx(1e-3) and cosine[-1] == pytest.approx(3e-5)
    assert cosine == sorted(cosine, reverse=True)
    assert train.learning_rate(7, 50, {**config, "schedule": "constant"}) == 3e-5
    assert train.learning_rate(5001, 9999, {**config, "step_size_up": 1}) == 3e-5  # 2^2500 is none
    compared(911, "rates")


# --------------------------------------------------------------------- data, runs, interruption


def test_label_statistics_and_loaders(features, splits, compared):
    data = DEAMFeatHandler(features, batch_size=16)
    assert [len(data.ids[name]) for name in ("train", "val", "test")] == [40, 10, 10]
    assert data.ids["test"] == splits["test"][:10]
    known = np.array([data.annotations[song][::2] for song in data.ids["train"] + data.ids["val"]])
    np.testing.assert_allclose(data.mean, known.mean(0))
    np.testing.assert_allclose(data.std, known.std(0))
    batches = list(data.train)  # the partial one is dropped
    assert [len(clips) for clips, _ in batches] == [16, 16] and batches[0][1].shape == (16, 2)
    assert not torch.equal(batches[0][1], data.datasets["train"].labels[:16])  # shuffled
    compared(len(known), "labels")


def test_what_a_run_leaves(trained, compared):
    names = {"config.json", "splits.json", "manifest.json", "digests.csv", "history.csv",
             "history.png", "history.pdf", "model.pt", "last.pt"}
    assert {path.name for path in trained.iterdir() if path.name[0] != "."} == names
    rows = list(csv.DictReader(open(trained / "history.csv")))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    digests = train.read_digests(trained)
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


@pytest.mark.parametrize("finetune, precision", [("last1", "float32"), ("frozen", "exact")])
def test_a_killed_run_resumes_to_the_undisturbed_one(features, tmp_path, undrawn, compared,
                                                     finetune, precision):
    base = ["--features", features, "--finetune", finetune, *QUICK, "--precision", precision,
            "--epochs", 5, "--select", "best"]
    call(train, *base, "--run", tmp_path / "a")
    killed = python("train.py", *base, "--run", tmp_path / "b")
    wait_for((tmp_path / "b/last.pt").exists, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    call(train, *base, "--run", tmp_path / "b", "--resume")
    shorter = [*base, "--run", tmp_path / "c", "--epochs", 3]
    call(train, *shorter)
    call(train, *shorter, "--resume", "--epochs", 5)  # more epochs
    results = [(read_json(tmp_path / name / "config.json", "")["digests"],
                *[(tmp_path / name / f"{file}.csv").read_text() for file in ("history", "digests")])
               for name in "abc"]
    assert results[0] == results[1] == results[2]
    compared(len(results), "runs: undisturbed, killed and resumed, prolonged")


def test_a_signal_is_one_line(features, tmp_path, compared):
    codes = {signal.SIGINT: 130, signal.SIGTERM: 143}
    processes = {number: python("train.py", "--features", features, "--run", tmp_path / str(code),
                                *QUICK, "--epochs", 500) for number, code in codes.items()}
    for number, process in processes.items():
        wait_for((tmp_path / str(codes[number]) / "last.pt").exists, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)
        assert process.returncode == codes[number] and "Traceback" not in output
        assert output.strip().splitlines()[-1].startswith("interrupted: rerun the same command")
    compared(len(codes), "signals")


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
    asked, weights = [], torchaudio.models.wav2vec2_base().state_dict()
    monkeypatch.setattr(common, "find_weights", lambda name: asked.append(name) or (
        BASE, weights, 16000, 1e-7, {"name": name}))
    command = ["--features", tmp_path / "f", "--run", tmp_path / "r", "--allow-missing",
               "--batch-size", 2, "--epochs", 1, *FLOAT32]
    assert call(train, *command) == 0
    output = capsys.readouterr().out
    assert set(asked) == {"ALM/wav2vec2-base-audioset"}
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
            **manifest, "digest": records.manifest_digest(manifest)})
        fails(train, "--features", copy, "--run", tmp_path / "r", *QUICK)
    compared(len(edits), "edits")


@pytest.mark.parametrize("options, says", [
    (["--schedule", "constant", "--max-lr", "0.1"], "leave out --max-lr"),
    (["--weight-loss", "--lambda-var", "1"], "leave out --lambda-var"),
    (["--finetune", "frozen", "--attention-dropout", "0.1"], "leave out --attention-dropout"),
    (["--max-lr", "1e-6"], "is below --lr"), (["--finetune", "last99"], "has 12 layers"),
    (["--finetune", "last5"], "extract with --layer 7"), (["--batch-size", "41"], "--batch-size")])
def test_options_that_contradict_each_other(features, tmp_path, fails, options, says):
    assert says in fails(train, "--features", features, "--run", tmp_path / "r", *QUICK, *options)


@pytest.mark.parametrize("options", [["--seed", str(2**32)], ["--lr", "1e300"],
                                     ["--threads", "2e9"], ["--epochs", "0"], ["--run", ""],
                                     ["--max-lr", "nan"]])
def test_options_out_of_range(options, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parser().parse_args(options)
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")


# -------------------------------------------------------------------------------- damage, verdicts


def edits(value, path=()):
    """(where, a copy of nested dicts with one key removed, retyped or NaN), for every key."""
    for key, inner in value.items():
        for change in ("text", -1.5, {}, float("nan"), "removed"):
            changed = {**value, key: change}
            if change == "removed":
                del changed[key]
            if isinstance(inner, torch.Tensor) or change != inner:
                yield (*path, key), changed
        if isinstance(inner, dict) and len(inner) < 40:
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
                state = train.to_resume(train.parser().parse_args(
                    ["--run", str(run), "--resume", "--epochs", "2"]), whole["config"])
                assert state is not None
            else:
                _, content, _ = eval_script.read_run(run)
                assert content["digest"] == expected
        except UserError:
            pass
    compared(count, f"edits of {file}")


@pytest.mark.parametrize("file", ["model.pt", "last.pt"])
def test_flipped_bits_are_noticed(trained, tmp_path, file, compared):
    whole, noticed = bytearray((trained / file).read_bytes()), 0
    form, path = (eval_script.MODEL if file == "model.pt" else train.CHECKPOINT), tmp_path / file
    original = files.read_tensors(trained / file, "", form)
    for place in range(0, len(whole), len(whole) // 60):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        try:
            same = files.read_tensors(path, "", form)  # in what the zip does not need
            assert str(same) == str(original)
        except UserError:
            noticed += 1
    assert noticed > 40
    compared(61, f"flipped bits, {noticed} of them noticed")


def test_a_verified_run(features, trained, tmp_path, compared, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    command = ["--verify", run, "--features", features, "--device", "cpu"]
    assert call(train, *command) == call(train, *command, "--steps", 1) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    table = (run / "digests.csv").read_text()
    rows = table.splitlines()
    for changed in (table.replace(rows[1].split(",")[2], "0.5"),
                    table.replace(rows[2][-5:], "00000"),
                    "\n".join([rows[0], *rows[2:]]) + "\n"):
        (run / "digests.csv").write_text(changed)
        assert call(train, *command, "--steps", 2) == 1
        assert "NOT REPRODUCED" in capsys.readouterr().out
    compared(3, "changed tables of digests")


def test_verifying_asks_for_the_songs_of_its_steps(features, trained, tmp_path, fails):
    few = shutil.copytree(features, tmp_path / "f", ignore=shutil.ignore_patterns("1*.pt"))
    message = fails(train, "--verify", trained, "--features", few, "--steps", 1, "--device", "cpu")
    assert "have no features" in message and "run its extract.py command with --songs" in message
    assert "--steps is for --verify" in fails(train, "--features", features, "--steps", 1)


def test_torchrun_is_refused(features, fails, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in fails(train, "--features", features)


def test_two_at_once(features, trained, tmp_path, fails):
    run = shutil.copytree(trained, tmp_path / "r", ignore=shutil.ignore_patterns(".*"))
    command = ["--features", features, "--run", run, *QUICK, "--epochs", 500, "--resume"]
    first = python("train.py", *command)
    wait_for((run / ".train.lock").exists, first)
    wait_for(lambda: b"process" in (run / ".train.lock").read_bytes(), first)
    assert f"process {first.pid}" in fails(train, *command)
    first.kill()
    first.communicate()
