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
from kit.files import file_digest, load_tensors, read_json
from kit.schema import check_schema

POSITION = "encoder.transformer.pos_conv_embed.conv."
WEIGHTS = "model.safetensors", "pytorch_model.bin"
REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
# what a Hugging Face config.json may leave out: transformers' own defaults, those of wav2vec2-base
HUGGING_FACE = {
    "feat_extract_norm": "group", "conv_dim": [512] * 7, "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2], "conv_bias": False, "hidden_size": 768,
    "feat_proj_dropout": 0.0, "num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 16,
    "num_hidden_layers": 12, "num_attention_heads": 12, "attention_dropout": 0.1,
    "intermediate_size": 3072, "activation_dropout": 0.1, "hidden_dropout": 0.1,
    "do_stable_layer_norm": False, "layerdrop": 0.1, "hidden_act": "gelu",
    "feat_extract_activation": "gelu"}
CONFIGURATION = {
    **{name: [int] if isinstance(value, list) else type(value)
       for name, value in HUGGING_FACE.items()},
    "model_type": ("wav2vec2", "hubert"), "hidden_act": "gelu", "feat_extract_activation": "gelu"}
PROCESSOR = {"sampling_rate": int, "do_normalize": bool}


class Weights(NamedTuple):
    params: dict  # torchaudio's parameters of the architecture
    state: dict  # {torchaudio's name: tensor}
    sample_rate: int  # Hz
    epsilon: float | None  # of the waveform's z-score; None: it is not z-scored
    source: dict  # its name; of a file also revision, file and sha256


def find_weights(name):
    """The Weights that --weights names. Raises UserError."""
    bundles = {key: value for key, value in vars(torchaudio.pipelines).items()
               if isinstance(value, torchaudio.pipelines.Wav2Vec2Bundle)}
    if name in bundles:
        return bundle_weights(name, bundles[name])
    if os.path.isdir(name):
        return folder_weights(name, Path(name))
    if os.path.isfile(name):
        return file_weights(Path(name))
    if REPOSITORY.fullmatch(name) and not os.path.isdir(os.path.dirname(name)):
        return folder_weights(name, *fetch_repository(name))
    raise UserError(f"--weights {name}: no such file or folder, Hugging Face repository "
                    f"(owner/name) or bundle; bundles: {', '.join(sorted(bundles))}")


def bundle_weights(name, bundle):
    if bundle._model_type == "WavLM":
        raise UserError(f"{name} is a WavLM: its layers share one position bias, so the top layers "
                        "cannot be run on cached states; choose a WAV2VEC2_… or HUBERT_… bundle")
    # torchaudio's z-score has layer_norm's epsilon; the Hugging Face processor's is 1e-7
    return Weights({**bundle._params, "aux_num_out": None}, downloaded(bundle, name),
                   int(bundle.sample_rate), 1e-5 if bundle._normalize_waveform else None,
                   {"name": name})


def file_weights(file):
    """Of a file alone: of the base architecture, z-scored where its names are Hugging Face's."""
    state = read_state(file)
    params = {**torchaudio.pipelines.WAV2VEC2_BASE._params, "aux_num_out": None}
    return Weights(params, from_hugging_face(state), 16000,
                   None if in_torchaudios_names(state) else 1e-7, source_of(file, file.name, None))


def folder_weights(name, folder, commit=None):
    """Of a folder laid out like a Hugging Face repository, or of a repository at a commit."""
    config = HUGGING_FACE | read_json(folder / "config.json", "a Hugging Face configuration",
                                      {str: object})
    check_schema(config, CONFIGURATION, f"{folder / 'config.json'} describes no network of this kind")
    params = torchaudio.models.wav2vec2.utils.import_huggingface._get_config(
        SimpleNamespace(**config))
    params = {**params, "aux_num_out": None, "extractor_conv_layer_config":
              [list(layer) for layer in params["extractor_conv_layer_config"]]}
    processor = {"sampling_rate": 16000, "do_normalize": True}
    if (folder / "preprocessor_config.json").exists():
        processor |= read_json(folder / "preprocessor_config.json", "a processor's configuration",
                               {str: object})
    check_schema(processor, PROCESSOR, f"{folder / 'preprocessor_config.json'} is no processor")
    file = next((folder / file for file in WEIGHTS if (folder / file).exists()), None)
    if file is None:
        raise UserError(f"no weights in {name}: it has neither {' nor '.join(WEIGHTS)}")
    return Weights(params, from_hugging_face(read_state(file)), processor["sampling_rate"],
                   1e-7 if processor["do_normalize"] else None,
                   source_of(file, name.partition("@")[0] if commit else folder.resolve().name,
                             commit))


def weights_name(source):
    """What --weights is to be to find a manifest's `source` again."""
    return source["name"] + (f"@{source['revision']}" if source.get("revision") else "")


def source_of(file, name, revision):
    return {"name": name, "revision": revision, "file": file.name, "sha256": file_digest(file)}


def read_state(file):
    """The tensors of a .safetensors file or a pickled state dict. Raises UserError."""
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file} is not a file of weights: damaged ({error})") from None
    state = load_tensors(file, "a file of weights")
    check_schema(state, {str: torch.Tensor}, f"{file} is not a state dict")
    return state


def fetch_repository(name):
    """Download a Hugging Face repository's configuration and weights, or find them in
    huggingface_hub's cache → (folder, the commit it is at). Raises UserError."""
    import huggingface_hub  # here, because only this needs it and it is slow to load
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, revision = REPOSITORY.fullmatch(name).groups()

    def fetch(file):
        """Its path, or None where the commit has no such file: the cache remembers that too."""
        if huggingface_hub.try_to_load_from_cache(repository, file, revision=commit) is (
                huggingface_hub._CACHED_NO_EXIST):
            return None
        try:
            return huggingface_hub.hf_hub_download(repository, file, revision=commit)
        except LocalEntryNotFoundError:  # an EntryNotFoundError too, but for want of a network
            if not huggingface_hub.constants.HF_HUB_OFFLINE or file not in WEIGHTS:
                raise
        except EntryNotFoundError:
            pass
        return None

    try:
        folder = Path(huggingface_hub.hf_hub_download(repository, "config.json",
                                                      revision=revision)).parent
        commit = folder.name  # of all files, though the branch may move on meanwhile
        fetch("preprocessor_config.json")
        next(filter(None, map(fetch, WEIGHTS)), None)
    except Exception as error:  # the hub's own, its HTTP client's, the system's: many kinds
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise UserError(f"{name} is not a wav2vec2 repository: it has no config.json") from None
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise UserError(f"cannot get {name} from Hugging Face ({reason[:150]}): check the name and "
                        "the network, or download its files elsewhere and pass the folder with "
                        "--weights") from None
    return folder, commit


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


def in_torchaudios_names(state):
    return any(name.startswith("encoder.transformer.") for name in state)


def from_hugging_face(state):
    """Rename a Hugging Face wav2vec2 or HuBERT state dict to torchaudio's names, pretraining-only
    parts dropped; one in torchaudio's names stays as it is."""
    if in_torchaudios_names(state):
        return state
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"^(wav2vec2|hubert)\.", "", name)
        if name.startswith("feature_extractor."):
            renamed[name] = value
        elif name.startswith("feature_projection."):
            renamed["encoder." + name] = value
        elif name.startswith("encoder."):
            renamed["encoder.transformer." + name.removeprefix("encoder.")] = value
    return renamed


def fold_weight_norm(state):
    """Replace the positional convolution's direction and length by their product, in either
    spelling of weight norm: once, in exact arithmetic, because torch's bits follow the threads."""
    state = dict(state)
    spellings = ("weight_g", "weight_v"), ("parametrizations.weight.original0",
                                           "parametrizations.weight.original1")
    for length, direction in spellings:
        if POSITION + length in state and POSITION + direction in state:
            g, v = (state.pop(POSITION + part).double() for part in (length, direction))
            with Exact():
                state[POSITION + "weight"] = v * (g / (v * v).sum((0, 1), keepdim=True).sqrt())
    return state
