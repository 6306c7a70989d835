"""What must not change between the recording of a step and its replays, which would not know of it."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._around import (
    Entries,
    Variable,
    held_by,
    holds_something,
    identity,
    is_of_users,
    parts_of,
    reached_from,
    shown_by,
    variables_of,
    variables_of_class,
    variables_of_object,
    variables_of_partial,
)
from ._engine.hooks import Enter, Exit
from ._engine.kinds import names as words
from ._private import global_hooks
from .extension import Extension

_PLAIN = frozenset({int, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size})
_KEPT_BY_TORCH = frozenset(vars(nn.Module()))
_HOOKS_OF_TORCH = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OURS = (Enter, Exit)
_BY_SIGNS = words(  # methods that are called without their names
    "__call__ __float__ __int__ __bool__ __len__ __getitem__ __contains__ __iter__ __next__ __getattr__ "
    "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __pow__ __neg__"
)
_DEPTH = 4  # of objects inside of settings
Key = tuple[str, str, str]
State = dict[Key, Any]


class Read(NamedTuple):
    """What a step may read.

    Attributes:
        names: Names of attributes, keys, and others.
        around: Variables around its functions.
        beside: Modules that these hold and that are not of the model, and how messages name them.
    """

    names: frozenset[Any]
    around: tuple[Variable, ...] = ()
    beside: tuple[tuple[str, nn.Module], ...] = ()

    def values(self) -> State:
        """What these variables and modules hold now."""
        found: State = {}
        for number, one in enumerate(self.around):
            alike = found.setdefault(("", one.where, one.name), ("", Entries()))
            alike[1].append((number, shown_by(one.value, self.names)))
        for path, module in self.beside:
            found |= _of_module(path, module, self.names, lambda value: shown_by(value, self.names))
            found[path, type(module).__name__, _INSIDE] = [(n, id(m)) for n, m in parts_of(module, self.names)]
        return found


def what_is_read(losses: Any, model: nn.Module, called: Iterable[nn.Module]) -> Read:
    """What may be read by a step: by its function, forwards, hooks, and what these may call.

    Args:
        losses: The function.
        model: The model.
        called: The modules of it that are called.

    Returns:
        It, and other names.
    """
    modules = list(model.modules())
    hooks = [(hook, type(m)) for m in modules for _, _, hook in _hooks_of(m)]
    forwards = [(vars(m).get("forward", type(m).forward), type(m)) for m in called]
    kept = [(one, type(m)) for m in modules for one in vars(m).values() if isinstance(one, (FunctionType, partial))]
    reader = _Reader(modules)
    reader.waiting = [*hooks, *forwards, *kept]
    if isinstance(losses, nn.Module):
        reader.objects[id(losses)] = losses
    else:
        reader.waiting.append(_with_owner(losses))
    return reader.read()


class _Reader:
    """Follows functions, and notes what they may read."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        """Of a model that is made of these modules."""
        self.modules = {id(m): m for m in modules}
        self.classes: set[type] = {type(m) for m in modules}
        self.attributes = {name for m in modules for name in vars(m)}
        self.kinds: set[type] = set()  # of other objects of the user's
        self.found, self.looked, self.seen = set[Any](), set[str](), set[CodeType]()
        self.around, self.objects = dict[tuple[int, str], Variable](), dict[int, Any]()
        self.followed, self.met = dict[int, Any](), dict[int, Any]()  # functions, and such that variables hold
        self.beside = dict[int, tuple[str, nn.Module]]()
        self.waiting: list[tuple[Any, type | None]] = []

    def read(self) -> Read:
        """All that is found."""
        while self.waiting or self._finds_more():
            if self.waiting:
                self._follow(*self.waiting.pop())
        names, kinds = frozenset(self.found), self.classes | self.kinds
        self._know(one for kind in kinds for one in variables_of_class(kind, names))
        self._know(one for owner in self.objects.values() for one in variables_of_object(owner, names))
        around = (one for one in self.around.values() if holds_something(one.value, names))
        return Read(names, tuple(around), tuple(self.beside.values()))

    def _know(self, variables: Iterable[Variable]) -> None:
        self.around |= {(id(one.space), one.name): one for one in variables}

    def _follow(self, function: Any, owner: type | None) -> None:
        """Note what a function reads, and what it may call."""
        own = getattr(function, "__self__", None)
        self.objects[id(own)] = own
        if isinstance(function, partial):
            self._know(variables_of_partial(function))
        for name in ("fget", "func", "__func__"):  # of properties, partials, static methods and those of a class
            function = getattr(function, name, None) or function
        inner = getattr(function, "__wrapped__", function)
        if inner is not function:
            self.waiting.append((inner, owner))
            if not is_of_users(str(getattr(function, "__globals__", {}).get("__name__", "torch"))):
                return  # decorators of others change nothing
        code = function if isinstance(function, CodeType) else getattr(function, "__code__", None)
        if not isinstance(code, CodeType):
            return
        if isinstance(function, FunctionType) and id(function) not in self.followed:
            self.followed[id(function)] = function
            self._know(variables_of(function, code))
        if code in self.seen:
            return
        self.seen.add(code)
        texts = [text for text in code.co_consts if isinstance(text, str)]
        self.found.update(code.co_names, texts, (one for one in code.co_consts if isinstance(one, int)))
        if "getattr" in code.co_names:  # of a name that is made of one of these, perhaps
            self.found.update(name for name in self.attributes for text in texts if len(text) > 2 and text in name)
        methods = [(name, owner) for name in code.co_names if owner is not None]
        # Methods of other modules, but names that may be those of tensors.
        new = {*code.co_names} - self.looked
        methods += [(n, c) for n in new if not hasattr(Tensor, n) for c in self.classes]
        methods += [(n, c) for n in new for c in self.kinds]
        self._wait_for(methods)
        self.waiting += [(one, owner) for one in code.co_consts if isinstance(one, CodeType)]
        self.waiting += _helpers(function, code)
        self.looked.update(code.co_names)

    def _wait_for(self, methods: Iterable[tuple[str, type]]) -> None:
        found = ((inspect.getattr_static(kind, name, None), kind) for name, kind in methods)
        self.waiting += [(method, kind) for method, kind in found if method is not None]

    def _finds_more(self) -> bool:
        """Whether variables hold objects or modules beside the model whose functions were not followed yet."""
        held = [(one.name, one.value) for one in self.around.values()]
        held += [(type(one).__name__, one) for one in self.objects.values()]
        of_modules = (pair for m in self.modules.values() for pair in held_by(m, self.found))
        held += [(name, one) for name, one in of_modules if name not in _KEPT_BY_TORCH]
        self.found.update(value for _, value in held if isinstance(value, str))  # keys, perhaps
        for name, value in held:
            for one in reached_from(value, self.found):
                if isinstance(one, nn.Module):
                    self._put_beside(name, one)
                elif isinstance(one, (FunctionType, partial)):
                    self._once(one)
                elif isinstance(one, type):
                    self._meet(one, "__init__")
                else:
                    self._meet(type(one))
        return bool(self.waiting)

    def _put_beside(self, name: str, module: nn.Module) -> None:
        if id(module) in self.modules or id(module) in self.beside:
            return
        self.beside[id(module)] = name, module
        self.waiting += [(vars(module).get("forward", type(module).forward), type(module))]
        self.waiting += [(hook, type(module)) for _, _, hook in _hooks_of(module)]

    def _once(self, function: Any) -> None:
        if id(function) not in self.met and is_of_users(str(getattr(function, "__module__", "torch"))):
            self.met[id(function)] = function
            self.waiting.append((function, None))

    def _meet(self, kind: type, *more: str) -> None:
        if kind not in self.kinds and is_of_users(kind.__module__):
            self.kinds.add(kind)
            self._wait_for([(name, kind) for name in (*self.looked, *_BY_SIGNS, *more)])


def _hooks_of(module: nn.Module) -> list[tuple[str, int, Any]]:
    """Those of the user's: the name of their kind, their number, and themselves."""
    own = vars(module)
    return [(name, n, hook) for name in _HOOKS_OF_TORCH for n, hook in own[name].items() if type(hook) not in _OURS]


def _helpers(function: Any, code: CodeType) -> list[tuple[Any, type | None]]:
    """What a function of the user's may call, by its name or from around it."""
    space = getattr(function, "__globals__", {})
    around = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _is_filled(cell)]
    found = [space.get(name) for name in code.co_names] + around
    found = [one for one in found if callable(one) and not isinstance(one, nn.Module)]  # these are followed elsewhere
    return [_with_owner(one) for one in found if not str(getattr(one, "__module__", "torch.")).startswith("torch.")]


def _with_owner(one: Any) -> tuple[Any, type | None]:
    """A function, or that of an object which may be called, and the class that it is a method of."""
    if isinstance(one, MethodType):
        return one, type(one.__self__)
    call = inspect.getattr_static(type(one), "__call__", None)
    return (MethodType(call, one), type(one)) if isinstance(call, FunctionType) else (one, None)


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def state_of(model: nn.Module, device: torch.device, read: Read | None) -> State:
    """All that a replay would not know of if it changed, by where it is; `described` says what that is.

    Args:
        model: The model.
        device: Where it is.
        read: What matters; all attributes, and nothing else, if not given.

    Returns:
        It.
    """
    found: State = {("", _AUTOCAST, ""): _autocast(device), ("", _EVERYWHERE, ""): global_hooks()}
    found["", _DTYPE, ""] = torch.get_default_dtype()
    if read is not None:
        found |= read.values()
    names, seen = None if read is None else read.names, dict[int, Any]()
    for path, module in model.named_modules():
        found |= _of_module(path, module, names, lambda value: _frozen(value, seen))
    return found


def _of_module(path: str, module: nn.Module, names: frozenset[Any] | None, show: Callable[[Any], Any]) -> State:
    """The same of one module."""
    kind, own = type(module).__name__, vars(module)
    found: State = {(path, kind, ""): id(module)}
    hooks = [(name, number) for name, number, _ in _hooks_of(module)]
    found[path, kind, _HOOKS] = hooks, own.get("forward", type(module).forward)
    found[path, kind, _PARTS] = [
        identity(t) for part in (own["_parameters"], own["_buffers"]) for t in part.values() if t is not None
    ]
    found[path, kind, "training"] = own["training"]
    for name in own.keys() - _KEPT_BY_TORCH:
        if names is None or name in names:
            value = own[name]
            found[path, kind, name] = value if type(value) in _PLAIN else show(value)
    return found


def settings_of(extensions: Sequence[Extension]) -> State:
    """The same of extensions: of one that has a stand-in in a recording how it clips, else all that it has."""
    found: State = {}
    for extension in extensions:
        own = type(extension).recording is not Extension.recording
        names = ("clip", "groups") if own else tuple(vars(extension))
        for name in names:
            found["", type(extension).__name__, name] = _frozen(getattr(extension, name, None), {})
    return found


_HOOKS, _PARTS, _INSIDE = "a hook or the forward", "a parameter or buffer", "a module inside"
_AUTOCAST, _EVERYWHERE = "the precision of autocast", "the list of hooks on all modules"
_DTYPE = "torch's default dtype"


def what_differs(now: State, before: State, except_for: State | None = None) -> Key | None:
    """The first thing that is not as it was; ``except_for``: of each key what may differ, as of `what_is_left`."""
    if now == before:
        return None
    left = except_for or {}
    for key in [*now, *before]:
        mask = left.get(key)
        if mask is not True and _without(mask, now.get(key, _PARTS)) != _without(mask, before.get(key, _PARTS)):
            return key
    return None


def what_is_left(now: State, before: State) -> State:
    """What forwards have left there themselves, which says nothing of what is to be done: a counter beside settings."""
    masks = {key: _unlike(value, before.get(key, before)) for key, value in now.items()}
    return {key: mask for key, mask in masks.items() if mask is not None}


def _unlike(now: Any, before: Any) -> Any:
    """What has changed: None for nothing, True for all of it; of a mapping or an object the same of its entries."""
    if now == before:
        return None
    if _has_entries(now) and _has_entries(before) and [name for name, _ in now[1]] == [name for name, _ in before[1]]:
        return [_unlike(one, other) for (_, one), (_, other) in zip(now[1], before[1], strict=True)]
    return True


def _without(mask: Any, value: Any) -> Any:
    """A value without what is marked."""
    if mask is None or not _has_entries(value) or len(mask) != len(value[1]):
        return value
    pairs = zip(mask, value[1], strict=True)
    return value[0], [(name, None if part is True else _without(part, one)) for part, (name, one) in pairs]


def _has_entries(value: Any) -> bool:
    """Whether it stands for a mapping or an object."""
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Entries)


def described(key: Key) -> str:
    """What a part of the state is, for a message."""
    path, kind, name = key
    where = f"`{path}` ({kind})" if path else kind
    if not name:
        return where
    return f"{name if name in (_HOOKS, _PARTS, _INSIDE) else f'`{name}`'} of {where}"


def may_be_a_tensor(key: Key) -> bool:
    """Whether a part of the state is a setting that a forward reads, which could as well be a tensor."""
    return key[2] not in ("", "training", _HOOKS, _PARTS, _INSIDE)


def _frozen(value: Any, seen: dict[int, Any], depth: int = _DEPTH) -> Any:
    """Something that is equal as long as a setting is, of nested ones too; what is known from elsewhere is taken."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is float:
        return repr(value)  # a NaN is what it was
    if isinstance(value, Tensor):
        return identity(value) if value.is_leaf else kind  # else it is computed in each forward
    if isinstance(value, (nn.Module, type, ModuleType)) or depth == 0:
        return id(value)
    if isinstance(value, MethodType):
        return value.__func__, id(value.__self__)
    if id(value) not in seen:
        seen[id(value)] = id(value)  # of what holds itself
        seen[id(value)] = _parts(value, seen, depth - 1)
    return seen[id(value)]


def _parts(value: Any, seen: dict[int, Any], depth: int) -> Any:
    if isinstance(value, Mapping):
        return type(value), Entries((_frozen(k, seen, depth), _frozen(v, seen, depth)) for k, v in value.items())
    if isinstance(value, (tuple, list, deque)):
        return type(value), [_frozen(one, seen, depth) for one in value]
    if isinstance(value, (set, frozenset)):
        return type(value), sorted(map(repr, value))
    if isinstance(value, partial):
        return [_frozen(one, seen, depth) for one in (value.func, value.args, value.keywords)]
    if hasattr(value, "__array_interface__") and hasattr(value, "tobytes"):
        return type(value), getattr(value, "shape", ()), value.tobytes()
    own = getattr(value, "__dict__", None) or {}
    return id(value), Entries((name, _frozen(one, seen, depth)) for name, one in own.items())


def _autocast(device: torch.device) -> Any:
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None
