# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the kd-lt authors
"""Knowledge distillation for long-tailed recognition: KD, BKD, CBD, DiVE, KRDistill (reconstructed)

    python kd_lt.py --smoke                  the whole way in seconds, on generated images
    python kd_lt.py --method bkd --imb 100   train a teacher, distil the student, report

In this order: 1 losses, to be copied, 2 methods, 3 training, 4 run folders, 5 reports, 6 flags.
"""
import argparse
import hashlib
import io
import json
import statistics
import sys
import time
import warnings
from dataclasses import asdict, make_dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from data import GROUPS, Batches, InputError, load_dataset, lock, write_json, write_whole
from models import NETWORKS, ResNet, mixed_precision, predict

VERSION = "2.0.0"

# ---- 1 losses
# B images, C classes, D features; any device and float dtype. No gradient reaches the teacher.
# class_counts, the training images of each class, may be a list, a NumPy array or a tensor; the
# numbers in a tensor are not checked, because to look at them would stall a GPU.
def kd_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor,
            temperature: float = 2.0, alpha: float = 1.0) -> torch.Tensor:
    """KD: CE(z, y) + alpha KL_T(p, z), p the teacher (Hinton et al. 2015, arXiv 1503.02531).

    KL_T(p, z) = T^2 mean_B sum_c p_c (log p_c - log softmax(z/T)_c), p = softmax(teacher_logits/T).
    student_logits z, teacher_logits: (B, C) float. targets y: (B,) int64. Scalar, mean over the
    batch. Raises ValueError where shapes differ and for temperature <= 0.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"teacher_logits: {teacher_logits.shape}, not {student_logits.shape}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    log_p = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    kl = temperature**2 * F.kl_div(log_student, log_p, reduction="batchmean", log_target=True)
    return F.cross_entropy(student_logits, targets) + alpha * kl

def effective_number_weights(class_counts: list[float] | torch.Tensor,
                             beta: float = 0.9999) -> torch.Tensor:
    """Inverse effective numbers of images, with mean 1 (Cui et al. 2019, arXiv 1901.05555).

    w_c = C v_c / sum_j v_j, v_c = (1 - beta) / (1 - beta^n_c). class_counts n: C numbers. Returns
    (C,) float64. ValueError: other shapes, beta outside [0, 1), counts < 1 (in a tensor unchecked).
    """
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    listed = not isinstance(class_counts, torch.Tensor)
    if counts.ndim != 1 or listed and not (counts >= 1).all():
        raise ValueError(f"class_counts must be C numbers of at least 1, not {class_counts}")
    if not 0 <= beta < 1:
        raise ValueError(f"beta must lie in [0, 1), not {beta}")
    log_beta = counts.new_full((), beta).log()
    v = (1 - beta) / -torch.expm1(counts * log_beta)  # expm1 stays exact where beta^n is near 1
    return len(counts) * v / v.sum()

def bkd_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor,
             class_counts: list[float] | torch.Tensor, temperature: float = 2.0,
             alpha: float = 1.0, beta: float = 0.9999) -> torch.Tensor:
    """BKD: CE(z, y) + alpha KL_T(q, z), q the re-weighted teacher (arXiv 2104.10510, its code).

    q_c = w_c p_c / sum_j w_j p_j, p = softmax(teacher_logits/T), w = effective_number_weights: one
    for each class c, because that of an image's label would cancel. KL_T: see kd_loss.
    student_logits z, teacher_logits: (B, C) float. targets y: (B,) int64. class_counts: C numbers.
    Scalar, mean over the batch. ValueError: as in kd_loss and effective_number_weights.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"teacher_logits: {teacher_logits.shape}, not {student_logits.shape}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    log_w = effective_number_weights(class_counts, beta).log().to(teacher_logits)
    if log_w.shape != teacher_logits.shape[1:]:
        raise ValueError(f"class_counts: {log_w.shape}, not {teacher_logits.shape[1:]}")
    log_q = F.log_softmax(teacher_logits.detach() / temperature + log_w, dim=1)
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    kl = temperature**2 * F.kl_div(log_student, log_q, reduction="batchmean", log_target=True)
    return F.cross_entropy(student_logits, targets) + alpha * kl

def cbd_loss(student_logits: torch.Tensor, student_features: torch.Tensor,
             teacher_features: list[torch.Tensor], targets: torch.Tensor,
             alpha: float = 0.4, beta: float = 100.0) -> torch.Tensor:
    """CBD: (1 - alpha) CE(z, y) + alpha beta mean_B(1 - cos(s, t)) (arXiv 2104.05279, its code).

    t joins the features of K teachers, each scaled to length 1. CBD's batches draw all classes
    equally often. student_logits z: (B, C) float, in CBD 20 times the cosines of s and the class
    vectors. student_features s: (B, D_1 + ... + D_K). teacher_features: K tensors (B, D_k). targets
    y: (B,) int64. Scalar, mean over the batch. Raises ValueError where s and t differ in shape.
    """
    t = torch.cat([F.normalize(features.detach(), dim=1) for features in teacher_features], dim=1)
    if student_features.shape != t.shape:
        raise ValueError(f"student_features: {student_features.shape}, teacher_features: {t.shape}")
    l_fd = (1 - F.cosine_similarity(student_features, t, dim=1)).mean()
    return (1 - alpha) * F.cross_entropy(student_logits, targets) + alpha * beta * l_fd

def balanced_softmax_loss(logits: torch.Tensor, targets: torch.Tensor,
                          class_counts: list[float] | torch.Tensor) -> torch.Tensor:
    """Balanced softmax: CE(z + log pi, y), pi_c = n_c / sum n (Ren et al. 2020, arXiv 2007.10740).

    For training: a test uses z as it is. logits z: (B, C) float. targets y: (B,) int64. Scalar,
    mean over the batch. class_counts n: C numbers >= 1, or ValueError (in a tensor unchecked).
    """
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    listed = not isinstance(class_counts, torch.Tensor)
    if counts.shape != logits.shape[1:] or listed and not (counts >= 1).all():
        raise ValueError(f"class_counts must be {logits.shape[1]} numbers >= 1, not {class_counts}")
    log_pi = (counts / counts.sum()).log().to(logits)
    return F.cross_entropy(logits + log_pi, targets)

def dive_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor,
              class_counts: list[float] | torch.Tensor, temperature: float = 2.0,
              alpha: float = 0.5, power: float = 0.5) -> torch.Tensor:
    """DiVE: (1 - alpha) CE(z + log pi, y) + alpha KL_T(q, z), q flattened (arXiv 2103.15042).

    q_c = p_c^power / sum_j p_j^power, p = softmax(teacher_logits/T), of a balanced softmax teacher.
    KL_T: see kd_loss. student_logits z, teacher_logits: (B, C) float. targets y: (B,) int64.
    class_counts: C numbers. Mean over the batch. ValueError: as in kd_loss, balanced_softmax_loss.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"teacher_logits: {teacher_logits.shape}, not {student_logits.shape}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    log_q = F.log_softmax(power * teacher_logits.detach() / temperature, dim=1)
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    kl = temperature**2 * F.kl_div(log_student, log_q, reduction="batchmean", log_target=True)
    return (1 - alpha) * balanced_softmax_loss(student_logits, targets, class_counts) + alpha * kl

def balanced_prototypes(class_means: torch.Tensor) -> torch.Tensor:
    """A balanced arrangement of C classes near the teacher's own: no direction is much favoured.

    Our reconstruction of the abstract's "balanced category priors": M_c = m_c - mean_c m_c, thin
    SVD M = U S V^T, P = U V^T, rows scaled to length 1; for D >= C - 1 the simplex ETF, in which
    all pairs have the cosine -1/(C-1). class_means m: (C, D), C > 1, or ValueError. Returns (C, D).
    """
    if class_means.ndim != 2 or len(class_means) < 2:
        raise ValueError(f"class_means must be (C, D) with C >= 2, not {class_means.shape}")
    centred = class_means.double() - class_means.double().mean(0)
    u, s, vt = torch.linalg.svd(centred, full_matrices=False)
    kept = s > 1e-9 * s[0]  # the directions that the centred means span, at most C - 1
    return F.normalize(u[:, kept] @ vt[kept], dim=1).to(class_means)

def rectify_features(teacher_features: torch.Tensor, targets: torch.Tensor,
                     class_means: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    """Move each feature vector from its class mean to its class's balanced place.

    Our reconstruction: t - m_y + a P_y, scaled to length 1; a is the mean distance of the m_c from
    their centre. teacher_features t, result: (B, D) float. targets y: (B,) int64. class_means m:
    (C, D), of training images. prototypes P: balanced_prototypes(m). ValueError: other shapes.
    """
    if teacher_features.shape != targets.shape + prototypes.shape[1:]:
        raise ValueError(f"teacher_features {teacher_features.shape} unfit for targets, prototypes")
    if class_means.shape != prototypes.shape:
        raise ValueError(f"class_means: {class_means.shape}, not {prototypes.shape}")
    scale = (class_means - class_means.mean(0)).norm(dim=1).mean()
    return F.normalize(teacher_features + (scale * prototypes - class_means)[targets], dim=1)

def rectify_logits(teacher_logits: torch.Tensor, targets: torch.Tensor,
                   class_counts: list[float] | torch.Tensor) -> torch.Tensor:
    """Take the class prior out of the teacher's logits, then let the true class rank first.

    Our reconstruction: z~ = teacher_logits - log pi, pi_c = n_c / sum n; where its largest entry is
    not the true class's, the two change places. For a teacher trained with balanced softmax, pass
    teacher_logits + log pi: its own hold no prior. teacher_logits: (B, C) float. targets: (B,)
    int64. class_counts n: C numbers. Returns (B, C). ValueError: shapes; see balanced_softmax_loss.
    """
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    listed = not isinstance(class_counts, torch.Tensor)
    if counts.shape != teacher_logits.shape[1:] or listed and not (counts >= 1).all():
        raise ValueError(f"class_counts: not {teacher_logits.shape[1]} counts >= 1: {class_counts}")
    if targets.shape != teacher_logits.shape[:1]:
        raise ValueError(f"targets: {targets.shape}, not {teacher_logits.shape[:1]}")
    z = teacher_logits - (counts / counts.sum()).log().to(teacher_logits)
    true, top = targets[:, None], z.argmax(dim=1, keepdim=True)
    return z.scatter(1, top, z.gather(1, true)).scatter(1, true, z.gather(1, top))

def krdistill_loss(student_logits: torch.Tensor, student_features: torch.Tensor,
                   teacher_logits: torch.Tensor, rectified_features: torch.Tensor,
                   targets: torch.Tensor, class_counts: list[float] | torch.Tensor,
                   temperature: float = 2.0, alpha: float = 1.0, gamma: float = 2.0
                   ) -> torch.Tensor:
    """KRDistill, our reconstruction: CE(z + log pi, y) + alpha L_LRD + gamma L_RRD.

    From the abstract of arXiv 2409.07694, all we had of the paper. L_LRD: KL_T(q, z) as in kd_loss,
    q = softmax(rectify_logits / T). L_RRD: mean_B(1 - cos(g, r)). student_logits z, teacher_logits
    (see rectify_logits): (B, C) float. student_features g: (B, D), mapped to the teacher's width by
    a learned Linear. rectified_features r: (B, D), of rectify_features. targets y: (B,) int64.
    class_counts: C numbers. Mean over the batch. ValueError: as in kd_loss, balanced_softmax_loss.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"teacher_logits: {teacher_logits.shape}, not {student_logits.shape}")
    if student_features.shape != rectified_features.shape:
        raise ValueError(f"rectified_features must be {student_features.shape} as student_features")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    rectified_logits = rectify_logits(teacher_logits.detach(), targets, class_counts)
    log_q = F.log_softmax(rectified_logits / temperature, dim=1)
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    l_lrd = temperature**2 * F.kl_div(log_student, log_q, reduction="batchmean", log_target=True)
    l_rrd = (1 - F.cosine_similarity(student_features, rectified_features.detach(), dim=1)).mean()
    bsce = balanced_softmax_loss(student_logits, targets, class_counts)
    return bsce + alpha * l_lrd + gamma * l_rrd

# ---- 2 methods: a new one is a loss, an entry here, a case in Trainer.loss, its new flags in FLAGS
# hyper: the loss's hyperparameters and defaults, of their type in FLAGS. teacher: the method of its
# teacher by default. sampler: "instance" takes each image once an epoch, "class" all classes
# equally often. head: both networks' classifier. uses: teachers' "features" or "class means".
Method = make_dataclass("Method", ["hyper", ("teacher", str, ""), ("sampler", str, "instance"),
                                   ("head", str, "linear"), ("uses", str, "")], frozen=True)
SOFT = {"temperature": 2.0, "alpha": 1.0}
METHODS = {
    "ce": Method({}), "bsce": Method({}),  # without a teacher
    "kd": Method(SOFT, "ce"),
    "bkd": Method(SOFT | {"beta": 0.9999, "bkd_start": 0.0}, "ce"),
    "cbd": Method({"alpha": 0.4, "beta": 100.0}, "ce", "class", "cosine", "features"),
    "dive": Method(SOFT | {"alpha": 0.5, "power": 0.5}, "bsce"),
    "krdistill": Method(SOFT | {"gamma": 2.0}, "ce", uses="class means"),
}
BKD_START = {"cifar10": 0.8}  # the share of epochs before BKD's weights act there, as in its code

# ---- 3 training
# What decides a run's numbers, besides the device and its threads. data: a digest of the images.
# colour: SimCLR's distortion. teachers: network, method, head, colour, seed or checkpoint of each.
Config = make_dataclass("Config", [
    "dataset", "data", "imb", "imb_type", "subset_seed", "method", "hyper", "network", "head",
    "teachers", "seed", "epochs", "batch_size", "lr", "weight_decay", "precision", "colour",
], frozen=True)

def learning_rate(epoch, epochs, base):
    """In epoch 0 .. epochs-1: five epochs up to base, x0.01 from 80 %, x0.0001 from 90 %."""
    decay = 0.01 if 10 * epoch >= 8 * epochs else 1.0
    decay = 0.0001 if 10 * epoch >= 9 * epochs else decay
    return base * decay * min(1.0, (epoch + 1) / 5)

class Trainer:
    """A network in training: weights, optimizer, batches and frozen teachers on one device."""
    def __init__(self, config, data, teachers, device):
        self.config, self.device = config, device
        method, num_classes = METHODS[config.method], len(data.class_counts)
        width, own_width = sum(t.num_features for t in teachers), NETWORKS[config.network][2][-1]
        self.network = {"name": config.network, "num_classes": num_classes, "head": config.head}
        if method.uses == "features" and width != own_width:
            self.network["projection"] = width  # as many features as all teachers together
        self.adapter = torch.nn.Identity()
        with torch.random.fork_rng(devices=[]):  # drawn on the CPU: the same start on every device
            torch.manual_seed(config.seed)
            self.student = ResNet(**self.network)
            if method.uses == "class means":
                self.adapter = torch.nn.Linear(own_width, width)
        contiguous = device.type == "cuda" and config.precision == "fp32"  # see pytorch issue 44943
        self.layout = torch.contiguous_format if contiguous else torch.channels_last
        self.teachers = torch.nn.ModuleList(teachers).eval().requires_grad_(False)
        for module in self.teachers.modules():  # cast once: autocast would in every step
            if isinstance(module, torch.nn.Conv2d) and config.precision == "bf16":
                module.bfloat16()
        for network in (self.student, self.teachers):
            network.to(device, memory_format=self.layout)
        parameters = [*self.student.parameters(), *self.adapter.to(device).parameters()]
        self.lr = torch.tensor(0.0, device=device)  # a tensor: a CUDA graph reads its new value
        self.optimizer = torch.optim.SGD(parameters, self.lr, momentum=0.9, fused=True,
                                         weight_decay=config.weight_decay)
        self.momentum = [torch.zeros_like(parameter) for parameter in parameters]
        for parameter, buffer in zip(parameters, self.momentum, strict=True):
            self.optimizer.state[parameter]["momentum_buffer"] = buffer
        self.generator = torch.Generator().manual_seed(config.seed)
        self.batches = Batches(data.train_images, data.train_targets, data.class_counts,
                               config.batch_size, device, method.sampler, config.colour)
        self.class_counts = torch.tensor(data.class_counts, dtype=torch.float64, device=device)
        self.bkd_counts = self.class_counts.clone()
        if method.uses == "class means":
            self.class_means = class_means(teachers[0], data, device, config.precision)
            self.prototypes = balanced_prototypes(self.class_means)
            balanced = config.teachers[0]["method"] in ("bsce", "dive", "krdistill")
            shares = self.class_counts / self.class_counts.sum()
            self.log_pi = shares.log().float() if balanced else 0.0  # see rectify_logits
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.correct = torch.zeros((), device=device)
        self.state = [*parameters, *self.student.buffers(), *self.momentum, self.batches.position,
                      self.loss_sum, self.correct]

    def start_epoch(self, epoch):
        """Set the learning rate and BKD's weights, and shuffle the images, for epoch 0, 1, ..."""
        self.lr.fill_(learning_rate(epoch, self.config.epochs, self.config.lr))
        if self.config.method == "bkd":  # equal counts give equal weights: BKD is KD until it acts
            acts = epoch >= self.config.hyper["bkd_start"] * self.config.epochs
            self.bkd_counts.copy_(self.class_counts if acts else torch.ones_like(self.bkd_counts))
        self.student.train()
        self.batches.shuffle(self.generator)
        self.loss_sum.zero_()
        self.correct.zero_()

    def step(self, size):
        """One step of SGD on the next `size` images. It never waits for the device."""
        images, targets = self.batches.next(size)
        images = images.contiguous(memory_format=self.layout)
        with mixed_precision(self.device, self.config.precision):
            with torch.no_grad():
                teachers = [teacher(images) for teacher in self.teachers]
            student = self.student(images)
        loss = self.loss(student, teachers, targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss_sum += size * loss.detach().double()
        self.correct += (student.logits.argmax(dim=1) == targets).sum()

    def loss(self, student, teachers, targets):
        """The method's loss of one batch, a scalar; student and teachers are their Outputs."""
        z, counts, hyper = student.logits, self.class_counts, self.config.hyper
        match self.config.method:
            case "ce":
                return F.cross_entropy(z, targets)
            case "bsce":
                return balanced_softmax_loss(z, targets, counts)
            case "kd":
                return kd_loss(z, teachers[0].logits, targets, **hyper)
            case "bkd":
                hyper = {key: value for key, value in hyper.items() if key != "bkd_start"}
                return bkd_loss(z, teachers[0].logits, targets, self.bkd_counts, **hyper)
            case "cbd":
                features = [teacher.features for teacher in teachers]
                return cbd_loss(z, student.features, features, targets, **hyper)
            case "dive":
                return dive_loss(z, teachers[0].logits, targets, counts, **hyper)
            case "krdistill":
                g, t = self.adapter(student.features), teachers[0]
                r = rectify_features(t.features, targets, self.class_means, self.prototypes)
                return krdistill_loss(z, g, t.logits + self.log_pi, r, targets, counts, **hyper)

    @torch.no_grad()
    def capture(self):
        """Record step as one CUDA graph for each batch size; returns the function that replays it.

        A step that waits for the GPU, as one with .item(), print(tensor) or a branch on a tensor in
        its loss, cannot be recorded: a line says where it waits, and step itself is returned.
        """
        saved = [tensor.clone() for tensor in self.state]
        sizes = sorted(set(self.batches.sizes), reverse=True)  # the smaller reuses the memory
        graphs = {size: torch.cuda.CUDAGraph() for size in sizes}
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        with torch.cuda.stream(stream), torch.enable_grad():
            try:
                for mode in ("default", "default", "error"):  # warm-up; the last forbids waiting
                    torch.cuda.set_sync_debug_mode(mode)
                    self.batches.position.zero_()
                    for size in sizes:
                        self.step(size)
            except RuntimeError as error:
                if "synchronizing" not in str(error):
                    raise
                wait = error.__traceback__  # followed to the last line that is not torch's own
                while wait.tb_next and torch.__path__[0] not in str(wait.tb_next.tb_frame.f_code):
                    wait = wait.tb_next
                place = f"{wait.tb_frame.f_code.co_filename}, line {wait.tb_lineno}"
                print(f"slower   {place}, waits for the GPU: no CUDA graph is used", flush=True)
                graphs, wait = {}, None  # the traceback would keep a step's tensors alive
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(stream)
        for size, graph in graphs.items():
            with torch.cuda.graph(graph, pool, stream), torch.enable_grad():
                self.step(size)
        for tensor, value in zip(self.state, saved, strict=True):
            tensor.copy_(value)
        return (lambda size: graphs[size].replay()) if graphs else self.step

def class_means(model, data, device, precision):
    """The mean features of each class over its training images, not augmented: (C, D) float32."""
    features = predict(model, data.train_images, device, precision).features.double()
    sums = features.new_zeros(len(data.class_counts), features.shape[1])
    sums.index_add_(0, data.train_targets.to(device), features)
    return (sums / sums.new_tensor(data.class_counts)[:, None]).float()

def evaluate(model, data, device, precision):
    """Test accuracies in %: top1, per_class, and the mean of many, medium, few; None: no class."""
    targets, counts = data.test_targets, data.class_counts
    labels = predict(model, data.test_images, device, precision).logits.argmax(dim=1).cpu()
    hits = torch.bincount(targets[labels == targets], minlength=len(counts)).tolist()
    totals = torch.bincount(targets, minlength=len(counts)).tolist()
    per_class = [100 * hit / n if n else None for hit, n in zip(hits, totals, strict=True)]
    scores = {"top1": 100 * sum(hits) / sum(totals), "per_class": per_class, "class_counts": counts}
    return scores | {group: mean(per_class[c] for c, n in enumerate(counts) if low <= n <= high)
                     for group, (low, high) in GROUPS.items()}

def mean(values):
    """The mean of the values that are not None; None where all are."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None

def machine(device):
    """The device and the torch version, as run folders and reports show them."""
    name = f"CPU with {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device.type == "cuda" else name
    return f"{name}, torch {torch.__version__}"

def train(config, data, teachers, folder, device, eval_every):
    """Train to the last epoch, from folder/last.pt if it is there; returns the network's scores."""
    trainer = Trainer(config, data, teachers, device)
    done, earlier, devices = resume(trainer, folder)
    step = trainer.capture() if device.type == "cuda" else trainer.step  # replayed from a graph
    data = data._replace(test_images=data.test_images.to(device))
    count, scores, started = len(data.train_targets), None, time.perf_counter()
    print("    epoch      lr     loss    train     test     many   medium      few   img/s    left")
    for epoch in range(done, config.epochs):
        began = time.perf_counter()
        trainer.start_epoch(epoch)
        for size in trainer.batches.sizes:
            step(size)
        row = {"epoch": epoch + 1, "lr": learning_rate(epoch, config.epochs, config.lr)}
        row["loss"] = trainer.loss_sum.item() / count  # waits until the device is done
        row["train_top1"] = 100 * trainer.correct.item() / count
        row["images_per_second"] = round(count / (time.perf_counter() - began))
        if not trainer.loss_sum.isfinite():
            sys.exit(f"kd_lt.py: the loss is {row['loss']} in epoch {epoch + 1}: try a smaller --lr"
                     f"; {folder} keeps the checkpoint of the epoch before, if any")
        if epoch + 1 == config.epochs or (epoch + 1) % eval_every == 0:
            scores = evaluate(trainer.student, data, device, config.precision)
            row |= {key: scores[key] for key in ("top1", *GROUPS)}
        seconds = time.perf_counter() - started
        minutes_left = seconds / 60 / (epoch + 1 - done) * (config.epochs - epoch - 1)
        shown = "".join(f"{spread([row.get(key)]):>9}" for key in ("train_top1", "top1", *GROUPS))
        print(f"{epoch + 1:>5}/{config.epochs:<3}{row['lr']:>8g}{row['loss']:>9.4f}{shown}"
              f"{row['images_per_second']:>8}{minutes_left:>4.0f} min", flush=True)
        log = (folder / "log.jsonl").read_bytes() + (json.dumps(row) + "\n").encode()
        write_whole(folder / "log.jsonl", log)
        save(trainer, folder, epoch + 1, earlier + seconds, devices)
    scores = scores or evaluate(trainer.student, data, device, config.precision)
    return scores | {"seconds": earlier + time.perf_counter() - started, "devices": devices}

def run(config, data, args, device, role="student"):
    """The folder of a finished run; without a result yet, its teachers and it are trained."""
    folder = Path(args.runs_dir) / run_name(config)
    what = f"{role:<8} {config.network}, {config.method}, seed {config.seed}"
    with lock(folder, wait=role == "teacher"):
        if (folder / "result.json").exists():
            print(f"{what}: finished before, not trained again; {folder}", flush=True)
            return folder
        if not (folder / "config.json").exists():
            about = {"settings": asdict(config), "version": VERSION, "device": machine(device)}
            write_json(folder / "config.json", about | {"command": " ".join(sys.argv)})
        paths = args.teacher_checkpoint or [
            run(replace(config, hyper={}, teachers=[], **teacher), data, args, device, "teacher")
            for teacher in config.teachers]
        teachers = [load_run(path, device) for path in paths]
        results = [known | evaluate(teacher, data, device, config.precision)
                   for known, teacher in zip(config.teachers, teachers, strict=True)]
        print(f"{what}, {config.epochs} epochs, in {folder}", flush=True)
        result = {"settings": asdict(config), "version": VERSION, "teachers": results}
        result |= train(config, data, teachers, folder, device, args.eval_every)
        write_json(folder / "result.json", result)
        return folder

# ---- 4 run folders: config.json, log.jsonl, last.pt, result.json
def label(config):
    """The method, its networks and what deviates from the defaults."""
    method, values = METHODS[config.method], asdict(config) | config.hyper
    flags = ("batch_size", "lr", "weight_decay", "imb_type", "subset_seed")
    usual = {flag: FLAGS[flag][0] for flag in flags} | {"colour": False, "head": method.head}
    usual |= method.hyper | {"bkd_start": BKD_START.get(config.dataset, 0.0)}
    parts = [config.method, config.network]
    kinds = dict.fromkeys(f"{t['network']}-{t['method']}" for t in config.teachers)  # each once
    parts += ["from", "+".join(kinds)] if kinds else []
    parts += [f"x{len(config.teachers)}"] if len(config.teachers) > 1 else []
    parts += [f"given-{t['checkpoint']}" for t in config.teachers if "checkpoint" in t]
    parts += [f"{k}{values[k]}" for k in usual if k in values and values[k] != usual[k]]
    return "-".join(parts)

def run_name(config):
    """Readable, and ending in a digest of the whole Config: two runs never share a folder."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()[:8]
    name = f"{Path(config.dataset).stem[:40]}-imb{config.imb:g}-{label(config)}-e{config.epochs}"
    name += f"-s{config.seed}-{digest}"
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)

def save(trainer, folder, epoch, seconds, devices):
    """Write folder/last.pt: all that the next epoch depends on, as plain tensors and numbers."""
    content = {"settings": asdict(trainer.config), "network": trainer.network, "epoch": epoch}
    content |= {"student": trainer.student.state_dict(), "adapter": trainer.adapter.state_dict()}
    content |= {"momentum": trainer.momentum, "generator": trainer.generator.get_state()}
    buffer = io.BytesIO()  # so that it is write_whole that meets a full disk
    torch.save(content | {"seconds": seconds, "devices": devices}, buffer)
    write_whole(folder / "last.pt", buffer.getvalue())

def read(path, needed="settings"):
    """The content of a result.json or last.pt and "config", its Config. Runs no code from it."""
    path = Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text())
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        content |= {"config": Config(**content["settings"]), "file": path}
        content[needed], METHODS[content["config"].method]  # KeyError: not such a file
        return content
    except Exception as error:  # a missing or damaged file makes torch.load raise a dozen types
        raise InputError(f"{path}: missing, damaged or not of this version of kd_lt.py; name "
                         f"another or move its whole run folder away ({error!r:.150})") from None

def load_run(path: str | Path, device: str | torch.device = "cpu") -> ResNet:
    """The network of a run folder or its last.pt, finished or not, in eval mode, or InputError.

    model(data.normalise(images)) with images (B, 3, S, S) of 0..255 gives logits and features.
    """
    content = read(path, "student")
    with torch.random.fork_rng(devices=[]):
        model = ResNet(**content["network"])
    model.load_state_dict(content["student"])
    return model.eval().to(device, memory_format=torch.channels_last)

def resume(trainer, folder):
    """Load folder/last.pt if it is there; returns epochs done, seconds spent and devices used."""
    log, here = folder / "log.jsonl", machine(trainer.device)
    if not (folder / "last.pt").exists():
        write_whole(log, (json.dumps({"command": " ".join(sys.argv)}) + "\n").encode())
        return 0, 0.0, [here]
    content = read(folder / "last.pt")
    trainer.student.load_state_dict(content["student"])
    trainer.adapter.load_state_dict(content["adapter"])
    for buffer, saved in zip(trainer.momentum, content["momentum"], strict=True):
        buffer.copy_(saved)
    trainer.generator.set_state(content["generator"])
    done = content["epoch"]  # the log may be an epoch ahead: that line is cut, the epoch run again
    write_whole(log, b"".join(log.read_bytes().splitlines(keepends=True)[: 1 + done]))
    print(f"resumed  after epoch {done} of {trainer.config.epochs}, from {folder / 'last.pt'}")
    return done, content["seconds"], list(dict.fromkeys([*content["devices"], here]))

def given_teacher(path, config):
    """What a --teacher-checkpoint is, after a check that it fits the student's data and head."""
    content = read(path, "student")
    teacher, problem = content["config"], ""
    for key in ("head", "data", "subset_seed", "imb_type", "imb", "dataset"):
        if getattr(teacher, key) != getattr(config, key):
            problem = f"its {key} is {getattr(teacher, key)}, not {getattr(config, key)}"
    if content["epoch"] != teacher.epochs:
        problem = f"it stopped after epoch {content['epoch']} of {teacher.epochs}"
    if (teacher.network, teacher.seed) == (config.network, config.seed):
        problem = "a student of its seed would start as it started: choose another --seed"
    if problem:
        raise InputError(f"--teacher-checkpoint {path}: {problem}")
    identity = {key: getattr(teacher, key) for key in ("network", "method", "head", "colour")}
    return identity | {"checkpoint": hashlib.sha256(content["file"].read_bytes()).hexdigest()[:16]}

# ---- 5 reports
def spread(values):
    """Mean ± sample standard deviation of the values that are not None; "-" where all are."""
    known = [value for value in values if value is not None]
    deviation = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.2f}{deviation}" if known else "-"

def head_to_tail(results, parts):
    """The classes in parts, most training images first: images and mean accuracy of each part."""
    counts = results[0]["class_counts"]
    ranked = torch.tensor(counts).argsort(descending=True, stable=True)
    split = ranked.tensor_split(min(parts, len(counts)))
    means = [mean(r["per_class"][c] for r in results for c in part) for part in split]
    return [sum(counts[c] for c in part) for part in split], means

def print_rows(rows):
    """Markdown of the results of each name: a table of means, then bars from head to tail."""
    print("| method | teacher (its top-1) | n | top-1 | many | medium | few |\n" + "|---" * 7 + "|")
    for name, results in rows.items():
        teachers = [teacher for result in results for teacher in result.get("teachers", [])]
        methods = "+".join(dict.fromkeys(teacher["method"] for teacher in teachers))
        teacher = f"{methods} ({spread([t['top1'] for t in teachers])})" if teachers else "-"
        cells = [spread([result[key] for result in results]) for key in ("top1", *GROUPS)]
        print(f"| {' | '.join([name, teacher, str(len(results)), *cells])} |")
    images, width = head_to_tail(next(iter(rows.values())), 10)[0], max(16, *map(len, rows)) + 1
    print(f"\nFrom head to tail, the classes in {len(images)} parts:\n\n```")
    print(f"{'training images':<{width + len(images)}}" + "".join(f"{n:6}" for n in images))
    for name, results in rows.items():
        means = head_to_tail(results, 10)[1]
        bars = "".join(" " if m is None else "▁▂▃▄▅▆▇█"[min(7, int(m / 12.5))] for m in means)
        numbers = "".join(f"{'-' if m is None else round(m):>6}" for m in means)
        print(f"{name:<{width}}{bars}{numbers}")
    print("```\n", flush=True)

def finished_runs(folders):
    """{setting: {row: results}} of the runs below the folders; results of a row differ in seeds."""
    settings, order = {}, list(METHODS)
    for folder in map(Path, folders):
        paths = [*sorted(folder.glob("*/result.json")), *folder.glob("result.json")]
        if not paths:
            raise InputError(f"{folder}: no finished run there (no result.json)")
        for path in paths:
            result = read(path)
            c = result["config"]
            setting = (f"{c.dataset} ({c.data}), imb {c.imb:g}, {c.network}, {c.epochs} epochs, "
                       f"{c.precision}")
            place = order.index(c.method), label(c).replace(f"-{c.network}", "", 1)
            lines = map(json.loads, path.with_name("log.jsonl").read_text().splitlines()[1:])
            result["tests"] = {line["epoch"]: line["top1"] for line in lines if "top1" in line}
            settings.setdefault(setting, {}).setdefault(place, {})[run_name(c)] = result  # once
    return {setting: {place[1]: list(rows[place].values()) for place in sorted(rows)}
            for setting, rows in sorted(settings.items())}

def table(folders):
    """Print Markdown: for each setting a heading, a row a method, and bars from head to tail."""
    for setting, rows in finished_runs(folders).items():
        made = {f"kd-lt {result['version']} on {device}" for results in rows.values()
                for result in results for device in result["devices"]}
        print(f"**{setting}**; {'; '.join(sorted(made))}. Test accuracy in % after the last epoch, "
              "mean ± sample standard deviation over n seeds. krdistill is our reconstruction.\n")
        print_rows(rows)
        best = {row: [max(r["tests"].values()) for r in results] for row, results in rows.items()}
        print("Best tested epoch instead of the last (chosen on the test set, only to compare with "
              f"such numbers): {', '.join(f'{row} {spread(best[row])}' for row in best)}.\n")

def plot(file, folders):
    """Draw accuracy from head to tail, a line a method, as .png or .svg."""
    if Path(file).suffix not in (".png", ".svg"):
        raise InputError(f"--plot {file}: the name must end in .png or .svg")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    settings = finished_runs(folders)
    figure = Figure(figsize=(9, 5.5 * len(settings)), layout="constrained")
    axes = figure.subplots(len(settings), squeeze=False)
    for (axis,), (setting, rows) in zip(axes, settings.items(), strict=True):
        for i, (row, results) in enumerate(rows.items()):
            means = head_to_tail(results, 20)[1]
            axis.plot(means, marker="osv^Dx*P"[i % 8], label=f"{row}, n = {len(results)}")
        axis.set(title=setting, xlabel="parts of the classes, most training images first",
                 ylabel="test accuracy in %, mean over seeds", ylim=(0, None))
        axis.legend(fontsize=8, title="krdistill is our reconstruction")
    figure.savefig(file, dpi=150)
    print(f"plot     {file}")

# ---- 6 flags
COUNT, WEIGHT, SEED = (1, 1e9), (0, 1e9), (0, 2**32 - 1)
FLAGS = {  # name: default, type, (lowest, highest) or choices or None, help
    "method": ("bkd", str, METHODS, "see below"),
    "dataset": ("cifar100", str, None, "cifar10, cifar100, synthetic or FILE.npz (see README)"),
    "imb": (100.0, float, (1, 1e9), "thins to largest / smallest class = X; 1 keeps a .npz whole"),
    "imb_type": ("exp", str, ("exp", "step"), "how the classes shrink"),
    "subset_seed": (0, int, SEED, "which images are kept; 0: the published ones"),
    "student": ("resnet32", str, NETWORKS, "the network that is distilled, or trained alone"),
    "teacher": (None, str, NETWORKS, "the network that teaches; default resnet32"),
    "teacher_method": (None, str, ("ce", "bsce"), "how it is trained; default ce, for dive bsce"),
    "num_teachers": (None, int, COUNT, "of cbd; default 1; the second half see distorted colours"),
    "seed": (0, int, SEED, "of weights, batches, augmentation; teachers: seed + 1000, 2000, ..."),
    "epochs": (200, int, COUNT, "of teacher and student, as are batch size, lr and decay"),
    "batch_size": (128, int, COUNT, "images in a step"),
    "lr": (0.1, float, (1e-6, 1e9), "the highest learning rate"),
    "weight_decay": (2e-4, float, WEIGHT, "on all parameters"),
    "temperature": (None, float, (1e-3, 1e9), "softens the probabilities of KL_T"),
    "alpha": (None, float, WEIGHT, "weight of distillation; krdistill: of L_LRD"),
    "beta": (None, float, WEIGHT, "bkd: base of the effective numbers; cbd: weight of features"),
    "gamma": (None, float, WEIGHT, "krdistill (our reconstruction): weight of L_RRD"),
    "power": (None, float, WEIGHT, "dive: flattens the teacher's probabilities"),
    "bkd_start": (None, float, (0, 1), "bkd: share of epochs before it acts; on cifar10 0.8"),
    "device": ("auto", str, ("auto", "cpu", "cuda"), "an NVIDIA GPU, if there is one"),
    "precision": ("auto", str, ("auto", "fp32", "bf16"), "bf16, where the hardware has it"),
    "eval_every": (None, int, COUNT, "epochs between tests; default 1, on a CPU 5"),
    "data_dir": ("data", str, None, "where CIFAR is, or is downloaded to"),
    "runs_dir": ("runs", str, None, "where runs are kept"),
}
HIGHEST = {("bkd", "beta"): 0.9999999, ("cbd", "alpha"): 1, ("dive", "alpha"): 1}

def parse_flags(argv):
    lines = ["methods (krdistill is our reconstruction), and the defaults of their own flags:"]
    for name, method in METHODS.items():
        own = (f"--{key.replace('_', '-')} {value}" for key, value in method.hyper.items())
        lines.append(f"  {name:<10} {'  '.join(own)}")
    parser = argparse.ArgumentParser(
        prog="kd_lt.py", epilog="\n".join(lines), allow_abbrev=False, usage="%(prog)s [flags]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100),
        description="Train a teacher, distil a student on long-tailed data, report its accuracy.")
    add = parser.add_argument
    for name, (default, kind, allowed, text) in FLAGS.items():
        text += "" if default is None else f"; default {default}"
        values = {"choices": allowed} if kind is str and allowed else {"metavar": "X"}
        add(f"--{name.replace('_', '-')}", default=default, type=kind, help=text, **values)
    add("--teacher-checkpoint", nargs="+", metavar="PATH", help="run folders, instead of training")
    add("--smoke", action="store_true", help="a run of seconds: made-up images, resnet8, 8 epochs")
    add("--table", nargs="*", metavar="RUNS", help="print finished runs as Markdown; default runs")
    add("--plot", nargs="+", metavar=("FILE", "RUNS"), help="draw finished runs, .png or .svg")
    if "--smoke" in argv:  # other defaults; and a resnet8 teaches
        parser.set_defaults(dataset="synthetic", student="resnet8", epochs=8, batch_size=64,
                            runs_dir="runs/smoke")
    args = parser.parse_args(argv)
    check_flags(parser, args)
    return args

def check_flags(parser, args):
    """Refuse what is out of range, and what would do nothing: it would spoil an experiment."""
    method, given = METHODS[args.method], args.teacher_checkpoint or []
    ignored = {key for other in METHODS.values() for key in other.hyper} - method.hyper.keys()
    ignored |= {"num_teachers"} if given or args.method != "cbd" else set()
    ignored |= {"teacher", "teacher_method"} if given or not method.teacher else set()
    ignored |= {"imb_type", "subset_seed"} if args.imb == 1 else set()
    if args.plot or args.table is not None:
        ignored = FLAGS.keys() - {"runs_dir"}
    if given and not method.teacher or len(given) > 1 and args.method != "cbd":
        parser.error(f"--teacher-checkpoint: too many teachers for --method {args.method}")
    for name, (_, kind, allowed, _) in FLAGS.items():
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if name in ignored and value != parser.get_default(name):
            parser.error(f"{flag} does nothing beside the other flags (the method is {args.method})"
                         ": leave it out")
        if kind is not str and value is not None:
            low, high = allowed[0], HIGHEST.get((args.method, name), allowed[1])
            if not low <= value <= high:  # true for nan, too
                parser.error(f"{flag} must lie in {low} .. {high}, not {value}")

def make_config(args, data, precision):
    """The one Config of the flags, every default filled in."""
    method = METHODS[args.method]
    start = {"bkd_start": BKD_START.get(args.dataset, 0.0)} if args.method == "bkd" else {}
    hyper = method.hyper | start
    hyper |= {key: getattr(args, key) for key in hyper if getattr(args, key) is not None}
    same = {key: value for key, value in vars(args).items() if key in Config.__annotations__}
    config = Config(**same | {"dataset": Path(args.dataset).name, "data": data.digest,
                              "network": args.student, "head": method.head, "hyper": hyper,
                              "teachers": [], "precision": precision, "colour": False})
    if args.teacher_checkpoint:
        return replace(config, teachers=[given_teacher(p, config) for p in args.teacher_checkpoint])
    teacher = {"network": args.teacher or ("resnet8" if args.smoke else "resnet32"),
               "method": args.teacher_method or method.teacher, "head": method.head}
    total = (args.num_teachers or 1) if method.teacher else 0
    return replace(config, teachers=[  # with the student's seed, one would start as the student
        teacher | {"seed": args.seed + 1000 * (k + 1), "colour": k >= total - total // 2}
        for k in range(total)])

def choose_device(args):
    """The device and the precision of this run; what is asked for and is not there is an error."""
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if args.device != "cpu" and not cuda:
        reason = "torch sees no GPU"
        try:
            torch.cuda.init()
        except (AssertionError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
        if args.device == "cuda":
            raise InputError(f"--device cuda: {reason}")
        if any(Path(path).exists() for path in ("/proc/driver/nvidia", "/dev/nvidia0", "/dev/dxg")):
            print(f"warning  NVIDIA GPU not used, many times slower: {reason}", file=sys.stderr)
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if cuda:
        has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
        torch.backends.cudnn.benchmark = True
        if args.precision == "bf16" and not has_bf16:
            raise InputError(f"--precision bf16: {torch.cuda.get_device_name()} has none; use fp32")
    precision = {"auto": "bf16" if has_bf16 else "fp32"}.get(args.precision, args.precision)
    torch.backends.cudnn.allow_tf32 = precision == "bf16"  # fp32 means fp32
    return torch.device("cuda" if cuda else "cpu"), precision

def train_and_report(args):
    device, precision = choose_device(args)
    args.eval_every = args.eval_every or (1 if device.type == "cuda" else 5)
    data = load_dataset(args.dataset, args.data_dir, args.imb, args.imb_type, args.subset_seed)
    config, counts = make_config(args, data, precision), data.class_counts
    groups = [f"{sum(a <= n <= b for n in counts)} {key}" for key, (a, b) in GROUPS.items()]
    print(f"data     {data.name}: {sum(counts):,} training images, {max(counts)}..{min(counts)} a "
          f"class; {', '.join(groups)}; {len(data.test_targets):,} test images")
    print(f"device   {machine(device)}, {precision}\n{config}", flush=True)
    folder = run(config, data, args, device)
    result = read(folder / "result.json")
    print(f"result   {folder}, test accuracy in % after the last epoch\n")
    rows = {f"teacher {i + 1}": [teacher] for i, teacher in enumerate(result["teachers"])}
    print_rows(rows | {label(config): [result]})

def main(argv: list[str]) -> int:
    args = parse_flags(argv)
    try:
        if args.plot:
            plot(args.plot[0], args.plot[1:] or args.table or [args.runs_dir])
        if args.table is not None:
            table(args.table or [args.runs_dir])
        elif not args.plot:
            train_and_report(args)
        sys.stdout.flush()  # here, where a failure can still be told
        return 0
    except InputError as error:
        status, message = 2, str(error)
    except RuntimeError as error:  # of torch, cuBLAS, cuDNN; a failed capture has it as context
        known = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "allocate memory")
        if not any(text in f"{error} {error.__context__}" for text in known):
            raise
        status, message = 1, f"out of memory with --batch-size {args.batch_size}; try a smaller one"
    except OSError as error:
        status, message = 1, f"{error.filename or args.runs_dir}: {error.strerror or error}"
    except KeyboardInterrupt:
        status, message = 130, "interrupted; the same command continues after the last whole epoch"
    print(f"kd_lt.py: {message}", file=sys.stderr)
    return status

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without block characters still gets text
    sys.exit(main(sys.argv[1:]))
