"""Sparse coding: signals as sums of a few atoms of a dictionary, which is given or learnt."""
