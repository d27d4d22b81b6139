"""Train an embedded vision encoder as a tagger: which nouns are in the picture?

It stands in for the pretrained CLIP of the paper, as small as the rest of the embedded
example: the tokens are classified into the training nouns (multi-label) and pooled, on
scenes made for this purpose alone. Two are made:

    python scripts/train_encoder.py --steps 4000 --out agevlm_mlx/assets/encoder
    python scripts/train_encoder.py --large --steps 16000 --n 40000 --out runs/encoder/large

The first is that of the `scenes` recipes, 0.12 s a step on one core. The second, from which the
default model starts, sees pictures of 128 px, of any nouns together and in varied looks, and the
evidence for a noun is its best tokens instead of their mean; 0.35 s a step. Progress and the
held-out mean average precision are printed; the last line of the log is stored in the folder's
config.json. A run that was stopped goes on where it last printed.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import agevlm_mlx  # noqa: F401  (before mlx: it opens the fast BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from agevlm_mlx.config import read_json, to_dict
from agevlm_mlx.data.image import Preprocessor, load_image
from agevlm_mlx.data.scenes import write_scenes
from agevlm_mlx.models.vision.vit import VitConfig, VitEncoder

#: Seeds of the scenes made here; no other split of the project uses them.
TRAIN_SEED, HELD_OUT_SEED = 7001, 7002
LARGE = VitConfig(image_size=128, patch_size=16, stem_channels=(24, 48), num_hidden_layers=4)
#: Held-out pictures: split and style.
HELD_OUT = {
    False: {"val": ("val", "plain")},
    True: {"plain": ("val", "plain"), "varied": ("balanced", "varied")},
}


class Tagger(nn.Module):
    """One logit per noun: of the mean of the tokens, or (`local`) the softly greatest of the
    tokens' own."""

    def __init__(self, encoder: VitEncoder, classes: int, *, local: bool) -> None:
        super().__init__()
        self.encoder, self.local = encoder, local
        self.head = nn.Linear(encoder.width, classes)

    def __call__(self, pixels: mx.array) -> mx.array:
        tokens = self.encoder(pixels)
        if not self.local:
            return 4.0 * self.head(tokens.mean(axis=1)) - 3.0
        return mx.logsumexp(4.0 * self.head(tokens) - 8.0, axis=1)


def read_scenes(folder: Path, preprocessor: Preprocessor) -> tuple[np.ndarray, np.ndarray]:
    """u8 pixels [n Hi Wi 3] and 0/1 labels [n classes] of a scenes folder."""
    coco = read_json(folder / "instances.json")
    column = {c["id"]: i for i, c in enumerate(coco["categories"])}
    row = {image["id"]: i for i, image in enumerate(coco["images"])}
    labels = np.zeros((len(row), len(column)), np.float32)
    for annotation in coco["annotations"]:
        labels[row[annotation["image_id"]], column[annotation["category_id"]]] = 1
    images = folder / "images"
    pixels = [
        np.asarray(preprocessor.resized(load_image(images / Path(i["file_name"]).name))[0])
        for i in coco["images"]
    ]
    return np.stack(pixels), labels


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Over the classes that occur, each ranked over all images."""
    values = []
    for column in range(labels.shape[1]):
        hits = labels[np.argsort(-scores[:, column], kind="stable"), column]
        if hits.any():
            precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
            values.append(precision[hits > 0].mean())
    return float(np.mean(values))


def augment(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror and shift by up to a sixteenth of the side, one choice for the whole batch."""
    if rng.random() < 0.5:
        pixels = pixels[:, :, ::-1]
    most = pixels.shape[1] // 16
    down, right = rng.integers(-most, most + 1, size=2)
    return np.ascontiguousarray(np.roll(pixels, (down, right), axis=(1, 2)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--large", action="store_true", help="the encoder of the default model")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--n", type=int, default=12000, help="training scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("runs/encoder"), help="scenes go here")
    parser.add_argument("--out", type=Path, default=Path("runs/encoder/model"))
    args = parser.parse_args()

    config = LARGE if args.large else VitConfig()
    mx.random.seed(args.seed)
    encoder = VitEncoder(config)
    preprocessor = Preprocessor.from_dict(encoder.preprocessing)
    look = ("balanced", "varied") if args.large else ("train", "plain")
    write_scenes(args.data / f"train-{look[1]}", args.n, TRAIN_SEED, look[0], None, look[1])
    pixels, labels = read_scenes(args.data / f"train-{look[1]}", preprocessor)
    held_out = {}
    for name, (split, style) in HELD_OUT[args.large].items():
        write_scenes(args.data / f"val-{style}", 600, HELD_OUT_SEED, split, None, style)
        held_out[name] = read_scenes(args.data / f"val-{style}", preprocessor)
    mean, std = (np.array(encoder.preprocessing[f"image_{k}"], np.float32) for k in ("mean", "std"))

    def normalised(picked: np.ndarray) -> mx.array:
        return mx.array((picked.astype(np.float32) / 255 - mean) / std)

    tagger = Tagger(encoder, labels.shape[1], local=args.large)
    mx.eval(tagger.parameters())
    warmup = optim.linear_schedule(0, args.lr, 100)
    cosine = optim.cosine_decay(args.lr, args.steps - 100, 0.02 * args.lr)
    schedule = optim.join_schedules([warmup, cosine], [100])
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.02)

    def loss(model: Tagger, x: mx.array, y: mx.array) -> mx.array:
        terms = nn.losses.binary_cross_entropy(model(x), y, with_logits=True, reduction="none")
        return terms.sum(axis=-1).mean()

    def held_out_map(pixels: np.ndarray, labels: np.ndarray) -> float:
        parts = np.array_split(pixels, len(pixels) // 50)
        scores = np.concatenate([np.array(tagger(normalised(p))) for p in parts])
        return round(mean_average_precision(scores, labels), 4)

    gradient = nn.value_and_grad(tagger, loss)
    first, spent, state = 1, 0.0, args.out / "state.safetensors"
    args.out.mkdir(parents=True, exist_ok=True)
    if state.exists():
        kept, about = mx.load(str(state), return_metadata=True)  # pyright: ignore
        optimizer.init(tagger.trainable_parameters())
        tagger.load_weights([(k[6:], v) for k, v in kept.items() if k.startswith("model.")])
        optimizer.state = tree_unflatten(
            [(k[10:], v) for k, v in kept.items() if k.startswith("optimizer.")]
        )
        first, spent = int(about["step"]) + 1, float(about["seconds"])
        print(f"going on after step {first - 1}", flush=True)
    started, summary = time.time() - spent, {}
    for step in range(first, args.steps + 1):
        # Pictures and their shifts are a function of the step.
        epoch, place = divmod((step - 1) * args.batch_size, len(pixels) - args.batch_size + 1)
        order = np.random.default_rng([args.seed, epoch]).permutation(len(pixels))
        chosen = order[place : place + args.batch_size]
        picked = augment(pixels[chosen], np.random.default_rng([args.seed, step, 1]))
        value, grads = gradient(tagger, normalised(picked), mx.array(labels[chosen]))
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(tagger, grads)
        mx.eval(tagger.state, optimizer.state, value)
        if step % 250 == 0 or step == args.steps:
            summary = {
                "step": step,
                "loss": round(float(value.item()), 3),
                **{f"map_{name}": held_out_map(*pair) for name, pair in held_out.items()},
                "seconds": round(time.time() - started),
            }
            print(json.dumps(summary), flush=True)
            everything = {f"model.{k}": v for k, v in tree_flatten(tagger.parameters())}
            everything |= {f"optimizer.{k}": v for k, v in tree_flatten(optimizer.state)}
            about = {"step": str(step), "seconds": str(time.time() - started)}
            new = args.out / "new.safetensors"
            mx.save_safetensors(str(new), everything, about)
            new.replace(state)

    weights = tree_map(lambda w: w.astype(mx.float16), encoder.parameters())
    mx.save_safetensors(
        str(args.out / "model.safetensors"), dict(tree_flatten(weights)), {"format": "mlx"}
    )
    record = {
        "vision_config": to_dict(config),
        "made_by": "scripts/train_encoder.py" + (" --large" if args.large else ""),
        "scenes": args.n,
        "seed": args.seed,
        "held_out": summary,
    }
    (args.out / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    state.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
