"""Every tab's conversation: opened, found again, and freed when nobody uses it any more."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from io import BytesIO

from PIL import Image

from agevlm_mlx.data.painting import make_scene
from agevlm_mlx.sampling import Sampling

from . import jobs
from .catalogue import Choice
from .jobs import About
from .pictures import Shown, take
from .session import Session
from .worker import Ahead, Worker

#: Questions of the examples; {} is something in the picture.
_QUESTIONS = (
    "Describe the image.",
    "Is there a {}?",
    "Where is the {}?",
    "Is the {} big or small?",
)
#: Tabs whose freed conversations are remembered, so that they can be told.
_FREED = 1000


class Sessions:
    """The conversations of all open tabs. Safe to use from any number of threads.

    choice: the model that a new tab starts with. It is loaded here and now: `progress` is called
    as by `catalogue.load_model`, and ``UserError`` says what is wrong with it. idle: seconds
    without a question after which a conversation is freed.
    """

    def __init__(
        self,
        worker: Worker,
        choice: Choice,
        *,
        idle: float = 1800.0,
        sampling: Sampling | None = None,
        system: str = "",
        progress: Callable[[float, str], None] = lambda part, step: None,
    ) -> None:
        self._worker, self._choice = worker, choice
        self._idle, self._sampling, self._system = idle, sampling, system
        self._tabs: dict[str, Session] = {}
        #: Why a tab's conversation is gone, for tabs that were heard of last.
        self._freed: OrderedDict[str, str] = OrderedDict()
        #: Called with the name of a tab whose conversation was freed.
        self.when_freed: Callable[[str], None] = lambda tab: None
        self._lock = threading.Lock()
        for event in worker.stream(lambda desk, send: jobs.load(desk, send, choice)):
            if isinstance(event, About):
                self._about = event
            elif not isinstance(event, Ahead):
                progress(event.part, event.step)
        self._examples = examples()
        worker.idle = self.free_idle

    def __len__(self) -> int:
        return len(self._tabs)

    def open(self, tab: str) -> Session:
        """A new conversation for a tab; one that it had is closed."""
        self.close(tab)
        self._freed.pop(tab, None)
        return self.get(tab)

    def get(self, tab: str) -> Session:
        """The conversation of a tab; a new one if it has none, which says so if it was freed."""
        with self._lock:
            if tab not in self._tabs:
                why = self._freed.pop(tab, None)
                self._tabs[tab] = Session(
                    self._worker,
                    self._choice,
                    self._about,
                    sampling=self._sampling,
                    system=self._system,
                    examples=self._examples,
                    notes=[f"{why} This is a new conversation."] if why else [],
                )
            return self._tabs[tab]

    def by_key(self, key: str) -> Session | None:
        """The conversation with this secret key."""
        with self._lock:
            return next((s for s in self._tabs.values() if s.key == key), None)

    def close(self, tab: str) -> None:
        """Free the conversation of a tab, and those whose names are that of the tab and "/..."."""
        with self._lock:
            gone = [name for name in self._tabs if name == tab or name.startswith(f"{tab}/")]
        self._free(gone, "The page was not connected for a while, and what was said is gone.")

    def free_idle(self) -> None:
        """Free the conversations in which nothing was asked for too long."""
        with self._lock:
            idle = [name for name, s in self._tabs.items() if s.idle() > self._idle]
        minutes = self._idle / 60
        self._free(
            idle, f"What was said was put away after {minutes:.0f} minutes without a question."
        )

    def _free(self, names: Sequence[str], why: str) -> None:
        with self._lock:
            gone = [self._tabs.pop(name) for name in names if name in self._tabs]
            self._freed |= dict.fromkeys(names, why)
            while len(self._freed) > _FREED:
                self._freed.popitem(last=False)
        for session in gone:
            session.close()
        for name in names:
            self.when_freed(name)

    def close_all(self) -> None:
        """Free everything."""
        for name in list(self._tabs):
            self.close(name)


def examples() -> Sequence[tuple[str, Shown]]:
    """Painted pictures with a question for each."""
    found = []
    for number, question in enumerate(_QUESTIONS):
        scene = make_scene(2, "test", number)
        file = BytesIO()
        large = Image.fromarray(scene.image).resize((512, 512), Image.Resampling.LANCZOS)
        large.save(file, "PNG")
        shown = take(f"example {number + 1}.png", file.getvalue())
        found.append((question.format(scene.nouns[-1]), shown))
    return found
