"""The manual's table of what is run on a device that is not here is made of what these tests are parametrised by.

`python -m tests.waits.test_coverage` writes it into the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from msdcli.cli.docs import pages
from msdcli.diffusion.sampler import SOLVERS
from tests.waits import test_exports, test_graphs, test_sampling, test_training
from tests.waits.cases import EXCLUDED, GUIDANCE, MORE, NETWORKS, STAGES, TEXT, product

BEGIN, END = "<!-- coverage: made by tests/waits/test_coverage.py -->\n", "<!-- end of coverage -->\n"


def listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def table() -> str:
    """What each verb does on the device: with which networks and guidance always, and with which slowly."""
    once = test_training.ONCE
    with_unet = [stage for stage, name, how in once if (name, how) == ("unet", "none") and stage in STAGES]
    plain = sorted({name for _, name, how in once if how == "none"}, key=[*NETWORKS].index)
    cases = [*once, *test_training.EVERYTHING]
    assert set(with_unet) == set(STAGES) and {how for _, _, how in once} == set(GUIDANCE)
    assert {*cases} == {*product()}
    fast = {name for name, _ in test_exports.FAST}
    compiled = {name for name, _ in [*test_graphs.FAST, *test_graphs.SLOW]}
    rows = [
        ("`msd distill`, a step and its log", f"objectives: {listed(with_unet)}; {listed(MORE)}"),
        ("", f"networks: {listed(plain)}; guidance: {listed(GUIDANCE)}; adapters, bfloat16, the classifier"),
        ("", f"slow: all {len(cases):,} products of objectives, networks and guidance that msd takes"),
        ("", f"graphs and breaks: {listed(n for n in NETWORKS if n in compiled)}; ADM-64, SD 1.5 (slow)"),
        (
            "pairs, the teacher's samples",
            f"solvers: {listed(SOLVERS)}; guidance: {listed(test_sampling.GUIDED)}, cfg++",
        ),
        ("`msd sample`, `msd latents`", f"routes, one and two steps; text: {listed(TEXT)}; encoding and decoding"),
        (
            "`msd fid`",
            "features, moments by class, FID, KID, precision to coverage, resizing: waits per batch, per side",
        ),
        ("`msd export`", f"programs of {listed(n for n in NETWORKS if n in fast)}; slow: every network without text"),
    ]
    left_out = [f"- {what}: {why}." for what, why in EXCLUDED.items()]
    head = ["| what runs | with |", "|---|---|"]
    return "\n".join([*head, *(f"| {a} | {b} |" for a, b in rows), "", "Left out:", "", *left_out, ""])


def on_page(text: str) -> str:
    """Return a page with the table of today."""
    return re.sub(f"({BEGIN}).*?({END})", lambda m: f"{m[1]}\n{table()}\n{m[2]}", text, flags=re.DOTALL)


def test_the_manual_lists_what_is_covered() -> None:
    text = pages()["code"].read_text(encoding="utf-8")
    assert BEGIN in text
    assert on_page(text) == text, "python -m tests.waits.test_coverage"


if __name__ == "__main__":
    page = pages()["code"]
    page.write_text(on_page(page.read_text(encoding="utf-8")), encoding="utf-8")
