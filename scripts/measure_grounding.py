"""Below which grounding score is a word about something that is not in the picture?

Two kinds of words of the embedded scenes: the nouns that adversarial questions ask for (there or
not), and the nouns that the model itself says in greedy captions (there or hallucinated). Chosen
on --val: for each kind the threshold with the largest Youden's J (share of absent nouns below it
minus share of present ones), and one cautious threshold for both, the highest that at most 5 % of
the present nouns of either kind are below. Reported on --test, with 95 % intervals by bootstrap
over images; beside it AUROC, also of simpler numbers that the score could have been, and of
P(yes) when asked for the noun.

  agevlm scenes --out data/val --n 300 --seed 5 --split val
  agevlm scenes --out data/test --n 200 --seed 2 --split test
  python scripts/measure_grounding.py --val data/val --test data/test
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from agevlm_mlx import Conversation, Turn, load
from agevlm_mlx.data.image import load_image
from agevlm_mlx.data.noun_vocabulary import NounVocabulary
from agevlm_mlx.data.records import CAPTION_PROMPT
from agevlm_mlx.data.scene_texts import presence_question
from agevlm_mlx.evaluation import metrics
from agevlm_mlx.evaluation.asking import Asker
from agevlm_mlx.evaluation.grounding import NOT_GROUNDED
from agevlm_mlx.evaluation.overlay import WordMap
from agevlm_mlx.evaluation.scene_folder import SceneFolder, SceneItem, read_scene_folder
from agevlm_mlx.evaluation.words import word_maps
from agevlm_mlx.image_store import ImageStore
from agevlm_mlx.prompts import begin, read
from agevlm_mlx.sampling import Sampling
from agevlm_mlx.weights import Loaded

SCORES = ("grounding", "on_image", "peak", "P(yes)")
KINDS = {"asked": "nouns of adversarial questions", "said": "nouns of greedy captions"}


class Word(NamedTuple):
    """One noun: the number of its image, whether it is there, and its numbers (`SCORES`)."""

    image: int
    noun: str
    there: bool
    scores: tuple[float, ...]


def _word(image: int, noun: str, there: bool, found: WordMap) -> Word:
    peak = max(float(m.max()) for m in found.maps)
    return Word(image, noun, there, (found.grounding, found.on_image, peak))


def asked(
    it: Loaded, number: int, item: SceneItem, store: ImageStore, nouns: NounVocabulary
) -> Iterator[Word]:
    """The noun of each adversarial question."""
    for question in item.questions["adversarial"]:
        turn = Turn("user", question.text, (item.path,))
        cache, _ = begin(it.model, read(it.tokenizer, (turn,), store))
        there = question.label == "yes"
        turns = (turn, Turn("assistant", "Yes" if there else "No"))
        words = [w for w in word_maps(it.model, it.tokenizer, cache, turns) if w.role == "user"]
        if words:
            yield _word(number, nouns.mentions(words[0].word)[0], there, words[0])


def said(
    it: Loaded, number: int, item: SceneItem, store: ImageStore, nouns: NounVocabulary
) -> Iterator[Word]:
    """Each different noun of the model's own caption."""
    talk = Conversation(it, store=store)
    for _ in talk.ask(CAPTION_PROMPT, item.path, Sampling(max_tokens=48)):
        pass
    for found in talk.word_maps():
        if found.role == "assistant" and (named := nouns.mentions(found.word)):
            yield _word(number, named[0], named[0] in item.objects, found)


def collect(it: Loaded, folder: SceneFolder) -> dict[str, list[Word]]:
    """The words of each kind, of all pictures of a folder."""
    store, nouns = ImageStore(it.model, it.preprocessor), NounVocabulary([*folder.themes])
    words: dict[str, list[Word]] = {kind: [] for kind in KINDS}
    for number, item in enumerate(folder.items):
        words["asked"] += asked(it, number, item, store, nouns)
        words["said"] += said(it, number, item, store, nouns)
    asker = Asker(it, [item.path for item in folder.items], load_image)
    for kind in words:
        words[kind] = list(with_p_yes(asker, words[kind]))
    return words


def with_p_yes(asker: Asker, words: list[Word]) -> Iterator[Word]:
    """The words with P(yes) of their noun as the last of their numbers."""
    prompts: list[list[list[int]]] = [[] for _ in asker.geometries]
    for word in words:
        prompts[word.image].append(asker.prompt(presence_question(word.noun, False)))
    margins = [iter(row) for row in asker.margins(prompts)]
    for word in words:
        margin = next(margins[word.image])
        yield word._replace(scores=(*word.scores, 1 / (1 + float(np.exp(-margin)))))


def split(words: list[Word], score: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """One number of the words that are there, and of those that are not."""
    yes, no = ([w.scores[score] for w in words if w.there == there] for there in (True, False))
    return np.array(yes), np.array(no)


def best_threshold(words: list[Word]) -> tuple[float, float]:
    """The threshold with the largest Youden's J, and that J."""
    yes, no = split(words)
    values = np.unique(np.concatenate([yes, no]))
    candidates = (values[1:] + values[:-1]) / 2
    gain = (no[None] < candidates[:, None]).mean(1) - (yes[None] < candidates[:, None]).mean(1)
    return float(candidates[gain.argmax()]), float(gain.max())


def cautious_threshold(kinds: dict[str, list[Word]], wrong: float = 0.05) -> float:
    """The highest threshold below which at most the share `wrong` of the nouns that are there
    lies, whichever kind they are of."""
    return min(float(np.quantile(split(words)[0], wrong)) for words in kinds.values())


def report(words: list[Word], images: int, thresholds: list[float]) -> None:
    """AUROC of each number, and what each threshold flags, with intervals."""
    draws = metrics.image_draws(images)
    there = np.array([w.there for w in words])
    where = np.array([w.image for w in words])
    of_yes, of_no = draws[:, where[there]], draws[:, where[~there]]
    for n, name in enumerate(SCORES if there.any() and not there.all() else ()):
        yes, no = split(words, n)
        wins = (yes[:, None] > no) + 0.5 * (yes[:, None] == no)
        drawn = ((of_yes @ wins) * of_no).sum(1) / (of_yes.sum(1) * of_no.sum(1))
        low, high = metrics.interval(drawn)
        print(
            f"  {name:<10} AUROC {metrics.auroc(yes, no):.3f} [{low:.3f}, {high:.3f}]  "
            f"mean {yes.mean():.3f} there, {no.mean():.3f} not"
        )
    for threshold in thresholds:
        flagged = np.array([w.scores[0] < threshold for w in words])
        for name, kind in (("absent", ~there), ("present", there)):
            if not kind.any():
                continue
            low, high = metrics.mean_interval(where[kind].tolist(), flagged[kind].tolist(), draws)
            share = flagged[kind].mean()
            print(f"  below {threshold:.3f}: {share:.3f} [{low:.3f}, {high:.3f}] of {name} nouns")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--val", type=Path, required=True, help="scenes that choose the threshold")
    parser.add_argument("--test", type=Path, required=True, help="scenes that it is reported on")
    parser.add_argument("--model", help="checkpoint folder or hub id (default: as agevlm's)")
    args = parser.parse_args()
    it = load(args.model)
    val, test = (read_scene_folder(folder) for folder in (args.val, args.test))
    choosing, reporting = collect(it, val), collect(it, test)
    cautious = cautious_threshold(choosing)
    print(f"at most 5 % of present nouns below: {cautious:.3f}; the package has {NOT_GROUNDED}")
    for kind, about in KINDS.items():
        counts = [sum(w.there == t for w in choosing[kind]) for t in (True, False)]
        print(f"{about}\n chosen on {len(val.items)} scenes: {counts[0]} there, {counts[1]} not")
        thresholds = [NOT_GROUNDED]
        if all(counts):
            threshold, gain = best_threshold(choosing[kind])
            print(f"  threshold {threshold:.3f}, Youden's J {gain:.3f}")
            thresholds.insert(0, threshold)
        words = reporting[kind]
        counts = [sum(w.there == t for w in words) for t in (True, False)]
        print(f" on {len(test.items)} other scenes: {counts[0]} there, {counts[1]} not")
        report(words, len(test.items), thresholds)


if __name__ == "__main__":
    main()
