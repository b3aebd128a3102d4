"""No training is lost to a directory that cannot be written to."""

import os
import re
from pathlib import Path

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

import elsa_modifier.training.run
from elsa_modifier import ELSAModifier, load_sparse
from elsa_modifier.saving import extend_save_pretrained
from tests.sparse.strategies import same_bits

_FIELDS = {"sparsity": 0.8, "steps": 2, "batch_size": 2, "sequence_length": 16}


def fill(place, left):
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    (place / "filler").write_bytes(bytes(max(0, free - left)))


@pytest.fixture
def run(checkpoint, texts):
    def run(out, form, *others):
        return oneshot(
            model=str(checkpoint()),
            dataset=texts,
            recipe=[ELSAModifier(**_FIELDS, checkpoint=form), *others],
            output_dir=str(out),
        )

    return run


@pytest.fixture
def no_training(monkeypatch):
    def train(*arguments, **options):
        raise AssertionError("a step was taken")

    monkeypatch.setattr(elsa_modifier.training.run, "train", train)


def _a_file(place):
    (place / "out").write_text("mine")
    return place / "out", FileExistsError, "out is a file; name a directory"


def _below_a_file(place):
    (place / "file").write_text("mine")
    return place / "file" / "out", OSError, "output_dir cannot be written to .Not a directory.; free it, or give"


def _where_no_file_can_be_made(place):
    return Path("/proc/elsa/out"), OSError, "output_dir cannot be written to "


def _without_space(place):
    fill(place, 50_000)
    return (
        place / "out",
        OSError,
        r"has 0\.\d MB free, and the model takes at least \S+; free it, or give oneshot another",
    )


@pytest.mark.parametrize("form", ["dense", "coded", "bitmask"])
@pytest.mark.parametrize("problem", [_a_file, _below_a_file, _where_no_file_can_be_made, _without_space])
def test_a_directory_that_cannot_be_written_is_refused_before_the_first_step(problem, form, run, mounted, no_training):
    out, kind, message = problem(mounted)
    before = sorted(mounted.rglob("*"))
    with pytest.raises(kind, match=message):
        run(out, form)
    assert sorted(mounted.rglob("*")) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "recipe.yaml", "elsa_history.json"])
def test_files_in_the_way_are_refused_before_the_first_step(name, run, tmp_path, no_training):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{}")
    with pytest.raises(FileExistsError, match=rf"output_dir: {out}/{name} was not written by elsa-modifier"):
        run(out, "coded")
    assert (out / name).read_text() == "{}"


def test_what_is_tried_leaves_nothing(run, tmp_path, no_training):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(AssertionError, match="a step was taken"):
        run(tmp_path / "new" / "out", "coded")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def _rescued(message):
    return Path(re.search(r"saved, dense, in (\S+)$", message)[1])


@pytest.mark.parametrize("form", ["dense", "coded"])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_disk_that_fills_while_training_costs_nothing(form, quantized, run, mounted, tmp_path, monkeypatch):
    """The weights are in the working directory, and load; without it, in the directory for temporary files."""
    train = elsa_modifier.training.run.train

    def train_and_fill(model, *arguments, **options):
        train(model, *arguments, **options)
        fill(mounted, 20_000)

    monkeypatch.setattr(elsa_modifier.training.run, "train", train_and_fill)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights}
    others = [QuantizationModifier(config_groups={"group_0": group}, ignore=["lm_head"])] if quantized else []
    with pytest.raises(OSError, match=rf"could not be saved to {mounted}/out: .*saved, dense, in") as error:
        run(mounted / "out", form, *others)
    place = _rescued(str(error.value))
    assert place.parent == tmp_path / "here"
    assert {"model.safetensors", "config.json", "elsa_history.json", "recipe.yaml"} <= {p.name for p in place.iterdir()}
    loaded = AutoModelForCausalLM.from_pretrained(place).model.layers[0].mlp.down_proj
    if quantized:
        assert hasattr(loaded, "weight_scale")
    else:
        assert 0.75 < float((loaded.weight == 0).float().mean()) < 0.85
    if form == "coded":
        assert not (mounted / "out").exists()


def test_the_directory_for_temporary_files_comes_second(load, mounted, tmp_path, monkeypatch):
    model = load()
    extend_save_pretrained(model, history="{}", checkpoint="coded", experts={})
    fill(mounted, 20_000)
    monkeypatch.chdir(mounted)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(OSError) as error:
        model.save_pretrained(mounted / "out")
    place = _rescued(str(error.value))
    assert place.parent == tmp_path and [path.name for path in mounted.iterdir()] == ["filler"]
    loaded = AutoModelForCausalLM.from_pretrained(place).state_dict()
    assert all(same_bits(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_are_rescued_without_what_failed_to_save_them(load, tmp_path, monkeypatch):
    model = load("llama-tied")

    def fails(*arguments, **options):
        raise RuntimeError("no luck")

    model.save_pretrained = fails
    extend_save_pretrained(model, history="{}", checkpoint="dense", experts={})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="no luck") as error:
        model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(_rescued(str(error.value))).state_dict()
    assert all(same_bits(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_nowhere_to_save_is_said(load, mounted, monkeypatch):
    model = load()
    extend_save_pretrained(model, history="{}", checkpoint="coded", experts={})
    fill(mounted, 20_000)
    monkeypatch.chdir(mounted)
    monkeypatch.setattr("tempfile.tempdir", str(mounted))
    with pytest.raises(OSError, match="could not be saved anywhere else either; free some space and call"):
        model.save_pretrained(mounted / "out")
    (mounted / "filler").unlink()
    model.save_pretrained(mounted / "out")
    loaded = load_sparse(mounted / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_a_run_replaces_the_one_before_it_and_nothing_else(run, tmp_path, monkeypatch):
    """llm-compressor writes the tokenizer there after the model, and other files may lie there as well."""
    out = tmp_path / "out"
    run(out, "coded")
    (out / "notes.txt").write_text("mine")
    inode = (out / "notes.txt").stat().st_ino
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setitem(_FIELDS, "steps", 3)
    run(out, "bitmask")
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert (out / "notes.txt").stat().st_ino == inode and after["notes.txt"] == b"mine"
    assert {name for name in before.keys() & after.keys() if before[name] != after[name]} == {
        "config.json",
        "elsa_history.json",
        "recipe.yaml",
    }
    assert [name.endswith(".safetensors") for name in before.keys() - after.keys()] == [True]
    assert len(before) == len(after)
    load_sparse(out)
