"""Data sets as people have them. The names and types of columns are those of public data cards; the pictures are made
here: every class is a grey level, so that a picture tells its label."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.errors import UserError
from data_prep.io import limits
from data_prep.sources import HuggingFace, ImageFolder, OpenSource, Parquet
from data_prep.sources.source import Source

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["ant", "bee", "cat"]
SMALL = {"image_px": 8, "resize_px": 8}


def picture(label: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (60 * label + 20,) * 3).save(stream, "PNG")
    return stream.getvalue()


def structs(labels: list[int]) -> pa.Array:
    return pa.array([{"bytes": picture(label), "path": None} for label in labels], IMAGE)


def class_labels(names: list[str] = NAMES) -> dict[str, Any]:
    return {"names": names, "_type": "ClassLabel"}


def table(columns: dict[str, Any], path: Path, features: dict[str, Any] | None = None) -> None:
    made = pa.table(columns)
    if features is not None:
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, path)


def files(root: Path, *folders: str, count: int = 2, suffix: str = "png") -> None:
    """Pictures of the class that a folder's path has in it, by its place in NAMES; else of class 0."""
    for folder in folders:
        label = next((i for i, name in enumerate(NAMES) if name in folder.split("/")), 0)
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / folder / f"{i}.{suffix}").write_bytes(picture(label))


def check(
    source: Source, train: int, test: int, names: list[str] = NAMES, values: list[int] | None = None
) -> OpenSource:
    """Opens with so many images, and every picture is of its label (of `values`, where classes are not in order)."""
    opened = source.open()
    assert list(opened.class_names) == names
    assert (len(opened.train), len(opened.test)) == (train, test)
    for split in (opened.train, opened.test):
        for i, encoded in enumerate(split.stream()):
            level = int(split.decode(encoded, i)[0, 0, 0])
            label = int(split.labels[i])
            assert level == 60 * (label if values is None else values[label]) + 20, split.origin(i)
    return opened


def said(opened: OpenSource) -> str:
    return "\n".join(opened.notes)


SIX, THREE = [0, 1, 2, 0, 1, 2], [2, 1, 0]


# -------------------------------------------------------------------------------- ten data cards


def autotrain(root: Path) -> None:
    """AutoTrain: image, target; train and valid."""
    for split, labels in (("train", SIX), ("valid", THREE)):
        table(
            {"image": structs(labels), "target": labels}, root / "data" / f"{split}-00000-of-00001.parquet",
            {"image": {"_type": "Image"}, "target": class_labels()},
        )  # fmt: skip


def cifar100(root: Path) -> None:
    """CIFAR-100: img, fine_label, coarse_label in a folder of the configuration."""
    for split, labels in (("train", SIX), ("test", THREE)):
        columns = {"img": structs(labels), "fine_label": labels, "coarse_label": [label // 2 for label in labels]}
        features = {"img": {"_type": "Image"}, "fine_label": class_labels(), "coarse_label": class_labels(["a", "b"])}
        table(columns, root / "cifar100" / f"{split}-00000-of-00001.parquet", features)


def beans(root: Path) -> None:
    """Beans: image_file_path, image, labels; train, validation and test."""
    for split, labels in (("train", SIX), ("validation", THREE), ("test", THREE)):
        columns = {"image_file_path": ["/home/x.jpg"] * len(labels), "image": structs(labels), "labels": labels}
        features = {"image": {"_type": "Image"}, "labels": class_labels()}
        table(columns, root / "data" / f"{split}-00000-of-00001.parquet", features)


def pets(root: Path) -> None:
    """Oxford pets, enriched: two columns of names, boxes and captions."""
    for split, labels in (("train", SIX), ("test", THREE)):
        columns = {
            "image_id": [f"{i}" for i in labels], "image": structs(labels),
            "label_cat_dog": ["dog"] * len(labels), "label_breed": [NAMES[i] for i in labels],
            "label_bbox_enriched": [[{"label": "dog", "bbox": [0, 0, 1, 1]}]] * len(labels),
            "caption_enriched": ["a dog"] * len(labels),
        }  # fmt: skip
        table(columns, root / "data" / f"{split}-00000-of-00001-af.parquet")


def years(root: Path) -> None:
    """Names as labels, and splits that are years."""
    for split, labels in (("train", SIX), ("2014", THREE), ("2016", THREE)):
        columns = {"image": structs(labels), "label": [NAMES[i] for i in labels]}
        table(columns, root / "data" / f"{split}-00000-of-00001.parquet")


def exported(root: Path) -> None:
    """The Hub's own export: CONFIG/SPLIT/0000.parquet."""
    for split, labels in (("train", SIX), ("test", THREE)):
        columns = {"image": structs(labels), "label": labels}
        table(
            columns, root / "default" / split / "0000.parquet", {"image": {"_type": "Image"}, "label": class_labels()}
        )


def with_metadata(root: Path) -> None:
    """Pictures in one folder a split, and metadata.csv with file_name and label."""
    for split, labels in (("train", SIX), ("test", THREE)):
        (root / split).mkdir()
        with (root / split / "metadata.csv").open("w") as file:
            rows = csv.writer(file)
            rows.writerow(["file_name", "label"])
            for i, label in enumerate(labels):
                (root / split / f"{i}.png").write_bytes(picture(label))
                rows.writerow([f"{i}.png", NAMES[label]])


def in_tars(root: Path) -> None:
    """WebDataset: KEY.png and KEY.cls in archives."""
    for split, labels in (("train", SIX), ("test", THREE)):
        with tarfile.open(root / f"{split}-0000.tar", "w") as archive:
            for i, label in enumerate(labels):
                for suffix, content in (("png", picture(label)), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{i:04d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def spreadsheet(root: Path) -> None:
    """A CSV a split, of paths and names."""
    for split, labels in (("train", SIX), ("test", THREE)):
        (root / "pictures").mkdir(exist_ok=True)
        with (root / f"{split}.csv").open("w") as file:
            rows = csv.writer(file)
            rows.writerow(["image_path", "class"])
            for i, label in enumerate(labels):
                (root / "pictures" / f"{split}{i}.png").write_bytes(picture(label))
                rows.writerow([f"pictures/{split}{i}.png", NAMES[label]])


def by_class(root: Path) -> None:
    """Class folders without splits, of several formats, beside a table of their own."""
    files(root, *NAMES, count=4)
    (root / "info.csv").write_text("name,count\nant,4\n")


PARQUET = {
    "autotrain": (autotrain, {}, NAMES),
    "beans": (beans, {}, NAMES),
    "cifar100": (cifar100, {"label_column": "fine_label"}, NAMES),
    "pets": (pets, {"label_column": "label_breed"}, NAMES),
    "years": (years, {"test_split": "2014"}, NAMES),
    "exported": (exported, {}, NAMES),
}
OTHERS = {
    "with_metadata": (with_metadata, {}, NAMES),
    "in_tars": (in_tars, {}, ["0", "1", "2"]),
    "spreadsheet": (spreadsheet, {}, NAMES),
}


@pytest.mark.parametrize("name", PARQUET)
def test_parquet_opens_at_the_first_try(name, tmp_path):
    make, options, names = PARQUET[name]
    make(tmp_path)
    check(Parquet(root=tmp_path, **options), 6, 3, names)


@pytest.mark.parametrize("name", PARQUET | OTHERS)
def test_hf_opens_at_the_first_try(name, tmp_path, monkeypatch):
    make, options, names = (PARQUET | OTHERS)[name]
    (tmp_path / "home").mkdir()
    (tmp_path / "set").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make(tmp_path / "set")
    check(HuggingFace(path=str(tmp_path / "set"), **options), 6, 3, names)
    assert not list((tmp_path / "home").rglob("*"))
    assert sorted(os.listdir(tmp_path)) == ["home", "set"]


def test_classes_without_splits(tmp_path):
    by_class(tmp_path)
    opened = check(ImageFolder(root=tmp_path, test_fraction=0.25, **SMALL), 9, 3)
    assert "3 of 12 training images" in said(opened)
    again = ImageFolder(root=tmp_path, test_fraction=0.25, subset_seed=5, **SMALL).open()
    assert Counter(again.test.labels.tolist()) == {0: 1, 1: 1, 2: 1}


def test_several_label_columns_are_named(tmp_path):
    cifar100(tmp_path)
    with pytest.raises(UserError, match=r"several columns may be the labels: fine_label, coarse_label.*label_column"):
        Parquet(root=tmp_path).open()
    assert Parquet(root=tmp_path, label_column="coarse_label").open().class_names == ("a", "b")


@pytest.mark.parametrize("other", ["image", "label", "x"])
def test_columns_of_one_name_are_refused(tmp_path, other):
    """Arrow writes them, and finds neither by name: images and labels among them are told apart by type alone."""
    image, label = pa.array(structs(SIX)), pa.array(SIX, pa.int64())
    names = {"image": ["x", "x", "label"], "label": ["image", "y", "y"], "x": ["x", "x", "x"]}[other]
    columns = [image, pa.array(list("abcdef")) if other == "image" else label, label if other == "image" else image]
    for split in ("train", "test"):
        pq.write_table(pa.Table.from_arrays(columns, names=names), tmp_path / f"{split}.parquet")
    with pytest.raises(UserError, match=r"more than one column '[xy]'|several columns may be") as error:
        Parquet(root=tmp_path).open()
    assert "train.parquet" in str(error.value.where)


# -------------------------------------------------------------------------------- splits


def both(root: Path, train: dict[str, Any], test: dict[str, Any], features: dict[str, Any] | None = None) -> None:
    for split, columns in (("train", train), ("test", test)):
        table(columns, root / f"{split}.parquet", features)


@pytest.mark.parametrize("kind", [Parquet, HuggingFace])
def test_where_test_has_no_labels_another_split_is_taken(kind, tmp_path):
    for split, labels, given in (("train", SIX, SIX), ("validation", THREE, THREE), ("test", THREE, [-1] * 3)):
        table({"image": structs(labels), "label": given}, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    where: Any = {"root": tmp_path} if kind is Parquet else {"path": str(tmp_path)}
    opened = check(kind(**where), 6, 3, ["0", "1", "2"])
    assert "test has no labels and is left aside\nvalidation is measured on" in said(opened)
    with pytest.raises(UserError, match="'test' has no labels"):
        kind(**where, test_split="test").open()
    with pytest.raises(UserError, match=r"no split 'dev'.*one of .*validation"):
        kind(**where, test_split="dev").open()


def test_without_a_test_split_some_of_every_class_are_set_aside(tmp_path):
    labels = [0] * 40 + [1] * 9 + [2]
    table({"image": structs(labels), "label": labels}, tmp_path / "data" / "train-00000-of-00001.parquet")
    opened = check(Parquet(root=tmp_path), 45, 5, ["0", "1", "2"])
    assert Counter(opened.test.labels.tolist()) == {0: 4, 1: 1}  # the only image of class 2 stays in training
    assert "no test image of class 2 (2)" in said(opened)
    origins = [split.origin(i) for split in (opened.train, opened.test) for i in range(len(split))]
    assert len(set(origins)) == 50
    other = Parquet(root=tmp_path, subset_seed=1).open()
    assert [other.test.origin(i) for i in range(5)] != origins[45:]


def test_several_test_folders(tmp_path):
    for split in ("train", "test", "val"):
        files(tmp_path, *(f"{split}/{name}" for name in NAMES), count=1 + len(split))
    opened = check(ImageFolder(root=tmp_path, **SMALL), 18, 15)
    assert "test is measured on; left aside: val (--test-split chooses)" in said(opened)
    check(ImageFolder(root=tmp_path, test_split="val", **SMALL), 18, 12)


@pytest.mark.parametrize("name", ["valid", "validation", "Val", "Testing"])
def test_names_of_test_folders(name, tmp_path):
    for split in ("Train", name):
        files(tmp_path, *(f"{split}/{kind}" for kind in NAMES))
    check(ImageFolder(root=tmp_path, **SMALL), 6, 6)


def test_a_test_folder_without_classes(tmp_path):
    files(tmp_path, *(f"train/{name}" for name in NAMES), "test/images", count=10)
    opened = check(ImageFolder(root=tmp_path, **SMALL), 27, 3)
    assert "test has no labels" in said(opened)


def test_two_data_sets_in_one_folder(tmp_path):
    for name in ("full", "cropped"):
        table({"image": structs(SIX), "label": SIX}, tmp_path / name / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"several data sets: cropped, full.*name the folder of one"):
        Parquet(root=tmp_path).open()


def test_a_class_called_train(tmp_path):
    files(tmp_path, "train", "plane", "car", count=4)
    assert ImageFolder(root=tmp_path, **SMALL).open().class_names == ("car", "plane", "train")


def test_one_folder_too_high(tmp_path):
    files(tmp_path, "photos/train/ant", "photos/train/bee")
    files(tmp_path, "photos/test/ant", "photos/test/bee")
    with pytest.raises(UserError, match=r"one folder deeper.*--root .*photos"):
        ImageFolder(root=tmp_path).open()


# -------------------------------------------------------------------------------- folders


def test_pictures_below_the_class_and_other_files_beside_them(tmp_path):
    for split in ("train", "val"):
        files(tmp_path, *(f"{split}/{name}/images" for name in NAMES), count=3, suffix="JPEG")
        for name in NAMES:
            (tmp_path / split / name / f"{name}_boxes.txt").write_text("0 0 7 7")
            (tmp_path / split / name / "picture_without_suffix").write_bytes(picture(NAMES.index(name)))
    opened = check(ImageFolder(root=tmp_path, **SMALL), 12, 12)
    assert "6 files that are no pictures were passed over (6 .txt)" in said(opened)
    assert opened.train.origin(0) == "train/ant/images/0.JPEG"


def test_clutter(tmp_path):
    for split in ("train", "test"):
        files(tmp_path, *(f"{split}/{name}" for name in NAMES))
        for folder in ("__MACOSX/ant", ".ipynb_checkpoints", "ant/.ipynb_checkpoints", "ant/@eaDir"):
            files(tmp_path, f"{split}/{folder}")
        for name in (".DS_Store", "ant/Thumbs.db", "ant/._0.png", "ant/desktop.ini"):
            (tmp_path / split / name).write_bytes(b"x")
    opened = check(ImageFolder(root=tmp_path, **SMALL), 6, 6)
    assert not opened.notes


def test_an_empty_or_missing_class_in_test_is_said(tmp_path):
    files(tmp_path, *(f"train/{name}" for name in NAMES), "test/ant", "test/cat")
    (tmp_path / "test" / "bee").mkdir()
    for _ in range(2):
        opened = check(ImageFolder(root=tmp_path, **SMALL), 6, 4)
        assert "no test image of class 1 (bee)" in said(opened)
        if (tmp_path / "test" / "bee").exists():
            (tmp_path / "test" / "bee").rmdir()


def test_classes_called_by_numbers_are_in_their_order(tmp_path):
    numbers = [str(i) for i in range(12)]
    files(tmp_path, *(f"{split}/{name}" for split in ("train", "test") for name in numbers), count=1)
    assert list(ImageFolder(root=tmp_path, **SMALL).open().class_names) == numbers
    (tmp_path / "train" / "x10").mkdir()
    files(tmp_path, "train/x10", "train/x9")
    mixed = ImageFolder(root=tmp_path, **SMALL).open().class_names
    assert list(mixed) == sorted([*numbers, "x9", "x10"])  # as torchvision has them


def test_a_link_to_a_folder_above(tmp_path):
    files(tmp_path, *(f"{split}/{name}" for split in ("train", "test") for name in NAMES))
    (tmp_path / "train" / "ant" / "again").symlink_to("..")
    with pytest.raises(UserError, match="a link to a folder above itself"):
        ImageFolder(root=tmp_path, **SMALL).open()
    (tmp_path / "train" / "ant" / "again").unlink()
    (tmp_path / "train" / "ant" / "more").symlink_to(tmp_path.parent)
    with pytest.raises(UserError, match="outside the image folder"):
        ImageFolder(root=tmp_path, **SMALL).open()


# -------------------------------------------------------------------------------- lists


LISTS = {
    "csv": "path,label,split\n{rows}",
    "semicolons": "file_name;class;set\n{rows}",
    "tabs": "image\tcategory\tsplit\tnote\n{rows}",
    "json": "",
    "jsonl": "",
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_paths_and_labels(kind, tmp_path):
    rows = []
    for split, labels in (("Train", SIX), ("test", THREE)):
        for i, label in enumerate(labels):
            files(tmp_path, "all/" + NAMES[label])
            rows.append((f"all/{NAMES[label]}/{i % 2}.png", NAMES[label], split))
    path = tmp_path / f"list.{kind if kind.startswith('json') else 'csv'}"
    if kind.startswith("json"):
        objects = [dict(zip(("image", "label", "split"), row)) for row in rows]
        path.write_text(json.dumps(objects) if kind == "json" else "\n".join(map(json.dumps, objects)))
    else:
        comma = {"csv": ",", "semicolons": ";", "tabs": "\t"}[kind]
        path.write_text(
            LISTS[kind].format(rows="\n".join(comma.join((*row, "")[: 3 + (kind == "tabs")]) for row in rows))
        )
    check(ImageFolder(root=tmp_path, list=path, **SMALL), 6, 3)


def test_a_list_without_header_and_numbers_as_labels(tmp_path):
    files(tmp_path, "val/images", count=20)
    path = tmp_path / "annotations.txt"
    path.write_text("".join(f"val/images/{i}.png\t{10 if i % 2 else 9}\n" for i in range(20)))
    opened = ImageFolder(root=tmp_path, list=path, **SMALL).open()
    assert opened.class_names == ("9", "10")
    assert (len(opened.train), len(opened.test)) == (18, 2)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "the list is empty"),
        ("a,b,c\n1,2,3\n", "the columns of the list are a, b, c"),
        ("path,label\nx.png\n", "row 1 has no path or no label"),
        ("path,label\n../../etc/passwd,a\n", "leads out of"),
        ("path,label\n/etc/passwd,a\n", "leads out of"),
        (b"path,label\n\xff,a\n", "not UTF-8"),
        ('path,label\n"x', "has no path or no label|not CSV"),
    ],
)
def test_lists_that_do_not_do(content, says, tmp_path):
    path = tmp_path / "list.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=says):
        ImageFolder(root=tmp_path, list=path).open()
    with pytest.raises(UserError, match="cannot read the list"):
        ImageFolder(root=tmp_path, list=tmp_path / "none.csv").open()


# -------------------------------------------------------------------------------- labels


KINDS = {
    "integers": (pa.array(SIX, pa.int8()), ["0", "1", "2"]),
    "names": (pa.array([NAMES[i] for i in SIX]), NAMES),
    "large names": (pa.array([NAMES[i] for i in SIX], pa.large_string()), NAMES),
    "categories": (pa.array([NAMES[i] for i in SIX]).dictionary_encode(), NAMES),
    "unused categories": (
        pa.DictionaryArray.from_arrays(pa.array([1, 2, 3] * 2, pa.int8()), pa.array(["aa", *NAMES, "zz"])), NAMES,
    ),
    "whole floats": (pa.array([float(i) for i in SIX]), ["0", "1", "2"]),
    "from one": (pa.array([1 + i for i in SIX]), ["1", "2", "3"]),
    "gaps": (pa.array([(3, 7, 90)[i] for i in SIX]), ["3", "7", "90"]),
    "numbers as text": (pa.array([("9", "10", "11")[i] for i in SIX]), ["9", "10", "11"]),
    "lists of one": (pa.array([[i] for i in SIX]), ["0", "1", "2"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_every_kind(kind, tmp_path):
    column, names = KINDS[kind]
    both(tmp_path, {"image": structs(SIX), "label": column}, {"image": structs(SIX[:3]), "label": column[:3]})
    opened = check(Parquet(root=tmp_path), 6, 3, names)
    assert ("became classes 0 to 2" in said(opened)) == (kind in ("from one", "gaps"))


def test_booleans(tmp_path):
    column = pa.array([True, False, True])
    both(tmp_path, {"image": structs([1, 0, 1]), "label": column}, {"image": structs([1, 0, 1]), "label": column})
    check(Parquet(root=tmp_path), 3, 3, ["False", "True"])


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pa.array([0.5] + [1.0] * 5), "row 0: label 0.5 is not whole"),
        (pa.array([[0, 1]] + [[1]] * 5), "several labels"),
        (pa.array([{"a": 1}] * 6), "column 'label' is struct"),
        (pa.array(["x" * 2000] + ["y"] * 5), "class name of 2,000 characters"),
        (pa.array([0, 1, 2, 0, 1, 10**12]), "label 1000000000000"),
    ],
)
def test_labels_that_do_not_do(column, says, tmp_path):
    both(tmp_path, {"image": structs(SIX), "label": column}, {"image": structs(SIX), "label": column})
    with pytest.raises(UserError, match=says):
        Parquet(root=tmp_path).open()


def test_rows_without_a_label(tmp_path):
    column = pa.array([0, None, 2, 0, 1, None])
    both(tmp_path, {"image": structs(SIX), "label": column}, {"image": structs(SIX[:3]), "label": SIX[:3]})
    with pytest.raises(UserError, match=r"train row 1: the label is null \(2 of 6\).*on_bad_image"):
        Parquet(root=tmp_path).open()
    opened = check(Parquet(root=tmp_path, on_bad_image="skip"), 4, 3, ["0", "1", "2"])
    assert opened.skipped == ("train.parquet#1: no label", "train.parquet#5: no label")
    assert [opened.train.origin(i) for i in range(4)] == [f"train.parquet#{i}" for i in (0, 2, 3, 4)]


def test_a_part_of_a_larger_data_set_brings_all_of_its_names(tmp_path):
    names = ["ant", "bear", "bee", "cat", "dog"]
    given = [names.index(NAMES[i]) for i in SIX]
    features = {"label": class_labels(names)}
    both(tmp_path, {"image": structs(SIX), "label": given}, {"image": structs(SIX), "label": given}, features)
    assert "2 of 5 class names have no image" in said(check(Parquet(root=tmp_path), 6, 6))


@pytest.mark.parametrize("about", ['{"info": {"features": {"x": {}}}}', '{"info": {"features": null}}', '{"info": {}}'])
def test_metadata_that_says_nothing_of_the_column(about, tmp_path):
    for split in ("train", "test"):
        columns = pa.table({"image": structs(SIX), "label": SIX}).replace_schema_metadata({"huggingface": about})
        pq.write_table(columns, tmp_path / f"{split}.parquet")
    opened = check(Parquet(root=tmp_path), 6, 6, ["0", "1", "2"])
    assert ("says nothing of column label" in said(opened)) == ('"x"' in about)


# -------------------------------------------------------------------------------- images in tables


def test_images_as_bytes_paths_and_lists(tmp_path):
    files(tmp_path, *(f"pictures/{name}" for name in NAMES))
    paths = [f"pictures/{NAMES[i]}/0.png" for i in SIX]
    kinds = {
        "bytes": pa.array([picture(i) for i in SIX], pa.large_binary()),
        "paths": pa.array(paths),
        "structs of paths": pa.array([{"bytes": None, "path": path} for path in paths], IMAGE),
        "lists of one": pa.array([[{"bytes": picture(i), "path": None}] for i in SIX], pa.list_(IMAGE)),
    }
    for column in kinds.values():
        both(tmp_path, {"image": column, "label": SIX}, {"image": column, "label": SIX})
        check(Parquet(root=tmp_path), 6, 6, ["0", "1", "2"])


def test_paths_do_not_lead_out_of_the_folder(tmp_path):
    root = tmp_path / "set"
    for path in ("/etc/hostname", "../x.png", "a\0b"):
        column = pa.array([{"bytes": None, "path": path}] * 6, IMAGE)
        both(root, {"image": column, "label": SIX}, {"image": column, "label": SIX})
        train = Parquet(root=root).open().train
        with pytest.raises(UserError, match="its path leads out of the folder"):
            train.read(0)


def test_cards_do_not_name_files_outside(tmp_path):
    table({"image": structs(SIX), "label": SIX}, tmp_path / "other" / "x.parquet")
    (tmp_path / "set").mkdir()
    for path in ("../other/x.parquet", str(tmp_path / "other" / "x.parquet"), "https://example.invalid/x.parquet"):
        card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {path}\n---\n"
        (tmp_path / "set" / "README.md").write_text(card)
        with pytest.raises(UserError):
            HuggingFace(path=str(tmp_path / "set")).open()


def test_hf_without_a_network(tmp_path, monkeypatch):
    import huggingface_hub

    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no data set in this folder"):
        HuggingFace(path=str(tmp_path / "empty")).open()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no such folder, and the Hub cannot be reached"):
        HuggingFace(path="nobody/nothing").open()
    with pytest.raises(UserError, match="no such folder"):
        HuggingFace(path="a/b/c").open()


@pytest.mark.slow
def test_the_library_is_imported_for_hf_only(run_python):
    code = "import sys, data_prep.cli; data_prep.cli.SOURCES['hf']; print('datasets' in sys.modules)"
    assert run_python(code).stdout.strip() == "False"


# -------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_few_bytes_that_decode_to_many(use_dictionary, tmp_path, monkeypatch):
    """Long values that compress to nothing: as many rows are decoded at a time as fit, and no page of any length."""
    monkeypatch.setattr(limits, "BATCH_BYTES", 4 << 20)
    long = picture(0) + bytes(1 << 20)
    columns = {"image": pa.array([{"bytes": long, "path": None}] * 40, IMAGE), "label": [i % 2 for i in range(40)]}
    for split in ("train", "test"):
        pq.write_table(
            pa.table(columns), tmp_path / f"{split}.parquet", compression="zstd", use_dictionary=use_dictionary,
            dictionary_pagesize_limit=1 << 30, data_page_size=1 << 20,
        )  # fmt: skip
    assert (tmp_path / "train.parquet").stat().st_size < 20_000
    sizes = []
    whole = pq.ParquetFile.iter_batches

    def spy(self, *, batch_size, **options):
        sizes.append(batch_size)
        return whole(self, batch_size=batch_size, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    train = Parquet(root=tmp_path).open().train
    assert len(list(train.stream())) == 40
    assert max(sizes) <= 3
    monkeypatch.setattr(limits, "IMAGE_FILE_BYTES", 1 << 19)
    monkeypatch.setattr(limits, "PAGE_BYTES", 1 << 19)
    with pytest.raises(UserError, match=r"a page of [\d,]+ MiB in column 'image'"):
        Parquet(root=tmp_path).open()


def test_many_classes_and_one_image_each(tmp_path):
    labels = [i % 1000 for i in range(2000)]
    column = pa.array([f"class {label}" for label in labels])
    both(tmp_path, {"image": structs([0] * 2000), "label": column}, {"image": structs([0]), "label": column[:1]})
    opened = Parquet(root=tmp_path).open()
    assert len(opened.class_names) == 1000
    assert "no test image of class 1 (class 1), " in said(opened)
    assert "and 994 others" in said(opened)
    both(tmp_path, {"image": structs(THREE), "label": THREE}, {"image": structs(THREE), "label": THREE})
    check(Parquet(root=tmp_path), 3, 3, ["0", "1", "2"])
