"""What `benchmarks/gpu.sh` cannot import on this machine, and how to carry it there. Needs the standard library alone.

    python benchmarks/gpu_imports.py [part …]

Exit code 2: a part cannot run. A package that is only missed by something that has another way is named too.
"""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"
# Module: package.
NEEDED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "accelerate": "accelerate",
    "numpy": "numpy",
    "PIL": "pillow",
    "psutil": "psutil",
    "pydantic": "pydantic",
    "pydantic_core": "pydantic-core",
    "annotated_types": "annotated-types",
    "typing_inspection": "typing-inspection",
    "rich": "rich",
    "safetensors": "safetensors",
    "tensorboard": "tensorboard",
    "yaml": "pyyaml",
}
OF_TESTS = {"pytest": "pytest", "pytest_timeout": "pytest-timeout"}
# Module: package, and what happens without it.
BETTER_WITH = {
    "ffcv": ("ffcv", "images are read by Pillow, so that data wait is not that of a training"),
    "numba": ("numba", "images are read by Pillow, so that data wait is not that of a training"),
    "triton": ("triton", "augmentation and loss use torch's own operations"),
    "lightly": ("lightly", "the loss is not compared with lightly's"),
}


def is_missing(module: str) -> bool:
    try:
        return find_spec(module) is None
    except (ImportError, ValueError):
        return True


def pinned(package: str) -> str:
    """With the version of requirements.lock."""
    found = re.search(rf"^{re.escape(package)}==\S+", LOCK.read_text(), re.MULTILINE)
    return found.group() if found else package


def how_to_carry(packages: list[str]) -> str:
    """Commands for a machine with a network. ffcv has no wheel: a script builds one."""
    major, minor = sys.version_info[:2]
    lines = []
    if downloads := [pinned(package) for package in packages if package != "ffcv"]:
        lines.append(
            f"pip download --no-deps --only-binary=:all: --python-version {major}.{minor} --dest wheels "
            + " ".join(downloads)
        )
    if "ffcv" in packages:
        lines.append("bash tools/build_ffcv_wheel.sh wheels")
    lines.append("then bring the folder `wheels` here, and: benchmarks/gpu.sh --wheels wheels")
    return "\n".join(f"    {line}" for line in lines)


def main(parts: list[str]) -> int:
    needed = NEEDED | (OF_TESTS if "tests" in parts or not parts else {})
    missing = [package for module, package in needed.items() if is_missing(module)]
    for module, (package, consequence) in BETTER_WITH.items():
        if is_missing(module):
            print(f"without {package}: {consequence}", file=sys.stderr)
            if not missing and package == "ffcv":
                print(how_to_carry([package]), file=sys.stderr)
    if not missing:
        return 0
    print(f"missing for {sys.executable}: {', '.join(missing)}. On a machine with a network:", file=sys.stderr)
    print(how_to_carry(missing + (["ffcv"] if is_missing("ffcv") else [])), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
