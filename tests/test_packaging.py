import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import crfnet

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = ("crfnet", "ops", "pyproject.toml", "README.md", "LICENSE")


def sources() -> set[str]:
    """The files of the package by the names they are imported under; ``ops`` is ``crfnet/ops``."""
    own = {path for path in (REPOSITORY / "crfnet").rglob("*.py") if "ops" not in path.relative_to(REPOSITORY).parts}
    names = {path.relative_to(REPOSITORY).as_posix() for path in own}
    return names | {
        f"crfnet/ops/{path.relative_to(REPOSITORY / 'ops').as_posix()}" for path in (REPOSITORY / "ops").rglob("*.py")
    }


PIP = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
OFFLINE = ["--no-build-isolation", "--no-deps", "--no-index"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """What a package is built from, in a folder of its own so that the checkout stays clean."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("the build backend, setuptools, is not installed")
    copy = tmp_path_factory.mktemp("copy")
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture(scope="module")
def built(copy, tmp_path_factory) -> tuple[Path, Path]:
    """A wheel and an sdist."""
    out = tmp_path_factory.mktemp("out")
    subprocess.run([*PIP, "wheel", *OFFLINE, "-w", str(out), "."], cwd=copy, check=True, timeout=6000)
    code = f"import setuptools.build_meta as backend; backend.build_sdist({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, timeout=6000, capture_output=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def run_elsewhere(folder: Path, setup: str, expected: Path) -> None:
    """Use the package in a fresh process that sees torch but no other crfnet, and check where it came from."""
    code = f"""
import site, sys
sys.path += {sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})!r}  # without reading .pth files
{setup}
import crfnet.data, crfnet.models, crfnet.ops
from crfnet.cli import main
assert crfnet.__file__.startswith({str(expected)!r}), crfnet.__file__
assert crfnet.ops.__file__.startswith({str(expected)!r}), crfnet.ops.__file__
assert "ops" not in sys.modules
main(["--version"])
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=folder, capture_output=True, text=True, timeout=6000, env=clean()
    )
    assert (done.returncode, done.stdout) == (0, f"crfnet {crfnet.__version__}\n"), done.stderr


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_listed_packages_are_those_of_the_tree():
    listed = set(re.findall(r'"(crfnet[\w.]*)"', re.search(r"^packages = \[(.*)\]$", settings(), re.M).group(1)))
    assert listed == {os.path.dirname(name).replace("/", ".") for name in sources()}


def settings() -> str:
    return (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")


def test_wheel_holds_the_package_and_nothing_else(built):
    wheel, _ = built
    assert wheel.name == f"crfnet-{crfnet.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"crfnet-{crfnet.__version__}.dist-info/METADATA").decode()
        scripts = archive.read(f"crfnet-{crfnet.__version__}.dist-info/entry_points.txt").decode()
        licence = archive.read(f"crfnet-{crfnet.__version__}.dist-info/licenses/LICENSE").decode()
    assert names == sources() | {"crfnet/py.typed"}
    assert "crfnet = crfnet.cli:main" in scripts
    assert "License-Expression: Apache-2.0" in metadata and "Apache License" in licence
    needs = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", metadata, re.M)
    assert sorted(needs) == ["numpy", "pillow", "scipy", "torch", "triton"]
    assert re.search(r"^Requires-Dist: triton.*sys_platform == .linux.", metadata, re.M)


def test_wheel_runs_from_any_folder(built, tmp_path):
    with zipfile.ZipFile(built[0]) as archive:
        archive.extractall(tmp_path / "site")
    run_elsewhere(tmp_path, f"sys.path.insert(0, {str(tmp_path / 'site')!r})", tmp_path / "site")


def test_editable_install_runs_from_any_folder(copy, tmp_path):
    where = ["--prefix", str(tmp_path), "--ignore-installed", "--no-warn-script-location"]
    subprocess.run([*PIP, "install", *OFFLINE, *where, "-e", "."], cwd=copy, check=True, timeout=6000, env=clean())
    (record,) = tmp_path.rglob("crfnet-*.dist-info")
    folder = str(record.parent)  # first on the path: another editable crfnet would have a finder of the same name
    run_elsewhere(tmp_path, f"sys.path.insert(0, {folder!r}); site.addsitedir({folder!r})", copy)


def test_sdist_builds_the_same_package(built):
    _, sdist = built
    root = f"crfnet-{crfnet.__version__}"
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(f"{root}/") for name in archive.getnames()}
    kept = {name.replace("crfnet/ops/", "ops/") for name in sources()}
    assert kept | {"pyproject.toml", "README.md", "LICENSE", "crfnet/py.typed"} <= names
    assert not any(name.startswith("crfnet/ops") for name in names)  # the link stays at home, the mapping serves


def test_ops_is_never_a_top_level_package():
    done = subprocess.run(
        [sys.executable, "-c", "import ops"], cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert done.returncode != 0 and "import crfnet.ops" in done.stderr


def test_the_link_is_relative():
    link = REPOSITORY / "crfnet" / "ops"
    assert link.is_symlink() and os.readlink(link) == os.path.join("..", "ops")
