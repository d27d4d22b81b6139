"""What sorting by length and packing do for a step, and how many pictures a second threads decode.

    python scripts/measure_batches.py [--steps 8] [--images 256]

Side by side: rows as they come (plain), batches of like length (bucket), several texts in a row
(pack). `padding` is the share of positions that hold no text, `images/s` counts forward and
backward pass with their evaluation on this machine (data made beforehand, the three arms in turn,
median). Then the same for data alone: `Prefetch` over 640x480 JPEGs of noise.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import agevlm_mlx  # before mlx: opens the fast BLAS

# isort: split
import mlx.core as mx
import numpy as np
from PIL import Image

from agevlm_mlx import weights
from agevlm_mlx.config import FusionConfig, ModelConfig
from agevlm_mlx.data.batches import Batch, Batches, GroupSpec
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.data.prefetch import Prefetch
from agevlm_mlx.data.record_set import Records, read_records
from agevlm_mlx.data.records import Record, Turn
from agevlm_mlx.data.scenes import write_scenes
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.training.objective import loss_and_gradients
from agevlm_mlx.training.rules import named_parameters
from agevlm_mlx.training.stages import Losses

ARMS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "bucket": {"bucket": 16},
    "pack": {"pack": True},
    "bucket and pack": {"bucket": 16, "pack": True},
}
#: The texts of the recipe's longest stage with questions of all kinds.
SCENES = (
    GroupSpec(kinds=("caption",), n=1),
    GroupSpec(kinds=("presence",), n=4),
    GroupSpec(kinds=("attribute", "position", "count"), n=3),
)


def small_llama(vocabulary: int) -> AgeVLM:
    """About 5 million parameters, 4 layers of which 2 look."""
    text = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 1024,
        "rms_norm_eps": 1e-5,
    }
    vision = {"model_type": "agevlm_vit", "image_size": 64}
    fusion = FusionConfig(layers=(1, 3), gate_init=0.5)
    return AgeVLM(ModelConfig(text_config=text, vision_config=vision, fusion_config=fusion))


def conversations(
    folder: Path, images: int, texts: int, median: float, spread: float
) -> Iterator[Record]:
    """`texts` conversations an image of log-normal length, as instruction data has them:
    most short, some several times longer."""
    rng = np.random.default_rng(0)
    words = "a dog and two birds are on the grass to the left of the red car".split()
    for image in range(images):
        path = folder / f"{image}.png"
        Image.fromarray(rng.integers(255, size=(64, 64, 3), dtype=np.uint8)).save(path)
        for text in range(texts):
            length = int(np.clip(rng.lognormal(np.log(median), spread), 4, 700))
            answer = " ".join(rng.choice(words, length))
            turns = (Turn("user", "What is in the image?"), Turn("assistant", answer))
            yield Record(f"{image}-{text}", path, turns, kind="caption")


def measure(model: AgeVLM, arms: Mapping[str, Sequence[Batch]], batch_size: int) -> None:
    """Print a line an arm."""
    params = named_parameters(model)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for step in range(-1, min(map(len, arms.values()))):
        for name, batches in arms.items():
            start = time.perf_counter()
            mx.eval(loss_and_gradients(model, params, batches[max(step, 0)], Losses()))
            if step >= 0:  # the first pass also pays for what MLX sets up once
                seconds[name].append(time.perf_counter() - start)
    base = float(np.sum(seconds["plain"]))
    for name, batches in arms.items():
        groups = [group for batch in batches for group in batch.groups]
        places = sum(group.ids.size for group in groups)
        total = float(np.sum(seconds[name]))
        print(
            f"  {name:16} padding {1 - used(groups) / places:6.1%}  "
            f"positions an image {places / len(batches) / batch_size:7.1f}  "
            f"images/s {batch_size * len(batches) / total:7.1f}  x{base / total:.2f}",
            flush=True,
        )


def used(groups: Sequence[Any]) -> int:
    """Positions that hold text: up to the last token that has a loss, in each row and text."""
    if groups[0].segments is not None:
        return sum(int((group.segments >= 0).sum()) for group in groups)
    columns = [np.arange(1, group.ids.shape[2] + 1) for group in groups]
    return sum(
        int(((g.loss_mask > 0) * c).max(axis=2).sum()) for g, c in zip(groups, columns, strict=True)
    )


def compare(
    title: str,
    model: AgeVLM,
    tokenizer: Any,
    preprocessor: Preprocessor,
    records: Records,
    groups: Sequence[GroupSpec],
    steps: int,
    batch_size: int,
) -> None:
    """Print a table of all arms over the same number of batches."""
    print(title, flush=True)
    mx.eval(model.parameters())
    arms = {}
    for name, options in ARMS.items():
        batches = Batches(
            records,
            tokenizer,
            preprocessor,
            model.grid,
            batch_size=batch_size,
            groups=groups,
            seed=0,
            **options,
        )
        arms[name] = [batches.batch(step) for step in range(steps)]
    measure(model, arms, batch_size)


def decoding(folder: Path, tokenizer: Any, images: int, sizes: Sequence[int]) -> None:
    """Print how many pictures a second `Prefetch` delivers, read for the first time."""
    rng = np.random.default_rng(0)
    turns = (Turn("user", "What is it?"), Turn("assistant", "A dog."))
    records = []
    for number in range(images):
        path = folder / f"{number}.jpg"
        coarse = rng.integers(255, size=(60, 80, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((640, 480)).save(path, quality=90)
        records.append(Record(str(number), path, turns, kind="caption"))
    data = Records.from_list(records)
    for size in sizes:
        for workers in (1, 2, 4):
            if workers > max(2, os.cpu_count() or 1):
                continue
            batches = Batches(
                data,
                tokenizer,
                Preprocessor(image_size=size),
                (8, 8),
                batch_size=16,
                groups=(GroupSpec(kinds=("caption",)),),
                seed=0,
            )
            start = time.perf_counter()
            with Prefetch(batches.batch, range(images // 16), workers, 4) as made:
                count = sum(len(batch.pixels) for batch in made)
            rate = count / (time.perf_counter() - start)
            print(f"  input {size:3} px, {workers} threads: {rate:6.1f} images/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--images", type=int, default=256)
    args = parser.parse_args()
    shipped = weights.load(None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_scenes(folder / "scenes", args.images, 0)
        compare(
            f"scenes, shipped model ({agevlm_mlx.__version__}), 16 images a step:",
            shipped.model,
            shipped.tokenizer,
            shipped.preprocessor,
            read_records(folder / "scenes"),
            SCENES,
            args.steps,
            16,
        )
        llama = small_llama(len(shipped.tokenizer))  # pyright: ignore[reportArgumentType]
        for title, texts, median, spread in (
            ("one conversation an image, median 70 words", 1, 70, 0.8),
            ("four conversations an image, median 40 words", 4, 40, 0.8),
            ("eight short questions an image, median 12 words", 8, 12, 0.6),
        ):
            pictures = folder / str(texts)
            pictures.mkdir()
            compare(
                f"log-normal lengths, {title}; small llama, 8 images a step:",
                llama,
                shipped.tokenizer,
                shipped.preprocessor,
                Records.from_list(conversations(pictures, args.images, texts, median, spread)),
                (GroupSpec(kinds=("caption",), n=texts),),
                args.steps,
                8,
            )
        print("decoding and tokenising, 640x480 JPEG:", flush=True)
        decoding(folder, shipped.tokenizer, args.images, (64, 224))


if __name__ == "__main__":
    main()
