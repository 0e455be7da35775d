import hashlib
import io
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from msdcli.errors import UserError
from msdcli.metrics import inception
from msdcli.metrics.inception import STATE_DICT, TORCHSCRIPT, open_network, ported_inception


class Layers(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, ::100, ::100].reshape(x.shape[0], -1)[:, :5]


class StandIn(nn.Module):
    """The call interface of NVlabs' file, with a classifier."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()
        self.output = nn.Linear(5, 4)

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return self.layers(img.float()[:, :, :1, :1].expand(-1, -1, 299, 299))


@pytest.fixture
def stand_in(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "stand-in.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(StandIn()).save(str(path))
    return path


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "_places", lambda name: [tmp_path / "cache" / name])
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def images(count=2, size=32):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8))


@pytest.mark.parametrize("protocol", ["clean", "edm", "legacy-tensorflow", "legacy-pytorch"])
def test_absent_weights_name_their_place(places, protocol):
    with pytest.raises(UserError) as caught:
        open_network(protocol)
    assert str(places / (STATE_DICT if protocol == "legacy-pytorch" else TORCHSCRIPT)) in str(caught.value)
    assert "--weights" in caught.value.hint


def test_another_file_in_the_known_place_is_not_loaded(places, stand_in, monkeypatch):
    (places / TORCHSCRIPT).write_bytes(stand_in.read_bytes())
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("code was loaded"))
    with pytest.raises(UserError, match="not the published file"):
        open_network("clean")


def test_the_published_file_is_found_where_it_belongs(places, stand_in, monkeypatch):
    digest = hashlib.sha256(stand_in.read_bytes()).hexdigest()
    monkeypatch.setitem(inception.PUBLISHED, TORCHSCRIPT, digest)
    (places / TORCHSCRIPT).write_bytes(stand_in.read_bytes())
    assert open_network("clean").record() == {
        "protocol": "clean",
        "weights_sha256": digest,
        "weights_published": True,
    }


def test_cleanfids_own_place_is_looked_at():
    assert [place.name for place in inception._places(TORCHSCRIPT)] == [TORCHSCRIPT] * 2
    assert inception._places(STATE_DICT)[0].parent.name == "checkpoints"


def test_named_weights_are_consent_but_not_published(stand_in):
    network = open_network("clean", weights=stand_in)
    assert not network.published
    assert network.sha256 == hashlib.sha256(stand_in.read_bytes()).hexdigest()


def test_the_classifier_leaves_its_bias_out(stand_in):
    network = open_network("clean", weights=stand_in)
    features = network.features(images())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = torch.jit.load(str(stand_in)).output.weight
    wanted = torch.softmax(features @ weight.T, dim=1)
    assert torch.allclose(network.probabilities(features), wanted)


@pytest.mark.parametrize("protocol", ["clean", "legacy-pytorch"])
def test_other_files_are_refused(tmp_path, protocol):
    (tmp_path / "weights").write_bytes(b"not weights")
    with pytest.raises(UserError, match="The weights are not"):
        open_network(protocol, weights=tmp_path / "weights")
    with pytest.raises(UserError, match="cannot be read|does not exist"):
        open_network(protocol, weights=tmp_path / "absent")


def test_unknown_protocols_are_refused():
    with pytest.raises(UserError) as caught:
        open_network("cleaner")
    assert "legacy-pytorch" in caught.value.hint


@pytest.mark.parametrize("protocol", ["clip", "dinov2"])
def test_vision_transformers_need_transformers(monkeypatch, protocol):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="needs transformers"):
        open_network(protocol)


def test_legacy_pytorch_is_cleanfids_network(tmp_path, monkeypatch):
    """clean-fid's own classes with the same random weights, from image to feature."""
    theirs = pytest.importorskip("cleanfid.inception_pytorch")
    resizer = pytest.importorskip("cleanfid.resize").build_resizer("legacy_pytorch")
    torch.manual_seed(0)
    state = {
        name: torch.randn(value.shape) * (2 / value[0].numel()) ** 0.5 if value.ndim > 1 else value
        for name, value in ported_inception().state_dict().items()
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    (tmp_path / STATE_DICT).write_bytes(buffer.getvalue())
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: state)
    batch = images(3, 40)
    resized = np.stack([resizer(image.numpy().transpose(1, 2, 0)).transpose(2, 0, 1) for image in batch])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torchvision on clean-fid's old arguments
        wanted = theirs.InceptionV3(resize_input=False).eval()(torch.from_numpy(resized) / 255)[0].flatten(1)
        found = open_network("legacy-pytorch", weights=tmp_path / STATE_DICT).features(batch)
    assert wanted.std() > 0
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
