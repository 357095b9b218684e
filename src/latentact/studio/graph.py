"""Forward dynamics as a list of operations with constants, which `fdm.js` computes in a browser."""

from __future__ import annotations

import base64
import operator
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from latentact.lams.contract import LatentActionModel

LARGEST = 4_000_000
"""Bytes of float16 constants above which a model is too large for the page."""
COPIES = ("alias", "clone", "detach", "_to_copy", "contiguous")
ELEMENTWISE = ("relu", "tanh", "sigmoid", "exp", "sqrt", "rsqrt", "neg", "abs", "round", "silu")
OPERATIONS = {
    *("convolution", "add", "sub", "mul", "div", "clamp", "leaky_relu", "gelu", "unsqueeze", "squeeze"),
    *("view", "permute", "slice", "select", "cat", "addmm", "mm", "bmm", "expand", "repeat", "_softmax"),
    *("max_pool2d_with_indices", "split_with_sizes", "getitem", "native_layer_norm", "copy", "take"),
    *ELEMENTWISE,
}
"""What fdm.js can do."""


class UnsupportedModelError(Exception):
    """Forward dynamics cannot run in a browser; the message is the reason."""


class _Predict(nn.Module):
    def __init__(self, model: LatentActionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor, vectors: Tensor) -> Tensor:
        return self.model.predict(frames, vectors)


def to_graph(model: LatentActionModel) -> dict[str, Any]:
    """Return the operations of `predict` for one clip of `context + 1` frames.

    Whatever does not depend on the inputs is computed here. Values are floats; frames are 0..255.

    Raises:
        UnsupportedModelError: it has other operations, or too many weights.
    """
    spec = model.spec
    side, device = spec.resolution, next(model.parameters()).device
    frames = torch.zeros(1, model.context + 1, 3, side, side, dtype=torch.uint8, device=device)
    vectors = torch.zeros(1, spec.tokens, spec.token_dim, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(_Predict(model), (frames, vectors)).run_decompositions()
        except Exception as error:  # the exporter raises anything
            raise UnsupportedModelError(f"it cannot be traced ({type(error).__name__})") from error
    tensors: dict[str, Any] = {**program.state_dict, **program.constants}
    specs: Any = program.graph_signature.input_specs
    targets = {each.arg.name: tensors[str(each.target)] for each in specs if each.target is not None}
    return _Writer(targets, program.graph.nodes).result()


class _Writer:
    """Fold constants and write the rest."""

    def __init__(self, constants: dict[str, Tensor], nodes: Iterable[Any]) -> None:
        self.known: dict[str, Any] = {}
        self.nodes: list[dict[str, Any]] = []
        self.used: dict[str, Tensor] = {}
        self.inputs: list[str] = []
        self.normalized: set[str] = set()
        self.output = ""
        for node in nodes:
            if node.op == "placeholder" and node.name in constants:
                self.known[node.name] = constants[node.name]
            elif node.op == "placeholder":
                self.inputs.append(node.name)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self.output = node.args[0][0].name

    def _call(self, node: Any) -> None:
        if "assert" in str(node.target):
            return None
        above = [each.name for each in node.all_input_nodes]
        if all(name in self.known for name in above):
            values = torch.fx.map_arg((node.args, node.kwargs), lambda each: self.known[each.name])
            self.known[node.name] = node.target(*values[0], **values[1])
            return None
        name, args = _name(node), [*node.args]
        if name == "_native_batch_norm_legit_no_training":
            return self._batch_norm(node)
        if name == "getitem" and args[0].name in self.normalized:
            name, args = "copy", args[:1]
        if name in COPIES:
            name, args = "copy", args[:1]
        if name == "index":
            name, args = self._index(args)
        if name == "squeeze":
            name = "view"
        if name not in OPERATIONS:
            raise UnsupportedModelError(f"it uses the operation {name}")
        if name == "gelu" and node.kwargs.get("approximate", "none") != "none":
            raise UnsupportedModelError("it uses the operation gelu-tanh")
        if name == "convolution" and (args[5] != [1, 1] or args[6] or args[8] != 1):
            raise UnsupportedModelError("it uses grouped, dilated or transposed convolutions")
        if name in ("view", "expand"):
            args = [args[0], [*node.meta["val"].shape]]
        self.nodes.append({"op": name, "out": node.name, "args": [self._argument(each) for each in args]})
        return None

    def _index(self, args: list[Any]) -> tuple[str, list[Any]]:
        """Return indexing by constants along one axis as `take`."""
        given = [(axis, each) for axis, each in enumerate(args[1]) if each is not None]
        if len(given) != 1 or given[0][1].name not in self.known:
            raise UnsupportedModelError("it uses the operation index")
        axis, indices = given[0]
        return "take", [args[0], axis, self.known[indices.name].tolist()]

    def _batch_norm(self, node: Any) -> None:
        """Write batch normalization with fixed statistics as a factor and an offset per channel."""
        _, weight, bias, mean, variance, _, epsilon = node.args
        w, b, m, v = (self.known[each.name] for each in (weight, bias, mean, variance))
        factor = w / torch.sqrt(v + epsilon)
        shape = (1, -1, 1, 1)
        for suffix, value in (("factor", factor), ("offset", b - m * factor)):
            self.known[f"{node.name}_{suffix}"] = value.reshape(shape)
        scaled = f"{node.name}_scaled"
        self.normalized.add(node.name)
        for op, out, x, part in (
            ("mul", scaled, node.args[0].name, "factor"),
            ("add", node.name, scaled, "offset"),
        ):
            args = [{"ref": x}, self._constant(f"{node.name}_{part}")]
            self.nodes.append({"op": op, "out": out, "args": args})

    def _argument(self, value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return self._constant(value.name) if value.name in self.known else {"ref": value.name}
        if isinstance(value, (list, tuple)):
            return [self._argument(each) for each in value]
        if isinstance(value, float) and not np.isfinite(value):
            raise UnsupportedModelError("it has infinite constants")
        return min(value, 2**31 - 1) if isinstance(value, int) and not isinstance(value, bool) else value

    def _constant(self, name: str) -> dict[str, str]:
        self.used[name] = self.known[name]
        return {"ref": name}

    def result(self) -> dict[str, Any]:
        """Return the graph as JSON; constants are float16, one after the other."""
        parts, places, offset = [], {}, 0
        for name, tensor in self.used.items():
            values = tensor.detach().float().cpu().numpy().astype(np.float16)
            if not np.isfinite(values).all():
                raise UnsupportedModelError("its weights exceed 16 bits")
            places[name] = {"shape": [*values.shape], "at": offset}
            parts.append(values.ravel())
            offset += values.size
        if 2 * offset > LARGEST:
            raise UnsupportedModelError(f"its weights take {2 * offset / 1e6:.0f} MB")
        blob = np.concatenate(parts) if parts else np.zeros(0, np.float16)
        return {
            "inputs": self.inputs,
            "nodes": self.nodes,
            "output": self.output,
            "constants": places,
            "weights": base64.b64encode(blob.astype("<f2").tobytes()).decode(),
        }


def _name(node: Any) -> str:
    if node.target is operator.getitem:
        return "getitem"
    return str(node.target).split(".")[-2] if "." in str(node.target) else str(node.target)
