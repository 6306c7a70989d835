"""Sums of clipped per-example gradients, the step from gradients to privacy."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from perexample._arguments import positive
from perexample._looks import holds
from perexample._private import added_up, version
from perexample._warning import warn
from perexample.errors import ConfigurationError, ExtensionError, NonFiniteExampleWarning, StaleGradientError
from perexample.extension import Extension, ParameterView, Weights

from .clip import Clip, Flat, bounded, make_clip
from .groups import check_groups, group_of, refuse_unknown


@dataclass
class _Entry:
    """What is known of one parameter's clipped sum."""

    param: weakref.ref[Tensor]
    name: str
    sum: weakref.ref[Tensor]
    used: bool = False
    writes: int = -1
    lent: bool = False  # whether it is overwritten when a recorded step is replayed

    def alive(self) -> bool:
        """Whether the parameter and its sum still exist."""
        return self.param() is not None and self.sum() is not None


@dataclass
class _Staged:
    """What a backward has found, to be remembered if it succeeds."""

    bounds: dict[str, float]
    continued: bool = False
    forwards: frozenset[object] = frozenset()
    norms: Tensor | None = None
    group_norms: dict[str, Tensor] = field(default_factory=dict)
    nonfinite: int = 0
    entries: dict[int, _Entry] = field(default_factory=dict)


class ClippedGrad(Extension):
    """Sum over the examples of their gradients, each clipped to norm C.

    ``p.clipped_sum = sum_n c_n d loss_n / d p``, shape ``[*p.shape]``, unit loss / parameter: a SUM over examples of
    gradients of their own losses, never divided by N. With the default ``clip="flat"`` the factor is
    ``c_n = min(1, C / ||g_n||)``, the norm taken over ALL trainable parameters of the model jointly.

    Sums of several backwards add up, as ``.grad`` does, until the private optimizer has stepped or its `zero_grad` (or
    this object's) is called.

    Args:
        max_norm: C, the bound on each example's norm; with ``groups`` that on each group's, or a mapping from groups.
        clip: ``"flat"`` (Abadi et al. 2016), ``"automatic"`` (AUTO-S, Bu et al. 2022), ``"global"`` (Bu et al. 2021),
            a `Clip`, or any function from norms ``[N]`` to factors ``[N]``; its factors are cut to at most
            ``C / norm``, and it must treat each norm by itself.
        groups: What is clipped jointly: ``"all"`` parameters, each ``"per-parameter"``, each ``"per-module"``, or a
            mapping from parameter names (or beginnings of them) to groups.

    Attributes:
        norms: Norms of the last backward's examples over all parameters jointly, ``[N]``, float64.
        group_norms: The same for each group.
        nonfinite: How many examples of the last backward had a NaN or infinite gradient; these count as zero.

    Raises:
        ConfigurationError: For arguments without meaning, such as C <= 0.

    Guarantees:
        Adding or removing an example changes all clipped sums together by at most `sensitivity` in L2 norm, up to
        rounding: a relative 1e-6 in float32. An example that is not finite changes them by 0.

    References:
        Abadi et al. 2016, arXiv:1607.00133, algorithm 1; Bu et al. 2022, arXiv:2210.00038 (one backward suffices).

    Example:
        >>> from perexample import extend, perex
        >>> from perexample.extensions import ClippedGrad
        >>> model = extend(nn.Linear(1, 1, bias=False))
        >>> clipping = ClippedGrad(1.0)
        >>> with perex(clipping, grad=False):
        ...     model(torch.tensor([[0.5], [3.0]])).mean().backward()
        >>> model.weight.clipped_sum, clipping.norms.tolist(), clipping.sensitivity()
        (tensor([[1.5000]]), [0.5, 3.0], 1.0)
    """

    field = "clipped_sum"
    joint = True
    late_sums = True
    looks_at_sums = True

    def __init__(
        self,
        max_norm: float | Mapping[str, float],
        *,
        clip: str | Clip | Callable[[Tensor], Tensor] = "flat",
        groups: str | Mapping[str, str] = "all",
    ) -> None:
        """Check the arguments."""
        if isinstance(max_norm, Mapping):
            self.max_norm: float | dict[str, float] = {g: positive(f"max_norm[{g!r}]", c) for g, c in max_norm.items()}
        else:
            self.max_norm = positive("max_norm", max_norm)
        check_groups(groups)
        self.clip, self.groups = make_clip(clip), groups
        self.norms: Tensor | None = None
        self.group_norms: dict[str, Tensor] = {}
        self.nonfinite = 0
        self._bounds: dict[str, float] | None = (
            {"all": self.max_norm} if groups == "all" and isinstance(self.max_norm, float) else None
        )
        self._entries: dict[int, _Entry] = {}
        self._forwards: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
        self._repeats = self._usual_repeats = 1  # most backwards through one forward since the sum began; in a step
        self._names: dict[int, tuple[weakref.ref, str]] = {}  # of parameters by identity
        self._examples = 0
        self._staged = _Staged({})
        self._warned = False
        self._lent: dict[str, Tensor] | None = None  # the bounds by group, in what a `RecordedStep` asks

    def know(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Find the groups of a model before its first backward, as a first batch may be empty; `make_private` does.

        Args:
            named: Its parameters, as ``model.named_parameters()``.

        Raises:
            ConfigurationError: If a trainable one belongs to no group, a group has no bound, or one is of names that
                the model has not.
        """
        named = list(named)
        self._remember(named)
        refuse_unknown(self.groups, [name for name, _ in named])
        if not self._under_way():
            self._bounds = self._bounds_of(name for name, p in named if p.requires_grad)

    def _remember(self, named: Iterable[tuple[str, Tensor]]) -> None:
        self._names |= {id(p): (weakref.ref(p), name) for name, p in named}

    def _name(self, p: nn.Parameter) -> str | None:
        """What a parameter is called in the model, if that is known."""
        known = self._names.get(id(p))
        return known[1] if known is not None and known[0]() is p else None

    def _bounds_of(self, names: Iterable[str]) -> dict[str, float]:
        return {group: self._bound(group) for group in sorted({group_of(name, self.groups) for name in names}, key=str)}

    def sensitivity(self) -> float:
        """Bound on what one example adds to all clipped sums together: ``sqrt(sum over groups of C_g^2)``.

        Several backwards through one forward, of a retained graph, add an example's gradient several times, and the
        bound grows with their number; forwards that are added up are taken to be of different examples.

        Returns:
            The bound, in the unit of ``max_norm``.

        Raises:
            StaleGradientError: If there are several groups and no backward has shown yet which.
        """
        if self._bounds is None:
            raise StaleGradientError(
                f"The sensitivity of ClippedGrad(groups={self.groups!r}) depends on the model's groups, which are "
                f"known after the first backward; run one before you ask."
            )
        if not self._under_way():  # as the next backward will find them
            return math.sqrt(sum(self._bound(group) ** 2 for group in self._bounds))
        return self._repeats * math.sqrt(sum(bound**2 for bound in self._bounds.values()))

    def sensitivity_of(self, params: Sequence[nn.Parameter]) -> float:
        """`sensitivity` of a step of these parameters on some examples, when there are none and no backward was run.

        Args:
            params: Trainable parameters, as the optimizer holds them.

        Returns:
            The bound, if each forward has as many backwards as in the step before.

        Raises:
            StaleGradientError: If the group of a parameter is not known, which `know` and each backward tell.
        """
        names = [self._name(p) or "" for p in params]
        if "" in names and self.groups != "all":
            raise StaleGradientError(
                f"The batch is empty, and the group of a parameter of shape {list(params[names.index('')].shape)}, "
                f"which no backward has used, is not known (groups={self.groups!r}). Run a backward on the empty batch."
            )
        self._repeats = self._usual_repeats  # of a count, too
        return self._repeats * math.sqrt(sum(bound**2 for bound in self._bounds_of(names).values()))

    def _under_way(self) -> bool:
        return any(not entry.used for entry in self._entries.values())

    @property
    def examples(self) -> int:
        """Number of examples in the sums under way; 0 once they are used or forgotten."""
        return self._examples if self._under_way() else 0

    def noise_share(self, noise_multiplier: float) -> float:
        """Noise multiplier for the sums if a step as a whole is to cost ``noise_multiplier``: all of it."""
        return noise_multiplier

    def after_step(self, draw: Callable[[float], float], processes: Any) -> None:
        """What a private optimizer calls when it has taken its step; nothing here."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, for ``optimizer.state_dict()``: nothing, as C does not change."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; sums under way are forgotten, as their examples may come again."""
        if self.examples:
            self.zero_grad()

    def zero_grad(self, params: Iterable[nn.Parameter] | None = None) -> None:
        """Forget the sums so far, of these parameters or of all."""
        keys = list(self._entries) if params is None else [id(p) for p in params]
        for key in keys:
            entry = self._entries.pop(key, None)
            p = None if entry is None else entry.param()
            if p is not None and hasattr(p, self.field):
                delattr(p, self.field)
        if not self._entries:
            self._repeats = 1

    def start(self, views: Sequence[ParameterView]) -> None:
        """Find the groups; while sums are under way the parameters must stay the same."""
        self._begin({view.name: view.param for view in views}, views[0].forwards if views else frozenset())

    def _begin(self, named: Mapping[str, Tensor], forwards: frozenset[object]) -> None:
        bounds = self._bounds_of(named)
        if self.groups != "all":
            self._remember(named.items())
        under_way = {key: entry for key, entry in self._entries.items() if not entry.used and entry.alive()}
        if under_way:
            self._same_parameters(under_way, named)
            for group, bound in (self._bounds or {}).items():
                bounds[group] = max(bound, bounds.get(group, 0.0))
        self._staged = _Staged(bounds, bool(under_way), forwards)

    def _same_parameters(self, under_way: Mapping[int, _Entry], named: Mapping[str, Tensor]) -> None:
        """One example may add C to each set of parameters that is clipped by itself, so sets are not mixed."""
        names = {id(p): name for name, p in named.items()}
        for key in under_way.keys() ^ names.keys():
            name = under_way[key].name if key in under_way else names[key]
            raise StaleGradientError(
                f"ClippedGrad is adding up over several backwards, and parameter `{name}` takes part in some of them "
                f"only, or some of the others have a sum that no step has used: the sensitivity is not known. Use one "
                f"ClippedGrad for each model, freeze or unfreeze after a step or zero_grad, and give all trainable "
                f"parameters of the model to the private optimizer, or freeze those that it does not have."
            )

    def compute(self, view: ParameterView) -> None:
        """Norms while the gradients are at hand; the view keeps them for `finish`."""
        view.batch_l2()

    def finish(self, views: Sequence[ParameterView]) -> dict[str, Tensor]:
        """With all norms known, form the weighted sums."""
        device = views[0].param.device
        members: dict[str, list[ParameterView]] = {}
        for view in views:
            members.setdefault(group_of(view.name, self.groups), []).append(view)
        squares = {g: torch.stack([v.batch_l2().to(device) for v in vs]).sum(0) for g, vs in members.items()}
        total = torch.stack(list(squares.values())).sum(0) if len(squares) > 1 else next(iter(squares.values()))
        finite = None if holds(total.sum() < math.inf) else torch.isfinite(total)  # a sum of squares hides nothing
        staged = self._staged
        staged.norms, staged.nonfinite = total.sqrt(), 0 if finite is None else int((~finite).sum())
        staged.group_norms = {group: l2.sqrt() for group, l2 in squares.items()}
        results = {}
        for group, vs in members.items():
            if self._lent is not None:  # a larger bound than that of the recording, beyond which sums may overflow
                holds(
                    self._limit(group, device) * max(1, len(total))
                    <= max(Weights.SAFE, self._bound(group) * len(total))
                )
            factors = self._weights(staged.group_norms[group], finite, self._limit(group, device))
            largest = 1.0 if type(self.clip) is Flat else None
            weights = Weights(factors, most=self._bound(group), largest=largest)
            for view in _freeing(vs):
                value = view.summed(weights, self._before(view.param))
                view.let_go()
                staged.entries[id(view.param)] = _Entry(weakref.ref(view.param), view.name, weakref.ref(value))
                results[view.name] = value
        return results

    def commit(self) -> None:
        """Remember norms and sums."""
        staged = self._staged
        for entry in staged.entries.values():
            if (total := entry.sum()) is not None:
                entry.writes = version(total)
        self.norms, self.group_norms, self.nonfinite = staged.norms, staged.group_norms, staged.nonfinite
        self._bounds = staged.bounds
        if not staged.continued:
            self._forwards.clear()
            self._repeats, self._examples = 1, 0
        if not staged.forwards or not all(forward in self._forwards for forward in staged.forwards):
            self._examples += 0 if staged.norms is None else len(staged.norms)
        for forward in staged.forwards:
            self._forwards[forward] = self._forwards.get(forward, 0) + 1
            self._repeats = max(self._repeats, self._forwards[forward])
        self._entries = {key: entry for key, entry in self._entries.items() if entry.alive()} | staged.entries
        self._staged = _Staged({})
        self._warn()

    def recording(self) -> ClippedGrad:
        """Clips as this does, to bounds that are tensors, in which those of the day are put before each replay.

        Returns:
            It.

        Raises:
            ExtensionError: For a subclass, which may clip otherwise.
            StaleGradientError: If sums are under way.
        """
        if type(self) not in CLIP_ALIKE:
            raise ExtensionError(
                f"{type(self).__name__} is a subclass of ClippedGrad, and a recorded step would clip as ClippedGrad "
                f"does; override recording, which returns what is to be asked in its place."
            )
        if self.examples:
            raise StaleGradientError(
                "ClippedGrad has sums that no step has used; call zero_grad before a step is recorded with it."
            )
        own = ClippedGrad(self.max_norm, clip=self.clip, groups=self.groups)
        own._lent = {}
        return own

    def for_replay(self) -> dict[str, Any]:
        """The norms."""
        return {"norms": self.norms, "group_norms": self.group_norms}

    def of_first(self, field: Tensor, n: int) -> Tensor:
        """The others have added zeros."""
        return field

    def prepare(self, recording: Extension) -> None:
        """Hand over the bounds; sums under way that lie where the next ones are written are copied first."""
        assert isinstance(recording, ClippedGrad)
        assert recording._lent is not None
        for group, tensor in recording._lent.items():
            tensor.fill_(self._bound(group))
        kept = [entry for entry in self._entries.values() if entry.lent and not entry.used and entry.alive()]
        sums = [cast(Tensor, entry.sum()) for entry in kept]
        for entry, total in zip(kept, sums, strict=True):
            _refuse_written(entry, total)
        for entry, total in zip(kept, [total.clone() for total in sums], strict=True):
            p = cast(Tensor, entry.param())
            if getattr(p, self.field, None) is entry.sum():
                setattr(p, self.field, total)
            entry.sum, entry.writes, entry.lent = weakref.ref(total), version(total), False

    def replayed(
        self, found: Any, fields: Mapping[str, tuple[Tensor, Tensor]], n: int, size: int
    ) -> Mapping[str, Tensor]:
        """As after a backward: the sums, added to those under way."""
        self._begin({name: p for name, (p, _) in fields.items()}, frozenset())
        staged = self._staged
        staged.norms = found["norms"][:n].clone()
        staged.group_norms = {group: norms[:n].clone() for group, norms in found["group_norms"].items()}
        before = {name: total for name, (p, _) in fields.items() if (total := self._before(p)) is not None}
        together = added_up(list(before.values()), [fields[name][1] for name in before])
        sums = {name: field for name, (_, field) in fields.items()} | dict(zip(before, together, strict=True))
        for name, (p, _) in fields.items():
            entry = _Entry(weakref.ref(p), name, weakref.ref(sums[name]), lent=name not in before)
            staged.entries[id(p)] = entry
        return sums

    def _weights(self, norms: Tensor, finite: Tensor | None, bound: Any) -> Tensor:
        """Clip factors; exactly 0 for an example that is not ``finite``, whatever the clip function says."""
        if finite is None:
            return bounded(self.clip, norms, bound)
        factors = bounded(self.clip, torch.where(finite, norms, torch.ones_like(norms)), bound)
        return torch.where(finite, factors, torch.zeros_like(factors))

    def _warn(self) -> None:
        if self.nonfinite and not self._warned:
            self._warned = True
            warn(
                "Some examples had a NaN or infinite gradient and contributed exactly zero to the clipped sums; "
                "ClippedGrad.nonfinite counts them in every backward, this warning comes once.",
                NonFiniteExampleWarning,
            )

    def _limit(self, group: str, device: torch.device) -> Any:
        """The bound on a group, a tensor in what a `RecordedStep` asks."""
        bound = self._bound(group)
        if self._lent is None:
            return bound
        if group not in self._lent:
            self._lent[group] = torch.full((), bound, dtype=torch.float64, device=device)
        return self._lent[group]

    def _before(self, p: Tensor) -> Tensor | None:
        """The sum under way; none after a step, or where the field is not ours any more."""
        entry = self._entries.get(id(p))
        before: Tensor | None = getattr(p, self.field, None)
        if before is None or entry is None or entry.used or entry.sum() is not before:
            return None
        _refuse_written(entry, before)
        return before

    def __repr__(self) -> str:
        """The settings; norms are private."""
        clip = getattr(self.clip, "function", self.clip)
        name = getattr(clip, "__name__", type(clip).__name__)
        return f"{type(self).__name__}(max_norm={self.max_norm}, clip={name}, groups={self.groups!r})"

    def _bound(self, group: str) -> float:
        if not isinstance(self.max_norm, dict):
            return positive("max_norm", self.max_norm)  # it may have been changed, to what was computed
        if group not in self.max_norm:
            raise ConfigurationError(f"ClippedGrad(max_norm=...): there is no bound for the group {group!r}.")
        return positive(f"max_norm[{group!r}]", self.max_norm[group])

    def consume(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        """The sums of these parameters, each to be used for one step only.

        Args:
            params: Trainable parameters, as the optimizer holds them.

        Returns:
            One tensor for each parameter.

        Raises:
            StaleGradientError: If one is missing or was used already.
        """
        sums = [self._fresh(p, index) for index, p in enumerate(params)]
        for p in params:
            self._entries[id(p)].used = True
        self._usual_repeats = self._repeats
        return sums

    def _fresh(self, p: nn.Parameter, index: int) -> Tensor:
        entry = self._entries.get(id(p))
        value: Tensor | None = getattr(p, self.field, None)
        if entry is None or entry.param() is not p or value is None or entry.sum() is not value:
            raise StaleGradientError(
                f"The optimizer's parameter {index} (shape {list(p.shape)}) has no clipped sum of this ClippedGrad: "
                f"no backward ran in `with perex(clipping):` or `with private:` since the last zero_grad, or the "
                f"parameter is not part of the extended model (was it replaced after the optimizer was made?)."
            )
        _refuse_written(entry, value)
        if entry.used:
            raise StaleGradientError(
                f"The clipped sum of `{entry.name}` was used by an earlier step already; run another backward in "
                f"perex(clipping) before the next step."
            )
        return value


CLIP_ALIKE: set[type] = {ClippedGrad}  # classes that clip as ClippedGrad does


def _refuse_written(entry: _Entry, value: Tensor) -> None:
    if version(value) != entry.writes:
        raise StaleGradientError(
            f"The clipped sum of `{entry.name}` was written to after the backward, and what one example adds to it "
            f"is no longer known. Scale by the learning rate, or change max_norm before the backward."
        )


def _freeing(views: list[ParameterView]) -> list[ParameterView]:
    """Those first whose sums take the least room beside what they let go, so that the peak is not in between."""
    if any(view.sharded for view in views):  # all processes sum in one order, and may hold different things
        return views
    return sorted(views, key=lambda view: view.param.nbytes - view.held())
