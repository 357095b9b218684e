"""Latent actions of frames as they arrive, and the queue between a camera and the policy."""

import threading
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch

from latentact.errors import UserError
from latentact.guidance import capture as capture_module
from latentact.guidance import extractor as extractor_module
from latentact.guidance.capture import LOST_S, QUEUE, CameraSource, Capture, Frame
from latentact.guidance.extractor import LatentActionExtractor
from latentact.guidance.live import StreamingExtractor
from latentact.lams.models.lapo import LapoConfig
from latentact.quantizers.none import WhitenedConfig
from latentact.quantizers.vq import VqConfig

FRAMES = np.random.default_rng(0).integers(0, 256, (12, 40, 48, 3)).astype(np.uint8)


@pytest.fixture(params=["continuous", "codes"])
def extractor(request, tmp_path, monkeypatch):
    """A LAM with context, which encodes one transition at a time."""
    torch.manual_seed(0)
    bottleneck = WhitenedConfig(dim=4) if request.param == "continuous" else VqConfig(dim=8, codebook_size=8)
    shape = {"backbone": "patch", "size": 32, "patch": 4, "idm_channels": (8,), "fdm_channels": (8,)}
    model = LapoConfig(**shape, bottleneck=bottleneck).build()
    model.spec = replace(model.spec, frame_gap_s=0.1, fps=10.0)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(extractor_module, "BATCH", 1)
    found = LatentActionExtractor(tmp_path, 36, "cpu")
    assert found.model.context == 1
    return found


def stream(extractor, fps, numbers):
    streaming = StreamingExtractor(extractor, fps)
    found = [streaming.push(Frame(number=n, time=float(n), pixels=FRAMES[n])) for n in numbers]
    return streaming, {latent.number: latent for latent in found if latent is not None}


@pytest.mark.parametrize("fps", [10.0, 20.0])
def test_a_stream_has_the_latent_actions_of_the_video(extractor, fps):
    """Bit for bit, at a gap of one frame and of two."""
    guide = extractor.extract_from_frames(FRAMES, fps)
    streaming, latents = stream(extractor, fps, range(12))
    assert [*latents] == [*range(len(guide))]
    for name in ("vectors", "continuous", *(["codes"] if guide.codes is not None else [])):
        np.testing.assert_array_equal(
            [getattr(latent, name) for latent in latents.values()], getattr(guide, name)
        )
    np.testing.assert_array_equal(streaming.still, guide.still)
    assert [latent.captured for latent in latents.values()] == [n + fps / 10 for n in range(len(guide))]


def test_a_stream_agrees_with_batches(extractor, monkeypatch):
    _, latents = stream(extractor, 10.0, range(12))
    monkeypatch.setattr(extractor_module, "BATCH", 32)
    guide = extractor.extract_from_frames(FRAMES, 10.0)
    found = np.stack([latent.continuous for latent in latents.values()])
    np.testing.assert_allclose(found, guide.continuous, atol=1e-6)


def test_a_dropped_frame_costs_its_two_transitions(extractor):
    _, latents = stream(extractor, 10.0, [n for n in range(12) if n != 5])
    assert [*latents] == [0, 1, 2, 3, 6, 7, 8, 9, 10]
    whole, after = (extractor.extract_from_frames(frames, 10.0) for frames in (FRAMES, FRAMES[6:]))
    np.testing.assert_array_equal(latents[6].continuous, after.continuous[0])  # 5 is missing context
    np.testing.assert_array_equal(latents[7].continuous, whole.continuous[7])


class Fake:
    """A source of frames, or of an error."""

    name, fps, captured = "fake:0", 10.0, 0

    def __init__(self, items, endless=True):
        self.items, self.endless, self.closed = items, endless, threading.Event()

    def frames(self):
        for n, item in enumerate(self.items):
            if isinstance(item, Exception):
                raise item
            if isinstance(item, threading.Event):
                item.wait()
                return
            yield Frame(number=n, time=capture_module.time.monotonic(), pixels=FRAMES[0])

    def close(self):
        self.closed.set()


def numbers(frames):
    return [frame.number for frame in frames]


def test_the_oldest_frames_are_dropped_and_counted():
    source = Fake([0] * (QUEUE + 5), endless=False)
    capture = Capture(source)
    first = capture.take(0.0)
    assert source.closed.wait(10)
    rest = capture.take(0.0)
    found = numbers([*first, *(rest or [])])
    assert found[-QUEUE:] == [*range(5, QUEUE + 5)]
    assert capture.dropped == QUEUE + 5 - len(found)
    assert capture.take(0.0) is None
    capture.close()


def test_at_most_max_frames_are_read():
    capture = Capture(Fake([0] * 9), max_frames=4)
    found = []
    while (frames := capture.take(10.0)) is not None:
        found += frames
    assert numbers(found) == [0, 1, 2, 3]


def test_a_camera_that_fails_is_lost_after_its_frames():
    source = Fake([0, 0, 0, OSError("unplugged")])
    capture = Capture(source)
    found = capture.take(10.0)
    assert source.closed.wait(10)
    if len(found) < 3:
        found += capture.take(0.0)
    assert numbers(found) == [0, 1, 2]
    with pytest.raises(UserError, match=r"the camera fake:0 was lost \(OSError: unplugged\), so control"):
        capture.take(0.0)


class Clock:
    now = 50.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    virtual = Clock()
    monkeypatch.setattr(capture_module, "time", virtual)
    return virtual


def test_a_silent_camera_is_lost(clock):
    silent = threading.Event()
    source = Fake([0, silent])
    capture = Capture(source)
    assert numbers(capture.take(10.0)) == [0]
    clock.now += LOST_S
    assert capture.take(0.0) == []
    clock.now += 0.1
    with pytest.raises(UserError, match=r"lost \(no frame for 1 s\)"):
        capture.take(0.0)
    silent.set()
    capture.close()
    assert source.closed.is_set()


class FakeCamera:
    is_connected = True

    def __init__(self, clock, waits):
        self.clock, self.waits = clock, iter(waits)

    def async_read(self, timeout_ms):
        wait = next(self.waits, None)
        if wait is None:
            raise TimeoutError
        self.clock.now += wait
        return FRAMES[0]


def used(clock, waits):
    found = []
    with suppress(TimeoutError):
        found.extend(CameraSource("fake:0", FakeCamera(clock, waits), 10.0).frames())
    return found


@pytest.mark.parametrize("rate", [9.9, 10.0, 10.1])
def test_no_frame_of_a_camera_with_another_clock_is_missed(clock, rate):
    jitter = np.random.default_rng(0).uniform(-0.01, 0.01, 301)
    found = used(clock, 1 / rate + np.diff(jitter))
    assert numbers(found) == [*range(300)]


@pytest.mark.parametrize(("rate", "worst"), [(30.0, 1e-6), (25.0, 0.021)])
def test_a_faster_camera_is_thinned(clock, rate, worst):
    found = used(clock, [1 / rate] * int(6 * rate))
    assert len(found) == pytest.approx(60, abs=1)
    assert np.diff([frame.time for frame in found[20:]]) == pytest.approx(0.1, abs=worst)


def test_a_missing_frame_leaves_its_number_out(clock):
    assert numbers(used(clock, [0.1, 0.1, 0.1, 0.2, 0.1])) == [0, 1, 2, 4, 5]
