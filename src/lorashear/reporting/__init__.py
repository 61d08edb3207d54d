"""Tables, pictures and the run folder."""
