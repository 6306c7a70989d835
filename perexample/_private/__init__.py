"""Private PyTorch names, in one place; tests/test_private.py notices when one changes.

Used anywhere is what extensions of torch are built on: `Tensor._base`, the `_schema` that a dispatch mode looks at.
"""
# ruff: noqa: F401 - the library imports these names from here, whatever file they are in

from .backward import follow_recomputation, graph_task, repeats_forward, saves_otherwise, will_be_executed
from .generators import MT_STATE, generator_of, is_default_generator, system_generator
from .graph import (
    handed_through,
    is_named_by_kind,
    leaf_of,
    looked_up,
    loss_reduction_of,
    mean_is_over,
    metadata,
    norm_statistics,
    ones_for,
    options_of,
    output_shape,
    reentrant_checkpoint,
    saved,
    sums_losses,
)
from .hooks import (
    global_forward_hooks,
    global_hooks,
    has_backward_hooks,
    has_hook,
    hook_of,
    remove_hooks,
    run_first,
    runs_last,
    without_forward_hooks,
)
from .modes import (
    dispatch_is_off,
    dispatch_modes_active,
    dispatched,
    function_modes,
    inside_functorch,
    is_operation,
    operation_without_frame,
    transforms_active,
    undispatched,
    without_dispatch,
    without_functorch,
)
from .modules import (
    compiled_in_place,
    hides,
    is_bare,
    is_dropout,
    kept_state,
    laid_out_in_one,
    may_be_parametrized,
    named_parameters,
    overridden_forward,
    own_parameters,
    shards,
    stands_in,
    weight_names,
)
from .stack import calls_under_way, steps_under_way, whole_arguments
from .tensors import (
    added_up,
    float32_precision,
    gradient_hooks,
    hooks_after_gradient,
    in_memory,
    is_python_number,
    memory_of,
    memory_order,
    set_float32_precision,
    shown_by,
    value_of,
    version,
    whole_base,
)
