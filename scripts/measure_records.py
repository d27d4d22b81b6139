"""What reading a large data set costs: seconds and memory until training could begin.

    python scripts/measure_records.py                         # 100,000 records, 20,000 images
    python scripts/measure_records.py --n 665298 --images 340000 --layout array --repeats 1

Makes a data set of records of about 1 KB about empty image files in a temporary folder, then, in
a process of its own each, indexes it (`read_records`) and, for comparison, parses all of it into
a list of `Record`. Memory is the growth of the process's peak over what it was before.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SENTENCE = "a small brown dog runs over the wet grass by an old wooden fence in the rain"


def write(folder: Path, n: int, images: int, layout: str) -> Path:
    """A data set of our records (lines) or of LLaVA's (an array in one line)."""
    names = [f"images/{i // 1000:03}/{i:06}.jpg" for i in range(images)]
    for name in names[::1000]:
        (folder / name).parent.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    path = folder / ("data.jsonl" if layout == "lines" else "data.json")
    with path.open("w") as file:
        file.write("" if layout == "lines" else "[")
        for i in range(n):
            end = "\n" if layout == "lines" else "]" if i + 1 == n else ", "
            file.write(json.dumps(record(i, names[i % images], layout)) + end)
    return path


def record(i: int, image: str, layout: str) -> dict:
    """One of about 1 KB: two questions with answers and, in ours, two phrases with boxes."""
    words = SENTENCE.split()
    text = " ".join(words[(i + k) % len(words)] for k in range(48))
    role, content, user, assistant = (
        ("role", "content", "user", "assistant")
        if layout == "lines"
        else ("from", "value", "human", "gpt")
    )
    turns = [
        {role: user, content: f"What is in picture {i}?"},
        {role: assistant, content: text},
        {role: user, content: "And what else?"},
        {role: assistant, content: text},
    ]
    made = {"id": f"{i:09}", "image": image, "conversations": turns}
    if layout == "lines":
        word = text.split()[0]
        place = {"text": word, "start": 0, "end": len(word), "box": [10, 20, 110.5, 220.5]}
        made["phrases"] = [{**place, "turn": 1}, {**place, "turn": 3}]
    return made


MEASURE = """
import resource, sys, time
from pathlib import Path
import agevlm_mlx
from agevlm_mlx.data.record_set import read_records

def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6

before, start, cpu = peak(), time.perf_counter(), time.process_time()
records = read_records(Path(sys.argv[1]))
if sys.argv[2] == "list":
    records = list(records)
seconds, grown = time.perf_counter() - start, peak() - before
cpu = time.process_time() - cpu
assert len(records) == int(sys.argv[3])
start = time.perf_counter()
step = max(len(records) // 1000, 1)
for i in range(0, len(records), step):
    records[i]
each = (time.perf_counter() - start) / len(range(0, len(records), step))
print(f"{seconds:6.2f} s  {cpu:6.2f} s of CPU  {grown:7.1f} MB  {each * 1e6:6.1f} us a look-up")
"""


def main() -> int:
    """Make the data, measure both ways, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--n", type=int, default=100_000, help="records")
    parser.add_argument("--images", type=int, default=20_000, help="images they are about")
    parser.add_argument("--layout", choices=("lines", "array"), default="lines")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = write(Path(folder), args.n, args.images, args.layout)
        size = path.stat().st_size
        print(
            f"{args.n} records, {args.images} images, {args.layout}: {size / 1e6:.0f} MB, "
            f"{size / args.n:.0f} bytes a record (made in {time.perf_counter() - start:.0f} s)"
        )
        for how in ("index", "list"):
            for _ in range(args.repeats):
                command = [sys.executable, "-c", MEASURE, str(path), how, str(args.n)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                print(f"{how:6} {done.stdout.rstrip()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
