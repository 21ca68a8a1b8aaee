"""The command ``epsledger`` and its demo: the only package that knows every other."""
