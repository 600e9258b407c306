"""Every file that a small chain of commands leaves, as a sha256 each: two checkouts that agree here write the same bytes.

    python -m benchmarks.artefacts FOLDER > hashes.txt

Runs `python -m actstore` of the checkout on PYTHONPATH (or of this one), one command after another, in FOLDER, which must
not exist. A file is hashed as it lies on disk, but for what differs from run to run: the fields of TIMINGS in JSON and
JSON-lines files, and the date and the drawn ids of an SVG. Commands compute on one thread: with more, the sums of some
gradients are added in another order each time. Two checkouts are compared on one machine, as the order of a
floating-point sum belongs to the processor.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMINGS = frozenset({"rows_per_s", "tokens_per_s", "data_wait_share", "seconds", "wall_seconds", "disk_bytes"})
"""Fields that say how fast something was, and the size on disk of files that contain them."""

SVG_RUN = rb"<dc:date>[^<]*</dc:date>|(?<=[#\"])(?:m|p|image)[0-9a-f]{10}\b"
"""The date of a drawing, and the ids that Matplotlib draws by lot."""

CHAIN = """
collect --out store --model builtin --corpus stdlib --tokens 60000 --layer 3
collect --out store.bf16 --model builtin --corpus stdlib --tokens 60000 --layer 3 --encoding bf16 \
    --site resid_post --site mlp_hidden
recode store --out store.int8 --encoding int8
train store --out run --features 256 --k 8 --batch 1024 --epochs 2
train store --out run-1 --features 256 --k 8 --batch 1024 --epochs 2 --seed 1
train store.int8 --out sweep --architecture topk --architecture jumprelu --features 256 --k 8 --k 16 --batch 1024
train store --out textbook --features 256 --k 8 --batch 1024 --epochs 2 --recipe textbook
train store --out gated --features 256 --k 8 --batch 1024 --epochs 2 --architecture gated
train store --out matryoshka --features 256 --k 8 --batch 1024 --epochs 2 --architecture matryoshka
train store --out relu --features 256 --k 8 --batch 1024 --epochs 2 --architecture relu
train store --out batchtopk --features 256 --k 8 --batch 1024 --epochs 2 --architecture batchtopk
evaluate run store --windows 16 --baselines --baseline-tokens 20000
encode store run --out codes
encode store run --out codes.fp16 --value-dtype fp16
encode store batchtopk --out codes.ragged
analyze codes --out analysis
analyze codes.ragged --out analysis.document --within document --threads
structure analysis --run run --rows 40000 --draws 20
concepts codes
compare run run-1 --store store --rows 5000 --out compared
superposition --out superposition --run run --steps 300
patch 'for i in range(n): print(' 'for j in range(n): print(' --model builtin --target i --against j --out grid.svg
effects run codes --out effects --analysis analysis --top 20 --firings 8
report analysis --out report.html
"""
"""The commands that leave files, one a line."""
PRINTED = """
feature analysis 7
features analysis
features analysis --joint
search analysis ' self'
attribute 'for i in range(' --model builtin
attribute 'for i in range(' --run run --movers 3
patch 'for i in range(n): print(' 'for j in range(n): print(' --model builtin --target i --against j --site head_out
patch 'for i in range(' --run run --site features --method attribution --check 20
ablate run 'for i in range('
ablate run 'for i in range(' --error drop --set-to mean
steer run 7 'import os' --tokens 8
steer run 7 'import os' --tokens 8 --mode clamp --unit peak --analysis analysis
lens run 7
lens run
verify store.int8
"""
"""Commands that leave no file: their `--json` is kept under `printed/`."""


def run_chain(folder: Path) -> None:
    """Run all commands in `folder`. Ends with the first that fails."""
    environment = os.environ | {
        "PYTHONPATH": os.environ.get("PYTHONPATH", str(Path.cwd())),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }

    def actstore(*arguments: str) -> str:
        print("actstore", *arguments, file=sys.stderr)
        command = [sys.executable, "-m", "actstore", *arguments]
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if run.returncode:
            sys.exit(f"actstore {' '.join(arguments)}: exit {run.returncode}\n{run.stderr}")
        return run.stdout

    for line in CHAIN.strip().splitlines():
        actstore(*shlex.split(line))
    printed = folder / "printed"
    printed.mkdir()
    for number, line in enumerate(PRINTED.strip().splitlines()):
        command, *arguments = shlex.split(line)
        (printed / f"{number:02} {command}.json").write_text(actstore(command, *arguments, "--json"), encoding="utf-8")


def timeless(value: Any) -> Any:
    """A JSON value without the fields of TIMINGS, at any depth."""
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if key not in TIMINGS}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def content(path: Path) -> bytes:
    """The bytes of a file that are compared."""
    data = path.read_bytes()
    try:
        if path.suffix == ".json":
            return json.dumps(timeless(json.loads(data))).encode()
        if path.suffix == ".jsonl":
            return "\n".join(json.dumps(timeless(json.loads(line))) for line in data.splitlines()).encode()
    except ValueError:
        pass
    return re.sub(SVG_RUN, b"", data) if path.suffix == ".svg" else data


def hashes(folder: Path) -> Iterator[tuple[str, str]]:
    """(path below the folder, sha256) of every file, in the order of their names."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder)), hashlib.sha256(content(path)).hexdigest()


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir()
    try:
        run_chain(folder)
        for name, digest in hashes(folder):
            print(digest, name)
    finally:
        if os.environ.get("KEEP") is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
