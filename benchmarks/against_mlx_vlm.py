"""Time to first token and decoding speed against mlx-vlm, at equal sizes with random weights.

    python benchmarks/against_mlx_vlm.py --json against_mlx_vlm.json

Both programs run in this process, take turns, and are warmed up; figures are medians. Needs
mlx-vlm (`pip install "agevlm-mlx[parity]"`) and about five minutes on two cores.

What is timed, on every side: from what the vision encoder said (random numbers, already in
memory) to the first token of a 32-token question, through the program's own ``generate_step``
with its own cache and its default prefill step. Nothing is tokenised or decoded.

- Ours: the projector, the keys and values of every looking layer, the text; ``generate_step`` is
  mlx-lm's, called as our ``stream_generate`` calls it (which reads a short prompt in one pass).
- SmolVLM (mlx-vlm's idefics3): the connector, image tokens in front of the text, all of it.
- mllama (mlx-vlm): the projector, its cross-attention layers, the text.

SmolVLM's connector joins sixteen patches into a token; ours is measured with the very same one,
with its own default (two layers on as many encoder tokens as image tokens), and both programs
with the projected tokens at hand, which is what both keep of an image that comes again.
``generate_step`` is asked for no token beyond the first (``max_tokens=0``): otherwise each program
would begin the second token before it hands out the first.
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agevlm_mlx.openblas import preload

preload()  # before the first import of mlx

import mlx.core as mx  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache  # noqa: E402

from agevlm_mlx import errors  # noqa: E402
from agevlm_mlx.benchmarking import report, shapes, timing  # noqa: E402
from agevlm_mlx.config import FusionConfig  # noqa: E402
from agevlm_mlx.evaluation import files  # noqa: E402
from agevlm_mlx.evaluation.machine import versions  # noqa: E402
from agevlm_mlx.sam.torchvision_ops import import_torchvision  # noqa: E402

import_torchvision()  # mlx-vlm imports it; with some builds that needs help

from mlx_vlm.generate.ar import generate_step as vlm_generate_step  # noqa: E402
from mlx_vlm.generate.common import generation_stream as vlm_stream  # noqa: E402
from mlx_vlm.models.mllama import config as mllama_config  # noqa: E402
from mlx_vlm.models.mllama.mllama import Model as MllamaModel  # noqa: E402
from mlx_vlm.models.smolvlm import config as smolvlm_config  # noqa: E402
from mlx_vlm.models.smolvlm.smolvlm import Model as SmolvlmModel  # noqa: E402
from mlx_vlm.version import __version__ as mlx_vlm_version  # noqa: E402

#: SmolVLM-256M's language model: SmolLM2-135M with 128 more words.
TEXT = {**shapes.SHAPES["smollm2-135m"], "vocab_size": 49280}
IMAGE_TOKEN = 49190
#: Image tokens -> how many times sooner the first token should come than SmolVLM's.
TARGETS = {64: 2.0, 576: 15.0, 1088: 40.0}
#: Where the answer's length is taken for decoding speed.
LENGTHS = (16, 64)


class Smolvlm:
    """mlx-vlm's SmolVLM-256M: image tokens in front of the text."""

    def __init__(self) -> None:
        config: Any = smolvlm_config.ModelConfig(
            smolvlm_config.TextConfig.from_dict({**TEXT, "model_type": "smolvlm"}),
            smolvlm_config.VisionConfig.from_dict(shapes.VISION),
            scale_factor=shapes.FUSION.pixel_shuffle_factor,
            image_token_id=IMAGE_TOKEN,
        )
        self.model = SmolvlmModel(config)
        mx.eval(self.model.language_model.parameters(), self.model.connector.parameters())

    def connect(self, z_vis: mx.array) -> mx.array:
        """z_vis [M 1024 768] -> features [M*64 D], as its ``get_input_embeddings`` makes them."""
        return self.model.connector(z_vis).reshape(-1, TEXT["hidden_size"])

    def prefill(self, features: mx.array, ids: mx.array, cache: list[Any] | None = None) -> None:
        """The first token; the image's features are known, so that no encoder runs."""
        tokens = mx.concatenate([mx.full((features.shape[0],), IMAGE_TOKEN, ids.dtype), ids])
        pixels = mx.ones((1, 1, 3, 16, 16))  # looked at only to see that there is an image
        steps = vlm_generate_step(
            tokens[None],
            self.model,
            pixels,
            None,
            prompt_cache=cache,
            max_tokens=0,
            cached_image_features=features,
        )
        for _ in steps:
            pass

    def decode(self, features: mx.array, ids: mx.array) -> Callable[[], list[float]]:
        """What decodes after that, always from the same prefilled cache."""
        cache = make_prompt_cache(self.model.language_model)
        self.prefill(features, ids, cache)
        told = cache[0].offset

        def measure() -> list[float]:
            steps = vlm_generate_step(
                ids[None, -1:],
                self.model,
                None,
                None,
                prompt_cache=cache,
                max_tokens=LENGTHS[-1] + 1,
            )
            found = timing.moments(steps, vlm_stream, LENGTHS[-1])
            trim_prompt_cache(cache, cache[0].offset - told)
            return found

        return measure


class Mllama:
    """mlx-vlm's mllama with as many self- and cross-attention layers as ours."""

    def __init__(self, looking: tuple[int, ...]) -> None:
        # Its cross-attention layers count as layers of their own.
        layers = [layer + n for n, layer in enumerate(looking)]
        depth = TEXT["num_hidden_layers"] + len(layers)
        text = {
            **TEXT,
            "model_type": "mllama",
            "num_hidden_layers": depth,
            "cross_attention_layers": layers,
        }
        vision = mllama_config.VisionConfig(vision_output_dim=shapes.VISION["hidden_size"])
        config = mllama_config.TextConfig.from_dict(text)
        self.model = MllamaModel(mllama_config.ModelConfig(config, vision, "mllama"))
        projector = self.model.multi_modal_projector
        mx.eval(self.model.language_model.parameters(), projector.parameters())

    def steps(self, z_vis: mx.array, ids: mx.array, tokens: int) -> Any:
        """Its generation from z_vis [1 S 768] on."""
        return vlm_generate_step(
            ids[None],
            self.model,
            mx.ones((1, 1)),
            None,
            prompt_cache=make_prompt_cache(self.model),
            max_tokens=tokens,
            cached_image_features=self.model.multi_modal_projector(z_vis),
        )

    def first_token(self, z_vis: mx.array, ids: mx.array) -> None:
        for _ in self.steps(z_vis, ids, 0):
            pass

    def decode(self, z_vis: mx.array, ids: mx.array) -> list[float]:
        return timing.moments(self.steps(z_vis, ids, LENGTHS[-1] + 1), vlm_stream, LENGTHS[-1])


class Ours:
    """AgeVLM with the same language model and, of three kinds, a projector."""

    def __init__(self, fusion: FusionConfig) -> None:
        self.model = shapes.random_model(TEXT, fusion=fusion)

    def first_token(self, z_vis: mx.array, ids: mx.array) -> None:
        """From the encoder's output on."""
        self.after_projector(shapes.project(self.model, z_vis), ids)

    def after_projector(self, z_img: mx.array, ids: mx.array) -> None:
        cache = self.model.look(z_img, self.model.make_cache())
        timing.first_token(self.model, ids, cache)

    def decode(self, z_vis: mx.array, ids: mx.array) -> list[float]:
        cache = self.model.look(shapes.project(self.model, z_vis), self.model.make_cache())
        return timing.decode(self.model, ids, cache, LENGTHS[-1])


class Comparison:
    """All programs, and what is measured with them."""

    def __init__(self, trials: int) -> None:
        self.trials = trials
        mx.random.seed(0)
        self.same = Ours(shapes.FUSION)
        self.default = Ours(FusionConfig(gate_init=0.5))
        # mllama's projector is one linear layer, and its cross-attention layers have an MLP.
        self.like_mllama = Ours(FusionConfig(projector="linear", gated_mlp=True, gate_init=0.5))
        self.smolvlm = Smolvlm()
        self.mllama = Mllama(self.like_mllama.model.looking_layers)
        self.text = shapes.text_only(self.same.model)
        self.ids = mx.random.randint(0, IMAGE_TOKEN, (32,))
        mx.eval(self.ids)

    def first_token(self, image_tokens: int) -> dict[str, Any]:
        """Seconds to the first token of every program, and how many times sooner ours comes."""
        ids, width = self.ids, shapes.VISION["hidden_size"]
        z_vis = shapes.encoder_output(self.same.model, image_tokens)  # sixteen patches a token
        plain = mx.random.normal((1, image_tokens, width))  # one patch a token
        z_img = mx.random.normal((1, image_tokens, TEXT["hidden_size"]))
        mx.eval(plain, z_img)
        features = z_img[0]
        cases: dict[str, Callable[[], Any]] = {
            "text only (mlx-lm)": lambda: timing.first_token(
                self.text, ids, make_prompt_cache(self.text)
            ),
            "ours, SmolVLM's connector": lambda: self.same.first_token(z_vis, ids),
            "ours, own projector": lambda: self.default.first_token(plain, ids),
            "ours, projected tokens": lambda: self.same.after_projector(z_img, ids),
            "SmolVLM": lambda: self.smolvlm.prefill(self.smolvlm.connect(z_vis), ids),
            "SmolVLM, projected tokens": lambda: self.smolvlm.prefill(features, ids),
            "ours, built like mllama": lambda: self.like_mllama.first_token(plain, ids),
            "mllama": lambda: self.mllama.first_token(plain, ids),
        }
        taken = timing.interleaved(
            {name: lambda case=case: timing.seconds(case) for name, case in cases.items()},
            self.trials,
            lambda text: report.progress(f"first token, {image_tokens} image tokens: {text}"),
        )
        pairs = {
            "ours, SmolVLM's connector": "SmolVLM",
            "ours, own projector": "SmolVLM",
            "ours, projected tokens": "SmolVLM, projected tokens",
            "ours, built like mllama": "mllama",
        }
        return {
            "seconds": {name: timing.summary(values) for name, values in taken.items()},
            "times_sooner": {
                ours: {"than": theirs, "ratio": timing.ratio(taken[theirs], taken[ours])}
                for ours, theirs in pairs.items()
            },
        }

    def decode(self, image_tokens: int) -> dict[str, Any]:
        """Tokens/s of every program in the first and the later part of an answer."""
        ids = self.ids
        plain = mx.random.normal((1, image_tokens, shapes.VISION["hidden_size"]))
        features = mx.random.normal((image_tokens, TEXT["hidden_size"]))
        mx.eval(plain, features)
        report.progress(f"decode, {image_tokens} image tokens: prefill")
        cases: dict[str, Callable[[], list[float]]] = {
            "text only (mlx-lm)": lambda: timing.decode(
                self.text, ids, make_prompt_cache(self.text), LENGTHS[-1]
            ),
            "ours": lambda: self.default.decode(plain, ids),
            "SmolVLM": self.smolvlm.decode(features, ids),
            "ours, built like mllama": lambda: self.like_mllama.decode(plain, ids),
            "mllama": lambda: self.mllama.decode(plain, ids),
        }
        taken = timing.interleaved(
            cases,
            self.trials,
            lambda text: report.progress(f"decode, {image_tokens} image tokens: {text}"),
        )
        return {
            name: {
                f"{start + 1}-{end}": timing.summary([_rate(t, start, end) for t in trials])
                for start, end in zip((0, *LENGTHS), LENGTHS, strict=False)
            }
            for name, trials in taken.items()
        }


def _rate(moments: list[float], start: int, end: int) -> float:
    """Tokens/s from token `start` to token `end` of `timing.moments`."""
    begin = moments[start - 1] if start else 0.0
    return (end - start) / (moments[end - 1] - begin)


def tables(measured: dict[str, Any]) -> str:
    """The comparison for people."""
    first = []
    for tokens, figures in measured["first_token"].items():
        times = figures["seconds"]
        for ours, told in figures["times_sooner"].items():
            target = TARGETS.get(tokens) if told["than"].startswith("SmolVLM") else None
            wanted = (
                f"{target:g} {'met' if told['ratio'] >= target else 'MISSED'}" if target else ""
            )
            pair = [f"{times[name]['median'] * 1e3:.0f}" for name in (ours, told["than"])]
            first.append([f"{tokens}: {ours}", told["than"], *pair, f"{told['ratio']:.1f}", wanted])
        text = times["text only (mlx-lm)"]["median"] * 1e3
        first.append([f"{tokens}: text only (mlx-lm)", "", f"{text:.0f}", "", "", ""])
    columns = ["image tokens: ours", "against", "ours, ms", "theirs, ms", "times sooner", "wanted"]
    parts = ["time to first token after the encoder", report.table(columns, first)]
    for tokens, programs in measured["decode"].items():
        rows = [
            [name, *(f"{rate['median']:.1f}" for rate in rates.values())]
            for name, rates in programs.items()
        ]
        spans = next(iter(programs.values()))
        header = [f"decode, {tokens} image tokens", *(f"tokens/s, tokens {s}" for s in spans)]
        parts.append(report.table(header, rows))
    return "\n\n".join(parts)


@errors.command
def main(argv: list[str] | None = None) -> int:
    """Run the comparison; see ``--help``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image-tokens", type=int, nargs="+", default=list(TARGETS), metavar="S")
    parser.add_argument("--decode-at", type=int, nargs="*", default=[64, 1088], metavar="S")
    parser.add_argument("--trials", type=int, default=3, help="of every measurement (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number and fact")
    args = parser.parse_args(argv)
    if args.trials < 1:
        raise errors.UserError(f"--trials: expected at least 1, got {args.trials}")
    if args.json:
        files.check_writable(args.json)
    command = sys.argv[1:] if argv is None else argv
    about: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/against_mlx_vlm.py", *command]),
        "machine": report.facts(),
        "versions": {**versions(), "mlx-vlm": mlx_vlm_version},
        "text_config": TEXT,
        "vision_config": shapes.VISION,
        "prompt_tokens": 32,
    }
    print(report.machine_line(about["machine"]))
    comparison = Comparison(args.trials)
    for tokens in args.image_tokens:
        shapes.pictures(comparison.same.model, tokens)
    measured = {
        "first_token": {n: comparison.first_token(n) for n in args.image_tokens},
        "decode": {n: comparison.decode(n) for n in args.decode_at},
    }
    about["measured"] = measured
    report.progress("")
    print(f"mlx-vlm {mlx_vlm_version}, float32, random weights, 32-token question\n")
    print(tables(measured))
    if args.json:
        files.write_json(args.json, about)
        print(f"\nwritten: {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
