# SPDX-License-Identifier: Apache-2.0
"""A small writer of LLVM IR: typed values with operators, and loops that carry values.

The CPU kernels are Python functions that emit IR. Python's own loops unroll, its own ``if``
specialises, and what is written here is what LLVM compiles: plain SSA, no memory for variables.
A type is spelt as LLVM spells it: ``"i64"``, ``"<16 x float>"``, ``"ptr"``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field


def vector_type(lanes: int, element: str) -> str:
    return f"<{lanes} x {element}>"


def _parts(vtype: str) -> tuple[int, str]:
    """(lanes, element type) of a vector type; lanes 0 for a scalar."""
    if not vtype.startswith("<"):
        return 0, vtype
    lanes, _, element = vtype[1:-1].split(" ")
    return int(lanes), element


@dataclass(frozen=True)
class Value:
    """An SSA value or a constant. Arithmetic picks the integer or the float instruction by type."""

    ir: IrWriter
    type: str
    name: str

    def _binary(self, other: Value | float, on_int: str, on_float: str | None = None) -> Value:
        if not isinstance(other, Value):
            other = self.ir.const(self.type, other)
        is_float = _parts(self.type)[1] in ("float", "half", "double")
        op = on_float if is_float else on_int
        if not op:
            raise TypeError(f"no such operation on {self.type}")
        return self.ir.emit(self.type, f"{op} {self.type} {self.name}, {other.name}")

    def __add__(self, other: Value | float) -> Value:
        return self._binary(other, "add", "fadd")

    def __sub__(self, other: Value | float) -> Value:
        return self._binary(other, "sub", "fsub")

    def __mul__(self, other: Value | float) -> Value:
        return self._binary(other, "mul", "fmul")

    def __truediv__(self, other: Value | float) -> Value:
        return self._binary(other, "", "fdiv")

    def __floordiv__(self, other: Value | int) -> Value:
        return self._binary(other, "udiv")

    def __lshift__(self, other: Value | int) -> Value:
        return self._binary(other, "shl") if other != 0 else self

    def __rshift__(self, other: Value | int) -> Value:
        return self._binary(other, "lshr") if other != 0 else self

    def shift_right_signed(self, places: int) -> Value:
        """This integer shifted right, its sign kept."""
        return self._binary(places, "ashr")

    def __and__(self, other: Value | int) -> Value:
        return self._binary(other, "and")

    def __or__(self, other: Value | int) -> Value:
        return self._binary(other, "or")

    def __xor__(self, other: Value | int) -> Value:
        return self._binary(other, "xor")

    def bitcast(self, to: str) -> Value:
        return self.ir.emit(to, f"bitcast {self.type} {self.name} to {to}")

    def convert(self, op: str, to: str) -> Value:
        """op: an LLVM conversion: zext, sext, trunc, fpext, fptrunc, uitofp, inttoptr ..."""
        return self.ir.emit(to, f"{op} {self.type} {self.name} to {to}")

    def compare(self, predicate: str, other: Value | int) -> Value:
        """predicate: ``icmp eq``, ``icmp ult``, ``fcmp uno`` ..."""
        if not isinstance(other, Value):
            other = self.ir.const(self.type, other)
        lanes, _ = _parts(self.type)
        to = vector_type(lanes, "i1") if lanes else "i1"
        return self.ir.emit(to, f"{predicate} {self.type} {self.name}, {other.name}")

    def select(self, if_true: Value, if_false: Value) -> Value:
        return self.ir.emit(
            if_true.type,
            f"select {self.type} {self.name}, {if_true.type} {if_true.name}, "
            f"{if_false.type} {if_false.name}",
        )

    def at(self, byte_offset: Value | int) -> Value:
        """The pointer ``byte_offset`` bytes on."""
        if not isinstance(byte_offset, Value):
            if byte_offset == 0:
                return self
            byte_offset = self.ir.const("i64", byte_offset)
        return self.ir.emit("ptr", f"getelementptr i8, ptr {self.name}, i64 {byte_offset.name}")

    def load(self, to: str, align: int = 1) -> Value:
        return self.ir.emit(to, f"load {to}, ptr {self.name}, align {align}")

    def splat(self, lanes: int) -> Value:
        """This scalar in every lane."""
        to = vector_type(lanes, self.type)
        first = self.ir.emit(to, f"insertelement {to} poison, {self.type} {self.name}, i32 0")
        return first.shuffle(first, [0] * lanes)

    def shuffle(self, other: Value, lanes: Sequence[int]) -> Value:
        """Lanes of the concatenation (self, other)."""
        to = vector_type(len(lanes), _parts(self.type)[1])
        mask = ", ".join(f"i32 {lane}" for lane in lanes)
        return self.ir.emit(
            to,
            f"shufflevector {self.type} {self.name}, {other.type} {other.name}, "
            f"{vector_type(len(lanes), 'i32')} <{mask}>",
        )


@dataclass
class Loop:
    """index: i64; carried: the values of this round; set ``next`` to those of the next round."""

    index: Value
    carried: list[Value]
    next: list[Value] = field(default_factory=list)


class IrWriter:
    """Writes one function ``void name(ptr args)``; ``args`` is an array of 64-bit words."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lines = ["entry:"]
        self._block = "entry"
        self._count = 0
        self._declared: set[str] = set()
        self.args = Value(self, "ptr", "%args")

    def text(self) -> str:
        """The module."""
        declarations = "\n".join(sorted(self._declared))
        body = "\n  ".join(self._lines)
        return f"{declarations}\ndefine void @{self.name}(ptr %args) {{\n  {body}\n  ret void\n}}\n"

    def _fresh(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}{self._count}"

    def emit(self, to: str, instruction: str) -> Value:
        name = self._fresh("%v")
        self._lines.append(f"{name} = {instruction}")
        return Value(self, to, name)

    def const(self, to: str, value: float | Sequence[float]) -> Value:
        """A constant; a single number fills every lane of a vector type."""
        lanes, element = _parts(to)

        def spell(x: float) -> str:
            if element in ("float", "half"):
                # LLVM spells a float as the bits of the double of the same value.
                return f"0x{struct.unpack('<Q', struct.pack('<d', x))[0]:016X}"
            return str(int(x))

        if not lanes:
            assert isinstance(value, (int, float))
            return Value(self, to, spell(value))
        values = [value] * lanes if isinstance(value, (int, float)) else value
        return Value(self, to, "<" + ", ".join(f"{element} {spell(x)}" for x in values) + ">")

    def call(self, to: str, function: str, *args: Value) -> Value:
        """Call an LLVM intrinsic (declared on first use)."""
        types = ", ".join(a.type for a in args)
        self._declared.add(f"declare {to} @{function}({types})")
        operands = ", ".join(f"{a.type} {a.name}" for a in args)
        if to == "void":
            self._lines.append(f"call void @{function}({operands})")
            return Value(self, "void", "")
        return self.emit(to, f"call {to} @{function}({operands})")

    def call_pointer(self, to: str, function: Value) -> Value:
        """Call a C function without arguments through its address."""
        return self.emit(to, f"call {to} {function.name}()")

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once where the machine has it."""
        lanes, _ = _parts(a.type)
        return self.call(a.type, f"llvm.fmuladd.v{lanes}f32", a, b, c)

    def sum_lanes(self, vector: Value) -> Value:
        """The sum of all lanes of a float vector, in whatever order is fastest."""
        lanes, element = _parts(vector.type)
        name = f"llvm.vector.reduce.fadd.v{lanes}{_mangle(element)}"
        self._declared.add(f"declare {element} @{name}({element}, {vector.type})")
        zero = self.const(element, 0.0)
        operands = f"{element} {zero.name}, {vector.type} {vector.name}"
        return self.emit(element, f"call reassoc {element} @{name}({operands})")

    def set_lane(self, vector: Value, lane: Value, scalar: Value) -> Value:
        """The vector with one lane replaced."""
        operands = f"{vector.type} {vector.name}, {scalar.type} {scalar.name}"
        return self.emit(vector.type, f"insertelement {operands}, {lane.type} {lane.name}")

    def argument(self, index: int, to: str = "ptr") -> Value:
        """Word ``index`` of the argument array."""
        return self.args.at(8 * index).load(to, align=8)

    def masked_load(self, pointer: Value, to: str, mask: Value, align: int = 1) -> Value:
        lanes, element = _parts(to)
        name = f"llvm.masked.load.v{lanes}{_mangle(element)}.p0"
        zero = Value(self, to, "zeroinitializer")
        return self.call(to, name, pointer, Value(self, "i32", str(align)), mask, zero)

    def masked_store(self, value: Value, pointer: Value, mask: Value, align: int = 1) -> None:
        lanes, element = _parts(value.type)
        name = f"llvm.masked.store.v{lanes}{_mangle(element)}.p0"
        self.call("void", name, value, pointer, Value(self, "i32", str(align)), mask)

    def store(self, value: Value, pointer: Value, align: int = 1) -> None:
        self._lines.append(f"store {value.type} {value.name}, ptr {pointer.name}, align {align}")

    def prefetch(self, pointer: Value) -> None:
        """Ask for a line of data that will be read once, soon."""
        hints = [Value(self, "i32", x) for x in ("0", "3", "1")]
        self.call("void", "llvm.prefetch.p0", pointer, *hints)

    @contextmanager
    def loop(self, start: Value, stop: Value, carried: Sequence[Value] = ()) -> Iterator[Loop]:
        """``for index in range(start, stop)``; on leaving, ``Loop.carried`` are the results."""
        label = self._fresh("loop")
        before = self._block
        self._lines += [f"br label %{label}", f"{label}:"]
        self._block = label
        index = Value(self, "i64", f"%{label}.index")
        phis = [Value(self, v.type, f"%{label}.c{i}") for i, v in enumerate(carried)]
        first_phi = len(self._lines)
        self._lines += [""] * (1 + len(phis))
        go_on = index.compare("icmp slt", stop)
        self._lines += [
            f"br i1 {go_on.name}, label %{label}.body, label %{label}.end",
            f"{label}.body:",
        ]
        self._block = f"{label}.body"
        state = Loop(index, phis)
        yield state
        if len(state.next) != len(phis):
            raise ValueError(f"loop carries {len(phis)} values, got {len(state.next)} at its end")
        step = index + 1
        back = self._block
        self._lines += [f"br label %{label}", f"{label}.end:"]
        for i, (phi, old, new) in enumerate(
            zip([index, *phis], [start, *carried], [step, *state.next], strict=True)
        ):
            self._lines[first_phi + i] = (
                f"{phi.name} = phi {phi.type} [ {old.name}, %{before} ], [ {new.name}, %{back} ]"
            )
        self._block = f"{label}.end"
        state.carried = phis


def _mangle(element: str) -> str:
    return {"float": "f32", "half": "f16"}.get(element, element)
