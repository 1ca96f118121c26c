"""Shared by all tests: the scripts called in-process, one extraction of the demo corpus, and a tally of comparisons."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common
import eval as eval_script
import extract
import train

CANONICAL = ["--precision", "float64", "--store", "float16"]
QUICK = ["--batch-size", "20", "--micro-batch", "20", "--epochs", "2", "--precision", "float64", "--threads", "2", "--device", "cpu"]
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
def fails(monkeypatch, capsys):
    """fails(script, *arguments): run it as main() does; assert one `error: …` line and exit code 2; the line."""

    def attempt(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            script.main()
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return attempt


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A folder with DEAM_demo and its canonical DEAM_feats. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("demo")
    assert call(extract, "--deam", "demo", "--features", folder / "DEAM_feats", "--device", "cpu", *CANONICAL) == 0
    return folder


@pytest.fixture(scope="session")
def trained(demo, tmp_path_factory):
    """A run of two epochs on the demo. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("runs") / "last1"
    assert call(train, "--features", demo / "DEAM_feats", "--run", folder, *QUICK) == 0
    return folder


@pytest.fixture(scope="session")
def splits():
    return common.read_splits(ROOT / "splits.json")
