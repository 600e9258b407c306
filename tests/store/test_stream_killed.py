"""A stream whose process is killed in the middle of an epoch goes on in another process with the same bits."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from storekit import StoreSpec, write_store

from actstore.reader import ActivationStore
from actstore.stream import BatchStream

pytestmark = pytest.mark.processes

SITE, BATCH_ROWS, N_BATCHES = "resid_post.0", 97, 400
SPEC = StoreSpec(n_documents=400, sites=((SITE, "bf16"),), d_model=4, shard_rows=512, chunk_rows=64)
CONSUMER = """
import hashlib, json, sys, time
from actstore import ActivationStore, BatchStream

store, log = sys.argv[1:]
stream = BatchStream(ActivationStore(store), {site!r}, {batch_rows}, seed=7, budget_bytes=6_000)
lines = open(log).read().splitlines() if {resumed} else []
done = [json.loads(line) for line in lines if line.endswith("}}")]
if done:
    stream.load_state_dict(done[-1]["state"])
with open(log, "a") as file:
    for n, batch in enumerate(stream, start=len(done)):
        digest = hashlib.sha256(batch.tobytes()).hexdigest()
        file.write("\\n" + json.dumps({{"batch": n, "sha256": digest, "state": stream.state_dict()}}))
        file.flush()
        time.sleep(0.001)
        if n + 1 >= {n_batches}:
            break
"""


def run_consumer(store: Path, log: Path, resumed: bool, kill_after: int | None) -> None:
    """Stream in a process of its own; kill it once it has logged `kill_after` batches more."""
    code = CONSUMER.format(site=SITE, batch_rows=BATCH_ROWS, resumed=resumed, n_batches=N_BATCHES)
    log.touch()
    before = len(log.read_text().splitlines())
    process = subprocess.Popen([sys.executable, "-c", code, str(store), str(log)])
    if kill_after is not None:
        while len(log.read_text().splitlines()) < before + kill_after and process.poll() is None:
            time.sleep(0.005)
        process.kill()
    process.wait(timeout=120)


def logged(log: Path) -> dict[int, str]:
    """Hash of each batch; a last line that the kill cut off is not there."""
    lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
    return {entry["batch"]: entry["sha256"] for entry in map(json.loads, lines)}


def test_a_stream_killed_in_the_middle_of_an_epoch_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", SPEC)
    opened = ActivationStore(store)
    assert opened.n_rows() > 5 * BATCH_ROWS
    expected = {}
    for n, batch in enumerate(BatchStream(opened, SITE, BATCH_ROWS, seed=7, budget_bytes=6_000)):
        expected[n] = hashlib.sha256(batch.tobytes()).hexdigest()
        if n + 1 == N_BATCHES:
            break
    log = tmp_path / "log"
    for number, kill_after in enumerate((13, 61, 150, None)):
        run_consumer(store, log, resumed=number > 0, kill_after=kill_after)
    found = logged(log)
    assert found == expected
    n_epochs = N_BATCHES * BATCH_ROWS / opened.n_rows()
    print(f"3 kills, {len(found)} batches over {n_epochs:.1f} epochs: all bit-identical")
