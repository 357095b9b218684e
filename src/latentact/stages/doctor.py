"""Check the machine and the installation: `latentact doctor`.

Each check reports ok, warning or error, and a remedy. An error means that something that is installed, or
required by something installed, does not work. Libraries are imported inside the checks, so that a broken one
becomes a line of the result.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from latentact.errors import EXTRAS

GB = 10**9
LEROBOT_PLUGINS = ("lerobot_policy_latentact", "lerobot_env_latentact", "lerobot_robot_latentact_sim")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Check Python, devices, libraries, plugins, folders, the hub and the cluster."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the result."""

    name: str
    """Subject of the check."""
    status: str
    """ok, warning or error."""
    found: str
    """Finding."""
    advice: str = ""
    """Remedy; empty if none is needed."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All checks."""

    ok: bool
    """Whether there is no error."""
    checks: tuple[Check, ...]
    """Checks in order."""


def run(config: DoctorConfig) -> Diagnosis:
    """Run all checks."""
    checks = [found for name, check in CHECKS.items() for found in _guarded(name, check)]
    return Diagnosis(ok=all(check.status != "error" for check in checks), checks=tuple(checks))


def _guarded(name: str, check: Callable[[], Iterator[Check]]) -> list[Check]:
    """Run a check; an exception is reported as its error."""
    try:
        return [*check()]
    except Exception as error:  # a broken library may raise anything
        return [Check(name=name, status="error", found=_first_line(error), advice="Reinstall it.")]


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _python() -> Iterator[Check]:
    found = f"{platform.python_version()} in {sys.prefix}, {platform.system()} {platform.machine()}"
    fits = sys.version_info[:2] == (3, 12)
    yield Check(
        name="python",
        status="ok" if fits else "error",
        found=found,
        advice="" if fits else "Install Python 3.12.",
    )


def _torch() -> Iterator[Check]:
    import torch

    from latentact.device import supports_bf16, supports_int8

    kinds = [name for name, has in (("bf16", supports_bf16("cpu")), ("int8", supports_int8("cpu"))) if has]
    yield Check(
        name="torch",
        status="ok",
        found=f"{torch.__version__}, {torch.get_num_threads()} threads of {platform.processor() or 'a CPU'}, "
        f"{torch.backends.cpu.get_cpu_capability()}, natively fp32{''.join(f', {kind}' for kind in kinds)}",
    )
    backends = [name for name in ("gloo", "nccl") if torch.distributed.is_backend_available(name)]
    cuda = torch.cuda.is_available()
    for index in range(torch.cuda.device_count() if cuda else 0):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        found = f"{properties.name}, {properties.total_memory / GB:.0f} GB, {bf16}"
        yield Check(name=f"cuda:{index}", status="ok", found=found)
    if not cuda and Path("/dev/nvidiactl").exists():
        yield Check(
            name="cuda",
            status="error",
            found=f"an NVIDIA driver, which torch {torch.__version__} cannot use",
            advice="Install a build of torch for the version of CUDA that nvidia-smi shows.",
        )
    elif not cuda:
        mps = torch.backends.mps.is_available()
        yield Check(
            name="gpu", status="ok", found="Apple's mps" if mps else "none; only small models can be trained"
        )
    missing = cuda and "nccl" not in backends
    yield Check(
        name="distributed",
        status="warning" if missing else "ok",
        found=", ".join(backends) or "no backend",
        advice="Install a build of torch with NCCL to train on several GPUs." if missing else "",
    )


def _limits() -> Iterator[Check]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    given = [int(text) for file in limits if file.exists() and (text := file.read_text().strip()).isdecimal()]
    allowed = min([memory, *given])
    found = f"{allowed / GB:.0f} GB" + (f" of the machine's {memory / GB:.0f}" if allowed < memory else "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check(name="memory", status="ok", found=f"{found}, {cores} CPU cores")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = 0 <= files < 1024
    yield Check(
        name="open files",
        status="warning" if few else "ok",
        found=f"at most {files}",
        advice="Raise it with: ulimit -n 4096" if few else "",
    )
    if Path("/dev/shm").exists():
        shared = shutil.disk_usage("/dev/shm").total
        small = shared < GB
        yield Check(
            name="/dev/shm",
            status="warning" if small else "ok",
            found=f"{shared / GB:.1f} GB",
            advice="Keep training.num_workers=0, or start the container with --shm-size=8g." if small else "",
        )


def _video() -> Iterator[Check]:
    import av

    codecs = [name for name in ("h264", "hevc", "vp9", "av1") if name in av.codecs_available]
    version = ".".join(map(str, av.library_versions["libavcodec"]))
    yield Check(
        name="video",
        status="ok",
        found=f"PyAV {av.__version__} with its own FFmpeg (libavcodec {version}): {', '.join(codecs)}",
    )
    if _version("torchcodec"):
        try:
            importlib.import_module("torchcodec.decoders")
            yield Check(name="torchcodec", status="ok", found=f"{_version('torchcodec')}, loads")
        except Exception as error:
            yield Check(
                name="torchcodec",
                status="warning",
                found=f"{_version('torchcodec')} does not load ({_first_line(error)})",
                advice="Only LeRobot's streamed datasets need it; install FFmpeg's libraries, or use pyav.",
            )


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _extras() -> Iterator[Check]:
    """Check the requirements of every extra, and import the modules of those that are installed."""
    from packaging.requirements import Requirement

    lines = importlib.metadata.requires("latentact") or []
    requirements = [each for each in map(Requirement, lines) if each.name != "latentact"]
    base = [each for each in requirements if "extra" not in str(each.marker)]
    extras = {
        name: [r for r in requirements if r.marker and r not in base and r.marker.evaluate({"extra": name})]
        for name in sorted(importlib.metadata.metadata("latentact").get_all("Provides-Extra") or [])
    }
    for name, needed in {"latentact": base, **extras}.items():
        if name == "all":
            continue
        label = name if name == "latentact" else f"latentact[{name}]"
        missing = [each.name for each in needed if not _version(each.name)]
        wrong = [
            f"{each.name} {_version(each.name)}, not {each.specifier}"
            for each in needed
            if _version(each.name) and not each.specifier.contains(_version(each.name), prereleases=True)
        ]
        if missing and name != "latentact":
            found = f"not installed (without {', '.join(missing)})"
            yield Check(name=label, status="ok", found=found, advice=f"Install it: pip install '{label}'")
            continue
        broken = [text for module in _modules(name) if (text := _import_error(module))]
        problems = [*(f"{each} is missing" for each in missing), *wrong, *broken]
        yield Check(
            name=label,
            status="error" if problems else "ok",
            found="; ".join(problems) or ", ".join(f"{each.name} {_version(each.name)}" for each in needed),
            advice=f"Reinstall it: pip install --upgrade '{label}'" if problems else "",
        )


def _modules(extra: str) -> list[str]:
    return [module for module, name in EXTRAS.items() if name == extra]


def _import_error(module: str) -> str:
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{module} cannot be imported ({_first_line(error)})"
    return ""


def _plugins() -> Iterator[Check]:
    if _version("lerobot"):
        missing = [name for name in LEROBOT_PLUGINS if not _version(name)]
        yield Check(
            name="LeRobot plugins",
            status="warning" if missing else "ok",
            found=f"without {', '.join(missing)}" if missing else ", ".join(LEROBOT_PLUGINS),
            advice=f"Install for lerobot-train and similar commands: pip install plugins/{missing[0]}"
            if missing
            else "",
        )
    for point in importlib.metadata.entry_points():
        if not point.group.startswith("latentact."):
            continue
        try:
            point.load()
            yield Check(name=point.group, status="ok", found=f"{point.name} = {point.value}")
        except Exception as error:
            yield Check(
                name=point.group,
                status="error",
                found=f"{point.name} = {point.value} cannot be loaded ({_first_line(error)})",
                advice=f"Repair or remove the package {point.dist.name if point.dist else point.name}.",
            )


def _rendering() -> Iterator[Check]:
    try:
        egl = ctypes.CDLL("libEGL.so.1" if sys.platform == "linux" else "libEGL.dylib")
        egl.eglGetPlatformDisplay.restype = ctypes.c_void_p
        egl.eglGetPlatformDisplay.argtypes = [ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p]
        egl.eglInitialize.argtypes = [ctypes.c_void_p] * 3
        display = egl.eglGetPlatformDisplay(0x31DD, None, None)  # EGL_PLATFORM_SURFACELESS_MESA
        works = bool(egl.eglInitialize(display, None, None))
        found = "EGL starts without a screen" if works else "EGL does not start without a screen"
    except OSError:
        works, found = False, "no libEGL"
    yield Check(
        name="rendering",
        status="ok" if works else "warning",
        found=found,
        advice=""
        if works
        else "Only environments in MuJoCo need it: apt-get install libegl1, or set MUJOCO_GL=osmesa.",
    )


def _cache() -> Iterator[Check]:
    from latentact.data.cache import cache_folder

    folder = cache_folder("")
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free, kind = shutil.disk_usage(place).free, _file_system(place)
    status, advice = "ok", ""
    if not os.access(place, os.W_OK):
        status, advice = "error", "Set LATENTACT_CACHE to a folder that can be written."
    elif free < 10 * GB:
        status, advice = "warning", "Free some space (latentact cache --clear all), or set LATENTACT_CACHE."
    elif kind.startswith(("nfs", "cifs", "lustre")):
        status, advice = "warning", "Frames are read at random: set LATENTACT_CACHE to a local disk."
    found = f"{folder}, {free / GB:.0f} GB free{f', {kind}' if kind else ''}"
    yield Check(name="cache", status=status, found=found, advice=advice)


def _file_system(path: Path) -> str:
    """Return the file system type of a path; empty if unknown."""
    mounts = Path("/proc/mounts")
    lines = [line.split() for line in mounts.read_text().splitlines()] if mounts.exists() else []
    holding = [(len(line[1]), line[2]) for line in lines if path.resolve().is_relative_to(line[1])]
    return max(holding, default=(0, ""))[1]


def _hub() -> Iterator[Check]:
    from huggingface_hub import constants, get_token

    home = f"files in {constants.HF_HOME}"
    if constants.HF_HUB_OFFLINE:
        yield Check(name="hub", status="ok", found=f"offline by HF_HUB_OFFLINE; {home}")
        return
    try:
        with urllib.request.urlopen(f"{constants.ENDPOINT}/api/models?limit=1", timeout=5):
            login = "logged in" if get_token() else "not logged in"
            yield Check(name="hub", status="ok", found=f"{constants.ENDPOINT}, {login}; {home}")
    except OSError as error:
        yield Check(
            name="hub",
            status="warning",
            found=f"{constants.ENDPOINT} cannot be reached ({_first_line(error)}); {home}",
            advice="Give local folders as data and models, and set HF_HUB_OFFLINE=1 to avoid waiting.",
        )


def _slurm() -> Iterator[Check]:
    if not shutil.which("sbatch"):
        yield Check(name="SLURM", status="ok", found="not here")
        return
    if job := os.environ.get("SLURM_JOB_ID"):
        tasks, nodes = (os.environ.get(name, "1") for name in ("SLURM_NTASKS", "SLURM_NNODES"))
        yield Check(name="SLURM", status="ok", found=f"in job {job}: {tasks} tasks on {nodes} nodes")
        return
    done = _asked("sinfo", "--noheader", "--format=%P %D nodes")
    yield Check(
        name="SLURM",
        status="warning" if done.returncode else "ok",
        found=done.stderr.strip().rpartition("\n")[2]
        if done.returncode
        else "; ".join(done.stdout.split("\n")[:4]),
        advice="cluster=slurm needs a controller that responds; see sinfo." if done.returncode else "",
    )


def _asked(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=10)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 1, "", f"{words[0]} does not respond")


def _tools() -> Iterator[Check]:
    yield Check(name="Ray", status="ok", found=_version("ray") or "not installed")
    found = [name for name in ("apptainer", "enroot", "docker", "podman") if shutil.which(name)]
    yield Check(name="containers", status="ok", found=", ".join(found) or "no runtime found")


CHECKS: dict[str, Callable[[], Iterator[Check]]] = {
    "python": _python,
    "torch": _torch,
    "limits": _limits,
    "video": _video,
    "extras": _extras,
    "plugins": _plugins,
    "rendering": _rendering,
    "cache": _cache,
    "hub": _hub,
    "SLURM": _slurm,
    "tools": _tools,
}
"""Checks by name, in order."""


def summary(result: Diagnosis) -> str:
    """Return the result as text, one line per check."""
    width = max(len(check.name) for check in result.checks)
    lines = [
        f"{check.status:8s} {check.name:{width}s}  {check.found}"
        + (f"  -> {check.advice}" if check.advice else "")
        for check in result.checks
    ]
    errors = sum(check.status == "error" for check in result.checks)
    warnings = sum(check.status == "warning" for check in result.checks)
    last = f"{errors} errors, {warnings} warnings" if errors or warnings else "everything works"
    return "\n".join([*lines, last])
