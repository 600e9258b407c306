"""The versions that pyproject.toml accepts are versions that were tested."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(*extras: str) -> list[Requirement]:
    """What the package needs, and its extras, without those that name the package itself."""
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return [own for own in map(Requirement, lines) if own.name != PROJECT["name"]]


def pins(file: str) -> dict[str, Version]:
    """Each `name==version` of a file of constraints."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    exact = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in exact}


@pytest.mark.parametrize("own", requirements("s3", "tensorboard", "test"), ids=lambda own: own.name)
def test_each_lower_bound_is_the_version_of_the_oldest_environment(own: Requirement) -> None:
    (bound,) = own.specifier
    assert bound.operator == ">="
    assert pins("constraints-lowest.txt")[canonicalize_name(own.name)] == Version(bound.version)


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-lowest.txt"])
def test_what_is_pinned_is_accepted(file: str) -> None:
    pinned = pins(file)
    for own in requirements("s3", "tensorboard", "test"):
        assert pinned[canonicalize_name(own.name)] in own.specifier, own


@pytest.mark.parametrize(
    ("name", "bad", "fault"),
    [
        ("numcodecs", "0.16.5", "a received array can name `pickle` as its codec"),
        ("transformers", "5.3.0", "GPT-2's attention scaling is ignored under SDPA"),
        ("tokenizers", "0.22.0", "does not go with transformers 5"),
        ("safetensors", "0.6.0", "was never published"),
        ("zarr", "3.1.5", "names of a bucket lose their first letters"),
        ("scikit-network", "0.33.0", "was built for NumPy 1"),
        ("matplotlib", "3.10.6", "warns with every pyparsing that is installed today"),
        ("torch", "2.8.0", "has no torch.optim.Muon"),
    ],
)
def test_versions_with_a_known_fault_are_not_accepted(name: str, bad: str, fault: str) -> None:
    (own,) = [own for own in requirements() if own.name == name]
    assert Version(bad) not in own.specifier, fault


def test_the_classifiers_name_the_pythons_on_which_the_tests_were_run() -> None:
    named = re.findall(r":: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), re.MULTILINE)
    assert f">={named[0]}" == PROJECT["requires-python"]
    said = f"The tests pass on Python {', '.join(named[:-1])} and {named[-1]};"
    assert said in (ROOT / "docs/INSTALL.md").read_text(encoding="utf-8")
