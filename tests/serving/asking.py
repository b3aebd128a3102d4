"""What the tests ask a server, and how far two answers are apart."""

import torch
from transformers import AutoTokenizer

from benchmarks.assets import evaluation_sequences

TOKENS = 400
DENSE = ("--model-loader-extra-config", '{"compressed": false}')


def prompt_of(directory, tokens=TOKENS):
    """Ids of held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return evaluation_sequences(tokenizer, sequences=2, length=512)["C4"].reshape(-1)[: tokens + 1].tolist()


def logprobs_of(server, prompt):
    """Log-probabilities of a prompt's tokens but the first."""
    scored = server.post("/v1/completions", prompt=prompt, max_tokens=1, temperature=0, prompt_logprobs=0)
    positions = scored["choices"][0]["prompt_logprobs"][1:]
    return [p[str(token)]["logprob"] for token, p in zip(prompt[1:], positions, strict=True)]


def ask(server, prompt):
    """Log-probabilities of a prompt's tokens and of those of a completion, the completion, and how long it is."""
    answer = server.post(
        "/v1/completions", prompt="The city lies on the river and", max_tokens=16, temperature=0, seed=0, logprobs=0
    )
    [choice] = answer["choices"]
    # Few tokens at once and many take different kernels.
    return logprobs_of(server, prompt) + choice["logprobs"]["token_logprobs"], choice["text"], answer["usage"]


def distance(one, other):
    """Mean difference of log-probabilities, as a fraction of their standard deviation."""
    a, b = torch.tensor(one), torch.tensor(other)
    return float((a - b).abs().mean() / b.std())
