"""From a conversation with images to a prompt cache that has read as much of it as possible."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

from .data import chat
from .data.records import Turn
from .errors import UserError
from .image_store import ImageStore, Sight
from .models.agevlm import AgeVLM, SeenImage
from .models.cache import VisionCache

#: Tokens that go through the model at once (mlx-lm's own default).
PREFILL_STEP_SIZE = 2048


#: The images of a text: (the first text position that sees it, its key) in order.
Seen = tuple[tuple[int, str], ...]


class TooLong(UserError):
    """More text than the model's context holds."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer.

    ids: all of its text, with the generation prompt. sights, starts: its images in order and
    the position in `ids` from which on the text sees each.
    """

    ids: tuple[int, ...]
    sights: tuple[Sight, ...] = ()
    starts: tuple[int, ...] = ()

    @property
    def seen(self) -> Seen:
        """The images by their keys."""
        return tuple(zip(self.starts, (sight.key for sight in self.sights), strict=True))


def agreement(ids: Sequence[Any], seen: Seen, other_ids: Sequence[Any], other_seen: Seen) -> int:
    """How many first positions of two texts are read alike: the ids are the same, and no image is
    seen that the other does not see."""
    images = _common(seen, other_seen)
    starts = [start for start, _ in (*seen[images:], *other_seen[images:])]
    return min([_common(ids, other_ids), *starts])


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items `a` and `b` begin with in common."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))


def as_turns(prompt: str | Sequence[Turn], images: Sequence[Any] = ()) -> tuple[Turn, ...]:
    """A question or a conversation as turns; `images` go to the first message of the user."""
    turns = (Turn("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
    if not images:
        return turns
    first = next((k for k, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise UserError("images: expected a message of the user that they belong to, got none")
    seen = Turn("user", turns[first].text, (*images, *turns[first].images))
    return (*turns[:first], seen, *turns[first + 1 :])


def context_length(model: AgeVLM) -> int | None:
    """Tokens that the language model was made for, if its configuration says so."""
    limit = model.config.text_config.get("max_position_embeddings")
    return limit if isinstance(limit, int) and limit > 0 else None


def room(model: AgeVLM, prompt: Prompt) -> int | None:
    """How many tokens an answer can have before the context is full; None: no limit is known."""
    limit = context_length(model)
    return None if limit is None else limit - _length(model, prompt)


def _length(model: AgeVLM, prompt: Prompt) -> int:
    extra = model.num_image_tokens * len(prompt.sights) if model.fusion == "concat" else 0
    return len(prompt.ids) + extra


def read(tokenizer: Any, turns: Sequence[Turn], store: ImageStore) -> Prompt:
    """The prompt of a conversation; its images are looked at unless `store` remembers them.

    ``UserError`` for a conversation that does not wait for an answer, an empty question, an
    image that cannot be read, and (`TooLong`) more text than the model's context holds.
    """
    if not turns or turns[-1].role != "user":
        last = f"one of the {turns[-1].role}" if turns else "no message"
        raise UserError(f"prompt: expected a message of the user at the end, got {last}")
    if not turns[-1].text.strip():
        raise UserError('prompt: expected a question, got nothing; try "Describe the image."')
    for turn in turns:
        if any("\ud800" <= letter <= "\udfff" for letter in turn.text):
            raise UserError("prompt: expected text, got bytes that are not UTF-8")
    ids = tuple(chat.prompt_ids(tokenizer, turns))
    largest, size = max(ids, default=0), store.model.args.vocab_size
    if largest >= size:  # MLX would read past the end of the embedding
        raise UserError(
            f"prompt: expected tokens below {size}, the model's vocabulary, got {largest}; the "
            "tokenizer belongs to another model"
        )
    places = chat.turn_starts(tokenizer, turns) if any(turn.images for turn in turns) else []
    # What is shown with the first question is seen by everything, a system message included, as
    # in training.
    first = next(k for k, turn in enumerate(turns) if turn.role == "user")
    places = [0 if k <= first else place for k, place in enumerate(places)]
    pairs = [
        (source, at) for turn, at in zip(turns, places, strict=False) for source in turn.images
    ]
    # The text's own length is known before any image is decoded.
    _check_room(store.model, Prompt(ids), len(pairs))
    sights = tuple(store.look(source) for source, _ in pairs)
    return Prompt(ids, sights, tuple(at for _, at in pairs))


def _check_room(model: AgeVLM, prompt: Prompt, images: int) -> None:
    limit = context_length(model)
    extra = model.num_image_tokens * images if model.fusion == "concat" else 0
    if limit is not None and len(prompt.ids) + extra >= limit:
        raise TooLong(
            f"prompt: expected fewer than {limit} tokens, the model's context, got "
            f"{len(prompt.ids) + extra}; shorten it or start a new conversation"
        )


def fit(tokenizer: Any, turns: Sequence[Turn], store: ImageStore, tokens: int) -> tuple[Turn, ...]:
    """The turns without as many of the oldest exchanges as leave no room for an answer of
    `tokens` tokens. A system message stays, and so do all images: those of a message that goes
    move to the oldest one that is left.

    Raises as `read` does, `TooLong` if not even the last message fits.
    """
    fitted = tuple(turns)
    while True:
        users = [k for k, turn in enumerate(fitted) if turn.role == "user"]
        last = len(users) < 2
        try:
            left = room(store.model, read(tokenizer, fitted, store))
            if last or left is None or left >= tokens:
                return fitted
        except TooLong:
            if last:
                raise
        first, second = users[:2]
        moved = (*fitted[first].images, *fitted[second].images)
        oldest = replace(fitted[second], images=moved)
        fitted = (*fitted[:first], oldest, *fitted[second + 1 :])


@dataclass
class Reader:
    """A prompt cache and what it has read, so that the next prompt is read from there on.

    cache: the model's own, followed by the draft model's if there is one.
    """

    model: AgeVLM
    max_kv_size: int | None = None
    draft_model: Any = None
    cache: list[Any] = field(default_factory=list)
    #: What lies at each position of the text cache: a token, or (key, n) of an image (concat).
    _track: list[Any] = field(default_factory=list)
    _seen: Seen = ()

    def __post_init__(self) -> None:
        if self.max_kv_size is not None and self.model.fusion == "concat":
            raise UserError(
                "max_kv_size: a model with fusion 'concat' would forget its image, which lies "
                "in the text; use it without"
            )

    def prepare(self, prompt: Prompt) -> list[int]:
        """Make the cache ready and return the ids that it has yet to be fed (at least one).

        What is left of an earlier prompt is kept as far as text and images agree.
        """
        track = self._new_track(prompt)
        keep = self._agreement(track, prompt.seen)
        if not self.cache or not self._rewind(keep):
            keep = 0
            self.cache = self.model.make_cache(self.max_kv_size)
            if self.draft_model is not None:
                self.cache += make_prompt_cache(self.draft_model)
        # Whatever interrupts the reading below: this much is true of the cache.
        self._track, self._seen = track[:keep], prompt.seen
        if self.model.fusion == "cross":
            self._place(prompt)
        else:
            keep = self._run_prefix(prompt, track, keep)
        self._track = track
        return track[keep:]

    def wrote(self, tokens: Sequence[int]) -> None:
        """Note the answer's `tokens`, of which the cache may already hold all but the last ones."""
        self._track = [*self._track, *tokens][: self._offset()]

    def describe(self) -> dict[str, Any]:
        """What `restore` needs beside the cache; JSON values."""
        return {"track": self._track, "seen": self._seen, "max_kv_size": self.max_kv_size}

    def restore(self, cache: list[Any], about: Mapping[str, Any]) -> list[SeenImage]:
        """Go on from a cache and its description, both from a file; the images in it.

        ``ValueError``, ``TypeError`` or ``KeyError`` if they do not fit each other or the model.
        """
        track = [tuple(entry) if isinstance(entry, list) else entry for entry in about["track"]]
        seen = tuple((int(start), str(key)) for start, key in about["seen"])
        S, limit = self.model.num_image_tokens, about["max_kv_size"]
        fresh = self.model.make_cache(None if limit is None else int(limit))
        if len(cache) != len(fresh) or not all(map(_alike, cache, fresh)):
            raise ValueError("its layers are not those of the model")
        if any(entry.offset != len(track) for entry in cache):
            raise ValueError(f"expected a cache of {len(track)} tokens in every layer")
        for entry, new in zip(cache, self._one_token(limit), strict=True):
            _check_text(entry, new)
        layers = []
        for i in self.model.looking_layers if self.model.fusion == "cross" else ():
            block: Any = self.model.layers[i].cross_attn
            vision = cache[i].vision
            slots = block.null_slots + S * len(seen) if seen else 0
            shape = (1, block.n_kv_heads, slots, block.head_dim)
            parts = (vision.keys, vision.values) if slots else ()
            if any(p.shape != shape or p.dtype != block.gate.dtype for p in parts):
                raise ValueError(f"layer {i}: expected image keys of the shape {shape}")
            layers.append((i, block.null_slots))
        images = []
        for n in range(len(seen)):
            parts = []
            for i, null in layers:
                part, vision = slice(null + n * S, null + (n + 1) * S), cache[i].vision
                parts.append((vision.keys[:, :, part], vision.values[:, :, part]))
            images.append(SeenImage(tuple(parts)))
        self.cache, self._track, self._seen, self.max_kv_size = cache, track, seen, limit
        return images

    def _one_token(self, max_kv_size: int | None) -> list[Any]:
        """A cache that has read something: what the tensors of one from a file must be like."""
        cache = self.model.make_cache(max_kv_size)
        self.model(mx.array([[0]]), cache=cache)
        return cache

    def _offset(self) -> int:
        """Positions that every cache holds."""
        own = int(self.cache[self.model.looking_layers[0]].offset)
        drafts = self.cache[len(self.model.layers) :]
        if not drafts:
            return own
        images = sum(isinstance(entry, tuple) for entry in self._track)
        return min(own, int(drafts[0].offset) + images)

    def _new_track(self, prompt: Prompt) -> list[Any]:
        if self.model.fusion == "cross":
            return list(prompt.ids)
        track: list[Any] = []
        at = 0
        for sight, start in zip(prompt.sights, prompt.starts, strict=True):
            track += prompt.ids[at:start]
            track += [(sight.key, n) for n in range(self.model.num_image_tokens)]
            at = start
        return track + list(prompt.ids[at:])

    def _agreement(self, track: list[Any], seen: Seen) -> int:
        """How many positions of the cache say what the new prompt says."""
        if not self.cache:
            return 0
        # One position at least is left to be fed: its logits are the answer's first.
        if self.model.fusion == "concat":  # the track holds the images, too
            return agreement(self._track, (), track[:-1], ())
        return agreement(self._track, self._seen, track[:-1], seen)

    def _rewind(self, keep: int) -> bool:
        """Trim every cache to `keep` positions; False if one of them cannot be."""
        # A draft model has read the text alone.
        text = keep - sum(isinstance(entry, tuple) for entry in self._track[:keep])
        layers = len(self.model.layers)
        wanted = [keep if n < layers else text for n in range(len(self.cache))]
        for entry, n in zip(self.cache, wanted, strict=True):
            offset = getattr(entry, "offset", None)
            if not isinstance(offset, int) or offset < n:
                return False
            if offset > n and not entry.is_trimmable():
                return False
        for entry, n in zip(self.cache, wanted, strict=True):
            if entry.offset > n:
                entry.trim(entry.offset - n)
        return True

    def _place(self, prompt: Prompt) -> None:
        for i in self.model.looking_layers:
            self.cache[i].vision = None
        for sight, start in zip(prompt.sights, prompt.starts, strict=True):
            self.model.place(self.cache, sight.seen, start)

    def _run_prefix(self, prompt: Prompt, track: list[Any], keep: int) -> int:
        """Concat: feed everything up to the last image; the position after it."""
        sights = {sight.key: sight for sight in prompt.sights}
        cache = self.cache[: len(self.model.layers)]
        last = max((p for p, entry in enumerate(track) if isinstance(entry, tuple)), default=-1) + 1
        at = keep
        while at < last:
            entry = track[at]
            if isinstance(entry, tuple):
                self.model.place(cache, sights[entry[0]].seen)
                at += self.model.num_image_tokens
            else:
                end = at
                while end < last and not isinstance(track[end], tuple):
                    end += 1
                for low in range(at, end, PREFILL_STEP_SIZE):
                    part = track[low : min(end, low + PREFILL_STEP_SIZE)]
                    self.model(mx.array([part]), cache=cache)
                at = end
            mx.eval([entry.state for entry in cache])
        # Where the images at the very beginning end: only their attention can be shown.
        prefix = next((p for p, entry in enumerate(track) if not isinstance(entry, tuple)), 0)
        for entry in cache:
            entry.prefix = prefix
        return at


def _alike(entry: Any, fresh: Any) -> bool:
    """Whether a layer's cache can stand for a fresh one: the same kind, or its quantised form."""
    if isinstance(fresh, VisionCache):
        return isinstance(entry, VisionCache) and _alike(entry.text, fresh.text)
    return type(entry) in (type(fresh), QuantizedKVCache)


def _check_text(entry: Any, like: Any) -> None:
    """``ValueError`` unless the text in one layer's cache has the form of that in another."""
    if isinstance(entry, VisionCache):
        entry, like = entry.text, like.text
    for name in ("keys", "values"):
        array, other = getattr(entry, name), getattr(like, name)
        if isinstance(entry, QuantizedKVCache):
            array = mx.dequantize(*array, group_size=entry.group_size, bits=entry.bits)
        B, K, room, H = array.shape
        kept = min(entry.offset, getattr(entry, "max_size", entry.offset))
        if (1, other.shape[1], other.shape[3]) != (B, K, H) or array.dtype != other.dtype:
            raise ValueError(f"expected {name} like {other.dtype} {list(other.shape)}")
        if room < kept:
            raise ValueError(f"expected {name} of {kept} tokens, got {room}")


def begin(
    model: AgeVLM, prompt: Prompt, *, max_kv_size: int | None = None
) -> tuple[list[Any], list[int]]:
    """A fresh cache in which the prompt's images are placed, and the ids to feed it."""
    reader = Reader(model, max_kv_size)
    rest = reader.prepare(prompt)
    return reader.cache, rest
