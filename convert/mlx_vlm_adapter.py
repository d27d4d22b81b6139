"""AgeVLM as mlx-vlm and mlx-lm want to find it in the ``model_file`` of a checkpoint.

`export` bundles this module with the parts of agevlm_mlx that it needs; it is never imported
itself. mlx-vlm wants ``ModelConfig``, ``TextConfig``, ``VisionConfig`` and ``Model`` with
``language_model``, ``layers`` and ``get_input_embeddings``; mlx-lm ``ModelArgs`` and ``Model``.
"""

import json
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, KVCache, RotatingKVCache
from PIL import Image

from agevlm_mlx.config import ModelConfig as AgeConfig
from agevlm_mlx.config import from_dict, read_json
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.models.cache import VisionCache
from agevlm_mlx.models.cross_attention import NEVER
from agevlm_mlx.weights import TEACHER_PREFIX, load_tokenizer


class _Table:
    """A table of config.json with its keys as attributes."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Any:
        return cls(**table)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


class TextConfig(_Table):
    """The language model's own configuration."""


class VisionConfig(_Table):
    """The vision encoder's configuration."""


@dataclass
class ModelConfig:
    """config.json, as far as the model is concerned."""

    text_config: Any
    vision_config: Any
    fusion_config: dict[str, Any]
    quantization: dict[str, Any] | None = None
    model_type: str = "agevlm"
    eos_token_id: Any = None
    #: The token that ends every prompt. No token stands for an image here, so that mlx-vlm,
    #: which compares prompts by their tokens, would take one picture's cache for another's;
    #: with this it never continues from a cached prompt.
    image_token_id: int | None = None

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> "ModelConfig":
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in table.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        return {f.name: _plain_table(getattr(self, f.name)) for f in fields(self)}

    def strict(self) -> AgeConfig:
        """The configuration that AgeVLM is made from."""
        own = {f.name for f in fields(AgeConfig)}
        return from_dict(AgeConfig, {k: v for k, v in self.to_dict().items() if k in own})


ModelArgs = ModelConfig


def _plain_table(value: Any) -> Any:
    return value.to_dict() if isinstance(value, _Table) else value


class ServedCache(VisionCache):
    """`VisionCache` with what mlx-vlm's server and prompt cache ask besides."""

    def is_trimmable(self) -> bool:
        """Not with an image: mlx-vlm would keep it for a prompt about another one."""
        return self.vision is None and not self.prefix and self.text.is_trimmable()

    def to_batch(self, left_padding: list[int]) -> "ServedCache":
        """The same kind of cache, empty, for several rows."""
        if isinstance(self.text, KVCache):
            return ServedCache(BatchKVCache(left_padding))
        if isinstance(self.text, RotatingKVCache):
            return ServedCache(BatchRotatingKVCache(self.text.max_size, left_padding))
        raise ValueError(f"{type(self.text).__name__} does not support batches in mlx-lm")

    def extend(self, other: "VisionCache") -> None:
        for entry in (self, other):
            if not hasattr(entry.text, "extend"):  # made for one row
                entry.text = entry.text.merge([entry.text])
        super().extend(other)


def _served(base: Any) -> Any:
    """An mlx-lm model class that answers mlx-vlm's calls and makes its own caches."""

    def call(
        self: Any,
        inputs: mx.array,
        inputs_embeds: mx.array | None = None,
        cache: list[Any] | None = None,
        cross_attention_states: mx.array | None = None,
        cross_attention_mask: mx.array | None = None,
        **_: Any,
    ) -> Any:
        # inputs_embeds are those of `inputs`; not every architecture takes them.
        from mlx_vlm.models.base import LanguageModelOutput

        z_img, shown = cross_attention_states, cross_attention_mask
        if cache and z_img is not None and shown is not None:  # on every part of a long prompt
            fresh = not any(entry.vision is not None or entry.prefix for entry in cache)
            if fresh and bool(shown.any()):
                return LanguageModelOutput(self.look(inputs, cache, z_img, shown[:, 0]))
        return LanguageModelOutput(base.__call__(self, inputs, cache=cache))

    def make_cache(self: Any) -> list[ServedCache]:
        if hasattr(base, "make_cache"):
            return [ServedCache(entry) for entry in base.make_cache(self)]
        return [ServedCache(KVCache()) for _ in self.layers]

    # mlx-vlm looks the module of a language model up by its name.
    members = {"__call__": call, "make_cache": make_cache, "__module__": base.__module__}
    return type("LanguageModel", (base,), members)


class Model(AgeVLM):
    """AgeVLM, called by mlx-vlm through ``get_input_embeddings`` and ``language_model``, and by
    mlx-lm (text alone) like any of its models."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.strict())
        self.config = config
        self._text_model: Any = type(self.language_model)
        self.language_model.__class__ = _served(self._text_model)
        self.language_model.look = self.look_and_read
        #: A padded row's image lies between its padding and its text: in the prompt's first part.
        self.language_model.no_chunked_prefill = self.fusion == "concat"

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """ids int32 [B T] -> logits [B T V]."""
        more = {} if input_embeddings is None else {"input_embeddings": input_embeddings}
        return self._text_model.__call__(self.language_model, inputs, cache=cache, **more)

    def make_cache(self) -> list[Any]:
        return self.language_model.make_cache()

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Without what only training needs; the names are the model's own already."""
        return {k: v for k, v in weights.items() if not k.startswith(TEACHER_PREFIX)}

    def encode_image(self, pixel_values: mx.array) -> mx.array:
        """pixels f32 [B Hi Wi 3], or [B M Hi Wi 3] for M images each -> z_img [B M*S D]."""
        if pixel_values.ndim == 4:
            return self.project(self.encode(pixel_values))
        z_img = self.project(self.encode(pixel_values.flatten(0, 1)))
        return z_img.reshape(len(pixel_values), -1, z_img.shape[-1])

    def get_input_embeddings(
        self,
        input_ids: mx.array,
        pixel_values: mx.array | None = None,
        cached_image_features: mx.array | None = None,
        **_: Any,
    ) -> Any:
        """The text's embeddings and the image tokens of each row.

        mlx-vlm joins the tensors of several requests: those without an image get zeros, and
        ``cross_attention_mask`` [B S] says which they are.
        """
        from mlx_vlm.models.base import InputEmbeddingsFeatures

        embeddings = self.language_model.model.embed_tokens(input_ids)
        z_img = cached_image_features
        if z_img is None and pixel_values is not None:
            z_img = self.encode_image(pixel_values)
        shown = z_img is not None
        if z_img is None:
            B, _, D = embeddings.shape
            z_img = mx.zeros((B, self.num_image_tokens, D), embeddings.dtype)
        return InputEmbeddingsFeatures(
            inputs_embeds=embeddings,
            cross_attention_states=z_img,
            cross_attention_mask=mx.full(z_img.shape[:2], shown),
        )

    def look_and_read(
        self, ids: mx.array, cache: list[Any], z_img: mx.array, shown: mx.array
    ) -> mx.array:
        """Look at the images z_img [B S D] and read the first part of the prompt.

        ids: [B T]. shown: bool [B], the rows that have an image. Returns logits [B T' V], of
        which the last belong to the last ids.
        """
        if self.fusion == "concat":
            return self._read_after(ids, cache, z_img, shown)
        self.look(z_img, cache)
        if not bool(shown.all()):
            for i in self.looking_layers:
                vision = cache[i].vision
                vision.start = mx.where(shown[:, None], vision.starts(), NEVER)
        return self(ids, cache)

    def _read_after(
        self, ids: mx.array, cache: list[Any], z_img: mx.array, shown: mx.array
    ) -> mx.array:
        """Concat: the rows' padding, then their images, then their texts."""
        S, text = z_img.shape[1], self.language_model.model.embed_tokens(ids)
        before = mx.array(getattr(cache[0], "left_padding", [0] * len(ids)))
        if not bool(shown.all()):  # a row without an image has S more of padding
            z_img = mx.where(shown[:, None, None], z_img, 0)
            for entry in cache:
                entry.text.left_padding = before + S * (1 - shown.astype(mx.int32))
                entry.text.offset = -entry.text.left_padding
        z_img = z_img.astype(text.dtype)
        rows = [
            mx.concatenate([text[i, :p], z_img[i], text[i, p:]])
            for i, p in enumerate(map(int, np.array(before)))
        ]
        joined = mx.stack(rows)
        for entry in cache:
            entry.prefix = S
        return self(mx.zeros(joined.shape[:2], mx.int32), cache, joined)


def _plain_tokenizer(tokenizer: Any) -> Any:
    """`tokenizer`, made to give the ids that the model was trained with.

    mlx-vlm adds special tokens to the text of a chat template, which has its own, and passes
    ``enable_thinking=False`` to it.
    """
    base: Any = type(tokenizer)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return base.__call__(self, *args, **{**kwargs, "add_special_tokens": False})

    def apply_chat_template(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("enable_thinking"):
            kwargs.pop("enable_thinking", None)
        return base.apply_chat_template(self, *args, **kwargs)

    members = {"__call__": call, "apply_chat_template": apply_chat_template}
    # Saved tokenizers name their class.
    tokenizer.__class__ = type(base.__name__, (base,), {**members, "__module__": base.__module__})
    return tokenizer


class Processor:
    """The tokenizer and the preprocessing of pictures, as one call; numpy and PIL only."""

    def __init__(self, tokenizer: Any, preprocessor: Preprocessor) -> None:
        self.tokenizer = _plain_tokenizer(tokenizer)
        self.preprocessor = preprocessor

    @classmethod
    def from_pretrained(cls, path: str | Path, **_: Any) -> "Processor":
        file = Path(path) / "preprocessor_config.json"
        preprocessor = Preprocessor.from_dict(read_json(file), str(file))
        return cls(load_tokenizer(Path(path))._tokenizer, preprocessor)

    def save_pretrained(self, path: str | Path, **_: Any) -> None:
        self.tokenizer.save_pretrained(str(path))
        text = json.dumps(self.preprocessor.to_dict(), indent=2, sort_keys=True)
        (Path(path) / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")

    def __call__(
        self,
        text: str | Sequence[str],
        images: Sequence[Image.Image] | None = None,
        padding: bool = True,
        padding_side: str = "left",
        return_tensors: str | None = None,
    ) -> dict[str, mx.array]:
        """ids and mask int32 [B T]; f32 pixels [B Hi Wi 3], or [1 M Hi Wi 3] for M images of
        one text."""
        texts = [text] if isinstance(text, str) else list(text)
        ids = self.tokenizer(texts, padding=padding, padding_side=padding_side)
        result = {name: mx.array(ids[name]) for name in ("input_ids", "attention_mask")}
        if images:
            if len(texts) not in (1, len(images)):
                raise ValueError(f"expected an image for each of {len(texts)} texts")
            pixels = mx.array(np.stack([self.preprocessor(i.convert("RGB"))[0] for i in images]))
            several = len(texts) == 1 and len(images) > 1
            result["pixel_values"] = pixels[None] if several else pixels
        return result


def _register() -> None:
    """Tell mlx-vlm what it does not take from a model file."""
    from mlx_vlm import prompt_utils
    from mlx_vlm.apc_adapters import Capability, register_capability
    from mlx_vlm.models.base import install_auto_processor_patch

    if "agevlm" not in prompt_utils.MODEL_CONFIG:
        prompt_utils.MODEL_CONFIG["agevlm"] = prompt_utils.MessageFormat.TEXT_ONLY
        install_auto_processor_patch("agevlm", Processor)
    # Its prefix cache across requests (APC_ENABLED=1) knows its own kinds of cache only.
    register_capability(ServedCache, Capability.UNSUPPORTED)
    # It also looks for an architecture of its own, and calls it unsupported if there is none.
    name = "mlx_vlm.models.agevlm"
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__dict__.update(globals())


if "mlx_vlm" in sys.modules:
    _register()
