"""Numeric columns as tables really hold them: nulls, NaN, sizes, nesting, classes, tasks of rows."""

import numpy as np
import pyarrow as pa
import pytest

from latentact.data.windows import Clips
from latentact.errors import UserError
from latentact.types import ActionSpace
from wild import (
    ACTION,
    EPISODE,
    STATE,
    TOP,
    action_of,
    actions,
    change_tables,
    encoded,
    floats,
    image_cell,
    lerobot,
    numbered,
    numbers,
    state_of,
    store,
    with_column,
    write_lines,
)

F32 = pa.list_(pa.float32())
STATES = np.array([[e + i / 100, 0.5] for e, n in enumerate((8, 6)) for i in range(n)], np.float32)
ACTIONS = np.array([[100.0 * e + i, 1.0] for e, n in enumerate((8, 6)) for i in range(n)], np.float32)
EITHER = pytest.mark.parametrize("version", [2, 3])
IMAGES = {"cell": image_cell}


def classes(dtype="int64", names=None):
    return {"dtype": dtype, "shape": [1], "names": names}


def replaced(values, row, value, kind=F32):
    """Return a column maker whose row `row` of episode 0 (negative: of each) holds `value`."""

    def make(e, n):
        rows = values(e, n)
        if row < 0 or e == 0:
            rows[row] = value
        return pa.array(rows, kind)

    return make


# --- nulls and NaN (F05, F06)


@EITHER
def test_a_null_last_action_stays_in_its_row(tmp_path, version):
    columns = {ACTION: (floats(2), replaced(action_of, -1, None))}
    read = store(lerobot(tmp_path / "d", version, columns=columns, **IMAGES))
    want = ACTIONS.copy()
    want[[7, 13]] = np.nan
    np.testing.assert_array_equal(actions(read, [0, 1]), want)
    np.testing.assert_array_equal(read.state, STATES)


@pytest.mark.parametrize("value", [None, [None, 1.0], [float("nan"), 1.0], [float("inf"), 1.0], []])
@pytest.mark.parametrize("row", [0, 3])
@EITHER
def test_an_action_that_is_no_number_names_its_row_and_can_be_left_out(tmp_path, value, row, version):
    columns = {ACTION: (floats(2), replaced(action_of, row, value))}
    root = lerobot(tmp_path / "d", version, columns=columns, **IMAGES)
    with pytest.raises(UserError, match=rf"column action: 1 rows are .* row {row} of episode 0; repair"):
        actions(store(root), [0, 1])
    np.testing.assert_array_equal(actions(store(root), [1])[8:], ACTIONS[8:])
    read = store(root, drop_nonfinite=True)
    assert read.usable.tolist() == [i != row for i in range(14)]
    want = ACTIONS.copy()
    want[row] = np.nan
    np.testing.assert_array_equal(actions(read, [0, 1]), want)
    rows = Clips(read, episodes=[0, 1], frame_gap=1).rows
    assert row not in rows
    assert row - 1 not in rows


@pytest.mark.parametrize("value", [None, [0.1, None], [float("nan"), 1.0], [1.0, -float("inf")]])
@EITHER
def test_a_state_that_is_no_number_names_its_row_and_can_be_left_out(tmp_path, value, version):
    columns = {STATE: (floats(2), replaced(state_of, -2, value))}
    root = lerobot(tmp_path / "d", version, columns=columns, **IMAGES)
    with pytest.raises(UserError, match=r"column observation.state: 2 rows are .* row 6 of episode 0"):
        _ = store(root).state
    read = store(root, drop_nonfinite=True)
    keep = np.array([i not in (6, 12) for i in range(14)])
    np.testing.assert_array_equal(read.usable, keep)
    np.testing.assert_array_equal(read.state[keep], STATES[keep])
    assert np.isfinite(read.state).all()
    assert not read.transitions(2)[[4, 6, 10, 12]].any()


def test_a_column_of_nulls_alone_is_one_sentence_or_nothing(tmp_path):
    columns = {STATE: (floats(2), lambda e, n: pa.nulls(n))}
    root = lerobot(tmp_path / "d", 2, columns=columns, **IMAGES)
    with pytest.raises(UserError, match=r"observation.state"):
        _ = store(root).state
    read = store(
        lerobot(tmp_path / "a", 2, columns={ACTION: (floats(2), lambda e, n: pa.nulls(n))}, **IMAGES)
    )
    assert read.num_frames == 14
    with pytest.raises(UserError, match="column action"):
        actions(read, [0])


# --- how numbers are stored


def list_of(kind, wrap=pa.list_):
    return lambda e, n: pa.array(state_of(e, n), wrap(kind))


STORED = {
    "float64": list_of(pa.float64()),
    "float16": lambda e, n: pa.array(
        [[np.float16(x) for x in row] for row in state_of(e, n)], pa.list_(pa.float16())
    ),
    "large_list": list_of(pa.float32(), pa.large_list),
    "fixed_size_list": list_of(pa.float32(), lambda kind: pa.list_(kind, 2)),
    "nested_lists": lambda e, n: pa.array([[row] for row in state_of(e, n)], pa.list_(F32)),
    "nested_halves": lambda e, n: pa.array([[[a], [b]] for a, b in state_of(e, n)], pa.list_(F32)),
    "dictionary": lambda e, n: pa.array([[0.5, 0.5]] * n, pa.list_(pa.float32())),
}


@pytest.mark.parametrize("kind", STORED)
@EITHER
def test_a_state_is_read_however_its_numbers_are_stored(tmp_path, kind, version):
    columns = {STATE: (floats(2), STORED[kind])}
    try:
        root = lerobot(tmp_path / "d", version, columns=columns, **IMAGES)
    except (pa.ArrowException, TypeError) as error:
        pytest.skip(f"Arrow cannot write it ({error})")
    read = store(root)
    want = np.full((14, 2), 0.5, np.float32) if kind == "dictionary" else STATES
    np.testing.assert_allclose(read.state, want, rtol=1e-3)
    assert read.state.dtype == np.float32


SCALARS = {
    "int32": (pa.int32(), "int32"),
    "uint8": (pa.uint8(), "uint8"),
    "bool": (pa.bool_(), "bool"),
    "int8": (pa.int8(), "int8"),
    "uint64": (pa.uint64(), "uint64"),
    "float64": (pa.float64(), "float64"),
}


@pytest.mark.parametrize("kind", SCALARS)
@pytest.mark.parametrize("shape", [[], [1]])
@EITHER
def test_a_scalar_has_a_number_per_row(tmp_path, kind, shape, version):
    arrow, dtype = SCALARS[kind]
    feature = {"dtype": dtype, "shape": shape, "names": None}
    column = {"next.reward": (feature, lambda e, n: pa.array([i % 2 for i in range(n)]).cast(arrow))}
    read = store(lerobot(tmp_path / "d", version, columns=column, **IMAGES))
    assert read.column("next.reward").tolist() == [*[0, 1] * 4, *[0, 1] * 3]


def test_a_dictionary_of_numbers_is_read(tmp_path):
    feature = {"dtype": "int64", "shape": [1], "names": None}
    column = {"phase": (feature, lambda e, n: pa.array([7 * (i % 2) for i in range(n)]).dictionary_encode())}
    read = store(lerobot(tmp_path / "d", 2, columns=column, **IMAGES))
    assert read.column("phase").tolist() == [*[0, 7] * 4, *[0, 7] * 3]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([[1.0, 2.0, 3.0]], "must have 2 values in every row, got 3 in row 0"),
        ([[1.0]], "must have 2 values in every row, got 1 in row 0"),
        ([{"x": 1.0, "y": 2.0}], "must hold numbers, got struct"),
        (["0.1"], "must hold numbers, got string"),
        ([[["a", "b"]]], "must hold numbers, got"),
    ],
    ids=["more", "fewer", "struct", "text", "nested_text"],
)
def test_a_state_of_another_kind_is_one_sentence(tmp_path, values, words):
    root = lerobot(tmp_path / "d", 2, columns={STATE: (floats(2), lambda e, n: values * n)}, **IMAGES)
    with pytest.raises(UserError, match=r"column observation.state must .*") as error:
        _ = store(root).state
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_row_of_another_size_is_named(tmp_path):
    columns = {STATE: (floats(2), replaced(state_of, 4, [1.0, 2.0, 3.0]))}
    with pytest.raises(UserError, match="must have 2 values in every row, got 3 in row 4"):
        _ = store(lerobot(tmp_path / "d", 3, columns=columns, **IMAGES)).state


@pytest.mark.parametrize("kind", [pa.int32(), pa.uint16(), pa.int8(), pa.float64()])
@EITHER
def test_counters_of_any_type_place_their_rows(tmp_path, kind, version):
    def narrow(table):
        for name in ("episode_index", "frame_index", "index", "task_index"):
            place = table.schema.get_field_index(name)
            table = table.set_column(place, name, table[name].cast(kind))
        return table

    read = store(change_tables(lerobot(tmp_path / "d", version, **IMAGES), narrow))
    assert numbers(read.frames) == [*range(8), *range(20, 26)]
    assert read.task_texts == ("push",)


@EITHER
def test_an_empty_table_among_others_holds_no_rows(tmp_path, version):
    root = lerobot(tmp_path / "d", version, lengths=(4, 3, 5), split=True, **IMAGES)
    middle = sorted((root / "data").rglob("*.parquet"))[1]
    change_tables(root, lambda table: table.slice(0, 0), middle.relative_to(root))
    read = store(root)
    assert numbers(read.frames) == [0, 1, 2, 3, *range(40, 45)]
    np.testing.assert_array_equal(
        read.state[:, 0], np.float32([0, 0.01, 0.02, 0.03, 2, 2.01, 2.02, 2.03, 2.04])
    )


@EITHER
def test_tables_without_any_row_are_one_sentence(tmp_path, version):
    root = change_tables(lerobot(tmp_path / "d", version, **IMAGES), lambda table: table.slice(0, 0))
    with pytest.raises(UserError, match="but has the files of none"):
        store(root)


def test_rows_of_an_episode_that_lie_apart_are_one_sentence(tmp_path):
    def mix(table):
        return pa.concat_tables([table.slice(0, 4), table.slice(8), table.slice(4, 4)])

    with pytest.raises(UserError, match="must hold the rows of episode 0 together"):
        store(change_tables(lerobot(tmp_path / "d", 3, **IMAGES), mix))


def test_a_row_that_stands_twice_is_read_as_two_rows_with_a_note(tmp_path, caplog):
    def repeat(table):
        return table.take(np.repeat(np.arange(len(table)), 1 + (np.arange(len(table)) == 2)))

    read = store(change_tables(lerobot(tmp_path / "d", 2, **IMAGES), repeat))
    assert numbers(read.frames[:5]) == [0, 1, 2, 2, 3]
    assert read.timestamps[:5] == pytest.approx(np.arange(5) / 10)
    assert "column timestamp must increase" in caplog.text


# --- discrete actions (F14, F15)


@pytest.mark.parametrize(
    ("values", "space"),
    [
        ([-1, 0, 1], ActionSpace(kind="discrete", size=3, values=(-1, 0, 1))),
        ([0, 5, 10], ActionSpace(kind="discrete", size=3, values=(0, 5, 10))),
        ([-3], ActionSpace(kind="discrete", size=1, values=(-3,))),
        ([2**40, 7, -(2**40)], ActionSpace(kind="discrete", size=3, values=(-(2**40), 7, 2**40))),
        ([0, 1, 2], ActionSpace(kind="discrete", size=3)),
        ([1, 2], ActionSpace(kind="discrete", size=2, values=(1, 2))),
        ([0], ActionSpace(kind="discrete", size=1)),
    ],
)
@EITHER
def test_discrete_actions_are_classes_of_the_values_that_occur(tmp_path, values, space, version):
    columns = {ACTION: (classes(), lambda e, n: [values[i % len(values)] for i in range(n)])}
    read = store(lerobot(tmp_path / "d", version, columns=columns, **IMAGES))
    assert read.action_space == space
    order = sorted(values)
    want = [order.index(values[i % len(values)]) for n in (8, 6) for i in range(n)]
    assert actions(read, [0, 1]).tolist() == want
    assert actions(read, [1]).tolist() == [*[-1] * 8, *want[8:]]


@pytest.mark.parametrize("kind", [pa.int32(), pa.uint8(), pa.int8(), pa.bool_()])
def test_discrete_actions_of_any_whole_type(tmp_path, kind):
    columns = {ACTION: (classes(str(kind)), lambda e, n: pa.array([i % 2 for i in range(n)]).cast(kind))}
    read = store(lerobot(tmp_path / "d", 2, columns=columns, **IMAGES))
    assert read.action_space == ActionSpace(kind="discrete", size=2)
    assert actions(read, [0])[:4].tolist() == [0, 1, 0, 1]


def test_names_of_classes_count_classes_that_do_not_occur(tmp_path):
    feature = classes(names={"classes": ["left", "right", "up"]})
    columns = {ACTION: (feature, lambda e, n: [i % 2 for i in range(n)])}
    read = store(lerobot(tmp_path / "d", 2, columns=columns, **IMAGES))
    assert read.action_space == ActionSpace(kind="discrete", size=3)
    assert read.action_names == ("left", "right", "up")


@EITHER
def test_a_null_class_is_missing_and_not_another_class(tmp_path, version):
    columns = {
        ACTION: (classes(), replaced(lambda e, n: [i % 3 - 1 for i in range(n)], -1, None, pa.int64()))
    }
    read = store(lerobot(tmp_path / "d", version, columns=columns, **IMAGES))
    assert read.action_space == ActionSpace(kind="discrete", size=3, values=(-1, 0, 1))
    assert actions(read, [0, 1]).tolist() == [0, 1, 2, 0, 1, 2, 0, -1, 0, 1, 2, 0, 1, -1]


def test_too_many_classes_are_one_sentence(tmp_path):
    columns = {ACTION: (classes(), lambda e, n: [5000 * e + i for i in range(n)])}
    cells = {"cell": lambda e, i: {"bytes": encoded(numbered(0)), "path": None}}
    with pytest.raises(UserError, match="at most 4096 classes, got 5000"):
        store(lerobot(tmp_path / "d", 2, lengths=(5000,), columns=columns, **cells))


def npz(path, action, n=10, **more):
    obs = np.stack([numbered(i) for i in range(n)])
    np.savez(path, obs=obs, action=action, fps=10.0, **more)
    return path


def test_npz_actions_of_one_float_are_continuous(tmp_path):
    values = np.sin(np.arange(10) / 3)
    for name, action in (("a", values), ("b", values.astype(np.float16)), ("c", values[:, None])):
        read = store(npz(tmp_path / f"{name}.npz", action))
        assert read.action_space == ActionSpace(kind="continuous", size=1)
        np.testing.assert_allclose(actions(read, [0])[:, 0], values, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint8, bool])
def test_npz_actions_of_whole_numbers_are_classes(tmp_path, dtype):
    values = np.arange(10) % 2 if dtype in (np.uint8, bool) else np.arange(10) % 3 - 1
    read = store(npz(tmp_path / "a.npz", values.astype(dtype)))
    assert read.action_space is not None
    assert read.action_space.size == len(np.unique(values))
    assert actions(read, [0]).tolist() == (values - values.min()).tolist()


def test_npz_actions_that_are_nan_name_their_row(tmp_path):
    values = np.stack([np.arange(10.0), np.ones(10)], 1)
    values[[3, 4], 1] = np.nan
    with pytest.raises(UserError, match=r"column action: 2 rows are .* row 3 of"):
        store(npz(tmp_path / "a.npz", values)).actions([0])
    assert store(tmp_path / "a.npz", drop_nonfinite=True).usable.sum() == 8


# --- features and tables that do not fit each other (F21)


@EITHER
def test_features_that_the_tables_lack_are_left_out_with_a_note(tmp_path, version, caplog):
    columns = {
        "next.success": ({"dtype": "bool", "shape": [1], "names": None}, None),
        STATE: (floats(2), None),
    }
    read = store(lerobot(tmp_path / "d", version, columns=columns, **IMAGES))
    assert read.state is None
    assert read.column("next.success") is None
    assert "column next.success is missing from the tables and is ignored" in caplog.text


def test_a_column_that_is_no_feature_is_left_alone(tmp_path):
    extra = {"note": (None, lambda e, n: pa.array([{"a": [i]} for i in range(n)]))}
    read = store(lerobot(tmp_path / "d", 2, columns=extra, **IMAGES))
    assert read.column("note") is None


def test_a_camera_that_the_tables_lack_is_one_sentence(tmp_path):
    root = lerobot(tmp_path / "d", 2, **IMAGES)
    change_tables(root, lambda table: table.drop_columns([TOP]))
    with pytest.raises(UserError, match="must have a column for the camera"):
        store(root)


CELLS = {
    "bytes": (lambda e, i: encoded(numbered(EPISODE * e + i)), pa.binary()),
    "large_bytes": (lambda e, i: encoded(numbered(EPISODE * e + i)), pa.large_binary()),
    "bytes_alone": (
        lambda e, i: {"bytes": encoded(numbered(EPISODE * e + i))},
        pa.struct([("bytes", pa.binary())]),
    ),
    "other_order": (
        lambda e, i: {"path": None, "bytes": encoded(numbered(EPISODE * e + i))},
        pa.struct([("path", pa.large_string()), ("bytes", pa.large_binary())]),
    ),
}


@pytest.mark.parametrize("kind", CELLS)
def test_images_are_read_however_their_bytes_are_stored(tmp_path, kind):
    cell, arrow = CELLS[kind]
    read = store(lerobot(tmp_path / "d", 2, cell=cell, cell_type=arrow))
    assert numbers(read.frames) == [*range(8), *range(20, 26)]


@pytest.mark.parametrize(
    ("cell", "kind"),
    [
        (lambda e, i: numbered(i).tolist(), pa.list_(pa.list_(pa.list_(pa.uint8())))),
        (lambda e, i: numbered(i).ravel().tolist(), pa.list_(pa.uint8())),
        (lambda e, i: i, pa.int64()),
    ],
    ids=["nested", "flat", "number"],
)
def test_images_that_are_no_files_are_one_sentence(tmp_path, cell, kind):
    root = lerobot(tmp_path / "d", 2, cell=cell, cell_type=kind, lengths=(3,))
    with pytest.raises(UserError, match=r"must be encoded images .*, got (list|int64)"):
        store(root)


# --- tasks of rows (F18)


def per_row(tmp_path, version, **more):
    def rows(table):
        return with_column(table, "task_index", pa.array(np.arange(len(table)) % 8 // 4))

    listed = {"tasks": lambda e, n: ["reach", "push"], "texts": ("reach", "push")}
    return change_tables(
        lerobot(tmp_path / "d", version, lengths=(8, 8), **{**listed, **IMAGES, **more}), rows
    )


@EITHER
def test_a_task_that_changes_inside_an_episode_is_kept_by_row(tmp_path, version):
    read = store(per_row(tmp_path, version))
    texts = [read.task_texts[t] for t in read.task]
    assert texts == [*["reach"] * 4, *["push"] * 4] * 2


def test_a_task_index_without_a_text_falls_back_to_the_episodes_list(tmp_path):
    root = per_row(tmp_path, 2)
    write_lines(root / "meta/tasks.jsonl", [{"task_index": 0, "task": "reach"}])
    read = store(root)
    assert [read.task_texts[t] for t in read.task] == ["reach / push"] * 16
