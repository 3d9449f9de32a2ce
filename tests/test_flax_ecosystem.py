"""What people do with Flax layers: transforms, export, checkpoints, partitioning, filters."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax import export

from harness.flax_layers import EVERY, NATIVE, NORMS, UPSTREAM, Layer, X, close

# Everything that is remembered, in the layers that remember.
TRACKING = {"momentum": None, "correction": 1}
OPTIONS = {
    "BatchNorm": TRACKING,
    "GroupNorm": {"num_groups": 2},
    "InstanceNorm": {"track_running_stats": True} | TRACKING,
}
NORM = pytest.mark.parametrize("norm", NORMS)


def make(norm, **options):
    options = OPTIONS.get(norm, {}) | options
    return NATIVE["nnx", norm][1](4, rngs=nnx.Rngs(0), **options)


def pure(tree):
    return nnx.to_pure_dict(nnx.state(tree))


@NORM
def test_nnx_split_merge_and_filters(norm):
    layer = make(norm)
    names = {"scale"} if norm == "RMSNorm" else {"scale", "bias"}
    stats = {"mean", "var", "count"} if norm in ("BatchNorm", "InstanceNorm") else set()
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    assert (set(params), set(rest)) == (names, stats)
    assert set(nnx.state(layer, nnx.BatchStat)) == stats
    same = nnx.merge(graph, params, rest, copy=True)
    close(same(X[0]), layer(X[0]))
    close(pure(same), pure(layer))
    abstract = nnx.eval_shape(lambda: make(norm))
    assert nnx.split(abstract)[0] == nnx.split(layer)[0]
    close(jax.tree.map(lambda leaf: leaf + 0, layer)(X[1]), same(X[1]))  # a layer is a pytree


@NORM
def test_nnx_transforms(norm):
    layer = make(norm)
    y = nnx.clone(layer)(X[0])

    def loss(layer, x):
        return (layer(x) * UPSTREAM).sum()

    by_hand = nnx.grad(loss)(nnx.clone(layer), X[0])
    found = nnx.jit(nnx.grad(lambda layer, x: nnx.remat(loss)(layer, x)))(nnx.clone(layer), X[0])
    close(nnx.to_pure_dict(found), nnx.to_pure_dict(by_hand))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def steps(layer, x):
        return layer, layer(x)

    one, other = nnx.clone(layer), nnx.clone(layer)
    _, ys = steps(one, X)
    close(ys, jnp.stack([other(x) for x in X]))
    close(pure(one), pure(other))

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def several(rngs):
        return NATIVE["nnx", norm][1](4, rngs=rngs, **OPTIONS.get(norm, {}))

    layers = several(nnx.Rngs(0))
    assert layers.scale.shape == (3, 4)
    ys = nnx.vmap(lambda layer, x: layer(x))(layers, jnp.stack([X[0]] * 3))
    close(ys[1], y)
    if "track_running_stats" in OPTIONS.get(norm, {}) or norm == "BatchNorm":
        np.testing.assert_array_equal(layers.count[...], [1, 1, 1])


@NORM
def test_nnx_train_and_eval(norm):
    layer = make(norm)
    model = nnx.Sequential(layer)
    before = pure(model)
    model.eval()
    y = model(X[0])
    close(pure(model), before, bound=0)
    model.train()
    trained = model(X[0])
    remembers = "momentum" in OPTIONS.get(norm, {})
    assert bool(jnp.allclose(y, trained)) != remembers
    if remembers:
        close(y, X[0] / np.sqrt(np.float32(1 + layer.epsilon)))  # statistics to start from
        close(layer(X[0], use_running_average=False), trained)  # the call wins
        assert int(layer.count[...]) == 2
        axes = (0, 1) if norm == "BatchNorm" else (1,)
        var = X[0].var(axes, ddof=1)
        close(layer.mean[...], X[0].mean((0, 1)))
        close(layer.var[...], var if norm == "BatchNorm" else var.mean(0))
        view = nnx.view(model, use_running_average=True)
        assert not np.allclose(view(X[0]), trained)


@NORM
def test_linen_transforms(norm):
    options = OPTIONS.get(norm, {})
    if "momentum" in options:
        options = options | {"use_running_average": False}
    cls = NATIVE["linen", norm][1]

    class Two(nn.Module):
        """A layer called through a lifted transform, and its twin that is not."""

        lifted: bool

        @nn.compact
        def __call__(self, x):
            return (nn.remat(cls) if self.lifted else cls)(**options, name="norm")(x)

    found = []
    for lifted in (False, True):
        model = Two(lifted)
        variables = model.init(jax.random.key(0), X[0])
        assert set(variables) == {"params"} | ({"batch_stats"} if "momentum" in options else set())
        rest = {k: v for k, v in variables.items() if k != "params"}
        close(
            rest.get("batch_stats", {}),
            Two(False).init(jax.random.key(1), X[1]).get("batch_stats", {}),
            bound=0,
        )  # initialization is no step

        @jax.jit
        def loss(params, x, model=model, rest=rest):
            y, changed = model.apply({"params": params, **rest}, x, mutable=["batch_stats"])
            return (y * UPSTREAM).sum(), (y, changed)

        found.append(jax.value_and_grad(loss, (0, 1), has_aux=True)(variables["params"], X[0]))
    close(found[1], found[0])

    scanned = nn.scan(
        lambda layer, carry, x: (carry, layer(x)),
        variable_broadcast="params",
        variable_carry="batch_stats",
        split_rngs={"params": False},
    )

    class Steps(nn.Module):
        @nn.compact
        def __call__(self, xs):
            return scanned(cls(**options, name="norm"), (), xs)[1]

    # As with Flax' own, a scan that carries statistics cannot be what creates them.
    ys, changed = Steps().apply(variables, X, mutable=["batch_stats"])
    close(ys[0], found[0][0][1][0])
    if "momentum" in options:
        assert int(changed["batch_stats"]["norm"]["count"]) == 3


@EVERY
def test_export_with_a_batch_of_any_size(api, norm):
    options = OPTIONS.get(norm, {})
    layer = Layer(api, NATIVE[api, norm][1], **options)

    def step(params, stats, x):
        return layer.pure(params, stats, x)

    given = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (layer.params, layer.stats)
    )
    (n,) = export.symbolic_shape("n")
    x = jax.ShapeDtypeStruct((n, 5, 4), jnp.float32)
    exported = export.export(jax.jit(step))(*given, x)
    again = export.deserialize(exported.serialize())
    for x in (X[0], X[1, :2]):
        close(again.call(layer.params, layer.stats, x), step(layer.params, layer.stats, x))


@EVERY
def test_checkpoints(api, norm, tmp_path):
    layer = Layer(api, NATIVE[api, norm][1], **OPTIONS.get(norm, {}))
    layer(X[0])
    saved = {"params": layer.params, "stats": layer.stats}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        target = jax.tree.map(jnp.zeros_like, saved)
        restored = checkpointer.restore(tmp_path / "state", target)
        close(restored, saved, bound=0)
        fresh = Layer(api, NATIVE[api, norm][1], **OPTIONS.get(norm, {}))
        fresh.params, fresh.stats = restored["params"], restored["stats"]
        close(fresh(X[1]), layer(X[1]), bound=0)
        if api == "nnx":  # the states themselves
            module = make(norm)
            module(X[0])
            checkpointer.save(tmp_path / "nnx", nnx.state(module))
            checkpointer.wait_until_finished()
            other = make(norm)
            nnx.update(other, checkpointer.restore(tmp_path / "nnx", nnx.state(other)))
            close(pure(other), pure(module), bound=0)


@EVERY
def test_partitioning(api, norm):
    reference, cls = NATIVE[api, norm]
    options = {"num_groups": 2} if norm == "GroupNorm" else {}
    ones = jax.nn.initializers.ones
    specs = []
    for c in (reference, cls):
        if api == "nnx":
            mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
            with jax.set_mesh(mesh):
                init = nnx.with_partitioning(ones, ("data",))
                layers = [
                    c(4, scale_init=init, rngs=nnx.Rngs(0), **options),
                    c(4, scale_metadata={"out_sharding": ("data",)}, rngs=nnx.Rngs(0), **options),
                ]
                found = [nnx.get_partition_spec(nnx.state(m))["scale"] for m in layers]
                y = layers[0](X[0])
        else:
            mode = {"use_running_average": False} if norm == "BatchNorm" else {}
            layer = c(scale_init=nn.with_partitioning(ones, ("data",)), **options)
            variables = layer.init(jax.random.key(0), X[0], **mode)
            found = nn.get_partition_spec(variables)["params"]["scale"]
            y, _ = layer.apply(variables, X[0], mutable=["batch_stats"], **mode)
        specs.append((found, y))
    assert str(specs[0][0]) == str(specs[1][0])
    assert "data" in str(specs[1][0])
    np.testing.assert_allclose(specs[1][1], specs[0][1], atol=1e-5)
