"""What a store in a bucket promises: the bytes it would have in a folder, one writer at a time, few requests.

Everything runs against a real S3 server, a process of its own.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3kit
from click.testing import CliRunner, Result
from forkkit import PROCESSES
from s3kit import Server, begin, kill_at, kinds, run_command, stop_at, wait_until_stopped, write_and_hold
from safetensors.numpy import load_file
from storekit import TWO_SEGMENTS, StoreSpec, files_of, row_ids, row_values, write_store

from actstore import bucket, lease, paths
from actstore.errors import DamagedStore, IncompleteStore, InputError, LockedStore, NotAStore, OutputExists, StoreError
from actstore.integrity import find_faults
from actstore.open_place import open_place
from actstore.reader import ActivationStore
from actstore.schema import PARTS
from actstore.stream import BatchStream
from actstore.writer import StoreWriter
from cli import cli
from pipelines.analysis import stage as analyze_module
from pipelines.analysis.reader import Analysis
from pipelines.analysis.stage import AnalyzeConfig, analyze
from pipelines.analysis.survey.work_folder import KEY
from pipelines.collect import stage as stage
from pipelines.collect.config import CollectConfig
from pipelines.collect.stage import collect
from pipelines.shared import cluster

pytestmark = pytest.mark.processes

SPEC = TWO_SEGMENTS
SMALL = StoreSpec(n_documents=16, document_tokens=20, shard_rows=64, sites=(("resid_post.0", "fp32"),))
"""For writers that are killed again and again."""
SITE = "resid_post.0"
SITE_SHARD = "data.zarr/segments/0000/train/acts/resid_post.0/c/0/0"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3kit.serving(tmp_path_factory.mktemp("s3")) as found:
        yield found


@pytest.fixture(autouse=True, scope="module")
def _environment(server: Server) -> Iterator[None]:
    """The server's, and short leases."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        s3kit.shorten_lease(patch)
        yield


@pytest.fixture
def url(server: Server) -> str:
    """A prefix of a new bucket."""
    return f"{server.bucket()}/some where"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of `SPEC` in a folder. Read-only."""
    return write_store(tmp_path_factory.mktemp("bucket") / "store", SPEC)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The objects of the store of `SMALL`."""
    return objects_of(write_store(tmp_path_factory.mktemp("small bucket") / "store", SMALL))


@pytest.fixture(scope="module")
def written(server: Server) -> str:
    """The same store in a bucket. Read-only."""
    return write(f"{server.bucket()}/written", SPEC)


def write(url: str, spec: StoreSpec, **options: Any) -> str:
    write_store(url, spec, **options)  # type: ignore[arg-type]
    return url


def objects_of(folder: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    return {name: data for name, data in files_of(folder).items() if name != "lock"}


def copy_to_bucket(folder: Path, url: str) -> str:
    place = open_place(url)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: place.publish(*item), objects_of(folder).items()))
    return url


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


# Objects


def test_an_object_is_read_back_whole_and_in_pieces(url: str) -> None:
    place, data = open_place(url), random.Random(0).randbytes(1000)
    place.publish("a/x", data)
    assert place.read("a/x") == data
    assert place.n_bytes("a/x") == 1000
    assert place.exists("a/x")
    for start, lengths in ((0, [1000]), (17, [3, 0, 500]), (990, [4, 4, 4]), (1000, [4]), (5000, [4])):
        buffers = [bytearray(length) for length in lengths]
        n_found = place.read_into("a/x", start, *map(memoryview, buffers))
        assert n_found == len(data[start : start + sum(lengths)])
        assert b"".join(buffers)[:n_found] == data[start : start + n_found]
    place.publish("a/x", b"")
    assert (place.read("a/x"), place.n_bytes("a/x")) == (b"", 0)
    assert place.read_into("a/x", 0, memoryview(bytearray(4))) == 0


def test_an_object_of_many_parts_is_one_object(url: str, server: Server) -> None:
    data = random.Random(0).randbytes(12 << 20)
    open_place(url).publish("large", data)
    assert server.objects(url) == {"large": data}
    assert open_place(url).read("large") == data


def test_what_is_not_there_is_not_found(url: str) -> None:
    place = open_place(url)
    for read in (place.read, lambda name: place.read_into(name, 0, memoryview(bytearray(4)))):
        with pytest.raises(FileNotFoundError):
            read("a/x")
    assert place.n_bytes("a/x") is None
    assert not place.exists("a/x")
    assert (place.names(), place.names("a"), place.entries()) == ({}, {}, set())
    place.remove("a/x")
    with pytest.raises(NotAStore, match="not a store"):
        ActivationStore(url)


def test_names_are_those_below_a_folder_and_entries_those_at_the_place(url: str) -> None:
    place = open_place(url)
    for name in ("a/x", "a/b/y", "ab/z", "top"):
        place.publish(name, name.encode())
    open_place(f"{url} else").publish("of another place", b"")
    assert place.names() == {"a/x": 3, "a/b/y": 5, "ab/z": 4, "top": 3}
    assert place.names("a") == {"a/x": 3, "a/b/y": 5}
    assert place.entries() == {"a", "ab", "top"}
    place.remove("a/x")
    assert place.names("a") == {"a/b/y": 5}


def test_more_than_a_thousand_objects_are_listed(url: str, server: Server) -> None:
    place = open_place(url)
    before = len(server.requests())
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: place.publish(f"commits/{i:06d}.json", b"x" * (i % 7)), range(1050)))
    assert place.names("commits") == {f"commits/{i:06d}.json": i % 7 for i in range(1050)}
    assert kinds(server.requests()[before:]) == {"PUT": 1050, "LIST": 2}


def test_of_eight_processes_that_create_an_object_one_is_told_that_it_did(url: str, server: Server) -> None:
    names = [f"commits/{i}.json" for i in range(25)]
    barrier, results = PROCESSES.Barrier(8), PROCESSES.Queue()
    processes = [begin(s3kit.create_each, server, url, names, b"%d" % i, barrier, results) for i in range(8)]
    created = [name for _ in processes for name in results.get(timeout=60)]
    for process in processes:
        process.join()
    assert sorted(created) == sorted(names)
    place = open_place(url)
    assert not place.create(names[0], b"late")
    assert place.read(names[0]) in {b"%d" % i for i in range(8)}


@pytest.mark.parametrize("prefix", ["", "/", "100% sure?#1", "runs/äöü [1]*", "a=b&c+d"])
def test_a_prefix_is_taken_literally(prefix: str, server: Server) -> None:
    whole = server.bucket()
    place = open_place(f"{whole}/{prefix}")
    place.publish("a/x", b"here")
    key = f"{prefix}/a/x".lstrip("/")
    assert server.client().get_object(Bucket=whole.removeprefix("s3://"), Key=key)["Body"].read() == b"here"
    assert open_place(place.url).names() == {"a/x": 4}


def test_the_mark_of_an_empty_folder_is_no_object(url: str, server: Server) -> None:
    """The consoles of object stores make one when asked for a new folder."""
    server.put(f"{url}/", b"")
    assert (open_place(url).names(), open_place(url).entries()) == ({}, set())
    with StoreWriter.open(url, SPEC.manifest, {}):
        pass


@pytest.mark.parametrize("wrong", ["s3://", "s3:///x", "s3://acts//x", "s3://acts/../x", "s3://acts/a\tb", "ftp://acts/x"])
def test_what_names_no_place_in_a_bucket_is_refused(wrong: str) -> None:
    with pytest.raises(InputError, match=re.escape(wrong)):
        open_place(wrong)


# A server that refuses, or is not there


@pytest.fixture(params=["no such bucket", "wrong credentials", "no credentials", "no server"])
def unusable(request: pytest.FixtureRequest, server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """(URL, pattern of what is said) of a place that cannot be used. How long all retries take is another test."""
    monkeypatch.setitem(bucket.RETRIES, "max_retries", 1)
    if request.param == "no such bucket":
        yield "s3://nowhere/x", "NoSuchBucket: The specified bucket does not exist"
    elif request.param == "wrong credentials":
        url = f"{server.bucket()}/x"
        server.refuse_everybody(True)
        yield url, "InvalidAccessKeyId: The AWS Access Key Id you provided|the server answered 403 Forbidden"
        server.refuse_everybody(False)
    elif request.param == "no credentials":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        yield f"{server.bucket()}/x", r"no credentials are set \(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY\)"
    else:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        yield f"{server.bucket()}/x", "http://127.0.0.1:9 does not answer"


def test_a_place_that_cannot_be_used_is_said_so_by_whatever_touches_it(unusable: tuple[str, str]) -> None:
    url, what = unusable
    place = open_place(url)
    calls = {
        "read": lambda: place.read("a"),
        "read_into": lambda: place.read_into("a", 0, memoryview(bytearray(4))),
        "names": place.names,
        "entries": place.entries,
        "publish": lambda: place.publish("a", b"data"),
        "create": lambda: place.create("a", b"data"),
        "lock": place.lock().__enter__,
        "store": lambda: ActivationStore(url),
    }
    for name, call in calls.items():
        with pytest.raises(StoreError, match=what) as caught:
            call()
        assert str(caught.value).startswith(f"{url}: "), name
        assert "\n" not in str(caught.value), name


def test_the_command_line_says_so_in_one_line(unusable: tuple[str, str], tmp_path: Path) -> None:
    url, what = unusable
    for command in (("info", url), ("verify", url), ("collect", "--out", url), ("train", url, "--out", tmp_path / "run")):
        result = invoke(*command)
        (line,) = [line for line in result.stderr.splitlines() if not line.startswith(f"{command[0]}: ")]
        assert re.match(f"error: {url}: ({what})", line), command
        assert (result.exit_code, result.stdout) == (1, ""), command
    assert not (tmp_path / "run").exists()


def test_a_server_that_is_away_for_a_moment_is_waited_for_and_one_that_is_gone_is_not(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = s3kit.Gate(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", gate.endpoint)
    place = open_place(url)
    place.publish("a", b"data")
    gate.close()
    threading.Timer(1.0, gate.open).start()
    assert place.read("a") == b"data"
    gate.close()
    began = time.monotonic()
    with pytest.raises(StoreError, match="does not answer"):
        place.read("a")
    assert time.monotonic() - began < 25


def test_a_forked_process_is_told_instead_of_waiting_without_end(url: str) -> None:
    place = open_place(url)
    place.publish("a", b"data")
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        try:
            place.read("a")
        except StoreError as error:
            os.write(writable, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert re.search(r"process \d+ was forked from \d+.*start processes by 'spawn'", os.read(readable, 4096).decode())


# A store


def test_a_store_has_the_objects_it_would_have_in_a_folder(folder: Path, written: str, server: Server) -> None:
    assert server.objects(written) == objects_of(folder)
    assert find_faults(open_place(written)) == []


def test_every_encoding_reads_back_as_from_a_folder(tmp_path: Path, url: str) -> None:
    sites = tuple((f"resid_post.{i}", kind) for i, kind in enumerate(("fp32", "bf16", "int8")))
    spec = replace(SPEC, n_segments=1, n_documents=12, d_model=3, sites=sites)
    there, here = ActivationStore(write(url, spec)), ActivationStore(write_store(tmp_path / "store", spec))
    assert there.snapshot == here.snapshot
    for shard in here.shards() + here.shards("heldout"):
        for array in here.manifest.arrays:
            np.testing.assert_array_equal(there.read(shard, array.name), here.read(shard, array.name))
        np.testing.assert_array_equal(there.documents(shard), here.documents(shard))


def test_a_reader_that_is_sent_to_another_process_reads_the_same(written: str) -> None:
    store = ActivationStore(written)
    again = pickle.loads(pickle.dumps(store))
    assert (again.url, again.snapshot) == (store.url, store.snapshot)
    shard = store.shards()[3]
    np.testing.assert_array_equal(again.read(shard, f"acts/{SITE}"), store.read(shard, f"acts/{SITE}"))


def test_zarrs_own_store_class_walks_it_and_gets_the_same_values(written: str, folder: Path) -> None:
    import zarr
    from obstore.store import S3Store
    from zarr.storage import ObjectStore

    name, _, prefix = written.removeprefix("s3://").partition("/")
    objects = S3Store(name, prefix=f"{prefix}/{paths.DATA}", client_options={"allow_http": True})
    there = zarr.open_group(ObjectStore(objects, read_only=True), mode="r")
    here = zarr.open_group(folder / paths.DATA, mode="r")
    names = {name for name, array in here.members(max_depth=None) if isinstance(array, zarr.Array)}
    assert {name for name, array in there.members(max_depth=None) if isinstance(array, zarr.Array)} == names
    assert len(names) > 20
    for name in names:
        np.testing.assert_array_equal(there[name][...], here[name][...])


def test_a_truncated_or_missing_object_is_not_read(folder: Path, url: str, server: Server) -> None:
    copy_to_bucket(folder, url)
    data = (folder / SITE_SHARD).read_bytes()
    shard = ActivationStore(url).shards()[0]
    for damaged in (data[:-1], data[:10], b"", data[:50] + bytes([data[50] ^ 1]) + data[51:]):
        server.put(f"{url}/{SITE_SHARD}", damaged)
        with pytest.raises(DamagedStore, match=re.escape(SITE_SHARD)):
            ActivationStore(url).read(shard, f"acts/{SITE}")
    open_place(url).remove(SITE_SHARD)
    with pytest.raises(DamagedStore, match="it is missing"):
        ActivationStore(url).read(shard, f"acts/{SITE}")
    opened = ActivationStore(copy_to_bucket(folder, url))
    opened.read(shard, f"acts/{SITE}")
    server.put(f"{url}/{SITE_SHARD}", b"")  # behind the back of a reader that knows where its chunks lie
    with pytest.raises(DamagedStore, match=r"\d+ bytes of chunks were expected, 0 are there"):
        opened.read(shard, f"acts/{SITE}")


# Writers that die


def test_a_writer_killed_before_any_change_of_an_object_is_continued_to_the_same_store(
    small: dict[str, bytes], server: Server, url: str
) -> None:
    for n_calls in random.Random(3).sample(range(1, len(small)), 3):
        out = f"{url}/{n_calls}"
        process = begin(kill_at, server, n_calls, write_store, out, SMALL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert_what_is_committed_reads_true(out, SMALL)
        assert server.objects(write(out, SMALL)) == small


def test_a_writer_killed_at_any_moment_again_and_again_ends_with_the_same_store(
    small: dict[str, bytes], server: Server, url: str
) -> None:
    """And no committed shard is ever lost."""
    generator = random.Random(0)
    place, committed, n_killed = open_place(url), set[str](), 0
    while True:
        held = max(place.names("lease"), default="")
        process = begin(write_store, server, url, SMALL)
        while process.is_alive() and max(place.names("lease"), default="") == held:
            time.sleep(0.03)
        process.join(generator.uniform(0, 0.08 + 0.15 * n_killed))
        process.kill()
        process.join()
        now = {name for name in place.names(paths.COMMITS) if "/train/" in name or "/heldout/" in name}
        assert committed <= now
        assert_what_is_committed_reads_true(url, SMALL)
        if process.exitcode == 0:
            break
        committed, n_killed = now, n_killed + 1
        assert n_killed < 40
    assert n_killed > 1
    assert server.objects(url) == small


def assert_what_is_committed_reads_true(url: str, spec: StoreSpec) -> None:
    try:
        store = ActivationStore(url, partial=True)
    except NotAStore:
        return
    for part in PARTS:
        for shard in store.shards(part):
            window, position = (store.read(shard, f"rows/{name}").astype(np.int64) for name in ("window", "position"))
            rows = row_values(row_ids(shard.segment, part, window, position), spec.d_model)
            np.testing.assert_array_equal(store.read(shard, f"acts/{SITE}"), rows)


def test_a_second_writer_is_refused_while_the_first_lives_and_takes_over_when_it_is_killed(
    small: dict[str, bytes], server: Server, url: str
) -> None:
    first = held_by_another(server, url)
    for _ in range(2):
        with pytest.raises(LockedStore, match="another process is writing there"):
            write(url, SMALL)
    assert set(open_place(url).names("lease")) == {"lease/000001"}
    first.kill()
    first.join()
    began = time.monotonic()
    write(url, SMALL)
    assert time.monotonic() - began > s3kit.LEASE["DEAD_AFTER_S"]
    assert server.objects(url) == small
    assert set(open_place(url).names("lease")) == {"lease/000002"}
    began = time.monotonic()
    with open_place(url).lock():  # which was given back: nobody has to be watched
        assert time.monotonic() - began < s3kit.LEASE["DEAD_AFTER_S"]


def held_by_another(server: Server, url: str) -> BaseProcess:
    """A process that holds the store's lease."""
    process = begin(write_and_hold, server, url, SMALL)
    while not open_place(url).exists(paths.MANIFEST):
        assert process.is_alive()
        time.sleep(0.02)
    return process


def test_of_several_who_find_a_dead_writer_one_takes_over(server: Server, url: str) -> None:
    first = held_by_another(server, url)
    first.kill()
    first.join()
    barrier, results = threading.Barrier(4), []

    def take(_: int) -> None:
        barrier.wait()
        try:
            with open_place(url).lock():
                results.append("held")
                time.sleep(1.5 * s3kit.LEASE["DEAD_AFTER_S"])
        except LockedStore:
            results.append("refused")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(take, range(4)))
    assert sorted(results) == ["held", "refused", "refused", "refused"]


def test_a_writer_whose_server_is_away_for_a_moment_keeps_its_lease(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = s3kit.Gate(server)
    away = open_place(url)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", gate.endpoint)
        held = open_place(url)
    with held.lock():
        gate.close()
        time.sleep(0.4)
        gate.open()
        time.sleep(2 * s3kit.LEASE["DEAD_AFTER_S"])
        with pytest.raises(LockedStore), away.lock():
            pass
    gate.close()
    with away.lock():
        pass


@pytest.mark.parametrize("n_calls", [1, 10, 45])
def test_a_writer_that_was_taken_for_dead_and_comes_back_does_no_harm(
    small: dict[str, bytes], server: Server, url: str, n_calls: int
) -> None:
    """A machine that slept, or a network that was away: what it still writes are the same objects."""
    sleeper = begin(stop_at, server, n_calls, write_store, url, SMALL)
    assert wait_until_stopped(sleeper)
    write(url, SMALL, n_shards=3)
    os.kill(sleeper.pid or 0, signal.SIGCONT)
    write(url, SMALL)
    sleeper.join()
    assert server.objects(url) == small
    assert find_faults(open_place(url)) == []


def test_a_collection_that_was_taken_for_dead_while_it_read_text_adds_nothing_to_what_another_wrote(
    small_config: CollectConfig, server: Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "SEGMENT_TOKENS", 600)
    collect(replace(small_config, out=tmp_path / "store"))
    next_table, taken_over = stage._Run.next_table, []

    def superseded(run: Any, source: Any, n_tokens: int) -> Any:
        table = next_table(run, source, n_tokens)
        if not taken_over:
            taken_over.append(True)
            collect(replace(small_config, out=url))
        return table

    monkeypatch.setattr(stage._Run, "next_table", superseded)
    monkeypatch.setattr(lease, "_renew", lambda *arguments: None)
    with pytest.raises(LockedStore, match="another process added to the store meanwhile; run the command again"):
        collect(replace(small_config, out=url, tokens=2000))
    assert server.objects(url) == objects_of(tmp_path / "store")


# The stream


def test_batches_from_the_bucket_are_those_from_a_folder_and_go_on_where_they_were(written: str, folder: Path) -> None:
    options: dict[str, Any] = {"seed": 5, "epochs": 2, "budget_bytes": 4 * SPEC.chunk_rows * SPEC.d_model * 4}
    here = list(BatchStream(ActivationStore(folder), SITE, 100, **options))
    stream = BatchStream(ActivationStore(written), SITE, 100, **options)
    there = list(islice(stream, 7))
    again = BatchStream(ActivationStore(written), SITE, 100, **options)
    again.load_state_dict(stream.state_dict())
    there += list(again)
    assert len(there) == len(here) > 10
    for ours, theirs in zip(there, here, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# The command line


@pytest.fixture(scope="module")
def arguments(small_config: CollectConfig) -> list[str]:
    """What `small_config` asks for, as options of `collect`."""
    names = ("model", "corpus", "tokens", "context", "encoding")
    options = [f"--{name}={getattr(small_config, name)}" for name in names]
    return [*options, *(f"--layer={layer}" for layer in small_config.layer)]


@pytest.fixture(scope="module")
def collected(small_store: Path, server: Server) -> str:
    """`small_store` in a bucket. Read-only."""
    return copy_to_bucket(small_store, f"{server.bucket()}/collected")


@pytest.fixture
def one_thread(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands use the tests' Dask client instead of starting processes."""
    monkeypatch.setattr(cluster, "_client", lambda *_: nullcontext(client))


def test_collect_writes_the_store_it_would_write_to_a_folder_and_goes_on_where_it_was_killed(
    small_store: Path, arguments: list[str], server: Server, url: str
) -> None:
    expected = objects_of(small_store)
    process = begin(kill_at, server, 55, run_command, "collect", "--out", url, *arguments)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    n_committed = sum("/train/" in name or "/heldout/" in name for name in open_place(url).names(paths.COMMITS))
    assert 0 < n_committed < 10
    result = invoke("collect", "--out", url, *arguments, "--resume", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["shards_committed_before"] == n_committed
    assert server.objects(url) == expected
    with counting(server) as n:
        assert invoke("collect", "--out", url, *arguments).exit_code == 0
    assert "PUT" not in n
    assert server.objects(url) == expected


def test_an_analysis_in_a_bucket_says_what_one_in_a_folder_says(
    codes: Path, client: Any, server: Server, url: str, tmp_path: Path
) -> None:
    asked = {"examples": 2, "before": 3, "after": 1}
    analyze(AnalyzeConfig(codes=codes, out=tmp_path / "analysis", **asked), client)
    in_bucket = copy_to_bucket(codes, f"{url}/codes")
    analyze(AnalyzeConfig(codes=in_bucket, out=f"{url}/analysis", **asked), client)
    own = ("analysis.json", "seal.json")  # they name the place of the codes
    expected = {name: data for name, data in objects_of(tmp_path / "analysis").items() if name not in own}
    found = server.objects(f"{url}/analysis")
    record = json.loads(found.pop("analysis.json"))
    assert found.pop("seal.json")
    assert found == expected
    assert json.loads(json.dumps(Analysis(f"{url}/analysis").record.value())) == record
    assert record["n_rows"] == Analysis(tmp_path / "analysis").n_rows
    assert not [name for name in server.objects(url) if ".partial/" in name and "/lease/" not in name]
    for command in ("verify", "info"):
        result = invoke(command, f"{url}/analysis")
        assert result.exit_code == 0, result.stderr
    shown = [invoke("feature", where, 3, "--json") for where in (f"{url}/analysis", tmp_path / "analysis")]
    assert shown[0].exit_code == 0, shown[0].stderr
    assert shown[0].stdout == shown[1].stdout
    result = invoke("report", f"{url}/analysis", "--out", tmp_path / "page.html")
    assert result.exit_code == 0, result.stderr
    with pytest.raises(OutputExists, match="exists"):
        analyze(AnalyzeConfig(codes=in_bucket, out=f"{url}/analysis", **asked), client)
    open_place(f"{url}/analysis").remove("data.zarr/features/fires/c/0")
    for command in ("verify", "features", "info"):
        result = invoke(command, f"{url}/analysis")
        assert (result.exit_code, "data.zarr/features/fires/c/0: missing" in result.output) == (1, True), result.output


@pytest.mark.parametrize("at", ["_examples", "seal_folder"])
@pytest.mark.parametrize("first", [{"examples": 2}, {"examples": 3, "min_together": 5}])
def test_an_interrupted_analysis_in_a_bucket_is_finished_by_the_next(
    first: dict[str, int],
    at: str,
    codes: Path,
    client: Any,
    server: Server,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the same command, or by one with other options, which uses nothing of it."""
    in_bucket, asked = copy_to_bucket(codes, f"{url}/codes"), {"examples": 2}
    analyze(AnalyzeConfig(codes=codes, out=tmp_path / "analysis", **asked), client)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(analyze_module, at, interrupted)
        with pytest.raises(KeyboardInterrupt):
            analyze(AnalyzeConfig(codes=in_bucket, out=f"{url}/analysis", **first), client)
    assert server.objects(f"{url}/analysis")
    with pytest.raises((NotAStore, IncompleteStore), match=r"not an analysis|is not finished"):
        Analysis(f"{url}/analysis")
    analyze(AnalyzeConfig(codes=in_bucket, out=f"{url}/analysis", **asked), client)
    found, expected = server.objects(f"{url}/analysis"), objects_of(tmp_path / "analysis")
    for name in ("analysis.json", "seal.json"):  # they name the place of the codes
        assert found.pop(name)
        assert expected.pop(name)
    assert found == expected


def test_what_is_not_part_of_an_interrupted_analysis_is_left_alone(
    codes: Path, client: Any, server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_place(f"{url}/analysis.partial").publish(KEY, b"left by another one")
    open_place(f"{url}/analysis").publish("notes.txt", b"mine")
    with pytest.raises(OutputExists, match="exists"):
        analyze(AnalyzeConfig(codes=codes, out=f"{url}/analysis"), client)
    assert server.objects(f"{url}/analysis") == {"notes.txt": b"mine"}


@pytest.mark.usefixtures("one_thread")
def test_structure_of_an_analysis_in_a_bucket_is_that_of_one_in_a_folder(
    codes: Path, server: Server, url: str, tmp_path: Path
) -> None:
    found = []
    for base, own in ((url, copy_to_bucket(codes, f"{url}/codes")), (tmp_path, codes)):
        assert invoke("analyze", own, "--out", f"{base}/analysis").exit_code == 0
        asked = ("structure", f"{base}/analysis", "--draws", 20, "--json", "--seed", 1)
        if base == url:
            assert "an analysis in a bucket; say with --out where the result shall go" in invoke(*asked).stderr
        result = invoke(*asked, "--out", tmp_path / f"structure{len(found)}")
        assert result.exit_code == 0, result.stderr
        found.append(result.stdout)
    assert json.loads(found[0])["pairs"]["tested"] > 0
    assert found[0] == found[1]


@pytest.mark.cluster
def test_workers_write_to_the_bucket_themselves(small_store: Path, arguments: list[str], server: Server, url: str) -> None:
    result = invoke("collect", "--out", url, *arguments, "--workers", 2)
    assert result.exit_code == 0, result.stderr
    assert server.objects(url) == objects_of(small_store)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_collection_by_workers_that_was_killed_is_finished_by_others(
    small_store: Path, arguments: list[str], server: Server, url: str
) -> None:
    command = ["collect", "--out", url, *arguments, "--workers", 2]
    first = begin(run_command, server, *command)
    while not any("/train/" in name for name in open_place(url).names(paths.COMMITS)):
        assert first.is_alive()
        time.sleep(0.02)
    first.kill()
    first.join()
    result = invoke(*command)
    assert result.exit_code == 0, result.stderr
    assert server.objects(url) == objects_of(small_store)


def test_info_says_of_a_store_what_it_says_of_the_same_in_a_folder(collected: str, small_store: Path) -> None:
    there, here = (json.loads(invoke("info", place, "--json").stdout) for place in (collected, small_store))
    assert there.pop("path") == collected
    assert here.pop("path") == str(small_store)
    assert there == here


@pytest.mark.parametrize(
    ("name", "level"),
    [("data.zarr/segments/0000/train/acts/resid_post.0/c/1/0", "crc"), ("data.zarr/segments/0000/tokens/ids/c/0", "full")],
)
def test_a_flipped_bit_is_found_and_repair_and_collect_restore_the_same_objects(
    small_store: Path, arguments: list[str], server: Server, url: str, name: str, level: str
) -> None:
    copy_to_bucket(small_store, url)
    data = bytearray((small_store / name).read_bytes())
    data[len(data) // 3] ^= 16
    server.put(f"{url}/{name}", bytes(data))
    found = {step: invoke("verify", url, "--level", step) for step in ("meta", "crc", "full")}
    assert {step: result.exit_code for step, result in found.items()} == {"meta": 0, "crc": 1, "full": 1}
    for step in ("crc", "full"):
        assert name in found[step].stdout
        assert f"error: {url}: 1 faults; `actstore repair {url}` drops" in found[step].stderr
    repaired = invoke("repair", url, "--level", level, "--json")
    assert repaired.exit_code == 0, repaired.stderr
    assert name in json.loads(repaired.stdout)["dropped"]
    assert invoke("collect", "--out", url, *arguments).exit_code == 0
    assert server.objects(url) == objects_of(small_store)
    assert invoke("verify", url).exit_code == 0


@pytest.mark.usefixtures("one_thread")
def test_a_run_its_codes_and_their_analysis_are_those_of_the_store_in_a_folder(
    small_store: Path, collected: str, server: Server, url: str, tmp_path: Path
) -> None:
    results: dict[str, dict[str, Any]] = {}
    for where, store, codes in (("there", collected, url), ("here", small_store, tmp_path / "codes")):
        run, analysis = tmp_path / where / "run", tmp_path / where / "analysis"
        train = invoke("train", store, "--out", run, "--features", 64, "--k", 4, "--batch", 256, "--epochs", 2)
        steps = [
            train,
            invoke("evaluate", run, store, "--windows", 8, "--json"),
            invoke("encode", store, run, "--out", codes),
            invoke("verify", codes),
            invoke("analyze", codes, "--out", analysis),
        ]
        assert [step.exit_code for step in steps] == [0] * len(steps), [step.stderr for step in steps]
        results[where] = {
            "weights": load_file(run / "sae.safetensors"),
            "evaluation": {
                **json.loads(steps[1].stdout),
                "run_id": "depends on where the store is",
                "saved": "and so does this",
            },
            "analysis": {name: data for name, data in files_of(analysis).items() if name.startswith("data.zarr/")},
        }
    there, here = results["there"], results["here"]
    for name, values in here["weights"].items():
        np.testing.assert_array_equal(there["weights"][name], values)
    assert there["analysis"] == here["analysis"]
    assert there["evaluation"] == here["evaluation"]
    data = {name: value for name, value in server.objects(url).items() if name.startswith("data.zarr/")}
    assert data == {name: value for name, value in files_of(tmp_path / "codes").items() if name.startswith("data.zarr/")}


# The number of requests


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, server: Server) -> str:
    """A store of some fifty shards. Read-only."""
    spec = replace(SMALL, n_documents=84, document_tokens=40, chunk_rows=16)
    return copy_to_bucket(write_store(tmp_path_factory.mktemp("wide") / "store", spec), f"{server.bucket()}/wide")


def test_opening_a_store_takes_four_requests_however_many_shards_it_has(wide: str, server: Server) -> None:
    with counting(server) as n:
        store = ActivationStore(wide)
        assert len(store.shards()) > 40
        assert store.n_rows() > 2500
        assert store.snapshot
    assert n == {"GET": 3, "LIST": 1}


def test_a_stream_asks_once_for_each_chunk_and_a_few_times_more_for_each_shard(wide: str, server: Server) -> None:
    store = ActivationStore(wide)
    n_shards, n_chunks = len(store.shards()), sum(shard.n_chunks for shard in store.shards())
    with counting(server) as n:
        assert sum(map(len, BatchStream(store, SITE, 100, epochs=1))) == store.n_rows()
    # Once for its record, its length and its index; twice where two of its chunks are read at the same time.
    assert n_chunks + 3 * n_shards <= n.total() <= n_chunks + 6 * n_shards
    with counting(server) as n:
        assert sum(map(len, BatchStream(store, SITE, 100, epochs=1))) == store.n_rows()
    assert n == {"GET": n_chunks}


def test_verifying_lists_once_and_reads_each_object_once(written: str, server: Server) -> None:
    n_objects = len(server.objects(written))
    with counting(server) as n:
        assert find_faults(open_place(written), "full") == []
    assert n == {"GET": n_objects, "LIST": 1}
    with counting(server) as n:
        assert find_faults(open_place(written), "meta") == []
    n_records = sum(name.startswith("commits/") for name in open_place(written).names())
    assert n == {"GET": n_records + 1, "LIST": 1}


def test_writing_puts_each_object_once(server: Server, url: str, small: dict[str, bytes]) -> None:
    n_records = sum(name.startswith("commits/") for name in small)
    with counting(server) as n:
        write(url, SMALL)
    assert n["PUT"] == len(small)
    assert n["LIST"] + n["DELETE"] < 20
    assert n["HEAD"] < n_records + 10
    assert n["GET"] < n_records + 10  # which the seal names, as they lie there


@contextmanager
def counting(server: Server) -> Iterator[Counter[str]]:
    """The requests of a block, by kind."""
    found: Counter[str] = Counter()
    before = len(server.requests())
    yield found
    found.update(kinds(server.requests()[before:]))


def test_a_servers_reason_is_read_out_of_cdata() -> None:
    """Some servers, and earlier versions of moto, wrap the message so."""
    answer = "<Error><Code>NoSuchBucket</Code><Message><![CDATA[The bucket <x> does not exist.]]></Message></Error>"
    assert bucket._reason(Exception(answer)) == "NoSuchBucket: The bucket <x> does not exist"


@pytest.mark.parametrize("vanished", ["manifest.json", "commits/0000/sealed.json", "commits/0000/train/000000.json"])
def test_an_object_that_vanished_after_the_bucket_was_listed_is_one_line_that_names_it(
    vanished: str, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = f"{server.bucket()}/store"
    write_store(url, StoreSpec(n_documents=20))
    name, _, key = f"{url[5:]}/{vanished}".partition("/")
    listed = bucket.Bucket(url).names()
    server.client().delete_object(Bucket=name, Key=key)
    monkeypatch.setattr(
        bucket.Bucket, "names", lambda _, prefix="": {own: n for own, n in listed.items() if own.startswith(prefix)}
    )
    result = CliRunner().invoke(cli, ["train", url, "--out", str(tmp_path / "run"), "--layer", "0", "--batch", "32"])
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"error: {url}")
    assert vanished in line
