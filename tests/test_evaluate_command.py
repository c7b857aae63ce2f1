"""`crfnet evaluate` on drawn label maps, against scores counted pixel by pixel."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crfnet import images
from crfnet.cli import main
from crfnet.comparison import named, widths
from crfnet.metrics import trimap_band
from crfnet.scoring import Scored, match

NAMES = ("a", "b", "c")


def draw(folder: Path, kind: str, name: str, seed: int, mistakes: float = 0.0) -> None:
    """Blocks of the labels 0, 1 and 3 with void between; predictions have mistakes and no void."""
    random = np.random.default_rng(seed)
    labels = random.choice([0, 1, 3], (3, 4)).repeat(6, 0).repeat(5, 1)
    (folder / kind).mkdir(exist_ok=True)
    if kind == "truth":
        labels[:, 9:11] = 255
    wrong = np.random.default_rng(seed + 100).random(labels.shape) < mistakes
    images.write_labels(folder / kind / f"{name}.png", np.where(wrong, 4, labels))


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(NAMES):
        draw(tmp_path, "truth", name, seed)
        draw(tmp_path, "good", name, seed, 0.1)
        draw(tmp_path, "poor", name, seed, 0.4)
    (tmp_path / "out").mkdir()
    return tmp_path


def status(*argv: str) -> int:
    try:
        return main(["evaluate", *argv])
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


def count(kind: str, width: int | None = None, names: tuple[str, ...] = NAMES) -> dict[str, object]:
    """Every score by loops over the pixels of the files."""
    pairs = []
    for name in names:
        truth, called = (images.read_labels(f"{folder}/{name}.png") for folder in ("truth", kind))
        band = trimap_band(torch.from_numpy(truth), width or 1).numpy() if width else np.ones(truth.shape, bool)
        pairs += [
            (int(t), int(p))
            for t, p, inside in zip(truth.ravel(), called.ravel(), band.ravel(), strict=True)
            if t != 255 and inside
        ]
    iou, accuracy, pixels = {}, {}, {}
    for c in range(5):
        pixels[c] = sum(t == c for t, _ in pairs)
        hit = sum(t == c == p for t, p in pairs)
        if pixels[c]:
            iou[c] = hit / sum(c in pair for pair in pairs)
            accuracy[c] = hit / pixels[c]
    return {
        "pixel_accuracy": sum(t == p for t, p in pairs) / len(pairs),
        "mean_accuracy": sum(accuracy.values()) / len(accuracy),
        "mean_iou": sum(iou.values()) / len(iou),
        "frequency_weighted_iou": sum(iou[c] * pixels[c] for c in iou) / len(pairs),
        "iou": iou,
        "accuracy": accuracy,
        "pixels": pixels,
    }


def read_json(path: str = "out/s.json") -> dict:
    return json.loads(Path(path).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


FOUR = ("pixel_accuracy", "mean_accuracy", "mean_iou", "frequency_weighted_iou")


# What it says


def test_scores_of_folders(scene, capsys):
    assert status("good", "truth", "--json", "out/s.json", "--trimap", "1,3-4") == 0
    report, counted = read_json(), count("good")
    assert {key: report[key] for key in FOUR} == pytest.approx({key: counted[key] for key in FOUR})
    assert report["name"] == "good" and report["images"] == 3 and report["ignore_label"] == 255
    assert [c["label"] for c in report["classes"]] == [0, 1, 2, 3, 4]
    for c in report["classes"]:
        label = c["label"]
        assert c["name"] == str(label) and c["pixels"] == counted["pixels"][label]
        assert c["iou"] == (pytest.approx(counted["iou"][label]) if label in counted["iou"] else None)
        assert c["accuracy"] == (pytest.approx(counted["accuracy"][label]) if label in counted["iou"] else None)
    assert report["classes"][4]["called"] > 0  # absent from the truth, but called
    assert np.sum(report["confusion"]) == sum(counted["pixels"].values())
    assert report["trimap"]["widths"] == [1, 3, 4]
    for k, width in enumerate((1, 3, 4)):
        band = count("good", width)
        assert report["trimap"]["mean_iou"][k] == pytest.approx(band["mean_iou"])
        assert report["trimap"]["pixel_accuracy"][k] == pytest.approx(band["pixel_accuracy"])

    said = capsys.readouterr().out
    assert said.startswith("3 images, labels 0..4, ")
    for words, key in (("pixel accuracy", FOUR[0]), ("mean accuracy", FOUR[1]), ("mean IoU", FOUR[2])):
        assert re.search(rf"^{words} +{100 * counted[key]:.2f}$", said, re.M)
    assert re.search(rf"^frequency-weighted IoU +{100 * counted[FOUR[3]]:.2f}$", said, re.M)
    row = [f"{100 * counted['iou'][3]:.2f}", f"{100 * counted['accuracy'][3]:.2f}", str(counted["pixels"][3])]
    assert re.search(rf"^3 +{' +'.join(map(re.escape, row))} +\d+$", said, re.M)
    assert re.search(r"^4 +- +- +0 +\d+$", said, re.M) and not re.search(r"^2 ", said, re.M)
    assert re.search(rf"^3 px +{100 * report['trimap']['mean_iou'][1]:.2f} ", said, re.M)
    assert "2 px" not in said


def test_one_file_a_list_and_a_split_agree_with_folders(scene, capsys):
    assert status("good/b.png", "truth/b.png", "--json", "out/file.json") == 0
    Path("out/b.txt").write_text("../good/b.png ../truth/b.png\n\n")
    assert status("out/b.txt", "--json", "out/list.json") == 0
    Path("val.txt").write_text("b\n")
    assert status("good", "truth", "--split", "val.txt", "--json", "out/split.json") == 0
    reports = [read_json(f"out/{kind}.json") for kind in ("file", "list", "split")]
    assert [report.pop("name") for report in reports] == ["b", "b", "good"]
    assert reports[0] == reports[1] == reports[2]
    counted = count("good", names=("b",))
    assert reports[0]["mean_iou"] == pytest.approx(counted["mean_iou"])
    assert capsys.readouterr().out.count("1 image, ") == 3


def test_names_number_the_classes_and_head_the_rows(scene, capsys):
    Path("names.txt").write_text("\ufeffback ground\r\ncat\r\ncow\r\ndog\r\nhen\r\nowl\r\n\r\n", encoding="utf-8")
    assert status("good", "truth", "--names", "names.txt", "--markdown", "--json", "out/s.json") == 0
    said = capsys.readouterr().out
    assert "| back ground |" in said and re.search(r"^\| owl +\| +- \| +- \| +0 \| +0 \|$", said, re.M)
    assert [c["name"] for c in read_json()["classes"]] == ["back ground", "cat", "cow", "dog", "hen", "owl"]
    assert read_json()["mean_iou"] == pytest.approx(count("good")["mean_iou"])  # an absent class changes no mean


def test_another_label_may_be_void(scene):
    assert status("good", "truth", "--ignore-label", "0", "--num-classes", "256", "--json", "out/s.json") == 0
    # 255 is then a class like any other, and called nowhere; 0 is out of the truth
    report = read_json()
    assert report["classes"][0]["pixels"] == 0 and report["classes"][255]["iou"] == 0
    assert np.sum(report["confusion"][0]) == 0


def test_comparison_says_who_gains_and_draws_every_method(scene, capsys):
    argv = ["DCNN=poor", "truth", "--compare", "+ CRF=good", "--compare", "truth2=good2", "--trimap", "2"]
    for name in NAMES:
        draw(scene, "good2", name, NAMES.index(name))
    assert status(*argv, "--json", "out/s.json", "--curve", "out/c.png") == 0
    said, report = capsys.readouterr().out, read_json()
    assert re.search(r"^% +DCNN +\+ CRF +truth2$", said, re.M)
    assert (
        "+ CRF against DCNN" in said and "truth2 against DCNN" in said and "of 3 classes 3 gain, 0 pay, 0 stay" in said
    )
    assert list(report["compared"]) == ["+ CRF", "truth2"] and report["name"] == "DCNN"
    assert report["mean_iou"] == pytest.approx(count("poor")["mean_iou"])
    assert report["compared"]["+ CRF"]["mean_iou"] == pytest.approx(count("good")["mean_iou"])
    assert report["compared"]["truth2"]["mean_iou"] == 1.0
    change = 100 * (count("good")["iou"][3] - count("poor")["iou"][3])
    assert re.search(rf"^3 .*\+{change:.2f} +less 4$", said, re.M)
    assert report["trimap"]["widths"] == list(range(1, 41)) and "1 px" not in said and "2 px" in said
    plot = images.read_image("out/c.png")
    from crfnet.plots import COLOURS

    assert all((plot == COLOURS[k]).all(-1).any() for k in range(3)) and not (plot == COLOURS[3]).all(-1).any()


def test_panels_show_the_worst_images_first(scene, capsys):
    accuracy = {}
    for name in NAMES:
        Image.new("RGB", (20, 18), (9, 99, 199)).save(f"out/{name}.jpg")
        truth, called = (images.read_labels(f"{folder}/{name}.png") for folder in ("truth", "poor"))
        accuracy[name] = (truth == called)[truth != 255].mean()
    order = sorted(NAMES, key=accuracy.__getitem__)
    argv = ["poor", "truth", "--compare", "good", "--panels", "panels", "--images", "out", "--worst", "2"]
    assert status(*argv) == 0
    assert sorted(path.name for path in Path("panels").iterdir()) == [f"1_{order[0]}.png", f"2_{order[1]}.png"]

    look = images.read_image(f"panels/1_{order[0]}.png")
    assert look.shape == (24 + 2 * 180 + 8, 4 * 200 + 3 * 8, 3)  # 10 times as large: image, truth, poor, good
    truth, poor, good = (images.read_labels(f"{folder}/{order[0]}.png") for folder in ("truth", "poor", "good"))
    top, below = look[24 + 5 : 204 : 10], look[212 + 5 :: 10]
    palette = images.voc_palette()
    for k, labels in enumerate((truth, poor, good), 1):
        assert np.array_equal(top[:, 208 * k + 5 : 208 * k + 200 : 10], palette[labels])
    assert (np.abs(top[:, 5:200:10].astype(int) - (9, 99, 199)) <= 3).all()  # JPEG's rounding
    assert (below[:, :400] == 255).all()
    for k, labels in ((2, poor), (3, good)):
        colours = below[:, 208 * k + 5 : 208 * k + 200 : 10]
        for i, j in np.ndindex(truth.shape):
            wanted = (
                (255, 255, 255) if truth[i, j] == 255 else (213, 43, 30) if truth[i, j] != labels[i, j] else (225,) * 3
            )
            assert tuple(colours[i, j]) == wanted
    assert status(*argv) == 2 and "panels: is not empty; overwrite" in capsys.readouterr().err
    assert status(*argv, "--overwrite") == 0


def test_a_photo_of_another_size_is_named(scene, capsys):
    for name in NAMES:
        Image.new("RGB", (20, 17)).save(f"out/{name}.png")
    assert status("poor", "truth", "--panels", "panels", "--images", "out") == 1
    assert re.search(r"out.[abc]\.png: photo and labels must have the truth's size", capsys.readouterr().err)


def test_one_pixel_each(scene):
    images.write_labels("one.png", np.zeros((1, 1), int))
    assert status("one.png", "one.png", "--json", "out/s.json", "--trimap", "1") == 0
    report = read_json()
    assert report["mean_iou"] == 1.0 and report["trimap"]["mean_iou"] == [None]  # no boundary, no band


def test_existing_outputs_stay_unless_told(scene, capsys):
    Path("out/s.json").write_text("mine")
    assert status("good", "truth", "--json", "out/s.json") == 2
    assert Path("out/s.json").read_text() == "mine" and "exists" in capsys.readouterr().err
    assert status("good", "truth", "--json", "out/s.json", "--overwrite") == 0
    assert read_json()["images"] == 3


# Files that cannot be used: all of them named, status 1, no scores and nothing written


def label(path: str, value: int, at: tuple[int, int] = (2, 3)) -> None:
    labels = images.read_labels(path).copy()
    labels[at] = value
    images.write_labels(path, labels)


BAD_FILES = {
    "damaged": (lambda: Path("good/b.png").write_bytes(b"x"), [], [r"good.b\.png: not an image"]),
    "cut": (
        lambda: Path("truth/b.png").write_bytes(Path("truth/b.png").read_bytes()[:60]),
        [],
        [r"truth.b\.png: "],
    ),
    "colours": (
        lambda: Image.new("RGB", (20, 18)).save("good/b.png"),
        [],
        [r"good.b\.png: a label map is an indexed or grey PNG, got RGB"],
    ),
    "size": (
        lambda: images.write_labels("good/c.png", np.zeros((18, 19), int)),
        [],
        [r"good.c\.png is 19 x 18, but truth.c\.png is 20 x 18 pixels"],
    ),
    "void called": (
        lambda: label("good/a.png", 255),
        [],
        [r"good.a\.png: 1 pixel that counts has the label 255, which is the ignored one; --num-classes"],
    ),
    "too large a call": (
        lambda: label("good/a.png", 9),
        ["--num-classes", "5"],
        [r"good.a\.png: 1 pixel that counts has the label 9, but num_classes \(--num-classes\) is 5"],
    ),
    "too large a truth": (
        lambda: (label("truth/a.png", 7), label("truth/a.png", 9, (0, 0))),
        ["--num-classes", "5"],
        [r"truth.a\.png: 2 pixels that count have the labels 7, 9, but"],
    ),
    "several": (
        lambda: (Path("good/a.png").write_bytes(b""), label("good/c.png", 9)),
        ["--num-classes", "5"],
        [r"good.a\.png: ", r"good.c\.png: ", "no scores, as 2 files"],
    ),
    "bad truth of two methods": (
        lambda: Path("truth/a.png").write_bytes(b""),
        ["--compare", "poor"],
        [r"truth.a\.png: ", "no scores, as 1 file could"],
    ),
    "all void": (
        lambda: [images.write_labels(f"truth/{name}.png", np.full((18, 20), 255)) for name in NAMES],
        [],
        ["no scores, as every pixel of the truth has the ignored label 255"],
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_named_and_nothing_is_scored(scene, capsys, case):
    spoil, more, messages = BAD_FILES[case]
    spoil()
    assert status("good", "truth", "--json", "out/s.json", "--curve", "out/c.png", *more) == 1
    heard = capsys.readouterr()
    assert heard.out == "" and list(Path("out").iterdir()) == []
    for message in messages:
        assert len(re.findall(message, heard.err)) == 1, heard.err


def test_no_boundary_no_curve(scene, capsys):
    images.write_labels("one.png", np.zeros((1, 1), int))
    assert status("one.png", "one.png", "--curve", "out/c.png") == 1
    assert "no curve, as the truth has no boundary" in capsys.readouterr().err


def test_void_may_be_called_where_it_does_not_count(scene):
    label("good/a.png", 255, (0, 9))
    assert images.read_labels("truth/a.png")[0, 9] == 255
    assert status("good", "truth") == 0


# Command lines that cannot be meant: status 2 before anything is read


def fewer(folder: str, *names: str) -> None:
    for name in names:
        Path(f"{folder}/{name}.png").unlink()


def write(path: str, text: str) -> None:
    Path(path).write_text(text)


BAD_LINES = {
    "nothing": (None, [], "PREDICTIONS"),
    "missing": (None, ["none", "truth"], "none: no such file or folder"),
    "missing truth": (None, ["good", "none"], "none: no such file or folder"),
    "no truth": (None, ["good"], "good is a folder, which wants the folder of the truth"),
    "file and folder": (None, ["good/a.png", "truth"], "good/a.png is a file, but truth is a folder"),
    "folder and file": (None, ["good", "truth/a.png"], "good is a folder, but truth/a.png is a file"),
    "empty folder": (None, ["out", "truth"], "out: no label map in this folder"),
    "prediction lacks": (
        lambda: fewer("good", "a", "c"),
        ["good", "truth"],
        "good has no label map for 2 of the 3 names in both folders: a, c; --split LIST",
    ),
    "truth lacks": (lambda: fewer("truth", "b"), ["good", "truth"], "truth has no label map for 1 of the 3 names"),
    "two of one stem": (
        lambda: Image.new("L", (2, 2)).save("good/a.bmp"),
        ["good", "truth"],
        "a.bmp and a.png have one stem",
    ),
    "split lacks": (
        lambda: write("val.txt", "a\nd\n"),
        ["good", "truth", "--split", "val.txt"],
        "good has no label map for 1 of the 2 names of val.txt: d",
    ),
    "split twice": (
        lambda: write("val.txt", "a\nb\na\n"),
        ["good", "truth", "--split", "val.txt"],
        "val.txt has names more than once: a",
    ),
    "split missing": (None, ["good", "truth", "--split", "val.txt"], "val.txt: no such file"),
    "split folder": (None, ["good", "truth", "--split", "out"], "out: is a folder; wanted a list"),
    "split of files": (
        lambda: write("val.txt", "a"),
        ["good/a.png", "truth/a.png", "--split", "val.txt"],
        "a split chooses from folders",
    ),
    "list of three": (
        lambda: write("l.txt", "good/a.png truth/a.png x"),
        ["l.txt"],
        "l.txt, line 1: wanted two paths",
    ),
    "list of missing": (
        lambda: write("l.txt", "good/a.png truth/a.png\n\ngood/d.png truth/a.png"),
        ["l.txt"],
        "l.txt, line 3: good/d.png is missing",
    ),
    "list twice": (
        lambda: write("l.txt", "good/a.png truth/a.png\npoor/a.png truth/a.png"),
        ["l.txt"],
        "l.txt names a truth more than once: truth/a.png",
    ),
    "list empty": (lambda: write("l.txt", "\n"), ["l.txt"], "l.txt is empty"),
    "list is a picture": (None, ["good/a.png"], "good/a.png is no text"),
    "names missing": (None, ["good", "truth", "--names", "n.txt"], "n.txt"),
    "names empty": (lambda: write("n.txt", " \n"), ["good", "truth", "--names", "n.txt"], "n.txt is empty"),
    "names blank": (lambda: write("n.txt", "a\n\nb"), ["good", "truth", "--names", "n.txt"], "n.txt, line 2 is blank"),
    "names of others": (
        lambda: write("n.txt", "a\nb\n"),
        ["good", "truth", "--names", "n.txt", "--num-classes", "3"],
        "n.txt names 2 classes, but num_classes (--num-classes) is 3",
    ),
    "one name twice": (None, ["good", "truth", "--compare", "good"], "two methods are called good"),
    "other truth": (
        lambda: (
            fewer("poor", "a"),
            write("l.txt", "good/a.png truth/a.png"),
            write("m.txt", "poor/b.png truth/b.png"),
        ),
        ["l.txt", "--compare", "m.txt"],
        "l and m must have the same truth",
    ),
    "json": (None, ["good", "truth", "--json", "out/s.txt"], "must end in .json"),
    "curve": (None, ["good", "truth", "--curve", "out/s.jpg"], "must end in .png"),
    "curve over an input": (None, ["good", "truth", "--curve", "truth/a.png", "--overwrite"], "is an input"),
    "panels among inputs": (None, ["good", "truth", "--panels", "good", "--overwrite"], "good: holds inputs"),
    "panels are a file": (None, ["good", "truth", "--panels", "good/a.png"], "good/a.png: is a file"),
    "photos without panels": (None, ["good", "truth", "--images", "poor"], "photos (--images) are for panels"),
    "photos lack": (
        lambda: fewer("poor", "a"),
        ["good", "truth", "--panels", "p", "--images", "poor"],
        "poor has no photo for 1 of 3 predictions: a",
    ),
    "photos missing": (None, ["good", "truth", "--panels", "p", "--images", "none"], "none: no such folder"),
    "no folder": (None, ["good", "truth", "--json", "none/s.json"], "there is no folder none"),
    "width zero": (None, ["good", "truth", "--trimap", "0"], "widths must be ascending and lie in 1..1000, got '0'"),
    "widths backwards": (None, ["good", "truth", "--trimap", "4-2"], "got '4-2'"),
    "no width": (None, ["good", "truth", "--trimap", "1,x"], "wanted widths such as 1,2,5 or 1-40, got '1,x'"),
    "classes": (None, ["good", "truth", "--num-classes", "257"], "at most 256"),
    "method without a path": (None, ["good", "truth", "--compare", "x="], "wanted NAME=PATH, got 'x='"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_command_lines(scene, capsys, case):
    prepare, argv, message = BAD_LINES[case]
    if prepare:
        prepare()
    assert status(*argv) == 2
    heard = capsys.readouterr()
    assert message in heard.err.replace("\\", "/") and heard.out == "" and list(Path("out").iterdir()) == []


def test_names_of_methods(scene):
    assert named("good") == ("good", Path("good")) and named("truth/a.png") == ("a", Path("truth/a.png"))
    assert named("x=good") == ("x", Path("good")) and named("x=y=z") == ("x", Path("y=z"))
    Path("k=v").mkdir()
    assert named("k=v") == ("k=v", Path("k=v"))
    assert named(".")[0] == scene.name


def test_widths_mix():
    assert widths("1-3, 10,2") == (1, 2, 3, 10)


def test_scores_of_files_from_python(scene):
    scored = Scored(5, widths=(1, 2))
    assert [scored.add(*pair) for pair in match(Path("good"), Path("truth"))] == [None] * 3
    assert scored.everywhere.mean_iou == pytest.approx(count("good")["mean_iou"]) and scored.labels == 5
    before = scored.everywhere.counts.clone()
    Path("good/a.png").unlink()
    assert "good" in str(scored.add(Path("good/a.png"), Path("truth/a.png")))
    assert torch.equal(before, scored.everywhere.counts)
    with pytest.raises(ValueError, match="num_classes must be at least 5"):
        scored.shrink(4)
    assert Scored().labels == 0 and math.isnan(Scored().everywhere.mean_iou)


def test_a_submission_to_cityscapes_is_scored_as_its_server_would(tmp_path, monkeypatch, capsys):
    """Truth in folders of cities, as labelIds; void is most of them, and what is called there does not count."""
    monkeypatch.chdir(tmp_path)
    random, names = np.random.default_rng(0), ("bonn_000001_000019", "ulm_000000_000019")
    hits = total = 0

    def count_of(name: str) -> int:
        return int(np.isin(images.read_labels(f"gtFine/ulm/{name}_gtFine_labelIds.png"), [7, 26, 33]).sum())

    for name in names:
        truth = random.choice([0, 3, 7, 9, 26, 33], (6, 8)).astype(np.uint8)
        called = np.where(random.random(truth.shape) < 0.2, 11, truth)
        called[np.isin(truth, [0, 3, 9])] = 7
        counts = np.isin(truth, [7, 26, 33])
        hits, total = hits + int((called == truth)[counts].sum()), total + int(counts.sum())
        city = tmp_path / "gtFine" / name.split("_")[0]
        city.mkdir(parents=True)
        Image.fromarray(truth).save(city / f"{name}_gtFine_labelIds.png")
        Image.fromarray(truth).save(city / f"{name}_gtFine_color.png")  # beside them, and not asked for
        Path("called").mkdir(exist_ok=True)
        Path("photos").mkdir(exist_ok=True)
        Image.fromarray(called.astype(np.uint8)).save(f"called/{name}_labelIds.png")
        Image.new("RGB", (8, 6), (0, 0, 99)).save(f"photos/{name}_leftImg8bit.png")
    argv = ("called", "gtFine", "--dataset", "cityscapes", "--json", "s.json", "--panels", "p", "--images", "photos")
    assert status(*argv) == 0
    report = json.loads(Path("s.json").read_text())
    assert report["pixel_accuracy"] == pytest.approx(hits / total) and hits < total
    assert [row["name"] for row in report["classes"]][13] == "car" and len(report["classes"]) == 19
    assert "truck" in capsys.readouterr().out
    assert {path.name[2:] for path in Path("p").iterdir()} == {f"{name}.png" for name in names}
    assert status("called", "gtFine", "--dataset", "cityscapes", "--num-classes", "20") == 2
    assert "the data set names 19 classes" in capsys.readouterr().err
    Path("split.txt").write_text(f"{names[0]}_leftImg8bit.png\n{names[1]}\n")
    assert status(*argv[:4], "--split", "split.txt") == 0
    Image.fromarray(np.zeros((6, 8), np.uint8)).save(f"called/{names[1]}_labelIds.png")
    capsys.readouterr()
    assert status(*argv[:4]) == 1
    assert (
        f"{names[1]}_labelIds.png: {count_of(names[1])} pixels that count have the trainId 255"
        in capsys.readouterr().err
    )
    Path("called/ulm_000000_000019_labelIds.png").rename("called/ulm_000002_000019_labelIds.png")
    assert status("called", "gtFine", "--dataset", "cityscapes") == 2
    assert "called has no label map for 1 of the 3 names in both folders: ulm_000000_000019" in capsys.readouterr().err
    Path("called/x_labelIds.png").write_bytes(b"")
    assert status("called", "gtFine", "--dataset", "cityscapes") == 2
    assert "x_labelIds.png: wanted a name <city>_<seq, 6 digits>_<frame, 6 digits>" in capsys.readouterr().err
