"""Imports run one way (each room may import what stands to its right), and the configuration needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BASE = {"pipeline", "pipeline.caches", "pipeline.cores", "pipeline.errors"}
CONFIG = BASE | {"pipeline.config", "pipeline.config_document", "pipeline.config_network", "pipeline.config_training"}
MANIFEST = "pipeline.data.manifest"
IMAGES = "pipeline.data.image_headers"

# Longest prefix wins; a module may import its own room and what is listed.
ALLOWED = {
    "pipeline": set(),
    "pipeline.caches": set(),
    "pipeline.errors": set(),
    "pipeline.cores": set(),
    "pipeline.config": BASE | {"pipeline.config_checks", "pipeline.config_network", "pipeline.config_training"},
    "pipeline.config_checks": BASE,
    "pipeline.config_document": BASE | {"pipeline.config"},
    "pipeline.config_network": BASE | {"pipeline.config_checks"},
    "pipeline.config_training": BASE | {"pipeline.config_checks"},
    "pipeline.data": CONFIG,
    "pipeline.snn": CONFIG,
    "pipeline.chi": CONFIG | {"pipeline.snn"},
    "pipeline.deepspeed_settings": CONFIG,
    "pipeline.engine": CONFIG | {"pipeline.deepspeed_settings", "pipeline.snn"},
    "pipeline.checkpoint": CONFIG,
    "pipeline.ema": {"pipeline.checkpoint"},
    "pipeline.init_from": CONFIG | {"pipeline.checkpoint_files", "pipeline.config_checks", "pipeline.snn"},
    "pipeline.checkpoint_files": BASE,
    "pipeline.checkpoint_writer": BASE | {"pipeline.checkpoint_files"},
    "pipeline.metrics": CONFIG,
    "pipeline.metric_table": set(),
    "pipeline.snapshots": {"pipeline.metric_table"},
    "pipeline.scrapers": set(),
    "pipeline.exporter": CONFIG | {"pipeline.scrapers", "pipeline.snapshots"},
    "pipeline.rank_metrics": CONFIG
    | {"pipeline.data", "pipeline.exporter", "pipeline.metric_table", "pipeline.metrics", "pipeline.snapshots"},
    "pipeline.run_folder": CONFIG | {"pipeline.source"},
    "pipeline.source": set(),
    "pipeline.trained": CONFIG | {"pipeline.checkpoint_files", "pipeline.snn"},
    "pipeline.pace": BASE,
    "pipeline.rank_log": BASE,
    "pipeline.replicas": BASE,
    "pipeline.nonfinite": CONFIG | {"pipeline.chi", "pipeline.data"},
    "pipeline.evaluate": CONFIG | {"pipeline.data", "pipeline.snn"},
    "pipeline.page": set(),
    "pipeline.comparison": CONFIG | {"pipeline.metrics", "pipeline.page", "pipeline.run_folder"},
    "pipeline.report": CONFIG | {"pipeline.chi", "pipeline.comparison", "pipeline.metrics", "pipeline.page"},
    "pipeline.progress": CONFIG
    | {
        "pipeline.chi",
        "pipeline.data",
        "pipeline.metrics",
        "pipeline.nonfinite",
        "pipeline.rank_metrics",
        "pipeline.trackers",
    },
    "pipeline.run_lock": BASE,
    "pipeline.stops": BASE,
    "pipeline.step_trace": set(),
    "pipeline.trackers": CONFIG | {"pipeline.metrics", "pipeline.run_folder"},
    "pipeline.assemble": {"pipeline"},
    "pipeline.train": {"pipeline"},
    "launch": {"pipeline", "launch"},
    "data_prep": BASE | {MANIFEST, IMAGES, "data_prep"},
}


def modules() -> list[Path]:
    return [path for room in ("pipeline", "launch", "data_prep") for path in sorted((ROOT / room).rglob("*.py"))]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def within(name: str, room: str) -> bool:
    return name == room or (name.startswith(room + ".") and room != "pipeline")


def room_of(name: str) -> str:
    return max((room for room in ALLOWED if name == room or name.startswith(room + ".")), key=len)


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            below = ROOT / Path(*node.module.split("."))
            for alias in node.names:
                is_module = (below / f"{alias.name}.py").exists() or (below / alias.name / "__init__.py").exists()
                names.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return {name for name in names if name.split(".")[0] in ("pipeline", "launch", "data_prep", "benchmarks", "tests")}


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_a_module_imports_only_what_its_room_may(path):
    room = room_of(name_of(path))
    allowed = ALLOWED[room] | {room}
    free = room in ("pipeline.assemble", "pipeline.train", "launch")
    for name in imported(path):
        if free and name.startswith("pipeline"):
            continue
        assert any(within(name, other) for other in allowed), f"{name_of(path)} imports {name}"


def test_the_rule_sees_a_forbidden_import(tmp_path):
    path = tmp_path / "neurons.py"
    path.write_text("from pipeline.chi import controller\nimport pipeline.data.loader\n")
    seen = imported(path)
    assert seen == {"pipeline.chi.controller", "pipeline.data.loader"}
    assert not any(within(name, other) for name in seen for other in ALLOWED["pipeline.snn"])


def test_checking_a_command_line_loads_no_torch():
    code = (
        "import sys; import launch.train, launch.evaluate, launch.export, launch.supervise; "
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_controller_knows_nothing_of_ranks():
    assert "distributed" not in (ROOT / "pipeline/chi/controller.py").read_text()
