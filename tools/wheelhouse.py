#!/usr/bin/env python3
"""Gather what a machine without network needs as wheels: this project and, pinned as in constraints.txt, all that it needs.

    python tools/wheelhouse.py wheelhouse --have torch triton numpy            # training and tests, for Python 3.12 on Linux x86-64
    python tools/wheelhouse.py wheelhouse --for distance --have torch triton   # small: the distance, its kernels' tests and benchmarks
    python tools/wheelhouse.py wheelhouse --only deepspeed hjson               # these and nothing they need

Run it where there is a network; the folder holds wheels and `manifest.json` (name, version, bytes, SHA-256). What exists as source only is
built here if that gives a wheel for any machine. What could not be had is said, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import email
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
PROJECT = "vcd-fast"
MIB = 2**20
OLDEST_GLIBC, DEFAULT_GLIBC = 5, 28
OLD_NAMES = {"2.5": "manylinux1", "2.12": "manylinux2010", "2.17": "manylinux2014"}
"""of manylinux tags, before they said which glibc they need"""
EXTRAS = {"all": ("train", "test"), "training": ("train",), "distance": ()}
"""what each choice of --for takes of the extras of setup.py"""
DISTANCE_TOOLS = ("pytest", "pytest-benchmark", "pytest-xdist", "hypothesis")
"""with the core of the package, all that the tests of the kernels and the benchmarks import"""

Fetch = Callable[[str, Requirement], "Wheel"]
"""(what to download, such as "rich==15.0.0"; the requirement behind it) -> the wheel"""


class Unavailable(Exception):
    """A package cannot be had as a wheel for the target; the message says why."""


@dataclasses.dataclass(frozen=True)
class Wheel:
    name: str
    version: str
    path: Path
    requires: tuple[str, ...]
    """its Requires-Dist"""


@dataclasses.dataclass(frozen=True)
class Target:
    """The machine the wheels are for. `python` as "3.12"; `platforms` as pip's tags."""

    python: str
    machine: str
    platforms: tuple[str, ...]

    def environment(self) -> dict[str, str]:
        """What markers of requirements are judged by."""
        return {
            **default_environment(),
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "sys_platform": "linux",
            "platform_system": "Linux",
            "os_name": "posix",
            "platform_machine": self.machine,
        }

    def pip_options(self) -> list[str]:
        chosen = ["--only-binary=:all:", "--python-version", self.python, "--implementation", "cp"]
        return [*chosen, *(word for tag in self.platforms for word in ("--platform", tag))]


def platform_tags(machine: str, glibc: int = DEFAULT_GLIBC) -> tuple[str, ...]:
    """Every tag that Linux with glibc 2.`glibc` takes, newest first: pip compares them as text."""
    tags = []
    for minor in range(glibc, OLDEST_GLIBC - 1, -1):
        tags.append(f"manylinux_2_{minor}_{machine}")
        if old := OLD_NAMES.get(f"2.{minor}"):
            tags.append(f"{old}_{machine}")
    return (*tags, f"linux_{machine}")


def read_pins(text: str) -> dict[str, str]:
    """Canonical name -> version, of the lines NAME==VERSION of constraints.txt."""
    found = (re.fullmatch(r"\s*([A-Za-z0-9._-]+)==(\S+)\s*", line.split("#")[0]) for line in text.splitlines())
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def roots(own: Sequence[str], purpose: str, environment: dict[str, str]) -> list[Requirement]:
    """What `purpose` (a key of `EXTRAS`) needs of this project's own requirements, their extras resolved."""
    extras = {"", *EXTRAS[purpose]}
    found = [r for r in map(Requirement, own) if applies(r, extras, environment)]
    if purpose == "distance":
        tools = [r for r in map(Requirement, own) if applies(r, {"test"}, environment) and r.name in DISTANCE_TOOLS]
        found += tools
    return found


def applies(requirement: Requirement, extras: Iterable[str], environment: dict[str, str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({**environment, "extra": extra}) for extra in extras)


@dataclasses.dataclass
class Gathered:
    wheels: dict[str, Wheel] = dataclasses.field(default_factory=dict)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    """name -> why"""
    notes: list[str] = dataclasses.field(default_factory=list)


def gather(
    wanted: Sequence[Requirement],
    pins: dict[str, str],
    have: dict[str, str | None],
    environment: dict[str, str],
    fetch: Fetch,
    follow: bool = True,
) -> Gathered:
    """Fetch `wanted` and, if `follow`, all that those need, but for what the other machine has.

    Args:
        pins: canonical name -> version to take.
        have: canonical name -> version on the other machine, None where it was not told.
    """
    found, seen, queue = Gathered(), set(), list(wanted)
    while queue:
        requirement = queue.pop(0)
        name, version = canonicalize_name(requirement.name), None
        if name in have:
            version = have[name]
            if version and not requirement.specifier.contains(version, prereleases=True):
                found.notes.append(
                    f"{name} {version} is there, but {requirement.name}{requirement.specifier} is asked for"
                )
            continue
        extras = frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if name not in found.wheels and name not in found.missing:
            try:
                found.wheels[name] = fetch(_pinned(requirement, pins, found.notes), requirement)
            except Unavailable as error:
                found.missing[name] = str(error)
        if follow and name in found.wheels:
            needs = map(Requirement, found.wheels[name].requires)
            queue += [need for need in needs if applies(need, extras or {""}, environment)]
    return found


def _pinned(requirement: Requirement, pins: dict[str, str], notes: list[str]) -> str:
    pin = pins.get(canonicalize_name(requirement.name))
    if pin is None:
        notes.append(f"{requirement.name} is not in constraints.txt: the newest that fits is taken")
        return f"{requirement.name}{requirement.specifier}"
    if not requirement.specifier.contains(pin, prereleases=True):
        notes.append(f"constraints.txt has {requirement.name} {pin}, but {requirement.specifier} is asked for")
    return f"{requirement.name}=={pin}"


# --- pip ---------------------------------------------------------------------------------------------------------------------------


def read_wheel(path: Path) -> Wheel:
    with zipfile.ZipFile(path) as archive:
        name = next(entry for entry in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", entry))
        metadata = email.message_from_bytes(archive.read(name))
    requires = tuple(" ".join(line.split()) for line in metadata.get_all("Requires-Dist") or ())
    return Wheel(metadata["Name"], metadata["Version"], path, requires)


def pip(*words: str) -> subprocess.CompletedProcess[str]:
    # deepspeed reads DS_BUILD_OPS: its kernels are compiled where they are first used, if ever
    environment = {**os.environ, "DS_BUILD_OPS": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [sys.executable, "-m", "pip", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def download(folder: Path, target: Target, wanted: str) -> Wheel:
    """A wheel for `target`, downloaded, or built from source where that gives one for any machine.

    Raises:
        Unavailable: neither.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        got = pip("download", "-q", "--no-deps", *target.pip_options(), "-d", place, wanted)
        if got.returncode:
            built = pip("wheel", "-q", "--no-deps", "-w", place, wanted)
            if built.returncode:
                raise Unavailable(f"no wheel ({_reason(got)}), and none can be built ({_reason(built)})")
        path = next(Path(place).glob("*.whl"))
        if got.returncode and not all(tag.platform == "any" for tag in parse_wheel_filename(path.name)[3]):
            raise Unavailable(f"no wheel for the target, and its source gives one for this machine only ({path.name})")
        return read_wheel(path.replace(folder / path.name))


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
    return lines[-1].removeprefix("ERROR: ")[:200] if lines else f"pip ended with {done.returncode}"


def build_own(folder: Path) -> tuple[Wheel, str]:
    """The wheel of this project as it is committed, and the commit.

    Raises:
        Unavailable: this is no git checkout, or the build fails.
    """
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "source"
        cloned = subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], capture_output=True, text=True)
        if cloned.returncode:
            raise Unavailable(f"{ROOT} cannot be cloned by git: {cloned.stderr.strip()}")
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=source, capture_output=True, text=True, check=True)
        built = pip("wheel", "-q", "--no-deps", "-w", place, str(source))
        if built.returncode:
            raise Unavailable(f"its wheel cannot be built: {_reason(built)}")
        path = next(Path(place).glob("*.whl"))
        return read_wheel(Path(shutil.copy(path, folder))), head.stdout.strip()


# --- the folder --------------------------------------------------------------------------------------------------------------------


def manifest(found: Gathered, target: Target, commit: str) -> dict[str, Any]:
    entries = [
        {
            "name": wheel.name,
            "version": wheel.version,
            "file": wheel.path.name,
            "bytes": wheel.path.stat().st_size,
            "sha256": hashlib.sha256(wheel.path.read_bytes()).hexdigest(),
        }
        for _, wheel in sorted(found.wheels.items())
    ]
    return {
        "python": target.python,
        "machine": target.machine,
        "platforms": list(target.platforms),
        "commit": commit,
        "bytes": sum(entry["bytes"] for entry in entries),
        "wheels": entries,
        "missing": found.missing,
        "notes": found.notes,
    }


def report(content: dict[str, Any], folder: Path) -> list[str]:
    lines = [f"{e['bytes'] / MIB:8.2f} MiB  {e['name']} {e['version']}" for e in content["wheels"]]
    lines.append(f"{content['bytes'] / MIB:8.2f} MiB  together, {len(content['wheels'])} wheels in {folder}")
    lines += [f"note: {note}" for note in content["notes"]]
    lines += [f"could not be had: {name}: {why}" for name, why in content["missing"].items()]
    lines.append(
        f"on the other machine: pip install --no-index --no-deps --find-links {folder.name} {folder.name}/*.whl"
    )
    return lines


def put(draft: Path, folder: Path) -> None:
    """Let the folder be what `draft` is. Only one that this tool made is replaced."""
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(draft, folder)


def check_folder(folder: Path) -> None:
    """Raises ValueError for a folder that holds something else than a wheelhouse."""
    if folder.exists() and not (
        folder.is_dir() and ((folder / "manifest.json").is_file() or not any(folder.iterdir()))
    ):
        raise ValueError(
            f"folder: expected a new or empty one, or a wheelhouse to replace; {folder} holds other things"
        )


def read_have(words: Sequence[str]) -> dict[str, str | None]:
    """NAME or NAME==VERSION, as in `pip list --format=freeze`."""
    pairs = (word.partition("==") for word in words)
    return {canonicalize_name(name): version or None for name, _, version in pairs}


def make(
    folder: Path, purpose: str, only: Sequence[str], have: dict[str, str | None], target: Target
) -> dict[str, Any]:
    """Fill `folder`; returns the manifest.

    Raises:
        ValueError: the folder holds other things.
        Unavailable: this project's own wheel cannot be built.
    """
    check_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    pins, environment = read_pins((ROOT / "constraints.txt").read_text()), target.environment()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
        draft = Path(place) / "wheels"
        draft.mkdir()

        def fetch(wanted: str, requirement: Requirement) -> Wheel:
            print(f"{wanted} ...", flush=True)
            return download(draft, target, wanted)

        own, commit = build_own(draft)
        if only:
            own.path.unlink()
            found = gather([Requirement(name) for name in only], pins, {}, environment, fetch, follow=False)
        else:
            found = gather(roots(own.requires, purpose, environment), pins, have, environment, fetch)
            found.wheels[PROJECT] = own
        content = manifest(found, target, commit)
        (draft / "manifest.json").write_text(json.dumps(content, indent=1) + "\n")
        put(draft, folder)
    return content


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars="@"
    )
    parser.add_argument("folder", type=Path, help="where the wheels go; a wheelhouse that is there is replaced")
    parser.add_argument("--for", dest="purpose", choices=EXTRAS, default="all", help="what is to run there")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="just these, and nothing they need")
    parser.add_argument(
        "--have",
        nargs="*",
        default=[],
        metavar="NAME",
        help="packages that are there already, with what they need; NAME or NAME==VERSION, or @FILE with one per line",
    )
    parser.add_argument("--python", default="3.12", help="version there (default 3.12)")
    parser.add_argument("--machine", default="x86_64", help="processor there: x86_64 or aarch64")
    parser.add_argument("--glibc", default=f"2.{DEFAULT_GLIBC}", help="that of its Linux; `ldd --version` says it")
    parser.add_argument("--platform", nargs="+", metavar="TAG", help="pip's tags, instead of those of --glibc")
    chosen = parser.parse_args(words)
    try:
        if not re.fullmatch(r"2\.\d+", chosen.glibc):
            raise ValueError(f"glibc: expected a version like 2.28, got {chosen.glibc}")
        if not re.fullmatch(r"3\.\d+", chosen.python):
            raise ValueError(f"python: expected a version like 3.12, got {chosen.python}")
        tags = tuple(chosen.platform or platform_tags(chosen.machine, int(chosen.glibc[2:])))
        target = Target(chosen.python, chosen.machine, tags)
        content = make(chosen.folder, chosen.purpose, chosen.only, read_have(chosen.have), target)
    except (ValueError, OSError, Unavailable) as error:
        print(f"wheelhouse: {error}", file=sys.stderr)
        return 2
    print("\n".join(report(content, chosen.folder)))
    return 1 if content["missing"] else 0


if __name__ == "__main__":
    sys.exit(main())
