"""What the page in a tab of a browser sends, without a browser."""

import contextlib
import copy
import json
import secrets
from collections.abc import Iterator
from typing import Any

import httpx


class Tab:
    """One tab: `values` are what is in the page's components, by their ids in the page."""

    def __init__(self, client: httpx.Client) -> None:
        self.client, self.name = client, secrets.token_hex(6)
        self.page: dict[str, Any] = client.get("config").json()
        parts = [part for part in self.page["components"] if part["props"].get("elem_id")]
        self.ids: dict[str, int] = {part["props"]["elem_id"]: part["id"] for part in parts}
        self.values = {part["id"]: part["props"].get("value") for part in self.page["components"]}

    @contextlib.contextmanager
    def open(self) -> Iterator["Tab"]:
        """The tab, from its first event to its last; leaving closes it."""
        with self.client.stream("GET", f"gradio_api/heartbeat/{self.name}") as alive:
            lines = alive.iter_lines()  # kept: dropped half read, it would leave the line open
            next(lines)
            self.happen("load")
            yield self

    def __setitem__(self, component: str, value: Any) -> None:
        self.values[self.ids[component]] = value

    def __getitem__(self, component: str) -> Any:
        return self.values[self.ids[component]]

    def happen(self, event: str, component: str | None = None, data: Any = None) -> list[Any]:
        """Run what an event starts and keep what came back in `values`; the messages."""
        wanted = self._handler(event, component)
        body = {
            "data": [self.values[id] for id in wanted["inputs"]],
            "fn_index": wanted["id"],
            "session_hash": self.name,
            "trigger_id": None,
            "event_data": data,
        }
        if not wanted["queue"]:
            reply = self.client.post("gradio_api/run/predict", json=body)
            reply.raise_for_status()
            self._keep(wanted, reply.json()["data"])
            return []
        self.client.post("gradio_api/queue/join", json=body).raise_for_status()
        told: list[Any] = []
        address = f"gradio_api/queue/data?session_hash={self.name}"
        with self.client.stream("GET", address) as lines:
            for line in lines.iter_lines():
                if line.startswith("data: "):
                    told.append(json.loads(line.removeprefix("data: ")))
                    if told[-1]["msg"] == "process_completed":
                        break
        assert told[-1]["success"], told[-1]
        # The first holds everything, those after it what is new, the last one everything again.
        sent: list[Any] = []
        for message in told:
            if message["msg"] == "process_generating":
                data = message["output"]["data"]
                sent = [_changed(*pair) for pair in zip(sent, data, strict=True)] if sent else data
                self._keep(wanted, copy.deepcopy(sent))
        self._keep(wanted, told[-1]["output"]["data"])
        return told

    def upload(self, name: str, data: bytes) -> dict[str, Any]:
        """A file as the components hold it."""
        files = {"files": (name, data, "image/png")}
        reply = self.client.post("gradio_api/upload", files=files)
        reply.raise_for_status()
        return {
            "path": reply.json()[0],
            "orig_name": name,
            "mime_type": "image/png",
            "meta": {"_type": "gradio.FileData"},
        }

    def serve(self, component: str, function: str, query: Any) -> Any:
        """What a function of the server tells the page's script."""
        body = {"data": query, "fn_name": function, "component_id": self.ids[component]}
        reply = self.client.post(
            "gradio_api/component_server", json={**body, "session_hash": self.name}
        )
        reply.raise_for_status()
        return reply.json()

    def _handler(self, event: str, component: str | None) -> dict[str, Any]:
        (wanted,) = [
            handler
            for handler in self.page["dependencies"]
            if any(
                name == event and (component is None or target == self.ids[component])
                for target, name in handler["targets"]
            )
        ]
        return wanted

    def _keep(self, wanted: dict[str, Any], data: Any) -> None:
        for id, value in zip(wanted["outputs"], data, strict=False):
            if isinstance(value, dict) and value.get("__type__") == "update":
                value = value.get("value", self.values[id])
            self.values[id] = value


def _changed(value: Any, changes: list[Any]) -> Any:
    """A value after Gradio's list of [what is done, path, new part]."""
    for done, path, part in changes:
        if not path:
            value = value + part if done == "append" else part
            continue
        place = value
        for step in path[:-1]:
            place = place[step]
        if done == "append":
            place[path[-1]] += part
        elif done == "delete":
            del place[path[-1]]
        elif isinstance(place, list) and done == "add":
            place.insert(path[-1], part)
        else:
            place[path[-1]] = part
    return value
