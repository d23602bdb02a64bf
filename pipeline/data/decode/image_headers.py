"""Reads JPEG and PNG headers, and finds whether the file is whole. Packing, verifying and training all use this.

Nothing is decoded: the marker segments of a JPEG and the chunks of a PNG are walked up to the end of the image. Bytes
behind that end (a phone's film, a camera's preview, a server's padding) are ignored. It takes a tenth of the time that
Pillow needs to open the image. JPEG: ITU-T T.81, annex B; EXIF: CIPA DC-008, 4.6; XMP: ISO 16684-1;
PNG: ISO/IEC 15948, 11.2.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

JPEG_MAGIC = b"\xff\xd8\xff"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_COMMON_SOF = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended sequential, progressive; all Huffman-coded
_SOS, _EOI = 0xDA, 0xD9
_MISCELLANEOUS = frozenset((0xC4, 0xCC, _SOS, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)))
# In image data an FF is followed by 0 or is a restart marker; any other marker ends the scan.
_MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
_ORIENTATION = 0x0112
_SHORT = 3
_PNG_COMPONENTS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
_PNG_TEXTS = frozenset((b"tEXt", b"zTXt", b"iTXt"))
_PNG_EXIF_TEXT = b"Raw profile type exif"


class HeaderError(ValueError):
    """The header is cut off or contradicts itself. The message is the reason in the quarantine list."""


class TruncatedError(HeaderError):
    """The end of the header or of the image is missing."""


@dataclass(frozen=True, slots=True)
class Header:
    kind: str
    """jpeg or png."""
    height: int
    """In pixels as stored, before EXIF rotation."""
    width: int
    components: int
    depth: int
    """Bits a component."""
    orientation: int = 1
    """EXIF orientation, 1 to 8; above 4, height and width are swapped."""
    doubtful: bool = False
    """Readers disagree about the orientation that EXIF states: twice, in another type, or in a damaged block."""
    noted_elsewhere: bool = False
    """No EXIF block states an orientation, but XMP or a PNG text may; some readers follow it."""
    unusual: bool = False
    """JPEG with arithmetic, lossless or hierarchical coding, which few decoders can read; a PNG with several images, of
    which decoders show different ones."""
    rgb: bool = False
    """JPEG whose three components are red, green and blue, which some decoders take for YCbCr."""
    truncated: bool = False
    """The end of the image is missing."""
    damage: str = ""
    """What is broken behind a good header; empty if nothing is."""
    end: int = 0
    """Offset of the first byte behind the image; the file's end where the image is truncated."""
    scan_start: int = 0
    """JPEG: offset of the image data of the first scan."""
    scan_end: int = 0
    """JPEG of one sequential scan: offset of the end marker. If the marker is missing: the file's end, without an FF
    that may be left of it. Otherwise 0."""


def read_header(data: bytes | memoryview) -> Header | None:
    """What the headers of `data` say; None if it is neither JPEG nor PNG.

    Raises:
        HeaderError: the headers are cut off or broken.
    """
    if data[:3] == JPEG_MAGIC:
        return read_jpeg(data)
    if data[:8] == PNG_MAGIC:
        return read_png(data)
    return None


class _Orientation:
    """Collects what the metadata of a file say about its orientation, and whether readers agree on it."""

    def __init__(self) -> None:
        self.value = 1
        self.doubtful = False
        self._stated = False
        self._num_exif = 0
        self._noted = False

    def see_exif(self, block: bytes | memoryview) -> None:
        self._num_exif += 1
        self.value, self._stated, doubtful = _read_exif(block)
        self.doubtful |= doubtful or self._num_exif > 1

    def see_text(self, text: bytes | memoryview) -> None:
        """Takes in XMP, or the text that some programs write into a PNG in place of an EXIF block."""
        self._noted |= b"Orientation" in bytes(text) or bytes(text[:21]) == _PNG_EXIF_TEXT

    @property
    def noted_elsewhere(self) -> bool:
        return self._noted and not self._stated


def jpeg_segments(data: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment of a JPEG up to its first start of scan; `HeaderError` where it is broken.

    The body of a segment begins 4 bytes behind its start.
    """
    at, size = 2, len(data)
    while True:
        if at + 4 > size:
            raise TruncatedError("truncated: the JPEG header is cut off")
        if data[at] != 0xFF:
            raise HeaderError(f"broken JPEG header: no marker at byte {at}")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker == _EOI:
            raise TruncatedError("truncated: the JPEG ends before its image data")
        elif marker not in _SOF and marker not in _MISCELLANEOUS:
            raise HeaderError(f"broken JPEG header: the marker FF{marker:02X} at byte {at}")
        else:
            end = _segment_end(data, at)
            yield marker, at, end
            if marker == _SOS:
                return
            at = end


def _segment_end(data: bytes | memoryview, at: int) -> int:
    """Offset behind the marker segment at `at`."""
    length = data[at + 2] << 8 | data[at + 3]
    if length < 2 or at + 2 + length > len(data):
        if data[-2:] == b"\xff\xd9":  # the end is there: nothing was cut off
            raise HeaderError(f"broken JPEG header: a segment of {length} bytes at byte {at}")
        raise TruncatedError("truncated: the JPEG header is cut off")
    return at + 2 + length


def read_jpeg(data: bytes | memoryview) -> Header:
    """Reads the marker segments of a JPEG up to its end; `HeaderError` where they are broken."""
    seen, names, jfif, adobe = _Orientation(), b"", False, -1
    frame: tuple[int, int, int, int, int] | None = None
    body, end = data[:0], 0
    for marker, start, end in jpeg_segments(data):
        body = data[start + 4 : end]
        if marker in _SOF:
            if frame is not None:
                raise HeaderError("broken JPEG header: two frame segments")
            if len(body) < 6 or len(body) < 6 + 3 * body[5]:
                raise HeaderError("broken JPEG header: the frame segment is too short")
            frame = (marker, *struct.unpack(">BHHB", body[:6]))
            names = bytes(body[6 : 6 + 3 * body[5] : 3])
        elif marker == 0xE0 and body[:5] == b"JFIF\0":
            jfif = True
        elif marker == 0xE1 and body[:6] == b"Exif\0\0":
            seen.see_exif(body[6:])
        elif marker == 0xE1 and body[:4] == b"http":
            seen.see_text(body)
        elif marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
            adobe = body[11]
    if frame is None:
        raise HeaderError("broken JPEG header: image data before the frame segment")
    coding, depth, height, width, components = frame
    if not height or not width:
        raise HeaderError(f"broken JPEG header: {width}x{height} pixels")
    image_end, scan_end = _image_end(data, end)
    one_scan = coding in (0xC0, 0xC1) and len(body) > 0 and body[0] == components
    return Header(
        kind="jpeg",
        height=height,
        width=width,
        components=components,
        depth=depth,
        orientation=seen.value,
        doubtful=seen.doubtful,
        noted_elsewhere=seen.noted_elsewhere,
        unusual=coding not in _COMMON_SOF,
        rgb=components == 3 and (adobe == 0 or (adobe < 0 and not jfif and names == b"RGB")),
        truncated=image_end < 0,
        end=len(data) if image_end < 0 else image_end,
        scan_start=end,
        scan_end=scan_end if one_scan else 0,
    )


def _image_end(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """Offset behind the end marker, and offset of the marker; without a marker, -1 and the end of the image data.

    Args:
        at: offset of the image data of the first scan.
    """
    while (found := _MARKER.search(data, at)) is not None:
        marker, at = data[found.end() - 1], found.end()
        if marker == _EOI:
            return at, found.start()
        if marker == 0xD8:
            raise TruncatedError("truncated: another image begins inside the image data")
        if marker not in _MISCELLANEOUS:
            raise HeaderError(f"damaged: the marker FF{marker:02X} inside the image data at byte {at - 2}")
        if at + 2 > len(data):
            return -1, found.start()
        at = _segment_end(data, at - 2)
    end = len(data)
    while data[end - 1] == 0xFF:  # half of the lost marker: a single FF is not image data
        end -= 1
    return -1, end


def _read_exif(tiff: bytes | memoryview) -> tuple[int, bool, bool]:
    """The orientation in an EXIF block (1 where there is none), whether it is stated, and whether readers disagree."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(tiff[:4]))
    if order is None or len(tiff) < 8:
        return 1, False, len(tiff) > 0  # some readers guess the byte order
    (at,) = struct.unpack_from(f"{order}I", tiff, 4)
    if at + 2 > len(tiff):
        return 1, False, False
    (num_entries,) = struct.unpack_from(f"{order}H", tiff, at)
    entries_end = at + 2 + 12 * num_entries
    found = []
    for entry in range(at + 2, min(entries_end, len(tiff) - 11), 12):
        tag, kind, count, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
        if tag == _ORIENTATION:
            found.append((kind, count, value))
    if not found:
        return 1, False, False
    plain = len(found) == 1 and found[0][:2] == (_SHORT, 1) and entries_end <= len(tiff)
    value = found[0][2]
    return value if 1 <= value <= 8 else 1, True, not plain


def read_png(data: bytes | memoryview) -> Header:
    """Reads the header and the chunk list of a PNG file; `HeaderError` where the header is broken."""
    if len(data) < 33 or bytes(data[12:16]) != b"IHDR":
        raise TruncatedError("truncated: the PNG header is cut off")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    if not height or not width or colour not in _PNG_COMPONENTS:
        raise HeaderError(f"broken PNG header: {width}x{height} pixels, colour type {colour}")
    seen, at, ended, damage, several = _Orientation(), 8, False, "", False
    while at + 12 <= len(data) and not ended and not damage:
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, end = bytes(data[at + 4 : at + 8]), at + 12 + length
        if not kind.isalpha():
            damage = f"cannot be decoded: no PNG chunk at byte {at}"
        elif end > len(data):
            break
        elif zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            damage = f"cannot be decoded: the checksum of the PNG chunk at byte {at} is wrong"
        elif kind == b"eXIf":
            seen.see_exif(data[at + 8 : end - 4])
        elif kind in _PNG_TEXTS:
            seen.see_text(data[at + 8 : end - 4])
        several |= kind == b"acTL"
        ended = kind == b"IEND"
        at = end
    return Header(
        kind="png",
        height=height,
        width=width,
        components=_PNG_COMPONENTS[colour],
        depth=depth,
        orientation=seen.value,
        doubtful=seen.doubtful,
        noted_elsewhere=seen.noted_elsewhere,
        unusual=several,
        truncated=not ended and not damage,
        damage=damage,
        end=at if ended else len(data),
    )
