"""Atrous convolution as an operation on a whole network: strides are exchanged for holes, exactly.

Along one axis a layer computes ``y[i] = sum_j w[j] x[s i - p + d j]``, with stride s, padding p, dilation d. Let S be
the network's stride up to the layer and OS the one to keep. The layer's input is now r = S / min(S, OS) times denser:

    d -> r d,    p -> r p,    s -> min(S s, OS) / min(S, OS)

Then y is there at S s / min(S s, OS) times as many places; every so many of them, from any offset, are what the network
gave for the image shifted by that offset. Pools have holes as convolutions do.

A layer that divided the size of its input by s has to keep it now. Where its padding is shorter than its reach
d (k - 1), as in VGG's 2x2 pools and 3x3 pools in ceil mode, it is padded further, at the end, with what does not count:
-inf for maxima, no part in averages, zeros for convolutions. So branches that fitted together still do, and where the
strides divide the image, offset 0 is the old output with its borders. (Only a window that ceil mode hung over the end
of a padded image is lost.)

S is found by running the network once without data, on torch's meta device, noting the stride of every tensor.
"""

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from crfnet.models.holed import HoledAvgPool2d, HoledConv2d, HoledMaxPool2d, Pair, pair

Change = tuple[tuple[str, Any], ...]  # attributes of a module and their new values; () where all stay


def dilate(network: nn.Module, output_stride: int = 8, *, example: Tensor | None = None) -> nn.Module:
    """Exchange all strides beyond ``output_stride`` for dilations, in place, exactly (the hole algorithm).

    Weights, state-dict keys, device and mode stay as they are. Adaptive pools, means over space and what only follows
    them are left alone, and so is a layer that evaluation does not reach. What the network takes from the whole image
    (global pools, group norm) it will take from the denser grid; what it interpolates last starts from there.

    Args:
        network: of ``nn.Conv2d``, ``nn.MaxPool2d``, ``nn.AvgPool2d`` and constant padding layers, in any graph of
            functions that act on each pixel alone. The graph may not depend on values; a number that ``forward`` reads
            off a tensor, say to check a range, is 1.
        output_stride: one of the strides that the network passes through; its own changes nothing.
        example: an input that the network accepts, of which shape and dtype matter. Height and width had better differ,
            lest they be confused. By default ``(1, channels of the first convolution, 512, 640)``.

    Returns:
        The same ``network``.

    Raises:
        ValueError: nothing has been changed, because ``output_stride`` is not one of the network's, or the network,
            before or after, does not take the example, or something would have to change and cannot: a stride, crop or
            padding outside such layers; a convolution with a ``forward`` of its own or padded with other than zeros; a
            transposed convolution; a layer used at two strides; a window after interpolation or reshaping.

    Sources: arXiv:1412.7062, section 3.1; arXiv:1606.00915, section 3.1.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be a module, got {type(network).__name__}")
    if not isinstance(output_stride, int) or output_stride < 1:
        raise ValueError(f"output_stride must be an int of at least 1, got {output_stride!r}")
    if example is None:
        first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
        if first is None:
            raise ValueError(f"example must be given for a network without nn.Conv2d, got {type(network).__name__}")
        example = torch.empty(1, first.in_channels, 512, 640, dtype=first.weight.dtype, device="meta")
    if not isinstance(example, Tensor) or example.ndim != 4:
        raise ValueError(f"example must be a tensor (B, C, H, W), got {getattr(example, 'shape', example)}")
    blank = _shadow(network)  # everything happens to it first
    trace = _Trace(blank, output_stride)
    trace.run(example, "network")
    if trace.coarsest < output_stride:
        raise ValueError(f"output_stride must be at most the network's own, {trace.coarsest}, got {output_stride}")
    changes = {trace.names[module]: change for module, change in trace.changes.items()}
    _apply(blank, changes)
    _Trace(blank, output_stride).run(example, "network, once dilated,")  # a classifier of fixed size would not take it
    _apply(network, changes)
    return network


def cells(network: nn.Module, example: Tensor) -> tuple[Any, Callable[[Tensor], "_Grid | None"]]:
    """What a network answers to an image of that shape, without data, and where the cells of a tensor in it lie.

    The second is None for a tensor whose positions cannot be followed. Where branches differ the first one tells.

    Raises:
        ValueError: the network does not take the example.
    """
    try:
        out = _Trace(_shadow(network), sys.maxsize).run(example, "network")
    except _Refusal:  # nothing is to change here, only the place stays unknown
        try:
            out = _shadow(network)(torch.empty_like(example, device="meta"))
        except Exception as error:
            raise ValueError(f"network must take the example, {tuple(example.shape)}, but raises {error!r}") from error

    def grid(tensor: Tensor) -> _Grid | None:
        tag = getattr(tensor, _TAG, None)
        return tag if isinstance(tag, _Grid) and tag.axes == (-2, -1) else None

    return out, grid


def _shadow(network: nn.Module) -> nn.Module:
    """A copy without data, in evaluation mode."""
    own = chain.from_iterable(vars(module).values() for module in network.modules())
    tensors = chain(network.parameters(), network.buffers(), (t for t in own if isinstance(t, Tensor)))
    return copy.deepcopy(network, {id(t): _blank(t) for t in tensors}).eval()


def _blank(tensor: Tensor) -> Tensor:
    blank = tensor.detach().to("meta")
    return nn.Parameter(blank, requires_grad=False) if isinstance(tensor, nn.Parameter) else blank


def _apply(network: nn.Module, changes: dict[str, Change]) -> None:
    for name, change in changes.items():
        for attribute, value in change:  # __class__ too: a module put in its place would not be so for every reference
            setattr(network.get_submodule(name), attribute, value)


def _holes(S: int, OS: int, k: int, s: int, p: int, d: int, ceil: bool) -> tuple[int, int, int, int] | None:
    """A layer's new stride, dilation, padding and further padding at the end; None if OS lies between S and S s."""
    if S < OS < S * s and (OS % S or S * s % OS):
        return None
    r, stride = S // min(S, OS), min(S * s, OS) // min(S, OS)
    spare = 2 * p - d * (k - 1) - 1
    more = -(-spare // s) + 1 if ceil else spare // s + 1  # q s pixels became q + more (one less at the edge of ceil)
    end = r * (s * min(more, 0) - spare - 1)  # r q s pixels stay so many, or as many fewer as those were worth
    return stride, r * d if k > 1 else d, r * p, max(end, 0)


@dataclass(frozen=True)
class _Grid:
    """Cell i of a tensor lies at pixel ``first + stride * i`` of the image, along its dimensions ``axes``."""

    stride: Pair
    axes: Pair = (-2, -1)
    first: tuple[float, float] = field(default=(0.0, 0.0), compare=False)  # branches may differ by part of a cell


def _moved(grid: _Grid, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> _Grid:
    """The grid behind a convolution or pool."""
    window = zip(grid.first, grid.stride, kernel, padding, dilation, strict=True)
    y, x = (first + S * (d * (k - 1) / 2 - p) for first, S, k, p, d in window)
    return _Grid((grid.stride[0] * stride[0], grid.stride[1] * stride[1]), first=(y, x))


# A traced tensor carries a _Grid, or None if it says the same of all positions (global pooling), or the name of the
# function that mixed positions so that no later window can be followed. Parameters and constants carry nothing.
_TAG = "_crfnet_grid"
_Tag = _Grid | str | None

# The functions behind the layers that can be changed, the classes of these before and after, and the arguments.
_POOL = ("input", "kernel_size", "stride", "padding")
_WINDOWS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "conv2d": (nn.Conv2d, HoledConv2d, ("input", "weight", "bias", "stride", "padding", "dilation")),
    "max_pool2d": (nn.MaxPool2d, HoledMaxPool2d, (*_POOL, "dilation", "ceil_mode", "return_indices")),
    "max_pool2d_with_indices": (nn.MaxPool2d, HoledMaxPool2d, (*_POOL, "dilation", "ceil_mode", "return_indices")),
    "avg_pool2d": (nn.AvgPool2d, HoledAvgPool2d, (*_POOL, "ceil_mode", "count_include_pad", "divisor_override")),
}
# What else is known not to look at neighbours, besides the functions that torch itself tags as pointwise.
_GLOBAL = {"adaptive_avg_pool2d", "adaptive_max_pool2d", "adaptive_max_pool2d_with_indices"}
_REDUCTIONS = set("mean sum amax amin max min argmax argmin std var logsumexp norm".split())
_RESHAPES = {"view", "reshape", "flatten", "unflatten"}
_TRANSPOSITIONS = {"permute", "transpose", "swapaxes", "movedim"}
_LOCAL = set(
    "batch_norm group_norm instance_norm layer_norm rms_norm local_response_norm normalize linear softmax log_softmax "
    "relu6 hardswish prelu glu rdiv dropout dropout2d feature_dropout alpha_dropout cat concat concatenate stack chunk "
    "split unbind select getitem setitem squeeze unsqueeze expand expand_as clone contiguous detach to type type_as "
    "float double half bfloat16 zeros_like ones_like".split()
)
_KNOWN = _GLOBAL | _REDUCTIONS | _RESHAPES | _TRANSPOSITIONS | _LOCAL | {"interpolate"}
# Functions whose change of size is a change of stride.
_RESIZING = {"interpolate", "conv_transpose2d", "pixel_shuffle", "pixel_unshuffle", "lp_pool2d"}

# Meta tensors have no numbers: checks of an image's range are given ones. Truth values stay errors.
_READING = {"item", "tolist", "__float__", "__int__", "__index__"}


def _is_known(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet else []
    return name in _KNOWN or any(torch.Tag.pointwise in overload.tags for overload in overloads)


class _Refusal(ValueError):
    """Passes through the network's forward, whose own errors mean something else."""


class _Trace(TorchFunctionMode):
    """Runs a network on meta tensors and collects the change of every layer that it meets."""

    def __init__(self, network: nn.Module, OS: int) -> None:
        super().__init__()
        self.network, self.OS, self.coarsest = network, OS, 1
        self.names = {module: name for name, module in network.named_modules()}
        self.changes: dict[nn.Module, Change] = {}
        self.running: list[nn.Module] = []
        for module in self.names:
            module.register_forward_pre_hook(lambda module, _: self.running.append(module))
            module.register_forward_hook(self._leave)

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        self.running.pop()
        if isinstance(module, HoledAvgPool2d) and isinstance(grid := getattr(inputs[0], _TAG, None), _Grid):
            window = (pair(module.kernel_size), pair(module.stride), pair(module.padding), module.dilation)
            setattr(out, _TAG, _moved(grid, *window))

    def run(self, example: Tensor, what: str) -> Any:
        image = torch.empty_like(example, device="meta")
        setattr(image, _TAG, _Grid((1, 1)))
        try:
            with torch.no_grad(), self:
                return self.network(image)
        except _Refusal:
            raise
        except Exception as error:
            raise ValueError(f"{what} must take the example, {tuple(example.shape)}, but raises {error!r}") from error

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function and tag its results."""
        args, kwargs = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs or {}))
        name = getattr(function, "__name__", str(function))
        if name in _READING and not args[0].dtype == torch.bool:
            return function(torch.ones_like(args[0], device="cpu"))
        out, name = function(*args, **kwargs), name.strip("_")
        inputs = [x for x in tree_leaves((args, kwargs)) if hasattr(x, _TAG)]
        results = [x for x in tree_leaves(args[0] if name == "setitem" else out) if isinstance(x, Tensor)]
        tag: _Tag
        if name in _WINDOWS:
            tag = self._window(name, dict(zip(_WINDOWS[name][2], args, strict=False)) | kwargs)
        elif results and inputs:
            tag = self._follow(name, lambda x: function(x, *args[1:], **kwargs), inputs, results[0])
        else:
            return out
        if name == "pad" and isinstance(tag, _Grid):
            left, _, top, _ = (*(kwargs["pad"] if "pad" in kwargs else args[1]), 0, 0)[:4]
            tag = replace(tag, first=(tag.first[0] - top * tag.stride[0], tag.first[1] - left * tag.stride[1]))
        if isinstance(tag, _Grid):
            self.coarsest = max(self.coarsest, *tag.stride)
        for result in results:
            setattr(result, _TAG, tag)
        return out

    def _refuse(self, name: str, reason: str) -> NoReturn:
        module = self.running[-1]
        where = f"{self.names[module] or 'the network'} ({type(module).__name__})"
        raise _Refusal(f"output_stride {self.OS} is out of reach for the network: {name} in {where} {reason}")

    def _keep(self, change: Change) -> None:
        if self.changes.setdefault(self.running[-1], change) != change:
            self._refuse("the layer", "is used at several strides; give each use a layer of its own")

    def _window(self, name: str, call: dict[str, Any]) -> _Tag:
        """Note how the layer has to change that calls a convolution or pool, and tag the result."""
        module, (before, after, _), grid = self.running[-1], _WINDOWS[name], getattr(call["input"], _TAG, "a constant")
        kernel = pair(call["weight"].shape[-2:] if name == "conv2d" else call["kernel_size"])
        stride = pair(call.get("stride") or (1 if name == "conv2d" else kernel))
        dilation, padding = pair(call.get("dilation", 1)), call.get("padding", 0)
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        words = {"valid": [0, 0], "same": [r // 2 for r in reach]}
        p = pair(words[padding] if isinstance(padding, str) else padding)
        if kernel == stride == (1, 1) and p == (0, 0):
            return grid if hasattr(call["input"], _TAG) else None  # acts on each pixel alone
        if isinstance(grid, str):
            self._refuse(name, f"comes after {grid}, past which the stride is not known")
        if grid is None:
            self._keep(())
            return None
        if grid.axes != (-2, -1):
            self._refuse(name, f"moves along the last two axes, but those of the image are now {grid.axes}")
        result = _moved(grid, kernel, stride, p, dilation)
        layer = zip(grid.stride, kernel, stride, p, dilation, strict=True)
        holes = [_holes(S, self.OS, k, s, q, d, call.get("ceil_mode", False)) for S, k, s, q, d in layer]
        if any(hole is None for hole in holes):
            self._refuse(name, f"jumps from stride {grid.stride} to {result.stride}")
        strides, dilations, paddings, end = zip(*holes, strict=True)
        if (strides, dilations, paddings) == (stride, dilation, p):
            self._keep(())
            return result
        change = {"stride": strides, "dilation": dilations}
        if not isinstance(padding, str):  # "same" and "valid" mean it at any dilation
            change["padding"] = paddings
        if name != "conv2d":
            change["ceil_mode"] = False
        if any(end) or name != "conv2d":
            change |= {"end": end, "__class__": after}
        forwards = ("forward", "_conv_forward")
        foreign = any(getattr(type(module), f, 0) is not getattr(before, f, 0) for f in forwards)
        for wrong, reason in (
            (foreign or "forward" in vars(module), f"would have to change, as only {before.__name__}'s forward can"),
            ("__class__" in change and type(module) is not before, f"is made for {before.__name__} itself only"),
            (getattr(module, "padding_mode", "zeros") != "zeros", "pads with other than zeros"),
            (getattr(module, "return_indices", False), "returns indices, which would change their meaning"),
            (
                padding == "same" and any(r % 2 for r in reach),
                "has padding='same' and an even kernel, half a pixel off",
            ),
        ):
            if wrong:
                self._refuse(name, reason)
        self._keep(tuple(change.items()))
        return result

    def _follow(self, name: str, function: Callable[[Tensor], Tensor], inputs: list[Tensor], result: Tensor) -> _Tag:
        """Tag the result of any other function, or refuse one that would have to change."""
        tags = {getattr(x, _TAG) for x in inputs} - {None}
        if any(isinstance(tag, str) for tag in tags) or not tags:
            return next((tag for tag in tags if isinstance(tag, str)), None)
        coarse = any(S > self.OS for tag in tags for S in tag.stride)
        if len(tags) > 1 and coarse:
            self._refuse(name, f"mixes strides {sorted(tag.stride for tag in tags)}")
        if len(tags) > 1:
            return name
        grid = tags.pop()
        source = next(x for x in inputs if getattr(x, _TAG) == grid)
        if name == "pad":
            return self._pad(grid, coarse)
        if coarse and not _is_known(name):
            self._refuse(name, f"follows stride {grid.stride} and is not known to act on each pixel alone")
        if name in _GLOBAL:
            return None
        if name in _TRANSPOSITIONS:
            sizes = list(function(torch.empty(tuple(range(source.ndim)), device="meta")).shape)  # tell the axes apart
            return replace(grid, axes=tuple(sizes.index(source.ndim + a) - source.ndim for a in grid.axes))
        sizes = [source.shape[a] for a in grid.axes]
        kept = result.ndim >= -min(grid.axes) and [result.shape[a] for a in grid.axes] == sizes
        if kept and name != "interpolate":
            return grid
        if name in _REDUCTIONS and result.numel() * math.prod(sizes) <= source.numel():
            return None  # of all positions
        if coarse and name in _LOCAL:
            self._refuse(name, f"cuts or joins along the axes of the image at stride {grid.stride}")
        steps: list[tuple[int, int]] = []
        if name in _RESIZING:
            steps = [(source.shape[a], result.shape[a]) for a in grid.axes]
        elif name == "getitem" and result.ndim == source.ndim and result._is_view():  # x[..., ::2, 1:]
            steps = [(result.stride(a), source.stride(a)) for a in grid.axes]
        if coarse or not steps or any(S * n % m for S, (n, m) in zip(grid.stride, steps, strict=True)):
            return name
        strides = [S * n // m for S, (n, m) in zip(grid.stride, steps, strict=True)]
        if max(strides) > self.OS:
            self._refuse(name, f"goes to stride {tuple(strides)}, but is not a layer that can be changed")
        return replace(grid, stride=pair(strides))

    def _pad(self, grid: _Grid, coarse: bool) -> _Tag:
        """Padding by a layer before another, as much wider as that one's own would be."""
        module = self.running[-1]
        if isinstance(module, nn.ConstantPad2d):
            y, x = (max(S // self.OS, 1) for S in grid.stride)
            left, right, top, bottom = module.padding
            padding = (x * left, x * right, y * top, y * bottom)
            self._keep((("padding", padding),) if coarse else ())
        elif coarse:
            self._refuse("pad", f"at stride {grid.stride} is not by nn.ConstantPad2d, so cannot be widened")
        return grid
