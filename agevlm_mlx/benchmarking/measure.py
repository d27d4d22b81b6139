"""What `agevlm benchmark` measures, one function a question."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..models.agevlm import AgeVLM, SeenImage
from . import shapes, timing, traffic


@dataclass(frozen=True)
class Settings:
    """Sizes of what is measured; tokens are random."""

    image_tokens: tuple[int, ...]
    prompt_tokens: int
    generation_tokens: int
    batch_size: int
    trials: int

    @property
    def most(self) -> int:
        """The image tokens of the measurements that are made for one number of them."""
        return max(self.image_tokens)


class Bench:
    """A model, its language model alone, and the texts that both read."""

    def __init__(self, model: AgeVLM, settings: Settings, progress: timing.Progress) -> None:
        self.model, self.settings, self._progress = model, settings, progress
        self.lm = shapes.text_only(model)
        self.vocabulary = model.args.vocab_size

    def _progress_of(self, what: str) -> timing.Progress:
        return lambda text: self._progress(f"{what}: {text}")

    def _ids(self) -> mx.array:
        ids = mx.random.randint(0, self.vocabulary, (self.settings.prompt_tokens,))
        mx.eval(ids)
        return ids

    def _seen(self, image_tokens: int) -> SeenImage:
        z_vis = shapes.encoder_output(self.model, image_tokens)
        seen = self.model.remember(shapes.project(self.model, z_vis))
        mx.eval(seen.arrays)
        return seen

    def _looking(self, seen: SeenImage) -> list[Any]:
        cache = self.model.place(self.model.make_cache(), seen)
        mx.eval([entry.state for entry in cache])
        return cache

    def first_token(self, image_tokens: int) -> dict[str, Any]:
        """Seconds to the first token: of text alone (mlx-lm, and this model without an image), of a
        first question about an image from the encoder's output on, and of a second one."""
        model, ids = self.model, self._ids()
        z_vis = shapes.encoder_output(model, image_tokens)
        seen = self._seen(image_tokens)

        def text_only() -> None:
            timing.first_token(self.lm, ids, make_prompt_cache(self.lm))

        def no_image() -> None:
            timing.first_token(model, ids, model.make_cache())

        def first_question() -> None:
            image = model.remember(shapes.project(model, z_vis))
            timing.first_token(model, ids, model.place(model.make_cache(), image))

        def second_question() -> None:
            timing.first_token(model, ids, model.place(model.make_cache(), seen))

        cases = (text_only, no_image, first_question, second_question)
        taken = timing.interleaved(
            {case.__name__: lambda case=case: timing.seconds(case) for case in cases},
            3 * self.settings.trials,  # short ones
            self._progress_of(f"first token, {image_tokens} image tokens"),
        )
        return {
            "seconds": {name: timing.summary(values) for name, values in taken.items()},
            "first_question_over_text": timing.ratio(taken["first_question"], taken["text_only"]),
            "second_question_over_text": timing.ratio(taken["second_question"], taken["text_only"]),
        }

    def decode(self) -> dict[str, Any]:
        """Tokens/s of one sequence after the prompt: text alone, an image with maps off and on."""
        model, ids, tokens = self.model, self._ids(), self.settings.generation_tokens
        seen = self._seen(self.settings.most)
        cases = {
            "text_only": lambda: timing.decode(self.lm, ids, make_prompt_cache(self.lm), tokens),
            "maps_off": lambda: timing.decode(model, ids, self._looking(seen), tokens),
            "maps_on": lambda: timing.decode_with_maps(model, ids, self._looking(seen), tokens),
        }
        moments = timing.interleaved(cases, self.settings.trials, self._progress_of("decode"))
        taken = {name: [trial[-1] for trial in trials] for name, trials in moments.items()}
        return {
            "image_tokens": self.settings.most,
            "tokens_per_second": {
                name: timing.summary([tokens / value for value in values])
                for name, values in taken.items()
            },
            "maps_off_over_text": timing.ratio(taken["text_only"], taken["maps_off"]),
            "maps_on_over_text": timing.ratio(taken["text_only"], taken["maps_on"]),
        }

    def batch(self) -> dict[str, Any]:
        """Tokens/s of as many different images at once as `batch_size`, and of one at a time,
        prompts included; the images have been looked at."""
        model, size = self.model, self.settings.batch_size
        tokens = self.settings.generation_tokens
        prompts = [self._ids() for _ in range(size)]
        texts: Any = [ids.tolist() for ids in prompts]
        seen = [self._seen(self.settings.most) for _ in range(size)]
        turn = iter(range(1 << 30))

        def together() -> float:
            caches = [self._looking(image) for image in seen]
            return size * tokens / timing.batch(model, texts, caches, tokens)

        def alone() -> float:
            row = next(turn) % size
            cache = self._looking(seen[row])
            steps = timing.answer(model, prompts[row], cache, tokens)
            return tokens / timing.seconds(lambda: list(steps))

        taken = timing.interleaved(
            {"together": together, "alone": alone},
            self.settings.trials,
            self._progress_of(f"batch of {size}"),
        )
        return {
            "size": size,
            "image_tokens": self.settings.most,
            "tokens_per_second": {name: timing.summary(values) for name, values in taken.items()},
            "together_over_alone": timing.ratio(taken["together"], taken["alone"]),
        }

    def memory(self) -> dict[str, Any]:
        """Bytes that a token of text takes with and without images, and that an image takes,
        before and after an answer."""
        ids, tokens = self._ids(), self.settings.generation_tokens
        text = make_prompt_cache(self.lm)
        timing.first_token(self.lm, ids, text)
        before, after = {}, {}
        for image_tokens in self.settings.image_tokens:
            cache = self._looking(self._seen(image_tokens))
            before[image_tokens] = self.model.image_bytes(cache)
            timing.decode(self.model, ids, cache, min(tokens, 4))
            after[image_tokens] = self.model.image_bytes(cache)
        return {
            "bytes_per_text_token": {
                "agevlm": traffic.bytes_per_text_token(cache),
                "text_only": traffic.bytes_per_text_token(text),
            },
            "image_bytes": after,
            "image_bytes_constant": before == after,
            "bytes_a_number": traffic.text_arrays(text)[0].itemsize,
        }

    def moved(self, memory: dict[str, Any]) -> dict[str, traffic.Traffic]:
        """What a token moves half-way through `decode`, for both models."""
        told = self.settings.prompt_tokens + self.settings.generation_tokens // 2
        grown = memory["bytes_per_text_token"]
        return {
            "text_only": traffic.Traffic(
                traffic.weight_bytes(self.lm), told * grown["text_only"], 0
            ),
            "agevlm": traffic.Traffic(
                traffic.weight_bytes(self.model.language_model),
                told * grown["agevlm"],
                memory["image_bytes"][self.settings.most],
            ),
        }
