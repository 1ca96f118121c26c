"""Shared by all tests: the scripts called in-process, the demo and what is made of it, and a tally
of comparisons."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from kit import cli, deam, features as features_kit, figures, files, network

os.environ.update(cli.PINS)  # before torch is imported: for the tests of float32
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the demo runs beside; small work waits for threads
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch

import audit
import demo as demo_script
import eval as eval_script
import extract
import predict
import train
import verify

SCRIPTS = (extract, train, eval_script, verify, predict, audit)
FLOAT32 = ["--precision", "float32", "--device", "cpu"]
QUICK = ["--batch-size", "20", "--epochs", "2", "--threads", "1", *FLOAT32]
DRAW_HISTORY = figures.draw_history
tally = []


@pytest.fixture
def compared(request):
    """compared(n, what): say how much a test compared; nothing compared is a failure."""

    def note(count, what):
        assert count > 0, f"compared no {what}"
        tally.append(f"{request.node.name}: {count} {what}")

    return note


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("compared")
    for line in tally:
        terminalreporter.write_line(line)


def call(script, *arguments):
    """Run a script's run() with a command line; its return value."""
    return script.run(script.parser().parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def fails(capsys):
    """fails(script, *arguments): run it as its command does; assert one `error: …` line and exit
    code 2; the line."""

    def attempt(script, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.execute(script.run, script.parser().parse_args([str(each) for each in arguments]))
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return attempt


@pytest.fixture(scope="session", autouse=True)
def unsynced():
    """Tests need not wait until the disk has what is written: they read it again at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A folder with DEAM, backbone and splits.json. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["demo.py", str(folder)])
        demo_script.main()
    return folder


def extraction(demo, features, *more):
    """The command line that extracts the demo's songs into `features`."""
    return ["--deam", demo / "DEAM", "--weights", demo / "backbone", "--splits",
            demo / "splits.json", "--features", features, "--device", "cpu", *more]


def made_features(folder, splits, noise=1.0, layer=12):
    """Write a features folder without audio: of each song of the splits 4 frames of 64 channels
    from which its labels follow but for noise; of the demo's architecture, with random layers above
    `layer`. As in DEAM, valence and arousal are exchanged for ids up to 1000."""
    generator, songs, labels = np.random.default_rng(0), {}, {}
    (folder / "songs").mkdir(parents=True)
    for song in deam.songs_of(splits):
        both = generator.normal(0, 0.7)
        truth = (5 + generator.normal(both, 1, 2)).clip(1, 9).round(1)
        clip = generator.normal(0, 2, (4, 64)) + np.repeat(truth - 5, 32)
        clip = torch.from_numpy((clip + generator.normal(0, noise, 64)).astype(np.float32))
        torch.save(clip, folder / f"songs/{song}.pt")
        digest = files.tensor_digest(clip)
        songs[str(song)] = {"pcm": digest, "features": digest, "frames": len(clip)}
        valence, arousal = truth[::-1] if song <= 1000 else truth
        labels[song] = valence, round(1.2 + generator.random(), 2), arousal, 1.5
    table = features_kit.labels_table(labels)
    state = {}
    for name, value in network.state_above(network.network(demo_script.PARAMS), layer).items():
        drawn = generator.uniform(-0.2, 0.2, value.shape) if value.ndim > 1 else np.full(
            value.shape, name.endswith("weight"))
        state[name] = torch.from_numpy(drawn.astype(np.float32))
    manifest = {"settings": {"weights": "0" * 64, "layer": layer, "precision": "float32",
                             "store": "float32", "sample_rate": 16000, "normalize_epsilon": None},
                "annotations": files.sha256(table.encode()), "source": {"name": "made"},
                "params": json.loads(json.dumps(demo_script.PARAMS)),
                "top_layers": files.state_digest(state), "swapped_labels": [[1, 1000]],
                "songs": songs}
    manifest["digest"] = features_kit.manifest_digest(manifest)
    files.write_file(folder / "annotations.csv", table)
    files.write_json(folder / "splits.json", splits)
    files.write_json(folder / "manifest.json", manifest)
    files.write_tensors(folder / "top_layers.pt", {"params": demo_script.PARAMS,
                                                   "layer": layer, "state": state})
    return folder


@pytest.fixture(scope="module")
def no_histories():
    """Without pictures of training: they take most of a short run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw_history", lambda *_: None)
        yield


def few(splits):
    """The demo's 60 songs."""
    return {"source": "a few made songs", **{name: splits[name][:count] for name, count
                                             in demo_script.SONGS.items()}}


@pytest.fixture(scope="session")
def features(demo, tmp_path_factory):
    """The demo's features, in float32. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("features") / "DEAM_feats"
    assert call(extract, *extraction(demo, folder, "--precision", "float32")) == 0
    return folder


@pytest.fixture(scope="session")
def made(splits, tmp_path_factory):
    """Made features of layer 10 of the demo's 60 songs: a step on them takes a hundredth of a
    second. Not to be changed by a test."""
    return made_features(tmp_path_factory.mktemp("made") / "DEAM_feats", few(splits), layer=10)


@pytest.fixture(scope="session")
def ids(demo):
    """The ids of the demo's songs, ascending."""
    return sorted(deam.songs_of(deam.read_splits(demo / "splits.json")))


@pytest.fixture
def own(features, tmp_path):
    """A copy of the demo's features."""
    return shutil.copytree(features, tmp_path / "DEAM_feats")


@pytest.fixture(scope="session")
def trained(features, tmp_path_factory):
    """A run of two epochs in float32. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("runs") / "last1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw_history", DRAW_HISTORY)
        assert call(train, "--features", features, "--run", folder, *QUICK) == 0
    return folder


@pytest.fixture(scope="session", autouse=True)
def started(request, tmp_path_factory):
    """For `clone`: tests/demo.sh on one core, started before the first test, since it takes as long
    as a third of all others. (folder, process), or None where no test of this session needs it."""
    if not any("clone" in item.fixturenames for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("clone") / "a clone"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(
        ".*", "demo", "runs", "DEAM_feats", "__pycache__"))
    surroundings = {key: value for key, value in os.environ.items() if key not in cli.PINS}
    surroundings |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                     "OMP_NUM_THREADS": "1"}
    with open(folder.parent / "output", "w") as output, subprocess.Popen(
            ["bash", "tests/demo.sh"], cwd=folder, stdout=output, stderr=output,
            env=surroundings) as process:
        yield folder, process
        process.kill()


@pytest.fixture(scope="session")
def clone(started):
    """(folder with a space in its name, output): the kit's own files, in which tests/demo.sh ran as
    anyone runs it. demo/ in it is the demo in exact arithmetic. Not to be changed by a test."""
    folder, process = started
    process.wait()
    return folder, (folder.parent / "output").read_text()


@pytest.fixture(scope="session")
def splits():
    return deam.read_splits(ROOT / "splits.json")
