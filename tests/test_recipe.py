"""Recipes: what is accepted, what is refused and how, and that nothing else ever happens."""

from __future__ import annotations

import contextlib
import copy
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from msdcli.console import plain
from msdcli.errors import UserError
from msdcli.recipe import Recipe, load, shipped, validate
from msdcli.recipe.applies import applicable
from msdcli.recipe.changes import differences
from msdcli.recipe.stages import DmSettings
from msdcli.recipe_yaml import Document
from tests.conftest import ROOT, TINY, Msd


def read(text: str, *overrides: str) -> Recipe:
    document = Document.parse(text, "r.yaml")
    for override in overrides:
        document.override(override)
    return validate(document)


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        read(text, *overrides)
    return caught.value.message


def test_numbers_follow_yaml_1_2() -> None:
    recipe = read(TINY.replace("steps: 6,", "steps: 6, lr: 1e-4, pairs: none, lr_of: {no: 5E-3},"))
    assert recipe.stages[0].lr == 1e-4
    assert recipe.stages[0].lr_of == {"no": 5e-3}


def test_resolved_recipe_reads_back_equal() -> None:
    recipe = read(TINY, "stages.0.lr=1e-5", "student.width=0.5")
    assert read(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("path", shipped(), ids=lambda p: p.stem)
def test_shipped_recipes_are_good(path: Path) -> None:
    recipe = load(path)
    assert recipe.name == path.stem
    head = path.read_text(encoding="utf-8")
    assert all(f"# {key}:" in head for key in ("Shows", "Costs", "Measured"))


def test_editors_find_an_up_to_date_schema(msd: Msd, tmp_path: Path) -> None:
    """Regenerate with `msd recipes schema > recipes/schema.json`, and `--sweep` for recipes/sweeps/schema.json."""
    hint = "# yaml-language-server: $schema="
    for folder, words in (("recipes", ()), ("recipes/sweeps", ("--sweep",))):
        assert (ROOT / folder / "schema.json").read_text() == msd("recipes", "schema", *words).stdout
        for path in (ROOT / folder).glob("*.yaml"):
            assert path.read_text().startswith(f"{hint}schema.json\n"), path
    assert msd("recipes", "cp", "digits", "my.yaml").returncode == 0
    first = (tmp_path / "my.yaml").read_text().splitlines()[0]
    assert first == f"{hint}{(ROOT / 'recipes' / 'schema.json').as_uri()}"


def test_overrides_reach_lists_and_new_sections() -> None:
    recipe = read(TINY, "stages.0.steps=50", "student.width=0.5", "partition={students: 4, method: random}")
    assert (recipe.stages[0].steps, recipe.student.width, recipe.partition.students) == (50, 0.5, 4)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.1.steps=5", "a list of 1"),
        ("stages.0.steps", "key=value"),
        ("=5", "key=value"),
        ("stages.0.steps=[1", "override"),
        ("stages.0.steps=5.5", "stages.0.steps"),
        ("seed=-1", "seed"),
        ("name=../x", "name"),
        ("device=cpux", "device"),
    ],
)
def test_bad_overrides_are_refused_by_name(override: str, said: str) -> None:
    assert said in refusal(TINY, override)


def test_all_mistakes_at_once_with_line_key_value_and_nearest_name() -> None:
    text = TINY.replace("workers: 1", "wrkers: 1").replace("students: 2", "students: two").replace("dm,", "dmm,")
    lines = refusal(text).splitlines()
    assert lines[0] == "3 mistakes in the recipe"
    assert "  r.yaml:4: wrkers: no such key; did you mean `workers`?" in lines
    assert "  r.yaml:11: partition.students: is 'two': input should be a valid integer" in lines
    known = "edm, tsm, regress, flow, dm, adm, sid, cd, ect, tcm, scd, progressive"
    assert f"  r.yaml:14: stages.0.objective: is 'dmm', not one of {known}; did you mean `dm`?" in lines


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a mapping"),
        ("- 1", "a mapping"),
        ("a: &x [1]\nb: *x", "r.yaml:2: aliases"),
        ("seed: 1\nseed: 2", "r.yaml:2: seed is given twice (first at r.yaml:1)"),
        ("seed: {", "r.yaml:1: not valid YAML"),
        ("1: 2", "a key is a word"),
        ("a: " + "[" * 100 + "]" * 100, "nested more than"),
        ("a: !!python/object/apply:os.system [true]", "not valid YAML"),
        ("seed: " + "9" * 5000, "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("seed: 0x10", "seed"),
    ],
)
def test_hostile_yaml_is_refused_with_a_line(text: str, said: str) -> None:
    assert said in refusal(text)


def test_alias_bomb_ends_at_once() -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    assert "aliases" in refusal(bomb)


def test_a_hundred_mutated_recipes_are_refused_by_line_and_key(msd: Msd, tmp_path: Path) -> None:
    """Every kind of mistake in every shipped recipe; what a mutation leaves good passes."""
    rng, refused = random.Random(0), 0
    # As YAML has it: a number that is written 1e-3 there is a word.
    sources = [yaml.safe_load(yaml.safe_dump(load(path).dump(), sort_keys=False)) for path in shipped()]
    while refused < 100:
        tree = copy.deepcopy(rng.choice(sources))
        path = mutate(tree, rng)
        file = tmp_path / "mutated.yaml"
        file.write_text(spelled(tree, rng), encoding="utf-8")
        done = msd("recipes", "validate", "mutated.yaml")
        assert done.returncode in (0, 2), (path, done.stderr)
        if done.returncode == 2:
            refused += 1
            key = next((str(part) for part in reversed(path) if isinstance(part, str)), "")
            # A key that decides between sections is missed by its right name when it is renamed.
            others = ("aliases (*id001) are not allowed", "needs the key")
            assert any(words in done.stderr for words in (plain(key), *others)), (path, done.stderr)
            assert "Traceback" not in done.stderr
            assert re.search(r"mutated\.yaml:\d+: ", done.stderr), (path, done.stderr)
            assert not [*tmp_path.glob("runs*")], "a mistake leaves nothing behind"


def mutate(tree: Any, rng: random.Random) -> list[str | int]:
    """Drop, rename, retype, nest or blow up one key somewhere; return its path."""
    node, path = tree, []
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        path.append(key)
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.3:
            break
        node = node[key]
    how = rng.random()
    if isinstance(node, dict) and how < 0.25:
        path[-1] = rng.choice(["ünï", "stepps", f"{key}s", "☃\u202e"])
        node[path[-1]] = node.pop(key)
    elif how < 0.35:
        del node[key]
    else:
        node[key] = rng.choice(
            [None, -1, -(10**30), 10**30, 1e300, "ö☃", [], {}, [[[]]], True, "nan", {"x": node[key]}, [node[key]] * 40]
        )
    return path


def spelled(tree: Any, rng: random.Random) -> str:
    """Write YAML, now and then with an anchor that nothing refers to."""
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return text.replace("stages:", "stages: &anchor", 1) if rng.random() < 0.1 else text


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_a_recipe_or_a_user_error(text: str) -> None:
    with pytest.raises(UserError):
        read(text)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="abstegw.=0123[]{}:,-é\"'&*!", max_size=30))
def test_any_override_is_applied_or_a_user_error(text: str) -> None:
    with contextlib.suppress(UserError):
        read(TINY, text)


def test_more_steps_may_resume_and_nothing_else_may_change() -> None:
    old = read(TINY).dump()
    assert differences(old, read(TINY, "stages.0.steps=7", "evaluation.samples=9").dump()) == []
    assert differences(old, read(TINY, "stages.0.steps=5").dump()) == ["stages.0.steps"]
    assert differences(old, old | {"stages": [*old["stages"], *old["stages"]]}) == []
    assert differences(old | {"stages": [*old["stages"], *old["stages"]]}, old) == ["stages"]
    assert differences(old, read(TINY, "seed=1", "stages.0.lr=2e-3").dump()) == ["seed", "stages.0.lr"]


def test_command_names_file_and_line_and_exits_with_2(msd: Msd, tiny: Path) -> None:
    tiny.write_text(TINY.replace("solver", "sovler"))
    done = msd("distill", "tiny.yaml")
    assert done.returncode == 2
    assert "tiny.yaml:10: teacher.sovler: no such key; did you mean `solver`?" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tiny.parent.iterdir()) == ["tiny.yaml"], "a typo leaves nothing behind"


def test_missing_recipe_offers_the_nearest(msd: Msd) -> None:
    done = msd("distill", "digit")
    assert (done.returncode, "did you mean `digits`" in done.stderr) == (2, True)


# Names, paths and numbers.


@pytest.mark.parametrize("name", ["my recipe (1)", "-x", "a b", "x" * 101, "a\nb", "ü!"])
def test_a_file_that_cannot_name_a_run_is_refused_before_anything_runs(msd: Msd, tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.yaml").write_text(TINY.replace("name: tiny\n", ""))
    for words in (["distill", f"./{name}.yaml"], ["recipes", "validate", f"./{name}.yaml"]):
        done = msd(*words)
        assert (done.returncode, "name=" in done.stderr) == (2, True), done.stderr
    assert [p.name for p in tmp_path.iterdir()] == [f"{name}.yaml"]
    assert load(tmp_path / f"{name}.yaml", ["name=good"]).name == "good"


def test_paths_know_home_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data/set")
    monkeypatch.delenv("NOWHERE", raising=False)
    text = "stages: [{objective: dm}]\ndata: {name: folder, path: $DATA/a}\n"
    recipe = validate(
        Document.parse(text + "run: ~/runs/x\nteacher: {path: '${DATA}/t', guidance: {scale: 2, guide: ~/g}}", "r")
    )
    assert (recipe.data.path, recipe.run) == ("/data/set/a", "/home/me/runs/x")  # type: ignore[union-attr]
    assert (recipe.teacher.path, recipe.teacher.guidance.guide) == ("/data/set/t", "/home/me/g")  # type: ignore[union-attr]
    assert validate(Document.parse(recipe.to_yaml(), "r")) == recipe, "what is put in once stays"
    for key, value in (("run", "$NOWHERE/x"), ("run", "${NOWHERE}"), ("data.path", "$NOWHERE"), ("run", "~nobody9/x")):
        document = Document.parse(text, "r")
        document.override(f"{key}={value}")
        with pytest.raises(UserError, match=r"NOWHERE is not set|no home directory"):
            validate(document)
    (tmp_path / "$NOWHERE").mkdir()
    document = Document.parse(text, "r")
    document.override("data.path=$NOWHERE")
    assert validate(document).data.path == "$NOWHERE", "it is there by this very name"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "override",
    [
        "teacher.solver.sigma_min=80.0",
        "teacher.solver.sigma_max=0.001",
        "teacher.solver.rho=1e300",
        "teacher.sigma_data=1e-40",
        "teacher.training.P_mean=1e308",
        "teacher.training.P_std=1e39",
        "teacher.training.P_std=1e-300",
        "stages.0.sigma_span=[0.6,0.1]",
        "stages.0.sigma_span=[0.5,0.5]",
        "stages.0.lr=1e308",
        "stages.0.lr=1e-60",
        "stages.0.lr_of={fake: 1e300}",
        "stages.0.warmup=9223372036854775808",
        "stages.0.log_every=9223372036854775808",
        "stages.0.weight_decay=1e300",
        "stages.0.clip=1e200",
        "stages.0.betas=[1.0,0.9]",
        "stages.0.ema=1.0",
        "stages.0.pair_weight=1e39",
        "stages.0.pair_batch=10000000",
        "stages.0.sigma_init=1e-300",
        "teacher.guidance={scale: [3,2]}",
        "teacher.guidance={scale: 2, interval: [5,1]}",
        "checkpoint_seconds=1e300",
        "micro_batch=9223372036854775808",
        "pairs.count=1000000000000",
        "pairs.shard=1000000000000",
        "student.width=1e-300",
        "evaluation.batch=1000000000000",
        "data.points=1099511627776",
        "seed=-1",
    ],
)
def test_numbers_that_mean_nothing_are_refused_by_key(tiny: Path, override: str) -> None:
    with pytest.raises(
        UserError, match=override.partition("=")[0].split(".")[-1].replace("guidance", "scale|interval")
    ):
        load(tiny, [override])


@pytest.mark.parametrize(
    "value",
    [
        *("!!bool maybe", "!!timestamp hello", "!!float x", "!!int x", "!!null x", "!!binary '%%%'", "!!set {a, b}"),
        *("!!omap [a: 1]", "!mine x", "!!map [1]", "!!seq {a: 1}", "!!str [1]", "!!int 0x10", f"!!float {'9' * 500}"),
    ],
)
def test_tags_and_their_values_are_refused_with_a_line(value: str) -> None:
    with pytest.raises(UserError, match=r"^r\.yaml:2: "):
        Document.parse(f"\nseed: {value}", "r.yaml")


def test_tags_that_say_what_is_so_are_read() -> None:
    text = "a: !!int 3\nb: !!float 3\nc: !!bool true\nd: !!str 3\ne: !!null ~\nf: !!seq [1]\ng: !!map {h: 1}"
    wanted = {"a": 3, "b": 3.0, "c": True, "d": "3", "e": None, "f": [1], "g": {"h": 1}}
    assert Document.parse(text, "r").tree == wanted


def test_a_recipe_of_very_many_values_is_refused_soon_and_mistakes_are_counted() -> None:
    with pytest.raises(UserError, match="at most 50,000 keys and values"):
        Document.parse(f"loggers: [{'a,' * 480_000}]", "r")
    with pytest.raises(UserError) as caught:
        validate(Document.parse(f"stages: [{'a, ' * 1000}]", "r"))
    assert len(caught.value.message.splitlines()) < 25


def test_the_schema_beside_the_recipes_is_this_one(msd: Msd) -> None:
    assert (ROOT / "recipes" / "schema.json").read_text() == msd("recipes", "schema").stdout


@pytest.mark.parametrize(
    "config",
    [
        {"num_layers": 10**9},
        {"layers_per_block": [2, 5000]},
        {"sample_size": 10**9},
        {"block_out_channels": [32] * 2000},
        {"a": {"num_train_timesteps": 10**12}},
        {"a": 1e300},
    ],
)
def test_networks_that_would_be_built_for_ever_are_refused(config: dict[str, Any]) -> None:
    from pydantic import ValidationError

    from msdcli.recipe.networks import DiffusersNetworkSettings

    good = {"sample_size": 512, "in_channels": 4, "block_out_channels": [320, 640], "dropout": 0.1, "act": "silu"}
    DiffusersNetworkSettings(class_name="UNet2DModel", config=good)
    for keys in ({"config": good | config}, {"config": good, "schedule": config}):
        with pytest.raises(ValidationError, match="can be built"):
            DiffusersNetworkSettings(class_name="UNet2DModel", **keys)


@pytest.mark.parametrize("path", shipped(), ids=lambda p: p.stem)
def test_a_recipe_is_printed_without_idle_keys_and_is_the_same(path: Path) -> None:
    recipe = load(path)
    tree = applicable(recipe)
    assert validate(Document(tree, "printed", {})) == recipe
    assert "churn" not in tree["teacher"]["solver"] and ("latents" in tree) == (recipe.teacher.path is not None)


def test_an_idle_key_that_was_said_is_printed() -> None:
    recipe = load("digits-dm", ["stages.0.weight_decay=0.1", "stages.0.pairs=none"])
    stage = applicable(recipe)["stages"][0]
    assert stage["weight_decay"] == 0.1 and "pair_weight" not in stage
    assert "weight_decay" not in applicable(load("digits-dm"))["stages"][0]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.0.lr=0", "stages.0.lr: is 0, and must be above 0"),
        ("stages.0.lr=1e40", "is 1e+40, and must be at most 1e30"),
        ("teacher.sigma_data=0", "is 0, and must be at least 1e-6"),
        ("stages.0.betas=[0.5,1]", "is 1, and must be below 1"),
        ("evaluation.samples=1000000000", "must be at most 100,000,000"),
    ],
)
def test_bounds_are_said_as_people_write_them(override: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        load("digits", [override])
    assert said in str(refused.value)


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (60, 1), (1600, 32), (20_000, 100)])
def test_a_stage_writes_about_fifty_lines_and_a_long_one_one_in_a_hundred_steps(steps: int, every: int) -> None:
    stage = DmSettings(steps=steps)
    assert stage.steps_per_line == every and DmSettings(steps=steps, log_every=7).steps_per_line == 7
    assert stage.keyed() == DmSettings(steps=steps, log_every=20).keyed() != stage.model_dump(mode="json")


def test_a_run_goes_on_with_lines_as_often_as_one_likes() -> None:
    old, new = read(TINY, "stages.0.log_every=20").dump(), read(TINY, "stages.0.log_every=auto").dump()
    more = new | {"stages": [*new["stages"], new["stages"][0]]}
    assert differences(old, new) == differences(old, more) == []
    assert differences(old, read(TINY, "stages.0.lr=0.5").dump()) == ["stages.0.lr"]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("[{objective: ect}, {objective: tcm}, {objective: tcm}]", "a tcm learns nothing below its own"),
        ("[{objective: ect, sigmas: [0.5]}, {objective: tcm}]", "learns nothing above 0.5"),
        ("[{objective: adm, taps: [a]}, {objective: adm, taps: [a, b]}]", "`taps` differs"),
        ("[{objective: adm, head_norm: dmd2}, {objective: adm}]", "`head_norm` differs"),
        (
            "[{objective: adm, divergence: kl, ratio_bins: 5}, {objective: adm, divergence: js, ratio_bins: 9}]",
            "`ratio_bins` differs",
        ),
    ],
)
def test_what_a_stage_inherits_has_to_fit(stages: str, said: str) -> None:
    *_, before, last = load("digits", [f"stages={stages}"]).stages
    with pytest.raises(ValueError, match=said):
        last.check_anew(before)
