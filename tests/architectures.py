"""Which architectures runs work on: each is pruned, saved and read back as a tiny random model.

``python -m tests.architectures`` writes what was found to docs/architectures.md.
"""

import functools
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers as hf
from datasets import Dataset
from llmcompressor import oneshot

from elsa_modifier import ELSAModifier

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"

_TOKENS = dict(vocab_size=96, bos_token_id=0, eos_token_id=0, pad_token_id=0)
_SIZES = dict(**_TOKENS, hidden_size=16, num_hidden_layers=2)
_MLP = dict(**_SIZES, num_attention_heads=2, intermediate_size=24, max_position_embeddings=64)
_LLAMA = dict(**_MLP, num_key_value_heads=1)
_FOUR_EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
_FOUR_LOCAL_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
_LLAMA4 = dict(
    **_LLAMA,
    head_dim=8,
    intermediate_size_mlp=24,
    num_local_experts=4,
    num_experts_per_tok=1,
    interleave_moe_layer_step=1,
    attention_chunk_size=16,
)


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    :param config: makes its tiny configuration
    :param model_class: loads and saves it; None is what transformers has for a causal language model of the config
    :param fields: of the recipe, beyond those that all have
    :param refused: what the reason says, if a run is refused
    """

    name: str
    config: Callable[[], hf.PreTrainedConfig]
    model_class: type[hf.PreTrainedModel] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    :param difference: largest one of logits, of the model in memory to that read back
    :param moved: the same difference before the run and after it
    :param untouched: whether unreached weights have the bits they had
    :param fused: whether experts were put together
    :param zeros: in weights of modules that were pruned, of so many ``entries``
    :param saved_zeros: in all parameters: of the model in memory, and of that read back
    :param keys: that were missing or unexpected as it was read back
    """

    class_name: str
    refused: str | None = None
    difference: float = 0.0
    moved: float = 0.0
    pruned: int = 0
    unreached: int = 0
    untouched: bool = True
    zeros: int = 0
    entries: int = 0
    saved_zeros: tuple[int, int] = (0, 0)
    keys: tuple[str, ...] = ()
    fused: bool = False


def _gemma3() -> hf.PreTrainedConfig:
    vision = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    tokens = dict(image_token_index=95, boi_token_index=93, eoi_token_index=94)
    return hf.Gemma3Config(
        text_config=dict(**_LLAMA, head_dim=8), vision_config=vision, mm_tokens_per_image=4, **tokens
    )


def _llama4() -> hf.PreTrainedConfig:
    vision = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        vision_output_dim=16,
        projector_input_dim=16,
        projector_output_dim=16,
    )
    tokens = dict(boi_token_index=93, eoi_token_index=94, image_token_index=95)
    return hf.Llama4Config(text_config=_LLAMA4, vision_config=vision, **tokens)


def _deepseek_v3() -> hf.PreTrainedConfig:
    attention = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
    experts = dict(moe_intermediate_size=8, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2)
    routing = dict(n_group=2, topk_group=1, first_k_dense_replace=1)
    return hf.DeepseekV3Config(**_MLP, num_key_value_heads=2, **attention, **experts, **routing)


def _jamba() -> hf.PreTrainedConfig:
    layers = dict(expert_layer_period=2, expert_layer_offset=1, attn_layer_period=2, attn_layer_offset=1)
    mamba = dict(use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4)
    return hf.JambaConfig(**_LLAMA, **_FOUR_EXPERTS, **layers, **mamba)


ARCHITECTURES = [
    Architecture("Llama", lambda: hf.LlamaConfig(**_LLAMA)),
    Architecture("Qwen2", lambda: hf.Qwen2Config(**_LLAMA)),
    Architecture("Qwen3", lambda: hf.Qwen3Config(**_LLAMA, head_dim=8)),
    Architecture(
        "Qwen3-MoE",
        lambda: hf.Qwen3MoeConfig(
            **_LLAMA, **_FOUR_EXPERTS, head_dim=8, moe_intermediate_size=8, decoder_sparse_step=1
        ),
    ),
    Architecture("Mixtral", lambda: hf.MixtralConfig(**_LLAMA, **_FOUR_LOCAL_EXPERTS)),
    Architecture("gpt-oss", lambda: hf.GptOssConfig(**_LLAMA, **_FOUR_LOCAL_EXPERTS, head_dim=8, sliding_window=8)),
    Architecture("DeepSeek-V3", _deepseek_v3),
    Architecture("Gemma2", lambda: hf.Gemma2Config(**_LLAMA, head_dim=8)),
    Architecture("Gemma3 (text)", lambda: hf.Gemma3TextConfig(**_LLAMA, head_dim=8)),
    Architecture("Gemma3 (multimodal)", _gemma3, hf.Gemma3ForConditionalGeneration),
    Architecture("OPT", lambda: hf.OPTConfig(**_SIZES, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=16)),
    Architecture(
        "GPT-2",
        lambda: hf.GPT2Config(**_TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=64),
        refused="set targets to \\[Conv1D\\]",
    ),
    Architecture(
        "GPT-2, `targets: [Conv1D]`",
        lambda: hf.GPT2Config(**_TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=64),
        fields=dict(targets=["Conv1D"]),
    ),
    Architecture(
        "GPT-2, `targets: [Conv1D]`, `2:4`",
        lambda: hf.GPT2Config(**_TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=64),
        fields=dict(targets=["Conv1D"], sparsity=None, mask_structure="2:4"),
        refused="is a Conv1D",
    ),
    Architecture("Phi-3", lambda: hf.Phi3Config(**_MLP, num_key_value_heads=2)),
    Architecture("GPT-NeoX", lambda: hf.GPTNeoXConfig(**_MLP)),
    Architecture("Bloom", lambda: hf.BloomConfig(**_TOKENS, hidden_size=16, n_layer=2, n_head=2)),
    Architecture("Falcon", lambda: hf.FalconConfig(**_SIZES, num_attention_heads=2)),
    Architecture("OLMo2", lambda: hf.Olmo2Config(**_LLAMA)),
    Architecture("Mamba", lambda: hf.MambaConfig(**_SIZES, state_size=4)),
    Architecture(
        "Mamba2", lambda: hf.Mamba2Config(**_SIZES, state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=8)
    ),
    Architecture("RWKV", lambda: hf.RwkvConfig(**_SIZES, attention_hidden_size=16, context_length=64)),
    Architecture("Jamba", _jamba),
    Architecture(
        "Llama4 (text)",
        lambda: hf.Llama4TextConfig(**_LLAMA4),
        refused="'Llama4TextConfig' object has no attribute 'text_config'",
        note="by llm-compressor, which knows the multimodal model alone: ",
    ),
    Architecture("Llama4 (multimodal)", _llama4, hf.Llama4ForConditionalGeneration),
    Architecture(
        "T5",
        lambda: hf.T5Config(
            **_TOKENS, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
        ),
        hf.T5ForConditionalGeneration,
        refused="encoder-decoder",
    ),
    Architecture("BERT", lambda: hf.BertConfig(**_MLP), refused="depend on later tokens"),
    Architecture("BERT, `is_decoder: true`", lambda: hf.BertConfig(**_MLP, is_decoder=True)),
]


@functools.cache
def outcome_of(name: str) -> Outcome:
    """Prune, save, read back, compare."""
    from tests.conftest import make_tokenizer

    (architecture,) = (a for a in ARCHITECTURES if a.name == name)
    torch.manual_seed(0)
    model_class = architecture.model_class or hf.AutoModelForCausalLM
    config = architecture.config()
    made = model_class.from_config(config) if architecture.model_class is None else model_class(config)
    class_name = type(made).__name__
    documents = [[(first + 7 * i) % 92 + 1 for i in range(40)] for first in range(16)]
    ids = torch.tensor([[(3 + 5 * i) % 92 + 1 for i in range(20)]])
    settings: dict[str, Any] = dict(
        sparsity=0.5, steps=4, batch_size=2, sequence_length=16, interval=1, lr=1e-2, precision="fp32"
    )
    modifier = ELSAModifier(**settings | architecture.fields)
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        source, out = Path(directory) / "source", Path(directory) / "out"
        made.save_pretrained(source)
        make_tokenizer().save_pretrained(source)
        try:
            with torch.enable_grad():
                model = oneshot(
                    model=str(source) if architecture.model_class is None else type(made).from_pretrained(source),
                    processor=make_tokenizer(),
                    dataset=Dataset.from_dict({"input_ids": documents}),
                    recipe=[modifier],
                    output_dir=str(out),
                )
        except (ValueError, AttributeError) as error:
            assert modifier.history == []
            return Outcome(class_name, refused=str(error))
        again, info = type(model).from_pretrained(out, output_loading_info=True)
        before, trained, read = (m.eval()(input_ids=ids).logits for m in (made, model, again))
    weights = [model.get_submodule(name).weight for name in modifier.masks]
    return Outcome(
        class_name,
        difference=float((trained - read).abs().max()),
        moved=float((trained - before).abs().max()),
        pruned=len(weights),
        unreached=len(modifier.unreached),
        untouched=all(_same_weight(made, again, name) for name in modifier.unreached),
        zeros=sum(int((w == 0).sum()) for w in weights),
        entries=sum(w.numel() for w in weights),
        saved_zeros=(_zeros(model), _zeros(again)),
        keys=tuple(sorted([*info["missing_keys"], *info["unexpected_keys"]])),
        fused=bool(modifier._experts),
    )


def _same_weight(one: torch.nn.Module, other: torch.nn.Module, name: str) -> bool:
    return torch.equal(one.get_submodule(name).weight, other.get_submodule(name).weight)


def _zeros(model: torch.nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in model.parameters())


def page() -> str:
    """docs/architectures.md, from runs made now."""
    lines = [
        "# Architectures",
        "",
        "Each row is a tiny random model of the class that was pruned to 50% through `oneshot`, saved, and read back",
        "by `from_pretrained`: no key missing or unexpected, as many zeros, logits within 1e-5 of the model in memory.",
        "`python -m tests.architectures` writes this page, and a test compares it.",
        "",
        "| architecture | class | result |",
        "|---|---|---|",
    ]
    for architecture in ARCHITECTURES:
        found = outcome_of(architecture.name)
        if found.refused is None:
            words = [f"{found.pruned} matrices pruned, {found.zeros:,} zeros in {found.entries:,} weights"]
            if found.unreached:
                words.append(f"{found.unreached} that text does not reach left as they were")
            if found.fused:
                words.append("experts put together as the class holds them")
            result = "; ".join(words)
        else:
            result = f"refused before the first step: {architecture.note}{found.refused}"
        lines.append(f"| {architecture.name} | `{found.class_name}` | {result} |")
    lines += [
        "",
        "Any other class is held to the same: before the first step it is asked whether it would find what is going to",
        "be saved, and whether its logits depend on later tokens; after saving, whether it finds what was saved.",
        "",
        "llm-compressor makes Linear modules of each expert's matrices. Where a class does not find those, they are",
        "put together in what `save_pretrained` writes; quantized experts are not, since inference engines read them",
        "one by one.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
