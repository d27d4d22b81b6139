"""One chat: its turns, the images that belong to them, and the cache that has read them."""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from mlx_lm.utils import load as mlx_lm_load

from .config import from_dict
from .data import chat
from .data.image import Geometry, ImageSource, load_image
from .data.records import Turn
from .errors import UserError, one_line
from .evaluation.overlay import Picture, WordMap
from .evaluation.words import Look, looks, word_maps
from .generation import Images, Response, as_list, check_options, stream
from .hub import download
from .image_store import ImageStore, Sight
from .prompts import Prompt, Reader, begin, fit, read, room
from .sampling import Sampling
from .weights import Loaded

Found = TypeVar("Found", WordMap, Look)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags for `options`, named as mlx-lm's."""
    group = parser.add_argument_group("memory and speed")
    add = group.add_argument
    add("--system-prompt", metavar="TEXT", help="a first message that is no question")
    add(
        "--kv-bits", type=int, choices=(4, 8), help="keep the text's keys and values in 4 or 8 bits"
    )
    add("--kv-group-size", type=int, metavar="N", help="32, 64 or 128 (the largest that fits)")
    add("--quantized-kv-start", type=int, metavar="N", help="quantise from N tokens on (0)")
    add("--max-kv-size", type=int, metavar="N", help="keep only N tokens of text; images all stay")
    add("--prefill-step-size", type=int, metavar="N", help="prompt tokens read at once (2048)")
    add("--draft-model", metavar="M", help="a smaller mlx-lm model that guesses ahead: same text, "
        "fewer passes")  # fmt: skip
    add("--num-draft-tokens", type=int, metavar="N", help="guesses at a time (2)")


def options(args: argparse.Namespace, loaded: Loaded) -> dict[str, Any]:
    """The arguments of `Conversation` that the flags of `add_arguments` ask for."""
    names = ("kv_bits", "kv_group_size", "quantized_kv_start", "max_kv_size", "prefill_step_size",
             "num_draft_tokens")  # fmt: skip
    chosen = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.system_prompt:
        chosen["system"] = args.system_prompt
    try:
        check_options(loaded.model, dict(chosen), chosen.get("max_kv_size"))
    except UserError as error:
        name, rest = str(error).split(":", 1)
        raise UserError(f"--{name.replace('_', '-')}:{rest}") from None
    if args.draft_model:
        chosen["draft_model"] = _load_draft(args.draft_model, loaded)
    elif args.num_draft_tokens is not None:
        raise UserError("--num-draft-tokens: expected --draft-model beside it")
    return chosen


def _load_draft(source: str, loaded: Loaded) -> Any:
    """An mlx-lm model whose tokens are those of `loaded`."""
    folder = Path(os.path.expanduser(source))  # a ~user unknown here stays as it is
    if not folder.is_dir():
        folder = download(source, ["*.json", "model*.safetensors", "*.jinja", "tokenizer.model"])
    try:
        draft, tokenizer = mlx_lm_load(str(folder))[:2]
    except Exception as error:  # mlx-lm raises whatever the folder's content leads to
        raise UserError(f"--draft-model: {source}: {one_line(error)}") from None
    if tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
        raise UserError(
            f"--draft-model: {source}: expected the model's own tokenizer, got another one; "
            "take a smaller model of the same family"
        )
    return draft


class Conversation:
    """Questions and answers about images, in which nothing is read or looked at twice.

    system: a first message that is no question. store: shared by conversations that may meet the
    same images. max_kv_size: keep only so many text tokens. draft_model: an mlx-lm model with the
    same tokenizer for speculative decoding. Further options (``kv_bits`` ...) go to mlx-lm.
    Belongs to the thread that owns the model.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        system: str | None = None,
        store: ImageStore | None = None,
        max_kv_size: int | None = None,
        draft_model: Any = None,
        **options: Any,
    ) -> None:
        self.loaded = loaded
        own = ImageStore(loaded.model, loaded.preprocessor)
        self.store = own if store is None else store
        self._system = (Turn("system", system),) if system else ()
        self._options = options | ({"draft_model": draft_model} if draft_model is not None else {})
        check_options(loaded.model, self._options, max_kv_size)
        self._new_reader = lambda: Reader(loaded.model, max_kv_size, draft_model)
        self.reset()

    def reset(self) -> None:
        """Forget everything said and shown; the store may still remember the images."""
        self.turns: tuple[Turn, ...] = self._system
        self._reader = self._new_reader()

    @property
    def cache(self) -> list[Any]:
        """The prompt cache that has read the conversation."""
        return self._reader.cache

    def ask(
        self,
        text: str,
        images: Images = (),
        sampling: Sampling | None = None,
        *,
        attention: bool = False,
    ) -> Iterator[Response]:
        """The answer to `text`, piece by piece; `images` belong to this message.

        Closing the iterator stops the answer; what was said so far stays as the answer. On an
        error, which comes before the first piece, the conversation is as it was. ``UserError``
        for images that cannot be read, an empty message, and more than the context holds.
        """
        sampling = sampling or Sampling()
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        turns = (*self.turns, Turn("user", text, tuple(as_list(images))))
        prompt = read(tokenizer, turns, self.store)
        return self._answer(turns, prompt, sampling, room(model, prompt), attention)

    def _answer(
        self,
        turns: tuple[Turn, ...],
        prompt: Prompt,
        sampling: Sampling,
        limit: int | None,
        attention: bool,
    ) -> Iterator[Response]:
        tokens: list[int] = []
        said, started = "", False
        try:
            ids = self._reader.prepare(prompt)
            for response in stream(
                self.loaded.model,
                self.loaded.tokenizer,
                ids,
                self._reader.cache,
                sampling,
                limit,
                before=prompt.ids[: len(prompt.ids) - len(ids)],
                attention=attention,
                **self._options,
            ):
                started = True
                tokens.append(response.token)
                said += response.text
                yield response
        finally:
            if started:
                self._reader.wrote(tokens)
                self.turns = (*turns, Turn("assistant", said.strip()))

    def make_room(
        self, text: str, images: Images = (), tokens: int = 64
    ) -> tuple[int, tuple[ImageSource | Sight, ...]]:
        """Forget the oldest exchanges until `text` can be asked and its answer have `tokens`
        tokens: how many were forgotten, and the images to ask with. Those are `images`, and what
        the forgotten ones showed if none is left that could show it, see `prompts.fit`.

        ``UserError`` as `ask` raises it, if even the question alone is too long.
        """
        turns = (*self.turns, Turn("user", text, tuple(as_list(images))))
        fitted = fit(self.loaded.tokenizer, turns, self.store, tokens)
        self.turns = fitted[:-1]
        return (len(turns) - len(fitted)) // 2, fitted[-1].images

    def describe(self) -> dict[str, Any]:
        """What `restore` needs beside the cache itself; JSON values."""
        turns, sights = [], []
        for turn in self.turns:
            seen = [self.store.look(source) for source in turn.images]
            turns.append([turn.role, turn.text, len(seen)])
            sights += [[sight.key, asdict(sight.geometry)] for sight in seen]
        return {"turns": turns, "sights": sights, **self._reader.describe()}

    def restore(self, cache: list[Any], about: Mapping[str, Any]) -> None:
        """Go on from a cache and what `describe` said of it, both from a file.

        Raises ``KeyError``, ``TypeError`` or ``ValueError`` if they do not fit each other or the
        model.
        """
        remembered = self._reader.restore(cache, about)
        seen = [
            Sight(str(key), image, from_dict(Geometry, geometry, "geometry"))
            for (key, geometry), image in zip(about["sights"], remembered, strict=True)
        ]
        turns: list[Turn] = []
        for role, text, count in about["turns"]:
            if role not in ("system", "user", "assistant") or not 0 <= count <= len(seen):
                raise ValueError("expected turns of the system, the user and the assistant")
            turns.append(Turn(role, text, tuple(seen[:count])))
            seen = seen[count:]
        if seen or not turns or turns[-1].role != "assistant":
            raise ValueError("expected an answer at the end and every image in a turn")
        chat.turn_starts(self.loaded.tokenizer, turns)  # a template may refuse them
        self.turns = tuple(turns)

    @property
    def image_sources(self) -> list[ImageSource | Sight]:
        """Every image of the conversation, in order."""
        return [source for turn in self.turns for source in turn.images]

    def pictures(self) -> list[Picture]:
        """The images as `evaluation.overlay` shows them, in the order of a word's maps.

        ``UserError`` if the conversation comes from a file, which keeps no pictures.
        """
        pictures = []
        for source in self.image_sources:
            if isinstance(source, Sight):
                raise UserError(
                    "image: expected its file to draw on; a saved cache keeps no pictures"
                )
            pictures.append(Picture(load_image(source), self.store.look(source).geometry))
        return pictures

    def word_maps(self, words: Sequence[str] | None = None) -> list[WordMap]:
        """Where the words of the last exchange looked (only the given `words`, in any case).

        With ``fusion = "concat"`` only of images that came first. ``UserError`` before the first
        answer, without an image, and for concat when the conversation comes from a file.
        """
        found = self._last_words(word_maps)
        wanted = None if words is None else {word.lower() for word in words}
        return [m for m in found if wanted is None or m.word in wanted]

    def looks(self) -> list[Look]:
        """Where every single word of the last exchange looked, head by head; raises as
        `word_maps`."""
        return self._last_words(looks)

    def _last_words(self, find: Callable[..., list[Found]]) -> list[Found]:
        if not self.turns or self.turns[-1].role != "assistant":
            raise UserError("words: expected an answer to look at; ask something first")
        if not self.image_sources:
            raise UserError("words: expected an image that they can look at; show one first")
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        prompt = read(tokenizer, self.turns[:-1], self.store)
        if not all(sight.seen.layers for sight in prompt.sights):
            raise UserError("words: a saved cache of a concat model keeps no tokens of the image")
        cache, rest = begin(model, prompt)
        if model.fusion == "concat" and not cache[0].prefix:
            raise UserError(
                "words: a model with fusion 'concat' can show only images of the first message; "
                "start anew with the image"
            )
        return find(model, tokenizer, cache, self.turns, len(prompt.ids) - len(rest))
