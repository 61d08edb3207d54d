"""Text sources, packing into windows, the built-in demo data."""
