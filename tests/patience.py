"""How long a test waits for what ought to come, before it calls it hanging."""

PATIENCE = 900.0
"""Seconds. No test is that slow: a machine whose cores are lent out several times over was four times as slow as a
quiet one (2026-11-29), and what is late there is no fault."""
