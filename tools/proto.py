"""How does the text in proto/ become Python in orchestrator/admin/pb? (`--check`: is what is committed up to date?)

protoc writes absolute imports after the .proto folders; they are rewritten to live below orchestrator.admin.pb, because
a top-level package for them would be one more name that can shadow, or be shadowed by, somebody else's.
"""

from __future__ import annotations

import argparse
import filecmp
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
OUTPUT = ROOT / "orchestrator" / "admin" / "pb"
PACKAGE = "orchestrator.admin.pb"
_INIT = '"""Generated from proto/ by `make proto`."""\n'


def generate(protos: list[Path], target: Path) -> None:
    """Run protoc with the Python, gRPC and mypy plug-ins and put the packages under `PACKAGE`."""
    bin_folder = Path(sys.executable).parent
    include = subprocess.run(
        [sys.executable, "-c", "import grpc_tools; print(grpc_tools.__path__[0])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", f"-I{include}/_proto"]
    command += [f"--plugin=protoc-gen-{name}={bin_folder / f'protoc-gen-{name}'}" for name in ("mypy", "mypy_grpc")]
    command += [f"--{name}_out={target}" for name in ("python", "grpc_python")]
    command += [f"--{name}_out=quiet:{target}" for name in ("mypy", "mypy_grpc")]
    command += [str(path.relative_to(PROTO)) for path in protos]
    subprocess.run(command, cwd=PROTO, check=True)
    own = sorted({path.relative_to(PROTO).parts[0] for path in protos})
    for path in sorted([*target.rglob("*.py"), *target.rglob("*.pyi")]):
        text = path.read_text(encoding="utf-8")
        for name in own:
            text = re.sub(rf"^from {name}(?=[. ])", f"from {PACKAGE}.{name}", text, flags=re.MULTILINE)
        path.write_text(text, encoding="utf-8")
    for folder in sorted({parent for path in target.rglob("*.py") for parent in path.relative_to(target).parents}):
        (target / folder / "__init__.py").write_text(_INIT, encoding="utf-8")


def contents(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for pattern in ("*.py", "*.pyi") for path in folder.rglob(pattern)}


def differences(fresh: Path) -> list[str]:
    """What separates the committed output from a fresh one; empty when they are the same."""
    ours, theirs = contents(OUTPUT), contents(fresh)
    rows = [f"missing: {path}" for path in sorted(theirs - ours)]
    rows += [f"left over: {path}" for path in sorted(ours - theirs)]
    changed = (path for path in sorted(ours & theirs) if not filecmp.cmp(OUTPUT / path, fresh / path, shallow=False))
    return rows + [f"changed: {path}" for path in changed]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when the output is not up to date")
    is_check = parser.parse_args().check
    protos = sorted(PROTO.rglob("*.proto"))
    if not protos:
        print("proto: no .proto text yet, nothing to do")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        generate(protos, fresh)
        rows = differences(fresh)
        if is_check:
            print("\n".join([*rows, "proto: run `make proto`"]) if rows else "proto: generated code is up to date")
            return 1 if rows else 0
        for path in contents(OUTPUT) - contents(fresh):
            (OUTPUT / path).unlink()
        for path in sorted(contents(fresh)):
            (OUTPUT / path).parent.mkdir(parents=True, exist_ok=True)
            (OUTPUT / path).write_bytes((fresh / path).read_bytes())
    print(f"proto: {len(protos)} files -> {OUTPUT.relative_to(ROOT)}, {len(rows)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
