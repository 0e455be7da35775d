"""What the README says is what the commands do."""

import re
import subprocess
import sys

import typer.main
from PIL import Image

from msdcli.cli import app
from msdcli.cli.docs import pages
from tests.conftest import ROOT, environment

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_readmes_test_command() -> None:
    command = next(line for line in README.splitlines() if ".venv/bin/pytest" in line)
    assert command in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()


def test_every_command_in_the_readme_exists() -> None:
    verbs = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"(?:^\.venv/bin/|`|; )msd ([a-z]+)", README, re.MULTILINE))
    assert named
    assert named <= verbs


def test_help_names_every_verb_and_loads_no_torch() -> None:
    code = (
        "import sys; from msdcli.cli import app; app(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "False"
    assert all(verb in done.stdout for verb in ("distill", "partition", "sample", "fid", "export", "status", "recipes"))


def test_nothing_names_a_machine_or_a_package_host() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    for name in listed.stdout.split():
        text = (ROOT / name).read_text(encoding="utf-8", errors="ignore") if (ROOT / name).is_file() else ""
        assert not re.search(r"files\.python" + r"hosted|/ro" + r"ot/|/wo" + r"rk/", text), name


def test_lint_and_types_are_clean() -> None:
    for words in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]):
        done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_links_of_the_readme_lead_somewhere_and_its_picture_is_a_grid_of_samples() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert all((ROOT / link).is_file() for link in links), links
    (picture,) = (link for link in links if link.endswith(".png"))
    with Image.open(ROOT / picture) as image:
        assert image.format == "PNG" and min(image.size) >= 200, "large enough for a person to see"


def test_the_readme_is_short_and_names_every_page_of_the_manual() -> None:
    assert len(README.splitlines()) <= 100
    assert {f"msdcli/docs/{path.name}" for path in pages().values()} <= set(re.findall(r"\]\(([^)]+)\)", README))
