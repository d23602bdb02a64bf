"""What the page of the χ study says of its final runs agrees with the committed ones; its picture is drawn by them."""

import re

import numpy as np
import pytest

from benchmarks import chi_falsifiers, chi_falsifiers_report, chi_long, chi_study, chi_study_report, study_runs
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def every() -> list[dict]:
    return chi_study.finished()


PAGE = ROOT / "docs/chi_study.md"


def test_the_claims_of_the_page_are_those_of_the_runs(every):
    page = re.sub(r"\s+", " ", PAGE.read_text(encoding="utf-8"))
    arms = chi_study_report.by_arm([record for record in every if record["stage"] == "final"])
    for arm, said in (
        (chi_study_report.FIXED, r"best fixed width of the sweep, 1.0 \| (\d+) \| \S+ ± \S+ \| (\S+) ± (\S+),"),
        (chi_study_report.BASELINE, r"atan, α = 2 \| (\d+) \| \S+ ± \S+ \| \*\*\+(\S+) ± (\S+)\*\*"),
    ):
        difference = chi_study_report.paired(arms, chi_study_report.CHI, arm)
        mean, half = chi_study_report.interval(difference)
        found = re.search(said, page)
        assert found, said
        assert len(difference) == int(found[1])
        assert found[2] == f"{mean:.2f}".replace("-", "−")
        assert found[3] == f"{half:.2f}"
    fixed = dict(chi_study_report.sweep(every))
    best = max(fixed, key=fixed.__getitem__)
    lost = [fixed[best] - fixed[width] for width in (best / 4, best * 4)]
    assert "off by a factor of four costs 6 to 11 points" in page
    assert 6 < min(lost) < max(lost) < 11
    (runs,) = re.findall(r"test accuracy of (\d+), (\d+), (\d+) and (\d+) runs\]", page)
    assert sorted(map(int, runs)) == sorted(len(by_seed) for by_seed in arms.values())


def test_steered_runs_are_shown_over_the_widths_that_their_layers_started_from(every):
    from benchmarks.chi_study_run import START

    starts = chi_study_report.steered_starts(every)
    assert len(starts) == 3
    fixed = dict(chi_study_report.sweep(every))
    assert list(fixed) == [0.25, 0.5, 1, 2, 4]
    for widths, accuracy in starts:
        assert len(widths) == 9
        assert START[0] <= min(widths) < 0.6
        assert 1.4 < max(widths) <= START[1]
        assert accuracy > max(fixed.values()) - chi_study_report.single_run(every)
    assert len({tuple(widths) for widths, _ in starts}) == 3, "the start goes with the seed"


def test_the_picture_is_drawn_by_its_command(every, tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    monkeypatch.setattr("sys.argv", ["chi_study", "plot", "--plot", str(path)])
    chi_study.main()
    assert path.read_bytes().startswith(b"\x89PNG")
    assert chi_study.PICTURE.name in PAGE.read_text(encoding="utf-8")


def test_what_the_page_says_of_soft_spikes_is_what_their_runs_say():
    page = re.sub(r"\s+", " ", PAGE.read_text(encoding="utf-8"))
    records = [record for record in study_runs.finished(chi_falsifiers.RUNS) if record["arm"] == "soft"]
    compared = {
        f"{name}, statistics {statistics}": found
        for statistics in chi_falsifiers_report.STATISTICS
        for name, found in chi_falsifiers_report.soft_gains(records, statistics).items()
        if len(found[0]) > 1
    }
    bounds = []
    for what, (gain, gap) in compared.items():
        bounds.append(chi_falsifiers_report.one_sided(gain))
        held_out, of_gap = (chi_falsifiers_report.said(values, digits=2) for values in (gain, gap))
        row = f"| {what} | {len(gain)} | {held_out} | {bounds[-1]:+.2f} | {of_gap} |"
        assert row.replace("-", "−") in page
    assert len(compared) >= 2
    if len(records) < len(list(chi_falsifiers.settings("soft"))):
        assert "**Soft spikes: undecided" in page
    else:
        assert f"**Soft spikes: {'a lead' if max(bounds) > 0 else 'no lead'}" in page


def test_what_the_page_says_of_soft_spikes_on_new_seeds_is_what_their_runs_say():
    page = re.sub(r"\s+", " ", PAGE.read_text(encoding="utf-8"))
    records = [record for record in study_runs.finished(chi_falsifiers.RUNS) if record["arm"] == "again"]
    if len(records) < len(list(chi_falsifiers.settings("again"))):
        assert "**Soft spikes on new seeds" not in page, "a verdict before all runs are done"
        return
    for statistics in chi_falsifiers_report.STATISTICS:
        for name, gain in chi_falsifiers_report.gains_again(records, statistics).items():
            bound = chi_falsifiers_report.one_sided(gain)
            said = chi_falsifiers_report.said(gain, digits=2)
            row = f"| {name}, statistics {statistics} | {len(gain)} | {said} | {bound:+.2f} |"
            assert row.replace("-", "−") in page
    decides = chi_falsifiers_report.gains_again(records, "as training left them")
    confirmed = chi_falsifiers_report.one_sided(decides["hard spikes"]) > 0
    assert f"**Soft spikes on new seeds: {'confirmed' if confirmed else 'not confirmed'}" in page


def test_the_deep_table_is_that_of_the_runs():
    page = PAGE.read_text(encoding="utf-8")
    records = study_runs.finished(chi_long.RUNS)
    settings = (
        ("27 layers, ADD, IF", ["27 layers, IF, T=2"]),
        ("27 layers, IAND, LIF", ["27 layers, IAND, LIF, T=2"]),
        ("57 layers, ADD, IF", ["57 layers, IF, T=2"]),
        ("all", chi_long.DEEP),
    )
    for name, places in settings:
        gains = chi_long.gain([r for r in records if r["where"] in places], chi_long.CALIBRATED, chi_long.BEST)
        mean, bound = (row["value"] for row in chi_long.compared("", gains))
        found = re.search(rf"^\| {name} \| (\d+) \| \**(\S+) ± \S+ \| \**(−?[\d.]+)", page, re.MULTILINE)
        assert found, name
        assert [found[1], found[2], found[3]] == [
            str(len(gains)),
            f"{mean:+.2f}".replace("-", "−"),
            f"{bound:.2f}".replace("-", "−"),
        ]
    assert {len(places) * 10 for _, places in settings} == {10, 30}
    for text in (PAGE.with_name("chi.md"), ROOT / "README.md"):
        assert f"{mean:+.2f}"[1:] + " ± 0.65" in text.read_text(encoding="utf-8"), "of all pairs"


def test_the_table_of_long_runs_is_that_of_the_runs():
    page = PAGE.read_text(encoding="utf-8").replace("−", "-")
    records = [record for record in study_runs.finished(chi_long.RUNS) if record["where"] in chi_long.LONG]
    assert len(records) == len(chi_long.LONG) * len(chi_long.LONG_SEEDS) * 3
    pooled = {chi_long.ATAN: [], chi_long.BEST: []}
    for where, arms in chi_long.accuracies(records).items():
        here = [record for record in records if record["where"] == where]
        means = [np.mean(list(arms[arm].values())) for arm in (chi_long.ATAN, chi_long.BEST, chi_long.CALIBRATED)]
        gains = [chi_long.gain(here, chi_long.CALIBRATED, other) for other in pooled]
        for kept, gain in zip(pooled.values(), gains, strict=True):
            kept += gain
        cells = [*(f"{mean:.2f}" for mean in means), *(shown(gain) for gain in gains)]
        assert f"| {' | '.join(cells)} |" in page, where
    assert f"| {' | '.join(shown(gain) for gain in pooled.values())} |" in page


def shown(gains: list[float]) -> str:
    row = chi_long.compared("", gains)[0]
    return f"{row['value']:+.2f} {row['unit'].removesuffix(' points')}"
