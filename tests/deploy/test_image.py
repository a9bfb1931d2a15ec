"""The container image: what it installs is locked, and what it writes is in volumes."""

import importlib.metadata
import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from darkroom_server.cli import _parser
from tools.declared_requirements import IMAGE_EXTRAS, IMAGE_PACKAGES, declared_requirements

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
LOCKS = sorted((DEPLOY / "requirements").glob("*.txt"))
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PINNED_BY_THE_DOCKERFILE = "torch"

ENTRY = re.compile(r"^(\S+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", re.M)


def versions(text: str) -> dict[str, str]:
    """The pins of ``constraints.txt``, by canonical name."""
    pins = [line.split("==") for line in text.splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def locked(text: str) -> dict[str, str]:
    """The pins of a lock; raises ``ValueError`` if anything else is in it."""
    rest = ENTRY.sub("", re.sub(r"^#.*\n", "", text, flags=re.M)).split()
    if rest:
        raise ValueError(f"not a pin with hashes: {rest}")
    return {canonicalize_name(name): version for name, version, _ in ENTRY.findall(text)}


def needs(requirements: list[Requirement]) -> set[str]:
    """The packages that ``requirements`` need here, without those that only extras need."""
    seen: set[tuple[str, frozenset[str]]] = set()
    pending: list[tuple[Requirement, set[str]]] = [(each, set()) for each in requirements]
    while pending:
        requirement, extras = pending.pop()
        marker, name = requirement.marker, canonicalize_name(requirement.name)
        if marker and not any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
            continue
        if (name, frozenset(requirement.extras)) not in seen:
            seen.add((name, frozenset(requirement.extras)))
            declared = map(Requirement, importlib.metadata.requires(name) or [])
            pending += [(each, requirement.extras) for each in declared]
    return {name for name, _ in seen}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_each_line_of_a_lock_has_hashes_and_the_version_of_the_constraints(lock: Path) -> None:
    pins, constraints = locked(lock.read_text()), versions((ROOT / "constraints.txt").read_text())
    assert pins
    assert pins == {name: constraints[name] for name in pins}
    assert "://" not in lock.read_text()


@pytest.mark.parametrize(
    "line", ["name==1", "name>=1 \\\n    --hash=sha256:" + 64 * "0", "--extra-index-url here"]
)
def test_a_line_without_a_hash_is_found(line: str) -> None:
    good = "other==1 \\\n    --hash=sha256:" + 64 * "0"
    assert locked(f"# A comment.\n{good}\n") == {"other": "1"}
    with pytest.raises(ValueError, match="not a pin with hashes"):
        locked(f"{good}\n{line}\n")


def test_the_locks_are_complete() -> None:
    """Fix with `make lock`."""
    server, build = (
        needs(declared_requirements(IMAGE_PACKAGES, extras=IMAGE_EXTRAS)),
        needs([Requirement("hatchling")]),
    )
    assert {PINNED_BY_THE_DOCKERFILE, "compel"} < server
    assert set(locked((DEPLOY / "requirements" / "server.txt").read_text())) == {
        name for name in server if name != PINNED_BY_THE_DOCKERFILE
    }
    assert set(locked((DEPLOY / "requirements" / "build.txt").read_text())) == build


def test_the_image_installs_by_hash_and_torch_by_version() -> None:
    installs = re.findall(r"bin/pip install (.*?)(?: \\)?$", DOCKERFILE, re.M)
    hashed = [line for line in installs if line.startswith("--require-hashes --no-deps -r ")]
    assert {line.split("/")[-1] for line in hashed} == {lock.name for lock in LOCKS}
    assert [line for line in installs if line not in hashed] == [
        '"torch==${TORCH}"',
        "--no-deps wheels/*.whl",
    ]
    torch = versions((ROOT / "constraints.txt").read_text())["torch"]
    assert f"ARG TORCH={torch}\n" in DOCKERFILE


def volumes() -> set[str]:
    return set(re.findall(r"^VOLUME (.*)$", DOCKERFILE, re.M)[0].split())


def test_what_the_image_writes_is_in_its_volumes() -> None:
    written = re.findall(r"^\s+(?:HF_HOME|DARKROOM_SERVE_STATE_DIR)=(\S+)", DOCKERFILE, re.M)
    assert len(written) == 2
    assert set(written) == volumes()


def test_compose_has_a_read_only_root_and_every_volume() -> None:
    server = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["darkroom"]
    assert server["read_only"] is True
    assert {mount.partition(":")[2] for mount in server["volumes"]} == volumes()


def test_the_example_that_compiles_ahead_fits_the_command_and_the_image() -> None:
    (example,) = re.findall(r"```dockerfile\n(.*?)```", (DEPLOY / "README.md").read_text(), re.S)
    (command,) = re.findall(r"^RUN darkroom-server (compile .*?)(?: &&|$)", example, re.M)
    given = vars(_parser().parse_args(command.split()))
    (model,) = given["models"]
    assert example.count(f" {model}\n") == 2, "both stages have the model"
    copied, where = re.findall(r"^COPY --from=compiled \S+ (\S+) (\S+)$", example, re.M)[0]
    assert given["state_dir"] == copied
    assert f"DARKROOM_SERVE_STATE_DIR={where} " in example
    assert f"DARKROOM_SERVE_THREADS={given['threads']}\n" in example
    assert where not in volumes(), "a volume would hide it"
    assert f"HOME={Path(where).parent}" in DOCKERFILE, "the user may write there"
    assert re.search(r"--uid 10001\b", DOCKERFILE)
    assert "--chown=10001:0" in example
