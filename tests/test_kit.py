"""The kit as a whole: the README's commands, the lock, the image, and the golden result on other settings."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import common
import eval as eval_script
import extract
import train

README = (ROOT / "README.md").read_text()


def joined(text):
    return re.sub(r"\s*\\\n\s*", " ", text)


def demo_commands():
    """The three commands of `make demo`, as the README gives them."""
    return re.findall(r"^python ((?:extract|train|eval)\.py .*demo/.*)$", joined(README), re.M)[:3]


def test_the_readmes_demo_reproduces_the_golden_result(tmp_path, compared):
    """As written, in a folder with a space in its name, with the user's own settings for vector units and threads."""
    kit = tmp_path / "a clone"
    kit.mkdir()
    for name in ("common.py", "extract.py", "train.py", "eval.py", "splits.json"):
        shutil.copy(ROOT / name, kit)
    shutil.copytree(ROOT / "tests/golden", kit / "tests/golden")
    commands = demo_commands()
    assert [command.split()[0] for command in commands] == ["extract.py", "train.py", "eval.py"]
    surroundings = [{"ATEN_CPU_CAPABILITY": "avx512", "OMP_NUM_THREADS": "1"}, {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": ""}, {"ONEDNN_MAX_CPU_ISA": "ALL"}]
    for command, changes in zip(commands, surroundings):
        result = subprocess.run([sys.executable, *command.split()], cwd=kit, env={**os.environ, **changes}, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "Traceback" not in result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == "REPRODUCED: every prediction is the same to six decimals"
    found = common.read_json(kit / "demo/run/eval-test/metrics.json", "")
    golden = common.read_json(ROOT / "tests/golden/demo.json", "")
    for key in ("features", "splits", "initial_model", "predictions"):
        assert found[key] == golden[key], key
    assert found["metrics"]["arousal"]["r2"] > 0.5  # it has learned something
    compared(2 * len(golden["predictions"]), "predictions with the golden ones")
    arousal = re.search(r"^arousal .*$", README, re.M)[0].split()
    assert arousal == next(line for line in lines if line.startswith("arousal ")).split()  # the table in the README


def test_makefile_and_image_run_the_same_demo(compared):
    for file in ("Makefile", "Dockerfile"):
        text = joined((ROOT / file).read_text()).replace("$(RUN)", "python").replace('"]', "")
        for command in demo_commands():
            assert re.search(r"python " + re.escape(command) + r"\s*(&&|$)", text, re.M), (file, command)
    compared(6, "commands")


def test_every_option_has_a_help_line(compared):
    count = 0
    for script in (extract, train, eval_script):
        for action in script.parser()._actions:
            assert action.help, action.option_strings
            count += 1
        assert script.__doc__.count("python " + script.__name__ + ".py") >= 3
    compared(count, "options")


def test_the_lock(compared):
    """Every requirement is pinned with a hash, and requirements.in is part of it."""
    entries = re.findall(r"^([a-z0-9._-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)", (ROOT / "requirements.txt").read_text(), re.M | re.I)
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith((" ", "#"))]
    assert len(entries) == len(lines) > 20
    locked = {name: version for name, version, _ in entries}
    wanted = dict(line.split("#")[0].strip().split("==") for line in (ROOT / "requirements.in").read_text().splitlines() if "==" in line)
    assert wanted.items() <= locked.items()
    assert set(wanted) == {"torch", "torchaudio", "soundfile", "numpy", "kagglehub", "matplotlib", "tqdm", "pytest"}
    compared(len(entries), "locked requirements")


def test_the_dockerfile(compared):
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.11-slim-bookworm@sha256:[0-9a-f]{64}$", text, re.M)
    assert re.findall(r"^FROM (.*)$", text, re.M) == ["${PYTHON_IMAGE}"]
    for flag in ("--require-hashes", "--no-deps", "--only-binary=:all:"):
        assert flag in text
    for name, value in common.PINS.items():
        assert f"{name}={value}" in text
    assert re.search(r"^USER (?!0|root)\S+$", text, re.M) and "apt-get" not in text
    compared(len(common.PINS), "environment variables")


def test_the_pins_hold_before_torch_is_loaded(compared):
    import torch

    assert torch.backends.cpu.get_cpu_capability() == "AVX2"
    for name, value in common.PINS.items():
        assert os.environ[name] == value
    compared(len(common.PINS), "environment variables")


def test_the_benchmark_counts_the_work(compared):
    """0.718 TFLOP for 45 s up to layer 10, as torch counts them on a network without data."""
    import bench
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = common.empty_backbone("WAV2VEC2_BASE").to("meta")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.extract_features(torch.zeros(1, 45 * 16000, device="meta"), num_layers=10)
    assert counter.get_total_flops() == pytest.approx(bench.work(10), rel=1e-3)  # an odd frame of the padding
    compared(1, "sum")
