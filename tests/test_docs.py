"""What pages and comments name is there: paths, modules, links, imports; and the map of the rooms is whole."""

import ast
import importlib
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("pipeline", "launch", "data_prep", "benchmarks", "tests", "docs", "k8s")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*")) if path.is_file()]
PAGES = sorted([*ROOT.glob("[A-Z]*.md"), *(path for path in FILES if path.suffix == ".md")])
SOURCES = [path for path in FILES if path.suffix == ".py"]
OTHERS = [path for path in FILES if path.suffix in (".cpp", ".yaml", ".yml")]
OTHERS += [ROOT / name for name in ("Makefile", "Dockerfile", "pyproject.toml")]

_PATH = re.compile(rf"(?<![\w/.{{}}$-])(?:{'|'.join(ROOMS)})/[\w.*/-]*")
_FILE = re.compile(r"(?<![\w/.{}$*-])(?:\w+/)*\w+\.py\b")
_MODULE = re.compile(rf"\bpython3? -m ((?:{'|'.join(ROOMS)})(?:\.[a-z_]\w*)*)(?![\w$]|\.[A-Z$])")  # not NAME, $$name
_DOTTED = re.compile(r"(?<![\w/.-])(?:pipeline|launch|data_prep|benchmarks)(?:\.[a-z]\w*)+(?:\.[A-Z]\w+)?")
_LINK = re.compile(r"\]\(([^)\s]+)(?: [^)]*)?\)")
_IMPORT = re.compile(r"^(?:from|import) (?:pipeline|launch|data_prep)\b.*$", re.MULTILINE)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module(name: str) -> Path | None:
    """The file of a module or package, else None."""
    path = ROOT / name.replace(".", "/")
    return next((one for one in (path.with_suffix(".py"), path / "__init__.py") if one.exists()), None)


def has_dotted(name: str) -> bool:
    """Whether `name` is a module, or something that the module before its last word holds."""
    if module(name) is not None:
        return True
    holder, _, last = name.rpartition(".")
    path = module(holder)
    return path is not None and re.search(rf"\b{last}\b", path.read_text(encoding="utf-8")) is not None


def missing(text: str) -> set[str]:
    """What `text` names of this repository that is not there."""
    gone = set()
    for found in _PATH.findall(text):
        path = found.rstrip("./-")
        if not (any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()):
            gone.add(path)
    for name in _MODULE.findall(text):
        folder = ROOT / name.replace(".", "/")
        if not (folder.with_suffix(".py").exists() or (folder / "__main__.py").exists()):
            gone.add(f"python -m {name}")
    gone |= {name for name in _DOTTED.findall(text) if not name.endswith((".py", ".md")) and not has_dotted(name)}
    known = {f"/{relative(path)}" for path in SOURCES}
    return gone | {name for name in _FILE.findall(text) if not any(path.endswith(f"/{name}") for path in known)}


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def comments(path: Path) -> str:
    """Comments and docstrings of a Python file, those of fields too."""
    with path.open("rb") as file:
        parts = [token.string for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            parts.append(node.value.value)
    return "\n".join(parts)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_what_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    assert not missing(text)
    for link in _LINK.findall(text):
        if not re.match(r"\w+:", link):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.is_relative_to(ROOT), link
            assert target.exists(), link
            assert not anchor or anchor in slugs(target), link
    for line in _IMPORT.findall(text):
        statement = ast.parse(line.partition("#")[0]).body[0]
        assert isinstance(statement, ast.ImportFrom), line
        for alias in statement.names:
            holder = importlib.import_module(str(statement.module))
            assert hasattr(holder, alias.name) or module(f"{statement.module}.{alias.name}"), line


def test_what_comments_name_is_there():
    gone = {relative(path): found for path in SOURCES if (found := missing(comments(path)))}
    gone |= {relative(path): found for path in OTHERS if (found := missing(path.read_text(encoding="utf-8")))}
    assert not gone


def test_a_name_that_is_gone_is_seen():
    named = "pipeline/chi/bucket.py, `chi/bucket.py`, bucket.py and pipeline.chi.bucket.Tap; python -m launch.cli runs"
    assert missing(named) == {
        "pipeline/chi/bucket.py",
        "chi/bucket.py",
        "bucket.py",
        "pipeline.chi.bucket.Tap",
        "launch.cli",
        "python -m launch.cli",
    }
    assert not missing("`pipeline/chi/tap.py`, chi/tap.py, pipeline.chi.tap.Tap; python -m data_prep; data_prep/*.py")
    assert missing("python -m launch.cluster") == {"python -m launch.cluster"}  # a package that is no command


def test_the_map_has_every_file_of_every_room():
    rows = re.findall(r"^\| `([\w/]+/)` \|[^|]*\| (.*) \|$", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    listed = {room: set(re.findall(r"`([\w.]+)`", files)) for room, files in rows}
    for top in ("pipeline", "launch", "data_prep"):
        for folder in [ROOT / top, *(path for path in (ROOT / top).rglob("*") if path.is_dir())]:
            there = {path.name for path in folder.iterdir() if path.suffix in (".py", ".cpp")}
            empty = {"__init__.py"} if f"{relative(folder)}/" != "pipeline/config/" else set()
            if there:
                assert there - empty == listed.get(f"{relative(folder)}/"), relative(folder)
