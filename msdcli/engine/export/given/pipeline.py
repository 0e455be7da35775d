"""A diffusers pipeline of one-step students: every class belongs to one network, evaluated once.

from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
images = pipe(class_labels=[3, 7], generator=torch.Generator().manual_seed(0)).images
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class OneStepPipeline(DiffusionPipeline):
    """Students `student_0`, `student_1`, ...; `parts` says which classes are whose.

    All are evaluated at noise level `sigma_init` (x = y + sigma n), which their schedule calls `timestep`, and predict
    epsilon, v_prediction, sample or flow.
    """

    def __init__(
        self,
        student_0: Any,
        parts: dict[str, list[int]] | None = None,
        class_names: dict[str, str] | None = None,
        sigma_init: float = 1.0,
        timestep: float = 0.0,
        prediction: str = "epsilon",
        num_classes: int = 0,
    ) -> None:
        students = {name: value for name, value in locals().items() if name.startswith("student_")}
        super().__init__()
        self.register_modules(**students)
        self.register_to_config(
            parts=parts,
            class_names=class_names,
            sigma_init=sigma_init,
            timestep=timestep,
            prediction=prediction,
            num_classes=num_classes,
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str],
        generator: Any = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Return one image per class number or name; `latents` is unit noise, `output_type` pil, np or pt."""
        names = {name: int(number) for number, name in (self.config.class_names or {}).items()}
        labels = [names[c] if isinstance(c, str) else int(c) for c in class_labels]
        config, device = self.student_0.config, self.student_0.device
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        z = randn_tensor(shape, generator=generator, device=device) if latents is None else latents.to(device)
        images = torch.empty(shape, device=device)
        owner = {c: name for name, part in self.config.parts.items() for c in part}
        for name in dict.fromkeys(owner[c] for c in labels):
            at = [i for i, c in enumerate(labels) if owner[c] == name]
            images[at] = self.denoise(getattr(self, name), z[at], torch.tensor([labels[i] for i in at], device=device))
        result = self.finish(images, output_type)
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def denoise(self, student: Any, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Turn unit noise into images [n, channels, height, width] by one evaluation."""
        s, prediction = self.config.sigma_init, self.config.prediction
        root = (1 + s**2) ** 0.5
        x_t = z * (s / (1 + s) if prediction == "flow" else s / root)
        t = torch.full((len(z),), self.config.timestep, device=z.device)
        classes = labels if self.config.num_classes else None
        y = student(x_t.to(student.dtype), t, class_labels=classes, return_dict=False)[0][:, : z.shape[1]].float()
        if prediction == "flow":
            return x_t - s / (1 + s) * y
        if prediction == "epsilon":
            return s * z - s * y
        return (s * z - s * root * y) / root**2 if prediction == "v_prediction" else y

    def finish(self, images: torch.Tensor, output_type: str) -> Any:
        """Turn images in [-1, 1] into what was asked for; `pt` leaves them as they are."""
        if output_type == "pt":
            return images
        array = (images / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array
