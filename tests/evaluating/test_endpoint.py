"""A server of OpenAI's API, made here of a tiny model, judged over HTTP."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM

from elsa_modifier.evaluating.endpoint import Endpoint
from tests.cli.test_commands import run


@pytest.fixture
def serve(outputs):
    """Function that starts a server of the pruned model; ``change`` may spoil its answers."""
    model = AutoModelForCausalLM.from_pretrained(outputs[1]).eval()
    servers = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({"data": [{"id": "tiny", "max_model_len": 64}]})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert asked["model"] == "tiny" and asked["echo"] and asked["max_tokens"] == 1
            prompts = asked["prompt"] if isinstance(asked["prompt"][0], list) else [asked["prompt"]]
            self.answer({"choices": [self.choice(i, prompt) for i, prompt in enumerate(prompts)]})

        def choice(self, index, prompt):
            with torch.no_grad():
                logits = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
            best = logits.max(-1)
            ids = [*prompt[1:], int(best.indices[-1])]
            found = [None, *(float(row[i]) for row, i in zip(logits, ids, strict=True))]
            tops = [None, *({str(int(i)): float(v)} for v, i in zip(*best, strict=True))]
            return {"index": index, "text": "", "logprobs": {"token_logprobs": found, "top_logprobs": tops}}

        def answer(self, document):
            body = json.dumps(self.server.change(document)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    def serve(change=lambda document: document):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.change = change
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_perplexity_is_that_of_the_model(serve, outputs, book):
    address = serve()
    arguments = ["--data", book, "--window", 32, "--json", "-", "--no-save"]
    served = json.loads(run("eval", outputs[1], *arguments, "--endpoint", f"{address}/v1").stdout)
    local = json.loads(run("eval", outputs[1], *arguments, "--no-dense").stdout)
    assert served["engine"] == address and served["dtype"] is None and local["engine"] == "transformers"
    [found], [expected] = served["perplexity"], local["perplexity"]
    assert found.pop("value") == pytest.approx(expected.pop("value"), rel=1e-6) and found == expected


def test_tasks_are_those_of_the_model(serve, outputs, task):
    pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity")
    arguments = ["--no-perplexity", "--tasks", "next_word", "--include-path", task, "--json", "-", "--no-save"]
    served = json.loads(run("eval", outputs[1], *arguments, "--endpoint", serve()).stdout)
    assert served["tasks"] == json.loads(run("eval", outputs[1], *arguments, "--device", "cpu").stdout)["tasks"]


def test_errors_say_what_to_do(serve, outputs, book):
    def said(address, *more):
        result = run("eval", outputs[1], "--data", book, "--window", 32, "--endpoint", address, *more, code=1)
        return " ".join(result.stderr.split())

    assert "give an address, such as http://127.0.0.1:8000" in said("127.0.0.1:8000")
    assert "there is no server at http://127.0.0.1:9" in said("http://127.0.0.1:9")
    assert "takes 64 tokens" in said(serve(), "--window", "64") and "--max-model-len 65" in said(
        serve(), "--window", "64"
    )
    assert "leave one out" in said(serve(), "--dense", outputs[0])
    assert "how weights are held" in said(serve(), "--compressed")
    silent = serve(lambda document: {"choices": [{"text": ""}]} if "choices" in document else document)
    assert "does not give the log-probabilities" in said(silent)
    assert "names no model" in said(serve(lambda document: {}))


def test_an_error_of_the_server_is_shown(serve, monkeypatch):
    address = serve(lambda document: 1 / 0)
    with pytest.raises((ValueError, ConnectionError)):
        Endpoint(address)
