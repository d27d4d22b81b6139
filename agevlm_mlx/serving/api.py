"""OpenAI-style chat requests, checked. No model and no HTTP.

A request is checked completely: `ApiError` says in one line what was expected and found, and
which field is meant. Fields that are not known are ignored, as OpenAI's servers do.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..sampling import Sampling

#: role in a request -> role of a turn.
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
#: OpenAI's limits.
MAX_STOPS, MAX_TOP_LOGPROBS, MAX_BIASES = 4, 20, 1024
#: Brackets and commas of a body: small values take far more time and memory than their text.
MAX_VALUES = 200_000
#: Fields that would change the answer and cannot be honoured: (what to send instead).
NOT_SERVED = {"tools": "no tools", "functions": "no functions", "audio": "no audio"}


class ApiError(Exception):
    """What the client gets instead of an answer: a status and OpenAI's error object."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. max_tokens is also what it gets when it does not say."""

    max_tokens: int = 512
    images: int = 8
    text: int = 1_000_000  # characters, so that a tokenizer is never kept busy for seconds
    messages: int = 256


@dataclass(frozen=True)
class Message:
    """One message; images are URLs, each with the name of its field for errors."""

    role: str
    text: str
    images: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ChatRequest:
    """A checked request. top_logprobs: None without log probabilities."""

    messages: tuple[Message, ...]
    sampling: Sampling
    stream: bool = False
    include_usage: bool = False
    attention: bool = False
    top_logprobs: int | None = None
    model: str | None = None


def read_json(body: bytes | bytearray) -> Any:
    """The value of a request's body; ``ApiError`` for what is no JSON or far too much of it."""
    if sum(map(body.count, (b"{", b"[", b","))) > MAX_VALUES:
        raise ApiError(
            f"body: expected at most {MAX_VALUES} brackets and commas, got more; "
            "send a shorter conversation"
        )
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or "too deep, or not UTF-8"
        raise ApiError(f"body: expected JSON: {reason}; send one JSON object") from None


def _no_constant(name: str) -> Any:
    raise json.JSONDecodeError(f"{name} is no number", "", 0)


def chat_request(body: Any, limits: Limits) -> ChatRequest:
    """The request in a decoded body; ``ApiError`` for the first thing that is wrong."""
    if not isinstance(body, dict):
        raise ApiError(f"body: expected a JSON object, got {_kind(body)}")
    _only_what_is_served(body)
    stream = _flag(body, "stream")
    logprobs = _flag(body, "logprobs")
    top = _number(body, "top_logprobs", int, 0, MAX_TOP_LOGPROBS)
    if top is not None and not logprobs:
        raise ApiError("top_logprobs: expected logprobs to be true", param="top_logprobs")
    return ChatRequest(
        messages=_messages(body.get("messages"), limits),
        sampling=_sampling(body, limits),
        stream=stream,
        include_usage=_include_usage(body, stream),
        attention=_flag(body, "attention"),
        top_logprobs=(top or 0) if logprobs else None,
        model=_text(body, "model"),
    )


def _only_what_is_served(body: Mapping[str, Any]) -> None:
    for name, advice in NOT_SERVED.items():
        if body.get(name):
            raise ApiError(f"{name}: not served here; send {advice}", param=name)
    if _number(body, "n", int, 1, 128) not in (None, 1):
        raise ApiError("n: expected 1, got more; send the request several times", param="n")
    wanted = body.get("response_format")
    if wanted is not None and wanted != {"type": "text"}:
        raise ApiError(
            'response_format: expected {"type": "text"}; ask for the format in the text',
            param="response_format",
        )


# --- messages ----------------------------------------------------------------------------------


def _messages(value: Any, limits: Limits) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else _kind(value)
        raise ApiError(f"messages: expected a list of messages, got {got}", param="messages")
    if len(value) > limits.messages:
        raise ApiError(
            f"messages: expected at most {limits.messages}, got {len(value)}", param="messages"
        )
    messages = tuple(_message(item, f"messages[{i}]") for i, item in enumerate(value))
    if messages[-1].role != "user":
        raise ApiError(
            f"messages: expected the last one from the user, got {messages[-1].role}",
            param="messages",
        )
    images = sum(len(message.images) for message in messages)
    if images > limits.images:
        raise ApiError(
            f"messages: expected at most {limits.images} images, got {images}", param="messages"
        )
    size = sum(len(message.text) for message in messages)
    if size > limits.text:
        raise ApiError(
            f"messages: expected at most {limits.text} characters of text, got {size}",
            param="messages",
            code="context_length_exceeded",
        )
    return messages


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise ApiError(f"{where}: expected an object, got {_kind(item)}", param=where)
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ApiError(
            f"{where}.role: expected one of {', '.join(ROLES)}, got {_shown(role)}",
            param=f"{where}.role",
        )
    content, where = item.get("content"), f"{where}.content"
    if isinstance(content, str):
        return Message(ROLES[role], _written(content, where))
    if not isinstance(content, list):
        raise ApiError(f"{where}: expected text or a list of parts, got {_kind(content)}",
                       param=where)  # fmt: skip
    texts, images = [], []
    for i, part in enumerate(content):
        kind, value = _part(part, f"{where}[{i}]")
        if kind == "text":
            texts.append(_written(value, f"{where}[{i}].text"))
        elif role != "user":
            raise ApiError(
                f"{where}[{i}]: expected images in messages of the user only, got one of {role}",
                param=f"{where}[{i}]",
            )
        else:
            images.append((value, f"{where}[{i}].image_url"))
    return Message(ROLES[role], "\n".join(texts), tuple(images))


def _written(text: str, where: str) -> str:
    """The text, if it has no half of a pair of surrogates, which JSON can spell."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(
            f"{where}: expected text that can be written as UTF-8, got half a character",
            param=where,
        ) from None
    return text


def _part(part: Any, where: str) -> tuple[str, str]:
    if not isinstance(part, dict):
        raise ApiError(f"{where}: expected an object, got {_kind(part)}", param=where)
    kind = part.get("type")
    if kind == "text":
        value = part.get("text")
    elif kind == "image_url":
        value = part.get("image_url")
        value = value.get("url") if isinstance(value, dict) else value
    else:
        raise ApiError(
            f"{where}.type: expected 'text' or 'image_url', got {_shown(kind)}",
            param=f"{where}.type",
        )
    if not isinstance(value, str):
        wanted = "text" if kind == "text" else 'an object such as {"url": "data:image/png;..."}'
        raise ApiError(
            f"{where}.{kind}: expected {wanted}, got {_kind(value)}", param=f"{where}.{kind}"
        )
    return kind, value


# --- sampling ----------------------------------------------------------------------------------


def _sampling(body: Mapping[str, Any], limits: Limits) -> Sampling:
    newer = "max_completion_tokens"
    tokens = newer if body.get(newer) is not None else "max_tokens"
    values = {
        "max_tokens": _number(body, tokens, int, 1, limits.max_tokens) or limits.max_tokens,
        "temp": _number(body, "temperature", float, 0, 2),
        "top_p": _number(body, "top_p", float, 0, 1),
        "top_k": _number(body, "top_k", int, 0, 2**31 - 1),
        "min_p": _number(body, "min_p", float, 0, 1),
        "seed": _number(body, "seed", int, 0, 2**63 - 1),
        "repetition_penalty": _number(body, "repetition_penalty", float, 0, 100),
        "presence_penalty": _number(body, "presence_penalty", float, -100, 100),
        "frequency_penalty": _number(body, "frequency_penalty", float, -100, 100),
        "repetition_context_size": _number(body, "repetition_context_size", int, 1, 2**31 - 1),
        "logit_bias": _logit_bias(body.get("logit_bias")),
        "stop": _stops(body.get("stop")),
    }
    try:
        return Sampling(**{name: v for name, v in values.items() if v is not None})
    except UserError as error:
        raise ApiError(str(error), param=str(error).partition(":")[0]) from None


def _stops(value: Any) -> tuple[str, ...] | None:
    if value is None or value == []:
        return None
    stops = [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not good or not all(isinstance(s, str) and 0 < len(s) <= 1000 for s in stops):
        raise ApiError(
            f"stop: expected a text or a list of at most {MAX_STOPS}, none of them empty",
            param="stop",
        )
    return tuple(stops)


def _logit_bias(value: Any) -> dict[int, float] | None:
    if value is None or value == {}:
        return None
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise ApiError(
            f"logit_bias: expected an object of at most {MAX_BIASES} token ids, got {_kind(value)}",
            param="logit_bias",
        )
    biases = {}
    for token in value:
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise ApiError(
                f"logit_bias: expected token ids such as \"42\", got {_shown(token)}",
                param="logit_bias",
            )  # fmt: skip
        biases[int(token)] = _number(value, token, float, -100, 100, "logit_bias.") or 0.0
    return biases


# --- fields of one kind ------------------------------------------------------------------------


def _number(
    body: Mapping[str, Any], name: str, kind: type, low: float, high: float, prefix: str = ""
) -> Any:
    """The int or float under `name`, None if there is none."""
    value, wanted = body.get(name), "a whole number" if kind is int else "a number"
    if value is None:
        return None
    where = prefix + name
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise ApiError(f"{where}: expected {wanted}, got {_shown(value)}", param=where)
    if not low <= value <= high:
        raise ApiError(
            f"{where}: expected {wanted} from {low:g} to {high:g}, got {_shown(value)}", param=where
        )
    return kind(value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(f"{name}: expected true or false, got {_shown(value)}", param=name)
    return bool(value)


def _text(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise ApiError(f"{name}: expected text, got {_shown(value)}", param=name)
    return value


def _include_usage(body: Mapping[str, Any], stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise ApiError(f"stream_options: expected an object, got {_kind(options)}",
                       param="stream_options")  # fmt: skip
    if not stream:
        raise ApiError("stream_options: expected stream to be true", param="stream_options")
    return _flag(options, "include_usage")


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    names = {bool: "true or false", dict: "an object", list: "a list", str: "text"}
    return names.get(type(value), "a number")


def _shown(value: Any) -> str:
    """A value in an error message: short, and never the whole of an image."""
    if value is None or isinstance(value, dict | list):
        return _kind(value)
    text = str(value) if isinstance(value, int) and abs(value) < 2**80 else repr(value)[:60]
    return text if not isinstance(value, int) or len(text) < 40 else "a huge number"
