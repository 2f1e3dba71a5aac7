"""Copy shmring into a project, and check that the copy works there: ``python tools/vendor.py DIRECTORY``.

DIRECTORY becomes the parent of the copy (``myapp/_vendor`` gives ``myapp/_vendor/shmring``). Nothing in
the copy is edited, and nothing needs to be.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "shmring"

CHECK = """
import os, sys
sys.path.insert(0, sys.argv[1])
from shmring import Ring
with Ring.create(f"vendor-check-{os.getpid()}") as ring:
    ring.write(b"hello")
    assert ring.read() == b"hello"
"""


def main() -> int:
    """Copy, compare, and pass one message; 0 if all is well."""
    parser = argparse.ArgumentParser(description="Copy shmring into a project and check the copy.")
    parser.add_argument("directory", type=Path, help="where the folder shmring is to lie, for example myapp/_vendor")
    parser.add_argument("--check", action="store_true", help="copy nothing, only check what is there")
    arguments = parser.parse_args()
    copy = arguments.directory / PACKAGE.name
    if not arguments.check:
        if copy.exists():
            shutil.rmtree(copy)
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    files = sorted(path.name for path in PACKAGE.iterdir() if path.is_file())
    _, different, missing = filecmp.cmpfiles(PACKAGE, copy, files, shallow=False)
    if different or missing:
        print(f"{copy} differs from {PACKAGE}: {', '.join(different + missing)}", file=sys.stderr)
        return 1
    status = subprocess.run([sys.executable, "-c", CHECK, str(arguments.directory.resolve())]).returncode
    print(f"{copy}: {len(files)} files, {'one message passed' if status == 0 else 'it does not work here'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
