"""Writes the Grafana dashboards into grafana/dashboards/:  python k8s/monitoring/dashboards.py

The description of a panel names its metrics and their meaning, from pipeline/metrics/catalogue.py. Tests check that the
files are up to date, and ask a real Prometheus for the data of every panel.
"""

import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent / "grafana/dashboards"
sys.path.insert(0, str(Path(__file__).parents[2]))

from pipeline.metrics.catalogue import METRICS  # noqa: E402

RUN = 'job=~"$job", run=~"$run"'
NODE = f'{RUN}, instance=~"$node"'
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24
"""Columns of Grafana's grid."""
LAYERED = {"mode": "continuous-YlBl"}
"""Without red and green: a high value is neither good nor bad."""
CHI_ALERT = 0.2
"""SnnChiLow of rules.yml."""
COUNT = {"decimals": 0, "custom": {"axisSoftMax": 1}}
"""Of whole numbers, and no axis up to 100 while all are 0."""
RATIO = {"max": 1}
LAYERS_BESIDE = {"displayMode": "table", "placement": "right", "showLegend": True, "calcs": ["lastNotNull"]}
"""A network has dozens of layers: below the curves, their names would take half of the panel."""


def metrics_of(expression: str) -> list[str]:
    """The metrics of an expression, by their names in `METRICS`."""
    names = re.findall(r"\bsnn_([a-z_]+)(?=[{\[])", expression)
    return list(dict.fromkeys(name if name in METRICS else name.removesuffix("_total") for name in names))


def panel(
    title: str,
    queries: dict[str, str],
    *,
    unit: str = "short",
    kind: str = "timeseries",
    size: tuple[int, int] = (12, 8),
    color: dict | None = None,
    from_zero: bool = True,
    overrides: dict[str, dict] | None = None,
    note: str = "",
    **options,
) -> dict:
    """A panel of `queries` (expression by legend); `size` in columns and rows of the grid.

    `overrides` are properties of the series whose legend ends in the key. Axes and colours begin at 0, so that small
    changes look small, unless `from_zero` is False.
    """
    instant = kind in ("stat", "bargauge", "table")
    about = [
        f"`snn_{name}{'_total' * (METRICS[name].kind == 'counter')}`: {METRICS[name].text}."
        for name in dict.fromkeys(name for query in queries.values() for name in metrics_of(query))
    ]
    if any(query.startswith("up") for query in queries.values()):
        about.append("`up`: 1 where Prometheus' last scrape of a node succeeded.")
    targets = [
        {
            "datasource": SOURCE,
            "refId": chr(ord("A") + index),
            "expr": expression,
            "legendFormat": legend,
            "instant": instant,
            "range": not instant,
            "format": "table" if kind == "table" else "time_series",
        }
        for index, (legend, expression) in enumerate(queries.items())
    ]
    defaults = {"unit": unit, "color": color or {"mode": "palette-classic"}, **options.pop("defaults", {})}
    if from_zero and kind != "table":
        defaults = {"min": 0, **defaults}
    changed = [
        {
            "matcher": {"id": "byRegexp", "options": f"/{ending}$/"},
            "properties": [{"id": name, "value": value} for name, value in properties.items()],
        }
        for ending, properties in (overrides or {}).items()
    ]
    # What is left are the labels: the value is 1, and the time is now. Grafana fails where an option is absent.
    left_out = dict.fromkeys(("Time", "__name__", "Value"), True)
    organized = {"excludeByName": left_out, "indexByName": {}, "renameByName": {}}
    labels = [{"id": "organize", "options": organized}]
    return {
        "type": kind,
        "title": title,
        "description": "\n\n".join([*about, *([note] if note else [])]),
        "datasource": SOURCE,
        "targets": targets,
        "gridPos": {"w": size[0], "h": size[1]},
        "fieldConfig": {"defaults": defaults, "overrides": changed},
        "options": options,
        **({"transformations": labels} if kind == "table" else {}),
    }


def stat(title: str, expression: str, unit: str, **options) -> dict:
    """A number, in the colour of text unless `options` give it `limits`."""
    reduce = {"values": False, "calcs": ["lastNotNull"], "fields": ""}
    color = {"kind": "stat", "size": (4, 4), "colorMode": "none", "reduceOptions": reduce}
    return panel(title, {"{{run}}": expression}, unit=unit, **color | options)


def limits(*steps: tuple[float | None, str]) -> dict:
    """Colours from values on; the first has no value and holds below all others."""
    return {"mode": "absolute", "steps": [{"value": value, "color": color} for value, color in steps]}


def by_layer(title: str, name: str, unit: str, note: str = "", defaults: dict | None = None) -> Iterator[dict]:
    """A map of layers over time, and the same as curves."""
    query = {"{{layer}}": f"snn_layer_{name}{{{RUN}}}"}
    picture = panel(
        title,
        query,
        unit=unit,
        kind="status-history",
        size=(12, 10),
        color=LAYERED,
        note=note,
        defaults={name: value for name, value in (defaults or {}).items() if name in ("min", "max")},
        rowHeight=0.95,
        colWidth=1.0,
        showValue="never",
        legend={"showLegend": False},
    )
    # Grafana refuses more points than pixels.
    yield picture | {"maxDataPoints": 120}
    yield panel(
        f"{title}, as curves",
        query,
        unit=unit,
        size=(12, 10),
        note=note,
        defaults=defaults or {},
        legend=LAYERS_BESIDE,
    )


def overview() -> list[dict]:
    left = f"(snn_train_steps_planned{{{RUN}}} - snn_train_step{{{RUN}}})"
    return [
        stat("Progress", f"snn_train_step{{{RUN}}} / snn_train_steps_planned{{{RUN}}}", "percentunit"),
        # At the end it is 0, where 0 / 0 would be nothing.
        stat("Time left", f"{left} / (rate(snn_train_steps_total{{{RUN}}}[$__rate_interval]) > 0) or {left} == 0", "s"),
        stat("Training loss", f"snn_train_loss{{{RUN}}}", "short"),
        stat("Training accuracy", f"snn_train_accuracy_ratio{{{RUN}}}", "percentunit"),
        stat("Network χ", f"snn_network_chi{{{RUN}}}", "percentunit", color={"mode": "thresholds"}, colorMode="value",
             defaults={"thresholds": limits((None, "red"), (CHI_ALERT, "text"))}),
        stat("Images/s", f"snn_train_images_per_second{{{RUN}}}", "short"),
        panel("Throughput, images per second", {
            "{{run}}, since the last logged step": f"snn_train_images_per_second{{{RUN}}}",
            "{{run}}, with checkpoints and evaluations": f"rate(snn_train_samples_total{{{RUN}}}[$__rate_interval])",
        }),
        panel("Loss", {
            "{{run}}, training": f"snn_train_loss{{{RUN}}}",
            "{{run}}, validation": f"snn_eval_loss{{{RUN}}}",
        }, from_zero=False),
        panel("Accuracy", {
            "{{run}}, training": f"snn_train_accuracy_ratio{{{RUN}}}",
            "{{run}}, validation": f"snn_eval_accuracy_ratio{{{RUN}}}",
        }, unit="percentunit"),
        panel("χ", {
            "{{run}}, network": f"snn_network_chi{{{RUN}}}",
            "{{run}}, lowest layer": f"min by (run) (snn_layer_chi{{{RUN}}})",
            "{{run}}, lowest participation": f"min by (run) (snn_layer_participation_ratio{{{RUN}}})",
        }, unit="percentunit", defaults=RATIO),
        panel("Learning rate", {"{{run}}": f"snn_train_learning_rate{{{RUN}}}"}, size=(6, 8)),
        panel("Gradient norm", {"{{run}}": f"snn_train_grad_norm{{{RUN}}}"}, size=(6, 8)),
        panel("Side of the images, pixels", {"{{run}}": f"snn_train_image_size_pixels{{{RUN}}}"}, size=(6, 8),
              note="Only with data.image_size_start."),
        panel("Steps without an update", {
            "{{run}}, overflows/min": f"60 * rate(snn_train_overflow_steps_total{{{RUN}}}[$__rate_interval])",
            "{{run}}, not finite/min": f"60 * rate(snn_train_nonfinite_steps_total{{{RUN}}}[$__rate_interval])",
            "{{run}}, loss scale": f"snn_train_loss_scale{{{RUN}}}",
        }, size=(6, 8), defaults={"custom": {"axisSoftMax": 1}},
            overrides={"loss scale": {"custom.axisPlacement": "right"}},
            note="There is a loss scale only with train.precision fp16."),
        panel("Runs", {"": f"snn_run_info{{{RUN}}}"}, kind="table", size=(WIDTH, 5)),
    ]  # fmt: skip


def layers() -> list[dict]:
    coverage = f"snn_layer_coverage_ratio{{{RUN}}}"
    off = f"{coverage} - snn_layer_coverage_target_ratio{{{RUN}}}"
    return [
        *by_layer("χ: weights that receive gradient", "chi", "percentunit", f"SnnChiLow fires below {CHI_ALERT:.0%}.", {
            **RATIO,
            "thresholds": limits((None, "transparent"), (CHI_ALERT, "red")),
            "custom": {"thresholdsStyle": {"mode": "dashed"}},
        }),
        *by_layer("Participation of the weights", "participation_ratio", "percentunit", defaults=RATIO),
        *by_layer("Coverage: near the threshold", "coverage_ratio", "percentunit",
                  "Only of surrogates with bounded support."),
        *by_layer("Width of the surrogate", "surrogate_width", "short", "In units of the potential."),
        *by_layer("Firing rate: neuron-steps that spike", "firing_rate_ratio", "percentunit"),
        *by_layer("Gradient norm", "gradient_norm", "short"),
        panel("Coverage above its target", {"{{layer}}": off}, unit="percentunit", from_zero=False,
              legend=LAYERS_BESIDE, note="With chi.policy chi."),
        panel("Now: firing rate", {"{{layer}}": f"snn_layer_firing_rate_ratio{{{RUN}}}"}, unit="percentunit",
              kind="bargauge", color=LAYERED, orientation="horizontal", displayMode="gradient"),
    ]  # fmt: skip


def data() -> list[dict]:
    def phases(by: str) -> str:
        return f"sum by ({by}) (rate(snn_train_phase_seconds_total{{{NODE}}}[$__rate_interval]))"

    def waiting(by: str) -> str:
        wait = f'rate(snn_train_phase_seconds_total{{{NODE}, phase="data_wait"}}[$__rate_interval])'
        return f"sum by ({by}) ({wait}) / ({phases(by)} > 0)"

    saved = f"snn_checkpoint_last_success_timestamp_seconds{{{RUN}}}"
    return [
        panel("Where the time goes", {
            "{{phase}}": f"{phases('phase')} / on () group_left () (sum({phases('phase')}) > 0)",
        }, unit="percentunit", defaults={
            **RATIO,
            "custom": {"stacking": {"mode": "normal"}, "fillOpacity": 60, "showPoints": "never"},
        }),
        panel("Waiting for data, by rank", {"{{run}} {{rank}}": waiting("run, rank")}, unit="percentunit"),
        panel("Micro-batches that wait", {"{{run}} {{rank}}": f"snn_data_queue_depth{{{NODE}}}"},
              defaults=COUNT, note="At 0, the loader does not keep up."),
        panel("Bytes of samples read", {
            "{{instance}}": f"sum by (instance) (rate(snn_data_bytes_read_total{{{NODE}}}[$__rate_interval]))",
        }, unit="Bps"),
        panel("Samples replaced", {
            "{{run}}, {{reason}}": f"sum by (run, reason) (snn_data_samples_bad_total{{{NODE}}})",
        }, size=(8, 8), defaults=COUNT),
        panel("Duration of a checkpoint", {"{{run}}": f"snn_checkpoint_duration_seconds{{{RUN}}}"}, unit="s",
              size=(8, 8)),
        panel("Age of the newest checkpoint", {"{{run}}": f"time() - {saved}"}, unit="s", size=(8, 8)),
        panel("Checkpoints", {"{{run}}, {{result}}": f"snn_checkpoint_saves_total{{{RUN}}}"}, defaults=COUNT,
              overrides={
                  result: {"color": {"mode": "fixed", "fixedColor": color}}
                  for result, color in (("error", "red"), ("success", "green"))
              }),
        panel("Validation", {
            "{{run}}, accuracy": f"snn_eval_accuracy_ratio{{{RUN}}}",
        }, unit="percentunit"),
    ]  # fmt: skip


def cluster() -> list[dict]:
    step = f"snn_train_last_step_timestamp_seconds{{{NODE}}}"
    newest = f"max by (run) (snn_train_last_step_timestamp_seconds{{{RUN}}})"
    return [
        panel("Nodes that answer", {"{{instance}}": 'up{job=~"$job", instance=~"$node"}'}, size=(12, 7),
              defaults=COUNT),
        panel("Ranks that report", {"{{run}}": f"count by (run) ({step})"}, size=(12, 7), defaults=COUNT),
        panel("Since the last logged step", {"{{run}} {{rank}}": f"time() - {step}"}, unit="s"),
        panel("Behind the newest step", {"{{run}} {{rank}}": f"{newest} - on (run) group_right {step}"}, unit="s",
              note="A rank that rises here hangs, is gone, or has a wrong clock."),
        panel("Time of a step", {"{{run}} {{rank}}": f"snn_train_step_duration_seconds{{{NODE}}}"}, unit="s"),
        panel("Most unequal waiting for data", {
            "{{run}}": "max by (run) (run_rank:snn_data_wait:ratio_rate5m{job=~\"$job\", run=~\"$run\"})"
                       " - min by (run) (run_rank:snn_data_wait:ratio_rate5m{job=~\"$job\", run=~\"$run\"})",
        }, unit="percentunit", note="`run_rank:snn_data_wait:ratio_rate5m` of rules.yml, largest less smallest. "
                                    "The rank that waits longest holds up all others."),
        panel("How the run ended, and restarts", {
            "{{run}}, finished": f"snn_run_finished{{{RUN}}}",
            "{{run}}, stopped on request": f"snn_run_stopped{{{RUN}}}",
            "{{run}}, {{node}} restarts": f"snn_run_restarts_total{{{NODE}}}",
        }, defaults=COUNT, note="There are restarts only under launch/supervise.py."),
        panel("Firing alerts", {}, kind="alertlist", alertName="Snn", stateFilter={"firing": True, "pending": True},
              note="Alerts of rules.yml."),
        panel("Versions", {"": f"snn_build_info{{{RUN}}}"}, kind="table", size=(WIDTH, 5)),
    ]  # fmt: skip


def variables() -> list[dict]:
    """Data source, job, run and node; the choice in each limits what the next ones offer."""
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    chain = {
        "job": "label_values(snn_run_info, job)",
        "run": 'label_values(snn_run_info{job=~"$job"}, run)',
        "node": f"label_values(snn_train_phase_seconds_total{{{RUN}}}, instance)",
    }
    return [source] + [
        {
            "name": name,
            "label": name.capitalize(),
            "type": "query",
            "datasource": SOURCE,
            "query": {"query": query, "refId": name},
            "definition": query,
            "refresh": 2,  # with the time range: a run of last week is offered where last week is shown
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".+",
            "current": {"text": ["All"], "value": ["$__all"]},
        }
        for name, query in chain.items()
    ]


def laid_out(panels: list[dict]) -> list[dict]:
    """The panels with numbers and places: from left to right, in rows as high as their highest panel."""
    placed, x, y, height, number = [], 0, 0, 0, itertools.count(1)
    for one in panels:
        size = one["gridPos"]
        if x + size["w"] > WIDTH:
            x, y, height = 0, y + height, 0
        placed.append({"id": next(number), **one, "gridPos": {"x": x, "y": y, **size}})
        x, height = x + size["w"], max(height, size["h"])
    return placed


def dashboard(name: str, panels: list[dict]) -> dict:
    link = {"type": "dashboards", "title": "chispike", "tags": ["chispike"], "asDropdown": True}
    return {
        "uid": f"chispike-{name}",
        "title": f"chispike {name}",
        "tags": ["chispike"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,  # one crosshair for all panels
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [{**link, "includeVars": True, "keepTime": True, "targetBlank": False}],
        "templating": {"list": variables()},
        "panels": laid_out(panels),
    }


def dashboards() -> dict[str, str]:
    """Content by file name."""
    rooms = {"overview": overview, "layers": layers, "data": data, "cluster": cluster}
    return {
        f"{name}.json": json.dumps(dashboard(name, room()), indent=1, ensure_ascii=False) + "\n"
        for name, room in rooms.items()
    }


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, content in dashboards().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
