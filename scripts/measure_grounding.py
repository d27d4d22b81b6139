"""Does the grounding score tell objects that are in the picture from objects that are not?

AUROC over the adversarial questions of a scenes folder: the noun that each asks for, present
against absent, by the grounding score and by the simpler numbers it could have been.

  agevlm scenes --out data/test --n 200 --seed 2 --split test
  python scripts/measure_grounding.py --data data/test
"""

import argparse
from pathlib import Path

import numpy as np

from agevlm_mlx import Turn, load
from agevlm_mlx.evaluation import metrics
from agevlm_mlx.evaluation.scene_folder import read_scene_folder
from agevlm_mlx.evaluation.words import word_maps
from agevlm_mlx.image_store import ImageStore
from agevlm_mlx.prompts import begin, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model")
    args = parser.parse_args()
    it = load(args.model)
    store = ImageStore(it.model, it.preprocessor)
    present, absent = [], []
    for item in read_scene_folder(args.data).items:
        for question in item.questions["adversarial"]:
            asked = (Turn("user", question.text, (item.path,)),)
            cache, _ = begin(it.model, read(it.tokenizer, asked, store))
            turns = (*asked, Turn("assistant", "Yes" if question.label else "No"))
            words = [w for w in word_maps(it.model, it.tokenizer, cache, turns) if w.role == "user"]
            if words:
                word, peak = words[0], max(float(m.max()) for m in words[0].maps)
                scores = word.grounding, word.on_image, peak
                (present if question.label else absent).append(scores)
    print(f"{it.path}: {len(present)} present, {len(absent)} absent objects")
    columns = zip(np.array(present).T, np.array(absent).T, strict=True)
    for name, (yes, no) in zip(("grounding", "on_image", "peak"), columns, strict=True):
        print(
            f"{name:<10} AUROC {metrics.auroc(yes, no):.3f}  mean {yes.mean():.3f} {no.mean():.3f}"
        )


if __name__ == "__main__":
    main()
