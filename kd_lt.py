# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the kd-lt authors
"""Knowledge distillation for long-tailed recognition: KD, BKD, CBD, DiVE, KRDistill (reconstructed)

    python kd_lt.py --smoke                  the whole way in seconds, on generated images
    python kd_lt.py --method bkd --imb 100   train a teacher, distil the student, report

KRDistill is our reconstruction: its equations were not accessible. The file is read from top to
bottom:

    1 Losses                 to be copied: they need torch alone
    2 Methods and settings   what distinguishes a method, what decides a run's numbers
    3 Training               Trainer (one network, its teachers, one step) and the loop over epochs
    4 Evaluation             accuracies, by class and by group of classes
    5 Run folders            save, resume, teachers that are runs themselves
    6 Reports                the table and the picture
    7 Command line           flags, what is refused, main
"""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Batches, Dataset, InputError, load_dataset, normalise, write_whole
from models import NETWORKS, CosineClassifier, Output, make_network

try:
    import fcntl
except ImportError:  # Windows: runs work, unlocked
    fcntl = None

VERSION = "4.0.0"

# +----------------------------------------------------------------------------------------------+
# | 1 Losses                                                                                     |
# |                                                                                              |
# | To copy a loss, copy this whole section; it needs torch, math and Sequence alone.            |
# |                                                                                              |
# | B images, C classes, D features, K teachers. Any device and float dtype; computed in float32 |
# | at least. No gradient reaches a teacher. Each loss returns a scalar, the mean over the batch,|
# | in float32 or float64. ValueError: shapes that do not agree, even where they would           |
# | broadcast; class_counts below 1; a temperature or a beta out of range.                       |
# |                                                                                              |
# | kd, bkd, dive and krdistill are one family: a loss on the labels, and T^2 times the KL       |
# | divergence from a target, whose logits each shows in one line. krdistill, our                |
# | reconstruction, adds a loss on features.                                                     |
# +----------------------------------------------------------------------------------------------+

Counts = Sequence[float] | Tensor  # one number per class; a NumPy array is taken, too


def at_least_float32(tensor: Tensor) -> Tensor:
    """bf16 and fp16 as float32, because they would round a divergence away; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def as_counts(class_counts: Counts, logits: Tensor) -> Tensor:
    """The training images of each class as a float tensor (C,) on the device of the logits (B, C).

    The values in a tensor are trusted, because to look at them would make the CPU wait for the GPU
    and break torch.compile. The result has the dtype of the logits, at least float32; float64
    counts that are already on the logits' device stay float64, which not every device has.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if isinstance(class_counts, Tensor):
        counts = class_counts
        if counts.device == logits.device:
            dtype = torch.promote_types(dtype, counts.dtype)
    else:
        numbers = [float(n) for n in class_counts]
        if not all(1 <= n < math.inf for n in numbers):
            raise ValueError(
                "class_counts must be numbers of images, at least 1 each, in the order of the "
                f"classes, not {class_counts}"
            )
        counts = torch.tensor(numbers, dtype=dtype)

    if logits.ndim != 2 or counts.shape != logits.shape[1:]:
        raise ValueError(
            "logits and class_counts must be (B, C) and (C,), not "
            f"{tuple(logits.shape)} and {tuple(counts.shape)}"
        )
    return counts.to(logits.device, dtype)


def kl_to_target(student_logits: Tensor, target_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(target / T) || softmax(student / T)), both (B, C), as a scalar.

    T^2 keeps the gradient about equally large at every temperature.
    "batchmean" sums over the classes and takes the mean over the images, as the definition of the
    divergence has it; plain "mean" would divide by C, too. The target is passed on as a
    probability, not as its logarithm, so that a class of probability 0 adds 0. It receives no
    gradient, and is computed in the student's dtype, or in float32 for half precision. Float32
    is precise enough up to a temperature of some hundred.
    """
    if student_logits.ndim != 2 or student_logits.shape != target_logits.shape:
        raise ValueError(
            "student_logits and target_logits must both be (B, C), not "
            f"{tuple(student_logits.shape)} and {tuple(target_logits.shape)}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, not {temperature}")

    student = at_least_float32(student_logits)
    target = target_logits.detach().to(student.dtype)
    # softmax(target / T), written so that it rounds as in the runs of the README's table.
    q = F.log_softmax(target / temperature, dim=1).exp()
    log_p = F.log_softmax(student / temperature, dim=1)
    log_p = log_p.masked_fill(q == 0, 0)  # where both logits are -inf, 0 * -inf would be nan
    return temperature**2 * F.kl_div(log_p, q, reduction="batchmean")


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    temperature: float = 2.0,
    alpha: float = 1.0,
) -> Tensor:
    """KD: imitate the softened teacher, its bias included (Hinton et al. 2015, arXiv 1503.02531).

        L = CE(z, y) + alpha T^2 KL(p || softmax(z / T)),    p = softmax(z_teacher / T)

    CE skips images that are labelled -100; the KL, which needs no label, still counts them.

    student_logits    z, (B, C) float
    teacher_logits    z_teacher, (B, C) float; receives no gradient
    targets           y, (B,) int64
    """
    target_logits = teacher_logits

    kl = kl_to_target(student_logits, target_logits, temperature)
    ce = F.cross_entropy(at_least_float32(student_logits), targets)
    return ce + alpha * kl


def effective_number_weights(class_counts: Counts, beta: float = 0.9999) -> Tensor:
    """One weight for each class: its inverse effective number of images (arXiv 1901.05555).

        w_c = C v_c / sum_j v_j,    v_c = (1 - beta) / (1 - beta^n_c)

    beta = 0 weighs all classes alike; with beta towards 1 the weights become proportional to
    1 / n_c. The factor 1 - beta cancels in w. expm1 stays exact where beta^n_c is near 1.

    class_counts      n, (C,), each at least 1
    Returns (C,) of mean 1, in float64 if class_counts is a tensor or an array of that dtype, else
    in float32.
    """
    is_trusted = isinstance(class_counts, Tensor)  # see as_counts
    counts = class_counts if is_trusted else torch.as_tensor(class_counts)
    if counts.ndim != 1 or not (is_trusted or (counts >= 1).all()):
        raise ValueError(f"class_counts must be (C,), at least 1 each, not {class_counts}")
    if not 0 <= beta < 1:
        raise ValueError(f"beta must lie in [0, 1), not {beta}")

    log_beta = math.log(beta) if beta > 0 else -math.inf
    v = 1 / -torch.expm1(at_least_float32(counts) * log_beta)
    return v / v.mean()


def bkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    class_counts: Counts,
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta: float = 0.9999,
) -> Tensor:
    """Balanced KD: the teacher's probabilities of rare classes are raised (arXiv 2104.10510).

        L   = CE(z, y) + alpha T^2 KL(q || softmax(z / T))
        q_c = w_c p_c / sum_j w_j p_j,    p = softmax(z_teacher / T)

    w is effective_number_weights: it weighs the C classes within the target of each image. (A
    weight for the whole image, by its label, would cancel in q and leave plain KD.) Adding T log w
    to the logits is the same as weighting the probabilities. Follows the paper's released code.

    student_logits    z, (B, C) float
    teacher_logits    z_teacher, (B, C) float; receives no gradient
    targets           y, (B,) int64
    class_counts      training images of each class, (C,), each at least 1
    """
    counts = as_counts(class_counts, teacher_logits)
    teacher = at_least_float32(teacher_logits)
    log_w = effective_number_weights(counts, beta).log().to(teacher.dtype)
    target_logits = teacher + temperature * log_w

    kl = kl_to_target(student_logits, target_logits, temperature)
    ce = F.cross_entropy(at_least_float32(student_logits), targets)
    return ce + alpha * kl


def cbd_loss(
    student_logits: Tensor,
    student_features: Tensor,
    teacher_features: list[Tensor],
    targets: Tensor,
    alpha: float = 0.4,
    beta: float = 100.0,
) -> Tensor:
    """Class-balanced distillation: imitate the teachers' features (arXiv 2104.05279, its code).

        L = (1 - alpha) CE(z, y) + alpha beta mean_B(1 - cos(s, t))
        t = [t_1 / |t_1|, ..., t_K / |t_K|], joined

    The balance is in the batches, not here: they draw all classes equally often (Batches with
    sampler "class"). The logits are those of models.CosineClassifier on top of s.

    student_logits    z, (B, C) float, 20 times the cosines of s and the class vectors
    student_features  s, (B, D_1 + ... + D_K) float: as wide as all teachers together
    teacher_features  a list of K tensors (B, D_k) float, also for K = 1; they receive no gradient
    targets           y, (B,) int64
    """
    unit_features = [F.normalize(at_least_float32(f.detach()), dim=1) for f in teacher_features]
    t = torch.cat(unit_features, dim=1)
    if student_features.shape != t.shape or t.shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(
            f"student_features has shape {tuple(student_features.shape)}, teacher_features side by "
            f"side {tuple(t.shape)}, student_logits {tuple(student_logits.shape)}"
        )

    ce = F.cross_entropy(at_least_float32(student_logits), targets)
    l_fd = (1 - F.cosine_similarity(at_least_float32(student_features), t, dim=1)).mean()
    return (1 - alpha) * ce + alpha * beta * l_fd


def balanced_softmax_loss(logits: Tensor, targets: Tensor, class_counts: Counts) -> Tensor:
    """Balanced softmax: the log class shares are added, so that the network need not learn them.

        L = CE(z + log pi, y),    pi_c = n_c / sum_j n_j        (Ren et al. 2020, arXiv 2007.10740)

    For training alone: a test uses z as it is.

    logits            z, (B, C) float
    targets           y, (B,) int64
    class_counts      n, training images of each class, (C,), each at least 1
    """
    counts = as_counts(class_counts, logits)
    z = at_least_float32(logits)
    log_pi = (counts / counts.sum()).log().to(z.dtype)

    return F.cross_entropy(z + log_pi, targets)


def dive_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    class_counts: Counts,
    temperature: float = 2.0,
    alpha: float = 0.5,
    power: float = 0.5,
) -> Tensor:
    """DiVE: balanced softmax on the labels, and a flattened teacher (arXiv 2103.15042).

        L   = (1 - alpha) CE(z + log pi, y) + alpha T^2 KL(q || softmax(z / T))
        q_c = p_c^power / sum_j p_j^power,    p = softmax(z_teacher / T)

    The teacher, too, was trained with balanced softmax. power = 1 leaves it as it is, 0.5 takes
    the square roots of its probabilities. Follows the code in BagofTricks-LT.

    student_logits    z, (B, C) float
    teacher_logits    z_teacher, (B, C) float; receives no gradient
    targets           y, (B,) int64
    class_counts      training images of each class, (C,), each at least 1
    """
    target_logits = power * at_least_float32(teacher_logits)

    bsce = balanced_softmax_loss(student_logits, targets, class_counts)
    return (1 - alpha) * bsce + alpha * kl_to_target(student_logits, target_logits, temperature)


# KRDistill, OUR RECONSTRUCTION: of the paper (arXiv 2409.07694) only the abstract and a short
# summary were accessible. They say that the teacher's imbalance is mended in its representation,
# by balanced category priors, and in its predictions. The equations are ours. The order in which
# the four functions are used:
#
#     class_means = ...       # once, (C, D): the teacher's mean features of each class, on training
#                             # images without augmentation, in eval mode
#     prototypes = balanced_prototypes(class_means)                                # once, (C, D)
#     adapter = torch.nn.Linear(student_width, D)         # trained with the student, then dropped
#
#     rectified_logits = rectify_logits(teacher_logits, targets, class_counts)     # in each step
#     rectified_features = rectify_features(teacher_features, targets, class_means, prototypes)
#     loss = krdistill_loss(student_logits, adapter(student_features), rectified_logits,
#                           rectified_features, targets, class_counts)


def balanced_prototypes(class_means: Tensor) -> Tensor:
    """A place for each class: the teacher's class means, spread equally in all directions.

        M_c = m_c - mean_j m_j,    M = U S V^T (thin),    P = U V^T, its rows scaled to length 1

    A long-tailed teacher spends long directions on head classes and short ones on the tail. S
    holds those lengths, and is dropped; the classes stay as near to the teacher's own arrangement
    as that allows. Where the M_c span C - 1 dimensions, every two prototypes have the cosine
    -1 / (C - 1). For D < C - 1, as with 64 features on CIFAR-100, the spread is nearly equal: the
    scaled rows undo a little of it, and some classes stay nearer to each other than others.

    class_means       m, (C, D) float, C >= 2
    Returns (C, D), on the device of class_means, in float32 or float64.
    """
    if class_means.ndim != 2 or len(class_means) < 2:
        raise ValueError(f"class_means must be (C, D) with C >= 2, not {tuple(class_means.shape)}")

    means = class_means.detach().cpu().double()  # once a run; not every device has float64
    u, s, vt = torch.linalg.svd(means - means.mean(0), full_matrices=False)
    kept = s > 1e-9 * s[0]  # the directions that the centred means span, at most C - 1
    prototypes = F.normalize(u[:, kept] @ vt[kept], dim=1)
    return prototypes.to(class_means.device, at_least_float32(class_means).dtype)


def rectify_features(
    teacher_features: Tensor, targets: Tensor, class_means: Tensor, prototypes: Tensor
) -> Tensor:
    """Move each feature vector from its class's mean to its class's balanced place.

        g = (h - m_y + a P_y) / |...|,    a = mean_c |m_c - mean_j m_j|

    What distinguishes an image from its class (h - m_y) stays; where the class lies is replaced.
    a is one length for all classes: the teacher's own average.

    teacher_features  h, (B, D) float
    targets           y, (B,) integers, each 0 .. C-1; the -100 that CE skips is not allowed
    class_means       m, (C, D) float
    prototypes        P, (C, D) float, of balanced_prototypes(class_means)
    Returns g, (B, D), rows of length 1, in float32 or float64.
    """
    shape = targets.shape + prototypes.shape[1:]
    if teacher_features.shape != shape or class_means.shape != prototypes.shape:
        raise ValueError(
            "teacher_features, targets, class_means and prototypes must be (B, D), (B,), (C, D) "
            f"and (C, D), not {tuple(teacher_features.shape)}, {tuple(targets.shape)}, "
            f"{tuple(class_means.shape)} and {tuple(prototypes.shape)}"
        )

    means = at_least_float32(class_means)
    a = (means - means.mean(0)).norm(dim=1).mean()
    shift = a * prototypes - means
    return F.normalize(at_least_float32(teacher_features) + shift[targets.long()], dim=1)


def rectify_logits(teacher_logits: Tensor, targets: Tensor, class_counts: Counts) -> Tensor:
    """Take the class prior out of the teacher's logits, then let the true class rank first.

        r = z_teacher - log pi,    pi_c = n_c / sum_j n_j;    then r_y and max_c r_c change places

    A network trained with CE learns the class shares pi into its logits. One trained with balanced
    softmax does not: call this with equal class_counts then. The exchange mends what is still
    wrong on a training image and keeps all values. xERM (AAAI 2022, arXiv 2112.14380), too,
    subtracts log pi.

    teacher_logits    z_teacher, (B, C) float
    targets           y, (B,) integers, each 0 .. C-1; the -100 that CE skips is not allowed
    class_counts      n, training images of each class, (C,), each at least 1
    Returns r, (B, C), in float32 or float64.
    """
    counts = as_counts(class_counts, teacher_logits)
    z = at_least_float32(teacher_logits)
    z = z - (counts / counts.sum()).log().to(z.dtype)
    true = targets.long()[:, None]
    top = z.argmax(dim=1, keepdim=True)
    return z.scatter(1, top, z.gather(1, true)).scatter(1, true, z.gather(1, top))


def krdistill_loss(
    student_logits: Tensor,
    student_features: Tensor,
    rectified_logits: Tensor,
    rectified_features: Tensor,
    targets: Tensor,
    class_counts: Counts,
    temperature: float = 2.0,
    alpha: float = 1.0,
    gamma: float = 2.0,
) -> Tensor:
    """KRDistill (arXiv 2409.07694), our reconstruction: imitate balanced logits and features.

        L     = CE(z + log pi, y) + alpha L_LRD + gamma L_RRD
        L_LRD = T^2 KL(softmax(r / T) || softmax(z / T)),    L_RRD = mean_B(1 - cos(f, g))

    LRD and RRD are the paper's names: logit- and representation-rectified distillation. CE is the
    balanced softmax, because the rectified teacher, too, is without the class shares. The student's
    features pass a learned linear map first: features after a ReLU have no negative entries, the
    rectified ones have, so that without the map they could not meet.

    student_logits      z, (B, C) float
    student_features    f, (B, D) float, already mapped to the teacher's width
    rectified_logits    r, (B, C) float, of rectify_logits; receives no gradient
    rectified_features  g, (B, D) float, of rectify_features; receives no gradient
    targets             y, (B,) int64
    class_counts        training images of each class, (C,), each at least 1
    """
    shape = student_features.shape
    if shape != rectified_features.shape or shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(
            f"student_features has shape {tuple(shape)}, rectified_features "
            f"{tuple(rectified_features.shape)}, student_logits {tuple(student_logits.shape)}"
        )
    target_logits = rectified_logits

    bsce = balanced_softmax_loss(student_logits, targets, class_counts)
    l_lrd = kl_to_target(student_logits, target_logits, temperature)
    f, g = at_least_float32(student_features), at_least_float32(rectified_features.detach())
    l_rrd = (1 - F.cosine_similarity(f, g, dim=1)).mean()
    return bsce + alpha * l_lrd + gamma * l_rrd


# +----------------------------------------------------------------------------------------------+
# | 2 Methods and settings                                                                       |
# |                                                                                              |
# | A new method is a loss in section 1, an entry in METHODS, and a case in Trainer.loss. The    |
# | names of its hyperparameters are those of the loss's arguments. One that no other method has |
# | gets a line in HYPER, which makes its flag.                                                  |
# +----------------------------------------------------------------------------------------------+


@dataclass(frozen=True)
class Method:
    """What distinguishes a method, besides its loss."""

    label: str  # its name in all that is printed
    summary: str  # one sentence, for --help
    hyper: dict[str, float] = field(default_factory=dict)  # its hyperparameters and their defaults
    highest: dict[str, float] = field(default_factory=dict)  # limits tighter than those in HYPER
    teacher_method: str = ""  # the method that trains its teacher by default; "": it has no teacher
    sampler: str = "instance"  # each image once an epoch; "class": all classes equally often
    head: str = "linear"  # the classifier of student and teacher: "linear" or "cosine"
    # Where a loss compares features, one of the next two makes them equally wide.
    joins_teachers: bool = False  # the student gets a projection as wide as all teachers together
    has_adapter: bool = False  # a linear map of the student's features; class means are made, too
    learns_prior: bool = True  # its logits hold log pi: krdistill subtracts it from such a teacher


METHODS = {
    "ce": Method("ce", "cross-entropy on the images alone"),
    "bsce": Method("bsce", "balanced softmax on the images alone", learns_prior=False),
    "kd": Method(
        "kd",
        "vanilla distillation: imitate the softened teacher",
        hyper={"temperature": 2.0, "alpha": 1.0},
        teacher_method="ce",
    ),
    "bkd": Method(
        "bkd",
        "balanced distillation: rare classes weigh more in the teacher's answer",
        hyper={"temperature": 2.0, "alpha": 1.0, "beta": 0.9999, "bkd_start": 0.0},
        highest={"beta": 0.9999999},
        teacher_method="ce",
    ),
    "cbd": Method(
        "cbd",
        "class-balanced distillation: imitate features, draw all classes equally often",
        hyper={"alpha": 0.4, "beta": 100.0},
        highest={"alpha": 1.0},
        teacher_method="ce",
        sampler="class",
        head="cosine",
        joins_teachers=True,
        learns_prior=False,
    ),
    "dive": Method(
        "dive",
        "virtual examples: balanced softmax, and imitate a flattened teacher",
        hyper={"temperature": 2.0, "alpha": 0.5, "power": 0.5},
        highest={"alpha": 1.0},
        teacher_method="bsce",
        learns_prior=False,
    ),
    "krdistill": Method(
        "krdistill (reconstruction)",
        "rectified distillation (our reconstruction): imitate a balanced teacher",
        hyper={"temperature": 2.0, "alpha": 1.0, "gamma": 2.0},
        teacher_method="ce",
        has_adapter=True,
        learns_prior=False,
    ),
}

HYPER = {  # of each hyperparameter: the lowest value, the highest, and the help of its flag
    "temperature": (1e-3, 100, "softens the probabilities that are compared"),
    "alpha": (0, 1e9, "weight of distillation; krdistill: of its logits' part"),
    "beta": (0, 1e9, "bkd: base of the effective numbers; cbd: weight of features"),
    "gamma": (0, 1e9, "krdistill: weight of the features' part"),
    "power": (0, 1e9, "dive: flattens the teacher"),
    "bkd_start": (0, 1, "bkd: share of the epochs that are kd; on cifar10 0.8"),
}


def default_hyper(method: str, dataset: str) -> dict[str, float]:
    """The default hyperparameters of a method on a data set.

    On cifar10 the BKD authors' code trains with KD for the first 80 % of the epochs.
    """
    hyper = dict(METHODS[method].hyper)
    if method == "bkd" and dataset == "cifar10":
        hyper["bkd_start"] = 0.8
    return hyper


@dataclass(frozen=True)
class Config:
    """What decides a run's numbers, besides the device and its number of threads."""

    dataset: str  # cifar10, cifar100, synthetic, or the name of a .npz file
    data: str  # a digest of all images and labels
    imb: float  # largest / smallest class after thinning; 1: not thinned
    method: str  # a key of METHODS
    hyper: dict[str, float]  # the method's hyperparameters, as default_hyper
    network: str  # a key of models.NETWORKS
    head: str  # its classifier: "linear" or "cosine"
    teachers: list["Config"]
    seed: int  # of weights, batches and augmentation
    precision: str  # "fp32" or "bf16"
    flip: bool = True  # whether half of the training images are mirrored, at random
    epochs: int = 200
    batch_size: int = 128
    lr: float = 0.1  # the highest learning rate
    weight_decay: float = 2e-4  # on all parameters


def teacher_config(student: Config, network: str, method: str, seed: int) -> Config:
    """A teacher with the student's data, recipe and classifier, and its method's defaults."""
    hyper = default_hyper(method, student.dataset)
    return replace(student, network=network, method=method, hyper=hyper, teachers=[], seed=seed)


# +----------------------------------------------------------------------------------------------+
# | 3 Training                                                                                   |
# |                                                                                              |
# | Teachers and students alike go through Trainer and train. Trainer.step is all that a step    |
# | does; on a GPU it is recorded as a CUDA graph, once for each batch size, and replayed.       |
# +----------------------------------------------------------------------------------------------+


class DivergedError(Exception):
    """The loss or the weights are not finite any more."""


def learning_rate(epoch: int, epochs: int, highest: float) -> float:
    """The rate of an epoch, 0 .. epochs-1: it rises for five epochs, and falls at 80 % and 90 %.

    As published for 200 epochs; other lengths keep the five epochs and the two shares.
    """
    if 10 * epoch >= 9 * epochs:
        decay = 0.0001
    elif 10 * epoch >= 8 * epochs:
        decay = 0.01
    else:
        decay = 1.0
    return highest * decay * min(1.0, (epoch + 1) / 5)


class Trainer:
    """One network in training, with all that a step needs: frozen teachers, batches, optimizer.

    The teachers are the caller's networks, not copies. With bf16 their convolutions are cast for
    good: from then on they need autocast.
    """

    def __init__(
        self, config: Config, data: Dataset, teachers: list[nn.Module], device: torch.device
    ):
        method = METHODS[config.method]
        self.config = config
        self.device = device
        # The arguments of the loss. bkd_start is not among them: start_epoch uses it.
        self.hyper = {key: value for key, value in config.hyper.items() if key != "bkd_start"}

        # The student, and the map from its features to the teacher's where the method has one. The
        # weights are drawn on the CPU, so that a seed starts alike on every device.
        teacher_width = sum(teacher.num_features for teacher in teachers)  # of all, side by side
        self.network_arguments = {
            "name": config.network,
            "num_classes": len(data.class_counts),
            "head": config.head,
            "projection": teacher_width if method.joins_teachers else 0,
        }
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.student = make_network(**self.network_arguments)
            self.adapter = nn.Identity()
            if method.has_adapter:
                self.adapter = nn.Linear(self.student.num_features, teacher_width)
        is_cosine = any(isinstance(module, CosineClassifier) for module in self.student.modules())
        assert is_cosine == (config.head == "cosine"), f"{config.network} has no {config.head} head"

        # The teachers, frozen. Their convolutions are cast once; autocast would cast them in every
        # step.
        self.teachers = nn.ModuleList(teachers).eval().requires_grad_(False)
        for module in self.teachers.modules():
            if isinstance(module, nn.Conv2d) and config.precision == "bf16":
                module.bfloat16()

        # The layout in memory: channels_last, except in float32 on a GPU, where users reported that
        # it is slower (pytorch issue 44943).
        contiguous = device.type == "cuda" and config.precision == "fp32"
        self.layout = torch.contiguous_format if contiguous else torch.channels_last
        for module in (self.student, self.adapter, self.teachers):
            module.to(device, memory_format=self.layout)

        # The optimizer. Its learning rate is a tensor, because a CUDA graph would keep a number as
        # it was when recorded. Its momentum is there from the start, because a graph cannot make
        # tensors that outlive it.
        self.weights = [*self.student.parameters(), *self.adapter.parameters()]
        self.lr = torch.tensor(0.0, device=device)
        self.optimizer = torch.optim.SGD(
            self.weights, self.lr, momentum=0.9, weight_decay=config.weight_decay, fused=True
        )
        self.momentum = [torch.zeros_like(weight) for weight in self.weights]
        for weight, buffer in zip(self.weights, self.momentum, strict=True):
            self.optimizer.state[weight]["momentum_buffer"] = buffer

        # The batches, and what the losses need of the data. bkd_counts are what bkd_loss gets:
        # start_epoch puts the class counts there once BKD has started.
        self.generator = torch.Generator().manual_seed(config.seed)
        self.batches = Batches(
            data.train_images,
            data.train_targets,
            config.batch_size,
            device,
            method.sampler,
            config.flip,
        )
        self.class_counts = torch.tensor(data.class_counts, dtype=torch.float64, device=device)
        self.equal_counts = torch.ones_like(self.class_counts)
        self.bkd_counts = self.equal_counts.clone()
        if method.has_adapter:
            self.class_means = mean_features(teachers[0], data, device, config.precision)
            self.prototypes = balanced_prototypes(self.class_means)
            # Where the teacher learned no prior, equal counts leave its logits as they are.
            learns_prior = METHODS[config.teachers[0].method].learns_prior
            self.prior_counts = self.class_counts if learns_prior else self.equal_counts

        # Sums over the images of an epoch, which stay on the device until the epoch is over. A
        # number of images is exact in float32 up to 16 million.
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.correct = torch.zeros((), device=device)

    def state_dict(self) -> dict:
        """All that an epoch hands on to the next: what capture restores, and last.pt keeps.

        Learning rate, batches and sums are not here: start_epoch sets them anew. The tensors are
        the trainer's own, not copies.
        """
        return {
            "student": self.student.state_dict(),
            "adapter": self.adapter.state_dict(),
            "momentum": self.momentum,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Copy a state_dict into the trainer's own tensors, which keep their place in memory."""
        self.student.load_state_dict(state["student"])
        self.adapter.load_state_dict(state["adapter"])
        for buffer, saved in zip(self.momentum, state["momentum"], strict=True):
            buffer.copy_(saved)
        self.generator.set_state(state["generator"])

    def start_epoch(self, epoch: int) -> None:
        """Set learning rate, BKD's counts and training mode, draw the batches, set sums to zero.

        Epochs count from 0 here. shuffle draws the order of the images and all augmentation.
        """
        self.lr.fill_(learning_rate(epoch, self.config.epochs, self.config.lr))
        if self.config.method == "bkd":
            # Equal counts give equal weights: until it starts, BKD is KD. Shares are compared, not
            # epochs, because 0.55 * 100 is more than 55 in floating point.
            has_started = epoch / self.config.epochs >= self.config.hyper["bkd_start"]
            self.bkd_counts.copy_(self.class_counts if has_started else self.equal_counts)
        self.student.train()
        self.batches.shuffle(self.generator)
        self.loss_sum.zero_()
        self.correct.zero_()

    def step(self, size: int) -> None:
        """One step of SGD on the next `size` images. It never waits for the device."""
        images, targets = self.batches.next(size)
        images = images.contiguous(memory_format=self.layout)

        with mixed_precision(self.device, self.config.precision):
            with torch.no_grad():
                teacher_outputs = [teacher(images) for teacher in self.teachers]
            student_output = self.student(images)
        loss = self.loss(student_output, teacher_outputs, targets)

        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

        self.loss_sum += size * loss.detach().double()
        self.correct += (student_output.logits.argmax(dim=1) == targets).sum()

    def loss(
        self, student_output: Output, teacher_outputs: list[Output], targets: Tensor
    ) -> Tensor:
        """The method's loss of one batch, a scalar."""
        student_logits = student_output.logits
        counts = self.class_counts
        teacher = teacher_outputs[0] if teacher_outputs else None

        match self.config.method:
            case "ce":
                return F.cross_entropy(at_least_float32(student_logits), targets)

            case "bsce":
                return balanced_softmax_loss(student_logits, targets, counts)

            case "kd":
                return kd_loss(student_logits, teacher.logits, targets, **self.hyper)

            case "bkd":
                counts = self.bkd_counts  # equal until --bkd-start
                return bkd_loss(student_logits, teacher.logits, targets, counts, **self.hyper)

            case "cbd":
                teacher_features = [output.features for output in teacher_outputs]
                features = student_output.features
                return cbd_loss(student_logits, features, teacher_features, targets, **self.hyper)

            case "dive":
                return dive_loss(student_logits, teacher.logits, targets, counts, **self.hyper)

            case "krdistill":
                rectified_logits = rectify_logits(teacher.logits, targets, self.prior_counts)
                rectified_features = rectify_features(
                    teacher.features, targets, self.class_means, self.prototypes
                )
                return krdistill_loss(
                    student_logits,
                    self.adapter(student_output.features),
                    rectified_logits,
                    rectified_features,
                    targets,
                    counts,
                    **self.hyper,
                )

            case method:
                raise ValueError(f"Trainer.loss has no case for method {method!r}")

    def capture(self) -> Callable[[int], None]:
        """Record step as a CUDA graph for each batch size; returns the function that replays it.

        Warm up, record, restore, return. The warm-up changes weights, statistics and momentum,
        which are restored, and batches and sums, which start_epoch sets anew. Raises RuntimeError
        where torch cannot record the step, for example because its loss calls .item() or branches
        on a tensor, for which the CPU has to wait for the GPU.
        """
        saved = copy.deepcopy(self.state_dict())
        self.student.train()  # the graph keeps the mode that it was recorded in
        sizes = sorted(set(self.batches.sizes), reverse=True)  # the smaller reuses the memory
        stream = torch.cuda.Stream()

        # Three rounds, in which cuDNN and cuBLAS choose and set up their kernels.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.batches.position.zero_()
                for size in sizes:
                    self.step(size)
        torch.cuda.current_stream().wait_stream(stream)

        graphs = {size: torch.cuda.CUDAGraph() for size in sizes}
        pool = torch.cuda.graph_pool_handle()  # the graphs share their memory
        try:
            for size, graph in graphs.items():
                with torch.cuda.graph(graph, pool, stream):
                    self.step(size)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                "the training step cannot be recorded as a CUDA graph; --eager trains without one"
            ) from error

        self.load_state_dict(saved)
        return lambda size: graphs[size].replay()


def train(
    trainer: Trainer,
    data: Dataset,
    folder: Path,
    log: list[dict],
    eval_every: int,
    eager: bool = False,
    epochs_after: int = 0,
) -> None:
    """Train from the epoch after the log's last one to the end. After each, add its row and save.

    The last epoch's row holds all that evaluate returns. epochs_after are those of the networks
    that the command trains afterwards; the time that is left includes them.
    """
    config = trainer.config
    step = trainer.step if eager or trainer.device.type != "cuda" else trainer.capture()
    data = data._replace(test_images=data.test_images.to(trainer.device))
    first = len(log) - 1  # log[0] is no epoch
    started = time.perf_counter()

    print("    epoch      lr     loss    train     test     many   medium      few   img/s    left")
    for epoch in range(first, config.epochs):
        row = train_epoch(trainer, step, epoch, is_first=epoch == first)
        is_last = epoch + 1 == config.epochs
        check_finite(row, trainer.weights if is_last else [])

        if is_last or (epoch + 1) % eval_every == 0:
            scores = evaluate(trainer.student, data, trainer.device, config.precision)
            row |= scores if is_last else {key: scores[key] for key in ("top1", *GROUPS)}

        pace = (time.perf_counter() - started) / (epoch + 1 - first)
        print_epoch(row, config.epochs, pace * (config.epochs - epoch - 1 + epochs_after))
        log.append(row)
        save(trainer, folder, log)


def train_epoch(
    trainer: Trainer, step: Callable[[int], None], epoch: int, is_first: bool = False
) -> dict:
    """Every step of one epoch; returns its row of the log."""
    began = time.perf_counter()
    sizes = trainer.batches.sizes
    trainer.start_epoch(epoch)
    for done, size in enumerate(sizes, start=1):
        step(size)
        print_progress(done, len(sizes), trainer.config.batch_size, began, is_first)

    count = sum(sizes)
    loss = trainer.loss_sum.item() / count  # .item() waits until the device is done
    return {
        "epoch": epoch + 1,
        "lr": learning_rate(epoch, trainer.config.epochs, trainer.config.lr),
        "loss": loss,
        "train_top1": 100 * trainer.correct.item() / count,
        "images_per_second": round(count / (time.perf_counter() - began)),
    }


def check_finite(row: dict, weights: list[Tensor]) -> None:
    """Raise DivergedError for an epoch whose loss, or a weight after it, is not finite."""
    if not math.isfinite(row["loss"]) or not all(weight.isfinite().all() for weight in weights):
        raise DivergedError(
            f"epoch {row['epoch']} ended with a loss of {row['loss']:g} or weights that are not "
            "finite: try a smaller --lr"
        )


def print_progress(done: int, total: int, batch_size: int, began: float, is_first: bool) -> None:
    """After a second: on a terminal, each step in place; in a file, step 10 of the first epoch."""
    seconds = time.perf_counter() - began
    if seconds < 1:
        return
    text = f"      step {done} of {total}, {done * batch_size / seconds:.0f} images/s"
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)
    elif is_first and done == min(10, total):
        print(text, flush=True)


def print_epoch(row: dict, epochs: int, seconds_left: float) -> None:
    """The epoch's line, under the heading that train prints; "-" where nothing was tested."""
    erase = "\r\033[K" if sys.stdout.isatty() else ""
    scores = [row.get(key) for key in ("train_top1", "top1", *GROUPS)]
    cells = ["-" if score is None else f"{score:.2f}" for score in scores]
    print(
        f"{erase}{row['epoch']:>5}/{epochs:<3} {row['lr']:>7g} {row['loss']:>8.4f}"
        + "".join(f"{cell:>9}" for cell in cells)
        + f"{row['images_per_second']:>8}{duration(seconds_left):>8}",
        flush=True,
    )


def duration(seconds: float) -> str:
    """As people write it: 12 s, 34 min, 5.6 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


# +----------------------------------------------------------------------------------------------+
# | 4 Evaluation                                                                                 |
# |                                                                                              |
# | top-1 is the share of the test images that are classified correctly. CIFAR has equally many  |
# | of each class, so that top-1 is the mean over the classes, too. The groups many, medium and  |
# | few are those of the literature.                                                             |
# +----------------------------------------------------------------------------------------------+

# By the training images of a class: at least, at most.
GROUPS = {"many": (101, math.inf), "medium": (20, 100), "few": (0, 19)}


def mixed_precision(device: torch.device, precision: str) -> torch.autocast:
    """bf16 where precision says so; without the weight cache, which a CUDA graph cannot hold."""
    return torch.autocast(device.type, torch.bfloat16, precision == "bf16", cache_enabled=False)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, device: torch.device, precision: str) -> Output:
    """Logits and features of images (N, 3, S, S) uint8, not augmented, in eval mode."""
    pixels_per_part = 2_048_000 if device.type == "cuda" else 256_000
    model.eval()
    outputs = []
    for part in images.split(pixels_per_part // images.shape[-1] ** 2):
        with mixed_precision(device, precision):
            outputs.append(model(normalise(part.to(device))))
    logits, features = zip(*outputs, strict=True)
    return Output(torch.cat(logits), torch.cat(features))


def evaluate(model: nn.Module, data: Dataset, device: torch.device, precision: str) -> dict:
    """Test accuracies in %: top1, per_class, and the mean over the classes of many, medium, few.

    None stands for a class without test images and for a group without classes. The class_counts,
    by which the classes are grouped, are returned, too.
    """
    targets = data.test_targets
    predicted = predict(model, data.test_images, device, precision).logits.argmax(dim=1).cpu()

    num_classes = len(data.class_counts)
    hits = torch.bincount(targets[predicted == targets], minlength=num_classes).tolist()
    totals = torch.bincount(targets, minlength=num_classes).tolist()
    per_class = [100 * hit / n if n else None for hit, n in zip(hits, totals, strict=True)]

    scores = {
        "top1": 100 * sum(hits) / sum(totals),
        "per_class": per_class,
        "class_counts": data.class_counts,
    }
    for group, (low, high) in GROUPS.items():
        scores[group] = mean(
            accuracy
            for accuracy, n in zip(per_class, data.class_counts, strict=True)
            if low <= n <= high
        )
    return scores


def mean(values) -> float | None:
    """The mean of the values that are not None; None where all are."""
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None


def mean_features(model: nn.Module, data: Dataset, device: torch.device, precision: str) -> Tensor:
    """The mean features of each class over its training images, not augmented: (C, D) float32."""
    features = predict(model, data.train_images, device, precision).features.double()
    sums = features.new_zeros(len(data.class_counts), features.shape[1])
    sums.index_add_(0, data.train_targets.to(device), features)
    return (sums / sums.new_tensor(data.class_counts)[:, None]).float()


def machine(device: torch.device) -> str:
    """The device and the torch version, as run folders and reports show them."""
    threads = torch.get_num_threads()
    name = f"CPU with {threads} thread{'s' if threads > 1 else ''}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}"


# +----------------------------------------------------------------------------------------------+
# | 5 Run folders                                                                                |
# |                                                                                              |
# | A run is a folder: last.pt (weights, log, and all that resuming needs), log.jsonl (the log,  |
# | for people), result.json (once it is finished). The log is a list of rows. The first, the    |
# | run's origin, has settings, command, version and device; each of the others is an epoch.     |
# | The folder's name ends in a digest of the Config, so that no two different runs share one.   |
# +----------------------------------------------------------------------------------------------+


class FolderBusyError(Exception):
    """Another process writes the run's folder."""


def config_digest(config: Config) -> str:
    """8 hex digits of all settings, those of the teachers included."""
    settings = json.dumps(asdict(config), sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:8]


def run_name(config: Config) -> str:
    """The name of the run's folder, for people; the digest at its end tells runs apart."""
    dataset = Path(config.dataset).stem[:20]
    words = [dataset, imbalance(config), row_name(config)[:100], config.network]
    words += [f"e{config.epochs}", f"s{config.seed}", config_digest(config)]
    return re.sub(r"[^\w.]+", "-", " ".join(words))


def is_finished(folder: Path) -> bool:
    return (folder / "result.json").exists()


@contextlib.contextmanager
def lock(folder: Path, wait: bool) -> Iterator[None]:
    """Make the folder, and lock it until the block or the process ends.

    Where another process holds it: wait for that one, or raise FolderBusyError. The folder of a
    finished run is not written any more: it needs no lock, and may be read-only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None or is_finished(folder):
        yield
        return
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = f"{folder} is being written by another process"
            if not wait:
                raise FolderBusyError(f"{busy}: wait for it, or use another --runs-dir") from None
            print(f"kd_lt.py: {busy}, waiting", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def as_config(settings: dict) -> Config:
    """The Config of which asdict made the settings."""
    assert settings["method"] in METHODS, f"there is no method {settings['method']}"
    return Config(**settings | {"teachers": [as_config(each) for each in settings["teachers"]]})


def read(path: Path) -> dict:
    """A run's last.pt or result.json, with its Config as "config".

    No code from the file is run. Raises InputError for a file that is missing or damaged.
    """
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text())
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        return content | {"config": as_config(content["settings"])}
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; the run is not finished, is no run, or came without its weights"
        ) from None
    except Exception as error:  # of a damaged file torch.load and json raise a dozen types
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"{path}: damaged, or of another version ({reason}). To train the run anew, move its "
            "folder away"
        ) from None


def load_run(folder: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The network of a run folder, finished or not, in eval mode.

    model(data.normalise(images)) with images (B, 3, S, S) of 0..255 gives logits and features.
    Raises InputError.
    """
    content = read(Path(folder, "last.pt"))
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        model = make_network(**content["network"])
    model.load_state_dict(content["student"])
    return model.eval().to(device, memory_format=torch.channels_last)


def save(trainer: Trainer, folder: Path, log: list[dict]) -> None:
    """Write log.jsonl, then last.pt, as plain tensors and numbers.

    A process that is killed between the two leaves an epoch more in log.jsonl. That epoch is
    trained again, and log.jsonl is written again, whole.
    """
    lines = [json.dumps(row) + "\n" for row in log]
    write_whole(folder / "log.jsonl", "".join(lines).encode())
    content = log[0] | {"network": trainer.network_arguments, "log": log, **trainer.state_dict()}
    # First into memory: on a full disk write_whole fails, and keeps the file of the epoch before.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(folder / "last.pt", buffer.getvalue())


def resume(trainer: Trainer, folder: Path, origin: dict) -> list[dict]:
    """Load folder/last.pt if it is there; returns the log, which starts with the run's origin."""
    for stale in folder.glob("*.partial"):  # of a process that was killed while it wrote
        stale.unlink()
    if not (folder / "last.pt").exists():
        return [origin]

    content = read(folder / "last.pt")
    trainer.load_state_dict(content)
    log = content["log"]
    print(f"resumed   after epoch {len(log) - 1} of {trainer.config.epochs}")
    # A run that another version or device continues names both.
    for key in ("version", "device"):
        if not log[0][key].endswith(origin[key]):
            log[0][key] += f", then {origin[key]}"
    return log


def train_run(
    config: Config,
    folder: Path,
    teachers: list[Path],
    data: Dataset,
    args: argparse.Namespace,
    device: torch.device,
    epochs_after: int = 0,
) -> None:
    """Train one network, whose teachers are finished, unless it is finished itself.

    Of args it needs command, eval_every and eager.
    """
    title = f"{METHODS[config.method].label}, {config.network}, seed {config.seed}"
    if is_finished(folder):  # perhaps by another process, while this one waited for the lock
        print(f"{title}: finished before, not trained again; {folder}", flush=True)
        return

    print(f"{title}, {config.epochs} epochs, in {folder}", flush=True)
    origin = {
        "command": args.command,
        "version": VERSION,
        "device": machine(device),
        "settings": asdict(config),
        "teachers_top1": [read(teacher / "result.json")["top1"] for teacher in teachers],
    }
    trainer = Trainer(config, data, [load_run(teacher, device) for teacher in teachers], device)
    log = resume(trainer, folder, origin)
    train(trainer, data, folder, log, args.eval_every, args.eager, epochs_after)

    tested = [row["top1"] for row in log if "top1" in row]
    result = log[0] | log[-1] | {"best_top1": max(tested)}
    write_whole(folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())


def train_all(
    config: Config, data: Dataset, args: argparse.Namespace, device: torch.device
) -> list[Path]:
    """Train the teachers, then the student; returns their folders, the student's last.

    The student's folder is locked first, so that processes that share a folder of runs take
    different students. A teacher that another process trains is waited for.
    """
    folder = Path(args.runs_dir, run_name(config))
    teachers = [Path(args.runs_dir, run_name(teacher)) for teacher in config.teachers]
    if args.teacher_checkpoint:
        teachers = [Path(given) for given in args.teacher_checkpoint]

    with lock(folder, wait=False):
        if not is_finished(folder):
            for i, teacher in enumerate(teachers):
                unfinished = [each for each in teachers[i + 1 :] if not is_finished(each)]
                epochs_after = config.epochs * (len(unfinished) + 1)
                with lock(teacher, wait=True):
                    train_run(config.teachers[i], teacher, [], data, args, device, epochs_after)
        train_run(config, folder, teachers, data, args, device)
    return [*teachers, folder]


def given_teacher(folder: str, student: Config) -> Config:
    """The Config of a --teacher-checkpoint, which has to fit the student's data and classifier."""
    if not Path(folder).is_dir():
        raise InputError(
            f"--teacher-checkpoint {folder}: no run folder. Weights of another program do not fit: "
            "use the loss in your own loop"
        )
    teacher = read(Path(folder, "result.json"))["config"]
    problem = ""
    if teacher.data != student.data:
        problem = (
            f"it was trained on other images: {teacher.dataset}, {imbalance(teacher)} (digest "
            f"{teacher.data}), not {student.dataset}, {imbalance(student)} ({student.data})"
        )
    elif teacher.head != student.head:
        problem = (
            f"its classifier is {teacher.head}, not {student.head}; a cosine classifier is in runs "
            "of cbd and in their teachers, in no others"
        )
    elif (teacher.network, teacher.seed) == (student.network, student.seed):
        problem = "it has the student's seed, and began with the same weights: use another --seed"
    if problem:
        raise InputError(f"--teacher-checkpoint {folder}: {problem}")
    return teacher


# +----------------------------------------------------------------------------------------------+
# | 6 Reports                                                                                    |
# |                                                                                              |
# | Both are made from result.json. Runs that differ in their seeds, and in nothing else, are    |
# | one row or one line.                                                                         |
# +----------------------------------------------------------------------------------------------+


def spread(values: list) -> str:
    """Mean ± sample standard deviation of the values that are not None; "-" where all are."""
    present = [value for value in values if value is not None]
    if not present:
        return "-"
    deviation = f" ± {statistics.stdev(present):.2f}" if len(present) > 1 else ""
    return f"{statistics.fmean(present):.2f}{deviation}"


def teacher_names(config: Config) -> str:
    """How the teachers were trained; their network is named where it is not the student's."""
    names = []
    for teacher in config.teachers:
        network = f"{teacher.network} " if teacher.network != config.network else ""
        names.append(network + METHODS[teacher.method].label)
    return " + ".join(dict.fromkeys(names))


def without_seeds(config: Config) -> Config:
    return replace(config, seed=0, teachers=[without_seeds(each) for each in config.teachers])


def row_name(config: Config) -> str:
    """The method, and in words what differs from its defaults, but for network and epochs."""
    method = METHODS[config.method]
    words = [method.label]
    if len(config.teachers) > 1:
        words.append(f"{len(config.teachers)} teachers")
    names = teacher_names(config)
    if names != method.teacher_method:
        words.append(f"from {names}")
    for teacher in config.teachers:
        # A given teacher that this command would not train. All seeds of its recipe are one row.
        if teacher != teacher_config(config, teacher.network, teacher.method, teacher.seed):
            words.append(f"given teacher {config_digest(without_seeds(teacher))}")
    if config.head != method.head:
        words.append(f"{config.head} classifier")
    if not config.flip:
        words.append("no flip")

    defaults = {key: getattr(Config, key) for key in ("batch_size", "lr", "weight_decay")}
    defaults |= default_hyper(config.method, config.dataset)
    values = asdict(config) | config.hyper
    for key, default in defaults.items():
        if values[key] != default:
            words.append(f"{key.replace('_', ' ')} {values[key]:.12g}")  # g alone rounds 0.9999999
    return ", ".join(words)


def imbalance(config: Config) -> str:
    """How the classes were thinned. Unthinned, a file may still be imbalanced by nature."""
    return f"imb {config.imb:g}" if config.imb != 1 else "not thinned"


def setting_name(config: Config) -> str:
    """What all rows of a table share, as its heading."""
    epochs = f"{config.epochs} epochs"
    words = [config.dataset, imbalance(config), config.network, epochs, config.precision]
    return ", ".join(words)


def finished_runs(folders: list[str]) -> dict[tuple[str, str], dict[str, list[dict]]]:
    """{(heading, digest of the images): {row name: results}} of the runs in the folders.

    A folder is a run's own, or one that holds runs. One without a finished run, and a damaged run,
    are named on stderr. Raises InputError where nothing is left.
    """
    runs = {}
    for folder in map(Path, folders):
        paths = [*sorted(folder.glob("*/result.json")), *folder.glob("result.json")]
        if not paths:
            print(f"kd_lt.py: {folder}: no finished run there", file=sys.stderr)
        for path in paths:
            try:
                result = read(path)
            except InputError as error:
                print(f"kd_lt.py: left out: {error}", file=sys.stderr)
                continue
            # A run that lies in two folders counts once.
            first = runs.setdefault(config_digest(result["config"]), result)
            if first["per_class"] != result["per_class"]:
                print(f"kd_lt.py: left out: {path}: another run had its settings", file=sys.stderr)
    if not runs:
        raise InputError("no finished run to report; those of --smoke are in runs/smoke")

    order = list(METHODS)
    tables = {}
    for result in sorted(
        runs.values(),
        key=lambda r: (order.index(r["config"].method), row_name(r["config"]), r["config"].seed),
    ):
        config = result["config"]
        rows = tables.setdefault((setting_name(config), config.data), {})
        rows.setdefault(row_name(config), []).append(result)
    return dict(sorted(tables.items()))


def classes_in_parts(class_counts: list[int], parts: int) -> list[list[int]]:
    """The classes, most training images first, in that many parts of about equal size."""
    ranked = torch.tensor(class_counts).argsort(descending=True, stable=True)
    return [part.tolist() for part in ranked.tensor_split(min(parts, len(class_counts)))]


def print_rows(rows: dict[str, list[dict]]) -> None:
    """Markdown of the results of each name: a table of means, then accuracies from head to tail."""
    print("| method | teacher, its top-1 | n | top-1 | many | medium | few |")
    print("|---|---|---|---|---|---|---|")
    for name, results in rows.items():
        teacher = "-"
        if results[0]["teachers_top1"]:
            tops = [statistics.fmean(result["teachers_top1"]) for result in results]
            teacher = f"{teacher_names(results[0]['config'])}, {spread(tops)}"
        cells = [spread([result[key] for result in results]) for key in ("top1", *GROUPS)]
        print(f"| {' | '.join([name, teacher, str(len(results)), *cells])} |")

    class_counts = next(iter(rows.values()))[0]["class_counts"]
    parts = classes_in_parts(class_counts, 10)
    width = max(len("training images"), *map(len, rows))
    image_counts = "".join(f"{sum(class_counts[c] for c in part):6}" for part in parts)
    print(
        f"\nFrom head to tail, the classes in {len(parts)} parts: the training images of each, and "
        "the mean accuracy of its classes:\n\n```"
    )
    print(f"{'training images':<{width}}{image_counts}")
    for name, results in rows.items():
        accuracies = [mean(r["per_class"][c] for r in results for c in part) for part in parts]
        numbers = "".join(f"{'-' if a is None else round(a):>6}" for a in accuracies)
        print(f"{name:<{width}}{numbers}")
    print("```\n", flush=True)


def table(folders: list[str]) -> None:
    """Print Markdown: a heading for each setting, one row per method, lines from head to tail."""
    for (heading, digest), rows in finished_runs(folders).items():
        made_by = {
            f"kd-lt {result['version']} on {result['device']}"
            for results in rows.values()
            for result in results
        }
        print(f"**{heading}**\n")
        print_rows(rows)
        print(
            "Test accuracy in % after the last epoch, mean ± sample standard deviation over n "
            f"seeds. Images {digest}. Made by {'; '.join(sorted(made_by))}.\n"
        )
        best = [
            f"{name} {spread([result['best_top1'] for result in results])}"
            for name, results in rows.items()
        ]
        print(
            "Best tested epoch instead of the last (chosen on the test set, only to compare with "
            f"such numbers): {'; '.join(best)}.\n"
        )


def plot(file: str, folders: list[str]) -> None:
    """Draw the rows of the table from head to tail: their gain over plain ce, where it is a row."""
    if Path(file).suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {file}: the name must end in .png, .svg or .pdf")
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which this Python may lack; none is needed
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None

    tables = finished_runs(folders)
    figure = Figure(figsize=(10, 5 * len(tables)), layout="constrained")
    axes = figure.subplots(2 * len(tables), height_ratios=[7, 1] * len(tables))
    for i, ((heading, _), rows) in enumerate(tables.items()):
        draw_head_to_tail(axes[2 * i], axes[2 * i + 1], heading, rows)
    figure.savefig(file, dpi=150)
    print(f"plot      {file}")


def draw_head_to_tail(axes, strip, heading: str, rows: dict[str, list[dict]]) -> None:
    """One setting, the classes in ten parts: a line for each row; in the strip, the images."""
    class_counts = next(iter(rows.values()))[0]["class_counts"]
    parts = classes_in_parts(class_counts, 10)
    places = range(1, len(parts) + 1)

    accuracies = {}  # of each row (seeds, parts)
    for name, results in rows.items():
        cells = [[mean(r["per_class"][c] for c in part) for part in parts] for r in results]
        accuracies[name] = torch.tensor(
            [[math.nan if cell is None else cell for cell in row] for row in cells]
        )
    configs = {name: results[0]["config"] for name, results in rows.items()}
    plain = [n for n, c in configs.items() if c.method == "ce" and c.head == "linear"]
    has_baseline = len(plain) == 1 and len(rows) > 1
    baseline = accuracies[plain[0]].mean(0) if has_baseline else 0.0
    unit = "points of test accuracy over plain ce" if has_baseline else "test accuracy in %"

    # A line for each row, with a band of one standard deviation.
    lines = []
    for name, results in rows.items():
        gain = accuracies[name] - baseline
        (line,) = axes.plot(places, gain.mean(0), marker=".", label=name)
        lines.append(line)
        if len(results) > 1:
            low, high = gain.mean(0) - gain.std(0), gain.mean(0) + gain.std(0)
            axes.fill_between(places, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    lines.sort(key=lambda line: line.get_ydata()[-1], reverse=True)  # as they end on the right
    axes.legend(
        handles=lines,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        labelcolor="linecolor",
        frameon=False,
    )

    if has_baseline:
        axes.axhline(0, color="0.3", linewidth=0.8)
    seeds = ", ".join(str(n) for n in sorted({len(results) for results in rows.values()}))
    axes.set(title=f"{heading}; n = {seeds}", ylabel=unit, xticks=[])
    bars = strip.bar(places, [sum(class_counts[c] for c in part) for part in parts], color="0.8")
    strip.bar_label(bars, fontsize=8)
    strip.set(
        xlabel=f"classes from head to tail, in {len(parts)} parts; grey: their training images",
        xticks=[],
        yticks=[],
    )
    strip.spines[["left", "top", "right"]].set_visible(False)
    for each in (axes, strip):
        each.set_xlim(0.5, len(parts) + 0.5)


# +----------------------------------------------------------------------------------------------+
# | 7 Command line                                                                               |
# |                                                                                              |
# | A flag that belongs to another method is refused, and so is a training flag together with    |
# | --table or --plot.                                                                           |
# | Errors end in main as a message on stderr and a status: 2 wrong input, 1 a failed run, 75 a  |
# | busy folder, 130 Ctrl-C. A closed pipe (`| head`) is 141, without a message. Anything else   |
# | is a bug, and shows its traceback.                                                           |
# +----------------------------------------------------------------------------------------------+

EXAMPLES = """examples:
  python kd_lt.py --method bkd --imb 100
  python kd_lt.py --method cbd --num-teachers 4 --seed 1
  python kd_lt.py --table --plot head_to_tail.svg"""


def in_range(kind: type, low: float, high: float = 10**9):
    """A type for argparse: an int or a float from low to high."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:  # true for nan, too
            allowed = f"be at least {low}" if value < low else f"lie in {low} .. {high}"
            raise argparse.ArgumentTypeError(f"must {allowed}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where kind(text) fails
    return parse


def as_flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def describe_methods() -> str:
    """Each method in one sentence, with its own flags and their defaults."""
    lines = ["methods, and their own flags with their defaults:"]
    for name, method in METHODS.items():
        lines.append(f"  {name:<10} {method.summary}")
        own = [f"{as_flag(key)} {value:g}" for key, value in method.hyper.items()]
        if own:
            lines.append(f"  {'':<10} {'  '.join(own)}")
    return "\n".join(lines)


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kd_lt.py",
        usage="%(prog)s [flags], all in --help",
        description="Train a teacher, distil a student on long-tailed data, report its accuracy.",
        epilog=f"{describe_methods()}\n\n{EXAMPLES}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=34, width=100
        ),
        allow_abbrev=False,
    )
    count = in_range(int, 1)
    networks = ", ".join(NETWORKS)
    undistilled = [name for name, method in METHODS.items() if not method.teacher_method]
    path = os.path.expanduser  # a type: ~ that no shell has expanded

    # fmt: off
    add = parser.add_argument_group("what to train").add_argument
    add("--method", choices=METHODS, metavar="M", default="bkd",
        help="see below; default %(default)s")
    add("--seed", type=in_range(int, 0, 2**32 - 1), metavar="N", default=0,
        help="of weights and batches; default %(default)s. Teachers: seed + 1000, + 2000, ...")
    add("--smoke", action="store_true", help="a run of seconds: made-up images, resnet8, 8 epochs")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", type=path, metavar="D", default="cifar100",
        help="cifar10, cifar100 (default), synthetic or FILE.npz")
    add("--imb", type=in_range(float, 1), metavar="X",
        help="thin to largest / smallest class = X; default 100, for FILE.npz 1")
    add("--no-flip", action="store_true",
        help="no mirrored training images, where left and right make the class")

    add = parser.add_argument_group("networks and teacher").add_argument
    add("--student", choices=NETWORKS, metavar="NET", default="resnet32",
        help=f"distilled, or trained alone; default %(default)s. One of {networks}")
    add("--teacher", choices=NETWORKS, metavar="NET", default="resnet32",
        help="the network that teaches; default %(default)s")
    add("--teacher-method", choices=undistilled, help="how it is trained; default ce, dive: bsce")
    add("--num-teachers", type=count, metavar="K", default=1, help="of cbd; default %(default)s")
    add("--teacher-checkpoint", type=lambda text: path(text).removesuffix("last.pt"), nargs="+",
        action="extend", metavar="RUN", help="finished runs, instead of training teachers")

    add = parser.add_argument_group("the method's own numbers (defaults below)").add_argument
    for key, (lowest, highest, text) in HYPER.items():
        add(as_flag(key), type=in_range(float, lowest, highest), metavar="X", help=text)

    add = parser.add_argument_group("recipe, of teacher and student alike").add_argument
    add("--epochs", type=count, metavar="N", default=Config.epochs, help="default %(default)s")
    add("--batch-size", type=count, metavar="N", default=Config.batch_size,
        help="images in a step; default %(default)s")
    add("--lr", type=in_range(float, 1e-6), metavar="X", default=Config.lr,
        help="the highest learning rate; default %(default)s")
    add("--weight-decay", type=in_range(float, 0), metavar="X", default=Config.weight_decay,
        help="on all parameters; default %(default)s")

    add = parser.add_argument_group("machine and folders").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="default %(default)s: an NVIDIA GPU, if there is one")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="default %(default)s: bf16, where the hardware has it")
    add("--eager", action="store_true",
        help="on a GPU: no CUDA graph, for a step that cannot be recorded")
    add("--eval-every", type=count, metavar="N",
        help="test after every N epochs; default 1, on a CPU 5")
    add("--data-dir", type=path, metavar="DIR", default="data",
        help="where CIFAR is, or is downloaded to; default %(default)s")
    add("--runs-dir", type=path, metavar="DIR", default="runs",
        help="where runs are kept; default %(default)s")

    reports = "reports on finished runs (RUNS: runs, or folders of them; default: --runs-dir)"
    add = parser.add_argument_group(reports).add_argument
    add("--table", type=path, nargs="*", action="extend", metavar="RUNS", help="print as Markdown")
    add("--plot", type=path, nargs="+", metavar=("FILE", "RUNS"),
        help="draw from head to tail, as gain over ce where it is among them: .png, .svg, .pdf")
    # fmt: on

    if "--smoke" in argv:
        parser.set_defaults(
            dataset="synthetic",
            student="resnet8",
            teacher="resnet8",
            epochs=8,
            batch_size=64,
            runs_dir="runs/smoke",
        )
    args = parser.parse_args(argv)
    if args.imb is None:
        args.imb = 1.0 if args.dataset.endswith(".npz") else 100.0
    refuse_flags(parser, args, {word.split("=")[0] for word in argv})
    args.command = shlex.join(["kd_lt.py", *argv])
    return args


def refuse_flags(
    parser: argparse.ArgumentParser, args: argparse.Namespace, words: set[str]
) -> None:
    """End with an error for a flag that this method, or a report, would ignore or cannot use.

    An experiment that is not what its command says would go unnoticed.
    """
    method = METHODS[args.method]
    without_effect = HYPER.keys() - method.hyper.keys()
    if not method.joins_teachers:
        without_effect |= {"num_teachers"}
    if not method.teacher_method:
        without_effect |= {"teacher", "teacher_method", "teacher_checkpoint"}
    ignored_with = {f"--method {args.method}": without_effect}
    if args.teacher_checkpoint:
        ignored_with["--teacher-checkpoint"] = {"teacher", "teacher_method", "num_teachers"}
    if args.plot or args.table is not None:  # --smoke has an effect: it changes --runs-dir
        report = "--plot" if args.plot else "--table"
        ignored_with = {report: vars(args).keys() - {"table", "plot", "runs_dir", "smoke"}}

    for other, keys in ignored_with.items():
        for flag in sorted(words & {as_flag(key) for key in keys}):
            parser.error(f"{flag} has no effect with {other}: leave it out")
    if not method.joins_teachers and len(args.teacher_checkpoint or []) > 1:
        parser.error(f"--teacher-checkpoint: --method {args.method} has one teacher")
    for key, highest in method.highest.items():
        if (getattr(args, key) or 0) > highest:
            parser.error(f"{as_flag(key)} must be at most {highest} with --method {args.method}")


def make_config(args: argparse.Namespace, data: Dataset, precision: str) -> Config:
    """The one Config of the flags, every default filled in."""
    method = METHODS[args.method]
    own = {key: getattr(args, key) for key in method.hyper if getattr(args, key) is not None}
    config = Config(
        dataset=Path(args.dataset).name,
        data=data.digest,
        imb=args.imb,
        method=args.method,
        hyper=default_hyper(args.method, args.dataset) | own,
        network=args.student,
        head=method.head,
        teachers=[],
        seed=args.seed,
        precision=precision,
        flip=not args.no_flip,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        weight_decay=args.weight_decay,
    )
    if not method.teacher_method:
        return config
    if args.teacher_checkpoint:
        teachers = [given_teacher(folder, config) for folder in args.teacher_checkpoint]
        return replace(config, teachers=teachers)

    # The student's own seed would give a teacher of the same network the same start.
    seeds = [args.seed + 1000 * (k + 1) for k in range(args.num_teachers)]
    name = args.teacher_method or method.teacher_method
    teachers = [teacher_config(config, args.teacher, name, seed) for seed in seeds]
    return replace(config, teachers=teachers)


def cpu_has_bf16() -> bool:
    """Whether an x86 CPU computes in bf16. Where torch lacks these private functions: no."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    functions = [getattr(torch.cpu, name, None) for name in names]
    return any(function is not None and function() for function in functions)


def choose_device(args: argparse.Namespace) -> tuple[torch.device, str]:
    """The device and the precision of this run; sets what torch may do on a GPU.

    A GPU that is asked for and not there is an error, and so is bf16 on a GPU without it.
    """
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise InputError(
            f"--device cuda: torch {torch.__version__} sees no GPU; "
            "`python -c 'import torch; torch.cuda.init()'` says why"
        )
    if cuda:
        has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
        if args.precision == "bf16" and not has_bf16:
            raise InputError(f"--precision bf16: {torch.cuda.get_device_name()} has none; use fp32")
    else:
        has_bf16 = cpu_has_bf16()

    precision = args.precision
    if precision == "auto":
        precision = "bf16" if has_bf16 else "fp32"
    torch.backends.cudnn.benchmark = cuda
    # fp32 means fp32, not TF32, a coarser form that GPUs have. In a bf16 run, too, the classifiers
    # are in fp32; some containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which would make them TF32.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda" if cuda else "cpu"), precision


def print_plan(config: Config, data: Dataset, args: argparse.Namespace, machine_name: str) -> None:
    """What is about to be trained, on what, and how."""
    counts = data.class_counts
    groups = [f"{sum(a <= n <= b for n in counts)} {key}" for key, (a, b) in GROUPS.items()]
    hyper = [f"{key.replace('_', ' ')} {value:.12g}" for key, value in config.hyper.items()]
    seeds = ", ".join(str(teacher.seed) for teacher in config.teachers)
    teachers = f", from {teacher_names(config)}, seed {seeds}" if config.teachers else ""
    steps = math.ceil(sum(counts) / config.batch_size)
    print(
        f"data      {args.dataset}, {imbalance(config)}{'' if config.flip else ', no flip'}: "
        f"{sum(counts):,} training images, {max(counts)}..{min(counts)} per class; "
        f"{', '.join(groups)}; {len(data.test_targets):,} test images\n"
        f"method    {', '.join([METHODS[config.method].label, *hyper])}\n"
        f"network   {config.network}, {config.head} classifier, seed {config.seed}{teachers}\n"
        f"recipe    {config.epochs} epochs of {steps} steps, batch size {config.batch_size}, "
        f"lr {config.lr:.12g}, weight decay {config.weight_decay:.12g}\n"
        f"device    {machine_name}, {config.precision}\n",
        flush=True,
    )


def train_and_report(args: argparse.Namespace) -> None:
    """Train what the flags say and print its table."""
    device, precision = choose_device(args)
    args.eval_every = args.eval_every or (1 if device.type == "cuda" else 5)
    data = load_dataset(args.dataset, args.data_dir, args.imb)
    config = make_config(args, data, precision)
    print_plan(config, data, args, machine(device))

    *teachers, student = train_all(config, data, args, device)
    rows = {}
    for teacher in filter(is_finished, teachers):  # those of a finished student may be gone
        result = read(teacher / "result.json")
        name = f"teacher {result['config'].network}, {row_name(result['config'])}"
        rows.setdefault(name, []).append(result)
    rows[row_name(config)] = [read(student / "result.json")]
    print(f"\nresult    {student}, test accuracy in % after the last epoch\n")
    print_rows(rows)


def main(argv: list[str]) -> int:
    """One command; returns the exit status. Raises SystemExit for wrong flags, as argparse does."""
    args = parse_flags(argv)
    try:
        if args.table is not None:
            table(args.table or [args.runs_dir])
        if args.plot:
            plot(args.plot[0], args.plot[1:] or args.table or [args.runs_dir])
        if not args.plot and args.table is None:
            train_and_report(args)
        sys.stdout.flush()  # here, where a failure can still be told
        return 0
    except InputError as error:
        status, message = 2, str(error)
    except DivergedError as error:
        status, message = 1, str(error)
    except FolderBusyError as error:
        # "Try again later", as sysexits.h has it: run_all.sh does not count this run as failed.
        status, message = 75, str(error)
    except BrokenPipeError:
        # `| head` has what it wanted. Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # what a shell reports of a program that was ended by a closed pipe
    except OSError as error:
        # A failed write does not say where: it was a file of this command, or its printed output.
        written = args.plot[0] if args.plot else args.runs_dir
        place = error.filename or f"{written}, or where the output goes"
        status, message = 1, f"{place}: {error.strerror or error}"
    except KeyboardInterrupt:
        if sys.stdout.isatty():
            print()  # below the progress of the epoch
        status, message = 130, "interrupted; the same command continues after the last whole epoch"
    print(f"kd_lt.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    if sys.stdout is None:  # started without an output (>&-)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.stdout.reconfigure(errors="replace")  # an ASCII output has no ±
    sys.exit(main(sys.argv[1:]))
