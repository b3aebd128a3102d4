"""Every command in README and docs runs here, on a tiny model, or is checked as far as it can be without.

`elsa` commands run, but for those in NOT_RUN. Of programs that are not here the files, options and extras are checked.
"""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

from elsa_cli.main import app
from tests.cli.test_commands import run
from tests.docs.pages import ROOT, blocks, commands, inline_commands

# The start of an `elsa` command, and why it is only parsed.
NOT_RUN = {
    "plan tests/planning/configs/gemma-2-27b": "tests/planning/test_planner.py compares it with docs/planning.md",
    "plan tests/planning/configs/llama-2-": "the same, and it does not fit: status 1",
    "plan google/gemma-2-2b": "its configuration is on the hub",
    "eval out --tasks paper": "its questions are on the hub; tests/evaluating/test_lm_eval.py runs a task",
    "eval out --dense my-model --tasks paper": "the same",
    "eval out --endpoint": "tests/evaluating/test_endpoint.py starts a server",
    "eval out-sparse --endpoint": "the same",
    "lm-eval": "tests/evaluating/test_lm_eval.py runs it, on a task that reads a local file",
}
HUB = ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M", "meta-llama/Llama-3.1-8B", "MODEL")
QUICK = {
    "bench": ["--rounds", "1", "--tokens", "1", "--prompt", "4", "--batch", "1", "--threads", "1"],
    "prune": ["--checkpoint-minutes", "0"],
    "sweep": ["--checkpoint-minutes", "0"],
    "eval": ["--windows", "1"],
}
SHORT = "{steps: 2, batch_size: 2, sequence_length: 16, sparsity: 0.8, checkpoint: coded}"
ELSA = [(page, words) for page, words in commands() if words[0] == "elsa"]
OTHERS = [(page, words) for page, words in commands() if words[0] != "elsa"]


def named(cases):
    return [
        pytest.param(page, words, id=f"{page.relative_to(ROOT)}: {' '.join(words) if isinstance(words, list) else i}")
        for i, (page, words) in enumerate(cases)
    ]


@pytest.fixture(scope="module")
def workplace(checkpoint, pruned, texts, tmp_path_factory):
    """A directory where the names in the pages are tiny models, texts and recipes."""
    place = tmp_path_factory.mktemp("docs")
    shutil.copytree(checkpoint(), place / "my-model")
    shutil.copytree(pruned(), place / "out")
    shutil.copytree(checkpoint(), place / "base")
    for name in ("out-sparse", "out-80", "out-90", "pruned", "my-model-sparse", "pruned-50", "pruned-80", "pruned-90"):
        run("pack", place / "out", place / name)
    text = " ".join(2 * list(texts["text"]))
    for name in ("texts.txt", "unseen.txt"):
        (place / name).write_text(text)
    for name in ("texts", "my-texts"):
        (place / name).mkdir()
        (place / name / "a.txt").write_text(text)
    (place / "corpus.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (place / "short.yaml").write_text(f"prune_stage:\n  prune_modifiers:\n    ELSAModifier: {SHORT}\n")
    (place / "owl.txt").write_text("[0.2, 0.3]")
    (place / "final_configuration.txt").write_text("model.layers.0.mlp.up_proj: 0\nmodel.layers.1.mlp.up_proj: 0\n")
    return place


def test_there_are_some():
    assert len(ELSA) >= 12 and len(OTHERS) >= 12
    assert all(any(" ".join(words[1:]).startswith(start) for _, words in ELSA) for start in NOT_RUN)


@pytest.mark.parametrize("page,words", named(ELSA))
def test_elsa(page, words, workplace, monkeypatch):
    if any(" ".join(words[1:]).startswith(start) for start in NOT_RUN):
        monkeypatch.chdir(ROOT)
        return parse(words[1:])
    monkeypatch.chdir(workplace)
    words = ["my-model" if word in HUB and words[i - 1] != "--base-model" else word for i, word in enumerate(words)]
    name, *arguments = ["elsa_80" if word == "RECIPE" else word for word in words[1:]]
    target = None
    if ">" in arguments:
        arguments, (_, target) = arguments[:-2], arguments[-2:]
    if name in ("pack", "unpack"):
        shutil.rmtree(arguments[1], ignore_errors=True)
    if name in ("prune", "sweep"):
        shutil.rmtree(arguments[arguments.index("--out") + 1], ignore_errors=True)
        arguments[arguments.index("--recipe") + 1] = "short.yaml"
    if name == "eval" and "--data" not in arguments:
        arguments += ["--data", "texts.txt"]  # WikiText-2 and C4 are on the hub
    if name == "bench" or "--compressed" in arguments:
        pytest.importorskip("elsa_kernels")
    printed = run(name, *arguments, *QUICK.get(name, []))
    if target is not None:
        json.loads(printed.stdout)
        (workplace / target).write_text(printed.stdout)


def parse(arguments):
    """Raises click's UsageError for a command or an option that there is not."""
    group = typer.main.get_command(app)
    with group.make_context("elsa", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        command.make_context(name, rest, parent=context)


def options_of(name):
    group = typer.main.get_command(app)
    return {
        option for parameter in group.commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)
    }


@pytest.mark.parametrize("page,words", named(OTHERS))
def test_others(page, words):
    check(words)


@pytest.mark.parametrize("page,words", named(inline_commands()))
def test_inline(page, words):
    if words[:2] == ["elsa", "lm-eval"] and len(words) > 2:
        check(["lm_eval", *words[2:]])  # whose arguments it takes
    elif words[0] == "elsa":
        options = {word for word in words if word.startswith("--")}
        assert options <= options_of(words[1])
    else:
        check(words)


def check(words):
    _, _, extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")
    match words:
        case ["make", *targets]:
            rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {target for target in targets if "=" not in target} <= set(rules)
        case ["pip", "install", *packages]:
            for package in packages:
                name, extra = re.fullmatch(r"(-[-\w]+|[\w.-]+|\./kernels)(?:\[([\w,]+)\])?", package).groups()
                assert name in ("--no-deps", "-e", "elsa-modifier", "elsa-kernels", ".", "./kernels")
                assert extra is None or extra in re.findall(r"^([\w-]+) = \[", extras.partition("\n[")[0], re.MULTILINE)
        case ["python", "-m", module, "--model", _] if module in (ROOT / "benchmarks" / "vllm_server.py").read_text():
            return  # how tests/serving starts servers
        case ["python" | "python3", "-m", module, *arguments]:
            spec = find_spec(module)
            spec = find_spec(f"{module}.__main__") if spec and spec.submodule_search_locations else spec
            assert spec is not None, module
            source = "" if module == "venv" else Path(spec.origin).read_text()
            for option in (word for word in arguments if word.startswith("--")):
                assert f'"{option}"' in source or f"{option[2:].replace('-', '_')}:" in source
        case ["python", "-c", code, *_]:
            compile(code, "docs", "exec")
        case ["sh" | "sbatch", script, *_]:
            assert (ROOT / script).is_file()
        case ["torchrun", "--nproc-per-node", _, "-m", "elsa_cli", command, *_]:
            assert command in typer.main.get_command(app).commands
        case ["torchrun", *_, script]:
            assert (ROOT / "examples" / "multi_gpu" / script).is_file()
        case ["vllm", "serve", _, *options]:  # tests/serving starts servers with these
            if options[:1] == ["--max-model-len"]:
                return
            assert options[:1] in ([], ["--model-loader-extra-config"])
            assert [*json.loads((options or ["", '{"compressed": true}'])[1])] == ["compressed"]
        case ["lm_eval", "--model", "hf" | "vllm", "--model_args", model, *_, "--tasks", _]:
            assert model.startswith("pretrained=")
        case [".", activate]:
            assert activate.endswith("/bin/activate")
        case _:
            pytest.fail(f"nothing here knows how to check {words}")


def test_it_would_notice():
    for words in (["make", "demos"], ["pip", "install", "elsa-modifer"], ["pip", "install", "elsa-modifier[plots]"]):
        with pytest.raises(AssertionError):
            check(words)
    for words in (["python", "-m", "benchmarks.none"], ["python", "-m", "benchmarks.gpu_sparse_kernels", "--size"]):
        with pytest.raises((AssertionError, ModuleNotFoundError)):
            check(words)
    for words in (["plan", "x", "--recipe", "elsa_80", "--gpu", "1", "--none"], ["prunes"]):
        with pytest.raises(Exception, match=r"No such (option|command)"):
            parse(words)


@pytest.mark.parametrize("page,block", named(blocks("python")))
def test_python(page, block, workplace, monkeypatch):
    """It runs, with `oneshot` told what it would be told, and nothing pruned."""
    import inspect

    import llmcompressor
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    import elsa_modifier

    if "compressed=True" in block or "ElsaSparseConfig" in block:
        pytest.importorskip("elsa_kernels")
    signature, told = inspect.signature(llmcompressor.oneshot), []

    def oneshot(**arguments):
        assert arguments.keys() <= signature.parameters.keys()
        told.append(arguments)

    monkeypatch.setattr(llmcompressor, "oneshot", oneshot)
    monkeypatch.chdir(workplace)
    shutil.copytree(ROOT / "examples", workplace / "examples", dirs_exist_ok=True)
    if "save_sparse(" in block:
        shutil.rmtree("out-sparse")
    for name in HUB:
        block = block.replace(f'"{name}"', '"my-model"')
    names = {
        "elsa_modifier": elsa_modifier,
        "load_sparse": elsa_modifier.load_sparse,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "texts": Dataset.from_dict({"text": ["w1 w2"]}),
    }
    exec(block.replace(".generate(...)", ""), names)
    for arguments in told:
        elsa_modifier.planning.settings.modifier_of_recipe(arguments["recipe"])
    assert len(told) == block.count("oneshot(")


@pytest.mark.parametrize("page,block", named(blocks("yaml")))
def test_yaml(page, block, workplace, monkeypatch):
    """Recipes, and pieces of them: every modifier takes its fields."""
    import textwrap

    import yaml
    from llmcompressor.modifiers.factory import ModifierFactory

    from elsa_modifier import ELSAModifier

    found = yaml.safe_load(textwrap.dedent(block))
    while len(found) == 1 and next(iter(found)).endswith(("_stage", "_modifiers")):
        [found] = found.values()
    if not any(name.endswith("Modifier") for name in found):
        found = {"ELSAModifier": {"sparsity": 0.8} | found}
    ModifierFactory.refresh()
    for name, fields in found.items():
        kind = ELSAModifier if name == "ELSAModifier" else ModifierFactory._registered_registry.get(name)
        kind = kind or ModifierFactory._main_registry[name]
        kind(**fields)
