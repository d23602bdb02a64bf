"""Killed, stopped, out of space, damaged, written to a URL: nothing finished is lost and every fault is reported."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, free_port
from tests.support.data_sets import drawn_jpeg
from tests.support.prep_runs import contents, prepare, samples_of, write_tar

SMALL = ("--shard-bytes", "256Ki")


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """240 images of about 20 kB, 5 MB: 20 shards."""
    files = {f"{number % 3}/{number:04d}.jpg": drawn_jpeg(number, 320, 400, 95) for number in range(240)}
    return write_tar(tmp_path_factory.mktemp("archive") / "images.tar", files)


@pytest.fixture(scope="module")
def whole(archive) -> Path:
    """The set that an uninterrupted run makes of it."""
    folder = archive.parent / "whole"
    run = prepare("imagefolder", archive, folder, *SMALL)
    assert run.returncode == 0, run.stderr
    assert len(list((folder / "train").glob("*.tar"))) >= 10
    return folder


def begin(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "data_prep", *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(met: Callable[[], bool], process: subprocess.Popen, timeout_s: float = 60) -> None:
    """Returns once `met`, or once the process has ended."""
    deadline = time.monotonic() + timeout_s
    while not met() and process.poll() is None:
        assert time.monotonic() < deadline, "the run neither gets there nor ends"
        os.sched_yield()


def finished(folder: Path) -> dict[str, int]:
    """Shards that have a record, with the time when their tar was written."""
    names = [path.stem for path in (folder / "train/.done").glob("train-*.json")]
    return {name: (folder / f"train/{name}.tar").stat().st_mtime_ns for name in names}


@pytest.mark.parametrize(
    ("records", "whole_group"),
    [
        (4, False),
        pytest.param(0, True, marks=pytest.mark.faults),
        pytest.param(1, False, marks=pytest.mark.faults),
        pytest.param(8, True, marks=pytest.mark.faults),
        pytest.param(12, False, marks=pytest.mark.faults),
    ],
)
def test_killed_and_run_again_it_has_the_same_bytes_and_redoes_no_shard(archive, whole, tmp_path, records, whole_group):
    out = tmp_path / "set"
    process = begin("imagefolder", archive, out, *SMALL)
    wait_until(lambda: out.is_dir() and len(list(out.glob("train/.done/train-*.json"))) >= records, process)
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:  # workers that outlive their parent must not damage what the next run writes
        process.kill()
    process.communicate()
    before = finished(out)
    assert len(before) >= records
    again = prepare("imagefolder", archive, out, *SMALL)
    assert again.returncode == 0, again.stderr
    assert contents(out) == contents(whole)
    after = finished(out)
    assert {name: after[name] for name in before} == before


STUCK = """
import os, signal
from data_prep.pool import run_tasks

def work(task, report):
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    os.write(1, b"stuck\\n")  # in one piece, where print writes two
    while True: pass  # as a decoder that does not come back: it looks at nothing

run_tasks([0, 1], work, 2, lambda event: None)
"""


def test_a_worker_that_is_stuck_does_not_outlive_a_killed_run():
    command = [sys.executable, "-c", STUCK]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert run.stdout is not None
    try:
        assert [run.stdout.readline() for _ in range(2)] == ["stuck\n"] * 2
        run.kill()
        run.communicate(timeout=60)  # the pipe closes when the last process that has it open ends
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.faults)])
def test_a_signal_ends_the_run_with_one_line_and_it_goes_on_from_there(archive, whole, tmp_path, number):
    out = tmp_path / "set"
    process = begin("imagefolder", archive, out, *SMALL)
    wait_until(lambda: len(list(out.glob("train/.done/train-*.json"))) >= 2, process)
    os.killpg(process.pid, number)  # as Ctrl-C in a terminal does: the workers get it too
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75
    assert errors == f"stopped by {number.name}; finished shards are kept: run the same command again to continue\n"
    assert not [*out.rglob(".tmp-*"), *out.rglob(".*.tmp")]
    before = finished(out)
    assert before
    assert prepare("imagefolder", archive, out, *SMALL).returncode == 0
    assert contents(out) == contents(whole)
    assert {name: finished(out)[name] for name in before} == before


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount the small disk that this test fills")
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_loses_nothing_finished(archive, whole, small_disk):
    full = prepare("imagefolder", archive, small_disk, *SMALL)
    assert full.returncode == 65
    assert full.stderr.startswith(f"error: no space left for {small_disk}")
    assert full.stderr.count("\n") == 1
    assert not [*small_disk.rglob(".tmp-*"), *small_disk.rglob(".*.tmp")]
    before = finished(small_disk)
    assert before
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert prepare("imagefolder", archive, small_disk, *SMALL).returncode == 0
    assert contents(small_disk) == contents(whole)
    assert {name: finished(small_disk)[name] for name in before} == before


def test_killed_before_its_first_word_in_the_folder_it_can_be_run_again(archive, whole, tmp_path):
    out = tmp_path / "set"
    code = (
        "import os, signal, sys; from data_prep import __main__, stores; "
        "stores.LocalStore.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL); __main__.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "imagefolder", str(archive), str(out), *SMALL]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    again = prepare("imagefolder", archive, out, *SMALL)
    assert again.returncode == 0, again.stderr
    assert contents(out) == contents(whole)


def test_what_any_kill_left_unfinished_is_gone_after_the_next_run(archive, whole, tmp_path):
    """Under the names of a run of any options: another count of shards, another archive that was unpacked."""
    out = tmp_path / "set"
    shutil.copytree(whole, out)
    (out / "train/manifest.json").unlink()  # it has something to do
    left = [
        ".prep.json.tmp",
        ".tmp-images.tar.gz.unpacked",
        "train/.train-000099.tar.tmp",
        "train/.done/.train-9.json.tmp",
    ]
    for name in left:
        (out / name).write_text("half")
    (out / ".kept.tmp").mkdir()
    assert prepare("imagefolder", archive, out, *SMALL).returncode == 0
    assert [name for name in left if (out / name).exists()] == []
    assert (out / ".kept.tmp").is_dir()


@pytest.mark.faults  # the run waits five seconds for the other one
def test_a_second_run_beside_the_first_is_refused(archive, tmp_path):
    import fcntl

    out = tmp_path / "set"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        run = prepare("imagefolder", archive, out, *SMALL)
    finally:
        os.close(handle)
    assert run.returncode == 64
    assert run.stderr == f"error: another run is writing to {out}; wait for it, or give another folder\n"


def with_closed_output(*arguments: object) -> tuple[int, str]:
    """Exit code and standard error of a run whose standard output nobody reads."""
    nobody, pipe = os.pipe()
    os.close(nobody)
    try:
        command = [sys.executable, "-m", "data_prep", *map(str, arguments)]
        run = subprocess.run(command, cwd=ROOT, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(pipe)
    return run.returncode, run.stderr


def test_a_reader_that_went_away_ends_the_run_quietly(archive, whole, tmp_path):
    sheet = tmp_path / "sheet.png"
    for command in (("info", whole, "--sheet", sheet), ("verify", whole)):
        assert with_closed_output(*command) == (141, "")
    out = tmp_path / "set"
    assert with_closed_output("imagefolder", archive, out, *SMALL) == (141, "")
    assert prepare("imagefolder", archive, out, *SMALL).returncode == 0
    assert contents(out) == contents(whole)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def swap_index_lines(path: Path) -> None:
    first, one, two, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first, two, one, *rest]))


def change_label(path: Path) -> None:
    table = np.load(path)
    table["label"][0] = (table["label"][0] + 1) % 3
    np.save(path, table)


FAULTS = {
    "a flipped byte": (lambda train: flip(train / "train-000003.tar", 70_000), ["train/train-000003.tar: SHA-256 is"]),
    "a missing shard": (lambda train: (train / "train-000001.tar").unlink(), ["train/train-000001.tar: is missing"]),
    "a cut shard": (
        lambda train: os.truncate(train / "train-000002.tar", 100_000),
        ["train/train-000002.tar: SHA-256 is", "train/train-000002.tar: 100000 bytes, the manifest says"],
    ),
    "a wrong index": (
        lambda train: swap_index_lines(train / "train-000000.idx"),
        ["train/train-000000.idx: SHA-256 is", "train/train-000000.idx: does not describe train-000000.tar"],
    ),
    "a wrong label": (
        lambda train: change_label(train / "train-000004.npy"),
        ["train/train-000004.npy: SHA-256 is", "train/train-000004.npy: label of sample 0 is"],
    ),
    "a stray shard": (
        lambda train: (train / "train-000099.tar").write_bytes(b"x"),
        ["train/train-000099.tar: is not in the manifest"],
    ),
    "no manifest": (lambda train: (train / "manifest.json").unlink(), ["no shard set in"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_names_the_fault(whole, tmp_path, fault):
    damage, expected = FAULTS[fault]
    copy = tmp_path / "set"
    subprocess.run(["cp", "-r", str(whole), str(copy)], check=True)
    damage(copy / "train")
    run = prepare("verify", copy)
    assert run.returncode == (64 if fault == "no manifest" else 65)
    told = (run.stdout + run.stderr).splitlines()
    for part in expected:
        assert sum(part in line for line in told) == 1, told
    assert len(told) <= len(expected) + 1, told
    assert "Traceback" not in run.stderr


def rewritten(train: Path, ending: str, change: Callable[[bytes], bytes]) -> None:
    """Changes a file of the first shard and says so in the manifest, as who made the set so would have done."""
    manifest = json.loads((train / "manifest.json").read_text())
    path, field = train / f"train-000000.{ending}", {"tar": "sha256", "npy": "samples_sha256"}[ending]
    path.write_bytes(change(path.read_bytes()))
    manifest["shards"][0][field] = hashlib.sha256(path.read_bytes()).hexdigest()
    (train / "manifest.json").write_text(json.dumps(manifest))


def labelled(tar: bytes, label: bytes) -> bytes:
    """The tar with another label of its first sample."""
    head = bytearray(tar[:512])
    head[124:136], head[148:156] = b"%011o\0" % len(label), b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + label.ljust(512, b"\0") + tar[1024:]


def as_saved(table: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, table)
    return stream.getvalue()


def moved(data: bytes) -> bytes:
    table = np.load(io.BytesIO(data))
    table["offset"][3] = 1 << 62
    return as_saved(table)


def many(data: bytes) -> bytes:
    """The same records under a header that says 10¹³."""
    stream, table = io.BytesIO(), np.load(io.BytesIO(data))
    descr = np.lib.format.dtype_to_descr(table.dtype)
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": (10**13,)})
    return stream.getvalue() + table.tobytes()


HOSTILE = {
    "a label of ten digits": ("tar", lambda tar: labelled(tar, b"9999999999"), "the label b'9999999999' is none of 3"),
    "a label of 500 digits": ("tar", lambda tar: labelled(tar, b"9" * 500), "the label b'9999999999' is none of 3"),
    "a table of 10¹³ samples": ("npy", many, "train-000000.npy: holds (10000000000000,) of "),
    "a table of something else": ("npy", lambda _: as_saved(np.zeros(9)), "train-000000.npy: holds (9,) of float64, "),
    "a table that is none": ("npy", lambda _: b"no table", "train-000000.npy: cannot be read ("),
    "a table that leads out of the tar": ("npy", moved, "train-000000.npy: puts sample 3 outside of train-000000.tar"),
    "a tar of no byte": ("tar", lambda _: b"", "train-000000.tar: is empty"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_verify_ends_well_whatever_a_set_holds(whole, tmp_path, fault):
    ending, change, said = HOSTILE[fault]
    shutil.copytree(whole, tmp_path / "set")
    rewritten(tmp_path / "set/train", ending, change)
    run = prepare("verify", tmp_path / "set", "--workers", 1)
    assert (run.returncode, run.stderr) == (65, "")
    assert said in run.stdout


@pytest.mark.parametrize("ending", ["tar", "idx", "npy"])
def with_label(data: bytes, label: int) -> bytes:
    table = np.load(io.BytesIO(data))
    table["label"][3] = label
    return as_saved(table)


def in_a_line(run: subprocess.CompletedProcess, said: str) -> bool:
    return (run.returncode, run.stderr.count("\n")) == (65, 1) and said in run.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [(change, said.split(": ", 1)[1]) for ending, change, said in HOSTILE.values() if ending == "npy"]
    + [
        (lambda data: with_label(data, -1), "gives sample 3 the label -1, of 3 classes"),
        (lambda data: with_label(data, 3), "gives sample 3 the label 3, of 3 classes"),
        (lambda data: as_saved(np.load(io.BytesIO(data))[:3]), "holds (3,) of "),
    ],
)
def test_info_ends_in_a_line_whatever_a_table_holds(whole, tmp_path, change, said):
    shutil.copytree(whole, tmp_path / "set")
    rewritten(tmp_path / "set/train", "npy", change)
    run = prepare("info", tmp_path / "set")
    assert in_a_line(run, f"train-000000.npy {said}"), run.stderr
    assert "check the set with python -m data_prep verify" in run.stderr


def test_info_of_a_set_without_shards_says_so(whole, tmp_path):
    (tmp_path / "train").mkdir()
    manifest = json.loads((whole / "train/manifest.json").read_text())
    (tmp_path / "train/manifest.json").write_text(json.dumps(manifest | {"shards": []}))
    (tmp_path / "prep.json").write_bytes((whole / "prep.json").read_bytes())
    run = prepare("info", tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines()[1].split() == ["train", "3", "0", "0", "0", "0", "B", "-", "-"]


@pytest.mark.parametrize("ending", ["tar", "idx", "npy"])
def test_verify_tells_of_a_missing_file_once(whole, tmp_path, ending):
    shutil.copytree(whole, tmp_path / "set")
    (tmp_path / f"set/train/train-000000.{ending}").unlink()
    run = prepare("verify", tmp_path / "set", "--workers", 1)
    assert (run.returncode, run.stderr) == (65, "")
    assert run.stdout.count(f"train-000000.{ending}") == 1
    assert f"train/train-000000.{ending}: is missing" in run.stdout


def test_verify_says_that_a_whole_set_is_whole(whole):
    for depth, words in (((), "checksums, index, tables and headers"), (("--decode",), "every sample decoded")):
        run = prepare("verify", whole, *depth)
        assert (run.returncode, run.stderr) == (0, "")
        assert run.stdout.startswith(f"{whole} is whole: 240 samples in")
        assert words in run.stdout


def client_of(s3: dict[str, str]):
    import boto3

    url, key, secret, region = list(s3.values())[:4]
    return boto3.client("s3", endpoint_url=url, aws_access_key_id=key, aws_secret_access_key=secret, region_name=region)


@pytest.fixture(scope="module")
def s3(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment in which s3:// is moto's S3 server, a process of its own; it has the bucket `sets`."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "TMPDIR": str(tmp_path_factory.mktemp("scratch")),
    }

    def answers() -> bool:
        try:
            return urllib.request.urlopen(settings["AWS_ENDPOINT_URL"]).status == 200
        except OSError:
            return False

    try:
        wait_until(answers, server)
        client_of(settings).create_bucket(Bucket="sets")
        yield settings
    finally:
        server.terminate()
        server.wait()


def names_in(s3: dict[str, str], below: str) -> list[str]:
    found = client_of(s3).list_objects_v2(Bucket="sets", Prefix=below)
    return [entry["Key"] for entry in found.get("Contents", [])]


def objects(s3: dict[str, str], below: str) -> dict[str, str]:
    """SHA-256 of every object of the bucket below a prefix."""
    bodies = {name: client_of(s3).get_object(Bucket="sets", Key=name)["Body"] for name in names_in(s3, below)}
    return {name.removeprefix(below): hashlib.sha256(body.read()).hexdigest() for name, body in bodies.items()}


def run_there(s3: dict[str, str], *arguments: object) -> tuple[int, str, str]:
    process = begin(*arguments, **s3)
    out, errors = process.communicate(timeout=120)
    return process.returncode, out, errors


def test_a_bucket_holds_the_same_bytes_as_a_folder_even_after_a_kill(archive, whole, s3):
    url = "s3://sets/one"
    process = begin("imagefolder", archive, url, *SMALL, **s3)
    wait_until(lambda: len(names_in(s3, "one/train/.done/")) >= 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    code, out, errors = run_there(s3, "imagefolder", archive, url, *SMALL)
    assert code == 0, errors
    assert "shards are finished already" in out
    assert objects(s3, "one/") == contents(whole)
    assert not list(Path(s3["TMPDIR"]).iterdir())
    scratch = ("--scratch", Path(s3["TMPDIR"]) / "other")
    assert "complete already" in run_there(s3, "imagefolder", archive, url, *SMALL, *scratch)[1]
    code, out, errors = run_there(s3, "verify", url)
    assert code == 0, out + errors
    assert f"{url} is whole: 240 samples" in out


def test_a_missing_bucket_or_protocol_is_one_line(archive, s3):
    code, _, errors = run_there(s3, "imagefolder", archive, "s3://no-such-bucket/set", *SMALL)
    assert (code, errors.count("\n")) == (64, 1), errors
    assert "create the bucket first" in errors
    code, _, errors = run_there(s3, "imagefolder", archive, "nosuch://somewhere/set", *SMALL)
    assert (code, errors.count("\n")) == (64, 1), errors
    assert "nosuch" in errors


def write_large_tar(path: Path, num_large: int, num_small: int) -> None:
    """A tar of class folders, most of it holes: large images carry a megabyte of empty comments."""
    from data_prep.tar_format import HeaderMaker, end_of_tar, padded

    header, picture = HeaderMaker(), drawn_jpeg(1, 40, 40)
    comment = b"\xff\xfe\xff\xff"
    with open(path, "wb") as file:
        for number in range(num_large + num_small):
            num_comments = 16 if number < num_large else 0
            length = len(picture) + num_comments * 65537
            file.write(header(b"%d/%06d.jpg" % (number % 10, number), length))
            at = file.tell()
            file.write(picture[:2])
            for _ in range(num_comments):
                file.write(comment)
                file.seek(65533, os.SEEK_CUR)
            file.write(picture[2:])
            file.seek(at + padded(length))
        file.write(end_of_tar(file.tell()))


def resident_bytes(process: subprocess.Popen) -> int:
    """Memory of the run and its workers together; a page that they share counts once for each of them."""
    total = 0
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for number in (str(process.pid), *children):
            total += int(Path(f"/proc/{number}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):  # one of them has just ended
        pass
    return total


@pytest.mark.faults
def test_five_gigabytes_pass_through_less_than_one_of_memory(tmp_path):
    archive = tmp_path / "large.tar"
    write_large_tar(archive, 5000, 60_000)
    assert archive.stat().st_size > 5e9
    process, highest = begin("imagefolder", archive, tmp_path / "set", "--resize", 32), 0
    while True:
        try:
            _, errors = process.communicate(timeout=0.1)
            break
        except subprocess.TimeoutExpired:
            highest = max(highest, resident_bytes(process))
    assert process.returncode == 0, errors
    print(f"{archive.stat().st_size / 1e9:.1f} GB, at most {highest / 1e6:.0f} MB resident")
    assert 0 < highest < 1e9
    assert json.loads((tmp_path / "set/prep.json").read_text())["counts"]["train"]["out"] == 65_000
    assert len(samples_of(tmp_path / "set/train")) == 65_000
