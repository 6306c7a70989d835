"""The few uses of private PyTorch names, all in one place; tests/test_private.py notices when one changes."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from ._looks import holds


def undispatched() -> AbstractContextManager:
    """No torch function modes, whose every call and look at an attribute takes a microsecond; dispatch modes stay."""
    return torch._C.DisableTorchFunction()


def dispatched() -> AbstractContextManager:
    """Torch function modes again, inside of `undispatched`."""
    return torch._C._EnableTorchFunction()


def operation_without_frame(operation: Any) -> Callable[..., Any]:
    """What an operation of `torch.ops` does, without the frame of a Python function for each call."""
    if type(operation).__call__ is not torch._ops.OpOverload.__call__:
        return cast("Callable[..., Any]", operation)
    return cast("Callable[..., Any]", operation._op)


def is_operation(function: Any) -> bool:
    """Whether a function is one of `torch.ops`, which others may have registered, and written in Python."""
    return isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))


def dispatch_modes_active() -> bool:
    """Whether there are dispatch modes, such as one that counts operations; none see into compiled code."""
    return torch._C._len_torch_dispatch_stack() > 0


def dispatch_is_off() -> bool:
    """Whether torch hides from dispatch modes what it does now, as while it makes a tensor of a list of others."""
    return torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.Python)


def inside_functorch(tensor: Tensor) -> bool:
    """Whether the tensor is a wrapper of ``torch.func`` (vmap, grad, ...), where hooks must stay silent."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def overridden_forward(module: nn.Module) -> bool:
    """Whether this very object carries its own ``forward``, as some offloading libraries install."""
    return "forward" in module.__dict__


def hides(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether this very object carries something that hides a function of its class with one of these names."""
    return any(isinstance(getattr(type(module), name), FunctionType) for name in module.__dict__.keys() & names)


def stands_in(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether an attribute, or a buffer that needs a gradient, is found where the module looks for its parameters."""
    own, buffers = module.__dict__, module._buffers
    for name in names:
        if isinstance(own.get(name), Tensor):
            return True
        if buffers and (buffer := buffers.get(name)) is not None and buffer.requires_grad:
            return True
    return False


def version(tensor: Tensor) -> int:
    """How often the tensor was written to in place."""
    return tensor._version


with torch.inference_mode(False), torch.enable_grad():  # whatever holds where this is imported
    _LEAF: Any = type(get_gradient_edge(torch.empty(0, requires_grad=True)).node)


def float32_precision(library: str, what: str) -> str:
    """What float32 products are rounded to, ``"tf32"`` or ``"bf16"``; ``"ieee"`` or ``"none"`` if to nothing less.

    The properties of ``torch.backends`` tell the same, in ten times the time.

    Args:
        library: ``"cuda"`` or ``"mkldnn"``.
        what: ``"matmul"``, ``"conv"`` or ``"rnn"``.

    Returns:
        The name.
    """
    return torch._C._get_fp32_precision_getter(library, what)


def set_float32_precision(library: str, what: str, value: str) -> None:
    """Set what `float32_precision` tells."""
    torch._C._set_fp32_precision_setter(library, what, value)


def added_up(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """``left[k] + right[k]`` for all k, new tensors, in few calls for many small ones, as torch's optimizers do it."""
    return list(torch._foreach_add(list(left), list(right))) if left else []


def leaf_of(node: Any) -> Tensor | None:
    """The leaf at which a graph node adds up gradients; ``None`` for any other node."""
    return node.variable if type(node) is _LEAF else None


def metadata(node: Node) -> dict[str, Any]:
    """The dictionary that a graph node carries; public, but typed as a method."""
    return node.metadata  # type: ignore[return-value]


def memory_order(tensor: Tensor) -> list[int] | None:
    """The axes in the order in which they lie in memory; ``None`` if there are gaps or entries shown twice."""
    if tensor.is_contiguous():
        return list(range(tensor.dim()))
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda axis: (-strides[axis], axis))
    return order if tensor.permute(order).is_contiguous() else None


def whole_base(tensor: Tensor) -> Tensor:
    """The tensor that this one shows entirely, if it is a view, be it in another order of axes; else the tensor itself.

    A view that is written to gets a new place in the graph, its base keeps its own.

    Returns:
        The base, or the tensor.
    """
    base = tensor._base
    if base is None or base.grad_fn is None or base.numel() != tensor.numel():
        return tensor
    return base if base.is_contiguous() and memory_order(tensor) is not None else tensor


def shown_by(tensor: Tensor, leaf: Tensor) -> bool:
    """Whether a tensor is a view of this leaf as it lies now, which has no gaps, and shows its entries as they are."""
    same = tensor._base is leaf and tensor.dtype == leaf.dtype and leaf.is_contiguous()
    if not same or tensor.is_conj() or tensor.is_neg():
        return False
    return tensor.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr()  # its data may have been replaced


def looked_up(node: Node) -> tuple[Tensor, int] | None:
    """What a graph node has looked up along the first axis of one tensor.

    Returns:
        Which entries, none of them negative, and the one that gets no gradient, -1 if there is none; ``None`` if the
        node does something else, or does not tell without being asked only once, as under an activation checkpoint.
    """
    notes: Any = node
    try:
        if node.name() == "EmbeddingBackward0":
            raw, ids, padding = notes._raw_saved_indices, lambda: notes._saved_indices, notes._saved_padding_idx
            if notes._saved_scale_grad_by_freq or (padding >= 2**63 and padding != 2**64 - 1):
                return None
            padding = -1 if padding >= 2**63 else padding
        elif node.name() == "IndexSelectBackward0" and notes._saved_dim == 0:
            raw, ids, padding = notes._raw_saved_index, lambda: notes._saved_index, -1
        elif node.name() == "IndexBackward0" and len(notes._raw_saved_indices) == 1:
            raw, ids, padding = notes._raw_saved_indices[0], lambda: notes._saved_indices[0], -1
        else:
            return None
        if not isinstance(raw.data, Tensor):  # kept by a hook
            return None
        found = ids()
    except (AttributeError, RuntimeError):  # an older torch; a graph that is gone, or ids that were written to
        return None
    if found.dtype not in (torch.long, torch.int) or not holds(found >= 0):
        return None
    return found.long(), padding


def run_first(module: nn.Module, kind: type) -> None:
    """Bring the forward hook of this kind before those that were registered in front of it later."""
    hooks = cast("OrderedDict[int, Any]", module._forward_hooks)
    if hooks and not isinstance(next(iter(hooks.values())), kind):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
            hooks.move_to_end(key, last=False)


def runs_last(module: nn.Module, kind: type) -> bool:
    """Whether no forward pre-hook comes after that of this kind; if one does, that is changed for the next call."""
    hooks = cast("OrderedDict[int, Any]", module._forward_pre_hooks)
    if not hooks or isinstance(hooks[next(reversed(hooks))], kind):
        return True
    for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
        hooks.move_to_end(key)
    return False


_hooked: Any = torch.optim.Optimizer.profile_hook_step
_HOOKED_STEP = _hooked(lambda: None).__code__


def steps_under_way(optimizer: torch.optim.Optimizer) -> int:
    """How many calls of an optimizer's step, each of which runs its hooks, are on the Python stack.

    Returns:
        The number; two where a subclass calls the step of its base class, if torch has hooked both, which it does to a
        class when the first object of it is made.
    """
    frame, count = sys._getframe(1), 0
    while frame is not None:
        if frame.f_code is _HOOKED_STEP and frame.f_locals["args"][0] is optimizer:
            count += 1
        frame = frame.f_back  # type: ignore[assignment]
    return count


def global_forward_hooks() -> bool:
    """Whether hooks on all modules are registered; they run before any module's own."""
    return bool(torch.nn.modules.module._global_forward_hooks)


def global_hooks() -> list[list[int]]:
    """The numbers of the hooks on all modules, by their kinds."""
    every = torch.nn.modules.module
    kinds = (
        every._global_forward_hooks, every._global_forward_pre_hooks, every._global_backward_hooks,
        every._global_backward_pre_hooks,
    )  # fmt: skip
    return [list(hooks) for hooks in kinds]


def calls_under_way(module: nn.Module) -> int:
    """How many calls of a module are on the Python stack."""
    frame, count = sys._getframe(1), 0
    while frame is not None:
        if frame.f_code.co_name == "_wrapped_call_impl" and frame.f_locals.get("self") is module:
            count += 1
        frame = frame.f_back  # type: ignore[assignment]
    return count


def gradient_hooks(tensor: Tensor) -> dict | None:
    """The tensor's gradient hooks, which run in their order and may change the gradient."""
    return tensor._backward_hooks


def norm_statistics(output: Tensor) -> tuple[Tensor, Tensor] | None:
    """Means and inverse deviations that a group or layer norm has computed for its output, where it kept them."""
    node = output.grad_fn
    if node is None or node.name() not in ("NativeGroupNormBackward0", "NativeLayerNormBackward0") or saves_otherwise():
        return None
    saved = cast("Any", node)
    return saved._saved_result1, saved._saved_result2


def saves_otherwise() -> bool:
    """Whether hooks are in force that save tensors in another way, such as on the CPU, or not at all."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def follow_recomputation(around: Callable[[], AbstractContextManager]) -> bool:
    """If an activation checkpoint is under way in this forward, run it again inside of a context.

    Its frame is found through the hook that packs saved tensors now.

    Returns:
        Whether there is one.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    pack = hooks[0] if hooks else None
    if getattr(pack, "__closure__", None) is None or not pack.__qualname__.startswith("_checkpoint_hook"):
        return False
    frame = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))["frame"].cell_contents
    recompute = frame.recompute_fn
    if getattr(recompute, "perexample", False):
        return True

    def followed(*args: Any) -> None:
        with around():
            recompute(*args)

    followed.perexample = True  # type: ignore[attr-defined]
    frame.recompute_fn = followed
    return True


def repeats_forward() -> bool:
    """Whether a backward is under way in this thread, in which a checkpoint runs a part of the forward again."""
    return graph_task() != -1


def graph_task() -> int:
    """The number of the backward that is under way in this thread, -1 if there is none."""
    return torch._C._current_graph_task_id()


def will_be_executed(node: Node | None) -> bool:
    """Whether the backward that is under way wants the gradient that arrives at a node."""
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient torch.autograd.grad was asked for
        return True


def transforms_active() -> bool:
    """Whether a transform of ``torch.func`` is under way, whatever its tensors are."""
    return torch._C._are_functorch_transforms_active()


def whole_arguments(func: Callable, kwargs: dict) -> dict:
    """The arguments by name that a function was called with: ``l1_loss`` keeps its weight from modes (torch 2.13)."""
    if func is not nn.functional.l1_loss or "weight" in kwargs:
        return kwargs
    code, frame = nn.functional.l1_loss.__code__, sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back  # type: ignore[assignment]
    weight = None if frame is None else frame.f_locals.get("weight")
    return kwargs if weight is None else {**kwargs, "weight": weight}


def function_modes() -> list[TorchFunctionMode]:
    """The torch function modes of this thread, outermost first."""
    return list(torch.overrides._get_current_function_mode_stack())


def without_dispatch(function: Callable) -> Callable:
    """A Python function of torch that does not hand itself to the modes, so that its parts do."""
    if function not in _UNDISPATCHED:
        code: Any = function
        names = {**code.__globals__, "has_torch_function": lambda *_: False}
        copy = FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)
        copy.__kwdefaults__ = code.__kwdefaults__
        _UNDISPATCHED[function] = copy
    return _UNDISPATCHED[function]


_UNDISPATCHED: dict[Any, Callable] = {}


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether torch hands the module's inputs and outputs through a node of its own, for full backward hooks."""
    everywhere = torch.nn.modules.module
    return bool(
        module._backward_hooks
        or module._backward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


def handed_through(node: Node) -> bool:
    """Whether a node only hands tensors through, for full backward hooks."""
    return node.name() == "BackwardHookFunctionBackward"


@contextmanager
def kept_state(module: nn.Module) -> Iterator[None]:
    """Put back all attributes of a module and its parts, as a repeated forward may set some."""
    kept = [(part, dict(part.__dict__), dict(part._buffers)) for part in module.modules()]
    try:
        yield
    finally:
        for part, attributes, buffers in kept:
            part.__dict__.clear()
            part.__dict__.update(attributes)
            part._buffers.clear()
            part._buffers.update(buffers)


@contextmanager
def without_forward_hooks(module: nn.Module) -> Iterator[None]:
    """Silence a module's own forward hooks, which see real calls only."""
    hooks, module._forward_hooks = module._forward_hooks, OrderedDict()
    try:
        yield
    finally:
        module._forward_hooks = hooks


def has_hook(module: nn.Module, kind: type) -> bool:
    """Whether a forward pre-hook of this kind is registered."""
    return any(isinstance(hook, kind) for hook in module._forward_pre_hooks.values())


def shards(model: nn.Module) -> dict[int, tuple[Tensor, nn.Parameter]]:
    """Parameters that FSDP2 (``fully_shard``) keeps in shards: what is computed with, and what the optimizer holds.

    Returns:
        Both, by the identity of either, since the model shows now the one and now the other. Before the first forward
        they are the same.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not there yet: nothing is sharded
    kind: Any = getattr(fsdp, "FSDPModule", None)
    if kind is None or not kind.__subclasses__():  # which fully_shard makes
        return {}
    found: dict[int, tuple[Tensor, nn.Parameter]] = {}
    for module in model.modules():
        if isinstance(module, kind):
            state: Any = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for kept in [kept for group in groups if group is not None for kept in group.fsdp_params]:
                own = kept.sharded_param
                whole = getattr(kept, "_unsharded_param", own)  # made in the first forward
                if not kept.is_dtensor:  # else not whole even then: tensor-parallel
                    found[id(whole)] = found[id(own)] = whole, own
    return found


def laid_out_in_one(param: Tensor) -> bool:
    """Whether a parameter is all those of a model in one, as FSDP1 (``FullyShardedDataParallel``) makes it."""
    return bool(getattr(param, "_is_flat_param", False))


def may_be_parametrized(module: nn.Module) -> bool:
    """Whether the module holds parametrizations, which a look at the attribute would tell much slower."""
    return "parametrizations" in module._modules


def compiled_in_place(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called, whose forward cannot be seen."""
    return module._compiled_call_impl is not None


def is_bare(module: nn.Module) -> bool:
    """Whether a module has no tensors of its own, be it with parts that have."""
    return not module._parameters and not module._buffers


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """What ``model.named_parameters()`` gives, which is asked for in every step and takes several times as long.

    What a forward has computed and put in a parameter's place, as DropConnect does, is none: an optimizer has what it
    was computed from.

    Returns:
        The leaves of the graph, by name.
    """
    if type(model).named_parameters is not nn.Module.named_parameters:  # wrappers may give other names
        return {name: p for name, p in model.named_parameters() if p.grad_fn is None}
    found: dict[str, Tensor] = {}
    seen = set[int]()
    for prefix, module in model.named_modules():
        for name, p in own_parameters(module).items():
            if p is not None and id(p) not in seen and p.grad_fn is None:
                seen.add(id(p))
                found[f"{prefix}.{name}" if prefix else name] = p
    return found


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Parameters owned directly, by name; unlike ``named_parameters`` it keeps one parameter under two names."""
    return module._parameters


def reentrant_checkpoint(node_name: str) -> bool:
    """Whether a graph node is a reentrant activation checkpoint, whose inner graph cannot be seen."""
    return node_name == "CheckpointFunctionBackward"


def output_shapes(node: Node) -> list[torch.Size]:
    """Shapes of what a graph node gave; empty where it does not tell."""
    return [torch.Size(known.shape) for known in getattr(node, "_input_metadata", ())]


def ones_for(edge: GradientEdge) -> Tensor:
    """Ones in the form of what a graph node gave."""
    known = edge.node._input_metadata[edge.output_nr]
    return torch.ones(torch.Size(known.shape), dtype=known.dtype, device=known.device)


def saved(node: Node, name: str) -> Any:
    """What a graph node has saved under a name; ``None`` where it has nothing, or the graph is freed."""
    try:
        return getattr(node, f"_saved_{name}", None)
    except RuntimeError:
        return None


_OPTIONS: dict[type, list[str]] = {}


def options_of(node: Node) -> list[Any]:
    """What a graph node has saved that is no tensor: axes, sizes, numbers; without names."""
    if type(node) not in _OPTIONS:
        names = [name for name in dir(node) if name.startswith("_saved_")]
        _OPTIONS[type(node)] = [name for name in names if not hasattr(type(node), f"_raw{name}")]
    return [saved(node, name.removeprefix("_saved_")) for name in _OPTIONS[type(node)]]


def is_python_number(scalar: Tensor) -> bool:
    """Whether a tensor without axes stands for a number that was given as such: it yields to all other types."""
    other = torch.int8 if scalar.dtype != torch.int8 else torch.uint8
    if scalar.is_floating_point() or scalar.is_complex():
        other = torch.float16 if scalar.dtype != torch.float16 else torch.bfloat16
    return scalar.dim() == 0 and torch.result_type(torch.zeros((), dtype=other, device=scalar.device), scalar) == other


# Losses whose graph node keeps the reduction it was called with; 1 is "mean" and 2 is "sum" in ATen.
_REDUCTION = {1: "mean", 2: "sum"}


def loss_reduction_of(node: object) -> str | None:
    """The reduction that a loss node was called with, where the node remembers it."""
    return _REDUCTION.get(getattr(node, "_saved_reduction", -1))


def sums_losses(node: Node) -> bool:
    """Whether a node is the plain sum of losses that were not reduced."""
    before = node.next_functions[0][0] if node.name() == "SumBackward0" else None
    return before is not None and getattr(before, "_saved_reduction", -1) == 0


def mean_is_over(node: object, reduction: str = "mean") -> tuple[float, Tensor, int] | None:
    """What a mean cross-entropy divided by (a sum: would have), its targets, and the one ignored, where it is known."""
    if loss_reduction_of(node) != reduction:
        return None
    try:
        total, target = getattr(node, "_saved_total_weight", None), getattr(node, "_saved_target", None)
    except RuntimeError:  # the graph is freed
        return None
    if total is None or target is None:
        return None
    ignored = getattr(node, "_saved_ignore_index", -100)  # without its sign
    return float(total), target, ignored - 2**64 if ignored >= 2**63 else ignored


_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def remove_hooks(module: nn.Module, kinds: tuple[type, ...]) -> None:
    """Remove all forward hooks of these kinds, also from copies, whose handles nobody has."""
    ids = [
        key
        for table in (module._forward_hooks, module._forward_pre_hooks)
        for key, hook in table.items()
        if isinstance(hook, kinds)
    ]
    for name in _HOOK_TABLES:
        for key in ids:
            getattr(module, name).pop(key, None)


_MT_STATE = slice(24, 24 + 8 * 624)  # where the bytes of a CPU generator's state hold the Mersenne twister's 624 words


def is_default_generator(generator: torch.Generator) -> bool:
    """Whether numbers are drawn from this generator where none is given; dispatch modes are given another object."""
    kind, given = generator.device.type, cast("Any", generator)
    module: Any = torch if kind == "cpu" else torch.get_device_module(kind)
    if kind == "mps":
        defaults = [module._get_default_mps_generator()]
    else:
        defaults = [torch.default_generator] if kind == "cpu" else getattr(module, "default_generators", [])
    return any(given._cdata == default._cdata for default in defaults)


def system_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that nobody can repeat.

    Returns:
        A generator on the device.
    """
    return generator_of(os.urandom(64), device)


def generator_of(seed: bytes, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose numbers are a function of some bytes, and of all of these.

    ``manual_seed`` uses 32 bits on CPU, so that all its streams can be tried; here the whole state is set.

    Args:
        seed: The bytes.
        device: Where it is to be.

    Returns:
        A generator on the device.
    """
    generator = torch.Generator(device)
    bits = hashlib.shake_256(seed).digest(4 * 624)
    generator.manual_seed(int.from_bytes(bits[:8], "little", signed=True))
    if generator.device.type == "cpu":
        state = generator.get_state()
        words = torch.zeros(624, 8, dtype=torch.uint8, device="cpu")
        words[:, :4] = torch.frombuffer(bytearray(bits), dtype=torch.uint8).view(624, 4)
        state[_MT_STATE] = words.flatten()
        generator.set_state(state)
    return generator
