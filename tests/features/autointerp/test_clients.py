from __future__ import annotations

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from autointerp_corpus import WordTokenizer

from gossamer.errors import CheckpointError, ConfigurationError, ModelError
from gossamer.features.autointerp.clients import Client, ReplayClient
from gossamer.features.autointerp.http_client import HTTPClient
from gossamer.features.autointerp.local_client import LocalClient

ASKED = [{"role": "user", "content": "Say it."}]


def said(content, logprobs=None):
    choice = {"message": {"role": "assistant", "content": content}}
    if logprobs is not None:
        choice["logprobs"] = {"content": logprobs}
    return 200, {"choices": [choice]}


class Server:
    """A chat server that answers as a list of scripts says, one after the other, the last for ever."""

    def __init__(self, *script):
        self.script, self.bodies, self.headers, self.lock = list(script), [], [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.bodies.append({**body, "path": self.path})
                    outer.headers.append(dict(self.headers))
                    step = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                answer = step(body) if callable(step) else step
                if answer == "hang up":
                    self.close_connection = True
                    return
                code, content, *more = answer
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                try:
                    self.send_response(code)
                    for name, value in dict(*more).items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client did not wait

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def client(self, **settings):
        return HTTPClient(self.url, "a-model", **{"wait": 0.01, "timeout": 5.0, **settings})


def test_a_server_is_asked_as_the_protocol_wants():
    with Server(said("Yes.")) as server:
        client = server.client(api_key="secret")
        assert client.complete([ASKED], max_tokens=7, temperature=0.5, seed=3) == ["Yes."]
    body = server.bodies[0]
    assert body["path"] == "/v1/chat/completions"
    assert (body["model"], body["messages"], body["max_tokens"]) == ("a-model", ASKED, 7)
    assert (body["temperature"], body["seed"]) == (0.5, 3)
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_answers_come_in_the_order_of_the_questions():
    def echo(body):
        time.sleep(0.02 * (body["messages"][0]["content"] == "0"))
        return said(body["messages"][0]["content"])

    with Server(echo) as server:
        asked = [[{"role": "user", "content": str(i)}] for i in range(12)]
        assert server.client(workers=4).complete(asked) == [str(i) for i in range(12)]


@pytest.mark.parametrize(
    "trouble",
    [
        (500, {"error": "overloaded"}),
        (429, {"error": {"message": "slow down"}}, {"Retry-After": "0.01"}),
        (200, b"not json"),
        (200, {"choices": []}),
        (200, {"choices": [{"message": {"content": None}}]}),
        (200, ["a list"]),
        "hang up",
        lambda _: (time.sleep(0.4), said("late"))[1],
    ],
)
def test_what_may_pass_is_tried_again(trouble):
    with Server(trouble, said("Yes.")) as server:
        assert server.client(timeout=0.2).complete([ASKED]) == ["Yes."]
        assert len(server.bodies) == 2


@pytest.mark.parametrize(
    "trouble", [(503, {"error": "down"}), (200, b"{"), lambda _: (time.sleep(0.3), said("late"))[1]]
)
def test_what_stays_is_an_abstention_after_the_last_try(trouble):
    with Server(trouble) as server:
        assert server.client(timeout=0.1, retries=2).complete([ASKED]) == [None]
        assert len(server.bodies) == 3


def test_what_cannot_pass_is_an_error_at_once_in_the_servers_words():
    with Server((401, {"error": {"message": "wrong key"}})) as server:
        with pytest.raises(ModelError, match=r"refuses to answer \(401: wrong key\)"):
            server.client().complete([ASKED])
        assert len(server.bodies) == 1


def test_no_server_is_an_error():
    with Server(said("")) as server:
        url = server.url
    with pytest.raises(ModelError, match="cannot be reached"):
        HTTPClient(url, "a-model", retries=1, wait=0.01).complete([ASKED])


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://there", "http://"])
def test_urls_that_are_none_are_refused(url):
    with pytest.raises(ConfigurationError, match="url is"):
        HTTPClient(url, "a-model")


def test_options_have_the_probabilities_that_the_server_reports():
    def likely(**tokens):
        return [{"token": token.replace("_", " "), "logprob": math.log(p)} for token, p in tokens.items()]

    logprobs = [
        {"token": "\n", "logprob": 0.0, "top_logprobs": likely(x=1.0)},
        {
            "token": "1",
            "logprob": -1.0,
            "top_logprobs": [
                *likely(_1=0.2, x=0.2),
                {"token": "1", "logprob": math.log(0.4)},
                {"token": "0", "logprob": math.log(0.2)},
            ],
        },
    ]
    with Server(said("\n1", logprobs)) as server:
        assert server.client().choose([ASKED], ("0", "1")) == [pytest.approx([0.25, 0.75])]
        assert server.bodies[0]["logprobs"] is True


@pytest.mark.parametrize(("text", "found"), [("The answer is 1.", [0.0, 1.0]), ("0", [1.0, 0.0]), ("10 of them", None)])
def test_without_probabilities_the_words_count(text, found):
    with Server(said(text)) as server:
        assert server.client(retries=0).choose([ASKED], ("0", "1")) == [found]


# ------------------------------------------------------------------------------------------------ replay


class Counting(Client):
    name = "counting"

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = 0, fails_at

    def complete(self, conversations, max_tokens=200, temperature=0.0, seed=0):
        replies = []
        for conversation in conversations:
            if self.fails_at == self.calls:
                raise KeyboardInterrupt
            self.calls += 1
            content = conversation[0]["content"]
            replies.append(None if content == "?" else f"{content} {seed} {max_tokens}")
        return replies

    def choose(self, conversations, options):
        self.calls += len(conversations)
        return [[1 / len(options)] * len(options)] * len(conversations)


def asked(*contents):
    return [[{"role": "user", "content": content}] for content in contents]


def test_nothing_is_asked_twice(tmp_path):
    client = Counting()
    replay = ReplayClient(client, tmp_path / "a" / "answers.jsonl")
    first = replay.complete(asked("a", "b", "a"))
    assert first == ["a 0 200", "b 0 200", "a 0 200"]
    assert client.calls == 2
    again = ReplayClient(client, tmp_path / "a" / "answers.jsonl")
    assert again.complete(asked("b", "a", "c")) == ["b 0 200", "a 0 200", "c 0 200"]
    assert (client.calls, again.asked, again.replayed) == (3, 1, 2)
    again.complete(asked("a"), max_tokens=5)
    again.complete(asked("a"), temperature=1.0, seed=1)
    again.choose(asked("a"), ("0", "1"))
    again.choose(asked("a"), ("0", "1"))
    assert client.calls == 6


def test_interrupted_work_goes_on_where_it_was(tmp_path):
    path = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ReplayClient(Counting(fails_at=3), path, chunk=1).complete(asked(*"abcdef"))
    path.write_bytes(path.read_bytes() + b'{"key": "half')
    client = Counting()
    assert len(ReplayClient(client, path).complete(asked(*"abcdef"))) == 6
    assert client.calls == 3


def test_abstentions_are_asked_again_and_another_client_too(tmp_path):
    path = tmp_path / "answers.jsonl"
    client = Counting()
    for _ in range(2):
        assert ReplayClient(client, path).complete(asked("?")) == [None]
    assert client.calls == 2
    ReplayClient(client, path).complete(asked("a"))
    ReplayClient(client, path, name="another").complete(asked("a"))
    assert client.calls == 4
    assert ReplayClient(None, path, name="another").complete(asked("a", "z")) == ["a 0 200", None]


def test_a_damaged_file_names_the_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"key": "a", "reply": "b"}\nnonsense\n')
    with pytest.raises(CheckpointError, match="line 2 is no stored answer"):
        ReplayClient(None, path)


# ------------------------------------------------------------------------------------------------ local


@pytest.fixture
def local(tiny_llama):
    return LocalClient(tiny_llama, WordTokenizer(), "tiny", batch=2)


def test_a_local_model_gives_the_probabilities_of_its_next_token(local, tiny_llama):
    conversations = asked("the whale said", "the whale", "the whale said it and the sea")
    found = local.choose(conversations, ("7", "sea"))
    for conversation, row in zip(conversations, found):
        ids = torch.tensor([local.encoded(conversation)])
        with torch.inference_mode():
            p = tiny_llama(ids).logits[0, -1].double().softmax(-1)
        assert row == pytest.approx([float(p[4] / (p[4] + p[9])), float(p[9] / (p[4] + p[9]))], rel=1e-4)
    assert local.choose([], ("7", "sea")) == []
    with pytest.raises(ConfigurationError, match="do not begin with different tokens"):
        local.choose(conversations, ("7", "7 sea"))


def test_a_local_model_completes_as_without_a_batch(local, tiny_llama):
    conversations = asked("the whale said", "it", "the old man and the sea")
    together = local.complete(conversations, max_tokens=6)
    for conversation, reply in zip(conversations, together):
        ids = local.encoded(conversation)
        for _ in range(6):
            with torch.inference_mode():
                ids.append(int(tiny_llama(torch.tensor([ids])).logits[0, -1].argmax()))
        assert reply == local.tokenizer.decode(ids[-6:]).strip()


def test_drawn_answers_repeat_with_the_seed(local):
    conversations = asked("the whale said")
    first, again, other = (local.complete(conversations, 12, 1.0, seed) for seed in (1, 1, 2))
    assert first == again != other
