"""Pick structures and walk them to zero: LHSPG, its schedule, one-shot baselines."""
