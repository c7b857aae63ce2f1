"""Files of named tensors: Caffe's, PyTorch's and safetensors read, safetensors written.

What a file is, its first bytes say, and its name only where they do not: downloads are renamed too often.
A file with the wrong contents raises ValueError, what the system refuses (missing, no rights) OSError; both name it.
"""

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..images import PathLike, atomic_write
from .caffemodel import read_caffemodel

_WRAPPERS = ("state_dict", "model_state_dict", "model")  # where training scripts put the state dict of a network
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
_WANTED = "wanted .caffemodel, .safetensors, or a PyTorch state dict (.pth, .pt, .bin, .tar, .ckpt)"
_STRANGERS = {  # beginnings of what people have in place of weights
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (.caffemodel.h5, Keras)",
    b"version https://git-lfs": "a pointer of Git LFS; git lfs pull fetches the file",
    b"<!DOCTYPE": "a web page, so the download failed",
    b"<html": "a web page, so the download failed",
    b"\x1f\x8b": "a gzip archive, to be unpacked first",
}


def read(path: PathLike) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU.

    - Caffe: ``{layer}.{index}``, such as ``conv1_1.0`` and ``conv1_1.1``, float32; see `read_caffemodel`.
    - PyTorch: a state dict, also one level down under "state_dict", "model_state_dict" or "model"; "module." that all
      names begin with (DataParallel) is taken off, and entries that are no tensors are left out.
    - safetensors: as they are. They are mapped from the file, which `save` replaces but does not change.

    Raises:
        OSError: there is no such file, or it is a folder.
        ImportError: the library for this kind of file is not installed.
        ValueError: none of these kinds, damaged, without tensors, or a pickle of more than tensors, which is never
            loaded, since a pickle may run any code.
    """
    kind = _kind(path)
    if kind == "torch":
        return _read_torch(path)
    if kind == "safetensors":
        safetensors = want_safetensors()
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:  # KeyError: a newer dtype
            raise ValueError(f"{path}: cut short or damaged, or of a newer safetensors: {_brief(error)}") from None
    try:
        layers = read_caffemodel(path)
    except (ValueError, ImportError) as error:
        if Path(path).suffix.lower() == ".caffemodel":
            raise
        raise type(error)(f"{path}: neither zip, pickle nor safetensors, and as a Caffe model: {error}") from None
    return {f"{name}.{index}": blob for name, blobs in layers.items() for index, blob in enumerate(blobs)}


def read_metadata(path: PathLike) -> dict[str, str]:
    """The texts that `save` put into a safetensors file beside its tensors.

    Raises:
        OSError, ImportError, ValueError: as `read`; ValueError for a file of another kind, too.
    """
    if _kind(path) != "safetensors":
        raise ValueError(f"{path}: not a safetensors file; the other kinds have no metadata")
    safetensors = want_safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: cut short or damaged: {_brief(error)}") from None


def save(tensors: Mapping[str, Tensor], path: PathLike, metadata: Mapping[str, str] | None = None) -> None:
    """Write the tensors, of any device and dtype that safetensors knows, as a safetensors file, whole or not at all.

    Tensors that share memory are written one by one, so they come back equal but no longer shared.

    Raises:
        OSError: the folder is missing, ``path`` is a folder, or the disk refuses.
        ImportError: safetensors is not installed.
        ValueError: a name that does not end in .safetensors, no tensors, or tensors or metadata of another kind.
    """
    if Path(path).suffix.lower() != ".safetensors":
        raise ValueError(f"{path}: the name must end in .safetensors")
    if not tensors:
        raise ValueError(f"{path}: tensors is empty; wanted at least one")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":  # safetensors' own key
            raise ValueError(f"{path}: name {name!r} in tensors; wanted a string other than '__metadata__'")
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            got = f"{tensor.layout} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{path}: tensors[{name!r}] is {got}; wanted a dense tensor with data")
    for key, text in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise ValueError(f"{path}: metadata[{key!r}] is {text!r}; wanted strings")
    safetensors = want_safetensors()
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        # a view may be conjugate or negative without its bytes being so
        whole = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        storage = whole.untyped_storage().data_ptr()
        plain[name] = whole.clone() if storage in storages else whole  # safetensors refuses shared memory
        storages.add(storage)
    try:
        data = safetensors.torch.save(plain, None if metadata is None else dict(metadata))
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:  # KeyError: the dtype
        raise ValueError(f"{path}: safetensors cannot hold these tensors: {_brief(error)}") from error
    with atomic_write(path) as stream:
        stream.write(data)


def _kind(path: PathLike) -> str:
    """Which of "torch", "safetensors" and "caffe" it is: the last is what is left, as protobuf has no mark."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path}: is a folder; {_WANTED}")
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    with open(path, "rb") as stream:
        head = stream.read(32)
    if not head:
        raise ValueError(f"{path}: is empty; {_WANTED}")
    for start, what in _STRANGERS.items():
        if head.startswith(start):
            raise ValueError(f"{path}: is {what}; {_WANTED}")
    if head.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05]", head):
        return "torch"
    header = int.from_bytes(head[:8], "little")
    return "safetensors" if head[8:9] == b"{" and header <= _MAX_HEADER else "caffe"


def _read_torch(path: PathLike) -> dict[str, Tensor]:
    try:
        with open(path, "rb") as stream, warnings.catch_warnings():  # a stream, as torch would go by the name's ending
            warnings.simplefilter("ignore", UserWarning)  # of pickle protocol 3, which works, and of TorchScript
            content = torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"WeightsUnpickler error:\s*(.*?)(?: was not an allowed|\n|$)", str(error))
        raise ValueError(
            f"{path}: its pickle holds more than tensors or is damaged ({found[1] if found else _brief(error)}); it is "
            "not loaded, since a pickle may run any code. Convert it where it was made, or where it is trusted: "
            "torch.save(model.state_dict(), 'new.pth')"
        ) from None
    except OSError:
        raise
    except Exception as error:  # a damaged file gets as far into torch as it likes: EOFError, IndexError, RuntimeError
        raise ValueError(f"{path}: not a PyTorch file, or cut short or damaged: {_brief(error)}") from None
    tensors = _state_dict(content, path)
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _state_dict(content: Any, path: PathLike) -> dict[str, Tensor]:
    """The tensors of a loaded object that is a state dict or holds one under a name in _WRAPPERS."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}; wanted a state dict, names with tensors")
    wrapped = [key for key in _WRAPPERS if _has_tensors(content.get(key))]
    if len(wrapped) > 1:
        raise ValueError(f"{path}: state dicts under {wrapped}; wanted one, saved alone")
    entries = content[wrapped[0]] if wrapped else content
    if not _has_tensors(entries):
        keys = ", ".join(map(repr, list(entries)[:20])) + (", ..." if len(entries) > 20 else "")
        raise ValueError(f"{path}: no tensors under the keys {keys or '(none)'}; wanted a state dict, or {_WRAPPERS}")
    for name, tensor in entries.items():
        if isinstance(tensor, Tensor) and not isinstance(name, str):
            raise ValueError(f"{path}: a tensor is named {name!r}; wanted strings, as in a state dict")
    return {name: tensor.detach() for name, tensor in entries.items() if isinstance(tensor, Tensor)}


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in value.values())


def _brief(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def want_safetensors() -> Any:
    """The library that `save` and `load` need for our own files.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("safetensors files need the library safetensors: pip install 'crfnet[weights]'") from error
    return safetensors
