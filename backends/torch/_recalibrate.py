"""Take the running statistics of a model again, from data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from normkit import _recalibrate
from normkit._recalibrate import Recalibration, Statistics

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    call: Callable[[nn.Module, Any], Any] | None = None,
    one_pass: bool = False,
    progress: bool = True,
) -> nn.Module:
    """Take the running statistics of every layer in ``model`` that keeps some again, in place.

    Each layer, native or normkit's, frozen or not, gets the mean and the variance of all values
    that it sees in ``batches``, whatever their sizes are, as if they came in a single batch; an
    InstanceNorm gets the averages over all instances. They are merged in float64. The model is in
    eval mode meanwhile, without gradients and uncompiled. ``momentum`` stays as it is, and
    ``num_batches_tracked`` becomes the number of batches. If anything is raised, also by Ctrl-C,
    the model is as it was before.

    The layers have their turn in the order in which they are called, with one pass over the data
    for each: what a layer sees depends on the statistics of those before it. Only of a layer that
    is called again on what became of its own result, it is seen with the statistics of before.

    Args:
        model: any module; it may itself be a normalization layer.
        batches: what yields the batches, each time it is iterated over: a ``DataLoader``, a list.
            A batch is the tensor to call the model with, a tuple or list that begins with it, or a
            dict of keyword arguments; tensors are moved to the device of the statistics.
        call: for any other batch or model: ``call(model, batch)`` calls one with the other.
        one_pass: take all statistics in a single pass, with the model as it is. That is as fast as
            it can be, but a layer behind another one learns what it sees with the old statistics
            of that one.
        progress: show a bar in the terminal, if the package tqdm is installed.

    Returns:
        ``model``.

    Raises:
        ValueError: there is no batch, or one without a batch axis; no layer keeps statistics, or
            one is not called, sees too few values, or NaN; an iterator that gives its batches only
            once, where several passes are needed.
        TypeError: a batch is none of those above.

    >>> model = nn.Sequential(nn.BatchNorm1d(1, momentum=None), nn.Dropout())
    >>> batches = [torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[6.0]])]
    >>> bn = recalibrate(model, batches)[0]
    >>> bn.running_mean.item(), round(bn.running_var.item(), 4), bn.num_batches_tracked.item()
    (3.0, 4.6667, 2)
    """
    found = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _NormBase) and layer.running_mean is not None
    }
    for name, layer in found.items():
        if is_lazy(layer.running_mean):
            raise _not_initialized(name)
    passes = Recalibration(
        {
            name: Statistics(
                name or type(layer).__name__,
                getattr(layer, "correction", 1),
                isinstance(layer, _InstanceNorm),
                layer.running_mean.dtype,
            )
            for name, layer in found.items()
        },
        one_pass=one_pass,
    )
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.clone() for layer in found.values() for buffer in _buffers(layer)}
    hooks = []
    device = next(iter(buffers)).device
    forward = partial(_call, device=device) if call is None else call

    def write(name: str, mean: Any, variance: Any, calls: int) -> None:
        layer = found[name]
        layer.running_mean.copy_(torch.as_tensor(mean))
        layer.running_var.copy_(torch.as_tensor(variance))
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(calls)

    # Compiled code would not be left where a hook wants to read values.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            model.eval()
            for name, layer in found.items():
                hook = partial(_see, passes, name)
                hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            passes.run(batches, lambda batch: forward(model, batch), write, progress=progress)
        except BaseException:
            for buffer, value in buffers.items():
                buffer.copy_(value)
            raise
        finally:
            for hook in hooks:
                hook.remove()
            for module, training in modes.items():
                module.training = training
    return model


def _see(
    passes: Recalibration, name: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Before ``layer`` is called with these arguments."""
    if layer.training:
        raise _recalibrate.in_training(name or type(layer).__name__)
    x, mask = args[0] if args else kwargs["input"], kwargs.get("mask")
    if isinstance(layer, _InstanceNorm) and x.ndim == layer._get_no_batch_dim():
        x, mask = x[None], None if mask is None else mask[None]
    channel = getattr(layer, "axis", 1)
    passes.see(name, x, channel, lambda: _recalibrate.weights_like(x, mask, channel))


def _call(model: nn.Module, batch: Any, device: torch.device) -> Any:
    """``model`` with a batch of the usual kinds."""
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Mapping):
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return model(**moved)
    if not isinstance(batch, Tensor):
        wanted = "a tensor, a tuple or list that begins with one, or a dict of keyword arguments"
        raise _recalibrate.no_input(batch, wanted)
    _recalibrate.has_batch_axis(batch)
    return model(batch.to(device))


def _buffers(layer: _NormBase) -> list[Tensor]:
    """The buffers of ``layer`` that are statistics or count them."""
    found = (getattr(layer, name) for name in _BUFFERS)
    return [buffer for buffer in found if buffer is not None]


def _not_initialized(name: str) -> ValueError:
    msg = (
        f"layer {name!r} is lazy and has not been called yet, so it has no statistics; call the "
        f"model once first."
    )
    return ValueError(msg)
