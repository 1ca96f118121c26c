"""Shared by all tests: the scripts called in-process, the demo and what is made of it, and a tally of
comparisons."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cli

os.environ.update(cli.PINS)  # before torch is imported: for the tests of float32

import audit
import common
import eval as eval_script
import extract
import predict
import train

SCRIPTS = (extract, train, eval_script, predict, audit)
FLOAT32 = ["--precision", "float32", "--device", "cpu"]
QUICK = ["--batch-size", "20", "--epochs", "2", "--threads", "2", *FLOAT32]
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


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A folder with DEAM, backbone and splits.json. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("demo")
    subprocess.run([sys.executable, ROOT / "tests/demo.py", folder], check=True)
    return folder


def extraction(demo, features, *more):
    """The command line that extracts the demo's songs into `features`."""
    return ["--deam", demo / "DEAM", "--weights", demo / "backbone", "--splits",
            demo / "splits.json", "--features", features, "--device", "cpu", *more]


@pytest.fixture(scope="session")
def features(demo, tmp_path_factory):
    """The demo's features, in float32. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("features") / "DEAM_feats"
    assert call(extract, *extraction(demo, folder, "--precision", "float32")) == 0
    return folder


@pytest.fixture(scope="session")
def trained(features, tmp_path_factory):
    """A run of two epochs in float32. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("runs") / "last1"
    assert call(train, "--features", features, "--run", folder, *QUICK) == 0
    return folder


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
    """(folder with a space in its name, output): the kit's own files, in which tests/demo.sh ran as
    anyone runs it. demo/ in it is the demo in exact arithmetic. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("clone") / "a clone"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(
        ".*", "demo", "runs", "DEAM_feats", "__pycache__"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    surroundings = {key: value for key, value in os.environ.items() if key not in cli.PINS}
    done = subprocess.run(["bash", "tests/demo.sh"], cwd=folder, capture_output=True, text=True,
                          env={**surroundings, "PATH": path})
    return folder, done.stdout if done.returncode == 0 else done.stdout + done.stderr


@pytest.fixture(scope="session")
def splits():
    return common.read_splits(ROOT / "splits.json")
