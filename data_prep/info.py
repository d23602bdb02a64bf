"""Shows a data set: a table of what it holds, and a contact sheet of random samples with their class names.

Of a recording of events the sheet has all its events in one picture, ON in red and OFF in blue.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data_prep.images import FORMATS
from data_prep.plan import shuffled
from data_prep.progress import size
from data_prep.state import STATE_NAME, load_state
from data_prep.stores import Store
from data_prep.verify import find_splits
from pipeline.data.decode.events import decode
from pipeline.data.manifest import EVENTS, IMAGES, SAMPLE_DTYPE, Manifest, samples_in
from pipeline.errors import DataError

SHEET_NAME = "contact-sheet.png"
_COLUMNS, _ROWS = 10, 6
_TILE, _CAPTION, _GAP = 128, 18, 6
_FONT_PIXELS = 12
_ON, _OFF = np.array([200, 30, 30]), np.array([30, 70, 200])  # colours of events
_LARGEST = 1280  # most pixels of a side of a picture of events
_SMOOTH_FROM = 32  # smaller images are enlarged pixel by pixel, so that their pixels show


def info(store: Store, sheet: Path | None, seed: int, say: Callable[[str], None] = print) -> None:
    """Says what the data set in `store` holds and draws a contact sheet of it into the PNG file `sheet`.

    Args:
        seed: draws the samples of the sheet; half the rows from each split, or all from the only one.
    """
    splits = find_splits(store)
    tables = {split: _samples(store, split, manifest) for split, manifest in splits.items()}
    rows = [("split", "classes", "samples", "per class", "shards", "bytes", "height", "width")]
    for split, manifest in splits.items():
        table = tables[split]
        counts = np.bincount(table["label"], minlength=len(manifest.classes))
        sizes = (_range(table["height"]), _range(table["width"]))
        totals = (f"{len(manifest.shards):,}", size(manifest.num_bytes))
        num_classes, num_samples = f"{len(manifest.classes):,}", f"{manifest.num_samples:,}"
        rows.append((manifest.split, num_classes, num_samples, _range(counts), *totals, *sizes))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    say("per class, height and width: smallest / median / largest")
    _say_kinds(store, say)
    if sheet is not None:
        _draw(store, splits, tables, seed).save(sheet, "PNG")
        say(f"contact sheet: {sheet}")


def _say_kinds(store: Store, say: Callable) -> None:
    state = load_state(store) if store.read(STATE_NAME) is not None else None
    for split, counts in (state.counts if state else {}).items():
        kinds = ", ".join(f"{kind} {num:,}" for kind, num in counts["kinds"].items())
        say(f"{split}: {counts['in']:,} in, {counts['refused']:,} refused; {kinds}")


def _range(values: np.ndarray) -> str:
    if not len(values):
        return "-"
    low, middle, high = (int(value) for value in (values.min(), np.median(values), values.max()))
    return f"{low:,}" if low == high else f"{low:,} / {middle:,} / {high:,}"


def _samples(store: Store, split: str, manifest: Manifest) -> np.ndarray:
    """The sample tables of all shards, one after another."""
    tables = []
    for shard in manifest.shards:
        name = f"{split}/{shard.samples}".lstrip("/")
        data = store.read(name)
        if data is None:
            raise DataError(f"{store.where}/{name} is missing; check the set with python -m data_prep verify")
        try:
            table = samples_in(data, shard)
            if (wrong := (table["label"] < 0) | (table["label"] >= len(manifest.classes))).any():
                place = int(wrong.argmax())
                raise ValueError(
                    f"gives sample {place} the label {table['label'][place]}, of {len(manifest.classes)} classes"
                )
        except ValueError as error:
            raise DataError(f"{store.where}/{name} {error}; check the set with python -m data_prep verify") from None
        tables.append(table)
    return np.concatenate([np.zeros(0, SAMPLE_DTYPE), *tables])


def _draw(store: Store, splits: dict[str, Manifest], tables: dict[str, np.ndarray], seed: int) -> Image.Image:
    """Tiles with captions, a band of rows for each split."""
    font = ImageFont.load_default(_FONT_PIXELS)
    rows_each = max(1, _ROWS // len(splits))
    step_x, step_y, band = _TILE + _GAP, _TILE + _CAPTION + _GAP, _CAPTION + _GAP
    canvas = Image.new("RGB", (_COLUMNS * step_x + _GAP, len(splits) * (band + rows_each * step_y) + _GAP), "white")
    pen, top = ImageDraw.Draw(canvas), _GAP
    for split, manifest in splits.items():
        pen.text((_GAP, top), f"{manifest.split}: {manifest.num_samples:,} samples", "black", font)
        top += band
        drawn = shuffled(manifest.num_samples, seed)[: rows_each * _COLUMNS]
        for place, number in enumerate(drawn):
            left, upper = _GAP + place % _COLUMNS * step_x, top + place // _COLUMNS * step_y
            tile = _TILES[manifest.kind](_sample_bytes(store, split, manifest, tables[split], int(number)))
            canvas.paste(tile, (left + (_TILE - tile.width) // 2, upper + (_TILE - tile.height) // 2))
            label = int(tables[split]["label"][number])
            pen.text((left, upper + _TILE + 2), _fitting(manifest.shown[label], font), "black", font)
        top += rows_each * step_y
    return canvas


def _sample_bytes(store: Store, split: str, manifest: Manifest, table: np.ndarray, number: int) -> bytes:
    ends = np.cumsum([shard.num_samples for shard in manifest.shards])
    shard = manifest.shards[int(np.searchsorted(ends, number, side="right"))]
    return store.read_range(
        f"{split}/{shard.tar}".lstrip("/"), int(table["offset"][number]), int(table["length"][number])
    )


def _picture_tile(data: bytes) -> Image.Image:
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data), formats=FORMATS)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"a sample cannot be decoded ({error}); check the set with python -m data_prep verify --decode"
        ) from None
    smooth = max(image.size) >= _SMOOTH_FROM
    return ImageOps.contain(image, (_TILE, _TILE), Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)


def _events_tile(data: bytes) -> Image.Image:
    """All events of a recording in one picture: red where the pixel sent more ON than OFF, blue where less; the more,
    the darker."""
    try:
        events = decode(data)
    except ValueError as error:
        raise DataError(
            f"a sample cannot be decoded ({error}); check the set with python -m data_prep verify --decode"
        ) from None
    # A sensor may be said to be 65,535 pixels wide: larger ones than _LARGEST are drawn in cells of several pixels.
    side = -(-max(events.width, events.height) // _LARGEST)
    width, height = -(-events.width // side), -(-events.height // side)
    places = (events.y // side).astype(np.int64) * width + events.x // side
    num = width * height
    on, off = (np.bincount(places[events.p == p], minlength=num).astype(np.float64) for p in (1, 0))
    total = on + off
    # Full colour at the 95th percentile of the pixels that sent anything: one hot pixel must not pale all others.
    strength = np.minimum(1, total / max(1, np.quantile(total[total > 0], 0.95)))[:, None]
    share = (on / np.maximum(total, 1))[:, None]
    colour = share * _ON + (1 - share) * _OFF
    pixels = np.rint(255 + (colour - 255) * (0.15 + 0.85 * strength) * (total[:, None] > 0)).astype(np.uint8)
    image = Image.fromarray(pixels.reshape(height, width, 3))
    return ImageOps.contain(
        image, (_TILE, _TILE), Image.Resampling.BOX if max(image.size) > _TILE else Image.Resampling.NEAREST
    )


_TILES = {IMAGES: _picture_tile, EVENTS: _events_tile}


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= _TILE:
        return text
    while text and font.getlength(text + "…") > _TILE:
        text = text[:-1]
    return text + "…"
