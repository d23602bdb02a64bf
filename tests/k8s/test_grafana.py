"""Dashboards use only what Grafana 11.6 to 13 allow: fields, enumerated values, units, colour schemes, panel types.

What was seen in the panels, drawn by Grafana's own code, stays mended: titles fit, axes begin at 0, nothing is 0 / 0.
"""

import copy
import json
from pathlib import Path

import pytest

from tests.conftest import ROOT

VALUES = json.loads((Path(__file__).parent / "grafana/values.json").read_text(encoding="utf-8"))
"""Made by grafana/values.mjs from Grafana's published packages."""
DASHBOARDS = {
    path.stem: json.loads(path.read_text()) for path in (ROOT / "k8s/monitoring/grafana/dashboards").iterdir()
}
NAMES = {str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
UNPUBLISHED = {"alertlist", "definition"}
"""The panel of alerts, and what Grafana writes beside a variable's query: the packages have neither."""


def wrong(value: object, kind, path: str) -> list[str]:
    """What in `value` is not of `kind`, a type of values.json."""
    if kind == "any":
        return []
    if "enum" in kind:
        return [] if value in kind["enum"] and type(value) is not bool else [f"{path}={value!r}, not of {kind['enum']}"]
    if "either" in kind:
        found = [wrong(value, one, path) for one in kind["either"]]
        return min(found, key=len, default=[f"{path}={value!r}"])
    if "list" in kind and isinstance(value, list):
        return [line for index, one in enumerate(value) for line in wrong(one, kind["list"], f"{path}[{index}]")]
    if "fields" in kind and isinstance(value, dict):
        unknown = [f"{path}.{name} is unknown" for name in value.keys() - kind["fields"].keys() - UNPUBLISHED]
        known = value.keys() & kind["fields"].keys()
        return unknown + [
            line for name in sorted(known) for line in wrong(value[name], kind["fields"][name], f"{path}.{name}")
        ]
    return [] if NAMES.get(type(value)) == kind else [f"{path}={value!r} is not {kind}"]


def refused(dashboard: dict) -> list[str]:
    """What some version would refuse or ignore."""
    found = wrong(dashboard, VALUES["dashboard"], "dashboard")
    for panel in dashboard["panels"]:
        title, defaults = panel["title"], panel["fieldConfig"]["defaults"]
        types = VALUES["panels"].get(panel["type"].replace("-", ""))
        if types is not None:
            found += wrong(panel["options"], types["options"], f"{title}: options")
            found += wrong(defaults.get("custom", {}), types["custom"], f"{title}: custom")
        elif panel["type"] not in UNPUBLISHED:
            found.append(f"{title}: type={panel['type']!r}")
        listed = {
            "units": [defaults["unit"]],
            "colors": [defaults["color"]["mode"]],
            "reducers": panel["options"].get("reduceOptions", {}).get("calcs", []),
            "transformations": [one["id"] for one in panel.get("transformations", [])],
        }
        for registry, used in listed.items():
            found += [f"{title}: {one!r} is not among the {registry}" for one in used if one not in VALUES[registry]]
    return found


@pytest.mark.parametrize("name", sorted(DASHBOARDS))
def test_every_version_of_grafana_has_what_the_dashboards_use(name):
    assert refused(DASHBOARDS[name]) == []


def test_what_a_version_lacks_is_found():
    def changed(change) -> list[str]:
        dashboard = copy.deepcopy(DASHBOARDS["layers"])
        change(dashboard, dashboard["panels"][0])
        return refused(dashboard)

    assert changed(lambda _, panel: panel["fieldConfig"]["defaults"]["color"].update(mode="continuous-viridis"))
    assert changed(lambda _, panel: panel["fieldConfig"]["defaults"].update(unit="percents"))
    assert changed(lambda _, panel: panel.update(type="status-historie"))
    assert changed(lambda _, panel: panel["options"].update(showValue="nevr"))
    assert changed(lambda _, panel: panel["options"].update(rowHight=1))
    assert changed(lambda _, panel: panel.update(transformations=[{"id": "organise", "options": {}}]))
    assert changed(lambda dashboard, _: dashboard["links"][0].update(type="dashboard"))
    assert changed(lambda dashboard, _: dashboard["templating"]["list"][1].update(refresh=3))
    assert changed(lambda dashboard, _: dashboard.update(graphTooltip=True))


PANELS = [panel for dashboard in DASHBOARDS.values() for panel in dashboard["panels"]]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_is_easy_to_read(panel):
    # Grafana cut "Images per second" where four of 24 columns were 200 pixels, 17 letters and the mark of the
    # description beside them.
    assert len(panel["title"]) <= 4.4 * panel["gridPos"]["w"]
    defaults = panel["fieldConfig"]["defaults"]
    if panel["type"] not in ("table", "alertlist"):
        # Else χ between 99.8 and 100 % fills the axis and all colours, and the least bar is empty.
        assert ("min" in defaults) != (panel["title"] in ("Loss", "Coverage above its target"))
    if "χ" in panel["title"] and panel["type"] in ("timeseries", "status-history"):
        assert (defaults["min"], defaults["max"]) == (0, 1)
    if panel["type"] == "stat" and defaults["color"]["mode"] != "thresholds":
        assert panel["options"]["colorMode"] == "none", "green says that all is well, which the number does not know"
    if panel["type"] == "table":  # else columns of the time and of a 1 push the labels out of sight
        (organize,) = panel["transformations"]
        assert {"Time", "Value", "__name__"} <= organize["options"]["excludeByName"].keys()
        assert {"indexByName", "renameByName"} < organize["options"].keys()
    if panel["type"] == "timeseries" and [one["legendFormat"] for one in panel["targets"]] == ["{{layer}}"]:
        assert panel["options"]["legend"]["placement"] == "right"


def test_the_pictures_show_panels_that_the_dashboards_have():
    pictures = json.loads((Path(__file__).parent / "grafana/pictures.json").read_text(encoding="utf-8"))
    size = 0
    for name, dashboards in pictures.items():
        size += (ROOT / "docs" / name).stat().st_size
        for dashboard, titles in dashboards.items():
            kinds = {panel["title"]: panel["type"] for panel in DASHBOARDS[dashboard]["panels"]}
            assert {kinds[title] for title in titles} <= {"timeseries", "stat", "bargauge", "table"}
    assert size <= 400_000
