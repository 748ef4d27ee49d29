"""The result of running a prompt, inside the test process or over HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Failure:
    """What ComfyUI would show on the node, or the messages of a prompt that it refused."""

    node_id: str = ""
    node_type: str = ""
    exception_type: str = ""
    exception_message: str = ""
    traceback: str = ""
    node_errors: dict[str, Any] = field(default_factory=dict)
    refused: Any = None

    def __str__(self) -> str:
        if self.exception_type:
            return f"node {self.node_id} ({self.node_type}): {self.exception_type}: {self.exception_message}"
        lines = [str(self.refused)] if self.refused else []
        for node_id, found in self.node_errors.items():
            for error in found["errors"]:
                where = f"node {node_id} ({found['class_type']})"
                lines.append(f"{where}: {error['message']}: {error['details']}")
        return "\n".join(lines)


@dataclass
class Result:
    """`outputs` has the ui dictionary of every node that has one; `previews` are (node id, PIL picture)."""

    ok: bool
    outputs: dict[str, Any] = field(default_factory=dict)
    error: Failure | None = None
    interrupted: bool = False
    executed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    progress: list[tuple[str, float, float]] = field(default_factory=list)
    previews: list[tuple[str, Any]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def check(self) -> Result:
        """Itself, or an AssertionError that says what failed and where."""
        if not self.ok:
            trace = self.error.traceback if self.error else ""
            raise AssertionError(f"{self.error or 'interrupted'}\n{trace}")
        return self
