"""Metadata of folders of videos: read, or refused in one sentence."""

import os
import shutil
import unicodedata

import pytest

from latentact.data.digest import Memo
from latentact.data.format import open_source
from latentact.errors import UserError
from wild import store, write_video


def opened(path, cache, camera=""):
    """Return the source at a path, or the sentence that refuses it."""
    try:
        return open_source(path, camera, Memo(cache, path))
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 700
    return message


METADATA = {
    "comma": ("metadata.csv", "file_name,task\na.mp4,push\n"),
    "semicolon": ("metadata.csv", "file_name;task\na.mp4;push\n"),
    "tab": ("metadata.csv", "file_name\ttask\na.mp4\tpush\n"),
    "mark": ("metadata.csv", "\ufefffile_name,task\na.mp4,push\n"),
    "case": ("metadata.csv", "File_Name,TASK\na.mp4,push\n"),
    "spaces": ("metadata.csv", "file_name, task\na.mp4, push\n"),
    "quotes": ("metadata.csv", '"file_name","task"\r\n"./a.mp4","push"\r\n'),
    "more_columns": ("metadata.csv", "id,task,file_name,\n1,push,a.mp4,,,\n"),
    "order": ("metadata.csv", "task,file_name\npush,a.mp4\n"),
    "lines": ("metadata.jsonl", '{"file_name": "a.mp4", "task": "push"}\n\n'),
    "lines_mark": ("metadata.jsonl", '\ufeff{"task": "push", "file_name": "a.mp4", "x": 1}'),
    "lines_case": ("metadata.jsonl", '{"File_Name": "a.mp4", "Task": "push"}'),
    "empty_rows": ("metadata.csv", "file_name;task\n;\na.mp4;push\n;\n;\n"),
    "two_slashes": ("metadata.csv", "file_name,task\n.//a.mp4,push\n"),
}
BAD_METADATA = {
    "number": ("metadata.jsonl", '{"file_name": "a.mp4", "task": 3}'),
    "list": ("metadata.jsonl", '["a.mp4"]'),
    "no_json": ("metadata.jsonl", "a.mp4 push"),
    "no_name": ("metadata.csv", "name,task\na.mp4,push\n"),
    "no_name_no_row": ("metadata.csv", "name,task\n"),
    "array": ("metadata.jsonl", '[{"file_name": "a.mp4", "task": "push"}]'),
    "name_null": ("metadata.jsonl", '{"file_name": null, "task": "x"}'),
    "open_quote": ("metadata.csv", 'file_name,task\n"a.mp4,push\n'),
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "a.mp4", 3)


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_of_videos_is_read(tmp_path, clip, kind):
    shutil.copy(clip, tmp_path / "a.mp4")
    name, text = METADATA[kind]
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    source = opened(tmp_path, tmp_path / "memo")
    assert (source.notes, [episode.task for episode in source.episodes]) == ([], ["push"])


@pytest.mark.parametrize("kind", BAD_METADATA)
def test_metadata_of_videos_that_does_not_fit_is_one_sentence(tmp_path, clip, kind):
    shutil.copy(clip, tmp_path / "a.mp4")
    name, text = BAD_METADATA[kind]
    (tmp_path / name).write_text(text)
    assert name in opened(tmp_path, tmp_path / "memo")


def test_metadata_of_utf16_is_read(tmp_path, clip):
    shutil.copy(clip, tmp_path / "a.mp4")
    (tmp_path / "Metadata.CSV").write_text("sep=;\nfile_name;task\na.mp4;schöb\n", encoding="utf-16")
    assert store(tmp_path).task_texts == ("schöb",)


CONTRADICTIONS = {
    "more_cells": ("metadata.csv", "file_name,task\na.mp4,push, gently\n", "more cells than the header"),
    "two_columns": (
        "metadata.csv",
        "file_name,task,Task\na.mp4,push,pull\n",
        "one column task, got task, Task",
    ),
    "same_column": (
        "metadata.csv",
        "file_name,task,task\na.mp4,push,pull\n",
        "one column task, got task, task",
    ),
    "two_names": ("metadata.csv", "file_name;File_Name ;task\na.mp4;b.mp4;x\n", "one column file_name, got"),
    "two_fields": (
        "metadata.jsonl",
        '{"file_name": "a.mp4", "task": "push", "TASK": "pull"}',
        "line 1 must have one column task, got task, TASK",
    ),
    "two_values": (
        "metadata.jsonl",
        '{"file_name": "a.mp4", "task": "push", "task": "pull"}',
        "line 1: 'task' must have one value, got 'push' and 'pull'",
    ),
    "surrogate": (
        "metadata.jsonl",
        '{"file_name": "a.mp4", "task": "\\ud800"}',
        "line 1 must be Unicode text",
    ),
    "two_tasks": ("metadata.csv", "file_name,task\na.mp4,push\na.mp4,pull\n", "has two tasks"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_metadata_that_contradicts_itself_is_refused(tmp_path, clip, kind):
    shutil.copy(clip, tmp_path / "a.mp4")
    name, text, sentence = CONTRADICTIONS[kind]
    (tmp_path / name).write_text(text)
    assert sentence in opened(tmp_path, tmp_path / "memo")


def test_two_tables_of_metadata_are_refused_and_line_breaks_in_quotes_are_kept(tmp_path, clip):
    shutil.copy(clip, tmp_path / "a.mp4")
    (tmp_path / "metadata.csv").write_text('file_name,task\na.mp4,"push\nit"\n')
    assert store(tmp_path).task_texts == ("push\nit",)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "task": "push"}\n')
    assert "must have one table of metadata" in opened(tmp_path, tmp_path / "memo")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_metadata_of_another_encoding_is_one_sentence(tmp_path, clip, encoding):
    shutil.copy(clip, tmp_path / "a.mp4")
    (tmp_path / "metadata.csv").write_text("file_name,task\na.mp4,schöb\n", encoding=encoding)
    message = opened(tmp_path, tmp_path / "memo")
    assert "must be UTF-8 text" in message


@pytest.mark.parametrize("text", ["", "file_name,task\n", "\n\n", "file_name\na.mp4\n"])
def test_metadata_without_tasks_gives_none(tmp_path, clip, text):
    shutil.copy(clip, tmp_path / "a.mp4")
    (tmp_path / "metadata.csv").write_text(text)
    assert store(tmp_path).task_texts == ("",)
    assert opened(tmp_path, tmp_path / "memo").notes == ["the metadata has no task"]


def test_accents_of_file_names_in_both_unicode_forms(tmp_path, clip):
    """macOS writes a name as letter and accent, Excel as one character."""
    shutil.copy(clip, tmp_path / unicodedata.normalize("NFD", "scène.mp4"))
    composed = unicodedata.normalize("NFC", "scène.mp4")
    (tmp_path / "metadata.csv").write_text(f"file_name,task\n{composed},push\n")
    source = opened(tmp_path, tmp_path / "memo")
    assert (source.notes, [episode.task for episode in source.episodes]) == ([], ["push"])


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_that_is_no_file_is_one_sentence(tmp_path, clip, name):
    shutil.copy(clip, tmp_path / "a.mp4")
    os.mkfifo(tmp_path / name)
    assert f"{name} must be a regular file, got a folder, pipe or device" in opened(
        tmp_path, tmp_path / "memo"
    )
