"""Tables in four formats, against numbers worked out by hand."""

from __future__ import annotations

import csv
import io
import shutil

import pytest

from data_prep.errors import UserError
from dbd_dist.reproduce import claims, formats
from dbd_dist.reproduce.collect import missing, read


@pytest.fixture
def made(write_table):
    """DBD over two seeds: accuracies of 92 and 94 %, kept 2 and 4 of 40."""
    results = {
        ("badnets", "none", 0): {"clean_acc": 0.95, "asr": 1.0},
        ("badnets", "none", 1): {"clean_acc": 0.95, "asr": 0.9},
        ("badnets", "dbd", 0): {"clean_acc": 0.92, "asr": 0.01, "kept_poisoned": 2, "seconds": {"a": 40.0}},
        ("badnets", "dbd", 1): {"clean_acc": 0.94, "asr": 0.02, "kept_poisoned": 4, "seconds": {"a": 50.0}},
        ("badnets", "nad", 0): {"clean_acc": 0.9, "asr": 0.05, "commit": "def456"},
    }
    return read(write_table(results))


def test_cells(made):
    head, body = formats.cells(made)
    # (94 - 92) / sqrt(2) = 1.41
    assert dict(zip(head, body[1])) == {
        "attack": "Badnets", "method": "DBD", "n": "2", "clean acc. %": "93.00 ± 1.41", "ASR %": "1.50 ± 0.71",
        "article: acc. / ASR %": "92.50 / 0.88", "poisoned kept": "3 ± 1.41 of 40", "time": "45 s ± 7.1 s",
    }  # fmt: skip
    assert body[0][3:6] == ["95.00 ± 0.00", "95.00 ± 7.07", "95.13 / 100"]
    assert body[2][1:5] == ["NAD †", "1", "90.00", "5.00"]
    assert missing(made) == ["Badnets, NAD (1 of 2)"]


def test_values_that_lie_far_apart_are_listed(write_table):
    results = {("badnets", "dbd", seed): {"asr": asr} for seed, asr in enumerate((0.9, 0.1, 0.15))}
    head, body = formats.cells(read(write_table(results)))
    assert body[0][head.index("ASR %")] == "90.0, 10.0, 15.0"


def test_several_devices_are_told_apart(write_table):
    devices = {("badnets", "dbd", 0): {"device": "a CPU, 2 cores"}, ("badnets", "dbd", 1): {"device": "a GPU"}}
    text = formats.as_markdown(read(write_table(devices)))
    assert "Hardware: a CPU, 2 cores, fp32; a GPU, fp32." in text


def test_the_cost_of_a_table_counts_shared_stages_once(write_table):
    def case(name: str, **more: str) -> dict:
        return {
            (name, "none", 0): {"seconds": {"supervised": 5.0}},
            (name, "ssl-ce", 0): {"seconds": {"simclr": 60.0, "warmup": 10.0}, "reused_stages": [], **more},
            (name, "dbd", 0): {
                "seconds": {"simclr": 60.0, "warmup": 5.0, "mixmatch": 35.0}, "reused_stages": ["simclr"]
            },
        }  # fmt: skip

    # 5 + 70 + 40 s against 5 + 70 + 100, twice, and 30 s of a case that DBD was not run on
    results = case("badnets") | case("wanet", device="a faster one")
    text = formats.as_markdown(read(write_table(results | {("blended", "none", 0): {"seconds": {"supervised": 30.0}}})))
    assert "all runs took 4 min 20 s, without sharing it would be 6 min 20 s; all methods" in text
    assert "all methods take 1.15 times as long as DBD alone" in text  # under BadNets, where one machine ran them


def test_the_cost_against_dbd_is_the_median_over_attacks_and_seeds(write_table):
    results = {}
    for case, seed, other in (("badnets", 0, 5.0), ("badnets", 1, 10.0), ("wanet", 0, 90.0), ("wanet", 1, 20.0)):
        results[(case, "dbd", seed)] = {"seconds": {"simclr": 40.0, "mixmatch": 10.0}}
        results[(case, "ssl-ce", seed)] = {
            "seconds": {"simclr": 40.0, "warmup": other}, "reused_stages": ["simclr"],
        }  # fmt: skip
    text = formats.as_markdown(read(write_table(results)))
    # 1.1, 1.2, 2.8 (beside other work) and 1.4
    assert "all methods take 1.30 times as long as DBD alone (median of 4, 1.10 to 2.80)." in text


def test_methods_of_several_machines_are_not_held_against_dbd(write_table):
    results = {
        ("badnets", "dbd", 0): {"seconds": {"simclr": 60.0}},
        ("badnets", "ssl-ce", 0): {"seconds": {"simclr": 60.0}, "reused_stages": ["simclr"], "device": "another"},
    }
    assert "all runs took 1 min, without sharing it would be 2 min." in formats.as_markdown(read(write_table(results)))


def test_a_stage_that_no_run_of_the_table_trained_counts_once(write_table):
    found = {"seconds": {"simclr": 60.0, "warmup": 1.0}, "reused_stages": ["simclr"]}
    results = {("badnets", method, 0): found for method in ("ssl-ce", "ssl-sce")}
    assert "all runs took 1 min 2 s, without sharing it would be 2 min 2 s." in formats.as_markdown(
        read(write_table(results))
    )


def test_what_has_no_result_has_no_row_and_is_named(write_table):
    cases = [{"key": name, "name": name, "title": name.title(), "own": False} for name in ("badnets", "blended")]
    made = read(write_table({("badnets", "dbd", 0): {}}, cases=cases))
    _, body = formats.cells(made)
    assert [line[0] for line in body] == ["Badnets"]
    assert "Without a result: Blended, dbd (0 of 1)." in formats.as_markdown(made)


def test_a_table_that_shares_nothing_says_nothing_of_it(made):
    assert "sharing" not in formats.as_markdown(made)


def test_notes_and_commands(made):
    text = formats.as_markdown(made)
    for part in (
        "† needs clean images", "5 % of the training images are set aside", "Hardware: a CPU, 2 cores, fp32",
        "Commit: abc123, def456", "CIFAR-10 with ResNet-18", "Without a result: Badnets, NAD (1 of 2)",
    ):  # fmt: skip
        assert part in text
    block = text.split("```")[1].splitlines()
    assert block[1] == "dbd reproduce main"
    assert block.count("dbd prepare badnets") == 1
    assert [line for line in block if line.startswith("dbd train")] == [
        f"dbd train badnets {method} {seed}" for method, seeds in (("none", 2), ("dbd", 2), ("nad", 1))
        for seed in range(seeds)
    ]  # fmt: skip


def test_csv_has_plain_numbers(made):
    lines = list(csv.DictReader(io.StringIO(formats.as_csv(made))))
    assert [line["method"] for line in lines] == ["none", "dbd", "nad"]
    assert float(lines[1]["clean_acc_mean"]) == pytest.approx(0.93)
    assert float(lines[1]["clean_acc_std"]) == pytest.approx(0.0141421356)
    assert float(lines[0]["seconds_mean"]) == 30
    assert lines[2]["clean_acc_std"] == ""
    assert lines[1]["seeds"] == "0 1"
    assert lines[1]["commands"].count("dbd train") == 2
    assert (lines[2]["commit"], lines[2]["hardware"]) == ("def456", "a CPU, 2 cores, fp32")


def test_latex_and_html(made):
    tex = formats.as_latex(made)
    rows = [line for line in tex.splitlines() if line.endswith(r"\\")]
    assert rows[2].startswith(r" & DBD & 2 & 93.00 $\pm$ 1.41 & 1.50 $\pm$ 0.71 & 92.50 / 0.88")
    assert rows[3].startswith(r" & NAD $^\dagger$ & 1")
    assert len({line.count(" & ") for line in rows}) == 1
    page = formats.as_html(made).partition(formats.CLAIMS)[0]
    assert page.count("<tr>") == 1 + 1 + 3  # head, attack, methods
    assert "93.00 ± 1.41" in page


def test_names_of_strangers_do_no_harm(write_table):
    hostile = "<script>alert(1)</script> | $x_1$ & \\input{f} %\n\u202e"
    results = {("badnets", "dbd", 0): {"titles": {"dbd": hostile}}}
    made = read(write_table(results))
    assert "<script>alert" not in formats.as_html(made)
    line, *claimed = [line for line in formats.as_markdown(made).splitlines() if "script" in line]
    assert line.count(" | ") == 6
    assert all(line.count(" | ") == len(claims.HEAD) - 1 for line in claimed)
    (line,) = [line for line in formats.as_latex(made).splitlines() if "script" in line and line.endswith(r"\\")]
    assert r"\input" not in line
    assert "%" not in line.replace(r"\%", "")


def test_detection_is_shown_where_the_table_is_about_it(write_table):
    last = {"auroc": 0.99, "tpr": 1.0, "fpr": 0.5, "most_suspect": [[2, 1.0], [4, 0.9], [8, 0.8]]}
    quality = {"first": {"auroc": 0.9, "most_suspect": None}, "last": last}
    results = {
        ("badnets", "dbd", 0): {"split_quality": quality},
        ("badnets", "spectral", 0): {"flagged": {"tpr": 0.5, "fpr": 0.05, "auroc": 0.7, "samples": 100,
                                                 "most_suspect": [[2, 0.5], [4, 0.25], [8, 0.125]]}},
    }  # fmt: skip
    folder = write_table(results, detects=True)
    head, body = formats.cells(read(folder))
    assert body[1][head.index("poisoned among most suspect, %")] == "50.0 / 25.0 / 12.5"
    assert dict(zip(head, body[0])) | {
        "dropped or flagged: poisoned / clean, %": "100.0 / 50.0", "AUROC first split": "0.900",
        "AUROC at the end": "0.990", "poisoned among most suspect, %": "100.0 / 90.0 / 80.0",
        "article: among most suspect, %": "100 / 97.6 / 90.9",
    } == dict(zip(head, body[0]))  # fmt: skip
    assert body[1][head.index("dropped or flagged: poisoned / clean, %")] == "50.0 / 5.0"
    assert body[1][head.index("AUROC at the end")] == "0.700"
    assert "images flagged: poisoned / clean, %" not in head  # once is enough


def test_the_model_after_the_warm_up_and_the_features_are_part_of_detection(write_table):
    values = {
        "after_warmup": {"clean_acc": 0.9, "asr": 0.125, "robust_acc": 0.8},
        "feature_quality": {"knn_acc": 0.75, "poisoned_near_true": 0.5, "poisoned_near_given": 0.0625},
        "images": {"a": 100, "b": 20},
    }
    results = {("badnets", "dbd", seed): values for seed in (0, 1)}
    made = read(write_table(results, detects=True))
    head, (line,) = formats.cells(made)
    shown = dict(zip(head, line))
    assert shown["after warm-up: acc. / ASR %"] == "90.0 / 12.5"
    assert shown["k-NN acc. %"] == "75.0"
    assert shown["poisoned near their true / given class, %"] == "50.0 / 6.2"
    (row,) = csv.DictReader(io.StringIO(formats.as_csv(made)))
    assert (row["images_mean"], row["after_warmup_asr_mean"]) == ("120.0", "0.125")
    assert row["feature_quality_knn_acc_std"] == "0.0"


def test_false_alarms_stand_in_every_table_that_has_a_detector(write_table):
    of_images = {"tpr": None, "fpr": 0.057, "class_tpr": None, "class_fpr": 0.2, "samples": 78}
    of_classes = {"tpr": None, "fpr": None, "class_tpr": 1.0, "class_fpr": 0.0, "samples": None}
    results = {
        ("clean", "activation-clustering", 0): {"flagged": of_images},
        ("badnets", "nc", 0): {"flagged": of_classes},
    }
    head, body = formats.cells(read(write_table(results)))
    first, last = (dict(zip(head, line)) for line in body)
    assert first["images flagged: poisoned / clean, %"] == "– / 5.7"
    assert first["classes flagged: right / wrong, %"] == "– / 20.0"
    assert last["images flagged: poisoned / clean, %"] == "–"
    assert last["classes flagged: right / wrong, %"] == "100.0 / 0.0"


def test_epsilon_is_said_below_the_table(write_table):
    results = {("badnets", "dpsgd", seed): {"measures": {"epsilon": 14212.6, "delta": 1e-5}} for seed in (0, 1)}
    text = formats.as_markdown(read(write_table(results)))
    assert "dpsgd: differential privacy with epsilon 14,212.6 at delta 1e-05" in text


def test_a_folder_that_is_no_table(tmp_path):
    with pytest.raises(UserError, match="not a table's results"):
        read(tmp_path)


def test_methods_on_different_images_are_said(write_table):
    def made(hashes: dict[str, str]) -> str:
        results = {("badnets", method, 1): {"data_hash": of} for method, of in hashes.items()}
        others = {("wanet", method, 1): {"data_hash": "w"} for method in hashes}
        folder = write_table(results | others)
        text = "\n".join(formats.notes(read(folder)))
        shutil.rmtree(folder)
        return text

    assert "same images" not in made({"none": "a", "dbd": "a"})
    said = "Not all methods trained on the same images, poisoned by the same command: Badnets (seed 1)."
    assert said in made({"none": "a", "dbd": "b"})


def test_accuracy_on_the_target_class_has_a_column(write_table):
    of = {"per_class_acc": [0.9, 0.8, 0.7, 0.1], "commands": ["dbd prepare digits badnets --seed 0"]}
    made = read(write_table({("badnets", "dbd", 0): of, ("clean", "dbd", 0): {**of, "asr": None}}))
    head, body = formats.cells(made)
    assert [line[head.index(formats.TARGET)] for line in body] == ["10.00", "–"]
    assert any(note.startswith("Target class:") for note in formats.notes(made))
    (poisoned, clean) = csv.DictReader(io.StringIO(formats.as_csv(made)))
    assert (poisoned["target_acc_mean"], clean["target_acc_mean"]) == ("0.1", "")
