# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the kd-lt authors
"""Tests. The file is read from top to bottom; its headings begin with "# ----". In their order:

    helpers      random numbers, small data sets, a trainer, a plain step, a command
    methods      one entry for each method: what the tests know of it. A new method goes here
    losses       a worked example, the oracles, extreme values, what is refused
    steps        against a plain step; what a CUDA graph needs; on a GPU
    data         the published subsets, batches, networks, files
    program      the README, run_all.sh, evaluation
    settings     flags, run names, table and plot
    runs         the same numbers again; kills and locks; resume and damage; given teachers
    edges        the script's output, wrong input, devices
    speed        on request

They need no network. A test that is about the CPU says --device cpu, so that a GPU in the machine
changes nothing. Real CIFAR is used where it lies in ./data or in the folder that KD_LT_DATA names.
"""

import contextlib
import copy
import errno
import fcntl
import hashlib
import importlib.util
import inspect
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import data
import kd_lt
import models
from data import Batches, InputError
from models import ResNet

THREADS = torch.get_num_threads()  # for the speed; elsewhere batches of four are slower on more
torch.set_num_threads(1)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# ---- helpers: random numbers, small data sets, a trainer, a plain step, a command


def generator(seed):
    """A generator of its own, so that no test depends on another."""
    return torch.Generator().manual_seed(seed)


def randn(seed, *shape):
    """Normally distributed float64 numbers, the same for the same seed."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def doubles(values):
    """The values as a float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def random_images(count, size):
    """uint8 noise, (count, 3, size, size)."""
    return torch.randint(256, (count, 3, size, size), generator=generator(0)).to(torch.uint8)


def make_npz(path, counts=(4, 2, 6), size=32, **changes):
    """Random images, so many of each class, and six test images; a change to None leaves out."""
    rng = np.random.RandomState(0)
    y_train, y_test = np.repeat(np.arange(len(counts)), counts), np.arange(6) % len(counts)
    x = [rng.randint(256, size=(len(y), size, size, 3), dtype=np.uint8) for y in (y_train, y_test)]
    arrays = {"x_train": x[0], "y_train": y_train, "x_test": x[1], "y_test": y_test, **changes}
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    return path


@pytest.fixture(scope="session")
def npz_of_9_images(tmp_path_factory):
    """Classes of 5, 3 and 1 images. In batches of 4 the last batch is a single image."""
    return make_npz(tmp_path_factory.mktemp("data") / "nine.npz", [5, 3, 1])


def long_tailed(per_class, imb, stride=1):
    """A data set of made-up images in ten classes; a stride makes the images smaller.

    The largest class is not the first one, as in a user's own images.
    """
    images, targets, *test = data.synthetic(10, per_class, 2)
    counts = data.long_tail_counts(10, per_class, imb)
    counts = counts[3:] + counts[:3]
    rows = data.long_tail_indices(targets, counts)
    images = images[rows, :, ::stride, ::stride]
    return data.Dataset(images, targets[rows], *test, counts, "0" * 16)


@pytest.fixture(scope="session")
def data_of_78_images():
    """Images of 16x16. In batches of 32 the last batch has 14."""
    return long_tailed(20, 10, stride=2)


def config_of(text, dataset=None, precision="fp32"):
    """The Config of a command line."""
    dataset = dataset or data.Dataset(None, None, None, None, [], "0" * 16)
    return kd_lt.make_config(kd_lt.parse_flags(shlex.split(text)), dataset, precision)


def make_trainer(dataset, text, device="cpu", precision="fp32"):
    """A trainer for the flags, with untrained teachers and no hyperparameter at its default.

    The text begins with the name of the method.
    """
    method, flags = text.split()[0], "--smoke --batch-size 32"
    for key in kd_lt.METHODS[method].hyper:  # BKD starts in the second of the eight epochs
        flags += f" --{key.replace('_', '-')} {LOSSES[method].hyper.get(key, 0.125)}"
    config = config_of(f"{flags} --method {text}", dataset, precision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teachers = [ResNet(t.network, len(dataset.class_counts), t.head) for t in config.teachers]
    for teacher in 3 * teachers:  # running statistics of their own
        teacher(data.normalise(dataset.train_images[:50]))
    return kd_lt.Trainer(config, dataset, teachers, torch.device(device))


MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in (data.MEAN, data.STD))


class PlainImages:
    """One epoch's images and targets, one at a time: draw, pad, mirror, crop, normalise."""

    def __init__(self, images, targets, generator, sampler="instance", flip=True):
        self.images, self.targets = images.numpy(), targets.tolist()
        count, self.padding = len(targets), images.shape[-1] // 8
        self.places = 2 * self.padding + 1  # in each direction
        if sampler == "class":
            weights = doubles([1 / self.targets.count(c) for c in self.targets])
            rows = torch.multinomial(weights, count, replacement=True, generator=generator)
        else:
            rows = torch.randperm(count, generator=generator)
        crops = torch.randint((1 + flip) * self.places**2, (count,), generator=generator)
        self.draws = list(zip(rows.tolist(), crops.tolist(), strict=True))

    def __len__(self):
        return len(self.draws)

    def __getitem__(self, i):
        row, crop = self.draws[i]
        mirrored, top, left = np.unravel_index(crop, (2, self.places, self.places))
        pad, size = (self.padding, self.padding), self.images.shape[-1]
        image = np.pad(self.images[row], ((0, 0), pad, pad))[:, :, :: -1 if mirrored else 1]
        image = torch.tensor(image[:, top : top + size, left : left + size].astype(np.float32))
        return (image / 255 - MEAN) / STD, self.targets[row]


class Plain:
    """The networks of a trainer as they are now, and its loss: float32, NCHW, eager."""

    def __init__(self, trainer, dataset):
        self.networks = copy.deepcopy([trainer.student, trainer.adapter, *trainer.teachers])
        for network in self.networks:
            network.float().to(memory_format=torch.contiguous_format)
        self.student, self.adapter, *self.teachers = self.networks
        for teacher in self.teachers:
            teacher.eval()
        self.parameters = [*self.student.train().parameters(), *self.adapter.parameters()]
        self.config = trainer.config
        self.counts = doubles(dataset.class_counts).to(trainer.device)
        self.correct = 0  # so many images have been classified correctly
        if self.config.method == "krdistill":
            with torch.no_grad():
                images = (dataset.train_images / 255 - MEAN) / STD
                features = self.teachers[0](images.to(trainer.device)).features
            means = [features[dataset.train_targets == c].mean(0) for c in range(len(self.counts))]
            self.means = torch.stack(means)
            self.prototypes = prototypes_oracle(self.means).float()

    def loss(self, images, targets, counts):
        """The method's loss of one batch."""
        hyper = {key: v for key, v in self.config.hyper.items() if key != "bkd_start"}
        with torch.no_grad():
            outputs = [teacher(images) for teacher in self.teachers]
        student = self.student(images)
        self.correct += (student.logits.argmax(1) == targets).sum().item()
        example = Example(
            student_logits=student.logits,
            teacher_logits=outputs[0].logits if outputs else None,
            student_features=self.adapter(student.features),
            teacher_features=[output.features for output in outputs],
            rectified_features=None,
            targets=targets,
            class_counts=counts,
        )
        if self.config.method == "krdistill":
            example.rectified_features = kd_lt.rectify_features(
                outputs[0].features, targets, self.means, self.prototypes
            )
            # The example's rectified_logits subtract log pi. Where the teacher learned none, it is
            # added first, so that the logits stay as they are.
            if not LOSSES[self.config.teachers[0].method].learns_prior:
                example.teacher_logits += (counts / counts.sum()).log().float()
        return loss_of(self.config.method, example, **hyper)


def changed_by_steps(trainer):
    """What a step changes, by name, without the epoch's sums.

    It is taken from the optimizer and the networks, because trainer.state_dict is what is tested.
    """
    optimizer = trainer.optimizer.state_dict()["state"]
    return {
        "momentum": [state["momentum_buffer"] for state in optimizer.values()],
        "student": trainer.student.state_dict(),
        "adapter": trainer.adapter.state_dict(),
    }


def run(words):
    """Status, standard output and standard error of one command, in this process."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            status = kd_lt.main([str(word) for word in words])
        except SystemExit as end:
            status = end.code
    return status, *(stream.buffer.getvalue().decode() for stream in streams)


def quick(npz, runs, text, *words):
    """The words of a command of about a second. The text is split at its spaces."""
    fixed = ["--smoke", "--device", "cpu", "--precision", "fp32", "--runs-dir", str(runs)]
    fixed += ["--dataset", str(npz), "--batch-size", "4", "--epochs", "2"]
    return [*fixed, *text.split(), *map(str, words)]  # the last of a repeated flag counts


def finish(words):
    """The student's folder and the output of a command that must succeed."""
    status, out, err = run(words)
    assert status == 0, err
    return Path(re.search("^result +(.*), test accuracy", out, re.M)[1]), out


def refused(words, *fragments):
    """The status and the message of a command that must fail with one line, which names these."""
    status, out, err = run(words)
    assert status not in (0, None) and "Traceback" not in err + out
    message = err.splitlines()[-1]
    assert message.startswith("kd_lt.py: ") and all(str(part) in message for part in fragments), err
    return status, message


HERE = Path(kd_lt.__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")


class Bomb:
    """Fails the test when somebody unpickles it."""

    def __reduce__(self):
        return pytest.fail, ("bytes that nobody checked were unpickled",)


def files(folder):
    """The content of each file below the folder, but of the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def put(contents, folder):
    """Write the files below the folder."""
    for name, raw in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)


@contextlib.contextmanager
def full_disk(limit):
    """No file gets longer than that many bytes."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@contextlib.contextmanager
def interrupted_at_write(n):
    """Ctrl-C comes instead of write n, from 0. After each epoch come log.jsonl and last.pt."""
    write, written = kd_lt.write_whole, []

    def write_or_stop(*args, **kwargs):
        if len(written) == n:
            raise KeyboardInterrupt
        written.append(args)
        return write(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kd_lt, "write_whole", write_or_stop)
        yield written


@contextlib.contextmanager
def locked(folder):
    """As another process locks it that trains the run."""
    folder.mkdir(parents=True)
    with open(folder / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def finished(npz_of_9_images, tmp_path_factory):
    """Teacher and student of a finished kd run, as folders; not to be changed."""
    student, _ = finish(quick(npz_of_9_images, tmp_path_factory.mktemp("kd"), "--method kd"))
    (teacher,) = (folder for folder in student.parent.iterdir() if folder != student)
    return teacher, student


@pytest.fixture
def stopped(npz_of_9_images, tmp_path):
    """The folder of a ce run that was stopped after the first of its two epochs."""
    with interrupted_at_write(2):
        refused(quick(npz_of_9_images, tmp_path / "stopped", "--method ce"))
    return next((tmp_path / "stopped").iterdir())


def log_of(folder):
    """The rows of a run's log, the head first."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def losses_of(folder):
    return [row["loss"] for row in log_of(folder)[1:]]


def as_bytes(content):
    """Tensors as bytes, so that == compares every bit; without the command and the speed."""
    if isinstance(content, torch.Tensor):
        return content.dtype, tuple(content.shape), content.numpy().tobytes()
    if isinstance(content, dict):
        varying = ("command", "images_per_second")
        return {key: as_bytes(value) for key, value in content.items() if key not in varying}
    return [as_bytes(value) for value in content] if isinstance(content, list) else content


def outcome(runs):
    """Every number of every run there, by folder name. Their three files have to agree."""
    found = {}
    for folder in Path(runs).iterdir():
        content = torch.load(folder / "last.pt", weights_only=True)
        head, *rows = content["log"]
        assert log_of(folder) == content["log"] and content.items() >= head.items()
        assert [row["epoch"] for row in rows] == [*range(1, head["settings"]["epochs"] + 1)]
        best = max(row["top1"] for row in rows if "top1" in row)
        assert result_of(folder) == head | rows[-1] | {"best_top1": best}
        found[folder.name] = as_bytes(content)
    assert not [*Path(runs).glob("*/*.partial")]
    return found


def made_up_run(folder, config, top1, teachers_top1=()):
    """Write the result.json of a run, of a Config or a command line, that was never trained."""
    config = config_of(config) if isinstance(config, str) else config
    result = {"version": "4.0.0", "device": "a GPU", "settings": asdict(config)}
    result |= {"teachers_top1": teachers_top1, "top1": top1, "best_top1": top1 + 1}
    result |= {"many": 60.0, "medium": None, "few": 2.0}
    result |= {"class_counts": [5, 500, 1], "per_class": [60.0, 2 * top1, None]}
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))


def tables_of(markdown):
    """The rows of each table, as lists of cells, without the heading."""
    blocks = re.findall(r"(?:^\|.*\n)+", markdown.replace("\u00a0", " "), re.M)
    return [[row.strip("| ").split(" | ") for row in block.splitlines()[2:]] for block in blocks]


# ---- methods: all that the tests know of each. A new one needs an oracle, and an entry in LOSSES


@dataclass
class Example:
    """What the losses take: B images, C classes, D features, two teachers for cbd.

    The oracles get one image of it: lists instead of tensors, without the dimension B.
    """

    student_logits: torch.Tensor  # (B, C)
    teacher_logits: torch.Tensor  # (B, C)
    student_features: torch.Tensor  # (B, D)
    teacher_features: list[torch.Tensor]  # of each teacher (B, D_k); together D
    rectified_features: torch.Tensor  # (B, D)
    targets: torch.Tensor  # (B,)
    class_counts: list[int]  # C

    @property
    def rectified_logits(self):
        """What krdistill imitates, (B, C)."""
        return kd_lt.rectify_logits(self.teacher_logits, self.targets, self.class_counts)


def softmax(z, temperature=1.0):
    exp = [math.exp((v - max(z)) / temperature) for v in z]
    return [v / sum(exp) for v in exp]


def divergence(q, z, temperature):
    """T^2 times the divergence of the softened student from the target q."""
    p = softmax(z, temperature)
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))


def unit(v):
    """The vector scaled to length 1."""
    return [a / math.hypot(*v) for a in v]


def distance(a, b):
    """The cosine distance of two vectors."""
    return 1 - sum(p * q for p, q in zip(unit(a), unit(b), strict=True))


def with_prior(z, counts, sign):
    """The logits, plus or minus the logarithms of the class shares."""
    return [v + sign * math.log(n / sum(counts)) for v, n in zip(z, counts, strict=True)]


def weights_oracle(counts, beta):
    """Inverse effective numbers of images, with mean 1."""
    v = [(1 - beta) / (1 - beta**n) for n in counts]
    return [len(v) * v_c / sum(v) for v_c in v]


def rectified_oracle(z, y, counts):
    """The prior taken out, then the true and the largest entry exchanged."""
    z = with_prior(z, counts, -1)
    top = z.index(max(z))
    z[y], z[top] = z[top], z[y]
    return z


def prototypes_oracle(means):
    """The nearest frame with equal singular values, by Newton-Schulz: X (3 - X^T X) / 2."""
    x = means.double() - means.double().mean(0)
    x = x / x.norm()
    for _ in range(40):
        x = 1.5 * x - 0.5 * x @ x.T @ x
        x = x - x.mean(0)  # rounding would grow along the direction without spread
    return F.normalize(x, dim=1)


def ce_oracle(x):
    return -math.log(softmax(x.student_logits)[x.targets])


def bsce_oracle(x):
    return -math.log(softmax(with_prior(x.student_logits, x.class_counts, 1))[x.targets])


def kd_oracle(x, temperature=2.0, alpha=1.0):
    q = softmax(x.teacher_logits, temperature)
    return ce_oracle(x) + alpha * divergence(q, x.student_logits, temperature)


def bkd_oracle(x, temperature=2.0, alpha=1.0, beta=0.9999):
    p = softmax(x.teacher_logits, temperature)
    q = [a * w for a, w in zip(p, weights_oracle(x.class_counts, beta), strict=True)]
    q = [a / sum(q) for a in q]
    return ce_oracle(x) + alpha * divergence(q, x.student_logits, temperature)


def cbd_oracle(x, alpha=0.4, beta=100.0):
    joined = [v for features in x.teacher_features for v in unit(features)]
    return (1 - alpha) * ce_oracle(x) + alpha * beta * distance(x.student_features, joined)


def dive_oracle(x, temperature=2.0, alpha=0.5, power=0.5):
    q = [p**power for p in softmax(x.teacher_logits, temperature)]
    q = [a / sum(q) for a in q]
    kl = divergence(q, x.student_logits, temperature)
    return (1 - alpha) * bsce_oracle(x) + alpha * kl


def krdistill_oracle(x, temperature=2.0, alpha=1.0, gamma=2.0):
    q = softmax(rectified_oracle(x.teacher_logits, x.targets, x.class_counts), temperature)
    lrd = divergence(q, x.student_logits, temperature)
    rrd = distance(x.student_features, x.rectified_features)
    return bsce_oracle(x) + alpha * lrd + gamma * rrd


@dataclass
class Loss:
    """What the tests know of a method."""

    function: Callable  # the program's
    takes: str  # its arguments, as they are called in Example
    oracle: Callable  # the loss of one image in Python floats, with the published defaults
    hyper: dict[str, float]  # other hyperparameters than the defaults
    # As in kd_lt.Method:
    teacher_method: str = ""
    sampler: str = "instance"
    head: str = "linear"
    joins_teachers: bool = False
    learns_prior: bool = True


LOSSES = {
    "ce": Loss(F.cross_entropy, "student_logits targets", ce_oracle, {}),
    "bsce": Loss(
        kd_lt.balanced_softmax_loss,
        "student_logits targets class_counts",
        bsce_oracle,
        {},
        learns_prior=False,
    ),
    "kd": Loss(
        kd_lt.kd_loss,
        "student_logits teacher_logits targets",
        kd_oracle,
        {"temperature": 0.7, "alpha": 0.3},
        teacher_method="ce",
    ),
    "bkd": Loss(
        kd_lt.bkd_loss,
        "student_logits teacher_logits targets class_counts",
        bkd_oracle,
        {"temperature": 5.0, "alpha": 0.5, "beta": 0.9},
        teacher_method="ce",
    ),
    "cbd": Loss(
        kd_lt.cbd_loss,
        "student_logits student_features teacher_features targets",
        cbd_oracle,
        {"alpha": 0.8, "beta": 3.0},
        teacher_method="ce",
        sampler="class",
        head="cosine",
        joins_teachers=True,
        learns_prior=False,
    ),
    "dive": Loss(
        kd_lt.dive_loss,
        "student_logits teacher_logits targets class_counts",
        dive_oracle,
        {"temperature": 3.0, "alpha": 0.2, "power": 0.7},
        teacher_method="bsce",
        learns_prior=False,
    ),
    "krdistill": Loss(
        kd_lt.krdistill_loss,
        "student_logits student_features rectified_logits rectified_features targets class_counts",
        krdistill_oracle,
        {"temperature": 3.0, "alpha": 0.2, "gamma": 7.0},
        teacher_method="ce",
        learns_prior=False,
    ),
}
OURS = [name for name in LOSSES if name != "ce"]


def make_example(seed, batch=4, num_classes=5, counts=None):
    """A random example in float64, with counts from one to a million."""
    logits = 2 * randn(seed, 2, batch, num_classes)
    features = randn(seed, 3, batch, 6)
    sizes = randn(seed, num_classes).sigmoid()
    return Example(
        student_logits=logits[0],
        teacher_logits=logits[1],
        student_features=features[0],
        teacher_features=list((3 * features[1]).split([4, 2], 1)),
        rectified_features=F.normalize(features[2], dim=1),
        targets=randn(seed + 1, batch, num_classes).argmax(1),
        class_counts=counts or [int(10 ** (6 * size)) for size in sizes],
    )


def converted(example, convert):
    """The example with every tensor of floats converted."""
    changes = {}
    for key, value in vars(example).items():
        if isinstance(value, list) and isinstance(value[0], torch.Tensor):
            changes[key] = [convert(part) for part in value]
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            changes[key] = convert(value)
    return replace(example, **changes)


def loss_of(name, example, function=None, **hyper):
    """The loss of an example, by the program's function or by another."""
    function = function or LOSSES[name].function
    return function(*(getattr(example, key) for key in LOSSES[name].takes.split()), **hyper)


def value_and_gradients(name, example, **hyper):
    """The loss, and its gradients in the student's tensors; none may reach the teacher's."""
    example = converted(example, lambda tensor: tensor.detach().requires_grad_())
    loss = loss_of(name, example, **hyper)
    loss.backward()
    of_teachers = [example.teacher_logits, example.rectified_features, *example.teacher_features]
    assert all(tensor.grad is None for tensor in of_teachers)
    learned = [key for key in ("student_logits", "student_features") if key in LOSSES[name].takes]
    return loss.detach(), {key: getattr(example, key).grad for key in learned}


def oracle_of(name, lists, **hyper):
    """The oracle's loss of an example that holds lists."""
    losses = []
    for b in range(len(lists.targets)):
        image = {"teacher_features": [features[b] for features in lists.teacher_features]}
        for key in vars(lists).keys() - {"teacher_features", "class_counts"}:
            image[key] = getattr(lists, key)[b]
        losses.append(LOSSES[name].oracle(replace(lists, **image), **hyper))
    return statistics.fmean(losses)


def check_against_oracle(name, example, **hyper):
    """Compare the value, and the gradients with central differences of the oracle."""
    value, gradients = value_and_gradients(name, example, **hyper)
    lists = replace(converted(example, torch.Tensor.tolist), targets=example.targets.tolist())
    assert value.item() == approx(oracle_of(name, lists, **hyper), rel=1e-10)
    for key, gradient in gradients.items():
        rows, step = getattr(lists, key), 1e-5
        for b, c in np.ndindex(*gradient.shape):
            here, around = rows[b][c], []
            for moved in (here + step, here - step):
                rows[b][c] = moved
                around.append(oracle_of(name, lists, **hyper))
            rows[b][c] = here
            difference = (around[0] - around[1]) / (2 * step)
            assert gradient[b, c].item() == approx(difference, rel=1e-6, abs=1e-7)


# ---- losses


def test_bkd_by_hand():
    """A worked example: one image of two classes. The head has 3 images, the tail 1.

    With beta = 0.5 the effective numbers are 7/4 and 1. The weights are proportional to 4/7 and 1,
    that is to 4 and 7. The teacher holds 7 : 4 for the head, so that the weighted target is
    28 : 28, one half each.
    """
    teacher_logits = torch.tensor([[math.log(7), math.log(4)]])
    student_logits = torch.tensor([[math.log(3), math.log(1)]])  # 3/4 and 1/4
    loss = kd_lt.bkd_loss(
        student_logits, teacher_logits, torch.tensor([0]), [3, 1], temperature=1.0, beta=0.5
    )
    cross_entropy = -math.log(3 / 4)
    kl = 0.5 * math.log(0.5 / (3 / 4)) + 0.5 * math.log(0.5 / (1 / 4))
    assert loss.item() == approx(cross_entropy + kl)


def test_every_method_has_an_entry():
    assert LOSSES.keys() == kd_lt.METHODS.keys(), "a method without an entry in LOSSES"


@pytest.mark.parametrize("name", LOSSES)
def test_the_program_agrees_with_the_entry(name):
    def defaults(function):
        parameters = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    entry, method = LOSSES[name], kd_lt.METHODS[name]
    published = defaults(entry.oracle)
    assert {k: v for k, v in method.hyper.items() if k != "bkd_start"} == published
    assert name == "ce" or defaults(entry.function) == published
    for key in ("teacher_method", "sampler", "head", "joins_teachers", "learns_prior"):
        assert getattr(method, key) == getattr(entry, key)
    assert entry.hyper.keys() == published.keys() and not entry.hyper.items() & published.items()


@pytest.mark.parametrize("name", OURS)
def test_loss_is_the_oracle(name):
    for seed, batch, num_classes in ((0, 4, 5), (1, 1, 3), (2, 3, 7)):
        for hyper in ({}, LOSSES[name].hyper):
            check_against_oracle(name, make_example(seed, batch, num_classes), **hyper)


def test_an_image_labelled_minus_100_counts_in_the_kl_alone():
    example = make_example(30)
    targets = example.targets.clone()
    targets[1] = -100
    kept = [0, 2, 3]
    ce = F.cross_entropy(example.student_logits[kept], targets[kept])
    kl = loss_of("kd", example) - loss_of("ce", example)
    assert_close(loss_of("kd", replace(example, targets=targets)), ce + kl)


def test_the_losses_stand_alone():
    """To copy one, the whole of section 1 is copied; it needs torch, math and Sequence."""
    between_boxes = re.split(r"^# \+-+\+$", inspect.getsource(kd_lt), flags=re.M)
    copied = {"torch": torch, "F": F, "Tensor": torch.Tensor, "math": math, "Sequence": Sequence}
    exec(between_boxes[2], copied)
    for name in OURS:
        function = copied[LOSSES[name].function.__name__]
        assert_close(loss_of(name, make_example(3), function), loss_of(name, make_example(3)))


@pytest.mark.parametrize("name", OURS)
def test_a_loss_compiles_as_one_graph(name):
    example = replace(make_example(31), class_counts=torch.tensor([200, 50, 9, 3, 1]))
    try:
        compiled = torch.compile(LOSSES[name].function, fullgraph=True, backend="eager")
    except RuntimeError as error:  # an older torch cannot with a newer Python
        pytest.skip(str(error))
    assert_close(loss_of(name, example, compiled), loss_of(name, example))


@pytest.mark.parametrize("counts", [[5000, 2997, 50], [7, 1, 1000000, 30], [12]], ids=str)
def test_effective_number_weights(counts):
    for beta in (0.0, 0.5, 0.9999):
        weights = kd_lt.effective_number_weights(doubles(counts), beta)
        assert_close(weights, doubles(weights_oracle(counts, beta)))
        assert_close(kd_lt.effective_number_weights(counts, beta), weights.float())
    inverse = 1 / doubles(counts)  # in the limit, in which float32 stays exact, too
    weights = kd_lt.effective_number_weights(counts, 1 - 1e-12)
    assert_close(weights.double(), inverse / inverse.mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("num_classes, width", [(2, 3), (3, 2), (5, 5), (6, 20), (6, 2), (12, 5)])
def test_balanced_prototypes(num_classes, width):
    """Of means whose directions are of very different lengths: the tail's are short."""
    means = randn(num_classes, num_classes, width) * torch.logspace(0, -3, width) + 3
    prototypes = kd_lt.balanced_prototypes(means)
    assert_close(prototypes, prototypes_oracle(means))


def test_rectify_features():
    means, features, y = randn(10, 4, 7) + 1, randn(11, 9, 7), torch.arange(9) % 4
    prototypes = kd_lt.balanced_prototypes(means)
    a = statistics.fmean(math.dist(m, means.mean(0)) for m in means)
    moved = [
        unit((t - means[c] + a * prototypes[c]).tolist())
        for t, c in zip(features, y.tolist(), strict=True)
    ]
    assert_close(kd_lt.rectify_features(features, y, means, prototypes), doubles(moved))


def test_labels_of_any_integer_type_are_taken():
    example = make_example(12)
    means = randn(10, 5, 6)
    for dtype in (torch.uint8, torch.int16):
        other = replace(example, targets=example.targets.to(dtype))
        assert torch.equal(other.rectified_logits, example.rectified_logits)
        features = [
            kd_lt.rectify_features(each.rectified_features, each.targets, means, means)
            for each in (other, example)
        ]
        assert torch.equal(*features)


@pytest.mark.parametrize("name", OURS)
def test_huge_logits_and_counts_stay_finite(name):
    example = make_example(13, counts=[1e30, 1000, 10, 1, 1])
    example = converted(example, torch.Tensor.float)
    example.student_logits = 1e4 * example.student_logits.sign()
    example.teacher_logits = 1e4 * example.teacher_logits.sign()
    value, gradients = value_and_gradients(name, example)
    assert value.dtype == torch.float32 and value.shape == () and value.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("name", OURS)
def test_a_class_of_probability_0_adds_nothing(name):
    """-inf, as for classes that a task of several does not have; -1e6 gives 0, too."""
    example = replace(make_example(36), targets=torch.zeros(4, dtype=torch.int64))
    results = []
    for value in (-math.inf, -1e6):
        mask = torch.tensor([0.0, 0.0, 0.0, 0.0, value])
        teacher, student = example.teacher_logits + mask, example.student_logits + mask
        masked = replace(example, teacher_logits=teacher, student_logits=student)
        results.append(value_and_gradients(name, masked))
    assert_close(*results)  # not equal where one is nan


@pytest.mark.parametrize("name", OURS)
def test_half_precision_is_computed_in_float32(name):
    """The value of the same numbers in float32; the gradient in the logits' own dtype."""
    example = make_example(21)
    example.student_features[0] = 0  # after a ReLU a row of features may be all zero
    example.teacher_features[0][1] = 0
    half = converted(example, torch.Tensor.bfloat16)
    value, gradients = value_and_gradients(name, half)
    expected, exact = value_and_gradients(name, converted(half, torch.Tensor.float))
    assert value.dtype == torch.float32 and value.isfinite()
    assert_close(value, expected)
    for key, gradient in gradients.items():
        assert gradient.dtype == torch.bfloat16 and not gradient.isnan().any()
        assert_close(gradient[1:].float(), exact[key][1:], rtol=0.02, atol=1e-3)


COUNTS = [200, 50, 9, 3, 1]
FORMS = {
    "tuple": tuple(COUNTS),
    "uint8": np.array(COUNTS, np.uint8),
    "tensor": torch.tensor(COUNTS),
    "float64": doubles(COUNTS),
}


@pytest.mark.parametrize("counts", FORMS.values(), ids=FORMS)
def test_every_form_of_class_counts_is_taken(counts):
    example = converted(make_example(29), torch.Tensor.float)
    for name in OURS:
        loss = loss_of(name, replace(example, class_counts=counts))
        assert loss.dtype == torch.float32  # as the logits, whatever the dtype of the counts
        assert_close(loss, loss_of(name, replace(example, class_counts=COUNTS)))


def test_counts_in_float64_keep_their_digits():
    counts = doubles([*range(1, 101)])
    rectified = kd_lt.rectify_logits(torch.zeros(1, 100), torch.tensor([0]), counts)
    assert torch.equal(rectified[0], -(counts / counts.sum()).log().float())


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on "meta", as Apple's GPUs refuse it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                assert tensor.dtype != torch.float64, func
        return out


@pytest.mark.parametrize("counts", [COUNTS, doubles(COUNTS)], ids=["list", "float64"])
@pytest.mark.parametrize("name", OURS)
def test_no_loss_needs_float64_on_its_device(name, counts):
    example = converted(make_example(29), lambda tensor: tensor.float().to("meta"))
    targets = example.targets.to("meta")
    with NoFloat64():
        loss_of(name, replace(example, targets=targets, class_counts=counts))


@pytest.mark.parametrize("name", OURS)
def test_shapes_that_do_not_agree_are_refused(name):
    """Also where they would broadcast, and where the divergence's mean would be another one."""
    example, names = make_example(3), LOSSES[name].takes.split()
    alone = [[key] for key in names if key not in ("targets", "class_counts")]
    features = [key for key in names if "features" in key]
    all_dense = [key for key in names if key != "class_counts"]
    for change, changed in (
        (lambda t: t[:1], [*alone, features]),
        (lambda t: t[:, :1], alone),
        (lambda t: t[0], [*alone, features]),
        (lambda t: t[..., None], [*alone, features, all_dense]),
    ):
        for keys in filter(None, changed):
            arguments = {key: getattr(example, key) for key in names}
            for key in keys:
                value = arguments[key]
                is_list = isinstance(value, list)
                arguments[key] = [change(part) for part in value] if is_list else change(value)
            with pytest.raises((ValueError, IndexError)):
                LOSSES[name].function(*arguments.values())


Z, Y, N, EYE = torch.ones(2, 3), torch.tensor([0, 1]), [9, 3, 1], torch.eye(3)
ROW, COLUMN = Z[:1], Z[:, :1]  # would broadcast
REFUSED = [  # a function, arguments of which one is wrong, and its name
    *((kd_lt.kd_loss, (Z, Z, Y, t), "temperature") for t in (0, -1.0, math.nan, math.inf)),
    *(
        (kd_lt.balanced_softmax_loss, (Z, Y, counts), "class_counts")
        for counts in (
            [0.6, 0.3, 0.1],  # shares
            [9, 3, 0],
            [9, 3, math.nan],
            [9, 3, math.inf],
            {0: 9, 1: 3, 2: 1},  # has no order
            [9, 3],
            np.ones(1),
            torch.ones(1),
            torch.ones(1, 3),
        )
    ),
    *((kd_lt.effective_number_weights, (n,), "class_counts") for n in ([9, 3, 0], [math.nan], [N])),
    *((kd_lt.effective_number_weights, (N, beta), "beta") for beta in (1, -0.1, math.nan)),
    *((kd_lt.balanced_prototypes, (m,), "class_means") for m in (ROW, Z[0], Z[..., None])),
    *((kd_lt.rectify_logits, (z, Y, N), "logits") for z in (Z[0], Z[..., None])),
    *((kd_lt.rectify_features, (f, Y, EYE, EYE), "teacher_features") for f in (ROW, COLUMN)),
    (kd_lt.rectify_features, (Z, Y, EYE[:1], EYE), "class_means"),
]


@pytest.mark.parametrize("function, arguments, named", REFUSED)
def test_wrong_arguments_are_refused(function, arguments, named):
    with pytest.raises(ValueError, match=named):
        function(*arguments)


# ---- steps: training against a plain step, written as most code has it


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
@pytest.mark.parametrize(
    "setting",
    [
        *LOSSES,
        "ce --no-flip",
        "cbd --num-teachers 2",
        "krdistill --teacher-method bsce",
        *(f"{method} --teacher resnet8x4" for method in ("cbd", "krdistill")),  # is wider
    ],
)
def test_the_step_is_the_plain_step(setting, device, data_of_78_images, monkeypatch):
    """For two epochs, of which each has its own batches, its learning rate and for bkd its weights.

    After each step the loss and all that a step changes are compared.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.backends.cuda.matmul.allow_tf32 = False  # as the program leaves it
    tolerance = 1e-5 if device == "cpu" else 1e-4
    text = f"{setting} --lr 0.002 --weight-decay 0.2 --seed 3"
    trainer = make_trainer(data_of_78_images, text, device)
    plain, entry = Plain(trainer, data_of_78_images), LOSSES[setting.split()[0]]
    # cbd has it always, also for one teacher that is as wide as the student.
    assert (trainer.student.projection is not None) == entry.joins_teachers
    momentum = [torch.zeros_like(p) for p in plain.parameters]
    images, targets, draws = *data_of_78_images[:2], generator(3)
    for epoch in (0, 1):
        trainer.student.eval()  # as a test leaves it
        trainer.start_epoch(epoch)
        assert trainer.loss_sum == trainer.correct == 0
        before_start = setting == "bkd" and epoch == 0
        counts = torch.ones_like(plain.counts) if before_start else plain.counts
        drawn = PlainImages(images, targets, draws, entry.sampler, "--no-flip" not in setting)
        for x, y in DataLoader(drawn, 32):
            x, y, before = x.to(device), y.to(device), trainer.loss_sum.item()
            trainer.step(len(y))
            loss = plain.loss(x, y, counts)
            gradients = torch.autograd.grad(loss, plain.parameters)
            with torch.no_grad():  # SGD
                for p, v, g in zip(plain.parameters, momentum, gradients, strict=True):
                    v.mul_(0.9).add_(g + 0.2 * p)
                    p.sub_(0.002 * (epoch + 1) / 5 * v)
            assert (trainer.loss_sum.item() - before) / len(y) == approx(loss.item(), rel=tolerance)
            assert not trainer.loss_sum.requires_grad  # or it would hold every step's graph
            ours = [trainer.student, trainer.adapter, *trainer.teachers]
            for network, theirs in zip(ours, plain.networks, strict=True):
                state = network.state_dict()
                assert_close(state, theirs.state_dict(), rtol=tolerance, atol=tolerance)
                theirs.load_state_dict(state)  # or rounding would grow
        assert trainer.correct.item() == plain.correct
        plain.correct = 0


def test_bkd_starts_with_the_first_epoch_of_its_share(data_of_78_images):
    """0.55 * 100 is more than 55 in floating point."""
    trainer = make_trainer(data_of_78_images, "bkd --epochs 100 --bkd-start 0.55")
    example = make_example(5, num_classes=10, counts=data_of_78_images.class_counts)
    student, teacher = (
        models.Output(z, None) for z in (example.student_logits, example.teacher_logits)
    )
    like_kd = {key: LOSSES["bkd"].hyper[key] for key in ("temperature", "alpha")}
    for epoch, name, hyper in ((54, "kd", like_kd), (55, "bkd", LOSSES["bkd"].hyper)):
        trainer.start_epoch(epoch)
        loss = trainer.loss(student, [teacher], example.targets)
        assert_close(loss, loss_of(name, example, **hyper))


@pytest.mark.parametrize(
    "epochs, rates",
    [
        (200, {0: 0.02, 4: 0.1, 159: 0.1, 160: 1e-3, 179: 1e-3, 180: 1e-5, 199: 1e-5}),
        (30, {4: 0.1, 23: 0.1, 24: 1e-3, 26: 1e-3, 27: 1e-5, 29: 1e-5}),
        (1, {0: 0.02}),
    ],
)
def test_learning_rate(epochs, rates, data_of_78_images):
    trainer = make_trainer(data_of_78_images, f"ce --epochs {epochs} --lr 0.3")
    for epoch, rate in rates.items():
        trainer.start_epoch(epoch)
        assert trainer.optimizer.param_groups[0]["lr"].item() == approx(3 * rate)


def test_the_published_recipe_is_the_default():
    config = config_of("--method ce")
    recipe = config.network, config.epochs, config.batch_size, config.lr, config.weight_decay
    assert recipe == ("resnet32", 200, 128, 0.1, 2e-4)


# The first weight of a network, of its classifier, and of krdistill's adapter, and the last weight
# of its convolutions, as they were when the runs of .results began.
FIRST_WEIGHTS = [
    ("resnet8", 0, [0.0858962, 0.1120855, -0.0760684, 0.0154694]),
    ("resnet8", 7, [0.0480412, 0.6570743, 0.1120079, 0.1714818]),
    ("resnet32", 0, [-0.4922067, 0.2596541, 0.0606868, -0.0240411]),
    ("resnet8x4", 0, [0.2114770, -0.0499268, 0.0424159, 0.0045309]),
]


@pytest.mark.parametrize("name, seed, expected", FIRST_WEIGHTS)
def test_a_seed_begins_with_the_same_weights_as_ever(name, seed, expected, data_of_78_images):
    text = f"krdistill --student {name} --seed {seed}"
    before = torch.get_rng_state()
    trainer = make_trainer(data_of_78_images, text)
    network = trainer.student
    last = network.blocks[-1].conv2.weight.flatten()[-1].item()
    layers = network.conv1, network.head, trainer.adapter
    first = [layer.weight.flatten()[0].item() for layer in layers]
    assert [*first, last] == approx(expected, abs=1e-6)
    trainer.start_epoch(0)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is not used


@pytest.mark.parametrize("method", ["bkd", "cbd", "krdistill"])
def test_the_default_device_changes_no_number(method, data_of_78_images):
    """Random numbers are drawn on the CPU. "meta" has none: it stands for a user's GPU."""
    trainer = make_trainer(data_of_78_images, method)
    states = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            again = kd_lt.Trainer(
                trainer.config, data_of_78_images, list(trainer.teachers), trainer.device
            )
            again.start_epoch(0)
            again.step(32)
            states.append(copy.deepcopy(changed_by_steps(again)))
    assert_close(*states, rtol=0, atol=0)


def test_a_network_of_ones_own_must_honour_the_head(data_of_78_images, monkeypatch):
    """Else cbd would train without a cosine classifier, and its row would look right."""

    class Own(ResNet):
        def __init__(self, num_classes, **ignored):
            super().__init__("resnet8", num_classes)

    monkeypatch.setitem(models.NETWORKS, "own", Own)
    trainer = make_trainer(data_of_78_images, "kd --student own")
    assert isinstance(trainer.student, Own) and not isinstance(trainer.teachers[0], Own)
    with pytest.raises(AssertionError, match="cosine"):
        make_trainer(data_of_78_images, "cbd --student own")


@pytest.mark.parametrize("part", ["loss_sum", "student", "adapter"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_numbers_that_are_not_finite_end_the_run(
    part, value, npz_of_9_images, tmp_path, monkeypatch
):
    def step(trainer, size):
        found = getattr(trainer, part)
        for tensor in [found] if part == "loss_sum" else found.parameters():
            tensor.data.fill_(value)

    monkeypatch.setattr(kd_lt.Trainer, "step", step)
    command = quick(npz_of_9_images, tmp_path, "--method krdistill")
    assert refused(command, "--lr")[0] == 1
    assert not [*tmp_path.glob("*-krdistill-*/result.json")]


# ---- what a CUDA graph needs, and its capture with stand-ins for torch.cuda's functions


@pytest.mark.parametrize("method", LOSSES)
def test_the_step_stays_on_its_device_and_reads_nothing_back(
    method, data_of_78_images, monkeypatch
):
    """On "meta" a CPU tensor in the step, or a value asked of a tensor, is an error."""
    rates = []

    def sgd(params, lr, *_, sgd=torch.optim.SGD, **__):  # its fused form does not know "meta"
        rates.append(lr)
        return sgd(params, 0.1, momentum=0.9, foreach=False)

    monkeypatch.setattr(torch.optim, "SGD", sgd)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # nor this
    # Once a run, not in the step:
    monkeypatch.setattr(kd_lt, "balanced_prototypes", lambda class_means: class_means)
    trainer = make_trainer(data_of_78_images, method, device="meta")
    trainer.start_epoch(0)
    for size in (32, 14):
        trainer.step(size)
    assert rates[0].is_meta and trainer.loss_sum.is_meta and trainer.correct.is_meta


@pytest.mark.parametrize("method", LOSSES)
def test_every_step_runs_the_same_operations_on_the_same_memory(method, data_of_78_images):
    """A CUDA graph repeats what it recorded: the epoch may change values alone."""

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operations[-1].append(str(func))
            return func(*args, **(kwargs or {}))

    trainer, operations, places = make_trainer(data_of_78_images, method), [], []
    for epoch in range(3):
        trainer.load_state_dict(copy.deepcopy(trainer.state_dict()))
        trainer.start_epoch(epoch)
        operations.append([])
        with Record():
            trainer.step(32)
        changed = changed_by_steps(trainer)
        owned = [*changed["momentum"], *changed["student"].values(), *changed["adapter"].values()]
        owned += [*vars(trainer).values(), *vars(trainer.batches).values()]
        owned.append(trainer.optimizer.param_groups[0]["lr"])
        places.append([v.data_ptr() for v in owned if isinstance(v, torch.Tensor)])
    assert operations[1] == operations[2]  # the first may fill a cache
    assert places[0] == places[1] == places[2]


@pytest.mark.parametrize("method", ["kd", "krdistill"])
def test_a_bf16_step(method, data_of_78_images):
    """Networks in bf16; loss, weights and momentum in float32; teachers as without their cast."""
    half, single = (
        make_trainer(data_of_78_images, method, precision=name) for name in ("bf16", "fp32")
    )
    (theirs,), (ours,) = single.teachers, half.teachers
    assert ours.conv1.weight.dtype == torch.bfloat16  # cast once, not in every step
    images = data.normalise(data_of_78_images.train_images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(images).logits, theirs(images).logits)

    def watch(module, inputs):
        for tensor in (*inputs, module.conv1.weight):  # channels_last is faster on a CPU
            assert tensor.is_contiguous(memory_format=torch.channels_last)

    half.student.register_forward_pre_hook(watch)
    outputs = []
    half.adapter.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    for trainer in (half, single):
        trainer.start_epoch(0)
        trainer.step(32)
    changed = changed_by_steps(half)
    kept = [*changed["momentum"], *half.student.parameters(), *half.adapter.parameters(), *outputs]
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    assert half.loss_sum.item() == approx(single.loss_sum.item(), rel=0.02)
    assert half.loss_sum != single.loss_sum  # and yet bf16 acts


@pytest.fixture
def capture(data_of_78_images, monkeypatch):
    """A trainer, and a log of what its capture does, on stand-ins for torch.cuda's functions.

    An error in the list "errors" ends a recording.
    """
    trainer, log, errors = make_trainer(data_of_78_images, "kd"), [], []
    trainer.start_epoch(0)
    trainer.step(32)
    trainer.student.eval()  # as a test leaves it

    def stream(name):
        def wait_stream(other):
            log.append(f"{name} waits for {other.name}")

        return SimpleNamespace(name=name, wait_stream=wait_stream)

    @contextlib.contextmanager
    def use(stream):
        log.append(f"on {stream.name}")
        yield
        log.append(f"off {stream.name}")

    @contextlib.contextmanager
    def graph(cuda_graph, pool, stream):
        log.append(f"record on {stream.name} in {pool}")
        trainer.batches.shuffle(generator(0))  # a recorded step does not run, this one does
        yield
        for error in errors:
            raise error
        cuda_graph.replay = lambda step=log[-1]: log.append(f"replay {step}")

    def note_step(network, inputs):
        log.append(f"step {len(inputs[0])}")
        assert network.training

    current = stream("current")
    for name, value in {
        "CUDAGraph": SimpleNamespace,
        "graph": graph,
        "graph_pool_handle": lambda: "the pool",
        "Stream": lambda: stream("side"),
        "stream": use,
        "current_stream": lambda: current,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    trainer.student.register_forward_pre_hook(note_step)
    return SimpleNamespace(trainer=trainer, log=log, errors=errors)


def test_capture_warms_up_records_and_restores(capture):
    trainer, log = capture.trainer, capture.log
    before = copy.deepcopy(changed_by_steps(trainer))
    step = trainer.capture()
    warm_up, recording = log[: log.index("off side")], log[log.index("off side") :]
    assert warm_up[:2] == ["side waits for current", "on side"]
    assert {*warm_up[2:]} == {"step 32", "step 14"}
    assert recording[1] == "current waits for side"
    record = "record on side in the pool"  # the smaller size last: it reuses the memory
    assert recording[2:] == [record, "step 32", record, "step 14"]
    for size in (32, 14, 32):
        step(size)
    assert log[-3:] == ["replay step 32", "replay step 14", "replay step 32"]
    assert_close(changed_by_steps(trainer), before, rtol=0, atol=0)  # the steps left no trace


@pytest.mark.parametrize("error", [RuntimeError("not permitted"), torch.OutOfMemoryError("full")])
def test_a_failed_recording(capture, error):
    """torch's own error is shown, and the way out, which is none where memory is short."""
    capture.errors.append(error)
    with pytest.raises(RuntimeError) as caught:
        capture.trainer.capture()
    if isinstance(error, torch.OutOfMemoryError):
        assert caught.value is error
    else:
        assert "--eager" in str(caught.value) and caught.value.__cause__ is error


@pytest.mark.parametrize("eager", [False, True])
def test_eager_records_nothing(eager, data_of_78_images, tmp_path, monkeypatch):
    trainer, captured = make_trainer(data_of_78_images, "ce"), []
    trainer.device = SimpleNamespace(type="cuda")  # which this machine need not have
    monkeypatch.setattr(trainer, "capture", lambda: captured.append(1))
    tests = data_of_78_images._replace(test_images=SimpleNamespace(to=lambda device: None))
    finished = [{}] * (1 + trainer.config.epochs)  # a log of which no epoch is left to train
    kd_lt.train(trainer, tests, tmp_path, finished, eval_every=1, eager=eager)
    assert bool(captured) != eager


# ---- on a GPU


@cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", LOSSES)
def test_replays_equal_eager_steps_on_cuda(method, precision, data_of_78_images, monkeypatch):
    """Two epochs from the same start; and no eager step waits for the device."""
    for name, value in (("deterministic", True), ("benchmark", False), ("allow_tf32", False)):
        monkeypatch.setattr(torch.backends.cudnn, name, value)
    ended = []
    for captured in (True, False):
        trainer = make_trainer(data_of_78_images, method, "cuda", precision)
        before = copy.deepcopy(changed_by_steps(trainer))
        step = trainer.capture() if captured else trainer.step
        assert_close(changed_by_steps(trainer), before, rtol=0, atol=0)  # warm-up left no trace
        for epoch in (0, 1):  # the second has another learning rate
            trainer.start_epoch(epoch)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for size in trainer.batches.sizes:
                    step(size)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            kd_lt.evaluate(trainer.student, data_of_78_images, trainer.device, precision)
        ended.append(copy.deepcopy(changed_by_steps(trainer)))
    assert_close(*ended, rtol=1e-2, atol=1e-2)


@cuda
def test_a_loss_with_item_is_told_on_cuda(data_of_78_images, monkeypatch):
    def edited(*args, loss=kd_lt.kd_loss, **kwargs):
        value = loss(*args, **kwargs)
        return value + 0 * value.item()

    monkeypatch.setattr(kd_lt, "kd_loss", edited)
    trainer = make_trainer(data_of_78_images, "kd", "cuda")
    try:
        with pytest.raises(RuntimeError, match="--eager"):
            trainer.capture()
    finally:  # the failed recording leaves its own stream behind
        torch.cuda.set_stream(torch.cuda.default_stream())


# ---- which images: the published subsets

# How many images, and the start of the SHA-256 of their positions within their class.
PUBLISHED = [
    ("cifar10", 10, 20_431, "2b3a8656bec5"),
    ("cifar10", 50, 13_996, "7bb90363b243"),
    ("cifar10", 100, 12_406, "8a54f5b6fa97"),
    ("cifar10", 200, 11_203, "334c2d61143b"),
    ("cifar100", 10, 19_573, "5906ba7310b9"),
    ("cifar100", 50, 12_608, "1bc82de2629e"),
    ("cifar100", 100, 10_847, "f123ec136d44"),
    ("cifar100", 200, 9_502, "36f76462dfbb"),
]
SHAPE = {"cifar10": (10, 5000), "cifar100": (100, 500)}


@pytest.mark.parametrize("name, imb, total, sha256", PUBLISHED)
def test_published_selection(name, imb, total, sha256):
    """A shuffle depends on nothing but the size of a class: labels in any order show the same."""
    classes, most = SHAPE[name]
    targets = np.arange(50000) % classes
    counts = data.long_tail_counts(classes, most, imb)
    rows = data.long_tail_indices(targets, counts)
    assert rows.dtype == torch.int64 and len(rows) == sum(counts) == total
    assert (targets[rows] == np.repeat(np.arange(classes), counts)).all()
    positions = rows.numpy() // classes
    digest = hashlib.sha256(positions.astype("<i8").tobytes()).hexdigest()
    assert digest.startswith(sha256)


@pytest.mark.parametrize(
    "name, digest", [("cifar10", "c583f5132c01b456"), ("cifar100", "22c7e9ed7160a1c8")]
)
def test_real_files(name, digest):
    root = Path(os.environ.get("KD_LT_DATA", "data"))
    if not all((root / data.CIFAR_FOLDERS[name] / f).exists() for f in data.CIFAR_SHA256[name]):
        pytest.skip(f"no {name} in {root} (set KD_LT_DATA)")  # none is downloaded here
    thin = data.load_dataset(name, root, 100)
    assert thin.digest == digest and thin.test_images.shape == (10000, 3, 32, 32)


def test_long_tail_counts():
    assert data.long_tail_counts(1, 100, 10) == [100]
    assert data.long_tail_counts(3, 100, 10) == [100, 31, 10]
    assert data.long_tail_counts(3, 7, 1) == [7, 7, 7]
    for most in range(1, 200):  # at the limit, where 1 / imb rounds down for some
        assert data.long_tail_counts(4, most, most)[-1] == 1
    for imb in (0.5, -10, math.nan, math.inf, 101):
        with pytest.raises(InputError, match="--imb"):
            data.long_tail_counts(10, 100, imb)


# ---- batches


@pytest.mark.parametrize(
    "sampler, flip", [("instance", True), ("instance", False), ("class", True)]
)
@pytest.mark.parametrize("count, size", [(60, 16), (60, 32), (60, 48), (5, 128)])
def test_batches_are_crops_of_padded_images(count, size, sampler, flip):
    images = random_images(count, size)
    targets = torch.arange(count).sqrt().to(torch.uint8)  # classes of 1, 3, 5, ... images
    batches = Batches(images, targets, 8, "cpu", sampler, flip)
    assert batches.sizes == [8] * (count // 8) + [count % 8]
    ours, again = generator(1), generator(1)
    for _ in range(2):  # every epoch anew
        batches.shuffle(ours)
        drawn = [batches.next(part) for part in batches.sizes]
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in drawn)
        plain = DataLoader(PlainImages(images, targets, again, sampler, flip), 8)
        assert_close(drawn, [tuple(part) for part in plain])
    # As published:
    assert (data.MEAN, data.STD) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@pytest.mark.parametrize(
    "shape, labels, sampler",
    [
        ((9, 3, 16, 16), 8, "instance"),
        ((8, 3, 16, 24), 8, "instance"),
        ((8, 16, 16, 3), 8, "instance"),
        ((8, 3, 16, 16), 8, "Class"),
    ],
    ids=str,
)
def test_batches_refuse_what_does_not_fit(shape, labels, sampler):
    with pytest.raises(ValueError, match="images and targets|sampler"):
        Batches(torch.zeros(shape).byte(), torch.zeros(labels).long(), 8, "cpu", sampler)


def test_batches_need_bytes_and_a_shuffle():
    """Floats from 0 to 1 would be normalised as 0 to 255."""
    images, targets = random_images(6, 16), torch.arange(6)
    with pytest.raises(ValueError, match="uint8"):
        Batches(images / 255, targets, 4, "cpu", "instance")
    with pytest.raises(IndexError):
        Batches(images, targets, 4, "cpu", "instance").next(4)


def test_normalise_after_an_export():
    """An export runs it on tensors without values, of which nothing may be kept."""
    images = random_images(2, 16)

    class Deployed(nn.Module):
        def forward(self, x):
            return data.normalise(x)

    exported = torch.export.export(Deployed(), (images,)).module()
    assert_close(exported(images), data.normalise(images))
    assert_close(data.normalise(images), (images / 255 - MEAN) / STD)


def test_the_subset_and_the_batches_stand_alone():
    """With what the head of data.py says is to be copied, and no more."""
    copied = {"np": np, "torch": torch, "Tensor": torch.Tensor, "MEAN": data.MEAN, "STD": data.STD}
    for name in ("InputError", "long_tail_counts", "long_tail_indices", "normalisation", "Batches"):
        exec(inspect.getsource(getattr(data, name)), copied)
    targets = torch.arange(10).repeat_interleave(50)
    rows = copied["long_tail_indices"](targets, copied["long_tail_counts"](10, 50, 10))
    batches = copied["Batches"](random_images(len(rows), 16), targets[rows], 8, "cpu", "class")
    batches.shuffle(generator(0))
    assert batches.next(8)[0].shape == (8, 3, 16, 16)


# ---- networks

HEADER = [line.split() for line in models.__doc__.splitlines() if line.startswith("    resnet")]


@pytest.mark.parametrize("name, layers, ten, hundred, width", HEADER)
def test_header_table(name, layers, ten, hundred, width):
    assert [row[0] for row in HEADER] == [*models.NETWORKS]
    for num_classes, parameters in ((10, ten), (100, hundred)):
        model = ResNet(name, num_classes)
        assert sum(p.numel() for p in model.parameters()) == int(parameters.replace(",", ""))
    convolutions = [m for m in model.modules() if getattr(m, "kernel_size", 0) == (3, 3)]
    assert len(convolutions) + 1 == int(layers)
    assert model.num_features == model.head.in_features == int(width)


def test_resnet_32_has_the_published_69_million_multiplications():
    """So many only where padding and strides are right, which no number of weights shows."""
    with FlopCounterMode(display=False) as flops:
        ResNet("resnet32", 10)(torch.zeros(1, 3, 32, 32))
    assert flops.get_total_flops() == 2 * 68_862_592


@pytest.mark.parametrize("size", [16, 40])
@pytest.mark.parametrize(
    "name, head, projection", [("resnet8", "linear", 0), ("resnet8x4", "cosine", 96)]
)
def test_forward(name, head, projection, size):
    """In bf16, too: then the maps are rounded, and nothing after them is."""
    torch.manual_seed(0)
    images, model = torch.randn(3, 3, size, size), ResNet(name, 7, head, projection)
    model(images)  # so that the running statistics are not the first ones
    model.eval()
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, dtype == torch.bfloat16):
            logits, features = model(images)
            maps = model.blocks(model.bn1(model.conv1(images)).relu())
        assert maps.dtype == dtype and maps.shape[2:] == (size // 4, size // 4)
        pooled = maps.float().mean((2, 3))
        assert_close(features, model.projection(pooled).relu() if projection else pooled)
        assert_close(logits, model.head(features))
        assert features.shape == (3, model.num_features) and logits.shape == (3, 7)


def test_cosine_classifier():
    torch.manual_seed(1)
    head = models.CosineClassifier(64, 5).double()
    features = torch.rand(4, 64).double()
    expected = 20 * F.cosine_similarity(features[:, None], head.weight, dim=2)
    assert_close(head(features), expected, rtol=0, atol=1e-12)
    assert head(0 * features).tolist() == [[0.0] * 5] * 4  # after a ReLU all may be zero
    assert [name for name, _ in head.named_parameters()] == ["weight"]  # no bias, no learnt scale


def test_cosine_classifier_and_projection_begin_glorot_uniform():
    torch.manual_seed(2)
    network = ResNet("resnet8", 100, "cosine", 200)
    assert network.projection.bias.count_nonzero() == 0
    for layer in (network.projection, network.head, models.CosineClassifier(64, 100)):
        weight = layer.weight.detach()
        limit = math.sqrt(6 / sum(weight.shape))
        assert 0.99 * limit < weight.max() <= limit and -limit <= weight.min() < -0.99 * limit
        assert weight.std().item() == approx(limit / math.sqrt(3), rel=0.02)
    scaled = network.blocks[-1].conv2.weight * math.sqrt(64 * 9 / 2)  # this stays Kaiming-normal
    assert scaled.std().item() == approx(1, rel=0.02) and scaled.max() > 3


@pytest.mark.parametrize(
    "shortcut, channels, stride",
    [("pad", 4, 1), ("pad", 4, 2), ("pad", 9, 2), ("conv", 4, 1), ("conv", 4, 2), ("conv", 9, 2)],
)
def test_a_block_in_plain_words(shortcut, channels, stride):
    torch.manual_seed(0)
    block = models.BasicBlock(4, channels, stride, shortcut)
    block(torch.randn(8, 4, 6, 6) + 1)  # so that the running statistics of its layers differ
    block.eval()
    x = torch.randn(2, 4, 6, 6)
    if stride == 1:
        added = x
    elif shortcut == "pad":
        new = channels - 4
        added = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, new // 2, new - new // 2))  # option A
    else:
        added = block.shortcut(x)
    inner = block.bn1(block.conv1(x)).relu()
    assert_close(block(x), (block.bn2(block.conv2(inner)) + added).relu())


# ---- files: own images, and small ones in the place of CIFAR's


@pytest.mark.parametrize("size", [16, 32, 128])
def test_own_images_are_taken_in_several_forms(tmp_path, size):
    def load(**arrays):
        return data.load_dataset(str(make_npz(tmp_path / "a.npz", size=size, **arrays)), "", 1)

    arrays = dict(np.load(make_npz(tmp_path / "a.npz", size=size)))
    x = {key: arrays.pop(key) for key in ("x_train", "x_test")}
    channels_first = {key: images.transpose(0, 3, 1, 2) for key, images in x.items()}
    whole = load()
    assert (whole.train_images.numpy() == channels_first["x_train"]).all()
    assert (whole.test_images.numpy() == channels_first["x_test"]).all()
    assert whole.train_targets.tolist() == arrays["y_train"].tolist()
    assert whole.test_targets.tolist() == [0, 1, 2] * 2 and whole.class_counts == [4, 2, 6]
    for dtype in (np.int8, np.uint16, np.uint64):
        labels = {key: y.astype(dtype)[:, None] for key, y in arrays.items()}
        assert load(**channels_first, **labels).digest == whole.digest

    grey = {key: images[..., 0] for key, images in x.items()}
    three_channels = load(**{key: np.stack(3 * [images], axis=-1) for key, images in grey.items()})
    assert load(**grey).digest == three_channels.digest != whole.digest
    for axis in (1, -1):
        one_channel = {key: np.expand_dims(images, axis) for key, images in grey.items()}
        assert load(**one_channel).digest == three_channels.digest


def test_the_digest_of_images_is_what_it_was(npz_of_9_images):
    """It is part of the name of every run, which is found by it."""
    assert data.load_dataset(str(npz_of_9_images), "", 1).digest == "c133641728cb7ffc"


BAD_ARRAYS = {  # the array that the message has to name, and what it holds
    "x_train": [
        np.full((12, 32, 32, 3), 300),
        np.zeros((12, 15, 15, 3), np.uint8),
        np.zeros((12, 3, 129, 129), np.uint8),
        np.zeros((12, 32, 48, 3), np.uint8),
        np.zeros((12, 32, 32, 4), np.uint8),
        np.zeros((12, 3072), np.uint8),
    ],
    "x_test": [np.zeros((6, 48, 48, 3), np.uint8), np.zeros((0, 32, 32, 3), np.uint8)],
    "y_train": [
        np.zeros(12),
        np.zeros(11, int),
        np.eye(3, dtype=int)[[0, 1, 2] * 4],
        np.array([None] * 12, object),
        np.zeros(12, int),
        np.array([0, 2] * 6),
        np.array([-1, 0] * 6),
    ],
    "y_test": [None, np.zeros(2, int), np.array([0, 1, 3] * 2), np.array([0, 1, -2] * 2)],
}


@pytest.mark.parametrize(
    "key, array", [(key, array) for key, arrays in BAD_ARRAYS.items() for array in arrays]
)
def test_bad_arrays_are_named_in_one_line(tmp_path, key, array):
    with pytest.raises(InputError) as caught:
        data.load_npz(make_npz(tmp_path / "bad.npz", **{key: array}))
    message = str(caught.value)
    assert "bad.npz" in message and key in message and "\n" not in message


def test_made_up_images_have_noise():
    """Of a standard deviation of 80, before it is cut to 0..255; 72 remain where no pattern is."""
    images, targets, *_ = data.synthetic(per_class=100)
    one_class = images[targets == 0].float()
    middle = (one_class.mean(0) - 128).abs() < 10
    assert one_class.std(0)[middle].mean() == approx(72, abs=2)


@pytest.fixture
def small_cifar(monkeypatch):
    """CIFAR's files by their paths, with ten images each, and SHA-256 sums that match."""
    contents = {}
    for i, (name, folder) in enumerate(data.CIFAR_FOLDERS.items()):
        for file in data.CIFAR_SHA256[name]:
            rng = np.random.RandomState(len(contents))
            content = {"data": rng.randint(256, size=(10, 3072), dtype=np.uint8)}
            content["fine_labels" if i else "labels"] = rng.permutation(10).tolist()
            raw = contents[f"{folder}/{file}"] = pickle.dumps(content | {"coarse_labels": [7] * 10})
            sha256 = hashlib.sha256(raw).hexdigest()
            monkeypatch.setitem(data.CIFAR_SHA256[name], file, sha256)
    return contents


@pytest.mark.parametrize("name, labels", [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_is_read_in_the_order_of_its_files(small_cifar, tmp_path, name, labels):
    put(small_cifar, tmp_path)
    folder = data.CIFAR_FOLDERS[name]
    *train, test = (pickle.loads(small_cifar[path]) for path in small_cifar if folder in path)
    for root in (tmp_path, tmp_path / folder):  # also where the files themselves lie
        for is_train, contents in ((True, train), (False, [test])):
            images, targets = data.load_cifar(name, root, train=is_train)
            pixels = np.concatenate([content["data"] for content in contents])
            assert (images.numpy().reshape(-1, 3072) == pixels).all()
            assert targets.tolist() == [y for content in contents for y in content[labels]]
            assert targets.dtype == torch.int64
    whole = data.load_dataset(name, tmp_path, 1)  # unthinned, but in the order of the classes
    assert whole.train_targets.tolist() == sorted(10 * len(train) // 10 * [*range(10)])
    assert (whole.test_images.numpy().reshape(-1, 3072) == test["data"]).all()


@pytest.fixture
def serve(monkeypatch, tmp_path_factory):
    """Puts an archive of the files where CIFAR's is downloaded from."""
    page = "https://www.cs.toronto.edu/~kriz/"
    archive = data.CIFAR_ARCHIVES["cifar10"]
    assert data.CIFAR_URL + archive == page + "cifar-10-python.tar.gz"

    def start(contents):
        place = tmp_path_factory.mktemp("server")
        with tarfile.open(place / archive, "w:gz") as tar:
            for name, raw in contents.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(raw)
                tar.addfile(entry, io.BytesIO(raw))
        monkeypatch.setattr(data, "CIFAR_URL", place.as_uri() + "/")
        return place / archive

    return start


@pytest.fixture
def small_cifar_10(small_cifar):
    return {path: raw for path, raw in small_cifar.items() if "cifar-10-" in path}


SECOND = "cifar-10-batches-py/data_batch_2"


def test_a_download_adds_what_is_missing_only(small_cifar_10, tmp_path, serve):
    archive = serve(small_cifar_10 | {"../evil": b"", "cifar-10-batches-py/readme.html": b""})
    root = tmp_path / "new" / "folder"
    put({SECOND: small_cifar_10[SECOND]}, root)
    before = (root / SECOND).stat().st_ino
    assert len(data.load_cifar("cifar10", root, train=True)[1]) == 50
    assert files(root) == small_cifar_10 and not (tmp_path / "new" / "evil").exists()
    assert (root / SECOND).stat().st_ino == before
    archive.unlink()  # files that are there need no network
    data.load_cifar("cifar10", root, train=False)


@pytest.mark.parametrize("harm", ["no archive", "half of it", "no files", "another file"])
def test_a_failed_download_is_told_and_leaves_whole_files_or_nothing(
    small_cifar_10, tmp_path, serve, harm
):
    small_cifar_10[SECOND] = pickle.dumps(Bomb()) if harm == "another file" else b""
    archive = serve({} if harm == "no files" else small_cifar_10)
    raw = archive.read_bytes()
    damaged = {"no archive": b"<html>", "half of it": raw[: len(raw) // 2]}
    archive.write_bytes(damaged.get(harm, raw))
    with pytest.raises(InputError) as caught:
        data.load_cifar("cifar10", tmp_path / "data", train=True)
    message = str(caught.value)
    assert archive.name in message and "--data-dir" in message and "\n" not in message
    first = f"data/{SECOND[:-1]}1"
    assert files(tmp_path).items() <= {first: small_cifar_10[first[5:]]}.items()
    assert (tmp_path / "data").exists() == bool(files(tmp_path))  # no folder without a file


def test_a_damaged_file_is_named_and_kept(small_cifar_10, tmp_path):
    damaged = small_cifar_10 | {SECOND: pickle.dumps(Bomb())}
    put(damaged, tmp_path)
    with pytest.raises(InputError, match=SECOND):
        data.load_cifar("cifar10", tmp_path, train=True)
    assert files(tmp_path) == damaged


def test_a_file_is_replaced_and_never_overwritten(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    with open(file, "rb") as reader:
        data.write_whole(file, b"a new one")
        assert reader.read() == b"old"
    assert files(tmp_path) == {"file": b"a new one"}


# ---- the README

CODE = README.replace("\\\n", " ")
COMMANDS = [*dict.fromkeys(re.findall(r"python kd_lt\.py +([^`#&|;>\n]*[^`#&|;>\s])", CODE))]
SNIPPETS = re.findall(r"```python\n(.*?)```", CODE, re.S)


def as_words(command):
    """The words that a shell makes of it, with * replaced by the files that are there."""
    printing = ["bash", "-c", f"printf '%s\\n' {command}"]
    return subprocess.check_output(printing, text=True).splitlines()


@pytest.fixture(scope="module")
def readme_folder(tmp_path_factory):
    """A folder in which the README's commands and snippets find what they speak of."""
    folder = tmp_path_factory.mktemp("readme")
    npz = make_npz(folder / "mine.npz", [100, 50, 25, 12], size=16, classes=list("abcd"))
    run_folder, _ = finish(quick(npz, folder / "runs", "--method ce --seed 1000"))
    for name in set(re.findall(r"\bruns/[\w-]+", "\n".join(COMMANDS + SNIPPETS))):
        shutil.copytree(run_folder, folder / name)
    for name in (".results", ".github"):
        if (HERE / name).is_dir():
            shutil.copytree(HERE / name, folder / name)
    return folder


@pytest.fixture
def results(readme_folder, monkeypatch):
    """The runs behind the README's numbers, which are not in every copy of the seven files."""
    monkeypatch.chdir(readme_folder)
    if not Path(".results").is_dir():
        pytest.skip("no .results here")
    return Path(".results")


def test_readme_has_the_two_commands_to_start_with():
    assert {"--smoke", "--method bkd --imb 100"} <= {*COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_run_on_a_small_file(command, readme_folder, monkeypatch, request):
    request.getfixturevalue("results" if ".results" in command else "readme_folder")
    if "--plot" in command:
        pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    monkeypatch.chdir(readme_folder)
    words = as_words(command)
    if not {"--help", "--table", "--plot"} & {*words}:
        words += ["--smoke", "--dataset", "mine.npz", "--epochs", "1", "--device", "cpu"]
    status, _, err = run(words)
    assert status == 0, err


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_readme_snippets_run_as_they_stand(snippet, readme_folder, tmp_path, monkeypatch):
    shutil.copytree(readme_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if "PIL" in snippet:  # from a folder of images to mine.npz
        image = pytest.importorskip("PIL.Image", reason="needs Pillow")
        for split, label in np.ndindex(2, 2):
            folder = tmp_path / "images" / ("train", "test")[split] / f"class {label}"
            put({"._1.png": b"no picture, from macOS", "../.notebook/1.png": b"nor this"}, folder)
            image.new("RGB", (40, 20), (90 * label, 0, 0)).save(folder / "1.png")
    monkeypatch.setattr(models, "NETWORKS", dict(models.NETWORKS))  # a snippet adds one
    made = {}
    exec(snippet, made)
    assert "loss" not in made or made["loss"].isfinite()
    if "PIL" in snippet:
        assert data.load_dataset("mine.npz", "", 1).class_counts == [1, 1]


def test_readme_has_the_tables_of_the_results(results):
    """Cell by cell: no number is typed."""
    status, out, err = run(["--table", results])
    assert (status, err) == (0, "")
    for rows in tables_of(out):
        assert rows in tables_of(README)


def test_every_run_of_the_results_is_read(results):
    for folder in (results, *{path.parents[1] for path in results.glob("*/*/result.json")}):
        status, out, err = run(["--table", folder])
        paths = [*folder.glob("*/result.json")]
        assert (status, err) == (0, "")
        assert sum(int(row[2]) for rows in tables_of(out) for row in rows) == len(paths) > 0
        for path in paths:  # by their names a command of today finds the runs of yesterday
            assert kd_lt.run_name(kd_lt.read(path)["config"]) == path.parent.name
            log = log_of(path.parent)
            assert result_of(path.parent).items() >= (log[0] | log[-1]).items()


def test_readme_picture_is_that_of_the_results(results):
    """By its words, which stand in matplotlib's comments."""
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    path = Path(".github", "head_to_tail.svg")
    (command,) = (command for command in COMMANDS if str(path) in command)
    assert run(as_words(command))[0] == 0
    kept, drawn = (
        re.findall("<!-- ([a-z].*) -->", (folder / path).read_text()) for folder in (HERE, Path())
    )
    assert kept == drawn != []


def test_readme_test_command_is_that_of_the_automatic_tests():
    if not (HERE / ".ci").is_dir():
        pytest.skip("no .ci here")
    command = (HERE / ".ci" / "run").read_text().splitlines()[-1]
    assert command.split(" && ")[-1] in CODE


# ---- run_all.sh


def run_all(folder, **variables):
    """Call the script in a folder, its own copy if there is one."""
    script = folder / "run_all.sh"
    usual = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", script if script.exists() else HERE / "run_all.sh"],
        env=usual | variables,
        cwd=folder,
        text=True,
        capture_output=True,
    )


def test_run_all_leaves_runs_to_other_copies_and_prints_the_table(npz_of_9_images, tmp_path):
    npz = os.path.relpath(npz_of_9_images, tmp_path)  # from the caller's folder
    variables = {"METHODS": "ce kd", "SEEDS": "0", "EPOCHS": "2", "EXTRA": "--device cpu"}
    variables |= {"TEACHER": "resnet8", "STUDENT": "resnet8", "DATASET": npz, "IMB": "1"}
    text = "--method ce --epochs 2 --student resnet8 --device cpu --dataset"
    busy, _ = finish([*text.split(), npz_of_9_images, "--runs-dir", tmp_path / "elsewhere"])
    with locked(tmp_path / "runs" / busy.name):
        ended = run_all(tmp_path, **variables)
    assert ended.returncode == 0 and busy.name in ended.stderr
    assert [[row[0], row[2]] for row in tables_of(ended.stdout)[-1]] == [["ce", "1"], ["kd", "1"]]
    assert len([*(tmp_path / "runs").glob("*/result.json")]) == 2  # kd and its teacher


SETTING = r'((?:\w+=(?:"[^"]*"|\S*) )*)\./run_all\.sh'
SETTINGS = {*re.findall(SETTING, (HERE / "run_all.sh").read_text() + README)}


@pytest.mark.parametrize("text", sorted({*SETTINGS, 'METHODS="ce bsce kd" TEACHER=resnet14 '}))
def test_run_all_asks_for_what_its_variables_say(text, tmp_path):
    """In its own examples, in the README's, and where some methods have no teacher."""
    given = dict(word.split("=", 1) for word in shlex.split(text))
    ended = run_all(tmp_path, **given | {"PYTHON": "true"})
    *lines, table = ended.stdout.splitlines()
    assert ended.returncode == 0 and table == f"+ true {HERE}/kd_lt.py --table runs"

    asked = [kd_lt.parse_flags(shlex.split(line)[3:]) for line in lines]  # no flag is refused
    methods = given.get("METHODS", "kd cbd dive bkd krdistill").split()
    seeds = given.get("SEEDS", "0 1 2").split()
    assert [(a.method, a.seed) for a in asked] == [(m, int(s)) for s in seeds for m in methods]
    for key in ("STUDENT", "EPOCHS", "DATASET", "IMB", "TEACHER"):
        if key in given:
            assert f"--{key.lower()} {given[key]}" in lines[-1]
    assert lines[-1].endswith(given.get("EXTRA", ""))


@pytest.mark.parametrize(
    "imports, each_run, table, ends, runs",
    [
        (0, 75, 2, 0, 15),  # busy folders are no failure; perhaps nothing is finished yet
        (0, 2, 0, 1, 15),  # failed runs are, but the others are made, and the table
        (0, 130, 0, 130, 1),  # Ctrl-C ends all
        (3, 0, 0, 3, 0),  # without torch nothing begins
    ],
)
def test_run_all_ends_as_its_runs_do(tmp_path, imports, each_run, table, ends, runs):
    """A stand-in for python ends with these statuses."""
    shutil.copy(HERE / "run_all.sh", tmp_path)  # as Slurm does: kd_lt.py is not beside it
    python = tmp_path / "python"
    cases = f"-c) exit {imports} ;; *) [ $2 = --method ] && exit {each_run}; exit {table} ;;"
    python.write_text(f'#!/bin/sh\ncase "$1" in {cases} esac\n')
    python.chmod(0o755)
    variables = {"TEACHER": "resnet20", "EXTRA": "--teacher-checkpoint x"}
    ended = run_all(tmp_path, PYTHON=str(python), **variables)
    begun = [line for line in ended.stdout.splitlines() if "--method" in line]
    assert (ended.returncode, len(begun)) == (ends, runs)
    assert all(line.endswith("--runs-dir runs --teacher-checkpoint x") for line in begun)
    assert ("--table" in ended.stdout) == (ends < 2)


# ---- evaluation


def test_images_are_tested_in_parts_and_no_graph_is_kept():
    sizes, model = [], ResNet("resnet8", 3)
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    images = torch.zeros(20, 3, 128, 128, dtype=torch.uint8)
    output = kd_lt.predict(model, images, torch.device("cpu"), "fp32")
    assert sum(sizes) == 20 > max(sizes)
    assert len(output.logits) == 20 and not output.logits.requires_grad


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_networks_are_trained_and_tested_in_their_precision(npz_of_9_images, tmp_path, precision):
    """Without the weight cache, which a CUDA graph cannot hold."""
    seen = set()

    def look(module, inputs):
        if isinstance(module, ResNet):
            cache = torch.is_autocast_cache_enabled()
            seen.add((module.training, torch.is_autocast_enabled("cpu"), cache))

    hook = nn.modules.module.register_module_forward_pre_hook(look)
    finish(quick(npz_of_9_images, tmp_path, f"--method krdistill --precision {precision}"))
    hook.remove()
    assert seen == {(is_training, precision == "bf16", False) for is_training in (False, True)}


class Elsewhere(torch.Tensor):
    """As on a GPU: it goes into no operation together with a tensor on the CPU."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if function in (torch.Tensor.cpu, torch.Tensor.to):
            return result.as_subclass(torch.Tensor)
        assert all(isinstance(arg, cls) for arg in args if isinstance(arg, torch.Tensor))
        return result


def test_groups_are_by_training_count_and_absent_when_empty():
    class Fixed(nn.Module):
        def forward(self, images):
            return torch.eye(5)[[0, 1, 1, 1, 0, 0]].as_subclass(Elsewhere), images

    tests = torch.zeros(6, 3, 32, 32), torch.tensor([0, 0, 1, 2, 3, 3])
    for counts, groups in (([101, 20, 19, 100, 5], [50, 50, 0]), ([200] * 5, [37.5, None, None])):
        part = data.Dataset(None, None, *tests, counts, "")
        scores = kd_lt.evaluate(Fixed(), part, torch.device("cpu"), "fp32")
        assert [scores[key] for key in ("many", "medium", "few")] == groups
        assert scores["top1"] == approx(100 / 3) and scores["class_counts"] == counts
        assert scores["per_class"] == [50, 100, 0, 0, None]  # without test images: None


def test_a_network_is_loaded_for_testing_onto_its_device(finished):
    generator_state = torch.get_rng_state()
    for device in ("cpu", "meta"):
        with torch.device("meta"):  # whatever the default is
            model = kd_lt.load_run(finished[1], device)
        assert {parameter.device.type for parameter in model.parameters()} == {device}
        assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), generator_state)


# ---- flags reach what they are for

ACTS = [  # a flag behind its method, and the settings that it changes
    ("--method ce --lr 0.05", {"lr": 0.05}),
    ("--method ce --weight-decay 0.01", {"weight_decay": 0.01}),
    ("--method ce --seed 5", {"seed": 5}),
    ("--method ce --batch-size 3", {"batch_size": 3}),
    ("--method ce --epochs 3", {"epochs": 3}),
    ("--method ce --precision bf16", {"precision": "bf16"}),
    ("--method ce --no-flip", {"flip": False}),
    ("--method ce --student resnet14", {"network": "resnet14"}),
    ("--method ce --imb 5", {"imb": 5.0, "data": ANY}),
    ("--method cbd --num-teachers 2", {"teachers": [ANY, ANY]}),
    ("--method kd --teacher resnet14", {"teachers": ANY}),
    ("--method kd --teacher-method bsce", {"teachers": ANY}),
]
ACTS += [
    (f"--method {name} --{key.replace('_', '-')} 0.6", {"hyper": method.hyper | {key: 0.6}})
    for name, method in kd_lt.METHODS.items()
    for key in method.hyper
]


@pytest.mark.parametrize("text, changed", ACTS, ids=[text for text, _ in ACTS])
def test_every_flag_acts_leaves_the_rest_and_makes_a_row(npz_of_9_images, text, changed):
    runs = npz_of_9_images.parent  # of all these tests, so that what they share is trained once
    plain, other = (
        finish(quick(npz_of_9_images, runs, words))[0]
        for words in (" ".join(text.split()[:2]), text)
    )
    assert losses_of(plain) != losses_of(other)
    one, two = (result_of(folder)["settings"] for folder in (plain, other))
    assert {key: two[key] for key in one if one[key] != two[key]} == changed
    rows = sum(tables_of(run(["--table", plain, other])[1]), [])
    assert len(rows) == (1 if changed == {"seed": 5} else 2)


def test_every_setting_is_changed_by_a_flag_above():
    changed = set().union(*(settings for _, settings in ACTS))
    assert changed == {f.name for f in fields(kd_lt.Config)} - {"dataset", "method", "head"}


def test_teachers_have_the_students_recipe():
    text = "--method cbd --lr 0.05 --weight-decay 0.003 --epochs 9 --batch-size 3 --no-flip"
    student = config_of(f"{text} --num-teachers 4 --seed 7 --alpha 0.5")
    same = {"method": ANY, "hyper": {}, "teachers": []}
    for k, teacher in enumerate(student.teachers, start=1):
        assert asdict(student) | same | {"seed": 7 + 1000 * k} == asdict(teacher)


def test_bkd_starts_late_on_cifar_10():
    starts = {"cifar100": 0, "cifar10": 0.8, "cifar10 --bkd-start 0": 0}
    for text, start in starts.items():
        config = config_of(f"--method bkd --dataset {text}")
        assert config.hyper["bkd_start"] == start
        is_default = "--bkd-start" not in text
        assert ("start" not in kd_lt.row_name(config)) == is_default


def test_eager_reaches_the_training(npz_of_9_images, tmp_path, monkeypatch):
    train, asked = kd_lt.train, []

    def note(*args, **kwargs):
        asked.append(inspect.signature(train).bind(*args, **kwargs).arguments["eager"])
        raise KeyboardInterrupt

    monkeypatch.setattr(kd_lt, "train", note)
    for text in ("--method ce", "--method ce --eager"):
        refused(quick(npz_of_9_images, tmp_path, text))
    assert asked == [False, True]


def test_paths_below_the_home_folder(npz_of_9_images, small_cifar, tmp_path, monkeypatch):
    """The ~ may come without a shell's help, as in --runs-dir=~/runs."""
    monkeypatch.setenv("HOME", str(tmp_path))
    put(small_cifar, tmp_path / "cifar")
    shutil.copy(npz_of_9_images, tmp_path / "nine.npz")
    text = "--method ce --dataset cifar10 --data-dir ~/cifar --imb 5"
    folder, _ = finish(quick("", "~/runs", text))
    assert result_of(folder)["class_counts"] == [5, 4, 3, 2, 2, 2, 1, 1, 1, 1]
    teacher, _ = finish(quick("~/nine.npz", "~/runs", "--method ce --seed 9"))
    text = f"--method kd --teacher-checkpoint ~/runs/{teacher.name}"
    finish(quick("~/nine.npz", "~/runs", text))
    assert run(["--table=~/runs"])[0] == 0
    assert {path.parent for path in (folder, teacher)} == {tmp_path / "runs"}


def test_the_plan_shows_every_number(npz_of_9_images, tmp_path):
    text = "--method kd --alpha 0.53 --lr 0.061 --weight-decay 0.0037 --seed 41 --no-flip"
    plan = finish(quick(npz_of_9_images, tmp_path, text))[1].split("\n\n")[0]
    shown = ["nine.npz", "no flip", "9 training", "5..1", "6 test", "kd", "0.53", "resnet8"]
    shown += ["41", "1041", "2 epochs", "3 steps", "batch size 4", "0.061", "0.0037", "fp32"]
    assert not [word for word in shown if word not in plan]


@pytest.mark.parametrize(
    "text, tabled, plotted",
    [
        ("--table", ["0.2"], []),
        ("--table --runs-dir mine", ["0.3"], []),
        ("--table a/1 b", ["0.4", "0.5"], []),
        ("--plot x.svg --runs-dir mine", [], ["0.3"]),
        ("--table a --plot x.svg b", ["0.4"], ["0.5"]),
        ("--table a --plot x.svg", ["0.4"], ["0.4"]),
    ],
)
def test_which_folders_a_report_reads(tmp_path, monkeypatch, text, tabled, plotted):
    if plotted:
        pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    for name, rate in (("runs", 0.2), ("mine", 0.3), ("a", 0.4), ("b", 0.5)):
        made_up_run(tmp_path / name / "1", f"--method ce --lr {rate}", 30.0)
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(text.split())
    picture = Path("x.svg").read_text() if plotted else ""
    assert status == 0
    assert [row[0] for rows in tables_of(out) for row in rows] == [f"ce, lr {r}" for r in tabled]
    assert re.findall(r"<!-- ce, lr (.*) -->", picture) == plotted


# ---- names of runs, table and plot


def test_names_of_runs_with_long_file_names_or_many_teachers_fit_a_file_system():
    config = config_of(f"--method cbd --num-teachers 20 --dataset {'x' * 240}.npz")
    teachers = [replace(t, lr=float(i)) for i, t in enumerate(config.teachers)]
    name = kd_lt.run_name(replace(config, teachers=teachers))
    assert len(name) < 200 and re.fullmatch(r"[\w.-]+", name)


def test_betas_near_1_are_not_rounded_into_one_row():
    one, other = (config_of(f"--method bkd --beta {beta}") for beta in (0.9999999, 0.9999995))
    assert kd_lt.row_name(one) != kd_lt.row_name(other)


def test_the_table_averages_seeds_and_never_settings(tmp_path):
    made_up_run(tmp_path / "a", "--method ce", 38.0)
    made_up_run(tmp_path / "b", "--method ce --seed 1", 42.0)
    made_up_run(tmp_path / "c", "--method ce --lr 0.2", 20.0)
    made_up_run(tmp_path / "d", "--method kd", 40.0, [30.0])
    made_up_run(tmp_path / "e", "--method kd --seed 1", 41.0, [31.0])
    made_up_run(tmp_path / "f", "--method cbd --num-teachers 2", 39.0, [30.0, 40.0])
    made_up_run(tmp_path / "g", "--method ce --epochs 30", 30.0)
    (tmp_path / "unfinished").mkdir()
    copied = shutil.copytree(tmp_path / "a", tmp_path / "copies" / "a")  # is no second seed
    made_up_run(tmp_path / "later" / "a", "--method ce", 10.0)  # hides behind the first
    folders = [tmp_path, tmp_path / "a", copied, "--table", tmp_path / "later"]
    status, out, err = run(["--table", *folders])
    assert status == 0 and str(tmp_path / "later") in err and err.count("\n") == 1
    long, short = re.split("^(?=[*][*])", out, flags=re.M)[1:]
    assert " 30 epochs" in short and " 200 epochs" in long
    assert all("4.0.0 on a GPU" in part for part in (short, long))
    rest = ["60.00", "-", "2.00"]  # an empty group is no 0 %
    rest_of_two = ["60.00 ± 0.00", "-", "2.00 ± 0.00"]
    assert tables_of(short) == [[["ce", "-", "1", "30.00", *rest]]]
    assert tables_of(long) == [
        [
            ["ce", "-", "2", "40.00 ± 2.83", *rest_of_two],
            ["ce, lr 0.2", "-", "1", "20.00", *rest],
            ["kd", "ce, 30.50 ± 0.71", "2", "40.50 ± 0.71", *rest_of_two],
            ["cbd, 2 teachers", "ce, 35.00", "1", "39.00", *rest],
        ]
    ]
    assert "ce 41.00 ± 2.83; ce, lr 0.2 21.00" in long  # the best tested epochs


def test_the_lines_from_head_to_tail_average_seeds_and_classes(tmp_path):
    for seed in (0, 1):
        made_up_run(tmp_path / f"{seed}", f"--method ce --seed {seed}", 50.0)
        result = result_of(tmp_path / f"{seed}") | {"class_counts": [*range(1, 21)]}
        result["per_class"] = [4.0 * c + 2 * seed for c in range(20)]
        (tmp_path / f"{seed}" / "result.json").write_text(json.dumps(result))
    _, out, _ = run(["--table", tmp_path])
    assert re.search("^training images +39 .* 3$", out, re.M)  # in parts of two classes
    assert re.search("^ce +75 .* 3$", out, re.M)


@pytest.mark.parametrize("key", ["dataset", "data", "head", "teachers"])
def test_runs_on_other_images_or_from_other_teachers_are_another_row(tmp_path, key):
    config = config_of("--method kd" if key == "teachers" else "--method ce")
    teachers = [replace(teacher, lr=0.2) for teacher in config.teachers]
    changes = {"dataset": "cifar10", "data": "1" * 16, "head": "cosine", "teachers": teachers}
    other = replace(config, **{key: changes[key]})
    teachers = [replace(teacher, seed=teacher.seed + 1) for teacher in other.teachers]
    for i, each in enumerate((config, other, replace(other, seed=1, teachers=teachers))):
        made_up_run(tmp_path / f"{i}", each, 40.0, [30.0])
    rows = sum(tables_of(run(["--table", tmp_path])[1]), [])
    assert sorted(row[2] for row in rows) == ["1", "2"]  # n, the number of seeds


@pytest.mark.parametrize(
    "old, new", [("{", ""), ('"imb"', '"colour": false, "imb"'), ('"ce"', '"no such method"')]
)
def test_a_damaged_run_is_named_and_left_out_of_the_table(tmp_path, old, new):
    made_up_run(tmp_path / "a", "--method ce", 38.0)
    made_up_run(tmp_path / "b", "--method ce --seed 1", 42.0)
    file = tmp_path / "b" / "result.json"
    file.write_text(file.read_text().replace(old, new, 1))
    status, out, err = run(["--table", tmp_path])
    assert status == 0 and [row[2:4] for row in tables_of(out)[0]] == [["1", "38.00"]]
    assert str(file) in err and err.count("\n") == 1
    assert run(["--table", tmp_path / "b"])[0] == 2


def test_the_picture_shows_the_gain_over_plain_ce(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="--plot needs matplotlib")
    saved = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: saved.append(self))
    for i, method in enumerate(kd_lt.METHODS):
        made_up_run(tmp_path / method, f"--method {method}", 30.0 + i)
    made_up_run(tmp_path / "again", "--method ce --seed 1", 34.0)

    def draw(*folders):
        """Each line as the legend names it, from above; the heights of the bars below."""
        assert run(["--plot", tmp_path / "x.png", *(tmp_path / name for name in folders)])[0] == 0
        axes, strip = saved.pop().axes
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        lines = {line.get_label(): [*map(float, line.get_ydata())] for line in axes.lines}
        return {name: lines[name] for name in names}, [bar.get_height() for bar in strip.patches]

    # Class 1 has the most images, and the accuracy 2 top-1; then class 0 has 60, and class 2 none.
    lines, bars = draw("ce", "again", "bsce", "kd")
    assert bars == [500, 5, 1]
    gains = {name: values[:2] for name, values in lines.items()}
    assert gains == {"ce": [0, 0], "bsce": [-2, 0], "kd": [0, 0]}  # the mean of ce is 64
    assert draw("bsce", "kd")[0]["kd"][:2] == [64, 60]  # accuracies, because there is no ce

    for top1, method in enumerate(("ce", "kd", "bsce")):
        result = result_of(tmp_path / method) | {"per_class": [0.0, 0.0, 10.0 * top1]}
        (tmp_path / method / "result.json").write_text(json.dumps(result))
    assert [*draw("ce", "bsce", "kd")[0]] == ["bsce", "kd", "ce"]  # as the lines end

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused(["--plot", tmp_path / "other.svg", tmp_path], "matplotlib")


# ---- the same numbers again


@pytest.fixture(scope="module")
def twice(npz_of_9_images, tmp_path_factory):
    """All methods in one folder, and again in another."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for folder in folders:
        for method in kd_lt.METHODS:
            text = f"--method {method}" + " --num-teachers 2" * (method == "cbd")
            finish(quick(npz_of_9_images, folder, text))
    return folders


def test_same_numbers_again(twice, npz_of_9_images):
    first, second = map(outcome, twice)
    assert first == second
    losses = {name: str(losses_of(twice[0] / name)) for name in first}
    assert len({*losses.values()}) == len(first)  # and each network has its own
    for folder in twice[0].iterdir():
        result = result_of(folder)
        network = kd_lt.load_run(folder)  # it is the one that was tested
        dataset = data.load_dataset(str(npz_of_9_images), "", 1)
        scores = kd_lt.evaluate(network, dataset, torch.device("cpu"), "fp32")
        assert scores.items() <= result.items()


def test_a_seed_means_what_it_did(twice):
    """Or nobody could check the published runs. Other processors round differently."""
    (bkd,) = twice[0].glob("*-bkd-*")
    assert losses_of(bkd) == approx([1.216, 1.823], rel=1e-2)


def test_how_often_a_run_is_tested_changes_no_number(twice, npz_of_9_images, tmp_path):
    often, _ = finish(quick(npz_of_9_images, tmp_path, "--method kd --eval-every 1"))
    seldom = twice[0] / often.name
    for tested, rows in zip(log_of(often)[1:], log_of(seldom)[1:], strict=True):
        assert "top1" in tested and tested["loss"] == rows["loss"]
    assert "top1" not in log_of(seldom)[1]
    one, other = (as_bytes(kd_lt.load_run(folder).state_dict()) for folder in (often, seldom))
    assert one == other


def test_what_is_finished_is_not_written_again(twice, npz_of_9_images, tmp_path):
    """It needs no lock, and may be another user's. A given teacher teaches as one's own."""
    runs = shutil.copytree(twice[0], tmp_path / "runs", ignore=shutil.ignore_patterns(".lock"))

    def state(folders):
        return {folder: (folder.stat().st_mtime_ns, files(folder)) for folder in folders}

    before = state(runs.iterdir())
    finish(quick(npz_of_9_images, runs, "--method bkd"))
    given = sorted(runs.glob("*cosine*"), key=lambda path: "-s2000-" in path.name)
    text = "--method cbd --teacher-checkpoint"
    again, _ = finish(quick(npz_of_9_images, tmp_path / "new", text, *given))
    assert outcome(again.parent)[again.name] == outcome(twice[0])[again.name]
    (kd,) = runs.glob("*-kd-*")
    shutil.rmtree(kd)
    finish(quick(npz_of_9_images, runs, "--method kd"))  # from its teacher, which is finished
    del before[kd]
    assert state(before) == before
    for teacher in runs.glob("*-s1000-*"):
        shutil.rmtree(teacher)
    finish(quick(npz_of_9_images, runs, "--method kd"))  # a finished student needs no teacher
    assert not [*runs.glob("*-s1000-*")]


def test_a_row_of_the_log_is_the_mean_over_the_images(data_of_78_images):
    trainer = make_trainer(data_of_78_images, "ce")
    row = kd_lt.train_epoch(trainer, trainer.step, 0)
    sums = trainer.loss_sum.item(), 100 * trainer.correct.item()
    assert (78 * row["loss"], 78 * row["train_top1"]) == approx(sums)
    assert row["lr"] == approx(0.02)


def test_the_result_is_that_of_the_last_epoch_not_of_the_best(
    npz_of_9_images, tmp_path, monkeypatch
):
    top1, evaluate = [90.0, 10.0], kd_lt.evaluate

    def made_up(*args, **kwargs):
        return evaluate(*args, **kwargs) | {"top1": top1.pop(0)}

    monkeypatch.setattr(kd_lt, "evaluate", made_up)
    folder, _ = finish(quick(npz_of_9_images, tmp_path, "--method ce --eval-every 1"))
    assert [result_of(folder)[key] for key in ("top1", "best_top1")] == [10, 90]


@pytest.mark.parametrize(
    "is_terminal, seconds, left",
    [
        (False, 1.0, ["1 min", "48 s", "36 s", "24 s", "12 s", "0 s"]),
        (True, 150.0, ["2.5 h", "2.0 h", "90 min", "60 min", "30 min", "0 s"]),
    ],
)
def test_progress_and_the_time_that_is_left(
    tmp_path, monkeypatch, capsys, is_terminal, seconds, left
):
    """The time is that of the whole command: here two teachers and a student, two epochs each."""
    clock, step = [0.0], kd_lt.Trainer.step

    def timed(trainer, size):
        clock[0] += seconds
        step(trainer, size)

    for name in ("perf_counter", "monotonic", "time"):
        monkeypatch.setattr(time, name, lambda: clock[0])
    monkeypatch.setattr(kd_lt.Trainer, "step", timed)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    npz = make_npz(tmp_path / "a.npz", [12, 8, 4], size=16)  # 12 steps of 2 images
    words = quick(npz, tmp_path / "runs", "--method cbd --num-teachers 2 --batch-size 2")
    assert kd_lt.main(words) == 0
    out = capsys.readouterr().out
    assert re.findall(r"(?:^|\x1b\[K) +[12]/2 .* (\S+ (?:s|min|h))$", out, re.M) == left
    shown = re.findall("step ([0-9]+) of 12", out)
    if is_terminal:  # each step in place
        assert shown == 6 * [str(n) for n in range(1, 13)] and out.count("\r\x1b[K") == 6 * 13
    else:  # a sign of life, in the first epoch of each network
        assert shown == ["10", "10", "10"] and "\r" not in out
        for folder in (tmp_path / "runs").iterdir():
            assert [row["images_per_second"] for row in log_of(folder)[1:]] == [2, 2]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
def test_smoke_learns(tmp_path, device):
    folder, out = finish(["--smoke", "--device", device, "--runs-dir", tmp_path])
    result, (teacher,) = result_of(folder), (f for f in tmp_path.iterdir() if f != folder)
    of_teacher = result_of(teacher)
    assert result["top1"] > 40 and of_teacher["top1"] > 40 and result["many"] > 80
    assert [f"{scores['top1']:.2f}" for scores in (of_teacher, result)] == [
        row[3] for row in tables_of(out)[0]
    ]
    if device == "cpu":  # on a GPU two runs of one seed can differ, and every epoch is tested
        assert result["few"] > of_teacher["few"]  # what BKD is for
        assert [row["epoch"] for row in log_of(folder)[1:] if "top1" in row] == [5, 8]


# ---- kills, stops, full disks, locks

FORKED = multiprocessing.get_context("forkserver")  # real processes that need not import torch
# Not this file: it asks whether there is a GPU, after which a process must not be forked. dynamo is
# what the first optimizer imports.
FORKED.set_forkserver_preload(["kd_lt", "pytest", "torch._dynamo", "torch.utils.flop_counter"])


def child(words, out):
    """In a process of its own: one command, its output in a file."""
    sys.stdout = sys.stderr = open(out, "w", buffering=1)  # noqa: SIM115  ends with the process
    sys.exit(kd_lt.main(words))


def start(words, out):
    """Start one command in a process of its own."""
    out.write_text("")
    process = FORKED.Process(target=child, args=(words, out))
    process.start()
    return process


def wait_until(met, seconds=300):
    """Return when the condition is met; fail when it is not in time."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


@pytest.mark.parametrize("text", ["--method krdistill", "--method cbd --num-teachers 2"])
def test_killed_at_random_moments(npz_of_9_images, tmp_path, text):
    text += " --epochs 6"
    began = time.monotonic()
    want = outcome(finish(quick(npz_of_9_images, tmp_path / "whole", text))[0].parent)
    seconds = time.monotonic() - began
    runs, out, rng, landed = tmp_path / "runs", tmp_path / "out", random.Random(text), 0
    for _ in range(40):
        process = start(quick(npz_of_9_images, runs, text), out)
        wait_until(lambda p=process: out.read_text() or p.exitcode is not None)
        process.join(rng.uniform(0, seconds / 2))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was quicker: that one must be right
            assert outcome(runs) == want
            shutil.rmtree(runs)
        else:
            assert process.exitcode == -signal.SIGKILL, out.read_text()
            landed += any(runs.glob("*/last.pt"))
        if landed == 5:
            break
    finish(quick(npz_of_9_images, runs, text))  # the dead left their locks
    assert outcome(runs) == want and landed == 5


def test_interrupted_at_every_write(finished, npz_of_9_images, tmp_path):
    """Also between log.jsonl and last.pt, and between the last of them and the result."""

    def words(name):
        """A command whose teacher is finished."""
        shutil.copytree(finished[0], tmp_path / name / finished[0].name)
        return quick(npz_of_9_images, tmp_path / name, "--method krdistill")

    with interrupted_at_write(math.inf) as written:
        finish(words("whole"))
    assert len(written) == 5
    for n in range(len(written)):
        command = words(f"runs{n}")
        with interrupted_at_write(n):
            assert refused(command)[0] == 130
        finish(command)
        assert outcome(tmp_path / f"runs{n}") == outcome(tmp_path / "whole"), n


def test_the_last_whole_epoch_outlives_a_full_disk(stopped, npz_of_9_images, tmp_path):
    runs, last = stopped.parent, stopped / "last.pt"
    before = last.read_bytes()
    command = quick(npz_of_9_images, runs, "--method ce")
    with full_disk(len(before) // 2):  # log.jsonl, which is short, gets ahead
        status, message = refused(command, runs)
    assert status == 1 and os.strerror(errno.EFBIG) in message
    assert last.read_bytes() == before and len(log_of(stopped)) == 3
    assert not [*runs.glob("*/*.partial")]
    for folder in (runs, tmp_path / "whole"):
        finish([*command, "--runs-dir", folder])
    assert outcome(runs) == outcome(tmp_path / "whole")


def test_one_writer(npz_of_9_images, tmp_path):
    runs, outs = tmp_path / "runs", [tmp_path / "kd", tmp_path / "bkd"]
    commands = [quick(npz_of_9_images, runs, f"--method {out.name}") for out in outs]
    student, _ = finish([*commands[0], "--runs-dir", tmp_path / "whole"])
    want = outcome(tmp_path / "whole")
    (teacher,) = want.keys() - {student.name}
    with locked(runs / teacher):
        both = [start(*pair) for pair in zip(commands, outs, strict=True)]
        wait_until(lambda: all(teacher in out.read_text() for out in outs))
        third = start(commands[0], tmp_path / "third")
        third.join(60)
        assert third.exitcode == 75 and student.name in (tmp_path / "third").read_text()
    for process in both:
        process.join()
    shown = [out.read_text() for out in outs]
    assert [process.exitcode for process in both] == [0, 0], shown
    assert sum(len(re.findall("^ +1/2 ", text, re.M)) for text in shown) == 3
    found = outcome(runs)
    assert len(found) == 3 and found.items() >= want.items()


def test_a_run_works_where_files_cannot_be_locked(npz_of_9_images, tmp_path, monkeypatch):
    monkeypatch.setattr(kd_lt, "fcntl", None)  # as on Windows
    finish(quick(npz_of_9_images, tmp_path, "--method ce --epochs 1"))


# ---- resume, and what it does about damage


def test_a_resumed_run_keeps_what_it_was_and_heals(stopped, npz_of_9_images, tmp_path):
    """Its command, version and device. The log is written whole; a file that was begun goes."""
    runs = stopped.parent
    content = torch.load(stopped / "last.pt", weights_only=True)
    content["log"][0] |= {"device": "another", "version": "4.0.0a", "command": "the first"}
    torch.save(content | content["log"][0], stopped / "last.pt")
    (stopped / "log.jsonl").unlink()
    (stopped / "last.pt.1234.partial").write_bytes(b"half")
    finish(quick(npz_of_9_images, runs, "--method ce"))
    result = result_of(stopped)
    assert result["command"] == "the first"
    assert result["device"] == f"another, then {kd_lt.machine(torch.device('cpu'))}"
    assert result["version"] == f"4.0.0a, then {kd_lt.VERSION}"
    finish(quick(npz_of_9_images, tmp_path / "whole", "--method ce"))
    one, other = (outcome(folder)[stopped.name] for folder in (runs, tmp_path / "whole"))
    assert one["student"] == other["student"] and one["log"][1:] == other["log"][1:]


@pytest.mark.parametrize("name", ["last.pt", "result.json"])
def test_a_damaged_file_is_named_and_nothing_is_changed(finished, npz_of_9_images, tmp_path, name):
    runs = shutil.copytree(finished[0].parent, tmp_path / "runs")
    file = runs / finished[1].name / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    if name == "last.pt":  # else the result alone is read
        (file.parent / "result.json").unlink()
    before, command = files(runs), quick(npz_of_9_images, runs, "--method kd")
    assert refused(command, file)[0] == 2
    assert files(runs) == before
    file.parent.rename(tmp_path / "away")
    assert outcome(finish(command)[0].parent) == outcome(finished[0].parent)


@pytest.mark.parametrize("kind", ["version 3", "plain weights", "code", "no file"])
def test_what_is_no_run_of_this_version_is_refused_in_one_line(finished, tmp_path, kind):
    content = torch.load(finished[0] / "last.pt", weights_only=True)
    old = {"imb_type": "exp", "subset_seed": 0, "colour": False}
    wrong = {
        "version 3": content | {"settings": content["settings"] | old},
        "plain weights": content["student"],
        "code": content | {"more": Bomb()},
    }
    if kind in wrong:
        torch.save(wrong[kind], tmp_path / "last.pt")
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "last.pt"))) as caught:
        kd_lt.load_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_of_a_gpu_are_read_without_one(finished, tmp_path):
    """The name of the device stands in the pickle once."""
    with (
        zipfile.ZipFile(finished[0] / "last.pt") as ours,
        zipfile.ZipFile(tmp_path / "last.pt", "w") as theirs,
    ):
        for name in ours.namelist():
            raw = ours.read(name).replace(b"\3\0\0\0cpu", b"\6\0\0\0cuda:0")
            theirs.writestr(name, raw)
    state = kd_lt.load_run(tmp_path).state_dict()
    assert as_bytes(state) == as_bytes(kd_lt.load_run(finished[0]).state_dict())


# ---- given teachers


def test_what_else_may_teach(finished, npz_of_9_images, tmp_path):
    """A teacher of the student's seed and another network, on the same images renamed."""
    renamed = shutil.copy(npz_of_9_images, tmp_path / "renamed.npz")
    text = "--method kd --seed 1000 --student resnet14 --epochs 1 --teacher-checkpoint"
    for given in (finished[0], finished[0] / "last.pt"):
        folder, _ = finish(quick(renamed, tmp_path / "runs", text, given))
    assert result_of(folder)["teachers_top1"] == [result_of(finished[0])["top1"]]
    assert len([*(tmp_path / "runs").iterdir()]) == 1


def test_a_teacher_that_does_not_fit_is_refused(finished, stopped, npz_of_9_images, tmp_path):
    other_images = make_npz(tmp_path / "nine.npz", [3, 5, 1])
    plain_weights = tmp_path / "t.pt"
    torch.save(kd_lt.load_run(finished[0]).state_dict(), plain_weights)
    refusals = [
        (finish(quick(npz_of_9_images, tmp_path, "--method ce --imb 5"))[0], "", "imb 5"),
        (finish(quick(other_images, tmp_path, "--method ce"))[0], "", "nine.npz"),
        (finished[0], "--method cbd", "cosine"),
        (finished[0], "--seed 1000", "--seed"),  # the teacher's
        (stopped, "", "result.json"),
        (plain_weights, "", "--teacher-checkpoint"),
        (tmp_path / "absent", "", ""),
    ]
    for teacher, text, reason in refusals:
        text = f"--method kd --seed 3 {text} --teacher-checkpoint"
        words = quick(npz_of_9_images, tmp_path / "new", text, teacher)
        assert refused(words, teacher, reason)[0] == 2
    text = "--method kd --seed 3 --teacher-checkpoint"  # which has one teacher
    for between in ([], ["--teacher-checkpoint"]):
        words = quick(npz_of_9_images, tmp_path / "new", text, finished[0], *between, finished[0])
        refused(words, "--teacher-checkpoint")
    assert not (tmp_path / "new").exists()


# ---- the script and its output


def script(words, **options):
    """The ended program, started as a user starts it."""
    words = [sys.executable, HERE / "kd_lt.py", *words]
    return subprocess.run(words, stderr=subprocess.PIPE, text=True, **options)


def test_an_output_that_is_closed_ends_no_training(npz_of_9_images, tmp_path):
    words = quick(npz_of_9_images, tmp_path, "--method ce --epochs 1")
    ended = script(words, preexec_fn=lambda: os.close(1))
    assert (ended.returncode, ended.stderr) == (0, "")
    outcome(tmp_path)


def test_a_reader_that_has_enough_is_no_error(finished):
    reader, writer = os.pipe()
    os.close(reader)  # what `| head` does once it has its lines
    ended = script(["--table", finished[0].parent], stdout=writer)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_an_output_that_is_ascii_and_a_backend_that_is_missing(tmp_path):
    """As in an old container, and from a notebook."""
    for seed in (0, 1):
        made_up_run(tmp_path / str(seed), f"--method ce --seed {seed}", 38.0)
    words = ["--table", tmp_path]
    if importlib.util.find_spec("matplotlib"):
        words += ["--plot", tmp_path / "x.png"]
    env = os.environ | {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "not_there"}
    ended = script(words, env=env, stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (0, "") and "38.00 ? 0.00" in ended.stdout
    assert (tmp_path / "x.png").exists() == ("--plot" in words)


def test_the_recorded_command_is_what_a_shell_takes_back(npz_of_9_images, tmp_path):
    words = quick(npz_of_9_images, tmp_path / "my runs", "--method ce --epochs 1")
    command = result_of(finish(words)[0])["command"]
    assert shlex.split(command) == ["kd_lt.py", *words]


# ---- wrong input

BAD = [  # commands whose last flag has to be named
    # out of range, or unknown
    "--imb 0.5",
    "--imb 201",
    "--epochs 0",
    "--batch-size 0",
    "--lr 0",
    "--lr nan",
    "--weight-decay -1",
    "--temperature 0",
    "--temperature 101",
    "--alpha -1",
    "--beta -1",
    "--bkd-start 1.1",
    "--seed -1",
    "--seed 99999999999",
    "--eval-every 0",
    "--method no-such-method",
    "--student resnet18",
    "--teacher-method kd",
    "--dataset mnist",
    "--epoch 1",
    # ignored by the method, or out of its own range
    "--method ce --alpha 1",
    "--method ce --teacher resnet8",
    "--method ce --num-teachers 1",
    "--method ce --teacher-checkpoint x",
    "--method kd --beta 0.9",
    "--method kd --num-teachers 2",
    "--method kd --teacher-checkpoint",
    "--method kd --teacher-checkpoint x --teacher resnet8",
    "--method kd --teacher-checkpoint x --teacher-method ce",
    "--method cbd --teacher-checkpoint x --num-teachers 2",
    "--method cbd --temperature 2",
    "--method cbd --alpha 1.5",
    "--method bkd --beta 1",
    "--method dive --alpha 1.5",
    "--method dive --power -1",
    "--method krdistill --gamma -1",
    # reports
    "--plot x.txt",
    "--table --seed 1",
    "--table --method=bkd",  # the default, but it looks like a filter
    "--plot x.png --seed 1",
]


@pytest.mark.parametrize("text", BAD)
def test_a_bad_flag_is_named(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    flag = re.findall("--[a-z-]+", text)[-1]
    assert refused(["--smoke", "--runs-dir", "runs", *text.split()], flag)[0] == 2
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "text", ["--table absent", "unexpected", "--plot x.png absent", "--dataset absent.npz"]
)
def test_a_bad_word_is_named(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(text.split())
    assert status == 2 and text.split()[-1] in err
    assert not [*tmp_path.iterdir()]


# ---- devices


def test_the_name_of_a_cpu_has_its_threads():
    for threads, name in ((3, "3 threads, "), (1, "1 thread, ")):
        torch.set_num_threads(threads)
        assert name in kd_lt.machine(torch.device("cpu"))


def choose(text):
    device, precision = kd_lt.choose_device(kd_lt.parse_flags(text.split()))
    return device.type, precision


def test_a_gpu_that_is_asked_for_and_not_there(npz_of_9_images, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(quick(npz_of_9_images, tmp_path, "--device cuda"), "--device")[0] == 2
    assert choose("--precision fp32") == ("cpu", "fp32")


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("avx512", [True, False])
def test_a_cpu_computes_in_bf16_where_it_has_it(monkeypatch, avx512, amx):
    functions = {"_is_avx512_bf16_supported": lambda: avx512, "_is_amx_tile_supported": lambda: amx}
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(**functions))
    assert choose("--device cpu") == ("cpu", "bf16" if avx512 or amx else "fp32")
    for asked in ("fp32", "bf16"):
        assert choose(f"--device cpu --precision {asked}") == ("cpu", asked)
    monkeypatch.setattr(torch, "cpu", SimpleNamespace())  # these functions of torch are private
    assert choose("--device cpu") == ("cpu", "fp32")


@pytest.mark.parametrize(
    "card, asked, found",
    [((7, 5), "auto", "fp32"), ((8, 0), "auto", "bf16"), ((7, 5), "fp32", "fp32")],
)
def test_bf16_needs_a_card_that_has_it(monkeypatch, card, asked, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: card)
    torch.backends.cuda.matmul.allow_tf32 = True  # as some containers have it
    torch.backends.cudnn.allow_tf32 = True  # as torch has it
    assert choose(f"--precision {asked}") == ("cuda", found)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.benchmark
    assert choose("--device cpu --precision fp32") == ("cpu", "fp32")
    if card < (8, 0):
        refused(["--smoke", "--precision", "bf16"], "--precision")


# ---- on request, with -s -k speed: how long a step takes


def test_speed(request):
    if "speed" not in request.config.getoption("-k"):
        pytest.skip("on request: -s -k speed")
    torch.set_num_threads(THREADS)
    device, precision = kd_lt.choose_device(kd_lt.parse_flags([]))
    steps = 100 if device.type == "cuda" else 5
    dataset = long_tailed(128 * steps // 10, 1)
    text = "bkd --student resnet32 --teacher resnet32 --batch-size 128"
    trainer = make_trainer(dataset, text, device, precision)
    trainer.start_epoch(0)
    step = trainer.capture() if device.type == "cuda" else trainer.step
    plain = Plain(trainer, dataset)
    optimizer = torch.optim.SGD(plain.parameters, 0.1, momentum=0.9, weight_decay=2e-4)
    images = PlainImages(dataset.train_images, dataset.train_targets, generator(0))
    loader = DataLoader(images, 128, num_workers=4 if device.type == "cuda" else 0)

    def our_epoch():
        trainer.start_epoch(0)
        for size in trainer.batches.sizes:
            step(size)
        trainer.loss_sum.item()

    def plain_epoch():
        for images, targets in loader:
            loss = plain.loss(images.to(device), targets.to(device), plain.counts)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    print(f"\nbkd, resnet32 from resnet32, batch 128, {precision}, {kd_lt.machine(device)}")
    for name, epoch in (("this program", our_epoch), ("plain path", plain_epoch)):
        times = []
        for _ in range(6):  # the first is not counted
            began = time.perf_counter()
            epoch()
            times.append((time.perf_counter() - began) / steps)
        seconds = statistics.median(times[1:])
        print(f"{name:<13}{1000 * seconds:9.2f} ms/step {128 / seconds:8.0f} images/s")
