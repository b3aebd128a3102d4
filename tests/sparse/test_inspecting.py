"""What is said of a checkpoint, by hand-made rows and by tensors that are counted here."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from elsa_sparse import load_sparse
from elsa_sparse.checkpoint import CONFIG_FILE
from elsa_sparse.entry import TensorEntry, sparsity_of
from elsa_sparse.inspecting import Row, by_layer, inspect, memory_bytes, summarize
from elsa_sparse.model_card import model_card
from tests.cli.test_commands import run


def row(name, weights=0, sparsity=0.0, dense=8, stored=4, encoding="coded", memory=6):
    return Row(
        name=name,
        encodings=(encoding,),
        weights=weights,
        sparsity=sparsity,
        dense_bytes=dense,
        stored_bytes=stored,
        memory_bytes=memory,
    )


def entry(shape, sparsity, dtype="bfloat16"):
    return TensorEntry(name="w", encoding="dense", dtype=dtype, shape=shape, sparsity=sparsity)


def test_every_row_of_a_dense_and_a_sparse_checkpoint(pruned, sparse):
    tensors = load_file(pruned() / "model.safetensors")
    dense, packed = ({r.name: r for r in inspect(d, progress=False)} for d in (pruned(), sparse()))
    assert dense.keys() == packed.keys() == tensors.keys()
    for name, tensor in tensors.items():
        is_matrix = tensor.dim() > 1
        for found in (dense[name], packed[name]):
            assert found.weights == (tensor.numel() if is_matrix else 0)
            assert found.sparsity == pytest.approx(float((tensor == 0).double().mean()) if is_matrix else 0, abs=1e-6)
            assert found.dense_bytes == 2 * tensor.numel()
        assert dense[name].encodings == ("dense",) and dense[name].ratio == 1
    pruned_rows = [r for r in packed.values() if r.sparsity > 0.5]
    assert len(pruned_rows) == 15 and all(r.encodings == ("coded",) and r.ratio > 2 for r in pruned_rows)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-biased", "mixtral"])
def test_memory_is_that_of_the_loaded_model(name, pruned, sparse):
    """By arithmetic, of a sparse checkpoint and a dense one."""
    directory = sparse(name)
    model = load_sparse(directory, compressed=True)
    not_saved = sum(b.nbytes for n, b in model.named_buffers() if n not in model.state_dict())
    takes = model.get_memory_footprint() - not_saved
    for where in (directory, pruned(name)):
        stated = summarize("total", inspect(where, progress=False)).memory_bytes
        # Some layouts' sizes are estimates; and two matrices of an expert become one, with one header.
        assert stated == pytest.approx(takes, rel=0.03 if name != "mixtral" else 0.08)
        assert stated < summarize("total", inspect(where, progress=False)).dense_bytes


def test_memory_of_what_stays_dense(pruned):
    sparse_head = replace(entry((512, 512), 0.9), name="lm_head.weight")
    assert memory_bytes(sparse_head) < memory_bytes(sparse_head, tied=True) == 2 * 512 * 512
    for name, shape, sparsity, dtype in (
        ("a.weight", (512, 512), 0.3, "bfloat16"),
        ("a.weight", (8, 512, 512), 0.9, "bfloat16"),
        ("a.weight", (512,), 0.9, "bfloat16"),
        ("a.weight", (512, 512), 0.9, "float64"),
        ("a.bias", (512, 512), 0.9, "bfloat16"),
    ):
        dense = replace(entry(shape, sparsity, dtype), name=name)
        assert memory_bytes(dense) == dense.dense_bytes


def test_without_the_kernels_memory_is_not_known(pruned, monkeypatch):
    monkeypatch.setitem(sys.modules, "elsa_kernels", None)
    total = summarize("total", inspect(pruned(), progress=False))
    assert total.memory_bytes is None
    shown = run("inspect", pruned()).stdout
    assert "where elsa-kernels is installed and can tell" in " ".join(shown.split())
    assert json.loads(run("inspect", pruned(), "--json").stdout)["total"]["memory_bytes"] is None


def test_rows_add_up():
    rows = [
        row("a", weights=100, sparsity=0.5, dense=200, stored=50),
        row("b", weights=300, sparsity=0.9, dense=600, stored=150, encoding="bitmask"),
        row("c", dense=40, stored=40, encoding="dense"),
    ]
    total = summarize("all", iter(rows))
    assert (total.name, total.encodings) == ("all", ("bitmask", "coded", "dense"))
    assert (total.weights, total.dense_bytes, total.stored_bytes) == (400, 840, 240)
    assert total.sparsity == pytest.approx(0.8) and total.ratio == pytest.approx(3.5) and total.memory_bytes == 18
    assert summarize("one is not known", [*rows, row("d", memory=None)]).memory_bytes is None
    nothing = summarize("nothing", [])
    assert (nothing.weights, nothing.sparsity, nothing.ratio, nothing.encodings) == (0, 0, None, ())
    assert row("d", dense=7, stored=0).ratio is None


def test_layers_are_in_the_order_of_their_numbers():
    names = ["m.layers.10.a", "m.layers.2.b.weight", "m.norm.weight", "m.layers.2.a.3.weight", "head.weight", "scale"]
    layers = by_layer([row(name, dense=2**i) for i, name in enumerate(names)])
    assert {layer.name: layer.dense_bytes for layer in layers} == {
        "head": 16,
        "m.layers.2": 2 + 8,
        "m.layers.10": 1,
        "m.norm": 4,
        "scale": 32,
    }
    order = [layer.name for layer in layers]
    assert order.index("m.layers.2") < order.index("m.layers.10")


def test_sparsity_counts_zeros():
    assert sparsity_of(torch.tensor([[0.0, 1.0], [0.0, 0.0]])) == 0.75
    assert sparsity_of(torch.ones(3)) == 0


def test_the_card_counts_what_is_pruned():
    entries = [
        entry((100, 100), 0.9),
        entry((100, 300), 0.5),
        entry((50, 50), 0.1),  # not pruned
        entry((1000,), 0.9),  # no matrix
    ]
    card = " ".join(model_card({"architectures": ["LlamaForCausalLM"]}, entries, 25_000).split())
    dense = 2 * (10_000 + 30_000 + 2_500 + 1_000) / 1e6
    assert "LlamaForCausalLM, 2 matrices of which are pruned, to 60.0% zeros on average" in card
    assert f"Stored in 0.0 MB; the same tensors dense take {dense:.1f} MB" in card
    assert "A model, 0 matrices of which are pruned, to 0.0%" in " ".join(model_card({}, [], 0).split())
    large = model_card({"architectures": []}, [entry((5000, 2000), 0.5)], 7_300_000)
    assert "Stored in 7.3 MB; the same tensors dense take 20.0 MB" in large.replace("\n", " ")
    assert large.startswith("---\nlibrary_name: transformers\ntags:\n- sparse\n")


def test_a_dense_directory_that_lacks_its_weights_is_refused(pruned, tmp_path):
    (tmp_path / CONFIG_FILE).write_text(json.dumps(json.loads((pruned() / CONFIG_FILE).read_text())))
    with pytest.raises(ValueError, match=str(tmp_path)):
        inspect(tmp_path, progress=False)
    save_file({"w": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    assert [r.sparsity for r in inspect(tmp_path, progress=False)] == [1.0]


def test_the_table_names_its_columns_and_rows(pruned):
    lines = run("inspect", pruned()).stdout.splitlines()
    header = next(line for line in lines if "layer" in line)
    assert [column.strip() for column in header.split("┃")[1:-1]] == [
        "layer",
        "stored as",
        "sparsity",
        "dense",
        "stored",
        "ratio",
        "memory",
    ]
    total = summarize("total", inspect(pruned(), progress=False))
    megabytes = f"{total.dense_bytes / 1e6:,.2f}"
    cells = [line.split("│")[1:-1] for line in lines if "│" in line]
    assert [cell.strip() for cell in cells[-1]] == [
        "total",
        "dense",
        f"{total.sparsity:.2%}",
        megabytes,
        megabytes,
        "1.00",
        f"{total.memory_bytes / 1e6:,.2f}",
    ]
    assert len(cells) == 1 + len(by_layer(inspect(pruned(), progress=False)))
    assert "tensor" in run("inspect", pruned(), "--tensors").stdout
