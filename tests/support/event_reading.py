"""What a test reads of the bytes of one recording, or is told of them."""

import pytest

from data_prep.images import RefusedError
from data_prep.sources.event_formats import convert
from data_prep.sources.event_raw import Settings
from pipeline.data.decode.events import Events, decode
from tests.support.event_files import EXTENSION

ON_34 = Settings(sensor=(34, 34))


def read(name: str, data: bytes, settings: Settings = ON_34) -> tuple[Events, tuple[str, ...]]:
    found = convert(name, memoryview(data), settings)
    assert found.converted is not None
    return decode(found.converted), found.warnings


def refusal(name: str, data: bytes, settings: Settings = ON_34) -> str:
    with pytest.raises(RefusedError) as caught:
        convert(name, memoryview(data), settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def name_of(format: str) -> str:
    return f"one.{EXTENSION.get(format, format)}"
