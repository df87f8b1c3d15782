"""A result as a Markdown file that says where it comes from: device, versions, commit, command, date."""

from __future__ import annotations

import datetime
import re
import shlex
import subprocess
import sys
from pathlib import Path

from qcompile import doctor

RESULTS = Path(__file__).with_name("results")


def record(name: str, title: str, body: str, device: str) -> Path:
    """Write `results/<name>.md`, replacing an older one."""
    versions = doctor.versions()
    wanted = ("python", "torch", "triton", "transformers", "hqq")
    command = shlex.join(
        [
            "python",
            "-m",
            f"benchmarks.{Path(sys.argv[0]).stem}",
            *(Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]),
        ]
    )
    lines = [
        f"# {title}",
        "",
        f"- device: {doctor.describe_device(device)}",
        f"- versions: {', '.join(f'{package} {versions[package]}' for package in wanted)}",
        f"- commit: {_commit()}",
        f"- command: `{command}`",
        f"- date: {datetime.date.today().isoformat()}",
        "",
        body.strip(),
        "",
    ]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def device_slug(device: str) -> str:
    """A device as part of a file's name: `AMD EPYC, AVX512, …` is amd-epyc."""
    return re.sub(r"[^a-z0-9]+", "-", doctor.describe_device(device).partition(",")[0].lower()).strip("-")


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
