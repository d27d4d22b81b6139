"""The texts that ``--dry-run`` prints, against a batch written by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from agevlm_mlx.data.batches import Batch, TextGroup
from agevlm_mlx.training.preview import batch_text


@pytest.fixture
def job() -> Any:
    """Two texts of one image; tokens are characters."""
    texts = ["?a dog<Yes.", "?no<No."]
    ids, labels = np.zeros((2, 1, 2, 11), np.int32)
    mask = np.zeros((1, 2, 11), np.float32)
    for row, text in enumerate(texts):
        codes = [ord(c) for c in text]
        ids[0, row, : len(codes) - 1], labels[0, row, : len(codes) - 1] = codes[:-1], codes[1:]
        mask[0, row, text.index("<") : len(codes) - 1] = 1
    group = TextGroup(
        ids=ids,
        labels=labels,
        loss_mask=mask,
        rows=np.array([0, 0, 1, 0, 0], np.int32),
        cols=np.array([5, 6, 1, 7, 0], np.int32),
        target=np.ones((5, 4), np.float32),
        weight=np.array([1, 1, 1, 1, 0], np.float32),  # the last is padding
    )
    batch = Batch(np.zeros((1, 2, 2, 3)), (group,), None, ["record-7"], 0)
    stage = SimpleNamespace(name="guide")
    return SimpleNamespace(
        recipe=SimpleNamespace(stages=[stage]),
        batches=lambda stage: SimpleNamespace(batch=lambda step: batch),
        tokenizer=SimpleNamespace(decode=lambda tokens: "".join(map(chr, tokens))),
    )


def test_brackets_and_marks_stand_where_the_loss_and_the_guidance_are(job: Any):
    assert list(batch_text(job, colour=False)) == [
        "guide, record record-7:",
        "  ?a dog<^[Y^][es.]",
        "  ?n^o<[No.]",
    ]


def test_colours_replace_brackets_on_a_terminal(job: Any):
    _, first, _ = batch_text(job, colour=True)
    assert first.endswith("g<\x1b[0m\x1b[32m\x1b[4mY\x1b[0m\x1b[32mes.\x1b[0m")
