"""Training speed and memory against mlx-vlm's trainer, at equal sizes with random weights.

    python benchmarks/train_against_mlx_vlm.py --json train_against_mlx_vlm.json

Theirs: SmolVLM (mlx-vlm's idefics3: SigLIP-B/16 at 224 pixels, pixel shuffle to 49 image tokens in
front of SmolLM2-135M), all of it trained by ``mlx_vlm.trainer`` (its engine, its loss, MLX's AdamW
with clipping), on prepared examples. Its SmolVLM has an output layer of its own, ours shares the
embedding: theirs has 28 M parameters more to move. Ours: `concat`, the same network
otherwise; `cross`, and `cross` with its attention guided. One text of 64 tokens an image, 48 of
them supervised (and 8 guided). Both programs run in this process and take turns; a step is loss,
gradients, clipping and optimiser as each program times it (theirs: its own ``step_time``).

As installed, that trainer hands the padding mask to the model, which takes it for the attention
mask (idefics3, smolvlm and llava alike). So no text is causal: a position sees the tokens it is
to predict, and a batch of two or more does not fit. What happens is tried and printed first. The
timed model is mended: it is given no mask and makes its causal one, as when it generates.

Peak memory: what the program keeps between steps (weights, moments), and what a step adds to it.
"""

import argparse
import contextlib
import io
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agevlm_mlx.openblas import preload

preload()  # before the first import of mlx

import mlx.core as mx  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from agevlm_mlx import errors  # noqa: E402
from agevlm_mlx.benchmarking import report, shapes, timing  # noqa: E402
from agevlm_mlx.benchmarking.training import TrainingStep, quartiles, random_batch  # noqa: E402
from agevlm_mlx.config import FusionConfig  # noqa: E402
from agevlm_mlx.data.batches import Batch  # noqa: E402
from agevlm_mlx.evaluation import files  # noqa: E402
from agevlm_mlx.evaluation.machine import versions  # noqa: E402
from agevlm_mlx.malloc import keep_freed  # noqa: E402
from agevlm_mlx.models.agevlm import AgeVLM  # noqa: E402
from agevlm_mlx.sam.torchvision_ops import import_torchvision  # noqa: E402
from agevlm_mlx.training.stages import AttentionLoss, Losses  # noqa: E402

import_torchvision()  # mlx-vlm imports it; with some builds that needs help

from mlx_vlm.models.smolvlm import config as smolvlm_config  # noqa: E402
from mlx_vlm.models.smolvlm.smolvlm import Model as SmolvlmModel  # noqa: E402
from mlx_vlm.trainer.common.engine import train  # noqa: E402
from mlx_vlm.trainer.common.model import prepare_model_for_training  # noqa: E402
from mlx_vlm.trainer.vlm.config import VLMTrainingArgs  # noqa: E402
from mlx_vlm.trainer.vlm.sft.runtime import make_task, vlm_sft_loss  # noqa: E402
from mlx_vlm.version import __version__ as mlx_vlm_version  # noqa: E402

#: SmolVLM-256M's language model: SmolLM2-135M with 128 more words.
TEXT = {**shapes.SHAPES["smollm2-135m"], "vocab_size": 49280}
VISION = {**shapes.VISION, "image_size": 224}
SHUFFLE = 2
TINY_TEXT = {**TEXT, **shapes.TINY_TEXT}
TINY_VISION = {**VISION, **shapes.TINY_VISION}


class Causal(SmolvlmModel):
    """SmolVLM that is given no mask, so that it makes its own."""

    def __call__(
        self, input_ids: Any, pixel_values: Any, mask: Any = None, cache: Any = None, **kwargs: Any
    ) -> Any:
        return super().__call__(input_ids, pixel_values, None, cache, **kwargs)


def smolvlm(kind: type[SmolvlmModel], text: dict[str, Any], vision: dict[str, Any]) -> Any:
    """mlx-vlm's SmolVLM of these sizes; its last word stands for an image token."""
    config: Any = smolvlm_config.ModelConfig(
        smolvlm_config.TextConfig.from_dict({**text, "model_type": "smolvlm"}),
        smolvlm_config.VisionConfig.from_dict(vision),
        scale_factor=SHUFFLE,
        image_token_id=text["vocab_size"] - 1,
    )
    return kind(config)


def examples(batch: Batch, image_tokens: int, image_token: int) -> list[dict[str, Any]]:
    """The batch as their trainer wants it: an unshifted row for each image."""
    (group,) = batch.groups
    found = []
    for row in range(len(batch.pixels)):
        text = np.append(group.ids[row, 0], group.labels[row, 0, -1]) % image_token
        supervised = np.append(0, group.loss_mask[row, 0]).astype(np.int32)
        ids = np.append(np.full(image_tokens, image_token), text).astype(np.int32)
        found.append(
            {
                "input_ids": ids[None],
                "attention_mask": np.ones_like(ids)[None],
                "completion_mask": np.append(np.zeros(image_tokens, np.int32), supervised)[None],
                "pixel_values": mx.array(batch.pixels[row].transpose(2, 0, 1)[None, None]),
            }
        )
    return found


class Theirs:
    """mlx-vlm's trainer on its SmolVLM; a call is one step of it."""

    def __init__(self, text: dict[str, Any], vision: dict[str, Any], batch: Batch, S: int) -> None:
        self.model = prepare_model_for_training(
            smolvlm(Causal, text, vision), train_type="full", verbose=False
        )
        mx.eval(self.model.parameters())
        self.dataset = examples(batch, S, text["vocab_size"] - 1)
        self.optimizer = optim.AdamW(1e-6, [0.9, 0.98], weight_decay=0.02)
        self.args = VLMTrainingArgs(
            batch_size=len(self.dataset),
            iters=1,
            steps_per_report=1,
            pad_to_multiple=1,
            train_on_completions=True,
        )
        self.task = make_task(self.model, self.args)
        self.task.save_weights = lambda *args, **kwargs: None
        self.loss, self.seconds = float("nan"), (0.0, 0.0)

    def __call__(self) -> None:
        silence = io.StringIO()  # a progress bar and a report a step
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            told = train(
                self.model, self.optimizer, self.dataset, None, self.args, self.task, None, 0
            )
        self.loss, self.seconds = told["train_loss"], (told["step_time"], 0.0)


def as_installed(text: dict[str, Any], vision: dict[str, Any], S: int) -> dict[str, str]:
    """What becomes of their loss without the mend, of one and of two images."""
    model = smolvlm(SmolvlmModel, text, vision)
    image_token, side = text["vocab_size"] - 1, vision["image_size"]
    ids = np.append(np.full(S, image_token), np.arange(8) + 1)[None]
    changed = ids.copy()
    changed[0, -1] = 0
    pixels, mask = mx.random.normal((1, 1, 3, side, side)), mx.ones(ids.shape, mx.int32)
    before, after = (model(mx.array(i), pixels, mask).logits[0, -2] for i in (ids, changed))
    moved = mx.abs(before - after).max().item()
    causal = "is causal" if moved == 0 else "is not causal: a later token changes earlier logits"
    found = {"one image": causal}
    two = {
        "input_ids": mx.array(ids.repeat(2, 0)),
        "attention_mask": mx.repeat(mask, 2, axis=0),
        "pixel_values": mx.repeat(pixels, 2, axis=0),
    }
    try:
        mx.eval(vlm_sft_loss(model, two)[0])
        found["two images"] = "works"
    except ValueError as error:
        found["two images"] = errors.one_line(error)
    return found


def arrays(*trees: Any) -> list[mx.array]:
    """All arrays in `trees` of modules' parameters or optimisers' states."""
    leaves = [value for tree in trees for _, value in tree_flatten(tree)]
    return [value for value in leaves if isinstance(value, mx.array)]


def ours(fusion: str, text: dict[str, Any], vision: dict[str, Any]) -> AgeVLM:
    settings: Any = {
        "fusion": fusion,
        "projector": "pixel_shuffle",
        "pixel_shuffle_factor": SHUFFLE,
        "gate_init": 0.5,
    }
    model = shapes.random_model(text, vision, FusionConfig(**settings))
    mx.eval(model.parameters())
    model.train()
    return model


def compare(images: int, tokens: int, trials: int, tiny: bool) -> dict[str, Any]:
    """Seconds and bytes of every program's step, side by side."""
    text, vision = (TINY_TEXT, TINY_VISION) if tiny else (TEXT, VISION)
    concat, cross = ours("concat", text, vision), ours("cross", text, vision)
    batch = random_batch(concat, images, tokens)
    guided = Losses(attention=AttentionLoss(weight=0.3))
    steps: dict[str, Any] = {
        "mlx-vlm, SmolVLM": Theirs(text, vision, batch, concat.num_image_tokens),
        "ours, concat": TrainingStep(concat, batch, Losses()),
        "ours, cross": TrainingStep(cross, batch, Losses()),
        "ours, cross, guided": TrainingStep(cross, batch, guided),
    }

    def measured(step: Any) -> Callable[[], tuple[float, int]]:
        def measure() -> tuple[float, int]:
            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            step()
            added = mx.get_peak_memory() - before
            # Before the first step, which warms up and is not recorded, there are no moments.
            own = arrays(step.model.parameters(), step.optimizer.state)
            return sum(step.seconds), sum(value.nbytes for value in own) + added

        return measure

    taken = timing.interleaved({n: measured(s) for n, s in steps.items()}, trials, report.progress)
    found: dict[str, Any] = {}
    theirs = taken["mlx-vlm, SmolVLM"]
    for name, values in taken.items():
        whole = [seconds for seconds, _ in values]
        ratios = [a / b for (a, _), b in zip(theirs, whole, strict=True)]
        found[name] = {
            "parameters": sum(value.size for value in arrays(steps[name].model.parameters())),
            "loss": steps[name].loss,
            "step": timing.summary(whole),
            "samples_per_second": images / timing.summary(whole)["median"],
            "of_theirs": {**timing.summary(ratios), "quartiles": quartiles(ratios)},
            "peak_memory": timing.summary([memory for _, memory in values]),
        }
    installed = as_installed(TINY_TEXT, TINY_VISION, 4)
    return {"as_installed": installed, "programs": found}


def table(measured: dict[str, Any]) -> str:
    """The comparison for people."""
    rows = []
    for name, told in measured["programs"].items():
        ratio, (low, high) = told["of_theirs"]["median"], told["of_theirs"]["quartiles"]
        rows.append(
            [
                name,
                f"{told['parameters'] / 1e6:.3g}",
                f"{told['loss']:.3f}",
                f"{told['step']['median'] * 1e3:.0f}",
                f"{told['samples_per_second']:.3g}",
                f"{ratio:.2f} ({low:.2f} to {high:.2f})" if name.startswith("ours") else "1",
                f"{told['peak_memory']['median'] / 1e9:.3g}",
            ]
        )
    header = ["program", "million parameters", "loss", "step, ms", "samples/s"]
    return report.table([*header, "of mlx-vlm's (quartiles)", "peak memory, GB"], rows)


@errors.command
def main(argv: list[str] | None = None) -> int:
    """Run the comparison; see ``--help``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2, help="images of a step (2)")
    parser.add_argument("--tokens", type=int, default=64, help="of the text of an image (64)")
    parser.add_argument("--trials", type=int, default=5, help="steps of each program (5)")
    parser.add_argument("--tiny", action="store_true", help="miniatures, to test this script")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number and fact")
    args = parser.parse_args(argv)
    for name in ("batch", "tokens", "trials"):
        if getattr(args, name) < 1:
            raise errors.UserError(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if args.json:
        files.check_writable(args.json)
    mx.random.seed(0)
    command = sys.argv[1:] if argv is None else argv
    about: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/train_against_mlx_vlm.py", *command]),
        "machine": report.facts(),
        "versions": {**versions(), "mlx-vlm": mlx_vlm_version},
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # theirs may write
        measured = compare(args.batch, args.tokens, args.trials, args.tiny)
    about["measured"] = measured
    report.progress("")
    print(f"{about['command']}\n{report.machine_line(about['machine'])}")
    print(f"{args.trials} turns, load {about['machine']['load_average'][0]:.1f}")
    for what, happened in measured["as_installed"].items():
        print(f"mlx-vlm {mlx_vlm_version} as installed, {what}: {happened}")
    print(f"\n{table(measured)}")
    if args.json:
        files.write_json(args.json, about)
        print(f"\nwritten: {args.json}")
    return 0


if __name__ == "__main__":
    keep_freed()  # as `agevlm train` does
    sys.exit(main())
