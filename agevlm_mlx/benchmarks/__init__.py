"""Every benchmark, one file each. A new one is a file that makes a `Benchmark`, and a line here."""

from importlib import import_module

from ..evaluation.benchmark import Benchmark

#: Name, and the module that has it.
_MODULES = {
    "scenes": "scenes",
    "pope": "pope",
    "chair": "chair",
    "amber": "amber",
    "hallusionbench": "hallusionbench",
    "mmvp": "mmvp",
    "cvbench": "cvbench",
    "realworldqa": "realworldqa",
    "mme": "mme",
    "winoground": "winoground",
    "refcoco": "refcoco",
}
NAMES = tuple(_MODULES)


def benchmark(name: str) -> Benchmark:
    """The benchmark of one of `NAMES`."""
    return import_module(f".{_MODULES[name]}", __name__).BENCHMARK
