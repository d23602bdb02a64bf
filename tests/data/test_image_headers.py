"""`decode/image_headers.py`: an image that is packed as whole also trains, with the pixels that Pillow shows."""

import ast
import contextlib
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_prep.images import Inspected, RefusedError, inspect
from pipeline.config import DataConfig
from pipeline.data.decode.augment import Windows
from pipeline.data.decode.dali_pipeline import MEAN, STD, Fed, Graph, ImageViews
from pipeline.data.samples import flaw
from tests.conftest import ROOT
from tests.support import image_corpus
from tests.support.image_corpus import jpeg, picture, png_chunk, replaced, saved, segment, with_chunks, with_segments

TOLERANCE = 1.0
"""Levels of 255 by which a pixel may differ: both decode with libjpeg-turbo, and DALI normalises in float32."""
WHOLE = image_corpus.jpegs() | image_corpus.pngs() | image_corpus.others()
CONVERTED = {
    "cmyk", "arithmetic", "rgb_by_adobe", "rgb_by_component_names", "jfif_and_adobe_rgb",
    "png_16_bit", "png_16_bit_grey", "png_16_bit_alpha", "png_16_bit_grey_alpha",
    "png_exif_before", "png_exif_behind", "png_exif_as_text", "png_xmp", "png_exif_twice", "png_exif_long",
    "png_exif_damaged", "apng", "apng_own_default",
}  # fmt: skip
REWRITTEN = {
    "exif_6_long", "exif_6_long_big_endian", "exif_6_byte", "exif_6_undefined", "exif_6_signed", "exif_6_text",
    "exif_6_rational", "exif_6_count_0", "exif_6_count_2", "exif_without_orientation_xmp_6", "xmp_6", "exif_6_twice",
    "exif_6_and_3", "exif_1_and_6", "exif_6_and_empty", "exif_empty_and_6", "exif_two_orientations", "exif_garbage",
    "exif_order_of_the_other", "exif_unknown_order", "exif_more_entries_than_fit", "exif_magic_43",
}  # fmt: skip


class Decoder:
    """The loader's own graph on the CPU, fed with whole images."""

    def __init__(self) -> None:
        self._next: tuple[bytes, int, int] | None = None
        self._build()

    def _build(self) -> None:
        data = DataConfig(path="unused", image_size=24, threads=1)
        self._graph = Graph(data, torch.device("cpu"), self._feed, batch_size=1, ahead=1)

    def _feed(self) -> Fed:
        assert self._next is not None
        encoded, *size = self._next
        shape = np.array([size], np.int32)
        windows = Windows(np.zeros((1, 2), np.int32), shape, np.zeros(1, np.int32), shape.astype(np.float32))
        return [np.frombuffer(encoded, np.uint8)], ImageViews(windows, [])

    def __call__(self, encoded: bytes, height: int, width: int) -> np.ndarray | None:
        """`(height, width, 3)` in levels of 255; None where DALI cannot decode it or has another size."""
        self._next = (encoded, height, width)
        try:
            self._graph.run()  # the batch that was read ahead
            images = self._graph.run()
        except RuntimeError:
            self._build()
            return None
        return images[0].permute(1, 2, 0).numpy() * np.array(STD) + np.array(MEAN)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder()


@pytest.mark.filterwarnings("ignore")  # some of the images have damaged metadata
def shown(data: bytes) -> np.ndarray:
    """The picture as Pillow shows it: upright, in RGB, 16 bits cut to 8."""
    image = Image.open(io.BytesIO(data))
    image.load()
    with contextlib.suppress(SyntaxError, OSError, ValueError, TypeError):  # a damaged EXIF block rotates nothing
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(int) >> 8).astype(np.uint8))
    return np.asarray(image.convert("RGB")).astype(float)


def stored(data: bytes, found: Inspected) -> bytes:
    return data if found.converted is None else found.converted


def wrong(data: bytes, found: Inspected, decoder: Decoder) -> str:
    """What is wrong with an accepted image once it is stored; empty where nothing is."""
    kept = stored(data, found)
    if reason := flaw(kept):
        return f"the loader takes it for {reason}"
    again = inspect(memoryview(kept))
    if again.converted is not None or (again.height, again.width) != (found.height, found.width):
        return "it would be converted again, or has another size then"
    # Pillow cannot always open a file without its end marker, so the marker is added.
    expected = shown(data.rstrip(b"\xff") + b"\xff\xd9" if "no end marker" in found.kinds else data)
    pixels = decoder(kept, found.height, found.width)
    if expected.shape[:2] != (found.height, found.width):
        return f"Pillow shows {expected.shape[:2]}, the table says {(found.height, found.width)}"
    if pixels is None:
        return "DALI cannot decode it"
    furthest = np.abs(pixels - expected).max()
    return f"pixels differ by up to {furthest:.0f} levels" if furthest > TOLERANCE else ""


@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_whole_image_trains_as_the_picture_that_pillow_shows(decoder):
    faults = {}
    for name, data in WHOLE.items():
        try:
            faults[name] = wrong(data, inspect(memoryview(data)), decoder)
        except RefusedError as error:
            faults[name] = f"refused: {error}"
    assert {name: fault for name, fault in faults.items() if fault} == {}


def test_only_what_readers_disagree_about_is_changed():
    changed = {"rewritten": set(), "converted": set()}
    for name, data in (image_corpus.jpegs() | image_corpus.pngs()).items():
        found = inspect(memoryview(data))
        if found.converted is not None:
            changed["converted" if found.kinds[-1] == "converted to png" else "rewritten"].add(name)
    assert changed == {"rewritten": REWRITTEN, "converted": CONVERTED}


def test_a_rewritten_jpeg_keeps_its_image_data_and_what_lies_behind():
    whole = image_corpus.jpegs()
    data = whole["exif_6_twice"] + b"a film"
    found = inspect(memoryview(data)).converted
    assert found is not None
    start = data.index(b"\xff\xdb")
    assert found.endswith(data[start:])
    assert found.count(b"Exif\0\0") == 1
    jfxx = image_corpus.with_segments(whole["jfxx_thumbnail"], *[image_corpus.exif(b"odd")] * 2, after_app0=True)
    rewritten = inspect(memoryview(jfxx)).converted
    assert rewritten is not None
    assert rewritten.index(b"JFIF") < rewritten.index(b"JFXX") < rewritten.index(b"Exif")


def broken() -> dict[str, bytes]:
    """Images that are refused; a name ends with words of the reason."""
    plain, png = jpeg(), saved(picture(), "PNG")
    frame = plain.index(b"\xff\xc0")
    scan = plain.index(b"\xff\xda")
    scans = jpeg(progressive=True)
    second = scans.index(b"\xff\xda", scans.index(b"\xff\xda") + 2)
    return {
        "a lone marker: marker FF01": with_segments(plain, b"\xff\x01"),
        "an unknown marker: marker FF02": with_segments(plain, segment(2, b"what")),
        "no marker: no marker": with_segments(plain, b"what", after_app0=True),
        "a zero in place of a marker: marker FF00": with_segments(plain, b"\xff\0\0\4ab"),
        "height in a DNL segment: 64x0 pixels": plain[: frame + 5] + bytes(2) + plain[frame + 7 :],
        "12 bits: 12 bits a component": replaced(plain, 0xC0, lambda body: b"\x0c" + body[1:]),
        "two frames: two frame segments": plain[:frame] + plain[frame : frame + 19] + plain[frame:],
        "a start inside the scan: another image begins": plain[:-60] + plain,
        "a preview behind a cut image: another image begins": plain[:-60] + jpeg(picture().resize((8, 8))),
        "a cut image and zeros: truncated": plain[:-60] + bytes(4000),
        "a cut image and a page: truncated": plain[:-60] + b"<html>" * 30,
        "a cut image and its end marker: cannot be decoded": plain[:-60] + b"\xff\xd9",
        "a marker inside the scan: marker FF05": plain[: scan + 40] + b"\xff\5" + plain[scan + 42 :],
        "scans without an end: truncated": scans[:-2] + bytes(400),
        "scans cut in a table: truncated": scans[: second + 4],
        "a PNG cut and zeros: checksum": png[:-60] + bytes(4000),
        "a PNG text with a wrong checksum: checksum": with_chunks(png, png_chunk(b"tEXt", b"C\0x")[:-4] + b"abcd"),
        "a PNG header with a wrong checksum: checksum": png[:29] + b"abcd" + png[33:],
        "a PNG chunk without a name: no PNG chunk": with_chunks(png, png_chunk(b"\0\1\2\3", b"")),
        "hierarchical coding: cannot be decoded": plain.replace(b"\xff\xc0", b"\xff\xc5"),
        "PostScript: no known format": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\nshowpage\n%%EOF\n",
        "a portable document: no known format": b"%PDF-1.7\n1 0 obj\n",
    }


@pytest.mark.parametrize("name", broken())
def test_broken_images_are_refused_and_the_loader_finds_what_its_headers_show(name):
    data, reason = broken()[name], name.split(": ")[1]
    with pytest.raises(RefusedError, match=reason):
        inspect(memoryview(data))
    if reason not in ("no known format", "cannot be decoded", "12 bits a component"):
        assert flaw(data) in ("truncated", "undecodable")
        assert (flaw(data) == "truncated") == ("truncated" in refusal(data))


def refusal(data: bytes) -> str:
    with pytest.raises(RefusedError) as caught:
        inspect(memoryview(data))
    return str(caught.value)


@st.composite
def changed_images(draw) -> bytes:
    """An image of the corpus with bytes changed, left out, put in or cut off; in half of the cases in its metadata."""
    name = draw(st.sampled_from(sorted(image_corpus.jpegs() | image_corpus.pngs())))
    data = bytearray(WHOLE[name])
    marks = [data.find(mark) for mark in (b"Exif\0", b"eXIf", b"http")]
    start = max(*marks, 0)
    end = start + 60 if draw(st.booleans()) else len(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data) - 1)) if end == len(data) else draw(st.integers(start, end))
        at = min(at, len(data) - 1)
        match draw(st.integers(0, 9)):
            case 0:
                del data[at : at + draw(st.integers(1, 40))]
            case 1:
                data[at:at] = draw(st.binary(max_size=20))
            case 2:
                data[at + 1 :] = draw(st.sampled_from([b"", bytes(50), b"\xff\xd9", b"\r\n"]))
            case _:
                data[at] = draw(st.one_of(st.integers(0, 9), st.integers(0, 255)))
    return bytes(data)


@settings(max_examples=400)
@given(data=changed_images())
@pytest.mark.filterwarnings("ignore")
def test_whatever_is_accepted_trains(decoder, data):
    try:
        found = inspect(memoryview(data))
    except RefusedError:
        return
    assert wrong(data, found, decoder) == ""


def test_images_are_opened_by_named_formats_alone():
    """Pillow knows formats that start other programs, PostScript one of them."""
    opened = []
    for room in ("data_prep", "pipeline", "launch", "benchmarks"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open"):
                    opened.append(path.name)
                    assert "formats" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"
    assert "images.py" in opened
