"""Where attention goes: does each head look at what the words are about?

For every object of a picture the model is asked "Is there a dog in the image?", and the attention
of the phrase's tokens is compared with the object's mask, for every looking layer and head.

`looking` returns, as JSON (a number is ``{"value", "interval", "n"}``: its mean over phrases, the
95 % interval [low, high] of a bootstrap over images or None, and how many phrases it is of)::

    question  "Is there a {noun} in the image?"
    images    how many have a phrase that was measured
    phrases   how many were measured
    skipped   {"out of view": masks that cover nothing the model sees,
               "unusable mask": not of the picture's size, or not readable}
    problems  ["FILE: reason"] for those, and for pictures that cannot be read
    layers    numbers of the L looking layers; [] for a model that shows no attention, and then
              `measures` is {} and `sinks` None
    heads     N
    measures  name -> {"value", "interval", "n": of the mean map over all layers and heads,
                "by_head": [[N numbers] * L] or None, "by_layer": [L numbers], of each layer's
                    mean map, or None,
                "baselines": name -> a number, and "ahead": a number, how far the model is above
                    it on the same phrases,
                "best_head": {"layer": index in `layers`, "head", "chosen": its value on one half
                    of the images, on which it was the best, and "value", "interval", "n": on
                    the other half} or None}
    sinks     {"share", "cell": [row, column], "often", "even",
               "by_head": {"share": [[N] * L], "cell": [[N * [row, column]] * L], "often": ...}}
               or None where pictures have different grids
    rows      [{"image", "phrase", "question", then the numbers of `pointing.measures`,
               "specificity", "baselines": {...}}]: every phrase
    kept      [{"image", "phrase", "question", "map": [[Gw] * Gh], "geometry": {fields of
               Geometry}, "number": of its row}]: all phrases of the first `keep` images

Measures, in this order: on_image (share of all attention on the image), null (on the null slot;
absent if there is none), in_mask (share of all attention inside the mask), energy (of the
attention on the image, the share inside the mask), gain (mean energy / mean energy of even
attention), hit (pointing game), near, auroc, iou_half, best_iou, nss, entropy, sink (share of the
strongest cell), specificity (energy less the mean energy of the other phrases' maps on this
mask). All but gain, in_mask and specificity as in `pointing.measures`. by_head, by_layer: None
for near, best_iou and nss. best_head: for hit, energy, gain, auroc, iou_half, specificity.

Baselines, for energy, gain, hit, auroc and iou_half: uniform (even attention over the picture;
for hit a random point), centre (a centred Gaussian; for hit the middle), shuffled (the mean over
the maps of the same image's other phrases), image_only (the mean map of all the image's phrases,
its own among them).
The last two, and specificity, need an image with two phrases or more, and `n` says of how many
phrases they are.

sinks: is it always the same token? share: of the strongest cell in the average of all maps (each
made to sum to 1) of all phrases and images; often: of how many maps it is the strongest cell;
even: what both would be by chance.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..data.scene_texts import presence_question
from ..evaluation.respondent import Request, Respondent
from .estimates import Estimates
from .examples import Example
from .looks import HEADS, Looks

Progress = Callable[[str, int, int], None]

ORDER = (*HEADS[:4], "gain", "hit", "near", "auroc", "iou_half", "best_iou", "nss", *HEADS[7:])
#: With baselines; more is better.
COMPARED = ("energy", "gain", "hit", "auroc", "iou_half")


def looking(
    respondent: Respondent,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    boots: int = 1000,
    seed: int = 0,
    keep: int = 4,
    progress: Progress = lambda task, done, total: None,
) -> dict[str, Any]:
    """Where the model looks when it is asked for each object; see the module's text.

    batch_size: images shown at a time. seed: of the bootstrap, and of the halves on which the
    best head is chosen and scored. keep: images whose maps are kept.
    """
    found = Looks(keep)
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        bad = respondent.show([example.image for example in part])
        found.problems += [f"{reason}" for reason in bad.values()]
        good = [example for example in part if example.image not in bad]
        asked = [(e, phrase) for e in good for phrase in e.objects]
        requests = [Request(e.image, presence_question(p, True)) for e, p in asked]
        looks = iter(respondent.look(requests, [p for _, p in asked]))
        for example in good:
            found.add(example, [next(looks) for _ in example.objects])
        progress("where it looks", min(start + batch_size, len(examples)), len(examples))
    return _result(found, respondent.about, boots, seed)


def _result(found: Looks, about: Mapping[str, Any], boots: int, seed: int) -> dict[str, Any]:
    L, N = found.shape
    named = list(about.get("looking_layers") or ())
    return {
        "question": "Is there a {noun} in the image?",
        "images": len(found.numbers),
        "phrases": len(found.rows),
        "skipped": found.skipped,
        "problems": found.problems,
        "layers": named if len(named) == L else list(range(L)),
        "heads": N,
        "measures": _measures(found, boots, seed) if found.rows else {},
        "sinks": _sinks(found) if found.rows and len(found.grids) == 1 else None,
        "rows": found.rows,
        "kept": found.kept,
    }


def _measures(found: Looks, boots: int, seed: int) -> dict[str, Any]:
    count = len(found.numbers)
    estimates = Estimates(count, boots, seed)
    order = np.random.default_rng(seed).permutation(count)
    choosing = np.isin(found.images, order[: count // 2])
    heads = np.stack(found.heads)  # [rows, HEADS, maps]
    out: dict[str, Any] = {}
    for name in ORDER:
        if name == "null" and name not in found.rows[0]:
            continue
        of = "energy" if name == "gain" else name
        values = _column(found.rows, of)
        bottom = np.array([row["uniform"] if name == "gain" else 1.0 for row in found.rows])
        out[name] = _estimate(estimates.ratio, found.images, values, bottom)
        by_map = heads[:, HEADS.index(of)] if of in HEADS else None
        out[name] |= _by_head(found, by_map, bottom)
        out[name]["baselines"] = {}
        if name in COMPARED:
            for baseline in ("uniform", "centre", "shuffled", "image_only"):
                other = _column([row["baselines"].get(baseline, {}) for row in found.rows], of)
                number = _estimate(estimates.ratio, found.images, other, bottom)
                ahead = _estimate(estimates.ahead, found.images, values, other, bottom)
                out[name]["baselines"][baseline] = {**number, "ahead": ahead}
        out[name]["best_head"] = None
        if by_map is not None and name in (*COMPARED, "specificity"):
            best = _best_head(found, by_map, bottom, choosing, estimates)
            out[name]["best_head"] = best
    return out


def _by_head(found: Looks, by_map: np.ndarray | None, bottom: np.ndarray) -> dict[str, Any]:
    L, N = found.shape
    if by_map is None:
        return {"by_head": None, "by_layer": None}
    values = _ratios(by_map, bottom)
    return {
        "by_head": _table(values[: L * N].reshape(L, N)),
        "by_layer": _table(values[L * N : L * N + L]),
    }


def _best_head(
    found: Looks, by_map: np.ndarray, bottom: np.ndarray, choosing: np.ndarray, estimates: Estimates
) -> dict[str, Any] | None:
    L, N = found.shape
    known = np.isfinite(by_map).all(1)
    first, second = known & choosing, known & ~choosing
    if not first.any() or not second.any():
        return None
    chosen = _ratios(by_map[first, : L * N], bottom[first])
    best = int(np.argmax(chosen))
    images = np.array(found.images)[second].tolist()
    return {
        "layer": best // N,
        "head": best % N,
        "chosen": float(chosen[best]),
        **estimates.ratio(images, by_map[second, best], bottom[second]),
    }


def _sinks(found: Looks) -> dict[str, Any]:
    L, N = found.shape
    (grid,) = found.grids
    tops = found.shares.argmax(-1)
    shares, often = (
        np.take_along_axis(values / len(found.rows), tops[:, None], -1)[:, 0]
        for values in (found.shares, found.tops)
    )
    cells = np.stack(np.unravel_index(tops, grid), -1)
    return {
        "share": float(shares[-1]),
        "cell": cells[-1].tolist(),
        "often": float(often[-1]),
        "even": found.even,
        "by_head": {
            "share": shares[: L * N].reshape(L, N).tolist(),
            "cell": cells[: L * N].reshape(L, N, 2).tolist(),
            "often": often[: L * N].reshape(L, N).tolist(),
        },
    }


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """f64[rows], nan where a row has no such number."""
    return np.array([np.nan if row.get(name) is None else float(row[name]) for row in rows])


def _estimate(
    estimate: Callable[..., dict[str, Any]], images: Sequence[int], *columns: np.ndarray
) -> dict[str, Any]:
    """An estimate from the rows that have a number in every column."""
    known = np.isfinite(np.stack(columns)).all(0)
    return estimate(np.array(images)[known].tolist(), *(column[known] for column in columns))


def _ratios(values: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """f64[maps]: sum(values) / sum(bottom) over the rows in which a value exists."""
    known = np.isfinite(values)
    tops = np.where(known, values, 0).sum(0)
    bottoms = np.where(known, bottom[:, None], 0).sum(0)
    return np.divide(tops, bottoms, out=np.full(len(tops), np.nan), where=bottoms > 0)


def _table(values: np.ndarray) -> Any:
    """Lists, None for nan."""
    table = values.astype(object)
    table[np.isnan(values)] = None
    return table.tolist()
