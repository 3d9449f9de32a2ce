"""A real network with native layers in each framework: out of one, into the others, the same."""

from __future__ import annotations

import numpy as np
import pytest

import normkit as nk
from harness import resnets

torch = pytest.importorskip("torch")
keras = pytest.importorskip("keras")
nnx = pytest.importorskip("flax.nnx")
jax = pytest.importorskip("jax")

KERNELS = resnets.kernels(0)
IMAGES = np.random.default_rng(1).normal(0.5, 1, (8, 32, 32, 3)).astype(np.float32)


class Torch:
    keep = ("axis",)

    def __init__(self):
        self.model = resnets.torch_resnet()
        with torch.no_grad():
            for name, kernel in KERNELS.items():
                layer = self.model.get_submodule(name)
                axes = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
                layer.weight.copy_(torch.from_numpy(kernel.transpose(axes).copy()))
            self.model.head.bias.zero_()

    def train(self, x):
        with torch.no_grad():
            self.model.train()(torch.from_numpy(x).permute(0, 3, 1, 2))

    def __call__(self):
        with torch.no_grad():
            return self.model.eval()(torch.from_numpy(IMAGES).permute(0, 3, 1, 2)).numpy()

    def extract(self):
        return nk.extract(self.model)

    def restore(self, bundle, names, **options):
        return nk.restore(self.model, bundle, names, **options)


class Keras(Torch):
    def __init__(self):
        self.model = resnets.keras_resnet()
        for name, kernel in KERNELS.items():
            self.model.get_layer(name.replace(".", "_")).weights[0].assign(kernel)

    def train(self, x):
        self.model(x, training=True)

    def __call__(self):
        return keras.ops.convert_to_numpy(self.model(IMAGES, training=False))


class NNX(Torch):
    def __init__(self):
        self.model = resnets.nnx_resnet()
        for name, kernel in KERNELS.items():
            layer = self.model
            for part in name.split("."):
                layer = layer[int(part)] if part.isdigit() else getattr(layer, part)
            layer.kernel[...] = kernel

    def train(self, x):
        self.model.train()
        self.model(x)

    def __call__(self):
        self.model.eval()
        return np.asarray(self.model(IMAGES))


class Linen(Torch):
    def __init__(self, **of_norms):
        self.model = resnets.linen_resnet(**of_norms)
        variables = self.model.init(jax.random.key(0), IMAGES)
        for name, kernel in KERNELS.items():
            variables["params"][name.replace(".", "_")]["kernel"] = kernel
        self.variables = variables

    def train(self, x):
        _, changed = self.model.apply(self.variables, x, train=True, mutable=["batch_stats"])
        self.variables = self.variables | changed

    def __call__(self):
        return np.asarray(self.model.apply(self.variables, IMAGES))

    def extract(self):
        return nk.extract(self.model, self.variables, (IMAGES,))

    def restore(self, bundle, names, **options):
        given = {"variables": self.variables, "inputs": (IMAGES,)}
        report = nk.restore(self.model, bundle, names, **options, **given)
        self.variables = report.variables
        return report


FRAMEWORKS = {"torch": Torch, "keras": Keras, "nnx": NNX, "linen": Linen}


@pytest.fixture(scope="module")
def trained():
    """One network of each framework, with statistics and parameters that are its own."""
    found = {}
    for i, (name, kind) in enumerate(FRAMEWORKS.items()):
        network, rng = kind(), np.random.default_rng(i)
        for _ in range(2):
            network.train(rng.normal(0.2, 1.5, IMAGES.shape).astype(np.float32))
        bundle = network.extract()
        for entry in bundle.values():
            for array in ("scale", "bias"):
                a = entry.arrays[array]
                a += rng.normal(0, 0.1, a.shape).astype(np.float32)
        network.restore(bundle, None)
        found[name] = network, network.extract(), network()
    return found


def test_all_of_its_layers_are_found(trained):
    for name, (_, bundle, _) in trained.items():
        assert len(bundle) == len(resnets.NORMS) == 21
        assert {own.replace("_", ".") for own in bundle} == {
            own.replace("_", ".") for own in resnets.NORMS
        }
        assert all(np.any(entry.arrays["mean"]) for entry in bundle.values()), name


@pytest.mark.parametrize("target", FRAMEWORKS)
@pytest.mark.parametrize("source", FRAMEWORKS)
def test_out_of_one_into_another(source, target, trained):
    _, bundle, want = trained[source]
    plain = {name.replace(".", "_"): name for name in bundle}
    # What a native layer cannot take over stays as it is: it matters in training alone.
    keep = [] if target == source else ["axis", "correction"]
    network = FRAMEWORKS[target]()
    if target == "linen" and source in ("torch", "keras"):
        # What a module of Linen computes is written in the code of its model, and only there.
        with pytest.raises(ValueError, match=r"decay is 0\.99 in the model|eps is 1e-05"):
            network.restore(bundle, lambda name: plain[name.replace(".", "_")], keep=keep)
        usual = bundle["norm"].definition
        network = Linen(epsilon=usual.eps, momentum=usual.decay)
    options = {"adopt": target != "linen", "keep": keep}
    report = network.restore(bundle, lambda name: plain[name.replace(".", "_")], **options)
    assert len(report.rows) == 21
    got = network()
    assert np.max(np.abs(got - want)) <= 1e-5 * np.max(np.abs(want))
    for name, entry in network.extract().items():
        original = bundle[plain[name.replace(".", "_")]]
        for array in ("scale", "bias", "mean", "var"):
            assert entry.arrays[array].tobytes() == original.arrays[array].tobytes()
