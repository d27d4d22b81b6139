"""Requests as JSON: what is understood and what is refused."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agevlm_mlx.sampling import Sampling
from agevlm_mlx.serving import api
from agevlm_mlx.serving.api import ApiError, Limits, Message

HELLO = [{"role": "user", "content": "Hello"}]
LIMITS = Limits(max_tokens=100, images=2, text=50, messages=5)


def parse(**fields) -> api.ChatRequest:
    return api.chat_request({"messages": HELLO, **fields}, LIMITS)


def image(url: object = "data:image/png;base64,aaaa") -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


# --- what is understood ------------------------------------------------------------------------


def test_the_least_request():
    asked = parse()
    assert asked.messages == (Message("user", "Hello"),)
    assert asked.sampling == Sampling(max_tokens=100)
    assert not asked.stream
    assert not asked.attention
    assert asked.top_logprobs is None


def test_messages_and_their_images():
    content = [{"type": "text", "text": "one"}, image("u1"), {"type": "text", "text": "two"},
               {"type": "image_url", "image_url": "u2", "detail": "low"}]  # fmt: skip
    asked = parse(
        messages=[
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": content, "name": "me"},
            {"role": "assistant", "content": [{"type": "text", "text": "three"}]},
            {"role": "user", "content": "four"},
        ]
    )
    assert [m.role for m in asked.messages] == ["system", "user", "assistant", "user"]
    assert asked.messages[1].text == "one\ntwo"
    assert asked.messages[1].images == (
        ("u1", "messages[1].content[1].image_url"),
        ("u2", "messages[1].content[3].image_url"),
    )


def test_every_sampling_field_arrives():
    asked = parse(
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        seed=3,
        stop=["a", "b"],
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        repetition_penalty=1.1,
        repetition_context_size=9,
        logit_bias={"3": 5, "4": -1.5},
        n=1,
        tools=[],
        response_format={"type": "text"},
        user="me",
        unknown={"to": "us"},
    )
    assert asked.sampling == Sampling(
        max_tokens=7,
        temp=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        seed=3,
        stop=("a", "b"),
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        repetition_penalty=1.1,
        repetition_context_size=9,
        logit_bias={3: 5.0, 4: -1.5},
    )


def test_the_newer_name_of_max_tokens_wins():
    assert parse(max_tokens=7, max_completion_tokens=8).sampling.max_tokens == 8
    assert parse(max_tokens=7, max_completion_tokens=None).sampling.max_tokens == 7


def test_null_is_absent():
    names = ("max_tokens", "temperature", "top_p", "seed", "stop", "logit_bias", "n", "stream",
             "stream_options", "logprobs", "top_logprobs", "tools", "model")  # fmt: skip
    assert parse(**dict.fromkeys(names)) == parse()


def test_the_rest():
    asked = parse(stream=True, stream_options={"include_usage": True}, attention=True,
                  logprobs=True, top_logprobs=3, model="m", stop="x")  # fmt: skip
    assert asked.stream
    assert asked.include_usage
    assert asked.attention
    assert (asked.top_logprobs, asked.model, asked.sampling.stop) == (3, "m", ("x",))
    assert parse(logprobs=True).top_logprobs == 0


# --- what is not -------------------------------------------------------------------------------

USER = {"role": "user", "content": "a"}
BAD = [
    ({"messages": None}, "messages", "expected a list of messages, got nothing"),
    ({"messages": []}, "messages", "got an empty list"),
    ({"messages": "Hello"}, "messages", "got text"),
    ({"messages": {}}, "messages", "got an object"),
    ({"messages": [USER] * 6}, "messages", "at most 5, got 6"),
    ({"messages": ["a"]}, "messages[0]", "expected an object, got text"),
    ({"messages": [{"content": "a"}]}, "messages[0].role", "got nothing"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "got 'tool'"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role", "got a list"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "got nothing"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "got a number"),
    ({"messages": [USER, {"role": "assistant", "content": "b"}]}, "messages",
     "the last one from the user, got assistant"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]", "got text"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
     "messages[0].content[0].type", "expected 'text' or 'image_url', got 'input_audio'"),
    ({"messages": [{"role": "user", "content": [{"text": "a"}]}]},
     "messages[0].content[0].type", "got nothing"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
     "messages[0].content[0].text", "expected text, got a number"),
    ({"messages": [{"role": "user", "content": [image(None)]}]},
     "messages[0].content[0].image_url", "got nothing"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "messages[0].content[0].image_url", "got nothing"),
    ({"messages": [{"role": "system", "content": [image()]}, USER]}, "messages[0].content[0]",
     "messages of the user only"),
    ({"messages": [{"role": "user", "content": [image()] * 3}]}, "messages",
     "at most 2 images, got 3"),
    ({"messages": [{"role": "user", "content": "a" * 51}]}, "messages", "at most 50 characters"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content",
     "expected text that can be written as UTF-8"),
    ({"max_tokens": 0}, "max_tokens", "from 1 to 100, got 0"),
    ({"max_tokens": 101}, "max_tokens", "from 1 to 100, got 101"),
    ({"max_completion_tokens": 101}, "max_completion_tokens", "got 101"),
    ({"max_tokens": 1.5}, "max_tokens", "a whole number, got 1.5"),
    ({"max_tokens": "5"}, "max_tokens", "got '5'"),
    ({"max_tokens": True}, "max_tokens", "got True"),
    ({"max_tokens": 10**400}, "max_tokens", "got a huge number"),
    ({"temperature": -0.1}, "temperature", "from 0 to 2, got -0.1"),
    ({"temperature": 2.1}, "temperature", "got 2.1"),
    ({"temperature": float("inf")}, "temperature", "got inf"),
    ({"temperature": float("nan")}, "temperature", "got nan"),
    ({"temperature": "hot"}, "temperature", "a number, got 'hot'"),
    ({"temperature": []}, "temperature", "got a list"),
    ({"top_p": 0}, "top_p", "more than 0"),
    ({"top_p": 1.1}, "top_p", "got 1.1"),
    ({"top_k": -1}, "top_k", "got -1"),
    ({"min_p": 2}, "min_p", "got 2"),
    ({"seed": -1}, "seed", "got -1"),
    ({"seed": 2**63}, "seed", "from 0 to"),
    ({"repetition_penalty": 0}, "repetition_penalty", "more than 0"),
    ({"repetition_penalty": 1e9}, "repetition_penalty", "got 1000000000.0"),
    ({"repetition_context_size": 0}, "repetition_context_size", "got 0"),
    ({"presence_penalty": "a"}, "presence_penalty", "got 'a'"),
    ({"frequency_penalty": 1e9}, "frequency_penalty", "got 1000000000.0"),
    ({"stop": ""}, "stop", "none of them empty"),
    ({"stop": 3}, "stop", "a text or a list"),
    ({"stop": ["a", 3]}, "stop", "a text or a list"),
    ({"stop": ["a"] * 5}, "stop", "at most 4"),
    ({"stop": {"a": 1}}, "stop", "a text or a list"),
    ({"logit_bias": [1]}, "logit_bias", "an object of at most 1024"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "token ids such as"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "token ids such as"),
    ({"logit_bias": {"\u00b2": 1}}, "logit_bias", "token ids such as"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1", "from -100 to 100"),
    ({"logit_bias": {"1": "a"}}, "logit_bias.1", "got 'a'"),
    ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias", "at most 1024"),
    ({"n": 2}, "n", "expected 1"),
    ({"n": 0}, "n", "got 0"),
    ({"n": "1"}, "n", "got '1'"),
    ({"stream": "yes"}, "stream", "true or false, got 'yes'"),
    ({"stream": 1}, "stream", "got 1"),
    ({"stream_options": {}}, "stream_options", "expected stream to be true"),
    ({"stream": True, "stream_options": 3}, "stream_options", "an object, got a number"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage", "got 1"),
    ({"attention": "all"}, "attention", "true or false"),
    ({"logprobs": 5}, "logprobs", "true or false"),
    ({"top_logprobs": 5}, "top_logprobs", "expected logprobs to be true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
    ({"model": 3}, "model", "expected text, got 3"),
    ({"tools": [{"type": "function"}]}, "tools", "not served here"),
    ({"functions": [{}]}, "functions", "not served here"),
    ({"response_format": {"type": "json_object"}}, "response_format", "expected"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "message"), BAD, ids=[str(b[0])[:60] for b in BAD])
def test_a_bad_request_is_one_line_that_names_the_field(fields, param, message):
    with pytest.raises(ApiError, match=re.escape(message)) as caught:
        parse(**fields)
    error = caught.value
    assert (error.status, error.param) == (400, param)
    assert str(error).startswith(param.split(".")[0].split("[")[0]) or param == "include_usage"
    assert "\n" not in str(error)
    assert len(str(error)) < 200
    assert json.loads(json.dumps(error.body, allow_nan=False))["error"].keys() == {
        "message", "type", "param", "code"
    }  # fmt: skip


@pytest.mark.parametrize("body", [None, 3, "a", [], True])
def test_a_body_that_is_no_object(body):
    with pytest.raises(ApiError, match="body: expected a JSON object"):
        api.chat_request(body, LIMITS)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"{'a': 1}", b"\xff", b"[" * 100_000, b'{"a": NaN}', b'{"a": Infinity}',
     b'{"a": -Infinity}', b'{"a": ' + b"9" * 5000 + b"}", b"nul"],
    ids=range(10),
)  # fmt: skip
def test_a_body_that_is_no_json(body):
    with pytest.raises(ApiError, match="body: expected JSON") as caught:
        api.read_json(body)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "item", ["{}", "[]", "1000", '{"a":1}'], ids=["objects", "lists", "numbers", "fields"]
)
def test_a_body_of_very_many_values_is_refused_before_it_is_parsed(item, monkeypatch):
    body = f'{{"messages": [{",".join([item] * (api.MAX_VALUES + 1))}]}}'.encode()
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(ApiError, match=f"body: expected at most {api.MAX_VALUES}") as caught:
        api.read_json(body)
    assert caught.value.status == 400
    assert "\n" not in str(caught.value)


def test_a_body_may_have_all_the_values_that_a_request_has_use_for():
    part = {"type": "text", "text": "a, b"}
    messages = [{"role": "user", "content": [part] * 50}] * Limits().messages
    biases = {str(n): 1.0 for n in range(api.MAX_BIASES)}
    body = json.dumps({"messages": messages, "logit_bias": biases}).encode()
    assert len(api.chat_request(api.read_json(body), Limits()).messages) == Limits().messages


def test_json_is_read_in_utf_8():
    assert api.read_json('{"a": "é"}'.encode()) == {"a": "é"}


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (404, "invalid_request_error"), (429, "rate_limit_error"),
     (500, "server_error"), (503, "server_error")],
)  # fmt: skip
def test_errors_have_openais_types(status, kind):
    assert ApiError("a", status=status).body["error"]["type"] == kind


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
FIELDS = ("messages", "model", "stream", "stream_options", "n", "stop", "logit_bias", "max_tokens",
          "temperature", "top_p", "top_k", "min_p", "seed", "logprobs", "top_logprobs", "attention",
          "presence_penalty", "repetition_penalty", "tools", "response_format")  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
    st.lists(st.fixed_dictionaries({"role": st.sampled_from([*api.ROLES, "tool"]),
                                    "content": JSON}), min_size=1, max_size=3),
)  # fmt: skip
def test_any_json_is_a_request_or_an_error(fields, messages):
    refused = None
    try:
        api.chat_request({"messages": messages, **fields}, LIMITS)
    except ApiError as error:
        refused = error
    assert refused is None or refused.status == 400
    assert len(str(refused)) < 300
