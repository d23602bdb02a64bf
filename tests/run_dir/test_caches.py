"""A home that is missing, cannot be written, or belongs to nobody: caches go elsewhere, and no library warns."""

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

from pipeline.run_dir import caches
from tests.conftest import ROOT


@pytest.fixture
def unknown_user(tmp_path, monkeypatch):
    """The process runs as if its user id were in no list of users."""

    def unknown(_uid: int):
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(caches.tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"chispike-{os.getuid()}"


def test_a_home_that_can_be_written_is_left_alone(tmp_path):
    assert caches.stand_ins({"HOME": str(tmp_path), "USER": "u"}) == {}
    assert caches.line({}) == ""


def test_without_home_and_user_every_library_gets_a_folder_of_the_users_own(unknown_user):
    found = caches.stand_ins({"TRITON_CACHE_DIR": "/cache/triton"})
    assert found["LOGNAME"] == f"uid-{os.getuid()}"
    assert found["HOME"] == str(unknown_user)
    assert found["MPLCONFIGDIR"] == f"{unknown_user}/matplotlib"
    assert "TRITON_CACHE_DIR" not in found, "what is set stays"
    assert unknown_user.stat().st_mode & 0o077 == 0
    assert caches.line(found) == f"caches are kept in {unknown_user}, since there is no home that can be written"


def test_a_home_that_cannot_be_written_stays_the_home_but_for_caches(unknown_user, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != tmp_path / "home")
    (tmp_path / "home").mkdir()
    found = caches.stand_ins({"HOME": str(tmp_path / "home"), "LOGNAME": "u"})
    assert "HOME" not in found, "it may hold credentials"
    assert "LOGNAME" not in found
    assert found["XDG_CACHE_HOME"] == f"{unknown_user}/cache"
    missing = caches.stand_ins({"HOME": str(tmp_path / "missing"), "LOGNAME": "u"})
    assert missing["HOME"] == str(unknown_user)


def test_a_folder_that_others_can_write_is_not_used_for_code(unknown_user):
    unknown_user.mkdir()
    unknown_user.chmod(0o777)
    first = caches.private()
    assert first != unknown_user
    unknown_user.rmdir()
    unknown_user.symlink_to(first)
    assert caches.private() not in (unknown_user, first)


def test_our_own_cache_is_where_it_can_be_written(unknown_user, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert caches.folder() == tmp_path / "xdg" / "chispike"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert caches.folder() == unknown_user / "cache" / "chispike"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    assert caches.folder() == unknown_user / "cache" / "chispike"


NOBODY: dict = {"user": 23456, "group": 23456, "extra_groups": []}


def python_for_nobody() -> str:
    """A Python of this version that any user may start; this one may lie in somebody's home."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become a user that no list has")
    for python in (sys.executable, f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"):
        with contextlib.suppress(OSError):
            if (
                subprocess.run([python, "-c", "import ctypes"], capture_output=True, check=False, **NOBODY).returncode
                == 0
            ):
                return python
    pytest.skip("needs a Python that any user may start")


def need_open(python: str, *folders: str) -> None:
    """Skips the test where another user may not enter one of the folders, as below one of `mktemp -d`."""
    for folder in folders:
        look = [python, "-c", "import os, sys; os.listdir(sys.argv[1])", folder]
        if subprocess.run(look, cwd="/", capture_output=True, check=False, **NOBODY).returncode:
            pytest.skip(f"needs a checkout and packages that any user may read; {folder} is closed to others")


@pytest.fixture
def open_folder():
    """A folder that other users can read: pytest closes its own to them whenever another pytest starts."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.faults
def test_a_user_id_that_nobody_knows_trains_reports_and_evaluates(digits, open_folder):
    """The checkout and the working folder are read-only for it, and it may not read the folders of PATH."""
    python, packages = python_for_nobody(), sysconfig.get_path("purelib")
    need_open(python, str(ROOT), packages)
    shards = Path(shutil.copytree(digits, open_folder / "digits"))
    run_dir, temporary = open_folder / "run", open_folder / "temporary"
    for folder in (run_dir, temporary):
        folder.mkdir()
    for path in (run_dir, temporary, shards, *shards.rglob("*")):
        path.chmod(0o777)
    closed = open_folder / "closed"
    closed.mkdir(mode=0o700)
    environ = {"PATH": f"{closed}/bin:/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{packages}"}
    environ |= {"TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    train = ["launch.local", "--recipe", "digits", "--data.path", str(shards), "--run_dir", str(run_dir)]
    for words in (
        [*train, "--train.epochs", "0.1", "--metrics.port", "0"],
        ["pipeline.report", str(run_dir)],
        ["launch.evaluate", str(run_dir)],
        ["data_prep", "info", str(shards / "train")],
    ):
        command = [python, "-m", *words]
        done = subprocess.run(
            command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120, check=False, **NOBODY
        )
        assert done.returncode == 0, done.stdout + done.stderr
        for word in ("Traceback", "MPLCONFIGDIR", "Permission denied", "could not be compiled"):
            assert word not in done.stdout + done.stderr
    assert (run_dir / "report.html").exists()
    assert [path.name for path in temporary.iterdir()] == [f"chispike-{NOBODY['user']}"]
