# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the kd-lt authors
"""Data sets as whole tensors, and the long-tailed CIFAR subsets that the literature trains on.

Images are uint8 (N, 3, S, S), targets int64 (N,). S is 32, for own images a size from 16 to 128.
To copy the published subset: long_tail_counts, long_tail_indices and InputError. To copy Batches,
with its class-balanced sampler: normalisation, MEAN and STD as well.
"""

import hashlib
import io
import os
import pickle
import sys
import tarfile
import urllib.request
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR_ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
# Of the original files, in the order in which they are joined.
CIFAR_SHA256 = {
    "cifar10": {
        "data_batch_1": "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd",
        "data_batch_2": "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8",
        "data_batch_3": "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9",
        "data_batch_4": "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b",
        "data_batch_5": "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154",
        "test_batch": "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831",
    },
    "cifar100": {
        "train": "735e79b04f092ca3d2e6d07f368c0a7d70d48c48d28865950cc24454cf45129b",
        "test": "4b67687d9933c4db8f0831104447f15b93774f4f464bd0516f0f0f2ac83b7864",
    },
}
NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
SIZES = range(16, 129)  # of own images
# The literature's, for both sets.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)


class InputError(Exception):
    """Something the user gave is wrong: a flag, a file or a folder. Shown without a traceback."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file of another name and rename it: `path` is never half a file. Raises OSError.

    The other name is new, so that no link that somebody laid there is followed.
    """
    partial = path.with_name(f"{path.name}.{os.urandom(8).hex()}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:  # also after Ctrl-C
        partial.unlink(missing_ok=True)


def long_tail_counts(num_classes: int, max_count: int, imb: float) -> list[int]:
    """Training images per class, falling geometrically: max_count in class 0, the last 1 / imb."""
    if not 1 <= imb <= max_count:  # false for nan, too
        raise InputError(f"--imb must lie in 1 .. {max_count} (the largest class), not {imb:g}")

    shares = [(1 / imb) ** (c / max(num_classes - 1, 1)) for c in range(num_classes)]
    # Truncated, as published, not rounded. At least 1: 49 * (1 / 49) is 0.99... in float64.
    return [max(int(max_count * share), 1) for share in shares]


def long_tail_indices(targets: Tensor | np.ndarray, counts: list[int], seed: int = 0) -> Tensor:
    """Rows (int64) of the first counts[c] images of each class c, after a shuffle of its rows.

    With seed 0 and CIFAR's own order these are the images of LDAM-DRW, BKD and their successors.
    Smaller counts give a subset. Raises InputError if a class has fewer images than wanted.
    """
    targets = torch.as_tensor(targets).cpu().numpy()
    rng = np.random.RandomState(seed)  # private: the published code reseeds NumPy's global one
    chosen = []
    for c, count in enumerate(counts):
        rows = np.flatnonzero(targets == c)
        if not 0 <= count <= len(rows):
            raise InputError(
                f"class {c} has {len(rows)} training images, --imb wants {count}; "
                "--imb 1 takes a .npz file as it is"
            )
        rng.shuffle(rows)
        chosen.append(rows[:count])
    return torch.from_numpy(np.concatenate(chosen))


def load_cifar(name: str, root: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """Images and targets of cifar10 or cifar100 in file order.

    The files lie in `root` or in its folder of the usual name, and are downloaded there if they are
    missing. Raises InputError for a file that cannot be read or is not the original.
    """
    sha256 = CIFAR_SHA256[name]
    folder = Path(root, CIFAR_FOLDERS[name])
    if all(Path(root, file).is_file() for file in sha256):
        folder = Path(root)
    missing = [file for file in sha256 if not (folder / file).exists()]
    if missing:
        _download_cifar(name, folder, missing)

    images, targets = [], []
    for file in [file for file in sha256 if ("test" in file) != train]:
        try:
            raw = (folder / file).read_bytes()
            if hashlib.sha256(raw).hexdigest() != sha256[file]:
                raise OSError("not the original CIFAR file, its SHA-256 differs")
        except OSError as error:
            raise InputError(
                f"{folder / file}: {error}. Make it readable, or delete it to have it downloaded"
            ) from None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy 2.4 warns of how these old files name a dtype
            batch = pickle.loads(raw, encoding="latin1")  # the very bytes that were checked
        images.append(batch["data"])
        targets += batch["labels" if name == "cifar10" else "fine_labels"]
    images = torch.from_numpy(np.concatenate(images).reshape(-1, 3, 32, 32))
    return images, torch.tensor(targets, device="cpu")


def _download_cifar(name: str, folder: Path, missing: list[str]) -> None:
    url = CIFAR_URL + CIFAR_ARCHIVES[name]
    print(f"downloading {url} (about 170 MB)", file=sys.stderr, flush=True)
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            archive = io.BytesIO(response.read())
        with tarfile.open(fileobj=archive, mode="r:gz") as tar:
            for file in missing:  # no path is ever made from a name in the archive
                raw = tar.extractfile(f"{CIFAR_FOLDERS[name]}/{file}").read()
                if hashlib.sha256(raw).hexdigest() != CIFAR_SHA256[name][file]:
                    raise ValueError(f"{file} in it is not the original (its SHA-256 differs)")
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(folder / file, raw)
    except Exception as error:  # network, disk and archive fail in a dozen types
        raise InputError(
            f"cannot get {url}: {type(error).__name__}, {error}. By hand: unpack it so that "
            f"{folder} holds {', '.join(missing)}; --data-dir names the folder above it"
        ) from None


def load_npz(path: str | Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_train, y_train, x_test, y_test of a user's .npz file: uint8 (N, 3, S, S) and int64 (N,).

    In the file x may be (N, S, S, 3), too, or grey, without channels or with one, and y (N, 1), of
    any integer type. All images have one S from 16 to 128; y_train holds each of 0 .. C-1, C >= 2.
    Raises InputError for anything else.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in NPZ_KEYS}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen types for damaged files
        raise InputError(
            f"{path}: cannot be read ({error}); expected is a .npz file with the arrays "
            f"{', '.join(NPZ_KEYS)}, none of objects"
        ) from None

    result = []
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if x.ndim == 3:
            x = x[..., None]  # grey
        if x.ndim == 4 and x.shape[1] not in (1, 3):
            x = x.transpose(0, 3, 1, 2)
        is_square = x.ndim == 4 and any(x.shape[1:] == (c, s, s) for c in (1, 3) for s in SIZES)
        if x.dtype != np.uint8 or not is_square or len(x) == 0:
            raise InputError(
                f"{path}: x_{split} must be uint8 of 0..255 and (N, S, S, 3) with S in "
                f"{SIZES[0]}..{SIZES[-1]}, not {x.dtype} {arrays[f'x_{split}'].shape}"
            )
        if y.dtype.kind not in "iu" or y.shape not in ((len(x),), (len(x), 1)):
            raise InputError(
                f"{path}: y_{split} must be {len(x)} integers, one for each image of x_{split}, "
                f"not {y.dtype} {y.shape}"
            )
        result.append(torch.from_numpy(x).expand(-1, 3, -1, -1).contiguous())
        result.append(torch.from_numpy(y.reshape(-1).astype(np.int64)))

    x_train, y_train, x_test, y_test = result
    if x_train.shape[1:] != x_test.shape[1:]:
        raise InputError(
            f"{path}: all images must have one size, not {x_train.shape[-1]} in x_train and "
            f"{x_test.shape[-1]} in x_test"
        )
    classes = y_train.unique().tolist()
    if len(classes) < 2 or classes != list(range(len(classes))):
        raise InputError(
            f"{path}: y_train must hold each of the classes 0 .. C-1, at least two, not "
            f"{classes[0]}..{classes[-1]}, of which {len(classes)} are there"
        )
    if not 0 <= y_test.min() <= y_test.max() < len(classes):
        raise InputError(
            f"{path}: y_test must hold the classes 0 .. {len(classes) - 1} of y_train, not "
            f"{y_test.min()}..{y_test.max()}"
        )
    return x_train, y_train, x_test, y_test


def synthetic(
    num_classes: int = 10, per_class: int = 200, test_per_class: int = 50, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Made-up x_train, y_train, x_test, y_test, balanced: each class a coarse pattern in noise."""
    result, generator = [], torch.Generator().manual_seed(seed)
    with torch.device("cpu"):
        patterns = F.interpolate(torch.randn(num_classes, 3, 4, 4, generator=generator), size=32)
        for count in (per_class, test_per_class):
            targets = torch.arange(num_classes).repeat_interleave(count)
            noise = torch.randn(len(targets), 3, 32, 32, generator=generator)
            images = 128 + 40 * patterns[targets] + 80 * noise
            result += [images.clamp(0, 255).to(torch.uint8), targets]
    return tuple(result)


class Dataset(NamedTuple):
    """Training images, long-tailed, and test images, balanced unless they are the user's own."""

    train_images: Tensor  # (N, 3, S, S) uint8
    train_targets: Tensor  # (N,) int64
    test_images: Tensor
    test_targets: Tensor
    class_counts: list[int]
    digest: str  # of all four tensors: says which data it is, whatever the file is called


def load_dataset(name: str, root: str | Path, imb: float) -> Dataset:
    """cifar10, cifar100, synthetic or a .npz file, its training part thinned to imbalance `imb`.

    A .npz file with `imb` 1 stays as it is: own class counts, own order. Raises InputError.
    """
    own_file = str(name).endswith(".npz")

    if name in CIFAR_ARCHIVES:
        images, targets, *test = *load_cifar(name, root, True), *load_cifar(name, root, False)
    elif own_file:
        images, targets, *test = load_npz(name)
    elif name == "synthetic":
        images, targets, *test = synthetic()
    else:
        raise InputError(f"--dataset must be cifar10, cifar100, synthetic or a .npz, not {name!r}")

    counts = available = targets.bincount().tolist()
    if imb != 1 or not own_file:
        counts = long_tail_counts(len(available), max(available), imb)
        rows = long_tail_indices(targets, counts)
        images, targets = images[rows], targets[rows]

    sha256 = hashlib.sha256()
    for tensor in (images, targets, *test):
        sha256.update(f"{tuple(tensor.shape)}".encode())
        sha256.update(tensor.numpy())
    return Dataset(images, targets, *test, counts, sha256.hexdigest()[:16])


def normalisation(device: torch.device | str) -> tuple[Tensor, Tensor]:
    """scale and shift (3, 1, 1) that turn 0..255 into mean 0, standard deviation 1."""
    mean = torch.tensor(MEAN, device="cpu").view(3, 1, 1)
    std = torch.tensor(STD, device="cpu").view(3, 1, 1)
    return (1 / (255 * std)).to(device), (-mean / std).to(device)


def normalise(images: Tensor) -> Tensor:
    """(B, 3, H, W) of 0..255, uint8 or float -> float32 (x / 255 - mean) / std, per channel."""
    scale, shift = normalisation(images.device)
    return torch.addcmul(shift, images.float(), scale)


class Batches:
    """Shuffled, cropped, flipped, normalised training batches, made on the device by one gather.

    images uint8 (N, 3, S, S), targets integers (N,). A crop is (S, S), of the image padded by
    S // 8. An epoch is N draws: sampler "instance" takes every image once, "class" draws with
    replacement so that every class is expected N / C times. With flip, half of the draws are
    mirrored. shuffle() draws an epoch's random numbers on the CPU: a seed gives the same batches on
    every device. next() uses only tensors that keep their place: a CUDA graph can record it.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        batch_size: int,
        device: torch.device | str,
        sampler: str,
        flip: bool = True,
    ):
        if sampler not in ("instance", "class"):
            raise ValueError(f'sampler must be "instance" or "class", not {sampler!r}')
        count, size = len(targets), images.shape[-1]
        is_uint8 = images.dtype == torch.uint8
        if images.shape != (count, 3, size, size) or targets.ndim != 1 or not is_uint8:
            raise ValueError(
                "images and targets must be (N, 3, S, S) uint8 and (N,), not "
                f"{tuple(images.shape)} {images.dtype} and {tuple(targets.shape)}"
            )
        # The padded images, and behind them their mirror images. Raw: pad, then normalise.
        padding = size // 8  # on each side: 4 for CIFAR's 32, as in the literature
        width = size + 2 * padding
        inside = slice(padding, padding + size)
        copies = 2 if flip else 1
        padded = torch.zeros(copies * count, width, width, 3, dtype=torch.uint8, device=device)
        padded[:count, inside, inside] = images.permute(0, 2, 3, 1)
        if flip:
            padded[count:] = padded[:count].flip(2)
        # A view of all their crops, (copies N, places, places, 3, S, S): a batch is one gather, and
        # comes out in channels_last. A padding of 4 gives 9 places.
        self.windows = padded.unfold(1, size, 1).unfold(2, size, 1)

        self.targets = targets.cpu().long()
        counts = self.targets.bincount().double()
        self.weights = 1 / counts[self.targets] if sampler == "class" else None

        # The epoch's random numbers; position says how many of its images are used: all, before the
        # first shuffle.
        self.draws = torch.zeros(4, count, dtype=torch.int64, device=device)
        self.position = torch.tensor(count, device=device)
        self.offsets = torch.arange(min(batch_size, count), device=device)
        self.sizes = [len(part) for part in self.targets.split(batch_size)]
        self.scale, self.shift = normalisation(device)

    def shuffle(self, generator: torch.Generator) -> None:
        """Draw the next epoch from a CPU generator."""
        count, places = len(self.targets), self.windows.shape[1]
        copies = len(self.windows) // count
        with torch.device("cpu"):
            if self.weights is None:
                rows = torch.randperm(count, generator=generator)
            else:
                rows = torch.multinomial(self.weights, count, replacement=True, generator=generator)
            crop = torch.randint(copies * places**2, (count,), generator=generator)

        # One number per draw holds the copy, mirrored or not, and the place of the crop in it.
        mirrored = crop // places**2
        top = crop // places % places
        left = crop % places
        self.draws.copy_(torch.stack([rows + count * mirrored, top, left, self.targets[rows]]))
        self.position.zero_()

    def next(self, size: int) -> tuple[Tensor, Tensor]:
        """The next draws: images float32 (size, 3, S, S) in channels_last, targets (size,)."""
        row, top, left, targets = self.draws[:, self.position + self.offsets[:size]]
        images = self.windows[row, top, left].float()
        self.position += size
        return torch.addcmul(self.shift, images, self.scale), targets
