"""A diffusers pipeline of students: every class belongs to one network, evaluated once at each of its noise levels.

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


class StudentsPipeline(DiffusionPipeline):
    """Students `student_0`, `student_1`, ...; `parts` says which classes are whose.

    All are evaluated at the noise levels `sigmas` (x = y + sigma n), which their schedule calls `timesteps`, and
    predict epsilon, v_prediction, sample or flow.
    """

    def __init__(
        self,
        student_0: Any,
        parts: dict[str, list[int]] | None = None,
        class_names: dict[str, str] | None = None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
        prediction: str = "epsilon",
        num_classes: int = 0,
    ) -> None:
        students = {name: value for name, value in locals().items() if name.startswith("student_")}
        super().__init__()
        self.register_modules(**students)
        self.register_to_config(
            parts=parts,
            class_names=class_names,
            sigmas=sigmas,
            timesteps=timesteps,
            prediction=prediction,
            num_classes=num_classes,
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str],
        generator: Any = None,
        latents: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Return one image per class number or name; `latents` is unit noise, `output_type` pil, np or pt.

        `noise` [n, steps - 1, channels, height, width] is unit noise too, what is added between several steps.
        """
        names = {name: int(number) for number, name in (self.config.class_names or {}).items()}
        labels = [names[c] if isinstance(c, str) else int(c) for c in class_labels]
        config, device = self.student_0.config, self.student_0.device
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        z = randn_tensor(shape, generator=generator, device=device) if latents is None else latents.to(device)
        more = (shape[0], len(self.config.sigmas) - 1, *shape[1:])
        noise = randn_tensor(more, generator=generator, device=device) if noise is None else noise.to(device)
        images = torch.empty(shape, device=device)
        owner = {c: name for name, part in self.config.parts.items() for c in part}
        for name in dict.fromkeys(owner[c] for c in labels):
            at = [i for i, c in enumerate(labels) if owner[c] == name]
            own = torch.tensor([labels[i] for i in at], device=device)
            images[at] = self.generate(getattr(self, name), z[at], own, noise[at])
        result = self.finish(images, output_type)
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def generate(self, student: Any, z: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Turn unit noise into images [n, channels, height, width], with one evaluation at each noise level."""
        sigmas, timesteps = self.config.sigmas, self.config.timesteps
        y = self.denoise(student, sigmas[0] * z, sigmas[0], timesteps[0], labels)
        for i, (s, t) in enumerate(zip(sigmas[1:], timesteps[1:])):  # noqa: B905
            y = self.denoise(student, y + s * noise[:, i], s, t, labels)
        return y

    def denoise(self, student: Any, x: torch.Tensor, s: float, timestep: float, labels: torch.Tensor) -> torch.Tensor:
        """D(x, s, labels) of x = y + s n, in the student's own scaling and prediction."""
        prediction = self.config.prediction
        root = (1 + s**2) ** 0.5
        x_t = x / (1 + s) if prediction == "flow" else x / root
        t = torch.full((len(x),), timestep, device=x.device)
        classes = labels if self.config.num_classes else None
        y = student(x_t.to(student.dtype), t, class_labels=classes, return_dict=False)[0][:, : x.shape[1]].float()
        if prediction == "flow":
            return x_t - s / (1 + s) * y
        if prediction == "epsilon":
            return x - s * y
        return (x - s * root * y) / root**2 if prediction == "v_prediction" else y

    def finish(self, images: torch.Tensor, output_type: str) -> Any:
        """Turn images in [-1, 1] into what was asked for; `pt` leaves them as they are."""
        if output_type == "pt":
            return images
        if images.shape[1] not in (1, 3):
            raise ValueError(
                f"{images.shape[1]} channels are latents and no pictures: output_type='pt', and decode them"
            )
        array = (images / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array
