# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the kd-lt authors
"""Knowledge distillation for long-tailed recognition: vanilla KD, BKD, CBD, KRDistill, LTKD.

    python kd_lt.py --method bkd --imb 100        train a teacher, distil a student, report

Read top to bottom: the losses (free functions, made to be copied), the table of methods, one
training loop for teachers and students, and behind them run folders, reports and the flags.
"""
import argparse
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import platform
import re
import shlex
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Batches, Dataset, InputError, load_dataset, normalise
from models import NETWORKS, build_model

VERSION = "1.0.0"

# ---- losses: student and teacher tensors, targets and class counts in, one scalar out
#
# B samples, C classes, D features. Logits are (B, C), features (B, D), float of any width, on any
# device (half precision: cast to float32 first, as the training loop does); targets (B,) int64.
# class_counts: C training-image counts >= 1, any sequence or tensor. A sequence is checked; a tensor
# is used as it is, for reading it back would stall a GPU. Every loss is a mean over the batch,
# and no gradient reaches the teacher. Wrong shapes or hyperparameters raise ValueError.


def as_counts(class_counts: Sequence[float] | Tensor, num_classes: int | None = None) -> Tensor:
    """class_counts as a float64 tensor (C,)."""
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if counts.ndim != 1 or num_classes not in (None, len(counts)):
        shape, want = tuple(counts.shape), num_classes or "C"
        raise ValueError(f"class_counts must have shape ({want},), one count a class, not {shape}")
    if not isinstance(class_counts, Tensor) and not bool((counts >= 1).all()):
        raise ValueError(f"class_counts must be at least 1, the smallest is {counts.min():g}")
    return counts


def log_prior(class_counts: Sequence[float] | Tensor, logits: Tensor) -> Tensor:
    """log pi_c = log(n_c / N), (C,), with the device and dtype of logits (B, C)."""
    counts = as_counts(class_counts, logits.shape[1])
    return (counts / counts.sum()).log().to(logits)


def distillation_kl(target_log_probs: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """T^2 mean_B sum_c q_c (log q_c - log softmax(z^s/T)_c), with target_log_probs log q (B, C)."""
    if target_log_probs.shape != student_logits.shape:
        shapes = f"{tuple(target_log_probs.shape)} and {tuple(student_logits.shape)}"
        raise ValueError(f"teacher and student logits must have one shape, not {shapes}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    log_probs = F.log_softmax(student_logits / temperature, dim=1)
    divergence = F.kl_div(log_probs, target_log_probs, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def effective_number_weights(
    class_counts: Sequence[float] | Tensor, beta: float = 0.9999
) -> Tensor:
    """Inverse effective numbers of samples, scaled to mean 1 (Cui et al. 2019, arXiv 1901.05555).

    w_c = C v_c / sum_j v_j with v_c = (1 - beta) / (1 - beta^n_c). beta in [0, 1); 0 gives ones.
    Returns (C,) float64, on the device of class_counts.
    """
    counts = as_counts(class_counts)
    if not 0 <= beta < 1:
        raise ValueError(f"beta must lie in [0, 1), not {beta}")
    log_beta = math.log(beta) if beta else -math.inf
    inverse = (1 - beta) / -torch.expm1(counts * log_beta)  # expm1: exact where beta^n is near 1
    return len(counts) * inverse / inverse.sum()


def balanced_softmax_loss(
    logits: Tensor, targets: Tensor, class_counts: Sequence[float] | Tensor
) -> Tensor:
    """Balanced softmax: CE(z + log pi, y); test with plain z (Ren et al. 2020, arXiv 2007.10740).

    logits (B, C), targets (B,) int64, class_counts (C,). Scalar, mean over the batch.
    """
    return F.cross_entropy(logits + log_prior(class_counts, logits), targets)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    temperature: float = 2.0,
    alpha: float = 1.0,
) -> Tensor:
    """Vanilla distillation: CE + alpha KL_T (Hinton, Vinyals, Dean 2015, arXiv 1503.02531).

    student_logits, teacher_logits (B, C), targets (B,) int64. Scalar, mean over the batch; the KL
    term is multiplied by T^2. ValueError where shapes differ or temperature <= 0.
    """
    q = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    ce = F.cross_entropy(student_logits, targets)
    return ce + alpha * distillation_kl(q, student_logits, temperature)


def bkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    class_counts: Sequence[float] | Tensor,
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta: float = 0.9999,
) -> Tensor:
    """Balanced knowledge distillation: CE + alpha KL_T to a re-weighted teacher (arXiv 2104.10510).

    q_c = w_c p_c / sum_j w_j p_j with p = softmax(z^t/T) and w = effective_number_weights. The
    weights belong to the class columns of q: taken by the sample's label they would cancel.
    student_logits, teacher_logits (B, C), targets (B,) int64, class_counts (C,). Scalar, mean over
    the batch; the KL term is multiplied by T^2. ValueError as kd_loss, and for beta not in [0, 1).
    """
    log_w = effective_number_weights(class_counts, beta).log().to(teacher_logits)  # (C,)
    q = F.log_softmax(teacher_logits.detach() / temperature + log_w, dim=1)
    ce = F.cross_entropy(student_logits, targets)
    return ce + alpha * distillation_kl(q, student_logits, temperature)


def cbd_loss(
    student_logits: Tensor,
    student_features: Tensor,
    teacher_features: Sequence[Tensor],
    targets: Tensor,
    alpha: float = 0.4,
    beta: float = 100.0,
) -> Tensor:
    """Class-balanced distillation: (1 - alpha) CE + alpha beta L_FD (arXiv 2104.05279).

    L_FD = mean_B(1 - <s, t>), s the student's features and t the K teachers', each normalised,
    joined and normalised again. Its batches must be sampled class-balanced: nothing else in it is.
    student_logits (B, C), student_features (B, D_1 + ... + D_K), teacher_features K tensors
    (B, D_k), targets (B,) int64. Scalar, mean over the batch. ValueError where the widths differ.
    """
    t = torch.cat([F.normalize(features.detach(), dim=1) for features in teacher_features], dim=1)
    if student_features.shape != t.shape:
        shapes = f"{tuple(student_features.shape)} and {tuple(t.shape)}"
        raise ValueError(f"student features must be as wide as all teachers together, not {shapes}")
    ce = F.cross_entropy(student_logits, targets)
    l_fd = (1 - F.cosine_similarity(student_features, t, dim=1)).mean()
    return (1 - alpha) * ce + alpha * beta * l_fd


def balanced_prototypes(class_means: Tensor) -> Tensor:
    """The class arrangement that favours no direction and is nearest to the teacher's own.

    Our reconstruction of KRDistill's "balanced category priors" (arXiv 2409.07694, abstract).
    M = m_c - mean_c m_c, compact SVD M = U S V^T, P = U V^T, rows scaled to length 1: for D >= C - 1
    the simplex ETF (cosines -1/(C-1)), for smaller D the nearest tight frame before that scaling.
    class_means (C, D) float, C >= 2. Returns (C, D) in its dtype, computed in float64.
    """
    if class_means.ndim != 2 or len(class_means) < 2:
        raise ValueError(f"class_means must be (C, D) with C >= 2, not {tuple(class_means.shape)}")
    centred = class_means.double() - class_means.double().mean(0)
    u, s, vt = torch.linalg.svd(centred, full_matrices=False)
    kept = s > 1e-9 * s[0]  # the directions that the centred means span: at most C - 1
    return F.normalize(u[:, kept] @ vt[kept], dim=1).to(class_means)


def rectify_features(
    teacher_features: Tensor, targets: Tensor, class_means: Tensor, prototypes: Tensor
) -> Tensor:
    """Move each feature from its class mean to its class's balanced place (our reconstruction).

    r = norm(t - m_y + s P_y), s = mean_c |m_c - mean_c m_c|: what is particular to the image stays.
    teacher_features (B, D), targets (B,) int64, class_means and prototypes (C, D). Returns (B, D),
    rows of length 1.
    """
    scale = (class_means - class_means.mean(0)).norm(dim=1).mean()
    return F.normalize(teacher_features + (scale * prototypes - class_means)[targets], dim=1)


def rectify_logits(
    teacher_logits: Tensor, targets: Tensor, class_counts: Sequence[float] | Tensor
) -> Tensor:
    """Take the training prior out of the logits, then let the true class rank first.

    Our reconstruction (KRDistill, arXiv 2409.07694): z~ = z^t - log pi; where the largest entry is
    not the true class's, the two change places. teacher_logits (B, C), targets (B,) int64,
    class_counts (C,). Returns (B, C).
    """
    z = teacher_logits - log_prior(class_counts, teacher_logits)
    true, top = targets[:, None], z.argmax(dim=1, keepdim=True)
    return z.scatter(1, top, z.gather(1, true)).scatter(1, true, z.gather(1, top))


def krdistill_loss(
    student_logits: Tensor,
    student_features: Tensor,
    teacher_logits: Tensor,
    rectified_features: Tensor,
    targets: Tensor,
    class_counts: Sequence[float] | Tensor,
    temperature: float = 2.0,
    alpha: float = 1.0,
    gamma: float = 2.0,
) -> Tensor:
    """Knowledge rectification distillation, our reconstruction from the abstract of 2409.07694.

    L = CE(z^s + log pi, y) + alpha L_LRD + gamma L_RRD; L_LRD = KL_T to rectify_logits(z^t),
    L_RRD = mean_B(1 - <norm(g), r>). alpha = 0 or gamma = 0 switches a part off.
    student_logits, teacher_logits (B, C); student_features (B, D): g, the student's features mapped
    linearly to the teacher's width; rectified_features (B, D): r, from rectify_features; targets
    (B,) int64; class_counts (C,). Scalar, mean over the batch; L_LRD contains the factor T^2.
    """
    q = rectify_logits(teacher_logits.detach(), targets, class_counts) / temperature
    r = rectified_features.detach()
    ce = balanced_softmax_loss(student_logits, targets, class_counts)
    l_lrd = distillation_kl(F.log_softmax(q, dim=1), student_logits, temperature)
    l_rrd = (1 - F.cosine_similarity(student_features, r, dim=1)).mean()
    return ce + alpha * l_lrd + gamma * l_rrd


def grouped_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    class_counts: Sequence[float] | Tensor,
    temperature: float,
    balance: bool = True,
) -> tuple[Tensor, Tensor]:
    """KL between and within head, medium and tail: two scalars, means over the batch, without T^2.

    Classes sorted by count: first 33 % head, last 33 % tail. With balance=False the two add up to
    KL(softmax(z^t/T) || softmax(z^s/T)) exactly. balance=True: the teacher's group masses are
    rescaled so that the batch's sums are uniform, and every group's inner KL counts in full (LTKD).
    """
    counts, num_classes = as_counts(class_counts, student_logits.shape[1]), student_logits.shape[1]
    if num_classes < 3:
        raise ValueError(f"head, medium and tail need at least 3 classes, not {num_classes}")
    third = round(0.33 * num_classes)
    order = counts.argsort(descending=True, stable=True).to(student_logits.device)
    sizes = [third, num_classes - 2 * third, third]
    t = F.log_softmax(teacher_logits.detach() / temperature, dim=1)[:, order].split(sizes, dim=1)
    s = F.log_softmax(student_logits / temperature, dim=1)[:, order].split(sizes, dim=1)
    t_mass = torch.stack([group.logsumexp(dim=1) for group in t], dim=1)  # (B, 3): log p^t_G
    s_mass = torch.stack([group.logsumexp(dim=1) for group in s], dim=1)
    inner = [  # (B,): KL within the group
        F.kl_div(s_g - s_m[:, None], t_g - t_m[:, None], reduction="none", log_target=True).sum(1)
        for s_g, t_g, s_m, t_m in zip(s, t, s_mass.unbind(1), t_mass.unbind(1))
    ]
    weight = t_mass.exp()
    if balance:
        t_mass = F.log_softmax(t_mass - t_mass.logsumexp(dim=0), dim=1)
        weight = torch.ones_like(weight)
    cross = F.kl_div(s_mass, t_mass, reduction="batchmean", log_target=True)
    return cross, (weight * torch.stack(inner, dim=1)).sum(1).mean()


def ltkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    class_counts: Sequence[float] | Tensor,
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    """Long-tailed KD: CE + alpha T^2 cross + beta T^2 within (arXiv 2506.18496, our reading).

    cross and within are grouped_kl's; the paper's T, alpha and beta could not be read, so these
    defaults are ours. student_logits, teacher_logits (B, C), targets (B,) int64, class_counts (C,),
    C >= 3. Scalar, mean over the batch.
    """
    cross, within = grouped_kl(student_logits, teacher_logits, class_counts, temperature)
    ce = F.cross_entropy(student_logits, targets)
    return ce + temperature**2 * (alpha * cross + beta * within)


# ---- methods: where they differ, and nowhere else
#
# s: the student's logits and features; t: a list of the same, one entry a teacher; y: targets;
# c: what the run knows (class_counts, the hyperparameters, and for krdistill the rectification).


@dataclass(frozen=True)
class Method:
    loss: Callable  # (s, t, y, c) -> scalar
    formula: str
    source: str
    defaults: dict = field(default_factory=dict)  # its own flags; a distilling method has "teacher"
    sampler: str = "instance"
    head: str = "linear"  # of student and teachers


def krdistill_step(s, t, y, c):
    rectified = rectify_features(t[0].features, y, c.class_means, c.prototypes)
    mapped, logits = c.adapter(s.features), t[0].logits + c.teacher_tilt
    own = (c.class_counts, c.temperature, c.alpha, c.gamma)
    return krdistill_loss(s.logits, mapped, logits, rectified, y, *own)


TEACHER = {"teacher": "resnet32", "teacher_method": "ce"}
METHODS = {
    "ce": Method(
        lambda s, t, y, c: F.cross_entropy(s.logits, y),
        "CE(z, y)",
        "no distillation",
    ),
    "bsce": Method(
        lambda s, t, y, c: balanced_softmax_loss(s.logits, y, c.class_counts),
        "CE(z + log pi, y)",
        "balanced softmax, arXiv 2007.10740",
    ),
    "kd": Method(
        lambda s, t, y, c: kd_loss(s.logits, t[0].logits, y, c.temperature, c.alpha),
        "CE + alpha KL_T(p || student)",
        "arXiv 1503.02531",
        {**TEACHER, "temperature": 2.0, "alpha": 1.0},
    ),
    "bkd": Method(
        lambda s, t, y, c: bkd_loss(
            s.logits, t[0].logits, y, c.bkd_counts, c.temperature, c.alpha, c.beta
        ),
        "CE + alpha KL_T(w p / sum w p || student)",
        "arXiv 2104.10510 and its code",
        {**TEACHER, "temperature": 2.0, "alpha": 1.0, "beta": 0.9999, "bkd_start": None},
    ),
    "cbd": Method(
        lambda s, t, y, c: cbd_loss(
            s.logits, s.features, [teacher.features for teacher in t], y, c.alpha, c.beta
        ),
        "(1 - alpha) CE + alpha beta (1 - cos(s, t))",
        "arXiv 2104.05279 and its code",
        {**TEACHER, "num_teachers": 1, "alpha": 0.4, "beta": 100.0},
        sampler="class",
        head="cosine",
    ),
    "krdistill": Method(
        krdistill_step,
        "CE(z + log pi, y) + alpha L_LRD + gamma L_RRD",
        "our reconstruction of arXiv 2409.07694",
        {**TEACHER, "temperature": 2.0, "alpha": 1.0, "gamma": 2.0},
    ),
    "ltkd": Method(
        lambda s, t, y, c: ltkd_loss(
            s.logits, t[0].logits, y, c.class_counts, c.temperature, c.alpha, c.beta
        ),
        "CE + T^2 (alpha cross + beta within)",
        "arXiv 2506.18496, our reading",
        {**TEACHER, "temperature": 2.0, "alpha": 1.0, "beta": 1.0},
    ),
}


# ---- training


RECIPE = {"epochs": 200, "batch_size": 128, "lr": 0.1, "weight_decay": 2e-4}  # of every network


def bkd_start(dataset: str) -> float:
    """The share of training after which BKD's weights act, as in its code: CIFAR-10 late."""
    return 0.8 if dataset == "cifar10" else 0.0


def learning_rate(epoch: int, epochs: int, base: float) -> float:
    """The rate in epoch 0..epochs-1: up over 5 epochs, x0.01 from 80 %, x0.0001 from 90 %."""
    decay = 0.0001 if 10 * epoch >= 9 * epochs else 0.01 if 10 * epoch >= 8 * epochs else 1.0
    return base * decay * min(1.0, (epoch + 1) / 5)


class Output(NamedTuple):
    logits: Tensor  # (B, C)
    features: Tensor  # (B, D)


def build(settings: dict, num_classes: int, teacher_width: int) -> tuple[dict, nn.Module, nn.Module]:
    """The student's build_model arguments, the student, and krdistill's map g to the teacher."""
    name, head = settings["network"], settings["head"]
    projection = None
    if settings["method"] == "cbd" and teacher_width != NETWORKS[name][2][-1]:
        projection = teacher_width
    network = dict(name=name, num_classes=num_classes, head=head, projection=projection)
    with torch.random.fork_rng(devices=[]):  # drawn on the CPU: the same start on every device
        torch.manual_seed(settings["seed"])
        student = build_model(**network)
        adapter = nn.Identity()
        if settings["method"] == "krdistill":
            adapter = nn.Linear(student.num_features, teacher_width)
    return network, student, adapter


def set_up(settings: dict, data: Dataset, teachers: list[nn.Module], device) -> SimpleNamespace:
    """All that a run trains with; run.step(size) is one step, without a read-back from the device."""
    method, hyper = METHODS[settings["method"]], settings["hyper"]
    counts = torch.tensor(data.class_counts, dtype=torch.float64, device=device)
    width = sum(teacher.num_features for teacher in teachers)
    network, student, adapter = build(settings, len(counts), width)
    student.to(device, memory_format=torch.channels_last)
    parameters = [*student.parameters(), *adapter.to(device).parameters()]
    rate = torch.tensor(0.0, device=device)  # a tensor, so that a captured step reads its new value
    decay = settings["weight_decay"]
    optimizer = torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=decay, fused=True)
    momentum = [torch.zeros_like(parameter) for parameter in parameters]
    for parameter, buffer in zip(parameters, momentum):
        optimizer.state[parameter]["momentum_buffer"] = buffer
    batches = Batches(
        data.train_images,
        data.train_targets,
        data.class_counts,
        settings["batch_size"],
        device,
        method.sampler,
        settings["colour"],
    )
    mixed = autocast(device, settings["precision"])
    c = SimpleNamespace(**hyper, class_counts=counts, bkd_counts=counts.clone(), adapter=adapter)
    if settings["method"] == "krdistill":
        train = (data.train_images, data.train_targets)
        c.class_means = class_means(teachers[0], *train, len(counts), device, mixed)
        c.prototypes = balanced_prototypes(c.class_means)
        # rectify_logits takes log pi out; a balanced-softmax teacher's logits never had it in
        log_pi = (counts / counts.sum()).log().float()
        c.teacher_tilt = log_pi if settings["teachers"][0]["method"] == "bsce" else 0.0
    losses = torch.zeros(len(batches.sizes), device=device)
    correct, index = torch.zeros((), device=device), torch.zeros(1, dtype=torch.int64, device=device)

    def step(size: int) -> None:
        images, y = batches.next(size)
        with mixed():
            with torch.no_grad():
                t = [Output(*teacher(images)) for teacher in teachers]
            s = Output(*student(images))
        loss = method.loss(s, t, y, c)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.index_copy_(0, index, loss.detach()[None])
        index.add_(1)
        correct.add_((s.logits.argmax(dim=1) == y).sum())

    def start_epoch(epoch: int, generator: torch.Generator) -> None:
        rate.fill_(learning_rate(epoch, settings["epochs"], settings["lr"]))
        if "bkd_start" in hyper:  # equal counts give equal weights: until then BKD is KD
            active = epoch >= hyper["bkd_start"] * settings["epochs"]
            c.bkd_counts.copy_(counts if active else torch.ones_like(counts))
        student.train()
        batches.shuffle(generator)
        index.zero_()
        correct.zero_()

    state = [*parameters, *student.buffers(), *momentum, batches.position, losses, correct, index]
    return SimpleNamespace(
        settings=settings, network=network, student=student, adapter=adapter, momentum=momentum,
        batches=batches, losses=losses, correct=correct, index=index, state=state, mixed=mixed, c=c,
        step=step, start_epoch=start_epoch,
    )  # fmt: skip


def autocast(device: torch.device, precision: str) -> Callable:
    """A factory of autocast contexts; without its weight cache, which a CUDA graph cannot hold."""
    on = precision == "bf16"
    kind = device.type
    return lambda: torch.autocast(kind, torch.bfloat16, enabled=on, cache_enabled=False)


@torch.no_grad()
def capture(run: SimpleNamespace) -> Callable[[int], None]:
    """run.step recorded as one CUDA graph for each batch size; run's state is left as it was."""
    saved = [tensor.clone() for tensor in run.state]
    sizes, graphs = sorted(set(run.batches.sizes)), {}
    run.student.train()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.enable_grad():
        for size in sizes * 3:  # warm-up: let cuDNN choose and the allocator settle
            run.batches.position.zero_()
            run.index.zero_()
            run.step(size)
    torch.cuda.current_stream().wait_stream(side)
    pool = torch.cuda.graph_pool_handle()
    for size in sizes:
        graphs[size] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[size], pool=pool), torch.enable_grad():
            run.step(size)
    for tensor, value in zip(run.state, saved):
        tensor.copy_(value)
    return lambda size: graphs[size].replay()


def train(
    settings: dict, data: Dataset, teachers: list[nn.Module], folder: Path, device, eval_every: int
) -> dict:
    """Train one network, teacher or student, to its last epoch; returns what result.json holds.

    Continues from folder/last.pt where there is one. An epoch ends with a row on the terminal, a
    line in folder/log.jsonl and a whole checkpoint, in that order.
    """
    run = set_up(settings, data, teachers, device)
    generator = torch.Generator().manual_seed(settings["seed"])
    done, spent, devices = restore(run, generator, folder, device)
    step = capture(run) if device.type == "cuda" else run.step
    test = (data.test_images.to(device), data.test_targets.to(device))
    epochs, images = settings["epochs"], len(data.train_targets)
    print(f"{'epoch':>8}{'lr':>9}{'loss':>9}{'train':>7}{'test':>7}{'many':>7}{'medium':>7}"
          f"{'few':>7}{'img/s':>8}  left", flush=True)  # fmt: skip
    started = time.perf_counter()
    for epoch in range(done, epochs):
        began = time.perf_counter()
        run.start_epoch(epoch, generator)
        for size in run.batches.sizes:
            step(size)
        losses = run.losses.tolist()  # the epoch's first read-back
        row = {"epoch": epoch + 1, "lr": learning_rate(epoch, epochs, settings["lr"])}
        row["loss"] = sum(a * b for a, b in zip(losses, run.batches.sizes)) / images
        row["train_top1"] = 100 * run.correct.item() / images
        rate = images / (time.perf_counter() - began)
        if not math.isfinite(row["loss"]):
            bad = next(i for i, loss in enumerate(losses) if not math.isfinite(loss))
            raise RunError(
                f"the loss is {losses[bad]} at epoch {epoch + 1}, step {bad + 1} of {len(losses)}: try "
                f"a smaller --lr; the checkpoint in {folder} still holds the epoch before"
            )
        last = epoch + 1 == epochs
        if last or (epoch + 1) % eval_every == 0:
            hits = class_hits(run.student, *test, len(data.class_counts), run.mixed)
            scores = summarise(hits, data)
            row |= {key: scores[key] for key in ("top1", *GROUPS)}
        now = time.perf_counter()
        left = (now - started) / (epoch + 1 - done) * (epochs - epoch - 1)
        print_row(row | {"images_per_second": rate}, epochs, left)
        append_line(folder / "log.jsonl", row | {"images_per_second": round(rate)})
        save_checkpoint(run, generator, folder, epoch + 1, spent + now - started, devices)
    return scores | {"seconds": spent + time.perf_counter() - started, "devices": devices}


@torch.no_grad()
def class_means(model, images, targets, num_classes, device, mixed) -> Tensor:
    """(C, D): the model's mean feature of each class, on unaugmented images, in eval mode."""
    sums = torch.zeros(num_classes, model.num_features, dtype=torch.float64, device=device)
    model.eval()
    for part, labels in zip(images.split(1000), targets.split(1000)):
        part = part.to(device, memory_format=torch.channels_last)
        with mixed():
            features = model(normalise(part))[1]
        sums.index_add_(0, labels.to(device), features.double())
    counts = torch.bincount(targets, minlength=num_classes).clamp(min=1).to(device)
    return (sums / counts[:, None]).float()


@torch.no_grad()
def class_hits(model, images, targets, num_classes, mixed) -> list[int]:
    """How many test images of each class the model labels rightly (eval mode, whole images)."""
    hits = torch.zeros(num_classes, dtype=torch.int64, device=images.device)
    model.eval()
    for part, labels in zip(images.split(1000), targets.split(1000)):
        with mixed():
            logits = model(normalise(part.contiguous(memory_format=torch.channels_last)))[0]
        hits.index_add_(0, labels, (logits.argmax(dim=1) == labels).long())
    return hits.tolist()


GROUPS = {"many": (101, math.inf), "medium": (20, 100), "few": (0, 19)}  # training images


def summarise(hits: list[int], data: Dataset) -> dict:
    """top1 over the images; many, medium, few: means of their classes' accuracies; all in %.

    A group without classes is None, and so is a class without test images.
    """
    totals = torch.bincount(data.test_targets, minlength=len(hits)).tolist()
    per_class = [100 * hit / total if total else None for hit, total in zip(hits, totals)]
    scores = {"top1": 100 * sum(hits) / sum(totals)}
    for group, (low, high) in GROUPS.items():
        pairs = zip(per_class, data.class_counts)
        inside = [a for a, count in pairs if low <= count <= high and a is not None]
        scores[group] = statistics.fmean(inside) if inside else None
    return scores | {"per_class": per_class, "class_counts": data.class_counts}


# ---- run folders: settings, log, checkpoint, result; one writer; nothing half-written


class RunError(Exception):
    """A run that cannot go on; main() prints it without a traceback."""

    status = 1


class Busy(RunError):
    status = 75  # EX_TEMPFAIL: run_all.sh leaves this run to the process that has it


def run_name(settings: dict) -> str:
    """A readable name, and a digest of every setting so that different runs never share a folder."""
    parts = [Path(settings["dataset"]).stem, f"imb{settings['imb']:g}", settings["method"]]
    parts += [settings["network"]]
    if teachers := settings["teachers"]:
        method = "" if teachers[0]["method"] == "ce" else f"-{teachers[0]['method']}"
        many = f"-x{len(teachers)}" if len(teachers) > 1 else ""
        parts += ["from", teachers[0]["network"] + method + many]
    parts += [f"{key}{value}" for key, value in deviations(settings).items()]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    parts += [f"e{settings['epochs']}", f"s{settings['seed']}", digest]
    return re.sub(r"[^\w.=+-]", "_", "-".join(parts))


def write_whole(path: Path, content: bytes) -> None:
    """Write beside and rename: the name never stands for half a file, whenever the power fails."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict) -> None:
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def append_line(path: Path, row: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not the JSON that kd_lt.py wrote ({error})") from None


@contextlib.contextmanager
def only_writer(folder: Path, wait: bool):
    """Hold the folder's lock; the system drops it when its process ends, however that ends."""
    try:
        import fcntl
    except ImportError:
        raise RunError("kd_lt.py needs file locks as Linux and macOS have them") from None
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = f"{folder} is being written by {file.read().strip() or 'another process'}"
            if not wait:
                raise Busy(f"{holder}; this process stops") from None
            print(f"waiting  {holder}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def claim(settings: dict, folder: Path, device) -> dict | None:
    """The result of a finished run; None after claiming the folder for a new or unfinished one."""
    config = folder / "config.json"
    if config.exists():
        stored = read_json(config).get("settings", {})
        differing = {key for key in settings | stored if settings.get(key) != stored.get(key)}
        if differing:
            raise InputError(
                f"{folder} holds another run: its config.json differs in {', '.join(sorted(differing))}; "
                f"it is neither reused nor overwritten. Move it away or choose another --runs-dir"
            )
    elif (folder / "last.pt").exists() or (folder / "result.json").exists():
        raise InputError(f"{folder} holds a run without config.json: move it away")
    else:
        versions = {"kd_lt": VERSION, "python": platform.python_version(), "torch": torch.__version__}
        command = shlex.join([Path(sys.executable).name, *sys.argv])
        about = {"command": command, "versions": versions, "device": describe(device)}
        write_json(config, {"settings": settings} | about)
    return read_json(folder / "result.json") if (folder / "result.json").exists() else None


def save_checkpoint(run, generator, folder: Path, epoch: int, seconds: float, devices) -> None:
    content = {
        "settings": run.settings,
        "network": run.network,
        "epoch": epoch,
        "student": run.student.state_dict(),
        "adapter": run.adapter.state_dict(),
        "momentum": run.momentum,
        "generator": generator.get_state(),
        "seconds": seconds,
        "devices": devices,
    }
    buffer = io.BytesIO()  # a full disk must fail in write_whole, not inside torch.save
    torch.save(content, buffer)
    write_whole(folder / "last.pt", buffer.getvalue())


def read_checkpoint(path: Path) -> dict:
    """A checkpoint's plain tensors and numbers (never code), on the CPU."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"settings", "network", "epoch", "student"} - set(content)
    except OSError:
        raise
    except Exception as error:  # torch.load fails in many types: zip, pickle, key, runtime errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a whole checkpoint of plain tensors ({reason})") from None
    if missing:
        raise InputError(f"{path}: a checkpoint, but not of kd_lt.py: no {', '.join(sorted(missing))}")
    return content


def rebuild(checkpoint: dict, path: Path, device) -> nn.Module:
    """The checkpoint's network in eval mode; an error where its weights do not fit its settings."""
    try:
        with torch.random.fork_rng(devices=[]):
            model = build_model(**checkpoint["network"])
        model.load_state_dict(checkpoint["student"])
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: weights and stored configuration disagree ({reason})") from None
    return model.eval().to(device, memory_format=torch.channels_last)


def load_run(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The trained network of a run folder (or of its last.pt), in eval mode.

    model(data.normalise(images)) with images (B, 3, 32, 32) of 0..255 gives logits and features.
    Raises InputError where there is no whole checkpoint, OSError where it cannot be read.
    """
    path = Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
    return rebuild(read_checkpoint(path), path, device)


def restore(run, generator, folder: Path, device) -> tuple[int, float, list[str]]:
    """Load folder/last.pt into the run, if there is one: epochs done, seconds spent, devices used."""
    path, log, here = folder / "last.pt", folder / "log.jsonl", describe(device)
    if not path.exists():
        write_whole(log, (json.dumps({"command": sys.argv}) + "\n").encode())
        return 0, 0.0, [here]
    checkpoint = read_checkpoint(path)
    if checkpoint["settings"] != run.settings or checkpoint["network"] != run.network:
        raise InputError(f"{path} belongs to another run than its folder's config.json: move it away")
    run.student.load_state_dict(checkpoint["student"])
    run.adapter.load_state_dict(checkpoint["adapter"])
    for buffer, saved in zip(run.momentum, checkpoint["momentum"]):
        buffer.copy_(saved)
    generator.set_state(checkpoint["generator"])
    done = checkpoint["epoch"]
    # the log is written before the checkpoint: drop the line of an epoch that will be run again
    lines = log.read_text().splitlines()[: 1 + done]
    write_whole(log, ("\n".join(lines) + "\n").encode())
    print(f"resumed  after epoch {done}, from {path}")
    return done, checkpoint["seconds"], list(dict.fromkeys([*checkpoint["devices"], here]))


def describe(device: torch.device) -> str:
    """The device and the torch version, as reports show them."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    with contextlib.suppress(OSError):
        names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        name = names[0] if names else platform.machine()
        return f"CPU {name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


# ---- what a run prints


def print_row(row: dict, epochs: int, left: float) -> None:
    cells = [f"{row['epoch']:>4}/{epochs:<3}{row['lr']:>9.6f}{row['loss']:>9.4f}{row['train_top1']:>7.2f}"]
    cells += [f"{'-' if row.get(key) is None else format(row[key], '.2f'):>7}" for key in ("top1", *GROUPS)]
    cells += [f"{row['images_per_second']:>8.0f}  {duration(left)}"]
    print("".join(cells), flush=True)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def scores_line(scores: dict) -> str:
    shown = ((key.replace("top1", "top-1"), scores[key]) for key in ("top1", *GROUPS))
    return "  ".join(f"{key} {'absent' if a is None else f'{a:.2f}'}" for key, a in shown)


def picture(scores: dict) -> str:
    """Ten buckets of classes from head to tail: mean accuracy as a block and in %."""
    ranked = sorted(range(len(scores["per_class"])), key=lambda c: -scores["class_counts"][c])
    parts = [part.tolist() for part in torch.tensor(ranked).tensor_split(min(10, len(ranked)))]
    known = [[a for c in part if (a := scores["per_class"][c]) is not None] for part in parts]
    means = [statistics.fmean(part) if part else 0.0 for part in known]
    blocks = "".join(" ▁▂▃▄▅▆▇█"[math.ceil(mean / 12.5)] for mean in means)
    return f"{blocks}  " + " ".join(f"{mean:3.0f}" for mean in means)


def report(folder: Path, result: dict) -> None:
    settings = result["settings"]
    both = [(f"student ({settings['method']})", result)]
    both += [(f"teacher ({teacher['method']})", teacher) for teacher in result["teachers"]]
    width = max(len(name) for name, _ in both)
    print(f"result   {folder}, last epoch, seed {settings['seed']}")
    for name, scores in both:
        print(f"         {name:<{width}}  {scores_line(scores)}")
    print(f"         accuracy in %, from the head classes to the tail, in {min(10, len(result['per_class']))} parts:")
    for name, scores in both:
        print(f"         {name:<{width}}  {picture(scores)}", flush=True)


# ---- one command: the teachers it needs, then the student


def execute(settings: dict, data: Dataset, args, device, teacher: bool = False) -> dict:
    """The result of this run: the stored one of a finished run, else trained now, teachers first."""
    folder = Path(args.runs_dir) / run_name(settings)
    role = "teacher" if teacher else "student"
    what = f"{role}  {settings['network']}, {settings['method']}, seed {settings['seed']}"
    with only_writer(folder, wait=teacher):
        if result := claim(settings, folder, device):
            print(f"{what}: finished before, not trained again: {folder}", flush=True)
            return result
        teachers, results = [], []
        for known, path in zip(settings["teachers"], args.teacher_checkpoint or settings["teachers"]):
            if "checkpoint" in known:
                teachers.append(load_run(path, device))
                test = (data.test_images.to(device), data.test_targets.to(device))
                mixed = autocast(device, settings["precision"])
                hits = class_hits(teachers[-1], *test, len(data.class_counts), mixed)
                results.append(known | summarise(hits, data))
            else:
                own = settings | known | {"hyper": {}, "teachers": []}
                results.append(known | execute(own, data, args, device, teacher=True))
                teachers.append(load_run(Path(args.runs_dir) / run_name(own), device))
        for model, scores in zip(teachers, results):
            model.requires_grad_(False)
            print(f"teacher  {scores['network']}, {scores['method']}: {scores_line(scores)}")
        print(f"{what}, {settings['epochs']} epochs, in {folder}", flush=True)
        result = train(settings, data, teachers, folder, device, args.eval_every)
        keys = ("network", "method", "seed", "checkpoint", "top1", *GROUPS, "per_class", "class_counts")
        shown = [{key: scores[key] for key in keys if key in scores} for scores in results]
        result = {"settings": settings, "version": VERSION} | result | {"teachers": shown}
        write_json(folder / "result.json", result)
        return result


def checkpoint_identity(path: str, settings: dict) -> dict:
    """What a --teacher-checkpoint is, checked against this run's data and needs."""
    file = Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
    checkpoint = read_checkpoint(file)
    stored = checkpoint["settings"]
    for key in ("dataset", "data", "imb", "imb_type", "subset_seed", "head"):
        if stored.get(key) != settings[key]:
            theirs, ours = stored.get(key), settings[key]
            raise InputError(f"--teacher-checkpoint {path}: its {key} is {theirs}, this run's is {ours}")
    if checkpoint["epoch"] != stored["epochs"]:
        at = f"epoch {checkpoint['epoch']} of {stored['epochs']}"
        raise InputError(f"--teacher-checkpoint {path}: unfinished, {at}; finish it or give another")
    rebuild(checkpoint, file, "cpu")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return {key: stored[key] for key in ("network", "method", "head", "colour")} | {"checkpoint": digest}


# ---- how fast


def untrained(settings: dict, data: Dataset, device) -> tuple[SimpleNamespace, list[nn.Module]]:
    """A run with teachers of the right shape that know nothing: for timing, not for training."""
    num_classes = len(data.class_counts)
    teachers = [build_model(t["network"], num_classes, t["head"]) for t in settings["teachers"]]
    for model in teachers:
        model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return set_up(settings, data, teachers, device), teachers


def seconds_per_step(run: SimpleNamespace, device, steps: int, repeats: int) -> float:
    """Median time of a whole-batch step as train() runs it, teachers included."""
    step = capture(run) if device.type == "cuda" else run.step
    run.start_epoch(0, torch.Generator().manual_seed(0))

    def block(count):
        for _ in range(count):
            run.batches.position.zero_()
            run.index.zero_()
            step(run.batches.sizes[0])

    return timed(block, device, steps, repeats)


def estimate(settings: dict, data: Dataset, args, device) -> float:
    """Seconds that this command will take, its teachers' training included, from a few real steps."""
    some = slice(0, 2 * settings["batch_size"])
    few = data._replace(train_images=data.train_images[some], train_targets=data.train_targets[some])
    own = [settings | t | {"hyper": {}, "teachers": []} for t in settings["teachers"]]
    total = 0.0
    for one in [settings, *(teacher for teacher in own if "checkpoint" not in teacher)]:
        log = Path(args.runs_dir) / run_name(one) / "log.jsonl"
        done = log.read_bytes().count(b"\n") - 1 if log.exists() else 0
        left = max(one["epochs"] - done, 0)
        tests = math.ceil(left / args.eval_every) * len(data.test_targets)
        run = untrained(one, few, device)[0]
        second = seconds_per_step(run, device, 1, 3) / run.batches.sizes[0]
        total += second * (left * len(data.train_targets) + tests / 3)  # a test is a third of a step
    return total


def timed(block: Callable[[int], None], device, steps: int, repeats: int) -> float:
    """Median seconds of one of block's steps, after a block that is not counted."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        block(steps)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / steps)
    return statistics.median(times[1:])


class PlainImages(torch.utils.data.Dataset):
    """One image at a time, augmented by itself: what the usual loader does."""

    def __init__(self, data: Dataset):
        self.images, self.targets = F.pad(data.train_images, (4, 4, 4, 4)), data.train_targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        top, left, mirrored = torch.randint(9, (2,)).tolist() + [torch.rand(()).item() < 0.5]
        image = self.images[i, :, top : top + 32, left : left + 32]
        image = image.flip(2) if mirrored else image
        return normalise(image[None])[0], self.targets[i]


def plain_seconds_per_step(settings: dict, data: Dataset, device, steps: int, repeats: int) -> float:
    """The same step as most code has it: float32, NCHW, eager, DataLoader, loss read every step."""
    method = METHODS[settings["method"]]
    run, teachers = untrained(settings | {"precision": "fp32"}, data, device)
    teachers = [model.to(memory_format=torch.contiguous_format) for model in teachers]
    student = run.student.to(memory_format=torch.contiguous_format).train()
    parameters = [*student.parameters(), *run.adapter.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=2e-4)
    workers = 4 if device.type == "cuda" else 0
    loader = torch.utils.data.DataLoader(
        PlainImages(data), settings["batch_size"], shuffle=True, num_workers=workers
    )

    def block(count):
        for _, (images, y) in zip(range(count), loader):
            images, y = images.to(device), y.to(device)
            with torch.no_grad():
                t = [Output(*teacher(images)) for teacher in teachers]
            loss = method.loss(Output(*student(images)), t, y, run.c)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    return timed(block, device, steps, repeats)


def matrix_peak(device, precision: str) -> float:
    """Floating-point operations a second of a large matrix product: the practical ceiling here."""
    n = 2048 if device.type == "cpu" else 8192
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / timed(lambda count: [a @ b for _ in range(count)], device, 5, 5)


def bench(settings: dict, data: Dataset, args, device) -> None:
    """Print the speed of the path that train() takes and of the plain path, on this device."""
    from torch.utils.flop_counter import FlopCounterMode

    run, _ = untrained(settings, data, device)
    batch, cuda = run.batches.sizes[0], device.type == "cuda"
    steps, repeats = (max(1, len(run.batches.sizes) - 1), 7) if cuda else (4, 5)
    run.start_epoch(0, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as flops:
        run.step(batch)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    ours = seconds_per_step(run, device, steps, repeats)
    if cuda:
        memory = torch.cuda.max_memory_allocated() / 2**20
    else:
        import resource

        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in KiB
    plain = plain_seconds_per_step(settings, data, device, steps, repeats)
    rate, peak = flops.get_total_flops() / ours, matrix_peak(device, settings["precision"])
    share = f"{rate / 1e12:.3f} of {peak / 1e12:.3f} TFLOP/s, {100 * rate / peak:.0f} %"
    total = duration(estimate(settings, data, args, device))
    print(f"bench    {settings['method']}, {describe(device)}, {settings['precision']}")
    for name, seconds in (("this program", ours), ("plain path", plain)):
        speed = f"{1000 * seconds:9.2f} ms a step {batch / seconds:10.0f} images/s"
        print(f"         {name:<13}{speed}, batch {batch}")
    print(f"         ratio {plain / ours:.2f} (medians of {repeats} x {steps} steps after warm-up)")
    print(f"         {share} of a large matrix product here; peak memory {memory:.0f} MiB")
    print(f"         {settings['epochs']} epochs, teachers included: about {total}")


# ---- results: the table and the picture

# Top-1 in % with ResNet-32, 200 epochs, crop and flip, by method and teacher's method
PUBLISHED_AT = [("cifar100", 100), ("cifar100", 50), ("cifar100", 10)]
PUBLISHED_AT += [("cifar10", 100), ("cifar10", 50), ("cifar10", 10)]
PUBLISHED = {
    "ce": ["37.73 [1] 39.62 [2]", "43.78 [1] 44.91 [2]", "56.48 [2]"]
    + ["71.95 [1] 70.29 [2]", "76.45 [1] 77.09 [2]", "86.74 [2]"],
    "bsce": ["42.99 [1]", "46.55 [1]", "-", "77.54 [1]", "81.11 [1]", "-"],
    "kd from ce": ["40.36 [3]", "45.49 [3]", "59.22 [3]", "-", "-", "-"],
    "kd from bsce": ["45.52 [4]", "50.83 [4]", "-", "78.88 [4]", "82.44 [4]", "-"],
    "cbd from ce": ["44.83 [5]", "49.19 [5]", "-", "-", "-", "-"],
}
PUBLISHED_WIDE = {"kd from ce": "42.48 [6]", "ltkd from ce": "51.08 [6]"}  # 32x4 to 8x4, imb 100
SOURCES = {
    "[1]": "zhangyongshun/BagofTricks-LT, its own runs",
    "[2]": "feidfoe/AdjustBnd4Imbalance, README",
    "[3]": 'Table 2 of "Long-tailed recognition via weight balancing"',
    "[4]": "DiVE, as BagofTricks-LT lists it",
    "[5]": "a re-implementation, best test epoch",
    "[6]": "third-party notes on arXiv 2506.18496",
}


def published(settings: dict) -> str:
    """The figure that may stand beside a setting: same data, networks, recipe; else a dash."""
    teachers, where = settings["teachers"], (settings["dataset"], settings["imb"])
    usual = settings["epochs"] == 200 and len(teachers) < 2 and not deviations(settings)
    networks = {settings["network"], *(teacher["network"] for teacher in teachers)}
    key = " from ".join([settings["method"], *(teacher["method"] for teacher in teachers)])
    if usual and networks == {"resnet32"} and where in PUBLISHED_AT and key in PUBLISHED:
        return PUBLISHED[key][PUBLISHED_AT.index(where)]
    if usual and networks == {"resnet32x4", "resnet8x4"} and where == ("cifar100", 100):
        return PUBLISHED_WIDE.get(key, "-")
    return "-"


def deviations(settings: dict) -> dict:
    """The settings that are not the recipe's or the method's defaults, by name."""
    method, hyper = METHODS[settings["method"]], settings["hyper"]
    usual = {key: value for key, value in RECIPE.items() if key != "epochs"}
    usual |= {"imb_type": "exp", "subset_seed": 0, "colour": False, "head": method.head}
    usual |= method.defaults | {"bkd_start": bkd_start(settings["dataset"])}
    flat = settings | hyper
    return {key: flat[key] for key in usual if key in flat and flat[key] != usual[key]}


def finished_runs(folders: list[str]) -> list[dict]:
    """The result.json of every finished run; a folder is a run or holds runs."""
    results = []
    for folder in map(Path, folders):
        own = folder / "result.json"
        for path in [own] if own.exists() else sorted(folder.glob("*/result.json")):
            results.append(read_json(path) | {"folder": path.parent})
    if not results:
        raise InputError(f"{' '.join(folders)}: no finished run there (no result.json)")
    return results


def by_setting(results: list[dict]) -> list[list[dict]]:
    """Results grouped by everything but the seeds: different settings are never averaged."""
    groups = {}
    for result in results:
        s = result["settings"]
        teachers = [{k: v for k, v in t.items() if k != "seed"} for t in s["teachers"]]
        key = json.dumps(s | {"seed": None, "teachers": teachers}, sort_keys=True)
        groups.setdefault(key, []).append(result)

    def order(group):
        s = group[0]["settings"]
        method = list(METHODS).index(s["method"])
        return s["dataset"], -s["imb"], s["network"], s["epochs"], method, label(s)

    return sorted(groups.values(), key=order)


def label(settings: dict) -> str:
    """The method, and what deviates from its defaults."""
    teachers = settings["teachers"]
    extras = [f"{len(teachers)} teachers"] if len(teachers) > 1 else []
    extras += sorted({f"{t['method']} teacher" for t in teachers if t["method"] != "ce"})
    extras += ["given teacher"] if any("checkpoint" in t for t in teachers) else []
    extras += [f"{key} {value}" for key, value in deviations(settings).items()]
    return settings["method"] + (f" ({', '.join(extras)})" if extras else "")


def table(folders: list[str]) -> None:
    """Print Markdown: a row a setting, mean +- sample standard deviation over its seeds."""
    head = "data|imb|method|networks|epochs|n|top-1|many|medium|few|minutes|published"
    print(f"| {head.replace('|', ' | ')} |\n{'|---' * 12}|")
    used, made = set(), set()
    for group in by_setting(finished_runs(folders)):
        s = group[0]["settings"]
        networks = list(dict.fromkeys(t["network"] for t in s["teachers"])) + [s["network"]]
        cells = [s["dataset"], f"{s['imb']:g}", label(s), " to ".join(networks)]
        cells += [str(s["epochs"]), str(len(group))]
        for key in ("top1", *GROUPS):
            values = [result[key] for result in group if result[key] is not None]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}" if values else "-")
        minutes = statistics.fmean(result["seconds"] for result in group) / 60
        cells += [f"{minutes:.1f}", published(s)]
        used |= set(re.findall(r"\[\d\]", cells[-1]))
        made |= {f"kd-lt {r['version']} on {device}" for r in group for device in r["devices"]}
        print(f"| {' | '.join(cells)} |")
    print("\nTop-1 in % on the test set after the last epoch, mean ± sample standard deviation over n")
    print("seeds; minutes for the last network alone. krdistill is our reconstruction, ltkd our reading.")
    print(f"Made with {'; '.join(sorted(made))}.")
    for key in sorted(used):
        print(f"{key} {SOURCES[key]}")


def plot(file: str, folders: list[str]) -> None:
    """Draw accuracy from head to tail and over the epochs, a line a setting, as PNG or SVG."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    if Path(file).suffix not in (".png", ".svg"):
        raise InputError(f"--plot {file}: the name must end in .png or .svg")
    groups = by_setting(finished_runs(folders))
    counts = groups[0][0]["class_counts"]
    if any(group[0]["class_counts"] != counts for group in groups):
        raise InputError("--plot: these runs have different class counts; give runs of one data set")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    ranked = sorted(range(len(counts)), key=lambda c: -counts[c])
    parts = [part.tolist() for part in torch.tensor(ranked).tensor_split(min(20, len(ranked)))]
    bars = left.twinx()
    bars.fill_between(range(len(counts)), [counts[c] for c in ranked], color="0.88", step="mid")
    bars.set(yscale="log", ylabel="training images of the class (grey)")
    left.set_zorder(bars.get_zorder() + 1)
    left.patch.set_visible(False)
    for i, group in enumerate(groups):
        style = dict(marker="osv^Dx*P"[i % 8], linestyle=("-", "--", ":", "-.")[i % 4], markersize=4)
        style |= dict(color=pyplot.cm.viridis(0.85 * i / max(1, len(groups) - 1)))
        s = group[0]["settings"]
        name = f"{label(s)}, {s['network']}, {s['epochs']} ep., n = {len(group)}"
        known = [[r["per_class"][c] for r in group] for c in ranked]
        known = [statistics.fmean(values) if None not in values else math.nan for values in known]
        middle, mean, first = [], [], 0
        for part in parts:
            middle.append(first + (len(part) - 1) / 2)
            mean.append(statistics.fmean(known[first : first + len(part)]))
            first += len(part)
        left.plot(middle, mean, label=name, **style)
        logs = [(r["folder"] / "log.jsonl").read_text().splitlines()[1:] for r in group]
        rows = [[row for row in map(json.loads, log) if "top1" in row] for log in logs]
        shared = sorted(set.intersection(*({row["epoch"] for row in log} for log in rows)))
        tops = [{row["epoch"]: row["top1"] for row in log} for log in rows]
        right.plot(shared, [statistics.fmean(t[e] for t in tops) for e in shared], **style)
    size = len(parts[0])
    left.set(xlabel="class, from most to fewest training images", ylim=(0, None))
    left.set(ylabel=f"test accuracy in %{f', mean of {size} neighbouring classes' * (size > 1)}")
    right.set(xlabel="epoch", ylabel="top-1 test accuracy in %")
    right.grid(alpha=0.3)
    s = groups[0][0]["settings"]
    figure.suptitle(f"{s['dataset']}, imb {s['imb']:g} ({s['imb_type']}), mean over seeds")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(file, dpi=150)
    print(f"plot     {file}: {len(groups)} settings, {sum(map(len, groups))} runs")


# ---- flags


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable:
    """An argparse type: an int or float from low (or above it) up to high."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high or value == math.inf:
            name, start = {int: "a whole number", float: "a number"}[kind], "above" if above else "from"
            end = f" up to {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {start} {low:g}{end}")
        return value

    return parse


def method_table() -> str:
    """One row a method: its sampler, head, teachers, loss, defaults and source."""
    lines = ["methods (z: student logits, pi: class frequencies; defaults of their own flags below):"]
    for name, m in METHODS.items():
        teachers = "no teacher" if not m.defaults else "K teachers" if name == "cbd" else "1 teacher"
        lines.append(f"  {name:<10} {m.formula}")
        lines.append(f"  {'':<10} {m.sampler}-balanced batches, {m.head} head, {teachers}; {m.source}")
        own = {k: v for k, v in m.defaults.items() if k not in TEACHER}
        own |= {"bkd_start": "0.8 on cifar10, else 0"} if "bkd_start" in own else {}
        flags = ", ".join(f"--{key.replace('_', '-')} {value}" for key, value in own.items())
        lines += [f"  {'':<10} {flags}"] if flags else []
    return "\n".join(lines)


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kd_lt.py",
        description="Knowledge distillation for long-tailed recognition: trains the teacher, or "
        "reuses a finished one, distils the student, and reports many / medium / few.",
        epilog=method_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    positive, rate = number(int, 1), number(float, 0)
    add = parser.add_argument_group("run").add_argument
    add("--method", choices=METHODS, default="bkd", help="see below (default: bkd)")
    add("--dataset", metavar="NAME", help="cifar100 (default), cifar10, synthetic, or FILE.npz with x_train "
        "y_train x_test y_test (uint8 images of 32x32, integer labels)")  # fmt: skip
    add("--imb", type=number(float, 1), default=100.0, help="largest over smallest class (default: 100)")
    add("--imb-type", choices=("exp", "step"), default="exp", help="profile of the counts (default: exp)")
    add("--subset-seed", type=number(int, 0, 2**32 - 1), default=0,
        help="which images are kept (default: 0, the published subset)")  # fmt: skip
    add("--student", choices=NETWORKS, metavar="NETWORK", help="default: resnet32; one of " + ", ".join(NETWORKS))
    add("--teacher", choices=NETWORKS, metavar="NETWORK", help="default: resnet32; trained first, or reused")
    add("--teacher-method", choices=("ce", "bsce"), help="how the teacher is trained (default: ce)")
    add("--teacher-checkpoint", nargs="+", metavar="PATH", help="run folder or last.pt, instead of training one")
    add("--num-teachers", type=positive, help="cbd: how many; the second half trains with colour distortion")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of everything random (default: 0)")
    add = parser.add_argument_group("recipe, of teacher and student").add_argument
    add("--epochs", type=positive, help="default: 200")
    add("--batch-size", type=positive, help="default: 128")
    add("--lr", type=number(float, 0, above=True), help="default: 0.1")
    add("--weight-decay", type=rate, help="default: 0.0002")
    add = parser.add_argument_group("loss; defaults by method, see below").add_argument
    add("--temperature", type=number(float, 0, above=True), help="T of the softened probabilities")
    add("--alpha", type=rate, help="weight of the distillation term (krdistill: of L_LRD; 0 is off)")
    add("--beta", type=rate, help="bkd: of the effective number; cbd: of L_FD; ltkd: of the inner term")
    add("--gamma", type=rate, help="krdistill: weight of L_RRD; 0 is off")
    add("--bkd-start", type=number(float, 0, 1), help="bkd: share of training after which its weights act")
    add = parser.add_argument_group("where and how").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="default: auto, bf16 where the hardware has it")  # fmt: skip
    add("--eval-every", type=positive, help="epochs between tests (default: 1, on a CPU 5; always the last)")
    add("--data-dir", default="data", help="CIFAR's folder, filled if empty (default: data)")
    add("--runs-dir", help="where runs are kept (default: runs)")
    add("--smoke", action="store_true", help="other defaults: synthetic data, resnet8, 3 epochs, batches of "
        "64, folder runs/smoke; seconds")  # fmt: skip
    add = parser.add_argument_group("instead of a run").add_argument
    add("--bench", action="store_true", help="measure the training step on this device")
    add("--table", nargs="*", metavar="RUNS", help="print the results of finished runs as Markdown")
    add("--plot", nargs="+", metavar=("FILE", "RUNS"), help="draw them, to a .png or .svg")
    return parser.parse_args(argv)


def resolve(args: argparse.Namespace, data: Dataset, precision: str) -> dict:
    """The settings that make a run what it is, every default filled in."""
    method = METHODS[args.method]
    hyper = {key: value for key, value in method.defaults.items() if key not in TEACHER}
    if "bkd_start" in hyper:
        hyper["bkd_start"] = bkd_start(args.dataset)
    for key in hyper:
        if getattr(args, key) is not None:
            hyper[key] = getattr(args, key)
    count = hyper.pop("num_teachers", 1 if method.defaults else 0)
    settings = {"dataset": args.dataset, "data": data.digest, "imb": args.imb, "imb_type": args.imb_type}
    settings |= {"subset_seed": args.subset_seed, "method": args.method, "network": args.student}
    settings |= {"head": method.head, "colour": False, "precision": precision, "seed": args.seed}
    settings |= {key: getattr(args, key) for key in RECIPE} | {"hyper": hyper}
    if args.teacher_checkpoint:
        teachers = [checkpoint_identity(path, settings) for path in args.teacher_checkpoint]
    else:  # other seeds than the student's, or it would start as its own untrained teacher
        teachers = [
            {"network": args.teacher, "method": args.teacher_method, "head": method.head}
            | {"colour": k >= count - count // 2, "seed": args.seed + 1000 + k}
            for k in range(count)
        ]
    return settings | {"teachers": teachers}


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that this method would ignore, then fill in the defaults."""
    method = METHODS[args.method]
    own = {*method.defaults} | ({"teacher_checkpoint"} if method.defaults else set())
    every = {key for m in METHODS.values() for key in m.defaults} | {"teacher_checkpoint"}
    for key in sorted(every - own):
        if getattr(args, key) is not None:
            raise InputError(f"--{key.replace('_', '-')} does nothing with --method {args.method}")
    for key in ("teacher", "teacher_method", "num_teachers"):
        if args.teacher_checkpoint and getattr(args, key) is not None:
            flag = key.replace("_", "-")
            raise InputError(f"--{flag} and --teacher-checkpoint exclude each other: the file says")
    if args.method != "cbd" and len(args.teacher_checkpoint or []) > 1:
        raise InputError("--teacher-checkpoint: only --method cbd takes several")
    if args.method == "bkd" and args.beta is not None and args.beta >= 1:
        raise InputError(f"--beta {args.beta:g}: bkd wants a number in [0, 1)")
    if args.method == "cbd" and args.alpha is not None and args.alpha > 1:
        raise InputError(f"--alpha {args.alpha:g}: cbd wants a number in [0, 1]")
    small = {"dataset": "synthetic", "student": "resnet8", "epochs": 3, "batch_size": 64}
    small |= {"runs_dir": "runs/smoke", "teacher": "resnet8"}
    usual = {"dataset": "cifar100", "student": "resnet32", "runs_dir": "runs"} | RECIPE
    if method.defaults and not args.teacher_checkpoint:
        usual |= TEACHER
    for key, value in (usual | {k: v for k, v in small.items() if k in usual} if args.smoke else usual).items():
        if getattr(args, key) is None:
            setattr(args, key, value)


def choose_device(args: argparse.Namespace) -> tuple[torch.device, str]:
    """The device and the precision of this run; asking for what is not there is an error."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if cuda:
        fast = torch.cuda.get_device_capability() >= (8, 0)
        torch.backends.cudnn.benchmark = True
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    precision = ("bf16" if fast else "fp32") if args.precision == "auto" else args.precision
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    args.eval_every = args.eval_every or (1 if cuda else 5)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"), precision


def run_command(args: argparse.Namespace) -> None:
    if args.table is not None:
        return table(args.table or [args.runs_dir or "runs"])
    if args.plot:
        return plot(args.plot[0], args.plot[1:] or [args.runs_dir or "runs"])
    check_flags(args)
    device, precision = choose_device(args)
    data = load_dataset(args.dataset, args.data_dir, args.imb, args.imb_type, args.subset_seed)
    settings = resolve(args, data, precision)
    if args.bench:
        return bench(settings, data, args, device)
    counts = data.class_counts
    sizes = [sum(low <= n <= high for n in counts) for low, high in GROUPS.values()]
    print(f"data     {data.name}, imb {args.imb:g} ({args.imb_type}): {sum(counts):,} training images, "
          f"{max(counts)}..{min(counts)} a class; {len(counts)} classes: {sizes[0]} many, "
          f"{sizes[1]} medium, {sizes[2]} few; {len(data.test_targets):,} test images")  # fmt: skip
    hyper = ", ".join(f"{key} {value:g}" for key, value in settings["hyper"].items())
    print(f"method   {args.method}: {METHODS[args.method].formula}" + f"; {hyper}" * bool(hyper))
    print(f"         {METHODS[args.method].source}")
    print(f"recipe   {args.epochs} epochs, batch {args.batch_size}, lr {args.lr:g}, weight decay "
          f"{args.weight_decay:g}, seed {args.seed}")  # fmt: skip
    print(f"device   {describe(device)}, {precision}", flush=True)
    if device.type == "cpu":
        left = estimate(settings, data, args, device)
        print(f"time     about {duration(left)} on this CPU, teachers included", flush=True)
    result = execute(settings, data, args, device)
    report(Path(args.runs_dir) / run_name(settings), result)


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without block characters still gets text
    args = parse_flags(argv)
    try:
        run_command(args)
        return 0
    except InputError as error:
        message, status = str(error), 2
    except RunError as error:
        message, status = str(error), error.status
    except torch.OutOfMemoryError:
        message, status = f"out of memory on CUDA with --batch-size {args.batch_size}: try a smaller one", 1
    except OSError as error:
        message, status = f"{error.filename or 'input or output'}: {error.strerror or error}", 1
    except KeyboardInterrupt:
        message, status = "interrupted; the same command continues after the last whole epoch", 130
    print(f"kd_lt.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
