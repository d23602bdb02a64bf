"""data_prep/sources/{imagefolder,layout,lists,splits}.py: other people's collections become the splits and classes that
their folders mean, or a line says what is not understood."""

import json
import os
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import pytest

from data_prep.info import info
from data_prep.sources.imagefolder import ImageFolder
from data_prep.stores import make_store
from launch.recipes import tiny_imagenet
from pipeline.data.manifest import Manifest
from pipeline.errors import DataError
from tests.support.data_sets import drawn_jpeg
from tests.support.prep_runs import counted, indexed, prepare, samples_of, write_folder, write_tar, write_zip

BOTH = ("cat", "dog")
EVEN = {"cat": 2, "dog": 2}


def filled(above: str, classes: tuple[str, ...] = BOTH, num: int = 2) -> dict[str, bytes]:
    """Files in class folders below `above`. What they hold is not looked at before packing."""
    return {f"{above}{name}/{i}.jpg": b"image" for name in classes for i in range(num)}


def flat(above: str, num: int = 2) -> dict[str, bytes]:
    return {f"{above}/{i}.jpg": b"image" for i in range(num)}


def look(tmp_path: Path, files: dict[str, bytes], val_ratio: float = 0.0):
    """Splits, and what is said, of the folder of `files`."""
    return indexed(ImageFolder(str(write_folder(tmp_path / "in", files)), val_ratio, 0), tmp_path / "work")


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("Training", "Testing"), ("train", "val")),
        (("TRAIN", "VAL", "TEST"), ("train", "val", "test")),
        (("train", "dev"), ("train", "val")),
        (("train", "valid", "eval"), ("train", "val", "test")),
        (("seg_train/seg_train", "seg_test/seg_test"), ("train", "val")),
        (("training_set", "test_set"), ("train", "val")),
        (("TrainImages", "TestImages"), ("train", "val")),
        (("trainset", "valset"), ("train", "val")),
        (("Images/Training", "Images/Validation"), ("train", "val")),
        (("test-data/train", "test-data/val"), ("train", "val")),
        (("train.X", "test"), ("train", "val")),
    ],
)
def test_splits_are_known_by_the_usual_words_in_any_case(tmp_path, folders, expected):
    splits, said = look(tmp_path, {name: data for folder in folders for name, data in filled(f"{folder}/").items()})
    assert counted(splits) == dict.fromkeys(expected, EVEN)
    tops = [folder.split("/")[0] for folder in folders]
    if "test-data" not in tops and "Images" not in tops:
        assert f"train from {tops[0]}" in "\n".join(said)


def test_numbered_parts_are_one_split_and_others_of_its_name_are_refused(tmp_path):
    files = filled("train.X1/", ("n1", "n2")) | filled("train.X2/", ("n3",)) | filled("val.X/", ("n1", "n2", "n3"))
    splits, said = look(tmp_path, files)
    assert counted(splits) == {key: {"n1": 2, "n2": 2, "n3": 2} for key in ("train", "val")}
    assert "splits: train from train.X1, train.X2; val from val.X" in said
    for number, other in enumerate(("train_small", "train2017", "trainB")):
        with pytest.raises(DataError, match=f"train, {other} all look like the split train; keep one"):
            look(tmp_path / str(number), filled("train/") | filled(f"{other}/") | filled("val/"))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (filled("", ("bus", "car", "train")), {"bus": 2, "car": 2, "train": 2}),
        (filled("", ("bus", "test", "train", "val")), {"bus": 2, "test": 2, "train": 2, "val": 2}),
        (filled("bus/", ("red", "old")) | filled("train/", ("red", "old")), {"bus": 4, "train": 4}),
        (filled("vehicles/", ("bus", "train")), {"bus": 2, "train": 2}),
    ],
    ids=["flat", "all three", "with folders in them", "wrapped"],
)
def test_a_class_called_as_a_split_is_a_class_beside_classes(tmp_path, files, expected):
    splits, _ = look(tmp_path, files)
    assert counted(splits) == {"train": expected}


def test_a_class_called_train_in_splits(tmp_path):
    splits, _ = look(tmp_path, filled("train/", ("bus", "train")) | filled("test/", ("bus", "train")))
    assert counted(splits) == {key: {"bus": 2, "train": 2} for key in ("train", "val")}


REFUSED = {
    "dogs-vs-cats": ({**flat("train"), **flat("test1")}, "the split train holds no image in a class folder: 2 images"),
    "words like splits": (
        filled("trainfull/") | filled("testfull/"),
        "look like splits, and testfull is none of train",
    ),
    "trainval": (
        filled("train/") | filled("trainval/") | filled("val/"),
        "and trainval is none of train, val and test",
    ),
    "splits beside classes": (filled("train/") | filled("val/") | filled("extra/"), "but extra beside them like class"),
    "splits in a split": (
        filled("train/train/") | filled("train/val/") | filled("test/"),
        "train holds train, val, whi",
    ),
    "splits in classes": (
        filled("cat/train/") | filled("cat/test/") | filled("dog/train/"),
        "cat holds test, train, wh",
    ),
    "splits and more in classes": (
        filled("nut/train/", ("good",)) | filled("nut/test/", ("bent",)) | flat("nut/truth") | filled("", ("bolt",)),
        "nut holds test, train, truth, which look like splits",
    ),
    "a copy in a folder": (
        filled("a/train/") | filled("a/val/") | filled("b/c/train/"),
        "a holds train, val, which loo",
    ),
    "flowers": (flat("jpg") | {"imagelabels.mat": b"x"}, "jpg is no name of a class, so 2 images have no labels"),
    "no folder": ({"1.jpg": b"x"}, "holds no image in a class folder; expected CLASS/IMAGE, or train/CLASS/IMAGE"),
    "pets": (flat("images") | flat("annotations/trimaps"), "annotations is no name of a class"),
    "birds": (filled("birds/images/") | filled("segmentations/"), "segmentations is no name of a class"),
    "detection": (flat("train/images") | flat("valid/images"), "2 images lie in train and have no labels"),
    "masks": (
        flat("cat/images") | flat("cat/masks") | flat("dog/images"),
        "cat holds images, masks, so that other files",
    ),
    "a flat val": (
        filled("train/") | flat("val"),
        "2 images of val lie in val and in no class folder, and there is no",
    ),
    "only texts": ({"cat/a.txt": b"x"}, "holds no image in a class folder"),
    "packed inside": ({"c/classes.tar.gz": b"x"}, "it holds the archive c/classes.tar.gz: unpack or give that"),
    "another class": (filled("train/") | filled("test/", ("eel",)), "val has the class eel, which train has not"),
    "another case": (
        filled("train/") | filled("val/", ("Cat",)),
        "has the class Cat, which train has not (train has cat)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_one_line_and_never_a_class(tmp_path, name):
    files, message = REFUSED[name]
    with pytest.raises(DataError) as error:
        look(tmp_path, files)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_empty_folders_are_named(tmp_path):
    root = write_folder(tmp_path / "in", filled("train/") | filled("val/"))
    (root / "test").mkdir()
    with pytest.raises(DataError, match="the split test is empty; fill it or remove it"):
        indexed(ImageFolder(str(root), 0.0, 0), tmp_path)
    (root / "test").rmdir()
    (root / "val/eel").mkdir()
    with pytest.raises(DataError, match="the class folder eel of val is empty; fill it or remove it"):
        indexed(ImageFolder(str(root), 0.0, 0), tmp_path)


@pytest.mark.parametrize("test", [flat("test"), flat("test/test"), flat("test/unknown"), flat("Test/images")])
def test_an_unlabelled_test_split_is_passed_over_and_said(tmp_path, test):
    splits, said = look(tmp_path, filled("train/") | test, val_ratio=0.5)
    assert counted(splits) == {key: {"cat": 1, "dog": 1} for key in ("train", "val")}
    top = next(iter(test)).split("/")[0]
    assert any(line.startswith(f"test is passed over: 2 images of {top}") for line in said), said


def test_images_beside_the_splits_are_said(tmp_path):
    splits, said = look(tmp_path, filled("train/") | filled("test/") | flat("seg_pred/seg_pred") | flat("unlabeled"))
    assert counted(splits) == dict.fromkeys(("train", "val"), EVEN)
    assert "4 files outside of class folders are no samples: seg_pred/seg_pred/0.jpg, …" in said


TINY = ("n01443537", "n01629819", "n02012849", "n03126707")
WORDS = b"n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\nn02012849\tcrane\nn03126707\tcrane\n"


@pytest.fixture(scope="module")
def tiny() -> dict[str, bytes]:
    """Tiny ImageNet's files as they are distributed: fewer, with other pictures."""
    files, lines = {}, []
    for number in range(12):
        wnid = TINY[number % 4]
        files[f"tiny-imagenet-200/train/{wnid}/images/{wnid}_{number}.JPEG"] = drawn_jpeg(number)
        files[f"tiny-imagenet-200/val/images/val_{number}.JPEG"] = drawn_jpeg(20 + number)
        files[f"tiny-imagenet-200/test/images/test_{number}.JPEG"] = drawn_jpeg(40 + number)
        lines.append(f"val_{number}.JPEG\t{TINY[number % 3]}\t0\t32\t44\t62\n")
    files |= {f"tiny-imagenet-200/train/{wnid}/{wnid}_boxes.txt": b"x\t0\t0\t1\t1\n" for wnid in TINY}
    files["tiny-imagenet-200/val/val_annotations.txt"] = "".join(lines).encode()
    files |= {"tiny-imagenet-200/wnids.txt": "\n".join(TINY).encode(), "tiny-imagenet-200/words.txt": WORDS}
    return files


def test_tiny_imagenet_packs_as_it_is_distributed(tiny, tmp_path):
    assert "data_prep imagefolder tiny-imagenet-200.zip data/tiny_imagenet\n" in (tiny_imagenet.__doc__ or "")
    run = prepare(
        "imagefolder", write_zip(tmp_path / "tiny-imagenet-200.zip", tiny), tmp_path / "set", "--allow-bad", 0
    )
    assert (run.returncode, run.stderr) == (0, "")
    for split, num_classes in (("train", 4), ("val", 3)):
        manifest = Manifest.load(tmp_path / "set" / split)
        assert manifest.classes == TINY
        assert manifest.shown == ("goldfish", "n01629819", "crane (n02012849)", "crane (n03126707)")
        for sample in samples_of(tmp_path / "set" / split):
            number = next(i for i in range(12) if sample.stem.endswith(f"_{i}"))
            assert sample.image == drawn_jpeg(number + 20 * (split == "val"))
            assert sample.label == number % num_classes
        assert manifest.num_samples == 12
    lines = run.stdout.splitlines()
    assert "6 files that are no images by their names are passed over: .txt 6" not in lines  # 4 boxes and 3 lists
    assert "7 files that are no images by their names are passed over: .txt 7" in lines
    assert "test is passed over: 12 images of tiny-imagenet-200/test without labels" in lines
    assert "val: 12 images, 4 classes (3 of them have images): goldfish, n01629819, crane (n02012849), " in run.stdout
    _sheets_differ_by_names(tmp_path / "set")


def _sheets_differ_by_names(folder: Path) -> None:
    """The contact sheet shows display names: without them it looks different."""
    sheets = []
    for _ in range(2):
        info(make_store(str(folder)), folder / "sheet.png", 0, lambda line: None)
        sheets.append((folder / "sheet.png").read_bytes())
        for path in folder.glob("*/manifest.json"):
            document = json.loads(path.read_text())
            document.pop("display_names", None)
            path.write_text(json.dumps(document))
    assert sheets[0] != sheets[1]


def test_tiny_imagenet_loose_or_as_a_tar_is_the_same(tiny, tmp_path):
    sources = [
        write_folder(tmp_path / "in", tiny),
        write_tar(tmp_path / "in.tar", tiny),
        tmp_path / "in/tiny-imagenet-200",
    ]
    found = [indexed(ImageFolder(str(source), 0.0, 0), tmp_path / "work")[0] for source in sources]
    assert all(counted(splits) == counted(found[0]) for splits in found)
    assert counted(found[0])["val"] == dict(zip(TINY, (4, 4, 4, 0), strict=True))
    assert [split.shown for splits in found for split in splits.values()] == [found[0]["train"].shown] * 6


def test_imagenet_of_kaggle_takes_the_classes_of_val_and_the_words_from_its_lists(tmp_path):
    above = "ILSVRC/Data/CLS-LOC"
    files = filled(f"{above}/train/", ("n01", "n02")) | flat(f"{above}/test")
    files |= {f"{above}/val/ILSVRC2012_val_{number}.JPEG": b"x" for number in range(3)}
    files |= {"ILSVRC/Annotations/CLS-LOC/train/n01/0.xml": b"x", "ILSVRC/ImageSets/CLS-LOC/val.txt": b"x"}
    files["LOC_synset_mapping.txt"] = b"n01 tench, Tinca tinca\nn02 great white shark\n"
    files["LOC_val_solution.csv"] = (
        b"ImageId,PredictionString\nILSVRC2012_val_0,n02 1 2 3 4 n02 5 6 7 8\r\nILSVRC2012_val_1,n01 1 2 3 4\r\n"
    )
    splits, said = look(tmp_path, files)
    assert counted(splits) == {"train": {"n01": 2, "n02": 2}, "val": {"n01": 1, "n02": 1}}
    assert splits["val"].shown == ("tench", "great white shark")
    reasons = [(refusal.name[-9:], refusal.reason) for refusal in splits["val"].refusals]
    assert reasons == [("al_2.JPEG", "has no line in LOC_val_solution.csv")]
    assert "the classes of val are those of LOC_val_solution.csv" in said


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Labels.json", b'{"cat": "house cat, Felis catus", "x": "y"}'),
        ("imagenet_class_index.json", b'{"0": ["cat", "house cat"], "1": ["eel", "eel"]}'),
        ("words.txt", b"cat\thouse cat, Felis\n\nnot \xff UTF-8\n"),
    ],
)
def test_words_for_classes(tmp_path, name, text):
    splits, _ = look(tmp_path, filled("") | {name: text})
    assert (splits["train"].classes, splits["train"].shown) == (BOTH, ("house cat", "dog"))


@pytest.mark.parametrize("text", [b"[1]", b"{", b'{"cat": 3}', b""])
def test_lists_of_something_else_name_no_class(tmp_path, text):
    splits, _ = look(tmp_path, filled("") | {"labels.json": text, "words.txt": text})
    assert splits["train"].shown == ()


@pytest.mark.parametrize(
    "name",
    ["Thumbs.db", "desktop.ini", "list.txt", "meta.json", "labels.CSV", "0.jpg.xml", "film.MP4", "README", "0.jpg~"],
)
def test_files_that_are_no_images_by_name_are_passed_over_and_counted(tmp_path, name):
    splits, said = look(tmp_path, filled("") | {f"cat/{name}": b"x", f"dog/{name}": b"x", "notes/a.txt": b"x"})
    assert counted(splits) == {"train": EVEN}
    assert splits["train"].refusals == ()
    (line,) = [line for line in said if "no images by their names" in line]
    assert line.startswith("3 files")


def test_hidden_files_and_thumbnails_of_file_servers_are_passed_over(tmp_path):
    files = {"cat/@eaDir/0.jpg/SYNOFILE_THUMB_M.jpg": b"x", "$RECYCLE.BIN/1.jpg": b"x", "dog/.hidden/2.jpg": b"x"}
    splits, said = look(tmp_path, filled("") | files)
    assert counted(splits) == {"train": EVEN}
    assert any(line.startswith("3 hidden files") for line in said)


def test_a_file_with_an_image_s_name_that_is_none_stays_refused(tmp_path):
    files = {f"{name}/{i}.jpg": drawn_jpeg(i) for name in BOTH for i in range(2)}
    run = prepare("imagefolder", write_folder(tmp_path / "in", files | {"cat/odd.jpg": b"text"}), tmp_path / "set")
    assert run.returncode == 65
    assert "refused train: cat/odd.jpg: not an image" in run.stderr


def test_links_to_folders_above_are_refused_alone_and_others_are_followed(tmp_path):
    root = write_folder(tmp_path / "in", filled("store/") | filled("set/train/"))
    (root / "set/train/cat/up").symlink_to("..")
    (root / "set/train/cat/self").symlink_to("self")
    (root / "set/train/eel").symlink_to("dog")
    (root / "set/val").symlink_to("../store")
    splits, _ = indexed(ImageFolder(str(root / "set"), 0.0, 0), tmp_path / "work")
    assert counted(splits) == {"train": {"cat": 2, "dog": 2, "eel": 2}, "val": {"cat": 2, "dog": 2, "eel": 0}}
    refused = {refusal.name: refusal.reason for refusal in splits["train"].refusals}
    assert refused == {
        "train/cat/up": "a link to a folder that it lies in",
        "train/cat/self": "a link to nothing",
    }


def test_a_folder_whose_files_are_all_refused_says_why(tmp_path):
    archive = tmp_path / "in.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for name in ("cat/0.jpg", "cat/1.jpg", "dog/0.jpg"):
            zipped.writestr(name, b"image")
    data = bytearray(archive.read_bytes())
    for entry in (at for at in range(len(data)) if data[at : at + 4] == b"PK\1\2"):
        data[entry + 10] = 9 if b"cat" in data[entry + 46 : entry + 55] else 0  # a method that is not supported
    archive.write_bytes(data)
    with pytest.raises(DataError) as error:
        indexed(ImageFolder(str(archive), 0.0, 0), tmp_path / "work")
    assert "the class folder cat of train holds no image that can be read: 2 files are refused, first cat/0.jpg" in str(
        error.value
    )
    root = write_folder(tmp_path / "in", filled("") | {os.fsdecode(b"caf\xe9/1.jpg"): b"image"})
    with pytest.raises(
        DataError, match=r"class folder caf\\xe9 of train .* 1 file is refused, .*: its name is not UTF-8"
    ):
        indexed(ImageFolder(str(root), 0.0, 0), tmp_path / "work")


def test_class_names_in_two_unicode_forms_are_one_class(tmp_path):
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    splits, said = look(tmp_path / "twins", filled("train/", ("bar", composed)) | filled("val/", ("bar", apart)))
    assert counted(splits) == {key: {"bar": 2, composed: 2} for key in ("train", "val")}
    assert f"class names in two Unicode forms are one class, normalised to NFC: {composed}" in said
    alone, said = look(tmp_path / "alone", filled("train/", ("bar", apart)) | filled("val/", ("bar", apart)))
    assert (alone["train"].classes, said) == (("bar", apart), []), "labels stay those of the names as they are"


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (filled("", ("Cat", "cat")), "warning: Cat and cat are two classes, though only their case differs"),
        (filled("", ("cat",)), "warning: cat is the only class, so that there is nothing to tell apart"),
        (
            filled("a/", ("airfield", "alley")) | filled("b/", ("bar",)),
            "folders in class folders belong to their class: ",
        ),
        (
            filled("images/") | {"meta/test.txt": b"cat/1"},
            "warning: meta/test.txt looks like a list of a split and is not",
        ),
        (filled("train/") | {"train/0.jpg": b"x"}, "1 files outside of class folders are no samples: train/0.jpg"),
    ],
)
def test_what_may_surprise_is_said(tmp_path, files, line):
    _, said = look(tmp_path, files)
    assert any(one.startswith(line) for one in said), said


def test_a_ratio_that_has_no_use_is_said(tmp_path):
    splits, said = look(tmp_path, filled("train/") | filled("val/"), val_ratio=0.5)
    assert counted(splits) == dict.fromkeys(("train", "val"), EVEN)
    assert "--val-ratio is not used: the source has the splits train, val" in said


def test_what_is_held_out_stays_so_when_files_are_added(tmp_path):
    files = filled("", num=40)
    first, _ = look(tmp_path / "first", files, val_ratio=0.25)
    more, _ = look(tmp_path / "more", files | {"cat/!first.jpg": b"image"}, val_ratio=0.25)
    assert counted(first)["val"] == {"cat": 10, "dog": 10}
    names, others = ([split["val"].names[number] for number in range(20)] for split in (first, more))
    assert len({*names} & {*others}) >= 19
    packed = write_tar(tmp_path / "in.tar", {f"pictures/{name}": data for name, data in files.items()})
    archived, _ = indexed(ImageFolder(str(packed), 0.25, 0), tmp_path / "work")
    assert [archived["val"].names[number] for number in range(20)] == [f"pictures/{name}" for name in names]


def test_small_classes_keep_an_image_in_train_and_a_ratio_that_holds_out_nothing_is_refused(tmp_path):
    files = filled("", num=3) | {"cat/3.jpg": b"image", "cat/4.jpg": b"image"}
    with pytest.raises(DataError, match=r"nothing, for the largest class has 5; give 0[.]1"):
        look(tmp_path / "none", files, val_ratio=0.05)
    splits, said = look(tmp_path / "some", files, val_ratio=0.13)
    assert counted(splits) == {"train": {"cat": 4, "dog": 3}, "val": {"cat": 1, "dog": 0}}
    assert "warning: --val-ratio 0.13 holds out nothing of 1 small classes, first dog" in said
    splits, _ = look(tmp_path / "most", filled("", num=1) | {"cat/2.jpg": b"image"}, val_ratio=0.9)
    assert counted(splits) == {"train": {"cat": 1, "dog": 1}, "val": {"cat": 1, "dog": 0}}


def test_the_summary_names_splits_and_classes_before_anything_is_packed(tmp_path):
    classes = tuple(f"c{number}" for number in range(7))
    files = {f"Train/{name}/{i}.jpg": drawn_jpeg(i) for name in classes for i in range(2)}
    run = prepare("imagefolder", write_folder(tmp_path / "in", files), tmp_path / "set")
    assert run.returncode == 0, run.stderr
    assert "train: 14 images, 7 classes: c0, c1, c2, c3, c4, …" in run.stdout.splitlines()


def test_a_path_of_very_many_folders_is_refused_at_once(tmp_path):
    archive = tmp_path / "in.tar"
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in (*filled(""), "a/" * 3000 + "x.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    splits, _ = indexed(ImageFolder(str(archive), 0.0, 0), tmp_path / "work")
    assert [refusal.reason for refusal in splits["train"].refusals] == ["its path has more than 256 folders"]
