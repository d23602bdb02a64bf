"""One image: is it whole, what kind is it, how large is it upright, and does DALI need it converted.

JPEG and PNG are stored as they came; a JPEG that only lacks its end marker, or half of it, gets one. What DALI's
decoders do not take alike on CPU and GPU (CMYK, 16 bits, other formats) is converted to an 8-bit PNG, which loses
nothing that they would have kept.
"""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from data_prep.image_headers import Header, HeaderError, read_jpeg, read_png

MAX_IMAGE_BYTES = 64 << 20
"""Largest file that is taken as an image: bounds the memory of a worker."""
MAX_PIXELS = 89_478_485
"""Most pixels of an image: Pillow's own limit against decompression bombs, 268 MB as RGB."""
_MAX_JPEG_SIDE = 65_500  # libjpeg's limit
# Zeros in place of the end marker let the decoder finish its look-ahead, and starve it where image data are missing.
_LOOK_AHEAD = bytes(16)
_OTHER_LOOK_AHEAD = b"\xfe" * 16  # differs from the first bit on: a single missing bit shows
_JPEG_MAGIC = b"\xff\xd8\xff"
_END_OF_JPEG = b"\xff\xd9"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # checked below, against MAX_PIXELS


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
    """What is counted in the summary: the format, and what is out of the ordinary."""
    converted: bytes | None
    """The bytes to store in place of the file's, or None to store the file."""


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
    header = _read_header(data)
    if header is None:
        return _convert_other(data, resize, quality)
    if header.height * header.width > MAX_PIXELS:
        raise RefusedError(f"{header.width}x{header.height} pixels, more than {MAX_PIXELS}")
    extension = "jpg" if header.kind == "jpeg" else "png"
    height, width = (header.width, header.height) if header.orientation > 4 else (header.height, header.width)
    kinds = _kinds(header)
    must_convert = (header.components == 4 and header.kind == "jpeg") or header.depth > 8 or header.unusual
    must_convert |= header.kind == "png" and header.orientation > 1
    if header.truncated and header.kind == "jpeg":
        _require_all_data(data, header)
    if resize and min(height, width) > resize:
        return _resized(data, kinds, resize, quality)
    if must_convert:
        image = _decoded(data, header)
        return _as_png(image, (*kinds, "converted to png"))
    if header.truncated:  # a file without its end marker is suspect enough to look at all of it
        image = _decoded(data, header)
        if header.kind == "png":
            return _as_png(image, (*kinds, "converted to png"))
        completed = bytes(data[: header.scan_end]) + _END_OF_JPEG  # Pillow reads it without, DALI does not
        return Inspected(extension, height, width, (*kinds, "end marker added"), completed)
    if decode:
        _decoded(data, header)
    return Inspected(extension, height, width, kinds, None)


def _read_header(data: memoryview) -> Header | None:
    if not len(data):
        raise RefusedError("empty file")
    try:
        if data[:3] == _JPEG_MAGIC:
            return read_jpeg(data)
        if data[:8] == _PNG_MAGIC:
            return read_png(data)
    except HeaderError as error:
        raise RefusedError(str(error)) from None
    return None


def _kinds(header: Header) -> tuple[str, ...]:
    kinds = [header.kind]
    if header.components == 1:
        kinds.append("greyscale")
    if header.components == 4:
        kinds.append("cmyk" if header.kind == "jpeg" else "alpha")
    if header.depth > 8:
        kinds.append(f"{header.depth}-bit")
    if header.orientation > 1:
        kinds.append("exif-rotated")
    if header.truncated:
        kinds.append("no end marker")
    if header.unusual:
        kinds.append("unusual coding")
    return tuple(kinds)


def _require_all_data(data: memoryview, header: Header) -> None:
    """Refuses a JPEG without end marker that lost image data, too: what follows its last byte shows in the pixels."""
    if not header.scan_end:
        raise RefusedError("truncated: no end marker, so that of its several scans some may be missing")
    if _decoded(data, header).tobytes() != _decoded(data, header, look_ahead=_OTHER_LOOK_AHEAD).tobytes():
        raise RefusedError("truncated: image data are missing")


def _decoded(
    data: memoryview,
    header: Header | None = None,
    draft: tuple[int, int] | None = None,
    look_ahead: bytes = _LOOK_AHEAD,
) -> Image.Image:
    """Every pixel of the image, or the reason why not."""
    if header is not None and header.scan_end:
        stream = io.BytesIO(b"".join((data[: header.scan_end], look_ahead)))
    else:
        stream = io.BytesIO(data)
    try:
        image = Image.open(stream)
        if image.width * image.height > MAX_PIXELS:
            raise RefusedError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}")
        if draft:
            image.draft(None, draft)
        image.load()
    except RefusedError:
        raise
    except Image.UnidentifiedImageError:
        raise RefusedError("not an image: no known format") from None
    except Exception as error:  # a decoder fed with broken bytes raises whatever its parser meets
        raise RefusedError(f"cannot be decoded: {_one_line(error)}") from None
    return image


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _eight_bit(image: Image.Image) -> Image.Image:
    """`image` as 8-bit L or RGB; 16-bit values lose their low byte, transparency is dropped, as in DALI."""
    if image.mode in ("L", "RGB"):
        return image
    if image.mode == "F":
        raise RefusedError("floating-point pixels have no agreed range; convert the image to 8 bits first")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 0xFFFF:
            raise RefusedError("32-bit pixels have no agreed range; convert the image to 8 bits first")
        return Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, KeyError, TypeError):  # an unreadable EXIF block turns nothing
        return image


def _as_png(image: Image.Image, kinds: tuple[str, ...]) -> Inspected:
    image = _upright(_eight_bit(image))
    stream = io.BytesIO()
    # A fresh image: metadata (EXIF, ICC profile, transparency) would be written along.
    Image.fromarray(np.asarray(image)).save(stream, "PNG")
    return Inspected("png", image.height, image.width, kinds, stream.getvalue())


def _resized(data: memoryview, kinds: tuple[str, ...], side: int, quality: int) -> Inspected:
    header = _read_header(data)
    if header is not None and header.scan_end and header.components != 4:
        # The JPEG decoder itself shrinks by powers of two, for far less time; twice the target keeps the quality.
        scale = 2 * side / min(header.height, header.width)
        image = _decoded(data, header, (round(header.width * scale), round(header.height * scale)))
    else:
        image = _decoded(data, header)
    image = _upright(_eight_bit(image))
    ratio = side / min(image.size)
    size = tuple(side if edge == min(image.size) else max(1, round(edge * ratio)) for edge in image.size)
    if max(size) > _MAX_JPEG_SIDE:
        raise RefusedError(f"{size[0]}x{size[1]} pixels once resized; a side of a JPEG has at most {_MAX_JPEG_SIDE}")
    image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.info = {}  # a comment would be written along, and a long one stops the encoder
    image.save(stream, "JPEG", quality=quality, exif=b"", icc_profile=None)
    return Inspected("jpg", image.height, image.width, (*kinds, "resized"), stream.getvalue())


def _convert_other(data: memoryview, resize: int, quality: int) -> Inspected:
    image = _decoded(data)
    kinds = ((image.format or "unknown").lower(),)
    if resize and min(image.size) > resize:
        return _resized(data, kinds, resize, quality)
    return _as_png(image, (*kinds, "converted to png"))
