# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the kd-lt authors
"""ResNets for small square images, 16x16 to 128x128. They return Output(logits, features).

    name         layers   parameters, 10 classes   100 classes   features
    resnet8           8                   75,290        81,140         64
    resnet14         14                  172,506       178,356         64
    resnet20         20                  269,722       275,572         64
    resnet32         32                  464,154       470,004         64
    resnet44         44                  658,586       664,436         64
    resnet56         56                  853,018       858,868         64
    resnet110       110                1,727,962     1,733,812         64
    resnet8x4         8                1,210,410     1,233,540        256
    resnet32x4       32                7,410,730     7,433,860        256

The first seven follow He et al. 2015 (arXiv 1512.03385), section 4.2: 16-32-64 channels, "option A"
shortcuts. The wide pair of the distillation literature: stem 32, 64-128-256, 1x1 convolutions.
The file needs torch alone and can be copied alone.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# name: (layers: 6 n + 2, stem channels, channels of the stages, shortcut), or a class of your own,
# which takes ResNet's arguments but for the name
NETWORKS = {
    **{f"resnet{n}": (n, 16, (16, 32, 64), "pad") for n in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{n}x4": (n, 32, (64, 128, 256), "conv") for n in (8, 32)},
}


class Output(NamedTuple):
    logits: Tensor  # (B, C)
    features: Tensor  # (B, D), what the classifier sees


class BasicBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.extra = stride, channels - channels_in
        self.shortcut = None
        if shortcut == "conv" and (stride != 1 or self.extra):
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.stride != 1 or self.extra:
            # Option A: every second pixel, and zeros for the new channels on both sides.
            x = F.avg_pool2d(x, 1, self.stride)  # a slice's gradient would leave channels_last
            x = F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(out + x)


class CosineClassifier(nn.Module):
    """z_c = scale * <f/|f|, w_c/|w_c|>, (B, D) -> (B, C): fixed scale, no bias, as CBD has it.

    Its weight is Glorot-uniform, as in CBD's released code. Compute it in float32, outside
    autocast, as ResNet does: in fp16 features of zeros become nan.
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 20.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.xavier_uniform_(self.weight)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        # over D, never over C: rows of the weight are classes
        return self.scale * F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))


class ResNet(nn.Module):
    """A network of NETWORKS, Kaiming-normal from the global generator; head: linear or cosine.

    projection: the width to which linear + ReLU map the pooled vector before the head, as CBD's
    student needs it; 0: there is none. Projection and cosine head are Glorot-uniform, as released.
    """

    def __init__(self, name: str, num_classes: int, head: str = "linear", projection: int = 0):
        super().__init__()
        if name not in NETWORKS:
            raise ValueError(f"unknown network {name!r}: choose one of {', '.join(NETWORKS)}")
        layers, stem, channels, shortcut = NETWORKS[name]

        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        blocks, width = [], stem
        for stage, out in enumerate(channels):
            for block in range((layers - 2) // 6):
                stride = 2 if stage and block == 0 else 1
                blocks.append(BasicBlock(width, out, stride, shortcut))
                width = out
        self.blocks = nn.Sequential(*blocks)

        self.projection = nn.Linear(width, projection) if projection else None
        self.num_features = projection or width
        classifier = {"linear": nn.Linear, "cosine": CosineClassifier}[head]
        self.head = classifier(self.num_features, num_classes)

        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
        if self.projection is not None:
            nn.init.xavier_uniform_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)

    def forward(self, images: Tensor) -> Output:
        """images float (B, 3, S, S) -> (logits (B, C), features (B, D))."""
        out = self.blocks(F.relu(self.bn1(self.conv1(images))))

        with torch.autocast(images.device.type, enabled=False):  # the head stays in full precision
            features = out.to(self.head.weight.dtype).mean((2, 3))
            if self.projection is not None:  # CBD's student: s = ReLU(W f + b)
                features = F.relu(self.projection(features))
            return Output(self.head(features), features)


def make_network(name: str, **arguments) -> nn.Module:
    """The network of that name in NETWORKS; arguments: num_classes, head, projection."""
    if isinstance(NETWORKS[name], type):
        return NETWORKS[name](**arguments)
    return ResNet(name, **arguments)
