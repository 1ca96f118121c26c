"""How a Hugging Face repository is laid out, and how it is downloaded."""

import os
import re
from pathlib import Path

import huggingface_hub

from kit.cli import UserError
from kit.files import read_json

INDEX = ".index.json"  # lists the files, called shards, over which weights are distributed
WEIGHTS = ("model.safetensors", "model.safetensors" + INDEX,  # in transformers' order
           "pytorch_model.bin", "pytorch_model.bin" + INDEX)
PROCESSORS = "processor_config.json", "preprocessor_config.json"
REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


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


def fetch(repository, commit, name, optional=False):
    """The path of a repository's file, downloaded unless huggingface_hub's cache has it; None where
    the commit has none. optional: None also where, offline, the cache does not know."""
    known = huggingface_hub.try_to_load_from_cache(repository, name, revision=commit)
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
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
