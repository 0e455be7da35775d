"""Importing EDM and EDM2 checkpoints: parity with the original, strict weights, arguments refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from msdcli.errors import UserError
from msdcli.nets.edm.importing import build_edm, check_against, import_edm, load_weights
from tests.conftest import SHARED
from tests.nets.edm.edm_format import Call, Persistent, _reconstruct_persistent_obj, dumps, shake, snapshot, write
from tests.nets.edm.hostile_pickles import storage_bytes

FIXTURES = SHARED / "fixtures" / "teachers"
TEACHERS = sorted(path.stem for path in FIXTURES.glob("*.pkl"))
TINY = {"img_resolution": 8, "img_channels": 2, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}


def tiny(preconditioning: str = "EDM", **arguments) -> dict:
    return {
        "kind": "edm",
        "preconditioning": preconditioning,
        "arguments": TINY | {"attn_resolutions": [4]} | arguments,
    }


VARIANTS = {
    "DDPM++": tiny("VP", label_dim=3),
    "NCSN++": tiny(
        "VE", embedding_type="fourier", encoder_type="residual", resample_filter=[1, 3, 3, 1], augment_dim=9
    ),
    "input and output skips": tiny("VP", encoder_type="skip", decoder_type="skip", resample_filter=[1, 3, 3, 1]),
    "ADM": tiny("EDM", label_dim=3, channel_mult=[8, 16], sigma_data=0.6),
    "iDDPM": tiny("iDDPM", label_dim=2, M=50),
    "EDM2": tiny("EDM2", label_dim=3, channels_per_head=8, logvar_channels=16),
    "EDM2, other arguments": tiny("EDM2", label_dim=0, clip_act=None, resample_filter=[1, 3, 3, 1], channel_mult_emb=3),
}


@pytest.fixture(params=VARIANTS)
def variant(request) -> dict:
    return copy.deepcopy(VARIANTS[request.param])


def inputs(denoiser, n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    sigma = denoiser.round_sigma(torch.tensor([0.05, 1.0, 30.0])[:n])
    x = torch.randn(n, *denoiser.shape, generator=generator) * (1 + sigma.reshape(-1, 1, 1, 1))
    return x, sigma, torch.arange(n) % denoiser.num_classes if denoiser.num_classes else None


@pytest.mark.skipif(not TEACHERS, reason="the fixtures made by the original programs are not beside this checkout")
@pytest.mark.parametrize("name", TEACHERS or ["none"])
def test_agrees_with_the_original(name):
    denoiser, description = import_edm(FIXTURES / f"{name}.pkl")
    assert check_against(denoiser, FIXTURES / f"{name}.npz") <= 1e-5
    assert description["source"]["file"] == f"{name}.pkl"
    if denoiser.num_classes:  # class numbers are the same as one-hot rows
        with np.load(FIXTURES / f"{name}.npz") as held:
            x, sigma, labels, theirs = (
                torch.from_numpy(held[key]) for key in ("x", "sigma", "class_labels", "denoised")
            )
        with torch.no_grad():
            torch.testing.assert_close(denoiser(x, sigma, labels.argmax(1)), theirs, rtol=0, atol=1e-5)


def test_round_trip_through_the_published_format_and_through_safetensors(tmp_path, variant):
    original = shake(build_edm(variant)).eval()
    denoiser, description = import_edm(write(tmp_path / "a.pkl", snapshot(original, variant)))
    assert not denoiser.training
    assert all(
        torch.equal(a, b) for a, b in zip(original.state_dict().values(), denoiser.state_dict().values(), strict=True)
    )
    with torch.no_grad():
        assert torch.equal(denoiser(*inputs(denoiser)), original(*inputs(original)))

    stored = json.loads(json.dumps(description, allow_nan=False))
    save_file(denoiser.state_dict(), tmp_path / "model.safetensors")
    again = build_edm(stored, device="meta")
    assert all(parameter.is_meta for parameter in again.parameters())
    again = load_weights(again, load_file(tmp_path / "model.safetensors"), "model.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(denoiser(*inputs(denoiser)), again(*inputs(again)))


def test_positional_arguments_and_unbounded_sigma_are_understood(tmp_path):
    variant = tiny("EDM", label_dim=3)
    state = snapshot(build_edm(variant), variant)["ema"].meta["state"]
    named = state["_init_kwargs"]
    state["_init_args"] = tuple(named.pop(name) for name in ("img_resolution", "img_channels", "label_dim"))
    named |= {"sigma_max": math.inf, "dropout": np.float64(0.1)}
    _, description = import_edm(write(tmp_path / "a.pkl", {"ema": Persistent("EDMPrecond", state)}))
    assert description["arguments"] == variant["arguments"] | {"dropout": 0.1}


def test_half_precision_edm2_gains_are_rounded_as_the_original_rounds_them(tmp_path):
    original = shake(build_edm(VARIANTS["EDM2"])).half()
    denoiser, _ = import_edm(write(tmp_path / "a.pkl", snapshot(original, VARIANTS["EDM2"])))
    block = denoiser.net.enc["8x8_block0"]
    effective = block.emb_gain / math.sqrt(block.emb_linear.weight.shape[1])
    theirs = original.net.enc["8x8_block0"].emb_gain / math.sqrt(block.emb_linear.weight.shape[1])
    assert effective.dtype == torch.float32
    assert theirs.dtype == torch.float16
    torch.testing.assert_close(effective, theirs.float(), rtol=1e-7, atol=0)


# Weights are mapped strictly.


def corrupted(tmp_path: Path, change) -> Path:
    variant = tiny("VP")
    content = snapshot(build_edm(variant), variant)
    change(content["ema"].meta["state"]["_modules"]["model"].meta["state"])
    return write(tmp_path / "a.pkl", content)


def layer(state: dict, name: str) -> dict:
    return state["_modules"][name].meta["state"]["_parameters"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda s: layer(s, "map_layer0").pop("bias"), "missing net.map_layer0.bias"),
        (lambda s: layer(s, "map_layer0").update(extra=torch.ones(1)), "unknown net.map_layer0.extra"),
        (
            lambda s: layer(s, "map_layer0").update(bias=torch.ones(7)),
            r"net.map_layer0.bias is \[7\], the network's is \[32\]",
        ),
        (lambda s: layer(s, "map_layer0").update(bias=torch.ones(32).long()), "whole numbers"),
        (lambda s: layer(s, "map_layer0").update(bias=1.0), "map_layer0.bias in _parameters is no TensorRecord"),
        (lambda s: s["_modules"].update(map_layer0=None), "missing net.map_layer0.weight"),
        (lambda s: s["_modules"].update(map_layer0=[]), "map_layer0 in _modules is no Record"),
        (lambda s: s.update(_modules=[]), "_modules of TappedUNet|_modules of SongUNet"),
        (lambda s: s.update(_modules={}), "and [0-9]+ more"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, word):
    with pytest.raises(UserError, match=word):
        import_edm(corrupted(tmp_path, change))


def test_loading_leaves_a_denoiser_alone_when_the_weights_do_not_fit():
    denoiser = build_edm(tiny())
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    wrong = {name: tensor + 1 for name, tensor in before.items()}
    wrong.pop("net.out_conv.bias")
    with pytest.raises(UserError, match=r"missing net\.out_conv\.bias"):
        load_weights(denoiser, wrong, "model.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in denoiser.state_dict().items())


def test_modules_in_a_ring_are_refused(tmp_path):
    state = {"_init_args": (), "_init_kwargs": tiny("VP")["arguments"]}
    ring = Persistent("VPPrecond", state)
    state["_modules"] = {"model": Persistent("x", {"_modules": (inner := {})})}
    inner["again"] = Call(
        _reconstruct_persistent_obj, {"type": "class", "class_name": "x", "state": {"_modules": inner}}
    )
    path = write(tmp_path / "a.pkl", {"ema": ring})
    with pytest.raises(UserError, match="levels"):
        import_edm(path)


def test_modules_that_double_at_every_level_are_refused(tmp_path):
    level: dict = {}
    for _ in range(30):
        child = Persistent("x", {"_modules": level})
        level = {"a": child, "b": child}
    state = {"_init_args": (), "_init_kwargs": tiny("VP")["arguments"], "_modules": level}
    with pytest.raises(UserError, match="modules"):
        import_edm(write(tmp_path / "a.pkl", {"ema": Persistent("VPPrecond", state)}))


def test_tensors_that_share_their_bytes_are_refused(tmp_path):
    """One small storage under every weight would make a small file ask for a large network."""
    variant = tiny("VP", model_channels=64)
    denoiser = build_edm(variant, device="meta")
    largest = max(tensor.numel() for tensor in denoiser.state_dict().values())
    storage = Call(torch.storage._load_from_bytes, storage_bytes(largest, largest))

    def shared(tensor: torch.Tensor) -> Call:
        return Call(torch._utils._rebuild_tensor_v2, storage, 0, tuple(tensor.shape), tensor.stride(), False, {})

    content = snapshot(denoiser, variant)

    def replace(state: dict) -> None:
        for group in ("_parameters", "_buffers"):
            state[group] = {name: t if t is None else shared(t) for name, t in state[group].items()}
        for child in state["_modules"].values():
            if isinstance(child, torch.nn.ModuleDict):
                for inner in child._modules.values():
                    replace(inner.meta["state"])
            elif child is not None:
                replace(child.meta["state"])

    replace(content["ema"].meta["state"])
    with pytest.raises(UserError, match="claim"):
        import_edm(write(tmp_path / "a.pkl", content))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ([], "no dictionary"),
        ({"net": 1}, "it holds: net"),
        ({"ema": {}}, "no network under 'ema'"),
        ({"ema": Persistent("Generator", {"_init_args": (), "_init_kwargs": {}})}, "Generator, not one of EDMPrecond"),
        ({"ema": Persistent("EDMPrecond", {})}, "does not say how"),
        ({"ema": Persistent("EDMPrecond", {"_init_args": (1,) * 4, "_init_kwargs": {}})}, "does not say how"),
        ({"ema": Persistent("EDMPrecond", {"_init_args": (), "_init_kwargs": {}})}, "img_resolution"),
    ],
)
def test_pickles_that_hold_something_else(tmp_path, content, word):
    path = tmp_path / "a.pkl"
    path.write_bytes(dumps(content))
    with pytest.raises(UserError, match=word):
        import_edm(path)


# Arguments.


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"img_resolution": 10**9}, "img_resolution is 1000000000, it must be a whole number from 1 to 4096"),
        ({"img_resolution": True}, "whole number"),
        ({"img_resolution": 9}, "cannot be halved"),
        ({"img_channels": "3"}, "img_channels"),
        ({"model_channels": 5}, "no network fits"),
        ({"model_channels": 10**12}, "model_channels"),
        ({"model_channels": 4096, "channel_mult": [64] * 2}, "parameters is refused"),
        ({"channel_mult": []}, "channel_mult"),
        ({"channel_mult": [1] * 100}, "channel_mult"),
        ({"channel_mult": [[1]]}, "channel_mult"),
        ({"channel_mult": 2}, "channel_mult is 2"),
        ({"num_blocks": 10**6}, "num_blocks"),
        ({"num_blocks": 1.5}, "num_blocks"),
        ({"dropout": math.nan}, "dropout"),
        ({"sigma_data": 0}, "sigma_data"),
        ({"label_dim": -1}, "label_dim"),
        ({"model_type": "os.system"}, "model_type"),
        ({"model_type": ["SongUNet"]}, "model_type"),
        ({"model_chanels": 8}, "no argument 'model_chanels'"),
        ({"embedding_type": "fourier"}, "no argument 'embedding_type'"),
        ({"net": 1}, "no argument 'net'"),
        ({"shape": [1]}, "no argument 'shape'"),
    ],
)
def test_arguments_that_cannot_be_are_refused(changes, word):
    with pytest.raises(UserError, match=word):
        build_edm(tiny("EDM", **changes))


@pytest.mark.parametrize(
    ("preconditioning", "changes", "word"),
    [
        ("VP", {"embedding_type": "learned"}, "positional, fourier"),
        ("VP", {"resample_filter": [1, 2, 1]}, "even"),
        ("VP", {"resample_filter": [0, 0]}, "resample_filter"),
        ("EDM2", {"model_type": "SongUNet"}, "model_type"),
        ("EDM2", {"channels_per_head": 3}, "no network fits"),
        ("iDDPM", {"M": 10**9}, "M is"),
    ],
)
def test_arguments_that_cannot_be_are_refused_elsewhere(preconditioning, changes, word):
    with pytest.raises(UserError, match=word):
        build_edm(tiny(preconditioning, **changes))


def test_the_nearest_argument_is_suggested():
    with pytest.raises(UserError) as refusal:
        build_edm(tiny("EDM", model_chanels=8))
    assert refusal.value.hint == "did you mean model_channels?"


@pytest.mark.parametrize(
    "change", [{"kind": "sd"}, {"preconditioning": "EDM3"}, {"preconditioning": []}, {"arguments": None}]
)
def test_descriptions_of_something_else_are_refused(change):
    with pytest.raises(UserError, match="describes no EDM network"):
        build_edm(tiny() | change)


# The comparison.


@pytest.fixture
def reference(tmp_path) -> tuple:
    denoiser = shake(build_edm(tiny("EDM", label_dim=3))).eval()
    x, sigma, condition = inputs(denoiser)
    with torch.no_grad():
        denoised = denoiser(x, sigma, condition)
    return denoiser, {"x": x, "sigma": sigma, "class_labels": torch.eye(3)[condition], "denoised": denoised}


def test_difference_is_relative_to_each_image(tmp_path, reference):
    denoiser, arrays = reference
    denoiser.train()
    np.savez(tmp_path / "a.npz", **arrays)
    assert check_against(denoiser, tmp_path / "a.npz") == 0
    assert denoiser.training
    arrays["denoised"] = arrays["denoised"].clone()
    arrays["denoised"][1] *= 1.25  # ours is then a fifth of theirs away, whatever the other images are
    np.savez(tmp_path / "a.npz", **arrays)
    assert check_against(denoiser, tmp_path / "a.npz", batch_size=2) == pytest.approx(0.2, rel=1e-5)


def test_not_a_number_is_not_agreement(tmp_path, reference):
    denoiser, arrays = reference
    np.savez(tmp_path / "a.npz", **arrays)
    with torch.no_grad():
        denoiser.net.out_conv.weight.fill_(math.nan)
    assert check_against(denoiser, tmp_path / "a.npz") == math.inf


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"x": None}, "no reference"),
        ({"sigma": torch.ones(2)}, r"sigma is \[2\]"),
        ({"x": np.array([{}])}, "no reference"),
    ],
)
def test_references_that_do_not_fit(tmp_path, reference, change, word):
    denoiser, arrays = reference
    np.savez(tmp_path / "a.npz", **{name: a for name, a in (arrays | change).items() if a is not None})
    with pytest.raises(UserError, match=word):
        check_against(denoiser, tmp_path / "a.npz")


def test_references_that_are_none(tmp_path, reference):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 not really")
    for name in ("a.npz", "missing.npz"):
        with pytest.raises(UserError, match="no reference|does not exist"):
            check_against(reference[0], tmp_path / name)


@pytest.mark.slow
def test_the_imagenet_64_network_from_a_full_size_pickle(tmp_path):
    """ADM for ImageNet-64, 296 million parameters: 1.2 GB on disk, about 3 GB of memory."""
    arguments = {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_type": "DhariwalUNet"}
    arguments |= {"model_channels": 192, "channel_mult": [1, 2, 3, 4]}
    description = {"kind": "edm", "preconditioning": "EDM", "arguments": arguments}
    original = shake(build_edm(description), 0.01).eval()
    x, sigma, condition = torch.randn(1, 3, 64, 64) * 2.5, torch.tensor([2.5]), torch.tensor([207])
    with torch.no_grad():
        theirs = original(x, sigma, condition)
    path = write(tmp_path / "imagenet64.pkl", snapshot(original, description))
    del original
    assert path.stat().st_size > 1_180_000_000

    denoiser, imported = import_edm(path)
    path.unlink()
    assert imported["arguments"] == arguments
    assert round(sum(parameter.numel() for parameter in denoiser.parameters()) / 1e6) == 296
    with torch.no_grad():
        ours = denoiser(x, sigma, condition)
    assert ours.isfinite().all()
    assert (ours - x * 0.25 / (0.25 + 6.25)).abs().max() > 1e-3  # more than the skip connection
    torch.testing.assert_close(ours, theirs)
