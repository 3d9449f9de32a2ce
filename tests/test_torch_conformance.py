"""PyTorch's own table of module tests, with normkit's classes in place of the native ones.

``torch.testing._internal.common_modules.module_db`` lists for each module how it is constructed and
called. Every entry of a normalization layer is run here, in training and in evaluation.
"""

from __future__ import annotations

import copy
import pickle
from functools import cache

import hypothesis
import pytest
import torch
from torch import nn
from torch.func import functional_call

import normkit.torch

NAMES = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GroupNorm", "LayerNorm", "RMSNorm"]
NAMES += ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# Of the largest value of a tensor; bfloat16 results may differ in their last digit besides.
BOUND = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-6}

each_layer = pytest.mark.parametrize("name", NAMES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
train_and_eval = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@cache
def database() -> dict:
    """The entries by class name, imported without the settings that the import changes."""
    profile = hypothesis.settings.get_current_profile_name()
    from torch.testing._internal.common_modules import module_db

    hypothesis.settings.load_profile(profile)
    torch.backends.__allow_nonbracketed_mutation_flag = True
    return {info.module_cls.__name__: info for info in module_db}


class Case:
    """An entry's input, and both layers for it: the same parameters, the same state."""

    def __init__(self, name, training, dtype, entry) -> None:
        self.args, self.kwargs = entry.constructor_input.args, entry.constructor_input.kwargs
        self.kinds = getattr(normkit.torch, name), getattr(nn, name)
        self.ours, self.native = (kind(*self.args, **self.kwargs) for kind in self.kinds)
        generator = torch.Generator().manual_seed(0)
        for p in self.ours.state_dict().values():
            if p.dtype.is_floating_point:
                p.copy_(torch.rand(p.shape, generator=generator) + 0.5)
        self.native.load_state_dict(self.ours.state_dict(), strict=True)
        for layer in (self.ours, self.native):
            layer.to(dtype).train(training)
        (self.x,) = entry.forward_input.args
        self.upstream = torch.randn(self.x.shape, generator=generator).to(dtype)
        self.reference = entry.reference_fn

    def run(self, layer, x=None):
        """Output, gradients and running statistics after one step."""
        x = (self.x if x is None else x).detach().clone().requires_grad_()
        y = layer(x)
        y.backward(self.upstream.to(y.dtype))
        grads = [p.grad for p in layer.parameters()]
        return [y.detach(), x.grad, *grads, *statistics(layer)]

    def counts(self):
        return [getattr(layer, "num_batches_tracked", None) for layer in (self.ours, self.native)]


def statistics(layer):
    return [buffer for buffer in layer.buffers() if buffer.ndim]


def cases(name, training, dtype):
    info = database()[name]
    torch.manual_seed(0)
    entries = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=training
    )
    assert entries
    for entry in entries:
        yield Case(name, training, dtype, entry)


def assert_near(got, want):
    """Within the bound of the dtype of ``got``; ``want`` may be wider."""
    for a, b in zip(got, want, strict=True):
        last_digit = 2.0**-7 if a.dtype == torch.bfloat16 else 0.0
        bound = BOUND[a.dtype] * scale(b)
        torch.testing.assert_close(a.double(), b.double(), rtol=last_digit, atol=bound)


def scale(a) -> float:
    return max(1.0, float(a.abs().max())) if a.numel() else 1.0


def test_the_table_has_these_layers():
    found = {name for name in database() if "Norm" in name}
    assert found - {"LocalResponseNorm", "CrossMapLRN2d"} == set(NAMES)


@each_layer
@each_dtype
@train_and_eval
def test_values_gradients_and_buffers(name, dtype, training):
    for case in cases(name, training, dtype):
        exact = copy.deepcopy(case.native).double()
        got, native = case.run(case.ours), case.run(case.native)
        assert_near(got, case.run(exact, case.x.double()))
        for a, b in zip(got, native, strict=True):
            assert a.dtype == b.dtype
            # In bfloat16 the native layers are further off: a sum of gradients by 5 percent.
            bound = 0.1 if a.dtype == torch.bfloat16 else 5 * BOUND[a.dtype]
            torch.testing.assert_close(a, b, rtol=0, atol=bound * scale(b))
        ours, theirs = case.counts()
        if not name.startswith("Instance") and case.x.numel():  # the native ones: never, and always
            assert ours == theirs
        if case.reference is not None:
            want = case.reference(case.ours, case.x)
            torch.testing.assert_close(case.ours(case.x), want, rtol=1e-5, atol=1e-5)


@each_layer
@train_and_eval
def test_derivatives(name, training):
    """Both modes, batched, and the second derivatives."""
    for case in cases(name, training, torch.float64):
        names = [n for n, _ in case.ours.named_parameters()]

        def call(x, *params, layer=case.ours, names=names):
            return functional_call(layer, dict(zip(names, params, strict=True)), (x,))

        given = [case.x, *case.ours.parameters()]
        given = [a.detach().clone().requires_grad_() for a in given]
        fast = case.x.numel() > 50
        forward = {"check_forward_ad": True, "check_batched_grad": True, "fast_mode": fast}
        assert torch.autograd.gradcheck(call, given, **forward)
        if case.x.numel():
            assert torch.autograd.gradgradcheck(
                call, given, check_fwd_over_rev=True, fast_mode=fast
            )


@each_layer
@train_and_eval
def test_memory_formats_are_kept(name, training):
    """For every layer, though PyTorch's InstanceNorm and LayerNorm keep none."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for case in cases(name, training, torch.float64):
        fmt = formats.get(case.x.ndim)
        if fmt is None:
            continue
        want = case.run(copy.deepcopy(case.ours))
        x = case.x.detach().contiguous(memory_format=fmt).requires_grad_()
        y = case.ours.to(memory_format=fmt)(x)
        assert y.is_contiguous(memory_format=fmt)
        kept = case.native(x).is_contiguous(memory_format=fmt)
        assert kept == (not name.startswith(("Instance", "Layer")))
        y.sum().backward()
        assert x.grad.is_contiguous(memory_format=fmt)
        assert_near([y.detach()], want[:1])


@each_layer
@train_and_eval
def test_tensors_that_are_not_contiguous(name, training):
    def strided(a):
        wide = torch.full((*a.shape, 2), torch.nan, dtype=a.dtype)
        wide[..., 0] = a.detach()
        return wide[..., 0]

    for case in cases(name, training, torch.float64):
        other = copy.deepcopy(case.ours)
        for p in other.parameters():
            p.data = strided(p)
        for key, buffer in list(other.named_buffers()):
            if buffer.ndim:
                other._buffers[key] = strided(buffer)
        want = case.run(case.ours)
        x = strided(case.x).requires_grad_()
        assert case.x.numel() < 2 or not x.is_contiguous()
        y = other(x)
        y.backward(case.upstream)
        grads = [p.grad for p in other.parameters()]
        assert_near([y.detach(), x.grad, *grads, *statistics(other)], want)


@each_layer
@pytest.mark.parametrize("device", ["cpu", "meta"])
@each_dtype
def test_factory_arguments(name, device, dtype):
    for case in cases(name, True, dtype):
        ours, native = (
            kind(*case.args, **case.kwargs, device=device, dtype=dtype) for kind in case.kinds
        )
        for a, b in zip(tensors(ours), tensors(native), strict=True):
            assert a[0] == b[0]
            assert (a[1].dtype, a[1].device, a[1].shape) == (b[1].dtype, b[1].device, b[1].shape)
            assert device == "meta" or torch.equal(a[1], b[1])
        if device == "meta":
            y = ours(case.x.to("meta"))
            assert (y.shape, y.dtype, y.is_meta) == (case.x.shape, dtype, True)
            ours.to_empty(device="cpu").reset_parameters()
            fresh = case.kinds[0](*case.args, **case.kwargs, dtype=dtype)
            assert all(
                torch.equal(a, b)
                for (_, a), (_, b) in zip(tensors(ours), tensors(fresh), strict=True)
            )


def tensors(layer):
    return [*layer.named_parameters(), *layer.named_buffers()]


@each_layer
@train_and_eval
def test_copies_files_and_text(name, training):
    for case in cases(name, training, torch.float32):
        assert repr(case.ours) == repr(case.native)
        copies = [copy.deepcopy(case.ours), pickle.loads(pickle.dumps(case.ours))]
        for source, target in (case.kinds, case.kinds[::-1]):
            # From either kind to the other, and to its own.
            for kind in (source, target):
                one = source(*case.args, **case.kwargs)
                one.load_state_dict(case.ours.state_dict(), strict=True)
                two = kind(*case.args, **case.kwargs)
                two.load_state_dict(one.state_dict(), strict=True)
                assert list(one.state_dict()) == list(two.state_dict())
                assert one.state_dict()._metadata == two.state_dict()._metadata
                if kind is case.kinds[0]:
                    copies.append(two.train(training))
        want = case.run(case.ours)
        for other in copies:
            assert type(other) is type(case.ours)
            assert all(torch.equal(a, b) for a, b in zip(case.run(other), want, strict=True))


@each_layer
@train_and_eval
def test_gradients_add_up_and_are_reset(name, training):
    for case in cases(name, training, torch.float64):
        params = list(case.ours.parameters())
        case.run(case.ours)
        once = [p.grad.clone() for p in params]
        held = [p.grad for p in params]
        case.run(case.ours)
        assert_near([p.grad for p in params], [2 * g for g in once])
        assert all(p.grad is g for p, g in zip(params, held, strict=True))
        case.ours.zero_grad(set_to_none=False)
        assert all(not p.grad.any() for p in params)
        case.ours.zero_grad()
        assert all(p.grad is None for p in params)


@each_layer
def test_what_is_refused(name):
    from torch.testing._internal.common_modules import ModuleErrorEnum

    info = database()[name]
    assert (info.module_error_inputs_func is not None) == name.startswith(("Batch", "Group"))
    if info.module_error_inputs_func is None:
        return
    for error in info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    ):
        entry = error.module_error_input
        constructor, call = entry.constructor_input, entry.forward_input
        for kind in (getattr(normkit.torch, name), getattr(nn, name)):
            if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
                with pytest.raises(error.error_type, match=error.error_regex):
                    kind(*constructor.args, **constructor.kwargs)
            else:
                layer = kind(*constructor.args, **constructor.kwargs)
                with pytest.raises(error.error_type, match=error.error_regex):
                    layer(*call.args, **call.kwargs)
