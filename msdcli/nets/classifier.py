"""A small convolutional classifier, whose last layer but one gives the features that samples are judged by."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Classifier(nn.Module):
    """Images [batch, channels, height, width] to logits; `features` gives [batch, 64]."""

    num_features = 64

    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(shape[0], 32, 3, padding=1)
        self.conv1 = nn.Conv2d(32, 64, 3, padding=1, stride=2)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1, stride=2)
        self.norms = nn.ModuleList(nn.GroupNorm(8, c) for c in (32, 64, 64))
        self.neck = nn.LazyLinear(self.num_features)
        self.head = nn.Linear(self.num_features, num_classes)
        self.eval()
        with torch.no_grad():
            self(torch.zeros(1, *shape))  # settles the lazy layer

    def features(self, x: Tensor) -> Tensor:
        for conv, norm in zip((self.conv0, self.conv1, self.conv2), self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        return F.silu(self.neck(F.dropout(x.flatten(1), 0.2, self.training)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
