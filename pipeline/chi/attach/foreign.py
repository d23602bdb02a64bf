"""Neurons of other libraries in a model: which there are, and our surrogate in place of theirs."""


def unsteered(model) -> dict[str, str]:
    return {}


def shared(model) -> list[list[str]]:
    return []
