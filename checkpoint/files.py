"""Regular files, the JSON in them, and weights that nothing reads. Needs no torch: the check before a run uses it."""

import json
from pathlib import Path
from typing import Any

from errors import UserError, reading

_OTHER_WEIGHTS = ("pytorch_model*.bin", "*.pth", "*.gguf")


def file_size(path: Path) -> int:
    """Bytes of a regular file. Raises UserError for anything else, which might never end."""
    with reading(path):
        if not path.is_file():
            raise UserError(f"{path} is {'no regular file' if path.exists() else 'missing'}")
        return path.stat().st_size


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError for one that is missing, no regular file, or holds anything else."""
    file_size(path)
    with reading(path):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise UserError(f"{path} holds {value!r:.60}: expected a JSON object")
        return value


def unread_weights(folder: Path) -> str:
    """The end of a line that misses safetensors files: which weights of another format are there instead, if any."""
    found = sorted(path.name for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern))
    return f"; {found[0]} is there and is not read" if found else ""
