"""Rules and dashboards: what they name exists, alerts fire where they should, every panel has data of a real run."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import urllib.parse

import pytest
import yaml

from pipeline.metrics.catalogue import METRICS
from tests.conftest import ROOT, free_port, kill, start
from tests.support.prometheus import MONITORING, Prometheus
from tests.support.training_runs import arguments

RULES = yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"][0]["rules"]
DRAW = MONITORING / "picture.py"
CONDITIONAL = {
    "train_loss_scale": "train.precision fp16",
    "run_restarts": "launch/supervise.py",
}
"""Metrics that the run below lacks, and what they need."""


def script(name: str):
    """A script of k8s/monitoring, which is no package, as a module."""
    spec = importlib.util.spec_from_file_location(name, MONITORING / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dashboards() -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (MONITORING / "grafana/dashboards").glob("*.json")}


def queries(dashboard: dict) -> list[tuple[str, str]]:
    """Title and expression of every query."""
    return [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]]


def unknown_metrics(expression: str) -> set[str]:
    """Metrics in an expression that neither the code nor a recording rule provides."""
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    known = {f"snn_{name}{'_total' * (metric.kind == 'counter')}" for name, metric in METRICS.items()}
    return set(re.findall(r"\b(?:\w+:)?snn_\w+(?::\w+)?", expression)) - known - recorded


def test_dashboards_and_rules_name_only_metrics_that_exist():
    assert unknown_metrics("rate(snn_train_step_total[5m]) + run:snn_nothing:rate5m") == {
        "snn_train_step_total",
        "run:snn_nothing:rate5m",
    }
    shown = [expression for dashboard in dashboards().values() for _, expression in queries(dashboard)]
    for expression in [*shown, *(rule["expr"] for rule in RULES)]:
        assert not unknown_metrics(expression), expression
    # The other way round: what is measured can be seen.
    unseen = {name for name in METRICS if not any(re.search(rf"\bsnn_{name}(_total)?\b", one) for one in shown)}
    assert unseen == set()


def test_the_page_lists_every_metric_and_alert():
    page = (ROOT / "docs/monitoring.md").read_text()
    for name, metric in METRICS.items():
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        assert f"| `snn_{name}{'_total' * (metric.kind == 'counter')}` | {labels} | {metric.text} |" in page
    for rule in RULES:
        if "alert" in rule:
            assert f"| {rule['alert']} | {rule['labels']['severity']} |" in page


def test_the_generated_dashboards_are_fresh_and_whole():
    made = script("dashboards").dashboards()
    files = {path.name: path.read_text() for path in (MONITORING / "grafana/dashboards").iterdir()}
    assert files == made, "run: python k8s/monitoring/dashboards.py"
    for name, dashboard in dashboards().items():
        assert dashboard["uid"] == f"chispike-{name}"
        assert [one["name"] for one in dashboard["templating"]["list"]] == ["datasource", "job", "run", "node"]
        places = set()
        for panel in dashboard["panels"]:
            box = panel["gridPos"]
            cells = {(x, y) for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])}
            assert not cells & places, f"{panel['title']} covers another panel"
            assert box["x"] + box["w"] <= 24
            places |= cells
            for target in panel["targets"]:
                for metric in script("dashboards").metrics_of(target["expr"]):
                    assert f"`snn_{metric}" in panel["description"]


def test_the_picture_shows_panels_that_the_dashboards_have(tmp_path):
    picture = script("picture")
    for dashboard, title in picture.PANELS:
        for target in picture.panel(dashboard, title)["targets"]:
            assert "$" not in picture.filled(target["expr"], "watched", 5.0)
    with pytest.raises(SystemExit, match=r"^error: no Prometheus answers at http://127.0.0.1:\d+ \("):
        picture.draw(str(tmp_path / "no.png"), f"http://127.0.0.1:{free_port()}", 1, "watched")


def graphs(link: str) -> list[dict[str, str]]:
    """The graphs that a link to Prometheus opens."""
    fields = urllib.parse.parse_qs(urllib.parse.urlsplit(link).query, strict_parsing=True)
    numbers = sorted({name.partition(".")[0] for name in fields})
    return [{key: fields[f"{number}.{key}"][0] for key in ("expr", "tab", "range_input")} for number in numbers]


def test_make_monitor_prints_a_link_with_the_graphs_filled_in(tmp_path):
    """A Python with its standard library alone prints it, as before the first `make train`."""
    (tmp_path / "prometheus").write_text("#!/bin/sh\necho started on $3\n")
    (tmp_path / "prometheus").chmod(0o755)
    bare = f"PYTHON={sys.executable} -I -S"
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(MONITORING, tmp_path / "k8s/monitoring")
    done = subprocess.run(
        ["make", "monitor", bare, "MONITOR_PORT=12345"],
        cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (link,) = [line for line in done.stdout.splitlines() if line.startswith("http://127.0.0.1:12345/graph?")]
    assert "started on --web.listen-address=127.0.0.1:12345" in done.stdout
    assert not set(link) & set("()+ {}"), "a terminal would cut the link there"
    shown = [graph["expr"] for graph in graphs(link)]
    assert not any(unknown_metrics(expression) for expression in shown)
    read = " ".join(shown)
    assert all(name in read for name in ("train_loss", "min by (run) (snn_layer_chi)", "width", "images_per_second"))
    assert {(graph["tab"], graph["range_input"]) for graph in graphs(link)} == {("0", "30m")}


def test_prometheus_parses_the_graphs_of_the_link(tmp_path):
    shown = [graph["expr"] for graph in graphs(script("picture").link("http://there", 30))]
    assert len(shown) == 4
    rules = [{"record": f"shown:{number}", "expr": expression} for number, expression in enumerate(shown)]
    (tmp_path / "shown.yml").write_text(yaml.safe_dump({"groups": [{"name": "shown", "rules": rules}]}))
    promtool("check", "rules", str(tmp_path / "shown.yml"))


def lost(ours: object, theirs: object, path: str = "") -> set[str]:
    """Where `theirs` lacks or changes what `ours` has; without positions in lists."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        missing = {f"{path}/{name}" for name in ours.keys() - theirs.keys()}
        return missing.union(
            *(lost(ours[name], theirs[name], f"{path}/{name}") for name in ours.keys() & theirs.keys())
        )
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return set().union(*(lost(one, other, path) for one, other in zip(ours, theirs, strict=True)))
    return set() if ours == theirs else {path}


def test_grafanas_own_models_know_every_field_of_the_dashboards():
    dashboard_models = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason="needs Python 3.11")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder  # pyright: ignore[reportMissingImports]
    from grafana_foundation_sdk.cog.plugins import register_default_plugins  # pyright: ignore[reportMissingImports]

    register_default_plugins()
    for dashboard in dashboards().values():
        again = json.loads(JSONEncoder().encode(dashboard_models.Dashboard.from_json(dashboard)))
        # What Grafana itself writes beside a variable's query, and its models leave out.
        assert lost(dashboard, again) == {"/templating/list/definition"}
    # The models forget what they do not know, and so the comparison finds it.
    wrong = {**dashboard, "timezones": "browser", "panels": [{**dashboard["panels"][0], "gridPosition": {}}]}
    again = json.loads(JSONEncoder().encode(dashboard_models.Dashboard.from_json(wrong)))
    assert lost(wrong, again) == {"/templating/list/definition", "/timezones", "/panels/gridPosition"}


def promtool(*words: str) -> None:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("there is no promtool; apt install prometheus")
    done = subprocess.run([tool, *words], cwd=MONITORING, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_where_it_should_and_only_there():
    promtool("test", "rules", "rules_test.yml")
    fires, keeps_still = set(), set()
    for group in yaml.safe_load((MONITORING / "rules_test.yml").read_text())["tests"]:
        for case in group["alert_rule_test"]:
            (fires if case.get("exp_alerts") else keeps_still).add(case["alertname"])
    alerts = {rule["alert"] for rule in RULES if "alert" in rule}
    assert fires == keeps_still == alerts


def test_panels_of_a_run_that_is_over_divide_nothing_by_nothing(tmp_path):
    """0 / 0 is NaN, which Grafana draws as an empty number and as spikes of a stack."""
    boards = dashboards()

    def expression(dashboard: str, title: str) -> str:
        (panel,) = [one for one in boards[dashboard]["panels"] if one["title"] == title]
        return script("picture").filled(panel["targets"][0]["expr"], ".+", 5)

    left, phases, waiting = (
        expression(*where)
        for where in (("overview", "Time left"), ("data", "Where the time goes"), ("data", "Waiting for data, by rank"))
    )
    name = '{job="chispike", run="over", instance="there"'
    trains, over = "0+5x60 300x200", "0+1x60 60x200"
    series = {
        f"snn_train_steps_planned{name}}}": "300x260",
        f"snn_train_step{name}}}": trains,
        f"snn_train_steps_total{name}}}": trains,
        f'snn_train_phase_seconds_total{name}, rank="0", phase="compute"}}': over,
        f'snn_train_phase_seconds_total{name}, rank="0", phase="data_wait"}}': over,
    }
    half, run = [{"labels": f'{{phase="{one}"}}', "value": 0.5} for one in ("compute", "data_wait")], f"{name}}}"
    rank = [{"labels": '{run="over", rank="0"}', "value": 0.5}]
    expected = [
        *[(left, "2m30s", [{"labels": run, "value": 150}]), (left, "10m", [{"labels": run, "value": 0}])],
        *[(phases, "2m30s", half), (phases, "10m", [])],
        *[(waiting, "2m30s", rank), (waiting, "10m", [])],
    ]
    checks = [{"expr": expr, "eval_time": at, "exp_samples": samples} for expr, at, samples in expected]
    inputs = [{"series": one, "values": values} for one, values in series.items()]
    case = {"interval": "5s", "input_series": inputs, "promql_expr_test": checks}
    (tmp_path / "over.yml").write_text(yaml.safe_dump({"rule_files": [], "tests": [case]}))
    promtool("test", "rules", str(tmp_path / "over.yml"))


def test_the_limit_in_the_panels_is_that_of_the_alert():
    (low,) = [rule["expr"] for rule in RULES if rule.get("alert") == "SnnChiLow"]
    assert low.endswith(f"< {script('dashboards').CHI_ALERT}")


def test_prometheus_accepts_its_configurations(tmp_path):
    promtool("check", "config", "prometheus.yml")
    # Debian's build has no discovery in Kubernetes: the rest is checked, and that pods' labels are those of k8s/base.
    text = (MONITORING / "prometheus-kubernetes.yml").read_text()
    config = yaml.safe_load(re.sub(r"^# (?=alerting:| )", "", text, flags=re.M))  # with what is commented out
    assert config["alerting"]["alertmanagers"][0].keys() == {"dns_sd_configs"}
    scrape = config["scrape_configs"][0]
    assert scrape.pop("kubernetes_sd_configs") == [{"role": "pod"}]
    config["rule_files"] = [str(MONITORING / "rules.yml")]
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    promtool("check", "config", str(tmp_path / "config.yml"))
    pod = yaml.safe_load((ROOT / "k8s/base/job.yaml").read_text())["spec"]["template"]
    (named,) = [rule for rule in scrape["relabel_configs"] if rule.get("target_label") == "node_name"]
    assert named["source_labels"] == ["__meta_kubernetes_pod_node_name"]
    kept = {tuple(rule["source_labels"]): rule["regex"] for rule in scrape["relabel_configs"] if "regex" in rule}
    label = "app.kubernetes.io/name"
    assert kept["__meta_kubernetes_pod_label_" + re.sub(r"\W", "_", label),] == pod["metadata"]["labels"][label]
    ports = [port["name"] for container in pod["spec"]["containers"] for port in container.get("ports", [])]
    assert kept["__meta_kubernetes_pod_container_port_name",] in ports


def test_a_provisioned_data_source_is_of_make_monitor_and_no_rival_of_one_that_is_there():
    """Grafana does not start with two defaults."""
    text = (MONITORING / "grafana/provisioning/datasources/prometheus.yml").read_text()
    (source,) = yaml.safe_load(text)["datasources"]
    assert "isDefault" not in source
    port = re.search(r"^MONITOR_PORT \?= (\d+)$", (ROOT / "Makefile").read_text(), re.M)
    assert port
    assert source["url"] == f"http://127.0.0.1:{port[1]}"


@pytest.fixture(scope="module")
def watched(digits, tmp_path_factory):
    """A Prometheus that scraped the run `watched` from its first step to its end."""
    folder = tmp_path_factory.mktemp("prometheus")
    port = free_port()
    prometheus = Prometheus(folder, f"127.0.0.1:{port}")
    settings = {"--metrics.port": port, "--train.epochs": 6, "--train.eval_every_epochs": 2}
    words = [str(word) for pair in settings.items() for word in pair]
    try:
        prometheus.wait_for('up{job="chispike"}')  # it takes 5 s to find its target
        run = start("launch/train.py", *arguments(digits, tmp_path_factory.mktemp("run") / "watched"), *words)
        output, _ = run.communicate(timeout=200)
        assert run.returncode == 0, output
        # The run stays until it was seen that it has finished; the rules need two evaluations more.
        assert prometheus.ask("last_over_time(snn_run_finished[5m])")[0]["value"][1] == "1", output
        prometheus.wait_for("run_rank:snn_data_wait:ratio_rate5m")
        yield prometheus
    finally:
        kill(prometheus.process)


@pytest.mark.faults
def test_every_panel_has_data_from_a_run_that_prometheus_scrapes(watched, tmp_path):
    for variable in ("snn_run_info", 'snn_run_info{job="chispike"}'):
        assert [one["metric"]["run"] for one in watched.ask(f"last_over_time({variable}[5m])")] == ["watched"]
    ranks = watched.ask("last_over_time(snn_train_last_step_timestamp_seconds[5m])")
    assert sorted(one["metric"]["rank"] for one in ranks) == ["0", "1"]
    empty = [
        (name, title, expression)
        for name, dashboard in dashboards().items()
        for title, expression in queries(dashboard)
        if not any(f"snn_{metric}" in expression for metric in CONDITIONAL) and not watched.ask(filled(expression))
    ]
    assert empty == []
    for expression in script("picture").GRAPHS:
        assert watched.ask(re.sub(r"\bsnn_\w+", r"last_over_time(\g<0>[5m])", expression)), expression
    assert [one["metric"]["alertname"] for one in watched.ask('ALERTS{severity="critical"}')] == []
    picture = tmp_path / "watched.png"
    for run, code, said in (("watched", 0, ""), ("other", 1, "holds nothing of run 'other' within 30 minutes")):
        words = [str(picture), "--url", watched.url, "--run", run]
        drawn = subprocess.run([sys.executable, DRAW, *words], capture_output=True, text=True)
        assert (drawn.returncode, said in drawn.stderr) == (code, True), drawn.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.faults
def test_grafanas_own_code_draws_the_panels(watched, tmp_path):
    """About a minute, most of it npm's."""
    if missing := [name for name in ("node", "npm", "chromium") if shutil.which(name) is None]:
        pytest.skip(f"there is no {' and no '.join(missing)}; apt install nodejs npm chromium")
    draw = ["node", str(ROOT / "tests/k8s/grafana/pictures.mjs"), "--packages", str(tmp_path / "packages")]
    words = ["--url", watched.url, "--scrape", "1", "--scale", "1", "--out", str(tmp_path)]

    def drawn(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*draw, *words, *more], capture_output=True, text=True, timeout=400)

    whole = drawn("--run", "watched", "--all")
    if whole.returncode == 69:
        pytest.skip(whole.stderr)
    assert whole.returncode == 0, whole.stderr
    for name, dashboard in dashboards().items():
        kinds = [panel["type"] for panel in dashboard["panels"]]
        count = sum(kind in ("timeseries", "stat", "bargauge", "table") for kind in kinds)
        curves = kinds.count("timeseries")
        assert f"{name}.png: {count} panels, {curves} with curves\n" in whole.stdout
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    chosen = drawn("--run", "watched")
    assert chosen.returncode == 0, chosen.stderr
    assert (tmp_path / "monitoring.png").exists()
    other = drawn("--run", "other")
    assert (other.returncode, "holds nothing of run 'other' within 30 minutes" in other.stderr) == (1, True)


def filled(expression: str) -> str:
    """With a dashboard's variables as Grafana puts them in, asked for what was there within the last five minutes."""
    for name, value in {"job": "chispike", "run": "watched", "node": ".+", "__rate_interval": "5m"}.items():
        expression = expression.replace(f"${name}", value)
    # The run has ended, so its series are stale.
    return re.sub(r"(\b(?:\w+:)?snn_\w+(?::\w+)?\{[^}]*\}|\bup\{[^}]*\})(?!\[)", r"last_over_time(\1[5m])", expression)
