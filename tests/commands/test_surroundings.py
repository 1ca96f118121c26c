"""What a shell, a notebook or a scheduler leaves in the environment does not end a run, or change
what it gives."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, call, few, made_features

import train
from kit import cli, figures
from kit.cli import Process, UserError, torchrun
from kit.files import write_file

COMMANDS = sorted(path.name for path in ROOT.glob("*.py") if path.name != "common.py")
DRAW = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np
from kit import figures
values = np.linspace([3, 4], [6, 5], 4)
figures.draw_song(np.arange(4.0), values, [0.5, 0.4], Path(sys.argv[2]), "song",
                  "5 $ \\\\frac $ _x")
"""
ODD = """text.usetex: True
font.family: No Such Font
font.size: 40
savefig.bbox: tight
savefig.format: svg
lines.linewidth: 99
figure.autolayout: True
axes.prop_cycle: garbage
backend: garbage
a line without colon
"""


def python(*arguments, **environment):
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, **environment}, timeout=60,
                          cwd=environment.get("PWD"))
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The pictures of DRAW, drawn without anything odd."""
    folder = tmp_path_factory.mktemp("pictures")
    code, _, error = python("-c", DRAW, ROOT, folder, MATPLOTLIBRC="")
    assert code == 0, error
    return folder


@pytest.mark.parametrize("backend", ["module://no_such_module.backend_inline", "nonsense"])
def test_pictures_whatever_matplotlib_is_told(pictures, tmp_path, compared, backend):
    (tmp_path / "matplotlibrc").write_text(ODD)
    code, _, error = python("-c", DRAW, ROOT, tmp_path, MPLBACKEND=backend, PWD=str(tmp_path))
    assert code == 0 and "Traceback" not in error
    assert (tmp_path / "song.png").read_bytes() == (pictures / "song.png").read_bytes()
    compared(1, "picture")


def test_a_picture_that_fails_costs_one_line(splits, tmp_path, monkeypatch, capsys, compared):
    """The model is on disk before anything is drawn, and the run ends as it would have."""
    features = made_features(tmp_path / "features", few(splits))

    def fail(*_):
        assert (tmp_path / "run/model.pt").exists()
        raise RuntimeError("latex was not able\nto process")

    monkeypatch.setattr(figures, "draw_history", fail)
    assert call(train, "--features", features, "--run", tmp_path / "run", "--finetune", "frozen",
                "--epochs", 1, "--precision", "float32", "--device", "cpu") == 0
    captured = capsys.readouterr()
    said = [line for line in captured.err.splitlines() if "not drawn" in line]
    assert len(said) == 1 and "(latex was not able to process)" in said[0]
    model = json.loads((tmp_path / "run/config.json").read_text())["digests"]["model"]
    assert model in captured.out
    compared(1, "digests of a model")


@pytest.mark.parametrize("options", [["-P"], ["-I"], []])
def test_each_command_finds_the_kit(tmp_path, compared, options):
    """From any folder, with Python's safe path, and beside other people's modules of our names;
    through a link too. One of them has to import everything before it can answer."""
    for name in ("kit", "common", "exact", "eval", "train", "extract", "utils"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger')")
    for command in COMMANDS:
        (tmp_path / f"link_{command}").symlink_to(ROOT / command)
        code, output, error = python(*options, tmp_path / f"link_{command}", "--help",
                                     PYTHONPATH=str(tmp_path), PWD=str(tmp_path))
        assert code == 0 and output.startswith("usage: "), error
    if not options:
        code, _, error = python(ROOT / "verify.py", "--features", "none", PYTHONPATH=str(tmp_path),
                                PWD=str(tmp_path))
        assert code == 2 and error.startswith("error: cannot read a manifest")
    compared(len(COMMANDS), "answers")


NOTEBOOK = """
import builtins, runpy, signal, sys
class Stream:
    def __init__(self): self.text = []
    def write(self, text): self.text.append(text)
    def flush(self): pass
    def isatty(self): return False
    def fileno(self): raise OSError("no file")
terminal, sys.stdout, sys.stderr = sys.stdout, Stream(), Stream()
builtins.__IPYTHON__ = True
handler = signal.getsignal(signal.SIGINT)
try:
    runpy.run_path(sys.argv.pop(1), run_name="__main__")
except SystemExit as end:
    assert signal.getsignal(signal.SIGINT) is handler
    print(end.code, "".join(sys.stdout.text + sys.stderr.text), file=terminal)
"""


def test_run_in_a_notebook(tmp_path, compared):
    """Its streams are no files, and Ctrl-C stays the notebook's, which would end otherwise."""
    predict = ROOT / "predict.py"
    sys_argv = ("import sys; sys.argv = ['', *sys.argv[1:]]\n" + NOTEBOOK)
    code, output, error = python("-c", sys_argv, predict, "--help")
    assert code == 0 and output.startswith("0 usage: "), error
    code, output, error = python("-c", sys_argv, predict, tmp_path / "run", "song.mp3")
    assert code == 0 and output.startswith("2 error: "), error
    compared(2, "runs")


@pytest.mark.parametrize("environment, expected", [
    ({}, Process()), ({"RANK": ""}, Process()), ({"RANK": "5"}, Process()),
    ({"RANK": "5", "WORLD_SIZE": ""}, Process()), ({"WORLD_SIZE": "abc"}, Process()),
    ({"RANK": "", "WORLD_SIZE": " ", "LOCAL_RANK": "3"}, Process()),
    ({"LOCAL_RANK": "3"}, Process()), ({"RANK": "0", "WORLD_SIZE": "1"}, Process()),
    ({"RANK": "5", "WORLD_SIZE": "8"}, Process(5, 8)),
    ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
     Process(5, 8, 1, 4)),
    *(({"RANK": rank, "WORLD_SIZE": count}, None) for rank, count in (
        ("8", "8"), ("-1", "8"), ("0", "0"), ("0", "abc"), ("abc", "8"), ("0.0", "1"))),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, None),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"}, None)])
def test_torchruns_numbers(monkeypatch, compared, environment, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if expected:
        assert torchrun() == expected
    else:
        with pytest.raises(UserError, match="is not what torchrun sets"):
            torchrun()
    compared(1, "environments")


def test_a_leftover_rank_is_no_part_of_a_files_name(tmp_path, monkeypatch, compared):
    monkeypatch.setenv("RANK", "a/b")
    write_file(tmp_path / "x", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    compared(1, "files")


def test_streams_of_other_kinds(monkeypatch, compared):
    """In a notebook, or where another program reads what is printed."""
    class Stream:
        write = flush = lambda *_: None

    monkeypatch.setattr(sys, "stdout", Stream())
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    assert vars(cli.start(cli.Parser("x"), "")) == {}
    compared(1, "command lines")
