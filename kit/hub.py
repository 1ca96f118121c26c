"""How a Hugging Face repository is laid out, and how it is downloaded."""

import os
import re
from pathlib import Path

from kit.cli import UserError
from kit.files import read_json, shortened

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
    present = shortened(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise UserError(f"no weights in {name}: it has neither {' nor '.join(WEIGHTS[::2])}, nor an "
                    f"index of shards, but {present}")


def shards_of(file):
    """{tensor's name: the file beside it that holds it} of an index; of any other file {}."""
    if not file.name.endswith(INDEX):
        return {}
    shards = read_json(file, "an index of shards", {"weight_map": {str: str}})["weight_map"]
    if not shards or any(Path(shard).name != shard for shard in shards.values()):
        raise UserError(f"{file} is not an index of shards: it has to name files beside it")
    return {name: file.parent / shard for name, shard in shards.items()}


def fetch_repository(name):
    """Download a Hugging Face repository's configuration and weights, or find them in
    huggingface_hub's cache → (folder, the commit it is at). Raises UserError."""
    import huggingface_hub  # here, because only this needs it and it is slow to load
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, revision = REPOSITORY.fullmatch(name).groups()

    def fetch(file, optional=False):
        """Its path, or None where the commit has no such file: the cache remembers that too.
        optional: None also where, without network, the cache does not know."""
        if huggingface_hub.try_to_load_from_cache(repository, file, revision=commit) is (
                huggingface_hub._CACHED_NO_EXIST):
            return None
        try:
            return huggingface_hub.hf_hub_download(repository, file, revision=commit)
        except LocalEntryNotFoundError:  # an EntryNotFoundError too, but for want of a network
            if not huggingface_hub.constants.HF_HUB_OFFLINE or not optional:
                raise
        except EntryNotFoundError:
            pass
        return None

    try:
        folder = Path(huggingface_hub.hf_hub_download(repository, "config.json",
                                                      revision=revision)).parent
        commit = folder.name  # of all files, though the branch may move on meanwhile
        # a cache filled by others may not know of the newer of the two files
        fetch(PROCESSORS[0], optional=fetch(PROCESSORS[1]) is not None)
        file = next(filter(None, (fetch(file, optional=True) for file in WEIGHTS)), "")
        for shard in set(shards_of(Path(file)).values()):
            fetch(shard.name)
    except UserError:
        raise
    except Exception as error:  # the hub's own, its HTTP client's, the system's: many kinds
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise UserError(f"{name} is not a wav2vec2 repository: it has no config.json") from None
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise UserError(f"cannot get {name} from Hugging Face ({reason[:150]}): check the name and "
                        "the network, or download its files elsewhere and pass the folder with "
                        "--weights") from None
    return folder, commit
