"""What kind of torch function a call is, as far as the place of the examples is concerned."""

from __future__ import annotations

from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._private import is_operation
from .parts import PARTS


class Kind(Enum):
    """How the place of the result follows from those of the arguments."""

    IGNORED = auto()  # gives no tensor, or one that does not depend on the values
    SAME = auto()  # as the first argument
    POINTWISE = auto()  # arguments broadcast against each other
    RESHAPE = auto()  # entries keep their order
    EXPAND = auto()  # axes are added in front
    PERMUTE = auto()  # axes change places
    SET = auto()  # the first argument becomes another tensor
    FILL = auto()  # a new tensor in the shape of the first argument, filled with the others
    MOVE = auto()  # entries are moved by indices or orders that may differ from call to call
    DERIVED = auto()  # differentiates what the forward has computed
    COMPOSITE = auto()  # a Python function whose parts are followed instead
    OTHER = auto()  # found out by trying


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


HOOKING = frozenset({Tensor.register_hook, Tensor.retain_grad})  # after which a second backward would be seen
_IGNORED = names(
    "size dim ndim ndimension numel nelement stride storage_offset is_floating_point is_complex is_contiguous item "
    "tolist numpy backward register_hook retain_grad __len__ __bool__ __int__ __float__ __index__ __repr__ __str__ "
    "__format__ __hash__ __contains__ element_size data_ptr is_signed get_device untyped_storage storage _is_view "
    "is_pinned is_shared is_same_size result_type can_cast is_tensor __dlpack__ __array__ names is_nonzero equal "
    "allclose is_inference is_set_to requires_grad_ detach_ sym_size _version"
)
LEAVING = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.as_subclass}  # what follows is not seen
_SAME = names(
    "contiguous clone detach to float double half bfloat16 type type_as cuda cpu int long short bool alias dropout "
    "dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout pin_memory positive __pos__ _to_copy "
    "nan_to_num"
)
_RESHAPE = names("view reshape flatten unflatten view_as reshape_as ravel squeeze unsqueeze _unsafe_view")
_EXPAND = names("expand broadcast_to expand_as")
_PERMUTE = names("permute transpose swapaxes swapdims t .T .mT adjoint")
_MOVE = names(
    "__setitem__ index_select gather take_along_dim take masked_select index index_put index_put_ index_add "
    "index_add_ index_copy index_copy_ scatter scatter_ scatter_add scatter_add_ masked_scatter masked_scatter_ "
    "roll flip flipud fliplr rot90 as_strided as_strided_copy scatter_reduce scatter_reduce_ index_reduce "
    "index_reduce_ put put_ repeat_interleave index_fill index_fill_ _pack_padded_sequence _pad_packed_sequence"
)
_POINTWISE = names(
    "copy_ __and__ __or__ __xor__ __invert__ __rsub__ __rdiv__ __rtruediv__ __rpow__ __pow__ __floordiv__ "
    "__rfloordiv__ __mod__ __rmod__ __neg__ __abs__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __iand__ __ior__ "
    "__ipow__ __rand__ __ror__ __lshift__ __rshift__ relu6 hardtanh softsign tanhshrink hardswish hardsigmoid "
    "logsigmoid threshold selu celu elu leaky_relu softplus mish silu gelu relu sigmoid tanh"
)
_FILLS = names("full_like new_full new_tensor new")  # the last with sizes, or values
_SIZED = names("zeros ones empty eye rand randn")  # data says at most how large it is
_NOT_BROADCAST = frozenset(("prelu",))  # tagged pointwise, but its weight belongs to axis 1
_VIEW_PROPERTIES = frozenset(("T", "mT", "H", "mH", "data", "real", "imag"))


def base_name(func: Any) -> str:
    """The function's name; of a property its own, with a dot before it."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return "." + getattr(getattr(func, "__self__", None), "__name__", "")
    return name


def is_pointwise(name: str) -> bool:
    """Whether torch itself calls an overload of this name pointwise."""
    if not name or name.startswith("_") or name in _NOT_BROADCAST:
        return False
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())


def _classify(func: Any) -> Kind:
    name = base_name(func)
    if getattr(func, "namespace", "aten") not in ("aten", "prim", "prims"):
        return Kind.OTHER  # a library's own operator, whatever its name
    if name in _PERMUTE:
        return Kind.PERMUTE
    if name.startswith("."):
        if name == ".data":
            return Kind.SAME
        return Kind.OTHER if name[1:] in _VIEW_PROPERTIES else Kind.IGNORED
    if name in ("__set__", "set_"):
        data = getattr(getattr(func, "__self__", None), "__name__", "") == "data"
        return Kind.SET if name == "set_" or data else Kind.IGNORED
    if name in _FILLS:
        return Kind.FILL
    if name in _IGNORED or name in _SIZED or name.endswith("_like") or name.startswith("new_"):
        return Kind.IGNORED
    if func is torch.autograd.grad:
        return Kind.DERIVED
    if func is F.multi_head_attention_forward or func in PARTS:
        return Kind.COMPOSITE
    for names, kind in (
        (_SAME, Kind.SAME),
        (_RESHAPE, Kind.RESHAPE),
        (_EXPAND, Kind.EXPAND),
        (_MOVE, Kind.MOVE),
        (_POINTWISE, Kind.POINTWISE),
    ):
        if name in names or (name.endswith("_") and not name.endswith("__") and name[:-1] in names):
            return kind
    plain = name[3:-2] if name.startswith("__i") and name.endswith("__") else name.strip("_")
    return Kind.POINTWISE if is_pointwise(plain) else Kind.OTHER


class Traits:
    """What is known of a torch function, method or property by its name.

    Attributes:
        kind: Its kind.
        name: Its name, see `base_name`.
        in_place: Whether it writes into its first argument, by torch's naming.
        plain: Whether it only makes new tensors of those it is given, all of which it reads; of what is ignored,
            whether no mode needs to see it.
        operation: Whether it may be written in Python, with modes of its own that must see what it does.
    """

    __slots__ = ("in_place", "kind", "name", "operation", "plain")

    def __init__(self, func: Any) -> None:
        """Look at the name."""
        self.kind, self.name, self.in_place = _classify(func), base_name(func), _writes_in_place(func)
        self.operation = is_operation(func)
        special = (Kind.FILL, Kind.SET, Kind.MOVE, Kind.DERIVED, Kind.COMPOSITE)
        if self.kind is Kind.IGNORED:
            self.plain = self.name not in ("backward", "requires_grad_", "__set__")
        else:
            self.plain = not self.in_place and not self.operation and self.kind not in special


TRAITS: dict[Any, Traits] = {}


def traits_of(func: Any) -> Traits:
    """What is known of a torch function, method or property."""
    traits = TRAITS.get(func)
    if traits is None:
        traits = TRAITS[func] = Traits(func)
    return traits


def _writes_in_place(func: Any) -> bool:
    """Whether the function writes into its first argument, by torch's naming."""
    name = getattr(func, "__name__", "")
    operators = name.startswith("__i") and name.endswith("__") and name not in ("__invert__", "__int__", "__index__")
    return name == "__setitem__" or operators or (name.endswith("_") and not name.endswith("__"))
