"""Programs that turn a prompt into a group through an engine."""
