"""Models: found, loaded once, given adapters, and run over packed rows."""
