# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the kd-lt authors
"""Tests. The file is read from top to bottom; its headings begin with "# ----". In their order:

    losses       a worked example, an example of all arguments, oracles in plain Python
    steps        against a plain step; what a CUDA graph needs; on a GPU
    data         the published subsets, batches, networks, files
    program      how a command is run here, the README, run_all.sh, evaluation
    settings     flags, run names, table and plot
    runs         the same numbers again; kills and locks; resume and damage; given teachers
    edges        the script's output, wrong input, devices
    speed        on request

They need no network. A test that is about the CPU says --device cpu, so that a GPU in the machine
changes nothing. Real CIFAR is used where it lies in ./data or in the folder KD_LT_DATA names.
"""

import contextlib
import copy
import errno
import fcntl
import functools
import hashlib
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
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

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
from data import MEAN, STD, Batches, InputError, distort_colour
from models import NETWORKS, ResNet

THREADS = torch.get_num_threads()  # for test_speed; elsewhere batches of four are slower on more
torch.set_num_threads(1)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# ---- a worked example: bkd on one image of two classes, by hand


def test_bkd_by_hand():
    """The head has 3 images, the tail 1. With beta = 0.5 the effective numbers are 7/4 and 1.

    The weights are proportional to 4/7 and 1, that is to 4 and 7. The teacher holds 7 : 4 for the
    head, so that the weighted target is 28 : 28, one half each.
    """
    teacher_logits = torch.tensor([[math.log(7), math.log(4)]])
    student_logits = torch.tensor([[math.log(3), math.log(1)]])  # 3/4 and 1/4
    loss = kd_lt.bkd_loss(
        student_logits, teacher_logits, torch.tensor([0]), [3, 1], temperature=1.0, beta=0.5
    )
    cross_entropy = -math.log(3 / 4)
    divergence = 0.5 * math.log(0.5 / (3 / 4)) + 0.5 * math.log(0.5 / (1 / 4))
    assert loss.item() == approx(cross_entropy + divergence)


# ---- an example: the arguments of every loss


@dataclass
class Example:
    """What the losses take: B images, C classes, D features, two teachers for cbd."""

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


LOSSES = {  # the function, and which fields of an example it takes
    "ce": (F.cross_entropy, ("student_logits", "targets")),
    "bsce": (kd_lt.balanced_softmax_loss, ("student_logits", "targets", "class_counts")),
    "kd": (kd_lt.kd_loss, ("student_logits", "teacher_logits", "targets")),
    "bkd": (kd_lt.bkd_loss, ("student_logits", "teacher_logits", "targets", "class_counts")),
    "cbd": (
        kd_lt.cbd_loss,
        ("student_logits", "student_features", "teacher_features", "targets"),
    ),
    "dive": (kd_lt.dive_loss, ("student_logits", "teacher_logits", "targets", "class_counts")),
    "krdistill": (
        kd_lt.krdistill_loss,
        (
            "student_logits",
            "student_features",
            "rectified_logits",
            "rectified_features",
            "targets",
            "class_counts",
        ),
    ),
}
OURS = [name for name in LOSSES if name != "ce"]
HELPERS = ["at_least_float32", "as_counts", "kl_to_target"]
COMPANIONS = {  # what has to be copied with a loss, where it is not the helpers
    "bkd_loss": [*HELPERS, "effective_number_weights"],
    "cbd_loss": ["at_least_float32"],
    "dive_loss": [*HELPERS, "balanced_softmax_loss"],
    "krdistill_loss": [*HELPERS, "balanced_softmax_loss"],
}


def doubles(values):
    """The values as a float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def generator(seed):
    """A generator of its own, so that no test depends on another."""
    return torch.Generator().manual_seed(seed)


def randn(seed, *shape):
    """Normally distributed float64 numbers, the same for the same seed."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def make_example(seed, batch=4, num_classes=5, scale=2.0, counts=None):
    """A random example in float64, with counts from one to a million."""
    logits = scale * randn(seed, 2, batch, num_classes)
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


def loss_of(name, example, function=None, **hyper):
    """The loss of an example, by the program's function or by another."""
    ours, arguments = LOSSES[name]
    return (function or ours)(*(getattr(example, key) for key in arguments), **hyper)


def value_and_gradients(name, example, function=None, **hyper):
    """The loss, and its gradients in the student's tensors; none may reach the teacher's."""
    example = replace(
        example,
        teacher_logits=example.teacher_logits.detach().requires_grad_(),
        rectified_features=example.rectified_features.detach().requires_grad_(),
        teacher_features=[f.detach().requires_grad_() for f in example.teacher_features],
    )
    learned = ["student_logits"]
    if name in ("cbd", "krdistill"):
        learned.append("student_features")
    inputs = {key: getattr(example, key).detach().requires_grad_() for key in learned}
    loss = loss_of(name, replace(example, **inputs), function, **hyper)
    loss.backward()
    of_teachers = [example.teacher_logits, example.rectified_features, *example.teacher_features]
    assert all(tensor.grad is None for tensor in of_teachers)
    return loss.detach(), {key: tensor.grad for key, tensor in inputs.items()}


# ---- oracles: loops over images and classes, Python floats


def softmax(z, temperature=1.0):
    """Of a list of logits, in Python floats."""
    exp = [math.exp((v - max(z)) / temperature) for v in z]
    return [v / sum(exp) for v in exp]


def kl_oracle(q, z, temperature):
    """T^2 times the divergence of the softened student from the target q, for one image."""
    p = softmax(z, temperature)
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))


def unit(v):
    """The vector scaled to length 1."""
    return [a / math.hypot(*v) for a in v]


def distance(a, b):
    """The cosine distance of two vectors."""
    return 1 - sum(p * q for p, q in zip(unit(a), unit(b), strict=True))


def weights_oracle(counts, beta):
    """Inverse effective numbers of images, with mean 1."""
    v = [(1 - beta) / (1 - beta**n) for n in counts]
    return [len(v) * v_c / sum(v) for v_c in v]


def rectified_oracle(z, y, pi):
    """The prior taken out, then the true and the largest entry exchanged, for one image."""
    z = [v - math.log(p) for v, p in zip(z, pi, strict=True)]
    top = z.index(max(z))
    z[y], z[top] = z[top], z[y]
    return z


def oracle(name, example, temperature=2.0, alpha=None, beta=None, gamma=2.0, power=0.5):
    """The loss of an example given as lists, image by image."""
    alpha = {"cbd": 0.4, "dive": 0.5}.get(name, 1.0) if alpha is None else alpha
    beta = {"cbd": 100.0}.get(name, 0.9999) if beta is None else beta
    pi, losses = [n / sum(example.class_counts) for n in example.class_counts], []
    for b, (z, t, y) in enumerate(
        zip(example.student_logits, example.teacher_logits, example.targets, strict=True)
    ):
        q, ce = softmax(t, temperature), -math.log(softmax(z)[y])
        bsce = -math.log(softmax([v + math.log(p) for v, p in zip(z, pi, strict=True)])[y])
        match name:
            case "bsce":
                loss = bsce
            case "kd":
                loss = ce + alpha * kl_oracle(q, z, temperature)
            case "bkd":
                q = [
                    w * p
                    for w, p in zip(weights_oracle(example.class_counts, beta), q, strict=True)
                ]
                q = [p / sum(q) for p in q]
                loss = ce + alpha * kl_oracle(q, z, temperature)
            case "cbd":
                joined = [v for teacher in example.teacher_features for v in unit(teacher[b])]
                loss = (1 - alpha) * ce + alpha * beta * distance(
                    example.student_features[b], joined
                )
            case "dive":
                q = [p**power / sum(p**power for p in q) for p in q]
                loss = (1 - alpha) * bsce + alpha * kl_oracle(q, z, temperature)
            case "krdistill":
                q = softmax(rectified_oracle(t, y, pi), temperature)
                rrd = distance(example.student_features[b], example.rectified_features[b])
                loss = bsce + alpha * kl_oracle(q, z, temperature) + gamma * rrd
        losses.append(loss)
    return statistics.fmean(losses)


def check_against_oracle(name, example, function=None, **hyper):
    """Compare the value, and the gradients with central differences of the oracle."""
    value, gradients = value_and_gradients(name, example, function, **hyper)
    example = replace(
        example,
        **{
            key: getattr(example, key).tolist()
            for key in (
                "student_logits",
                "student_features",
                "teacher_logits",
                "rectified_features",
                "targets",
            )
        },
        teacher_features=[f.tolist() for f in example.teacher_features],
        class_counts=[float(n) for n in example.class_counts],
    )
    assert value.item() == approx(oracle(name, example, **hyper), rel=1e-10)
    for key, gradient in gradients.items():
        rows, step = getattr(example, key), 1e-5
        for b, c in np.ndindex(*gradient.shape):
            here, around = rows[b][c], []
            for moved in (here + step, here - step):
                rows[b][c] = moved
                around.append(oracle(name, example, **hyper))
            rows[b][c] = here
            difference = (around[0] - around[1]) / (2 * step)
            assert gradient[b, c].item() == approx(difference, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    "name, hyper",
    [
        *((name, {}) for name in OURS),
        ("kd", {"temperature": 0.7, "alpha": 0.3}),
        ("bkd", {"temperature": 5.0, "alpha": 0.5, "beta": 0.99}),
        ("cbd", {"alpha": 0.8, "beta": 3.0}),
        ("dive", {"temperature": 3.0, "alpha": 0.2, "power": 0.7}),
        ("krdistill", {"temperature": 3.0, "alpha": 0.2, "gamma": 7.0}),
    ],
)
def test_loss_is_the_oracle(name, hyper):
    for seed, batch, num_classes in ((0, 4, 5), (1, 1, 3), (2, 3, 7)):
        check_against_oracle(name, make_example(seed, batch, num_classes), **hyper)


def alone(function):
    """The function as it works in another file, with no more than its companions."""
    copied = {"torch": torch, "F": F, "Tensor": torch.Tensor, "math": math}
    copied |= {"Sequence": Sequence, "Counts": list}  # Counts is an annotation
    for name in (*COMPANIONS.get(function, HELPERS), function):
        exec(inspect.getsource(getattr(kd_lt, name)), copied)
    return copied[function]


@pytest.mark.parametrize("name", OURS)
def test_a_loss_stands_alone(name):
    function = LOSSES[name][0]
    check_against_oracle(name, make_example(3), alone(function.__name__))
    hyper = [v for key, v in kd_lt.METHODS[name].hyper.items() if key != "bkd_start"]
    assert hyper == [*(function.__defaults__ or ())]  # the program's defaults are the loss's


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("effective_number_weights", ([9, 3, 1],)),
        ("balanced_prototypes", (torch.eye(3),)),
        ("rectify_logits", (torch.eye(3), torch.tensor([0, 2, 2]), [9, 3, 1])),
        ("rectify_features", (torch.eye(3), torch.tensor([0, 2, 2]), torch.eye(3), torch.eye(3))),
    ],
)
def test_what_a_loss_gets_stands_alone(name, arguments):
    assert_close(alone(name)(*arguments), getattr(kd_lt, name)(*arguments))


def test_cross_entropy_skips_images_labelled_minus_100_and_the_kl_does_not():
    example = make_example(30)
    targets = example.targets.clone()
    targets[1] = -100
    kept = [0, 2, 3]
    for name in ("kd", "bkd"):
        ce = F.cross_entropy(example.student_logits[kept], targets[kept])
        kl = loss_of(name, example) - loss_of("ce", example)
        assert_close(loss_of(name, replace(example, targets=targets)), ce + kl)


@pytest.mark.parametrize("name", OURS)
def test_a_loss_compiles_as_one_graph(name):
    example = replace(make_example(31), class_counts=torch.tensor([200, 50, 9, 3, 1]))
    try:
        compiled = torch.compile(LOSSES[name][0], fullgraph=True, backend="eager")
    except RuntimeError as error:  # an older torch cannot with a newer Python
        pytest.skip(str(error))
    assert_close(loss_of(name, example, compiled), loss_of(name, example))


def test_equal_weights_make_bkd_kd():
    example = make_example(6, counts=[500, 120, 30, 8, 1])
    kd = loss_of("kd", example)
    assert_close(loss_of("bkd", replace(example, class_counts=[77] * 5)), kd)
    assert_close(loss_of("bkd", example, beta=0.0), kd)
    assert abs(loss_of("bkd", example) - kd) > 0.1  # weights by an image's label would cancel in q


def test_a_student_like_its_teacher_learns_from_the_labels_alone():
    example = make_example(6)
    like = replace(example, student_logits=example.teacher_logits)
    assert_close(value_and_gradients("kd", like, alpha=5.0), value_and_gradients("ce", like))


def test_dive_with_power_1_imitates_the_teacher_as_it_is():
    example = make_example(6)
    kl = loss_of("kd", example, temperature=3.0) - loss_of("ce", example)
    dive = loss_of("dive", example, temperature=3.0, alpha=0.3, power=1)
    assert_close(dive, 0.7 * loss_of("bsce", example) + 0.3 * kl)


def test_cbd_is_finite_for_features_of_zeros():
    """After the ReLU a row of features may be all zero."""
    example = make_example(6)
    dead = replace(
        example,
        student_features=torch.zeros_like(example.student_features),
        teacher_features=[torch.zeros_like(f) for f in example.teacher_features],
    )
    value, gradients = value_and_gradients("cbd", dead)
    assert value.isfinite() and gradients["student_features"].isfinite().all()


@pytest.mark.parametrize("counts", [[5000, 2997, 50], [1] * 4, [7, 1, 1000000, 30], [12]])
def test_effective_number_weights(counts):
    for beta in (0.0, 0.5, 0.9999):
        weights = kd_lt.effective_number_weights(doubles(counts), beta)
        assert_close(weights, doubles(weights_oracle(counts, beta)))
        listed = kd_lt.effective_number_weights(counts, beta)
        assert_close(listed, weights.float())
        half = torch.tensor(counts, dtype=torch.float32).bfloat16()
        half_weights = kd_lt.effective_number_weights(half, beta)
        assert torch.equal(half_weights, kd_lt.effective_number_weights(half.float(), beta))
    inverse = 1 / doubles(counts)  # in the limit, in which float32 stays exact, too
    weights = kd_lt.effective_number_weights(counts, 1 - 1e-12)
    assert_close(weights.double(), inverse / inverse.mean(), rtol=1e-5, atol=0)


def frame_oracle(means):
    """The nearest frame with equal singular values, by Newton-Schulz: X (3 - X^T X) / 2."""
    x = means.double() - means.double().mean(0)
    x = x / x.norm()
    for _ in range(40):
        x = 1.5 * x - 0.5 * x @ x.T @ x
        x = x - x.mean(0)  # rounding would grow along the direction without spread
    return F.normalize(x, dim=1)


@pytest.mark.parametrize("num_classes, width", [(2, 3), (3, 2), (5, 5), (6, 20), (6, 2), (12, 5)])
def test_balanced_prototypes(num_classes, width):
    means = randn(num_classes, num_classes, width) * torch.linspace(0.5, 2, width) + 3
    prototypes = kd_lt.balanced_prototypes(means)
    assert_close(prototypes, frame_oracle(means))
    if width >= num_classes - 1:  # any two classes at the same angle, the widest there is
        simplex = (num_classes * torch.eye(num_classes).double() - 1) / (num_classes - 1)
        assert_close(prototypes @ prototypes.T, simplex)
    rotation, order = torch.linalg.qr(randn(0, width, width))[0], torch.arange(num_classes).flip(0)
    moved = F.pad(40 * means[order] @ rotation, (0, 7)) + 1000  # stays in the span of the means
    turned = F.pad(prototypes[order] @ rotation, (0, 7))
    assert_close(kd_lt.balanced_prototypes(moved), turned)


def test_rectify_features():
    means, features, y = randn(10, 4, 7) + 1, randn(11, 9, 7), torch.arange(9) % 4
    prototypes = kd_lt.balanced_prototypes(means)
    s = statistics.fmean(math.dist(m, means.mean(0)) for m in means)
    moved = [
        unit((t - means[c] + s * prototypes[c]).tolist()) for t, c in zip(features, y, strict=True)
    ]
    assert_close(kd_lt.rectify_features(features, y, means, prototypes), doubles(moved))
    assert_close(kd_lt.rectify_features(means, y[:4], means, prototypes), prototypes)


def test_rectify_logits():
    example = make_example(12, 200, 6)
    pi = doubles(example.class_counts) / sum(example.class_counts)
    expected = [
        rectified_oracle(z.tolist(), y, pi)
        for z, y in zip(example.teacher_logits, example.targets, strict=True)
    ]
    rectified = kd_lt.rectify_logits(example.teacher_logits, example.targets, example.class_counts)
    assert_close(rectified, doubles(expected))
    assert torch.equal(rectified.argmax(1), example.targets)
    # Both kinds of row are there: those in which nothing changes places, and the others.
    is_right = (example.teacher_logits - pi.log()).argmax(1) == example.targets
    assert 0 < is_right.sum() < 200


@pytest.mark.parametrize("name", OURS)
def test_huge_logits_and_counts_stay_finite(name):
    for counts in ([10**15, 1000, 10, 1, 1], [1, 1, 10, 1000, 1e30], [1] * 5):
        example = make_example(13, counts=counts)
        example = replace(
            example,
            student_logits=1e4 * example.student_logits.float().sign(),
            teacher_logits=1e4 * example.teacher_logits.float().sign(),
            student_features=example.student_features.float(),
            teacher_features=[f.float() for f in example.teacher_features],
            rectified_features=example.rectified_features.float(),
        )
        value, gradients = value_and_gradients(name, example)
        assert value.dtype == torch.float32 and value.shape == () and value.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_counts_in_float64_stay_so_and_the_loss_is_float32_like_its_logits():
    logits, counts = torch.zeros(2, 3), doubles([9, 3, 1])
    assert kd_lt.as_counts(counts, logits).dtype == torch.float64
    loss = kd_lt.balanced_softmax_loss(logits, torch.tensor([0, 1]), counts)
    assert loss.dtype == torch.float32


Z, Y, N, EYE = torch.ones(2, 3), torch.tensor([0, 1]), [9, 3, 1], torch.eye(3)
ROW, COLUMN = Z[:1], Z[:, :1]  # would broadcast
ONE_IMAGE, DENSE, CUBE = Z[0], torch.ones(2, 3, 4, 4), Z[:, :, None]
REFUSED = [  # a function, arguments of which one is wrong, and its name
    *(
        (kd_lt.kl_to_target, (Z, Z, temperature), "temperature")
        for temperature in (0, -1.0, math.nan, math.inf)
    ),
    (kd_lt.kd_loss, (Z, ROW, Y), "teacher_logits"),
    (kd_lt.kd_loss, (Z, COLUMN, Y), "teacher_logits"),
    (kd_lt.bkd_loss, (Z, ROW, Y, N), "teacher_logits"),
    (kd_lt.bkd_loss, (Z, COLUMN, Y, N), "teacher_logits"),
    (kd_lt.bkd_loss, (Z, Z, Y, [9, 3]), "class_counts"),
    (kd_lt.cbd_loss, (Z, Z, Z, Y), "teacher_features"),  # not in a list
    (kd_lt.cbd_loss, (Z, Z, [ROW], Y), "teacher_features"),
    (kd_lt.cbd_loss, (Z, Z, [COLUMN], Y), "teacher_features"),
    (kd_lt.cbd_loss, (Z, ROW, [Z], Y), "student_features"),
    (kd_lt.cbd_loss, (Z, COLUMN, [Z], Y), "student_features"),
    (kd_lt.cbd_loss, (Z, ROW, [ROW], Y), "student_logits"),  # of another batch
    (kd_lt.cbd_loss, (Z, CUBE, [CUBE], Y), "student_logits"),
    (kd_lt.dive_loss, (Z, ROW, Y, N), "teacher_logits"),
    (kd_lt.dive_loss, (Z, COLUMN, Y, N), "teacher_logits"),
    (kd_lt.dive_loss, (Z, Z, Y, [9, 3]), "class_counts"),
    (kd_lt.krdistill_loss, (Z, ROW, Z, Z, Y, N), "student_features"),
    (kd_lt.krdistill_loss, (Z, COLUMN, Z, Z, Y, N), "student_features"),
    (kd_lt.krdistill_loss, (Z, Z, ROW, Z, Y, N), "rectified_logits"),
    (kd_lt.krdistill_loss, (Z, Z, Z, ROW, Y, N), "rectified_features"),
    (kd_lt.krdistill_loss, (Z, ROW, Z, ROW, Y, N), "student_logits"),  # of another batch
    (kd_lt.krdistill_loss, (Z, CUBE, Z, CUBE, Y, N), "student_logits"),
    (kd_lt.krdistill_loss, (Z, Z, Z, Z, Y, [9, 3]), "class_counts"),
    (kd_lt.balanced_softmax_loss, (Z, Y, [9, 3]), "class_counts"),
    (kd_lt.effective_number_weights, ([9, 3, 0],), "class_counts"),
    (kd_lt.effective_number_weights, (np.array([9, 0.5, 1]),), "class_counts"),
    (kd_lt.effective_number_weights, ([9, math.nan, 1],), "class_counts"),
    (kd_lt.effective_number_weights, ([N],), "class_counts"),
    *((kd_lt.effective_number_weights, (N, beta), "beta") for beta in (1, -0.1, math.nan)),
    *((kd_lt.balanced_prototypes, (m,), "class_means") for m in (ROW, Z[0], CUBE)),
    (kd_lt.rectify_logits, (Z, Y, [9, 3]), "class_counts"),
    (kd_lt.rectify_features, (ROW, Y, EYE, EYE), "teacher_features"),
    (kd_lt.rectify_features, (COLUMN, Y, EYE, EYE), "teacher_features"),
    (kd_lt.rectify_features, (Z, Y[:1], EYE, EYE), "targets"),
    (kd_lt.rectify_features, (Z, Y, EYE[:1], EYE), "class_means"),
    *(
        refused
        for z in (ONE_IMAGE, DENSE)
        for refused in (
            (kd_lt.balanced_softmax_loss, (z, Y, N), "logits"),
            (kd_lt.kd_loss, (z, z, Y), "logits"),
            (kd_lt.bkd_loss, (z, z, Y, N), "logits"),
            (kd_lt.cbd_loss, (z, Z, [Z], Y), "logits"),
            (kd_lt.dive_loss, (z, z, Y, N), "logits"),
            (kd_lt.krdistill_loss, (z, Z, Z, Z, Y, N), "logits"),
            (kd_lt.rectify_logits, (z, Y, N), "logits"),
        )
    ),
]


@pytest.mark.parametrize("function, arguments, named", REFUSED)
def test_wrong_arguments_are_refused(function, arguments, named):
    with pytest.raises(ValueError, match=rf"\b(student_|teacher_)?{named}\b"):
        function(*arguments)


@pytest.mark.parametrize("name", ["kd", "bkd", "dive", "krdistill"])
@pytest.mark.parametrize(
    "masked", [["teacher_logits"], ["teacher_logits", "student_logits"]], ids=" ".join
)
def test_a_class_of_probability_0_adds_nothing(name, masked):
    """-inf, as for classes that a task of several does not have; -1e6 gives 0, too."""
    example = replace(make_example(36), targets=torch.zeros(4, dtype=torch.int64))
    results = []
    for value in (-math.inf, -1e6):
        mask = torch.tensor([0.0, 0.0, 0.0, 0.0, value])
        logits = {key: getattr(example, key) + mask for key in masked}
        results.append(value_and_gradients(name, replace(example, **logits)))
    assert_close(*results)  # not equal where one is nan


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_half_precision_is_computed_in_float32(name, dtype):
    """The value of the same numbers in float32; the gradient in the logits' own dtype."""
    example = make_example(21)
    example.student_features[0] = 0  # a row of features may be all zero after the ReLU
    half = {
        key: getattr(example, key).to(dtype)
        for key in ("student_logits", "teacher_logits", "student_features", "rectified_features")
    }
    half["teacher_features"] = [f.to(dtype) for f in example.teacher_features]
    single = {key: v.float() for key, v in half.items() if key != "teacher_features"}
    single["teacher_features"] = [f.float() for f in half["teacher_features"]]
    value, gradients = value_and_gradients(name, replace(example, **half))
    expected, exact = value_and_gradients(name, replace(example, **single))
    assert value.dtype == torch.float32 and value.isfinite()
    assert_close(value, expected)
    for key, gradient in gradients.items():
        assert gradient.dtype == dtype and not gradient.isnan().any()
        assert_close(gradient[1:].float(), exact[key][1:], rtol=0.02, atol=1e-3)


COUNTS = [200, 50, 9, 3, 1]


@pytest.mark.parametrize(
    "counts",
    [
        tuple(COUNTS),
        np.array(COUNTS),
        np.array(COUNTS[::-1])[::-1],
        np.array(COUNTS, ">i4"),
        np.array(COUNTS, np.uint8),
        torch.tensor(COUNTS),
        torch.tensor(COUNTS, dtype=torch.float32),
    ],
    ids=["tuple", "array", "stride", "byte order", "uint8", "int64", "float32"],
)
def test_every_form_of_class_counts_is_taken(counts):
    logits = torch.zeros(2, 5)
    assert kd_lt.as_counts(counts, logits).tolist() == COUNTS
    assert kd_lt.as_counts(counts, logits).dtype == torch.float32


@pytest.mark.parametrize(
    "counts",
    [
        {n: n for n in COUNTS},
        {n: n for n in COUNTS}.values(),
        set(COUNTS),
        (n for n in COUNTS),
        None,
        5,
        "25951",
        b"25951",
        [],
        COUNTS[:1],
        COUNTS[:4],
        np.ones(1),
        torch.ones(1),
        torch.ones(1, 5),
        [200, 50, 9, 3, 0],
        np.array([200, 50, 9, 3, 0.5]),
        [200, 50, 9, 3, math.nan],
        [200, 50, 9, 3, math.inf],
    ],
    ids=[
        "dict",
        "values of a dict",
        "set",
        "iterator",
        "None",
        "number",
        "text",
        "bytes",
        "no counts",
        "one",
        "four",
        "one in an array",
        "one in a tensor",
        "two dimensions",
        "zero",
        "a half",
        "nan",
        "infinite",
    ],
)
def test_class_counts_without_an_order_or_of_another_number_are_refused(counts):
    with pytest.raises(ValueError, match="class_counts"):
        kd_lt.as_counts(counts, torch.zeros(2, 5))


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on "meta", as Apple's GPUs refuse it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                assert tensor.dtype != torch.float64, func
        return out


@pytest.mark.parametrize("counts", [COUNTS, torch.tensor(COUNTS), doubles(COUNTS)], ids=str)
@pytest.mark.parametrize("name", ["bsce", "bkd", "dive", "krdistill"])
def test_no_loss_needs_float64_on_its_device(name, counts):
    example = make_example(29)
    tensors = {
        key: getattr(example, key).float().to("meta")
        for key in ("student_logits", "teacher_logits", "student_features", "rectified_features")
    }
    with NoFloat64():
        loss_of(
            name,
            replace(example, **tensors, targets=example.targets.to("meta"), class_counts=counts),
        )


def test_the_highest_temperature_keeps_three_digits():
    highest = 100.0  # of the flag
    kd_lt.parse_flags(["--method", "kd", "--temperature", str(highest)])
    with pytest.raises(SystemExit):
        kd_lt.parse_flags(["--method", "kd", "--temperature", str(highest + 1)])
    student, teacher = randn(27, 128, 100), randn(28, 128, 100)
    exact = kd_lt.kl_to_target(student, teacher, highest)
    single = kd_lt.kl_to_target(student.float(), teacher.float(), highest)
    assert single.item() == approx(exact.item(), rel=1e-3)


def test_prototypes_keep_short_directions():
    """The tail's directions are short; a teacher is what it is, so a thousandth still counts."""
    means = torch.diag(doubles([1, 1e-3, 1e-3])) + 5
    prototypes = kd_lt.balanced_prototypes(F.pad(means, (0, 2)))
    simplex = (3 * torch.eye(3).double() - 1) / 2
    assert_close(prototypes @ prototypes.T, simplex)


@pytest.mark.parametrize(
    "epochs, rates",
    [
        (200, {0: 0.02, 4: 0.1, 159: 0.1, 160: 1e-3, 179: 1e-3, 180: 1e-5, 199: 1e-5}),
        (30, {4: 0.1, 23: 0.1, 24: 1e-3, 26: 1e-3, 27: 1e-5, 29: 1e-5}),
        (1, {0: 0.02}),
    ],
    ids=["200", "30", "1"],
)
def test_learning_rate(epochs, rates):
    assert {e: kd_lt.learning_rate(e, epochs, 0.1) for e in rates} == approx(rates, rel=1e-12)
    assert kd_lt.learning_rate(epochs - 1, epochs, 0.3) == approx(3 * rates[max(rates)])


# ---- the plain path: what a step has to compute, written as most code has it

HYPER = {
    "temperature": 1.7,
    "alpha": 0.6,
    "beta": 0.8,
    "gamma": 0.9,
    "power": 0.7,
    "bkd_start": 0.125,
}
MEAN_RGB, STD_RGB = (torch.tensor(values)[:, None, None] for values in (data.MEAN, data.STD))


def made_up(per_class, imb, stride=1):
    """A small long-tailed data set of made-up images; a stride makes them smaller.

    The largest class is not the first one, as in a user's own images.
    """
    images, targets, *test = data.synthetic(10, per_class, 2)
    counts = data.long_tail_counts(10, per_class, imb)
    counts = counts[3:] + counts[:3]
    rows = data.long_tail_indices(targets, counts)
    images = images[rows, :, ::stride, ::stride]
    return data.Dataset(images, targets[rows], *test, counts, "")


@pytest.fixture(scope="module")
def small():
    """78 images of 16x16, three batches of 32."""
    return made_up(20, 10, 2)


def make_trainer(dataset, method, *flags, device="cpu", precision="fp32"):
    """Untrained teachers, no hyperparameter at its default, and for cbd distorted colours."""
    for key in kd_lt.METHODS[method].hyper:
        flags += (f"--{key.replace('_', '-')}", str(HYPER.get(key, 0.5)))
    args = kd_lt.parse_flags(["--smoke", "--method", method, "--batch-size", "32", *flags])
    config = kd_lt.make_config(args, dataset, precision)
    config = replace(config, colour=method == "cbd")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teachers = [models.ResNet(t["network"], 10, t["head"]) for t in config.teachers]
    for teacher in 3 * teachers:  # running statistics of their own
        teacher(data.normalise(dataset.train_images[:50]))
    return kd_lt.Trainer(config, dataset, teachers, torch.device(device))


class PlainImages:
    """An epoch's images, one at a time: pad, mirror, crop, distort, normalise."""

    def __init__(self, dataset, batches):
        self.images, self.draws = dataset.train_images.numpy(), batches.draws.T.tolist()
        self.colours = None if batches.colours is None else batches.colours.cpu()

    def __len__(self):
        return len(self.draws)

    def __getitem__(self, i):
        row, top, left, target = self.draws[i]
        mirrored, row = divmod(row, len(self.images))
        size = self.images.shape[-1]
        pad = (size // 8, size // 8)
        image = np.pad(self.images[row], ((0, 0), pad, pad))[:, :, :: -1 if mirrored else 1]
        image = torch.tensor(image[:, top : top + size, left : left + size].astype(np.float32))
        if self.colours is not None:
            image = data.distort_colour(image[None], self.colours[i : i + 1])[0]
        return (image / 255 - MEAN_RGB) / STD_RGB, target


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
        counts = dataset.class_counts
        self.counts = torch.tensor(counts, dtype=torch.float64, device=trainer.device)
        if self.config.method == "krdistill":
            with torch.no_grad():
                images = (dataset.train_images / 255 - MEAN_RGB) / STD_RGB
                features = self.teachers[0](images.to(trainer.device)).features
            means = [features[dataset.train_targets == c].mean(0) for c in range(10)]
            self.means = torch.stack(means)
            self.prototypes = frame_oracle(self.means).float()

    def loss(self, images, y, counts):
        """The method's loss of one batch."""
        hyper, method = dict(self.config.hyper), self.config.method
        hyper.pop("bkd_start", None)
        with torch.no_grad():
            t = [teacher(images) for teacher in self.teachers]
        s = self.student(images)
        example = Example(
            student_logits=s.logits,
            teacher_logits=t[0].logits if t else None,
            student_features=self.adapter(s.features),
            teacher_features=[output.features for output in t],
            rectified_features=None,
            targets=y,
            class_counts=counts,
        )
        if method == "krdistill":
            example.rectified_features = kd_lt.rectify_features(
                t[0].features, y, self.means, self.prototypes
            )
            # The example's rectified_logits subtract log pi. The logits of a bsce teacher hold
            # none: it is added first, so that they stay as they are.
            if self.config.teachers[0]["method"] == "bsce":
                log_pi = (counts / counts.sum()).log().float()
                example.teacher_logits = example.teacher_logits + log_pi
        return loss_of(method, example, **hyper)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
@pytest.mark.parametrize(
    "setting",
    [
        *((method,) for method in LOSSES),
        ("cbd", "--num-teachers", "2"),
        ("krdistill", "--teacher-method", "bsce"),
        *((method, "--teacher", "resnet8x4") for method in ("cbd", "krdistill")),  # is wider
    ],
    ids=" ".join,
)
def test_the_step_is_the_plain_step(setting, device, small, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.backends.cuda.matmul.allow_tf32 = False  # as the program leaves it
    tolerance = 1e-5 if device == "cpu" else 1e-4
    own_flags = ("--lr", "0.002", "--weight-decay", "0.2")
    trainer = make_trainer(small, *setting, *own_flags, device=device)
    plain = Plain(trainer, small)
    momentum = [torch.zeros_like(p) for p in plain.parameters]
    width = sum(teacher.num_features for teacher in trainer.teachers)
    wider = setting[0] == "cbd" and width != 64
    assert (trainer.student.projection is not None) == wider
    assert (trainer.batches.weights is not None) == (setting[0] == "cbd")  # balanced classes
    for epoch in (0, 1):
        trainer.student.eval()  # as a test leaves it
        trainer.start_epoch(epoch)
        equal = setting[0] == "bkd" and epoch == 0  # before its --bkd-start
        counts = torch.ones_like(plain.counts) if equal else plain.counts
        for images, y in DataLoader(PlainImages(small, trainer.batches), 32):
            images, y = images.to(device), y.to(device)
            before = trainer.loss_sum.item()
            trainer.step(len(y))
            loss = plain.loss(images, y, counts)
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


@pytest.mark.parametrize("share, epochs, first", [(0.8, 200, 160), (0.55, 100, 55)])
def test_bkd_starts_with_the_first_epoch_of_its_share(small, share, epochs, first):
    trainer = make_trainer(small, "bkd")
    trainer.config = replace(trainer.config, hyper={"bkd_start": share}, epochs=epochs)
    for epoch, counts in ((first - 1, [1] * 10), (first, small.class_counts)):
        trainer.start_epoch(epoch)
        assert trainer.bkd_counts.tolist() == counts


def test_the_seed_decides_the_initial_weights_and_the_batches(small):
    made = []
    for seed in "001":
        trainer = make_trainer(small, "krdistill", "--seed", seed)
        trainer.start_epoch(0)
        weights = [trainer.student.conv1.weight, trainer.student.head.weight]
        parts = [*weights, trainer.adapter.weight, trainer.batches.draws]
        made.append([part.tolist() for part in parts])
    one, same, other = made
    assert one == same and all(a != b for a, b in zip(one, other, strict=True))


def test_every_epoch_has_its_rate_and_its_own_batches(small):
    trainer = make_trainer(small, "ce", "--epochs", "10", "--lr", "0.3")
    rates, draws = [], set()
    for epoch in range(10):
        trainer.start_epoch(epoch)
        rates.append(trainer.lr.item())
        draws.add(str(trainer.batches.draws.tolist()))
    assert rates == approx([0.06, 0.12, 0.18, 0.24, 0.3, 0.3, 0.3, 0.3, 0.003, 0.00003])
    assert trainer.optimizer.param_groups[0]["lr"] is trainer.lr
    assert len(draws) == 10


@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_a_failed_run(small, loss):
    trainer = make_trainer(small, "ce")
    kd_lt.check_finite(trainer, {"epoch": 1, "loss": 1.0}, Path("run"))
    with pytest.raises(kd_lt.DivergedError, match="epoch 1 .*--lr.*run"):
        kd_lt.check_finite(trainer, {"epoch": 1, "loss": loss}, Path("run"))


@pytest.mark.parametrize("part", ["student", "adapter"])
def test_weights_that_are_not_finite_are_a_failed_run(small, part):
    trainer = make_trainer(small, "krdistill")
    with torch.no_grad():
        next(getattr(trainer, part).parameters())[0, 0] = math.nan
    with pytest.raises(kd_lt.DivergedError, match="weights that are not finite"):
        kd_lt.check_finite(trainer, {"epoch": 1, "loss": 1.0}, Path("run"))


def test_three_methods_leave_the_class_prior_in_their_logits():
    """What rectify_logits has to subtract; the plain step shows that it is used."""
    assert {name for name, m in kd_lt.METHODS.items() if m.learns_prior} == {"ce", "kd", "bkd"}


# ---- what a CUDA graph needs, and its capture with stand-ins for torch.cuda's functions


def state_tensors(trainer):
    """The tensors of the trainer that a step changes."""
    state = trainer.state_dict()
    weights = [*state["student"].values(), *state["adapter"].values()]
    sums = [trainer.batches.position, trainer.loss_sum, trainer.correct]
    return [*weights, *state["momentum"], *sums]


@pytest.mark.parametrize("method", LOSSES)
def test_the_step_stays_on_its_device_and_reads_nothing_back(method, small, monkeypatch):
    """On "meta" a CPU tensor in the step, or a value asked of a tensor, is an error."""
    sgd = torch.optim.SGD  # its fused form does not know "meta", nor does autocast
    monkeypatch.setattr(torch.optim, "SGD", lambda p, *_, **__: sgd(p, 0.1, 0.9, foreach=False))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(kd_lt, "balanced_prototypes", torch.clone)  # once a run, not in the step
    trainer = make_trainer(small, method, device="meta")
    trainer.start_epoch(0)
    for size in (32, 14):
        trainer.step(size)
    assert {tensor.device.type for tensor in state_tensors(trainer)} == {"meta"}


@pytest.mark.parametrize("method", LOSSES)
def test_every_step_runs_the_same_operations_on_the_same_memory(method, small):
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            steps[-1].append(str(func))
            return func(*args, **(kwargs or {}))

    trainer, steps, places = make_trainer(small, method), [], []
    for epoch in range(3):
        trainer.start_epoch(epoch)
        steps.append([])
        with Record():
            trainer.step(32)
        owned = [*state_tensors(trainer), *vars(trainer).values(), *vars(trainer.batches).values()]
        places.append([v.data_ptr() for v in owned if isinstance(v, torch.Tensor)])
    assert steps[1] == steps[2]  # the first may fill a cache
    assert not [name for name in steps[2] if "_local_scalar" in name or "nonzero" in name]
    assert places[0] == places[1] == places[2]


def test_frozen_teachers_say_what_autocast_would(small):
    """Their convolutions' weights are cast once instead of in every step: the same bits."""
    trainer = make_trainer(small, "kd")
    (teacher,), config = trainer.teachers, replace(trainer.config, precision="bf16")
    before = kd_lt.predict(teacher, small.train_images, torch.device("cpu"), "bf16")
    assert teacher.conv1.weight.dtype == torch.float32
    kd_lt.Trainer(config, small, [teacher], torch.device("cpu"))
    assert teacher.conv1.weight.dtype == torch.bfloat16
    after = kd_lt.predict(teacher, small.train_images, torch.device("cpu"), "bf16")
    assert_close(tuple(after), tuple(before), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["ce", "krdistill"])
def test_a_bf16_step_keeps_loss_weights_and_momentum_in_float32(method, small, monkeypatch):
    under_autocast, loss = [], kd_lt.Trainer.loss

    def watched(*args):
        under_autocast.append(torch.is_autocast_enabled("cpu"))
        value = loss(*args)
        assert value.dtype == torch.float32  # although the class counts are in float64
        return value

    monkeypatch.setattr(kd_lt.Trainer, "loss", watched)
    half, single = (make_trainer(small, method, precision=name) for name in ("bf16", "fp32"))
    for trainer in (half, single):
        trainer.start_epoch(0)
        trainer.step(32)
        weight = trainer.student.conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)  # it is faster on a CPU
    kept = [tensor for tensor in state_tensors(half) if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in kept} == {torch.float32, torch.float64}  # float64: the sum
    assert under_autocast == [False, False]  # also for krdistill's map, which the loss applies
    assert half.loss_sum.item() == approx(single.loss_sum.item(), rel=0.02)
    assert half.loss_sum != single.loss_sum  # and yet bf16 acts


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


@pytest.fixture
def capture(small, monkeypatch):
    """A trainer, and a log of what its capture does, on stand-ins for torch.cuda's functions."""
    trainer, log = make_trainer(small, "kd"), []
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
    def graph(graph, pool, stream):
        number = 1 + sum(line.startswith("record") for line in log)
        log.append(f"record {number} on {stream.name} in {pool}")
        graph.replay = lambda: log.append(f"replay {number}")
        assert trainer.student.training
        trainer.batches.position.zero_()  # a recorded step does not run, this one does
        yield

    def step(size, step=trainer.step):
        log.append(f"step {size}")
        step(size)

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
    monkeypatch.setattr(trainer, "step", step)
    return SimpleNamespace(trainer=trainer, log=log)


def test_capture_warms_up_records_and_restores(capture):
    trainer, log = capture.trainer, capture.log
    before = copy.deepcopy(changed_by_steps(trainer))
    step = trainer.capture()
    assert log == [
        "side waits for current",
        "on side",
        *3 * ["step 32", "step 14"],  # warm-up
        "off side",
        "current waits for side",
        "record 1 on side in the pool",
        "step 32",
        "record 2 on side in the pool",  # the smaller one reuses the memory
        "step 14",
    ]
    for size in (32, 14, 32):
        step(size)
    assert log[-3:] == ["replay 1", "replay 2", "replay 1"]

    assert_close(changed_by_steps(trainer), before, rtol=0, atol=0)  # the steps left no trace
    trainer.start_epoch(0)  # and training goes on, nothing of them in its sums
    assert trainer.batches.position == trainer.loss_sum == trainer.correct == 0
    trainer.step(32)
    assert trainer.loss_sum > 0


def test_a_failed_recording_names_its_reason_its_place_and_the_way_out(capture, monkeypatch):
    def failing(*args, loss=kd_lt.kd_loss, **hyper):
        if capture.log[-2].startswith("record"):  # before the last line, this step's
            try:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            finally:  # torch's own end of the recording fails, too
                raise RuntimeError("the capture was invalidated")
        return loss(*args, **hyper)

    monkeypatch.setattr(kd_lt, "kd_loss", failing)
    place = f"{__file__}, line {failing.__code__.co_firstlineno + 3}"
    told = f"graph: operation not permitted when stream is capturing, in {place}. With --eager"
    with pytest.raises(kd_lt.CaptureError, match=re.escape(told)):
        capture.trainer.capture()


def test_the_line_that_fails_is_found_inside_a_module():
    class Fails(torch.nn.Module):
        def forward(self, x):
            return x @ x

    with pytest.raises(RuntimeError) as caught:
        torch.nn.Sequential(Fails())(torch.ones(2, 3))
    line = Fails.forward.__code__.co_firstlineno + 1
    assert kd_lt.last_line_outside_torch(caught.value) == f"{__file__}, line {line}"


@pytest.mark.parametrize("eager", [False, True])
def test_eager_records_nothing(small, tmp_path, monkeypatch, eager):
    trainer, captured = make_trainer(small, "ce"), []
    trainer.device = SimpleNamespace(type="cuda")  # which this machine need not have
    monkeypatch.setattr(trainer, "capture", lambda: captured.append(1))
    monkeypatch.setattr(kd_lt, "evaluate", lambda *args: {})
    tests = small._replace(test_images=SimpleNamespace(to=lambda device: None))
    progress = kd_lt.Progress(trainer.config.epochs, 0.0, [], [])  # no epoch is left to train
    kd_lt.train(trainer, tests, tmp_path, progress, 1, eager)
    assert bool(captured) != eager


# ---- on a GPU


@cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", LOSSES)
def test_replays_equal_eager_steps_on_cuda(method, precision, small, monkeypatch):
    """Two epochs from the same start; and no eager step waits for the device."""
    for name, value in (("deterministic", True), ("benchmark", False), ("allow_tf32", False)):
        monkeypatch.setattr(torch.backends.cudnn, name, value)
    ended = []
    for captured in (True, False):
        trainer = make_trainer(small, method, device="cuda", precision=precision)
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
            kd_lt.evaluate(trainer.student, small, trainer.device, precision)  # leaves no trace
        ended.append(copy.deepcopy(changed_by_steps(trainer)))
    assert_close(*ended, rtol=1e-2, atol=1e-2)


@cuda
def test_a_loss_with_item_is_told_on_cuda(small, monkeypatch):
    def edited(z, *rest, loss=kd_lt.kd_loss, **hyper):
        return loss(z, *rest, **hyper) + 0 * z.max().item()

    monkeypatch.setattr(kd_lt, "kd_loss", edited)
    trainer = make_trainer(small, "kd", device="cuda")
    try:
        with pytest.raises(kd_lt.CaptureError, match=rf"{re.escape(__file__)}, line.*--eager"):
            trainer.capture()
    finally:  # the failed recording leaves its own stream behind
        torch.cuda.set_stream(torch.cuda.default_stream())


# ---- which images: the published subsets

# How many images, and the start of the SHA-256 of their positions within their class.
PUBLISHED = [
    ("cifar10", "exp", 10, 20_431, "2b3a8656bec5"),
    ("cifar10", "exp", 50, 13_996, "7bb90363b243"),
    ("cifar10", "exp", 100, 12_406, "8a54f5b6fa97"),
    ("cifar10", "exp", 200, 11_203, "334c2d61143b"),
    ("cifar10", "step", 10, 27_500, "972d9eb4a700"),
    ("cifar10", "step", 50, 25_500, "550772f4f988"),
    ("cifar10", "step", 100, 25_250, "9f6141e4cf23"),
    ("cifar10", "step", 200, 25_125, "54d23dbdbd71"),
    ("cifar100", "exp", 10, 19_573, "5906ba7310b9"),
    ("cifar100", "exp", 50, 12_608, "1bc82de2629e"),
    ("cifar100", "exp", 100, 10_847, "f123ec136d44"),
    ("cifar100", "exp", 200, 9_502, "36f76462dfbb"),
    ("cifar100", "step", 10, 27_500, "d973f460f760"),
    ("cifar100", "step", 50, 25_500, "fd9f9dea430a"),
    ("cifar100", "step", 100, 25_250, "5fab75890a63"),
    ("cifar100", "step", 200, 25_100, "0e093498e9d9"),
]
SHAPE = {"cifar10": (10, 5000), "cifar100": (100, 500)}
REAL = Path(os.environ.get("KD_LT_DATA", "data"))


def need_real_files(name):
    """Skip the test where not all files of this CIFAR are there: none is downloaded here."""
    folder = REAL / data.CIFAR_FOLDERS[name]
    if not all((folder / file).exists() for file in data.CIFAR_SHA256[name]):
        pytest.skip(f"no {name} in {REAL} (set KD_LT_DATA)")


@pytest.mark.parametrize("name, kind, imb, total, sha256", PUBLISHED)
def test_published_selection(name, kind, imb, total, sha256):
    """A shuffle depends on nothing but the size of a class: labels in any order show the same."""
    classes, most = SHAPE[name]
    targets = np.random.RandomState(5).permutation(np.arange(50000) % classes)
    positions = np.empty(50000, np.int64)
    for c in range(classes):
        positions[targets == c] = np.arange(most)
    counts = data.long_tail_counts(classes, most, imb, kind)
    rows = data.long_tail_indices(targets, counts)
    assert rows.dtype == torch.int64 and len(rows) == sum(counts) == total
    assert (targets[rows] == np.repeat(np.arange(classes), counts)).all()
    digest = hashlib.sha256(positions[rows].astype("<i8").tobytes()).hexdigest()
    assert digest.startswith(sha256)


@pytest.mark.parametrize(
    "name, first, digest",
    [
        ("cifar10", [4030, 38518, 48266], "c583f5132c01b456"),
        ("cifar100", [9470, 27272, 30172], "22c7e9ed7160a1c8"),
    ],
)
def test_real_files(name, first, digest):
    need_real_files(name)
    thin = data.load_dataset(name, REAL, 100)
    assert thin.digest == digest and thin.test_images.shape == (10000, 3, 32, 32)
    images, _ = data.load_cifar(name, REAL, train=True)
    assert torch.equal(images[first], thin.train_images[:3])  # the very rows, in file order


def test_long_tail_counts():
    assert data.long_tail_counts(5, 100, 10, "step") == [100, 100, 10, 10, 10]
    assert data.long_tail_counts(1, 100, 10) == [100]
    assert data.long_tail_counts(2, 100, 10) == [100, 10]
    assert data.long_tail_counts(3, 7, 1) == data.long_tail_counts(3, 7, 1, "step") == [7, 7, 7]
    for most in range(1, 200):  # at the limit, where 1 / imb rounds down for some
        for kind in ("exp", "step"):
            assert data.long_tail_counts(4, most, most, kind)[-1] == 1
    for imb in (0.5, -10, math.nan, math.inf, 101):
        with pytest.raises(InputError, match=f"--imb must lie in 1 .. 100 .*, not {imb:g}"):
            data.long_tail_counts(10, 100, imb, "step")
    with pytest.raises(InputError, match="--imb-type"):
        data.long_tail_counts(10, 100, 10, "linear")


def test_synthetic():
    assert [len(part) for part in data.synthetic(3, 4, 5)] == [12, 12, 15, 15]
    assert not torch.equal(data.synthetic()[0], data.synthetic(seed=1)[0])
    thin = data.load_dataset("synthetic", "", 100)
    assert thin.class_counts == data.long_tail_counts(10, 200, 100)


# ---- batches


def global_generators():
    """The states of Python's, NumPy's and torch's global generators."""
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def random_images(count, seed=0, size=(32, 32)):
    """uint8 noise."""
    return torch.randint(256, (count, 3, *size), generator=generator(seed)).to(torch.uint8)


@pytest.mark.parametrize("sampler", ["instance", "class"])
@pytest.mark.parametrize("count, size, pad", [(60, 16, 2), (60, 32, 4), (60, 48, 6), (5, 128, 16)])
def test_batches_are_crops_of_padded_images(count, size, pad, sampler):
    images, places = random_images(count, size=(size, size)), 2 * pad + 1
    targets = torch.arange(count).sqrt().long()  # classes of 1, 3, 5, ... images
    class_counts = targets.bincount().tolist()
    batches = Batches(images, targets, 8, "cpu", sampler)
    assert batches.sizes == [8] * (count // 8) + [count % 8]
    ours, again = generator(1), generator(1)
    for _ in range(2):  # every epoch anew
        batches.shuffle(ours)
        parts = [batches.next(part) for part in batches.sizes]
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in parts)
        if sampler == "instance":
            rows = torch.randperm(count, generator=again)
        else:
            weights = torch.tensor([1 / class_counts[c] for c in targets], dtype=torch.float64)
            rows = torch.multinomial(weights, count, replacement=True, generator=again)
        crops = torch.randint(2 * places * places, (count,), generator=again)
        mirrored, top, left = torch.unravel_index(crops, (2, places, places))
        draws = torch.stack([rows + count * mirrored, top, left, targets[rows]])
        assert torch.equal(batches.draws, draws)
        plain = PlainImages(SimpleNamespace(train_images=images), batches)
        assert_close(parts, [tuple(part) for part in DataLoader(plain, 8)])
    assert (MEAN, STD) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # as published


def test_colours_are_drawn_last_and_no_global_generator_is_used():
    before, images = global_generators(), random_images(50)
    plain, coloured = (
        Batches(images, torch.arange(50), 12, "cpu", "instance", colour) for colour in (False, True)
    )
    for batches in (plain, coloured):
        batches.shuffle(generator(5))
    assert torch.equal(plain.draws, coloured.draws)  # the same crops
    assert 0 <= coloured.colours.min() < 0.05 and 0.95 < coloured.colours.max() < 1
    data.load_dataset("synthetic", "", 10)
    assert global_generators() == before


@pytest.mark.parametrize(
    "images, targets", [((9, 3, 16, 16), 8), ((8, 3, 16, 24), 8), ((8, 16, 16, 3), 8)], ids=str
)
def test_batches_refuse_images_that_are_not_square_or_not_as_many_as_targets(images, targets):
    with pytest.raises(ValueError, match=re.escape(str(images))):
        Batches(torch.zeros(images, dtype=torch.uint8), torch.zeros(targets), 8, "cpu", "instance")


def test_an_unknown_sampler_is_refused():
    images = random_images(3, size=(16, 16))
    with pytest.raises(ValueError, match="sampler"):
        Batches(images, torch.arange(3), 2, "cpu", "Class")


def test_images_can_have_gradients_after_a_first_use_without_any():
    images = random_images(2).float().requires_grad_()
    draws = torch.rand(2, 10, generator=generator(0))
    for constants in (data._normalisation, data._colour_space):
        constants.cache_clear()
    with torch.inference_mode():
        data.normalise(data.distort_colour(images, draws))
    data.normalise(data.distort_colour(images, draws)).sum().backward()
    assert images.grad.isfinite().all() and images.grad.count_nonzero() > 0


def test_the_subset_and_the_batches_stand_alone():
    """With what the head of data.py says is to be copied, and no more."""
    copied = {"np": np, "torch": torch, "Tensor": torch.Tensor}
    for name in ("InputError", "long_tail_counts", "long_tail_indices"):
        exec(inspect.getsource(getattr(data, name)), copied)
    labels = torch.arange(10).repeat_interleave(50)
    counts = copied["long_tail_counts"](10, 50, 10)
    rows = copied["long_tail_indices"](labels, counts)
    assert torch.equal(rows, data.long_tail_indices(labels, counts))

    copied |= {"F": F, "functools": functools, "MEAN": MEAN, "STD": STD}
    for name in ("_normalisation", "normalise", "_colour_space", "distort_colour", "Batches"):
        exec(inspect.getsource(getattr(data, name)), copied)
    images, targets = random_images(8, size=(16, 16)), torch.arange(8) % 2
    drawn = []
    for kind in (Batches, copied["Batches"]):
        batches = kind(images, targets, 8, "cpu", "class", colour=True)
        batches.shuffle(generator(0))
        drawn.append(batches.next(8))
    assert_close(drawn[0], drawn[1])


LUMA = np.array([0.299, 0.587, 0.114])
YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def distort_oracle(image, draws):
    """One image (3, H, W), in float64, one operation after the other."""
    x = image.astype(np.float64)
    brightness, contrast, saturation = 1 + 0.8 * (2 * draws[2:5] - 1)
    angle = 0.4 * np.pi * (2 * draws[5] - 1)
    for operation in np.argsort(draws[6:]) if draws[0] < 0.8 else ():
        luma = np.tensordot(LUMA, x, 1)
        if operation == 0:
            x = brightness * x
        elif operation == 1:
            x = contrast * x + (1 - contrast) * luma.mean()
        elif operation == 2:
            x = saturation * x + (1 - saturation) * luma
        else:
            y, i, q = np.tensordot(YIQ, x, 1)
            turned = np.stack(
                [
                    y,
                    math.cos(angle) * i - math.sin(angle) * q,
                    math.sin(angle) * i + math.cos(angle) * q,
                ]
            )
            x = np.tensordot(np.linalg.inv(YIQ), turned, 1)
        x = x.clip(0, 255)
    return np.repeat(np.tensordot(LUMA, x, 1)[None], 3, 0) if draws[1] < 0.2 else x


def test_distort_colour_is_the_oracle():
    images, draws = random_images(200, 6, (4, 5)), torch.rand(200, 10, generator=generator(7))
    distorted, grey, hue = draws[:, 0], draws[:, 1], draws[:, 5]
    grey[::4], hue[1::4], distorted[2::4] = 0.19999, 0.999, 0.79999  # the edges
    out = distort_colour(images, draws)
    assert out.dtype == torch.float32 and out.shape == images.shape
    for row, (image, draw) in enumerate(zip(images, draws, strict=True)):
        expected = distort_oracle(image.numpy(), draw.double().numpy())
        assert np.abs(out[row].numpy() - expected).max() < 0.02
    distorted[:], grey[:] = 0.8, 0.2  # just not
    assert torch.equal(distort_colour(images, draws), images.float())


# ---- networks

HEADER = [line.split() for line in models.__doc__.splitlines() if line.startswith("    resnet")]


def test_header_names_the_networks():
    assert [row[0] for row in HEADER] == [*models.NETWORKS]
    with pytest.raises(ValueError, match="resnet9.*resnet110"):
        ResNet("resnet9", 10)


@pytest.mark.parametrize("name, layers, ten, hundred, width", HEADER)
def test_header_table(name, layers, ten, hundred, width):
    for num_classes, parameters in ((10, ten), (100, hundred)):
        model = ResNet(name, num_classes)
        assert sum(p.numel() for p in model.parameters()) == int(parameters.replace(",", ""))
    weighted = [
        m
        for m in model.modules()
        if isinstance(m, nn.Linear) or isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    ]
    assert len(weighted) == int(layers)
    assert model.num_features == model.head.in_features == int(width)


def test_resnet_32_has_the_published_69_million_multiplications():
    """So many only where padding and strides are right, which no number of weights shows."""
    with FlopCounterMode(display=False) as flops:
        ResNet("resnet32", 10)(torch.zeros(1, 3, 32, 32))
    assert flops.get_total_flops() == 2 * 68_862_592


@pytest.mark.parametrize("size", [16, 32, 40])
@pytest.mark.parametrize(
    "name, head, projection",
    [
        ("resnet8", "linear", 0),
        ("resnet14", "cosine", 0),
        ("resnet8", "cosine", 96),
        ("resnet8x4", "linear", 0),
        ("resnet8x4", "cosine", 96),
    ],
)
def test_forward(name, head, projection, size):
    torch.manual_seed(0)
    images = torch.randn(3, 3, size, size)
    model = ResNet(name, 7, head, projection)
    model(images)  # so that the running statistics are not the first ones
    model.eval()
    with torch.no_grad():
        logits, features = model(images)
        maps = model.blocks(model.bn1(model.conv1(images)).relu())
        pooled = maps.mean((2, 3))
        expected = model.projection(pooled).relu() if projection else pooled
        seen = []
        model.blocks.register_forward_hook(lambda module, given, out: seen.append(out))
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images)
    assert maps.shape[2:] == (size // 4, size // 4)  # the last two stages halve it
    assert model.num_features == (projection or NETWORKS[name][2][-1])
    assert logits.shape == (3, 7) and features.shape == (3, model.num_features)
    assert_close(features, expected)
    assert_close(model.head(features), logits)

    # In bf16 pooling and classifier are in float32: the maps are rounded, nothing after them.
    assert seen[0].dtype == torch.bfloat16
    assert {part.dtype for part in half} == {torch.float32}
    pooled = seen[0].float().mean((2, 3))
    with torch.no_grad():
        assert_close(half.features, model.projection(pooled).relu() if projection else pooled)


def test_initial_weights_are_kaiming_normal():
    torch.manual_seed(4)
    model = ResNet("resnet8x4", 50)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            scaled = module.weight.detach() * math.sqrt(module.weight[0].numel() / 2)  # by fan-in
            assert abs(scaled.std() - 1) < 0.1 and scaled.abs().max() > 2.1  # so not uniform


def test_cosine_head():
    torch.manual_seed(1)
    head = ResNet("resnet8", 5, "cosine").head.double()
    features = torch.rand(4, 64).double()
    expected = 20 * F.cosine_similarity(features[:, None], head.weight, dim=2)
    assert_close(head(features), expected, rtol=0, atol=1e-12)
    assert head(0 * features).tolist() == [[0.0] * 5] * 4  # after a ReLU all may be zero
    assert [name for name, _ in head.named_parameters()] == ["weight"]  # no bias, no learnt scale
    copied = models.CosineClassifier(64, 5)  # outside a ResNet nobody has drawn its weight
    assert copied(features.float()).isnan().all()


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

    def normalised(layer, v):
        mean, std = layer.running_mean, (layer.running_var + layer.eps).sqrt()
        return (v - mean[:, None, None]) / std[:, None, None]

    if stride == 1:
        added = x
    elif shortcut == "pad":
        new = channels - 4
        added = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, new // 2, new - new // 2))  # option A
    else:
        conv, layer = block.shortcut
        added = normalised(layer, conv(x))
    inner = normalised(block.bn1, block.conv1(x)).relu()
    assert_close(block(x), (normalised(block.bn2, block.conv2(inner)) + added).relu())


# ---- files: own images, and small ones in the place of CIFAR's


def make_npz(path, counts=(4, 2, 6), size=32, **changes):
    """Random images, so many of each class, and six test images; a change to None leaves out."""
    rng = np.random.RandomState(0)
    y_train, y_test = np.repeat(np.arange(len(counts)), counts), np.arange(6) % len(counts)
    x = [rng.randint(256, size=(len(y), size, size, 3), dtype=np.uint8) for y in (y_train, y_test)]
    arrays = {"x_train": x[0], "y_train": y_train, "x_test": x[1], "y_test": y_test, **changes}
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    return path


@pytest.mark.parametrize("size", [16, 32, 48, 128])
def test_npz_in_both_layouts(tmp_path, size):
    arrays = dict(np.load(make_npz(tmp_path / "a.npz", size=size)))
    turned = {k: v.transpose(0, 3, 1, 2) for k, v in arrays.items() if k[0] == "x"}
    labels = {k: v.astype(np.int16) for k, v in arrays.items() if k[0] == "y"}
    make_npz(tmp_path / "b.npz", **turned, **labels)
    make_npz(tmp_path / "c.npz", size=size, y_test=np.array([0, 1, 1] * 2, np.uint8))
    one, two, other = (data.load_dataset(str(tmp_path / f"{f}.npz"), "", 1) for f in "abc")
    assert one.digest == two.digest != other.digest
    assert one.class_counts == two.class_counts == [4, 2, 6]
    assert (one.train_images.numpy() == turned["x_train"]).all()
    assert (one.test_images.numpy() == turned["x_test"]).all()
    assert one.train_targets.tolist() == arrays["y_train"].tolist()
    assert one.test_targets.tolist() == [0, 1, 2] * 2 and one.test_targets.dtype == torch.int64


def test_npz_thinned(tmp_path):
    path = str(make_npz(tmp_path / "a.npz", y_train=np.array([1] * 4 + [0] * 6 + [2] * 2)))
    thin = data.load_dataset(path, "", 3)
    assert thin.class_counts == [6, 3, 2] == thin.train_targets.bincount().tolist()
    with pytest.raises(InputError, match="class 1 has 4 .*--imb wants 5.*--imb 1 "):
        data.load_dataset(path, "", 1.2)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"x_train": np.zeros((12, 32, 32, 3))},
            "x_train must be uint8, not float64: multiply by 255",
        ),
        ({"x_train": np.zeros((12, 15, 15, 3), np.uint8)}, r"x_train .*16..128.*\(12, 15, 15, 3\)"),
        (
            {"x_train": np.zeros((12, 3, 129, 129), np.uint8)},
            r"x_train .*16..128.*\(12, 3, 129, 129\)",
        ),
        (
            {"x_test": np.zeros((6, 48, 48, 3), np.uint8)},
            "x_test has images of 48x48 pixels, x_train of 32x32",
        ),
        (
            {"x_test": np.zeros((0, 32, 32, 3), np.uint8), "y_test": np.zeros(0, int)},
            "x_test is empty",
        ),
        (
            {"x_train": np.zeros((12, 32, 32, 1), np.uint8)},
            "x_train holds grey.*repeat the channel",
        ),
        ({"x_test": np.zeros((6, 32, 32), np.uint8)}, "x_test holds grey.*repeat the channel"),
        ({"x_test": np.full((6, 32, 32, 3), 300)}, "x_test must be uint8 of 0..255, not int64"),
        ({"y_train": np.zeros((12, 1), int)}, r"y_train must be \(12,\).*y_train\[:, 0\]"),
        ({"y_train": np.zeros(12)}, "y_train must hold 12 integers"),
        ({"y_test": np.zeros(2, int)}, "y_test must hold 6 integers"),
        ({"y_train": np.array([0, 2] * 6)}, "no image of class 1"),
        ({"y_test": None}, "cannot read y_test"),
        ({"x_train": np.full((12, 32, 32, 3), 200.0)}, "must be uint8 of 0..255, not float64"),
        ({"y_train": np.zeros(12, int)}, "no image of class 1"),
        ({"y_test": np.array([0, 1, 3] * 2)}, "y_test has class 3"),
        ({"y_test": np.array([0, 1, -2] * 2)}, "y_test holds the label -2"),
        ({"y_train": np.array([None] * 12, object)}, "y_train.*Object arrays"),
        ({"x_train": np.full((12, 32, 32, 3), "red")}, "x_train must be uint8 of 0..255, not <U3$"),
        ({"x_train": np.zeros((12, 32, 32, 3), "M8[s]")}, "x_train must be uint8 .*not datetime64"),
        ({"y_train": np.zeros(12, [("a", int)])}, r"y_train must hold 12 integers.*'a'"),
        ({"x_train": np.full((12, 32, 32, 3), -1.0)}, r"of 0..255, not float64 of -1..-1$"),
        ({"x_train": np.zeros((12, 3072), np.uint8)}, r"x_train .*16..128, not \(12, 3072\)"),
        ({"x_train": np.zeros((12, 32, 48, 3), np.uint8)}, r"x_train .*not \(12, 32, 48, 3\)"),
        ({"y_train": np.eye(3, dtype=int)[[0, 1, 2] * 4]}, r"hold 12 integers.* int64 \(12, 3\)"),
        ({"y_train": np.array([0, 1, 3] * 4)}, "no image of class 2"),
    ],
)
def test_npz_bad_content(tmp_path, changes, message):
    with pytest.raises(InputError, match=f"(?s)bad.npz.*{message}"):
        data.load_npz(make_npz(tmp_path / "bad.npz", **changes))


def test_npz_that_is_none(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    for name, reason in (("text.npz", "expected is a .npz file"), ("absent.npz", "no such file")):
        with pytest.raises(data.InputError, match=f"{name}.*{reason}"):
            data.load_npz(tmp_path / name)


FOLDER = "cifar-10-batches-py"


@pytest.fixture
def mini(monkeypatch):
    """A small CIFAR-10, with SHA-256 sums to match: the bytes of each name in the archive."""
    rng, files = np.random.RandomState(0), {}
    for i, file in enumerate(data.CIFAR_SHA256["cifar10"]):
        images = rng.randint(0, 256, (2, 3072)).astype(np.uint8)
        files[file] = pickle.dumps({"data": images, "labels": [i, 9]}, protocol=2)
    sums = {file: hashlib.sha256(raw).hexdigest() for file, raw in files.items()}
    monkeypatch.setitem(data.CIFAR_SHA256, "cifar10", sums)
    return {f"{FOLDER}/{file}": raw for file, raw in files.items()}


def test_cifar_100_is_read_with_its_fine_labels(tmp_path, monkeypatch):
    """On small files in its place: the real ones are not everywhere."""
    rng, folder = np.random.RandomState(0), tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = {file: rng.randint(0, 256, (2, 3072)).astype(np.uint8) for file in ("train", "test")}
    labels = {"train": [0, 99], "test": [5, 6]}
    for file in pixels:
        content = {"data": pixels[file], "coarse_labels": [7, 7], "fine_labels": labels[file]}
        raw = pickle.dumps(content, protocol=2)
        (folder / file).write_bytes(raw)
        monkeypatch.setitem(data.CIFAR_SHA256["cifar100"], file, hashlib.sha256(raw).hexdigest())
    for file in pixels:
        images, targets = data.load_cifar("cifar100", tmp_path, train=file == "train")
        assert (images.flatten(1).numpy() == pixels[file]).all()
        assert targets.tolist() == labels[file]


@pytest.fixture
def serve(monkeypatch, tmp_path_factory):
    """Puts an archive where CIFAR's is expected; None: there is no such place."""

    def start(raw):
        place = tmp_path_factory.mktemp("server")
        if raw is not None:
            (place / "cifar-10-python.tar.gz").write_bytes(raw)
        monkeypatch.setattr(data, "CIFAR_URL", place.as_uri() + "/")

    return start


def packed(files):
    """A gzipped archive of the files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, raw in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(raw)
            tar.addfile(entry, io.BytesIO(raw))
    return buffer.getvalue()


def put(files, root):
    """Write the files below root."""
    for name, raw in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(raw)


def files(folder):
    """The content of each file below the folder, but of the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_download_adds_what_is_missing_only(mini, tmp_path, serve, capsys):
    serve(packed({**mini, f"{FOLDER}/readme.html": b"hello", "../evil": b"evil"}))
    mine, root = f"{FOLDER}/data_batch_2", tmp_path / "new"
    put({mine: mini[mine]}, root)
    before = (root / mine).stat().st_ino
    images, targets = data.load_cifar("cifar10", root, train=True)
    assert targets.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9] and targets.dtype == torch.int64
    assert files(tmp_path) == {f"new/{name}": raw for name, raw in mini.items()}
    assert (root / mine).stat().st_ino == before
    assert f"downloading {data.CIFAR_URL}cifar-10-python.tar.gz" in capsys.readouterr().err
    first = pickle.loads(mini[f"{FOLDER}/data_batch_1"])["data"]
    assert images.shape == (10, 3, 32, 32) and (images[:2].numpy().reshape(2, -1) == first).all()
    serve(None)  # files that are there need no network
    assert data.load_cifar("cifar10", root, train=False)[1].tolist() == [5, 9]


def test_a_download_makes_its_folders_and_no_half_file(mini, tmp_path, serve, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    serve(packed(mini))
    root = tmp_path / "a" / "b"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(InputError, match="No space left"):
            data.load_cifar("cifar10", root, train=True)
    assert not files(root)
    data.load_cifar("cifar10", root, train=True)
    assert files(root) == mini


def test_the_archives_are_those_of_the_cifar_page():
    page = "https://www.cs.toronto.edu/~kriz/"
    addresses = [data.CIFAR_URL + archive for archive in data.CIFAR_ARCHIVES.values()]
    assert [*data.CIFAR_ARCHIVES] == [*data.CIFAR_SHA256] == ["cifar10", "cifar100"]
    assert addresses == [f"{page}cifar-{number}-python.tar.gz" for number in (10, 100)]


def test_a_data_folder_one_level_too_deep_downloads_nothing(mini, tmp_path):
    put(mini, tmp_path)
    with pytest.raises(InputError, match=f"{FOLDER}: name the folder above it"):
        data.load_cifar("cifar10", tmp_path / FOLDER, train=True)
    assert files(tmp_path) == mini


def test_a_link_that_leads_nowhere_is_kept(mini, tmp_path, serve):
    serve(packed(mini))
    put(mini, tmp_path)
    link = tmp_path / FOLDER / "data_batch_3"
    link.unlink()
    link.symlink_to(tmp_path / "not mounted")
    with pytest.raises(InputError, match="data_batch_3"):
        data.load_cifar("cifar10", tmp_path, train=True)
    assert link.is_symlink()


def test_the_test_images_are_those_of_the_test_batch(mini, tmp_path, monkeypatch):
    put(mini, tmp_path)
    loads = pickle.loads

    def warning(raw, **kwargs):  # as NumPy 2.4.0 to 2.4.4 do
        warnings.warn("dtype(): align should be passed as a bool", DeprecationWarning, 2)
        return loads(raw, **kwargs)

    monkeypatch.setattr(pickle, "loads", warning)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and that reaches nobody
        images, targets = data.load_cifar("cifar10", tmp_path, train=False)
    batch = loads(mini[f"{FOLDER}/test_batch"])
    assert targets.tolist() == batch["labels"]
    assert (images.numpy().reshape(2, -1) == batch["data"]).all()

    seen = []
    monkeypatch.setattr(data, "long_tail_indices", lambda y, *args: torch.arange(len(y)))
    monkeypatch.setattr(data, "long_tail_counts", lambda *args: seen.append(args) or [1])
    whole = data.load_dataset("cifar10", tmp_path, 100)
    assert torch.equal(whole.test_images, images) and whole.test_targets.tolist() == [5, 9]
    assert len(whole.train_images) == 10 and seen == [(10, 5, 100, "exp")]


class Bomb:
    """Fails the test when somebody unpickles it."""

    def __reduce__(self):
        return pytest.fail, ("bytes that nobody checked were unpickled",)


@pytest.mark.parametrize("harm", [lambda raw: raw[:-1], lambda raw: pickle.dumps(Bomb())])
def test_damaged_file_is_named_and_kept(mini, tmp_path, serve, harm):
    name = f"{FOLDER}/data_batch_3"
    serve(packed(mini))
    present = {**mini, name: harm(mini[name])}
    put(present, tmp_path)
    (tmp_path / FOLDER / "data_batch_1").unlink()
    with pytest.raises(InputError, match="data_batch_3: not the original.*delete"):
        data.load_cifar("cifar10", tmp_path, train=True)
    assert files(tmp_path) == present  # the first came back, the third stayed


@pytest.mark.parametrize(
    "archive, message",
    [
        (lambda mini: None, "No such file"),
        (lambda mini: b"<html>busy</html>", "not a gzip file"),
        (lambda mini: packed(mini)[:-3000], "EOFError|ReadError"),
        (
            lambda mini: packed({**mini, f"{FOLDER}/data_batch_2": pickle.dumps(Bomb())}),
            "data_batch_2 in it is not the original",
        ),
        (lambda mini: packed({}), "data_batch_1.*not found"),
    ],
)
def test_download_fails(mini, tmp_path, serve, archive, message):
    serve(archive(mini))
    with pytest.raises(InputError, match=message) as caught:
        data.load_cifar("cifar10", tmp_path, train=True)
    assert files(tmp_path).items() <= mini.items()  # whole files or none
    for part in (data.CIFAR_URL + "cifar-10-python.tar.gz", str(tmp_path / FOLDER), "test_batch"):
        assert part in str(caught.value)


HERE = Path(kd_lt.__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")


# ---- running the program


def main(argv):
    """Status, standard output and standard error of one command, in this process."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            status = kd_lt.main([str(word) for word in argv])
        except SystemExit as end:
            status = end.code
    return status, *(stream.buffer.getvalue().decode() for stream in streams)


def finish(argv):
    """The run folder and the output of a command that must succeed."""
    status, out, err = main(argv)
    assert status == 0, err
    return Path(re.search("^result +(.*), test accuracy", out, re.M)[1]), out


def refused(argv, *fragments):
    """The status and the message of a command that must fail."""
    status, out, err = main(argv)
    assert status not in (0, None) and "kd_lt.py: " in err and "Traceback" not in err + out
    assert all(str(fragment) in err for fragment in fragments), err
    return status, err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """9 images an epoch in batches of 4: the smallest class and the last batch are one image."""
    return make_npz(tmp_path_factory.mktemp("data") / "tiny.npz", [5, 3, 1])


def flags(npz, runs, text, *words):
    """A command of a second or two. The text is split at its spaces, the words are not."""
    fixed = ["--smoke", "--device", "cpu", "--precision", "fp32", "--runs-dir", str(runs)]
    fixed += ["--dataset", str(npz), "--imb", "1", "--batch-size", "4", "--epochs", "2"]
    return [*fixed, *text.split(), *map(str, words)]  # the last of a repeated flag wins


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """Teacher and student of a finished kd run, as folders; not to be changed."""
    student, _ = finish(flags(tiny, tmp_path_factory.mktemp("finished"), "--method kd"))
    (teacher,) = (folder for folder in student.parent.iterdir() if folder != student)
    return teacher, student


def log_of(folder):
    """The rows of a run's log without their speeds."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]
    assert [row["epoch"] for row in rows] == [*range(1, len(rows) + 1)]
    for row in rows:
        assert row.pop("images_per_second") >= 0
    return rows


def as_bytes(content):
    """Tensors as bytes, so that == compares every bit; without the seconds it took."""
    if isinstance(content, torch.Tensor):
        return content.dtype, tuple(content.shape), content.numpy().tobytes()
    if isinstance(content, dict):
        return {key: as_bytes(value) for key, value in content.items() if key != "seconds"}
    return [as_bytes(value) for value in content] if isinstance(content, list) else content


def outcome(runs):
    """Every number of every run there, by folder name."""
    found = {}
    for folder in Path(runs).iterdir():
        rows, result = log_of(folder), json.loads((folder / "result.json").read_text())
        checkpoint = torch.load(folder / "last.pt", weights_only=True)
        assert checkpoint["epoch"] == len(rows) == result["settings"]["epochs"]
        found[folder.name] = [as_bytes(one) for one in (checkpoint, rows, result)]
    assert not [*Path(runs).glob("*/*.partial")]
    return found


def config_of(text, digest="0" * 16):
    """The Config of a command line."""
    args = kd_lt.parse_flags(shlex.split(text))
    return kd_lt.make_config(args, data.Dataset(*[None] * 4, [], digest), "bf16")


# ---- what the README says and the methods do

SHELL = "\n".join(re.findall(r"```(?:sh|bash)\n(.*?)```", README, re.S)).replace("\\\n", " ")


@pytest.fixture(scope="module")
def readme_folder(tmp_path_factory):
    """A folder in which the README's commands find what they speak of."""
    folder = tmp_path_factory.mktemp("readme")
    make_npz(folder / "mine.npz", [10, 10, 10, 10])
    finish(flags(folder / "mine.npz", folder / "runs" / "smoke", "--method ce"))
    return shutil.copytree(folder / "runs" / "smoke", folder / "runs", dirs_exist_ok=True).parent


@pytest.mark.parametrize("command", re.findall(r"python kd_lt\.py *([^#&|;>\n]*)", SHELL))
def test_every_readme_command_runs_with_smoke_added(command, readme_folder, monkeypatch):
    monkeypatch.chdir(readme_folder)
    argv, shown = [*shlex.split(command), "--smoke"], "From head to tail"
    if "--help" in argv:
        shown = "(our reconstruction)"
    elif "--plot" in argv:
        pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
        shown = "plot     "
    elif "--table" not in argv:
        argv += ["--epochs", 1, "--device", "cpu"]
    status, out, err = main(argv)
    assert status == 0 and shown in out, err
    if "--help" in argv:
        assert out.count("\n") < 90  # it fits on a page
    else:  # but for the names of folders, krdistill is nowhere shown without the word
        assert not re.search(r"krdistill(?! \(reconstruction\)|-)", out)


def test_readme_test_commands():
    (command,) = re.findall(r"^python3 -m venv.*pytest -q test_kd_lt.py", SHELL, re.M)
    if not (HERE / ".ci").is_dir():
        pytest.skip("no .ci here")
    assert (HERE / ".ci" / "run").read_text().endswith(" ".join(command.split()) + "\n")


SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_readme_snippets_run_as_they_stand(snippet, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_npz(tmp_path / "mine.npz", classes=list("abcdefghij"))
    if "PIL" in snippet:
        image = pytest.importorskip("PIL.Image", reason="needs Pillow")
        for split, label in np.ndindex(2, 2):
            folder = tmp_path / "images" / ("train", "test")[split] / f"class {label}"
            folder.mkdir(parents=True)
            image.new("RGB", (40, 20), (90 * label, 0, 0)).save(folder / "1.png")
    made = {}
    exec(snippet.replace("runs/NAME", str(finished[1])), made)
    assert "loss" not in made or made["loss"].isfinite()
    if "PIL" in snippet:
        assert data.load_dataset("mine.npz", "", 1).class_counts == [1, 1]


@pytest.fixture(scope="module")
def results():
    """The folder behind the README's numbers, which is not in every copy of the seven files."""
    folder = HERE / ".results"
    if not folder.is_dir():
        pytest.skip("no .results here")
    return folder


@pytest.fixture(scope="module")
def printed_results(results):
    """What --table prints of .results, and its rows: {row name: {column: cell}}."""
    status, out, err = main(["--table", results])
    assert status == 0 and not err
    assert "**cifar100, imb 100, resnet32, 200 epochs, bf16**" in out
    heading, _, *rows = (line[2:-2].split(" | ") for line in re.findall("^[|].*", out, re.M))
    return out, {row[0]: dict(zip(heading, row, strict=True)) for row in rows}


def test_readme_table_is_that_of_the_results(printed_results):
    """Cell by cell: no number is typed."""
    printed = re.findall(r"^[|] .*", printed_results[0], re.M)
    section = README.split("## Results")[1].split("<details>")[0]
    assert re.findall(r"^[|] .*", section, re.M) == printed and len(printed) > 4


def test_readme_picture_is_that_of_the_results(printed_results):
    """By its legend, which stands in matplotlib's comments."""
    picture = (HERE / ".github" / "head_to_tail.svg").read_text()
    drawn = re.findall(r"<!-- (.*), n = (\d+) -->", picture)
    assert drawn == [(name, row["n"]) for name, row in printed_results[1].items()]


def test_readme_numbers_beside_the_published_ones_are_those_of_the_results(printed_results):
    """The last and the best tested epoch of each method whose results are there."""
    out, rows = printed_results
    best = out.split("such numbers): ")[1].split(".\n")[0].split("; ")
    best = dict(re.fullmatch(r"(.+?) (\d+\.\d\d(?: ± \S+)?)", words).groups() for words in best)
    fold = README.split("<summary>Published numbers")[1].split("</details>")[0]
    fold = fold.replace("\u00a0", " ")
    shown = re.findall(r"^[|] (\w+).*?: .*? [|] (\S+(?: ± \S+)?) [|] (.*?) [|]", fold, re.M)
    compared = []
    for method, last, best_tested in shown:
        name = "krdistill (reconstruction)" if method == "krdistill" else method
        if name in rows:
            assert (last, best_tested) == (rows[name]["top-1"], best[name])
            compared.append(method)
    assert {"ce", "bsce", "kd", "bkd", "cbd", "dive", "krdistill"} <= set(compared)


def test_readme_verdicts_follow_from_the_results(printed_results):
    """Twice the larger standard deviation decides, and both sides have three seeds."""
    _, rows = printed_results
    side = r"[|] ([^|]+), ([\w-]+): ([^|]+) "
    claims = re.findall(rf"{side}{side}[|] (\w+) [|]$", README, re.M)
    rows_of_the_table = README.split("| claim |")[1].split("</details>")[0]
    assert len(claims) == len(re.findall("^[|] ", rows_of_the_table, re.M)) >= 4
    for name, key, shown, other_name, other_key, other_shown, verdict in claims:
        assert (shown, other_shown) == (rows[name][key], rows[other_name][other_key])
        assert rows[name]["n"] == rows[other_name]["n"] == "3"
        (a, a_spread), (b, b_spread) = (map(float, x.split(" ± ")) for x in (shown, other_shown))
        margin = 2 * max(a_spread, b_spread)
        decided = "holds" if a - b > margin else "fails"
        assert verdict == (decided if abs(a - b) > margin else "undecided"), (name, key)


def test_readme_float32_number_is_that_of_the_results(results):
    (path,) = (results / "fp32").glob("*/result.json")
    half = results / "cifar100-imb100-ce-resnet32-e200-s1000-40ae7c4b" / "result.json"
    assert json.loads((path.parent / "config.json").read_text())["settings"]["seed"] == 1000
    single, other = (json.loads(file.read_text())["top1"] for file in (path, half))
    assert f"ce with seed 1000: {single:.2f} in float32 with" in README
    assert f", {other:.2f} in bf16 with one, which decides nothing" in README


def test_readme_numbers_of_the_smaller_network_are_those_of_the_results(results):
    tops = {}
    for path in (results / "laptop").glob("*/result.json"):
        result = json.loads(path.read_text())
        config = kd_lt.Config(**result["settings"])
        assert (config.network, config.epochs) == ("resnet20", 30)
        tops[config.method, config.precision] = f"{result['top1']:.2f} %"
    single, half = ((tops["bkd", key], tops["ce", key]) for key in ("fp32", "bf16"))
    assert f"student {single[0]}, its teacher {single[1]} in float32; " in README
    assert f"; {half[0]} and {half[1]} in bf16, " in README


def test_readme_numbers_without_krdistills_features_are_those_of_the_results(results):
    tops = {}
    for path in results.glob("*-krdistill-*/result.json"):
        result = json.loads(path.read_text())
        settings = result["settings"]
        tops[settings["hyper"]["gamma"], settings["seed"]] = f"{result['top1']:.2f}"
    with_features, without = (
        f"{tops[gamma, 0]}, {tops[gamma, 1]} and {tops[gamma, 2]}" for gamma in (2, 0)
    )
    assert f"0, 1 and 2 have a top-1 of {with_features} with it, {without} without," in README


def test_readme_names_what_has_to_be_copied_with_a_loss_and_the_version():
    (line,) = re.findall("^A loss is one function.*", README, re.M)
    assert all(f"`{name}`" in line for name in HELPERS)
    listed = re.findall(r"for `(\w+)`, ((?:(?:, | and )?`\w+`)+)", line)
    listed = {name: set(re.findall(r"\w+", names)) for name, names in listed}
    for name, companions in COMPANIONS.items():
        assert set(companions) - set(HELPERS) <= listed.get(name, set()), name
    assert f'"kd-lt, version {kd_lt.VERSION}"' in README


def test_readme_names_the_default_hyperparameters():
    defaults = {name: method.hyper for name, method in kd_lt.METHODS.items()}
    (line,) = re.findall("^- Defaults: .*", README, re.M)
    assert {defaults[name]["temperature"] for name in ("kd", "bkd", "dive", "krdistill")} == {2}
    assert {defaults[name]["alpha"] for name in ("kd", "bkd", "krdistill")} == {1}
    assert line == (
        "- Defaults: $T = 2$; $\\alpha = 1$, "
        f"but {defaults['cbd']['alpha']:g} for cbd and {defaults['dive']['alpha']:g} for dive; "
        f"$\\beta = {defaults['bkd']['beta']:g}$ for bkd, {defaults['cbd']['beta']:g} for cbd; "
        f"$\\gamma = {defaults['krdistill']['gamma']:g}$; "
        f"$\\mathrm{{power}} = {defaults['dive']['power']:g}$."
    )


# ---- run_all.sh


def test_run_all_divides_the_work_and_prints_the_table(tiny, tmp_path):
    script = HERE / "run_all.sh"
    methods = re.search("METHODS:-(.*?)}", script.read_text())[1].split()
    assert {"kd", "bkd", "cbd", "dive", "krdistill"} == set(methods)  # their teachers are rows, too
    settings = {
        "METHODS": "ce kd",
        "SEEDS": "0",
        "DATASET": os.path.relpath(tiny, tmp_path),  # relative paths are the caller's
        "IMB": "1",
        "EPOCHS": "2",
        "TEACHER": "resnet8",
        "STUDENT": "resnet8",
        "RUNS": "runs",
        "PYTHON": sys.executable,
        "EXTRA": "--device cpu",
        "OMP_NUM_THREADS": "1",
    }
    copies = [
        subprocess.Popen(
            ["bash", script],
            env=os.environ | settings,
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    outputs = [copy.communicate(timeout=300)[0] for copy in copies]
    assert [copy.returncode for copy in copies] == [0, 0]
    folders = [*(tmp_path / "runs").iterdir()]
    assert sorted(folder.name.split("-")[2] for folder in folders) == ["ce", "ce", "kd"]
    for folder in folders:  # the line before the rows of epochs: once for each run
        line = f"epochs, in runs/{folder.name}\n"
        assert sum(line in output for output in outputs) == 1, folder
    tables = [output.split(f"+ {sys.executable} {HERE}/kd_lt.py --table")[1] for output in outputs]
    assert any("\n| ce" in table and "\n| kd" in table for table in tables)
    failing = os.environ | settings | {"EXTRA": "--nonsense"}
    ended = subprocess.run(
        ["bash", script], env=failing, cwd=tmp_path, text=True, capture_output=True
    )
    # The table of the runs above can be printed: the status is that of the run that failed.
    assert ended.returncode == 1 and "failed with status 2" in ended.stderr
    assert "\n| kd" in ended.stdout


@pytest.mark.parametrize("imb", ["", "50"])
def test_run_all_asks_for_what_its_variables_say(imb):
    given = {"PYTHON": "true", "METHODS": "bsce kd", "SEEDS": "0 1", "TEACHER": "resnet20"}
    ended = subprocess.run(
        ["bash", HERE / "run_all.sh"],
        env={"PATH": os.environ["PATH"], "IMB": imb} | given,
        text=True,
        stdout=subprocess.PIPE,
    )
    assert ended.stdout.splitlines() == [
        f"+ true {HERE}/kd_lt.py --method {method} --dataset cifar100 --student resnet32 "
        f"--epochs 200 --seed {seed} --runs-dir runs{' --imb 50' if imb else ''}{teacher}"
        for seed in (0, 1)
        for method, teacher in (("bsce", ""), ("kd", " --teacher resnet20"))
    ] + [f"+ true {HERE}/kd_lt.py --table runs"]


def test_readme_command_for_three_seeds_of_one_method():
    (line,) = re.findall(r"^.*run_all\.sh$", SHELL, re.M)
    ended = subprocess.run(
        ["bash", "-c", line],
        env={"PATH": os.environ["PATH"], "PYTHON": "true"},
        cwd=HERE,
        text=True,
        stdout=subprocess.PIPE,
    )
    begun = re.findall(r"--method (\w+) .*--seed (\d) ", ended.stdout)
    assert (ended.returncode, begun) == (0, [("bkd", seed) for seed in "012"])


@pytest.mark.parametrize(
    "imports, each_run, ends, runs", [(0, 75, 0, 15), (0, 130, 130, 1), (3, 0, 3, 0)]
)
def test_run_all_ends_as_its_runs_do(tmp_path, imports, each_run, ends, runs):
    """Busy folders are no failure, Ctrl-C ends all, and without torch nothing begins.

    `python` stands for one whose every run ends with that status. There is no table to print.
    """
    script = shutil.copy(HERE / "run_all.sh", tmp_path)  # as Slurm does: kd_lt.py is not beside it
    python = tmp_path / "python"
    cases = f"-c) exit {imports} ;; *) [ $2 = --method ] && exit {each_run}; exit 2 ;;"
    python.write_text(f'#!/bin/sh\ncase "$1" in {cases} esac\n')
    python.chmod(0o755)
    given = {"PYTHON": str(python), "TEACHER": "resnet20", "EXTRA": "--teacher-checkpoint x"}
    ended = subprocess.run(
        ["bash", script],
        env={"PATH": os.environ["PATH"]} | given,
        text=True,
        stdout=subprocess.PIPE,
    )
    begun = [line for line in ended.stdout.splitlines() if "--method" in line]
    assert (ended.returncode, len(begun)) == (ends, runs)
    assert all(re.search(r" kd_lt.py .*--runs-dir runs --teacher-checkpoint x$", b) for b in begun)
    assert ("15 runs were left to other copies" in ended.stdout) == (each_run == 75)


@pytest.mark.parametrize(
    "one, other",
    [
        ("--method kd", "--method bkd --bkd-start 1"),  # before its start BKD is KD
        ("--method bsce", "--method krdistill --alpha 0 --gamma 0"),  # both parts off
        ("--method bsce", "--method dive --alpha 0"),
    ],
)
def test_methods_that_coincide_leave_the_same_numbers(tiny, tmp_path, one, other):
    a, b = (finish(flags(tiny, tmp_path, text))[0] for text in (one, other))
    weights = [as_bytes(dict(kd_lt.load_run(folder).state_dict())) for folder in (a, b)]
    assert a != b and log_of(a) == log_of(b) and weights[0] == weights[1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
def test_smoke_learns_and_resumes(tmp_path, device):
    command = ["--smoke", "--device", device, "--runs-dir", tmp_path]
    folder, out = finish(command)
    result = json.loads((folder / "result.json").read_text())
    (teacher,) = result["teachers"]
    assert result["top1"] > 40 and teacher["top1"] > 40 and result["many"] > 80
    if device == "cpu":  # on a GPU two runs of one seed can differ
        assert result["few"] > teacher["few"]  # what BKD is for
    assert all(f" {scores['top1']:.2f} " in out for scores in (result, teacher))
    (folder / "result.json").unlink()
    status, out, err = main(command)
    assert status == 0 and "resumed   after epoch 8" in out
    again = json.loads((folder / "result.json").read_text())
    assert again["seconds"] > result["seconds"] / 2  # those before the stop count, too


def test_one_epoch_on_real_cifar_100(tmp_path):
    need_real_files("cifar100")
    text = "--method bsce --imb 100 --student resnet8 --epochs 1 --lr 0.5 --device cpu"
    folder, out = finish([*text.split(), "--data-dir", REAL, "--runs-dir", tmp_path])
    assert re.search("10,847 training images.*35.*35.*30.*10,000 test", out)
    assert json.loads((folder / "result.json").read_text())["top1"] > 2


# ---- evaluation


def test_images_are_tested_in_parts_and_no_graph_is_kept():
    sizes, model = [], ResNet("resnet8", 3)
    model.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    images = torch.zeros(20, 3, 128, 128, dtype=torch.uint8)
    output = kd_lt.predict(model, images, torch.device("cpu"), "fp32")
    assert sizes == [15, 5] and len(output.logits) == 20 and not output.logits.requires_grad


def test_networks_are_tested_in_the_precision_of_their_run(tiny, tmp_path, monkeypatch):
    asked, evaluate = [], kd_lt.evaluate
    monkeypatch.setattr(kd_lt, "evaluate", lambda *args: asked.append(args[-1]) or evaluate(*args))
    command = flags(tiny, tmp_path, "--method kd --precision bf16")
    folder, _ = finish(command)
    (folder / "result.json").unlink()  # as if stopped after its last epoch
    finish(command)
    assert asked == ["bf16"] * 5  # teacher, the same again, student; then teacher and student


def test_groups_are_by_training_count_and_absent_when_empty():
    class Fixed(torch.nn.Module):
        def forward(self, images):
            return torch.eye(5)[[0, 1, 1, 1, 0, 0]], images

    tests = torch.zeros(6, 3, 32, 32), torch.tensor([0, 0, 1, 2, 3, 3])
    for counts, groups in (([101, 20, 19, 100, 5], [50, 50, 0]), ([200] * 5, [37.5, None, None])):
        part = data.Dataset(None, None, *tests, counts, "")
        scores = kd_lt.evaluate(Fixed(), part, torch.device("cpu"), "fp32")
        assert [scores[key] for key in ("many", "medium", "few")] == groups
        assert scores["top1"] == approx(100 / 3) and scores["per_class"] == [50, 100, 0, 0, None]


def test_the_result_is_the_last_test_not_the_best(tiny, tmp_path, monkeypatch):
    top1, evaluate = [90.0, 10.0], kd_lt.evaluate
    monkeypatch.setattr(kd_lt, "evaluate", lambda *args: evaluate(*args) | {"top1": top1.pop(0)})
    folder, _ = finish(flags(tiny, tmp_path, "--method ce --eval-every 1"))
    assert json.loads((folder / "result.json").read_text())["top1"] == 10
    assert not kd_lt.load_run(folder).training


def test_a_class_without_test_images_is_told(tmp_path):
    file = make_npz(tmp_path / "a.npz", y_test=np.array([0, 0, 0, 2, 2, 2]))
    _, out = finish(flags(file, tmp_path / "runs", "--method ce"))
    assert "no test image of class 1: its accuracy" in out


# ---- flags reach what they are for

ACTS = [  # other flags, a flag and its value, and the settings that it changes
    ("--method ce", "--lr", "0.05", {"lr"}),
    ("--method ce", "--weight-decay", "0.01", {"weight_decay"}),
    ("--method ce", "--seed", "5", {"seed"}),
    ("--method ce", "--batch-size", "3", {"batch_size"}),
    ("--method ce", "--epochs", "3", {"epochs"}),
    ("--method ce", "--precision", "bf16", {"precision"}),
    ("--method ce", "--student", "resnet14", {"network"}),
    ("--method ce", "--imb", "5", {"imb", "data"}),
    ("--method ce --imb 5", "--imb-type", "step", {"imb_type", "data"}),
    ("--method ce --imb 5", "--subset-seed", "1", {"subset_seed", "data"}),
    ("--method cbd", "--num-teachers", "2", {"teachers"}),
    ("--method kd", "--teacher", "resnet14", {"teachers"}),
    ("--method kd", "--teacher-method", "bsce", {"teachers"}),
]


def settings_with_and_without(tiny, others, flag, value):
    """The recorded settings of a run without the flag and of one with it, whose losses differ."""
    texts = others, f"{others} {flag} {value}"  # the first: made once
    folders = [finish(flags(tiny, tiny.parent, text))[0] for text in texts]
    losses = [[row["loss"] for row in log_of(folder)] for folder in folders]
    assert losses[0] != losses[1]
    return [json.loads((folder / "config.json").read_text())["settings"] for folder in folders]


def test_every_setting_is_changed_by_a_flag_above():
    """But for hyper, which is tested below, and what decides itself by dataset and method."""
    changed = set().union(*(settings for *_, settings in ACTS))
    decided = {"dataset", "method", "head", "colour", "hyper"}
    assert changed == {field.name for field in fields(kd_lt.Config)} - decided


@pytest.mark.parametrize("others, flag, value, settings", ACTS)
def test_every_flag_acts_and_leaves_the_rest(tiny, others, flag, value, settings):
    a, b = settings_with_and_without(tiny, others, flag, value)
    assert {key for key in a if a[key] != b[key]} == settings
    (changed,) = settings - {"data"}  # --imb changes which images there are, too
    assert len(b[changed]) == 2 if flag == "--num-teachers" else value in str(b[changed])


HYPERPARAMETERS = [(name, key) for name in kd_lt.METHODS for key in kd_lt.METHODS[name].hyper]


@pytest.mark.parametrize("method, key", HYPERPARAMETERS)
def test_every_hyperparameter_acts_and_leaves_the_rest(tiny, method, key):
    flag = "--" + key.replace("_", "-")
    a, b = settings_with_and_without(tiny, f"--method {method}", flag, "0.6")
    assert b == a | {"hyper": a["hyper"] | {key: 0.6}}


def test_teachers_have_the_students_recipe(tiny, tmp_path):
    text = "--method kd --lr 0.05 --weight-decay 0.003 --epochs 1 --batch-size 3"
    student, _ = finish(flags(tiny, tmp_path, text))
    (teacher,) = (folder for folder in student.parent.iterdir() if folder != student)
    own, its = (json.loads((f / "config.json").read_text())["settings"] for f in (student, teacher))
    assert {key for key in own if own[key] != its[key]} == {"method", "hyper", "teachers", "seed"}
    assert its["seed"] == own["seed"] + 1000


def test_eager_reaches_the_training_and_a_failed_capture_is_told(tiny, tmp_path, monkeypatch):
    def train(*args):
        asked.append(args[-1])
        raise kd_lt.CaptureError("cannot be recorded: try --eager")

    asked = []
    monkeypatch.setattr(kd_lt, "train", train)
    for more, eager in (("", False), (" --eager", True)):
        status, err = refused(flags(tiny, tmp_path, "--method ce" + more), "try --eager")
        assert status == 1 and err.count("\n") == 1 and asked.pop() == eager


def test_defaults_of_machine_and_folders():
    args = kd_lt.parse_flags([])
    machine = (args.device, args.precision, args.eager, args.eval_every)
    assert machine == ("auto", "auto", False, None)
    assert (args.data_dir, args.runs_dir) == ("data", "runs")
    assert kd_lt.parse_flags(["--smoke"]).runs_dir == "runs/smoke"


def test_every_flag_about_the_data_reaches_the_loader(monkeypatch):
    def load(*args):
        asked.append(args)
        raise InputError("seen")

    asked = []
    monkeypatch.setattr(kd_lt, "load_dataset", load)
    text = (
        "--device cpu --dataset cifar10 --data-dir there --imb 50 --imb-type step --subset-seed 3"
    )
    refused(text.split(), "seen")
    assert asked == [("cifar10", "there", 50.0, "step", 3)]


def test_the_plan_shows_every_number(finished, tiny, tmp_path):
    text = "--method kd --alpha 0.5 --seed 3 --epochs 1"
    argv = flags(tiny, tmp_path, text, "--teacher-checkpoint", finished[0])
    lines = finish(argv)[1].splitlines()
    assert "method    kd: temperature 2, alpha 0.5" in lines
    recipe = "epochs 1 of 3 steps, batch size 4, lr 0.1, weight decay 0.0002"
    assert f"recipe    {recipe}" in lines
    assert any(re.fullmatch("teacher   resnet8 by ce, given: [0-9a-f]{16}", line) for line in lines)


@pytest.mark.parametrize(
    "text, plotted, tabled",
    [
        ("--table", None, ["runs"]),
        ("--table --runs-dir mine", None, ["mine"]),
        ("--plot x.svg --runs-dir mine", ["mine"], None),
        ("--table a --plot x.svg b c", ["b", "c"], ["a"]),
        ("--plot x.svg b --table", ["b"], ["b"]),
        ("--table a --plot x.svg", ["a"], ["a"]),
    ],
)
def test_which_folders_a_report_reads(monkeypatch, text, plotted, tabled):
    asked = {}
    monkeypatch.setattr(kd_lt, "plot", lambda file, folders: asked.update(plot=folders))
    monkeypatch.setattr(kd_lt, "table", lambda folders: asked.update(table=folders))
    assert main(text.split())[0] == 0
    assert (asked.get("plot"), asked.get("table")) == (plotted, tabled)


def test_defaults_of_teachers_and_of_cifar_10():
    expected = {"ce": [], "bsce": [], "dive": ["bsce"]}
    for method in ("kd", "bkd", "cbd", "krdistill"):
        expected[method] = ["ce"]
    for method, teachers in expected.items():
        config = config_of(f"--method {method}")
        assert [teacher["method"] for teacher in config.teachers] == teachers
    four = config_of("--method cbd --num-teachers 4 --seed 7").teachers
    assert [(teacher["seed"], teacher["colour"]) for teacher in four] == [
        (1007, False),
        (2007, False),
        (3007, True),
        (4007, True),
    ]
    mixed = replace(config_of("--method cbd"), teachers=[four[0], four[1] | {"method": "bsce"}])
    assert "-cbd-resnet32-from-resnet32-ce_resnet32-bsce-x2-" in kd_lt.run_name(mixed)
    starts = [
        config_of(f"--method bkd --dataset {text}").hyper["bkd_start"]
        for text in ("cifar100", "cifar10", "cifar10 --bkd-start 0")
    ]
    assert starts == [0, 0.8, 0]


# ---- names of runs, table and plot


def test_run_names_of_the_published_default_stay():
    """Another name would leave behind the runs that people have made, and those of .results."""
    config = config_of("--method bkd --imb 100", "22c7e9ed7160a1c8")
    teacher = replace(config, hyper={}, teachers=[], **config.teachers[0])
    assert [kd_lt.run_name(one) for one in (config, teacher)] == [
        "cifar100-imb100-bkd-resnet32-from-resnet32-ce-e200-s0-1021e8ee",
        "cifar100-imb100-ce-resnet32-e200-s1000-40ae7c4b",
    ]
    for changed in (replace(config, precision="fp32"), replace(config, data="0" * 16)):
        assert kd_lt.run_name(config) != kd_lt.run_name(changed)
    thinned = kd_lt.run_name(config_of("--method ce --imb-type step --subset-seed 3"))
    assert thinned.startswith("cifar100-imb100-ce-resnet32-imb_typestep-subset_seed3-e200-s0-")


def test_names_of_runs_with_long_file_names_or_many_teachers_fit_a_file_system():
    assert len(kd_lt.run_name(config_of(f"--method ce --dataset {'x' * 240}.npz"))) < 200
    teacher = {"network": "resnet32", "method": "ce", "head": "cosine", "colour": False}
    config = config_of("--method cbd")
    names = []
    for n in (1, 20):
        given = [teacher | {"checkpoint": f"{i:016x}"} for i in range(n)]
        names.append(kd_lt.run_name(replace(config, teachers=given)))
    assert f"given-{0:016x}" in names[0] and "x20" in names[1] and len(names[1]) < 200


def test_default_starts_of_bkd_are_no_part_of_a_name():
    for text, shown in (
        ("cifar100", False),
        ("cifar10", False),
        ("cifar10 --bkd-start 0", True),
        ("cifar100 --bkd-start 0.8", True),
    ):
        config = config_of(f"--method bkd --dataset {text}")
        assert ("bkd_start" in kd_lt.run_name(config)) == shown
        assert ("bkd start" in kd_lt.row_name(config)) == shown


def test_betas_near_1_are_not_rounded_into_one_row():
    configs = [config_of(f"--method bkd --beta {beta}") for beta in (0.9999999, 0.9999995)]
    names = [kd_lt.row_name(config) for config in configs]
    assert names == ["bkd, beta 0.9999999", "bkd, beta 0.9999995"]


def stored(folder, config, top1, **teachers):
    """Write the result files of a run, of a Config or a command line, that was never trained."""
    config = config_of(config) if isinstance(config, str) else config
    result = {"settings": asdict(config), "version": "2.0.0", "devices": ["a GPU"]}
    result["teachers"] = [
        {"network": "resnet32", "method": m, "top1": t} for m, t in teachers.items()
    ]
    result["seconds"] = 60.0
    result |= {"top1": top1, "many": 60.0, "medium": None, "few": 2.0}
    result |= {"class_counts": [5, 500, 1], "per_class": [60.0, 80.0, None]}
    rows = [{"command": ""}, {"epoch": 1, "top1": 41.0}, {"epoch": 2}, {"epoch": 3, "top1": top1}]
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_table_averages_seeds_and_never_settings(tmp_path):
    stored(tmp_path / "a", "--method ce", 38.0)
    stored(tmp_path / "b", "--method ce --seed 1", 42.0)
    stored(tmp_path / "c", "--method ce --lr 0.2", 20.0)
    stored(tmp_path / "d", "--method kd", 40.0, ce=30.0)
    stored(tmp_path / "e", "--method kd --seed 1", 41.0, ce=31.0)
    stored(tmp_path / "f", "--method ce --epochs 30", 30.0)
    (tmp_path / "unfinished").mkdir()
    copied = shutil.copytree(tmp_path / "a", tmp_path / "copies" / "a")  # is no second seed
    status, out, err = main(["--table", tmp_path, tmp_path / "a", copied])
    assert status == 0, err
    long, short = re.split("^(?=[*][*])", out, flags=re.M)[1:]
    assert " 30 epochs" in short and " 200 epochs" in long
    assert all("kd-lt 2.0.0 on a GPU" in p for p in (short, long))
    rows = [re.split(" *[|] *", row)[1:-1] for row in re.findall("^[|] [ck].*", short + long, re.M)]
    assert [row[2:] for row in rows] == [
        ["1", "30.00", "60.00", "-", "2.00"],  # an empty group is no 0 %
        ["2", "40.00 ± 2.83", "60.00 ± 0.00", "-", "2.00 ± 0.00"],
        ["1", "20.00", "60.00", "-", "2.00"],
        ["2", "40.50 ± 0.71", "60.00 ± 0.00", "-", "2.00 ± 0.00"],
    ]
    assert [row[1] for row in rows] == ["-", "-", "-", "ce, 30.50 ± 0.71"]
    ce, changed, kd = (row[0] for row in rows[1:])
    assert (ce, changed, kd) == ("ce", "ce, lr 0.2", "kd")
    bars = [line.split() for line in short.splitlines() if line.startswith(("training", ce))]
    assert bars == [["training", "images", "500", "5", "1"], [ce, "80", "60", "-"]]
    assert "Best tested epoch" in long and f"{ce} 41.50 ± 0.71; {changed} 41.00" in long


def test_the_lines_from_head_to_tail_average_seeds_and_classes(capsys):
    results = []
    for seed in (0, 1):
        result = dict.fromkeys(("top1", *kd_lt.GROUPS), 50.0) | {"config": config_of("--method ce")}
        per_class = [4.0 * c + 2 * seed for c in range(20)]
        results.append(result | {"class_counts": [*range(1, 21)], "per_class": per_class})
    kd_lt.print_rows({"ce": results})
    out = capsys.readouterr().out
    assert re.search("^training images +39 .* 3$", out, re.M)  # in parts of two classes
    assert re.search("^ce +75 .* 3$", out, re.M)


OTHER_SETTINGS = [  # another value of each field of Config, for kd with its defaults
    ("dataset", "cifar10"),
    ("data", "1" * 16),
    ("imb", 50.0),
    ("imb_type", "step"),
    ("subset_seed", 1),
    ("hyper", {"temperature": 2.0, "alpha": 0.5}),
    ("network", "resnet20"),
    ("head", "cosine"),
    ("epochs", 30),
    ("batch_size", 64),
    ("lr", 0.2),
    ("weight_decay", 1e-3),
    ("precision", "fp32"),
    ("colour", True),
    ("method", "bkd"),
    ("teachers", [{"network": "resnet56", "method": "ce", "seed": 1000}]),
    ("teachers", [{"network": "resnet32", "method": "bsce", "seed": 1000}]),
    ("teachers", [{"network": "resnet32", "method": "ce", "checkpoint": "0" * 16}]),
    ("teachers", 2 * [{"network": "resnet32", "method": "ce", "seed": 1000}]),
]


def test_every_setting_has_another_value_above():
    tried = {field for field, _ in OTHER_SETTINGS}
    assert tried == {field.name for field in fields(kd_lt.Config)} - {"seed"}


@pytest.mark.parametrize("field, value", OTHER_SETTINGS, ids=str)
def test_runs_that_differ_in_more_than_seeds_are_two_rows(tmp_path, field, value):
    one = config_of("--method kd")
    stored(tmp_path / "a", one, 40.0, ce=30.0)
    stored(tmp_path / "b", replace(one, **{field: value}), 40.0, ce=30.0)
    settings = kd_lt.finished_runs([tmp_path])
    assert sum(len(rows) for rows in settings.values()) == 2
    headings = {heading for heading, _ in settings}
    names = {name for rows in settings.values() for name in rows}
    assert len(headings) == 2 or len(names) == 2 or field == "data"  # which no heading shows


@pytest.mark.parametrize(
    "content", ["{", '{"settings": {}}', "without few", "another method", "another network"]
)
def test_a_damaged_run_is_named_and_left_out_of_the_table(tmp_path, content):
    stored(tmp_path / "a", "--method ce", 38.0)
    stored(tmp_path / "b", "--method ce --seed 1", 42.0)
    file = tmp_path / "b" / "result.json"
    whole = json.loads(file.read_text())
    if content == "without few":
        del whole["few"]
        content = json.dumps(whole)
    if content.startswith("another"):
        whole["settings"][content.split()[1]] = "mine"
        content = json.dumps(whole)
    file.write_text(content)
    status, out, err = main(["--table", tmp_path])
    assert status == 0 and "| ce | - | 1 | 38.00 |" in out
    assert err.count(str(file)) == 1 and "Traceback" not in err
    status, _, err = main(["--table", tmp_path / "b"])
    assert status == 2 and err.count(str(file)) == 1


def test_headings_tell_how_the_data_was_thinned():
    """A file that was not thinned may be imbalanced: it is not called imb 1."""
    for text, words in (
        ("cifar100", "cifar100, imb 100, resnet32"),
        ("cifar10 --imb 50 --imb-type step", "cifar10, imb 50, step, resnet32"),
        ("cifar10 --imb 50 --subset-seed 3", "cifar10, imb 50, subset seed 3, resnet32"),
        ("mine.npz", "mine.npz, not thinned, resnet32"),
    ):
        heading = kd_lt.setting_name(config_of(f"--method ce --dataset {text}"))
        assert heading == f"{words}, 200 epochs, bf16"


def test_another_result_of_the_same_settings_is_named(tmp_path):
    """Such as that of a GPU beside that of a CPU: the first counts, the other is not hidden."""
    stored(tmp_path / "a", "--method ce", 38.0)
    stored(tmp_path / "b", "--method ce", 38.5)
    second = tmp_path / "b" / "result.json"
    second.write_text(second.read_text().replace("80.0", "90.0"))
    status, out, err = main(["--table", tmp_path])
    assert status == 0 and "| ce | - | 1 | 38.00 |" in out
    assert f"left out: {second}: another result" in err and "Traceback" not in err


def test_a_table_without_runs_points_to_those_of_smoke(tmp_path):
    stored(tmp_path / "smoke" / "a", "--method ce", 38.0)
    assert main(["--table", tmp_path / "smoke"])[0] == 0
    refused(["--table", tmp_path], "no finished run", tmp_path / "smoke")
    err = refused(["--table", tmp_path / "a"])[1]
    assert err.endswith(f"{tmp_path}/a: no finished run there\n")


@pytest.mark.parametrize(
    "log", ["", "{", '{"command": ""}\n', '{"command": ""}\n{"epoch": 2}\n', "gone"]
)
def test_a_damaged_log_ends_no_table(tmp_path, log):
    stored(tmp_path / "a", "--method ce", 38.0)
    (tmp_path / "a" / "log.jsonl").write_text(log)
    if log == "gone":
        (tmp_path / "a" / "log.jsonl").unlink()
    status, out, err = main(["--table", tmp_path])
    assert status == 0 and "| ce | - | 1 | 38.00 |" in out
    assert f"{tmp_path / 'a' / 'log.jsonl'} is damaged" in err


@pytest.mark.parametrize(
    "suffix, beside", [(".png", []), (".svg", ["--table"]), (".pdf", [])], ids=str
)
def test_plot_draws_or_says_what_is_missing(suffix, beside, tmp_path, monkeypatch):
    stored(tmp_path / "runs" / "a", "--method ce", 38.0)
    stored(tmp_path / "runs" / "b", "--method ce --seed 1", 39.0)
    stored(tmp_path / "runs" / "c", "--method kd --seed 1", 40.0, ce=30.0)
    stored(tmp_path / "runs" / "another setting", "--method ce --epochs 3", 38.0)
    picture, runs = tmp_path / f"picture{suffix}", tmp_path / "runs"
    with monkeypatch.context() as patch:
        for name in ("matplotlib", "matplotlib.figure"):
            patch.setitem(sys.modules, name, None)
        refused(["--plot", picture, runs], "pip install matplotlib")
        assert not picture.exists()
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    drawn = []
    for order in ([*beside, "--plot", picture, runs], ["--plot", picture, runs, *beside]):
        status, out, _ = main(order)
        assert not status and ("| ce" in out) == bool(beside)
        drawn.append(picture.read_bytes())
    assert len(drawn[0]) > 5000
    assert drawn[0] == drawn[1] or suffix == ".pdf"  # which holds the time


def test_plot_draws_a_line_a_row_with_its_own_colour_and_style(tmp_path):
    figure = pytest.importorskip("matplotlib.figure", reason="--plot needs matplotlib").Figure()
    for i, method in enumerate(("ce", "bsce", "kd", "dive")):
        stored(tmp_path / method, f"--method {method}", 30.0 + i)
    stored(tmp_path / "again", "--method ce --seed 1", 31.0)
    again = tmp_path / "again" / "result.json"
    again.write_text(again.read_text().replace("80.0", "90.0"))
    ((heading, _), rows), *_ = kd_lt.finished_runs([tmp_path]).items()
    axes = figure.subplots()
    kd_lt.draw_head_to_tail(axes, heading, rows)
    lines = [line for line in axes.lines if "n = " in line.get_label()]
    assert [line.get_label() for line in lines] == ["ce, n = 2"] + [
        f"{method}, n = 1" for method in ("bsce", "kd", "dive")
    ]
    assert len({line.get_color() for line in lines}) == len(lines)
    assert len({line.get_linestyle() for line in lines}) == len(lines)
    assert lines[0].get_ydata()[:2].tolist() == [85, 60]  # the seeds' mean; class 1 comes first
    (band,) = axes.collections  # of the one row with two seeds
    heights = band.get_paths()[0].vertices[:, 1]
    assert [heights.min(), heights.max()] == approx([60, 85 + math.sqrt(50)])  # of 80 and 90
    assert axes.get_title() == heading and "0" * 16 not in heading

    # A hundred classes in parts of five, and more rows than line styles.
    result = {"class_counts": [*range(1, 101)], "per_class": [float(c) for c in range(100)]}
    axes = figure.add_subplot()
    kd_lt.draw_head_to_tail(axes, "", {f"row {i}": [result] for i in range(8)})
    assert axes.lines[-1].get_xdata()[[0, -1]].tolist() == [2.5, 97.5]
    assert axes.lines[-1].get_ydata()[[0, -1]].tolist() == [97, 2]  # of classes 99..95 and 4..0
    assert figure.axes[-1].patches[0].get_data().values.tolist() == [*range(100, 0, -1)]
    groups = [(text.get_text(), text.get_position()[0]) for text in axes.texts]
    assert groups == [("medium", 40.5), ("few", 90.5)]  # the middles of 100..20 and 19..1 images


# ---- the same numbers again


@pytest.fixture(scope="module")
def twice(tiny, tmp_path_factory):
    """All methods in one folder and, tested every epoch, in another; what the first printed."""
    printed, folders = {}, [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for method in LOSSES:
        text = f"--method {method}" + " --num-teachers 2" * (method == "cbd")
        _, printed[method] = finish(flags(tiny, folders[0], text))
        finish(flags(tiny, folders[1], text + " --eval-every 1"))
    return *folders, printed


def test_same_numbers_again(twice):
    first, second = map(outcome, twice[:2])
    networks = len(LOSSES) + 4  # a student of each method; ce, bsce and two of cbd as teachers
    assert first.keys() == second.keys() and len(first) == networks
    for name, (checkpoint, rows, result) in first.items():
        tested = second[name][1]  # how often it is tested changes the log and nothing else
        assert checkpoint == second[name][0] and result == second[name][2]
        assert all("top1" in row for row in tested) and "top1" not in rows[0]
        assert rows == [{k: row[k] for k in rows[i]} for i, row in enumerate(tested)]
        assert rows[-1]["top1"] == result["top1"] == approx(np.mean(result["per_class"]))
        assert all(rows[-1][group] == result[group] for group in kd_lt.GROUPS)
    assert len({str([row["loss"] for row in one[1]]) for one in first.values()}) == networks


def test_a_seed_means_what_it_did(twice):
    """Or nobody could check the published runs. Other processors round differently."""
    (bkd,) = twice[0].glob("*-bkd-*")
    losses = [row["loss"] for row in log_of(bkd)]
    assert losses == approx([1.216, 1.823], rel=1e-2)


def test_time_counts_over_all_stops_and_what_is_left_from_the_last(small, tmp_path, monkeypatch):
    seconds, left = [0.0], []

    def train_epoch(trainer, step, epoch):
        seconds[0] += 10
        return {"epoch": epoch + 1, "loss": 1.0}

    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])
    monkeypatch.setattr(kd_lt, "train_epoch", train_epoch)
    monkeypatch.setattr(kd_lt, "print_epoch", lambda row, epochs, one: left.append(one))
    trainer = make_trainer(small, "ce", "--epochs", "5")
    progress = kd_lt.Progress(epochs=2, seconds=50.0, devices=[], versions=[])
    kd_lt.train(trainer, small, tmp_path, progress, eval_every=2)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert left == [20, 10, 0] and saved["seconds"] == progress.seconds == 80


def test_a_row_of_the_log_is_the_mean_over_the_images(tiny, tmp_path, monkeypatch):
    loss, batches = kd_lt.Trainer.loss, []

    def recorded(trainer, student, teachers, y):
        value, hits = loss(trainer, student, teachers, y), student.logits.argmax(1) == y
        batches.append([len(y), len(y) * value.item(), 100 * hits.sum().item()])
        return value

    monkeypatch.setattr(kd_lt.Trainer, "loss", recorded)
    rows = log_of(finish(flags(tiny, tmp_path, "--method ce --epochs 2"))[0])
    for row, steps in zip(rows, (batches[:3], batches[3:]), strict=True):
        sums = np.sum(steps, axis=0)  # 4, 4 and 1 images
        assert [9, 9 * row["loss"], 9 * row["train_top1"]] == approx(sums)
    assert [row["lr"] for row in rows] == approx([0.02, 0.04])


def test_progress_is_shown_in_place_on_a_terminal_alone(capsys, monkeypatch):
    """And only in an epoch of more than a second."""
    monkeypatch.setattr(time, "perf_counter", lambda: 100.0)
    for is_terminal, seconds, shown in ((True, 2, True), (True, 0.5, False), (False, 2, False)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda answer=is_terminal: answer)
        kd_lt.print_progress(30, 85, 128, 100.0 - seconds)
        out = capsys.readouterr().out
        assert out.startswith("\r\033[K      step 30 of 85") if shown else out == ""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    row = {"epoch": 1, "lr": 0.02, "loss": 4.0, "train_top1": 5.0, "images_per_second": 900}
    kd_lt.print_epoch(row, 200, 90.0)
    assert capsys.readouterr().out.startswith("\r\033[K    1/200")  # the progress gives way
    kd_lt.print_epoch(row | {"lr": 0.003125}, 200, 90.0)
    assert "1/200 0.003125 " in capsys.readouterr().out
    kd_lt.print_epoch(row | {"top1": 7.0, "many": 8.0}, 200, 90.0)
    assert "5.00     7.00     8.00        -        -" in capsys.readouterr().out


@pytest.mark.parametrize(
    "seconds, shown", [(12.4, "12 s"), (61, "1 min"), (7000, "117 min"), (7300, "2.0 h")]
)
def test_durations_read_as_people_say_them(seconds, shown):
    assert kd_lt.duration(seconds) == shown


def test_teachers_are_shared_and_finished_runs_not_repeated(tiny, twice, tmp_path):
    trained = {method: out.count("epochs, in ") for method, out in twice[2].items()}
    # Itself and the teachers that no method before it has trained. LOSSES gives the order.
    expected = {"ce": 1, "bsce": 1, "kd": 2, "bkd": 1, "cbd": 3, "dive": 2, "krdistill": 1}
    assert trained.items() >= expected.items()
    before = {path: (twice[0] / path).stat().st_mtime_ns for path in files(twice[0])}
    _, out = finish(flags(tiny, twice[0], "--method bkd"))
    assert "finished before" in out and "epochs, in" not in out
    assert {path: (twice[0] / path).stat().st_mtime_ns for path in files(twice[0])} == before
    given = sorted(twice[0].glob("*headcosine*"), key=lambda path: "-s2000-" in path.name)
    again, _ = finish(flags(tiny, tmp_path, "--method cbd", "--teacher-checkpoint", *given))
    assert log_of(again) == log_of(next(twice[0].glob("*-cbd-*")))  # they teach as its own did


def test_half_of_the_teachers_see_distorted_colours_and_each_is_tested(tiny, tmp_path, monkeypatch):
    calls, distort, tested, evaluate = [], data.distort_colour, [], kd_lt.evaluate
    monkeypatch.setattr(data, "distort_colour", lambda *args: calls.append(args) or distort(*args))
    monkeypatch.setattr(kd_lt, "evaluate", lambda *args: tested.append(args[0]) or evaluate(*args))
    for teachers, batches, networks in ((1, 0, 3), (2, 6, 7)):  # of the second, three an epoch
        finish(flags(tiny, tmp_path, f"--method cbd --num-teachers {teachers}"))
        assert len(calls) == batches and len(tested) == len(set(tested)) == networks


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("method", ["bkd", "krdistill"])
def test_teacher_and_global_generators_stay(finished, tiny, tmp_path, monkeypatch, method, given):
    teacher = shutil.copytree(finished[0], tmp_path / finished[0].name)
    before, loaded, load_run = (files(teacher), global_generators()), [], kd_lt.load_run
    monkeypatch.setattr(
        kd_lt, "load_run", lambda *args: loaded.append(load_run(*args)) or loaded[-1]
    )
    words = ["--teacher-checkpoint", teacher] if given else []
    finish(flags(tiny, tmp_path, f"--method {method}", *words))
    assert (files(teacher), global_generators()) == before and len(loaded) == 1
    weights = torch.load(teacher / "last.pt", weights_only=True)["student"]
    assert as_bytes(dict(loaded[0].state_dict())) == as_bytes(dict(weights))
    assert not any(module.training for module in loaded[0].modules())
    assert all(p.grad is None and not p.requires_grad for p in loaded[0].parameters())


# ---- kills, stops, full disks, locks

FORKED = multiprocessing.get_context("forkserver")  # real processes that need not import torch
# Not this file: it asks whether there is a GPU, after which a process must not be forked. dynamo is
# what the first optimizer imports.
FORKED.set_forkserver_preload(["kd_lt", "pytest", "torch._dynamo", "torch.utils.flop_counter"])


def child(argv, out, file_limit):
    """In a process of its own: one command, its output in a file."""
    sys.stdout = sys.stderr = open(out, "w", buffering=1)  # noqa: SIM115  ends with the process
    torch.set_num_threads(1)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    train = kd_lt.train
    kd_lt.train = lambda *args: print("TRAINING") or train(*args)
    sys.exit(kd_lt.main(argv))


def start(argv, out, file_limit=None):
    """Start one command in a process of its own."""
    out.write_text("")
    process = FORKED.Process(target=child, args=(argv, out, file_limit))
    process.start()
    return process


def wait_until(met, seconds=300):
    """Return when the condition is met; fail when it is not in time."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


@pytest.mark.parametrize("text", ["--method krdistill", "--method cbd --num-teachers 2"])
def test_killed_at_random_moments(tiny, tmp_path, text):
    text += " --epochs 6 --eval-every 4"
    out, runs, whole, landed = tmp_path / "out", tmp_path / "runs", tmp_path / "whole", 0
    finish(flags(tiny, whole, text))
    seconds = sum(json.loads(path.read_text())["seconds"] for path in whole.glob("*/result.json"))
    for folder in whole.iterdir():
        assert [row["epoch"] for row in log_of(folder) if "top1" in row] == [4, 6]
    want, rng = outcome(whole), random.Random(text)
    for kill in range(40):  # eight do, unless the machine is now much faster than in the whole run
        process = start(flags(tiny, runs, text), out)
        if kill % 4:  # else the first moments, with the data and the lock
            wait_until(lambda p=process: "TRAINING" in out.read_text() or p.exitcode is not None)
        process.join(rng.uniform(0, seconds / 3))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            landed += "TRAINING" in out.read_text()
        else:  # it was quicker: that one must be right
            assert process.exitcode == 0 and outcome(runs) == want, out.read_text()
            shutil.rmtree(runs)
        if kill >= 7 and landed >= 3:
            break
    finish(flags(tiny, runs, text))  # the dead left their locks
    assert outcome(runs) == want and landed >= 3


@pytest.mark.parametrize(
    "stop, status, message",
    [
        (KeyboardInterrupt(), 130, "interrupted; the same command continues"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_stopped_at_every_write(finished, tiny, tmp_path, monkeypatch, stop, status, message):
    """Also between the log's line and the checkpoint, and between the last one and the result."""

    def new(name):  # with its teacher
        return shutil.copytree(finished[0], tmp_path / name / finished[0].name).parent

    text, fsync, writes = "--method krdistill", os.fsync, []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: writes.append(os.fstat(descriptor).st_size))
        finish(flags(tiny, new("whole"), text))
    assert len(writes) == 7  # config, log, twice a line and a checkpoint, result
    assert all(writes) and writes[1] < writes[2] < writes[4]  # each is whole when it is synced
    for n in range(len(writes)):
        runs, calls = new(f"runs{n}"), []

        def failing(descriptor, calls=calls, n=n):
            calls.append(descriptor)
            if len(calls) > n:
                raise stop
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            ended, err = refused(flags(tiny, runs, text), message)
        assert ended == status and err.count("\n") == 1 and len(calls) == n + 1
        assert status != 1 or str(runs) in err, f"write {n}: the message names no file: {err}"
        assert not [*runs.glob("*/*.partial")]
        for log in runs.glob("*krdistill*/log.jsonl"):  # a line that found half its place
            log.write_bytes(log.read_bytes() + b'{"epoch": ')
        finish(flags(tiny, runs, text))
        assert outcome(runs) == outcome(tmp_path / "whole"), n


def test_a_stopped_run_continues_bit_for_bit_with_two_threads(tiny, tmp_path, monkeypatch):
    train_epoch, text = kd_lt.train_epoch, "--method ce --student resnet14"

    def stopped(trainer, step, epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        return train_epoch(trainer, step, epoch)

    torch.set_num_threads(2)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(kd_lt, "train_epoch", stopped)
            refused(flags(tiny, tmp_path / "runs", text), "interrupted")
        for runs in ("runs", "whole"):
            finish(flags(tiny, tmp_path / runs, text))
    finally:
        torch.set_num_threads(1)
    assert outcome(tmp_path / "runs") == outcome(tmp_path / "whole")


@pytest.fixture(scope="module")
def failed(tiny, tmp_path_factory):
    """The folder of a run whose loss is not finite in its second epoch, and the message."""
    runs, usual = tmp_path_factory.mktemp("failed"), kd_lt.learning_rate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kd_lt, "learning_rate", lambda e, *args: usual(e, *args) * 1e30 ** (e > 0))
        status, err = refused(flags(tiny, runs, "--method ce"), "epoch 2", "--lr")
    assert status == 1
    return next(runs.iterdir()), err


def test_last_whole_epoch_outlives_a_bad_loss_and_a_full_disk(failed, tiny, tmp_path):
    runs, out = shutil.copytree(failed[0].parent, tmp_path / "runs"), tmp_path / "out"
    (last,) = runs.glob("*/last.pt")
    before = last.read_bytes()
    assert str(failed[0]) in failed[1] and torch.load(last, weights_only=True)["epoch"] == 1
    process = start(flags(tiny, runs, "--method ce"), out, len(before) // 2)
    process.join()
    assert process.exitcode == 1 and "Traceback" not in out.read_text(), out.read_text()
    assert str(runs) in out.read_text().splitlines()[-1]
    assert last.read_bytes() == before and not [*runs.glob("*/*.partial")]
    for folder in (runs, tmp_path / "whole"):
        finish(flags(tiny, folder, "--method ce"))
    assert outcome(runs) == outcome(tmp_path / "whole")


def test_one_writer(tiny, tmp_path):
    runs, outs = tmp_path / "runs", [tmp_path / "kd", tmp_path / "bkd"]
    argv = [flags(tiny, runs, f"--method {out.name}") for out in outs]
    finish([*argv[0], "--runs-dir", tmp_path / "whole"])
    want = outcome(tmp_path / "whole")
    teacher, student = sorted(want, key=lambda name: "-from-" in name)
    with kd_lt.lock(runs / teacher, wait=False):
        both = [start(*pair) for pair in zip(argv, outs, strict=True)]
        busy = f"{runs / teacher} is being written by another process, waiting"
        wait_until(lambda: all(busy in out.read_text() for out in outs))
        assert refused(argv[0], f"{runs / student} is being written")[0] == 75
    for process in both:
        process.join()
    shown = [out.read_text() for out in outs]
    assert [process.exitcode for process in both] == [0, 0], shown
    assert sorted(text.count("TRAINING") for text in shown) == [1, 2]
    found = outcome(runs)
    assert len(found) == 3 and {name: found[name] for name in want} == want


def test_a_file_system_that_cannot_lock_is_told(tiny, tmp_path, monkeypatch):
    def failing(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", failing)
    status, err = refused(flags(tiny, tmp_path, "--method ce"), "cannot lock (Function not")
    assert status == 2 and "--runs-dir" in err


def test_a_run_works_where_files_cannot_be_locked(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(kd_lt, "fcntl", None)  # as on Windows
    finish(flags(tiny, tmp_path, "--method ce --epochs 1"))


# ---- resume, and what it does about damage

LOGS = {  # the content of a log, and the epochs that are read of it
    "empty": (b"", []),
    "half a line": (b"{", []),
    "command alone": (b'{"command": ""}\n', []),
    "no command": (b'{"epoch": 1}\n{"epoch": 2}\n', [1, 2]),
    "a number and a blank line": (b'{"epoch": 1}\n5\n\n{"epoch": 2}\n', [1, 2]),
    "twice": (b'{"command": ""}\n{"epoch": 2}\n{"epoch": 2}\n', [2]),
    "no text": (b'{"command": ""}\n{"epoch": 1}\n\xff\n{"epoch": 2}\n', [1, 2]),
    "half a row": (b'{"command": ""}\n{"epoch": 1}\n{"epoch": 2}\n{"epo', [1, 2]),
}


@pytest.mark.parametrize("content, epochs", LOGS.values(), ids=LOGS)
def test_a_log_is_read_without_its_damaged_lines(tmp_path, content, epochs):
    assert kd_lt.read_log(tmp_path) == ("", [])
    (tmp_path / "log.jsonl").write_bytes(content)
    assert [row["epoch"] for row in kd_lt.read_log(tmp_path)[1]] == epochs


def test_a_lost_log_ends_no_resume(failed, tiny, tmp_path):
    runs = shutil.copytree(failed[0].parent, tmp_path / "runs")  # stopped after epoch 1 of 2
    (runs / failed[0].name / "log.jsonl").unlink()
    folders = [finish(flags(tiny, root, "--method ce"))[0] for root in (runs, tmp_path / "whole")]
    weights = [as_bytes(dict(kd_lt.load_run(folder).state_dict())) for folder in folders]
    assert weights[0] == weights[1]
    for _ in range(2):  # the second time resume reads a log that lacks the first epoch
        (folders[0] / "result.json").unlink(missing_ok=True)
        finish(flags(tiny, runs, "--method ce"))
        assert [row["epoch"] for row in kd_lt.read_log(folders[0])[1]] == [2]


def test_weights_are_read_onto_the_cpu_and_a_refusal_is_no_damage(finished, monkeypatch):
    """Those of a GPU would else be unreadable without it, and the advice is to train anew."""
    asked, load = [], torch.load

    def watched(*args, map_location=None, **hyper):
        asked.append(map_location)
        return load(*args, map_location=map_location, **hyper)

    def denied(*args, **hyper):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", watched)
    kd_lt.load_run(finished[0])
    assert asked == ["cpu"]
    monkeypatch.setattr(torch, "load", denied)
    with pytest.raises(InputError, match=r"last.pt: cannot be read \(Permission denied\)$"):
        kd_lt.load_run(finished[0])


@pytest.mark.parametrize("changed", ["conv1.weight", "bn1.running_mean"])
def test_a_teacher_that_changed_is_an_error(finished, tiny, tmp_path, changed):
    runs = shutil.copytree(finished[0].parent, tmp_path / "runs")
    teacher, student = (runs / folder.name for folder in finished)
    (student / "result.json").unlink()
    content = torch.load(teacher / "last.pt", weights_only=True)
    content["student"][changed][0] += 1
    torch.save(content, teacher / "last.pt")
    status, _ = refused(flags(tiny, runs, "--method kd"), student, "another teacher")
    assert status == 2


def test_a_finished_teacher_with_weights_of_an_earlier_epoch_teaches_nobody(
    finished, tiny, tmp_path
):
    """As in a folder that was copied before the teacher was finished, and completed after."""
    teacher = shutil.copytree(finished[0], tmp_path / "runs" / finished[0].name)
    content = torch.load(teacher / "last.pt", weights_only=True)
    torch.save(content | {"epoch": 1}, teacher / "last.pt")
    words = "result.json is of epoch 2, but last.pt of epoch 1"
    assert refused(flags(tiny, teacher.parent, "--method kd"), teacher, words)[0] == 2
    (teacher / "result.json").unlink()
    _, out = finish(flags(tiny, teacher.parent, "--method kd"))
    assert "resumed   after epoch 1 of 2" in out


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_checkpoint_of_another_run_is_refused(finished, tiny, tmp_path, role):
    runs = shutil.copytree(finished[0].parent, tmp_path / "runs")
    (runs / finished[1].name / "result.json").unlink()
    folder = runs / finished[role == "student"].name
    content = torch.load(folder / "last.pt", weights_only=True)
    content["settings"]["lr"] = 0.05
    torch.save(content, folder / "last.pt")
    before = files(runs)
    assert refused(flags(tiny, runs, "--method kd"), folder / "last.pt", "another run")[0] == 2
    assert files(runs) == before


def test_a_log_that_cannot_be_read_is_kept(failed, tiny, tmp_path, monkeypatch):
    """It may be whole: that it is another user's does not make it a damaged one."""
    runs = shutil.copytree(failed[0].parent, tmp_path / "runs")
    before, read_text = files(runs), Path.read_text

    def denied(path, **kwargs):
        if path.name == "log.jsonl":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, **kwargs)

    monkeypatch.setattr(Path, "read_text", denied)
    words = f"{runs / failed[0].name / 'log.jsonl'}: Permission denied"
    assert refused(flags(tiny, runs, "--method ce"), words)[0] == 1
    assert files(runs) == before


def test_a_log_without_its_checkpoint_is_not_overwritten(finished, tiny, tmp_path):
    student = shutil.copytree(finished[1], tmp_path / "runs" / finished[1].name)
    shutil.copytree(finished[0], tmp_path / "runs" / finished[0].name)
    (student / "result.json").unlink()
    (student / "last.pt").unlink()
    before = files(student)
    argv = flags(tiny, student.parent, "--method kd")
    assert refused(argv, student / "last.pt", "is gone")[0] == 2
    assert files(student).items() >= before.items()


@pytest.mark.parametrize(
    "role, name, content",
    [
        ("student", "last.pt", b"bad"),
        ("student", "last.pt", "cut"),
        ("teacher", "last.pt", "cut"),
        ("student", "result.json", "cut"),
    ],
)
def test_damaged_folder(finished, tiny, tmp_path, role, name, content):
    teacher, student = finished
    runs = shutil.copytree(teacher.parent, tmp_path / "runs")
    file = runs / {"teacher": teacher, "student": student}[role].name / name
    file.write_bytes(file.read_bytes()[:1000] if content == "cut" else content)
    if name == "last.pt":  # else the result alone is read
        (runs / student.name / "result.json").unlink()
    before, argv = files(runs), flags(tiny, runs, "--method kd")
    refused(argv, file, "move its whole folder away")
    assert files(runs) == before
    file.parent.rename(tmp_path / "away")
    assert outcome(finish(argv)[0].parent) == outcome(finished[0].parent)


def test_a_resumed_run_keeps_its_earlier_devices(failed, tiny, tmp_path):
    runs = shutil.copytree(failed[0].parent, tmp_path / "runs")
    file = runs / failed[0].name / "last.pt"
    content = torch.load(file, weights_only=True)
    torch.save(content | {"devices": ["another"], "versions": ["2.9"]}, file)
    (file.parent / "config.json").write_text("{")  # resuming does not need it
    begun_by = kd_lt.read_log(file.parent)[0]
    finish(flags(tiny, runs, "--method ce --eval-every 1"))
    assert kd_lt.read_log(file.parent)[0] == begun_by  # not this command
    result = json.loads((file.parent / "result.json").read_text())
    assert result["devices"] == ["another", kd_lt.machine(torch.device("cpu"))]
    assert result["version"] == f"2.9, then {kd_lt.VERSION}"


def test_partial_files_of_a_killed_process_go(failed, tiny, tmp_path):
    runs = shutil.copytree(failed[0].parent, tmp_path / "runs")
    stale = runs / failed[0].name / "last.pt.1234.partial"
    stale.write_bytes(b"half")
    finish(flags(tiny, runs, "--method ce"))
    assert not stale.exists()


# ---- given teachers


def test_what_else_may_teach(finished):
    """A teacher of the student's seed and another network, and one on the same images renamed."""
    config = kd_lt.read(finished[1] / "result.json", ())["config"]
    for changes in ({"seed": 1000, "network": "resnet14"}, {"dataset": "renamed.npz"}):
        assert kd_lt.given_teacher(finished[0], replace(config, **changes))["network"] == "resnet8"


def test_foreign_teacher(finished, failed, tiny, tmp_path):
    runs, new = tmp_path / "runs", tmp_path / "new"
    images = make_npz(tmp_path / "tiny.npz", [3, 5, 1])
    for teacher, text, reason in [
        (finish(flags(tiny, runs, "--method ce --imb 5"))[0], "", "imb 5 .*, not tiny.npz, not"),
        (finish(flags(images, runs, "--method ce"))[0], "", "trained on other images"),
        (finished[0], "--method cbd", "its classifier is linear, not cosine"),
        (failed[0], "", "after epoch 1 of 2"),
        (finished[0] / "result.json", "", "weights are in last.pt"),
        (finished[0], "--seed 1000", "--seed"),  # the teacher's
    ]:
        argv = flags(tiny, new, f"--method kd --seed 3 {text}", "--teacher-checkpoint", teacher)
        assert re.search(reason, refused(argv, teacher)[1])
        assert not new.exists()


def test_a_given_teacher_that_is_no_run(finished, tiny, tmp_path):
    whole, file = (finished[0] / "last.pt").read_bytes(), tmp_path / "t.pt"
    content = torch.load(finished[0] / "last.pt", weights_only=True)
    for wrong in (
        b"garbage",
        whole[:-1],
        pickle.dumps(Bomb(), 2),
        content | {"more": Bomb()},
        content["student"],  # as another program saves it
        nn.Linear(1, 1),
    ):
        if isinstance(wrong, bytes):
            file.write_bytes(wrong)
        else:
            torch.save(wrong, file)
        argv = flags(tiny, tmp_path / "runs", "--method kd", "--teacher-checkpoint", file)
        status, err = refused(argv, file, "of another program")
        assert status == 2 and err.count("\n") == 1 and "Weights only" not in err
        assert [*tmp_path.iterdir()] == [file]  # no runs


def test_a_given_teacher_is_known_by_its_bytes(finished, tmp_path):
    config = replace(kd_lt.read(finished[1] / "result.json", ())["config"], seed=3)
    copied = shutil.copytree(finished[0], tmp_path / "copy")
    first, second = (
        kd_lt.given_teacher(path, config)["checkpoint"] for path in (finished[0], copied)
    )
    content = torch.load(copied / "last.pt", weights_only=True)
    content["student"]["conv1.weight"][0] += 1
    torch.save(content, copied / "last.pt")
    assert first == second != kd_lt.given_teacher(copied, config)["checkpoint"]


# ---- the script and its output


def test_a_closed_output_ends_quietly(finished):
    program = [sys.executable, HERE / "kd_lt.py", "--table", finished[0].parent]
    reader, writer = os.pipe()
    os.close(reader)  # what `| head` does once it has its lines
    ended = subprocess.run(program, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_an_output_that_is_full_is_not_blamed_on_the_runs_alone(finished):
    """Unbuffered: else Python complains once more, when it flushes at its end."""
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-u", HERE / "kd_lt.py", "--table", finished[0].parent],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert ended.returncode == 1 and "or where the output goes: No space left" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_the_recorded_command_is_what_a_shell_takes_back(tiny, tmp_path):
    argv = flags(tiny, tmp_path / "my runs", "--method ce --epochs 1")
    folder, _ = finish(argv)
    command = json.loads((folder / "config.json").read_text())["command"]
    assert shlex.split(command) == ["kd_lt.py", *argv] and "'" in command
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[0])["command"] == command


# ---- wrong input

BAD = [  # a wrong command line, and what the message must name
    # out of range, or unknown
    ("--imb 0.5", "--imb"),
    ("--imb 201", "--imb"),
    ("--epochs 0", "--epochs"),
    ("--epochs 1.5", "--epochs"),
    ("--batch-size 0", "--batch-size"),
    ("--lr 0", "--lr"),
    ("--lr nan", "--lr"),
    ("--lr inf", "--lr"),
    ("--weight-decay -1", "--weight-decay"),
    ("--temperature 0", "--temperature"),
    ("--alpha -1", "--alpha"),
    ("--alpha x", "--alpha"),
    ("--beta -1", "--beta"),
    ("--bkd-start -0.1", "--bkd-start"),
    ("--bkd-start 1.1", "--bkd-start"),
    ("--seed -1", "--seed"),
    ("--seed 1.5", "--seed"),
    ("--seed 99999999999", "--seed"),
    ("--subset-seed 4294967296", "--subset-seed"),
    ("--eval-every 0", "--eval-every"),
    ("--method no-such-method", "--method"),
    ("--imb-type linear", "--imb-type"),
    ("--student resnet18", "--student"),
    ("--teacher vgg8", "--teacher"),
    ("--teacher-method kd", "--teacher-method"),
    ("--device tpu", "--device"),
    ("--precision fp64", "--precision"),
    ("--epoch 1", "--epoch"),
    # ignored by the method, or out of its own range
    ("--method ce --alpha 1", "--alpha"),
    ("--method ce --bkd-start 0", "--bkd-start"),
    ("--method ce --teacher resnet8", "--teacher"),
    ("--method ce --teacher-method ce", "--teacher-method"),
    ("--method ce --num-teachers 1", "--num-teachers"),
    ("--method ce --teacher-checkpoint x", "--teacher-checkpoint"),
    ("--method ce --imb-type step --imb 1", "--imb-type"),
    ("--method ce --subset-seed 1 --imb 1", "--subset-seed"),
    ("--method ce --dataset mine.npz --imb-type step", "--imb-type"),
    ("--method ce --dataset mine.npz --subset-seed 1", "--subset-seed"),
    ("--method kd --beta 0.9", "--beta"),
    ("--method kd --num-teachers 2", "--num-teachers"),
    ("--method kd --teacher-checkpoint a b", "--teacher-checkpoint: --method kd has one teacher"),
    ("--method kd --teacher-checkpoint", "--teacher-checkpoint"),
    ("--method kd --teacher-checkpoint x --teacher resnet8", "--teacher has no effect beside"),
    ("--method kd --teacher-checkpoint x --teacher-method ce", "--teacher-method has no effect"),
    ("--method cbd --teacher-checkpoint x --num-teachers 2", "--num-teachers has no effect beside"),
    ("--method bkd --gamma 1", "--gamma"),
    ("--method bkd --beta 1", "--beta"),
    ("--method dive --bkd-start 0.5", "--bkd-start"),
    ("--method dive --alpha 1.5", "--alpha"),
    ("--method dive --power -1", "--power"),
    ("--method cbd --temperature 2", "--temperature"),
    ("--method cbd --num-teachers 0", "--num-teachers"),
    ("--method cbd --alpha 1.5", "--alpha"),
    ("--method krdistill --beta 1", "--beta"),
    ("--method krdistill --gamma -1", "--gamma"),
    # files, reports, and words that are no flags
    ("--dataset mnist", "mnist"),
    ("--dataset absent.npz", "absent.npz"),
    ("--table absent", "absent"),
    ("--plot x.txt", "x.txt"),
    ("--table --seed 1", "--seed"),
    ("--table --method=bkd", "--method"),  # the default, but it looks like a filter
    ("--method kd --teacher-checkpoint absent", "absent: no such file"),
    ("--plot x.png --seed 1", "--seed"),
    ("unexpected", "unexpected"),
]


@pytest.mark.parametrize("text, named", BAD, ids=[text for text, _ in BAD])
def test_bad_flag(tmp_path, monkeypatch, text, named):
    monkeypatch.chdir(tmp_path)
    refused(["--smoke", "--runs-dir", "runs", *text.split()], named)
    assert not [*tmp_path.iterdir()]


# ---- devices


def test_a_gpu_that_is_asked_for_and_not_there(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = flags(tiny, tmp_path / "runs", "--method ce --device cuda")
    assert refused(argv, "--device cuda: torch", "sees no GPU")[0] == 2
    finish([*argv, "--device", "auto"])


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("avx512", [True, False])
def test_a_cpu_computes_in_bf16_where_it_has_it(monkeypatch, avx512, amx):
    functions = {"_is_avx512_bf16_supported": lambda: avx512, "_is_amx_tile_supported": lambda: amx}
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(**functions))
    auto = "bf16" if avx512 or amx else "fp32"
    for asked, found in (("auto", auto), ("fp32", "fp32"), ("bf16", "bf16")):
        args = kd_lt.parse_flags(["--device", "cpu", "--precision", asked])
        assert kd_lt.choose_device(args) == (torch.device("cpu"), found)


def test_without_torchs_private_functions_a_cpu_has_no_bf16(monkeypatch):
    monkeypatch.setattr(torch, "cpu", SimpleNamespace())
    assert not kd_lt.cpu_has_bf16()


def test_bf16_needs_a_card_that_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for card, asked, found in (
        ((7, 5), "auto", "fp32"),
        ((8, 0), "auto", "bf16"),
        ((7, 5), "fp32", "fp32"),
        ((9, 0), "bf16", "bf16"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args, card=card: card)
        torch.backends.cuda.matmul.allow_tf32 = True  # as some containers have it
        torch.backends.cudnn.allow_tf32 = True  # as torch has it
        args = kd_lt.parse_flags(["--precision", asked])
        assert kd_lt.choose_device(args) == (torch.device("cuda"), found)
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.benchmark
    args = kd_lt.parse_flags(["--device", "cpu", "--precision", "fp32"])
    assert kd_lt.choose_device(args) == (torch.device("cpu"), "fp32")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "T4")
    refused(["--smoke", "--precision", "bf16"], "--precision bf16")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_is_told(tiny, tmp_path, monkeypatch, error):
    def failing(*args):
        raise error

    monkeypatch.setattr(kd_lt, "train", failing)
    message = "out of memory", "--batch-size 4", "smaller images"
    assert refused(flags(tiny, tmp_path, "--method ce"), *message)[0] == 1


# ---- on request, with -s -k speed: how long a step takes


def seconds_a_step(epoch, steps, device):
    """The median over five calls of epoch(), after one that is not counted."""
    times = []
    for _ in range(6):
        began = time.perf_counter()
        epoch()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / steps)
    return statistics.median(times[1:])


def test_speed(request):
    if "speed" not in request.config.getoption("-k"):
        pytest.skip("on request: -s -k speed")
    torch.set_num_threads(THREADS)
    device, precision = kd_lt.choose_device(kd_lt.parse_flags([]))
    on_gpu = device.type == "cuda"
    steps = 100 if on_gpu else 5  # in a measurement
    n = 8192 if on_gpu else 2048  # rows and columns of the large matrices
    dataset = made_up(128 * steps // 10, 1)
    words = ["--student", "resnet32", "--teacher", "resnet32", "--batch-size", "128"]
    trainer = make_trainer(dataset, "bkd", *words, device=device, precision=precision)
    trainer.start_epoch(0)
    step = trainer.capture() if on_gpu else trainer.step
    with FlopCounterMode(display=False) as flops:
        trainer.step(128)

    def our_epoch():
        trainer.start_epoch(0)
        for size in trainer.batches.sizes:
            step(size)

    ours = seconds_a_step(our_epoch, steps, device)
    memory = f"{torch.cuda.max_memory_reserved() / 2**20:.0f} MiB reserved" if on_gpu else "-"
    torch.backends.cudnn.allow_tf32 = True  # as torch has it
    plain = Plain(trainer, dataset)
    optimizer = torch.optim.SGD(plain.parameters, 0.1, momentum=0.9, weight_decay=2e-4)
    loader = DataLoader(
        PlainImages(dataset, trainer.batches),
        128,
        shuffle=True,
        num_workers=4 if on_gpu else 0,
        persistent_workers=on_gpu,
    )

    def plain_epoch():
        for images, y in loader:
            loss = plain.loss(images.to(device), y.to(device), plain.counts)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    theirs = seconds_a_step(plain_epoch, steps, device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    peak = 2e-12 * n**3 / seconds_a_step(lambda: [a @ b for _ in range(5)], 5, device)
    speed = 1e-12 * flops.get_total_flops() / ours
    print(
        f"\nbkd, resnet32 from resnet32, batch 128; {device}, {precision}, "
        f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    )
    for name, seconds in (("this program", ours), ("plain path", theirs)):
        print(f"{name:<13}{1000 * seconds:9.2f} ms/step {128 / seconds:8.0f} images/s")
    print(f"ratio        {theirs / ours:9.2f} medians of 5 x {steps} steps; GPU memory {memory}")
    print(f"arithmetic   {speed:9.3f} TFLOP/s, {speed / peak:.0%} of a large matrix product's")
