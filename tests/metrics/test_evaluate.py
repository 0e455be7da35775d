"""The whole path, from files to the number, against what other people's programs made of the same files."""

import json
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from msdcli.data.opening import open_images
from msdcli.errors import UserError
from msdcli.metrics.evaluate import FeatureSet, cache_key, collect, evaluate, open_reference
from msdcli.metrics.frechet import frechet_distance
from msdcli.metrics.inception import FeatureNetwork, open_network
from msdcli.metrics.moments import Moments

PROTOCOLS = ("clean", "legacy-tensorflow")
WEIGHTS = "inception-2015-12-05.pt"


@pytest.fixture(scope="session", params=PROTOCOLS)
def network(request, fid_fixtures):
    return open_network(request.param, weights=fid_fixtures / WEIGHTS)


@pytest.fixture(scope="session")
def sides(network, fid_fixtures):
    """Features of a.zip and b.zip."""
    return [collect(fid_fixtures / f"{name}.zip", network) for name in ("a", "b")]


def fid(a, b):
    return frechet_distance(a.moments.whole(), b.moments.whole())


def numbers_of(network, expected):
    return expected[network.protocol.replace("-", "_")]


def read_all(path):
    return np.concatenate([batch.images for batch in open_images(path).batches(100)])


def pixels(images):
    """A network without weights: 12 features of every picture, whatever its size."""
    x = images.double() / 255
    return torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3)), x.amin(dim=(2, 3)), x.std(dim=(2, 3))], dim=1)


TINY = FeatureNetwork("pixels", pixels, lambda features: features.softmax(dim=1))


def pictures(rng, count, size=8):
    return rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


class TestParity:
    def test_with_the_exact_distance_and_with_cleanfid(self, network, sides, expected):
        wanted = numbers_of(network, expected)
        assert fid(*sides) == pytest.approx(wanted["exact"], rel=1e-7)  # 1e-5 is asked for, 2e-8 was measured
        assert fid(*sides) == pytest.approx(wanted["clean_fid"], rel=1e-4)
        assert sides[0].summary(sides[1])["kid"] == pytest.approx(wanted["kid"], rel=0.02)  # theirs: random subsets
        assert sides[0].features.mean() == pytest.approx(wanted["feature_mean_a"], rel=1e-6)
        assert sides[0].features[0, :8] == pytest.approx(wanted["first_features_a"], rel=1e-4, abs=1e-6)

    def test_from_a_folder_and_an_npz_with_any_batch_and_workers(self, network, sides, unpacked, tmp_path):
        np.savez_compressed(tmp_path / "a.npz", arr_0=read_all(unpacked / "a"))
        wanted = fid(*sides)
        for path, batch_size, workers in ((unpacked / "a", 7, 3), (tmp_path / "a.npz", 240, 1)):
            found = collect(path, network, batch_size=batch_size, workers=workers)
            assert fid(found, sides[1]) == pytest.approx(wanted, rel=1e-9)

    def test_merged_ranks_are_one(self, network, sides, unpacked):
        images = read_all(unpacked / "a")
        ranks = [collect([images[rank::3]], network) for rank in range(3)]
        for rank in ranks[1:]:
            ranks[0].merge(rank)
        assert ranks[0].count == 240
        assert fid(ranks[0], sides[1]) == pytest.approx(fid(*sides), rel=1e-9)

    def test_beside_the_installed_cleanfid(self, network, sides, unpacked, fid_fixtures, tmp_path):
        """Its own reading, resizing, batching and network; its distance is in test_frechet, where sqrtm is fast."""
        theirs = pytest.importorskip("cleanfid.fid")
        from cleanfid.inception_torchscript import InceptionV3W

        for path in sorted((unpacked / "a" / "nested").iterdir())[:60]:
            (tmp_path / path.name).write_bytes(path.read_bytes())
        mode = network.protocol.replace("-", "_")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated
            model = InceptionV3W(str(fid_fixtures), download=False, resize_inside=mode == "legacy_tensorflow")
            options = {"num_workers": 0, "device": "cpu", "mode": mode, "verbose": False, "batch_size": 16}
            features = theirs.get_folder_features(str(tmp_path), model, **options)
        ours = collect(tmp_path, network)
        assert ours.features == pytest.approx(features, rel=1e-4, abs=1e-5)
        moments = Moments(2048)
        moments.add(features)
        whole = sides[1].moments.whole()
        assert frechet_distance(moments, whole) == pytest.approx(fid(ours, sides[1]), rel=2e-7)

    def test_edm_is_the_detectors_own_resizing(self, fid_fixtures, expected):
        options = {"protocol": "edm", "weights": fid_fixtures / WEIGHTS}
        result = evaluate(fid_fixtures / "a.zip", fid_fixtures / "b.zip", **options)
        assert result["fid"] == pytest.approx(expected["legacy_tensorflow"]["exact"], rel=1e-7)


class TestReference:
    def test_published_statistics_give_the_same_distance(self, tmp_path, rng):
        a, b = (collect([pictures(rng, 40)], TINY) for _ in range(2))
        whole = b.moments.whole()
        np.savez(tmp_path / "ref.npz", mu=whole.mean, sigma=whole.covariance())
        result = a.summary(open_reference(tmp_path / "ref.npz", TINY))
        assert result["fid"] == pytest.approx(fid(a, b), rel=1e-12)
        assert "kid" not in result
        assert result["record"]["reference_count"] is None

    def test_of_other_features_is_refused(self, rng, tmp_path):
        a = collect([pictures(rng, 10)], TINY)
        np.savez(tmp_path / "ref.npz", mu=np.zeros(3), sigma=np.eye(3))
        with pytest.raises(UserError, match="12 and 3"):
            a.summary(open_reference(tmp_path / "ref.npz", TINY))
        with pytest.raises(UserError, match="different networks"):
            a.summary(collect([pictures(rng, 10)], FeatureNetwork("others", pixels)))

    def test_kept_features_are_the_same_features(self, rng, tmp_path):
        a, b = (collect([(pictures(rng, 40), rng.integers(0, 3, 40))], TINY) for _ in range(2))
        np.savez(tmp_path / "b.npz", **b.to_arrays())
        with np.load(tmp_path / "b.npz", allow_pickle=False) as arrays:
            read = FeatureSet.from_arrays(arrays)
        assert a.summary(read, replicates=5) == a.summary(b, replicates=5)

    def test_the_cache_key_follows_content_and_network(self, rng, tmp_path):
        for name, seed in (("a", 0), ("same", 0), ("b", 1)):
            (tmp_path / name).mkdir()
            image = pictures(np.random.default_rng(seed), 1)[0]
            Image.fromarray(image).save(tmp_path / name / "0.png")
        key = cache_key(tmp_path / "a", TINY)
        assert key == cache_key(tmp_path / "same", TINY)
        assert key != cache_key(tmp_path / "b", TINY)
        assert key != cache_key(tmp_path / "a", FeatureNetwork("pixels", pixels, sha256="0"))


class TestSummary:
    def test_is_json_with_everything_in_it(self, rng):
        a, b = (collect([(pictures(rng, 60), rng.integers(0, 4, 60))], TINY) for _ in range(2))
        groups = {"student 0": [0, 1], "student 1": [2, 3], "nobody": [7]}
        result = a.summary(b, groups=groups, replicates=20, seed=5, extrapolate=True)
        assert json.loads(json.dumps(result)) == result
        names = {"fid", "kid", "inception_score", "precision", "recall", "density", "coverage"}
        assert names | {"fid_infinity"} <= set(result)
        assert set(result["intervals"]) == names
        for name, interval in result["intervals"].items():
            assert interval["low"] <= result[name] <= interval["high"]
        record = result["record"]
        assert (record["seed"], record["replicates"], record["count"], record["kid"]) == (5, 20, 60, "all pairs")
        assert sum(record["labels"].values()) == 60
        assert {"torch", "numpy", "pillow"} <= set(record["versions"])
        assert result == a.summary(b, groups=groups, replicates=20, seed=5, extrapolate=True)

    def test_groups_are_sets_of_their_own(self, rng):
        sets = [(pictures(rng, 60), rng.integers(0, 3, 60)) for _ in range(2)]
        a, b = (collect([part], TINY) for part in sets)
        alone = [collect([images[labels == 1]], TINY) for images, labels in sets]
        groups = a.summary(b, groups={"one": [1], "nobody": [7]})["groups"]
        assert groups["one"]["fid"] == pytest.approx(fid(*alone), rel=1e-9)
        assert groups["nobody"] == {"fid": None, "count": 0, "reference_count": 0}

    def test_many_images_use_subsets(self, rng, monkeypatch):
        monkeypatch.setattr("msdcli.metrics.evaluate.EXACT_PAIRS", 100)
        a, b = (collect([pictures(rng, 20)], TINY) for _ in range(2))
        assert a.summary(b)["record"]["kid"] == "100 subsets of 1000"

    def test_warns_of_fewer_images_than_dimensions(self, rng):
        few, many = collect([pictures(rng, 9)], TINY), collect([pictures(rng, 40)], TINY)
        (warning,) = few.summary(many)["warnings"]
        assert "9 images are fewer than the 12 dimensions" in warning

    def test_figures_that_need_features_say_so(self, rng):
        a, b = (collect([pictures(rng, 20)], TINY, keep_features=False) for _ in range(2))
        assert set(a.summary(b)) == {"fid", "groups", "intervals", "warnings", "record"}
        with pytest.raises(UserError, match="not kept"):
            a.summary(b, replicates=3)

    def test_classes_of_published_statistics_are_not_known(self, rng):
        a = collect([pictures(rng, 20)], TINY)
        with pytest.raises(UserError, match="apart"):
            a.summary(a.moments.whole().gaussian(), groups={"one": [1]})


class TestSources:
    def test_tensors_and_arrays_are_the_same_images(self, rng):
        images = pictures(rng, 30)
        tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
        found = [collect(source, TINY).features for source in ([images], [tensor], iter(tensor.split(7)))]
        assert (found[0] == found[1]).all()
        assert (found[0] == found[2]).all()

    def test_one_channel_is_three(self, rng):
        grey = rng.integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)
        found = collect([torch.from_numpy(grey)], TINY).features
        assert (found == collect([grey.repeat(3, axis=1).transpose(0, 2, 3, 1)], TINY).features).all()

    def test_mixed_sizes_keep_their_order_and_labels(self, rng, tmp_path):
        sizes = [8, 5, 8, 7, 5, 8]
        images = [pictures(rng, 1, size)[0] for size in sizes]
        with zipfile.ZipFile(tmp_path / "mixed.zip", "w") as file:
            for i, image in enumerate(images):
                with file.open(f"{i}.png", "w") as entry:
                    Image.fromarray(image).save(entry, "png")
            file.writestr("dataset.json", json.dumps({"labels": [[f"{i}.png", i % 2] for i in range(6)]}))
        found = collect(tmp_path / "mixed.zip", TINY, batch_size=4)
        wanted = np.concatenate([collect([image[None]], TINY).features for image in images])
        assert (found.features == wanted).all()
        assert found.moments.counts() == {0: 3, 1: 3}
        assert found.moments.classes[1].mean == pytest.approx(wanted[1::2].mean(axis=0), rel=1e-12)

    def test_a_limit_takes_the_first_and_demands_them(self, rng):
        batches = [pictures(rng, 6), pictures(rng, 6)]
        found = collect(iter(batches), TINY, limit=8)
        assert (found.features == collect([np.concatenate(batches)[:8]], TINY).features).all()
        with pytest.raises(UserError, match="12 images, fewer than the 13"):
            collect(batches, TINY, limit=13)
        with pytest.raises(UserError, match="0 images"):
            collect([], TINY)

    def test_other_batches_are_refused(self):
        for batch in (np.zeros((1, 4, 4, 3)), np.zeros((1, 4, 4, 2), np.uint8), torch.zeros(3, 4, 4)):
            with pytest.raises(UserError, match="uint8"):
                collect([batch], TINY)

    def test_the_reference_is_checked_before_the_first_sample(self, tmp_path, monkeypatch):
        monkeypatch.setattr("msdcli.metrics.evaluate.open_network", lambda *_, **__: TINY)
        samples = (pytest.fail("sampling began") for _ in range(1))
        with pytest.raises(UserError, match="does not exist"):
            evaluate(samples, tmp_path / "absent.zip")
