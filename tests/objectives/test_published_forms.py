"""Published forms, each against a small statement of its own of what the authors' code computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msdcli import nets
from msdcli.diffusion import denoiser as d
from msdcli.diffusion.draws import Draws, Source
from msdcli.engine.checkpoints.model import load_model, save_model
from msdcli.errors import UserError
from msdcli.nets.discriminator import Head
from msdcli.objectives.adm import AdversarialDistributionMatching
from msdcli.objectives.consistency.cd import ConsistencyDistillation
from msdcli.objectives.dm import DistributionMatching
from msdcli.recipe.networks import UNetSettings
from msdcli.recipe.stages import AdmSettings, CdSettings, DmSettings
from tests.objectives.test_adm import Pictures

TAPS = ["8x8_0", "middle"]


def draws(batch: int = 6, step: int = 0) -> Draws:
    return Draws(Source(Pictures(), [3, 4]), batch, ("test", step), 0)


def networks(channels: int = 8) -> list[d.Denoiser]:
    torch.manual_seed(0)
    made = [
        nets.build(UNetSettings(channels=channels, embedding=8), shape=(1, 8, 8), num_classes=10, sigma_data=0.5)
        for _ in range(2)
    ]
    for parameter in [p for net in made for p in net.parameters()]:
        nn.init.normal_(parameter, std=0.1)
    return made


def adm(**keys: object) -> AdversarialDistributionMatching:
    student, teacher = networks()
    settings = AdmSettings(pairs="none", gan_weight=1.0, head_weight=1.0, taps=TAPS, **keys)  # type: ignore[arg-type]
    return AdversarialDistributionMatching(settings, student, teacher.requires_grad_(False))


# The GAN loss of several taps.


def fastgen(logits: list[Tensor], real: bool) -> Tensor:
    """FastGen's losses: softplus of the logits of all heads, side by side, and their mean."""
    together = torch.stack(logits, dim=1)  # [batch, heads]
    return F.softplus(-together if real else together).mean(dim=1)


def test_the_gan_loss_of_several_taps_is_fastgens_where_asked_for() -> None:
    for tap_loss in ("mean_logit", "mean_loss"):
        objective, whole = adm(tap_loss=tap_loss), draws()
        y, c = objective.generate(objective.shared(whole))
        x, sigma = objective.see(y, whole, "generated")
        y_real, c_real = whole.real()
        x_real, sigma_real = objective.see(y_real, whole, "real")

        def logits(*seen: Tensor, objective: AdversarialDistributionMatching = objective) -> list[Tensor]:
            features = objective.fake.features(*seen, TAPS)
            return [head(f) for head, f in zip(objective.head.heads, features, strict=True)]

        generated, real = logits(x, sigma, c), logits(x_real, sigma_real, c_real)
        if tap_loss == "mean_logit":
            generated, real = [torch.stack(generated).mean(0)], [torch.stack(real).mean(0)]
        gan = objective.student_loss(whole) - objective.matching_loss(y, c, whole)
        torch.testing.assert_close(gan, fastgen(generated, real=True), rtol=1e-5, atol=1e-6)
        x_fake, sigma_fake = objective.diffuse_for_fake(y, whole)
        heads = objective.fake_loss(whole) - objective.denoising_loss(x_fake, sigma_fake, c, y, whole)
        torch.testing.assert_close(
            heads, fastgen(real, real=True) + fastgen(generated, real=False), rtol=1e-5, atol=1e-4
        )


def test_the_two_forms_differ_and_agree_on_one_tap() -> None:
    one, whole = {"taps": TAPS[1:]}, draws()
    losses = {form: adm(tap_loss=form).student_loss(whole) for form in ("mean_logit", "mean_loss")}
    assert (losses["mean_loss"] > losses["mean_logit"]).all(), "Jensen: softplus is convex"
    student, teacher = networks()
    same = [
        AdversarialDistributionMatching(AdmSettings(pairs="none", tap_loss=form, **one), student, teacher)  # type: ignore[arg-type]
        for form in ("mean_logit", "mean_loss")
    ]
    same[1].head.load_state_dict(same[0].head.state_dict())
    same[1].fake.load_state_dict(same[0].fake.state_dict())
    assert torch.equal(same[0].student_loss(whole), same[1].student_loss(whole))


# The heads.


def dmd2_head(channels: int) -> nn.Sequential:
    """DMD2's `cls_pred_branch` on 8x8 features."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 4, stride=2, padding=1),
        nn.GroupNorm(32, channels),
        nn.SiLU(),
        nn.Conv2d(channels, channels, 4, stride=4, padding=0),
        nn.GroupNorm(32, channels),
        nn.SiLU(),
        nn.Conv2d(channels, 1, 1),
    )


@pytest.mark.parametrize("channels", [32, 64, 96])
def test_a_head_is_dmd2s_where_asked_for(channels: int) -> None:
    torch.manual_seed(0)
    theirs, ours = dmd2_head(channels), Head((channels, 8, 8), norm="dmd2")
    ours.load_state_dict(theirs.state_dict())
    x = 1e-3 * torch.randn(3, channels, 8, 8)  # small, so that epsilon counts
    torch.testing.assert_close(ours(x), theirs(x).flatten())
    own = Head((channels, 8, 8))
    own.load_state_dict(theirs.state_dict())
    assert not torch.allclose(own(x), theirs(x).flatten(), rtol=1e-3)
    norms = [m for m in own if isinstance(m, nn.GroupNorm)]
    assert {(m.num_groups, m.eps) for m in norms} == {(channels // 4, 1e-6)}, "as it was"


def test_thirty_two_groups_need_as_many_channels() -> None:
    with pytest.raises(UserError, match="32 groups, a tap has 8 channels"):
        adm(head_norm="dmd2")


# Noise levels.


def numbers_of(sigma: Tensor) -> set[int]:
    schedule = d.ascending_sigmas(1000, like=sigma)
    assert torch.isin(sigma, schedule).all()
    return set(torch.searchsorted(schedule, sigma).tolist())


def test_dmd2s_levels_of_both_networks() -> None:
    """Its loss draws `randint(20, 981)`, its fake network learns `randint(0, 1000)`."""
    u = torch.arange(200_000) / 200_000
    assert numbers_of(d.karras_draw(u, [0.02, 0.981])) == set(range(20, 981))
    assert numbers_of(d.karras_draw(u, [0.0, 1.0])) == set(range(1000))
    assert numbers_of(d.karras_draw(torch.tensor([1 - 2**-24]), [0.02, 0.981])) == {980}


@pytest.mark.parametrize(("kind", "settings"), [(DistributionMatching, DmSettings), (None, AdmSettings)])
def test_the_fake_network_has_levels_of_its_own(kind: type | None, settings: type[DmSettings]) -> None:
    def seen(**keys: object) -> tuple[set[int], set[int]]:
        student, teacher = networks()
        objective = (kind or AdversarialDistributionMatching)(settings(pairs="none", **keys), student, teacher)
        fake, matched = set[int](), set[int]()
        for step in range(4):
            objective._batches = {}
            with torch.no_grad():
                objective.fake_loss(draws(200, step))
                fake |= numbers_of(objective.sigma)
                objective.student_loss(draws(200, step))
                matched |= numbers_of(objective.sigma)
        return fake, matched

    fake, matched = seen(sigma_span=[0.02, 0.981], fake_span=[0.0, 1.0])
    assert min(matched) >= 20 and max(matched) <= 980
    assert min(fake) < 20 and max(fake) > 980
    fake, matched = seen(sigma_span=[0.3, 0.4])
    assert fake == matched, "absent: as before"


# Consistency models.


def openai(net: d.Denoiser, x: Tensor, sigma: Tensor, c: Tensor, sigma_min: float = 0.002) -> Tensor:
    """consistency_models' `get_scalings_for_boundary_condition` and `denoise`, around the raw network."""
    sd = net.sigma_data
    c_skip = sd**2 / ((sigma - sigma_min) ** 2 + sd**2)
    c_out = (sigma - sigma_min) * sd / (sigma**2 + sd**2) ** 0.5
    c_in = 1 / (sigma**2 + sd**2) ** 0.5
    c_skip, c_out, c_in = (s[:, None, None, None] for s in (c_skip, c_out, c_in))
    return c_out * net.net(c_in * x, sigma.log() / 4, c) + c_skip * x


def test_an_anchored_student_is_openais() -> None:
    student, teacher = networks()
    objective = ConsistencyDistillation(CdSettings(anchor=0.002, sigma_init=80.0), student, teacher)
    sigma = torch.tensor([0.002, 0.0021, 0.01, 0.5, 80.0])
    x, c = sigma[:, None, None, None] * torch.randn(5, 1, 8, 8) + 0.3, torch.arange(5)
    found = d.consistency(objective.student, x, sigma, c)
    torch.testing.assert_close(found, openai(student, x, sigma, c), rtol=1e-5, atol=2e-5)
    assert torch.equal(found[0], x[0]), "the boundary condition, to the bit"
    z = torch.randn(2, 1, 8, 8)
    sampled = openai(student, 80 * z, torch.full((2,), 80.0), c[:2])
    torch.testing.assert_close(d.one_step(student, z, 80.0, c[:2]), sampled, rtol=1e-5, atol=2e-5)


def test_without_an_anchor_it_is_as_it_was() -> None:
    student, teacher = networks()
    ConsistencyDistillation(CdSettings(), student, teacher)
    x, sigma, c = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 9.0]), torch.arange(3)
    assert student.anchor == 0 and torch.equal(d.consistency(student, x, sigma, c), student(x, sigma, c))


def test_the_anchored_schedule_begins_at_the_anchor() -> None:
    student, teacher = networks()
    objective = ConsistencyDistillation(CdSettings(anchor=0.1, levels=2, sigma_init=5.0), student, teacher)
    levels = []
    objective.heun_step = lambda _, x, s, s_next, c: levels.append((s, s_next)) or x  # type: ignore[method-assign]
    objective.loss(draws())
    ((high, low),) = levels
    torch.testing.assert_close((high[0].item(), low[0].item()), (5.0, 0.1), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="anchor"):
        CdSettings(anchor=5.0, sigma_init=5.0)


def test_a_saved_student_keeps_its_anchor(tmp_path) -> None:
    student, teacher = networks()
    save_model(tmp_path / "plain", student, {})
    assert "anchor" not in (tmp_path / "plain" / "model.json").read_text(), "the file is as it was"
    ConsistencyDistillation(CdSettings(anchor=0.002), student, teacher)
    save_model(tmp_path / "anchored", student, {})
    assert load_model(tmp_path / "anchored")[0].anchor == 0.002
    assert load_model(tmp_path / "plain")[0].anchor == 0
