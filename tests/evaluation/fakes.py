"""Models whose answers are known, with the interface of `AgeVLM` and no weights.

A fake knows the scenes by their pixels and says what its script says about (picture, question),
token by token, so that every score of a benchmark has a known value.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from agevlm_mlx.data import chat
from agevlm_mlx.data.image import Preprocessor, load_image
from agevlm_mlx.evaluation.metrics import NounVocabulary
from agevlm_mlx.evaluation.scene_folder import SceneFolder, SceneItem
from agevlm_mlx.weights import Loaded

#: What a fake says to a question about a picture (None: asked without one).
Script = Callable[[SceneItem | None, str], str]


class FakePreprocessor:
    """Gives the picture's number, found by its bytes, in place of pixels."""

    def __init__(self, items: Sequence[SceneItem]) -> None:
        self.numbers = {load_image(item.path).tobytes(): n for n, item in enumerate(items)}
        self.real = Preprocessor()

    def __call__(self, image: Any) -> tuple[np.ndarray, Any]:
        number = self.numbers[image.tobytes()]
        pixels = np.full((2, 2, 3), number, np.float32)
        return pixels, self.real.geometry(*image.size)


class FakeModel:
    """Answers by a script; `looks` places the attention for (picture, noun) as f[S]."""

    grid = (8, 8)
    fusion = "cross"

    def __init__(self, folder: SceneFolder, tokenizer: Any, script: Script) -> None:
        self.items, self.tokenizer, self.script = folder.items, tokenizer, script
        self.nouns = NounVocabulary(list(folder.themes))
        self.vocabulary = len(tokenizer)
        self.assistant = tokenizer.convert_tokens_to_ids(chat.ASSISTANT)
        self.end = tokenizer.eos_token_id
        self.passes = 0

    def encode(self, pixels: mx.array) -> mx.array:
        return pixels[:, 0, :1, :1]  # [B 1 1]

    def project(self, z_vis: mx.array) -> mx.array:
        return z_vis

    def make_cache(self) -> list[Any]:
        return [{"items": None, "past": None}]

    def look(self, z_img: mx.array, cache: Any = None, texts: int = 1) -> list[Any]:
        items = [self.items[int(n)] for n in np.array(z_img)[:, 0, 0]]
        return [{"items": [i for i in items for _ in range(texts)], "past": None}]

    def __call__(self, ids: mx.array, cache: list[Any]) -> mx.array:
        self.passes += 1
        entry, new = cache[0], np.array(ids)
        past = entry["past"]
        rows = new if past is None else np.concatenate([past, new], 1)
        entry["past"] = rows
        logits = np.zeros((*rows.shape, self.vocabulary), np.float32)
        for b, row in enumerate(rows.tolist()):
            if self.assistant not in row:
                continue  # a row of padding
            start = row.index(self.assistant)
            item = None if entry["items"] is None else entry["items"][b]
            answer = self.script(item, self.tokenizer.decode(row[1:start]))
            said = [*self.tokenizer(answer, add_special_tokens=False)["input_ids"], self.end]
            for k, token in enumerate(said[: len(row) - start]):
                logits[b, start + k, token] = 10.0
        return mx.array(logits[:, rows.shape[1] - new.shape[1] :])

    def attend(
        self, ids: mx.array, cache: list[Any], rows: mx.array, cols: mx.array
    ) -> tuple[mx.array, mx.array]:
        maps = []
        for row, col in zip(np.array(rows).tolist(), np.array(cols).tolist(), strict=True):
            tokens = np.array(ids)[row].tolist()
            question = self.tokenizer.decode(tokens[1 : tokens.index(self.assistant)])
            noun = self.nouns.mentions(question)[0]
            assert self.tokenizer.decode([tokens[col]]).strip() in noun, "not the noun's token"
            item = cache[0]["items"][row]
            maps.append(self.looks(item, noun))
        both = np.stack([np.stack(maps)] * 2, 1)  # heads: the first looks, the second is blank
        heads = np.stack([both, np.full_like(both, 1e-6)], 2)
        return self(ids, cache), mx.array(heads.astype(np.float32))

    def looks(self, item: SceneItem, noun: str) -> np.ndarray:
        """Everything on the cell that the object covers most."""
        mask = item.mask(noun)
        coverage = Preprocessor().geometry(*mask.shape[::-1]).mask_to_grid(mask, self.grid)
        return (np.arange(len(coverage)) == coverage.argmax()) * 0.8


def fake(folder: SceneFolder, script: Script) -> Loaded:
    """A `Loaded` around a scripted model, with a tokenizer made from the folder's words."""
    nouns = list(folder.themes)
    texts = ["Describe the image.", "Yes", "No"] + [i.caption for i in folder.items]
    texts += [f"Is there a {noun} in the image?" for noun in nouns] * 3
    tokenizer = TokenizerWrapper(chat.build_tokenizer(texts, 600))
    model = FakeModel(folder, tokenizer._tokenizer, script)
    return Loaded(model, tokenizer, FakePreprocessor(folder.items), Path("fake"))  # pyright: ignore[reportArgumentType]
