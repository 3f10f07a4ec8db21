# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the kd-lt authors
"""Data sets as whole tensors, and the long-tailed CIFAR subsets that the literature trains on.

Images are uint8 (N, 3, 32, 32), targets int64 (N,). Training images are thinned, test images never.
"""
import errno
import functools
import gzip
import hashlib
import http.client
import math
import os
import pickle
import secrets
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR_ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
CIFAR_SHA256 = {  # of the original files, in the order in which they are concatenated
    "cifar10": {
        "data_batch_1": "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd",
        "data_batch_2": "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8",
        "data_batch_3": "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9",
        "data_batch_4": "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b",
        "data_batch_5": "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154",
        "test_batch": "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831",
        "batches.meta": "f962466ef690d46b226450fb9aadc74ba4bc64a76aa526b5827fe4bc5c7125cb",
    },
    "cifar100": {
        "train": "735e79b04f092ca3d2e6d07f368c0a7d70d48c48d28865950cc24454cf45129b",
        "test": "4b67687d9933c4db8f0831104447f15b93774f4f464bd0516f0f0f2ac83b7864",
        "meta": "a5d4786345c961390f865e93b434dbd5c6904ce880667e0cb888c97d449f28b9",
    },
}
MAX_BYTES = 200 << 20  # of an archive (162 MiB is normal) and of a file in it (148 MiB)
ATTEMPTS, PAUSE, TIMEOUT = 3, 2.0, 30.0  # of a download; seconds
NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")


class InputError(Exception):
    """Something the user gave is wrong: a flag, a file or a folder. Shown without a traceback."""


def write_whole(path: Path, content: bytes, suffix: str = ".partial") -> None:
    """Write beside and rename: the name never stands for half a file, whenever the power fails."""
    partial = path.with_name(path.name + suffix)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:  # also after Ctrl-C
        partial.unlink(missing_ok=True)


# ---- long-tailed subsets

def class_counts(num_classes: int, max_count: int, imb: float, kind: str = "exp") -> list[int]:
    """Training images per class; class 0 has `max_count`, the last one 1 / `imb` of that.

    `exp` falls geometrically from class to class, `step` once, after the first half.
    """
    if kind not in ("exp", "step"):
        raise InputError(f"--imb-type must be exp or step, not {kind!r}")
    if num_classes < 1 or max_count < 1:
        raise ValueError(f"need num_classes, max_count >= 1, not {num_classes}, {max_count}")
    if not 1 <= imb <= max_count:  # nan too
        raise InputError(f"--imb must lie in 1 .. {max_count} (the images of the largest class, or "
                         f"the smallest would have none), not {imb:g}")
    if kind == "exp":
        shares = [(1 / imb) ** (c / max(num_classes - 1, 1)) for c in range(num_classes)]
    else:
        shares = [1 if c < num_classes // 2 else 1 / imb for c in range(num_classes)]
    # Truncated, not rounded: rounding gives another data set than the published one.
    # At least 1, because 49 * (1 / 49) is 0.99... in float64.
    return [max(int(max_count * share), 1) for share in shares]


def long_tail_indices(targets: Tensor | np.ndarray | list[int], counts: list[int],
                      seed: int = 0) -> Tensor:
    """Rows (int64) of the first counts[c] images of each class c, after a shuffle of its rows.

    With seed 0 and CIFAR's own order these are the images of LDAM-DRW, BKD and their successors.
    Another imbalance cuts the same shuffle elsewhere, so the subsets are nested.
    """
    targets = torch.as_tensor(targets).cpu().numpy()
    if targets.ndim != 1 or targets.dtype.kind not in "iu" or not len(counts):
        raise ValueError("targets must be 1-D integers and counts must not be empty")
    if len(targets) and not 0 <= targets.min() <= targets.max() < len(counts):
        raise ValueError(f"targets must lie in 0..{len(counts) - 1}, one count for each class")
    rng = np.random.RandomState(seed)  # private: the published code reseeds NumPy's global one
    chosen = []
    for c, count in enumerate(counts):
        rows = np.flatnonzero(targets == c)
        if not 0 <= count <= len(rows):
            raise ValueError(f"class {c} has {len(rows)} images, cannot take {count}")
        rng.shuffle(rows)
        chosen.append(rows[:count])
    return torch.from_numpy(np.concatenate(chosen).astype(np.int64))


# ---- CIFAR

def load_cifar(name: str, root: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """Images and targets of cifar10 or cifar100 in file order; fetched into `root` if missing."""
    folder, sha256 = Path(root, CIFAR_FOLDERS[name]), CIFAR_SHA256[name]
    files = [file for file in sha256 if "meta" not in file and ("test" in file) != train]
    if not all(os.path.lexists(folder / file) for file in files):
        _fetch_cifar(name, folder)
    images, targets = [], []
    for file in files:  # unpickled are the very bytes that were checked
        batch = pickle.loads(_read_checked(folder / file, sha256[file]), encoding="latin1")
        images.append(batch["data"])
        targets += batch["labels" if name == "cifar10" else "fine_labels"]
    return torch.from_numpy(np.concatenate(images).reshape(-1, 3, 32, 32)), torch.tensor(targets)


def _read_checked(path: Path, sha256: str) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise InputError(f"{path} is not the original CIFAR file (its SHA-256 differs): damaged, "
                         "cut short or foreign. Replace it, or delete it to have it downloaded")
    return raw


def _fetch_cifar(name: str, folder: Path) -> None:
    missing = [file for file in CIFAR_SHA256[name] if not os.path.lexists(folder / file)]
    for file in CIFAR_SHA256[name].keys() - missing:  # a wrong file is reported, not overwritten
        _read_checked(folder / file, CIFAR_SHA256[name][file])
    url = CIFAR_URL + CIFAR_ARCHIVES[name]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.parent) as archive:
            _download(url, archive)
            archive.seek(0)
            _unpack(archive, folder, {file: CIFAR_SHA256[name][file] for file in missing})
    except (InputError, OSError) as error:
        reason = f"cannot write to {folder}: {error}" if isinstance(error, OSError) else error
        raise InputError(f"{url}: {reason}\nBy hand: unpack that archive so that {folder} holds "
                         f"{', '.join(missing)}") from None


def _download(url: str, target: BinaryIO) -> None:
    live = sys.stderr.isatty()
    if not live:
        print(f"downloading {url}", file=sys.stderr, flush=True)
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE)
        target.seek(0)
        target.truncate()
        size = 0
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                total = response.length or 0
                while chunk := response.read(1 << 18):
                    size += len(chunk)
                    if max(size, total) > MAX_BYTES:
                        raise InputError(f"larger than {MAX_BYTES >> 20} MiB, not CIFAR")
                    target.write(chunk)
                    if live:
                        print(f"\r{url}: {size / 1e6:.0f} of {total / 1e6:.0f} MB", end="",
                              file=sys.stderr, flush=True)
            if size >= total:
                return
            reason = f"the connection closed after {size} of {total} bytes"
        except (OSError, http.client.HTTPException) as error:  # a URLError is an OSError
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            reason = str(error) or type(error).__name__
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                break  # it would be the same again
        finally:
            if live and size:
                print(file=sys.stderr)
    raise InputError(f"cannot be downloaded: {reason}")


def _unpack(archive: BinaryIO, folder: Path, wanted: dict[str, str]) -> None:
    """Put the `wanted` files (name: SHA-256) into `folder`, each whole and checked or not."""
    wanted = dict(wanted)
    try:
        with tarfile.open(fileobj=archive, mode="r:gz") as tar:
            for entry in tar:
                file = entry.name.removeprefix(f"{folder.name}/")
                if file == entry.name or file not in wanted or not entry.isreg():
                    continue  # a path is only ever made from a known name, so none leads elsewhere
                if entry.size > MAX_BYTES:
                    raise InputError(f"{entry.name} in it is too large")
                raw = tar.extractfile(entry).read()
                if hashlib.sha256(raw).hexdigest() != wanted.pop(file):
                    raise InputError(f"{entry.name} in it is not the original (SHA-256 differs)")
                folder.mkdir(exist_ok=True)
                write_whole(folder / file, raw, f".{secrets.token_hex(8)}.tmp")  # unique
                if not wanted:
                    return
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
        raise InputError(f"not a whole .tar.gz archive: {error}") from None
    raise InputError(f"lacks {', '.join(wanted)} in {folder.name}")


# ---- other data

def load_npz(path: str | Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_train, y_train, x_test, y_test of a user's .npz file.

    x: uint8 (N, 3, 32, 32) or (N, 32, 32, 3), told apart by the axis that has 3; y: integers (N,)
    in 0..C-1, where C-1 is the largest training label and every class has a training image.
    """
    arrays, key = {}, "the file"
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            for key in NPZ_KEYS:
                arrays[key] = np.asarray(archive[key])
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen types for damaged files
        raise InputError(f"{path}: cannot read {key} ({error}); expected is a .npz file with the "
                         f"arrays {', '.join(NPZ_KEYS)}, none of objects") from None

    def require(met, text):
        if not met:
            raise InputError(f"{path}: {text}")

    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        require(x.dtype == np.uint8 and x.shape[1:] in ((3, 32, 32), (32, 32, 3)),
                f"x_{split} must be uint8 (N, 32, 32, 3) or (N, 3, 32, 32), "
                f"not {x.dtype} {x.shape}")
        require(len(x), f"x_{split} holds no image")
        require(y.dtype.kind in "iu" and y.shape == (len(x),),
                f"y_{split} must be {len(x)} integers like x_{split}, not {y.dtype} {y.shape}")
        require(y.min() >= 0, f"y_{split} holds {y.min()}; labels are 0, 1, 2, ...")
        if x.shape[1] != 3:
            x = x.transpose(0, 3, 1, 2)
        arrays[f"x_{split}"] = np.ascontiguousarray(x)
    classes, last = np.unique(arrays["y_train"]), arrays["y_test"].max()
    empty = (*np.flatnonzero(classes != np.arange(len(classes))), None)[0]
    require(empty is None, f"y_train has no image of class {empty}, but labels up to {classes[-1]}")
    require(len(classes) > 1, "y_train has class 0 alone; at least 2 classes are needed")
    require(last < len(classes), f"y_test has class {last}, y_train only 0..{len(classes) - 1}")
    return tuple(torch.from_numpy(arrays[key] if key[0] == "x" else arrays[key].astype(np.int64))
                 for key in NPZ_KEYS)


def synthetic(num_classes: int = 10, per_class: int = 200, test_per_class: int = 50,
              seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Balanced made-up images, training then test: a coarse pattern for each class, in noise."""
    generator, result = torch.Generator().manual_seed(seed), []
    patterns = F.interpolate(torch.randn(num_classes, 3, 4, 4, generator=generator), size=32)
    for count in (per_class, test_per_class):
        targets = torch.arange(num_classes).repeat_interleave(count)
        noise = torch.randn(len(targets), 3, 32, 32, generator=generator)
        images = 128 + 40 * patterns[targets] + 80 * noise
        result += [images.clamp(0, 255).to(torch.uint8), targets]
    return tuple(result)


# ---- what training uses

class Dataset(NamedTuple):
    name: str
    train_images: Tensor  # (N, 3, 32, 32) uint8
    train_targets: Tensor  # (N,) int64
    test_images: Tensor
    test_targets: Tensor
    class_counts: list[int]
    digest: str  # of all four tensors: says which data it is, whatever the file is called


def load_dataset(name: str, root: str | Path, imb: float, imb_type: str = "exp",
                 subset_seed: int = 0) -> Dataset:
    """cifar10, cifar100, synthetic or a .npz file, its training part thinned to imbalance `imb`.

    A .npz file with `imb` 1 stays as it is: own class counts, own order.
    """
    if not 0 <= subset_seed < 2 ** 32:
        raise InputError(f"--subset-seed must lie in 0..{2 ** 32 - 1}, not {subset_seed}")
    own_file = str(name).endswith(".npz")
    if name in CIFAR_ARCHIVES:
        train, test = load_cifar(name, root, train=True), load_cifar(name, root, train=False)
    elif name == "synthetic" or own_file:
        tensors = load_npz(name) if own_file else synthetic()
        train, test = tensors[:2], tensors[2:]
    else:
        raise InputError(f"--dataset: no data set {name!r}; choose cifar10, cifar100, synthetic or "
                         "a path that ends in .npz")
    have = train[1].bincount().tolist()
    counts = class_counts(len(have), max(have), imb, imb_type)
    if own_file and imb == 1:
        counts = have
    else:
        for c, (there, want) in enumerate(zip(have, counts)):
            if there < want:
                raise InputError(f"{name}: class {c} has {there} training images, --imb {imb:g} "
                                 f"wants {want}; --imb 1 takes the file as it is")
        rows = long_tail_indices(train[1], counts, subset_seed)
        train = train[0][rows], train[1][rows]
    sha256 = hashlib.sha256()
    for tensor in (*train, *test):
        sha256.update(f"{tuple(tensor.shape)}".encode())
        sha256.update(tensor.numpy())
    return Dataset(str(name), *train, *test, counts, sha256.hexdigest()[:16])


# ---- batches: the whole set on the device, augmented there

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # the literature's, for both sets


@functools.cache
def _constants(device: torch.device) -> tuple[Tensor, ...]:
    """scale, shift (3, 1, 1); luma (3,), luma and hue matrix (3, 3): copied to a device once."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    quarter_turn = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    hue = torch.linalg.inv(yiq) @ quarter_turn @ yiq
    constants = (1 / (255 * std), -mean / std, yiq[0], yiq[0].expand(3, 3), hue)
    return tuple(constant.contiguous().to(device) for constant in constants)


def normalise(images: Tensor) -> Tensor:
    """(B, 3, H, W) of 0..255, uint8 or float -> float32 (x / 255 - mean) / std, per channel."""
    scale, shift = _constants(images.device)[:2]
    return torch.addcmul(shift, images.float(), scale)


def distort_colour(images: Tensor, draws: Tensor) -> Tensor:
    """SimCLR's colour distortion, each image by its own random numbers (CBD's "data_aug" teachers).

    images: (B, 3, H, W) of 0..255. draws: (B, 10), uniform in [0, 1). With probability 0.8
    brightness, contrast and saturation change by factors in [0.2, 1.8] and the hue turns by up to a
    fifth of the circle, in random order, clipped after each; then grey with probability 0.2.
    All four are affine maps of colour (the hue turns in YIQ), so one matrix a pixel does each.
    Returns float32 (B, 3, H, W) of 0..255.
    """
    _, _, luma, to_grey, hue = _constants(images.device)
    pixels = images.float().permute(0, 2, 3, 1).flatten(1, 2)  # (B, H*W, 3)
    factors = 1 + 0.8 * (2 * draws[:, 2:5] - 1)
    brightness, contrast, saturation = factors[:, :, None, None].unbind(1)  # (B, 1, 1) each
    angle = 0.2 * 2 * math.pi * (2 * draws[:, 5, None, None] - 1)
    eye = torch.eye(3, device=images.device)
    turn = to_grey + angle.cos() * (eye - to_grey) + angle.sin() * hue
    maps = [brightness * eye, contrast * eye, saturation * eye + (1 - saturation) * to_grey, turn]
    no = torch.zeros_like(contrast)
    offsets = torch.stack([no, 1 - contrast, no, no], 1)  # contrast: around the image's mean luma
    jitter, grey = draws[:, 0, None, None, None] < 0.8, draws[:, 1, None, None] < 0.2
    maps = torch.where(jitter, torch.stack(maps, 1), eye)  # (B, 4, 3, 3)
    offsets = torch.where(jitter, offsets, 0.0)  # (B, 4, 1, 1)
    order = draws[:, 6:].argsort(1)[:, :, None, None]  # (B, 4, 1, 1)
    maps, offsets = maps.take_along_dim(order, 1), offsets.take_along_dim(order, 1)
    for i in range(4):
        mean_luma = (pixels.mean(1) @ luma)[:, None, None]
        pixels = torch.baddbmm(mean_luma * offsets[:, i], pixels, maps[:, i].mT).clamp(0, 255)
    pixels = torch.where(grey, (pixels @ luma)[:, :, None], pixels)
    return pixels.unflatten(1, images.shape[2:]).permute(0, 3, 1, 2)


class Batches:
    """Shuffled, cropped, flipped, normalised training batches, made on the device without a copy.

    images uint8 (N, 3, 32, 32), targets int64 (N,), class_counts: C numbers. An epoch is N draws:
    sampler "instance" takes every image once, "class" draws with replacement so that every class
    is expected N / C times. colour adds distort_colour. All random numbers of an epoch are drawn on
    the CPU by shuffle(), so a seed gives the same batches on every device, and next() only reads
    tensors that keep their place: it can be captured in a CUDA graph.
    """

    def __init__(self, images, targets, class_counts, batch_size, device, sampler, colour=False):
        count = len(targets)
        padded = F.pad(images.to(device), (4, 4, 4, 4))  # of the raw image: pad, then normalise
        padded = torch.cat([padded, padded.flip(3)]).permute(0, 2, 3, 1).contiguous()
        # Every crop of every image and of its mirror, as a view (2N, 9, 9, 3, 32, 32): a batch is
        # one gather, and comes out in channels_last.
        self.windows = padded.unfold(1, 32, 1).unfold(2, 32, 1)
        self.targets = targets.cpu()
        counts = torch.as_tensor(class_counts, dtype=torch.float64)
        self.weights = 1 / counts[self.targets] if sampler == "class" else None
        self.draws = torch.zeros(4, count, dtype=torch.int64, device=device)
        self.colours = torch.zeros(count, 10, device=device) if colour else None
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.offsets = torch.arange(min(batch_size, count), device=device)
        self.sizes = [len(part) for part in self.targets.split(batch_size)]  # last: maybe partial

    def shuffle(self, generator: torch.Generator) -> None:
        """Draw the next epoch from a CPU generator."""
        count = len(self.targets)
        if self.weights is None:
            rows = torch.randperm(count, generator=generator)
        else:
            rows = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        place = torch.randint(2 * 9 * 9, (count,), generator=generator)
        mirrored, top, left = place // 81, place // 9 % 9, place % 9
        self.draws.copy_(torch.stack([rows + count * mirrored, top, left, self.targets[rows]]))
        if self.colours is not None:
            self.colours.copy_(torch.rand(count, 10, generator=generator))
        self.position.zero_()

    def next(self, size: int) -> tuple[Tensor, Tensor]:
        """The next draws: images float32 (size, 3, 32, 32) in channels_last, targets (size,)."""
        index = self.position + self.offsets[:size]
        row, top, left, targets = self.draws[:, index]
        images = self.windows[row, top, left]
        if self.colours is not None:
            images = distort_colour(images, self.colours[index])
        self.position += size
        return normalise(images), targets
