"""Data for the experiments: IDX files (the format of MNIST), scikit-learn's tables. Nothing is downloaded.

An IDX file is big-endian: two zero bytes, a type code (8: unsigned byte), the number of dimensions, the sizes as
uint32, the data. `load_mnist` reads a folder of them, gzip-compressed or not.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments import require_extra

UNSIGNED_BYTE = 8
IMAGES = ("images", 3)
LABELS = ("labels", 1)


@dataclass(frozen=True)
class Dataset:
    """Samples: inputs (n, d) float32, pixels in [0, 1]; targets (n,) int64, or (n, d_out) float32 in a regression."""

    name: str
    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, indices: Tensor) -> Dataset:
        return Dataset(self.name, self.inputs[indices], self.targets[indices])

    def to(self, device: str) -> Dataset:
        return Dataset(self.name, self.inputs.to(device), self.targets.to(device))


def split(dataset: Dataset, seed: int, validation_fraction: float = 0.2) -> tuple[Dataset, Dataset]:
    """(training, validation) after a shuffle seeded with `seed`; of 60,000 samples 48,000 and 12,000."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    held_out = round(validation_fraction * len(dataset))
    return dataset.take(order[held_out:]), dataset.take(order[:held_out])


def load_digits() -> Dataset:
    """scikit-learn's 1,797 digits of 8×8 pixels, which come with the package."""
    inputs, targets = require_extra("sklearn.datasets").load_digits(return_X_y=True)
    return Dataset("scikit-learn digits", torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(targets).long())


def load_diabetes() -> Dataset:
    """scikit-learn's 442 diabetes patients, ten measurements and the progress of the disease a year later, as they are.

    It comes with the package; scikit-learn's larger regression tables are downloads.
    """
    inputs, targets = require_extra("sklearn.datasets").load_diabetes(return_X_y=True, scaled=False)
    columns = (torch.tensor(values, dtype=torch.float32) for values in (inputs, targets[:, None]))
    return Dataset("scikit-learn diabetes", *columns)


def standardise(train: Dataset, validation: Dataset) -> tuple[Dataset, Dataset]:
    """Both with mean 0 and variance 1 of every column of inputs and targets on `train`, for a regression."""
    moments = [(column.mean(dim=0), column.std(dim=0, correction=0)) for column in (train.inputs, train.targets)]

    def scaled(part: Dataset) -> Dataset:
        columns = zip((part.inputs, part.targets), moments, strict=True)
        return Dataset(part.name, *((values - mean) / deviation for values, (mean, deviation) in columns))

    return scaled(train), scaled(validation)


def load_mnist(folder: str | Path) -> Dataset:
    """The images and labels of a folder in MNIST's format, pixels scaled to [0, 1].

    Reads train-images-idx3-ubyte and train-labels-idx1-ubyte (each with or without .gz); where the folder has no train
    files, the t10k files, and the name of the data set says so.

    Raises:
        FileNotFoundError: no such folder or files.
        ValueError: a file is damaged or not in the format, or images and labels are not equally many.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    part = next((part for part in ("train", "t10k") if _find(folder, part, *IMAGES)), None)
    if part is None:
        raise FileNotFoundError(f"{folder} holds neither train-images-idx3-ubyte[.gz] nor t10k-images-idx3-ubyte[.gz]")
    images, labels = (_read_part(folder, part, *kind) for kind in (IMAGES, LABELS))
    if len(images) != len(labels):
        raise ValueError(f"{folder}: {len(images)} images but {len(labels)} labels in the {part} files")
    if len(images) == 0:
        raise ValueError(f"{folder}: the {part} files hold no image")
    inputs = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / 255)
    return Dataset(f"{folder.name} ({part} files)", inputs, torch.from_numpy(labels.astype(np.int64)))


def read_idx(path: str | Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file with `dimensions` dimensions, gzip-compressed or not.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not gzip though it begins so, another magic number, or not as many bytes as the header says.
    """
    path = Path(path)
    content = _decompressed(path)
    expected = bytes((0, 0, UNSIGNED_BYTE, dimensions))
    header_size = len(expected) + 4 * dimensions
    if content[:4] != expected:
        raise ValueError(f"{path.name}: magic number must be 0x{expected.hex()}, got 0x{content[:4].hex()}")
    if len(content) < header_size:
        raise ValueError(f"{path.name}: the header must have {header_size} bytes, got {len(content)}")
    shape = tuple(int(size) for size in np.frombuffer(content[4:header_size], dtype=">u4"))
    expected_size, size = int(np.prod(shape, dtype=object)), len(content) - header_size
    if size != expected_size:
        raise ValueError(f"{path.name}: shape {shape} needs {expected_size} bytes of data, got {size}")
    return np.frombuffer(content, dtype=np.uint8, offset=header_size).reshape(shape)


def _decompressed(path: Path) -> bytes:
    content = path.read_bytes()
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path.name}: damaged gzip file ({error})") from error


def _find(folder: Path, part: str, kind: str, dimensions: int) -> Path | None:
    stem = f"{part}-{kind}-idx{dimensions}-ubyte"
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def _read_part(folder: Path, part: str, kind: str, dimensions: int) -> np.ndarray:
    path = _find(folder, part, kind, dimensions)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no {part}-{kind}-idx{dimensions}-ubyte[.gz]")
    return read_idx(path, dimensions)
