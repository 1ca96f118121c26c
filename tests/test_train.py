"""The model, the loss, the schedule, and what a training run leaves behind."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torchaudio
from conftest import CANONICAL, QUICK, ROOT, call

import common
import extract
import train
from common import (Backbone, DEAMFeatHandler, EmotionModel, FrozenOutputs, emotion_loss, quadrant_weights, read_json,
                    read_tensors, state_digest, where_to_keep)


def count(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())


def test_parameter_counts(compared):
    expected = {"last1": 8_008_450, "frozen": 919_042, "last2": 15_096_322, "all": 15_096_322, "lastN": 15_096_322}
    for finetune, trainable in expected.items():
        assert count(EmotionModel("WAV2VEC2_BASE", 10, finetune)) == (trainable, 15_096_322), finetune
    compared(2 * len(expected), "counts")


@pytest.mark.parametrize("finetune, layers", [("frozen", []), ("last1", [1]), ("last2", [0, 1]), ("lastN", [0, 1]), ("all", [0, 1])])
def test_each_mode_trains_what_it_names_and_nothing_else(demo, tmp_path, compared, finetune, layers):
    assert call(train, "--features", demo / "DEAM_feats", "--run", tmp_path / "run", "--finetune", finetune, *QUICK) == 0
    start = EmotionModel("DEMO", 10, finetune)
    start.start_from(Backbone("DEMO"), seed=0)
    end, changed = read_tensors(tmp_path / "run/model.pt", "")["state"], 0
    for name, before in start.state_dict().items():
        named = name.startswith(("valence.", "arousal.")) or layers and name.startswith("norm.") or name.startswith(tuple(f"layers.{n}." for n in layers))
        # the attention's key bias gets no gradient: softmax does not see it; AdamW decays what is not zero
        assert bool(named) != torch.equal(before.double(), end[name]) or name.endswith("k_proj.bias"), name
        changed += bool(named)
    assert {name for name, p in start.named_parameters() if p.requires_grad} == {
        name for name in end if name.startswith(("valence.", "arousal.", *(["norm."] if layers else []), *(f"layers.{n}." for n in layers)))}
    compared(len(end), f"tensors, {changed} of them trained")


def test_frozen_layers_stay_in_eval_mode():
    model = EmotionModel("DEMO", 8, "last1").train()
    assert [layer.training for layer in model.layers] == [False, False, False, True]
    assert [layer.dropout.training for layer in model.layers] == [False, False, False, True]
    model = EmotionModel("DEMO", 10, "frozen").train()
    assert not any(module.training for module in (*model.layers, model.norm)) and model.valence[2].training


def test_layers_that_the_features_do_not_allow(demo, tmp_path, fails, compared):
    base = ["--features", demo / "DEAM_feats", "--run", tmp_path / "r", *QUICK]
    assert "extract with --layer 9" in fails(train, *base, "--finetune", "last3")
    for wrong in ("last0", "last", "top1", "frozen2"):
        assert "choose frozen, last1" in fails(train, *base, "--finetune", wrong)
    compared(5, "refusals")


def test_layer_11_features_give_last1_the_same(demo, tmp_path, compared):
    """Features of layer 11 skip the frozen layer: the same predictions to the precision stored."""
    model = EmotionModel("DEMO", 10, "last1").double()
    model.start_from(Backbone("DEMO"), 0)
    shorter = EmotionModel("DEMO", 11, "last1").double()
    shorter.start_from(Backbone("DEMO"), 0)
    songs = sorted(int(path.stem) for path in (demo / "DEAM_feats/songs").glob("*.pt"))[:5]
    call(extract, "--deam", demo / "DEAM_demo", "--bundle", "DEMO", "--features", tmp_path / "f", "--layer", 11, "--songs", *songs, "--device", "cpu", *CANONICAL)
    ten, eleven = ([read_tensors(folder / "songs" / f"{song}.pt", "") for song in songs] for folder in (demo / "DEAM_feats", tmp_path / "f"))
    with torch.no_grad():
        predictions = [m.eval()([m.frozen(clip) for clip in clips]) for m, clips in ((model, ten), (shorter, eleven))]
    assert (predictions[0] - predictions[1]).abs().max() < 2e-3
    compared(len(songs), "songs")


def test_pooling_sees_one_clip_only(compared):
    """Clips of different lengths in one batch: each pooled vector is, bit for bit, what it is alone, and the mean over
    the clip's own frames."""
    model = EmotionModel("DEMO", 10, "last1").eval()
    generator = torch.Generator().manual_seed(0)
    clips = [torch.randn(length, 64, generator=generator) for length in (5, 50, 5, 299, 50, 1)]
    for finetune in ("frozen", "last1", "last2"):  # the same arithmetic, wherever the frozen part ends
        other = EmotionModel("DEMO", 10, finetune).eval()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(other.pool_clips([other.frozen(clip) for clip in clips], 1), model.pool_clips([model.frozen(clip) for clip in clips], 1))
    clips = [model.frozen(clip) for clip in clips]
    with torch.no_grad():
        pooled = model.pool_clips(clips, 1)
        assert torch.equal(pooled, torch.cat([model.pool_clips([clip], 1) for clip in clips]))
        assert torch.equal(pooled.flip(0), model.pool_clips(clips[::-1], 1))
        assert torch.allclose(pooled, model.pool_clips(clips, 4), atol=1e-5)
        for clip, row in zip(clips, pooled):
            states = model.norm(model.layers[1](clip[None])[0])[0]
            np.testing.assert_allclose(row, states.double().numpy().mean(0), atol=1e-5)
    compared(len(clips), "clips")


def test_micro_batches_give_the_gradient_of_the_whole_batch(compared):
    generator = torch.Generator().manual_seed(0)
    clips = [torch.randn(length, 64, generator=generator) for length in (20, 30, 20, 20, 30, 7)]
    true = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    gradients = []
    for micro_batch in (1, 2, 6):
        torch.manual_seed(0)
        model = EmotionModel("DEMO", 10, "last1").double()
        model.start_from(Backbone("DEMO"), 0)
        model.train()
        for module in model.modules():  # no dropout: its draws would differ
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "num_heads"):
                module.dropout = 0.0
        emotion_loss(model(clips, micro_batch), true).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() < 1e-10 * gradients[0].norm()
    compared(len(gradients[0]), "partial derivatives, three ways")


@pytest.mark.parametrize("finetune", ["last1", "last2", "frozen"])
def test_where_frozen_outputs_are_kept_changes_no_bit(demo, compared, finetune):
    """Kept or computed at each use, one by one or a batch at a time; layers that all train see the stored features."""
    data = DEAMFeatHandler(demo / "DEAM_feats", ROOT / "splits.json")
    model, autocast = EmotionModel("DEMO", 10, finetune), common.arithmetic("float32", torch.device("cpu"))[1]
    ways = [FrozenOutputs(data.datasets["val"], model, autocast, keep) for keep in (torch.device("cpu"), None)]
    first = [states for states, _ in ways[0].__getitems__([3, 1, 4])]
    for way in ways:
        again = [*way.__getitems__([1]), *way.__getitems__([4, 3])]
        assert all(torch.equal(states, first[place]) for (states, _), place in zip(again, (1, 2, 0)))
        assert [label.tolist() for _, label in again] == data.datasets["val"].labels[[1, 4, 3]].tolist()
    assert len(ways[0].kept) == 3 and not ways[1].kept
    assert first[0].dtype == (torch.float16 if finetune == "last2" else torch.float32)
    compared(3, "clips, two ways")


def test_where_there_is_room(monkeypatch, compared):
    """1569 clips of 2250 frames: 10.8 GB in float32; half of them if they stay the float16 features."""
    cpu, model, gigabytes = torch.device("cpu"), EmotionModel("WAV2VEC2_BASE", 10, "last1"), 0
    monkeypatch.setattr(os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else gigabytes * 10**9 // 4096)
    for trains, gigabytes, expected in (("last1", 24, cpu), ("last1", 20, None), ("last2", 12, cpu), ("last2", 10, None), ("frozen", 1, cpu)):
        model = EmotionModel("WAV2VEC2_BASE", 10, trains)
        assert where_to_keep(1569, 2250, model, torch.float16, cpu) == expected, (trains, gigabytes)
    compared(5, "machines")


def test_attention_dropout(demo, tmp_path, fails, compared):
    dropouts = [[layer.attention.dropout for layer in EmotionModel("WAV2VEC2_BASE", 10, "last1", p).layers] for p in (None, 0.0)]
    assert dropouts == [[0.1, 0.1], [0.0, 0.0]]
    base = ["--features", demo / "DEAM_feats", *QUICK]
    digests = []
    for name, flags in (("a", []), ("b", ["--attention-dropout", 0.1]), ("c", ["--attention-dropout", 0])):
        assert call(train, *base, "--run", tmp_path / name, *flags) == 0
        digests.append(read_json(tmp_path / name / "config.json", "")["digests"]["model"])
    assert digests[0] == digests[1] != digests[2]
    assert "attention_dropout 0.1 there, None now" in fails(train, *base, "--run", tmp_path / "b", "--resume")
    assert "must be below 1" in fails(train, *base, "--run", tmp_path / "d", "--attention-dropout", 1)
    compared(3, "runs")


# ------------------------------------------------------------------------------------- loss and schedule


def numpy_loss(pred, true, corr_target, weights):
    """The formula, written a second time."""
    squared = ((pred - true) ** 2).mean(axis=1)
    target = np.corrcoef(true.T)[0, 1] if corr_target == "true" else 0.0
    corr = 0.05 * (np.corrcoef(pred.T)[0, 1] - target) ** 2
    if weights is not None:
        return float((weights * squared).mean() + corr)
    return float(squared.mean() + corr + 0.05 * sum((np.var(pred[:, d]) - 1) ** 2 for d in range(2)))


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
    x = torch.tensor(pred, requires_grad=True)
    loss = emotion_loss(x, torch.tensor(true), corr_target=corr_target, weights=quadrant_weights(torch.tensor(true)) if weighted else None)
    loss.backward()
    assert loss.item() == pytest.approx(numpy_loss(pred, true, corr_target, per_song), rel=1e-12)
    for index in np.ndindex(pred.shape):
        step = np.zeros_like(pred)
        step[index] = 1e-6
        slope = (numpy_loss(pred + step, true, corr_target, per_song) - numpy_loss(pred - step, true, corr_target, per_song)) / 2e-6
        assert x.grad[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)
    compared(1 + pred.size, "values")


def test_constant_predictions_have_a_finite_gradient():
    x = torch.zeros(4, 2, requires_grad=True)
    emotion_loss(x, torch.randn(4, 2)).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("schedule", ["triangular", "triangular2"])
def test_the_schedule_is_torchs_cyclic_one(compared, schedule):
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=3e-5)
    reference = torch.optim.lr_scheduler.CyclicLR(optimizer, 3e-5, 1e-3, step_size_up=100, mode=schedule, cycle_momentum=False)
    for step in range(860):
        assert train.learning_rate(step, 860, 3e-5, 1e-3, schedule, 100) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        reference.step()
    assert train.learning_rate(100, 860, 3e-5, 1e-3, schedule, 100) == pytest.approx(1e-3)
    compared(860, "steps")


def test_the_other_schedules():
    assert {train.learning_rate(step, 50, 1e-4, 1e-2, "constant", 9) for step in range(50)} == {1e-4}
    cosine = [train.learning_rate(step, 50, 1e-4, 1e-2, "cosine", 9) for step in range(50)]
    assert cosine[0] == pytest.approx(1e-2) and cosine[-1] == pytest.approx(1e-4) and cosine == sorted(cosine, reverse=True)


# -------------------------------------------------------------------------------- data, runs, interruption


def test_label_statistics_and_loaders(demo, splits, compared):
    data = DEAMFeatHandler(demo / "DEAM_feats", ROOT / "splits.json", batch_size=16)
    assert [len(data.ids[name]) for name in ("train", "val", "test")] == [40, 10, 10] and data.ids["test"] == splits["test"][:10]
    rows = list(csv.DictReader(open(demo / "DEAM_feats/annotations.csv")))
    assert list(rows[0]) == common.COLUMNS
    labels = {int(row["song_id"]): (float(row["valence_mean"]), float(row["arousal_mean"])) for row in rows}
    known = np.array([labels[song] for song in data.ids["train"] + data.ids["val"]])
    np.testing.assert_allclose(data.mean, known.mean(0))
    np.testing.assert_allclose(data.std, known.std(0))
    batches = list(data.train)
    assert [len(clips) for clips, _ in batches] == [16, 16] and batches[0][1].shape == (16, 2)  # the partial one is dropped
    seen = torch.cat([labels for _, labels in data.test])
    assert seen.tolist() == [list(labels[song]) for song in data.ids["test"]]
    assert not torch.equal(batches[0][1], data.datasets["train"].labels[:16])  # shuffled
    compared(len(rows), "labels")


def test_what_a_run_leaves(trained, compared):
    names = {"config.json", "history.csv", "history.png", "model.pt", "last.pt"}
    assert {path.name for path in trained.iterdir()} == names
    rows = list(csv.DictReader(open(trained / "history.csv")))
    assert [row["epoch"] for row in rows] == ["1", "2"] and all(np.isfinite(float(value)) for row in rows for value in row.values())
    config = read_json(trained / "config.json", "")
    assert config["digests"]["model"] == state_digest(read_tensors(trained / "model.pt", "")["state"])
    compared(len(names), "files")


def python(script, *arguments, **settings):
    return subprocess.Popen([sys.executable, ROOT / script, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **settings)


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.01)


@pytest.mark.parametrize("mode", ["last1", "frozen"])
def test_two_runs_are_equal_and_a_killed_one_resumes_to_the_same(demo, tmp_path, compared, mode):
    base = ["--features", demo / "DEAM_feats", "--finetune", mode, *QUICK, "--precision", "float32", "--epochs", 5, "--select", "best"]
    undisturbed = python("train.py", *base, "--run", tmp_path / "a")
    assert undisturbed.wait(60) == 0, undisturbed.communicate()[0]
    killed = python("train.py", *base, "--run", tmp_path / "b")
    wait_for((tmp_path / "b/last.pt").exists, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "b/model.pt").exists()
    assert call(train, *base, "--run", tmp_path / "b", "--resume") == 0
    assert call(train, *base, "--run", tmp_path / "c") == 0
    assert call(train, *base, "--run", tmp_path / "c", "--resume") == 0  # a finished run stays what it is
    results = [(read_json(tmp_path / name / "config.json", "")["digests"], (tmp_path / name / "history.csv").read_text()) for name in "abc"]
    assert results[0] == results[1] == results[2]
    compared(len(results), "runs: undisturbed, killed and resumed, in another process")


def test_a_killed_extraction_resumes_to_the_same(demo, tmp_path, compared):
    shutil.copytree(demo / "DEAM_demo", tmp_path / "DEAM_demo")
    command = ["--deam", "demo", "--features", tmp_path / "f", "--device", "cpu", *CANONICAL]
    killed = python("extract.py", *command)
    manifest = tmp_path / "f/manifest.json"
    wait_for(lambda: manifest.exists() and len(read_json(manifest, "")["songs"]) > 2, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = len(read_json(manifest, "")["songs"])
    assert 2 < done < 60
    first = min((tmp_path / "f/songs").glob("*.pt"), key=lambda path: path.stat().st_mtime_ns)
    before = first.stat().st_mtime_ns
    assert call(extract, *command) == 0
    assert first.stat().st_mtime_ns == before  # vouched for: not computed again
    assert read_json(manifest, "")["digest"] == read_json(demo / "DEAM_feats/manifest.json", "")["digest"]
    compared(60, f"songs, {done} of them before the kill")


@pytest.mark.parametrize("script, hint", [("train.py", "the same command with --resume"), ("extract.py", "the same command goes on")])
def test_ctrl_c_says_how_to_go_on(demo, tmp_path, script, hint):
    if script == "train.py":
        process = python(script, "--features", demo / "DEAM_feats", "--run", tmp_path / "r", *QUICK, "--epochs", 500)
        wait_for((tmp_path / "r/last.pt").exists, process)
    else:
        process = python(script, "--deam", demo / "DEAM_demo", "--bundle", "DEMO", "--features", tmp_path / "f", "--device", "cpu", *CANONICAL)
        wait_for(lambda: len(list((tmp_path / "f/songs").glob("*.pt"))) > 2, process)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and time.monotonic() - start < 5
    assert output.strip().splitlines()[-1].startswith(f"interrupted: {hint}") and "Traceback" not in output


def test_a_run_is_not_overwritten_or_mixed(demo, trained, tmp_path, fails):
    shutil.copytree(trained, tmp_path / "r")
    base = ["--features", demo / "DEAM_feats", "--run", tmp_path / "r", *QUICK]
    assert "--resume" in fails(train, *base)
    assert "lr 3e-05 there, 0.0001 now" in fails(train, *base, "--resume", "--lr", "1e-4")
    (tmp_path / "r/last.pt").write_text("no")
    assert "not a training state" in fails(train, *base, "--resume")


def test_a_notebooks_folder_without_manifest_trains(demo, tmp_path, capsys, compared):
    """annotations.csv and songs/<id>.pt of WAV2VEC2_BASE layer 10, nothing else."""
    (tmp_path / "f/songs").mkdir(parents=True)
    shutil.copy(ROOT / "splits.json", tmp_path)
    splits = common.read_splits(ROOT / "splits.json")
    ids = splits["train"][:4] + splits["val"][:2] + splits["test"][:2]
    everything = sum(splits.values(), [])
    (tmp_path / "f/annotations.csv").write_text("song_id,valence_mean,valence_std,arousal_mean,arousal_std\n"
                                                + "".join(f"{song},{3 + song % 5},1,{4 + song % 3},1\n" for song in everything))
    for song in ids:
        torch.save(torch.randn(9, 768), tmp_path / "f/songs" / f"{song}.pt")
    torch.save(torchaudio.models.wav2vec2_base().state_dict(), tmp_path / "w.pt")
    assert call(train, "--features", tmp_path / "f", "--weights", tmp_path / "w.pt", "--run", tmp_path / "r", "--allow-missing", "--batch-size", 2,
                "--epochs", 1, "--device", "cpu") == 0
    output = capsys.readouterr().out
    assert "nothing vouches" in output and "4 of 1395 train, 2 of 174 val, 2 of 175 test" in output and "8,008,450 trainable of 15,096,322" in output
    compared(len(ids), "songs without a manifest")


def test_features_and_weights_that_do_not_belong(demo, tmp_path, fails, compared):
    run = ["--run", tmp_path / "r", *QUICK]
    assert "run extract.py" in fails(train, "--features", tmp_path / "none", *run)
    feats = shutil.copytree(demo / "DEAM_feats", tmp_path / "f")
    torch.save({name: value + 1 for name, value in common.demo_weights().items()}, tmp_path / "w.pt")
    assert "made by other weights" in fails(train, "--features", feats, "--weights", tmp_path / "w.pt", *run)
    song = feats / "songs" / f"{DEAMFeatHandler(feats, ROOT / 'splits.json').ids['train'][0]}.pt"
    whole = song.read_bytes()
    for damage, says in ((b"", "is not a feature file"), (whole[:-200], "is not a feature file")):
        song.write_bytes(damage)
        assert says in fails(train, "--features", feats, *run)
    torch.save(torch.load(io_of(whole), weights_only=True) * 1.001, song)
    assert f"{song} is damaged" in fails(train, "--features", feats, *run)
    torch.save(torch.zeros(5), song)
    assert "not a tensor [T, 64]" in fails(train, "--features", feats, *run)
    song.unlink()
    assert "1 of 60 songs have no features" in fails(train, "--features", feats, *run)
    song.write_bytes(whole)
    (feats / "annotations.csv").write_text((feats / "annotations.csv").read_text().replace(",1.", ",2.", 1))
    assert "annotations.csv is not the file" in fails(train, "--features", feats, *run)
    shutil.copy(demo / "DEAM_feats/annotations.csv", feats)
    (feats / "manifest.json").write_text((feats / "manifest.json").read_text().replace('"layer": 10', '"layer": 11'))
    assert "does not match its own digest" in fails(train, "--features", feats, *run)
    assert not list((tmp_path / "r").glob("*.pt")) and "no full batch" in fails(train, "--features", demo / "DEAM_feats", *run, "--batch-size", 41)
    compared(10, "refusals")


def io_of(data):
    import io

    return io.BytesIO(data)


def test_a_full_disk_or_a_forbidden_folder_is_one_line(demo, tmp_path, fails, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    assert "cannot write" in fails(train, "--features", demo / "DEAM_feats", "--run", tmp_path / "file/run", *QUICK)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = fails(train, "--features", demo / "DEAM_feats", "--run", tmp_path / "r", *QUICK)
    assert f"no space left in {tmp_path / 'r'}" in message and "MB more" in message
    assert not list((tmp_path / "r").iterdir())


def test_bfloat16_stays_where_it_is_asked_for(demo, tmp_path, compared):
    """Autocast is off again after a run, and a resumed bfloat16 run equals an undisturbed one."""
    base = ["--features", demo / "DEAM_feats", *QUICK, "--precision", "bfloat16", "--epochs", 3]
    assert call(train, *base, "--run", tmp_path / "a") == 0
    assert not torch.is_autocast_enabled("cpu")
    stopped = python("train.py", *base, "--run", tmp_path / "b")
    wait_for((tmp_path / "b/last.pt").exists, stopped)
    stopped.send_signal(signal.SIGKILL)
    stopped.wait()
    assert call(train, *base, "--run", tmp_path / "b", "--resume") == 0
    digests = [read_json(tmp_path / name / "config.json", "")["digests"] for name in "ab"]
    assert digests[0] == digests[1]
    compared(len(digests[0]), "digests")
