"""Train the embedded vision encoder: which nouns are in the picture, and where?

It stands in for the pretrained CLIP of the paper, as small as the rest of the embedded example.
Every token is classified: which noun covers its cell, or none. The scenes are made for this
purpose alone: any nouns together (but for the pairs of the `combos` split), every object in a look
of its own, some pictures coarse or noisy. The result is shipped as `agevlm_mlx/assets/encoder`.

    python scripts/train_encoder.py --out agevlm_mlx/assets/encoder

Takes about 0.37 s a step on one core. Progress and the held-out mean average precision of the
pictures' nouns are printed; the last line of the log is stored in the folder's config.json. A run
that was stopped goes on where it last printed.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, cast

import agevlm_mlx  # noqa: F401  (before mlx: it opens the fast BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from agevlm_mlx.config import read_json, to_dict
from agevlm_mlx.data.image import Preprocessor, load_image
from agevlm_mlx.data.nouns import Split
from agevlm_mlx.data.scenes import write_scenes
from agevlm_mlx.data.styles import Style
from agevlm_mlx.models.vision.vit import VitConfig, VitEncoder
from agevlm_mlx.sam.targets import rle_decode

#: Seeds of the scenes made here; no other split of the project uses them.
TRAIN_SEED, HELD_OUT_SEED = 7001, 7002
CONFIG = VitConfig(image_size=128, patch_size=16, stem_channels=(24, 48), num_hidden_layers=4)
#: Held-out pictures: split and style.
HELD_OUT: dict[str, tuple[Split, Style]] = {
    "plain": ("val", "plain"),
    "varied": ("balanced", "varied"),
}


class CellClassifier(nn.Module):
    """One logit per noun and token, the last of none."""

    def __init__(self, encoder: VitEncoder, nouns: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.width, nouns + 1)

    def __call__(self, pixels: mx.array) -> mx.array:
        return self.head(self.encoder(pixels))

    def loss(self, pixels: mx.array, cells: mx.array) -> mx.array:
        """cells: i32 [B S], the number of each cell's noun, -1 where that is open."""
        terms = nn.losses.cross_entropy(self(pixels), mx.maximum(cells, 0), reduction="none")
        return (terms * (cells >= 0)).sum() / len(cells)

    def scores(self, pixels: mx.array) -> np.ndarray:
        """f32 [B nouns], how much speaks for each noun somewhere in the picture."""
        logits = self(pixels)
        log_p = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return np.array(log_p[..., :-1].max(axis=1))


def read_scenes(
    folder: Path, preprocessor: Preprocessor, grid: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """u8 pixels [n Hi Wi 3] of a scenes folder, its nouns 0/1 [n nouns], and those of the cells
    i32 [n S]: the noun that covers most of a cell, if a quarter at least; the number of nouns
    where there is next to nothing; -1 between."""
    coco = read_json(folder / "instances.json")
    column = {c["id"]: i for i, c in enumerate(coco["categories"])}
    row = {image["id"]: i for i, image in enumerate(coco["images"])}
    labels = np.zeros((len(row), len(column)), np.float32)
    covered = np.zeros((len(row), grid[0] * grid[1]), np.float16)
    cells = np.full(covered.shape, len(column), np.int32)
    pixels = []
    geometry = None
    for image in coco["images"]:
        path = folder / "images" / Path(image["file_name"]).name
        squeezed, geometry = preprocessor.resized(load_image(path))
        pixels.append(np.asarray(squeezed))
    assert geometry is not None  # the same for all
    for annotation in coco["annotations"]:
        at, noun = row[annotation["image_id"]], column[annotation["category_id"]]
        labels[at, noun] = 1
        coverage = geometry.mask_to_grid(rle_decode(annotation["segmentation"]), grid)
        cells[at] = np.where(coverage > covered[at], noun, cells[at])
        covered[at] = np.maximum(coverage, covered[at])
    cells = np.where(covered >= 0.25, cells, np.where(covered > 0.05, -1, len(column)))
    return np.stack(pixels), labels, cells.astype(np.int32)


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Over the nouns that occur, each ranked over all images."""
    values = []
    for column in range(labels.shape[1]):
        hits = labels[np.argsort(-scores[:, column], kind="stable"), column]
        if hits.any():
            precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
            values.append(precision[hits > 0].mean())
    return float(np.mean(values))


def augment(
    pixels: np.ndarray, cells: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Mirror, shift by whole cells, change brightness and contrast, and show some in squares of
    2 or 4 px and some with noise: shapes have to be known without their details, too."""
    B, side = len(cells), round(cells.shape[1] ** 0.5)
    grid = cells.reshape(B, side, side)
    if rng.random() < 0.5:
        pixels, grid = pixels[:, :, ::-1], grid[:, :, ::-1]
    moved, size = rng.integers(0, side, size=2), pixels.shape[1] // side
    pixels = np.roll(pixels, moved * size, axis=(1, 2)).astype(np.float32)
    grid = np.roll(grid, moved, axis=(1, 2))
    for i in np.flatnonzero(rng.random(B) < 0.4):
        square, n = int(rng.choice([2, 4])), pixels.shape[1]
        rows = pixels[i].reshape(n // square, square, n // square, square, 3).mean((1, 3))
        pixels[i] = rows.repeat(square, 0).repeat(square, 1)
    for i in np.flatnonzero(rng.random(B) < 0.2):
        pixels[i] += rng.normal(0, rng.uniform(4, 20), pixels[i].shape)
    light, contrast = rng.uniform(-25, 25, (B, 1, 1, 1)), rng.uniform(0.75, 1.25, (B, 1, 1, 1))
    pixels = np.clip((pixels - 127) * contrast + 127 + light, 0, 255)
    return pixels, grid.reshape(B, -1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--n", type=int, default=40000, help="training scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("runs/encoder"), help="scenes go here")
    parser.add_argument("--out", type=Path, default=Path("runs/encoder/model"))
    args = parser.parse_args()

    mx.random.seed(args.seed)
    encoder = VitEncoder(CONFIG)
    preprocessor = Preprocessor.from_dict(encoder.preprocessing)
    write_scenes(args.data / "train-varied", args.n, TRAIN_SEED, "balanced", None, "varied")
    pixels, labels, cells = read_scenes(args.data / "train-varied", preprocessor, encoder.grid)
    held_out = {}
    for name, (split, style) in HELD_OUT.items():
        write_scenes(args.data / f"val-{style}", 600, HELD_OUT_SEED, split, None, style)
        held_out[name] = read_scenes(args.data / f"val-{style}", preprocessor, encoder.grid)[:2]
    mean, std = (np.array(encoder.preprocessing[f"image_{k}"], np.float32) for k in ("mean", "std"))

    def normalised(picked: np.ndarray) -> mx.array:
        return mx.array((picked.astype(np.float32) / 255 - mean) / std)

    model = CellClassifier(encoder, labels.shape[1])
    mx.eval(model.parameters())
    warmup = optim.linear_schedule(0, args.lr, 100)
    cosine = optim.cosine_decay(args.lr, args.steps - 100, 0.02 * args.lr)
    schedule = optim.join_schedules([warmup, cosine], [100])
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.02)

    def held_out_map(pixels: np.ndarray, labels: np.ndarray) -> float:
        parts = np.array_split(pixels, len(pixels) // 50)
        scores = np.concatenate([model.scores(normalised(p)) for p in parts])
        return round(mean_average_precision(scores, labels), 4)

    gradient = nn.value_and_grad(model, lambda x, y: model.loss(x, y))
    first, spent, state = 1, 0.0, args.out / "state.safetensors"
    args.out.mkdir(parents=True, exist_ok=True)
    if state.exists():
        kept, about = cast(Any, mx.load(str(state), return_metadata=True))
        optimizer.init(model.trainable_parameters())
        model.load_weights([(k[6:], v) for k, v in kept.items() if k.startswith("model.")])
        optimizer.state = tree_unflatten(
            [(k[10:], v) for k, v in kept.items() if k.startswith("optimizer.")]
        )
        first, spent = int(about["step"]) + 1, float(about["seconds"])
        print(f"going on after step {first - 1}", flush=True)
    started, summary = time.time() - spent, {}
    for step in range(first, args.steps + 1):
        # Pictures and what is done to them are a function of the step.
        epoch, place = divmod((step - 1) * args.batch_size, len(pixels) - args.batch_size + 1)
        order = np.random.default_rng([args.seed, epoch]).permutation(len(pixels))
        chosen = order[place : place + args.batch_size]
        rng = np.random.default_rng([args.seed, step, 1])
        picked, wanted = augment(pixels[chosen], cells[chosen], rng)
        value, grads = gradient(normalised(picked), mx.array(wanted))
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        mx.eval(model.state, optimizer.state, value)
        if step % 250 == 0 or step == args.steps:
            summary = {
                "step": step,
                "loss": round(float(value.item()), 3),
                **{f"map_{name}": held_out_map(*pair) for name, pair in held_out.items()},
                "seconds": round(time.time() - started),
            }
            print(json.dumps(summary), flush=True)
            parts = {"model": model.parameters(), "optimizer": optimizer.state}
            everything = dict(cast(Any, tree_flatten(parts)))
            about = {"step": str(step), "seconds": str(time.time() - started)}
            new = args.out / "new.safetensors"
            mx.save_safetensors(str(new), everything, about)
            new.replace(state)

    weights = tree_map(lambda w: w.astype(mx.float16), encoder.parameters())
    mx.save_safetensors(
        str(args.out / "model.safetensors"), dict(tree_flatten(weights)), {"format": "mlx"}
    )
    record = {
        "vision_config": to_dict(CONFIG),
        "made_by": "scripts/train_encoder.py",
        "scenes": args.n,
        "seed": args.seed,
        "held_out": summary,
    }
    (args.out / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    state.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
