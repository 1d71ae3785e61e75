"""Modules that the scripts share; the README lists them."""
