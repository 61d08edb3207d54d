"""From a model to its node groups: trace, axes, rules, groups."""
