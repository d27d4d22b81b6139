"""The embedded benchmark: does the model see what is there, and look where it is?

On held-out scenes: POPE (random, popular, adversarial) with a shuffled-image and a no-image
control, caption matching, caption hallucination (CHAIR), and where the attention lies for the
noun a question asks for, against the true masks and against looking everywhere.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.image import load_image
from ..data.records import CAPTION_PROMPT
from ..errors import UserError
from ..weights import Loaded
from . import metrics
from .asking import Asker
from .benchmark import Result, Scores, Settings
from .overlay import peak_point
from .scene_folder import (
    POPE_SPLITS,
    Question,
    SceneFolder,
    SceneItem,
    read_scene_folder,
    swap_noun,
)

#: TorchRay's tolerance of the pointing game: 15 pixels where the shorter side has 224.
TOLERANCE = 15 / 224


def run(loaded: Loaded, data: Path, settings: Settings) -> Result:
    """Evaluate on the scenes folder `data`; see the module's text for what is measured."""
    folder = read_scene_folder(data)
    items = _sample(folder.items, settings)
    draws = metrics.image_draws(len(items), settings.boots, settings.seed)
    progress = _Steps(settings, len(items))
    asker = Asker(
        loaded, [i.path for i in items], load_image, settings.batch_size, progress("encode images")
    )
    score = Scores(draws)
    answers = _pope(asker, items, settings, score, progress)
    answers += _matching(asker, items, folder, settings, score, progress)
    answers += _captions(asker, items, folder, settings, score, progress)
    answers += _grounding(asker, items, folder, score, progress)
    counts = {"images": len(items)} | Counter(str(row["task"]) for row in answers)
    return Result(
        metrics=score.values,
        intervals=score.intervals,
        counts=counts,
        answers=answers,
        settings={
            "limit": settings.limit,
            "seed": settings.seed,
            "boots": settings.boots,
            "max_tokens": settings.max_tokens,
            "caption_prompt": CAPTION_PROMPT,
            "decoding": "greedy",
            "yes_no": "logit of the first answer token, Yes against No",
            "data": dict(folder.meta),
        },
    )


def _sample(items: Sequence[SceneItem], settings: Settings) -> list[SceneItem]:
    if settings.limit is None or settings.limit >= len(items):
        return list(items)
    if settings.limit < 2:
        raise UserError(
            f"--limit: expected at least 2 images (one is the other's control), "
            f"got {settings.limit}"
        )
    chosen = np.random.default_rng(settings.seed).choice(len(items), settings.limit, replace=False)
    return [items[i] for i in sorted(chosen)]


class _Steps:
    """Progress in batches, one name per part."""

    def __init__(self, settings: Settings, images: int) -> None:
        self.settings, self.total = settings, -(-images // settings.batch_size)

    def __call__(self, task: str) -> Any:
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            self.settings.progress(task, min(done, self.total), self.total)

        return step


# --- POPE ------------------------------------------------------------------------------------


def _pope(
    asker: Asker, items: Sequence[SceneItem], settings: Settings, score: Scores, progress: _Steps
) -> list[dict[str, Any]]:
    # A question of several splits is asked once.
    texts = [sorted({q.text for s in POPE_SPLITS for q in i.questions[s]}) for i in items]
    prompts = [[asker.prompt(text) for text in row] for row in texts]
    order = metrics.derangement(len(items), settings.seed)
    seen = asker.next_logits(prompts, step=progress("yes/no questions"))
    shuffled = asker.next_logits(prompts, order, progress("the same, other images"))
    blind = asker.blind_margin([t for row in texts for t in row])
    firsts = [[token for _, token in row] for row in seen]
    said = asker.answers(prompts, firsts, step=progress("the answers in words"))
    place = [{text: n for n, text in enumerate(row)} for row in texts]
    rows: list[dict[str, Any]] = []
    for split in POPE_SPLITS:
        asked = [
            (i, q, place[i][q.text]) for i, item in enumerate(items) for q in item.questions[split]
        ]
        if not asked:
            raise UserError(
                f"pope_{split}.json: expected questions about the chosen images, got none"
            )
        part = [
            {
                "task": "pope",
                "split": split,
                "image": items[i].name,
                "question_id": q.id,
                "question": q.text,
                "label": q.label,
                "answer": said[i][n],
                "margin": seen[i][n][0],
                "shuffled_image": items[order[i]].name,
                "shuffled_margin": shuffled[i][n][0],
                "blind_margin": blind[q.text],
            }
            for i, q, n in asked
        ]
        _score_split(
            score, f"pope.{split}", [i for i, _, _ in asked], [q for _, q, _ in asked], part
        )
        rows += part
    return rows


def _score_split(
    score: Scores,
    name: str,
    images: Sequence[int],
    questions: Sequence[Question],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    labels = np.array([q.label for q in questions])
    margin = np.array([row["margin"] for row in rows])
    predicted = margin > 0
    count = metrics.YesNo.count(predicted, labels)
    for key, value in count.as_dict().items():
        score.put(f"{name}.{key}", value)
    score.mean(f"{name}.accuracy", images, predicted == labels)
    score.mean(f"{name}.yes_ratio", images, predicted)
    top = metrics.per_image(images, 2 * (predicted & labels), score.draws.shape[1])[0]
    bottom = metrics.per_image(images, predicted + labels.astype(int), score.draws.shape[1])[0]
    score.put(f"{name}.f1", count.f1, metrics.ratio_draws(top, bottom, score.draws))
    score.put(f"{name}.auroc", metrics.auroc(margin[labels], margin[~labels]))
    for control in ("shuffled", "blind"):
        wrong_image = np.array([row[f"{control}_margin"] for row in rows]) > 0
        score.mean(f"{name}.{control}_accuracy", images, wrong_image == labels)
    spoken = np.array([metrics.parse_yes_no(row["answer"]) for row in rows])
    score.mean(f"{name}.text_accuracy", images, spoken == labels)
    score.put(f"{name}.constant_accuracy", float(max(labels.mean(), 1 - labels.mean())))


# --- matching --------------------------------------------------------------------------------


def _matching(
    asker: Asker,
    items: Sequence[SceneItem],
    folder: SceneFolder,
    settings: Settings,
    score: Scores,
    progress: _Steps,
) -> list[dict[str, Any]]:
    rng = np.random.default_rng(settings.seed + 1)
    order = metrics.derangement(len(items), settings.seed + 1)
    captions = [
        (
            item.caption,
            items[order[i]].caption,
            swap_noun(item.caption, list(item.objects), folder.themes, rng) or "",
        )
        for i, item in enumerate(items)
    ]
    p = asker.log_likelihood(CAPTION_PROMPT, captions, step=progress("matching captions"))
    hard = np.array([bool(row[2]) for row in captions])
    for name, column, used in (
        ("matching_auroc", 1, np.ones(len(items), bool)),
        ("matching_auroc_hard", 2, hard),
    ):
        true, other = p[used, 0], p[used, column]
        draws = metrics.auroc_draws(true, other, score.draws[:, used])
        score.put(name, metrics.auroc(true, other), draws)
        wins = ((true > other) + 0.5 * (true == other)).tolist()
        score.mean(name.replace("auroc", "win_rate"), np.flatnonzero(used).tolist(), wins)
    return [
        {
            "task": "matching",
            "image": item.name,
            "captions": list(captions[i]),
            "log_likelihood": p[i].tolist(),
        }
        for i, item in enumerate(items)
    ]


# --- captions --------------------------------------------------------------------------------


def _captions(
    asker: Asker,
    items: Sequence[SceneItem],
    folder: SceneFolder,
    settings: Settings,
    score: Scores,
    progress: _Steps,
) -> list[dict[str, Any]]:
    nouns = metrics.NounVocabulary(list(folder.themes))
    said = asker.greedy(CAPTION_PROMPT, settings.max_tokens, progress("captions"))
    mentions = [nouns.mentions(text) for text in said]
    pairs = zip(mentions, items, strict=True)
    counts = np.array([metrics.caption_counts(m, item.objects) for m, item in pairs])
    for name, parts in metrics.caption_ratios(counts).items():
        score.ratio(name, *parts)
    return [
        {
            "task": "caption",
            "image": item.name,
            "caption": text,
            "mentions": m,
            "objects": sorted(item.objects),
        }
        for item, text, m in zip(items, said, mentions, strict=True)
    ]


# --- grounding -------------------------------------------------------------------------------


def _grounding(
    asker: Asker,
    items: Sequence[SceneItem],
    folder: SceneFolder,
    score: Scores,
    progress: _Steps,
) -> list[dict[str, Any]]:
    nouns = metrics.NounVocabulary(list(folder.themes))
    asked: list[list[tuple[str, str]]] = []
    for item in items:
        positive = {q.text for s in POPE_SPLITS for q in item.questions[s] if q.label}
        pairs = [(text, noun) for text in sorted(positive) for noun in nouns.mentions(text)[:1]]
        asked.append([(t, noun) for t, noun in pairs if noun in item.objects])
    maps = asker.noun_maps(asked, progress("attention maps"))
    grid = asker.model.grid
    images: list[int] = []
    rows: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        geometry = asker.geometries[i]
        for (question, noun), (mean, half) in zip(asked[i], maps[i], strict=True):
            mask = item.mask(noun)
            coverage = geometry.mask_to_grid(mask, grid)
            if not mask.any() or not coverage.any():
                continue  # wholly hidden: nowhere to look
            x, y = peak_point(mean.reshape(grid), geometry)
            half_peak = peak_point(half.reshape(grid), geometry)
            radius = TOLERANCE * min(mask.shape)
            images.append(i)
            rows.append(
                {
                    "task": "grounding",
                    "image": item.name,
                    "question": question,
                    "noun": noun,
                    "peak": [x, y],
                    "hit": metrics.pointing_hit(x, y, mask),
                    "near": metrics.pointing_hit(x, y, mask, radius),
                    "hit_half_heads": metrics.pointing_hit(*half_peak, mask),
                    "energy": metrics.energy_in_mask(mean, coverage),
                    "energy_half_heads": metrics.energy_in_mask(half, coverage),
                    "uniform": metrics.uniform_energy(coverage),
                    "on_image": float(mean.sum()),
                    "map": [round(float(v), 5) for v in mean],
                }
            )
    for name, key in (
        ("pointing_game", "hit"),
        ("pointing_game_tolerance", "near"),
        ("pointing_game_half_heads", "hit_half_heads"),
        ("energy_in_mask", "energy"),
        ("energy_in_mask_half_heads", "energy_half_heads"),
        ("uniform_energy", "uniform"),
        ("attention_on_image", "on_image"),
    ):
        score.mean(name, images, [float(row[key]) for row in rows])
    gain = metrics.area_normalised_gain(
        score.values["energy_in_mask"], score.values["uniform_energy"]
    )
    score.put("energy_gain", gain)
    return rows
