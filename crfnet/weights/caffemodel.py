"""The blobs of each layer out of a ``.caffemodel``, without Caffe.

Such a file is one protobuf message, a NetParameter. Of Caffe's caffe.proto only this is wanted, the rest is skipped:

    NetParameter      layers = 2, V1LayerParameter (2013 to 2014);  layer = 100, LayerParameter (since)
    V1LayerParameter  layer = 1, V0LayerParameter (before 2013);  name = 4;  blobs = 6, BlobProto
    LayerParameter    name = 1;  blobs = 7, BlobProto
    BlobProto         num = 1, channels = 2, height = 3, width = 4, or shape = 7, BlobShape;  data = 5;  double_data = 8
    BlobShape         dim = 1

The numbers of a packed field lie in the file as one run of little-endian bytes, as a field of bytes does. So data and
double_data are declared bytes here, which makes one Python object a blob where floats would make one a number.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..images import PathLike

_SIDES = ("num", "channels", "height", "width")  # a shape of old, always of four dimensions
# (name, number, type); a capital type is a message, a star means repeated
_MESSAGES = {
    "NetParameter": [("layers", 2, "*V1LayerParameter"), ("layer", 100, "*LayerParameter")],
    "V1LayerParameter": [("layer", 1, "bytes"), ("name", 4, "bytes"), ("blobs", 6, "*BlobProto")],
    "LayerParameter": [("name", 1, "bytes"), ("blobs", 7, "*BlobProto")],
    "BlobProto": [
        *((side, number, "int64") for number, side in enumerate(_SIDES, 1)),
        ("data", 5, "*bytes"),
        ("shape", 7, "BlobShape"),
        ("double_data", 8, "*bytes"),
    ],
    "BlobShape": [("dim", 1, "*int64")],
}
_MAX_AXES = 32  # Caffe's own limit


def read_caffemodel(path: PathLike) -> dict[str, list[Tensor]]:
    """Layer name → its blobs, float32, in the order of the file; layers without blobs are left out.

    Takes twice the memory of the file, and once more that of the largest blob. Doubles are rounded to float32.

    Protobuf writes neither a length nor a check sum, so a file cut between two layers reads as the layers before the
    cut: whoever knows the network has to ask whether all are there.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: protobuf is not installed.
        ValueError: not a Caffe model, damaged, of the format V0, with blobs that do not fill their shape or that are
            stored otherwise than as packed floats or doubles, or with two different layers of one name.
    """
    layers: dict[str, list[Tensor]] = {}
    for number, layer in enumerate(_parse(path)):
        try:
            name = layer.name.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{path}: layer number {number} is named {layer.name[:40]!r}, wanted UTF-8") from None
        if not layer.blobs:
            continue
        if not name:
            raise ValueError(f"{path}: layer number {number} has blobs, but no name")
        blobs = [_blob(blob, f"{path}: layer {name!r}, blob {index}") for index, blob in enumerate(layer.blobs)]
        known = layers.setdefault(name, blobs)
        if known is not blobs and not _equal(known, blobs):
            raise ValueError(f"{path}: two layers are named {name!r} and have different blobs")
    if not layers:
        raise ValueError(f"{path}: no layer has blobs; wanted a trained model, not only the definition of one")
    return layers


def _parse(path: PathLike) -> Iterator[Any]:
    """The layers of the file, each with ``name`` and ``blobs``."""
    net_class, decode_error = _net_parameter()
    data = Path(path).read_bytes()
    try:
        net = net_class.FromString(data)
    except decode_error as error:
        raise ValueError(f"{path}: not a Caffe model, or cut short or damaged: {error}") from None
    del data  # protobuf has copied it
    if any(layer.HasField("layer") for layer in net.layers):
        raise ValueError(
            f"{path}: layers in the format V0 of 2013; Caffe's tool upgrade_net_proto_binary converts them"
        )
    if net.layers and net.layer:
        raise ValueError(f"{path}: layers in both formats, V1 and V2; wanted a model with one of them")
    if not net.layers and not net.layer:
        raise ValueError(f"{path}: not a Caffe model: there is no layer in it")
    yield from net.layers or net.layer


def _blob(blob: Any, where: str) -> Tensor:
    """One BlobProto as float32; ``where`` begins the errors."""
    # what Caffe's Blob::FromProto does: the four numbers before the shape, doubles before floats
    four = any(map(blob.HasField, _SIDES))
    shape = [getattr(blob, side) for side in _SIDES] if four else list(blob.shape.dim)
    if len(shape) > _MAX_AXES or min(shape, default=1) < 1:
        raise ValueError(f"{where}: shape {_text(shape)}, wanted at most {_MAX_AXES} dimensions of 1 or more")
    dtype = np.dtype("<f8" if blob.double_data else "<f4")
    chunks = list(blob.double_data or blob.data)  # once, as protobuf copies the bytes each time it is asked
    if not chunks:
        raise ValueError(
            f"{where}: no packed float or double data for shape {_text(shape)}; wanted what BVLC's Caffe writes, "
            "while float16, NVCaffe's raw data and unpacked floats are not read: save the model once more with it"
        )
    if any(len(chunk) % dtype.itemsize for chunk in chunks):
        raise ValueError(f"{where}: {sum(map(len, chunks))} bytes, wanted numbers of {dtype.itemsize} bytes each")
    numbers = np.frombuffer(b"".join(chunks), dtype)  # a single chunk is not copied
    if numbers.size != math.prod(shape):
        raise ValueError(f"{where}: {numbers.size} numbers, but shape {_text(shape)} wants {math.prod(shape)}")
    try:
        with np.errstate(over="raise", invalid="ignore"):  # NaN stays NaN
            return torch.from_numpy(numbers.astype(np.float32).reshape(shape))
    except FloatingPointError:
        raise ValueError(f"{where}: a double is too large for float32") from None


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether all bits agree, those of NaN too."""
    if [blob.shape for blob in some] != [blob.shape for blob in others]:
        return False
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(some, others, strict=True))


def _text(shape: list[int]) -> str:
    return f"({', '.join(map(str, shape[:_MAX_AXES]))}{', ...' if len(shape) > _MAX_AXES else ''})"


def _net_parameter() -> tuple[Any, type[Exception]]:
    """The message class of NetParameter, in a pool of its own lest it meet Caffe's, and what its parser raises."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
    except ImportError as error:
        raise ImportError("reading .caffemodel needs protobuf: pip install 'crfnet[weights]'") from error
    of = descriptor_pb2.FieldDescriptorProto
    types = {"bytes": of.TYPE_BYTES, "int64": of.TYPE_INT64}  # int32 has the same bytes, and some forks write int64
    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package="caffe", syntax="proto2")
    for message_name, fields in _MESSAGES.items():
        declared = file.message_type.add(name=message_name)
        for name, number, kind in fields:
            label, kind = of.LABEL_REPEATED if kind[0] == "*" else of.LABEL_OPTIONAL, kind.lstrip("*")
            field = declared.field.add(name=name, number=number, label=label, type=types.get(kind, of.TYPE_MESSAGE))
            if kind not in types:
                field.type_name = f".caffe.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("caffe.NetParameter")), message.DecodeError
