"""Where a training step spends its time, and what guiding attention adds to it.

  python scripts/measure_training.py                      # the embedded recipe and SmolLM2 shapes
  python scripts/measure_training.py --only smollm2 --batch 1

Cases: every guided stage of the embedded recipe on embedded scenes that SAM has labelled (made in
a temporary folder unless --data names a folder that `agevlm scenes` and `agevlm teach` have made),
and SmolLM2-135M with SigLIP-B/16 at 224 pixels, random weights, one text of 64 tokens a picture,
of which three quarters are supervised and an eighth is guided; with all of it trained, and with
the encoder frozen.

Parts are differences between steps that do more and more, forward and backward: the language
model alone, + its next-token loss, + cross-attention to a picture that is given, + attention maps
and their loss, + projector and encoder, + clipping and optimiser. All take turns, so that a busy
machine slows all of them; figures are medians of the differences within a turn. Making a batch is
timed beside it: in training it happens in other threads, while the step before it is computed.

Guidance: whole steps with the attention loss and without, the same model and batch. Peak memory
(`mx.get_peak_memory`) is that of loss and gradients, so that an optimiser that needs more hides
nothing. On a busy machine --clock cpu says more: it counts the processors' time, all threads.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agevlm_mlx import errors  # before mlx: it opens a fast BLAS on Linux

import mlx.core as mx  # isort: skip
from mlx.utils import tree_unflatten

from agevlm_mlx.benchmarking import report, shapes, timing
from agevlm_mlx.benchmarking.training import (
    Step,
    TrainingStep,
    peak,
    quartiles,
    random_batch,
    seconds,
)
from agevlm_mlx.config import FusionConfig
from agevlm_mlx.data.batches import Batch
from agevlm_mlx.evaluation import files
from agevlm_mlx.malloc import keep_freed
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.training import build, stages
from agevlm_mlx.training.losses import attention_loss, token_loss
from agevlm_mlx.training.reading import read_texts, text_loss
from agevlm_mlx.training.rules import named_parameters, parameter_scales, set_trainable
from agevlm_mlx.training.stages import AttentionLoss, Losses

#: Guidance may add that much to a step's time and to its peak memory.
TARGET = 0.10
VISION = {**shapes.VISION, "image_size": 224}
TINY_TEXT = {**shapes.SHAPES["smollm2-135m"], **shapes.TINY_TEXT}
TINY_VISION = {**VISION, **shapes.TINY_VISION}


@dataclass
class Case:
    """A model, a batch and a loss to train it with. data: makes the batch again, timed."""

    name: str
    model: AgeVLM
    batch: Batch
    losses: Losses
    trained: list[str]
    data: Callable[[], Any] | None = None

    @property
    def unguided(self) -> Losses:
        return replace(self.losses, attention=replace(self.losses.attention, weight=0.0))


def scene_cases(folder: Path, images: int, tiny: bool) -> list[Case]:
    """The guided stages of the embedded recipe, on scenes in `folder`."""
    recipe = stages.read_recipe(
        "scenes",
        [
            f"data.train={folder / 'train'}",
            f"data.store={folder / 'train-sam'}",
            f"data.scenes.n={images}",
        ],
    )
    recipe = replace(recipe, data=replace(recipe.data, val=None, val_store=None))
    if tiny:
        recipe = replace(recipe, stages=tuple(replace(s, batch_size=2) for s in recipe.stages[:2]))
    job = build.prepare(recipe, None, lambda text: print(text, file=sys.stderr))
    cases = []
    for stage in recipe.stages:
        if not stage.losses.attention.weight:
            continue
        batches = job.batches(stage)
        # Pictures are kept once decoded: the first batches are what making one costs.
        numbers = iter(range(1, 1 << 30))
        cases.append(
            Case(
                f"scenes, {stage.name}",
                job.model,
                batches.batch(0),
                stage.losses,
                list(parameter_scales(job.model, stage)),
                lambda batches=batches, numbers=numbers: batches.batch(next(numbers)),
            )
        )
    return cases


def smollm2_cases(images: int, tokens: int, tiny: bool) -> list[Case]:
    """SmolLM2-135M and SigLIP-B/16-224, or miniatures of them."""
    text = TINY_TEXT if tiny else shapes.SHAPES["smollm2-135m"]
    model = shapes.random_model(text, TINY_VISION if tiny else VISION, FusionConfig(gate_init=0.5))
    mx.eval(model.parameters())
    model.train()
    losses = Losses(attention=AttentionLoss(weight=0.3))
    names = list(named_parameters(model))
    batch = random_batch(model, images, tokens)
    name = f"{'tiny' if tiny else 'smollm2-135m + siglip-b/16-224'}, {images} x {tokens}"
    without = [n for n in names if not n.startswith("vision_tower.")]
    return [
        Case(f"{name}, all trained", model, batch, losses, names),
        Case(f"{name}, encoder frozen", model, batch, losses, without),
    ]


def gradients(case: Case, loss: Callable[[], mx.array]) -> Step:
    """A step that computes `loss` and its gradients, of as much as it depends on."""
    params = named_parameters(case.model, trainable=True)

    def of(params: dict[str, mx.array]) -> mx.array:
        case.model.update(tree_unflatten(list(params.items())))
        return loss()

    def step() -> None:
        found = mx.value_and_grad(of)(params)
        case.model.update(tree_unflatten(list(params.items())))  # instead of the tracers
        mx.eval(found)

    return step


def nested(case: Case) -> dict[str, Step]:
    """Steps that do more and more, in the order of the parts that `main` reports."""
    model, batch, attention = case.model, case.batch, case.losses.attention
    z_img = model.project(model.encode(mx.array(batch.pixels)))
    slopes = []
    for group in batch.groups:
        size = (*group.ids.reshape(-1, group.ids.shape[-1]).shape, model.args.vocab_size)
        slopes.append(mx.random.normal(size) / group.ids.size)
    mx.eval(z_img, slopes)

    def read(number: int) -> mx.array:
        return model(mx.array(batch.groups[number].ids).flatten(0, 1))

    def language_model() -> mx.array:
        parts = [(read(n) * slope).sum() for n, slope in enumerate(slopes)]
        return mx.stack(parts).sum()

    def with_loss() -> mx.array:
        parts = [
            token_loss(read(n), group.labels, group.loss_mask)[0]
            for n, group in enumerate(batch.groups)
        ]
        return mx.stack(parts).sum()

    def looking(z_img: mx.array, guided: bool) -> mx.array:
        seen, total = model.look(z_img), mx.array(0.0)
        for group in batch.groups:
            asked = guided and bool(group.weight.any())
            logits, maps = read_texts(model, seen, group, guided=asked, heads=attention.heads)
            total = total + text_loss(logits, group)[0]
            if maps is not None:
                total = total + attention_loss(
                    maps, mx.array(group.target), mx.array(group.weight), attention.kind
                )
        return total

    def seeing() -> mx.array:
        return looking(model.project(model.encode(mx.array(batch.pixels))), True)

    return {
        "language model": gradients(case, language_model),
        "next-token loss": gradients(case, with_loss),
        "cross-attention": gradients(case, lambda: looking(z_img, False)),
        "attention maps and loss": gradients(case, lambda: looking(z_img, True)),
        "projector and encoder": gradients(case, seeing),
        "clipping and optimiser": TrainingStep(model, batch, case.losses),
    }


def measure(case: Case, trials: int, clock: str, progress: timing.Progress) -> dict[str, Any]:
    """Shares of the step and what guidance adds to it."""
    set_trainable(case.model, case.trained)
    steps = nested(case)
    guided = TrainingStep(case.model, case.batch, case.losses)
    unguided = TrainingStep(case.model, case.batch, case.unguided)
    works: dict[str, Step] = {**steps, "unguided": unguided}
    if case.data is not None:
        works["making a batch"] = case.data
    index = ("wall", "cpu").index(clock)
    taken = timing.interleaved(
        {name: lambda work=work: seconds(work)[index] for name, work in works.items()},
        trials,
        lambda text: progress(f"{case.name}: {text}"),
    )
    whole = taken[list(steps)[-1]]
    parts, before = {}, [0.0] * trials
    for name in steps:
        parts[name] = timing.summary(_each(lambda now, then: now - then, taken[name], before))
        before = taken[name]
    memory = {"guided": peak(guided.gradients), "unguided": peak(unguided.gradients)}
    data = taken.get("making a batch")
    more = _each(lambda with_it, without: with_it / without - 1, whole, taken["unguided"])
    return {
        "images": case.batch.pixels.shape[0],
        "text_tokens": sum(g.ids.size for g in case.batch.groups),
        "supervised_tokens": sum(int(g.loss_mask.sum()) for g in case.batch.groups),
        "guided_rows": sum(int(g.weight.sum()) for g in case.batch.groups),
        "image_tokens": case.model.num_image_tokens,
        "parts": parts,
        "step": timing.summary(whole),
        "unguided": timing.summary(taken["unguided"]),
        "data": timing.summary(data) if data else None,
        "guidance_time": {**timing.summary(more), "quartiles": quartiles(more)},
        "peak_memory": memory,
        "guidance_memory": memory["guided"] / memory["unguided"] - 1,
    }


def _each(
    what: Callable[[float, float], float], first: Sequence[float], second: Sequence[float]
) -> list[float]:
    return [what(a, b) for a, b in zip(first, second, strict=True)]


def tables(measured: dict[str, Any]) -> str:
    """Shares a part and guidance's price, for people."""
    names = list(next(iter(measured.values()))["parts"])
    rows = []
    for case, told in measured.items():
        whole = told["step"]["median"]
        shares = [f"{told['parts'][n]['median'] / whole:.1%}" for n in names]
        data = f"{told['data']['median'] * 1e3:.1f}" if told["data"] else ""
        rows.append([case, f"{whole * 1e3:.0f}", *shares, data])
    first = report.table(["case", "step, ms", *names, "(a batch made, ms)"], rows)
    rows = []
    for case, told in measured.items():
        time, (low, high) = told["guidance_time"]["median"], told["guidance_time"]["quartiles"]
        memory = [told["peak_memory"][n] / 1e6 for n in ("unguided", "guided")]
        met = max(time, told["guidance_memory"]) <= TARGET
        rows.append(
            [
                case,
                f"{told['guided_rows']} x {told['image_tokens']}",
                f"{told['unguided']['median'] * 1e3:.0f}",
                f"{told['step']['median'] * 1e3:.0f}",
                f"{time:+.1%} ({low:+.1%} to {high:+.1%})",
                f"{memory[0]:.1f}",
                f"{memory[1]:.1f}",
                f"{told['guidance_memory']:+.1%}",
                f"<= {TARGET:.0%} {'met' if met else 'MISSED'}",
            ]
        )
    header = ["guidance", "rows x tokens", "without, ms", "with, ms", "time (quartiles)"]
    header += ["without, MB", "with, MB", "peak memory", "wanted"]
    return f"{first}\n\n{report.table(header, rows)}"


@errors.command
def main(argv: list[str] | None = None) -> int:
    """Measure; see ``--help``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["scenes", "smollm2"], help="one kind of case")
    parser.add_argument("--data", type=Path, help="folder of the scenes (train, train-sam)")
    parser.add_argument("--images", type=int, default=400, help="scenes to draw (400)")
    parser.add_argument("--batch", type=int, default=2, help="pictures of a SmolLM2 step (2)")
    parser.add_argument("--tokens", type=int, default=64, help="of each of its texts (64)")
    parser.add_argument("--trials", type=int, default=9, help="turns (9)")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="seconds of what")
    parser.add_argument("--tiny", action="store_true", help="miniatures, to test this script")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number and fact")
    args = parser.parse_args(argv)
    for name in ("images", "batch", "tokens", "trials"):
        if getattr(args, name) < 1:
            raise errors.UserError(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if args.json:
        files.check_writable(args.json)
    command = shlex.join(
        ["python", "scripts/measure_training.py", *(sys.argv[1:] if argv is None else argv)]
    )
    mx.random.seed(0)
    facts = report.facts()
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        cases = []
        if args.only != "smollm2":
            cases += scene_cases(args.data or Path(made), args.images, args.tiny)
        if args.only != "scenes":
            cases += smollm2_cases(args.batch, args.tokens, args.tiny)
        for case in cases:
            measured[case.name] = measure(case, args.trials, args.clock, report.progress)
    report.progress("")
    print(f"{command}\n{report.machine_line(facts)}")
    print(f"{args.trials} turns, {args.clock} clock, load {facts['load_average'][0]:.1f}\n")
    print(tables(measured))
    if args.json:
        about = {"command": command, "clock": args.clock, "machine": facts, "measured": measured}
        files.write_json(args.json, about)
        print(f"\nwritten: {args.json}")
    return 0


if __name__ == "__main__":
    keep_freed()  # as `agevlm train` does
    sys.exit(main())
