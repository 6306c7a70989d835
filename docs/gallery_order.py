"""Order of the gallery's pages: as one learns, then by name."""

from sphinx_gallery.sorting import FunctionSortKey

FIRST = [
    "plot_first_steps.py",
    "plot_mislabelled.py",
    "plot_clipping.py",
    "plot_dp_sgd.py",
    "plot_calibration.py",
    "plot_physical_batches.py",
    "plot_importance_sampling.py",
    "plot_influence.py",
    "plot_noise_scale.py",
    "plot_private_text.py",
    "plot_lora.py",
    "plot_new_rule.py",
    "plot_new_extension.py",
    "plot_two_processes.py",
]


def _position(name: str) -> tuple[int, str]:
    return (FIRST.index(name) if name in FIRST else len(FIRST), name)


class PageOrder(FunctionSortKey):
    """Sort key that sphinx-gallery makes for each folder."""

    def __init__(self, src_dir: str) -> None:
        super().__init__(_position)
