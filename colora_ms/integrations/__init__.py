"""Bridges to other libraries; nothing in the package imports them but by the table in
``colora_ms/adapters/tree.py``."""
