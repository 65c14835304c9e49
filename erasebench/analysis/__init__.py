"""Questions beyond a run: comparison, audit, conformance, forecast, schedule."""
