"""Results as JSON has them."""

import math
from typing import Any


def json_value(value: Any) -> Any:
    """Return a value for JSON, which has no number for NaN or infinity: null, and "inf" or "-inf"; also within dicts, lists and tuples."""
    if isinstance(value, dict):
        return {key: json_value(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
