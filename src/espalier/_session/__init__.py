"""The parts of a session: telling models apart, checking inputs, running steps, reporting."""
