"""Data mixture by deviation, and the two stages of recovery."""
