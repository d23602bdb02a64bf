"""Imports run one way (each room may import what stands to its right), and the configuration needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "pipeline.errors": "",
    "pipeline.config": "errors",
    "pipeline.run_dir": "config errors",
    "pipeline.ranks": "config errors",
    "pipeline.snn": "run_dir config errors",
    "pipeline.data": "ranks run_dir config errors",
    "pipeline.chi": "snn config errors",
    "pipeline.engine": "chi data snn ranks run_dir config errors",
    "pipeline.metrics": "chi data run_dir config errors",
    "pipeline.report": "metrics chi run_dir config errors",
    "pipeline.run": "metrics engine chi data snn ranks run_dir config errors",
    "pipeline.train": "run report metrics engine data snn ranks run_dir config errors",
}
"""Each room of pipeline/ and the rooms that it may import; the package itself holds the version alone."""
SHARED_WITH_DATA_PREP = {
    "pipeline",
    "pipeline.data.manifest",  # the shard format
    "pipeline.data.order",  # the hash that shuffles
    "pipeline.data.decode.image_headers",  # what a whole image is
    "pipeline.data.decode.events",  # what a whole recording is
    "pipeline.errors",
    "pipeline.run_dir.atomic",
    "pipeline.run_dir.caches",
    "pipeline.run_dir.locks",
}


def modules() -> list[Path]:
    return [path for room in ("pipeline", "launch", "data_prep") for path in sorted((ROOT / room).rglob("*.py"))]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def may_import(name: str, other: str) -> bool:
    """Whether the module `name` may import the module `other`."""
    if within(name, "launch"):
        return within(other, "launch") or within(other, "pipeline")
    if within(name, "data_prep"):
        return within(other, "data_prep") or other in SHARED_WITH_DATA_PREP
    if name == "pipeline":
        return False
    room = next(room for room in ROOMS if within(name, room))
    allowed = [room, *(f"pipeline.{other}" for other in ROOMS[room].split())]
    return other == "pipeline" or any(within(other, one) for one in allowed)


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
    for other in imported(path):
        assert may_import(name_of(path), other), f"{name_of(path)} imports {other}"


def test_the_rooms_have_an_order():
    seen: set[str] = set()
    for room, allowed in ROOMS.items():
        assert {f"pipeline.{other}" for other in allowed.split()} <= seen, f"{room} imports a room below it"
        seen.add(room)
    there = {
        ".".join(path.relative_to(ROOT).parts[:2]).removesuffix(".py") for path in (ROOT / "pipeline").rglob("*.py")
    }
    assert there - {"pipeline.__init__"} == seen


def test_the_rule_sees_a_forbidden_import(tmp_path):
    path = tmp_path / "neurons.py"
    path.write_text("from pipeline.chi import controller\nimport pipeline.data.loader\n")
    assert imported(path) == {"pipeline.chi.controller", "pipeline.data.loader"}
    for other in imported(path):
        assert not may_import("pipeline.snn.neurons", other)
        assert may_import("pipeline.engine.engine", other)


def test_no_room_of_pipeline_shows_more_than_a_dozen_entries():
    for folder in [ROOT / "pipeline", *(path for path in (ROOT / "pipeline").rglob("*") if path.is_dir())]:
        entries = [path.name for path in folder.iterdir() if not path.name.startswith("__") and path.name[0] != "."]
        assert len(entries) <= 12, f"{folder.relative_to(ROOT)}: {sorted(entries)}"


def test_checking_a_command_line_loads_no_torch():
    code = (
        "import sys; import launch.train, launch.evaluate, launch.export, launch.supervise; "
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_controller_knows_nothing_of_ranks():
    assert "distributed" not in (ROOT / "pipeline/chi/controller.py").read_text()
