"""A backbone's network: torchaudio's wav2vec2 of an architecture that is checked, with its weights;
and its top layers in a file of their own, which train.py starts from.
"""

import threading
from unittest import mock

import torch
import torchaudio
from torch import nn

from kit.audio import RATES
from kit.cli import UserError
from kit.files import plain_json, read_tensors, shortened, state_digest
from kit.weights import find_weights, fold_weight_norm, misfit

PARAMS = {
    "extractor_mode": ("group_norm", "layer_norm"), "extractor_conv_layer_config": [[int]],
    "extractor_conv_bias": bool, "encoder_embed_dim": int, "encoder_projection_dropout": float,
    "encoder_pos_conv_kernel": int, "encoder_pos_conv_groups": int, "encoder_num_layers": int,
    "encoder_num_heads": int, "encoder_attention_dropout": float,
    "encoder_ff_interm_features": int, "encoder_ff_interm_dropout": float,
    "encoder_dropout": float, "encoder_layer_norm_first": bool, "encoder_layer_drop": float,
    "aux_num_out": None}
one_at_a_time = threading.Lock()  # what network() patches is the process's
TOP_LAYERS = {"params": PARAMS, "layer": int, "state": {str: torch.Tensor}}


def network(params):
    """torchaudio's wav2vec2 network without weights (they are assigned, not copied over random
    ones), without its positional weight norm. Raises UserError for impossible params.
    params: torchaudio's, and perhaps `layer_norm_eps`: as in transformers, the epsilon of every
    layer norm behind the convolutions."""
    params = dict(params)
    epsilon = params.pop("layer_norm_eps", 1e-5)
    sizes = [size for layer in params["extractor_conv_layer_config"] for size in layer]
    sizes += [value for name, value in params.items() if name.startswith("encoder_")
              and type(value) is int and "drop" not in name]
    rates = [value for name, value in params.items() if "drop" in name]
    try:  # torchaudio takes a billion layers, and no heads, without a word
        if not all(0 < size <= 100_000 for size in sizes) or params["encoder_num_layers"] > 1000:
            raise ValueError("a size is out of range")
        if not all(0 <= rate <= 1 for rate in rates):
            raise ValueError("a dropout rate is not from 0 to 1")
        if not 0 <= epsilon <= 1:
            raise ValueError("layer_norm_eps is not from 0 to 1")
        # torchaudio would add weight norm to the positional convolution, for which torch imports
        # its compiler; in the weights it is folded already (kit.weights.fold_weight_norm)
        with (one_at_a_time, torch.device("meta"),
              mock.patch.object(nn.utils.parametrizations, "weight_norm", lambda conv, **_: conv)):
            model = torchaudio.models.wav2vec2_model(**params)
    except (ValueError, RuntimeError, TypeError, ZeroDivisionError, IndexError) as error:
        raise UserError(f"there is no network of this architecture: {error}") from None
    for module in model.encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = epsilon
    return model.eval()


def load_network(weights):
    """(the Weights that --weights names, their network). Raises UserError for weights that are
    unreadable, do not fit their architecture, or are not finite."""
    found = find_weights(weights)
    if not RATES[0] <= found.sample_rate <= RATES[1]:
        raise UserError(f"{weights}: its sample rate is {found.sample_rate} Hz, not one from "
                        f"{RATES[0]} to {RATES[1]}")
    model = network(found.params)
    state = {name: tensor for name, tensor in fold_weight_norm(found.state).items()
             if not name.startswith("aux.")}  # a speech recogniser's output layer
    if problem := misfit(state, model.state_dict()):
        raise UserError(f"{weights}: these weights do not fit {found.architecture} ({problem})")
    state = {name: tensor.float() for name, tensor in state.items()}
    if bad := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise UserError(f"{weights}: NaN or infinity in {shortened(bad)}")
    model.load_state_dict(state, assign=True)
    return found, model


def state_above(model, layer):
    """The state of a network's encoder layers above `layer` and of its final norm, in the names of
    an EmotionModel."""
    transformer = model.encoder.transformer
    above = {"layers": transformer.layers[layer:], "norm": transformer.layer_norm}
    return {f"{part}.{name}": value for part, module in above.items()
            for name, value in module.state_dict().items()}


def read_top_layers(folder, manifest):
    """The top_layers.pt of a features folder. Raises UserError if it is not the manifest's."""
    file = folder / "top_layers.pt"
    top = read_tensors(file, "the backbone's top layers", TOP_LAYERS)
    if (top["layer"] != manifest["settings"]["layer"]
            or plain_json(top["params"]) != manifest["params"]
            or state_digest(top["state"]) != manifest["top_layers"]):
        raise UserError(f"{file} is not the one of the manifest; run extract.py again")
    return top


def start_from(model, top_layers):
    """Give an EmotionModel the layers and the norm of a backbone's top layers. Raises UserError if
    they are not of its architecture."""
    state = top_layers["state"]
    expected = {name: value.shape for name, value in model.state_dict().items()
                if name.startswith(("layers.", "norm."))}
    if expected != {name: value.shape for name, value in state.items()}:
        raise UserError("the top layers of these features are not those of their architecture; run "
                        "extract.py again")
    model.load_state_dict(state, strict=False, assign=True)
