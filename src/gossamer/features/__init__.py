"""Sparse features: dictionaries in which few atoms explain each activation."""
