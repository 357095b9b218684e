"""Operations on guides, each by hand: values, lengths, codes and provenance."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import latentact
from latentact.errors import UserError
from latentact.guidance.dtw import align
from latentact.types import LatentActionSpec

SPEC = LatentActionSpec(
    model="lapo",
    tokens=1,
    token_dim=1,
    codebook_size=None,
    frame_gap=1,
    frame_gap_s=0.1,
    fps=10.0,
    resolution=32,
    camera="",
    weights="abc",
)
LEVELS = np.array([0.0, 1.0, 4.0], np.float32)
"""Vectors of the codes 0, 1, 2."""


def line(*values, still=None, name="a", **spec):
    """Return a guide of numbers without codes."""
    array = np.array(values, np.float32)[:, None, None]
    rest = None if still is None else np.full((2, 1, 1), still, np.float32)
    return latentact.Guide(
        spec=replace(SPEC, **spec),
        fps=10.0,
        vectors=array,
        continuous=array,
        codes=None,
        still=rest,
        provenance=(f"extract {name}",),
    )


def coded(*codes, **changes):
    """Return a guide of codes; `continuous` is 0.1 above the vectors."""
    given = {"codebook": LEVELS[None, :, None], **changes}
    vectors = LEVELS[list(codes)][:, None, None]
    return latentact.Guide(
        spec=replace(SPEC, codebook_size=3),
        fps=10.0,
        vectors=vectors,
        continuous=vectors + np.float32(0.1),
        codes=np.array(codes, np.int64)[:, None],
        **given,
    )


def values(guide, name="vectors"):
    found = getattr(guide, name)
    assert guide.valid.tolist() == [True] * len(guide)
    assert guide.vectors.dtype == guide.continuous.dtype == np.float32
    return found.reshape(len(guide)).tolist()


A, B = line(0, 1, 2, 3), line(10, 20, name="b")


@pytest.mark.parametrize(
    ("made", "expected", "last"),
    [
        (A.slice(1, 3), [1, 2], "slice 1:3"),
        (A.replace(range(1, 3), B), [0, 10, 20, 3], "replace 1:3 with (extract b)"),
        (A.replace(range(0, 4), B), [10, 20], "replace 0:4 with (extract b)"),
        (A.scale(0.5), [0, 0.5, 1, 1.5], "scale 0.5"),
        (line(0, 1, 2, still=4).scale(0.0), [4, 4, 4], "scale 0"),
        (line(0, 1, still=4).scale(2.0), [-4, -2], "scale 2"),
        (A.concat(B), [0, 1, 2, 3, 10, 20], "concat (extract b) after 0 steps"),
        (line(0, 1).concat(line(4, 8), 2), [0, 1, 2, 3, 4, 8], "concat (extract a) after 2 steps"),
        (A.time_warp(2.0), [0, 3], "time_warp 2"),
        (A.time_warp(4 / 7), [0, 0.5, 1, 1.5, 2, 2.5, 3], "time_warp 0.571429"),
        (A.time_warp(1000.0), [0], "time_warp 1000"),
        (A.interpolate(B, 0.5), [5, 8, 11.5], "interpolate to (extract b) at 0.5"),
        (A.smooth(3), [0.5, 1, 2, 2.5], "smooth 3"),
        (A.smooth(99), [1.5] * 4, "smooth 99"),
    ],
)
def test_operations_by_hand(made, expected, last):
    if last.startswith("interpolate"):  # steps 0, 1.5, 3 of the one, 0, 0.5, 1 of the other
        expected = [5, (1.5 + 15) / 2, 11.5]
    assert values(made) == pytest.approx(expected)
    assert values(made, "continuous") == pytest.approx(expected)
    assert made.provenance == ("extract a", last)
    assert made.codes is None


@pytest.mark.parametrize(
    "same",
    [
        A.scale(1.0),
        A.smooth(1),
        A.time_warp(1.0),
        A.slice(0, 4),
        A.interpolate(B, 0.0),
        B.interpolate(A, 1.0),
        latentact.Guide.blend([A, B], [2.0, 0.0]),
        latentact.Guide.blend([B, A, B], [0.0, 1.0, 0.0]),
    ],
)
def test_what_changes_nothing_is_bit_equal(same):
    assert values(same) == values(A)
    assert same.continuous.tobytes() == A.continuous.tobytes()


def test_dynamic_time_warping_by_hand():
    mine, theirs = align(np.array([[0.0], [5], [5], [1]]), np.array([[0.0], [5], [1], [1]]))
    assert mine.tolist() == [0, 1, 2, 3, 3]
    assert theirs.tolist() == [0, 1, 1, 2, 3]
    with pytest.raises(UserError, match=r"at most 25000000 pairs of steps to be aligned, got 6000 x 6000"):
        align(np.zeros((6000, 1)), np.zeros((6000, 1)))


def test_a_blend_averages_matched_steps_in_value_and_time():
    # The peak is at step 1 of the one and at step 3 of the other: that of their mean is at step 2.
    early, late = line(0, 8, 0, 0, 0), line(0, 0, 0, 4, 0)
    found = latentact.Guide.blend([early, late], [0.5, 0.5])
    assert values(found) == [0, 0, 6, 0, 0]
    assert values(latentact.Guide.blend([early, late], [3.0, 1.0])) == pytest.approx([0, 3.5, 3.5, 0, 0])
    assert found.provenance == ("blend 0.5 (extract a) + 0.5 (extract a)",)
    # lengths are averaged as well: 2 and 6 steps
    assert values(latentact.Guide.blend([line(1, 1), line(*[5] * 6)], [1.0, 1.0])) == [3, 3, 3, 3]
    three = latentact.Guide.blend([line(0, 0), line(3, 3), line(9, 9)], [1.0, 1.0, 1.0])
    assert values(three) == pytest.approx([4, 4])


def test_codes_are_mixed_by_their_vectors_and_rounded_to_the_nearest():
    a, b = coded(0, 0, 1), coded(2, 1, 2)
    half = a.interpolate(b, 0.5)  # 2, 0.5, 2.5; 0.5 is as close to 0 as to 1
    assert values(half, "codes") == [1, 0, 1]
    assert values(half) == [1, 0, 1]
    assert values(half, "continuous") == pytest.approx([2.1, 0.6, 2.6])
    assert values(a.interpolate(b, 0.75), "codes") == [2, 1, 2]
    assert values(a.scale(3.0), "codes") == [0, 0, 2]
    assert values(b.smooth(3), "codes") == [1, 2, 1]  # 2.5, 3, 2.5
    assert values(a.concat(b, 1), "codes") == [0, 0, 1, 1, 2, 1, 2]  # 2.5 is as close to 1 as to 4
    assert values(latentact.Guide.blend([a, b], [0.0, 1.0]), "codes") == [2, 1, 2]
    assert values(b.time_warp(0.5), "codes") == [2, 2, 1, 1, 2, 2]  # the nearest step, never a third code
    one = b.set_code(range(1, 3), 0)
    assert (values(one, "codes"), values(one)) == ([2, 0, 0], [4, 0, 0])
    assert values(one, "continuous") == pytest.approx([4.1, 0, 0])
    assert one.provenance == ("set_code 1:3 0",)
    assert values(b, "codes") == [2, 1, 2]


def test_residual_codes_are_rounded_one_after_the_other():
    # Two codebooks that refine each other: 0 or 10, plus 0, 1 or 2 (the third entry of the first: 20).
    table = np.array([[[0, 0], [10, 0], [20, 0]], [[0, 0], [1, 0], [2, 0]]], np.float32)
    zeros = np.zeros((1, 2, 1), np.float32)
    guide = latentact.Guide(
        spec=replace(SPEC, tokens=2, codebook_size=3),
        fps=10.0,
        vectors=zeros,
        continuous=zeros,
        codes=np.zeros((1, 2), np.int64),
        codebook=table,
    )
    edited = guide.set_code(range(1), [1, 2])
    assert edited.vectors.ravel().tolist() == [12, 0]
    assert edited.scale(1.75).codes.tolist() == [[2, 1]]  # 21
    assert guide.set_code(range(1), 1).vectors.ravel().tolist() == [11, 0]


def test_a_guide_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        A.vectors[0] = 1
    with pytest.raises(AttributeError):
        A.fps = 5.0


@pytest.mark.parametrize("guide", [A.scale(0.3), line(1, 2, still=3), coded(0, 2, 1).scale(0.3)])
def test_a_file_is_bit_equal(guide, tmp_path):
    for path in (tmp_path / "a.safetensors", tmp_path / "folder"):
        guide.save(path)
        found = latentact.Guide.load(path)
        assert (found.spec, found.fps, found.provenance) == (guide.spec, guide.fps, guide.provenance)
        for name in ("vectors", "continuous", "codes", "codebook", "still"):
            mine, theirs = getattr(guide, name), getattr(found, name)
            assert (mine is None) == (theirs is None)
            assert mine is None or (mine.dtype, mine.tobytes()) == (theirs.dtype, theirs.tobytes())
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda: A.slice(2, 5), "a range within the 4 steps of the guide, got 2 to 5"),
        (lambda: A.slice(2, 2), "a range within the 4 steps of the guide, got 2 to 2"),
        (lambda: A.replace(range(0, 4, 2), B), "a range within the 4 steps"),
        (lambda: A.scale(float("nan")), "factor of scale must be between -1000 and 1000, got nan"),
        (lambda: line(1e37).scale(100.0).save("no"), "values of a guide must be finite, got NaN or infinity"),
        (lambda: A.time_warp(0.0), "speed of time_warp must be between 0.001 and 1000, got 0"),
        (lambda: A.smooth(4), "window of smooth must be odd and between 1 and 100001, got 4"),
        (lambda: A.interpolate(B, 1.5), "t of interpolate must be between 0 and 1, got 1.5"),
        (lambda: A.concat(B, -1), "transition must be between 0 and 100000 steps, got -1"),
        (lambda: A.set_code(range(1), 0), "set_code needs a guide with codes, but lapo has none"),
        (lambda: coded(0).set_code(range(1), 3), r"integers from 0 to 2, got \[3\]"),
        (lambda: coded(0).set_code(range(1), [0, 1]), r"must be one or 1 integers from 0 to 2, got \[0, 1\]"),
        (lambda: coded(0, codebook=None).scale(2.0), "needs the codebook of lapo, but the guide has none"),
        (lambda: latentact.Guide.blend([A, B], [1.0]), "one weight per guide, got 1 for 2 guides"),
        (lambda: latentact.Guide.blend([A, B], [0.0, 0.0]), "at least one above 0, got 0, 0"),
        (lambda: latentact.Guide.blend([A, B], [-1.0, 2.0]), "weights must be between 0 and 1e9"),
        (lambda: latentact.Guide.blend([], []), "got 0 for 0 guides"),
        (lambda: A.concat(line(1, weights="xyz")), "one LAM, .* got weights 'abc' and 'xyz'"),
        (lambda: A.interpolate(line(1, frame_gap=2), 0.5), "frame gap, .* got frame_gap 1 and 2"),
        (lambda: A.replace(range(1), line(1, camera="top")), "camera, got camera '' and 'top'"),
        (lambda: latentact.Guide.blend([A, coded(0)], [1.0, 1.0]), "got codebook_size None and 3"),
        (lambda: A.concat(replace(B, fps=5.0)), "got rate 10.0 and 5.0"),
    ],
)
def test_what_does_not_fit_is_one_sentence(edit, message):
    with pytest.raises(UserError, match=message):
        edit()


def test_hostile_files_are_one_sentence(tmp_path):
    file = tmp_path / "guide.safetensors"
    coded(0, 1).save(file)
    tensors, about = load_file(file), {"spec": dict(vars(replace(SPEC, codebook_size=3))), "fps": 10.0}

    def attempt(message, changes=None, **metadata):
        text = {"latentact": json.dumps({**about, **metadata})}
        save_file({**tensors, **(changes or {})}, file, metadata=text)
        with pytest.raises(UserError, match=message):
            latentact.Guide.load(file)

    attempt("provenance must be a valid list", provenance="scale")
    attempt("at most 1000 characters", provenance=["x" * 1001])
    attempt("half of a character", provenance=["\ud800"])
    attempt("fps must be", fps=-1.0)
    attempt(r"'codebook' of float32 \[1, 3, 1\], got float32 \[1, 4, 1\]", {"codebook": torch.zeros(1, 4, 1)})
    attempt(r"'still' of float32 \[2, 1, 1\], got float64", {"still": torch.zeros(2, 1, 1).double()})
    attempt("finite numbers, got NaN or inf in 'codebook'", {"codebook": torch.full((1, 3, 1), torch.inf)})
    attempt("codes from 0 to 2, got 7 to 7", {"codes": torch.full((2, 1), 7)})


def test_long_provenance_is_shortened():
    guide = line(1, 2, name="x" * 900)
    for _ in range(3):
        guide = latentact.Guide.blend([guide, guide], [1.0, 1.0])
    assert len(guide.provenance) == 1
    assert len(guide.provenance[0]) == 1000


def test_rates_that_agree_elsewhere_agree_here():
    assert len(A.concat(replace(B, fps=9.99))) == len(A) + len(B)
