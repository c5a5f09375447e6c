"""Checks and starts the experiment trackers of a run through accelerate."""

from collections.abc import Mapping, Sequence
from typing import Any

from mpo_ext.checks import did_you_mean, install_hint
from mpo_ext.train.recipe import Recipe
from mpo_ext.train.resume import flat_settings, plain_values

_PROJECT = "mpo_ext"
_EXTRAS = ("tensorboard", "trackio", "wandb")  # extras of mpo_ext, with the names of the trackers


def check_trackers(names: Sequence[str]) -> None:
    """Checks that accelerate knows each tracker and that its package is installed.

    Raises:
        ValueError: If accelerate does not know the name.
        ImportError: If the package of the tracker is not installed.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    known = {str(name) for name in LOGGER_TYPE_TO_CLASS}
    built_in = {str(kind.value) for kind in LoggerType} - {"all"}
    installed = {str(getattr(kind, "value", kind)) for kind in get_available_trackers()}
    for name in names:
        if name == "all":
            continue
        if name not in known:
            raise ValueError(
                f"output.trackers must name trackers of accelerate ({', '.join(sorted(known))}), got {name!r}"
                f"{did_you_mean(name, known)}"
            )
        if name in built_in and name not in installed:
            hint = install_hint(name) if name in _EXTRAS else f"pip install {name}"
            raise ImportError(f"output.trackers: {name} needs its package: {hint}")


def start_trackers(recipe: Recipe, accelerator: Any) -> None:
    """Starts the trackers that the recipe names, and logs all settings of the recipe as their config."""
    if not recipe.output.trackers:
        return
    settings = flat_settings(plain_values(recipe.to_dict()))
    config = {
        name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in settings.items()
    }
    # Otherwise wandb writes into the current folder.
    options: Mapping[str, dict[str, Any]] = {"wandb": {"dir": recipe.output.dir}}
    accelerator.init_trackers(_PROJECT, config=config, init_kwargs=options)
