"""Encoded pictures and texts by position in the data: in memory while they are few, in a temporary file beyond."""

from __future__ import annotations

import json
import tempfile
from types import TracebackType
from typing import Any

IN_MEMORY = 64 << 20  # bytes


class Spool:
    """A mapping from integers to JSON values, each written once; for use in a ``with`` block."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 - closed by __exit__
        self._places: dict[int, tuple[int, int]] = {}
        self._end = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget everything."""
        self._places.clear()
        self._file.close()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __setitem__(self, key: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self._file.seek(self._end)
        self._file.write(content)
        self._places[key] = (self._end, len(content))
        self._end += len(content)

    def get(self, key: int) -> Any:
        """The value under a key; None where there is none."""
        if key not in self._places:
            return None
        start, size = self._places[key]
        self._file.seek(start)
        return json.loads(self._file.read(size))
