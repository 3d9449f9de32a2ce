"""Calls to draw for the functions of an Array API namespace: CASES has an entry for each.

Values are multiples of 1/2 up to 4 (and NaN and infinities), whose sums are exact in every dtype.
array-api-strict, which has no half types, makes the same calls in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import array_api_strict as strict
import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

SIGNED, UNSIGNED = (tuple(f"{u}int{bits}" for bits in (8, 16, 32, 64)) for u in ("", "u"))
HALF = ("float16", "bfloat16")
REAL = (*HALF, "float32", "float64")
COMPLEX = ("complex64", "complex128")
NUMBERS = SIGNED + UNSIGNED + REAL
ALL = ("bool", *NUMBERS)
KINDS = ("bool", "signed integer", "unsigned integer", "integral", "real floating", "numeric")
KINDS += ("complex floating",)
STRICT_NAMES = {name: "float32" if name in HALF else name for name in (*ALL, *COMPLEX)}


@dataclass(frozen=True)
class D:
    """A dtype of whichever namespace the call is made in."""

    name: str


def numpy_dtype(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def promoted(*names):
    try:
        return strict.result_type(*(getattr(strict, STRICT_NAMES[name]) for name in names))
    except TypeError:
        return None


PAIRS = [(a, b) for a in ALL for b in ALL if promoted(a, b) is not None]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
FULL = hnp.array_shapes(min_dims=0, max_dims=3, min_side=1, max_side=3)
SCALARS = {"b": st.booleans(), "i": st.integers(0, 9), "u": st.integers(0, 9)}
FLOATS = st.integers(-8, 8).map(lambda n: n / 2)


@st.composite
def arrays(draw, dtypes=ALL, shapes=SHAPES, special=True):
    dtype = numpy_dtype(draw(st.sampled_from(dtypes)))
    elements = st.integers(0 if dtype.kind in "ub" or not special else -8, 8)
    if dtype.name in REAL:
        extremes = [np.nan, np.inf, -np.inf] if special else [0.5]
        elements = st.one_of(FLOATS.map(abs if not special else float), st.sampled_from(extremes))
    shape = shapes if isinstance(shapes, tuple) else draw(shapes)
    with np.errstate(all="ignore"):
        return draw(hnp.arrays(np.float64, shape, elements=elements)).astype(dtype)


def options(**strategies):
    """Keywords, each of which may be left out."""
    return st.fixed_dictionaries({}, optional=strategies)


def dtypes_of(names):
    return st.none() | st.sampled_from(names).map(D)


def calls(*arguments, **keywords):
    return st.tuples(st.tuples(*arguments), options(**keywords))


@st.composite
def on_axes(draw, x, least=0, flag="keepdims"):
    x = draw(x)
    axes = hnp.valid_tuple_axes(x.ndim, min_size=least)
    if x.ndim:
        axes |= st.integers(-x.ndim, x.ndim - 1)
    return (x,), draw(options(axis=st.none() | axes, **{flag: st.booleans()}))


@st.composite
def sums(draw):
    args, keywords = draw(on_axes(arrays(NUMBERS)))
    wider = [n for n in NUMBERS if promoted(n, args[0].dtype.name) == promoted(n)]
    return args, keywords | draw(options(dtype=dtypes_of(wider)))


@st.composite
def together(draw, numbers=True, condition=False):
    """Two operands that broadcast and promote, of which one may be a Python number."""
    shapes = draw(hnp.mutually_broadcastable_shapes(num_shapes=3, max_dims=3, max_side=3))
    names = draw(st.sampled_from([p for p in PAIRS if "bool" not in p] if numbers else PAIRS))
    operands = [draw(arrays((n,), s)) for n, s in zip(names, shapes.input_shapes[1:], strict=True)]
    if draw(st.booleans()):
        kind = "f" if operands[1].dtype.name in REAL else operands[1].dtype.kind
        operands[0] = draw(SCALARS.get(kind, FLOATS | SCALARS["i"]))
    operands = draw(st.permutations(operands))
    mask = [draw(arrays(("bool",), shapes.input_shapes[0]))] if condition else []
    return (*mask, *operands), {}


@st.composite
def reshapes(draw):
    x = draw(arrays())
    shape = draw(st.permutations([*x.shape, 1]))
    return (x, draw(st.sampled_from([tuple(shape), (x.size,)] + [(-1,)] * (x.size > 0)))), {}


@st.composite
def broadcasts(draw):
    shapes = draw(hnp.mutually_broadcastable_shapes(num_shapes=1, base_shape=draw(SHAPES)))
    return (draw(arrays(shapes=shapes.input_shapes[0])), shapes.result_shape), {}


@st.composite
def permutations(draw):
    x = draw(arrays())
    return (x, tuple(draw(st.permutations(range(x.ndim))))), {}


@st.composite
def concatenations(draw):
    names = draw(st.sampled_from(PAIRS))
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=3))
    axis = draw(st.none() | st.integers(-len(shape), len(shape) - 1))
    parts = []
    for name in names:
        own = list(shape)
        own[0 if axis is None else axis] = draw(st.integers(0, 3))
        parts.append(draw(arrays((name,), tuple(own))))
    return (parts,), {"axis": axis}


@st.composite
def expansions(draw):
    x = draw(arrays())
    several = hnp.valid_tuple_axes(x.ndim + 2, min_size=2, max_size=2)
    return (x,), {"axis": draw(st.integers(-x.ndim - 1, x.ndim) | several)}


@st.composite
def squeezes(draw):
    x = draw(arrays())
    ones = [a for axis, n in enumerate(x.shape) if n == 1 for a in (axis, axis - x.ndim)]
    if not ones:
        return (x, ()), {}
    several = st.lists(st.sampled_from(ones), unique_by=lambda axis: axis % x.ndim).map(tuple)
    return (x, draw(several | st.sampled_from(ones))), {}


@st.composite
def python_or_arrays(draw):
    x = draw(arrays(special=False))
    python = x.astype(STRICT_NAMES[x.dtype.name]).tolist()
    return (draw(st.sampled_from([x, python])),), draw(options(dtype=dtypes_of(REAL)))


@st.composite
def fills(draw):
    kind = draw(st.sampled_from("bif"))
    value = draw(SCALARS.get(kind, FLOATS))
    names = {"b": ("bool",), "i": NUMBERS, "f": REAL}[kind]
    return (draw(LENGTHS), value), draw(options(dtype=dtypes_of(names)))


@st.composite
def ranges(draw):
    numbers = st.integers(-4, 4) | FLOATS
    start, *rest = draw(st.lists(numbers, min_size=1, max_size=3))
    step = [abs(rest[1]) + 1] if len(rest) == 2 else []
    return (start, *rest[:1], *step), draw(options(dtype=dtypes_of(REAL)))


@st.composite
def promotions(draw):
    names = draw(st.sampled_from([*PAIRS, (COMPLEX[0], "float64"), COMPLEX]))
    operands = [draw(st.just(D(n)) | (arrays((n,)) if n in ALL else st.nothing())) for n in names]
    kind = "f" if names[0] in REAL + COMPLEX else numpy_dtype(names[0]).kind
    scalars = draw(st.lists(SCALARS.get(kind, FLOATS | SCALARS["i"]), max_size=1))
    return tuple(draw(st.permutations(operands + scalars))), {}


KIND = st.sampled_from(KINDS)
EXACT = st.sampled_from([n for n in (*ALL, *COMPLEX) if n not in HALF]).map(D)
LENGTHS = SHAPES | st.integers(0, 3)
CASES = {
    "isdtype": calls(st.sampled_from((*ALL, *COMPLEX)).map(D), KIND | st.lists(KIND).map(tuple))
    | calls(EXACT, EXACT | st.lists(EXACT).map(tuple)),
    "result_type": promotions(),
    "astype": calls(arrays(special=False), st.sampled_from(ALL).map(D)),
    "asarray": python_or_arrays(),
    "zeros": calls(LENGTHS, dtype=dtypes_of(ALL)),
    "ones": calls(LENGTHS, dtype=dtypes_of(ALL)),
    "full": fills(),
    "arange": ranges(),
    "zeros_like": calls(arrays(), dtype=dtypes_of(ALL)),
    "ones_like": calls(arrays(), dtype=dtypes_of(ALL)),
    "abs": calls(arrays(NUMBERS)),
    "sqrt": calls(arrays(REAL)),
    "isfinite": calls(arrays(NUMBERS)),
    "maximum": together(),
    "minimum": together(),
    "where": together(numbers=False, condition=True),
    "sum": sums(),
    "mean": on_axes(arrays(REAL)),
    # Of nothing, the standard leaves the greatest and the least open.
    "max": on_axes(arrays(NUMBERS, FULL)),
    "min": on_axes(arrays(NUMBERS, FULL)),
    "any": on_axes(arrays()),
    "all": on_axes(arrays()),
    "reshape": reshapes(),
    "broadcast_to": broadcasts(),
    "permute_dims": permutations(),
    "concat": concatenations(),
    "expand_dims": expansions(),
    "squeeze": squeezes(),
}
