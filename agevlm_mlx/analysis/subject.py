"""Whoever is analysed: a respondent that also shows its hidden states."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from ..evaluation.respondent import Respondent
from ..respondents import Ours, respondent
from .states import answer_states


class Subject(Respondent, Protocol):
    """A model that can be analysed."""

    def states(
        self, image: Path | None, texts: Sequence[str], prompt: str
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Hidden states of answers `texts` to `prompt` about `image` (shown before; or None).

        Returns (text, image) with D the width of the model and one row for the embedding and
        one after each decoder layer: text f32[len(texts) layers+1 D], the mean over the tokens of
        the answer; image f32[layers+1 D] in the same coordinates, None without an image.
        """
        ...


class OurSubject(Ours):
    """One of our models with its hidden states; what they are of an image says `states`."""

    def states(
        self, image: Path | None, texts: Sequence[str], prompt: str
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Subject.states`."""
        z_img = None
        if image is not None:
            number = self._numbers[image]
            z_img = self._shown.z_img[number : number + 1]
        return answer_states(self.loaded.model, self.loaded.tokenizer, z_img, texts, prompt)


def subject(model: str | None) -> Subject:
    """The model of a checkpoint folder or hub id, ours or mlx-vlm's; see `respondent`."""
    found = respondent(model)
    if isinstance(found, Ours):
        return OurSubject(found.loaded)
    return cast(Subject, found)
