"""What sorting by length and packing do for a step, and how fast pictures are decoded.

    python scripts/measure_batches.py [--images 96] [--cpu]

Side by side: texts as they come (plain), batches of like length (bucket), several texts in a row
(pack). `padding` is the share of positions that hold no text, over an epoch. `tokens/s` counts
text without padding through forward and backward pass, the arms in turn; batches are made
beforehand. Then the data alone: `Prefetch` over 640x480 JPEGs.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """About a million parameters, 4 layers of which 2 look."""
    text = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 512,
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
    words = ["a", "dog", "is", "on", "the", "left", "of", "two", "red", "birds"]
    for image in range(images):
        path = folder / f"{image}.png"
        Image.fromarray(rng.integers(255, size=(64, 64, 3), dtype=np.uint8)).save(path)
        for text in range(texts):
            length = int(np.clip(rng.lognormal(np.log(median), spread), 4, 200))
            answer = " ".join(rng.choice(words, length))
            turns = (Turn("user", "What is in the image?"), Turn("assistant", answer))
            yield Record(f"{image}-{text}", path, turns, kind="caption")


def measure(model: AgeVLM, arms: Mapping[str, Sequence[Batch]], clock: Callable[[], float]) -> None:
    """Print a line an arm."""
    params = named_parameters(model)
    seconds = dict.fromkeys(arms, 0.0)
    for step in range(-1, len(arms["plain"])):
        for name, batches in arms.items():
            start = clock()
            mx.eval(loss_and_gradients(model, params, batches[max(step, 0)], Losses()))
            if step >= 0:  # the first pass also pays for what MLX sets up once
                seconds[name] += clock() - start
    rates = {name: sum(map(used, batches)) / seconds[name] for name, batches in arms.items()}
    for name, batches in arms.items():
        places = sum(group.ids.size for batch in batches for group in batch.groups)
        padding = 1 - sum(map(used, batches)) / places
        print(
            f"  {name:16} padding {padding:6.1%}  tokens/s {rates[name]:7.0f}  "
            f"x{rates[name] / rates['plain']:.2f}",
            flush=True,
        )


def used(batch: Batch) -> int:
    """Positions that hold text; without segments: up to the last that has a loss in its row."""
    count = 0
    for group in batch.groups:
        if group.segments is not None:
            count += int((group.segments >= 0).sum())
        else:
            ends = (group.loss_mask > 0) * np.arange(1, group.ids.shape[2] + 1)
            count += int(ends.max(axis=2).sum())
    return count


def compare(
    title: str,
    model: AgeVLM,
    tokenizer: Any,
    preprocessor: Preprocessor,
    records: Records,
    groups: Sequence[GroupSpec],
    batch_size: int,
    clock: Callable[[], float],
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
        arms[name] = [batches.batch(step) for step in range(len(records.images) // batch_size)]
    measure(model, arms, clock)


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
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--cpu", action="store_true", help="processor seconds: for a busy machine")
    args = parser.parse_args()
    clock = time.process_time if args.cpu else time.perf_counter
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
            16,
            clock,
        )
        llama = small_llama(len(shipped.tokenizer))  # pyright: ignore[reportArgumentType]
        for title, texts, median, spread, size in (
            ("one conversation an image, median 25 words", 1, 25, 0.7, 8),
            ("four conversations an image, median 12 words", 4, 12, 0.7, 4),
            ("eight short questions an image, median 6 words", 8, 6, 0.6, 4),
        ):
            pictures = folder / str(texts)
            pictures.mkdir()
            compare(
                f"log-normal lengths, {title}; small llama, {size} images a step:",
                llama,
                shipped.tokenizer,
                shipped.preprocessor,
                Records.from_list(conversations(pictures, args.images // 2, texts, median, spread)),
                (GroupSpec(kinds=("caption",), n=texts),),
                size,
                clock,
            )
        print("decoding and tokenising, 640x480 JPEG:", flush=True)
        decoding(folder, shipped.tokenizer, args.images, (64, 224))


if __name__ == "__main__":
    main()
