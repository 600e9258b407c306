"""Named tensors as one safetensors file, which is published whole or not at all, and whose header is compared first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from actstore.errors import DamagedStore, system_error
from actstore.files import fsync_path

Form = tuple[str, tuple[int, ...]]
"""The dtype of a tensor, as PyTorch calls it, and its shape."""
DTYPES = {"F32": "float32", "I64": "int64"}
"""What safetensors calls the dtypes that are written here."""


def making(path: Path) -> Path:
    """The folder in which a file at `path` is written. It exists only meanwhile, or after an interruption."""
    return path.with_name(f".{path.name}.making")


def publish_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to `path`, replace the former file, and flush to disk.

    The file is first written in a folder of its own, `making(path)`: safetensors writes under a random name, and an
    interruption would leave that file behind. Raises OSError, naming `path`, and leaves nothing behind, when the disk
    refuses the bytes.
    """
    folder = making(path)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        save_file(tensors, folder / path.name, metadata=metadata)
        fsync_path(folder / path.name)
        os.replace(folder / path.name, path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        number = error.errno if isinstance(error, OSError) else system_error(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    fsync_path(path.parent)
    folder.rmdir()


def forms_of(tensors: Mapping[str, Tensor]) -> dict[str, Form]:
    """The form of each tensor."""
    return {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors.items()}


def load_tensors(path: Path, needed: Mapping[str, Form]) -> dict[str, Tensor]:
    """The tensors of a file that has exactly those of `needed`, and finite numbers only.

    Nothing is allocated before the names, dtypes and shapes in the file's header are found to be the needed ones. Raises
    DamagedStore otherwise.
    """
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            found = {
                name: (DTYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))
                for name, part in slices.items()
            }
            require_forms(path, found, needed)
            tensors = {name: file.get_tensor(name) for name in needed}
    except SafetensorError as error:
        raise DamagedStore(f"{path}: not readable as safetensors ({error}); restore it from a copy.") from error
    require_finite(path, tensors)
    return tensors


def require_forms(path: Path, found: Mapping[str, Form], needed: Mapping[str, Form]) -> None:
    """Raises DamagedStore, naming the first difference, unless a file has exactly the tensors that are needed."""
    for name in sorted(found.keys() | needed.keys()):
        if found.get(name) != needed.get(name):
            there, wanted = (_shown(forms[name]) if name in forms else "none" for forms in (found, needed))
            raise DamagedStore(f"{path}: tensor {name!r} is {there}, needed is {wanted}; restore it from a copy.")


def require_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises DamagedStore, naming the tensor, when a number is not finite."""
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise DamagedStore(f"{path}: tensor {name!r} holds NaN or infinity; train anew, or restore it from a copy.")


def _shown(form: Form) -> str:
    return f"{form[0]} {list(form[1])}"
