# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the kd-lt authors
"""Data sets as whole tensors, and the long-tailed CIFAR subsets that the literature trains on.

Images are uint8 (N, 3, S, S), targets int64 (N,). S is 32, for own images a size from 16 to 128.
To copy the published subset: long_tail_counts, long_tail_indices and InputError. To copy Batches,
with its class-balanced sampler: normalise, _normalisation, MEAN and STD as well, and for distorted
colours distort_colour and _colour_space.
"""

import functools
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


def long_tail_counts(num_classes: int, max_count: int, imb: float, kind: str = "exp") -> list[int]:
    """Training images per class; class 0 has `max_count`, the last one 1 / `imb` of that.

    `exp` falls geometrically from class to class, `step` once, after the first half.
    """
    if kind not in ("exp", "step"):
        raise InputError(f"--imb-type must be exp or step, not {kind!r}")
    if not 1 <= imb <= max_count:  # false for nan, too
        raise InputError(f"--imb must lie in 1 .. {max_count} (the largest class), not {imb:g}")

    if kind == "exp":
        shares = [(1 / imb) ** (c / max(num_classes - 1, 1)) for c in range(num_classes)]
    else:
        shares = [1 if c < num_classes // 2 else 1 / imb for c in range(num_classes)]
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
    """Images and targets of cifar10 or cifar100 in file order; fetched into `root` if missing.

    Raises InputError if a file cannot be had or read or is not the original. None is overwritten.
    """
    folder, sha256 = Path(root, CIFAR_FOLDERS[name]), CIFAR_SHA256[name]
    missing = [file for file in sha256 if not os.path.lexists(folder / file)]
    if missing and Path(root, missing[0]).is_file():
        raise InputError(f"--data-dir {root}: name the folder above it, which holds {folder.name}")
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
    return torch.from_numpy(np.concatenate(images).reshape(-1, 3, 32, 32)), torch.tensor(targets)


def _download_cifar(name: str, folder: Path, missing: list[str]) -> None:
    url = CIFAR_URL + CIFAR_ARCHIVES[name]
    print(f"downloading {url} (about 170 MB)", file=sys.stderr, flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)  # before the download, because it may fail
        with urllib.request.urlopen(url, timeout=30) as response:
            archive = io.BytesIO(response.read())
        with tarfile.open(fileobj=archive, mode="r:gz") as tar:
            for file in missing:  # no path is ever made from a name in the archive
                raw = tar.extractfile(f"{folder.name}/{file}").read()
                if hashlib.sha256(raw).hexdigest() != CIFAR_SHA256[name][file]:
                    raise ValueError(f"{file} in it is not the original (its SHA-256 differs)")
                write_whole(folder / file, raw)
    except Exception as error:  # network, disk and archive fail in a dozen types
        raise InputError(
            f"cannot get {url}: {type(error).__name__}, {error}\nBy hand: unpack "
            f"it so that {folder} holds {', '.join(missing)}; --data-dir names the folder above it"
        ) from None


def load_npz(path: str | Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_train, y_train, x_test, y_test of a user's .npz file: uint8 (N, 3, S, S) and int64 (N,).

    In the file x may be (N, S, S, 3), too. All images have one S from 16 to 128; y holds 0..C-1,
    C >= 2, each class with a training image. Raises InputError for anything else, with the cure.
    """
    arrays = {}
    key = "the file"
    try:
        with np.load(path, allow_pickle=False) as archive:
            for key in NPZ_KEYS:
                arrays[key] = np.asarray(archive[key])
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen types for damaged files
        raise InputError(
            f"{path}: cannot read {key} ({error}); expected is a .npz file with the "
            f"arrays {', '.join(NPZ_KEYS)}, none of objects"
        ) from None

    result = []
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        problem = _image_problem(f"x_{split}", x) or _label_problem(f"y_{split}", y, len(x))
        if problem:
            raise InputError(f"{path}: {problem}")
        channels_first = x if x.shape[1] == 3 else x.transpose(0, 3, 1, 2)
        result.append(torch.from_numpy(np.ascontiguousarray(channels_first)))
        result.append(torch.from_numpy(y.astype(np.int64)))

    x_train, y_train, x_test, y_test = result
    train_size, test_size = x_train.shape[-1], x_test.shape[-1]
    if train_size != test_size:
        raise InputError(
            f"{path}: x_test has images of {test_size}x{test_size} pixels, x_train of "
            f"{train_size}x{train_size}: all must have one size"
        )

    classes = set(y_train.tolist())
    for c in range(max(len(classes), 2)):
        if c not in classes:
            raise InputError(f"{path}: y_train has no image of class {c}; classes are 0, 1, 2, ...")
    for label in y_test.tolist():
        if label not in classes:
            raise InputError(
                f"{path}: y_test has class {label}, y_train only 0..{len(classes) - 1}"
            )
    return x_train, y_train, x_test, y_test


def _image_problem(name: str, x: np.ndarray) -> str:
    """What is wrong with the images of this name, and the cure; "" where nothing is."""
    shape = x.shape
    if x.ndim == 3 or (x.ndim == 4 and 1 in (shape[1], shape[3])):
        return f"{name} holds grey images {shape}: repeat the channel, to (N, S, S, 3)"
    square = x.ndim == 4 and any(shape[1:] in ((3, s, s), (s, s, 3)) for s in range(16, 129))
    if not square:
        return f"{name} must be (N, S, S, 3) or (N, 3, S, S) with S in 16..128, not {shape}"
    if len(x) == 0:
        return f"{name} is empty: at least one image is needed"
    if x.dtype.kind == "f" and x.min() >= 0 and x.max() <= 1:
        return f"{name} must be uint8, not {x.dtype}: multiply by 255, then .astype('uint8')"
    if x.dtype != np.uint8:
        found = f" of {x.min():g}..{x.max():g}" if x.dtype.kind in "iuf" else ""
        return f"{name} must be uint8 of 0..255, not {x.dtype}{found}"
    return ""


def _label_problem(name: str, y: np.ndarray, count: int) -> str:
    """What is wrong with the labels of this name, of `count` images; "" where nothing is."""
    if y.shape == (count, 1):
        return f"{name} must be ({count},), not ({count}, 1): pass {name}[:, 0]"
    if y.dtype.kind not in "iu" or y.shape != (count,):
        return f"{name} must hold {count} integers, one an image, not {y.dtype} {y.shape}"
    if y.min() < 0:
        return f"{name} holds the label {y.min()}; classes are 0, 1, 2, ..."
    return ""


def synthetic(
    num_classes: int = 10, per_class: int = 200, test_per_class: int = 50, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Made-up x_train, y_train, x_test, y_test, balanced: each class a coarse pattern in noise."""
    result, generator = [], torch.Generator().manual_seed(seed)
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


def load_dataset(
    name: str, root: str | Path, imb: float, imb_type: str = "exp", subset_seed: int = 0
) -> Dataset:
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
        counts = long_tail_counts(len(available), max(available), imb, imb_type)
        rows = long_tail_indices(targets, counts, subset_seed)
        images, targets = images[rows], targets[rows]

    sha256 = hashlib.sha256()
    for tensor in (images, targets, *test):
        sha256.update(f"{tuple(tensor.shape)}".encode())
        sha256.update(tensor.numpy())
    return Dataset(images, targets, *test, counts, sha256.hexdigest()[:16])


# _normalisation and _colour_space return constants that are kept on each device, because a CUDA
# graph cannot hold a copy from the CPU. inference_mode(False) lets autograd use them, even where
# they were first asked for in inference mode.
@functools.cache
@torch.inference_mode(False)
def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    """scale and shift (3, 1, 1) that turn 0..255 into mean 0, standard deviation 1."""
    mean = torch.tensor(MEAN).view(3, 1, 1)
    std = torch.tensor(STD).view(3, 1, 1)
    return (1 / (255 * std)).to(device), (-mean / std).to(device)


def normalise(images: Tensor) -> Tensor:
    """(B, 3, H, W) of 0..255, uint8 or float -> float32 (x / 255 - mean) / std, per channel."""
    scale, shift = _normalisation(images.device)
    return torch.addcmul(shift, images.float(), scale)


@functools.cache
@torch.inference_mode(False)
def _colour_space(device: torch.device) -> tuple[Tensor, Tensor]:
    """luma (3,), the weights of a pixel's brightness; a quarter turn of its hue (3, 3), in YIQ."""
    yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    turn_i_to_q = torch.tensor([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    hue = torch.linalg.inv(yiq) @ turn_i_to_q @ yiq
    return yiq[0].to(device), hue.to(device)


def distort_colour(images: Tensor, draws: Tensor) -> Tensor:
    """SimCLR's colour distortion, each image by its own random numbers (CBD's "data_aug" teachers).

    images: (B, 3, H, W) of 0..255. draws: (B, 10), uniform in [0, 1). With probability 0.8
    brightness, contrast and saturation change by factors in [0.2, 1.8] and the hue turns by up to a
    fifth of the circle, in random order, clipped after each; then grey with probability 0.2. Each
    is a matrix and an offset, applied to a pixel's colour. Returns float32 (B, 3, H, W) of 0..255.
    """
    luma, hue = _colour_space(images.device)
    is_distorted = draws[:, 0] < 0.8
    is_grey = draws[:, 1] < 0.2
    factors = 1 + 0.8 * (2 * draws[:, 2:5] - 1)
    brightness, contrast, saturation = factors[:, :, None, None].unbind(1)  # (B, 1, 1) each
    angle = 0.4 * np.pi * (2 * draws[:, 5, None, None] - 1)
    order = draws[:, 6:10].argsort(1)[:, :, None, None]  # (B, 4, 1, 1)

    # Each of the four as a matrix (B, 3, 3), and an offset (B, 1, 1) times the image's mean luma.
    eye = torch.eye(3, device=images.device)
    zero = torch.zeros_like(contrast)
    matrices = [
        brightness * eye,
        contrast * eye,
        saturation * eye + (1 - saturation) * luma,
        luma + angle.cos() * (eye - luma) + angle.sin() * hue,
    ]
    offsets = [zero, 1 - contrast, zero, zero]
    matrices = torch.stack(matrices, 1).take_along_dim(order, 1)  # (B, 4, 3, 3)
    offsets = torch.stack(offsets, 1).take_along_dim(order, 1)  # (B, 4, 1, 1)

    original = images.float().permute(0, 2, 3, 1).flatten(1, 2)  # (B, H*W, 3)
    pixels = original
    for i in range(4):
        mean_luma = (pixels.mean(1) @ luma)[:, None, None]
        pixels = torch.baddbmm(mean_luma * offsets[:, i], pixels, matrices[:, i].mT).clamp(0, 255)
    pixels = torch.where(is_distorted[:, None, None], pixels, original)
    pixels = torch.where(is_grey[:, None, None], (pixels @ luma)[:, :, None], pixels)
    return pixels.unflatten(1, images.shape[2:]).permute(0, 3, 1, 2)


class Batches:
    """Shuffled, cropped, flipped, normalised training batches, made on the device by one gather.

    images uint8 (N, 3, S, S), targets int64 (N,). A crop is (S, S), of the image padded by S // 8.
    An epoch is N draws: sampler "instance" takes every image once, "class" draws with
    replacement so that every class is expected N / C times. colour adds distort_colour. shuffle()
    draws an epoch's random numbers on the CPU: a seed gives the same batches on every device.
    next() uses only tensors that keep their place: it can be captured in a CUDA graph.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        batch_size: int,
        device: torch.device | str,
        sampler: str,
        colour: bool = False,
    ):
        if sampler not in ("instance", "class"):
            raise ValueError(f'sampler must be "instance" or "class", not {sampler!r}')
        count, size = len(targets), images.shape[-1]
        if images.shape != (count, 3, size, size) or targets.ndim != 1:
            raise ValueError(
                "images and targets must be (N, 3, S, S) and (N,), not "
                f"{tuple(images.shape)} and {tuple(targets.shape)}"
            )
        padding = size // 8  # on each side: 4 for CIFAR's 32, as in the literature
        padded = F.pad(images.to(device), [padding] * 4)  # raw: pad, then normalise
        padded = torch.cat([padded, padded.flip(3)]).permute(0, 2, 3, 1).contiguous()
        # A view of every crop of every image and its mirror image, (2N, places, places, 3, S, S):
        # a batch is one gather, and comes out in channels_last. A padding of 4 gives 9 places.
        self.windows = padded.unfold(1, size, 1).unfold(2, size, 1)

        self.targets = targets.cpu()
        counts = self.targets.bincount().double()
        self.weights = 1 / counts[self.targets] if sampler == "class" else None

        # The epoch's random numbers; position says how many of its images are used.
        self.draws = torch.zeros(4, count, dtype=torch.int64, device=device)
        self.colours = torch.zeros(count, 10, device=device) if colour else None
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.offsets = torch.arange(min(batch_size, count), device=device)
        self.sizes = [len(part) for part in self.targets.split(batch_size)]

    def shuffle(self, generator: torch.Generator) -> None:
        """Draw the next epoch from a CPU generator."""
        count, places = len(self.targets), self.windows.shape[1]
        if self.weights is None:
            rows = torch.randperm(count, generator=generator)
        else:
            rows = torch.multinomial(self.weights, count, replacement=True, generator=generator)

        crop = torch.randint(2 * places**2, (count,), generator=generator)
        mirrored = crop // places**2
        top = crop // places % places
        left = crop % places
        self.draws.copy_(torch.stack([rows + count * mirrored, top, left, self.targets[rows]]))
        if self.colours is not None:
            self.colours.copy_(torch.rand(count, 10, generator=generator))
        self.position.zero_()

    def next(self, size: int) -> tuple[Tensor, Tensor]:
        """The next draws: images float32 (size, 3, S, S) in channels_last, targets (size,)."""
        index = self.position + self.offsets[:size]
        row, top, left, targets = self.draws[:, index]
        images = self.windows[row, top, left]
        if self.colours is not None:
            images = distort_colour(images, self.colours[index])
        self.position += size
        return normalise(images), targets
