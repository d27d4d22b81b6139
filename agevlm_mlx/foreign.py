"""A model of mlx-vlm as a `Respondent`: another family, asked and looked into as ours is.

mlx-vlm (https://github.com/Blaizzy/mlx-vlm) loads, preprocesses and runs the model. What it does
not offer is read from its forward pass: the log-probability of given words, hidden states, and
where the text's attention goes. Code that a checkpoint brings along is never run.
"""

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from . import foreign_inside as inside
from .config import read_json
from .data.image import Geometry, Preprocessor, load_image
from .errors import UserError, one_line
from .evaluation.respondent import Looked, Request, Said, model_name
from .hub import download
from .weights import fingerprint

#: What of a repository is fetched: no code.
_FILES = ("*.json", "*.jsonl", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja")


def _mlx_vlm() -> Any:
    if importlib.util.find_spec("mlx_vlm") is None:
        raise UserError("mlx-vlm: needed for models of other families: pip install mlx-vlm")
    try:
        import mlx_vlm
    except ImportError as error:
        raise UserError(f"mlx-vlm: installed, but cannot be imported: {one_line(error)}") from None
    return mlx_vlm


def load(folder: Path) -> tuple[Any, Any]:
    """The model and the processor of a folder, as ``mlx_vlm.load`` gives them.

    ``UserError`` without mlx-vlm, for a family that it lacks, for a damaged folder, and for a
    checkpoint whose model is Python code of its own (``model_file``), which would be run.
    """
    mlx_vlm = _mlx_vlm()
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{folder / 'config.json'}: expected an object with a model_type")
    if "model_file" in config:
        raise UserError(
            f"{folder}: expected an architecture of mlx-vlm, got a checkpoint with Python code of "
            f"its own ({config['model_file']}), which is not run; use the model it was made from"
        )
    try:
        with _quiet(), no_code():
            return mlx_vlm.load(str(folder), trust_remote_code=False)
    except Exception as error:  # hundreds of architectures, each with errors of its own
        raise UserError(
            f"{folder}: mlx-vlm cannot load this {config['model_type']} model: {one_line(error)}"
        ) from None


class Foreign:
    """A model of mlx-vlm; see `Respondent`. Not to be used from two threads.

    source: a folder or hub id. loaded: its model and processor, when they are loaded already.

    Every request is a pass of its own, in which the image is encoded again: not all families of
    mlx-vlm keep the images of a batch apart (LLaVA's 0.7.10 shows every row the last one).
    """

    def __init__(self, source: str | Path, loaded: tuple[Any, Any] | None = None) -> None:
        folder = Path(source).expanduser()
        if not folder.is_dir():
            folder = download(str(source), _FILES)
        self.model, self.processor = loaded or load(folder)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        if not hasattr(self.model, "language_model") or not hasattr(
            self.model, "get_input_embeddings"
        ):
            raise UserError(f"{source}: expected a model that writes about an image")
        parameters: Mapping[str, Any] = dict(tree_flatten(self.model.parameters()))
        self.about: Mapping[str, Any] = {
            "path": str(source),
            "name": model_name(folder),
            "fingerprint": fingerprint(folder),
            "fusion": f"mlx-vlm {self.model.config.model_type}",
            "parameters": sum(value.size for value in parameters.values()),
            "grid": None,  # of each picture its own, in some families
        }
        self._images: dict[Path, Image.Image] = {}
        self._geometries: dict[tuple[int, int], Geometry | None] = {}
        self._firsts: dict[str, list[int]] = {}

    # --- Respondent --------------------------------------------------------------------------

    def show(self, images: Sequence[Path]) -> dict[Path, str]:
        self._images, unread = {}, {}
        for path in images:
            try:
                self._images[path] = load_image(path)
            except UserError as error:
                unread[path] = str(error)
        return unread

    def generate(self, requests: Sequence[Request], max_tokens: int) -> Iterator[tuple[int, str]]:
        generate = _mlx_vlm().generate
        for n, request in enumerate(requests):
            image = self._image(request)
            prompt = self._prompt(request.prompt, image is not None)
            try:
                result = generate(
                    self.model,
                    self.processor,
                    prompt,
                    None if image is None else [image],
                    max_tokens=max_tokens,
                    temperature=0.0,
                    skip_special_tokens=True,
                )
            except Exception as error:  # of whichever processor, as in `_prepare`
                raise UserError(
                    f"{self.about['path']}: mlx-vlm cannot answer: {one_line(error)}"
                ) from None
            yield n, result.text.strip()

    def options(
        self, requests: Sequence[Request], options: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        scores = []
        for request, names in zip(requests, options, strict=True):
            log_p = _log_softmax(self._read(*self._embedded(self._inputs(request)))[-1:])[0]
            firsts = [self._first_tokens(name) for name in names]
            scores.append(tuple(float(np.logaddexp.reduce(log_p[ids])) for ids in firsts))
        return scores

    def log_likelihood(
        self, requests: Sequence[Request], answers: Sequence[Sequence[str]]
    ) -> list[tuple[float, ...]]:
        scores = []
        for request, texts in zip(requests, answers, strict=True):
            asked, row = self._inputs(request), []
            for text in texts:
                inputs, start = self._answered(asked, request.prompt, text)
                said = np.array(inputs["input_ids"][0, start:])
                # From the end: a family may put an image's tokens before the text by itself.
                logits = self._read(*self._embedded(inputs))[-len(said) - 1 : -1]
                row.append(float(_log_softmax(logits)[np.arange(len(said)), said].mean()))
            scores.append(tuple(row))
        return scores

    def confidence(self, said: Sequence[Said]) -> list[tuple[float, ...]]:
        return [()] * len(said)

    def look(self, requests: Sequence[Request], phrases: Sequence[str]) -> list[Looked | None]:
        pairs = zip(requests, phrases, strict=True)
        return [self._look(request, phrase) for request, phrase in pairs]

    def _look(self, request: Request, phrase: str) -> Looked | None:
        inputs, image = self._inputs(request), self._image(request)
        placed = self._image_tokens(request, inputs)
        if image is None or placed is None:
            return None
        grid = inside.grid(self.model.config, inputs, len(placed))
        geometry = self._geometry(image, inputs)
        columns = self._phrase(inputs["input_ids"][0].tolist(), int(placed[-1]) + 1, phrase)
        if grid is None or geometry is None or not columns:
            return None
        embedded = self._embedded(inputs)
        with inside.attention_rows(self.model.language_model, columns) as rows:
            self._read(*embedded)
        known = [np.array(row) for row in rows if row is not None]
        if not known or len(known) != len(rows):
            return None
        share = np.stack([row[..., placed].mean(0) for row in known])  # L N S
        return Looked(share.reshape(*share.shape[:2], *grid), None, geometry)

    # --- what an analysis asks besides ---------------------------------------------------------

    def states(
        self, image: Path | None, texts: Sequence[str], prompt: str
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """text f32[len(texts) layers+1 D], the mean hidden state over the tokens of each answer to
        `prompt` (without its end) after the embedding and after each decoder layer, and image
        f32[layers+1 D], that of the image's tokens; None without an image, and where its tokens
        cannot be told from the text's.

        ``UserError`` for an architecture whose layers cannot be listened to.
        """
        request = Request(image, prompt)
        asked = self._inputs(request)
        placed = self._image_tokens(request, asked)
        of_texts, of_image = [], None
        for text in texts:
            inputs, start = self._answered(asked, prompt, text)
            embedded = self._embedded(inputs)
            with inside.hidden_states(self.model.language_model) as states:
                self._read(*embedded)
            hidden = np.stack([np.array(state[0].astype(mx.float32)) for state in states])
            said = hidden[:, start - inputs["input_ids"].shape[1] :]  # and the end
            of_texts.append(said[:, : max(said.shape[1] - 1, 1)].mean(1))
            if of_image is None and placed is not None:  # texts come after: the same for all
                of_image = hidden[:, placed].mean(1)
        return np.stack(of_texts), of_image

    # --- how a request becomes tokens ----------------------------------------------------------

    def _image(self, request: Request) -> Image.Image | None:
        return None if request.image is None else self._images[request.image]

    def _prompt(self, question: str, image: bool, answer: str | None = None) -> str:
        """The text that the model reads, up to where its answer begins, or with an answer."""
        from mlx_vlm.prompt_utils import apply_chat_template

        # Words of a question must not become image tokens.
        question = question.replace(getattr(self.processor, "image_token", "<image>"), "")
        conversation: Any = question
        if answer is not None:
            turns = (("user", question), ("assistant", answer))
            conversation = [{"role": role, "content": text} for role, text in turns]
        try:
            with _quiet():
                text: Any = apply_chat_template(
                    self.processor,
                    self.model.config,
                    conversation,
                    add_generation_prompt=answer is None,
                    num_images=int(image),
                )
        except Exception as error:  # a template may raise anything
            raise UserError(
                f"{self.about['path']}: its chat template fails: {one_line(error)}"
            ) from None
        # Families that know no chat take the words alone.
        return text if isinstance(text, str) else str(text["content"])

    def _inputs(self, request: Request) -> dict[str, Any]:
        image = self._image(request)
        return self._prepare(self._prompt(request.prompt, image is not None), image)

    def _prepare(self, text: str, image: Image.Image | None) -> dict[str, Any]:
        """input_ids [1 T], and whatever else the family wants."""
        from mlx_vlm.utils import prepare_inputs, should_add_special_tokens

        config = self.model.config
        try:
            return prepare_inputs(
                self.processor,
                images=None if image is None else [image],
                prompts=text,
                image_token_index=getattr(config, "image_token_index", None),
                add_special_tokens=should_add_special_tokens(config.model_type, self.processor),
            )
        except Exception as error:  # of whichever processor
            raise UserError(
                f"{self.about['path']}: its processor fails: {one_line(error)}"
            ) from None

    def _embedded(self, inputs: Mapping[str, Any]) -> tuple[mx.array, dict[str, Any]]:
        """ids [1 T], and what the language model is given with them; the image is in it."""
        given = dict(inputs)
        ids, pixels = given.pop("input_ids"), given.pop("pixel_values", None)
        given.pop("attention_mask", None)  # one sequence, nothing is padding
        embedded = self.model.get_input_embeddings(ids, pixels, mask=mx.ones_like(ids), **given)
        given |= {k: v for k, v in embedded.to_dict().items() if v is not None}
        if "decoder_inputs_embeds" in given:
            raise UserError(
                f"{self.about['path']}: expected a decoder-only language model, got "
                f"{self.model.config.model_type}"
            )
        return ids, given

    def _read(self, ids: mx.array, given: Mapping[str, Any]) -> mx.array:
        """fp32 [T V]: the logits of one pass over the whole sequence."""
        from mlx_vlm.models.cache import make_prompt_cache

        language_model = self.model.language_model
        out = language_model(ids, cache=make_prompt_cache(language_model), **given)
        logits = out.logits[0].astype(mx.float32)
        mx.eval(logits)
        return logits

    # --- where words are in the tokens ---------------------------------------------------------

    def _answer_ids(self, question: str, answer: str) -> tuple[int, list[int]]:
        """How many of the prompt's last tokens merge with the answer, and the tokens from there
        on, with the one that ends the answer."""
        text, whole = self._prompt(question, False), self._prompt(question, False, answer)
        asked = self._prepare(text, None)["input_ids"][0].tolist()
        if whole.startswith(text):
            ids = self._prepare(whole, None)["input_ids"][0].tolist()
        else:  # a template that rewrites what was said
            ids = asked + self.tokenizer.encode(answer, add_special_tokens=False)
        pairs = enumerate(zip(asked, ids, strict=False))
        same = next((n for n, (a, b) in pairs if a != b), min(len(asked), len(ids)))
        ends = list(self.tokenizer.stopping_criteria.eos_token_ids)
        said = ids[same:]
        stop = next((n for n, token in enumerate(said) if token in ends), None)
        return len(asked) - same, said + ends[:1] if stop is None else said[: stop + 1]

    def _answered(
        self, asked: Mapping[str, Any], question: str, answer: str
    ) -> tuple[dict[str, Any], int]:
        """The inputs of a prompt, and an answer after it; the position where that begins."""
        merged, said = self._answer_ids(question, answer)
        before = asked["input_ids"].shape
        start = before[1] - merged
        inputs = dict(asked)
        for name, value in asked.items():
            if isinstance(value, mx.array) and value.shape == before:  # one number a token
                last = mx.repeat(value[:, -1:], len(said), axis=1)
                inputs[name] = mx.concatenate([value[:, :start], last], axis=1)
        new = mx.array([said], asked["input_ids"].dtype)
        inputs["input_ids"] = mx.concatenate([asked["input_ids"][:, :start], new], axis=1)
        return inputs, start

    def _first_tokens(self, option: str) -> list[int]:
        """Tokens that an answer may begin with when it is this option: as the template puts it,
        and as a word of its own, after a space or not."""
        if option not in self._firsts:
            spellings = [option]
            if option.lower() in ("yes", "no"):
                spellings = [option.lower(), option.capitalize(), option.upper()]
            found = set()
            for spelling in spellings:
                rows = [self._answer_ids("?", spelling)[1]]
                for word in (spelling, f" {spelling}"):
                    rows.append(self.tokenizer.encode(word, add_special_tokens=False))
                for row in rows:
                    begun = self.tokenizer.decode(row[:1]).strip()
                    if begun and spelling.startswith(begun):
                        found.add(row[0])
            if not found:
                raise UserError(
                    f"{self.about['path']}: no token of its tokenizer begins {option!r}"
                )
            self._firsts[option] = sorted(found)
        return self._firsts[option]

    def _phrase(self, ids: Sequence[int], first: int, phrase: str) -> list[int]:
        """Positions of a phrase's tokens from `first` on, from the last one of its first word on
        (as ours are guided); [] where it is not."""
        ends = [
            len(self.tokenizer.decode(ids[first:n], clean_up_tokenization_spaces=False))
            for n in range(first + 1, len(ids) + 1)
        ]
        text = self.tokenizer.decode(ids[first:], clean_up_tokenization_spaces=False)
        found = re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE)
        if found is None or not phrase.strip():
            return []
        known = found.start() + len(phrase.split()[0])
        starts = [0, *ends[:-1]]
        own = [
            n
            for n, (a, b) in enumerate(zip(starts, ends, strict=True))
            if a < found.end() and b > found.start() and b > a
        ]
        word = max(n for n in own if starts[n] < known)
        return [first + n for n in own if n >= word]

    # --- where the image is --------------------------------------------------------------------

    def _image_tokens(self, request: Request, inputs: Mapping[str, Any]) -> np.ndarray | None:
        """Positions of the image's tokens, or None where they cannot be told from the text's."""
        names = ("image_token_index", "image_token_id")
        wanted = {getattr(self.model.config, name, None) for name in names} - {None}
        if request.image is None or len(wanted) != 1:
            return None
        (token,) = wanted
        if token in self._inputs(Request(None, request.prompt))["input_ids"][0].tolist():
            return None
        placed = np.flatnonzero(np.array(inputs["input_ids"][0]) == token)
        return placed if len(placed) else None

    def _geometry(self, image: Image.Image, inputs: Mapping[str, Any]) -> Geometry | None:
        """Of pictures of this size in the model's input; None where that is not one square."""
        size = image.size
        if inputs.get("image_grid_thw") is not None:  # the sides are rounded, nothing else
            return Preprocessor(resize="stretch").geometry(*size)
        if size not in self._geometries:
            text = self._prompt("?", True)
            self._geometries[size] = inside.geometry(lambda p: self._prepare(text, p), *size)
        return self._geometries[size]


@contextmanager
def no_code() -> Iterator[None]:
    """No Python file of a checkpoint is imported by transformers: some families of mlx-vlm trust
    all code by themselves, whatever they are told."""
    from transformers import dynamic_module_utils

    def refuse(name: str, *_: Any, **__: Any) -> Any:
        raise UserError(f"it wants to run {name} of its own, which is not done")

    run = dynamic_module_utils.get_class_in_module
    dynamic_module_utils.get_class_in_module = refuse
    try:
        yield
    finally:
        dynamic_module_utils.get_class_in_module = run


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks on how mlx-vlm calls it, once a question."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _log_softmax(logits: mx.array) -> np.ndarray:
    """f64 of fp32 [T V]."""
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True), np.float64)
