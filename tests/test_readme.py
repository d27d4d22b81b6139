"""Every command and example of README.md is known and works.

Each line of a ```sh block is one of: LONG (run by people and CI, not here), FLAGS (too slow
to run, but its options must exist), RUN (run here, in order, in one scratch folder). A line that is
none of these fails: say here what it is. Each ```python block is run too.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LONG = [
    r"make (demo|test|test-unit|lint|format|clean|help)( [A-Z_]+=\S+)*",
    r"git clone \S+",
    r"cd agevlm-mlx",
    r"(python3? -m )?pip install .+",
    r"(source|\.) \.venv/bin/activate",
    r"(sudo )?(apt-get|dnf|brew) install [\w -]+",
    r"python (scripts|benchmarks)/\w+\.py.*",
    r"curl http://127\.0\.0\.1:8080/.*",
    r"mlx\.launch --hosts [\d.,]+ -- \$\(which agevlm\) train .*",
]
FLAGS = [
    r"agevlm (data|demo|train|evaluate|analyze|teach|chat|serve|benchmark)( .*)?",
    r"agevlm-app( .*)?",
    r"agevlm-convert (assemble|sam|teacher-features|vision) .*",
    r"python -m agevlm_mlx\.\w+( .*)?",
    r"python -m app( .*)?",
    r"python -m convert vision .*",
]
RUN = [
    r"agevlm (generate|scenes) .*",
    r"printf '.*' \| agevlm chat .*",
    r"agevlm(-app|-convert)?( [\w-]+)? --(help|version)",
    r"(agevlm-convert|python -m convert) (quantize|dequantize|verify|export|upload) .*",
]


def text() -> str:
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(), re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """The command lines of the sh blocks, in order, without comments and `.venv/bin/`."""
    joined = re.sub(r"\\\n\s*", " ", "\n".join(blocks("sh")))
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines())
    return [line.replace(".venv/bin/", "") for line in lines if line and not line.startswith("#")]


def kind(line: str) -> str | None:
    """RUN, FLAGS, LONG or None for a command that this file does not know."""
    for name, patterns in (("LONG", LONG), ("RUN", RUN), ("FLAGS", FLAGS)):
        if any(re.fullmatch(pattern, line) for pattern in patterns):
            return name
    return None


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the checkout after `make demo`, with the reader's photo.jpg."""
    folder = tmp_path_factory.mktemp("readme")
    for path in ROOT.iterdir():
        if path.name not in ("runs", ".git", ".venv"):
            (folder / path.name).symlink_to(path)
    (folder / "runs/demo").mkdir(parents=True)
    (folder / "runs/demo/guided").symlink_to(ROOT / "agevlm_mlx/assets/model")
    from PIL import Image

    Image.new("RGB", (320, 240), (120, 160, 90)).save(folder / "photo.jpg")
    return folder


def test_the_two_commands_are_there():
    assert "make demo" in commands()
    assert "`make test`" in text() or "make test" in commands()


@pytest.mark.parametrize("line", commands())
def test_every_command_is_known(line):
    assert kind(line), f"add {line!r} to LONG, FLAGS or RUN in {Path(__file__).name}"


@pytest.mark.parametrize("fence", sorted(set(re.findall(r"^```(\w+)", text(), re.MULTILINE))))
def test_no_command_hides_in_another_kind_of_block(fence):
    assert fence in ("sh", "python", "text", "toml", "json", "bibtex")


@pytest.mark.e2e
@pytest.mark.parametrize("line", [line for line in commands() if kind(line) == "FLAGS"])
def test_the_options_of_a_slow_command_exist(line, scratch):
    words = shlex.split(line)
    start = 3 if words[0] == "python" else 1
    if len(words) > start and re.fullmatch(r"[a-z][a-z-]*", words[start]):
        start += 1  # the sub-command
    run = subprocess.run(
        [*words[:start], "--help"],
        cwd=scratch,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    known = set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", run.stdout))
    used = {word.partition("=")[0] for word in words[start:] if word.startswith("-")}
    assert used <= known


@pytest.mark.e2e
@pytest.mark.parametrize("line", [line for line in commands() if kind(line) == "RUN"])
def test_the_command_works(line, scratch):
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        cwd=scratch,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


@pytest.mark.e2e
@pytest.mark.parametrize("code", blocks("python"))
def test_the_example_works(code, scratch):
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=scratch,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr
