"""Hidden states: weights from every kind of file, folding, refusals, and what may not change a bit."""

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchaudio
from conftest import ROOT, call

import common
import extract
from common import Backbone, POSITION, read_json, read_tensors, state_digest


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory):
    """A small wav2vec2 of torchaudio's own making (DEMO's architecture, weight norm in place), as torchaudio saves it
    and as Hugging Face spells it, old and new; and the model itself as the reference."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = torchaudio.models.wav2vec2_model(**common.DEMO).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(model.state_dict(), folder / "torchaudio.pt")
    new = {"wav2vec2." + name.replace("encoder.transformer.", "encoder.").replace("encoder.feature_projection.", "feature_projection."): value
           for name, value in model.state_dict().items()}
    new |= {"wav2vec2.masked_spec_embed": torch.zeros(64), "quantizer.codevectors": torch.zeros(3), "project_hid.weight": torch.zeros(2, 2)}
    old = {name.replace("parametrizations.weight.original0", "weight_g").replace("parametrizations.weight.original1", "weight_v"): value
           for name, value in new.items()}
    torch.save(new, folder / "new.bin")
    torch.save({name.removeprefix("wav2vec2."): value for name, value in old.items()}, folder / "old.bin")
    return folder, model


@pytest.mark.parametrize("file, normalize, z_scored", [
    ("torchaudio.pt", "auto", False), ("torchaudio.pt", "on", True), ("new.bin", "auto", True), ("new.bin", "off", False), ("old.bin", "auto", True)])
def test_every_layer_equals_the_reference(wav2vec2, compared, file, normalize, z_scored):
    folder, model = wav2vec2
    waveform = 0.1 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(1)) + 0.02
    backbone = Backbone("DEMO", folder / file, normalize)
    with torch.no_grad():
        source = (waveform - waveform.mean()) / (waveform.var(correction=0) + (1e-7 if file.endswith("bin") else 1e-5)).sqrt() if z_scored else waveform
        features, _ = model.feature_extractor(source, None)
        reference = [model.encoder.transformer._preprocess(model.encoder.feature_projection(features)), *model.extract_features(source)[0]]
    for layer, states in enumerate(reference):
        assert (backbone.hidden_states(waveform, layer) - states).norm() < 1e-5 * states.norm(), layer
    assert backbone.digest == Backbone("DEMO", folder / "torchaudio.pt").digest  # the same weights, whatever the file
    compared(len(reference), "layers")


def test_hugging_face_base_names_are_all_mapped(compared):
    """The names of the published wav2vec2-base checkpoint fill the whole architecture."""
    theirs = ["feature_extractor.conv_layers.0.layer_norm.weight", "feature_extractor.conv_layers.6.conv.weight", "feature_projection.projection.bias",
              "encoder.pos_conv_embed.conv.weight_g", "encoder.layer_norm.bias", "encoder.layers.11.attention.k_proj.weight",
              "encoder.layers.0.feed_forward.intermediate_dense.bias", "encoder.layers.3.final_layer_norm.weight"]
    ours = set(torchaudio.models.wav2vec2_base().state_dict())
    renamed = common.from_hugging_face({"wav2vec2." + name: None for name in theirs})
    assert len(renamed) == len(theirs)
    assert {name.replace("weight_g", "parametrizations.weight.original0") for name in renamed} <= ours
    compared(len(theirs), "names")


def test_weight_norm_is_folded_in_float64(wav2vec2, compared):
    folder, model = wav2vec2
    folded = common.fold_weight_norm(read_tensors(folder / "torchaudio.pt", ""))[POSITION + "weight"]
    torch.testing.assert_close(folded.float(), model.encoder.transformer.pos_conv_embed.conv.weight, rtol=1e-6, atol=1e-7)
    compared(folded.numel(), "weights")


def test_refused_backbones(tmp_path, fails, monkeypatch, demo, compared):
    base = ["--deam", demo / "DEAM_demo", "--limit", 1, "--features", tmp_path / "f", "--device", "cpu"]
    assert "position bias" in fails(extract, *base, "--bundle", "WAVLM_BASE")
    assert "no bundle NONE" in fails(extract, *base, "--bundle", "NONE")
    assert "--layer 13" in fails(extract, *base, "--bundle", "DEMO", "--layer", 13)
    (tmp_path / "text.bin").write_text("weights")
    torch.save({"encoder.transformer.x": torch.zeros(1)}, tmp_path / "other.bin")
    torch.save([1, 2], tmp_path / "list.bin")
    for name, says in (("text.bin", "not a file of weights"), ("other.bin", "do not fit"), ("list.bin", "not a state dict"), ("none.bin", "cannot read")):
        assert says in fails(extract, *base, "--bundle", "DEMO", "--weights", tmp_path / name)

    def offline(*_):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torchaudio.pipelines._wav2vec2.utils, "_get_state_dict", offline)
    message = fails(extract, *base)
    assert "wav2vec2_fairseq_base_ls960.pth" in message and "--weights" in message and "checkpoints" in message
    assert "tf32 needs an NVIDIA GPU" in fails(extract, *base, "--precision", "tf32")
    assert not (tmp_path / "f").exists()
    compared(9, "refusals")


def test_digests(compared):
    """Worked out by hand with hashlib alone: dtype, shape, little-endian bytes; sorted names."""
    import hashlib

    a = torch.tensor([[1.0, 2.0]])
    by_hand = hashlib.sha256(b"float32 [1, 2]\n" + np.array([1, 2], ">f4").astype("<f4").tobytes()).hexdigest()
    assert common.tensor_digest(a) == common.tensor_digest(a.numpy().astype(">f4")) == by_hand
    assert common.tensor_digest(a.half()) != by_hand != common.tensor_digest(a.T)
    state = {"b": a, "a": a.half()}
    assert state_digest(state) == state_digest(dict(reversed(state.items())))
    assert state_digest(state) == hashlib.sha256(f"a {common.tensor_digest(a.half())}\nb {by_hand}\n".encode()).hexdigest()
    compared(5, "digests")


def songs_of(folder):
    return {song: entry["features"] for song, entry in read_json(folder / "manifest.json", "")["songs"].items()}


@pytest.mark.parametrize("store", ["float32", "float16"])
def test_threads_batches_and_workers_change_no_bit(demo, tmp_path, compared, store):
    results = []
    for threads, batch, workers in ((1, 1, 1), (2, 4, 2), (5, 3, 4)):
        out = tmp_path / f"{threads}"
        assert call(extract, "--deam", demo / "DEAM_demo", "--bundle", "DEMO", "--features", out, "--limit", 7, "--device", "cpu", "--threads", threads,
                    "--batch-size", batch, "--workers", workers, "--store", store) == 0
        results.append((songs_of(out), read_json(out / "manifest.json", "")["digest"]))
    assert results[0] == results[1] == results[2] and len(results[0][0]) == 7
    compared(7, "songs, three ways")


@pytest.mark.parametrize("mode, bias", [("group_norm", False), ("layer_norm", True)])
def test_float64_convolutions_in_chunks_equal_the_librarys(compared, mode, bias):
    """Both kinds of extractor, clips of less than a chunk and of several, with an offset that a careless variance would
    not survive; the same bits at any number of threads."""
    torch.manual_seed(0)
    params = {**common.DEMO, "extractor_mode": mode, "extractor_conv_bias": bias}
    extractor = torchaudio.models.wav2vec2_model(**params).feature_extractor.double()
    lengths = (400, 719, 720, 64 * 320 + 79, 64 * 320 + 80, 50_001)
    for length in lengths:
        waveform = 100 + 0.01 * torch.randn(1, length, dtype=torch.float64)
        with torch.inference_mode():
            expected, _ = extractor(waveform, None)
            found, again = (common.convolve_in_chunks(extractor.conv_layers, waveform, threads) for threads in (1, 3))
        assert found.shape == expected.shape and (found - expected).norm() < 1e-9 * expected.norm(), length
        assert torch.equal(found, again)
    compared(len(lengths), "clips")


def loopback():
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.suppress(OSError):
        socket.create_connection(server.getsockname(), 1).close()
        return True


@pytest.mark.skipif(not loopback(), reason="torchrun's processes talk over 127.0.0.1, which is down here")
def test_several_processes_share_the_songs(demo, tmp_path, compared):
    """As `torchrun --nproc-per-node N` on N GPUs, here on the CPU: one manifest with the digests of one process; and the
    songs that failed anywhere are named once."""
    corpus = shutil.copytree(demo / "DEAM_demo", tmp_path / "corpus")
    songs = sorted(common.DEAMHandler(corpus).audio)[:8]
    (corpus / f"DEAM_audio/MEMD_audio/{songs[1]}.wav").write_bytes(b"")  # the second process's
    command = ["--deam", corpus, "--bundle", "DEMO", "--songs", *songs, "--device", "cpu", "--threads", 1]
    assert call(extract, *command, "--features", tmp_path / "one") == 1
    both = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2", ROOT / "extract.py",
                           *map(str, command), "--features", tmp_path / "two"], capture_output=True, text=True)
    one, two = (read_json(tmp_path / name / "manifest.json", "") for name in ("one", "two"))
    assert one["digest"] == two["digest"] and len(two["songs"]) == 7 and both.returncode == 1, both.stderr
    assert both.stdout.count("failed:") == 1 == both.stdout.count(one["digest"]) and f"{songs[1]}.wav: empty file" in both.stdout
    compared(len(two["songs"]), "songs")


def test_each_process_has_its_gpu(monkeypatch, compared):
    chosen = []
    for name, value in (("is_available", True), ("device_count", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for place in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(place))
        assert common.pick_device("auto") == torch.device("cuda", place)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(common.UserError, match="process 3 has no GPU: torch sees 2"):
        common.pick_device("cuda")
    assert chosen == [0, 1] and common.pick_device("cpu") == torch.device("cpu")
    compared(4, "processes")


def test_ahead_keeps_the_order_and_a_bound(compared):
    begun = []

    def square(n):
        begun.append(n)
        time.sleep(0.002 * (n % 3))
        assert torch.get_num_threads() == 1
        return n * n

    threads = torch.get_num_threads()
    for n, result in enumerate(common.ahead(square, range(40), threads=3)):
        assert result == n * n and len(begun) <= n + 8  # two for each thread beyond the one asked for
    assert torch.get_num_threads() == threads
    with pytest.raises(ZeroDivisionError):
        list(common.ahead(lambda n: 1 / n, [1, 0, 1]))
    compared(len(begun), "results")


def test_settings_are_not_mixed_in_one_folder(demo, tmp_path, fails):
    shutil.copytree(demo / "DEAM_feats", tmp_path / "f")
    message = fails(extract, "--deam", demo / "DEAM_demo", "--bundle", "DEMO", "--features", tmp_path / "f", "--layer", 11, "--device", "cpu", "--precision", "float64")
    assert "layer 10 there, 11 now" in message and "store float16 there, float32 now" in message and "precision" not in message


def test_layers_and_frames(demo, tmp_path, compared):
    """Every stored tensor is [T, D] in the type asked for, about 50 frames a second."""
    manifest = read_json(demo / "DEAM_feats/manifest.json", "")
    for song, entry in manifest["songs"].items():
        features = torch.load(demo / "DEAM_feats/songs" / f"{song}.pt", weights_only=True)
        assert features.shape == (entry["frames"], 64) == (299, 64) and features.dtype == torch.float16
        assert features.untyped_storage().nbytes() == features.numel() * 2
    compared(len(manifest["songs"]), "feature files")
