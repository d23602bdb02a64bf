"""`python -m data_prep events` on DVS128 Gesture as it is distributed."""

import json

import pytest

from data_prep.sources.event_raw import Settings
from data_prep.sources.events import Recordings
from pipeline.data.manifest import Manifest, Sensor
from pipeline.errors import DataError
from tests.support.event_files import (
    same,
    write_classes,
    write_gesture,
)
from tests.support.prep_runs import indexed, packed, prepare, samples_of, shards_of


def test_dvs_gesture_is_cut_by_its_labels(tmp_path):
    expected = write_gesture(tmp_path / "DvsGesture")
    done = prepare("events", tmp_path / "DvsGesture", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "left and right hands are classes of their own: train with --data.flip false" in done.stdout
    found, labels = {}, {}
    for split, num in (("train", 8), ("val", 4)):
        manifest = Manifest.load(tmp_path / "out" / split)
        assert manifest.classes[:2] == ("hand_clapping", "right_hand_wave")
        assert (len(manifest.classes), manifest.sensor) == (11, Sensor(height=128, width=128))
        assert manifest.handed
        samples = samples_of(tmp_path / "out" / split)
        assert len(samples) == num
        labels |= {sample.stem: sample.label + 1 for sample in samples}
        found |= packed(tmp_path / "out" / split)
    assert labels == {name: label for name, (_, label) in expected.items()}
    assert all(same(found[name], events) for name, (events, _) in expected.items())


def test_dvs_gesture_beside_another_source_is_refused(tmp_path):
    write_gesture(tmp_path / "DvsGesture")
    write_classes(tmp_path / "other", "bin", 10)
    done = prepare("events", tmp_path / "other", tmp_path / "DvsGesture", tmp_path / "out")
    assert done.returncode == 64
    said = "error: events: DvsGesture holds trials_to_test.txt, a list of DVS128 Gesture; give that alone\n"
    assert done.stderr == said


def test_dvs_gesture_in_a_tar_gives_the_same_shards(tmp_path):
    import tarfile

    write_gesture(tmp_path / "DvsGesture")
    for mode, name in (("w", "g.tar"), ("w:gz", "g.tar.gz")):
        with tarfile.open(tmp_path / name, mode) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
            tar.add(tmp_path / "DvsGesture", "DvsGesture")
    for source, out in (("g.tar", "one"), ("g.tar.gz", "two")):
        done = prepare("events", tmp_path / source, tmp_path / out)
        assert done.returncode == 0, done.stderr
    assert shards_of(tmp_path / "one") == shards_of(tmp_path / "two")
    folder = prepare("events", tmp_path / "DvsGesture", tmp_path / "three")
    assert folder.returncode == 0
    for split in ("train", "val"):
        for one, other in zip(
            samples_of(tmp_path / "one" / split), samples_of(tmp_path / "three" / split), strict=True
        ):
            assert (one.stem, one.image, one.label) == (other.stem, other.image, other.label)


def test_a_recording_of_dvs_gesture_is_of_one_split(tmp_path):
    root = tmp_path / "DvsGesture"
    write_gesture(root)
    with open(root / "trials_to_test.txt", "a") as file:
        file.write("user01_lab.aedat\n")
    with open(root / "trials_to_train.txt", "a") as file:
        file.write("user02_lab.aedat\n")
    splits, said = indexed(Recordings([str(root)], Settings(), 0.3, 0), tmp_path / "work")
    for split, base, name in (("train", "train", "user02_lab.aedat"), ("val", "train", "user01_lab.aedat")):
        reason = f"is named in trials_to_{base}.txt already; a recording is of one split, once"
        assert [(refusal.name, refusal.reason) for refusal in splits[split].refusals] == [(name, reason)]
    assert (len(splits["train"]), len(splits["val"])) == (8, 4)
    assert "--val-ratio is not used: DVS128 Gesture has the splits train, val" in said


@pytest.mark.parametrize("number", ["²", "9" * 5000])
def test_a_mapping_of_dvs_gesture_with_odd_numbers_is_refused(tmp_path, number):
    write_gesture(tmp_path / "in", users=2, gestures=1)
    (tmp_path / "in/gesture_mapping.csv").write_text(f"action,label\nwave,{number}\n")
    with pytest.raises(DataError, match=r"gesture_mapping\.csv does not give each of 1, 2, 3, … one name; mend it"):
        indexed(Recordings([str(tmp_path / "in")], Settings(), 0.0, 0), tmp_path / "work")


def test_what_is_wrong_in_dvs_gesture_is_refused_by_name(tmp_path):
    root = tmp_path / "DvsGesture"
    write_gesture(root, users=4)
    labels = root / "user01_lab_labels.csv"
    labels.write_text(labels.read_text() + f"12,1,2\nwave,1,2\n3,5,5\n3,9,99\n²,1,2\n3,1,{'9' * 5000}\n{2**64},1,2\n")
    cut = root / "user02_lab.aedat"
    cut.write_bytes(cut.read_bytes()[:-100])
    (root / "user03_lab_labels.csv").unlink()
    with open(root / "trials_to_train.txt", "a") as file:
        file.write("user09_lab.aedat\n")
    (root / "user05_lab.aedat").write_bytes(b"")
    done = prepare("events", root, tmp_path / "out", "--allow-bad", 20)
    assert done.returncode == 0, done.stderr
    listed = [json.loads(line) for line in (tmp_path / "out/train/quarantine.jsonl").read_text().splitlines()]
    assert {(row["name"], row["reason"]) for row in listed} == {
        ("user01_lab_labels.csv:5", "the class 12 is none of 1 to 11"),
        ("user01_lab_labels.csv:6", "'wave,1,2' is not class,startTime_usec,endTime_usec"),
        ("user01_lab_labels.csv:9", "'²,1,2' is not class,startTime_usec,endTime_usec"),
        ("user01_lab_labels.csv:10", f"'3,1,{'9' * 76}' is not class,startTime_usec,endTime_usec"),
        ("user01_lab_labels.csv:11", f"'{2**64},1,2' is not class,startTime_usec,endTime_usec"),
        ("user01_lab_labels.csv:7", "ends at 5 µs, which is not after its start 5"),
        ("user01_lab_08.aedat", "no event of user01_lab.aedat lies between 9 and 99 µs"),
        ("user03_lab.aedat", "its list user03_lab_labels.csv is missing"),
        ("user09_lab.aedat", "is named in trials_to_train.txt, but is not there"),
    }
    assert "1 recordings that are in neither list are passed over: user05_lab.aedat" in done.stdout
    assert len(samples_of(tmp_path / "out/train")) == 8  # the cut is behind the last gesture of user02
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    done = prepare("events", root, tmp_path / "half", "--allow-bad", 20)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "half/train/quarantine.jsonl").read_text()
    assert "truncated: user02_lab.aedat is cut before the end of this gesture" in text
