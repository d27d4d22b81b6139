"""Who may import whom (ARCHITECTURE.md), read from the source and from running processes."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("agevlm_mlx", "app", "convert")

#: Part of agevlm_mlx -> the parts it may import, besides itself. A part is a sub-package or,
#: for the modules at the top, the module. "*" stands for every part.
MAY_IMPORT = {
    "errors": set(),
    "atomic": set(),
    "hub": {"errors"},
    "openblas": set(),
    "console": set(),
    "malloc": set(),
    "launchers": {"errors"},
    "parallel": {"errors"},
    "steps": {"errors", "config", "evaluation"},
    "config": {"errors"},
    "models": {"errors", "config", "kernels"},
    "kernels": {"errors", "config"},
    # Level with each other: masks and pictures need one another's formats.
    "data": {"errors", "atomic", "config", "sam"},
    "sam": {"errors", "atomic", "config", "data", "models"},
    "weights": {"errors", "hub", "config", "models", "data"},
    "quantization": {"errors", "models"},
    "training": {
        "errors",
        "atomic",
        "config",
        "hub",
        "launchers",
        "models",
        "data",
        "sam",
        "weights",
    },
    # What a person sees of a run: curves, and where the model looks.
    "watch": {
        "errors",
        "atomic",
        "config",
        "data",
        "models",
        "sam",
        "evaluation",
        "training",
        "curves",
        "look_sheet",
    },
    "curves": {"errors", "atomic", "training"},
    "look_sheet": {"errors", "data", "evaluation"},
    "evaluation": {"errors", "atomic", "config", "models", "data", "sam", "weights"},
    # What is asked and what is right: no benchmark ever sees a model.
    "benchmarks": {"errors", "config", "data", "sam", "evaluation"},
    "respondents": {
        "errors",
        "config",
        "hub",
        "data",
        "evaluation",
        "foreign",
        "generation",
        "image_store",
        "prompts",
        "sampling",
        "weights",
    },
    "foreign": {"errors", "config", "hub", "data", "evaluation", "weights", "foreign_inside"},
    "foreign_inside": {"errors", "data", "kernels", "models"},
    "analysis": {
        "errors",
        "atomic",
        "config",
        "models",
        "data",
        "sam",
        "weights",
        "evaluation",
        "respondents",
    },
    "lmms_eval": {
        "errors",
        "data",
        "generation",
        "sampling",
        "weights",
        "respondents",
        "evaluation",
    },
    "benchmarking": {
        "errors",
        "config",
        "models",
        "data",
        "training",
        "evaluation",
        "generation",
        "openblas",
    },
    # Many trainings and what they come to: it starts the commands, it does not import them.
    "experiments": {
        "errors",
        "atomic",
        "config",
        "models",
        "data",
        "sam",
        "weights",
        "training",
        "evaluation",
        "benchmarks",
        "parallel",
        "steps",
        "curves",
    },
    "sampling": {"errors"},
    "image_store": {"errors", "data", "models"},
    "prompts": {"errors", "data", "models", "image_store"},
    "generation": {"errors", "data", "models", "evaluation", "image_store", "prompts", "sampling"},
    "conversation": {
        "errors",
        "config",
        "hub",
        "data",
        "models",
        "evaluation",
        "weights",
        "image_store",
        "prompts",
        "sampling",
        "generation",
    },
    "prompt_cache": {"errors", "atomic", "weights", "conversation"},
    "serving": {
        "errors",
        "data",
        "models",
        "evaluation",
        "weights",
        "image_store",
        "prompts",
        "sampling",
        "generation",
    },
    # Commands and the package itself see everything below them.
    "__init__": "*",
    "__main__": {"cli"},
    "analyze": "*",
    "benchmark": "*",
    "chat": "*",
    "cli": {"errors"},
    "data_command": "*",
    "demo": "*",
    "evaluate": "*",
    "experiment": "*",
    "generate": "*",
    "scenes": "*",
    "serve": "*",
    "teach": "*",
    "train": "*",
}
#: Heavy or optional package -> the only files that may name it.
ONLY_IN = {
    "torch": {
        "agevlm_mlx/sam/teacher.py",
        "agevlm_mlx/sam/torchvision_ops.py",
        "convert/source.py",  # only for .bin files
    },
    "torchvision": {"agevlm_mlx/sam/teacher.py", "agevlm_mlx/sam/torchvision_ops.py"},
    "segment_anything": {"agevlm_mlx/sam/teacher.py", "agevlm_mlx/sam/torchvision_ops.py"},
    "gradio": {"app/ui.py", "app/tabs.py", "app/compare.py", "app/parts.py"},
    "webview": {"app/window.py"},
    "starlette": {"agevlm_mlx/serving/app.py"},
    "pyarrow": {"agevlm_mlx/data/columnar.py"},
    "matplotlib": {
        "agevlm_mlx/analysis/figures.py",
        "agevlm_mlx/curves.py",
        "agevlm_mlx/experiments/figures.py",
    },
    "tensorboardX": {"agevlm_mlx/training/trackers.py"},
    "trackio": {"agevlm_mlx/training/trackers.py"},
    "wandb": {"agevlm_mlx/training/trackers.py"},
    "mlx_vlm": {"agevlm_mlx/foreign.py", "convert/mlx_vlm_adapter.py"},
    "lmms_eval": {"agevlm_mlx/lmms_eval.py"},
    "uvicorn": {"agevlm_mlx/serve.py"},
}


def files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path, nested: bool = True) -> Iterator[tuple[int, int, str]]:
    """(line, level, dotted name) of every import statement, or only of those that run when
    the module itself is imported."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(module) if nested else module.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, 0, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, node.level, f"{node.module or ''}.{alias.name}".lstrip(".")


def absolute(path: Path, level: int, name: str) -> str:
    """The absolute dotted name of an import in `path`."""
    if not level:
        return name
    package = path.relative_to(ROOT).parent.parts
    return ".".join((*package[: len(package) - level + 1], name))


def part(dotted: str) -> str:
    """The part of agevlm_mlx that a dotted name (agevlm_mlx.x.y) is in."""
    name = dotted.split(".")[1] if "." in dotted else "__init__"
    known = (ROOT / "agevlm_mlx" / name).is_dir() or (ROOT / "agevlm_mlx" / f"{name}.py").is_file()
    return name if known else "__init__"  # `from agevlm_mlx import load`


def home(path: Path) -> str:
    """The part of agevlm_mlx that a file of it is in."""
    parts = path.relative_to(ROOT / "agevlm_mlx").parts
    return parts[0] if len(parts) > 1 else path.stem


def test_parts_import_only_what_lies_below_them():
    wrong = []
    for path in sorted((ROOT / "agevlm_mlx").rglob("*.py")):
        mine = home(path)
        assert mine in MAY_IMPORT, f"{path}: say in MAY_IMPORT what {mine!r} may import"
        for line, level, name in imports(path):
            dotted = absolute(path, level, name)
            if dotted.split(".")[0] != "agevlm_mlx" or dotted == "agevlm_mlx.__version__":
                continue
            theirs, allowed = part(dotted), MAY_IMPORT[mine]
            if theirs != mine and allowed != "*" and theirs not in allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {mine} imports {theirs}")
    assert not wrong, "\n".join(wrong)


def module_graph() -> dict[str, set[str]]:
    """Module of agevlm_mlx -> the modules of it whose import it starts with its own."""
    folder = ROOT / "agevlm_mlx"
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(folder.rglob("*.py"))
    }
    graph = {}
    for name, path in names.items():
        found = {absolute(path, level, dotted) for _, level, dotted in imports(path, nested=False)}
        # `from .x import y`: y is a module or something in the module x.
        found = {d if d in names else d.rpartition(".")[0] for d in found}
        # A package's __init__ may gather its own modules, which import its siblings.
        graph[name] = {d for d in found if d in names and not name.startswith(f"{d}.")}
    return graph


def test_no_module_imports_itself_in_a_circle():
    graph, done = module_graph(), set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        if name != "agevlm_mlx":  # its __init__ names the public functions, lazily
            visit(name, ())


def test_the_library_never_imports_the_programs():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((ROOT / "agevlm_mlx").rglob("*.py"))
        for line, level, name in imports(path)
        if absolute(path, level, name).split(".")[0]
        in ("app", "convert", "agevlm_app", "agevlm_convert", "tests", "scripts")
    ]
    assert not wrong


def test_heavy_packages_are_named_only_where_they_belong():
    wrong = []
    for path in files():
        where = path.relative_to(ROOT).as_posix()
        for line, level, name in imports(path):
            allowed = ONLY_IN.get(name.split(".")[0]) if not level else None
            if allowed is not None and where not in allowed:
                wrong.append(f"{where}:{line}: {name}")
    assert not wrong


@pytest.mark.parametrize("package", ["app", "convert"])
def test_renamed_packages_are_flat_and_import_themselves_relatively(package):
    # They are installed as agevlm_app and agevlm_convert: `import app` works only in a checkout.
    folder = ROOT / package
    assert not [p for p in folder.rglob("*.py") if p.parent != folder]
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted(folder.glob("*.py"))
        for line, level, name in imports(path)
        if not level and name.split(".")[0] in ("app", "convert", "agevlm_app", "agevlm_convert")
    ]
    assert not wrong


def loaded_after(code: str) -> set[str]:
    """The modules that a fresh Python has imported after running `code`."""
    report = "\nimport sys; print('MODULES', *sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code + report], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split()[1:])


def test_importing_the_package_is_cheap():
    loaded = loaded_after("import agevlm_mlx, agevlm_mlx.cli")
    assert not loaded & {"mlx.core", "mlx_lm", "transformers", "numpy", "PIL", "torch"}


@pytest.mark.e2e
def test_answering_needs_neither_torch_nor_the_teacher_nor_gradio(tiny_checkpoint):
    # transformers imports torch by itself wherever it is installed: here it is not.
    absent = {"torch", "torchvision", "segment_anything", "gradio"}
    loaded = loaded_after(
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "import numpy as np\n"
        "from PIL import Image\n"
        "from agevlm_mlx import load, generate\n"
        "image = Image.fromarray(np.full((48, 64, 3), 200, np.uint8))\n"
        f"it = load({str(tiny_checkpoint)!r})\n"
        "generate(it.model, it.tokenizer, it.preprocessor, 'Is there a dog?', image, max_tokens=4)"
    )
    assert "agevlm_mlx.models.agevlm" in loaded
    assert not [
        n for n in loaded if n.startswith(("agevlm_mlx.sam.teacher", "agevlm_mlx.training"))
    ]
