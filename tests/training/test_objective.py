"""The loss in chunks of tokens against the loss of all logits at once, for every way from a head to logits."""

import copy
import re

import pytest
import torch
from loguru import logger
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    GPTJConfig,
    GraniteConfig,
    LlamaForCausalLM,
)

from elsa_modifier.evaluation import perplexity
from elsa_modifier.training import objective
from elsa_modifier.training.data import IGNORED_LABEL
from elsa_modifier.training.model_state import trainable
from elsa_modifier.training.objective import next_token_loss
from tests.conftest import _LLAMA, CONFIGS
from tests.reference.objective import whole_loss
from tests.training.test_loop import run

WORDS = 96
ALL = CONFIGS | {
    "gemma2": Gemma2Config(**_LLAMA, head_dim=8, final_logit_softcapping=0.5),
    "cohere": CohereConfig(**_LLAMA, logit_scale=0.3),
    "granite": GraniteConfig(**_LLAMA, logits_scaling=3.0),
    "falcon-h1": FalconH1Config(
        **_LLAMA,
        head_dim=8,
        lm_head_multiplier=0.2,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=8,
    ),
    "gpt-j": GPTJConfig(
        vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, bos_token_id=0, eos_token_id=0
    ),
    "gemma3-with-images": Gemma3Config(
        text_config=_LLAMA | {"head_dim": 8, "final_logit_softcapping": 0.5},
        vision_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        ),
        mm_tokens_per_image=4,
        image_token_index=95,
        boi_token_index=94,
        eoi_token_index=93,
    ),
}


def build(name, dtype=torch.float32):
    torch.manual_seed(0)
    kind = AutoModelForImageTextToText if name == "gemma3-with-images" else AutoModelForCausalLM
    model = kind.from_config(copy.deepcopy(ALL[name])).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.1)  # a bias of zeros would hide that it is left out
    return model


def batch(rows=3, length=11, ignored=slice(4, 6)):
    ids = torch.randint(0, 90, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, ignored] = IGNORED_LABEL
    return {"input_ids": ids, "labels": labels}


def differentiated(model, loss_of, inputs, precision="fp32"):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = loss_of(model, inputs)
    (loss / inputs["labels"].numel()).backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


@pytest.fixture
def chunks_of(monkeypatch):
    """Function that sets how many tokens' logits are computed at a time."""
    return lambda tokens: monkeypatch.setattr(objective, "CHUNK_BYTES", tokens * 4 * WORDS)


@pytest.fixture
def warnings():
    found = []
    sink = logger.add(lambda message: found.append(str(message)), level="WARNING", format="{message}")
    yield found
    logger.remove(sink)


def watch_head(model):
    """A list that gets the number of tokens each time that the head runs, from now on."""
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda m, x, y: rows.append(y.shape[:-1].numel()))
    return rows


@pytest.mark.parametrize("name", ALL)
def test_loss_and_gradients(name, chunks_of, warnings):
    model, inputs = build(name), batch()
    expected, wanted = differentiated(model, whole_loss, inputs)
    chunks_of(7)
    next_token_loss(model, inputs)  # finds out whether the model can be taken apart
    rows = watch_head(model)
    loss, found = differentiated(model, next_token_loss, inputs)
    # Of 3 x 10 tokens that have a next one, 3 x 2 are ignored. Ahead of the others run one for nothing, and one for
    # the parameters that the head has.
    assert rows == [1, 1, 7, 7, 7, 3] and not warnings
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert found.keys() == wanted.keys()
    total = torch.stack([g.norm() for g in wanted.values()]).norm()
    for key in wanted:
        assert (found[key] - wanted[key]).norm() <= 1e-6 * total, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "gpt-j", "mixtral"])
def test_bf16_is_no_further_from_fp32(name, dtype, chunks_of):
    exact = build(name, dtype).float()
    model, inputs = build(name), batch()
    expected, wanted = differentiated(exact, whole_loss, inputs)
    with trainable(model, torch.device("cpu"), dtype=dtype):
        model.eval()
        errors = []
        for loss_of in (whole_loss, next_token_loss):
            chunks_of(7)
            loss, found = differentiated(model, loss_of, inputs, "bf16")
            assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=2e-3)
            assert found.keys() == wanted.keys()
            errors.append([float((found[key] - wanted[key]).norm() / total_norm(wanted)) for key in wanted])
    for whole, ours in zip(*errors, strict=True):
        assert ours < max(1.2 * whole, 1e-3)


def total_norm(gradients):
    return nn.utils.get_total_norm(gradients.values())


@pytest.mark.parametrize(
    "inputs",
    [
        batch(rows=1, length=40),
        batch(rows=40, length=2, ignored=slice(0)),
        batch(rows=20, length=3, ignored=slice(2, 3)),
        batch(ignored=slice(0, 10)),
        batch(ignored=slice(None)),
    ],
    ids=["one sequence", "two tokens", "the last ignored", "only the last", "nothing to predict"],
)
def test_batches(inputs, chunks_of):
    model = build("llama-tied")
    expected, wanted = differentiated(model, whole_loss, inputs)
    chunks_of(2)
    loss, found = differentiated(model, next_token_loss, inputs)
    torch.testing.assert_close(loss, expected)
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-6)


def test_only_what_saves_memory_is_computed_in_chunks(chunks_of):
    model, inputs = build("llama"), batch()
    rows = watch_head(model)
    # 30 tokens are no more than a chunk, and than half of the width, 16, with it.
    chunks_of(14)
    loss, found = differentiated(model, next_token_loss, inputs)
    expected, wanted = differentiated(model, whole_loss, inputs)
    assert rows == [33, 33]
    assert torch.equal(loss, expected) and all(torch.equal(found[key], wanted[key]) for key in wanted)
    chunks_of(13)
    next_token_loss(model, inputs)
    assert rows[-2:] == [13, 11]


@pytest.mark.parametrize("options", [{}, {"accumulation": 2, "batch_size": 3}, {"gradient_release": True}], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_runs(name, options, checkpointing, load, chunks_of):
    options = {"base": torch.optim.SGD, "projection": "magnitude"} | options
    if "gradient_release" in options:
        options["max_grad_norm"] = None
    whole, parts = load(name), load(name)
    run(whole, **options)
    chunks_of(5)
    with trainable(parts, torch.device("cpu"), activation_checkpointing=checkpointing):
        rows = watch_head(parts)
        run(parts, **options)
    assert max(rows) < 17
    for (key, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=key)


def test_dropout_is_drawn_as_without_chunks(chunks_of):
    model, inputs = build("opt").train(), batch()
    torch.manual_seed(1)
    expected, _ = differentiated(model, whole_loss, inputs)
    chunks_of(4)
    next_token_loss(model, inputs)
    torch.manual_seed(1)
    loss, _ = differentiated(model, next_token_loss, inputs)
    torch.testing.assert_close(loss, expected)


class Centred(LlamaForCausalLM):
    """Logits that depend on those of the other tokens."""

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = output.logits - output.logits.mean(1, keepdim=True)
        return output


class Nested(LlamaForCausalLM):
    """Its body's output never leaves it."""

    def forward(self, input_ids, **options):
        inner = self.model.layers[0](self.model.embed_tokens(input_ids), position_embeddings=self._angles(input_ids))
        return type("Output", (), {"logits": self.lm_head(inner)})

    def _angles(self, ids):
        return self.model.rotary_emb(self.model.embed_tokens(ids), torch.arange(ids.shape[1])[None])


class Looking(LlamaForCausalLM):
    """Logits that depend on more than hidden states."""

    def forward(self, input_ids, **options):
        output = super().forward(input_ids, **options)
        output.logits = output.logits + input_ids[:, :, None].float() * torch.arange(96)
        return output


class Pairs(LlamaForCausalLM):
    def forward(self, input_ids, **options):
        if len(input_ids) % 2:
            raise ValueError("not in pairs")
        return super().forward(input_ids, **options)


@pytest.mark.parametrize(
    "kind,reason",
    [
        (Centred, "logits of some tokens are off by .* without the others"),
        (Looking, "logits of some tokens are off by .* without the others"),
        (Nested, "what computes its last hidden states cannot be found"),
        (Pairs, "its head does not run on hidden states alone .not in pairs"),
    ],
)
def test_a_model_that_cannot_be_taken_apart_is_not(kind, reason, chunks_of, warnings):
    torch.manual_seed(0)
    model, inputs = kind(CONFIGS["llama"]).eval(), batch(rows=4)
    expected, wanted = differentiated(model, whole_loss, inputs)
    chunks_of(3)
    for _ in range(2):
        loss, found = differentiated(model, next_token_loss, inputs)
        assert torch.equal(loss, expected) and all(torch.equal(found[key], wanted[key]) for key in wanted)
    (warning,) = warnings
    assert re.search(f"Logits of {kind.__name__} cannot be computed in chunks of tokens: {reason}", warning)
    assert "GB; a smaller batch_size" in warning


def test_perplexity(chunks_of):
    model, ids = build("gemma2"), batch(rows=8)["input_ids"]
    expected = perplexity(model, ids)
    chunks_of(4)
    rows = watch_head(model)
    assert perplexity(model, ids) == pytest.approx(expected, rel=1e-6)
    assert max(rows[1:]) <= 4  # after the first, which finds out
