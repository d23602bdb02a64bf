"""What a configuration accepts: every field's kind and size, by one rule for all of them, and what follows from it."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from launch.options import parse
from pipeline.config import Config, config_json
from pipeline.config.checks import INTEGER_MAX, LARGEST, SMALLEST, WIDE, WIDE_MAX
from pipeline.config.config_json import SECTIONS, config_of
from pipeline.errors import ConfigError
from pipeline.snn import surrogate

DIGITS = parse(["--recipe", "digits"])
FIELDS = {
    name: next(
        f for f in dataclasses.fields(SECTIONS.get(name.rpartition(".")[0], Config)) if f.name == name.split(".")[-1]
    )
    for name in config_json.names()
}
FLOATS = sorted(name for name, field in FIELDS.items() if field.type is float)
OTHERS = sorted(FIELDS.keys() - FLOATS)
NUMBERS = st.one_of(
    st.floats(),
    st.floats(0, 1),
    st.floats(1, 1 + 1e-9),
    st.floats(1 - 1e-9, 1),
    st.floats(min_value=0, max_value=1e-15),
    st.sampled_from([0.0, -0.0, 1e-46, 1e-38, 1e39, 1e38, 5e-324, math.inf, math.nan, SMALLEST, LARGEST]),
    st.sampled_from([10**30, 10**400, -1]),
)


def changed(name: str, value: object) -> Config:
    """The digits with another value in one field, as a file would give it."""
    section, _, field = name.rpartition(".")
    document: dict[str, Any] = DIGITS.to_dict()
    if name == "model.tau":
        document["model"]["neuron"] = "plif"
    (document[section] if section else document)[field] = value
    return config_of(document)


def accepted(name: str, value: object) -> bool:
    try:
        changed(name, value)
    except ConfigError:
        return False
    return True


def refused(name: str, value: object) -> str:
    with pytest.raises(ConfigError) as caught:
        changed(name, value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://me:secret@host/sets", "'https://…@host/…' holds a password; leave it to the protocol's client"),
        ("s3://key:secret@bucket", "holds a password"),
        ("https://host/sets?sig=secret", "'https://host/sets' is followed by a query or fragment"),
        ("http://host/sets#secret", "use the URL of a folder, without ? and #"),
    ],
)
def test_a_url_holds_no_secret_and_no_query(url, said):
    told = refused("data.path", url)
    assert said in told
    assert "secret" not in told


@pytest.mark.parametrize(
    "url", ["abfs://sets@account.dfs.core.windows.net/x", "s3://bucket/a#b?", "C://odd@a:b", "a#b"]
)
def test_other_urls_and_paths_may_have_such_letters(url):
    changed("data.path", url)


@given(name=st.sampled_from(FLOATS), value=NUMBERS)
@example(name="model.width", value=1e-46)
@example(name="chi.width_max", value=1e39)
@example(name="optim.momentum", value=1 - 1e-12)
@example(name="model.tau", value=1 + 1e-12)
@example(name="chi.width_min", value=8.0)
def test_a_number_that_is_accepted_is_one_in_fp32_with_its_inverse_and_square(name, value):
    if not accepted(name, value):
        told = refused(name, value)  # of two limits that contradict each other it may begin with the other one
        assert f"{name}=" in told or told.startswith("chi.target_slope=")
        return
    held = torch.tensor(value, dtype=torch.float32)
    assert held.isfinite()
    assert (held == 0) == (value == 0)
    assert not (value == 0 and math.copysign(1, value) < 0)
    if value != 0:
        for derived in (1 / held, held * held, 1 / (held * held)):
            assert derived.isfinite()
            assert derived != 0
    changed(name, held.item())  # in its range still
    assert value == 0 or abs(value) >= SMALLEST


@pytest.mark.parametrize("name", FLOATS)
def test_no_field_takes_a_number_that_is_none_in_fp32(name):
    for value in (math.nan, math.inf, -math.inf, -0.0, 1e-46, 1e39, 10**400, "1", None, True, [1.0]):
        assert "is not allowed; use " in refused(name, value)


@pytest.mark.parametrize("name", OTHERS)
def test_no_field_takes_another_kind(name):
    kind = FIELDS[name].type
    wrong = {
        int: [1.5, "1", None, True, 10**30, -(10**30)],
        bool: [0, "true", None],
        str: [0, None, ["a"], "a\nb", "\ud800"],
    }
    for value in wrong.get(kind, ["30,80", [None], [True], [math.nan], [10**30], 3]):
        assert f"{name}=" in refused(name, value)
    if kind is int:
        assert f"{name}=" in refused(name, (WIDE_MAX if name in WIDE else INTEGER_MAX) + 1)
    if kind is str and FIELDS[name].default != "":
        assert f"{name}='' is not allowed; use text that is not empty" in refused(name, "")
        assert "is not empty" in refused(name, "  ")


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        (["--model.width", "1e-46"], "model.width=1e-46 is not allowed; use a number from 1e-18 to 1e+12 in size"),
        (["--chi.width_max", "1e39"], "chi.width_max=1e+39 is not allowed; use a number from 1e-18 to 1e+12 in size"),
        (["--optim.clip", "1e-30"], "use 0, or a number from 1e-18 to 1e+12 in size"),
        (["--optim.clip", "-0"], "optim.clip=-0.0 is not allowed; use 0 without a sign"),
        (["--optim.momentum", "0.999999999999"], "a number in [0, 1) (0.999999999999 is 1.0 in fp32"),
        (["--model.T", str(10**30)], f"model.T={10**30} is not allowed; use an integer of at most 2147483647"),
        (["--run_dir="], "run_dir='' is not allowed; use text that is not empty"),
        (["--data.path="], "data.path='' is not allowed; use text that is not empty"),
        (["--data.image_size", "2000000000"], "use values with T x micro_batch x image_size² of at most"),
    ],
)
def test_the_refusal_names_the_range(words, allowed):
    with pytest.raises(ConfigError) as caught:
        parse(["--recipe", "digits", *words])
    assert allowed in str(caught.value)


@given(width=NUMBERS, shape=st.sampled_from(surrogate.SHAPES), scale=st.sampled_from(surrogate.SCALES))
@example(width=SMALLEST, shape="triangle", scale="area")
@example(width=LARGEST, shape="atan", scale="area")
def test_every_surrogate_is_finite_at_every_width_that_is_accepted(width, shape, scale):
    assume(accepted("model.width", width))
    u = torch.tensor([0.0, -1.0, 1e4, SMALLEST])
    held, amplitude = torch.tensor(width, dtype=torch.float32), torch.tensor(1.0)
    g = surrogate.derivative(u, held, amplitude, shape=shape, scale=scale)
    assert g.isfinite().all()
    assert g[0] > 0


def test_a_document_gives_back_its_configuration():
    config = parse(["--recipe", "digits", "--optim.schedule", "step", "--optim.milestones", "10,20"])
    assert config_of(json.loads(json.dumps(config.to_dict()))) == config


def test_no_count_of_samples_or_ranks_is_a_traceback():
    config = parse(["--recipe", "digits", "--train.epochs", "1e-18"])
    assert config.num_steps(1) == config.num_steps(10**9) == 1
    with pytest.raises(ConfigError, match=r"data\.path='data/digits': its split train holds no samples"):
        config.num_steps(0)
    with pytest.raises(ConfigError, match=r"train\.epochs=.* makes \d+ optimizer steps; use fewer epochs"):
        parse(["--recipe", "digits", "--train.epochs", "1e12"]).num_steps(1797)
    for ranks in (0, -1):
        with pytest.raises(ConfigError, match=f"world_size={ranks} is not allowed; use 1 rank or more"):
            config.accumulation(ranks)
    with pytest.raises(ConfigError, match=r"use 1 or 2 or 4 or 8 ranks$"):
        config.accumulation(10**30)
    huge = parse(["--recipe", "digits", "--data.micro_batch", "1", "--data.global_batch", str(INTEGER_MAX)])
    with pytest.raises(
        ConfigError, match=f"use 1 or {INTEGER_MAX} ranks$"
    ):  # a prime, found without trying all numbers
        huge.accumulation(2)
