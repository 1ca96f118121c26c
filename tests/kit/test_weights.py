"""Backbones: bundles, Hugging Face folders and repositories, files of weights; digests, threads."""

import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import URLError

import huggingface_hub
import numpy as np
import pytest
import torch
import torchaudio
from conftest import call, extraction
from demo import CONFIG, PARAMS, PROCESSOR, demo_weights, hugging_face
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import extract
from common import Backbone, EmotionModel, through
from kit import machine, weights
from kit.cli import UserError
from kit.files import prefetch, read_json, state_digest, tensor_digest
from kit.machine import Arithmetic
from kit.network import network, start_from
from kit.weights import POSITION, fold_weight_norm, in_torchaudios_names, weights_name

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
    heads = {"feature_extractor.weight": torch.zeros(2, 2)} if prefix else {}  # as an x-vector has
    return {**state, **heads, prefix + "masked_spec_embed": torch.zeros(64),
            "quantizer.codevectors": torch.zeros(3), "project_hid.weight": torch.zeros(2, 2)}


def write_folder(folder, state, config=CONFIG, processors=None, file="model.safetensors"):
    """A checkpoint as transformers writes it; processors: {file name: what it holds}."""
    folder.mkdir(exist_ok=True)
    for name, content in {"config.json": config, **(processors or {})}.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    (save_file if file.endswith("safetensors") else torch.save)(state, folder / file)
    return folder


def write_shards(folder, file):
    """Distribute the weights of a folder over three files, in place of the one."""
    name = folder / "model.safetensors"
    state, (stem, ending) = load_file(name), file.split(".")
    name.unlink()
    shards = {f"{stem}-{n + 1:05}-of-00003.{ending}": list(state)[n::3] for n in range(3)}
    for shard, names in shards.items():
        (save_file if ending == "safetensors" else torch.save)(
            {each: state[each] for each in names}, folder / shard)
    index = folder / f"{file}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {
        name: shard for shard, names in shards.items() for name in names}}))
    return index


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
    assert backbone.params == {**params, "layer_norm_eps": 1e-5, "extractor_conv_layer_config": [
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


@pytest.mark.parametrize("first, expected", [
    (False, [0.994094449, 0.995113505, 0.995112177, 0.994988684]),
    (True, [0.929773225, 1.10044095, 1.21081376, 0.996516549])])
def test_epsilon_of_layer_norms(tmp_path, compared, first, expected):
    """The root mean squares that transformers 5.24 gives in float64 for layers 0, 6 and 12 and the
    norm above them. The same in the layers that train.py builds: the epsilon goes with params."""
    state = {name: value.float() for name, value in hugging_face(demo_weights()).items()}
    config = {**CONFIG, "layer_norm_eps": 0.01, "do_stable_layer_norm": first}
    folder = write_folder(tmp_path / "b", state, config, {"preprocessor_config.json": PROCESSOR})
    waveform = torch.from_numpy(np.random.default_rng(5).uniform(-0.02, 0.02, (1, 4000)))
    states = [Backbone(folder).to(Arithmetic("float32", "cpu"), layer).hidden_states(waveform)
              for layer in (0, 6, 12)]
    top = Backbone(folder).top_layers(6)
    model = EmotionModel(top["params"], 6, "lastN").eval()
    start_from(model, top)
    with torch.no_grad():
        torch.testing.assert_close(through(model.layers, states[1]), states[2])
        states.append(model.norm(states[2]))
    actual = [float(each.square().mean().sqrt()) for each in states]
    assert actual == pytest.approx(expected, rel=1e-5)
    # the convolutions' norms have torch's own, and so have all where params do not say
    model = network({**PARAMS, "layer_norm_eps": 0.01})
    assert all(each.layer_norm.eps == 1e-5 for each in model.feature_extractor.conv_layers)
    assert network(PARAMS).encoder.transformer.layer_norm.eps == 1e-5
    compared(len(actual) + 8, "values")


RAW, SCALED = {**PROCESSOR, "do_normalize": False}, {**PROCESSOR, "do_normalize": True}


@pytest.mark.parametrize("processors, rate, epsilon", [
    ({}, 16000, 1e-7),
    ({"preprocessor_config.json": RAW}, 16000, None),
    ({"preprocessor_config.json": {"sampling_rate": 22050}}, 22050, 1e-7),
    ({"processor_config.json": {"feature_extractor": RAW}}, 16000, None),
    ({"processor_config.json": {"audio_processor": RAW}}, 16000, None),
    ({"processor_config.json": {"feature_extractor": {"sampling_rate": 24000}}}, 24000, 1e-7),
    ({"processor_config.json": {"feature_extractor": RAW}, "preprocessor_config.json": SCALED},
     16000, None),
    ({"processor_config.json": {"feature_extractor": SCALED}, "preprocessor_config.json": RAW},
     16000, 1e-7),
    ({"processor_config.json": {"processor_class": "Wav2Vec2Processor"},
      "preprocessor_config.json": RAW}, 16000, None),
    ({"processor_config.json": {"feature_extractor": None}, "preprocessor_config.json": RAW},
     16000, None),
    ({"processor_config.json": {"feature_extractor": []}}, None, "is no processor's"),
    ({"processor_config.json": {"feature_extractor": {"feature_extractor_type": "WhisperFeature"}},
      "preprocessor_config.json": RAW}, None, "feature_extractor_type is not"),
    ({"processor_config.json": "{", "preprocessor_config.json": RAW}, None, "not valid JSON")])
@pytest.mark.parametrize("alone", [False, True])
def test_processors(models, tmp_path, compared, processors, rate, epsilon, alone):
    """transformers 5 prefers the feature extractor in processor_config.json. For a folder, and for
    its file named alone."""
    _, model = models["layer, norm after"]
    place = write_folder(tmp_path / "b", spelled(model.state_dict()), processors=processors)
    if alone:
        place /= "model.safetensors"
    if rate is None:
        with pytest.raises(UserError, match=epsilon):
            Backbone(place)
    else:
        assert (Backbone(place).sample_rate, Backbone(place).epsilon) == (rate, epsilon)
    compared(1, "processor")


def test_a_file_goes_with_the_configuration_beside_it(models, tmp_path, compared):
    _, model = models["layer, norm first"]
    config = {**CONFIG, "do_stable_layer_norm": True}
    folder = write_folder(tmp_path / "b", spelled(model.state_dict(), "hubert."), config,
                          {"preprocessor_config.json": RAW}, "any.bin")
    assert_layers_equal(Backbone(folder / "any.bin"), model, None, compared)
    for content in ("{", json.dumps({"model_type": "bert"})):
        (folder / "config.json").write_text(content)
        with pytest.raises(UserError, match="config.json"):
            Backbone(folder / "any.bin")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="do not fit wav2vec2-base, for want of a config.json"):
        Backbone(folder / "any.bin")
    (folder / "config.json").symlink_to("nowhere")
    with pytest.raises(UserError, match="cannot read"):
        Backbone(folder / "any.bin")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_sharded_weights(models, tmp_path, compared, file):
    """Of a folder, and of its index named alone."""
    _, model = models["layer, norm after"]
    folder = write_folder(tmp_path / "b", spelled(model.state_dict(), "wav2vec2."))
    index = write_shards(folder, file)
    printed = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
                      for path in sorted(folder.glob("*-of-*")))
    for place in (folder, index):
        assert_layers_equal(Backbone(place), model, 1e-7, compared)
        assert Backbone(place).source == {
            "name": place.name, "revision": None, "file": index.name,
            "sha256": hashlib.sha256(printed.encode()).hexdigest()}

    def refuses(place, says):
        with pytest.raises(UserError, match=says):
            Backbone(place)

    shards, content = sorted(folder.glob("*-of-*")), read_json(index, "")
    refuses(shards[0], r"do not fit .*config.json \((missing|of another shape): ")
    whole = shards[0].read_bytes()
    shutil.copy(shards[1], shards[0])
    refuses(folder, "missing: ")
    shards[0].write_bytes(whole[:-9])
    refuses(folder, "damaged")
    shards[0].unlink()
    refuses(folder, "cannot read a file of weights .*00001-of-00003")
    for edit in ({}, {"weight_map": {}}, {"weight_map": {"a": "../a.bin"}},
                 {"weight_map": {"a": 1}}):
        index.write_text(json.dumps(edit))
        refuses(folder, "is not an index of shards")
    compared(8 + len(content["weight_map"]), "shards and names")


@pytest.mark.parametrize("edit, says", [
    ({"model_type": "wavlm"}, "not supported: model_type 'wavlm', only 'wav2vec2' and 'hubert'"),
    ({"model_type": None}, "model_type is not a text"),
    ({"adapter_attn_dim": 16}, "not supported: adapter_attn_dim 16, only None"),
    ({"conv_pos_batch_norm": True}, "not supported: conv_pos_batch_norm True, only False"),
    ({"feat_proj_layer_norm": False}, "not supported: feat_proj_layer_norm False, only True"),
    ({"hidden_act": "relu"}, "not supported: hidden_act 'relu', only 'gelu'"),
    ({"feat_extract_activation": "gelu_new"}, "feat_extract_activation 'gelu_new', only 'gelu'"),
    ({"quantization_config": {"bits": 4}}, "not supported: quantization_config {'bits': 4}"),
    ({"num_feat_extract_layers": 6}, "differ in the number of convolutions"),
    ({"conv_kernel": [10, 3, 3, 3, 3, 2]}, "differ in the number of convolutions"),
    ({"layer_norm_eps": -1e-5}, "layer_norm_eps is not from 0 to 1"),
    ({"layer_norm_eps": "1e-5"}, "layer_norm_eps is not a finite number")])
def test_what_is_not_supported_is_named(models, tmp_path, compared, edit, says):
    _, model = models["layer, norm after"]
    folder = write_folder(tmp_path / "b", spelled(model.state_dict()), {**CONFIG, **edit})
    for place in (folder, folder / "model.safetensors"):
        with pytest.raises(UserError, match=says):
            Backbone(place)
    compared(2, "refusals")


def test_tensors_that_do_not_fit_are_named(models, tmp_path, compared):
    """With a configuration, and of a file without: adapters, batch norm, WavLM's bias, LoRA."""
    _, model = models["layer, norm after"]
    state = spelled(model.state_dict(), "hubert.")
    parts = ("layers.0.adapter_layer.norm.weight", "pos_conv_embed.batch_norm.weight",
             "layers.0.attention.gru_rel_pos_const", "layers.0.attention.k_proj.lora_A.weight")
    for name in parts:
        folder = write_folder(tmp_path / "b", {**state, f"hubert.encoder.{name}": torch.zeros(64)})
        with pytest.raises(UserError, match=f"config.json .unexpected: encoder.transformer.{name}"):
            Backbone(folder)
        (folder / "config.json").unlink()
        with pytest.raises(UserError, match="do not fit wav2vec2-base, for want of a config.json"):
            Backbone(folder / "model.safetensors")
    name = "hubert.feature_projection.projection.weight"
    for value, says in ((state[name].to(torch.int8), "not floating-point"),
                        (state[name][:, :9], "of another shape")):
        with pytest.raises(UserError, match=says):
            Backbone(write_folder(tmp_path / "b", {**state, name: value.contiguous()}))
    compared(2 * len(parts) + 2, "refusals")


@pytest.mark.parametrize("content, says", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "text, .version .*git lfs"),
    (b"\n<!DOCTYPE html><html><body>404</body></html>", "a text, .<!DOCTYPE html>"), (b"", "empty"),
    (b"Entry not found", "a text, .Entry not found"), (b"\x89HDF\r\n\x1a\n\0", "damaged, or"),
    (b'{"error": "Invalid username or password."}', "a text"), (b"PK\3\4" + bytes(99), "damaged"),
    (b"\x09" + bytes(7) + b"{}}}}}}}}", "damaged")])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_other_content_is_named(models, tmp_path, compared, content, says, file):
    _, model = models["layer, norm after"]
    folder = write_folder(tmp_path / "b", spelled(model.state_dict()))
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(content)
    for place in (folder, folder / file):
        with pytest.raises(UserError, match=says):
            Backbone(place)
    compared(2, "refusals")


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
    renamed, were_theirs = in_torchaudios_names({"wav2vec2." + name: None for name in theirs})
    assert were_theirs and len(renamed) == len(theirs)
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
    refusals = [("WAVLM_BASE", "no backbone WAVLM_BASE: "),
                ("NONE", "no backbone NONE: there is no such file or folder"),
                ("text.bin", "not a file of weights"),
                ("text.safetensors", "not a file of weights"),
                ("other.bin", "do not fit"), ("list.bin", "not a state dict"), ("nan.bin", "NaN"),
                ("folder", "config.json"),
                ("bare", "no weights in bare: it has none of model.safetensors"),
                ("none.bin", "no backbone /")]
    for name, says in refusals:
        place = name if name.isupper() else tmp_path / name
        assert says in fails(extract, *base, "--weights", place), name
    assert "layer 13: backbone has 12 layers" in fails(extract, *base, "--layer", 13)

    def download(*_):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torchaudio.pipelines._wav2vec2.utils, "_get_state_dict", download)
    message = fails(extract, *base, "--weights", "WAV2VEC2_BASE")
    for says in ("not known", "/models/wav2vec2_fairseq_base_ls960.pth", "checkpoints"):
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
@pytest.fixture(scope="module")
def hub(demo, tmp_path_factory):
    """A server on 127.0.0.1 that speaks what huggingface_hub asks for: (its address, the list of
    what was asked for)."""
    folder, asked = tmp_path_factory.mktemp("hub"), []
    config, processor, file = (demo / "backbone" / name for name in (
        "config.json", "preprocessor_config.json", "model.safetensors"))
    good = {config.name: config.read_bytes(), processor.name: processor.read_bytes()}
    state = load_file(file)
    save_file({name: -value for name, value in state.items()}, folder / file.name)
    torch.save(state, folder / "pytorch_model.bin")
    shards = write_folder(folder / "shards", state, CONFIG, {
        "processor_config.json": {"feature_extractor": RAW}})
    write_shards(shards, "model.safetensors")
    files = {("demo/model", MAIN): {**good, file.name: file.read_bytes()},
             ("demo/model", OTHER): {**good, file.name: (folder / file.name).read_bytes()},
             ("demo/pickled", MAIN): {config.name: good[config.name], "pytorch_model.bin":
                                      (folder / "pytorch_model.bin").read_bytes()},
             ("demo/shards", MAIN): {path.name: path.read_bytes() for path in shards.iterdir()},
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
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_repositories(demo, hub, tmp_path, monkeypatch, compared):
    """Downloaded, again from the cache, and from it alone; refused in one line."""
    address, asked = hub
    own = Backbone(demo / "backbone").digest
    monkeypatch.chdir(tmp_path)  # where no folder is called as a repository's owner is
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the client waits before it tries again
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)

    def found(*names, endpoint=address, offline=False):
        """What the kit finds, or the line that it says, for each name."""
        del asked[:]
        for name, value in (("ENDPOINT", endpoint), ("HF_HUB_OFFLINE", offline), (
                "HUGGINGFACE_CO_URL_TEMPLATE",
                endpoint + "/{repo_id}/resolve/{revision}/{filename}")):
            monkeypatch.setattr(constants, name, value)
        huggingface_hub.close_session()
        lines = []
        for name in names:
            try:
                backbone = Backbone(name)
                lines.append(" ".join(map(str, (backbone.digest, "from", *backbone.source.values(),
                                                backbone.epsilon))))
            except UserError as error:
                lines.append(f"error: {error}")
        return lines

    names = "demo/model", "demo/model@v1", "demo/pickled", "demo/shards"
    bad = {"demo/empty": "no weights in demo/empty: it has none of model.safetensors,",
           "demo/damaged": "is not a file of weights: damaged",
           "demo/unknown": "is not a wav2vec2 repository: it has no config.json",
           "demo/nowhere": "cannot get demo/nowhere from Hugging Face (",
           "demo/model@v9": "cannot get demo/model@v9 from Hugging Face ("}
    model, pinned, pickled, sharded, *errors = found(*names, *bad, *names)
    assert model.startswith(f"{own} from demo/model {MAIN} model.safetensors ")
    assert pickled.startswith(f"{own} from demo/pickled {MAIN} pytorch_model.bin ")
    assert pickled.endswith(" 1e-07")  # it has no processor
    assert sharded.startswith(f"{own} from demo/shards {MAIN} model.safetensors.index.json ")
    assert sharded.endswith(" None")  # as the nested feature extractor says
    assert f" from demo/model {OTHER} model.safetensors " in pinned and own not in pinned
    for line, says in zip(errors, bad.values()):
        assert line.startswith("error: ") and says in line
    assert errors[len(bad):] == [model, pinned, pickled, sharded]  # again, from the cache:
    downloads = [path for command, path in asked if command == "GET"
                 and re.search("/model(.safetensors|-0)", path)]
    assert len(downloads) == len(set(downloads)) == 7  # three, and an index with three shards

    offline = found(*names, f"demo/model@{OTHER}", "demo/nowhere", offline=True)
    assert not asked
    no_network = found(*names, "demo/nowhere", "demo/nowhere@v1", endpoint="http://127.0.0.1:9")
    assert offline[:5] == [model, pinned, pickled, sharded, pinned]
    assert no_network[:4] == [model, pinned, pickled, sharded]
    for line in offline[5:] + no_network[4:]:
        assert "check the name and the network" in line and "pass the folder with --weights" in line

    # a cache that others filled may not know that there is no processor_config.json
    (tmp_path / f"hub/models--demo--model/.no_exist/{MAIN}/processor_config.json").unlink()
    assert found("demo/model", offline=True) == [model]
    compared(4 + len(errors) + len(offline) + len(no_network), "answers")


def test_a_manifest_remembers_the_revision(demo, tmp_path, monkeypatch, compared):
    """What `demo/model@v1` was at the time is found again, whatever v1 is by then."""
    monkeypatch.chdir(tmp_path)  # where no folder is called `demo`
    asked, song = [], read_json(demo / "splits.json", "")["train"][0]
    monkeypatch.setattr(weights, "fetch_repository", lambda name: asked.append(name) or (
        demo / "backbone", OTHER))
    assert call(extract, *extraction(demo, tmp_path / "f", "--songs", song, "--precision",
                                     "float32", "--weights", "demo/model@v1")) == 0
    source = read_json(tmp_path / "f/manifest.json", "")["source"]
    assert (source["name"], source["revision"]) == ("demo/model", OTHER)
    assert Backbone(weights_name(source)).source == source
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


def test_prefetch_keeps_the_order_and_a_bound(compared):
    begun = []

    def square(n):
        begun.append(n)
        time.sleep(0.002 * (n % 3))
        assert torch.get_num_threads() == 1
        return n * n

    threads = torch.get_num_threads()
    for n, result in enumerate(prefetch(square, range(40), threads=3)):
        assert result == n * n and len(begun) <= n + 8  # two for each thread beyond that one
    assert torch.get_num_threads() == threads
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda n: 1 / n, [1, 0, 1]))
    compared(len(begun), "results")
