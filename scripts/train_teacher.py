"""Train the small SAM teacher that the package ships, on drawn scenes with known masks.

    python scripts/train_teacher.py                     # about 5 minutes on 2 cores
    python scripts/train_teacher.py --steps 2000        # the same bytes on the same machine
    python scripts/train_teacher.py --measure           # only measure the teacher in --out

The model is Meta's `segment_anything` code with smaller sizes, trained with SAM's losses:
focal and Dice on the mask, squared error on the estimated IoU. Half of the prompts are boxes
with jittered corners, half a random point of the object. Writes model.safetensors (float16)
and config.json (sizes, how it was made, measured IoU) to --out.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save

from agevlm_mlx import atomic, errors
from agevlm_mlx.data.painting import make_scene
from agevlm_mlx.sam.architecture import (
    CONFIG,
    EMBEDDED,
    PIXEL_MEAN,
    PIXEL_STD,
    WEIGHTS,
    Architecture,
)
from agevlm_mlx.sam.targets import mask_iou
from agevlm_mlx.sam.teacher import Teacher, build, decode

ARCHITECTURE = Architecture(
    image_size=128,
    patch_size=8,
    embed_dim=96,
    depth=4,
    num_heads=4,
    window_size=8,
    global_attn_indexes=(1, 3),
    out_chans=96,
    decoder_mlp_dim=256,
    decoder_num_heads=4,
    iou_head_hidden_dim=96,
    multimask=False,
)
#: Objects with fewer visible pixels are not asked for.
MIN_PIXELS = 20
#: Standard deviation, in pixels, of a training box's corners.
BOX_JITTER = 1.5
FOCAL_WEIGHT = 20.0
WARMUP_STEPS = 60
#: Seeds of the scenes drawn here; nothing else in the project uses them.
TRAIN_SCENES, MEASURED_SCENES = 9001, 9002


@dataclass(frozen=True)
class Scenes:
    """Pictures in memory: uint8[n 3 H W], and for each its masks bool[k H W]."""

    images: torch.Tensor
    masks: list[np.ndarray]


def paint(split: str, seed: int, n: int) -> Scenes:
    """The first `n` scenes of a split."""
    scenes = [make_scene(seed, split, i) for i in range(n)]  # pyright: ignore[reportArgumentType]
    images = np.stack([scene.image for scene in scenes]).transpose(0, 3, 1, 2)
    masks = [np.stack([m for m in s.masks if m.sum() >= MIN_PIXELS]) for s in scenes]
    return Scenes(torch.from_numpy(np.ascontiguousarray(images)), masks)


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The smallest box (x0, y0, x1, y1) around a mask, far edges exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def point_of(mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """A random pixel (x, y) of a mask."""
    rows, columns = np.nonzero(mask)
    chosen = rng.integers(len(rows))
    return columns[chosen], rows[chosen]


def batch(
    scenes: Scenes, size: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random scenes, mirrored and turned, and one prompt for each of their objects.

    Returns pixels f32[B 3 H W], owners i64[n], prompts f32[n 4], kinds bool[n] (True for a
    box), masks f32[n 1 H W].
    """
    pixels, owners, prompts, kinds, masks = [], [], [], [], []
    for row, i in enumerate(rng.integers(len(scenes.images), size=size)):
        turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
        image = torch.rot90(scenes.images[i], turns, (1, 2))
        pixels.append(image.flip(2) if mirror else image)
        for mask in np.rot90(scenes.masks[i], turns, (1, 2)):
            turned = mask[:, ::-1] if mirror else mask
            kinds.append(bool(rng.integers(2)))
            if kinds[-1]:
                prompt = np.asarray(box_of(turned)) + rng.normal(0, BOX_JITTER, 4)
            else:
                prompt = np.asarray([*point_of(turned, rng), 0, 0])
            prompts.append(prompt.astype(np.float32))
            masks.append(np.ascontiguousarray(turned))
            owners.append(row)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    return (
        (torch.stack(pixels).float() - mean) / std,
        torch.tensor(owners),
        torch.from_numpy(np.stack(prompts)),
        torch.tensor(kinds),
        torch.from_numpy(np.stack(masks))[:, None].float(),
    )


def loss_of(logits: torch.Tensor, iou: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """SAM's loss for the single-mask output: logits f32[n h w], iou f32[n], masks f32[n 1 H W]."""
    target = F.interpolate(masks, logits.shape[-2:], mode="area")[:, 0]
    share = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    focal = (entropy * (share - target) ** 2).mean((1, 2))
    both, either = (share * target).sum((1, 2)), (share + target).sum((1, 2))
    dice = 1 - (2 * both + 1) / (either + 1)
    with torch.no_grad():
        got, wanted = share > 0.5, target > 0.5
        true = (got & wanted).sum((1, 2)) / (got | wanted).sum((1, 2)).clamp(min=1)
    return (FOCAL_WEIGHT * focal + dice + (iou - true) ** 2).mean()


def train(args: argparse.Namespace) -> int:
    """Train and write the teacher. Returns the number of steps."""
    start = time.monotonic()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    scenes = paint("train", TRAIN_SCENES, args.scenes)
    print(f"{args.scenes} scenes painted in {time.monotonic() - start:.0f} s", flush=True)
    sam = build(ARCHITECTURE)
    for name, weight in sam.named_parameters():
        if name.endswith("pos_embed"):  # SAM's own code leaves it at zero for a checkpoint
            torch.nn.init.normal_(weight, std=0.02)
    optimizer = torch.optim.AdamW(sam.parameters(), args.learning_rate, weight_decay=0.01)
    step, shown = 0, 0.0
    while (done := progress(step, start, args)) < 1.0:
        warm = min(1.0, (step + 1) / WARMUP_STEPS)
        rate = args.learning_rate * warm * max(0.01, 0.5 + 0.5 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        pixels, owners, prompts, kinds, masks = batch(scenes, args.batch_size, rng)
        embeddings = sam.image_encoder(pixels)
        logits, iou = decode(sam, embeddings[owners], prompts, kinds)
        loss = loss_of(logits[:, 0], iou[:, 0], masks)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        optimizer.step()
        step += 1
        elapsed = time.monotonic() - start
        if elapsed - shown > 10:
            shown = elapsed
            print(f"step {step}  {done:4.0%}  loss {loss.item():.3f}  {elapsed:.0f} s", flush=True)
    write(args.out, sam, {"made_by": made_by(args, step)})
    return step


def progress(step: int, start: float, args: argparse.Namespace) -> float:
    """The finished share of the training, by steps or by time."""
    if args.steps:
        return step / args.steps
    return (time.monotonic() - start) / (60 * args.minutes)


def made_by(args: argparse.Namespace, steps: int) -> dict:
    """How the weights came about, for config.json."""
    return {
        "script": "scripts/train_teacher.py",
        "steps": steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "scenes": args.scenes,
        "seed": args.seed,
        "torch": torch.__version__,
    }


def write(folder: Path, sam: torch.nn.Module, about: dict) -> None:
    """The teacher's folder: float16 weights and the sizes to build the model with."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: t.half().contiguous() for name, t in sam.state_dict().items()}
    atomic.write_bytes(folder / WEIGHTS, save(state, {"format": "pt"}))
    write_config(folder, {"architecture": asdict(ARCHITECTURE), **about})


def write_config(folder: Path, values: dict) -> None:
    """Replace the folder's config.json."""
    atomic.write_bytes(folder / CONFIG, (json.dumps(values, indent=2) + "\n").encode())


def measure(folder: Path, scenes: int) -> dict[str, float]:
    """Mean IoU with boxes and points on scenes and, `nouns`, on objects never trained on."""
    teacher = Teacher(folder, device="cpu")
    rng = np.random.default_rng(0)
    results = {}
    for split in ("test", "nouns"):
        drawn = paint(split, MEASURED_SCENES, scenes)
        for kind in ("box", "point"):
            scores = []
            for image, masks in zip(drawn.images, drawn.masks, strict=True):
                prompts = [box_of(m) if kind == "box" else point_of(m, rng) for m in masks]
                found, _ = teacher.masks(image.permute(1, 2, 0).numpy(), prompts)
                scores += mask_iou(found, masks).tolist()
            results[f"{split}_{kind}"] = round(float(np.mean(scores)), 4)
            print(f"{split:>5} scenes, {kind:>5}: mean IoU {results[f'{split}_{kind}']:.3f} "
                  f"({len(scores)} objects)", flush=True)  # fmt: skip
    return results


@errors.command
def main(argv: list[str] | None = None) -> int:
    """Run the script; see ``--help``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=EMBEDDED, help="folder of the teacher")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=4.5, help="train this long")
    length.add_argument("--steps", type=int, help="train this many steps instead")
    parser.add_argument("--scenes", type=int, default=3000, help="training scenes")
    parser.add_argument("--batch-size", type=int, default=8, help="scenes a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at its highest")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--measure", action="store_true", help="only measure the one in --out")
    parser.add_argument("--test-scenes", type=int, default=300, help="scenes a split to measure on")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if not args.measure:
        train(args)
    results = measure(args.out, args.test_scenes)
    if not args.measure:
        values = json.loads((args.out / CONFIG).read_text())
        write_config(args.out, {**values, "mean_iou": results})
        print(f"written: {args.out / WEIGHTS} ({(args.out / WEIGHTS).stat().st_size / 1e6:.2f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
