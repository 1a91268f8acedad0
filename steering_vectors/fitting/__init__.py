"""From preference data to a calibrated profile."""
