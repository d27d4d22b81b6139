"""The loop: stages, steps, validation, checkpoints, and how a run ends."""

import io
import itertools
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..data.batches import Batch
from ..data.prefetch import Prefetch
from ..data.record_set import read_problems, write_problems
from ..data.records import Problem
from ..errors import NO_ROOM, UserError
from ..models.recompute import recomputed
from . import checkpoint
from .averaging import Average
from .build import Job
from .compiled import make_update, wants_compile
from .log import Metrics, Progress
from .objective import PARTS, Totals, loss_and_gradients, place, validate
from .observers import Observer, Tell, finish_the_step
from .optim import global_norm, learning_rate, make_optimizer
from .ranks import LostRanks, Ranks
from .rules import named_parameters, parameter_scales, set_trainable
from .stages import Losses, Stage, compute_dtype
from .text_memory import TextMemory, text_memory

#: What was left out of the data, in the run's folder.
BAD_RECORDS = "bad_records.jsonl"
#: How the running mean's names begin in a checkpoint's optimiser file.
_MEAN = "mean/"
#: With ``on_nan = "skip"``: so many bad batches in a row are not bad luck.
MOST_SKIPPED = 10


class Trainer:
    """Trains the model of a job, from its beginning or from the newest checkpoint of its run.

    Everything that decides a step is a function of the recipe, the step's number and the
    checkpoint (parameters, moments, running mean, `best`): a run that was killed and resumed
    equals one that was not, bit for bit on a CPU. The batch of a step may be cut into parts, for
    several processes or for memory: their losses are shares of the whole and their gradients are
    summed, so every cut makes the same step up to rounding.
    """

    def __init__(
        self,
        job: Job,
        run: Path,
        *,
        ranks: Ranks | None = None,
        observers: Sequence[Observer] = (),
        stream: IO[str] | None = None,
    ):
        self.job, self.run, self.recipe = job, run, job.recipe
        self.model = job.model
        self.ranks = ranks or Ranks()
        self.optimizer = make_optimizer(self.recipe.train)
        self.average = Average(self.recipe.train.ema) if self.recipe.train.ema else None
        self.dtype = compute_dtype(self.recipe.train)
        #: What this stage and later ones train, in float32, where the model computes in less.
        self.masters = dict(job.masters)
        self.step = 0
        #: The best validation so far: {"step", "val_lm"}.
        self.best: dict[str, Any] | None = None
        #: Validations of the last stage without an improvement.
        self.stale = 0
        #: Batches left out because of a loss that was not finite.
        self.skipped = 0
        #: What the layers that the stage leaves as they are have made of its texts.
        self.memory: TextMemory | None = None
        self._in_a_row = 0
        self._saved = 0
        self._saving = threading.Lock()
        self._stop = threading.Event()
        self._agreed_to_stop = False
        self._observers = observers if self.ranks.first else ()
        self._stream = stream

    def restore(self, saved: checkpoint.Checkpoint | None) -> None:
        """Go on from rank 0's checkpoint; ``UserError`` if it is of another recipe or model."""
        known = self.ranks.share(None if saved is None else {"step": saved.step, **saved.state})
        if known is None:
            return
        if known["recipe"] != self.recipe.fingerprint():
            raise UserError(
                f"{self.run}: the recipe is not the one this run was started with; resume without "
                "overrides of the model, data, stages or seed, or start a new run with --out"
            )
        if known.get("data", self.job.data) != self.job.data:
            raise UserError(
                f"{self.run}: the data is not what this run was started with (records, images and "
                f"a sum of names: {known['data']}, now {self.job.data}); put it back, or start a "
                "new run with --out"
            )
        model = self.ranks.share_arrays(saved.model if saved else {})
        state = self.ranks.share_arrays(saved.optimizer if saved else {})
        self.load(model, f"{self.run}/steps/{known['step']}")
        mean = {n.removeprefix(_MEAN): v for n, v in state.items() if n.startswith(_MEAN)}
        self.optimizer.state = {n: v for n, v in state.items() if not n.startswith(_MEAN)}
        if self.average is not None:
            self.average.state = mean
        self.step = self._saved = known["step"]
        self.best, self.stale, self.skipped = known["best"], known["stale"], known["skipped"]

    def load(self, parameters: dict[str, mx.array], where: str) -> None:
        """Set all parameters; ``UserError`` if they are another architecture's."""
        load_parameters(self.model, parameters, where)
        self.masters = {}
        if self.dtype != mx.float32:
            # What was trained last is in the checkpoint in full.
            self.masters = {n: v for n, v in parameters.items() if v.dtype == mx.float32}
            place(self.model, self.masters, self.dtype)

    @property
    def finished(self) -> bool:
        """Whether no step is left, or validation has not improved for ``train.patience`` times."""
        patience = self.recipe.train.patience
        return self.step == self.recipe.steps or (patience is not None and self.stale >= patience)

    def train(self) -> bool:
        """Run the remaining steps; False when a signal ended it early (a checkpoint is saved)."""
        for stage in self.recipe.stages:
            self._parts(stage)  # before the first step, not when its turn comes
        metrics = Metrics(self.run / "metrics.jsonl", self.step) if self.ranks.first else None
        stream = self._stream if self.ranks.first else io.StringIO()
        progress = Progress(self.recipe.stages, self.step, self.recipe.train.log_every, stream)
        self._tell = Tell(metrics, progress, self._observers)
        self.ranks.before_end = self._save_unsaved
        try:
            with finish_the_step(self._stop):
                found, self.job.problems = self.job.problems, []
                self._bad_records(found)
                if self.step == 0:
                    self._look()
                while not (self.finished or self._stopping):
                    self._train_stage(*self.recipe.locate(self.step))
                self._save_unsaved()
                if self.finished:
                    self._look()
            progress.summary(len(self.job.problems))
        except UserError:
            self._save_unsaved()
            raise
        except LostRanks:
            self._save_unsaved()
            raise
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise UserError(
                f"{self.run}: no space left on the disk at step {self.step}; free some and run: "
                f"agevlm train --resume {self.run}"
            ) from None
        finally:
            self.ranks.before_end = lambda: None
            self._tell.close()
        return self.finished

    @property
    def _stopping(self) -> bool:
        """Whether a signal asks to stop; several processes agree on it within a step."""
        return self._stop.is_set() if self.ranks.size == 1 else self._agreed_to_stop

    def _train_stage(self, index: int, within: int) -> None:
        stage = self.recipe.stages[index]
        scales = parameter_scales(self.model, stage)
        set_trainable(self.model, scales)
        self.optimizer.keep_only(scales)
        if self.dtype != mx.float32:
            self.masters = self._still_trained(index)
        self._names = list(scales)
        new = text_memory(self.model, stage)
        # Neither stage changes the layers below: what is known of texts stays right.
        self.memory = (self.memory or new) if new else None
        self._step_weights = make_update(
            self.optimizer, scales, self.recipe.train.clip, wants_compile(self.recipe.train)
        )
        batches = self.job.batches(stage)
        parts, count = self._parts(stage)
        end = self.step + stage.steps - within
        wanted = ((step, part, count) for step in range(self.step, end) for part in parts)
        data = self.recipe.data
        with Prefetch(
            lambda item: batches.part(*item), wanted, workers=data.workers,
            depth=max(data.prefetch, len(parts)),
        ) as source:  # fmt: skip
            for step_in_stage in range(within, stage.steps):
                start = time.perf_counter()
                drawn = [source.next() for _ in parts]
                waited = time.perf_counter() - start
                self._met = batches.take_problems()
                lr = learning_rate(stage, step_in_stage)
                losses = stage.losses.at(step_in_stage / stage.steps)
                report, tokens = self._update(stage, losses, drawn, lr)
                self.step += 1
                row = {k: float(f"{v:.6g}") for k, v in report.items()} | {"lr": float(f"{lr:.6g}")}
                seconds = round(time.perf_counter() - start, 4)
                self._tell.row(
                    step=self.step, stage=stage.name, **row, tokens=tokens, seconds=seconds,
                    waited=round(waited, 4),
                )  # fmt: skip
                self._tell.progress.step(
                    self.step, stage.name, report, tokens=tokens, images=stage.batch_size,
                    seconds=seconds, waited=waited, peak=mx.get_peak_memory(),
                )  # fmt: skip
                self._after_step(index)
                if self._stopping or self.finished:
                    return

    def _parts(self, stage: Stage) -> tuple[list[int], int]:
        """The parts of a step's batch that this process computes, and how many there are."""
        size, images = self.ranks.size, stage.batch_size
        if images < size:
            raise UserError(
                f"stage '{stage.name}': expected a batch_size of at least {size}, an image for "
                f"each process, got {images}"
            )
        most = self.recipe.train.micro_batch or images
        each = -(-images // (size * most))
        count = size * each
        first = self.ranks.rank * each
        filled = [
            part
            for part in range(first, first + each)
            if images * part // count < images * (part + 1) // count
        ]
        return filled, count

    def _update(
        self, stage: Stage, losses: Losses, drawn: Sequence[Batch], lr: float
    ) -> tuple[dict[str, float], int]:
        """One optimiser step; the numbers to report, and the text tokens of the whole batch."""
        own = Totals.of(drawn)
        size = sum(group.ids.size for batch in drawn for group in batch.groups)
        *sums, size, met, stop = self.ranks.sum(
            [
                own.tokens,
                own.guided,
                own.absent,
                own.cells,
                size,
                len(self._met),
                self._stop.is_set(),
            ]
        )
        self._agreed_to_stop = stop > 0
        if met:
            self._bad_records(self._met)
        grads, shares = self._gradients(losses, drawn, Totals(*sums))
        grads = self.ranks.sum_gradients(grads)
        loss, *values = self.ranks.sum(shares)
        norm = global_norm(grads)
        used = (True, losses.attention.weight, losses.attention.absent, losses.features)
        named = zip(PARTS, values, used, strict=True)
        report = {"loss": loss, **{n: v for n, v, on in named if on}, "norm": norm.item()}
        if not (math.isfinite(report["loss"]) and math.isfinite(report["norm"])):
            self._not_finite(stage, drawn, report, grads)
            return {"skipped": 1.0}, int(size)
        self._in_a_row = 0
        params = self._step_weights(self._trained(), grads, norm, lr)
        if self.masters:
            self.masters |= params
        place(self.model, params, self.dtype)
        del grads  # nothing may hold what is updated in place
        mx.eval(self.model.parameters(), params, self.optimizer.state)
        if self.average is not None:
            self.average.update(self._all(), params)
            mx.eval(self.average.state)
        return report, int(size)

    def _trained(self) -> dict[str, mx.array]:
        """What the stage trains, in float32."""
        own = self.masters or named_parameters(self.model, trainable=True)
        return {name: own[name] for name in self._names}

    def _all(self) -> dict[str, mx.array]:
        """Every parameter, in float32 where that is kept."""
        return named_parameters(self.model) | self.masters

    def _still_trained(self, index: int) -> dict[str, mx.array]:
        """Float32 copies of what this stage or a later one trains; new ones from the model."""
        own = named_parameters(self.model)
        names = {n for s in self.recipe.stages[index:] for n in parameter_scales(self.model, s)}
        return {
            name: self.masters.get(name, value.astype(mx.float32))
            for name, value in own.items()
            if name in names
        }

    def _gradients(
        self, losses: Losses, drawn: Sequence[Batch], totals: Totals
    ) -> tuple[dict[str, mx.array], list[float]]:
        """The gradients of this process' parts of a step, added up, and so the loss and `PARTS`."""
        grads: dict[str, mx.array] = {}
        shares = mx.zeros(1 + len(PARTS))
        with recomputed(self.model) if self.recipe.train.grad_checkpoint else nullcontext():
            for number, batch in enumerate(drawn):
                mx.random.seed((self.recipe.train.seed * 1_000_003 + self.step) * 1009 + number)
                (loss, parts), new = loss_and_gradients(
                    self.model, self._trained(), batch, losses, totals, self.dtype, self.memory
                )
                shares = shares + mx.concatenate([loss[None], parts])
                grads = {name: grads[name] + g for name, g in new.items()} if grads else new
                mx.eval(shares, grads)
        return grads, cast(list[float], shares.tolist())

    def _not_finite(
        self,
        stage: Stage,
        drawn: Sequence[Batch],
        report: dict[str, float],
        grads: dict[str, mx.array],
    ) -> None:
        self._in_a_row += 1
        self.skipped += 1
        if self.recipe.train.on_nan == "skip" and self._in_a_row < MOST_SKIPPED:
            return
        norms = {name: float(np.array(global_norm({name: g}))) for name, g in grads.items()}
        bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
        largest = sorted((n for n in norms if n not in bad), key=lambda n: -norms[n])[:3]
        records = [record for batch in drawn for record in batch.record_ids]
        raise UserError(
            f"step {self.step + 1}, stage '{stage.name}': expected a finite loss, got "
            f"{report['loss']} (gradients not finite: {_some(bad, 3) or 'none'}; largest: "
            f"{', '.join(f'{n} {norms[n]:.3g}' for n in largest) or 'none'}); records "
            f"{_some(records, 16)}; lower the stage's lr, look at these records, or "
            "set train.on_nan=skip"
        )

    def _bad_records(self, problems: Sequence[Problem]) -> None:
        """List what any process has left out of the data in the run's folder; say what is new."""
        told = self.ranks.gather([vars(problem) for problem in problems])
        new = [p for p in dict.fromkeys(Problem(**p) for p in told) if p not in self.job.problems]
        self.job.problems += new
        for problem in new:
            self._tell.progress.say(f"left out: {problem.error()}")
        if new and self.ranks.first:
            file = self.run / BAD_RECORDS
            known = read_problems(file) if file.exists() else []
            write_problems(file, dict.fromkeys([*known, *self.job.problems]))

    def _after_step(self, index: int) -> None:
        train, last = self.recipe.train, self.step == self.recipe.steps
        improved = False
        if self.job.val_records and (self.step % train.val_every == 0 or last):
            improved = self._validate(index)
        if train.pictures_every and self.step % train.pictures_every == 0 and not last:
            self._look()
        if improved or self.step % train.checkpoint_every == 0:
            self._save()

    def _validate(self, index: int) -> bool:
        """Whether this validation, every process taking its share of the batches, is the best."""
        stage = self.recipe.stages[index]
        share = itertools.islice(self.job.validation(), self.ranks.rank, None, self.ranks.size)
        with self._judged():
            result = validate(self.model, share, stage.losses.attention, self.ranks.sum)
        self._tell.row(step=self.step, stage=stage.name, **result)
        shares = {"pointing": result["val_pointing"], "answers": result.get("val_answers")}
        shown = "".join(f", {n} {share:.3f}" for n, share in shares.items() if share is not None)
        self._tell.progress.say(f"step {self.step}: validation lm {result['val_lm']:.4f}{shown}")
        improved = self.best is None or result["val_lm"] < self.best["val_lm"]
        if improved:
            self.best = {"step": self.step, "val_lm": result["val_lm"]}
        in_last = index == len(self.recipe.stages) - 1
        self.stale = self.stale + 1 if in_last and not improved else 0
        return improved

    def _look(self) -> None:
        if self._observers:
            with self._judged():
                for observer in self._observers:
                    observer.look(self.step, self.model)

    @contextmanager
    def _judged(self) -> Iterator[None]:
        """The model without dropout, and with the running mean of its weights if there is one."""
        own = named_parameters(self.model)
        if self.average is not None:
            _set(self.model, self.average.averaged(own))
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()
            _set(self.model, own)

    def finish(self) -> None:
        """Give the model the weights to export: the last or the best, or their running mean."""
        if self.recipe.train.export == "best" and self.best:
            best = checkpoint.load_step(self.run, self.best["step"])
            self.load(best.model, str(self.run))
            if self.average is not None:
                self.average.state = {
                    n.removeprefix(_MEAN): v
                    for n, v in best.optimizer.items()
                    if n.startswith(_MEAN)
                }
        if self.average is not None:
            _set(self.model, self.average.averaged(named_parameters(self.model)))

    def _save_unsaved(self) -> None:
        """Write a checkpoint of the current step unless there is one, or nothing to go on from."""
        with self._saving:  # the thread that waits for lost processes saves, too
            finite = all(mx.isfinite(value).all().item() for value in self._all().values())
            if self._saved != self.step and finite:
                self._save()

    def _save(self) -> None:
        """Write a checkpoint of the current step; the rows it relies on reach the disk first."""
        if not self.ranks.first:
            self._saved = self.step
            return
        self._tell.sync()
        state = {
            "recipe": self.recipe.fingerprint(),
            "stage": self.recipe.stages[self.recipe.locate(self.step - 1)[0]].name,
            "seed": self.recipe.train.seed,
            "best": self.best,
            "stale": self.stale,
            "skipped": self.skipped,
            "ranks": self.ranks.size,
            "data": self.job.data,
        }
        mean = self.average.state if self.average is not None else {}
        checkpoint.save(
            self.run,
            self.step,
            self._all(),
            self.optimizer.state | {_MEAN + name: value for name, value in mean.items()},
            state,
            keep=self.recipe.train.keep,
            best=self.best["step"] if self.best else None,
        )
        self._saved = self.step


def load_parameters(model: nn.Module, weights: dict[str, mx.array], where: str) -> None:
    """Set every parameter of `model`; ``UserError`` when names or shapes differ."""
    own = {name: value.shape for name, value in named_parameters(model).items()}
    if own != {name: value.shape for name, value in weights.items()}:
        raise UserError(
            f"{where}: expected the parameters of this recipe's model, got another model's"
        )
    _set(model, weights)


def _set(model: nn.Module, parameters: Mapping[str, mx.array]) -> None:
    model.update(tree_unflatten(list(parameters.items())))


def _some(names: Sequence[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
