"""The simulated recordings of the digits: one for each digit, the same everywhere, made by the threshold's own rule."""

import hashlib

import numpy as np
import pytest

from data_prep.sources.digits import load
from data_prep.sources.digits_dvs import _LOG, DURATION_US, SIDE, _path, _pictures, _thresholds, record
from pipeline.data.decode.events import decode, encode
from pipeline.data.manifest import EVENTS, Manifest, Sensor
from tests.support.prep_runs import prepare, samples_of, shards_of


@pytest.fixture(scope="module")
def recordings():
    pixels, labels = load()
    return [record(pixels[number], number) for number in range(100)], labels[:100]


def test_packed_recordings_are_those_of_the_simulation_in_the_splits_of_the_digits(tmp_path, digits):
    done = prepare("digits_dvs", tmp_path / "dvs", "--limit", 40)
    assert done.returncode == 0, done.stderr
    pixels, labels = load()
    whole = {split: {sample.stem for sample in samples_of(digits / split)} for split in ("train", "val")}
    for split in ("train", "val"):
        manifest = Manifest.load(tmp_path / "dvs" / split)
        assert (manifest.kind, manifest.sensor) == (EVENTS, Sensor(height=SIDE, width=SIDE))
        samples = samples_of(tmp_path / "dvs" / split)
        assert len(samples) == 40
        for sample in samples:
            number = int(sample.stem)
            assert sample.stem in whole[split]
            assert sample.label == labels[number]
            assert sample.image == encode(record(pixels[number], number))
            assert (sample.height, sample.width) == (SIDE, SIDE)


def test_bytes_do_not_depend_on_workers_and_a_second_run_writes_nothing(tmp_path):
    for name, workers in (("one", 1), ("three", 3)):
        assert prepare("digits_dvs", tmp_path / name, "--limit", 12, "--workers", workers).returncode == 0
    assert shards_of(tmp_path / "one") == shards_of(tmp_path / "three")
    again = prepare("digits_dvs", tmp_path / "one", "--limit", 12)
    assert "complete already" in again.stdout


def test_every_machine_makes_these_bytes(recordings):
    digest = hashlib.sha256(b"".join(map(encode, recordings[0]))).hexdigest()
    assert digest == "d954248f4dbb03a829c30aac3ae88af1e18e5d121817f59d80f4b692fe3add03"


def test_recordings_are_of_a_size_that_trains_in_minutes(recordings):
    nums = [len(events.t) for events in recordings[0]]
    assert min(nums) > 400
    assert max(nums) < 3_000
    assert all(0.9 * DURATION_US < events.t[-1] < DURATION_US for events in recordings[0])
    assert all(len(events.t) > 10 for events in map(_last_move, recordings[0])), "a move without events"


def _last_move(events):
    last = events.t >= 3 / 4 * DURATION_US
    return events._replace(t=events.t[last], x=events.x[last], y=events.y[last], p=events.p[last])


def test_between_two_events_of_a_pixel_its_light_changed_by_its_threshold():
    pixels, _ = load()
    logs = _LOG[_pictures(pixels[5], _path(5))].reshape(-1, SIDE * SIDE)
    events, thresholds = record(pixels[5], 5), _thresholds()
    place = events.y.astype(int) * SIDE + events.x
    signs = np.where(events.p == 1, 1, -1)
    # Noise apart, what a pixel sent is its change over the recording, to less than one threshold.
    sent = np.bincount(place, weights=signs, minlength=SIDE * SIDE) * thresholds
    off = np.abs(sent - (logs[-1] - logs[0])) >= thresholds
    assert off.mean() < 0.08, "noise is one event of a pixel in twenty"
    assert np.abs(signs[place == np.argmax(np.ptp(logs, axis=0))].sum()) < len(logs)


def test_the_class_is_not_told_by_the_number_of_events_or_by_one_picture_of_them_all(recordings):
    """A linear reading of the sum over time, which sees no order, does far worse than one of the digits."""
    from sklearn.linear_model import RidgeClassifier

    pixels, labels = load()
    events = [*recordings[0], *(record(pixels[number], number) for number in range(100, 500))]
    nums = np.array([[len(one.t)] for one in events], dtype=float)
    sums = np.array([np.bincount(one.y.astype(int) * SIDE + one.x, minlength=SIDE * SIDE) for one in events])
    reads = RidgeClassifier(alpha=100)
    plain, picture, number = (
        reads.fit(seen[:400], labels[:400]).score(seen[400:], labels[400:500])
        for seen in (pixels[:500].reshape(500, -1), sums, nums)
    )
    assert number < 0.3
    assert picture < plain - 0.2


def test_what_is_packed_can_be_decoded(recordings):
    for events in recordings[0]:
        back = decode(encode(events))
        assert all(np.array_equal(a, b) for a, b in zip(back[:4], events[:4], strict=True))


def test_info_and_verify_know_recordings(tmp_path):
    from PIL import Image

    assert prepare("digits_dvs", tmp_path / "dvs", "--limit", 12).returncode == 0
    told = prepare("info", tmp_path / "dvs")
    assert told.returncode == 0, told.stderr
    sheet = np.asarray(Image.open(tmp_path / "dvs" / "contact-sheet.png").convert("RGB")).astype(int)
    red, blue = (sheet[..., a] - sheet[..., b] > 60 for a, b in ((0, 2), (2, 0)))
    assert min(red.sum(), blue.sum()) > 2_000
    whole = prepare("verify", tmp_path / "dvs", "--decode")
    assert (whole.returncode, "24 samples in 2 shards" in whole.stdout) == (0, True), whole.stdout


def test_verify_finds_a_recording_that_was_changed_and_a_manifest_of_another_sensor(tmp_path):
    assert prepare("digits_dvs", tmp_path / "dvs", "--limit", 12).returncode == 0
    manifest = tmp_path / "dvs/val/manifest.json"
    manifest.write_text(manifest.read_text().replace('"width": 24', '"width": 25'))
    found = prepare("verify", tmp_path / "dvs")
    assert found.returncode == 65
    assert "the manifest says all are of Sensor(height=24, width=25)" in found.stdout
    tar = tmp_path / "dvs/train/train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[1536 + 100] ^= 1
    tar.write_bytes(data)
    found = prepare("verify", tmp_path / "dvs")
    assert ".events: damaged events: their bytes do not fit their checksum" in found.stdout
