"""A running server with OpenAI's API that gives the log-probabilities of a prompt's tokens, as vLLM does."""

import json
import math
import os
import urllib.error
import urllib.request
from typing import Any

from torch import Tensor
from tqdm import tqdm

from elsa_modifier.evaluating.scoring import Scores
from elsa_sparse.errors import printable

__all__ = ["Endpoint"]

_SECONDS = 600


class Endpoint:
    """A server, asked for the one model that it serves.

    ``OPENAI_API_KEY``, if it is set, is sent along.

    :param address: such as ``http://127.0.0.1:8000``, with or without ``/v1``
    :raises ValueError: if there is no such server
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/").removesuffix("/v1")
        if not self.address.startswith(("http://", "https://")):
            raise ValueError(f"endpoint is {printable(address, 100)}; give an address, such as http://127.0.0.1:8000")
        try:
            served = self._ask("/v1/models")["data"][0]
            self.model: str = served["id"]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"endpoint: {self.address}/v1/models names no model; is it a server of models?") from error
        length = served.get("max_model_len")
        self.length: int | None = length if isinstance(length, int) else None
        """Tokens that it takes, prompt and completion; None if it does not say."""

    def score(self, windows: Tensor, *, title: str = "perplexity") -> Scores:
        """Perplexity of the served model.

        :param windows: (windows, length) token ids, int64; every window on its own
        :raises ValueError: if the server takes no such prompts, or says nothing of their tokens
        """
        window = windows.shape[1]
        if self.length is not None and window >= self.length:
            raise ValueError(
                f"endpoint: the server takes {self.length:,} tokens, and a window is {window:,} and one more. "
                f"Start it with --max-model-len {window + 1}, or set --window {self.length - 1} or less"
            )
        total = 0.0
        for ids in tqdm(windows.tolist(), desc=title, unit="window", delay=2):
            asked = {"prompt": ids, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
            answer = self._ask("/v1/completions", model=self.model, **asked)
            try:
                found = answer["choices"][0]["logprobs"]["token_logprobs"][1:window]
                if len(found) != window - 1:
                    raise ValueError
                total -= math.fsum(found)
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise ValueError(
                    f"endpoint: {self.address} does not give the log-probabilities of a prompt's tokens (echo with "
                    "logprobs), which vLLM does"
                ) from error
        tokens = windows.shape[0] * (window - 1)
        return Scores(tokens, math.exp(min(total / tokens, 700.0)))

    def _ask(self, path: str, **body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.address + path, json.dumps(body).encode() if body else None, headers)
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            said = printable(error.read(2000).decode(errors="replace"), 500)
            raise ValueError(f"endpoint: {self.address}{path} answers {error.code}: {said}") from error
        except (urllib.error.URLError, TimeoutError) as error:
            reason = getattr(error, "reason", error)
            raise ValueError(f"endpoint: there is no server at {self.address} ({reason})") from error
        except ValueError as error:
            raise ValueError(f"endpoint: {self.address}{path} does not answer in JSON ({error})") from error
