"""Answers as JSON, whole and in chunks."""

import pytest

from agevlm_mlx.serving import api
from agevlm_mlx.serving.api import Limits
from agevlm_mlx.serving.exchange import Done, Piece, Token
from agevlm_mlx.serving.replies import Reply, model_list

HELLO = [{"role": "user", "content": "Hello"}]
PIECES = [
    Piece("A ", (Token("A ", -0.5, (("A ", -0.5), ("é", float("-inf")))),)),
    Piece("dog", (Token("dog", -1.0),)),
]
DONE = Done("stop", 10, 3, 4, ({"word": "dog"},))


def reply(**fields) -> Reply:
    return Reply("id", "m", 7, api.chat_request({"messages": HELLO, **fields}, Limits()))


def test_a_whole_answer():
    body = reply().whole(PIECES, DONE)
    assert (body["id"], body["model"], body["created"]) == ("id", "m", 7)
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"]["content"] == "A dog"
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    assert "attention" not in choice
    assert body["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 3,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_attention_and_log_probabilities_when_asked_for():
    (choice,) = reply(attention=True, logprobs=True).whole(PIECES, DONE)["choices"]
    assert choice["attention"] == [{"word": "dog"}]
    first, second = choice["logprobs"]["content"]
    assert first == {
        "token": "A ",
        "logprob": -0.5,
        "bytes": [65, 32],
        "top_logprobs": [
            {"token": "A ", "logprob": -0.5, "bytes": [65, 32]},
            {"token": "é", "logprob": -9999.0, "bytes": [195, 169]},
        ],
    }
    assert second["top_logprobs"] == []


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream(usage):
    options = {"stream_options": {"include_usage": True}} if usage else {}
    talk = reply(stream=True, attention=True, **options)
    chunks = [talk.first(), *(talk.more(piece) for piece in PIECES), *talk.last(DONE)]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert {c["id"] for c in chunks} == {"id"}
    deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"]]
    assert deltas == [
        {"role": "assistant", "content": ""}, {"content": "A "}, {"content": "dog"}, {}
    ]  # fmt: skip
    reasons = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]]
    assert reasons == [None, None, None, "stop"]
    last = chunks[-1]
    if usage:
        assert last["choices"] == []
        assert last["usage"]["total_tokens"] == 13
        assert all(c["usage"] is None for c in chunks[:-1])
        last = chunks[-2]
    else:
        assert all("usage" not in c for c in chunks)
    assert last["choices"][0]["attention"] == [{"word": "dog"}]


def test_the_list_of_models():
    assert model_list("m", 7) == {
        "object": "list",
        "data": [{"id": "m", "object": "model", "created": 7, "owned_by": "agevlm"}],
    }
