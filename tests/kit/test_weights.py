"""Backbones: bundles, Hugging Face folders and repositories, files of weights; digests, threads."""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchaudio
from conftest import ROOT, call, extraction
from demo import CONFIG, PARAMS, PROCESSOR
from safetensors.torch import load_file, save_file

import extract
from common import Backbone
from kit import machine, weights
from kit.cli import UserError
from kit.files import ahead, read_json, state_digest, tensor_digest
from kit.machine import Arithmetic
from kit.weights import POSITION, fold_weight_norm, from_hugging_face

NEW = "parametrizations.weight.original0", "parametrizations.weight.original1"
# of the extractor and of the layers: as in wav2vec2-base, wav2vec2-large and between them
ARRANGEMENTS = {"group, norm after": ("group", False, False),
                "layer, norm first": ("layer", True, True),
                "layer, norm after": ("layer", True, False)}


@pytest.fixture(scope="module")
def models():
    """{arrangement: (params, torchaudio's own small network with weight norm, as the reference)}"""
    made = {}
    for arrangement, (extractor, bias, first) in ARRANGEMENTS.items():
        torch.manual_seed(0)
        params = {**PARAMS, "extractor_mode": f"{extractor}_norm", "extractor_conv_bias": bias,
                  "encoder_layer_norm_first": first}
        model = torchaudio.models.wav2vec2_model(**params).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        made[arrangement] = params, model
    return made


def spelled(state, prefix="", old=False):
    """A torchaudio state dict in Hugging Face's names, with what only pretraining needs."""
    state = {prefix + name.replace("encoder.transformer.", "encoder.").replace(
        "encoder.feature_projection.", "feature_projection."): value
        for name, value in state.items()}
    if old:
        for ours, theirs in zip(NEW, ("weight_g", "weight_v")):
            state = {name.replace(ours, theirs): value for name, value in state.items()}
    return {**state, prefix + "masked_spec_embed": torch.zeros(64),
            "quantizer.codevectors": torch.zeros(3), "project_hid.weight": torch.zeros(2, 2)}


def assert_layers_equal(backbone, model, epsilon, compared):
    """All hidden states are the reference's, and so are the weights, from whatever file."""
    waveform = 0.1 * torch.randn(1, 4000, generator=torch.Generator().manual_seed(1)) + 0.02
    source = waveform if epsilon is None else (
        (waveform - waveform.mean()) / (waveform.var(correction=0) + epsilon).sqrt())
    with torch.no_grad():
        features, _ = model.feature_extractor(source, None)
        first = model.encoder.transformer._preprocess(model.encoder.feature_projection(features))
        reference = [first, *model.extract_features(source)[0]]
    for layer in reversed(range(len(reference))):
        states = backbone.to(Arithmetic("float32", "cpu"), layer).hidden_states(waveform.double())
        assert (states - reference[layer]).norm() < 1e-5 * states.norm(), layer
    folded = fold_weight_norm(model.state_dict())
    assert backbone.digest == state_digest({name: each.float() for name, each in folded.items()})
    compared(len(reference), "layers")


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("file, prefix, old, z_scored", [
    ("model.safetensors", "wav2vec2.", False, True), ("pytorch_model.bin", "", True, False),
    ("pytorch_model.bin", "hubert.", False, None)])
def test_hugging_face_folders(models, tmp_path, compared, arrangement, file, prefix, old, z_scored):
    """Without a processor's configuration the waveform is z-scored, as transformers do."""
    params, model = models[arrangement]
    extractor, bias, first = ARRANGEMENTS[arrangement]
    (tmp_path / "config.json").write_text(json.dumps({
        **CONFIG, "model_type": prefix.strip(".") or "wav2vec2", "feat_extract_norm": extractor,
        "conv_bias": bias, "do_stable_layer_norm": first}))
    if z_scored is not None:
        (tmp_path / "preprocessor_config.json").write_text(
            json.dumps({**PROCESSOR, "do_normalize": z_scored}))
    save = save_file if file.endswith("safetensors") else torch.save
    save(spelled(model.state_dict(), prefix, old), tmp_path / file)
    backbone = Backbone(tmp_path)
    assert backbone.params == {**params, "extractor_conv_layer_config": [
        list(layer) for layer in params["extractor_conv_layer_config"]]}
    digest = hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
    assert backbone.source == {"name": tmp_path.name, "revision": None, "file": file,
                               "sha256": digest}
    assert_layers_equal(backbone, model, None if z_scored is False else 1e-7, compared)


@pytest.mark.parametrize("file, epsilon", [("ours.pt", None), ("ours.safetensors", None),
                                           ("theirs.bin", 1e-7), ("theirs.safetensors", 1e-7)])
def test_bare_files_are_of_the_base_architecture(models, tmp_path, monkeypatch, compared, file,
                                                 epsilon):
    params, model = models["group, norm after"]
    monkeypatch.setattr(torchaudio.pipelines.WAV2VEC2_BASE, "_params", params)  # base in small
    state = spelled(model.state_dict(), "wav2vec2.") if epsilon else model.state_dict()
    (save_file if file.endswith("safetensors") else torch.save)(state, tmp_path / file)
    assert_layers_equal(Backbone(tmp_path / file), model, epsilon, compared)


@pytest.mark.parametrize("name, arrangement, epsilon", [
    ("WAV2VEC2_BASE", "group, norm after", None), ("HUBERT_LARGE", "layer, norm first", 1e-5),
    ("WAV2VEC2_ASR_BASE_960H", "group, norm after", None)])
def test_bundles(models, monkeypatch, compared, name, arrangement, epsilon):
    """By name, a speech recogniser's output layer left out; z-scored as the bundle itself does."""
    params, model = models[arrangement]
    bundle = getattr(torchaudio.pipelines, name)
    monkeypatch.setattr(bundle, "_params", {**params, "aux_num_out": 3})
    monkeypatch.setattr(torchaudio.pipelines._wav2vec2.utils, "_get_state_dict", lambda *_: {
        **model.state_dict(), "aux.weight": torch.ones(3, 64), "aux.bias": torch.ones(3)})
    assert_layers_equal(Backbone(name), model, epsilon, compared)


def test_hugging_face_base_names_are_all_mapped(compared):
    """Names of the published wav2vec2-base checkpoint, of every kind that occurs in it."""
    theirs = ["feature_extractor.conv_layers.0.layer_norm.weight",
              "feature_extractor.conv_layers.6.conv.weight", "feature_projection.projection.bias",
              "encoder.pos_conv_embed.conv.weight_g", "encoder.layer_norm.bias",
              "encoder.layers.11.attention.k_proj.weight",
              "encoder.layers.0.feed_forward.intermediate_dense.bias",
              "encoder.layers.3.final_layer_norm.weight"]
    with torch.device("meta"):
        ours = set(torchaudio.models.wav2vec2_base().state_dict())
    renamed = from_hugging_face({"wav2vec2." + name: None for name in theirs})
    assert len(renamed) == len(theirs)
    assert {name.replace("weight_g", NEW[0]) for name in renamed} <= ours
    compared(len(theirs), "names")


def test_weight_norm_is_folded(models, compared):
    for _, model in models.values():
        folded = fold_weight_norm(model.state_dict())[POSITION + "weight"]
        torch.testing.assert_close(folded.float(), rtol=1e-6, atol=1e-7, expected=(
            model.encoder.transformer.pos_conv_embed.conv.weight))
    compared(3 * folded.numel(), "weights")


def test_refused_backbones(demo, tmp_path, fails, monkeypatch, compared):
    base = extraction(demo, tmp_path / "f")
    (tmp_path / "text.bin").write_text("weights")
    (tmp_path / "text.safetensors").write_text("weights")
    torch.save({"encoder.transformer.x": torch.zeros(1)}, tmp_path / "other.bin")
    torch.save([1, 2], tmp_path / "list.bin")
    torch.save({"encoder.x": torch.tensor(torch.nan)}, tmp_path / "nan.bin")
    (tmp_path / "folder").mkdir()
    shutil.copytree(demo / "backbone", tmp_path / "bare").joinpath("model.safetensors").unlink()
    refusals = [("WAVLM_BASE", "position bias"), ("NONE", "no such file or folder, Hugging Face"),
                ("text.bin", "not a file of weights"),
                ("text.safetensors", "not a file of weights"),
                ("other.bin", "do not fit"), ("list.bin", "not a state dict"), ("nan.bin", "NaN"),
                ("folder", "config.json"), ("bare", "neither model.safetensors nor pytorch_model"),
                ("none.bin", "no such file or folder")]
    for name, says in refusals:
        place = name if name.isupper() else tmp_path / name
        assert says in fails(extract, *base, "--weights", place), name
    assert "layer 13: backbone has 12 layers" in fails(extract, *base, "--layer", 13)

    def download(*_):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torchaudio.pipelines._wav2vec2.utils, "_get_state_dict", download)
    message = fails(extract, *base, "--weights", "WAV2VEC2_BASE")
    for says in ("wav2vec2_fairseq_base_ls960.pth", "--weights", "checkpoints"):
        assert says in message
    if not torch.cuda.is_available():
        assert "sees no NVIDIA GPU" in fails(extract, *base, "--device", "cuda")
    assert not (tmp_path / "f").exists()
    compared(len(refusals) + 2, "refusals")


def test_no_configuration_ends_in_a_traceback(demo, tmp_path, monkeypatch, compared):
    """Every key of both files retyped or out of range: a backbone, or one line."""
    folder, tried, stopped = shutil.copytree(demo / "backbone", tmp_path / "b"), 0, 0
    clip = torch.zeros(1, 4000, dtype=torch.float64)
    state = load_file(folder / "model.safetensors")
    monkeypatch.setattr(weights, "read_state", lambda _: state)
    for name, config in (("config.json", CONFIG), ("preprocessor_config.json", PROCESSOR)):
        for key in config:
            for value in (None, "x", -1, 0, 10**9, 1.5, True, [], [[]], {}, [0] * 7, math.nan):
                (folder / name).write_text(json.dumps({**config, key: value}))
                try:
                    backbone = Backbone(folder).to(Arithmetic("float32", "cpu"), 1)
                except UserError:
                    stopped += 1
                else:
                    assert len(backbone.hidden_states(clip)[0]) == 12
                tried += 1
        for text in ("", "[]", "null", "{", '"x"', "\0"):
            (folder / name).write_text(text)
            with pytest.raises(UserError):
                Backbone(folder)
            tried += 1
        (folder / name).write_text(json.dumps(config))
    assert stopped > tried / 2
    compared(tried, "configurations")


# ------------------------------------------------------------------------------- Hugging Face's hub

MAIN, OTHER = "a" * 40, "b" * 40  # commits
BACKBONES = """
import sys, time; sys.path.insert(0, sys.argv[1])
time.sleep = lambda _: None  # the client waits before it tries again
from common import Backbone
from kit.cli import UserError
for name in sys.argv[2:]:
    try:
        backbone = Backbone(name)
        print(name, backbone.digest, "from", *backbone.source.values())
    except UserError as error:
        print(name, "error:", error)
"""


@pytest.fixture(scope="module")
def hub(demo, tmp_path_factory):
    """A server on 127.0.0.1 that speaks what huggingface_hub asks for: (its address, the list of
    what was asked for, a function that runs Python with it)."""
    folder, asked = tmp_path_factory.mktemp("hub"), []
    config, processor, file = (demo / "backbone" / name for name in (
        "config.json", "preprocessor_config.json", "model.safetensors"))
    good = {config.name: config.read_bytes(), processor.name: processor.read_bytes()}
    state = load_file(file)
    save_file({name: -value for name, value in state.items()}, folder / file.name)
    torch.save(state, folder / "pytorch_model.bin")
    files = {("demo/model", MAIN): {**good, file.name: file.read_bytes()},
             ("demo/model", OTHER): {**good, file.name: (folder / file.name).read_bytes()},
             ("demo/pickled", MAIN): {config.name: good[config.name], "pytorch_model.bin":
                                      (folder / "pytorch_model.bin").read_bytes()},
             ("demo/damaged", MAIN): {**good, file.name: file.read_bytes()[:-999]},
             ("demo/empty", MAIN): good, ("demo/unknown", MAIN): {"README.md": b"a poem"}}
    commits = {"main": MAIN, "v1": OTHER, MAIN: MAIN, OTHER: OTHER}

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            asked.append((self.command, self.path))
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^/?]+)(\?.*)?", self.path)
            name, revision, wanted = found.group(1, 2, 3) if found else ("", "", "")
            commit, content = commits.get(revision, ""), None
            if not any(name == repository for repository, _ in files):
                problem = "RepoNotFound"
            elif (name, commit) not in files:
                problem = "RevisionNotFound"
            else:
                problem, content = "EntryNotFound", files[name, commit].get(wanted)
            body = content or b"Entry not found"
            self.send_response(404 if content is None else 200)
            if content is None:
                self.send_header("X-Error-Code", problem)
            else:
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD = answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("HF_")
                    and not name.lower().endswith("_proxy")}

    def python(*arguments, home, **more):
        """Run Python with a home of its own (huggingface_hub reads its settings at import)."""
        del asked[:]
        settings = {"HF_HOME": str(home), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True,
                              text=True, timeout=120, env={**surroundings, **settings, **more},
                              cwd=home)  # where no folder is called as a repository's owner is
        assert "Traceback" not in done.stderr, done.stderr
        return done

    yield asked, python
    server.shutdown()
    server.server_close()


def test_repositories(demo, hub, tmp_path, compared):
    """Downloaded, again from the cache, and from it alone; refused in one line."""
    asked, python = hub
    own = Backbone(demo / "backbone").digest

    def found(*names, **more):
        done = python("-c", BACKBONES, ROOT, *names, home=tmp_path, **more)
        lines = done.stdout.splitlines()
        assert [line.split()[0] for line in lines] == list(names), done.stdout + done.stderr
        return [line.split(" ", 1)[1] for line in lines]

    names = "demo/model", "demo/model@v1", "demo/pickled"
    bad = {"demo/empty": "no weights in demo/empty: it has neither model.safetensors nor pytorch_",
           "demo/damaged": "is not a file of weights: damaged",
           "demo/unknown": "is not a wav2vec2 repository: it has no config.json",
           "demo/nowhere": "cannot get demo/nowhere from Hugging Face (",
           "demo/model@v9": "cannot get demo/model@v9 from Hugging Face ("}
    model, pinned, pickled, *errors = found(*names, *bad, *names)
    assert model.startswith(f"{own} from demo/model {MAIN} model.safetensors ")
    assert pickled.startswith(f"{own} from demo/pickled {MAIN} pytorch_model.bin ")
    assert f" from demo/model {OTHER} model.safetensors " in pinned and own not in pinned
    for line, says in zip(errors, bad.values()):
        assert line.startswith("error: ") and says in line
    assert errors[len(bad):] == [model, pinned, pickled]  # again, from the cache:
    downloads = [path for command, path in asked if command == "GET" and "/model.saf" in path]
    assert len(downloads) == len(set(downloads)) == 3

    with ThreadPoolExecutor(2) as both:
        offline = both.submit(found, *names, f"demo/model@{OTHER}", "demo/nowhere",
                              HF_HUB_OFFLINE="1")
        no_network = both.submit(found, *names, "demo/nowhere", "demo/nowhere@v1",
                                 HF_ENDPOINT="http://127.0.0.1:9").result()
        offline = offline.result()
    assert offline[:4] == [model, pinned, pickled, pinned] and not asked
    assert no_network[:3] == [model, pinned, pickled]
    for line in offline[4:] + no_network[3:]:
        assert "check the name and the network" in line and "pass the folder with --weights" in line
    compared(3 + len(errors) + len(offline) + len(no_network), "answers")


def test_a_manifest_remembers_the_revision(demo, tmp_path, monkeypatch, capsys, compared):
    """What `demo/model@v1` was at the time is what --verify asks for, whatever v1 is by then."""
    monkeypatch.chdir(tmp_path)  # where no folder is called `demo`
    asked, song = [], read_json(demo / "splits.json", "")["train"][0]
    monkeypatch.setattr(weights, "fetch_repository", lambda name: asked.append(name) or (
        demo / "backbone", OTHER))
    assert call(extract, *extraction(demo, tmp_path / "f", "--songs", song, "--precision",
                                     "float32", "--weights", "demo/model@v1")) == 0
    source = read_json(tmp_path / "f/manifest.json", "")["source"]
    assert (source["name"], source["revision"]) == ("demo/model", OTHER)
    assert call(extract, "--verify", tmp_path / "f/manifest.json", "--deam", demo / "DEAM",
                "--device", "cpu") == 0
    assert "11 identical, 0 close, 0 different" in capsys.readouterr().out
    assert asked == ["demo/model@v1", f"demo/model@{OTHER}"]
    compared(5, "values of the manifest")


# --------------------------------------------------------------------------- digests, threads, GPUs


def test_digests(compared):
    """Worked out with hashlib alone: dtype, shape, little-endian bytes; sorted names."""
    a = torch.tensor([[1.0, 2.0]])
    data = np.array([1, 2], ">f4").astype("<f4").tobytes()
    by_hand = hashlib.sha256(b"float32 [1, 2]\n" + data).hexdigest()
    assert tensor_digest(a) == tensor_digest(a.numpy().astype(">f4")) == by_hand
    assert tensor_digest(a.half()) != by_hand != tensor_digest(a.T)
    state = {"b": a, "a": a.half()}
    assert state_digest(state) == state_digest(dict(reversed(state.items())))
    lines = f"a {tensor_digest(a.half())}\nb {by_hand}\n"
    assert state_digest(state) == hashlib.sha256(lines.encode()).hexdigest()
    compared(5, "digests")


def test_each_process_has_its_gpu(monkeypatch, compared):
    chosen = []
    for name, value in (("is_available", True), ("device_count", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name, value in (("RANK", 0), ("WORLD_SIZE", 3), ("LOCAL_WORLD_SIZE", 3)):
        monkeypatch.setenv(name, str(value))
    for place in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(place))
        assert machine.pick_device("auto") == torch.device("cuda", place)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 3 has no GPU: torch sees 2"):
        machine.pick_device("cuda")
    assert chosen == [0, 1] and machine.pick_device("cpu") == torch.device("cpu")
    compared(4, "processes")


def test_ahead_keeps_the_order_and_a_bound(compared):
    begun = []

    def square(n):
        begun.append(n)
        time.sleep(0.002 * (n % 3))
        assert torch.get_num_threads() == 1
        return n * n

    threads = torch.get_num_threads()
    for n, result in enumerate(ahead(square, range(40), threads=3)):
        assert result == n * n and len(begun) <= n + 8  # two for each thread beyond that one
    assert torch.get_num_threads() == threads
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda n: 1 / n, [1, 0, 1]))
    compared(len(begun), "results")
