"""Remote shards through the cache, from real servers with the usual faults of servers."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from pipeline.config import DataConfig
from pipeline.data.cache import Cache, cached_bytes
from pipeline.data.loader import Loader, evaluation_batches
from pipeline.data.manifest import Manifest
from pipeline.data.order import Order
from pipeline.data.remote import ClosedError, Remote
from pipeline.errors import EXIT_DATA, EXIT_INTERNAL, ConfigError, DataError, StoreError
from tests.support.data_servers import FaultyServer, serve, serve_s3
from tests.support.data_sets import ROOT, drawn_jpeg, write_set

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("origin")
    write_set(folder / "train", [drawn_jpeg(n, 200, 200) for n in range(36)], per_shard=6)
    write_set(folder / "val", [drawn_jpeg(n, 200, 200) for n in range(12)], per_shard=6)
    return folder


@pytest.fixture
def server(origin):
    with serve(origin) as running:
        yield running


def config(path: str, cache: Path, **fields) -> DataConfig:
    settings = {"image_size": 24, "global_batch": 12, "micro_batch": 6, "window_shards": 2, "threads": 1, "retries": 1}
    return DataConfig(path=path, cache_dir=str(cache), **{**settings, **fields})  # pyright: ignore[reportArgumentType]


def pixels(data: DataConfig, steps: int = 6) -> list[torch.Tensor]:
    one = Loader(data, seed=5, rank=0, world_size=1, device=CPU)
    try:
        return [batch.images for micro_batches in one.steps(0, steps) for batch in micro_batches]
    finally:
        one.close()


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def open_cache(url: str, folder: Path, *, capacity: int = 10**9, patience_s: float = 0.2, **options) -> Cache:
    return Cache(str(folder), Remote(url, **options), capacity_bytes=capacity, patience_s=patience_s)


def cached(folder: Path) -> list[str]:
    return sorted(entry.name.split("-")[1] for entry in folder.iterdir() if entry.name != "locks")


def test_http_gives_the_same_pixels_as_local_and_each_shard_comes_once(origin, server, tmp_path):
    remote = config(server.url, tmp_path)
    assert equal(pixels(remote), pixels(config(str(origin), tmp_path)))
    assert equal(pixels(remote), pixels(remote))
    assert {n for name, n in server.requests.items() if name.endswith((".tar", ".npy"))} == {1}
    batches = list(evaluation_batches(remote, rank=0, world_size=1, device=CPU))
    assert sum(int(batch.valid.sum()) for batch in batches) == 12


def test_s3_gives_the_same_pixels_as_local(origin, tmp_path):
    with serve_s3(origin, "shards") as (url, _):
        assert equal(pixels(config(url, tmp_path)), pixels(config(str(origin), tmp_path)))
        with pytest.raises(ConfigError, match="no shard set in s3://shards/elsewhere"):
            Manifest.load(f"{url}/elsewhere")


def test_faults_of_s3_are_mended_by_our_retries_alone_and_those_that_stay_are_named(origin, tmp_path):
    with serve_s3(origin, "shards") as (url, proxy):
        proxy.faults = {"manifest.json": ["busy"], "train-000002.tar": ["cut"], "train-000003.npy": ["busy"]}
        assert equal(pixels(config(url, tmp_path / "one")), pixels(config(str(origin), tmp_path)))
        assert proxy.requests["train-000002.tar"] == proxy.requests["train-000003.npy"] == 2
        assert proxy.requests["train-000002.npy"] == 1
        for fault, cause in (("cut", "ClientPayloadError"), ("busy", "503|Service Unavailable")):
            proxy.requests.clear()
            proxy.faults["train-000001.tar"] = [fault] * 99
            cache = open_cache(f"{url}/train", tmp_path / fault, retries=1)
            with pytest.raises(DataError) as caught:
                cache.hold(Manifest.load(f"{url}/train").shards[1])
            assert caught.value.exit_code == EXIT_INTERNAL
            failed = r"^s3://shards/train/train-000001\.tar could not be read in 2 attempts; the last failed with "
            assert re.search(rf"{failed}.*({cause})", str(caught.value), re.DOTALL)
            assert proxy.requests["train-000001.tar"] == 2  # the S3 client's own retries would multiply ours
            cache.close()


def test_other_protocols_of_fsspec_work(origin, tmp_path):
    assert equal(pixels(config(f"file://{origin}", tmp_path)), pixels(config(str(origin), tmp_path)))


@pytest.mark.parametrize("fault", ["cut", "truncated", "corrupted", "busy", "slow"])
def test_a_fault_that_passes_costs_a_retry(origin, server, tmp_path, fault):
    for name in ("train-000002.tar", "train-000003.npy", "manifest.json"):
        server.faults[name] = [fault]
    if fault in ("truncated", "corrupted"):
        del server.faults["manifest.json"]  # no hash protects the manifest
    assert equal(pixels(config(server.url, tmp_path)), pixels(config(str(origin), tmp_path)))
    assert server.requests["train-000002.tar"] == (1 if fault == "slow" else 2)


def test_a_stalled_server_is_left_after_the_timeout(server, tmp_path):
    server.faults["train-000000.tar"] = ["stalled"]
    cache = open_cache(f"{server.url}/train", tmp_path, timeout_s=0.3)
    cache.hold(Manifest.load(f"{server.url}/train").shards[0]).release()
    assert server.requests["train-000000.tar"] == 2
    cache.close()


CAUSES = {
    "cut": "",
    "truncated": r"its \d+ bytes have SHA-256 [0-9a-f]+, the manifest says",
    "corrupted": r"its \d+ bytes have SHA-256 [0-9a-f]+, the manifest says",
    "busy": "503",
}


@pytest.mark.parametrize("fault", CAUSES)
def test_a_fault_that_stays_ends_with_the_url_and_the_cause(server, tmp_path, fault):
    server.faults["train-000001.tar"] = [fault] * 9
    with pytest.raises(DataError) as caught:
        pixels(config(server.url, tmp_path))
    assert f"{server.url}/train/train-000001.tar could not be read in 2 attempts; the last failed with" in str(
        caught.value
    )
    assert re.search(CAUSES[fault], str(caught.value))
    # A later start may get what the store cannot give now; bytes that differ from the manifest stay wrong.
    assert caught.value.exit_code == (EXIT_DATA if fault in ("truncated", "corrupted") else EXIT_INTERNAL)
    assert not list(tmp_path.glob("*.part"))


def test_missing_things_are_named(origin, server, tmp_path):
    with pytest.raises(ConfigError, match=r"no shard set in http://.*/nowhere \(no manifest.json\)"):
        Manifest.load(f"{server.url}/nowhere")
    shutil.copytree(origin / "train", tmp_path / "set" / "train")
    (tmp_path / "set/train/train-000000.tar").unlink()
    with (
        serve(tmp_path / "set") as lacking,
        pytest.raises(DataError, match=r"train-000000\.tar does not exist, though"),
    ):
        pixels(config(lacking.url, tmp_path / "cache"))
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/train/manifest\.json could not be read in"):
        Remote("http://127.0.0.1:9/train", retries=0).read("manifest.json")
    server.faults["train-000000.tar"] = ["forbidden"] * 9
    cache = open_cache(f"{server.url}/train", tmp_path / "cache", retries=3)
    with pytest.raises(DataError, match=r"train-000000\.tar may not be read \(403.*check the credentials"):
        cache.hold(Manifest.load(f"{server.url}/train").shards[0])
    assert server.requests["train-000000.tar"] == 1  # not tried again
    with pytest.raises(ConfigError, match=r"data\.path='gs://x' needs a package that is not installed: .*gcsfs"):
        Manifest.load("gs://x")
    with pytest.raises(ConfigError, match=r"data\.path='gopher://x' cannot be opened"):
        Manifest.load("gopher://x")


def test_credentials_come_from_netrc_and_proxies_from_the_environment(server, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password it's\n")
    server.credentials = "me:it's"
    with pytest.raises(DataError, match=r"may not be read \(401.*check the credentials"):
        Manifest.load(f"{server.url}/train")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert len(Manifest.load(f"{server.url}/train").shards) == 6
    server.credentials = ""
    monkeypatch.setenv("http_proxy", server.url)
    assert len(Manifest.load("http://elsewhere.invalid/train").shards) == 6


def test_a_hub_s_refusal_is_not_asked_again(server, monkeypatch):
    """Clients have their own names for the status; Hugging Face's is within `response`."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import HfFileSystem

    HfFileSystem.clear_instance_cache()
    server.credentials = "nobody:knows"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    with pytest.raises(DataError, match="check the credentials"):
        Remote("hf://datasets/someone/numbers/train", retries=3).read("manifest.json")


@pytest.mark.parametrize(
    ("error", "denied"),
    [
        (OSError("Forbidden: https://storage.googleapis.com/b/x"), True),  # gcsfs
        (type("HttpResponseError", (Exception,), {"status_code": 403})("denied"), True),  # Azure
        (type("HttpError", (Exception,), {"code": 403})("denied"), True),
        (OSError("Bad gateway"), False),
    ],
)
def test_what_is_denied_is_told_whatever_the_client_calls_it(server, monkeypatch, error, denied):
    remote = Remote(server.url, retries=1)
    monkeypatch.setattr("pipeline.data.remote.FIRST_DELAY_S", 0.01)
    asked = []

    def cat_file(url: str) -> bytes:
        asked.append(url)
        raise error

    monkeypatch.setattr(remote, "_files", type("Files", (), {"cat_file": staticmethod(cat_file)}))
    with pytest.raises(DataError if denied else StoreError):
        remote.read("manifest.json")
    assert len(asked) == (1 if denied else 2)


def test_the_cap_holds_and_the_least_recently_used_goes_first(server, tmp_path):
    shards = Manifest.load(f"{server.url}/train").shards
    room = sum(cached_bytes(shard) for shard in shards[:3])
    cache = open_cache(f"{server.url}/train", tmp_path, capacity=room + 1000)
    kept = cache.hold(shards[0])
    for number in (1, 2, 1, 3):
        cache.hold(shards[number]).release()
        assert sum(f.stat().st_size for f in tmp_path.rglob("*.*") if f.is_file()) <= room + 1000
    assert cached(tmp_path) == ["000000", "000001", "000003"]  # 0 is in use, 1 was used after 2
    others = [cache.hold(shards[number]) for number in (1, 3)]
    with pytest.raises(DataError, match=r"data\.cache_bytes=\d+ leaves no room for \d+ bytes of http.* are in use"):
        cache.hold(shards[4])
    kept.release()
    cache.hold(shards[4]).release()
    assert cached(tmp_path) == ["000001", "000003", "000004"]
    for held in others:
        held.release()
    cache.close()


def test_a_cache_folder_that_cannot_be_made_is_refused(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"data\.cache_dir='.*file/cache' cannot be made \(Not a directory\); choose"):
        pixels(config(server.url, tmp_path / "file" / "cache"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_bad_ratio", 1.5), ("timeout_s", 0), ("retries", -1), ("cache_bytes", -1), ("hw_decoder_load", 1.5)],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"data\.{name}={value} is not allowed; use "):
        DataConfig(**{name: value})


def least_cache(server: FaultyServer, folder: Path) -> int:
    with pytest.raises(ConfigError) as caught:
        pixels(config(server.url, folder, cache_bytes=1000))
    least = re.search(r"use at least (\d+)", str(caught.value))
    assert least
    return int(least[1])


def test_a_run_in_the_smallest_cache_that_is_allowed(origin, server, tmp_path):
    small = config(server.url, tmp_path, cache_bytes=least_cache(server, tmp_path))
    assert equal(pixels(small, 9), pixels(config(str(origin), tmp_path), 9))


def test_shards_are_read_ahead_of_use(server, tmp_path):
    one = Loader(config(server.url, tmp_path, prefetch=1), seed=5, rank=0, world_size=1, device=CPU)
    next(next(one.steps(0, 100)))
    coming = one._order.coming(0, 0, share=12, global_batch=12)
    assert len(coming) == 4  # of two windows
    expected = {f"{shard:06d}" for shard in coming}
    deadline = time.monotonic() + 30
    while not expected <= set(cached(tmp_path)):
        assert time.monotonic() < deadline
    one.close()


def test_what_else_lies_in_the_cache_folder_is_left_alone(origin, server, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "thesis.txt").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine too")
    (tmp_path / "lost+found").mkdir(mode=0)
    small = config(server.url, tmp_path, cache_bytes=least_cache(server, tmp_path))
    assert equal(pixels(small, 9), pixels(config(str(origin), tmp_path), 9))
    assert (tmp_path / "results" / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "notes.txt").read_text() == "mine too"
    assert (tmp_path / "lost+found").is_dir()


def test_an_evaluation_between_steps_fits_in_the_smallest_cache(server, tmp_path):
    data = config(
        server.url, tmp_path, cache_bytes=least_cache(server, tmp_path), global_batch=10, micro_batch=5, prefetch=1
    )  # 5: batches lie across shards, and the last is padded
    training = Loader(data, seed=5, rank=0, world_size=1, device=CPU)
    for micro_batches in training.steps(0, 6):
        for _ in micro_batches:
            pass
        evaluation = evaluation_batches(data, rank=0, world_size=1, device=CPU)
        assert sum(int(batch.valid.sum()) for batch in evaluation) == 12
    training.close()


CRASHING = """
import sys, torch
from pipeline.config import DataConfig
from pipeline.data.loader import Loader
url, folder = sys.argv[1:]
data = DataConfig(path=url, cache_dir=folder, image_size=24, global_batch=12, micro_batch=6, window_shards=2, threads=1,
                  prefetch=1, timeout_s=600)
loader = Loader(data, seed=5, rank=0, world_size=1, device=torch.device("cpu"))
next(next(loader.steps(0, 100)))
raise SystemExit(7)
"""


def test_a_crash_that_forgets_to_close_waits_for_no_download(server, tmp_path):
    order = Order([s.num_samples for s in Manifest.load(f"{server.url}/train").shards], seed=5, window_shards=2)
    following = order.coming(0, 0, share=12, global_batch=12)[2:]
    server.faults = {f"train-{shard:06d}.tar": ["stalled"] * 9 for shard in following}
    process = subprocess.run(
        [sys.executable, "-c", CRASHING, server.url, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=150,  # of the 600 s after which an attempt would fail
    )
    assert process.returncode == 7, process.stderr.decode()


RANK = """
import sys
from pipeline.data.cache import Cache
from pipeline.data.manifest import Manifest
from pipeline.data.order import Order
from pipeline.data.remote import Remote
url, folder = sys.argv[1:]
cache = Cache(folder, Remote(url), capacity_bytes=10**9)
print("ready", flush=True)
for shard in Manifest.load(url).shards:
    cache.hold(shard).release()
cache.close()
"""


def start_rank(url: str, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", RANK, url, str(folder)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)


def test_processes_of_a_node_download_each_shard_once(server, tmp_path):
    server.faults = {f"train-{n:06d}.tar": ["slow"] for n in range(6)}
    ranks = [start_rank(f"{server.url}/train", tmp_path) for _ in range(3)]
    assert [rank.wait(60) for rank in ranks] == [0, 0, 0]
    assert {server.requests[f"train-{n:06d}.tar"] for n in range(6)} == {1}
    assert len(cached(tmp_path)) == 6


def test_a_process_killed_in_a_download_leaves_nothing_in_the_way(server, tmp_path):
    server.faults["train-000000.tar"] = ["stalled"]
    killed = start_rank(f"{server.url}/train", tmp_path)
    while not list(tmp_path.glob("*.part/train-000000.tar")):
        assert killed.poll() is None
    other = start_rank(f"{server.url}/train", tmp_path)  # waits for the first one's download
    assert other.stdout
    other.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert other.wait(60) == 0
    assert len(cached(tmp_path)) == 6
    assert not list(tmp_path.glob("*.part"))
    for tar in tmp_path.glob("*/*.tar"):
        shard = next(s for s in Manifest.load(f"{server.url}/train").shards if s.tar == tar.name)
        assert hashlib.sha256(tar.read_bytes()).hexdigest() == shard.sha256


def test_closing_ends_a_download_that_hangs(server: FaultyServer, tmp_path):
    server.faults = {f"train-{n:06d}.npy": ["busy"] * 99 for n in range(6)}
    one = Loader(config(server.url, tmp_path, retries=50), seed=5, rank=0, world_size=1, device=CPU)

    def wait_for_data() -> None:
        with pytest.raises(ClosedError):
            next(next(one.steps(0, 9)))

    waiting = threading.Thread(target=wait_for_data)
    waiting.start()
    while not sum(server.requests[f"train-{n:06d}.npy"] for n in range(6)):
        assert waiting.is_alive()
    one.close()
    waiting.join(10)
    assert not waiting.is_alive()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system to fill up")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system could not be mounted: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_evicts_and_then_says_so(server, small_disk):
    shards = Manifest.load(f"{server.url}/train").shards
    cache = open_cache(f"{server.url}/train", small_disk)
    for shard in shards:  # more than the disk holds, though the cap allows it
        cache.hold(shard).release()
    assert 1 <= len(cached(small_disk)) < 6
    (small_disk / "locks" / "ballast").write_bytes(b"")
    held = cache.hold(shards[0])
    with open(small_disk / "locks" / "ballast", "wb", buffering=0) as ballast:
        try:
            while ballast.write(bytes(1024)):
                pass
        except OSError:
            pass
    full = r"the disk of data\.cache_dir=.*small' is full: http://.*/train needs \d+ bytes"
    with pytest.raises(DataError, match=full):
        [cache.hold(shard) for shard in shards[1:]]
    held.release()
    cache.close()
