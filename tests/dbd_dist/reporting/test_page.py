"""The page from made-up run folders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.errors import UserError
from dbd_dist import cli
from dbd_dist.reporting import embedding, page
from dbd_dist.reporting.page import write_report

VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Collects elements, attributes and text; fails on elements that are not closed in order."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch):
    """t-SNE has its own tests; here it only costs time."""
    monkeypatch.setattr(embedding, "embed", lambda features: features[:, :2])


@pytest.fixture
def both(make_run: Callable[..., Path], poisoned) -> list[Path]:
    return [make_run(poisoned, method="none", clean_acc=0.983, asr=0.994), make_run(poisoned, asr=0.0)]


_pages: list[str] = []


@pytest.fixture
def text(both) -> str:
    """The page on both runs, drawn once for all tests that only look at it."""
    if not _pages:
        _pages.append(page.render(both))
    return _pages[0]


def test_whole_page(text):
    seen = Checker(text)
    assert "DBD brings it to 0.0 % for 1.1 points of clean accuracy" in seen.text
    assert "60 of 120 images keep their labels, among them 0 of 12 poisoned ones." in seen.text
    assert "12 of these 24 are poisoned." in seen.text
    assert "Nothing to show" not in seen.text
    assert seen.named("html")[0]["lang"] == "en"
    assert [tag for tag, _ in seen.tags if tag == "h1"] == ["h1"]
    assert len(seen.named("img")) == 24
    drawings = [a for a in seen.named("svg") if a.get("aria-hidden") != "true"]
    assert len(drawings) == 11  # 4 losses, 3 curves, 2 histograms, 2 t-SNE
    assert all(a.get("role") == "img" and a.get("aria-label") for a in drawings)
    assert all(a.get("alt") for a in seen.named("img"))
    ids = [a["id"] for _, a in seen.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_nothing_is_loaded_and_nothing_runs(text):
    assert "http://" not in text
    assert "https://" not in text
    seen = Checker(text)
    names = {tag for tag, _ in seen.tags}
    assert names.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form"})
    for tag, attributes in seen.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href"):
                assert value is not None
                assert value.startswith(("data:image/png;base64,", "#"))
    assert not re.search(r"@import|url\((?!#)", text)
    assert any("default-src 'none'" in str(a.get("content")) for a in seen.named("meta"))


def test_hostile_names_are_shown_as_text(text):
    assert "<script" not in text
    assert "<b>CPU" not in text
    assert "\u202e" not in text
    seen = Checker(text)
    assert "<script>b" in seen.text
    assert "star $x$" in seen.text
    assert "train/<script>b/<script>b-" in seen.text
    assert "a <b>CPU</b>" in seen.text


def test_image_pixels_are_inlined_exactly(poisoned, make_run):
    import base64
    import io

    from PIL import Image

    from data_prep.beton import read_beton
    from dbd_dist.reporting import gallery, runs

    run = runs.load_run(make_run(poisoned))
    assert run.split is not None
    images, _, _ = read_beton(poisoned.train)
    index = gallery.suspects(run.split)
    first = Checker(page.render([run.folder])).named("img")[0]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(str(first["src"]).split(",")[1]))))
    assert np.array_equal(pixels, images[index[0]])
    assert str(first["alt"]).startswith(f"Training image {index[0]}, given label")
    large = Image.open(io.BytesIO(base64.b64decode(gallery.png_uri(np.zeros((224, 224, 3), np.uint8)).split(",")[1])))
    assert large.size == (128, 128)


def test_several_seeds(poisoned, make_run):
    folders = [make_run(poisoned, seed=seed, clean_acc=acc) for seed, acc in ((1, 0.9), (0, 0.94))]
    seen = Checker(page.render(folders))
    assert "92.00 ± 2.83" in seen.text
    assert "One run stands for its row (DBD: seed 0 of 2 runs)." in seen.text


def test_without_defence_says_why(poisoned, make_run):
    seen = Checker(page.render([make_run(poisoned, method="none", asr=0.99)]))
    assert seen.text.count("a run without defence ranks no samples") == 2
    assert "Supervised features (No defence)" in seen.text
    assert "Name a run with the defence too" in seen.text


def test_data_of_unknown_origin(untrusted, make_run):
    seen = Checker(page.render([make_run(untrusted, asr=None)]))
    assert "It is not known which of these images are poisoned" in seen.text
    assert "It is not known which of them are poisoned" in seen.text
    assert "not shown separately: the data set came without truth" in seen.text
    assert len(seen.named("img")) == 24
    assert "attack success (ASR)" not in seen.text
    assert "true label" not in "".join(str(a.get("alt")) for a in seen.named("img"))


def test_data_that_is_gone(poisoned, make_run):
    folder = make_run(poisoned)
    description = (folder / "run.json").read_text()
    (folder / "run.json").write_text(description.replace(str(poisoned.folder), "/nowhere"))
    seen = Checker(page.render([folder]))
    assert "The images cannot be shown: the data set's folder was not found." in seen.text
    assert "not shown separately: the data set's folder was not found" in seen.text


def test_unfinished_run(poisoned, make_run):
    seen = Checker(page.render([make_run(poisoned, finished=False)]))
    assert "There is no result yet (dbd-s0: not finished: epoch 5 of 5 in simclr)." in seen.text
    assert seen.text.count("the run has no result yet") == 3  # histograms, features, suspects
    assert "No run has finished" in seen.text


def test_run_without_optional_files(poisoned, make_run):
    folder = make_run(poisoned)
    for name in ("features.npz", "split.parquet", "metrics.jsonl"):
        (folder / name).unlink()
    seen = Checker(page.render([folder]))
    assert seen.text.count("the run did not write it") == 3
    assert "No epoch has been reported yet." in seen.text


@pytest.mark.parametrize("name", ["run.json", "result.json", "metrics.jsonl", "split.parquet", "features.npz"])
def test_damaged_file_is_named_and_nothing_written(name, poisoned, make_run, tmp_path):
    folder = make_run(poisoned)
    (folder / name).write_bytes(b"PK\x03\x04 torn\n{}\n")
    out = tmp_path / "report.html"
    with pytest.raises(UserError, match=re.escape(name)):
        write_report([folder], out)
    assert not out.exists()


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    page.write_file(target, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match="No space left"):
        page.write_file(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(UserError, match="is a folder"):
        page.write_file(tmp_path, "text")
    with pytest.raises(UserError, match="cannot be written"):
        page.write_file(target / "below a file", "text")


def test_no_folders(tmp_path):
    with pytest.raises(UserError, match="no run folder is named"):
        write_report([], tmp_path / "report.html")


def test_command(both, tmp_path, capsys):
    assert cli.main(["report", *map(str, both)]) == 0
    out = tmp_path / "runs" / "report.html"
    assert sorted(path.name for path in out.parent.iterdir()) == ["dbd-s0", "none-s0", "report.html"]
    assert capsys.readouterr().out.strip() == str(out)
    assert out.read_text().startswith("<!DOCTYPE html>")
    assert cli.main(["report", *map(str, both), "--format", "md"]) == 0
    assert "| No defence | 1 | 98.30 | 99.40 |" in capsys.readouterr().out


def test_command_mistakes(poisoned, make_run, tmp_path, capsys):
    unfinished = make_run(poisoned, "unfinished", finished=False)
    empty = tmp_path / "empty"
    empty.mkdir()
    before = sorted(tmp_path.rglob("*"))
    for arguments, words in (
        ([], "no run folder is named"),
        ([str(tmp_path / "nowhere")], "no such run folder"),
        ([str(empty)], "not a run folder"),
        ([str(unfinished)], "there is no result.json"),
    ):
        assert cli.main(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert words in error
    assert sorted(tmp_path.rglob("*")) == before


def test_no_template_opts_out_of_escaping():
    for path in Path(page.__file__).with_name("templates").glob("*.html"):
        assert not re.search(r"\|\s*safe|Markup|autoescape", path.read_text()), path


def test_text_is_printable_escaped_and_short():
    template = page.environment().from_string("<b title='{{ text }}'>{{ text }}</b>")
    assert template.render(text="a\x1b[31m<i>'\u202e") == (
        "<b title='a\ufffd[31m&lt;i&gt;&#39;\ufffd'>a\ufffd[31m&lt;i&gt;&#39;\ufffd</b>"
    )
    assert len(template.render(text="x" * 100_000)) < 3 * page.LONGEST


def test_a_run_of_a_method_that_is_not_installed(poisoned, make_run):
    """Its stages and rows come from its files: in the order in which they ran, under their own names."""
    folder = make_run(poisoned, method="abl")
    metrics = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(metrics.replace("simclr", "isolate").replace("mixmatch", "unlearn"))
    (folder / "split.parquet").unlink()
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"kept": None, "kept_poisoned": None}))
    seen = Checker(page.render([folder]))
    assert re.findall(r"isolate|Head warm-up|unlearn", seen.text)[:3] == ["isolate", "Head warm-up", "unlearn"]
    assert "Nothing to show: the method ranks no samples." in seen.text
    assert "abl: poisoned images that the filter keeps" in seen.text
    assert "Self-supervised features (abl)" in seen.text
    assert "Name a run without defence too" in seen.text


def test_figures_that_no_training_gives_are_left_out_and_counted(poisoned, make_run):
    folder = make_run(poisoned)
    rows = [
        {"stage": "simclr", "epoch": 1, "loss": 10**400},
        {"stage": "simclr", "epoch": 10**400, "loss": 1.0},
        {"stage": "simclr", "epoch": 2, "loss": 1e308},
        {"stage": "simclr", "epoch": 3, "loss": -1e308},
        {"stage": "simclr", "epoch": 4, "loss": -3e38},
        {"stage": "simclr", "epoch": 5, "loss": 3e38},
        {"stage": "mixmatch", "epoch": 1, "loss": float("nan"), "kept_poisoned": 10**400, "poisoned": 1},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = Checker(page.render([folder]))
    assert "dbd-s0: 5 lines of metrics.jsonl are left out" in seen.text
    labels = [str(a.get("aria-label")) for a in seen.named("svg")]
    assert any("the loss goes from -3e+38 to 3e+38 over 2 epochs" in label for label in labels)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clean_acc", 10**400),
        ("asr", -(10**400)),
        ("kept", 10**400),
        ("seed", 10**400),
        ("seconds", {"simclr": 10**400}),
        ("seconds", {"simclr": 1e308}),
        ("per_class_acc", [10**400]),
        ("clean_acc", True),
    ],
)
def test_result_beyond_any_is_one_message(field, value, poisoned, make_run):
    folder = make_run(poisoned)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {field: value}))
    with pytest.raises(UserError, match=f"field {field} is "):
        page.render([folder])


@pytest.mark.parametrize("value", [1e308, -1e308, 1e39, float("nan")])
def test_arrays_beyond_float32_are_one_message(value, poisoned, make_run):
    folder = make_run(poisoned)
    table = pq.read_table(folder / "split.parquet")
    loss = table.column("loss").to_numpy().astype(np.float64).copy()
    loss[3] = value
    pq.write_table(table.set_column(1, "loss", pa.array(loss)), folder / "split.parquet")
    with pytest.raises(UserError, match="not finite float32"):
        page.render([folder])
    (folder / "split.parquet").unlink()
    features = np.ones((20, 3))
    features[3, 1] = value
    np.savez(folder / "features.npz", index=np.arange(20), features=features, kind=np.array("ssl"))
    with pytest.raises(UserError, match="not finite float32"):
        page.render([folder])
