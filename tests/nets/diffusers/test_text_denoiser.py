"""Text-conditioned denoisers agree with the libraries' own pipelines: embeddings, one call, features."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from msdcli.diffusion.guidance import NO_CLASS, Guided
from msdcli.engine.checkpoints.model import load_model
from msdcli.engine.inputs import importing
from msdcli.errors import UserError
from msdcli.nets.diffusers import text_encoder
from msdcli.nets.diffusers.prompt_store import PromptStore
from msdcli.nets.diffusers.text_encoder import TextEncoder
from msdcli.recipe import StudentSettings
from tests.conftest import Msd
from tests.text_teacher import diffusers, sd3_pipeline, sd_pipeline, sdxl_pipeline

pytestmark = pytest.mark.filterwarnings("default")
PROMPTS = ["a red fox", "the sea", "blue sun blue sun house"]


def teacher(folder: Path, pipeline: Path) -> Any:
    """Import a pipeline, and give its denoiser the three prompts."""
    imported = importing.read(pipeline)
    importing.write(imported, folder)
    denoiser, _ = load_model(folder)
    tokens, pooled, _ = TextEncoder(folder / "text").encode(["", *PROMPTS])
    denoiser.prompts = PromptStore(tokens, pooled)
    return denoiser


def test_embeddings_are_the_stable_diffusion_pipelines_own(tmp_path: Path) -> None:
    parts = sd_pipeline(tmp_path / "p")
    pipe = diffusers.StableDiffusionPipeline(
        **parts, vae=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    theirs, empty = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    denoiser = teacher(tmp_path / "t", tmp_path / "p")
    tokens, _ = denoiser.look_up(torch.tensor([0, 1, 2, NO_CLASS]))
    torch.testing.assert_close(tokens, torch.cat([theirs, empty[:1]]), rtol=1e-5, atol=1e-6)


def test_embeddings_are_the_sd3_pipelines_own(tmp_path: Path) -> None:
    parts = sd3_pipeline(tmp_path / "p")
    pipe = diffusers.StableDiffusion3Pipeline(**parts, vae=None)
    theirs, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, device="cpu", do_classifier_free_guidance=False)
    denoiser = teacher(tmp_path / "t", tmp_path / "p")
    ours = denoiser.look_up(torch.tensor([0, 1, 2]))
    torch.testing.assert_close(ours[0], theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1], pooled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["tokenizer.json", "spiece.model"])
def test_t5s_embeddings_are_the_sd3_pipelines_own(tmp_path: Path, form: str) -> None:
    parts = sd3_pipeline(tmp_path / "p", t5=form)
    pipe = diffusers.StableDiffusion3Pipeline(**parts, vae=None)
    theirs, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, device="cpu", do_classifier_free_guidance=False)
    denoiser = teacher(tmp_path / "t", tmp_path / "p")
    assert (tmp_path / "t/text/tokenizer_3" / form).is_file()
    ours = denoiser.look_up(torch.tensor([0, 1, 2]))
    torch.testing.assert_close(ours[0], theirs, rtol=1e-4, atol=1e-4)
    assert ours[0][1, 12:].abs().max() > 0, "T5's vectors are there"
    torch.testing.assert_close(ours[1], pooled, rtol=1e-5, atol=1e-6)
    (tmp_path / "p/tokenizer_3" / form).unlink()
    with pytest.raises(UserError, match=r"tokenizer_3 has neither tokenizer\.json nor spiece\.model"):
        importing.read(tmp_path / "p")


def test_without_sentencepiece_its_models_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spiece.model").write_bytes(b"")
    monkeypatch.setattr(text_encoder.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="library sentencepiece, which is not here"):
        text_encoder._check_t5_words(tmp_path)


@pytest.mark.parametrize("zeros", [True, False])
def test_embeddings_are_the_sdxl_pipelines_own(tmp_path: Path, zeros: bool) -> None:
    parts = sdxl_pipeline(tmp_path / "p")
    index = tmp_path / "p/model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": zeros}))
    pipe = diffusers.StableDiffusionXLPipeline(**parts, vae=None, force_zeros_for_empty_prompt=zeros)
    theirs, empty, pooled, empty_pooled = pipe.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=True)
    denoiser = teacher(tmp_path / "t", tmp_path / "p")
    ours = denoiser.look_up(torch.tensor([0, 1, 2, NO_CLASS]))
    torch.testing.assert_close(ours[0], torch.cat([theirs, empty[:1]]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1], torch.cat([pooled, empty_pooled[:1]]), rtol=1e-5, atol=1e-6)
    assert (ours[0][3].abs().max() == 0) == zeros
    assert denoiser.embedding_shapes == (tuple(ours[0].shape[1:]), tuple(ours[1].shape[1:]))


def test_sdxls_network_is_told_the_size_of_its_pictures(tmp_path: Path) -> None:
    net = sdxl_pipeline(tmp_path / "p")["unet"]
    denoiser = teacher(tmp_path / "t", tmp_path / "p")
    alpha_bar = diffusers.DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear").alphas_cumprod[250].double()
    sigma, c, x_t = ((1 - alpha_bar) / alpha_bar).sqrt().float(), torch.tensor([2, 0]), torch.randn(2, 3, 8, 8)
    tokens, pooled = denoiser.look_up(c)
    told = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(2, -1)}
    noise = net(x_t, torch.tensor([250]), tokens, added_cond_kwargs=told).sample
    x = x_t / alpha_bar.sqrt().float()
    torch.testing.assert_close(denoiser(x, sigma.expand(2), c), x - sigma * noise, atol=1e-5, rtol=0)
    told["time_ids"] = torch.zeros(2, 6)
    other = net(x_t, torch.tensor([250]), tokens, added_cond_kwargs=told).sample
    assert not torch.allclose(other, noise), "the sizes matter"


def test_weights_in_several_files_are_one_network(tmp_path: Path) -> None:
    parts = sdxl_pipeline(tmp_path / "p", max_shard_size="40KB")
    shards = sorted((tmp_path / "p/unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    read = importing.read(tmp_path / "p")
    for name, tensor in parts["unet"].state_dict().items():
        assert torch.equal(read.denoiser.net.state_dict()[name], tensor)
    before = importing.identity(tmp_path / "p")
    index = tmp_path / "p/unet/diffusion_pytorch_model.safetensors.index.json"
    listed = index.read_text()
    index.write_text(listed.replace(shards[0].name, f"../{shards[0].name}"))
    with pytest.raises(UserError, match="lists no safetensors beside it"):
        importing.read(tmp_path / "p")
    index.write_text(listed)
    assert importing.identity(tmp_path / "p") == before
    shards[1].unlink()
    with pytest.raises(UserError, match=f"{shards[1].name} is missing"):
        importing.read(tmp_path / "p")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_one_call_agrees_with_unet_and_scheduler(tmp_path: Path, prediction: str) -> None:
    scheduler = diffusers.DDPMScheduler(
        prediction_type=prediction, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
    )
    net = sd_pipeline(tmp_path / "p", scheduler)["unet"]
    denoiser = teacher(tmp_path / "t", tmp_path / "p")
    assert (denoiser.shape, denoiser.num_classes, denoiser.reads_text) == ((3, 8, 8), 0, True)
    tokens, _ = denoiser.look_up(torch.tensor([2]))
    for t in (1, 250, 990):
        alpha_bar = scheduler.alphas_cumprod[t].double()
        sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
        x_t = torch.randn(1, 3, 8, 8)
        out = net(x_t, torch.tensor([t]), tokens).sample
        theirs = scheduler.step(out, t, x_t).pred_original_sample
        ours = denoiser(x_t / alpha_bar.sqrt().float(), sigma.float()[None], torch.tensor([2]))
        scale = max(1.0, sigma.item())  # of what is subtracted: x / sqrt(alpha_bar) is as large
        assert (ours - theirs).abs().max() / scale < 1e-5


def test_one_call_agrees_with_a_flow(tmp_path: Path) -> None:
    net = sd3_pipeline(tmp_path / "p")["transformer"]
    denoiser = teacher(tmp_path / "t", tmp_path / "p")
    c, t = torch.tensor([1, NO_CLASS]), torch.tensor([0.25, 0.9])
    tokens, pooled = denoiser.look_up(c)
    x_t, t_ = torch.randn(2, 4, 8, 8), t.reshape(-1, 1, 1, 1)
    v = net(x_t, tokens, pooled, 1000 * t).sample
    torch.testing.assert_close(denoiser(x_t / (1 - t_), t / (1 - t), c), x_t - t_ * v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [sd_pipeline, sdxl_pipeline, sd3_pipeline])
def test_features_are_the_blocks_outputs_and_nothing_later_runs(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "p")
    denoiser = teacher(tmp_path / "t", tmp_path / "p")
    x, sigma, c = torch.randn(2, *denoiser.shape), torch.tensor([0.5, 3.0]), torch.tensor([0, 2])
    seen: dict[str, Any] = {}
    for name, block in denoiser.blocks.items():
        block.register_forward_hook(lambda m, i, o, name=name: seen.setdefault(name, o))
    denoiser(x, sigma, c)
    later = denoiser.net.proj_out if denoiser.form == "sd3" else denoiser.net.up_blocks[0]
    later.register_forward_hook(lambda m, i, o: pytest.fail("the decoder ran"))
    found = denoiser.features(x, sigma, c, denoiser.taps)
    for name, feature in zip(denoiser.taps, found, strict=True):
        theirs = seen[name][1].transpose(1, 2) if denoiser.form == "sd3" else seen[name]
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        torch.testing.assert_close(feature.reshape(theirs.shape), theirs)
    assert denoiser.taps == (["block0", "block1"] if denoiser.form == "sd3" else ["down0", "down1", "mid"])
    with pytest.raises(UserError, match="this network has"):
        denoiser.features(x, sigma, c, ["up0"])


def test_a_gradient_reaches_the_input_through_the_features(tmp_path: Path) -> None:
    sd_pipeline(tmp_path / "p")
    denoiser = teacher(tmp_path / "t", tmp_path / "p")
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    denoiser.features(x, torch.tensor([1.0]), torch.tensor([0]), ["mid"])[0].sum().backward()
    assert x.grad.abs().sum() > 0


def test_guidance_moves_away_from_the_empty_prompt(tmp_path: Path) -> None:
    sd_pipeline(tmp_path / "p")
    denoiser = teacher(tmp_path / "t", tmp_path / "p")
    guided = Guided(denoiser, scale=3.0, interval=(0.0, 1e4))
    x, sigma, c = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 3.0]), torch.tensor([0, 2])
    plain, empty = denoiser(x, sigma, c), denoiser(x, sigma, torch.full((2,), NO_CLASS))
    torch.testing.assert_close(guided(x, sigma, c), empty + 3 * (plain - empty), rtol=1e-4, atol=1e-4)
    assert copy.deepcopy(guided).prompts is denoiser.prompts, "a copy looks up in the same store"


def test_students_are_scaled(tmp_path: Path) -> None:
    for make, key in (
        (sd_pipeline, "block_out_channels"),
        (sdxl_pipeline, "block_out_channels"),
        (sd3_pipeline, "num_attention_heads"),
    ):
        make(tmp_path / make.__name__)
        settings = importing.inspect(tmp_path / make.__name__).settings
        student = StudentSettings(width=0.5, depth=0.5).network_for(settings)
        from msdcli import nets

        shape = (settings.config["in_channels"], 8, 8)
        net = nets.build(student, shape=shape, num_classes=0, sigma_data=1.0)
        assert student.config[key] == ([4, 8] if key == "block_out_channels" else 1)
        tokens, pooled = net.embedding_shapes
        net.prompts = PromptStore(torch.randn(2, *tokens), torch.randn(2, *pooled))
        assert net(torch.randn(1, *shape), torch.ones(1), torch.zeros(1, dtype=torch.int64)).shape == (1, *shape)


def test_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    sd_pipeline(tmp_path / "p")
    weights = tmp_path / "p/text_encoder/model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"text_encoder has no model\.safetensors"):
        importing.read(tmp_path / "p")
    index = tmp_path / "p/model_index.json"
    index.write_text(index.read_text().replace("CLIPTextModel", "LlamaModel"))
    with pytest.raises(UserError, match="LlamaModel"):
        importing.read(tmp_path / "p")
    sd_pipeline(tmp_path / "xl", addition_embed_type="text")
    with pytest.raises(UserError, match="addition_embed_type"):
        importing.read(tmp_path / "xl")
    index = json.loads((tmp_path / "xl/model_index.json").read_text())
    index |= {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "xl/model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "unet"}))
    with pytest.raises(UserError, match=r"FluxPipeline \(transformer: FluxTransformer2DModel\).*it reads unet"):
        importing.read(tmp_path / "xl")


@pytest.mark.parametrize(
    ("name", "network", "encoders", "lacks"),
    [
        (
            "FluxPipeline",
            "FluxTransformer2DModel",
            ("CLIPTextModel", "T5EncoderModel"),
            "the network FluxTransformer2DModel, prompts by CLIPTextModel and T5EncoderModel together",
        ),
        (
            "PixArtAlphaPipeline",
            "PixArtTransformer2DModel",
            ("T5EncoderModel",),
            "the network PixArtTransformer2DModel, prompts by T5EncoderModel alone",
        ),
    ],
)
def test_pipelines_of_others_are_named_with_what_lacks(
    tmp_path: Path, name: str, network: str, encoders: tuple[str, ...], lacks: str
) -> None:
    held = {f"text_encoder{n}": ["transformers", e] for n, e in zip(("", "_2"), encoders, strict=False)}
    index = {"_class_name": name, "transformer": ["diffusers", network], "vae": ["diffusers", "AutoencoderKL"], **held}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"{name}.*which msd does not read; it reads unet.*; it lacks {lacks}$"):
        importing.read(tmp_path)


def test_a_refiner_is_no_teacher(tmp_path: Path) -> None:
    sdxl_pipeline(tmp_path / "refiner")
    index = json.loads((tmp_path / "refiner/model_index.json").read_text())
    index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    (tmp_path / "refiner/model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="refiner"):
        importing.read(tmp_path / "refiner")


def test_import_brings_the_text_encoder_and_nothing_else(msd: Msd, tmp_path: Path) -> None:
    sd_pipeline(tmp_path / "p")
    (tmp_path / "p/text_encoder/pytorch_model.bin").write_bytes(b"a pickle")
    (tmp_path / "p/text_encoder/modeling.py").write_text("raise SystemExit")
    done = msd("import", "p", "out")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"text.json", "config.json", "model.safetensors"} <= names
    assert not names & {"pytorch_model.bin", "modeling.py"}
