"""Per-example gradients of one parameter at one tap, kept in the form that is cheapest to hold.

A `Term` stands for a tensor ``[N, *p.shape]`` that may never be formed. `Dense` is that tensor; `Outer` is a sum of
outer products over positions (linear layers); `Windows` are a convolution's, and outer products once unfolded; `Rows`
touches few rows of a table (embeddings); `Placed` (`placed.py`) has entries of one example each. `combine` adds the
terms of all taps of a parameter, so that a shared weight is exact, cross terms included, without forming what need not
be formed.

Norms come in two steps. A term offers `Method` objects, exact ways that differ in time and memory; `perexample.methods`
chooses one. It returns the norms and the term to go on with for the weighted sum: the same factors, or the gradients if
these were formed anyway and take less room, so that no product is computed twice and the other can be freed.

Squared norms from Gram matrices (Goodfellow 2015, arXiv:1510.01799, section 4; Li et al. 2022, arXiv:2110.05679,
section 4) cancel in float32 where positions oppose each other. Every such norm is therefore compared with the sum of
the norms of its pieces, and recomputed in float64 where digits may be missing.
"""

from .base import Dense, Formed, Regrouped, Term, blockwise, keeping, remembering
from .grouping import rows_together
from .outer import Outer, positions
from .rows import Rows
from .sums import Sum, combine
from .windows import Windows

__all__ = [
    "Dense",
    "Formed",
    "Outer",
    "Regrouped",
    "Rows",
    "Sum",
    "Term",
    "Windows",
    "blockwise",
    "combine",
    "keeping",
    "positions",
    "remembering",
    "rows_together",
]
