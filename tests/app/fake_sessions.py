"""Sessions that answer from a table, without a model: what the page is tested with."""

import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any

from agevlm_mlx.errors import UserError
from agevlm_mlx.sampling import Sampling
from app.catalogue import Choice

ANSWER = ["A ", "big ", "red ", "dog."]
STATS = {
    "image_ms": 12.3,
    "images_seen": 1,
    "images_known": 0,
    "first_ms": 40.1,
    "tokens": 4,
    "tokens_per_second": 210.0,
    "prompt_tokens": 12,
    "image_bytes": 393216,
    "finish": "stop",
}


class FakeSession:
    """The contract of `app.session.Session`; every answer is ANSWER."""

    def __init__(self, choice: Choice, pause: float) -> None:
        self.key = secrets.token_urlsafe(8)
        self.choice, self.sampling, self.system = choice, Sampling(), ""
        self.asked: list[tuple[str, list[tuple[str, bytes]]]] = []
        self.busy = False
        self._pause, self._stopped = pause, threading.Event()
        self._exchanges: list[dict[str, Any]] = []

    def state(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "busy": self.busy,
            "model": {"name": self.choice.source or "the shipped model", "layers": [1], "heads": 4},
            "examples": [{"id": "e0", "question": "Is there a dog?"}],
            "exchanges": [dict(exchange) for exchange in self._exchanges],
        }

    def ask(self, text: str, files: list[tuple[str, bytes]]) -> Iterator[dict[str, Any]]:
        if self.busy:
            yield self.state()
            return
        self.asked.append((text, list(files)))
        self._stopped.clear()
        exchange = {
            "id": len(self.asked),
            "question": text,
            "pictures": [],
            "answer": "",
            "state": "answering",
            "ahead": 0,
            "error": None,
            "notes": [],
            "model": "fake",
            "stats": None,
        }
        self._exchanges.append(exchange)
        self.busy = True
        try:
            yield from self._answer(exchange)
        finally:
            self.busy = False
        yield self.state()

    def _answer(self, exchange: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if not exchange["question"]:
            exchange |= {"state": "failed", "error": "The question is empty."}
            return
        for piece in ANSWER:
            yield self.state()
            if self._stopped.wait(self._pause):
                exchange["state"] = "stopped"
                return
            exchange["answer"] += piece
        exchange |= {"state": "done", "stats": STATS}

    def edit(self, exchange: int, text: str) -> Iterator[dict[str, Any]]:
        self._exchanges = [e for e in self._exchanges if e["id"] < exchange]
        return self.ask(text, [])

    def retry(self, exchange: int) -> Iterator[dict[str, Any]]:
        (old,) = (e for e in self._exchanges if e["id"] == exchange)
        return self.edit(exchange, old["question"])

    def example(self, name: str) -> Iterator[dict[str, Any]]:
        return self.ask(f"example {name}", [])

    def stop(self) -> None:
        self._stopped.set()

    def reset(self) -> dict[str, Any]:
        self.stop()
        self._exchanges = []
        return self.state()

    def switch(self, choice: Choice) -> Iterator[tuple[float, str]]:
        if choice.source == "missing":
            raise UserError("missing: expected a checkpoint folder, got nothing")
        for step in (0.0, 0.5, 1.0):
            yield step, "reading weights"
        self.choice = choice

    def facts(self) -> dict[str, str]:
        return {"Fusion": "guided", "Parameters": "1 million"}

    def looks(
        self, exchange: int, layer: int | None = None, head: int | None = None
    ) -> dict[str, Any]:
        if exchange == 13:
            raise RuntimeError("the model failed")
        if exchange == 14:
            raise KeyError("/a/path/of/the/server")
        return {
            "exchange": exchange,
            "pictures": [],
            "note": None,
            "threshold": 0.2,
            "words": [],
        }

    def answer(self, exchange: int) -> str:
        return next((e["answer"] for e in self._exchanges if e["id"] == exchange), "")

    def presence(
        self, text: str, file: tuple[str, bytes] | None = None, exchange: int | None = None
    ) -> Iterator[str]:
        if not text:
            raise UserError("text: expected words, got nothing")
        for word in text.split(","):
            about = file[0] if file else exchange
            yield f"<table><tr><td>{word}</td><td>{about}</td></tr></table>"
            if self._stopped.wait(self._pause):
                return

    def pictures(self, ids: list[str]) -> list[dict[str, Any]]:
        return []


class FakeSessions:
    """The contract of `app.session.Sessions`."""

    def __init__(self, pause: float = 0.0) -> None:
        self.tabs: dict[str, FakeSession] = {}
        self.when_freed: Callable[[str], None] = lambda tab: None
        self._pause = pause

    def open(self, tab: str) -> FakeSession:
        self.tabs[tab] = FakeSession(Choice(), self._pause)
        return self.tabs[tab]

    def get(self, tab: str) -> FakeSession:
        return self.tabs.get(tab) or self.open(tab)

    def close(self, tab: str) -> None:
        for name in [name for name in self.tabs if name == tab or name.startswith(f"{tab}/")]:
            self.tabs.pop(name).stop()
            self.when_freed(name)

    def by_key(self, key: str) -> FakeSession | None:
        return next((s for s in self.tabs.values() if s.key == key), None)

    def __len__(self) -> int:
        return len(self.tabs)

    def close_all(self) -> None:
        for tab in list(self.tabs):
            self.close(tab)
