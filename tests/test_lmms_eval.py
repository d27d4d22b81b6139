"""The lmms-eval adapter against a package with the same signatures as lmms-eval 0.7.3."""

import abc
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from agevlm_mlx.data.chat import prompt_ids
from agevlm_mlx.data.records import Turn
from agevlm_mlx.errors import UserError
from agevlm_mlx.generation import generate
from agevlm_mlx.scenes import main as scenes
from agevlm_mlx.weights import Loaded, load, shipped

GREEDY = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "num_beams": 1, "top_p": 1.0}


class CacheHook:
    def __init__(self, cachinglm: Any = None) -> None:
        self.kept: list[tuple[Any, ...]] = []

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self.kept.append((attr, req, res))


class lmms(abc.ABC):
    is_simple: bool = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = CacheHook(None)
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional: dict[str, Any] | None = None):
        pairs = [part.split("=", 1) for part in arg_string.split(",") if part]
        given = {k: v for k, v in (additional or {}).items() if v is not None}
        return cls(**dict(pairs), **given)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size


@dataclass
class Instance:
    request_type: str
    arguments: tuple[Any, ...]
    idx: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def adapter() -> Iterator[ModuleType]:
    """`agevlm_mlx.lmms_eval` as it is with lmms-eval installed."""
    fakes = {"lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.models": {}}
    fakes |= {
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, members in fakes.items():
            module = ModuleType(name)
            vars(module).update(members)
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, "agevlm_mlx.lmms_eval", raising=False)
        yield importlib.import_module("agevlm_mlx.lmms_eval")
    sys.modules.pop("agevlm_mlx.lmms_eval", None)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: Any) -> list[Image.Image]:
    out = tmp_path_factory.mktemp("scenes")
    assert scenes(["--out", str(out), "--n", "3", "--split", "test"]) == 0
    return [Image.open(path).convert("RGB") for path in sorted(out.rglob("*.png"))[:3]]


@pytest.fixture(scope="module")
def ours() -> Loaded:
    return load(shipped("model"))


@pytest.fixture
def model(adapter: ModuleType, pictures: list[Image.Image]) -> Any:
    """Made as lmms-eval makes it, with the documents of two tasks."""
    path = adapter.manifest().simple_class_path
    module, _, name = path.rpartition(".")
    cls = getattr(sys.modules[module], name)
    made = cls.create_from_arg_string(
        f"pretrained={shipped('model')}", {"batch_size": "2", "device": None}
    )
    documents = [{"image": [picture]} for picture in pictures]
    documents += [{"image": pictures[:2]}, {"image": []}, {"image": None}, {"image": "a.mp4"}]
    made.task_dict = {"task": {"test": documents}, "other": {"test": documents}}
    return made


def show(document: Any) -> Any:
    return document["image"]


def ask(context: str, doc: int, task: str = "task", **options: Any) -> Instance:
    arguments = (context, {**GREEDY, **options}, show, doc, task, "test")
    return Instance("generate_until", arguments, 0)


def rate(context: str, target: Any, doc: int) -> Instance:
    return Instance("loglikelihood", (context, target, show, doc, "task", "test"), 0)


def test_the_registry_gets_a_simple_model(adapter: ModuleType):
    found = adapter.manifest()
    assert (found.model_id, found.chat_class_path) == ("agevlm", None)
    assert found.simple_class_path == "agevlm_mlx.lmms_eval.AgeVLM"
    assert issubclass(adapter.AgeVLM, lmms)
    assert adapter.AgeVLM.is_simple is True


def test_one_process_unless_lmms_eval_says_otherwise(model: Any):
    assert (model.rank, model.world_size, model.batch_size) == (0, 1, 2)
    model._rank, model._world_size = 1, 2
    assert (model.rank, model.world_size, model.device) == (1, 2, "cpu")


def test_answers_keep_the_order_of_their_requests(
    model: Any, ours: Loaded, pictures: list[Image.Image]
):
    long, short = {"max_new_tokens": 12}, {"max_new_tokens": 3}
    asked = [
        ("Describe the image.", 0, long),  # answered together with the next two, two at a time
        ("<image>\nDescribe the image.", 2, long),
        ("Describe the image.", 1, long),
        ("Describe the image.", 1, short),
        ("Is there a dog in the image?", 4, {}),
        ("Is there a dog in the image?", 5, {}),
        ("Describe the image.", 0, long),
    ]
    requests = [
        ask(text, doc, "task" if n % 2 else "other", **options)
        for n, (text, doc, options) in enumerate(asked)
    ]
    found = model.generate_until(requests)
    alone = []
    for text, doc, options in asked:
        images = pictures[doc] if doc < 3 else ()
        question = text.replace("<image>\n", "")
        most = options.get("max_new_tokens", 8)
        alone.append(
            generate(
                ours.model, ours.tokenizer, ours.preprocessor, question, images, max_tokens=most
            )
        )
    assert found == alone
    assert len(set(found)) > 3
    kept = model.cache_hook.kept
    assert [entry[2] for entry in kept] == found
    assert [entry[1] for entry in kept] == [request.args[:2] for request in requests]
    assert {entry[0] for entry in kept} == {"generate_until"}


def test_an_answer_ends_before_the_first_until(model: Any):
    (whole,) = model.generate_until([ask("Describe the image.", 0, max_new_tokens=24)])
    word = whole.split()[-1]
    several = ask("Describe the image.", 0, max_new_tokens=24, until=["\n\n", word, ""])
    one = ask("Describe the image.", 0, max_new_tokens=24, until=word)
    before = whole.partition(word)[0].strip()
    assert before
    assert model.generate_until([several, one]) == [before] * 2


def test_sampling_is_greedy_unless_asked(adapter: ModuleType):
    def chosen(**options: Any) -> tuple[Any, ...]:
        found = adapter._sampling(options)
        return found.temp, found.top_p, found.max_tokens, found.stop

    assert chosen() == (0.0, 1.0, 256, ())
    assert chosen(temperature=0.7, do_sample=False) == (0.0, 1.0, 256, ())
    assert chosen(temperature=0.7, top_p=0.9, do_sample=True) == (0.7, 0.9, 256, ())
    assert chosen(temperature=None, top_p=None, image_aspect_ratio="original")[:2] == (0.0, 1.0)
    with pytest.raises(UserError, match="num_beams: expected 1, got 3; add --gen_kwargs"):
        chosen(num_beams=3)


def test_what_is_not_one_picture_is_refused(model: Any):
    with pytest.raises(UserError, match="task task: expected at most one image a question, got 2"):
        model.generate_until([ask("What changed?", 3)])
    with pytest.raises(UserError, match="task other: expected a picture, got str"):
        model.generate_until([ask("What happens?", 6, "other")])
    with pytest.raises(UserError, match="at most one image"):
        model.loglikelihood([rate("What changed?", "Yes", 3)])
    with pytest.raises(NotImplementedError, match="several rounds"):
        model.generate_until_multi_round([])


def by_hand(ours: Loaded, question: str, answer: str, image: Any) -> tuple[float, bool]:
    """Loss and greediness of an answer, one token after another."""
    ids = prompt_ids(ours.tokenizer, [Turn("user", question)])
    cache = ours.model.make_cache()
    if image is not None:
        cache = ours.model.see(mx.array(ours.preprocessor(image)[0])[None])
    losses, greedy = [], True
    logits = np.array(ours.model(mx.array([ids]), cache=cache)[0, -1], np.float64)
    for token in ours.tokenizer.encode(answer):
        losses.append(np.logaddexp.reduce(logits) - logits[token])
        greedy = greedy and bool(logits.argmax() == token)
        logits = np.array(ours.model(mx.array([[token]]), cache=cache)[0, -1], np.float64)
    return float(np.mean(losses)), greedy


def test_the_loss_is_that_of_the_continuation_alone(
    model: Any, ours: Loaded, pictures: list[Image.Image]
):
    question = "Is there a dog in the image?"
    (said,) = model.generate_until([ask(question, 0)])
    cases = [(said, 0), ("A dog and a chair", 1), (said, 4), ("No", 2)]
    requests = [rate(question, f" {text}", doc) for text, doc in cases]
    requests[1] = rate(question, lambda document: "A dog and a chair", 1)
    model.cache_hook.kept.clear()
    found = model.loglikelihood(requests)
    for (loss, greedy), (text, doc) in zip(found, cases, strict=True):
        wanted = by_hand(ours, question, text, pictures[doc] if doc < 3 else None)
        assert loss == pytest.approx(wanted[0], abs=1e-4)
        assert greedy is wanted[1]
    assert found[0][1] is True
    assert model.loglikelihood([rate(f"<image>\n{question}", said, 0)]) == found[:1]
    kept = model.cache_hook.kept[: len(found)]
    assert [entry[2] for entry in kept] == found
    assert kept[0][:2] == ("loglikelihood", (question, f" {said}"))


def test_choices_and_unconditional_ones_as_the_tasks_ask_them(model: Any):
    # Task.process_results takes the smallest number; ("", choice) is asked without a document.
    question = "Is there a dog in the image?"
    (said,) = model.generate_until([ask(question, 0)])
    choices = ["Yes", "No"]
    found = model.loglikelihood([rate(question, f" {choice}", 0) for choice in choices])
    assert choices[int(np.argmin([loss for loss, _ in found]))] == said
    alone = model.loglikelihood([Instance("loglikelihood", ("", "Yes"), 0)])
    assert alone[0][0] > 0
    assert model.loglikelihood([rate(question, " ", 0)]) == [(0.0, True)]


def test_options_that_are_wrong_are_named(adapter: ModuleType, tmp_path: Path):
    with pytest.raises(UserError, match="model_args: expected pretrained, got also conv_template"):
        adapter.AgeVLM(pretrained="x", conv_template="v1")
    for size in ("auto", 0):
        with pytest.raises(UserError, match="batch_size: expected a number from 1 on"):
            adapter.AgeVLM(batch_size=size)
    with pytest.raises(UserError):
        adapter.AgeVLM(pretrained=str(tmp_path))
