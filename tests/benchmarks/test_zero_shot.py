from datasets import Dataset

from benchmarks.zero_shot import TASKS, page, with_labels


def test_boolq_gets_the_number_that_its_task_looks_for_and_no_other_set_does():
    assert with_labels(Dataset.from_dict({"answer": [True, False]}))["label"] == [1, 0]
    assert with_labels(Dataset.from_dict({"answer": ["1", "2"]})).column_names == ["answer"]


def test_the_page_has_the_last_row_of_each_task_and_a_mean_of_all_of_them():
    def row(directory, task, accuracy):
        return {"directory": directory, "limit": 500, "task": task, "accuracy": accuracy, "error": 0.02}

    rows = [row("dense", task, 0.5) for task in TASKS] + [row("dense", "rte", 0.57), row("sparse", "rte", 0.4)]
    dense, sparse = page(rows)[-2:]
    assert dense == "| dense | 500 |" + " 50.0 ± 2.0 |" * 5 + " 57.0 ± 2.0 | 50.0 ± 2.0 | 51.0 ± 0.8 |"
    assert sparse == "| sparse | 500 |  |  |  |  |  | 40.0 ± 2.0 |  |  |"
