# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the kd-lt authors
"""Knowledge distillation for long-tailed recognition: KD, BKD, CBD, DiVE, KRDistill (reconstructed)

    python kd_lt.py --smoke                  the whole way in seconds, on generated images
    python kd_lt.py --method bkd --imb 100   train a teacher, distil the student, report

The file is read from top to bottom:

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
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Batches, Dataset, InputError, load_dataset, normalise, write_whole
from models import NETWORKS, Output, ResNet

try:
    import fcntl
except ImportError:  # Windows: runs work, unlocked
    fcntl = None

VERSION = "3.0.0"

# +----------------------------------------------------------------------------------------------+
# | 1 Losses                                                                                     |
# |                                                                                              |
# | B images, C classes, D features, K teachers. Any device and float dtype; computed in float32 |
# | at least. No gradient reaches a teacher.                                                     |
# |                                                                                              |
# | To copy a loss, copy Counts, at_least_float32, as_counts and kl_to_target with it; cbd_loss  |
# | needs at_least_float32 alone. Copy also,                                                     |
# |     for bkd_loss        effective_number_weights                                             |
# |     for dive_loss       balanced_softmax_loss                                                |
# |     for krdistill_loss  balanced_softmax_loss, and for its arguments balanced_prototypes,    |
# |                         rectify_logits and rectify_features (our reconstruction)             |
# | Their imports are math, Sequence, torch, F and Tensor.                                       |
# |                                                                                              |
# | kd, bkd, dive and krdistill are one family: a loss on the labels, and T^2 times the KL       |
# | divergence from a target (krdistill, our reconstruction, adds a loss on features). Each      |
# | shows the logits of its target in one line.                                                  |
# +----------------------------------------------------------------------------------------------+

Counts = Sequence[float] | Tensor  # a number for each class; a NumPy array is taken, too


def at_least_float32(tensor: Tensor) -> Tensor:
    """bf16 and fp16 as float32, because they would round a divergence away; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def as_counts(class_counts: Counts, logits: Tensor) -> Tensor:
    """The training images of each class as a float tensor (C,) on the device of the logits (B, C).

    A list, tuple or array is checked: C finite numbers of at least 1. Anything else but a tensor is
    refused, because its order may not be that of the classes. The values in a tensor are trusted,
    because to look at them would make the CPU wait for the GPU and break torch.compile: pass a
    tensor under torch.compile(fullgraph=True).

    The result has the dtype of the logits, or float32 for half precision. A float64 tensor stays
    float64 if it is on the logits' device; not every device has float64.
    """
    if logits.ndim != 2:
        raise ValueError(
            f"logits (student_logits or teacher_logits) must be (B, C), not {tuple(logits.shape)}"
        )

    dtype = torch.promote_types(logits.dtype, torch.float32)
    if isinstance(class_counts, Tensor):
        counts = class_counts
        if counts.device == logits.device:
            dtype = torch.promote_types(dtype, counts.dtype)
    else:
        # The items of a dict, of Counter(labels).values() or of a pandas Series are numbers, too,
        # but need not be in the order of the classes.
        is_list = isinstance(class_counts, Sequence) and not isinstance(class_counts, (str, bytes))
        if not is_list and not hasattr(class_counts, "__array_interface__"):  # of NumPy
            raise ValueError(
                "class_counts must be C numbers in a list, tuple, array or tensor, in the order of "
                f"the classes, not {class_counts}"
            )
        numbers = [float(count) for count in class_counts]
        if not all(1 <= number < math.inf for number in numbers):
            raise ValueError(
                f"class_counts must be numbers of images, at least 1, not {class_counts}"
            )
        counts = torch.tensor(numbers, dtype=dtype)

    if counts.shape != logits.shape[1:]:
        raise ValueError(
            f"class_counts has shape {tuple(counts.shape)}, but logits (student_logits or "
            f"teacher_logits) of shape {tuple(logits.shape)} have {logits.shape[1]} classes"
        )
    return counts.to(logits.device, dtype)


def kl_to_target(student_logits: Tensor, target_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(target / T) || softmax(student / T)), both (B, C), as a scalar.

    T^2 keeps the gradient about equally large at every temperature.
    "batchmean" sums over the classes and takes the mean over the images, as the definition of the
    divergence has it; plain "mean" would divide by C, too. The target is passed on as a
    probability, not as its logarithm, so that a class of probability 0 adds 0. It receives no
    gradient, and is computed in the student's dtype, or in float32 for half precision. Float32
    serves to a temperature of some hundred; above that it rounds the divergence away.
    """
    if student_logits.ndim != 2 or student_logits.shape != target_logits.shape:
        raise ValueError(
            "student_logits and the target (teacher_logits or rectified_logits) must both be "
            f"(B, C), not {tuple(student_logits.shape)} and {tuple(target_logits.shape)}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, not {temperature}")

    student = at_least_float32(student_logits)
    target = target_logits.detach().to(student.dtype)
    # This is softmax(target / T). Written so, it is rounded as in the runs of .results.
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
    Returns a scalar, the mean over the batch, in float32 or float64. Raises ValueError for logits
    that are not (B, C), and for a temperature that is not positive and finite.
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
    in float32. Raises ValueError for class_counts of another shape, for a count below 1 that is not
    in a tensor (see as_counts) and for a beta outside [0, 1).
    """
    counts = torch.as_tensor(class_counts)
    if counts.ndim != 1:
        raise ValueError(f"class_counts must be (C,), not {tuple(counts.shape)}")
    if not isinstance(class_counts, Tensor) and not (counts >= 1).all():  # see as_counts
        raise ValueError(f"class_counts must be at least 1, not {class_counts}")
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
    Returns a scalar, the mean over the batch, in float32 or float64. Raises ValueError for a shape
    that would broadcast, counts that as_counts refuses, a temperature that is not positive and
    finite, and a beta outside [0, 1).
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
    teacher_features  a list of K tensors (B, D_k) float; they receive no gradient
    targets           y, (B,) int64
    Returns a scalar, the mean over the batch, in float32 or float64. Raises ValueError for logits
    that are not (B, C), a bare tensor as teacher_features, and shapes that do not agree.
    """
    if student_logits.ndim != 2:
        raise ValueError(f"student_logits must be (B, C), not {tuple(student_logits.shape)}")
    if isinstance(teacher_features, Tensor):
        raise ValueError("teacher_features must be a list of tensors, one for each teacher")
    unit_features = [F.normalize(at_least_float32(f.detach()), dim=1) for f in teacher_features]
    t = torch.cat(unit_features, dim=1)
    if student_features.shape != t.shape or t.shape[:-1] != student_logits.shape[:1]:
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
    Returns a scalar, the mean over the batch, in float32 or float64. Raises ValueError for logits
    that are not (B, C) and for class_counts that are not C numbers of at least 1.
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
    Returns a scalar, the mean over the batch, in float32 or float64. Raises ValueError as kd_loss
    and balanced_softmax_loss do.
    """
    target_logits = power * at_least_float32(teacher_logits)

    bsce = balanced_softmax_loss(student_logits, targets, class_counts)
    return (1 - alpha) * bsce + alpha * kl_to_target(student_logits, target_logits, temperature)


# KRDistill, OUR RECONSTRUCTION: of the paper (arXiv 2409.07694) only the abstract and a short
# summary could be had. They say that the teacher's imbalance is mended in its representation,
# by balanced category priors, and in its predictions; the equations are ours. The order in which
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
    """A place for each class, such that no direction and no class is favoured.

        M_c = m_c - mean_j m_j,    M = U S V^T (thin),    P = U V^T, its rows scaled to length 1

    A long-tailed teacher spends long directions on head classes and short ones on the tail. S
    holds those lengths: dropping S makes all directions equally long, and keeps the classes as
    near to the teacher's own arrangement as that allows. Where the M_c span C - 1 dimensions, every
    two prototypes have the cosine -1 / (C - 1). For D < C - 1, as with 64 features on CIFAR-100,
    all singular values of U V^T are 1; those of P, whose rows are scaled, are only nearly equal.

    class_means       m, (C, D) float, C >= 2
    Returns (C, D), on the device of class_means, in float32 or float64. Raises ValueError for
    another shape. Our reconstruction of the abstract's "balanced category priors".
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
    targets           y, (B,) int64, each 0 .. C-1; the -100 that CE skips is not allowed
    class_means       m, (C, D) float
    prototypes        P, (C, D) float, of balanced_prototypes(class_means)
    Returns g, (B, D), rows of length 1, in float32 or float64. Raises ValueError for shapes that do
    not agree. Our reconstruction.
    """
    if teacher_features.shape != targets.shape + prototypes.shape[1:]:
        raise ValueError(
            "teacher_features, targets and prototypes must be (B, D), (B,) and (C, D), not "
            f"{tuple(teacher_features.shape)}, {tuple(targets.shape)}, {tuple(prototypes.shape)}"
        )
    if class_means.shape != prototypes.shape:
        raise ValueError(
            f"class_means and prototypes must both be (C, D), not {tuple(class_means.shape)} and "
            f"{tuple(prototypes.shape)}"
        )

    means = at_least_float32(class_means)
    a = (means - means.mean(0)).norm(dim=1).mean()
    shift = a * prototypes - means
    return F.normalize(at_least_float32(teacher_features) + shift[targets], dim=1)


def rectify_logits(teacher_logits: Tensor, targets: Tensor, class_counts: Counts) -> Tensor:
    """Take the class prior out of the teacher's logits, then let the true class rank first.

        r = z_teacher - log pi,    pi_c = n_c / sum_j n_j;    then r_y and max_c r_c change places

    A network trained with CE learns the class shares pi into its logits. One trained with balanced
    softmax does not: call this with equal class_counts then. The exchange mends what is still
    wrong on a training image and keeps all values. xERM (AAAI 2022, arXiv 2112.14380), too,
    subtracts log pi.

    teacher_logits    z_teacher, (B, C) float
    targets           y, (B,) int64, each 0 .. C-1; the -100 that CE skips is not allowed
    class_counts      n, training images of each class, (C,), each at least 1
    Returns r, (B, C), in float32 or float64. Raises ValueError for teacher_logits that are not
    (B, C) and for class_counts that are not C numbers of at least 1. Our reconstruction.
    """
    counts = as_counts(class_counts, teacher_logits)
    z = at_least_float32(teacher_logits)
    z = z - (counts / counts.sum()).log().to(z.dtype)
    true = targets[:, None]
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
    Returns a scalar, the mean over the batch, in float32 or float64. Raises ValueError for shapes
    that do not agree, and for a temperature that is not positive and finite.
    """
    shape = student_features.shape
    if shape != rectified_features.shape or shape[:-1] != student_logits.shape[:1]:
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
# | A new method is a loss in section 1, an entry in METHODS, a case in Trainer.loss, and a flag |
# | in parse_flags for each hyperparameter that has none yet. The names in hyper are those of    |
# | the loss's arguments (but for bkd_start, which start_epoch reads).                           |
# +----------------------------------------------------------------------------------------------+


@dataclass(frozen=True)
class Method:
    """What distinguishes a method, besides its loss."""

    about: str  # one sentence, for --help
    hyper: dict[str, float] = field(default_factory=dict)  # its hyperparameters and their defaults
    highest: dict[str, float] = field(default_factory=dict)  # upper limits, of those that have one
    teacher: str = ""  # the method that trains its teacher by default; "": it has no teacher
    sampler: str = "instance"  # each image once an epoch; "class": all classes equally often
    head: str = "linear"  # the classifier of student and teacher: "linear" or "cosine"
    # What makes the features of student and teacher equally wide, where a loss compares them.
    # "features": a layer before the student's classifier. "class means": a linear map beside it;
    # the mean of the teacher's features over each class is computed, too.
    uses: str = ""
    many_teachers: bool = False  # whether --num-teachers may ask for several
    learns_prior: bool = True  # whether its logits hold log pi, which rectify_logits subtracts


METHODS = {
    "ce": Method("cross-entropy on the images alone"),
    "bsce": Method("balanced softmax on the images alone", learns_prior=False),
    "kd": Method(
        "vanilla distillation: imitate the softened teacher",
        hyper={"temperature": 2.0, "alpha": 1.0},
        teacher="ce",
    ),
    "bkd": Method(
        "balanced distillation: rare classes weigh more in the teacher's answer",
        hyper={"temperature": 2.0, "alpha": 1.0, "beta": 0.9999, "bkd_start": 0.0},
        highest={"beta": 0.9999999},
        teacher="ce",
    ),
    "cbd": Method(
        "class-balanced distillation: imitate features, draw all classes equally often",
        hyper={"alpha": 0.4, "beta": 100.0},
        highest={"alpha": 1.0},
        teacher="ce",
        sampler="class",
        head="cosine",
        uses="features",
        many_teachers=True,
        learns_prior=False,
    ),
    "dive": Method(
        "virtual examples: balanced softmax, and imitate a flattened teacher",
        hyper={"temperature": 2.0, "alpha": 0.5, "power": 0.5},
        highest={"alpha": 1.0},
        teacher="bsce",
        learns_prior=False,
    ),
    "krdistill": Method(
        "rectified distillation (our reconstruction): imitate a balanced teacher",
        hyper={"temperature": 2.0, "alpha": 1.0, "gamma": 2.0},
        teacher="ce",
        uses="class means",
        learns_prior=False,
    ),
}


def default_hyper(method: str, dataset: str) -> dict[str, float]:
    """The default hyperparameters of a method on a data set.

    On cifar10 the BKD authors' code trains with KD for the first 80 % of the epochs.
    """
    hyper = dict(METHODS[method].hyper)
    if method == "bkd" and dataset == "cifar10":
        hyper["bkd_start"] = 0.8
    return hyper


def printed_name(method: str) -> str:
    """The method's name in all that is printed, where krdistill is called a reconstruction."""
    return "krdistill (reconstruction)" if method == "krdistill" else method


@dataclass(frozen=True)
class Config:
    """What decides a run's numbers, besides the device and its number of threads."""

    dataset: str  # cifar10, cifar100, synthetic, or the name of a .npz file
    data: str  # a digest of all images and labels
    imb: float  # to what the classes are thinned, largest / smallest; 1: not thinned
    method: str  # a key of METHODS
    hyper: dict[str, float]  # the method's hyperparameters, as default_hyper
    network: str  # a key of models.NETWORKS
    head: str  # its classifier: "linear" or "cosine"
    # Of each teacher: network, method, head, colour and seed, as in its own Config. One that
    # --teacher-checkpoint gives has "checkpoint", a digest of its file, instead of seed.
    teachers: list[dict]
    seed: int  # of weights, batches and augmentation
    precision: str  # "fp32" or "bf16"
    imb_type: str = "exp"  # how the classes shrink: "exp" or "step"
    subset_seed: int = 0  # which images are kept; 0: the published ones
    epochs: int = 200
    batch_size: int = 128
    lr: float = 0.1  # the highest learning rate
    weight_decay: float = 2e-4  # on all parameters
    colour: bool = False  # whether the images' colours are distorted, as SimCLR does


# +----------------------------------------------------------------------------------------------+
# | 3 Training                                                                                   |
# |                                                                                              |
# | Teachers and students alike go through Trainer and train. Trainer.step is all that a step    |
# | does; on a GPU it is recorded as a CUDA graph, once for each batch size, and replayed.       |
# +----------------------------------------------------------------------------------------------+


class DivergedError(Exception):
    """The loss or the weights are not finite any more."""


class CaptureError(Exception):
    """A step could not be recorded as a CUDA graph."""


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

    def __init__(self, config: Config, data: Dataset, teachers: list[ResNet], device: torch.device):
        method = METHODS[config.method]
        self.config = config
        self.device = device
        # The loss's own arguments. bkd_start is none of them: start_epoch acts on it.
        self.hyper = {key: value for key, value in config.hyper.items() if key != "bkd_start"}

        # The student, and for krdistill (our reconstruction) the map from its features to the
        # teacher's. The weights are drawn on the CPU, so that a seed starts alike on every device.
        teacher_width = sum(teacher.num_features for teacher in teachers)  # of all, side by side
        self.network_arguments = {
            "name": config.network,
            "num_classes": len(data.class_counts),
            "head": config.head,
            "projection": teacher_width if method.uses == "features" else 0,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.student = ResNet(**self.network_arguments)
            self.adapter = nn.Identity()
            if method.uses == "class means":
                self.adapter = nn.Linear(self.student.num_features, teacher_width)

        # The teachers, frozen. Their convolutions are cast once; autocast would cast them in every
        # step.
        self.teacher_digests = [weights_digest(teacher) for teacher in teachers]
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
        # start_epoch puts the class counts there once BKD is to act.
        self.generator = torch.Generator().manual_seed(config.seed)
        self.batches = Batches(
            data.train_images,
            data.train_targets,
            config.batch_size,
            device,
            method.sampler,
            config.colour,
        )
        self.class_counts = torch.tensor(data.class_counts, dtype=torch.float64, device=device)
        self.equal_counts = torch.ones_like(self.class_counts)
        self.bkd_counts = self.equal_counts.clone()
        if method.uses == "class means":  # of the only teacher
            self.class_means = class_means(teachers[0], data, device, config.precision)
            self.prototypes = balanced_prototypes(self.class_means)
            # Where the teacher learned no prior, equal counts leave its logits as they are.
            learns_prior = METHODS[config.teachers[0]["method"]].learns_prior
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
            acts = epoch / self.config.epochs >= self.config.hyper["bkd_start"]
            self.bkd_counts.copy_(self.class_counts if acts else self.equal_counts)
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

        Warm up, record, restore, return. The steps train on whatever the batches hold; then the
        state is restored, and start_epoch, which has to follow, sets all the rest. Raises
        CaptureError where torch cannot record the step, for example because its loss calls .item()
        or branches on a tensor, for which the CPU has to wait for the GPU. After that the process
        has to end: the trainer's state and torch's stream are not restored.
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
        except RuntimeError as error:
            first = error  # torch raises others after it; the first one holds the reason
            while isinstance(first.__context__, RuntimeError):
                first = first.__context__
            reason = str(first).split("\n")[0]
            raise CaptureError(
                f"the training step cannot be recorded as a CUDA graph: {reason}, in "
                f"{last_line_outside_torch(first)}. With --eager it runs without one, more slowly"
            ) from error

        self.load_state_dict(saved)
        return lambda size: graphs[size].replay()


def last_line_outside_torch(error: BaseException) -> str:
    """The file and line that raised an error, or that called torch, where torch raised it."""
    own_torch = str(Path(torch.__file__).parent) + os.sep
    lines = traceback.extract_tb(error.__traceback__)
    outside = [line for line in lines if not line.filename.startswith(own_torch)]
    last = (outside or lines)[-1]
    return f"{last.filename}, line {last.lineno}"


@dataclass
class Progress:
    """What has been done for a run, over all the times that it was stopped and continued."""

    epochs: int  # finished ones
    seconds: float
    devices: list[str]  # each once, in the order of their use
    versions: list[str]  # of this program, likewise


def train(
    trainer: Trainer,
    data: Dataset,
    folder: Path,
    progress: Progress,
    eval_every: int,
    eager: bool = False,
) -> dict:
    """Train from the epoch after progress to the last one; returns the last test's scores.

    Each epoch adds a row to folder/log.jsonl, then replaces folder/last.pt. Raises DivergedError
    and CaptureError.
    """
    config = trainer.config
    step = trainer.step if eager or trainer.device.type != "cuda" else trainer.capture()
    data = data._replace(test_images=data.test_images.to(trainer.device))
    scores = None
    epochs_before, seconds_before = progress.epochs, progress.seconds
    started = time.perf_counter()

    print("    epoch      lr     loss    train     test     many   medium      few   img/s    left")
    for epoch in range(epochs_before, config.epochs):
        row = train_epoch(trainer, step, epoch)
        check_finite(trainer, row, folder)

        is_last = epoch + 1 == config.epochs
        if is_last or (epoch + 1) % eval_every == 0:
            scores = evaluate(trainer.student, data, trainer.device, config.precision)
            row |= {key: scores[key] for key in ("top1", *GROUPS)}

        seconds = time.perf_counter() - started
        left = seconds / (epoch + 1 - epochs_before) * (config.epochs - epoch - 1)
        print_epoch(row, config.epochs, left)

        progress.epochs = epoch + 1
        progress.seconds = seconds_before + seconds
        add_to_log(folder, row)
        save(trainer, folder, progress)

    if scores is None:  # it had been stopped after its last epoch
        scores = evaluate(trainer.student, data, trainer.device, config.precision)
    progress.seconds = seconds_before + time.perf_counter() - started
    return scores


def train_epoch(trainer: Trainer, step: Callable[[int], None], epoch: int) -> dict:
    """Every step of one epoch; returns its row of the log."""
    began = time.perf_counter()
    sizes = trainer.batches.sizes
    trainer.start_epoch(epoch)
    for done, size in enumerate(sizes, start=1):
        step(size)
        print_progress(done, len(sizes), trainer.config.batch_size, began)

    count = sum(sizes)
    loss = trainer.loss_sum.item() / count  # .item() waits until the device is done
    return {
        "epoch": epoch + 1,
        "lr": learning_rate(epoch, trainer.config.epochs, trainer.config.lr),
        "loss": loss,
        "train_top1": 100 * trainer.correct.item() / count,
        "images_per_second": round(count / (time.perf_counter() - began)),
    }


def check_finite(trainer: Trainer, row: dict, folder: Path) -> None:
    """Raise DivergedError where the epoch's loss, or a weight after it, is not finite."""
    finite = torch.stack([weight.isfinite().all() for weight in trainer.weights]).all()
    if math.isfinite(row["loss"]) and finite:
        return
    raise DivergedError(
        f"epoch {row['epoch']} ended with a loss of {row['loss']:g} and weights that are "
        f"{'' if finite else 'not '}finite: try a smaller --lr. The epoch before is kept in "
        f"{folder}, if there was one"
    )


def print_progress(done: int, total: int, batch_size: int, began: float) -> None:
    """On a terminal, and in an epoch of more than a second, show the steps in place."""
    seconds = time.perf_counter() - began
    if seconds > 1 and sys.stdout.isatty():
        speed = done * batch_size / seconds
        print(f"\r\033[K      step {done} of {total}, {speed:.0f} images/s", end="", flush=True)


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
    """As people say it: 12 s, 34 min, 5.6 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


# +----------------------------------------------------------------------------------------------+
# | 4 Evaluation                                                                                 |
# |                                                                                              |
# | top-1 is the share of the test images that are classified correctly. CIFAR has equally many  |
# | of each class. The groups many, medium and few are those of the literature.                  |
# +----------------------------------------------------------------------------------------------+

# By the training images of a class: at least, at most.
GROUPS = {"many": (101, math.inf), "medium": (20, 100), "few": (0, 19)}


def mixed_precision(device: torch.device, precision: str) -> torch.autocast:
    """bf16 where precision says so; without the weight cache, which a CUDA graph cannot hold."""
    return torch.autocast(device.type, torch.bfloat16, precision == "bf16", cache_enabled=False)


@torch.no_grad()
def predict(model: ResNet, images: Tensor, device: torch.device, precision: str) -> Output:
    """Logits and features of images (N, 3, S, S) uint8, not augmented, in eval mode."""
    pixels_a_part = 2_048_000 if device.type == "cuda" else 256_000
    model.eval()
    outputs = []
    for part in images.split(pixels_a_part // images.shape[-1] ** 2):
        with mixed_precision(device, precision):
            outputs.append(model(normalise(part.to(device))))
    logits, features = zip(*outputs, strict=True)
    return Output(torch.cat(logits), torch.cat(features))


def evaluate(model: ResNet, data: Dataset, device: torch.device, precision: str) -> dict:
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


def class_means(model: ResNet, data: Dataset, device: torch.device, precision: str) -> Tensor:
    """The mean features of each class over its training images, not augmented: (C, D) float32."""
    features = predict(model, data.train_images, device, precision).features.double()
    sums = features.new_zeros(len(data.class_counts), features.shape[1])
    sums.index_add_(0, data.train_targets.to(device), features)
    return (sums / sums.new_tensor(data.class_counts)[:, None]).float()


def machine(device: torch.device) -> str:
    """The device and the torch version, as run folders and reports show them."""
    name = f"CPU with {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}"


# +----------------------------------------------------------------------------------------------+
# | 5 Run folders                                                                                |
# |                                                                                              |
# | A run is a folder: config.json (settings, command), log.jsonl (the command, then a line an   |
# | epoch), last.pt (weights, and all that resuming needs), result.json (once it is finished).   |
# | Its name ends in a digest of its Config, so that two different runs never share a folder.    |
# +----------------------------------------------------------------------------------------------+


class FolderBusyError(Exception):
    """Another process writes the run's folder."""


def differs_from_default(config: Config) -> dict:
    """What a reader has to be told of a run's settings: those that are not the default ones.

    The order of the keys is part of run_name: keep it.
    """
    method = METHODS[config.method]
    defaults = {
        "batch_size": Config.batch_size,
        "lr": Config.lr,
        "weight_decay": Config.weight_decay,
        "imb_type": Config.imb_type,
        "subset_seed": Config.subset_seed,
        "colour": Config.colour,
        "head": method.head,
        **default_hyper(config.method, config.dataset),
    }
    values = asdict(config) | config.hyper
    return {
        key: values[key]
        for key, default in defaults.items()
        if key in values and values[key] != default  # a run older than a hyperparameter lacks it
    }


def run_name(config: Config) -> str:
    """The name of the run's folder: readable, and ending in a digest of the whole Config."""
    # A file system counts the bytes of a name, of which a letter can have several.
    dataset = Path(config.dataset).stem.encode()[:40].decode(errors="ignore")
    parts = [dataset, f"imb{config.imb:g}", config.method, config.network]

    if config.teachers:
        kinds = dict.fromkeys(f"{t['network']}-{t['method']}" for t in config.teachers)
        parts += ["from", "+".join(kinds)]
    if len(config.teachers) > 1:
        parts.append(f"x{len(config.teachers)}")
    # Many given teachers would make the name longer than a file system allows. Where there are
    # several, the digest at the end of the name alone says which they are.
    given = [t["checkpoint"] for t in config.teachers if "checkpoint" in t]
    if len(given) == 1:
        parts.append(f"given-{given[0]}")
    parts += [f"{key}{value}" for key, value in differs_from_default(config).items()]

    settings = json.dumps(asdict(config), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
    parts += [f"e{config.epochs}", f"s{config.seed}", digest]
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in "-".join(parts))


@contextlib.contextmanager
def lock(folder: Path, wait: bool) -> Iterator[None]:
    """Make the folder, and lock it until the block or the process ends.

    Where another process holds it: wait for that one, or raise FolderBusyError. Raises InputError
    where the file system cannot lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = f"{folder} is being written by another process"
            if not wait:
                raise FolderBusyError(f"{busy}: wait for it, or use another --runs-dir") from None
            print(f"kd_lt.py: {busy}, waiting", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # for example of a network file system
            raise InputError(
                f"{folder}: its file system cannot lock ({error.strerror}); use another --runs-dir"
            ) from None
        yield


def write_json(path: Path, content: dict) -> None:
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


# The keys that read demands of a last.pt, to rebuild its network or to resume its run, and of a
# result.json. All have "settings", too.
TO_LOAD = ("network", "student", "epoch", "versions")
TO_RESUME = (*TO_LOAD, "teachers", "adapter", "momentum", "generator", "seconds", "devices")
TO_REPORT = ("version", "devices", "teachers", "top1", *GROUPS, "per_class", "class_counts")


def read(path: str | Path, needed: tuple[str, ...]) -> dict:
    """A run's last.pt or result.json, and its Config as "config", its path as "file".

    Everything that reads them goes through here. No code from the file is run. Raises InputError
    for a file that cannot be read, is none of this program's, is damaged, or lacks a needed key.
    """
    path = Path(path)
    if path.is_dir():
        path /= "last.pt"
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text())
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        config = Config(**content["settings"])
        is_ours = config.method in METHODS and config.network in NETWORKS
        if not is_ours or not content.keys() >= set(needed):
            raise KeyError  # refused below
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; the run is not finished, is no run, or came without its weights"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception:  # of a damaged or foreign file torch.load and json raise a dozen types
        raise InputError(
            f"{path}: damaged, of another program or version, or without what is needed here "
            "(weights are in last.pt). To train a run anew, move its whole folder away"
        ) from None
    return content | {"config": config, "file": path}


def read_checkpoint(folder: Path, config: Config, needed: tuple[str, ...]) -> dict:
    """The last.pt of a run's folder, as read. Raises InputError, too, where it is another run's."""
    content = read(folder / "last.pt", needed)
    if content["config"] != config:
        raise InputError(
            f"{content['file']}: it is of another run, {run_name(content['config'])}. Put the "
            "right one back, or move this run's whole folder away to train it anew"
        )
    return content


def read_log(folder: Path) -> tuple[str, list[dict]]:
    """The command and the rows of log.jsonl, epochs in order; damaged lines are left out.

    Raises OSError where it is there and cannot be read.
    """
    command, rows = "", []
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / "log.jsonl").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # of a damaged line
                row = json.loads(line)
                if "command" in row:
                    command = row["command"]
                elif row["epoch"] > (rows[-1]["epoch"] if rows else 0):
                    rows.append(row)
    return command, rows


def add_to_log(folder: Path, row: dict) -> None:
    """Append a row to log.jsonl; resume cuts a line that is half written."""
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def load_run(path: str | Path, device: str | torch.device = "cpu") -> ResNet:
    """The network of a run folder or its last.pt, finished or not, in eval mode.

    model(data.normalise(images)) with images (B, 3, S, S) of 0..255 gives logits and features.
    Raises InputError.
    """
    content = read(path, TO_LOAD)
    with torch.random.fork_rng(devices=[]):
        model = ResNet(**content["network"])
    model.load_state_dict(content["student"])
    return model.eval().to(device, memory_format=torch.channels_last)


def weights_digest(model: nn.Module) -> str:
    """16 hex digits of a network's weights and running statistics, without the batch counters."""
    sha256 = hashlib.sha256()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            sha256.update(tensor.float().cpu().numpy().tobytes())
    return sha256.hexdigest()[:16]


def save(trainer: Trainer, folder: Path, progress: Progress) -> None:
    """Write folder/last.pt: all that the next epoch depends on, as plain tensors and numbers."""
    content = {
        "settings": asdict(trainer.config),
        "network": trainer.network_arguments,
        "teachers": trainer.teacher_digests,  # of their weights; settings say which they are
        "epoch": progress.epochs,
        "seconds": progress.seconds,
        "devices": progress.devices,
        "versions": progress.versions,
        **trainer.state_dict(),
    }
    # First into memory: on a full disk write_whole fails, and keeps the file of the epoch before.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(folder / "last.pt", buffer.getvalue())


def resume(trainer: Trainer, folder: Path, command: str) -> Progress:
    """Load folder/last.pt if it is there, bring log.jsonl to the same epoch; returns the progress.

    Raises InputError where last.pt is damaged, gone, of another run, or trained by other teachers
    than now.
    """
    for stale in folder.glob("*.partial"):  # of a process that was killed while it wrote
        stale.unlink()

    progress = Progress(epochs=0, seconds=0.0, devices=[], versions=[])
    logged_command, rows = read_log(folder)
    if (folder / "last.pt").exists():
        content = read_checkpoint(folder, trainer.config, TO_RESUME)
        if content["teachers"] != trainer.teacher_digests:
            raise InputError(
                f"{folder}: its first {content['epoch']} epochs had another teacher, whose weights "
                "have changed since. Put the former teacher back, or move this run's whole folder "
                "away to train it anew"
            )
        trainer.load_state_dict(content)
        progress = Progress(
            content["epoch"], content["seconds"], content["devices"], content["versions"]
        )
        print(f"resumed   after epoch {progress.epochs} of {trainer.config.epochs}")
    elif len(rows) > 1:  # the first epoch's row can be there without last.pt: it is written first
        raise InputError(
            f"{folder / 'last.pt'} is gone, which the run needs to continue: put it back, or move "
            "this run's whole folder away to train it anew"
        )

    progress.devices = list(dict.fromkeys([*progress.devices, machine(trainer.device)]))
    progress.versions = list(dict.fromkeys([*progress.versions, VERSION]))
    # The log may be an epoch ahead of last.pt. That row is cut, because its epoch is run again.
    kept = [row for row in rows if row["epoch"] <= progress.epochs]
    lines = [json.dumps(row) + "\n" for row in [{"command": logged_command or command}, *kept]]
    write_whole(folder / "log.jsonl", "".join(lines).encode())
    return progress


def given_teacher(path: str, config: Config) -> dict:
    """What a --teacher-checkpoint is; it has to fit the student's data and classifier."""
    content = read(path, TO_LOAD)
    teacher = content["config"]

    problem = ""
    if teacher.data != config.data:
        problem = (
            f"it was trained on other images: {teacher.dataset}, {imbalance(teacher)} (digest "
            f"{teacher.data}), not {config.dataset}, {imbalance(config)} ({config.data})"
        )
    elif teacher.head != config.head:
        problem = (
            f"its classifier is {teacher.head}, not {config.head}; a cosine classifier is in runs "
            "of cbd and in their teachers, in no others"
        )
    elif content["epoch"] != teacher.epochs:
        problem = f"it stopped after epoch {content['epoch']} of {teacher.epochs}"
    elif (teacher.network, teacher.seed) == (config.network, config.seed):
        problem = "it has the student's seed, and began with the same weights: use another --seed"
    if problem:
        raise InputError(f"--teacher-checkpoint {path}: {problem}")

    return {
        "network": teacher.network,
        "method": teacher.method,
        "head": teacher.head,
        "colour": teacher.colour,
        "checkpoint": hashlib.sha256(content["file"].read_bytes()).hexdigest()[:16],
    }


def run(
    config: Config, data: Dataset, args: argparse.Namespace, device: torch.device, role="student"
) -> Path:
    """Train the run's teachers, then the run, unless it has a result.json; returns its folder.

    Of args it needs runs_dir, teacher_checkpoint, eval_every, eager and command. Raises InputError,
    DivergedError, CaptureError and, for a student, FolderBusyError; a teacher is waited for.
    """
    folder = Path(args.runs_dir) / run_name(config)
    result_file = folder / "result.json"
    title = f"{role:<9} {config.network}, {printed_name(config.method)}, seed {config.seed}"

    with lock(folder, wait=role == "teacher"):
        if result_file.exists():  # perhaps just now, by the process that was waited for
            print(f"{title}: finished before, not trained again; {folder}", flush=True)
            return folder

        if not (folder / "config.json").exists():
            description = {
                "settings": asdict(config),
                "version": VERSION,
                "device": machine(device),
                "command": args.command,
            }
            write_json(folder / "config.json", description)

        # Teachers are trained only where teacher_checkpoint is empty; they can get the same args.
        paths = args.teacher_checkpoint or [
            train_teacher(teacher, config, data, args, device) for teacher in config.teachers
        ]
        teachers = [load_run(path, device) for path in paths]
        tested_teachers = [
            about | evaluate(teacher, data, device, config.precision)
            for about, teacher in zip(config.teachers, teachers, strict=True)
        ]

        print(f"{title}, {config.epochs} epochs, in {folder}", flush=True)
        trainer = Trainer(config, data, teachers, device)
        progress = resume(trainer, folder, args.command)
        scores = train(trainer, data, folder, progress, args.eval_every, args.eager)

        result = {
            "settings": asdict(config),
            "version": ", then ".join(progress.versions),
            "teachers": tested_teachers,
            **scores,
            "seconds": progress.seconds,
            "devices": progress.devices,
        }
        write_json(result_file, result)
        return folder


def train_teacher(
    teacher: dict, config: Config, data: Dataset, args: argparse.Namespace, device: torch.device
) -> Path:
    """The folder of a teacher's run, which is trained now, unless it is finished.

    It has the student's Config, but no teachers, the default hyperparameters of its own method, and
    the network, method, head, colour and seed that `teacher`, of config.teachers, names. Raises as
    run does.
    """
    hyper = default_hyper(teacher["method"], config.dataset)
    teacher_config = replace(config, teachers=[], hyper=hyper, **teacher)
    folder = run(teacher_config, data, args, device, role="teacher")

    # In a folder that was copied in two parts, result.json can be ahead of last.pt.
    epoch = read_checkpoint(folder, teacher_config, TO_LOAD)["epoch"]
    if epoch != config.epochs:
        raise InputError(
            f"{folder}: result.json is of epoch {config.epochs}, but last.pt of epoch {epoch}. "
            "Copy the folder anew, or delete result.json to train on"
        )
    return folder


# +----------------------------------------------------------------------------------------------+
# | 6 Reports                                                                                    |
# |                                                                                              |
# | Both are made from result.json; the table's last line needs log.jsonl, too. Runs that differ |
# | in their seeds, and in nothing else, are one row or one line.                                |
# +----------------------------------------------------------------------------------------------+


def spread(values: list) -> str:
    """Mean ± sample standard deviation of the values that are not None; "-" where all are."""
    present = [value for value in values if value is not None]
    if not present:
        return "-"
    deviation = f" ± {statistics.stdev(present):.2f}" if len(present) > 1 else ""
    return f"{statistics.fmean(present):.2f}{deviation}"


def teacher_names(teachers: list[dict], network: str) -> str:
    """How the teachers were trained; their network is named where it is not the student's."""
    names = []
    for teacher in teachers:
        name = printed_name(teacher["method"])
        names.append(name if teacher["network"] == network else f"{teacher['network']} {name}")
    return " + ".join(dict.fromkeys(names))


def row_name(config: Config) -> str:
    """The method, and in words what differs from its defaults."""
    words = [printed_name(config.method)]
    if len(config.teachers) > 1:
        words.append(f"{len(config.teachers)} teachers")
    names = teacher_names(config.teachers, config.network)
    if names != METHODS[config.method].teacher:
        words.append(f"from {names}")
    words += [f"given teacher {t['checkpoint'][:8]}" for t in config.teachers if "checkpoint" in t]

    for key, value in differs_from_default(config).items():
        if key == "head":
            words.append(f"{value} classifier")
        elif key == "colour":
            words.append("distorted colours")
        elif key not in ("imb_type", "subset_seed"):  # those are in the heading
            words.append(f"{key.replace('_', ' ')} {value:.12g}")  # g alone rounds 0.9999999
    return ", ".join(words)


def imbalance(config: Config) -> str:
    """How the classes were thinned. Unthinned, a file may still be imbalanced by nature."""
    words = [f"imb {config.imb:g}" if config.imb != 1 else "not thinned"]
    if config.imb_type != Config.imb_type:
        words.append(config.imb_type)
    if config.subset_seed != Config.subset_seed:
        words.append(f"subset seed {config.subset_seed}")
    return ", ".join(words)


def setting_name(config: Config) -> str:
    """What all rows of a table share, as its heading."""
    epochs = f"{config.epochs} epochs"
    words = [config.dataset, imbalance(config), config.network, epochs, config.precision]
    return ", ".join(words)


def finished_runs(folders: list[str]) -> dict[tuple[str, str], dict[str, list[dict]]]:
    """{(heading, digest of the images): {row name: results}} of the runs in the folders.

    A folder is a run's own, or one that holds runs. A damaged run, and a folder without a finished
    one, are left out, and named on stderr. Raises InputError where nothing is left.
    """
    runs, left_out = {}, []
    for folder in map(Path, folders):
        paths = [*sorted(folder.glob("*/result.json")), *folder.glob("result.json")]
        if not paths:
            smoke = folder / "smoke"
            hint = f"; those of --smoke are in {smoke}" if smoke.is_dir() else ""
            left_out.append(f"{folder}: no finished run there{hint}")
        for path in paths:
            try:
                result = read(path, TO_REPORT)
            except InputError as error:
                left_out.append(str(error))
                continue
            # A run in two folders counts once. Where two devices gave two results, the first does.
            first = runs.setdefault(run_name(result["config"]), result)
            if first["per_class"] != result["per_class"]:
                left_out.append(f"{path}: another result of the same settings as {first['file']}")
    if not runs:
        raise InputError("\n".join(left_out))
    for reason in left_out:
        print(f"kd_lt.py: left out: {reason}", file=sys.stderr)

    order = list(METHODS)
    settings = {}
    for result in sorted(runs.values(), key=lambda r: order.index(r["config"].method)):
        config = result["config"]
        rows = settings.setdefault((setting_name(config), config.data), {})
        rows.setdefault(row_name(config), []).append(result)
    return dict(sorted(settings.items()))


def best_tested(result: dict) -> float:
    """The top-1 of the best tested epoch, for comparison with papers that report it."""
    folder = result["file"].parent
    _, rows = read_log(folder)
    if len(rows) < result["config"].epochs:
        print(f"kd_lt.py: {folder / 'log.jsonl'} is damaged: it lacks epochs", file=sys.stderr)
    return max([result["top1"], *(row["top1"] for row in rows if "top1" in row)])


def classes_in_parts(class_counts: list[int], parts: int) -> list[list[int]]:
    """The classes, most training images first, in that many parts of about equal size."""
    ranked = torch.tensor(class_counts).argsort(descending=True, stable=True)
    return [part.tolist() for part in ranked.tensor_split(min(parts, len(class_counts)))]


def print_rows(rows: dict[str, list[dict]]) -> None:
    """Markdown of the results of each name: a table of means, then accuracies from head to tail.

    A result is that of a run, or that of a teacher in it, which has neither teachers nor Config.
    """
    print("| method | teacher, its top-1 | n | top-1 | many | medium | few |")
    print("|---|---|---|---|---|---|---|")
    for name, results in rows.items():
        cells = [spread([result[key] for result in results]) for key in ("top1", *GROUPS)]
        print(f"| {' | '.join([name, teacher_cell(results), str(len(results)), *cells])} |")

    class_counts = next(iter(rows.values()))[0]["class_counts"]
    parts = classes_in_parts(class_counts, 10)
    width = max(len("training images"), *map(len, rows))
    images = "".join(f"{sum(class_counts[c] for c in part):6}" for part in parts)
    print(
        f"\nFrom head to tail, the classes in {len(parts)} parts: the training images of each, and "
        "the mean accuracy of its classes:\n\n```"
    )
    print(f"{'training images':<{width}}{images}")
    for name, results in rows.items():
        accuracies = [mean(r["per_class"][c] for r in results for c in part) for part in parts]
        numbers = "".join(f"{'-' if a is None else round(a):>6}" for a in accuracies)
        print(f"{name:<{width}}{numbers}")
    print("```\n", flush=True)


def teacher_cell(results: list[dict]) -> str:
    """The teachers' methods and their top-1; the deviation is that between seeds alone."""
    if not results[0].get("teachers"):
        return "-"
    names = teacher_names(results[0]["teachers"], results[0]["config"].network)
    tops = [mean(teacher["top1"] for teacher in result["teachers"]) for result in results]
    return f"{names}, {spread(tops)}"


def table(folders: list[str]) -> None:
    """Print Markdown: for each setting a heading, a row a method, and lines from head to tail."""
    for (heading, digest), rows in finished_runs(folders).items():
        makers = {
            f"kd-lt {result['version']} on {device}"
            for results in rows.values()
            for result in results
            for device in result["devices"]
        }
        print(f"**{heading}**\n")
        print_rows(rows)
        print(
            "Test accuracy in % after the last epoch, mean ± sample standard deviation over n "
            f"seeds. Images {digest}. Made by {'; '.join(sorted(makers))}.\n"
        )
        best = [
            f"{name} {spread([best_tested(result) for result in results])}"
            for name, results in rows.items()
        ]
        print(
            "Best tested epoch instead of the last (chosen on the test set, only to compare with "
            f"such numbers): {'; '.join(best)}.\n"
        )


LINE_STYLES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1))]


def plot(file: str, folders: list[str]) -> None:
    """Draw accuracy from head to tail, a line for each row of the table."""
    if Path(file).suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {file}: the name must end in .png, .svg or .pdf")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None

    settings = finished_runs(folders)
    figure = Figure(figsize=(9, 5 * len(settings)), layout="constrained")
    all_axes = figure.subplots(len(settings), squeeze=False)[:, 0]
    for axes, ((heading, _), rows) in zip(all_axes, settings.items(), strict=True):
        draw_head_to_tail(axes, heading, rows)
    # Without a date and random names, two .svg of the same runs are the same file.
    metadata = {"Date": None} if file.endswith(".svg") else None
    with rc_context({"svg.hashsalt": "kd-lt"}):
        figure.savefig(file, dpi=150, metadata=metadata)
    print(f"plot      {file}")


def draw_head_to_tail(axes, heading: str, rows: dict[str, list[dict]]) -> None:
    """One setting: the rows' accuracies over the classes, and behind them the training images."""
    class_counts = next(iter(rows.values()))[0]["class_counts"]
    num_classes = len(class_counts)
    size = 5 if num_classes >= 50 else 1
    parts = classes_in_parts(class_counts, math.ceil(num_classes / size))
    middles = [sum(map(len, parts[:i])) + len(part) / 2 for i, part in enumerate(parts)]

    # The training images, on a logarithmic axis of their own, behind the lines.
    images = axes.twinx()
    images.stairs(sorted(class_counts, reverse=True), fill=True, color="0.9")
    images.set(yscale="log", ylim=(0.8, None), ylabel="training images of a class (grey)")
    axes.set_zorder(images.get_zorder() + 1)
    axes.patch.set_visible(False)

    # The groups, named above the lines.
    left = 0
    for group, (low, high) in GROUPS.items():
        right = left + sum(low <= n <= high for n in class_counts)
        if right > left:
            middle = (left + right) / 2
            axes.text(
                middle,
                0.97,
                group,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                color="0.35",
            )
            axes.axvline(right, color="0.6", linewidth=0.8)
        left = right

    # A line for each row, with its own colour and style; a band of one standard deviation.
    for i, (name, results) in enumerate(rows.items()):
        cells = [
            [mean(result["per_class"][c] for c in part) for part in parts] for result in results
        ]
        accuracies = torch.tensor([[math.nan if a is None else a for a in row] for row in cells])
        average = accuracies.mean(0)
        axes.plot(
            middles,
            average,
            color=f"C{i}",
            linestyle=LINE_STYLES[i % len(LINE_STYLES)],
            label=f"{name}, n = {len(results)}",
        )
        if len(results) > 1:
            band = accuracies.std(0)
            axes.fill_between(
                middles, average - band, average + band, color=f"C{i}", alpha=0.2, linewidth=0
            )

    axes.set(
        title=heading,
        xlim=(0, num_classes),
        ylim=(0, None),
        xlabel=f"classes, most training images first, in {len(parts)} parts",
        ylabel="test accuracy in %, mean over seeds",
    )
    axes.legend(loc="lower left", fontsize=8)


# +----------------------------------------------------------------------------------------------+
# | 7 Command line                                                                               |
# |                                                                                              |
# | A flag that belongs to another method, or a training flag together with --table or --plot,   |
# | is refused, and the reason is told.                                                          |
# | Errors end in main as a message on stderr and a status: 2 wrong input, 1 a failed run, 75 a  |
# | busy folder, 130 Ctrl-C. A closed pipe (`| head`) is 141, without a message.                 |
# +----------------------------------------------------------------------------------------------+

EXAMPLES = """examples:
  python kd_lt.py --method bkd --imb 100
  python kd_lt.py --method cbd --num-teachers 4 --seed 1
  python kd_lt.py --table runs --plot head_to_tail.svg runs/*-bkd-* runs/*-kd-*"""


def number(kind: type, low: float, high: float = 10**9):
    """A type for argparse: an int or a float from low to high."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:  # true for nan, too
            allowed = f"be at least {low}" if value < low else f"lie in {low} .. {high}"
            raise argparse.ArgumentTypeError(f"must {allowed}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where kind(text) fails
    return parse


def describe_methods() -> str:
    """Each method in one sentence, with its own flags and their defaults."""
    lines = ["methods, and their own flags with their defaults:"]
    for name, method in METHODS.items():
        lines.append(f"  {name:<10} {method.about}")
        own = [f"--{key.replace('_', '-')} {value:g}" for key, value in method.hyper.items()]
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
    seed = number(int, 0, 2**32 - 1)
    count = number(int, 1)
    non_negative = number(float, 0)
    networks = ", ".join(NETWORKS)
    alone = [name for name, method in METHODS.items() if not method.teacher]

    # fmt: off
    add = parser.add_argument_group("what to train").add_argument
    add("--method", choices=METHODS, metavar="M", default="bkd", help="see below; default bkd")
    add("--seed", type=seed, metavar="N", default=0,
        help="of weights and batches; default 0. Teachers: seed + 1000, + 2000, ...")
    add("--smoke", action="store_true", help="a run of seconds: made-up images, resnet8, 8 epochs")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", metavar="D", default="cifar100",
        help="cifar10, cifar100 (default), synthetic or FILE.npz")
    add("--imb", type=number(float, 1), metavar="X",
        help="thin to largest / smallest class = X; default 100, for FILE.npz 1")
    add("--imb-type", choices=("exp", "step"), default=Config.imb_type,
        help="how the classes shrink; default exp")
    add("--subset-seed", type=seed, metavar="N", default=Config.subset_seed,
        help="which images are kept; default 0, the published ones")

    add = parser.add_argument_group("networks and teacher").add_argument
    add("--student", choices=NETWORKS, metavar="NET", default="resnet32",
        help=f"distilled, or trained alone; default resnet32. One of {networks}")
    add("--teacher", choices=NETWORKS, metavar="NET", default="resnet32",
        help="the network that teaches; default resnet32")
    add("--teacher-method", choices=alone, help="how it is trained; default ce, for dive bsce")
    add("--num-teachers", type=count, metavar="K", default=1,
        help="of cbd; default 1. K // 2 of them see distorted colours")
    add("--teacher-checkpoint", nargs="+", metavar="RUN",
        help="finished runs, instead of training teachers")

    add = parser.add_argument_group("the method's own numbers (defaults below)").add_argument
    add("--temperature", type=number(float, 1e-3, 100), metavar="T",
        help="softens the probabilities that are compared")
    add("--alpha", type=non_negative, metavar="X",
        help="weight of distillation; krdistill (reconstruction): of its logits' part")
    add("--beta", type=non_negative, metavar="X",
        help="bkd: base of the effective numbers; cbd: weight of features")
    add("--gamma", type=non_negative, metavar="X",
        help="krdistill (reconstruction): weight of the features' part")
    add("--power", type=non_negative, metavar="X", help="dive: flattens the teacher")
    add("--bkd-start", type=number(float, 0, 1), metavar="X",
        help="bkd: share of the epochs before it acts; on cifar10 0.8")

    add = parser.add_argument_group("recipe, of teacher and student alike").add_argument
    add("--epochs", type=count, metavar="N", default=Config.epochs, help="default 200")
    add("--batch-size", type=count, metavar="N", default=Config.batch_size,
        help="images in a step; default 128")
    add("--lr", type=number(float, 1e-6), metavar="X", default=Config.lr,
        help="the highest learning rate; default 0.1")
    add("--weight-decay", type=non_negative, metavar="X", default=Config.weight_decay,
        help="on all parameters; default 0.0002")

    add = parser.add_argument_group("machine and folders").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="default auto: an NVIDIA GPU, if there is one")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="default auto: bf16, where the hardware has it")
    add("--eager", action="store_true",
        help="on a GPU: no CUDA graph, for a step that cannot be recorded")
    add("--eval-every", type=count, metavar="N",
        help="test after every N epochs; default 1, on a CPU 5")
    add("--data-dir", metavar="DIR", default="data",
        help="where CIFAR is, or is downloaded to; default data")
    add("--runs-dir", metavar="DIR", default="runs", help="where runs are kept; default runs")

    reports = "reports on finished runs (RUNS: run folders, or folders of runs)"
    add = parser.add_argument_group(reports).add_argument
    add("--table", nargs="*", metavar="RUNS",
        help="print as Markdown; default: the RUNS of --plot, or those in --runs-dir")
    add("--plot", nargs="+", metavar=("FILE", "RUNS"),
        help="draw accuracy from head to tail: .png, .svg, .pdf; default: the RUNS of --table, "
        "or those in --runs-dir")
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
    given = {word.split("=")[0] for word in argv if word.startswith("--")}
    if args.imb is None:
        args.imb = 1.0 if args.dataset.endswith(".npz") else 100.0
    refuse_flags(parser, args, given)
    args.command = shlex.join(["kd_lt.py", *argv])
    return args


def refuse_flags(
    parser: argparse.ArgumentParser, args: argparse.Namespace, given: set[str]
) -> None:
    """End with an error for a flag that this method, or a report, would ignore or cannot use.

    An experiment that is not what its command says would go unnoticed.
    """
    method = METHODS[args.method]
    because = {}  # flag: the reason why it has no effect
    for other in METHODS.values():
        for key in other.hyper.keys() - method.hyper.keys():
            because[key] = f"with --method {args.method}"
    if not method.many_teachers:
        because["num_teachers"] = f"with --method {args.method}, which has one teacher at most"
    if not method.teacher:
        for key in ("teacher", "teacher_method", "teacher_checkpoint"):
            because[key] = f"with --method {args.method}, which has no teacher"
    if args.teacher_checkpoint:
        for key in ("teacher", "teacher_method", "num_teachers"):
            because.setdefault(key, "beside --teacher-checkpoint")
    if args.imb == 1:
        because["imb_type"] = because["subset_seed"] = "with --imb 1 (the default of a .npz)"
    if args.plot or args.table is not None:
        # A report trains nothing: only these flags have an effect, whatever the method. --smoke has
        # one, because it changes the default of --runs-dir.
        effective = {"table", "plot", "runs_dir", "smoke"}
        report = "--plot" if args.plot else "--table"
        because = {key: f"with {report}" for key in vars(args) if key not in effective}

    for key, reason in because.items():
        flag = "--" + key.replace("_", "-")
        if flag in given:
            parser.error(f"{flag} has no effect {reason}: leave it out")
    if not method.many_teachers and len(args.teacher_checkpoint or []) > 1:
        parser.error(f"--teacher-checkpoint: --method {args.method} has one teacher")
    for key, highest in method.highest.items():
        value = getattr(args, key)
        if value is not None and value > highest:
            flag = "--" + key.replace("_", "-")
            parser.error(f"{flag} must lie in 0 .. {highest} for {args.method}, not {value}")


def make_config(args: argparse.Namespace, data: Dataset, precision: str) -> Config:
    """The one Config of the flags, every default filled in."""
    method = METHODS[args.method]
    hyper = default_hyper(args.method, args.dataset)
    for key in hyper:
        if getattr(args, key) is not None:
            hyper[key] = getattr(args, key)

    config = Config(
        dataset=Path(args.dataset).name,
        data=data.digest,
        imb=args.imb,
        method=args.method,
        hyper=hyper,
        network=args.student,
        head=method.head,
        teachers=[],
        seed=args.seed,
        precision=precision,
        imb_type=args.imb_type,
        subset_seed=args.subset_seed,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        weight_decay=args.weight_decay,
    )
    if not method.teacher:
        return config
    if args.teacher_checkpoint:
        given = [given_teacher(path, config) for path in args.teacher_checkpoint]
        return replace(config, teachers=given)

    teachers = [
        {
            "network": args.teacher,
            "method": args.teacher_method or method.teacher,
            "head": method.head,
            "seed": args.seed + 1000 * (k + 1),  # the student's seed would give the same start
            "colour": k >= args.num_teachers - args.num_teachers // 2,  # the second half
        }
        for k in range(args.num_teachers)
    ]
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
    print(
        f"data      {args.dataset}, {imbalance(config)}: {sum(counts):,} training images, "
        f"{max(counts)}..{min(counts)} a class; {', '.join(groups)}; "
        f"{len(data.test_targets):,} test images"
    )
    without = sorted(set(range(len(counts))) - set(data.test_targets.tolist()))
    if without:
        names = ", ".join(map(str, without))
        print(f"          no test image of class {names}: its accuracy cannot be told")

    hyper = [f"{key.replace('_', ' ')} {value:.12g}" for key, value in config.hyper.items()]
    print(f"method    {printed_name(config.method)}" + (f": {', '.join(hyper)}" if hyper else ""))

    print(f"student   {config.network}, {config.head} classifier, seed {config.seed}")
    for teacher in config.teachers:
        given = "checkpoint" in teacher
        origin = f"given: {teacher['checkpoint']}" if given else f"seed {teacher['seed']}"
        colour = ", distorted colours" if teacher["colour"] else ""
        name = printed_name(teacher["method"])
        print(f"teacher   {teacher['network']} by {name}, {origin}{colour}")

    steps = math.ceil(sum(counts) / config.batch_size)
    print(
        f"recipe    epochs {config.epochs} of {steps} steps, batch size {config.batch_size}, "
        f"lr {config.lr:.12g}, weight decay {config.weight_decay:.12g}"
    )
    print(f"device    {machine_name}, {config.precision}")
    print(f"folder    {Path(args.runs_dir) / run_name(config)}\n", flush=True)


def train_and_report(args: argparse.Namespace) -> None:
    """Train what the flags say and print its table."""
    device, precision = choose_device(args)
    args.eval_every = args.eval_every or (1 if device.type == "cuda" else 5)
    data = load_dataset(args.dataset, args.data_dir, args.imb, args.imb_type, args.subset_seed)
    config = make_config(args, data, precision)
    print_plan(config, data, args, machine(device))

    folder = run(config, data, args, device)
    result = read(folder / "result.json", TO_REPORT)
    print(f"result    {folder}, test accuracy in % after the last epoch\n")
    rows = {}
    for i, teacher in enumerate(result["teachers"], start=1):
        rows[f"teacher {i}, {printed_name(teacher['method'])}"] = [teacher]
    print_rows(rows | {row_name(config): [result]})


def main(argv: list[str]) -> int:
    """One command; returns the exit status. Raises SystemExit for wrong flags, as argparse does."""
    args = parse_flags(argv)
    try:
        if args.plot:
            plot(args.plot[0], args.plot[1:] or args.table or [args.runs_dir])
        if args.table is not None:
            in_plot = args.plot[1:] if args.plot else []
            table(args.table or in_plot or [args.runs_dir])
        if not args.plot and args.table is None:
            train_and_report(args)
        sys.stdout.flush()  # here, where a failure can still be told
        return 0
    except InputError as error:
        status, message = 2, str(error)
    except (DivergedError, CaptureError) as error:
        status, message = 1, str(error)
    except FolderBusyError as error:
        # "Try again later", as sysexits.h has it: run_all.sh does not count this run as failed.
        status, message = 75, str(error)
    except (MemoryError, torch.OutOfMemoryError):
        status = 1
        message = (
            f"out of memory with --batch-size {args.batch_size}. Try a smaller batch, fewer or "
            "smaller images"
        )
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
    sys.exit(main(sys.argv[1:]))
