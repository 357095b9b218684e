"""`load_lam` and `convert-lam` on others' checkpoints: dispatch, safe pickles, LAPO's files."""

from __future__ import annotations

import json
import os
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from conftest import cli
from latentact.errors import UserError
from latentact.io.unpickle import read_pickled
from latentact.lams.contract import load_lam
from latentact.lams.models.lapo import Lapo, LapoConfig
from latentact.lams.models.laq import LaqConfig
from latentact.lams.models.villa_x import VillaXConfig
from latentact.quantizers.vq_ema import VqEmaConfig
from latentact.types import ActionSpace

TINY = LapoConfig(idm_scale=1, fdm_base=4, bottleneck=VqEmaConfig(dim=32, codebook_size=8))


class Logger:
    """Stands for doy's, which keeps every number it was given."""

    def __init__(self) -> None:
        self.history = {"loss": [1.0, 0.5]}


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `Logger` be pickled under the name that LAPO's files hold."""
    module = types.ModuleType("doy.logger")
    module.Logger = Logger  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "doy", types.ModuleType("doy"))
    monkeypatch.setitem(sys.modules, "doy.logger", module)
    monkeypatch.setattr(Logger, "__module__", "doy.logger")


def saved(model: Lapo, path: Path, prefix: str = "", **changes: Any) -> Path:
    """Write a model as LAPO's first stage does."""
    idm, wm = {}, {}
    for name, tensor in model.state_dict().items():
        if name.startswith("fdm."):
            wm[prefix + name.removeprefix("fdm.")] = tensor
        elif not name.startswith("action_"):
            name = name.replace("idm_head.", "policy_head.").replace("bottleneck.", "vq.")
            idm[prefix + name.removeprefix("idm.")] = tensor
    settings = OmegaConf.create({"model": {"la_dim": 32, "vq": {"decay": 0.999}}, "exp_name": "x"})
    whole = {"wm": wm, "idm": idm, "opt": {"state": {}}, "step": 7, "cfg": settings, "logger": Logger()}
    torch.save({**whole, **{k: v(whole[k]) if callable(v) else v for k, v in changes.items()}}, path)
    return path


@pytest.fixture
def model() -> Lapo:
    torch.manual_seed(0)
    return TINY.build().eval()


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_lapo_files_load(model: Lapo, tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(model, tmp_path / "idm_fdm.pt", prefix)
    for name in ("doy", "doy.logger"):  # whoever loads it has never heard of them
        monkeypatch.delitem(sys.modules, name)
    loaded = load_lam(path)
    assert loaded.config == TINY
    frames = torch.randint(0, 256, (2, 4, 3, 50, 70), dtype=torch.uint8)
    mine, theirs = model.encode(frames), loaded.encode(frames)
    assert torch.equal(mine.vectors, theirs.vectors)
    assert torch.equal(mine.codes, theirs.codes)  # type: ignore[arg-type]
    assert torch.equal(
        model.predict(frames, mine.vectors[:, -1]), loaded.predict(frames, mine.vectors[:, -1])
    )
    assert load_lam(tmp_path).spec == loaded.spec  # the folder does as well


@pytest.mark.usefixtures("foreign")
def test_convert_gives_the_same_numbers(model: Lapo, tmp_path: Path) -> None:
    path = saved(model, tmp_path / "idm_fdm.pt")
    done = cli("convert-lam", path, "--out", tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    published, ours = load_lam(path), load_lam(tmp_path / "ours")
    assert ours.spec == published.spec
    assert ours.spec.weights
    frames = torch.randint(0, 256, (1, 3, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(ours.encode(frames).vectors, published.encode(frames).vectors)
    again = cli("convert-lam", path, "--out", tmp_path / "ours")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "must be a new or empty folder" in again.stderr


def first_less(weights: dict) -> dict:
    return dict(list(weights.items())[1:])


BROKEN = {
    "missing weights": ({"wm": first_less}, "shapes"),
    "missing bias": (
        {"idm": lambda w: {k: v for k, v in w.items() if k != "fc.bias"}},
        "lacks 'idm.fc.bias'",
    ),
    "extra weights": ({"idm": lambda w: {**w, "stranger": torch.zeros(1)}}, "has unknown 'idm.stranger'"),
    "wrong shapes": ({"idm": lambda w: {**w, "fc.bias": torch.zeros(3)}}, "wrong shape for 'idm.fc.bias'"),
    "no codebook": ({"idm": lambda w: {**w, "vq.embedding": torch.zeros(3)}}, "shapes"),
    "a policy": ({"wm": 3}, "is not a published"),
}


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize(("changes", "sentence"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_lapo_files_are_one_sentence(
    model: Lapo, tmp_path: Path, changes: dict, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        load_lam(saved(model, tmp_path / "idm_fdm.pt", **changes))


@pytest.mark.usefixtures("foreign")
def test_truncated_files_are_one_sentence(model: Lapo, tmp_path: Path) -> None:
    path = saved(model, tmp_path / "idm_fdm.pt")
    whole = path.read_bytes()
    for size in (0, 10, 1000, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"not a complete `torch\.save` file"):
            load_lam(path)


@pytest.mark.usefixtures("foreign")
def test_flipped_bytes_are_told(model: Lapo, tmp_path: Path) -> None:
    path = saved(model, tmp_path / "idm_fdm.pt")
    whole = bytearray(path.read_bytes())
    at = whole.index(model.idm.fc.weight.detach().numpy().tobytes()[:64])
    whole[at] ^= 255
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"not a complete `torch\.save` file"):
        load_lam(path)


class Runs:
    """Unpickling it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def test_hostile_files_are_refused_and_nothing_runs(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for call in (Runs(os.system, f"touch {mark}"), Runs(exec, f"open({str(mark)!r}, 'w')"), Runs(Path, mark)):
        for zipped in (True, False):
            path = tmp_path / "evil.pt"
            torch.save({"idm": {}, "wm": {}, "evil": call}, path, _use_new_zipfile_serialization=zipped)
            with pytest.raises(UserError) as caught:
                load_lam(path)
            assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_what_is_read_is_plain(tmp_path: Path) -> None:
    settings = OmegaConf.create({"a": [1, 2]})
    torch.save({"x": torch.arange(3), "n": 2.5, "cfg": settings, "list": ["a"]}, tmp_path / "a.pt")
    values = read_pickled(tmp_path / "a.pt")
    assert values["x"].tolist() == [0, 1, 2]
    assert (values["n"], values["list"]) == (2.5, ["a"])
    assert type(values["cfg"]).__module__ == "latentact.io.unpickle"
    assert not vars(values["cfg"])
    torch.save([1], tmp_path / "b.pt")
    with pytest.raises(UserError, match="must contain a dict of weights, got list"):
        read_pickled(tmp_path / "b.pt")


def test_keywords(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="unknown setting 'windw' of load_lam; did you mean 'window'"):
        load_lam(tmp_path / "empty", windw="chunked")
    with pytest.raises(UserError, match=r"holds no config\.json and is not a published"):
        load_lam(tmp_path / "empty", window="chunked")
    TINY.build().save_pretrained(tmp_path / "lapo")
    with pytest.raises(UserError, match=r"unknown setting 'lam\.window'"):
        load_lam(tmp_path / "lapo", window="chunked")


@pytest.mark.usefixtures("foreign")
def test_keyword_of_another_format(model: Lapo, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'window' for a published lapo"):
        load_lam(saved(model, tmp_path / "idm_fdm.pt"), window="chunked")


def test_our_own_folder_takes_its_settings_as_keywords(tmp_path: Path) -> None:
    small = dict.fromkeys(("encoder_embed_dim", "decoder_embed_dim"), 16) | dict.fromkeys(
        ("encoder_depth", "decoder_depth", "encoder_n_heads", "decoder_n_heads", "map_heads"), 1
    )
    config = VillaXConfig(resolution=14, **small)
    config.build(ActionSpace(kind="discrete", size=2)).save_pretrained(tmp_path / "villa")
    assert load_lam(tmp_path / "villa", window="chunked").config == replace(config, window="chunked")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("microsoft/villa-x", ["lam/*"]),
        ("latent-action-pretraining/LAPA-7B-openx", ["laq_openx.pt"]),
        ("somebody/lam", ["*.json", "*.safetensors", "*.jinja"]),
    ],
)
def test_only_the_model_is_downloaded(
    name: str, wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repo_id: str, *, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    TINY.build().save_pretrained(tmp_path)
    load_lam(name)
    assert asked == [(name, wanted)]


BROKEN = {
    "no kind": (lambda c: c["lam"].update(kind=None), "config.json: unknown lam 'None'"),
    "a list as kind": (lambda c: c["lam"].update(kind=["laq"]), r"config.json: unknown lam .*laq"),
    "actions that are none": (
        lambda c: c.update(actions="all"),
        "actions must be a mapping of settings, got 'all'",
    ),
    "a size that nobody has": (
        lambda c: c["lam"].update(spatial_depth=10**15),
        "lam.spatial_depth must be between",
    ),
}


@pytest.fixture
def folder(tmp_path):
    """A small model of ours."""
    config = LaqConfig(size=32, patch=4, dim=16, heads=2, head_dim=8, spatial_depth=1, temporal_depth=1)
    config.build().save_pretrained(tmp_path / "lam")
    return tmp_path / "lam"


@pytest.mark.parametrize("name", BROKEN)
def test_settings_that_make_no_model_are_one_sentence(name, folder):
    change, said = BROKEN[name]
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said) as caught:
        load_lam(folder)
    assert "\n" not in str(caught.value)


def test_numbers_that_are_none_and_of_a_wrong_kind_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    for value, said in (
        (tensors[name] * torch.nan, "must contain finite numbers"),
        (tensors[name].to(torch.int64), "wrong dtype"),
    ):
        save_file(tensors | {name: value}, folder / "model.safetensors")
        with pytest.raises(UserError, match=said):
            load_lam(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"frame_gap": -1},
        {"fps": -3.0},
        {"frame_gap_s": float("nan")},
        {"frame_gap_s": 1e300},
        {"camera": "a\0b"},
        {"value_range": [0.0, 1.0]},
    ],
    ids=str,
)
def test_a_spec_that_says_nonsense_is_refused(folder, values):
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps(spec | values))
    with pytest.raises(UserError, match=r"spec.json: ") as caught:
        load_lam(folder)
    assert len(str(caught.value)) < 400


def test_settings_of_more_than_the_file_holds_cost_no_memory(folder):
    config = json.loads((folder / "config.json").read_text())
    config["lam"] |= {"dim": 1 << 14, "spatial_depth": 200}  # hundreds of gigabytes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"has a wrong shape for|lacks"):
        load_lam(folder)


def test_a_spec_of_another_model_is_refused(folder):
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps(spec | {"tokens": 99}))
    with pytest.raises(UserError, match="tokens must be 4, got 99"):
        load_lam(folder)


def test_other_weights_have_another_name(folder):
    before = load_lam(folder).spec.weights
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert load_lam(folder).spec.weights not in ("", before)
