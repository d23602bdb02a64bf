"""This project against frozen results of SpikingJelly 2.0.0 (tests/snn/snn_parity.py made them), end to end in fp64."""

import json
from pathlib import Path

import pytest

from tests.snn import snn_network_case, snn_parity

FROZEN = json.loads((Path(__file__).with_name("spikingjelly_reference.json")).read_text())["cases"]


@pytest.mark.parametrize("name", FROZEN)
def test_spikes_logits_and_gradients_are_the_peers(name):
    got, wanted = snn_network_case.digest(snn_parity.run_ours(*name.split())), FROZEN[name]
    # If one spike differs in fp64, the hash of its layer differs.
    assert got["spikes"] == wanted["spikes"]
    assert got["logits"] == pytest.approx(wanted["logits"], rel=1e-9, abs=1e-9)
    assert got["gradients"].keys() == wanted["gradients"].keys()
    for parameter, (norm, probe) in wanted["gradients"].items():
        assert got["gradients"][parameter][0] == pytest.approx(norm, rel=1e-9), parameter
        # A product with random numbers of size 1 is about the norm, and may nearly cancel.
        assert got["gradients"][parameter][1] == pytest.approx(probe, abs=1e-9 * max(norm, 1e-12)), parameter
