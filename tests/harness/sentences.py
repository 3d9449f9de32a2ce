"""Every sentence with which the core refuses something: what is done, the error, the text."""

from __future__ import annotations

import numpy as np

import normkit as nk
import normkit.numpy


def called(layer):
    layer(X, training=True)
    return layer


X = np.zeros((4, 3, 2), np.float32)
ONES = {"scale": np.ones(3, np.float32), "bias": np.zeros(3, np.float32)}
BN = nk.BatchNorm(3)
P, S = BN.init()
BN_TEXT = (
    "BatchNorm(num_features=3, axis=1, eps=1e-05, decay=0.9, correction=1, scale=True, bias=True, "
    "track_running_stats=True)"
)


def bn(x=X, p=P, s=S, **options):
    return BN.apply(p, s, x, **options)


CASES = {
    "integers": (
        lambda: nk.moments(np.arange(3)),
        TypeError,
        "x must hold real floating-point numbers, but its dtype is int64; convert it first, for "
        "example to float32.",
    ),
    "complex": (
        lambda: bn(X.astype(np.complex64)),
        TypeError,
        "x must hold real floating-point numbers, but its dtype is complex64; convert it first, "
        "for example to float32.",
    ),
    "objects": (
        lambda: nk.layer_norm(np.array([[1, "a"]], dtype=object)),
        TypeError,
        "x must hold real floating-point numbers, but its dtype is object; convert it first, for "
        "example to float32.",
    ),
    "integer parameter": (
        lambda: nk.layer_norm(X, np.ones(2, int)),
        TypeError,
        "scale must hold real floating-point numbers, but its dtype is int64; convert it first, "
        "for example to float32.",
    ),
    "list": (
        lambda: nk.moments([1.0, 2.0]),
        TypeError,
        "normkit works on arrays (NumPy, PyTorch, TensorFlow, JAX, or any that follows the Array "
        "API standard), but got a value of type 'list'; convert it first, for example with "
        "numpy.asarray(x, dtype='float32').",
    ),
    "axis beyond": (
        lambda: nk.layer_norm(X, axes=3),
        ValueError,
        "axis 3 is out of range for an array of 3 dimensions; use one from -3 to 2.",
    ),
    "axis twice": (
        lambda: nk.moments(X, (1, -2)),
        ValueError,
        "each axis may be named once, but got (1, -2) for 3 dimensions.",
    ),
    "axis no integer": (
        lambda: nk.moments(X, 1.0),
        TypeError,
        "an axis must be an integer, but got 1.0; name axes by their position.",
    ),
    "axis of a definition": (
        lambda: nk.BatchNorm(3, axis=True),
        TypeError,
        "an axis must be an integer, but got True; name axes by their position.",
    ),
    "axis of a layer beyond x": (
        lambda: nk.BatchNorm(3, axis=3).apply(P, S, X),
        ValueError,
        "axis 3 is out of range for an array of 3 dimensions; use one from -3 to 2.",
    ),
    "eps zero": (
        lambda: nk.batch_norm(X, eps=0),
        ValueError,
        "eps must be positive and finite, in float32 too, but got 0; 1e-5 is a common choice.",
    ),
    "eps nan": (
        lambda: nk.LayerNorm(3, eps=float("nan")),
        ValueError,
        "eps must be positive and finite, in float32 too, but got nan; 1e-5 is a common choice.",
    ),
    "eps infinite": (
        lambda: nk.normalize(X, X, X, eps=float("inf")),
        ValueError,
        "eps must be positive and finite, in float32 too, but got inf; 1e-5 is a common choice.",
    ),
    "eps text": (
        lambda: nk.BatchNorm(3, eps="small"),
        ValueError,
        "eps must be positive and finite, in float32 too, but got 'small'; 1e-5 is a common "
        "choice.",
    ),
    "eps negative": (
        lambda: nk.layer_norm(X, eps=-1e-5),
        ValueError,
        "eps must be positive and finite, in float32 too, but got -1e-05; 1e-5 is a common choice.",
    ),
    "decay": (
        lambda: nk.BatchNorm(3, decay=1.5),
        ValueError,
        "decay must be a number from 0 to 1, or None for the cumulative average, but got 1.5; it "
        "is the share of the running statistics that a step keeps, so PyTorch's momentum=0.1 is "
        "decay=0.9.",
    ),
    "decay nan": (
        lambda: nk.BatchNorm(3, decay=float("nan")),
        ValueError,
        "decay must be a number from 0 to 1, or None for the cumulative average, but got nan; it "
        "is the share of the running statistics that a step keeps, so PyTorch's momentum=0.1 is "
        "decay=0.9.",
    ),
    "correction": (
        lambda: nk.BatchNorm(3, correction=2),
        ValueError,
        "correction must be 0 or 1, but got 2; 1 tracks the unbiased variance (as PyTorch does), "
        "0 the population variance (as Keras and Flax do).",
    ),
    "features": (
        lambda: nk.BatchNorm(0),
        ValueError,
        "num_features must be a positive integer, but got 0.",
    ),
    "features of text": (
        lambda: nk.BatchNorm("3"),
        ValueError,
        "num_features must be a positive integer, but got '3'.",
    ),
    "shape": (
        lambda: nk.LayerNorm((3, 0)),
        ValueError,
        "each length in shape must be a positive integer, but got 0.",
    ),
    "shape and axes": (
        lambda: nk.LayerNorm((3, 4), axes=1),
        ValueError,
        "shape and axes must name the same number of axes, one at least, but got shape (3, 4) and "
        "axes (1,).",
    ),
    "no shape": (
        lambda: nk.LayerNorm(()),
        ValueError,
        "shape and axes must name the same number of axes, one at least, but got shape () and "
        "axes ().",
    ),
    "rank": (
        lambda: bn(X[0, :, 0]),
        ValueError,
        "BatchNorm needs an array of at least 2 dimensions, but x has shape (3,); add a batch "
        "axis.",
    ),
    "rank of a function": (
        lambda: nk.batch_norm(X[0, 0]),
        ValueError,
        "batch_norm needs an array of at least 2 dimensions, but x has shape (2,); add a batch "
        "axis.",
    ),
    "channels": (
        lambda: bn(X[:, :2]),
        ValueError,
        f"{BN_TEXT} needs an x of lengths (3,) along its axes (1,), but x has shape (4, 2, 2): "
        "lengths (2,). Define the layer for these, or move the axes of x.",
    ),
    "lengths": (
        lambda: nk.LayerNorm((2, 3)).apply({}, {}, X),
        ValueError,
        "LayerNorm(shape=(2, 3), axes=(-2, -1), eps=1e-05, scale=True, bias=True) needs an x of "
        "lengths (2, 3) along its axes (1, 2), but x has shape (4, 3, 2): lengths (3, 2). Define "
        "the layer for these, or move the axes of x.",
    ),
    "params": (
        lambda: bn(p={"weight": P["scale"]}),
        ValueError,
        "params must have the keys ['bias', 'scale'], but has ['weight']; start from the layer's "
        "own init().",
    ),
    "state": (
        lambda: bn(s={}),
        ValueError,
        "state must have the keys ['count', 'mean', 'var'], but has []; start from the layer's own "
        "init().",
    ),
    "shape of a parameter": (
        lambda: bn(p=P | {"scale": np.ones(2, np.float32)}),
        ValueError,
        "scale must have shape (3,), one value for each position along the axes it belongs to, but "
        "its shape is (2,).",
    ),
    "shape of the state": (
        lambda: bn(s=S | {"var": np.ones((3, 1), np.float32)}),
        ValueError,
        "state['var'] must be an array of shape (3,) of the same library as x, but got a ndarray "
        "of shape (3, 1); start from the layer's own init(xp=...).",
    ),
    "eps that float32 does not have": (
        lambda: nk.LayerNorm(3, eps=1e-50),
        ValueError,
        "eps must be positive and finite, in float32 too, but got 1e-50; 1e-5 is a common choice.",
    ),
    "axes out of order": (
        lambda: nk.LayerNorm((3, 4), axes=(2, 1)),
        ValueError,
        "axes must be in ascending order, each once, as the lengths in shape are, but got (2, 1); "
        "sort both.",
    ),
    "moments of other shapes": (
        lambda: nk.Moments.of(X, 0).merge(nk.Moments.of(X, (0, 1))),
        ValueError,
        "the other mean must have the shape (3, 2), but its shape is (2,).",
    ),
    "one value": (
        lambda: bn(X[:1, :, :1], training=True),
        ValueError,
        "BatchNorm in training needs more than one value per channel, but got one: its variance is "
        "not defined. Use a larger batch, or the running statistics.",
    ),
    "one value to a function": (
        lambda: nk.batch_norm(X[:1, :, :1]),
        ValueError,
        "BatchNorm in training needs more than one value per channel, but got one: its variance is "
        "not defined. Use a larger batch, or the running statistics.",
    ),
    "mask": (
        lambda: bn(training=True, mask=np.ones((4, 3), bool)),
        ValueError,
        "a mask or weights must have the shape of x, broadcast to it at equal rank, or lack only "
        "the channel axis, but its shape is (4, 3) and x has shape (4, 3, 2); reshape it first.",
    ),
    "mask of too low a rank": (
        lambda: nk.layer_norm(X, mask=np.ones(2, bool)),
        ValueError,
        "a mask or weights must have the shape of x, broadcast to it at equal rank, or lack only "
        "the channel axis, but its shape is (2,) and x has shape (4, 3, 2); reshape it first.",
    ),
    "weights": (
        lambda: nk.moments(X, 0, weights=np.ones(3)),
        ValueError,
        "a mask or weights must broadcast to the shape of x, but its shape is (3,) and x has shape "
        "(4, 3, 2); reshape it first.",
    ),
    "negative weights": (
        lambda: nk.moments(X, 0, weights=np.full(X.shape, -1.0)),
        ValueError,
        "weights must not be negative, nor NaN: they say how often each value counts, and 0 leaves "
        "it out.",
    ),
    "weights that are NaN": (
        lambda: bn(training=True, mask=np.full(X.shape, np.nan)),
        ValueError,
        "weights must not be negative, nor NaN: they say how often each value counts, and 0 leaves "
        "it out.",
    ),
    "complex weights": (
        lambda: nk.moments(X, 0, weights=np.ones(X.shape, np.complex64)),
        TypeError,
        "a mask or weights must be booleans or nonnegative numbers, but the dtype is complex64.",
    ),
    "mean that does not broadcast": (
        lambda: nk.normalize(X, np.ones(3, np.float32), X, eps=1e-5),
        ValueError,
        "mean must broadcast to the shape of x, (4, 3, 2), but its shape is (3,); give it the rank "
        "of x, with length 1 along the axes it does not depend on.",
    ),
    "backward first": (
        lambda: nk.numpy.layer(BN).backward(X),
        RuntimeError,
        "backward needs a call to go back through: call the layer first.",
    ),
    "backward of another shape": (
        lambda: called(nk.numpy.layer(BN)).backward(X[0]),
        ValueError,
        "grad must have the shape (4, 3, 2), but its shape is (3, 2).",
    ),
    "no definition": (
        lambda: nk.numpy.layer("batch"),
        TypeError,
        "a layer is built from a definition such as nk.BatchNorm(64), but got 'batch'.",
    ),
    "no layer": (
        lambda: nk.numpy.definition(3),
        TypeError,
        "a definition can be read from a normalization layer, but got a builtins.int.",
    ),
    "momentum": (
        lambda: nk.BatchNorm(3, momentum=0.1),
        TypeError,
        "there is no momentum, which means opposite things in different frameworks, but got "
        "momentum=0.1; give decay, the share of the running statistics that a step keeps: "
        "1 - momentum of PyTorch, momentum of Keras and Flax.",
    ),
    "groups": (
        lambda: nk.GroupNorm(4, 6),
        ValueError,
        "num_channels (6) must be divisible by num_groups (4), so that the groups are of equal "
        "size.",
    ),
    "groups of a function": (
        lambda: nk.group_norm(X, 2),
        ValueError,
        "num_channels (3) must be divisible by num_groups (2), so that the groups are of equal "
        "size.",
    ),
    "no groups": (
        lambda: nk.group_norm(X, 0),
        ValueError,
        "num_groups must be a positive integer, but got 0.",
    ),
    "channels among the samples": (
        lambda: nk.group_norm(X, 2, axis=-3),
        ValueError,
        "the first axis is that of the samples, which are normalized one by one, but the channel "
        "axis -3 of 3 dimensions is the same; move the axes of x.",
    ),
    "instances among the samples": (
        lambda: nk.InstanceNorm(4, axis=0).apply({}, {}, X),
        ValueError,
        "the first axis is that of the samples, which are normalized one by one, but the channel "
        "axis 0 of 3 dimensions is the same; move the axes of x.",
    ),
    "one value in a group": (
        lambda: nk.group_norm(X[:, :, 0], 3),
        ValueError,
        "group_norm needs more than one value in each group that it normalizes, but got one: its "
        "variance is not defined. Use larger groups, or an x with more positions.",
    ),
    "one value in an instance": (
        lambda: nk.instance_norm(X[:, :, :1]),
        ValueError,
        "instance_norm needs more than one value in each group that it normalizes, but got one: "
        "its variance is not defined. Use larger groups, or an x with more positions.",
    ),
    "an x without positions": (
        lambda: nk.instance_norm(X[0]),
        ValueError,
        "instance_norm needs an array of at least 3 dimensions, but x has shape (3, 2); add a "
        "batch axis.",
    ),
    "a definition without positions": (
        lambda: nk.InstanceNorm(3).apply({}, {}, X[:, :, 0]),
        ValueError,
        "InstanceNorm needs an array of at least 3 dimensions, but x has shape (4, 3); add a "
        "batch axis.",
    ),
    "channels of groups": (
        lambda: nk.GroupNorm(2, 6, scale=False, bias=False).apply({}, {}, X),
        ValueError,
        "GroupNorm(num_groups=2, num_channels=6, axis=1, eps=1e-05, scale=False, bias=False) needs "
        "an x of lengths (6,) along its axes (1,), but x has shape (4, 3, 2): lengths (3,). Define "
        "the layer for these, or move the axes of x.",
    ),
    "bias of an RMSNorm": (
        lambda: nk.RMSNorm(2).apply({"scale": X[0, 0], "bias": X[0, 0]}, {}, X),
        ValueError,
        "params must have the keys ['scale'], but has ['bias', 'scale']; start from the layer's "
        "own init().",
    ),
    "state of instances": (
        lambda: nk.InstanceNorm(3, track_running_stats=True).apply({}, {}, X),
        ValueError,
        "state must have the keys ['count', 'mean', 'var'], but has []; start from the layer's own "
        "init().",
    ),
    "eps of an RMSNorm": (
        lambda: nk.RMSNorm(2, eps=0.0),
        ValueError,
        "eps must be positive and finite, in float32 too, but got 0.0; 1e-5 is a common choice.",
    ),
}
