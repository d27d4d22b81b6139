"""The server as a user runs it, and OpenAI's own client."""

import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from agevlm_mlx import generate, load

from .conftest import data_url, picture

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]


class Server:
    """A server process; `log` is what it has written to stderr."""

    def __init__(self, log: Path, *args: str) -> None:
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "agevlm_mlx.serve", "--port", "0", *args],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.search(r"http://[\d.]+:(\d+)/v1", self.line)
        assert found, log.read_text()
        self.url, self.port = found[0], int(found[1])

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def client(self) -> Any:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)

    def stop(self, number: int = signal.SIGINT) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            self.process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The shipped model."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(picture(0))
    server = Server(folder / "log", "--image-root", str(folder / "pictures"))
    yield server
    assert server.stop() == 130
    assert server.log.read_text().strip() == "interrupted"


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return server.client()


def message(text: str, *urls: str) -> dict[str, Any]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def test_the_first_line_says_what_and_where(server):
    assert server.line.startswith(f"serving agevlm at {server.url} (")
    assert "Ctrl-C stops" in server.line
    assert server.url.startswith("http://127.0.0.1:")


def test_the_models(client):
    assert [model.id for model in client.models.list()] == ["agevlm"]
    assert client.models.retrieve("agevlm").id == "agevlm"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_answers_are_the_librarys(client):
    it = load()
    for seed, text in [(0, "Describe the image."), (1, "Is there a dog?")]:
        reply = client.chat.completions.create(
            model="agevlm", messages=[message(text, data_url(picture(seed)))], max_tokens=32
        )
        expected = generate(
            it.model, it.tokenizer, it.preprocessor, text, picture(seed), max_tokens=32
        )
        assert reply.choices[0].message.content.strip() == expected
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_stream_says_the_same(client):
    asked = {
        "model": "agevlm",
        "messages": [message("Describe the image.", data_url(picture(0)))],
        "max_tokens": 32,
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0
    assert len(chunks) > 4


def test_a_follow_up_and_where_it_looked(client):
    first = message("Describe the image.", data_url(picture(0)))
    reply = client.chat.completions.create(model="agevlm", messages=[first], max_tokens=32)
    turns = [
        first,
        {"role": "assistant", "content": reply.choices[0].message.content},
        message("Is there a dog?"),
    ]
    again = client.chat.completions.create(
        model="agevlm",
        messages=turns,
        max_tokens=8,
        logprobs=True,
        top_logprobs=2,
        extra_body={"attention": True},
    )
    assert again.usage.prompt_tokens_details.cached_tokens >= reply.usage.prompt_tokens
    words = again.choices[0].attention
    assert ("dog", "user") in [(w["word"], w["role"]) for w in words]
    assert all(w["image"] == 0 and 0 <= w["on_image"][0] <= 1 for w in words)
    assert len(again.choices[0].logprobs.content[0].top_logprobs) == 2


def test_several_ask_at_the_same_time(server, client):
    def ask(seed: int) -> str:
        reply = client.chat.completions.create(
            model="agevlm",
            messages=[message("Describe the image.", data_url(picture(seed)))],
            max_tokens=24,
        )
        return reply.choices[0].message.content

    expected = [ask(seed) for seed in range(6)]
    said: dict[int, str] = {}
    threads = [threading.Thread(target=lambda n=n: said.update({n: ask(n % 6)})) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [said[n] for n in range(12)] == expected * 2
    _, health = server.get("/health")
    assert health["status"] == "ok"
    assert health["image_cache"]["hits"] >= 12


def test_a_file_of_the_folder(client):
    reply = client.chat.completions.create(
        model="agevlm", messages=[message("Is there a dog?", "a.png")], max_tokens=4
    )
    assert reply.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="--image-root"):
        client.chat.completions.create(
            model="agevlm", messages=[message("A dog?", "file:///etc/passwd")]
        )


def png(*frames: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    frames[0].save(out, options.pop("format", "PNG"), **options)
    return out.getvalue()


IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "truncated": (lambda: picture(0)[:80], "damaged or truncated"),
    "text": (lambda: b"This is text in a file named .png", "not an image"),
    "empty": (lambda: b"", "not an image"),
    "100 megapixels": (lambda: png(Image.new("1", (10_000, 10_000))), "megapixels"),
    "zero size": (
        lambda: picture(0)[:16] + bytes(8) + picture(0)[24:],
        "image",
    ),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_bad_images_are_one_line(server, client, kind):
    make, expected = IMAGES[kind]
    with pytest.raises(openai.BadRequestError, match=expected) as caught:
        client.chat.completions.create(
            model="agevlm", messages=[message("A dog?", data_url(make()))], max_tokens=4
        )
    said = str(caught.value)
    assert "\n" not in said
    assert str(ROOT) not in said
    assert server.get("/health")[1]["failures"] == 0


def test_an_animation_gives_its_first_frame(client):
    frames = [Image.open(io.BytesIO(picture(n))) for n in (0, 1)]
    moving = png(frames[0], format="GIF", save_all=True, append_images=frames[1:])
    still = png(frames[0], format="GIF")
    said = [
        client.chat.completions.create(
            model="agevlm", messages=[message("Describe the image.", data_url(data))], max_tokens=16
        )
        .choices[0]
        .message.content
        for data in (moving, still)
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"messages": [message(" ")]}, openai.BadRequestError),
        ({"messages": [message("dog " * 100_000)]}, openai.BadRequestError),
        ({"temperature": 5}, openai.BadRequestError),
        ({"n": 3}, openai.BadRequestError),
        ({"model": "gpt-4o"}, openai.NotFoundError),
        ({"messages": [message("a", "http://169.254.169.254/")]}, openai.BadRequestError),
    ],
)
def test_errors_are_openais(client, fields, error):
    asked = {"model": "agevlm", "messages": [message("A dog?")], "max_tokens": 4, **fields}
    with pytest.raises(error) as caught:
        client.chat.completions.create(**asked)
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["message"]


def test_another_host_name_is_refused(server):
    assert server.get("/v1/models", Host="evil.example")[0] == 403
    assert server.get("/v1/models", Origin="http://evil.example")[0] == 403


def running(server: Server) -> int:
    return server.get("/health")[1]["running"]


def wait_until(check: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


#: The token that ends an answer is forbidden: it goes on to the limit.
def endless(stream: bool) -> bytes:
    bias = {str(load().tokenizer.eos_token_id): -100}
    return json.dumps({"messages": [message("Describe the image.")], "max_tokens": 512,
                       "logit_bias": bias, "stream": stream}).encode()  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(server, stream):
    body = endless(stream)
    before = server.get("/health")[1]["answers"]
    for _ in range(3):
        line = socket.create_connection(("127.0.0.1", server.port))
        line.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        if stream:
            assert b"data: " in line.recv(1 << 20) + line.recv(1 << 20)
        else:
            assert wait_until(lambda: running(server) > 0)
        line.close()
        assert wait_until(lambda: running(server) == 0)
    assert server.get("/health")[1]["answers"] == before


# --- its end -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_it_soon_even_in_the_middle_of_an_answer(
    number, status, tmp_path, tiny_checkpoint
):
    server = Server(tmp_path / "log", "--model", str(tiny_checkpoint), "--max-tokens", "1000000")
    assert "serving checkpoint at" in server.line
    client = server.client()
    stream = client.chat.completions.create(
        model="checkpoint",
        messages=[message("Is there a dog?", data_url(picture(0)))],
        logit_bias={str(load(tiny_checkpoint).tokenizer.eos_token_id): -100},
        stream=True,
    )
    chunks = iter(stream)
    for _ in range(3):
        next(chunks)
    start = time.monotonic()
    assert server.stop(number) == status
    assert time.monotonic() - start < 10
    assert server.log.read_text().strip() == ("interrupted" if status else "")
    with pytest.raises(openai.APIError, match="the server is shutting down"):
        list(chunks)


def test_the_command_is_agevlms(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "agevlm_mlx", "serve", "--model", str(tmp_path / "none")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
    assert "none" in run.stderr
    assert run.stderr.count("\n") == 1
    assert run.stdout == ""
