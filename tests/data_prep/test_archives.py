"""Archives cut, joined, padded and damaged: every sample is packed, or named, or the run fails with the reason."""

import bz2
import gzip
import io
import lzma
import random
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.plan import Options, make_plan
from data_prep.shard_writer import RECORDS, write_shard
from data_prep.sources.files import open_collection
from data_prep.sources.imagefolder import ImageFolder
from data_prep.sources.readers import ZipReader
from data_prep.sources.tars import walk_tar
from data_prep.sources.zips import walk_zip
from pipeline.errors import DataError
from tests.support.data_sets import drawn_jpeg
from tests.support.image_corpus import saved, segment
from tests.support.prep_runs import prepare, tar_bytes, write_tar, zip_bytes

BLOCK = 512
COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@cache
def images(letter: str, num: int = 4) -> dict[str, bytes]:
    """Names and bytes of a few small images, of two classes."""
    start = 100 * ord(letter)
    return {f"{'ab'[i % 2]}/{letter}{i}.jpg": drawn_jpeg(start + i, 16, 16) for i in range(num)}


def unpacked_as_far_as_possible(data: bytes, kind: str) -> bytes:
    """What the streams of a compressed file hold up to its first damage."""
    begin = {"gz": lambda: zlib.decompressobj(31), "bz2": bz2.BZ2Decompressor, "xz": lzma.LZMADecompressor}[kind]
    found = []
    while data := data.lstrip(b"\0"):
        stream = begin()
        try:
            found.append(stream.decompress(data))
        except (zlib.error, OSError, lzma.LZMAError, EOFError):
            break
        if not stream.eof:
            break
        data = stream.unused_data
    return b"".join(found)


class Packed(NamedTuple):
    said: str
    """The error with which the run ended; empty where it succeeded."""
    images: list[bytes]
    refusals: dict[str, str]
    told: list[str]


def pack(data: bytes, suffix: str) -> Packed:
    """What the archive `data` becomes, however many of its samples are refused.

    Without the workers of the command: a fork may hang where threads of a decoder run.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, shards, told = Path(folder, f"in.{suffix}"), Path(folder, "train"), []
        (shards / RECORDS).mkdir(parents=True)
        source.write_bytes(data)
        found, refusals, options = [], [], Options()
        try:
            (split,) = ImageFolder(str(source), 0.0, 0).index(Path(folder), told.append)
            plan = make_plan(split, options)
            for number in range(plan.num_shards):
                record = write_shard(split, plan, number, options, shards, lambda *_: None)
                refusals += record.refusals
                if record.shard.num_samples:
                    tar, rows = (shards / record.shard.tar).read_bytes(), np.load(shards / record.shard.samples)
                    found += [tar[row["offset"] : row["offset"] + row["length"]] for row in rows]
        except DataError as error:
            return Packed(str(error), [], {}, told)
        return Packed("", found, {refusal.name: refusal.reason for refusal in (*split.refusals, *refusals)}, told)


def missing(packed: Packed, content: bytes, record: Callable[[str, bytes], bytes]) -> list[str]:
    """Samples that lie in `content` with their header, but were neither packed nor named."""
    named = " ".join(f"{name} {reason}" for name, reason in packed.refusals.items())
    here = {name: data for letter in "xy" for name, data in images(letter).items() if record(name, data) in content}
    return [name for name, data in here.items() if data not in packed.images and name not in named]


@st.composite
def mangled(draw, wholes: list[bytes]) -> bytes:
    """Parts of archives, cut anywhere or at a block and joined, with other bytes between them."""
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        whole = draw(st.sampled_from(wholes))
        ends = st.one_of(st.integers(0, len(whole)), st.integers(0, len(whole) // BLOCK).map(lambda n: n * BLOCK))
        start = draw(st.one_of(st.just(0), st.just(0), ends))
        stop = draw(st.one_of(st.just(len(whole)), st.just(len(whole)), ends))
        parts.append(whole[start:stop])
        zeros = st.integers(0, 40).map(lambda n: bytes(BLOCK * n))
        parts.append(draw(st.one_of(st.just(b""), st.just(b""), zeros, st.binary(max_size=30))))
    return b"".join(parts)


TARS = [tar_bytes(images("x")), tar_bytes(images("y"))]


def tar_record(name: str, data: bytes) -> bytes:
    whole = TARS["xy".index(name[2])]
    at = whole.index(data) - BLOCK
    return whole[at : at + BLOCK + len(data)]


@settings(max_examples=120)
@given(data=mangled(TARS))
@example(data=TARS[0] + TARS[1])
@example(data=TARS[0][: 3 * BLOCK] + TARS[1])  # a member is cut and swallows one of the other tar
@example(data=TARS[0][:-9000])
def test_what_lies_in_a_mangled_tar_comes_out_or_is_named_or_the_run_says_why_not(data):
    packed = pack(data, "tar")
    assert packed.said or missing(packed, data, tar_record) == []


@pytest.mark.parametrize("kind", COMPRESS)
@settings(max_examples=25)
@given(draw=st.data())
def test_so_it_is_with_compressed_tars(kind, draw):
    data = draw.draw(mangled([COMPRESS[kind](whole) for whole in TARS]))
    packed = pack(data, f"tar.{kind}")
    assert packed.said or missing(packed, unpacked_as_far_as_possible(data, kind), tar_record) == []


ZIPS = [zip_bytes(images("x")), zip_bytes(images("y"))]


def zip_record(name: str, data: bytes) -> bytes:
    whole = ZIPS["xy".index(name[2])]
    at = whole.index(b"PK\3\4", whole.index(name.encode()) - 30)
    return whole[at : at + 30 + len(name) + len(data)]


@settings(max_examples=60)
@given(data=mangled(ZIPS))
def test_so_it_is_with_zips(data):
    packed = pack(data, "zip")
    assert packed.said or missing(packed, data, zip_record) == []


@pytest.mark.parametrize("kind", ["tar", *COMPRESS])
def test_joined_tars_give_the_samples_of_both(kind):
    compress = COMPRESS.get(kind, bytes)
    for data in (compress(TARS[0]) + compress(TARS[1]), compress(TARS[0] + TARS[1])):
        packed = pack(data, kind)
        assert packed.said == ""
        assert sorted(packed.images) == sorted([*images("x").values(), *images("y").values()])


@pytest.mark.parametrize("num_blocks", [0, 1, 19, 500])
def test_zeros_behind_a_tar_are_padding_and_many_of_them_are_told(num_blocks):
    packed = pack(TARS[0] + bytes(num_blocks * BLOCK), "tar")
    assert sorted(packed.images) == sorted(images("x").values())
    told = [line for line in packed.told if "more zeros behind its end than fill a tar up" in line]
    assert len(told) == (num_blocks > 0)


def end_of_members(whole: bytes) -> int:
    return len(whole.rstrip(b"\0")) + -len(whole.rstrip(b"\0")) % BLOCK


def test_a_tar_without_its_end_is_refused_and_half_an_end_is_one():
    end = end_of_members(TARS[0])
    assert "the blocks that end a tar are missing" in pack(TARS[0][:end], "tar").said
    assert "the blocks that end a tar are missing" in pack(TARS[0][: end - 3 * BLOCK], "tar").said
    for length in (1, BLOCK, BLOCK + 9):
        assert sorted(pack(TARS[0][: end + length], "tar").images) == sorted(images("x").values())


def test_something_else_behind_an_archive_is_said():
    assert "holds something behind its end that is no tar" in pack(TARS[0] + b"\n", "tar").said
    assert "holds something behind its end that is no tar" in pack(TARS[0] + ZIPS[0], "tar").said
    assert "has something behind its end" in pack(ZIPS[0] + b"\n", "zip").said
    assert "has something before it, as two zips joined" in pack(ZIPS[0] + ZIPS[1], "zip").said
    assert "has something before it, as two zips joined" in pack(ZIPS[0] + zip_bytes({}), "zip").said
    assert "is not a tar archive" in pack(b"#!/bin/sh\nexit\n" * 99 + ZIPS[0], "zip").said
    for kind in ("bz2", "xz", "gz"):
        assert "is cut off or damaged" in pack(COMPRESS[kind](TARS[0]) + b"more", f"tar.{kind}").said
        assert pack(COMPRESS[kind](TARS[0]) + bytes(64), f"tar.{kind}").said == ""


def test_samples_that_a_cut_member_swallowed_are_named():
    """A member is cut at a block and another tar joined there: members in its missing part are not found."""
    third = TARS[0].index(b"a/x2.jpg") // BLOCK  # where the walk finds a header again
    jpeg = drawn_jpeg(1)
    comment = segment(0xFE, b"c" * ((third + 1) * BLOCK - len(jpeg) - 4))
    flat = saved(Image.new("RGB", (16, 20), "teal"), "BMP")  # nothing in it shows that its pixels are wrong
    for name, whole in (("a/large.jpg", jpeg[:2] + comment + jpeg[2:]), ("a/flat.bmp", flat)):
        header = tar_bytes({name: whole.ljust((third + 1) * BLOCK, b"\0")})[:BLOCK]
        packed = pack(header + whole.ljust(BLOCK)[:BLOCK] + TARS[0], "tar")
        assert sorted(packed.images) == sorted(images("x")[kept] for kept in ("a/x2.jpg", "b/x3.jpg"))
        assert packed.refusals.keys() == {name}
        assert "which was cut and joined: a/x0.jpg, b/x1.jpg" in packed.refusals[name]


class Pipe(io.BytesIO):
    """A stream: a zip that is written into it has each member's checksum behind the data."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_: int) -> int:
        raise io.UnsupportedOperation

    tell = seek


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("sizes_behind", [False, True])
def test_a_member_of_a_zip_with_another_checksum_is_refused_by_name(method, sizes_behind):
    stream = Pipe() if sizes_behind else io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in images("x").items():
            archive.writestr(name, data)
    whole = stream.getvalue()
    assert sorted(pack(whole, "zip").images) == sorted(images("x").values())
    at = whole.index(b"a/x2.jpg") + len("a/x2.jpg")
    packed = pack(flipped(whole, at + 300), "zip")
    assert packed.refusals.keys() == {"a/x2.jpg"}
    assert "damaged: " in packed.refusals["a/x2.jpg"]
    assert len(packed.images) == 3
    # A comment in a JPEG changes no pixel: only the checksum tells.
    assert "damaged" in "".join(pack(flipped(whole, at + 25), "zip").refusals.values())


def test_members_that_a_zip_s_directory_does_not_list_are_named():
    whole = zip_bytes(images("x"))
    directory, end = whole.index(b"PK\1\2"), whole.index(b"PK\5\6")
    first = whole.index(b"PK\1\2", directory + 4)
    entries = whole[first:end]
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, len(entries), directory, 0)
    packed = pack(whole[:directory] + entries + tail, "zip")
    assert packed.refusals == {"a/x0.jpg": "not listed in the zip's directory"}
    assert len(packed.images) == 3
    # An older copy of a member, as some programs leave it behind, is not missing.
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/x0.jpg", drawn_jpeg(7))
        archive.filelist.clear()
        archive.NameToInfo.clear()
        for name, data in images("x").items():
            archive.writestr(name, data)
    packed = pack(stream.getvalue(), "zip")
    assert (packed.refusals, len(packed.images)) == ({}, 4)


def test_the_directory_of_a_zip_is_read_by_its_size_and_its_count_is_checked(tmp_path):
    """Some programs write more than 65,535 members without zip64: the count is cut to 16 bits then."""
    whole = zip_bytes(images("x"))
    end = whole.index(b"PK\5\6")
    lying = whole[: end + 8] + struct.pack("<2H", 3, 3) + whole[end + 12 :]
    assert "its directory lists 4 members of 3" in pack(lying, "zip").said
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(65_540):
            archive.writestr(zipfile.ZipInfo(f"a/{number}"), b"")
    data = bytearray(path.read_bytes())
    end, end64 = data.rindex(b"PK\5\6"), data.rindex(b"PK\6\6")
    struct.pack_into("<2H", data, end + 8, 4, 4)
    struct.pack_into("<2L", data, end + 12, *struct.unpack_from("<2Q", data, end64 + 40))
    path.write_bytes(data[:end64] + data[end:])
    assert sum(1 for _ in walk_zip(path)) == 65_540


def test_zips_with_zip64_records_comments_and_padding_are_read(tmp_path):
    path = tmp_path / "in.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in images("x").items():
            with archive.open(name, "w", force_zip64=True) as stream:
                stream.write(data)
        archive.comment = b"made by hand PK\5\6 " + bytes(30)
    assert sorted(pack(path.read_bytes(), "zip").images) == sorted(images("x").values())


@pytest.mark.parametrize(
    ("raw", "field", "name"),
    [
        ("é".encode(), b"", "é"),
        (b"\xe9", "é".encode(), "é"),
        (b"\x82", b"", "é"),
    ],
    ids=["UTF-8 without its flag", "field 0x7075", "code page 437"],
)
def test_names_of_a_zip_are_those_of_the_folder_that_it_was_made_of(tmp_path, raw, field, name):
    stand_in = b"Q" * len(raw)
    path = tmp_path / "in.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo(f"{stand_in.decode()}/1.jpg")
        if field:
            value = b"\1" + struct.pack("<L", zlib.crc32(raw + b"/1.jpg")) + field + b"/1.jpg"
            info.extra = struct.pack("<2H", 0x7075, len(value)) + value
        archive.writestr(info, b"1")
    path.write_bytes(path.read_bytes().replace(stand_in + b"/1.jpg", raw + b"/1.jpg"))
    said = []
    assert [found.name.decode() for found in walk_zip(path, said.append)] == [f"{name}/1.jpg"]
    assert len(said) == (raw == b"\x82")
    assert not said or said[0].endswith("such as é/1.jpg; where that is wrong, unpack it and give the folder")


def with_size(header: bytes, kind: bytes, size: int) -> bytes:
    """A tar header of another type and size, with the checksum that fits."""
    changed = header[:124] + b"%011o\0" % size + header[136:148] + b" " * 8 + kind + header[157:]
    return changed[:148] + b"%06o\0 " % sum(changed) + changed[156:]


@pytest.mark.parametrize("kind", [b"1", b"2", b"5", b"6", b"D", b"V", b"M"])
@pytest.mark.parametrize("with_data", [False, True])
def test_what_follows_a_link_or_a_folder_that_states_a_size_is_found(kind, with_data):
    odd = tar_bytes({"a/odd": b"x" * 700})
    header, data = odd[:BLOCK], odd[BLOCK : 3 * BLOCK] if with_data else b""
    packed = pack(with_size(header, kind, 700) + data + TARS[0], "tar")
    assert sorted(packed.images) == sorted(images("x").values())
    assert packed.refusals.keys() == (set() if kind in (b"5", b"D", b"V") else {"a/odd"})


def test_a_sparse_file_with_a_long_map_is_refused_and_the_rest_is_read():
    header = bytearray(with_size(tar_bytes({"a/holes.jpg": b"x" * 700})[:BLOCK], b"S", 700))
    header[482] = 1
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    more = bytearray(2 * BLOCK)
    more[504] = 1
    packed = pack(bytes(header + more) + b"x" * 700 + bytes(BLOCK * 2 - 700) + TARS[0], "tar")
    assert packed.refusals == {"a/holes.jpg": "a sparse file"}
    assert len(packed.images) == 4


@pytest.mark.parametrize("size", [b"-0000001000\0", b"-7777777777\0", b"+0000000010\0", b"1_000000000\0", b"zzz\0"])
def test_a_size_that_is_no_number_ends_the_walk(tmp_path, size):
    header = bytearray(TARS[0][:BLOCK])
    header[124:136] = size.ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "in.tar"
    path.write_bytes(bytes(header) + TARS[0][BLOCK:])
    with pytest.raises(DataError, match="no size in the header at byte 0"):
        list(walk_tar(path))


LONG = b"5011 size=" + b"9" * 5000 + b"\n"  # more digits than int() takes


@pytest.mark.parametrize("record", [b"14 size=-1024\n", b"13 size=1_00\n", b"99 path=b.jpg\n", b"nothing\n", LONG])
def test_an_extended_header_that_cannot_be_read_ends_the_walk(tmp_path, record):
    header = with_size(TARS[0][:BLOCK], b"x", len(record))
    path = tmp_path / "in.tar"
    path.write_bytes(header + record + bytes(-len(record) % BLOCK) + TARS[0])
    with pytest.raises(DataError, match="an extended header at byte 512 cannot be read"):
        list(walk_tar(path))


def test_an_extended_header_whose_member_was_cut_off_is_said(tmp_path):
    path = tmp_path / "in.tar"
    path.write_bytes(
        TARS[0][: end_of_members(TARS[0])] + with_size(TARS[0][:BLOCK], b"L", 5) + b"a/b.j".ljust(1536, b"\0")
    )
    with pytest.raises(DataError, match="the member behind an extended header is missing"):
        list(walk_tar(path))


def test_old_tars_have_folders_without_a_type_and_signed_checksums(tmp_path):
    folder = with_size(tar_bytes({"a/": b""})[:BLOCK], b"\0", 0)
    name = "a/é.jpg".encode("latin-1")
    header = name.ljust(100, b"\0") + TARS[0][100:148] + b" " * 8 + TARS[0][156:BLOCK]
    signed = sum(byte - 256 if byte > 127 else byte for byte in header)
    header = header[:148] + b"%06o\0 " % signed + header[156:]
    path = tmp_path / "in.tar"
    path.write_bytes(folder + header + TARS[0][BLOCK:])
    found = list(walk_tar(path))
    assert [(item.name, item.folder) for item in found[:2]] == [(b"a", True), (name, False)]


def test_the_command_ends_with_65_and_one_line_where_a_tar_was_cut_at_a_member_s_border(tmp_path):
    archive = write_tar(tmp_path / "in.tar", images("x"))
    archive.write_bytes(archive.read_bytes()[: end_of_members(TARS[0])])
    run = prepare("imagefolder", archive, tmp_path / "set")
    assert (run.returncode, run.stderr.count("\n")) == (65, 1)
    assert "is cut off: the blocks that end a tar are missing" in run.stderr


def test_random_bytes_behind_a_deflated_member_do_not_hide_its_descriptor(tmp_path):
    """The checksum behind the data is found where the stream ends, whatever chunk it was read in."""
    rng = random.Random(0)
    noise = {f"a/{n}.bin": rng.randbytes(70_000 + 97 * n) for n in range(3)} | {"b/1.bin": rng.randbytes(200)}
    stream, path = Pipe(), tmp_path / "in.zip"
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in noise.items():
            archive.writestr(name, data)
    path.write_bytes(stream.getvalue())
    reader = ZipReader(path)
    for item in walk_zip(path):
        room = bytearray(item.length)
        reader.read_into(memoryview(room), item.offset, item.name.decode())
        assert room == noise[item.name.decode()]


def test_compressed_tars_of_one_name_are_unpacked_apart(tmp_path):
    """As train/data.tar.gz and val/data.tar.gz, whose members are read after both are open."""
    opened, sets = [], (images("t"), images("v"))
    for split, files in zip(("train", "val"), sets, strict=True):
        (tmp_path / split).mkdir()
        path = write_tar(tmp_path / split / "data.tar.gz", files, "w:gz")
        opened.append(open_collection(path, tmp_path, lambda line: None))
    for (members, reader), files in zip(opened, sets, strict=True):
        found = {}
        for member in members:
            room = memoryview(bytearray(member.length))
            reader.read_into(room, member.offset, member.name.decode())
            found[member.name.decode()] = bytes(room)
        assert found == files
