"""Makes large language models smaller and keeps what they know."""
