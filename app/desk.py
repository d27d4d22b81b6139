"""What lies in the model's thread: loaded models, and the conversations that they have read."""

from collections import OrderedDict
from collections.abc import Callable

import mlx.core as mx

from agevlm_mlx.conversation import Conversation
from agevlm_mlx.evaluation.presence import Controls
from agevlm_mlx.image_store import Sight
from agevlm_mlx.weights import Loaded

from .catalogue import Choice

#: How far loading is, 0..1, and what is being done.
Progress = Callable[[float, str], None]
#: Tokens of a question that are read at once.
_STEP = 512
#: Models that stay loaded although no conversation uses them.
SPARE = 2


class Talk:
    """One tab's conversation with one model, and its images as the model remembers them.

    sights: by the id of the picture, so that a picture is looked at, and even hashed, only once.
    pause: called now and then while a question is read, and may end that by what it raises.
    """

    def __init__(self, loaded: Loaded, choice: Choice, system: str) -> None:
        self.pause: Callable[[], None] = lambda: None
        self.conversation = Conversation(
            loaded,
            system=system,
            prefill_step_size=_STEP,
            prompt_progress_callback=lambda done, total: self.pause(),
        )
        self.choice, self.system = choice, system
        self.sights: dict[str, Sight] = {}

    def look(self, name: str, data: bytes) -> Sight:
        """The sight of the picture called `name`. ``UserError`` as `ImageStore.look`."""
        if name not in self.sights:
            self.sights[name] = self.conversation.store.look(data)
        return self.sights[name]


class Desk:
    """The thread's own objects; no other thread may touch them.

    Whatever is lost here is made anew from the tab's plain data when it is wanted again.
    """

    def __init__(self, load: Callable[[Choice, Progress], Loaded]) -> None:
        self._load = load
        self._models: OrderedDict[Choice, Loaded] = OrderedDict()
        self._controls: dict[Choice, Controls] = {}
        self._talks: dict[str, Talk] = {}

    def model(self, choice: Choice, progress: Progress = lambda part, step: None) -> Loaded:
        """The model of a choice, loaded if it is not. Raises as `catalogue.load_model`."""
        if choice not in self._models:
            self._prune(SPARE - 1)  # before loading: two large models may not fit side by side
            self._models[choice] = self._load(choice, progress)
        self._models.move_to_end(choice)
        return self._models[choice]

    def controls(self, choice: Choice) -> Controls:
        """The pictures that a sentence is compared on, as the model of `choice` sees them."""
        if choice not in self._controls:
            self._controls[choice] = Controls(self.model(choice))
        return self._controls[choice]

    def talk(self, key: str, choice: Choice, system: str = "") -> Talk:
        """The conversation `key`, begun anew if the model or the system message is another."""
        talk = self._talks.get(key)
        if talk is None or (talk.choice, talk.system) != (choice, system):
            self.forget(key)
            talk = self._talks[key] = Talk(self.model(choice), choice, system)
        return talk

    def forget(self, key: str) -> None:
        """Let go of the conversation `key`, and of models that were loaded for it alone."""
        if self._talks.pop(key, None):
            self._prune(SPARE)
            mx.clear_cache()

    def clear(self) -> None:
        """Let go of all conversations and models."""
        self._talks.clear()
        self._controls.clear()
        self._models.clear()
        mx.clear_cache()

    def close(self) -> None:
        """Let go of everything; the last thing that its thread does."""
        self.clear()
        # Without it MLX 0.32 aborts the process at exit, in one of four runs.
        mx.clear_streams()

    def _prune(self, spare: int) -> None:
        used = {talk.choice for talk in self._talks.values()}
        unused = [choice for choice in self._models if choice not in used]
        for choice in unused[: len(unused) - spare] if len(unused) > spare else ():
            del self._models[choice]
            self._controls.pop(choice, None)
