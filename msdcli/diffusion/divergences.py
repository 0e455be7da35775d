"""f-divergences by their weights h(r) = r^2 f''(r), r = p_teacher / p_student, and by A(r) = h - r h'.

On `dm` the weight makes f-distill (Xu et al. 2025, arXiv 2502.15681, Table 1), on `sid` Uni-Instruct (Wang et al. 2025,
arXiv 2505.20755). A is the weight of the second term of a divergence's exact gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "hellinger": lambda r: r.sqrt() / 2,
    "jeffreys": lambda r: 1 + r,
    "softened_rkl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r,
}
SECOND: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": torch.ones_like,
    "kl": torch.zeros_like,
    "js": lambda r: (r / (1 + r)).square(),
    "hellinger": lambda r: r.sqrt() / 4,
    "jeffreys": torch.ones_like,
    "softened_rkl": lambda r: (1 + 2 * r) / (1 + r).square(),
    "neyman": lambda r: 2 / r,
}
