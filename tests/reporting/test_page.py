"""The page of a report: complete in itself, honest about what is missing, readable."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from elsa_modifier.reporting.command import run
from elsa_modifier.reporting.drawing import SERIES
from elsa_modifier.reporting.words import often
from tests.cli.test_commands import run as command
from tests.reporting.conftest import BENCH, EVALUATION

RUN_FIGURES = {"loss", "residual", "penalty", "learning_rate", "mask_change", "sparsity", "layers", "sizes"}


class Page(HTMLParser):
    """Tags with their attributes, ids, and the text outside of styles."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.said = [], [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.said).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.said.append(data)

    def values(self, name):
        return [attributes[name] for _, attributes in self.tags if name in attributes]


def report(directory, *others, **options):
    written = run(directory, others, progress=False, **options)
    return written, Page(written.page.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full(runs, tmp_path_factory):
    """The report of a directory where everything has been measured; and the directory."""
    directory = tmp_path_factory.mktemp("full") / "out"
    shutil.copytree(runs / "out-0.8", directory)
    EVALUATION.write(directory)
    (directory / "elsa_bench.json").write_text(json.dumps(BENCH))
    return *report(directory), directory


def test_everything_is_in_the_page(full):
    written, page, _ = full
    assert not page.open
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form"})
    fetched = [v for name in ("src", "href", "xlink:href", "srcset", "action") for v in page.values(name)]
    assert [value for value in fetched if not value.startswith(("#", "data:"))] == []
    styles = written.page.read_text()
    assert re.findall(r"@import|url\((?!#|data:)", styles) == []
    assert [name for tag, attributes in page.tags for name in attributes if name.startswith("on")] == []
    ids = page.values("id")
    assert len(ids) == len(set(ids)) > 100
    references = {value[1:] for value in page.values("xlink:href") if value.startswith("#")}
    references |= set(re.findall(r"url\(#([^)]+)\)", styles))
    assert references and references <= set(ids)
    assert {file.stem for file in written.figures} >= RUN_FIGURES | {"speed", "zero_shot"}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written.figures)
    assert sum(tag == "svg" for tag, _ in page.tags) == len(written.figures)


def test_it_says_what_the_files_say(full):
    _, page, directory = full
    for said in (
        "80.0% zeros in 14 matrices of LlamaForCausalLM",
        "81.90 perplexity on WikiText-2, 20.40 dense",
        "WikiText-2 20.40 81.90 4.01",
        "the same next token most likely as the dense model in 54.3% of places; KL divergence 1.25",
        "arc_easy, acc,none 0.410 ± 0.010",
        "Of each task the first 200 questions",
        "decode, 1 at a time 40.0 80.0 2.00 1.90 - 2.20",
        "on 1 thread, kernels avx2; medians of 2 rounds.",
        "steps 12, ",
        "ELSAModifier:",
        "vllm serve",
    ):
        assert said in page.text
    summary = json.loads((directory / "elsa_prune.json").read_text())
    assert summary["data"] in page.text and f"gone over {often(summary['epochs'])}" in page.text
    assert page.text.count("Not here:") == 1 + ("in memory, compressed" not in page.text)  # other sparsities


def test_how_often():
    assert [often(times) for times in (0.125, 0.9999, 1, 1.5, 12)] == [
        "0.125 times",
        "once",
        "once",
        "1.5 times",
        "12 times",
    ]


def test_what_is_missing_is_left_out_and_named(pruned_run):
    _, page = report(pruned_run)
    held_out = json.loads((pruned_run / "elsa_prune.json").read_text())["held_out_tokens"]
    for said in (
        f"elsa eval {pruned_run} --dense",
        f"elsa bench {pruned_run} --json >",
        f"Measured on {held_out} tokens",
    ):
        assert said in page.text
    for name in ("elsa_history.json", "elsa_prune.json", "recipe.yaml"):
        (pruned_run / name).unlink()
    written, page = report(pruned_run)
    assert "elsa prune MODEL --recipe" in page.text and "loss, residual and mask over the run" in page.text
    assert {file.stem for file in written.figures} == {"layers", "budget", "sizes"}


def test_a_run_that_is_under_way(pruned_run):
    steps = json.loads((pruned_run / "elsa_history.json").read_text())["steps"]
    (pruned_run / "elsa_history.json").unlink()
    training = pruned_run.with_name("out-0.8-training")
    training.mkdir()
    (training / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps[:4]))
    _, page = report(pruned_run)
    assert "steps 4, " in page.text
    (training / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    assert "metrics.jsonl: line 2 is not JSON" in command("report", pruned_run, code=1).stderr


@pytest.mark.parametrize("given", ["each", "parent"])
def test_several(given, pruned_run):
    """By name, or as the directory that holds them; perplexity of those texts that both were measured on."""
    other = pruned_run.with_name("out-0.5")
    written, page = report(*((pruned_run, other) if given == "each" else (pruned_run.parent,)), card=False)
    [caption] = re.findall(r"text held out: ([\d,.]+) at 5\d%, ([\d,.]+) at 80%", page.text)
    after = [json.loads((d / "elsa_prune.json").read_text())["perplexity_after"] for d in (other, pruned_run)]
    assert [float(value.replace(",", "")) for value in caption] == pytest.approx(after, rel=1e-3)
    assert "perplexity" in {file.stem for file in written.figures}
    assert f"<h1>out-{0.8 if given == 'each' else 0.5}</h1>" in written.page.read_text()


def test_names_are_text(pruned_run):
    name = '<script src="https://x">$x^2$</script>'
    EVALUATION.write(pruned_run)
    file = pruned_run / "elsa_eval.json"
    file.write_text(file.read_text().replace("arc_easy", name.replace('"', '\\"')))
    _, page = report(pruned_run)
    assert name[:20] in page.text and not any(tag == "script" for tag, _ in page.tags)


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("elsa_history.json", '{"steps": 3}', "steps is no list"),
        ("elsa_history.json", '{"steps": [{"loss": 1}]}', "record 1 of steps"),
        ("elsa_prune.json", "{}", "sparsity: Field required. `elsa prune` writes this file"),
        ("elsa_bench.json", '{"speeds": [1]}', "is not what `elsa bench DIR --json` prints"),
        ("elsa_eval.json", "{", "write it again with `elsa eval`"),
    ],
)
def test_errors_are_a_line(name, content, message, pruned_run):
    (pruned_run / name).write_text(content)
    said = command("report", pruned_run, code=1).stderr
    assert said.startswith("error: ") and message in said.replace("\n", "")


def test_the_command(pruned_run, tmp_path):
    said = command("report", pruned_run, "--out", tmp_path / "shown" / "here").stdout
    assert str(tmp_path / "shown" / "here" / "index.html") in said and str(pruned_run / "README.md") in said
    (pruned_run / "README.md").write_text("# Mine")
    assert "stays as it is" in command("report", pruned_run).stdout
    assert (pruned_run / "README.md").read_text() == "# Mine"
    assert (tmp_path / "out-0.8-report" / "loss.png").exists()


def test_text_can_be_read(full):
    """12 px and more on a phone, contrast 4.5:1 and more, on the page and on its tiles, by day and by night."""
    html = full[0].page.read_text()
    figures = re.findall(r"<svg .*?</svg>", html, re.DOTALL)
    for figure in figures:
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', figure)[1])
        sizes = [float(size) for size in re.findall(r"font(?:-size)?: (?:\w+ )*([\d.]+)px", figure)]
        # Points in the file; 350 px wide on a phone of 390.
        assert sizes and min(sizes) * 350 / width >= 12
    themes = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    light = dict(re.findall(r"--([\w-]+): (#\w{6})", themes[0]))
    dark = light | dict(re.findall(r"--([\w-]+): (#\w{6})", themes[1]))
    assert [light[f"series-{i + 1}"] for i in range(len(SERIES))] == list(SERIES)
    for theme in (light, dark):
        for paper in ("paper", "card"):
            assert min(contrast(theme[name], theme[paper]) for name in ("ink", "soft", "link")) >= 4.5
        # Of lines; the fourth, which is seldom needed, is a little lighter by day.
        assert min(contrast(theme[f"series-{i}"], theme["paper"]) for i in (1, 2, 3)) >= 3
    assert not re.search(r"font-size: \.(?:[0-6]|7[0-4])\d*rem", html)


def contrast(one, other):
    """WCAG 2."""

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)
