"""OpenAI-style answers as JSON, whole or in chunks. No model and no HTTP."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .api import ChatRequest
from .exchange import Done, Piece, Token


def _usage(done: Done) -> dict[str, Any]:
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
    }


def _token(token: Token) -> dict[str, Any]:
    top = [_logprob(text, value) for text, value in token.top]
    return {**_logprob(token.text, token.logprob), "top_logprobs": top}


def _logprob(text: str, value: float) -> dict[str, Any]:
    # JSON has no minus infinity; OpenAI's least is -9999.
    return {"token": text, "logprob": max(value, -9999.0), "bytes": list(text.encode())}


@dataclass(frozen=True)
class Reply:
    """The JSON of one answer, whole or in chunks."""

    id: str
    model: str
    created: int
    request: ChatRequest

    def whole(self, pieces: Sequence[Piece], done: Done) -> dict[str, Any]:
        """The answer of a request without ``stream``."""
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": done.finish_reason,
            **self._attention(done),
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": _usage(done)}

    def first(self) -> dict[str, Any]:
        """The chunk that opens a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def more(self, piece: Piece) -> dict[str, Any]:
        """A chunk with more of the answer."""
        return self._chunk({"content": piece.text}, logprobs=self._logprobs(piece.tokens))

    def last(self, done: Done) -> Iterator[dict[str, Any]]:
        """The chunks that end a stream: why it ended and, if asked for, what it used."""
        yield self._chunk({}, finish_reason=done.finish_reason, **self._attention(done))
        if self.request.include_usage:
            head = self._head("chat.completion.chunk")
            yield {**head, "choices": [], "usage": _usage(done)}

    def _chunk(self, delta: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        usage = {"usage": None} if self.request.include_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _attention(self, done: Done) -> dict[str, Any]:
        return {"attention": list(done.words)} if self.request.attention else {}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.request.top_logprobs is None:
            return None
        return {"content": [_token(token) for token in tokens], "refusal": None}


def model_entry(model: str, created: int) -> dict[str, Any]:
    """One entry of ``/v1/models``."""
    return {"id": model, "object": "model", "created": created, "owned_by": "agevlm"}


def model_list(model: str, created: int) -> dict[str, Any]:
    """The answer of ``/v1/models``."""
    return {"object": "list", "data": [model_entry(model, created)]}
