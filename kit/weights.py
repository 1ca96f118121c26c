"""Where a backbone's weights come from: a torchaudio bundle, a Hugging Face repository or folder,
or a file. Architecture and waveform normalisation are read from what stands beside the weights.
"""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torchaudio

from kit.cli import UserError
from exact import Exact
from kit.files import file_digest, load_tensors, read_json, sha256, shortened
from kit.hub import PROCESSORS, REPOSITORY, fetch_repository, file_in, shards_of
from kit.schema import check_schema

POSITION = "encoder.transformer.pos_conv_embed.conv."
# What a Hugging Face config.json may leave out: transformers' own defaults, those of wav2vec2-base.
# Its other fields concern heads, pretraining and masks in training, but for those of UNSUPPORTED.
HUGGING_FACE = {
    "feat_extract_norm": "group", "conv_dim": [512] * 7, "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2], "conv_bias": False, "hidden_size": 768,
    "feat_proj_dropout": 0.0, "num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 16,
    "num_hidden_layers": 12, "num_attention_heads": 12, "attention_dropout": 0.1,
    "intermediate_size": 3072, "activation_dropout": 0.1, "hidden_dropout": 0.1,
    "do_stable_layer_norm": False, "layerdrop": 0.1, "layer_norm_eps": 1e-5}
CONFIGURATION = {name: [int] if isinstance(value, list) else type(value)
                 for name, value in HUGGING_FACE.items()}
UNSUPPORTED = {  # field: (the value that it may have, what another one means)
    "hidden_act": ("gelu", "an activation function other than gelu"),
    "feat_extract_activation": ("gelu", "an activation function other than gelu"),
    "adapter_attn_dim": (None, "attention adapters (as in MMS)"),
    "feat_proj_layer_norm": (True, "a feature projection without layer norm"),
    "conv_pos_batch_norm": (False, "batch norm in the positional convolution"),
    "quantization_config": (None, "quantized weights")}
UNSUPPORTED_NAMES = {  # what a part of a tensor's name says, with or without a config.json
    ".adapter_layer.": "attention adapters (as in MMS)", "lora_": "LoRA adapters",
    "pos_conv_embed.batch_norm.": "batch norm in the positional convolution",
    "gru_rel_pos": "WavLM's position bias"}
PROCESSOR = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": int,
             "do_normalize": bool}
BEGINNINGS = {b"version https://git-lfs": "a Git LFS pointer to them: run git lfs pull",
              b"<": "an HTML page", b"\x89HDF": "an HDF5 file, as TensorFlow writes it"}


class Weights(NamedTuple):
    params: dict  # torchaudio's parameters of the architecture
    state: dict  # {torchaudio's name: tensor}
    sample_rate: int  # Hz
    epsilon: float | None  # of the waveform's z-score; None: it is not z-scored
    source: dict  # its name; of a file also revision, file and sha256
    architecture: str  # where params are from


def find_weights(name):
    """The Weights that --weights names. Raises UserError."""
    bundles = {key: value for key, value in vars(torchaudio.pipelines).items()
               if isinstance(value, torchaudio.pipelines.Wav2Vec2Bundle)}
    if name in bundles:
        return bundle_weights(name, bundles[name])
    if os.path.isdir(name):
        return local_weights(Path(name), Path(name).resolve().name)
    if os.path.isfile(name):
        if re.search(r"-of-(?!00001)\d{5}\.", Path(name).name):
            raise UserError(f"{name} is one of several shards: name their folder or index")
        return local_weights(Path(name).parent, Path(name).name, Path(name))
    if REPOSITORY.fullmatch(name) and not os.path.isdir(os.path.dirname(name)):
        folder, commit = fetch_repository(name)
        return local_weights(folder, name.partition("@")[0], commit=commit)
    raise UserError(f"--weights {name}: no such file or folder, Hugging Face repository "
                    f"(owner/name) or bundle; bundles: {', '.join(sorted(bundles))}")


def bundle_weights(name, bundle):
    if bundle._model_type == "WavLM":
        raise UserError(f"{name} is a WavLM: its layers share one position bias, so the top layers "
                        "cannot be run on cached states; choose a WAV2VEC2_… or HUBERT_… bundle")
    # torchaudio's z-score has layer_norm's epsilon; the Hugging Face processor's is 1e-7
    return Weights({**bundle._params, "aux_num_out": None}, downloaded(bundle, name),
                   int(bundle.sample_rate), 1e-5 if bundle._normalize_waveform else None,
                   {"name": name}, name)


def local_weights(folder, name, file=None, commit=None):
    """Of a folder laid out like a Hugging Face repository, or of one file and what stands beside
    it. A file may do without: it is of the base architecture, and z-scored where its names are
    Hugging Face's."""
    config = folder / "config.json"
    bare = file is not None and not os.path.lexists(config)
    params = ({**torchaudio.pipelines.WAV2VEC2_BASE._params, "aux_num_out": None} if bare
              else read_architecture(config))
    processor, file = read_processor(folder), file or file_in(folder, name)
    state = read_state(file)
    if processor is None:
        processor = {"sampling_rate": 16000,
                     "do_normalize": not (bare and in_torchaudios_names(state))}
    return Weights(params, from_hugging_face(state), processor["sampling_rate"],
                   1e-7 if processor["do_normalize"] else None, source_of(file, name, commit),
                   "wav2vec2-base, for want of a config.json beside them" if bare else str(config))


def read_architecture(file):
    """torchaudio's parameters, and `layer_norm_eps`, of a Hugging Face config.json."""
    given = read_json(file, "a Hugging Face configuration", {str: object})
    model_type = given.get("model_type")
    if model_type not in ("wav2vec2", "hubert"):
        raise UserError(f"{file}: not supported: model_type {model_type!r}, only wav2vec2 and "
                        "hubert")
    for field, (value, meaning) in UNSUPPORTED.items():
        if given.get(field, value) != value:
            raise UserError(f"{file}: not supported: {meaning} ({field} {given[field]!r})")
    config = HUGGING_FACE | given
    check_schema(config, CONFIGURATION, f"{file} describes no network of this kind")
    lengths = {len(config[field]) for field in ("conv_dim", "conv_kernel", "conv_stride")}
    if lengths != {config.get("num_feat_extract_layers", len(config["conv_dim"]))}:
        raise UserError(f"{file}: conv_dim, conv_kernel, conv_stride and num_feat_extract_layers "
                        "differ in the number of convolutions")
    params = torchaudio.models.wav2vec2.utils.import_huggingface._get_config(
        SimpleNamespace(**config))
    layers = [list(layer) for layer in params["extractor_conv_layer_config"]]
    return {**params, "extractor_conv_layer_config": layers, "aux_num_out": None,
            "layer_norm_eps": config["layer_norm_eps"]}


def read_processor(folder):
    """{"sampling_rate": Hz, "do_normalize": bool} of the feature extractor in processor_config.json
    or, where it holds none, of preprocessor_config.json, as transformers 5 chooses; None where
    neither is there."""
    for file in (folder / name for name in PROCESSORS if os.path.lexists(folder / name)):
        processor = read_json(file, "a processor's configuration", {str: object})
        if file.name == PROCESSORS[0]:
            processor = processor.get("feature_extractor", processor.get("audio_processor"))
        if processor is not None:
            complaint = f"{file} is no processor's configuration for wav2vec2"
            check_schema(processor, dict, complaint)
            processor = {"feature_extractor_type": "Wav2Vec2FeatureExtractor",
                         "sampling_rate": 16000, "do_normalize": True, **processor}
            check_schema(processor, PROCESSOR, complaint)
            return processor
    return None


def weights_name(source):
    """What --weights is to be to find a manifest's `source` again."""
    return source["name"] + (f"@{source['revision']}" if source.get("revision") else "")


def source_of(file, name, revision):
    """The sha256 of shards is that of what sha256sum prints of them, in the order of names."""
    shards = sorted(set(shards_of(file).values()))
    digests = [f"{file_digest(shard)}  {shard.name}\n" for shard in shards]
    return {"name": name, "revision": revision, "file": file.name,
            "sha256": sha256("".join(digests).encode()) if shards else file_digest(file)}


def read_state(file):
    """The tensors of a file, or of all shards of an index. Raises UserError."""
    shards = shards_of(file)
    if not shards:
        return read_file(file)
    content = {shard: read_file(shard) for shard in set(shards.values())}
    if lacking := [name for name, shard in shards.items() if name not in content[shard]]:
        raise UserError(f"{file} names shards that do not hold {shortened(lacking)}")
    return {name: content[shard][name] for name, shard in shards.items()}


def read_file(file):
    """The tensors of a file in safetensors' format or a pickled state dict. Raises UserError."""
    try:
        with open(file, "rb") as opened:
            beginning = opened.read(100)
    except OSError as error:
        raise UserError(f"cannot read a file of weights {file}: {error.strerror}") from None
    content = next((what for start, what in BEGINNINGS.items()
                    if beginning.lstrip().startswith(start)), None)
    if not content and not re.search(rb"[\0-\x08\x0e-\x1f]", beginning):
        text = beginning.decode(errors="replace").strip().partition("\n")[0]
        content = f"a text ({text[:50]} …)" if text else "empty"
    if content:
        raise UserError(f"{file} is not a file of weights: it is {content}")
    if beginning[8:9] == b"{":  # safetensors' header, behind its length
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file} is not a file of weights: damaged ({error})") from None
    state = load_tensors(file, "a file of weights")
    check_schema(state, {str: torch.Tensor}, f"{file} is not a state dict")
    return state


def downloaded(bundle, name):
    try:
        return dict(torchaudio.pipelines._wav2vec2.utils._get_state_dict(
            bundle._path, {"progress": sys.stderr.isatty()}))
    except OSError as error:  # urllib's errors are OSErrors
        url = bundle._path
        if not url.startswith("https"):
            url = f"https://download.pytorch.org/torchaudio/models/{url}"
        raise UserError(f"cannot download the weights of {name} ({error}): fetch {url} elsewhere "
                        f"and place it in {Path(torch.hub.get_dir()) / 'checkpoints'}, or pass it "
                        "with --weights") from None
    except Exception as error:  # torch.load's, on a damaged download
        raise UserError(f"the downloaded weights of {name} are damaged ({error}): delete them from "
                        f"{Path(torch.hub.get_dir()) / 'checkpoints'} and rerun") from None


def without_prefix(state):
    """Of a model with heads only the backbone, whose names begin with `wav2vec2.` or `hubert.`; a
    state dict without such names stays as it is."""
    for prefix in ("wav2vec2.", "hubert."):
        if any(name.startswith(prefix) for name in state):
            return {name.removeprefix(prefix): value for name, value in state.items()
                    if name.startswith(prefix)}
    return state


def in_torchaudios_names(state):
    return any(name.startswith("encoder.transformer.") for name in without_prefix(state))


def from_hugging_face(state):
    """Rename a Hugging Face wav2vec2 or HuBERT state dict to torchaudio's names, parts that only
    heads and pretraining need dropped; one in torchaudio's names keeps them."""
    state, renamed = without_prefix(state), {}
    if in_torchaudios_names(state):
        return state
    for name, value in state.items():
        if name.startswith("feature_extractor."):
            renamed[name] = value
        elif name.startswith("feature_projection."):
            renamed["encoder." + name] = value
        elif name.startswith("encoder."):
            renamed["encoder.transformer." + name.removeprefix("encoder.")] = value
    return renamed or state


def misfit(state, expected):
    """In words, how a state dict differs from the `expected` one of a network; "" if it fits."""
    for part, meaning in UNSUPPORTED_NAMES.items():
        if any(part in name for name in state):
            return f"not supported: {meaning}"
    both = [name for name in expected if name in state]
    differences = {
        "of another shape": [name for name in both if state[name].shape != expected[name].shape],
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "not floating-point": [name for name in both if not state[name].is_floating_point()]}
    return next((f"{what}: {shortened(names)}" for what, names in differences.items() if names), "")


def fold_weight_norm(state):
    """Replace the positional convolution's direction and length by their product, in either
    spelling of weight norm: once, in exact arithmetic, because torch's bits follow the threads."""
    state = dict(state)
    spellings = ("weight_g", "weight_v"), ("parametrizations.weight.original0",
                                           "parametrizations.weight.original1")
    for length, direction in spellings:
        g, v = (state.get(POSITION + part) for part in (length, direction))
        if g is not None and v is not None and v.ndim == 3 and g.shape == (1, 1, v.shape[2]):
            g, v = (state.pop(POSITION + part).double() for part in (length, direction))
            with Exact():
                state[POSITION + "weight"] = v * (g / (v * v).sum((0, 1), keepdim=True).sqrt())
    return state
