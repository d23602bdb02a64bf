"""Regret over settings: its arithmetic on made-up runs, and that the committed runs are those of the protocol."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import pytest

from benchmarks import chi_long, chi_regret, study_runs
from tests.conftest import ROOT


def made_up(where: str, arms: Mapping[str, Sequence[float]]) -> list[dict]:
    return [
        {"where": where, "arm": arm, "seed": seed, "accuracy": value / 100}
        for arm, values in arms.items()
        for seed, value in enumerate(values)
    ]


SWEEP = {
    "triangle 0.25": [20, 20, 20],
    "triangle 0.5": [39, 36, 35],  # best on seed 0 alone
    "triangle 1": [38, 40, 37],
    "triangle 2": [30, 30, 38],  # best on seed 2 alone
    "triangle 4": [25, 25, 25],
}


def test_the_width_to_compare_with_is_chosen_on_the_other_seeds():
    records = made_up("here", {**SWEEP, "atan, alpha 2": [37, 41, 33]})
    regrets = chi_regret.regrets(records)
    # Width 1 wins on every pair of seeds, though 0.5 is ahead of it on seed 0 and 2 on seed 2.
    assert regrets["atan, alpha 2"]["here"] == pytest.approx([1, -1, 4])
    assert regrets["triangle 0.25"]["here"] == pytest.approx([18, 20, 17])


def test_a_setting_counts_once_its_sweep_is_whole_on_two_seeds():
    one = made_up("here", {arm: values[:1] for arm, values in SWEEP.items()} | {"MPD-AGL": [30]})
    assert not chi_regret.regrets(one)
    two = made_up("here", {arm: values[:2] for arm, values in SWEEP.items()} | {"MPD-AGL": [30, 30, 30]})
    # Seed 0 is compared with the best on seed 1, width 1; seed 1 with the best on seed 0, width 0.5. Seed 2 has none.
    assert chi_regret.regrets(two)["MPD-AGL"]["here"] == pytest.approx([8, 6])


def test_the_table_takes_means_over_settings_and_names_the_worst(monkeypatch):
    ours = {chi_regret.CALIBRATED: [38, 40, 37]}
    other = {arm: [value - 5 for value in values] for arm, values in SWEEP.items()}
    records = made_up("here", {**SWEEP, **ours}) + made_up("there", {**other, chi_regret.CALIBRATED: [31, 33, 30]})
    rows = {row["name"]: row for row in chi_regret.rows(records)}
    assert all(row["goal"] is None for row in rows.values()), "no goal is judged while runs are missing"
    monkeypatch.setattr(chi_regret, "settings", list)
    rows = {row["name"]: row for row in chi_regret.rows(records)}
    assert rows["chi, calibrated: mean regret over 2 settings"]["value"] == pytest.approx(1)
    assert rows["chi, calibrated: mean regret over 2 settings"]["met"] is False
    assert rows["chi, calibrated: worst regret (there)"]["value"] == pytest.approx(2)
    assert rows["chi, calibrated against triangle 1: mean over 6 pairs"]["value"] == pytest.approx(-1)


def test_the_bound_in_deep_networks_is_one_sided_and_judged_once_every_pair_is_there():
    # Of 10 pairs with mean 1 and standard deviation 2.108, 1.833 standard errors (Student's t, 9 degrees) are 1.222.
    differences = [3, -1] * 5
    arms = {chi_long.BEST: [30] * 10, chi_long.CALIBRATED: [30 + gain for gain in differences]}
    name = "27 layers and more: χ against the best fixed width, one-sided 95 % bound"
    rows = {row["name"]: row for row in chi_long.rows(made_up(chi_long.DEEP[0], arms) + made_up("shallow", arms))}
    assert rows[name]["value"] == pytest.approx(1 - 1.222, abs=1e-3)
    assert rows[name]["goal"] is None
    rows = {row["name"]: row for row in chi_long.rows([row for at in chi_long.DEEP for row in made_up(at, arms)])}
    assert rows[name]["met"] is True


@pytest.mark.parametrize("study", [chi_regret, chi_long])
def test_the_committed_runs_are_those_of_the_protocol(study):
    planned = {study_runs.key_of(asdict(setting)) for setting in study.settings()}
    assert len(planned) == (420 if study is chi_regret else 96)
    keys = [record["key"] for record in study_runs.finished(study.RUNS)]
    assert len(keys) == len(set(keys))
    assert set(keys) <= planned


def test_the_claims_of_the_first_page_are_those_of_the_runs():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    values = {row["name"]: row["value"] for row in chi_regret.rows(study_runs.finished(chi_regret.RUNS))}
    for arm, begins in (
        (chi_regret.CALIBRATED, "| χ control, coverage 0.5 → 0.3 from a calibrated start"),
        ("triangle 1", "| triangle of width 1, fixed"),
        ("atan, alpha 2", "| atan, α = 2, fixed"),
        ("MPD-AGL", "| MPD-AGL"),
        ("sigmoid, slope 25", "| sigmoid of slope 25, fixed"),
    ):
        (said,) = [line for line in lines if line.startswith(begins)]
        mean, worst = (re.match(r"[−\d.]+", cell.strip())[0] for cell in said.split("|")[2:4])  # pyright: ignore
        (found,) = [value for name, value in values.items() if name.startswith(f"{arm}: worst regret")]
        assert worst == f"{found:.2f}"
        assert mean == f"{values[f'{arm}: mean regret over 14 settings']:.2f}".replace("-", "−")
        gained = re.search(r"beats it by ([\d.]+),", said)
        assert (gained is None) == (arm == chi_regret.CALIBRATED)
        if gained:
            assert gained[1] == f"{values[f'{chi_regret.CALIBRATED} against {arm}: mean over 42 pairs']:.2f}"


def test_missing_runs_are_those_that_are_not_committed():
    assert chi_regret.missing(study_runs.finished(chi_regret.RUNS)) == 420 - len(study_runs.finished(chi_regret.RUNS))
