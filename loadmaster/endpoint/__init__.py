"""From an export to an endpoint: what serves it, what that costs, putting it there and asking it."""
