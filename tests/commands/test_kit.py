"""The kit as a whole: the README's commands, the lock, the image, the golden result."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS, call

from kit import cli
from kit.files import read_json
import extract

README = (ROOT / "README.md").read_text()
DEMO = (ROOT / "tests/demo.sh").read_text()


def test_the_demo_reproduces_the_golden_result(clone, compared):
    """As anyone runs it, in a folder with a space in its name, without the pins: same digests."""
    folder, output = clone
    assert output.strip().splitlines()[-1].startswith("REPRODUCED: features, model, predictions")
    assert "Traceback" not in output
    found, golden = (read_json(path, "") for path in (
        folder / "demo/run/eval-test/metrics.json", ROOT / "tests/golden/demo.json"))
    for key in ("features", "splits", "initial_model", "model", "predictions"):
        assert found[key] == golden[key], key
    assert found["numbers"]["metrics"]["arousal"]["r2"] > 0.5  # it has learned something
    arousal = re.search(r"^arousal .*$", output, re.M)[0].split()
    assert "R² of {}, r {} and CCC {}.".format(*arousal[-3:]) in " ".join(README.split())
    compared(2 * len(golden["predictions"]), "predictions with the golden ones")


def test_makefile_image_and_readme_run_the_same_demo(compared):
    assert "bash tests/demo.sh" in (ROOT / "Makefile").read_text()
    assert 'CMD ["bash", "tests/demo.sh"]' in (ROOT / "Dockerfile").read_text()
    commands = DEMO[DEMO.index("python tests/demo.py"):]
    assert commands in README
    compared(3, "places")


def test_every_option_has_a_help_line(compared):
    count = 0
    for script in SCRIPTS:
        for action in script.parser()._actions:
            assert action.help, action.option_strings
            count += 1
        assert f"python {script.__name__}.py" in script.__doc__
    compared(count, "options")


def test_help_needs_no_torch(compared):
    code = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        assert stop.code == 0
    assert "torch" not in sys.modules, script"""
    done = subprocess.run([sys.executable, "-c", code, *(f"{script.__name__}.py" for script in
                          SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(SCRIPTS)
    compared(len(SCRIPTS), "scripts")


@pytest.mark.parametrize("redirect", [">&-", "2>&- >&-", "| head -c 1"])
def test_a_closed_stdout_is_no_traceback(redirect):
    command = f"{sys.executable} audit.py --help {redirect}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert "Traceback" not in done.stderr


def test_the_lock(compared):
    """Every requirement is pinned with a hash, and requirements.in is part of it."""
    text = (ROOT / "requirements.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    entries = re.findall(r"^([a-z0-9._-]+)==([^\s;]+)[^\n]*\\\n    --hash=sha256:[0-9a-f]{64}",
                         text, re.M | re.I)
    assert len(entries) == len(lines) > 20 and "://" not in text
    wanted = dict(line.split("==") for line in (ROOT / "requirements.in").read_text().splitlines()
                  if re.match(r"\w+==", line))
    locked = {name.replace("-", "_"): version for name, version in entries}
    assert wanted.items() <= locked.items()
    assert set(wanted) == {"torch", "torchaudio", "soundfile", "numpy", "kagglehub", "matplotlib",
                           "tqdm", "pytest", "safetensors", "huggingface_hub"}
    compared(len(entries), "locked requirements")


def test_the_dockerfile(compared):
    text = (ROOT / "Dockerfile").read_text()
    base = r"^ARG PYTHON_IMAGE=python:3\.11-slim-bookworm@sha256:[0-9a-f]{64}$"
    assert re.search(base, text, re.M)
    assert re.findall(r"^FROM (.*)$", text, re.M) == ["${PYTHON_IMAGE}"]
    flags = ("--require-hashes", "--no-deps", "--only-binary=:all:")
    assert all(flag in text for flag in flags)
    assert re.search(r"^USER (?!0|root)\S+$", text, re.M) and "apt-get" not in text
    compared(len(flags), "flags")


def test_the_pins_hold_before_torch_is_loaded(compared):
    if "ATEN_CPU_CAPABILITY" in cli.PINS:
        assert torch.backends.cpu.get_cpu_capability() in ("AVX2", "DEFAULT")
    for name, value in cli.PINS.items():
        assert os.environ[name] == value
    compared(len(cli.PINS), "environment variables")


def test_exact_features_need_no_pins(clone, compared):
    """The demo was extracted without the pins, on one thread; here with them, on two."""
    folder, threads = clone[0] / "demo", torch.get_num_threads()
    manifest = folder / "DEAM_feats/manifest.json"
    songs = sorted(read_json(manifest, "")["songs"])[:2]
    torch.set_num_threads(2)
    assert call(extract, "--verify", manifest, "--deam", folder / "DEAM", "--weights",
                folder / "backbone", "--songs", *songs) == 0
    torch.set_num_threads(threads)
    compared(len(songs), "songs")


def test_the_benchmark_counts_the_work(compared):
    """0.718 TFLOP for 45 s up to layer 10, as torch counts them on a network without data."""
    import bench
    import torchaudio
    from torch.utils.flop_counter import FlopCounterMode

    from common import network

    model = network({**torchaudio.pipelines.WAV2VEC2_BASE._params, "aux_num_out": None})
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.extract_features(torch.zeros(1, 45 * 16000, device="meta"), num_layers=10)
    assert counter.get_total_flops() == pytest.approx(bench.work(10), rel=1e-3)
    compared(1, "sum")
