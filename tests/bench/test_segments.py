"""What a teacher of several segments costs where its frames are kept, beside the student alone and beside joining."""

import time

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import kdlib
from kdlib.bench import Trained, alone_by_hand, distilled
from kdlib_asc.backbones import SpectrogramCNNGRU, WaveCNN
from kdlib_asc.sources import MultiSegment

pytestmark = pytest.mark.timeout(3600)
NETWORKS = {"spectrogram": (SpectrogramCNNGRU, (2, 249, 256), -2), "raw": (WaveCNN, (2, 479_999), -1)}
CLIPS, BATCH, PAIRS, DRAWS = 24, 8, 2, 16
ROUNDS = 7


class Batches(DataLoader):
    """Torch's own loader, whose pairs become the batches that the loop by hand takes."""

    def __iter__(self):
        return ({"x": x, "y": y} for x, y in super().__iter__())


class Epochs:
    """The batches of one epoch after the other."""

    def __init__(self, part):
        self.loader = kdlib.Loader(part, batch=BATCH)
        self.epoch = 0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        self.epoch += 1
        return self.loader.epoch(self.epoch)


@pytest.mark.parametrize("segments", [2, 6])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_epoch_with_reused_frames_beside_the_student_alone(compare, name, segments):
    network, shape, axis = NETWORKS[name]
    x, labels = torch.randn(CLIPS, *shape), torch.zeros(CLIPS, dtype=torch.int64)
    part = kdlib.TensorPart(x, labels)
    teacher, student = kdlib.freeze(network(classes=10)), network(classes=10)
    alone = Trained(alone_by_hand, None, student, Batches(TensorDataset(x, labels), BATCH, shuffle=True), 0)
    source = MultiSegment(teacher, part, segments=segments, join="frames", view="clean", time_axis=axis)
    ours = Trained(distilled, source, student, Epochs(source.dataset(part)), 0)
    what = f"a step, {name} network, {BATCH} clips of 10 s"
    title = f"teacher of {segments} segments, frames kept"
    compare(f"epoch, {name}", what, {title: ours}, {"student alone, by hand": alone}, rounds=ROUNDS)


@pytest.mark.parametrize("join", ["exact", "frames"])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_kept_of_a_clip_and_what_it_costs_once(keep, name, join):
    network, shape, axis = NETWORKS[name]
    part = kdlib.TensorPart(torch.randn(CLIPS, *shape), [0] * CLIPS)
    source = MultiSegment(kdlib.freeze(network(classes=10)), part, segments=2, join=join, view="clean", time_axis=axis)
    source.dataset(part)  # warms up
    started = time.process_time()
    kept = source.dataset(part)
    seconds = time.process_time() - started
    value = f"{1e3 * seconds / CLIPS:.0f} ms and {kept.memory() / CLIPS / 1e3:,.0f} kB a clip"
    keep(f"frames, {name}, {join}", what=f'once for the whole training, {name} network, join="{join}"', value=value)


@pytest.mark.parametrize("join", ["exact", "frames"])
@pytest.mark.parametrize("draws", [1, DRAWS])
@pytest.mark.parametrize("name", NETWORKS)
def test_teaching_pairs_beside_running_the_network_over_them(compare, name, draws, join):
    network, shape, axis = NETWORKS[name]
    teacher = kdlib.freeze(network(classes=10))
    x = torch.randn(PAIRS, *shape)
    stride = teacher.model.junction.stride
    cut = kdlib.TensorPart(x.narrow(axis, 0, shape[axis] // stride * stride), [0] * PAIRS)

    def made(join):
        source = MultiSegment(teacher, cut, segments=2, join=join, view="clean", time_axis=axis)
        return source, next(kdlib.Loader(source.dataset(cut), batch=PAIRS, shuffle=False).epoch(0))

    kept, (whole, whole_batch) = made(join), made("input")

    def off(_):
        """Compare frames, not logits: an untrained GRU has forgotten the junction at its last step."""
        source, batch = kept
        wanted = teacher.encode(torch.cat([whole_batch["base"], whole_batch["partners"][:, 0]], dim=axis))
        mended = source._mended(batch["frames"], batch["windows"])
        near, far = (
            float((x - wanted).abs().max() / wanted.abs().max()) for x in (mended, batch["frames"].flatten(1, 2))
        )
        assert near <= 1e-6 < far
        return f"frames within {near:.1g} of the pair's, of the largest; those of each alone {far:.1g}"

    def by_reuse():
        if draws > 1:
            teacher.encode(cut.x)  # once for all draws
        for _ in range(draws):
            kept[0](kept[1])

    def by_joining():
        for _ in range(draws):
            whole(whole_batch)

    what = f"{PAIRS} pairs of 10 s, {name} network" if draws == 1 else f"{draws} draws of partners, {name} network"
    ours = f'join="{join}"' if draws == 1 else f'encoding and join="{join}"'
    checked = off if (draws, join) == (1, "exact") else None
    name = f"{draws} draws, {name}"
    compare(name, what, {ours: by_reuse}, {"the whole pairs": by_joining}, cheaper=True, rounds=ROUNDS, checked=checked)
