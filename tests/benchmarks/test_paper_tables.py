"""The paper's layout, from rows that other benchmarks have made."""

from benchmarks.paper_tables import page
from benchmarks.zero_shot import TASKS


def test_perplexity_and_accuracy_of_a_method_are_on_one_line():
    def row(method, sparsity, c4, **more):
        return (
            {"model": "smollm2", "method": method, "sparsity": sparsity, "lr": None, "seed": 0, "C4": c4}
            | more
            | {"Wikipedia": 2 * c4}
        )

    compared = [row("dense", 0.0, 35.0), row("ELSA", 0.9, 250.0), row("SparseGPT", 0.9, 900.0)]
    compared += [row("ELSA", 0.9, 100.0, steps=256), row("ELSA", 0.5, 1.0) | {"model": "gemma3"}]
    questions = [
        {"directory": "elsa-90-64", "limit": limit, "task": task, "accuracy": 0.5 + limit / 1000, "error": 0.02}
        for task in TASKS
        for limit in (100, 50)
    ]
    questions.append({"directory": "dense", "limit": 100, "task": "boolq", "accuracy": 0.25, "error": 0.01})
    found = [line for line in page(compared, questions, dense_directory="dense") if line.startswith("| ")]
    assert len(found) == 4 and {line.count("|") for line in found} == {13}
    assert found[1].startswith("| 0% | dense | 70.0 | 35.0 |  |  | 25.0 ± 1.0 |") and found[1].endswith(" |  |")
    assert found[2].startswith("| 90% | SparseGPT | 1,800.0 | 900.0 |  |")
    assert found[3] == "| 90% | ELSA | 500.0 | 250.0 |" + " 60.0 ± 2.0 |" * 7 + " 60.0 ± 0.8 |"
