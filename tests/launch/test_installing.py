"""What is installed, and where: `chi` alone, DALI of another CUDA, systems and versions of Python that cannot train."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipeline.run_dir import run_folder
from tests.conftest import ROOT

ALONE = """
import sys
sys.path[:0] = sys.argv[1:3]

def fails(name):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        return name.startswith(str(error.name))

# What is here is torch, numpy, and what they themselves ask for.
assert all(map(fails, ("deepspeed", "nvidia.dali", "webdataset", "prometheus_client", "PIL", "matplotlib", "sklearn")))

from pipeline import chi
from torch import nn
import torch
from pipeline.snn.neurons import Neuron, Rule

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.spikes, self.out = nn.Linear(8, 32), Neuron(Rule(shape="triangle")), nn.Linear(32, 3)

    def forward(self, x):
        return self.out(self.spikes(self.first(x)[None], num_steps=3)).mean(0)

torch.manual_seed(0)
net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
pilot = chi.attach(net, optimizer, steps=40, interval=1, target=0.5, target_end=0.5)
pilot.calibrate(torch.randn(32, 8))
for _ in range(40):
    nn.functional.cross_entropy(net(torch.randn(32, 8)), torch.randint(0, 3, (32,))).backward()
    optimizer.step()
    optimizer.zero_grad()
assert abs(float(pilot.indicators.coverage[0]) - 0.5) < 0.1, pilot.indicators
pilot.load_state_dict(pilot.state_dict())
print(sys.modules["pipeline"].__file__)
"""


def needed_by(names: list[str]) -> set[str]:
    """These distributions and all that they require here, directly or through others."""
    found: set[str] = set()
    while names:
        name = names.pop()
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        asked = [Requirement(line) for line in requires]
        names += [each.name for each in asked if each.marker is None or each.marker.evaluate({"extra": ""})]
        names = [each for each in names if each not in found]
    return found


def link(distribution: str, site: Path) -> None:
    """Puts links to what a distribution has installed into `site`."""
    for file in importlib.metadata.files(distribution) or []:
        folder = Path(str(file.locate())).parents[len(file.parts) - 1]
        # A folder that several distributions share, such as `nvidia`, is made anew: a link would include the others'.
        depth = 1 if len(file.parts) == 1 or (folder / file.parts[0] / "__init__.py").exists() else 2
        there = site.joinpath(*file.parts[:depth])
        if file.parts[0] in ("..", "__pycache__") or there.exists():
            continue
        there.parent.mkdir(parents=True, exist_ok=True)
        there.symlink_to(folder.joinpath(*file.parts[:depth]))


def test_chi_runs_where_there_is_nothing_but_torch_and_numpy(tmp_path):
    """Installed as docs/chi.md says, and run by a Python that finds what torch and numpy require and no more."""
    page = (ROOT / "docs/chi.md").read_text(encoding="utf-8")
    assert re.search(r"^pip install --no-deps \.", page, re.M)
    source, installed, site = tmp_path / "source", tmp_path / "installed", tmp_path / "site"
    for name in ("pipeline", "launch", "data_prep", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-build-isolation"]
    subprocess.run([*pip, "--no-deps", "--target", str(installed), "."], cwd=source, check=True)
    for name in needed_by(["torch", "numpy"]):
        link(name, site)
    # Without site, user site and environment it sees only the links, nothing else that is installed beside torch.
    done = subprocess.run([sys.executable, "-I", "-S", "-c", ALONE, str(installed), str(site)],
                          capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(installed / "pipeline/__init__.py")


def run_as(assignment: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A module's command under a Python that reports another version or system."""
    code = f"import runpy, sys; {assignment}; sys.argv = {list(words)}; "
    code += f"runpy.run_module({words[0]!r}, run_name='__main__', alter_sys=True)"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("module", ["launch.make_venv", "launch.train", "launch.evaluate", "data_prep"])
@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("sys.platform = 'darwin'", "this system is darwin, and training runs on Linux only"),
        ("sys.platform = 'win32'", "this system is win32, and training runs on Linux only"),
        ("sys.version_info = (3, 9, 18, 'final', 0)", "Python 3.9.18 is not supported; use 3.10 to 3.13"),
        ("sys.version_info = (3, 14, 0, 'final', 0)", "Python 3.14.0 is not supported; use 3.10 to 3.13"),
    ],
)
def test_a_system_or_python_that_cannot_train_gets_one_line(module, assignment, said, tmp_path):
    done = run_as(assignment, module, str(tmp_path / "new"))
    assert done.returncode == 64
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "name", ["launch/make_venv.py", "launch/__init__.py", "data_prep/__init__.py", "pipeline/__init__.py"]
)
def test_an_older_python_reads_what_has_to_refuse_it(name):
    ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 7))


def test_the_versions_of_python_are_those_of_pyproject():
    import pipeline

    text = (ROOT / "pyproject.toml").read_text()
    oldest, newest = pipeline.OLDEST, pipeline.NEWEST
    assert f'requires-python = ">={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"' in text


def test_the_dali_for_cuda_12_has_the_pinned_version():
    """It is the same release as the one for CUDA 13, which it replaces."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    pinned = re.search(r"^nvidia-dali-cuda130==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned
    assert f"nvidia-dali-cuda120=={pinned[1]}" in page


@pytest.mark.parametrize(("installed", "said"), [(["cuda130"], "cuda130"), (["cuda120"], "cuda120"), ([], None)])
def test_a_run_says_which_dali_it_has(installed, said, tmp_path, monkeypatch):
    for name in installed:
        about = tmp_path / f"nvidia_dali_{name}-9.8.7.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nvidia-dali-{name}\nVersion: 9.8.7\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    versions = run_folder._versions()
    dali = {name: version for name, version in versions.items() if "dali" in name}
    assert dali == ({f"nvidia-dali-{said}": "9.8.7"} if said else {"nvidia-dali": "absent"})
