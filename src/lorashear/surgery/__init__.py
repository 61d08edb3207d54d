"""Zero or cut out a selection, merge adapters, fix sizes and config, save and load."""
