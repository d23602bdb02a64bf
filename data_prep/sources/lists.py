"""Lists beside the images: display names of the classes, and the classes of images that lie in no class folder.

words.txt, LOC_synset_mapping.txt         WNID, then its words: as ImageNet and Tiny ImageNet have them
Labels.json, imagenet_class_index.json    {WNID: words}, {number: [WNID, word]}
val_annotations.txt, LOC_val_solution.csv IMAGE, then its class: for images that lie in no class folder
"""

import json
from collections import Counter
from collections.abc import Iterable

from data_prep.collection import Reader
from data_prep.sources.splits import split_words
from data_prep.sources.tars import Member
from pipeline.errors import DataError

_WORDS = ("words.txt", "loc_synset_mapping.txt")
_WORDS_JSON = ("labels.json", "imagenet_class_index.json")
_LABELS = ("val_annotations.txt", "loc_val_solution.csv")
_MAX_BYTES = 64 << 20


class Lists:
    """The lists of a collection, read when they are asked for."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._words: list[Member] = []
        self._labels: list[Member] = []
        self.splits: list[str] = []
        """Names of files that look like lists of a split's images: meta/test.txt. They are not read."""

    def offer(self, item: Member) -> None:
        """Keeps `item`, a file that is no image, if it is such a list."""
        path = item.name.decode("utf-8", "backslashreplace")
        name = path.rsplit("/", 1)[-1]
        if item.refused or item.length > _MAX_BYTES:
            return
        if name.casefold() in _WORDS + _WORDS_JSON:
            self._words.append(item)
        elif name.casefold() in _LABELS:
            self._labels.append(item)
        elif name.endswith((".txt", ".csv", ".json", ".lst")) and split_words(name.rsplit(".", 1)[0]):
            self.splits.append(path)

    def words(self, classes: Iterable[str]) -> dict[str, str]:
        """Display names of those `classes` that the lists know: the first of several words, no two alike."""
        known = set(classes)
        for item in self._words:
            found = {name: words for name, words in self._read_words(item) if name in known and words}
            if found:
                return told_apart(found)
        return {}

    def labels(self, folders: list[str]) -> tuple[str, dict[str, str]] | None:
        """The list of the classes of val's images: its name, and class by image; None where there is none.

        A list that lies above or in one of `folders` is preferred.
        """
        if not self._labels:
            return None
        near = [item for item in self._labels if any(f"{folder}/".startswith(_folder(item)) for folder in folders)]
        item = (near or self._labels)[-1]
        found = {}
        for line in self._text(item).splitlines():
            image, _, label = line.replace(",", "\t", 1).partition("\t")
            if label.strip():
                found[image.strip()] = label.split()[0]
        return item.name.decode(), found

    def _read_words(self, item: Member) -> list[tuple[str, str]]:
        text = self._bytes(item).decode("utf-8", "replace")  # for display only
        if _base(item).casefold() in _WORDS:
            rows = [line.split(None, 1) for line in text.splitlines()]
            return [(row[0], _first(row[1])) for row in rows if len(row) == 2]
        try:
            table = json.loads(text)
        except ValueError:
            return []  # another kind of file with this name
        pairs = table.items() if isinstance(table, dict) else ()
        pairs = [tuple(value) if isinstance(value, list) and len(value) == 2 else (key, value) for key, value in pairs]
        return [(str(name), _first(words)) for name, words in pairs if isinstance(words, str)]

    def _bytes(self, item: Member) -> bytearray:
        room = bytearray(item.length)
        self._reader.read_into(memoryview(room), item.offset, item.name.decode())
        return room

    def _text(self, item: Member) -> str:
        try:
            return self._bytes(item).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{item.name.decode()} is not UTF-8 text ({error.reason}); mend it or remove it") from None


def told_apart(words: dict[str, str]) -> dict[str, str]:
    """`words` by class; those that several classes have get the class added: ImageNet has two cranes."""
    often = Counter(words.values())
    return {name: f"{text} ({name})" if often[text] > 1 else text for name, text in words.items()}


def _base(item: Member) -> str:
    return item.name.decode("utf-8", "backslashreplace").rsplit("/", 1)[-1]


def _folder(item: Member) -> str:
    above, slash, _ = item.name.decode("utf-8", "backslashreplace").rpartition("/")
    return above + slash


def _first(words: str) -> str:
    return " ".join(words.split(",")[0].split())
