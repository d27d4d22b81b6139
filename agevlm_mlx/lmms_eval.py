"""Our models in lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval, read at 0.7.3).

lmms-eval finds `manifest` by the entry point group ``lmms_eval.models`` and makes `AgeVLM` from
``--model agevlm --model_args pretrained=FOLDER``. Only lmms-eval imports this module: it needs
lmms-eval's base class, and with it torch, which nothing else of this package does. How to run it:
docs/evaluation-harnesses.md.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]
from PIL import Image

from .errors import UserError

#: Where other models put an image into the text; ours see it from the beginning.
_IMAGE = "<image>"


def manifest() -> Any:
    """What lmms-eval's registry wants to know."""
    return ModelManifest(model_id="agevlm", simple_class_path=f"{__name__}.AgeVLM")


class AgeVLM(lmms):
    """A checkpoint of ours as a "simple" model of lmms-eval.

    pretrained: a folder or hub id; "" is the demo's model or the shipped one. batch_size: requests
    answered together (--batch_size). device, max_batch_size: lmms-eval passes them; MLX has one
    device, and a batch is never found by trying.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise UserError(f"model_args: expected pretrained, got also {', '.join(unknown)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size: expected a number from 1 on, got {batch_size!r}")
        from . import weights

        self.loaded = weights.load(pretrained or None)
        self.batch_size = int(batch_size)
        self.device = "cpu"  # of the counts that several processes exchange with torch

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request, in their order."""
        from .generation import batch_generate

        answers: list[str] = []
        # Requests of several tasks come together; those asked alike are answered together.
        for sampling, group in groupby(requests, key=lambda one: _sampling(one.args[1])):
            for part in self._parts(list(group), "Answering"):
                asked = []
                for one in part:
                    context, _, *where = one.args
                    asked.append(self._question(context, *where))
                said = batch_generate(
                    self.loaded.model,
                    self.loaded.tokenizer,
                    self.loaded.preprocessor,
                    [question for question, _ in asked],
                    [images for _, images in asked],
                    sampling=sampling,
                    completion_batch_size=self.batch_size,
                    prefill_batch_size=self.batch_size,
                )
                for one, text in zip(part, said, strict=True):
                    self.cache_hook.add_partial("generate_until", tuple(one.args[:2]), text)
                answers += said
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each request the loss of its continuation as the model's answer (minus the mean
        log-probability per token, nats), and whether it is the greedy one.

        The loss: lmms-eval's name and its docstring promise a log-probability, but its tasks take
        the choice with the smallest number (``Task.process_results``), and its models return
        this. Spaces around the continuation are left out, as nothing stands before an answer in
        a chat, and the token that ends it does not count.
        """
        found = []
        for part in self._parts(requests, "Reading"):
            for one in part:
                context, target, *where = one.args
                document = self._document(*where[1:4]) if where else None
                text = str(target(document) if callable(target) else target)
                question, images = self._question(context, *where)
                result = self._read(question, text.strip(), images)
                self.cache_hook.add_partial("loglikelihood", (context, text), result)
                found.append(result)
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError(
            "agevlm answers one question at a time; tasks of several rounds are not supported"
        )

    def _parts(self, requests: Sequence[Any], what: str) -> Iterator[Sequence[Any]]:
        from tqdm import tqdm  # lmms-eval's own

        with tqdm(total=len(requests), disable=self.rank != 0, desc=what) as bar:
            for start in range(0, len(requests), self.batch_size):
                part = requests[start : start + self.batch_size]
                yield part
                bar.update(len(part))

    def _document(self, doc_id: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _question(
        self, context: str, visual: Any = None, *where: Any
    ) -> tuple[str, list[Image.Image]]:
        """The words of a request, and its image if it has one."""
        found = visual(self._document(*where)) if visual is not None else None
        images = list(_flat(found))
        if len(images) > 1:
            raise UserError(
                f"task {where[1]}: expected at most one image a question, got {len(images)}; "
                "these models were trained on one, choose another task"
            )
        for image in images:
            if not isinstance(image, Image.Image):
                raise UserError(
                    f"task {where[1]}: expected a picture, got {type(image).__name__}; "
                    "video and sound are not understood"
                )
        return context.replace(_IMAGE, "").strip(), images

    def _read(self, question: str, answer: str, images: list[Image.Image]) -> tuple[float, bool]:
        import mlx.core as mx

        from .data.chat import encode
        from .data.image import load_image
        from .data.records import Turn

        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        turns = (Turn("user", question), Turn("assistant", answer))
        encoded = encode(tokenizer, turns, ())
        said = [n for n, counts in enumerate(encoded.loss_mask) if counts]
        said = [n for n in said if encoded.ids[n] not in tokenizer.eos_token_ids]
        if not said:
            return 0.0, True
        pixels = [self.loaded.preprocessor(load_image(image))[0] for image in images]
        cache = model.see(mx.array(pixels[0])[None]) if pixels else model.make_cache()
        logits = model(mx.array([encoded.ids[:-1]]), cache=cache)[0].astype(mx.float32)
        rows = logits[mx.array(said) - 1]
        ids = mx.array([encoded.ids[n] for n in said])
        log_p = mx.take_along_axis(rows, ids[:, None], -1)[:, 0] - mx.logsumexp(rows, -1)
        greedy = (mx.argmax(rows, -1) == ids).all()
        return -float(log_p.mean().item()), bool(greedy.item())  # pyright: ignore[reportArgumentType]


def _flat(found: Any) -> Iterator[Any]:
    """What a task shows: nothing, one thing, or lists of them."""
    if isinstance(found, list | tuple):
        for inner in found:
            yield from _flat(inner)
    elif found is not None:
        yield found


def _sampling(options: Mapping[str, Any]) -> Any:
    """lmms-eval's ``generation_kwargs`` as ours; those of other models are passed over."""
    from .sampling import Sampling

    beams = options.get("num_beams") or 1
    if beams != 1:
        raise UserError(f"num_beams: expected 1, got {beams}; add --gen_kwargs num_beams=1")
    until = options.get("until") or ()
    words = (until,) if isinstance(until, str) else tuple(until)
    greedy = options.get("do_sample") is False
    return Sampling(
        max_tokens=int(options.get("max_new_tokens") or 256),
        temp=0.0 if greedy else float(options.get("temperature") or 0.0),
        top_p=float(options.get("top_p") or 1.0),
        stop=tuple(word for word in words if word),
    )
