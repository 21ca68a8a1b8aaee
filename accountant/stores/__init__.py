"""Stores: where a ledger is kept. A URL or a path selects one."""
