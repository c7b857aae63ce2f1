"""Files of named tensors: what is written comes back to the bit, and nothing else comes back as if it were that.

The Caffe models are written by tests/caffe_writer.py, which shares no code with the reader.
"""

import io
import os
import pickle
import struct
import sys
import tracemalloc
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from caffe_writer import blob_bytes, integer, layer_bytes, net_bytes, shape_fields, sized, tag, write_caffemodel
from torch import Tensor

from crfnet.weights import files
from crfnet.weights.caffemodel import read_caffemodel

pytest.importorskip("google.protobuf")
pytest.importorskip("safetensors")

STATE = {"conv.weight": torch.arange(6.0).reshape(2, 3), "conv.bias": torch.tensor([1.0, -2.0])}


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def net() -> list[tuple[str, str, list[np.ndarray]]]:
    return [
        ("data", "Data", []),
        ("conv1_1", "Convolution", [draw(4, 3, 3, 3), draw(4, seed=1)]),
        ("inception_3a/1x1", "Convolution", [draw(2, 4, 1, 1, seed=2), draw(2, seed=3)]),
        ("relu", "ReLU", []),
        ("fc6", "InnerProduct", [draw(5, 8, seed=4), draw(5, seed=5)]),
    ]


def expected(*, legacy_shape: bool = False) -> dict[str, Tensor]:
    """What `files.read` gives for `net`; a legacy shape has ones before it."""
    return {
        f"{name}.{index}": torch.from_numpy(blob.reshape((1,) * (4 - blob.ndim) + blob.shape) if legacy_shape else blob)
        for name, _, blobs in net()
        for index, blob in enumerate(blobs)
    }


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(got) == list(wanted)
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape and got[name].device.type == "cpu"
        assert torch.equal(bits(got[name]), bits(tensor)), name


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refused(path: Path, *words: str) -> str:
    """The ValueError of `files.read`: it begins with the file's name and holds the words."""
    with pytest.raises(ValueError) as caught:
        files.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    for word in words:
        assert word in message
    return message


# Caffe models


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("legacy_shape", [False, True])
@pytest.mark.parametrize("options", [{}, {"with_diff": True}, {"doubles": True}, {"doubles": True, "with_diff": True}])
def test_caffemodel_comes_back_to_the_bit(tmp_path, version, legacy_shape, options):
    path = tmp_path / "net.caffemodel"
    write_caffemodel(path, net(), version=version, legacy_shape=legacy_shape, **options)
    assert_same(files.read(path), expected(legacy_shape=legacy_shape))
    layers = read_caffemodel(str(path))
    assert {name: len(blobs) for name, blobs in layers.items()} == {"conv1_1": 2, "inception_3a/1x1": 2, "fc6": 2}
    for blob in layers["fc6"]:
        blob.add_(1)  # the tensors are the caller's own, to train if he likes


@pytest.mark.parametrize("chunks", [2, 3, 7])
def test_packed_chunks_are_joined(tmp_path, chunks):
    assert_same(files.read(put(tmp_path / "a.caffemodel", net_bytes(net(), chunks=chunks))), expected())


def test_special_values_keep_their_bits(tmp_path):
    values = np.array([0x7FC00001, 0xFF800000, 0x80000000, 0x00000001], np.uint32).view(
        np.float32
    )  # NaN, -inf, -0, tiny
    path = tmp_path / "a.caffemodel"
    write_caffemodel(path, [("a", "Scale", [values])])
    assert files.read(path)["a.0"].numpy().tobytes() == values.tobytes()


def test_unknown_fields_are_skipped_anywhere(tmp_path):
    unknown = (
        integer(3000, -1)
        + sized(3001, b"\xff" * 9)
        + tag(3002, 5)
        + b"\xff" * 4
        + tag(3003, 1)
        + b"\xff" * 8
        + (tag(3004, 3) + integer(1, 5) + tag(3004, 4))  # a group
    )
    array = draw(2, 3)
    half = array.ravel().astype("<f4")
    blob = (
        unknown + sized(5, half[:4].tobytes()) + unknown + shape_fields((2, 3)) + sized(5, half[4:].tobytes()) + unknown
    )
    layer = unknown + sized(7, blob) + unknown + sized(1, "a") + unknown
    path = put(tmp_path / "a.caffemodel", unknown + sized(100, layer) + unknown)
    assert_same(files.read(path), {"a.0": torch.from_numpy(array)})


def test_dimensions_that_are_not_packed_are_read(tmp_path):
    blob = sized(7, integer(1, 2) + integer(1, 3)) + sized(5, draw(2, 3).tobytes())
    path = put(tmp_path / "a.caffemodel", layer_bytes("a", "Scale", [blob]))
    assert files.read(path)["a.0"].shape == (2, 3)


def test_a_blob_without_shape_is_a_scalar(tmp_path):
    path = put(tmp_path / "a.caffemodel", layer_bytes("a", "Scale", [sized(5, struct.pack("<f", 2.5))]))
    assert_same(files.read(path), {"a.0": torch.tensor(2.5)})


SIX = draw(6).astype("<f4").tobytes()


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        (shape_fields((2, 4)) + sized(5, SIX), ("6 numbers", "(2, 4)", "8")),
        (shape_fields((2, 4), legacy=True) + sized(5, SIX), ("6 numbers", "(1, 1, 2, 4)", "8")),
        (shape_fields((2, -3)) + sized(5, SIX), ("(2, -3)",)),
        (shape_fields((0, 1 << 62)) + sized(5, b""), (f"(0, {1 << 62})",)),
        (shape_fields((1,) * 2000) + sized(5, SIX[:4]), ("32 dimensions",)),
        (shape_fields((6,)) + sized(5, SIX[:-1]), ("23 bytes",)),
        (shape_fields((2,)) + sized(5, SIX[:6]) + sized(5, SIX[:2]), ("8 bytes",)),  # chunks cut a number in two
        (shape_fields((6,)) + b"".join(tag(5, 5) + SIX[k : k + 4] for k in range(0, 24, 4)), ("unpacked",)),
        (shape_fields((6,)) + integer(10, 2) + sized(12, SIX[:12]), ("NVCaffe",)),  # its float16
        (shape_fields((1,)) + sized(8, struct.pack("<d", 1e300)), ("too large for float32",)),
    ],
)
def test_a_wrong_blob_is_named(tmp_path, blob, words):
    layer = layer_bytes("fc/6", "InnerProduct", [blob_bytes(draw(3)), blob])
    refused(put(tmp_path / "a.caffemodel", layer), "'fc/6'", "blob 1", *words)


def test_layers_of_one_name(tmp_path):
    same, other = [("a", "Scale", [draw(3)])], [("a", "Scale", [draw(3, seed=1)])]
    empty = [("a", "Scale", [])]
    path = put(tmp_path / "a.caffemodel", net_bytes(same + empty + same))
    assert_same(files.read(path), {"a.0": torch.from_numpy(draw(3))})
    refused(put(tmp_path / "b.caffemodel", net_bytes(same + other)), "'a'", "different")
    refused(put(tmp_path / "c.caffemodel", net_bytes(same + [("a", "Scale", [draw(3), draw(3)])])), "'a'", "different")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (layer_bytes("a", "conv", [blob_bytes(draw(3))], version="v0"), ("V0", "upgrade_net_proto_binary")),
        (net_bytes(net(), version="v1") + layer_bytes("a", "Scale", [blob_bytes(draw(3))]), ("V1 and V2",)),
        (net_bytes([]), ("no layer in it",)),
        (net_bytes([("a", "ReLU", [])]), ("no layer has blobs", "definition")),
        (layer_bytes("", "Scale", [blob_bytes(draw(3))]), ("number 0", "no name")),
        (sized(100, sized(1, b"\xff\xfe") + sized(7, blob_bytes(draw(3)))), ("number 0", "UTF-8")),
        (b"layer { name: 'conv1' }\n", ("not a Caffe model",)),  # a prototxt
        (b"\x00" * 64, ("not a Caffe model",)),
        (bytes(range(1, 200)), ("not a Caffe model",)),
        (b"", ("is empty",)),
        (b"<!DOCTYPE html><html>404", ("web page",)),
        (b"version https://git-lfs.github.com/spec/v1\noid", ("git lfs pull",)),
        (b"\x89HDF\r\n\x1a\n" + b"\x00" * 64, ("HDF5",)),
    ],
)
def test_what_is_no_caffemodel_is_refused(tmp_path, content, words):
    refused(put(tmp_path / "a.caffemodel", content), *words)
    refused(put(tmp_path / "a.pth", content), *words)


def test_read_caffemodel_alone_refuses_an_empty_file(tmp_path):
    with pytest.raises(ValueError, match="no layer in it"):
        read_caffemodel(put(tmp_path / "a.caffemodel", b""))
    with pytest.raises(FileNotFoundError, match="missing"):
        read_caffemodel(tmp_path / "missing.caffemodel")


SMALL = [("conv1", "Convolution", [draw(2, 3, 1, 2), draw(2)]), ("bn", "Scale", [draw(3, 2, seed=1)])]
VARIANTS = [{}, {"version": "v1", "legacy_shape": True}, {"doubles": True}, {"with_diff": True, "chunks": 2}]


@pytest.mark.parametrize("options", VARIANTS)
def test_a_file_cut_anywhere_is_refused_or_holds_its_first_layers(tmp_path, options):
    content = net_bytes(SMALL, **options)
    whole = files.read(put(tmp_path / "whole.caffemodel", content))
    accepted = 0
    for size in range(len(content)):
        path = put(tmp_path / "cut.caffemodel", content[:size])
        try:
            got = files.read(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
        else:  # only between two layers, which protobuf cannot tell from the end
            assert_same(got, {name: whole[name] for name in list(whole)[:2]})
            accepted += 1
    assert accepted == 1


@pytest.mark.parametrize("options", VARIANTS)
def test_no_flipped_bit_crashes_or_changes_a_shape(tmp_path, options):
    content = net_bytes(SMALL, **options)
    path = tmp_path / "flip.caffemodel"
    whole = files.read(put(path, content))
    shapes = {tensor.shape for tensor in whole.values()}
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            got = files.read(put(path, bytes(flipped)))
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
            continue
        for name, tensor in got.items():  # a flip may change a value or a name, or hide a layer or blob from the reader
            assert tensor.shape in shapes and tensor.dtype == torch.float32, (bit, name)


def test_a_large_model_is_read_in_runs_of_bytes(tmp_path):
    layers = [(f"fc{k}", "InnerProduct", [draw(1000, 1000, seed=k), draw(1000)]) for k in range(8)]  # 32 MB
    path = tmp_path / "large.caffemodel"
    write_caffemodel(path, layers)
    size = path.stat().st_size
    tracemalloc.start()
    try:
        got = files.read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert torch.equal(got["fc7.0"], torch.from_numpy(layers[7][2][0]))
    assert peak < 2.5 * size  # as Python's floats the numbers alone would take eight times the size


# PyTorch's files


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".tar", ".ckpt", ".pth.tar"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {0: {"momentum": torch.ones(2)}}}},
        lambda state: {"model_state_dict": state},
        lambda state: {"model": state, "decay": torch.tensor(0.9)},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {**state, "epoch": 3, "note": "text", "nothing": None},
        lambda state: {name: torch.nn.Parameter(tensor) for name, tensor in state.items()},
    ],
)
def test_torch_files_and_their_wrappers(tmp_path, wrap, suffix, zipped):
    path = tmp_path / f"net{suffix}"
    torch.save(wrap(STATE), path, _use_new_zipfile_serialization=zipped)
    got = files.read(path)
    assert_same(got, STATE)
    assert not any(tensor.requires_grad for tensor in got.values())


def test_other_pickle_protocols(tmp_path):
    torch.save(STATE, tmp_path / "a.pth", pickle_protocol=3)  # torch warns of it, and reads it
    assert_same(files.read(tmp_path / "a.pth"), STATE)
    torch.save(STATE, tmp_path / "b.pth", pickle_protocol=4)
    try:
        assert_same(files.read(tmp_path / "b.pth"), STATE)
    except ValueError:  # up to torch 2.13 at least, its safe unpickler does not know this one
        refused(tmp_path / "b.pth", "Unsupported operand", "torch.save(")


def test_module_is_taken_off_only_where_all_have_it(tmp_path):
    state = {"module.a": torch.ones(1), "head.b": torch.ones(1)}
    torch.save(state, tmp_path / "a.pth")
    assert_same(files.read(tmp_path / "a.pth"), state)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.ones(3), ("Tensor", "state dict")),
        ([torch.ones(3)], ("list", "state dict")),
        ({"epoch": 3, "net": {"a": torch.ones(1)}}, ("'epoch', 'net'", "state_dict")),
        ({}, ("(none)",)),
        ({k: k for k in range(50)}, ("19, ...",)),
        ({0: torch.ones(1)}, ("named 0",)),
        ({"state_dict": STATE, "model": STATE}, ("'state_dict', 'model'",)),
    ],
)
def test_torch_files_without_a_state_dict(tmp_path, content, words):
    torch.save(content, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", *words)


class Malice:
    """When unpickled, makes the file ``marker``."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize("suffix", [".pth", ".caffemodel", ".safetensors", ".txt"])
@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_no_code_of_a_pickle_runs(tmp_path, how, suffix):
    marker, path = tmp_path / "marker", tmp_path / f"a{suffix}"
    content = {"state_dict": STATE, "extra": Malice(marker)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    refused(path, "may run any code", "model.state_dict()")
    assert not marker.exists()
    if how != "pickle":  # and it would have run
        torch.load(io.BytesIO(path.read_bytes()), weights_only=False)["extra"].close()
        assert marker.exists()


def test_the_object_that_stands_in_the_way_is_named(tmp_path):
    torch.save({"state_dict": STATE, "args": Namespace(lr=1)}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "argparse.Namespace", "more than tensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_cut_anywhere_is_refused(tmp_path, zipped):
    stream = io.BytesIO()
    torch.save(STATE, stream, _use_new_zipfile_serialization=zipped)
    content = stream.getvalue()
    for size in range(0, len(content), 5):
        refused(put(tmp_path / "cut.pth", content[:size]))


# safetensors


def awkward() -> dict[str, Tensor]:
    whole = torch.arange(12.0).reshape(3, 4)
    return {
        "half": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).half(),
        "bfloat": torch.tensor([1.5, float("nan"), -0.0]).bfloat16(),
        "double": torch.tensor([1e300, float("-inf")], dtype=torch.float64),
        "long": torch.tensor([[-(1 << 62), 3]]),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(4),
        "empty": torch.empty(0, 3),
        "whole": whole,
        "transposed": whole.T,  # not contiguous, and shares memory
        "row": whole[1],
        "again": whole,
        "channels last": torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "negative": torch.tensor([1 + 2j]).conj().imag,  # a view that negates bytes it does not own
        "expanded": torch.ones(1).expand(5),
        "Größe/1x1.0": torch.ones(1),
    }


def test_save_and_read_keep_every_bit(tmp_path):
    tensors = awkward()
    path = tmp_path / "a.safetensors"
    files.save(tensors, path, {"source": "net.caffemodel", "größe": "ü"})
    wanted = {name: tensor.detach().resolve_neg() for name, tensor in tensors.items()}
    got = files.read(path)
    assert_same({name: got[name] for name in wanted}, wanted)
    assert len(got) == len(wanted)
    assert files.read_metadata(path) == {"source": "net.caffemodel", "größe": "ü"}
    assert torch.equal(tensors["whole"], torch.arange(12.0).reshape(3, 4))  # not touched


def test_a_conjugate_view_is_saved_as_what_it_shows(tmp_path):
    path, view = tmp_path / "a.safetensors", torch.tensor([1 + 2j]).conj()
    try:
        files.save({"a": view}, path)
    except ValueError as error:  # safetensors 0.4 has no complex numbers
        assert "complex64" in str(error)
    else:
        assert torch.equal(files.read(path)["a"], torch.tensor([1 - 2j]))


def test_metadata_may_be_missing(tmp_path):
    files.save(STATE, tmp_path / "a.safetensors")
    assert files.read_metadata(tmp_path / "a.safetensors") == {}


@pytest.mark.gpu
def test_save_takes_tensors_from_the_gpu(tmp_path):
    files.save({name: tensor.cuda() for name, tensor in STATE.items()}, tmp_path / "a.safetensors")
    got = files.read(tmp_path / "a.safetensors")
    assert_same({name: got[name] for name in STATE}, STATE)


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({}, None, "empty"),
        ({"a": [1.0]}, None, r"\['a'\] is list"),
        ({1: torch.ones(1)}, None, "name 1"),
        ({"__metadata__": torch.ones(1)}, None, "__metadata__"),
        ({"a": torch.eye(2).to_sparse()}, None, "sparse_coo"),
        ({"a": torch.ones(1, device="meta")}, None, "meta"),
        ({"a": torch.ones(1, dtype=torch.complex128)}, None, "complex128"),
        ({"a": torch.ones(1)}, {"epoch": 3}, r"\['epoch'\] is 3"),
    ],
)
def test_save_says_what_it_cannot_hold(tmp_path, tensors, metadata, words):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=words) as caught:
        files.save(tensors, path, metadata)
    assert str(caught.value).startswith(f"{path}: ")
    assert path.read_bytes() == b"old"


def test_save_wants_its_suffix_and_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"a\.pth: the name must end in \.safetensors"):
        files.save(STATE, tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        files.save(STATE, tmp_path / "missing" / "a.safetensors")


def test_a_save_that_fails_midway_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    files.save(STATE, path)
    before = path.read_bytes()

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)  # the bytes are written by then, but to another name
        with pytest.raises(OSError, match="No space"):
            files.save({"other": torch.ones(1000)}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_tensors_that_were_read_survive_a_save_over_their_file(tmp_path):
    path = tmp_path / "a.safetensors"
    files.save(STATE, path)
    first = files.read(path)
    files.save({name: tensor + 1 for name, tensor in first.items()}, path)
    files.save(files.read(path), path)  # over the file it is mapped from
    assert all(torch.equal(first[name], STATE[name]) for name in STATE)
    assert all(torch.equal(files.read(path)[name], STATE[name] + 1) for name in STATE)


def test_a_safetensors_file_cut_or_flipped(tmp_path):
    path = tmp_path / "a.safetensors"
    files.save(STATE, path, {"a": "b"})
    content = path.read_bytes()
    for size in range(len(content)):
        refused(put(path, content[:size]))
    with pytest.raises(ValueError, match="damaged"):
        files.read_metadata(put(path, content[:-1]))
    shapes = sorted(tensor.shape for tensor in STATE.values())
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            got = files.read(put(path, bytes(flipped)))
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
        else:
            assert sorted(tensor.shape for tensor in got.values()) == shapes


# Which kind it is


@pytest.mark.parametrize("suffix", [".caffemodel", ".pth", ".safetensors", ".bin", ".weights", ""])
@pytest.mark.parametrize("kind", ["torch", "legacy", "safetensors", "caffe"])
def test_content_decides_whatever_the_name(tmp_path, kind, suffix):
    path, wanted = tmp_path / f"net{suffix}", STATE
    if kind == "caffe":
        wanted = expected()
        write_caffemodel(path, net())
    elif kind == "safetensors":
        files.save(STATE, tmp_path / "x.safetensors")
        os.replace(tmp_path / "x.safetensors", path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "torch")
    got = files.read(path)
    assert_same({name: got[name] for name in wanted}, wanted)
    assert len(got) == len(wanted)


def test_other_zip_files_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.ones(3))
    refused(tmp_path / "a.npz", "not a PyTorch file")


@pytest.mark.parametrize("read", [files.read, files.read_metadata])
def test_missing_files_and_folders(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"missing\.pth: there is no such file"):
        read(tmp_path / "missing.pth")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        read(tmp_path)


def test_metadata_of_another_kind_is_refused(tmp_path):
    torch.save(STATE, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: not a safetensors file"):
        files.read_metadata(tmp_path / "a.pth")


def test_missing_libraries_say_what_to_install(tmp_path, monkeypatch):
    write_caffemodel(tmp_path / "a.caffemodel", net())
    files.save(STATE, tmp_path / "a.safetensors")
    for name in ("google.protobuf", "safetensors"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (
        lambda: files.read(tmp_path / "a.caffemodel"),
        lambda: files.read(tmp_path / "a.safetensors"),
        lambda: files.read_metadata(tmp_path / "a.safetensors"),
        lambda: files.save(STATE, tmp_path / "b.safetensors"),
    ):
        with pytest.raises(ImportError, match=r"pip install 'crfnet\[weights\]'"):
            call()
    torch.save(STATE, tmp_path / "a.pth")
    assert_same(files.read(tmp_path / "a.pth"), STATE)  # needs neither
