"""The vocabulary: what may become zero, in which shape, which, how many, where and when."""
