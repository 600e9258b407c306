"""NumPy arrays of plain names, as Gemma Scope publishes them, and a small JSON file beside them.

`NAME.npz` holds float arrays: `W_enc` (d, F), `W_dec` (F, d), `b_enc` (F,), `b_dec` (d,) and, for the architectures whose
features fire above a threshold (batchtopk, jumprelu, matryoshka), `threshold` (F,). `NAME.json` holds the convention:

    architecture, k         a name of ours; the features active in a row
    site                    where in the model rows are read, as a store calls it
    apply_b_dec_to_input    whether pre-activations are (x − b_dec) · W_enc + b_enc, or x · W_enc + b_enc
    code_width, model, weights_sha256, run_id     where they are known

What we write has `apply_b_dec_to_input` true: folding b_dec into b_enc would round, and change codes. The arrays of an
SAE that does not subtract b_dec can be read: b_enc becomes b_enc + b_dec · W_enc. Decoder rows of other norms are made
unit vectors, z → z · ‖w‖, where what fires stays the same (relu, jumprelu). A file of another tool needs a JSON file
beside it that says the first four.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
import zlib
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from actstore.errors import InputError
from actstore.files import publish_bytes, publish_json, require_free_space
from pipelines.exchange.format import Origin
from pipelines.sae.architectures.registry import make
from pipelines.sae.base import Sae
from pipelines.sae.checkpoint import RunRecord

VERSION = 1
WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec")
SHARED_THRESHOLD = ("batchtopk", "matryoshka")
"""Architectures with one threshold for all features; the file has it once for each."""
THRESHOLDED = (*SHARED_THRESHOLD, "jumprelu")
FOLDED = ("jumprelu", "relu")
"""Architectures in which a feature fires, or not, whatever the norm of its decoder row."""
UNIT = 1e-3
"""How far from 1 the norm of a unit row may be: float16 rounds this much."""
MOST_JSON_BYTES, MOST_NAME = 1 << 20, 1000
MOST_RATIO, FREE_BYTES = 20, 1 << 26
"""A file of n bytes may unfold to MOST_RATIO · n + FREE_BYTES: weights hardly compress, zip bombs do by 1,000."""
NEAREST_ULPS = 16
LOG_OF_ZERO = -1000.0
"""A finite number whose exponential is 0 in float32."""

Arrays = dict[str, NDArray[np.float32]]


class Npz:
    """The format; see the head of this file."""

    name = "npz"
    architectures = ("batchtopk", "jumprelu", "matryoshka", "relu", "topk")

    def files(self, out: Path) -> list[Path]:
        if out.suffix != ".npz":
            raise InputError(
                f"{out}: ends in {out.suffix or 'nothing'}, the format's files in .npz; name it {out.stem}.npz."
            )
        return [out, out.with_suffix(".json")]

    def write(self, sae: Sae, record: RunRecord, out: Path) -> None:
        weights, facts = self.files(out)
        data = io.BytesIO()
        np.savez(data, **arrays_of(sae))  # type: ignore[arg-type]
        require_free_space(out, data.getbuffer().nbytes + MOST_JSON_BYTES, "the exported SAE")
        said = {
            "architecture": record.architecture,
            "k": record.k,
            "code_width": record.code_width,
            "site": record.site,
            "apply_b_dec_to_input": True,
            "model": record.model,
            "weights_sha256": record.weights_sha256,
            "run_id": record.run_id,
        }
        publish_json(facts, {"format": "actstore-npz", "version": VERSION, **said})
        publish_bytes(weights, data.getvalue())

    def read(self, path: Path) -> tuple[Sae, Origin]:
        weights, facts = self.files(path)
        said = read_facts(facts)
        architecture, k = said["architecture"], said["k"]
        if architecture not in self.architectures:
            raise InputError(
                f"{facts}: architecture {_shown(architecture)}; this format keeps {', '.join(self.architectures)}."
            )
        arrays = read_arrays(weights, (*WEIGHTS, *(["threshold"] if architecture in THRESHOLDED else [])))
        d_model, n_features = arrays["W_enc"].shape
        if not 1 <= k <= n_features:
            raise InputError(f"{facts}: k {k}, {weights} has {n_features} features; write the k that it was trained with.")
        with np.errstate(over="ignore"):
            if not said["apply_b_dec_to_input"]:
                arrays["b_enc"] = (arrays["b_enc"] + arrays["b_dec"].astype(np.float64) @ arrays["W_enc"]).astype(np.float32)
            fold_decoder_norms(weights, architecture, arrays)
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise InputError(
                    f"{weights}: {name} goes beyond float32 once b_dec and the norms of W_dec are folded into it; scale the "
                    "weights of each feature before."
                )
        sae = make(architecture, d_model, n_features, k)
        state = sae.state_dict()
        state |= {name: torch.from_numpy(array.T if name == "W_enc" else array) for name, array in arrays.items()}
        if architecture == "jumprelu":
            state["log_threshold"] = logarithm(state.pop("threshold"))
        elif architecture in SHARED_THRESHOLD:
            state["threshold"] = one_of_all(weights, architecture, state["threshold"])
        sae.load_state_dict(state)
        origin = Origin(said["site"], said["model"], said["weights_sha256"], said["run_id"], said["code_width"])
        return sae.eval().requires_grad_(False), origin


FORMAT = Npz()


def arrays_of(sae: Sae) -> Arrays:
    """An SAE's arrays by the names of the file, each in C order."""
    tensors = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    if sae.architecture == "jumprelu":
        tensors["threshold"] = sae.get_parameter("log_threshold").exp()
    elif sae.architecture in SHARED_THRESHOLD:
        tensors["threshold"] = sae.get_buffer("threshold").expand(sae.n_features)
    return {name: np.ascontiguousarray(tensor.detach().cpu().float().numpy()) for name, tensor in tensors.items()}


def read_facts(path: Path) -> dict[str, Any]:
    """What the JSON file says, each value of its type; what may be missing is empty or 0. Raises InputError."""
    needed: dict[str, type] = {"architecture": str, "k": int, "site": str, "apply_b_dec_to_input": bool}
    optional = {"version": VERSION, "code_width": 0, "model": "", "weights_sha256": "", "run_id": ""}
    remedy = f"it is an object with {', '.join(needed)}"
    try:
        with open(path, "rb") as file:
            text = file.read(MOST_JSON_BYTES + 1)
        if len(text) > MOST_JSON_BYTES:
            raise InputError(f"{path}: longer than {MOST_JSON_BYTES:,} bytes; {remedy}.")
        said = json.loads(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); put it beside the arrays: {remedy}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({_one_line(error)}); {remedy}.") from error
    if not isinstance(said, dict):
        raise InputError(f"{path}: holds a {type(said).__name__}; {remedy}.")
    for name, kind in (needed | {name: type(value) for name, value in optional.items()}).items():
        if name not in said and name in optional:
            said[name] = optional[name]
        if type(said.get(name)) is not kind:
            raise InputError(f"{path}: {name} is {_shown(said.get(name))}, needed is of type {kind.__name__}; {remedy}.")
        if kind is str and not (said[name].isprintable() and len(said[name]) <= MOST_NAME):
            raise InputError(
                f"{path}: {name} is {_shown(said[name])}, needed is one line of {MOST_NAME} characters; {remedy}."
            )
    if said["version"] != VERSION:
        raise InputError(
            f"{path}: version {said['version']}, readable is {VERSION}; use the actstore version that wrote it."
        )
    return said


def read_arrays(path: Path, names: tuple[str, ...]) -> Arrays:
    """The arrays of these names and no others, as finite float32 whose shapes fit each other.

    Sizes are checked before anything is unfolded. Raises InputError.
    """
    remedy = "export it again, or get it from its source again"
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
            wanted = [f"{name}.npy" for name in names]
            if sorted(member.filename for member in archive.infolist()) != sorted(wanted):
                held = [_shown(name.removesuffix(".npy")) for name in sorted(members)]
                listed = ", ".join(held[:10]) + (f" and {len(held) - 10} more" if len(held) > 10 else "")
                raise InputError(f"{path}: holds {listed or 'nothing'}, needed are {', '.join(names)}, each once; {remedy}.")
            n_bytes, limit = sum(m.file_size for m in members.values()), MOST_RATIO * path.stat().st_size + FREE_BYTES
            if n_bytes > limit:
                raise InputError(f"{path}: unfolds to {n_bytes:,} bytes, at most {limit:,} are weights; {remedy}.")
            shapes = {name: _stated_shape(archive, members[f"{name}.npy"], path, remedy) for name in names}
            _require_shapes(path, shapes, remedy)
            return {name: _finite(archive, name, path, remedy) for name in names}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name the file with the arrays.") from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{path}: not an .npz file of plain arrays ({_one_line(error)}); {remedy}.") from error


def _stated_shape(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, remedy: str) -> tuple[int, ...]:
    """The shape in an array's header, once its type and length are found to be those of plain numbers."""
    with archive.open(member) as file:
        shape, dtype, header_bytes = _header(file)
    name = member.filename.removesuffix(".npy")
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise InputError(f"{path}: {name} is of {_shown(str(dtype))}, readable are float16, float32 and float64; {remedy}.")
    expected = header_bytes + math.prod(shape) * dtype.itemsize
    if member.file_size != expected:
        raise InputError(f"{path}: {name} has {member.file_size:,} bytes, its shape {shape} needs {expected:,}; {remedy}.")
    return shape


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape and type from the head of a .npy file, and the bytes of that head; ValueError where it is none."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"version {version} of the .npy format")
    try:
        shape, _, dtype = read[version](file)
    except (MemoryError, SyntaxError, TokenError) as error:  # from Python's parser, which NumPy lets through
        raise ValueError("the head of an array cannot be parsed") from error
    return shape, dtype, file.tell()


def _require_shapes(path: Path, shapes: dict[str, tuple[int, ...]], remedy: str) -> None:
    first = shapes["W_enc"]
    if len(first) != 2 or min(first) < 1:
        raise InputError(f"{path}: W_enc has shape {first}, needed is (width of the rows, features); {remedy}.")
    d_model, n_features = first
    needed = {"W_dec": (n_features, d_model), "b_enc": (n_features,), "b_dec": (d_model,), "threshold": (n_features,)}
    for name, shape in shapes.items():
        if shape != needed.get(name, first):
            raise InputError(f"{path}: {name} has shape {shape}, with W_enc {first} needed is {needed[name]}; {remedy}.")


def _finite(archive: zipfile.ZipFile, name: str, path: Path, remedy: str) -> NDArray[np.float32]:
    with archive.open(f"{name}.npy") as file:
        given = np.lib.format.read_array(file, allow_pickle=False)
        file.read()  # to the end: the archive's checksum is compared there
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(given, np.float32)
    if not np.isfinite(array).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise InputError(f"{path}: {name}{list(place)} is {given[place]}, needed are finite numbers of float32; {remedy}.")
    if name == "threshold" and (array < 0).any():
        raise InputError(f"{path}: threshold has {array.min()}, needed are numbers from 0 on; {remedy}.")
    return array


def fold_decoder_norms(path: Path, architecture: str, arrays: Arrays) -> None:
    """Make decoder rows unit vectors, in place: each code becomes z · ‖w‖. Rows of zeros, and unit rows, stay.

    Raises InputError where codes compete by their size, which folding would change.
    """
    norms = np.linalg.norm(arrays["W_dec"].astype(np.float64), axis=1)
    norms[norms == 0] = 1.0
    furthest = float(norms[np.abs(norms - 1).argmax()])
    if abs(furthest - 1) <= UNIT:
        return
    if architecture not in FOLDED:
        raise InputError(
            f"{path}: a row of W_dec has norm {furthest:.4g}, needed is 1: for {architecture} other norms would change "
            "which features fire; scale W_dec, W_enc and b_enc of a feature before."
        )
    arrays["W_dec"] = (arrays["W_dec"] / norms[:, None]).astype(np.float32)
    for name in ("W_enc", "b_enc", "threshold"):
        if name in arrays:
            arrays[name] = (arrays[name] * norms).astype(np.float32)


def one_of_all(path: Path, architecture: str, threshold: torch.Tensor) -> torch.Tensor:
    """() the threshold that all features share. Raises InputError when they differ."""
    if bool((threshold != threshold[0]).any()):
        raise InputError(
            f"{path}: threshold goes from {float(threshold.min()):.6g} to {float(threshold.max()):.6g}, {architecture} has "
            "one for all features; write architecture jumprelu into the JSON file."
        )
    return threshold[0].clone()


def logarithm(threshold: torch.Tensor) -> torch.Tensor:
    """(F,) numbers whose exponential is the threshold to the last bit, where float32 has such a number; else the nearest.

    A threshold that was an exponential comes back exactly, and with it each code: the search goes NEAREST_ULPS numbers
    up and down from the logarithm, which rounding can have moved.
    """
    best = start = threshold.log().clamp_min(LOG_OF_ZERO)
    for way in (-torch.inf, torch.inf):
        candidate = start
        for _ in range(NEAREST_ULPS):
            candidate = torch.nextafter(candidate, torch.full_like(candidate, way))
            nearer = (candidate.exp() - threshold).abs() < (best.exp() - threshold).abs()
            best = torch.where(nearer, candidate, best)
    return best


def _shown(value: object) -> str:
    """A value from a file, in one short line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
