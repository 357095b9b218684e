"""What holds for the repository as a whole: sizes, imports, help, experiments, documents, configuration."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

import latentact
from latentact.cli import app
from latentact.cli.flags import settings_as_flags
from latentact.cli.stage_command import FILE_COMMANDS
from latentact.composition import load_experiment, run_stage
from latentact.config import from_dict, to_dict
from latentact.device import supports_int8
from latentact.errors import UserError

ROOT = Path(__file__).parents[2]
CONF = ROOT / "src/latentact/conf"
LONG_FILES: dict[str, str] = {}
"""Files under src that may have more than 600 lines, and why."""
STAGES = {
    "train_lam": ("TrainLamConfig", ["data.path=DIR"]),
    "train_policy": ("TrainPolicyConfig", ["labels=DIR"]),
    "train_vla": ("TrainVlaConfig", ["labels=DIR"]),
    "finetune_vla": ("FinetuneVlaConfig", ["vla=DIR", "labels=DIR"]),
    "ground": ("GroundConfig", ["policy=DIR", "labels=DIR"]),
    "compare": ("CompareConfig", ["data.path=DIR", "env=babyai/GoToRedBall"]),
    "learn": ("LearnConfig", ["env=babyai/GoTo"]),
}
"""Stages that take Hydra overrides: their config, and what it requires."""
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]


def stage_config(stage: str) -> type:
    return getattr(importlib.import_module(f"latentact.stages.{stage}"), STAGES[stage][0])


def in_a_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- sizes and imports


def test_no_file_is_too_long() -> None:
    files = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in (ROOT / "src").rglob("*.py")
    }
    assert len(files) > 50
    assert {name for name, lines in files.items() if lines > 600} == set(LONG_FILES)


def test_no_two_public_classes_share_a_name() -> None:
    found: dict[str, list[str]] = {}
    for file in [*(ROOT / "src").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        for name in re.findall(r"^class ([A-Za-z]\w*)", file.read_text(), re.MULTILINE):
            found.setdefault(name, []).append(file.relative_to(ROOT).as_posix())
    several = {name: files for name, files in found.items() if len(files) > 1}
    assert not several


def test_import_does_not_import_torch() -> None:
    loaded = in_a_process("import latentact, sys; print(*sys.modules)").split()
    assert "latentact" in loaded
    assert "torch" not in loaded


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, latentact.cli; sys.argv = ['latentact', '--help']\n"
        "try: latentact.cli.main()\n"
        "except SystemExit as stop: print('exit', stop.code)\n"
        "print('modules', *sys.modules)"
    )
    shown, _, rest = in_a_process(code).partition("\nexit ")
    code, _, modules = rest.partition("\nmodules ")
    assert code == "0"
    assert all(name in shown for name in COMMANDS)
    assert not {"torch", "lightning", "hydra", "omegaconf", "lerobot", "av"} & set(modules.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0, result.output
    assert "Example" in result.output
    assert f"latentact {command}" in result.output


def test_hydra_commands_are_those_with_experiments() -> None:
    free = {name.replace("-", "_") for name, c in COMMANDS.items() if c.context_settings}
    assert free - {"dagger", "gail"} == set(STAGES)  # these two are `learn` with presets
    assert {path.name for path in CONF.iterdir() if (path / "__init__.py").exists()} == {*STAGES, "rollout"}


@pytest.mark.parametrize("name", latentact.__all__)
def test_public_names_import(name: str) -> None:
    assert getattr(latentact, name).__name__ == name


def test_unknown_public_name() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        latentact.no_such_name  # noqa: B018


# --- experiments


EXPERIMENTS = sorted((p.parts[-3], p.stem) for p in CONF.glob("*/experiment/*.yaml") if p.parts[-3] in STAGES)


@pytest.mark.parametrize(("stage", "experiment"), EXPERIMENTS)
def test_every_experiment_composes(stage: str, experiment: str) -> None:
    config, given = stage_config(stage), STAGES[stage][1]
    with_it = load_experiment(stage, config, [f"experiment={experiment}", *given])
    assert with_it != load_experiment(stage, config, given), "an experiment that changes nothing"
    yaml_file = CONF / stage / "experiment" / f"{experiment}.yaml"
    for key, value in leaves(yaml.safe_load(yaml_file.read_text())):
        found: Any = with_it
        for part in key.split("."):
            found = getattr(found, part)
        if key not in " ".join(given):
            assert to_dict(found) == value, key


def test_experiments_of_a_command_with_flags() -> None:
    flags = FILE_COMMANDS["rollout"].flags
    typed = ["seed=5", "experiment=lapo_xland", "smoke_test=true", "overwrite=false", "--record", "2"]
    words = settings_as_flags(typed, flags, "rollout")
    values = yaml.safe_load((CONF / "rollout/experiment/lapo_xland.yaml").read_text())
    given = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
    assert words == [*given, "--seed=5", "--smoke-test", "--record", "2"]  # of two values the last counts
    with pytest.raises(UserError, match="unknown experiment 'lapo_xlan'; did you mean 'lapo_xland'"):
        settings_as_flags(["experiment=lapo_xlan"], flags, "rollout")
    with pytest.raises(UserError, match="smoke_test must be true or false, got '1'"):
        settings_as_flags(["smoke_test=1"], flags, "rollout")


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        elif key != "defaults" and not key.startswith("override "):
            yield prefix + key, value


# --- documents


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


def command_lines() -> list[tuple[str, str]]:
    found = []
    for document in DOCUMENTS:
        for block in blocks(document, "bash"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [
                (str(document.relative_to(ROOT)), line) for line in lines if line.startswith("latentact ")
            ]
    return found


def check_line(line: str) -> None:
    """Raise where a command line names a command, flag or setting that does not exist."""
    _, name, *arguments = shlex.split(line, comments=True)
    if name not in COMMANDS:
        raise UserError(f"unknown command {name}")
    presets = [f"learner={name}"] if name in ("dagger", "gail") else []
    stage = "learn" if presets else name.replace("-", "_")
    if stage not in STAGES:
        COMMANDS[name].make_context(name, arguments)
    elif "--help" not in arguments:
        sweep = {"--multirun", "-m"} & set(arguments)
        plain = presets + [a for a in arguments if "=" in a]
        assert set(arguments) - set(plain) <= {"--multirun", "-m", "--cfg", "job"}, line
        load_experiment(
            stage,
            stage_config(stage),
            [re.sub(r"=([^\[,]*),.*", r"=\1", a) if sweep else a for a in plain],
        )


def test_documents_show_every_command() -> None:
    assert {line.split()[1] for _, line in command_lines()} == set(COMMANDS)


@pytest.mark.parametrize(("document", "line"), command_lines())
def test_documented_command_lines_exist(document: str, line: str) -> None:
    check_line(line)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("latentact no-such-command", "unknown command"),
        ("latentact collect pusht --out DIR --no-such-flag 3", "No such option"),
        ("latentact collect pusht --out DIR --episodes many", "valid int"),
        ("latentact label --lam DIR --data DIR", "Missing parameter: out"),
        ("latentact train-lam data.path=DIR training.no_such_setting=3", "unknown setting"),
        ("latentact train-lam data.path=DIR experiment=no_such", "unknown experiment"),
    ],
)
def test_wrong_command_lines_are_noticed(line: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        check_line(line)


def test_python_of_the_documents_runs(tmp_path: Path, blocks_folder: Path) -> None:
    from latentact.lams.models.lapo import LapoConfig

    lam = LapoConfig(backbone="patch", size=32, idm_channels=(8,), fdm_channels=(8,)).build()
    lam.save_pretrained(tmp_path / "runs/lam")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/red_ball").symlink_to(blocks_folder)
    found = [
        (document, block)
        for document in DOCUMENTS
        for block in blocks(document, "python")
        if document.name != "CONTRIBUTING.md" and ("int8" not in block or supports_int8("cpu"))
    ]
    assert {document.name for document, _ in found} >= {"README.md", "api.md", "learners.md"}
    in_a_process(f"import os; os.chdir({str(tmp_path)!r})\n" + "\n".join(block for _, block in found))


def test_python_of_the_contributing_guide_runs() -> None:
    found = blocks(ROOT / "CONTRIBUTING.md", "python")
    assert len(found) == 5, "a LAM, a bottleneck, a policy, a format, a suite"
    names = in_a_process(
        "\n".join(found)
        + "\nfrom latentact.lams.contract import LAMS\nfrom latentact.policies.contract import POLICIES\n"
        "for registry in (LAMS, QUANTIZERS, POLICIES, FORMATS, ENVS): print(*registry.names())"
    )
    for name in ("my_lam", "my_quantizer", "my_policy", "my_format", "my_suite"):
        assert name in names.split()


@pytest.fixture
def blocks_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "npz"
    folder.mkdir()
    obs = np.random.default_rng(0).integers(256, size=(32, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "play.npz", obs=obs, action=np.zeros(32, np.int64))
    return folder


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("furo", reason="the packages of `docs` are not installed")
    words = ["-W", "--keep-going", "-q", "-d", tmp_path / "doctrees", ROOT / "docs", tmp_path / "site"]
    in_a_process(
        f"import sys; from sphinx.cmd.build import main; sys.exit(main({[*map(str, words)]}))"
    )  # warnings, such as a broken link, are errors
    site = tmp_path / "site"
    pages = {str(path.relative_to(site).with_suffix("")) for path in site.rglob("*.html")}
    written = {str(path.relative_to(ROOT / "docs").with_suffix("")) for path in DOCUMENTS[2:]}
    assert written < pages
    commands, api = (site / "commands.html").read_text(), (site / "api.html").read_text()
    assert all(f'id="{name}"' in commands for name in COMMANDS)
    assert "--batch-size" in commands
    assert "lam.bottleneck.kind" in commands
    assert all(f'id="latentact.{name}"' in api for name in latentact.__all__)
    for page in site.rglob("*.html"):  # it works without a network
        assert not re.findall(
            r'(?:<script[^>]* src|<link[^>]* href|<img[^>]* src)="(?:https?:)?//', page.read_text()
        )


# --- configuration


class Recorder:
    """Stands for a stage: remembers what it was run with."""

    def __init__(self) -> None:
        self.runs: list[tuple[Any, Path]] = []

    def __call__(self, config: Any, out: Path) -> None:
        self.runs.append((config, out))


def record(*argv: str, stage: str = "train_lam") -> list[tuple[Any, Path]]:
    recorder = Recorder()
    run_stage(stage, stage_config(stage), recorder, [*argv], "latentact ...")
    return recorder.runs


def test_settings_reach_the_stage(tmp_path: Path) -> None:
    [(config, out)] = record(
        "data.path=DIR", f"out={tmp_path}/run", "lam=idm", "lam.channels=[8,16]", "training.steps=7"
    )
    assert out == tmp_path / "run"
    assert type(config).__name__ == "TrainLamConfig"
    assert config.lam.kind == "idm"
    assert config.lam.channels == (8, 16)
    assert config.training.steps == 7
    assert not out.exists(), "the stage makes its folder, once its input has been checked"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["data.resolutoin=3"], r"unknown setting 'data.resolutoin'; did you mean 'data.resolution'\?"),
        (["lam=lapp"], r"unknown lam 'lapp'; did you mean 'lapo'\? Known: .*idm"),
        (["experiment=babyia"], r"unknown experiment 'babyia'; did you mean 'babyai'\?"),
        (["trainin.steps=3"], r"unknown setting 'trainin'; did you mean 'training'\?"),
        (["lam.botleneck.kind=kl"], r"unknown setting 'lam.botleneck'; did you mean 'lam.bottleneck'\?"),
        (["training.steps=many"], r"^training\.steps must be of type Integer, got 'many'\.$"),
        (["data.strict=maybe"], r"maybe.*data\.strict"),
        (
            ["training=3"],
            r"^training is a group of settings; set one of them, for example t",
        ),
        (["lam.size=8"], r"lam.size must be between 32 and 256 pixels, got 8"),
    ],
)
def test_wrong_settings_are_one_sentence(argv: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        record("data.path=DIR", f"out={tmp_path}/run", *argv)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        load_experiment("train_lam", stage_config("train_lam"), ["data.path=DIR", *argv])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stage", "missing"),
    [("train_lam", "data.path"), ("ground", "policy"), ("compare", "data.path")],
)
def test_missing_settings_are_named(stage: str, missing: str) -> None:
    with pytest.raises(UserError, match=rf"{re.escape(missing)} is required; give it as KEY=VALUE"):
        record(stage=stage)


def test_sweeps_run_each_job_in_a_folder_of_its_own(tmp_path: Path) -> None:
    runs = record("--multirun", "data.path=DIR", f"out={tmp_path}/sweep", "training.seed=0,1")
    assert [config.training.seed for config, _ in runs] == [0, 1]
    folders = [out for _, out in runs]
    assert len(set(folders)) == 2
    assert all(folder.is_relative_to(tmp_path / "sweep") for folder in folders)


def test_unknown_flags_are_one_sentence() -> None:
    with pytest.raises(UserError, match=r"unknown flag '--multirn'.*did you mean '--multirun'"):
        record("data.path=DIR", "--multirn")


def test_cfg_job_prints_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    assert record("data.path=DIR", "training.steps=7", "--cfg", "job") == []
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["training"]["steps"] == 7
    assert shown["lam"]["kind"] == "lapo"


def registered() -> list[Any]:
    from latentact.lams.contract import LAMS
    from latentact.policies.contract import POLICIES

    return [registry.get(name) for registry in (LAMS, POLICIES) for name in registry.names()]


@pytest.mark.parametrize("config", registered(), ids=lambda config: config().kind)
def test_configs_survive_a_round_trip(config: Any) -> None:
    written = json.loads(json.dumps(to_dict(config())))
    assert from_dict(config, written) == config()
    with pytest.raises(UserError, match=r"unknown setting 'it.no_such'"):
        from_dict(config, {**written, "no_such": 1}, "it")


def test_stage_configs_survive_a_round_trip() -> None:
    for stage, (_, given) in STAGES.items():
        config = load_experiment(stage, stage_config(stage), given)
        assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


# --- packages outside


def test_a_package_outside_adds_a_lam(tmp_path: Path) -> None:
    (tmp_path / "outside_lam.py").write_text(
        "from dataclasses import dataclass\n"
        "from latentact.lams.contract import LAMS\n"
        "@LAMS.register('outside')\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class OutsideConfig:\n"
        "    kind: str = 'outside'\n"
        "    width: int = 3\n"
    )
    info = tmp_path / "outside_lam-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-lam\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[latentact.lams]\noutside = outside_lam\n")
    code = (
        "from latentact.composition import load_experiment\n"
        "from latentact.lams.contract import LAMS\n"
        "from latentact.stages.train_lam import TrainLamConfig\n"
        "given = ['data.path=DIR', 'lam=outside', 'lam.width=5']\n"
        "config = load_experiment('train_lam', TrainLamConfig, given)\n"
        "print(config.lam.width, *LAMS.names())"
    )
    width, *names = in_a_process(code, PYTHONPATH=str(tmp_path)).split()
    assert width == "5"
    assert {"outside", "lapo", "idm"} <= set(names)
