# SPDX-License-Identifier: Apache-2.0
"""What a check found, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are stored alike and run alike.

    part:       linear, experts, lm_head, embedding, or other: everything that is no product; of a
                draft model, draft linear and so on
    form:       as stored, e.g. "NVFP4"; "16 bits"
    path:       what runs them
    held_bytes: of one device's memory, once they are loaded
    """

    part: str
    form: str
    path: str
    count: int
    held_bytes: int


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    what:    tensor, parameter or layer; the model where it is none of them
    message: found, needed and what to do, in one sentence or two
    """

    what: str
    message: str

    def __str__(self) -> str:
        return self.message if self.what in self.message else f"{self.what}: {self.message}"


@dataclass(frozen=True)
class Report:
    """What a check found.

    errors:   why the model does not load; empty if it does
    dropped:  stored tensors that would be left out of a layer that is loaded: it would then compute
              something else
    left_out: layers in the files that this model does not ask for, numbers folded: how many
    devices:  that the model is cut over; the bytes are those of the first
    seconds:  that the check took, without the imports
    notes:    what else ends an engine that is to take more than text
    while_loading, kept: of a checkpoint in 16 bits, the stored layers that are quantised while it
              loads, and the others with the reason; one name for all experts of a block
    """

    model: str
    architecture: str
    dialect: str
    devices: int
    layers: tuple[LayerGroup, ...]
    errors: tuple[Finding, ...]
    dropped: tuple[Finding, ...]
    left_out: Mapping[str, int]
    seconds: float
    while_loading: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def will_load(self) -> bool:
        return not self.errors

    @property
    def is_right(self) -> bool:
        """Whether it will load, and all of each layer with it."""
        return not self.errors and not self.dropped

    @property
    def held_bytes(self) -> int:
        return sum(layer.held_bytes for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "will_load": self.will_load,
            **asdict(self),
            "left_out": [{"name": n, "count": c} for n, c in sorted(self.left_out.items())],
            "held_bytes": self.held_bytes,
            "seconds": round(self.seconds, 3),
        }

    def lines(self) -> Iterator[str]:
        """For people."""
        for finding in (*self.errors, *self.dropped):
            yield str(finding)
        if self.layers:
            yield f"{self.model}: {self.architecture}, dialect {self.dialect}"
        for layer in self.layers:
            size = f"{layer.held_bytes / 1e9:.3f} GB"
            yield f"{layer.count:6} {layer.part:13} {layer.form:24} {size:>12}  {layer.path}"
        if self.left_out:
            names = ", ".join(f"{n} ({count})" for n, count in sorted(self.left_out.items()))
            yield f"in the files, and asked for by no layer of the model: {names}"
        if self.layers:
            each = "" if self.devices == 1 else f" on each of {self.devices} devices"
            yield f"{self.held_bytes / 1e9:.3f} GB of weights{each}"
        yield from self.notes
        if self.errors:
            yield "It will not load."
        elif self.dropped:
            yield "It will load, and compute something else than the files say."
        else:
            yield "It will load."


def from_json(value: Mapping[str, Any]) -> Report:
    """The inverse of :meth:`Report.to_json`."""
    found: dict[str, Any] = {field.name: value[field.name] for field in fields(Report)}
    for name, made in (("layers", LayerGroup), ("errors", Finding), ("dropped", Finding)):
        found[name] = [made(**entry) for entry in found[name]]
    found["left_out"] = {entry["name"]: entry["count"] for entry in found["left_out"]}
    for name, entry in found.items():
        found[name] = tuple(entry) if isinstance(entry, list) else entry
    return Report(**found)
