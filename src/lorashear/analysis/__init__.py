"""From node groups to scores: saliency and the knowledge profile."""
