"""The teacher's labels that a run needs: found, made, and checked before the first step."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.image import Preprocessor
from ..data.record_set import Records, read_problems
from ..errors import UserError
from ..sam.index import INDEX
from ..sam.jobs import Jobs, complete
from ..sam.store import Store, image_sha256
from ..sam.writer import BAD_RECORDS
from .stages import Recipe

#: Images whose files are hashed to see that a store belongs to the data.
SAMPLE = 256


@dataclass(frozen=True)
class Labelling:
    """Opens stores for one student: its preprocessing and token grid."""

    recipe: Recipe
    preprocessor: Preprocessor
    grid: tuple[int, int]
    #: Run ``agevlm teach`` where the recipe says so and labels are missing.
    teach: bool
    say: Callable[[str], None]

    def open(
        self,
        key: str,
        path: Path | None,
        data: Path | None,
        records: Records | None,
        features: bool,
    ) -> Store | None:
        """The checked store ``data.<key>`` at `path` for `data`; None if the recipe names none."""
        if path is None or data is None or records is None:
            return None
        wanted = Jobs(records, every_image=features, on_error=self.recipe.data.on_error)
        if not self._complete(path, wanted):
            if not self.recipe.data.teach:
                command = shlex.join(self._command(path, data, features)[1:])
                advice = f"run `python {command}`, or set data.teach=true"
                if (path / INDEX).is_file() and Store(path).meta.prompt.startswith("auto"):
                    advice = "run `agevlm teach` on it again, with the flags that made the store"
                raise UserError(
                    f"data.{key}: {path} does not hold labels for all images of {data}; {advice}"
                )
            if not self.teach:
                self.say(f"data.{key}: {path} will be made by `agevlm teach`; unguided until then")
                return None
            self.say(f"teaching: SAM labels {data}")
            self._run(path, data, features)
        store = Store(path)
        # What the teacher could not use is in the data, not in the store.
        sample = [wanted[n] for n in range(0, len(wanted), max(len(wanted) // SAMPLE, 1))]
        keys = {job.key: image_sha256(job.path) for job in sample if job.key in store}
        store.check(self.preprocessor.fingerprint(), self.grid, keys)
        asked = self.recipe.data.prompt
        if asked != "box" and not store.meta.prompt.startswith(asked):
            raise UserError(
                f"data.{key}: expected labels made with data.prompt = {asked!r}, got those of "
                f"{path}, made with {store.meta.prompt!r}; name another folder"
            )
        if features and not store.meta.feature_channels:
            raise UserError(
                f"losses.features > 0: {path} holds no features; make a store with "
                "`agevlm teach --features`"
            )
        return store

    def check_guided(self, records: Records, store: Store | None) -> None:
        """``UserError`` for a stage whose attention or feature loss has nothing to learn from."""
        for stage in self.recipe.stages:
            if stage.losses.features > 0 and store is None:
                raise UserError(
                    f"stage '{stage.name}': losses.features > 0 needs data.store, made with "
                    "`agevlm teach --features`"
                )
            kinds = {kind for spec in stage.texts for kind in spec.kinds}
            own = np.isin(records.kind_of, [n for n, k in enumerate(records.kinds) if k in kinds])
            attention = stage.losses.attention
            nowhere = records.absent[own].any() or "end" in attention.positions
            if attention.absent > 0 and not nowhere:
                raise UserError(
                    f"stage '{stage.name}': losses.attention.absent > 0, but no phrase in texts of "
                    'its kinds says "absent": true; mark phrases about absent things, as `agevlm '
                    "scenes --absent-phrases` does, add the position 'end', or set it to 0"
                )
            if not stage.losses.attention.guides:
                continue
            if not records.guided[own].any():
                raise UserError(
                    f"stage '{stage.name}': losses.attention.weight > 0, but no text of its kinds "
                    "has a phrase to guide; add phrases to the data or set the weight to 0"
                )
            if store is None and not records.masked[own].any():
                raise UserError(
                    f"stage '{stage.name}': losses.attention.weight > 0, but no phrase has a mask; "
                    "label the data with `agevlm teach` and set data.store"
                )

    def _complete(self, path: Path, wanted: Jobs) -> bool:
        if not (path / INDEX).is_file():
            return False
        left_out, problems = path / BAD_RECORDS, []
        if self.recipe.data.on_error == "skip" and left_out.is_file():
            problems = read_problems(left_out)
        if not complete(Store(path), wanted, [problem.where for problem in problems]):
            return False
        if problems:
            self.say(f"{path}: {len(problems)} left out by the teacher, listed in {left_out}")
        return True

    def _command(self, path: Path, data: Path, features: bool) -> list[str]:
        command = [sys.executable, "-m", "agevlm_mlx.teach", f"--data={data}", f"--out={path}"]
        own = self.preprocessor
        flags = Preprocessor(image_size=own.image_size, resize=own.resize)
        if flags.fingerprint() == own.fingerprint():
            command += [f"--image-size={own.image_size}", f"--resize={own.resize}"]
        else:
            command.append(f"--preprocessing={json.dumps(own.to_dict())}")
        command.append(f"--grid={self.grid[0]}x{self.grid[1]}")
        prompt = self.recipe.data.prompt
        if prompt == "box" and (path / INDEX).is_file() and Store(path).meta.prompt == "point":
            prompt = "point"
        if prompt != "box":
            command.append(f"--prompt={prompt}")
        if self.recipe.data.on_error == "skip":
            command.append("--on-error=skip")
        return [*command, "--features"] if features else command

    def _run(self, path: Path, data: Path, features: bool) -> None:
        # In its own process: the teacher needs torch, training never imports it.
        command = self._command(path, data, features)
        # It ends with this process, however that ends: a pipe of ours is its standard input.
        theirs, ours = os.pipe()
        try:
            words = [*command, "--end-with-stdin"]
            status = subprocess.run(words, check=False, stdin=theirs).returncode
        finally:
            os.close(theirs)
            os.close(ours)
        if status:
            raise UserError(
                f"the teacher ended with exit status {status}, see above; to run it alone: "
                + shlex.join(command)
            )
