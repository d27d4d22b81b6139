"""The SAM teacher in torch and in MLX: time an image, and memory, on this machine's CPU or GPU.

    python benchmarks/sam_teacher.py
    python benchmarks/sam_teacher.py --size vit_h --threads 8

Each runs in a process of its own. A model of Meta's size with random weights labels one picture of
640 x 480 with 8 boxes, once to warm up and then `--runs` times (the fastest counts); the shipped
teacher labels drawn scenes of 128 x 128 with all their boxes, eight at a time. cpu_s is the time of
all cores together, which says more than the clock where other programs run. Memory is the largest
that the process ever had, its libraries and the reading of the checkpoint included.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from agevlm_mlx import errors
from agevlm_mlx.data.painting import make_scene
from agevlm_mlx.sam.architecture import META

SCENES = 64


@errors.command
def main() -> int:
    """Run the command; see ``--help``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=META, default="vit_b", help="Meta's model")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of either program")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--backend", choices=("torch", "mlx"), help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.backend:
        print(json.dumps(measure(args.backend, args.checkpoint, args.threads, args.runs)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "sam.pth"
        random_weights(args.size, checkpoint)
        for what, path in ((args.size, checkpoint), ("shipped", None)):
            for backend in ("torch", "mlx"):
                row = in_a_process(backend, path, args.threads, args.runs)
                figures = "  ".join(f"{name} {value:.4g}" for name, value in row.items())
                print(f"{what:8} {backend:6} {args.threads} threads  {figures}", flush=True)
    return 0


def random_weights(size: str, path: Path) -> None:
    """A file like Meta's."""
    import torch

    from agevlm_mlx.sam.teacher import build

    torch.manual_seed(0)
    torch.save(build(META[size]).state_dict(), path)


def in_a_process(backend: str, checkpoint: Path | None, threads: int, runs: int) -> dict[str, Any]:
    """`measure` there."""
    command = [sys.executable, __file__, "--backend", backend, "--threads", str(threads)]
    command += ["--runs", str(runs)]
    command += ["--checkpoint", str(checkpoint)] if checkpoint else []
    limits = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), str(threads))
    done = subprocess.run(
        command, env=os.environ | limits, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(backend: str, checkpoint: Path | None, threads: int, runs: int) -> dict[str, float]:
    """Load a teacher and let it label, here."""
    start = time.perf_counter()
    if backend == "torch":
        from agevlm_mlx.sam.teacher import Teacher, set_threads

        set_threads(threads)
        teacher = Teacher(checkpoint)
    else:
        from agevlm_mlx.sam.mlx_teacher import MlxTeacher

        teacher = MlxTeacher(checkpoint)
    loaded = time.perf_counter() - start
    if checkpoint:
        rng = np.random.default_rng(0)
        images = [rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)]
        prompts = [[(20 * i, 10 * i, 200 + 50 * i, 150 + 40 * i) for i in range(8)]]
    else:
        scenes = [make_scene(4_000_000, "nouns", i) for i in range(SCENES)]
        images = [scene.image for scene in scenes]
        prompts = [scene.boxes.tolist() for scene in scenes]
    seconds, work = [], []
    for _ in range(1 + runs):
        start, before = time.perf_counter(), time.process_time()
        for i in range(0, len(images), teacher.batch_size):
            part = slice(i, i + teacher.batch_size)
            teacher.label(images[part], prompts[part])
        seconds.append(time.perf_counter() - start)
        work.append(time.process_time() - before)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return {
        "load_s": loaded,
        "s_per_image": min(seconds[1:]) / len(images),
        "cpu_s_per_image": min(work[1:]) / len(images),
        "images_per_s": len(images) / min(seconds[1:]),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9,
    }


if __name__ == "__main__":
    sys.exit(main())
