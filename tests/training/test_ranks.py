"""Several processes against one: the same recipe under torchrun, on CPU ranks, and its twin in this process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from elsa_modifier.training.ranks import RankFailed, Ranks, _telling_failures
from tests.training.ranks_worker import run, save_models

ROOT = Path(__file__).resolve().parents[2]
ON_TWO = [
    "budget",
    "budget ddp",
    "coupled",
    "2:4",
    "chunks",
    "accumulation",
    "own loader",
    "experts",
    "frozen",
    "autocast",
    "elsa-l",
    "elsa-l ddp",
    "released",
    "own group",
    "torchao",
]
ON_FOUR = ["uneven", "uneven own", "empty"]
# In bf16 a gradient is rounded as soon as it is found, so the twin finds it in as many parts as there are ranks.
IN_PARTS = dict(batch_size=2, gradient_accumulation_steps=2)
TWINS = {"autocast": IN_PARTS, "elsa-l": IN_PARTS, "elsa-l ddp": IN_PARTS}
# Gradients that are released cannot be found in parts; not releasing them changes no bit.
TWINS["released"] = IN_PARTS | dict(gradient_release=False)


def torchrun(count, *arguments, seconds=600):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]
    command += ["-m", "tests.training.ranks_worker", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=seconds)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    place = tmp_path_factory.mktemp("ranks")
    save_models(place)
    return place


@pytest.fixture(scope="module")
def found(directory):
    """What ranks have made of each case: by their number and its name; and what they printed."""
    results = {}
    for count, names in ((2, ON_TWO), (4, ON_FOUR)):
        file = directory / f"{count}.pt"
        done = torchrun(count, directory, file, *names)
        assert done.returncode == 0, done.stderr[-3000:]
        others = [torch.load(f"{file}.{rank}") for rank in range(1, count)]
        for name, result in torch.load(file).items():
            results[count, name] = result | {"others": [of[name] for of in others], "printed": done}
    return results


@pytest.fixture(scope="module")
def twin(directory):
    made = {}

    def twin(name):
        if name not in made:
            made[name] = run(name, directory, **TWINS.get(name, {}))
        return made[name]

    return twin


def flat(weights):
    return torch.cat([weight.flatten().double() for weight in weights.values()])


# Where noise, or a cast to bf16, makes much of little, equality is not what there is to show.
LOOSE = {"torchao", "autocast"}
CASES = [(2, name) for name in ON_TWO if name not in LOOSE] + [(4, name) for name in ON_FOUR]


@pytest.mark.parametrize("count,name", CASES)
def test_ranks_change_nothing_but_the_order_of_sums(count, name, found, twin):
    several, one = found[count, name], twin(name)
    assert several["masks"].keys() == one["masks"].keys()
    bits = sum(int((several["masks"][layer] != mask).sum()) for layer, mask in one["masks"].items())
    # None here; another machine's sums may meet a tie, which brings a few more.
    assert bits <= 1e-3 * sum(mask.numel() for mask in one["masks"].values())
    if not bits:
        weights, expected = flat(several["weights"]), flat(one["weights"])
        assert float((weights - expected).norm() / expected.norm()) < 1e-5
    assert several["perplexity"] == pytest.approx(one["perplexity"], rel=5e-5)
    for ours, theirs in zip(several["history"], one["history"], strict=True):
        for key in ("step", "tokens", "penalty", "learning_rate", "sparsity", "mask_entered"):
            if key != "mask_entered" or not bits:
                assert ours.get(key) == theirs.get(key), (ours["step"], key)
        # At the teacher the divergence is 0, and what is measured is rounding.
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-3, abs=2e-4)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["elsa-l", "elsa-l ddp", "released"])
def test_rounding_is_the_same_whoever_holds_the_rows(name, found, twin):
    """bf16 weights, moments in 8 bits, a state in int8, all rounded by noise: not a bit differs."""
    for key, weight in twin(name)["weights"].items():
        assert torch.equal(found[2, name]["weights"][key], weight), key


def test_every_rank_has_the_trained_model(found):
    for (_, name), result in found.items():
        for other in result["others"]:
            for key, weight in result["weights"].items():
                if name == "empty":
                    assert not other[key].any() or weight.numel() == 1, key
                else:
                    assert torch.equal(other[key], weight), (name, key)


@pytest.mark.parametrize("count,name", [(4, "empty"), (2, "own group")])
def test_a_model_that_only_the_first_rank_loaded_is_saved(count, name, found):
    result = found[count, name]
    assert (Path(result["saved"]) / "elsa_history.json").exists()
    saved = AutoModelForCausalLM.from_pretrained(result["saved"]).state_dict()
    for key, weight in result["weights"].items():
        assert torch.equal(saved[key], weight), key


def test_frozen_parameters_stay(found, directory):
    before = AutoModelForCausalLM.from_pretrained(directory / "llama").state_dict()["model.embed_tokens.weight"]
    assert torch.equal(found[2, "frozen"]["weights"]["model.embed_tokens.weight"], before)


@pytest.mark.parametrize("count,name", [case for case in [*CASES, (2, "torchao")] if case[1] != "released"])
def test_admm_sends_nothing_but_counts_in_projections(count, name, found):
    """And those are fewer bytes than one all-reduce of the gradients, in a handful of sums for all weights together."""
    result = found[count, name]
    for sent, record in zip(result["sent"], result["history"], strict=True):
        if "residual" not in record or name.endswith("ddp"):
            # While a weight waits for its first gradient, ranks ask each other whether there is one.
            waiting = name == "experts"
            assert len(sent) <= waiting and sum(size for _, size in sent) <= 8 * 28 * waiting, record["step"]
        else:
            assert {operation for operation, _ in sent} == {"allreduce_.default"}
            assert 2 <= len(sent) <= 25
            assert sum(size for _, size in sent) < 4 * result["entries"]


def test_autocast_makes_units_in_the_last_place_larger(found, twin):
    """Weights that differ in an fp32's last place may be cast to neighbouring numbers in bf16, and so on from there."""
    several, one = found[2, "autocast"], twin("autocast")
    bits = sum(int((several["masks"][layer] != mask).sum()) for layer, mask in one["masks"].items())
    assert bits <= 0.01 * sum(mask.numel() for mask in one["masks"].values())
    assert several["perplexity"] == pytest.approx(one["perplexity"], rel=0.01)
    # Nothing has been made of anything yet.
    assert several["history"][0]["grad_norm"] == pytest.approx(one["history"][0]["grad_norm"], rel=1e-5)


def test_torchao_rounds_by_noise_of_its_own(found, twin):
    """So only what does not hang on it is the same."""
    several, one = found[2, "torchao"], twin("torchao")
    for key in several["weights"]:
        assert several["weights"][key].isfinite().all()
    kept = [sum(int(mask.sum()) for mask in of["masks"].values()) for of in (several, one)]
    assert kept[0] == kept[1]
    assert several["perplexity"] == pytest.approx(one["perplexity"], rel=0.05)


def test_the_first_rank_speaks_for_all(found):
    printed = found[2, "budget"]["printed"]
    text = printed.stdout + printed.stderr
    # A bar begins with a line that says no more than this.
    assert len(re.findall(r"ELSA: +0%\| +\| 0/12 \[00:00<\?, \?step/s\]", text)) == len(ON_TWO) - 1
    assert text.count("Training text:") == len([name for name in ON_TWO if name != "own loader"])


def test_a_rank_that_fails_ends_the_run(directory):
    done = torchrun(2, directory, directory / "none.pt", "fails", seconds=120)
    assert done.returncode
    assert "OSError: rank 1 has lost its disk" in done.stderr
    # The other one, waiting for it, says why it goes.
    assert "another rank failed, and with it the run: rank 1: OSError: rank 1 has lost its disk" in done.stderr


def test_a_rank_that_is_gone_left_no_word(monkeypatch):
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", dist.HashStore)
    closed = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:4242")
    ranks = Ranks(0, 2, torch.device("cpu"), None)
    with pytest.raises(RankFailed, match=r"gone without a word.*Connection closed by peer"), _telling_failures(ranks):
        raise closed
    with pytest.raises(RuntimeError, match=r"^mine$") as own, _telling_failures(ranks):
        raise RuntimeError("mine")
    assert type(own.value) is RuntimeError
