"""The loop: stages, steps, validation, checkpoints, and how a run ends."""

import errno
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any, cast

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..data.batches import Batch, Batches
from ..errors import UserError
from . import checkpoint
from .build import Job
from .log import Metrics, Progress
from .objective import PARTS, loss_and_gradients, validate
from .optim import AdamW, clip, global_norm, learning_rate
from .rules import named_parameters, parameter_scales, set_trainable
from .stages import Stage

#: With ``on_nan = "skip"``: so many bad batches in a row are not bad luck.
MOST_SKIPPED = 10


class Trainer:
    """Trains the model of a job, from its beginning or from the newest checkpoint of its run.

    Everything that decides a step is a function of the recipe, the step's number and the
    checkpoint (parameters, moments, `best`): a run that was killed and resumed equals one that
    was not, bit for bit on a CPU.
    """

    def __init__(self, job: Job, run: Path, *, stream: IO[str] | None = None):
        self.job, self.run, self.recipe = job, run, job.recipe
        self.model = job.model
        self.optimizer = AdamW(self.recipe.train.betas, self.recipe.train.weight_decay)
        self.step = 0
        #: The best validation so far: {"step", "val_lm"}.
        self.best: dict[str, Any] | None = None
        self._saved = 0
        self._skipped = 0
        self._stop = threading.Event()
        self._stream = stream

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint; ``UserError`` if it is of another recipe or architecture."""
        if saved.state["recipe"] != self.recipe.fingerprint():
            raise UserError(
                f"{self.run}: the recipe is not the one this run was started with; resume without "
                "overrides of the model, data, stages or seed, or start a new run with --out"
            )
        load_parameters(self.model, saved.model, f"{self.run}/steps/{saved.step}")
        self.optimizer.state = saved.optimizer
        self.step = self._saved = saved.step
        self.best = saved.state["best"]

    def train(self) -> bool:
        """Run the remaining steps; False when a signal ended it early (a checkpoint is saved)."""
        total = self.recipe.steps
        metrics = Metrics(self.run / "metrics.jsonl", self.step)
        progress = Progress(total, self.step, self.recipe.train.log_every, self._stream)
        try:
            with _signals(self._stop):
                while self.step < total and not self._stop.is_set():
                    self._train_stage(*self.recipe.locate(self.step), metrics, progress)
                if self._saved != self.step:
                    self._save(metrics)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(
                f"{self.run}: no space left on the disk at step {self.step}; free some and run: "
                f"agevlm train --resume {self.run}"
            ) from None
        finally:
            progress.close()
            metrics.close()
        return self.step == total

    def _train_stage(self, index: int, within: int, metrics: Metrics, progress: Progress) -> None:
        stage = self.recipe.stages[index]
        scales = parameter_scales(self.model, stage)
        set_trainable(self.model, scales)
        self.optimizer.keep_only(scales)
        with _Prefetch(
            self.job.batches(stage), self.step, self.step + stage.steps - within
        ) as data:
            for step_in_stage in range(within, stage.steps):
                start = time.perf_counter()
                batch = data.next()
                waited = time.perf_counter() - start
                mx.random.seed(self.recipe.train.seed * 1_000_003 + self.step)
                lr = learning_rate(stage, step_in_stage)
                parts = self._update(stage, batch, lr, scales)
                self.step += 1
                tokens = sum(group.ids.size for group in batch.groups)
                row = {k: float(f"{v:.6g}") for k, v in parts.items()} | {"lr": float(f"{lr:.6g}")}
                seconds = round(time.perf_counter() - start, 4)
                metrics.write(
                    step=self.step, stage=stage.name, **row, tokens=tokens, seconds=seconds,
                    waited=round(waited, 4),
                )  # fmt: skip
                progress.step(
                    self.step, stage.name, parts, tokens=tokens, waited=waited,
                    peak=mx.get_peak_memory(),
                )  # fmt: skip
                self._after_step(stage, metrics, progress)
                if self._stop.is_set():
                    return

    def _update(
        self, stage: Stage, batch: Batch, lr: float, scales: dict[str, float]
    ) -> dict[str, float]:
        """One optimiser step; the numbers to report."""
        params = named_parameters(self.model, trainable=True)
        (loss, parts), grads = loss_and_gradients(self.model, params, batch, stage.losses)
        norm = global_norm(grads)
        mx.eval(loss, parts, norm, grads)
        values = dict(zip(PARTS, cast(list[float], parts.tolist()), strict=True))
        used = {
            "lm": True,
            "attention": stage.losses.attention.weight,
            "features": stage.losses.features,
        }
        report = {
            "loss": loss.item(),
            **{k: v for k, v in values.items() if used[k]},
            "norm": norm.item(),
        }
        if not (math.isfinite(report["loss"]) and math.isfinite(report["norm"])):
            self._not_finite(stage, batch, report, grads)
            return {"skipped": 1.0}
        self._skipped = 0
        grads = clip(grads, norm, self.recipe.train.clip)
        params = self.optimizer.update(params, grads, lr, scales)
        self.model.update(tree_unflatten(list(params.items())))
        mx.eval(params, self.optimizer.state)
        return report

    def _not_finite(
        self, stage: Stage, batch: Batch, report: dict[str, float], grads: dict[str, mx.array]
    ) -> None:
        self._skipped += 1
        if self.recipe.train.on_nan == "skip" and self._skipped < MOST_SKIPPED:
            return
        bad = [name for name, g in grads.items() if not mx.isfinite(g).all().item()]
        raise UserError(
            f"step {self.step + 1}, stage '{stage.name}': expected a finite loss, got "
            f"{report['loss']} (gradients not finite: {_some(bad, 3) or 'none'}); records "
            f"{_some(batch.record_ids, 16)}; lower the stage's lr, look at these records, or "
            "set train.on_nan=skip"
        )

    def _after_step(self, stage: Stage, metrics: Metrics, progress: Progress) -> None:
        train, last = self.recipe.train, self.step == self.recipe.steps
        improved = False
        if self.job.val_records and (self.step % train.val_every == 0 or last):
            result = validate(self.model, self.job.validation(), stage.losses.attention.heads)
            metrics.write(step=self.step, stage=stage.name, **result)
            pointing = result["val_pointing"]
            shown = "" if pointing is None else f", pointing {pointing:.3f}"
            progress.say(f"step {self.step}: validation lm {result['val_lm']:.4f}{shown}")
            improved = self.best is None or result["val_lm"] < self.best["val_lm"]
            if improved:
                self.best = {"step": self.step, "val_lm": result["val_lm"]}
        if improved or self.step % train.checkpoint_every == 0:
            self._save(metrics)

    def _save(self, metrics: Metrics) -> None:
        """Write a checkpoint of the current step; the rows it relies on reach the disk first."""
        metrics.sync()
        state = {
            "recipe": self.recipe.fingerprint(),
            "stage": self.recipe.stages[self.recipe.locate(self.step - 1)[0]].name,
            "seed": self.recipe.train.seed,
            "best": self.best,
        }
        checkpoint.save(
            self.run,
            self.step,
            named_parameters(self.model),
            self.optimizer.state,
            state,
            keep=self.recipe.train.keep,
            best=self.best["step"] if self.best else None,
        )
        self._saved = self.step


def load_parameters(model: Any, weights: dict[str, mx.array], where: str) -> None:
    """Set every parameter of `model`; ``UserError`` when names or shapes differ."""
    own = {name: value.shape for name, value in named_parameters(model).items()}
    if own != {name: value.shape for name, value in weights.items()}:
        raise UserError(
            f"{where}: expected the parameters of this recipe's model, got another model's"
        )
    model.update(tree_unflatten(list(weights.items())))


def _some(names: Sequence[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class _Prefetch:
    """Makes the next batch in a thread while the current one is trained on."""

    def __init__(self, batches: Batches, first: int, end: int):
        self._batches, self._step, self._end = batches, first, end
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: Future[Batch] = self._pool.submit(batches.batch, first)

    def __enter__(self) -> "_Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def next(self) -> Batch:
        """The batch of the current step; starts on the one after it."""
        batch = self._next.result()
        self._step += 1
        if self._step < self._end:
            self._next = self._pool.submit(self._batches.batch, self._step)
        return batch


@contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop` (finish the step, save); a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
