"""Each operation against Pillow or a definition in numpy, by DALI's real graph; and the draws of every policy.

Pillow rounds down where DALI rounds, and rounds in between where DALI does not: the tolerances follow from that.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from pipeline.config import DataConfig
from pipeline.data.decode import auto_augment
from pipeline.data.decode.augment import central_windows
from pipeline.data.decode.auto_augment import Boxes, Slot, draw_changes
from pipeline.data.decode.dali_pipeline import MEAN, STD, Graph, ImageViews
from pipeline.data.loader import evaluation_batches
from pipeline.errors import ConfigError
from tests.data.test_loader import CPU, change, collect, same
from tests.support.data_sets import drawn_jpeg, real_jpegs, write_set

SIDE, SEED = 32, 5
SEVERITIES = np.array([0.0, 0.3, 0.7, 1.0] * 2)
SIGNS = np.array([-1.0] * 4 + [1.0] * 4)
ALL_ON: dict[str, Any] = {"aa": "ta_wide", "reprob": 0.5, "mixup": 0.8, "cutmix": 1.0}


def picture(number: int) -> np.ndarray:
    """Smooth and noisy parts, levels that do not reach 0 and 255 in every channel, `(SIDE, SIDE, 3)` uint8."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(20, 230, (4, 5, 3), dtype=np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    noise = rng.integers(-12, 13, (SIDE, SIDE, 3))
    noise[: SIDE // 2] = 0
    return np.clip(np.asarray(coarse).astype(int) + noise, 3, 240).astype(np.uint8)


def through_dali(images: list[np.ndarray], changes: list[np.ndarray], **options: Any) -> np.ndarray:
    """Levels `(n, SIDE, SIDE, 3)` float64 of images after the changes, by the graph that trains."""
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        encoded.append(np.frombuffer(buffer.getvalue(), dtype=np.uint8))
    windows = central_windows(np.full((len(images), 2), SIDE), image_size=SIDE, resize=SIDE)
    data = DataConfig(image_size=SIDE, threads=1, **options)
    graph = Graph(data, CPU, lambda: (encoded, ImageViews(windows, changes)), batch_size=len(images), ahead=1)
    return graph.run().permute(0, 2, 3, 1).double().numpy() * STD + MEAN


def test_what_changes_nothing_leaves_every_level_as_it_is():
    images = [picture(number) for number in range(4)]
    neutral = [*auto_augment._neutral(4), *Boxes(np.zeros((4, 2), np.float32), np.zeros((4, 2), np.float32))]
    got = through_dali(images, neutral, aa="ta_wide", reprob=0.5)
    np.testing.assert_allclose(got, np.stack(images), rtol=0, atol=1e-4)  # normalised in fp32, and back


def affine(*numbers: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, numbers, fillcolor=(128,) * 3)


def solarize_add(added: int) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.point([level + added if level < 128 else level for level in range(256)] * 3)


def equalize(image: Image.Image) -> np.ndarray:
    """OpenCV's equalizeHist, channel by channel."""
    out = np.empty_like(np.asarray(image))
    for channel in range(3):
        plane = np.asarray(image)[..., channel]
        counts = np.bincount(plane.ravel(), minlength=256)
        least = int(np.flatnonzero(counts)[0])
        table = (np.cumsum(counts) - counts[least]) * (255 / (plane.size - counts[least]))
        out[..., channel] = np.rint(table.clip(0))[plane]
    return out


def by_hand(op: str, policy: str, severity: float, sign: float) -> Callable[[Image.Image], object]:
    """The operation as torchvision's TrivialAugmentWide or timm's RandAugment defines it, with Pillow."""
    wide, s = policy == "ta_wide", sign * severity
    shear, pixels = (0.99, 32.0) if wide else (0.3, 0.45 * SIDE)
    factor = 1 + 0.99 * s if wide else max(0.1, 1 + 0.9 * s)
    bits = 8 - round(6 * severity) if wide else 4 - int(4 * severity)
    threshold = 255 * (1 - severity) if wide else 256 - int(256 * severity)
    table = {
        "identity": lambda image: image,
        "shear_x": affine(1, shear * s, 0, 0, 1, 0),
        "shear_y": affine(1, 0, 0, shear * s, 1, 0),
        "translate_x": affine(1, 0, pixels * s, 0, 1, 0),
        "translate_y": affine(1, 0, 0, 0, 1, pixels * s),
        "rotate": lambda image: image.rotate((135 if wide else 30) * s, fillcolor=(128,) * 3),
        "brightness": lambda image: ImageEnhance.Brightness(image).enhance(factor),
        "color": lambda image: ImageEnhance.Color(image).enhance(factor),
        "contrast": lambda image: ImageEnhance.Contrast(image).enhance(factor),
        "sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(factor),
        "posterize": lambda image: image.point([level & (256 - 2 ** (8 - bits)) for level in range(256)] * 3),
        "solarize": lambda image: ImageOps.solarize(image, threshold),  # pyright: ignore
        "solarize_add": solarize_add(int(110 * severity)),
        "invert": ImageOps.invert,
        "autocontrast": ImageOps.autocontrast,
        "equalize": equalize,
    }
    return table[op]


TOLERANCE = {"brightness": 1.0, "color": 2.0, "contrast": 2.0, "sharpness": 2.0, "autocontrast": 1.0}
CASES = [("ta_wide", op) for op in auto_augment._WIDE_OPS] + [("rand-m9-inc1", op) for op in auto_augment._RAND_OPS]


@pytest.mark.parametrize(("policy", "op"), CASES)
def test_an_operation_is_that_of_pillow(policy, op):
    strength = auto_augment._WIDE if policy == "ta_wide" else auto_augment._RAND
    images = [picture(number) for number in range(len(SEVERITIES))]
    slot = auto_augment._neutral(len(images))
    auto_augment._write(op, slot, np.arange(len(images)), SEVERITIES, SIGNS, strength, SIDE)
    rest = [] if policy == "ta_wide" else [*auto_augment._neutral(len(images))]  # its second operation
    got = through_dali(images, [*slot, *rest], aa=policy)
    for index, image in enumerate(images):
        how = by_hand(op, policy, SEVERITIES[index], SIGNS[index])
        wanted = np.asarray(how(Image.fromarray(image))).astype(float)
        off = np.abs(got[index] - wanted)
        if op in ("shear_x", "shear_y", "rotate", "translate_x", "translate_y"):
            # Where two pixels are equally near, rounding decides: at 135 degrees along a diagonal.
            assert (off > 0.01).any(2).sum() < SIDE, (SEVERITIES[index], SIGNS[index])
        elif op == "sharpness":  # Pillow leaves the outermost pixels as they are, DALI mirrors the image there
            assert off[1:-1, 1:-1].max() <= TOLERANCE[op] + 0.01
        else:
            assert off.max() <= TOLERANCE.get(op, 0) + 0.01, (SEVERITIES[index], SIGNS[index])
    if op != "identity":
        assert np.abs(got - np.stack(images)).max(axis=(1, 2, 3)).max() > 5, "nothing was done"


@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_colour_jitter_is_pillows_saturation_brightness_and_contrast(strength):
    """Where Pillow cuts no level in between: images of middle contrast. It rounds three times, by up to 1 level each,
    and later factors enlarge what was rounded before."""
    images = [(picture(number) // 4 + 50).astype(np.uint8) for number in range(16)]
    epochs, samples = np.zeros(16, np.int64), np.arange(16)
    blend = auto_augment._jitter(strength, SEED, epochs, samples)
    got = through_dali(images, [*blend], color_jitter=strength)
    factors = np.stack(blend)  # c b s, c b (1 - s), (1 - c) b
    brightness = factors.sum(0)
    contrast = (factors[0] + factors[1]) / brightness
    saturation = factors[0] / (factors[0] + factors[1])
    for factor in (brightness, contrast, saturation):
        assert (np.abs(factor - 1) <= strength + 1e-5).all()
        assert np.abs(factor - 1).max() > strength / 2
    for index, image in enumerate(images):
        wanted = Image.fromarray(image)
        for kind, factor in (("Color", saturation), ("Brightness", brightness), ("Contrast", contrast)):
            wanted = getattr(ImageEnhance, kind)(wanted).enhance(float(factor[index]))
        rounding = 1 + contrast[index] * (1 + 1.5 * brightness[index]) + 1
        assert np.abs(got[index] - np.asarray(wanted)).max() < rounding
    assert got.min() >= -1e-4
    assert got.max() <= 255 + 1e-4


def test_erased_pixels_get_the_mean_colour_and_no_others_change():
    images = [picture(number) for number in range(64)]
    boxes = Boxes(*draw_changes(DataConfig(reprob=0.7), SEED, np.zeros(64, np.int64), np.arange(64), SIDE))
    got, erased = through_dali(images, [*boxes], reprob=0.7), 0
    for index, image in enumerate(images):
        (top, left), (height, width) = boxes.anchors[index].astype(int), boxes.shapes[index].astype(int)
        wanted = image.astype(float)
        wanted[top : top + height, left : left + width] = np.rint(MEAN)
        np.testing.assert_allclose(got[index], wanted, rtol=0, atol=1e-4)
        if height:
            erased += 1
            assert 0.02 - 2 / SIDE <= height * width / SIDE**2 <= 1 / 3 + 2 / SIDE  # sides are whole pixels
            assert top + height <= SIDE
            assert left + width <= SIDE
    assert 0.5 < erased / 64 < 0.9


def drawn_slots(aa: str, count: int = 20_000) -> list[Slot]:
    arrays = draw_changes(DataConfig(aa=aa), SEED, np.zeros(count, np.int64), np.arange(count), SIDE)
    assert all(len(array) == count for array in arrays)
    return [Slot(*arrays[at : at + len(Slot._fields)]) for at in range(0, len(arrays), len(Slot._fields))]


def test_trivial_augment_takes_each_of_its_fourteen_operations_alike_often():
    (slot,) = drawn_slots("ta_wide")
    shares = np.bincount(slot.kind, minlength=10) / len(slot.kind)
    wanted = np.array([1, 5, 1, 2, 1, 1, 1, 0, 1, 1]) / 14
    np.testing.assert_allclose(shares, wanted, rtol=0, atol=4 * np.sqrt(0.25 / 20_000))
    shear = slot.matrix[:, 0, 1][(slot.kind == auto_augment.WARP) & (slot.matrix[:, 0, 0] == 1)]
    assert len(np.unique(np.abs(shear))) == 31, "the bins of the magnitude"
    assert shear.min() == pytest.approx(-0.99)
    assert shear.max() == pytest.approx(0.99)
    masks = set(slot.level[slot.kind == auto_augment.POSTERIZE].tolist())
    assert masks == {255, 254, 252, 248, 240, 224, 192}


@pytest.mark.parametrize(("aa", "slots", "applied"), [("rand-m9-n3-p0.8-inc1", 3, 0.8), ("rand-m9-inc1", 2, 0.5)])
def test_rand_augment_applies_what_its_text_says(aa, slots, applied):
    drawn = drawn_slots(aa)
    assert len(drawn) == slots
    for slot in drawn:
        assert (slot.kind != auto_augment.NOTHING).mean() == pytest.approx(applied, abs=4 * np.sqrt(0.25 / 20_000))
        factors = np.unique(slot.of_image[slot.kind == auto_augment.BRIGHTNESS])
        np.testing.assert_allclose(factors, [1 - 0.81, 1 + 0.81], rtol=1e-6)
    kinds = np.stack([slot.kind for slot in drawn])
    both = (kinds[0] == auto_augment.EQUALIZE) & (kinds[1] == auto_augment.EQUALIZE)
    assert both.mean() == pytest.approx((applied / 15) ** 2, abs=0.002), "operations are drawn independently"


def test_the_magnitude_spreads_normally_and_is_cut_at_its_ends():
    (slot, _) = drawn_slots("rand-m5-mstd1-p1-inc1", 200_000)
    magnitudes = 10 * np.abs(slot.of_image[slot.kind == auto_augment.BRIGHTNESS] - 1) / 0.9
    assert magnitudes.mean() == pytest.approx(5, abs=0.05)
    assert magnitudes.std() == pytest.approx(1, abs=0.05)
    (slot, _) = drawn_slots("rand-m10-mstd5-p1-inc1")
    magnitudes = 10 * np.abs(slot.of_image[slot.kind == auto_augment.BRIGHTNESS] - 1) / 0.9
    assert magnitudes.max() == pytest.approx(10)
    assert (magnitudes > 9.999).mean() == pytest.approx(0.5, abs=0.08)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    """30 drawn JPEGs of which one does not decode."""
    folder = tmp_path_factory.mktemp("augmented")
    images = [drawn_jpeg(n, 32 + n, 80 - n) for n in range(30)]
    images[11] = b"\xff\xd8" + b"not an image at all" * 20 + b"\xff\xd9"
    write_set(folder / "train", images, per_shard=7)
    write_set(folder / "val", [drawn_jpeg(n, 40, 40) for n in range(13)], per_shard=5)
    sizes: dict[str, Any] = {"image_size": 24, "global_batch": 12, "micro_batch": 2, "window_shards": 2, "threads": 1}
    return DataConfig(path=str(folder), max_bad_ratio=1, **sizes)


OPTIONS: list[dict[str, Any]] = [ALL_ON, {"aa": "rand-m9-mstd0.5-inc1"}, {"color_jitter": 0.4, "reprob": 0.25}]


@pytest.mark.parametrize("options", OPTIONS)
def test_pixels_do_not_depend_on_ranks_threads_or_resume(data, options):
    data = change(data, **options)
    whole = collect(data, 0, 6)
    assert same(whole, collect(change(data, threads=3, prefetch=1), 0, 6, ranks=3))
    assert same({at: batch for at, batch in whole.items() if at >= 36}, collect(data, 3, 6, ranks=2))
    plain = collect(change(data, aa="", color_jitter=0.0, reprob=0.0, mixup=0.0, cutmix=0.0), 0, 6)
    differ = sum(not torch.equal(batch.images, plain[at].images) for at, batch in whole.items())
    assert differ > len(whole) / 2


def test_photographs_have_the_same_pixels_on_any_number_of_ranks(tmp_path):
    write_set(tmp_path / "train", real_jpegs(24), per_shard=5)
    data = DataConfig(path=str(tmp_path), image_size=112, global_batch=8, micro_batch=2, threads=1, **ALL_ON)
    whole = collect(data, 0, 5)
    assert same(whole, collect(change(data, threads=2), 0, 5, ranks=2))
    assert same({at: whole[at] for at in range(24, 40, 2)}, collect(data, 3, 5, ranks=4))


def test_epochs_and_samples_differ():
    epochs, samples = np.repeat([0, 1], 100), np.tile(np.arange(100), 2)
    for data in (DataConfig(aa="ta_wide"), DataConfig(color_jitter=0.4), DataConfig(reprob=0.9)):
        array = draw_changes(data, SEED, epochs, samples, SIDE)[0]
        assert not np.array_equal(array[:100], array[100:])
        again = draw_changes(data, SEED, epochs[100:], samples[100:], SIDE)[0]
        assert np.array_equal(array[100:], again), "a sample's draws do not depend on the others of its batch"


def test_an_evaluation_is_not_changed(data):
    changed = evaluation_batches(change(data, **ALL_ON), rank=0, world_size=1, device=CPU)
    for ours, theirs in zip(changed, evaluation_batches(data, rank=0, world_size=1, device=CPU), strict=True):
        assert torch.equal(ours.images, theirs.images)


def test_what_is_off_is_not_in_the_graph(data):
    assert draw_changes(data, SEED, np.zeros(2, np.int64), np.arange(2), SIDE) == []
    built = Graph(data, CPU, lambda: None, batch_size=2, ahead=1)._pipeline.serialize()  # pyright: ignore
    changed = Graph(change(data, **ALL_ON), CPU, lambda: None, batch_size=2, ahead=1)._pipeline.serialize()  # pyright: ignore
    for operator in (b"WarpAffine", b"Equalize", b"Erase", b"_conditional"):
        assert operator not in built, operator
        assert operator in changed, operator


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        *(
            ({"aa": text}, f"data.aa={text!r} is not allowed; use '' .off., ta_wide, or rand-mM-inc1 with M in")
            for text in (
                "ta",
                "rand",
                "rand-m9",
                "rand-inc1",
                "rand-m9-inc0",
                "rand-m11-inc1",
                "rand-m9-n0-inc1",
                "rand-m9-n9-inc1",
                "rand-m9-n1.5-inc1",
                "rand-m9-p0-inc1",
                "rand-m9-w0-inc1",
                "rand-m9-m8-inc1",
                "original-mstd0.5",
            )
        ),
        ({"color_jitter": 1.5}, r"data.color_jitter=1.5 is not allowed; use a number in \[0, 1\], and 0 with data.aa"),
        ({"color_jitter": 0.4, "aa": "ta_wide"}, "data.color_jitter=0.4 is not allowed; use .* 0 with data.aa"),
        ({"reprob": -0.1}, r"data.reprob=-0.1 is not allowed; use a number in \[0, 1\]"),
    ],
)
def test_what_there_is_not_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        DataConfig(**fields)
