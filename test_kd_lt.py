# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the kd-lt authors
"""Tests: losses against plain-loop oracles, networks, batches, data, the program, its failures.

CPU only, no network. Real CIFAR is used where it lies in ./data or in the folder KD_LT_DATA names.
"""
import contextlib
import errno
import hashlib
import http.server
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
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import kd_lt
import models
from data import MEAN, STD, Batches, distort_colour, normalise
from kd_lt import (balanced_prototypes, balanced_softmax_loss, bkd_loss, cbd_loss,
                   effective_number_weights, grouped_kl, kd_loss, krdistill_loss, learning_rate,
                   ltkd_loss, rectify_features, rectify_logits)
from models import NETWORKS, build_model

HERE = Path(kd_lt.__file__).parent
# ---- one case for every loss: student tensors z_s, f_s; teacher tensors z_t, f_t, r; y; n

LOSSES = {
    "bsce": lambda x, **h: balanced_softmax_loss(x.z_s, x.y, x.n),
    "kd": lambda x, **h: kd_loss(x.z_s, x.z_t, x.y, **h),
    "bkd": lambda x, **h: bkd_loss(x.z_s, x.z_t, x.y, x.n, **h),
    "cbd": lambda x, **h: cbd_loss(x.z_s, x.f_s, x.f_t, x.y, **h),
    "krdistill": lambda x, **h: krdistill_loss(x.z_s, x.f_s, x.z_t, x.r, x.y, x.n, **h),
    "ltkd": lambda x, **h: ltkd_loss(x.z_s, x.z_t, x.y, x.n, **h),
}
DISTILLING = [name for name in LOSSES if name != "bsce"]
SOFT = ["kd", "bkd", "krdistill", "ltkd"]  # those with a temperature
STUDENT = {"cbd": ("z_s", "f_s"), "krdistill": ("z_s", "f_s")}
WIDTHS = (4, 2)  # of cbd's two teachers


def random_counts(num_classes, g, distinct=True):
    """Log-uniform in 1..1e6."""
    counts = (10 ** (6 * torch.rand(num_classes, generator=g))).long().clamp(min=1).tolist()
    if distinct and len(set(counts)) < num_classes:
        return random_counts(num_classes, g)
    return counts


def make_case(g, batch=4, num_classes=5, scale=2.0, counts=None, dtype=torch.float64):
    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    return SimpleNamespace(
        z_s=scale * randn(batch, num_classes), z_t=scale * randn(batch, num_classes),
        f_s=randn(batch, sum(WIDTHS)), f_t=[3 * randn(batch, width) for width in WIDTHS],
        r=F.normalize(randn(batch, sum(WIDTHS)), dim=1),
        y=torch.randint(num_classes, (batch,), generator=g),
        n=counts or random_counts(num_classes, g))


def changed(x, **new):
    return SimpleNamespace(**{**vars(x), **new})


def generator(seed):
    return torch.Generator().manual_seed(seed)


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def value_and_gradients(name, x, **h):
    """The loss, and its gradients in the student's tensors."""
    x = changed(x, **{k: getattr(x, k).detach().requires_grad_() for k in ("z_s", "f_s")})
    loss = LOSSES[name](x, **h)
    tensors = [getattr(x, k) for k in STUDENT.get(name, ("z_s",))]
    return loss.detach(), torch.autograd.grad(loss, tensors)


# ---- oracles: loops over samples and classes, Python floats

def log_softmax(z, temperature=1.0):
    z = [v / temperature for v in z]
    log_sum = max(z) + math.log(sum(math.exp(v - max(z)) for v in z))
    return [v - log_sum for v in z]


def kl(q, log_p):
    return sum(q_c * (math.log(q_c) - l) for q_c, l in zip(q, log_p) if q_c > 0)


def mean(values):
    return sum(values) / len(values)


def unit(v):
    length = math.sqrt(sum(a * a for a in v))
    return [a / length for a in v]


def cosine(a, b):
    return sum(p * q for p, q in zip(unit(a), unit(b)))


def ce(x):
    return mean([-log_softmax(z)[y] for z, y in zip(x.z_s, x.y)])


def tilted_ce(x):
    total = sum(x.n)
    tilted = [[v + math.log(n / total) for v, n in zip(z, x.n)] for z in x.z_s]
    return ce(changed(x, z_s=tilted))


def weights_oracle(counts, beta):
    v = [(1 - beta) / (1 - beta**n) for n in counts]
    return [len(v) * v_c / sum(v) for v_c in v]


def soft_target(z, temperature, weights):
    p = [w * math.exp(l) for w, l in zip(weights, log_softmax(z, temperature))]
    return [p_c / sum(p) for p_c in p]


def bkd_oracle(x, temperature=2.0, alpha=1.0, beta=0.9999):
    w = weights_oracle(x.n, beta)
    terms = [kl(soft_target(t, temperature, w), log_softmax(s, temperature))
             for t, s in zip(x.z_t, x.z_s)]
    return ce(x) + alpha * temperature**2 * mean(terms)


def kd_oracle(x, temperature=2.0, alpha=1.0):
    return bkd_oracle(changed(x, n=[1] * len(x.n)), temperature, alpha)


def cbd_oracle(x, alpha=0.4, beta=100.0):
    distances = []
    for b, s in enumerate(x.f_s):
        t = [v for teacher in x.f_t for v in unit(teacher[b])]
        distances.append(1 - cosine(s, t))
    return (1 - alpha) * ce(x) + alpha * beta * mean(distances)


def rectified_oracle(z, y, counts):
    z = [v - math.log(n / sum(counts)) for v, n in zip(z, counts)]
    top = z.index(max(z))
    z[y], z[top] = z[top], z[y]
    return z


def krdistill_oracle(x, temperature=2.0, alpha=1.0, gamma=2.0):
    lrd, rrd = [], []
    for s, t, y, f, r in zip(x.z_s, x.z_t, x.y, x.f_s, x.r):
        q = [math.exp(l) for l in log_softmax(rectified_oracle(t, y, x.n), temperature)]
        lrd.append(temperature**2 * kl(q, log_softmax(s, temperature)))
        rrd.append(1 - cosine(f, r))
    return tilted_ce(x) + alpha * mean(lrd) + gamma * mean(rrd)


def groups_oracle(counts):
    third, order = round(0.33 * len(counts)), sorted(range(len(counts)), key=lambda c: -counts[c])
    return order[:third], order[third:len(order) - third], order[len(order) - third:]


def grouped_oracle(x, temperature, balance=True):
    groups, cross, within = groups_oracle(x.n), [], []
    p = [[math.exp(l) for l in log_softmax(z, temperature)] for z in x.z_t]
    q = [[math.exp(l) for l in log_softmax(z, temperature)] for z in x.z_s]
    summed = [sum(sum(row[c] for c in group) for row in p) for group in groups]
    for p_b, q_b in zip(p, q):
        p_mass = [sum(p_b[c] for c in group) for group in groups]
        q_mass = [sum(q_b[c] for c in group) for group in groups]
        inner = [kl([p_b[c] / p_m for c in group], [math.log(q_b[c] / q_m) for c in group])
                 for group, p_m, q_m in zip(groups, p_mass, q_mass)]
        weight = p_mass
        if balance:
            # len(p) / 3 over each sum: with these factors the batch's summed masses are uniform
            p_mass = [m * len(p) / 3 / total for m, total in zip(p_mass, summed)]
            p_mass, weight = [m / sum(p_mass) for m in p_mass], [1, 1, 1]
        cross.append(kl(p_mass, [math.log(m) for m in q_mass]))
        within.append(sum(w * v for w, v in zip(weight, inner)))
    return mean(cross), mean(within)


def ltkd_oracle(x, temperature=2.0, alpha=1.0, beta=1.0):
    cross, within = grouped_oracle(x, temperature)
    return ce(x) + temperature**2 * (alpha * cross + beta * within)


ORACLES = {"bsce": lambda x: tilted_ce(x), "kd": kd_oracle, "bkd": bkd_oracle, "cbd": cbd_oracle,
           "krdistill": krdistill_oracle, "ltkd": ltkd_oracle}


def as_lists(x):
    def plain(v):
        if isinstance(v, list):
            return [plain(e) for e in v]
        return v.tolist() if isinstance(v, torch.Tensor) else v
    return SimpleNamespace(**{key: plain(v) for key, v in vars(x).items()})


def check_against_oracle(name, x, **h):
    """Compare the value, and the gradients with central differences of the oracle."""
    value, gradients = value_and_gradients(name, x, **h)
    lists, step = as_lists(x), 1e-5
    assert value.item() == pytest.approx(ORACLES[name](lists, **h), rel=1e-10, abs=1e-11)
    for key, gradient in zip(STUDENT.get(name, ("z_s",)), gradients):
        rows = getattr(lists, key)
        for b, c in np.ndindex(*gradient.shape):
            here, around = rows[b][c], []
            for rows[b][c] in (here + step, here - step):
                around.append(ORACLES[name](lists, **h))
            rows[b][c] = here
            difference = (around[0] - around[1]) / (2 * step)
            assert gradient[b, c].item() == pytest.approx(difference, rel=1e-6, abs=1e-7)


HYPERPARAMETERS = [
    ("bsce", {}), ("kd", {}), ("kd", dict(temperature=0.7, alpha=0.3)),
    ("kd", dict(temperature=4.0, alpha=9.0)), ("bkd", {}), ("bkd", dict(temperature=1.0, beta=0.9)),
    ("bkd", dict(temperature=5.0, alpha=0.5, beta=0.999)), ("cbd", {}),
    ("cbd", dict(alpha=0.8, beta=3.0)), ("cbd", dict(alpha=0.0)), ("krdistill", {}),
    ("krdistill", dict(temperature=3.0, alpha=0.2, gamma=7.0)), ("ltkd", {}),
    ("ltkd", dict(temperature=4.0, alpha=0.5, beta=3.0)),
]


@pytest.mark.parametrize("name, h", HYPERPARAMETERS)
@pytest.mark.parametrize("seed, batch, num_classes, form", [
    (0, 4, 5, list), (1, 1, 3, torch.tensor), (2, 3, 7, lambda n: torch.tensor(n).double())])
def test_loss_is_the_oracle(name, h, seed, batch, num_classes, form):
    x = make_case(generator(seed), batch, num_classes)
    check_against_oracle(name, changed(x, n=form(x.n)), **h)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    x = make_case(generator(3), 3, 6)
    keys = STUDENT.get(name, ("z_s",))
    inputs = [getattr(x, key).requires_grad_() for key in keys]
    assert torch.autograd.gradcheck(
        lambda *tensors: LOSSES[name](changed(x, **dict(zip(keys, tensors)))), inputs)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.99, 0.9999])
@pytest.mark.parametrize("counts", [[5000, 2997, 50], [1] * 4, [7, 1, 1000000, 30], [12]])
def test_effective_number_weights(counts, beta):
    weights = effective_number_weights(counts, beta)
    assert weights.dtype == torch.float64 and weights.mean().item() == pytest.approx(1, abs=1e-13)
    assert weights.tolist() == pytest.approx(weights_oracle(counts, beta), rel=1e-10)
    assert torch.equal(effective_number_weights(torch.tensor(counts), beta), weights)


@pytest.mark.parametrize("name", DISTILLING)
def test_no_gradient_reaches_the_teacher(name):
    x = make_case(generator(4))
    for tensor in (x.z_s, x.f_s, x.z_t, x.r, *x.f_t):
        tensor.requires_grad_()
    LOSSES[name](x).backward()
    assert all(tensor.grad is None for tensor in (x.z_t, x.r, *x.f_t))
    assert all(getattr(x, key).grad.abs().sum() > 0 for key in STUDENT.get(name, ("z_s",)))


# ---- identities

def test_kd_of_a_student_like_its_teacher_is_ce():
    x = make_case(generator(5))
    z = x.z_t.clone().requires_grad_()
    kd_loss(z, x.z_t, x.y, temperature=3.0, alpha=5.0).backward()
    assert kd_loss(x.z_t, x.z_t, x.y).item() == pytest.approx(F.cross_entropy(z, x.y).item())
    expected = (x.z_t.softmax(1) - F.one_hot(x.y, 5)) / 4
    assert torch.allclose(z.grad, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("temperature, alpha, factor", [(2.0, 1.0, 1.0), (4.0, 0.3, 250.0)])
def test_bkd_closed_forms(temperature, alpha, factor):
    x = make_case(generator(6), counts=[500, 120, 30, 8, 1])
    w = factor * doubles(weights_oracle(x.n, 0.9999))  # no factor of w changes anything
    q = (x.z_t / temperature + w.log()).softmax(1)
    student = (x.z_s / temperature).softmax(1)
    loss, (gradient,) = value_and_gradients("bkd", x, temperature=temperature, alpha=alpha)
    term = temperature**2 * (q * (q / student).log()).sum(1).mean()
    assert loss.item() == pytest.approx((F.cross_entropy(x.z_s, x.y) + alpha * term).item())
    expected = x.z_s.softmax(1) - F.one_hot(x.y, 5) + alpha * temperature * (student - q)
    assert torch.allclose(gradient, expected / 4, rtol=0, atol=1e-12)


def test_bkd_is_kd_where_the_weights_are_equal_and_only_there():
    x = make_case(generator(7), 16, 4)
    kd = kd_loss(x.z_s, x.z_t, x.y).item()
    for n, beta in (([77] * 4, 0.9999), ([1] * 4, 0.9), ([500, 40, 9, 1], 0.0)):
        assert bkd_loss(x.z_s, x.z_t, x.y, n, beta=beta).item() == pytest.approx(kd, rel=1e-12)
    # weights taken by the sample's label would cancel and leave kd here too
    assert abs(bkd_loss(x.z_s, x.z_t, x.y, [500, 40, 9, 1]).item() - kd) > 0.1


def test_bkd_moves_the_target_to_the_tail():
    z = torch.zeros(3, 4, dtype=torch.float64)
    z_s = z.clone().requires_grad_()
    bkd_loss(z_s, z, torch.tensor([0, 1, 2]), [5000, 500, 50, 5]).backward()
    kd_part = z_s.grad - (z.softmax(1) - F.one_hot(torch.tensor([0, 1, 2]), 4)) / 3
    assert (kd_part.diff(dim=1) < 0).all()  # descent raises a class the more, the rarer it is


def test_cbd_sees_directions_only():
    x = make_case(generator(8))
    t = torch.cat([F.normalize(f, dim=1) for f in x.f_t], 1)
    assert cbd_loss(x.z_s, 7 * t, x.f_t, x.y, alpha=1).item() == pytest.approx(0, abs=1e-12)
    assert cbd_loss(x.z_s, -t, x.f_t, x.y, alpha=1, beta=3).item() == pytest.approx(6)
    factor = doubles([[0.01], [1.0], [30.0], [1e4]])
    f_t = [x.f_t[0] * factor, x.f_t[1] / factor]
    scaled = cbd_loss(x.z_s, x.f_s * factor.flip(0), f_t, x.y)
    assert scaled.item() == pytest.approx(LOSSES["cbd"](x).item(), rel=1e-12)


@pytest.mark.parametrize("teachers", [1, 2, 4])
def test_cbd_of_equal_teachers_is_that_of_one(teachers):
    x = make_case(generator(9))
    one = cbd_loss(x.z_s, x.f_s, [x.r], x.y)
    many = cbd_loss(x.z_s, x.f_s.repeat(1, teachers), [x.r] * teachers, x.y)
    assert many.item() == pytest.approx(one.item(), rel=1e-12)


def test_cbd_survives_dead_features():  # after the ReLU a row may be all zero
    x = make_case(generator(10))
    loss, gradients = value_and_gradients("cbd", changed(x, f_s=torch.zeros_like(x.f_s)))
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


def test_krdistill_without_its_parts_is_balanced_softmax():
    x = make_case(generator(11))
    base = balanced_softmax_loss(x.z_s, x.y, x.n).item()
    assert LOSSES["krdistill"](x, alpha=0, gamma=0).item() == pytest.approx(base, rel=1e-14)
    log_n = doubles(x.n).log()  # the same with log n as with log pi
    assert base == pytest.approx(F.cross_entropy(x.z_s + log_n, x.y).item())
    equal = balanced_softmax_loss(x.z_s, x.y, [9] * 5)
    assert equal.item() == pytest.approx(F.cross_entropy(x.z_s, x.y).item())


def frame_oracle(means):
    """The nearest frame with equal singular values, by Newton-Schulz: X (3 - X^T X) / 2."""
    x = means - means.mean(0)
    x = x / x.norm()
    for _ in range(30):
        x = 1.5 * x - 0.5 * x @ x.T @ x
        x = x - x.mean(0)  # rounding would grow along the direction without spread
    return doubles([unit(row) for row in x.tolist()])


@pytest.mark.parametrize("num_classes, width", [(3, 2), (4, 3), (5, 5), (6, 20), (6, 2), (12, 5)])
def test_balanced_prototypes(num_classes, width):
    g = generator(num_classes)
    means = torch.randn(num_classes, width, generator=g, dtype=torch.float64)
    means = means * torch.linspace(0.5, 2, width) + 3  # far from balanced, far from the origin
    prototypes = balanced_prototypes(means)
    assert torch.allclose(prototypes.norm(dim=1), torch.ones(num_classes).double())
    assert torch.allclose(prototypes, frame_oracle(means), rtol=0, atol=1e-9)
    if width >= num_classes - 1:
        simplex = (num_classes * torch.eye(num_classes) - 1).double() / (num_classes - 1)
        assert torch.allclose(prototypes @ prototypes.T, simplex, rtol=0, atol=1e-12)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64))[0]
    order = torch.randperm(num_classes, generator=g)
    moved = balanced_prototypes(40 * means + 1000 * means[0].abs())
    assert torch.allclose(moved, prototypes, rtol=0, atol=1e-9)
    turned = balanced_prototypes(means[order] @ rotation)
    assert torch.allclose(turned, prototypes[order] @ rotation, rtol=0, atol=1e-9)
    assert balanced_prototypes(means.float()).dtype == torch.float32


def test_prototypes_stay_in_the_span_of_the_means():
    means = torch.randn(6, 2, generator=generator(12), dtype=torch.float64)
    flat = F.pad(means, (0, 7))  # nine dimensions, two of them used
    expected = F.pad(balanced_prototypes(means), (0, 7))
    assert torch.allclose(balanced_prototypes(flat), expected, rtol=0, atol=1e-9)


def test_rectify_features():
    g = generator(13)
    means = torch.randn(4, 7, generator=g, dtype=torch.float64) + 1
    features = torch.randn(9, 7, generator=g, dtype=torch.float64)
    targets, prototypes = torch.randint(4, (9,), generator=g), balanced_prototypes(means)
    rectified = rectify_features(features, targets, means, prototypes)
    assert torch.allclose(rectified.norm(dim=1), torch.ones(9).double())
    m, p, centre = means.tolist(), prototypes.tolist(), [mean(v) for v in means.T.tolist()]
    s = mean([math.dist(row, centre) for row in m])
    for t, y, r in zip(features.tolist(), targets.tolist(), rectified.tolist()):
        moved = [a - b + s * c for a, b, c in zip(t, m[y], p[y])]
        assert r == pytest.approx(unit(moved), abs=1e-12)
    every = torch.arange(4)
    assert torch.allclose(rectify_features(means, every, means, prototypes), prototypes)


def test_rectify_logits():
    x = make_case(generator(14), 200, 6)
    rectified = rectify_logits(x.z_t, x.y, x.n)
    expected = [rectified_oracle(z, y, x.n) for z, y in zip(x.z_t.tolist(), x.y.tolist())]
    assert torch.allclose(rectified, doubles(expected), rtol=0, atol=1e-12)
    assert (rectified.argmax(1) == x.y).all()
    plain = x.z_t - (doubles(x.n) / sum(x.n)).log()
    assert torch.allclose(rectified.sort(1).values, plain.sort(1).values, rtol=0, atol=1e-12)
    already = plain.argmax(1) == x.y
    moved = ((rectified - plain).abs() > 1e-9).sum(1)
    assert (moved[already] == 0).all() and (moved[~already] == 2).all()
    assert 0 < already.sum() < 200


@pytest.mark.parametrize("num_classes", range(3, 13))
def test_grouped_kl(num_classes):
    g = generator(num_classes)
    tied = [9] + (num_classes - 2) * [5] + [1]  # label order decides between equal counts
    for counts in (None, None, tied):
        x = make_case(g, 6, num_classes, counts=counts)
        for temperature in (1.0, 3.0):
            parts = grouped_kl(x.z_s, x.z_t, x.n, temperature, balance=False)
            q, p = ((z / temperature).log_softmax(1) for z in (x.z_s, x.z_t))
            full = (p.exp() * (p - q)).sum(1).mean().item()
            assert sum(parts).item() == pytest.approx(full, rel=1e-12)
            for balance in (False, True):
                ours = grouped_kl(x.z_s, x.z_t, x.n, temperature, balance)
                oracle = grouped_oracle(as_lists(x), temperature, balance)
                assert [part.item() for part in ours] == pytest.approx(oracle, rel=1e-9)


def test_ltkd_teacher_of_a_single_sample_has_uniform_groups():
    x = make_case(generator(15), 1, 6, counts=[60, 50, 40, 30, 20, 10])
    mass = x.z_s.softmax(1).view(3, 2).sum(1)  # uniform over groups, whatever the teacher says
    cross = grouped_kl(x.z_s, x.z_t, x.n, 1.0)[0]
    assert cross.item() == pytest.approx(-(3 * mass).log().mean().item())


# ---- numbers

@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_huge_logits_stay_finite(name, batch):
    g = generator(16)
    for counts in ([10**6, 1000, 10, 1, 1], [1, 1, 10, 1000, 10**6], [1] * 5):
        for sign in (1, -1):
            x = make_case(g, batch, counts=counts, dtype=torch.float32)
            x.z_s, x.z_t = 1e4 * x.z_s.sign(), sign * 1e4 * x.z_t.sign()
            loss, gradients = value_and_gradients(name, x)
            assert loss.dtype == torch.float32 and loss.shape == () and loss.isfinite()
            assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", ["kd", "bkd"])
def test_bfloat16(name):
    x = make_case(generator(17))
    exact = LOSSES[name](x).item()
    loss, (gradient,) = value_and_gradients(
        name, changed(x, z_s=x.z_s.bfloat16(), z_t=x.z_t.bfloat16()))
    assert loss.dtype == gradient.dtype == torch.bfloat16 and gradient.isfinite().all()
    assert loss.item() == pytest.approx(exact, rel=0.05)


# The distillation terms alone: the loss with `on` less the loss with `off`.
TERMS = {
    "kd": [(dict(alpha=1.0), dict(alpha=0.0))],
    "bkd": [(dict(alpha=1.0), dict(alpha=0.0))],
    "cbd": [(dict(alpha=1.0), dict(alpha=1.0, beta=0.0))],
    "krdistill": [(dict(alpha=a, gamma=1.0 - a), dict(alpha=0.0, gamma=0.0)) for a in (0.0, 1.0)],
    "ltkd": [(dict(alpha=a, beta=1.0 - a), dict(alpha=0.0, beta=0.0)) for a in (0.0, 1.0)],
}


@pytest.mark.parametrize("name", LOSSES)
def test_properties_on_random_cases(name):
    g = generator(18)

    def uniform(low, high):
        return low + (high - low) * torch.rand((), generator=g).item()

    for _ in range(350):
        batch, num_classes = int(uniform(1, 17)), int(uniform(3, 31))
        # ltkd breaks ties of counts by class order, so only distinct counts can be permuted
        counts = random_counts(num_classes, g, distinct=name == "ltkd")
        x = make_case(g, batch, num_classes, 10 ** uniform(-3, 2), counts)
        h = dict(temperature=10 ** uniform(math.log10(0.5), math.log10(20))) if name in SOFT else {}
        loss, gradients = value_and_gradients(name, x, **h)
        loss = loss.item()
        assert math.isfinite(loss) and all(gradient.isfinite().all() for gradient in gradients)

        def same(other):
            return other == pytest.approx(loss, rel=1e-9, abs=1e-9)

        for on, off in TERMS.get(name, []):
            assert (LOSSES[name](x, **on, **h) - LOSSES[name](x, **off, **h)).item() >= -1e-9

        order = torch.randperm(num_classes, generator=g)
        permuted = changed(x, z_s=x.z_s[:, order], z_t=x.z_t[:, order], y=order.argsort()[x.y],
                           n=[counts[c] for c in order.tolist()])
        assert same(LOSSES[name](permuted, **h).item())

        shift = 50 * torch.randn(batch, 2, generator=g, dtype=torch.float64)
        shifted = changed(x, z_s=x.z_s + shift[:, :1], z_t=x.z_t + shift[:, 1:])
        if name == "cbd":  # features have a free length instead
            factor = shift.abs() + 0.1
            shifted.f_s, shifted.f_t = x.f_s * factor[:, :1], [f * factor[:, 1:] for f in x.f_t]
        assert same(LOSSES[name](shifted, **h).item())

        def part(rows):
            piece = changed(x, **{k: getattr(x, k)[rows] for k in ("z_s", "z_t", "f_s", "r", "y")})
            piece.f_t = [f[rows] for f in x.f_t]
            if name == "ltkd":  # its factors are the batch's: only without them does it add up
                parts = grouped_kl(piece.z_s, piece.z_t, x.n, h["temperature"], balance=False)
                return sum(parts).item()
            return LOSSES[name](piece, **h).item()

        half = batch // 2
        if half:
            halves = half * part(slice(half)) + (batch - half) * part(slice(half, None))
            assert halves / batch == pytest.approx(part(slice(None)), rel=1e-9, abs=1e-9)


# ---- bad arguments

Z, Y, N = torch.zeros(2, 3), torch.tensor([0, 1]), [9, 3, 1]
BAD_ARGUMENTS = [
    (effective_number_weights, ([5, 0.5],), {}, "at least 1"),
    (effective_number_weights, ([5, math.nan],), {}, "at least 1"),
    (effective_number_weights, ([[5, 1]],), {}, "shape"),
    (effective_number_weights, (torch.ones(2, 2),), {}, "shape"),
    (effective_number_weights, (N, 1.0), {}, r"beta must lie in \[0, 1\)"),
    (effective_number_weights, (N, -0.1), {}, "beta"),
    (effective_number_weights, (N, math.nan), {}, "beta"),
    (balanced_softmax_loss, (Z, Y, [9, 3, 0]), {}, "at least 1"),
    (balanced_softmax_loss, (Z, Y, [9, 3]), {}, r"shape \(3,\)"),
    (balanced_softmax_loss, (Z, Y, torch.ones(1, 3)), {}, "shape"),
    (kd_loss, (Z, Z[:1], Y), {}, "one shape"),
    (kd_loss, (Z, Z[:, :2], Y), {}, "one shape"),
    *((kd_loss, (Z, Z, Y), dict(temperature=t), "temperature") for t in (0, -1.0, math.nan)),
    (bkd_loss, (Z, Z, Y, [9, -3, 1]), {}, "at least 1"),
    (bkd_loss, (Z, Z, Y, [9, 3]), {}, "shape"),
    (bkd_loss, (Z, Z, Y, [9]), {}, "shape"),
    (bkd_loss, (Z, Z[:1], Y, N), {}, "one shape"),
    (bkd_loss, (Z, Z[:, :2], Y, N), {}, "shape"),
    (bkd_loss, (Z, Z, Y, N), dict(beta=1), "beta"),
    *((bkd_loss, (Z, Z, Y, N), dict(temperature=t), "temperature") for t in (0, -1.0, math.nan)),
    (cbd_loss, (Z, torch.ones(2, 5), [torch.ones(2, 4)], Y), {}, "one shape"),
    (cbd_loss, (Z, torch.ones(2, 5), [torch.ones(2, 5)] * 2, Y), {}, "one shape"),
    (cbd_loss, (Z, torch.ones(2, 5), [torch.ones(1, 5)], Y), {}, "not .2, 5. and .1, 5."),
    (balanced_prototypes, (torch.ones(4),), {}, "class_means"),
    (balanced_prototypes, (torch.ones(1, 4),), {}, "class_means"),
    (rectify_logits, (Z, Y, [9, 3]), {}, "shape"),
    (rectify_logits, (Z, Y, [9, 3, 0]), {}, "at least 1"),
    (krdistill_loss, (Z, Z, Z[:, :2], Z, Y, N), {}, "shape"),
    (krdistill_loss, (Z, Z, Z, Z[:1], Y, N), {}, "feature"),
    (krdistill_loss, (Z, Z, Z, Z[:, :2], Y, N), {}, "feature"),
    *((krdistill_loss, (Z, Z, Z, Z, Y, N), dict(temperature=t), "temperature") for t in (0, -1.0)),
    (ltkd_loss, (Z[:, :2], Z[:, :2], Y, [9, 3]), {}, "at least 3 classes, not 2"),
    (ltkd_loss, (Z, Z, Y, [9, 3]), {}, "shape"),
    (ltkd_loss, (Z, Z, Y, [9, 3, 0]), {}, "at least 1"),
    (ltkd_loss, (Z, Z[:1], Y, N), {}, "shape"),
    (ltkd_loss, (Z, torch.zeros(2, 4), Y, N), {}, "shape"),
    *((ltkd_loss, (Z, Z, Y, N), dict(temperature=t), "temperature") for t in (0, -1.0, math.nan)),
    (build_model, ("resnet9", 10), {}, "unknown network 'resnet9'.*resnet8, .*resnet32x4"),
    (build_model, ("resnet8", 10, "dot"), {}, "unknown head 'dot'.*linear.*cosine"),
]


@pytest.mark.parametrize("function, arguments, keywords, message", BAD_ARGUMENTS)
def test_bad_arguments(function, arguments, keywords, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments, **keywords)


# ---- learning rate

@pytest.mark.parametrize("epochs, rates", [
    (200, {0: 0.02, 1: 0.04, 2: 0.06, 3: 0.08, 4: 0.1, 5: 0.1, 159: 0.1, 160: 1e-3, 179: 1e-3,
           180: 1e-5, 199: 1e-5}),
    (30, {4: 0.1, 23: 0.1, 24: 1e-3, 26: 1e-3, 27: 1e-5, 29: 1e-5}),
    (1, {0: 0.02}),
])
def test_learning_rate(epochs, rates):
    assert {e: learning_rate(e, epochs, 0.1) for e in rates} == pytest.approx(rates, rel=1e-12)
    assert learning_rate(epochs - 1, epochs, 0.3) == pytest.approx(3 * rates[max(rates)])


# ---- networks

HEADER = [line.split() for line in models.__doc__.splitlines() if line.startswith("    resnet")]


@pytest.mark.parametrize("name, layers, ten, hundred, width", HEADER)
def test_header_table(name, layers, ten, hundred, width):
    with torch.device("meta"):
        for num_classes, parameters in ((10, ten), (100, hundred)):
            model = build_model(name, num_classes)
            assert sum(p.numel() for p in model.parameters()) == int(parameters.replace(",", ""))
        weighted = [m for m in model.modules() if isinstance(m, nn.Linear)
                    or isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(weighted) == int(layers)
    assert model.num_features == model.head.in_features == int(width)


def test_header_table_is_complete():
    assert [row[0] for row in HEADER] == list(NETWORKS)


@pytest.mark.parametrize("name", ["resnet8", "resnet14", "resnet8x4"])
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_forward(name, head):
    torch.manual_seed(0)
    images = torch.randn(3, 3, 32, 32)
    model, fresh = build_model(name, 7, head), build_model(name, 7, head)
    model(images)  # so that the running statistics are worth saving
    fresh.load_state_dict(model.state_dict())
    model.eval()
    fresh.eval()
    with torch.no_grad():
        logits, features = model(images)
        assert logits.shape == (3, 7) and features.shape == (3, NETWORKS[name][2][-1])
        pooled = model.blocks(model.bn1(model.conv1(images)).relu()).mean((2, 3))
        assert torch.allclose(features, pooled) and torch.allclose(model.head(features), logits)
        assert torch.equal(fresh(images)[0], logits)
        one = model(images[1:2])
    assert torch.allclose(one[0], logits[1:2], atol=1e-4, rtol=1e-4)
    assert torch.allclose(one[1], features[1:2], atol=1e-4, rtol=1e-4)


def test_cosine_head():
    torch.manual_seed(1)
    head = build_model("resnet8", 5, "cosine").head.double()
    features = torch.rand(4, 64).double()
    logits = head(features)
    expected = [[20 * cosine(f, w) for w in head.weight.tolist()] for f in features.tolist()]
    assert torch.allclose(logits, doubles(expected), rtol=0, atol=1e-12)
    factor = doubles([[1e-3], [1], [7], [1e5]])
    assert torch.allclose(head(features * factor), logits, rtol=0, atol=1e-12)
    assert [name for name, _ in head.named_parameters()] == ["weight"]  # no bias, no learnt scale


def test_projection():
    torch.manual_seed(2)
    model = build_model("resnet8", 5, "cosine", projection=96).eval()
    with torch.no_grad():
        logits, features = model(torch.randn(4, 3, 32, 32))
    assert logits.shape == (4, 5) and features.shape == (4, 96) and model.num_features == 96
    assert (features >= 0).all() and (features == 0).any() and (features > 0).any()
    assert torch.allclose(model.head(features), logits)


def test_shortcut_without_parameters():
    block = models.BasicBlock(4, 8, 2, "pad")
    nn.init.zeros_(block.bn2.weight)  # nothing passes but the shortcut
    x = torch.rand(2, 4, 6, 6)
    out = block(x)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert not out[:, :2].any() and not out[:, 6:].any()


def test_batch_norm_is_torchs():
    torch.manual_seed(3)
    ours, theirs = models.BatchNorm(6), nn.BatchNorm2d(6)
    for norm in (ours, theirs):
        norm.weight.data, norm.bias.data = torch.linspace(0.5, 2, 6), torch.linspace(-1, 1, 6)
    for _ in range(3):
        x = 5 * torch.randn(4, 6, 3, 3) + 2
        assert torch.equal(ours(x), theirs(x))
        assert torch.equal(ours.running_mean, theirs.running_mean)
        assert torch.equal(ours.running_var, theirs.running_var)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert torch.equal(ours.running_mean, theirs.running_mean)


# ---- batches

def random_images(count, seed=0, size=(32, 32)):
    return torch.randint(256, (count, 3, *size), generator=generator(seed)).to(torch.uint8)


def make_batches(images, targets=None, counts=None, batch_size=12, sampler="instance", **more):
    # a target of its own for every image tells which one it is
    targets = torch.arange(len(images)) if targets is None else targets
    counts = [1] * len(images) if counts is None else counts
    return Batches(images, targets, counts, batch_size, "cpu", sampler, **more)


def epoch(batches, g):
    batches.shuffle(g)
    images, targets = zip(*(batches.next(size) for size in batches.sizes))
    assert [len(part) for part in images] == [len(part) for part in targets] == batches.sizes
    return torch.cat(images), torch.cat(targets)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalise(dtype):
    images = random_images(2, size=(3, 4))
    out = normalise(images.to(dtype))
    assert out.dtype == torch.float32
    for b, c, h, w in np.ndindex(*images.shape):
        expected = (images[b, c, h, w].item() / 255 - MEAN[c]) / STD[c]
        assert out[b, c, h, w].item() == pytest.approx(expected, abs=1e-5)


def test_batches_are_the_crops_of_every_image_once():
    images = random_images(37)
    batches, g = make_batches(images), generator(0)
    assert batches.sizes == [12, 12, 12, 1]
    for _ in range(2):
        out, targets = epoch(batches, g)
        assert sorted(targets.tolist()) == list(range(37)) != targets.tolist()
        for image, source in zip(out, images[targets]):
            canvas = torch.zeros(3, 40, 40, dtype=torch.uint8)
            canvas[:, 4:36, 4:36] = source
            crops = torch.stack([view[:, top:top + 32, left:left + 32] for top in range(9)
                                 for left in range(9) for view in (canvas, canvas.flip(2))])
            assert (normalise(crops) == image).flatten(1).all(1).sum() == 1


@pytest.mark.parametrize("count, batch_size, sizes", [
    (10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 128, [3]), (1, 1, [1])])
def test_sizes(count, batch_size, sizes):
    batches = make_batches(random_images(count), batch_size=batch_size)
    assert batches.sizes == sizes
    assert sorted(epoch(batches, generator(0))[1].tolist()) == list(range(count))


def test_places_are_uniform():
    # channel 0 holds the row, channel 1 the column: a pixel of the middle tells the place
    row, column = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    image = torch.stack([row, column, row]).to(torch.uint8)
    batches = make_batches(image.expand(600, -1, -1, -1), batch_size=600)
    seen, g = torch.zeros(2, 9, 9), generator(1)
    mean_, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    for _ in range(9):
        out = epoch(batches, g)[0][:, :, 15:17, 15:17]
        raw = (255 * (out * std + mean_)).round().long()
        mirrored = (raw[:, 1, 0, 1] < raw[:, 1, 0, 0]).long()
        for key in zip(mirrored.tolist(), (raw[:, 0, 0, 0] - 11).tolist(),
                       (raw[:, 1].amin((1, 2)) - 11).tolist()):
            seen[key] += 1
    assert seen.sum() == 5400 and (seen > 0).all()
    expected = 5400 / 162
    chi_square = ((seen - expected) ** 2 / expected).sum()  # 161 degrees of freedom
    assert abs(chi_square - 161) < 6 * math.sqrt(2 * 161)


def test_class_balanced_sampler():
    counts, epochs = [60, 25, 10, 5], 200
    targets = torch.arange(4).repeat_interleave(torch.tensor(counts))
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(-1, 3, 32, 32)
    batches, g = make_batches(images, targets, counts, 100, "class"), generator(2)
    seen = torch.zeros(100)
    for _ in range(epochs):
        out, labels = epoch(batches, g)
        source = (255 * (out[:, 0, 16, 16] * STD[0] + MEAN[0])).round().long()
        assert torch.equal(targets[source], labels)
        seen += source.bincount(minlength=100)
    assert seen.sum() == 100 * epochs

    def near(drawn, probability):
        total = 100 * epochs
        sigma = math.sqrt(total * probability * (1 - probability))
        return abs(drawn - total * probability) < 5 * sigma

    for drawn, count in zip(seen.split(counts), counts):
        assert near(drawn.sum().item(), 1 / 4)
        assert all(near(image, 1 / (4 * count)) for image in drawn.tolist())


@pytest.mark.parametrize("sampler", ["instance", "class"])
@pytest.mark.parametrize("colour", [False, True])
def test_batches_depend_on_their_generator_alone(sampler, colour):
    batches = make_batches(random_images(20), sampler=sampler, colour=colour)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    g = generator(3)
    first, second = epoch(batches, g), epoch(batches, g)
    torch.randn(1)
    again = epoch(make_batches(random_images(20), sampler=sampler, colour=colour), generator(3))
    torch.set_rng_state(before[0])
    other = epoch(batches, generator(4))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[0], other[0])
    batches.shuffle(g)
    for size in batches.sizes[:-1]:
        images, _ = batches.next(size)
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_colour_acts_on_the_raw_crops():
    plain, coloured = (make_batches(random_images(20), colour=colour) for colour in (False, True))
    (crops, targets), (out, same) = epoch(plain, generator(5)), epoch(coloured, generator(5))
    assert torch.equal(targets, same)  # colour is drawn last, so the crops agree
    raw = 255 * (crops * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1))
    expected = normalise(distort_colour(raw.round(), coloured.colours))
    assert torch.allclose(out, expected, atol=1e-3)


# ---- colour distortion

LUMA = np.array([0.299, 0.587, 0.114])
YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def distort_oracle(image, draws):
    """One image (3, H, W), in float64, one operation after the other."""
    x = image.astype(np.float64)
    brightness, contrast, saturation = 1 + 0.8 * (2 * draws[2:5] - 1)
    angle = 0.4 * np.pi * (2 * draws[5] - 1)

    def luma():
        return np.tensordot(LUMA, x, 1)

    if draws[0] < 0.8:
        for operation in np.argsort(draws[6:]):
            if operation == 0:
                x = brightness * x
            elif operation == 1:
                x = contrast * x + (1 - contrast) * luma().mean()
            elif operation == 2:
                x = saturation * x + (1 - saturation) * luma()
            else:
                y, i, q = np.tensordot(YIQ, x, 1)
                turned = (math.cos(angle) * i - math.sin(angle) * q,
                          math.sin(angle) * i + math.cos(angle) * q)
                x = np.tensordot(np.linalg.inv(YIQ), np.stack([y, *turned]), 1)
            x = x.clip(0, 255)
    if draws[1] < 0.2:
        x = np.repeat(luma()[None], 3, 0)
    return x


def colour_draws(count=1, jitter=0.0, grey=0.9, **changes):
    """Draws that change nothing but what is named."""
    draws = torch.full((count, 10), 0.5)
    draws[:, 0], draws[:, 1], draws[:, 6:] = jitter, grey, torch.tensor([0.1, 0.2, 0.3, 0.4])
    for name, value in changes.items():
        draws[:, ["brightness", "contrast", "saturation", "hue"].index(name) + 2] = value
    return draws


def test_distort_colour_is_the_oracle():
    images, draws = random_images(200, 6, (4, 5)), torch.rand(200, 10, generator=generator(7))
    out = distort_colour(images, draws)
    assert out.dtype == torch.float32 and out.shape == images.shape
    for row, (image, draw) in enumerate(zip(images, draws)):
        expected = distort_oracle(image.numpy(), draw.double().numpy())
        assert np.abs(out[row].numpy() - expected).max() < 0.02
        alone = distort_colour(images[row:row + 1], draws[row:row + 1])  # no other image matters
        assert torch.allclose(alone[0], out[row], atol=1e-3)


def test_distort_colour_may_do_nothing():
    images = random_images(8, 8, (5, 4))
    draws = torch.rand(8, 10, generator=generator(9))
    draws[:, 0], draws[:, 1] = 0.8, 0.2  # just not
    assert torch.equal(distort_colour(images, draws), images.float())
    assert torch.allclose(distort_colour(images, colour_draws(8)), images.float(), atol=1e-3)


@pytest.mark.parametrize("draw", [0.0, 0.3, 0.999])
def test_distort_colour_one_at_a_time(draw):
    images = random_images(4, 10, (5, 6))
    x, factor = images.float(), 1 + 0.8 * (2 * draw - 1)
    luma = torch.tensor(LUMA).float().view(3, 1, 1)

    def alone(**change):
        return distort_colour(images, colour_draws(4, **change))

    def close(a, b):
        return torch.allclose(a, b, rtol=0, atol=0.01)

    grey = (x * luma).sum(1, keepdim=True)
    assert close(alone(brightness=draw), (factor * x).clamp(0, 255))
    assert close(alone(saturation=draw), (grey + factor * (x - grey)).clamp(0, 255))
    centre = grey.mean((2, 3), keepdim=True)
    assert close(alone(contrast=draw), (centre + factor * (x - centre)).clamp(0, 255))
    assert close(alone(grey=0.19), grey.expand_as(x)) and not close(alone(), grey.expand_as(x))
    muted = 96 + x / 4  # far from the edges, so that nothing is clipped
    turned = distort_colour(muted, colour_draws(4, hue=draw))
    assert close((turned * luma).sum(1), (muted * luma).sum(1)) and not close(turned, muted)
    assert close(distort_colour(turned, colour_draws(4, hue=1 - draw)), muted)


# ---- data: subsets, files, downloads

# SHA-256 of the int64 positions within the class, classes one after the other, and their number;
# imbalance 10, 50, 100, 200.
PUBLISHED = {
    ("cifar10", "exp"): [
        (20431, "2b3a8656bec514c6c87236694978bc8a90f04fa51b4ed2009d2f8f336a614242"),
        (13996, "7bb90363b243a944125b22035862d78afbc280cb2c0f509019ffc6960fd0f523"),
        (12406, "8a54f5b6fa9722952358bc99897aa969bc20f845d0b15034e5013337df1e4ec7"),
        (11203, "334c2d61143b39bf3cc8edb0315b5c43f5a5198ef01e8c09f99b1b060d70f545")],
    ("cifar10", "step"): [
        (27500, "972d9eb4a700ad789b81f7500e0675f8f1acbe7e537e7a8fca8e6b53ab893e5f"),
        (25500, "550772f4f98809f0f5a694f51be427639bbf4538dc590809e1904635b46791c9"),
        (25250, "9f6141e4cf23433a8600d4e492e26c59b6d44b4266ecc1b0ef915c980da0e2ae"),
        (25125, "54d23dbdbd7144e24631f5de73fa2aedba474174bb300a495a9c6713f978c7d3")],
    ("cifar100", "exp"): [
        (19573, "5906ba7310b91b5ee5a4e0b172d27f9370929d8acacd8026f44e160daa1f4834"),
        (12608, "1bc82de2629e5cbd51d6ea8f1d70cf7986616bfecb4a8606a427fbcc1dd50c16"),
        (10847, "f123ec136d44ab1b224fe55bb8a73ab03432d25a81975af68f26fb6777d5aca8"),
        (9502, "36f76462dfbbe6f48cb30b5d4564fc5a84b1c1bfb4f222674a27dd2b2bba875c")],
    ("cifar100", "step"): [
        (27500, "d973f460f760c05f5a861b8dc64647fe009fd14b2e8cc4e3597ecd1375b55eac"),
        (25500, "fd9f9dea430a1ea1b918fb3809a4d7028802c70e36ac84d78c7a89ed42d354bd"),
        (25250, "5fab75890a63c2996fc0348bd2047e3e931035b136781510a90b9890adfb75c1"),
        (25100, "0e093498e9d9aaa3f869f334cd3594db2c62ae14eb80c6dc2399b6ae11a84851")],
}
SETTINGS = [(name, kind, imb, *PUBLISHED[name, kind][i]) for name, kind in PUBLISHED
            for i, imb in enumerate((10, 50, 100, 200))]
FIRST = {"cifar10": ([398, 3833, 4836, 4572, 636], [2204, 3816, 2206, 2507, 1926]),
         "cifar100": ([90, 254, 283, 445, 461], [348, 153, 363, 361, 299])}
SHAPE = {"cifar10": (10, 5000), "cifar100": (100, 500)}
REAL = Path(os.environ.get("KD_LT_DATA", "data"))
ALL_NEEDED = {name: all((REAL / data.CIFAR_FOLDERS[name] / file).exists()
                        for file in data.CIFAR_SHA256[name] if "meta" not in file)
              for name in SHAPE}


def check_published(name, targets, counts, total, sha256):
    rows = data.long_tail_indices(targets, counts)
    assert rows.dtype == torch.int64 and len(rows) == sum(counts) == total
    picked, positions = targets[rows], np.empty(len(targets), np.int64)
    for c in range(len(counts)):
        own = np.flatnonzero(targets == c)
        positions[own] = np.arange(len(own))
    positions = positions[rows]
    assert (picked == np.repeat(np.arange(len(counts)), counts)).all()
    assert positions[:5].tolist() == FIRST[name][0]
    assert positions[-counts[-1]:][:5].tolist() == FIRST[name][1][:counts[-1]]
    assert hashlib.sha256(positions.astype("<i8").tobytes()).hexdigest() == sha256


@pytest.mark.parametrize("name, kind, imb, total, sha256", SETTINGS)
def test_published_selection(name, kind, imb, total, sha256):
    # A shuffle depends on nothing but the size of a class: labels in any order show the same.
    classes, most = SHAPE[name]
    targets = np.random.RandomState(5).permutation(np.arange(50000) % classes)
    check_published(name, targets, data.class_counts(classes, most, imb, kind), total, sha256)


@pytest.fixture(scope="module")
def real_targets():
    """Labels alone, so that the pixels of one data set after the other need not stay in memory."""
    return {name: data.load_cifar(name, REAL, train=True)[1] for name in SHAPE if ALL_NEEDED[name]}


@pytest.mark.parametrize("name", SHAPE)
def test_published_selection_real_files(name, real_targets):
    if name not in real_targets:
        pytest.skip(f"no {name} in {REAL} (set KD_LT_DATA)")
    targets = real_targets[name]
    classes, most = SHAPE[name]
    assert targets.dtype == torch.int64 and targets.bincount().tolist() == [most] * classes
    # the very rows, in the order of the original files
    first = {"cifar10": [4030, 38518, 48266], "cifar100": [9470, 27272, 30172]}[name]
    counts = data.class_counts(*SHAPE[name], 100)
    assert data.long_tail_indices(targets, counts)[:3].tolist() == first
    for other, kind, imb, total, sha256 in SETTINGS:
        if other == name:
            counts = data.class_counts(*SHAPE[name], imb, kind)
            check_published(name, targets.numpy(), counts, total, sha256)


def test_real_test_set():
    if not ALL_NEEDED["cifar10"]:
        pytest.skip(f"no cifar10 in {REAL} (set KD_LT_DATA)")
    images, targets = data.load_cifar("cifar10", REAL, train=False)
    assert images.shape == (10000, 3, 32, 32) and images.dtype == torch.uint8
    assert targets.bincount().tolist() == [1000] * 10 and targets[:4].tolist() == [3, 8, 8, 0]
    pixels = images.double().mean((0, 2, 3)) / 255  # near the mean of the training images
    assert torch.allclose(pixels, torch.tensor([0.494, 0.485, 0.450]).double(), atol=1e-3)


def test_class_counts():
    assert data.class_counts(10, 5000, 100) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert data.class_counts(100, 500, 200)[-1] == 2  # 2.5, truncated
    assert data.class_counts(5, 100, 10, "step") == [100, 100, 10, 10, 10]
    assert data.class_counts(1, 100, 10) == [100]
    assert data.class_counts(3, 7, 1) == data.class_counts(3, 7, 1, "step") == [7, 7, 7]
    for most in range(1, 200):  # at the limit, where 1 / imb rounds down for some
        for kind in ("exp", "step"):
            assert data.class_counts(4, most, most, kind)[-1] == 1


@pytest.mark.parametrize("seed", [0, 3])
def test_long_tail_indices_plain_reimplementation(seed):
    targets = np.random.RandomState(1).randint(0, 6, 400)
    counts = [40, 30, 0, 20, 7, 1]
    expected, rng = [], np.random.RandomState(seed)
    for c in range(6):
        rows = [i for i in range(400) if targets[i] == c]
        rng.shuffle(rows)
        expected += rows[:counts[c]]
    for form in (targets, targets.tolist(), torch.tensor(targets), targets.astype(np.uint8)):
        assert data.long_tail_indices(form, counts, seed).tolist() == expected


def test_subsets_are_nested_and_depend_on_seed():
    targets = np.arange(1000) % 10
    picks = [set(data.long_tail_indices(targets, data.class_counts(10, 100, imb)).tolist())
             for imb in (50, 10, 2, 1)]
    assert picks[0] < picks[1] < picks[2] < picks[3] == set(range(1000))
    counts = data.class_counts(10, 100, 50)
    assert picks[0] != set(data.long_tail_indices(targets, counts, 1).tolist())


def test_global_random_states_untouched():
    def states():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    before = states()
    data.long_tail_indices(np.arange(100) % 10, [5] * 10)
    data.load_dataset("synthetic", "", 10)
    assert states() == before


def small_npz(path, **changes):
    rng = np.random.RandomState(0)
    arrays = {"x_train": rng.randint(0, 256, (12, 32, 32, 3), dtype=np.uint8),
              "y_train": np.array([0] * 6 + [1] * 4 + [2] * 2),
              "x_test": rng.randint(0, 256, (3, 32, 32, 3), dtype=np.uint8),
              "y_test": np.array([0, 1, 2], np.uint8)}
    arrays = {k: v for k, v in {**arrays, **changes}.items() if v is not None}
    np.savez(path, **arrays)
    return arrays


def test_npz_layouts_agree(tmp_path):
    arrays = small_npz(tmp_path / "a.npz")
    turned = {k: v.transpose(0, 3, 1, 2) for k, v in arrays.items() if k[0] == "x"}
    small_npz(tmp_path / "b.npz", **turned, y_train=arrays["y_train"].astype(np.int16))
    one, two = (data.load_dataset(str(tmp_path / f"{f}.npz"), "", 1) for f in "ab")
    assert one.digest == two.digest and one.class_counts == [6, 4, 2] == two.class_counts
    assert (one.train_images.numpy() == arrays["x_train"].transpose(0, 3, 1, 2)).all()
    assert one.train_targets.tolist() == arrays["y_train"].tolist()
    assert one.test_images.dtype == torch.uint8 and one.test_targets.dtype == torch.int64
    small_npz(tmp_path / "c.npz", y_test=np.array([0, 1, 1]))
    assert data.load_dataset(str(tmp_path / "c.npz"), "", 1).digest != one.digest


def test_npz_thinned(tmp_path):
    path = str(tmp_path / "a.npz")
    small_npz(path)
    small = data.load_dataset(path, "", 3)
    assert small.class_counts == [6, 3, 2] == small.train_targets.bincount().tolist()
    with pytest.raises(data.InputError, match="a.npz: class 1 has 4 .*--imb 1.2 wants 5.*--imb 1 "):
        data.load_dataset(path, "", 1.2)
    with pytest.raises(data.InputError, match="--imb must lie"):
        data.load_dataset(path, "", 0)


U8 = np.uint8


@pytest.mark.parametrize("changes, message", [
    ({"y_test": None}, "y_test"),
    ({"x_train": np.zeros((12, 32, 32, 3))}, "x_train must be uint8.*float64"),
    ({"x_train": np.zeros((12, 28, 28), U8)}, "x_train must be uint8"),
    ({"x_train": np.zeros((12, 32, 3, 32), U8)}, "x_train must be uint8"),
    ({"x_test": np.zeros((3, 3072), U8)}, "x_test must be uint8"),
    ({"x_test": np.zeros((0, 32, 32, 3), U8), "y_test": np.zeros(0, int)}, "x_test holds no image"),
    ({"x_train": np.zeros((0, 32, 32, 3), U8), "y_train": np.zeros(0, int)}, "x_train holds no"),
    ({"y_train": np.zeros(12)}, "y_train must be 12 integers"),
    ({"y_train": np.zeros(12, bool)}, "y_train must be 12 integers"),
    ({"y_train": np.zeros((12, 1), int)}, "y_train must be 12 integers"),
    ({"y_test": np.zeros(2, int)}, "y_test must be 3 integers"),
    ({"y_train": np.array([0, 2] * 6)}, "no image of class 1"),
    ({"y_train": np.arange(12) + 1}, "no image of class 0"),
    ({"y_train": np.array([0, 2 ** 62] * 6)}, "no image of class 1"),
    ({"y_train": np.array([0, -1] * 6)}, "y_train holds -1"),
    ({"y_train": np.zeros(12, int)}, "at least 2 classes"),
    ({"y_test": np.array([0, 1, 3])}, "y_test has class 3"),
    ({"y_test": np.array([0, 1, -2])}, "y_test holds -2"),
    ({"y_train": np.array([None] * 12, object)}, "y_train.*Object arrays"),
])
def test_npz_bad_content(tmp_path, changes, message):
    small_npz(tmp_path / "bad.npz", **changes)
    with pytest.raises(data.InputError, match=f"(?s)bad.npz.*{message}"):
        data.load_npz(tmp_path / "bad.npz")


def test_npz_bad_files(tmp_path):
    path = tmp_path / "bad.npz"
    small_npz(path)
    whole = bytearray(path.read_bytes())
    flipped = bytearray(whole)
    flipped[5000] ^= 1  # a pixel: the zip's checksum tells
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    text = io.BytesIO()
    with zipfile.ZipFile(text, "w") as archive:
        archive.writestr("x_train.npy", "no array")
    for raw in (b"", b"text", whole[:-200], whole[:9000], flipped, array.getvalue(),
                text.getvalue(), pickle.dumps([1])):
        path.write_bytes(raw)
        with pytest.raises(data.InputError, match="bad.npz.*expected is a .npz"):
            data.load_npz(path)
    for missing in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(data.InputError, match=missing.name):
            data.load_npz(missing)


def test_synthetic():
    one, two = data.synthetic(seed=1), data.synthetic(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not torch.equal(one[0], data.synthetic(seed=2)[0])
    images, targets, test_images, test_targets = one
    assert images.shape == (2000, 3, 32, 32) and test_images.shape == (500, 3, 32, 32)
    assert targets.bincount().tolist() == [200] * 10
    assert test_targets.bincount().tolist() == [50] * 10
    few = data.synthetic(3, 4, 5)
    assert len(few[0]) == 12 and len(few[2]) == 15
    # Nearest class mean: learnable from two images a class.
    def accuracy(count):
        rows = data.long_tail_indices(targets, [count] * 10)
        means = torch.stack([images[rows][targets[rows] == c].float().mean(0) for c in range(10)])
        near = torch.cdist(test_images.flatten(1).float(), means.flatten(1)).argmin(1)
        return (near == test_targets).float().mean()
    assert accuracy(2) > 0.9


def test_load_dataset_synthetic():
    full, thin = (data.load_dataset("synthetic", "", imb) for imb in (1, 100))
    assert full.name == "synthetic" and full.class_counts == [200] * 10
    assert thin.class_counts == data.class_counts(10, 200, 100)
    assert thin.class_counts == thin.train_targets.bincount().tolist()
    assert torch.equal(full.test_images, thin.test_images)
    other = data.load_dataset("synthetic", "", 100, subset_seed=1)
    assert len({full.digest, thin.digest, other.digest}) == 3 and len(thin.digest) == 16
    assert thin.digest == data.load_dataset("synthetic", "elsewhere", 100.0).digest


@pytest.mark.parametrize("error, message, call", [
    *((data.InputError, f"--imb must lie in 1 .. 100 .*, not {imb:g}",
       lambda imb=imb: data.class_counts(10, 100, imb, "step"))
      for imb in (0.5, -10, math.nan, math.inf, 101)),
    (data.InputError, "--imb-type", lambda: data.class_counts(10, 100, 10, "linear")),
    (ValueError, "num_classes", lambda: data.class_counts(0, 100, 10)),
    (ValueError, "max_count", lambda: data.class_counts(10, 0, 1)),
    (ValueError, "class 1 has 2 images, cannot take 3",
     lambda: data.long_tail_indices([0, 0, 1, 1], [2, 3])),
    (ValueError, "cannot take -1", lambda: data.long_tail_indices([0, 1], [1, -1])),
    (ValueError, "0..1", lambda: data.long_tail_indices([0, 1, 2], [1, 1])),
    (ValueError, "0..1", lambda: data.long_tail_indices([0, 1, -1], [1, 1])),
    (ValueError, "1-D integers", lambda: data.long_tail_indices([0.0, 1.0], [1, 1])),
    (ValueError, "1-D integers", lambda: data.long_tail_indices([[0, 1]], [1, 1])),
    (ValueError, "counts", lambda: data.long_tail_indices([0, 1], [])),
    (data.InputError, "cifar10, cifar100, synthetic", lambda: data.load_dataset("mnist", "", 1)),
    (data.InputError, "--subset-seed", lambda: data.load_dataset("synthetic", "", 1, "exp", -1)),
    (data.InputError, "1 .. 200", lambda: data.load_dataset("synthetic", "", 500)),
])
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()


# ---- files and downloads: mini files take CIFAR's place, a server on the loopback Toronto's

@pytest.fixture
def mini(monkeypatch):
    """Name in the archive: bytes, with SHA-256 sums to match; pauses and limits made short."""
    rng = np.random.RandomState(0)
    files = {"batches.meta": b"names"}
    for i, file in enumerate([f"data_batch_{b}" for b in range(1, 6)] + ["test_batch"]):
        files[file] = pickle.dumps({"data": rng.randint(0, 256, (2, 3072)).astype(np.uint8),
                                    "labels": [i, 9]}, protocol=2)
    sums = {file: hashlib.sha256(files[file]).hexdigest() for file in data.CIFAR_SHA256["cifar10"]}
    monkeypatch.setitem(data.CIFAR_SHA256, "cifar10", sums)
    monkeypatch.setattr(data, "PAUSE", 0.0)
    return {f"cifar-10-batches-py/{file}": raw for file, raw in files.items()}


@pytest.fixture
def serve(monkeypatch):
    """Answers the n-th request with the n-th of the given functions, the last one ever after."""
    servers = []

    def start(*answers):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.paths.append(self.path)
                answers[min(len(server.paths), len(answers)) - 1](self)

            def log_message(self, *_):
                pass
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.paths = []
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(data, "CIFAR_URL", f"http://127.0.0.1:{server.server_port}/")
        return server.paths
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def send(raw, sent=None, length=True, pause=0.0):
    def answer(handler):
        handler.send_response(200)
        if length:
            handler.send_header("Content-Length", str(len(raw)))
        handler.end_headers()
        body = raw[:sent]
        for start in range(0, len(body), len(body) // 4 + 1):
            handler.wfile.write(body[start:start + len(body) // 4 + 1])
            if pause:
                time.sleep(pause)
    return answer


def fail(code):
    return lambda handler: handler.send_error(code)


def packed(files, *special):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for entry in special:
            tar.addfile(entry, io.BytesIO(b"x" * entry.size))
        for name, raw in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(raw)
            tar.addfile(entry, io.BytesIO(raw))
    return buffer.getvalue()


def put(files, root):
    for name, raw in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(raw)


def found(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*")
            if not path.is_dir()}


def test_files_present_need_no_network_and_no_writing(mini, tmp_path, serve, monkeypatch):
    paths = serve(fail(404))
    put({name: raw for name, raw in mini.items() if "meta" not in name}, tmp_path)
    monkeypatch.setattr(data.tempfile, "TemporaryFile", None)
    images, targets = data.load_cifar("cifar10", tmp_path, train=True)
    assert targets.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9] and targets.dtype == torch.int64
    first = pickle.loads(mini["cifar-10-batches-py/data_batch_1"])["data"]
    assert images.shape == (10, 3, 32, 32) and (images[:2].numpy().reshape(2, -1) == first).all()
    assert data.load_cifar("cifar10", str(tmp_path), train=False)[1].tolist() == [5, 9]
    assert not paths and len(found(tmp_path)) == 6


@pytest.mark.parametrize("harm", [lambda raw: raw[:-1], lambda raw: b"", lambda raw: raw + b" ",
                                  lambda raw: raw[:99] + bytes([raw[99] ^ 1]) + raw[100:]])
def test_damaged_file_is_named_and_kept(mini, tmp_path, serve, harm):
    name = "cifar-10-batches-py/data_batch_3"
    paths = serve(send(packed(mini)))
    put({**mini, name: harm(mini[name])}, tmp_path)
    for others in ("complete", "one missing"):
        before = found(tmp_path)
        with pytest.raises(data.InputError, match="data_batch_3 is not the original.*delete"):
            data.load_cifar("cifar10", tmp_path, train=True)
        assert found(tmp_path) == before and not paths
        (tmp_path / "cifar-10-batches-py/data_batch_1").unlink(missing_ok=True)


def test_wrong_file_is_never_unpickled(mini, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)
    put({**mini, "cifar-10-batches-py/test_batch": pickle.dumps(Bomb())}, tmp_path)
    with pytest.raises(data.InputError, match="test_batch"):
        data.load_cifar("cifar10", tmp_path, train=False)
    assert not (tmp_path / "exploded").exists()


def test_unreadable_file(mini, tmp_path):
    put(mini, tmp_path)
    file = tmp_path / "cifar-10-batches-py/test_batch"
    file.unlink()
    file.mkdir()
    with pytest.raises(data.InputError, match="cannot read .*test_batch"):
        data.load_cifar("cifar10", tmp_path, train=False)


@pytest.mark.parametrize("answers, requests", [
    (lambda raw: [send(raw)], 1),
    (lambda raw: [send(raw, pause=0.05)], 1),
    (lambda raw: [send(raw, length=False)], 1),
    (lambda raw: [send(raw, len(raw) // 2), send(raw)], 2),
    (lambda raw: [send(raw, 0), fail(503), send(raw)], 3),
], ids=["whole", "slow", "no length", "cut once", "cut, then 503"])
def test_download(mini, tmp_path, serve, capsys, answers, requests):
    paths = serve(*answers(packed(mini)))
    root = tmp_path / "new" / "folder"
    _, targets = data.load_cifar("cifar10", root, train=True)
    assert targets.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert found(root) == mini and paths == ["/cifar-10-python.tar.gz"] * requests
    assert "cifar-10-python.tar.gz" in capsys.readouterr().err
    data.load_cifar("cifar10", root, train=False)
    assert len(paths) == requests


def test_progress_line_on_a_terminal(mini, tmp_path, serve, capsys, monkeypatch):
    raw = packed(mini) + bytes(3_000_000)
    serve(send(raw))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    data.load_cifar("cifar10", tmp_path, train=True)
    shown = capsys.readouterr().err
    assert shown.startswith("\r") and shown.endswith("3 of 3 MB\n") and shown.count("\n") == 1


def test_download_adds_what_is_missing_only(mini, tmp_path, serve):
    serve(send(packed(mini)))
    name = "cifar-10-batches-py/data_batch_2"
    put({name: mini[name]}, tmp_path)
    before = (tmp_path / name).stat().st_ino
    data.load_cifar("cifar10", tmp_path, train=True)
    assert found(tmp_path) == mini and (tmp_path / name).stat().st_ino == before


def other(mini, **changes):
    return {name: changes.get(name.rpartition("/")[2], raw) for name, raw in mini.items()}


@pytest.mark.parametrize("answer, message, requests", [
    (lambda mini: send(packed(mini), 100), "closed after 100 of", 3),
    (lambda mini: fail(500), "500", 3),
    (lambda mini: fail(404), "404", 1),
    (lambda mini: fail(403), "403", 1),
    (lambda mini: send(b"<html>busy</html>"), "not a whole .tar.gz", 1),
    (lambda mini: send(packed(mini)[:-3000]), "not a whole .tar.gz", 1),
    (lambda mini: send(b""), "not a whole .tar.gz", 1),
    (lambda mini: send(packed(other(mini, data_batch_1=b"no"))), "data_batch_1 in it is not", 1),
    (lambda mini: send(packed({})), "lacks data_batch_1", 1),
    (lambda mini: send(b"x" * 400_000), "larger than", 1),
    (lambda mini: send(b"x" * 400_000, length=False), "larger than", 1),
    (lambda mini: send(b"x" * 400_000, sent=10), "larger than", 1),
    (lambda mini: send(packed(other(mini, data_batch_1=bytes(400_000)))), "too large", 1),
], ids=["always cut", "500", "404", "403", "no archive", "cut archive", "empty", "wrong content",
        "other archive", "oversize", "oversize, no length", "oversize announced", "large member"])
def test_download_fails(mini, tmp_path, serve, monkeypatch, answer, message, requests):
    monkeypatch.setattr(data, "MAX_BYTES", 300_000)
    paths = serve(answer(mini))
    with pytest.raises(data.InputError, match=message) as caught:
        data.load_cifar("cifar10", tmp_path, train=True)
    assert found(tmp_path).items() <= mini.items() and len(paths) == requests  # whole or not at all
    for part in (data.CIFAR_URL + "cifar-10-python.tar.gz", str(tmp_path), "data_batch_5"):
        assert part in str(caught.value)


def test_no_network(mini, tmp_path, serve, monkeypatch):
    serve(fail(404))
    monkeypatch.setattr(data, "CIFAR_URL", "http://127.0.0.1:1/")
    with pytest.raises(data.InputError, match="(?s)cannot be downloaded.*By hand"):
        data.load_cifar("cifar10", tmp_path, train=False)
    assert not found(tmp_path)


def test_no_answer(mini, tmp_path, serve, monkeypatch):
    monkeypatch.setattr(data, "TIMEOUT", 0.05)
    paths = serve(lambda handler: time.sleep(0.2))
    with pytest.raises(data.InputError, match="timed out"):
        data.load_cifar("cifar10", tmp_path, train=False)
    assert len(paths) == 3


def test_hostile_archive(mini, tmp_path, serve):
    def entry(name, kind=tarfile.REGTYPE, link=""):
        made = tarfile.TarInfo(name)
        made.type, made.linkname, made.size = kind, link, 3 * (kind == tarfile.REGTYPE)
        return made
    folder = "cifar-10-batches-py"
    raw = packed(mini, entry("../evil"), entry(f"{folder}/../../evil"), entry(f"{tmp_path}/evil"),
                 entry(f"{folder}/evil"), entry("test_batch"), entry(f"/{folder}/test_batch"),
                 entry(f"{folder}/test_batch", tarfile.SYMTYPE, "/etc/hostname"),
                 entry(f"{folder}/data_batch_1", tarfile.LNKTYPE, "../evil"),
                 entry(f"{folder}/data_batch_2", tarfile.CHRTYPE),
                 entry(f"{folder}/data_batch_3", tarfile.FIFOTYPE),
                 entry(folder, tarfile.SYMTYPE, ".."))
    serve(send(raw))
    data.load_cifar("cifar10", tmp_path / "root", train=True)
    assert found(tmp_path) == {f"root/{name}": raw for name, raw in mini.items()}


def test_root_or_folder_is_a_file(mini, tmp_path, serve):
    serve(send(packed(mini)))
    (tmp_path / "root").write_text("mine")
    put({"data/cifar-10-batches-py": b"mine"}, tmp_path)
    for root in ("root", "root/below", "data"):
        with pytest.raises(data.InputError, match=f"cannot write to .*{root}"):
            data.load_cifar("cifar10", tmp_path / root, train=True)
    assert found(tmp_path) == {"root": b"mine", "data/cifar-10-batches-py": b"mine"}


@pytest.mark.parametrize("where, error", [
    ("fsync", KeyboardInterrupt), ("replace", KeyboardInterrupt), ("replace", OSError(28, "full"))])
def test_interrupted_while_writing(mini, tmp_path, serve, monkeypatch, where, error):
    serve(send(packed(mini)))

    def interrupt(*_):
        raise error
    monkeypatch.setattr(os, where, interrupt)
    with pytest.raises((KeyboardInterrupt, data.InputError)):
        data.load_cifar("cifar10", tmp_path, train=True)
    assert not found(tmp_path)


def test_interrupted_while_downloading(mini, tmp_path, serve, monkeypatch):
    serve(send(packed(mini), 10))

    def interrupt(_):
        raise KeyboardInterrupt
    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.load_cifar("cifar10", tmp_path, train=True)
    assert not found(tmp_path)


def test_full_disk_is_not_retried(mini, tmp_path, serve, monkeypatch):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(28, "No space left on device")
    paths = serve(send(packed(mini)))
    monkeypatch.setattr(data.tempfile, "TemporaryFile", lambda dir: Full())
    with pytest.raises(data.InputError, match="cannot write to .*No space left"):
        data.load_cifar("cifar10", tmp_path, train=True)
    assert len(paths) == 1


def test_two_at_once(mini, tmp_path, serve):
    serve(send(packed(mini), pause=0.02))
    results = []
    threads = [threading.Thread(target=lambda: results.append(
        data.load_cifar("cifar10", tmp_path, train=True)[1].tolist())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[0, 9, 1, 9, 2, 9, 3, 9, 4, 9]] * 4 and found(tmp_path) == mini


# ---- the program: README, reuse, reports, the step itself

README = (HERE / "README.md").read_text()


def run(*argv, status=0):
    assert kd_lt.main([str(word) for word in argv]) == status


def log_of(folder, timing=("images_per_second",)):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]
    return [{key: value for key, value in row.items() if key not in timing} for row in rows]


def only_run(runs, method):
    (folder,) = Path(runs).glob(f"*-{method}-*")
    return folder


def readme_commands():
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    found = [re.search(r"python (kd_lt\.py .*)", line) for line in lines]
    return [match[1].split()[1:] for match in found if match]


@pytest.fixture(scope="module")
def readme_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (40, 32, 32, 3), np.uint8), np.arange(40) % 4
    np.savez(folder / "mine.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    run("--smoke", "--epochs", 1, "--method", "ce", "--runs-dir", folder / "runs" / "smoke")
    return folder


@pytest.mark.parametrize("command", readme_commands(), ids=" ".join)
def test_every_readme_command_runs_with_smoke_added(command, readme_folder, monkeypatch, capsys):
    monkeypatch.chdir(readme_folder)
    if "--plot" in command:
        pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    if "--help" in command:
        with pytest.raises(SystemExit, match="0"):
            kd_lt.main(command)
        assert "reconstruction" in capsys.readouterr().out
        return
    short = [] if {"--table", "--plot"} & {*command} else ["--epochs", 1, "--device", "cpu"]
    run(*command, "--smoke", *short)
    out = capsys.readouterr().out
    expected = {"--bench": "ratio", "--table": "| synthetic |", "--plot": "plot     results.png"}
    assert next((text for flag, text in expected.items() if flag in command), "student (") in out


def test_ci_runs_the_readme_test_command():
    (command,) = re.findall(r"^python3 -m venv .*pytest .*$", README, re.M)
    words = (HERE / ".ci" / "run").read_text().replace(" -q -r ", " -r ")
    assert command in words


def test_readme_snippet_runs_as_it_stands():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(snippet, names)
    assert names["student_logits"].grad.abs().sum() > 0


def test_run_all_divides_the_work_and_prints_the_table(tmp_path):
    settings = dict(METHODS="ce kd", SEEDS="0", DATASET="synthetic", STUDENT="resnet8")
    settings |= dict(TEACHER="resnet8", EPOCHS="2", RUNS=str(tmp_path), PYTHON=sys.executable)
    settings |= dict(EXTRA="--batch-size 128 --device cpu", OMP_NUM_THREADS="1")
    command = ["bash", str(HERE / "run_all.sh")]
    copies = [
        subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [copy.communicate(timeout=120)[0] for copy in copies]
    assert [copy.returncode for copy in copies] == [0, 0]
    assert sorted(path.name.split("-")[2] for path in tmp_path.iterdir()) == ["ce", "ce", "kd"]
    for folder in tmp_path.iterdir():  # the line before the rows: once for each run
        trained = sum(f"epochs, in {folder}\n" in output for output in outputs)
        assert trained == 1, folder
    last = max(outputs, key=lambda output: output.count("| synthetic |"))
    assert last.count("| synthetic |") == 2 and "+ " + sys.executable in last


@pytest.mark.parametrize("a, b", [
    ("--method kd", "--method bkd --bkd-start 1"),  # before its start BKD is KD
    ("--method bsce", "--method krdistill --alpha 0 --gamma 0"),  # both parts off
])
def test_methods_that_coincide_leave_the_same_log(a, b, tmp_path):
    for name, flags in (("a", a), ("b", b)):
        fixed = ("--smoke", "--epochs", 2, "--device", "cpu", "--runs-dir", tmp_path / name)
        run(*fixed, *flags.split())
    logs = [log_of(only_run(tmp_path / n, f.split()[1])) for n, f in (("a", a), ("b", b))]
    assert logs[0] == logs[1]


def test_smoke_learns(tmp_path):
    run("--smoke", "--device", "cpu", "--runs-dir", tmp_path)
    result = json.loads((only_run(tmp_path, "bkd") / "result.json").read_text())
    teacher = result["teachers"][0]
    assert result["top1"] > 40 and teacher["top1"] > 40 and result["many"] > 80
    assert result["few"] > teacher["few"]  # what BKD is for


def test_bkd_weights_act_from_the_start_that_is_set(tmp_path):
    flags = ("--smoke", "--epochs", 4, "--device", "cpu", "--runs-dir")
    run(*flags, tmp_path / "kd", "--method", "kd")
    run(*flags, tmp_path / "bkd", "--method", "bkd", "--bkd-start", 0.5)
    kd, bkd = log_of(only_run(tmp_path / "kd", "kd")), log_of(only_run(tmp_path / "bkd", "bkd"))
    assert [a["loss"] == b["loss"] for a, b in zip(kd, bkd)] == [True, True, False, False]


def settings_for(method, data, *flags, precision="fp32"):
    args = kd_lt.parse_flags(["--smoke", "--method", method, *flags])
    kd_lt.check_flags(args)
    return kd_lt.resolve(args, data, precision)


@pytest.fixture(scope="module")
def made_up():
    return data.load_dataset("synthetic", ".", 100)


@pytest.mark.parametrize("method, key", [
    (method, key) for method in DISTILLING for key in kd_lt.METHODS[method].defaults
    if key not in (*kd_lt.TEACHER, "num_teachers")])
def test_flags_of_the_loss_reach_it(method, key, made_up):
    flag = "--" + key.replace("_", "-")
    hyper = settings_for(method, made_up, flag, "0.7")["hyper"]
    assert hyper == settings_for(method, made_up)["hyper"] | {key: 0.7}


@pytest.mark.parametrize("method", DISTILLING)
def test_method_loss_passes_every_number_on(method):
    x = make_case(generator(19), 8, 6)
    h = {"kd": {}, "bkd": dict(beta=0.8), "cbd": dict(beta=7.0), "krdistill": dict(gamma=5.0),
         "ltkd": dict(beta=3.0)}[method] | dict(alpha=0.3)
    h |= dict(temperature=1.7) if method in SOFT else {}
    means, f_t = torch.randn(6, 6, generator=generator(20)).double(), torch.cat(x.f_t, 1)
    x.r = rectify_features(f_t, x.y, means, balanced_prototypes(means))
    student = models.Output(x.z_s, x.f_s / 2)
    teachers = [models.Output(x.z_t, f) for f in (x.f_t if method == "cbd" else [f_t])]
    c = SimpleNamespace(**h, class_counts=doubles(x.n), weight_counts=doubles(x.n),
                        adapter=lambda f: 2 * f if method == "krdistill" else f, class_means=means,
                        prototypes=balanced_prototypes(means), teacher_tilt=0.0)
    ours = kd_lt.method_loss(method, student, teachers, x.y, c)
    assert ours.item() == pytest.approx(LOSSES[method](x, **h).item(), rel=1e-12)


def test_flags_of_the_data_reach_it(tmp_path):
    for more in ((), ("--imb", 10), ("--imb-type", "step"), ("--subset-seed", 1)):
        fixed = ("--smoke", "--method", "ce", "--epochs", 1, "--device", "cpu")
        run(*fixed, "--runs-dir", tmp_path, *more)
    configs = [json.loads(path.read_text()) for path in tmp_path.glob("*/config.json")]
    assert len({config["settings"]["data"] for config in configs}) == 4


@pytest.mark.parametrize("method", kd_lt.METHODS)
def test_the_step_stays_on_its_device_and_reads_nothing_back(method, made_up, monkeypatch):
    """On "meta" a CPU tensor in the step, or a value asked of a tensor, is an error."""
    sgd = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda p, *_, **__: sgd(p, 0.1, 0.9, foreach=False))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(kd_lt, "balanced_prototypes", torch.clone)  # once a run, not in the step
    settings = settings_for(method, made_up) | {"colour": method == "cbd"}
    device = torch.device("meta")
    step_run, _ = kd_lt.untrained(settings, made_up, device)
    step_run.student.train()
    for size in step_run.batches.sizes[-2:]:
        step_run.step(size)
    assert {tensor.device for tensor in step_run.state} == {device}


def test_frozen_teachers_say_what_autocast_would(made_up):
    """Its convolutions' weights are cast once instead of in every step: the same bits."""
    mixed, device = kd_lt.autocast(torch.device("cpu"), "bf16"), torch.device("cpu")
    model = build_model("resnet8", 10).eval()
    plain = kd_lt.predict(model, made_up.test_images[:50], device, mixed)
    frozen = kd_lt.predict(kd_lt.freeze(model, "bf16"), made_up.test_images[:50], device, mixed)
    assert model.conv1.weight.dtype == torch.bfloat16 and model.bn1.weight.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(plain, frozen))
    assert kd_lt.freeze(build_model("resnet8", 10), "fp32").conv1.weight.dtype == torch.float32


@pytest.mark.parametrize("method", kd_lt.METHODS)
def test_every_step_runs_the_same_operations_on_the_same_memory(method, made_up):
    """What a CUDA graph needs: no data-dependent operation, state that never moves."""
    names = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    step_run, _ = kd_lt.untrained(settings_for(method, made_up), made_up, torch.device("cpu"))
    step_run.start_epoch(0, torch.Generator().manual_seed(0))
    places, seen = [tensor.data_ptr() for tensor in step_run.state], []
    for _ in range(3):
        with Record():
            step_run.step(64)
        seen.append(names.copy())
        names.clear()
    assert seen[1] == seen[2]  # the first has no gradients to drop yet
    assert not [name for name in seen[2] if "_local_scalar" in name or "nonzero" in name]
    assert places == [tensor.data_ptr() for tensor in step_run.state]


def test_the_step_is_plain_sgd_with_momentum_and_decay(made_up):
    settings = settings_for("ce", made_up, "--lr", "0.5", "--weight-decay", "0.01")
    step_run, _ = kd_lt.untrained(settings, made_up, torch.device("cpu"))
    step_run.start_epoch(4, torch.Generator().manual_seed(0))
    for tensor in step_run.momentum:
        tensor.normal_()
    weights = [p.detach().clone() for p in step_run.student.parameters()]
    momentum = [m.clone() for m in step_run.momentum]
    step_run.step(64)
    rate = kd_lt.learning_rate(4, settings["epochs"], 0.5)
    for p, w, m, v in zip(step_run.student.parameters(), weights, momentum, step_run.momentum):
        torch.testing.assert_close(v, 0.9 * m + p.grad + 0.01 * w)
        torch.testing.assert_close(p.detach(), w - rate * (0.9 * m + p.grad + 0.01 * w))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", kd_lt.METHODS)
def test_replays_equal_eager_steps_on_cuda(method, precision, made_up, monkeypatch):
    """From one state, partial last batch included; and an eager step never waits for the device."""
    for name, value in (("deterministic", True), ("benchmark", False), ("allow_tf32", False)):
        monkeypatch.setattr(torch.backends.cudnn, name, value)
    device, losses = torch.device("cuda"), []
    settings = settings_for(method, made_up, precision=precision) | {"colour": method == "cbd"}
    step_run, _ = kd_lt.untrained(settings, made_up, device)
    before = [tensor.clone() for tensor in step_run.state]
    replay = kd_lt.capture(step_run)
    for tensor, value in zip(step_run.state, before, strict=True):
        torch.testing.assert_close(tensor, value, rtol=0, atol=0)  # the warm-up left no trace
    for step in (replay, step_run.step):
        with torch.no_grad():
            for tensor, value in zip(step_run.state, before):
                tensor.copy_(value)
        generator = torch.Generator().manual_seed(0)
        for epoch in range(2):  # the second has another learning rate
            step_run.start_epoch(epoch, generator)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for size in step_run.batches.sizes:
                    step(size)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            losses.append(step_run.losses.clone())
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(losses[1], losses[3], rtol=2e-2, atol=2e-2)


def stored(folder, top1, seed, **changes):
    settings = dict(dataset="cifar100", data="0", imb=100.0, imb_type="exp", subset_seed=0)
    settings |= dict(method="ce", network="resnet32", head="linear", colour=False, teachers=[])
    settings |= dict(precision="bf16")
    settings |= kd_lt.RECIPE | dict(hyper={}, seed=seed) | changes
    result = dict(settings=settings, version="1.0.0", seconds=60.0, devices=["a GPU"], teachers=[])
    result |= dict(top1=top1, many=60.0, medium=None, few=2.0)
    result |= dict(class_counts=[9, 5], per_class=[60, 2])
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "log.jsonl").write_text('{"command": ""}\n{"epoch": 1, "top1": 30.0}\n')


def test_table_averages_seeds_and_never_settings(tmp_path, capsys):
    stored(tmp_path / "a", 38.0, 0)
    stored(tmp_path / "b", 40.0, 1)
    stored(tmp_path / "c", 20.0, 0, lr=0.2)
    stored(tmp_path / "d", 30.0, 0, epochs=30)
    (tmp_path / "unfinished").mkdir()
    run("--table", tmp_path, tmp_path / "a")  # named twice, counted once
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| cifar100")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [cell[2:8] for cell in cells] == [
        ["ce", "resnet32", "30", "bf16", "1", "30.00"],
        ["ce", "resnet32", "200", "bf16", "2", "39.00 ± 1.41"],
        ["ce (lr 0.2)", "resnet32", "200", "bf16", "1", "20.00"],
    ]
    assert [cell[9] for cell in cells] == ["-"] * 3  # an empty group is absent, not 0 %
    assert [cell[-1] for cell in cells] == ["-", "37.73 [1], 39.62 [2]", "-"]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_draws_or_says_what_is_missing(suffix, tmp_path, monkeypatch, capsys):
    stored(tmp_path / "runs" / "a", 38.0, 0)
    stored(tmp_path / "runs" / "b", 40.0, 1)
    picture = tmp_path / f"picture{suffix}"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        run("--plot", picture, tmp_path / "runs", status=2)
        assert "pip install matplotlib" in capsys.readouterr().err and not picture.exists()
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    run("--plot", picture, tmp_path / "runs")
    assert picture.stat().st_size > 5000


def test_groups_are_by_training_count_and_absent_when_empty():
    images, targets = torch.zeros(4, 3, 32, 32), torch.tensor([0, 0, 1, 2])
    part = data.Dataset("x", None, None, images, targets, [101, 20, 19, 100], "")
    logits = torch.eye(4)[[0, 1, 1, 3]]

    class Fixed(torch.nn.Module):
        def forward(self, images):
            return logits[: len(images)], logits[: len(images)]

    device = torch.device("cpu")
    full = kd_lt.autocast(device, "fp32")
    scores = kd_lt.test(Fixed(), part, device, full)
    assert (scores["top1"], scores["many"], scores["medium"], scores["few"]) == (50, 50, 100, 0)
    assert scores["per_class"] == [50, 100, 0, None]
    alone = kd_lt.test(Fixed(), part._replace(class_counts=[200] * 4), device, full)
    assert alone["medium"] is None and alone["few"] is None


@pytest.mark.skipif(not REAL.exists(), reason=f"no CIFAR in {REAL} (set KD_LT_DATA)")
def test_one_epoch_on_real_cifar_100(tmp_path, capsys):
    flags = ["--student", "resnet8", "--epochs", 1, "--lr", 0.5, "--device", "cpu"]
    run("--method", "bsce", "--imb", 100, "--data-dir", REAL, "--runs-dir", tmp_path, *flags)
    out = capsys.readouterr().out
    assert "10,847 training images" in out and "35 many, 35 medium, 30 few; 10,000 test" in out
    assert json.loads(next(tmp_path.glob("*/result.json")).read_text())["top1"] > 2


# ---- what goes wrong: kills, locks, bad input, bad numbers

FORKED = multiprocessing.get_context("forkserver")  # real processes that need not import torch
FORKED.set_forkserver_preload([__name__, "torch._dynamo"])  # the first optimizer imports dynamo


@pytest.fixture(autouse=True, scope="module")
def one_thread():  # batches of eight images are slower on more
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_npz(path, counts):
    rng = np.random.RandomState(0)
    y_train, y_test = np.repeat(np.arange(len(counts)), counts), np.arange(6) % len(counts)
    x = [rng.randint(256, size=(len(y), 32, 32, 3), dtype=np.uint8) for y in (y_train, y_test)]
    np.savez(path, x_train=x[0], y_train=y_train, x_test=x[1], y_test=y_test)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """9 images an epoch in batches of 4: the smallest class and the last batch are one image."""
    return make_npz(tmp_path_factory.mktemp("data") / "tiny.npz", [5, 3, 1])


def flags(npz, runs, text):
    fixed = ["--smoke", "--device", "cpu", "--precision", "fp32", "--runs-dir", str(runs)]
    fixed += ["--dataset", str(npz), "--imb", "1", "--batch-size", "4"]
    return fixed + shlex.split(text)  # the last of a repeated flag wins


def main(capsys, argv):
    """Status, standard output, standard error."""
    capsys.readouterr()
    try:
        status = kd_lt.main(argv)
    except SystemExit as end:  # argparse's
        status = end.code
    return status, *capsys.readouterr()


def plain(content):
    if isinstance(content, torch.Tensor):
        return content.dtype, tuple(content.shape), content.numpy().tobytes()
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items() if key != "seconds"}
    return [plain(value) for value in content] if isinstance(content, list) else content


def outcome(runs):
    """Every number of every run there, by folder name; no times and speeds."""
    found = {}
    for folder in sorted(Path(runs).iterdir()):
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]
        for row in rows:
            assert row.pop("images_per_second") > 0
        assert [row["epoch"] for row in rows] == [*range(1, len(rows) + 1)]
        result = json.loads((folder / "result.json").read_text())
        checkpoint = torch.load(folder / "last.pt", weights_only=True)
        assert checkpoint["epoch"] == len(rows) == result["settings"]["epochs"]
        found[folder.name] = [plain(one) for one in (checkpoint, rows, result)]
    assert not [*Path(runs).glob("*/*.partial")]
    return found


def files(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock"}


def wait_until(met, seconds=60):
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def child(argv, out, file_limit=None):
    sys.stdout = sys.stderr = open(out, "w", buffering=1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    train = kd_lt.train

    def announced(*args):
        print("TRAINING")
        return train(*args)

    kd_lt.train = announced
    sys.exit(kd_lt.main(argv))


def start(argv, out, file_limit=None):
    out.write_text("")
    process = FORKED.Process(target=child, args=(argv, out, file_limit))
    process.start()
    return process


# ---- resume


@pytest.mark.parametrize("text", ["--method krdistill", "--method cbd --num-teachers 2"])
def test_killed_at_random_moments(tiny, tmp_path, text, capsys):
    text += " --epochs 6 --eval-every 4"
    out, runs, kills, landed, whole = tmp_path / "out", tmp_path / "runs", 0, 0, tmp_path / "whole"
    assert main(capsys, flags(tiny, whole, text))[0] == 0
    seconds = sum(json.loads(path.read_text())["seconds"] for path in whole.glob("*/result.json"))
    want = outcome(whole)
    rng, delays = random.Random(text), []
    while kills < 12:
        process, delay = start(flags(tiny, runs, text), out), rng.uniform(0, seconds / 3)
        if kills % 4:  # else the first moments, with the data, the lock and the estimate
            wait_until(lambda: "TRAINING" in out.read_text() or process.exitcode is not None)
        delays.append(delay)
        process.join(delay)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        landed += process.exitcode == -signal.SIGKILL and "TRAINING" in out.read_text()
        if process.exitcode == 0:  # it was quicker: that one must be right, and the next is new
            assert outcome(runs) == want, delays
            shutil.rmtree(runs)
        else:
            assert process.exitcode == -signal.SIGKILL, (out.read_text(), delays)
    status, shown, err = main(capsys, flags(tiny, runs, text))  # the dead left their locks
    assert status == 0, (err, delays)
    assert outcome(runs) == want, delays
    assert landed >= 8, delays


def test_ctrl_c(tiny, tmp_path, capsys):
    runs, out, text = tmp_path / "runs", tmp_path / "out", "--method ce --epochs 20"
    process = start(flags(tiny, runs, text), out)
    wait_until(lambda: [*runs.glob("*/last.pt")])
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130, out.read_text()
    assert "interrupted; the same command continues" in out.read_text().splitlines()[-1]
    assert "Traceback" not in out.read_text() and not [*runs.glob("*/result.json")]
    status, shown, _ = main(capsys, flags(tiny, runs, text))
    assert status == 0 and "resumed  after epoch" in shown
    main(capsys, flags(tiny, tmp_path / "whole", text))
    assert outcome(runs) == outcome(tmp_path / "whole")


@pytest.mark.parametrize("stop, status, message", [
    (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
])
def test_stopped_at_every_write(tiny, tmp_path, capsys, monkeypatch, stop, status, message):
    """Also between the log's line and the checkpoint, and between the last one and the result."""
    text, fsync, n = "--method ce --epochs 2", os.fsync, 0
    assert main(capsys, flags(tiny, tmp_path / "whole", text))[0] == 0
    want = outcome(tmp_path / "whole")
    while True:
        runs, calls = tmp_path / f"runs{n}", []

        def failing(descriptor):
            calls.append(descriptor)
            if len(calls) > n:
                raise stop
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", failing)
        ended, _, err = main(capsys, flags(tiny, runs, text))
        monkeypatch.undo()
        if len(calls) <= n:
            break
        assert ended == status and message in err and err.count("\n") == 1, n
        if isinstance(stop, OSError):
            assert str(runs) in err, f"write {n}: the message names no file: {err}"
        assert not [*runs.glob("*/*.partial")]
        for last in runs.glob("*/last.pt"):
            kd_lt.load_run(last)
        assert main(capsys, flags(tiny, runs, text))[0] == 0, n
        assert outcome(runs) == want, n
        n += 1
    assert n == 7  # config, log, 2 x (line, checkpoint), result


def test_full_disk(tiny, tmp_path, capsys, monkeypatch):
    text, runs, out = "--method ce --epochs 3", tmp_path / "runs", tmp_path / "out"
    save, calls = kd_lt.save_checkpoint, []

    def once(*args):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        save(*args)

    monkeypatch.setattr(kd_lt, "save_checkpoint", once)
    assert main(capsys, flags(tiny, runs, text))[0] == 130
    monkeypatch.undo()
    (last,) = runs.glob("*/last.pt")
    before = last.read_bytes()
    process = start(flags(tiny, runs, text), out, file_limit=len(before) // 2)
    process.join()
    assert process.exitcode == 1, out.read_text()
    assert str(runs) in out.read_text().splitlines()[-1] and "Traceback" not in out.read_text()
    assert last.read_bytes() == before and not [*runs.glob("*/*.partial")]
    assert main(capsys, flags(tiny, runs, text))[0] == 0
    assert main(capsys, flags(tiny, tmp_path / "whole", text))[0] == 0
    assert outcome(runs) == outcome(tmp_path / "whole")


# ---- one writer


def test_one_writer(tiny, tmp_path, capsys):
    runs, outs = tmp_path / "runs", [tmp_path / "kd", tmp_path / "bkd"]
    argv = [flags(tiny, runs, f"--epochs 2 --method {out.name}") for out in outs]
    assert main(capsys, [*argv[0], "--runs-dir", str(tmp_path / "whole")])[0] == 0
    want = outcome(tmp_path / "whole")
    (teacher,) = (name for name in want if "-from-" not in name)
    (student,) = (name for name in want if "-from-" in name)
    with kd_lt.only_writer(runs / teacher, wait=False):
        both = [start(*pair) for pair in zip(argv, outs)]
        wait_until(lambda: all("waiting" in out.read_text() for out in outs))
        assert all(str(runs / teacher) in out.read_text() for out in outs)
        status, _, err = main(capsys, argv[0])
        assert status == 75 and str(runs / student) in err and str(both[0].pid) in err
    for process in both:
        process.join()
    shown = [out.read_text() for out in outs]
    assert [process.exitcode for process in both] == [0, 0], shown
    assert sorted(text.count("TRAINING") for text in shown) == [1, 2]
    assert sum("finished before" in text for text in shown) == 1
    found = outcome(runs)
    assert len(found) == 3 and {name: found[name] for name in want} == want


# ---- bad input

BAD = [(f"--imb {value}", "--imb") for value in ("0.5", "nan", "inf", "many", "0", "-3", "201")]
BAD += [(f"{flag} {value}", flag) for flag, values in {
    "--epochs": "0 -1 1.5 x",
    "--batch-size": "0 -1 2.5 x",
    "--lr": "0 -1 nan inf x",
    "--weight-decay": "-1 nan inf x",
    "--temperature": "0 -1 nan inf x",
    "--alpha": "-1 nan inf x",
    "--beta": "-1 1 nan inf x",
    "--bkd-start": "-0.1 1.1 nan x",
    "--seed": "-1 1.5 99999999999 x",
    "--subset-seed": "-1 0.5 4294967296 x",
    "--eval-every": "0 1.5 x",
    "--method": "dkd",
    "--imb-type": "linear",
    "--student": "resnet18",
    "--teacher": "vgg8",
    "--teacher-method": "kd",
    "--device": "tpu",
    "--precision": "fp64",
    "--smoke": "yes",
    "--nonsense": "1",
    "--epoch": "1",  # no abbreviations
    "--temp": "2",
    "--data": "x",
}.items() for value in values.split()]
BAD += [(f"--method {method} {flag} {value}", flag) for method, flag, value in [
    ("krdistill", "--gamma", "-1"),
    ("krdistill", "--gamma", "inf"),
    ("cbd", "--num-teachers", "0"),
    ("cbd", "--num-teachers", "1.5"),
    ("cbd", "--alpha", "1.5"),
    *((method, flag, value) for method in ("ce", "bsce") for flag, value in [
        ("--alpha", "1"), ("--beta", "0.9"), ("--gamma", "1"), ("--temperature", "2"),
        ("--bkd-start", "0"), ("--teacher", "resnet8"), ("--teacher-method", "ce"),
        ("--num-teachers", "1"), ("--teacher-checkpoint", "x")]),
    ("kd", "--beta", "0.9"),
    ("kd", "--num-teachers", "2"),
    ("kd", "--teacher-checkpoint", "a b"),
    ("bkd", "--gamma", "1"),
    ("cbd", "--temperature", "2"),
    ("krdistill", "--beta", "1"),
    ("ltkd", "--bkd-start", "0.5"),
]]
BAD += [
    ("--method kd --teacher resnet8 --teacher-checkpoint x", "--teacher-checkpoint"),
    ("--method kd --teacher-checkpoint", "--teacher-checkpoint"),
    ("--dataset mnist", "mnist"),
    ("--dataset absent.npz", "absent.npz"),
    ("--dataset x.npz --imb 1 --imb-type step", "--imb-type"),
    ("--dataset x.npz --imb 1 --subset-seed 1", "--subset-seed"),
    ("--table --epochs 3", "--epochs"),
    ("--plot results.png --method cbd", "--method"),
    ("--table absent", "absent"),
    ("--plot results.txt", "results.txt"),
    ("--plot results.png absent", "absent"),
    ("unexpected", "unexpected"),
]


def refused(capsys, argv, *fragments):
    status, out, err = main(capsys, argv)
    assert status not in (0, None) and "kd_lt.py: " in err and "Traceback" not in err + out
    for fragment in fragments:
        assert str(fragment) in err, err
    return err


@pytest.mark.parametrize("text, named", BAD)
def test_bad_flag(tmp_path, capsys, monkeypatch, text, named):
    monkeypatch.chdir(tmp_path)
    if text.startswith("--plot results.png"):
        pytest.importorskip("matplotlib")
    before = [] if "absent" in text else ["--smoke", "--runs-dir", "runs"]
    refused(capsys, [*before, *text.split()], named)
    assert not [*tmp_path.iterdir()]


def test_bad_surroundings(tiny, tmp_path, capsys, monkeypatch):
    runs, folder = tmp_path / "runs", tmp_path / "cifar"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(capsys, flags(tiny, runs, "--device cuda"), "--device cuda", "cpu")
    monkeypatch.setattr(data, "CIFAR_URL", "http://127.0.0.1:9/")
    monkeypatch.setattr(data, "PAUSE", 0)
    refused(capsys, flags("cifar10", runs, f"--data-dir {folder}"), folder, "By hand")
    two = make_npz(tmp_path / "two.npz", [3, 3])
    refused(capsys, flags(two, runs, "--method ltkd"), "3 classes")
    assert not runs.exists()
    runs.write_text("a file")
    refused(capsys, flags(tiny, runs, "--method ce"), runs)
    assert runs.read_text() == "a file"


def test_out_of_memory(tiny, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(kd_lt, "train", full)
    argv = flags(tiny, tmp_path, "--method ce")
    assert "CUDA" in refused(capsys, argv, "out of memory", "--batch-size 4")
    assert kd_lt.main(argv) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_that_cannot_be_written(finished):
    command = [sys.executable, HERE / "kd_lt.py", "--table", finished[0].parent]
    read, closed = os.pipe()
    os.close(read)
    for stdout, message in ((closed, ""), ("/dev/full", "standard output: No space left")):
        with open(stdout, "w") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1 and message in done.stderr
        assert done.stderr.count("\n") == bool(message)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """Teacher and student of a finished kd run, as paths; not to be changed."""
    runs = tmp_path_factory.mktemp("finished")
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):
        assert kd_lt.main(flags(tiny, runs, "--method kd --epochs 2")) == 0
    teacher, student = sorted(runs.iterdir(), key=lambda p: "-from-" in p.name)
    return teacher, student


def edit(content, path, value):
    *parents, last = path
    for key in parents:
        content = content[key]
    content[last] = value


CHECKPOINTS = {  # an edit of the teacher's checkpoint: keys and the new value; then the message's
    "unfinished": ([(["epoch"], 1)], "epoch 1 of 2"),
    "architecture": ([(["network", "name"], "resnet14")], "disagree"),
    "no such network": ([(["network", "name"], "vgg8")], "vgg8"),
    "classes alone": ([(["network", "num_classes"], 5)], "disagree"),
    "classes": ([(["network", "num_classes"], 5), (["student", "head.weight"], torch.ones(5, 64)),
                 (["student", "head.bias"], torch.ones(5))], "5"),
    "imbalance": ([(["settings", "imb"], 50.0)], "imb is 50"),
    "profile": ([(["settings", "imb_type"], "step")], "imb_type is step"),
    "subset": ([(["settings", "subset_seed"], 7)], "subset_seed is 7"),
    "data set": ([(["settings", "dataset"], "cifar10")], "dataset is cifar10"),
    "other images": ([(["settings", "data"], "0" * 16)], "data is 0000"),
    "head": ([(["settings", "head"], "cosine")], "head is cosine"),
    "no settings": ([(["settings"], {})], ""),
    "epochs missing": ([(["settings", "epochs"], None)], ""),
    "weights a list": ([(["student"], [])], ""),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_foreign_teacher(tiny, finished, tmp_path, capsys, name):
    edits, message = CHECKPOINTS[name]
    content, file = torch.load(finished[0] / "last.pt", weights_only=True), tmp_path / "teacher.pt"
    for path, value in edits:
        edit(content, path, value)
    torch.save(content, file)
    argv = flags(tiny, tmp_path / "runs", f"--method kd --teacher-checkpoint {file}")
    refused(capsys, argv, file, message)
    assert not (tmp_path / "runs").exists()


def test_teacher_with_the_students_seed(tiny, finished, tmp_path, capsys):
    teacher = finished[0]  # seed 1000
    text = f"--method kd --epochs 1 --teacher-checkpoint {teacher} --seed 1000"
    refused(capsys, flags(tiny, tmp_path, text), teacher, "--seed 1000")
    assert not [*tmp_path.iterdir()]
    assert main(capsys, flags(tiny, tmp_path, text + " --student resnet14"))[0] == 0


def test_damaged_teacher(tiny, finished, tmp_path, capsys):
    whole, file, trap = (finished[0] / "last.pt").read_bytes(), tmp_path / "t.pt", tmp_path / "trap"
    content, code = torch.load(finished[0] / "last.pt", weights_only=True), io.BytesIO()
    torch.save(content | {"more": Evil(trap)}, code)
    for raw in [None, b"", b"garbage", whole[:-1], whole[: len(whole) // 2], b"PK" + whole[:100],
                pickle.dumps(Evil(trap), 2), code.getvalue()]:
        file.unlink(missing_ok=True)
        if raw is not None:
            file.write_bytes(raw)
        argv = flags(tiny, tmp_path / "runs", f"--method kd --teacher-checkpoint {file}")
        refused(capsys, argv, file)
        assert not (tmp_path / "runs").exists() and not trap.exists()
    buffer = io.BytesIO()
    torch.save(content["student"], buffer)
    file.write_bytes(buffer.getvalue())
    refused(capsys, argv, file, "of kd_lt.py")
    assert kd_lt.load_run(finished[0])(torch.zeros(1, 3, 32, 32))[0].shape == (1, 3)


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("key, value", [("lr", 0.7), ("epochs", 9), ("data", "0"), ("more", 1)])
def test_folder_of_another_run(tiny, finished, tmp_path, capsys, role, key, value):
    runs = shutil.copytree(finished[0].parent, tmp_path / "runs")
    folder = runs / finished[role == "student"].name
    config = json.loads((folder / "config.json").read_text())
    config["settings"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    before = files(folder)
    # ltkd is new here and needs that teacher; kd is the student of that folder
    method = "ltkd" if role == "teacher" else "kd"
    refused(capsys, flags(tiny, runs, f"--method {method} --epochs 2"), folder, key)
    assert files(folder) == before and len([*runs.glob("*/last.pt")]) == 2


@pytest.mark.parametrize("role, name, content", [
    ("student", "last.pt", b"garbage"),
    ("student", "last.pt", None),
    ("student", "log.jsonl", None),
    ("student", "log.jsonl", b'{"command": ""}\n{"epoch": 1}\n'),
    ("teacher", "last.pt", None),
    ("student", "config.json", b"{"),
    ("teacher", "config.json", b"\xff"),
    ("student", "config.json", b"[]"),
    ("student", "result.json", b'{"top1": 3'),
    ("student", "result.json", b"[]"),
    ("student", "result.json", b'{"top1": 3}'),
    ("teacher", "result.json", b""),
])
def test_damaged_folder(tiny, finished, tmp_path, capsys, role, name, content):
    runs = shutil.copytree(finished[0].parent, tmp_path / "runs")
    folder = runs / finished[role == "student"].name
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    if name in ("last.pt", "log.jsonl") and role == "student":  # else the result alone is read
        (folder / "result.json").unlink()
    if role == "teacher":
        shutil.rmtree(runs / finished[1].name)
    before = files(folder)
    refused(capsys, flags(tiny, runs, "--method kd --epochs 2"), folder / name)
    assert files(folder) == before


def test_weights_of_another_network_in_the_folder(tiny, finished, tmp_path, capsys):
    runs = shutil.copytree(finished[0].parent, tmp_path / "runs")
    folder = runs / finished[1].name
    (folder / "result.json").unlink()
    last = torch.load(folder / "last.pt", weights_only=True)
    for change in ({"network": last["network"] | {"name": "resnet14"}},
                   {"settings": last["settings"] | {"seed": 9}}, {"student": {}},
                   {"momentum": last["momentum"][:3]}, {"generator": None}):
        torch.save(last | change, folder / "last.pt")
        refused(capsys, flags(tiny, runs, "--method kd --epochs 2"), folder / "last.pt")


# ---- numbers


def test_loss_that_is_not_finite(tiny, tmp_path, capsys, monkeypatch):
    text, runs = "--method ce --epochs 3", tmp_path / "runs"
    usual = kd_lt.learning_rate
    monkeypatch.setattr(kd_lt, "learning_rate", lambda e, *own: usual(e, *own) * 1e30 ** (e > 0))
    status, _, err = main(capsys, flags(tiny, runs, text))
    monkeypatch.undo()
    assert status == 1 and "epoch 2, step 2" in err and "--lr" in err
    (last,) = runs.glob("*/last.pt")
    assert str(last.parent) in err
    assert torch.load(last, weights_only=True)["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in kd_lt.load_run(last).state_dict().values())
    assert main(capsys, flags(tiny, runs, text))[0] == 0
    assert main(capsys, flags(tiny, tmp_path / "whole", text))[0] == 0
    assert outcome(runs) == outcome(tmp_path / "whole")
    status, _, err = main(capsys, flags(tiny, runs, "--method kd --epochs 30 --lr 1e6"))
    assert status == 1 and "the loss is" in err and "epoch" in err and "step" in err


@pytest.mark.parametrize("method", kd_lt.METHODS)
def test_batch_of_one(tiny, tmp_path, capsys, method):
    text = f"--method {method} --epochs 3 --batch-size 1"
    status, _, err = main(capsys, flags(tiny, tmp_path, text))
    assert status == 0, err
    for checkpoint, rows, _ in outcome(tmp_path).values():
        assert all(np.isfinite(row["loss"]) for row in rows)


# ---- the same numbers again


@pytest.fixture(scope="module")
def twice(tiny, tmp_path_factory):
    """All methods in one folder and again, tested every epoch, in another; what they printed."""
    printed, folders = {}, [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for runs, more in zip(folders, ("", " --eval-every 1")):
        for method in kd_lt.METHODS:
            text = f"--method {method} --epochs 2" + " --num-teachers 2" * (method == "cbd")
            with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")) as stream:
                assert kd_lt.main(flags(tiny, runs, text + more)) == 0
            stream.seek(0)
            printed[runs, method] = stream.read()
    return *folders, printed


def test_same_numbers_again(twice):
    first, second = map(outcome, twice[:2])
    assert first.keys() == second.keys() and len(first) == 10  # seven students, three teachers
    for name in first:
        checkpoint, rows, result = first[name]
        # how often it is tested changes the log and nothing else
        assert checkpoint == second[name][0] and result == second[name][2]
        tested = second[name][1]
        assert all("top1" in row for row in tested) and "top1" not in rows[0]
        assert rows == [{k: row[k] for k in rows[i]} for i, row in enumerate(tested)]
        assert rows[-1]["top1"] == result["top1"] and len(result["per_class"]) == 3
        assert {"many", "medium", "few", "devices", "version", "teachers"} < result.keys()
        assert result["many"] is result["medium"] is None and result["class_counts"] == [5, 3, 1]
        assert result["top1"] == pytest.approx(np.mean(result["per_class"]))
        assert result["few"] == pytest.approx(np.mean(result["per_class"]))
    for path in twice[0].glob("*/result.json"):
        assert json.loads(path.read_text())["seconds"] > 0
    logs = {name: [row["loss"] for row in run[1]] for name, run in first.items()}
    assert len({str(losses) for losses in logs.values()}) == 10  # no two methods are the same


def test_teachers_are_shared(twice):
    first, _, printed = twice
    trained = {method: printed[first, method].count("epochs, in ") for method in kd_lt.METHODS}
    assert trained == dict(ce=1, bsce=1, kd=2, bkd=1, cbd=3, krdistill=1, ltkd=1)
    (cbd,) = first.glob("*cbd*/config.json")
    teachers = json.loads(cbd.read_text())["settings"]["teachers"]
    assert [teacher["colour"] for teacher in teachers] == [False, True]
    assert len({teacher["seed"] for teacher in teachers}) == 2


@pytest.mark.parametrize("teachers, colours", [(1, False), (2, True)])
def test_colour_is_distorted(tiny, tmp_path, capsys, monkeypatch, teachers, colours):
    calls, distort = [], data.distort_colour
    monkeypatch.setattr(data, "distort_colour", lambda *own: calls.append(own) or distort(*own))
    text = f"--method cbd --epochs 1 --num-teachers {teachers}"
    assert main(capsys, flags(tiny, tmp_path, text))[0] == 0
    assert bool(calls) == colours


def test_finished_run_is_not_repeated(tiny, twice, capsys):
    first = twice[0]

    def changed():
        return {path: path.stat().st_mtime_ns for path in files(first)}

    before = changed()
    status, out, _ = main(capsys, flags(tiny, first, "--method bkd --epochs 2"))
    assert status == 0 and "finished before" in out and "result" in out
    assert changed() == before


def test_global_generators_are_left_alone(tiny, tmp_path):
    def state():
        numpy = np.random.get_state()
        return torch.get_rng_state().tolist(), numpy[1].tolist(), numpy[2:], random.getstate()

    before = state()
    assert kd_lt.main(flags(tiny, tmp_path, "--method krdistill --epochs 1")) == 0
    assert state() == before


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("method", ["bkd", "krdistill"])
def test_teacher_does_not_change(tiny, finished, tmp_path, capsys, monkeypatch, method, given):
    runs = shutil.copytree(finished[0].parent, tmp_path / "runs")
    teacher, loaded, load_run = runs / finished[0].name, [], kd_lt.load_run

    def recorded(*args, **own):
        loaded.append(load_run(*args, **own))
        return loaded[-1]

    monkeypatch.setattr(kd_lt, "load_run", recorded)
    before, more = files(teacher), f" --teacher-checkpoint {teacher}" * given
    status, out, err = main(capsys, flags(tiny, runs, f"--method {method} --epochs 2" + more))
    assert status == 0, err
    assert files(teacher) == before and loaded
    weights = torch.load(teacher / "last.pt", weights_only=True)["student"]
    assert plain(dict(loaded[-1].state_dict())) == plain(dict(weights))
    assert not any(module.training for module in loaded[-1].modules())
    assert all(p.grad is None and not p.requires_grad for p in loaded[-1].parameters())
    assert len([*runs.glob("*/result.json")]) == 3


LOADER = """
import sys, numpy, torch, data, kd_lt
before = torch.get_rng_state()
model = kd_lt.load_run(sys.argv[1])
assert not model.training and torch.equal(torch.get_rng_state(), before)
arrays = numpy.load(sys.argv[2])
images = torch.from_numpy(arrays["x_test"]).permute(0, 3, 1, 2)
logits, features = model(data.normalise(images))
right = logits.argmax(1) == torch.from_numpy(arrays["y_test"])
print(100 * right.double().mean().item())
"""


def test_load_run_in_another_program(tiny, finished, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    command = [sys.executable, "-c", LOADER, finished[1], tiny]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((finished[1] / "result.json").read_text())
    assert float(done.stdout) == pytest.approx(result["top1"])
    assert not [*tmp_path.iterdir()]
