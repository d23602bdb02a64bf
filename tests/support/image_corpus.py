"""Odd image files of every kind that can be made here: what cameras, phones, web servers and old programs write.

Each shows the same picture, 48 pixels high and 64 wide when upright, with four different corners, so that a wrong turn
or a wrong colour shows.
"""

import base64
import io
import struct
import zlib
from functools import cache

import numpy as np
from PIL import Image, features

ORIENTATION = 0x0112
HEIGHT, WIDTH = 48, 64
_TO_STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""Operations that turn the upright picture into the one that a camera stores with this orientation."""


@cache
def picture(mode: str = "RGB") -> Image.Image:
    """Smooth, so that JPEG keeps it; red, green, blue and yellow corners."""
    corners = np.array([[[220, 30, 30], [30, 200, 40]], [[30, 40, 210], [230, 220, 40]]], np.uint8)
    return Image.fromarray(corners).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR).convert(mode)


def saved(image: Image.Image, kind: str, **settings) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def jpeg(image: Image.Image | None = None, **settings) -> bytes:
    return saved(image or picture(), "JPEG", **({"quality": 92} | settings))


def segment(marker: int, body: bytes) -> bytes:
    """A marker segment of a JPEG: T.81, B.1.1.4."""
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def with_segments(data: bytes, *segments: bytes, after_app0: bool = False) -> bytes:
    """`data` with more segments at its start."""
    at = 4 + int.from_bytes(data[4:6], "big") if after_app0 else 2
    return data[:at] + b"".join(segments) + data[at:]


def without_app0(data: bytes) -> bytes:
    return data[:2] + data[4 + int.from_bytes(data[4:6], "big") :]


def tiff_block(value: int, *, order: str = "<", kind: int = 3, count: int = 1, padding: int = 0) -> bytes:
    """A TIFF structure that holds an orientation alone; `kind` 3 is SHORT and 4 is LONG."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + padding) + bytes(padding)
    packed = struct.pack(f"{order}I", value) if kind == 4 else struct.pack(f"{order}HH", value, 0)
    return head + struct.pack(f"{order}HHHI", 1, ORIENTATION, kind, count) + packed + bytes(4)


def exif(block: bytes) -> bytes:
    """An APP1 segment with an EXIF block."""
    return segment(0xE1, b"Exif\0\0" + block)


def xmp(orientation: int) -> bytes:
    text = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/>'
        "</rdf:RDF></x:xmpmeta>"
    )
    return segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + text.encode())


def stored(orientation: int) -> Image.Image:
    """The picture as stored by a camera that was held so."""
    return picture().transpose(_TO_STORED[orientation]) if orientation in _TO_STORED else picture()


def turned(orientation: int, **block) -> bytes:
    """A JPEG that is upright once its orientation is followed."""
    return with_segments(jpeg(stored(orientation)), exif(tiff_block(orientation, **block)))


def replaced(data: bytes, marker: int, change) -> bytes:
    """`data` with `change` applied to the body of the first segment of this marker."""
    at = data.index(bytes((0xFF, marker)))
    length = int.from_bytes(data[at + 2 : at + 4], "big")
    return data[:at] + segment(marker, change(data[at + 4 : at + 2 + length])) + data[at + 2 + length :]


def mpf(data: bytes, preview: bytes) -> bytes:
    """A JPEG with a second one behind its end, as CIPA's multi-picture format has it."""
    entries = 8 + 2 + 3 * 12 + 4
    table = b"II*\0" + struct.pack("<IH", 8, 3)
    table += struct.pack("<HHI4s", 0xB000, 7, 4, b"0100") + struct.pack("<HHII", 0xB001, 4, 1, 2)
    table += struct.pack("<HHII", 0xB002, 7, 32, entries) + bytes(4)
    length = len(data) + 4 + 4 + entries + 32
    offset = length - (2 + 4 + 4)  # counted from the table's own start
    table += struct.pack("<IIIHH", 0x030000, length, 0, 0, 0)
    table += struct.pack("<IIIHH", 0x010001, len(preview), offset, 0, 0)
    return with_segments(data, segment(0xE2, b"MPF\0" + table)) + preview


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunks(data: bytes, *chunks: bytes, before: bytes = b"IDAT") -> bytes:
    """A PNG with more chunks in front of its first of the kind `before`."""
    at = data.index(before) - 4
    return data[:at] + b"".join(chunks) + data[at:]


def png_of(rows: np.ndarray, depth: int, colour: int, *chunks: bytes) -> bytes:
    """A PNG from packed rows, for what Pillow cannot write."""
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, colour, 0, 0, 0)
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = (png_chunk(b"IHDR", header), *chunks, png_chunk(b"IDAT", zlib.compress(body)), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def interlaced() -> bytes:
    """Adam7: seven reduced pictures one after another (ISO/IEC 15948, 8.2)."""
    pixels, body = np.asarray(picture()), b""
    for left, top, step_x, step_y in (
        (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
    ):  # fmt: skip
        body += b"".join(b"\0" + row.tobytes() for row in pixels[top::step_y, left::step_x])
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 1)
    chunks = (png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(body)), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def jpegs() -> dict[str, bytes]:
    """Kinds of JPEG that are whole."""
    plain = jpeg(subsampling=2)
    thumbnail = jpeg(picture().resize((16, 12)))
    made = {
        "plain_420": plain,
        "plain_422": jpeg(subsampling=1),
        "plain_444": jpeg(subsampling=0),
        "plain_440": replaced(jpeg(subsampling=1), 0xC0, lambda b: b[:7] + b"\x12" + b[8:]),
        "grey": jpeg(picture("L")),
        "grey_sampled_2x2": replaced(jpeg(picture("L")), 0xC0, lambda b: b[:7] + b"\x22" + b[8:]),
        "progressive": jpeg(progressive=True),
        "progressive_grey": jpeg(picture("L"), progressive=True),
        "optimised": jpeg(optimize=True),
        "restart_markers": jpeg(restart_marker_blocks=1),
        "cmyk": jpeg(picture("CMYK")),
        "rgb_by_adobe": jpeg(keep_rgb=True),
        "rgb_by_component_names": without_adobe(jpeg(keep_rgb=True)),
        "jfif_and_adobe_rgb": with_segments(jpeg(), segment(0xEE, b"Adobe\0\x64\0\0\0\0\0"), after_app0=True),
        "adobe_ycc": with_segments(jpeg(), segment(0xEE, b"Adobe\0\x64\0\0\0\0\1"), after_app0=True),
        "extended_sequential": jpeg().replace(b"\xff\xc0\x00\x11", b"\xff\xc1\x00\x11"),
        "arithmetic": base64.b64decode(ARITHMETIC),
        "no_jfif": without_app0(plain),
        "comment": with_segments(plain, segment(0xFE, b"made by hand \xff\xd9 \xff\xd8 \xff\xda")),
        "huge_icc": jpeg(icc_profile=bytes(range(256)) * 1000),
        "fill_bytes": plain[:2] + b"\xff\xff\xff" + plain[2:],
        "fill_bytes_before_the_scan": plain.replace(b"\xff\xda", b"\xff\xff\xff\xda"),
        "fill_bytes_before_the_end": plain[:-2] + b"\xff\xff\xff\xd9",
        "thumbnail": with_segments(plain, exif(tiff_block(1) + thumbnail)),
        "jfxx_thumbnail": with_segments(plain, segment(0xE0, b"JFXX\0\x10" + thumbnail), after_app0=True),
        "photoshop": with_segments(plain, segment(0xED, b"Photoshop 3.0\08BIM\x04\x04\0\0\0\0\0\0")),
        "mpf": mpf(plain, thumbnail),
    }
    made |= {f"size_{w}x{h}": jpeg(Image.new("RGB", (w, h), "teal")) for w, h in ((1, 1), (1, 31), (33, 1), (17, 9))}
    return made | exif_jpegs(plain) | ended_jpegs(plain, thumbnail)


def without_adobe(data: bytes) -> bytes:
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def exif_jpegs(plain: bytes) -> dict[str, bytes]:
    """Orientations as they are written, and as they should not be."""
    made = {f"exif_{value}": turned(value) for value in range(1, 9)}
    made |= {f"exif_{value}_big_endian": turned(value, order=">") for value in (3, 6)}
    made |= {f"exif_value_{value}": with_segments(plain, exif(tiff_block(value))) for value in (0, 9, 255, 65535)}
    on_side = jpeg(stored(6))
    made |= {
        "exif_6_long": turned(6, kind=4),
        "exif_6_long_big_endian": turned(6, kind=4, order=">"),
        "exif_6_byte": turned(6, kind=1),
        "exif_6_undefined": turned(6, kind=7),
        "exif_6_signed": turned(6, kind=8),
        "exif_6_text": turned(6, kind=2),
        "exif_6_rational": turned(6, kind=5),
        "exif_6_count_0": turned(6, count=0),
        "exif_6_count_2": turned(6, count=2),
        "exif_6_far_directory": turned(6, padding=500),
        "exif_6_no_jfif": with_segments(without_app0(on_side), exif(tiff_block(6))),
        "exif_6_after_other_apps": with_segments(
            on_side, segment(0xE2, b"other" * 9), segment(0xED, b"more" * 99), exif(tiff_block(6)), after_app0=True
        ),
        "exif_6_after_xmp": with_segments(on_side, xmp(1), exif(tiff_block(6))),
        "exif_6_before_xmp_8": with_segments(on_side, exif(tiff_block(6)), xmp(8)),
        "exif_without_orientation_xmp_6": with_segments(on_side, exif(b"II*\0\x08\0\0\0" + bytes(6)), xmp(6)),
        "xmp_6": with_segments(on_side, xmp(6)),
        "exif_6_twice": with_segments(on_side, exif(tiff_block(6)), exif(tiff_block(6))),
        "exif_6_and_3": with_segments(on_side, exif(tiff_block(6)), exif(tiff_block(3))),
        "exif_1_and_6": with_segments(on_side, exif(tiff_block(1)), exif(tiff_block(6))),
        "exif_6_and_empty": with_segments(on_side, exif(tiff_block(6)), exif(b"")),
        "exif_empty": with_segments(plain, exif(b"")),
        "exif_empty_and_6": with_segments(on_side, exif(b""), exif(tiff_block(6))),
        "exif_garbage": with_segments(plain, exif(b"garbage" * 9)),
        "exif_cut": with_segments(plain, exif(tiff_block(6)[:14])),
        "exif_cut_value": with_segments(plain, exif(tiff_block(6)[:18])),
        "exif_cut_next": with_segments(on_side, exif(tiff_block(6)[:-4])),
        "exif_far_offset": with_segments(plain, exif(b"II*\0" + struct.pack("<I", 1 << 30) + bytes(20))),
        "exif_order_of_the_other": with_segments(on_side, exif(b"II\0*" + tiff_block(6)[4:])),
        "exif_unknown_order": with_segments(on_side, exif(b"\2M\0*" + tiff_block(6, order=">")[4:])),
        "exif_more_entries_than_fit": with_segments(on_side, exif(tiff_block(6)[:8] + b"\x09\0" + tiff_block(6)[10:])),
        "exif_magic_43": with_segments(on_side, exif(b"II+\0" + tiff_block(6)[4:])),
        "exif_second_orientation_in_ifd1": with_segments(plain, exif(two_directories(1, 6))),
        "exif_two_orientations": with_segments(on_side, exif(two_entries(6, 3))),
        "exif_lower_case": with_segments(plain, segment(0xE1, b"exif\0\0" + tiff_block(6))),
        "exif_odd_pad": with_segments(on_side, segment(0xE1, b"Exif\0\xff" + tiff_block(6))),
        "exif_behind_the_frame": on_side.replace(b"\xff\xc4", exif(tiff_block(6)) + b"\xff\xc4", 1),
    }
    return made


def two_directories(first: int, second: int) -> bytes:
    entry = struct.pack("<HHHIHH", 1, ORIENTATION, 3, 1, first, 0)
    other = struct.pack("<HHHIHH", 1, ORIENTATION, 3, 1, second, 0)
    return b"II*\0" + struct.pack("<I", 8) + entry + struct.pack("<I", 8 + len(entry) + 4) + other + bytes(4)


def two_entries(first: int, second: int) -> bytes:
    entries = b"".join(struct.pack("<HHIHH", ORIENTATION, 3, 1, value, 0) for value in (first, second))
    return b"II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)


def ended_jpegs(plain: bytes, thumbnail: bytes) -> dict[str, bytes]:
    """A whole JPEG with something behind its end."""
    tails = {
        "zeros": bytes(1000),
        "newline": b"\r\n",
        "one_byte": b"\0",
        "fill": b"\xff",
        "page": b"<html><body>404</body></html>\n",
        "movie": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + np.random.default_rng(1).bytes(5000),
        "preview": thumbnail,
        "cut_preview": thumbnail[:-40],
        "itself": plain,
        "end_marker": b"\xff\xd9",
        "start_of_scan": b"\xff\xda" * 3,
        "long": np.random.default_rng(2).bytes(300_000),
    }
    made = {f"behind_{name}": plain + tail for name, tail in tails.items()}
    return made | {"progressive_behind_preview": jpeg(progressive=True) + thumbnail}


def pngs() -> dict[str, bytes]:
    """Kinds of PNG that are whole."""
    plain, grey = saved(picture(), "PNG"), np.asarray(picture("L"))
    deep = (np.asarray(picture()).astype(int) * 257).astype(">u2")
    alpha = picture().copy()
    alpha.putalpha(picture("L"))
    palette = picture().quantize(16)
    on_side = saved(stored(6), "PNG")
    rotated = png_chunk(b"eXIf", tiff_block(6))
    return {
        "png": plain,
        "png_grey": saved(picture("L"), "PNG"),
        "png_1_bit": saved(picture("1"), "PNG"),
        "png_2_bit_grey": png_of((grey >> 6).reshape(HEIGHT, -1, 4) @ np.array([64, 16, 4, 1], np.uint8), 2, 0),
        "png_4_bit_grey": png_of((grey >> 4).reshape(HEIGHT, -1, 2) @ np.array([16, 1], np.uint8), 4, 0),
        "png_grey_alpha": saved(alpha.convert("LA"), "PNG"),
        "png_alpha": saved(alpha, "PNG"),
        "png_palette": saved(palette, "PNG"),
        "png_palette_4_bit": saved(palette, "PNG", bits=4),
        "png_palette_transparent": saved(palette, "PNG", transparency=3),
        "png_palette_alpha": saved(palette, "PNG", transparency=bytes(range(0, 256, 16))),
        "png_transparent_colour": saved(picture(), "PNG", transparency=(220, 30, 30)),
        "png_transparent_grey": saved(picture("L"), "PNG", transparency=100),
        "png_16_bit": png_of(deep, 16, 2),
        "png_16_bit_grey": saved(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"),
        "png_16_bit_alpha": png_of(np.concatenate([deep, deep[:, :, :1]], axis=2), 16, 6),
        "png_16_bit_grey_alpha": png_of(np.stack([grey, grey], axis=2).astype(">u2") * 257, 16, 4),
        "png_interlaced": interlaced(),
        "png_exif_before": with_chunks(on_side, rotated),
        "png_exif_behind": with_chunks(on_side, rotated, before=b"IEND"),
        "png_exif_damaged": with_chunks(plain, png_chunk(b"eXIf", b"garbage")),
        "png_exif_twice": with_chunks(on_side, rotated, png_chunk(b"eXIf", tiff_block(1))),
        "png_exif_long": with_chunks(on_side, png_chunk(b"eXIf", tiff_block(6, kind=4))),
        "png_exif_1": with_chunks(plain, png_chunk(b"eXIf", tiff_block(1))),
        "png_exif_as_text": with_chunks(on_side, png_chunk(b"zTXt", exif_as_text(6))),
        "png_xmp": with_chunks(on_side, png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6)[33:])),
        "png_gamma": with_chunks(plain, png_chunk(b"gAMA", struct.pack(">I", 100000))),
        "png_srgb": with_chunks(plain, png_chunk(b"sRGB", b"\0")),
        "png_background": with_chunks(plain, png_chunk(b"bKGD", struct.pack(">3H", 9, 9, 9))),
        "png_significant_bits": with_chunks(plain, png_chunk(b"sBIT", b"\5\5\5")),
        "png_text": with_chunks(plain, png_chunk(b"tEXt", b"Comment\0IEND and IDAT")),
        "png_icc": saved(picture(), "PNG", icc_profile=bytes(1000)),
        "apng": saved(picture(), "PNG", save_all=True, append_images=[picture().transpose(Image.Transpose.ROTATE_180)]),
        "apng_own_default": saved(
            picture(),
            "PNG",
            save_all=True,
            default_image=True,
            append_images=[picture().transpose(Image.Transpose.ROTATE_180)],
        ),
        "png_behind_zeros": plain + bytes(1000),
        "png_behind_page": plain + b"<html>" * 20,
        "png_behind_itself": plain + plain,
        "png_behind_fake_end": plain + b"IEND\xae\x42\x60\x82",
        "png_empty_idat": with_chunks(plain, png_chunk(b"IDAT", b"")),
        "png_1x1": saved(Image.new("RGB", (1, 1), "teal"), "PNG"),
        "png_1x31": saved(Image.new("RGB", (1, 31), "teal"), "PNG"),
        "png_33x1": saved(Image.new("RGB", (33, 1), "teal"), "PNG"),
    }


def exif_as_text(orientation: int) -> bytes:
    """What ImageMagick writes: a profile in hexadecimal digits."""
    block = b"Exif\0\0" + tiff_block(orientation)
    text = f"\nexif\n{len(block):8d}\n{block.hex()}\n".encode()
    return b"Raw profile type exif\0\0" + zlib.compress(text)


def others() -> dict[str, bytes]:
    """Formats that become PNG."""
    other = picture().transpose(Image.Transpose.ROTATE_180)
    rotated = Image.Exif()
    rotated[ORIENTATION] = 6
    alpha = picture().copy()
    alpha.putalpha(picture("L"))
    return {
        "webp_lossy": saved(picture(), "WEBP", quality=90),
        "webp_lossless": saved(picture(), "WEBP", lossless=True),
        "webp_alpha": saved(alpha, "WEBP", lossless=True, exact=True),
        "webp_animated": saved(picture(), "WEBP", save_all=True, append_images=[other], lossless=True),
        "webp_exif_6": saved(stored(6), "WEBP", exif=rotated, lossless=True),
        "bmp": saved(picture(), "BMP"),
        "bmp_palette": saved(picture().quantize(16), "BMP"),
        "bmp_1_bit": saved(picture("1"), "BMP"),
        "gif": saved(picture().quantize(200), "GIF"),
        "gif_animated": saved(picture().quantize(16), "GIF", save_all=True, append_images=[other.quantize(16)]),
        "gif_transparent": saved(picture().quantize(16), "GIF", transparency=2),
        "tiff": saved(picture(), "TIFF"),
        "tiff_pages": saved(picture(), "TIFF", save_all=True, append_images=[other]),
        "tiff_lzw": saved(picture(), "TIFF", compression="tiff_lzw"),
        "tiff_jpeg": saved(picture(), "TIFF", compression="jpeg"),
        "tiff_cmyk": saved(picture("CMYK"), "TIFF"),
        "tiff_16_bit": saved(Image.fromarray(np.asarray(picture("L")).astype(np.uint16) * 257), "TIFF"),
        "tiff_exif_6": saved(stored(6), "TIFF", exif=rotated),
        "ppm": saved(picture(), "PPM"),
        "pgm": saved(picture("L"), "PPM"),
        "jpeg_2000": saved(picture(), "JPEG2000"),
        **({"avif": saved(picture(), "AVIF", quality=95)} if features.check("avif") else {}),
    }


# jpegtran -arithmetic of the picture: neither Pillow nor this file can write it
ARITHMETIC = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgICAgMCAgIDAwMDBAYEBAQEBAgGBgUGCQgKCgkICQkKDA8MCgsOCwkJDRENDg8QEBEQCgwSEx"
    "IQEw8QEBD/2wBDAQMDAwQDBAgEBAgQCwkLEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBD/yQARCAAw"
    "AEADASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/ANHrAWwNYX04DXQ1ib9FLPwpkA8d3tCcwoqR3BS6bV1nrYGC7ltQUSrVhz"
    "wQDURlfgO76b0OTWaiyquJyRKSDuHouZOHuk++Dv8AwAvqRC5SYxFcTjyYpwqP7GuqoDzvKolA5LWw7S/swOWJMgoGNj8jdxV2DJIVX4tF5pwi"
    "aO1Qz3duefyDLEUmmPKptzxdWuBECpYVPyGsN3tjkeD4INeKVLuzoi70QXa1jMI7++Jzr/BziGK2hullhK40LzZ0ypdPYMEST1qv04nMxZKFFT"
    "Mcu2pvBJB52U/4fZSecHePZ1c2zAWIGj5dQimaiU+F76lquFVIWWpULm0tPD8ZZ6toX1DujoYZZ5W6pnPwE/jfOAjFO02JioBufiyDUsvT627+"
    "tkgwpHMye1Mdjcp9/9k="
)
