"""Statistics of data that come in batches: merged, and given to the layers in their order."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest

import normkit as nk
from normkit import _streaming
from normkit._recalibrate import Recalibration, Statistics

SIZES = (7, 3, 1)


def values(shape, dtype=np.float64, offset=1e3):
    rng = np.random.default_rng(len(shape))
    return (offset + rng.standard_normal(shape) * np.arange(1, shape[-1] + 1)).astype(dtype)


def in_batches(x, sizes=SIZES):
    return np.split(x, np.cumsum(sizes)[:-1])


def same(found, x, axes, weights=None, rtol=1e-12):
    """Whether ``found`` are the moments of ``x``, taken in extended precision."""
    x = np.asarray(x, np.longdouble)
    w = np.broadcast_to(np.asarray(1.0 if weights is None else weights, np.longdouble), x.shape)
    x, total = np.where(w > 0, x, 0), np.sum(w, axis=axes)
    mean = np.sum(w * x, axis=axes) / total
    shifted = x - np.sum(w * x, axis=axes, keepdims=True) / np.sum(w, axis=axes, keepdims=True)
    np.testing.assert_allclose(np.asarray(found.mean + found.remainder, float), mean, rtol=rtol)
    variance = np.sum(w * shifted**2, axis=axes) / total
    np.testing.assert_allclose(np.asarray(found.variance, float), variance, rtol=rtol, atol=1e-25)
    np.testing.assert_allclose(np.asarray(found.count, float), total, rtol=1e-12)


# --- Moments.over ---


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(np.float64, 1e-12), (np.float32, 1e-6), (np.float16, 1e-6)]
)
def test_a_generator_of_unequal_batches(dtype, rtol):
    x = values((11, 4, 3), dtype)
    found = nk.Moments.over((batch for batch in in_batches(x)), (0, 1))
    assert type(found.count) is int
    assert found.count == 44
    assert found.mean.dtype == found.variance.dtype == np.float64
    same(found, x, (0, 1), rtol=rtol)


def test_many_batches_lose_nothing():
    """A float32 would not hold the sum of so many."""
    x = values((3000, 2), np.float32, offset=1e4)
    found = nk.Moments.over(iter(np.split(x, 1500)), 0)
    same(found, x, 0, rtol=2e-7)


def test_weights_of_each_batch():
    x, w = values((11, 3)), np.random.default_rng(0).integers(0, 3, (11, 3))
    x[w == 0] = np.nan
    found = nk.Moments.over(in_batches(x), 0, weights=iter(in_batches(w)))
    same(found, x, 0, w)
    with pytest.raises(ValueError, match="shorter"):
        nk.Moments.over(in_batches(x), 0, weights=in_batches(w)[:2])


@pytest.mark.parametrize("axes", [0, 1, (0, 2), None, (-1,), ()])
def test_a_memmap_in_blocks(tmp_path, monkeypatch, axes):
    """Never more of it than asked for, and never in memory as a whole."""
    monkeypatch.setattr(_streaming, "_VALUES", 90)
    x = values((9, 10, 3))
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    sizes = []
    original = nk.Moments.of

    def of(part, *args, **options):
        sizes.append(part.size)
        return original(part, *args, **options)

    monkeypatch.setattr(nk.Moments, "of", of)
    found = nk.Moments.over(mapped, axes)
    reduced = tuple(range(3)) if axes is None else axes
    same(found, x, reduced)
    if axes != ():
        assert len(sizes) > 1
        assert max(sizes) <= 90
    assert sum(sizes) == x.size


@pytest.mark.parametrize("shape", [(9, 1, 3), (1, 3), (9, 10, 1), (3,)])
def test_weights_of_a_whole_array(monkeypatch, shape):
    monkeypatch.setattr(_streaming, "_VALUES", 30)
    x, w = values((9, 10, 3)), np.random.default_rng(0).random(shape)
    same(nk.Moments.over(x, (0, 1), weights=w), x, (0, 1), w)


def test_what_can_be_sliced_is_an_array():
    """As files of other formats can."""

    class Sliced:
        shape, read = (9, 3), 0

        def __getitem__(self, place):
            Sliced.read += 1
            return values(self.shape)[place]

    same(nk.Moments.over(Sliced(), 0), values((9, 3)), 0)
    assert Sliced.read == 1


@pytest.mark.parametrize("axes", [0, 1, (0, 2), None, ()])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_dask_array_block_by_block(axes, weighted):
    da = pytest.importorskip("dask.array")
    x, w = values((9, 10, 3)), np.random.default_rng(0).random((10, 3)) if weighted else None
    largest = 0

    def noted(block):
        nonlocal largest
        largest = max(largest, block.size)
        return block

    lazy = da.from_array(x, chunks=(4, 5, 2)).map_blocks(noted, dtype=x.dtype, meta=x[:0])
    found = nk.Moments.over(lazy, axes, weights=w)
    same(found, x, tuple(range(3)) if axes is None else axes, w)
    assert found.mean.shape == np.mean(x, axis=axes).shape
    assert 0 < largest <= 4 * 5 * 2


def test_dask_weights_and_lengths_that_are_not_known():
    da = pytest.importorskip("dask.array")
    x = values((12, 3))
    lazy, w = da.from_array(x, chunks=(5, 3)), da.from_array(x % 2, chunks=(4, 3))
    same(nk.Moments.over(lazy, 0, weights=w), x, 0, x % 2)
    some = lazy[lazy[:, 0] > 999.5]
    same(nk.Moments.over(some, 0), x[x[:, 0] > 999.5], 0)
    with pytest.raises(ValueError, match="compute_chunk_sizes"):
        nk.Moments.over(some, 0, weights=w)


def test_a_data_loader():
    torch = pytest.importorskip("torch")
    x = torch.tensor(values((11, 3), np.float32))
    loader = torch.utils.data.DataLoader(x, batch_size=4)
    same(nk.Moments.over(loader, 0), x.numpy(), 0, rtol=1e-6)
    same(nk.Moments.over(iter(x.requires_grad_().split(4)), 0), x.detach(), 0, rtol=1e-6)


def test_a_tf_dataset():
    tf = pytest.importorskip("tensorflow")
    x = values((11, 3), np.float32)
    same(nk.Moments.over(tf.data.Dataset.from_tensor_slices(x).batch(4), 0), x, 0, rtol=1e-6)


@pytest.mark.parametrize(
    "nothing",
    [[], iter(()), np.zeros((0, 3)), [np.zeros((0, 3))]],
    ids=["list", "iterator", "array", "empty"],
)
def test_no_values(nothing):
    with pytest.raises(ValueError, match="there are no values to take moments of"):
        nk.Moments.over(nothing, 0)


def test_batches_that_do_not_fit():
    with pytest.raises(ValueError, match="must have the shape"):
        nk.Moments.over([np.ones((2, 3)), np.ones((2, 4))], 0)
    with pytest.raises(TypeError, match="got a value of type 'list'"):
        nk.Moments.over([[1.0, 2.0]])
    with pytest.raises(TypeError, match="floating-point"):
        nk.Moments.over(np.ones((2, 3), int), 0)
    with pytest.raises(ValueError, match="out of range"):
        nk.Moments.over(np.ones((2, 3)), 2)


# --- the passes ---


class Model:
    """Layers of which each adds its mean to what it was called with; some may be left out."""

    def __init__(self, names, **options):
        self.means = dict.fromkeys(names, 0.0)
        self.written = {}
        self.passes = Recalibration(
            {name: Statistics(name, 0, False, "float64") for name in names}, **options
        )

    def __call__(self, x):
        for name in self.means:
            self.passes.see(name, x, -1, lambda: None)
            x = x + self.means[name]

    def write(self, name, mean, variance, calls):
        self.means[name] = mean
        self.written[name] = (mean, variance, calls)


def run(names, batches, **options):
    model = Model(names, one_pass=options.pop("one_pass", False))
    model.passes.run(batches, model, model.write, progress=False, **options)
    return model.written


def test_each_layer_sees_what_the_final_model_gives_it():
    x = values((11, 3))
    written = run(["a", "b", "c"], in_batches(x))
    assert list(written) == ["a", "b", "c"]
    for (mean, variance, calls), times in zip(written.values(), (1, 2, 4), strict=True):
        np.testing.assert_allclose(mean, x.mean(0) * times, rtol=1e-12)
        np.testing.assert_allclose(variance, x.var(0), rtol=1e-9)
        assert calls == 3
    at_once = run(["a", "b", "c"], iter(in_batches(x)), one_pass=True)
    for mean, _, calls in at_once.values():
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
        assert calls == 3


def test_an_iterator_gives_its_batches_once():
    x = values((11, 3))
    assert list(run(["a"], iter(in_batches(x)))) == ["a"]
    with pytest.raises(ValueError, match="passed over once for each of the 2 layers"):
        run(["a", "b"], iter(in_batches(x)))
    with pytest.raises(ValueError, match="passed over once"):
        run(["a", "b"], (batch for batch in in_batches(x)))


def test_instances_count_alike():
    """However many positions they have, and those with too few not at all."""
    found = Statistics("a", 1, True, "float32")
    parts = [values((2, 5, 3)), values((1, 2, 3)), values((4, 1, 3)), values((3, 9, 3))]
    for part in parts:
        found.add(part, -1, None)
    mean, variance = found.estimates()
    instances = [row for part in parts if part.shape[1] > 1 for row in part]
    np.testing.assert_allclose(mean, np.mean([i.mean(0) for i in instances], 0), rtol=1e-12)
    np.testing.assert_allclose(variance, np.mean([i.var(0, ddof=1) for i in instances], 0))
    assert found.calls == 4


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (np.float64(1.0), "shape \\(\\), but the first axis must be that of the batch"),
        (np.ones(3), "shape \\(3,\\), but the first axis must be that of the batch"),
        (np.array([[1.0, np.nan]]), "the mean of what layer 'a' sees is NaN"),
        (np.array([[1.0, np.inf]]), "the mean of what layer 'a' sees is NaN"),
        (np.array([[0.0], [1e200]]), "the variance of what layer 'a' sees is NaN or infinite"),
        (np.ones((0, 3)), "it saw no more"),
    ],
)
def test_what_is_no_statistic(x, said):
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=said):
        run(["a"], [x])


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 7e4), ("torch.float16", 7e4)])
def test_what_the_dtype_does_not_hold(dtype, largest):
    found = Statistics("a", 0, False, dtype)
    found.add(np.array([[0.0], [2 * np.sqrt(largest)]]), 1, None)
    with pytest.raises(ValueError, match="the variance of what layer 'a' sees"):
        found.estimates()


def test_too_few_values():
    found = Statistics("a", 1, False, "float32")
    found.add(np.ones((1, 3)), 1, None)
    with pytest.raises(ValueError, match="correction=1, which needs more than 1 value in each"):
        found.estimates()
    found.add(np.ones((2, 3)), 1, np.array([[1, 1, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match="it saw no more"):  # of the last channel
        found.estimates()
    found.add(np.ones((1, 3)), 1, None)
    assert found.estimates()[1].tolist() == [0, 0, 0]


def test_nothing_to_do_it_with():
    with pytest.raises(ValueError, match="no layer with running statistics"):
        run([], [])
    for nothing in ([], iter(())):
        with pytest.raises(ValueError, match="there are no batches"):
            run(["a"], nothing)
    passes = Recalibration({"a": Statistics("a", 0, False, "float32")}, one_pass=False)
    with pytest.raises(ValueError, match=r"never seen to be called.*: a\."):
        passes.run([1], lambda x: None, lambda *_: None)


@pytest.mark.parametrize(("stream", "total"), [(False, 6), (True, None)])
def test_the_bar_knows_how_far_it_is(monkeypatch, stream, total):
    bars = []

    class Bar:
        def __init__(self, **options):
            self.options, self.steps = options, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.closed = True

        def update(self):
            self.steps += 1

    class Stream:
        def __iter__(self):
            return iter(in_batches(values((11, 3))))

    module = ModuleType("tqdm")
    module.tqdm, module.__spec__ = Bar, ModuleSpec("tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm", module)
    model = Model(["a", "b"], one_pass=False)
    batches = Stream() if stream else in_batches(values((11, 3)))
    model.passes.run(batches, model, model.write)
    (bar,) = bars
    assert (bar.options["total"], bar.steps, bar.closed) == (total, 6, True)
    run(["a"], batches)
    assert len(bars) == 1


def test_without_the_package_that_draws_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    model = Model(["a"], one_pass=False)
    model.passes.run(in_batches(values((11, 3))), model, model.write)
    assert list(model.written) == ["a"]


def test_masked_arrays_are_refused():
    x = np.ma.masked_array([[1.0, 9999.0], [3.0, 5.0]], mask=[[0, 1], [0, 0]])
    for call in (
        lambda: nk.moments(x, 0),
        lambda: nk.Moments.over([x], 0),
        lambda: nk.Moments.over(x, 0),
        lambda: nk.layer_norm(x),
    ):
        with pytest.raises(TypeError, match="does not look at the mask of a NumPy masked array"):
            call()
