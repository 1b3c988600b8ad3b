"""Weights out of an ONNX graph, under the names that they had in PyTorch.

Two things stand between the file and a state dict. The exporter gives the weight of a linear layer a number
(`onnx::MatMul_123`, transposed) but leaves the bias its name: so a weight is named after the bias that is added to its
product. And quantised files keep integers: they become `(integer - zero point) * scale`. ONNX is a protocol buffer;
the few fields read here (numbers as in the format's `onnx.proto`) need no library.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES: dict[int, Any] = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64}  # TensorProto.DataType
PRODUCTS = ("MatMul", "MatMulInteger", "Gemm")
HOPS = 8  # operations between a product and the addition of its bias: casts and scales of quantised graphs


@dataclass
class Node:
    """One operation of the graph."""

    op: str
    inputs: list[str]
    outputs: list[str]
    numbers: dict[str, int]  # its integer attributes


def state_dict(data: bytes) -> dict[str, Tensor]:
    """All named weights and biases of an ONNX file, fp32, linear weights as (out, in)."""
    nodes, constants = _graph(data)
    values, names = _dequantised(nodes, constants)
    found = {n: values[k] for k, n in names.items() if n.endswith((".weight", ".bias"))}
    users = defaultdict(list)
    for node in nodes:
        for name in node.inputs:
            users[name].append(node)
    for node in nodes:
        weight = next((k for k in node.inputs if k in values and values[k].ndim == 2), None)
        if node.op in PRODUCTS and weight:
            name = names[weight] if names[weight].endswith(".weight") else _by_bias(node, users, names)
            found[name] = values[weight] if node.numbers.get("transB") else values[weight].T
    return {n: torch.from_numpy(np.array(v, dtype=np.float32)) for n, v in found.items()}


def _by_bias(node: Node, users: dict[str, list[Node]], names: dict[str, str]) -> str:
    """The name of a product's weight: that of the bias which is added to its output."""
    step = node
    for _ in range(HOPS):
        bias = [names[k] for k in step.inputs if names.get(k, "").endswith(".bias")]
        if bias:
            return bias[0].removesuffix("bias") + "weight"
        step = users[step.outputs[0]][0]
    raise ValueError(f"no bias follows the product of {node.inputs}: its weight has no name")


def _dequantised(nodes: list[Node], constants: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every constant in floating point by the name it has in the graph, and the parameter name of each."""
    values = {k: v for k, v in constants.items() if v.dtype == np.float32}
    names = dict.fromkeys(values, "") | {k: k for k in values}
    for k, v in constants.items():
        origin = k.removesuffix("_quantized")
        if v.dtype in (np.int8, np.uint8) and f"{origin}_scale" in constants:
            values[k] = _scaled(v, constants[f"{origin}_scale"], constants.get(f"{origin}_zero_point"), axis=1)
            names[k] = origin
    for node in nodes:
        if node.op == "DequantizeLinear" and node.inputs[0] in constants:
            integers, scale, *zero = (constants[k] for k in node.inputs)
            values[node.outputs[0]] = _scaled(integers, scale, *zero, axis=node.numbers.get("axis", 1))
            names[node.outputs[0]] = node.inputs[0].removesuffix("_quantized")
    return values, names


def _scaled(integers: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None, *, axis: int) -> np.ndarray:
    """(integers - zero) * scale; a scale with several entries runs along `axis`."""
    shape = [1] * integers.ndim
    if scale.size > 1:
        shape[axis] = -1
    offset = np.float32(0) if zero is None else zero.astype(np.float32).reshape(shape[: integers.ndim])
    return (integers.astype(np.float32) - offset) * scale.reshape(shape)


def _graph(data: bytes) -> tuple[list[Node], dict[str, np.ndarray]]:
    """Operations, and constants by name: initialisers and the outputs of Constant operations."""
    graph = next(bytes(v) for k, v in _fields(data) if k == 7)
    nodes: list[Node] = []
    constants: dict[str, Any] = {}
    for key, value in _fields(graph):
        if key == 1:
            node, tensor = _node(value)
            nodes.append(node)
            if tensor is not None:
                constants[node.outputs[0]] = tensor
        elif key == 5:
            name, tensor = _tensor(value)
            constants[name] = tensor
    return nodes, {k: v for k, v in constants.items() if v is not None}


def _node(data: memoryview | bytes) -> tuple[Node, np.ndarray | None]:
    node, tensor = Node("", [], [], {}), None
    for key, value in _fields(data):
        if key == 1:
            node.inputs.append(bytes(value).decode())
        elif key == 2:
            node.outputs.append(bytes(value).decode())
        elif key == 4:
            node.op = bytes(value).decode()
        elif key == 5:
            attribute = dict(_fields(value))  # name: 1, integer: 3, tensor: 5
            if 3 in attribute:
                node.numbers[bytes(attribute[1]).decode()] = attribute[3]
            if 5 in attribute and node.op in ("", "Constant"):
                tensor = _tensor(attribute[5])[1]
    return node, tensor


def _tensor(data: memoryview | bytes) -> tuple[str, np.ndarray | None]:
    """Name and values of a TensorProto; None for types that hold no weights."""
    name, shape, kind, values = "", list[int](), 0, None
    for key, value in _fields(data):
        if key == 1:
            shape += [value] if isinstance(value, int) else _varints(value)
        elif key == 2:
            kind = value
        elif key == 4:
            values = np.frombuffer(value, np.float32)
        elif key == 5:
            values = np.array(_varints(value), np.uint64).astype(DTYPES[kind])
        elif key == 8:
            name = bytes(value).decode()
        elif key == 9 and kind in DTYPES:
            values = np.frombuffer(value, DTYPES[kind])
    return name, None if values is None else values.reshape(shape)


def _fields(data: memoryview | bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protocol buffer message: an int, or bytes."""
    view, at = memoryview(data), 0
    value: Any
    while at < len(view):
        tag, at = _varint(view, at)
        if tag & 7 == 0:
            value, at = _varint(view, at)
        else:
            size, at = {1: (8, at), 5: (4, at)}.get(tag & 7) or _varint(view, at)
            value, at = view[at : at + size], at + size
        yield tag >> 3, value


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """An integer in groups of seven bits, lowest first, and the position after it."""
    value = shift = 0
    while True:
        byte = view[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _varints(view: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(view):
        value, at = _varint(view, at)
        values.append(value)
    return values
