"""The outermost shell: the only package that imports Ray."""
