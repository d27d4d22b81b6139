"""What the wheel holds, and that it works where there is no checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from agevlm_mlx.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def test_every_package_of_the_tree_is_listed():
    # A sub-package missing here works in a checkout and is absent from the wheel.
    found = {
        ".".join((name, *init.parent.relative_to(ROOT / folder).parts))
        for name, folder in SETUPTOOLS["package-dir"].items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert found == set(SETUPTOOLS["packages"])


def test_every_folder_with_python_files_is_a_package():
    for folder in SETUPTOOLS["package-dir"].values():
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path.parent


def test_pins_cover_what_the_project_asks_for():
    pins = {
        line.partition("==")[0]
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    wanted = [*PROJECT["project"]["dependencies"]]
    for extra in PROJECT["project"]["optional-dependencies"].values():
        wanted += extra
    names = {w.split("[")[0].split(">")[0].split("=")[0].strip() for w in wanted}
    assert names <= pins


def test_the_version_is_the_one_of_the_changelog_and_citation():
    version = PROJECT["project"]["version"]
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built from a copy so that the tree stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("agevlm_mlx", "app", "convert"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    run = subprocess.run(
        [*command, str(folder), str(source)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel and, by a .pth file, this one's other packages."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    (site,) = (folder / "venv").glob("lib/python3*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "venv/bin/python")]
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *install], check=True, timeout=120)
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return folder


def run_there(elsewhere: Path, *command: str) -> subprocess.CompletedProcess[str]:
    name, *rest = command
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(elsewhere / "venv/bin" / name), *rest],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.e2e
def test_the_wheel_holds_every_file_and_no_other(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = set()
    for name, folder in SETUPTOOLS["package-dir"].items():
        if name != "agevlm_mlx":
            kinds = ("*.py", "*.css", "*.js")
            wanted |= {f"{name}/{p.name}" for kind in kinds for p in (ROOT / folder).glob(kind)}
    for path in (ROOT / "agevlm_mlx").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            wanted.add(path.relative_to(ROOT).as_posix())
    assert held == wanted


@pytest.mark.e2e
@pytest.mark.parametrize("script", PROJECT["project"]["scripts"])
def test_every_script_helps_where_there_is_no_checkout(elsewhere, script):
    run = run_there(elsewhere, script, "--help")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"usage: {script}")
    assert run.stderr == ""


@pytest.mark.e2e
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_where_there_is_no_checkout(elsewhere, command):
    run = run_there(elsewhere, "agevlm", command, "--help")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"usage: agevlm {command}")


@pytest.mark.e2e
def test_the_wheel_takes_no_common_names(elsewhere):
    find = "from importlib.util import find_spec as f; "
    run = run_there(elsewhere, "python", "-c", find + "print(f('agevlm_app').origin)")
    assert Path(run.stdout.strip()).is_relative_to(elsewhere), "expected the wheel's own package"
    for name in ("app", "convert", "tests", "scripts", "recipes"):
        run = run_there(elsewhere, "python", "-c", find + f"assert f({name!r}) is None")
        assert run.returncode == 0, f"the wheel installs a package named {name}"


@pytest.mark.e2e
def test_the_shipped_model_answers_where_there_is_no_checkout(elsewhere):
    from PIL import Image

    Image.new("RGB", (80, 60), "white").save(elsewhere / "image.png")
    run = run_there(
        elsewhere, "agevlm", "generate", "--image", "image.png", "--prompt", "Is there a dog?"
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
