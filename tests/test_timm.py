"""Models of timm, built from scratch: every field of every parameter, in one backward, against one per example.

timm imports torchvision, which need not be there for the torch at hand: what timm takes from it at import is stubbed.
"""

import contextlib
import importlib
import importlib.util
import sys
import types
from functools import partial

import pytest
from model_zoo import Row, assert_exact, measure, mixing, normal, parameters
from torch import nn

from perexample import UnsupportedModuleError

# An error in its place would make the library take another way than it takes for its users.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


class _Names(type):
    """Of classes in which every name is a string."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Stub(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (nn.Module,), {})


PARTS = ("datasets", "ops", "ops.misc", "transforms", "transforms.functional")
STUBS = ("torchvision", *(f"torchvision.{part}" for part in PARTS))


@contextlib.contextmanager
def _torchvision():
    """The real one, or stubs for as long as timm is imported."""
    try:
        importlib.import_module("torchvision")
    except Exception:  # noqa: BLE001 - one made for another torch fails in many ways
        present = [name for name in sys.modules if name.partition(".")[0] == "torchvision"]
        broken = {name: sys.modules.pop(name) for name in present}
        for name in STUBS:
            module = sys.modules[name] = _Stub(name)
            module.__path__ = []
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], last, module)
        try:
            yield
        finally:
            for name in STUBS:
                del sys.modules[name]
            sys.modules.update(broken)
    else:
        yield


@pytest.fixture(autouse=True, scope="module")
def _timm():
    if importlib.util.find_spec("timm") is None:
        pytest.skip("the models are those of timm, which is not installed")
    before = set(sys.modules)
    with _torchvision():
        try:
            importlib.import_module("timm.models")
        except Exception as error:  # noqa: BLE001 - a timm that wants more of torchvision
            pytest.skip(f"timm cannot be imported beside this torch: {error!r}")
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "timm":
            del sys.modules[name]


def build(module, name, **settings):
    """A class of timm by name; norm layers are given as functions of nothing, because timm is imported late."""

    def make():
        cls = getattr(importlib.import_module(f"timm.models.{module}"), name)
        return cls(**{key: value() if key == "norm_layer" else value for key, value in settings.items()})

    return make


def images(size):
    return lambda n: {"x": normal(n, 3, size, size)}


def whole(out):
    return out


def group_norm():
    return partial(importlib.import_module("timm.layers").GroupNorm, num_groups=2)


def resnet(**settings):
    block = lambda: importlib.import_module("timm.models.resnet").BasicBlock  # noqa: E731

    def make():
        return build("resnet", "ResNet", block=block(), **_RESNET, **settings)()

    return make


_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2, "num_classes": 5}
_RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "stem_type": "deep", "stem_width": 4, "num_classes": 5}
_SWIN = {
    "img_size": 16, "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4,
    "num_classes": 5, "drop_path_rate": 0.0,
}  # fmt: skip
_CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 8, 12, 16), "num_classes": 5}

ROWS = [
    Row("vit", build("vision_transformer", "VisionTransformer", **_VIT), images(16), whole, grad=True),
    Row("vit-square", build("vision_transformer", "VisionTransformer", **_VIT | {
        "embed_dim": 20, "num_heads": 5,
    }), images(16), whole, n=5),
    Row("vit-layer-scale-no-class-token", build(
        "vision_transformer", "VisionTransformer", **_VIT, init_values=0.5, qk_norm=True, class_token=False,
        global_pool="avg", reg_tokens=2,
    ), images(16), whole),
    Row("vit-attention-pool", build(
        "vision_transformer", "VisionTransformer", **_VIT, class_token=False, global_pool="map",
    ), images(16), whole),
    Row("deit-distilled", build(
        "deit", "VisionTransformerDistilled", **_VIT,
    ), images(16), lambda out: out[0] if isinstance(out, tuple) else out),
    Row("eva-rope", build("eva", "Eva", **_VIT, use_rot_pos_emb=True, swiglu_mlp=True), images(16), whole),
    Row("beit", build("beit", "Beit", **_VIT, use_rel_pos_bias=True, init_values=0.5), images(16), whole),
    Row("cait", build("cait", "Cait", **_VIT, depth_token_only=1), images(16), whole),
    Row("swin-shifted", build("swin_transformer", "SwinTransformer", **_SWIN), images(16), whole, grad=True),
    Row("swin-windows-square", build(
        "swin_transformer", "SwinTransformer", **_SWIN | {"num_heads": (4, 4)},
    ), images(16), whole, n=4),
    Row("swinv2-shifted", build("swin_transformer_v2", "SwinTransformerV2", **_SWIN), images(16), whole),
    Row("convnext", build("convnext", "ConvNeXt", **_CONVNEXT, ls_init_value=0.5), images(32), whole, grad=True),
    Row("convnextv2", build("convnext", "ConvNeXt", **_CONVNEXT, use_grn=True, ls_init_value=None), images(32), whole),
    Row("mixer", build(
        "mlp_mixer", "MlpMixer", img_size=16, patch_size=8, num_blocks=2, embed_dim=12, num_classes=5,
    ), images(16), whole),
    Row("mixer-square", build(
        "mlp_mixer", "MlpMixer", img_size=16, patch_size=8, num_blocks=2, embed_dim=12, num_classes=5,
    ), images(16), whole, n=4),
    Row("resnet-group-norm", resnet(norm_layer=group_norm), images(32), whole, grad=True),
    Row("resnet-train", resnet(), images(32), whole, refused=(UnsupportedModuleError, r"`conv1\.1`")),
    Row("resnet-eval", resnet(), images(32), whole, train=False),
    Row("poolformer", build(
        "metaformer", "MetaFormer", depths=(1, 1), dims=(8, 16), num_classes=5,
    ), images(32), whole),
    Row("xcit", build(
        "xcit", "Xcit", **_VIT | {"embed_dim": 24}, cls_attn_layers=1,
    ), images(16), whole, refused=(UnsupportedModuleError, "`patch_embed")),
]  # fmt: skip
EXACT = [row for row in ROWS if not row.refused]
REFUSED = [row for row in ROWS if row.refused]


@pytest.mark.parametrize("row", parameters(EXACT))
def test_reference(row):
    """Without the library: the batch's gradient is the mean of the examples', so the row is fit for a test."""
    error, name = mixing(row)
    assert error <= 1e-10, f"{row.id}: at {name}, the batch's gradient is {error:.1e} away from the examples' mean"


@pytest.mark.parametrize("row", parameters(EXACT))
def test_exact(row):
    assert_exact(row)


@pytest.mark.parametrize("row", parameters(REFUSED))
def test_refused(row):
    error, match = row.refused
    with pytest.raises(error, match=match):
        measure(row)
