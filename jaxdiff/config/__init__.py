"""Configs: their fields, their check, and their files."""
