"""The feature networks of the FID protocols, and what each of them does to an image first.

| protocol            | made for                          | resizing                     | network         |
|---------------------|-----------------------------------|------------------------------|-----------------|
| `clean`             | clean-fid, arXiv 2104.11222        | antialiased bicubic in float | TorchScript     |
| `edm`               | NVlabs' fid.py of EDM and EDM2    | the network's own            | TorchScript     |
| `legacy-tensorflow` | Heusel et al. 2017, in clean-fid  | the network's own, as `edm`  | TorchScript     |
| `legacy-pytorch`    | pytorch-fid, in clean-fid         | bilinear, not antialiased    | state dict      |
| `clip`              | clean-fid's CLIP-FID              | 8-bit bicubic 224, cropped   | CLIP ViT-B/32   |
| `dinov2`            | EDM2, arXiv 2306.04675            | bicubic 224                  | DINOv2 ViT-L/14 |

A TorchScript file is code. It is loaded only when its sha256 is the published one, or when the user names the file
(`weights=`, `--weights`), which is taken as consent; the bytes that were hashed are the bytes that are loaded.

sFID (arXiv 2103.03841) is left out: it needs seven channels of an inner layer, and the published file's interface gives
the pooled features and the logits only.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from msdcli.errors import UserError
from msdcli.foreign import check_file
from msdcli.metrics.resize import resize_clean, resize_legacy_pytorch

INCEPTION_SIZE = 299
VIT_SIZE = 224
TORCHSCRIPT = "inception-2015-12-05.pt"
STATE_DICT = "pt_inception-2015-12-05-6726825d.pth"
# The state dict's name carries the first eight digits of its hash, which is all its authors publish.
PUBLISHED = {TORCHSCRIPT: "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4", STATE_DICT: "6726825d"}
ADDRESSES = {
    TORCHSCRIPT: "cleanfid.downloads_helper.inception_url",
    STATE_DICT: "cleanfid.inception_pytorch.FID_WEIGHTS_URL",
}
VIT_MODELS = {"clip": "openai/clip-vit-base-patch32", "dinov2": "facebook/dinov2-large"}
PROTOCOLS = ("clean", "edm", "legacy-pytorch", "legacy-tensorflow", "clip", "dinov2")

Network = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FeatureNetwork:
    """`features` maps uint8 [N, 3, H, W] on `device` to float32 [N, d]; `probabilities` maps these to [N, classes].

    A network of one's own (the data's classifier) is made by calling the class; `protocol` is then any name. With
    `floats` it is fed float32 of the data's own shape, in [-1, 1] where they are pictures.
    """

    protocol: str
    features: Network
    probabilities: Network | None = None
    sha256: str | None = None  # of the weights
    published: bool = False  # the weights are the ones everybody uses
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    floats: bool = False
    # Images per call on a CPU: activations of 64 images at 299 x 299 leave the cache, which can cost double.
    cpu_batch: int = 8
    config_sha256: str | None = None  # of what the weights are put into, where a file beside them says it

    def record(self) -> dict[str, Any]:
        """Return all that features of equal images depend on."""
        known = {"protocol": self.protocol, "weights_sha256": self.sha256, "weights_published": self.published}
        return known | ({} if self.config_sha256 is None else {"config_sha256": self.config_sha256})


def open_network(
    protocol: str, *, weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> FeatureNetwork:
    """Find, check and load the network of a protocol; raise UserError naming the place where a missing file belongs."""
    device = torch.device(device)
    if protocol in VIT_MODELS:
        return _vit(protocol, weights, device)
    if protocol not in PROTOCOLS:
        raise UserError(f"Unknown protocol {protocol!r}.", hint=f"Choose one of {', '.join(PROTOCOLS)}.")
    name = STATE_DICT if protocol == "legacy-pytorch" else TORCHSCRIPT
    content, sha256 = _read_weights(name, weights)
    published = sha256.startswith(PUBLISHED[name])
    load = _state_dict_inception if name == STATE_DICT else _torchscript_inception
    features, head = load(protocol, content, device)
    return FeatureNetwork(protocol, features, head, sha256, published, device)


def _places(name: str) -> list[Path]:
    """Where weights may lie: torch's own cache, and the place to which clean-fid downloads its TorchScript file."""
    places = [Path(torch.hub.get_dir()) / "checkpoints" / name]
    if name == TORCHSCRIPT:
        places.append(Path("." if platform.system() == "Windows" else "/tmp") / name)
    return places


def _read_weights(name: str, path: str | Path | None) -> tuple[bytes, str]:
    found = Path(path) if path else next((place for place in _places(name) if place.is_file()), None)
    if found is None:
        raise UserError(
            f"The weights {name} are not on this machine; put them at {_places(name)[0]}{_address(name)}.",
            hint="Or name the file with --weights.",
        )
    if found.exists():
        check_file(found)
    try:
        content = found.read_bytes()
    except OSError as error:
        raise UserError(f"The weights {found} cannot be read: {error.strerror}.") from error
    sha256 = hashlib.sha256(content).hexdigest()
    if path is None and not sha256.startswith(PUBLISHED[name]):
        raise UserError(
            f"{found} is not the published file (its sha256 begins with {sha256[:8]}, not {PUBLISHED[name][:8]}).",
            hint="Remove it and fetch it again, or, if you trust it, name it with --weights.",
        )
    return content, sha256


def _address(name: str) -> str:
    """The address that the installed clean-fid downloads from; it is clean-fid's to know, and may change with it."""
    module, attribute = ADDRESSES[name].rsplit(".", 1)
    try:
        return f" (from {getattr(importlib.import_module(module), attribute)})"
    except (ImportError, AttributeError):
        return f" (their address is {ADDRESSES[name]} of the clean-fid package)"


def _torchscript_inception(protocol: str, content: bytes, device: torch.device) -> tuple[Network, Network | None]:
    """Load NVlabs' file: `layers` (normalised 299 x 299 to features), `output`, and a forward that resizes."""
    base: Any
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):  # torch deprecates TorchScript, which the published file is
            warnings.simplefilter("ignore", kind)
        try:
            base = torch.jit.load(io.BytesIO(content), map_location=device).eval()
            # Frozen weights let torch fold batch norms; channels last makes it 1.5 times faster on a CPU, and 3e-7 off.
            base = base.to(memory_format=torch.channels_last)
            whole, layers = torch.jit.freeze(base), torch.jit.freeze(base.layers)
        except (RuntimeError, AttributeError) as error:
            raise UserError(f"The weights are not a TorchScript Inception: {_first_line(error)}") from error

    def clean(images: torch.Tensor) -> torch.Tensor:
        x = (resize_clean(images, INCEPTION_SIZE) - 128) / 128
        return layers(x.contiguous(memory_format=torch.channels_last)).flatten(1)

    def resized_inside(images: torch.Tensor) -> torch.Tensor:
        return whole(images, return_features=True).flatten(1)

    head = _softmax_without_bias(base.output.weight) if hasattr(base, "output") else None
    return clean if protocol == "clean" else resized_inside, head


def _state_dict_inception(protocol: str, content: bytes, device: torch.device) -> tuple[Network, Network]:
    net: Any = ported_inception()
    try:
        net.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises whatever its unpickler met
        raise UserError(f"The weights are not pytorch-fid's Inception: {_first_line(error)}") from error
    head = _softmax_without_bias(net.fc.weight.detach().to(device))
    net.fc = nn.Identity()
    net = net.to(memory_format=torch.channels_last).to(device).eval()

    def features(images: torch.Tensor) -> torch.Tensor:
        x = resize_legacy_pytorch(images, INCEPTION_SIZE) / 255 * 2 - 1
        return net(x.contiguous(memory_format=torch.channels_last))

    return features, head


def ported_inception() -> nn.Module:
    """torchvision's Inception with the 2015 graph's pooling: averages without the padding, a maximum in the last block.

    The graph differs only in the pooling branch, whose channels come last in every block, so a hook puts them right.
    """
    from torchvision.models import inception_v3

    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)

    def average(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def maximum(x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, 3, stride=1, padding=1)

    for name, block in net.named_children():
        if hasattr(block, "branch_pool"):
            block.register_forward_hook(_repool(maximum if name == "Mixed_7c" else average))
    return net.eval()


def _repool(pool: Network) -> Callable[..., torch.Tensor]:
    def hook(block: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        pooled = block.branch_pool(pool(inputs[0]))
        return torch.cat([output[:, : -pooled.shape[1]], pooled], dim=1)

    return hook


def _softmax_without_bias(weight: torch.Tensor) -> Network:
    """The inception score's classifier: Salimans et al. leave the bias of the last layer out."""

    def probabilities(features: torch.Tensor) -> torch.Tensor:
        return (features @ weight.T).softmax(dim=1)

    return probabilities


def _vit(protocol: str, weights: str | Path | None, device: torch.device) -> FeatureNetwork:
    """CLIP or DINOv2 from transformers' cache or a folder in its format (safetensors and JSON: no code)."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"The protocol {protocol} needs transformers.", hint="Install the extra msdcli[diffusers]."
        ) from error
    name = str(weights or VIT_MODELS[protocol])
    kind = transformers.CLIPVisionModelWithProjection if protocol == "clip" else transformers.Dinov2Model
    try:
        model = kind.from_pretrained(name, local_files_only=True, use_safetensors=True).to(device).eval()
    except (OSError, ValueError) as error:
        raise UserError(
            f"The model {name} is not in transformers' cache: {_first_line(error)}",
            hint="Name a folder that holds it with --weights.",
        ) from error
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    features = _clip_features(model) if protocol == "clip" else _dinov2_features(model)
    config = _config_hash(model.config.to_dict())
    return FeatureNetwork(protocol, features, None, digest.hexdigest(), weights is None, device, config_sha256=config)


def _config_hash(config: dict[str, Any]) -> str:
    """Name a model's configuration, in which equal weights can be another network; where it lies is no part of it."""
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def _clip_features(model: Any) -> Network:
    def features(images: torch.Tensor) -> torch.Tensor:
        scale = VIT_SIZE / min(images.shape[2:])
        size = (max(VIT_SIZE, int(images.shape[2] * scale)), max(VIT_SIZE, int(images.shape[3] * scale)))
        top, left = (round((side - VIT_SIZE) / 2) for side in size)
        x = resize_clean(images, size).round()[:, :, top : top + VIT_SIZE, left : left + VIT_SIZE]
        x = _normalise(x, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
        return model(pixel_values=x).image_embeds

    return features


def _dinov2_features(model: Any) -> Network:
    def features(images: torch.Tensor) -> torch.Tensor:
        x = _normalise(resize_clean(images, VIT_SIZE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        return model(pixel_values=x).pooler_output

    return features


def _normalise(x: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    return (x / 255 - _of_channels(mean, x.device)) / _of_channels(std, x.device)


@lru_cache(maxsize=16)
def _of_channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """One number per channel, float32 [channels, 1, 1], on a device to which they are copied once."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
