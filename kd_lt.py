# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the kd-lt authors
"""Knowledge distillation for long-tailed recognition: vanilla KD, BKD, CBD, LTKD (our reading) and
KRDistill (our reconstruction).

    python kd_lt.py --method bkd --imb 100        train a teacher, distil a student, report

Read top to bottom: the losses (free functions, made to be copied), the table of methods, one
training loop for teachers and students, and behind them run folders, reports and the flags.
"""
import argparse
import contextlib
import hashlib
import io
import itertools
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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Batches, Dataset, InputError, load_dataset, normalise, write_whole
from models import NETWORKS, Output, build_model

VERSION = "1.0.0"

# ---- losses: student and teacher tensors, targets and class counts in, one scalar out
#
# B samples, C classes, D features. Logits are (B, C), features (B, D), float of any width, on any
# device (half precision: cast to float32 first, as the training loop does); targets (B,) int64.
# class_counts: C training-image counts >= 1, a sequence, which is checked, or a tensor, which is
# used as it is: reading it back would stall a GPU. Every loss is a mean over the batch, and no
# gradient reaches the teacher. Wrong shapes or hyperparameters raise ValueError.


def as_counts(class_counts: Sequence[float] | Tensor, num_classes: int | None = None) -> Tensor:
    """class_counts as a float64 tensor (C,). A tensor is not checked: a count of 0 gives nan."""
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


def check_pair(student: Tensor, teacher: Tensor, what: str, temperature: float = 1.0) -> None:
    """ValueError unless both have one shape and the temperature is positive."""
    if student.shape != teacher.shape:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"student and teacher {what} must have one shape, not {shapes}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")


def distillation_kl(target_log_probs: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """T^2 mean_B sum_c q_c (log q_c - log softmax(z^s/T)_c), with target_log_probs log q (B, C)."""
    check_pair(student_logits, target_log_probs, "logits", temperature)
    log_probs = F.log_softmax(student_logits / temperature, dim=1)
    divergence = F.kl_div(log_probs, target_log_probs, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def effective_number_weights(class_counts: Sequence[float] | Tensor,
                             beta: float = 0.9999) -> Tensor:
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


def balanced_softmax_loss(logits: Tensor, targets: Tensor,
                          class_counts: Sequence[float] | Tensor) -> Tensor:
    """Balanced softmax: CE(z + log pi, y); test with plain z (Ren et al. 2020, arXiv 2007.10740).

    logits (B, C), targets (B,) int64, class_counts (C,). Scalar, mean over the batch.
    """
    return F.cross_entropy(logits + log_prior(class_counts, logits), targets)


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor,
            temperature: float = 2.0, alpha: float = 1.0) -> Tensor:
    """Vanilla distillation: CE + alpha KL_T (Hinton, Vinyals, Dean 2015, arXiv 1503.02531).

    student_logits, teacher_logits (B, C), targets (B,) int64. Scalar, mean over the batch; the KL
    term is multiplied by T^2. ValueError where shapes differ or temperature <= 0.
    """
    q = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    ce = F.cross_entropy(student_logits, targets)
    return ce + alpha * distillation_kl(q, student_logits, temperature)


def bkd_loss(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor,
             class_counts: Sequence[float] | Tensor, temperature: float = 2.0,
             alpha: float = 1.0, beta: float = 0.9999) -> Tensor:
    """Balanced knowledge distillation: CE + alpha KL_T to a re-weighted teacher (arXiv 2104.10510).

    q_c = w_c p_c / sum_j w_j p_j with p = softmax(z^t/T) and w = effective_number_weights. The
    weights belong to the class columns of q: taken by the sample's label they would cancel.
    student_logits, teacher_logits (B, C), targets (B,) int64, class_counts (C,). Scalar, mean over
    the batch; the KL term is multiplied by T^2. ValueError as kd_loss, and for beta not in [0, 1).
    """
    check_pair(student_logits, teacher_logits, "logits", temperature)
    counts = as_counts(class_counts, student_logits.shape[1])
    log_w = effective_number_weights(counts, beta).log().to(teacher_logits)  # (C,)
    q = F.log_softmax(teacher_logits.detach() / temperature + log_w, dim=1)
    ce = F.cross_entropy(student_logits, targets)
    return ce + alpha * distillation_kl(q, student_logits, temperature)


def cbd_loss(student_logits: Tensor, student_features: Tensor, teacher_features: Sequence[Tensor],
             targets: Tensor, alpha: float = 0.4, beta: float = 100.0) -> Tensor:
    """Class-balanced distillation: (1 - alpha) CE + alpha beta L_FD (arXiv 2104.05279).

    L_FD = mean_B(1 - <s, t>), s the student's features and t the K teachers', each normalised,
    joined and normalised again. Its batches must be sampled class-balanced: nothing else in it is.
    student_logits (B, C), student_features (B, D_1 + ... + D_K), teacher_features K tensors
    (B, D_k), targets (B,) int64. Scalar, mean over the batch. ValueError where the widths differ.
    """
    t = torch.cat([F.normalize(features.detach(), dim=1) for features in teacher_features], dim=1)
    check_pair(student_features, t, "features (all teachers' joined)")
    ce = F.cross_entropy(student_logits, targets)
    l_fd = (1 - F.cosine_similarity(student_features, t, dim=1)).mean()
    return (1 - alpha) * ce + alpha * beta * l_fd


def balanced_prototypes(class_means: Tensor) -> Tensor:
    """The class arrangement that favours no direction and is nearest to the teacher's own.

    Our reconstruction of KRDistill's "balanced category priors" (arXiv 2409.07694, abstract).
    M = m_c - mean_c m_c, compact SVD M = U S V^T, P = U V^T, then rows scaled to length 1: the
    simplex ETF (cosines -1/(C-1)) for D >= C - 1, the nearest tight frame for smaller D.
    class_means (C, D) float, C >= 2. Returns (C, D) in its dtype, computed in float64.
    """
    if class_means.ndim != 2 or len(class_means) < 2:
        raise ValueError(f"class_means must be (C, D) with C >= 2, not {tuple(class_means.shape)}")
    centred = class_means.double() - class_means.double().mean(0)
    u, s, vt = torch.linalg.svd(centred, full_matrices=False)
    kept = s > 1e-9 * s[0]  # the directions that the centred means span: at most C - 1
    return F.normalize(u[:, kept] @ vt[kept], dim=1).to(class_means)


def rectify_features(teacher_features: Tensor, targets: Tensor, class_means: Tensor,
                     prototypes: Tensor) -> Tensor:
    """Move each feature from its class mean to its class's balanced place (our reconstruction).

    r = norm(t - m_y + s P_y), s = mean_c |m_c - mean_c m_c|: what is particular to the image stays.
    teacher_features (B, D), targets (B,) int64, class_means and prototypes (C, D). Returns (B, D),
    rows of length 1.
    """
    scale = (class_means - class_means.mean(0)).norm(dim=1).mean()
    return F.normalize(teacher_features + (scale * prototypes - class_means)[targets], dim=1)


def rectify_logits(teacher_logits: Tensor, targets: Tensor,
                   class_counts: Sequence[float] | Tensor) -> Tensor:
    """Take the training prior out of the logits, then let the true class rank first.

    Our reconstruction (KRDistill, arXiv 2409.07694): z~ = z^t - log pi; where the largest entry is
    not the true class's, the two change places. teacher_logits (B, C), targets (B,) int64,
    class_counts (C,). Returns (B, C).
    """
    z = teacher_logits - log_prior(class_counts, teacher_logits)
    true, top = targets[:, None], z.argmax(dim=1, keepdim=True)
    return z.scatter(1, top, z.gather(1, true)).scatter(1, true, z.gather(1, top))


def krdistill_loss(student_logits: Tensor, student_features: Tensor, teacher_logits: Tensor,
                   rectified_features: Tensor, targets: Tensor,
                   class_counts: Sequence[float] | Tensor, temperature: float = 2.0,
                   alpha: float = 1.0, gamma: float = 2.0) -> Tensor:
    """Knowledge rectification distillation, our reconstruction from the abstract of 2409.07694.

    L = CE(z^s + log pi, y) + alpha L_LRD + gamma L_RRD; L_LRD = KL_T to rectify_logits(z^t),
    L_RRD = mean_B(1 - <norm(g), r>). alpha = 0 or gamma = 0 switches a part off.
    student_logits, teacher_logits (B, C); student_features (B, D): g, the student's features mapped
    linearly to the teacher's width; rectified_features (B, D): r, from rectify_features; targets
    (B,) int64; class_counts (C,). Scalar, mean over the batch; L_LRD contains the factor T^2.
    """
    check_pair(student_features, rectified_features, "features")
    q = rectify_logits(teacher_logits.detach(), targets, class_counts) / temperature
    ce = balanced_softmax_loss(student_logits, targets, class_counts)
    l_lrd = distillation_kl(F.log_softmax(q, dim=1), student_logits, temperature)
    r = rectified_features.detach()
    l_rrd = (1 - F.cosine_similarity(student_features, r, dim=1)).mean()
    return ce + alpha * l_lrd + gamma * l_rrd


def grouped_kl(student_logits: Tensor, teacher_logits: Tensor,
               class_counts: Sequence[float] | Tensor, temperature: float,
               balance: bool = True) -> tuple[Tensor, Tensor]:
    """KL between and within head, medium and tail: two scalars, means over the batch, without T^2.

    Classes sorted by count: first 33 % head, last 33 % tail. With balance=False the two add up to
    KL(softmax(z^t/T) || softmax(z^s/T)) exactly. balance=True: the teacher's group masses are
    rescaled so that the batch's sums are uniform, and every group's inner KL counts in full (LTKD).
    """
    check_pair(student_logits, teacher_logits, "logits", temperature)
    num_classes = student_logits.shape[1]
    counts = as_counts(class_counts, num_classes)
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


def ltkd_loss(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor,
              class_counts: Sequence[float] | Tensor, temperature: float = 2.0,
              alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """Long-tailed KD: CE + alpha T^2 cross + beta T^2 within (arXiv 2506.18496, our reading).

    cross and within are grouped_kl's; the paper's T, alpha and beta could not be read, so these
    defaults are ours. student_logits, teacher_logits (B, C), targets (B,) int64, class_counts (C,),
    C >= 3. Scalar, mean over the batch.
    """
    cross, within = grouped_kl(student_logits, teacher_logits, class_counts, temperature)
    ce = F.cross_entropy(student_logits, targets)
    return ce + temperature**2 * (alpha * cross + beta * within)


# ---- methods: where they differ, and nowhere else


@dataclass(frozen=True)
class Method:
    formula: str
    source: str
    defaults: dict = field(default_factory=dict)  # of its flags; only those that distil have any
    sampler: str = "instance"
    head: str = "linear"  # of student and teachers
    projects: bool = False  # the student's features to the teachers' total width, where it differs
    rectifies: bool = False  # the teacher, by its class means; and maps features to it linearly


TEACHER = {"teacher": "resnet32", "teacher_method": "ce"}
SOFT = TEACHER | {"temperature": 2.0, "alpha": 1.0}
METHODS = {
    "ce": Method("CE(z, y)", "no distillation"),
    "bsce": Method("CE(z + log pi, y)", "balanced softmax, arXiv 2007.10740; no distillation"),
    "kd": Method("CE + alpha KL_T(p || student)", "arXiv 1503.02531", SOFT),
    "bkd": Method("CE + alpha KL_T(w p / sum w p || student), w inverse effective numbers",
                  "the released code of arXiv 2104.10510",
                  SOFT | {"beta": 0.9999, "bkd_start": None}),
    "cbd": Method("(1 - alpha) CE + alpha beta (1 - cos(student, teacher features))",
                  "the released code of arXiv 2104.05279",
                  TEACHER | {"num_teachers": 1, "alpha": 0.4, "beta": 100.0},
                  sampler="class", head="cosine", projects=True),
    "krdistill": Method("CE(z + log pi, y) + alpha L_LRD + gamma L_RRD",
                        "our reconstruction from the abstract of arXiv 2409.07694",
                        SOFT | {"gamma": 2.0}, rectifies=True),
    "ltkd": Method("CE + T^2 (alpha KL across groups + beta KL within groups)",
                   "our reading of arXiv 2506.18496", SOFT | {"beta": 1.0}),
}


def method_loss(method: str, s: Output, t: list[Output], y: Tensor, c: SimpleNamespace) -> Tensor:
    """The method's loss of student s, teachers t and targets y; c knows the run's other numbers."""
    match method:
        case "ce":
            return F.cross_entropy(s.logits, y)
        case "bsce":
            return balanced_softmax_loss(s.logits, y, c.class_counts)
        case "kd":
            return kd_loss(s.logits, t[0].logits, y, c.temperature, c.alpha)
        case "bkd":
            weights = (c.weight_counts, c.temperature, c.alpha, c.beta)
            return bkd_loss(s.logits, t[0].logits, y, *weights)
        case "cbd":
            features = [teacher.features for teacher in t]
            return cbd_loss(s.logits, s.features, features, y, c.alpha, c.beta)
        case "krdistill":
            g = c.adapter(s.features)
            r = rectify_features(t[0].features, y, c.class_means, c.prototypes)
            weights = (c.class_counts, c.temperature, c.alpha, c.gamma)
            return krdistill_loss(s.logits, g, t[0].logits + c.teacher_tilt, r, y, *weights)
        case "ltkd":
            weights = (c.class_counts, c.temperature, c.alpha, c.beta)
            return ltkd_loss(s.logits, t[0].logits, y, *weights)


# ---- training: one loop for teachers and students

RECIPE = {"epochs": 200, "batch_size": 128, "lr": 0.1, "weight_decay": 2e-4}
BKD_START = {"cifar10": 0.8}  # the share of training before BKD's weights act, as in its code
GROUPS = {"many": (101, math.inf), "medium": (20, 100), "few": (0, 19)}  # training images


def learning_rate(epoch: int, epochs: int, base: float) -> float:
    """The rate in epoch 0..epochs-1: up over 5 epochs, x0.01 from 80 %, x0.0001 from 90 %."""
    decay = 0.0001 if 10 * epoch >= 9 * epochs else 0.01 if 10 * epoch >= 8 * epochs else 1.0
    return base * decay * min(1.0, (epoch + 1) / 5)


def set_up(settings: dict, data: Dataset, teachers: list[nn.Module], device) -> SimpleNamespace:
    """All that a run trains with. run.step(size) is one step; it never waits for the device."""
    method, hyper, name = METHODS[settings["method"]], settings["hyper"], settings["network"]
    counts = torch.tensor(data.class_counts, dtype=torch.float64, device=device)
    width = sum(teacher.num_features for teacher in teachers)
    network = {"name": name, "num_classes": len(counts), "head": settings["head"]}
    own_width = NETWORKS[name][2][-1]  # the last stage's channels
    if method.projects and width != own_width:
        network["projection"] = width
    with torch.random.fork_rng(devices=[]):  # drawn on the CPU: the same start on every device
        torch.manual_seed(settings["seed"])
        student, adapter = build_model(**network), nn.Identity()
        if method.rectifies:  # g, from the student's to the teacher's width
            adapter = nn.Linear(own_width, width)
    student.to(device, memory_format=torch.channels_last)
    parameters = [*student.parameters(), *adapter.to(device).parameters()]
    rate = torch.tensor(0.0, device=device)  # a tensor, so that a captured step reads its new value
    decay = settings["weight_decay"]
    optimizer = torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=decay, fused=True)
    momentum = [torch.zeros_like(parameter) for parameter in parameters]
    for parameter, buffer in zip(parameters, momentum):
        optimizer.state[parameter]["momentum_buffer"] = buffer
    train = (data.train_images, data.train_targets, data.class_counts)
    batches = Batches(*train, settings["batch_size"], device, method.sampler, settings["colour"])
    mixed = autocast(device, settings["precision"])
    c = SimpleNamespace(**hyper, class_counts=counts, weight_counts=counts.clone(), adapter=adapter)
    if method.rectifies:
        c.class_means = class_means(teachers[0], data, device, mixed)
        c.prototypes = balanced_prototypes(c.class_means)
        # rectify_logits takes log pi out, but logits learned under z + log pi never had it in
        without = settings["teachers"][0]["method"] in ("bsce", "krdistill")
        c.teacher_tilt = (counts / counts.sum()).log().float() if without else 0.0
    losses, correct = torch.zeros(len(batches.sizes), device=device), torch.zeros((), device=device)
    index = torch.zeros(1, dtype=torch.int64, device=device)  # of the step in its epoch

    def step(size: int) -> None:
        images, y = batches.next(size)
        with mixed():
            with torch.no_grad():
                t = [teacher(images) for teacher in teachers]
            s = student(images)
        loss = method_loss(settings["method"], s, t, y, c)
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
            c.weight_counts.copy_(counts if active else torch.ones_like(counts))
        student.train()
        batches.shuffle(generator)
        index.zero_()
        correct.zero_()

    state = [*parameters, *student.buffers(), *momentum, batches.position, losses, correct, index]
    return SimpleNamespace(
        settings=settings, network=network, student=student, adapter=adapter, momentum=momentum,
        batches=batches, mixed=mixed, c=c, losses=losses, correct=correct, index=index, state=state,
        step=step, start_epoch=start_epoch,
    )


def freeze(teacher: nn.Module, precision: str) -> nn.Module:
    """In eval mode, without gradients; the weights that autocast would cast in every step, cast."""
    for module in teacher.modules():
        if isinstance(module, nn.Conv2d) and precision == "bf16":
            module.bfloat16()
    return teacher.eval().requires_grad_(False)


def autocast(device: torch.device, precision: str) -> Callable:
    """Makes autocast contexts, without the weight cache that a CUDA graph cannot hold."""
    kind, on = device.type, precision == "bf16"
    return lambda: torch.autocast(kind, torch.bfloat16, enabled=on, cache_enabled=False)


@torch.no_grad()
def capture(run: SimpleNamespace) -> Callable[[int], None]:
    """run.step recorded as one CUDA graph for each batch size; the run's state stays as it was."""
    saved = [tensor.clone() for tensor in run.state]
    sizes, graphs, pool = sorted(set(run.batches.sizes)), {}, torch.cuda.graph_pool_handle()
    run.student.train()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.enable_grad():
        for size in sizes * 3:  # warm-up: cuDNN chooses its kernels, the allocator settles
            run.batches.position.zero_()
            run.index.zero_()
            run.step(size)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.reset_peak_memory_stats()  # the kernels' choice took more than any step will
    for size in sizes:
        graphs[size] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[size], pool=pool, stream=side), torch.enable_grad():
            run.step(size)
    for tensor, value in zip(run.state, saved):
        tensor.copy_(value)
    return lambda size: graphs[size].replay()


def train(settings: dict, data: Dataset, teachers: list[nn.Module], folder: Path, device,
          eval_every: int) -> dict:
    """Train one network, teacher or student, to its last epoch; returns its scores.

    Continues from folder/last.pt where there is one. An epoch ends with a row on the terminal, a
    line in folder/log.jsonl and a whole checkpoint, in that order.
    """
    run = set_up(settings, data, teachers, device)
    generator = torch.Generator().manual_seed(settings["seed"])
    done, spent, devices = restore(run, generator, folder, device)
    step = capture(run) if device.type == "cuda" else run.step
    data = data._replace(test_images=data.test_images.to(device))
    epochs, images, sizes = settings["epochs"], len(data.train_targets), run.batches.sizes
    print("".join(f"{title:>{width}}" for title, width, _ in COLUMNS.values()))
    started, scores = time.perf_counter(), None
    for epoch in range(done, epochs):
        began = time.perf_counter()
        run.start_epoch(epoch, generator)
        for size in sizes:
            step(size)
        losses = run.losses.tolist()  # the epoch's first read-back
        rate = images / (time.perf_counter() - began)
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            where = f"the loss is {losses[bad[0]]} at epoch {epoch + 1}, step {bad[0] + 1}"
            raise RunError(f"{where}: try a smaller --lr or --alpha. {folder} keeps the checkpoint "
                           "of the epoch before, if there was one")
        row = {"epoch": epoch + 1, "lr": learning_rate(epoch, epochs, settings["lr"])}
        row["loss"] = sum(loss * size for loss, size in zip(losses, sizes)) / images
        row["train_top1"] = 100 * run.correct.item() / images
        if epoch + 1 == epochs or (epoch + 1) % eval_every == 0:
            scores = test(run.student, data, device, run.mixed)
            row |= {key: scores[key] for key in ("top1", *GROUPS)}
        row["images_per_second"], now = round(rate), time.perf_counter()
        left = (now - started) / (epoch + 1 - done) * (epochs - epoch - 1)
        print_row(row | {"epoch": f"{epoch + 1}/{epochs}", "left": duration(left)})
        append_line(folder / "log.jsonl", row)
        save_checkpoint(run, generator, folder, epoch + 1, spent + now - started, devices)
    seconds = spent + time.perf_counter() - started
    if scores is None:  # an earlier process ended between the last checkpoint and result.json
        scores = test(run.student, data, device, run.mixed)
    return scores | {"seconds": seconds, "devices": devices}


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, device, mixed: Callable) -> Output:
    """Logits and features of all images (N, 3, 32, 32) uint8, unaugmented, in eval mode."""
    model.eval()
    parts = []
    for part in images.split(5000 if device.type == "cuda" else 500):
        part = part.to(device, memory_format=torch.channels_last)
        with mixed():
            parts.append(model(normalise(part)))
    return Output(*map(torch.cat, zip(*parts)))


def class_means(model: nn.Module, data: Dataset, device, mixed: Callable) -> Tensor:
    """(C, D): the model's mean feature of each class on its unaugmented training images."""
    features = predict(model, data.train_images, device, mixed).features.double()
    sums = features.new_zeros(len(data.class_counts), features.shape[1])
    sums.index_add_(0, data.train_targets.to(device), features)
    return (sums / sums.new_tensor(data.class_counts)[:, None]).float()


def test(model: nn.Module, data: Dataset, device, mixed: Callable) -> dict:
    """top1 over the test images; many, medium, few: means of their classes' accuracies; all in %.

    None for a group without classes and for a class without test images.
    """
    y, counts = data.test_targets, data.class_counts
    labels = predict(model, data.test_images, device, mixed).logits.argmax(dim=1).cpu()
    hits = torch.bincount(y[labels == y], minlength=len(counts)).tolist()
    totals = torch.bincount(y, minlength=len(counts)).tolist()
    per_class = [100 * hit / total if total else None for hit, total in zip(hits, totals)]
    scores = {"top1": 100 * sum(hits) / sum(totals)}
    for group, (low, high) in GROUPS.items():
        pairs = zip(per_class, counts)
        inside = [acc for acc, count in pairs if low <= count <= high and acc is not None]
        scores[group] = statistics.fmean(inside) if inside else None
    return scores | {"per_class": per_class, "class_counts": counts}


# ---- run folders: settings, log, checkpoint, result; one writer; nothing half-written


class RunError(Exception):
    """A run that cannot go on; shown without a traceback."""

    status = 1


class Busy(RunError):
    status = 75  # "try again later": run_all.sh leaves this run to the process that has it


def run_name(settings: dict) -> str:
    """Readable, and ending in a digest of all settings: different runs never share a folder."""
    parts = [Path(settings["dataset"]).stem[:40], f"imb{settings['imb']:g}", settings["method"]]
    parts += [settings["network"]]
    if teachers := settings["teachers"]:
        parts += ["from", teachers[0]["network"], teachers[0]["method"]]
        parts += [f"x{len(teachers)}"] if len(teachers) > 1 else []
    parts += [f"{key}{value}" for key, value in deviations(settings).items()]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    parts += [f"e{settings['epochs']}", f"s{settings['seed']}", digest]
    return re.sub(r"[^\w.-]", "_", "-".join(parts))


def deviations(settings: dict) -> dict:
    """The settings that are not the recipe's or the method's defaults, by name."""
    method, flat = METHODS[settings["method"]], settings | settings["hyper"]
    usual = RECIPE | {"imb_type": "exp", "subset_seed": 0, "colour": False, "head": method.head}
    usual |= method.defaults | {"bkd_start": BKD_START.get(settings["dataset"], 0.0)}
    del usual["epochs"]  # always shown by itself
    return {key: flat[key] for key in usual if key in flat and flat[key] != usual[key]}


def write_json(path: Path, content: dict) -> None:
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


@contextlib.contextmanager
def reading(path: Path, problem: str):
    """Whatever a damaged file makes the reader raise becomes an InputError that names the file."""
    try:
        yield
    except Exception as error:
        reason = re.split(r"\n|\. ", f"{type(error).__name__}: {error}")[0]
        raise InputError(f"{path}: {problem} ({reason})") from None


def read_json(path: Path, *keys: str) -> dict:
    with reading(path, "not what kd_lt.py wrote; move its folder away"):
        content = json.loads(path.read_text())
        [content[key] for key in ("settings", *keys)]
    return content


def read_result(path: Path) -> dict:
    scores = ("top1", *GROUPS, "per_class", "class_counts")
    return read_json(path, *scores, "seconds", "devices", "version", "teachers")


def append_line(path: Path, row: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def only_writer(folder: Path, wait: bool):
    """Hold the folder's lock, which the system drops when its process ends, however that ends."""
    import fcntl  # Linux and macOS; here, so that the losses import everywhere

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            message = f"{folder} is being written by {file.read() or 'another process'}"
            if not wait:
                raise Busy(f"{message}; this one stops") from None
            print(f"waiting  {message}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def claim(settings: dict, folder: Path, device) -> dict | None:
    """A finished run's result; None after claiming the folder of a new or unfinished one."""
    config, result = folder / "config.json", folder / "result.json"
    if config.exists():
        stored = read_json(config)["settings"]
        differing = sorted(k for k in settings | stored if settings.get(k) != stored.get(k))
        if differing:
            what = f"{folder} holds another run, config.json differs in {', '.join(differing)}"
            raise InputError(f"{what}: it is not reused and not overwritten; move it away or "
                             "choose another --runs-dir")
        return read_result(result) if result.exists() else None
    if (folder / "last.pt").exists() or result.exists():
        raise InputError(f"{folder} holds a run without its config.json: move it away")
    versions = {"kd_lt": VERSION, "python": platform.python_version(), "torch": torch.__version__}
    about = {"command": shlex.join(sys.argv), "versions": versions, "device": describe(device)}
    write_json(config, {"settings": settings} | about)
    return None


def save_checkpoint(run, generator, folder: Path, epoch: int, seconds: float, devices) -> None:
    content = {"settings": run.settings, "network": run.network, "epoch": epoch}
    content |= {"student": run.student.state_dict(), "adapter": run.adapter.state_dict()}
    content |= {"momentum": run.momentum, "generator": generator.get_state()}
    buffer = io.BytesIO()  # a full disk must fail in write_whole, not inside torch.save
    torch.save(content | {"seconds": seconds, "devices": devices}, buffer)
    write_whole(folder / "last.pt", buffer.getvalue())


def read_checkpoint(path: str | Path) -> tuple[Path, dict]:
    """last.pt of a run folder (or the file itself): plain tensors and numbers, never code."""
    path = Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint; give a run folder or its last.pt")
    with reading(path, "not a whole checkpoint of plain tensors"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"settings", "network", "epoch", "student"} - set(content)
    if missing:
        raise InputError(f"{path}: not a checkpoint of kd_lt.py: no {', '.join(sorted(missing))}")
    return path, content


def load_run(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The trained network of a run folder (or of its last.pt), in eval mode.

    model(data.normalise(images)) with images (B, 3, 32, 32) of 0..255 gives logits and features.
    Raises InputError where there is no whole checkpoint, or its weights do not fit its settings.
    """
    path, checkpoint = read_checkpoint(path)
    with reading(path, "weights and stored configuration disagree"):
        with torch.random.fork_rng(devices=[]):
            model = build_model(**checkpoint["network"])
        model.load_state_dict(checkpoint["student"])
    return model.eval().to(device, memory_format=torch.channels_last)


def restore(run, generator, folder: Path, device) -> tuple[int, float, list[str]]:
    """Load folder/last.pt into the run, if it exists: epochs done, seconds spent, devices used."""
    log, here = folder / "log.jsonl", describe(device)
    if not (folder / "last.pt").exists():
        write_whole(log, (json.dumps({"command": shlex.join(sys.argv)}) + "\n").encode())
        return 0, 0.0, [here]
    path, checkpoint = read_checkpoint(folder)
    if (checkpoint["settings"], checkpoint["network"]) != (run.settings, run.network):
        raise InputError(f"{path} is not of the run that config.json there describes: move it away")
    with reading(path, "does not fit its own settings: move it away"):
        run.student.load_state_dict(checkpoint["student"])
        run.adapter.load_state_dict(checkpoint["adapter"])
        for buffer, saved in zip(run.momentum, checkpoint["momentum"], strict=True):
            buffer.copy_(saved)
        generator.set_state(checkpoint["generator"])
    done = checkpoint["epoch"]
    # the log is written before the checkpoint: drop the line of an epoch that will be run again
    with reading(log, "not the log of that checkpoint: move its folder away"):
        lines = log.read_bytes().splitlines(keepends=True)[: 1 + done]
        [json.loads(line) for line in lines]
        if len(lines) != 1 + done or not lines[-1].endswith(b"\n"):
            raise ValueError(f"{len(lines) - 1} whole lines for {done} epochs")
    write_whole(log, b"".join(lines))
    print(f"resumed  after epoch {done} of {run.settings['epochs']}, from {path}")
    return done, checkpoint["seconds"], list(dict.fromkeys([*checkpoint["devices"], here]))


def describe(device: torch.device) -> str:
    """The device and the torch version, as configurations and reports show them."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"CPU with {torch.get_num_threads()} threads, torch {torch.__version__}"


# ---- one command: the teachers it needs, then the student


def execute(settings: dict, data: Dataset, args, device, teacher: bool = False) -> dict:
    """The result of this run: stored if it is finished, else trained now, teachers first."""
    folder, runs_dir = Path(args.runs_dir) / run_name(settings), Path(args.runs_dir)
    what = f"{'teacher' if teacher else 'student'}  {settings['network']}, {settings['method']}, "
    what += f"seed {settings['seed']}"
    with only_writer(folder, wait=teacher):
        if result := claim(settings, folder, device):
            print(f"{what}: finished before, not trained again; {folder}", flush=True)
            return result
        teachers, results = [], []
        given = args.teacher_checkpoint or [None] * len(settings["teachers"])
        for known, path in zip(settings["teachers"], given):
            if path:
                mixed = autocast(device, settings["precision"])
                scores = test(load_run(path, device), data, device, mixed)
            else:
                own = teacher_settings(settings, known)
                scores = execute(own, data, args, device, teacher=True)
                path, stored = read_checkpoint(runs_dir / run_name(own))
                if stored["settings"] != own or stored["epoch"] != own["epochs"]:
                    raise InputError(f"{path} is not of that run's end: move its folder away")
            teachers.append(freeze(load_run(path, device), settings["precision"]))
            results.append(known | scores)
            print(f"teacher  {known['network']}, {known['method']}: {scores_line(results[-1])}")
        print(f"{what}, {settings['epochs']} epochs, in {folder}", flush=True)
        result = train(settings, data, teachers, folder, device, args.eval_every)
        kept = ["network", "method", "top1", *GROUPS, "per_class", "class_counts"]
        results = [{key: scores[key] for key in kept} for scores in results]
        result = {"settings": settings, "version": VERSION} | result | {"teachers": results}
        write_json(folder / "result.json", result)
        return result


def teacher_settings(settings: dict, teacher: dict) -> dict:
    """The settings of the run that makes this teacher: the student's, but for what it is itself."""
    return settings | teacher | {"hyper": {}, "teachers": []}


def checkpoint_identity(given: str, settings: dict, num_classes: int) -> dict:
    """What a --teacher-checkpoint is, checked against its own settings and against this run's."""
    path, checkpoint = read_checkpoint(given)
    stored = checkpoint["settings"]
    load_run(path)
    for key in ("dataset", "imb", "imb_type", "subset_seed", "data", "head"):
        if stored.get(key) != settings[key]:
            both = f"its {key} is {stored.get(key)}, this run's is {settings[key]}"
            raise InputError(f"--teacher-checkpoint {given}: {both}")
    if all(stored.get(key) == settings[key] for key in ("network", "seed")):
        raise InputError(f"--teacher-checkpoint {given}: trained with --seed {settings['seed']}; "
                         "the student would start as its untrained teacher: choose another seed")
    classes = checkpoint["network"]["num_classes"]
    if classes != num_classes:
        raise InputError(f"--teacher-checkpoint {given}: of {classes} classes, not {num_classes}")
    if checkpoint["epoch"] != stored["epochs"]:
        at = f"stopped at epoch {checkpoint['epoch']} of {stored['epochs']}"
        raise InputError(f"--teacher-checkpoint {given}: {at}; finish it or give another")
    identity = {key: stored[key] for key in ("network", "method", "head", "colour")}
    return identity | {"checkpoint": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}


# ---- what a run prints

COLUMNS = {  # of a row: title, width, format
    "epoch": ("epoch", 9, ""), "lr": ("lr", 8, "g"), "loss": ("loss", 9, ".4f"),
    "train_top1": ("train", 8, ".2f"), "top1": ("test", 8, ".2f"), "many": ("many", 8, ".2f"),
    "medium": ("medium", 8, ".2f"), "few": ("few", 8, ".2f"),
    "images_per_second": ("img/s", 8, ""), "left": ("left", 8, ""),
}


def print_row(row: dict) -> None:
    line = ""
    for key, (_, width, style) in COLUMNS.items():
        value = row.get(key)
        line += f"{'-' if value is None else format(value, style):>{width}}"
    print(line, flush=True)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def scores_line(scores: dict) -> str:
    known = {"top-1": scores["top1"]} | {group: scores[group] for group in GROUPS}
    shown = {key: "absent" if value is None else f"{value:.2f}" for key, value in known.items()}
    return "  ".join(f"{key} {value}" for key, value in shown.items())


def class_buckets(counts: list[int], most: int) -> list[list[int]]:
    """The classes from head to tail, in at most `most` even parts."""
    ranked = torch.tensor(sorted(range(len(counts)), key=lambda c: -counts[c]))
    return [part.tolist() for part in ranked.tensor_split(min(most, len(counts)))]


def mean_of(values) -> float:
    """The mean of those that are not None; nan where none is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else math.nan


def report(folder: Path, result: dict) -> None:
    """Student beside teachers: the scores, and a picture of accuracy from head to tail."""
    own = "student" if result["teachers"] else "network"
    shown = [(f"{own} ({result['settings']['method']})", result)]
    shown += [(f"teacher ({scores['method']})", scores) for scores in result["teachers"]]
    buckets = class_buckets(result["class_counts"], 10)
    print(f"result   {folder}, test accuracy in % after the last epoch")
    for name, scores in shown:
        print(f"         {name:<20}{scores_line(scores)}")
    print(f"         by class, from head to tail, in {len(buckets)} parts:")
    for name, scores in shown:
        means = [mean_of(scores["per_class"][c] for c in bucket) for bucket in buckets]
        blocks = "".join(" ▁▂▃▄▅▆▇█"[0 if m != m else math.ceil(m / 12.5)] for m in means)
        numbers = " ".join("  -" if m != m else f"{m:3.0f}" for m in means)
        print(f"         {name:<20}{blocks}  {numbers}", flush=True)


# ---- how fast


def untrained(settings: dict, data: Dataset, device) -> tuple[SimpleNamespace, list[nn.Module]]:
    """A run with teachers of the right shape that know nothing: for timing, not for training."""
    num_classes = len(data.class_counts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teachers = [build_model(t["network"], num_classes, t["head"]) for t in settings["teachers"]]
    for model in teachers:
        freeze(model.to(device, memory_format=torch.channels_last), settings["precision"])
    return set_up(settings, data, teachers, device), teachers


def timed(block: Callable[[int], None], device, steps: int, repeats: int) -> float:
    """Median over repeats of block(steps)'s seconds a step, after one block that is not counted."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        block(steps)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / steps)
    return statistics.median(times[1:])


def seconds_per_step(run: SimpleNamespace, device, steps: int, repeats: int) -> float:
    """One whole-batch step as train() runs it, teachers included."""
    step = capture(run) if device.type == "cuda" else run.step
    run.start_epoch(0, torch.Generator().manual_seed(0))

    def block(count):
        for _ in range(count):
            run.batches.position.zero_()
            run.index.zero_()
            step(run.batches.sizes[0])

    return timed(block, device, steps, repeats)


def estimate(settings: dict, data: Dataset, device, eval_every: int, runs_dir) -> float:
    """Seconds of this run and its teachers', from a few steps, less what runs_dir has of them."""
    some = slice(0, 2 * settings["batch_size"])
    images, y = data.train_images[some], data.train_targets[some]
    little, total = data._replace(train_images=images, train_targets=y), 0.0
    for one in [settings, *map(lambda t: teacher_settings(settings, t), settings["teachers"])]:
        log = runs_dir / run_name(one) / "log.jsonl" if runs_dir else None
        done = log.read_bytes().count(b"\n") - 1 if log and log.exists() else 0
        left = 0 if "checkpoint" in one else max(0, one["epochs"] - done)
        if left == 0 and one is settings:
            break  # its teachers are not needed
        if left:
            run = untrained(one, little, device)[0]
            steps = 20 if device.type == "cuda" else 1
            seconds = seconds_per_step(run, device, steps, 3) / run.batches.sizes[0]
            tests = math.ceil(left / eval_every) * len(data.test_targets)
            total += seconds * (left * len(data.train_targets) + tests / 3)  # a test: a third
    return total


class PlainImages(torch.utils.data.Dataset):
    """One image at a time, cropped, flipped and normalised by itself, as the usual loader does."""

    def __init__(self, data: Dataset):
        self.images, self.targets = F.pad(data.train_images, (4, 4, 4, 4)), data.train_targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        top, left, mirrored = (int(torch.randint(n, ())) for n in (9, 9, 2))
        image = self.images[i, :, top : top + 32, left : left + 32]
        return normalise(image.flip(2) if mirrored else image), self.targets[i]


def plain_seconds_per_step(settings: dict, data: Dataset, device, steps, repeats) -> float:
    """The same step as most code has it: float32 (on CUDA with torch's own choice of TF32), NCHW,
    eager, DataLoader, loss read every step.
    """
    fp32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, True  # the default
    run, teachers = untrained(settings | {"precision": "fp32"}, data, device)
    for model in (run.student, *teachers):
        model.to(memory_format=torch.contiguous_format)
    student = run.student.train()
    parameters = [*student.parameters(), *run.adapter.parameters()]
    optimizer = torch.optim.SGD(parameters, settings["lr"], momentum=0.9,
                                weight_decay=settings["weight_decay"])
    workers = 4 if device.type == "cuda" else 0
    loader = torch.utils.data.DataLoader(PlainImages(data), settings["batch_size"], shuffle=True,
                                         num_workers=workers, persistent_workers=workers > 0)
    endless = (batch for _ in itertools.repeat(None) for batch in loader)

    def block(count):
        for images, y in itertools.islice(endless, count):
            images, y = images.to(device), y.to(device)
            with torch.no_grad():
                t = [teacher(images) for teacher in teachers]
            loss = method_loss(settings["method"], student(images), t, y, run.c)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    seconds = timed(block, device, steps, repeats)
    torch.backends.cudnn.allow_tf32 = fp32
    return seconds


def bench(settings: dict, data: Dataset, args, device) -> None:
    """Print the speed of the path that train() takes and of the plain path, on this device."""
    import resource

    from torch.utils.flop_counter import FlopCounterMode

    cuda, n = device.type == "cuda", 8192 if device.type == "cuda" else 2048
    run = untrained(settings, data, device)[0]
    batch, (steps, repeats) = run.batches.sizes[0], (50, 7) if cuda else (4, 5)
    run.start_epoch(0, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as flops:
        run.step(batch)
    ours = seconds_per_step(run, device, steps, repeats)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    memory = torch.cuda.max_memory_allocated() if cuda else unit * resource.getrusage(0).ru_maxrss
    plain = plain_seconds_per_step(settings, data, device, steps, repeats)
    dtype = torch.bfloat16 if settings["precision"] == "bf16" else torch.float32
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    peak = 2 * n**3 / timed(lambda count: [a @ b for _ in range(count)], device, 5, 5)
    rate = flops.get_total_flops() / ours
    networks = " from ".join([settings["network"], *(t["network"] for t in settings["teachers"])])
    print(f"bench    {settings['method']}, {networks}; {describe(device)}, {settings['precision']}")
    for name, seconds in (("this program", ours), ("plain path", plain)):
        speed = f"{1000 * seconds:9.2f} ms a step {batch / seconds:10.0f} images/s"
        print(f"         {name:<13}{speed}, batch {batch}")
    print(f"         ratio {plain / ours:.2f}; medians of {repeats} x {steps} steps, after warm-up")
    share = f"{100 * rate / peak:.0f} % of a large matrix product's {peak / 1e12:.3f}"
    print(f"         {rate / 1e12:.3f} TFLOP/s, {share}; peak memory {memory / 2**20:.0f} MiB")
    total = duration(estimate(settings, data, device, args.eval_every, None))
    print(f"         the command at {settings['epochs']} epochs, teachers included: about {total}")


# ---- results: the table and the picture

# Top-1 in %, ResNet-32 (kd, cbd: from ResNet-32), at these data sets and ratios.
PUBLISHED_AT = [(name, imb) for name in ("cifar100", "cifar10") for imb in (100, 50, 10)]
PUBLISHED = {
    "ce": "37.73 [1], 39.62 [2]|43.78 [1], 44.91 [2]|56.48 [2]"
    "|71.95 [1], 70.29 [2]|76.45 [1], 77.09 [2]|86.74 [2]",
    "bsce": "42.99 [1]|46.55 [1]|-|77.54 [1]|81.11 [1]|-",
    "kd from ce": "40.36 [3]|45.49 [3]|59.22 [3]|-|-|-",
    "kd from bsce": "45.52 [4]|50.83 [4]|-|78.88 [4]|82.44 [4]|-",
    "cbd from ce": "44.83 [5]|49.19 [5]|-|-|-|-",
}
PUBLISHED_WIDE = {"kd from ce": "42.48 [6]", "ltkd from ce": "51.08 [6]"}  # 8x4 from 32x4, imb 100
SOURCES = {
    "[1]": "zhangyongshun/BagofTricks-LT, its own runs",
    "[2]": "feidfoe/AdjustBnd4Imbalance, README",
    "[3]": 'Table 2 of "Long-tailed recognition via weight balancing"; its teacher is not stated',
    "[4]": "DiVE (KD from a balanced-softmax teacher), as BagofTricks-LT lists it",
    "[5]": "a re-implementation with another recipe, best test epoch",
    "[6]": "third-party notes on arXiv 2506.18496",
}


def published(settings: dict) -> str:
    """The nearest figure that we could read for a setting with default flags; or a dash.

    [1] and [2] have our recipe; method or recipe of the others differ or are not stated.
    """
    teachers, where = settings["teachers"], (settings["dataset"], settings["imb"])
    networks = [settings["network"], *(teacher["network"] for teacher in teachers)]
    key = " from ".join([settings["method"], *(teacher["method"] for teacher in teachers)])
    given = any("checkpoint" in teacher for teacher in teachers)
    if settings["epochs"] != 200 or deviations(settings) or given:
        return "-"
    if networks == ["resnet8x4", "resnet32x4"] and where == ("cifar100", 100):
        return PUBLISHED_WIDE.get(key, "-")
    if {*networks} != {"resnet32"} or where not in PUBLISHED_AT or key not in PUBLISHED:
        return "-"
    return PUBLISHED[key].split("|")[PUBLISHED_AT.index(where)]


def finished_runs(folders: list[str]) -> list[dict]:
    """The result.json of every finished run; a folder is a run or holds runs."""
    found = {}  # by path: a run that is named twice counts once
    for folder in map(Path, folders):
        own = folder / "result.json"
        paths = [own] if own.exists() else sorted(folder.glob("*/result.json"))
        if not paths:
            raise InputError(f"{folder}: no finished run there (no result.json)")
        found |= {path.resolve(): read_result(path) | {"folder": path.parent} for path in paths}
    return list(found.values())


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
    groups, used = by_setting(finished_runs(folders)), set()
    made = {f"kd-lt {r['version']} on {d}" for group in groups for r in group for d in r["devices"]}
    print(f"Test accuracy in % after the last epoch, made with {'; '.join(sorted(made))}.\n")
    head = "data|imb|method|networks|epochs|precision|n|top-1|many|medium|few|minutes|published"
    print(f"| {head.replace('|', ' | ')} |\n{'|---' * 13}|")
    for group in groups:
        s = group[0]["settings"]
        networks = list(dict.fromkeys(t["network"] for t in s["teachers"])) + [s["network"]]
        cells = [s["dataset"], f"{s['imb']:g}", label(s), " to ".join(networks)]
        cells += [str(s["epochs"]), s["precision"], str(len(group))]
        for key in ("top1", *GROUPS):
            values = [result[key] for result in group if result[key] is not None]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}" if values else "-")
        minutes = statistics.fmean(result["seconds"] for result in group) / 60
        cells += [f"{minutes:.1f}", published(s)]
        used |= set(re.findall(r"\[\d\]", cells[-1]))
        print(f"| {' | '.join(cells)} |")
    print("\nMean ± sample standard deviation over n seeds; ce and bsce count the runs made as")
    print("teachers too. many, medium, few: classes of more than 100, 20 to 100, fewer than 20")
    print("training images. minutes: training of this network alone. published: the nearest figure")
    print("that we could read, or a dash. krdistill is our reconstruction, ltkd our reading.")
    for key in sorted(used):
        print(f"{key} {SOURCES[key]}")


def plot(file: str, folders: list[str]) -> None:
    """Draw accuracy from head to tail and over the epochs, a line a setting, as PNG or SVG."""
    if Path(file).suffix not in (".png", ".svg"):
        raise InputError(f"--plot {file}: the name must end in .png or .svg")
    try:
        import matplotlib
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    data = {}  # a row of the picture for each
    for group in by_setting(finished_runs(folders)):
        s = group[0]["settings"]
        name = f"{s['dataset']}, imb {s['imb']:g} ({s['imb_type']})"
        data.setdefault((name, *group[0]["class_counts"]), []).append(group)
    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = {"figsize": (13, 5.5 * len(data)), "layout": "constrained", "squeeze": False}
    figure, axes = pyplot.subplots(len(data), 2, **size)
    for (left, right), ((name, *counts), groups) in zip(axes, data.items()):
        buckets = class_buckets(counts, 20)
        middles = [(i + 0.5) * len(counts) / len(buckets) - 0.5 for i in range(len(buckets))]
        bars = left.twinx()
        bars.fill_between(range(len(counts)), sorted(counts, reverse=True), color="0.88")
        bars.set(yscale="log", ylabel="training images of the class (grey)")
        left.set_zorder(bars.get_zorder() + 1)
        left.patch.set_visible(False)
        for i, group in enumerate(groups):
            s = group[0]["settings"]
            setting = f"{label(s)}, {s['network']}, {s['epochs']} epochs, {s['precision']}"
            style = {"label": f"{setting}, n = {len(group)}"}
            style |= {"marker": "osv^Dx*P"[i % 8], "linestyle": ("-", "--", ":", "-.")[i % 4]}
            style |= {"color": pyplot.cm.viridis(0.85 * i / max(1, len(groups) - 1))}
            means = [mean_of(r["per_class"][c] for r in group for c in part) for part in buckets]
            left.plot(middles, means, **style)
            lines = [(r["folder"] / "log.jsonl").read_text().splitlines()[1:] for r in group]
            rows = [row for log in lines for row in map(json.loads, log) if "top1" in row]
            epochs = sorted({row["epoch"] for row in rows})
            tops = [mean_of(row["top1"] for row in rows if row["epoch"] == e) for e in epochs]
            right.plot(epochs, tops, markevery=max(1, len(epochs) // 10), **style)
        left.set(title=name, xlabel="class, from most to fewest training images", ylim=(0, None))
        left.set(ylabel=f"test accuracy in %, means over {len(buckets)} parts of the classes")
        right.set(title="mean over seeds", xlabel="epoch", ylabel="top-1 test accuracy in %")
        right.legend(fontsize=8)
    figure.suptitle("krdistill is our reconstruction, ltkd our reading", fontsize=8)
    figure.savefig(file, dpi=150)
    print(f"plot     {file}: {sum(map(len, data.values()))} settings")


# ---- flags


def number(kind: type, low: float, high: float = 1e9) -> Callable:
    """An argparse type: an int or float from low to high."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not within {low:g} .. {high:g}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]  # for argparse's own message
    return parse


def method_table() -> str:
    """What stands below --help: two or three lines a method."""
    lines = ["methods, their losses, and the defaults of their own flags:"]
    for name, method in METHODS.items():
        own = {key: value for key, value in method.defaults.items() if key not in TEACHER}
        own |= {"bkd_start": "0 (cifar10: 0.8)"} if "bkd_start" in own else {}
        flags = "".join(f" {flag(key)} {value}" for key, value in own.items())
        teachers = "K teachers" if name == "cbd" else "1 teacher" if own else "no teacher"
        sampler = {"class": "class-balanced draws", "instance": "each image once an epoch"}
        about = f"{sampler[method.sampler]}, {method.head} head, {teachers}"
        lines += [f"  {name:<10} {method.formula}", f"{'':13}{method.source}", f"{'':13}{about}"]
        lines += [f"{'':12}{flags}"] if flags else []
    return "\n".join(lines)


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kd_lt.py", epilog=method_table(), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Knowledge distillation for long-tailed recognition: train the teacher or "
        "reuse it, distil the student, report many-, medium- and few-shot accuracy.")
    positive, weight = number(int, 1), number(float, 0)
    add = parser.add_argument_group("run").add_argument
    add("--method", choices=METHODS, default="bkd", help="see below (default: bkd)")
    add("--dataset", metavar="NAME", help="cifar100 (default), cifar10, synthetic, or FILE.npz with"
        " x_train, x_test (uint8, 32x32), y_train, y_test (integers)")
    add("--imb", type=number(float, 1), default=100.0, help="largest class / smallest; default 100")
    add("--imb-type", choices=("exp", "step"), default="exp", help="shape of the tail; default exp")
    add("--subset-seed", type=number(int, 0, 2**32 - 1), default=0,
        help="which images are kept; default 0, the published subset")
    add("--student", choices=NETWORKS, metavar="NETWORK",
        help=f"default resnet32; one of {', '.join(NETWORKS)}")
    add("--teacher", choices=NETWORKS, metavar="NETWORK", help="default resnet32")
    add("--teacher-method", choices=("ce", "bsce"), help="how the teacher is trained; default ce")
    add("--teacher-checkpoint", nargs="+", metavar="PATH", help="a run folder or last.pt to use")
    add("--num-teachers", type=positive, help="cbd; the second half trains on distorted colours")
    add("--seed", type=number(int, 0), default=0, help="of all else that is random; default 0")
    add = parser.add_argument_group("recipe of teacher and student").add_argument
    add("--epochs", type=positive, help="default 200")
    add("--batch-size", type=positive, help="default 128")
    add("--lr", type=number(float, 1e-6), help="default 0.1")
    add("--weight-decay", type=weight, help="default 0.0002")
    add = parser.add_argument_group("loss (defaults below)").add_argument
    add("--temperature", type=number(float, 1e-3), help="T of the softened probabilities")
    add("--alpha", type=weight, help="of distillation; krdistill (reconstruction): L_LRD; 0: off")
    add("--beta", type=weight, help="bkd: of effective numbers; cbd: of L_FD; ltkd: within groups")
    add("--gamma", type=weight, help="krdistill (reconstruction): of L_RRD; 0: off")
    add("--bkd-start", type=number(float, 0, 1), help="share of training before bkd's weights act")
    add = parser.add_argument_group("where and how").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default auto")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="default auto: bf16 where the hardware has it")
    add("--eval-every", type=positive, help="epochs between tests; default 1, on a CPU 5")
    add("--data-dir", default="data", help="where CIFAR is, or goes; default data")
    add("--runs-dir", help="where runs are kept; default runs")
    smoke = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in SMOKE.items())
    add("--smoke", action="store_true", help=f"a run of seconds, by other defaults: {smoke}")
    add = parser.add_argument_group("instead of a run").add_mutually_exclusive_group().add_argument
    add("--bench", action="store_true", help="measure the training step on this device")
    add("--table", nargs="*", metavar="RUNS", help="print finished runs as Markdown; default runs")
    add("--plot", nargs="+", metavar=("FILE", "RUNS"), help="draw finished runs, .png or .svg")
    return parser.parse_args(argv)


def resolve(args: argparse.Namespace, data: Dataset, precision: str) -> dict:
    """The settings that make a run what it is, every default filled in."""
    method = METHODS[args.method]
    hyper = {key: value for key, value in method.defaults.items() if key not in TEACHER}
    hyper |= {"bkd_start": BKD_START.get(args.dataset, 0.0)} if "bkd_start" in hyper else {}
    hyper |= {key: getattr(args, key) for key in hyper if getattr(args, key) is not None}
    count = hyper.pop("num_teachers", 1 if method.defaults else 0)
    same = ("dataset", "imb", "imb_type", "subset_seed", "method", "seed", *RECIPE)
    settings = {key: getattr(args, key) for key in same} | {"data": data.digest, "hyper": hyper}
    settings["dataset"] = Path(args.dataset).name  # a file by its content, wherever it lies
    settings |= {"network": args.student, "head": method.head, "colour": False}
    settings["precision"] = precision
    if args.teacher_checkpoint:
        classes = len(data.class_counts)
        teachers = [checkpoint_identity(p, settings, classes) for p in args.teacher_checkpoint]
    else:  # other seeds than the student's, or it would start as its own untrained teacher
        network, by = args.teacher, args.teacher_method
        teachers = [{"network": network, "method": by, "head": method.head,
                     "seed": args.seed + 1000 * (k + 1), "colour": k >= count - count // 2}
                    for k in range(count)]
    return settings | {"teachers": teachers}


SMOKE = {"dataset": "synthetic", "student": "resnet8", "teacher": "resnet8", "epochs": 8}
SMOKE |= {"batch_size": 64, "runs_dir": "runs/smoke"}


def flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that this run would ignore, then fill in the defaults that no method owns."""
    method, given = METHODS[args.method], {key for key, v in vars(args).items() if v is not None}
    own = {*method.defaults} | ({"teacher_checkpoint"} if method.defaults else set())
    of_methods = {"teacher_checkpoint"}.union(*(m.defaults for m in METHODS.values()))
    for key in sorted(of_methods & given - own):
        raise InputError(f"{flag(key)} does nothing with --method {args.method}: leave it out")
    for key in sorted({"teacher", "teacher_method", "num_teachers"} & given):
        if args.teacher_checkpoint:
            raise InputError(f"{flag(key)}: --teacher-checkpoint already says which teacher")
    if len(args.teacher_checkpoint or []) > 1 and args.method != "cbd":
        raise InputError("--teacher-checkpoint: only --method cbd takes several teachers")
    if args.method == "bkd" and (args.beta or 0) >= 1:
        raise InputError(f"--beta {args.beta:g}: bkd needs a number of at least 0 and below 1")
    if args.method == "cbd" and (args.alpha or 0) > 1:
        raise InputError(f"--alpha {args.alpha:g}: cbd needs a number of at least 0 and at most 1")
    if args.imb == 1 and str(args.dataset).endswith(".npz"):
        for key, unset in (("imb_type", "exp"), ("subset_seed", 0)):
            if getattr(args, key) != unset:
                raise InputError(f"{flag(key)} does nothing with a file at --imb 1: leave it out")
    usual = {"dataset": "cifar100", "student": "resnet32", "runs_dir": "runs"} | RECIPE | TEACHER
    for key, value in (usual | (SMOKE if args.smoke else {})).items():
        if getattr(args, key) is None:
            setattr(args, key, value)


def choose_device(args: argparse.Namespace) -> tuple[torch.device, str]:
    """The device and the precision of this run; asking for what is not there is an error."""
    found = torch.cuda.is_available()
    if args.device == "cuda" and not found:
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu or auto")
    device = torch.device("cuda" if found and args.device != "cpu" else "cpu")
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
        torch.backends.cudnn.benchmark = True
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if has_bf16 else "fp32"
    torch.backends.cudnn.allow_tf32 = precision == "bf16"  # fp32 means fp32
    args.eval_every = args.eval_every or (1 if device.type == "cuda" else 5)
    return device, precision


def run_command(args: argparse.Namespace) -> None:
    if args.table is not None or args.plot:
        folders = args.plot[1:] if args.plot else args.table
        usual = vars(parse_flags([])) | {"table": args.table, "plot": args.plot}
        for key in sorted(usual.keys() - (set() if folders else {"runs_dir", "smoke"})):
            if getattr(args, key) != usual[key]:
                what = f"--{'plot FILE' if args.plot else 'table'}{' RUNS' if folders else ''}"
                raise InputError(f"{flag(key)} does nothing with {what}: leave it out")
        folders = folders or [args.runs_dir or (SMOKE["runs_dir"] if args.smoke else "runs")]
        return plot(args.plot[0], folders) if args.plot else table(folders)
    check_flags(args)
    device, precision = choose_device(args)
    data = load_dataset(args.dataset, args.data_dir, args.imb, args.imb_type, args.subset_seed)
    if args.method == "ltkd" and len(data.class_counts) < 3:
        raise InputError(f"--method ltkd needs at least 3 classes, {args.dataset} has 2")
    settings = resolve(args, data, precision)
    if args.bench:
        return bench(settings, data, args, device)
    method, counts = METHODS[args.method], data.class_counts
    groups = ", ".join(f"{sum(low <= n <= high for n in counts)} {group}"
                       for group, (low, high) in GROUPS.items())
    own = "".join(f", {key} {value:g}" for key, value in settings["hyper"].items())
    recipe = ", ".join(f"{key.replace('_', ' ')} {settings[key]:g}" for key in RECIPE)
    images = f"{sum(counts):,} training images, {max(counts)}..{min(counts)} a class"
    print(f"data     {data.name}, imb {args.imb:g} ({args.imb_type}): {images}")
    print(f"         {len(counts)} classes: {groups}; {len(data.test_targets):,} test images")
    print(f"method   {args.method}{own}")
    print(f"         {method.formula}; {method.source}")
    print(f"recipe   {recipe}, seed {args.seed}")
    print(f"device   {describe(device)}, {precision}", flush=True)
    if device.type == "cpu":
        left = estimate(settings, data, device, args.eval_every, Path(args.runs_dir))
        if left:
            print(f"time     about {duration(left)} here, teachers included", flush=True)
    result = execute(settings, data, args, device)
    report(Path(args.runs_dir) / run_name(settings), result)


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without block characters still gets text
            stream.reconfigure(errors="replace")
    args = parse_flags(argv)
    try:
        run_command(args)
        sys.stdout.flush()  # here, where a failure can still be told
        return 0
    except InputError as error:
        message, status = str(error), 2
    except RunError as error:
        message, status = str(error), error.status
    except RuntimeError as error:  # torch's own OutOfMemoryError, or what it became in a capture
        known = isinstance(error, torch.OutOfMemoryError)
        if not known and "out of memory" not in f"{error} {error.__context__}":
            raise
        message = f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CUDA'}: "
        message += f"out of memory with --batch-size {args.batch_size}; try a smaller one"
        status = 1
    except BrokenPipeError:  # what we print to is gone: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = error.filename or args.runs_dir or "standard output"
        message, status = f"{where}: {error.strerror or error}", 1
    except KeyboardInterrupt:
        message, status = "interrupted; the same command continues after the last whole epoch", 130
    print(f"kd_lt.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
