"""One backward: autograd runs once, and what arrives at the taps becomes fields of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .._grams import Grams
from .._looks import blind, holds
from .._private import in_memory, version
from .._shards import freed
from .._tree import map_tensors
from .._vjp import pulled_back
from .._warning import warn
from ..errors import (
    BatchAxisError,
    ConfigurationError,
    MemoryBoundWarning,
    UncoveredParameterError,
    UnsupportedModuleError,
)
from ..extension import Extension
from ..methods import Choice
from ..rule import Call, asked, at_least_float32, checked_terms, evaluate
from ..terms import Dense, Sum, Term, combine
from ..terms.placed import merged
from .between import check_between
from .broadcasts import check_broadcasts
from .couplings import check_couplings
from .coverage import check_coverage, check_divisors, check_sums, number_of_examples, parameter_names
from .fields import FIELDS, check_late, check_written, checked, checked_fields, of_its_own
from .joins import check_cuts, check_joins
from .shares import check_shares, refuse_means, refuse_sums, shares_of
from .shortcuts import shortcut
from .state import STATE, plain
from .tap import Tap
from .view import ParameterView
from .walk import Source, Walk

_choice = lru_cache(Choice)


class Context(Protocol):
    """What a backward needs to know of the context it runs in."""

    extensions: tuple[Extension, ...]
    loss_reduction: str
    grad: bool
    strategy: str
    room: float
    max_memory: int | None

    @property
    def loss_scale(self) -> float:
        """A factor on the loss that is divided out again."""


class Backward:
    """One backward: gradients arrive at live taps, views fill, extensions compute."""

    def __init__(self, context: Context, loss: Tensor, found: Walk) -> None:
        """Find out all that can be wrong before anything is computed."""
        self.context, self.found, self.retain = context, found, False
        if loss.is_meta or hasattr(loss, "fake_mode"):
            raise ConfigurationError(
                "The loss has no value (it is on the meta device, or of a FakeTensorMode), and a backward in perex "
                "looks at values; run it with real tensors (for what it will do: plan(model, *inputs))."
            )
        self.listener = STATE.listener  # of this thread; autograd computes for devices in threads of its own
        self.names = parameter_names(found)
        check_coverage(found)
        self.n = number_of_examples(found)
        mean = context.loss_reduction == "mean"
        self.joint = any(extension.joint for extension in context.extensions)
        loss_scale = context.loss_scale
        if not blind():  # else what came before has been looked at, whose graph was the same
            self._check_loss(loss, mean, loss_scale)
        # A mean is seeded with N where no p.grad nor other gradient is wanted: what is divided by N and rounded, as by
        # autocast, would change with the size of the batch.
        seeded = not context.grad and not found.leaves and loss.dtype in (torch.float32, torch.float64)
        n = float(self.n) if mean and self.n else 1.0  # what an example's own loss is divided by
        self.seed = n if seeded else 1.0
        self.scale = (self.n if mean else 1.0) / self.seed / loss_scale
        self._prepare()

    def _prepare(self) -> None:
        """Make a view for each parameter, and count what each waits for."""
        context, found = self.context, self.found
        forwards = frozenset(tap.record for tap in found.taps)
        trainable = [(key, p, name) for key, (p, name) in self.names.items() if p.requires_grad]
        self.choice = _choice(context.strategy, self.joint, context.room)
        self.over = False  # whether autograd has run, so that parameters in shards may be gone
        self.again: set[int] = set()  # in a second pass, the tensors whose terms are wanted once more
        made = partial(ParameterView, n=self.n, scale=self.scale, forwards=forwards, choice=self.choice)
        self.views = {key: made(name, p) for key, p, name in trainable}
        self.arrived: dict[Tap, dict[int, Tensor]] = {tap: {} for tap in found.taps}
        for view in self.views.values():
            view.wait()
            view.users = sum(extension.joint for extension in context.extensions)
        # What a tap was given for a parameter waits for all its taps, a parameter for all that was computed from it.
        self.computed = {key: source for key, source in found.sources.items() if source.tensor.grad_fn is not None}
        self.parts: dict[int, list[Term]] = {key: [] for key in self.computed}
        self.pending = dict.fromkeys([*self.views, *self.computed], 0)
        for tap in found.taps:
            self._count({id(p) for p in tap.params.values()}, 1)
        for source in self.computed.values():
            self._count({id(p) for p in source.leaves}, 1)
        self.unreached = [key for key, taps in self.pending.items() if not taps]
        self.results: dict[str, dict[int, Tensor]] = {extension.field: {} for extension in context.extensions}
        self.sharded = {key for key, view in self.views.items() if view.sharded}
        if self.sharded and context.max_memory is not None:
            raise ConfigurationError(
                "perex(max_memory=...) runs a second backward where memory is short, which with parameters in shards "
                "(FSDP2) all processes would have to do alike; leave max_memory out."
            )
        self.twice = self.joint and context.max_memory is not None and self._most_held() > context.max_memory
        self.grams = Grams({tap: (tap.rule, tap.kept()) for tap in found.taps})
        self.devices = {view.param.device.type for view in self.views.values()}

    def _check_loss(self, loss: Tensor, mean: bool, loss_scale: float) -> None:
        """Whether it is a sum or mean of the examples' own losses, as far as that can be seen."""
        if loss.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ConfigurationError(
                "A backward in perex looks at values, so torch.cuda.graph cannot capture it; use "
                "perexample.RecordedStep, which can."
            )
        if self.n:
            check_sums(loss, self.found, self.n, loss_scale, mean=mean)
            check_divisors(self.found, self.n)
        shares = shares_of(loss, self.found, self.n) if self.n else []
        if mean:
            refuse_sums(loss, shares, self.n, loss_scale)
        if self.joint and not mean:
            refuse_means(loss, self.found, self.n, loss_scale)
        model = next((tap.record.root() for tap in self.found.taps), None)
        if self.n:
            check_shares(shares, self.n, model, mean=mean)
        check_broadcasts(loss, self.n, model)
        check_between(self.found, self.n)
        check_joins(loss, self.found, self.n)
        check_couplings(loss, self.found, self.n)
        check_cuts(loss, self.found, self.n)

    def _most_held(self) -> int:
        """At most how many bytes will be held for the end, as far as can be told now."""
        spread = sum(p.numel() * p.element_size() for source in self.computed.values() for p in source.leaves)
        shared = {key for key, taps in self.pending.items() if taps > 1}
        return sum(tap.most_held(self.n, shared) for tap in self.found.taps) + self.n * spread

    def _count(self, keys: set[int], step: int) -> list[int]:
        """Count what is waited for up or down; returns those that nothing is missing of any more."""
        known = [key for key in keys if key in self.pending]  # leaves that are no parameters are not
        for key in known:
            self.pending[key] += step
        return [key for key in known if not self.pending[key]]

    def execute(self, backward: Callable[[Any, bool], None], retain: bool) -> None:
        """Run autograd once, then finish; fields are written only if all of it succeeded.

        With a bound on the memory that is held for the end, below what may be needed, nothing is held, and autograd
        runs a second time. To hold a part would not save any time then, and take room beside that of the graph.
        """
        views, self.retain = list(self.views.values()), retain or self.twice
        for extension in self.context.extensions:
            extension.start(views)
        for tap in self.found.taps:
            tap.run = self
            tap.hook_last()
        inputs = None if self.context.grad else [*self.found.edges, *self.found.leaves.values()]
        try:
            with self._nothing_past_the_graph():
                backward(inputs, self.retain)
            self._finish(views)
            late = {key for key, view in self.views.items() if view.late}
            if late:
                self._prepare_again(late, retain)
                backward(list(self.found.edges), retain)
                for tap in list(self.arrived):
                    self._complete(tap)
                assert not any(view.late for view in views)
            self._write()
            for extension in self.context.extensions:
                extension.commit()
        finally:
            for tap in self.found.taps:
                tap.run = None
        if not retain:
            for tap in self.found.taps:
                tap.release()

    def _prepare_again(self, late: set[int], retain: bool) -> None:
        """Wait for the terms of these parameters once more."""
        sources = {key for key, source in self.computed.items() if any(id(p) in late for p in source.leaves)}
        self.again, self.retain = late | sources, retain
        taps = [tap for tap in self.found.taps if any(id(p) in self.again for p in tap.params.values())]
        self.arrived = {tap: {} for tap in taps}
        self.pending = dict.fromkeys(self.again, 0)
        for tap in taps:
            self._count({id(p) for p in tap.params.values()}, 1)
        for key in sources:
            self._count({id(p) for p in self.computed[key].leaves}, 1)

    @contextmanager
    def _nothing_past_the_graph(self) -> Iterator[None]:
        """A backward inside of a function's own backward gives gradients to parameters that the graph does not show."""
        keys = self.unreached if self.context.grad else list(self.views)
        params = [(view.param, view.name) for key in keys if (view := self.views.get(key)) is not None]
        before = [(p.grad, None if p.grad is None else version(p.grad)) for p, _ in params]
        yield
        for (p, name), (grad, count) in zip(params, before, strict=True):
            if p.grad is not grad or (grad is not None and version(grad) != count):
                p.grad = grad
                raise UncoveredParameterError(
                    f"Parameter `{name}` was given a gradient past the graph, by a "
                    f"torch.autograd.Function that calls backward itself (a reversible layer?), so its use cannot be "
                    f"seen. Run this part of the model without that function."
                )

    def arrive(self, tap: Tap, index: int, g: Tensor | None) -> None:
        """Take the gradient of a tap's output; when all live outputs are there, ask the rule."""
        gradients = self.arrived.get(tap)
        if gradients is None:
            return  # a second pass that does not want it
        if g is not None:
            gradients[index] = tap.in_shape(index, in_memory(g.detach()))
        if len(gradients) == len(self.found.taps[tap]):
            self._complete(tap)

    def _complete(self, tap: Tap) -> None:
        gradients = self.arrived.pop(tap)
        # Before plain(): a checkpoint runs its forward again here, taps and all.
        call = tap.call() if self.n and gradients else None
        if not self.retain:
            tap.release()
        with plain(self.devices):
            if call is not None:
                self._add_terms(tap, call, gradients)
            del call, gradients  # so that norms are taken with as little as can be alive
            for key in self._count({id(p) for p in tap.params.values()}, -1):
                self._whole(key)
            self.grams.done(tap)

    def _whole(self, key: int) -> None:
        """Nothing is missing of a tensor any more: hand its gradients on, or compute with them."""
        if key in self.views:
            if self.again:
                self.views[key].fulfil()
            else:
                self.views[key].complete()
                self._compute(self.views[key])
            return
        source, terms = self.computed[key], self.parts[key]
        if self.n and terms and source.leaves:
            self._pull_back(source, terms)
        self.parts[key] = []
        for leaf in self._count({id(p) for p in source.leaves}, -1):
            self._whole(leaf)

    def _pull_back(self, source: Source, terms: list[Term]) -> None:
        """From a tensor to the parameters that it was computed from: by a shortcut, or a product with their graph."""
        term = combine(merged(terms))
        found = shortcut(source, term.parts if isinstance(term, Sum) else [term])
        if found is not None:
            for p, of_one in found.items():
                for one in of_one:
                    self.views[id(p)].add(one)
            return
        leaves = [p for p in source.leaves if id(p) in self.views]
        cotangents = term.dense().to(source.tensor.dtype)
        gradients = pulled_back([source.tensor], leaves, [cotangents])
        if not all(holds(rows.isfinite()) for rows in gradients):
            self._refuse_spoiled(source, leaves, cotangents)
        for p, rows in zip(leaves, gradients, strict=True):
            self.views[id(p)].add(Dense(at_least_float32(rows)))

    def _refuse_spoiled(self, source: Source, leaves: list[Tensor], cotangents: Tensor) -> None:
        """Constants that are not finite make the gradients of all examples so, be it that of a zero."""
        zeros = pulled_back([source.tensor], leaves, [torch.zeros_like(cotangents[:1])])
        for p, rows in zip(leaves, zeros, strict=True):
            if not bool(rows.isfinite().all()):
                record = next(iter(self.found.taps)).record
                raise BatchAxisError(
                    f"`{self.views[id(p)].name}` meets a tensor that all examples are taken to share, and that has "
                    f"values that are not finite, which would spoil the gradients of all. If it is data, it was passed "
                    f"in a way that does not tell which entries belong to which example: the inputs of "
                    f"`{record.root_name}` have the sizes {record.input_sizes} along axis {record.batch_dim}. Let "
                    f"example n be entry n there, in all of them."
                )

    def _add_terms(self, tap: Tap, call: Call, gradients: dict[int, Tensor]) -> None:
        if tap.of_nobody(gradients):
            raise BatchAxisError(
                f"`{tap.name}` ({tap.kind}) has rows that belong to no example, such as padding put between the "
                f"examples, and the loss depends on them. Leave them out of the loss, or add them to each example."
            )
        g: Any = _upstream(tap, gradients)
        if not tap.rule.own_axes:
            g = tuple(map(tap.to_rows, g)) if isinstance(g, tuple) else tap.to_rows(g)
            named = [name for name in tap.rule.batched if name in call.saved]
            call.saved |= {name: map_tensors(tap.to_rows, call.saved[name]) for name in named}
        owner = tap.owner
        sharded = tap.rule.reads_parameters and any(id(p) in self.sharded for p in tap.params.values())
        if sharded and (self.over or any(map(freed, tap.params.values()))):
            raise UnsupportedModuleError(
                f"`{tap.name}` ({tap.kind}) needs its parameters for their gradients when FSDP2 has resharded them "
                f"already, as the loss leaves out some of its outputs; use all of them, or leave this module out of "
                f"fully_shard."
            )
        terms = checked_terms(tap.rule, call, asked(tap.rule, "terms", call, g))
        if sharded:
            evaluate(terms)
        if owner is not None:
            terms = {name: term.regrouped(owner, self.n) for name, term in terms.items()}
        if self.listener is not None:
            self.listener(tap, tap.rule, terms)
        grams = self.grams or None
        for name, term in terms.items():
            term.grams = grams
            key = id(tap.params[name])
            if self.again and key not in self.again:
                continue
            if key in self.parts:
                self.parts[key].append(term)
            elif key in self.views:  # and not a leaf that was made in the forward
                self.views[key].add(term)

    def _compute(self, view: ParameterView) -> None:
        for extension in self.context.extensions:
            result = extension.compute(view)
            check_written(extension, view, "compute")
            if result is not None:
                self.results[extension.field][id(view.param)] = checked(extension, view.name, result, "compute")
        if not self.joint:
            view.drop()
        elif self.twice:
            view.postpone()

    def _finish(self, views: list[ParameterView]) -> None:
        self.over = True
        for tap in list(self.arrived):
            self._complete(tap)
        by_name = {view.name: view for view in views}
        with plain(self.devices):
            for key in self.unreached:
                self._whole(key)
            self._check_held(views)
            for extension in self.context.extensions:
                asked = {view.name: len(view.late) for view in views} if self.twice else {}
                results = checked_fields(extension, extension.finish(views), by_name, "finish")
                for view in views if type(extension).finish is not Extension.finish else ():
                    check_written(extension, view, "finish")
                for name, before in asked.items():
                    check_late(extension, by_name[name], before, results.get(name))
                for name, result in results.items():
                    self.results[extension.field][id(by_name[name].param)] = result

    def _check_held(self, views: list[ParameterView]) -> None:
        """A rule may hold more than it has said."""
        bound = self.context.max_memory
        if bound is None or not self.joint:
            return
        factors = [t for view in views if view.term is not None for t in view.term.factors()]
        held = sum({(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in factors}.values())
        if held <= bound:
            return
        most = max(views, key=ParameterView.held)
        warn(
            f"perex(max_memory={bound}): {held} bytes are held, {most.held()} of them for `{most.name}`, more than the "
            f"rules of the modules have told; override most_held of the rule (docs/extending), or pass a lower bound.",
            MemoryBoundWarning,
        )

    def _write(self) -> None:
        FIELDS.update(self.results)
        for field, results in self.results.items():
            shown: set[int] = set()
            for p, _ in self.names.values():
                if id(p) in results:
                    setattr(p, field, of_its_own(results[id(p)], p, shown))
                elif hasattr(p, field):
                    delattr(p, field)


def _upstream(tap: Tap, gradients: dict[int, Tensor]) -> Any:
    """Gradients of all outputs, zeros for those the loss does not depend on, in at least float32."""
    full = []
    for index, like in enumerate(tap.outputs):
        g = gradients.get(index)
        full.append(at_least_float32(_zeros(like) if g is None else g))
    for index, like in tap.beside:
        full.insert(index, at_least_float32(_zeros(like)))
    return full[0] if len(full) == 1 else tuple(full)


def _zeros(like: tuple[torch.Size, torch.dtype, torch.device]) -> Tensor:
    shape, dtype, device = like
    return torch.zeros(shape, dtype=dtype, device=device)
