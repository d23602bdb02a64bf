"""Every supported layout gives the same samples, and a wrong one gives a clear line."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.sources.imagenet import ImageNet
from pipeline.data.manifest import Manifest
from pipeline.errors import DataError
from tests.conftest import ROOT
from tests.support.data_sets import shared_images
from tests.support.prep_runs import (
    contents,
    drawn_folder,
    indexed,
    prepare,
    read_by_dali,
    samples_of,
    shards_of,
    write_folder,
    write_tar,
    write_zip,
)


def archives() -> list[object]:
    folder = shared_images()
    names = {"--train": "img_train.tar", "--val": "img_val.tar", "--devkit": "devkit_t12.tar.gz"}
    return [part for option, name in names.items() for part in (option, folder / f"ILSVRC2012_{name}")]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """ilsvrc-mini as shards, from the official archives."""
    folder = tmp_path_factory.mktemp("imagenet") / "set"
    run = prepare("imagenet", *archives(), folder, "--workers", 3)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """ilsvrc-mini unpacked by `tarfile`: train/WNID/IMAGE, val/IMAGE, devkit/data."""
    root = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archives()[1]) as outer:  # pyright: ignore[reportArgumentType, reportCallIssue]
        for member in outer:
            stream = outer.extractfile(member)
            assert stream is not None
            with tarfile.open(fileobj=io.BytesIO(stream.read())) as inner:
                inner.extractall(root / "train" / member.name.removesuffix(".tar"), filter="data")
    for name, at in (("val", 3), ("devkit", 5)):
        with tarfile.open(archives()[at]) as archive:  # pyright: ignore[reportArgumentType, reportCallIssue]
            archive.extractall(root / name, filter="data")
    return root


def true_labels(unpacked: Path) -> tuple[list[str], dict[str, str]]:
    """Sorted WNIDs and the WNID of each validation image, read from the development kit without our code."""
    from scipy.io import loadmat

    data = unpacked / "devkit/ILSVRC2012_devkit_t12/data"
    leaves = {}
    for row in loadmat(data / "meta.mat")["synsets"].ravel():
        if int(row["num_children"].item()) == 0:
            leaves[int(row["ILSVRC2012_ID"].item())] = str(row["WNID"].item())
    numbers = [int(line) for line in (data / "ILSVRC2012_validation_ground_truth.txt").read_text().split()]
    truth = {f"ILSVRC2012_val_{place:08d}": leaves[number] for place, number in enumerate(numbers, 1)}
    return sorted(leaves.values()), truth


def test_imagenet_labels_follow_the_sorted_wnids_and_every_byte_is_the_source_s(imagenet, unpacked):
    wnids, truth = true_labels(unpacked)
    train, val = samples_of(imagenet / "train"), samples_of(imagenet / "val")
    assert (len(train), len(val), len(wnids)) == (400, 100, 500)
    sources = {(path.parent.name, path.read_bytes()) for path in (unpacked / "train").rglob("*.JPEG")}
    assert {(wnids[sample.label], sample.image) for sample in train} == sources
    assert [sample.stem for sample in val] == sorted(truth)  # val stays in order
    for sample in val:
        assert sample.image == (unpacked / "val" / f"{sample.stem}.JPEG").read_bytes()
        assert wnids[sample.label] == truth[sample.stem]
    # The kit's own numbers would be wrong: the test would not see a missing map if they were the same.
    assert len({sample.label for sample in val}) == 100
    classes = json.loads((imagenet / "val/manifest.json").read_text())["classes"]
    assert [name.split()[0] for name in classes] == wnids


def test_training_samples_are_shuffled_by_the_seed(imagenet, tmp_path):
    labels = [sample.label for sample in samples_of(imagenet / "train")]
    assert labels != sorted(labels)
    assert prepare("imagenet", *archives(), tmp_path / "set", "--seed", 1).returncode == 0
    other = [sample.label for sample in samples_of(tmp_path / "set/train")]
    assert other != labels
    assert sorted(other) == sorted(labels)
    assert contents(tmp_path / "set/val") == contents(imagenet / "val")


def test_one_worker_and_unpacked_folders_give_the_same_bytes(imagenet, unpacked, tmp_path):
    one = prepare("imagenet", *archives(), tmp_path / "one", "--workers", 1)
    assert one.returncode == 0
    assert contents(tmp_path / "one") == contents(imagenet)
    folders = ["--train", unpacked / "train", "--val", unpacked / "val", "--devkit", unpacked / "devkit"]
    loose = prepare("imagenet", *folders, tmp_path / "loose")
    assert loose.returncode == 0, loose.stderr
    assert shards_of(tmp_path / "loose") == shards_of(imagenet)


def test_imagenet_classes_are_shown_by_their_words(imagenet, unpacked):
    manifest = Manifest.load(imagenet / "train")
    words = [name.split(" ", 1)[1] for name in manifest.classes]
    assert [shown.split(" (n")[0] for shown in manifest.shown] == words
    assert len(set(manifest.shown)) == len(words)


def test_other_files_beside_imagenet_s_images_are_passed_over_and_said(unpacked, tmp_path):
    for name in ("train", "val"):
        shutil.copytree(unpacked / name, tmp_path / name)
    (wnid, *_) = sorted((tmp_path / "train").iterdir())
    for path in (wnid, tmp_path / "train", tmp_path / "val"):
        (path / "Thumbs.db").write_bytes(b"x")
    source = ImageNet(*(str(path) for path in (tmp_path / "train", tmp_path / "val", unpacked / "devkit")))
    splits, said = indexed(source, tmp_path / "work")
    assert [len(split) for split in splits.values()] == [400, 100]
    assert not any(split.refusals for split in splits.values())
    found = [line for line in said if "by their names" in line]
    assert found == [f"{num} files that are no images by their names are passed over: .db {num}" for num in (2, 1)]
    (tmp_path / "train/n99999999.tar").write_bytes(b"x")
    with pytest.raises(DataError, match=r"train holds n99999999.tar; give the tar that it was in, or unpack each"):
        indexed(source, tmp_path / "work")


@pytest.mark.parametrize("split", ["train", "val"])
def test_webdataset_and_dali_read_the_same_samples(imagenet, split):
    from webdataset.compat import WebDataset

    expected = samples_of(imagenet / split)
    urls = [str(path) for path in sorted((imagenet / split).glob("*.tar"))]
    read = list(WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [(s["__key__"], int(s["cls"]), s["jpg"]) for s in read] == [(s.key, s.label, s.image) for s in expected]
    by_dali = read_by_dali(imagenet / split)
    assert by_dali == [(s.label, s.image, (s.height, s.width)) for s in expected]


FILES = drawn_folder()
SPLIT_FILES = {
    **{f"train/{name}": data for name, data in FILES.items()},
    **{f"test/{name}": data for name, data in list(FILES.items())[:6]},
}


@pytest.mark.parametrize("files", [FILES, SPLIT_FILES], ids=["one split", "train and test"])
def test_a_folder_a_tar_a_compressed_tar_and_a_zip_give_the_same_shards(files, tmp_path):
    sources = [
        write_folder(tmp_path / "loose", files),
        write_tar(tmp_path / "images.tar", files),
        write_tar(tmp_path / "images.tar.gz", files, "w:gz"),
        write_tar(tmp_path / "images.tar.xz", files, "w:xz"),
        write_zip(tmp_path / "images.zip", files),
    ]
    made = []
    for number, source in enumerate(sources):
        run = prepare("imagefolder", source, tmp_path / f"set{number}", "--workers", 1)
        assert run.returncode == 0, run.stderr
        made.append(shards_of(tmp_path / f"set{number}"))
    assert all(other == made[0] for other in made)
    expected = {
        ("train" if name.startswith("train/") or files is FILES else "val", data) for name, data in files.items()
    }
    found = set()
    for folder in (path.parent for path in (tmp_path / "set0").glob("*/manifest.json")):
        for sample in samples_of(folder):
            found.add((folder.name, sample.image))
            name = next(name for name, data in files.items() if data == sample.image)
            assert ("ant", "bee", "cat")[sample.label] == name.split("/")[-2]
    assert found == expected


def test_a_wrapping_folder_and_hidden_files_are_no_classes(tmp_path):
    files = {f"pictures-1.0/{name}": data for name, data in FILES.items()}
    files |= {"__MACOSX/pictures-1.0/ant/._000.jpg": b"fork", "pictures-1.0/ant/.DS_Store": b"x"}
    run = prepare("imagefolder", write_zip(tmp_path / "images.zip", files), tmp_path / "set")
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "set/train/manifest.json").read_text())["classes"] == ["ant", "bee", "cat"]
    assert "hidden files" in run.stdout
    assert len(samples_of(tmp_path / "set/train")) == len(FILES)


def test_lists_and_notes_beside_the_images_do_not_hide_the_wrapping_folder(tmp_path):
    files = {f"pictures/{name}": data for name, data in SPLIT_FILES.items()}
    files |= {"README.md": b"read me", "pictures/labels.csv": b"0,1", "cover.jpg": FILES["ant/000.jpg"]}
    run = prepare("imagefolder", write_tar(tmp_path / "images.tar", files), tmp_path / "set")
    assert run.returncode == 0, run.stderr
    assert "2 files that are no images by their names are passed over: .md 1, .csv 1" in run.stdout
    assert "1 files outside of class folders are no samples: cover.jpg" in run.stdout
    for split, num in (("train", len(FILES)), ("val", 6)):
        assert json.loads((tmp_path / "set" / split / "manifest.json").read_text())["classes"] == ["ant", "bee", "cat"]
        assert len(samples_of(tmp_path / "set" / split)) == num


def test_val_ratio_holds_out_a_share_of_every_class(tmp_path):
    source = write_folder(tmp_path / "images", FILES)
    assert prepare("imagefolder", source, tmp_path / "set", "--val-ratio", 0.25).returncode == 0
    train, val = samples_of(tmp_path / "set/train"), samples_of(tmp_path / "set/val")
    assert np.bincount([sample.label for sample in val]).tolist() == [1, 1, 1]
    assert {sample.image for sample in train} | {sample.image for sample in val} == set(FILES.values())


def write_parquet(path: Path, names: list[str], classes: list[str], labels: list[int] | None = None) -> Path:
    """A file as Hugging Face's ImageNet-1k has them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": FILES[name], "path": name.rsplit("/", 1)[1]} for name in names]
    of = labels or [classes.index(name.split("/")[0]) for name in names]
    table = pa.table({"image": images, "label": pa.array(of, pa.int64())})
    feature = {"info": {"features": {"label": {"names": classes, "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(feature)}), path, row_group_size=5)
    return path


def test_parquet_files_give_the_same_samples(tmp_path):
    pytest.importorskip("pyarrow")
    names, classes = list(FILES), ["ant", "bee", "cat"]
    for first, name in ((0, "train-00000-of-00002"), (4, "train-00001-of-00002")):
        write_parquet(tmp_path / f"{name}.parquet", names[first : first + 4], classes)
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", names[8:], classes)
    run = prepare("parquet", tmp_path, tmp_path / "set", "--workers", 1)
    assert run.returncode == 0, run.stderr
    for split, part in (("train", names[:8]), ("val", names[8:])):
        expected = {(classes.index(name.split("/")[0]), FILES[name]) for name in part}
        assert {(sample.label, sample.image) for sample in samples_of(tmp_path / "set" / split)} == expected
        assert json.loads((tmp_path / "set" / split / "manifest.json").read_text())["classes"] == classes
    assert prepare("parquet", tmp_path / "train-00000-of-00002.parquet", tmp_path / "other").returncode == 0
    write_parquet(tmp_path / "odd.parquet", names[:2], classes, labels=[0, 7])
    assert_line(prepare("parquet", tmp_path / "odd.parquet", tmp_path / "odd"), 65, "label 7", "only 3 classes")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    assert_line(prepare("parquet", tmp_path / "broken.parquet", tmp_path / "b"), 65, "is no parquet file or is damaged")


def test_without_pyarrow_parquet_says_how_to_install_it_and_makes_nothing(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    without = "import runpy, sys; sys.modules['pyarrow'] = None; runpy.run_module('data_prep', run_name='__main__')"
    command = [sys.executable, "-c", without, "parquet", str(tmp_path / "train.parquet"), str(tmp_path / "set")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert_line(run, 64, "needs pyarrow, which is not installed", "pip install 'chispike[parquet]'")
    assert not (tmp_path / "set").exists()


def assert_line(run, code: int, *parts: str) -> None:
    """The run ended with `code` and one line that says all `parts`."""
    assert run.returncode == code, run.stderr
    assert run.stderr.count("\n") == 1, run.stderr
    assert "Traceback" not in run.stderr
    for part in parts:
        assert part in run.stderr


def test_imagenet_without_its_devkit_or_with_another_val_is_one_line(unpacked, tmp_path):
    train, val, devkit = archives()[1], archives()[3], archives()[5]
    out = tmp_path / "set"
    assert_line(prepare("imagenet", "--train", train, "--val", val, out), 64, "--val needs --devkit=")
    gone = prepare("imagenet", "--train", train, "--val", val, "--devkit", tmp_path / "none.tar.gz", out)
    assert_line(gone, 64, "--devkit:", "does not exist")
    no_kit = prepare("imagenet", "--train", train, "--val", val, "--devkit", val, out)
    assert_line(no_kit, 65, "lacks data/meta.mat", "give ILSVRC2012_devkit_t12.tar.gz")
    fewer = tmp_path / "val"
    fewer.mkdir()
    for path in sorted((unpacked / "val").iterdir())[:99]:
        (fewer / path.name).symlink_to(path)
    short = prepare("imagenet", "--train", train, "--val", fewer, "--devkit", devkit, out)
    assert_line(short, 65, "holds 99 validation images", "100 lines")
    (fewer / "ILSVRC2012_val_00050000.JPEG").write_bytes(b"x")
    other = prepare("imagenet", "--train", train, "--val", fewer, "--devkit", devkit, out)
    assert_line(other, 65, "none of the 100 images of the ground truth")
    swapped = prepare("imagenet", "--train", val, out)
    assert_line(swapped, 65, "ILSVRC2012_val_00000001.JPEG is no synset such as n01440764")
    cut = tmp_path / "cut.tar"
    with open(train, "rb") as source:  # pyright: ignore[reportArgumentType, reportCallIssue]
        cut.write_bytes(source.read(3_000_000))
    assert_line(prepare("imagenet", "--train", cut, out), 65, "is cut off")


def test_a_wrong_looking_image_folder_is_one_line(tmp_path):
    out = tmp_path / "set"
    assert_line(prepare("imagefolder", tmp_path / "none", out), 64, "does not exist; check the path")
    source = write_folder(tmp_path / "images", FILES)
    inside = source / "shards"
    assert_line(prepare("imagefolder", source, inside), 64, f"DIR={inside} lies in {source}", "a DIR outside of it")
    assert_line(prepare("imagenet", "--train", source, source), 64, f"DIR={source} lies in {source}")
    assert not inside.exists()
    assert_line(prepare("imagefolder", "", out), 64, "imagefolder: '' does not exist; check the path")
    assert_line(prepare("imagefolder", source, ""), 64, "DIR is empty; give a folder or a URL")
    (source / "dog").mkdir()
    assert_line(prepare("imagefolder", source, out), 65, "the class folder dog of train is empty; fill it or remove it")
    flat = write_folder(tmp_path / "flat", {"a.jpg": FILES["ant/000.jpg"]})
    assert_line(prepare("imagefolder", flat, out), 65, "holds no image in a class folder; expected CLASS/IMAGE")
    text = write_folder(tmp_path / "text", {"notes.txt": b"not an archive at all" * 100}) / "notes.txt"
    assert_line(prepare("imagefolder", text, out), 65, "is not a tar archive")
    odd = write_folder(tmp_path / "odd", {f"train/{n}": d for n, d in FILES.items()})
    write_folder(odd, {"val/eel/1.jpg": FILES["ant/000.jpg"]})
    assert_line(prepare("imagefolder", odd, out), 65, "val has the class eel, which train has not")
    packed = write_tar(tmp_path / "images.tar.gz", FILES, "w:gz")
    packed.write_bytes(packed.read_bytes()[:-400])
    assert_line(prepare("imagefolder", packed, out), 65, "is cut off or damaged", "download it again")
    zipped = write_zip(tmp_path / "images.zip", FILES)
    zipped.write_bytes(zipped.read_bytes()[:-60])
    assert_line(prepare("imagefolder", zipped, out), 65, "is not a zip archive, or is cut off")


def test_a_folder_that_holds_another_data_set_is_left_as_it_is(tmp_path):
    source = write_folder(tmp_path / "images", FILES)
    out = tmp_path / "set"
    assert prepare("imagefolder", source, out).returncode == 0
    before = contents(out)
    other = write_folder(tmp_path / "others", {f"x/{i}.jpg": data for i, data in enumerate(FILES.values())})
    assert_line(prepare("imagefolder", other, out), 64, "was begun with another data set", "give another DIR")
    assert_line(prepare("imagefolder", source, out, "--resize", 16), 64, "was begun with other options")
    shutil.rmtree(other)
    assert contents(out) == before
