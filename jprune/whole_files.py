"""Files that are written whole or not at all: under a temporary name first, renamed when complete."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: str | os.PathLike[str], data: Any, indent: int | None = 1) -> None:
    """JSON in UTF-8; whatever stood at `path` stays until the new file is complete, and also if writing fails."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(data, indent=indent) + "\n")
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
