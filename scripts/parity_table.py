"""Write docs/parity.md: how far our encoders, pixels, masks and imports are from the reference.

Runs the tests of the conversions, which record each figure, and sets them in a table.

  python scripts/parity_table.py
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "mlx",
    "mlx-lm",
    "mlx-vlm",
    "open_clip_torch",
    "segment-anything",
    "timm",
    "torch",
    "transformers",
)
TESTS = ("tests/convert", "tests/sam/test_mlx_sam_parity.py")
HEADER = """# Parity with the reference implementations

Random weights made by the reference library, saved as it saves them, converted by the commands
that a user runs, and compared on the CPU in float32. For an encoder the figure is the largest
error of any output token, relative to that token's largest value; for pixels the largest
difference on a scale from 0 to 1 (one step of 8 bits is 0.0039). Pixels are compared with
Pillow's resizing, on which these weights were trained: transformers' newer processors, which
resize with torchvision, are up to two steps away from its own Pillow ones, and so from ours. For
language models the figure is the largest error of a logit, relative to the largest one (with closed
gates it is absolute); for quantised models the share of answer tokens that are predicted otherwise.
For SAM's masks they are absolute: the largest error of a logit (a mask is where it is above 0), of
an estimated IoU, of a number of the image embedding, or the share of a mask's pixels that differ.

The tests fail above the bound. Made by `python scripts/parity_table.py` on {machine}, Python
{python}:
{packages}.

"""


def table(rows: list[dict]) -> str:
    """One Markdown section for each part, its cases in the order of the tests."""
    lines = []
    for part in dict.fromkeys(row["part"] for row in rows):
        lines += [f"## {part}", "", "| reference | case | measured | bound |", "|---|---|---|---|"]
        for row in rows:
            if row["part"] == part:
                lines.append(
                    f"| {row['reference']} | {row['case']} | {row['figure']:.2g} "
                    f"| {row['bound']:.2g} |"
                )
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "figures.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not chaos", *TESTS]
        environment = {**os.environ, "AGEVLM_PARITY_RECORD": str(record)}
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if status:
            return status
        rows = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    header = HEADER.format(
        machine=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages=", ".join(f"{name} {version(name)}" for name in PACKAGES),
    )
    path = ROOT / "docs/parity.md"
    path.write_text(header + table(rows), encoding="utf-8")
    print(f"{path}: {len(rows)} figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
