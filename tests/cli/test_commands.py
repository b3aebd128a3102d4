import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from elsa_cli.main import app
from tests.sparse.strategies import same_bits
from tests.sparse.test_writing import OLD_FORMAT, assert_same_tensors


def run(*arguments, code=0, columns=120):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": str(columns)})
    assert result.exit_code == code, result.output
    return result


def test_pack_inspect_unpack(pruned, tmp_path):
    assert "x)" in run("pack", pruned(), tmp_path / "sparse").output
    assert_same_tensors(pruned(), tmp_path / "sparse")
    run("unpack", tmp_path / "sparse", tmp_path / "dense")
    assert_same_tensors(pruned(), tmp_path / "dense")
    table = run("inspect", tmp_path / "sparse").output
    assert "model.layers.1" in table and "total" in table and "coded" in table
    assert "model.layers.1.mlp.down_proj.weight" in run("inspect", tmp_path / "sparse", "--tensors", "--verify").output


def test_inspect_fits_a_narrow_terminal(sparse):
    assert "│ model.layers.1" in run("inspect", sparse(), columns=80).stdout


@pytest.mark.parametrize("encoding", ["coded", "bitmask"])
def test_inspect_json_agrees_between_dense_and_sparse(encoding, pruned, sparse):
    directory = sparse(encoding=encoding)
    ours = json.loads(run("inspect", directory, "--json").stdout)
    dense = json.loads(run("inspect", pruned(), "--json").stdout)
    assert ours["total"]["sparsity"] == pytest.approx(dense["total"]["sparsity"], abs=1e-6)
    assert ours["total"]["dense_bytes"] == dense["total"]["stored_bytes"]
    assert ours["total"]["stored_bytes"] == sum(row["stored_bytes"] for row in ours["tensors"])
    names = [layer["name"] for layer in ours["layers"]]
    assert names == ["lm_head", "model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"]
    layer = ours["layers"][2]
    assert layer["sparsity"] == pytest.approx(0.8, abs=0.02) and layer["ratio"] > 2


def test_inspect_of_the_old_format():
    assert json.loads(run("inspect", OLD_FORMAT, "--json", "--verify").stdout)["total"]["encodings"] == [
        "bitmask",
        "dense",
    ]


def test_errors_are_a_line(pruned, sparse, tmp_path):
    directory = sparse()
    assert "exists and is not empty" in run("pack", pruned(), directory, code=1).stderr
    run("pack", pruned(), directory, "--overwrite", "--encoding", "bitmask")
    (tmp_path / "empty").mkdir()
    output = run("inspect", tmp_path / "empty", code=1).stderr
    assert output.startswith("error: ") and "config.json: there is no such file" in output
    assert "not a sparse checkpoint" in run("unpack", pruned(), tmp_path / "out", code=1).stderr
    assert "max_shard_size is 'x'" in run("pack", pruned(), tmp_path / "out", "--max-shard-size", "x", code=1).stderr
    [file] = directory.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "checksum" in run("inspect", directory, "--verify", code=1).stderr


def test_sizes_are_those_that_were_written(pruned, tmp_path, monkeypatch):
    """Also from inside the output directory, with files of another checkpoint in it; the same as inspect's."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "other-00007-of-00009.safetensors").write_bytes(bytes(10**6))
    monkeypatch.chdir(out)
    packed = run("pack", pruned(), ".", "--overwrite").stdout
    total = json.loads(run("inspect", out, "--json").stdout)["total"]
    stored, dense = (f"{total[field] / 1e6:,.2f} MB" for field in ("stored_bytes", "dense_bytes"))
    assert packed == f".: {stored}, {dense} dense ({total['ratio']:.2f}x)\n" and total["ratio"] > 1
    assert run("unpack", out, tmp_path / "dense").stdout == f"{tmp_path / 'dense'}: {dense}\n"


def test_no_ratio_without_anything_stored(tmp_path):
    save_file({"empty": torch.empty(0, 3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert run("pack", tmp_path, tmp_path / "out").stdout == f"{tmp_path / 'out'}: 0.00 MB\n"
    assert json.loads(run("inspect", tmp_path / "out", "--json").stdout)["total"]["ratio"] is None


@pytest.mark.parametrize("option", [(), ("--bit-equal",)])
def test_signs_of_zeros_are_dropped_and_said(option, tmp_path):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(100, 100, generator=generator) * (torch.rand(100, 100, generator=generator) < 0.1)
    save_file({"v": weight, "w": weight.clone()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    signs = 2 * int((weight.signbit() & (weight == 0)).sum())
    said = run("pack", tmp_path, tmp_path / "out", *option).stdout
    assert (f"{signs:,} zeros were -0.0" in said) == (not option) and signs > 8000
    sparsity = json.loads(run("inspect", tmp_path / "out", "--json").stdout)["total"]["sparsity"]
    assert (
        sparsity
        == json.loads(run("inspect", tmp_path, "--json").stdout)["total"]["sparsity"]
        == pytest.approx(0.9, abs=0.01)
    )
    run("unpack", tmp_path / "out", tmp_path / "dense")
    unpacked = load_file(tmp_path / "dense" / "model.safetensors")["w"]
    assert torch.equal(unpacked, weight) and same_bits(unpacked, weight) == bool(option)
