import builtins
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import crfnet
from crfnet import batch, doctor, images, refine
from crfnet.cli import main

REPOSITORY = Path(__file__).resolve().parents[1]
H, W = 20, 28
TRUTH = np.where(np.arange(W) < 12, 0, 15).astype(np.uint8)[None].repeat(H, 0)


def draw(folder: Path, name: str = "a", seed: int = 0) -> None:
    """A picture of two colours, and what a poor classifier makes of it: labels 0, 15 and void, and probabilities."""
    random = np.random.default_rng(seed)
    for kind in ("photos", "labels", "probs"):
        (folder / kind).mkdir(exist_ok=True)
    colours = np.where(TRUTH[..., None] == 0, [200, 60, 40], [40, 80, 190]) + random.integers(-8, 9, (H, W, 3))
    Image.fromarray(colours.astype(np.uint8)).save(folder / "photos" / f"{name}.png")
    labels = np.roll(TRUTH, 3, axis=1)
    labels[random.random((H, W)) < 0.1] = 15
    labels[:, 13:16] = 255
    images.write_labels(folder / "labels" / f"{name}.png", labels)
    probs = np.full((16, H, W), 0.1 / 14)
    probs[0] = np.where(np.roll(TRUTH, 3, axis=1) == 0, 0.6, 0.3)
    probs[15] = 0.9 - probs[0]
    np.save(folder / "probs" / f"{name}.npy", probs)


@pytest.fixture
def scene(tmp_path, monkeypatch):
    """The current folder, with one drawing in it, and an empty folder for what comes out."""
    monkeypatch.chdir(tmp_path)
    draw(tmp_path)
    (tmp_path / "out").mkdir()
    return tmp_path


def with_labels(*more: str) -> list[str]:
    return ["refine", "photos/a.png", "--labels", "labels/a.png", "-o", "out/a.png", *more]


def with_probs(*more: str) -> list[str]:
    return ["refine", "photos/a.png", "--probs", "probs/a.npy", "-o", "out/a.png", *more]


def written(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "out"))


def status(argv: list[str]) -> int:
    """The exit status, whether it is returned or, as argparse does, raised."""
    try:
        return main(argv)
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


# One picture


@pytest.mark.parametrize("argv", [with_labels(), with_probs()])
def test_edges_move_to_the_picture(scene, capsys, argv):
    assert main(argv) == 0
    with Image.open("out/a.png") as image:
        assert image.mode == "P" and image.getpalette() == images.voc_palette().ravel().tolist()
    assert (images.read_labels("out/a.png") == TRUTH).all()
    assert capsys.readouterr().out.startswith(f"out/a.png: {W} x {H}, 2 labels, ")


def test_layouts_and_types_of_probabilities_agree(scene):
    probs = np.load("probs/a.npy")
    assert main(with_probs("--save-probs", "out/first.npy")) == 0
    for name, other, flag in [
        ("last", np.moveaxis(probs, 0, -1), []),
        ("half", probs.astype(np.float16), []),
        ("single", np.asfortranarray(probs.astype(np.float32)), []),
        ("logits", 5 + np.log(probs), ["--logits"]),
    ]:
        np.save("probs/a.npy", other)
        assert main(with_probs("--overwrite", "--save-probs", f"out/{name}.npy", *flag)) == 0
        # float16 rounds a probability by 2^-11 of itself; ten iterations of this problem only pull marginals together
        gap = np.abs(np.load(f"out/{name}.npy") - np.load("out/first.npy")).max()
        assert gap <= (2**-9 if name == "half" else 1e-5), name


def test_panel_and_marginals(scene):
    assert main(with_labels("--panel", "out/look.png", "--save-probs", "out/q.npy")) == 0
    look, picture = images.read_image("out/look.png"), images.read_image("photos/a.png")
    assert look.shape == (H, 3 * W + 16, 3)
    assert (look[:, :W] == picture).all()
    before = images.overlay(picture, images.read_labels("labels/a.png"))
    after = images.overlay(picture, images.read_labels("out/a.png"))
    assert (look[:, W + 8 : 2 * W + 8] == before).all() and (look[:, 2 * W + 16 :] == after).all()
    q = np.load("out/q.npy")
    assert q.shape == (16, H, W) and q.dtype == np.float32  # channel = label, also of labels that do not occur
    np.testing.assert_allclose(q.sum(0), 1, atol=1e-5)
    assert (q.argmax(0) == images.read_labels("out/a.png")).all()
    assert written(scene) == ["a.png", "look.png", "q.npy"]


def test_options_reach_the_crf(scene, monkeypatch):
    seen = {}

    def spy(image, logits, **options):
        seen.update(options, image=image, logits=logits)
        return logits

    monkeypatch.setattr(refine, "dense_crf", spy)
    argv = with_labels("--theta-alpha", "80", "--theta-beta=13", "--theta-gamma=2", "--spatial-weight=1")
    argv += [
        "--bilateral-weight=4",
        "--iterations=7",
        "--normalization=symmetric",
        "--engine=exact",
        "--confidence=0.9",
    ]
    assert main(argv) == 0
    picture = images.read_image("photos/a.png")
    assert (seen.pop("image")[0].numpy() == picture.transpose(2, 0, 1)).all()
    q = seen.pop("logits")[0].softmax(0).numpy()
    labels = images.read_labels("labels/a.png")
    np.testing.assert_allclose(q[:, labels == 0][0], 0.9, rtol=1e-5)
    np.testing.assert_allclose(q[:, labels == 15][1], 0.9, rtol=1e-5)
    np.testing.assert_allclose(q[:, labels == 255], 0.5, rtol=1e-5)  # unknown: all labels alike
    assert seen == {
        "theta_alpha": 80.0,
        "theta_beta": 13.0,
        "theta_gamma": 2.0,
        "spatial_weight": 1.0,
        "bilateral_weight": 4.0,
        "num_iterations": 7,
        "normalization": "symmetric",
        "engine": "exact",
    }


def test_num_classes_admits_labels_that_do_not_occur(scene, monkeypatch):
    shapes = []

    def spy(image, logits, **options):
        shapes.append(tuple(logits.shape))
        return logits

    monkeypatch.setattr(refine, "dense_crf", spy)
    assert main(with_labels()) == 0
    assert main(with_labels("--overwrite", "--num-classes", "21", "--save-probs", "out/q.npy")) == 0
    assert shapes == [(1, 2, H, W), (1, 21, H, W)]  # by default no time is spent on labels that cannot win
    q = np.load("out/q.npy")[:, images.read_labels("labels/a.png") == 15]
    np.testing.assert_allclose(q[15], 0.7, rtol=1e-5)
    np.testing.assert_allclose(np.delete(q, 15, 0), 0.3 / 20, rtol=1e-5)


def test_ignore_label_marks_unknown_pixels(scene):
    scribble = np.full((H, W), 3, np.uint8)
    scribble[8:12, 2:5], scribble[8:12, 20:24] = 1, 2
    images.write_labels("labels/a.png", scribble)
    assert main(with_labels("--ignore-label", "3", "--theta-beta", "20")) == 0
    assert (images.read_labels("out/a.png") == np.where(TRUTH == 0, 1, 2)).all()


@pytest.mark.parametrize("argv", [with_labels(), with_labels("--num-classes", "1")])
def test_one_label_alone_stays(scene, argv):
    images.write_labels("labels/a.png", np.where(TRUTH == 15, 255, 0))
    assert main(argv) == 0
    assert (images.read_labels("out/a.png") == 0).all()


def test_refine_file_from_python(scene):
    done = refine.refine_file("photos/a.png", Path("out/a.png"), labels=Path("labels/a.png"), theta_alpha=80.0)
    labels, result = images.read_labels("labels/a.png"), images.read_labels("out/a.png")
    assert (done.width, done.height, done.labels) == (W, H, 2)
    assert done.changed == (labels != result)[labels != 255].mean() and done.seconds > 0
    with pytest.raises(ValueError, match="either probs or labels, got probs=None and labels=None"):
        refine.refine_file("photos/a.png", "out/b.png")
    with pytest.raises(FileExistsError, match=r"out.a\.png: exists"):
        refine.refine_file("photos/a.png", "out/a.png", labels="labels/a.png")


# Files that cannot be used: a message that names them, status 1, and nothing written


def cut(path: str) -> None:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])


def objects() -> None:
    np.save("probs/a.npy", np.array([{}, []], dtype=object), allow_pickle=True)


def archive() -> None:
    with open("probs/a.npy", "wb") as stream:
        np.savez(stream, q=np.zeros(3))


def spoiled(value: float) -> None:
    probs = np.load("probs/a.npy")
    probs[3, 4, 5] = value
    np.save("probs/a.npy", probs)


BAD_FILES = {
    "cut picture": (lambda: cut("photos/a.png"), with_labels(), r"photos.a\.png: .*(truncated|Truncated|broken)"),
    "no picture": (lambda: Path("photos/a.png").write_text("x"), with_labels(), r"photos.a\.png: not an image"),
    "large": (
        lambda: None,
        with_labels("--max-pixels", "500"),
        r"photos.a\.png: 28 x 20 = 560 pixels, more than max_pixels \(--max-pixels\) = 500$",
    ),
    "cut labels": (lambda: cut("labels/a.png"), with_labels(), r"labels.a\.png: "),
    "colours": (
        lambda: images.write_image("labels/a.png", images.read_image("photos/a.png")),
        with_labels(),
        r"labels.a\.png: a label map is an indexed or grey PNG, got RGB without a palette",
    ),
    "small labels": (
        lambda: images.write_labels("labels/a.png", TRUTH[:, :9]),
        with_labels(),
        r"labels.a\.png is 9 x 20 pixels, but photos.a\.png is 28 x 20 pixels",
    ),
    "all void": (
        lambda: images.write_labels("labels/a.png", 0 * TRUTH + 255),
        with_labels(),
        r"labels.a\.png: every pixel has the ignored label 255",
    ),
    "unsure": (lambda: None, with_labels("--confidence", "0.3"), r"photos.a\.png: confidence must lie in .*got 0\.3"),
    "too few classes": (
        lambda: None,
        with_labels("--num-classes", "15"),
        r"labels.a\.png: has label 15, but num_classes is 15",
    ),
    "other classes": (
        lambda: None,
        with_probs("--num-classes", "21"),
        r"probs.a\.npy: 16 classes, but num_classes is 21",
    ),
    "sizes": (
        lambda: np.save("probs/a.npy", np.full((2, H, W + 1), 0.5)),
        with_probs(),
        r"probs.a\.npy is of shape \(2, 20, 29\), but photos.a\.png is 28 x 20 pixels: wanted \(L, 20, 28\)",
    ),
    "flat": (
        lambda: np.save("probs/a.npy", np.full((H, W), 0.5)),
        with_probs(),
        r"probs.a\.npy: float64 of shape \(20, 28\); wanted floats \(L, H, W\)",
    ),
    "whole numbers": (
        lambda: np.save("probs/a.npy", np.ones((1, H, W), int)),
        with_probs(),
        r"probs.a\.npy: int64 of shape .*; wanted floats",
    ),
    "many": (
        lambda: np.save("probs/a.npy", np.full((257, H, W), 1 / 257)),
        with_probs(),
        r"probs.a\.npy: 257 classes; a label map holds 1 to 256",
    ),
    "logits": (
        lambda: np.save("probs/a.npy", 9 * np.load("probs/a.npy")),
        with_probs(),
        r"probs.a\.npy: values 0\.064.*\.\.5\.4 are no probabilities.*--logits",
    ),
    "sums": (
        lambda: np.save("probs/a.npy", 0.9 * np.load("probs/a.npy")),
        with_probs(),
        r"probs.a\.npy: probabilities must sum to 1 .* off by up to 0\.1",
    ),
    "nan": (lambda: spoiled(np.nan), with_probs(), r"probs.a\.npy: values must be finite"),
    "infinity": (lambda: spoiled(np.inf), with_probs("--logits"), r"probs.a\.npy: values must be finite"),
    "cut npy": (lambda: cut("probs/a.npy"), with_probs(), r"probs.a\.npy: not a whole \.npy file of numbers"),
    "empty npy": (lambda: Path("probs/a.npy").write_bytes(b""), with_probs(), r"probs.a\.npy: not a whole \.npy file"),
    "pickle": (objects, with_probs(), r"probs.a\.npy: not a whole \.npy file of numbers"),
    "archive": (archive, with_probs(), r"probs.a\.npy: an \.npz archive"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_named_and_nothing_is_written(scene, capsys, case):
    spoil, argv, said = BAD_FILES[case]
    spoil()
    assert main([*argv, "--panel", "out/look.png", "--save-probs", "out/q.npy"]) == 1
    heard = capsys.readouterr()
    assert re.search(said, heard.err), heard.err
    assert heard.err.count("\n") == 1 and heard.out == "" and written(scene) == []


# Command lines that cannot be meant: status 2 before anything is done

BAD_LINES = {
    "no source": (["refine", "photos/a.png", "-o", "out/a.png"], "--probs --labels is required"),
    "two sources": (with_labels("--probs", "probs/a.npy"), "not allowed with"),
    "no output": (["refine", "photos/a.png", "--labels", "labels/a.png"], "-o/--output"),
    "no command": ([], "COMMAND"),
    "missing picture": (
        ["refine", "none.png", "--labels", "labels/a.png", "-o", "out/a.png"],
        "none.png: no such file",
    ),
    "missing labels": (["refine", "photos/a.png", "--labels", "none.png", "-o", "out/a.png"], "none.png: no such file"),
    "file and folder": (["refine", "photos/a.png", "--labels", "labels", "-o", "out/a.png"], "but labels is a folder"),
    "folder and file": (["refine", "photos", "--labels", "labels/a.png", "-o", "out"], "but labels/a.png is a file"),
    "output is a folder": (["refine", "photos/a.png", "--labels", "labels/a.png", "-o", "out"], "but out is a folder"),
    "ending": (["refine", "photos/a.png", "--labels", "labels/a.png", "-o", "out/a.jpg"], "must end in .png"),
    "ending of marginals": (with_labels("--save-probs", "out/q.txt"), "must end in .npy"),
    "no such folder": (
        ["refine", "photos/a.png", "--labels", "labels/a.png", "-o", "none/a.png"],
        "there is no folder none",
    ),
    "one name twice": (with_labels("--panel", "out/../out/a.png"), "two outputs would have this name"),
    "empty folder": (["refine", "out", "--labels", "labels", "-o", "new"], "out: no picture in this folder"),
    "logits of labels": (with_labels("--logits"), "--logits speaks of --probs"),
    "engine": (with_labels("--engine", "magic"), "invalid choice: 'magic'"),
    "normalization": (with_labels("--normalization", "twice"), "invalid choice: 'twice'"),
    "zero width": (with_labels("--theta-alpha", "0"), "must be more than 0, got 0"),
    "nan width": (with_labels("--theta-beta", "nan"), "must be more than 0, got nan"),
    "infinite width": (with_labels("--theta-gamma", "inf"), "must be more than 0, got inf"),
    "no number": (with_labels("--theta-gamma", "wide"), "invalid number value: 'wide'"),
    "negative weight": (with_labels("--spatial-weight=-1"), "must be at least 0, got -1"),
    "sure": (with_labels("--confidence", "1"), "must be more than 0 and below 1, got 1"),
    "no worker": (with_labels("--workers", "0"), "must be at least 1, got 0"),
    "negative iterations": (with_labels("--iterations=-1"), "must be at least 0, got -1"),
    "half a class": (with_labels("--num-classes", "2.5"), "invalid whole value: '2.5'"),
    "many classes": (with_labels("--num-classes", "257"), "at least 1 and at most 256, got 257"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_command_lines(scene, capsys, case):
    argv, said = BAD_LINES[case]
    assert status(argv) == 2
    heard = capsys.readouterr()
    assert said.replace("/", os.sep) in heard.err or said in heard.err
    assert heard.out == "" and written(scene) == [] and not Path("new").exists()


# A user's files are never lost


def test_outputs_that_exist_are_kept_unless_told(scene, capsys):
    Path("out/a.png").write_text("precious")
    assert status(with_labels("--panel", "out/look.png")) == 2
    assert "a.png: exists" in capsys.readouterr().err
    assert Path("out/a.png").read_text() == "precious" and written(scene) == ["a.png"]
    assert main(with_labels("--overwrite")) == 0
    assert (images.read_labels("out/a.png") == TRUTH).all()


@pytest.mark.parametrize("target", ["photos/a.png", "labels/a.png", "link.png", "photos/../photos/a.png"])
def test_inputs_are_never_replaced(scene, capsys, target):
    if target == "link.png":
        os.symlink("photos/a.png", target)
    before = {path: path.read_bytes() for path in scene.rglob("*.*") if path.is_file()}
    assert status(["refine", "photos/a.png", "--labels", "labels/a.png", "-o", target, "--overwrite"]) == 2
    assert "is an input, which is never replaced" in capsys.readouterr().err
    assert status(["refine", "photos", "--labels", "labels", "-o", "photos", "--overwrite"]) == 2
    assert status(["refine", "photos", "--labels", "labels", "-o", "out", "--panel", "labels", "--overwrite"]) == 2
    assert {path: path.read_bytes() for path in scene.rglob("*.*") if path.is_file()} == before


@pytest.mark.parametrize("old", [False, True])
def test_outputs_come_together_or_not_at_all(scene, capsys, monkeypatch, old):
    if old:
        for name in ("a.png", "look.png", "q.npy"):
            Path("out", name).write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)  # the last of the three to be written
    assert main(with_labels("--panel", "out/look.png", "--save-probs", "out/q.npy", "--overwrite")) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert written(scene) == (["a.png", "look.png", "q.npy"] if old else [])
    assert all(Path("out", name).read_text() == "old" for name in written(scene))


def test_unforeseen_errors_name_the_picture(scene, capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(refine, "dense_crf", broken)
    assert main(with_labels()) == 1
    assert capsys.readouterr().err == f"crfnet: {Path('photos/a.png')}: RuntimeError: out of memory\n"
    assert written(scene) == []


# Folders


def folders(scene: Path, count: int = 4) -> list[str]:
    """Pictures a, b, c, d; b is cut short, c has no labels; and things that are no pictures."""
    for n, name in enumerate("abcd"[:count]):
        draw(scene, name, seed=n)
    cut("photos/b.png")
    os.remove("labels/c.png")
    Path("photos/notes.txt").write_text("no picture")
    Path("photos/.hidden.png").write_text("no picture")
    return ["refine", "photos", "--labels", "labels", "-o", "new/out", "--panel", "new/look"]


def test_folder_goes_on_past_bad_files(scene, capsys):
    assert main(folders(scene)) == 1
    heard = capsys.readouterr()
    assert heard.out == "2 of 4 pictures refined, 2 failed\n"
    assert str(Path("photos/b.png")) in heard.err
    assert f"crfnet: no labels for {Path('photos/c.png')}: wanted {Path('labels/c.png')}\n" in heard.err
    assert sorted(os.listdir("new/out")) == sorted(os.listdir("new/look")) == ["a.png", "d.png"]
    assert (images.read_labels("new/out/d.png") == TRUTH).all()
    assert status(["refine", "photos", "--labels", "labels", "-o", "new/out"]) == 2  # a.png exists


def test_folder_of_probabilities_without_tqdm(scene, capsys, monkeypatch):
    draw(scene, "b", seed=1)
    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "tqdm":
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["refine", "photos", "--probs", "probs", "-o", "out", "--save-probs", "q"]) == 0
    heard = capsys.readouterr()
    assert heard.out == "2 of 2 pictures refined\n"
    lines = heard.err.splitlines()
    assert [line[:5] for line in lines] == ["[1/2]", "[2/2]"] and "2 labels" in lines[1]
    assert written(scene) == ["a.png", "b.png"] and sorted(os.listdir("q")) == ["a.npy", "b.npy"]
    os.remove("probs/b.npy")
    assert main(["refine", "photos", "--probs", "probs", "-o", "out", "--overwrite"]) == 1
    assert f"no probabilities for {Path('photos/b.png')}: wanted {Path('probs/b.npy')}\n" in capsys.readouterr().err


def test_two_files_of_one_stem_are_not_guessed(scene, capsys):
    Image.new("RGB", (W, H)).save("photos/a.jpg")
    assert status(["refine", "photos", "--labels", "labels", "-o", "out"]) == 2
    assert "a.jpg and a.png have one stem" in capsys.readouterr().err and written(scene) == []


def test_workers_do_the_same(scene, capsys):
    argv = folders(scene)
    assert main(argv) == 1
    assert main([*argv[:5], "again", "--workers", "2"]) == 1
    assert capsys.readouterr().out == 2 * "2 of 4 pictures refined, 2 failed\n"
    assert sorted(os.listdir("again")) == ["a.png", "d.png"]
    for name in ("a.png", "d.png"):
        assert Path("again", name).read_bytes() == Path("new/out", name).read_bytes()


class Deadly:
    """Unpickling it ends the process: what the system does to a worker when memory runs out."""

    def __reduce__(self):
        return os._exit, (1,)

    def __str__(self):
        return "deadly.png"


def test_a_worker_that_dies_is_reported(scene):
    jobs = [{"image": Deadly(), "output": "out/a.png"}, {"image": Deadly(), "output": "out/b.png"}]
    outcomes = list(batch.run(jobs, workers=2))
    assert [result for _, result, _ in outcomes] == [None, None]
    assert all(reason.startswith("deadly.png: a worker process died") for _, _, reason in outcomes)


def test_an_interrupt_is_no_traceback(scene, capsys, monkeypatch):
    def stop(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "refine_file", stop)
    assert main(with_labels()) == 130
    assert capsys.readouterr().err == "crfnet: interrupted; files already written are whole\n"


def command(*argv: str, folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "crfnet", *argv],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.skipif(os.name == "nt", reason="process groups are POSIX")
def test_ctrl_c_stops_workers_and_leaves_whole_files(scene):
    for n in range(400):  # far more than are done before the interrupt
        for kind in ("photos", "labels"):
            os.link(f"{kind}/a.png", f"{kind}/n{n:03}.png")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and theirs
    process = command("refine", "photos", "--labels", "labels", "-o", "out", "--workers", "2", folder=scene)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 600
    while not written(scene) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "interrupted; files already written are whole" in errors
    assert 0 < len(written(scene)) < 400
    for name in written(scene):
        assert images.read_labels(scene / "out" / name).shape == (H, W)  # and no hidden leftovers, which would not read


# The rest of the command


def test_version_and_status_of_the_real_process(scene):
    version = command("--version", folder=scene)
    bad = command(*with_labels("--workers", "0"), folder=scene)
    assert version.communicate(timeout=600)[0] == f"crfnet {crfnet.__version__}\n" and version.returncode == 0
    assert "must be at least 1" in bad.communicate(timeout=600)[1] and bad.returncode == 2


def test_doctor_finds_nothing_wrong(capsys):
    assert main(["doctor"]) == 0
    heard = capsys.readouterr().out
    assert f"crfnet {crfnet.__version__} in " in heard and heard.endswith("everything works\n")
    assert f"torch {torch.__version__}" in heard
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    checks = {check["engine"]: check for check in report["engines"] if check["device"] == "cpu"}
    assert set(checks) == {"exact", "lattice", "auto", "grid"} and report["healthy"] is True
    assert all(0 < check["error"] <= check["limit"] for check in checks.values())
    assert checks["lattice"]["error"] > checks["exact"]["error"]  # an approximation is not taken for the truth


@pytest.mark.skipif(os.name == "nt", reason="broken pipes are POSIX")
@pytest.mark.parametrize("argv", [["doctor", "--json"], with_labels()])
def test_a_reader_that_goes_away_is_no_traceback(scene, argv):
    process = command(*argv, folder=scene)
    process.stdout.close()  # long before anything is printed
    assert process.stderr.read() == "" and process.wait(timeout=600) == 141
    process.stderr.close()


def test_doctor_tells_of_broken_and_of_wrong_engines(capsys, monkeypatch):
    sound = doctor._filter

    def faulty(engine, features, values):
        if engine == "exact":
            raise RuntimeError("no such instruction")
        return (1.1 if engine == "lattice" else 1.0) * sound(engine, features, values)

    monkeypatch.setattr(doctor, "_filter", faulty)
    assert main(["doctor"]) == 1
    heard = capsys.readouterr().out
    assert "BROKEN engine exact on cpu: RuntimeError: no such instruction" in heard
    assert "BROKEN engine lattice on cpu: relative error " in heard
    assert "ok     engine grid on cpu" in heard and "something is broken" in heard


@pytest.mark.gpu
def test_doctor_checks_the_gpu():
    checks = [check for check in doctor.examine()["engines"] if check["device"] == "cuda:0"]
    assert {check["engine"] for check in checks} == {"exact", "lattice", "auto", "grid"}
    assert [check for check in checks if not check["ok"]] == []


@pytest.mark.parametrize("name", ["voc_2007_000129", "voc_2007_000332", "voc_2007_000346", "voc_2007_001284"])
def test_a_real_photograph(data_root, tmp_path, name):
    """Labels of an eighth of the resolution, as a network gives them, come closer to the true ones."""
    photo, truth = data_root / "refine" / f"{name}.png", data_root / "refine" / f"{name}_labels.png"
    true = images.read_labels(truth)
    rows, columns = (np.arange(n) // 8 * 8 for n in true.shape)
    coarse = np.pad(true, [(0, 4), (0, 4)], mode="edge")[rows + 4][:, columns + 4]
    images.write_labels(tmp_path / "coarse.png", coarse)
    options = ["--theta-alpha=30", "--theta-beta=8", "--bilateral-weight=4", "--confidence=0.9", "--engine=lattice"]
    argv = ["refine", str(photo), "--labels", str(tmp_path / "coarse.png"), "-o", str(tmp_path / "fine.png"), *options]
    assert main(argv) == 0
    assert (images.read_labels(tmp_path / "fine.png") == true).mean() > (coarse == true).mean()
