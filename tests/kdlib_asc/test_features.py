"""Features against librosa, scipy and numpy, and their edge cases."""

import inspect
import math
from typing import get_type_hints

import librosa
import numpy as np
import pytest
import scipy.signal
import torch
from pydantic import ValidationError, create_model

from kdlib import BatchError, KdlibError, keyed
from kdlib_asc.features import (
    PreEmphasis,
    Spectrogram,
    band_blocks,
    frame_count,
    log_mel,
    mask,
    mel_filters,
    pre_emphasis,
    roll,
)


def noise(*shape, seed=0, dtype=torch.float32):
    return 0.005 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small(**settings):
    return Spectrogram(**{"rate": 8000, "coefficients": 32, "standardise": False, **settings})


def librosa_log_mel(samples, rate, window, hop, coefficients, mel="htk"):
    frames = 1 + max(0, math.ceil((samples.shape[-1] - window) / hop))
    padded = np.pad(samples, [(0, 0), (0, window + (frames - 1) * hop - samples.shape[-1])])
    power = librosa.feature.melspectrogram(
        y=padded, sr=rate, n_fft=window, hop_length=hop, window="hann", center=False, power=2.0,
        n_mels=coefficients, fmin=0.0, fmax=rate / 2, htk=mel == "htk", norm=None, dtype=np.float64,
    )  # fmt: skip
    return np.log(np.maximum(power, 1e-10)).swapaxes(-1, -2)


# Pre-emphasis


def test_pre_emphasis_equals_a_filter_without_its_first_sample():
    x = noise(3, 2, 1000, dtype=torch.float64)
    expected = scipy.signal.lfilter([1, -0.97], [1], x.numpy())[..., 1:]
    np.testing.assert_allclose(PreEmphasis()(x).numpy(), expected, atol=1e-15)
    np.testing.assert_array_equal(PreEmphasis()(x[0]).numpy(), PreEmphasis()(x)[0].numpy())


def test_pre_emphasis_drops_one_sample_of_480000():
    assert PreEmphasis()(torch.zeros(2, 480000)).shape == (2, 479999)


def test_pre_emphasis_of_coefficient_zero_only_drops_the_first_sample():
    x = noise(2, 10)
    assert torch.equal(PreEmphasis(coefficient=0.0)(x), x[:, 1:])


@pytest.mark.parametrize("samples", [0, 1])
def test_pre_emphasis_of_fewer_than_two_samples_is_refused(samples):
    with pytest.raises(BatchError, match=f"at least 2 samples.* has {samples}"):
        PreEmphasis()(torch.zeros(2, samples))


@pytest.mark.parametrize("shape", [(1000,), (1, 1, 2, 1000)])
@pytest.mark.parametrize("features", [PreEmphasis(), small()], ids=["pre_emphasis", "spectrogram"])
def test_another_number_of_axes_is_refused_with_the_shape(features, shape):
    with pytest.raises(BatchError, match=f"has {len(shape)} axes"):
        features(torch.zeros(shape))


def test_time_axes_are_the_last_and_the_last_but_one():
    assert (PreEmphasis().time_axis, small().time_axis) == (-1, -2)


# Log-mel


@pytest.mark.parametrize("mel", ["htk", "slaney"])
@pytest.mark.parametrize(("rate", "length", "coefficients"), [(48000, 4800, 256), (44100, 4410, 128), (1500, 150, 8)])
def test_mel_filters_equal_librosas(rate, length, coefficients, mel):
    expected = librosa.filters.mel(
        sr=rate, n_fft=length, n_mels=coefficients, htk=mel == "htk", norm=None, dtype=np.float64
    )
    filters = mel_filters(rate, length, coefficients, mel)
    assert filters.dtype == torch.float64
    np.testing.assert_allclose(filters.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("rms", [0.0025, 0.5])
@pytest.mark.parametrize("mel", ["htk", "slaney"])
def test_spectrogram_equals_librosas_at_the_papers_size(mel, rms):
    x = noise(2, 480000)
    x *= rms / x.square().mean().sqrt()
    ours = Spectrogram(rate=48000, mel=mel, standardise=False)(x)
    assert ours.shape == (2, 249, 256)
    expected = librosa_log_mel(x.numpy(), 48000, 4800, 1920, 256, mel)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-4)
    power = np.exp(expected)
    np.testing.assert_allclose(np.exp(ours.double().numpy()), power, rtol=0, atol=1e-5 * power.max())


def test_log_mel_in_double_precision_equals_librosa_closely():
    x = noise(2, 8123, dtype=torch.float64)
    window = torch.hann_window(800, dtype=torch.float64)
    ours = log_mel(x, window, 320, mel_filters(8000, 800, 40))
    np.testing.assert_allclose(ours.numpy(), librosa_log_mel(x.numpy(), 8000, 800, 320, 40), atol=1e-9)


def test_double_precision_samples_stay_double():
    assert small()(noise(2, 8000, dtype=torch.float64)).dtype == torch.float64


def test_blocks_of_bands_cover_every_weight_once():
    filters = mel_filters(8000, 800, 40)  # 40 is no multiple of 16
    rebuilt = torch.zeros_like(filters)
    for bands, bins in band_blocks(filters):
        rebuilt[bands, bins] += filters[bands, bins]
    assert torch.equal(rebuilt, filters)


def test_log_mel_finds_the_blocks_itself():
    x, window, filters = noise(2, 4000), torch.hann_window(800), mel_filters(8000, 800, 40).float()
    assert torch.equal(log_mel(x, window, 320, filters), log_mel(x, window, 320, filters, band_blocks(filters)))


@pytest.mark.parametrize("samples", [480000, 479999])
def test_ten_seconds_at_48_khz_give_249_frames_with_and_without_the_sample_that_pre_emphasis_drops(samples):
    assert frame_count(samples, 4800, 1920) == 249
    coefficient = 0.97 if samples == 479999 else 0.0
    features = Spectrogram(rate=48000, standardise=False, pre_emphasis=coefficient)
    assert features(torch.zeros(1, 480000)).shape == (1, 249, 256)


def test_windows_are_stated_in_seconds_so_44100_hz_gives_4410_and_1764_samples():
    features = Spectrogram(rate=44100, standardise=False)
    assert (features.hann.shape[0], features.hop_length) == (4410, 1764)
    assert features(torch.zeros(1, 441000)).shape == (1, 249, 256)


@pytest.mark.parametrize(("samples", "frames"), [(1, 1), (799, 1), (800, 1), (801, 2), (1120, 2), (1121, 3)])
def test_zeros_at_the_end_make_the_last_frame_whole(samples, frames):
    features = small()
    x = noise(1, samples)
    y = features(x)
    assert y.shape == (1, frames, 32)
    whole = torch.nn.functional.pad(x, (0, 800 + (frames - 1) * 320 - samples))
    assert torch.equal(features(whole), y)


def test_a_hop_longer_than_the_window_works():
    assert small(hop=0.2)(noise(1, 8000)).shape == (1, 6, 32)


def test_silence_is_the_floor():
    assert torch.equal(small()(torch.zeros(1, 800)), torch.full((1, 1, 32), math.log(1e-10)))


def test_an_empty_clip_is_refused():
    with pytest.raises(BatchError, match="empty"):
        small()(torch.zeros(2, 0))


def test_a_batch_equals_its_clips_and_channels_do_not_touch_each_other():
    features = small()
    x = noise(3, 2, 4000)
    y = features(x)
    torch.testing.assert_close(torch.stack([features(clip) for clip in x]), y)
    other = x.clone()
    other[:, 1] = noise(3, 4000, seed=1)
    assert torch.equal(features(other)[:, 0], y[:, 0])
    assert not torch.allclose(features(other)[:, 1], y[:, 1])


def test_pre_emphasis_before_the_frames_is_off_unless_set():
    x = noise(2, 4000)
    assert not torch.allclose(small(pre_emphasis=0.97)(x), small()(x))
    torch.testing.assert_close(small(pre_emphasis=0.97)(x), small()(pre_emphasis(x, 0.97)))


def test_a_band_without_a_bin_is_refused_with_what_to_change():
    message = r"of 256 mel bands hold no FFT bin, the first is band 0 from 0\.0 to 13\.9 Hz.*fewer coefficients"
    with pytest.raises(KdlibError, match=message):
        Spectrogram(rate=16000, window=0.05)


def test_a_hop_shorter_than_a_sample_is_refused():
    with pytest.raises(KdlibError, match="shorter than a sample"):
        small(hop=1e-5)


# Level


def test_removed_level_makes_a_gain_invisible_clip_by_clip():
    x = noise(2, 2, 4000)
    loud = x * torch.tensor([1.0, 10.0])[:, None, None]
    kept, removed = small(), small(level="remove")
    torch.testing.assert_close(kept(loud)[1] - kept(x)[1], torch.full((2, 11, 32), math.log(100)))
    torch.testing.assert_close(removed(loud), removed(x), atol=1e-5, rtol=0)


def test_removed_level_is_one_number_a_clip_so_channels_keep_their_difference():
    x = noise(2, 4000) * torch.tensor([[1.0], [3.0]])
    kept, removed = small()(x), small(level="remove")(x)
    assert removed.mean().abs() < 1e-6
    torch.testing.assert_close(removed, kept - kept.mean())


# Statistics


def fitted(clips, **settings):
    return small(standardise=True, **settings).fit(clips)


@pytest.mark.parametrize("level", ["keep", "remove"])
def test_statistics_equal_numpys_over_channels_frames_and_clips_of_unequal_length(level):
    clips = [noise(2, n, seed=n) * gain for n, gain in ((4000, 1.0), (8000, 4.0), (900, 0.1))]
    features = fitted(iter(clips), level=level)
    rows = np.concatenate([small(level=level)(clip).numpy().reshape(-1, 32) for clip in clips]).astype(np.float64)
    np.testing.assert_allclose(features.mean.numpy(), rows.mean(axis=0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(features.scale.numpy(), rows.std(axis=0), rtol=1e-6)
    out = np.concatenate([features(clip).numpy().reshape(-1, 32) for clip in clips])
    np.testing.assert_allclose(out.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(out.std(axis=0), 1, atol=1e-5)


def test_fitting_again_forgets_the_first_time():
    features = fitted([noise(2, 4000)])
    again = fitted([100 * noise(2, 8000, seed=1)]).fit([noise(2, 4000)])
    assert torch.equal(features.mean, again.mean)
    assert torch.equal(features.scale, again.scale)


def test_a_coefficient_that_does_not_vary_keeps_a_scale_of_one():
    features = fitted([torch.zeros(2, 4000), torch.zeros(2, 900)])
    assert torch.equal(features.scale, torch.ones(32))
    assert torch.equal(features(torch.zeros(2, 900)), torch.zeros(2, 2, 32))


def test_use_before_fit_says_what_to_call():
    with pytest.raises(KdlibError, match=r"fit.*standardise=False"):
        small(standardise=True)(noise(2, 4000))


def test_fit_on_nothing_is_refused():
    with pytest.raises(KdlibError, match="no clip"):
        fitted([])


def test_fit_on_a_clip_with_a_nan_names_the_clip():
    bad = noise(2, 4000)
    bad[0, 7] = torch.nan
    with pytest.raises(KdlibError, match="Clip 1 "):
        fitted([noise(2, 4000), bad])


def test_without_standardisation_fit_reads_no_clip_and_nothing_is_saved():
    def clips():
        raise AssertionError("read")
        yield

    features = small().fit(clips())
    assert dict(features.state_dict()) == {}


def test_state_round_trip_keeps_the_statistics_and_only_them():
    features = fitted([noise(2, 4000)])
    state = features.state_dict()
    assert set(state) == {"mean", "scale"}
    other = small(standardise=True)
    other.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    x = noise(2, 5000, seed=3)
    assert torch.equal(other(x), features(x))


def test_an_unfitted_state_loads_as_unfitted():
    features = fitted([noise(2, 4000)])
    features.load_state_dict(small(standardise=True).state_dict())
    with pytest.raises(KdlibError, match="fit"):
        features(noise(2, 4000))


# Augmentation

AUGMENTED = {
    "wave_roll": (PreEmphasis(roll=True), (2, 999)),
    "wave_masks": (PreEmphasis(time_masks=2, time_width=0.2), (2, 999)),
    "roll": (small(roll=True), (2, 249, 32)),
    "time_masks": (small(time_masks=2, time_width=0.2), (2, 249, 32)),
    "frequency_masks": (small(frequency_masks=2, frequency_width=0.5), (2, 249, 32)),
    "all": (small(roll=True, time_masks=1, frequency_masks=1), (2, 249, 32)),
}


@pytest.mark.parametrize("name", AUGMENTED)
def test_augmentation_is_a_function_of_the_generator_keeps_the_shape_and_the_original(name):
    features, shape = AUGMENTED[name]
    x = noise(*shape)
    kept = x.clone()
    state = torch.get_rng_state()
    views = [features.augment(x, keyed(0, epoch, "augment")) for epoch in range(8)]
    again = [features.augment(x, keyed(0, epoch, "augment")) for epoch in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
    assert not any(torch.equal(views[0], view) for view in views[1:])
    assert {tuple(view.shape) for view in views} == {shape}
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_is_off_by_default_and_draws_nothing():
    for features, shape in ((PreEmphasis(), (2, 99)), (small(), (2, 9, 32))):
        x, generator = noise(*shape), keyed(0)
        state = generator.get_state()
        assert torch.equal(features.augment(x, generator), x)
        assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(("features", "axis"), [(PreEmphasis(roll=True), 1), (small(roll=True), 1)])
def test_roll_turns_all_channels_by_the_same_drawn_shift(features, axis):
    x = torch.arange(40.0).expand(2, 40) if features.time_axis == -1 else torch.arange(40.0)[:, None].expand(2, 40, 3)
    shifts = set()
    for key in range(30):
        y = features.augment(x, keyed(key))
        shift = int(y.flatten(1)[0].argmin()) // (x[0].numel() // 40)
        assert torch.equal(y, x.roll(shift, axis))
        shifts.add(shift)
    assert len(shifts) > 10


def holes(y, axis):
    """Positions along an axis where everything is 0; anything else must be 1 all over."""
    lines = y.movedim(axis, 0).flatten(1)
    assert bool(((lines == 0).all(dim=1) | (lines == 1).all(dim=1)).all())
    return (lines == 0).all(dim=1).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("features", "shape", "axis", "widest"),
    [
        (PreEmphasis(time_masks=1, time_width=0.1), (2, 99), 1, 9),
        (small(time_masks=1, time_width=0.2), (2, 40, 32), 1, 8),
        (small(frequency_masks=1, frequency_width=0.25), (2, 40, 32), 2, 8),
    ],
)
def test_a_mask_is_one_stretch_of_zeros_in_all_channels_up_to_its_width(features, shape, axis, widest):
    sizes, places = set(), set()
    for key in range(200):
        hole = holes(features.augment(torch.ones(shape), keyed(key)), axis)
        assert hole == list(range(hole[0], hole[-1] + 1)) if hole else True
        sizes.add(len(hole))
        places.update(hole)
    assert sizes == set(range(widest + 1))
    assert {0, shape[axis] - 1} <= places  # both ends can be masked


def test_two_masks_mask_two_places():
    counts = [len(holes(mask(torch.ones(1, 100), 1, 2, 0.1, keyed(key)), 1)) for key in range(100)]
    assert 10 < max(counts) <= 20


def test_a_mask_as_wide_as_the_item_can_cover_it():
    assert any(mask(torch.ones(1, 4), 1, 1, 1.0, keyed(key)).sum() == 0 for key in range(50))


def test_roll_of_a_single_step_is_the_item():
    assert torch.equal(roll(torch.ones(2, 1), -1, keyed(0)), torch.ones(2, 1))


# Settings


@pytest.mark.parametrize(
    ("features", "given", "bad"),
    [
        (
            PreEmphasis,
            {"coefficient": 0.9, "roll": True, "time_masks": 1, "time_width": 0.3},
            {"coefficient": 1.1, "time_masks": -1, "time_width": 0.0},
        ),
        (
            Spectrogram,
            {
                "rate": 8000, "coefficients": 16, "window": 0.2, "hop": 0.1, "mel": "slaney", "pre_emphasis": 0.5,
                "standardise": False, "level": "remove", "roll": True, "time_masks": 1, "time_width": 0.3,
                "frequency_masks": 2, "frequency_width": 0.4,
            },
            {"rate": 0, "coefficients": 0, "window": 0.0, "hop": 0.0, "mel": "bark", "pre_emphasis": -0.1,
             "level": "raise", "time_masks": -1, "time_width": 1.1, "frequency_masks": -1, "frequency_width": 0.0},
        ),
    ],
)  # fmt: skip
def test_every_setting_is_keyword_only_an_attribute_and_validated(features, given, bad):
    parameters = inspect.signature(features).parameters
    assert set(parameters) == set(given)
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    module = features(**given)
    assert {name: getattr(module, name) for name in given} == given

    hints = get_type_hints(features.__init__, include_extras=True)
    fields = {name: (hints[name], ... if p.default is p.empty else p.default) for name, p in parameters.items()}
    schema = create_model("Settings", **fields)
    assert schema(**given).model_dump() == given
    for name, value in bad.items():
        with pytest.raises(ValidationError, match=name):
            schema(**{**given, name: value})
