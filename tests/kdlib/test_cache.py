"""Features on disk: the same bits as without, found again only where nothing changed, whole after any kill."""

import json
import multiprocessing
import pickle
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from torch import nn

import kdlib
import kdlib.store
from kdlib import cache as cache_module
from kdlib.cache import Cache, fit_features
from kdlib.featured import Featured

FORK = multiprocessing.get_context("fork")


class Counted(kdlib.TensorPart):
    """A part that knows how often it was read."""

    augmented = False
    reads = 0

    def __getitem__(self, key):
        self.reads += 1
        return super().__getitem__(key)


class Scaled(nn.Module):
    """Samples (channels, time) without their mean over the training part, times a factor; a view is noise on top."""

    time_axis = -1

    def __init__(self, factor=3.0):
        super().__init__()
        self.factor = factor
        self.register_buffer("mean", torch.full((2, 1), torch.nan))
        self.register_buffer("count", torch.tensor(0))

    def fit(self, clips):
        clips = list(clips)
        self.mean.copy_(torch.stack(clips).mean((0, 2)).unsqueeze(1))
        self.count.fill_(len(clips))
        return self

    def forward(self, samples):
        return (samples - self.mean) * self.factor

    def augment(self, x, generator):
        return x.add_(torch.rand(x.shape, generator=generator))


def part_of(size=7, seed=0, kind=Counted):
    x = torch.randn(size, 2, 6, generator=torch.Generator().manual_seed(seed))
    return kind(x, [number % 3 for number in range(size)], ids=[f"clip-{number}" for number in range(size)])


def featured(part, cache, features=None, **more):
    if features is None:
        features = Scaled()
        fit_features(features, part, cache)
    return Featured(part, features, cache=cache, **more)


def bytes_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Two items a shard."""
    monkeypatch.setattr(kdlib.store, "SHARD", 100)


# the same as without


def test_items_are_those_without_a_cache_bit_for_bit(cache):
    plain, kept = (featured(part_of(), which, augment=True, seed=4) for which in (None, cache))
    for epoch in (kdlib.CLEAN, 0, 3, 0):
        for index in (6, 0, 3, 3):
            one, other = plain[epoch, index], kept[epoch, index]
            assert torch.equal(one.pop("x"), other.pop("x"))
            assert one == other
    assert torch.equal(plain.features.mean, kept.features.mean)
    assert isinstance(kept, kdlib.DataPart)


def test_a_second_time_nothing_is_read_and_nothing_computed(cache):
    first = featured(part_of(), cache)
    assert first.part.reads > 0
    again = featured(part_of(), cache)
    for index in range(7):
        assert torch.equal(again[0, index]["x"], first[0, index]["x"])
        assert again[0, index]["y"] == index % 3
    assert again.part.reads == 0
    assert torch.equal(again.features.count, torch.tensor(7))


def test_labels_come_from_the_part(cache):
    featured(part_of(), cache)
    relabelled = part_of()
    relabelled.labels = relabelled.labels[::-1].copy()
    assert featured(relabelled, cache)[0, 1]["y"] == relabelled.labels[1]
    assert relabelled.reads == 0


def test_whatever_else_an_item_holds_is_kept_too(cache):
    class Masked(Counted):
        augmented = False

        def __getitem__(self, key):
            return {**super().__getitem__(key), "mask": torch.tensor([key[1] > 2, True])}

    for _ in range(2):
        made = featured(part_of(kind=Masked), cache)
        assert torch.equal(made[0, 4]["mask"], torch.tensor([True, True]))
        assert torch.equal(made[0, 2]["mask"], torch.tensor([False, True]))
    assert made.part.reads == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_workers_read_it(cache, workers):
    made = featured(part_of(), cache, augment=True)
    for epoch in (0, 1):
        batches = [list(kdlib.Loader(made, batch=3, workers=number).epoch(epoch)) for number in (0, workers)]
        for one, other in zip(*batches, strict=True):
            assert torch.equal(one["x"], other["x"])
            assert torch.equal(one["index"], other["index"])


def test_a_pickled_part_reads_it(cache):
    made = featured(part_of(), cache)
    made[0, 1]
    sent = pickle.loads(pickle.dumps(made))
    assert torch.equal(sent[0, 1]["x"], made[0, 1]["x"])


def test_random_state_outside_is_neither_used_nor_changed(cache):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    made = featured(part_of(), cache, augment=True)
    made[0, 0]
    assert torch.equal(torch.get_rng_state(), before)


def test_without_features_there_is_nothing_to_keep(cache):
    part = part_of()
    assert torch.equal(Featured(part, None, cache=cache)[0, 2]["x"], part.x[2])
    assert not cache.folder.exists()


def test_features_of_other_types_are_kept_as_they_are(cache):
    class Doubled(Scaled):
        def forward(self, samples):
            return (samples.double() * 1.1).T  # and not contiguous

    plain, kept = (featured(part_of(), which, Doubled()) for which in (None, cache))
    assert kept[0, 3]["x"].dtype == torch.float64
    assert torch.equal(plain[0, 3]["x"], kept[0, 3]["x"])


def test_a_fit_that_sets_nothing_reads_nothing(cache):
    class Plain(nn.Module):
        time_axis = -1

        def fit(self, clips):
            return self

        def forward(self, samples):
            return samples * 2

    for _ in range(2):
        part, features = part_of(), Plain()
        fit_features(features, part, cache)
        assert part.reads == 0
    assert torch.equal(Featured(part, features, cache=cache)[0, 1]["x"], part.x[1] * 2)


# the key


def test_statistics_are_those_of_the_training_part_whatever_part_was_kept_first(cache):
    train, test = part_of(7, seed=0), part_of(5, seed=1)
    for _ in range(2):
        features = Scaled()
        fit_features(features, train, cache)
        expected = train.x.mean((0, 2)).unsqueeze(1)
        torch.testing.assert_close(features.mean, expected)
        for part in (test, train):
            made = Featured(part, features, cache=cache)
            torch.testing.assert_close(made[0, 4]["x"], (part.x[4] - expected) * 3)
    other = Scaled()
    fit_features(other, test, cache)
    torch.testing.assert_close(other.mean, test.x.mean((0, 2)).unsqueeze(1))


class OtherScaled(Scaled):
    pass


def one_sample_more():
    part = part_of()
    part.x[3, 1, 2] = torch.nextafter(part.x[3, 1, 2], torch.tensor(9.0))
    return part


def another_id():
    part = part_of()
    part.ids = [*part.ids[:-1], "other"]
    return part


def another_order():
    part, turned = part_of(), part_of()
    turned.x, turned.ids = part.x.flip(0), part.ids[::-1]
    return turned


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: (part_of(), Cache(cache.folder, "float16"), Scaled()),
        lambda cache: (part_of(), Cache(cache.folder, made_by={"factor": 2.0}), Scaled(2.0)),
        lambda cache: (part_of(), cache, OtherScaled()),
        lambda cache: (one_sample_more(), cache, Scaled()),
        lambda cache: (another_id(), cache, Scaled()),
        lambda cache: (another_order(), cache, Scaled()),
        lambda cache: (part_of(6), cache, Scaled()),
    ],
    ids=["dtype", "settings", "class", "content", "id", "order", "fewer"],
)
def test_what_was_made_of_something_else_is_not_taken(cache, change):
    featured(part_of(), cache)
    kept = bytes_in(cache.folder)
    part, other, features = change(cache)
    fit_features(features, part, other)
    made = Featured(part, features, cache=other)
    assert part.reads > 0
    for index in range(len(part)):
        x = features(part.x[index])
        torch.testing.assert_close(made[0, index]["x"], x, rtol=2**-11, atol=1e-7)
    assert bytes_in(cache.folder).items() > kept.items()  # what was there stays


def test_other_statistics_are_other_features(cache):
    features = Scaled()
    fit_features(features, part_of(), cache)
    one = Featured(part_of(), features, cache=cache)[0, 0]["x"]
    features.mean += 1
    part = part_of()
    other = Featured(part, features, cache=cache)[0, 0]["x"]
    assert part.reads > 0
    torch.testing.assert_close(one - other, torch.full((2, 6), 3.0))


@pytest.mark.parametrize("name", ["source_of", "versions"])
def test_other_code_or_versions_are_other_features(cache, monkeypatch, name):
    featured(part_of(), cache)
    monkeypatch.setattr(cache_module, name, lambda *_: "new")
    assert featured(part_of(), cache).part.reads > 0


def test_a_store_that_was_put_in_the_place_of_another_is_refused(cache):
    featured(part_of(), cache)
    before = set(cache.folder.iterdir())
    featured(part_of(6), cache)
    (one, *_), (other, *_) = ((path for path in found if rows(path) > 1) for found in (before, added(cache, before)))
    shutil.rmtree(one)
    shutil.copytree(other, one)
    with pytest.raises(kdlib.DataError, match="was made of something else") as caught:
        featured(part_of(), cache)
    assert str(one) in str(caught.value)
    assert "rows: there 6, here 7" in str(caught.value)


def rows(folder):
    return json.loads((folder / "manifest.json").read_text())["rows"]


def added(cache, before):
    return set(cache.folder.iterdir()) - before


# what cannot be kept


def test_a_part_without_fingerprints_is_refused_with_what_to_do(cache):
    class Nameless:
        labels, groups, ids = np.zeros(2, np.int64), ["a", "b"], ["a", "b"]

        def __len__(self):
            return 2

        def __getitem__(self, key):
            raise AssertionError

    for use in (lambda part: Featured(part, Scaled(), cache=cache), lambda part: fit_features(Scaled(), part, cache)):
        with pytest.raises(kdlib.DataError, match=r"Nameless has no method fingerprint\(index\)") as caught:
            use(Nameless())
        assert "[cache]" in str(caught.value)


class Odd(Scaled):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, samples):
        return self.change(samples)


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        (lambda x: x[:, : 5 if x[0, 0] > 0.9 else 6], "float32", r"clip-\d: .*the first item"),
        (lambda x: {"a": x}, "float32", "clip-0: 'x' is of dict"),
        (lambda x: x.bfloat16(), "float32", r"clip-0: 'x' is of torch\.bfloat16"),
        (lambda x: x.double(), "float16", "clip-0: the features are float64"),
        (lambda x: x * 1e6, "float16", r"clip-\d: the features go to .*; float16 ends at 65504"),
        (lambda x: x * torch.nan, "float16", "clip-0: the features go to nan"),
    ],
    ids=["shapes", "mapping", "bfloat16", "float64", "large", "nan"],
)
def test_what_has_no_place_in_a_row_is_refused_with_the_item(cache, change, dtype, message):
    part = part_of(seed=3)
    assert (part.x[:, 0, 0] > 0.9).any()
    assert part.x[0, 0, 0] < 0.9
    with pytest.raises(kdlib.DataError, match=f"features of this: {message}"):
        Featured(part, Odd(change), cache=Cache(cache.folder, dtype), title="features of this")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    part = part_of()
    with pytest.raises(kdlib.KdlibError, match=r"file/[0-9a-f]{32}: cannot be made"):
        fit_features(Scaled(), part, Cache(tmp_path / "file"))
    assert part.reads == 0


# float16


def test_float16_is_near_and_its_error_is_said_once(cache, capsys):
    half, features = Cache(cache.folder, "float16"), Scaled()
    fit_features(features, part_of(), half)
    made = Featured(part_of(), features, cache=half, title="the test")
    exact = torch.stack([features(x) for x in made.part.x])
    kept = torch.stack([made[0, index]["x"] for index in range(7)])
    assert kept.dtype == torch.float32
    assert torch.equal(kept, exact.half().float())
    error = (kept - exact).abs().max()
    assert 0 < error <= exact.abs().max() * 2**-11
    said = capsys.readouterr().out
    assert f"the test: kept as float16, at most {error:.2g} from what was computed" in " ".join(said.split())
    assert float(made._store.whole("x_error").max()) == error
    Featured(part_of(), features, cache=half)
    assert "float16" not in capsys.readouterr().out
    assert set(made[0, 0]) == {"x", "y", "index", "epoch"}


# interrupted


def test_what_an_interrupted_run_has_kept_is_not_computed_again(cache):
    class Tired(Scaled):
        left = 5

        def forward(self, samples):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            return super().forward(samples)

    features, part = Tired(), part_of()
    fit_features(features, part, None)
    with pytest.raises(KeyboardInterrupt):
        Featured(part, features, cache=cache)
    features.left = 100
    Featured(part, features, cache=cache)
    assert features.left == 100 - 3  # of seven items in shards of two, two shards were whole


def test_a_damaged_shard_is_computed_again_and_that_is_said(cache):
    made = featured(part_of(), cache)
    expected = bytes_in(cache.folder)
    for path in cache.folder.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(match="damaged") as caught:
        again = featured(part_of(), cache)
    assert len(caught) == 5  # one of statistics, four of features
    assert bytes_in(cache.folder) == expected
    assert torch.equal(again[0, 3]["x"], made[0, 3]["x"])


class Slow(Counted):
    def __getitem__(self, key):
        time.sleep(0.001)
        return super().__getitem__(key)


def test_after_kills_the_rest_is_computed_and_the_bytes_are_those_of_an_uninterrupted_run(cache, tmp_path):
    featured(part_of(60, kind=Slow), Cache(tmp_path / "alone"))
    expected, returned = bytes_in(tmp_path / "alone"), []
    for wanted in (1, 6, 12, 24):  # the first in, or soon after, the statistics
        process = FORK.Process(target=featured, args=(part_of(60, kind=Slow), cache))
        process.start()
        while len(list(cache.folder.glob("*/*.sha256"))) < wanted and process.is_alive():
            time.sleep(0.0005)
        process.kill()
        process.join()
        returned.append(process.exitcode)
    assert returned == [-signal.SIGKILL] * 4
    assert sum(name.endswith("sha256") for name in bytes_in(cache.folder)) < 31
    featured(part_of(60, kind=Slow), cache)
    assert bytes_in(cache.folder) == expected
