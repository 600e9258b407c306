"""In: the name of a model. Out: the model in evaluation mode on its device, or one clear error; its identity."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from actstore.errors import InputError
from actstore.schema import ModelIdentity
from pipelines.compute.cpu_products import speed_up
from pipelines.models.builtin import model_path
from pipelines.models.families.registry import families, family_of
from pipelines.shared.error_line import first_line
from pipelines.shared.hub_connection import go_offline_if_unreachable
from pipelines.text.codec import TextCodec, load_tokenizer


def load_model(name: str, device: str, compute_dtype: str) -> nn.Module:
    """A causal language model of a known family: `builtin`, a hub id, or a local folder.

    The family may change the configuration first (`Family.adjusted`). oneDNN computes dense float32 layers on a CPU
    (`pipelines.compute.cpu_products`). Raises InputError when there is no such model, no network for a hub id, or a weight
    that is missing or has another shape.
    """
    source = resolve_model(name)
    if not Path(source).exists():
        go_offline_if_unreachable()
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    _require_no_adapter(name, source)
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type not in families():
            raise InputError(f"model {name}: family {config.model_type!r}; known are {', '.join(families())}.")
        config = families()[config.model_type].adjusted(config)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        here = (
            "its folder is not a transformers model" if Path(source).exists() else "no such local folder, and the hub gave"
        )
        raise InputError(
            f"model {name}: {here}: {first_line(error)}; pass a local folder, `builtin`, or a hub id with the network up."
        ) from error
    if missing := sorted(loaded["missing_keys"]):  # transformers would fill them with random values
        raise InputError(f"model {name}: {len(missing)} weights are missing, such as {missing[0]}; restore its files.")
    speed_up(model)
    return model.to(device=device, dtype=getattr(torch, DTYPES[compute_dtype])).eval()


def load_own_tokenizer(name: str, model: nn.Module) -> tuple[TextCodec, dict[str, bytes]]:
    """The tokenizer that lies beside the model `name`, and the files that a store keeps of it.

    Raises InputError when there is none, or when it is not this model's: it has ids that the model does not know, or less
    than half as many tokens as the model (whose vocabulary may be padded a little).
    """
    codec, files = load_tokenizer(resolve_model(name))
    known = int(model.config.vocab_size)  # type: ignore[union-attr,arg-type]
    if codec.largest_id >= known or 2 * codec.n_tokens < known:
        raise InputError(
            f"model {name}: its tokenizer has {codec.n_tokens:,} tokens, ids up to {codec.largest_id:,}; the model knows "
            f"{known:,}: put the tokenizer that it was trained with beside it (tokenizer.json)."
        )
    return codec, files


def _require_no_adapter(name: str, source: str) -> None:
    """Raises InputError where the weights are changed by an adapter, which would silently not be applied."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(source) is not None:
        raise InputError(
            f"model {name}: an adapter (adapter_config.json) lies beside it, and is not applied; merge it into the weights "
            "first (PEFT's merge_and_unload), save the result, and pass that folder."
        )


DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""Compute dtypes by their names on the command line and in the manifest."""


def resolve_model(name: str) -> str:
    """The folder of the shipped model for `builtin`; any other name unchanged."""
    return str(model_path()) if name == "builtin" else name


def choose_device(device: str) -> str:
    """`auto` means cuda where there is one, else cpu. Raises InputError for a device that cannot be used."""
    if device != "auto":
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise InputError(f"device {device}: cannot be used ({first_line(error)}); choose auto or cpu.") from error
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def model_identity(model: nn.Module) -> ModelIdentity:
    """The identity of a model's weights: sha256 over every tensor's name, shape and fp32 bytes; the folder does not matter.

    The model must be loaded in fp32: weights rounded to bf16 have another hash.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    family = family_of(model)
    return ModelIdentity(family.model_type, len(family.blocks(model)), family.d_model(model), digest.hexdigest())
