"""Would requirements.txt install elsewhere? Resolves it for each platform and Python.

    make check-lock        installs nothing, but pip may fetch whole wheels to read their metadata

pip evaluates markers for the Python that runs it, so the markers are evaluated here, for the
platform asked about; then pip names the wheel that it would take for each pin there (never a source
archive). Two things are checked: the wheel's sha256 is in the lock, and all that the wheel asks for
on that platform is in the lock too, at a version that it accepts.
"""
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

LOCK = Path(__file__).resolve().parent.parent / "requirements.txt"
PYTHONS = ["3.11", "3.12", "3.13"]
GLIBC = ["manylinux2014"] + [f"manylinux_2_{minor}" for minor in range(5, 29)]  # torch needs 2.28
PLATFORMS = {
    "Linux x86-64": ("Linux", "linux", "x86_64", [f"{tag}_x86_64" for tag in GLIBC]),
    "Linux ARM64": ("Linux", "linux", "aarch64", [f"{tag}_aarch64" for tag in GLIBC]),
    "macOS arm64": ("Darwin", "darwin", "arm64", ["macosx_12_0_arm64"]),  # torchaudio: 12
}


def lock() -> list[tuple[Requirement, set[str]]]:
    """Each pin with its marker, and the hashes that the lock allows for it."""
    entries = re.sub(r"\\\n", " ", LOCK.read_text()).splitlines()
    entries = [line.partition(" #")[0] for line in entries if line[:1].isalnum()]
    return [(Requirement(line.partition(" --hash")[0]), set(re.findall(r"sha256:(\w+)", line)))
            for line in entries]


def resolve(pins: list[str], python: str, tags: list[str]) -> list[dict]:
    """What pip would install for these pins on a CPython with these platform tags."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        options = ["--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--only-binary=:all:"]
        options += ["--implementation=cp", f"--python-version={python}", f"--report={report}"]
        options += [f"--platform={tag}" for tag in tags] + [f"--target={folder}/none"]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
        subprocess.run(pip + options + pins, check=True)
        return json.loads(report.read_text())["install"]


def check(python: str, system: str, sys_platform: str, machine: str, tags: list[str]) -> int:
    """The number of packages; raises AssertionError at the first that would not install."""
    environment = default_environment() | {
        "python_version": python, "python_full_version": python + ".0", "extra": "",
        "platform_system": system, "sys_platform": sys_platform, "platform_machine": machine,
        "implementation_name": "cpython", "platform_python_implementation": "CPython"}
    chosen = [(pin, hashes) for pin, hashes in lock()
              if pin.marker is None or pin.marker.evaluate(environment)]
    allowed = {canonical(pin.name): hashes for pin, hashes in chosen}
    wheels = resolve([f"{pin.name}{pin.specifier}" for pin, _ in chosen], python, tags)
    versions = {canonical(w["metadata"]["name"]): w["metadata"]["version"] for w in wheels}
    assert versions.keys() == allowed.keys(), sorted(versions.keys() ^ allowed.keys())
    extras = {name: {""} for name in versions}  # asked for by wheels, as torch does of CUDA's
    for _ in range(3):  # an extra may ask for another package's extra
        needs = [(name, need) for name, wheel in zip(versions, wheels)
                 for need in map(Requirement, wheel["metadata"].get("requires_dist", []))
                 if not need.marker or any(need.marker.evaluate(environment | {"extra": extra})
                                           for extra in extras[name])]
        for _, need in needs:
            extras.setdefault(canonical(need.name), {""}).update(need.extras)
    for name, need in needs:
        version = versions.get(canonical(need.name))
        assert version and need.specifier.contains(version, prereleases=True), \
            f"{name} asks for {need}; the lock has {version}"
    for name, wheel in zip(versions, wheels):
        digest = wheel["download_info"]["archive_info"]["hashes"]["sha256"]
        assert digest in allowed[name], f"{wheel['download_info']['url']}: not in the lock"
    return len(wheels)


if __name__ == "__main__":
    for platform, values in PLATFORMS.items():
        for python in PYTHONS:
            print(f"{platform}, Python {python}: {check(python, *values)} packages", flush=True)
