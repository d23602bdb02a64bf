"""One image: is it whole, what kind is it, how large is it upright, and does DALI need it converted.

JPEG and PNG files are stored unchanged, with two exceptions. A JPEG that lacks only its end marker, or half of it, gets
one. A JPEG whose orientation decoders read differently gets one plain EXIF block. What DALI's decoders do not treat
alike on CPU and GPU (CMYK, 16 bits, other formats) is converted to an 8-bit PNG; it keeps all that they would keep.
"""

import io
import logging
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from pipeline.data.decode.image_headers import JPEG_MAGIC, PNG_MAGIC, Header, HeaderError, jpeg_segments, read_header

MAX_IMAGE_BYTES = 64 << 20
"""Largest file that is taken as an image: bounds the memory of a worker."""
MAX_PIXELS = 89_478_485
"""Most pixels of an image: Pillow's own limit against decompression bombs, 268 MB as RGB."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Pillow's names of the formats that are opened. Pillow knows more; some of those start other programs (PostScript)."""
_MAX_JPEG_SIDE = 65_500  # libjpeg's limit
# Zeros in place of the end marker let the decoder finish its look-ahead, and starve it where image data are missing.
_LOOK_AHEAD = bytes(16)
_OTHER_LOOK_AHEAD = b"\xfe" * 16  # differs from the first bit on: a single missing bit shows
_NEEDED = 8  # without so many bytes at the end of the image data, the pixels must differ
_BITS_PER_SAMPLE = 258  # TIFF 6.0, section 8
_NEARLY_BLACK = 16  # 16-bit files of 12-bit sensors end here
_END_OF_JPEG = b"\xff\xd9"
_DAMAGED_METADATA = (OSError, ValueError, SyntaxError, KeyError, TypeError, IndexError, EOFError, struct.error)
"""What Pillow raises where it cannot read an EXIF block."""


class RefusedError(ValueError):
    """The file is not an image that can be trained on; the message is the reason for the quarantine list."""


@dataclass(frozen=True, slots=True)
class Inspected:
    """What was found in an image file."""

    extension: str
    """jpg or png: what the sample is stored as."""
    height: int
    """In pixels, after EXIF rotation."""
    width: int
    kinds: tuple[str, ...]
    """What is counted in the summary: the format, and all that is unusual."""
    converted: bytes | None
    """The bytes to store in place of the file's, or None to store the file."""
    warnings: tuple[str, ...] = ()
    """Warnings of the image library, each kind once, with N for every number."""
    warned_events: tuple[int, ...] = ()
    """Of a recording: of how many events each of its warnings is."""


def inspect(data: memoryview, *, decode: bool = True, resize: int = 0, quality: int = 90) -> Inspected:
    """Checks the image file `data` and converts it where need be.

    Args:
        data: the whole file.
        decode: decode every pixel; False reads headers only, unless the file's end is missing.
        resize: shrink the shorter side to this many pixels, as JPEG; 0 does not. Smaller images stay as they are.
        quality: JPEG quality of resized images, 1 to 100.

    Raises:
        RefusedError: empty, truncated, not an image, or larger than the limits above.
    """
    with _warnings_heard() as heard:
        found = _inspect(data, decode, resize, quality)
    return replace(found, warnings=tuple(dict.fromkeys(_kind_of_warning(entry) for entry in heard)))


def _inspect(data: memoryview, decode: bool, resize: int, quality: int) -> Inspected:
    if not len(data):
        raise RefusedError("empty file")
    try:
        header = read_header(data)
    except HeaderError as error:
        raise RefusedError(str(error)) from None
    if header is None:
        return _convert_other(data, resize, quality)
    if header.height * header.width > MAX_PIXELS:
        raise RefusedError(f"{header.width}x{header.height} pixels, more than {MAX_PIXELS}")
    if header.damage:
        raise RefusedError(header.damage)
    jpeg = header.kind == "jpeg"
    if jpeg and header.depth != 8:
        raise RefusedError(f"{header.depth} bits a component, where JPEG decoders take 8; convert it to 8 bits first")
    if header.truncated and jpeg:
        _require_all_data(data, header)
    orientation = header.orientation
    if header.doubtful or header.noted_elsewhere:
        orientation = _orientation(_opened(data))
    kinds = _kinds(header, orientation)
    height, width = (header.width, header.height) if orientation > 4 else (header.height, header.width)
    if resize and min(height, width) > resize:
        return _resized(data, header, kinds, resize, quality)
    must_convert = (jpeg and header.components == 4) or header.depth > 8 or header.unusual or header.rgb
    # Whether DALI turns a PNG by its EXIF block depends on DALI's version and on the place of the block.
    must_convert |= not jpeg and (orientation > 1 or header.doubtful or header.truncated)
    # A file without its end marker is decoded whole in any case.
    image = _decoded(data, header) if decode or must_convert or header.truncated else None
    if must_convert and image is not None:
        return _as_png(image, (*kinds, "converted to png"))
    if not jpeg:
        return Inspected("png", height, width, kinds, None)
    stored, changes = _mended(data, header, orientation)
    return Inspected("jpg", height, width, (*kinds, *changes), stored)


def _mended(data: memoryview, header: Header, orientation: int) -> tuple[bytes | None, tuple[str, ...]]:
    """The JPEG as DALI needs it (None: the file as it is), and what was changed."""
    stored, changes = None, ()
    if header.truncated:
        stored = bytes(data[: header.scan_end]) + _END_OF_JPEG  # Pillow reads a JPEG without it, DALI does not
        changes = ("end marker added",)
    if header.doubtful or orientation != header.orientation:
        stored = _with_plain_exif(data if stored is None else memoryview(stored), orientation)
        changes = (*changes, "EXIF rewritten")
    return stored, changes


def _with_plain_exif(data: memoryview, orientation: int) -> bytes:
    """The JPEG with its orientation in one EXIF block, in place of all EXIF and XMP; no pixel changes."""
    body = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, ExifTags.Base.Orientation, 3, 1, orientation, 0, 0)
    exif = struct.pack(">HH", 0xFFE1, len(body) + 2) + body
    segments = list(jpeg_segments(data))
    first = [data[start:end] for marker, start, end in segments if marker == 0xE0]  # the JFIF segment must be first
    others = [data[start:end] for marker, start, end in segments if marker not in (0xE0, 0xE1)]
    return b"".join((data[:2], *first, exif, *others, data[segments[-1][2] :]))


class _ToWarning(logging.Handler):
    """Turns what the image library logs into warnings, so that there is one stream of them."""

    def emit(self, record: logging.LogRecord) -> None:
        warnings.warn(record.getMessage(), stacklevel=2)


@contextmanager
def _warnings_heard() -> Iterator[list[warnings.WarningMessage]]:
    """Collects Pillow's warnings in the list. Otherwise each would be printed, without the file's name."""
    log, handler = logging.getLogger("PIL"), _ToWarning(logging.WARNING)
    propagate, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            yield heard
    finally:
        log.removeHandler(handler)
        log.propagate = propagate


def _kind_of_warning(entry: warnings.WarningMessage) -> str:
    return re.sub(r"\d+", "N", " ".join(str(entry.message).split()))[:200]


def _kinds(header: Header, orientation: int) -> tuple[str, ...]:
    kinds = [header.kind]
    if header.components == 1:
        kinds.append("greyscale")
    if header.components == 4:
        kinds.append("cmyk" if header.kind == "jpeg" else "alpha")
    if header.depth > 8:
        kinds.append(f"{header.depth}-bit")
    if orientation > 1:
        kinds.append("exif-rotated")
    if header.truncated:
        kinds.append("no end marker")
    if header.unusual or header.rgb:
        kinds.append("unusual coding")
    return tuple(kinds)


def _require_all_data(data: memoryview, header: Header) -> None:
    """Refuses a JPEG without end marker that also lost image data: what follows its last byte changes the pixels.

    The last bytes must change the pixels too. Where they do not, they are no image data but left by a broken download,
    such as the zeros of a file that was created at its full size.
    """
    if not header.scan_end:
        raise RefusedError("truncated: no end marker, so that of its several scans some may be missing")
    pixels = _decoded(data, header).tobytes()
    if pixels != _decoded(data, header, look_ahead=_OTHER_LOOK_AHEAD).tobytes():
        raise RefusedError("truncated: image data are missing")
    num_needed = min(_NEEDED, (header.scan_end - header.scan_start) // 2)
    shorter = replace(header, scan_end=header.scan_end - num_needed)
    try:
        unneeded = pixels == _decoded(data, shorter, look_ahead=_OTHER_LOOK_AHEAD).tobytes()
    except RefusedError:  # the decoder lacks data, as it should
        return
    if unneeded:
        raise RefusedError("truncated: no end marker, and something else than image data at the end")


def _opened(data: memoryview | bytes) -> Image.Image:
    """The image with its header read; `RefusedError` where that fails."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        if data[:3] == JPEG_MAGIC or data[:8] == PNG_MAGIC:
            raise RefusedError("cannot be decoded: a header that no decoder here reads") from None
        raise RefusedError("not an image: no known format") from None
    except Exception as error:  # broken bytes make a parser raise any exception
        raise RefusedError(f"cannot be decoded: {_one_line(error)}") from None
    if image.width * image.height > MAX_PIXELS:
        raise RefusedError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}")
    return image


def _decoded(
    data: memoryview,
    header: Header | None = None,
    draft: tuple[int, int] | None = None,
    look_ahead: bytes = _LOOK_AHEAD,
) -> Image.Image:
    """The image with every pixel decoded; `RefusedError` where that fails."""
    cut = header is not None and header.scan_end
    image = _opened(b"".join((data[: header.scan_end], look_ahead)) if header is not None and cut else data)
    try:
        if draft:
            image.draft(None, draft)
        image.load()
    except Exception as error:  # broken bytes make a decoder raise any exception
        raise RefusedError(f"cannot be decoded: {_one_line(error)}") from None
    return image


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _plain(image: Image.Image) -> Image.Image:
    """`image` upright, as 8-bit L or RGB: of deeper values the high bits, as in DALI, which drops transparency too."""
    depth = _depth(image)
    image = _upright(image)
    if image.mode in ("L", "RGB"):
        return image
    if image.mode == "F":
        raise RefusedError("floating-point pixels have no agreed range; convert the image to 8 bits first")
    if image.mode.startswith("I"):
        return Image.fromarray(_high_bits(np.asarray(image), depth))
    try:
        return image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")
    except ValueError:
        raise RefusedError(f"pixels of the kind {image.mode} are not read; convert the image to RGB first") from None


def _depth(image: Image.Image) -> int:
    """Bits of a grey value. Pillow holds 9 to 16 of a TIFF in 16, unscaled; it scales those of other formats."""
    stated = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0] if isinstance(image, TiffImageFile) else 16
    return stated if 8 < stated < 16 else 16


def _high_bits(values: np.ndarray, depth: int) -> np.ndarray:
    """The high 8 of `depth` bits, uint8."""
    values = values.astype(np.int64)
    if values.min(initial=0) < 0 or (most := values.max(initial=0)) > 0xFFFF:
        raise RefusedError("32-bit pixels have no agreed range; convert the image to 8 bits first")
    high = values >> depth - 8
    if most > 0 and high.max() < _NEARLY_BLACK:
        warnings.warn(
            f"16-bit grey values up to {most} are nearly black in 8 bits; scale the images first", stacklevel=2
        )
    return high.astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """The orientation that Pillow follows, 1 to 8."""
    try:
        stated = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DAMAGED_METADATA:  # with an unreadable block nothing is turned
        return 1
    return next((value for value in range(2, 9) if stated == value), 1)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _DAMAGED_METADATA:
        return image


def _as_png(image: Image.Image, kinds: tuple[str, ...]) -> Inspected:
    image = _plain(image)
    stream = io.BytesIO()
    # A fresh image: else its metadata (EXIF, ICC profile, transparency) would be written too.
    Image.fromarray(np.asarray(image)).save(stream, "PNG")
    return Inspected("png", image.height, image.width, kinds, stream.getvalue())


def _resized(data: memoryview, header: Header | None, kinds: tuple[str, ...], side: int, quality: int) -> Inspected:
    if header is not None and header.scan_end and header.components != 4:
        # The JPEG decoder itself can shrink by powers of two, much faster; twice the target keeps the quality.
        scale = 2 * side / min(header.height, header.width)
        image = _decoded(data, header, (round(header.width * scale), round(header.height * scale)))
    else:
        image = _decoded(data, header)
    image = _plain(image)
    ratio = side / min(image.size)
    size = tuple(side if edge == min(image.size) else max(1, round(edge * ratio)) for edge in image.size)
    if max(size) > _MAX_JPEG_SIDE:
        raise RefusedError(f"{size[0]}x{size[1]} pixels once resized; a side of a JPEG has at most {_MAX_JPEG_SIDE}")
    image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.info = {}  # a comment would be written too, and a long one stops the encoder
    image.save(stream, "JPEG", quality=quality, exif=b"", icc_profile=None)
    return Inspected("jpg", image.height, image.width, (*kinds, "resized"), stream.getvalue())


def _convert_other(data: memoryview, resize: int, quality: int) -> Inspected:
    image = _decoded(data)
    kinds = ((image.format or "unknown").lower(),)
    if resize and min(image.size) > resize:
        return _resized(data, None, kinds, resize, quality)
    return _as_png(image, (*kinds, "converted to png"))
