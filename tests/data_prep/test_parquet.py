"""data_prep/sources/{parquet,parquet_columns}.py: splits, labels and columns of other people's parquet files."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.sources.parquet import Parquet
from pipeline.errors import ConfigError, DataError
from tests.support.prep_runs import counted, indexed

pa = pytest.importorskip("pyarrow")
LABELS = [0, 1, 1]
LABELLED = {"0": 1, "1": 2}


def write(path: Path, *, features: object = None, **columns: Any) -> Path:
    """A parquet file of these columns, with the metadata that `datasets` writes where there are `features`."""
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path)
    return path


def images(num: int) -> list[dict]:
    return [{"bytes": b"%d" % number, "path": f"{number}.jpg"} for number in range(num)]


def labelled(path: Path, labels: Any = LABELS, features: object = None) -> Path:
    return write(path, image=images(len(labels)), label=labels, features=features)


def look(tmp_path: Path, *paths: Path, **columns: str | None):
    return indexed(Parquet(list(map(str, paths)), **columns), tmp_path / "work")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train_00000", "val_00000"], [1, 1]),
        (["mnist-train", "mnist-test"], [1, 1]),
        (["Train-0", "Validation-0"], [1, 1]),
        (["training", "dev", "evaluation"], [1, 1, 1]),
        (["data/train-00000-of-00002-1359597a978b", "data/valid-00000-of-00001-70d52db3c749"], [1, 1]),
        (["default/train/0000", "default/validation/0000"], [1, 1]),
        (["default/train/0000", "default/train/0001", "default/validation/0002"], [2, 1]),
        (["cifar/partial-train/0000", "cifar/partial-train/0001", "cifar/test/0000"], [2, 1]),
        (["my-test-set/Train/0", "my-test-set/validation/0"], [1, 1]),
        (["a", "b"], [2]),
    ],
)
def test_the_split_is_told_by_any_word_of_folders_and_names(tmp_path, names, expected):
    for number, name in enumerate(names):
        labelled(tmp_path / f"in/{name}.parquet", [number])
    splits, _ = look(tmp_path, tmp_path / "in")
    assert list(splits) == ["train", "val", "test"][: len(expected)]
    bounds = [sum(expected[:i]) for i in range(len(expected) + 1)]  # the files are given split by split
    for split, first, end in zip(splits.values(), bounds, bounds[1:], strict=False):
        assert sorted(split.labels) == list(range(first, end))


@pytest.mark.parametrize("as_files", [False, True])
@pytest.mark.parametrize(("one", "other"), [("default/train", "default/validation"), ("mnist-train", "mnist-test")])
def test_the_folders_that_are_given_count(tmp_path, one, other, as_files):
    files = [labelled(tmp_path / f"in/{folder}/0000.parquet") for folder in (one, other)]
    splits, _ = look(tmp_path, *(file if as_files else file.parent for file in files))
    assert counted(splits) == dict.fromkeys(("train", "val"), LABELLED)
    (alone,) = look(tmp_path, labelled(tmp_path / "test-of-mine/numbers.parquet"))[0]
    assert alone == "train", "the name of a folder around may be any"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-0", "extra"], "extra.parquet names no split, while others do; leave it out"),
        (["train-test"], "names the splits test and train; rename it"),
        (["train/val-0"], "names the splits train and val; rename it"),
        (["160px/train-0", "320px/train-0"], "train has files in several folders, "),
        (
            ["160px/train-0-of-1", "320px/train-0-of-2"],
            "if these are configurations of one data set, give the folder of",
        ),
        (["data/train-0-of-2-aa", "data/train-1-of-2-bb", "data/train-0-of-3-cc"], "is one of 2 files of train, "),
    ],
)
def test_a_split_that_cannot_be_told_is_asked_for(tmp_path, names, message):
    for name in names:
        labelled(tmp_path / f"in/{name}.parquet")
    with pytest.raises(ConfigError) as error:
        look(tmp_path, tmp_path / "in")
    assert message in str(error.value)


def test_folders_given_by_name_are_one_set_and_parts_that_lack_are_told(tmp_path):
    folders = [labelled(tmp_path / f"in/{name}.parquet").parent for name in ("a/train-0-of-4", "b/train-1-of-4")]
    splits, said = look(tmp_path, *folders)
    assert counted(splits) == {"train": {"0": 2, "1": 4}}
    assert said[1] == "warning: train has 4 files by their names, and 2 are given: the others are not packed"


def test_links_are_followed(tmp_path):
    labelled(tmp_path / "elsewhere/0000.parquet")
    labelled(tmp_path / "in/train/0000.parquet")
    labelled(tmp_path / "in/.cache/0000.parquet")
    (tmp_path / "in/val").symlink_to(tmp_path / "elsewhere")
    assert counted(look(tmp_path, tmp_path / "in")[0]) == dict.fromkeys(("train", "val"), LABELLED)
    (tmp_path / "in/val").unlink()
    (tmp_path / "in/val").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="in/val': a link to nothing; mend or remove it"):
        look(tmp_path, tmp_path / "in")


@pytest.mark.parametrize("labels", [[-1, -1], [None, None], None])
def test_an_unlabelled_test_split_is_passed_over_before_anything_is_copied(tmp_path, labels):
    labelled(tmp_path / "in/train-0.parquet")
    columns = {} if labels is None else {"label": pa.array(labels, pa.int64())}
    write(tmp_path / "in/test-0.parquet", image=images(2), **columns)
    splits, said = look(tmp_path, tmp_path / "in", label_column="label")
    assert counted(splits) == {"train": LABELLED}
    assert said[0] == "test is passed over: its 2 images have no labels (test-0.parquet)"


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("train-1", [0, None], "1 of 2 rows have no label (label is empty or -1); leave unlabelled files out"),
        ("test-0", [0, -1], "1 of 2 rows have no label"),
        ("val-0", [-1, -1], "2 of 2 rows have no label"),
        ("train-1", [0, -5], "has the label -5 in label; labels count from 0"),
        ("train-1", [0, 10**12], "the label 1000000000000 of label is no number of a class"),
        ("train-1", [0.0, 1.0], "label is double; integers, booleans or text are needed, one for an image"),
        ("train-1", [[0], [1]], "label is list<"),
        ("train-1", ["a", "b"], "has text labels in label"),
    ],
)
def test_labels_that_cannot_be_used_are_one_line_before_anything_is_copied(tmp_path, name, labels, message):
    labelled(tmp_path / "in/train-0.parquet")
    labelled(tmp_path / f"in/{name}.parquet", labels)
    with pytest.raises(DataError) as error:
        look(tmp_path, tmp_path / "in")
    assert message in str(error.value)
    assert not list((tmp_path / "work").iterdir())


NAMES = {"label": {"_type": "ClassLabel", "names": ["bee", "ant"]}}


@pytest.mark.parametrize(
    ("labels", "features", "expected"),
    [
        ([True, False, True], None, {"False": 1, "True": 2}),
        ([True, False, True], NAMES, {"bee": 1, "ant": 2}),
        (["b", "a", "b"], None, {"a": 1, "b": 2}),
        (["ant", "bee", "ant"], NAMES, {"bee": 1, "ant": 2}),
        (pa.array(["b", "a", "b"]).dictionary_encode(), None, {"a": 1, "b": 2}),
        (pa.array([0, 1, 1], pa.uint8()), NAMES, {"bee": 1, "ant": 2}),
        (LABELS, {"label": {"names": "ab"}}, LABELLED),
        (LABELS, ["no features"], LABELLED),
    ],
)
def test_labels_of_any_usual_type_become_classes(tmp_path, labels, features, expected):
    splits, _ = look(tmp_path, labelled(tmp_path / "train.parquet", labels, features))
    assert list(counted(splits)["train"].items()) == list(expected.items())


def test_a_class_of_val_that_train_has_not_is_one_line(tmp_path):
    labelled(tmp_path / "in/train-0.parquet", ["a", "b"])
    labelled(tmp_path / "in/val-0.parquet", ["a", "c"])
    with pytest.raises(DataError, match=r"val-0.parquet has the class c in label, which train has not"):
        look(tmp_path, tmp_path / "in")


def test_rows_of_paths_alone_are_named_as_such(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"bytes": None, "path": "1.jpg"}, {"bytes": None, "path": "2.jpg"}], kind)
    with pytest.raises(
        DataError, match=r"train holds no image: 2 are refused, first .*1.jpg \(no bytes in its row, only"
    ):
        look(tmp_path, write(tmp_path / "train.parquet", image=rows, label=[0, 1]))


def test_columns_are_found_by_their_type_or_named(tmp_path):
    kinds = {
        "pixels": {"_type": "Image"},
        "fine": {"_type": "ClassLabel", "names": ["ant", "bee"]},
        "coarse": {"_type": "ClassLabel", "names": ["insect"]},
    }
    one = write(tmp_path / "a.parquet", pixels=images(2), fine=[0, 1], features={"fine": kinds["fine"]})
    assert counted(look(tmp_path, one)[0]) == {"train": {"ant": 1, "bee": 1}}
    both = write(tmp_path / "b.parquet", pixels=images(2), fine=[0, 1], coarse=[0, 0], features=kinds)
    with pytest.raises(DataError, match="has the labels fine and coarse; choose one by --label-column=fine"):
        look(tmp_path, both)
    assert counted(look(tmp_path, both, label_column="fine")[0]) == {"train": {"ant": 1, "bee": 1}}
    assert counted(look(tmp_path, both, label_column="coarse", image_column="pixels")[0]) == {"train": {"insect": 2}}
    for column in ("label_column", "image_column"):
        with pytest.raises(ConfigError, match=r"=none: .* has the columns pixels, fine, coarse; name one of them"):
            look(tmp_path, both, **{column: "none"})
    with pytest.raises(DataError, match="fine is int64; a struct of bytes and path, or the bytes alone, are needed"):
        look(tmp_path, both, label_column="fine", image_column="fine")
    captions = write(tmp_path / "c.parquet", image=[b"1", b"2"], caption=["a", "b"])
    with pytest.raises(DataError, match="has the columns image, caption, and none is known to hold labels"):
        look(tmp_path, captions)
    assert counted(look(tmp_path, captions, label_column="caption")[0]) == {"train": {"a": 1, "b": 1}}
    with pytest.raises(DataError, match="has no image column among x, label"):
        look(tmp_path, write(tmp_path / "d.parquet", x=[1], label=[0]))


def test_another_column_is_another_request(tmp_path):
    path = str(labelled(tmp_path / "train.parquet"))
    assert Parquet([path]).fingerprint() != Parquet([path], None, "label").fingerprint()
