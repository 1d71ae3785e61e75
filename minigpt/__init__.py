"""Modules that the scripts share; docs/ and the README name each of them."""
