"""Where a backbone's weights come from: a torchaudio bundle, a Hugging Face repository or folder,
or a file. Architecture and waveform normalisation are read from what stands beside the weights.
"""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import urljoin

import huggingface_hub
import safetensors.torch
import torch
import torchaudio

from exact import Exact
from kit.cli import UserError
from kit.files import file_digest, load_tensors, read_json, sha256, shortened
from kit.schema import check_schema

REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
INDEX = ".index.json"  # lists the files, called shards, over which weights are distributed
WEIGHTS = ("model.safetensors", "model.safetensors" + INDEX,  # in transformers' order
           "pytorch_model.bin", "pytorch_model.bin" + INDEX)
PROCESSORS = "processor_config.json", "preprocessor_config.json"
# What a Hugging Face config.json may leave out: transformers' own defaults, those of wav2vec2-base.
# Its other fields concern heads, pretraining and masks in training, but for those of SUPPORTED.
HUGGING_FACE = {
    "feat_extract_norm": "group", "conv_dim": [512] * 7, "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2], "conv_bias": False, "hidden_size": 768,
    "feat_proj_dropout": 0.0, "num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 16,
    "num_hidden_layers": 12, "num_attention_heads": 12, "attention_dropout": 0.1,
    "intermediate_size": 3072, "activation_dropout": 0.1, "hidden_dropout": 0.1,
    "do_stable_layer_norm": False, "layerdrop": 0.1, "layer_norm_eps": 1e-5}
CONFIGURATION = {name: [int] if isinstance(value, list) else type(value)
                 for name, value in HUGGING_FACE.items()}
SUPPORTED = {  # the values that a field may have; the first is meant where it is left out
    "model_type": ("wav2vec2", "hubert"), "hidden_act": ("gelu",),
    "feat_extract_activation": ("gelu",), "feat_proj_layer_norm": (True,),
    "conv_pos_batch_norm": (False,), "adapter_attn_dim": (None,), "quantization_config": (None,)}
PROCESSOR = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": int,
             "do_normalize": bool}
RENAMED = {  # how names begin in Hugging Face's state dicts, and in torchaudio's
    "feature_extractor.": "feature_extractor.",
    "feature_projection.": "encoder.feature_projection.", "encoder.": "encoder.transformer."}
POSITION = "encoder.transformer.pos_conv_embed.conv."  # the positional convolution
WEIGHT_NORM = (("weight_g", "weight_v"),  # length and direction, in either spelling
               ("parametrizations.weight.original0", "parametrizations.weight.original1"))


class Weights(NamedTuple):
    params: dict  # torchaudio's parameters of the architecture
    state: dict  # {torchaudio's name: tensor}
    sample_rate: int  # Hz
    epsilon: float | None  # of the waveform's z-score; None: it is not z-scored
    source: dict  # its name; of a file also revision, file and sha256
    architecture: str  # where params are from


def find_weights(name):
    """The Weights that --weights names. Raises UserError."""
    # not WavLM's: its layers share one position bias, and cannot run on cached states
    bundles = {key: value for key, value in vars(torchaudio.pipelines).items()
               if isinstance(value, torchaudio.pipelines.Wav2Vec2Bundle)
               and value._model_type == "Wav2Vec2"}
    if name in bundles:
        return bundle_weights(name, bundles[name])
    if os.path.isdir(name):
        return local_weights(Path(name), Path(name).resolve().name)
    if os.path.isfile(name):
        return local_weights(Path(name).parent, Path(name).name, Path(name))
    if REPOSITORY.fullmatch(name) and not os.path.isdir(os.path.dirname(name)):
        folder, commit = fetch_repository(name)
        return local_weights(folder, name.partition("@")[0], commit=commit)
    raise UserError(f"no backbone {name}: there is no such file or folder; --weights also takes a "
                    "Hugging Face repository (owner/name) or one of torchaudio's bundles, "
                    f"{', '.join(sorted(bundles))}")


def bundle_weights(name, bundle):
    """Of one of torchaudio's bundles."""
    try:
        state = dict(torchaudio.pipelines._wav2vec2.utils._get_state_dict(
            bundle._path, {"progress": sys.stderr.isatty()}))
    except Exception as error:  # urllib's, or torch.load's on a damaged download
        url = urljoin("https://download.pytorch.org/torchaudio/models/", bundle._path)
        reason = str(error).partition("\n")[0][:150]
        raise UserError(f"cannot get the weights of {name} ({reason}): check the network, or fetch "
                        f"{url} elsewhere and put it into {Path(torch.hub.get_dir())}/checkpoints, "
                        "in place of a damaged file perhaps") from None
    # torchaudio's z-score has layer_norm's epsilon; the Hugging Face processor's is 1e-7
    return Weights({**bundle._params, "aux_num_out": None}, state, int(bundle.sample_rate),
                   1e-5 if bundle._normalize_waveform else None, {"name": name}, name)


def local_weights(folder, name, file=None, commit=None):
    """Of a folder laid out like a Hugging Face repository, or of one file and what stands beside
    it. A file may do without: it is of the base architecture, and z-scored where its names are
    Hugging Face's."""
    config = folder / "config.json"
    if file is None or os.path.lexists(config):
        params, architecture = read_architecture(config), str(config)
    else:
        params = {**torchaudio.pipelines.WAV2VEC2_BASE._params, "aux_num_out": None}
        architecture = "wav2vec2-base, for want of a config.json beside them"
    processor, file = read_processor(folder), file or file_in(folder, name)
    state, renamed = in_torchaudios_names(read_state(file))
    if processor is None:
        processor = {"sampling_rate": 16000,
                     "do_normalize": renamed or architecture == str(config)}
    return Weights(params, state, processor["sampling_rate"],
                   1e-7 if processor["do_normalize"] else None, source_of(file, name, commit),
                   architecture)


def weights_name(source):
    """What --weights is to be to find a manifest's `source` again."""
    return source["name"] + (f"@{source['revision']}" if source.get("revision") else "")


def fetch(repository, commit, name, optional=False):
    """The path of a repository's file, downloaded unless huggingface_hub's cache has it; None where
    the commit has none. optional: None also where, offline, the cache does not know."""
    known = huggingface_hub.try_to_load_from_cache(repository, name, revision=commit)
    offline = huggingface_hub.is_offline_mode()
    if known is huggingface_hub._CACHED_NO_EXIST or not known and offline and optional:
        return None
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, revision=commit))
    except huggingface_hub.errors.RemoteEntryNotFoundError:
        return None


def fetch_repository(name):
    """Download a Hugging Face repository's configuration and weights, or find them in
    huggingface_hub's cache → (folder, the commit it is at). Raises UserError."""
    repository, revision = REPOSITORY.fullmatch(name).groups()
    try:
        folder = Path(huggingface_hub.hf_hub_download(repository, "config.json",
                                                      revision=revision)).parent
        commit = folder.name  # of all files, though the branch may move on meanwhile
        # a cache filled by others may not know of the newer of the two files
        older = fetch(repository, commit, PROCESSORS[1])
        fetch(repository, commit, PROCESSORS[0], optional=older is not None)
        files = (fetch(repository, commit, file, optional=True) for file in WEIGHTS)
        file = next(filter(None, files), None)
        for shard in shards_of(file) if file else ():
            fetch(repository, commit, shard.name)
    except UserError:
        raise
    except huggingface_hub.errors.RemoteEntryNotFoundError:
        raise UserError(f"{name} is not a wav2vec2 repository: it has no config.json") from None
    except Exception as error:  # the hub's own, its HTTP client's, the system's: many kinds
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise UserError(f"cannot get {name} from Hugging Face ({reason[:150]}): check the name and "
                        "the network, or download its files elsewhere and pass the folder with "
                        "--weights") from None
    return folder, commit


def read_architecture(file):
    """torchaudio's parameters, and `layer_norm_eps`, of a Hugging Face config.json."""
    given = read_json(file, "a Hugging Face configuration", {"model_type": str})
    for field, values in SUPPORTED.items():
        if given.get(field, values[0]) not in values:
            raise UserError(f"{file}: not supported: {field} {given[field]!r}, only "
                            f"{' and '.join(map(repr, values))}")
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


def file_in(folder, name):
    """The file of weights in a folder, or the index of its shards."""
    for file in WEIGHTS:
        if os.path.lexists(folder / file):
            return folder / file
    raise UserError(f"no weights in {name}: it has none of {', '.join(WEIGHTS)}")


def shards_of(file):
    """The files that hold the tensors of a file of weights, by name: of an index the shards that it
    lists, else the file itself. Raises UserError."""
    if not file.name.endswith(INDEX):
        return [file]
    index = read_json(file, "an index of shards", {"weight_map": {str: str}})
    names = sorted(set(index["weight_map"].values()))
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{file} is not an index of shards: it has to name files beside it")
    return [file.parent / name for name in names]


def source_of(file, name, revision):
    """The sha256 of shards is that of what sha256sum prints of them, in the order of names."""
    if (shards := shards_of(file)) == [file]:
        digest = file_digest(file)
    else:
        lines = [f"{file_digest(shard)}  {shard.name}\n" for shard in shards]
        digest = sha256("".join(lines).encode())
    return {"name": name, "revision": revision, "file": file.name, "sha256": digest}


def read_state(file):
    """The tensors of a file, or of all shards of an index. Raises UserError."""
    return {name: value for shard in shards_of(file) for name, value in read_file(shard).items()}


def read_file(file):
    """The tensors of a file in safetensors' format or a pickled state dict. Raises UserError."""
    try:
        with open(file, "rb") as opened:
            beginning = opened.read(100)
    except OSError as error:
        raise UserError(f"cannot read a file of weights {file}: {error.strerror}") from None
    if not re.search(rb"[\0-\x08\x0e-\x1f]", beginning):
        text = " ".join(beginning.decode(errors="replace").split())[:60]
        content = f"a text, {text!r}" if text else "empty"
        raise UserError(f"{file} is not a file of weights: it is {content}; download it again, a "
                        "Git LFS pointer with git lfs pull")
    if beginning[8:9] == b"{":  # safetensors' header, behind its length
        try:
            return safetensors.torch.load_file(file)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file} is not a file of weights: damaged ({error})") from None
    state = load_tensors(file, "a file of weights")
    check_schema(state, {str: torch.Tensor}, f"{file} is not a state dict")
    return state


def in_torchaudios_names(state):
    """(state dict in torchaudio's names, whether it was in Hugging Face's). Of a Hugging Face model
    with heads only the backbone, whose names begin with `wav2vec2.` or `hubert.`, stays."""
    for prefix in ("wav2vec2.", "hubert."):
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()
                     if name.startswith(prefix)}
    if any(name.startswith("encoder.transformer.") for name in state):
        return state, False
    return {ours + name.removeprefix(theirs): value for name, value in state.items()
            for theirs, ours in RENAMED.items() if name.startswith(theirs)}, True


def misfit(state, expected):
    """In words, how a state dict differs from the `expected` one of a network; "" if it fits."""
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
    for names in WEIGHT_NORM:
        length, direction = (state.get(POSITION + name) for name in names)
        if length is None or direction is None or direction.ndim != 3 or (
                length.shape != (1, 1, direction.shape[2])):
            continue
        for name in names:
            del state[POSITION + name]
        length, direction = length.double(), direction.double()
        with Exact():
            norm = (direction * direction).sum((0, 1), keepdim=True).sqrt()
            state[POSITION + "weight"] = direction * (length / norm)
    return state
