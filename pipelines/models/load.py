"""In: the name of a model. Out: the model in evaluation mode on its device, or one clear error; its identity."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from torch import nn

from actstore.errors import ActstoreError, InputError
from actstore.schema import ModelIdentity
from pipelines.compute.cpu_products import speed_up
from pipelines.models.builtin import model_path
from pipelines.models.families.registry import families, family_of
from pipelines.shared.error_line import first_line, is_out_of_memory
from pipelines.shared.hub_connection import go_offline_if_unreachable


def load_model(name: str, device: str, compute_dtype: str) -> nn.Module:
    """A causal language model of a known family: `builtin`, a hub id, or a local folder.

    The family may change the configuration first (`Family.adjusted`). oneDNN computes dense float32 layers on a CPU
    (`pipelines.compute.cpu_products`). No code beside the weights is run, and pickled weights are read as tensors or not at
    all. Raises InputError when there is no such model, no network for a hub id, a weight that is missing or has another
    shape, or files that ask for code to be run.
    """
    source = resolve_model(name)
    if not Path(source).exists():
        go_offline_if_unreachable()
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    _require_no_adapter(name, source)
    try:
        config = _configuration(name, source)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # said beside the error that follows
            model, loaded = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
                weights_only=True,
            )
    except ActstoreError:
        raise
    except UnpicklingError as error:
        raise InputError(
            f"model {name}: its pickled weights are something other than tensors; reading them could run code, and was "
            "stopped; take the model as safetensors."
        ) from error
    except Exception as error:  # a stranger's configuration can be wrong in any way
        if is_out_of_memory(error):
            raise
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


def require_own_tokenizer(name: str, model: nn.Module, n_vocabulary: int) -> None:
    """Raises InputError when a tokenizer of so many ids cannot be the model's.

    Ids beyond the embedding have no row in it. An embedding may be padded, but not to more than twice its tokens.
    """
    n_rows = len(cast(Any, model).get_input_embeddings().weight)
    if n_vocabulary > n_rows:
        raise InputError(
            f"model {name}: its tokenizer has ids up to {n_vocabulary - 1:,}, the model's embedding {n_rows:,} rows, 0 to "
            f"{n_rows - 1:,}; put the model's own tokenizer beside it."
        )
    if n_vocabulary < n_rows // 2 and n_rows - n_vocabulary > LARGEST_PADDING:
        raise InputError(
            f"model {name}: its tokenizer has {n_vocabulary:,} ids, the model's embedding {n_rows:,} rows; put the model's "
            "own tokenizer beside it."
        )


def _require_no_adapter(name: str, source: str) -> None:
    """Raises InputError where an adapter's weights lie: the base model alone would be loaded, or nothing."""
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        file = find_adapter_config_file(source)
    except (OSError, ValueError):  # no such model: loading it says why
        return
    if file is not None:
        raise InputError(
            f"model {name}: has an adapter ({Path(file).name}), whose weights would be left out; merge it first "
            "(peft's `merge_and_unload`, then `save_pretrained`) and pass the merged folder."
        )


def _configuration(name: str, source: str) -> Any:
    """The configuration, as its family adjusts it. Raises InputError for a family or an attention that is not known here."""
    from transformers import AutoConfig, PreTrainedConfig

    said, _ = PreTrainedConfig.get_config_dict(source)
    if (family := said.get("model_type")) in (None, *families()):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        family = config.model_type
    if family not in families():
        unused = "; the code that comes with it is not run" if "auto_map" in said else ""
        raise InputError(f"model {name}: family {family!r}; known are {', '.join(families())}{unused}.")
    if config._attn_implementation not in (None, *ATTENTION):  # another name is code to fetch from the hub
        raise InputError(
            f"model {name}: config.json asks for attention by {config._attn_implementation!r}, known are "
            f"{', '.join(ATTENTION)}; remove attn_implementation from it."
        )
    return families()[family].adjusted(config)


ATTENTION = ("eager", "sdpa")
"""Implementations of attention that transformers itself has for every family."""
LARGEST_PADDING = 128
"""Rows that an embedding may have beyond a tokenizer of any size; larger tokenizers may be padded to twice their size."""
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
