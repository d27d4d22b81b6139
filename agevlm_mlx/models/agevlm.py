"""AgeVLM: a vision encoder and an mlx-lm language model that looks where it should.

The model *is* an mlx-lm model: ``model(ids, cache=cache) -> logits``. ``model.see(images)``
returns an ordinary prompt cache that also holds the images, so that everything in mlx-lm
that takes a prompt cache works on images too.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ConcatenateKVCache, KVCache, RotatingKVCache, make_prompt_cache

from ..config import ModelConfig
from .cache import PackedCache, VisionCache
from .cross_attention import MapRequest, Recorder
from .graft import build_language_model, graft, language_model_width, tie_embeddings
from .projector import PROJECTORS
from .vision import build_encoder


@dataclass(frozen=True)
class SeenImage:
    """What a model keeps of one image, whatever is asked about it.

    layers: for each looking layer its keys and values [1 K S H], without the null slot; with
        ``fusion = "concat"`` only the projected tokens ([1 S D],).
    """

    layers: tuple[tuple[mx.array, ...], ...]

    @property
    def arrays(self) -> list[mx.array]:
        return [array for layer in self.layers for array in layer]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


class AgeVLM(nn.Module):
    """Parameters: ``vision_tower.*``, ``multi_modal_projector.*``, ``language_model.*``, and
    ``language_model.model.layers.{i}.cross_attn.*`` in the grafted layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model_type = config.model_type
        self.fusion = config.fusion_config.fusion
        self.vision_tower: Any = build_encoder(config.vision_config)
        self.language_model: Any = build_language_model(config.text_config)
        tie_embeddings(self.language_model, config.text_config)
        self._looking = graft(self.language_model, config.fusion_config)
        self.multi_modal_projector: Any = PROJECTORS[config.fusion_config.projector](
            config.fusion_config,
            self.vision_tower.width,
            language_model_width(self.language_model),
            self.vision_tower.grid,
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Gh, Gw of the tokens the text looks at; S = Gh * Gw."""
        return self.multi_modal_projector.grid

    @property
    def vision_grid(self) -> tuple[int, int]:
        """Gh, Gw of the vision encoder's own tokens."""
        return self.vision_tower.grid

    @property
    def looking_layers(self) -> tuple[int, ...]:
        """The decoder layers that look at the image: the grafted ones, or all for concat."""
        return self._looking

    @property
    def layers(self) -> list[nn.Module]:
        return self.language_model.layers

    @property
    def args(self) -> Any:
        return self.language_model.args

    def make_cache(self, max_kv_size: int | None = None) -> list[Any]:
        """An empty prompt cache for text alone; images can be added to it.

        max_kv_size: keep only that many text tokens, the first four among them; images all stay.
        """
        cache = make_prompt_cache(self.language_model)
        if max_kv_size is not None:
            # mlx-lm ignores it for architectures that make their own caches.
            cache = [
                RotatingKVCache(max_kv_size, keep=4) if type(entry) is KVCache else entry
                for entry in cache
            ]
        return self._wrap(cache)

    def _wrap(self, cache: list[Any]) -> list[Any]:
        return [VisionCache(c) if i in self._looking else c for i, c in enumerate(cache)]

    def _one_pass_cache(self) -> list[Any]:
        """Without mlx-lm's room for later tokens: for training and scoring."""
        cache = make_prompt_cache(self.language_model)
        plain = (KVCache, RotatingKVCache)
        return self._wrap([ConcatenateKVCache() if isinstance(c, plain) else c for c in cache])

    def encode(self, pixels: mx.array) -> mx.array:
        """pixels f32 [B Hi Wi 3] -> z_vis [B S' Dv], the vision encoder's tokens."""
        return self.vision_tower(pixels)

    def project(self, z_vis: mx.array) -> mx.array:
        """z_vis [B S' Dv] -> z_img [B S D], the tokens the text looks at."""
        return self.multi_modal_projector(z_vis)

    def see(self, images: mx.array, cache: list[Any] | None = None) -> list[Any]:
        """Look once at images and return the prompt cache that remembers them.

        images: f32 pixels [B Hi Wi 3], or [B M Hi Wi 3] for M images each. With a `cache`
        (a conversation under way) the images are visible to the text from here on.
        """
        if images.ndim == 5:
            B = images.shape[0]
            z_img = self.project(self.encode(images.flatten(0, 1)))
            z_img = z_img.reshape(B, -1, z_img.shape[-1])
        else:
            z_img = self.project(self.encode(images))
        return self.look(z_img, self.make_cache() if cache is None else cache)

    def look(self, z_img: mx.array, cache: list[Any] | None = None, texts: int = 1) -> list[Any]:
        """The same from projected tokens [B S D].

        Without a `cache`, one for a single pass is made, in which each image may serve
        `texts` consecutive text rows (rows b*R .. b*R+R-1 of the ids).
        """
        if cache is None:
            seen = self.look(z_img, self._one_pass_cache())
            return self.share(seen, texts)
        if texts != 1:
            raise ValueError(f"expected texts=1 with a given cache, got {texts}")
        return self.place(cache, self.remember(z_img))

    def remember(self, z_img: mx.array) -> SeenImage:
        """Projected tokens [B S D] -> all that the language model needs of them, computed once."""
        if self.fusion == "concat":
            return SeenImage(((z_img,),))
        blocks = [self.language_model.layers[i].cross_attn for i in self._looking]
        return SeenImage(tuple(block.project(z_img, null=False) for block in blocks))

    def place(self, cache: list[Any], image: SeenImage, start: int | None = None) -> list[Any]:
        """Let the text of `cache` see an image from text position `start` on (default: the next).

        With ``fusion = "concat"`` the image's tokens go through the model here and now.
        ``ValueError`` if the image was remembered by a model of other sizes.
        """
        if self.fusion == "concat":
            if not image.layers:
                raise ValueError("expected the tokens of the image, which were not kept")
            offset = cache[0].offset
            if start is not None and start != offset:
                raise ValueError(f"concat places an image at the next position {offset}: {start}")
            return self._prefix(image.layers[0][0], cache)
        if len(image.layers) != len(self._looking):
            raise ValueError(
                f"expected an image of {len(self._looking)} looking layers, "
                f"got {len(image.layers)}; was it remembered by another model?"
            )
        for i, (keys, values) in zip(self._looking, image.layers, strict=True):
            block = self.language_model.layers[i].cross_attn
            if (keys.shape[1], keys.shape[3]) != (block.n_kv_heads, block.head_dim):
                raise ValueError(
                    f"layer {i}: expected image keys [B {block.n_kv_heads} S {block.head_dim}], "
                    f"got {list(keys.shape)}; was it remembered by another model?"
                )
            if cache[i].vision is None:
                keys, values = block.with_null(keys, values)
            cache[i].add(keys, values, null=block.null_slots, start=start)
        return cache

    def share(self, seen: list[Any], texts: int, segments: mx.array | None = None) -> list[Any]:
        """A cache for one pass over `texts` text rows an image, of images looked at before.

        `seen` comes from ``look(z_img)`` or `begin` and stays as it is: keys and values of the
        images, and for concat the pass over their tokens, are computed once for all groups of
        texts. segments: int32 [B*R T] where rows hold several texts (`PackedCache`);
        all of a row see its image. ``ValueError`` if the model cannot (`packing.why_not_packed`).
        """
        return [_serve(entry, texts, segments) for entry in seen]

    def can_begin(self, seen: list[Any]) -> bool:
        """Whether `begin` can go on from these caches: all keep keys and values, nothing else."""
        texts = [getattr(entry, "text", entry) for entry in seen]
        return all(type(text) is ConcatenateKVCache for text in texts)

    def begin(self, seen: list[Any], ids: mx.array) -> list[Any]:
        """`seen` (see `share`), having read a beginning that an image's texts have in common.

        ids: int32 [B T]. The texts go on after it.
        """
        begun = self.share(seen, 1)
        self(ids, begun, keep=lambda out: out[:, -1:])  # only what stays in the caches is computed
        for entry, before in zip(begun, seen, strict=True):
            # Layers that were left out (`text_states.given_states`) stand there, too.
            getattr(entry, "text", entry).offset = before.offset + ids.shape[1]
        return begun

    def _prefix(self, z_img: mx.array, cache: list[Any]) -> list[Any]:
        """Concat: the image tokens are the first tokens of the text's own cache."""
        ids = mx.zeros(z_img.shape[:2], mx.int32)
        # Images that follow each other at the start are one prefix.
        at_start = isinstance(cache[0].offset, int) and cache[0].offset == cache[0].prefix
        own = z_img.astype(z_img.dtype)  # Gemma scales in place what it is given
        self.language_model.model(ids, cache=cache, input_embeddings=own)
        for entry in cache:
            if at_start:
                entry.prefix += z_img.shape[1]
        return cache

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
        *,
        keep: Callable[[mx.array], mx.array] | None = None,
    ) -> mx.array:
        """ids int32 [B T] -> logits [B T V], as any mlx-lm model.

        keep: chooses positions of an array [B T ..]. The output layer, often the largest of a
        small model, is computed for them only, so that the logits are ``keep(logits)``.
        """
        more = {} if input_embeddings is None else {"input_embeddings": input_embeddings}
        if keep is None:
            return self.language_model(inputs, cache=cache, **more)
        trunk, kept = self.language_model.model, False

        def chosen(out: mx.array) -> mx.array:
            nonlocal kept
            kept = True
            return keep(out)

        trunk.keep = chosen
        try:
            logits = self.language_model(inputs, cache=cache, **more)
        finally:
            trunk.keep = None
        return logits if kept else keep(logits)

    def last_logits(
        self, inputs: mx.array, cache: list[Any], last: mx.array | None = None
    ) -> mx.array:
        """ids int32 [B T] -> logits [B 1 V] of the last position, or of the positions `last`
        int32 [B] (rows that are padded on the right)."""

        def keep(out: mx.array) -> mx.array:
            return out[:, -1:] if last is None else out[mx.arange(len(last)), last][:, None]

        return self(inputs, cache, keep=keep)

    def attend(
        self,
        inputs: mx.array,
        cache: list[Any],
        rows: mx.array,
        cols: mx.array,
        heads: int | None = None,
        layers: Collection[int] | None = None,
        *,
        keep: Callable[[mx.array], mx.array] | None = None,
    ) -> tuple[mx.array, mx.array]:
        """Like the call, and where the tokens at (row, col) look.

        rows, cols: int32 [P], positions in `inputs`. heads: keep only the first ones. layers: only
        these of the layers that look, counted from 0; the maps of others are not computed.
        Returns logits [B T V] and maps fp32 [P L heads S]: for each of the L looking layers
        the attention over the image tokens, without the null slot (and for concat without
        the text), so a map sums to the share that goes to the image.
        """
        request = MapRequest(rows, cols, heads, [])
        looking = [cache[i] for i in self._looking]
        blind = [c for c in looking if c.vision is None and not c.prefix]
        if blind:
            raise ValueError("expected a cache with an image at its start: use see() or look()")
        for number, entry in enumerate(looking):
            if layers is None or number in layers:
                entry.request = request
        try:
            logits = self(inputs, cache, keep=keep)
        finally:
            for entry in looking:
                entry.request = None
        return logits, mx.stack(request.maps, axis=1)

    @contextlib.contextmanager
    def record(self, cache: list[Any], first: int = 0, newest: int = 1) -> Iterator[Recorder]:
        """Keep where the newest text positions look, from position `first` on, in every call
        with `cache` inside the block; see `Recorder`. For one sequence (B = 1)."""
        recorder = Recorder(len(self._looking), first, newest)
        for i in self._looking:
            cache[i].request = recorder
        try:
            yield recorder
        finally:
            for i in self._looking:
                cache[i].request = None

    def image_bytes(self, cache: list[Any]) -> int:
        """Bytes that the images take in `cache`, whatever the length of the text."""
        if self.fusion == "concat":
            return sum(c.prefix * c.nbytes // _capacity(c.text) for c in cache if c.prefix)
        return sum(cache[i].vision.nbytes for i in self._looking if cache[i].vision)

    @property
    def num_image_tokens(self) -> int:
        """S, the tokens of one image."""
        return math.prod(self.grid)


def _capacity(text: Any) -> int:
    """Tokens that an mlx-lm cache has room for, plain or quantised."""
    keys = text.keys[0] if isinstance(text.keys, tuple | list) else text.keys
    return keys.shape[-2]


def _serve(entry: Any, texts: int, segments: mx.array | None = None) -> Any:
    """A copy of one layer's cache whose rows each serve `texts` text rows."""
    if isinstance(entry, VisionCache):
        vision = replace(entry.vision, texts=texts) if entry.vision else None
        return VisionCache(_serve(entry.text, texts, segments), vision, entry.prefix)
    if segments is not None:
        if type(entry) is not ConcatenateKVCache or not entry.empty():
            raise ValueError(f"packed rows need an empty cache of keys, got {type(entry).__name__}")
        return PackedCache(segments)
    served = copy.copy(entry)
    if texts > 1 and getattr(served, "keys", None) is not None:
        served.keys = mx.repeat(served.keys, texts, axis=0)
        served.values = mx.repeat(served.values, texts, axis=0)
    return served
