"""Groups of parameters that are clipped jointly, by the names of the parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from perexample._arguments import is_word, shown
from perexample.errors import ConfigurationError

Groups = str | Mapping[str, str]  # one of the words below, or names of groups by names of parameters or modules
_WORDS = ("all", "per-parameter", "per-module")


def check_groups(groups: Any) -> None:
    """Refuse what says nothing of groups."""
    if not isinstance(groups, Mapping) and not is_word(groups, _WORDS):
        raise ConfigurationError(
            f"groups must be 'all', 'per-parameter', 'per-module', or a mapping from parameter names; "
            f"not {shown(groups)}."
        )
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        if not isinstance(name, str) or not isinstance(group, (str, int)):
            raise ConfigurationError(
                f"groups must map names of parameters, or of modules, to names of groups, not "
                f"{shown(name)} to {shown(group)}."
            )


def refuse_unknown(groups: Groups, names: Collection[str]) -> None:
    """Refuse groups of what a model with parameters of these names has not."""
    for key in groups if isinstance(groups, Mapping) else ():
        if not any(_belongs(name, key) for name in names):
            raise ConfigurationError(
                f"ClippedGrad(groups=...): the model has no parameter or module `{key}`; the names are those of "
                f"model.named_parameters(), or what they begin with before a dot."
            )


def group_of(name: str, groups: Groups) -> str:
    """The group of a parameter; of several that fit the one with the longest name."""
    if isinstance(groups, Mapping):
        fits = [key for key in groups if _belongs(name, key)]
        if not fits:
            raise ConfigurationError(
                f"ClippedGrad(groups=...): parameter `{name}` belongs to no group; name it, or a module that holds it."
            )
        return groups[max(fits, key=len)]
    return {"all": "all", "per-parameter": name, "per-module": name.rpartition(".")[0]}[groups]


def _belongs(name: str, key: str) -> bool:
    """Whether a parameter is the one, or in the module, that a key of ``groups`` names."""
    return name == key or name.startswith(key + ".")
