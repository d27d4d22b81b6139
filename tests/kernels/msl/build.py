"""Compile a kernel to a program, once: later calls and other processes find it in a cache."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .errors import CompileError, ToolError
from .source import Parameter, Source, read_source
from .tracing import Call

SHIM = Path(__file__).parent / "shim"

#: How each pass compiles a kernel.
MODES = {
    "fast": ["-O2"],
    # The instrumentation alone: instead of the thread sanitizer's library, shim/checker.h
    # receives a call for every memory access.
    "check": ["-O1", "-g", "-fsanitize=thread"],
    "asan": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}
_ALWAYS = [
    *("-std=c++17", "-fPIE", "-w", "-ffp-contract=off", "-fno-math-errno", "-fsigned-char"),
    *("-fno-exceptions", "-fno-rtti", f"-I{SHIM}"),
]
# What clang needs besides for "check", to leave no access out of the checker's sight.
_CLANG_CHECK = [
    *("-mllvm", "-tsan-instrument-read-before-write"),
    *("-mllvm", "-disable-loop-idiom-all"),  # loops become memcpy calls otherwise
]


@dataclass(frozen=True)
class Program:
    """An executable that runs one kernel in one mode."""

    path: Path
    parameters: list[Parameter]
    #: Zero if it was in the cache.
    compile_seconds: float


def build(call: Call, mode: str) -> Program:
    """Compile the kernel of ``call``.

    The environment variables ``CXX`` and ``MSL_CXXFLAGS`` choose the compiler and add flags
    (``-DMSL_USE_UCONTEXT``), ``MSL_CACHE`` the folder of the cache.

    Raises:
        CompileError: it does not compile.
        ToolError: no C++ compiler, or one that cannot build the harness.
    """
    source = read_source(call)
    text = _program(call, source)
    compiler = _compiler()
    runtime = _runtime(compiler, sanitized=mode == "asan")
    flags = [*_ALWAYS, *MODES[mode], *_extra_flags()]
    if mode == "check" and "clang" in _version(compiler):  # which g++ is on macOS
        flags += _CLANG_CHECK

    def compile_kernel(folder: Path) -> None:
        (folder / "kernel.cpp").write_text(text)
        compiled = _tool([*compiler, *flags, "-c", "kernel.cpp", "-o", "kernel.o"], folder)
        if compiled.returncode:
            raise CompileError(_first_errors(compiled.stderr))
        link = [*compiler, "-pie", "kernel.o", str(runtime), "-o", "program", "-lm"]
        if sys.platform == "darwin":
            link.remove("-pie")  # every program is one
        else:
            link.append("-ldl")
        if mode == "asan":
            link.append("-fsanitize=address,undefined")
        _must(link, folder)
        if sys.platform == "darwin" and mode == "check":
            _must(["dsymutil", "program"], folder)  # line numbers

    started = time.monotonic()
    folder, found = _cached((text, compiler, flags, str(runtime)), compile_kernel)
    seconds = 0.0 if found else time.monotonic() - started
    return Program(folder / "program", source.parameters, seconds)


def _program(call: Call, source: Source) -> str:
    """The kernel, and the function by which the runtime calls it."""
    arguments = []
    for p in source.parameters:
        if not p.is_buffer:
            arguments.append(f"msl_attribute(attributes->{p.attribute})")
            continue
        type = re.sub(r"\b(const|constant|device)\b", "", p.type).strip()
        buffer = f"buffers[{p.attribute.removeprefix('buffer(').removesuffix(')')}]"
        if type.endswith("&"):
            arguments.append(f"*(const {type[:-1]}*){buffer}")
        else:
            arguments.append(f"({type}){buffer}")
    return (
        "#include <metal_stdlib>\n"
        f'#line 1 "{call.name}.metal"\n{source.text}\n'
        '#line 1 "glue"\n'
        'extern "C" MSL_UNCHECKED void msl_call_kernel(\n'
        "    void** buffers, const MslAttributes* attributes) {\n"
        f"  {source.instance}({', '.join(arguments)});\n}}\n"
    )


def _runtime(compiler: tuple[str, ...], sanitized: bool) -> Path:
    """The object file that every program links: the scheduler, and the checker's hooks."""
    flags = ["-std=c++17", "-O1", "-fPIE", *_extra_flags()]
    if sanitized:
        flags.append("-DMSL_ASAN")

    def compile_runtime(folder: Path) -> None:
        _must([*compiler, *flags, "-c", str(SHIM / "runtime.cpp"), "-o", "runtime.o"], folder)

    folder, _ = _cached((compiler, flags), compile_runtime)
    return folder / "runtime.o"


def _cached(key: object, make: Callable[[Path], None]) -> tuple[Path, bool]:
    """(the folder of what ``make(folder)`` builds, whether it was there). ``key`` is everything
    that decides the outcome, besides the shim and the compiler's version."""
    content = repr((key, _version(_compiler()), _shim_hash()))
    folder = _cache_folder() / hashlib.sha256(content.encode()).hexdigest()[:32]
    if folder.is_dir():
        return folder, True
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Built aside and renamed, so that no process sees a half-built folder.
    aside = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        make(aside)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder, False


def _cache_folder() -> Path:
    if chosen := os.environ.get("MSL_CACHE"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/agevlm-mlx/kernels"
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "agevlm-mlx/kernels"


@cache
def _shim_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(SHIM.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _compiler() -> tuple[str, ...]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    candidates = [chosen] if chosen else [["g++"], ["clang++"], ["c++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return tuple(command)
    names = ", ".join(command[0] for command in candidates)
    raise ToolError(f"no C++ compiler ({names}) found: install g++ or clang++, or set CXX")


def _extra_flags() -> list[str]:
    return shlex.split(os.environ.get("MSL_CXXFLAGS", ""))


@cache
def _version(compiler: tuple[str, ...]) -> str:
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout


def _tool(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def companion(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a tool that comes with the compiler (for another CPU than this one, with that CPU's)."""
    asked = subprocess.run(
        [*_compiler(), f"-print-prog-name={command[0]}"], capture_output=True, text=True
    )
    return _tool([asked.stdout.strip() or command[0], *command[1:]], Path.cwd())


def _must(command: list[str], folder: Path) -> None:
    done = _tool(command, folder)
    if done.returncode:
        raise ToolError(f"{shlex.join(command)} failed:\n{_first_errors(done.stderr)}")


def _first_errors(output: str) -> str:
    errors = [line for line in output.splitlines() if "error" in line]
    return "\n".join(errors[:20]) or output[:4000]
