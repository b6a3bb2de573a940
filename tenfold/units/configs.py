"""Which fields of a model's configuration hold the sizes of its units, where all are equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tenfold.records import Plan, UnitPlan

# What configurations of transformers call the number of hidden units of their MLPs. Of the fields of one side of an
# encoder and decoder only the MLPs of that side are meant.
_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim", "mlp_dim")
_SIDES = {"encoder": "encoder_ffn_dim", "decoder": "decoder_ffn_dim"}


def width_fields(config: Mapping[str, Any], plan: Plan) -> dict[str, int] | None:
    """Return the fields of a configuration that have to change for the MLP widths of a plan, with their new values.

    Use it to write a configuration from which the narrowed model is built without tenfold. It is safe to build a model
    of the changed configuration and compare the shapes: an MLP that is no unit of the plan has its old width.

    Args:
        config: of the dense model, as a mapping.
        plan: that was carried out.

    Returns:
        The changed fields; empty where no width changes; None where one field cannot say all: widths that differ from
        layer to layer, or a configuration that has none of the known fields with the old width.

    Example:
        >>> cost = {"params": 1, "macs": 1}
        >>> unit = {"kind": "mlp_width", "path": "", "full": {"width": 64}, "size": {"width": 48}, "reason": ""}
        >>> layer = {"kind": "Linear 64→8", "action": "keep", "reason": "", "before": cost, "after": cost}
        >>> plan = Plan.model_validate({
        ...     "tenfold": "", "model": "", "before": cost, "after": cost, "layers": [{"path": "fc2", **layer}],
        ...     "units": [{**unit, "pivot": "fc2", "before": cost, "after": cost}]})
        >>> width_fields({"intermediate_size": 64}, plan), width_fields({"intermediate_size": 32}, plan)
        ({'intermediate_size': 48}, None)
    """
    units = [unit for unit in plan.units if unit.kind == "mlp_width"]
    if not any(unit.size for unit in units):
        return {}
    changed: dict[str, int] = {}
    for field, own in _by_field(config, units).items():
        widths = {(unit.full["width"], (unit.size or unit.full)["width"]) for unit in own}
        if len(widths) != 1:
            return None
        old, new = next(iter(widths))
        if config.get(field) != old and not (config.get(field) is None and field == "n_inner"):
            return None
        if new != old:
            changed[field] = new
    return changed or None


def _by_field(config: Mapping[str, Any], units: Sequence[UnitPlan]) -> dict[str, list[UnitPlan]]:
    """Return the units whose width each field holds."""
    if all(field in config for field in _SIDES.values()):
        sides: dict[str, list[UnitPlan]] = {field: [] for field in _SIDES.values()}
        for unit in units:
            names = unit.pivot.split(".")
            field = next((field for side, field in _SIDES.items() if side in names), None)
            if field is None:
                return {}
            sides[field].append(unit)
        return {field: own for field, own in sides.items() if own}
    known = next((field for field in _WIDTHS if field in config), None)
    return {} if known is None else {known: list(units)}
