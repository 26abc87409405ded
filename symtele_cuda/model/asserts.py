"""Assertions in a forward that is traced: they are taken to hold; what they alone compute is no part of the chain."""

from __future__ import annotations

import dis
import inspect
from types import FrameType

import torch
from torch import fx

# What may stand between a jump and what it leads to: the rest of a chained comparison, and marks of the interpreter.
_ON_THE_WAY = {"POP_TOP", "JUMP_FORWARD", "NOT_TAKEN", "NOP", "CACHE"}


class AssertingTracer(fx.Tracer):
    """Takes an assert of symbolic values to hold, where torch's own `trace_asserts` knows Python up to 3.10 only."""

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The truth with which the `assert` that asks for it goes on.

        Raises:
            TraceError: it is not an assert that asks.
        """
        holds = _truth_that_is_asserted(_frame_that_asks())
        if holds is None:
            return super().to_bool(obj)
        self.create_proxy("call_function", torch._assert, (obj, ""), {})
        return holds


def nodes_of_checks(graph: fx.Graph) -> set[fx.Node]:
    """The assertions in `graph`, and the calls whose results nothing else uses; none that may change a tensor."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        is_assertion = node.op == "call_function" and node.target is torch._assert
        is_for_assertions = bool(node.users) and found.issuperset(node.users)
        if is_assertion or (is_for_assertions and node.op != "placeholder" and not _may_change_a_tensor(node)):
            found.add(node)
    return found


def _may_change_a_tensor(node: fx.Node) -> bool:
    """Whether a call is one in place, by the naming of torch's methods, or of a module, which may do anything."""
    return node.op == "call_module" or (node.op == "call_method" and str(node.target).endswith("_"))


def _frame_that_asks() -> FrameType | None:
    """The frame that called bool() on a proxy, which called `to_bool`, which called this."""
    frame = inspect.currentframe()
    for _ in range(3):
        frame = None if frame is None else frame.f_back
    return frame


def _truth_that_is_asserted(frame: FrameType | None) -> bool | None:
    """The truth without which the code at work in `frame` raises AssertionError; None where it raises for neither."""
    if frame is None:
        return None
    code = list(dis.get_instructions(frame.f_code))
    at = _place_of(code, frame.f_lasti)
    if at is None:
        return None
    jump = at + 1 if code[at].opname == "TO_BOOL" else at
    behind: int | None = jump + 1
    target = _place_of(code, code[jump].argval)
    if "IF_TRUE" in code[jump].opname:
        if_true, if_false = target, behind
    elif "IF_FALSE" in code[jump].opname:
        if_true, if_false = behind, target
    else:
        return None
    if _leads_to_assertion_error(code, if_false):
        return True
    return False if _leads_to_assertion_error(code, if_true) else None


def _leads_to_assertion_error(code: list[dis.Instruction], start: int | None) -> bool:
    place: int | None = start
    while place is not None and place < len(code) and code[place].opname in _ON_THE_WAY:
        is_jump = code[place].opname == "JUMP_FORWARD"
        place = _place_of(code, code[place].argval) if is_jump else place + 1
    if place is None or place >= len(code):
        return False
    return code[place].opname == "LOAD_ASSERTION_ERROR" or code[place].argval is AssertionError


def _place_of(code: list[dis.Instruction], offset: int) -> int | None:
    return next((place for place, instruction in enumerate(code) if instruction.offset == offset), None)
