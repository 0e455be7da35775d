"""The router of a Triton model repository (python backend): every class goes to the model of its student.

Inputs: `labels` INT64 [n, 1]; optional `z` FP32 [n, ...] unit noise (and, for several steps, `noise` FP32
[n, steps - 1, ...], the unit noise between them), or optional `seed` INT64 [n, 1], whose image is the same
whatever else is in the batch. Output: `images` FP32. Students are other models of the repository.
"""

import json
import os

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Routes requests; with the parameter `max_resident` (and the server in explicit mode) it loads and unloads."""

    def initialize(self, args):
        folder = os.path.join(args["model_repository"], args["model_version"])
        with open(os.path.join(folder, "partition.json"), encoding="utf-8") as file:
            parts = json.load(file)["parts"]
        self.owner = {c: k for k, part in enumerate(parts) for c in part}
        config = json.loads(args["model_config"])
        self.students = config["parameters"]["students"]["string_value"]
        self.max_resident = int(config["parameters"]["max_resident"]["string_value"])
        self.steps = int(config["parameters"].get("steps", {"string_value": "1"})["string_value"])
        self.shape = [int(d) for d in config["output"][0]["dims"]]
        self.resident = []

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        try:
            labels = pb_utils.get_input_tensor_by_name(request, "labels").as_numpy().reshape(-1)
            images = self.generate(*self.noises(request, len(labels)), labels)
        except (KeyError, ValueError, RuntimeError) as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("images", images)])

    def noises(self, request, count):
        """The unit noise that images begin with, and that between several steps (None for one)."""
        given = [pb_utils.get_input_tensor_by_name(request, name) for name in ("z", "noise", "seed")]
        z, noise, seed = [None if tensor is None else tensor.as_numpy() for tensor in given]
        seeds = [None] * count if seed is None else seed.reshape(-1).tolist()
        if z is None:
            z = np.stack([np.random.default_rng(s).standard_normal(self.shape, np.float32) for s in seeds])
        if noise is None and self.steps > 1:
            size = (self.steps - 1, *self.shape)
            after = [None if s is None else [s, 1] for s in seeds]
            noise = np.stack([np.random.default_rng(s).standard_normal(size, np.float32) for s in after])
        return z, noise

    def generate(self, z, noise, labels):
        unknown = [c for c in labels.tolist() if c not in self.owner]
        if unknown:
            raise ValueError(f"class {unknown[0]} does not exist: there are 0 to {len(self.owner) - 1}")
        owners = np.asarray([self.owner[c] for c in labels.tolist()])
        images = np.empty((len(labels), *self.shape), np.float32)
        for k in dict.fromkeys(owners.tolist()):
            at = np.flatnonzero(owners == k)
            images[at] = self.ask(k, z[at], None if noise is None else noise[at], labels[at])
        return images

    def ask(self, k, z, noise, labels):
        name = f"{self.students}{k}"
        self.make_resident(name)
        inputs = [pb_utils.Tensor("z", z), pb_utils.Tensor("labels", labels.reshape(-1, 1))]
        if noise is not None:
            inputs.append(pb_utils.Tensor("noise", noise))
        request = pb_utils.InferenceRequest(model_name=name, requested_output_names=["images"], inputs=inputs)
        response = request.exec()
        if response.has_error():
            raise RuntimeError(response.error().message())
        return pb_utils.get_output_tensor_by_name(response, "images").as_numpy()

    def make_resident(self, name):
        if not self.max_resident:
            return
        if name in self.resident:
            self.resident.remove(name)
        else:
            while len(self.resident) >= self.max_resident:
                pb_utils.unload_model(self.resident.pop(0))
            pb_utils.load_model(name)
        self.resident.append(name)
