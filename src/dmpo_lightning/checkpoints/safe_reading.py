"""Reads checkpoints without running what they hold, and says of those that could run something why they could.

A pickle can call any function of this machine. Files of torch are read with ``weights_only=True``, which makes tensors
and plain values alone. The folders of FSDP1 and FSDP2 are pickles in part, which torch itself reads without such care;
here they are read by name of what they may hold. DeepSpeed's folders cannot be read in this way.
"""

import enum
import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta

ALLOWED = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
    },
}
"""What the ``.metadata`` of a folder is made of. None of these does anything but hold values."""


def load_data(path: str | Path) -> dict[str, Any]:
    """A file of torch as data. Its tensors stay on the disk until they are used.

    Raises:
        ValueError: it is no such file, is damaged, holds more than data, or is no dictionary.
    """
    path = Path(path)
    # Opening a pipe would wait for somebody who writes into it.
    if not path.is_file():
        raise ValueError("it is no file")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"it holds more than data: {_first_line(error)}") from error
    # A file of anything else, or a damaged one, may raise any error of Python's and torch's.
    except Exception as error:
        raise ValueError(f"it is truncated, damaged or no checkpoint: {_first_line(error)}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"it holds no dictionary but {type(saved).__name__}")
    return saved


class SafeReader(FileSystemReader):
    """torch's reader of checkpoint folders, whose ``.metadata`` may hold nothing but descriptions of tensors."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """As torch does it.

        Raises:
            ValueError: it is damaged, or names anything else.
        """
        file = Path(self.path) / ".metadata"
        try:
            with file.open("rb") as stream:
                metadata = _DescriptionsOnly(stream).load()
        except pickle.UnpicklingError as error:
            raise ValueError(f".metadata {_first_line(error)}") from error
        # As in `load_data`.
        except Exception as error:
            raise ValueError(f".metadata is truncated or damaged: {_first_line(error)}") from error
        if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
            raise ValueError(".metadata does not say what the folder holds")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        return metadata


def why_unsafe(path: Path) -> str | None:
    """What would be executed, or is damaged, if a checkpoint were loaded in the usual way. None if it is data alone."""
    try:
        if not path.is_dir():
            load_data(path)
        elif is_deepspeed(path):
            return "DeepSpeed's checkpoints are unpickled, which can run any code"
        else:
            load_data(path / "meta.pt")
            _check_values(path, SafeReader(path).read_metadata())
    except ValueError as error:
        return str(error)
    return None


def is_deepspeed(path: Path) -> bool:
    """Whether a folder is one of DeepSpeed, which alone writes this file."""
    return (path / "latest").exists()


def names_in_pickle(file: Path) -> set[str]:
    """All texts in the pickle of a file of torch, which is read and not executed."""
    with zipfile.ZipFile(file) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        return {value for _, value, _ in pickletools.genops(archive.read(pickled)) if isinstance(value, str)}


def _check_values(folder: Path, metadata: Metadata) -> None:
    """Raises ValueError where a value that is no tensor, such as a learning rate, is more than data.

    Torch unpickles these without care when a strategy asks for them.
    """
    stored = metadata.storage_data if isinstance(metadata.storage_data, dict) else {}
    for index, place in stored.items():
        if not isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            continue
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"{index.fqn} is packed in a way that cannot be checked")
        with (folder / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            content = io.BytesIO(file.read(place.length))
        try:
            torch.load(content, map_location="cpu", weights_only=True)
        # As in `load_data`.
        except Exception as error:
            raise ValueError(f"{index.fqn} is more than data or damaged: {_first_line(error)}") from error


class _DescriptionsOnly(pickle.Unpickler):
    """Reads a pickle that names nothing but `ALLOWED` and torch's dtypes."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "builtins" and name == "getattr":
            return _enum_member
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"names {module}.{name}, which no description of tensors does")
        return super().find_class(module, name)


def _enum_member(owner: Any, name: str) -> Any:
    """What Python 3.11 calls `getattr` for: a member of an enumeration. Nothing else may be asked for."""
    if not (isinstance(owner, enum.EnumMeta) and name in owner.__members__):
        raise pickle.UnpicklingError(f"asks for {name} of {owner!r}")
    return owner.__members__[name]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
