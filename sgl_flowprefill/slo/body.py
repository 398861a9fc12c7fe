"""The objectives in a request's body: all places where clients put them, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final

from sgl_flowprefill.slo.objective import (
    CLASS_KEY,
    SHEDDABLE_KEY,
    SLO_KEY,
    TBT_KEY,
    SloError,
    check_object,
    class_name,
    is_sheddable,
    objective_s,
    shortened,
)

CUSTOM_PARAMS: Final = "custom_params"
SAMPLING_PARAMS: Final = "sampling_params"
READ: Final[Mapping[str, Callable[[Any], float | str | bool | None]]] = {
    SLO_KEY: partial(objective_s, SLO_KEY),
    TBT_KEY: partial(objective_s, TBT_KEY),
    CLASS_KEY: class_name,
    SHEDDABLE_KEY: is_sheddable,
}
"""What clients may name, and how each is read: None where they do not. SloError for what is not valid."""


def with_objective(sampling_params: Any, custom_params: Any) -> Any:
    """``sampling_params`` of a ``/generate`` body with the objectives of the ``custom_params`` at its top.

    There may be one mapping, one for each prompt, or None. Raises SloError for an invalid objective, for one at the top
    where ``sampling_params`` name another, and for ``custom_params`` at the top that are no mapping.
    """
    if custom_params is not None and not isinstance(custom_params, Mapping):
        raise SloError(
            f"custom_params at the top of the request must be an object, got {shortened(custom_params)}; prompts of "
            "one request that need different ones have them in a list of sampling_params."
        )
    if isinstance(sampling_params, list):
        return [with_objective(one, custom_params) for one in sampling_params]
    if sampling_params is not None and not isinstance(sampling_params, Mapping):
        return sampling_params
    for key in READ:
        sampling_params = _with_one(key, sampling_params, custom_params)
    return sampling_params


def _with_one(key: str, sampling_params: Mapping[str, Any] | None, custom_params: Any) -> Mapping[str, Any] | None:
    top = READ[key](custom_params)
    inner = (sampling_params or {}).get(CUSTOM_PARAMS)
    named = READ[key](inner)
    if top is None:
        return sampling_params
    if named is not None and named != top:
        raise SloError(
            f'custom_params["{key}"] is {_text(top)} at the top of the request, but {_text(named)} in its '
            "sampling_params; name it once."
        )
    if inner is not None and not isinstance(inner, Mapping):
        raise SloError(
            f'custom_params["{key}"] at the top of the request cannot be added to its sampling_params, whose '
            f"custom_params are {shortened(inner)}; make them an object, or name the objective there."
        )
    return {**(sampling_params or {}), CUSTOM_PARAMS: {**(inner or {}), key: top}}


def _text(value: float | str | bool) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)


def all_custom_params(body: Any) -> Iterator[Any]:
    """Every ``custom_params`` of a parsed request body.

    ``/generate`` has them inside ``sampling_params``, of which there may be one for each prompt, or at the top; the
    other endpoints have them at the top, and ``/vertex_generate`` has the ``sampling_params`` of all its instances in
    ``parameters``.
    """
    if not isinstance(body, Mapping):
        return
    yield body.get(CUSTOM_PARAMS)
    parameters = body.get("parameters")
    for owner in (body, parameters):
        sampling = owner.get(SAMPLING_PARAMS) if isinstance(owner, Mapping) else None
        for one in sampling if isinstance(sampling, list) else (sampling,):
            yield one.get(CUSTOM_PARAMS) if isinstance(one, Mapping) else None


def body_error(body: Any) -> str | None:
    """What is wrong with the objectives in a parsed request body, or None."""
    if not isinstance(body, Mapping):
        return None
    try:
        for custom_params in all_custom_params(body):
            for read in READ.values():
                read(custom_params)
        with_objective(body.get(SAMPLING_PARAMS), body.get(CUSTOM_PARAMS))
        for custom_params in all_custom_params(body):
            check_object(custom_params)
    except SloError as error:
        return str(error)
    return None
