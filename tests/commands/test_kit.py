"""The kit as a whole: the README's commands, the lock, the image, the golden result."""

import ast
import os
import re
import resource
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS, call, extraction

import common
import extract
from kit import cli
from kit.features import read_manifest
from kit.files import read_json

README = (ROOT / "README.md").read_text()
DEMO = (ROOT / "tests/demo.sh").read_text()


def test_the_demo_reproduces_the_golden_result(clone, compared):
    """As anyone runs it, in a folder with a space in its name, without the pins: same digests."""
    folder, output = clone
    *_, verdict, hint = output.strip().splitlines()
    assert verdict.startswith("REPRODUCED: features, model, predictions")
    assert hint.startswith("next: python ")
    assert "Traceback" not in output
    found, golden = (read_json(path, "") for path in (
        folder / "demo/run/eval-test/metrics.json", ROOT / "tests/golden/demo.json"))
    for key in ("features", "splits", "initial_model", "model", "predictions"):
        assert found[key] == golden[key], key
    assert found["numbers"]["metrics"]["arousal"]["r2"] > 0.5  # it has learned something
    r_squared = re.search(r"^arousal R² (\S+ \[\S+ \S+\])", output, re.M)[1]
    assert f"an R² of {r_squared}" in README
    compared(2 * len(golden["predictions"]), "predictions with the golden ones")


def test_makefile_image_and_readme_run_the_same_demo(compared):
    assert "bash tests/demo.sh" in (ROOT / "Makefile").read_text()
    assert 'CMD ["bash", "tests/demo.sh"]' in (ROOT / "Dockerfile").read_text()
    commands = DEMO[DEMO.index("python tests/demo.py"):DEMO.index("echo ")].strip()
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
    """Each script answers within a second (of CPU time: others may use the machine)."""
    code = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert stop.code == 0
assert not {"torch", "numpy", "matplotlib"} & sys.modules.keys(), sys.argv"""
    for script in SCRIPTS:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code, f"{script.__name__}.py"], cwd=ROOT,
                              capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("usage: ")
        assert sum(after[n] - before[n] for n in (0, 1)) < 1, script
    compared(len(SCRIPTS), "scripts")


# ------------------------------------------------------------------------------------------ house

COMMANDS = {script.__name__ for script in SCRIPTS}


def product():
    """{module: (its path, its syntax tree)} of all files of the product."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("kit/*.py"), *ROOT.glob("exact/*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"):
            (path, ast.parse(path.read_text())) for path in paths}


def imports(tree):
    """The modules that a file imports, anywhere in it: `from kit import figures` is kit.figures."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            inner = node.module in ("kit", "exact")
            for each in node.names:
                yield f"{node.module}.{each.name}" if inner else node.module


def ring(module):
    """0 exact, 1 kit, 2 common, 3 scripts; None for what is not the kit's."""
    top = module.partition(".")[0]
    return 3 if top in COMMANDS else {"exact": 0, "kit": 1, "common": 2}.get(top)


def test_no_import_runs_upwards_or_in_a_circle(compared):
    files, count = product(), 0
    packages = {"common", "exact", "kit"}
    assert {module for module in files if "." not in module} == {*packages, *COMMANDS}
    edges = {}
    for module, (_, tree) in files.items():
        for name in imports(tree):
            if ring(name) is None:
                continue
            # `from exact import Exact` names no module
            edges.setdefault(module, set()).add(name if name in files else name.partition(".")[0])
            assert ring(name) <= ring(module), f"{module} imports {name}"
            assert ring(name) < 3 or module == "verify", f"{module} imports {name}"
            count += 1
    edges = {module: inner - {"exact"} if ring(module) == 0 else inner
             for module, inner in edges.items()}
    while edges:  # take away what imports nothing that is left
        free = [module for module, inner in edges.items() if not inner & edges.keys()]
        assert free, f"in a circle: {edges}"
        for module in free:
            del edges[module]
    compared(count, "imports")


def test_exact_imports_torch_and_numpy_alone(compared):
    """So that its folder can be copied into another project. Triton is not needed: only the kernels
    import it, and nothing imports them where it is not there."""
    known, count = {"exact", "torch", "numpy", "triton", *sys.stdlib_module_names}, 0
    for module, (path, tree) in product().items():
        if ring(module) == 0:
            for name in imports(tree):
                assert name.partition(".")[0] in known, f"{path}: {name}"
                count += 1
    without = ("import sys; sys.modules['triton'] = None; import torch; from exact import Exact; "
               "Exact().__enter__(); print((torch.ones(2, 2).double() @ "
               "torch.ones(2, 2).double()).sum().item())")
    done = subprocess.run([sys.executable, "-c", without], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "8.0\n", done.stderr
    compared(count, "imports")


def test_all_seeds_come_from_one_function(compared):
    """What is random takes its seed from common.seeds, by name; what is resampled has a constant
    one; a sample of songs to check has none."""
    named, constant, free = [], [], []
    for module, (_, tree) in product().items():
        if ring(module) == 0:
            continue  # its dropout draws its seeds from torch's generator
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            argument = ast.unparse(node.args[0]) if node.args else ""
            if node.func.attr in ("manual_seed", "manual_seed_all", "seed"):
                named.append(re.fullmatch(r"seeds\(.*\)\['(\w+)'\]", argument)[1])
            elif node.func.attr in ("default_rng", "RandomState"):
                assert isinstance(node.args[0], ast.Constant), (module, argument)
                constant.append(module)
            elif node.func.attr in ("Random", "SystemRandom"):
                free.append(module)
            else:
                name = ast.unparse(node.func)
                assert not re.match(r"(np\.)?random\.[a-z]+$", name), (module, name)
    assert sorted(named) == sorted(common.seeds(0))
    assert set(constant) == {"kit.metrics", "kit.swapped"} and set(free) == {"verify"}
    compared(len(named) + len(constant) + len(free), "seeds")


# ---------------------------------------------------------------------------------------- commands


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
    stated = (ROOT / "requirements.in").read_text().splitlines()
    wanted = dict(line.split(";")[0].split("==") for line in stated
                  if re.match(r"\w+==", line))
    locked = {name.replace("-", "_"): version for name, version in entries}
    assert wanted.items() <= locked.items()
    assert set(wanted) == {"torch", "torchaudio", "soundfile", "numpy", "kagglehub", "matplotlib",
                           "tqdm", "pytest", "safetensors", "huggingface_hub", "ziglang"}
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


def test_exact_features_need_no_pins(clone, tmp_path, compared):
    """The demo was extracted without the pins, on one thread; here with them, on two."""
    folder, threads = clone[0] / "demo", torch.get_num_threads()
    manifest = folder / "DEAM_feats/manifest.json"
    songs = sorted(read_json(manifest, "")["songs"])[:2]
    torch.set_num_threads(2)
    features = tmp_path / "f"
    assert call(extract, *extraction(folder, features, "--songs", *songs)) == 0
    assert read_manifest(features / "manifest.json")["songs"] == {
        song: entry for song, entry in read_manifest(manifest)["songs"].items() if song in songs}
    torch.set_num_threads(threads)
    compared(len(songs), "songs")


def test_the_benchmark_counts_the_work(compared):
    """0.718 TFLOP for 45 s up to layer 10, as torch counts them on a network without data."""
    import bench
    import torchaudio
    from torch.utils.flop_counter import FlopCounterMode

    from kit.network import network

    model = network({**torchaudio.pipelines.WAV2VEC2_BASE._params, "aux_num_out": None})
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.extract_features(torch.zeros(1, 45 * 16000, device="meta"), num_layers=10)
    assert counter.get_total_flops() == pytest.approx(bench.work(10), rel=1e-3)
    compared(1, "sum")
