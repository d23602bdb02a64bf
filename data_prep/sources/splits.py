"""Which split a folder or a file belongs to, by the words of its name: train.X1, seg_test, Validation, mnist-train.

The words are those of Hugging Face's `datasets`, in any case, separated by what is no letter, or by a capital letter.
"""

import re

SPLITS = ("train", "val", "test")
"""In the order in which they are packed."""
_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
_BEHIND = re.compile(r"(?:set|data|images?|imgs?|split)$")
_LIKE = {"train": "train", "val": "val", "test": "test"}
_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_BETWEEN = re.compile(r"[\W\d_]+")
# A number, alone or with one letter before it: train.X1. No year and no size: those name releases and configurations.
_PART = re.compile(r"(?:(?<![^\W_])[^\W\d_])?(?<!\d)(?!(?:19|20)\d\d(?!\d))\d+(?![^\W_])")


def _tokens(name: str) -> list[str]:
    return [token for token in _BETWEEN.split(_CAPITAL.sub(" ", name).casefold()) if token]


def split_words(name: str) -> set[str]:
    """The splits that the words of `name` stand for: none, one, or several, which is ambiguous."""
    found = (_WORDS.get(token) or _WORDS.get(_BEHIND.sub("", token)) for token in _tokens(name))
    return {split for split in found if split}


def split_of(name: str) -> str | None:
    """The one split that `name` stands for, or None."""
    words = split_words(name)
    return words.pop() if len(words) == 1 else None


def is_exactly_split(name: str) -> bool:
    """Whether `name` is the word for a split and nothing else."""
    return name.casefold() in _WORDS


def likeness(name: str) -> set[str]:
    """The splits that `name` resembles: those of its words, else those that a word begins or ends with (trainfull)."""
    near = {split for token in _tokens(name) for word, split in _LIKE.items() if token.startswith(word)}
    near |= {split for token in _tokens(name) for word, split in _LIKE.items() if token.endswith(word)}
    return split_words(name) or near


def part_base(name: str) -> str:
    """`name` without the number of a part: the same for train.X1 and train.X2, another for train_small, train2017."""
    return " ".join(re.findall(r"[^\W_]+", _PART.sub(" ", _CAPITAL.sub(" ", name)).casefold()))
