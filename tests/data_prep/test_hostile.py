"""Hostile archives: nothing is written outside of the output, no member is trusted, no run ends in a traceback."""

import io
import json
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.data_sets import drawn_jpeg
from tests.support.prep_runs import drawn_folder, prepare, samples_of, write_tar, write_zip


def test_a_hostile_tar_harms_nothing(tmp_path):
    good = drawn_folder()
    archive = write_tar(tmp_path / "in.tar", good)
    with tarfile.open(archive, "a", encoding="utf-8", errors="surrogateescape") as tar:

        def add(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", link: str = "") -> None:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.size = kind, link, len(data)
            tar.addfile(entry, io.BytesIO(data))

        add("../../escaped.jpg", data=drawn_jpeg(50))
        add("ant/../../escaped.jpg", data=drawn_jpeg(51))
        add("/escaped.jpg", data=drawn_jpeg(52))
        add("ant/link.jpg", tarfile.SYMTYPE, link="/etc/passwd")
        add("ant/hard.jpg", tarfile.LNKTYPE, link="ant/000.jpg")
        add("ant/device.jpg", tarfile.CHRTYPE)
        add("ant/pipe.jpg", tarfile.FIFOTYPE)
        add("bee/001.jpg", data=drawn_jpeg(53))
        add("bee/\udcff\udcfe.jpg", data=drawn_jpeg(54))
        add("cat/\x1b[2Jclear.jpg", data=b"not an image")
        add("\x1b[2Jclear.jpg", data=drawn_jpeg(55))
    before = sorted(tmp_path.rglob("*")), sorted(tmp_path.parent.iterdir())
    out = tmp_path / "set"
    strict = prepare("imagefolder", archive, out, "--allow-bad", 0)
    assert strict.returncode == 65
    assert "\x1b" not in strict.stderr + strict.stdout
    assert "Traceback" not in strict.stderr
    outside = sorted(path for path in tmp_path.rglob("*") if path != out and out not in path.parents)
    assert (outside, sorted(tmp_path.parent.iterdir())) == before
    lenient = prepare("imagefolder", archive, out, "--allow-bad", 10)
    assert lenient.returncode == 0, lenient.stderr
    assert {sample.image for sample in samples_of(out / "train")} == set(good.values())
    lines = [json.loads(line) for line in (out / "train/quarantine.jsonl").read_text().splitlines()]
    reasons = sorted(line["reason"] for line in lines)
    assert reasons == sorted(
        [
            *["its path leaves the archive"] * 3,
            "a symbolic link",
            "a hard link",
            "a character device",
            "a named pipe",
            "duplicate name: the first one is kept",
            "its name is not UTF-8",
            "not an image: no known format",
        ]
    )


def set_in_directory(archive: Path, name: bytes, at: int, value: bytes) -> None:
    """Overwrites bytes of the entry of the member `name` in a zip's directory; APPNOTE 4.3.12 says what lies where."""
    data = bytearray(archive.read_bytes())
    start = data.rindex(name) - 46 + at
    data[start : start + len(value)] = value
    archive.write_bytes(data)


def test_a_hostile_zip_harms_nothing(tmp_path):
    good = drawn_folder()
    archive = write_zip(tmp_path / "in.zip", good)

    def add(name: str, data: bytes = drawn_jpeg(50), kind: int = stat.S_IFREG, how: int = zipfile.ZIP_DEFLATED) -> None:
        entry = zipfile.ZipInfo(name)
        entry.external_attr, entry.compress_type = (kind | 0o644) << 16, how
        zipped.writestr(entry, data)

    with zipfile.ZipFile(archive, "a") as zipped:
        for name in ("../../up.jpg", "ant/../../up.jpg", "/up.jpg", "ant\\..\\..\\up.jpg"):
            add(name)
        add("ant/link.jpg", b"/etc/passwd", stat.S_IFLNK)
        add("ant/pipe.jpg", kind=stat.S_IFIFO)
        add("bee/locked.jpg")
        add("bee/lzma.jpg", how=zipfile.ZIP_LZMA)
        add("bee/\u00ff\u00fe.jpg")
        add("cat/bomb.png", bytes(100 << 20))
        add("cat/liar.png", bytes(100 << 20))
        add("cat/promise.jpg")
        with pytest.warns(UserWarning, match="Duplicate name"):
            add("bee/001.jpg")
    set_in_directory(archive, b"bee/locked.jpg", 8, b"\1")  # flags: encrypted
    set_in_directory(archive, b"cat/liar.png", 24, struct.pack("<L", 1000))  # its unpacked size
    set_in_directory(archive, b"cat/promise.jpg", 24, struct.pack("<L", 0xFFFFFFF0))
    archive.write_bytes(archive.read_bytes().replace("\u00ff\u00fe".encode(), b"\xff\xfe\xff\xfe"))
    before = sorted(tmp_path.rglob("*")), sorted(tmp_path.parent.iterdir())
    out = tmp_path / "set"
    run = prepare("imagefolder", archive, out, "--allow-bad", 13, "--resize", 64)
    assert (run.returncode, run.stderr) == (0, "")
    outside = sorted(path for path in tmp_path.rglob("*") if path != out and out not in path.parents)
    assert (outside, sorted(tmp_path.parent.iterdir())) == before
    assert {sample.image for sample in samples_of(out / "train")} == set(good.values())
    lines = [json.loads(line) for line in (out / "train/quarantine.jsonl").read_text().splitlines()]
    reasons = {line["name"]: line["reason"] for line in lines}
    for name in ("../../up.jpg", "ant/../../up.jpg", "/up.jpg"):
        assert reasons[name] == "its path leaves the archive"
    assert len([reason for line in lines if (reason := line["reason"]) == "its path leaves the archive"]) == 4
    assert reasons["ant/link.jpg"] == "a symbolic link"
    assert reasons["ant/pipe.jpg"] == "a device or pipe"
    assert reasons["bee/locked.jpg"] == "encrypted"
    assert reasons["bee/lzma.jpg"].startswith("compressed by method 14")
    assert reasons["bee/\\xff\\xfe\\xff\\xfe.jpg"] == "its name is not UTF-8"
    assert reasons["bee/001.jpg"] == "duplicate name: the first one is kept"
    assert reasons["cat/bomb.png"] == "104857600 bytes, more than the 67108864 that a sample may have"
    assert reasons["cat/liar.png"] == "damaged: more than the 1000 bytes that the zip's directory says"
    assert reasons["cat/promise.jpg"].startswith("said to hold 4294967280 bytes, more than its")
    assert len(lines) == 13


def claim(archive: Path, length: int, offset: int) -> None:
    """Gives the last member a size and a place by a zip64 field (APPNOTE 4.5.3)."""
    field = struct.pack("<2H2Q", 1, 16, length, offset)
    data = archive.read_bytes()
    entry, end = data.rindex(b"PK\1\2"), data.rindex(b"PK\5\6")
    head = bytearray(data[entry:end])
    struct.pack_into("<L", head, 24, 0xFFFFFFFF)
    struct.pack_into("<L", head, 42, 0xFFFFFFFF)
    struct.pack_into("<H", head, 30, len(field))
    tail = bytearray(data[end:])
    struct.pack_into("<L", tail, 12, struct.unpack_from("<L", tail, 12)[0] + len(field))
    archive.write_bytes(data[:entry] + head + field + tail)


def claim_directory(archive: Path, at: int) -> None:
    """Says in a zip64 locator (APPNOTE 4.3.15) that the directory's own record lies at `at`."""
    data = archive.read_bytes()
    end = data.rindex(b"PK\5\6")
    tail = bytearray(data[end:])
    struct.pack_into("<H", tail, 10, 0xFFFF)
    archive.write_bytes(data[:end] + struct.pack("<4sLQL", b"PK\6\7", 0, at, 1) + tail)


@pytest.mark.parametrize("number", [2**64 - 1, 2**63, 2**40])
def test_numbers_beyond_the_file_are_one_line(tmp_path, number):
    archive = write_zip(tmp_path / "in.zip", drawn_folder())
    whole = archive.read_bytes()
    claim(archive, number, 0)
    large = prepare("imagefolder", archive, tmp_path / "large", "--resize", 16)
    assert (large.returncode, large.stderr.count("\n")) == (65, 2)
    assert f"said to hold {number} bytes, more than its" in large.stderr
    archive.write_bytes(whole)
    claim(archive, 100, number)
    far = prepare("imagefolder", archive, tmp_path / "far")
    assert (far.returncode, far.stderr.count("\n")) == (65, 1)
    assert "is damaged: a member lies behind the end of the file" in far.stderr
    archive.write_bytes(whole)
    claim_directory(archive, number)
    lost = prepare("imagefolder", archive, tmp_path / "lost")
    assert (lost.returncode, lost.stderr.count("\n")) == (65, 1)
    assert "is damaged: its directory cannot be found" in lost.stderr
