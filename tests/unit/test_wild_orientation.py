"""Display matrices without an angle: FFmpeg's command line shows such videos as they are stored."""

import numpy as np
import pytest

from latentact.data.decode.video import decode, video_properties
from wild import ffmpeg_frames, numbers, turn, write_video


@pytest.mark.parametrize("matrix", [(0, 0, 0, 0), (1, 0, 0, 0), (0, 0, 0, 1), (0, 1, 0, 0), (-1, 0, 0, 0)])
def test_a_matrix_with_a_column_of_zeros_turns_nothing(tmp_path, matrix):
    path = turn(write_video(tmp_path / "a.mp4", 4), *matrix)
    frames = np.stack([frame for _, frame in decode(path)])
    assert numbers(frames) == [0, 1, 2, 3]
    assert video_properties(path).orientation == (1, 0, 0, 1)
    shown = ffmpeg_frames(path)
    if shown is not None:
        np.testing.assert_array_equal(frames, shown)
