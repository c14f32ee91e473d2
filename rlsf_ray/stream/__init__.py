"""Decisions without Ray: pure state machines, tested with an injected clock."""
