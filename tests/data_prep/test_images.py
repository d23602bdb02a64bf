"""Unusual images are kept or converted as DALI needs them, broken ones refused by name."""

import contextlib
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.images import RefusedError, inspect
from tests.support.data_sets import drawn_jpeg, write_set
from tests.support.image_corpus import exif, jpegs, others, tiff_block, with_segments
from tests.support.prep_runs import contents, drawn_folder, prepare, read_by_dali, samples_of, write_folder

ORIENTATION = 0x0112


def drawn(number: int, mode: str = "RGB") -> Image.Image:
    """48 pixels high, 64 wide."""
    return Image.open(io.BytesIO(drawn_jpeg(number))).convert(mode)


def saved(image: Image.Image, kind: str, **settings) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def turned(kind: str) -> bytes:
    """An image whose EXIF block says that it is rotated by 90 degrees."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return saved(drawn(4), kind, exif=exif)


def held(value: int) -> bytes:
    """A JPEG of 64 x 48 stored pixels with this orientation: from 5 on, height and width are swapped."""
    return with_segments(drawn_jpeg(20 + value), exif(tiff_block(value)))


def deep_values() -> np.ndarray:
    return np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)


def deep_colour_png() -> bytes:
    """16 bits for each of three colours, which Pillow cannot write."""
    rows = np.repeat(deep_values()[:, :, None], 3, axis=2).astype(">u2")
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(body)), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def palette() -> Image.Image:
    return drawn(6).quantize(16)


ODD = {
    "a/cmyk.jpg": saved(drawn(1, "CMYK"), "JPEG"),
    "a/really_png.JPEG": saved(drawn(2), "PNG"),
    "a/grey.jpg": saved(drawn(3, "L"), "JPEG"),
    "a/turned.jpg": turned("JPEG"),
    "a/turned_png.png": turned("PNG"),
    "a/deep.png": saved(Image.fromarray(deep_values()), "PNG"),
    "a/deep_colour.png": deep_colour_png(),
    "b/alpha.png": saved(drawn(5, "RGBA"), "PNG"),
    "b/palette.png": saved(palette(), "PNG"),
    "b/several.png": saved(drawn(13), "PNG", save_all=True, append_images=[drawn(14), drawn(15)], default_image=True),
    "b/progressive.jpg": saved(drawn(7), "JPEG", progressive=True),
    "b/picture.webp": saved(drawn(8), "WEBP", lossless=True),
    "b/picture.bmp": saved(drawn(9), "BMP"),
    "b/animated.gif": saved(palette(), "GIF", save_all=True, append_images=[palette().rotate(90)]),
    "b/no_end.jpg": drawn_jpeg(10)[:-2],
    "b/half_end.jpg": drawn_jpeg(12)[:-1],
    "b/behind_the_end.jpg": drawn_jpeg(11) + b"appended by a camera",
    **{f"b/held_{value}.jpg": held(value) for value in range(1, 9)},
}
SIZES = {"held_1": (48, 64), "held_2": (48, 64), "held_3": (48, 64), "held_4": (48, 64)}
SIZES |= {"held_5": (64, 48), "held_6": (64, 48), "held_7": (64, 48), "held_8": (64, 48)}
SIZES |= {"turned": (64, 48), "turned_png": (64, 48)}
KEPT = {"really_png", "grey", "turned", "alpha", "palette", "progressive", "behind_the_end"}
KEPT |= {f"held_{value}" for value in range(1, 9)}
KINDS = {
    "16-bit": 2, "alpha": 1, "bmp": 1, "cmyk": 1, "converted to png": 8, "end marker added": 2, "exif-rotated": 9,
    "gif": 1, "greyscale": 2, "jpeg": 15, "no end marker": 2, "png": 7, "unusual coding": 1, "webp": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    run = prepare("imagefolder", write_folder(root / "images", ODD), root / "set", "--allow-bad", 0)
    assert run.returncode == 0, run.stderr
    return root / "set"


def test_unusual_images_are_kept_or_converted_and_counted(odd):
    counts = json.loads((odd / "prep.json").read_text())["counts"]["train"]
    found = {sample.stem: sample for sample in samples_of(odd / "train")}
    assert (counts["in"], counts["out"], counts["refused"]) == (len(ODD), len(ODD), 0)
    for name, data in ODD.items():
        sample = found[name.split("/")[1].split(".")[0]]
        assert (sample.image == data) == (sample.stem in KEPT), name
        assert (sample.height, sample.width) == SIZES.get(sample.stem, (48, 64)), name
    assert found["no_end"].image == ODD["b/no_end.jpg"] + b"\xff\xd9"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(found["several"].image))), np.asarray(drawn(13)))
    assert found["half_end"].image == drawn_jpeg(12)
    cmyk = np.asarray(Image.open(io.BytesIO(ODD["a/cmyk.jpg"])).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(found["cmyk"].image))), cmyk)
    deep = np.asarray(Image.open(io.BytesIO(found["deep"].image)))
    np.testing.assert_array_equal(deep, (deep_values() >> 8).astype(np.uint8))
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(found["deep_colour"].image)))[:, :, 0].astype(int), deep_values() >> 8
    )
    turned_upright = np.asarray(drawn(4).transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(found["turned_png"].image))), turned_upright)
    assert counts["kinds"] == KINDS


def test_dali_decodes_all_of_them_to_the_size_in_the_table(odd):
    expected = [(s.label, s.image, (s.height, s.width)) for s in samples_of(odd / "train")]
    assert read_by_dali(odd / "train") == expected


def test_broken_files_are_refused_by_name_and_the_run_ends_with_65(tmp_path):
    whole, png = drawn_jpeg(20), saved(drawn(21), "PNG")
    bad = {f"ant/cut{k}.jpg": whole[: len(whole) * k // 8] for k in range(1, 8)}
    # Only the end marker, or bits that fill the last byte, may be missing.
    bad |= {f"ant/last{k}.jpg": whole[:-k] for k in (6, 8, 12, 16, 20, 40)}
    scans = ODD["b/progressive.jpg"]
    bad |= {"ant/scans1.jpg": scans[:-1], "ant/scans2.jpg": scans[:-2]}  # there whole scans may be missing
    bad |= {
        "ant/cut.png": png[: len(png) // 2],
        "ant/flipped.png": png[:100] + bytes([png[100] ^ 255]) + png[101:],
        "bee/empty.jpg": b"",
        "bee/page.jpg": b"<html>404 not found</html>",
        "bee/start.jpg": b"\xff\xd8\xff",
    }
    source = write_folder(tmp_path / "images", {**drawn_folder(), **bad})
    out = tmp_path / "set"
    strict = prepare("imagefolder", source, out)
    assert strict.returncode == 65
    *listed, last = strict.stderr.splitlines()
    assert f"refused {len(bad)} of {12 + len(bad)} samples of train, more than --allow-bad=0.001 of a split" in last
    assert {line.split(": ")[1] for line in listed} == set(bad)
    lines = [json.loads(line) for line in (out / "train/quarantine.jsonl").read_text().splitlines()]
    reasons = {line["name"]: line["reason"] for line in lines}
    assert set(reasons) == set(bad)
    assert reasons["bee/empty.jpg"] == "empty file"
    assert "no known format" in reasons["bee/page.jpg"]
    assert all("truncated" in reasons[name] or "decoded" in reasons[name] for name in bad if "ant" in name)
    assert not (out / "train/manifest.json").exists()  # not to be trained on by mistake
    tars = {name: digest for name, digest in contents(out).items() if name.endswith(".tar")}
    assert prepare("imagefolder", source, out, "--allow-bad", len(bad) - 1).returncode == 65
    lenient = prepare("imagefolder", source, out, "--allow-bad", len(bad))
    assert lenient.returncode == 0, lenient.stderr
    assert "finished already" in lenient.stdout
    assert "no image was left to be packed" in lenient.stdout
    assert {name: digest for name, digest in contents(out).items() if name.endswith(".tar")} == tars
    assert {sample.image for sample in samples_of(out / "train")} == set(drawn_folder().values())
    assert prepare("verify", out, "--decode").returncode == 0
    share = prepare("imagefolder", source, tmp_path / "share", "--allow-bad", "65%")
    assert share.returncode == 0, share.stderr


def test_a_jpeg_cut_short_is_completed_only_where_no_pixel_is_lost():
    for number in range(40):  # how many bits of the last byte count differs from image to image
        whole = drawn_jpeg(number)
        for num_lost in (1, 2):
            assert inspect(memoryview(whole[:-num_lost])).converted == whole
        for num_lost in range(3, 12):
            with contextlib.suppress(RefusedError):
                found = inspect(memoryview(whole[:-num_lost])).converted
                assert found is not None
                pixels = [np.asarray(Image.open(io.BytesIO(data))) for data in (found, whole)]
                np.testing.assert_array_equal(*pixels, err_msg=f"image {number} without its last {num_lost} bytes")


def test_resize_shrinks_the_shorter_side_and_quality_counts(tmp_path):
    files = {f"a/{i}.jpg": drawn_jpeg(i, 60 + 10 * i, 200) for i in range(6)}
    files |= {"a/turned.jpg": turned("JPEG"), "a/small.png": saved(drawn(3).resize((30, 20)), "PNG")}
    files |= {"b/cmyk.jpg": ODD["a/cmyk.jpg"], "b/deep.png": ODD["a/deep.png"], "b/x.webp": ODD["b/picture.webp"]}
    source = write_folder(tmp_path / "images", files)
    sizes = {}
    for quality in (50, 95):
        out = tmp_path / f"set{quality}"
        run = prepare("imagefolder", source, out, "--resize", 32, "--quality", quality)
        assert run.returncode == 0, run.stderr
        for sample in samples_of(out / "train"):
            image = Image.open(io.BytesIO(sample.image))
            assert (image.height, image.width) == (sample.height, sample.width)
            if sample.stem == "small":
                assert sample.image == files["a/small.png"]
            else:
                assert (image.format, min(image.size)) == ("JPEG", 32)
            if sample.stem == "turned":
                assert (sample.height, sample.width) == (43, 32)
        sizes[quality] = sum(len(sample.image) for sample in samples_of(out / "train"))
    assert sizes[50] < sizes[95]


def test_resize_leaves_out_long_comments_and_refuses_what_jpeg_cannot_hold(tmp_path):
    whole = drawn_jpeg(1)
    commented = whole[:2] + (b"\xff\xfe\xff\xff" + b"c" * 65533) + whole[2:]
    wide = saved(Image.new("L", (200_000, 40)), "PNG")
    source = write_folder(tmp_path / "images", {"a/commented.jpg": commented, "a/x.jpg": whole, "b/wide.png": wide})
    run = prepare("imagefolder", source, tmp_path / "set", "--resize", 16, "--allow-bad", 1)
    assert (run.returncode, run.stderr) == (0, "")
    one, other = (sample.image for sample in samples_of(tmp_path / "set/train"))
    assert one == other
    (refused,) = (tmp_path / "set/train/quarantine.jsonl").read_text().splitlines()
    assert json.loads(refused)["name"] == "b/wide.png"
    assert "80000x16 pixels once resized; a side of a JPEG has at most 65500" in refused


def test_what_needs_too_much_memory_or_has_no_agreed_range_is_refused(tmp_path):
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 30_000, 30_000, 8, 2, 0, 0, 0) + bytes(40)
    floating = Image.fromarray(np.zeros((8, 8), np.float32))
    wide = Image.fromarray(np.full((8, 8), 100_000, np.int32))
    files = {"a/bomb.png": bomb, "a/float.tiff": saved(floating, "TIFF"), "a/32bit.tiff": saved(wide, "TIFF")}
    source = write_folder(tmp_path / "images", {**drawn_folder(), **files})
    with open(source / "a/huge.jpg", "wb") as file:
        file.write(drawn_jpeg(1))
        file.truncate(1 << 40)  # a hole
    run = prepare("imagefolder", source, tmp_path / "set", "--allow-bad", 4, "--resize", 16)
    assert (run.returncode, run.stderr) == (0, "")
    lines = [json.loads(line) for line in (tmp_path / "set/train/quarantine.jsonl").read_text().splitlines()]
    reasons = {line["name"]: line["reason"] for line in lines}
    assert set(reasons) == {*files, "a/huge.jpg"}
    assert "30000x30000 pixels, more than" in reasons["a/bomb.png"]
    assert "1099511627776 bytes, more than" in reasons["a/huge.jpg"]
    assert "floating-point pixels" in reasons["a/float.tiff"]
    assert "32-bit pixels" in reasons["a/32bit.tiff"]


def test_limit_takes_a_fair_draw(tmp_path):
    source = write_folder(tmp_path / "images", drawn_folder(60))
    run = prepare("imagefolder", source, tmp_path / "set", "--limit", 20)
    assert run.returncode == 0, run.stderr
    found = samples_of(tmp_path / "set/train")
    assert len({sample.image for sample in found}) == 20
    assert {sample.label for sample in found} == {0, 1, 2}
    again = prepare("imagefolder", source, tmp_path / "set", "--limit", 20)
    assert "complete already" in again.stdout


def test_info_tells_what_the_set_holds_and_draws_it(odd, tmp_path):
    run = prepare("info", odd, "--sheet", tmp_path / "sheet.png")
    assert (run.returncode, run.stderr) == (0, "")
    head, train, *_ = run.stdout.splitlines()
    assert head.split()[:3] == ["split", "classes", "samples"]
    assert train.split()[:3] == ["train", "2", str(len(ODD))]
    assert f"train: {len(ODD)} in, 0 refused; 16-bit 2, " in run.stdout
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 1000  # pictures, not an empty page
    nothing = prepare("info", tmp_path)
    assert (nothing.returncode, nothing.stderr.count("\n")) == (64, 1)
    assert "no shard set in" in nothing.stderr


def test_without_decoding_a_cut_file_is_refused_all_the_same(tmp_path):
    files = {**drawn_folder(), "ant/cut.jpg": drawn_jpeg(9)[:-30], "bee/empty.jpg": b"", "bee/text.jpg": b"text"}
    source = write_folder(tmp_path / "images", files)
    run = prepare("imagefolder", source, tmp_path / "set", "--no-decode", "--allow-bad", 3)
    assert run.returncode == 0, run.stderr
    assert {sample.image for sample in samples_of(tmp_path / "set/train")} == set(drawn_folder().values())


def test_what_the_image_library_warns_of_is_told_once_a_kind_with_the_first_name(tmp_path):

    odd = jpegs()
    files = {**drawn_folder(), "ant/zz1.jpg": odd["exif_cut"], "ant/zz2.jpg": odd["exif_far_offset"]}
    files |= {"bee/zz3.jpg": odd["exif_6_count_2"], "bee/zz4.jpg": odd["exif_cut"][:-300]}
    source = write_folder(tmp_path / "images", files)
    run = prepare("imagefolder", source, tmp_path / "set", "--allow-bad", 1)
    assert (run.returncode, run.stderr) == (0, "")
    told = [line for line in run.stdout.splitlines() if "images that are kept" in line]
    (corrupt,) = (line for line in told if "Corrupt EXIF data" in line)
    assert corrupt.startswith("train: 2 images that are kept, ant/zz")
    assert "N bytes" in corrupt
    assert sum("tag N had too many entries" in line for line in told) == 1
    assert len(told) == 2
    assert (tmp_path / "set/train/quarantine.jsonl").read_text().count("\n") == 1
    again = prepare("imagefolder", source, tmp_path / "set", "--allow-bad", 1)
    assert "complete already" in again.stdout
    checked = prepare("verify", tmp_path / "set", "--decode")
    assert (checked.returncode, checked.stderr) == (0, "")


def test_verify_finds_what_was_packed_before_decoders_were_known_to_differ(tmp_path):

    odd = jpegs()
    images = [odd["plain_420"], odd["exif_6_and_3"], odd["behind_movie"], odd["plain_420"][:-40]]
    write_set(tmp_path / "train", images, per_shard=4)
    run = prepare("verify", tmp_path)
    faults = [line for line in run.stdout.splitlines() if "00000" in line]
    assert run.returncode == 65
    assert sum("decoders differ about it" in line for line in faults) == 1, faults


def test_a_library_that_logs_or_warns_is_heard_and_nothing_is_printed(capfd):
    """Pillow warns of some faults and logs others."""

    data = bytearray(others()["tiff"])
    at = data.index(struct.pack("<HHI", 277, 3, 1)) + 8  # samples a pixel
    struct.pack_into("<H", data, at, 9)
    with pytest.raises(RefusedError):
        inspect(memoryview(bytes(data)))
    (heard,) = inspect(memoryview(jpegs()["exif_cut"])).warnings
    assert heard == "Corrupt EXIF data. Expecting to read N bytes but only got N."
    assert capfd.readouterr() == ("", "")


def test_a_jpeg_without_its_end_must_need_its_last_bytes():
    """Zeros in place of the rest, as in a file that was created at its full size, may decode as image data."""
    flat = saved(Image.new("RGB", (64, 64), "teal"), "JPEG", quality=90)
    whole = drawn_jpeg(3, 96, 96)
    for data in (flat, whole):
        for tail in (bytes(100), bytes(4000), b"\r\n" * 20, b"<html>" * 50):
            with pytest.raises(RefusedError, match="truncated"):
                inspect(memoryview(data[:-2] + tail))
    for half in (b"", b"\xff", b"\xff\xc4", b"\xff\xc4\0"):  # the start of a marker, of the end or of another one
        assert inspect(memoryview(flat[:-2] + half)).converted == flat


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_turned_as_eight_are(format):
    values = (np.arange(20 * 30).reshape(20, 30) * 100).astype(np.uint16)
    turned = Image.Exif()
    turned[0x112] = 6
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, format, exif=turned)
    found = inspect(memoryview(stream.getvalue()))
    assert found.converted
    stored = np.asarray(Image.open(io.BytesIO(found.converted)))
    assert np.array_equal(stored, np.rot90(values >> 8, -1))


def tiff_12(values: np.ndarray) -> bytes:
    """A grey TIFF of 12 bits a pixel; Pillow reads it, and writes none."""
    height, width = values.shape  # an even width: two pixels are three bytes
    first, second = values[:, ::2].astype(int), values[:, 1::2].astype(int)
    rows = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1).astype(np.uint8).tobytes()
    short, long, num_rows = 3, 4, height
    tags = [(256, short, width), (257, short, height), (258, short, 12), (259, short, 1), (262, short, 1)]
    tags += [(273, long, 8), (277, short, 1), (278, short, num_rows), (279, long, len(rows))]
    entries = b"".join(struct.pack("<2H2L", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<L", 8 + len(rows)) + rows + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_twelve_bits_keep_their_high_eight_and_dark_sixteen_are_warned_of():
    values = (np.arange(20 * 30).reshape(20, 30) * 6).astype(np.uint16)
    found = inspect(memoryview(tiff_12(values)))
    assert found.converted
    assert not found.warnings
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(found.converted))), values >> 4)
    dark = inspect(memoryview(saved(Image.fromarray(values), "TIFF")))
    assert dark.warnings == ("N-bit grey values up to N are nearly black in N bits; scale the images first",)
