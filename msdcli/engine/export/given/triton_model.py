"""The router of a Triton model repository (python backend): every class goes to the model of its student.

Inputs: `labels` INT64 [n, 1]; optional `z` FP32 [n, ...] unit noise, or optional `seed` INT64 [n, 1], whose image is
the same whatever else is in the batch. Output: `images` FP32. Students are other models of the repository.
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
        self.shape = [int(d) for d in config["output"][0]["dims"]]
        self.resident = []

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        try:
            labels = pb_utils.get_input_tensor_by_name(request, "labels").as_numpy().reshape(-1)
            images = self.generate(self.noise(request, len(labels)), labels)
        except (KeyError, ValueError, RuntimeError) as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("images", images)])

    def noise(self, request, count):
        given = pb_utils.get_input_tensor_by_name(request, "z")
        if given is not None:
            return given.as_numpy()
        seed = pb_utils.get_input_tensor_by_name(request, "seed")
        if seed is None:
            return np.random.default_rng().standard_normal((count, *self.shape), np.float32)
        seeds = seed.as_numpy().reshape(-1)
        return np.stack([np.random.default_rng(s).standard_normal(self.shape, np.float32) for s in seeds.tolist()])

    def generate(self, z, labels):
        unknown = [c for c in labels.tolist() if c not in self.owner]
        if unknown:
            raise ValueError(f"class {unknown[0]} does not exist: there are 0 to {len(self.owner) - 1}")
        owners = np.asarray([self.owner[c] for c in labels.tolist()])
        images = np.empty((len(labels), *self.shape), np.float32)
        for k in dict.fromkeys(owners.tolist()):
            at = np.flatnonzero(owners == k)
            images[at] = self.ask(k, z[at], labels[at])
        return images

    def ask(self, k, z, labels):
        name = f"{self.students}{k}"
        self.make_resident(name)
        inputs = [pb_utils.Tensor("z", z), pb_utils.Tensor("labels", labels.reshape(-1, 1))]
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
