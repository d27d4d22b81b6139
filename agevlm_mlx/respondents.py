"""Models as a benchmark asks them: ours here, mlx-vlm's in `foreign`."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from . import config, hub, weights
from .data.image import load_image
from .errors import UserError, one_line
from .evaluation.asking import Asker
from .evaluation.respondent import Looked, Request, Respondent, Said, model_name
from .generation import batch_answers
from .image_store import ImageStore, Sight
from .prompts import as_turns, read
from .sampling import Sampling

#: Images that go through the encoder together.
_ENCODED = 16


def respondent(model: str | None) -> Respondent:
    """The model of a checkpoint folder or hub id; None: the demo's or the shipped one.

    A model whose ``config.json`` is not one of ours is opened with mlx-vlm.
    """
    if model is not None:
        try:
            folder = Path(model).expanduser()
            there = folder.exists()
        except (OSError, RuntimeError, ValueError) as error:  # too long, a ~user unknown here
            raise UserError(f"--model: expected a folder or hub id: {one_line(error)}") from None
        if not there:
            folder = hub.download(model, ["config.json"])
        about = folder / "config.json"
        kind = config.read_json(about) if about.is_file() else {}
        if isinstance(kind, dict) and kind.get("model_type", "agevlm") != "agevlm":
            from .foreign import Foreign

            return Foreign(model)
    return Ours(weights.load(model))


class Ours:
    """One of our models; see `Respondent`. Not to be used from two threads."""

    def __init__(self, loaded: weights.Loaded) -> None:
        self.loaded = loaded
        self.about = about(loaded)
        self._asker: Asker | None = None
        self._numbers: dict[Path, int] = {}
        self._sights: list[Sight] = []
        self._known_heads: dict[str, list[int]] = {}
        self.show(())

    def show(self, images: Sequence[Path]) -> dict[Path, str]:
        """See `Respondent.show`."""
        self._asker, self._sights = None, []  # what was shown before makes room
        bad: dict[Path, str] = {}

        def refuse(image: Path, error: UserError) -> None:
            bad[image] = str(error)

        different = list(dict.fromkeys(images))
        self._asker = Asker(self.loaded, different, load_image, _ENCODED, refuse)
        shown = [image for image in different if image not in bad]
        self._numbers = {image: n for n, image in enumerate(shown)}
        return bad

    def generate(self, requests: Sequence[Request], max_tokens: int) -> Iterator[tuple[int, str]]:
        """See `Respondent.generate`; through mlx-lm's batch generator."""
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        store = ImageStore(model, self.loaded.preprocessor)
        asked = []
        for request in requests:
            images = () if request.image is None else (self._sight(request.image),)
            asked.append(read(tokenizer, as_turns(request.prompt, images), store))
        yield from batch_answers(model, tokenizer, asked, Sampling(max_tokens=max_tokens))

    def options(
        self, requests: Sequence[Request], options: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        """See `Respondent.options`."""
        asker = self._shown
        heads = {option: self._heads(option) for row in options for option in row}
        tokens = sorted({token for found in heads.values() for token in found})
        columns = {o: [tokens.index(token) for token in found] for o, found in heads.items()}
        texts = [asker.prompt(request.prompt) for request in requests]
        out: list[tuple[float, ...]] = [()] * len(requests)
        seen, blind = (
            partial(asker.next_log_p, tokens=tokens),
            partial(asker.blind_log_p, tokens=tokens),
        )
        for places, found in self._both(requests, texts, seen, blind):
            for place, log_p in zip(places, found, strict=True):
                kept = [log_p[columns[option]] for option in options[place]]
                out[place] = tuple(float(np.logaddexp.reduce(values)) for values in kept)
        return out

    def log_likelihood(
        self, requests: Sequence[Request], answers: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        """See `Respondent.log_likelihood`."""
        asker = self._shown
        out: list[tuple[float, ...]] = [()] * len(requests)
        # Requests with one prompt go together; captions all have the same.
        for prompt in dict.fromkeys(request.prompt for request in requests):
            mine = [n for n, request in enumerate(requests) if request.prompt == prompt]

            def seen(rows: Sequence[Sequence[Any]], prompt: str = prompt) -> list[list[Any]]:
                flat = [[answer for one in row for answer in one] for row in rows]
                found = [iter(row) for row in asker.log_likelihood(prompt, flat)]
                return [
                    [[next(left) for _ in one] for one in row]
                    for row, left in zip(rows, found, strict=True)
                ]

            def blind(rows: Sequence[Any], prompt: str = prompt) -> list[Any]:
                known: dict[str, float] = {}
                different = list(dict.fromkeys(answer for row in rows for answer in row))
                for start in range(0, len(different), 32):
                    part = different[start : start + 32]
                    found = asker.blind_log_likelihood(prompt, part).tolist()
                    known |= dict(zip(part, found, strict=True))
                return [[known[answer] for answer in row] for row in rows]

            part = [requests[n] for n in mine]
            for places, found in self._both(part, [answers[n] for n in mine], seen, blind):
                for place, values in zip(places, found, strict=True):
                    out[mine[place]] = tuple(values)
        return out

    def confidence(self, said: Sequence[Said]) -> list[tuple[float, ...]]:
        """See `Respondent.confidence`."""
        out: list[tuple[float, ...]] = [()] * len(said)

        def blind(rows: Sequence[Any]) -> list[Any]:
            raise ValueError("confidence: expected an image in every request")

        requests = [one.request for one in said]
        texts = [(one.request.prompt, one.answer, one.spans) for one in said]
        for places, found in self._both(requests, texts, self._shown.confidence, blind):
            for place, values in zip(places, found, strict=True):
                out[place] = values
        return out

    def look(self, requests: Sequence[Request], phrases: Sequence[str]) -> list[Looked | None]:
        """See `Respondent.look`."""
        asker, model = self._shown, self.loaded.model
        pairs = [
            (request.prompt, phrase) for request, phrase in zip(requests, phrases, strict=True)
        ]
        out: list[Looked | None] = [None] * len(requests)

        def blind(rows: Sequence[Any]) -> list[Any]:
            raise ValueError("look: expected an image in every request")

        for places, maps in self._both(requests, pairs, asker.phrase_maps, blind):
            for place, values in zip(places, maps, strict=True):
                image = requests[place].image
                assert image is not None
                attention = values.reshape(*values.shape[:2], *model.grid)
                has_null = model.fusion == "cross" and model.config.fusion_config.null_slot
                null = 1 - values.sum(-1) if has_null else None
                out[place] = Looked(attention, null, asker.geometries[self._numbers[image]])
        return out

    @property
    def _shown(self) -> Asker:
        assert self._asker is not None
        return self._asker

    def _both(
        self, requests: Sequence[Request], texts: Sequence[Any], seen: Any, blind: Any
    ) -> Iterator[tuple[list[int], list[Any]]]:
        """(numbers of requests, what was found for them): `seen` is given the texts of each image
        shown, `blind` those of requests without one."""
        places: list[list[int]] = [[] for _ in self._numbers]
        without = []
        for n, request in enumerate(requests):
            (without if request.image is None else places[self._numbers[request.image]]).append(n)
        if any(places):
            found = seen([[texts[n] for n in row] for row in places])
            yield from zip(places, found, strict=True)
        if without:
            yield without, blind([texts[n] for n in without])

    def _sight(self, image: Path) -> Sight:
        """The image as the batch generator takes it, from the tokens that there are."""
        if not self._sights:
            asker = self._shown
            self._sights = [
                Sight(str(path), self.loaded.model.remember(asker.z_img[n : n + 1]), geometry)
                for (path, n), geometry in zip(self._numbers.items(), asker.geometries, strict=True)
            ]
            mx.eval([sight.seen.arrays for sight in self._sights])
        return self._sights[self._numbers[image]]

    def _heads(self, option: str) -> list[int]:
        """The tokens that an answer which means `option` may begin with."""
        if option not in self._known_heads:
            spellings = {option}
            if option in ("yes", "no"):
                spellings |= {option.capitalize(), option.upper()}
            heads = {self._shown.first_token(spelling) for spelling in spellings}
            self._known_heads[option] = sorted(heads)
        return self._known_heads[option]


def about(loaded: weights.Loaded) -> Mapping[str, Any]:
    """What a result says of one of our models."""
    parameters = dict(tree_flatten(loaded.model.parameters()))
    return {
        "path": str(loaded.path),
        "name": model_name(loaded.path),
        "fingerprint": weights.fingerprint(loaded.path),
        "fusion": loaded.model.fusion,
        "parameters": sum(value.size for value in parameters.values()),
        "grid": list(loaded.model.grid),
        "looking_layers": list(loaded.model.looking_layers),
    }
